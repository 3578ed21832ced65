"""The promise of the scripts: a fork for another model replaces the block "The model", and nothing else."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKLLTXVideo,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    LTXVideoTransformer3DModel,
    UNet2DModel,
)
from PIL import Image
from safetensors.torch import load_file
from transformers import T5Config, T5EncoderModel

from tests.helpers import ROOT, letter_tokenizer

RULER = "# " + "=" * 117 + "\n"
SHORT = "--train_batch_size 2 --checkpointing_steps 2 --validation_steps 2 --lr_warmup_steps 0 --report_to none"


def fork(script: str, block: str, folder: Path):
    """The module of a script in which one of tests/forks stands for its block."""
    head, rest = (ROOT / script).read_text().split(RULER + "# The model")
    training = rest.split(RULER + "# Training\n")[1]
    model = (ROOT / "tests" / "forks" / block).read_text()
    path = folder / f"fork_of_{script}"
    path.write_text(f"{head}{RULER}# The model\n{RULER}\n{model}\n\n{RULER}# Training\n{training}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # dataclasses look for it
    spec.loader.exec_module(module)
    return module


def train_stop_and_resume(script, argv: list[str], folder: Path, reset) -> Path:
    """Trains 4 steps at once, and 2 that go on to 4, which gives the same weights; returns the latter's folder."""
    whole, resumed = folder / "at_once", folder / "resumed"
    script.main(*script.parse_args([*argv, "--output_dir", str(whole), "--max_train_steps", "4"]))
    reset()
    # a checkpoint of step 2 is all that is left of the run that was killed
    resumed.mkdir()
    (whole / "checkpoint-2").rename(resumed / "checkpoint-2")
    again = ["--output_dir", str(resumed), "--max_train_steps", "4", "--resume_from_checkpoint", "latest"]
    script.main(*script.parse_args([*argv, *again]))
    first = load_file(whole / "checkpoint-4" / "student.safetensors")
    before = load_file(resumed / "checkpoint-2" / "student.safetensors")
    second = load_file(resumed / "checkpoint-4" / "student.safetensors")
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(before[name], second[name]) for name in second)  # that something is trained
    return resumed


@pytest.fixture(scope="session")
def pixel_teacher(tmp_path_factory):
    """A class-conditional U-Net on pixels with random weights."""
    folder = tmp_path_factory.mktemp("pixels")
    torch.manual_seed(0)
    UNet2DModel(
        sample_size=16, in_channels=3, out_channels=3, block_out_channels=(8, 16), layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4, num_class_embeds=5, attention_head_dim=8,
    ).save_pretrained(folder / "unet")  # fmt: skip
    DDIMScheduler(clip_sample=False).save_pretrained(folder / "scheduler")
    return folder


