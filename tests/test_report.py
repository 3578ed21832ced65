"""The reports of clips: what is measured, and what is shown."""

import json
from argparse import Namespace

import av
import numpy as np
import pytest
import torch
from PIL import Image

from common.wan.report import clip_features, clips_report
from tests.toy import world_video as video
from tests.toy.report import report_clips

FULL, STEPS = 50, [1000.0, 757.0, 522.0]


def fake_clips(blur: dict):
    """`clips(which, prompts, steps, seed)` that follow their prompts; (which, steps) says how grey they are."""

    def clips(which, prompts, steps, seed):
        rng = np.random.default_rng(seed)
        drawn = [video.draw_clip(video.read_caption(prompt), rng) / 255 for prompt in prompts]
        grey = blur.get((which, steps), 0.0)
        return [(1 - grey) * clip + grey * 0.5 for clip in drawn]

    return clips


def evaluations(which, steps):
    return 2 * steps if which == "teacher" else steps


def frames_of(path) -> np.ndarray:
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def test_of_any_teacher_the_distance_to_its_many_steps_is_told(tmp_path):
    (tmp_path / "library.json").write_text('{"one": "a red circle moving left", "two": "a blue square growing"}')
    args = Namespace(
        report_steps=[3], steps=STEPS, validation_seed=7, validation_prompt=None,
        validation_prompt_library=tmp_path / "library.json",
    )  # fmt: skip
    clips = fake_clips({("teacher", 3): 0.5, ("student", 3): 0.1})
    text = clips_report(args, clips, evaluations, tmp_path)
    many, other, few, student = json.loads((tmp_path / "report.json").read_text())
    assert many["distance"] == 0.0 < student["distance"] < few["distance"] and other["distance"] > 0.0
    assert [row["evaluations"] for row in (many, few, student)] == [100, 6, 3]
    assert "| teacher, other noise | 50 |" in text and "| student | 3 |" in text and "side_by_side.png" in text
    assert Image.open(tmp_path / "report.png").width > 100

    # A column of the video for each of teacher 50, teacher 3 and student, a row for each prompt, all frames
    shown = frames_of(tmp_path / "side_by_side.mp4")
    assert shown.shape[0] == video.FRAMES and shown.shape[1] > 2 * 128 and shown.shape[2] > 3 * 128
    assert np.abs(np.diff(shown.astype(float), axis=0)).max() > 50  # it moves
    sheet = Image.open(tmp_path / "side_by_side.png")
    assert sheet.height > 6 * 128 and sheet.width > 5 * 128

    args.report_steps = []
    assert clips_report(args, None, None, tmp_path) == ""


def test_clips_that_differ_in_their_middle_alone_are_apart():
    clip = np.full((9, 32, 32, 3), 50, np.uint8)
    other = clip.copy()
    other[4, 8:24, 8:24] = 230
    same, apart = clip_features([clip, clip]), clip_features([clip, other])
    assert torch.equal(same[0], same[1]) and (apart[0] - apart[1]).norm() > 0.1


def test_of_the_toy_the_prompts_followed_are_told(tmp_path):
    args = Namespace(report_steps=[3], steps=STEPS)
    clips = fake_clips({("teacher", 3): 0.9, ("student", 3): 0.05})
    text = report_clips(args, clips, evaluations, tmp_path, samples=24)
    rows = json.loads((tmp_path / "report.json").read_text())
    assert list(rows) == ["teacher 50", "teacher 3", "student 3"]
    assert rows["teacher 50"]["adherence"] == 1.0 > rows["teacher 3"]["adherence"]
    assert rows["teacher 50"]["distance closed"] == pytest.approx(1.0)
    assert rows["teacher 3"]["distance closed"] == 0.0 < rows["student 3"]["distance closed"]
    assert rows["student 3"]["evaluations"] == 3 and "| student 3 | 100.0% |" in text
    for name in ("side_by_side.mp4", "side_by_side.png", "report.png"):
        assert (tmp_path / name).stat().st_size > 1000
    assert len(frames_of(tmp_path / "side_by_side.mp4")) == video.FRAMES
