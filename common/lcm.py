"""What every LCM script does alike: rules of its flags, a sample's draws, the student's sampler."""

import math

import torch
from diffusers import LCMScheduler

from common.config import check_ranges
from common.stream import sample_generator


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


def draw_for(args, position: int, shape):
    """index, w, whether the prompt is dropped, and two noises, of the sample at this place in the global sequence."""
    rng = sample_generator(args.seed, position)
    index = torch.randint(args.num_ddim_timesteps, (), generator=rng)
    w = args.w_min + (args.w_max - args.w_min) * torch.rand((), generator=rng)
    dropped = torch.rand((), generator=rng) < args.proportion_empty_prompts
    return index, w, dropped, torch.randn(shape, generator=rng), torch.randn(shape, generator=rng)


def with_uncond(cond, uncond) -> dict[str, torch.Tensor]:
    """Batch of 2B: as conditioned, and with the empty prompt's embeddings."""
    rows = {name: uncond[name].expand_as(v) if name in uncond else v for name, v in cond.items()}
    return {name: torch.cat([v, rows[name]]) for name, v in cond.items()}


def middle_w(args) -> float:
    """The w of validation pictures, inside the trained range: a student that takes w knows no other."""
    middle, wanted = (args.w_min + args.w_max) / 2.0, args.validation_guidance
    return middle if wanted is None else min(max(wanted - 1.0, args.w_min), args.w_max)


def student_scheduler(args, scheduler) -> LCMScheduler:
    return LCMScheduler.from_config(
        scheduler.config,
        original_inference_steps=args.num_ddim_timesteps,
        timestep_scaling=args.timestep_scaling_factor,
    )
