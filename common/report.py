"""Steps against quality: how far teacher and student are from the teacher's full-step samples."""

import json
import math
import time
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

from common.validation import pixels_of, validation_prompts

FULL_STEPS = 50  # of the teacher's own sampler
SIDE = 128  # pictures are compared at this size
FILTERS, LEVELS = 64, 3


def features(pictures: list[Image.Image]) -> torch.Tensor:
    """[N, D]: strengths of fixed random filters at three scales, each over a grid of places. No weights are needed.

    A picture's features change with what is where in it, and little with a shift of a few pixels.
    """
    rng = torch.Generator().manual_seed(0)
    x = torch.stack(
        [pixels_of(picture.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BOX)) for picture in pictures]
    )
    parts = []
    for _ in range(LEVELS):
        filters = torch.randn(FILTERS, 3, 5, 5, generator=rng)
        filters -= filters.mean((1, 2, 3), keepdim=True)  # blind to brightness: that is the pixels' part
        filters /= filters.flatten(1).norm(dim=1)[:, None, None, None]
        strength = torch.nn.functional.conv2d(x, filters, padding=2).abs()
        for values in (strength, x):
            cells = torch.nn.functional.adaptive_avg_pool2d(values, 8).flatten(1)
            parts.append(cells / math.sqrt(cells.shape[1]))
        x = torch.nn.functional.avg_pool2d(x, 2)
    return torch.cat(parts, 1)


def steps_report(args, pictures, clip, folder: Path) -> str:
    """Writes report.json and report.png, and returns the table as Markdown.

    `pictures(which, prompts, steps, seed)` draws. All start from the same noise, so the distance is that of pairs.
    """
    if not args.report_steps:
        return ""
    prompts = validation_prompts(args)

    def sample(which: str, steps: int):
        start = time.time()
        drawn = pictures(which, prompts, steps, args.validation_seed)
        return drawn, (time.time() - start) / len(prompts)

    sample("teacher", 1)  # the first call also loads and compiles: it is not timed
    full, seconds = sample("teacher", FULL_STEPS)
    reference = features(full)
    rows = [{"sampler": "teacher", "steps": FULL_STEPS, "distance": 0.0, "seconds": seconds, "clip": full}]
    for which in ("teacher", "student"):
        for steps in args.report_steps:
            drawn, seconds = sample(which, steps)
            distance = (features(drawn) - reference).norm(dim=1).mean().item()
            rows.append({"sampler": which, "steps": steps, "distance": distance, "seconds": seconds, "clip": drawn})
    for row in rows:
        drawn = row.pop("clip")
        if clip is not None:
            row["clip_score"] = clip(drawn, prompts).mean().item()
    (folder / "report.json").write_text(json.dumps(rows, indent=2))
    plot(rows).save(folder / "report.png")

    lines = [
        f"## Steps against quality, on {len(prompts)} prompts",
        "",
        f"Distance to the teacher's {FULL_STEPS}-step pictures from the same noise, of fixed random-filter features.",
        "",
        "| sampler | steps | distance |" + " CLIP score |" * (clip is not None) + " s per picture |",
        "|---|---|---|" + "---|" * (clip is not None) + "---|",
    ]
    for row in rows:
        score = f" {row['clip_score']:.2f} |" if clip is not None else ""
        lines.append(f"| {row['sampler']} | {row['steps']} | {row['distance']:.4f} |{score} {row['seconds']:.3f} |")
    return "\n".join(lines) + "\n\n![steps against quality](report.png)\n\n"


def plot(rows: list[dict], width: int = 560, height: int = 360) -> Image.Image:
    """Distance over steps (logarithmic), a line for each sampler."""
    sheet = Image.new("RGB", (width, height), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    left, right, top, bottom = 60, width - 20, 30, height - 50
    most_steps = max(row["steps"] for row in rows)
    most = max(row["distance"] for row in rows) or 1.0

    def place(row):
        x = left + (right - left) * math.log2(row["steps"]) / max(math.log2(most_steps), 1e-9)
        return x, bottom - (bottom - top) * row["distance"] / most

    draw.line([(left, top), (left, bottom), (right, bottom)], "black")
    for value in (0.0, most / 2, most):
        y = bottom - (bottom - top) * value / most
        draw.text((8, y - 8), f"{value:.3f}", "black", font)
        draw.line([(left - 4, y), (left, y)], "black")
    for steps in sorted({row["steps"] for row in rows}):
        x, _ = place({"steps": steps, "distance": 0.0})
        draw.text((x - 4, bottom + 6), str(steps), "black", font)
    draw.text((width // 2 - 20, height - 24), "steps", "black", font)
    draw.text((8, 6), "distance to the teacher's full-step pictures", "black", font)
    for i, (sampler, colour) in enumerate((("teacher", "#888888"), ("student", "#c03020"))):
        points = sorted(place(row) for row in rows if row["sampler"] == sampler)
        draw.line(points, colour, 2)
        for x, y in points:
            draw.ellipse([x - 3, y - 3, x + 3, y + 3], colour)
        draw.text((right - 80, top + 18 * i), sampler, colour, font)
    return sheet
