"""Shards full of faults, the order of samples, and what becomes of an image."""

import bz2
import gzip
import http.server
import io
import json
import lzma
import os
import pickle
import re
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
import threading
import zlib
from argparse import Namespace
from collections import Counter
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from PIL import Image

from common.data import shards as shards_module
from common.data.buckets import Rules
from common.data.datasets import Data, Dataset, open_shards
from common.data.samples import ImageReader, NoGoodSamples
from common.data.shards import expand_shards, read_shard
from common.data.sources import count_samples
from common.data.stream import Batches, ShardStream, open_batches, plan_lanes
from tests.helpers import ROOT, add_member, encoded, launch, tiny_pipeline, toy_shards, write_shard


def reader(resolution=16, interpolation_type="bilinear", center_crop=True, random_flip=False, seed=0) -> ImageReader:
    rules = Rules(resolution, alignment=min(8, resolution), crop_style="center" if center_crop else "random")
    return ImageReader(rules, interpolation_type, random_flip, seed)


def numbered(shards) -> list[tuple[int, str]]:
    """As the shards of a single dataset."""
    return [(0, shard) for shard in shards]


def batches(shards, *, state=None, workers=0, batch_size=4, process=0, processes=1, seed=0, lanes=None, buffer=8):
    planned, workers = plan_lanes(len(shards), processes, workers)
    stream = ShardStream(
        numbered(shards), [reader()], seed=seed, batch_size=batch_size, process=process, processes=processes,
        lanes=lanes or planned, shuffle_buffer=buffer, state=state,
    )  # fmt: skip
    return Batches(stream, workers)


def captions(source: Batches, count: int) -> list[str]:
    return [sample.caption for _ in range(count) for sample in next(source)]


def picture(mode: str = "RGB", size=(20, 16), value=None) -> Image.Image:
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3)).astype(np.uint8))
    return image.convert(mode) if value is None else Image.new(mode, size, value)


class Evil:
    """Unpickling it leaves a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def bomb() -> bytes:
    """A PNG whose header claims 60000 x 60000."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def faulty_shards(folder: Path) -> tuple[list[str], dict[str, int], set[str]]:
    """Shards, the causes to be counted in one epoch, and the captions of the good samples."""
    folder.mkdir(parents=True, exist_ok=True)
    good = encoded(picture())
    sixteen = Image.fromarray(np.full((16, 20), 32896, np.uint16))  # 128 * 257
    evil = pickle.dumps(Evil(folder / "unpickled"))
    samples = [
        {"png": good, "txt": b"plain"},
        {"png": b"", "txt": b"x"},
        {"png": bomb(), "txt": b"x"},
        {"jpg": b"not an image at all", "txt": b"x"},
        {"png": good[:40], "txt": b"x"},
        {"png": good},
        {"png": good, "txt": b"  \n"},
        {"png": good, "txt": b"\xff\xfe\xfa"},
        {"png": good, "json": b"{broken"},
        {"txt": b"only words"},
        {"png": good, "pkl": evil, "txt": b"beside a pickle"},
        {"png": good, "pyd": evil, "text": b"beside another"},
        {"png": encoded(picture("L", value=77)), "caption": b"grey"},
        {"jpg": encoded(picture("CMYK"), "jpeg"), "txt": b"cmyk"},
        {"png": encoded(sixteen), "txt": b"sixteen bits"},
        {"png": encoded(picture("P")), "json": json.dumps({"caption": "palette"}).encode()},
        {"png": encoded(picture("RGBA", value=(255, 0, 0, 0))), "txt": "transparent ü".encode()},
        {"webp": encoded(picture(), "webp"), "txt": b"webp"},
        {"jpg.gz": gzip.compress(encoded(picture(), "jpeg")), "txt.gz": gzip.compress(b"gzipped")},
        {"jpg.gz": b"no gzip", "txt": b"x"},
    ]
    names = [f"folder.of/{i:03d}" for i in range(len(samples))]
    first = write_shard(folder / "a.tar", samples, names)
    # A key that comes again after another one; and a tar that ends within a member.
    twice = [{"png": good, "txt": b"first"}, {"png": good, "txt": b"between"}, {"png": good, "txt": b"again"}]
    second = write_shard(folder / "b.tar", twice, ["one", "two", "one"])
    whole = write_shard(folder / "whole.tar", [{"png": good, "txt": b"before the cut"}, {"png": good, "txt": b"cut"}])
    third = folder / "c.tar"
    third.write_bytes(whole.read_bytes()[: 2 * 512 + 1024 + 512 + 512 + 700])
    whole.unlink()
    fourth = folder / "d.tar"
    fourth.write_bytes(b"")
    causes = {
        "empty image": 1, "image bomb": 1, "broken image": 2, "missing caption": 2, "caption is not UTF-8": 1,
        "broken JSON": 1, "no image": 1, "pickle member (ignored)": 2, "broken gzip member": 1, "duplicate key": 1,
    }  # fmt: skip
    right = {"plain", "beside a pickle", "beside another", "grey", "cmyk", "sixteen bits", "palette", "transparent ü"}
    right |= {"webp", "gzipped", "first", "between"}
    return [str(path) for path in (first, second, third, fourth)], causes, right


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


