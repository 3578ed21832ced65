"""The order of samples, batches of one size each, and the place to resume at."""

import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from argparse import Namespace
from collections import Counter
from dataclasses import replace
from functools import partial
from multiprocessing import active_children
from pathlib import Path

import pytest
from PIL import Image

import train_lcm_distill_sd as script
from common.data import stream as stream_module
from common.data.buckets import Rules
from common.data.datasets import Data, Dataset, count_epoch
from common.data.samples import NoGoodSamples, open_readers
from common.data.shards import expand_shards
from common.data.sources import Files, Prompts
from common.data.stream import PATIENCE, Batches, ShardPass, ShardStream, open_batches, plan_lanes
from tests.data.helpers import (
    TOY_SIZED,
    Accelerator,
    backend,
    batches,
    batches_of,
    captions,
    entry,
    faulty_shards,
    many,
    numbered,
    open_stream,
    parse,
    reader,
    told,
    toy_sized,
)
from tests.helpers import ROOT, encoded, toy_shards, write_shard

# ---------------------------------------------------------------------------------------------------------------------
# Faults
# ---------------------------------------------------------------------------------------------------------------------


def test_faults_are_skipped_and_counted(tmp_path):
    shards, causes, right = faulty_shards(tmp_path)
    source = batches(shards, lanes=1, batch_size=1)
    seen = {}
    while source.state()["starts"][0][1] == 0:  # one epoch
        (sample,) = next(source)
        seen.setdefault(sample.caption, sample)
    assert set(source.faults) == {*causes, "truncated shard", "unreadable shard"}
    assert right <= set(seen) and set(seen) <= right | {"before the cut"}
    assert not (tmp_path / "unpickled").exists()
    assert seen["grey"].pixels.unique().tolist() == [77]
    assert seen["sixteen bits"].pixels.unique().tolist() == [128]  # scaled, not cut off at 255
    assert seen["transparent ü"].pixels.unique().tolist() == [255]  # on white


@pytest.mark.parametrize("workers", [0, 2])
def test_nothing_good_ends_with_the_causes(tmp_path, workers):
    shards = [str(write_shard(tmp_path / f"{i}.tar", [{"png": b"", "txt": b"x"}] * 3)) for i in range(2)]
    with pytest.raises(NoGoodSamples, match=r"no usable sample in any of 2 shards: \d+ x "):
        next(batches(shards, workers=workers))


@pytest.mark.slow
def test_a_script_counts_faults_and_ends_where_nothing_is_good(tmp_path, sd_teacher, capsys):
    """By a sentence that names the flag, not by a traceback."""
    faulty_shards(tmp_path / "bad")
    flags = ["--pretrained_teacher_model", sd_teacher, "--output_dir", tmp_path / "out", "--resolution", 32]
    flags += ["--validation_steps", 0, "--train_batch_size", 2, "--max_train_steps", 12, "--disable_benchmark"]
    flags += ["--report_steps=", "--report_to", "none"]

    def train(*more):
        script.main(*script.parse_args([str(flag) for flag in (*flags, *more)]))

    train("--train_shards_path_or_url", tmp_path / "bad" / "{a,b,c,d}.tar")
    source = batches([str(tmp_path / "bad" / f"{name}.tar") for name in "abcd"], batch_size=2, seed=42, buffer=1000)
    captions(source, 12)
    said = {cause: int(count) for count, cause in re.findall(r"skipped (\d+) x (.*)", capsys.readouterr().out)}
    assert said == source.faults and len(said) > 5
    assert not (tmp_path / "bad" / "unpickled").exists()
    write_shard(tmp_path / "none.tar", [{"png": b"", "txt": b"x"}])
    for more in (["--vae_cache_disable"], ["--dataloader_num_workers", 1]):
        with pytest.raises(SystemExit, match="^--train_shards_path_or_url: no usable sample in any of 1 shards"):
            train("--train_shards_path_or_url", tmp_path / "none.tar", *more)


# ---------------------------------------------------------------------------------------------------------------------
# Order
# ---------------------------------------------------------------------------------------------------------------------


