"""Clips: their frames, times and sizes, bad ones, folders and shards of them, prompts alone, and Wan's caches."""

import argparse
import io
import itertools
import json
import random
from argparse import Namespace
from collections import Counter
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch
from common.dmd_flags import fit_to_blocks
from diffusers import WanPipeline, WanVideoToVideoPipeline
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load

from common.cache import TensorStore, text_key, weights_identity
from common.data.buckets import Rules, latent_frames, pixel_frames
from common.data.clips import (
    CaptionReader,
    ClipReader,
    clip_size,
    open_caption_readers,
    open_clip_readers,
    save_clip,
)
from common.data.datasets import Data, open_data, plan_buckets
from common.data.encoder import Encoders, open_encoder
from common.data.samples import BadSample
from common.data.sources import part_fingerprint, read_part, split_folder, split_prompts
from common.data.stream import open_batches
from common.flags import (
    add_bucket_flags,
    add_shared_flags,
    add_video_flags,
    check_bucket_flags,
    check_shared_flags,
    parse_with_config,
)
from common.wan import encoders as wan
from tests.helpers import encoded, tiny_wan_pipeline, write_shard

# ---------------------------------------------------------------------------------------------------------------------
# Tiny clips: frame i is a grey of 12 i, with a white corner at the top left
# ---------------------------------------------------------------------------------------------------------------------


