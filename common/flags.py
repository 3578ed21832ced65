"""The flags that every script has alike, the rules between them, and the reader of --config files.

A config is JSON with the keys of the quickstarts, each of which means one flag, mostly of the same name. The command
line wins over the config, and the config over a flag's default.
"""

import argparse
import math
from pathlib import Path

import torch

from common.data.buckets import (
    CROP_ASPECTS,
    CROP_STYLES,
    RESOLUTION_TYPES,
    Rules,
    square_side,
    target_size,
    with_settings,
)
from common.keys import FAMILY_OF_NAME, FLAG_OF_KEY, FLAVOURS, config_here
from common.networks import ATTENTION, NO_BACKWARD, PRECISIONS, check_precision, dynamo_backend
from common.optim import DECAYS, optimizer_defaults
from common.schema import Key, check_value, read_json, unknown_key
from common.tracking import check_trackers, check_webhook

# Flags of several numbers with commas between: a config may also have one number or a list.
LISTS = ("validation_num_inference_steps", "validation_resolution", "report_steps", "dmd_denoising_steps")

MOMENTS = ("adam_beta1", "adam_beta2", "adam_weight_decay")


class Flags(argparse.Namespace):
    """The flags of a run, which nobody can change: a value that follows from them has a name of its own."""

    def __init__(self, **flags):
        vars(self).update(flags)

    def __setattr__(self, name, value):
        raise AttributeError(f"args.{name} cannot be set: flags are read-only after parsing")

    def __delattr__(self, name):
        raise AttributeError(f"args.{name} cannot be deleted: flags are read-only after parsing")


def frozen(args: argparse.Namespace) -> Flags:
    return Flags(**vars(args))


def filled(args: argparse.Namespace, **defaults) -> Flags:
    """A copy in which flags that are None have these values."""
    flags = vars(args)
    return Flags(**flags | {name: value for name, value in defaults.items() if flags[name] is None})


class Switch(argparse.BooleanOptionalAction):
    """A flag that is off by default; --no-NAME unsets what a config file sets."""

    def __init__(self, *names, default=False, **options):
        super().__init__(*names, default=default, **options)


def make_parser(description: str) -> argparse.ArgumentParser:
    formatter = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(usage="%(prog)s [flags]", description=description, formatter_class=formatter)


def hide_flags(parser: argparse.ArgumentParser, *names: str):
    """Leaves flags without a job in a script out of its --help; they are parsed, so that a rule can refuse them."""
    for action in parser._actions:
        if action.dest in names:
            action.help = argparse.SUPPRESS


def show_defaults(parser: argparse.ArgumentParser):
    """Adds each flag's default to its help, where the help does not name it."""
    for action in parser._actions:
        if action.help == argparse.SUPPRESS:
            continue
        # Some versions of Python add a default to on/off flags
        action.help, default = (action.help or "").removesuffix(" (default: %(default)s)"), action.default
        if isinstance(action, argparse.BooleanOptionalAction):
            default = "on" if default else None
        if default is None or default is False or default == argparse.SUPPRESS or "default" in action.help:
            continue
        values = default if isinstance(default, list | tuple) else [default]
        text = " ".join(f"{value:g}" if isinstance(value, float) else str(value) for value in values)
        action.help = (f"{action.help}; " if action.help else "") + f"default {text.replace('%', '%%')}"


# ---------------------------------------------------------------------------------------------------------------------
# Types of flags; argparse puts the flag's name before their errors
# ---------------------------------------------------------------------------------------------------------------------


def counts(text: str) -> list[int]:
    """[1, 2, 4] of "1,2,4"."""
    try:
        numbers = [int(word) for word in text.split(",")]
    except ValueError:
        numbers = [0]
    if min(numbers) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be numbers of at least 1 with commas between, as 1,2,4,8")
    return numbers


def counts_or_none(text: str) -> list[int]:
    return counts(text) if text else []


