"""Clips: files of video, or a picture for each frame, at equal distances in time and of one size."""

import io
import random
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import av
import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from common.cache import text_key
from common.data.datasets import Data
from common.data.samples import (
    BadSample,
    ImageReader,
    Sample,
    member_bytes,
    open_image,
    open_readers,
    read_captions,
    to_rgb,
)
from common.data.shards import VIDEO_MEMBERS, is_frame
from common.data.sources import image_size
from common.pictures import to_bytes

# Demuxers that read nothing but the bytes they are given: a playlist could name any file or address.
CONTAINERS = {"format_whitelist": "mov,mp4,matroska,webm,avi", "protocol_whitelist": ""}


# ---------------------------------------------------------------------------------------------------------------------
# Frames
# ---------------------------------------------------------------------------------------------------------------------


def decode(files: list[bytes]) -> Iterator[Callable[[], Image.Image]]:
    """Yield for each frame, in order, a function that makes an upright picture of it, good until the next frame.

    `files` are a video, or a picture for each frame.
    """
    if len(files) > 1 or is_picture(io.BytesIO(files[0])):
        for data in files:
            image, _ = open_image(data)
            for i in range(getattr(image, "n_frames", 1)):
                image.seek(i)
                yield partial(ImageOps.exif_transpose, image)
    else:
        with open_video(io.BytesIO(files[0])) as container:
            for frame in container.decode(container.streams.video[0]):
                if frame.is_corrupt:
                    raise BadSample("broken clip")
                yield partial(upright, frame, container.streams.video[0].sample_aspect_ratio)


def is_picture(file) -> bool:
    """Whether PIL reads the file, as it does animated GIF and WebP; FFmpeg reads the others."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            Image.open(file)
    except UnidentifiedImageError:
        return False
    except Exception:  # broken, or a bomb: open_image says so
        pass
    return True


def open_video(file):
    """An open container that has video of a bearable size."""
    container = av.open(file, options=CONTAINERS)
    if not container.streams.video:
        raise BadSample("no video in the clip")
    codec = container.streams.video[0].codec_context
    if codec.width * codec.height > Image.MAX_IMAGE_PIXELS:
        raise BadSample("image bomb")
    return container


def upright(frame: av.VideoFrame, sample_aspect_ratio) -> Image.Image:
    """The frame with square pixels, and turned as a telephone's video says."""
    picture = frame.to_image()
    if sample_aspect_ratio not in (None, 0, 1):
        picture = picture.resize((max(1, round(picture.width * sample_aspect_ratio)), picture.height))
    return picture.rotate(frame.rotation, expand=True)  # both count counterclockwise


def clip_size(source) -> tuple[int, int]:
    """(height, width) of the first frame of a video, or of a picture; `source` is a path or an open file."""
    if isinstance(source, Path):
        with open(source, "rb") as file:
            return clip_size(file)
    picture = is_picture(source)
    source.seek(0)
    if picture:
        return image_size(source)
    with open_video(source) as container:
        stream = container.streams.video[0]
        picture = upright(next(container.decode(stream)), stream.sample_aspect_ratio)
        return picture.height, picture.width


def count_frames(files: list[bytes]) -> int:
    """Frames that the container announces: a video may show fewer than it has packets."""
    if len(files) > 1:
        return len(files)
    if is_picture(io.BytesIO(files[0])):
        return getattr(open_image(files[0])[0], "n_frames", 1)
    with open_video(io.BytesIO(files[0])) as container:
        return sum(packet.size > 0 for packet in container.demux(container.streams.video[0]))