def test_exact_counts_of_a_shard_with_one_lane(tmp_path):
    shards, causes, _ = faulty_shards(tmp_path)
    good = write_shard(tmp_path / "z.tar", [{"png": encoded(picture()), "txt": b"last"}])
    found = Counter()
    for shard in [*shards, str(good)]:
        for _, members in read_shard(shard):
            try:
                if isinstance(members, str):
                    found[members] += 1
                else:
                    found.update(reader()(members, "v").faults)
            except Exception as cause:
                found[str(cause)] += 1
    assert found == causes | {"truncated shard": 1, "unreadable shard": 1}


@pytest.mark.parametrize("workers", [0, 2])
def test_nothing_good_ends_with_the_causes(tmp_path, workers):
    shards = [str(write_shard(tmp_path / f"{i}.tar", [{"png": b"", "txt": b"x"}] * 3)) for i in range(2)]
    with pytest.raises(NoGoodSamples, match=r"no usable sample in any of 2 shards: \d+ x "):
        next(batches(shards, workers=workers))


def test_script_on_faulty_shards(tmp_path):
    faulty_shards(tmp_path / "bad")
    teacher = tiny_pipeline(tmp_path / "teacher")
    flags = ["--pretrained_teacher_model", teacher, "--output_dir", tmp_path / "out", "--resolution", 32]
    flags += [
        "--validation_steps",
        0,
        "--train_batch_size",
        2,
        "--max_train_steps",
        12,
        "--disable_benchmark",
        "--report_steps=",
    ]
    done = launch("train_lcm_distill_sd.py", *flags, "--train_shards_path_or_url", tmp_path / "bad" / "{a,b,c,d}.tar")
    source = batches([str(tmp_path / "bad" / f"{name}.tar") for name in "abcd"], batch_size=2, seed=42, buffer=1000)
    captions(source, 12)
    said = {cause: int(count) for count, cause in re.findall(r"skipped (\d+) x (.*)", done.stdout)}
    assert said == source.faults and len(said) > 5
    assert not (tmp_path / "bad" / "unpickled").exists()
    write_shard(tmp_path / "none.tar", [{"png": b"", "txt": b"x"}])
    for more in (["--vae_cache_disable"], ["--dataloader_num_workers", 1]):
        done = launch(
            "train_lcm_distill_sd.py", *flags, "--train_shards_path_or_url", tmp_path / "none.tar", *more, check=False
        )
        assert done.returncode != 0
        assert "--train_shards_path_or_url: no usable sample in any of 1 shards" in done.stderr
        assert "NoGoodSamples" not in done.stderr  # a sentence, not a traceback


# ---------------------------------------------------------------------------------------------------------------------
# Order
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("order")
    content = [{"png": encoded(picture()), "txt": f"sample {i}".encode()} for i in range(64)]
    return [str(write_shard(folder / f"{s}.tar", content[s * 8 : s * 8 + 8])) for s in range(8)]


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
    with pytest.raises(ValueError, match="3 shards cannot feed 4 processes"):
        plan_lanes(3, 4, 0)


