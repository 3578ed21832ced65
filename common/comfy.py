"""LoRA files of Wan in the layout that ComfyUI reads: the names of Wan's own code, with an alpha beside each layer."""

import re
from pathlib import Path

import torch
from safetensors.torch import save_file

# Of a layer inside a block, and of those outside of all blocks: diffusers' name, and Wan's.
BLOCK_NAMES = {"attn1": "self_attn", "attn2": "cross_attn", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "o"}
BLOCK_NAMES |= {"ffn.net.0.proj": "ffn.0", "ffn.net.2": "ffn.2"}
OUTER_NAMES = {
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.time_proj": "time_projection.1",
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "proj_out": "head.head",
}


def wan_name(name: str) -> str:
    """The layer's name in Wan's own code."""
    if name in OUTER_NAMES:
        return OUTER_NAMES[name]
    found = re.fullmatch(r"(blocks\.\d+)\.(?:(attn[12])\.(to_[qkv]|to_out\.0)|(ffn\.net\.0\.proj|ffn\.net\.2))", name)
    if found is None:
        raise ValueError(f"{name}: has no name in Wan's own layout")
    return ".".join([found[1], *(BLOCK_NAMES[part] for part in found.groups()[1:] if part)])


def save_comfy_lora(path: Path, layers: dict[str, torch.Tensor], alpha: float):
    """`layers` as peft's get_peft_model_state_dict gives them."""
    converted = {}
    for key, value in layers.items():
        name, part = re.fullmatch(r"(.+)\.(lora_[AB])\.weight", key).groups()
        stem = f"diffusion_model.{wan_name(name)}"
        converted[f"{stem}.{part}.weight"] = value.contiguous()
        converted[f"{stem}.alpha"] = torch.tensor(float(alpha))  # scaled by alpha / rank, as peft does
    save_file(converted, path, {"format": "pt"})
