"""The datasets of a run: from flags, or from a dataset file (multidatabackend.json)."""

import argparse
import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from shutil import which

from accelerate.utils import broadcast_object_list

from common.data.buckets import (
    CROP_ASPECTS,
    CROP_STYLES,
    RESOLUTION_TYPES,
    Rules,
    check_frame_count,
    complete_rules,
    merge_small,
    one_bucket,
    target_size,
    targets_in_shapes,
    too_small,
    with_settings,
)
from common.data.entries import entry_here
from common.data.shards import IMAGE_MEMBERS, READ_BY, VIDEO_MEMBERS, expand_shards, is_local, scheme_of
from common.data.sources import (
    Links,
    column_names,
    count_samples,
    image_size,
    picture_sizes,
    read_captions_table,
    read_metadata,
    split_csv,
    split_folder,
    split_hub_dataset,
    split_prompts,
    split_table,
)
from common.planning.meter import Meter
from common.schema import Key, check_settings, not_supported, read_json

SOURCES = ("train_shards_path_or_url", "data_backend_config", "train_data_dir", "dataset_name", "train_prompts")
# Flags that may name the data of an entry of a dataset file, and the type that it has then
BESIDE = {"train_data_dir": "local", "train_shards_path_or_url": "webdataset"}
MOST_COUNTED = 100_000  # images whose headers are read for the table of buckets
NOTHING = {
    "image": f"no images ({', '.join(IMAGE_MEMBERS)})",
    "video": f"no clips ({', '.join(VIDEO_MEMBERS)}, or folders of frames)",
}


@dataclass(frozen=True)
class Dataset:
    """Images, clips or prompts of one source, with their sizes and captions."""

    id: str
    parts: list = field(repr=False)
    rules: Rules
    repeats: int = 0  # an epoch visits each sample once more than this
    caption_strategy: str | None = None
    cache_dir_vae: str | None = None
    skip: tuple[str, ...] = ()  # of what is done before training
    merged: dict[tuple[int, int], tuple[int, int]] = field(default_factory=dict)  # small buckets, and where they go
    num_frames: int | None = None  # of a clip; None for images
    frame_interval: int = 1
    instance_prompt: str | None = None  # the caption of all samples
    sizes: tuple[tuple[int, int], ...] = ()  # of prompts alone: height and width of clips that they could have
    probability: float = 1.0  # a factor of the epoch's visits

    @property
    def visits(self) -> float:
        """How often an epoch visits each sample."""
        return round((self.repeats + 1) * self.probability, 9)

    @property
    def kind(self) -> str:
        return "image" if self.num_frames is None else "video"


@dataclass(frozen=True)
class Data:
    """All datasets of a run, and how they are cached."""

    source: str  # the flag that named the data: what errors begin with
    datasets: tuple[Dataset, ...]
    caches: str  # "fill" before training, "ondemand", or "off"
    samples: int | None  # of an epoch; None where they cannot be counted
    keeps_latents: bool = True  # else texts alone are cached
    held_out: tuple[Dataset, ...] = ()  # for --eval_steps; without any, it takes samples of the above
    cache_dir_text: str | None = None
    write_batch_size: int | None = None  # texts in a file of their cache

    @property
    def trains_with_encoders(self) -> bool:
        """Whether training has to encode what no cache has."""
        return self.caches != "fill" or not self.keeps_latents


def open_data(
    parser: argparse.ArgumentParser, args: argparse.Namespace, rules: Rules, frames_per_latent: int | None = None
) -> tuple[Data, list[str]]:
    """Open the datasets that a flag names, and decide what is cached and when; returns the notes to print, too.

    `frames_per_latent` is given by a script that trains on clips. Errors are the parser's.
    """
    notes = []
    name, source, beside = find_source(parser, args, notes)
    try:
        if name == "data_backend_config":
            found = read_backend(args, Path(source), rules, frames_per_latent, beside, notes)
        else:
            rules = complete_rules(rules, "--", notes)
            found = [open_source(args, name, source, rules, frames_per_latent)], [], {}
    except ValueError as error:
        parser.error(str(error))
    datasets, held_out, texts = found
    remote = not all(is_local(part) for dataset in datasets for part in dataset.parts)
    if args.shard_cache_dir:
        os.environ["WDS_CACHE"] = args.shard_cache_dir  # for all that read shards, in reader processes too
    if remote and (cache := os.environ.get("WDS_CACHE")):
        try:
            os.makedirs(cache, exist_ok=True)
        except OSError as error:
            named = "--shard_cache_dir" if args.shard_cache_dir else "the environment variable WDS_CACHE:"
            parser.error(f"{named} {cache}: {error.strerror}")
    caches = "ondemand" if args.vae_cache_ondemand else "off" if remote else "fill"
    if caches == "off":
        notes.append("The shards are not local: nothing is cached. --vae_cache_ondemand keeps what is encoded.")
    samples = args.max_train_samples or count_epoch(datasets)
    if args.max_train_steps is None and samples is None:
        parser.error(
            "--max_train_steps or --max_train_samples: one is needed, shards that are not local are not counted"
        )
    data = Data(
        f"--{name}", tuple(datasets), caches, samples, not args.vae_cache_disable, tuple(held_out),
        cache_dir_text=texts.get("cache_dir", args.cache_dir_text), write_batch_size=texts.get("write_batch_size"),
    )  # fmt: skip
    return data, notes


