"""Latent consistency distillation of Stable Diffusion 1.x and 2.x.

Latent Consistency Models (Luo et al. 2023, arXiv 2310.04378, algorithm 1); LCM-LoRA (arXiv 2311.05556).

Networks
    teacher   the frozen diffusion U-Net
    student   full: a copy that also takes the guidance w; lora: the teacher itself with adapters switched on
    target    the student's moving average (EMA), which is validated and exported; with LoRA that of the adapters, or,
              with its default ema_decay of 0, the student itself without gradient

Algorithm, for each batch of latents and prompts
    1. draws      index ~ U{0..N-1},  t = grid[index],  w ~ U[w_min, w_max],  eps ~ N(0, 1)
    2. noising    x_t = alpha_t * latents + sigma_t * eps
    3. teacher    out = out_cond + w * (out_cond - out_uncond), at x_t
    4. solver     x_prev = DDIM step from t to t_prev with the teacher's x0 and eps
    5. target     f_target(x_prev, t_prev)
    6. student    loss = d(f_student(x_t, t), f_target(x_prev, t_prev))
    7. update     optimizer step, then target = ema_decay * target + (1 - ema_decay) * student
    grid are N of the teacher's T timesteps, rising to T - 1; t_prev is the one before t, and 0 before the first.
    f(x, t) = c_skip(t) * x + c_out(t) * x0(x, t, prompt, w) with c_skip = 0.25 / ((s t)^2 + 0.25) and
    c_out = s t / sqrt((s t)^2 + 0.25), so that f(x, 0) = x; d is the mean square or Huber distance.

Guidance
    w is the paper's: cond + w * (cond - uncond). The usual guidance_scale is 1 + w, also at inference: a full student
    trained with w in [w_min, w_max] takes guidance_scale in [1 + w_min, 1 + w_max]. A LoRA is not told w and learns a
    mixture over the range, which w_min = w_max makes one w; it takes guidance_scale 1.

Precision
    Trained weights, their moments and the average are fp32, and so are noising, solver and loss: bf16 has neither the
    small sigmas nor the small differences. Teacher and encoders are in --mixed_precision (--no-cast_teacher_unet: the
    teacher in fp32); all forwards run under autocast, the student's by accelerate, which prepared it.

Checkpoints
    hold what is trained (of a LoRA the adapters), the average, optimizer, scaler, rate schedule, step, place in the
    data and counts of skipped samples. Random draws follow from the seed and a sample's position: they have no state.

Launch
    accelerate launch train_lcm_distill_sd.py                              distils the toy teacher, on a CPU, in minutes
    accelerate launch train_lcm_distill_sd.py --pretrained_teacher_model runwayml/stable-diffusion-v1-5 \\
        --train_shards_path_or_url "data/{00000..00099}.tar" --resolution 512 --mixed_precision bf16

To fork it for another model, replace the block "The model": nothing else knows the model. tests/forks/ has an example.
"""

import contextlib
import copy
import functools
import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from common.checkpoint import StopSignal, resume
from common.data.buckets import target_size
from common.data.datasets import open_data, plan_buckets
from common.data.encoder import open_encoder
from common.data.samples import open_readers
from common.data.stream import open_batches
from common.draws import Draws, draw_dropped, draw_rollout, to_device
from common.export import push_to_hub
from common.flags import (
    Switch,
    add_shared_flags,
    check_ranges,
    check_shared_flags,
    filled,
    make_parser,
    parse_with_config,
    shared_defaults,
)
from common.losses import consistency_loss
from common.networks import (
    active_adapter,
    adapter_layers,
    checkpoint_activations,
    quantize,
    speed_up,
    weights_copy,
    weights_exchanged,
    with_uncond,
)
from common.optim import betas_and_decay, clip_gradients, make_optimizer, make_schedule, optimizer_name, update_ema
from common.pictures import Comparison, open_preview, share_prompts, validation_prompts
from common.planning.meter import Meter
from common.planning.phases import largest_samples, planned, run_phases, weights_of
from common.report import hold_out, open_clip, write_report
from common.run import (
    Saver,
    check_finite,
    end_run,
    machine_defaults,
    open_repository,
    start_run,
    teacher_missing,
)
from common.solvers import DDIMSolver, boundary_scalings, expand_to, noised, sampled_x_t, student_scheduler, to_x0_eps
from common.tracking import Tracking, webhook_errors

LOG_EVERY = 10  # optimizer steps between logs; training itself waits for the device nowhere else
BURNT = 2.0  # guidance_scale above which pictures of an LCM-LoRA burn
HELD_OUT_INDICES = 4  # places in the solver's grid, evenly spread, at which --eval_steps takes the loss


