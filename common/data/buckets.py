"""Sizes: which bucket an image goes to, how it is resized for that, and what is cut from it.

A bucket is a target height and width, both multiples of the alignment. An image is resized once, so that it covers the
target, and cropped once. Sizes are (height, width) everywhere.
"""

import math
import random
from dataclasses import dataclass, replace

RESOLUTION_TYPES = ("pixel", "area", "pixel_area")
CROP_ASPECTS = ("square", "preserve")
CROP_STYLES = ("center", "random", "corner")

MEGAPIXEL = 1e6
MOST_DECIMALS = 9
MOST_RATIO = 8.0  # of a bucket's longer side to the shorter one


@dataclass(frozen=True)
class Rules:
    """How images of a dataset are sized and cropped.

    Limits are ("side", pixels of the shorter side) or ("area", pixels), or None for no limit.
    """

    resolution: float
    resolution_type: str = "pixel"
    alignment: int = 64
    decimals: int = 2  # of the ratio that names a bucket
    minimum: tuple[str, float] | None = None
    maximum: tuple[str, float] | None = None
    downsample: tuple[str, float] | None = None
    crop: bool = True  # False: to the bucket, and no more than the cover leaves over
    crop_aspect: str = "square"
    crop_style: str = "random"
    fixed_size_ids: bool = False  # the network is told that every original was of the resolution, and nothing was cut


@dataclass(frozen=True)
class Placement:
    """An image's size after the resize, and the crop that is taken from that."""

    resized: tuple[int, int]
    top: int
    left: int
    target: tuple[int, int]


def square_side(rules: Rules) -> float:
    """The side of the square of this resolution, before alignment."""
    return math.sqrt(rules.resolution * MEGAPIXEL) if rules.resolution_type == "area" else float(rules.resolution)


def aligned(length: float, alignment: int) -> int:
    return max(alignment, math.floor(length / alignment + 0.5) * alignment)


def one_bucket(rules: Rules) -> bool:
    """Whether all images go to one square."""
    return rules.crop and rules.crop_aspect == "square"


def target_size(height: int, width: int, rules: Rules) -> tuple[int, int]:
    """The bucket of an image: all of the same rounded ratio share it."""
    side, ratio = square_side(rules), 1.0
    if not one_bucket(rules):
        ratio = min(max(round(width / height, rules.decimals), 1.0 / MOST_RATIO), MOST_RATIO)
    if rules.resolution_type == "pixel":  # the shorter side
        height, width = side / min(ratio, 1.0), side * max(ratio, 1.0)
    else:
        height, width = side / math.sqrt(ratio), side * math.sqrt(ratio)
    return aligned(height, rules.alignment), aligned(width, rules.alignment)


def targets_in_shapes(shapes: list[tuple[int, int]] | None, rules: Rules) -> tuple[tuple[int, int], ...]:
    """Buckets of this resolution in the shapes of these sizes; a square where there are none."""
    keep = replace(rules, crop=False)
    return tuple(dict.fromkeys(target_size(*shape, keep) for shape in shapes or [(1, 1)]))


def measured(height: float, width: float, limit: tuple[str, float]) -> float:
    """An image's size in the limit's own unit."""
    return min(height, width) if limit[0] == "side" else height * width


def too_small(height: int, width: int, rules: Rules) -> bool:
    return rules.minimum is not None and measured(height, width, rules.minimum) < rules.minimum[1]


def place(height: int, width: int, target: tuple[int, int], rules: Rules, rng: random.Random) -> Placement:
    """Resize and crop that bring an image into its bucket.

    It is resized to the smallest size that covers the bucket, or to a larger one where `downsample` leaves more to cut.
    """
    if target[1] * height >= target[0] * width:
        resized = max(target[0], round(height * target[1] / width)), target[1]
    else:
        resized = target[0], max(target[1], round(width * target[0] / height))
    too_large = rules.maximum is not None and measured(height, width, rules.maximum) > rules.maximum[1]
    if rules.crop and too_large:
        kind, wanted = rules.downsample
        scale = wanted / measured(height, width, rules.downsample)
        scale = min(1.0, scale if kind == "side" else math.sqrt(scale))
        shrunk = round(height * scale), round(width * scale)
        if shrunk[0] >= target[0] and shrunk[1] >= target[1]:
            resized = shrunk
    spare_y, spare_x = resized[0] - target[0], resized[1] - target[1]
    if rules.crop_style == "center":
        top, left = spare_y // 2, spare_x // 2
    elif rules.crop_style == "corner":
        top, left = 0, 0
    else:
        left, top = rng.randint(0, spare_x), rng.randint(0, spare_y)
    return Placement(resized, top, left, target)


