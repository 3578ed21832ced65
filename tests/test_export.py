"""The model card without a secret in it, a hub that says no, and LoRA files for other programs."""

import itertools
import json
import re
import shlex
import sys
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file

import train_lcm_distill_sd as script
from common.export import hide_secrets, save_kohya_lora, sgm_name, write_model_card
from common.flags import Flags


def card(folder, monkeypatch, teacher: str) -> str:
    monkeypatch.setattr(sys, "argv", ["train.py", "--hub_token", "hf_secret", "--seed", "3"])
    args = Flags(output_dir=str(folder), hub_token="hf_secret", seed=3, sizes=[(64, 32)], pretrained_teacher_model=None)
    write_model_card(args, teacher=teacher, title="LCM of x", tags=["lcm"], usage="import x\n", results="| a |\n\n")
    assert args.hub_token == "hf_secret"  # the card takes nothing away
    return (folder / "README.md").read_text()


def test_the_card_tells_how_to_use_and_how_it_was_trained(tmp_path, monkeypatch):
    text = card(tmp_path, monkeypatch, "owner/name")
    assert text.startswith('---\nlibrary_name: diffusers\nbase_model: owner/name\ntags: ["lcm"]\n---\n\n# LCM of x\n')
    assert "```python\nimport x\n```" in text and "| a |" in text and "![samples](samples.png)" in text
    assert "accelerate launch train.py --hub_token '***' --seed 3" in text
    settings = json.loads(re.search(r"```json\n(.*?)\n```", text, re.DOTALL)[1])
    assert settings == {
        "output_dir": str(tmp_path), "seed": 3, "sizes": [[64, 32]], "pretrained_teacher_model": None
    }  # fmt: skip
    assert "hf_secret" not in text


def test_a_teacher_in_a_folder_is_no_base_model(tmp_path, monkeypatch):
    assert "base_model" not in card(tmp_path, monkeypatch, str(tmp_path))


def test_a_webhooks_url_is_not_in_the_card(tmp_path, monkeypatch):
    (tmp_path / "hook.json").write_text('{"webhook_url": "https://secret"}')
    args = SimpleNamespace(output_dir=str(tmp_path), webhook_config=str(tmp_path / "hook.json"))
    monkeypatch.setattr(sys, "argv", ["train.py"])
    write_model_card(args, teacher="a/b", title="", tags=[], usage="", results="")
    text = (tmp_path / "README.md").read_text()
    assert "hook.json" in text and "https://secret" not in text


@pytest.mark.parametrize("flag", ["--train_shards_path_or_url {}", "--train_shards_path_or_url={}"])
@pytest.mark.parametrize("url", ["pipe:curl -H 'Authorization: Bearer pw' x", "https://me:pw@host/0.tar?sig=pw"])
def test_what_opens_the_data_is_not_in_the_card(url, flag, tmp_path, monkeypatch):
    words = [word.format(url) for word in flag.split()]
    monkeypatch.setattr(sys, "argv", ["train.py", *words, "--validation_prompt", "a key: 'gold'?yes"])
    args = SimpleNamespace(output_dir=str(tmp_path), train_shards_path_or_url=url)
    write_model_card(args, teacher="a/b", title="", tags=[], usage="", results="")
    text = (tmp_path / "README.md").read_text()
    assert "pw" not in text and text.count(url.partition(":")[0] + ":") == 2
    assert shlex.quote("a key: 'gold'?yes") in text  # words of a prompt are no secrets


@pytest.mark.parametrize("flag", ["--hub_token", "--hub_tok", "--hub_to", "--hub_t"])  # argparse takes abbreviations
@pytest.mark.parametrize("words", ["{} hf_x", "{}=hf_x"])
def test_the_cards_command_has_no_token(words, flag):
    hidden = hide_secrets(["train.py", *words.format(flag).split(), "--seed", "1"])
    assert "hf_x" not in " ".join(hidden) and hidden[-2:] == ["--seed", "1"]


# ---------------------------------------------------------------------------------------------------------------------
# LoRA files for A1111 and ComfyUI: stock diffusers reads them back, and all names are of Stability's own layout
# ---------------------------------------------------------------------------------------------------------------------

