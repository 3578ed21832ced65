"""Sizes, dataset files, folders and tables, and batches of one size each."""

import argparse
import io
import itertools
import json
import random
import sys
import time
from argparse import Namespace
from collections import Counter
from dataclasses import FrozenInstanceError, dataclass, replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

from common.data.buckets import Rules, place, target_size
from common.data.datasets import Data, count_epoch, open_data, plan_buckets
from common.data.samples import BadSample, open_readers
from common.data.sources import part_fingerprint, read_part
from common.data.stream import PATIENCE, Batches, ShardStream, open_batches, plan_lanes
from common.flags import add_bucket_flags, add_shared_flags, check_bucket_flags, parse_with_config
from tests.helpers import encoded, write_shard

# ---------------------------------------------------------------------------------------------------------------------
# Geometry
# ---------------------------------------------------------------------------------------------------------------------

SDXL = {"resolution": 1.0, "resolution_type": "area", "crop": False}
TOY = {"resolution": 64, "resolution_type": "pixel_area", "crop_aspect": "preserve", "alignment": 16}


@pytest.mark.parametrize(
    ("size", "settings", "bucket"),  # (height, width)
    [
        ((600, 800), {"resolution": 512}, (512, 512)),  # cropped to a square unless told otherwise
        ((3000, 2000), {**SDXL, "crop": True}, (1024, 1024)),
        ((1024, 1024), SDXL, (1024, 1024)),
        ((1080, 1920), SDXL, (768, 1344)),  # SDXL's own for 16:9: sqrt(1e6 * 16/9) = 1333, 750
        ((1920, 1080), SDXL, (1344, 768)),
        ((1000, 1500), SDXL, (832, 1216)),  # 1225, 816
        ((500, 1000), {"resolution": 512, "crop": False}, (512, 1024)),  # pixel: of the shorter side
        ((1000, 500), {"resolution": 512, "crop": False}, (1024, 512)),
        ((500, 1000), {"resolution": 512, "resolution_type": "pixel_area", "crop": False}, (384, 704)),  # 362, 724
        ((64, 64), TOY, (64, 64)),
        ((48, 80), TOY, (48, 80)),
        ((80, 48), TOY, (80, 48)),
        # No longer than 8 to 1.
        ((1, 5000), {"resolution": 512, "resolution_type": "pixel_area", "crop": False}, (192, 1472)),
        ((5000, 1), {"resolution": 512, "resolution_type": "pixel_area", "crop": False}, (1472, 192)),
    ],
)  # fmt: skip
def test_buckets_worked_out_by_hand(size, settings, bucket):
    assert target_size(*size, Rules(**settings)) == bucket


def test_decimals_name_the_bucket():
    """At one decimal 1.34 and 1.26 are one ratio, at two they are two."""
    rules = {"resolution": 1024, "resolution_type": "pixel_area", "crop": False, "alignment": 8}
    sizes = [(1000, 1340), (1000, 1260)]
    for decimals, buckets in ((1, 1), (2, 2)):
        assert len({target_size(*size, Rules(**rules, decimals=decimals)) for size in sizes}) == buckets


@pytest.mark.parametrize("alignment", [8, 16, 64])
def test_a_bucket_is_near_the_image_and_the_resolution(alignment):
    rng = random.Random(0)
    for _ in range(500):
        height, width = rng.randint(700, 2800), rng.randint(700, 2800)
        for kind, resolution in (("area", 1.0), ("pixel_area", 1000), ("pixel", 1000)):
            rules = Rules(resolution, kind, alignment, crop=False)
            rows, columns = target_size(height, width, rules)
            assert rows % alignment == columns % alignment == 0
            slack = alignment / 2 / min(rows, columns)  # each side is off by half an alignment at most
            assert abs(np.log(columns / rows * height / width)) < 2.2 * slack + 0.02  # two decimals of the ratio
            if kind == "pixel":
                assert abs(min(rows, columns) - 1000) <= alignment / 2
            else:
                assert abs(np.log(rows * columns / 1e6)) < 2.2 * slack + 1e-9


