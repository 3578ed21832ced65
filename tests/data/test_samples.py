"""What becomes of an image and its caption, and of those that are no good."""

import io
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from common.data.datasets import plan_buckets
from common.data.shards import read_shard
from common.data.sources import image_size
from tests.data.helpers import (
    Accelerator,
    backend,
    entry,
    faulty_shards,
    many,
    parse,
    picture,
    quadrants,
    read_one,
    reader,
    samples_of,
    toy_sized,
)
from tests.helpers import encoded, write_shard


def corners(width: int, height: int) -> Image.Image:
    """Brightness rises from left to right."""
    return Image.fromarray(
        np.broadcast_to(np.linspace(0, 255, width)[None, :, None], (height, width, 3)).astype(np.uint8)
    )


def read(image: Image.Image, visit="v", **changes):
    return reader(**changes)({"png": encoded(image), "txt": b"x"}, visit)


# ---------------------------------------------------------------------------------------------------------------------
# Pixels
# ---------------------------------------------------------------------------------------------------------------------


def test_size_ids_are_height_before_width():
    sample = read(corners(64, 32))
    assert sample.pixels.shape == (3, 16, 16) and sample.pixels.dtype == torch.uint8
    assert sample.size_ids == (32, 64, 0, 8, 16, 16)  # resized to 32 x 16, cropped at its centre


def test_crop_offset_is_the_crop_that_was_taken():
    image = corners(64, 32)
    wide = np.asarray(image.resize((32, 16), Image.Resampling.BILINEAR))
    tops = set()
    for visit in range(20):
        sample = read(image, visit=str(visit), center_crop=False)
        _, _, top, left, _, _ = sample.size_ids
        assert np.array_equal(sample.pixels.permute(1, 2, 0).numpy(), wide[top : top + 16, left : left + 16])
        tops.add(left)
    assert len(tops) > 5
    same = [read(image, visit="7", center_crop=False).size_ids for _ in range(2)]
    assert same[0] == same[1]


def test_a_mirrored_crop_knows_where_it_was_taken():
    image = corners(64, 32)
    mirrored = np.asarray(image.resize((32, 16), Image.Resampling.BILINEAR))[:, ::-1]
    flips = 0
    for visit in range(40):
        sample = read(image, visit=str(visit), center_crop=False, random_flip=True)
        pixels, left = sample.pixels.permute(1, 2, 0).numpy(), sample.size_ids[3]
        if pixels[0, 0, 0] > pixels[0, -1, 0]:
            flips += 1
            assert np.array_equal(pixels, mirrored[:, left : left + 16])
    assert 10 <= flips <= 30


def test_orientation_is_honoured():
    image, exif = corners(64, 32), Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    file = io.BytesIO()
    image.save(file, "png", exif=exif)
    sample = reader()({"png": file.getvalue(), "txt": b"x"}, "v")
    assert sample.size_ids[:2] == (64, 32)
    column = sample.pixels[0, :, 8].float()
    assert column[-1] > column[0]  # what was left is now up


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_tiff_stands_as_other_pictures_do(orientation, tmp_path):
    """PIL turns it itself."""
    exif, found = Image.Exif(), []
    exif[0x0112] = orientation
    for kind in ("png", "tiff"):
        quadrants(32, 64).save(tmp_path / f"a.{kind}", exif=exif)
        sample = reader(center_crop=False)({kind[:3]: (tmp_path / f"a.{kind}").read_bytes(), "txt": b"x"}, "v")
        found.append((sample.size_ids, sample.pixels.tolist()))
        assert image_size(tmp_path / f"a.{kind}") == sample.size_ids[:2]
    assert found[0] == found[1]


