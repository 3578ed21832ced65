"""Dataset files and the flags of data: what they mean, which of them wins, and the table of buckets."""

import io
import json
import time
from collections import Counter
from dataclasses import FrozenInstanceError

import numpy as np
import pytest
from PIL import Image

import train_lcm_distill_sd as script
from common.data.datasets import count_epoch, plan_buckets
from tests.data.helpers import (
    TOY_SIZED,
    Accelerator,
    backend,
    batches_of,
    entry,
    many,
    parse,
    quadrants,
    read_one,
    samples_of,
    toy_sized,
)
from tests.helpers import encoded, toy_shards, write_shard


def test_a_folder_is_walked_and_each_image_goes_to_its_bucket(tmp_path, folder):
    found = samples_of(parse("--data_backend_config", backend(tmp_path, entry(folder))))
    sizes = {name: sample.bucket for name, sample in found.items() if name != "faults"}
    # 0.04 megapixels: 200 x 200, and 141 x 283 for a ratio of two
    assert sizes == {"wide_one": (128, 256), "tall_one": (256, 128), "square_one": (192, 192), "tiny_one": (192, 192)}
    for name, sample in found.items():
        if name != "faults":
            assert sample.pixels.shape == (3, *sample.bucket)


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


@pytest.mark.parametrize("weight", [{"repeats": 2}, {"repeats": 1, "probability": 1.5}])
def test_entries_are_mixed_by_their_repeats(tmp_path, folder, weight):
    shard = write_shard(tmp_path / "s.tar", [{"png": encoded(quadrants(64, 64)), "txt": b"one of a shard"}])
    entries = [
        entry(folder, **weight),
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
    for flags, caches, keeps_latents in (
        ([], "fill", True), (["--vae_cache_disable"], "fill", False), (["--vae_cache_ondemand"], "ondemand", True),
        (["--vae_cache_disable", "--vae_cache_ondemand"], "ondemand", False),
    ):  # fmt: skip
        data = parse("--train_data_dir", folder, *flags).data
        assert (data.caches, data.keeps_latents, data.trains_with_encoders) == (caches, keeps_latents, bool(flags))
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
        ({"probability": 0}, "probability is 0, and must be above 0"),
        ({"probability": float("inf")}, "probability is inf, and must be above 0"),
        ({"resolution": True}, "resolution is True, and must be of type float"),
        ({"resolution": 0}, "resolution 0: must be positive"),
        ({"resolution": 1024}, "resolution 1024 with resolution_type area is in megapixels"),
        ({"resolution": 1.0, "resolution_type": "pixel"}, "resolution 1 with resolution_type pixel is in pixels"),
        ({"crop_style": "middle"}, "crop_style is 'middle', and must be one of center, random, corner"),
        ({"crop_aspect": "closest"}, "crop_aspect is 'closest'"),
        ({"skip_file_discovery": "vae,all"}, "skip_file_discovery has 'all'"),
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


def test_encode_batch_size_is_the_vaes(folder):
    assert parse("--train_data_dir", folder, "--encode_batch_size", 3).args.vae_encode_batch_size == 3


def test_epoch_length(tmp_path):

    base = ["--pretrained_teacher_model", "x", "--train_shards_path_or_url", toy_shards(tmp_path, 2, 5)]
    assert script.parse_args(base)[1].samples == 10
    assert script.parse_args([*base, "--max_train_samples", "7"])[1].samples == 7
    with pytest.raises(SystemExit):
        script.parse_args(["--pretrained_teacher_model", "x", "--train_shards_path_or_url", "pipe:cat x"])


def test_steps_of_a_run_given_in_epochs(tmp_path, monkeypatch, sd_teacher):
    """num_train_epochs x (samples // batch), where the batch is that of an optimizer step."""

    seen = []
    monkeypatch.setattr(script, "make_schedule", lambda args, _, steps: seen.append(steps))
    monkeypatch.setattr(script, "resume", lambda *_: exit("enough"))
    flags = ["--pretrained_teacher_model", sd_teacher]
    flags += ["--train_shards_path_or_url", toy_shards(tmp_path / "shards", 2, 5), "--output_dir", tmp_path / "out"]
    flags += ["--num_train_epochs", 7, "--train_batch_size", 2, "--gradient_accumulation_steps", 2]
    for more in ([], ["--max_train_samples", 9]):
        with pytest.raises(SystemExit, match="enough"):
            script.main(*script.parse_args([str(flag) for flag in [*flags, "--report_to", "none", *more]]))
    assert seen == [7 * (10 // 4), 7 * (9 // 4)]


# ---------------------------------------------------------------------------------------------------------------------
# The table of buckets
# ---------------------------------------------------------------------------------------------------------------------


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
    run, accelerator = parse("--train_shards_path_or_url", shard, *TOY_SIZED), Accelerator()
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


def test_headers_are_read_fast(tmp_path):
    run = toy_sized(many(tmp_path / "f", {(64, 64): 300}))
    started = time.process_time()
    plan_buckets(run.args, run.data, Accelerator())
    assert time.process_time() - started < 2.0
