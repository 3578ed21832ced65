"""Pictures of a run: whose process draws them, labelled grids, comparisons, strips of frames, and previews."""

import json
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import gather_object
from diffusers import AutoencoderTiny
from PIL import Image, ImageDraw, ImageFont

PROMPTS = (  # of validation, where no flag names any
    "a red fox in fresh snow, morning light, photograph",
    "an old fisherman mending his net, oil painting",
    "a lighthouse on a cliff in a storm",
    "a bowl of oranges beside a blue vase, still life",
)
MARGIN, LABEL_HEIGHT = 6, 18  # pixels


def labelled_grid(rows: list[list[Image.Image]], row_labels: list[str], column_labels: list[str]) -> Image.Image:
    """A sheet of pictures, enlarged if small, with labels left of the rows and, wrapped, above the columns."""
    font = ImageFont.load_default(13)
    scale = max(1, 128 // rows[0][0].height)
    width, height = rows[0][0].width * scale, rows[0][0].height * scale
    left = max(int(font.getlength(label)) for label in row_labels) + 2 * MARGIN
    columns = [wrap(label, font, width) for label in column_labels]
    top = max(len(lines) for lines in columns) * LABEL_HEIGHT + MARGIN
    size = (left + len(columns) * (width + MARGIN), top + len(rows) * (height + MARGIN))
    sheet = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(sheet)
    for column, lines in enumerate(columns):
        pen.text((left + column * (width + MARGIN), MARGIN // 2), "\n".join(lines), "black", font)
    for row, (label, pictures) in enumerate(zip(row_labels, rows, strict=True)):
        y = top + row * (height + MARGIN)
        pen.text((MARGIN, y + height // 2 - LABEL_HEIGHT // 2), label, "black", font)
        for column, picture in enumerate(pictures):
            enlarged = picture.resize((width, height), Image.Resampling.NEAREST)
            sheet.paste(enlarged, (left + column * (width + MARGIN), y))
    return sheet


def picture_pair(left: Image.Image, right: Image.Image) -> Image.Image:
    """Two pictures of one height side by side."""
    pair = Image.new("RGB", (left.width + right.width + 2, left.height), "white")
    pair.paste(left, (0, 0))
    pair.paste(right, (left.width + 2, 0))
    return pair


def wrap(text: str, font, width: int, most_lines: int = 5) -> list[str]:
    """Lines of a text that are at most `width` pixels wide; no more than `most_lines`."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    if len(lines) > most_lines:
        lines = [*lines[: most_lines - 1], lines[most_lines - 1] + " ..."]
    return lines


def below_each_other(sheets: list[Image.Image]) -> Image.Image:
    """One sheet of several, one below the other."""
    width, height = max(sheet.width for sheet in sheets), sum(sheet.height for sheet in sheets)
    joined, y = Image.new("RGB", (width, height), "white"), 0
    for sheet in sheets:
        joined.paste(sheet, (0, y))
        y += sheet.height
    return joined


def pixels_of(picture: Image.Image) -> torch.Tensor:
    """Pixels [3, H, W] in [0, 1] of a picture."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255.0


def share_prompts(generate, accelerator, at_once: int | None = None):
    """The same generator with its prompts shared among the processes: all have to call it, and get all samples.

    generate(which, prompts, steps, seed, ...) makes a sample for each prompt, the i-th from noise of seed + i. With
    `at_once` it gets no more prompts than that at a time, and the same ones together however many processes there are.
    Without an accelerator nothing is shared: where networks are split, a forward takes all processes.
    """
    own, processes = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)

    def shared(which, prompts: list[str], steps: int, seed: int, **options) -> list:
        found, some = [], at_once or -(-len(prompts) // processes)
        for first in range(0, len(prompts), some * processes):
            i = first + own * some
            part = prompts[i : i + some]
            drawn = generate(which, part, steps, seed + i, **options) if part else []
            found += gather_object(drawn) if processes > 1 else drawn
        return found

    return shared


class Comparison:
    """Pictures by student and teacher side by side, in a grid for each size: a row per step count, a column per prompt.

    `pictures(which, prompts, steps, seed, size=, callback=)` generates; the teacher's never change and are kept.
    """

    def __init__(self, args, pictures, preview, clip):
        self.args, self.pictures, self.preview, self.clip = args, pictures, preview, clip
        self.teacher_rows = {}

    def sheet(self) -> tuple[Image.Image, dict[str, float]]:
        """A sheet with all grids, and the CLIP scores of the student's pictures if there is a CLIP."""
        args, sheets, scores = self.args, [], {}
        prompts, seed = validation_prompts(args), args.validation_seed
        for size in args.validation_resolution:
            rows, labels = [], []
            for steps in args.validation_num_inference_steps:
                label = f"{steps} step" + "s" * (steps > 1)
                if len(args.validation_resolution) > 1:
                    label += f" {size[1]}x{size[0]}"
                callback = self.preview(f"preview-{label.replace(' ', '-')}")
                row = self.pictures("student", prompts, steps, seed, size=size, callback=callback)
                if self.clip is not None:
                    scores |= spread(f"clip_score/{label}", self.clip(row, prompts))
                if not args.disable_benchmark:
                    if label not in self.teacher_rows:
                        self.teacher_rows[label] = self.pictures("teacher", prompts, steps, seed, size=size)
                    row = [picture_pair(*pair) for pair in zip(self.teacher_rows[label], row, strict=True)]
                rows.append(row)
                labels.append(label)
            who = "student: " if args.disable_benchmark else "teacher | student: "
            sheets.append(labelled_grid(rows, labels, [who + prompt for prompt in prompts]))
        return below_each_other(sheets), scores


def spread(name: str, scores: torch.Tensor) -> dict[str, float]:
    """Minimum, maximum, mean and standard deviation of scores, by names for the trackers."""
    values = {"min": scores.min(), "max": scores.max(), "mean": scores.mean(), "std": scores.std(correction=0)}
    return {f"{name}/{statistic}": value.item() for statistic, value in values.items()}


def validation_prompts(args) -> list[str]:
    """Prompts of validation: those of the flags, or else four of ours."""
    library = args.validation_prompt_library
    prompts = list(json.loads(Path(library).read_text()).values()) if library else []
    return prompts + ([args.validation_prompt] if args.validation_prompt else []) or list(PROMPTS)


def frame_strip(clip: np.ndarray, count: int = 4) -> Image.Image:
    """Frames of a clip [F, H, W, 3] side by side, evenly spaced from the first to the last."""
    frames = [clip[i] for i in np.linspace(0, len(clip) - 1, min(count, len(clip))).round().astype(int)]
    return Image.fromarray(to_bytes(np.concatenate(frames, 1)))


def to_bytes(pixels: np.ndarray) -> np.ndarray:
    """Pixels in [0, 1] as bytes; bytes stay as they are."""
    if pixels.dtype == np.uint8:
        return pixels
    return (pixels * 255.0).round().clip(0, 255).astype(np.uint8)


def open_preview(args, name: str, accelerator, show):
    """A function preview(label) -> callback for a pipeline, or None without --validation_preview.

    After steps N, 2N, ... of --validation_preview_steps N the callback calls show(picture, "LABEL-stepNN"), with the
    half-done pictures of a batch side by side. `name` is the tiny autoencoder of the model, by which they are decoded
    unless --validation_preview_model is given.
    """
    if not args.validation_preview or not accelerator.is_main_process:
        return lambda label: None
    device = accelerator.device
    source = args.validation_preview_model or name
    if source is None:
        raise SystemExit("--validation_preview: this model has no tiny autoencoder, give --validation_preview_model")
    try:
        tiny = AutoencoderTiny.from_pretrained(source, cache_dir=args.cache_dir).eval().to(device)
    except Exception as error:  # from_pretrained raises many kinds
        raise SystemExit(f"--validation_preview_model {source}: cannot be loaded ({error})") from None

    def preview(label: str):
        @torch.no_grad()
        def on_step_end(pipeline, i: int, t, tensors: dict) -> dict:
            if (i + 1) % args.validation_preview_steps == 0:
                latents = tensors["latents"].to(device, next(tiny.parameters()).dtype)
                with torch.autocast(torch.device(device).type, enabled=False):
                    pixels = tiny.decode(latents / tiny.config.scaling_factor).sample  # [B, 3, H, W] in [-1, 1]
                row = (pixels.float() * 127.5 + 127.5).clamp(0, 255).byte().permute(2, 0, 3, 1).flatten(1, 2)
                show(Image.fromarray(row.cpu().numpy()), f"{label}-step{i + 1:02d}")  # [H, B * W, 3]
            return tensors

        return on_step_end

    return preview
