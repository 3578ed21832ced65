"""Latent consistency distillation of Stable Diffusion 1.x and 2.x.

Latent Consistency Models (Luo et al. 2023, arXiv 2310.04378, algorithm 1); LCM-LoRA (arXiv 2311.05556).

Networks
    teacher   the frozen diffusion U-Net
    student   full: a copy that also takes the guidance w; lora: the teacher itself with adapters switched on
    target    moving average (EMA) of the student; where ema_decay is 0, the student without gradient

Algorithm, for each batch of latents and prompts
    index ~ U{0..N-1},  t = grid[index],  w ~ U[w_min, w_max],  eps ~ N(0, 1)
    x_t       = alpha_t * latents + sigma_t * eps
    out       = out_cond + w * (out_cond - out_uncond)                      teacher, at x_t
    x_prev    = DDIM step from t to t_prev with the teacher's x0 and eps
    f(x, t)   = c_skip(t) * x + c_out(t) * x0(x, t, prompt, w)              so that f(x, 0) = x
    loss      = d(f_student(x_t, t), f_target(x_prev, t_prev))
    target    = ema_decay * target + (1 - ema_decay) * student

Guidance
    w is the paper's: cond + w * (cond - uncond). The usual guidance_scale is 1 + w, also at inference: a full student
    trained with w in [w_min, w_max] takes guidance_scale in [1 + w_min, 1 + w_max]; a LoRA takes guidance_scale 1.

Launch
    accelerate launch train_lcm_distill_sd.py                               distils the toy teacher, on a CPU, in minutes
    accelerate launch train_lcm_distill_sd.py --pretrained_teacher_model runwayml/stable-diffusion-v1-5 \\
        --train_shards_path_or_url "data/{00000..00099}.tar" --resolution 512 --mixed_precision bf16

To fork it for another model, edit "The model" and the flags above it; the rest asks nothing of the model.
"""

import argparse
import contextlib
import copy
import functools
import json
import math
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.training_utils import cast_training_params
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from tqdm import tqdm
from transformers import AutoTokenizer, CLIPTextModel

from common.cache import identity, weights_identity
from common.checkpoint import StopSignal, find_checkpoint, resume, save_checkpoint
from common.data.buckets import Rules, target_size
from common.data.datasets import check_data_flags, plan_buckets
from common.data.encoder import SampleEncoder, open_stores
from common.data.samples import ImageReader, NoGoodSamples, open_readers
from common.data.stream import gather_states, open_batches
from common.draws import draw_for, draw_rollout, stack
from common.export import create_hub_repository, push_to_hub, save_kohya_lora, write_model_card
from common.flags import (
    add_shared_flags,
    check_lcm_flags,
    check_shared_flags,
    middle_w,
    parse_with_config,
    wanted_student,
)
from common.losses import consistency_loss
from common.networks import (
    adapters_off,
    dropout_off,
    guidance_embedding,
    quantize,
    speed_up,
    weights_copy,
    weights_exchanged,
    with_uncond,
)
from common.optim import clip_gradients, make_optimizer, make_schedule, update_ema
from common.pictures import comparison, open_preview, validation_prompts
from common.report import hold_out, open_clip, stable_loss, steps_report
from common.run import set_up_device
from common.solvers import (
    DDIMSolver,
    boundary_scalings,
    check_schedule,
    expand_to,
    roll_out,
    student_scheduler,
    to_x0_eps,
)
from common.tracking import Progress, errors_to_webhook

