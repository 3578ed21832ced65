"""Short runs of the Stable Diffusion script: in this process, and in others that may be killed."""

import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

import train_lcm_distill_sd as script
from common import checkpoint

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