SD = {
    "down_block_types": ("CrossAttnDownBlock2D",) * 2 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 2,
}
SDXL = {
    "down_block_types": ("DownBlock2D",) + ("CrossAttnDownBlock2D",) * 2,
    "up_block_types": ("CrossAttnUpBlock2D",) * 2 + ("UpBlock2D",),
    "transformer_layers_per_block": (1, 1, 2),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 32,
}
TARGETS = (
    "to_q,to_k,to_v,to_out.0,proj_in,proj_out,ff.net.0.proj,ff.net.2,conv1,conv2,conv_shortcut,downsamplers.0.conv,"
    "upsamplers.0.conv,time_emb_proj,time_embedding.linear_1,time_embedding.linear_2,conv_in,conv_out"
)
LINEAR_1 = ",add_embedding.linear_1,add_embedding.linear_2"


def unet_like(config, targets=TARGETS, use_dora=False, rank=3, alpha=5):
    """Two layers a block as in SD and SDXL, with adapters that do something. And the same without adapters."""
    torch.manual_seed(0)
    config = {
        "sample_size": 8, "block_out_channels": (8, 16, 16), "layers_per_block": 2, "cross_attention_dim": 8,
        "attention_head_dim": 2, "norm_num_groups": 4,
    } | config  # fmt: skip
    unet, plain = UNet2DConditionModel(**config), UNet2DConditionModel(**config)
    plain.load_state_dict(unet.state_dict())
    unet.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets.split(","), use_dora=use_dora))
    for name, p in unet.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.3)
        if "magnitude" in name:
            p.data *= torch.linspace(0.5, 1.5, p.numel()).reshape(p.shape)
    return unet.eval(), plain.eval()


def output(unet):
    rng = torch.Generator().manual_seed(1)
    x, cond = torch.randn(1, 4, 8, 8, generator=rng), torch.randn(1, 5, 8, generator=rng)
    added = {"text_embeds": torch.randn(1, 8, generator=rng), "time_ids": torch.randn(1, 6, generator=rng)}
    with torch.no_grad():
        return unet(x, 500, cond, added_cond_kwargs=added if unet.config.addition_embed_type else None).sample


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_stock_diffusers_reads_the_file_back(family, tmp_path):
    sgm = family == "sdxl"
    unet, plain = unet_like(SDXL if sgm else SD, TARGETS + LINEAR_1 * sgm)
    save_kohya_lora(tmp_path / "kohya_lora.safetensors", unet, get_peft_model_state_dict(unet), 3, 5, sgm=sgm)
    weights = load_file(tmp_path / "kohya_lora.safetensors")
    stems = {key.partition(".")[0] for key in weights}
    assert weights.keys() == {
        f"{stem}.{part}" for stem, part in itertools.product(stems, ("lora_down.weight", "lora_up.weight", "alpha"))
    }
    assert len(stems) == sum("lora_A" in name for name, _ in unet.named_parameters())
    assert all(weights[f"{stem}.alpha"] == 5.0 and weights[f"{stem}.lora_down.weight"].shape[0] == 3 for stem in stems)

    # What the pipeline's load_lora_weights does, without a whole pipeline
    pipeline = StableDiffusionXLPipeline if sgm else StableDiffusionPipeline
    before = output(plain)
    loaded, alphas = pipeline.lora_state_dict(
        str(tmp_path), weight_name="kohya_lora.safetensors", unet_config=plain.config
    )
    pipeline.load_lora_into_unet(loaded, alphas, plain, adapter_name="default")
    assert (output(plain) - before).abs().mean() > 1e-2
    torch.testing.assert_close(output(plain), output(unet), rtol=0, atol=1e-5)
    with safe_open(tmp_path / "kohya_lora.safetensors", "pt") as file:
        assert file.metadata()["ss_network_dim"] == "3"