# ---------------------------------------------------------------------------------------------------------------------
# Samples
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class ClipReader(ImageReader):
    """Turns the members of a sample into a clip of its bucket, which is frames, height and width."""

    num_frames: int = 1
    frame_interval: int = 1

    def find(self, members: dict[str, bytes]) -> list[bytes]:
        """The video among the members, or their pictures in the order of the numbers in their names."""
        if found := member_bytes(members, VIDEO_MEMBERS):
            return [found[1]]
        frames = [name for name in members if is_frame(name.removesuffix(".gz"))]
        if not frames:
            raise BadSample("no clip")
        frames.sort(key=lambda name: [int(word) if word.isdigit() else word for word in re.split(r"(\d+)", name)])
        return [member_bytes(members, [name.removesuffix(".gz")])[1] for name in frames]

    def original_size(self, files: list[bytes]) -> tuple[int, int]:
        try:
            return clip_size(io.BytesIO(files[0]))
        except BadSample:
            raise
        except Exception:  # PIL's decoders raise nearly anything on wrong bytes, and FFmpeg has errors of its own
            raise BadSample("broken clip") from None

    def geometry(self) -> list:
        return [*super().geometry(), self.num_frames, self.frame_interval]

    def read_pixels(self, files: list[bytes], rng: random.Random):
        original = self.original_size(files)
        placed, mirrored = self.place(original, rng)
        # The share of a long video's spare frames that goes before the clip: time is cropped as pictures are.
        before = {"center": 0.5, "corner": 0.0}.get(self.rules.crop_style, rng.random())
        span = (self.num_frames - 1) * self.frame_interval + 1
        try:
            count, frames = count_frames(files), []
            while len(frames) < self.num_frames:  # a second time where not all packets are frames
                if count < span:
                    raise BadSample(f"fewer than {span} frames")
                start = int(before * (count - span + 1))
                frames, count = self.read_frames(files, start, original, placed, mirrored)
        except BadSample:
            raise
        except Exception:  # as above
            raise BadSample("broken clip") from None
        pixels = torch.from_numpy(np.stack(frames)).permute(3, 0, 1, 2).contiguous()  # [F, H, W, 3] -> [3, F, H, W]
        return pixels, (*self.size_ids(original, placed, mirrored), self.num_frames, *placed.target)

    def read_frames(self, files, start: int, original, placed, mirrored) -> tuple[list[np.ndarray], int]:
        """The clip's frames from `start` on, [H, W, 3] each, and how many were read to find them."""
        frames, count = [], 0
        for index, picture in enumerate(decode(files)):
            count = index + 1
            if index >= start and (index - start) % self.frame_interval == 0:
                image = to_rgb(picture())
                if image.size != original[::-1]:
                    raise BadSample("frames of several sizes")
                frames.append(np.array(self.resize_and_crop(image, placed, mirrored)))
            if len(frames) == self.num_frames:
                break
        return frames, count


@dataclass
class PromptReader(ImageReader):
    """Turns a prompt that has no clip into a sample, with a size that the clip could have."""

    num_frames: int = 1
    sizes: tuple[tuple[int, int], ...] = ()

    def with_cache(self, store, filling: bool = False) -> "PromptReader":
        return self  # there are no latents

    def __call__(self, members: dict[str, bytes], visit: str, name: str = "") -> Sample:
        captions = read_captions(members, self.caption_strategy, name)
        size = random.Random(f"{self.seed} size {visit}").choice(self.sizes)
        return Sample(text_key(captions[0]), captions, captions[0], {}, None, (*size, 0, 0, self.num_frames, *size))


@dataclass
class CaptionReader(ClipReader):
    """Turns the members of a sample into a clip's caption and bucket, for training on generated clips alone."""

    def with_cache(self, store, filling: bool = False) -> "CaptionReader":
        return self  # there are no latents

    def __call__(self, members: dict[str, bytes], visit: str, name: str = "") -> Sample:
        return replace(super().__call__(members, visit, name), latents={})

    def geometry(self) -> list:
        return ["captions", *super().geometry()]

    def read_pixels(self, files: list[bytes], rng: random.Random):
        original = self.original_size(files)
        placed, mirrored = self.place(original, rng)
        return None, (*self.size_ids(original, placed, mirrored), self.num_frames, *placed.target)


def open_clip_readers(args, data: Data, reader_class=ClipReader) -> list[ImageReader]:
    """A reader for each dataset, of its clips or of prompts alone."""
    readers = []
    for dataset, reader in zip(data.datasets, open_readers(args, data), strict=True):
        if dataset.sizes:
            readers.append(PromptReader(**vars(reader), num_frames=dataset.num_frames, sizes=dataset.sizes))
        else:
            frames = {"num_frames": dataset.num_frames, "frame_interval": dataset.frame_interval}
            readers.append(reader_class(**vars(reader), **frames))
    return readers


def open_caption_readers(args, data: Data) -> list[ImageReader]:
    """A reader for each dataset that decodes no clip: captions and sizes are all that training takes."""
    return open_clip_readers(args, data, CaptionReader)


# ---------------------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------------------


def save_clip(clip: np.ndarray, path: Path, fps: int):
    """Save [F, H, W, 3] in [0, 1] as an mp4."""
    save_frames(to_bytes(clip), path, fps)


def save_frames(frames: Iterable[np.ndarray], path: Path, fps: int):
    """Save frames, [H, W, 3] each, bytes, as an mp4. Its sides are even: an odd one loses its last line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps)
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            frame = np.ascontiguousarray(frame[: len(frame) // 2 * 2, : frame.shape[1] // 2 * 2])
            if not stream.codec_context.is_open:
                stream.height, stream.width = frame.shape[:2]
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