def test_an_epoch_visits_every_sample_once_and_epochs_differ(shards):
    source = batches(shards, batch_size=8)
    epochs = [captions(source, 8) for _ in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == sorted(f"sample {i}" for i in range(64))
    assert epochs[0] != epochs[1] != epochs[2]
    assert captions(batches(shards, batch_size=8), 8) == epochs[0]
    assert captions(batches(shards, batch_size=8, seed=1), 8) != epochs[0]


@pytest.mark.parametrize("workers", [0, 1])
def test_one_shard_is_read_again_after_its_end(tmp_path, workers):
    source = batches(expand_shards(toy_shards(tmp_path, 1, 8)), workers=workers, lanes=1)
    epochs = [captions(source, 2) for _ in range(3)]
    assert len(epochs[0]) == 8 and sorted(epochs[0]) == sorted(epochs[1]) == sorted(epochs[2])


def test_order_and_crops_do_not_depend_on_where_the_data_are(tmp_path, shards):
    """A run may be resumed on a machine where the same shards have another path."""
    copies = [shutil.copy(shard, tmp_path) for shard in shards]
    wide = partial(reader, center_crop=False, random_flip=True)
    found = []
    for paths in (shards, copies):
        stream = ShardStream(numbered(paths), [wide()], seed=0, batch_size=64, process=0, processes=1, lanes=4)
        found.append([(sample.caption, sample.size_ids) for sample in next(Batches(stream, 0))])
    assert found[0] == found[1]


@pytest.mark.slow
def test_order_does_not_depend_on_processes_or_workers(shards):
    expected = captions(batches(shards, batch_size=8), 20)
    for workers in (1, 2, 4):
        assert captions(batches(shards, batch_size=8, workers=workers), 20) == expected
    for workers in (0, 2):
        parts = [batches(shards, batch_size=4, process=p, processes=2, workers=workers) for p in (0, 1)]
        found = []
        for _ in range(20):
            pair = sorted([sample for part in parts for sample in next(part)], key=lambda sample: sample.position)
            found += [sample.caption for sample in pair]
        assert found == expected


@pytest.mark.parametrize("workers", [0, 2])
def test_resuming_goes_on_exactly(tmp_path, shards, workers):
    faulty, _, _ = faulty_shards(tmp_path)
    mixed = [*shards, *faulty]
    whole = batches(mixed, workers=workers)
    expected = captions(whole, 40)
    for stop in (1, 7, 23):
        source = batches(mixed, workers=workers)
        assert captions(source, stop) == expected[: stop * 4]
        state = json.loads(json.dumps(source.state()))
        later = batches(mixed, workers=workers, state=state)
        assert captions(later, 40 - stop) == expected[stop * 4 :]
        assert source.faults + later.faults == whole.faults  # none counted twice, none lost


def test_lanes():
    assert plan_lanes(1, 1, 0) == (1, 0)
    assert plan_lanes(4, 1, 8) == (4, 4)
    assert plan_lanes(1100, 8, 8) == (64, 8)
    assert plan_lanes(1100, 1, 2) == plan_lanes(1100, 2, 2)[:1] + (2,)  # the same order
    for count in range(1, 40):
        for processes in range(1, count + 1):
            lanes, workers = plan_lanes(count, processes, 3)
            assert lanes <= count and lanes % (processes * max(workers, 1)) == 0


def data_of(shards, **dataset) -> Data:
    return Data("--shards", (Dataset("shards", shards, reader().rules, **dataset),), "off", None)


@pytest.mark.parametrize("count", [1, 3])
def test_fewer_shards_than_processes(shards, count):
    """Each process reads them in an order of its own; a resumed run, also with fewer processes, goes on exactly."""
    args, data, said = Namespace(dataloader_num_workers=0, seed=0, train_batch_size=4), data_of(shards[:count]), []

    def open_all(processes, states=None):
        state = states and {
            "lanes": states[0]["lanes"],
            "starts": {lane: start for state in states for lane, start in state["starts"].items()},
            "used": sum((state["used"] for state in states), []),
        }
        each = [Namespace(num_processes=processes, process_index=p, print=said.append) for p in range(processes)]
        return [open_batches(args, data, one, [reader()], state) for one in each]

    def read(sources, steps):
        """By position: how many processes there are does not matter."""
        found = [sample for source in sources for _ in range(steps) for sample in next(source)]
        return {sample.position: sample.caption for sample in found}

    whole = open_all(4)
    expected = read(whole, 4 * count)  # two epochs of eight samples a shard, twice or four times each
    assert (
        said
        == [
            f"{count} shards for 4 processes: an epoch reads each {4 // count + count // 3} times, in orders of its own"
        ]
        * 4
    )
    assert len(expected) == 64 * count
    if count == 1:
        orders = [[expected[i] for i in range(p, 32, 4)] for p in range(4)]
        assert all(sorted(order) == sorted(orders[0]) for order in orders) and len(set(map(tuple, orders))) == 4
    sources = open_all(4)
    found = read(sources, 3)
    states = json.loads(json.dumps([source.state() for source in sources]))
    later = open_all(2, states)
    args.train_batch_size = 8
    assert found | read(open_all(2, states), 4 * count - 3) == expected and later


# ---------------------------------------------------------------------------------------------------------------------
# Weights
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight", [0.25, 0.3, 1.75, 3.0])
def test_a_dataset_comes_as_often_as_its_probability_says(tmp_path, weight):
    """Beside another one, and each of its samples as often as any other."""
    png, shards = encoded(Image.new("RGB", (20, 16))), {"a": [], "b": []}
    for name, s in itertools.product("ab", range(3)):
        content = [{"png": png, "txt": f"{name}{s}{i}".encode()} for i in range(7)]
        shards[name].append(str(write_shard(tmp_path / f"{name}{s}.tar", content)))
    rules = reader().rules
    datasets = Dataset("a", shards["a"], rules, probability=weight), Dataset("b", shards["b"], rules)
    args = Namespace(dataloader_num_workers=0, seed=0, train_batch_size=1)
    data = Data("--shards", datasets, "off", None)
    assert count_epoch(datasets) == round(21 * weight) + 21
    readers = [reader(), replace(reader(), dataset=1)]
    source, seen, epochs = open_batches(args, data, Accelerator(), readers, None), Counter(), 8
    while min(start[1] for start in source.state()["starts"].values()) < epochs:
        (sample,) = next(source)
        if sample.cursor[1] < epochs:
            seen[sample.caption] += 1
    assert {seen[f"b{s}{i}"] for s in range(3) for i in range(7)} == {epochs}
    visits = [seen[f"a{s}{i}"] for s in range(3) for i in range(7)]
    assert max(visits) - min(visits) <= 1 and abs(sum(visits) / (21 * epochs * weight) - 1) < 0.05
    whole = open_batches(args, data, Accelerator(), readers, None)
    expected = captions(whole, 90)
    for stop in (1, 40):
        source = open_batches(args, data, Accelerator(), readers, None)
        captions(source, stop)
        state = json.loads(json.dumps(source.state()))
        assert captions(open_batches(args, data, Accelerator(), readers, state), 90 - stop) == expected[stop:]


def test_small_parts_take_turns():
    """Without a number of each part's own all would come in the same epoch."""
    parts = [(0, Prompts(i, (b"x",)), 0.25) for i in range(24)]
    stream = ShardStream(parts, [None], seed=0, batch_size=1, process=0, processes=1, lanes=1)
    counts = [sum(len(list(stream.shuffled(part, epoch, 0))) for part in range(24)) for epoch in range(8)]
    assert sum(counts[:4]) == sum(counts[4:]) == 24 and max(counts) < 12


def test_a_share_without_good_samples_ends_and_one_with_few_goes_on(tmp_path):
    """An epoch that has met none of a shard's samples says nothing about them."""
    args = Namespace(dataloader_num_workers=0, seed=0, train_batch_size=1)
    good = {"png": encoded(Image.new("RGB", (20, 16))), "txt": b"good"}
    bad = str(write_shard(tmp_path / "bad.tar", [{"png": b"", "txt": b"x"}] * 9))
    few = str(write_shard(tmp_path / "few.tar", [{"png": b"", "txt": b"x"}] * 9 + [good]))
    source = open_batches(args, data_of([bad, few], probability=0.1), Accelerator(), [reader()], None)
    assert captions(source, 20) == ["good"] * 20
    with pytest.raises(NoGoodSamples, match="no usable sample in any of 1 shards: 1 x empty image"):
        next(open_batches(args, data_of([bad], probability=0.1), Accelerator(), [reader()], None))


@pytest.mark.parametrize(("workers", "kept"), [(0, 0), (1, 1), (2, 2), (3, 2), (4, 4), (7, 4)])
def test_resuming_with_another_number_of_workers(shards, workers, kept):
    """The lanes of a run stay: each must have one reader, or samples come twice and others never."""
    args, data = Namespace(dataloader_num_workers=0, seed=0, train_batch_size=4), data_of(shards)
    said = []
    one = Namespace(num_processes=1, process_index=0, print=said.append)
    expected = captions(open_batches(args, data, one, [reader()], None), 30)
    source = open_batches(args, data, one, [reader()], None)
    captions(source, 5)
    args.dataloader_num_workers = workers
    later = open_batches(args, data, one, [reader()], source.state())
    assert later.parts == max(kept, 1) and bool(said) == (workers != kept)
    assert captions(later, 25) == expected[20:]


def test_resuming_with_processes_that_do_not_fit_is_refused(shards):
    source = batches(shards)
    next(source)
    args, data = Namespace(dataloader_num_workers=0, seed=0, train_batch_size=4), data_of(shards)
    three = Namespace(num_processes=3, process_index=0, print=print)
    with pytest.raises(SystemExit, match="8 lanes of the checkpoint's data cannot be split over 3 processes"):
        open_batches(args, data, three, [reader()], source.state())


READING = """
import os, signal, sys, threading, time
from multiprocessing import active_children, set_start_method
from pathlib import Path
from threading import Thread

from common.data.buckets import Rules
from common.data.samples import ImageReader
from common.data.stream import Batches, ShardStream

if __name__ == "__main__":
    method, end, flag, *shards = sys.argv[1:]
    set_start_method(method, force=True)
    stream = ShardStream(
        [(0, shard, 1.0) for shard in shards], [ImageReader(Rules(16, alignment=8), "bilinear", False, 0)],
        seed=0, batch_size=4, process=0, processes=1, lanes=8,
    )
    batches = Batches(stream, 2)
    next(batches)
    readers = active_children()
    for number in (signal.SIGTERM, signal.SIGINT):
        for reader in readers:
            os.kill(reader.pid, number)
    for _ in range(9):
        next(batches)
    Path(flag).touch()
    threading.excepthook = lambda _: None  # the thread ends with the process, and may say so
    Thread(target=lambda: [next(batches) for _ in range(999)], daemon=True).start()
    while not Path(flag + ".stuck").exists():
        time.sleep(0.01)
    assert all(reader.is_alive() for reader in readers)
    print("readers", *(reader.pid for reader in readers), flush=True)
    if end == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    raise SystemExit("enough")
"""


@pytest.mark.slow
@pytest.mark.parametrize(("method", "end"), [("fork", "over"), ("fork", "killed"), ("spawn", "killed")])
def test_readers_outlive_a_stop_but_not_the_training_process(shards, tmp_path, method, end):
    """A signal to all processes is for the training process; its end, however it comes, is for them.

    One of them is in the middle of a read, which it cannot leave.
    """
    flag, log = tmp_path / "flag", tmp_path / "log"
    stuck = [f"pipe:cat {shards[0]}; test -e {flag} && touch {flag}.stuck && exec sleep 60; true"] * 8
    (tmp_path / "reading.py").write_text(READING)
    words = [sys.executable, tmp_path / "reading.py", method, end, flag, *stuck]
    with open(log, "w") as file:
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        done = subprocess.run(words, env=environment, stdout=file, stderr=subprocess.STDOUT, timeout=100)
    start = time.monotonic()
    assert done.returncode == (1 if end == "over" else -signal.SIGKILL)
    # A reader that was sending to a process that is killed may say that its connection was reset
    assert end == "killed" or "Traceback" not in log.read_text()
    readers = re.search(r"readers (\d+) (\d+)\n", log.read_text()).groups()
    while any(Path("/proc", pid).exists() for pid in readers) and time.monotonic() - start < 9:
        time.sleep(0.1)
    assert time.monotonic() - start < 3


def test_readers_end_with_their_loader(shards, tmp_path):
    """Those that wait for a slow shard, too, and not those of another loader that was opened in the meantime."""
    others = set(active_children())
    slow = batches([f"pipe:touch {tmp_path}/$$; exec sleep 20"] * 8, workers=2)
    readers = set(active_children()) - others
    while len(list(tmp_path.iterdir())) < 2:
        time.sleep(0.01)
    later = batches(shards, workers=2)
    captions(later, 1)
    start = time.monotonic()
    del slow
    assert time.monotonic() - start < 3 and len(readers) == 2 and not readers & set(active_children())
    assert captions(later, 20)


# ---------------------------------------------------------------------------------------------------------------------
# Batches of one bucket
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """Three buckets, 60 images, in shards with a bad sample each."""
    folder = tmp_path_factory.mktemp("mixed")
    sizes = random.Random(0).sample([(64, 64)] * 30 + [(48, 80)] * 20 + [(80, 48)] * 10, 60)
    for shard in range(6):
        samples = [
            {"png": encoded(Image.new("RGB", size[::-1])), "txt": f"{shard}.{i}".encode()}
            for i, size in enumerate(sizes[shard * 10 : shard * 10 + 10])
        ]
        write_shard(folder / f"{shard}.tar", [*samples[:5], {"png": b"", "txt": b"bad"}, *samples[5:]])
    return parse("--train_shards_path_or_url", f"{folder}/{{0..5}}.tar", *TOY_SIZED)


def test_a_batch_has_one_bucket_and_an_epoch_every_sample(mixed):
    source, seen = open_stream(mixed, 4), {}
    for _ in range(45):
        batch = next(source)
        assert len(batch) == 4 and len({sample.bucket for sample in batch}) == 1
        assert [s.position for s in batch] == sorted(s.position for s in batch)
        seen.update({sample.position: sample.caption for sample in batch})
    waiting = [sample.position for entries in source.waiting.values() for _, sample in entries]
    ready = [sample.position for batch in source.ready for sample in batch]
    assert sorted([*seen, *waiting, *ready]) == list(range(source.reads * 4))  # none lost, none twice
    assert len(seen) == 180 and len(set(seen.values())) == 60
    assert 0 < len(waiting) <= 9 and not source.padded


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_resuming_with_buckets_is_bit_exact(mixed, workers):
    whole = open_stream(mixed, 4, workers=workers)
    expected = [told(next(whole)) for _ in range(40)]
    for stop in (1, 6, 17, 33):
        source = open_stream(mixed, 4, workers=workers)
        assert [told(next(source)) for _ in range(stop)] == expected[:stop]
        state = json.loads(json.dumps(source.state()))
        between = open_stream(
            mixed, 4, state=state, workers=workers
        )  # stopped a second time, before the first is made up
        assert told(next(between)) == expected[stop]
        later = open_stream(mixed, 4, state=json.loads(json.dumps(between.state())), workers=workers)
        assert [told(next(later)) for _ in range(39 - stop)] == expected[stop + 1 :]
        assert source.faults + between.faults + later.faults == whole.faults
        pixels = [next(open_stream(mixed, 4, state=state))[0].pixels, None]
        assert pixels[0] is not None


def test_resuming_with_other_processes_uses_every_sample_once(mixed):
    """From one process to two and back: no position twice, none left out but those that wait."""
    source = open_stream(mixed, 4, lanes=4)
    used = [sample.position for _ in range(7) for sample in next(source)]
    state = source.state()
    for processes in (2, 1):
        parts = [
            open_stream(mixed, 4 // processes, state, process=p, processes=processes, lanes=4) for p in range(processes)
        ]
        used += [sample.position for _ in range(9) for part in parts for sample in next(part)]
        states = [part.state() for part in parts]
        state = {
            "starts": {k: v for s in states for k, v in s["starts"].items()},
            "used": sum((s["used"] for s in states), []),
        }
    assert len(set(used)) == len(used)
    left_out = set(range(max(used))) - set(used)
    assert len(left_out) <= 2 * 9 + 8  # of three buckets less than a batch each waits, and one read


def rare(folder: Path):
    """One picture in 200 is wide."""
    many(folder, {(64, 64): 199, (48, 80): 1})
    return toy_sized(folder)


def test_a_rare_bucket_is_filled_up_after_a_bounded_wait(tmp_path, capsys):
    run = rare(tmp_path / "f")
    source = open_stream(run, 2)
    lone, other_noise = [], []
    for _ in range(3 * PATIENCE):
        batch = next(source)
        if batch[0].bucket == (48, 80):
            lone.append([sample.caption for sample in batch])
            other_noise.append(len({sample.position for sample in batch}))
            assert source.reads - batch[0].position // 2 <= PATIENCE + 2
    assert lone and all(captions == ["48_80_000"] * 2 for captions in lone) and set(other_noise) == {2}
    assert capsys.readouterr().out.count("bucket 80x48: fewer than 2 samples") == 1  # once


def test_a_note_on_repeated_samples_goes_where_the_others_go(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(stream_module, "PATIENCE", 2)
    many(tmp_path / "f", {(64, 64): 19, (48, 80): 1})
    run, said = toy_sized(tmp_path / "f", "--train_batch_size", 2), []
    source = open_batches(run.args, run.data, Accelerator(), open_readers(run.args, run.data), None, say=said.append)
    captions(source, 20)
    assert said == ["bucket 80x48: fewer than 2 samples among 4, its batches are filled by repeating them"]
    assert capsys.readouterr().out == ""


def test_resuming_around_a_batch_that_was_filled_up(tmp_path):
    run = rare(tmp_path / "f")
    whole = open_stream(run, 2)
    expected = [told(next(whole)) for _ in range(400)]
    at = next(i for i, batch in enumerate(expected) if batch[0][2][4:] == (48, 80))
    for stop in (at - 1, at, at + 1):
        source = open_stream(run, 2)
        for _ in range(stop):
            next(source)
        later = open_stream(run, 2, state=json.loads(json.dumps(source.state())))
        assert [told(next(later)) for _ in range(400 - stop)] == expected[stop:]


def test_one_bucket_reads_in_the_order_of_the_sequence(mixed):
    """As it was before there were buckets: batch k of process p has the samples p, p + P, ... from k on."""
    one = replace(mixed.data.datasets[0], rules=Rules(64, alignment=16, crop_style="center"))
    square = replace(mixed, data=replace(mixed.data, datasets=(one,)))
    for processes in (1, 2):
        for process in range(processes):
            for k, batch in enumerate(batches_of(square, 4, 12, process=process, processes=processes)):
                assert [s.position for s in batch] == [(4 * k + i) * processes + process for i in range(4)]


def test_open_batches_takes_repeats_and_names_the_source(tmp_path, folder):
    run = parse("--data_backend_config", backend(tmp_path, entry(folder, repeats=1)), "--train_batch_size", 2)
    accelerator = Accelerator()
    accelerator.num_processes = 9
    with pytest.raises(SystemExit, match="--data_backend_config: the 8 lanes of the checkpoint's data cannot be split"):
        open_batches(run.args, run.data, accelerator, open_readers(run.args, run.data), {"lanes": 8})
    accelerator.num_processes = 8
    assert open_batches(run.args, run.data, accelerator, open_readers(run.args, run.data), None).stream.lanes == 8


# ---------------------------------------------------------------------------------------------------------------------
# A share of the shards, once
# ---------------------------------------------------------------------------------------------------------------------


def test_each_process_fills_its_share():
    share = [ShardPass([(0, Files("", ()))] * 5, [None], process=process, processes=2) for process in (0, 1)]
    assert [list(part) for part in share] == [[0, 2, 4], [1, 3]]  # shards, by their numbers
