"""Sources of samples: shards, folders of images or clips, tables, files of prompts.

A source is a list of parts: a shard, some files of a folder, some rows of a table, some prompts. A part yields
(key, members) for each of its samples, members by extension as a shard has them, or (key, cause) for one that cannot
be used.
"""

import csv
import hashlib
import io
import json
import os
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
from PIL import Image

from common.data.shards import (
    IMAGE_MEMBERS,
    MOST_MEMBER_BYTES,
    VIDEO_MEMBERS,
    count_keys,
    is_local,
    named_fault,
    read_shard,
    shard_pictures,
)

EXIF_ORIENTATION = 0x0112

FETCH_TIMEOUT = 20.0  # seconds without a byte
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
    caption_columns: tuple[str, ...]  # whose texts are alternatives


@dataclass(frozen=True)
class Links:
    """Some addresses of images or clips, with their captions, and the folder in which what is fetched is kept."""

    folder: str
    links: tuple[tuple[str, list[str]], ...]


@dataclass(frozen=True)
class Prompts:
    """Some lines of a file of prompts."""

    start: int  # number of the first
    prompts: tuple[bytes, ...]


def read_part(part):
    """Yield the samples of a part, as the module's docstring says."""
    if isinstance(part, Files):
        return read_files(part)
    if isinstance(part, Links):
        return read_links(part)
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
    elif isinstance(part, Prompts | Links):
        stamps = [repr(part.prompts if isinstance(part, Prompts) else part.links)]
    elif isinstance(part, Rows):
        stamp = file_stamp(Path(part.path)) if part.table is None else part.table._fingerprint
        captions = part.caption_columns[0] if len(part.caption_columns) == 1 else part.caption_columns
        stamps = [f"{stamp} {part.start} {part.samples} {part.image_column} {captions}"]
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
    if isinstance(part, Files | Links):
        return len(part.files if isinstance(part, Files) else part.links)
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
    names = sorted(names_in(folder, kind) if captions is None else captions)
    if odd := [name for name in names if Path(name).is_absolute() or ".." in Path(name).parts]:
        raise ValueError(f"{folder}: {odd[0]}: must be a path inside this folder")
    names = [names[i] for i in np.random.default_rng(len(names)).permutation(len(names))]
    captions = captions or {}
    return [Files(folder, tuple((names[i], captions.get(names[i])) for i in part)) for part in split(len(names))]


def names_in(folder: str, kind: str) -> list[str]:
    """Paths inside a folder of all its images or clips; a subfolder with an image for each frame is a clip itself."""
    names = []
    for place, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found = [name for name in files if has_kind(name, kind) and not name.startswith(".")]
        if kind == "video" and not found and place != folder and frame_files(Path(place)):
            found = [""]
        names += [Path(place, name).relative_to(folder).as_posix() for name in found]
    return names


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


def read_captions_table(folder: str, block: dict, kind: str) -> dict[str, list[str]]:
    """Captions by path inside the folder, from the file of a `parquet` block, which may itself be in the folder.

    It is parquet or JSON. Where its names have no extension, the folder's own files with these stems are meant.
    """
    path = Path(block["path"]) if Path(block["path"]).is_file() else Path(folder, block["path"])
    file_column, fallback = block["filename_column"], block.get("fallback_caption_column")
    columns = column_names(block["caption_column"], "caption_column")
    wanted = [file_column, *columns, *([fallback] if fallback else [])]
    if path.suffix in (".jsonl", ".json"):
        rows = json_rows(path)
        found = list(dict.fromkeys(key for row in rows for key in row))
    else:
        table = parquet(str(path))
        found = table.schema_arrow.names
        rows = table.read(columns=[column for column in wanted if column in found]).to_pylist()
    for column in wanted:
        check_column("parquet: ", column, str(path), found)
    stems = {}
    if not block.get("identifier_includes_extension"):
        for name in sorted(names_in(folder, kind)):
            stems.setdefault(str(Path(name).with_suffix("")), []).append(name)
    captions = {}
    for row in rows:
        name = str(row.get(file_column))
        name, *others = stems.get(name, [name])
        if others:
            raise ValueError(f"{path}: {name} or {others[0]}: identifier_includes_extension must be true to say which")
        captions[name] = alternatives(row, columns) or alternatives(row, (fallback,))
    return captions


def json_rows(path: Path) -> list[dict]:
    """Rows of a JSON file: of a list, or an object in each line."""
    wanted = "must be a JSON list of objects, or have an object in each line"
    try:
        data = path.read_bytes()
        listed = data.lstrip().startswith(b"[")
        rows = json.loads(data) if listed else [json.loads(line) for line in data.splitlines() if line.strip()]
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"{path}: {wanted}: {error}") from None
    if odd := [row for row in rows if not isinstance(row, dict)]:
        raise ValueError(f"{path}: {wanted}, and has {odd[0]!r}")
    return rows


def column_names(value, key: str) -> tuple[str, ...]:
    """Names of one column or of several, whose texts are alternatives."""
    names = (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list) else ()
    if not names or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{key} is {value!r}, and must be a column's name or a list of them")
    return names


def alternatives(row: dict, columns: tuple[str, ...]) -> list[str]:
    """All texts in these columns of a row, each of which holds one or a list of them."""
    cells = [row.get(column) for column in columns]
    return [text for cell in cells for text in (cell if isinstance(cell, list) else [cell]) if text]


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
# Addresses
# ---------------------------------------------------------------------------------------------------------------------

