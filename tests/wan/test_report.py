"""The reports of clips: what is measured, what is shown, and the signs of collapse."""

import json
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch
from PIL import Image

from common.wan.report import ClipComparison, clip_features, clip_statistics, signs_of_collapse, write_clips_report
from tests.toy import report as toy_report
from tests.toy import world_video

FPS = 8


class FakeClips:
    """Clips that follow their prompts; `grey` says how grey those of (which, steps) are."""

    def __init__(self, grey: dict):
        self.grey = grey

    def __call__(self, which, prompts, steps, seed):
        rng = np.random.default_rng(seed)
        drawn = [world_video.draw_clip(world_video.read_caption(prompt), rng) for prompt in prompts]
        grey = self.grey.get((which, steps), 0.0)
        return [((1 - grey) * clip + grey * 127.5).astype(np.uint8) for clip in drawn]

    def evaluations(self, which, steps):
        return 2 * steps if which == "teacher" else steps


def frames_of(path) -> np.ndarray:
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


# ---------------------------------------------------------------------------------------------------------------------
# The report at the end
# ---------------------------------------------------------------------------------------------------------------------


def flags(**flags) -> SimpleNamespace:
    usual = {"report_steps": [3], "pretrained_teacher_model": "x", "validation_seed": 7, "validation_prompt": None}
    return SimpleNamespace(**usual | {"validation_prompt_library": None} | flags)


def test_of_any_teacher_the_distance_to_its_many_steps_is_told(tmp_path):
    (tmp_path / "library.json").write_text('{"one": "a red circle moving left", "two": "a blue square growing"}')
    args = flags(validation_prompt_library=tmp_path / "library.json")
    clips = FakeClips({("teacher", 3): 0.5, ("student", 3): 0.1})
    text = write_clips_report(args, clips, 3, tmp_path, FPS)
    many, other, few, student = json.loads((tmp_path / "report.json").read_text())
    assert many["distance"] == 0.0 < student["distance"] < few["distance"] and other["distance"] > 0.0
    assert [row["evaluations"] for row in (many, few, student)] == [100, 6, 3]
    assert "| teacher, other noise | 50 |" in text and "| student | 3 |" in text and "side_by_side.png" in text
    assert Image.open(tmp_path / "report.png").width > 100

    # A column of the video for each of teacher 50, teacher 3 and student, a row for each prompt, all frames
    shown = frames_of(tmp_path / "side_by_side.mp4")
    assert shown.shape[0] == world_video.FRAMES and shown.shape[1] > 2 * 128 and shown.shape[2] > 3 * 128
    assert np.abs(np.diff(shown.astype(float), axis=0)).max() > 50  # it moves
    sheet = Image.open(tmp_path / "side_by_side.png")
    assert sheet.height > 6 * 128 and sheet.width > 5 * 128
    with av.open(str(tmp_path / "side_by_side.mp4")) as container:
        assert container.streams.video[0].average_rate == FPS


def test_no_steps_no_report(tmp_path):
    assert write_clips_report(flags(report_steps=[]), None, 3, tmp_path, FPS) == "" and list(tmp_path.iterdir()) == []


def test_clips_that_differ_in_their_middle_alone_are_apart():
    clip = np.full((9, 32, 32, 3), 50, np.uint8)
    other = clip.copy()
    other[4, 8:24, 8:24] = 230
    same, apart = clip_features([clip, clip]), clip_features([clip, other])
    assert torch.equal(same[0], same[1]) and (apart[0] - apart[1]).norm() > 0.1


@pytest.mark.slow
def test_of_the_toy_the_prompts_followed_are_told(tmp_path, monkeypatch):
    monkeypatch.setattr(toy_report, "SAMPLES", 24)
    clips = FakeClips({("teacher", 3): 0.9, ("student", 3): 0.05})
    text = write_clips_report(flags(pretrained_teacher_model=None, max_train_steps=1000), clips, 3, tmp_path, FPS)
    rows = json.loads((tmp_path / "report.json").read_text())
    assert list(rows) == ["teacher 50", "teacher 3", "student 3"]
    assert rows["teacher 50"]["adherence"] == 1.0 > rows["teacher 3"]["adherence"]
    assert rows["teacher 50"]["distance closed"] == pytest.approx(1.0)
    assert rows["teacher 3"]["distance closed"] == 0.0 < rows["student 3"]["distance closed"]
    assert rows["student 3"]["evaluations"] == 3 and "| student 3 | 100.0% |" in text and "side_by_side.png" in text
    for name in ("side_by_side.mp4", "side_by_side.png", "report.png"):
        assert (tmp_path / name).stat().st_size > 1000
    assert len(frames_of(tmp_path / "side_by_side.mp4")) == world_video.FRAMES


# ---------------------------------------------------------------------------------------------------------------------
# Signs of collapse
# ---------------------------------------------------------------------------------------------------------------------


def noise(seed: int, frames: int = 6) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (frames, 16, 16, 3), np.uint8)


