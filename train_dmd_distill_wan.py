"""Distribution matching distillation of Wan 2.1 text-to-video.

DMD (Yin et al. 2023, arXiv 2311.18828), DMD2 (2405.14867), CausVid (2412.07772), Self-Forcing (2506.08009).

Networks
    teacher      the frozen transformer: v_real, the score of the data, with guidance
    student      makes a clip in few steps
    fake_score   learns v_fake, the score of the student's clips
    full: three transformers. lora: one, frozen; student and fake_score are two adapters on it, the teacher it without.

Algorithm, for each batch of prompts; sigma = t / 1000, x_t = (1 - sigma) * x0 + sigma * eps, v = eps - x0
    rollout    x = noise at the first of `steps`; until the exit step, which is drawn: x0 = x - sigma * v_student,
               x = x0 with fresh noise of the next step; x_g = x0 of the exit step, the only one with a gradient
    student    t, eps fresh                     every generator_update_interval steps
               v_real = v_uncond + s * (v_cond - v_uncond),  v_star = eps - x_g
               g      = (v_real - v_fake) / mean|v_real - v_star|
               loss   = |x_g - stop(x_g - g)|^2 / 2
    fake_score t, eps fresh;  loss = |v_fake - (eps - x_g)|^2

Blocks
    num_frame_per_block > 0 is self-forcing: the student makes the clip block by block, each seeing the clean blocks
    before it through a cache of keys and values. Teacher and fake_score see the whole clip. Else the clip is one block.

Guidance
    scales are the usual ones: uncond + s * (cond - uncond). The student is sampled without guidance.

Launch
    accelerate launch train_dmd_distill_wan.py                              distils the toy teacher, on a CPU, in minutes
    accelerate launch train_dmd_distill_wan.py --pretrained_teacher_model Wan-AI/Wan2.1-T2V-1.3B-Diffusers \\
        --train_prompts prompts.txt --validation_resolution 832x480 --resolution_type pixel_area --resolution 632 \\
        --lora_rank 128 --gradient_checkpointing --mixed_precision bf16

To fork it for another model, edit "The model" and the flags above it; the rest asks nothing of the model.
"""

import argparse
import contextlib
import copy
import functools
import json
import math
import tempfile
import time
from collections import Counter
from itertools import accumulate, pairwise
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration
from diffusers import FlowMatchLCMScheduler, WanPipeline, WanTransformer3DModel
from diffusers.schedulers import SchedulerMixin
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from tqdm import tqdm

from common.checkpoint import StopSignal, find_checkpoint, resume, save_checkpoint
from common.data.buckets import target_size
from common.data.clips import latent_frames, open_clip_readers, save_clip
from common.data.datasets import SOURCES, check_data_flags, plan_buckets
from common.data.samples import NoGoodSamples
from common.data.stream import gather_states, open_batches
from common.dmd_flags import (
    batch_warning,
    blocks_of,
    check_clip_flags,
    check_dmd_flags,
    check_rollouts,
    trained_from,
    wanted_student,
)
from common.draws import Draws, draw_exits, score_range, score_timesteps, tied_noise
from common.export import create_hub_repository, push_to_hub, save_comfy_lora, write_model_card
from common.flags import (
    add_bucket_flags,
    add_shared_flags,
    add_video_flags,
    check_bucket_flags,
    check_shared_flags,
    parse_with_config,
)
from common.losses import dmd_gradient, dmd_loss, fake_score_loss
from common.networks import (
    active_adapter,
    adapter_layers,
    adapter_weights,
    quantize,
    speed_up,
    weights_copy,
    weights_exchanged,
)
from common.optim import average_gradients, clip_gradients, gradient_norm, make_optimizer, make_schedule, update_ema
from common.pictures import below_each_other, frame_strip, labelled_grid, validation_prompts
from common.plan.memory import plan_of
from common.report import FULL_STEPS
from common.run import set_up_device
from common.solvers import TIMESTEPS, expand_to, flow_grid, flow_trajectory, renoise, stock_scheduler
from common.tracking import GAP_RANGES, Means, Progress, errors_to_webhook, gap_name
from common.wan import encoders as wan
from common.wan.causal import BlockCausal, block_ends, block_lengths, first_tokens, roll_out
from common.wan.parallel import shard, share_tokens, wants_fsdp, whole
from common.wan.report import clip_statistics, clips_report, signs_of_collapse

