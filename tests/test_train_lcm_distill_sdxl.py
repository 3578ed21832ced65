"""The SDXL script's model: what the networks are told, a whole step in float64, starts, and exports.

What both LCM scripts do alike is tested on the SD script; the tests of their text hold them to it.
"""

import gc
import io
import json
import re
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import wandb
from accelerate import Accelerator
from diffusers import AutoencoderKL, LCMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file
from transformers import CLIPTextModel, CLIPTextModelWithProjection

import train_lcm_distill_sdxl as script
from common.networks import active_adapter, adapter_layers
from tests.compiled import REAL_SDXL
from tests.helpers import ROOT, teacher_like, tiny_autoencoder, tiny_sdxl_pipeline, write_shard
from tests.lcm import SHORT, TWO_STEPS, Runner, check_graphs, check_weights, lcm_in_float64, perturb, randomize_adapters
from tests.waits import steps_without_waits

ODD_SIZE = (257, 515)  # height and width of an original; bf16 has neither
CONFIGS = ROOT / "tests" / "configs"


@pytest.fixture(scope="module")
def sdxl_teachers(sdxl_teacher, tmp_path_factory):
    """By prediction type, and one whose empty prompt is encoded."""
    others = {"v_prediction": {"prediction_type": "v_prediction"}, "encodes": {"force_zeros": False}}
    copies = {
        name: teacher_like(sdxl_teacher, tmp_path_factory.mktemp(name), **settings) for name, settings in others.items()
    }
    return {"epsilon": sdxl_teacher} | copies


@pytest.fixture
def lcm(sdxl_teacher, small_shards, tmp_path, monkeypatch, one_process):
    """`lcm.run(flags)`: a short run in this test's folder; `lcm.parse(flags)`: what its main takes."""
    monkeypatch.chdir(small_shards)
    return Runner(script, tmp_path, sdxl_teacher, one_process, "--bucket_alignment 8")


@pytest.fixture
def odd_shard(tmp_path):
    """Samples of an odd size."""
    rng = torch.Generator().manual_seed(0)
    samples = []
    for i in range(4):
        file = io.BytesIO()
        pixels = torch.randint(0, 256, (*ODD_SIZE, 3), generator=rng, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(file, "png")
        samples.append({"png": file.getvalue(), "txt": f"noise {i}".encode()})
    return write_shard(tmp_path / "odd.tar", samples)


def tiny_conditions(batch: int = 2) -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(4)
    sizes = torch.tensor([[32.0, 40.0, 0.0, 4.0, 32.0, 32.0]]).repeat(batch, 1)
    embeds = torch.randn(batch, 32, 40, generator=rng)
    return {"prompt_embeds": embeds, "text_embeds": torch.randn(batch, 20, generator=rng), "time_ids": sizes}


def tiny_inputs():
    return torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(4)), torch.tensor([999, 19])


# ---------------------------------------------------------------------------------------------------------------------
# The algorithm, restated
# ---------------------------------------------------------------------------------------------------------------------


def sdxl_conditions(pipe, sample) -> tuple[dict, dict]:
    """By the pipeline's own encoding; whether the empty prompt is zeros is its own business."""
    embeds, no_embeds, pooled, no_pooled = pipe.encode_prompt(
        sample.caption, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True
    )
    sizes = torch.tensor([[32.0, 40.0, 0.0, 4.0, 32.0, 32.0]], dtype=torch.float64)  # of the shards, cut to 32x32
    return (
        {"encoder_hidden_states": embeds, "added_cond_kwargs": {"text_embeds": pooled, "time_ids": sizes}},
        {"encoder_hidden_states": no_embeds, "added_cond_kwargs": {"text_embeds": no_pooled, "time_ids": sizes}},
    )


@pytest.mark.parametrize("teacher", ["epsilon", "v_prediction", "encodes"])
def test_training_steps_equal_the_algorithm_restated_in_float64(teacher, lcm, sdxl_teachers, watch):
    args, data, _ = lcm.parse(TWO_STEPS, sdxl_teachers[teacher])
    losses, student, target = lcm_in_float64(script, args, data, StableDiffusionXLPipeline, sdxl_conditions)
    ours = watch(script, "consistency_loss")
    out = lcm.run(TWO_STEPS, sdxl_teachers[teacher])
    torch.testing.assert_close([loss.item() for _, loss in ours], losses, rtol=5e-5, atol=0)
    start = load_file(sdxl_teachers[teacher] / "unet" / "diffusion_pytorch_model.safetensors")
    check_weights(out, start, student, target)


# ---------------------------------------------------------------------------------------------------------------------
# What the networks are told
# ---------------------------------------------------------------------------------------------------------------------


