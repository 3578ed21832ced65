"""Grids, strips of frames, previews, and the comparison of student and teacher."""

import itertools
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from common import pictures
from common.pictures import (
    LABEL_HEIGHT,
    MARGIN,
    PROMPTS,
    Comparison,
    below_each_other,
    frame_strip,
    labelled_grid,
    open_preview,
    picture_pair,
    share_prompts,
    spread,
    to_bytes,
    validation_prompts,
)
from tests.helpers import tiny_autoencoder

COLOURS = ((200, 0, 0), (0, 200, 0), (0, 0, 200), (200, 200, 0))


def picture(colour, width: int = 32, height: int = 32) -> Image.Image:
    return Image.new("RGB", (width, height), colour)


def places_of(sheet: Image.Image, colour) -> tuple[int, int, int, int]:
    """Top, left, bottom and right of a colour."""
    rows, columns = (np.asarray(sheet) == np.array(colour)).all(-1).nonzero()
    return rows.min(), columns.min(), rows.max() + 1, columns.max() + 1


# ---------------------------------------------------------------------------------------------------------------------
# Sheets
# ---------------------------------------------------------------------------------------------------------------------


def test_a_grid_has_its_pictures_in_rows_and_columns_and_small_ones_enlarged():
    rows = [[picture(COLOURS[0], 24), picture(COLOURS[1], 24)], [picture(COLOURS[2], 24), picture(COLOURS[3], 24)]]
    sheet = labelled_grid(rows, ["one", "two"], ["left", "right"])
    found = [places_of(sheet, colour) for colour in COLOURS]
    assert all((bottom - top, right - left) == (128, 96) for top, left, bottom, right in found)  # four times as large
    (top, left, *_), (lower, *_) = found[0], found[2]
    assert [place[:2] for place in found] == [
        (top, left), (top, left + 96 + MARGIN), (lower, left), (lower, left + 96 + MARGIN)
    ]  # fmt: skip
    assert lower == top + 128 + MARGIN and top == LABEL_HEIGHT + MARGIN
    black = (np.asarray(sheet) < 100).all(-1)
    assert black[:top, left : left + 96].any() and black[:top, left + 96 + MARGIN :].any()  # labels of columns
    assert black[top : top + 128, :left].any() and black[lower:, :left].any()  # and of rows


def test_long_labels_are_wrapped_and_cut():
    sheet = labelled_grid([[picture(COLOURS[0], 128, 128)]], ["row"], ["many words " * 40])
    assert places_of(sheet, COLOURS[0])[0] == 5 * LABEL_HEIGHT + MARGIN


def test_pictures_are_put_beside_and_below_each_other():
    pair = picture_pair(picture(COLOURS[0]), picture(COLOURS[1]))
    assert (places_of(pair, COLOURS[0]), places_of(pair, COLOURS[1])) == ((0, 0, 32, 32), (0, 34, 32, 66))
    joined = below_each_other([picture(COLOURS[0], 64, 32), picture(COLOURS[1], 32, 16)])
    assert joined.size == (64, 48) and places_of(joined, COLOURS[1]) == (32, 0, 48, 32)


def test_a_strip_has_frames_from_the_first_to_the_last():
    clip = np.zeros((5, 32, 48, 3), np.float32)
    clip[:, :16, :, 0] = np.linspace(0.2, 1.0, 5)[:, None, None]
    strip = np.asarray(frame_strip(clip, 3)) / 255
    assert strip.shape == (32, 3 * 48, 3)
    assert strip[8, [24, 72, 120], 0] == pytest.approx([0.2, 0.6, 1.0], abs=0.01)
    assert np.array_equal(np.asarray(frame_strip(to_bytes(clip), 3)), np.asarray(frame_strip(clip, 3)))
    assert frame_strip(clip[:1]).size == (48, 32)  # a picture is a clip of one frame


def test_pixels_in_bytes():
    found = to_bytes(np.array([-0.1, 0.0, 0.5, 1.0, 1.1]))
    assert found.tolist() == [0, 0, 128, 255, 255] and to_bytes(found) is found


def test_spread():
    assert spread("a", torch.tensor([1.0, 3.0])) == {"a/min": 1.0, "a/max": 3.0, "a/mean": 2.0, "a/std": 1.0}


def test_prompts_are_those_of_the_flags_or_four_of_ours(tmp_path):
    library = tmp_path / "prompts.json"
    library.write_text(json.dumps({"x": "first", "y": "second"}))

    def prompts(library, prompt):
        return validation_prompts(SimpleNamespace(validation_prompt_library=library, validation_prompt=prompt))

    assert prompts(None, None) == list(PROMPTS) and len(PROMPTS) == 4
    assert prompts(None, "mine") == ["mine"]
    assert prompts(library, None) == ["first", "second"] and prompts(library, "mine") == ["first", "second", "mine"]


# ---------------------------------------------------------------------------------------------------------------------
# Previews
# ---------------------------------------------------------------------------------------------------------------------


def preview_of(shown: list, main: bool = True, **flags):
    usual = {"validation_preview": True, "validation_preview_steps": 3, "validation_preview_model": None}
    args = SimpleNamespace(**usual | {"cache_dir": None} | flags)
    accelerator = SimpleNamespace(is_main_process=main, device=torch.device("cpu"))
    return open_preview(args, flags.pop("name", "usual"), accelerator, lambda *given: shown.append(given))