def parse_args(argv=None):
    """Parses flags and opens the data; returns both, and notes to print. Every rule is checked before a model loads."""
    parser = make_parser(__doc__)
    # fmt: off
    add = parser.add_argument_group("models").add_argument
    add("--pretrained_teacher_model", type=str, help="folder or hub name of the pipeline; default: the toy teacher, by its own recipe")
    add("--teacher_revision", type=str, help="the teacher's branch, tag or commit on the hub")
    add("--teacher_variant", type=str, metavar="NAME", help="which of its files to load, as fp16 for diffusion_pytorch_model.fp16.safetensors; default: those without a name")

    add = parser.add_argument_group("student").add_argument
    add("--model_type", type=str, choices=["full", "lora"], help="default: lora where a --lora_* flag or --use_dora is given, else full")
    add("--unet_time_cond_proj_dim", type=int, default=256, help="full: width of the guidance embedding")
    add("--ema_decay", type=float, help="of the target, per optimizer step; default: full 0.95, lora 0, no average")
    add("--lora_rank", type=int, help="default 64")
    add("--lora_alpha", type=int, help="default 64; the adapter is scaled by alpha / rank")
    add("--lora_dropout", type=float, help="default 0")
    add("--lora_target_modules", type=str, help=f"names or suffixes of modules, with commas; default {LORA_TARGETS}")
    add("--use_dora", action=Switch, help="weight-decomposed LoRA")
    add("--lora_type", type=str, choices=["standard"], help="standard: PEFT's, the only kind")
    add("--export_pipeline", action=Switch, help="full: write all of the pipeline, in fp32, so that from_pretrained(OUTPUT_DIR) loads it; default: the U-Net and its scheduler alone")
    add("--export_formats", type=str, default="diffusers", choices=["diffusers", "kohya", "diffusers,kohya"], metavar="FORMATS", help="diffusers, or diffusers,kohya; of a LoRA: kohya writes a second file, for A1111 and ComfyUI")

    add = parser.add_argument_group("latent consistency distillation").add_argument
    add("--w_min", type=float, default=5.0, help="smallest guidance w; guidance_scale = 1 + w")
    add("--w_max", type=float, default=15.0, help="largest guidance w; guidance_scale = 1 + w")
    add("--num_ddim_timesteps", type=int, default=50, help="N, steps of the teacher's solver; a sampler takes as many steps as the greatest common divisor of N and the teacher's timesteps, 20 for 60 and 1000")
    add("--loss_type", type=str, default="l2", choices=["l2", "huber"], help="mean of diff^2, or of sqrt(diff^2 + c^2) - c")
    add("--huber_c", type=float, default=0.001, help="c of sqrt(diff^2 + c^2) - c; smaller is nearer to |diff|")
    add("--diff2flow_loss", action=Switch, help="take the loss of flow velocities eps - x0, whose differences are those of x0 times (alpha + sigma) / sigma")
    add("--scheduled_sampling_max_step_offset", type=int, default=0, help="rollouts start up to this many solver steps above t, and the student itself denoises to x_t; 0: no rollouts")
    add("--scheduled_sampling_probability", type=float, default=0.0, help="share of samples that are rolled out, 0 to 1")
    add("--scheduled_sampling_strategy", type=str, default="uniform", choices=["uniform", "biased_early", "biased_late"], help="lengths of rollouts: all alike, mostly short, or mostly long")
    add("--timestep_scaling_factor", type=float, default=10.0, help="s of c_skip and c_out; larger makes c_skip fall faster")
    add("--cast_teacher_unet", action=Switch, default=True, help="of a full student's teacher: keep its weights in --mixed_precision, or in fp32 under autocast; a LoRA's base is always in --mixed_precision")
    # fmt: on
    add_shared_flags(parser)
    add_model_flags(parser)

    args, notes = parse_with_config(parser, argv, family=FAMILY, method="lcm", recipe=toy_recipe)
    notes += check_shared_flags(parser, args)
    args, lcm_notes = check_lcm_flags(parser, args)
    rules, size_notes = check_model_flags(parser, args)
    data, data_notes = open_data(parser, args, rules)
    chosen, machine_notes = machine_defaults(args, data)
    args = filled(args, validation_resolution=[target_size(1, 1, rules)], **chosen, **shared_defaults(args))
    return args, data, [*lcm_notes, *notes, *size_notes, *data_notes, *machine_notes]


def check_lcm_flags(parser, args):
    """Checks every rule of the student's and the method's flags. Returns args with their defaults, and notes."""
    lora = {"lora_rank": 64, "lora_alpha": 64, "lora_dropout": 0.0, "lora_target_modules": LORA_TARGETS}
    args = filled(args, model_type=wanted_student(args))
    if args.model_type == "full" and wanted_student(args) == "lora":
        parser.error("--model_type full: takes no --lora_* flag and no --use_dora")
    if args.model_type == "full" and "kohya" in args.export_formats:
        parser.error("--export_formats kohya: is a layout of LoRA files")
    if args.model_type == "lora" and args.export_pipeline:
        parser.error("--export_pipeline: is for a full student; a LoRA loads into its teacher's pipeline")
    args = filled(args, **({"ema_decay": 0.95} if args.model_type == "full" else {"ema_decay": 0.0} | lora))
    if not 0.0 <= args.w_min <= args.w_max < math.inf:
        parser.error(f"--w_min {args.w_min} and --w_max {args.w_max}: need 0 <= w_min <= w_max")
    check_ranges(
        parser, args, at_least_one=("num_ddim_timesteps", "unet_time_cond_proj_dim", "lora_rank", "lora_alpha"),
        not_negative=("scheduled_sampling_max_step_offset",), positive=("huber_c", "timestep_scaling_factor"),
        below_one=("ema_decay", "lora_dropout"), share=("scheduled_sampling_probability",),
    )  # fmt: skip
    if (args.scheduled_sampling_probability > 0.0) != (args.scheduled_sampling_max_step_offset > 0):
        parser.error("--scheduled_sampling_probability and --scheduled_sampling_max_step_offset: one needs the other")
    notes = []
    if args.pretrained_teacher_model is None:
        notes.append(f"No --pretrained_teacher_model: distilling the toy teacher by its recipe ({args.model_type}).")
    if args.model_type == "lora" and args.w_min < args.w_max:
        middle = middle_w(args)
        notes.append(
            f"warning: --w_min {args.w_min:g} and --w_max {args.w_max:g}: a LoRA is not told w, and learns the mean of "
            f"pictures of guidance_scale {1 + args.w_min:g} to {1 + args.w_max:g}, near to {1 + middle:g}, which are "
            f"softer; --w_min {middle:g} --w_max {middle:g} makes it one. It is sampled with guidance_scale 1"
        )
    guidance, trained = args.validation_guidance, f"{1 + args.w_min:g} to {1 + args.w_max:g}"
    if guidance is not None and args.model_type == "full" and middle_w(args) != guidance - 1.0:
        notes.append(f"--validation_guidance {guidance:g}: trained is {trained}, {1 + middle_w(args):g} is taken")
    if guidance is not None and args.model_type == "lora" and guidance > BURNT:
        notes.append(
            f"--validation_guidance {guidance:g}: the LoRA's pictures have it on top of the {trained} that it learns, "
            f"and more than {BURNT:g} burns them; 1 is without"
        )
    return args, notes