def sizes(text: str) -> list[tuple[int, int]]:
    """(height, width) of each size in "1024x1024,1280x768", which has the width first; one number is a square."""
    try:
        found = [tuple(int(side) for side in word.lower().split("x"))[::-1] for word in text.split(",")]
    except ValueError:
        found = [()]
    found = [size * 2 if len(size) == 1 else size for size in found]
    if any(len(size) != 2 or min(size) < 8 or size[0] % 8 or size[1] % 8 for size in found):
        raise argparse.ArgumentTypeError(
            f"{text!r} must be WIDTHxHEIGHT in multiples of 8, several with commas between, as 1024x1024,1280x768"
        )
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Flags
# ---------------------------------------------------------------------------------------------------------------------


# fmt: off
def add_shared_flags(parser: argparse.ArgumentParser):
    """Adds the flags of data, caches, optimizer, precision, checkpoints, validation, trackers and hub."""
    add = parser.add_argument_group("data").add_argument
    add("--train_shards_path_or_url", type=str, help="WebDataset shards: a path, a pattern, a folder, a URL, or pipe: and a command; braces expand, several are joined by ::; or a file that lists them")
    add("--shard_cache_dir", type=str, help="folder where shards that are not local are kept, so that they are fetched once; default: the environment variable WDS_CACHE, or none")
    add("--data_backend_config", type=str, help="JSON file of datasets (multidatabackend.json): folders of images, shards, caches")
    add("--interpolation_type", type=str, default="bilinear", choices=["bilinear", "bicubic", "box", "nearest", "nearest_exact", "hamming", "lanczos"], help="filter that resizes images")
    add("--center_crop", action=Switch, help="crop from the centre; default: at random")
    add("--random_flip", action=Switch, help="mirror half of the images")
    add("--dataloader_num_workers", type=int, help="reader processes per training process; 0 reads in the training process; default: as many of 1, 2, 4 or 8 as leave it a core; 0 on a CPU, whose cores train, and where no picture is read")
    add("--max_train_samples", type=int, help="samples in an epoch; default: as many as local shards hold")
    add("--proportion_empty_prompts", type=float, default=0.0, help="share of samples that train on the empty prompt, 0 to 1")

    add = parser.add_argument_group("caches").add_argument
    add("--cache_dir", type=str, help="folder for models from the hub; default: the hub's own cache")
    add("--cache_dir_vae", type=str, help="folder of latents, which runs may share; default: OUTPUT_DIR/cache/vae")
    add("--cache_dir_text", type=str, help="folder of text embeddings, which runs may share; default: OUTPUT_DIR/cache/text")
    add("--vae_cache_ondemand", action=Switch, help="encode and keep a sample when training first reads it; default: all of them before training")
    add("--vae_cache_disable", action=Switch, help="encode pictures each time and keep no latents; texts are cached all the same. Of shards that are not local nothing is kept but by --vae_cache_ondemand")
    add("--compress_disk_cache", action=Switch, help="compress cached latents with zlib: about 10%% smaller, for some CPU time")
    add("--vae_encode_batch_size", "--encode_batch_size", type=int, help="samples that the VAE encodes at a time; default: as many pictures as have 2 megapixels together, but no more than 32")

    add = parser.add_argument_group("optimization").add_argument
    add("--train_batch_size", type=int, default=16, help="samples per process and forward pass")
    add("--gradient_accumulation_steps", type=int, default=1, help="forward and backward passes per optimizer step")
    add("--num_train_epochs", type=int, default=100, help="length of training where --max_train_steps is not given")
    add("--max_train_steps", type=int, help="length of training in optimizer steps; default: --num_train_epochs")
    add("--ignore_final_epochs", action=Switch, help="let --max_train_steps alone end the training; it must then be given")
    add("--learning_rate", type=float, default=1e-4, help="learning rate after warm-up")
    add("--scale_lr", action=Switch, help="multiply the learning rate by processes x batch x accumulation")
    add("--lr_scheduler", type=str, default="constant", choices=list(DECAYS), help="shape of the decay to --lr_end after a linear warm-up; constant has no warm-up either")
    add("--lr_end", type=float, help="learning rate at the last step; default: 0, or with cosine_with_min_lr a tenth of --learning_rate")
    add("--lr_warmup_steps", type=int, default=500, help="optimizer steps of warm-up; constant ignores them")
    add("--optimizer", type=str, default="adamw", choices=["adamw", "adamw_bf16", "adamw8bit", "lion", "optimi-lion"], help="adamw_bf16 is adamw: trained weights and moments are fp32; optimi-lion is lion with betas 0.9 and 0.99 and no weight decay, whatever the next flags say")
    add("--use_8bit_adam", action=Switch, help="the same as --optimizer adamw8bit")
    add("--adam_beta1", type=float, help="decay of the mean of gradients; default 0.9")
    add("--adam_beta2", type=float, help="decay of the mean of squared gradients, or of lion's momentum; default 0.999, lion 0.99")
    add("--adam_weight_decay", type=float, help="decoupled weight decay; default 0.01, lion 0")
    add("--adam_epsilon", type=float, default=1e-8, help="added to the root of the mean of squared gradients")
    add("--max_grad_norm", type=float, default=1.0, help="gradients are clipped to this L2 norm, or each element to this value")
    add("--grad_clip_method", type=str, default="norm", choices=["norm", "value"], help="what --max_grad_norm bounds")

    add = parser.add_argument_group("precision and speed").add_argument
    add("--mixed_precision", type=str, choices=["no", "fp16", "bf16"], help="default: what accelerate's config says")
    add("--allow_tf32", action=Switch, help="TF32 for fp32 matmuls on Ampere GPUs and later")
    add("--gradient_checkpointing", action=Switch, help="recompute activations in backward: less memory, about 30%% slower; of attention the result is kept, but in a self-forcing student with --compile")
    add("--checkpoint_attention", action=Switch, help="with --gradient_checkpointing: recompute attention, too; a little less memory for SD and SDXL, and for Wan 3 of 11 GB of activations less at 81 frames, but slower by a fifth")
    add("--offload_activations", action=Switch, help="with --gradient_checkpointing: what blocks begin with waits in the machine's memory: 20 GB there for 81 frames of Wan 14B, where a GPU would hold 13, 4 and 3 for Wan 1.3B; with --compile attention is then recomputed, too")
    add("--base_model_precision", type=str, default="no_change", choices=PRECISIONS, help="8-bit weights for the Linear layers of the frozen network, a LoRA's base or else the teacher; int8-quanto is int8-torchao")
    add("--text_encoder_1_precision", type=str, default="no_change", choices=PRECISIONS, help="the same for the text encoder")
    add("--text_encoder_2_precision", type=str, default="no_change", choices=PRECISIONS, help="the same for the second text encoder")
    add("--quantize_via", type=str, default="accelerator", choices=["cpu", "accelerator"], help="where weights are converted to 8 bits; cpu needs less GPU memory and more time")
    add("--attention_mechanism", type=str, default="diffusers", choices=("auto", *ATTENTION), metavar="NAME", help=f"diffusers is PyTorch's SDPA; auto: FlashAttention 3 where it is installed and PyTorch has no cuDNN attention for this GPU, else SDPA; or one of diffusers' backends that have a backward: {', '.join(name for name in ATTENTION[1:] if name not in NO_BACKWARD)}")
    add("--attention_without_gradient", type=str, choices=ATTENTION[1:], metavar="NAME", help=f"another of these for forwards without gradient, of teacher, target, rollouts and validation, or one that has no backward: {', '.join(NO_BACKWARD)}; default: that of --attention_mechanism")
    add("--enable_xformers_memory_efficient_attention", action=Switch, help="attention by xformers where it is installed, else by PyTorch's SDPA")
    add("--compile", action=Switch, default=dynamo_backend() == "inductor", help="compile the networks' blocks by torch.compile, also where accelerate's config has dynamo_backend inductor; the first steps take minutes")

    add = parser.add_argument_group("checkpoints").add_argument
    add("--output_dir", type=str, default="lcm-xl-distilled", help="folder for checkpoints, pictures, logs and the final model")
    add("--seed", type=int, default=42, help="seed of the data's order, of all random draws and of initial weights")
    add("--checkpointing_steps", type=int, default=500, help="optimizer steps between checkpoints; 0 for none but the last")
    add("--checkpoints_total_limit", type=int, help="newest checkpoints to keep; default: all")
    add("--resume_from_checkpoint", type=str, help="`latest`, a path, or the name of a checkpoint in OUTPUT_DIR")

    add = parser.add_argument_group("validation").add_argument
    add("--validation_steps", type=int, default=200, help="optimizer steps between validations; 0 for none")
    add("--validation_prompt", type=str, help="an additional prompt for validation")
    add("--validation_prompt_library", type=str, help="JSON file of validation prompts by name")
    add("--validation_negative_prompt", type=str, help="negative prompt of the teacher's samples, which are generated with guidance; default: the teacher's own for none")
    add("--validation_resolution", type=sizes, metavar="WIDTHxHEIGHT", help="size of validation samples in pixels, several with commas between; default: the training resolution")
    add("--validation_num_inference_steps", type=counts, default="1,2,4,8", metavar="N,N,...", help="the student's numbers of steps, a row of pictures each")
    add("--validation_guidance", type=float, help="guidance_scale of validation; default: that of training")
    add("--validation_seed", type=int, default=0, help="seed of the noise of validation samples")
    add("--disable_benchmark", action=Switch, help="generate no samples of the teacher to compare with")
    add("--validation_preview", action=Switch, help="send pictures of half-done samples, of the main process's prompts, decoded by a tiny autoencoder, to trackers and webhook")
    add("--validation_preview_steps", type=int, default=1, help="N for previews after steps N, 2N, 3N, ...")
    add("--validation_preview_model", type=str, help="folder or hub name of an AutoencoderTiny; default: the one made for the model, from the hub")
    add("--evaluation_type", type=str, default="none", choices=["none", "clip"], help="clip: log minimum, maximum, mean and deviation of the CLIP score of validation pictures")
    add("--evaluation_clip_model", type=str, help="folder or hub name of the CLIP that scores pictures")
    add("--eval_steps", type=int, default=0, help="optimizer steps between measurements of the loss on held-out samples, with fixed random draws; 0 for none")
    add("--eval_samples", type=int, default=8, help="samples held out from training for --eval_steps")
    add("--report_steps", type=counts_or_none, default="1,2,4,8", metavar="N,N,...", help="numbers of steps that the report at the end compares; empty for no report")

    add = parser.add_argument_group("trackers and hub").add_argument
    add("--report_to", type=str, default="tensorboard", help="tensorboard, wandb or trackio, several with commas between; all that are installed; or none")
    add("--logging_dir", type=str, default="logs", help="folder for the trackers' files, inside OUTPUT_DIR")
    add("--tracker_project_name", type=str, default="text2image-fine-tune", help="project to which the trackers add the run")
    add("--tracker_run_name", type=str, help="name of the run in the trackers; default: the tracker's choice")
    add("--webhook_config", type=str, help="JSON file with webhook_url, to which progress, pictures and errors are POSTed, and level: debug (the default), info or error")
    add("--push_to_hub", action=Switch, help="upload the final model, to a private repository")
    add("--push_checkpoints_to_hub", action=Switch, help="upload the model of each checkpoint too; needs --push_to_hub")
    add("--hub_model_id", type=str, help="owner/name; default: OUTPUT_DIR's name under your own")
    add("--hub_token", type=str, help="better: `hf auth login`, which keeps it out of the shell's history")

    add = parser.add_argument_group("plan").add_argument
    add("--plan", type=float, nargs="?", const=0.0, metavar="GB", help="load and train nothing, but print what the run takes on each GPU, and what would make it fit into so many GB; default: those of the GPU that is here")
    add("--local_rank", type=int, default=-1, help=argparse.SUPPRESS)  # accelerate sets it