def frame(i: int, height: int = 32, width: int = 48) -> np.ndarray:
    pixels = np.full((height, width, 3), 12 * i, np.uint8)
    pixels[: height // 2, : width // 2] = 255
    return pixels


CODECS = {
    "mp4": ("mp4", "libx264", "yuv420p"),
    "mov": ("mov", "mpeg4", "yuv420p"),
    "webm": ("webm", "libvpx-vp9", "yuv420p"),
    "vp8": ("webm", "libvpx", "yuv420p"),
    "mkv": ("matroska", "ffv1", "bgr0"),
    "avi": ("avi", "mpeg4", "yuv420p"),
}


def video(frames: list[np.ndarray], kind: str = "mkv", **settings) -> bytes:
    container, codec, pixels = CODECS[kind]
    file = io.BytesIO()
    with av.open(file, "w", format=container) as output:
        stream = output.add_stream(codec, rate=8)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = pixels
        for name, value in settings.items():
            setattr(stream.codec_context, name, value)
        for pixels in frames:
            output.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        output.mux(stream.encode(None))
    return file.getvalue()


def animation(frames: list[np.ndarray], kind: str) -> bytes:
    file = io.BytesIO()
    first, *rest = map(Image.fromarray, frames)
    first.save(file, kind, save_all=True, append_images=rest, duration=125, lossless=True)
    return file.getvalue()


def clip(kind: str, count: int, **size) -> dict[str, bytes]:
    """Members of a sample."""
    frames = [frame(i, **size) for i in range(count)]
    if kind in ("gif", "webp"):
        return {kind: animation(frames, kind)}
    if kind in ("png", "jpg"):
        names = [f"{i}.{kind}" for i in range(count)]  # 10 comes after 9
        random.Random(0).shuffle(names)
        data = {name: encoded(Image.fromarray(frames[int(name.split(".")[0])]), {"jpg": "jpeg"}.get(kind, kind)) for name in names}  # fmt: skip  # noqa: E501
        return data
    return {CODECS[kind][0].replace("matroska", "mkv"): video(frames, kind)}


def reader(num_frames=5, interval=1, style="corner", **changes) -> ClipReader:
    rules = {"resolution": 32, "resolution_type": "pixel", "alignment": 16, "crop": False, "crop_style": style}
    rules = Rules(**rules | {name: changes.pop(name) for name in list(changes) if name in Rules.__dataclass_fields__})
    settings = {"interpolation_type": "bilinear", "random_flip": False, "seed": 0} | changes
    return ClipReader(rules, **settings, num_frames=num_frames, frame_interval=interval)


def read(members, *args, visit="v", **settings):
    return reader(*args, **settings)(members | {"txt": b"a clip"}, visit, "name")


def greys(sample) -> list[float]:
    """Of each frame, as a number of the frame."""
    return [round(value, 1) for value in (sample.pixels[:, :, -4:, -4:].float().mean((0, 2, 3)) / 12).tolist()]


@pytest.mark.parametrize("kind", [*CODECS, "gif", "webp", "png", "jpg"])
def test_frames_of_every_kind_of_clip(kind):
    sample = read(clip(kind, 12), 5, 2)
    assert sample.pixels.shape == (3, 5, 32, 48) and sample.pixels.dtype == torch.uint8
    assert sample.bucket == (5, 32, 48) and sample.size_ids == (32, 48, 0, 0, 5, 32, 48)
    assert np.allclose(greys(sample), [0, 2, 4, 6, 8], atol=0.4)
    assert sample.pixels[:, :, 2:12, 2:20].float().mean() > 245  # the corner
    assert sample.caption == "a clip"


def test_a_lossless_clip_is_exact():
    sample = read(clip("mkv", 5))
    expected = torch.from_numpy(np.stack([frame(i) for i in range(5)])).permute(3, 0, 1, 2)
    assert torch.equal(sample.pixels, expected)


@pytest.mark.parametrize(("style", "starts"), [("corner", {0}), ("center", {5}), ("random", set(range(11)))])
def test_time_is_cropped_as_pictures_are(style, starts):
    """Five frames, a step of two apart, of 19: they can start at 0 to 10."""
    members, found = clip("png", 19), set()
    for visit in range(1 if style != "random" else 100):
        numbers = greys(read(members, 5, 2, style, visit=str(visit)))
        assert np.diff(numbers).tolist() == [2, 2, 2, 2]
        found.add(round(numbers[0]))
    assert found == starts


@pytest.mark.parametrize("kind", ["mp4", "vp8", "gif", "png"])
def test_a_clip_as_long_as_it_must_be_and_one_frame_less(kind):
    assert greys(read(clip(kind, 9), 5, 2, "random"))[-1] == pytest.approx(8, abs=0.4)
    with pytest.raises(BadSample, match="fewer than 9 frames"):
        read(clip(kind, 8), 5, 2, "random")


def test_packets_that_are_no_frames(monkeypatch):
    """A container that promises more than it shows: the start is drawn again among what there is."""
    monkeypatch.setattr("common.data.clips.count_frames", lambda files: 1000)
    assert greys(read(clip("mkv", 6), 5, 1, "center")) in ([0, 1, 2, 3, 4], [1, 2, 3, 4, 5])
    with pytest.raises(BadSample, match="fewer than 9 frames"):
        read(clip("mkv", 6), 9)


def test_all_frames_are_cut_and_mirrored_alike():
    """48 x 32 to a square: a random crop is the same in every frame, and so is the mirror."""
    members, corners = clip("mkv", 5), set()
    for visit in range(20):
        sample = read(members, style="random", crop=True, crop_aspect="square", random_flip=True, visit=str(visit))
        assert sample.bucket == (5, 32, 32)
        white = sample.pixels.min(0).values == 255  # [F, H, W]
        assert all(torch.equal(white[0], later) for later in white[1:])
        corners.add((white[0, 0, 0].item(), white[0, 0, -1].item()))
    assert {(True, False), (False, True)} <= corners


def test_sizes_follow_the_area():
    """240 pixel_area of 2 to 1: 339 x 170, in multiples of 16."""
    sample = read(clip("mkv", 5, height=200, width=400), resolution=240, resolution_type="pixel_area")
    assert sample.bucket == (5, 176, 336)
    with pytest.raises(BadSample, match="below minimum_image_size"):
        read(clip("mkv", 5), minimum=("side", 33))


def test_a_telephones_video_is_upright():
    """The display matrix of a quarter turn clockwise, as ISO 14496-12 writes it: (x, y) goes to (-y, x)."""
    data = video([frame(i) for i in range(5)], "mp4")
    place = data.index(b"tkhd") + 4 + 4 + 4 * 5 + 8 + 8
    matrix = (0, 1 << 16, 0, -1 << 16, 0, 0, 0, 0, 1 << 30)
    plain = (1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
    packed = [b"".join(value.to_bytes(4, "big", signed=True) for value in values) for values in (plain, matrix)]
    assert data[place : place + 36] == packed[0]
    sample = read({"mp4": data[:place] + packed[1] + data[place + 36 :]})
    assert sample.bucket == (5, 48, 32)
    bright = sample.pixels[:, 0].float().mean(0) > 128
    assert bright[5, -5] and not bright[5, 5] and not bright[-5, -5]  # top left has become top right


def test_pixels_that_are_not_square():
    sample = read({"mp4": video([frame(i) for i in range(5)], "mp4", sample_aspect_ratio=Fraction(2))})
    assert sample.size_ids[:2] == (32, 96) and sample.bucket == (5, 32, 96)


@pytest.mark.parametrize(("colorspace", "yuv"), [(1, (63, 102, 240)), (5, (81, 90, 240))])  # BT.709, BT.601
def test_colours_by_the_videos_own_matrix(colorspace, yuv):
    """Pure red, Y, Cb and Cr as the two standards give them."""
    picture = av.VideoFrame(32, 32, "yuv420p")
    for plane, value in zip(picture.planes, yuv, strict=True):
        plane.update(bytes([value]) * plane.buffer_size)
    file = io.BytesIO()
    with av.open(file, "w", format="matroska") as output:
        stream = output.add_stream("ffv1", rate=8)
        stream.height, stream.width, stream.pix_fmt = 32, 32, "yuv420p"
        stream.codec_context.colorspace, stream.codec_context.color_range = colorspace, 1
        output.mux(stream.encode(picture))
        output.mux(stream.encode(None))
    pixel = read({"mkv": file.getvalue()}, 1).pixels[:, 0, 8, 8].int()
    assert (pixel - torch.tensor([255, 0, 0])).abs().max() <= 3


# ---------------------------------------------------------------------------------------------------------------------
# Bad clips
# ---------------------------------------------------------------------------------------------------------------------


def playlist(path: Path) -> bytes:
    return f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nfile://{path}\n#EXT-X-ENDLIST\n".encode()


def test_bad_clips_by_their_cause(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    good = tmp_path / "secret.mp4"
    good.write_bytes(clip("mp4", 5)["mp4"])
    several = clip("png", 4) | {"4.png": encoded(Image.new("RGB", (48, 16)))}
    sound = io.BytesIO()
    with av.open(sound, "w", format="mp4") as output:
        stream = output.add_stream("aac", rate=8000, layout="mono")
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 4096), np.float32), format="fltp", layout="mono")
        silence.sample_rate = 8000
        output.mux(stream.encode(silence))
        output.mux(stream.encode(None))
    cases = {
        "no clip": {"json": b"{}"},
        "empty image": {"mp4": b""},
        "broken clip": {"mp4": b"not a video" * 100},
        "no video in the clip": {"mp4": sound.getvalue()},
        "frames of several sizes": several,
        "missing caption": clip("mkv", 5) | {"txt": b" "},
    }
    for cause, members in cases.items():
        with pytest.raises(BadSample, match=cause):
            reader()({"txt": b"a"} | members, "v", "name")
    for name in ("mp4", "gif", "avi"):  # FFmpeg would follow a playlist to any file or address
        with pytest.raises(BadSample, match="broken clip"):
            read({name: playlist(good)})
        with pytest.raises(BadSample, match="broken clip"):
            read({name: b"ffconcat version 1.0\nfile secret.mp4\n"})
    for kind in ("mp4", "mkv", "gif"):
        name, data = next(iter(clip(kind, 9).items()))
        for share in (0.3, 0.6):
            with pytest.raises(BadSample, match="broken clip|no video|fewer than 9 frames"):
                read({name: data[: int(share * len(data))]}, 9)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    for kind in ("mp4", "gif", "png"):
        with pytest.raises(BadSample, match="image bomb"):
            read(clip(kind, 5))