def find_source(
    parser: argparse.ArgumentParser, args: argparse.Namespace, notes: list[str]
) -> tuple[str, str, str | None]:
    """Name and value of the flag that names the data; one on the command line wins over a config's, and says so.

    A folder or shards may be given beside a dataset file, for its one entry without data; their flag is then the third.
    """
    named = [name for name in SOURCES if getattr(args, name, None)]
    line = [name for name in named if getattr(args, name) != parser.get_default(name)]
    config = [name for name in named if name in parser.settings and name not in line]
    given = line or config or named  # named by neither: of the toy's recipe
    if len(line) == 1 and beside_file(line + config) and one_without_data(args.data_backend_config):
        given = line + config
    notes += [f"--{name} {getattr(args, name)} of the config is not used" for name in config if name not in given]
    if beside := beside_file(given):
        return "data_backend_config", args.data_backend_config, beside
    if len(given) > 1:
        parser.error(f"--{given[0]} and --{given[1]}: one or the other")
    if given:
        return given[0], getattr(args, given[0]), None
    usual = Path(args.output_dir, "multidatabackend.json")  # where the quickstarts put it
    if usual.is_file():
        notes.append(f"--data_backend_config: {usual} is taken, as no other data are named.")
        return "data_backend_config", str(usual), None
    flags = [f"--{name}" for name in SOURCES if hasattr(args, name)]
    parser.error(f"{flags[0]}: needed with --pretrained_teacher_model; or {', '.join(flags[1:])}")


def beside_file(names: list[str]) -> str | None:
    """The flag of a folder or of shards, where these names are that and a dataset file."""
    return next((name for name in BESIDE if {name, "data_backend_config"} == set(names)), None)


def open_source(args, name: str, source: str, rules: Rules, frames_per_latent: int | None) -> Dataset:
    """The one dataset of a flag."""
    try:
        frames = frames_of(args, {}, "--", frames_per_latent)
        if name == "train_prompts":
            sizes = targets_in_shapes(args.validation_resolution, rules)
            return Dataset("prompts", split_prompts(source), rules, sizes=sizes, **frames)
        if name == "train_shards_path_or_url":
            return Dataset("shards", open_shards(source), rules, **frames)
        return open_table_or_folder(args, name, source, rules, frames)
    except ValueError as error:
        raise ValueError(f"--{name}: {error}") from None


def frames_of(args, entry: dict, where: str, frames_per_latent: int | None) -> dict:
    """Fields of a dataset of clips, from its entry or the command line; none in a script that trains on images."""
    if frames_per_latent is None:
        return {}
    frames = entry.get("num_frames", args.num_frames)
    check_frame_count(f"{where}num_frames", frames, frames_per_latent)
    interval = entry.get("frame_interval", args.frame_interval)
    if interval < 1:
        raise ValueError(f"{where}frame_interval {interval}: must be at least 1")
    return {"num_frames": frames, "frame_interval": interval}


def open_shards(spec: str) -> list[str]:
    """The shards of a list. Local ones must exist, and the programs that read the others must be installed."""
    shards = expand_shards(spec)
    if not shards:
        raise ValueError(f"{spec}: no shards in it")
    if missing := [shard for shard in shards if is_local(shard) and not Path(shard).is_file()]:
        unknown = f"; no URL of {scheme_of(missing[0])}: can be read" if "://" in missing[0] else ""
        raise ValueError(f"{missing[0]} does not exist ({len(missing)} of {len(shards)}){unknown}")
    for program, shard in {READ_BY.get(scheme_of(shard)): shard for shard in shards}.items():
        if program and not which(program):
            raise ValueError(f"{shard}: is read by the program {program}, which is not installed")
    return shards


