"""The datasets of a run: from flags, or from a dataset file (multidatabackend.json)."""

import argparse
import difflib
import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from accelerate.utils import broadcast_object_list

from common.data.buckets import (
    CROP_ASPECTS,
    CROP_STYLES,
    RESOLUTION_TYPES,
    Rules,
    check_rules,
    merge_small,
    one_bucket,
    target_size,
    targets_in_shapes,
    too_small,
    with_settings,
)
from common.data.clips import check_frame_count, clip_size
from common.data.shards import IMAGE_MEMBERS, VIDEO_MEMBERS, expand_shards, is_local
from common.data.sources import (
    count_samples,
    image_size,
    picture_sizes,
    read_metadata,
    split_folder,
    split_hub_dataset,
    split_prompts,
    split_table,
)

SOURCES = ("train_shards_path_or_url", "data_backend_config", "train_data_dir", "dataset_name", "train_prompts")


MOST_COUNTED = 100_000  # images whose headers are read for the table of buckets


SKIPS = ("vae", "text", "aspect", "metadata")


NOTHING = {
    "image": f"no images ({', '.join(IMAGE_MEMBERS)})",
    "video": f"no clips ({', '.join(VIDEO_MEMBERS)}, or folders of frames)",
}


@dataclass
class Dataset:
    id: str
    parts: list = field(repr=False)
    rules: Rules
    repeats: int = 0  # an epoch visits each sample once more than this
    caption_strategy: str | None = None
    cache_dir_vae: str | None = None
    skip: tuple[str, ...] = ()  # of what is done before training
    merged: dict[tuple[int, int], tuple[int, int]] = field(default_factory=dict)
    num_frames: int | None = None  # of a clip; None for images
    frame_interval: int = 1
    sizes: tuple[tuple[int, int], ...] = ()  # of prompts alone: height and width of clips that they could have

    @property
    def kind(self) -> str:
        return "image" if self.num_frames is None else "video"


# Keys of a dataset file: their type, or the strings they may be.
KEYS = {
    "id": str, "type": ("local", "webdataset"), "dataset_type": ("image", "video", "text_embeds"), "disabled": bool,
    "instance_data_dir": str, "repeats": int, "resolution": float, "resolution_type": RESOLUTION_TYPES,
    "aspect_bucket_rounding": int, "minimum_image_size": float, "maximum_image_size": float,
    "target_downsample_size": float, "crop": bool, "crop_aspect": CROP_ASPECTS, "crop_style": CROP_STYLES,
    "caption_strategy": ("textfile", "filename"), "metadata_backend": ("discovery",), "skip_file_discovery": str,
    "cache_dir_vae": str, "cache_dir": str, "default": bool, "write_batch_size": int,
    "num_frames": int, "frame_interval": int,
}  # fmt: skip


def check_data_flags(parser: argparse.ArgumentParser, args: argparse.Namespace, rules: Rules):
    """Opens the datasets; says what is cached and when, and how many samples an epoch has."""
    args.datasets = open_datasets(parser, args, rules)
    remote = not all(is_local(part) for dataset in args.datasets for part in dataset.parts)
    args.caches = "ondemand" if args.vae_cache_ondemand else "off" if args.vae_cache_disable or remote else "fill"
    if remote and args.caches == "off" and not args.vae_cache_disable:
        args.notes.append("The shards are not local: nothing is cached. --vae_cache_ondemand keeps what is encoded.")
    args.num_samples = args.max_train_samples or count_epoch(args.datasets)
    if args.max_train_steps is None and args.num_samples is None:
        parser.error(
            "--max_train_steps or --max_train_samples: one is needed, shards that are not local are not counted"
        )


def open_datasets(parser: argparse.ArgumentParser, args: argparse.Namespace, rules: Rules) -> list[Dataset]:
    """Datasets from whichever flag names them; a flag on the command line wins over a config's.

    Sets args.data_source, what errors name; and of a dataset file's text_embeds entry args.cache_dir_text and
    args.write_batch_size.
    """
    args.write_batch_size = None
    given = [name for name in SOURCES if getattr(args, name, None)]
    given = [name for name in given if getattr(args, name) != parser.get_default(name)] or given
    flags = [f"--{name}" for name in SOURCES if hasattr(args, name)]
    if len(given) > 1:
        parser.error(f"--{given[0]} and --{given[1]}: one or the other")
    usual = Path(args.output_dir, "multidatabackend.json")  # where the quickstarts put it
    if not given and usual.is_file():
        args.data_backend_config, given = str(usual), ["data_backend_config"]
        args.notes.append(f"--data_backend_config: {usual} is taken, as no other data are named.")
    if not given:
        parser.error(f"{flags[0]}: needed with --pretrained_teacher_model; or {', '.join(flags[1:])}")
    args.data_source = f"--{given[0]}"
    source = getattr(args, given[0])
    try:
        if given[0] == "data_backend_config":
            return read_backend(args, Path(source), rules)
        check_rules(rules, "--")
    except ValueError as error:
        parser.error(str(error))
    try:
        if given[0] == "train_prompts":
            sizes = targets_in_shapes(args.validation_resolution, rules)
            return [Dataset("prompts", split_prompts(source), rules, sizes=sizes, **frames_of(args, {}, "--"))]
        if given[0] == "train_shards_path_or_url":
            return [Dataset("shards", open_shards(source), rules, **frames_of(args, {}, "--"))]
        return [open_table_or_folder(args, source, rules)]
    except ValueError as error:
        parser.error(f"{args.data_source}: {error}")