def test_size_ids_reach_the_sinusoid_in_fp32_in_a_bf16_run(lcm, odd_shard, monkeypatch):
    """bf16 makes 256 of 257 and 516 of 515."""
    seen = []

    def listen(teacher, student, target):
        for network in (teacher, student, target):
            network.add_time_proj.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))

    perturb(monkeypatch, script, listen)
    lcm.run(f"--mixed_precision bf16 --train_shards_path_or_url {odd_shard}")
    resized = round(515 * 32 / 257)
    ids = torch.tensor([257.0, 515.0, 0.0, (resized - 32) // 2, 32.0, 32.0])
    for values, batch in zip(seen[:3], (8, 4, 4), strict=True):  # teacher with both prompts, target, student
        assert values.dtype == torch.float32 and torch.equal(values.view(batch, 6), ids.repeat(batch, 1))


@pytest.mark.parametrize("teacher", ["epsilon", "encodes"])
def test_the_empty_prompt_is_what_the_teacher_s_pipeline_says(teacher, lcm, sdxl_teachers, watch):
    calls = watch(script, "predict")
    lcm.run("--proportion_empty_prompts 0.5 --train_batch_size 8", sdxl_teachers[teacher])
    pipe = StableDiffusionXLPipeline.from_pretrained(sdxl_teachers[teacher])
    _, embeds, _, pooled = pipe.encode_prompt("anything", device="cpu")
    assert (embeds.abs().max() == 0) == (teacher == "epsilon")
    (_, _, _, both, *_), _ = calls[0]
    for name, expected in (("prompt_embeds", embeds), ("text_embeds", pooled)):
        rows = both[name]
        torch.testing.assert_close(rows[8:], expected.expand_as(rows[8:]), rtol=0, atol=1e-6)
        dropped = [torch.allclose(row, expected[0], rtol=0, atol=1e-6) for row in rows[:8]]
        assert 0 < sum(dropped) < 8  # dropped prompts are this too
    assert torch.equal(both["time_ids"][:8], both["time_ids"][8:])


def test_prompts_are_encoded_as_by_the_pipeline(lcm, sdxl_teacher):
    prompts = ["a small red circle", "at the top on a blue background " * 20]  # the latter is cut off
    encoders = script.load_text_encoders(lcm.args(), torch.device("cpu"), torch.float32)
    ours = script.encode_prompts(encoders, prompts)
    pipe = StableDiffusionXLPipeline.from_pretrained(sdxl_teacher)
    embeds, _, pooled, _ = pipe.encode_prompt(prompts, device="cpu", do_classifier_free_guidance=False)
    torch.testing.assert_close(ours, {"prompt_embeds": embeds, "text_embeds": pooled})


def test_pictures_are_the_pipeline_s_own_at_any_size(lcm, sdxl_teacher):
    """Generated from embeddings, at a bucket's size, they are those that a user gets from the prompt."""
    prompt = "a large white cross on the left"
    pipe = StableDiffusionXLPipeline.from_pretrained(sdxl_teacher)
    embeds, no_embeds, pooled, no_pooled = pipe.encode_prompt(prompt, device="cpu")
    (ours,) = script.generate(
        lcm.args(), pipe.vae, pipe.unet, pipe.scheduler, {"prompt_embeds": embeds, "text_embeds": pooled},
        {"prompt_embeds": no_embeds, "text_embeds": no_pooled}, 3, 4.0, 7, (48, 32), None,
    )  # fmt: skip
    noise = torch.Generator().manual_seed(7)
    stock = pipe(prompt, height=48, width=32, num_inference_steps=3, guidance_scale=4.0, generator=noise).images[0]
    assert ours.size == (32, 48) and ours.tobytes() == stock.tobytes()


@pytest.mark.slow
@pytest.mark.parametrize("override", [False, True])
def test_the_vae_is_in_fp32_unless_another_is_given(override, lcm, sdxl_teacher, watch, tmp_path):
    other = AutoencoderKL.from_pretrained(sdxl_teacher, subfolder="vae")
    torch.nn.init.normal_(other.decoder.conv_out.weight, generator=torch.Generator().manual_seed(0))
    other.save_pretrained(tmp_path / "vae")
    encoded, generated = watch(script, "encode_pixels"), watch(script, "generate")
    lcm.run("--mixed_precision bf16" + f" --pretrained_vae_model_name_or_path {tmp_path / 'vae'}" * override)
    for vae in (encoded[0][0][0], generated[0][0][1]):
        assert vae.dtype == (torch.bfloat16 if override else torch.float32)
        same = torch.allclose(vae.decoder.conv_out.weight.float(), other.decoder.conv_out.weight, atol=2e-2)
        assert same == override


# ---------------------------------------------------------------------------------------------------------------------
# Student, teacher, exports
# ---------------------------------------------------------------------------------------------------------------------


def test_a_full_student_starts_as_its_teacher_for_every_w(lcm):
    teacher, student, target = script.load_networks(lcm.args(), Accelerator(), torch.float32)
    x, t = tiny_inputs()
    expected = script.predict(teacher, x, t, tiny_conditions())
    for w in (1.0, 12.0):
        for network in (student, target):
            assert torch.equal(script.predict(network, x, t, tiny_conditions(), torch.full((2,), w)), expected)


@pytest.mark.parametrize("flags", ["--lora_rank 4", "--use_dora", "--lora_rank 4 --mixed_precision bf16"])
def test_without_adapters_the_network_is_the_teacher_bit_for_bit(flags, lcm):
    args = lcm.args(flags)
    dtype = torch.bfloat16 if args.mixed_precision else torch.float32
    teacher, student, target = script.load_networks(args, Accelerator(), dtype)
    assert teacher is student is target
    randomize_adapters(student)
    base = script.load_teacher(args, dtype)
    base.to(memory_format=torch.contiguous_format if args.use_dora else torch.channels_last)
    x, t = tiny_inputs()
    cond = {name: v if name == "time_ids" else v.to(dtype) for name, v in tiny_conditions().items()}
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        expected = script.predict(base, x, t, cond)
        with active_adapter(adapter_layers(student), "none"):
            assert torch.equal(script.predict(student, x, t, cond), expected)
        assert (script.predict(student, x, t, cond) - expected).abs().mean() > 1e-2


def outputs_of(network, teacher, out, **weights) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of a network, of its teacher, and of its teacher's pipeline with the LoRA in the folder `out`."""
    pipe = StableDiffusionXLPipeline.from_pretrained(teacher)
    (x, t), cond = tiny_inputs(), tiny_conditions()
    with torch.no_grad():
        base = script.predict(pipe.unet, x, t, cond)
        pipe.load_lora_weights(out, **weights)
        return script.predict(network.eval(), x, t, cond), base, script.predict(pipe.unet.eval(), x, t, cond)


@pytest.mark.slow
@pytest.mark.parametrize("flags", ["--lora_rank 4 --lora_alpha 8", "--lora_rank 4 --lora_alpha 8 --use_dora"])
def test_an_exported_lora_loads_in_the_stock_pipeline(flags, lcm, sdxl_teacher, monkeypatch):
    networks = perturb(monkeypatch, script, randomize_adapters)
    out = lcm.run(f"{flags} --max_train_steps 2 --learning_rate 1e-2")
    ours, base, loaded = outputs_of(networks[1], sdxl_teacher, out)
    assert (loaded - base).abs().mean() > 1e-2
    torch.testing.assert_close(loaded, ours, rtol=0, atol=1e-6)


def test_the_kohya_file_is_the_lora_in_stabilitys_names(lcm, sdxl_teacher, monkeypatch):
    networks = perturb(monkeypatch, script, randomize_adapters)
    targets = "to_q,to_v,ff.net.2,conv1,conv_shortcut,time_emb_proj"
    out = lcm.run(f"--lora_rank 4 --lora_alpha 8 --export_formats diffusers,kohya --lora_target_modules {targets}")
    keys = load_file(out / "kohya_lora.safetensors").keys()
    assert all(key.startswith(("lora_unet_input_", "lora_unet_middle_", "lora_unet_output_")) for key in keys)
    ours, _, loaded = outputs_of(networks[1], sdxl_teacher, out, weight_name="kohya_lora.safetensors")
    torch.testing.assert_close(loaded, ours, rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "error"), [("int8-quanto", 0.02), ("fp8-torchao", 0.1)])
def test_a_lora_of_a_base_in_8_bits_loads_on_the_plain_one(precision, error, lcm, sdxl_teacher, monkeypatch):
    networks = perturb(monkeypatch, script, lambda network, *_: randomize_adapters(network, std=0.1))
    out = lcm.run(f"--lora_rank 4 --base_model_precision {precision} --learning_rate 1e-2")
    frozen = [m.weight for m in networks[1].modules() if type(m) is torch.nn.Linear and not m.weight.requires_grad]
    assert {type(weight).__name__ for weight in frozen} == {"Int8Tensor" if "int8" in precision else "Float8Tensor"}
    ours, base, loaded = outputs_of(networks[1], sdxl_teacher, out)
    assert (loaded - base).norm() > 0.2 * base.norm()
    assert (loaded - ours).norm() < error * loaded.norm()


@pytest.mark.parametrize("where", ["cpu", "accelerator"])
def test_weights_are_brought_to_8_bits_where_asked(where, lcm, monkeypatch):
    places, meta = [], torch.device("meta")
    monkeypatch.setattr(script, "quantize", lambda network, precision, place: places.append(str(place)))
    args = lcm.args(f"--lora_rank 2 --base_model_precision int8-torchao --quantize_via {where}")
    script.load_text_encoders(args, meta, torch.float32)
    script.load_networks(args, SimpleNamespace(device=meta, print=print), torch.float32)
    assert places == ["cpu" if where == "cpu" else "meta"] * 3


def test_an_exported_student_is_a_network_and_where_asked_a_whole_pipeline(lcm, monkeypatch):
    networks = perturb(monkeypatch, script, lambda *_: None)
    out = lcm.run("--num_ddim_timesteps 25 --learning_rate 1e-2 --export_pipeline")
    target = networks[2].state_dict()
    unet = UNet2DConditionModel.from_pretrained(out)
    assert unet.config.time_cond_proj_dim == 256
    assert all(torch.equal(value, target[name]) for name, value in unet.state_dict().items())
    pipe = StableDiffusionXLPipeline.from_pretrained(out)
    assert isinstance(pipe.scheduler, LCMScheduler) and pipe.scheduler.config.original_inference_steps == 25
    assert pipe.config.force_zeros_for_empty_prompt and pipe.unet.config.time_cond_proj_dim == 256
    assert all(torch.equal(value, target[name]) for name, value in pipe.unet.state_dict().items())
    picture = pipe("a red circle", height=32, width=32, num_inference_steps=2, guidance_scale=9.0).images[0]
    assert picture.size == (32, 32)


@pytest.mark.slow
@pytest.mark.parametrize("flags", ["--model_type full", "--lora_rank 4"])
def test_the_card_says_how_to_use_the_model_what_made_it_and_how_good_it_is(flags, lcm, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train_lcm_distill_sdxl.py", *flags.split(), "--seed", "42"])
    out = lcm.run(f"{flags} --num_ddim_timesteps 25 --report_steps 1,3 --validation_prompt= ")
    card = (out / "README.md").read_text()
    assert f"accelerate launch train_lcm_distill_sdxl.py {flags} --seed 42\n" in card
    settings = json.loads(re.search(r"```json\n(.*?)```", card, re.DOTALL)[1])
    assert (settings["num_ddim_timesteps"], settings["report_steps"], settings["w_max"]) == (25, [1, 3], 15.0)
    assert "![samples](samples.png)" in card and Image.open(out / "samples.png").width > 4 * 128  # a prompt a column
    scheduler = LCMScheduler.from_pretrained(out, subfolder="scheduler")
    assert scheduler.config.original_inference_steps == 25
    assert f'LCMScheduler.from_pretrained("{out}", subfolder="scheduler")' in card
    # Without asking nothing but the student is written
    assert not {"model_index.json", "unet", "vae", "text_encoder"} & {path.name for path in out.iterdir()}

    rows = json.loads((out / "report.json").read_text())
    samplers = [("teacher", 50), ("teacher", 1), ("teacher", 3), ("student", 1), ("student", 3)]
    assert [(row["sampler"], row["steps"]) for row in rows] == samplers
    assert all(f"| {row['sampler']} | {row['steps']} | {row['distance']:.4f} |" in card for row in rows)
    plot = np.asarray(Image.open(out / "report.png"))
    lines = [(plot == np.array(colour)).all(-1).sum() for colour in ((0x88, 0x88, 0x88), (0xC0, 0x30, 0x20))]
    assert min(lines) > 100 and "![steps against quality](report.png)" in card  # teacher's and student's


# ---------------------------------------------------------------------------------------------------------------------
# Caches
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("flags", "there"), [("", set()), ("--vae_cache_disable", {AutoencoderKL})])
def test_with_full_caches_neither_vae_nor_text_encoders_are_there(flags, there, lcm, monkeypatch):
    """While training, in the run that fills them and in the next."""
    kinds, found = (AutoencoderKL, CLIPTextModel, CLIPTextModelWithProjection), []

    def encoders() -> list:
        gc.collect()
        return [thing for thing in gc.get_objects() if type(thing) in kinds]

    before = encoders()
    known = set(map(id, before))
    monkeypatch.setattr(
        Accelerator, "log", lambda *_, **__: found.append({type(e) for e in encoders() if id(e) not in known})
    )
    for _ in range(2):
        lcm.run(flags)
    assert found == [there] * 2


@pytest.mark.slow
def test_from_a_cache_the_teacher_is_told_what_it_is_told_without(two_shapes, lcm, tmp_path, watch):
    """Latents, both text encoders' embeddings, size ids: streamed, while filling, from what was filled, on demand."""
    calls, told = watch(script, "predict"), []
    flags = f"--train_batch_size 2 --max_train_steps 6 --learning_rate 1e-6 {two_shapes}"
    lcm.flags = [*SHORT.split(), "--bucket_alignment", "8"]
    on_demand = f"--vae_cache_ondemand --compress_disk_cache --cache_dir_vae {tmp_path}"
    for mode in ("--vae_cache_disable", "", "", on_demand):
        calls.clear()
        lcm.run(f"{flags} {mode}")
        told.append([{"x": x, "t": t} | cond for (_, x, t, cond, *_), _ in calls[::3]])  # teacher, target, student
    assert {tuple(step["x"].shape[2:]) for step in told[0]} == {(5, 3), (3, 5)}
    assert {tuple(step["time_ids"][0].tolist()) for step in told[0]} == {(64, 40, 0, 0, 40, 24), (40, 64, 0, 0, 24, 40)}
    for other in told[1:]:
        torch.testing.assert_close(other, told[0], rtol=0, atol=1e-4)


@pytest.mark.parametrize(("flags", "shards"), [("", "{00000..00001}.tar"), ("--lora_rank 4", "pipe:cat 00000.tar")])
def test_the_loop_does_not_wait_for_the_device(flags, shards, lcm):
    """With all caches full, and with both encoders in the loop."""
    lcm.flags += ["--train_shards_path_or_url", shards]
    assert steps_without_waits(script, *lcm.parse(f"{flags} --max_train_steps 2")) == 2


# ---------------------------------------------------------------------------------------------------------------------
# What may be added to a run, where SDXL is another matter than SD
# ---------------------------------------------------------------------------------------------------------------------


def test_the_negative_prompt_reaches_the_teachers_pictures_in_both_embeddings(lcm, sdxl_teacher, watch):
    calls = watch(script, "generate")
    lcm.run("--validation_negative_prompt blue --validation_resolution 48x32", benchmark=True)
    pipe = StableDiffusionXLPipeline.from_pretrained(sdxl_teacher)
    embeds, _, pooled, _ = pipe.encode_prompt("blue", device="cpu", do_classifier_free_guidance=False)
    (student, _), (teacher, pictures) = calls
    assert student[5]["prompt_embeds"].abs().max() == student[5]["text_embeds"].abs().max() == 0
    torch.testing.assert_close(teacher[5], {"prompt_embeds": embeds, "text_embeds": pooled}, rtol=0, atol=1e-5)
    assert {picture.size for picture in pictures} == {(48, 32)}


def test_previews_go_to_the_webhook(lcm, server, tmp_path):
    tiny_autoencoder(tmp_path / "tiny")
    (tmp_path / "hook.json").write_text(json.dumps({"webhook_url": server.url}))
    flags = f"--validation_preview --validation_preview_steps 2 --validation_preview_model {tmp_path / 'tiny'}"
    out = lcm.run(f"{flags} --validation_num_inference_steps 4 --webhook_config {tmp_path / 'hook.json'}")
    pictures = {m["name"]: m["level"] for m in server.received if m["type"] == "picture"}
    previews = [f"preview-4-steps-step0{i}" for i in (2, 4)]
    assert list(pictures.items()) == [*((name, "debug") for name in previews), ("grid", "info")]
    assert len(list((out / "validation").glob("preview-4-steps-*.png"))) == 2


def test_each_text_encoder_has_its_precision(lcm):
    embeds = []
    for flags in ("", "--text_encoder_1_precision int8-torchao", "--text_encoder_2_precision fp8-torchao"):
        args = lcm.args(flags)
        encoders = script.load_text_encoders(args, torch.device("cpu"), torch.float32)
        layers = [next(m for m in encoder.modules() if isinstance(m, torch.nn.Linear)) for _, encoder in encoders]
        wanted = {"int8-torchao": "Int8Tensor", "fp8-torchao": "Float8Tensor", "no_change": "Parameter"}
        assert [type(layer.weight).__name__ for layer in layers] == [
            wanted[args.text_encoder_1_precision],
            wanted[args.text_encoder_2_precision],
        ]
        with torch.no_grad():
            embeds.append(script.encode_prompts(encoders, ["a small red circle"])["prompt_embeds"][0])
    plain, first, second = embeds  # [77, 16 + 24]
    assert torch.equal(first[:, 16:], plain[:, 16:]) and torch.equal(second[:, :16], plain[:, :16])
    for found, places in ((first, slice(0, 16)), (second, slice(16, 40))):
        assert 0 < (found - plain)[:, places].norm() / plain[:, places].norm() < 0.2


@pytest.mark.slow
@pytest.mark.parametrize("cache", ["", "--vae_cache_disable"])
def test_what_is_held_out_is_of_all_datasets(cache, lcm, watch, tmp_path, capsys):
    """Two datasets of the same images with other rules: neither trains on what is held out."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for i in range(6):
            Image.new("RGB", (48, 32) if i % 2 else (32, 48), (40 * i, 0, 0)).save(tmp_path / name / f"{i}.png")
            (tmp_path / name / f"{i}.txt").write_text(f"colour {i}")
    entry = {"type": "local", "resolution_type": "pixel"}
    datasets = [
        entry | {"id": "a", "instance_data_dir": str(tmp_path / "a"), "resolution": 32},
        entry | {"id": "b", "instance_data_dir": str(tmp_path / "b"), "resolution": 32, "crop": False},
    ]
    (tmp_path / "data.json").write_text(json.dumps(datasets))
    evaluated, opened = watch(script, "held_out_loss"), watch(script, "open_batches")
    lcm.flags = SHORT.split()
    lcm.run(
        f"--data_backend_config {tmp_path / 'data.json'} {cache} --eval_steps 2 --eval_samples 3 --max_train_steps 2"
        " --lora_rank 2 --train_batch_size 1"
    )
    batches, trained = opened[0][1], set()
    for _ in range(20):
        trained |= {sample.key.partition("-")[0] for sample in next(batches)}
    held_out = [sample for (*_, samples, _), _ in evaluated for sample in samples]
    keys = {sample.key.partition("-")[0] for sample in held_out}
    assert len(held_out) == len(keys) == 3 and len(trained) == 3 and not keys & trained
    assert "held out for --eval_steps" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("cache", ["", "--vae_cache_disable"])
def test_an_eval_dataset_is_held_out_instead(lcm, watch, monkeypatch, tmp_path, cache):
    """Its pictures have their own sizes, and are encoded once: in training no encoder is loaded beside a full cache."""
    for name, count in (("train", 4), ("held", 3)):
        (tmp_path / name).mkdir()
        for i in range(count):
            Image.new("RGB", (32, 32), (40 * i, len(name), 0)).save(tmp_path / name / f"{i}.png")
            (tmp_path / name / f"{i}.txt").write_text(f"{name} {i}")
    base = {"type": "local", "resolution_type": "pixel", "resolution": 32}
    datasets = [
        base | {"id": "a", "instance_data_dir": str(tmp_path / "train")},
        base | {"id": "b", "instance_data_dir": str(tmp_path / "held"), "dataset_type": "eval", "resolution": 64},
    ]
    (tmp_path / "data.json").write_text(json.dumps(datasets))
    loaded, original, opened = [], script.held_out_loss, watch(script, "open_batches")

    def held_out_loss(*given):
        values = original(*given)
        loaded.append(len(given[-1].loaded))
        return values

    monkeypatch.setattr(script, "held_out_loss", held_out_loss)
    evaluated = watch(script, "held_out_loss")
    lcm.flags = SHORT.split()
    lcm.run(
        f"--data_backend_config {tmp_path / 'data.json'} {cache} --eval_steps 2 --eval_samples 2 --max_train_steps 2"
        " --lora_rank 2 --train_batch_size 1"
    )
    (((*_, samples, _), losses),) = evaluated
    assert loaded == [1 if cache else 0]  # the VAE: texts are cached
    assert {sample.caption[:4] for sample in samples} == {"held"} and len({sample.key for sample in samples}) == 2
    assert {sample.bucket for sample in samples} == {(64, 64)}
    assert all(np.isfinite(loss) for loss in losses.values()) and losses["eval_loss"] > 0.0
    batches = opened[0][1]
    assert {next(batches)[0].caption for _ in range(8)} == {f"train {i}" for i in range(4)}


@pytest.mark.parametrize("flags", ["", "--model_type lora"])
def test_the_first_line_of_the_readme_is_the_toy_recipe(flags):
    args = script.parse_args(["--w_min", "1", "--w_max", "12", *flags.split()])[0]
    assert args.pretrained_teacher_model is None and script.teacher_of(args) == str(ROOT / "tests" / "toy" / "sdxl")
    assert (args.w_min, args.w_max, args.resolution) == (1.0, 12.0, 64)
    without = script.parse_args(flags.split())[0]
    assert vars(without) == vars(args)


# ---------------------------------------------------------------------------------------------------------------------
# Keys of config files: each changes what is trained
# ---------------------------------------------------------------------------------------------------------------------

RATE = 1e-3
BASE = {
    "model_type": "lora", "lora_rank": 2, "learning_rate": RATE, "lr_warmup_steps": 0, "max_train_steps": 2,
    "train_batch_size": 2, "resolution": 32, "bucket_alignment": 8, "center_crop": True, "validation_step_interval": 0,
    "validation_num_inference_steps": 1, "validation_prompt": "red", "disable_benchmark": True, "report_steps": "",
    "checkpoint_step_interval": 0, "report_to": "none",
}  # fmt: skip


@pytest.fixture(scope="module")
def caches(tmp_path_factory):
    return {f"cache_dir_{kind}": str(tmp_path_factory.mktemp(kind)) for kind in ("vae", "text")}


@pytest.fixture
def train(sdxl_teacher, small_shards, caches, tmp_path, monkeypatch, one_process):
    """`train(settings)`: a short run by a config file; the weights that it trained."""
    monkeypatch.chdir(small_shards)

    def train(**settings) -> dict[str, torch.Tensor]:
        config = {"pretrained_model_name_or_path": str(sdxl_teacher), "output_dir": str(tmp_path / "out")}
        config |= {"train_shards_path_or_url": "{00000..00001}.tar"} | caches | BASE | settings
        (tmp_path / "config.json").write_text(json.dumps(config))
        try:
            script.main(*script.parse_args(["--config", str(tmp_path / "config.json")]))
        finally:
            one_process()
        return load_file(tmp_path / "out" / f"checkpoint-{config['max_train_steps']}" / "student.safetensors")

    return train


@pytest.fixture(scope="module")
def plain() -> dict[str, dict]:
    """Weights that others are compared with, by the settings they were trained with."""
    return {}


def distance(a: dict, b: dict) -> float:
    """The largest of any weight's."""
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changed", "beside"),
    [
        ({"num_ddim_timesteps": 25}, {}),
        ({"w_min": 10.0}, {}),
        ({"w_max": 4.0}, {}),
        ({"loss_type": "huber"}, {}),
        ({"huber_c": 0.1}, {"loss_type": "huber"}),
        ({"timestep_scaling_factor": 0.001}, {}),
        ({"learning_rate": RATE / 2}, {}),
        ({"lr_scheduler": "linear"}, {}),
        ({"lr_warmup_steps": 2}, {"lr_scheduler": "constant_with_warmup"}),
        ({"lora_alpha": 8}, {}),
        ({"lora_dropout": 0.5}, {}),
        ({"optimizer": "optimi-lion"}, {}),
        ({"adam_beta1": 0.5}, {}),
        ({"adam_beta2": 0.5}, {}),
        ({"adam_weight_decay": 0.5}, {}),
        ({"adam_epsilon": 1e-3}, {}),
        ({"max_grad_norm": 1e-6}, {}),
        ({"seed": 7}, {}),
        ({"train_batch_size": 1}, {}),
        ({"base_model_precision": "int8-quanto"}, {}),
        ({"text_encoder_1_precision": "int8-quanto"}, {}),
        ({"text_encoder_2_precision": "int8-quanto"}, {}),
    ],
    ids=lambda settings: ",".join(settings) or "alone",
)
def test_a_setting_changes_what_is_trained(changed, beside, train, plain):
    key = json.dumps(beside)
    if key not in plain:
        plain[key] = train(**beside)
    assert distance(train(**beside, **changed), plain[key]) > 1e-3 * RATE