def open_table_or_folder(args, name: str, source: str, rules: Rules, frames: dict) -> Dataset:
    """A folder of images, of clips or of parquet files, a parquet file, or a dataset on the hub."""
    columns, kind, path = (args.image_column, (args.caption_column,)), "video" if frames else "image", Path(source)
    if path.is_file():
        return Dataset(path.name, split_table([source], *columns), rules, **frames)
    if not path.is_dir():
        if name == "train_data_dir":
            raise ValueError(f"{source}: no such folder")
        if frames:
            raise ValueError(f"{source}: no such folder or file, and datasets on the hub are read for images alone")
        return Dataset(source, split_hub_dataset(source, args.dataset_config_name, args.cache_dir, *columns), rules)
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

TYPES = {  # keys that an entry of a type needs, and its caption strategies; None: captions as a shard has them
    "local": (("instance_data_dir",), ("textfile", "filename", "instanceprompt", "parquet")),
    "webdataset": (("instance_data_dir",), (None, "textfile", "filename", "instanceprompt")),
    "huggingface": (("dataset_name",), ("huggingface", "instanceprompt")),
    "csv": (("csv_file", "csv_caption_column"), ("csv", "instanceprompt")),
}
KEYS = {
    "id": Key(str), "type": Key(tuple(TYPES)),
    "dataset_type": Key(("image", "video", "eval", "text_embeds")), "disabled": Key(bool),
    "instance_data_dir": Key(str), "repeats": Key(int, least=0), "probability": Key(float), "resolution": Key(float),
    "resolution_type": Key(RESOLUTION_TYPES), "aspect_bucket_rounding": Key(int), "minimum_image_size": Key(float),
    "maximum_image_size": Key(float), "target_downsample_size": Key(float), "crop": Key(bool),
    "crop_aspect": Key(CROP_ASPECTS), "crop_style": Key(CROP_STYLES),
    "caption_strategy": Key(("textfile", "filename", "instanceprompt", "parquet", "huggingface", "csv")),
    "metadata_backend": Key(("discovery", "parquet", "huggingface")), "skip_file_discovery": Key(str),
    "cache_dir_vae": Key(str), "cache_dir": Key(str), "default": Key(bool), "write_batch_size": Key(int, least=1),
    "num_frames": Key(int), "min_frames": Key(int), "frame_interval": Key(int), "instance_prompt": Key(str),
    "disable_multiline_split": Key(bool), "parquet": Key(dict), "dataset_name": Key(str), "dataset_config": Key(str),
    "split": Key(str), "revision": Key(str), "image_column": Key(str), "caption_column": Key(object),
    "csv_file": Key(str), "csv_caption_column": Key(str), "csv_url_column": Key(str), "csv_cache_dir": Key(str),
}  # fmt: skip
SKIPS = ("vae", "text", "aspect", "metadata")  # words of skip_file_discovery


def read_backend(
    args, path: Path, rules: Rules, frames_per_latent: int | None, beside: str | None, notes: list[str]
) -> tuple[list[Dataset], list[Dataset], dict]:
    """A file's enabled datasets, those that are held out, and its entry for texts.

    What an entry leaves out the flags say; of one without data `beside` is the flag that has them.
    """
    datasets, held_out, texts = [], [], []
    entries = list(enabled_entries(path, notes))
    if beside:
        bare = without_data(entries)
        if len(bare) != 1:
            raise ValueError(f"--{beside}: {path} has {len(bare)} datasets without instance_data_dir, and needs one")
        bare[0].update({"type": BESIDE[beside], "instance_data_dir": getattr(args, beside)} | bare[0])
    for where, entry in entries:
        if entry.get("dataset_type") == "text_embeds":
            texts.append(entry)
            continue
        dataset = open_entry(args, entry, rules, frames_per_latent, where, notes)
        if entry.get("dataset_type") != "eval":
            datasets.append(dataset)
        elif frames_per_latent is not None:
            notes.append(f"{where}: dataset_type eval: has no job in this script")
        elif args.eval_steps:
            held_out.append(dataset)
        else:
            notes.append(f"{where}: dataset_type eval: has no job without --eval_steps")
    if not datasets:
        raise ValueError(f"{path}: no dataset in it that is enabled")
    ids = Counter(dataset.id for dataset in (*datasets, *held_out))
    if twice := [name for name, count in ids.items() if count > 1]:
        raise ValueError(f"{path}: two datasets have the id {twice[0]!r}")
    texts = [entry for entry in texts if entry.get("default")] or texts
    if len(texts) > 1:
        raise ValueError(f"{path}: {len(texts)} entries of dataset_type text_embeds: make one of them the default")
    return datasets, held_out, texts[0] if texts else {}


