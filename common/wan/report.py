"""Steps against quality: how far teacher and student are from the teacher's full-step samples."""

import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from common.data.clips import save_frames
from common.pictures import frame_strip, labelled_grid, to_bytes, validation_prompts
from common.report import FULL_STEPS, features, measure, write_report

SHOWN = 4  # prompts, side by side


SIDE_BY_SIDE = "![frames, teacher and student](side_by_side.png)\n\nThe same as a video: side_by_side.mp4.\n\n"


def clip_features(clips: list[np.ndarray]) -> torch.Tensor:
    """Of the first, the middle and the last frame of clips [F, H, W, 3], in bytes: [N, 3 D]."""
    frames = [Image.fromarray(clip[i]) for clip in clips for i in (0, len(clip) // 2, -1)]
    return features(frames).reshape(len(clips), -1) / math.sqrt(3)


def clips_report(args, clips, evaluations, folder: Path) -> str:
    """The same of clips, and side_by_side.mp4 and .png. The student's steps are its own.

    `clips(which, prompts, steps, seed)` draws, and `evaluations(which, steps)` are those of the network that it takes.
    Distribution matching does not promise the teacher's own clip from the same noise: how far two of the teacher's
    from different noise are apart says what a distance means.
    """
    if not args.report_steps:
        return ""
    prompts, seed = validation_prompts(args), args.validation_seed
    samplers = [("teacher", "teacher", FULL_STEPS, seed), ("teacher, other noise", "teacher", FULL_STEPS, seed + 10**6)]
    samplers += [("teacher", "teacher", steps, seed) for steps in args.report_steps]
    samplers += [("student", "student", len(args.steps), seed)]
    rows = measure(in_bytes(clips), prompts, samplers, clip_features)
    shown = {}
    for row, (name, which, steps, _) in zip(rows, samplers, strict=True):
        shown[f"{name}, {steps} steps"] = row.pop("drawn")
        row["evaluations"] = evaluations(which, steps)
    del shown[f"teacher, other noise, {FULL_STEPS} steps"]
    side_by_side(folder, shown, prompts)
    columns = {"evaluations": ("evaluations", ""), "s per clip": ("seconds", ".3f")}
    return write_report(folder, rows, f"on {len(prompts)} prompts, clips", columns) + SIDE_BY_SIDE


def in_bytes(clips):
    """What draws the same clips a quarter as large: all of them are held together."""
    return lambda *wanted: [to_bytes(clip) for clip in clips(*wanted)]


def side_by_side(folder: Path, clips: dict[str, list[np.ndarray]], prompts: list[str]):
    """Clips of each sampler: side_by_side.mp4, a column for each; and side_by_side.png, frames of them, a row for each.

    Clips are [F, H, W, 3] in bytes, as many of each sampler as there are prompts. The first ones are shown.
    """
    shown = prompts[:SHOWN]
    rows = [[frame_strip(drawn[i], 5)] for i in range(len(shown)) for drawn in clips.values()]
    labelled_grid(rows, [f"{prompt[:40]}: {name}" for prompt in shown for name in clips], ["frames"]).save(
        folder / "side_by_side.png"
    )

    def frame(k: int) -> np.ndarray:
        rows = [[Image.fromarray(drawn[i][k]) for drawn in clips.values()] for i in range(len(shown))]
        return np.asarray(labelled_grid(rows, [prompt[:40] for prompt in shown], list(clips)))

    save_frames((frame(k) for k in range(len(next(iter(clips.values()))[0]))), folder / "side_by_side.mp4")


# How far the student may be from its reference, as a ratio, and what it is a sign of otherwise.
COLLAPSE = {
    "diversity": (0.5, None, "all seeds give nearly the same clip"),
    "saturation": (0.5, 1.75, "colours have faded or are overdone"),
    "motion": (0.4, None, "clips stand still"),
}


def clip_statistics(clips: list[np.ndarray]) -> dict[str, float]:
    """Of clips [F, H, W, 3] in [0, 1] of one prompt and different seeds."""
    stacked = np.stack(clips)
    pairs = [(i, j) for i in range(len(clips)) for j in range(i)]
    return {
        "diversity": float(np.mean([np.abs(stacked[i] - stacked[j]).mean() for i, j in pairs])),
        "saturation": float((stacked.max(-1) - stacked.min(-1)).mean()),
        "motion": float(np.abs(np.diff(stacked, axis=1)).mean()) if stacked.shape[1] > 1 else 0.0,
    }


def signs_of_collapse(found: dict[str, float], reference: dict[str, float]) -> list[str]:
    """A sentence for each statistic that has left its range around the reference's."""
    signs = []
    for name, (low, high, meaning) in COLLAPSE.items():
        ratio = found[name] / max(reference[name], 1e-6)
        if ratio < low and reference[name] > 1e-3 or high is not None and ratio > high:
            signs.append(f"{name} is {ratio:.2f} of the reference's: {meaning}")
    return signs
