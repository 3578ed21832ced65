"""The flags that every script has alike, and the reader of --config files.

A config is JSON with the keys of the quickstarts: each key means one flag, mostly of the same name. What stands on the
command line wins over the config, and the config over a flag's default.
"""

import argparse
import difflib
import json
import math
from pathlib import Path

import torch

from common.data.buckets import CROP_ASPECTS, CROP_STYLES, RESOLUTION_TYPES, Rules, with_settings
from common.networks import ATTENTION, PRECISIONS, check_precision
from common.optim import DECAYS
from common.tracking import check_webhook

# Config keys whose flag has another name.
FLAG_OF_KEY = {
    "pretrained_model_name_or_path": "pretrained_teacher_model",
    "caption_dropout_probability": "proportion_empty_prompts",
    "vae_batch_size": "vae_encode_batch_size",
    "use_gradient_checkpointing": "gradient_checkpointing",
    "validation_step_interval": "validation_steps",
    "checkpoint_step_interval": "checkpointing_steps",
}


# Flags that take several numbers with commas between, for which a config may have a number or a list.
LISTS = ("validation_num_inference_steps", "validation_resolution", "report_steps", "dmd_denoising_steps")


TRACKERS = ("tensorboard", "wandb", "trackio")


# What a config's model_flavour names, for each family of models.
FLAVOURS = {
    "sdxl": {"base-1.0": "stabilityai/stable-diffusion-xl-base-1.0"},
    "wan": {
        "t2v-480p-1.3b-2.1": "Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
        "t2v-480p-14b-2.1": "Wan-AI/Wan2.1-T2V-14B-Diffusers",
    },
}


