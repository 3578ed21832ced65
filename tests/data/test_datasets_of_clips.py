"""Datasets of clips and of prompts alone: by flags and dataset files, in folders and shards, and their batches."""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from common.cache import TensorStore
from common.data.buckets import latent_frames, pixel_frames
from common.data.clips import CaptionReader, ClipReader, clip_size, open_caption_readers, open_clip_readers
from common.data.datasets import open_data, plan_buckets
from common.data.sources import part_fingerprint, split_folder, split_prompts
from common.data.stream import open_batches
from common.flags import (
    add_bucket_flags,
    add_clip_flags,
    add_shared_flags,
    bucket_rules,
    check_shared_flags,
    parse_with_config,
)
from tests.data import helpers
from tests.data.helpers import Accelerator, Opened
from tests.helpers import ROOT, clip_members, encoded, folder_of_clips, write_shard


def test_latent_frames():
    assert [latent_frames(frames, 4) for frames in (1, 5, 81, 121)] == [1, 2, 21, 31]
    assert [latent_frames(frames, 8) for frames in (1, 9, 81, 121)] == [1, 2, 11, 16]
    assert all(latent_frames(pixel_frames(count, 8), 8) == count for count in range(1, 100))


def readers_of(run: Opened, reader_class=ClipReader):
    return open_clip_readers(run.args, run.data, reader_class)


def parse(*words, frames_per_latent=4) -> Opened:
    """As a script does that trains on clips."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--pretrained_teacher_model")
    parser.add_argument("--train_prompts")
    parser.add_argument("--resolution", type=float, default=480)
    add_shared_flags(parser)
    add_bucket_flags(parser)
    add_clip_flags(parser)
    parser.set_defaults(bucket_alignment=16, max_train_steps=1, train_batch_size=2, crop_aspect="preserve")
    parser.set_defaults(dataloader_num_workers=0)
    words = ["--pretrained_teacher_model", "teacher", *words]
    args, notes = parse_with_config(parser, [str(word) for word in words], family="wan", method="dmd")
    notes += check_shared_flags(parser, args)
    rules, size_notes = bucket_rules(parser, args)
    data, data_notes = open_data(parser, args, rules, frames_per_latent)
    return Opened(args, data, notes + size_notes + data_notes)


@pytest.fixture()
def refused(capsys):
    def message(*words) -> str:
        with pytest.raises(SystemExit) as stop:
            parse(*words)
        assert stop.value.code == 2
        return capsys.readouterr().err.splitlines()[-1]

    return message


@pytest.fixture()
def folder(tmp_path):
    return folder_of_clips(tmp_path / "clips")


SMALL = ["--resolution", 32, "--resolution_type", "pixel"]


def samples_of(run: Opened, reader_class=ClipReader) -> dict:
    return helpers.samples_of(run, readers=readers_of(run, reader_class))


def test_a_folder_of_clips(folder):
    found = samples_of(parse("--train_data_dir", folder, *SMALL, "--num_frames", 9))
    assert found.pop("faults") == {}
    assert {name: sample.bucket for name, sample in found.items()} == {
        "first": (9, 32, 48), "a_second": (9, 48, 32), "walk": (9, 32, 48),
    }  # fmt: skip
    assert found["first"].captions == ["one caption", "another caption"]
    assert (found["a_second"].caption, found["walk"].caption) == ("second", "a walk")
    short = samples_of(parse("--train_data_dir", folder, *SMALL, "--num_frames", 5, "--frame_interval", 2))
    assert set(short) == {"first", "a_second", "walk", "faults"}
    assert samples_of(parse("--train_data_dir", folder, *SMALL, "--num_frames", 13))["faults"] == {"fewer than 13 frames": 3}  # fmt: skip  # noqa: E501


def test_a_changed_frame_is_another_part(folder):
    before = [part_fingerprint(part) for part in split_folder(str(folder), kind="video")]
    path = folder / "sub" / "walk.v1" / "3.png"
    path.write_bytes(encoded(Image.new("RGB", (48, 32))))
    after = [part_fingerprint(part) for part in split_folder(str(folder), kind="video")]
    assert sum(one != other for one, other in zip(before, after, strict=True)) == 1


def test_the_documents_dataset_with_a_folder(tmp_path, folder, capsys):
    """As it stands but for the clips' path: a single object with neither id nor type."""
    entry = json.loads((ROOT / "tests/configs/dmd_wan.dataset.json").read_text())
    path = tmp_path / "multidatabackend.json"
    path.write_text(json.dumps(entry | {"instance_data_dir": str(folder)}))
    run = parse("--data_backend_config", path, "--resolution", 1000)
    dataset, rules = run.data.datasets[0], run.data.datasets[0].rules
    assert (dataset.num_frames, dataset.frame_interval, dataset.repeats) == (121, 1, 0)
    assert (rules.resolution, rules.resolution_type, rules.crop, rules.minimum) == (480, "pixel_area", False, None)
    assert dataset.cache_dir_vae == "cache/wan-dmd" and len(samples_of(run)["faults"]) == 1


