"""The whole way of a user: launch, resume, finish, and load the result in stock diffusers in a fresh process."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from tests.helpers import ROOT, launch, tiny_pipeline, tiny_sdxl_pipeline, toy_shards

SCRIPT, SDXL = "train_lcm_distill_sd.py", "train_lcm_distill_sdxl.py"
PROMPT = "a small red circle at the top on a blue background"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    return tiny_pipeline(folder / "teacher"), toy_shards(folder / "shards")


@pytest.fixture(scope="module")
def sdxl_world(tmp_path_factory, world):
    return tiny_sdxl_pipeline(tmp_path_factory.mktemp("sdxl") / "teacher"), world[1]


def flags(world, folder, *more):
    teacher, shards = world
    return [
        *("--pretrained_teacher_model", teacher, "--train_shards_path_or_url", shards, "--output_dir", folder),
        *("--resolution", 32, "--train_batch_size", 4, "--checkpointing_steps", 3, "--validation_steps", 5),
        *("--report_steps=", "--validation_prompt", PROMPT, "--learning_rate", 1e-3, "--w_min", 1, "--w_max", 3, *more),
    ]


def find(picture: np.ndarray, sheet: np.ndarray) -> np.ndarray:
    """The part of the sheet that is most like the picture."""
    height, width = picture.shape[0], picture.shape[1]
    rows, columns = sheet.shape[0] - height + 1, sheet.shape[1] - width + 1
    error = np.zeros((rows, columns))
    for y, x in np.random.default_rng(0).integers(0, min(height, width), (40, 2)):
        error += np.abs(sheet[y : y + rows, x : x + columns].astype(float) - picture[y, x]).sum(-1)
    y, x = np.unravel_index(error.argmin(), error.shape)
    return sheet[y : y + height, x : x + width]


STUDENTS = {"full": "--model_type full", "lora": "--lora_rank 4 --lora_alpha 8 --ema_decay 0.5", "dora": "--use_dora"}


@pytest.mark.parametrize("student", [flags.split() for flags in STUDENTS.values()], ids=list(STUDENTS))
def test_train_resume_finish_load(world, tmp_path, student):
    folder = tmp_path / "out"
    launch(SCRIPT, *flags(world, folder, "--max_train_steps", 4, *student))
    done = launch(SCRIPT, *flags(world, folder, "--max_train_steps", 7, "--resume_from_checkpoint", "latest", *student))
    assert "resumed from" in done.stdout and "checkpoint-4" in done.stdout
    assert json.loads((folder / "checkpoint-7" / "state.json").read_text())["step"] == 7

    repeat_picture(folder, tmp_path)


@pytest.mark.parametrize("student", [["--model_type", "full", "--export_pipeline"], ["--use_dora"]])
def test_sdxl_trains_and_loads(sdxl_world, tmp_path, student):
    folder = tmp_path / "out"
    launch(SDXL, *flags(sdxl_world, folder, "--max_train_steps", 3, "--bucket_alignment", 8, *student))
    repeat_picture(folder, tmp_path)


def repeat_picture(folder, tmp_path):
    """The model card's own lines, with the prompt, seed and size of the run's picture, in a fresh process."""
    usage = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)[1]
    usage = usage.replace('"your prompt"', repr(PROMPT)).replace(
        "num_inference_steps=4",
        "num_inference_steps=4, height=32, width=32, generator=torch.Generator().manual_seed(0)",
    )
    code = f"import torch\n{usage}\nimage.save({str(tmp_path / 'again.png')!r})\n"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, timeout=200)
    again = np.asarray(Image.open(tmp_path / "again.png"))
    sheet = np.asarray(Image.open(folder / "samples.png"))
    scale = 128 // 32  # of the grid's pictures
    enlarged = again.repeat(scale, 0).repeat(scale, 1)
    assert enlarged.std() > 5  # there is something to recognise
    # one level of rounding, for the run drew its prompts as one batch
    assert np.abs(find(enlarged, sheet).astype(int) - enlarged).max() <= 2


def test_compile_trains_the_same_and_its_checkpoint_fits_a_run_without(world, tmp_path):
    # Adam divides a gradient by its size: with its usual epsilon, rounding errors alone would move some weights.
    short = ["--max_train_steps", 2, "--validation_steps", 0, "--lora_rank", 4, "--adam_epsilon", 1e-3]
    launch(SCRIPT, *flags(world, tmp_path / "eager", *short))
    launch(SCRIPT, *flags(world, tmp_path / "compiled", *short, "--compile"))
    weights = [load(tmp_path / name / "checkpoint-2" / "student.safetensors") for name in ("eager", "compiled")]
    assert weights[0].keys() == weights[1].keys()
    for name, value in weights[0].items():
        np.testing.assert_allclose(weights[1][name], value, atol=2e-6)
    assert max(np.abs(value).max() for name, value in weights[0].items() if "lora_B" in name) > 2e-4  # they start at 0


def load(path):
    from safetensors.numpy import load_file

    return load_file(path)


def readme_commands() -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [part.strip() for line in lines for part in line.split("&&") if "accelerate launch" in part]


@pytest.mark.parametrize("command", readme_commands())
def test_commands_of_the_readme_parse(command, tmp_path, monkeypatch):
    import importlib
    import shlex

    words = shlex.split(command)
    script = next(word for word in words if word.endswith(".py"))
    parse_args = importlib.import_module(script.removesuffix(".py")).parse_args
    given = words[words.index(script) + 1 :]
    (tmp_path / "prompts.txt").write_text("a red ball\n")
    (tmp_path / "clips").mkdir()
    (tmp_path / "clips" / "a.mp4").write_bytes(b"not read yet")
    there = {"--train_prompts": "prompts.txt", "--train_data_dir": "clips"}  # what must exist to be parsed
    for flag, value in zip(given, list(given[1:]), strict=False):
        if flag == "--train_shards_path_or_url" and not value.startswith(("pipe:", "http")):
            given[given.index(flag) + 1] = toy_shards(tmp_path / "data")
        elif flag in there:
            given[given.index(flag) + 1] = str(tmp_path / there[flag])
    parse_args(given)
