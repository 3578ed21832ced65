"""Images and captions from WebDataset shards.

Nothing is decoded but images, text and JSON. A bad sample is skipped and counted by its cause.
"""

import gzip
import hashlib
import http.client
import io
import json
import random
import subprocess
import tarfile
import urllib.request
import warnings
import zlib
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from braceexpand import braceexpand
from PIL import Image, ImageOps
from safetensors.torch import load, save

from common.cache import TensorStore

SHARD_ERRORS = (OSError, EOFError, http.client.HTTPException, tarfile.TarError, zlib.error)
IMAGE_MEMBERS = ("jpg", "png", "jpeg", "webp")
CAPTION_MEMBERS = ("text", "txt", "caption")
JSON_CAPTION_KEYS = ("caption", "text", "txt", "prompt")
PICKLES = ("pyd", "pkl", "pickle", "pth", "pt")
MOST_MEMBER_BYTES = 1 << 28
EXIF_ORIENTATION = 0x0112
RESAMPLING = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "box": Image.Resampling.BOX,
    "nearest": Image.Resampling.NEAREST,
    "nearest_exact": Image.Resampling.NEAREST,
    "hamming": Image.Resampling.HAMMING,
    "lanczos": Image.Resampling.LANCZOS,
}


class BadSample(Exception):
    """Its message is the cause that the report counts."""


class NoGoodSamples(Exception):
    """Every shard was read to its end without one sample that can be used."""


@dataclass
class Sample:
    key: str  # hash of the image's bytes
    caption: str
    latents: dict[str, torch.Tensor] | None  # what the cache has of it
    pixels: torch.Tensor | None  # uint8 [3, H, W], where the cache has nothing
    size_ids: tuple[int, ...]  # H and W of the original, top and left of the crop, H and W of the crop
    position: int = -1  # in the global sequence
    cursor: tuple[int, ...] = ()  # lane, epoch, shard in the lane, members of it that were read
    faults: Counter = field(default_factory=Counter)  # samples skipped since the one before, by cause

    def __getstate__(self):  # on the way from a reader process small tensors are much slower than their bytes
        return self.__dict__ | {"latents": save(self.latents) if self.latents else self.latents}

    def __setstate__(self, state):
        self.__dict__ |= state | {"latents": load(state["latents"]) if state["latents"] else state["latents"]}


# ---------------------------------------------------------------------------------------------------------------------
# Shards
# ---------------------------------------------------------------------------------------------------------------------


def expand_shards(spec: str) -> list[str]:
    """Paths and URLs of a brace-expanded string; `::` separates several."""
    return [shard for part in spec.split("::") for shard in braceexpand(part)]


def is_local(shard: str) -> bool:
    return not shard.startswith(("pipe:", "http://", "https://"))


def shard_fingerprint(shard: str) -> str:
    """Changes where a local shard does."""
    path = Path(shard).resolve()
    status = path.stat()
    return hashlib.blake2b(f"{path} {status.st_size} {status.st_mtime_ns}".encode(), digest_size=8).hexdigest()


class StrictTarInfo(tarfile.TarInfo):
    """tarfile takes a header that is damaged or cut off for the archive's end; here it is an error."""

    @classmethod
    def fromtarfile(cls, tar):
        try:
            return super().fromtarfile(tar)
        except tarfile.EOFHeaderError:
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(str(error)) from None


def open_shard(shard: str):
    """A readable binary stream, and what to call once it is at its end."""
    if shard.startswith("pipe:"):
        # In a session of its own, or Ctrl-C would cut the shard off before the last checkpoint is saved.
        process = subprocess.Popen(shard[len("pipe:") :], shell=True, stdout=subprocess.PIPE, start_new_session=True)
        return process.stdout, process.wait
    if shard.startswith(("http://", "https://")):
        return urllib.request.urlopen(shard, timeout=60), lambda: 0
    return open(shard, "rb"), lambda: 0


def read_shard(shard: str):
    """Yields (key, members) for each sample of a tar, or (key, cause) for one that cannot be used."""
    seen, key, members = set(), None, {}

    def finished():
        return (key, "duplicate key") if key in seen else (key, members)

    try:
        stream, at_end = open_shard(shard)
        with stream, tarfile.open(fileobj=stream, mode="r|*", tarinfo=StrictTarInfo) as tar:
            for info in tar:
                if not info.isfile():
                    continue
                folder, _, name = info.name.rpartition("/")
                stem, _, extension = name.partition(".")
                if f"{folder}/{stem}" != key or extension.lower() in members:
                    if members:
                        yield finished()
                        seen.add(key)
                    key, members = f"{folder}/{stem}", {}
                if info.size > MOST_MEMBER_BYTES:
                    members[extension.lower()] = b""
                else:
                    members[extension.lower()] = tar.extractfile(info).read()
            # What follows the archive's end is padding: read it, or the program behind a pipe dies of SIGPIPE.
            while stream.read(1 << 20):
                pass
        if members:
            yield finished()
        if at_end() != 0:
            yield key, "shard's command failed"
    except SHARD_ERRORS:
        yield key, "unreadable shard" if key is None else "truncated shard"


