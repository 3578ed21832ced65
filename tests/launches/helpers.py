"""Short runs of the Stable Diffusion script: in this process, and in others that may be killed."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

import train_lcm_distill_sd as script
from common import checkpoint
from tests.helpers import ROOT

STEPS = 12

# Its processes have everything imported from the start.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["tests.launches.helpers"])


def short_flags(teacher, shards, folder, *more) -> list[str]:
    values = [
        *("--pretrained_teacher_model", teacher, "--train_shards_path_or_url", shards, "--output_dir", folder),
        *("--resolution", 32, "--train_batch_size", 4, "--max_train_steps", STEPS, "--checkpointing_steps", 3),
        *("--validation_steps", 0, "--disable_benchmark", "--report_steps=", "--validation_num_inference_steps", 1),
        *("--report_to", "none", "--learning_rate", 1e-3, "--lr_scheduler", "cosine", "--lr_warmup_steps", 2),
        *("--random_flip", *more),
    ]
    return [str(value) for value in values]


def train(*flags):
    """A run in this process."""
    script.main(*script.parse_args([str(flag) for flag in flags]))


def start(flags: list[str], log: Path, killed_while_saving: bool = False):
    """The same run in a process of its own, which leads its group; what it says is in the file `log`."""
    process = FORKS.Process(target=run_apart, args=(flags, log, killed_while_saving))
    process.start()
    return process


def run_apart(flags: list[str], log: Path, killed_while_saving: bool):
    os.setsid()
    with open(log, "w") as file:
        os.dup2(file.fileno(), sys.stdout.fileno())
        os.dup2(file.fileno(), sys.stderr.fileno())
    os.environ["ACCELERATE_USE_CPU"] = "true"
    torch.set_num_threads(1)
    if killed_while_saving:  # its files are written, and the folder has not its name yet
        checkpoint.flush_to_disk = lambda path: os.killpg(0, signal.SIGKILL)
    train(*flags)


def wait_until(condition, alive, said):
    """Waits for a condition that a running process will fulfil."""
    end = time.time() + 120
    while alive() and not condition():
        assert time.time() < end
        time.sleep(0.002)
    assert alive(), said()


def weights(folder: Path, step: int = STEPS) -> dict[str, torch.Tensor]:
    """All weights of a checkpoint."""
    found = {}
    for path in sorted((folder / f"checkpoint-{step}").glob("*.safetensors")):
        found |= {f"{path.stem}.{name}": value for name, value in load_file(path).items()}
    assert found
    return found


def assert_same_bits(a: Path, b: Path, step: int = STEPS):
    first, second = weights(a, step), weights(b, step)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


# ---------------------------------------------------------------------------------------------------------------------
# The lines of code that a run prints
# ---------------------------------------------------------------------------------------------------------------------


def asking(usage: str, prompt: str) -> str:
    """The lines with a prompt and the seed of a run's own pictures."""
    assert '"your prompt", ' in usage
    return usage.replace('"your prompt",', f"{prompt!r}, generator=torch.Generator().manual_seed(0),")


def execute(lines: list[str], place: Path) -> list[Path]:
    """Executes pieces of code one after another in a fresh process; returns the files of their `image`s."""
    files = [place / f"shown-{i}.png" for i in range(len(lines))]
    pieces = [f"{code}\nimage.save({str(file)!r})\n" for code, file in zip(lines, files, strict=True)]
    code = f"for piece in {pieces!r}:\n    exec(piece, {{}})\n"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=place, env=environment, timeout=300, text=True, capture_output=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return files


def assert_shows(sheet: Path, shown: Path, most: float = 2):
    """The picture is in the sheet, which enlarges small ones; no byte is off by more than `most`.

    One level is rounding, for the run generated all prompts as one batch.
    """
    picture, sheet = np.asarray(Image.open(shown)), np.asarray(Image.open(sheet))
    scale = max(1, 128 // picture.shape[0])
    enlarged = picture.repeat(scale, 0).repeat(scale, 1)
    assert enlarged.std() > 5  # there is something to recognise
    error = np.abs(find(enlarged, sheet).astype(int) - enlarged)
    assert error.max() <= most, error.max()


def find(picture: np.ndarray, sheet: np.ndarray) -> np.ndarray:
    """The part of the sheet that is most like the picture."""
    height, width = picture.shape[0], picture.shape[1]
    rows, columns = sheet.shape[0] - height + 1, sheet.shape[1] - width + 1
    error = np.zeros((rows, columns))
    for y, x in np.random.default_rng(0).integers(0, min(height, width), (40, 2)):
        error += np.abs(sheet[y : y + rows, x : x + columns].astype(float) - picture[y, x]).sum(-1)
    y, x = np.unravel_index(error.argmin(), error.shape)
    return sheet[y : y + height, x : x + width]