# ---------------------------------------------------------------------------------------------------------------------
# Numbers of frames
# ---------------------------------------------------------------------------------------------------------------------


def test_latent_frames():
    assert [latent_frames(frames, 4) for frames in (1, 5, 81, 121)] == [1, 2, 21, 31]
    assert [latent_frames(frames, 8) for frames in (1, 9, 81, 121)] == [1, 2, 11, 16]
    assert all(latent_frames(pixel_frames(count, 8), 8) == count for count in range(1, 100))


def blocks(per_block, first=False, training=21):
    settings = {"num_frame_per_block": per_block, "independent_first_frame": first, "num_training_frames": training}
    return Namespace(**settings, notes=[])


@pytest.mark.parametrize(
    ("frames", "settings", "fitted"),
    [
        (121, blocks(0), 121),  # one block
        (81, blocks(3), 81),
        (121, blocks(3), 81),  # the document's: 31 latent frames are cut to 21
        (129, blocks(3), 129),  # 33 latent frames: a longer rollout
        (85, blocks(3, first=True), 85),  # 1 + 21
        (121, blocks(3, first=True), 121),  # 1 + 30
        (125, blocks(3, True, 28), 109),  # 32 to 28 = 1 + 27
    ],
)
def test_clips_are_cut_to_whole_blocks(frames, settings, fitted):

    assert fit_to_blocks("num_frames", frames, settings) == fitted
    assert [f"cut to --num_training_frames {settings.num_training_frames}, {fitted} frames" in note for note in settings.notes] == [True] * (fitted != frames)  # fmt: skip  # noqa: E501


