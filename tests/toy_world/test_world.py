"""The toy world's oracle and its Fréchet distance."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from tests.toy import report as toy_report
from tests.toy import world
from tests.toy.make import draw
from tests.toy.report import report


@pytest.mark.parametrize(
    "size", [(64, 64), *(pytest.param(size, marks=pytest.mark.slow) for size in ((48, 80), (80, 48)))]
)
def test_the_oracle_reads_what_was_drawn(size):
    images, captions = draw(3, 400, *size)
    assert world.adherence(images, captions) >= 0.995


def test_the_oracle_sees_every_attribute():
    scene = world.Scene("white", (world.Thing("circle", "red", "large", "on the left"),))
    image = world.draw_scene(scene, np.random.default_rng(0))
    right = "a large red circle on the left on a white background"
    assert world.follows(image, right)
    for old, new in (
        ("large", "small"),
        ("red", "purple"),
        ("circle", "square"),
        ("on the left", "in the center"),
        ("white", "cyan"),
        ("on the left", "on the left and a small blue cross on the right"),
    ):
        assert not world.follows(image, right.replace(old, new))


def test_noise_and_emptiness_show_no_scene():
    rng = np.random.default_rng(0)
    assert world.read_image(rng.integers(0, 256, (64, 64, 3)).astype(np.uint8)) is None
    assert world.read_image(np.full((64, 64, 3), 200, np.uint8)) is None


def test_captions_read_back():
    rng = np.random.default_rng(1)
    for _ in range(200):
        scene = world.sample_scene(rng)
        assert world.read_caption(world.caption(scene)) == scene


def test_frechet_distance_of_gaussians():
    """Between N(0, 1) and N(m, s^2) in each of d dimensions it is d * (m^2 + (1 - s)^2)."""
    rng = np.random.default_rng(2)
    a, b = rng.normal(0, 1, (200_000, 4)), rng.normal(0.5, 2.0, (200_000, 4))
    assert world.frechet_distance(a, b) == pytest.approx(4 * (0.25 + 1.0), rel=0.02)
    assert world.frechet_distance(a, a) == pytest.approx(0.0, abs=1e-6)


@pytest.mark.slow
def test_distance_sees_what_too_few_steps_look_like():
    """Other pictures of the same prompts are near; blurred ones are farther, dull ones much farther."""
    images, captions = draw(4, 300)
    rng = np.random.default_rng(7)
    others = world.features(np.stack([world.draw_scene(world.read_caption(text), rng) for text in captions]))

    def distance(changed):
        return world.frechet_distance(world.features(changed.astype(np.uint8)), others)

    pixels = images.astype(float)
    blurred = np.mean([np.roll(pixels, (dy, dx), (1, 2)) for dy in (-1, 0, 1) for dx in (-1, 0, 1)], axis=0)
    near = distance(pixels)
    assert distance(blurred) > 1.2 * near
    assert distance(128 + 0.8 * (pixels - 128)) > 10 * near


@pytest.mark.slow
def test_the_toy_s_report_has_the_steps_that_were_asked_for(tmp_path, monkeypatch):
    def pictures(which, prompts, steps, seed, size):
        rng = np.random.default_rng((seed, steps))
        return [Image.fromarray(rng.integers(0, 255, (*size, 3), dtype=np.uint8)) for _ in prompts]

    def clip(pictures, prompts):
        assert len(pictures) == len(prompts) == 8
        return torch.tensor([float(np.mean(picture)) for picture in pictures])

    monkeypatch.setattr(toy_report, "SAMPLES", 8)
    text = report(pictures, clip, tmp_path, [2, 3], ((64, 64), (48, 80)))
    rows = json.loads((tmp_path / "report.json").read_text())
    assert list(rows) == ["64x64", "48x80"] and text.count("| student 3 |") == 2
    for size in rows.values():
        assert list(size) == ["teacher 50", "teacher 4", "teacher 2", "student 2", "student 3"]
        assert 120 < size["student 3"]["clip_score"] < 135  # the mean of noise
    assert "| CLIP score |" in text and "CLIP" not in report(pictures, None, tmp_path, [2])

    monkeypatch.setattr(toy_report, "FEW_SAMPLES", 4)
    sizes = ((64, 64), (48, 80))
    assert "on 8 prompts" in report(pictures, None, tmp_path, [2], sizes, toy_report.QUICK_LOOK + 1)
    quick = report(pictures, None, tmp_path, [2], sizes, toy_report.QUICK_LOOK)
    assert "on 4 prompts" in quick and quick.count("| student 2 |") == 1
