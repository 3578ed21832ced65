"""Distribution matching distillation of Wan 2.1 text-to-video, or latent consistency distillation.

DMD (Yin et al. 2023, arXiv 2311.18828), DMD2 (2405.14867), CausVid (2412.07772), Self-Forcing (2506.08009), LCM (Luo et
al. 2023, 2310.04378).

Networks
    teacher      the frozen transformer: predicts v_real, the velocity (score) of the data, with guidance
    student      makes a clip in few steps
    fake_score   learns v_fake, the velocity (score) of the student's clips
    full: three transformers. lora: one, frozen; student and fake_score are two adapters on it, the teacher it without.

Algorithm, for each batch of prompts; sigma = t / 1000, x_t = (1 - sigma) * x0 + sigma * eps, v = eps - x0
    1. draws       noise of each of `steps`, the exit step, dropped prompts
    2. rollout     x = noise at the first of `steps`; until the exit step: x0 = x - sigma * v_student, x = x0 with fresh
                   noise of the next step; x_g = x0 of the exit step, the only one with a gradient
    3. student     t, eps fresh                     every generator_update_interval steps
                   v_real = v_uncond + s * (v_cond - v_uncond),  v_star = eps - x_g
                   g      = (v_real - v_fake) / mean|v_real - v_star|
                   loss   = |x_g - stop(x_g - g)|^2 / 2
    4. fake_score  t, eps fresh;  loss = |v_fake - (eps - x_g)|^2
    5. optimizers  6. moving average of the student
    In the first causal_init_steps the student is instead regressed to the teacher's own trajectories.
    x0 = x_t - sigma * v, so x_g - g lies from x_g towards x0_real - x0_fake; dividing by mean|x0_real - x_g| cancels
    sigma.
    No gradient goes from block to block: the cache of clean blocks has none.

Latent consistency (--distillation_method lcm) has no fake score; instead of 2. to 4., t and t_prev being neighbours in a
grid from noise to data:
    2. clean samples  latents x0 of clips, or by prompts alone x_g of a rollout, without a gradient
    3. teacher        x_t of x0 and fresh eps;  x_prev = x_t + (sigma_prev - sigma) * v_real
    4. student        f(x, t) = x - sigma * v_student;  loss = |f(x_t, t) - stop(f(x_prev, t_prev))|^2 / sigma^2

Blocks
    num_frame_per_block > 0 is self-forcing: the student makes the clip block by block, each seeing the clean blocks
    before it through a cache of keys and values. Teacher and fake_score see the whole clip. Else the clip is one block.

Guidance
    scales are the usual ones: uncond + s * (cond - uncond), where uncond has the negative prompt; 0 and 1 both mean
    cond alone. The student is sampled without guidance.

Launch
    accelerate launch train_dmd_distill_wan.py                             distils the toy teacher, on a CPU, in minutes
    accelerate launch train_dmd_distill_wan.py --pretrained_teacher_model Wan-AI/Wan2.1-T2V-1.3B-Diffusers \\
        --train_prompts prompts.txt --validation_resolution 832x480 --resolution_type pixel_area --resolution 632 \\
        --lora_rank 128 --gradient_checkpointing --mixed_precision bf16

To fork it for another model, replace the block "The model": nothing else knows the model. tests/forks/ has an example.
"""

import contextlib
import functools
import itertools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from pathlib import Path

import torch
from accelerate import Accelerator
from tqdm import tqdm

from common.cache import TensorStore, identity, text_key
from common.checkpoint import StopSignal, resume
from common.data.buckets import check_frame_count, latent_frames, pixel_frames, target_size, targets_in_shapes
from common.data.clips import clip_size, open_caption_readers, open_clip_readers
from common.data.datasets import Data, open_data, plan_buckets
from common.data.encoder import SampleEncoder, open_encoder
from common.data.stream import open_batches
from common.draws import (
    Draws,
    draw_exits,
    sample_generator,
    score_range,
    score_timesteps,
    tied_noise,
    to_device,
    with_dropped,
)
from common.export import push_to_hub
from common.flags import (
    Flags,
    Switch,
    add_bucket_flags,
    add_clip_flags,
    add_shared_flags,
    bucket_rules,
    check_ranges,
    check_shared_flags,
    filled,
    hide_flags,
    make_parser,
    parse_with_config,
    refuse_flags,
    shared_defaults,
)
from common.losses import consistency_loss, dmd_gradient, dmd_loss, fake_score_loss
from common.networks import (
    active_adapter,
    adapter_layers,
    adapter_weights,
    checkpoint_activations,
    precision_name,
    quantize,
    speed_up,
    unprompted,
    weights_copy,
    weights_exchanged,
    with_uncond,
)
from common.optim import (
    average_gradients,
    betas_and_decay,
    clip_gradients,
    gradient_norm,
    make_optimizer,
    make_schedule,
    optimizer_name,
    update_ema,
)
from common.pictures import share_prompts, to_bytes, validation_prompts
from common.planning.meter import HOST, Meter
from common.planning.phases import Phase, largest_samples, planned, run_phases, weights_of
from common.run import (
    Saver,
    check_finite,
    end_run,
    machine_defaults,
    open_repository,
    start_run,
    teacher_missing,
)
from common.solvers import (
    TIMESTEPS,
    block_lengths,
    denoising_steps,
    expand_to,
    flow_grid,
    flow_trajectory,
    renoise,
    roll_out,
)
from common.tracking import GAP_RANGES, Means, Tracking, gap_name, webhook_errors
from common.wan.parallel import check_processes, gathered, load_split, wants_fsdp
from common.wan.report import ClipComparison, write_clips_report

FLOW_STEPS = 20  # even ones of the teacher's trajectories, besides the student's own timesteps
LORA_RANK = 128  # the default of rank and alpha
RECIPE_BATCH = 64  # samples of an optimizer step in the papers' recipes
NO_JOB = (  # flags that scripts share and this one has no use for
    "eval_steps", "eval_samples", "evaluation_type", "evaluation_clip_model", "validation_preview",
    "validation_preview_steps", "validation_preview_model", "text_encoder_2_precision",
)  # fmt: skip
# Networks that a method trains, and flags that it alone has a use for
METHODS = {"dmd": ("student", "fake_score"), "lcm": ("student",)}
PIXELS = ("random_flip", "center_crop", "interpolation_type", "cache_dir_vae", "vae_cache_disable")  # of decoded clips
OWN_FLAGS = {
    "dmd": ("generator_update_interval", "last_step_only", "fake_score_guidance_scale", "fake_score_lr",
            "fake_score_weight_decay", "fake_score_betas", "fake_score_eps", "fake_score_grad_clip", "timestep_shift",
            "min_timestep_ratio", "max_timestep_ratio", "ts_schedule", "ts_schedule_max", "min_score_timestep",
            "num_frame_per_block"),
    "lcm": ("num_ddim_timesteps", "loss_type", "huber_c", *PIXELS),  # DMD decodes no clip
}  # fmt: skip
# Tokens of a batch from which on two forwards are as fast as one of both prompts, and take half the memory: 8192 rows by
# 1536 channels are 768 tiles of 128x128, six for each of an H100's 132 processors
MANY_TOKENS = 8192
LOG_EVERY = 10  # optimizer steps between logs; training itself waits for the device nowhere else
MEANS = ["dmd_loss", "fake_score_loss", "ode_loss", "lcm_loss", "student_grad_norm", "fake_score_grad_norm"]
MEANS += map(gap_name, GAP_RANGES)


@dataclass(frozen=True)
class Method:
    """Values that follow from the method's flags."""

    steps: list[float]  # the student's timesteps, falling from 1000
    teacher_guidance: float  # guidance scale of the teacher's validation clips
    validation_frames: int  # pixel frames of a validation clip, as blocks divide them