def test_bmp_and_tiff(tmp_path):
    """16 bits are scaled; of 32 bits nothing says how far they go."""
    grey = np.full((16, 20), 32896, np.uint16)  # 128 * 257
    pictures = {"bmp.bmp": picture(), "rgb.tif": picture(), "cmyk.TIFF": picture("CMYK")}
    pictures |= {"grey.tiff": Image.fromarray(grey), "big.tif": Image.fromarray(grey.astype(">u2"))}
    pictures |= {f"{kind}.tif": Image.fromarray(grey.astype(kind)) for kind in ("int32", "float32")}
    for name, image in pictures.items():
        image.save(tmp_path / name)
        (tmp_path / name).with_suffix(".txt").write_text("x")
    (tmp_path / "broken.bmp").write_bytes(b"BM" + bytes(50))
    (tmp_path / "broken.txt").write_text("x")
    found = samples_of(parse("--train_data_dir", tmp_path, "--resolution", 16, "--bucket_alignment", 8))
    assert found.pop("faults") == {"image of 32 bits a channel": 2, "broken image": 1}
    assert found.keys() == {"bmp", "rgb", "cmyk", "grey", "big"}
    assert all(found[name].pixels.unique().tolist() == [128] for name in ("grey", "big"))


@pytest.mark.parametrize("kind", ["bilinear", "bicubic", "box", "nearest", "nearest_exact", "hamming", "lanczos"])
def test_interpolation(kind):
    assert read(corners(64, 32), interpolation_type=kind).pixels.shape == (3, 16, 16)


def test_the_original_size_survives_jpegs_fast_decoding():
    """Decoded at an eighth, 101 x 103 is a square: only EXIF says whether the picture was turned."""
    image = Image.fromarray(np.zeros((103, 101, 3), np.uint8))
    sample = reader(resolution=4)({"jpg": encoded(image, "jpeg"), "txt": b"x"}, "v")
    assert sample.size_ids[:2] == (103, 101)


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


def test_what_the_network_is_told_may_be_fixed(folder):
    run = parse("--train_data_dir", folder, "--resolution", 128, "--center_crop", "--use_fix_crop_and_size")
    assert samples_of(run)["wide_one"].size_ids == (128, 128, 0, 0, 128, 128)
    run = parse("--train_data_dir", folder, "--resolution", 128, "--center_crop")
    assert samples_of(run)["wide_one"].size_ids == (300, 600, 0, 64, 128, 128)


def test_images_of_small_buckets_are_cut_for_another(tmp_path):
    run = toy_sized(many(tmp_path / "f", {(64, 64): 5, (32, 128): 1}), "--train_batch_size", 4)
    found = samples_of(replace(run, data=plan_buckets(run.args, run.data, Accelerator())))
    assert {sample.bucket for name, sample in found.items() if name != "faults"} == {(64, 64)}
    assert found["32_128_000"].size_ids[:2] == (32, 128) and found["32_128_000"].pixels.shape == (3, 64, 64)


# ---------------------------------------------------------------------------------------------------------------------
# Captions
# ---------------------------------------------------------------------------------------------------------------------


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


# ---------------------------------------------------------------------------------------------------------------------
# Faults
# ---------------------------------------------------------------------------------------------------------------------


def test_exact_counts_of_a_shard_with_one_lane(tmp_path):
    shards, causes, _ = faulty_shards(tmp_path)
    good = write_shard(tmp_path / "z.tar", [{"png": encoded(picture()), "txt": b"last"}])
    found = Counter()
    for shard in [*shards, str(good)]:
        for _, members in read_shard(shard):
            try:
                if isinstance(members, str):
                    found[members] += 1
                else:
                    found.update(reader()(members, "v").faults)
            except Exception as cause:
                found[str(cause)] += 1
    assert found == causes | {"truncated shard": 1, "unreadable shard": 1}


def test_a_line_of_pixels_is_an_image_bomb():
    """Its shorter side is enlarged to the resolution, and its longer one with it."""
    with pytest.raises(Exception, match="image bomb"):
        read(Image.new("RGB", (1, 60_000)), resolution=64)
    assert read(Image.new("RGB", (1, 600)), resolution=64).size_ids[:2] == (600, 1)