@pytest.mark.parametrize(
    ("frames", "settings", "named"),
    [
        (121, blocks(3, training=28), "31 latent frames are no whole blocks of --num_frame_per_block 3; 117 or 129"),
        (25, blocks(3), "7 latent frames .* 21 or 33 frames are"),
        (5, blocks(3), "2 latent frames .* 9 frames are"),
        (81, blocks(3, first=True), "after the first frame; 73 or 85 frames are"),
    ],
)
def test_an_error_says_which_numbers_of_frames_do(frames, settings, named):

    with pytest.raises(ValueError, match=named):
        fit_to_blocks("num_frames", frames, settings)


# ---------------------------------------------------------------------------------------------------------------------
# Datasets
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Opened:
    """What a script that trains on clips has after parsing."""

    args: Namespace
    data: Data
    notes: list[str]

    def readers(self, reader_class=ClipReader):
        return open_clip_readers(self.args, self.data, reader_class)


def parse(*words, frames_per_latent=4) -> Opened:
    """As a script does that trains on clips."""
    parser = argparse.ArgumentParser()
    for name in ("pretrained_teacher_model", "pretrained_t5_model_name_or_path", "teacher_revision", "train_prompts"):
        parser.add_argument(f"--{name}")
    parser.add_argument("--resolution", type=float, default=480)
    parser.add_argument("--max_sequence_length", type=int, default=512)
    add_shared_flags(parser)
    add_bucket_flags(parser)
    add_video_flags(parser)
    parser.set_defaults(bucket_alignment=16, max_train_steps=1, train_batch_size=2, crop_aspect="preserve")
    words = ["--pretrained_teacher_model", "teacher", *words]
    args = parse_with_config(parser, [str(word) for word in words], family="wan", method="dmd")
    check_shared_flags(parser, args)
    rules = check_bucket_flags(parser, args)
    data, notes = open_data(parser, args, rules, frames_per_latent)
    return Opened(args, data, args.notes + notes)


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
    """Three clips with captions: a file, one in a subfolder, and a folder of frames; a note and a hidden file."""
    root = tmp_path / "clips"
    (root / "sub" / "walk.v1").mkdir(parents=True)
    (root / "first.mp4").write_bytes(clip("mp4", 9)["mp4"])
    (root / "first.txt").write_text("one caption\nanother caption\n")
    (root / "sub" / "a_second.gif").write_bytes(clip("gif", 9, height=48, width=32)["gif"])
    (root / "sub" / "a_second.txt").write_text("second")
    for name, data in clip("png", 11).items():
        (root / "sub" / "walk.v1" / name).write_bytes(data)
    (root / "sub" / "walk.v1.txt").write_text("a walk")
    (root / "notes.md").write_text("no clip")
    (root / ".hidden.mp4").write_bytes(b"x")
    return root


SMALL = ["--resolution", 32, "--resolution_type", "pixel"]