def parse_args(argv=None):
    """Parses flags and opens the data; returns both, the method, and notes to print.

    Every rule between flags is checked before a model loads. Constants and functions of the model, as FAMILY, stand in
    the block "The model" below.
    """
    parser = make_parser(__doc__)
    # fmt: off
    add = parser.add_argument_group("models").add_argument
    add("--pretrained_teacher_model", type=str, help="folder or hub name of the pipeline; default: the toy teacher, by its own recipe")
    add("--teacher_revision", type=str, help="the teacher's branch, tag or commit on the hub")
    add("--teacher_variant", type=str, metavar="NAME", help="which of its files to load, as fp16 for diffusion_pytorch_model.fp16.safetensors; default: those without a name")
    add("--resolution", type=float, default=480, help="of training, in the unit of --resolution_type")
    add("--context_parallel_degree", type=int, default=1, metavar="N", help="N processes share each clip's tokens; the number of processes must be a multiple of it")
    add("--train_prompts", type=str, help="text file, a prompt a line: trains with no video at all, on clips of --num_frames in the shapes of --validation_resolution")

    add = parser.add_argument_group("student").add_argument
    add("--model_type", type=str, choices=["full", "lora"], help="lora: student and fake score are adapters on the teacher; full: copies of it, fp32; default: lora, but full for the toy teacher where no --lora_* flag is given")
    add("--lora_rank", type=int, help="of the student's and of the fake score's adapter; default 128")
    add("--lora_alpha", type=int, help="default 128; the adapters are scaled by alpha / rank")
    add("--lora_dropout", type=float, help="default 0")
    add("--lora_target_modules", type=str, help=f"names or suffixes of modules, with commas; default {LORA_TARGETS}")
    add("--lora_type", type=str, choices=["standard"], help="standard: PEFT's, the only kind")
    add("--use_ema", action=Switch, help="keep a moving average of the student, which is then what is exported")
    add("--ema_decay", type=float, default=0.99, help="of the average, per update of the student")
    add("--ema_update_interval", type=int, default=1, help="updates of the student between those of the average, whose decay makes up for it")
    add("--ema_validation", type=str, default="ema_only", choices=["none", "ema_only", "comparison"], help="whose clips validation generates: the student's, the average's, or both")
    add("--ema_device", type=str, default="accelerator", choices=["accelerator", "cpu"], help="where the average is kept")
    add("--export_pipeline", action=Switch, help="full: write all of the pipeline, so that from_pretrained(OUTPUT_DIR) loads it; default: transformer and scheduler alone")
    add("--export_formats", type=str, default="diffusers", choices=["diffusers", "diffusers,comfyui"], metavar="FORMATS", help="diffusers, or diffusers,comfyui; of a LoRA: comfyui writes a second file, in the names of Wan's own code")

    add = parser.add_argument_group("method").add_argument
    add("--distillation_method", type=str, choices=list(METHODS), help="dmd: distribution matching; lcm: latent consistency, with no fake score; default dmd")
    add("--num_ddim_timesteps", type=int, default=50, help="lcm: N, even steps of the teacher's flow under its shift; the student's timesteps are added to them")
    add("--loss_type", type=str, default="l2", choices=["l2", "huber"], help="lcm: mean of diff^2, or of sqrt(diff^2 + c^2) - c")
    add("--huber_c", type=float, default=0.001, help="lcm: c of sqrt(diff^2 + c^2) - c; smaller is nearer to |diff|")

    add = parser.add_argument_group("distribution matching distillation").add_argument
    add("--dmd_denoising_steps", type=str, default="1000,757,522", metavar="STEPS", help="the student's timesteps, falling from 1000; or their number, evenly spaced and shifted by --flow_schedule_shift: 4 at shift 5 is 1000,937.5,833.3,625")
    add("--flow_schedule_shift", type=float, help="shift of the teacher's sampler in validation, of --causal_init_steps' trajectories, and of counted steps; default: the teacher's own")
    add("--generator_update_interval", type=int, default=1, help="the student is updated every so many steps, the fake score at each")
    add("--last_step_only", action=Switch, help="every rollout goes to the student's last step; default: the exit step is drawn")
    add("--real_score_guidance_scale", type=float, default=3.0, metavar="S", help="of the teacher: uncond + S * (cond - uncond)")
    add("--fake_score_guidance_scale", type=float, default=0.0, metavar="S", help="of the fake score, likewise; 0 for none")
    add("--fake_score_lr", type=float, default=1e-5, help="constant; that of the student is --learning_rate")
    add("--fake_score_weight_decay", type=float, default=0.01, help="of its AdamW")
    add("--fake_score_betas", type=float, nargs=2, default=[0.9, 0.999], metavar="BETA", help="of its AdamW")
    add("--fake_score_eps", type=float, default=1e-8, help="of its AdamW")
    add("--fake_score_grad_clip", type=float, default=1.0, help="as --max_grad_norm, for the fake score")
    add("--timestep_shift", type=float, default=1.0, help="of the timesteps at which rollouts are judged, towards noise; 1 is uniform; drawn between the bounds below, then clamped by the ratios")
    add("--min_timestep_ratio", type=float, default=0.02, help="these timesteps are at least 1000 times this")
    add("--max_timestep_ratio", type=float, default=0.98, help="and at most 1000 times this")
    add("--ts_schedule", action=Switch, default=True, help="lower bound of these timesteps: the student's step after the rollout's exit, of several blocks the lowest; 0 after its last")
    add("--ts_schedule_max", action=Switch, help="upper bound of these timesteps: the rollout's exit step, of several blocks the highest")
    add("--min_score_timestep", type=float, default=0.0, help="the lower bound without --ts_schedule")
    add("--negative_prompt", type=str, help="what guidance leads away from; default: --validation_negative_prompt, or the empty prompt")

    text = f"Frames are latent ones: one for the first frame, and one for each {FRAMES_PER_LATENT} that follow."
    add = parser.add_argument_group("self-forcing", text).add_argument
    add("--num_frame_per_block", type=int, default=0, help="frames of a block; 0: all in one, a bidirectional student")
    add("--independent_first_frame", action=Switch, help="the first block is one frame")
    add("--same_step_across_blocks", action=Switch, help="one exit step for all blocks of a rollout; default: one each")
    add("--num_training_frames", type=int, default=21, help="longer rollouts train on their last ones; a bidirectional student rolls out no more")
    add("--context_noise", type=float, default=0.0, help="timestep at which clean blocks become the context of later ones")
    add("--causal_init_steps", type=int, default=0, help="the first of --max_train_steps regress the student to the teacher's own trajectories")
    add("--causal_init_lr", type=float, help="their rate, by a schedule of their own; default: --learning_rate")
    add("--causal_init_guidance", type=float, metavar="S", help="of the teacher on these trajectories; default: --real_score_guidance_scale")
    add("--causal_init_trajectories", type=int, default=0, metavar="N", help="of these trajectories each prompt has N, each from a noise of its own; they are kept on disk and used again, in later epochs and other runs too; 0: a new one at each visit, and none is kept")
    add("--cache_dir_trajectories", type=str, help="folder of --causal_init_trajectories, which runs may share; default: OUTPUT_DIR/cache/trajectories")

    add = parser.add_argument_group("validation of clips").add_argument
    add("--validation_num_video_frames", type=int, help="default: --num_frames")
    # fmt: on
    add_shared_flags(parser)
    add_bucket_flags(parser)
    add_clip_flags(parser)
    parser.set_defaults(
        output_dir="dmd-wan-distilled", train_batch_size=1, learning_rate=2e-5, vae_encode_batch_size=1,
        crop_aspect="preserve", validation_num_inference_steps=None, report_steps=None,
        tracker_project_name="text2video-distill",
    )  # fmt: skip
    add_model_flags(parser)
    hide_flags(parser, *NO_JOB, "validation_num_inference_steps")

    args, notes = parse_with_config(parser, argv, family=FAMILY, method="dmd", recipe=toy_recipe)
    notes += check_shared_flags(parser, args)
    args, dmd_notes = check_dmd_flags(parser, args)
    args, frame_notes = fit_training_frames(args)
    check_model_flags(parser, args)
    rules, size_notes = bucket_rules(parser, args)
    data, data_notes = open_data(parser, args, rules, FRAMES_PER_LATENT)
    chosen, machine_notes = machine_defaults(args, data, decodes=trains_on_clips(args, data))
    args = filled(args, validation_resolution=[target_size(1, 1, rules)], **chosen, **shared_defaults(args))
    for height, width in args.validation_resolution:
        if height % SIDE_FACTOR or width % SIDE_FACTOR:
            parser.error(f"--validation_resolution {width}x{height}: must be multiples of {SIDE_FACTOR}")
        if height // SIDE_FACTOR * (width // SIDE_FACTOR) % args.context_parallel_degree:
            parser.error(
                f"--validation_resolution {width}x{height}: --context_parallel_degree must divide a frame's tokens"
            )
    data, frames, block_notes = check_blocks(parser, args, data)
    if all(dataset.sizes for dataset in data.datasets):
        names = ("frame_interval", *(PIXELS if args.distillation_method == "lcm" else ()))
        notes += refuse_flags(parser, args, names, "is of clips, and there are prompts alone", "with prompts alone")
    method, method_notes = method_of(parser, args, frames)
    args = filled(args, report_steps=[len(method.steps)])
    notes = [
        *dmd_notes,
        *frame_notes,
        *notes_on_blocks(args),
        *method_notes,
        *notes,
        *size_notes,
        *data_notes,
        *machine_notes,
        *block_notes,
    ]
    return args, data, method, notes


def wanted_student(args) -> str:
    """The student that the other flags imply: full for the toy, which is small, unless a flag of LoRA is given."""
    given = args.lora_rank, args.lora_alpha, args.lora_dropout, args.lora_target_modules, args.lora_type
    as_adapters = args.pretrained_teacher_model is not None or any(value is not None for value in given)
    return args.model_type or ("lora" if as_adapters else "full")