# fmt: off
def add_shared_flags(parser: argparse.ArgumentParser):
    """Flags of data, caches, optimizer, precision, checkpoints, validation, trackers and hub."""
    add = parser.add_argument_group("data").add_argument
    add("--train_shards_path_or_url", type=str, help="WebDataset shards: path, https: or pipe: URL, braces expand; several joined by ::")
    add("--data_backend_config", type=str, help="JSON file of datasets (multidatabackend.json): folders of images, shards, caches")
    add("--interpolation_type", type=str, default="bilinear", choices=["bilinear", "bicubic", "box", "nearest", "nearest_exact", "hamming", "lanczos"])
    add("--center_crop", action="store_true", help="crop from the centre; default: at random")
    add("--random_flip", action="store_true", help="mirror half of the images")
    add("--dataloader_num_workers", type=int, default=0, help="reader processes per training process; 0 reads in the training process")
    add("--max_train_samples", type=int, help="samples in an epoch; default: as many as local shards hold")
    add("--proportion_empty_prompts", type=float, default=0.0, help="share of samples that train on the empty prompt, 0 to 1")

    add = parser.add_argument_group("caches").add_argument
    add("--cache_dir", type=str, help="where models from the hub are kept (the hub's own cache)")
    add("--cache_dir_vae", type=str, help="latents; may be shared by runs; default OUTPUT_DIR/cache/vae")
    add("--cache_dir_text", type=str, help="text embeddings; may be shared by runs; default OUTPUT_DIR/cache/text")
    add("--vae_cache_ondemand", action="store_true", help="encode what is missing when training meets it, and keep it; default: before training")
    add("--vae_cache_disable", action="store_true", help="encode always, keep nothing; default for shards that are not local")
    add("--compress_disk_cache", action="store_true", help="zlib, about 10%% smaller latents for some CPU time")
    add("--vae_encode_batch_size", "--encode_batch_size", type=int, default=32, help="images that the VAE encodes at a time")

    add = parser.add_argument_group("optimization").add_argument
    add("--train_batch_size", type=int, default=16, help="samples per process and forward pass")
    add("--gradient_accumulation_steps", type=int, default=1, help="forward and backward passes per optimizer step")
    add("--num_train_epochs", type=int, default=100, help="used where --max_train_steps is not given")
    add("--max_train_steps", type=int, help="optimizer steps")
    add("--ignore_final_epochs", action="store_true", help="end by --max_train_steps alone, which is then needed")
    add("--learning_rate", type=float, default=1e-4, help="after warm-up")
    add("--scale_lr", action="store_true", help="multiply the rate by processes x batch x accumulation")
    add("--lr_scheduler", type=str, default="constant", choices=list(DECAYS), help="a warm-up, then one decay to --lr_end")
    add("--lr_end", type=float, help="rate at the last step; default: 0, cosine_with_min_lr: a tenth of --learning_rate")
    add("--lr_warmup_steps", type=int, default=500, help="optimizer steps; not for constant")
    add("--optimizer", type=str, default="adamw", choices=["adamw", "adamw_bf16", "adamw8bit", "lion", "optimi-lion"], help="adamw_bf16 is adamw: trained weights and moments are fp32; optimi-lion is lion")
    add("--use_8bit_adam", action="store_true", help="the same as --optimizer adamw8bit")
    add("--adam_beta1", type=float, default=0.9)
    add("--adam_beta2", type=float, default=0.999)
    add("--adam_weight_decay", type=float, default=1e-2)
    add("--adam_epsilon", type=float, default=1e-8)
    add("--max_grad_norm", type=float, default=1.0, help="gradients are clipped to this L2 norm, or each element to this value")
    add("--grad_clip_method", type=str, default="norm", choices=["norm", "value"], help="what --max_grad_norm bounds")

    add = parser.add_argument_group("precision and speed").add_argument
    add("--mixed_precision", type=str, choices=["no", "fp16", "bf16"], help="default: what accelerate's config says")
    add("--allow_tf32", action="store_true", help="TF32 for fp32 matmuls on Ampere GPUs and later")
    add("--gradient_checkpointing", action="store_true", help="recompute activations in backward: less memory, about 30%% slower")
    add("--base_model_precision", type=str, default="no_change", choices=PRECISIONS, help="of the frozen network: a LoRA's base, or the teacher; weights of Linear layers in 8 bits; int8-quanto is int8-torchao")
    add("--text_encoder_1_precision", type=str, default="no_change", choices=PRECISIONS, help="likewise, of the text encoder")
    add("--text_encoder_2_precision", type=str, default="no_change", choices=PRECISIONS, help="likewise, of the second text encoder, where there is one")
    add("--quantize_via", type=str, default="accelerator", choices=["cpu", "accelerator"], help="where weights are brought to 8 bits; cpu needs less memory on the GPU, and more time")
    add("--attention_mechanism", type=str, default="diffusers", choices=ATTENTION, metavar="NAME", help=f"diffusers is PyTorch's SDPA; else one of diffusers' backends: {', '.join(ATTENTION[1:])}")
    add("--enable_xformers_memory_efficient_attention", action="store_true", help="xformers, where it is installed; else PyTorch's SDPA")
    add("--compile", action="store_true", help="torch.compile the networks' blocks; the first steps take minutes")

    add = parser.add_argument_group("checkpoints").add_argument
    add("--output_dir", type=str, default="lcm-xl-distilled", help="checkpoints, pictures, logs, and the final model")
    add("--seed", type=int, default=42, help="of data order, noise, t, w and initialisation")
    add("--checkpointing_steps", type=int, default=500, help="optimizer steps between checkpoints; 0 for none but the last")
    add("--checkpoints_total_limit", type=int, help="newest checkpoints to keep; default: all")
    add("--resume_from_checkpoint", type=str, help="`latest`, a path, or the name of a checkpoint in OUTPUT_DIR")

    add = parser.add_argument_group("validation").add_argument
    add("--validation_steps", type=int, default=200, help="optimizer steps between validation pictures; 0 for none")
    add("--validation_prompt", type=str, help="one prompt more for the pictures")
    add("--validation_prompt_library", type=str, help="JSON file, name -> prompt, for the pictures")
    add("--validation_negative_prompt", type=str, help="of the teacher's pictures, which are drawn with guidance; default: what the teacher takes for none")
    add("--validation_resolution", type=str, help="WIDTHxHEIGHT in pixels, several with commas, a block of rows each; default: the training resolution")
    add("--validation_num_inference_steps", type=str, default="1,2,4,8", help="student's numbers of steps, one row each; a DMD student has its own")
    add("--validation_guidance", type=float, help="guidance_scale = 1 + w; default: the middle of the trained range")
    add("--validation_seed", type=int, default=0, help="of the pictures' noise")
    add("--disable_benchmark", action="store_true", help="do not draw the teacher's own pictures beside the student's")
    add("--validation_preview", action="store_true", help="also pictures of half-done samples, by a tiny autoencoder, to trackers and webhook")
    add("--validation_preview_steps", type=int, default=1, help="N: previews after steps 1, N, 2N, ...")
    add("--validation_preview_model", type=str, help="folder or hub name of an AutoencoderTiny; default: the model's own on the hub")
    add("--evaluation_type", type=str, default="none", choices=["none", "clip"], help="clip: CLIP score of validation pictures: min, max, mean, std")
    add("--evaluation_clip_model", type=str, help="folder or hub name of the CLIP that scores")
    add("--eval_steps", type=int, default=0, help="optimizer steps between losses on held-out samples, at fixed timesteps, noise and w; 0 for none")
    add("--eval_samples", type=int, default=8, help="samples held out from training for --eval_steps")
    add("--report_steps", type=str, default="1,2,4,8", help="numbers of steps of the report at the end, of teacher and student; a DMD student has its own; empty for none")

    add = parser.add_argument_group("trackers and hub").add_argument
    add("--report_to", type=str, default="tensorboard", help="tensorboard, wandb, trackio, several with commas, all, or none")
    add("--logging_dir", type=str, default="logs", help="inside OUTPUT_DIR")
    add("--tracker_project_name", type=str, default="text2image-fine-tune")
    add("--tracker_run_name", type=str, help="default: the tracker's choice")
    add("--webhook_config", type=str, help="JSON file with webhook_url and level (debug, the default, info, error): progress, pictures and errors are POSTed there")
    add("--push_to_hub", action="store_true", help="upload the final model, to a private repository")
    add("--push_checkpoints_to_hub", action="store_true", help="with --push_to_hub: also the model at each checkpoint")
    add("--hub_model_id", type=str, help="owner/name; default: OUTPUT_DIR's name under your own")
    add("--hub_token", type=str, help="better: `hf auth login`, which keeps it out of the shell's history")
    add("--local_rank", type=int, default=-1, help="no job any more: accelerate sets it")
