"""Judgement of a student: distance to the teacher's full-step samples, CLIP score, and held-out samples.

A sampler is teacher or student with a number of steps. `pictures(which, prompts, steps, seed)` generates, `which` being
"teacher" or "student".
"""

import json
import math
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

from common.data.samples import BadSample, Sample, open_readers
from common.data.stream import ShardPass
from common.pictures import pixels_of, validation_prompts

FULL_STEPS = 50  # of the teacher's own sampler
SIDE = 128  # pixels; pictures are compared at this size
FILTERS, LEVELS = 64, 3


def features(pictures: list[Image.Image]) -> torch.Tensor:
    """Features [N, D] of N pictures: strengths of fixed random filters at three scales, each over a grid of places.

    They change with the things in a picture and with their places, and little with a shift of a few pixels.
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


def measure(pictures, prompts: list[str], samplers: list[tuple], features=features, processes: int = 1) -> list[dict]:
    """A row for each sampler: seconds for one sample, distance to the first sampler's samples, and the samples.

    A sampler is (name, which, steps, seed). So many `processes` share the prompts.
    """
    pictures(samplers[0][1], prompts[:processes], 1, 0)  # the first call also loads and compiles: it is not timed
    rows, reference = [], None
    for name, which, steps, seed in samplers:
        start = time.time()
        generated = pictures(which, prompts, steps, seed)
        seconds, vectors = (time.time() - start) / math.ceil(len(prompts) / processes), features(generated)
        reference = vectors if reference is None else reference
        distance = (vectors - reference).norm(dim=1).mean().item()
        rows.append({"sampler": name, "steps": steps, "distance": distance, "seconds": seconds, "generated": generated})
    return rows


def write_report(args, pictures, clip, sizes, folder: Path, processes: int = 1) -> str:
    """Writes report.json and report.png, and returns a table as Markdown. The toy's world judges pictures of the toy.

    All samplers start from the same noise, so the distance is that of pairs. `sizes` are those of the toy's pictures;
    so many `processes` share the prompts.
    """
    if not args.report_steps:
        return ""
    if args.pretrained_teacher_model is None:
        return toy_judge().report(pictures, clip, folder, args.report_steps, sizes, args.max_train_steps, processes)
    prompts, seed = validation_prompts(args), args.validation_seed
    samplers = [(which, which, steps, seed) for which in ("teacher", "student") for steps in args.report_steps]
    rows = measure(pictures, prompts, [("teacher", "teacher", FULL_STEPS, seed), *samplers], processes=processes)
    for row in rows:
        generated = row.pop("generated")
        if clip is not None:
            row["clip_score"] = clip(generated, prompts).mean().item()
    columns = {"CLIP score": ("clip_score", ".2f")} if clip is not None else {}
    return write_rows(folder, rows, f"on {len(prompts)} prompts", columns | {"s per picture": ("seconds", ".3f")})


def toy_judge():
    """The module that judges pictures of the toy world; no other place in the program imports from tests/."""
    from tests.toy import report

    return report


def write_rows(folder: Path, rows: list[dict], title: str, columns: dict[str, tuple[str, str]]) -> str:
    """Writes report.json and report.png, and returns the table; `columns` are {heading: (key of a row, format)}."""
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
        cells = [format(row[key], style) for key, style in columns.values()]
        lines.append(f"| {row['sampler']} | {row['steps']} | {row['distance']:.4f} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n\n![steps against quality](report.png)\n\n"


def plot(rows: list[dict], width: int = 560, height: int = 360) -> Image.Image:
    """A plot of distance over steps (logarithmic), a line for teacher and student each."""
    sheet = Image.new("RGB", (width, height), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    left, right, top, bottom = 60, width - 20, 30, height - 50
    most_steps = max(row["steps"] for row in rows)
    most_distance = max(row["distance"] for row in rows) or 1.0

    def place(row):
        x = left + (right - left) * math.log2(row["steps"]) / max(math.log2(most_steps), 1e-9)
        return x, bottom - (bottom - top) * row["distance"] / most_distance

    pen.line([(left, top), (left, bottom), (right, bottom)], "black")
    for value in (0.0, most_distance / 2, most_distance):
        y = bottom - (bottom - top) * value / most_distance
        pen.text((8, y - 8), f"{value:.3f}", "black", font)
        pen.line([(left - 4, y), (left, y)], "black")
    for steps in sorted({row["steps"] for row in rows}):
        x, _ = place({"steps": steps, "distance": 0.0})
        pen.text((x - 4, bottom + 6), str(steps), "black", font)
    pen.text((width // 2 - 20, height - 24), "steps", "black", font)
    pen.text((8, 6), "distance to the teacher's full-step samples", "black", font)
    for i, (sampler, colour) in enumerate((("teacher", "#888888"), ("student", "#c03020"))):
        points = sorted(place(row) for row in rows if row["sampler"] == sampler)
        pen.line(points, colour, 2)
        for x, y in points:
            pen.ellipse([x - 3, y - 3, x + 3, y + 3], colour)
        pen.text((right - 80, top + 18 * i), sampler, colour, font)
    return sheet


def hold_out(args, data, readers: list, encoder) -> tuple[list[Sample], list]:
    """Samples of the first --eval_samples different pictures of the data, and readers that skip these pictures.

    Where the data have pictures to be held out, these are taken instead, and the readers skip nothing.
    """
    if not args.eval_steps:
        return [], readers
    if data.held_out:
        own = open_readers(args, replace(data, datasets=data.held_out))
        samples = first_pictures(data.held_out, own, args.eval_samples)
        return encoder.encoded(list(samples.values())), readers
    held_out = first_pictures(data.datasets, readers, args.eval_samples)
    return list(held_out.values()), [WithoutHeldOut(reader, set(held_out)) for reader in readers]


def first_pictures(datasets, readers: list, count: int) -> dict[str, Sample]:
    """The first samples of different pictures, by the picture's hash."""
    found, parts = {}, [(i, part) for i, dataset in enumerate(datasets) for part in dataset.parts]
    for sample in ShardPass(parts, readers, process=0, processes=1):
        if isinstance(sample, Sample):
            found.setdefault(image_of(sample), sample)
        if len(found) == count:
            break
    return found