def test_the_resize_covers_and_the_crop_is_inside():
    rng = random.Random(1)
    for _ in range(500):
        height, width = rng.randint(20, 3000), rng.randint(20, 3000)
        style, crop = rng.choice(["center", "random", "corner"]), rng.random() < 0.5
        limits = {"maximum": ("area", 5e5), "downsample": ("area", 4e5)} if rng.random() < 0.5 else {}
        rules = Rules(0.25, "area", 64, crop=crop, crop_aspect="preserve", crop_style=style, **limits)
        target = target_size(height, width, rules)
        placed = place(height, width, target, rules, rng)
        for resized, offset, side in zip(placed.resized, (placed.top, placed.left), target, strict=True):
            assert 0 <= offset <= resized - side
        assert abs(placed.resized[0] / height - placed.resized[1] / width) * min(height, width) <= 1.01  # no distortion
        if not crop or not limits:
            assert placed.resized[0] == target[0] or placed.resized[1] == target[1]  # no larger than it must be


def test_a_large_image_is_shrunk_first_and_then_cropped():
    """Above two megapixels to one, of which a quarter is taken; one that is not larger only covers the target."""
    limits = {"maximum": ("area", 2e6), "downsample": ("area", 1e6)}
    rules = Rules(512, alignment=64, crop_style="center", **limits)
    placed = place(2000, 2000, (512, 512), rules, random.Random(0))
    assert (placed.resized, placed.top, placed.left) == ((1000, 1000), 244, 244)
    assert place(1400, 1400, (512, 512), rules, random.Random(0)).resized == (512, 512)
    small = Rules(512, maximum=("area", 2e6), downsample=("area", 1e5))  # less than covers: it must still cover
    assert place(2000, 2000, (512, 512), small, random.Random(0)).resized == (512, 512)


# ---------------------------------------------------------------------------------------------------------------------
# Settings
# ---------------------------------------------------------------------------------------------------------------------


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
    parser.set_defaults(max_train_steps=1)
    args = parse_with_config(parser, [str(word) for word in words], family="sdxl", method="lcm")
    args.notes = []
    rules = check_bucket_flags(parser, args)
    notes, given = args.notes, dict(vars(args))
    data, more = open_data(parser, args, rules)
    assert vars(args) == given  # nothing is written there
    return Opened(args, data, notes + more)


@pytest.fixture()
def refused(capsys):
    def message(*words) -> str:
        with pytest.raises(SystemExit) as stop:
            parse(*words)
        assert stop.value.code == 2
        return capsys.readouterr().err.splitlines()[-1]

    return message


def quadrants(height: int, width: int) -> Image.Image:
    """Red above green on the left, blue above white on the right."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[: height // 2, : width // 2] = (255, 0, 0)
    pixels[height // 2 :, : width // 2] = (0, 255, 0)
    pixels[: height // 2, width // 2 :] = (0, 0, 255)
    pixels[height // 2 :, width // 2 :] = (255, 255, 255)
    return Image.fromarray(pixels)


@pytest.fixture()
def folder(tmp_path):
    """Images (height, width) of several sizes, two of them in a subfolder."""
    root = tmp_path / "images"
    (root / "sub").mkdir(parents=True)
    for name, size in {"wide_one": (300, 600), "tall_one": (600, 300), "sub/square_one": (400, 400), "sub/tiny_one": (60, 60)}.items():  # fmt: skip  # noqa: E501
        quadrants(*size).save(root / f"{name}.png")
        (root / f"{name}.txt").write_text(f"first of {name}\n\n  second of {name}\n")
    (root / "notes.md").write_text("not an image")
    return root


def backend(tmp_path, *entries) -> Path:
    path = tmp_path / "multidatabackend.json"
    path.write_text(json.dumps(list(entries)))
    return path


def entry(folder, **changes) -> dict:
    base = {"id": "images", "type": "local", "instance_data_dir": str(folder), "resolution": 0.04}
    return base | {"resolution_type": "area", "crop": False} | changes


def samples_of(run: Opened, visit: str = "v") -> dict:
    """All good samples by the file's name, and what was wrong with the others."""
    found, faults = {}, Counter()
    for dataset, reader in zip(run.data.datasets, open_readers(run.args, run.data), strict=True):
        for key, members in itertools.chain.from_iterable(map(read_part, dataset.parts)):
            name = key.rpartition("/")[2]
            try:
                found[name] = reader(members, f"{visit} {key}", name)
            except BadSample as cause:
                faults[str(cause)] += 1
    return found | {"faults": faults}


def read_one(tmp_path, folder, name="wide_one", **changes):
    return samples_of(parse("--data_backend_config", backend(tmp_path, entry(folder, **changes))))[name]