def add_bucket_flags(parser: argparse.ArgumentParser):
    """Adds the flags of scripts that train on several sizes and take images from more than shards."""
    add = parser.add_argument_group("sizes", "A dataset's own entry in a dataset file wins over these.").add_argument
    add("--resolution_type", type=str, default="pixel", choices=RESOLUTION_TYPES, help="unit of --resolution and of the sizes below; pixel: the shorter side in pixels; area: megapixels; pixel_area: the side, in pixels, of a square of the same area")
    add("--bucket_alignment", type=int, default=64, help="a bucket's sides are multiples of this many pixels")
    add("--aspect_bucket_rounding", type=int, default=2, help="decimals, 1 to 9, to which a bucket's ratio width / height is rounded; more than 9 is taken for --bucket_alignment")
    add("--minimum_image_size", type=float, default=0.0, help="smaller images are skipped and counted; in the unit of --resolution_type, but 10 or less is megapixels also under pixel; 0 for none")
    add("--maximum_image_size", type=float, help="larger images are first shrunk to --target_downsample_size, then cropped; in the same unit")
    add("--target_downsample_size", type=float, help="size to which such images are shrunk, in the same unit; default: --maximum_image_size")
    add("--crop_aspect", type=str, default="square", choices=CROP_ASPECTS, help="square: all images are cropped to one square; preserve: each goes to the bucket nearest to its own ratio")
    add("--crop_style", type=str, choices=CROP_STYLES, help="place of the crop, corner is the top left one; default: random, or center with --center_crop")
    add("--disable_bucket_pruning", action=Switch, help="keep buckets of fewer samples than a batch, and fill their batches by repeating samples; default: their images go to the bucket of the nearest ratio that has enough")

    add = parser.add_argument_group("datasets", "One source of data: a folder, a dataset, --train_shards_path_or_url or --data_backend_config.").add_argument
    add("--train_data_dir", type=str, help="folder of images, with captions in metadata.jsonl or in a .txt beside each; or of parquet files")
    add("--dataset_name", type=str, help="dataset on the hub, read by the package `datasets`; or a local folder or parquet file")
    add("--dataset_config_name", type=str, help="configuration of that dataset")
    add("--image_column", type=str, default="image", help="column of the images in a parquet file or dataset")
    add("--caption_column", type=str, default="text", help="column or key of the captions in a parquet file, a dataset or metadata.jsonl; each is a text or a list of alternatives")


