"""The model that a run leaves behind: its card, the way to the hub, and LoRA files in the layouts of other programs."""

import json
import re
import shlex
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from common.tracking import public_settings, public_word


def write_model_card(
    args, *, teacher: str, title: str, tags: list[str], usage: str, results: str, picture: str = "samples.png"
):
    """Writes OUTPUT_DIR/README.md: how to use the model, what the results are, and the command that trained it."""
    command = shlex.join(["accelerate", "launch", *hide_secrets(sys.argv)])
    settings = json.dumps(dict(sorted(public_settings(args).items())), indent=2, default=str)
    # base_model is a name on the hub; a folder of this machine means nothing to others
    base_model = f"base_model: {teacher}\n" if not Path(teacher).exists() else ""
    Path(args.output_dir, "README.md").write_text(
        f"---\nlibrary_name: diffusers\n{base_model}tags: {json.dumps(tags)}\n---\n\n# {title}\n\n"
        f"![samples]({picture})\n\n## Use\n\n```python\n{usage}```\n\n{results}"
        f"## Training\n\n```bash\n{command}\n```\n\n```json\n{settings}\n```\n"
    )


def hide_secrets(argv: list[str]) -> list[str]:
    """The command line with *** for the hub's token, and without what opens the data."""
    hidden, secret = [], False
    for word in argv:
        name, equals, _ = word.partition("=")
        is_token = name.startswith("--hub_t")  # argparse takes abbreviations
        hidden.append("***" if secret else f"{name}=***" if equals and is_token else public_word(word))
        secret = is_token and not equals
    return hidden


def create_hub_repository(args) -> str:
    """Creates a private repository; done before training, so that a missing login costs no hours of work."""
    from huggingface_hub import create_repo

    name = args.hub_model_id or Path(args.output_dir).resolve().name
    try:
        return create_repo(name, token=args.hub_token, private=True, exist_ok=True).repo_id
    except Exception as error:
        raise SystemExit(
            f"--push_to_hub: cannot create {name} on the hub ({error}). Log in with `hf auth login`."
        ) from None


def push_to_hub(args, repository: str, files: list[str], message: str, fatal: bool = True):
    """Uploads the named files and folders of the output folder, and nothing else in it."""
    from huggingface_hub import upload_folder

    patterns = [f"{name}/*" if Path(args.output_dir, name).is_dir() else name for name in files]
    try:
        upload_folder(
            repo_id=repository, folder_path=args.output_dir, allow_patterns=patterns, token=args.hub_token,
            commit_message=message,
        )  # fmt: skip
    except Exception as error:  # a hub that is away for a while must not end the training
        if fatal:
            raise
        print(f"--push_checkpoints_to_hub: {message} was not uploaded ({error})")


# diffusers' names of layers and Stability's: inside a residual block, and outside of all blocks.
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
    """The layer's name in Stability's code. It numbers the residual blocks of each side, each with its attention, and
    the layers that change the size one after another, across diffusers' blocks."""
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
        # input_blocks.0 is conv_in; a block that makes the picture smaller has one more place for this
        count += 1 + sum(b.downsamplers is not None for b in before)
        if kind == "downsamplers":
            return f"input_blocks.{count + len(unet.down_blocks[block].resnets)}.0.op"
        inner = "1" if kind == "attentions" else "0"
        return f"input_blocks.{count + place}.{inner}.{RESNET_LAYERS.get(layer, layer)}"
    if kind == "upsamplers":  # in the place of the block's last residual block, behind its attention if there is one
        here = unet.up_blocks[block]
        return f"output_blocks.{count + len(here.resnets) - 1}.{1 + bool(getattr(here, 'attentions', None))}.conv"
    inner = "1" if kind == "attentions" else "0"
    return f"output_blocks.{count + place}.{inner}.{RESNET_LAYERS.get(layer, layer)}"


def kohya_layers(unet, layers: dict[str, torch.Tensor], alpha: float, sgm: bool) -> dict[str, torch.Tensor]:
    """Kohya's names for `layers`, which are as peft's get_peft_model_state_dict gives them."""
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


# diffusers' names of layers and Wan's: inside a block, and outside of all blocks.
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
    """Writes `layers`, which are as peft's get_peft_model_state_dict gives them, under the names of Wan's own code."""
    converted = {}
    for key, value in layers.items():
        name, part = re.fullmatch(r"(.+)\.(lora_[AB])\.weight", key).groups()
        stem = f"diffusion_model.{wan_name(name)}"
        converted[f"{stem}.{part}.weight"] = value.contiguous()
        converted[f"{stem}.alpha"] = torch.tensor(float(alpha))  # scaled by alpha / rank, as peft does
    save_file(converted, path, {"format": "pt"})
