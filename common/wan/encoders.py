"""Wan 2.1's frozen encoders: clips to latents, prompts to embeddings, as WanPipeline has them."""

import functools

import torch
from diffusers import AutoencoderKLWan
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from diffusers.utils import is_ftfy_available
from transformers import AutoTokenizer, UMT5EncoderModel

from common.cache import identity, weights_identity
from common.data.encoder import SampleEncoder, open_stores
from common.data.samples import ImageReader
from common.networks import quantize

TEXT_FOLDERS = ("text_encoder", "tokenizer")


def text_source(args) -> dict:
    """Where text encoder and tokenizer are, as from_pretrained takes it."""
    if args.pretrained_t5_model_name_or_path:
        return {"model": args.pretrained_t5_model_name_or_path, "revision": None}
    return {"model": args.pretrained_teacher_model, "revision": args.teacher_revision}


def load_vae(args, device, dtype: torch.dtype) -> AutoencoderKLWan:
    vae = AutoencoderKLWan.from_pretrained(
        args.pretrained_teacher_model, subfolder="vae", revision=args.teacher_revision, cache_dir=args.cache_dir,
        dtype=dtype,
    )  # fmt: skip
    return vae.requires_grad_(False).eval().to(device)


def load_text_encoder(args, device, dtype: torch.dtype):
    source = text_source(args)
    name, options = source["model"], {"revision": source["revision"], "cache_dir": args.cache_dir}
    tokenizer = AutoTokenizer.from_pretrained(name, subfolder="tokenizer", **options)
    encoder = UMT5EncoderModel.from_pretrained(name, subfolder="text_encoder", dtype=dtype, **options)
    quantize(encoder, args.text_encoder_1_precision, "cpu" if args.quantize_via == "cpu" else device)
    return tokenizer, encoder.requires_grad_(False).eval().to(device)


def encode_prompts(text_encoder, prompts: list[str], length: int) -> dict[str, list[torch.Tensor]]:
    """States of each prompt's own tokens, [L, C] with L up to `length`.

    One at a time: nothing is padded, and a prompt's embedding is the same whatever is encoded beside it.
    """
    tokenizer, encoder = text_encoder
    rows = []
    for prompt in prompts:
        tokens = tokenizer(prompt_clean(prompt), max_length=length, truncation=True, return_tensors="pt")
        rows.append(encoder(tokens.input_ids.to(encoder.device)).last_hidden_state[0])
    return {"prompt_embeds": rows}


def latent_statistics(vae) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of each channel of what the VAE makes, fp32, [1, C, 1, 1, 1]."""
    mean, std = (torch.tensor(getattr(vae.config, name)) for name in ("latents_mean", "latents_std"))
    return mean.view(1, -1, 1, 1, 1).to(vae.device), std.view(1, -1, 1, 1, 1).to(vae.device)


def encode_pixels(vae, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
    """Normalised latents, the posterior's mode as Wan itself takes. [B, 3, F, H, W] -> [B, C, (F - 1) / 4 + 1, h, w]"""
    mean, std = latent_statistics(vae)
    latents = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist.mode()
    return {"latents": ((latents.float() - mean) / std).to(vae.dtype)}


def decode_latents(vae, latents: torch.Tensor) -> torch.Tensor:
    """[B, C, f, h, w] -> [B, 3, 4f - 3, H, W] in [-1, 1]."""
    mean, std = latent_statistics(vae)
    return vae.decode((latents.float() * std + mean).to(vae.dtype)).sample


def open_encoder(args, readers: list[ImageReader], device, vae_dtype, text_dtype) -> SampleEncoder:
    """What turns samples into latents and embeddings, with stores named by all that shapes their records."""
    latents, text = None, None
    if args.caches != "off":
        vae = weights_identity(args.pretrained_teacher_model, "vae", args.teacher_revision)
        identities = [identity(vae=vae, geometry=reader.geometry(), dtype=vae_dtype) for reader in readers]
        source = text_source(args)
        weights = [weights_identity(source["model"], folder, source["revision"]) for folder in TEXT_FOLDERS]
        text_identity = identity(
            text=weights, dtype=text_dtype, precision=args.text_encoder_1_precision, length=args.max_sequence_length,
            ftfy=is_ftfy_available(),
        )  # fmt: skip
        latents, text = open_stores(args, identities, text_identity)
    return SampleEncoder(
        load_vae=lambda: load_vae(args, device, vae_dtype),
        encode_pixels=encode_pixels,
        load_text=lambda: load_text_encoder(args, device, text_dtype),
        encode_prompts=functools.partial(encode_prompts, length=args.max_sequence_length),
        latents=latents,
        text=text,
        vae_batch_size=args.vae_encode_batch_size,
        device=device,
        text_length=args.max_sequence_length,
    )
