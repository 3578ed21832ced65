"""The block "The model" of train_dmd_distill_wan.py for LTX-Video: its transformer takes a row of tokens instead of a
clip, its T5 has a mask, and its VAE makes one latent frame of eight. Students are bidirectional."""

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKLLTXVideo,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchLCMScheduler,
    LTXImageToVideoPipeline,
    LTXPipeline,
    LTXVideoTransformer3DModel,
)
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from transformers import AutoTokenizer, T5EncoderModel

from common.cache import weights_identity
from common.data.encoder import Encoders
from common.flags import check_ranges
from common.networks import precision_name, quantize
from common.solvers import stock_scheduler

FAMILY = "ltxvideo"  # model_family of config files
LORA_TARGETS = "to_q,to_k,to_v,to_out.0"
BLOCKS = ("LTXVideoTransformerBlock",)  # what is compiled, and gathered at a time where weights are split
FRAMES_PER_LATENT, FRAMES_PER_SECOND = 8, 25
SIDE_FACTOR = 32  # of a clip's sides, which is the VAE's


def add_model_flags(parser):
    add = parser.add_argument_group("text of LTX-Video").add_argument
    add("--max_sequence_length", type=int, default=128, metavar="N", help="tokens of a prompt, padded and masked")
    parser.set_defaults(bucket_alignment=SIDE_FACTOR, num_frames=97)


def check_model_flags(parser, args):
    check_ranges(parser, args, at_least_one=("max_sequence_length",))
    if args.num_frame_per_block:
        parser.error(f"--num_frame_per_block {args.num_frame_per_block}: this model's students are bidirectional")
    for name, unwanted in (
        ("plan", args.plan is not None),
        ("context_parallel_degree", args.context_parallel_degree > 1),
    ):
        if unwanted:
            parser.error(f"--{name}: not for this model")


def toy_recipe(args):
    raise SystemExit("--pretrained_teacher_model: is needed, there is no toy teacher of this kind")


def teacher_of(args) -> str:
    return args.pretrained_teacher_model


def hub_options(args) -> dict:
    return {"revision": args.teacher_revision, "cache_dir": args.cache_dir}


def load_scheduler(args) -> FlowMatchEulerDiscreteScheduler:
    """Euler steps of a fixed shift: LTX's own depends on the number of tokens."""
    name, options = teacher_of(args), hub_options(args)
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(name, subfolder="scheduler", **options)
    shift = args.flow_schedule_shift or scheduler.config.shift
    return FlowMatchEulerDiscreteScheduler.from_config(scheduler.config, shift=shift, use_dynamic_shifting=False)


def schedule_shift(scheduler) -> float:
    return scheduler.config.shift


def load_transformer(args, dtype: torch.dtype) -> LTXVideoTransformer3DModel:
    transformer = LTXVideoTransformer3DModel.from_pretrained(
        teacher_of(args), subfolder="transformer", dtype=dtype, **hub_options(args)
    )
    return transformer.requires_grad_(False).eval()


def own_attention(transformer: LTXVideoTransformer3DModel) -> LTXVideoTransformer3DModel:
    return transformer


def teacher_identity(args) -> str:
    return weights_identity(teacher_of(args), "transformer", args.teacher_revision)


def add_adapters(args, transformer: LTXVideoTransformer3DModel, names) -> LTXVideoTransformer3DModel:
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
    return transformer.eval()