def enabled_entries(path: Path, notes: list[str]):
    """Yields (what errors begin with, settings) of a file's entries, but for those that are disabled."""
    content = read_json(path, (dict, list))
    for entry in content if isinstance(content, list) else [content]:
        if not isinstance(entry, dict):
            raise ValueError(f"{path}: {entry!r}: must be a list of objects, one for each dataset")
        where = f"{path}: {entry.get('id')!r}"
        entry = {{"disable": "disabled"}.get(key, key): value for key, value in entry.items() if value is not None}
        check_settings({"disabled": entry.get("disabled", False)}, KEYS, where)
        if not entry.get("disabled"):
            yield where, entry_here(entry, KEYS, where, notes)


def without_data(entries: Iterable[tuple[str, dict]]) -> list[dict]:
    """Those of the enabled entries that name no data."""
    sources = {"instance_data_dir", "dataset_name", "csv_file"}
    return [entry for _, entry in entries if not sources & entry.keys() and entry.get("dataset_type") != "text_embeds"]


def one_without_data(path: str) -> bool:
    """Whether this is a dataset file, and exactly one of its entries names no data."""
    try:
        return len(without_data(enabled_entries(Path(path), []))) == 1
    except ValueError:
        return False


def open_entry(args, entry: dict, rules: Rules, frames_per_latent: int | None, where: str, notes: list[str]) -> Dataset:
    entry = {"type": "local"} | entry
    frames = frames_of(args, entry, f"{where}: ", frames_per_latent)
    kind = "video" if frames else "image"
    if entry.get("dataset_type", kind) not in (kind, "eval"):
        raise ValueError(f"{where}: dataset_type is {entry['dataset_type']!r}, and this script trains on {kind}s")
    if unused := [key for key in ("num_frames", "min_frames", "frame_interval") if key in entry and not frames]:
        raise ValueError(f"{where} has {unused[0]}, and images have no frames")
    if frames and entry.get("min_frames", 0) > frames["num_frames"]:
        raise not_supported(where, f"min_frames {entry['min_frames']} above num_frames {frames['num_frames']}")
    skip = tuple(entry.get("skip_file_discovery", "").replace(",", " ").split())
    if odd := [word for word in skip if word not in SKIPS]:
        raise ValueError(f"{where}: skip_file_discovery has {odd[0]!r}, and must be some of {', '.join(SKIPS)}")
    rules = complete_rules(with_settings(rules, entry, f"{where}: ", notes), f"{where}: ", notes)
    if not 0 < entry.get("probability", 1) < float("inf"):
        raise ValueError(f"{where}: probability is {entry['probability']}, and must be above 0")
    strategy, source = check_captions(entry, where), entry[TYPES[entry["type"]][0][0]]
    try:
        parts = parts_of(args, entry, strategy, kind)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    if not parts:
        raise ValueError(f"{where}: {source}: {NOTHING[kind]} in it")
    if strategy == "textfile" and entry.get("disable_multiline_split"):
        strategy = "text"
    return Dataset(
        entry.get("id", source), parts, rules, entry.get("repeats", 0),
        strategy if strategy in ("textfile", "text", "filename") else None,
        entry.get("cache_dir_vae", None if entry["type"] == "huggingface" else entry.get("cache_dir")), skip,
        instance_prompt=entry["instance_prompt"] if strategy == "instanceprompt" else None,
        probability=entry.get("probability", 1.0), **frames,
    )  # fmt: skip


def check_captions(entry: dict, where: str) -> str | None:
    """An entry's caption_strategy, which its type must have, as the entry must have all keys that both need."""
    needed, strategies = TYPES[entry["type"]]
    strategy = entry.get("caption_strategy", strategies[0])
    if strategy not in strategies:
        known = ", ".join(filter(None, strategies))
        raise ValueError(
            f"{where}: caption_strategy is {strategy!r}, and must be one of {known} with type {entry['type']}"
        )
    needed += {"instanceprompt": ("instance_prompt",), "parquet": ("parquet",)}.get(strategy, ())
    if missing := [key for key in needed if not entry.get(key)]:
        otherwise = "; or --train_data_dir or --train_shards_path_or_url" * (missing[0] == "instance_data_dir")
        raise ValueError(f"{where} has no {missing[0]}{otherwise}")
    return strategy