LORA_TARGETS = (
    "to_q,to_k,to_v,to_out.0,proj_in,proj_out,ff.net.0.proj,ff.net.2,conv1,conv2,conv_shortcut,"
    "downsamplers.0.conv,upsamplers.0.conv,time_emb_proj"
)
TOY = Path(__file__).parent / "tests" / "toy"
LOG_EVERY = 10  # optimizer steps; the only place where the loop waits for the device


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    # fmt: off
    add = parser.add_argument_group("models").add_argument
    add("--pretrained_teacher_model", type=str, help="folder or hub name of the pipeline; default: the toy teacher, by its own recipe")
    add("--teacher_revision", type=str, help="the teacher's branch, tag or commit on the hub")
    add("--pretrained_vae_model_name_or_path", type=str, help="another VAE; default: the teacher's")
    add("--revision", type=str, help="that VAE's branch, tag or commit on the hub")
    add("--resolution", type=int, default=512, help="training pixels, a multiple of 8")

    add = parser.add_argument_group("student").add_argument
    add("--model_type", type=str, choices=["full", "lora"], help="default: lora where a --lora_* flag or --use_dora is given, else full")
    add("--unet_time_cond_proj_dim", type=int, default=256, help="full: width of the guidance embedding")
    add("--ema_decay", type=float, help="of the target, per optimizer step; default: full 0.95, lora 0, no average")
    add("--lora_rank", type=int, help="default 64")
    add("--lora_alpha", type=int, help="default 64; the adapter is scaled by alpha / rank")
    add("--lora_dropout", type=float, help="default 0")
    add("--lora_target_modules", type=str, help=f"names or suffixes of modules, with commas; default {LORA_TARGETS}")
    add("--use_dora", action="store_true", help="weight-decomposed LoRA")
    add("--lora_type", type=str, choices=["standard"], help="standard: PEFT's, the only kind")
    add("--export_pipeline", action="store_true", help="full: write all of the pipeline, in fp32, so that from_pretrained(OUTPUT_DIR) loads it; default: the U-Net and its scheduler alone")
    add("--export_formats", type=str, default="diffusers", choices=["diffusers", "kohya", "diffusers,kohya"], metavar="FORMATS", help="diffusers, or diffusers,kohya; of a LoRA: kohya writes a second file, for A1111 and ComfyUI")

    add = parser.add_argument_group("latent consistency distillation").add_argument
    add("--w_min", type=float, default=5.0, help="smallest guidance w; guidance_scale = 1 + w")
    add("--w_max", type=float, default=15.0, help="largest guidance w; guidance_scale = 1 + w")
    add("--num_ddim_timesteps", type=int, default=50, help="N, steps of the teacher's solver; must divide its timesteps")
    add("--loss_type", type=str, default="l2", choices=["l2", "huber"])
    add("--huber_c", type=float, default=0.001, help="c of sqrt(d^2 + c^2) - c; smaller is nearer to |d|")
    add("--diff2flow_loss", action="store_true", help="distance of flow velocities eps - x0, which is that of x0 times (alpha + sigma) / sigma")
    add("--scheduled_sampling_max_step_offset", type=int, default=0, help="rollout: the student makes x_t itself, from up to so many solver steps above t; 0 for never")
    add("--scheduled_sampling_probability", type=float, default=0.0, help="share of samples that are rolled out, 0 to 1")
    add("--scheduled_sampling_strategy", type=str, default="uniform", choices=["uniform", "biased_early", "biased_late"], help="rollouts of all lengths alike, mostly short ones, mostly long ones")
    add("--timestep_scaling_factor", type=float, default=10.0, help="s of c_skip and c_out; larger makes c_skip fall faster")
    add("--cast_teacher_unet", action=argparse.BooleanOptionalAction, default=True, help="keep the teacher in --mixed_precision; --no-cast_teacher_unet: in fp32, under autocast")
    # fmt: on
    add_shared_flags(parser)

    args = parse_with_config(parser, argv, family="sd", method="lcm", recipe=toy_recipe)
    check_shared_flags(parser, args)
    check_lcm_flags(parser, args, LORA_TARGETS)
    if args.resolution < 8 or args.resolution % 8:
        parser.error(f"--resolution {args.resolution}: must be a multiple of 8, the VAE's factor")
    if args.text_encoder_2_precision != "no_change":
        args.notes.append("--text_encoder_2_precision: no job, Stable Diffusion has one text encoder")
    rules = Rules(args.resolution, alignment=8, crop_style="center" if args.center_crop else "random")
    check_data_flags(parser, args, rules)
    args.validation_resolution = args.validation_resolution or [target_size(1, 1, rules)]
    return args


