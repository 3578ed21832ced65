"""What every DMD script does alike: rules of its flags, the student's steps, and the blocks of its rollouts."""

import argparse
import itertools
import math

from common.data.clips import check_frame_count, latent_frames, pixel_frames
from common.flags import check_ranges
from common.solvers import TIMESTEPS, denoising_steps
from common.wan.causal import block_lengths

RECIPE_BATCH = 64  # samples of an optimizer step in the papers' recipes


# Of the flags that scripts share, those that have no job here, and what they are if nobody gives them
NOT_HERE = {
    "eval_steps": 0, "eval_samples": 8, "evaluation_type": "none", "evaluation_clip_model": None,
    "validation_preview": False, "validation_preview_steps": 1, "validation_preview_model": None,
    "text_encoder_2_precision": "no_change", "use_fix_crop_and_size": False,
}  # fmt: skip


def wanted_student(args) -> str:
    """full or lora. The toy teacher is small: nothing speaks for adapters on it but that somebody asks for them."""
    given = args.lora_rank, args.lora_alpha, args.lora_dropout, args.lora_target_modules, args.lora_type
    as_adapters = not args.toy or any(value is not None for value in given)
    return args.model_type or ("lora" if as_adapters else "full")


def check_dmd_flags(parser, args, lora_targets: str):
    """Every rule of the student's and the method's flags; fills in the LoRA's defaults."""
    args.model_type = wanted_student(args)
    if args.toy:
        toy = f"No --pretrained_teacher_model: distilling the toy teacher by its recipe ({args.model_type})."
        args.notes.insert(0, toy)
    lora = {"lora_rank": 128, "lora_alpha": 128, "lora_dropout": 0.0, "lora_target_modules": lora_targets}
    for name, default in lora.items():
        if args.model_type == "full" and getattr(args, name) is not None:
            parser.error(f"--model_type full: takes no --{name}")
        if getattr(args, name) is None:
            setattr(args, name, default)
    if args.model_type == "lora" and args.export_pipeline:
        parser.error("--export_pipeline: is for a full student; a LoRA loads into its teacher's pipeline")
    for name, default in NOT_HERE.items():
        if getattr(args, name) != default:
            parser.error(f"--{name}: has no job in this script")
    if args.model_type == "full" and "comfyui" in args.export_formats:
        parser.error("--export_formats comfyui: is a layout of LoRA files")
    if args.context_parallel_degree > 1 and args.attention_mechanism != "diffusers":
        parser.error(
            f"--context_parallel_degree and --attention_mechanism {args.attention_mechanism}: one or the other"
        )
    if args.mixed_precision == "fp16":
        parser.error("--mixed_precision fp16: Wan's activations overflow it; bf16 or no")
    at_least_one = ("lora_rank", "lora_alpha", "num_training_frames", "context_parallel_degree", "max_sequence_length")
    at_least_one += ("generator_update_interval", "ema_update_interval")
    not_negative = ("num_frame_per_block", "fake_score_guidance_scale", "fake_score_weight_decay", "causal_init_steps")
    not_negative += ("plan",)
    positive = ("fake_score_lr", "fake_score_eps", "fake_score_grad_clip", "timestep_shift", "flow_schedule_shift")
    positive += ("causal_init_lr",)
    check_ranges(
        parser, args, at_least_one=at_least_one, not_negative=not_negative, positive=positive,
        below_one=("lora_dropout", "ema_decay"), share=("min_timestep_ratio", "max_timestep_ratio"),
    )  # fmt: skip
    for name, default in (("lr", args.learning_rate), ("guidance", args.real_score_guidance_scale)):
        if getattr(args, f"causal_init_{name}") is None:
            setattr(args, f"causal_init_{name}", default)
        elif not args.causal_init_steps and not args.toy:  # whose recipe has both
            parser.error(f"--causal_init_{name}: belongs to --causal_init_steps, and there are none")
    for name in ("real_score_guidance_scale", "causal_init_guidance"):
        if not 1.0 <= getattr(args, name) < math.inf:
            parser.error(f"--{name} {getattr(args, name):g}: must be at least 1, no guidance")
    if not args.min_timestep_ratio < args.max_timestep_ratio:
        parser.error(
            f"--min_timestep_ratio {args.min_timestep_ratio:g} and --max_timestep_ratio {args.max_timestep_ratio:g}: "
            f"need 0 <= min < max <= 1"
        )
    for name in ("min_score_timestep", "context_noise"):
        if not 0.0 <= getattr(args, name) < TIMESTEPS:
            parser.error(f"--{name} {getattr(args, name):g}: must be in [0, 1000)")
    if not all(0.0 <= beta < 1.0 for beta in args.fake_score_betas):
        parser.error(f"--fake_score_betas {args.fake_score_betas}: must be in [0, 1)")
    try:
        args.steps = denoising_steps(args.dmd_denoising_steps, args.flow_schedule_shift or 1.0)
    except ValueError as error:
        parser.error(f"--dmd_denoising_steps {args.dmd_denoising_steps}: {error}")
    if "," not in args.dmd_denoising_steps and len(args.steps) > 1 and args.flow_schedule_shift is None:
        parser.error(f"--dmd_denoising_steps {args.dmd_denoising_steps}: a number of steps needs --flow_schedule_shift")
    own = [len(args.steps)]
    if args.validation_num_inference_steps not in (None, own):
        given = ",".join(map(str, args.validation_num_inference_steps))
        args.notes.append(f"--validation_num_inference_steps {given}: the student has {own[0]}")
    args.validation_num_inference_steps = own
    args.report_steps = own if args.report_steps is None else args.report_steps
    args.negative_prompt = args.negative_prompt or args.validation_negative_prompt or ""
    if args.validation_guidance not in (None, 1.0):
        args.notes.append(f"--validation_guidance {args.validation_guidance:g}: of the teacher; a student takes none")
    if args.validation_guidance in (None, 1.0):
        args.validation_guidance = args.real_score_guidance_scale