def check_dmd_flags(parser, args):
    """Checks every rule of the student's and the method's flags. Returns args with their defaults, and notes."""
    toy, notes = args.pretrained_teacher_model is None, []
    args = filled(args, model_type=wanted_student(args), distillation_method="dmd")
    if toy:
        notes.append(f"No --pretrained_teacher_model: distilling the toy teacher by its recipe ({args.model_type}).")
    lora = {"lora_rank": LORA_RANK, "lora_alpha": LORA_RANK, "lora_dropout": 0.0, "lora_target_modules": LORA_TARGETS}
    if args.model_type == "lora":
        args = filled(args, **lora)
    elif given := [name for name in lora if getattr(args, name) is not None]:
        parser.error(f"--model_type full: takes no --{given[0]}")
    if args.model_type == "lora" and args.export_pipeline:
        parser.error("--export_pipeline: is for a full student; a LoRA loads into its teacher's pipeline")
    if args.model_type == "full" and "comfyui" in args.export_formats:
        parser.error("--export_formats comfyui: is a layout of LoRA files")
    notes += refuse_flags(parser, args, NO_JOB, "has no job in this script", "by this script")
    chosen = args.distillation_method
    for method, names in OWN_FLAGS.items():
        if method != chosen:
            error = f"belongs to --distillation_method {method}, and this is {chosen}"
            notes += refuse_flags(parser, args, names, error, f"by --distillation_method {chosen}")
    if chosen == "lcm":  # whose student has no blocks, also where a config is meant for both methods
        args = Flags(**vars(args) | {"num_frame_per_block": 0})
    if args.context_parallel_degree > 1 and args.attention_mechanism != "diffusers":
        parser.error(
            f"--context_parallel_degree and --attention_mechanism {args.attention_mechanism}: one or the other"
        )
    check_ranges(
        parser, args,
        at_least_one=("lora_rank", "lora_alpha", "num_training_frames", "context_parallel_degree",
                      "generator_update_interval", "ema_update_interval", "num_ddim_timesteps"),
        not_negative=("num_frame_per_block", "fake_score_guidance_scale", "fake_score_weight_decay",
                      "causal_init_steps", "causal_init_trajectories"),
        positive=("fake_score_lr", "fake_score_eps", "fake_score_grad_clip", "timestep_shift", "flow_schedule_shift",
                  "causal_init_lr", "huber_c"),
        below_one=("lora_dropout", "ema_decay"), share=("min_timestep_ratio", "max_timestep_ratio"),
    )  # fmt: skip
    for name in ("causal_init_lr", "causal_init_guidance"):
        if getattr(args, name) is not None and not args.causal_init_steps and not toy:  # the toy's recipe has both
            parser.error(f"--{name}: belongs to --causal_init_steps, and there are none")
    if args.causal_init_trajectories and not args.causal_init_steps:
        parser.error("--causal_init_trajectories: belongs to --causal_init_steps, and there are none")
    if args.cache_dir_trajectories and not args.causal_init_trajectories:
        parser.error("--cache_dir_trajectories: belongs to --causal_init_trajectories, and there are none")
    args = filled(
        args, causal_init_lr=args.learning_rate, causal_init_guidance=args.real_score_guidance_scale,
        negative_prompt=args.validation_negative_prompt or "",
    )  # fmt: skip
    for name in ("real_score_guidance_scale", "causal_init_guidance"):
        if not 1.0 <= getattr(args, name) < math.inf:
            parser.error(f"--{name} {getattr(args, name):g}: must be at least 1, which is no guidance")
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
    return args, notes


def notes_on_blocks(args) -> list[str]:
    """What the user should know of --num_frame_per_block."""
    if args.num_frame_per_block:
        if args.causal_init_steps:
            return []
        return [
            "warning: self-forcing without --causal_init_steps: the student starts as a teacher that has never seen a "
            "clip in blocks, and distribution matching alone may not make it one"
        ]
    names = ("independent_first_frame", "same_step_across_blocks", "context_noise")
    return [f"--{name}: acts on blocks, of --num_frame_per_block, alone" for name in names if getattr(args, name)]


def method_of(parser, args, frames: int) -> tuple[Method, list[str]]:
    """What the method's flags come to, and notes; `frames` are those of a validation clip."""
    notes, given = [], args.dmd_denoising_steps
    try:
        steps = denoising_steps(given, args.flow_schedule_shift or 1.0)
    except ValueError as error:
        parser.error(f"--dmd_denoising_steps {given}: {error}")
    if "," not in given and len(steps) > 1 and args.flow_schedule_shift is None:
        parser.error(f"--dmd_denoising_steps {given}: a number of steps needs --flow_schedule_shift")
    if args.validation_num_inference_steps not in (None, [len(steps)]):
        wanted = ",".join(map(str, args.validation_num_inference_steps))
        notes.append(f"--validation_num_inference_steps {wanted}: the student has {len(steps)}")
    guidance = args.validation_guidance
    if guidance in (None, 1.0):  # configs have 1.0 for the student, which has no guidance
        guidance = args.real_score_guidance_scale
    else:
        notes.append(f"--validation_guidance {guidance:g}: of the teacher; a student takes none")
    return Method(steps, guidance, frames), notes


def trains_on_clips(args, data: Data) -> bool:
    """Whether training begins from latents of clips: LCM's does, unless it has prompts alone; DMD reads captions."""
    return args.distillation_method == "lcm" and not any(dataset.sizes for dataset in data.datasets)


# ---- Blocks of a rollout ----


def blocks_of(args, frames: int) -> list[int]:
    """Latent frames of each block of a clip; a bidirectional student makes no more than --num_training_frames."""
    frames = frames if args.num_frame_per_block else min(frames, args.num_training_frames)
    return block_lengths(frames, args.num_frame_per_block, args.independent_first_frame)


def trained_from(args, frames: int) -> int:
    """First latent frame that is trained, of so many."""
    return max(0, frames - args.num_training_frames)


def whole_blocks(args, latents: int) -> bool:
    """Whether so many latent frames are whole blocks."""
    try:
        return bool(block_lengths(latents, args.num_frame_per_block, args.independent_first_frame))
    except ValueError:
        return False


def fit_training_frames(args) -> tuple[Flags, list[str]]:
    """Args with --num_training_frames that are whole blocks, no more than were given, and notes."""
    given, per_block, first = args.num_training_frames, args.num_frame_per_block, args.independent_first_frame
    over = given % per_block if per_block else 0
    if over == 0 or first and over == 1 or given < per_block:  # the last blocks of a rollout, or all of it
        return args, []
    note = f"--num_training_frames {given}: is not whole blocks of {per_block}; {given - over} is taken"
    return Flags(**vars(args) | {"num_training_frames": given - over}), [note]


def fit_to_blocks(name: str, frames: int, args) -> tuple[int, list[str]]:
    """Pixel frames of a clip: as they are where they are whole blocks, else cut to --num_training_frames; and notes."""
    check_frame_count(name, frames, FRAMES_PER_LATENT)
    latents, trained = latent_frames(frames, FRAMES_PER_LATENT), args.num_training_frames
    if whole_blocks(args, latents):
        return frames, []
    if trained < latents and whole_blocks(args, trained):
        cut = pixel_frames(trained, FRAMES_PER_LATENT)
        return cut, [
            f"{name} {frames}: {latents} latent frames are no whole blocks of {args.num_frame_per_block}; "
            f"cut to --num_training_frames {trained}, {cut} frames"
        ]
    fewer = [count for count in range(latents, 0, -1) if whole_blocks(args, count)][:1]
    more = next(count for count in itertools.count(latents) if whole_blocks(args, count))
    near = " or ".join(str(pixel_frames(count, FRAMES_PER_LATENT)) for count in (*fewer, more))
    raise ValueError(
        f"{name} {frames}: {latents} latent frames are no whole blocks of --num_frame_per_block "
        f"{args.num_frame_per_block}{' after the first frame' * args.independent_first_frame}; {near} frames are"
    )


def check_blocks(parser, args, data: Data) -> tuple[Data, int, list[str]]:
    """Data and validation with as many frames as blocks divide, and notes."""
    notes, datasets = [], []
    try:
        for dataset in data.datasets:
            name, most = f"{dataset.id}: num_frames", pixel_frames(args.num_training_frames, FRAMES_PER_LATENT)
            frames, said = fit_to_blocks(name, dataset.num_frames, args)
            if args.distillation_method == "lcm" and frames > most:  # nothing of a clip is encoded in vain
                said = [f"{name} {frames}: cut to --num_training_frames {args.num_training_frames}, {most} frames"]
                frames = most
            datasets.append(replace(dataset, num_frames=frames))
            notes += said
        shown = args.validation_num_video_frames or args.num_frames
        shown, said = fit_to_blocks("--validation_num_video_frames", shown, args)
        notes += said
    except ValueError as error:
        parser.error(str(error))
    for dataset in datasets:
        blocks = blocks_of(args, latent_frames(dataset.num_frames, FRAMES_PER_LATENT))
        starts, trained = list(accumulate(blocks, initial=0))[:-1], args.num_training_frames
        if trained_from(args, sum(blocks)) not in starts:
            near = sorted((sum(blocks) - start for start in starts), key=lambda count: abs(count - trained))[:2]
            parser.error(
                f"--num_training_frames {trained}: must be the last whole blocks of a rollout of {sum(blocks)} latent "
                f"frames ({', '.join(map(str, blocks))}), as {' or '.join(map(str, near))}"
            )
    return replace(data, datasets=tuple(datasets)), shown, notes


# =====================================================================================================================
# The model: a fork for another one replaces this block, its imports among it, and nothing else
#
# What the rest of the script asks for:
#   constants  FAMILY, LORA_TARGETS, BLOCKS, FRAMES_PER_LATENT, FRAMES_PER_SECOND, SIDE_FACTOR
#   flags      add_model_flags, check_model_flags, toy_recipe, teacher_of
#   networks   load_scheduler, schedule_shift, load_transformer, own_attention, teacher_identity, add_adapters,
#              make_causal, share_tokens
#   data       encoders, latent_shape, vae_factor, tokens_of_frame
#   use        predict, generate_by_teacher, decode, export
# make_causal's result has calls(velocity) and caches_before(velocity, clip, t, blocks), or it refuses. Transformers
# need enable_gradient_checkpointing(). common/wan/parallel.py and report.py, in spite of their folder, know no model.
# =====================================================================================================================

import json

from diffusers import AutoencoderKLWan, FlowMatchLCMScheduler, WanPipeline, WanTransformer3DModel
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from diffusers.schedulers import SchedulerMixin
from diffusers.utils import is_ftfy_available
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoTokenizer, UMT5EncoderModel

from common.cache import weights_identity
from common.data.datasets import SOURCES
from common.data.encoder import Encoders
from common.export import save_comfy_lora
from common.networks import load_network
from common.solvers import stock_scheduler
from common.wan.causal import BlockCausal, own_attention
from common.wan.parallel import share_tokens