# fmt: on


# ---------------------------------------------------------------------------------------------------------------------
# Settings, of the command line or of one dataset
# ---------------------------------------------------------------------------------------------------------------------


# fmt: off
def add_bucket_flags(parser: argparse.ArgumentParser):
    """Flags of scripts that train on several sizes and take images from more than shards."""
    add = parser.add_argument_group("sizes; in a dataset file a dataset's own entry wins").add_argument
    add("--resolution_type", type=str, default="pixel", choices=RESOLUTION_TYPES, help="what --resolution and the sizes below are: pixels of the shorter side; megapixels; or pixels of a square's side, whose area counts")
    add("--bucket_alignment", type=int, default=64, help="a bucket's sides are multiples of this many pixels")
    add("--aspect_bucket_rounding", type=int, default=2, help="decimals, 1 to 9, of the ratio width / height that names a bucket; more than 9 is taken for --bucket_alignment")
    add("--minimum_image_size", type=float, default=0.0, help="smaller images are skipped and counted; in the unit of --resolution_type, but 10 or less is megapixels also under pixel; 0 for none")
    add("--maximum_image_size", type=float, help="larger images are first shrunk to --target_downsample_size, then cropped; unit as above")
    add("--target_downsample_size", type=float, help="see --maximum_image_size; unit as above")
    add("--crop_aspect", type=str, default="square", choices=CROP_ASPECTS, help="square: all images are cropped to one square; preserve: each goes to the bucket nearest to its own ratio")
    add("--crop_style", type=str, choices=CROP_STYLES, help="where the crop is taken, corner: top left; default: random, or center with --center_crop")
    add("--use_fix_crop_and_size", action="store_true", help="tell the network that every original has the resolution's size and is not cropped; default: its true size and crop")
    add("--disable_bucket_pruning", action="store_true", help="keep buckets of fewer samples than a batch, their batches are filled by repeating what is there; default: their images go to the bucket of the nearest ratio that has enough")

    add = parser.add_argument_group("datasets, one of these or --train_shards_path_or_url or --data_backend_config").add_argument
    add("--train_data_dir", type=str, help="folder of images, with captions in metadata.jsonl or in a .txt beside each; or of parquet files")
    add("--dataset_name", type=str, help="dataset on the hub, read by the package `datasets`; or a local folder or parquet file")
    add("--dataset_config_name", type=str, help="which of that dataset's configurations")
    add("--image_column", type=str, default="image", help="of a parquet file or dataset")
    add("--caption_column", type=str, default="text", help="of a parquet file, a dataset or metadata.jsonl; text, or a list of alternatives")
# fmt: on


# fmt: off
def add_video_flags(parser: argparse.ArgumentParser):
    """Flags of scripts that train on clips."""
    add = parser.add_argument_group("clips; in a dataset file a dataset's own entry wins").add_argument
    add("--num_frames", type=int, default=81, help="frames of a clip, 4k + 1; longer clips are cut as --crop_style says, shorter ones are skipped and counted")
    add("--frame_interval", type=int, default=1, help="every how many frames of a file one is taken")
