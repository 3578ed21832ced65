"""Kill, stop, resume: the weights are those of the run that was left alone."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import train_lcm_distill_sd as script
from common.checkpoint import find_checkpoint, list_checkpoints
from tests.helpers import ROOT, launch, tiny_pipeline, toy_shards

SCRIPT = "train_lcm_distill_sd.py"
STEPS = 12


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    return tiny_pipeline(folder / "teacher"), toy_shards(folder / "shards", 4, 12)


def flags(world, folder, *more):
    teacher, shards = world
    values = [
        *("--pretrained_teacher_model", teacher, "--train_shards_path_or_url", shards, "--output_dir", folder),
        *("--resolution", 32, "--train_batch_size", 4, "--max_train_steps", STEPS, "--checkpointing_steps", 3),
        *(
            "--validation_steps",
            0,
            "--disable_benchmark",
            "--report_steps=",
            "--validation_num_inference_steps",
            1,
            "--report_to",
            "none",
        ),
        *("--learning_rate", 1e-3, "--lr_scheduler", "cosine", "--lr_warmup_steps", 2, "--random_flip", *more),
    ]
    return [str(value) for value in values]


def weights(folder: Path, step: int = STEPS) -> dict[str, torch.Tensor]:
    found = {}
    for path in sorted((folder / f"checkpoint-{step}").glob("*.safetensors")):
        found |= {f"{path.stem}.{name}": value for name, value in load_file(path).items()}
    assert found
    return found


def assert_same_bits(a: Path, b: Path):
    first, second = weights(a), weights(b)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def kill_when(process: subprocess.Popen, condition, number=signal.SIGKILL):
    end = time.time() + 120
    while process.poll() is None and not condition():
        assert time.time() < end
        time.sleep(0.002)
    assert process.poll() is None, process.stdout.read()
    os.killpg(process.pid, number)
    return process.communicate(timeout=60)[0]


KINDS = {
    "full, cached": [],
    "lora with an average, streaming, two workers": [
        *("--lora_rank", 4, "--ema_decay", 0.5, "--vae_cache_disable", "--dataloader_num_workers", 2)
    ],
    "full, streaming, accumulation, two workers": [
        *("--gradient_accumulation_steps", 2, "--vae_cache_disable", "--dataloader_num_workers", 2)
    ],
    "lora with dropout, on demand, accumulation": [
        *("--lora_rank", 4, "--lora_dropout", 0.3, "--vae_cache_ondemand", "--gradient_accumulation_steps", 2)
    ],
}


@pytest.mark.parametrize("kind", KINDS)
def test_kill_and_resume(world, tmp_path, kind):
    """Once at a random moment of training, once while a checkpoint is being written."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    launch(SCRIPT, *flags(world, whole, *KINDS[kind]))
    again = flags(world, killed, *KINDS[kind], "--resume_from_checkpoint", "latest")

    process = launch(SCRIPT, *again, wait=False)
    kill_when(process, lambda: (killed / "checkpoint-3").exists() and random.random() < 0.05)
    process = launch(SCRIPT, *again, wait=False)
    kill_when(process, lambda: any(killed.glob("checkpoint-*.part")))
    assert all((path / "state.json").exists() for path in list_checkpoints(killed))
    launch(SCRIPT, *again)
    assert_same_bits(whole, killed)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_a_checkpoint_and_ends(world, tmp_path, number):
    """To the whole process group, as a terminal sends it: the reader processes get it too."""
    long = [
        "--max_train_steps",
        100_000,
        "--dataloader_num_workers",
        2,
        "--vae_cache_disable",
        "--checkpointing_steps",
        5,
    ]
    process = launch(SCRIPT, *flags(world, tmp_path, *long), wait=False)
    said = kill_when(process, (tmp_path / "checkpoint-5").exists, number)
    newest = list_checkpoints(tmp_path)[-1]
    assert f"saved {newest}" in said and "stopped by a signal" in said
    assert SCRIPT not in said  # no traceback of ours; accelerate's launcher prints one of its own
    assert not (tmp_path / "samples.png").exists()