LORA_TARGETS = "to_q,to_k,to_v,to_out.0,ffn.net.0.proj,ffn.net.2"
TOY = Path(__file__).parent / "tests" / "toy"
FLOW_STEPS = 20  # of the teacher's trajectories, and those of the student among them
LOG_EVERY = 10  # optimizer steps; the only place where the loop waits for the device
MEANS = ["dmd_loss", "fake_score_loss", "ode_loss", "student_grad_norm", "fake_score_grad_norm"]
MEANS += map(gap_name, GAP_RANGES)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    # fmt: off
    add = parser.add_argument_group("models").add_argument
    add("--pretrained_teacher_model", type=str, help="folder or hub name of the pipeline; default: the toy teacher, by its own recipe")
    add("--teacher_revision", type=str, help="the teacher's branch, tag or commit on the hub")
    add("--pretrained_t5_model_name_or_path", type=str, help="where text encoder and tokenizer are; default: the teacher's")
    add("--max_sequence_length", type=int, default=512, metavar="N", help="rows of text that the transformer attends to, without a mask: what a prompt lacks is zeros; WanPipeline's argument")
    add("--resolution", type=float, default=480, help="of training, in the unit of --resolution_type")
    add("--plan", type=float, nargs="?", const=0.0, metavar="GB", help="load and train nothing, but print what the run takes on each GPU, and what would make it fit into so many GB; default: those of the GPU that is here")
    add("--context_parallel_degree", type=int, default=1, metavar="N", help="N processes share each clip's tokens; the number of processes must be a multiple of it")
    add("--train_prompts", type=str, help="text file, a prompt a line: trains with no video at all, on clips of --num_frames in the shapes of --validation_resolution")

    add = parser.add_argument_group("student").add_argument
    add("--model_type", type=str, choices=["full", "lora"], help="lora: student and fake score are adapters on the teacher; full: copies of it, fp32; default: lora, but full for the toy teacher where no --lora_* flag is given")
    add("--lora_rank", type=int, help="of the student's and of the fake score's adapter; default 128")
    add("--lora_alpha", type=int, help="default 128; the adapters are scaled by alpha / rank")
    add("--lora_dropout", type=float, help="default 0")
    add("--lora_target_modules", type=str, help=f"names or suffixes of modules, with commas; default {LORA_TARGETS}")
    add("--lora_type", type=str, choices=["standard"], help="standard: PEFT's, the only kind")
    add("--use_ema", action="store_true", help="keep a moving average of the student, which is then what is exported")
    add("--ema_decay", type=float, default=0.99, help="of the average, per update of the student")
    add("--ema_update_interval", type=int, default=1, help="updates of the student between those of the average, whose decay makes up for it")
    add("--ema_validation", type=str, default="ema_only", choices=["none", "ema_only", "comparison"], help="whose clips validation draws: the student's, the average's, or both")
    add("--ema_device", type=str, default="accelerator", choices=["accelerator", "cpu"], help="where the average is kept")
    add("--export_pipeline", action="store_true", help="full: write all of the pipeline, so that from_pretrained(OUTPUT_DIR) loads it; default: transformer and scheduler alone")
    add("--export_formats", type=str, default="diffusers", choices=["diffusers", "diffusers,comfyui"], metavar="FORMATS", help="diffusers, or diffusers,comfyui; of a LoRA: comfyui writes a second file, in the names of Wan's own code")

    add = parser.add_argument_group("distribution matching distillation").add_argument
    add("--dmd_denoising_steps", type=str, default="1000,757,522", metavar="STEPS", help="the student's timesteps, falling from 1000; or their number, evenly spaced and shifted by --flow_schedule_shift: 4 at shift 5 is 1000,937.5,833.3,625")
    add("--flow_schedule_shift", type=float, help="shift of the teacher's sampler in validation, of --causal_init_steps' trajectories, and of counted steps; default: the teacher's own")
    add("--generator_update_interval", type=int, default=1, help="the student is updated every so many steps, the fake score at each")
    add("--last_step_only", action="store_true", help="every rollout goes to the last step; default: the exit step is drawn")
    add("--real_score_guidance_scale", type=float, default=3.0, metavar="S", help="of the teacher: uncond + S * (cond - uncond)")
    add("--fake_score_guidance_scale", type=float, default=0.0, metavar="S", help="of the fake score, likewise; 0 for none")
    add("--fake_score_lr", type=float, default=1e-5, help="constant; that of the student is --learning_rate")
    add("--fake_score_weight_decay", type=float, default=0.01)
    add("--fake_score_betas", type=float, nargs=2, default=[0.9, 0.999], metavar="BETA")
    add("--fake_score_eps", type=float, default=1e-8)
    add("--fake_score_grad_clip", type=float, default=1.0, help="as --max_grad_norm, for the fake score")
    add("--timestep_shift", type=float, default=1.0, help="of the timesteps at which rollouts are judged, towards noise; 1 is uniform")
    add("--min_timestep_ratio", type=float, default=0.02, help="these timesteps are at least 1000 times this")
    add("--max_timestep_ratio", type=float, default=0.98, help="and at most 1000 times this")
    add("--ts_schedule", action=argparse.BooleanOptionalAction, default=True, help="these timesteps are not below the step after the rollout's exit")
    add("--ts_schedule_max", action=argparse.BooleanOptionalAction, default=False, help="and not above its exit step")
    add("--min_score_timestep", type=float, default=0.0, help="the lower bound without --ts_schedule")
    add("--negative_prompt", type=str, help="what guidance leads away from; default: --validation_negative_prompt, or the empty prompt")

    add = parser.add_argument_group("self-forcing; frames are latent ones, of 4 frames each but the first").add_argument
    add("--num_frame_per_block", type=int, default=0, help="frames that are made together; 0: all, a bidirectional student")
    add("--independent_first_frame", action=argparse.BooleanOptionalAction, default=False, help="the first block is one frame")
    add("--same_step_across_blocks", action=argparse.BooleanOptionalAction, default=False, help="one exit step for all blocks of a rollout; default: one each")
    add("--num_training_frames", type=int, default=21, help="longer rollouts train on their last ones; a bidirectional student rolls out no more")
    add("--context_noise", type=float, default=0.0, help="timestep at which clean blocks become the context of later ones")
    add("--causal_init_steps", type=int, default=0, help="the first of --max_train_steps regress the student to the teacher's own trajectories")
    add("--causal_init_lr", type=float, help="their rate, by a schedule of their own; default: --learning_rate")
    add("--causal_init_guidance", type=float, metavar="S", help="of the teacher on these trajectories; default: --real_score_guidance_scale")

    add = parser.add_argument_group("validation of clips").add_argument
    add("--validation_num_video_frames", type=int, help="default: --num_frames")
    # fmt: on
    add_shared_flags(parser)
    add_bucket_flags(parser)
    add_video_flags(parser)
    parser.set_defaults(
        output_dir="dmd-wan-distilled", train_batch_size=1, learning_rate=2e-5, vae_encode_batch_size=1,
        bucket_alignment=16, crop_aspect="preserve", validation_num_inference_steps=None,
        report_steps=None, tracker_project_name="text2video-distill",
    )  # fmt: skip

    args = parse_with_config(parser, argv, family="wan", method="dmd", recipe=toy_recipe)
    check_shared_flags(parser, args)
    check_dmd_flags(parser, args, LORA_TARGETS)
    rules = check_bucket_flags(parser, args)
    check_data_flags(parser, args, rules)
    args.validation_num_video_frames = args.validation_num_video_frames or args.num_frames
    check_clip_flags(parser, args)
    check_rollouts(parser, args)
    args.validation_resolution = args.validation_resolution or [target_size(1, 1, rules)]
    for height, width in args.validation_resolution:
        if height % 16 or width % 16:
            parser.error(f"--validation_resolution {width}x{height}: must be multiples of 16")
        if height // 16 * (width // 16) % args.context_parallel_degree:
            parser.error(
                f"--validation_resolution {width}x{height}: --context_parallel_degree must divide a frame's tokens"
            )
    return args