# fmt: on


def check_shared_flags(parser: argparse.ArgumentParser, args: argparse.Namespace):
    """Every rule between shared flags that can be known before anything loads. What is to be said goes to args.notes."""
    at_least_one = ("train_batch_size", "gradient_accumulation_steps", "vae_encode_batch_size", "max_train_steps")
    at_least_one += ("max_train_samples", "checkpoints_total_limit", "validation_preview_steps", "eval_samples")
    not_negative = ("dataloader_num_workers", "checkpointing_steps", "validation_steps", "lr_warmup_steps", "seed")
    check_ranges(
        parser, args, at_least_one=at_least_one, not_negative=(*not_negative, "eval_steps", "adam_weight_decay"),
        positive=("learning_rate", "max_grad_norm", "adam_epsilon"), below_one=("adam_beta1", "adam_beta2"),
        share=("proportion_empty_prompts",),
    )  # fmt: skip
    if args.num_train_epochs < (args.max_train_steps is None):
        parser.error(f"--num_train_epochs {args.num_train_epochs}: must be at least 1, or give --max_train_steps")
    if args.ignore_final_epochs and args.max_train_steps is None:
        parser.error("--ignore_final_epochs: needs --max_train_steps")
    args.notes = check_precision(parser, args)
    args.optimizer = args.optimizer.removeprefix("optimi-")
    if args.lr_end is not None and args.lr_scheduler.startswith("constant"):
        parser.error(f"--lr_end {args.lr_end} and --lr_scheduler {args.lr_scheduler}: it has no decay")
    if args.lr_end is None:
        args.lr_end = 0.1 * args.learning_rate if args.lr_scheduler == "cosine_with_min_lr" else 0.0
    if not 0.0 <= args.lr_end <= args.learning_rate:
        parser.error(
            f"--lr_end {args.lr_end} and --learning_rate {args.learning_rate}: need 0 <= lr_end <= learning_rate"
        )
    if args.evaluation_type == "clip" and not args.evaluation_clip_model:
        parser.error("--evaluation_type clip: needs --evaluation_clip_model, the CLIP that scores")
    if args.push_checkpoints_to_hub and not args.push_to_hub:
        parser.error("--push_checkpoints_to_hub: needs --push_to_hub")
    args.webhook = check_webhook(parser, args.webhook_config) if args.webhook_config else None
    args.validation_resolution = check_sizes(parser, args.validation_resolution)
    if args.vae_cache_ondemand and args.vae_cache_disable:
        parser.error("--vae_cache_ondemand and --vae_cache_disable: one or the other")
    if args.use_8bit_adam:
        if args.optimizer not in ("adamw", "adamw8bit"):
            parser.error(f"--use_8bit_adam and --optimizer {args.optimizer}: one or the other")
        args.optimizer = "adamw8bit"
    for name in ("validation_num_inference_steps", "report_steps"):
        if getattr(args, name) is None:  # a script that knows its own
            continue
        given = str(getattr(args, name))
        try:
            numbers = [int(n) for n in given.split(",")] if given or name != "report_steps" else []
        except ValueError:
            numbers = [0]
        if min(numbers, default=1) < 1:
            parser.error(f"--{name} {given}: numbers like 1,2,4,8")
        setattr(args, name, numbers)
    wanted = [] if args.report_to == "none" else args.report_to.split(",")
    for name in wanted:
        if name not in (*TRACKERS, "all"):
            parser.error(f"--report_to {name}: must be of {', '.join(TRACKERS)}, all, or none")
    if args.validation_prompt_library and not Path(args.validation_prompt_library).is_file():
        parser.error(f"--validation_prompt_library {args.validation_prompt_library}: no such file")
    if args.allow_tf32 and not torch.cuda.is_available():
        args.notes.append("--allow_tf32: no job without a CUDA GPU")
    if args.local_rank != -1:
        args.notes.append("--local_rank: no job, accelerate sets it")


def check_ranges(parser, args, at_least_one=(), not_negative=(), positive=(), below_one=(), share=()):
    """Each group by its rule; a flag that is not given and has no default passes."""
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