# ---------------------------------------------------------------------------------------------------------------------
# Sources
# ---------------------------------------------------------------------------------------------------------------------


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@contextmanager
def served(folder: Path, handler=Quiet):
    """The address of a server of a folder's files."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()


def keys_of(shard: str) -> list[str]:
    """Keys of a shard without a fault."""
    samples = list(read_shard(shard))
    assert not any(isinstance(members, str) for _, members in samples)
    return [key for key, _ in samples]


def test_pipe_and_http(shards):
    local = keys_of(shards[0])
    with served(Path(shards[0]).parent) as address:
        assert keys_of(f"{address}/0.tar") == local
        assert causes(f"{address}/0.tar.missing") == ["unreadable shard"]
    assert keys_of(f"pipe:cat '{shards[0]}'") == local


@pytest.mark.parametrize("command", ["cat {}; exit 3", "cat {}; sleep 0.2; exit 3", "cat {}; kill -KILL $$"])
def test_a_command_that_fails_is_counted_and_what_it_wrote_is_kept(shards, command):
    """However early it fails: gopen's own pipe would drop what is still in the buffer."""
    samples = list(read_shard("pipe:" + command.format(shards[0])))
    assert [key for key, _ in samples[:8]] == keys_of(shards[0])
    assert [members for _, members in samples[8:]] == ["shard's command failed"]
    assert causes("pipe:exit 3") == ["unreadable shard"]
    assert causes(f"pipe:cat {shards[0]} | head -c 3000; exit 3") == ["truncated shard"]


def test_a_shard_that_is_left_early_ends_its_command(tmp_path, shards):
    samples = read_shard(f"pipe:cat {shards[0]} /dev/zero && touch {tmp_path}/end")
    next(samples)
    samples.close()
    assert not (tmp_path / "end").exists()


class Busy(Quiet):
    """Asks the first caller to come again."""

    asked = 0

    def do_GET(self):  # noqa: N802
        Busy.asked += 1
        if Busy.asked == 1:
            self.send_error(503)
        else:
            super().do_GET()


def test_a_server_that_is_busy_is_asked_again(shards):
    with served(Path(shards[0]).parent, Busy) as address:
        assert keys_of(f"{address}/0.tar") == keys_of(shards[0]) and Busy.asked == 2


@pytest.mark.parametrize(
    ("url", "program", "words"),
    [
        ("gs://bucket/0.tar", "gsutil", "cat"),
        ("s3://bucket/with a space.tar", "aws", "s3 cp"),
        ("ais://bucket/0.tar", "ais", "get"),
    ],
)
def test_stores_are_read_by_their_own_programs(tmp_path, monkeypatch, shards, url, program, words):
    with monkeypatch.context() as empty:
        empty.setenv("PATH", str(tmp_path))
        with pytest.raises(ValueError, match=f"read by the program {program}, which is not installed"):
            open_shards(url)
    stand_in = tmp_path / program
    stand_in.write_text(f"#!/bin/sh\nprintf '%s\\n' \"$@\" > {tmp_path}/words\ncat {shards[0]}\n")
    stand_in.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert open_shards(url) == [url] and keys_of(url) == keys_of(shards[0])
    said = (tmp_path / "words").read_text().splitlines()
    assert said[: len(words.split())] == words.split() and url in said


@pytest.mark.parametrize("token", [None, "secret"])
def test_shards_of_the_hub(monkeypatch, shards, token):
    asked = []

    class Asked(Quiet):
        def do_GET(self):  # noqa: N802
            asked.append(self.headers["Authorization"])
            super().do_GET()

    with served(Path(shards[0]).parent, Asked) as address:
        for module in (huggingface_hub, shards_module):
            monkeypatch.setattr(module, "get_token", lambda: token)
        place = Namespace(repo_id="me/mine", path_in_repo="0.tar", repo_type="dataset", revision="main")
        monkeypatch.setattr(huggingface_hub.HfFileSystem, "resolve_path", lambda self, path: place)
        monkeypatch.setattr(huggingface_hub.HfFileSystem, "url", lambda self, path: f"{address}/0.tar")
        monkeypatch.setattr(huggingface_hub, "hf_hub_url", lambda **_: f"{address}/0.tar")
        assert keys_of("hf://datasets/me/mine/0.tar") == keys_of(shards[0])
        assert asked == [token and f"Bearer {token}"]

    def fails(*_):
        raise RuntimeError("no network")

    monkeypatch.setattr(huggingface_hub.HfFileSystem, "resolve_path", fails)
    monkeypatch.setattr(huggingface_hub.HfFileSystem, "url", fails)
    assert causes("hf://datasets/me/mine/0.tar") == ["unreadable shard"]


