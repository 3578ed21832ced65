"""Steps against quality: how far teacher and student are from the teacher's full-step samples."""

import json
import math
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from common.validation import labelled_grid, pixels_of, validation_prompts
from common.watch import frame_strip, save_frames, to_bytes

FULL_STEPS = 50  # of the teacher's own sampler
SIDE = 128  # pictures are compared at this size
FILTERS, LEVELS = 64, 3
SHOWN = 4  # prompts, side by side
SIDE_BY_SIDE = "![frames, teacher and student](side_by_side.png)\n\nThe same as a video: side_by_side.mp4.\n\n"


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


def clip_features(clips: list[np.ndarray]) -> torch.Tensor:
    """Of the first, the middle and the last frame of clips [F, H, W, 3], in bytes: [N, 3 D]."""
    frames = [Image.fromarray(clip[i]) for clip in clips for i in (0, len(clip) // 2, -1)]
    return features(frames).reshape(len(clips), -1) / math.sqrt(3)


def measure(pictures, prompts: list[str], samplers: list[tuple], features=features) -> list[dict]:
    """A row for each sampler: seconds for one sample, distance to the first sampler's, and what was drawn.

    A sampler is its name, and what `pictures(which, prompts, steps, seed)` takes: which, steps and seed.
    """
    pictures(samplers[0][1], prompts[:1], 1, 0)  # the first call also loads and compiles: it is not timed
    rows, reference = [], None
    for name, which, steps, seed in samplers:
        start = time.time()
        drawn = pictures(which, prompts, steps, seed)
        seconds, seen = (time.time() - start) / len(prompts), features(drawn)
        reference = seen if reference is None else reference
        distance = (seen - reference).norm(dim=1).mean().item()
        rows.append({"sampler": name, "steps": steps, "distance": distance, "seconds": seconds, "drawn": drawn})
    return rows


def steps_report(args, pictures, clip, folder: Path) -> str:
    """Writes report.json and report.png, and returns the table as Markdown.

    `pictures(which, prompts, steps, seed)` draws. All start from the same noise, so the distance is that of pairs.
    """
    if not args.report_steps:
        return ""
    prompts, seed = validation_prompts(args), args.validation_seed
    samplers = [(which, which, steps, seed) for which in ("teacher", "student") for steps in args.report_steps]
    rows = measure(pictures, prompts, [("teacher", "teacher", FULL_STEPS, seed), *samplers])
    for row in rows:
        drawn = row.pop("drawn")
        if clip is not None:
            row["clip_score"] = clip(drawn, prompts).mean().item()
    columns = {"CLIP score": ("clip_score", ".2f")} if clip is not None else {}
    return write_report(folder, rows, f"on {len(prompts)} prompts", columns | {"s per picture": ("seconds", ".3f")})


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


def write_report(folder: Path, rows: list[dict], title: str, columns: dict[str, tuple[str, str]]) -> str:
    """report.json, report.png, and the table; `columns` are a heading's key in the rows and its format."""
    (folder / "report.json").write_text(json.dumps(rows, indent=2))
    plot(rows).save(folder / "report.png")
    lines = [
        f"## Steps against quality, {title}",
        "",
        f"Distance to the teacher's {FULL_STEPS}-step samples from the same noise, of fixed random-filter features.",
        "",
        "| sampler | steps | distance | " + " | ".join(columns) + " |",
        "|---|---|---|" + "---|" * len(columns),
    ]
    for row in rows:
        cells = [format(row[key], how) for key, how in columns.values()]
        lines.append(f"| {row['sampler']} | {row['steps']} | {row['distance']:.4f} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n\n![steps against quality](report.png)\n\n"


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
    draw.text((8, 6), "distance to the teacher's full-step samples", "black", font)
    for i, (sampler, colour) in enumerate((("teacher", "#888888"), ("student", "#c03020"))):
        points = sorted(place(row) for row in rows if row["sampler"] == sampler)
        draw.line(points, colour, 2)
        for x, y in points:
            draw.ellipse([x - 3, y - 3, x + 3, y + 3], colour)
        draw.text((right - 80, top + 18 * i), sampler, colour, font)
    return sheet
