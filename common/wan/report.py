"""Judgement of clips: comparisons while a run trains, signs of collapse, and a report at its end."""

import functools
import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from common.data.clips import save_clip, save_frames
from common.pictures import below_each_other, frame_strip, labelled_grid, validation_prompts
from common.report import FULL_STEPS, features, measure, toy_judge, write_rows

SHOWN = 4  # prompts whose clips are shown side by side
SIDE_BY_SIDE = "![frames, teacher and student](side_by_side.png)\n\nThe same as a video: side_by_side.mp4.\n\n"
# Lowest and highest usual ratio to the reference, and the meaning of any other
COLLAPSE = {
    "diversity": (0.5, None, "all seeds give nearly the same clip"),
    "saturation": (0.5, 1.75, "colours have faded or are overdone"),
    "motion": (0.4, None, "clips stand still"),
}


def clip_features(clips: list[np.ndarray]) -> torch.Tensor:
    """Features [N, 3 D] of N clips [F, H, W, 3] in bytes: those of the first, the middle and the last frame."""
    frames = [Image.fromarray(clip[i]) for clip in clips for i in (0, len(clip) // 2, -1)]
    return features(frames).reshape(len(clips), -1) / math.sqrt(3)


def write_clips_report(args, clips, student_steps: int, folder: Path, fps: int, processes: int = 1) -> str:
    """Writes report.json and report.png, side_by_side.mp4 and .png, and returns a table as Markdown.

    `clips(which, prompts, steps, seed)` generates, and `clips.evaluations(which, steps)` counts evaluations of the
    network; so many `processes` share the prompts. The toy's world judges clips of the toy. Distribution matching does
    not promise the teacher's own clip from the same noise; the distance between two clips of the teacher's from
    different noise gives the scale.
    """
    if not args.report_steps:
        return ""
    show = functools.partial(save_side_by_side, folder, fps=fps)
    if args.pretrained_teacher_model is None:
        judged = toy_judge().report_clips(
            clips, clips.evaluations, args.report_steps, student_steps, folder, show, args.max_train_steps, processes
        )
        return judged + SIDE_BY_SIDE
    prompts, seed = validation_prompts(args), args.validation_seed
    samplers = [("teacher", "teacher", FULL_STEPS, seed), ("teacher, other noise", "teacher", FULL_STEPS, seed + 10**6)]
    samplers += [("teacher", "teacher", steps, seed) for steps in args.report_steps]
    samplers += [("student", "student", student_steps, seed)]
    rows = measure(clips, prompts, samplers, clip_features, processes)
    generated = {}
    for row, (name, which, steps, _) in zip(rows, samplers, strict=True):
        generated[f"{name}, {steps} steps"] = row.pop("generated")
        row["evaluations"] = clips.evaluations(which, steps)
    del generated[f"teacher, other noise, {FULL_STEPS} steps"]
    show(generated, prompts)
    columns = {"evaluations": ("evaluations", ""), "s per clip": ("seconds", ".3f")}
    return write_rows(folder, rows, f"on {len(prompts)} prompts, clips", columns) + SIDE_BY_SIDE


def save_side_by_side(folder: Path, clips: dict[str, list[np.ndarray]], prompts: list[str], fps: int):
    """Writes side_by_side.mp4, a column for each sampler, and side_by_side.png, a row of frames for each clip.

    `clips` are {sampler: clips [F, H, W, 3] in bytes}, one for each prompt, of which the first ones are shown.
    """
    labels = [prompt[:40] for prompt in prompts[:SHOWN]]
    rows = [[frame_strip(each[i], 5)] for i in range(len(labels)) for each in clips.values()]
    strips = labelled_grid(rows, [f"{label}: {name}" for label in labels for name in clips], ["frames"])
    strips.save(folder / "side_by_side.png")

    def frame(k: int) -> np.ndarray:
        rows = [[Image.fromarray(each[i][k]) for each in clips.values()] for i in range(len(labels))]
        return np.asarray(labelled_grid(rows, labels, list(clips)))

    save_frames((frame(k) for k in range(len(next(iter(clips.values()))[0]))), folder / "side_by_side.mp4", fps)


def clip_statistics(clips: list[np.ndarray]) -> dict[str, float]:
    """Diversity, saturation and motion, 0 to 1, of clips [F, H, W, 3] in bytes by one prompt and several seeds."""
    stacked = np.stack(clips) / np.float32(255.0)
    pairs = [(i, j) for i in range(len(clips)) for j in range(i)]
    return {
        "diversity": float(np.mean([np.abs(stacked[i] - stacked[j]).mean() for i, j in pairs])),
        "saturation": float((stacked.max(-1) - stacked.min(-1)).mean()),
        "motion": float(np.abs(np.diff(stacked, axis=1)).mean()) if stacked.shape[1] > 1 else 0.0,
    }


def signs_of_collapse(found: dict[str, float], reference: dict[str, float]) -> list[str]:
    """A sentence for each statistic whose ratio to the reference's is not usual."""
    signs = []
    for name, (low, high, meaning) in COLLAPSE.items():
        ratio = found[name] / max(reference[name], 1e-6)
        if ratio < low and reference[name] > 1e-3 or high is not None and ratio > high:
            signs.append(f"{name} is {ratio:.2f} of the reference's: {meaning}")
    return signs


class ClipComparison:
    """Validation of clips by student and teacher: files, strips of frames for the trackers, and signs of collapse."""

    def __init__(self, args, clips, tracking, say, main: bool, fps: int):
        """`clips(which, prompts, steps, seed, size)` generates; the `main` process alone writes files."""
        self.args, self.clips, self.tracking, self.say, self.main, self.fps = args, clips, tracking, say, main, fps
        self.teacher_clips = {}  # by size; they never change
        self.reference = None  # statistics of clips by the teacher, or by the student at the first validation

    def sheet(self, step: int) -> Image.Image:
        """A sheet with a strip of frames for each prompt, network and size. Saves the clips and tracks them."""
        args, sheets = self.args, []
        prompts, seed = validation_prompts(args), args.validation_seed
        roles = {"none": ["student"], "ema_only": ["ema"], "comparison": ["student", "ema"]}[args.ema_validation]
        roles = roles if args.use_ema else ["student"]
        for size in args.validation_resolution:
            rows, labels = [], []
            for which in roles if args.disable_benchmark else [*roles, "teacher"]:
                clips = self.teacher_clips.get(size) if which == "teacher" else None
                clips = clips or self.clips(which, prompts, FULL_STEPS, seed, size)
                if which == "teacher":
                    self.teacher_clips[size] = clips
                for i, (prompt, clip) in enumerate(zip(prompts, clips, strict=True)):
                    rows.append([frame_strip(clip)])
                    labels.append(f"{which}: {prompt[:40]}")
                    if self.main:
                        name = f"{which}-{i:02d}-{size[1]}x{size[0]}"
                        path = Path(args.output_dir, "validation", f"step-{step:06d}", f"{name}.mp4")
                        save_clip(clip, path, self.fps)
                        self.tracking.clip(clip, path, f"clips/{name}", step)
            sheets.append(labelled_grid(rows, labels, [f"{size[1]}x{size[0]}, {len(clips[0])} frames"]))
        sheet = below_each_other(sheets)
        self.tracking.picture(sheet, "clips", step)
        self.watch_collapse(roles[0], prompts[:1] * 4, step)  # two seeds may look alike by chance
        return sheet

    def watch_collapse(self, which: str, prompts: list[str], step: int):
        """Warns of signs of collapse in clips of one prompt and several seeds; `prompts` repeats it for each seed."""
        seed = self.args.validation_seed
        statistics = clip_statistics(self.clips(which, prompts, FULL_STEPS, seed))
        if self.reference is None:
            self.reference = statistics
            if not self.args.disable_benchmark:
                self.reference = clip_statistics(self.clips("teacher", prompts, FULL_STEPS, seed))
        self.tracking.values({f"watch/{name}": value for name, value in statistics.items()}, step)
        for sign in signs_of_collapse(statistics, self.reference):
            self.say(f"warning at step {step}: {sign}")