def check_sizes(parser, given: str | None) -> list[tuple[int, int]] | None:
    """[(height, width), ...] of "1024x1024,1280x768", width first; one number is a square."""
    try:
        sizes = [tuple(map(int, word.lower().split("x")))[::-1] for word in given.split(",")] if given else None
        sizes = sizes and [size * 2 if len(size) == 1 else size for size in sizes]
    except ValueError:
        sizes = [()]
    for size in sizes or []:
        if len(size) != 2 or min(size) < 8 or size[0] % 8 or size[1] % 8:
            parser.error(f"--validation_resolution {given}: WIDTHxHEIGHT in multiples of 8, as in 1024x1024,1280x768")
    return sizes


def check_bucket_flags(parser: argparse.ArgumentParser, args: argparse.Namespace) -> Rules:
    """Every rule between these flags, and the sizes that follow from them."""
    if args.dataset_config_name and not args.dataset_name:
        parser.error(f"--dataset_config_name {args.dataset_config_name}: needs --dataset_name")
    if args.bucket_alignment < 1:
        parser.error(f"--bucket_alignment {args.bucket_alignment}: must be at least 1")
    if not 0.0 < args.resolution < math.inf:
        parser.error(f"--resolution {args.resolution:g}: must be positive")
    base = Rules(
        args.resolution,
        resolution_type=args.resolution_type,
        alignment=args.bucket_alignment,
        crop_aspect=args.crop_aspect,
        crop_style=args.crop_style or ("center" if args.center_crop else "random"),
        fixed_size_ids=args.use_fix_crop_and_size,
    )
    settings = {
        "aspect_bucket_rounding": args.aspect_bucket_rounding,
        "minimum_image_size": args.minimum_image_size,
        "maximum_image_size": args.maximum_image_size,
        "target_downsample_size": args.target_downsample_size,
    }
    try:
        return with_settings(base, settings, "--", args.notes)
    except ValueError as error:
        parser.error(str(error))


def parse_with_config(parser: argparse.ArgumentParser, argv, *, family: str, method: str, recipe=None):
    """parse_args, with defaults from --config or, where no teacher is named, from the toy recipe.

    `recipe(args)` returns the toy's own settings by flag name.
    """
    parser.add_argument("--config", type=str, help="JSON file with settings by key; flags win over it")
    args = parser.parse_args(argv)
    if args.config:
        parser.set_defaults(**read_config(parser, Path(args.config), family, method))
        args = parser.parse_args(argv)
    args.toy = args.pretrained_teacher_model is None
    if args.toy and recipe:
        known = {action.dest: action.default for action in parser._actions}
        parser.set_defaults(
            **{name: value for name, value in recipe(args).items() if known[name] == parser.get_default(name)}
        )
        args = parser.parse_args(argv, argparse.Namespace(toy=True))
    return args


def read_config(parser: argparse.ArgumentParser, path: Path, family: str, method: str) -> dict:
    """Settings of a config file, by flag name."""
    config = read_json(parser, path)
    if not isinstance(config, dict):
        parser.error(f"--config {path}: must be a JSON object of settings")
    nested = config.pop("distillation_config", {})
    nested = nested.get(method, nested) if isinstance(nested, dict) else nested  # under the method's name, or flat
    if not isinstance(nested, dict):
        parser.error(f"--config {path}: distillation_config is {nested!r}, and must be an object of settings")
    config |= nested
    for key, value, ours in (
        ("model_family", config.pop("model_family", family), family),
        ("distillation_method", config.pop("distillation_method", method), method),
    ):
        if value != ours:
            parser.error(f"--config {path}: {key} is {value!r}, and this script is for {ours!r}")
    if (flavour := config.pop("model_flavour", None)) is not None:
        known = FLAVOURS.get(family, {})
        if flavour not in known:
            parser.error(
                f"--config {path}: model_flavour is {flavour!r}, known for {family}: {', '.join(known) or 'none'}"
            )
        if "pretrained_model_name_or_path" not in config:
            config.setdefault("pretrained_teacher_model", known[flavour])
    if config.pop("delete_problematic_images", False) is not False:
        parser.error(f"--config {path}: delete_problematic_images: this program never deletes your files")

    actions = {action.dest: action for action in parser._actions if action.dest not in ("help", "config")}
    settings = {}
    for key, value in config.items():
        name = FLAG_OF_KEY.get(key, key)
        if name not in actions:
            near = difflib.get_close_matches(key, [*actions, *FLAG_OF_KEY], n=1)
            parser.error(f"--config {path}: unknown key {key!r}" + (f", did you mean {near[0]!r}?" if near else ""))
        if value is not None:  # null: the flag's default
            settings[name] = check_value(parser, path, key, value, actions[name])
    return settings


