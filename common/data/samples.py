"""One sample, image and caption, from the members that a shard or another part of a dataset has of it.

Nothing is decoded but images, text and JSON. A bad sample is skipped and counted by its cause.
"""

import gzip
import hashlib
import io
import json
import random
import warnings
import zlib
from collections import Counter
from dataclasses import asdict, dataclass, field, replace

import numpy as np
import torch
from PIL import Image, ImageOps
from safetensors.torch import load, save

from common.cache import TensorStore
from common.data.buckets import Placement, Rules, place, square_side, target_size, too_small
from common.data.shards import IMAGE_MEMBERS, MOST_MEMBER_BYTES
from common.data.sources import true_size

CAPTION_MEMBERS = ("text", "txt", "caption")
JSON_CAPTION_KEYS = ("caption", "text", "txt", "prompt")
PICKLES = ("pyd", "pkl", "pickle", "pth", "pt")

RESAMPLING = {kind.name.lower(): kind for kind in Image.Resampling} | {"nearest_exact": Image.Resampling.NEAREST}


class BadSample(Exception):
    """A sample that cannot be used; the message is the cause that the report counts."""


class NoGoodSamples(SystemExit):
    """Raised when every shard was read to its end and none has a sample that can be used."""


@dataclass
class Sample:
    """A picture or a clip with its caption, as training meets it in one visit."""

    key: str  # hash of the image's, or the clip's, bytes
    captions: list[str]  # all there are to choose from
    caption: str  # this visit's
    latents: dict[str, torch.Tensor] | None  # what the cache has of it
    pixels: torch.Tensor | None  # uint8 [3, H, W], of a clip [3, F, H, W], where the cache has nothing
    size_ids: tuple[int, ...]  # H and W of the original, top and left of the crop, its bucket
    dataset: int = 0  # which one
    position: int = -1  # in the global sequence
    cursor: tuple[int, ...] = ()  # lane, epoch, shard in the lane, members of it that were read
    faults: Counter = field(default_factory=Counter)  # samples skipped since the one before, by cause

    @property
    def bucket(self) -> tuple[int, ...]:
        """H and W of an image; F, H and W of a clip."""
        return self.size_ids[4:]

    def __getstate__(self):  # on the way from a reader process small tensors are much slower than their bytes
        return self.__dict__ | {"latents": save(self.latents) if self.latents else self.latents}

    def __setstate__(self, state):
        self.__dict__ |= state | {"latents": load(state["latents"]) if state["latents"] else state["latents"]}


def member_bytes(members: dict[str, bytes], names) -> tuple[str, bytes] | None:
    """The first member with one of these extensions, gunzipped where it is name.gz."""
    for name in names:
        found = name if name in members else f"{name}.gz"
        if found not in members:
            continue
        data = members[found]
        if found != name and data is not None:
            try:
                with gzip.open(io.BytesIO(data)) as file:
                    data = file.read(MOST_MEMBER_BYTES + 1)
            except (OSError, EOFError, zlib.error):
                raise BadSample("broken gzip member") from None
        if data is None or len(data) > MOST_MEMBER_BYTES:
            raise BadSample(f"member above {MOST_MEMBER_BYTES >> 20} MiB")
        return name, data
    return None


def read_captions(members: dict[str, bytes], strategy: str | None, name: str) -> list[str]:
    """All captions to choose from: each line of a `textfile`, else the text as it is, or a list in JSON."""
    try:
        if strategy == "filename":
            name.encode()  # a file system may hold names that are no text
            texts = [name.replace("_", " ")]
        elif found := member_bytes(members, CAPTION_MEMBERS):
            text = found[1].decode("utf-8-sig" if strategy else "utf-8")
            texts = text.splitlines() if strategy == "textfile" else [text]
        elif found := member_bytes(members, ["json"]):
            values = json.loads(found[1])
            given = [values[key] for key in JSON_CAPTION_KEYS if isinstance(values.get(key), str | list)]
            texts = given[:1] if given and isinstance(given[0], str) else given[0] if given else []
        else:
            texts = []
    except UnicodeError:
        raise BadSample("caption is not UTF-8") from None
    except (ValueError, AttributeError, RecursionError):
        raise BadSample("broken JSON") from None
    texts = [text.strip() for text in texts if isinstance(text, str) and text.strip()]
    if not texts:
        raise BadSample("missing caption")
    return texts