def wanted_student(args) -> str:
    """The student that the other flags imply, full or lora."""
    given = (args.lora_rank, args.lora_alpha, args.lora_dropout, args.lora_target_modules, args.lora_type)
    return "lora" if args.use_dora or any(value is not None for value in given) else "full"


def middle_w(args) -> float:
    """The w of validation pictures: the middle of the trained range, or a full student's --validation_guidance in it."""
    middle, wanted = (args.w_min + args.w_max) / 2.0, args.validation_guidance
    if wanted is None or args.model_type == "lora":
        return middle
    return min(max(wanted - 1.0, args.w_min), args.w_max)


def student_guidance(args) -> float:
    """The guidance_scale of the student's pictures. A LoRA has its guidance inside: more is the pipeline's, on top."""
    return 1.0 + middle_w(args) if args.model_type == "full" else max(1.0, args.validation_guidance or 1.0)


# =====================================================================================================================
# The model: a fork for another one replaces this block, its imports among it, and nothing else
#
# What the rest of the script asks for:
#   constants  FAMILY, LORA_TARGETS, COMPILED_BLOCKS, PREVIEW_MODEL, TOY_SIZES
#   flags      add_model_flags, check_model_flags, toy_recipe, teacher_of
#   networks   load_scheduler, noise_schedule, load_teacher, make_student, add_lora
#   data       encoders, encode_empty_prompt, sample_latents, conditions
#   use        predict, generate, export
# Networks also need enable_gradient_checkpointing(), and the scheduler a config that LCMScheduler takes.
# =====================================================================================================================

import json

from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.training_utils import cast_training_params
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from transformers import AutoTokenizer, CLIPTextModel

from common.cache import weights_identity
from common.data.buckets import Rules
from common.data.encoder import Encoders, SampleEncoder
from common.export import save_kohya_lora
from common.flags import add_bucket_flags, bucket_rules, hide_flags
from common.networks import guidance_embedding, load_network, precision_name

FAMILY = "sd"  # model_family of config files
PIPELINE = StableDiffusionPipeline
LORA_TARGETS = (
    "to_q,to_k,to_v,to_out.0,proj_in,proj_out,ff.net.0.proj,ff.net.2,conv1,conv2,conv_shortcut,"
    "downsamplers.0.conv,upsamplers.0.conv,time_emb_proj"
)
COMPILED_BLOCKS = ("BasicTransformerBlock", "ResnetBlock2D")
PREVIEW_MODEL = "madebyollin/taesd"  # a tiny autoencoder of the same latents
TOY = Path(__file__).parent / "tests" / "toy"
TOY_SIZES = ((64, 64),)  # height, width


def add_model_flags(parser):
    add = parser.add_argument_group("VAE and size").add_argument
    add("--pretrained_vae_model_name_or_path", type=str, help="another VAE; default: the teacher's")
    add("--revision", type=str, help="that VAE's branch, tag or commit on the hub")
    add("--resolution", type=float, default=512, help="of training, in the unit of --resolution_type")
    add_bucket_flags(parser)
    parser.set_defaults(bucket_alignment=8)  # the VAE's factor; 64 makes fewer buckets
    hide_flags(parser, "text_encoder_2_precision")


def check_model_flags(parser, args) -> tuple[Rules, list[str]]:
    """The rules by which training pictures are resized, and notes."""
    rules, notes = bucket_rules(parser, args)
    if args.text_encoder_2_precision != "no_change":
        notes.append("--text_encoder_2_precision: no job, Stable Diffusion has one text encoder")
    return rules, notes


def toy_recipe(args) -> dict:
    """The toy teacher's settings by flag, in place of the flags' defaults."""
    recipe = json.loads((TOY / "sd_recipe.json").read_text())
    data = {} if args.data_backend_config else {"train_shards_path_or_url": str(TOY / "shards/{00000..00003}.tar")}
    return data | recipe["shared"] | recipe[args.model_type or wanted_student(args)]


def teacher_of(args) -> str:
    return args.pretrained_teacher_model or str(TOY / "sd")