def test_a_folder_is_walked_and_each_image_goes_to_its_bucket(tmp_path, folder):
    found = samples_of(parse("--data_backend_config", backend(tmp_path, entry(folder))))
    sizes = {name: sample.bucket for name, sample in found.items() if name != "faults"}
    # 0.04 megapixels: 200 x 200, and 141 x 283 for a ratio of two
    assert sizes == {"wide_one": (128, 256), "tall_one": (256, 128), "square_one": (192, 192), "tiny_one": (192, 192)}
    for name, sample in found.items():
        if name != "faults":
            assert sample.pixels.shape == (3, *sample.bucket)


def test_size_ids_are_the_original_the_crop_and_the_target(tmp_path, folder):
    """300 x 600 covers a square of 192 as 192 x 384: its centre is half red above green, half blue above white."""
    square = {"crop": True, "crop_aspect": "square", "crop_style": "center"}
    sample = read_one(tmp_path, folder, **square)
    assert sample.size_ids == (300, 600, 0, 96, 192, 192)
    corners = [sample.pixels[:, y, x].tolist() for y in (2, -3) for x in (2, -3)]
    assert corners == [[255, 0, 0], [0, 0, 255], [0, 255, 0], [255, 255, 255]]
    left = read_one(tmp_path, folder, **square | {"crop_style": "corner"})
    assert left.size_ids == (300, 600, 0, 0, 192, 192)
    assert left.pixels[2, :96, :-1].max() == 0  # nothing blue: the right half is cut off
    tall = read_one(tmp_path, folder, "tall_one", **square)
    assert tall.size_ids == (600, 300, 96, 0, 192, 192)


def test_a_random_crop_knows_where_it_was_taken(tmp_path, folder):
    path = backend(tmp_path, entry(folder, crop=True, crop_aspect="square", crop_style="random"))
    run, lefts = parse("--data_backend_config", path), set()
    for visit in range(12):
        sample = samples_of(run, str(visit))["wide_one"]
        top, left = sample.size_ids[2:4]
        assert top == 0 and 0 <= left <= 192
        red = (sample.pixels[0, 5] > 128).sum().item()  # columns of the left half
        assert abs(red - max(0, 192 - left)) <= 1
        lefts.add(left)
    assert len(lefts) > 6


def test_crop_false_keeps_all_but_what_the_cover_leaves_over(tmp_path, folder):
    sample = read_one(tmp_path, folder, crop=False, crop_aspect="square", crop_style="center")
    assert sample.size_ids == (300, 600, 0, 0, 128, 256)
    kept = read_one(tmp_path, folder, crop=True, crop_aspect="preserve")
    assert kept.bucket == (128, 256)


def test_sizes_below_the_minimum_are_skipped_and_counted(tmp_path, folder):
    for minimum, kind, kept in (
        (0.1, "area", {"wide_one", "tall_one", "square_one"}),
        (0.17, "area", {"wide_one", "tall_one"}),
        (350, "pixel", {"square_one"}),
        (0.17, "pixel", {"wide_one", "tall_one"}),  # 10 or less: megapixels
        (410, "pixel_area", {"wide_one", "tall_one"}),  # 410 x 410 = 0.168 megapixels
    ):
        resolution = 0.04 if kind == "area" else 200
        changes = {"minimum_image_size": minimum, "resolution_type": kind, "resolution": resolution}
        run = parse("--data_backend_config", backend(tmp_path, entry(folder, **changes)))
        found = samples_of(run)
        assert set(found) - {"faults"} == kept
        assert found["faults"] == {"below minimum_image_size": 4 - len(kept)}
        assert any("megapixels" in note for note in run.notes) == (minimum == 0.17 and kind == "pixel")


def test_the_largest_are_shrunk_before_the_crop(tmp_path, folder):
    changes = {"crop": True, "crop_aspect": "square", "crop_style": "center", "maximum_image_size": 0.1}
    sample = read_one(tmp_path, folder, **changes, target_downsample_size=0.09)
    assert sample.size_ids == (300, 600, 10, 116, 192, 192)  # 0.18 to 0.09 megapixels: 212 x 424
    sample = read_one(tmp_path, folder, **changes | {"maximum_image_size": 0.2}, target_downsample_size=0.09)
    assert sample.size_ids == (300, 600, 0, 96, 192, 192)