def to_rgb(image: Image.Image) -> Image.Image:
    """An image of any mode in 8-bit RGB: 16 bits are scaled and not cut off, what is transparent becomes white."""
    if image.mode in ("I", "F"):
        raise BadSample("image of 32 bits a channel")  # nothing says what is white
    if image.mode.startswith("I;16"):
        image = Image.fromarray(np.round(np.asarray(image) / 257.0).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


@dataclass
class ImageReader:
    """Turns the members of a sample of one dataset into pixels of its bucket."""

    rules: Rules
    interpolation_type: str
    random_flip: bool
    seed: int
    cache: TensorStore | None = None  # of latents; crop and flip then follow from the image and not from the visit
    filling: bool = False  # ask the cache's index alone
    dataset: int = 0
    caption_strategy: str | None = None
    merged: dict[tuple[int, int], tuple[int, int]] = field(default_factory=dict)  # small buckets, and where they go
    instance_prompt: str | None = None  # the caption of all

    def __call__(self, members: dict[str, bytes], visit: str, name: str = "") -> Sample:
        """The sample of these members. `visit` seeds every random number of this visit; `name` is the file's."""
        files = self.find(members)
        if not all(files):
            raise BadSample("empty image")
        captions = [self.instance_prompt] if self.instance_prompt else None
        captions = captions or read_captions(members, self.caption_strategy, name)
        caption = captions[0]
        if len(captions) > 1:
            caption = random.Random(f"{self.seed} caption {visit}").choice(captions)
        key = hashlib.blake2b(b"".join(files), digest_size=16).hexdigest()
        place_seed = f"{self.seed} {visit if self.cache is None else key}"
        if self.cache is not None and self.merged:  # a record of its own for what is not in its own bucket
            original = self.original_size(files)
            own, target = target_size(*original, self.rules), self.target(original)
            key += f"-{target[0]}x{target[1]}" if target != own else ""
        latents, pixels, size_ids = None, None, ()
        if self.cache is not None:
            latents = ({} if key in self.cache else None) if self.filling else self.cache.get(key)
        elif self.filling:
            latents = {}  # no cache has any: captions alone are wanted
        if latents:
            size_ids = tuple(latents["size_ids"].tolist())
        elif latents is None:
            pixels, size_ids = self.read_pixels(files, random.Random(place_seed))
        ignored = {"pickle member (ignored)": 1} if any(name.split(".")[0] in PICKLES for name in members) else {}
        return Sample(key, captions, caption, latents, pixels, size_ids, self.dataset, faults=Counter(ignored))

    def with_cache(self, store: TensorStore | None, filling: bool = False) -> "ImageReader":
        return replace(self, cache=store, filling=filling)

    def find(self, members: dict[str, bytes]) -> list[bytes]:
        """The image among the members."""
        found = member_bytes(members, IMAGE_MEMBERS)
        if found is None:
            raise BadSample("no image")
        return [found[1]]

    def original_size(self, files: list[bytes]) -> tuple[int, int]:
        return open_image(files[0], header_only=True)[1]

    def geometry(self) -> list:
        """All that shapes a cached record besides the image and its encoder."""
        seed = self.seed if self.random_flip or self.rules.crop_style == "random" else None
        rules = asdict(self.rules) | {"resolution": float(self.rules.resolution)}
        return [*rules.items(), self.interpolation_type, self.random_flip, seed]

    def target(self, original: tuple[int, int]) -> tuple[int, int]:
        target = target_size(*original, self.rules)
        return self.merged.get(target, target)

    def place(self, original: tuple[int, int], rng: random.Random) -> tuple[Placement, bool]:
        """Where an image of this size goes, and whether it is mirrored."""
        if too_small(*original, self.rules):
            raise BadSample("below minimum_image_size")
        placed = place(*original, self.target(original), self.rules, rng)
        if placed.resized[0] * placed.resized[1] > Image.MAX_IMAGE_PIXELS:
            raise BadSample("image bomb")  # a line of pixels
        return placed, self.random_flip and rng.random() < 0.5

    def resize_and_crop(self, image: Image.Image, placed: Placement, mirrored: bool) -> Image.Image:
        height, width = placed.resized
        image = image.resize((width, height), RESAMPLING[self.interpolation_type])
        image = image.crop((placed.left, placed.top, placed.left + placed.target[1], placed.top + placed.target[0]))
        return ImageOps.mirror(image) if mirrored else image

    def size_ids(self, original: tuple[int, int], placed: Placement, mirrored: bool) -> tuple[int, ...]:
        """H and W of the original, top and left of the crop."""
        if self.rules.fixed_size_ids:
            return (round(square_side(self.rules)),) * 2 + (0, 0)
        # the crop's left edge in the mirrored picture
        left = placed.resized[1] - placed.target[1] - placed.left if mirrored else placed.left
        return (*original, placed.top, left)

    def read_pixels(self, files: list[bytes], rng: random.Random):
        image, original = open_image(files[0])
        placed, mirrored = self.place(original, rng)
        height, width = placed.resized
        try:
            # JPEG decodes at a half, a quarter or an eighth for free, as long as that leaves twice what is needed.
            turned = image.size != original[::-1]
            image.draft("RGB", (2 * height, 2 * width) if turned else (2 * width, 2 * height))
            image = to_rgb(ImageOps.exif_transpose(image))
        except BadSample:
            raise
        except Exception:  # PIL's decoders raise nearly anything on wrong bytes
            raise BadSample("broken image") from None
        image = np.array(self.resize_and_crop(image, placed, mirrored))
        pixels = torch.from_numpy(image).permute(2, 0, 1).contiguous()  # [H, W, 3] -> [3, H, W]
        return pixels, (*self.size_ids(original, placed, mirrored), *placed.target)


def open_image(data: bytes, header_only: bool = False) -> tuple[Image.Image, tuple[int, int]]:
    """The image and its true height and width."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data))
        return image, true_size(image, header_only)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise BadSample("image bomb") from None
    except Exception:  # PIL's decoders raise nearly anything on wrong bytes
        raise BadSample("broken image") from None


def open_readers(args, data) -> list[ImageReader]:
    """A reader for each dataset of the data, which are a common.data.datasets.Data."""
    return [
        ImageReader(
            dataset.rules, args.interpolation_type, args.random_flip, args.seed, dataset=i,
            caption_strategy=dataset.caption_strategy, merged=dataset.merged, instance_prompt=dataset.instance_prompt,
        )
        for i, dataset in enumerate(data.datasets)
    ]  # fmt: skip