def toy_recipe(args) -> dict:
    recipe = json.loads((TOY / "sd_recipe.json").read_text())
    paths = {"pretrained_teacher_model": str(TOY / "sd")}
    if args.data_backend_config is None:
        paths["train_shards_path_or_url"] = str(TOY / "shards/{00000..00003}.tar")
    return paths | recipe["shared"] | recipe[args.model_type or wanted_student(args)]


# =====================================================================================================================
# The model: what a fork for another one edits
# =====================================================================================================================

PIPELINE = StableDiffusionPipeline
TEXT_FOLDERS = ("text_encoder", "tokenizer")
COMPILED_BLOCKS = ("BasicTransformerBlock", "ResnetBlock2D")
TOY_SIZES = ((64, 64),)  # height, width
PREVIEW_MODEL = "madebyollin/taesd"


def hub_options(args) -> dict:
    return {"revision": args.teacher_revision, "cache_dir": args.cache_dir}


def load_scheduler(args) -> DDIMScheduler:
    return DDIMScheduler.from_pretrained(args.pretrained_teacher_model, subfolder="scheduler", **hub_options(args))


def load_unet(args, dtype: torch.dtype) -> UNet2DConditionModel:
    unet, loading = UNet2DConditionModel.from_pretrained(
        args.pretrained_teacher_model, subfolder="unet", dtype=dtype, output_loading_info=True, **hub_options(args)
    )
    missing, unexpected = loading["missing_keys"], loading["unexpected_keys"]
    if missing or unexpected:  # diffusers only warns, and leaves what is missing at random
        raise SystemExit(f"the teacher's weights do not fit its config: {missing} missing, {unexpected} unexpected")
    return unet.requires_grad_(False).eval()


def vae_source(args) -> dict:
    if args.pretrained_vae_model_name_or_path:
        return {"model": args.pretrained_vae_model_name_or_path, "subfolder": None, "revision": args.revision}
    return {"model": args.pretrained_teacher_model, "subfolder": "vae", "revision": args.teacher_revision}


def vae_dtype(args, weight_dtype: torch.dtype) -> torch.dtype:
    return weight_dtype


def load_vae(args, device, dtype: torch.dtype) -> AutoencoderKL:
    source = vae_source(args)
    vae = AutoencoderKL.from_pretrained(
        source["model"], subfolder=source["subfolder"], revision=source["revision"], cache_dir=args.cache_dir,
        dtype=dtype,
    )  # fmt: skip
    return vae.requires_grad_(False).eval().to(device, memory_format=torch.channels_last)


def load_text_encoder(args, device, dtype: torch.dtype):
    name = args.pretrained_teacher_model
    tokenizer = AutoTokenizer.from_pretrained(name, subfolder="tokenizer", use_fast=False, **hub_options(args))
    encoder = CLIPTextModel.from_pretrained(name, subfolder="text_encoder", dtype=dtype, **hub_options(args))
    quantize(encoder, args.text_encoder_1_precision, "cpu" if args.quantize_via == "cpu" else device)
    return tokenizer, encoder.requires_grad_(False).eval().to(device)


def encode_prompts(text_encoder, prompts: list[str]) -> dict[str, torch.Tensor]:
    tokenizer, encoder = text_encoder
    tokens = tokenizer(
        prompts, padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
    )
    mask = tokens.attention_mask if getattr(encoder.config, "use_attention_mask", False) else None
    return {"prompt_embeds": encoder(tokens.input_ids.to(encoder.device), attention_mask=mask)[0]}


def encode_empty_prompt(args, encoder: SampleEncoder) -> dict[str, torch.Tensor]:
    """What guidance leads away from."""
    return encoder.encode_text([""])


def encode_pixels(vae, pixels) -> dict[str, torch.Tensor]:
    """Scaled mean and deviation, so that each visit of an image samples anew. [B, 3, H, W] -> [B, C, h, w] each."""
    posterior = vae.encode(pixels.to(vae.device, vae.dtype, memory_format=torch.channels_last)).latent_dist
    return {name: getattr(posterior, name) * vae.config.scaling_factor for name in ("mean", "std")}


