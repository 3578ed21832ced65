"""Checkpoints of runs in this process: what is kept, what goes on from where, and what does not fit."""

import functools
import signal
import warnings

import pytest
import torch

from common import run
from common.checkpoint import find_checkpoint, list_checkpoints, read_parts, write_parts
from tests.helpers import toy_shards
from tests.launches.helpers import short_flags, train, weights

STOPS = (signal.SIGTERM, signal.SIGINT)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return toy_shards(tmp_path_factory.mktemp("shards"), 4, 12)


@pytest.fixture
def flags(sd_teacher, shards):
    """`flags(folder, *more)` of a short run."""
    return functools.partial(short_flags, sd_teacher, shards)


def test_a_single_process_reads_parts_without_a_warning(tmp_path):
    network = torch.nn.Linear(2, 3)
    weights = {name: p.detach().clone() for name, p in network.named_parameters()}
    write_parts(tmp_path, network, None, True)
    torch.nn.init.zeros_(network.weight)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        read_parts(tmp_path, network, None)
    assert all(torch.equal(p, weights[name]) for name, p in network.named_parameters())
    assert not [str(each.message) for each in told]


def test_lion_trains(flags, tmp_path):
    train(*flags(tmp_path, "--max_train_steps", 2, "--optimizer", "lion", "--learning_rate", 1e-5))
    assert all(value.isfinite().all() for value in weights(tmp_path, 2).values())


@pytest.mark.slow
def test_limit_finish_and_bad_names(flags, tmp_path, capsys):
    mine = tmp_path / "checkpoint-notes.txt"
    mine.write_text("mine")
    train(*flags(tmp_path, "--checkpoints_total_limit", 2))
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-9", "checkpoint-12"]
    assert mine.read_text() == "mine"
    before = weights(tmp_path)
    (tmp_path / "checkpoint-99.part").mkdir()
    (tmp_path / "checkpoint-50").mkdir()  # not whole
    assert find_checkpoint(tmp_path, "latest").name == "checkpoint-12"
    train(*flags(tmp_path, "--resume_from_checkpoint", "latest"))
    assert "checkpoint-12 is already there" in capsys.readouterr().out
    assert all(torch.equal(before[name], value) for name, value in weights(tmp_path).items())
    with pytest.raises(SystemExit, match="--resume_from_checkpoint checkpoint-50: no whole checkpoint"):
        train(*flags(tmp_path, "--resume_from_checkpoint", "checkpoint-50"))
    with pytest.raises(SystemExit, match="do not fit this run"):
        train(*flags(tmp_path, "--lora_rank", 4, "--resume_from_checkpoint", "latest"))


@pytest.mark.slow
def test_a_new_run_in_a_used_folder(flags, tmp_path, capsys):
    """It keeps its own checkpoints, its last one too, and deletes none of another run's that are further."""
    used = ["--checkpoints_total_limit", 1, "--checkpointing_steps", 2]
    train(*flags(tmp_path, *used, "--max_train_steps", 8))
    old = weights(tmp_path, 8)
    train(*flags(tmp_path, *used, "--max_train_steps", 4, "--learning_rate", 1e-2))
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-4", "checkpoint-8"]
    train(*flags(tmp_path, *used, "--max_train_steps", 8, "--learning_rate", 1e-2))
    assert "already there" not in capsys.readouterr().out
    new = weights(tmp_path, 8)
    assert any(not torch.equal(old[name], value) for name, value in new.items())


def test_a_folder_that_is_not_ours_stays(flags, tmp_path):
    """diffusers' own scripts name their checkpoints alike."""
    theirs = tmp_path / "checkpoint-3"
    theirs.mkdir()
    (theirs / "optimizer.bin").write_bytes(b"theirs")
    (tmp_path / "notes.txt").write_text("mine")
    train(*flags(tmp_path, "--max_train_steps", 4, "--checkpoints_total_limit", 1))
    assert [path.read_bytes() for path in tmp_path.rglob("optimizer.bin")] == [b"theirs"]
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-4"]


@pytest.mark.slow
def test_checkpoints_that_do_not_fit_are_named(flags, tmp_path):
    full, lora = tmp_path / "full", tmp_path / "lora"
    short = ["--max_train_steps", 1]
    train(*flags(full, *short))
    train(*flags(lora, *short, "--lora_rank", 4))
    for folder, more, rule in (
        (lora, ["--model_type", "full"], "do not fit this run"),
        (full, ["--lora_rank", 4], "do not fit this run"),
        (lora, ["--lora_rank", 8], "do not fit this run"),
        (tmp_path / "none", [], "no whole checkpoint there"),
    ):
        path = folder / "checkpoint-1"
        with pytest.raises(SystemExit, match=f"--resume_from_checkpoint {path}: .*{rule}"):
            train(*flags(tmp_path / "new", *short, *more, "--resume_from_checkpoint", path))


@pytest.mark.slow
def test_a_run_goes_on_from_another_folder(flags, tmp_path):
    """By a path; and latest in an empty folder is a new run, and says so."""
    train(*flags(tmp_path / "a", "--max_train_steps", 3))
    train(*flags(tmp_path / "b", "--resume_from_checkpoint", tmp_path / "a" / "checkpoint-3"))
    train(*flags(tmp_path / "c", "--resume_from_checkpoint", "latest"))
    schedule = ["--max_train_steps", 3, "--resume_from_checkpoint", tmp_path / "a" / "checkpoint-3"]
    train(*flags(tmp_path / "d", *schedule))
    first, second = weights(tmp_path / "a", 3), weights(tmp_path / "d", 3)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert [path.name for path in list_checkpoints(tmp_path / "b")] == [f"checkpoint-{n}" for n in (6, 9, 12)]


def test_after_the_last_checkpoint_a_signal_ends_at_once(flags, tmp_path, monkeypatch):
    """A report can take minutes, and there is nothing left to save."""
    before, seen = [signal.getsignal(number) for number in STOPS], []
    for name in ("save_checkpoint", "write_model_card"):
        plain = getattr(run, name)

        def watched(*args, name=name, plain=plain, **kwargs):
            seen.append((name, [signal.getsignal(number) for number in STOPS]))
            return plain(*args, **kwargs)

        monkeypatch.setattr(run, name, watched)
    train(*flags(tmp_path, "--max_train_steps", 1))
    (_, saving), (_, reporting) = seen
    assert saving != before and reporting == before
