"""Measures teacher and student on the toy world's own prompts, and draws the proof."""

import json
import time
from pathlib import Path

import numpy as np
from PIL import Image

from common.validation import labelled_grid
from tests.toy import world

SAMPLES = 256
CHUNK = 64
TEACHER_STEPS = (50, 4, 2)


def report(pictures, folder: Path, student_steps: list[int], sizes=((64, 64),), samples: int = SAMPLES) -> str:
    """Tables of adherence, and of distance to the teacher's 50-step samples with other seeds, as Markdown.

    `pictures(which, prompts, steps, seed, size=(height, width))` draws. report.json holds the rows by sampler; with
    several sizes, by size and sampler.
    """
    rng = np.random.default_rng(99)
    prompts = [world.caption(world.sample_scene(rng)) for _ in range(samples)]
    results, text = {}, ""
    for size in sizes:
        name = f"{size[0]}x{size[1]}"
        rows, few_steps, sheet = measure(pictures, prompts, student_steps, size)
        path = folder / ("report.png" if size == sizes[0] else f"report-{name}.png")
        sheet.save(path)
        results[name] = rows
        table = markdown(rows, few_steps, f"{samples} prompts of the toy world" + f", {name}" * (len(sizes) > 1))
        print(f"\n{table}The picture: {path}")
        text += table
    (folder / "report.json").write_text(json.dumps(results if len(sizes) > 1 else rows, indent=2))
    return text


def measure(pictures, prompts: list[str], student_steps: list[int], size: tuple[int, int]):
    """Rows by sampler, the teacher's few steps, and a sheet of pictures.

    Distance closed at n steps is (d(teacher few) - d(student n)) / (d(teacher few) - d(teacher 50)), where few is 4, or
    2 where the teacher is too good at 4 steps for the gap to be measured.
    """

    def sample(which: str, steps: int, seed: int = 1_000_000):
        start, drawn = time.time(), []
        for i in range(0, len(prompts), CHUNK):
            drawn += pictures(which, prompts[i : i + CHUNK], steps, seed + i, size=size)
        return np.stack([np.asarray(picture) for picture in drawn]), (time.time() - start) / len(prompts)

    reference = world.features(sample("teacher", 50, seed=2_000_000)[0])
    rows, strips, labels = {}, [], []
    for which, counts in (("teacher", TEACHER_STEPS), ("student", student_steps)):
        for steps in counts:
            images, seconds = sample(which, steps)
            rows[f"{which} {steps}"] = {
                "adherence": world.adherence(images, prompts),
                "distance": world.frechet_distance(world.features(images), reference),
                "seconds per picture": seconds,
            }
            strips.append([Image.fromarray(image) for image in images[:8]])
            labels.append(f"{which}, {steps} step{'s' if steps > 1 else ''}")
    many = rows["teacher 50"]["distance"]
    few_steps = 4 if rows["teacher 4"]["distance"] >= 2 * many else 2
    few = rows[f"teacher {few_steps}"]["distance"]
    for row in rows.values():
        row["distance closed"] = (few - row["distance"]) / (few - many)
    return rows, few_steps, labelled_grid(strips, labels, prompts[:8])


def markdown(rows: dict, few_steps: int, title: str) -> str:
    lines = [
        f"## Results on {title}",
        "",
        f"| sampler, steps | prompts followed | Fréchet distance to 50 steps | closed from {few_steps} | s a picture |",
        "|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        lines.append(
            f"| {name} | {row['adherence']:.1%} | {row['distance']:.4f} | {row['distance closed']:.1%}"
            f" | {row['seconds per picture']:.3f} |"
        )
    return "\n".join(lines) + "\n\n"