@pytest.mark.slow
def test_other_settings_do_not(train):
    """So that the test above does not see what is random."""
    others = {"checkpoints_total_limit": 3, "validation_prompt": "blue", "compress_disk_cache": True}
    assert distance(train(**others), train()) == 0.0


@pytest.mark.slow
def test_accumulated_batches_are_one_large_batch(train):
    same = {"adam_epsilon": 1e-3}  # else Adam makes whole steps of rounding errors
    large = train(**same, train_batch_size=4)
    assert distance(train(**same, train_batch_size=2, gradient_accumulation_steps=2), large) < 1e-3 * RATE
    assert distance(train(**same, train_batch_size=2), large) > 1e-2 * RATE


@pytest.mark.parametrize(("kind", "rank"), [("lora", 6), ("full", None)])
def test_the_student_is_of_the_kind_and_rank_that_was_asked_for(kind, rank, train):
    weights = train(model_type=kind, lora_rank=rank, max_train_steps=1)
    if rank:
        assert all(value.shape[0 if "lora_A" in name else 1] == rank for name, value in weights.items())
    else:
        assert "time_embedding.cond_proj.weight" in weights and not any("lora" in name for name in weights)


@pytest.mark.slow
def test_adamw_bf16_keeps_steps_that_bf16_would_lose(train, sdxl_teacher):
    """In bf16 a weight of 0.1 and its neighbour are 5e-4 apart; trained weights and moments are fp32."""
    full = {"model_type": "full", "lora_rank": None, "optimizer": "adamw_bf16", "mixed_precision": "bf16"}
    weights = train(**full, learning_rate=1e-6, max_train_steps=1, adam_weight_decay=0.0)
    start = load_file(sdxl_teacher / "unet" / "diffusion_pytorch_model.safetensors")
    large = torch.cat([(weights[name] - value)[value.abs() > 0.1] for name, value in start.items()]).abs()
    assert {value.dtype for value in weights.values()} == {torch.float32}
    assert len(large) > 1000 and (large > 0.5e-6).float().mean() > 0.9 and large.max() < 1.1e-6