def count_samples(shards: list[str]) -> int | None:
    """Samples in local shards, from the tar headers alone; None where a shard is not local."""
    if not all(map(is_local, shards)):
        return None
    total = 0
    for shard in shards:
        keys = set()
        try:
            with tarfile.open(shard) as tar:
                for info in tar:
                    folder, _, name = info.name.rpartition("/")
                    keys.add((folder, name.partition(".")[0]))
        except SHARD_ERRORS:
            pass  # counted as faults when the shard is read
        total += len(keys)
    return total


# ---------------------------------------------------------------------------------------------------------------------
# One sample
# ---------------------------------------------------------------------------------------------------------------------


def member_bytes(members: dict[str, bytes], names) -> tuple[str, bytes] | None:
    """First member with one of these extensions, gunzipped where it is name.gz."""
    for name in names:
        if name in members:
            return name, members[name]
        if name + ".gz" in members:
            try:
                with gzip.open(io.BytesIO(members[name + ".gz"])) as file:
                    return name, file.read(MOST_MEMBER_BYTES)
            except (OSError, EOFError, zlib.error):
                raise BadSample("broken gzip member") from None
    return None


def read_caption(members: dict[str, bytes]) -> str:
    try:
        if found := member_bytes(members, CAPTION_MEMBERS):
            text = found[1].decode("utf-8")
        elif found := member_bytes(members, ["json"]):
            values = json.loads(found[1])
            text = next((values[key] for key in JSON_CAPTION_KEYS if isinstance(values.get(key), str)), "")
        else:
            text = ""
    except UnicodeDecodeError:
        raise BadSample("caption is not UTF-8") from None
    except (ValueError, AttributeError, RecursionError):
        raise BadSample("broken JSON") from None
    if not text.strip():
        raise BadSample("missing caption")
    return text.strip()


def to_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB of any mode: 16 bits are scaled and not cut off, transparency lies on white."""
    if image.mode.startswith("I;16"):
        image = Image.fromarray(np.round(np.asarray(image) / 257.0).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


@dataclass
class ImageReader:
    """Turns the members of a sample into pixels: the shorter side becomes `resolution`, then one square crop."""

    resolution: int
    interpolation_type: str
    center_crop: bool
    random_flip: bool
    seed: int
    cache: TensorStore | None = None  # of latents; crop and flip then follow from the image and not from the visit
    filling: bool = False  # ask the cache's index alone

    def __call__(self, members: dict[str, bytes], visit: str) -> Sample:
        found = member_bytes(members, IMAGE_MEMBERS)
        if found is None:
            raise BadSample("no image")
        data = found[1]
        if not data:
            raise BadSample("empty image")
        caption = read_caption(members)
        key = hashlib.blake2b(data, digest_size=16).hexdigest()
        latents, pixels, size_ids = None, None, ()
        if self.cache is not None:
            latents = ({} if key in self.cache else None) if self.filling else self.cache.get(key)
        if latents is None:
            rng = random.Random(f"{self.seed} {visit if self.cache is None else key}")
            pixels, size_ids = self.read_pixels(data, rng)
        ignored = {"pickle member (ignored)": 1} if any(name.split(".")[0] in PICKLES for name in members) else {}
        return Sample(key, caption, latents, pixels, size_ids, faults=Counter(ignored))

    def read_pixels(self, data: bytes, rng: random.Random):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", Image.DecompressionBombWarning)
                image = Image.open(io.BytesIO(data))
            original = image.size
            if image.getexif().get(EXIF_ORIENTATION, 1) >= 5:  # lies on its side
                original = original[::-1]
            # JPEG decodes at a half, a quarter or an eighth for free, as long as that leaves twice what is needed.
            image.draft("RGB", (2 * self.resolution, 2 * self.resolution))
            image = to_rgb(ImageOps.exif_transpose(image))
        except (Image.DecompressionBombError, Image.DecompressionBombWarning):
            raise BadSample("image bomb") from None
        except Exception:  # PIL's decoders raise nearly anything on wrong bytes
            raise BadSample("broken image") from None
        size, short = self.resolution, min(image.size)
        resized = tuple(max(size, round(side * size / short)) for side in image.size)
        if resized[0] * resized[1] > Image.MAX_IMAGE_PIXELS:
            raise BadSample("image bomb")  # a line of pixels
        image = image.resize(resized, RESAMPLING[self.interpolation_type])
        spare_x, spare_y = image.width - size, image.height - size
        if self.center_crop:
            left, top = spare_x // 2, spare_y // 2
        else:
            left, top = rng.randint(0, spare_x), rng.randint(0, spare_y)
        image = image.crop((left, top, left + size, top + size))
        if self.random_flip and rng.random() < 0.5:
            image = ImageOps.mirror(image)
            left = spare_x - left  # where the crop lies in the mirrored picture
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()  # [H, W, 3] -> [3, H, W]
        return pixels, (original[1], original[0], top, left, size, size)