def add_clip_flags(parser: argparse.ArgumentParser):
    """Adds the flags of scripts that train on clips."""
    add = parser.add_argument_group("clips", "A dataset's own entry in a dataset file wins over these.").add_argument
    add("--num_frames", type=int, default=81, help="frames of a clip: one, and a multiple of the frames that the VAE makes one of; longer clips are cut as --crop_style says, shorter ones are skipped and counted")
    add("--frame_interval", type=int, default=1, help="N to take each N-th frame of a file")
# fmt: on


# ---------------------------------------------------------------------------------------------------------------------
# Rules between flags
# ---------------------------------------------------------------------------------------------------------------------


def shared_defaults(args: argparse.Namespace) -> dict:
    """Defaults of shared flags that depend on other flags, for `filled`."""
    lr_end = 0.1 * args.learning_rate if args.lr_scheduler == "cosine_with_min_lr" else 0.0
    return {"lr_end": lr_end} | optimizer_defaults(args)


def check_shared_flags(parser: argparse.ArgumentParser, args: argparse.Namespace) -> list[str]:
    """Every rule between shared flags that can be checked before anything loads. Returns notes for the user."""
    check_ranges(
        parser, args,
        at_least_one=(
            "train_batch_size", "gradient_accumulation_steps", "vae_encode_batch_size", "max_train_steps",
            "max_train_samples", "checkpoints_total_limit", "validation_preview_steps", "eval_samples",
        ),
        not_negative=(
            "plan", "dataloader_num_workers", "checkpointing_steps", "validation_steps", "lr_warmup_steps", "seed",
            "eval_steps", "adam_weight_decay",
        ),
        positive=("learning_rate", "max_grad_norm", "adam_epsilon"), below_one=("adam_beta1", "adam_beta2"),
        share=("proportion_empty_prompts",),
    )  # fmt: skip
    if args.num_train_epochs < (args.max_train_steps is None):
        parser.error(f"--num_train_epochs {args.num_train_epochs}: must be at least 1, or give --max_train_steps")
    if args.ignore_final_epochs and args.max_train_steps is None:
        parser.error("--ignore_final_epochs: needs --max_train_steps")
    if args.lr_end is not None and args.lr_scheduler.startswith("constant"):
        parser.error(f"--lr_end {args.lr_end} and --lr_scheduler {args.lr_scheduler}: it has no decay")
    if args.lr_end is not None and not 0.0 <= args.lr_end <= args.learning_rate:
        parser.error(
            f"--lr_end {args.lr_end} and --learning_rate {args.learning_rate}: need 0 <= lr_end <= learning_rate"
        )
    if args.use_8bit_adam and args.optimizer not in ("adamw", "adamw8bit"):
        parser.error(f"--use_8bit_adam and --optimizer {args.optimizer}: one or the other")
    if args.evaluation_type == "clip" and not args.evaluation_clip_model:
        parser.error("--evaluation_type clip: needs --evaluation_clip_model, the CLIP that scores")
    if args.attention_mechanism in NO_BACKWARD:
        parser.error(
            f"--attention_mechanism {args.attention_mechanism}: has no backward; --attention_without_gradient takes it"
        )
    for name in ("checkpoint_attention", "offload_activations"):
        if getattr(args, name) and not args.gradient_checkpointing:
            parser.error(f"--{name}: needs --gradient_checkpointing")
    if args.push_checkpoints_to_hub and not args.push_to_hub:
        parser.error("--push_checkpoints_to_hub: needs --push_to_hub")
    if args.validation_prompt_library and not Path(args.validation_prompt_library).is_file():
        parser.error(f"--validation_prompt_library {args.validation_prompt_library}: no such file")
    check_webhook(parser, args.webhook_config)
    notes = check_trackers(parser, args.report_to) + check_precision(parser, args)
    if args.optimizer == "optimi-lion" and (unused := [name for name in MOMENTS if getattr(args, name) is not None]):
        names = ", ".join(f"--{name}" for name in unused)
        notes.append(
            f"--optimizer optimi-lion: has its own betas, 0.9 and 0.99, and no weight decay; no job for {names}"
        )
    if (backend := dynamo_backend()) not in ("no", "inductor"):
        parser.error(
            f"accelerate's config has dynamo_backend {backend}: set it to inductor, which is --compile, or to no"
        )
    if backend == "inductor" and args.compile:
        notes.append("--compile: accelerate's config has dynamo_backend inductor")
    if args.allow_tf32 and not torch.cuda.is_available():
        notes.append("--allow_tf32: no job without a CUDA GPU")
    if args.local_rank != -1:
        notes.append("--local_rank: no job, accelerate sets it")
    return notes