def readable(dataset, run: Opened) -> list:
    """All good samples of one dataset of a run."""
    found = samples_of(replace(run, data=replace(run.data, datasets=(dataset,))), CaptionReader)
    return [sample for name, sample in found.items() if name != "faults"]


def test_the_documents_dataset_as_printed_with_the_folder_beside_it(folder):
    path = ROOT / "tests/configs/dmd_wan.dataset.json"
    (dataset,) = parse("--data_backend_config", path, "--train_data_dir", folder).data.datasets
    assert (dataset.id, dataset.num_frames, dataset.rules.crop) == (str(folder), 121, False)


def test_a_dataset_of_clips_as_simpletuner_has_it(tmp_path, folder):
    """Its frames in a block of their own, one caption for all, and a dataset to hold out, which DMD has no use for."""
    entry = {"instance_data_dir": str(folder), "dataset_type": "video"}
    first = entry | {"id": "a", "video": {"num_frames": 9, "min_frames": 9, "is_i2v": False}}
    alike = entry | {"id": "b", "caption_strategy": "instanceprompt", "instance_prompt": "a clip of sks"}
    held = entry | {"id": "c", "dataset_type": "eval"}
    path = tmp_path / "data.json"
    path.write_text(json.dumps([first, alike, held]))
    run = parse("--data_backend_config", path, *SMALL)
    assert [dataset.num_frames for dataset in run.data.datasets] == [9, 81]
    assert [note.partition(": ")[2] for note in run.notes] == ["'c': dataset_type eval: has no job in this script"]
    first, alike = ([sample.caption for sample in readable(dataset, run)] for dataset in run.data.datasets)
    assert "a walk" in first and alike == ["a clip of sks"] * 3


def test_an_entry_may_not_want_longer_clips_than_are_taken(tmp_path, folder, refused):
    """Longer than its own num_frames, or than those of the command line."""
    path = tmp_path / "data.json"
    for frames, line, taken in (({"num_frames": 81}, (), 81), ({}, (), 81), ({}, ("--num_frames", 121), 121)):
        path.write_text(json.dumps({"instance_data_dir": str(folder), "video": {"min_frames": 125} | frames}))
        message = refused("--data_backend_config", path, *SMALL, *line)
        assert f"min_frames 125 above num_frames {taken}: not supported" in message
    run = parse("--data_backend_config", path, *SMALL, "--num_frames", 125)
    assert run.data.datasets[0].num_frames == 125


def test_a_configs_dataset_file_takes_the_folder_of_the_command_line(tmp_path, folder, refused):
    """As the DMD document has it; where the file has no place for it the command line wins, and a note says so."""
    path, config = tmp_path / "data.json", tmp_path / "config.json"
    printed = json.loads((ROOT / "tests/configs/dmd_wan.dataset.json").read_text())
    path.write_text(json.dumps(printed))
    config.write_text(json.dumps({"data_backend_config": str(path)}))
    both = ["--config", config, "--train_data_dir", folder]
    run = parse(*both)
    assert (run.data.source, run.data.datasets[0].num_frames) == ("--data_backend_config", 121)
    assert run.data.datasets[0].id == str(folder) and not any("is not used" in note for note in run.notes)
    config.write_text(json.dumps({"train_data_dir": str(folder)}))  # the other way round
    assert parse("--config", config, "--data_backend_config", path).data.datasets[0].num_frames == 121
    config.write_text(json.dumps({"data_backend_config": str(path), "train_data_dir": str(folder)}))  # or both in it
    assert parse("--config", config).data.datasets[0].num_frames == 121

    config.write_text(json.dumps({"data_backend_config": str(path)}))
    for content in (json.dumps(printed | {"instance_data_dir": "gone"}), json.dumps([printed, printed]), "no JSON"):
        path.write_text(content)
        run = parse(*both)
        assert (run.data.source, run.data.datasets[0].num_frames) == ("--train_data_dir", 81)
        assert f"--data_backend_config {path} of the config is not used" in run.notes
    path.unlink()
    assert f"--data_backend_config {path} of the config is not used" in parse(*both).notes
    (tmp_path / "prompts.txt").write_text("a walk")
    path.write_text(json.dumps(printed))
    run = parse("--config", config, "--train_prompts", tmp_path / "prompts.txt")
    assert run.data.datasets[0].sizes and f"--data_backend_config {path} of the config is not used" in run.notes