def test_a_preview_shows_a_batch_side_by_side_as_the_tiny_autoencoder_decodes_it(tmp_path):
    tiny, shown = tiny_autoencoder(tmp_path), []
    callback = preview_of(shown, validation_preview_model=tmp_path)("label")
    rng = torch.Generator().manual_seed(0)
    latents = [torch.randn(2, 4, 4, 4, generator=rng) for _ in range(7)]
    for i, each in enumerate(latents):
        tensors = {"latents": each}
        assert callback(None, i, None, tensors) is tensors
    assert [label for _, label in shown] == ["label-step03", "label-step06"]
    for (sheet, _), i in zip(shown, (2, 5), strict=True):
        with torch.no_grad():
            decoded = tiny.decode(latents[i] / tiny.config.scaling_factor).sample.clamp(-1, 1) * 127.5 + 127.5
        expected = torch.cat(list(decoded), 2).permute(1, 2, 0).numpy()
        assert sheet.size == (64, 32) and np.abs(np.asarray(sheet).astype(float) - expected).max() <= 1.0


def test_no_preview_without_the_flag_and_in_other_processes():
    shown = []
    assert preview_of(shown, validation_preview=False)("label") is None
    assert preview_of(shown, main=False)("label") is None


def test_a_preview_model_that_is_not_there_is_one_sentence(tmp_path):
    with pytest.raises(SystemExit, match="--validation_preview_model .*no_such: cannot be loaded"):
        preview_of([], validation_preview_model=str(tmp_path / "no_such"))
    with pytest.raises(SystemExit, match="this model has no tiny autoencoder, give --validation_preview_model"):
        preview_of([], name=None)


# ---------------------------------------------------------------------------------------------------------------------
# Student and teacher
# ---------------------------------------------------------------------------------------------------------------------


def compare(clip=None, **flags):
    """A comparison, and the list of what it asks for: whose pictures, steps, size, callback."""
    usual = {
        "validation_prompt_library": None, "validation_prompt": "mine", "validation_seed": 5,
        "disable_benchmark": False, "validation_resolution": [(32, 32), (32, 48)],
        "validation_num_inference_steps": [1, 4],
    }  # fmt: skip
    asked = []

    def pictures(which, prompts, steps, seed, size, callback=None):
        assert (prompts, seed) == (["mine"], 5)
        asked.append((which, steps, size, callback))
        return [picture(COLOURS[which == "student"], size[1], size[0])]

    args = SimpleNamespace(**usual | flags)
    return Comparison(args, pictures, lambda label: label, clip), asked


def test_a_comparison_has_a_grid_for_each_size_and_keeps_the_teachers_pictures():
    comparison, asked = compare()
    sheet, scores = comparison.sheet()
    assert asked == [
        ("student", 1, (32, 32), "preview-1-step-32x32"), ("teacher", 1, (32, 32), None),
        ("student", 4, (32, 32), "preview-4-steps-32x32"), ("teacher", 4, (32, 32), None),
        ("student", 1, (32, 48), "preview-1-step-48x32"), ("teacher", 1, (32, 48), None),
        ("student", 4, (32, 48), "preview-4-steps-48x32"), ("teacher", 4, (32, 48), None),
    ]  # fmt: skip
    assert scores == {} and sheet.height > 4 * 128
    teacher, student = (places_of(sheet, colour) for colour in COLOURS[:2])
    assert teacher[1] < student[1] and teacher[0] == student[0]  # the teacher on the left
    asked.clear()
    assert np.array_equal(np.asarray(comparison.sheet()[0]), np.asarray(sheet))
    assert {which for which, *_ in asked} == {"student"}


def test_without_a_benchmark_the_student_is_alone_and_a_clip_scores_it():
    scored = []

    def clip(pictures, prompts):
        scored.append((len(pictures), prompts))
        return torch.tensor([float(len(scored))])

    comparison, asked = compare(clip, disable_benchmark=True, validation_resolution=[(32, 32)])
    _, scores = comparison.sheet()
    assert [(which, callback) for which, _, _, callback in asked] == [
        ("student", "preview-1-step"), ("student", "preview-4-steps")
    ]  # fmt: skip
    assert scored == [(1, ["mine"])] * 2
    assert scores == spread("clip_score/1 step", torch.tensor([1.0])) | spread(
        "clip_score/4 steps", torch.tensor([2.0])
    )


@pytest.mark.parametrize("at_once", [None, 1, 2, 9])
@pytest.mark.parametrize("count", [1, 4, 5])
def test_processes_that_share_prompts_have_the_samples_of_one(count, at_once, monkeypatch):
    """Which follow from prompt and seed; of three processes, none draws more than its share."""
    asked = []

    def generate(which, prompts, steps, seed, size):
        asked.append(len(prompts))
        return [(which, prompt, steps, seed + i, size) for i, prompt in enumerate(prompts)]

    monkeypatch.setattr(pictures, "gather_object", lambda drawn: drawn)
    request = "student", [f"prompt {i}" for i in range(count)], 4, 7
    ranks = [SimpleNamespace(process_index=rank, num_processes=3) for rank in range(3)]
    found = [share_prompts(generate, rank, at_once)(*request, size=8) for rank in ranks]
    assert max(asked) <= (at_once or -(-count // 3)) and max(map(len, found)) <= max(at_once or 1, -(-count // 3))
    alone = share_prompts(generate, SimpleNamespace(process_index=0, num_processes=1), at_once)(*request, size=8)
    assert sorted(itertools.chain(*found)) == alone == generate(*request, size=8)
    assert share_prompts(generate, None, at_once)(*request, size=8) == alone