FAMILY = "wan"  # model_family of config files
PIPELINE = WanPipeline
LORA_TARGETS = "to_q,to_k,to_v,to_out.0,ffn.net.0.proj,ffn.net.2"
BLOCKS = ("WanTransformerBlock",)  # layers that are compiled one by one, and gathered one by one where split
FRAMES_PER_LATENT = 4  # of a clip, for each latent frame after the first
FRAMES_PER_SECOND = 16
TOKENS_ENCODED = 4096  # of prompts, padding among them, that go through the text encoder at a time
SIDE_FACTOR = 16  # of a clip's sides: the VAE's 8, and the transformer's patches of 2
TOY = Path(__file__).parent / "tests" / "toy"


def add_model_flags(parser):
    # fmt: off
    add = parser.add_argument_group("text and sizes of Wan").add_argument
    add("--pretrained_t5_model_name_or_path", type=str, help="where text encoder and tokenizer are; default: the teacher's")
    add("--max_sequence_length", type=int, default=512, metavar="N", help="rows of text that the transformer attends to: prompts are cut, or padded with zeros, and not masked; WanPipeline's argument")
    # fmt: on
    parser.set_defaults(bucket_alignment=SIDE_FACTOR)


def check_model_flags(parser, args):
    check_ranges(parser, args, at_least_one=("max_sequence_length",))
    if args.mixed_precision == "fp16":
        parser.error("--mixed_precision fp16: Wan's activations overflow it; bf16 or no")


def toy_recipe(args) -> dict:
    """The toy teacher's settings by flag, in place of the flags' defaults."""
    recipe = json.loads((TOY / "wan_recipe.json").read_text())
    data = {} if any(getattr(args, name) for name in SOURCES) else {"train_prompts": str(TOY / "wan_prompts.txt")}
    attention = "causal" if args.num_frame_per_block else "bidirectional"
    recipe |= recipe["lcm"] if args.distillation_method == "lcm" else {}
    return data | recipe["shared"] | recipe[wanted_student(args)] | recipe[attention]


def teacher_of(args) -> str:
    return args.pretrained_teacher_model or str(TOY / "wan")


def hub_options(args) -> dict:
    return {"revision": args.teacher_revision, "cache_dir": args.cache_dir}


def weights_options(args) -> dict:
    return hub_options(args) | {"variant": args.teacher_variant}


def load_scheduler(args) -> SchedulerMixin:
    """The teacher's own sampler, of whatever kind."""
    parts = dict.fromkeys(("transformer", "vae", "text_encoder", "tokenizer"))
    scheduler = PIPELINE.from_pretrained(teacher_of(args), **parts, **hub_options(args)).scheduler
    if args.flow_schedule_shift is not None:
        name = "flow_shift" if "flow_shift" in scheduler.config else "shift"
        scheduler = type(scheduler).from_config(scheduler.config, **{name: args.flow_schedule_shift})
    return scheduler


def schedule_shift(scheduler) -> float:
    return scheduler.config.get("flow_shift", scheduler.config.get("shift", 1.0))


def load_transformer(args, dtype: torch.dtype) -> WanTransformer3DModel:
    if dtype == torch.float16:
        raise SystemExit("mixed_precision fp16 of accelerate's config: Wan's activations overflow it; bf16 or no")
    return load_network(WanTransformer3DModel, teacher_of(args), "transformer", dtype, **weights_options(args))


def teacher_identity(args) -> str:
    """A name of the teacher's weights, for what is kept of its outputs."""
    return weights_identity(teacher_of(args), "transformer", args.teacher_revision, args.teacher_variant)


def add_adapters(args, transformer: WanTransformer3DModel, names: tuple[str, ...]) -> WanTransformer3DModel:
    """The teacher itself, with fp32 adapters of these names that start at zero."""
    modules = [name.strip() for name in args.lora_target_modules.split(",")]
    for name in names:
        config = LoraConfig(
            r=args.lora_rank, lora_alpha=args.lora_alpha, lora_dropout=args.lora_dropout, target_modules=modules
        )
        transformer.add_adapter(config, adapter_name=name)
    for name, p in transformer.named_parameters():
        if "lora_" in name:
            p.data = p.data.float()
            p.requires_grad_(True)
    return transformer.eval()  # acting() switches an adapter's dropout on where there is a gradient


def make_causal(transformer: WanTransformer3DModel) -> BlockCausal:
    """Calls of the transformer as a causal one, block by block, for --num_frame_per_block."""
    return BlockCausal(transformer)


def text_source(args) -> dict:
    """Where text encoder and tokenizer are, as from_pretrained takes it."""
    if args.pretrained_t5_model_name_or_path:
        return {"model": args.pretrained_t5_model_name_or_path, "revision": None, "variant": None}
    return {"model": teacher_of(args), "revision": args.teacher_revision, "variant": args.teacher_variant}


def load_vae(args, device, dtype: torch.dtype) -> AutoencoderKLWan:
    return load_network(AutoencoderKLWan, teacher_of(args), "vae", dtype, **weights_options(args)).to(device)


def load_text_encoder(args, device, dtype: torch.dtype):
    source = text_source(args)
    name, options = source["model"], {"revision": source["revision"], "cache_dir": args.cache_dir}
    tokenizer = AutoTokenizer.from_pretrained(name, subfolder="tokenizer", **options)
    encoder = load_network(UMT5EncoderModel, name, "text_encoder", dtype, variant=source["variant"], **options)
    quantize(encoder, args.text_encoder_1_precision, "cpu" if args.quantize_via == "cpu" else device)
    return tokenizer, encoder.to(device)


def encoders(args, device, dtype: torch.dtype) -> Encoders:
    """The functions that encode clips and prompts, and the identities that name their caches."""
    source, vae_dtype = text_source(args), torch.float32
    return Encoders(
        load_vae=lambda: load_vae(args, device, vae_dtype),
        encode_pixels=encode_pixels,
        load_text=lambda: load_text_encoder(args, device, dtype),
        encode_prompts=functools.partial(encode_prompts, length=args.max_sequence_length),
        latents_identity=lambda: {
            "vae": weights_identity(teacher_of(args), "vae", args.teacher_revision, args.teacher_variant),
            "dtype": vae_dtype,
        },
        text_identity=lambda: {
            "text": [weights_identity(subfolder=f, **source) for f in ("text_encoder", "tokenizer")],
            "dtype": dtype, "precision": precision_name(args.text_encoder_1_precision),
            "length": args.max_sequence_length, "ftfy": is_ftfy_available(),
        },
        text_length=args.max_sequence_length,
    )  # fmt: skip