def hub_options(args) -> dict:
    return {"revision": args.teacher_revision, "cache_dir": args.cache_dir}


def weights_options(args) -> dict:
    return hub_options(args) | {"variant": args.teacher_variant}


def load_scheduler(args) -> DDIMScheduler:
    """The teacher's own sampler."""
    return DDIMScheduler.from_pretrained(teacher_of(args), subfolder="scheduler", **hub_options(args))


def noise_schedule(scheduler) -> tuple[torch.Tensor, str]:
    """abar of each training timestep, [T], and what the network predicts: epsilon, v_prediction or sample."""
    return scheduler.alphas_cumprod, scheduler.config.prediction_type


def load_teacher(args, dtype: torch.dtype) -> UNet2DConditionModel:
    return load_network(UNet2DConditionModel, teacher_of(args), "unet", dtype, **weights_options(args))


def make_student(args, teacher: UNet2DConditionModel) -> UNet2DConditionModel:
    """An fp32 copy of the teacher that also takes w; its new projection is zero, so that it starts as the teacher."""
    config = dict(teacher.config) | {"time_cond_proj_dim": args.unet_time_cond_proj_dim}
    config.pop("_use_default_values", None)  # keys that the teacher's file lacks, which from_config would leave out
    student = UNet2DConditionModel.from_config(config)
    missing, unexpected = student.load_state_dict(teacher.state_dict(), strict=False)
    if unexpected or set(missing) - {"time_embedding.cond_proj.weight"}:
        raise SystemExit(f"the student does not fit its teacher: {missing} missing, {unexpected} unexpected")
    if missing:
        torch.nn.init.zeros_(student.time_embedding.cond_proj.weight)
    return student


def add_lora(args, teacher: UNet2DConditionModel) -> UNet2DConditionModel:
    """The teacher itself, with fp32 adapters that start at zero."""
    teacher.add_adapter(
        LoraConfig(
            r=args.lora_rank, lora_alpha=args.lora_alpha, lora_dropout=args.lora_dropout, use_dora=args.use_dora,
            target_modules=[name.strip() for name in args.lora_target_modules.split(",")],
        )
    )  # fmt: skip
    cast_training_params(teacher, dtype=torch.float32)
    return teacher


def vae_source(args) -> dict:
    if args.pretrained_vae_model_name_or_path:
        return {"model": args.pretrained_vae_model_name_or_path, "subfolder": None, "revision": args.revision}
    name, revision, variant = teacher_of(args), args.teacher_revision, args.teacher_variant
    return {"model": name, "subfolder": "vae", "revision": revision, "variant": variant}


def load_vae(args, device, dtype: torch.dtype) -> AutoencoderKL:
    source = vae_source(args)
    name, folder = source.pop("model"), source.pop("subfolder")
    vae = load_network(AutoencoderKL, name, folder, dtype, cache_dir=args.cache_dir, **source)
    return vae.to(device, memory_format=torch.channels_last)


def load_text_encoder(args, device, dtype: torch.dtype):
    name = teacher_of(args)
    tokenizer = AutoTokenizer.from_pretrained(name, subfolder="tokenizer", use_fast=False, **hub_options(args))
    encoder = load_network(CLIPTextModel, name, "text_encoder", dtype, **weights_options(args))
    quantize(encoder, args.text_encoder_1_precision, "cpu" if args.quantize_via == "cpu" else device)
    return tokenizer, encoder.to(device)


def encoders(args, device, dtype: torch.dtype) -> Encoders:
    """The functions that encode pixels and prompts, and the identities that name their caches."""
    folders = ("text_encoder", "tokenizer")
    return Encoders(
        load_vae=lambda: load_vae(args, device, dtype),
        encode_pixels=encode_pixels,
        load_text=lambda: load_text_encoder(args, device, dtype),
        encode_prompts=encode_prompts,
        latents_identity=lambda: {"vae": weights_identity(**vae_source(args)), "dtype": dtype},
        text_identity=lambda: {
            "text": [
                weights_identity(teacher_of(args), folder, args.teacher_revision, args.teacher_variant)
                for folder in folders
            ],
            "dtype": dtype,
            "precisions": [
                precision_name(args.text_encoder_1_precision),
                precision_name(args.text_encoder_2_precision),
            ],
        },
    )


def encode_prompts(text_encoder, prompts: list[str]) -> dict[str, torch.Tensor]:
    tokenizer, encoder = text_encoder
    tokens = tokenizer(
        prompts, padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
    )
    ids, mask = (to_device(each, encoder.device) for each in (tokens.input_ids, tokens.attention_mask))
    masked = getattr(encoder.config, "use_attention_mask", False)
    return {"prompt_embeds": encoder(ids, attention_mask=mask if masked else None)[0]}


def encode_empty_prompt(args, encoder: SampleEncoder) -> dict[str, torch.Tensor]:
    """Embeddings of the empty prompt, [1, ...]: guidance leads away from them, and dropped prompts become them."""
    return encoder.encode_text([""])


def encode_pixels(vae, pixels) -> dict[str, torch.Tensor]:
    """Scaled mean and deviation, from which latents are sampled at each use. [B, 3, H, W] -> [B, C, h, w] each."""
    posterior = vae.encode(pixels.to(vae.device, vae.dtype, memory_format=torch.channels_last)).latent_dist
    return {name: getattr(posterior, name) * vae.config.scaling_factor for name in ("mean", "std")}