def frames_of(args, entry: dict, where: str) -> dict:
    """Fields of a dataset of clips, from its entry or the command line; none in a script that trains on images."""
    if not hasattr(args, "num_frames"):
        return {}
    frames = entry.get("num_frames", args.num_frames)
    check_frame_count(f"{where}num_frames", frames)
    interval = entry.get("frame_interval", args.frame_interval)
    if interval < 1:
        raise ValueError(f"{where}frame_interval {interval}: must be at least 1")
    return {"num_frames": frames, "frame_interval": interval}


def open_shards(spec: str) -> list[str]:
    shards = expand_shards(spec)
    if missing := [shard for shard in shards if is_local(shard) and not Path(shard).is_file()]:
        raise ValueError(f"{missing[0]} does not exist ({len(missing)} of {len(shards)})")
    return shards


def open_table_or_folder(args, source: str, rules: Rules) -> Dataset:
    """A folder of images, of clips or of parquet files, a parquet file, or a dataset on the hub."""
    columns, frames = (args.image_column, args.caption_column), frames_of(args, {}, "--")
    kind, path = "video" if frames else "image", Path(source)
    if path.is_file():
        return Dataset(path.name, split_table([source], *columns), rules, **frames)
    if not path.is_dir():
        if args.train_data_dir == source:
            raise ValueError(f"{source}: no such folder")
        if frames:
            raise ValueError(f"{source}: no such folder or file, and datasets on the hub are read for images alone")
        parts = split_hub_dataset(source, args.dataset_config_name, args.cache_dir, *columns)
        return Dataset(source, parts, rules)
    if tables := sorted(map(str, path.rglob("*.parquet"))):
        return Dataset(path.name, split_table(tables, *columns), rules, **frames)
    captions = read_metadata(source, args.caption_column)
    parts = split_folder(source, captions, kind)
    if not parts:
        raise ValueError(f"{source}: {NOTHING[kind]} and no parquet files in it")
    return Dataset(path.name, parts, rules, caption_strategy="textfile" if captions is None else None, **frames)


# ---------------------------------------------------------------------------------------------------------------------
# Dataset file
# ---------------------------------------------------------------------------------------------------------------------


def read_backend(args, path: Path, rules: Rules) -> list[Dataset]:
    """Datasets of a file's enabled entries. What an entry does not say is as on the command line."""
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    datasets, text_entries = [], []
    for entry in entries if isinstance(entries, list) else [entries]:
        if not isinstance(entry, dict):
            raise ValueError(f"{path}: {entry!r}: must be a list of objects, one for each dataset")
        where = f"{path}: {entry.get('id')!r}"
        entry = {key: value for key, value in entry.items() if value is not None}
        check_entry(entry, where)
        if entry.get("disabled"):
            continue
        if entry.get("dataset_type") == "text_embeds":
            text_entries.append(entry)
        else:
            datasets.append(open_entry(args, entry, rules, where))
    if not datasets:
        raise ValueError(f"{path}: no dataset in it that is enabled")
    if twice := [name for name, count in Counter(dataset.id for dataset in datasets).items() if count > 1]:
        raise ValueError(f"{path}: two datasets have the id {twice[0]!r}")
    if text_entries:
        chosen = [entry for entry in text_entries if entry.get("default")] or text_entries
        if len(chosen) > 1:
            raise ValueError(f"{path}: {len(chosen)} entries of dataset_type text_embeds: make one of them the default")
        args.cache_dir_text = chosen[0].get("cache_dir", args.cache_dir_text)
        args.write_batch_size = chosen[0].get("write_batch_size")
    return datasets


def check_entry(entry: dict, where: str):
    for key, value in entry.items():
        if key not in KEYS:
            near = difflib.get_close_matches(key, KEYS, n=1)
            raise ValueError(f"{where}: unknown key {key!r}" + (f", did you mean {near[0]!r}?" if near else ""))
        wanted = KEYS[key]
        if isinstance(wanted, tuple):
            if value not in wanted:
                raise ValueError(f"{where} has {key} {value!r}, and must have one of {', '.join(wanted)}")
        elif not isinstance(value, (int, float) if wanted is float else wanted) or isinstance(value, bool) != (
            wanted is bool
        ):
            raise ValueError(f"{where} has {key} {value!r}, and must have one of type {wanted.__name__}")
    for key, least in (("repeats", 0), ("write_batch_size", 1)):
        if entry.get(key, least) < least:
            raise ValueError(f"{where} has {key} {entry[key]}, and must have at least {least}")
    skips = [word.strip() for word in entry.get("skip_file_discovery", "").split(",") if word.strip()]
    if odd := [word for word in skips if word not in SKIPS]:
        raise ValueError(f"{where} has skip_file_discovery {odd[0]!r}, and must have some of {', '.join(SKIPS)}")


