"""Which bucket an image goes to, and what is resized and cropped for it."""

import random

import numpy as np
import pytest

from common.data.buckets import Rules, place, target_size

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