def sample_latents(images: dict[str, torch.Tensor], draws: Draws) -> torch.Tensor:
    """Clean latents for this use of the images, fp32, [B, C, h, w]."""
    return images["mean"].float() + images["std"].float() * draws.normal(*images["mean"].shape[1:])


def conditions(text: dict[str, torch.Tensor], images: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """All inputs of the U-Net but x, t and w, {name: [B, ...]}."""
    return text


def predict(unet, x, t, cond: dict[str, torch.Tensor], w=None):
    """The network's output at x_t: noise, velocity or clean sample, whichever the teacher was trained on."""
    embeds = cond["prompt_embeds"]
    return unet(
        x.to(embeds.dtype), t, encoder_hidden_states=embeds, timestep_cond=embed_guidance(unet, w)
    ).sample  # fmt: skip


def embed_guidance(unet, w: torch.Tensor | None) -> torch.Tensor | None:
    """The embedding of w that the U-Net takes, [B, D]; None where w is None."""
    return None if w is None else guidance_embedding(w, getattr(unet, "module", unet).config.time_cond_proj_dim)


@torch.no_grad()
def generate(args, vae, unet, scheduler, text, negative, steps: int, guidance_scale: float, seed: int, size, callback):
    """Pictures [height, width] by the stock pipeline, one per prompt; picture i starts from noise of seed + i."""
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


def export(args, folder: Path, unet, scheduler, dtype: torch.dtype) -> tuple[list[str], str]:
    """Writes the files that stock diffusers loads. Returns their names and the lines of code that load them.

    These name the precision `dtype`, since parts of a pipeline may be stored in several. They generate what the run has
    shown: with its size, guidance and VAE.
    """
    student_scheduler(args, scheduler).save_pretrained(folder / "scheduler")
    base, parts, load = teacher_of(args), [f"dtype={dtype}"], ""
    if args.teacher_revision:
        parts.append(f'revision="{args.teacher_revision}"')
    if args.teacher_variant:
        parts.append(f'variant="{args.teacher_variant}"')
    if args.pretrained_vae_model_name_or_path:
        source, revision = vae_source(args)["model"], f', revision="{args.revision}"' if args.revision else ""
        load += f'vae = AutoencoderKL.from_pretrained("{source}"{revision}, dtype={dtype})\n'
        parts.append("vae=vae")
    if args.model_type == "lora":
        layers = {name: value.contiguous() for name, value in get_peft_model_state_dict(unet).items()}
        adapter = unet.peft_config["default"].to_dict()
        adapter = {key: sorted(value) if isinstance(value, set) else value for key, value in adapter.items()}
        PIPELINE.save_lora_weights(folder, unet_lora_layers=layers, unet_lora_adapter_metadata=adapter)
        files = ["pytorch_lora_weights.safetensors"]
        if "kohya" in args.export_formats:
            files.append("kohya_lora.safetensors")
            save_kohya_lora(folder / files[-1], unet, layers, args.lora_rank, args.lora_alpha, sgm=False)
        load += f'pipeline = {PIPELINE.__name__}.from_pretrained("{base}", {", ".join(parts)})\n'
        load += f'pipeline.load_lora_weights("{folder}", weight_name="{files[0]}")\n'
    else:
        unet.save_pretrained(folder)
        copy.deepcopy(unet).half().save_pretrained(folder, variant="fp16")
        files = ["config.json", "diffusion_pytorch_model*.safetensors*"]
        load += f'unet = UNet2DConditionModel.from_pretrained("{folder}", dtype={dtype})\n'
        load += f'pipeline = {PIPELINE.__name__}.from_pretrained("{base}", unet=unet, {", ".join(parts)})\n'
        if args.export_pipeline:
            replaced = {"unet": unet, "scheduler": student_scheduler(args, scheduler)}
            if args.pretrained_vae_model_name_or_path:
                replaced["vae"] = load_vae(args, unet.device, torch.float32)
            pipeline = PIPELINE.from_pretrained(base, dtype=torch.float32, **replaced, **weights_options(args))
            pipeline.save_pretrained(folder)
            files += ["model_index.json", *pipeline.components]
            load = f'pipeline = {PIPELINE.__name__}.from_pretrained("{folder}", dtype={dtype})\n'
    (height, width), shown = args.validation_resolution[0], args.validation_num_inference_steps
    scale = student_guidance(args)
    call = [f"num_inference_steps={4 if 4 in shown else shown[-1]}", f"guidance_scale={scale:g}"]
    call += [f"height={height}", f"width={width}"]
    if args.model_type == "lora" and scale > 1.0 and args.validation_negative_prompt:
        call.append(f"negative_prompt={args.validation_negative_prompt!r}")
    load += f'pipeline.scheduler = LCMScheduler.from_pretrained("{folder}", subfolder="scheduler")\n'
    names = ("AutoencoderKL", "LCMScheduler", PIPELINE.__name__, "UNet2DConditionModel")
    usage = (
        f"import torch\nfrom diffusers import {', '.join(name for name in names if f'{name}.' in load)}\n\n{load}"
        'pipeline.to("cuda" if torch.cuda.is_available() else "cpu")\n'
        f'image = pipeline("your prompt", {", ".join(call)}).images[0]\n'
    )
    return ["scheduler", *files], usage


# =====================================================================================================================
# Training
# =====================================================================================================================


def load_networks(args, accelerator, weight_dtype) -> tuple[torch.nn.Module, torch.nn.Module, torch.nn.Module]:
    """Teacher, student and target on the device; with LoRA all three are one network."""
    lora, device = args.model_type == "lora", accelerator.device
    # channels_last is faster on CUDA and CPU, but DoRA's norms view convolutions as matrices
    layout = {"memory_format": torch.preserve_format if args.use_dora else torch.channels_last}
    teacher = load_teacher(args, weight_dtype if lora or args.cast_teacher_unet else torch.float32)
    # The student starts from the weights on disk, not from the teacher's, which its precision has rounded
    student = None if lora else make_student(args, load_teacher(args, torch.float32))
    quantize(teacher, args.base_model_precision, "cpu" if args.quantize_via == "cpu" else device)
    teacher.to(device, **layout)
    student = add_lora(args, teacher) if lora else student
    student.to(device, **({} if lora else layout))
    target = student if lora else copy.deepcopy(student).requires_grad_(False).eval()
    # A network's blocks have a dozen shapes and more, and each bucket would have as many of its own
    speed_up(args, (teacher, student, target), COMPILED_BLOCKS, accelerator.print, dynamic=True)
    if args.gradient_checkpointing:
        checkpoint_activations(args, student, COMPILED_BLOCKS)
    return teacher, student.train(), target


@dataclass(frozen=True)
class Networks:
    """The networks of the algorithm. With LoRA they are one: the teacher is the student without its adapters."""

    teacher: torch.nn.Module
    student: torch.nn.Module
    prepared: torch.nn.Module  # the student in autocast, and between processes in DDP: for its own forwards alone
    target: torch.nn.Module
    trained: list[torch.nn.Parameter]
    average: torch.nn.Module | None  # the target, or the average of a LoRA's adapters; None where nothing is averaged
    lora: bool

    @functools.cached_property
    def layers(self) -> list:
        """Layers that have adapters."""
        return adapter_layers(self.student)

    def as_teacher(self):
        """Inside, the teacher has its adapters off."""
        return active_adapter(self.layers, "none")

    def as_student(self):
        """Inside, adapters are on, and drop out where there is a gradient; outside they always do."""
        return active_adapter(self.layers, "default")

    @contextlib.contextmanager
    def as_target(self):
        """Inside, a LoRA's adapters have their moving average; a full student's target is a network of its own."""
        averaged = self.lora and self.average is not None
        params, others = (self.trained, list(self.average.parameters())) if averaged else ([], [])
        with self.as_student(), weights_exchanged(params, others):
            yield


# ---- Algorithm 1, numbered as it runs; 7., the update, is in main's training loop ----


def draw(args, positions: list[int], images, text, uncond, device):
    """Conditions, clean latents and random numbers of a batch; each sample's follow from seed and position alone."""
    # 1. Draws
    draws = Draws(args.seed, positions, device)
    index = draws.integers(args.num_ddim_timesteps)  # [B], places in the solver's grid
    w = args.w_min + (args.w_max - args.w_min) * to_device(draws.uniform(), device)
    cond = conditions(draw_dropped(draws, args.proportion_empty_prompts, text, uncond), images)
    latents = sample_latents(images, draws)
    eps = draws.normal(*latents.shape[1:])
    rollout = None  # or lengths [B] and noise, for scheduled sampling
    if args.scheduled_sampling_probability:
        rollout = draw_rollout(args, positions, latents.shape[1:], device)
    return cond, latents, index, w, eps, rollout


def lcm_loss(args, accelerator, networks, solver, uncond, cond, latents, index, w, eps, rollout=None):
    """The loss of a batch: latents and eps are [B, C, h, w], index and w [B]; uncond has the empty prompt, [1, ...]."""
    # 2. Noisy latents, fp32
    t, t_prev = solver.timesteps[index], solver.timesteps_prev[index]
    x_t = noised(latents, eps, t, solver)

    def output(unet, x, t, cond, w=None):
        # autocast keeps the weights that it has cast until its block ends, whatever they become: a block a forward
        with accelerator.autocast():
            return predict(unet, x, t, cond, w).float()

    def f(unet, x, t):
        x0, _ = solver.x0_eps(output(unet, x, t, cond, None if networks.lora else w), x, t)
        c_skip, c_out = (expand_to(c, x) for c in boundary_scalings(t, args.timestep_scaling_factor))
        return c_skip * x + c_out * x0

    with torch.no_grad():
        if rollout:  # scheduled sampling: for some samples the student makes x_t, from more noise than that of t
            with networks.as_student():
                by_student = functools.partial(f, networks.prepared)
                x_t = sampled_x_t(by_student, solver, x_t, latents, eps, index, *rollout)

        # 3. Teacher with guidance, both halves in one forward: it needs less memory than the student's backward
        with networks.as_teacher():  # first all with their prompts, then all with the empty one
            outs = output(networks.teacher, torch.cat([x_t, x_t]), torch.cat([t, t]), with_uncond(cond, uncond))
        out_cond, out_uncond = outs.chunk(2)
        out = out_cond + expand_to(w, x_t) * (out_cond - out_uncond)
        x0_teacher, eps_teacher = solver.x0_eps(out, x_t, t)

        # 4. One solver step
        x_prev = solver.step(x0_teacher, eps_teacher, index)

        # 5. Target at x_prev
        with networks.as_target():
            f_target = f(networks.target, x_prev, t_prev)

    # 6. Student at x_t, and its distance to the target
    with networks.as_student():
        f_student = f(networks.prepared, x_t, t)
    if args.diff2flow_loss:  # of velocities eps - x0, with eps = (x_t - alpha * x0) / sigma
        samples = [to_x0_eps(x0, x_t, solver.alphas[t], solver.sigmas[t], "sample") for x0 in (f_student, f_target)]
        f_student, f_target = (eps - x0 for x0, eps in samples)
    return consistency_loss(f_student, f_target, args.loss_type, args.huber_c)


@torch.no_grad()
def held_out_loss(args, loss_of, samples, encoder) -> dict[str, float]:
    """Mean loss at fixed places in the grid, noise and w: the same numbers for the same weights, whatever --seed is.

    `loss_of(cond, latents, index, w, eps)` is lcm_loss. One sample at a time, as their shapes may differ.
    """
    n = args.num_ddim_timesteps
    places = sorted({n * (2 * k + 1) // (2 * HELD_OUT_INDICES) for k in range(HELD_OUT_INDICES)})
    sums = dict.fromkeys(places, 0.0)
    for i, sample in enumerate(samples):
        images, text = encoder.encode_images([sample]), encoder.encode_text([sample.caption])
        for place in places:
            draws = Draws(0, [i * n + place], encoder.device)
            index = torch.tensor([place], device=encoder.device)
            w = (args.w_min + (args.w_max - args.w_min) * draws.uniform()).to(encoder.device)
            latents = sample_latents(images, draws)
            eps = draws.normal(*latents.shape[1:])
            sums[place] += loss_of(conditions(text, images), latents, index, w, eps).item() / len(samples)
    return {"eval_loss": sum(sums.values()) / len(places)} | {f"eval_loss/{p}": value for p, value in sums.items()}


@planned
@webhook_errors
def main(args, data, notes):
    # ---- Set-up ----
    accelerator, weight_dtype = start_run(args, notes, gradient_accumulation_steps=args.gradient_accumulation_steps)
    say, device, lora = accelerator.print, accelerator.device, args.model_type == "lora"

    # ---- Noise schedule, solver, networks ----
    try:
        scheduler = load_scheduler(args)
        abar, prediction_type = noise_schedule(scheduler)
        most_steps = max(args.validation_num_inference_steps + args.report_steps)
        solver = DDIMSolver(abar, args.num_ddim_timesteps, prediction_type, most_steps).to(device)
    except ValueError as error:
        raise SystemExit(str(error)) from None
    except OSError as error:
        raise teacher_missing(args, error) from None
    repository = open_repository(args, accelerator)
    teacher, student, target = load_networks(args, accelerator, weight_dtype)
    trained = [p for p in student.parameters() if p.requires_grad]
    average = target  # of a full student; a LoRA has an average of its adapters, where it has one
    if lora:
        average = weights_copy(student, device) if args.ema_decay else None

    # ---- Optimizer ----
    samples_per_step = args.train_batch_size * args.gradient_accumulation_steps * accelerator.num_processes
    total_steps = args.max_train_steps or args.num_train_epochs * max(1, data.samples // samples_per_step)
    learning_rate = args.learning_rate * (samples_per_step if args.scale_lr else 1)
    optimizer = make_optimizer(
        optimizer_name(args), trained, learning_rate, *betas_and_decay(args), args.adam_epsilon, device
    )
    lr_schedule = make_schedule(args, optimizer, total_steps)
    prepared, optimizer = accelerator.prepare(student, optimizer)
    networks = Networks(teacher, student, prepared, target, trained, average, lora)
    saved, optimizers = {"student": student}, {"student": optimizer.optimizer}
    saved |= {} if average is None else {"target": average}

    # ---- Resume ----
    state = resume(args, accelerator, saved, optimizers, lr_schedule)
    first_step = step = state["step"]

    # ---- Data: lists of samples, each with latents from the cache or with pixels ----
    data = plan_buckets(args, data, accelerator)
    prompts = ["", args.validation_negative_prompt or "", *validation_prompts(args)]
    encoder, readers = open_encoder(
        args, data, open_readers(args, data), encoders(args, device, weight_dtype), accelerator, prompts, state
    )
    uncond = encode_empty_prompt(args, encoder)
    held_out, readers = hold_out(args, data, readers, encoder)
    batches = open_batches(args, data, accelerator, readers, state["stream"])
    saver = Saver(args, accelerator, saved, optimizers, lr_schedule, encoder, batches, state["skipped"])

    # ---- Pictures ----
    @torch.no_grad()
    def pictures(which: str, prompts: list[str], steps: int, seed: int, guidance_scale=None, size=None, callback=None):
        """Pictures by `teacher`, or by `student`, which means the target; each with its own sampler."""
        text, negative, by_teacher = encoder.encode_text(prompts), uncond, which == "teacher"
        if args.validation_negative_prompt and (by_teacher or lora):
            negative = encoder.encode_text([args.validation_negative_prompt])
        if guidance_scale is None:
            guidance_scale = 1.0 + middle_w(args) if by_teacher else student_guidance(args)
        unet, sampler = (teacher, scheduler) if by_teacher else (target, student_scheduler(args, scheduler))
        size = size or args.validation_resolution[0]
        with networks.as_teacher() if by_teacher else networks.as_target(), accelerator.autocast():
            return generate(
                args, encoder.vae, unet, sampler, text, negative, steps, guidance_scale, seed, size, callback
            )

    tracking, clip = Tracking(args, accelerator, total_steps), open_clip(args, accelerator)
    preview = open_preview(args, PREVIEW_MODEL, accelerator, lambda *shown: tracking.picture(*shown, step, "debug"))
    shared = share_prompts(pictures, accelerator)  # all processes draw
    comparison = Comparison(args, shared, preview, clip)

    def validate():
        sheet, scores = comparison.sheet()
        tracking.picture(sheet, "grid", step)
        if scores:
            tracking.values(scores, step)
        if not data.trains_with_encoders:
            encoder.release()
        return sheet

    def export_target():
        """Files and usage, from the main process."""
        if accelerator.is_main_process:
            with networks.as_target():
                return export(args, Path(args.output_dir), target, scheduler, weight_dtype)
        return None

    def report(folder: Path) -> str:
        return write_report(args, shared, clip, TOY_SIZES, folder, accelerator.num_processes)

    def show_largest():
        """Pictures as validation generates them, of the largest size."""
        for which in ("student", "teacher")[: 2 - args.disable_benchmark]:
            size = max(args.validation_resolution, key=math.prod)
            pictures(which, validation_prompts(args), 1, args.validation_seed, size=size)

    # ---- One pass ----
    loss_of = functools.partial(lcm_loss, args, accelerator, networks, solver, uncond)

    def train_on(samples) -> torch.Tensor:
        """The loss of a batch: its gradients, and once they are whole the update."""
        with accelerator.accumulate(prepared):
            positions = [sample.position for sample in samples]
            images, text = encoder.encode_images(samples), encoder.encode_text([sample.caption for sample in samples])

            # 1. to 6.
            inputs = draw(args, positions, images, text, uncond, device)
            torch.manual_seed(args.seed + positions[0])  # for dropout, so that a resumed run draws the same
            loss = loss_of(*inputs)

            # 7. Optimizer and EMA
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                clip_gradients(accelerator, trained, args.grad_clip_method, args.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
        # The step is skipped where fp16's scaler has found an overflow
        if accelerator.sync_gradients and not accelerator.optimizer_step_was_skipped:
            lr_schedule.step()
            if average is not None:
                update_ema(list(average.parameters()), trained, args.ema_decay)
        return loss.detach()

    if Meter.running:
        weights = {"weights of the teacher": weights_of(teacher), "weights of the student": trained}
        weights |= {} if average is None else {"weights of the average": weights_of(average)}
        samples = largest_samples(args, [target_size(1, 1, dataset.rules) for dataset in data.datasets])
        passes = [samples[: args.train_batch_size]] * args.gradient_accumulation_steps
        train = {"training": lambda: [train_on(batch) for batch in passes]}
        return run_phases(data, encoder, optimizers, weights, samples, train, show_largest, export_target)

    # ---- Training loop ----
    say(
        f"training {sum(p.numel() for p in trained):,} parameters for {total_steps} steps of {samples_per_step} samples"
    )
    bar = tqdm(total=total_steps, initial=step, disable=not accelerator.is_main_process, mininterval=1.0)
    loss_sum, started, logged = torch.zeros((), device=device), time.time(), step
    stop_signal, stopping = StopSignal(), False
    while step < total_steps and not stopping:
        loss_sum += train_on(next(batches))
        if not accelerator.sync_gradients:
            continue
        step += 1
        bar.update()

        if step % LOG_EVERY == 0 or step == total_steps:
            passes = (step - logged) * args.gradient_accumulation_steps
            mean = accelerator.reduce(loss_sum, "mean").item() / passes
            check_finite(args, step, loss=mean)
            speed = (step - logged) * samples_per_step / (time.time() - started)
            bar.set_postfix(loss=f"{mean:.4g}", samples_per_s=f"{speed:.1f}")
            tracking.values({"loss": mean, "lr": lr_schedule.get_last_lr()[0], "samples_per_s": speed}, step)
            loss_sum, started, logged = torch.zeros((), device=device), time.time(), step
        if args.eval_steps and step % args.eval_steps == 0:
            tracking.values(held_out_loss(args, loss_of, held_out, encoder), step)
        validation = args.validation_steps and step % args.validation_steps == 0 and step < total_steps
        if validation:
            validate()
        if args.checkpointing_steps and step % args.checkpointing_steps == 0 and step < total_steps:
            saver.save(step)
            if args.push_checkpoints_to_hub and repository:
                push_to_hub(args, repository, export_target()[0], f"Step {step}", fatal=False)
        if accelerator.num_processes == 1 or step % LOG_EVERY == 0:
            stopping = stop_signal.agreed(accelerator)  # all leave the loop at the same step
    bar.close()

    # ---- The end: all processes save a checkpoint, and unless a signal stopped the run, export, validate, report ----
    end_run(
        args, saver, tracking, repository, step=step, trained=step > first_step, stop_signal=stop_signal,
        stopped=stopping, validate=validate, export=export_target, report=report, method="lcm",
        teacher=teacher_of(args),
    )  # fmt: skip


if __name__ == "__main__":
    main(*parse_args())