def test_captions_of_text_files_and_of_names(tmp_path, folder):
    run = parse("--data_backend_config", backend(tmp_path, entry(folder, caption_strategy="textfile")))
    drawn = Counter(samples_of(run, str(visit))["wide_one"].caption for visit in range(60))
    assert set(drawn) == {"first of wide_one", "second of wide_one"} and min(drawn.values()) > 15
    assert samples_of(run, "7")["tall_one"].caption == samples_of(run, "7")["tall_one"].caption
    named = parse("--data_backend_config", backend(tmp_path, entry(folder, caption_strategy="filename")))
    assert samples_of(named)["wide_one"].caption == "wide one"
    (folder / "wide_one.txt").unlink()
    assert samples_of(run)["faults"] == {"missing caption": 1}
    assert samples_of(named)["wide_one"].caption == "wide one"


def test_entries_are_mixed_by_their_repeats(tmp_path, folder):
    shard = write_shard(tmp_path / "s.tar", [{"png": encoded(quadrants(64, 64)), "txt": b"one of a shard"}])
    entries = [
        entry(folder, repeats=2),
        entry(tmp_path / "none", id="off", disabled=True),
        {"id": "tar", "type": "webdataset", "instance_data_dir": str(shard), "resolution": 128},
    ]  # fmt: skip
    run = parse("--data_backend_config", backend(tmp_path, *entries))  # the second is in the flags' unit, pixels
    assert [dataset.id for dataset in run.data.datasets] == ["images", "tar"]
    assert count_epoch(run.data.datasets) == 4 * 3 + 1
    epoch = batches_of(run, batch_size=1, count=13)
    seen = Counter(sample.caption.split(" of ")[1] for (sample,) in epoch)
    assert seen == {"wide_one": 3, "tall_one": 3, "sub/square_one": 3, "sub/tiny_one": 3, "a shard": 1}
    (of_shard,) = [sample for (sample,) in epoch if sample.caption == "one of a shard"]
    assert of_shard.bucket == (128, 128) and of_shard.dataset == 1  # its own resolution and reader


def test_an_entry_wins_over_the_command_line(tmp_path, folder):
    line = ["--resolution", 512, "--minimum_image_size", 100, "--crop_style", "corner", "--cache_dir_vae", "above"]
    plain = {"id": "a", "type": "local", "instance_data_dir": str(folder)}
    own = entry(
        folder, id="b", minimum_image_size=0.5, crop_style="center", cache_dir_vae="own", aspect_bucket_rounding=1
    )
    run = parse("--data_backend_config", backend(tmp_path, plain, own), *line)
    inherits, wins = (dataset.rules for dataset in run.data.datasets)
    assert (inherits.resolution, inherits.crop_style, inherits.minimum) == (512, "corner", ("side", 100))
    assert (wins.resolution, wins.crop_style, wins.minimum, wins.decimals) == (0.04, "center", ("area", 5e5), 1)
    assert [dataset.cache_dir_vae for dataset in run.data.datasets] == [None, "own"]


def test_the_documents_settings_of_both_files_together(tmp_path, folder):
    """Top level has a maximum and no target_downsample_size, in pixels; the dataset has both, in megapixels."""
    config = {"resolution": 1024, "resolution_type": "pixel", "aspect_bucket_rounding": 64}
    config |= {"minimum_image_size": 0.5, "maximum_image_size": 1.0}
    own = entry(folder, maximum_image_size=1.0, target_downsample_size=1.0, minimum_image_size=0.01)
    config["data_backend_config"] = str(backend(tmp_path, own))
    (tmp_path / "config.json").write_text(json.dumps(config))
    run = parse("--config", tmp_path / "config.json")
    assert run.data.datasets[0].rules.downsample == ("area", 1e6) and run.data.datasets[0].rules.alignment == 64
    assert any("aspect_bucket_rounding 64" in note for note in run.notes)


def test_a_maximum_alone_is_what_larger_images_are_shrunk_to(tmp_path, folder):
    """As the quickstart's config has it, with shards, a folder or a dataset that says nothing of sizes."""
    shard = write_shard(tmp_path / "s.tar", [{"png": encoded(quadrants(64, 64)), "txt": b"x"}])
    plain = {"id": "a", "type": "local", "instance_data_dir": str(folder)}
    flags = ["--resolution", 192, "--maximum_image_size", 0.1, "--center_crop"]
    for words in (
        ["--train_shards_path_or_url", shard, *flags],
        ["--train_data_dir", folder, *flags],
        ["--data_backend_config", backend(tmp_path, plain), *flags],
        ["--data_backend_config", backend(tmp_path, entry(folder, maximum_image_size=0.1))],
    ):
        run = parse(*words)
        assert run.data.datasets[0].rules.downsample == run.data.datasets[0].rules.maximum == ("area", 1e5)
        assert sum("maximum_image_size: is also the target_downsample_size" in note for note in run.notes) == 1
    found = samples_of(parse("--train_data_dir", folder, *flags))
    assert found["wide_one"].size_ids == (300, 600, 16, 127, 192, 192)  # 0.18 to 0.1 megapixels: 224 x 447


