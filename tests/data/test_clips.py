"""Clips: their frames, times and sizes, bad ones, and files of them."""

import io
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from common.data.buckets import Rules
from common.data.clips import ClipReader, save_clip
from common.data.samples import BadSample
from tests.helpers import VIDEO_KINDS, clip_members, encoded, grey_frame, video_file


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


@pytest.mark.parametrize("kind", [*VIDEO_KINDS, "gif", "webp", "png", "jpg"])
def test_frames_of_every_kind_of_clip(kind):
    sample = read(clip_members(kind, 12), 5, 2)
    assert sample.pixels.shape == (3, 5, 32, 48) and sample.pixels.dtype == torch.uint8
    assert sample.bucket == (5, 32, 48) and sample.size_ids == (32, 48, 0, 0, 5, 32, 48)
    assert np.allclose(greys(sample), [0, 2, 4, 6, 8], atol=0.4)
    assert sample.pixels[:, :, 2:12, 2:20].float().mean() > 245  # the corner
    assert sample.caption == "a clip"


def test_a_lossless_clip_is_exact():
    sample = read(clip_members("mkv", 5))
    expected = torch.from_numpy(np.stack([grey_frame(i) for i in range(5)])).permute(3, 0, 1, 2)
    assert torch.equal(sample.pixels, expected)


@pytest.mark.parametrize(("style", "starts"), [("corner", {0}), ("center", {5}), ("random", set(range(11)))])
def test_time_is_cropped_as_pictures_are(style, starts):
    """Five frames, a step of two apart, of 19: they can start at 0 to 10."""
    members, found = clip_members("png", 19), set()
    for visit in range(1 if style != "random" else 100):
        numbers = greys(read(members, 5, 2, style, visit=str(visit)))
        assert np.diff(numbers).tolist() == [2, 2, 2, 2]
        found.add(round(numbers[0]))
    assert found == starts


@pytest.mark.parametrize("kind", ["mp4", "vp8", "gif", "png"])
def test_a_clip_as_long_as_it_must_be_and_one_frame_less(kind):
    assert greys(read(clip_members(kind, 9), 5, 2, "random"))[-1] == pytest.approx(8, abs=0.4)
    with pytest.raises(BadSample, match="fewer than 9 frames"):
        read(clip_members(kind, 8), 5, 2, "random")


def test_packets_that_are_no_frames(monkeypatch):
    """A container that promises more than it shows: the start is drawn again among what there is."""
    monkeypatch.setattr("common.data.clips.count_frames", lambda files: 1000)
    assert greys(read(clip_members("mkv", 6), 5, 1, "center")) in ([0, 1, 2, 3, 4], [1, 2, 3, 4, 5])
    with pytest.raises(BadSample, match="fewer than 9 frames"):
        read(clip_members("mkv", 6), 9)


def test_all_frames_are_cut_and_mirrored_alike():
    """48 x 32 to a square: a random crop is the same in every frame, and so is the mirror."""
    members, corners = clip_members("mkv", 5), set()
    for visit in range(20):
        sample = read(members, style="random", crop=True, crop_aspect="square", random_flip=True, visit=str(visit))
        assert sample.bucket == (5, 32, 32)
        white = sample.pixels.min(0).values == 255  # [F, H, W]
        assert all(torch.equal(white[0], later) for later in white[1:])
        corners.add((white[0, 0, 0].item(), white[0, 0, -1].item()))
    assert {(True, False), (False, True)} <= corners


def test_sizes_follow_the_area():
    """240 pixel_area of 2 to 1: 339 x 170, in multiples of 16."""
    sample = read(clip_members("mkv", 5, height=200, width=400), resolution=240, resolution_type="pixel_area")
    assert sample.bucket == (5, 176, 336)
    with pytest.raises(BadSample, match="below minimum_image_size"):
        read(clip_members("mkv", 5), minimum=("side", 33))


def test_a_telephones_video_is_upright():
    """The display matrix of a quarter turn clockwise, as ISO 14496-12 writes it: (x, y) goes to (-y, x)."""
    data = video_file([grey_frame(i) for i in range(5)], "mp4")
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
    sample = read({"mp4": video_file([grey_frame(i) for i in range(5)], "mp4", sample_aspect_ratio=Fraction(2))})
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
    good.write_bytes(clip_members("mp4", 5)["mp4"])
    several = clip_members("png", 4) | {"4.png": encoded(Image.new("RGB", (48, 16)))}
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
        "missing caption": clip_members("mkv", 5) | {"txt": b" "},
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
        name, data = next(iter(clip_members(kind, 9).items()))
        for share in (0.3, 0.6):
            with pytest.raises(BadSample, match="broken clip|no video|fewer than 9 frames"):
                read({name: data[: int(share * len(data))]}, 9)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    for kind in ("mp4", "gif", "png"):
        with pytest.raises(BadSample, match="image bomb"):
            read(clip_members(kind, 5))


@pytest.mark.parametrize("fps", [16, 24])
def test_a_saved_clip_has_its_frames_and_its_pace(tmp_path, fps):
    save_clip(np.stack([grey_frame(i, 33, 49) for i in range(5)]) / 255.0, tmp_path / "a" / "clip.mp4", fps)
    with av.open(str(tmp_path / "a" / "clip.mp4")) as container:
        stream = container.streams.video[0]
        assert stream.average_rate == fps and sum(1 for _ in container.decode(stream)) == 5
        assert (stream.height, stream.width) == (32, 48)