def test_captions_of_clips_in_tables(tmp_path, folder, refused):
    (folder / "table.jsonl").write_text(json.dumps({"id": "first", "text": "of the table"}))
    block = {"path": "table.jsonl", "filename_column": "id", "caption_column": "text"}
    tabled = {"instance_data_dir": str(folder), "caption_strategy": "parquet", "parquet": block}
    (folder / "list.csv").write_text("file,text\nfirst.mp4,of the list\nsub/walk.v1,a walk of the list\n")
    listed = {"type": "csv", "csv_file": str(folder / "list.csv"), "csv_caption_column": "text"}
    path = tmp_path / "data.json"
    for entry, wanted in (
        (tabled, {"first": ["of the table"]}),
        (listed | {"csv_url_column": "file"}, {"first": ["of the list"], "walk": ["a walk of the list"]}),
    ):
        path.write_text(json.dumps(entry))
        found = samples_of(parse("--data_backend_config", path, *SMALL, "--num_frames", 9), CaptionReader)
        assert found.pop("faults") == {} and {name: sample.captions for name, sample in found.items()} == wanted
    path.write_text(json.dumps({"type": "huggingface", "dataset_name": "me/mine"}))
    assert "datasets on the hub are read for images alone" in refused("--data_backend_config", path)


def test_a_maximum_alone_is_what_larger_clips_are_shrunk_to(tmp_path, folder):
    """With shards, a folder, or a dataset that says nothing of sizes, as for images."""
    path = tmp_path / "data.json"
    path.write_text(json.dumps({"instance_data_dir": str(folder)}))
    for words in (
        ["--train_shards_path_or_url", shards(tmp_path / "s")],
        ["--train_data_dir", folder],
        ["--data_backend_config", path],
    ):
        run = parse(*words, *SMALL, "--maximum_image_size", 1.0)
        assert run.data.datasets[0].rules.downsample == run.data.datasets[0].rules.maximum == ("area", 1e6)
        assert sum("maximum_image_size: is also the target_downsample_size" in note for note in run.notes) == 1


def test_datasets_have_their_own_frames(tmp_path, folder, refused):
    path = tmp_path / "multidatabackend.json"

    def written(*entries):
        path.write_text(json.dumps([{"instance_data_dir": str(folder)} | entry for entry in entries]))
        return ["--data_backend_config", path, *SMALL]

    one, two = parse(*written({"id": "a", "num_frames": 5, "frame_interval": 2}, {"id": "b"})).data.datasets
    assert (one.num_frames, one.frame_interval, two.num_frames, two.frame_interval) == (5, 2, 81, 1)
    for entry, named in (
        ({"num_frames": 120}, "num_frames 120: must be 4k + 1, as 117 or 121"),
        ({"num_frames": 0}, "num_frames 0: must be 4k + 1, as 1 or 5"),
        ({"num_frames": 81.5}, "num_frames is 81.5, and must be of type int"),
        ({"frame_interval": 0}, "frame_interval 0: must be at least 1"),
        ({"dataset_type": "image"}, "dataset_type is 'image', and this script trains on videos"),
        ({"num_frame": 81}, "unknown key 'num_frame', did you mean 'num_frames'?"),
    ):
        assert named in refused(*written(entry))
    (tmp_path / "empty").mkdir()
    assert "no clips (mp4, webm" in refused(*written({"instance_data_dir": str(tmp_path / "empty")}))
    assert "no clips (mp4, webm" in refused("--train_data_dir", tmp_path / "empty")
    assert "--num_frames 80: must be 4k + 1, as 77 or 81" in refused("--train_data_dir", folder, "--num_frames", 80)
    with pytest.raises(SystemExit):
        parse("--train_data_dir", folder, "--num_frames", 5, frames_per_latent=8)
    assert parse("--train_data_dir", folder, "--num_frames", 9, frames_per_latent=8).data.datasets[0].num_frames == 9
    assert "are read for images alone" in refused("--dataset_name", "owner/name")


def shards(folder: Path) -> str:
    """Two shards: five clips of two shapes and of four kinds, and three bad ones."""
    folder.mkdir()
    size = {"height": 48, "width": 32}
    good = [
        clip_members("mp4", 9),
        clip_members("webm", 9, **size),
        clip_members("gif", 9),
        clip_members("jpg", 11, **size),
        clip_members("mkv", 9),
    ]
    bad = [clip_members("mp4", 3), {"mp4": b"nothing"}, {"json": b"{}"}]
    samples = [members | {"txt": f"clip {i}".encode()} for i, members in enumerate(good + bad)]
    write_shard(folder / "0.tar", samples[::2], [str(i) for i in range(0, 8, 2)])
    write_shard(folder / "1.tar", samples[1::2], [str(i) for i in range(1, 8, 2)])
    return str(folder / "{0,1}.tar")


