"""Two processes of the LCM scripts, by accelerate launch: they train as one does, and fill caches together."""

import pytest
import torch
from safetensors.torch import load_file

import train_lcm_distill_sd
from common.cache import TensorStore
from tests.helpers import launch
from tests.lcm import SHORT, Runner

pytestmark = pytest.mark.slow


def test_two_processes_train_on_a_base_in_8_bits_as_one_does(
    sd_teacher, small_shards, tmp_path, monkeypatch, one_process
):
    """Whose weights cannot be broadcast. With rollouts and evaluation, which all processes must take part in."""
    flags = "--lora_rank 2 --base_model_precision int8-torchao --eval_steps 1 --eval_samples 2 --learning_rate 1e-3"
    flags += " --scheduled_sampling_max_step_offset 5 --scheduled_sampling_probability 0.5"
    monkeypatch.chdir(small_shards)
    out = Runner(train_lcm_distill_sd, tmp_path, sd_teacher, one_process).run(flags)
    flags += f" {SHORT} --pretrained_teacher_model {sd_teacher} --disable_benchmark --train_batch_size 2"
    flags += f" --train_shards_path_or_url {small_shards}/{{00000..00001}}.tar --output_dir {tmp_path / '2'}"
    launch("train_lcm_distill_sd.py", *flags.split(), processes=2)
    found = [load_file(folder / "checkpoint-1" / "student.safetensors") for folder in (out, tmp_path / "2")]
    assert found[0].keys() == found[1].keys() and any(value.any() for name, value in found[0].items() if "_B" in name)
    distances = torch.cat([(found[0][name] - found[1][name]).abs().flatten() for name in found[0]])
    assert distances.mean() < 1e-5  # a hundredth of the step


def test_two_processes_fill_both_caches_and_train(two_shapes, sdxl_teacher, tmp_path):
    flags = f"--pretrained_teacher_model {sdxl_teacher} --output_dir {tmp_path / 'out'} {two_shapes} {SHORT}"
    flags += " --bucket_alignment 8 --train_batch_size 2 --max_train_steps 2 --disable_benchmark"
    done = launch("train_lcm_distill_sdxl.py", *flags.split(), processes=2)
    assert "caches: 8 latents, 10 prompts" in done.stdout  # the empty one, the validation's, and those of the pictures
    assert "for 2 steps of 4 samples" in done.stdout
    (folder,) = (tmp_path / "out" / "cache" / "text").iterdir()
    store = TensorStore(folder)
    records = [store.get(key) for key in store.index]
    assert {name: tuple(v.shape) for name, v in records[0].items()} == {"prompt_embeds": (32, 40), "text_embeds": (20,)}
    again = launch("train_lcm_distill_sdxl.py", *flags.split(), processes=2)
    assert "caches: 8 latents, 10 prompts" in again.stdout
    assert len(list(folder.glob("*.safetensors"))) == len({str(path) for path in store.index.values()})  # none is new
