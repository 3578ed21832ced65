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
STUDENT_STEPS = (1, 2, 4, 8)


def report(pictures, folder: Path, samples: int = SAMPLES) -> str:
    """Table of adherence, and of distance to the teacher's 50-step samples with other seeds, as Markdown.

    `pictures(which, prompts, steps, seed)` draws. Distance closed at n steps is
    (d(teacher few) - d(student n)) / (d(teacher few) - d(teacher 50)), where few is 4, or 2 where the teacher is too
    good at 4 steps for the gap to be measured.
    """
    rng = np.random.default_rng(99)
    prompts = [world.caption(world.sample_scene(rng)) for _ in range(samples)]

    def sample(which: str, steps: int, seed: int = 1_000_000):
        start, drawn = time.time(), []
        for i in range(0, samples, CHUNK):
            drawn += pictures(which, prompts[i : i + CHUNK], steps, seed + i)
        return np.stack([np.asarray(picture) for picture in drawn]), (time.time() - start) / samples

    reference = world.features(sample("teacher", 50, seed=2_000_000)[0])
    rows, strips, labels = {}, [], []
    for which, counts in (("teacher", TEACHER_STEPS), ("student", STUDENT_STEPS)):
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

    (folder / "report.json").write_text(json.dumps(rows, indent=2))
    labelled_grid(strips, labels, prompts[:8]).save(folder / "report.png")
    lines = [
        f"## Results on {samples} prompts of the toy world",
        "",
        f"| sampler, steps | prompts followed | Fréchet distance to 50 steps | closed from {few_steps} | s a picture |",
        "|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        lines.append(
            f"| {name} | {row['adherence']:.1%} | {row['distance']:.4f} | {row['distance closed']:.1%}"
            f" | {row['seconds per picture']:.3f} |"
        )
    table = "\n".join(lines) + "\n\n"
    print("\n" + table + f"The picture: {folder / 'report.png'}")
    return table