@pytest.mark.parametrize("kind", ["gz", "bz2", "xz"])
def test_compressed_shards(tmp_path, shards, kind):
    path = tmp_path / f"0.tar.{kind}"
    opener = {"gz": gzip.open, "bz2": bz2.open, "xz": lzma.open}[kind]
    with opener(path, "wb") as file:
        file.write(Path(shards[0]).read_bytes())
    assert keys_of(str(path)) == keys_of(f"pipe:cat {path}") == keys_of(shards[0])
    assert count_samples([str(path)]) == 8
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    assert causes(path)[-1] in ("truncated shard", "unreadable shard") and len(causes(path)) == 1
    assert count_samples([str(path)]) < 8


def test_lists_and_counts(tmp_path, monkeypatch, shards):
    folder = str(Path(shards[0]).parent)
    assert expand_shards(folder + "/{0..7}.tar") == shards
    assert expand_shards("a{0..1}.tar::pipe:cat b{2,3}.tar") == [
        "a0.tar",
        "a1.tar",
        "pipe:cat b2.tar",
        "pipe:cat b3.tar",
    ]
    assert expand_shards("{a,b{0..1}}.tar::c{{x,y}1,z}.tar") == ["a.tar", "b0.tar", "b1.tar", "cx1.tar", "cy1.tar", "cz.tar"]  # fmt: skip  # noqa: E501
    assert count_samples(shards) == 64
    assert count_samples([*shards, "pipe:cat x"]) is None
    monkeypatch.setenv("WDS_DATA", "${WHERE}/{0..1}.tar")
    monkeypatch.setenv("WDS_WHERE", folder)
    assert expand_shards("${DATA}::file:" + shards[2]) == shards[:3]
    monkeypatch.delenv("WDS_WHERE")
    with pytest.raises(ValueError, match="the environment variable WDS_WHERE is not set"):
        expand_shards("${DATA}")
    monkeypatch.setenv("GOPEN_REWRITE", f"gs://bucket=/{folder[1:]}")
    assert open_shards("gs://bucket/{0..1}.tar") == shards[:2]  # local ones


def test_a_list_in_a_file(tmp_path, shards):
    folder = Path(shards[0]).parent
    for name in ("shards.txt", "shards.list"):
        path = tmp_path / name
        path.write_text(f"# two and two\n{folder}/{{0..1}}.tar\n\n  {shards[2]}::{shards[3]} \n")
        assert open_shards(str(path)) == shards[:4]
        assert open_shards(f"{shards[7]}::{path}") == [shards[7], *shards[:4]]
    (tmp_path / "empty.txt").write_text("# nothing\n")
    for spec, named in (
        (tmp_path / "empty.txt", "no shards in it"),
        (tmp_path / "none.txt", "No such file"),
        ("az://account/0.tar", "does not exist .1 of 1.; no URL of az: can be read"),
        (f"{folder}/{{6..9}}.tar", "8.tar does not exist .2 of 4."),
    ):
        with pytest.raises(ValueError, match=named):
            open_shards(str(spec))


