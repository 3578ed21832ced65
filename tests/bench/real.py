"""Pipelines of true size with random weights: whether a run fits, and how fast it is, shows without the hub."""

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLWan,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    WanPipeline,
    WanTransformer3DModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, UMT5Config, UMT5EncoderModel

from tests.toy import make, make_wan

VAE = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 4,
}
SD = {"sample_size": 64, "cross_attention_dim": 768}  # the class's other defaults are SD 1.5's
SDXL = {
    "sample_size": 128,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (320, 640, 1280),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 6 * 256 + 1280,
}
WAN = {"num_attention_heads": 12, "attention_head_dim": 128, "ffn_dim": 8960, "num_layers": 30}  # 1.3B
WAN |= {"in_channels": 16, "out_channels": 16, "text_dim": 4096, "freq_dim": 256}
UMT5 = {"d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4}  # its embeddings are cached: its size is no matter


def fast_device() -> torch.device:
    """Where random weights are made soonest."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def text_config(tokenizer, width: int, layers: int, heads: int) -> CLIPTextConfig:
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return CLIPTextConfig(
        vocab_size=49408, max_position_embeddings=77, hidden_size=width, projection_dim=width,
        intermediate_size=4 * width, num_hidden_layers=layers, num_attention_heads=heads, **ids,
    )  # fmt: skip


def ddim() -> DDIMScheduler:
    return DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1)


def real_sd(folder: Path) -> Path:
    """Stable Diffusion 1.5's shapes."""
    if not (folder / "model_index.json").exists():
        tokenizer = make.make_tokenizer(folder / "tokenizer")
        with fast_device():
            networks = (
                AutoencoderKL(**VAE),
                CLIPTextModel(text_config(tokenizer, 768, 12, 12)),
                tokenizer,
                UNet2DConditionModel(**SD),
            )
        checks = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        StableDiffusionPipeline(*networks, ddim(), **checks).save_pretrained(folder)
    return folder


def real_sdxl(folder: Path, **saving) -> Path:
    """SDXL's shapes, in fp16 on disk; `saving` are options of save_pretrained."""
    if not (folder / "model_index.json").exists():
        tokenizer = make.make_tokenizer(folder / "tokenizer")
        with fast_device():
            networks = (
                AutoencoderKL(**VAE, scaling_factor=0.13025),
                CLIPTextModel(text_config(tokenizer, 768, 12, 12)),
                CLIPTextModelWithProjection(text_config(tokenizer, 1280, 32, 20)),
                tokenizer,
                tokenizer,
                UNet2DConditionModel(**SDXL),
            )
        pipeline = StableDiffusionXLPipeline(*networks, ddim(), add_watermarker=False)
        pipeline.to(torch.float16).save_pretrained(folder, **saving)
    return folder


def real_wan(folder: Path) -> Path:
    """The shapes of Wan 2.1 1.3B's transformer and autoencoder."""
    if not (folder / "model_index.json").exists():
        tokenizer = make_wan.make_tokenizer()
        with fast_device():
            text = UMT5EncoderModel(UMT5Config(vocab_size=len(tokenizer), d_model=WAN["text_dim"], **UMT5))
            transformer, vae = WanTransformer3DModel(**WAN).to(torch.bfloat16), AutoencoderKLWan()
        scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
        WanPipeline(tokenizer, text, vae, scheduler, transformer).save_pretrained(folder)
    return folder
