"""The whole way of a user: launch, resume, finish, and load the result in stock diffusers in a fresh process."""

import json
import re

import numpy as np
import pytest
from safetensors.numpy import load_file

import train_lcm_distill_sd as script
from tests.helpers import launch, tiny_pipeline, tiny_unet, toy_shards
from tests.launches.helpers import asking, assert_shows, execute

pytestmark = pytest.mark.slow

PROMPT = "a small red circle at the top on a blue background"


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return toy_shards(tmp_path_factory.mktemp("shards"))


def flags(teacher, shards, folder, *more) -> list[str]:
    values = [
        *("--pretrained_teacher_model", teacher, "--train_shards_path_or_url", shards, "--output_dir", folder),
        *("--resolution", 32, "--train_batch_size", 4, "--checkpointing_steps", 3, "--validation_steps", 5),
        *("--report_steps=", "--validation_prompt", PROMPT, "--learning_rate", 1e-3, "--w_min", 1, "--w_max", 3, *more),
    ]
    return [str(value) for value in values]


def test_launch_resume_finish_load(sd_teacher, shards, tmp_path):
    folder = tmp_path / "out"
    given = flags(sd_teacher, shards, folder, "--model_type", "full")
    launch("train_lcm_distill_sd.py", *given, "--max_train_steps", 4)
    more = ["--max_train_steps", 7, "--resume_from_checkpoint", "latest"]
    done = launch("train_lcm_distill_sd.py", *given, *more)
    assert "resumed from" in done.stdout and "checkpoint-4" in done.stdout
    assert json.loads((folder / "checkpoint-7" / "state.json").read_text())["step"] == 7
    usage = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)[1]
    (shown,) = execute([asking(usage, PROMPT)], tmp_path)
    assert_shows(folder / "samples.png", shown)


def test_adapters_and_their_average_resume(sd_teacher, shards, tmp_path, capsys):
    for name, student in {"lora": "--lora_rank 4 --lora_alpha 8 --ema_decay 0.5", "dora": "--use_dora"}.items():
        given = flags(sd_teacher, shards, tmp_path / name, *student.split())
        script.main(*script.parse_args([*given, "--max_train_steps", "4"]))
        capsys.readouterr()
        script.main(*script.parse_args([*given, "--max_train_steps", "7", "--resume_from_checkpoint", "latest"]))
        said = capsys.readouterr().out
        assert "resumed from" in said and "checkpoint-4" in said
        assert json.loads((tmp_path / name / "checkpoint-7" / "state.json").read_text())["step"] == 7


def test_compile_trains_the_same_and_its_checkpoint_fits_a_run_without(shards, tmp_path):
    """On one level of the network: each shape of a block is compiled on its own."""
    teacher = tiny_pipeline(tmp_path / "teacher")
    blocks = {"down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("CrossAttnUpBlock2D",)}
    tiny_unet(**blocks, block_out_channels=(16,)).save_pretrained(teacher / "unet")
    # Adam divides a gradient by its size: with its usual epsilon, rounding errors alone would move some weights.
    short = ["--max_train_steps", 2, "--validation_steps", 0, "--lora_rank", 4, "--adam_epsilon", 1e-3]
    short += ["--disable_benchmark", "--validation_num_inference_steps", 1, "--report_to", "none"]
    for name, more in (("eager", []), ("compiled", ["--compile"])):
        script.main(*script.parse_args(flags(teacher, shards, tmp_path / name, *short, *more)))
    weights = [load_file(tmp_path / name / "checkpoint-2" / "student.safetensors") for name in ("eager", "compiled")]
    assert weights[0].keys() == weights[1].keys()
    for name, value in weights[0].items():
        np.testing.assert_allclose(weights[1][name], value, atol=2e-6)
    assert max(np.abs(value).max() for name, value in weights[0].items() if "lora_B" in name) > 2e-4  # they start at 0