def toy_recipe(args) -> dict:
    recipe = json.loads((TOY / "wan_recipe.json").read_text())
    paths = {"pretrained_teacher_model": str(TOY / "wan")}
    if not any(getattr(args, name) for name in SOURCES):
        paths["train_prompts"] = str(TOY / "wan_prompts.txt")
    attention = "causal" if args.num_frame_per_block else "bidirectional"
    return paths | recipe["shared"] | recipe[wanted_student(args)] | recipe[attention]


# =====================================================================================================================
# The model: what a fork for another one edits
# =====================================================================================================================

PIPELINE = WanPipeline
COMPILED_BLOCKS = ("WanTransformerBlock",)


def hub_options(args) -> dict:
    return {"revision": args.teacher_revision, "cache_dir": args.cache_dir}


def load_scheduler(args) -> SchedulerMixin:
    """The teacher's own, of whatever kind."""
    loaded = PIPELINE.from_pretrained(
        args.pretrained_teacher_model, transformer=None, vae=None, text_encoder=None, tokenizer=None,
        **hub_options(args),
    ).scheduler  # fmt: skip
    if args.flow_schedule_shift is not None:
        name = "flow_shift" if "flow_shift" in loaded.config else "shift"
        loaded = type(loaded).from_config(loaded.config, **{name: args.flow_schedule_shift})
    return loaded


def schedule_shift(scheduler) -> float:
    return scheduler.config.get("flow_shift", scheduler.config.get("shift", 1.0))


def load_transformer(args, dtype: torch.dtype) -> WanTransformer3DModel:
    transformer, loading = WanTransformer3DModel.from_pretrained(
        args.pretrained_teacher_model, subfolder="transformer", dtype=dtype, output_loading_info=True,
        **hub_options(args),
    )  # fmt: skip
    missing, unexpected = loading["missing_keys"], loading["unexpected_keys"]
    if missing or unexpected:  # diffusers only warns, and leaves what is missing at random
        raise SystemExit(f"the teacher's weights do not fit its config: {missing} missing, {unexpected} unexpected")
    return transformer.requires_grad_(False).eval()


def add_adapters(transformer: WanTransformer3DModel, args) -> WanTransformer3DModel:
    """The teacher itself, with two fp32 adapters that start at zero."""
    modules = [name.strip() for name in args.lora_target_modules.split(",")]
    for name in ("student", "fake_score"):
        config = LoraConfig(
            r=args.lora_rank, lora_alpha=args.lora_alpha, lora_dropout=args.lora_dropout, target_modules=modules
        )
        transformer.add_adapter(config, adapter_name=name)
    for name, p in transformer.named_parameters():
        if "lora_" in name:
            p.data = p.data.float()
            p.requires_grad_(True)
    return transformer.eval()


def predict(transformer, x, t, cond: torch.Tensor):
    """The flow velocity eps - x0 at x_t. [B, C, F, h, w]; t is [B] and stays fp32, bf16 has no 757."""
    return transformer(hidden_states=x.to(cond.dtype), timestep=t, encoder_hidden_states=cond).sample