def check_ranges(parser, args, at_least_one=(), not_negative=(), positive=(), below_one=(), share=()):
    """Checks each group of flags by its rule; a flag that is None passes."""
    for names, fits, rule in (
        (at_least_one, lambda value: value >= 1, "must be at least 1"),
        (not_negative, lambda value: 0 <= value < math.inf, "must not be negative"),
        (positive, lambda value: 0.0 < value < math.inf, "must be positive"),
        (below_one, lambda value: 0.0 <= value < 1.0, "must be in [0, 1)"),
        (share, lambda value: 0.0 <= value <= 1.0, "must be in [0, 1]"),
    ):
        for name in names:
            value = getattr(args, name)
            if value is not None and not fits(value):
                parser.error(f"--{name} {value}: {rule}")


def bucket_rules(parser: argparse.ArgumentParser, args: argparse.Namespace) -> tuple[Rules, list[str]]:
    """Checks the flags of sizes. Returns their rules, and notes for the user."""
    if args.dataset_config_name and not args.dataset_name:
        parser.error(f"--dataset_config_name {args.dataset_config_name}: needs --dataset_name")
    check_ranges(parser, args, at_least_one=("bucket_alignment",), positive=("resolution",))
    base = Rules(
        args.resolution,
        resolution_type=args.resolution_type,
        alignment=args.bucket_alignment,
        crop_aspect=args.crop_aspect,
        crop_style=args.crop_style or ("center" if args.center_crop else "random"),
        fixed_size_ids=getattr(args, "use_fix_crop_and_size", False),
    )
    names = ("aspect_bucket_rounding", "minimum_image_size", "maximum_image_size", "target_downsample_size")
    notes = []
    try:
        rules = with_settings(base, {name: getattr(args, name) for name in names}, "--", notes)
    except ValueError as error:
        parser.error(str(error))
    (side, _), wanted = target_size(1, 1, rules), square_side(rules)
    if rules.resolution_type != "area" and side != wanted:
        notes.append(f"--resolution {wanted:g}: sides are multiples of {rules.alignment} pixels, a square has {side}")
    return rules, notes