def samples_of(run: Opened, reader_class=ClipReader) -> dict:
    found, faults = {}, Counter()
    for dataset, one in zip(run.data.datasets, run.readers(reader_class), strict=True):
        for key, members in itertools.chain.from_iterable(map(read_part, dataset.parts)):
            name = key.rpartition("/")[2]
            try:
                found[name] = one(members, f"v {key}", name)
            except BadSample as cause:
                faults[str(cause)] += 1
    return found | {"faults": faults}


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
    entry = json.loads((Path(__file__).parent / "configs" / "dmd_wan.dataset.json").read_text())
    path = tmp_path / "multidatabackend.json"
    path.write_text(json.dumps(entry | {"instance_data_dir": str(folder)}))
    run = parse("--data_backend_config", path, "--resolution", 1000)
    dataset, rules = run.data.datasets[0], run.data.datasets[0].rules
    assert (dataset.num_frames, dataset.frame_interval, dataset.repeats) == (121, 1, 0)
    assert (rules.resolution, rules.resolution_type, rules.crop, rules.minimum) == (480, "pixel_area", False, None)
    assert dataset.cache_dir_vae == "cache/wan-dmd" and len(samples_of(run)["faults"]) == 1


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
    good = [clip("mp4", 9), clip("webm", 9, **size), clip("gif", 9), clip("jpg", 11, **size), clip("mkv", 9)]
    bad = [clip("mp4", 3), {"mp4": b"nothing"}, {"json": b"{}"}]
    samples = [members | {"txt": f"clip {i}".encode()} for i, members in enumerate(good + bad)]
    write_shard(folder / "0.tar", samples[::2], [str(i) for i in range(0, 8, 2)])
    write_shard(folder / "1.tar", samples[1::2], [str(i) for i in range(1, 8, 2)])
    return str(folder / "{0,1}.tar")


class Accelerator:
    device = torch.device("cpu")
    is_main_process, num_processes, process_index = True, 1, 0
    print = staticmethod(print)
    wait_for_everyone = staticmethod(lambda: None)


def test_captions_alone_have_the_clips_sizes(folder, tmp_path):
    """No clip is decoded, no cache of latents is read; geometry keeps their stores apart from those of latents."""
    run = parse("--train_data_dir", folder, *SMALL, "--num_frames", 13)  # longer than the clips
    found = samples_of(run, CaptionReader)
    assert {name: sample.bucket for name, sample in found.items() if name != "faults"} == {
        "first": (13, 32, 48), "a_second": (13, 48, 32), "walk": (13, 32, 48),
    }  # fmt: skip
    assert found["walk"].latents == {} and found["walk"].pixels is None
    [one], [clips] = open_caption_readers(run.args, run.data), run.readers()
    store = TensorStore(tmp_path / "store")
    assert one.with_cache(store) is one and one.geometry() == ["captions", *clips.geometry()]
    cached = clips.with_cache(store, filling=True)
    assert (cached.cache, cached.filling, clips.cache) == (store, True, None)


@pytest.mark.parametrize("fps", [16, 24])
def test_a_saved_clip_has_its_frames_and_its_pace(tmp_path, fps):
    save_clip(np.stack([frame(i, 33, 49) for i in range(5)]) / 255.0, tmp_path / "a" / "clip.mp4", fps)
    with av.open(str(tmp_path / "a" / "clip.mp4")) as container:
        stream = container.streams.video[0]
        assert stream.average_rate == fps and sum(1 for _ in container.decode(stream)) == 5
        assert (stream.height, stream.width) == (32, 48)


def test_batches_of_clips_from_shards(tmp_path, capsys):
    """Each batch is of one shape; bad clips are counted by cause; buckets are counted from the first frames."""
    run = parse("--train_shards_path_or_url", shards(tmp_path / "s"), *SMALL, "--num_frames", 9)
    plan_buckets(run.args, run.data, Accelerator(), clip_size)
    shown = capsys.readouterr().out
    assert "48     32       4" in shown and "32     48       2" in shown  # the clip of three frames among them
    batches = open_batches(run.args, run.data, Accelerator(), run.readers(), None)
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
    batches = open_batches(run.args, run.data, Accelerator(), run.readers(), None)
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


# ---------------------------------------------------------------------------------------------------------------------
# Wan's encoders and the caches
# ---------------------------------------------------------------------------------------------------------------------

PROMPTS = ["a red ball", "a  blue   box &amp; a much longer text about it", ""]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return tiny_wan_pipeline(tmp_path_factory.mktemp("wan"))