def open_entry(args, entry: dict, rules: Rules, where: str) -> Dataset:
    frames = frames_of(args, entry, f"{where}: ")
    kind = "video" if frames else "image"
    if entry.get("dataset_type", kind) != kind:
        raise ValueError(f"{where} has dataset_type {entry['dataset_type']!r}, and this script trains on {kind}s")
    if unused := [key for key in ("num_frames", "frame_interval") if key in entry and not frames]:
        raise ValueError(f"{where} has {unused[0]}, and images have no frames")
    if "instance_data_dir" not in entry:
        raise ValueError(f"{where} has no instance_data_dir, the images' folder or the shards' path or URL")
    rules = with_settings(rules, entry, f"{where}: ", args.notes)
    check_rules(rules, f"{where}: ")
    source, strategy = entry["instance_data_dir"], entry.get("caption_strategy")
    if entry.get("type", "local") == "webdataset":
        parts = open_shards(source)
    else:
        strategy = strategy or "textfile"
        if not Path(source).is_dir():
            raise ValueError(f"{where}: {source}: no such folder")
        if not (parts := split_folder(source, kind=kind)):
            raise ValueError(f"{where}: {source}: {NOTHING[kind]} in it")
    return Dataset(
        entry.get("id", source), parts, rules, entry.get("repeats", 0), strategy,
        entry.get("cache_dir_vae", entry.get("cache_dir")),
        tuple(word.strip() for word in entry.get("skip_file_discovery", "").split(",") if word.strip()), **frames,
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Counts
# ---------------------------------------------------------------------------------------------------------------------


def count_epoch(datasets: list[Dataset]) -> int | None:
    """Samples that an epoch visits; None where not all is local."""
    counts = [count_samples(dataset.parts) for dataset in datasets]
    if None in counts:
        return None
    return sum(count * (dataset.repeats + 1) for count, dataset in zip(counts, datasets, strict=True))


def count_buckets(dataset: Dataset) -> tuple[Counter, int, int]:
    """Images by bucket, those that are too small, and of how many parts only one was looked at."""
    total = count_samples(dataset.parts)
    stride = -(-total // MOST_COUNTED) or 1
    counts, small = Counter(), 0
    for part in dataset.parts[::stride]:
        size_of = image_size if dataset.kind == "image" else clip_size
        for height, width in picture_sizes(part, dataset.kind, size_of):
            if too_small(height, width, dataset.rules):
                small += stride
            else:
                counts[target_size(height, width, dataset.rules)] += stride
    return counts, small, stride


def plan_buckets(args, accelerator):
    """Prints the table of buckets, and sends images of small buckets to another. Remote data are not looked at."""
    lines, merged = [], [{} for _ in args.datasets]
    if accelerator.is_main_process:
        found = {}
        for i, dataset in enumerate(args.datasets):
            known = dataset.sizes or one_bucket(dataset.rules) and dataset.rules.minimum is None  # by the flags alone
            local = all(map(is_local, dataset.parts)) and not set(dataset.skip) & {"aspect", "metadata"}
            if local and not known:
                found[i] = count_buckets(dataset)
        samples = Counter()  # of an epoch, in all datasets: they share buckets
        for i, (counts, _, _) in found.items():
            samples.update({bucket: count * (args.datasets[i].repeats + 1) for bucket, count in counts.items()})
        for i, (counts, small, stride) in found.items():
            if not getattr(args, "disable_bucket_pruning", False):
                merged[i] = merge_small(list(counts), samples, args.train_batch_size)
            lines += bucket_table(args.datasets[i], counts, small, stride, merged[i])
    if accelerator.num_processes > 1:
        broadcast_object_list(merged)
    for line in lines:
        accelerator.print(line)
    for dataset, own in zip(args.datasets, merged, strict=True):
        dataset.merged = own


def bucket_table(dataset: Dataset, counts: Counter, small: int, stride: int, merged: dict) -> list[str]:
    about = f", by one part in {stride}" if stride > 1 else ""
    visits = f", each {dataset.repeats + 1} times an epoch" if dataset.repeats else ""
    lines = [
        f"{dataset.id}: {sum(counts.values())} images in {len(counts)} buckets{visits}{about}",
        "   width height  images",
    ]
    for bucket, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        goes = merged.get(bucket)
        note = f"  less than a batch: to {goes[1]} x {goes[0]}" if goes else ""
        lines.append(f"  {bucket[1]:6d} {bucket[0]:6d} {count:7d}{note}")
    return lines + [f"  {small} images are below minimum_image_size and are skipped"] * bool(small)