def test_captions_alone_have_the_clips_sizes(folder, tmp_path):
    """No clip is decoded, no cache of latents is read; geometry keeps their stores apart from those of latents."""
    run = parse("--train_data_dir", folder, *SMALL, "--num_frames", 13)  # longer than the clips
    found = samples_of(run, CaptionReader)
    assert {name: sample.bucket for name, sample in found.items() if name != "faults"} == {
        "first": (13, 32, 48), "a_second": (13, 48, 32), "walk": (13, 32, 48),
    }  # fmt: skip
    assert found["walk"].latents == {} and found["walk"].pixels is None
    [one], [clips] = open_caption_readers(run.args, run.data), readers_of(run)
    store = TensorStore(tmp_path / "store")
    assert one.with_cache(store) is one and one.geometry() == ["captions", *clips.geometry()]
    cached = clips.with_cache(store, filling=True)
    assert (cached.cache, cached.filling, clips.cache) == (store, True, None)


def test_batches_of_clips_from_shards(tmp_path):
    """Each batch is of one shape; bad clips are counted by cause; buckets are counted from the first frames."""
    run = parse("--train_shards_path_or_url", shards(tmp_path / "s"), *SMALL, "--num_frames", 9)
    accelerator = Accelerator()
    plan_buckets(run.args, run.data, accelerator, clip_size)
    shown = "\n".join(accelerator.said)
    assert "48     32       4" in shown and "32     48       2" in shown  # the clip of three frames among them
    batches = open_batches(run.args, run.data, Accelerator(), readers_of(run), None)
    seen = set()
    for _ in range(6):
        batch = next(batches)
        assert len({sample.bucket for sample in batch}) == 1
        assert torch.stack([sample.pixels for sample in batch]).shape == (2, 3, *batch[0].bucket)
        seen |= {sample.caption for sample in batch}
    assert seen == {f"clip {i}" for i in range(5)}
    assert set(batches.faults) == {"fewer than 9 frames", "broken clip", "no clip"}


# ---------------------------------------------------------------------------------------------------------------------
# Prompts alone
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture()
def prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes(b"a red ball\r\n\n  a blue box \n" + "ein grüner Stern\n".encode() + b"\xff\xfe\n")
    return path


def test_prompts_alone_have_the_shapes_of_validation(prompts, refused, tmp_path):
    flags = ["--train_prompts", prompts, "--num_frames", 9, "--resolution", 480, "--resolution_type"]
    run = parse(*flags, "pixel", "--validation_resolution", "832x480,480x832")
    assert run.data.datasets[0].sizes == ((480, 832), (832, 480)) and run.data.samples == 4
    batches = open_batches(run.args, run.data, Accelerator(), readers_of(run), None)
    seen, sizes = set(), set()
    for _ in range(20):
        batch = next(batches)
        assert len({sample.bucket for sample in batch}) == 1 and all(sample.pixels is None for sample in batch)
        seen |= {sample.caption for sample in batch}
        sizes.add(batch[0].bucket)
    assert seen == {"a red ball", "a blue box", "ein grüner Stern"} and sizes == {(9, 480, 832), (9, 832, 480)}
    assert set(batches.faults) == {"caption is not UTF-8"}
    # 480 x 480 pixels in the shape of 1280 x 704: 647 x 356
    wide = parse(*flags, "pixel_area", "--validation_resolution", "1280x704")
    assert wide.data.datasets[0].sizes == ((352, 640),)
    assert parse(*flags, "pixel_area").data.datasets[0].sizes == ((480, 480),)
    assert "--train_prompts: no.txt: No such file" in refused("--train_prompts", "no.txt")
    (tmp_path / "none.txt").write_text("\n \n")
    assert "no prompts in it" in refused("--train_prompts", tmp_path / "none.txt")
    assert "--train_data_dir and --train_prompts: one or the other" in refused(
        "--train_prompts", prompts, "--train_data_dir", tmp_path
    )


def test_parts_of_prompts_change_with_what_they_hold(prompts):
    before = list(map(part_fingerprint, split_prompts(prompts)))
    assert len(set(before)) == 4
    prompts.write_bytes(prompts.read_bytes().replace(b"red", b"new"))
    after = list(map(part_fingerprint, split_prompts(prompts)))
    assert sum(one != other for one, other in zip(before, after, strict=True)) == 1