def latent_shape(transformer, vae_config: dict, frames: int, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """(C, F, h, w) of so many latent frames of a clip of this height and width."""
    factor = vae_config["scale_factor_spatial"]
    return transformer.config.in_channels, frames, size[0] // factor, size[1] // factor


def tokens_of_frame(transformer, height: int, width: int) -> int:
    """Of a latent frame."""
    _, rows, columns = transformer.config.patch_size
    return (height // rows) * (width // columns)


@torch.no_grad()
def draw_teacher(args, transformer, vae, scheduler, cond, negative, steps: int, rngs: list[torch.Generator], size):
    """Latents of clips by the stock pipeline, one for each generator."""
    pipeline = PIPELINE(None, None, vae, scheduler, transformer)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        prompt_embeds=cond, negative_prompt_embeds=negative, height=size[0], width=size[1],
        num_frames=args.validation_num_video_frames, num_inference_steps=steps,
        guidance_scale=args.validation_guidance, output_type="latent", generator=rngs,
    ).frames  # fmt: skip


@torch.no_grad()
def decode(vae, latents: torch.Tensor) -> list:
    """[B, C, f, h, w] -> B times [F, H, W, 3] in [0, 1]."""
    pixels = wan.decode_latents(vae, latents).float()
    return list((pixels / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 4, 1).cpu().numpy())


def student_scheduler(args) -> tuple[FlowMatchLCMScheduler, str]:
    """What makes the stock pipeline take the student's steps, and the line of code that some lists of steps need."""
    if scheduler := stock_scheduler(args.steps):
        return scheduler, ""
    line = f"scheduler.set_timesteps = functools.partial(scheduler.set_timesteps, timesteps={args.steps})\n"
    return FlowMatchLCMScheduler(shift=1.0), line


def causal_usage(args, transformer) -> str:
    """Lines that make a clip block by block, with the common/ folder of this repository at hand."""
    blocks = block_lengths(
        latent_frames(args.validation_num_video_frames), args.num_frame_per_block, args.independent_first_frame
    )
    (height, width), channels = args.validation_resolution[0], transformer.config.in_channels
    return (
        "from common.causal import BlockCausal, roll_out\n\n"
        f"steps, blocks = {args.steps}, {blocks}\n"
        f'text, _ = pipeline.encode_prompt("your prompt", max_sequence_length={args.max_sequence_length})\n'
        "predict, remember = BlockCausal(pipeline.transformer).calls(\n"
        "    lambda x, t: pipeline.transformer(x.to(text), torch.tensor([t], device=x.device), text).sample.float()\n"
        ")\n"
        f"shape = 1, {channels}, sum(blocks), {height} // pipeline.vae_scale_factor_spatial, "
        f"{width} // pipeline.vae_scale_factor_spatial\n"
        "noise = functools.cache(lambda k: torch.randn(shape, device=text.device))\n"
        "exits, made = [len(steps) - 1] * len(blocks), []\n"
        "with torch.no_grad():\n"
        "    for latents in roll_out(\n"
        f"        predict, remember, noise, steps, blocks, exits, context_noise={args.context_noise}\n"
        "    ):\n"
        "        made.append(latents)  # this block's frames are there before the next one's are begun\n"
    )


def export(args, folder: Path, transformer) -> tuple[list[str], str]:
    """Writes what stock diffusers loads. Returns the files' names and the lines of code that load them."""
    scheduler, line = student_scheduler(args)
    scheduler.save_pretrained(folder / "scheduler")
    base, replaced = args.pretrained_teacher_model, "scheduler=scheduler"
    load = f'scheduler = FlowMatchLCMScheduler.from_pretrained("{folder}", subfolder="scheduler")\n{line}'
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
        files, after = ["transformer"], ""
        load += f'transformer = WanTransformer3DModel.from_pretrained("{folder}", subfolder="transformer")\n'
        replaced += ", transformer=transformer"
        if args.export_pipeline:
            whole = PIPELINE.from_pretrained(base, transformer=transformer, scheduler=scheduler, **hub_options(args))
            whole.save_pretrained(folder)
            files += ["model_index.json", *(name for name, part in whole.components.items() if part is not None)]
    usage = (
        "import functools\n\nimport torch\n"
        + f"from diffusers import FlowMatchLCMScheduler, WanPipeline, WanTransformer3DModel\n\n{load}"
        + f'pipeline = WanPipeline.from_pretrained("{base}", {replaced})\n{after}'
    )
    if args.num_frame_per_block:  # the pipeline would show it the whole clip at once
        usage += causal_usage(args, transformer)
    else:
        usage += f'video = pipeline("your prompt", num_frames={args.validation_num_video_frames}, '
        usage += f"num_inference_steps={len(args.steps)}, guidance_scale=1.0, "
        usage += f"max_sequence_length={args.max_sequence_length}).frames[0]\n"
    return ["scheduler", *dict.fromkeys(files)], usage


# =====================================================================================================================
# Training
# =====================================================================================================================


def load_networks(args, accelerator, weight_dtype) -> tuple[dict[str, WanTransformer3DModel], BlockCausal | None]:
    """Teacher, student and fake score, with LoRA all the same transformer; and what makes the student causal."""
    where = "cpu" if args.quantize_via == "cpu" else accelerator.device
    teacher = load_transformer(args, weight_dtype)
    if args.model_type == "lora":
        quantize(teacher, args.base_model_precision, where)
        networks = dict.fromkeys(("teacher", "student", "fake_score"), add_adapters(teacher, args))
    else:
        student = load_transformer(args, torch.float32).requires_grad_(True)
        quantize(teacher, args.base_model_precision, where)
        networks = {"teacher": teacher, "student": student, "fake_score": copy.deepcopy(student)}
    causal = BlockCausal(networks["student"]) if args.num_frame_per_block else None
    for network in networks.values():
        if wants_fsdp(accelerator):
            shard(network, network.blocks, accelerator)
        network.to(accelerator.device)
    if args.context_parallel_degree > 1:
        for network in {id(network): network for network in networks.values()}.values():
            share_tokens(
                network, args.context_parallel_degree, accelerator, not causal or network != networks["student"]
            )
    speed_up(args, networks.values(), COMPILED_BLOCKS, accelerator.print)
    if args.gradient_checkpointing:
        networks["student"].enable_gradient_checkpointing()
        networks["fake_score"].enable_gradient_checkpointing()
    return networks, causal


def open_encoder(args, accelerator, weight_dtype):
    """What turns prompts into embeddings, and each dataset's reader: clips give their captions and sizes alone."""
    plan_buckets(args, accelerator)
    readers = open_clip_readers(args, captions_only=True)
    encoder = wan.open_encoder(args, readers, accelerator.device, torch.float32, weight_dtype)
    if args.caches == "fill":
        prompts = ["", args.negative_prompt, args.validation_negative_prompt or "", *validation_prompts(args)]
        encoder.fill(accelerator, args.datasets, readers, prompts, args.dataloader_num_workers)
        encoder.release()
    return encoder, readers


def make_fake_score_optimizer(args, params, device):
    settings = argparse.Namespace(
        optimizer="adamw8bit" if args.optimizer == "adamw8bit" else "adamw", adam_epsilon=args.fake_score_eps,
        adam_beta1=args.fake_score_betas[0], adam_beta2=args.fake_score_betas[1],
        adam_weight_decay=args.fake_score_weight_decay,
    )  # fmt: skip
    return make_optimizer(settings, params, args.fake_score_lr, device)


@errors_to_webhook
def main(args):
    # ---- Set-up ----
    output_dir = Path(args.output_dir)
    accelerator = Accelerator(
        mixed_precision=args.mixed_precision,
        log_with=None if args.report_to == "none" else args.report_to.split(","),
        project_config=ProjectConfiguration(args.output_dir, str(output_dir / args.logging_dir)),
    )
    say, device, processes = accelerator.print, accelerator.device, accelerator.num_processes
    if accelerator.mixed_precision == "fp16":
        raise SystemExit(
            "accelerate's mixed_precision fp16: Wan's activations overflow it; --mixed_precision bf16 or no"
        )
    for line in args.notes:
        say(line)
    weight_dtype = set_up_device(args, accelerator)
    if args.plan is not None:
        say(plan_of(args, accelerator, weight_dtype))
        return
    sharded, together = wants_fsdp(accelerator), args.context_parallel_degree  # processes on the same samples
    if sharded and (args.model_type == "lora" or args.ema_device == "cpu" or args.base_model_precision != "no_change"):
        raise SystemExit("accelerate's --use_fsdp: goes with --model_type full, --ema_device accelerator and no 8 bits")
    if processes % together or sharded and together > 1:
        raise SystemExit(
            f"--context_parallel_degree {together}: must divide {processes} processes, and goes without FSDP"
        )
    batch = args.train_batch_size * args.gradient_accumulation_steps * processes // together  # of one optimizer step
    if warning := batch_warning(batch):
        say(warning)
    repository = create_hub_repository(args) if args.push_to_hub and accelerator.is_main_process else None

    # ---- Networks ----
    scheduler = load_scheduler(args)
    grid = flow_grid(args.steps, FLOW_STEPS, schedule_shift(scheduler))
    networks, causal = load_networks(args, accelerator, weight_dtype)
    lora, layers = args.model_type == "lora", adapter_layers(networks["student"])
    parts = {
        name: adapter_weights(networks[name], name) if lora else networks[name] for name in ("student", "fake_score")
    }
    trained = {name: [p for p in part.parameters() if p.requires_grad] for name, part in parts.items()}

    # ---- Optimizers and EMA ----
    if args.max_train_steps is None:
        args.max_train_steps = args.num_train_epochs * max(1, args.num_samples // batch)
    rate = args.learning_rate * (batch if args.scale_lr else 1)
    optimizers = {
        "student": make_optimizer(args, trained["student"], rate, device),
        "fake_score": make_fake_score_optimizer(args, trained["fake_score"], device),
    }
    init_rate = args.causal_init_lr / args.learning_rate
    lr_schedule = make_schedule(args, optimizers["student"], args.causal_init_steps, init_rate)
    ema = weights_copy(parts["student"], "cpu" if args.ema_device == "cpu" else device) if args.use_ema else None
    saved = parts | ({"ema": ema} if args.use_ema else {})

    # ---- Resume ----
    state = resume(args, accelerator, saved, optimizers, lr_schedule)
    first_step = step = state["step"]
    updates = state.get("student_updates", 0)
    skipped = Counter(state["skipped"])

    # ---- Data: lists of samples, each with a caption and the size of its clip ----
    encoder, readers = open_encoder(args, accelerator, weight_dtype)
    negative = encoder.encode_text([args.negative_prompt])["prompt_embeds"]
    empty = encoder.encode_text([""])["prompt_embeds"]
    batches = open_batches(args, accelerator, readers, state["stream"], together)
    vae_config = wan.AutoencoderKLWan.load_config(args.pretrained_teacher_model, subfolder="vae", **hub_options(args))

    # ---- The three networks ----
    def velocity(which: str, x, t, cond):
        """v of teacher, student or fake_score; t is a number or [B]."""
        t = torch.as_tensor(t, dtype=torch.float32, device=device).expand(len(x))
        with active_adapter(layers, which), accelerator.autocast():
            return predict(networks[which], x, t, cond).float()

    def guided(which: str, x, t, cond, scale: float):
        """uncond + scale * (cond - uncond), both in one forward; 0 and 1 are no guidance."""
        if scale in (0.0, 1.0):
            return velocity(which, x, t, cond)
        both = torch.cat([cond, negative.expand_as(cond)])
        t = torch.as_tensor(t, dtype=torch.float32, device=device).expand(len(x)).repeat(2)
        v_cond, v_uncond = velocity(which, x.repeat(2, 1, 1, 1, 1), t, both).chunk(2)
        return v_uncond + scale * (v_cond - v_uncond)

    def student_rollout(cond, noise, blocks: list[int], exits: list[int], first_trained: int = 0):
        """Each block's clean frames, one after the other."""
        v = functools.partial(velocity, "student", cond=cond)
        predicted, remember = causal.calls(v) if causal else (lambda x, t, start, cache: v(x, t), None)
        return roll_out(predicted, remember, noise, args.steps, blocks, exits, first_trained, args.context_noise)

    # ---- Algorithm, from a batch and its draws to the losses ----
    def generator_loss(x_g, t, eps, cond):
        with torch.no_grad():
            x_t = renoise(x_g, t / TIMESTEPS, eps)
            v_real = guided("teacher", x_t, t, cond, args.real_score_guidance_scale)
            v_fake = guided("fake_score", x_t, t, cond, args.fake_score_guidance_scale)
            g, gap = dmd_gradient(v_real, v_fake, x_g, eps)
        return dmd_loss(x_g, g), gap

    def draw_score(draws: Draws, exits: list[int], shape):
        """Timesteps [B], on the CPU, and noise at which rollouts are judged."""
        bounds = score_range(exits, args.steps, args.ts_schedule, args.ts_schedule_max, args.min_score_timestep)
        ratios = args.min_timestep_ratio, args.max_timestep_ratio
        return score_timesteps(draws.uniform(), *bounds, args.timestep_shift, *ratios), draws.normal(*shape)

    def critic_loss(x_g, t, eps, cond):
        return fake_score_loss(velocity("fake_score", renoise(x_g, t / TIMESTEPS, eps), t, cond), x_g, eps)

    def ode_losses(noise, cond, blocks: list[int]):
        """Of each step and block: the student's velocity against the straight one to where the teacher's flow ends, after
        the flow's own earlier blocks; and the loss's share in the whole (CausVid, section 4.3, but for the noise). Later
        blocks come from noise of their own, as in a rollout, since that of the flow tells of the blocks before."""
        v = functools.partial(velocity, "student", cond=cond)
        at = causal.at if causal else lambda *block: contextlib.nullcontext()
        with torch.no_grad():
            flow = functools.partial(guided, "teacher", cond=cond, scale=args.causal_init_guidance)
            starts, x0 = flow_trajectory(flow, tied_noise(noise(0), blocks[0]), grid, args.steps)
            context, kept, tokens = x0, [], tokens_of_frame(networks["student"], *x0.shape[3:])
            if args.context_noise:
                context = renoise(x0, args.context_noise / TIMESTEPS, noise(None))
            if len(blocks) > 1:
                with at(0, None, block_ends(blocks, tokens), kept):
                    v(context, args.context_noise)
        for k, (x_t, t) in enumerate(zip(starts, args.steps, strict=True), 1):
            for start, end in pairwise((0, *accumulate(blocks))):
                if start == blocks[0]:
                    x_t = renoise(x0, t / TIMESTEPS, noise(k))
                with at(start, first_tokens(kept, start * tokens)):
                    v_student = v(x_t[:, :, start:end], t)
                share = (end - start) / sum(blocks) / len(args.steps)
                v_flow = (x_t - x0)[:, :, start:end] * TIMESTEPS / t
                yield torch.nn.functional.mse_loss(v_student, v_flow), share

    # ---- Checkpoints and clips ----
    def check_losses(values: dict[str, float]):
        """Before anything is kept of a run that has gone wrong."""
        if odd := [name for name, value in values.items() if not math.isfinite(value)]:
            last = find_checkpoint(output_dir, "latest")
            raise SystemExit(f"{odd[0]} is not finite at step {step}; the last good checkpoint is {last}")

    def save():
        """Every process takes part: each knows its own place in the data."""
        encoder.flush()
        stream, faults = gather_states(batches, accelerator, together)
        state = {"stream": stream, "skipped": skipped + faults, "lr_schedule": lr_schedule.state_dict()}
        state |= {"scaler": None, "student_updates": updates}
        limit = args.checkpoints_total_limit
        folder = save_checkpoint(output_dir, step, saved, optimizers, state, limit, accelerator.is_main_process)
        accelerator.wait_for_everyone()
        return folder

    def averaged(wanted: bool):
        """Inside, the student is its moving average, and the average the student: twice would undo it."""
        return weights_exchanged(trained["student"], list(ema.values())) if wanted else contextlib.nullcontext()

    def export_student():
        """Files and usage; every process takes part, and the main one writes."""
        with averaged(args.use_ema):
            network = whole(networks["student"], WanTransformer3DModel)
            return export(args, output_dir, network) if accelerator.is_main_process else None

    drawn_blocks = block_lengths(
        latent_frames(args.validation_num_video_frames), args.num_frame_per_block, args.independent_first_frame
    )

    def draw(which: str, cond, steps: int, seeds: list[int], size):
        """Latents [B, C, F, h, w] by teacher, student or its average (ema), each with its own sampler."""
        rngs = [torch.Generator().manual_seed(seed) for seed in seeds]
        if which == "teacher":
            against = encoder.encode_text([args.validation_negative_prompt or args.negative_prompt])["prompt_embeds"]
            against = against.expand_as(cond)
            with active_adapter(layers, which), accelerator.autocast():
                return draw_teacher(args, networks[which], encoder.vae, scheduler, cond, against, steps, rngs, size)
        shape = latent_shape(networks["student"], vae_config, sum(drawn_blocks), size)
        noise = functools.cache(lambda k: torch.stack([torch.randn(shape, generator=rng) for rng in rngs]).to(device))
        with torch.no_grad(), averaged(which == "ema"):
            exits = [len(args.steps) - 1] * len(drawn_blocks)
            return torch.cat(list(student_rollout(cond, noise, drawn_blocks, exits)), 2)

    def clips(which: str, prompts: list[str], steps: int, seed: int, size=None) -> list:
        """[F, H, W, 3] in [0, 1] each; `steps` are the teacher's."""
        made, size = [], size or args.validation_resolution[0]
        for i in range(0, len(prompts), args.train_batch_size):  # what fits into memory in training fits here
            cond = encoder.encode_text(prompts[i : i + args.train_batch_size])["prompt_embeds"]
            seeds = [seed + i + k for k in range(len(cond))]
            made += decode(encoder.vae, draw(which, cond, steps, seeds, size))
        return made

    def evaluations(which: str, steps: int) -> int:
        """Of the transformer for a clip; a causal student's are of one block each, its context's among them."""
        if which == "teacher":
            return steps * (1 if args.validation_guidance == 1.0 else 2)
        return len(args.steps) * len(drawn_blocks) + len(drawn_blocks) - 1

    kept_clips = {}  # the teacher's, which do not change
    draws_clips = accelerator.is_main_process or sharded or together > 1  # what is split takes all processes

    def validate():
        """Clips of every prompt and size to disk, strips of their frames to the trackers, and signs of collapse."""
        prompts, seed, sheets = validation_prompts(args), args.validation_seed, []
        students = {"none": ["student"], "ema_only": ["ema"], "comparison": ["student", "ema"]}[args.ema_validation]
        students = students if args.use_ema else ["student"]
        for size in args.validation_resolution:
            rows, labels = [], []
            for which in students if args.disable_benchmark else [*students, "teacher"]:
                drawn = kept_clips.get((which, size)) or clips(which, prompts, FULL_STEPS, seed, size)
                if which == "teacher":
                    kept_clips[which, size] = drawn
                for i, (prompt, clip) in enumerate(zip(prompts, drawn, strict=True)):
                    rows.append([frame_strip(clip)])
                    labels.append(f"{which}: {prompt[:40]}")
                    name = f"{which}-{i:02d}-{size[1]}x{size[0]}"
                    if accelerator.is_main_process:
                        save_clip(clip, output_dir / "validation" / f"step-{step:06d}" / f"{name}.mp4")
            sheets.append(
                labelled_grid(rows, labels, [f"{size[1]}x{size[0]}, {args.validation_num_video_frames} frames"])
            )
        sheet = below_each_other(sheets)
        progress.picture(sheet, "clips", step)
        watch_collapse(students[0], prompts[:1] * 4)  # two seeds may look alike by chance
        if args.caches == "fill":
            encoder.release()
        return sheet

    def watch_collapse(which: str, prompts: list[str]):
        """One prompt with as many seeds, against the teacher's clips, or the student's at the first validation."""
        found = clip_statistics(clips(which, prompts, FULL_STEPS, args.validation_seed))
        if "reference" not in kept_clips:
            seen = None if args.disable_benchmark else clips("teacher", prompts, FULL_STEPS, args.validation_seed)
            kept_clips["reference"] = clip_statistics(seen) if seen else found
        progress.values({f"watch/{name}": value for name, value in found.items()}, step)
        for sign in signs_of_collapse(found, kept_clips["reference"]):
            say(f"warning at step {step}: {sign}")

    def report() -> str:
        """Of what is exported. Its files are the main process's; what others make of the same clips goes nowhere."""
        with averaged(args.use_ema), tempfile.TemporaryDirectory() as nowhere:
            folder = output_dir if accelerator.is_main_process else Path(nowhere)
            if args.toy and args.report_steps:  # its world can judge clips
                from tests.toy.report import report_clips

                return report_clips(args, clips, evaluations, folder)
            return clips_report(args, clips, evaluations, folder)

    # ---- Training loop ----
    progress, means = Progress(args, accelerator), Means(MEANS, device)
    count = sum(p.numel() for p in trained["student"])
    say(f"training {count:,} parameters of the student for {args.max_train_steps} steps of {batch} clips")
    bar = tqdm(total=args.max_train_steps, initial=step, disable=not accelerator.is_main_process, mininterval=1.0)
    started, timed = time.time(), step
    stop, stopping = StopSignal(), False
    while step < args.max_train_steps and not stopping:
        ode_turn = step < args.causal_init_steps
        student_turn = ode_turn or (step - args.causal_init_steps) % args.generator_update_interval == 0
        for part in range(args.gradient_accumulation_steps):
            # 1. Prompts, and each sample's own draws: they follow from the seed and its place in the global sequence
            try:
                samples = next(batches)
            except NoGoodSamples as error:
                raise SystemExit(f"{args.data_source}: {error}") from None
            draws = Draws(args.seed, [sample.position for sample in samples], device)
            cond = encoder.encode_text([sample.caption for sample in samples])["prompt_embeds"]
            dropped = (draws.uniform() < args.proportion_empty_prompts).to(device)
            cond = torch.where(expand_to(dropped, cond), empty, cond)
            blocks = blocks_of(args, latent_frames(samples[0].bucket[0]))
            shape = latent_shape(networks["student"], vae_config, sum(blocks), samples[0].bucket[1:])
            if tokens_of_frame(networks["student"], *shape[2:]) % together:
                size = "x".join(map(str, samples[0].bucket[:0:-1]))
                raise SystemExit(f"--context_parallel_degree {together}: must divide the tokens of a frame of {size}")
            noise = functools.cache(lambda k, draws=draws, shape=shape: draws.normal(*shape))
            torch.manual_seed(args.seed + samples[0].position)  # of dropout: a resumed run draws the same

            if ode_turn:
                with active_adapter(layers, "student"):
                    for loss, share in ode_losses(noise, cond, blocks):
                        (share * loss / args.gradient_accumulation_steps).backward()
                        means.add("ode_loss", loss, share)
                continue

            # 2. Rollout of the student, with a gradient where it is used
            turn = step * args.gradient_accumulation_steps + part
            exits = draw_exits(
                args.seed, turn, len(args.steps), len(blocks), args.same_step_across_blocks, args.last_step_only
            )
            first_trained = trained_from(args, sum(blocks))
            with torch.set_grad_enabled(student_turn):
                made = list(student_rollout(cond, noise, blocks, exits, first_trained))
            x_g = torch.cat(made, 2)[:, :, first_trained:]
            judged = [at for at, end in zip(exits, accumulate(blocks), strict=True) if end > first_trained]

            # 3. Student
            if student_turn:
                t, eps = draw_score(draws, judged, x_g.shape[1:])
                loss, gap = generator_loss(x_g, t.to(device), eps, cond)
                with active_adapter(layers, "student"):
                    (loss / args.gradient_accumulation_steps).backward()
                means.add("dmd_loss", loss)
                means.add_gaps(gap, t)

            # 4. Fake score, on the same clips
            t, eps = draw_score(draws, judged, x_g.shape[1:])
            loss = critic_loss(x_g.detach(), t.to(device), eps, cond)
            with active_adapter(layers, "fake_score"):
                (loss / args.gradient_accumulation_steps).backward()
            means.add("fake_score_loss", loss)

        # 5. Optimizers
        turns = [("student", args.max_grad_norm)] if student_turn else []
        turns += [] if ode_turn else [("fake_score", args.fake_score_grad_clip)]
        for name, most in turns:
            if not sharded:  # where it is done in backward()
                average_gradients(trained[name], processes, together)
            means.add(f"{name}_grad_norm", gradient_norm(trained[name]))
            clip_gradients(accelerator, trained[name], args.grad_clip_method, most)
            optimizers[name].step()
            optimizers[name].zero_grad()
        lr_schedule.step()
        step += 1
        bar.update()

        # 6. EMA, of the student's updates alone; it starts where the causal student's regression ends
        updates += student_turn and not ode_turn
        if args.use_ema and (ode_turn or student_turn and updates % args.ema_update_interval == 0):
            decay = 0.0 if ode_turn else args.ema_decay**args.ema_update_interval
            update_ema(
                list(ema.values()),
                [p.detach().to(average.device) for p, average in zip(trained["student"], ema.values(), strict=True)],
                decay,
            )

        checkpoint = args.checkpointing_steps and step % args.checkpointing_steps == 0 or step == args.max_train_steps
        if step % LOG_EVERY == 0 or checkpoint:
            values = means.read(accelerator)
            check_losses(values)
            rate, started, timed = (step - timed) * batch / (time.time() - started), time.time(), step
            bar.set_postfix(
                clips_per_s=f"{rate:.2f}", **{k: f"{v:.3g}" for k, v in values.items() if k.endswith("loss")}
            )
            progress.values(values | {"lr": lr_schedule.get_last_lr()[0], "clips_per_s": rate}, step)
        if args.validation_steps and step % args.validation_steps == 0 and draws_clips:
            validate()
        if checkpoint and step < args.max_train_steps:
            save()
            exported = export_student() if args.push_checkpoints_to_hub else None
            if repository and exported:
                push_to_hub(args, repository, exported[0], f"Step {step}", fatal=False)
        if processes == 1 or step % LOG_EVERY == 0:
            stopping = stop.agreed(accelerator)
    bar.close()

    # ---- The end: a checkpoint always, the model where training is complete ----
    if step == first_step and Path(output_dir, f"checkpoint-{step}", "state.json").exists():  # nothing was trained
        say(f"checkpoint-{step} is already there")
    else:
        check_losses(means.read(accelerator))
        say(f"saved {save()}")
    stop.over()
    _, faults = gather_states(batches, accelerator, together)
    for cause, number in (skipped + faults).most_common():
        say(f"skipped {number} x {cause}")
    if stopping:
        say("stopped by a signal; go on with --resume_from_checkpoint latest")
    else:
        sheet = validate() if draws_clips else None
        exported = export_student()
        results = report() if draws_clips else ""
    if not stopping and accelerator.is_main_process:
        say(results)
        sheet.save(output_dir / "samples.png")
        files, usage = exported
        write_model_card(
            output_dir, title=f"DMD of {Path(args.pretrained_teacher_model).name}", tags=["dmd", args.model_type],
            usage=usage, settings=vars(args), results=results, picture="samples.png",
        )  # fmt: skip
        if repository:
            push_to_hub(
                args, repository, ["README.md", "samples.png", "report.*", "side_by_side.*", *files], "Distilled model"
            )
        say(f"\nThe model is in {output_dir}:\n\n{usage}")
    accelerator.wait_for_everyone()
    progress.end(step, stopping)


if __name__ == "__main__":
    main(parse_args())