def test_members_in_folders_and_directories(tmp_path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        folder = tarfile.TarInfo("x")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        add_member(tar, "x/1.png", encoded(picture()))
        add_member(tar, "x/1.txt", b"one")
        add_member(tar, "y/1.png", encoded(picture()))
        add_member(tar, "y/1.txt", b"the same stem in another folder")
    assert [members["txt"] for _, members in read_shard(str(path))] == [b"one", b"the same stem in another folder"]


# ---------------------------------------------------------------------------------------------------------------------
# Pixels
# ---------------------------------------------------------------------------------------------------------------------


def corners(width: int, height: int) -> Image.Image:
    """Brightness rises from left to right."""
    return Image.fromarray(
        np.broadcast_to(np.linspace(0, 255, width)[None, :, None], (height, width, 3)).astype(np.uint8)
    )


def read(image: Image.Image, visit="v", **changes):
    return reader(**changes)({"png": encoded(image), "txt": b"x"}, visit)


def test_size_ids_are_height_before_width():
    sample = read(corners(64, 32))
    assert sample.pixels.shape == (3, 16, 16) and sample.pixels.dtype == torch.uint8
    assert sample.size_ids == (32, 64, 0, 8, 16, 16)  # resized to 32 x 16, cropped at its centre


def test_crop_offset_is_the_crop_that_was_taken():
    image = corners(64, 32)
    wide = np.asarray(image.resize((32, 16), Image.Resampling.BILINEAR))
    tops = set()
    for visit in range(20):
        sample = read(image, visit=str(visit), center_crop=False)
        _, _, top, left, _, _ = sample.size_ids
        assert np.array_equal(sample.pixels.permute(1, 2, 0).numpy(), wide[top : top + 16, left : left + 16])
        tops.add(left)
    assert len(tops) > 5
    same = [read(image, visit="7", center_crop=False).size_ids for _ in range(2)]
    assert same[0] == same[1]


def test_a_mirrored_crop_knows_where_it_was_taken():
    image = corners(64, 32)
    mirrored = np.asarray(image.resize((32, 16), Image.Resampling.BILINEAR))[:, ::-1]
    flips = 0
    for visit in range(40):
        sample = read(image, visit=str(visit), center_crop=False, random_flip=True)
        pixels, left = sample.pixels.permute(1, 2, 0).numpy(), sample.size_ids[3]
        if pixels[0, 0, 0] > pixels[0, -1, 0]:
            flips += 1
            assert np.array_equal(pixels, mirrored[:, left : left + 16])
    assert 10 <= flips <= 30


def test_orientation_is_honoured():
    image, exif = corners(64, 32), Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    file = io.BytesIO()
    image.save(file, "png", exif=exif)
    sample = reader()({"png": file.getvalue(), "txt": b"x"}, "v")
    assert sample.size_ids[:2] == (64, 32)
    column = sample.pixels[0, :, 8].float()
    assert column[-1] > column[0]  # what was left is now up


@pytest.mark.parametrize("kind", ["bilinear", "bicubic", "box", "nearest", "nearest_exact", "hamming", "lanczos"])
def test_interpolation(kind):
    assert read(corners(64, 32), interpolation_type=kind).pixels.shape == (3, 16, 16)


def test_epoch_length(tmp_path):
    import train_lcm_distill_sd as script

    base = ["--pretrained_teacher_model", "x", "--train_shards_path_or_url", toy_shards(tmp_path, 2, 5)]
    assert script.parse_args(base).num_samples == 10
    assert script.parse_args([*base, "--max_train_samples", "7"]).num_samples == 7
    with pytest.raises(SystemExit):
        script.parse_args(["--pretrained_teacher_model", "x", "--train_shards_path_or_url", "pipe:cat x"])


# ---------------------------------------------------------------------------------------------------------------------
# Faults that are easy to miss
# ---------------------------------------------------------------------------------------------------------------------


def causes(shard) -> list[str]:
    return [members for _, members in read_shard(str(shard)) if isinstance(members, str)]


def test_a_header_that_is_damaged_or_cut_off_is_counted(tmp_path):
    """tarfile itself takes both for the archive's end, and what follows would be missing without a word."""
    content = [{"txt": f"{i}".encode()} for i in range(5)]  # two blocks of 512 bytes each
    shard = write_shard(tmp_path / "a.tar", content)
    whole = shard.read_bytes()
    assert causes(shard) == []
    shard.write_bytes(whole[: 4 * 512] + b"\xff" * 512 + whole[5 * 512 :])
    assert causes(shard) == ["truncated shard"]
    for end in (4 * 512, 4 * 512 + 100):
        shard.write_bytes(whole[:end])
        assert causes(shard) == ["truncated shard"]


def test_a_key_that_comes_twice_in_a_row_is_no_mixture(tmp_path):
    first = {"png": encoded(picture()), "txt": b"first"}
    shard = write_shard(tmp_path / "a.tar", [first, {"png": b"other", "txt": b"second"}], ["same", "same"])
    assert [members for _, members in read_shard(str(shard))] == [first, "duplicate key"]


def test_a_line_of_pixels_is_an_image_bomb():
    """Its shorter side is enlarged to the resolution, and its longer one with it."""
    with pytest.raises(Exception, match="image bomb"):
        read(Image.new("RGB", (1, 60_000)), resolution=64)
    assert read(Image.new("RGB", (1, 600)), resolution=64).size_ids[:2] == (600, 1)


def test_the_original_size_survives_jpegs_fast_decoding():
    """Decoded at an eighth, 101 x 103 is a square: only EXIF says whether the picture was turned."""
    image = Image.fromarray(np.zeros((103, 101, 3), np.uint8))
    sample = reader(resolution=4)({"jpg": encoded(image, "jpeg"), "txt": b"x"}, "v")
    assert sample.size_ids[:2] == (103, 101)


class Cut(Quiet):
    """Breaks off in the middle of a chunk."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):  # noqa: N802
        data = Path(self.translate_path(self.path)).read_bytes()[:700]
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        self.wfile.write(b"10000\r\n" + data)
        self.close_connection = True


def test_a_connection_that_breaks_is_a_truncated_shard(shards):
    with served(Path(shards[0]).parent, Cut) as address:
        assert causes(f"{address}/0.tar") == ["truncated shard"]


def test_what_stops_a_run_does_not_stop_the_program_behind_a_shard(tmp_path, monkeypatch, shards):
    """A terminal sends Ctrl-C to all processes of a group, and the shard would look cut off in the last checkpoint."""
    list(read_shard(f"pipe:cut -d ' ' -f 5 /proc/$$/stat > {tmp_path}/group; cat {shards[0]}"))
    assert int((tmp_path / "group").read_text()) != os.getpgrp()
    stand_in = tmp_path / "curl"
    code = "import os, signal, sys\nos.kill(os.getpid(), signal.SIGINT)\nos.kill(os.getpid(), signal.SIGTERM)\n"
    stand_in.write_text(f"#!{sys.executable}\n{code}sys.stdout.buffer.write(open({shards[0]!r}, 'rb').read())\n")
    stand_in.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert len(keys_of("https://somewhere/0.tar")) == 8
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, []) & {signal.SIGINT, signal.SIGTERM}


def data_of(shards) -> Data:
    return Data("--shards", (Dataset("shards", shards, reader().rules),), "off", None)


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


def test_steps_of_a_run_given_in_epochs(tmp_path, monkeypatch):
    """num_train_epochs x (samples // batch), where the batch is that of an optimizer step."""
    import train_lcm_distill_sd as script

    seen = []
    monkeypatch.setattr(script, "make_schedule", lambda args, _: seen.append(args.max_train_steps))
    monkeypatch.setattr(script, "resume", lambda *_: exit("enough"))
    flags = ["--pretrained_teacher_model", tiny_pipeline(tmp_path / "teacher")]
    flags += ["--train_shards_path_or_url", toy_shards(tmp_path / "shards", 2, 5), "--output_dir", tmp_path / "out"]
    flags += ["--num_train_epochs", 7, "--train_batch_size", 2, "--gradient_accumulation_steps", 2]
    for more in ([], ["--max_train_samples", 9]):
        with pytest.raises(SystemExit, match="enough"):
            script.main(script.parse_args([str(flag) for flag in [*flags, "--report_to", "none", *more]]))
    assert seen == [7 * (10 // 4), 7 * (9 // 4)]


def test_readers_outlive_a_stop_but_not_the_training_process(shards, tmp_path):
    """A SIGTERM from elsewhere is for the training process; one from it, as it exits by an error, is for them."""
    code = (
        "import os, signal, subprocess, sys\n"
        "from multiprocessing import active_children\n"
        "from tests.test_data import batches\n"
        "source = batches(sys.argv[1:], workers=2)\n"
        "next(source)\n"
        "for reader in active_children():\n"
        "    subprocess.run(['kill', '-TERM', str(reader.pid)], check=True)\n"
        "for _ in range(40):\n"
        "    next(source)\n"
        "print(len(active_children()), 'readers')\n"
        "raise SystemExit('enough')\n"
    )
    done = subprocess.run([sys.executable, "-c", code, *shards], cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.stdout.endswith("2 readers\n") and done.returncode == 1 and "Traceback" not in done.stderr
