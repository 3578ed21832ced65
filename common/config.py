"""The flags that every script has alike, and the reader of --config files.

A config is JSON with the keys of the quickstarts: each key means one flag, mostly of the same name. What stands on the
command line wins over the config, and the config over a flag's default.
"""

import argparse
import difflib
import json
import math
from pathlib import Path

# Config keys whose flag has another name.
FLAG_OF_KEY = {
    "pretrained_model_name_or_path": "pretrained_teacher_model",
    "caption_dropout_probability": "proportion_empty_prompts",
    "vae_batch_size": "vae_encode_batch_size",
    "use_gradient_checkpointing": "gradient_checkpointing",
    "validation_step_interval": "validation_steps",
    "checkpoint_step_interval": "checkpointing_steps",
}
TRACKERS = ("tensorboard", "wandb", "trackio")


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
    add("--learning_rate", type=float, default=1e-4, help="after warm-up")
    add("--scale_lr", action="store_true", help="multiply the rate by processes x batch x accumulation")
    add("--lr_scheduler", type=str, default="constant", choices=["constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"])
    add("--lr_warmup_steps", type=int, default=500, help="optimizer steps; not for constant")
    add("--optimizer", type=str, default="adamw", choices=["adamw", "adamw_bf16", "adamw8bit", "lion"], help="adamw_bf16 is adamw: trained weights and moments are fp32")
    add("--use_8bit_adam", action="store_true", help="the same as --optimizer adamw8bit")
    add("--adam_beta1", type=float, default=0.9)
    add("--adam_beta2", type=float, default=0.999)
    add("--adam_weight_decay", type=float, default=1e-2)
    add("--adam_epsilon", type=float, default=1e-8)
    add("--max_grad_norm", type=float, default=1.0, help="gradients are clipped to this L2 norm")

    add = parser.add_argument_group("precision and speed").add_argument
    add("--mixed_precision", type=str, choices=["no", "fp16", "bf16"], help="default: what accelerate's config says")
    add("--allow_tf32", action="store_true", help="TF32 for fp32 matmuls on Ampere GPUs and later")
    add("--gradient_checkpointing", action="store_true", help="recompute activations in backward: less memory, about 30%% slower")
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
    add("--validation_num_inference_steps", type=str, default="1,2,4,8", help="student's numbers of steps, one row each")
    add("--validation_guidance", type=float, help="guidance_scale = 1 + w; default: the middle of the trained range")
    add("--validation_seed", type=int, default=0, help="of the pictures' noise")
    add("--disable_benchmark", action="store_true", help="do not draw the teacher's own pictures beside the student's")

    add = parser.add_argument_group("trackers and hub").add_argument
    add("--report_to", type=str, default="tensorboard", help="tensorboard, wandb, trackio, several with commas, all, or none")
    add("--logging_dir", type=str, default="logs", help="inside OUTPUT_DIR")
    add("--tracker_project_name", type=str, default="text2image-fine-tune")
    add("--tracker_run_name", type=str, help="default: the tracker's choice")
    add("--push_to_hub", action="store_true", help="upload the final model, to a private repository")
    add("--hub_model_id", type=str, help="owner/name; default: OUTPUT_DIR's name under your own")
    add("--hub_token", type=str, help="better: `hf auth login`, which keeps it out of the shell's history")
    add("--local_rank", type=int, default=-1, help="no job any more: accelerate sets it")
# fmt: on


def check_shared_flags(parser: argparse.ArgumentParser, args: argparse.Namespace):
    """Every rule between shared flags that can be known before anything loads."""
    for name in ("train_batch_size", "gradient_accumulation_steps", "vae_encode_batch_size"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} {getattr(args, name)}: must be at least 1")
    if args.num_train_epochs < (1 if args.max_train_steps is None else 0):
        parser.error(f"--num_train_epochs {args.num_train_epochs}: must be at least 1, or 0 with --max_train_steps")
    for name in ("max_train_steps", "max_train_samples", "checkpoints_total_limit"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name} {getattr(args, name)}: must be at least 1")
    for name in ("dataloader_num_workers", "checkpointing_steps", "validation_steps", "lr_warmup_steps", "seed"):
        if getattr(args, name) < 0:
            parser.error(f"--{name} {getattr(args, name)}: must not be negative")
    for name in ("learning_rate", "max_grad_norm", "adam_epsilon"):
        if not 0.0 < getattr(args, name) < math.inf:
            parser.error(f"--{name} {getattr(args, name)}: must be positive")
    for name in ("adam_beta1", "adam_beta2"):
        if not 0.0 <= getattr(args, name) < 1.0:
            parser.error(f"--{name} {getattr(args, name)}: must be in [0, 1)")
    if not 0.0 <= args.adam_weight_decay < math.inf:
        parser.error(f"--adam_weight_decay {args.adam_weight_decay}: must not be negative")
    if not 0.0 <= args.proportion_empty_prompts <= 1.0:
        parser.error(f"--proportion_empty_prompts {args.proportion_empty_prompts}: must be in [0, 1]")
    if args.vae_cache_ondemand and args.vae_cache_disable:
        parser.error("--vae_cache_ondemand and --vae_cache_disable: one or the other")
    if args.use_8bit_adam:
        if args.optimizer not in ("adamw", "adamw8bit"):
            parser.error(f"--use_8bit_adam and --optimizer {args.optimizer}: one or the other")
        args.optimizer = "adamw8bit"
    try:
        args.validation_num_inference_steps = [int(n) for n in str(args.validation_num_inference_steps).split(",")]
        if min(args.validation_num_inference_steps) < 1:
            raise ValueError
    except ValueError:
        parser.error(f"--validation_num_inference_steps {args.validation_num_inference_steps}: numbers like 1,2,4,8")
    wanted = [] if args.report_to == "none" else args.report_to.split(",")
    for name in wanted:
        if name not in (*TRACKERS, "all"):
            parser.error(f"--report_to {name}: must be of {', '.join(TRACKERS)}, all, or none")
    if args.validation_prompt_library and not Path(args.validation_prompt_library).is_file():
        parser.error(f"--validation_prompt_library {args.validation_prompt_library}: no such file")


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
    wanted = bool if action.nargs == 0 else action.type or str
    if key == "validation_num_inference_steps" and isinstance(value, int) and not isinstance(value, bool):
        value = str(value)  # one number, where the flag takes a list
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