# Names in SDXL's own checkpoint, sd_xl_base_1.0.safetensors, beside diffusers' names.
SDXL_NAMES = {
    "conv_in": "input_blocks.0.0",
    "down_blocks.0.resnets.1.conv1": "input_blocks.2.0.in_layers.2",
    "down_blocks.0.downsamplers.0.conv": "input_blocks.3.0.op",
    "down_blocks.1.resnets.0.conv_shortcut": "input_blocks.4.0.skip_connection",
    "down_blocks.1.attentions.1.proj_in": "input_blocks.5.1.proj_in",
    "down_blocks.1.downsamplers.0.conv": "input_blocks.6.0.op",
    "down_blocks.2.resnets.1.time_emb_proj": "input_blocks.8.0.emb_layers.1",
    "down_blocks.2.attentions.1.transformer_blocks.1.attn2.to_k": "input_blocks.8.1.transformer_blocks.1.attn2.to_k",
    "mid_block.resnets.0.conv2": "middle_block.0.out_layers.3",
    "mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj": "middle_block.1.transformer_blocks.0.ff.net.0.proj",
    "mid_block.resnets.1.conv1": "middle_block.2.in_layers.2",
    "up_blocks.0.resnets.2.conv1": "output_blocks.2.0.in_layers.2",
    "up_blocks.0.attentions.2.proj_out": "output_blocks.2.1.proj_out",
    "up_blocks.0.upsamplers.0.conv": "output_blocks.2.2.conv",
    "up_blocks.1.attentions.0.transformer_blocks.0.attn1.to_out.0": (
        "output_blocks.3.1.transformer_blocks.0.attn1.to_out.0"
    ),
    "up_blocks.1.upsamplers.0.conv": "output_blocks.5.2.conv",
    "up_blocks.2.resnets.2.conv_shortcut": "output_blocks.8.0.skip_connection",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "conv_out": "out.2",
}


def test_names_are_those_of_sdxls_own_checkpoint():
    _, plain = unet_like(SDXL)
    modules = dict(plain.named_modules())
    assert SDXL_NAMES.keys() <= modules.keys()
    assert {name: sgm_name(name, plain) for name in SDXL_NAMES} == SDXL_NAMES
    layers = [name for name, m in plain.named_modules() if isinstance(m, (torch.nn.Linear, torch.nn.Conv2d))]
    assert len({sgm_name(name, plain) for name in layers}) == len(layers)  # no two have one name
    with pytest.raises(ValueError, match="up_blocks.5"):
        sgm_name("up_blocks.5.other", plain)


def test_an_upsampler_without_attention_before_it_takes_attentions_place():
    """As in Stable Diffusion 1.x and its first up block, whose upsampler is output_blocks.2.1 there."""
    _, plain = unet_like(SD)
    assert sgm_name("up_blocks.0.upsamplers.0.conv", plain) == "output_blocks.2.1.conv"
    assert sgm_name("up_blocks.1.upsamplers.0.conv", plain) == "output_blocks.5.2.conv"


def test_dora_scales_give_the_adapted_weights(tmp_path):
    """By LyCORIS' formula, scale * (W + d) / |W + d| over the inputs, for what has as many scales as outputs."""
    unet, plain = unet_like(SDXL, "to_q,conv2,proj_in", use_dora=True)
    save_kohya_lora(tmp_path / "k.safetensors", unet, get_peft_model_state_dict(unet), 3, 5, sgm=True)
    weights, before = load_file(tmp_path / "k.safetensors"), output(plain)
    changed = 0
    for name, module in plain.named_modules():
        if not isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)):
            continue
        stem = "lora_unet_" + sgm_name(name, plain).replace(".", "_")
        if f"{stem}.dora_scale" in weights:
            up, down = weights[f"{stem}.lora_up.weight"], weights[f"{stem}.lora_down.weight"]
            change = (up.flatten(1) @ down.flatten(1)).reshape(module.weight.shape)
            w = module.weight.data + weights[f"{stem}.alpha"] / len(down) * change
            scale = weights[f"{stem}.dora_scale"]
            assert scale.shape == (len(w), *[1] * (w.ndim - 1))
            module.weight.data = scale * w / w.flatten(1).norm(dim=1).reshape(scale.shape)
            changed += 1
    assert changed == sum("magnitude" in name for name, _ in unet.named_parameters()) > 10
    assert (output(plain) - before).abs().mean() > 1e-2
    torch.testing.assert_close(output(plain), output(unet), rtol=0, atol=1e-4)


def run(*flags):
    script.main(*script.parse_args([str(flag) for flag in flags]))


def test_a_hub_that_refuses_is_known_before_training(tmp_path, sd_teacher, small_shards, monkeypatch):
    def refuses(*_, **__):
        raise huggingface_hub.errors.OfflineModeIsEnabled("offline")

    monkeypatch.setattr(huggingface_hub, "create_repo", refuses)
    flags = ["--pretrained_teacher_model", sd_teacher, "--train_shards_path_or_url", small_shards / "00000.tar"]
    flags += ["--resolution", 32, "--output_dir", tmp_path / "out", "--push_to_hub", "--hub_model_id", "me/out"]
    with pytest.raises(SystemExit, match="--push_to_hub: cannot create me/out on the hub"):
        run(*flags)
    assert not list(tmp_path.glob("out/checkpoint-*"))
