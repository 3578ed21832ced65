"""Features of pictures, the report of steps against quality, held-out samples, and the CLIP score."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from common import report
from common.data.samples import BadSample, Sample
from common.report import ClipScore, features, hold_out, open_clip, write_report

# ---------------------------------------------------------------------------------------------------------------------
# Features
# ---------------------------------------------------------------------------------------------------------------------


def test_the_reports_features_tell_near_from_far():
    rng = np.random.default_rng(0)
    base = rng.integers(0, 255, (64, 64, 3)).astype(np.uint8)
    near = np.clip(base.astype(int) + rng.integers(-8, 8, base.shape), 0, 255).astype(np.uint8)
    far = base[::-1].copy()
    a, b, c = features([Image.fromarray(picture) for picture in (base, near, far)])
    assert 0 < (a - b).norm() < 0.5 * (a - c).norm()
    assert torch.equal(features([Image.fromarray(base)])[0], a)  # weights are fixed


# ---------------------------------------------------------------------------------------------------------------------
# Steps against quality
# ---------------------------------------------------------------------------------------------------------------------


def report_of(folder, clip=None, **flags) -> tuple[str, list]:
    """Of pictures that are the greyer the fewer steps they have. Also the list of what was asked for."""
    usual = {
        "pretrained_teacher_model": "x", "report_steps": [2, 25], "validation_seed": 7,
        "validation_prompt_library": None, "validation_prompt": "mine",
    }  # fmt: skip
    asked = []

    def pictures(which, prompts, steps, seed):
        asked.append((which, prompts, steps, seed))
        noise = np.random.default_rng(seed).integers(0, 255, (64, 64, 3))
        grey = {"teacher": 1.0, "student": 0.2}[which] / steps
        return [Image.fromarray(((1 - grey) * noise + grey * 128).astype(np.uint8)) for _ in prompts]

    return write_report(SimpleNamespace(**usual | flags), pictures, clip, ((64, 64),), folder), asked


def test_a_report_measures_the_way_to_the_teachers_many_steps(tmp_path):
    text, asked = report_of(tmp_path)
    assert asked[0][2] == 1  # the first call is not timed
    order = [("teacher", 50), ("teacher", 2), ("teacher", 25), ("student", 2), ("student", 25)]
    assert asked[1:] == [(which, ["mine"], steps, 7) for which, steps in order]  # all from the same noise
    rows = json.loads((tmp_path / "report.json").read_text())
    assert [(row["sampler"], row["steps"]) for row in rows] == order
    many, few, more, student, _ = (row["distance"] for row in rows)
    assert many == 0.0 < more < student < few
    for row in rows:
        assert row.keys() == {"sampler", "steps", "distance", "seconds"} and row["seconds"] > 0
        line = f"| {row['sampler']} | {row['steps']} | {row['distance']:.4f} | {row['seconds']:.3f} |"
        assert line in text.splitlines()
    assert "on 1 prompts" in text and "![steps against quality](report.png)" in text
    plot = np.asarray(Image.open(tmp_path / "report.png"))
    assert plot.shape == (360, 560, 3)
    lines = [(plot == np.array(colour)).all(-1).sum() for colour in ((0x88, 0x88, 0x88), (0xC0, 0x30, 0x20))]
    assert min(lines) > 100  # teacher's and student's


def test_where_there_is_a_clip_its_scores_are_a_column(tmp_path):
    text, _ = report_of(tmp_path, lambda pictures, prompts: torch.full((len(prompts),), 12.5))
    rows = json.loads((tmp_path / "report.json").read_text())
    assert {row["clip_score"] for row in rows} == {12.5}
    assert "| sampler | steps | distance | CLIP score | s per picture |" in text and text.count("| 12.50 |") == len(
        rows
    )


def test_the_seconds_are_those_of_the_process_that_drew(monkeypatch):
    """Of five prompts three processes draw two each, and the first call, which is not timed, is of one for each."""
    now, asked = [0.0], []

    def pictures(which, prompts, steps, seed):
        asked.append(len(prompts))
        now[0] += 6.0
        return [Image.new("RGB", (8, 8))] * len(prompts)

    monkeypatch.setattr(report.time, "time", lambda: now[0])
    (row,) = report.measure(pictures, ["a"] * 5, [("teacher", "teacher", 50, 7)], processes=3)
    assert row["seconds"] == 3.0 and asked == [3, 5]


def test_no_steps_no_report(tmp_path):
    assert report_of(tmp_path, report_steps=[]) == ("", []) and list(tmp_path.iterdir()) == []


def test_pictures_of_the_toy_are_judged_by_its_own_world(tmp_path, monkeypatch):
    judge = SimpleNamespace(report=lambda *given: given)
    monkeypatch.setattr(report, "toy_judge", lambda: judge)
    given, _ = report_of(tmp_path, "a clip", pretrained_teacher_model=None, max_train_steps=40)
    assert callable(given[0]) and given[1:] == ("a clip", tmp_path, [2, 25], ((64, 64),), 40, 1)


# ---------------------------------------------------------------------------------------------------------------------
# Held-out samples
# ---------------------------------------------------------------------------------------------------------------------


def test_different_pictures_are_held_out_of_all_readers(monkeypatch):
    """The hash of a key is the picture's; what follows is of its bucket."""

    def reader(members, visit, name=""):
        return Sample(members["key"], ["text"], "text", None, None, (32, 32, 0, 0, 32, 32))

    def samples(parts, readers, process, processes):
        assert parts == [(0, "part"), (1, "other part")] and (process, processes) == (0, 1)
        yield from (reader({"key": key}, "") for key in ("a", "a-1", "b"))
        yield 0  # the end of a part
        yield from (reader({"key": key}, "") for key in ("c", "d"))

    monkeypatch.setattr(report, "ShardPass", samples)
    datasets = [SimpleNamespace(parts=["part"]), SimpleNamespace(parts=["other part"])]
    args, data = SimpleNamespace(eval_steps=1, eval_samples=3), SimpleNamespace(datasets=datasets, held_out=())
    held_out, readers = hold_out(args, data, [reader, reader], None)
    assert [sample.key for sample in held_out] == ["a", "b", "c"]
    for each in readers:
        for key in ("a", "a-2", "b", "c-1"):
            with pytest.raises(BadSample, match="held out for --eval_steps"):
                each({"key": key}, "visit")
        assert each({"key": "d"}, "visit").key == "d"
    assert hold_out(SimpleNamespace(eval_steps=0), data, [reader], None) == ([], [reader])