# ---------------------------------------------------------------------------------------------------------------------
# Config files
# ---------------------------------------------------------------------------------------------------------------------


def parse_with_config(
    parser: argparse.ArgumentParser, argv, *, family: str, method: str, recipe=None
) -> tuple[Flags, list[str]]:
    """Parses the command line over the settings of --config and, where no teacher is named, over the toy's recipe.

    `recipe(args)` returns the toy's own settings by flag name. A script of several methods has --distillation_method,
    and `method` is its default. Also returns notes on what the config says. The parser remembers the config's
    `settings` and the script's `own_defaults`, over which both are put.
    """
    parser.add_argument("--config", type=str, help="JSON file with settings by key; flags win over it")
    show_defaults(parser)
    parser.own_defaults = {action.dest: action.default for action in parser._actions}
    args, settings, notes = parser.parse_args(argv), {}, []
    if args.config:
        try:
            given = getattr(args, "distillation_method", None)
            settings = read_config(parser, Path(args.config), family, method, given, notes)
        except ValueError as error:
            parser.error(f"--config {error}")
        parser.set_defaults(**settings)
        args = parser.parse_args(argv)
        given = {name: value for name, value in settings.items() if getattr(args, name) == value}
        notes += other_meanings(given, args.config, method)
    if args.pretrained_teacher_model is None and recipe:
        parser.set_defaults(**recipe(frozen(args)) | settings)
        args = parser.parse_args(argv)
    parser.settings = settings
    return frozen(args), notes


