"""LoRA files in the layout of kohya's scripts, which A1111 and ComfyUI read.

Every adapted layer is `lora_unet_NAME.lora_down.weight`, `.lora_up.weight` and `.alpha`, with DoRA also `.dora_scale`.
NAME is the layer's name in diffusers with underscores; for SDXL it is that in Stability's own code ("sgm").
"""

import re
from pathlib import Path

import torch
from safetensors.torch import save_file

# Where diffusers' layer lies in Stability's code: inside a residual block, and outside of all blocks.
RESNET_LAYERS = {
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
OUTER_LAYERS = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}


def sgm_name(name: str, unet) -> str:
    """The layer's name in Stability's code, which counts the blocks of each side through: residual blocks, one after
    another, each with its attention behind it, and then what changes the size."""
    if name in OUTER_LAYERS:
        return OUTER_LAYERS[name]
    if found := re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d+)\.(.*)", name):
        kind, place, layer = found.groups()
        inner, place = ("1", 0) if kind == "attentions" else (str(2 * int(place)), int(place))
        return f"middle_block.{inner}.{RESNET_LAYERS.get(layer, layer)}"
    found = re.fullmatch(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.*)", name)
    if found is None:
        raise ValueError(f"{name}: has no name in SDXL's own layout")
    side, block, kind, place, layer = found[1], int(found[2]), found[3], int(found[4]), found[5]
    before = getattr(unet, f"{side}_blocks")[:block]
    count = sum(len(b.resnets) for b in before)
    if side == "down":
        # input_blocks.0 is conv_in; each block that makes the picture smaller takes one more place for it
        count += 1 + sum(b.downsamplers is not None for b in before)
        if kind == "downsamplers":
            return f"input_blocks.{count + len(unet.down_blocks[block].resnets)}.0.op"
        inner = "1" if kind == "attentions" else "0"
        return f"input_blocks.{count + place}.{inner}.{RESNET_LAYERS.get(layer, layer)}"
    if kind == "upsamplers":  # behind the block's last residual block, and its attention if it has one
        here = unet.up_blocks[block]
        return f"output_blocks.{count + len(here.resnets) - 1}.{1 + bool(getattr(here, 'attentions', None))}.conv"
    inner = "1" if kind == "attentions" else "0"
    return f"output_blocks.{count + place}.{inner}.{RESNET_LAYERS.get(layer, layer)}"


def kohya_layers(unet, layers: dict[str, torch.Tensor], alpha: float, sgm: bool) -> dict[str, torch.Tensor]:
    """`layers` as peft's get_peft_model_state_dict gives them."""
    converted = {}
    for key, value in layers.items():
        name, part = re.fullmatch(r"(.+)\.(lora_A|lora_B|lora_magnitude_vector)(?:\.weight)?", key).groups()
        stem = "lora_unet_" + (sgm_name(name, unet) if sgm else name).replace(".", "_")
        if part == "lora_magnitude_vector":  # one number for each output, with the weight's axes
            axes = unet.get_submodule(name).get_base_layer().weight.ndim
            converted[f"{stem}.dora_scale"] = value.reshape(-1, *[1] * (axes - 1)).contiguous()
        else:
            converted[f"{stem}.{'lora_down' if part == 'lora_A' else 'lora_up'}.weight"] = value.contiguous()
            converted[f"{stem}.alpha"] = torch.tensor(float(alpha))  # scaled by alpha / rank, as peft does
    return converted


def save_kohya_lora(path: Path, unet, layers: dict[str, torch.Tensor], rank: int, alpha: float, sgm: bool):
    metadata = {"format": "pt", "ss_network_module": "networks.lora"}
    metadata |= {"ss_network_dim": str(rank), "ss_network_alpha": str(alpha)}
    save_file(kohya_layers(unet, layers, alpha, sgm), path, metadata)