def nearest_bucket(bucket: tuple[int, int], among: list[tuple[int, int]]) -> tuple[int, int]:
    """The bucket of the nearest ratio; of two equally near ones the smaller."""

    def distance(other):
        ratio = math.log(bucket[1] / bucket[0]) - math.log(other[1] / other[0])
        return round(abs(ratio), 9), other

    return min(among, key=distance)


def merge_small(buckets: list[tuple[int, int]], counts: dict[tuple[int, int], int], least: int) -> dict:
    """For each of a dataset's buckets that has fewer samples than `least`, the larger one that takes them."""
    large = [bucket for bucket in buckets if counts[bucket] >= least]
    return {bucket: nearest_bucket(bucket, large) for bucket in buckets if large and bucket not in large}


def with_settings(rules: Rules, settings: dict, where: str, notes: list[str]) -> Rules:
    """Rules changed by what a dataset's entry or the command line says of sizes; `where` stands before names in errors.

    Sizes of an entry are in the entry's unit, sizes of the command line in its own: one may be megapixels, one pixels.
    """
    changes = {key: settings[key] for key in ("resolution", "resolution_type", "crop", "crop_aspect", "crop_style")
               if settings.get(key) is not None}  # fmt: skip
    rules = replace(rules, **changes)
    for key, field in (("minimum_image_size", "minimum"), ("maximum_image_size", "maximum"), ("target_downsample_size", "downsample")):  # fmt: skip  # noqa: E501
        if settings.get(key) is not None:
            rules = replace(rules, **{field: size_limit(f"{where}{key}", settings[key], rules.resolution_type, notes)})
    if (rounding := settings.get("aspect_bucket_rounding")) is not None:
        if rounding < 1:
            raise ValueError(f"{where}aspect_bucket_rounding {rounding}: must be at least 1")
        if rounding > MOST_DECIMALS:
            notes.append(
                f"{where}aspect_bucket_rounding {rounding}: decimals are 1 to {MOST_DECIMALS}; taken for what it must "
                f"mean, an alignment of {rounding} pixels"
            )
            rules = replace(rules, alignment=rounding)
        else:
            rules = replace(rules, decimals=rounding)
    return rules


def size_limit(name: str, value: float, resolution_type: str, notes: list[str]) -> tuple[str, float] | None:
    if not 0.0 <= value < math.inf:
        raise ValueError(f"{name} {value}: must not be negative")
    if value == 0.0:
        return None
    if resolution_type == "pixel" and value <= 10.0:
        notes.append(f"{name} {value:g}: taken for megapixels, as no image is so few pixels wide")
        resolution_type = "area"
    return {
        "pixel": ("side", value),
        "area": ("area", value * MEGAPIXEL),
        "pixel_area": ("area", value * value),
    }[resolution_type]


def complete_rules(rules: Rules, where: str, notes: list[str]) -> Rules:
    """Rules with all that follows from their other settings; errors are of settings that do not fit each other."""
    if rules.maximum is None and rules.downsample is not None:
        raise ValueError(f"{where}target_downsample_size: needs maximum_image_size")
    if rules.maximum is not None and rules.downsample is None:
        notes.append(f"{where}maximum_image_size: is also the target_downsample_size, as none is given")
        rules = replace(rules, downsample=rules.maximum)
    if not 0.0 < rules.resolution < math.inf:
        raise ValueError(f"{where}resolution {rules.resolution:g}: must be positive")
    if rules.resolution_type == "area" and rules.resolution > 100.0:
        raise ValueError(
            f"{where}resolution {rules.resolution:g} with resolution_type area is in megapixels; "
            "pixel_area takes a side in pixels"
        )
    if rules.resolution_type != "area" and rules.resolution <= 10.0:
        raise ValueError(
            f"{where}resolution {rules.resolution:g} with resolution_type {rules.resolution_type} is in pixels; "
            "area takes megapixels"
        )
    if square_side(rules) < rules.alignment / 2:
        raise ValueError(f"{where}resolution {rules.resolution:g}: less than the alignment of {rules.alignment}")
    return rules


# ---------------------------------------------------------------------------------------------------------------------
# Frames: a video VAE keeps the first and makes one latent frame of each `frames_per_latent` that follow
# ---------------------------------------------------------------------------------------------------------------------


def latent_frames(frames: int, frames_per_latent: int) -> int:
    return (frames - 1) // frames_per_latent + 1


def pixel_frames(latents: int, frames_per_latent: int) -> int:
    return (latents - 1) * frames_per_latent + 1


def check_frame_count(name: str, frames: int, frames_per_latent: int):
    below = pixel_frames(max(1, latent_frames(frames, frames_per_latent)), frames_per_latent)
    if frames != below:
        raise ValueError(
            f"{name} {frames}: must be {frames_per_latent}k + 1, as {below} or {below + frames_per_latent}"
        )