def opened(teacher, *flags, dtype=torch.float32):
    """The run, its encoder after filling, readers, and how often each network was loaded."""
    run = parse(*flags, "--pretrained_teacher_model", teacher, "--dataloader_num_workers", 0)
    args, loads, device = run.args, Counter(), Accelerator.device
    length, texts = args.max_sequence_length, args.pretrained_t5_model_name_or_path
    encoders = Encoders(
        load_vae=lambda: loads.update(["load_vae"]) or wan.load_vae(args, device, dtype),
        encode_pixels=wan.encode_pixels,
        load_text=lambda: loads.update(["load_text"]) or wan.load_text_encoder(args, device, dtype),
        encode_prompts=partial(wan.encode_prompts, length=length),
        latents_identity={"vae": weights_identity(str(teacher), "vae", None), "dtype": dtype},
        text_identity={"text": texts or str(teacher), "dtype": dtype, "length": length},
        text_length=length,
    )
    encoder, readers = open_encoder(args, run.data, run.readers(), encoders, Accelerator(), ["", "negative"])
    return run, encoder, readers, loads


def test_embeddings_are_the_pipelines(teacher):
    pipeline = WanPipeline.from_pretrained(teacher)
    expected, _ = pipeline.encode_prompt(PROMPTS, do_classifier_free_guidance=False, max_sequence_length=512)
    rows = wan.encode_prompts((pipeline.tokenizer, pipeline.text_encoder), PROMPTS, 512)["prompt_embeds"]
    assert [len(row) for row in rows] == [11, len("a blue box & a much longer text about it") + 1, 1]
    long = "x" * 600
    [cut] = wan.encode_prompts((pipeline.tokenizer, pipeline.text_encoder), [long], 512)["prompt_embeds"]
    expected_cut, _ = pipeline.encode_prompt([long], do_classifier_free_guidance=False, max_sequence_length=512)
    torch.testing.assert_close(cut, expected_cut[0], rtol=1e-4, atol=1e-5)
    for row, padded in zip(rows, expected, strict=True):
        torch.testing.assert_close(row, padded[: len(row)], rtol=1e-4, atol=1e-5)
        assert not padded[len(row) :].any()


def test_latents_are_the_pipelines(teacher):
    """WanVideoToVideoPipeline's, without the noise that it adds."""
    vae = wan.load_vae(Namespace(pretrained_teacher_model=teacher, teacher_revision=None, cache_dir=None), "cpu", torch.float32)  # fmt: skip  # noqa: E501
    clips = torch.rand(2, 3, 9, 16, 32) * 2 - 1
    stand_in = SimpleNamespace(vae=vae, vae_scale_factor_temporal=4, vae_scale_factor_spatial=8)
    stand_in.scheduler = SimpleNamespace(add_noise=lambda latents, noise, t: latents)
    with torch.no_grad():
        expected = WanVideoToVideoPipeline.prepare_latents(stand_in, clips, 2, 4, 16, 32, torch.float32, "cpu")
        latents = wan.encode_pixels(vae, clips)["latents"]
        assert latents.shape == (2, 4, 3, 2, 4)
        torch.testing.assert_close(latents, expected)
        raw = latents * torch.tensor([2.0, 0.5, 1.0, 4.0]).view(1, 4, 1, 1, 1)
        raw = raw + torch.tensor([0.5, -0.25, 0.0, 1.0]).view(1, 4, 1, 1, 1)
        torch.testing.assert_close(wan.decode_latents(vae, latents), vae.decode(raw).sample)


