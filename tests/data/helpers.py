"""Readers, streams, and folders of pictures, for the tests of common/data/."""

import argparse
import gzip
import itertools
import json
import pickle
import struct
import zlib
from argparse import Namespace
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open

from common.cache import TensorStore
from common.data.buckets import Rules
from common.data.datasets import Data, open_data
from common.data.samples import BadSample, ImageReader, open_readers
from common.data.shards import read_shard
from common.data.sources import read_part
from common.data.stream import Batches, ShardStream, list_parts, plan_lanes
from common.flags import add_bucket_flags, add_shared_flags, bucket_rules, parse_with_config
from tests.helpers import encoded, write_shard

# ---------------------------------------------------------------------------------------------------------------------
# Pictures
# ---------------------------------------------------------------------------------------------------------------------


def picture(mode: str = "RGB", size=(20, 16), value=None) -> Image.Image:
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3)).astype(np.uint8))
    return image.convert(mode) if value is None else Image.new(mode, size, value)


def quadrants(height: int, width: int) -> Image.Image:
    """Red above green on the left, blue above white on the right."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[: height // 2, : width // 2] = (255, 0, 0)
    pixels[height // 2 :, : width // 2] = (0, 255, 0)
    pixels[: height // 2, width // 2 :] = (0, 0, 255)
    pixels[height // 2 :, width // 2 :] = (255, 255, 255)
    return Image.fromarray(pixels)


def many(folder: Path, sizes: dict[tuple[int, int], int], kind="png") -> Path:
    folder.mkdir(parents=True)
    for (height, width), count in sizes.items():
        for i in range(count):
            name = f"{height}_{width}_{i:03d}"
            Image.new("RGB", (width, height), (i % 256, 0, 0)).save(folder / f"{name}.{kind}")
            (folder / f"{name}.txt").write_text(name)
    return folder


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


# ---------------------------------------------------------------------------------------------------------------------
# Shards and streams
# ---------------------------------------------------------------------------------------------------------------------


def keys_of(shard: str) -> list[str]:
    """Keys of a shard without a fault."""
    samples = list(read_shard(shard))
    assert not any(isinstance(members, str) for _, members in samples)
    return [key for key, _ in samples]


def causes(shard) -> list[str]:
    return [members for _, members in read_shard(str(shard)) if isinstance(members, str)]


def reader(resolution=16, interpolation_type="bilinear", center_crop=True, random_flip=False, seed=0) -> ImageReader:
    rules = Rules(resolution, alignment=min(8, resolution), crop_style="center" if center_crop else "random")
    return ImageReader(rules, interpolation_type, random_flip, seed)


def numbered(shards) -> list[tuple[int, str, float]]:
    """As the shards of a single dataset."""
    return [(0, shard, 1.0) for shard in shards]


def batches(shards, *, state=None, workers=0, batch_size=4, process=0, processes=1, seed=0, lanes=None, buffer=8):
    planned, workers = plan_lanes(len(shards), processes, workers)
    stream = ShardStream(
        numbered(shards), [reader()], seed=seed, batch_size=batch_size, process=process, processes=processes,
        lanes=lanes or planned, shuffle_buffer=buffer, state=state,
    )  # fmt: skip
    return Batches(stream, workers)


def captions(source: Batches, count: int) -> list[str]:
    return [sample.caption for _ in range(count) for sample in next(source)]


# ---------------------------------------------------------------------------------------------------------------------
# Datasets of a command line
# ---------------------------------------------------------------------------------------------------------------------


class Accelerator:
    """One process on the CPU; `said` is what it printed."""

    device = torch.device("cpu")
    is_main_process, num_processes, process_index = True, 1, 0
    wait_for_everyone = staticmethod(lambda: None)

    def __init__(self):
        self.said = []
        self.print = self.said.append


@dataclass
class Opened:
    """What a script has after parsing."""

    args: Namespace
    data: Data
    notes: list[str]


def parse(*words) -> Opened:
    """As the SDXL script does."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--pretrained_teacher_model", default="x")
    parser.add_argument("--resolution", type=float, default=1024)
    add_shared_flags(parser)
    add_bucket_flags(parser)
    parser.add_argument("--use_fix_crop_and_size", action="store_true")
    parser.set_defaults(max_train_steps=1, dataloader_num_workers=0)
    args, notes = parse_with_config(parser, [str(word) for word in words], family="sdxl", method="lcm")
    rules, size_notes = bucket_rules(parser, args)
    data, data_notes = open_data(parser, args, rules)
    return Opened(args, data, notes + size_notes + data_notes)


