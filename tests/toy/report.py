"""Measures teacher and student on the toy world's own prompts, and draws the proof."""

import json
import math
import time
from pathlib import Path

import numpy as np
from PIL import Image

from common.pictures import labelled_grid
from common.report import FULL_STEPS, plot
from tests.toy import world, world_video

SAMPLES = 256
QUICK_LOOK = 100  # optimizer steps; a run of no more is judged on FEW_SAMPLES in the first size
FEW_SAMPLES = 32
CHUNK = 64
TEACHER_STEPS = (FULL_STEPS, 4, 2)


def report(
    pictures, clip, folder: Path, student_steps: list[int], sizes=((64, 64),), train_steps: int = 1000,
    processes: int = 1,
) -> str:  # fmt: skip
    """Tables of adherence, and of distance to the teacher's 50-step samples with other seeds, as Markdown.

    `pictures(which, prompts, steps, seed, size=(height, width))` generates, and `clip(pictures, prompts)` scores, or is
    None. report.json holds the rows by sampler; with several sizes, by size and sampler. `processes` share the prompts.
    """
    rng, samples = np.random.default_rng(99), samples_for(train_steps)
    sizes = sizes if samples == SAMPLES else sizes[:1]
    prompts = [world.caption(world.sample_scene(rng)) for _ in range(samples)]
    samplers = [("teacher", steps) for steps in TEACHER_STEPS] + [("student", steps) for steps in student_steps]
    results, text = {}, ""
    for size in sizes:
        name = f"{size[0]}x{size[1]}"
        rows, generated = measure(pictures, world, prompts, samplers, processes, size=size)
        # 4, or 2 where the teacher is too good at 4 steps for the gap to be measured
        few_steps = 4 if rows["teacher 4"]["distance"] >= 2 * rows["teacher 50"]["distance"] else 2
        close(rows, few_steps)
        if clip is not None:
            for row, images in zip(rows.values(), generated.values(), strict=True):
                row["clip_score"] = clip(list(images), prompts).mean().item()
        path = folder / ("report.png" if size == sizes[0] else f"report-{name}.png")
        strips = [[Image.fromarray(image) for image in images[:8]] for images in generated.values()]
        labelled_grid(strips, list(generated), prompts[:8]).save(path)
        results[name] = rows
        table = markdown(rows, few_steps, f"{samples} prompts of the toy world" + f", {name}" * (len(sizes) > 1))
        text += table
    (folder / "report.json").write_text(json.dumps(results if len(sizes) > 1 else rows, indent=2))
    return text


def samples_for(train_steps: int) -> int:
    """How many prompts judge a run of so many optimizer steps."""
    return SAMPLES if train_steps > QUICK_LOOK else FEW_SAMPLES


def report_clips(
    clips, evaluations, teacher_steps, student_steps: int, folder: Path, show, train_steps: int = 1000,
    processes: int = 1,
) -> str:  # fmt: skip
    """The same of clips. `clips(which, prompts, steps, seed)` generates them in bytes, `evaluations(which, steps)`
    counts the network's, and `show(clips by label, prompts)` puts them side by side."""
    rng, samples = np.random.default_rng(99), samples_for(train_steps)
    prompts = [world_video.caption(world_video.sample_clip(rng)) for _ in range(samples)]
    samplers = [("teacher", steps) for steps in dict.fromkeys([FULL_STEPS, *teacher_steps])]
    samplers += [("student", student_steps)]
    rows, generated = measure(clips, world_video, prompts, samplers, processes)
    for (which, steps), row in zip(samplers, rows.values(), strict=True):
        row["evaluations"] = evaluations(which, steps)
    few_steps = min(teacher_steps)
    close(rows, few_steps)
    (folder / "report.json").write_text(json.dumps(rows, indent=2))
    plot([dict(row, sampler=which, steps=n) for (which, n), row in zip(samplers, rows.values(), strict=True)]).save(
        folder / "report.png"
    )
    show(generated, prompts)
    table = markdown(rows, few_steps, f"{samples} prompts of the toy world", "clip")
    return table + "![steps against quality](report.png)\n\n"


def measure(
    pictures, judge, prompts: list[str], samplers: list[tuple[str, int]], processes: int, **size
) -> tuple[dict, dict]:
    """Rows by sampler, and the samples by label. `judge` is a world's module: its oracle and its features."""

    def sample(which: str, steps: int, seed: int = 1_000_000):
        start, generated = time.time(), []
        for i in range(0, len(prompts), CHUNK):
            generated += pictures(which, prompts[i : i + CHUNK], steps, seed + i, **size)
        seconds = (time.time() - start) / math.ceil(len(prompts) / processes)
        return np.stack([np.asarray(picture) for picture in generated]), seconds

    reference = judge.features(sample("teacher", FULL_STEPS, seed=2_000_000)[0])
    rows, generated = {}, {}
    for which, steps in samplers:
        images, seconds = sample(which, steps)
        rows[f"{which} {steps}"] = {
            "adherence": judge.adherence(images, prompts),
            "distance": world.frechet_distance(judge.features(images), reference),
            "seconds": seconds,
        }
        generated[f"{which}, {steps} step{'s' if steps > 1 else ''}"] = images
    return rows, generated


def close(rows: dict, few_steps: int):
    """How much of the way from the teacher's few steps to its many each row has gone."""
    few, many = (rows[f"teacher {steps}"]["distance"] for steps in (few_steps, FULL_STEPS))
    for row in rows.values():
        row["distance closed"] = (few - row["distance"]) / (few - many)


def markdown(rows: dict, few_steps: int, title: str, noun: str = "picture") -> str:
    named = {"evaluations": ("evaluations", ""), "clip_score": ("CLIP score", ".1f")}
    more = [(key, *column) for key, column in named.items() if all(key in row for row in rows.values())]
    lines = [
        f"## Results on {title}",
        "",
        f"| sampler, steps | prompts followed | Fréchet distance to 50 steps | closed from {few_steps} |"
        + "".join(f" {name} |" for _, name, _ in more)
        + f" s a {noun} |",
        "|---|---|---|---|---|" + "---|" * len(more),
    ]
    for name, row in rows.items():
        lines.append(
            f"| {name} | {row['adherence']:.1%} | {row['distance']:.4f} | {row['distance closed']:.1%} |"
            + "".join(f" {row[key]:{form}} |" for key, _, form in more)
            + f" {row['seconds']:.3f} |"
        )
    return "\n".join(lines) + "\n\n"
