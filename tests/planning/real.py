"""Folders of real teachers' configs and no weights, which is all that --plan reads."""

import json
import shutil
from pathlib import Path

from transformers import CLIPTextConfig, UMT5Config

from tests.bench.real import SD, SDXL, VAE, WAN

TOY = Path(__file__).parent.parent / "toy"
CLIP_IDS = {"vocab_size": 49408, "bos_token_id": 49406, "eos_token_id": 49407, "pad_token_id": 49407}
CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
CLIP_G = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}
UMT5 = {
    "d_model": 4096, "d_ff": 10240, "d_kv": 64, "num_heads": 64, "num_layers": 24, "vocab_size": 256384,
    "feed_forward_proj": "gated-gelu",
}  # fmt: skip
WAN_VAE = {"scale_factor_spatial": 8, "scale_factor_temporal": 4}  # and the class's defaults
REAL = {
    "sd": {"unet": SD, "vae": VAE, "text_encoder": CLIPTextConfig(**CLIP_L, **CLIP_IDS).to_dict()},
    "sdxl": {
        "unet": SDXL, "vae": VAE | {"scaling_factor": 0.13025},
        "text_encoder": CLIPTextConfig(**CLIP_L, **CLIP_IDS).to_dict(),
        "text_encoder_2": CLIPTextConfig(**CLIP_G, **CLIP_IDS, projection_dim=1280).to_dict(),
    },
    "wan": {"transformer": WAN, "vae": WAN_VAE, "text_encoder": UMT5Config(**UMT5).to_dict()},
}  # fmt: skip
REAL["wan14b"] = REAL["wan"] | {"transformer": WAN | {"num_attention_heads": 40, "num_layers": 40, "ffn_dim": 13824}}


def real_configs(name: str, folder: Path) -> Path:
    """The toy's folder of this kind, without weights, with the configs of SD 1.5, SDXL, Wan 1.3B or 14B."""
    toy = TOY / name.removesuffix("14b")
    shutil.copytree(toy, folder, ignore=shutil.ignore_patterns("*.safetensors"), dirs_exist_ok=True)
    for part, config in REAL[name].items():
        path = folder / part / "config.json"
        kept = {key: value for key, value in json.loads(path.read_text()).items() if key.startswith("_")}
        path.write_text(json.dumps(kept | config))
    for path in folder.glob("tokenizer*/tokenizer_config.json"):
        path.write_text(path.read_text().replace('"model_max_length": 32', '"model_max_length": 77'))
    return folder