def encode_prompts(text_encoder, prompts: list[str], length: int) -> dict[str, list[torch.Tensor]]:
    """States of each prompt's own tokens, [L, C] with L up to `length`; they are padded when they are used.

    Prompts of similar length go together, so that little is padded. The padding is masked: of what is beside it a
    prompt's embedding keeps no more than a rounding error.
    """
    tokenizer, encoder = text_encoder
    tokens = [tokenizer(prompt_clean(prompt), max_length=length, truncation=True).input_ids for prompt in prompts]
    rows, waiting = {}, sorted(range(len(prompts)), key=lambda i: len(tokens[i]))
    while waiting:
        count = max(1, TOKENS_ENCODED // len(tokens[waiting[-1]]))  # the longest first
        chunk, waiting = waiting[-count:], waiting[:-count]
        ids = pad_sequence([torch.tensor(tokens[i]) for i in chunk], batch_first=True)  # [B, L]
        mask = torch.arange(ids.shape[1]) < torch.tensor([len(tokens[i]) for i in chunk])[:, None]
        ids, mask = (to_device(each, encoder.device) for each in (ids, mask.long()))
        states = encoder(ids, attention_mask=mask).last_hidden_state
        rows |= {i: states[row, : len(tokens[i])] for row, i in enumerate(chunk)}
    return {"prompt_embeds": [rows[i] for i in range(len(prompts))]}


def latent_statistics(vae) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of each channel of the VAE's latents, fp32, [1, C, 1, 1, 1]."""
    mean, std = (torch.tensor(getattr(vae.config, name)) for name in ("latents_mean", "latents_std"))
    return tuple(to_device(values.view(1, -1, 1, 1, 1), vae.device) for values in (mean, std))


def encode_pixels(vae, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
    """Normalised latents, the posterior's mode as Wan itself takes. [B, 3, F, H, W] -> [B, C, (F - 1) / 4 + 1, h, w]

    For latent consistency; DMD reads captions alone.
    """
    mean, std = latent_statistics(vae)
    latents = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist.mode()
    return {"latents": ((latents.float() - mean) / std).to(vae.dtype)}


@torch.no_grad()
def decode(vae, latents: torch.Tensor) -> list:
    """[B, C, f, h, w] -> B times [F, H, W, 3] in [0, 1]."""
    mean, std = latent_statistics(vae)
    pixels = vae.decode((latents.float() * std + mean).to(vae.dtype)).sample.float()  # [B, 3, F, H, W] in [-1, 1]
    return list((pixels / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 4, 1).cpu().numpy())


def predict(transformer, x, t, cond: dict[str, torch.Tensor]):
    """The flow velocity eps - x0 at x_t. [B, C, f, h, w]; t is [B] and stays fp32, as bf16 cannot hold 757."""
    embeds = cond["prompt_embeds"]
    return transformer(hidden_states=x.to(embeds.dtype), timestep=t, encoder_hidden_states=embeds).sample


@functools.cache
def load_vae_config(name: str, **options) -> dict:
    return AutoencoderKLWan.load_config(name, subfolder="vae", **options)


def vae_factor(args) -> int:
    """Pixels of a clip's side for each of its latents'."""
    return load_vae_config(teacher_of(args), **hub_options(args))["scale_factor_spatial"]


def latent_shape(args, transformer, frames: int, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """(C, f, h, w) of a clip's latents: of this many latent frames, and of this height and width in pixels."""
    factor = vae_factor(args)
    return transformer.config.in_channels, frames, size[0] // factor, size[1] // factor


def tokens_of_frame(transformer, height: int, width: int) -> int:
    """Tokens of a latent frame of this height and width."""
    _, rows, columns = transformer.config.patch_size
    return (height // rows) * (width // columns)


@torch.no_grad()
def generate_by_teacher(args, method, transformer, vae, scheduler, cond, negative, steps: int, rngs: list, size):
    """Latents of clips by the stock pipeline, one for each random generator."""
    pipeline = PIPELINE(None, None, vae, scheduler, transformer)
    pipeline.set_progress_bar_config(disable=True)
    embeds = cond["prompt_embeds"]
    return pipeline(
        prompt_embeds=embeds, negative_prompt_embeds=negative["prompt_embeds"].expand_as(embeds),
        height=size[0], width=size[1], num_frames=method.validation_frames, num_inference_steps=steps,
        guidance_scale=method.teacher_guidance, output_type="latent", generator=rngs,
    ).frames  # fmt: skip


def student_scheduler(steps: list[float]) -> tuple[FlowMatchLCMScheduler, str]:
    """A scheduler that makes the stock pipeline take these steps, and a line of code that some lists of steps need."""
    if scheduler := stock_scheduler(steps):
        return scheduler, ""
    line = f"scheduler.set_timesteps = functools.partial(scheduler.set_timesteps, timesteps={steps})\n"
    return FlowMatchLCMScheduler(shift=1.0), line


def causal_usage(args, frames: int, channels: int, steps: list[float]) -> str:
    """Lines that make a clip block by block, with the common/ folder of this repository at hand."""
    blocks = block_lengths(frames, args.num_frame_per_block, args.independent_first_frame)
    height, width = args.validation_resolution[0]
    return (
        "# In a checkout of the repository that trained it:\n"
        "from common.solvers import roll_out\nfrom common.wan.causal import BlockCausal\n\n"
        f"steps, blocks = {steps}, {blocks}\n"
        f'text, _ = pipeline.encode_prompt("your prompt", max_sequence_length={args.max_sequence_length})\n'
        "predict, remember = BlockCausal(pipeline.transformer).calls(\n"
        "    lambda x, t: pipeline.transformer(x.to(text), torch.tensor([t], device=x.device), text).sample.float()\n"
        ")\n"
        f"shape = 1, {channels}, sum(blocks), {height} // pipeline.vae_scale_factor_spatial, "
        f"{width} // pipeline.vae_scale_factor_spatial\n"
        "noise = functools.cache(lambda k: torch.randn(shape, device=text.device))\n"
        "exits, clip = [len(steps) - 1] * len(blocks), []\n"
        "with torch.no_grad():\n"
        "    for latents in roll_out(\n"
        f"        predict, remember, noise, steps, blocks, exits, context_noise={args.context_noise}\n"
        "    ):\n"
        "        clip.append(latents)  # this block's frames are there before the next one's are begun\n"
        "    mean, std = (\n"
        "        torch.tensor(getattr(pipeline.vae.config, name), device=text.device).view(1, -1, 1, 1, 1)\n"
        '        for name in ("latents_mean", "latents_std")\n'
        "    )\n"
        "    pixels = pipeline.vae.decode((torch.cat(clip, 2) * std + mean).to(pipeline.vae.dtype)).sample\n"
        "video = pipeline.video_processor.postprocess_video(pixels)[0]\n"
    )


def export(args, method, folder: Path, transformer, dtype: torch.dtype) -> tuple[list[str], str]:
    """Writes the files that stock diffusers loads. Returns their names and the lines of code that load them.

    These name the precision `dtype`, since parts of a pipeline may be stored in several; the VAE is in fp32, as Wan has
    it. They generate what the run has shown, of its size and length.
    """
    scheduler, line = student_scheduler(method.steps)
    scheduler.save_pretrained(folder / "scheduler")
    base, source = teacher_of(args), text_source(args)["model"]
    dtypes = dtype if dtype == torch.float32 else f'{{"vae": torch.float32, "default": {dtype}}}'
    parts, after = ["scheduler=scheduler", f"dtype={dtypes}"], ""
    sampler = f'scheduler = FlowMatchLCMScheduler.from_pretrained("{folder}", subfolder="scheduler")\n{line}'
    load = ""
    if args.teacher_revision:
        parts.append(f'revision="{args.teacher_revision}"')
    if args.teacher_variant:
        parts.append(f'variant="{args.teacher_variant}"')
    if source != base:
        load += (
            f'text_encoder = UMT5EncoderModel.from_pretrained("{source}", subfolder="text_encoder", dtype={dtype})\n'
        )
        load += f'tokenizer = AutoTokenizer.from_pretrained("{source}", subfolder="tokenizer")\n'
        parts += ["text_encoder=text_encoder", "tokenizer=tokenizer"]
    if args.model_type == "lora":
        layers = get_peft_model_state_dict(transformer, adapter_name="student")
        adapter = transformer.peft_config["student"].to_dict()
        adapter = {key: sorted(value) if isinstance(value, set) else value for key, value in adapter.items()}
        PIPELINE.save_lora_weights(
            folder, transformer_lora_layers={name: value.contiguous() for name, value in layers.items()},
            transformer_lora_adapter_metadata=adapter,
        )  # fmt: skip
        files = ["pytorch_lora_weights.safetensors"]
        after = f'pipeline.load_lora_weights("{folder}", weight_name="{files[0]}")\n'
        if "comfyui" in args.export_formats:
            files.append("comfyui_lora.safetensors")
            save_comfy_lora(folder / files[-1], layers, args.lora_alpha)
    else:
        transformer.save_pretrained(folder / "transformer")
        files = ["transformer"]
        load += (
            f'transformer = WanTransformer3DModel.from_pretrained("{folder}", subfolder="transformer", dtype={dtype})\n'
        )
        parts.append("transformer=transformer")
        if args.export_pipeline:
            replaced = {"transformer": transformer, "scheduler": scheduler}
            if source != base:
                replaced["tokenizer"] = AutoTokenizer.from_pretrained(source, subfolder="tokenizer")
                replaced["text_encoder"] = UMT5EncoderModel.from_pretrained(source, subfolder="text_encoder")
            pipeline = PIPELINE.from_pretrained(base, **replaced, **weights_options(args))
            pipeline.save_pretrained(folder)
            files += ["model_index.json", *(name for name, part in pipeline.components.items() if part is not None)]
            load, base, parts = "", folder, ["scheduler=scheduler", f"dtype={dtypes}"]
    frames, (height, width) = method.validation_frames, args.validation_resolution[0]
    usage = (
        "import functools\n\nimport torch\n"
        "from diffusers import FlowMatchLCMScheduler, WanPipeline, WanTransformer3DModel\n"
        "from diffusers.utils import encode_video\nfrom transformers import AutoTokenizer, UMT5EncoderModel\n\n"
        f'{sampler}{load}pipeline = WanPipeline.from_pretrained("{base}", {", ".join(parts)})\n{after}'
        'pipeline.to("cuda" if torch.cuda.is_available() else "cpu")\n'
    )
    if args.num_frame_per_block:  # the pipeline would show it the whole clip at once
        latents = latent_frames(frames, FRAMES_PER_LATENT)
        usage += causal_usage(args, latents, transformer.config.in_channels, method.steps)
    else:
        usage += (
            f'video = pipeline(\n    "your prompt", num_frames={frames}, height={height}, width={width}, '
            f"num_inference_steps={len(method.steps)}, guidance_scale=1.0,\n"
            f"    max_sequence_length={args.max_sequence_length},\n).frames[0]\n"
        )
    usage += f'encode_video(video, fps={FRAMES_PER_SECOND}, output_path="clip.mp4")\n'
    return ["scheduler", *dict.fromkeys(files)], usage


# =====================================================================================================================
# Training
# =====================================================================================================================


@dataclass(frozen=True)
class Networks:
    """Teacher, student and DMD's fake score by role. With LoRA they are one transformer, whose adapters take turns."""

    by_role: dict[str, torch.nn.Module]
    causal: object | None  # calls the student block by block; None for a bidirectional one
    accelerator: Accelerator
    one_by_one: bool = False  # whether guidance has a forward for each of its two prompts

    @functools.cached_property
    def layers(self) -> list:
        """Layers that have adapters."""
        return adapter_layers(self.by_role["student"])

    def acting(self, role: str):
        """Inside, the adapter of the role acts, none for the teacher; of full networks nothing changes.

        backward() belongs inside too, since activation checkpointing runs the forward again in it.
        """
        return active_adapter(self.layers, role)

    def velocity(self, role: str, x, t, cond):
        """v of a role at x_t, [B, C, f, h, w]; t is a number or [B]."""
        t = t if torch.is_tensor(t) else torch.full((len(x),), t, dtype=torch.float32, device=x.device)
        with self.acting(role), self.accelerator.autocast():
            return predict(self.by_role[role], x, t, cond).float()

    def guided(self, role: str, x, t, cond, uncond, scale: float):
        """uncond + scale * (cond - uncond); a scale of 0 or 1 means cond alone."""
        if scale in (0.0, 1.0):
            return self.velocity(role, x, t, cond)
        if self.one_by_one:
            v_cond, v_uncond = (self.velocity(role, x, t, each) for each in (cond, unprompted(cond, uncond)))
            return v_uncond + scale * (v_cond - v_uncond)
        t = t.repeat(2) if torch.is_tensor(t) else t
        v_cond, v_uncond = self.velocity(role, torch.cat([x, x]), t, with_uncond(cond, uncond)).chunk(2)
        return v_uncond + scale * (v_cond - v_uncond)

    def student_calls(self, cond) -> tuple[Callable, Callable | None]:
        """The student as roll_out takes it: predict(x, t, start, cache) -> v and remember(x, t, start, cache) -> cache.

        x is a block whose first latent frame is `start`; the cache holds keys and values of the blocks before it.
        """
        v = functools.partial(self.velocity, "student", cond=cond)
        if self.causal is None:  # one block: nothing comes before or after it
            return (lambda x, t, start, cache: v(x, t)), None
        return self.causal.calls(v)  # its hooks tell the attention layers of start and cache while v runs


# ---- The algorithm, numbered as it runs; 5. and 6. are in the loop ----


def dmd_backward(args, method, networks, means, draws, cond, uncond, blocks, shape, exits, student_turn: bool):
    """Gradients of student and fake score from a batch of prompts.

    `blocks` are their lengths in latent frames, `shape` is (C, f, h, w) of a rollout, `exits` are places in the
    student's steps, one for each block.
    """
    # 2. Rollout of the student, with a gradient if it is its turn
    noise = draws.keyed_normal(*shape)  # noise(k) is that of the k-th of the student's steps, [B, C, f, h, w]
    first_trained = trained_from(args, sum(blocks))
    with torch.set_grad_enabled(student_turn):
        predict_block, remember = networks.student_calls(cond)
        clip = list(
            roll_out(predict_block, remember, noise, method.steps, blocks, exits, first_trained, args.context_noise)
        )
    x_g = torch.cat(clip, 2)[:, :, first_trained:]  # [B, C, f, h, w]
    judged = [at_exit for at_exit, end in zip(exits, accumulate(blocks), strict=True) if end > first_trained]
    low, high = score_range(judged, method.steps, args.ts_schedule, args.ts_schedule_max, args.min_score_timestep)

    def draw_t_eps():
        """Timesteps [B] at which the rollout is judged, on the CPU and on the device, and noise."""
        ratios = args.min_timestep_ratio, args.max_timestep_ratio
        t = score_timesteps(draws.uniform(), low, high, args.timestep_shift, *ratios)
        return t, to_device(t, x_g.device), draws.normal(*x_g.shape[1:])

    # 3. Student: down the gradient, x_g goes from the fake score's x0 to the teacher's
    if student_turn:
        t_cpu, t, eps = draw_t_eps()
        with torch.no_grad():
            x_t = renoise(x_g, t / TIMESTEPS, eps)
            v_real = networks.guided("teacher", x_t, t, cond, uncond, args.real_score_guidance_scale)
            v_fake = networks.guided("fake_score", x_t, t, cond, uncond, args.fake_score_guidance_scale)
            g, gap = dmd_gradient(v_real, v_fake, x_g, eps)  # gap [B] is mean|v_real - v_star|
        loss = dmd_loss(x_g, g)
        with networks.acting("student"):
            (loss / args.gradient_accumulation_steps).backward()
        means.add("dmd_loss", loss)
        means.add_gaps(gap, t_cpu)

    # 4. Fake score, on the same clips
    _, t, eps = draw_t_eps()
    x_g = x_g.detach()
    loss = fake_score_loss(networks.velocity("fake_score", renoise(x_g, t / TIMESTEPS, eps), t, cond), x_g, eps)
    with networks.acting("fake_score"):
        (loss / args.gradient_accumulation_steps).backward()
    means.add("fake_score_loss", loss)


class Trajectories:
    """The teacher's trajectories on disk, --causal_init_trajectories of them for each prompt.

    Their noise follows from the prompt and their number alone, so that later epochs, other seeds and other runs find
    them. They are in fp32, and of x_t hold the first block's frames, which are all that regression_backward asks for.
    """

    def __init__(self, args, method, networks: Networks, grid: list[float], embeddings: str, dtype, sharing):
        """`embeddings` names all that shapes them; `sharing` processes next to each other have the same samples."""
        accelerator = networks.accelerator
        name = identity(
            teacher=teacher_identity(args), base_precision=precision_name(args.base_model_precision),
            embeddings=embeddings, dtype=dtype,
            guidance=args.causal_init_guidance, negative_prompt=args.negative_prompt, grid=grid, steps=method.steps,
        )  # fmt: skip
        folder = Path(args.cache_dir_trajectories or Path(args.output_dir, "cache", "trajectories"), name)
        self.store = TensorStore(folder, records_per_file=1)  # at once there for other processes
        self.count, self.accelerator = args.causal_init_trajectories, accelerator
        self.writes = accelerator.process_index % sharing == 0
        self.together = wants_fsdp(accelerator) or sharing > 1
        accelerator.print(f"trajectories: {len(self.store.index)} in {folder}")

    def of(self, flow: Callable, draws: Draws, prompts: list[str], dropped: list[bool], shape, first: int):
        """What flow(noise) returns, from the disk where it has those of all samples; else they are written there.

        `prompts` have the noise even where they are `dropped` and the teacher gets the empty one.
        """
        numbers = (draws.uniform() * self.count).long().tolist()
        names = [f"trajectory {number} of {prompt}" for number, prompt in zip(numbers, prompts, strict=True)]
        keys = [text_key(f"{drop} {shape} {first} {name}") for drop, name in zip(dropped, names, strict=True)]
        if any(key not in self.store for key in keys):
            self.store.refresh()
        rows = [self.store.get(key) for key in keys]
        if self.all_have(None not in rows):
            x_t, x0 = (to_device(torch.stack([row[name] for row in rows]), draws.device) for name in ("x_t", "x0"))
        else:
            x_t, x0 = flow(Draws.of([sample_generator(0, name) for name in names], draws.device).normal(*shape))
            x_t, x0 = torch.stack(x_t, 1), x0.contiguous()  # laid out as they come from the disk
            for i, key in enumerate(keys):
                if self.writes and rows[i] is None:
                    self.store.put(key, {"x_t": x_t[i], "x0": x0[i]})
        return x_t.unbind(1), x0

    def all_have(self, found: bool) -> bool:
        """Whether all processes have found theirs, where a forward of the teacher takes all processes."""
        if not self.together:
            return found
        return self.accelerator.reduce(torch.tensor(float(found), device=self.accelerator.device), "mean").item() == 1.0


def regression_backward(
    args, method, networks, means, draws, cond, uncond, blocks, shape, grid, kept: Callable | None = None
):
    """Gradients of the student towards the teacher's own trajectories (CausVid, section 4.3, but for the noise).

    A trajectory leads the teacher, with guidance, from noise along `grid` to a clean clip x0. For each of the student's
    steps and each block the loss is that of its v against (x_t - x0) / sigma, the straight way to x0, where the block
    sees the clean blocks of x0 before it.

    With independent noise the first block's x0 would depend on noise of later blocks, which the teacher sees and a
    causal student does not: it would learn a blurred mean. tied_noise makes the noise of later blocks a function of the
    first's, by moving its channels on, so that x0 follows from what the student sees. But then a later block's x_t on
    the trajectory would tell it of the blocks before; it gets x0 with independent noise instead, as in a rollout.

    `kept` is the method `of` of Trajectories, with the batch's prompts, or None where each visit has a new one.
    """
    noise = draws.keyed_normal(*shape)  # an independent draw for each key
    predict_block, _ = networks.student_calls(cond)
    with torch.no_grad():
        velocity = functools.partial(
            networks.guided, "teacher", cond=cond, uncond=uncond, scale=args.causal_init_guidance
        )  # fmt: skip

        def flow(start):
            """x_t of each of the student's steps, in the first block, and x0, [B, C, f, h, w] each."""
            x_t, x0 = flow_trajectory(velocity, tied_noise(start, blocks[0]), grid, method.steps)
            return [x[:, :, : blocks[0]] for x in x_t], x0

        trajectory, x0 = kept(flow, draws, shape=shape, first=blocks[0]) if kept else flow(noise("start"))
        kv_caches = [None]  # keys and values before each block
        if len(blocks) > 1:
            context = renoise(x0, args.context_noise / TIMESTEPS, noise(None)) if args.context_noise else x0
            student_velocity = functools.partial(networks.velocity, "student", cond=cond)
            kv_caches = networks.causal.caches_before(student_velocity, context, args.context_noise, blocks)
    for k, (x_t, t) in enumerate(zip(trajectory, method.steps, strict=True)):
        x_later = renoise(x0, t / TIMESTEPS, noise(k)) if len(blocks) > 1 else None
        for kv_cache, (first, end) in zip(kv_caches, pairwise((0, *accumulate(blocks))), strict=True):
            x = x_t if first == 0 else x_later[:, :, first:end]
            v_target = (x - x0[:, :, first:end]) * TIMESTEPS / t
            share = (end - first) / sum(blocks) / len(method.steps)  # of the whole loss, a mean over steps and frames
            with networks.acting("student"):
                loss = torch.nn.functional.mse_loss(predict_block(x, t, first, kv_cache), v_target)
                (share * loss / args.gradient_accumulation_steps).backward()
            means.add("ode_loss", loss, share)


def lcm_backward(args, method, networks, means, draws, cond, uncond, shape, exits, grid, latents):
    """Gradient of the student towards its own value one step further down the teacher's flow (LCM, on flow time).

    f(x, t) = x - sigma * v_student is to lead from any point of the flow to its end. It needs no c_skip and c_out, since
    f(x, 0) = x already. The loss is between velocities, (x_t - f) / sigma, so that all timesteps count alike.
    `latents` [B, C, f, h, w] are those of clips, or None; `shape` is (C, f, h, w), `exits` those of a rollout.
    """
    with torch.no_grad():
        # 2. Clean samples: those of clips, or with prompts alone the student's own
        if latents is None:
            predict_block, _ = networks.student_calls(cond)
            (latents,) = roll_out(predict_block, None, draws.keyed_normal(*shape), method.steps, shape[1:2], exits)

        # 3. Noisy samples at timesteps of the grid, and the teacher's step to the next one
        index = draws.integers(len(grid) - 1)
        t, t_prev = grid[index], grid[index + 1]
        sigma, sigma_prev = (expand_to(each / TIMESTEPS, latents) for each in (t, t_prev))
        x_t = renoise(latents.float(), t / TIMESTEPS, draws.normal(*shape))
        v_teacher = networks.guided("teacher", x_t, t, cond, uncond, args.real_score_guidance_scale)
        x_prev = x_t + (sigma_prev - sigma) * v_teacher

        # 4. Student at x_t, and its distance to the target, which is the student itself at x_prev
        f_target = x_prev - sigma_prev * networks.velocity("student", x_prev, t_prev, cond)
        v_target = (x_t - f_target) / sigma
    loss = consistency_loss(networks.velocity("student", x_t, t, cond), v_target, args.loss_type, args.huber_c)
    with networks.acting("student"):
        (loss / args.gradient_accumulation_steps).backward()
    means.add("lcm_loss", loss)


def load_networks(args, accelerator, weight_dtype) -> Networks:
    """All networks on the device, split between processes and compiled as the flags say."""
    roles = METHODS[args.distillation_method]

    def load(dtype: torch.dtype) -> torch.nn.Module:
        read = functools.partial(load_transformer, args, dtype)
        # A compiled block gathers no layer, and gradients of several forwards, as of a clip's blocks, are added up in
        # the precision of what is gathered
        in_fp32 = args.compile or args.num_frame_per_block
        gathered_in, split = torch.float32 if in_fp32 else weight_dtype, wants_fsdp(accelerator)
        return own_attention(load_split(read, BLOCKS, accelerator, gathered_in) if split else read())

    teacher = load(weight_dtype)
    quantize(teacher, args.base_model_precision, "cpu" if args.quantize_via == "cpu" else accelerator.device)
    if args.model_type == "lora":
        by_role = dict.fromkeys(("teacher", *roles), add_adapters(args, teacher, roles))
    else:  # from the weights on disk, not from the teacher's, which its precision has rounded
        by_role = {"teacher": teacher} | {role: load(torch.float32).requires_grad_(True) for role in roles}
    causal = make_causal(by_role["student"]) if args.num_frame_per_block else None
    for network in {id(network): network for network in by_role.values()}.values():  # with LoRA one
        network.to(accelerator.device)
        if args.context_parallel_degree > 1:
            # BlockCausal cuts the rotary embedding to the block, and only then splits it between processes
            splits_rotary = not causal or network is not by_role["student"]
            share_tokens(network, args.context_parallel_degree, accelerator, splits_rotary)
    speed_up(args, by_role.values(), BLOCKS, accelerator.print)  # all blocks of a clip have one shape
    if args.gradient_checkpointing:
        for network in dict.fromkeys(by_role[role] for role in roles):  # each once
            joins_past = causal is not None and network is by_role["student"]  # before each block
            checkpoint_activations(args, network, BLOCKS, joins_past)
    return Networks(by_role, causal, accelerator, has_many_tokens(args, by_role["student"]))


def has_many_tokens(args, transformer) -> bool:
    """Whether batches have MANY_TOKENS. It follows from flags and not from a batch: processes that split weights or a
    clip's tokens between them have to make the same forwards."""
    frames = latent_frames(args.num_frames, FRAMES_PER_LATENT)
    _, frames, height, width = latent_shape(args, transformer, frames, args.validation_resolution[0])
    tokens = args.train_batch_size * frames * tokens_of_frame(transformer, height, width)
    return tokens // args.context_parallel_degree >= MANY_TOKENS


def plan(args, data, encoder, optimizers, networks, saved, train_step, clips, export) -> list[Phase]:
    """What --plan measures: turns of student and fake score, and clips of the largest size there can be: of each
    dataset's resolution, in the shapes that validation generates."""
    sizes = [
        (dataset.num_frames, *size)
        for dataset in data.datasets
        for size in targets_in_shapes(args.validation_resolution, dataset.rules)
    ]
    samples = largest_samples(args, sizes, trains_on_clips(args, data))
    weights = {f"weights of the {name}": weights_of(network) for name, network in networks.by_role.items()}
    weights |= {f"weights of the {name}": list(part.parameters()) for name, part in saved.items()}
    if args.use_ema and args.ema_device == "cpu":
        weights[HOST] = weights.pop("weights of the ema")
    first = args.causal_init_steps
    turns = ({"causal start": 0} if first else {}) | {"training": first}
    turns |= {"fake score's turn": first + 1} if args.generator_update_interval > 1 else {}
    batches = itertools.repeat(samples[: args.train_batch_size])
    train = {name: functools.partial(train_step, batches, step) for name, step in turns.items()}
    show = functools.partial(show_largest, args, clips)
    return run_phases(data, encoder, optimizers, weights, samples, train, show, export)


def show_largest(args, clips):
    """Clips as validation generates them, of the largest size."""
    size, prompts = max(args.validation_resolution, key=math.prod), validation_prompts(args)[: args.train_batch_size]
    for which in ["student"] + ["ema"] * args.use_ema + ["teacher"] * (not args.disable_benchmark):
        clips(which, prompts, 1, args.validation_seed, size)


class Clips:
    """Clips by teacher, student, or the student's moving average (ema), each with its own sampler."""

    def __init__(self, args, method, networks: Networks, as_average, encoder: SampleEncoder, scheduler, shared: bool):
        """`as_average(wanted)` is a context in which the student is its moving average; `shared` among all processes
        are the prompts."""
        self.args, self.method, self.networks, self.as_average = args, method, networks, as_average
        self.encoder, self.scheduler = encoder, scheduler
        frames = latent_frames(method.validation_frames, FRAMES_PER_LATENT)  # which may be more than are trained
        self.blocks = block_lengths(frames, args.num_frame_per_block, args.independent_first_frame)
        # What fits into memory in training fits here
        self.generate = share_prompts(self.some, networks.accelerator if shared else None, args.train_batch_size)

    def __call__(self, which: str, prompts: list[str], steps: int, seed: int, size=None) -> list:
        """A clip [F, H, W, 3] in bytes for each prompt, the i-th from noise of seed + i.

        The teacher takes so many `steps`; a student always takes its own.
        """
        return self.generate(which, prompts, steps, seed, size=size or self.args.validation_resolution[0])

    def some(self, which: str, prompts: list[str], steps: int, seed: int, size) -> list:
        """Clips of as many prompts as there may be at a time."""
        cond = self.encoder.encode_text(prompts)
        rngs = [torch.Generator().manual_seed(seed + k) for k in range(len(prompts))]
        generate = self.by_teacher if which == "teacher" else functools.partial(self.by_student, which)
        return [to_bytes(clip) for clip in decode(self.encoder.vae, generate(cond, steps, rngs, size))]

    def by_teacher(self, cond, steps: int, rngs: list[torch.Generator], size):
        args, networks = self.args, self.networks
        negative = self.encoder.encode_text([args.validation_negative_prompt or args.negative_prompt])
        with networks.acting("teacher"), networks.accelerator.autocast():
            return generate_by_teacher(
                args, self.method, networks.by_role["teacher"], self.encoder.vae, self.scheduler, cond, negative,
                steps, rngs, size,
            )  # fmt: skip

    @torch.no_grad()
    def by_student(self, which: str, cond, steps: int, rngs: list[torch.Generator], size):
        device, student = self.networks.accelerator.device, self.networks.by_role["student"]
        shape = latent_shape(self.args, student, sum(self.blocks), size)
        noise = Draws.of(rngs, device).keyed_normal(*shape)
        exits = [len(self.method.steps) - 1] * len(self.blocks)  # to the last step
        with self.as_average(which == "ema"):
            predict_block, remember = self.networks.student_calls(cond)
            clip = roll_out(
                predict_block, remember, noise, self.method.steps, self.blocks, exits,
                context_noise=self.args.context_noise,
            )  # fmt: skip
            return torch.cat(list(clip), 2)

    def evaluations(self, which: str, steps: int) -> int:
        """Evaluations of the transformer for a clip; a causal student has one more for each but the last block."""
        if which == "teacher":
            return steps * (1 if self.method.teacher_guidance == 1.0 else 2)
        return len(self.method.steps) * len(self.blocks) + len(self.blocks) - 1


@planned
@webhook_errors
def main(args, data, method, notes):
    # ---- Set-up ----
    accelerator, weight_dtype = start_run(args, notes, splits=True)
    say, device, processes = accelerator.print, accelerator.device, accelerator.num_processes
    roles, lcm = METHODS[args.distillation_method], args.distillation_method == "lcm"
    sharing = check_processes(args, accelerator)  # processes that work on the same samples
    clips_per_step = args.train_batch_size * args.gradient_accumulation_steps * processes // sharing
    if not RECIPE_BATCH / 4 <= clips_per_step <= RECIPE_BATCH * 4:
        say(
            f"warning: {clips_per_step} clips a step, and the papers' recipes have {RECIPE_BATCH}: "
            f"{'raise' if clips_per_step < RECIPE_BATCH else 'lower'} --gradient_accumulation_steps, --train_batch_size "
            f"or the number of processes, or change --learning_rate{' and --fake_score_lr' * (not lcm)} with it"
        )
    repository = open_repository(args, accelerator)

    # ---- Networks ----
    try:
        scheduler = load_scheduler(args)
    except (OSError, ValueError) as error:
        raise teacher_missing(args, error) from None
    shift = schedule_shift(scheduler)
    grid = flow_grid(method.steps, FLOW_STEPS, shift)
    lcm_grid = torch.tensor(flow_grid(method.steps, args.num_ddim_timesteps, shift), device=device)
    networks = load_networks(args, accelerator, weight_dtype)
    student, lora = networks.by_role["student"], args.model_type == "lora"
    saved = {name: adapter_weights(student, name) if lora else networks.by_role[name] for name in roles}
    trained = {name: [p for p in part.parameters() if p.requires_grad] for name, part in saved.items()}

    # ---- Optimizers and EMA ----
    total_steps = args.max_train_steps or args.num_train_epochs * max(1, data.samples // clips_per_step)
    optimizers = {
        "student": make_optimizer(
            optimizer_name(args), trained["student"], args.learning_rate * (clips_per_step if args.scale_lr else 1),
            *betas_and_decay(args), args.adam_epsilon, device,
        )
    }  # fmt: skip
    if not lcm:
        optimizers["fake_score"] = make_optimizer(
            "adamw8bit" if optimizer_name(args) == "adamw8bit" else "adamw", trained["fake_score"], args.fake_score_lr,
            args.fake_score_betas, args.fake_score_weight_decay, args.fake_score_eps, device,
        )  # fmt: skip
    init_rate = args.causal_init_lr / args.learning_rate
    lr_schedule = make_schedule(args, optimizers["student"], total_steps, args.causal_init_steps, init_rate)
    ema = weights_copy(saved["student"], "cpu" if args.ema_device == "cpu" else device) if args.use_ema else None
    saved |= {"ema": ema} if args.use_ema else {}

    # ---- Resume ----
    state = resume(args, accelerator, saved, optimizers, lr_schedule)
    first_step = step = state["step"]
    updates = state.get("student_updates", 0)

    # ---- Data: lists of samples, each with a caption and the size of its clip, for LCM also with the clip's latents or
    # pixels; DMD's student makes clips ----
    data = plan_buckets(args, data, accelerator, clip_size)
    prompts = ["", args.negative_prompt, args.validation_negative_prompt or "", *validation_prompts(args)]
    readers = open_clip_readers(args, data) if lcm else open_caption_readers(args, data)
    encoder, readers = open_encoder(
        args, data, readers, encoders(args, device, weight_dtype), accelerator, prompts, state, sharing
    )  # fmt: skip
    uncond, empty = encoder.encode_text([args.negative_prompt]), encoder.encode_text([""])  # [1, L, C] each
    trajectories = None
    if args.causal_init_trajectories and step < args.causal_init_steps:
        embeddings = identity(**encoder.encoders.text_identity())
        trajectories = Trajectories(args, method, networks, grid, embeddings, weight_dtype, sharing)
    batches = open_batches(args, data, accelerator, readers, state["stream"], sharing)
    saver = Saver(
        args, accelerator, saved, optimizers, lr_schedule, encoder, batches, state["skipped"], sharing
    )  # fmt: skip

    # ---- Clips and export ----
    def as_average(wanted: bool):
        """Inside, the student is its moving average, and the other way round: it must not be nested."""
        return weights_exchanged(trained["student"], list(ema.values())) if wanted else contextlib.nullcontext()

    def export_student():
        """Files and usage, from the main process; all have to call it where weights are split."""
        with as_average(args.use_ema):
            network = student if lora else gathered(student)
            if accelerator.is_main_process:
                return export(args, method, Path(args.output_dir), network, weight_dtype)
            return None

    def report(folder: Path) -> str:
        """The exported student against the teacher."""
        sharers = processes if shared else 1
        with as_average(args.use_ema):
            return write_clips_report(args, clips, len(method.steps), folder, FRAMES_PER_SECOND, sharers)

    tracking, means = Tracking(args, accelerator, total_steps), Means(MEANS, device)
    shared = not wants_fsdp(accelerator) and sharing == 1  # else all processes have to take part in a forward
    clips = Clips(args, method, networks, as_average, encoder, scheduler, shared)
    comparison = ClipComparison(args, clips, tracking, say, accelerator.is_main_process, FRAMES_PER_SECOND)

    def validate():
        sheet = comparison.sheet(step)
        if not data.trains_with_encoders:
            encoder.release()
        return sheet

    # ---- One step ----
    def train_step(batches, step: int):
        """Gradients of as many batches as an optimizer step has, and the update; returns whether it is the student's."""
        regression_turn = step < args.causal_init_steps
        student_turn = regression_turn or (step - args.causal_init_steps) % args.generator_update_interval == 0
        for micro_batch in range(args.gradient_accumulation_steps):
            # 1. Draws: a sample's follow from the seed and its position in the data alone, exits from seed and step
            samples = next(batches)
            frames, *size = samples[0].bucket  # pixel frames, height and width, the same for the batch
            blocks = blocks_of(args, latent_frames(frames, FRAMES_PER_LATENT))
            shape = latent_shape(args, student, sum(blocks), size)
            if tokens_of_frame(student, *shape[2:]) % sharing:
                raise SystemExit(
                    f"--context_parallel_degree {sharing}: must divide the tokens of a frame of {size[1]}x{size[0]}"
                )
            draws = Draws(args.seed, [sample.position for sample in samples], device)
            text = encoder.encode_text([sample.caption for sample in samples])
            dropped = draws.uniform() < args.proportion_empty_prompts
            cond = with_dropped(dropped, text, empty)
            torch.manual_seed(args.seed + samples[0].position)  # for dropout, so that a resumed run draws the same
            if regression_turn:
                kept = None
                if trajectories is not None:
                    prompts = [sample.caption for sample in samples]
                    kept = functools.partial(trajectories.of, prompts=prompts, dropped=dropped.tolist())
                regression_backward(args, method, networks, means, draws, cond, uncond, blocks, shape, grid, kept)
                continue
            exits = draw_exits(
                args.seed, step * args.gradient_accumulation_steps + micro_batch, len(method.steps), len(blocks),
                args.same_step_across_blocks, args.last_step_only,
            )  # fmt: skip

            # 2. to 4.
            if lcm:
                latents = encoder.encode_images(samples).get("latents")
                lcm_backward(args, method, networks, means, draws, cond, uncond, shape, exits, lcm_grid, latents)
                continue
            dmd_backward(args, method, networks, means, draws, cond, uncond, blocks, shape, exits, student_turn)

        # 5. Optimizers
        turns = [("student", args.max_grad_norm)] if student_turn else []
        turns += [] if regression_turn or lcm else [("fake_score", args.fake_score_grad_clip)]
        for name, most in turns:
            if lora or not wants_fsdp(accelerator):  # whose backward() has averaged those of split weights
                average_gradients(trained[name], processes, sharing)
            means.add(f"{name}_grad_norm", gradient_norm(trained[name]))
            clip_gradients(accelerator, trained[name], args.grad_clip_method, most)
            optimizers[name].step()
            optimizers[name].zero_grad()
        return student_turn

    if Meter.running:
        return plan(args, data, encoder, optimizers, networks, saved, train_step, clips, export_student)

    # ---- Training loop ----
    count = sum(p.numel() for p in trained["student"])
    say(f"training {count:,} parameters of the student for {total_steps} steps of {clips_per_step} clips")
    bar = tqdm(total=total_steps, initial=step, disable=not accelerator.is_main_process, mininterval=1.0)
    started, timed = time.time(), step
    stop_signal, stopping = StopSignal(), False
    while step < total_steps and not stopping:
        # 1. to 5.
        regression_turn = step < args.causal_init_steps
        student_turn = train_step(batches, step)
        lr_schedule.step()
        step += 1
        bar.update()

        # 6. EMA, of the student's updates alone; it starts where the causal student's regression ends
        updates += student_turn and not regression_turn
        if args.use_ema and (regression_turn or student_turn and updates % args.ema_update_interval == 0):
            decay = 0.0 if regression_turn else args.ema_decay**args.ema_update_interval
            update_ema(list(ema.values()), trained["student"], decay)

        checkpoint = args.checkpointing_steps and step % args.checkpointing_steps == 0 or step == total_steps
        if step % LOG_EVERY == 0 or checkpoint:
            values = means.read(accelerator)
            check_finite(args, step, **values)
            rate, started, timed = (step - timed) * clips_per_step / (time.time() - started), time.time(), step
            losses = {name: f"{value:.3g}" for name, value in values.items() if name.endswith("loss")}
            bar.set_postfix(clips_per_s=f"{rate:.2f}", **losses)
            tracking.values(values | {"lr": lr_schedule.get_last_lr()[0], "clips_per_s": rate}, step)
        validation = args.validation_steps and step % args.validation_steps == 0 and step < total_steps
        if validation:
            validate()
        if checkpoint and step < total_steps:
            saver.save(step, student_updates=updates)
            exported = export_student() if args.push_checkpoints_to_hub else None
            if repository and exported:
                push_to_hub(args, repository, exported[0], f"Step {step}", fatal=False)
        if processes == 1 or step % LOG_EVERY == 0:
            stopping = stop_signal.agreed(accelerator)  # all leave the loop at the same step
    bar.close()

    # ---- The end: all processes save a checkpoint, and unless a signal stopped the run, export, validate, report ----
    check_finite(args, step, **means.read(accelerator))  # a stop may come between two logs
    end_run(
        args, saver, tracking, repository, step=step, trained=step > first_step, stop_signal=stop_signal,
        stopped=stopping, student_updates=updates, validate=validate, export=export_student, report=report,
        method=args.distillation_method, teacher=teacher_of(args),
    )  # fmt: skip


if __name__ == "__main__":
    main(*parse_args())