def refuse_flags(parser: argparse.ArgumentParser, args: argparse.Namespace, names, error: str, user: str) -> list[str]:
    """Refuses flags that have no job where the command line gives them; returns a note where a config does.

    A config may be that of another script or method, and still fit; on the command line such a flag is a mistake.
    """
    given = [name for name in names if getattr(args, name) != parser.own_defaults[name]]
    for name in given:
        if getattr(args, name) != parser.get_default(name):  # which is the config's value, where it has one
            parser.error(f"--{name}: {error}")
    unused = [name for name in given if name in parser.settings]
    return [f"{args.config}: not used {user}: {', '.join(unused)}"] if unused else []


def read_config(
    parser: argparse.ArgumentParser, path: Path, family: str, method: str, given: str | None, notes: list[str]
) -> dict:
    """Settings of a config file, by flag name. `given` is the method that the command line names, if it does."""
    config = without_dashes(read_json(path), path)
    actions = {action.dest: action for action in parser._actions if action.dest not in ("help", "config")}
    nested, named = config.pop("distillation_config", None), config.get("distillation_method")
    if "model_family" in config and nested is None and (given or named) is None:
        notes.append(f"{path}: names no distillation_method; this script distils with {method}, and does nothing else")
    methods = (method,)
    if choice := actions.get("distillation_method"):
        methods, named = choice.choices, config.pop(choice.dest, None) or method
        method = given or read_setting(choice, choice.dest, named, str(path))
    nested = {} if nested is None else nested
    if isinstance(nested, dict):  # under the method's name, beside other methods, or flat
        nested = nested.get(method, {key: value for key, value in nested.items() if key not in methods})
    if not isinstance(nested, dict):
        raise ValueError(f"{path}: distillation_config is {nested!r}, and must be an object of settings")
    config = {key: value for key, value in (config | nested).items() if value is not None}
    for key, ours in (("model_family", family), ("distillation_method", method)):
        value = config.pop(key, None)
        if FAMILY_OF_NAME.get(str(value), value) not in (None, ours):
            raise ValueError(f"{path}: {key} is {value!r}, and this script is for {ours!r}")
    if (flavour := config.pop("model_flavour", None)) is not None:
        known = FLAVOURS.get(family, {})
        if flavour not in known:
            names = ", ".join(known) or "none"
            raise ValueError(f"{path}: model_flavour is {flavour!r}, known for {family}: {names}")
        if "pretrained_model_name_or_path" not in config:
            config.setdefault("pretrained_teacher_model", known[flavour])
    if config.pop("delete_problematic_images", False):
        raise ValueError(f"{path}: delete_problematic_images: this program never deletes your files")
    check_diff2flow(config, str(path), notes)

    known = [*actions, *(key for key, name in FLAG_OF_KEY.items() if name in actions)]
    config = config_here(config, str(path), notes, known=known)
    settings = {"distillation_method": method} if choice else {}
    for key, value in config.items():
        if key not in known:
            raise unknown_key(key, known, str(path))
        name = FLAG_OF_KEY.get(key, key)
        action = actions[name]
        if value is False and (action.type, action.default) == (str, None):  # the flag's default
            continue
        settings[name] = read_setting(action, key, value, str(path))
    return settings


