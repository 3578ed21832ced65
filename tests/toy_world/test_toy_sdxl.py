"""The toy SDXL: its pictures say what their size ids say, and its teacher hears them."""

import numpy as np
import pytest

from common.report import ClipScore
from tests.toy import make_clip, world
from tests.toy.make import BUCKETS, draw_originals, draw_views
from tests.toy.teacher import TOY, load, sample, sharpness, toy_prompts


def kinds(pictures, sizes):
    """Whole and sharp, enlarged, cut."""
    cut = (sizes[:, :2] > sizes[:, 4:]).sum(1) == 1
    small = (sizes[:, :2] < sizes[:, 4:]).all(1)
    return ~cut & ~small, small, cut


@pytest.mark.slow
@pytest.mark.parametrize("bucket", BUCKETS)
def test_views_are_what_their_size_ids_say(bucket):
    pictures, sizes, captions = draw_views(0, 400, *bucket)
    whole, small, cut = kinds(pictures, sizes)
    assert pictures.shape[1:3] == bucket and (sizes[:, 4:] == bucket).all()
    assert 0.5 < whole.mean() < 0.7 and 0.1 < small.mean() < 0.3 and 0.1 < cut.mean() < 0.3
    assert (sizes[~cut, 2:4] == 0).all()
    assert (sizes[:, 2:4] <= np.maximum(sizes[:, :2] - sizes[:, 4:], 0)).all()  # the crop lies in its original

    def followed(rows):
        return world.adherence(pictures[rows], [text for text, wanted in zip(captions, rows, strict=True) if wanted])

    assert followed(whole) > 0.99
    assert followed(cut) < 0.9  # some things are not where the caption says
    assert sharpness(pictures[small]) < 0.6 * sharpness(pictures[whole])


def test_originals_are_whole_and_of_many_sizes():
    images, captions = draw_originals(0, 240)
    sizes = [image.shape[:2] for image in images]
    assert all(sizes.count(bucket) > 40 for bucket in BUCKETS) and len(set(sizes)) > 6
    assert np.mean([world.follows(image, text) for image, text in zip(images, captions, strict=True)]) > 0.95


@pytest.fixture(scope="module")
def teacher():
    return load(TOY / "sdxl")


@pytest.mark.slow
@pytest.mark.parametrize("size", BUCKETS)
def test_the_teacher_follows_prompts_at_the_recipe_s_largest_guidance(teacher, size):
    prompts = toy_prompts(16)
    assert world.adherence(sample(teacher, prompts, 25, 13.0, 0, size), prompts) >= 0.8  # of 16; the table is exact


def height_of_things(images: np.ndarray) -> float:
    """Mean row of what is not background, in pixels from the top."""
    differs = np.abs(images.astype(int) - images[:, -1:, :1].astype(int)).sum(-1) > 60  # a corner is background
    rows = np.arange(images.shape[1])[None, :, None]
    return float(np.mean([(rows[0] * each).sum() / each.sum() for each in differs if each.any()]))


@pytest.mark.slow
def test_the_teacher_hears_size_ids(teacher):
    prompts = toy_prompts(16)
    whole = sample(teacher, prompts, 15, 4.0, 0)
    enlarged = sample(teacher, prompts, 15, 4.0, 0, original_size=(24, 24))
    cut = sample(teacher, prompts, 15, 4.0, 0, original_size=(96, 64), crops_coords_top_left=(32, 0))
    assert sharpness(enlarged) < 0.7 * sharpness(whole)
    assert height_of_things(cut) < height_of_things(whole) - 4.0  # a true cut moves what stays in sight up by 8 to 24
    assert world.adherence(cut, prompts) < world.adherence(whole, prompts) - 0.25


@pytest.mark.slow
def test_the_toy_s_clip_tells_a_caption_from_its_twin():
    """Twins differ in one attribute; 86% of 256 pairs that it has never seen."""
    score, count = ClipScore(str(TOY / "clip"), "cpu"), 128
    pictures, captions = make_clip.pairs(count, seed=1_000_000)
    twins = captions[count:] + captions[:count]
    assert (score(pictures, captions) > score(pictures, twins)).float().mean() > 0.8
