"""Sources of samples: shards, folders of images or clips, tables, files of prompts.

A source is a list of parts: a shard, some files of a folder, some rows of a table, some prompts. A part yields
(key, members) for each of its samples, members by extension as a shard has them, or (key, cause) for one that cannot
be used.
"""

import hashlib
import io
import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from common.data.shards import (
    IMAGE_MEMBERS,
    MOST_MEMBER_BYTES,
    VIDEO_MEMBERS,
    count_keys,
    is_local,
    read_shard,
    shard_pictures,
)

EXIF_ORIENTATION = 0x0112

PARTS, MOST_FILES = 64, 1024  # of a folder: its parts, and files in a part, whose latents make one file of the cache


@dataclass(frozen=True)
class Files:
    """Some images or clips of a folder; the caption is None where a .txt beside the file holds it.

    A clip may be a folder too, with a file for each frame.
    """

    folder: str
    files: tuple[tuple[str, str | list[str] | None], ...]  # path inside the folder, caption


@dataclass(frozen=True)
class Rows:
    """Some rows of a parquet file, one row group of it, or of a dataset of the package `datasets`."""

    path: str
    table: object  # the dataset, or None for a file
    start: int  # row group, or first row
    samples: int
    image_column: str
    caption_column: str


@dataclass(frozen=True)
class Prompts:
    """Some lines of a file of prompts."""

    start: int  # number of the first
    prompts: tuple[bytes, ...]


def read_part(part):
    """Yield the samples of a part, as the module's docstring says."""
    if isinstance(part, Files):
        return read_files(part)
    if isinstance(part, Prompts):
        return ((f"/{number}", {"txt": prompt}) for number, prompt in enumerate(part.prompts, part.start))
    return read_rows(part) if isinstance(part, Rows) else read_shard(part)


def part_fingerprint(part) -> str:
    """A hash that changes where a local part does."""
    if isinstance(part, Files):
        stamps = [json.dumps(part.files)]
        for name, _ in part.files:
            image = Path(part.folder, name)
            frames = sorted(image.iterdir()) if image.is_dir() else []
            stamps += map(file_stamp, [image, *frames, caption_file(image)])
    elif isinstance(part, Prompts):
        stamps = [repr(part.prompts)]
    elif isinstance(part, Rows):
        stamp = file_stamp(Path(part.path)) if part.table is None else part.table._fingerprint
        stamps = [f"{stamp} {part.start} {part.samples} {part.image_column} {part.caption_column}"]
    else:
        stamps = [file_stamp(Path(part))]
    return hashlib.blake2b("\n".join(stamps).encode("utf-8", "surrogateescape"), digest_size=8).hexdigest()


def file_stamp(path: Path) -> str:
    try:
        status = path.stat()
    except OSError:
        return ""
    return f"{path.resolve()} {status.st_size} {status.st_mtime_ns}"


def count_samples(parts: list) -> int | None:
    """Samples in local parts, without reading them; None where a part is not local."""
    return sum(map(count_part, parts)) if all(map(is_local, parts)) else None


def count_part(part) -> int:
    if isinstance(part, Files):
        return len(part.files)
    if isinstance(part, Rows):
        return part.samples
    return len(part.prompts) if isinstance(part, Prompts) else count_keys(part)


def image_size(source) -> tuple[int, int]:
    """(height, width) of an image, from its header alone."""
    with Image.open(source) as image:
        return true_size(image, header_only=True)


def picture_sizes(part, kind: str, size_of):
    """Yield size_of each image or video of a local part; those that cannot be read are left out."""
    if isinstance(part, Files):
        paths = (Path(part.folder, name) for name, _ in part.files)
        sources = (frame_files(path)[0] if path.is_dir() else path for path in paths)
    elif isinstance(part, Rows):
        sources = (io.BytesIO(members["jpg"]) for _, members in read_rows(part) if not isinstance(members, str))
    else:
        sources = shard_pictures(part, kind)
    for source in sources:
        try:
            yield size_of(source)
        except Exception:  # PIL's decoders raise nearly anything on wrong bytes
            pass


def true_size(image: Image.Image, header_only: bool = False) -> tuple[int, int]:
    """(height, width) of the upright image: EXIF may say that it is stored on its side."""
    width, height = image.size
    if image.format == "TIFF":
        return height, width  # PIL turns it itself
    if header_only and image.format == "PNG" and "exif" not in image.info:
        return height, width  # EXIF behind the pixels is found only by decoding them
    return (width, height) if image.getexif().get(EXIF_ORIENTATION, 1) >= 5 else (height, width)


# ---------------------------------------------------------------------------------------------------------------------
# Folders
# ---------------------------------------------------------------------------------------------------------------------


def split_folder(folder: str, captions: dict[str, str | list[str]] | None = None, kind: str = "image") -> list[Files]:
    """Parts of all images or clips in a folder and its subfolders, or of those with a caption.

    The parts follow from the names alone. Names are mixed first, because neighbours are often alike.
    """
    if captions is None:
        names = []
        for place, folders, files in os.walk(folder):
            folders[:] = [name for name in folders if not name.startswith(".")]
            found = [name for name in files if has_kind(name, kind) and not name.startswith(".")]
            if kind == "video" and not found and place != folder and frame_files(Path(place)):
                found = [""]  # the subfolder itself is a clip
            names += [Path(place, name).relative_to(folder).as_posix() for name in found]
    else:
        names = list(captions)
    names.sort()
    names = [names[i] for i in np.random.default_rng(len(names)).permutation(len(names))]
    captions = captions or {}
    return [Files(folder, tuple((names[i], captions.get(names[i])) for i in part)) for part in split(len(names))]