def test_samples_of_an_epoch_and_what_is_cached(folder, refused):
    few = parse("--train_data_dir", folder, "--max_train_samples", 3).data
    assert (few.samples, few.caches, few.source) == (3, "fill", "--train_data_dir")
    assert parse("--train_data_dir", folder).data.samples == 4
    assert parse("--train_data_dir", folder, "--vae_cache_disable").data.caches == "off"
    remote = parse("--train_shards_path_or_url", "pipe:false")
    assert (remote.data.samples, remote.data.caches) == (None, "off") and "nothing is cached" in remote.notes[0]
    assert parse("--train_shards_path_or_url", "pipe:false", "--vae_cache_ondemand").data.caches == "ondemand"
    with pytest.raises(FrozenInstanceError):
        few.samples = 4
    with pytest.raises(FrozenInstanceError):
        few.datasets[0].num_frames = 5


def test_text_embeds_say_where_and_how_texts_are_kept(tmp_path, folder):
    texts = {"id": "t", "type": "local", "dataset_type": "text_embeds", "cache_dir": "texts", "write_batch_size": 3}
    run = parse("--data_backend_config", backend(tmp_path, entry(folder), texts | {"default": True}))
    assert (run.data.cache_dir_text, run.data.write_batch_size) == ("texts", 3)
    other = texts | {"id": "u", "cache_dir": "others"}
    for first, second in ((False, True), (True, False)):
        both = [texts | {"default": first}, other | {"default": second}]
        run = parse("--data_backend_config", backend(tmp_path, entry(folder), *both))
        assert run.data.cache_dir_text == ("texts" if first else "others")
    run = parse("--data_backend_config", backend(tmp_path, entry(folder), texts | {"disabled": True}))
    assert run.data.cache_dir_text is None


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"resolutoin": 1}, "unknown key 'resolutoin', did you mean 'resolution'?"),
        ({"crop": "False"}, "crop is 'False', and must be of type bool"),
        ({"repeats": 1.5}, "repeats is 1.5, and must be of type int"),
        ({"repeats": -1}, "repeats is -1, and must be at least 0"),
        ({"resolution": True}, "resolution is True, and must be of type float"),
        ({"resolution": 0}, "resolution 0: must be positive"),
        ({"resolution": 1024}, "resolution 1024 with resolution_type area is in megapixels"),
        ({"resolution": 1.0, "resolution_type": "pixel"}, "resolution 1 with resolution_type pixel is in pixels"),
        ({"crop_style": "middle"}, "crop_style is 'middle', and must be one of center, random, corner"),
        ({"crop_aspect": "closest"}, "crop_aspect is 'closest'"),
        ({"metadata_backend": "parquet"}, "metadata_backend is 'parquet', and must be one of discovery"),
        ({"skip_file_discovery": "vae,all"}, "skip_file_discovery has 'all'"),
        ({"caption_strategy": "instanceprompt"}, "caption_strategy is 'instanceprompt'"),
        ({"type": "aws"}, "type is 'aws', and must be one of local, webdataset"),
        ({"dataset_type": "video"}, "dataset_type is 'video'"),
        ({"minimum_image_size": -1}, "minimum_image_size -1: must not be negative"),
        ({"target_downsample_size": 1.0}, "target_downsample_size: needs maximum_image_size"),
        ({"aspect_bucket_rounding": 0}, "aspect_bucket_rounding 0: must be at least 1"),
        ({"instance_data_dir": "/no/such"}, "/no/such: no such folder"),
        ({"instance_data_dir": None}, "has no instance_data_dir"),
        ({"num_frames": 81}, "has num_frames, and images have no frames"),
        ({"disabled": True}, "no dataset in it that is enabled"),
    ],
)
def test_a_bad_entry_is_one_sentence(tmp_path, folder, refused, changes, named):
    message = refused("--data_backend_config", backend(tmp_path, entry(folder, **changes)))
    assert named in message and "multidatabackend.json" in message


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("--target_downsample_size 512", "--target_downsample_size: needs maximum_image_size"),
        ("--minimum_image_size -1", "--minimum_image_size -1.0: must not be negative"),
        ("--aspect_bucket_rounding 0", "--aspect_bucket_rounding 0: must be at least 1"),
        ("--bucket_alignment 0", "--bucket_alignment 0: must be at least 1"),
        ("--dataset_config_name x", "--dataset_config_name x: needs --dataset_name"),
        ("--resolution_type area", "resolution 1024 with resolution_type area is in megapixels"),
        ("--dataset_name nobody/nothing", "--train_data_dir and --dataset_name: one or the other"),
    ],
)
def test_flags_that_cannot_be(folder, refused, words, named):
    assert named in refused("--train_data_dir", folder, *words.split())