@pytest.fixture(scope="session")
def ltx_teacher(tmp_path_factory):
    """LTX-Video with random weights, for clips whose sides are multiples of 32."""
    folder = tmp_path_factory.mktemp("ltx")
    torch.manual_seed(0)
    LTXVideoTransformer3DModel(
        in_channels=8, out_channels=8, num_attention_heads=2, attention_head_dim=16, cross_attention_dim=32,
        num_layers=2, caption_channels=16,
    ).save_pretrained(folder / "transformer")  # fmt: skip
    AutoencoderKLLTXVideo(
        latent_channels=8, block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4, layers_per_block=(1,) * 5,
        decoder_layers_per_block=(1,) * 5,
    ).save_pretrained(folder / "vae")  # fmt: skip
    tokenizer = letter_tokenizer()
    tokenizer.save_pretrained(folder / "tokenizer")
    text = T5Config(vocab_size=len(tokenizer), d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    T5EncoderModel(text).save_pretrained(folder / "text_encoder")
    FlowMatchEulerDiscreteScheduler(shift=2.0).save_pretrained(folder / "scheduler")
    return folder


@pytest.mark.slow
def test_a_block_of_under_120_lines_makes_a_fork_on_pixels(pixel_teacher, small_shards, tmp_path, one_process):
    assert (ROOT / "tests" / "forks" / "class_conditional.py").read_text().count("\n") < 120
    script = fork("train_lcm_distill_sd.py", "class_conditional.py", tmp_path)
    argv = f"--pretrained_teacher_model {pixel_teacher} --train_shards_path_or_url {small_shards}/{{00000..00001}}.tar"
    argv += f" {SHORT} --resolution 16 --w_min 1 --w_max 1 --validation_num_inference_steps 1,2 --report_steps 2"
    argv += " --eval_steps 2 --eval_samples 2 --scheduled_sampling_probability 0.5 --ema_decay 0.5"
    argv += " --scheduled_sampling_max_step_offset 5 --proportion_empty_prompts 0.3"
    folder = train_stop_and_resume(script, argv.split(), tmp_path, one_process)

    # the exported network is the target of the last checkpoint, and the card's lines make a picture with it
    exported = UNet2DModel.from_pretrained(folder).state_dict()
    target = load_file(folder / "checkpoint-4" / "target.safetensors")
    assert all(torch.equal(exported[name], target[name]) for name in target)
    lines = {}
    with torch.no_grad():  # restores what the lines change
        exec((folder / "README.md").read_text().split("```python\n")[1].split("```")[0], lines)
    assert lines["x"].shape == (1, 3, 16, 16) and lines["x"].isfinite().all()
    assert np.asarray(Image.open(folder / "samples.png")).std() > 5
    assert (folder / "report.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "student", ["--lora_rank 4", "--model_type full --use_ema", "--lora_rank 4 --distillation_method lcm"]
)
def test_the_block_of_ltx_video_makes_a_fork_of_the_wan_script(ltx_teacher, tmp_path, student, one_process):
    script = fork("train_dmd_distill_wan.py", "ltx_video.py", tmp_path)
    (tmp_path / "prompts.txt").write_text("a red ball\na blue ball\na green ball\n")
    argv = f"--pretrained_teacher_model {ltx_teacher} --train_prompts {tmp_path / 'prompts.txt'} {SHORT} {student}"
    argv += " --resolution 64 --num_frames 9 --validation_num_video_frames 9 --report_steps 2 --max_sequence_length 16"
    argv += " --learning_rate 1e-3 --causal_init_steps 1 --proportion_empty_prompts 0.3 --validation_prompt ball"
    folder = train_stop_and_resume(script, argv.split(), tmp_path, one_process)
    if "full" in student:
        exported = LTXVideoTransformer3DModel.from_pretrained(folder, subfolder="transformer").state_dict()
        average = load_file(folder / "checkpoint-4" / "ema.safetensors")
        assert all(torch.equal(exported[name.replace("/", ".")], average[name]) for name in average)
    else:
        assert any("lora_B" in name for name in load_file(folder / "pytorch_lora_weights.safetensors"))
    assert np.asarray(Image.open(folder / "samples.png")).std() > 5
    assert (folder / "side_by_side.mp4").exists()


def test_latents_of_ltx_video_s_clips_are_what_it_decodes(ltx_teacher, tmp_path):
    script = fork("train_dmd_distill_wan.py", "ltx_video.py", tmp_path)
    vae = AutoencoderKLLTXVideo.from_pretrained(ltx_teacher, subfolder="vae")
    vae.latents_mean.fill_(0.3)
    vae.latents_std.fill_(2.0)
    pixels = torch.rand(1, 3, 9, 64, 64) * 2 - 1
    with torch.no_grad():
        raw = vae.encode(pixels).latent_dist.mode()
        latents = script.encode_pixels(vae, pixels)["latents"]
        torch.testing.assert_close(latents, (raw - 0.3) / 2)
        expected = (vae.decode(raw).sample[0] / 2 + 0.5).clamp(0, 1).permute(1, 2, 3, 0)
    torch.testing.assert_close(torch.tensor(script.decode(vae, latents)[0]), expected, atol=1e-5, rtol=1e-4)


def test_a_causal_student_of_ltx_video_is_refused(ltx_teacher, tmp_path, capsys):
    script = fork("train_dmd_distill_wan.py", "ltx_video.py", tmp_path)
    with pytest.raises(SystemExit):
        script.parse_args(["--pretrained_teacher_model", str(ltx_teacher), "--num_frame_per_block", "1"])
    assert "this model's students are bidirectional" in capsys.readouterr().err
