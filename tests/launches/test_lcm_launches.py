"""The whole way of a user: launch, resume, finish, and load the result in stock diffusers in a fresh process."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

import train_lcm_distill_sd as script
import train_lcm_distill_sdxl as sdxl_script
from tests.helpers import launch, tiny_pipeline, tiny_unet, toy_shards

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


def find(picture: np.ndarray, sheet: np.ndarray) -> np.ndarray:
    """The part of the sheet that is most like the picture."""
    height, width = picture.shape[0], picture.shape[1]
    rows, columns = sheet.shape[0] - height + 1, sheet.shape[1] - width + 1
    error = np.zeros((rows, columns))
    for y, x in np.random.default_rng(0).integers(0, min(height, width), (40, 2)):
        error += np.abs(sheet[y : y + rows, x : x + columns].astype(float) - picture[y, x]).sum(-1)
    y, x = np.unravel_index(error.argmin(), error.shape)
    return sheet[y : y + height, x : x + width]


def repeat_pictures(folders: list[Path], place: Path):
    """Runs the model cards' own lines in a fresh process, and finds each picture in the run's own sheet.

    Prompt, seed and size are those of the run.
    """
    code = "import torch\n"
    for i, folder in enumerate(folders):
        usage = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)[1]
        usage = usage.replace('"your prompt"', repr(PROMPT)).replace(
            "num_inference_steps=4",
            "num_inference_steps=4, height=32, width=32, generator=torch.Generator().manual_seed(0)",
        )
        code += f"{usage}\nimage.save({str(place / f'{i}.png')!r})\n"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=place, timeout=200)
    for i, folder in enumerate(folders):
        again = np.asarray(Image.open(place / f"{i}.png"))
        sheet = np.asarray(Image.open(folder / "samples.png"))
        scale = 128 // 32  # of the grid's pictures
        enlarged = again.repeat(scale, 0).repeat(scale, 1)
        assert enlarged.std() > 5  # there is something to recognise
        # one level of rounding, for the run generated all prompts as one batch
        assert np.abs(find(enlarged, sheet).astype(int) - enlarged).max() <= 2, folder


def test_launch_resume_finish_load(sd_teacher, shards, tmp_path):
    folder = tmp_path / "out"
    given = flags(sd_teacher, shards, folder, "--model_type", "full")
    launch("train_lcm_distill_sd.py", *given, "--max_train_steps", 4)
    more = ["--max_train_steps", 7, "--resume_from_checkpoint", "latest"]
    done = launch("train_lcm_distill_sd.py", *given, *more)
    assert "resumed from" in done.stdout and "checkpoint-4" in done.stdout
    assert json.loads((folder / "checkpoint-7" / "state.json").read_text())["step"] == 7
    repeat_pictures([folder], tmp_path)


def test_all_kinds_of_students_resume_finish_load(sd_teacher, sdxl_teacher, shards, tmp_path, capsys):
    """Adapters of both scripts, and a whole pipeline of SDXL."""
    for name, student in {"lora": "--lora_rank 4 --lora_alpha 8 --ema_decay 0.5", "dora": "--use_dora"}.items():
        given = flags(sd_teacher, shards, tmp_path / name, *student.split())
        script.main(*script.parse_args([*given, "--max_train_steps", "4"]))
        capsys.readouterr()
        script.main(*script.parse_args([*given, "--max_train_steps", "7", "--resume_from_checkpoint", "latest"]))
        said = capsys.readouterr().out
        assert "resumed from" in said and "checkpoint-4" in said
        assert json.loads((tmp_path / name / "checkpoint-7" / "state.json").read_text())["step"] == 7
    for name, student in {"pipeline": "--model_type full --export_pipeline", "sdxl_dora": "--use_dora"}.items():
        given = flags(sdxl_teacher, shards, tmp_path / name, "--bucket_alignment", 8, *student.split())
        sdxl_script.main(*sdxl_script.parse_args([*given, "--max_train_steps", "3"]))
    repeat_pictures([tmp_path / name for name in ("lora", "dora", "pipeline", "sdxl_dora")], tmp_path)


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