def test_the_usual_place_of_a_dataset_file(tmp_path, folder):
    backend(tmp_path, entry(folder))
    run = parse("--output_dir", tmp_path)
    assert [dataset.id for dataset in run.data.datasets] == ["images"] and "multidatabackend.json" in run.notes[0]
    assert parse("--output_dir", tmp_path, "--train_data_dir", folder).notes == []


def test_no_source_and_two_entries_of_one_name(tmp_path, folder, refused):
    assert "--train_shards_path_or_url: needed with --pretrained_teacher_model" in refused()
    assert "two datasets have the id 'images'" in refused(
        "--data_backend_config", backend(tmp_path, entry(folder), entry(folder))
    )
    assert "is not JSON" in refused("--data_backend_config", folder / "notes.md")


def test_what_the_network_is_told_may_be_fixed(folder):
    run = parse("--train_data_dir", folder, "--resolution", 128, "--center_crop", "--use_fix_crop_and_size")
    assert samples_of(run)["wide_one"].size_ids == (128, 128, 0, 0, 128, 128)
    run = parse("--train_data_dir", folder, "--resolution", 128, "--center_crop")
    assert samples_of(run)["wide_one"].size_ids == (300, 600, 0, 64, 128, 128)


def test_encode_batch_size_is_the_vaes(folder):
    assert parse("--train_data_dir", folder, "--encode_batch_size", 3).args.vae_encode_batch_size == 3
    assert parse("--train_data_dir", folder).args.vae_encode_batch_size == 32


# ---------------------------------------------------------------------------------------------------------------------
# Folders and tables
# ---------------------------------------------------------------------------------------------------------------------


def test_parts_of_a_folder_follow_from_its_names(tmp_path):
    found = []
    for place_of_it in ("here", "there"):
        (tmp_path / place_of_it).mkdir()
        for i in range(150):
            (tmp_path / place_of_it / f"{i}.png").write_bytes(b"x")
        parts = parse("--train_data_dir", tmp_path / place_of_it).data.datasets[0].parts
        found.append([part.files for part in parts])
    assert found[0] == found[1] and len(found[0]) == 50  # of three each
    assert sorted(name for part in found[0] for name, _ in part) == sorted(f"{i}.png" for i in range(150))
    neighbours = sum(len({int(name[0]) for name, _ in part}) == 1 for part in found[0])  # all of one first digit
    assert neighbours < 25  # mixed: an alphabetical split would have nearly all parts so
    before = [part_fingerprint(part) for part in parts]
    assert before == [part_fingerprint(part) for part in parts] and len(set(before)) == 50
    (tmp_path / "there" / "7.txt").write_text("a caption")
    changed = [a != b for a, b in zip(before, map(part_fingerprint, parts), strict=True)]
    assert sum(changed) == 1


def test_a_file_that_is_gone_is_a_fault(folder):
    run = parse("--train_data_dir", folder)
    (folder / "wide_one.png").unlink()
    causes = [
        members for part in run.data.datasets[0].parts for _, members in read_part(part) if isinstance(members, str)
    ]
    assert causes == ["unreadable file"]


def test_metadata_of_an_imagefolder(folder, refused):
    lines = [{"file_name": "wide_one.png", "text": "one\u2028line", "more": 1}, {"file_name": "gone.png", "text": "x"}]
    (folder / "metadata.jsonl").write_text("\n".join(json.dumps(line, ensure_ascii=False) for line in lines) + "\n\n")
    (folder / "sub" / "metadata.jsonl").write_text(json.dumps({"file_name": "square_one.png", "text": ["a", "b"]}))
    run = parse("--train_data_dir", folder)
    found = samples_of(run)
    assert found.keys() == {"wide_one", "square_one", "faults"} and found["wide_one"].caption == "one\u2028line"
    assert found["square_one"].captions == ["a", "b"]
    assert "no 'caption'" in refused("--train_data_dir", folder, "--caption_column", "caption")
    (folder / "metadata.jsonl").write_text("{broken")
    assert "metadata.jsonl, line 1" in refused("--train_data_dir", folder)