@pytest.mark.parametrize("kind", [["--lora_rank", 4], ["--model_type", "full"]])
def test_two_processes_are_one(world, tmp_path, kind):
    """Same global batch, same weights to rounding: gradients are summed in another order."""
    more = ["--max_train_steps", 3, "--learning_rate", 1e-4, *kind]
    launch(SCRIPT, *flags(world, tmp_path / "one", *more, "--train_batch_size", 8))
    done = launch(SCRIPT, *flags(world, tmp_path / "two", *more, "--train_batch_size", 4), processes=2)
    assert "3 steps of 8 samples" in done.stdout
    one, two = weights(tmp_path / "one", 3), weights(tmp_path / "two", 3)
    # Adam makes a whole step of a gradient that is zero but for rounding: so not each weight, but nearly all
    far = sum((value - two[name]).abs().gt(2e-6).sum().item() for name, value in one.items())
    assert far < 0.01 * sum(value.numel() for value in one.values())
    assert max((value - two[name]).abs().max().item() for name, value in one.items()) < 7e-4  # the three steps


def test_lion_trains(world, tmp_path):
    launch(SCRIPT, *flags(world, tmp_path, "--max_train_steps", 2, "--optimizer", "lion", "--learning_rate", 1e-5))
    assert all(value.isfinite().all() for value in weights(tmp_path, 2).values())


def test_limit_finish_and_bad_names(world, tmp_path):
    mine = tmp_path / "checkpoint-notes.txt"
    mine.write_text("mine")
    launch(SCRIPT, *flags(world, tmp_path, "--checkpoints_total_limit", 2))
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-9", "checkpoint-12"]
    assert mine.read_text() == "mine"
    before = weights(tmp_path)
    (tmp_path / "checkpoint-99.part").mkdir()
    (tmp_path / "checkpoint-50").mkdir()  # not whole
    assert find_checkpoint(tmp_path, "latest").name == "checkpoint-12"
    done = launch(SCRIPT, *flags(world, tmp_path, "--resume_from_checkpoint", "latest"))
    assert "checkpoint-12 is already there" in done.stdout
    assert all(torch.equal(before[name], value) for name, value in weights(tmp_path).items())

    done = launch(SCRIPT, *flags(world, tmp_path, "--resume_from_checkpoint", "checkpoint-50"), check=False)
    assert done.returncode != 0 and "--resume_from_checkpoint checkpoint-50: no whole checkpoint" in done.stderr
    lora = ["--lora_rank", 4, "--resume_from_checkpoint", "latest"]
    done = launch(SCRIPT, *flags(world, tmp_path, *lora), check=False)
    assert done.returncode != 0 and "do not fit this run" in done.stderr


def train(*values):
    """As `launch`, within this process; returns what the script says."""
    threads, handlers = torch.get_num_threads(), {number: signal.getsignal(number) for number in STOPS}
    torch.set_num_threads(1)
    try:
        script.main(script.parse_args(list(values)))
    finally:
        torch.set_num_threads(threads)
        for number, handler in handlers.items():
            signal.signal(number, handler)


STOPS = (signal.SIGTERM, signal.SIGINT)