@pytest.mark.slow
@pytest.mark.parametrize("key", ["gradient_checkpointing", "use_gradient_checkpointing"])
def test_gradient_checkpointing_computes_twice_and_trains_the_same(key, train, monkeypatch):
    calls = []

    def count(teacher, *_):
        teacher.down_blocks[0].resnets[0].register_forward_pre_hook(lambda *_: calls.append(torch.is_grad_enabled()))

    perturb(monkeypatch, script, count)
    without = train(max_train_steps=1)
    assert calls.count(True) == 1  # the student's
    calls.clear()
    assert distance(train(max_train_steps=1, **{key: True}), without) < 1e-3 * RATE
    assert calls.count(True) == 2  # and once more for its backward


def test_wandb_gets_the_names_of_project_and_run(train, monkeypatch):
    def init(**settings):
        raise RuntimeError(settings["project"], settings["name"])

    monkeypatch.setattr(wandb, "init", init)
    with pytest.raises(RuntimeError) as stop:
        train(report_to="wandb", tracker_project_name="lcm", tracker_run_name="4step")
    assert stop.value.args == ("lcm", "4step")


# ---------------------------------------------------------------------------------------------------------------------
# Which test sees which key of the documents' config files
# ---------------------------------------------------------------------------------------------------------------------

TRAINED, RUN = "test_a_setting_changes_what_is_trained", "test_the_documents_lcm_config_trains_on_small_images"
CHECKPOINTED = "test_gradient_checkpointing_computes_twice_and_trains_the_same"
MIXED, TEXTS = "test_entries_are_mixed_by_their_repeats", "test_text_embeds_say_where_and_how_texts_are_kept"
SIZES = "test_size_ids_are_the_original_the_crop_and_the_target"
PREVIEWS = "test_previews_are_the_half_done_samples"
WAN, LAUNCHED = "test_every_setting_has_its_effect", "test_the_documents_wan_config_runs"
EMA, CLIP_SIZES = "test_the_average_counts_the_student_s_updates_alone", "test_clips_are_cut_to_whole_blocks"
SEEN_BY = {
    "model_type": "test_the_student_is_of_the_kind_and_rank_that_was_asked_for",
    "model_family": "test_a_bad_config_of_a_script_is_one_sentence",
    "model_flavour": "test_a_documents_config_means_its_flags",
    "output_dir": RUN,
    "pretrained_model_name_or_path": RUN,
    "distillation_method": "test_a_bad_config_of_a_script_is_one_sentence",
    "distillation_config": "test_settings_of_the_method_are_nested_or_flat",
    "num_ddim_timesteps": TRAINED,
    "w_min": TRAINED,
    "w_max": TRAINED,
    "loss_type": TRAINED,
    "huber_c": TRAINED,
    "timestep_scaling_factor": TRAINED,
    "resolution": "test_an_entry_wins_over_the_command_line",
    "resolution_type": "test_buckets_worked_out_by_hand",
    "validation_resolution": "test_one_block_of_rows_for_each_size",
    "aspect_bucket_rounding": "test_the_documents_settings_of_both_files_together",
    "minimum_image_size": "test_sizes_below_the_minimum_are_skipped_and_counted",
    "maximum_image_size": "test_the_largest_are_shrunk_before_the_crop",
    "target_downsample_size": "test_the_largest_are_shrunk_before_the_crop",
    "learning_rate": TRAINED,
    "lr_scheduler": TRAINED,
    "lr_warmup_steps": TRAINED,
    "max_train_steps": RUN,
    "train_batch_size": TRAINED,
    "gradient_accumulation_steps": "test_accumulated_batches_are_one_large_batch",
    "gradient_checkpointing": CHECKPOINTED,
    "use_gradient_checkpointing": CHECKPOINTED,
    "mixed_precision": "test_size_ids_reach_the_sinusoid_in_fp32_in_a_bf16_run",
    "lora_type": "test_lora_type_means_a_lora",
    "lora_rank": "test_the_student_is_of_the_kind_and_rank_that_was_asked_for",
    "lora_alpha": TRAINED,
    "lora_dropout": TRAINED,
    "validation_step_interval": RUN,
    "validation_num_inference_steps": "test_one_block_of_rows_for_each_size",
    "validation_guidance": "test_pictures_stay_in_the_trained_range_of_guidance",
    "validation_prompt": "test_prompts_are_those_of_the_flags_or_four_of_ours",
    "validation_negative_prompt": "test_the_negative_prompt_reaches_the_teachers_pictures_in_both_embeddings",
    "checkpoint_step_interval": RUN,
    "checkpoints_total_limit": "test_limit_finish_and_bad_names",
    "resume_from_checkpoint": "test_kill_and_resume",
    "optimizer": TRAINED,
    "adam_beta1": TRAINED,
    "adam_beta2": TRAINED,
    "adam_weight_decay": TRAINED,
    "adam_epsilon": TRAINED,
    "max_grad_norm": "test_what_max_grad_norm_bounds",
    "seed": TRAINED,
    "push_to_hub": RUN,
    "hub_model_id": RUN,
    "report_to": RUN,
    "tracker_project_name": "test_wandb_gets_the_names_of_project_and_run",
    "tracker_run_name": "test_wandb_gets_the_names_of_project_and_run",
    "base_model_precision": "test_a_lora_of_a_base_in_8_bits_loads_on_the_plain_one",
    "text_encoder_1_precision": "test_each_text_encoder_has_its_precision",
    "text_encoder_2_precision": "test_each_text_encoder_has_its_precision",
    "validation_preview": PREVIEWS,
    "validation_preview_steps": PREVIEWS,
    # of Wan
    "caption_dropout_probability": WAN,
    "context_noise": WAN,
    "dmd_denoising_steps": WAN,
    "fake_score_betas": WAN,
    "fake_score_eps": WAN,
    "fake_score_grad_clip": WAN,
    "fake_score_guidance_scale": WAN,
    "fake_score_lr": WAN,
    "fake_score_weight_decay": WAN,
    "generator_update_interval": WAN,
    "grad_clip_method": WAN,
    "independent_first_frame": WAN,
    "last_step_only": WAN,
    "max_timestep_ratio": WAN,
    "min_score_timestep": WAN,
    "min_timestep_ratio": WAN,
    "num_frame_per_block": WAN,
    "num_training_frames": WAN,
    "real_score_guidance_scale": WAN,
    "same_step_across_blocks": WAN,
    "timestep_shift": WAN,
    "ts_schedule": WAN,
    "ts_schedule_max": WAN,
    "use_ema": WAN,
    "ema_update_interval": EMA,
    "num_frames": CLIP_SIZES,
    "validation_num_video_frames": LAUNCHED,
    "data_backend_config": LAUNCHED,
    "pretrained_t5_model_name_or_path": LAUNCHED,
    "push_checkpoints_to_hub": LAUNCHED,
    "validation_prompt_library": LAUNCHED,
    "quantize_via": LAUNCHED,
    "disable_benchmark": LAUNCHED,
    "attention_mechanism": "test_another_attention_mechanism_computes_the_attention",
    "compress_disk_cache": "test_damage_is_made_again",
    "delete_problematic_images": "test_a_bad_config_of_a_script_is_one_sentence",
    "disable_bucket_pruning": "test_the_table_of_buckets",
    "ema_validation": "test_whose_clips_are_shown",
    "flow_schedule_shift": "test_the_shift_is_of_the_teacher_s_sampler",
    "frame_interval": "test_a_folder_of_clips",
    "ignore_final_epochs": "test_flags_that_do_not_go_together",
    "num_train_epochs": "test_steps_of_a_run_given_in_epochs",
    "repeats": MIXED,
    "vae_batch_size": "test_encode_batch_size_is_the_vaes",
    "validation_seed": "test_a_comparison_has_a_grid_for_each_size_and_keeps_the_teachers_pictures",
    "webhook_config": "test_a_run_tells_its_webhook",
    # of dataset files
    "id": "test_no_source_and_two_entries_of_one_name",
    "type": MIXED,
    "dataset_type": TEXTS,
    "instance_data_dir": "test_a_folder_is_walked_and_each_image_goes_to_its_bucket",
    "crop": "test_crop_false_keeps_all_but_what_the_cover_leaves_over",
    "crop_aspect": SIZES,
    "crop_style": SIZES,
    "cache_dir_vae": "test_each_dataset_has_its_own_store_and_each_record_its_geometry",
    "cache_dir": TEXTS,
    "default": TEXTS,
    "write_batch_size": "test_each_dataset_has_its_own_store_and_each_record_its_geometry",
    "disabled": MIXED,
    "caption_strategy": "test_captions_of_text_files_and_of_names",
    "metadata_backend": "test_a_bad_entry_is_one_sentence",
    "skip_file_discovery": "test_skipped_discovery_leaves_it_to_training",
}


def keys_of(value) -> set[str]:
    """Of a config and of the objects inside it, but for the method's name."""
    if isinstance(value, list):
        return set().union(*map(keys_of, value))
    return set(value) | set().union(*map(keys_of, value.values())) - {"lcm"} if isinstance(value, dict) else set()


def test_every_key_of_the_documents_is_seen_by_a_test():
    files = sorted(CONFIGS.glob("*.json"))
    assert len(files) == 9
    assert set().union(*(keys_of(json.loads(path.read_text())) for path in files)) == SEEN_BY.keys()
    tests = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    assert [name for name in set(SEEN_BY.values()) if f"\ndef {name}(" not in tests] == []


# ---------------------------------------------------------------------------------------------------------------------
# Compilation
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_compile_makes_graphs_where_a_shape_is_new_alone(lcm, two_shapes, graphs, monkeypatch, tmp_path):
    """SDXL's blocks: their classes have more pairs of channels than torch's own limit of graphs."""
    teacher = tiny_sdxl_pipeline(tmp_path / "teacher", **REAL_SDXL)
    check_graphs(script, lcm, teacher, f"--lora_rank 2 {two_shapes}", graphs, monkeypatch)