def test_parquet(tmp_path, refused):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    images = [{"bytes": encoded(quadrants(64, 96)), "path": None}, {"bytes": b"broken", "path": "x.png"}]
    images += [{"bytes": None, "path": "beside.png"}, {"bytes": None, "path": "gone.png"}]
    quadrants(32, 32).save(tmp_path / "beside.png")
    table = {"picture": images, "words": [["a", "b"], ["c"], ["d"], ["e"]], "other": [1, 2, 3, 4]}
    parquet.write_table(pa.table(table), tmp_path / "train.parquet", row_group_size=2)
    columns = ["--image_column", "picture", "--caption_column", "words", "--resolution", 64]
    for flag, source in itertools.product(
        ("--train_data_dir", "--dataset_name"), (tmp_path, tmp_path / "train.parquet")
    ):
        run = parse(flag, source, *columns)
        assert len(run.data.datasets[0].parts) == 2 and count_epoch(run.data.datasets) == 4
        found = samples_of(run)
        assert found.pop("faults") == {"broken image": 1, "empty image": 1}
        assert {(tuple(s.captions), s.size_ids[:2]) for s in found.values()} == {
            (("a", "b"), (64, 96)),
            (("d",), (32, 32)),
        }
    message = refused("--train_data_dir", tmp_path)
    assert "--image_column image" in message and "picture, words, other" in message


def test_a_package_that_is_missing_is_named(tmp_path, refused, monkeypatch):
    (tmp_path / "a.parquet").write_bytes(b"x")
    for name in ("pyarrow", "pyarrow.parquet", "datasets"):
        monkeypatch.setitem(sys.modules, name, None)
    assert "pip install pyarrow" in refused("--train_data_dir", tmp_path)
    assert "nobody/nothing is no local folder; from the hub: `pip install datasets`" in refused(
        "--dataset_name", "nobody/nothing"
    )


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


def test_a_dataset_of_the_hub(refused, monkeypatch):
    rows = [{"image": {"bytes": encoded(quadrants(8, 9 + i)), "path": None}, "text": f"{i}"} for i in range(130)]
    module = table_module(rows)
    monkeypatch.setitem(sys.modules, "datasets", module)
    run = parse("--dataset_name", "me/mine", "--dataset_config_name", "small", "--resolution", 64)
    assert module.asked == [(("me/mine", "small"), {"split": "train", "cache_dir": None})]
    parts = run.data.datasets[0].parts
    found = [members for part in parts for _, members in read_part(part)]
    assert [json.loads(members["json"])["caption"] for members in found] == [f"{i}" for i in range(130)]
    assert (
        count_epoch(run.data.datasets) == 130
        and len({part_fingerprint(part) for part in run.data.datasets[0].parts}) == 44
    )

    def fails(*_, **__):
        raise ConnectionError("no route\nto host")

    module.load_dataset = fails
    assert "me/mine cannot be loaded: ConnectionError: no route" in refused("--dataset_name", "me/mine")


# ---------------------------------------------------------------------------------------------------------------------
# The table, and small buckets
# ---------------------------------------------------------------------------------------------------------------------


class Accelerator:
    is_main_process, num_processes, process_index = True, 1, 0

    def __init__(self):
        self.said = []
        self.print = self.said.append


def many(folder: Path, sizes: dict[tuple[int, int], int], kind="png") -> Path:
    folder.mkdir(parents=True)
    for (height, width), count in sizes.items():
        for i in range(count):
            name = f"{height}_{width}_{i:03d}"
            Image.new("RGB", (width, height), (i % 256, 0, 0)).save(folder / f"{name}.{kind}")
            (folder / f"{name}.txt").write_text(name)
    return folder


def toy_sized(folder, *more):
    flags = [
        "--resolution",
        64,
        "--resolution_type",
        "pixel_area",
        "--crop_aspect",
        "preserve",
        "--bucket_alignment",
        16,
    ]
    return parse("--train_data_dir", folder, *flags, *more)


SIZES = {(64, 64): 9, (48, 80): 6, (80, 48): 3, (32, 128): 1, (20, 20): 2}