def backend(tmp_path, *entries) -> Path:
    path = tmp_path / "multidatabackend.json"
    path.write_text(json.dumps(list(entries)))
    return path


def entry(folder, **changes) -> dict:
    base = {"id": "images", "type": "local", "instance_data_dir": str(folder), "resolution": 0.04}
    return base | {"resolution_type": "area", "crop": False} | changes


def samples_of(run: Opened, visit: str = "v", readers=None) -> dict:
    """All good samples by the file's name, and what was wrong with the others; `readers` are those of images."""
    found, faults = {}, Counter()
    for dataset, reader in zip(run.data.datasets, readers or open_readers(run.args, run.data), strict=True):
        for key, members in itertools.chain.from_iterable(map(read_part, dataset.parts)):
            name = (key or "").rpartition("/")[2]
            try:
                if isinstance(members, str):
                    raise BadSample(members)
                found[name] = reader(members, f"{visit} {key}", name)
            except BadSample as cause:
                faults[str(cause)] += 1
    return found | {"faults": faults}


def read_one(tmp_path, folder, name="wide_one", **changes):
    return samples_of(parse("--data_backend_config", backend(tmp_path, entry(folder, **changes))))[name]


TOY_SIZED = ["--resolution", "64", "--resolution_type", "pixel_area"]
TOY_SIZED += ["--crop_aspect", "preserve", "--bucket_alignment", "16"]


def toy_sized(folder, *more):
    """Images of a folder in buckets of the toy's sizes."""
    return parse("--train_data_dir", folder, *TOY_SIZED, *more)


class Table(list):
    """What of a dataset of the package `datasets` is in use."""

    _fingerprint, column_names = "abc", ["image", "text"]

    def cast_column(self, *_):
        return self


def table_module(rows: list[dict]) -> ModuleType:
    """Stands in for the package `datasets`; `asked` has what it was called with."""
    module = ModuleType("datasets")
    module.asked, module.Image = [], lambda decode: None
    module.load_dataset = lambda *names, **options: module.asked.append((names, options)) or Table(rows)
    return module


def open_stream(run, batch_size, state=None, workers=0, process=0, processes=1, lanes=None, buffer=16) -> Batches:
    parts = list_parts(run.data.datasets)
    planned, workers = plan_lanes(len(parts), processes, workers, lanes)
    stream = ShardStream(
        parts, open_readers(run.args, run.data), seed=0, batch_size=batch_size, process=process, processes=processes,
        lanes=planned, shuffle_buffer=buffer, state=state,
    )  # fmt: skip
    return Batches(stream, workers)


def batches_of(run, batch_size: int, count: int, **options):
    source = open_stream(run, batch_size, **options)
    return [next(source) for _ in range(count)]


def told(batch):
    return [(sample.position, sample.caption, sample.size_ids) for sample in batch]


# ---------------------------------------------------------------------------------------------------------------------
# Caches
# ---------------------------------------------------------------------------------------------------------------------


def records(folder: Path) -> int:
    return sum(len(TensorStore(path).index) for path in folder.iterdir() if path.is_dir())


def records_of_file(path: Path) -> int:
    with safe_open(path, "pt") as file:
        return len(file.keys())