def without_dashes(config: dict, path: Path) -> dict:
    """Settings whose keys were as on the command line, `--learning_rate`, or without the dashes."""
    keys = [key.removeprefix("--") for key in config]
    if twice := [key for key in keys if keys.count(key) > 1]:
        raise ValueError(f"{path}: {twice[0]} is there twice, with and without --")
    return dict(zip(keys, config.values(), strict=True))


def check_diff2flow(config: dict, where: str, notes: list[str]):
    """Takes diff2flow_enabled out of a config: here diff2flow_loss alone decides."""
    enabled, loss = config.pop("diff2flow_enabled", None), config.get("diff2flow_loss")
    if enabled and not loss:
        notes.append(f"{where}: diff2flow_enabled changes nothing without diff2flow_loss")
    if enabled is False and loss:
        raise ValueError(f"{where}: diff2flow_loss is on and diff2flow_enabled is off: one or the other")


def other_meanings(settings: dict, path: str, method: str) -> list[str]:
    """Notes on settings of a config that mean something else in SimpleTuner, by flag name."""
    notes = []
    if bounds := {name: settings[name] for name in ("w_min", "w_max") if name in settings and method == "lcm"}:
        ours = ", ".join(f"{name} {value:g}" for name, value in bounds.items())
        theirs = ", ".join(f"{name} {value - 1:g}" for name, value in bounds.items())
        notes.append(
            f"{path}: {ours}: the w of the papers, guidance_scale = 1 + w; SimpleTuner takes them for the guidance_scale"
            f" itself, which would be {theirs} here"
        )
    if method == "lcm" and settings.get("ema_decay"):
        notes.append(f"{path}: ema_decay {settings['ema_decay']:g}: of the consistency target, which is also exported")
    if "revision" in settings:
        notes.append(f"{path}: revision {settings['revision']}: the VAE's; the teacher's is teacher_revision")
    return notes


def read_setting(action: argparse.Action, key: str, value, where: str):
    """The value that the flag would have from the command line; JSON must have it as the flag's own type."""
    if isinstance(action.nargs, int) and action.nargs > 1:
        if not isinstance(value, list) or len(value) != action.nargs:
            raise ValueError(f"{where}: {key} is {value!r}, and must be a list of {action.nargs}")
        single = argparse.Namespace(nargs=None, type=action.type, choices=action.choices)
        return [read_setting(single, key, each, where) for each in value]
    if action.nargs == 0:
        check_value(key, value, Key(bool), where)
        return value
    if key in LISTS:
        values = value if isinstance(value, list) else [value]
        if all(isinstance(each, int | float) and not isinstance(each, bool) for each in values):
            value = ",".join(map(str, values))
    if key.endswith("lora_target_modules") and isinstance(value, list):
        value = ",".join(map(str, value))
    # A flag of another type parses text
    kind = action.type if action.type in (int, float) else str
    check_value(key, value, Key(tuple(action.choices) if action.choices else kind), where)
    try:  # numbers stay as JSON has them, 512 and not 512.0: names of caches tell them apart
        return action.type(value) if action.type and isinstance(value, str) else value
    except argparse.ArgumentTypeError as error:
        raise ValueError(f"{where}: {key} {error}") from None