def add_guidance_input(teacher: UNet2DConditionModel, time_cond_proj_dim: int) -> UNet2DConditionModel:
    """An fp32 copy of the teacher that also takes w; its new projection is zero, so that it starts as the teacher."""
    config = dict(teacher.config) | {"time_cond_proj_dim": time_cond_proj_dim}
    student = UNet2DConditionModel.from_config(config)
    missing, unexpected = student.load_state_dict(teacher.state_dict(), strict=False)
    if unexpected or set(missing) - {"time_embedding.cond_proj.weight"}:
        raise SystemExit(f"the student does not fit its teacher: {missing} missing, {unexpected} unexpected")
    if missing:
        torch.nn.init.zeros_(student.time_embedding.cond_proj.weight)
    return student


def add_lora(teacher: UNet2DConditionModel, args) -> UNet2DConditionModel:
    """The teacher itself, with fp32 adapters that start at zero."""
    modules = [name.strip() for name in args.lora_target_modules.split(",")]
    teacher.add_adapter(
        LoraConfig(
            r=args.lora_rank, lora_alpha=args.lora_alpha, lora_dropout=args.lora_dropout, use_dora=args.use_dora,
            target_modules=modules,
        )
    )  # fmt: skip
    cast_training_params(teacher, dtype=torch.float32)
    return teacher