def check_value(parser, path: Path, key: str, value, action):
    """A config's value must be of its flag's own type: a string is neither a number nor a boolean."""
    if isinstance(action.nargs, int) and action.nargs > 1:
        if not isinstance(value, list) or len(value) != action.nargs:
            parser.error(f"--config {path}: {key} is {value!r}, and must be a list of {action.nargs}")
        single = argparse.Namespace(nargs=None, type=action.type, choices=action.choices)
        return [check_value(parser, path, key, each, single) for each in value]
    wanted = bool if action.nargs == 0 else action.type or str
    if key in LISTS and isinstance(value, int) and not isinstance(value, bool):
        value = str(value)  # one number, where the flag takes a list
    if key in LISTS and isinstance(value, list) and all(isinstance(each, int | float) for each in value):
        value = ",".join(map(str, value))
    fits = {
        bool: isinstance(value, bool),
        int: isinstance(value, int) and not isinstance(value, bool),
        float: isinstance(value, int | float) and not isinstance(value, bool),
        str: isinstance(value, str),
    }[wanted]
    if not fits:
        parser.error(f"--config {path}: {key} is {value!r}, and must be of type {wanted.__name__}")
    if action.choices and value not in action.choices:
        parser.error(f"--config {path}: {key} is {value!r}, and must be one of {', '.join(action.choices)}")
    return value


def read_json(parser, path: Path):
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        parser.error(f"{path}: {error.strerror}")
    except ValueError as error:
        parser.error(f"{path} is not JSON: {error}")


def wanted_student(args) -> str:
    """full or lora, from the other flags."""
    given = (args.lora_rank, args.lora_alpha, args.lora_dropout, args.lora_target_modules, args.lora_type)
    return "lora" if args.use_dora or any(value is not None for value in given) else "full"


def check_lcm_flags(parser, args, lora_targets: str):
    """Every rule of the student's and the method's flags; fills in the LoRA's defaults."""
    args.model_type = args.model_type or wanted_student(args)
    if args.model_type == "full" and wanted_student(args) == "lora":
        parser.error("--model_type full: takes no --lora_* flag and no --use_dora")
    if args.model_type == "full" and "kohya" in args.export_formats:
        parser.error("--export_formats kohya: is a layout of LoRA files")
    if args.model_type == "lora" and args.export_pipeline:
        parser.error("--export_pipeline: is for a full student; a LoRA loads into its teacher's pipeline")
    if args.ema_decay is None:
        args.ema_decay = 0.95 if args.model_type == "full" else 0.0
    lora = {"lora_rank": 64, "lora_alpha": 64, "lora_dropout": 0.0, "lora_target_modules": lora_targets}
    for name, default in lora.items():
        if getattr(args, name) is None:
            setattr(args, name, default)
    if not 0.0 <= args.w_min <= args.w_max < math.inf:
        parser.error(f"--w_min {args.w_min} and --w_max {args.w_max}: need 0 <= w_min <= w_max")
    check_ranges(
        parser, args, at_least_one=("num_ddim_timesteps", "unet_time_cond_proj_dim", "lora_rank", "lora_alpha"),
        not_negative=("scheduled_sampling_max_step_offset",), positive=("huber_c", "timestep_scaling_factor"),
        below_one=("ema_decay", "lora_dropout"), share=("scheduled_sampling_probability",),
    )  # fmt: skip
    if (args.scheduled_sampling_probability > 0.0) != (args.scheduled_sampling_max_step_offset > 0):
        parser.error("--scheduled_sampling_probability and --scheduled_sampling_max_step_offset: one needs the other")
    if args.toy:
        toy = f"No --pretrained_teacher_model: distilling the toy teacher by its recipe ({args.model_type})."
        args.notes.insert(0, toy)
    if args.validation_guidance is not None and middle_w(args) != args.validation_guidance - 1.0:
        args.notes.append(
            f"--validation_guidance {args.validation_guidance:g}: trained is {1 + args.w_min:g} to {1 + args.w_max:g},"
            f" {1 + middle_w(args):g} is taken"
        )


def middle_w(args) -> float:
    """The w of validation pictures, inside the trained range: a student that takes w knows no other."""
    middle, wanted = (args.w_min + args.w_max) / 2.0, args.validation_guidance
    return middle if wanted is None else min(max(wanted - 1.0, args.w_min), args.w_max)