def parts_of(args, entry: dict, strategy: str | None, kind: str) -> list:
    """What an entry's samples are in."""
    if entry["type"] == "webdataset":
        return open_shards(entry["instance_data_dir"])
    if entry["type"] == "csv":
        columns = entry["csv_caption_column"], entry.get("csv_url_column", "url")
        return split_csv(Path(entry["csv_file"]), *columns, entry.get("csv_cache_dir"), kind)
    if entry["type"] == "huggingface":
        if kind == "video":
            raise ValueError("type huggingface: datasets on the hub are read for images alone")
        options = {key: entry[key] for key in ("revision",) if key in entry}
        return split_hub_dataset(
            entry["dataset_name"], entry.get("dataset_config"), entry.get("cache_dir", args.cache_dir),
            entry.get("image_column", "image"), column_names(entry.get("caption_column", "text"), "caption_column"),
            entry.get("split", "train"), flag="", **options,
        )  # fmt: skip
    folder, captions = entry["instance_data_dir"], None
    if not Path(folder).is_dir():
        raise ValueError(f"{folder}: no such folder")
    if strategy == "parquet":
        if missing := [key for key in ("path", "filename_column", "caption_column") if not entry["parquet"].get(key)]:
            raise ValueError(f"parquet has no {missing[0]}")
        captions = read_captions_table(folder, entry["parquet"], kind)
    return split_folder(folder, captions, kind)


# ---------------------------------------------------------------------------------------------------------------------
# Counts
# ---------------------------------------------------------------------------------------------------------------------


def count_epoch(datasets: list[Dataset]) -> int | None:
    """Samples that an epoch visits; None where not all is local."""
    counts = [count_samples(dataset.parts) for dataset in datasets]
    if None in counts:
        return None
    return sum(round(count * dataset.visits) for count, dataset in zip(counts, datasets, strict=True))


def count_buckets(dataset: Dataset, size_of) -> tuple[Counter, int, int]:
    """Images by bucket, those that are too small, and of how many parts only one was looked at."""
    total = count_samples(dataset.parts)
    stride = -(-total // MOST_COUNTED) or 1
    counts, small = Counter(), 0
    for part in dataset.parts[::stride]:
        for height, width in picture_sizes(part, dataset.kind, size_of):
            if too_small(height, width, dataset.rules):
                small += stride
            else:
                counts[target_size(height, width, dataset.rules)] += stride
    return counts, small, stride


def plan_buckets(args, data: Data, accelerator, size_of=image_size) -> Data:
    """Print the table of buckets; returns the data with each small bucket sent to another.

    Remote data are not looked at, and by a plan none. `size_of` is that of an image, or of a clip.
    """
    if Meter.running:
        return data
    lines, merged = [], [{} for _ in data.datasets]
    if accelerator.is_main_process:
        found = {}
        for i, dataset in enumerate(data.datasets):
            known = dataset.sizes or one_bucket(dataset.rules) and dataset.rules.minimum is None  # by the flags alone
            local = all(is_local(part) and not isinstance(part, Links) for part in dataset.parts)
            local = local and not set(dataset.skip) & {"aspect", "metadata"}
            if local and not known:
                found[i] = count_buckets(dataset, size_of)
        samples = Counter()  # of an epoch, in all datasets: they share buckets
        for i, (counts, _, _) in found.items():
            samples.update({bucket: count * data.datasets[i].visits for bucket, count in counts.items()})
        for i, (counts, small, stride) in found.items():
            if not args.disable_bucket_pruning:
                merged[i] = merge_small(list(counts), samples, args.train_batch_size)
            lines += bucket_table(data.datasets[i], counts, small, stride, merged[i])
    if accelerator.num_processes > 1:
        broadcast_object_list(merged)
    for line in lines:
        accelerator.print(line)
    datasets = (replace(dataset, merged=own) for dataset, own in zip(data.datasets, merged, strict=True))
    return replace(data, datasets=tuple(datasets))


def bucket_table(dataset: Dataset, counts: Counter, small: int, stride: int, merged: dict) -> list[str]:
    about = f", by one part in {stride}" if stride > 1 else ""
    visits = f", each {dataset.visits:g} times an epoch" if dataset.visits != 1 else ""
    lines = [
        f"{dataset.id}: {sum(counts.values())} images in {len(counts)} buckets{visits}{about}",
        "   width height  images",
    ]
    for bucket, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        goes = merged.get(bucket)
        note = f"  less than a batch: to {goes[1]} x {goes[0]}" if goes else ""
        lines.append(f"  {bucket[1]:6d} {bucket[0]:6d} {count:7d}{note}")
    return lines + [f"  {small} images are below minimum_image_size and are skipped"] * bool(small)