def test_the_table_of_buckets(tmp_path):
    run, accelerator = (
        toy_sized(many(tmp_path / "f", SIZES), "--minimum_image_size", 24, "--train_batch_size", 4),
        Accelerator(),
    )
    data = plan_buckets(run.args, run.data, accelerator)
    rows = [line.split() for line in accelerator.said]
    assert ["64", "64", "9"] in rows and ["80", "48", "6"] in rows  # width before height
    assert ["48", "80", "3", "less", "than", "a", "batch:", "to", "64", "x", "64"] in rows
    assert ["128", "32", "1", "less", "than", "a", "batch:", "to", "80", "x", "48"] in rows
    assert any("2 images are below minimum_image_size" in line for line in accelerator.said)
    assert data.datasets[0].merged == {(80, 48): (64, 64), (32, 128): (48, 80)}
    kept = toy_sized(tmp_path / "f", "--disable_bucket_pruning", "--train_batch_size", 4)
    assert plan_buckets(kept.args, kept.data, Accelerator()).datasets[0].merged == {}


def test_the_table_looks_at_headers_alone(tmp_path):
    """Images that are cut off behind their header count; shards count as folders do; EXIF may turn an image."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (80, 48, 3)).astype(np.uint8))
    file, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6
    noise.save(file, "jpeg", exif=exif)
    pictures = [file.getvalue(), encoded(noise.transpose(Image.Transpose.ROTATE_90), "jpeg")]
    shard = write_shard(tmp_path / "a.tar", [{"jpg": data[: len(data) // 2], "txt": b"x"} for data in pictures])
    flags = [
        "--resolution",
        64,
        "--resolution_type",
        "pixel_area",
        "--crop_aspect",
        "preserve",
        "--bucket_alignment",
        16,
    ]
    run, accelerator = parse("--train_shards_path_or_url", shard, *flags), Accelerator()
    plan_buckets(run.args, run.data, accelerator)
    assert [line.split() for line in accelerator.said][2:] == [["80", "48", "2"]]


def test_no_table_where_discovery_is_skipped_or_data_are_remote(tmp_path):
    folder = many(tmp_path / "f", {(64, 64): 2})
    skipped = backend(tmp_path, entry(folder, skip_file_discovery="vae, aspect"))
    for words in (
        ["--data_backend_config", skipped],
        ["--train_shards_path_or_url", "pipe:false", "--crop_aspect", "preserve"],
    ):
        accelerator = Accelerator()
        run = parse(*words)
        plan_buckets(run.args, run.data, accelerator)
        assert accelerator.said == []
    looked_at = backend(tmp_path, entry(folder, skip_file_discovery=""))
    run = parse("--data_backend_config", looked_at)
    plan_buckets(run.args, run.data, accelerator)
    assert accelerator.said


def test_images_of_small_buckets_are_cut_for_another(tmp_path):
    run = toy_sized(many(tmp_path / "f", {(64, 64): 5, (32, 128): 1}), "--train_batch_size", 4)
    found = samples_of(replace(run, data=plan_buckets(run.args, run.data, Accelerator())))
    assert {sample.bucket for name, sample in found.items() if name != "faults"} == {(64, 64)}
    assert found["32_128_000"].size_ids[:2] == (32, 128) and found["32_128_000"].pixels.shape == (3, 64, 64)


# ---------------------------------------------------------------------------------------------------------------------
# Batches
# ---------------------------------------------------------------------------------------------------------------------


def open_stream(run, batch_size, state=None, workers=0, process=0, processes=1, lanes=None, buffer=16) -> Batches:
    parts = [(i, part) for i, dataset in enumerate(run.data.datasets) for part in dataset.parts * (dataset.repeats + 1)]
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
    flags = [
        "--resolution",
        64,
        "--resolution_type",
        "pixel_area",
        "--crop_aspect",
        "preserve",
        "--bucket_alignment",
        16,
    ]
    return parse("--train_shards_path_or_url", f"{folder}/{{0..5}}.tar", *flags)


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


@pytest.mark.parametrize("workers", [0, 2])
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
    with pytest.raises(SystemExit, match="--data_backend_config: 8 shards cannot feed 9 processes"):
        open_batches(run.args, run.data, accelerator, open_readers(run.args, run.data), None)
    accelerator.num_processes = 8
    assert open_batches(run.args, run.data, accelerator, open_readers(run.args, run.data), None).stream.lanes == 8


def test_headers_are_read_fast(tmp_path):
    run = toy_sized(many(tmp_path / "f", {(64, 64): 300}))
    started = time.process_time()
    plan_buckets(run.args, run.data, Accelerator())
    assert time.process_time() - started < 2.0