def test_a_full_cache_loads_neither_network(teacher, folder, tmp_path):
    flags = ["--train_data_dir", folder, *SMALL, "--num_frames", 9, "--output_dir", tmp_path / "out"]
    run, encoder, readers, loads = opened(teacher, *flags)
    assert loads == {"load_vae": 1, "load_text": 1}
    assert len(encoder.latents[0].index) == 3
    assert len(encoder.text.index) == 4 + 2  # captions, "", negative
    run, encoder, readers, loads = opened(teacher, *flags)
    samples = samples_of_readers(run, readers)
    tall = samples["a_second"]
    latents = encoder.encode_images([tall])["latents"]
    text = encoder.encode_text([tall.caption, ""])["prompt_embeds"]
    assert loads == {} and latents.shape == (1, 4, 3, 6, 4) and text.shape == (2, 512, 16)
    assert not text[0, 7:].any() and text[0, :7].any(-1).all() and not text[1, 1:].any()
    # what is kept is what would be encoded now
    _, fresh, readers, _ = opened(teacher, *flags, "--vae_cache_disable")
    again = samples_of_readers(run, readers)["a_second"]
    assert again.pixels is not None
    torch.testing.assert_close(fresh.encode_images([again])["latents"], latents, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(fresh.encode_text([tall.caption, ""])["prompt_embeds"], text)


def samples_of_readers(run, readers) -> dict:
    samples = {}
    for dataset, one in zip(run.data.datasets, readers, strict=True):
        for key, members in itertools.chain.from_iterable(map(read_part, dataset.parts)):
            samples[key.rpartition("/")[2]] = one(members, "v", key.rpartition("/")[2])
    return samples


def test_only_valid_tokens_are_on_the_disk(teacher, prompts, tmp_path):
    prompts.write_text("short\na longer one\n")
    _, encoder, _, _ = opened(teacher, "--train_prompts", prompts, "--output_dir", tmp_path)
    key = text_key("a longer one")
    with safe_open(encoder.text.index[key], "pt") as file:
        assert load(file.get_tensor(key).numpy().tobytes())["prompt_embeds"].shape == (13, 16)


def test_prompts_alone_never_load_the_vae(teacher, prompts, tmp_path, capsys):
    flags = ["--train_prompts", prompts, "--num_frames", 9, "--output_dir", tmp_path / "out"]
    prompts.write_text("a red ball\na blue box\n")
    run, encoder, readers, loads = opened(teacher, *flags)
    assert loads == {"load_text": 1} and not (tmp_path / "out" / "cache" / "vae").exists()
    assert "caches: 0 latents, 4 prompts" in capsys.readouterr().out
    run, encoder, readers, loads = opened(teacher, *flags)
    samples = list(samples_of_readers(run, readers).values())
    assert encoder.encode_images(samples) == {}
    assert encoder.encode_text([sample.caption for sample in samples])["prompt_embeds"].shape == (2, 512, 16)
    assert loads == {}
    prompts.write_text("a red ball\na green box\n")  # one new: the text encoder again, for that one
    _, encoder, _, loads = opened(teacher, *flags)
    assert loads == {"load_text": 1} and len(encoder.text.index) == 3 + 2


def test_on_demand_keeps_what_is_met(teacher, folder, tmp_path):
    flags = ["--train_data_dir", folder, *SMALL, "--num_frames", 9, "--output_dir", tmp_path, "--vae_cache_ondemand"]
    run, encoder, readers, loads = opened(teacher, *flags)
    assert loads == {}
    sample = samples_of_readers(run, readers)["walk"]
    first = encoder.encode_images([sample])["latents"]
    encoder.encode_text([sample.caption])
    encoder.flush()
    run, encoder, readers, loads = opened(teacher, *flags)
    sample = samples_of_readers(run, readers)["walk"]
    assert sample.pixels is None and torch.equal(encoder.encode_images([sample])["latents"], first)
    encoder.encode_text([sample.caption])
    assert loads == {}


def test_stores_are_named_by_what_shaped_them(teacher, folder, tmp_path):
    base = ["--train_data_dir", folder, *SMALL, "--num_frames", 9, "--output_dir", tmp_path, "--vae_cache_ondemand"]

    def folders(*flags, dtype=torch.float32):
        _, encoder, _, _ = opened(teacher, *base, *flags, dtype=dtype)
        return encoder.latents[0].folder, encoder.text.folder

    plain = folders()
    assert folders() == plain
    for flags in (("--num_frames", 5), ("--frame_interval", 2), ("--resolution", 48), ("--center_crop",)):
        latents, text = folders(*flags)
        assert latents != plain[0] and text == plain[1]
    other = folders(dtype=torch.bfloat16)
    assert other[0] != plain[0] and other[1] != plain[1]
    for flags in (("--pretrained_t5_model_name_or_path", "elsewhere"), ("--max_sequence_length", 16)):
        latents, text = folders(*flags)
        assert latents == plain[0] and text != plain[1]
