"""Launch lines and configs of documents as they stand, and a hub that takes what a run uploads."""

import base64
import http.server
import json
import shlex
from pathlib import Path
from string import Template

from tests.helpers import ROOT

LAUNCH_LINE = r"""
    --pretrained_teacher_model=$MODEL_DIR \
    --output_dir=$OUTPUT_DIR \
    --mixed_precision=fp16 \
    --resolution=512 \
    --learning_rate=1e-6 --loss_type="huber" --ema_decay=0.95 --adam_weight_decay=0.0 \
    --max_train_steps=1000 \
    --max_train_samples=4000000 \
    --dataloader_num_workers=8 \
    --train_shards_path_or_url="pipe:curl -L -s https://huggingface.co/datasets/laion/conceptual-captions-12m-webdataset/resolve/main/data/{00000..01099}.tar?download=true" \
    --validation_steps=200 \
    --checkpointing_steps=200 --checkpoints_total_limit=10 \
    --train_batch_size=12 \
    --gradient_checkpointing --enable_xformers_memory_efficient_attention \
    --gradient_accumulation_steps=1 \
    --use_8bit_adam \
    --resume_from_checkpoint=latest \
    --report_to=wandb \
    --seed=453645634 \
    --push_to_hub
"""  # noqa: E501


SDXL_LINES = {
    "train_lcm_distill_sdxl_wds": r"""
    --pretrained_teacher_model=$MODEL_NAME \
    --pretrained_vae_model_name_or_path=madebyollin/sdxl-vae-fp16-fix \
    --output_dir=$OUTPUT_DIR \
    --mixed_precision=fp16 \
    --resolution=1024 \
    --learning_rate=1e-6 --loss_type="huber" --use_fix_crop_and_size --ema_decay=0.95 --adam_weight_decay=0.0 \
    --max_train_steps=1000 \
    --max_train_samples=4000000 \
    --dataloader_num_workers=8 \
    --train_shards_path_or_url="pipe:curl -L -s https://huggingface.co/datasets/laion/conceptual-captions-12m-webdataset/resolve/main/data/{00000..01099}.tar?download=true" \
    --validation_steps=200 \
    --checkpointing_steps=200 --checkpoints_total_limit=10 \
    --train_batch_size=12 \
    --gradient_checkpointing --enable_xformers_memory_efficient_attention \
    --gradient_accumulation_steps=1 \
    --use_8bit_adam \
    --resume_from_checkpoint=latest \
    --report_to=wandb \
    --seed=453645634 \
    --push_to_hub \
""",  # noqa: E501
    "train_lcm_distill_lora_sdxl_wds": r"""
    --pretrained_teacher_model=$MODEL_NAME \
    --pretrained_vae_model_name_or_path=madebyollin/sdxl-vae-fp16-fix \
    --output_dir=$OUTPUT_DIR \
    --mixed_precision=fp16 \
    --resolution=1024 \
    --lora_rank=64 \
    --learning_rate=1e-4 --loss_type="huber" --use_fix_crop_and_size --adam_weight_decay=0.0 \
    --max_train_steps=1000 \
    --max_train_samples=4000000 \
    --dataloader_num_workers=8 \
    --train_shards_path_or_url="pipe:curl -L -s https://huggingface.co/datasets/laion/conceptual-captions-12m-webdataset/resolve/main/data/{00000..01099}.tar?download=true" \
    --validation_steps=200 \
    --checkpointing_steps=200 --checkpoints_total_limit=10 \
    --train_batch_size=12 \
    --gradient_checkpointing --enable_xformers_memory_efficient_attention \
    --gradient_accumulation_steps=1 \
    --use_8bit_adam \
    --resume_from_checkpoint=latest \
    --report_to=wandb \
    --seed=453645634 \
    --push_to_hub \
""",  # noqa: E501
    "train_lcm_distill_lora_sdxl": r"""
    --pretrained_teacher_model=${MODEL_NAME}  \
    --pretrained_vae_model_name_or_path=${VAE_PATH} \
    --output_dir="pokemons-lora-lcm-sdxl" \
    --mixed_precision="fp16" \
    --dataset_name=$DATASET_NAME \
    --resolution=1024 \
    --train_batch_size=24 \
    --gradient_accumulation_steps=1 \
    --gradient_checkpointing \
    --use_8bit_adam \
    --lora_rank=64 \
    --learning_rate=1e-4 \
    --report_to="wandb" \
    --lr_scheduler="constant" \
    --lr_warmup_steps=0 \
    --max_train_steps=3000 \
    --checkpointing_steps=500 \
    --validation_steps=50 \
    --seed="0" \
    --report_to="wandb" \
    --push_to_hub
""",
}


def words_of(line: str, **variables) -> list[str]:
    """As a shell splits the line."""
    return shlex.split(Template(line.replace("\\\n", " ")).substitute(variables))


def write_configs(name: str, folder: Path, images: Path, **paths) -> dict:
    """The config, in FOLDER/config.json, and where it has one its dataset file, where the document puts it."""
    config = json.loads((ROOT / "tests" / "configs" / f"{name}.config.json").read_text())
    config |= {key: str(path) for key, path in paths.items() if key in config}
    (folder / "config.json").write_text(json.dumps(config))
    datasets = ROOT / "tests" / "configs" / f"{name}.multidatabackend.json"
    if datasets.exists():
        pictures, texts = json.loads(datasets.read_text())
        pictures |= {"instance_data_dir": str(images), "cache_dir_vae": str(folder / "cache" / "vae")}
        texts |= {"cache_dir": str(folder / "cache" / "text")}
        Path(paths["output_dir"]).mkdir()
        Path(paths["output_dir"], "multidatabackend.json").write_text(json.dumps([pictures, texts]))
    return config


def wan_config(name: str) -> dict:
    return json.loads((ROOT / "tests" / "configs" / f"{name}.config.json").read_text())


class StandInHub(http.server.BaseHTTPRequestHandler):
    """Says yes to all that an upload asks, and keeps what was sent: {path: bytes}."""

    protocol_version = "HTTP/1.1"

    def answer(self, content: dict):
        body = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def received(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        data = b""
        while size := int(self.rfile.readline(), 16):
            data += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return data

    def do_GET(self):  # noqa: N802
        self.server.requests.append(self.path)
        self.answer({"name": "me", "type": "user", "orgs": [], "id": "me/out", "sha": "0" * 40, "siblings": []})

    def do_POST(self):  # noqa: N802
        self.server.requests.append(self.path)
        body = self.received()
        if self.path.endswith("/repos/create"):
            self.server.created.append(json.loads(body))
            self.answer({"url": f"{self.server.url}/me/out", "name": "me/out"})
        elif "/preupload/" in self.path:
            files = [{"path": file["path"], "uploadMode": "regular"} for file in json.loads(body)["files"]]
            self.answer({"files": [file | {"shouldIgnore": False} for file in files]})
        elif "/commit/" in self.path:
            lines = [json.loads(line) for line in body.splitlines()]
            if self.server.broken_commits:
                self.server.broken_commits -= 1
                self.send_error(403)
                return
            title = next(line["value"]["summary"] for line in lines if line["key"] == "header")
            self.server.commits[title] = {line["value"]["path"] for line in lines if line["key"] == "file"}
            for line in lines:
                if line["key"] == "file":
                    self.server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self.answer({"commitUrl": f"{self.server.url}/me/out/commit/1", "commitOid": "1" * 40, "success": True})
        else:
            self.answer({"errors": [], "warnings": []})  # of the model card

    def log_message(self, *_):
        pass