def image_of(sample: Sample) -> str:
    """Hash of a sample's image. A key is this hash, followed by the bucket where that is not the image's own."""
    return sample.key.partition("-")[0]


@dataclass
class WithoutHeldOut:
    """A reader that skips the pictures whose hashes are held out."""

    reader: object
    held_out: set[str]

    def __call__(self, members, visit, name=""):
        sample = self.reader(members, visit, name)
        if image_of(sample) in self.held_out:
            raise BadSample("held out for --eval_steps")
        return sample


class ClipScore:
    """100 * cosine of picture and prompt in the space of the user's CLIP, at least 0 (Hessel et al. 2021)."""

    def __init__(self, name: str, device, cache_dir: str | None = None):
        from transformers import AutoTokenizer, CLIPModel
        from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil  # asks for no torchvision

        self.device = device
        try:
            self.model = CLIPModel.from_pretrained(name, cache_dir=cache_dir, dtype=torch.float32).eval()
            self.tokenizer = AutoTokenizer.from_pretrained(name, cache_dir=cache_dir)
            self.processor = CLIPImageProcessorPil.from_pretrained(name, cache_dir=cache_dir)
        except (OSError, ValueError) as error:
            raise SystemExit(f"--evaluation_clip_model {name}: cannot be loaded ({error})") from None

    @torch.no_grad()
    def __call__(self, pictures: list, prompts: list[str]) -> torch.Tensor:
        """Scores [B], on the CPU. The model is on the device only during the call."""
        length = self.model.config.text_config.max_position_embeddings
        tokens = self.tokenizer(prompts, padding=True, truncation=True, max_length=length, return_tensors="pt")
        pixels = self.processor(images=pictures, return_tensors="pt")["pixel_values"]
        self.model.to(self.device)
        with torch.autocast(torch.device(self.device).type, enabled=False):
            out = self.model(
                input_ids=tokens.input_ids.to(self.device), attention_mask=tokens.attention_mask.to(self.device),
                pixel_values=pixels.to(self.device),
            )  # fmt: skip
        self.model.to("cpu")
        return (100.0 * (out.image_embeds * out.text_embeds).sum(1)).clamp(min=0.0).float().cpu()


def open_clip(args, accelerator) -> ClipScore | None:
    """The CLIP of --evaluation_type clip, in the main process."""
    if args.evaluation_type != "clip" or not accelerator.is_main_process:
        return None
    return ClipScore(args.evaluation_clip_model, accelerator.device, args.cache_dir)