# ---------------------------------------------------------------------------------------------------------------------
# CLIP
# ---------------------------------------------------------------------------------------------------------------------


def test_the_clip_score_is_100_cosines(tiny_clip):
    clip = ClipScore(str(tiny_clip), "cpu")
    prompts = ["a red circle", "a large blue square", "red"]
    rng = np.random.default_rng(0)
    pixels = torch.from_numpy(np.stack([rng.integers(0, 255, (32, 32, 3)) // (i + 1) for i in range(3)]))
    scores = clip([Image.fromarray(picture.byte().numpy()) for picture in pixels], prompts)
    tokens = clip.tokenizer(prompts, padding=True, return_tensors="pt")
    mean, std = torch.tensor(clip.processor.image_mean), torch.tensor(clip.processor.image_std)
    pixels = (pixels.permute(0, 3, 1, 2).float() / 255 - mean[:, None, None]) / std[:, None, None]
    with torch.no_grad():
        out = clip.model(**tokens, pixel_values=pixels)
        cosines = out.logits_per_image.diagonal() / clip.model.logit_scale.exp()
    assert scores.max() > 5.0, scores  # there is something to compare
    torch.testing.assert_close(scores, (100 * cosines).clamp(min=0), rtol=0, atol=0.02)


def test_a_clip_is_opened_where_it_is_asked_for():
    flags = {"evaluation_type": "clip", "evaluation_clip_model": "/no/such", "cache_dir": None}
    main, other = (SimpleNamespace(is_main_process=main, device="cpu") for main in (True, False))
    with pytest.raises(SystemExit, match="--evaluation_clip_model /no/such: cannot be loaded"):
        open_clip(SimpleNamespace(**flags), main)
    assert open_clip(SimpleNamespace(**flags), other) is None
    assert open_clip(SimpleNamespace(**flags | {"evaluation_type": "none"}), main) is None