def split(count: int) -> list[range]:
    """Numbers of so many samples, in parts of one size."""
    size = max(1, min(MOST_FILES, -(-count // PARTS)))
    return [range(start, min(start + size, count)) for start in range(0, count, size)]


def has_kind(name: str, kind: str) -> bool:
    return Path(name).suffix.lower().removeprefix(".") in {"image": IMAGE_MEMBERS, "video": VIDEO_MEMBERS}[kind]


def frame_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if has_kind(path.name, "image") and not path.name.startswith("."))


def caption_file(path: Path) -> Path:
    return path.with_name(f"{path.name}.txt") if path.is_dir() else path.with_suffix(".txt")


def read_metadata(folder: str, caption_column: str) -> dict[str, str | list[str]] | None:
    """Captions by path inside the folder, from all metadata.jsonl in it; None where there is none."""
    captions, found = {}, sorted(Path(folder).rglob("metadata.jsonl"))
    for path in found:
        for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
            if line.strip():
                try:
                    values = json.loads(line)
                    name = (path.parent / values["file_name"]).relative_to(folder).as_posix()
                    captions[name] = values[caption_column]
                except (ValueError, KeyError, TypeError) as error:
                    reason = f"no {error}" if isinstance(error, KeyError) else error
                    raise ValueError(f"{path}, line {number}: {reason}") from None
    return captions if found else None


def read_files(part: Files):
    for name, caption in part.files:
        path = Path(part.folder, name)
        members = {}
        try:
            if path.is_dir():
                files = {frame.name.lower(): frame for frame in frame_files(path)}
            else:
                files = {path.suffix.lower().removeprefix("."): path}
            for extension, file in files.items():
                members[extension] = None if file.stat().st_size > MOST_MEMBER_BYTES else file.read_bytes()
            text = caption_file(path)
            if caption is not None:
                members["json"] = json.dumps({"caption": caption}).encode()
            elif text.is_file():
                members["txt"] = text.read_bytes()
        except OSError:
            yield name, "unreadable file"
            continue
        yield str(Path("/", name).with_suffix("")), members


# ---------------------------------------------------------------------------------------------------------------------
# Prompts
# ---------------------------------------------------------------------------------------------------------------------


def split_prompts(path: str) -> list[Prompts]:
    """Parts of a text file with a prompt a line; empty lines do not count."""
    try:
        lines = [line.strip() for line in Path(path).read_bytes().splitlines()]
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    lines = [line for line in lines if line]
    if not lines:
        raise ValueError(f"{path}: no prompts in it")
    return [Prompts(part.start, tuple(lines[part.start : part.stop])) for part in split(len(lines))]


# ---------------------------------------------------------------------------------------------------------------------
# Tables
# ---------------------------------------------------------------------------------------------------------------------


def parquet(path: str):
    try:
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise ValueError(f"{path} is parquet: to read it, `pip install pyarrow`") from None
    try:
        return ParquetFile(path)
    except (OSError, ValueError) as error:  # pyarrow's own are ValueErrors
        raise ValueError(f"{path} is no parquet file: {error}") from None


def split_table(paths: list[str], image_column: str, caption_column: str) -> list[Rows]:
    parts = []
    for path in paths:
        file = parquet(path)
        check_columns(path, file.schema_arrow.names, image_column, caption_column)
        for group in range(file.num_row_groups):
            parts.append(Rows(path, None, group, file.metadata.row_group(group).num_rows, image_column, caption_column))
    return parts


def split_hub_dataset(name: str, config: str | None, cache_dir: str | None, image_column: str, caption_column: str):
    try:
        import datasets
    except ImportError:
        raise ValueError(f"{name} is no local folder; from the hub: `pip install datasets`") from None
    try:
        table = datasets.load_dataset(name, config, split="train", cache_dir=cache_dir)
    except Exception as error:  # of the network, the hub, the dataset: each has its own
        raise ValueError(f"{name} cannot be loaded: {type(error).__name__}: {str(error).splitlines()[0]}") from None
    check_columns(name, table.column_names, image_column, caption_column)
    table = table.cast_column(image_column, datasets.Image(decode=False))
    return [Rows(name, table, part.start, len(part), image_column, caption_column) for part in split(len(table))]


def check_columns(name: str, columns: list[str], image_column: str, caption_column: str):
    for flag, column in (("--image_column", image_column), ("--caption_column", caption_column)):
        if column not in columns:
            raise ValueError(f"{flag} {column}: {name} has {', '.join(columns)}")


def read_rows(part: Rows):
    try:
        if part.table is None:
            columns = [part.image_column, part.caption_column]
            batches = parquet(part.path).iter_batches(64, row_groups=[part.start], columns=columns)
            rows = (row for batch in batches for row in batch.to_pylist())
        else:
            rows = (part.table[part.start + i] for i in range(part.samples))
        for number, row in enumerate(rows):
            image, caption = row[part.image_column], row[part.caption_column]
            data, path = (image.get("bytes"), image.get("path")) if isinstance(image, dict) else (image, None)
            if data is None and path and has_kind(path, "image"):  # beside the file
                beside = Path(Path(part.path).parent, path)
                data = beside.read_bytes() if beside.is_file() else b""
            text = json.dumps({"caption": caption}, default=str).encode()
            yield f"/{part.path} {part.start} {number}", {"jpg": data or b"", "json": text}
    except (OSError, ValueError):  # pyarrow's own are ValueErrors
        yield part.path, "unreadable table"