def conditions(text: dict[str, torch.Tensor], images: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """All that the U-Net is told of a batch, but for x, t and w."""
    return text


def predict(unet, x, t, cond: dict[str, torch.Tensor], w_embedding=None):
    """The network's output at x_t: noise, velocity or clean sample, whichever the teacher was trained on."""
    embeds = cond["prompt_embeds"]
    return unet(x.to(embeds.dtype), t, encoder_hidden_states=embeds, timestep_cond=w_embedding).sample


@torch.no_grad()
def draw(args, vae, unet, scheduler, text, negative, steps: int, guidance_scale: float, seed: int, size, callback):
    """Pictures [height, width] by the stock pipeline, one per row of text; picture i starts from noise of seed + i."""
    pipeline = PIPELINE(
        vae, None, None, unet, scheduler, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )
    pipeline.set_progress_bar_config(disable=True)
    count, (height, width) = len(text["prompt_embeds"]), size
    return pipeline(
        prompt_embeds=text["prompt_embeds"], negative_prompt_embeds=negative["prompt_embeds"].repeat(count, 1, 1),
        height=height, width=width, num_inference_steps=steps, guidance_scale=guidance_scale,
        generator=[torch.Generator().manual_seed(seed + i) for i in range(count)], callback_on_step_end=callback,
    ).images  # fmt: skip


def export(args, folder: Path, unet, scheduler) -> tuple[list[str], str]:
    """Writes what stock diffusers loads. Returns the files' names and the lines of code that load them."""
    student_scheduler(args, scheduler).save_pretrained(folder / "scheduler")
    base = args.pretrained_teacher_model
    if args.model_type == "lora":
        layers = {name: value.contiguous() for name, value in get_peft_model_state_dict(unet).items()}
        adapter = unet.peft_config["default"].to_dict()
        adapter = {key: sorted(value) if isinstance(value, set) else value for key, value in adapter.items()}
        PIPELINE.save_lora_weights(folder, unet_lora_layers=layers, unet_lora_adapter_metadata=adapter)
        files = ["pytorch_lora_weights.safetensors"]
        if "kohya" in args.export_formats:
            files.append("kohya_lora.safetensors")
            save_kohya_lora(folder / files[-1], unet, layers, args.lora_rank, args.lora_alpha, sgm=False)
        load = f'pipeline = {PIPELINE.__name__}.from_pretrained("{base}")\n'
        load += f'pipeline.load_lora_weights("{folder}", weight_name="{files[0]}")\n'
        scale = 1.0
    else:
        unet.save_pretrained(folder)
        copy.deepcopy(unet).to(torch.float16).save_pretrained(folder, variant="fp16")
        files = ["config.json", "diffusion_pytorch_model*.safetensors*"]
        load = (
            f'unet = UNet2DConditionModel.from_pretrained("{folder}")\n'
            f'pipeline = {PIPELINE.__name__}.from_pretrained("{base}", unet=unet)\n'
        )
        scale = 1.0 + middle_w(args)
        if args.export_pipeline:
            replaced = {"unet": unet, "scheduler": student_scheduler(args, scheduler)}
            if args.pretrained_vae_model_name_or_path:
                replaced["vae"] = load_vae(args, unet.device, torch.float32)
            whole = PIPELINE.from_pretrained(base, dtype=torch.float32, **replaced, **hub_options(args))
            whole.save_pretrained(folder)
            files += ["model_index.json", *whole.components]
            load = f'pipeline = {PIPELINE.__name__}.from_pretrained("{folder}")\n'
    usage = (
        f"from diffusers import LCMScheduler, {PIPELINE.__name__}, UNet2DConditionModel\n\n{load}"
        f'pipeline.scheduler = LCMScheduler.from_pretrained("{folder}", subfolder="scheduler")\n'
        f'image = pipeline("your prompt", num_inference_steps=4, guidance_scale={scale}).images[0]\n'
    )
    return ["scheduler", *files], usage


# =====================================================================================================================
# Training
# =====================================================================================================================


def load_networks(args, accelerator, weight_dtype):
    """Teacher, student and target. With LoRA all three are one U-Net."""
    lora = args.model_type == "lora"
    # channels_last is faster on CUDA and CPU, but DoRA's norms view convolutions as matrices
    layout = {"memory_format": torch.preserve_format if args.use_dora else torch.channels_last}
    teacher = load_unet(args, weight_dtype if lora or args.cast_teacher_unet else torch.float32)
    # The student starts from the weights as they are on disk, not from what the teacher's precision leaves of them
    student = None if lora else add_guidance_input(load_unet(args, torch.float32), args.unet_time_cond_proj_dim)
    quantize(teacher, args.base_model_precision, "cpu" if args.quantize_via == "cpu" else accelerator.device)
    teacher.to(accelerator.device, **layout)
    student = add_lora(teacher, args) if lora else student
    student.to(accelerator.device, **({} if lora else layout))
    target = student if lora else copy.deepcopy(student).requires_grad_(False).eval()
    speed_up(args, (teacher, student, target), COMPILED_BLOCKS, accelerator.print)
    if args.gradient_checkpointing:
        student.enable_gradient_checkpointing()
    return teacher, student.train(), target


def open_encoder(args, accelerator, weight_dtype) -> tuple[SampleEncoder, list[ImageReader]]:
    """What turns samples into latents and embeddings, and each dataset's reader; with full caches unless told otherwise."""
    device = accelerator.device
    plan_buckets(args, accelerator)
    readers = open_readers(args)
    latents, text = None, None
    if args.caches != "off":
        vae_weights = weights_identity(**vae_source(args))
        text_weights = [weights_identity(args.pretrained_teacher_model, f, args.teacher_revision) for f in TEXT_FOLDERS]
        dtype = vae_dtype(args, weight_dtype)
        identities = [identity(vae=vae_weights, geometry=reader.geometry(), dtype=dtype) for reader in readers]
        precisions = [args.text_encoder_1_precision, args.text_encoder_2_precision]
        text_identity = identity(text=text_weights, dtype=weight_dtype, precisions=precisions)
        latents, text = open_stores(args, identities, text_identity)
        readers = [replace(reader, cache=store) for reader, store in zip(readers, latents, strict=True)]
    encoder = SampleEncoder(
        load_vae=lambda: load_vae(args, device, vae_dtype(args, weight_dtype)),
        encode_pixels=encode_pixels,
        load_text=lambda: load_text_encoder(args, device, weight_dtype),
        encode_prompts=encode_prompts,
        latents=latents,
        text=text,
        vae_batch_size=args.vae_encode_batch_size,
        device=device,
    )
    if args.caches == "fill":
        prompts = ["", args.validation_negative_prompt or "", *validation_prompts(args)]
        filling = [replace(reader, filling=True) for reader in readers]
        encoder.fill(accelerator, args.datasets, filling, prompts, args.dataloader_num_workers)
    return encoder, readers


@errors_to_webhook
def main(args):
    # ---- Set-up ----
    output_dir = Path(args.output_dir)
    accelerator = Accelerator(
        mixed_precision=args.mixed_precision,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        log_with=None if args.report_to == "none" else args.report_to.split(","),
        project_config=ProjectConfiguration(args.output_dir, str(output_dir / args.logging_dir)),
    )
    say, device, processes = accelerator.print, accelerator.device, accelerator.num_processes
    for line in args.notes:
        say(line)
    weight_dtype = set_up_device(args, accelerator)
    repository = create_hub_repository(args) if args.push_to_hub and accelerator.is_main_process else None

    # ---- Noise schedule, solver, networks ----
    scheduler = load_scheduler(args)
    prediction_type = scheduler.config.prediction_type
    abar = scheduler.alphas_cumprod.float()
    check_schedule(abar, prediction_type, args.num_ddim_timesteps)
    solver = DDIMSolver(abar, args.num_ddim_timesteps).to(device)
    alphas, sigmas = abar.sqrt().to(device), (1.0 - abar).sqrt().to(device)
    lora = args.model_type == "lora"
    teacher, network, target = load_networks(args, accelerator, weight_dtype)

    # ---- Optimizer ----
    trained = [p for p in network.parameters() if p.requires_grad]
    average = target if not lora else weights_copy(network, device) if args.ema_decay else None
    averaged = [] if average is None else list(average.parameters())
    batch = args.train_batch_size * args.gradient_accumulation_steps * processes  # of one optimizer step
    if args.max_train_steps is None:
        args.max_train_steps = args.num_train_epochs * max(1, args.num_samples // batch)
    optimizer = make_optimizer(args, trained, args.learning_rate * (batch if args.scale_lr else 1), device)
    lr_schedule = make_schedule(args, optimizer)
    student, optimizer = accelerator.prepare(network, optimizer)
    saved = {"student": network} | ({"target": average} if averaged else {})

    def as_target():
        """Inside, a LoRA's weights are their moving average. Of a full student that is a network of its own."""
        return weights_exchanged(trained, averaged) if lora and averaged else contextlib.nullcontext()

    # ---- Resume ----
    state = resume(args, accelerator, saved, {"student": optimizer.optimizer}, lr_schedule)
    first_step = step = state["step"]
    skipped = Counter(state["skipped"])

    # ---- Data: lists of samples, each with latents from the cache or with pixels ----
    encoder, readers = open_encoder(args, accelerator, weight_dtype)
    uncond = encode_empty_prompt(args, encoder)
    held_out, readers = hold_out(args, readers)
    batches = open_batches(args, accelerator, readers, state["stream"])

    # ---- Checkpoints and pictures ----
    def save():
        """Every process takes part: states may be sharded, and each knows its own place in the data."""
        encoder.flush()
        stream, faults = gather_states(batches, accelerator)
        state = {
            "stream": stream,
            "skipped": skipped + faults,
            "lr_schedule": lr_schedule.state_dict(),
            "scaler": accelerator.scaler.state_dict() if accelerator.scaler is not None else None,
        }
        optimizers, limit = {"student": optimizer.optimizer}, args.checkpoints_total_limit
        folder = save_checkpoint(output_dir, step, saved, optimizers, state, limit, accelerator.is_main_process)
        accelerator.wait_for_everyone()
        return folder

    def pictures(which: str, prompts: list[str], steps: int, seed: int, guidance_scale=None, size=None, callback=None):
        """By `teacher` or `student`, each with its own sampler."""
        text, negative, with_teacher = encoder.encode_text(prompts), uncond, which == "teacher"
        sampler = scheduler if with_teacher else student_scheduler(args, scheduler)
        if with_teacher and args.validation_negative_prompt:
            negative = encoder.encode_text([args.validation_negative_prompt])
        if guidance_scale is None:
            guidance_scale = 1.0 if lora and not with_teacher else 1.0 + middle_w(args)
        unet, size = teacher if with_teacher else target, size or args.validation_resolution[0]
        unet.eval()
        whose = adapters_off(unet, lora) if with_teacher else as_target()
        with accelerator.autocast(), whose:
            drawn = draw(args, encoder.vae, unet, sampler, text, negative, steps, guidance_scale, seed, size, callback)
        network.train()
        return drawn

    teacher_rows = {}  # its pictures do not change

    def validate():
        sheet, scores = comparison(args, pictures, teacher_rows, preview, clip)
        progress.picture(sheet, "grid", step)
        if scores:
            progress.values(scores, step)
        if args.caches == "fill":
            encoder.release()
        return sheet

    # ---- Algorithm 1, from a batch and its draws to the distance ----
    def lcm_loss(images, text, index, w, latent_noise, eps, rollout=None):
        # 2. Noisy latents, fp32
        cond = conditions(text, images)
        w_embedding = None if lora else guidance_embedding(w, args.unet_time_cond_proj_dim)
        latents = images["mean"].float() + images["std"].float() * latent_noise
        t, t_prev = solver.timesteps[index], solver.timesteps_prev[index]
        x_t = expand_to(alphas[t], latents) * latents + expand_to(sigmas[t], latents) * eps

        def f(unet, x, t):
            out = predict(unet, x, t, cond, w_embedding)
            x0, _ = to_x0_eps(out, x, alphas[t], sigmas[t], prediction_type)
            c_skip, c_out = (expand_to(c, x) for c in boundary_scalings(t, args.timestep_scaling_factor))
            return c_skip * x + c_out * x0

        with torch.no_grad(), accelerator.autocast():
            if rollout:  # scheduled sampling: some of x_t are what the student itself makes of more noise
                with dropout_off(network, args.lora_dropout):
                    f_student = functools.partial(f, student)
                    x_t = roll_out(f_student, solver, alphas, sigmas, x_t, latents, eps, index, *rollout)

            # 3. Teacher with guidance: both halves in one forward, whose peak is below that of the student's backward
            with adapters_off(teacher, lora):
                both = predict(teacher, torch.cat([x_t, x_t]), torch.cat([t, t]), with_uncond(cond, uncond))
            out_cond, out_uncond = both.float().chunk(2)
            out = out_cond + expand_to(w, x_t) * (out_cond - out_uncond)
            x0_teacher, eps_teacher = to_x0_eps(out, x_t, alphas[t], sigmas[t], prediction_type)

            # 4. One solver step
            x_prev = solver.step(x0_teacher, eps_teacher, index)

            # 5. Target at x_prev
            with dropout_off(network, args.lora_dropout), as_target():
                f_target = f(target, x_prev, t_prev)

        # 6. Student at x_t
        f_student = f(student, x_t, t)
        if args.diff2flow_loss:  # v = eps - x0, with the eps that x_t and x0 leave
            both = [to_x0_eps(x0, x_t, alphas[t], sigmas[t], "sample") for x0 in (f_student, f_target)]
            f_student, f_target = (eps - x0 for x0, eps in both)
        return consistency_loss(f_student, f_target, args.loss_type, args.huber_c)

    # ---- Training loop ----
    progress, clip = Progress(args, accelerator), open_clip(args, accelerator)
    preview = open_preview(args, PREVIEW_MODEL, accelerator, lambda *shown: progress.picture(*shown, step, "debug"))
    say(f"training {sum(p.numel() for p in trained):,} parameters for {args.max_train_steps} steps of {batch} samples")
    bar = tqdm(total=args.max_train_steps, initial=step, disable=not accelerator.is_main_process, mininterval=1.0)
    loss_sum, started = torch.zeros((), device=device), time.time()
    stop, stopping = StopSignal(), False
    while step < args.max_train_steps and not stopping:
        with accelerator.accumulate(student):
            # 1. A batch, and each sample's own draws: they follow from the seed and its place in the global sequence
            try:
                samples = next(batches)
            except NoGoodSamples as error:
                raise SystemExit(f"{args.data_source}: {error}") from None
            images, text = encoder.encode_images(samples), encoder.encode_text([sample.caption for sample in samples])
            shape, positions = images["mean"][0].shape, [sample.position for sample in samples]
            index, w, dropped, latent_noise, eps = stack([draw_for(args, p, shape) for p in positions], device)
            text = {name: torch.where(expand_to(dropped, v), uncond[name], v) for name, v in text.items()}
            rollout = None
            if args.scheduled_sampling_probability:
                rollout = stack([draw_rollout(args, p, shape) for p in positions], device)

            # 2. to 6.
            torch.manual_seed(args.seed + positions[0])  # of dropout: a resumed run draws the same
            loss = lcm_loss(images, text, index, w, latent_noise, eps, rollout)

            # 7. Optimizer and EMA
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                clip_gradients(accelerator, trained, args.grad_clip_method, args.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            loss_sum += loss.detach()
        if not accelerator.sync_gradients:
            continue
        if not accelerator.optimizer_step_was_skipped:  # fp16's scaler found an overflow
            lr_schedule.step()
            if averaged:
                update_ema(averaged, trained, args.ema_decay)
        step += 1
        bar.update()

        if step % LOG_EVERY == 0 or step == args.max_train_steps:
            steps = step % LOG_EVERY or LOG_EVERY
            mean = accelerator.reduce(loss_sum, "mean").item() / (steps * args.gradient_accumulation_steps)
            if not math.isfinite(mean):
                last = find_checkpoint(output_dir, "latest")
                raise SystemExit(f"the loss is not finite at step {step}; the last good checkpoint is {last}")
            rate = steps * batch / (time.time() - started)
            bar.set_postfix(loss=f"{mean:.4g}", samples_per_s=f"{rate:.1f}")
            progress.values({"loss": mean, "lr": lr_schedule.get_last_lr()[0], "samples_per_s": rate}, step)
            loss_sum, started = torch.zeros((), device=device), time.time()
        if args.eval_steps and step % args.eval_steps == 0:
            progress.values(stable_loss(args, lcm_loss, network, held_out, encoder), step)
        if args.validation_steps and step % args.validation_steps == 0 and accelerator.is_main_process:
            validate()
        if args.checkpointing_steps and step % args.checkpointing_steps == 0 and step < args.max_train_steps:
            save()
            if args.push_checkpoints_to_hub and repository:
                with as_target():
                    files, _ = export(args, output_dir, target, scheduler)
                push_to_hub(args, repository, files, f"Step {step}", fatal=False)
        if processes == 1 or step % LOG_EVERY == 0:
            stopping = stop.agreed(accelerator)
    bar.close()

    # ---- The end: a checkpoint always, the model where training is complete ----
    if step == first_step and Path(output_dir, f"checkpoint-{step}", "state.json").exists():  # nothing was trained
        say(f"checkpoint-{step} is already there")
    else:
        say(f"saved {save()}")
    stop.over()
    _, faults = gather_states(batches, accelerator)
    for cause, count in (skipped + faults).most_common():
        say(f"skipped {count} x {cause}")
    if stopping:
        say("stopped by a signal; go on with --resume_from_checkpoint latest")
    elif accelerator.is_main_process:
        validate().save(output_dir / "samples.png")
        with as_target():
            files, usage = export(args, output_dir, target, scheduler)
        if args.toy and args.report_steps:  # its world can judge pictures
            from tests.toy.report import report

            results = report(pictures, clip, output_dir, args.report_steps, TOY_SIZES)
        else:
            results = steps_report(args, pictures, clip, output_dir)
        write_model_card(
            output_dir, title=f"LCM of {Path(args.pretrained_teacher_model).name}", tags=["lcm", args.model_type],
            usage=usage, settings=vars(args), results=results, picture="samples.png",
        )  # fmt: skip
        if repository:
            push_to_hub(args, repository, ["README.md", "samples.png", "report.*", *files], "Distilled model")
        say(f"\nThe model is in {output_dir}:\n\n{usage}")
    accelerator.wait_for_everyone()
    progress.end(step, stopping)


if __name__ == "__main__":
    main(parse_args())
