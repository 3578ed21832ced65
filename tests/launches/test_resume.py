"""Kill, stop, resume: the weights are those of the run that was left alone."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest

from common.checkpoint import list_checkpoints
from tests.data.helpers import records
from tests.helpers import ROOT, launch, toy_shards
from tests.launches.helpers import assert_same_bits, short_flags, start, train, wait_until

pytestmark = pytest.mark.slow

SCRIPT = "train_lcm_distill_sd.py"
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


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return toy_shards(tmp_path_factory.mktemp("shards"), 4, 12)


@pytest.mark.parametrize("kind", KINDS)
def test_kill_and_resume(sd_teacher, shards, tmp_path, kind):
    """Once at a random moment of training, once while a checkpoint is being written."""
    whole, killed, log = tmp_path / "whole", tmp_path / "killed", tmp_path / "log"
    again = short_flags(sd_teacher, shards, killed, *KINDS[kind], "--resume_from_checkpoint", "latest")
    process = start(again, log)
    wait_until(lambda: (killed / "checkpoint-3").exists() and random.random() < 0.05, process.is_alive, log.read_text)
    os.killpg(process.pid, signal.SIGKILL)
    process.join()
    process = start(again, log, killed_while_saving=True)
    process.join()
    assert process.exitcode == -signal.SIGKILL, log.read_text()
    assert "resumed from" in log.read_text() and list(killed.glob("checkpoint-*.part"))
    assert all((path / "state.json").exists() for path in list_checkpoints(killed))
    train(*again)
    train(*short_flags(sd_teacher, shards, whole, *KINDS[kind]))
    assert_same_bits(whole, killed)


def test_kill_while_filling_leaves_whole_files(sd_teacher, tmp_path, capsys):
    flags = short_flags(sd_teacher, toy_shards(tmp_path / "many", 6, 40), tmp_path / "o", "--max_train_steps", 60)
    flags += ["--vae_encode_batch_size", "2", "--checkpointing_steps", "0"]  # an epoch: all is cached
    store, log = tmp_path / "o" / "cache" / "vae", tmp_path / "log"
    process = start(flags, log)
    wait_until(lambda: list(store.rglob("*.safetensors")), process.is_alive, log.read_text)
    os.killpg(process.pid, signal.SIGKILL)
    process.join()
    assert 0 < records(store) < 240
    train(*flags)
    assert "caches: 240 latents" in capsys.readouterr().out


def stop_when(process: subprocess.Popen, condition, number) -> str:
    """Sends a signal to all of the process's group; what was said until its end."""
    wait_until(condition, lambda: process.poll() is None, lambda: process.stdout.read())
    os.killpg(process.pid, number)
    return process.communicate(timeout=60)[0]


STOPS = (signal.SIGTERM, signal.SIGINT)
STREAMED = ["--vae_cache_disable", "--dataloader_num_workers", 2, "--checkpointing_steps", 5]


@pytest.mark.parametrize("number", STOPS)
def test_a_signal_saves_a_checkpoint_and_ends(sd_teacher, shards, tmp_path, number):
    """To the whole process group, as a terminal sends it: the reader processes get it too."""
    flags = short_flags(sd_teacher, shards, tmp_path, "--max_train_steps", 100_000, *STREAMED)
    process = launch(SCRIPT, *flags, wait=False)
    said = stop_when(process, (tmp_path / "checkpoint-5").exists, number)
    newest = list_checkpoints(tmp_path)[-1]
    assert f"saved {newest}" in said and "stopped by a signal" in said
    assert SCRIPT not in said  # no traceback of ours; accelerate's launcher prints one of its own
    assert not (tmp_path / "samples.png").exists()


def test_a_run_that_was_stopped_goes_on_as_if_it_was_not(sd_teacher, shards, tmp_path):
    """The script itself ends well, soon, and its readers with it."""
    more = ["--max_train_steps", 40, *STREAMED]
    train(*short_flags(sd_teacher, shards, tmp_path / "whole", *more))
    for number in STOPS:
        stopped = tmp_path / number.name
        flags = short_flags(sd_teacher, shards, stopped, *more)
        process = subprocess.Popen(
            [sys.executable, SCRIPT, *flags], cwd=ROOT, start_new_session=True, text=True, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        started = time.time()
        said = stop_when(process, (stopped / "checkpoint-5").exists, number)
        assert process.returncode == 0 and time.time() - started < 60 and "Traceback" not in said
        step = json.loads((list_checkpoints(stopped)[-1] / "state.json").read_text())["step"]
        assert 5 <= step < 40
        train(*flags, "--resume_from_checkpoint", "latest")
        assert_same_bits(tmp_path / "whole", stopped, 40)