def test_statistics_of_clips():
    found = clip_statistics([noise(0), noise(1)])
    assert found["diversity"] == pytest.approx(1 / 3, abs=0.02)  # of two uniform numbers
    assert found["motion"] == pytest.approx(1 / 3, abs=0.02)
    assert found["saturation"] == pytest.approx(1 / 2, abs=0.02)  # of three: the largest minus the smallest
    assert clip_statistics([noise(0), noise(0)])["diversity"] == 0.0
    still = np.repeat(noise(0, 1), 6, 0)
    assert clip_statistics([still, still // 2])["motion"] == 0.0
    grey = np.repeat(noise(0)[..., :1], 3, -1)
    assert clip_statistics([grey, grey])["saturation"] == 0.0
    assert clip_statistics([noise(0, 1), noise(1, 1)])["motion"] == 0.0  # a picture


@pytest.mark.parametrize(
    ("change", "sign"),
    [
        ({}, None), ({"diversity": 0.1}, "all seeds"), ({"motion": 0.02}, "stand still"),
        ({"saturation": 0.9}, "colours"), ({"saturation": 0.1}, "colours"), ({"diversity": 3.0, "motion": 3.0}, None),
    ],
)  # fmt: skip
def test_signs_of_collapse(change, sign):
    reference = {"diversity": 0.3, "motion": 0.1, "saturation": 0.4}
    signs = signs_of_collapse(reference | change, reference)
    assert len(signs) == (sign is not None) and all(sign in text for text in signs)


def test_a_teacher_that_stands_still_is_no_measure_of_motion():
    reference = {"diversity": 0.3, "motion": 0.0, "saturation": 0.4}
    assert signs_of_collapse(reference, reference) == []


# ---------------------------------------------------------------------------------------------------------------------
# Comparisons while it trains
# ---------------------------------------------------------------------------------------------------------------------


class Told:
    """Stands in for a run's trackers."""

    def __init__(self):
        self.clips, self.pictures, self.numbers = [], [], []

    def clip(self, frames, path, name, step):
        assert path.exists()
        self.clips.append((name, step))

    def picture(self, picture, name, step):
        self.pictures.append((name, step))

    def values(self, values, step):
        self.numbers.append((values, step))


def compare(folder, main: bool = True, **flags):
    """A comparison, what its trackers are told, what it says, and what it asks for."""
    usual = {
        "output_dir": str(folder), "validation_prompt_library": None, "validation_prompt": "mine", "validation_seed": 7,
        "ema_validation": "comparison", "use_ema": True, "disable_benchmark": False,
        "validation_resolution": [(16, 16), (16, 32)],
    }  # fmt: skip
    told, said, asked = Told(), [], []

    def clips(which, prompts, steps, seed, size=(16, 16)):
        asked.append((which, len(prompts), size))
        return [noise(seed + i)[:, : size[0], :].repeat(size[1] // 16, 2) for i in range(len(prompts))]

    args = SimpleNamespace(**usual | flags)
    return ClipComparison(args, clips, told, said.append, main, FPS), told, said, asked


def test_clips_of_each_network_and_size_are_kept_and_shown(tmp_path):
    comparison, told, said, asked = compare(tmp_path)
    sheet = comparison.sheet(3)
    roles, sizes = ("student", "ema", "teacher"), ((16, 16), (16, 32))
    watched = [("student", 4, (16, 16)), ("teacher", 4, (16, 16))]  # one prompt, four seeds
    assert asked == [(which, 1, size) for size in sizes for which in roles] + watched
    names = [f"{which}-00-{size[1]}x{size[0]}" for size in sizes for which in roles]
    assert told.clips == [(f"clips/{name}", 3) for name in names]
    files = sorted((tmp_path / "validation" / "step-000003").iterdir())
    assert [path.name for path in files] == sorted(f"{name}.mp4" for name in names)
    assert told.pictures == [("clips", 3)] and sheet.height > 6 * 128
    (values, step), *more = told.numbers
    assert (values.keys(), step, more) == ({"watch/diversity", "watch/saturation", "watch/motion"}, 3, [])
    assert said == []
    asked.clear()
    comparison.sheet(4)  # the teacher's clips do not change
    assert asked == [(which, 1, size) for size in sizes for which in roles[:2]] + watched[:1]


@pytest.mark.parametrize(
    ("flags", "roles"),
    [
        ({"ema_validation": "none"}, {"student", "teacher"}), ({"ema_validation": "ema_only"}, {"ema", "teacher"}),
        ({"use_ema": False}, {"student", "teacher"}), ({"disable_benchmark": True}, {"student", "ema"}),
    ],
)  # fmt: skip
def test_whose_clips_are_shown(flags, roles, tmp_path):
    comparison, told, _, asked = compare(tmp_path, **flags)
    comparison.sheet(1)
    assert {which for which, *_ in asked} == roles


def test_other_processes_take_part_and_write_nothing(tmp_path):
    comparison, told, _, asked = compare(tmp_path, main=False)
    comparison.sheet(1)
    assert len(asked) == 8 and told.clips == [] and list(tmp_path.iterdir()) == []


def test_a_collapse_is_said(tmp_path):
    comparison, told, said, _ = compare(tmp_path, disable_benchmark=True)
    comparison.sheet(1)
    assert said == []  # the first clips are what later ones are compared with
    still = np.repeat(noise(0, 1), 6, 0)
    comparison.clips = lambda which, prompts, *_: [still for _ in prompts]
    comparison.sheet(2)
    assert [text.partition(":")[0] for text in said] == ["warning at step 2"] * 2
    assert "all seeds" in said[0] and "stand still" in said[1]