HTTPS = urllib.request.OpenerDirector()  # that knows no other scheme, not even where it is sent on
for handler in (
    urllib.request.ProxyHandler, urllib.request.HTTPSHandler, urllib.request.HTTPRedirectHandler,
    urllib.request.HTTPDefaultErrorHandler, urllib.request.HTTPErrorProcessor, urllib.request.UnknownHandler,
):  # fmt: skip
    HTTPS.add_handler(handler())


def split_csv(path: Path, caption_column: str, url_column: str, cache_dir: str | None, kind: str) -> list:
    """Parts of a CSV file with a header: addresses, and paths of files in its own folder; all captions of each."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            rows, columns = list(reader), reader.fieldnames or []
    except (OSError, UnicodeError, csv.Error) as error:
        raise ValueError(f"{path}: {error}") from None
    check_column("csv_caption_column ", caption_column, str(path), columns)
    check_column("csv_url_column ", url_column, str(path), columns)
    files, links = {}, {}
    for number, row in enumerate(rows, 1):
        place = (row[url_column] or "").strip()
        if not place:
            raise ValueError(f"{path}: row {number} has no {url_column}")
        (links if "://" in place else files).setdefault(place, []).append(row[caption_column] or "")
    if links and not cache_dir:
        raise ValueError(f"{path} has addresses, and there is no csv_cache_dir to keep what is fetched")
    links = list(links.items())
    parts = [Links(cache_dir, tuple(links[part.start : part.stop])) for part in split(len(links))]
    return split_folder(str(path.parent), files, kind) + parts


def read_links(part: Links):
    for link, captions in part.links:
        extension = Path(urlsplit(link).path).suffix.lower().removeprefix(".")
        extension = extension if extension in (*IMAGE_MEMBERS, *VIDEO_MEMBERS) else "jpg"  # an image shows what it is
        path = Path(part.folder, f"{hashlib.blake2b(link.encode(), digest_size=16).hexdigest()}.{extension}")
        try:
            data = path.read_bytes() if path.is_file() else fetch(link, path)
        except Exception as error:  # of sockets, TLS, HTTP and the disk: each has its own
            yield link, named_fault(link, "address that cannot be fetched", error)
            continue
        yield f"/{path.stem}", {extension: data, "json": json.dumps({"caption": captions}).encode()}


def fetch(link: str, path: Path) -> bytes:
    """What is at an address, which is also kept as a file."""
    with HTTPS.open(link, timeout=FETCH_TIMEOUT) as answer:
        data = answer.read(MOST_MEMBER_BYTES + 1)
    if len(data) > MOST_MEMBER_BYTES:
        raise ValueError("too large")
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}")
    part.write_bytes(data)
    part.replace(path)
    return data


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
        raise ValueError(f"{path} is parquet: to read it, `pip install -r common/requirements.txt`") from None
    try:
        return ParquetFile(path)
    except (OSError, ValueError) as error:  # pyarrow's own are ValueErrors
        raise ValueError(f"{path} is no parquet file: {error}") from None


def split_table(paths: list[str], image_column: str, caption_columns: tuple[str, ...]) -> list[Rows]:
    parts = []
    for path in paths:
        file = parquet(path)
        check_columns(path, file.schema_arrow.names, image_column, caption_columns)
        for group in range(file.num_row_groups):
            parts.append(
                Rows(path, None, group, file.metadata.row_group(group).num_rows, image_column, caption_columns)
            )
    return parts


def split_hub_dataset(
    name: str, config: str | None, cache_dir: str | None, image_column: str, caption_columns: tuple[str, ...],
    split_name: str = "train", flag: str = "--", **options,
) -> list[Rows]:  # fmt: skip
    try:
        import datasets
    except ImportError:
        raise ValueError(f"{name} is no local folder; from the hub: `pip install datasets`") from None
    try:
        table = datasets.load_dataset(name, config, split=split_name, cache_dir=cache_dir, **options)
    except Exception as error:  # of the network, the hub, the dataset: each has its own
        raise ValueError(f"{name} cannot be loaded: {type(error).__name__}: {str(error).splitlines()[0]}") from None
    check_columns(name, table.column_names, image_column, caption_columns, flag)
    table = table.cast_column(image_column, datasets.Image(decode=False))
    return [Rows(name, table, part.start, len(part), image_column, caption_columns) for part in split(len(table))]


def check_columns(name: str, columns: list[str], image_column: str, caption_columns: tuple[str, ...], flag="--"):
    check_column(f"{flag}image_column ", image_column, name, columns)
    for column in caption_columns:
        check_column(f"{flag}caption_column ", column, name, columns)


def check_column(flag: str, column: str, name: str, columns: list[str]):
    if column not in columns:
        raise ValueError(f"{flag}{column}: {name} has {', '.join(columns)}")


def read_rows(part: Rows):
    try:
        if part.table is None:
            columns = [part.image_column, *part.caption_columns]
            batches = parquet(part.path).iter_batches(64, row_groups=[part.start], columns=columns)
            rows = (row for batch in batches for row in batch.to_pylist())
        else:
            rows = (part.table[part.start + i] for i in range(part.samples))
        for number, row in enumerate(rows):
            image, caption = row[part.image_column], alternatives(row, part.caption_columns)
            data, path = (image.get("bytes"), image.get("path")) if isinstance(image, dict) else (image, None)
            if data is None and path and has_kind(path, "image"):  # beside the file
                beside = Path(Path(part.path).parent, path)
                data = beside.read_bytes() if beside.is_file() else b""
            text = json.dumps({"caption": caption}, default=str).encode()
            yield f"/{part.path} {part.start} {number}", {"jpg": data or b"", "json": text}
    except (OSError, ValueError):  # pyarrow's own are ValueErrors
        yield part.path, "unreadable table"