def batch_warning(batch: int) -> str | None:
    if RECIPE_BATCH / 4 <= batch <= RECIPE_BATCH * 4:
        return None
    return (
        f"warning: {batch} clips a step, and the papers' recipes have {RECIPE_BATCH}: "
        + ("raise" if batch < RECIPE_BATCH else "lower")
        + " --gradient_accumulation_steps, --train_batch_size or the number of processes, or change --learning_rate "
        + "and --fake_score_lr with it"
    )


def check_rollouts(parser, args):
    """Blocks of each dataset's rollouts, and which of their frames are trained; after check_clip_flags."""
    for dataset in args.datasets:
        blocks = blocks_of(args, latent_frames(dataset.num_frames))
        trained, ends = trained_from(args, sum(blocks)), [0]
        for length in blocks:
            ends.append(ends[-1] + length)
        if trained not in ends:
            parser.error(
                f"--num_training_frames {args.num_training_frames}: must be whole blocks of a rollout of {sum(blocks)} "
                f"latent frames ({', '.join(map(str, blocks))})"
            )


def blocks_of(args, frames: int) -> list[int]:
    """Of a clip of so many latent frames. One block is rolled out no longer than it is trained."""
    frames = frames if args.num_frame_per_block else min(frames, args.num_training_frames)
    return block_lengths(frames, args.num_frame_per_block, args.independent_first_frame)


def trained_from(args, frames: int) -> int:
    """First latent frame that is trained, of so many."""
    return max(0, frames - args.num_training_frames)


def splits(latents: int, args) -> bool:
    """Whether so many latent frames are whole blocks."""
    try:
        return bool(block_lengths(latents, args.num_frame_per_block, args.independent_first_frame))
    except ValueError:
        return False


def fit_to_blocks(name: str, frames: int, args) -> int:
    """Frames of a clip as they are where blocks divide them, else cut to --num_training_frames."""
    latents, trained = latent_frames(frames), args.num_training_frames
    if splits(latents, args):
        return frames
    if trained < latents and splits(trained, args):
        args.notes.append(
            f"{name} {frames}: {latents} latent frames are no whole blocks of {args.num_frame_per_block}; "
            f"cut to --num_training_frames {trained}, {pixel_frames(trained)} frames"
        )
        return pixel_frames(trained)
    fewer = [count for count in range(latents, 0, -1) if splits(count, args)][:1]
    more = next(count for count in itertools.count(latents) if splits(count, args))
    near = " or ".join(str(pixel_frames(count)) for count in (*fewer, more))
    raise ValueError(
        f"{name} {frames}: {latents} latent frames are no whole blocks of --num_frame_per_block "
        f"{args.num_frame_per_block}{' after the first frame' * args.independent_first_frame}; {near} frames are"
    )


def check_clip_flags(parser: argparse.ArgumentParser, args: argparse.Namespace):
    """Frames of the datasets' clips and of validation's, as the blocks divide them; after check_data_flags."""
    try:
        for dataset in args.datasets:
            dataset.num_frames = fit_to_blocks(f"{dataset.id}: num_frames", dataset.num_frames, args)
        name, frames = "--validation_num_video_frames", args.validation_num_video_frames
        check_frame_count(name, frames)
        args.validation_num_video_frames = fit_to_blocks(name, frames, args)
    except ValueError as error:
        parser.error(str(error))