@pytest.mark.parametrize("number", STOPS)
def test_a_run_that_was_stopped_goes_on_as_if_it_was_not(world, tmp_path, number):
    """The script itself ends well, soon, and its readers with it."""
    more = ["--max_train_steps", 80, "--vae_cache_disable", "--dataloader_num_workers", 2, "--checkpointing_steps", 5]
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    process = subprocess.Popen(
        [sys.executable, SCRIPT, *flags(world, stopped, *more)], cwd=ROOT, start_new_session=True, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    started = time.time()
    said = kill_when(process, (stopped / "checkpoint-5").exists, number)
    assert process.returncode == 0 and time.time() - started < 60 and "Traceback" not in said
    step = json.loads((list_checkpoints(stopped)[-1] / "state.json").read_text())["step"]
    assert 5 <= step < 80
    train(*flags(world, stopped, *more, "--resume_from_checkpoint", "latest"))
    train(*flags(world, whole, *more))
    first, second = weights(whole, 80), weights(stopped, 80)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_new_run_in_a_used_folder(world, tmp_path, capsys):
    """It keeps its own checkpoints, its last one too, and deletes none of another run's that are further."""
    used = ["--checkpoints_total_limit", 1, "--checkpointing_steps", 2]
    train(*flags(world, tmp_path, *used, "--max_train_steps", 8))
    old = weights(tmp_path, 8)
    train(*flags(world, tmp_path, *used, "--max_train_steps", 4, "--learning_rate", 1e-2))
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-4", "checkpoint-8"]
    train(*flags(world, tmp_path, *used, "--max_train_steps", 8, "--learning_rate", 1e-2))
    assert "already there" not in capsys.readouterr().out
    new = weights(tmp_path, 8)
    assert any(not torch.equal(old[name], value) for name, value in new.items())


def test_a_folder_that_is_not_ours_stays(world, tmp_path):
    """diffusers' own scripts name their checkpoints alike."""
    theirs = tmp_path / "checkpoint-3"
    theirs.mkdir()
    (theirs / "optimizer.bin").write_bytes(b"theirs")
    (tmp_path / "notes.txt").write_text("mine")
    train(*flags(world, tmp_path, "--max_train_steps", 4, "--checkpoints_total_limit", 1))
    assert [path.read_bytes() for path in tmp_path.rglob("optimizer.bin")] == [b"theirs"]
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-4"]


def test_checkpoints_that_do_not_fit_are_named(world, tmp_path):
    full, lora = tmp_path / "full", tmp_path / "lora"
    short = ["--max_train_steps", 1]
    train(*flags(world, full, *short))
    train(*flags(world, lora, *short, "--lora_rank", 4))
    for folder, more, rule in (
        (lora, ["--model_type", "full"], "do not fit this run"),
        (full, ["--lora_rank", 4], "do not fit this run"),
        (lora, ["--lora_rank", 8], "do not fit this run"),
        (tmp_path / "none", [], "no whole checkpoint there"),
    ):
        path = folder / "checkpoint-1"
        with pytest.raises(SystemExit, match=f"--resume_from_checkpoint {path}: .*{rule}"):
            train(*flags(world, tmp_path / "new", *short, *more, "--resume_from_checkpoint", path))


def test_a_run_goes_on_from_another_folder(world, tmp_path):
    """By a path; and latest in an empty folder is a new run, and says so."""
    train(*flags(world, tmp_path / "a", "--max_train_steps", 3))
    train(*flags(world, tmp_path / "b", "--resume_from_checkpoint", tmp_path / "a" / "checkpoint-3"))
    train(*flags(world, tmp_path / "c", "--resume_from_checkpoint", "latest"))
    schedule = ["--max_train_steps", 3, "--resume_from_checkpoint", tmp_path / "a" / "checkpoint-3"]
    train(*flags(world, tmp_path / "d", *schedule))
    first, second = weights(tmp_path / "a", 3), weights(tmp_path / "d", 3)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert [path.name for path in list_checkpoints(tmp_path / "b")] == [f"checkpoint-{n}" for n in (6, 9, 12)]


def test_after_the_last_checkpoint_a_signal_ends_at_once(world, tmp_path, monkeypatch):
    """A report can take minutes, and there is nothing left to save."""
    before, seen = [signal.getsignal(number) for number in STOPS], []
    for name in ("save_checkpoint", "write_model_card"):
        plain = getattr(script, name)

        def watched(*args, name=name, plain=plain, **kwargs):
            seen.append((name, [signal.getsignal(number) for number in STOPS]))
            return plain(*args, **kwargs)

        monkeypatch.setattr(script, name, watched)
    script.main(script.parse_args(flags(world, tmp_path, "--max_train_steps", 1)))
    (_, saving), (_, reporting) = seen
    assert saving != before and reporting == before