def encoders(args, device, dtype: torch.dtype) -> Encoders:
    name, options, length = teacher_of(args), hub_options(args), args.max_sequence_length

    def load_vae():
        vae = AutoencoderKLLTXVideo.from_pretrained(name, subfolder="vae", dtype=torch.float32, **options)
        return vae.requires_grad_(False).eval().to(device)

    def load_text():
        tokenizer = AutoTokenizer.from_pretrained(name, subfolder="tokenizer", **options)
        encoder = T5EncoderModel.from_pretrained(name, subfolder="text_encoder", dtype=dtype, **options)
        quantize(encoder, args.text_encoder_1_precision, "cpu" if args.quantize_via == "cpu" else device)
        return tokenizer, encoder.requires_grad_(False).eval().to(device)

    def encode_prompts(text_encoder, prompts: list[str]) -> dict[str, torch.Tensor]:
        tokenizer, encoder = text_encoder
        tokens = tokenizer(prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        embeds = encoder(tokens.input_ids.to(encoder.device))[0]
        return {"prompt_embeds": embeds, "mask": tokens.attention_mask.to(embeds.device)}

    return Encoders(
        load_vae=load_vae,
        encode_pixels=encode_pixels,
        load_text=load_text,
        encode_prompts=encode_prompts,
        latents_identity=lambda: {"vae": weights_identity(name, "vae", args.teacher_revision)},
        text_identity=lambda: {
            "text": [weights_identity(name, f, args.teacher_revision) for f in ("text_encoder", "tokenizer")],
            "dtype": dtype, "precision": precision_name(args.text_encoder_1_precision), "length": length,
        },
    )  # fmt: skip


def encode_pixels(vae, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
    """Normalised latents. [B, 3, F, H, W] -> [B, C, f, h, w]"""
    latents, scale = vae.encode(pixels).latent_dist.mode(), vae.config.scaling_factor
    return {"latents": LTXImageToVideoPipeline._normalize_latents(latents, vae.latents_mean, vae.latents_std, scale)}


@torch.no_grad()
def decode(vae, latents: torch.Tensor) -> list:
    """[B, C, f, h, w] -> B times [F, H, W, 3] in [0, 1]."""
    scale = vae.config.scaling_factor
    latents = LTXPipeline._denormalize_latents(latents.float(), vae.latents_mean, vae.latents_std, scale)
    pixels = vae.decode(latents).sample  # [B, 3, F, H, W] in [-1, 1]
    return list((pixels / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 4, 1).cpu().numpy())


def predict(transformer, x, t, cond: dict[str, torch.Tensor]):
    """The flow velocity eps - x0 at x_t. [B, C, F, h, w]"""
    embeds, (frames, height, width) = cond["prompt_embeds"], x.shape[2:]
    v = transformer(
        hidden_states=x.flatten(2).transpose(1, 2).to(embeds.dtype),  # [B, C, F, h, w] -> [B, F*h*w, C]
        encoder_hidden_states=embeds, timestep=t, encoder_attention_mask=cond["mask"], num_frames=frames,
        height=height, width=width,
        rope_interpolation_scale=(FRAMES_PER_LATENT / FRAMES_PER_SECOND, SIDE_FACTOR, SIDE_FACTOR),
    ).sample  # fmt: skip
    return v.transpose(1, 2).unflatten(2, (frames, height, width))


def latent_shape(args, transformer, frames: int, size: tuple[int, int]) -> tuple[int, int, int, int]:
    return transformer.config.in_channels, frames, size[0] // SIDE_FACTOR, size[1] // SIDE_FACTOR


def tokens_of_frame(transformer, height: int, width: int) -> int:
    return height * width


@torch.no_grad()
def generate_by_teacher(args, method, transformer, vae, scheduler, cond, negative, steps: int, rngs: list, size):
    """Latents of clips, one for each random generator, by the scheduler's own steps and guidance."""
    frames = (method.validation_frames - 1) // FRAMES_PER_LATENT + 1
    shape = latent_shape(args, transformer, frames, size)
    x = torch.stack([torch.randn(shape, generator=rng) for rng in rngs]).to(transformer.device)
    negative = {name: rows.expand_as(cond[name]) for name, rows in negative.items()}
    scheduler.set_timesteps(steps)
    for t in scheduler.timesteps:
        v, v_uncond = (predict(transformer, x, t.expand(len(x)), text).float() for text in (cond, negative))
        x = scheduler.step(v_uncond + method.teacher_guidance * (v - v_uncond), t, x).prev_sample
    return x


def export(args, method, folder: Path, transformer, dtype) -> tuple[list[str], str]:
    scheduler = stock_scheduler(method.steps) or FlowMatchLCMScheduler(shift=1.0)
    scheduler.save_pretrained(folder / "scheduler")
    load, given, files = "", "", ["scheduler", "pytorch_lora_weights.safetensors"]
    if args.model_type == "lora":
        layers = get_peft_model_state_dict(transformer, adapter_name="student")
        LTXPipeline.save_lora_weights(folder, {name: value.contiguous() for name, value in layers.items()})
        after = f'pipeline.load_lora_weights("{folder}", weight_name="{files[1]}")\n'
    else:
        transformer.save_pretrained(folder / "transformer")
        files[1], given, after = "transformer", ", transformer=transformer", ""
        load = f'transformer = LTXVideoTransformer3DModel.from_pretrained("{folder}", subfolder="transformer")\n'
    usage = (
        "from diffusers import FlowMatchLCMScheduler, LTXPipeline, LTXVideoTransformer3DModel\n\n"
        f'scheduler = FlowMatchLCMScheduler.from_pretrained("{folder}", subfolder="scheduler")\n{load}'
        f'pipeline = LTXPipeline.from_pretrained("{teacher_of(args)}", scheduler=scheduler{given})\n{after}'
        f'video = pipeline("your prompt", num_frames={method.validation_frames}, guidance_scale=1.0, '
        f"timesteps={method.steps}).frames[0]\n"
    )
    return files, usage
