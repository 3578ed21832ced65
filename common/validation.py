"""Pictures of a run: labelled grids, on disk and in every tracker."""

import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

PROMPTS = (
    "a red fox in fresh snow, morning light, photograph",
    "an old fisherman mending his net, oil painting",
    "a lighthouse on a cliff in a storm",
    "a bowl of oranges beside a blue vase, still life",
)
MARGIN, LABEL_HEIGHT = 6, 18


def labelled_grid(rows: list[list[Image.Image]], row_labels: list[str], column_labels: list[str]) -> Image.Image:
    """Pictures row by row, labels left of the rows and, wrapped, above the columns. Small pictures are enlarged."""
    font = ImageFont.load_default(13)
    scale = max(1, 128 // rows[0][0].height)
    width, height = rows[0][0].width * scale, rows[0][0].height * scale
    left = max(int(font.getlength(label)) for label in row_labels) + 2 * MARGIN
    columns = [wrap(label, font, width) for label in column_labels]
    top = max(len(lines) for lines in columns) * LABEL_HEIGHT + MARGIN
    size = (left + len(columns) * (width + MARGIN), top + len(rows) * (height + MARGIN))
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for column, lines in enumerate(columns):
        draw.text((left + column * (width + MARGIN), MARGIN // 2), "\n".join(lines), "black", font)
    for row, (label, pictures) in enumerate(zip(row_labels, rows, strict=True)):
        y = top + row * (height + MARGIN)
        draw.text((MARGIN, y + height // 2 - LABEL_HEIGHT // 2), label, "black", font)
        for column, picture in enumerate(pictures):
            enlarged = picture.resize((width, height), Image.Resampling.NEAREST)
            sheet.paste(enlarged, (left + column * (width + MARGIN), y))
    return sheet


def side_by_side(left: Image.Image, right: Image.Image) -> Image.Image:
    pair = Image.new("RGB", (left.width + right.width + 2, left.height), "white")
    pair.paste(left, (0, 0))
    pair.paste(right, (left.width + 2, 0))
    return pair


def wrap(text: str, font, width: int, most_lines: int = 5) -> list[str]:
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


def show_picture(accelerator, picture: Image.Image, folder: Path, name: str, step: int):
    """Saves FOLDER/NAME-STEP.png and logs it to every tracker."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}-{step:06d}.png"
    picture.save(path)
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            tracker.writer.add_image(name, np.asarray(picture), step, dataformats="HWC")
        elif tracker.name == "wandb":
            import wandb

            tracker.log({name: wandb.Image(picture)}, step=step)
        elif tracker.name == "trackio":
            import trackio

            tracker.log({name: trackio.Image(picture)}, step=step)
    return path


def validation_prompts(args) -> list[str]:
    library = args.validation_prompt_library
    prompts = list(json.loads(Path(library).read_text()).values()) if library else []
    return prompts + ([args.validation_prompt] if args.validation_prompt else []) or list(PROMPTS)


def init_trackers(args, accelerator):
    """Their settings must be scalars or text, and the hub's token is nobody's business."""
    settings = {
        name: value if isinstance(value, int | float | str) else str(value) for name, value in vars(args).items()
    }
    settings.pop("hub_token")
    named = {"name": args.tracker_run_name}
    accelerator.init_trackers(args.tracker_project_name, settings, {"wandb": named, "trackio": named})
