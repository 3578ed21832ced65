"""Configs, bad flags, and the document's launch line against a stand-in of the hub."""

import http.server
import json
import re
import threading

import pytest

import train_lcm_distill_sd as script
from common.config import FLAG_OF_KEY
from tests.helpers import launch, tiny_pipeline, toy_shards


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return toy_shards(tmp_path_factory.mktemp("shards"))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return tiny_pipeline(tmp_path_factory.mktemp("teacher"))


def parse(tmp_path, shards, config: dict, *flags):
    path = tmp_path / "config.json"
    settings = {"pretrained_model_name_or_path": "some/teacher", "train_shards_path_or_url": shards}
    path.write_text(json.dumps(settings | config))
    return script.parse_args(["--config", str(path), *map(str, flags)])


VALUES = {
    "pretrained_model_name_or_path": "other/teacher",
    "caption_dropout_probability": 0.25,
    "vae_batch_size": 3,
    "use_gradient_checkpointing": True,
    "validation_step_interval": 17,
    "checkpoint_step_interval": 19,
}


@pytest.mark.parametrize("key", FLAG_OF_KEY)
def test_key_of_another_name(tmp_path, shards, key):
    assert getattr(parse(tmp_path, shards, {key: VALUES[key]}), FLAG_OF_KEY[key]) == VALUES[key]


def test_keys_of_the_same_name_and_integers_for_numbers(tmp_path, shards):
    args = parse(tmp_path, shards, {"learning_rate": 1, "seed": 7, "compress_disk_cache": True, "model_type": "lora"})
    assert (args.learning_rate, args.seed, args.compress_disk_cache, args.model_type) == (1, 7, True, "lora")


@pytest.mark.parametrize("nested", [True, False])
def test_distillation_config(tmp_path, shards, nested):
    settings = {"num_ddim_timesteps": 25, "w_min": 1.0, "w_max": 12.0, "loss_type": "huber"}
    args = parse(tmp_path, shards, {"distillation_config": {"lcm": settings} if nested else settings})
    assert (args.num_ddim_timesteps, args.w_min, args.w_max, args.loss_type) == (25, 1.0, 12.0, "huber")


def test_flags_win(tmp_path, shards):
    args = parse(tmp_path, shards, {"seed": 7, "w_max": 9.0, "w_min": 1.0}, "--seed", 8, "--w_max", 3)
    assert (args.seed, args.w_min, args.w_max) == (8, 1.0, 3.0)


def test_dataset_file(tmp_path, shards):
    backend = [
        {"id": "a", "type": "webdataset", "instance_data_dir": shards, "cache_dir_vae": "/c"},
        {"id": "b", "type": "local", "instance_data_dir": "/nowhere", "disabled": True},
        {"id": "t", "dataset_type": "text_embeds", "cache_dir": "/t", "default": True},
    ]
    (tmp_path / "data.json").write_text(json.dumps(backend))
    args = parse(tmp_path, shards, {"data_backend_config": str(tmp_path / "data.json")})
    assert (args.train_shards_path_or_url, args.cache_dir_vae, args.cache_dir_text) == (shards, "/c", "/t")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"learning_rat": 1e-4}, "unknown key 'learning_rat', did you mean 'learning_rate'"),
        ({"random_flip": "False"}, "random_flip is 'False', and must be of type bool"),
        ({"seed": 1.5}, "seed is 1.5, and must be of type int"),
        ({"train_batch_size": True}, "train_batch_size is True, and must be of type int"),
        ({"loss_type": "l1"}, "loss_type is 'l1', and must be one of l2, huber"),
        ({"model_family": "sdxl"}, "model_family is 'sdxl', and this script is for 'sd'"),
        ({"distillation_method": "dmd"}, "distillation_method is 'dmd', and this script is for 'lcm'"),
        ({"delete_problematic_images": True}, "this program never deletes your files"),
        ({"data_backend_config": "/no/such.json"}, "/no/such.json: No such file"),
    ],
)
def test_bad_config(tmp_path, shards, config, message, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(tmp_path, shards, config)
    assert stop.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--w_min", "5", "--w_max", "4"], "--w_min 5.0 and --w_max 4.0: need 0 <= w_min <= w_max"),
        (["--w_min", "-1"], "--w_min -1.0"),
        (["--w_max", "nan"], "--w_max nan"),
        (["--resolution", "60"], "--resolution 60: must be a multiple of 8"),
        (["--train_batch_size", "0"], "--train_batch_size 0: must be at least 1"),
        (["--max_train_steps", "0"], "--max_train_steps 0"),
        (["--gradient_accumulation_steps", "0"], "--gradient_accumulation_steps 0"),
        (["--learning_rate", "0"], "--learning_rate 0.0: must be positive"),
        (["--learning_rate", "inf"], "--learning_rate inf"),
        (["--huber_c", "-1"], "--huber_c -1.0: must be positive"),
        (["--ema_decay", "1"], "--ema_decay 1.0: must be in [0, 1)"),
        (["--adam_beta2", "1.5"], "--adam_beta2 1.5"),
        (["--adam_weight_decay", "-1"], "--adam_weight_decay -1.0"),
        (["--proportion_empty_prompts", "2"], "--proportion_empty_prompts 2.0: must be in [0, 1]"),
        (["--lora_rank", "0"], "--lora_rank 0"),
        (["--lora_dropout", "1"], "--lora_dropout 1.0"),
        (["--model_type", "full", "--lora_rank", "4"], "--model_type full: takes no --lora_* flag"),
        (["--vae_cache_ondemand", "--vae_cache_disable"], "one or the other"),
        (["--use_8bit_adam", "--optimizer", "lion"], "--use_8bit_adam and --optimizer lion"),
        (["--validation_num_inference_steps", "4,x"], "numbers like 1,2,4,8"),
        (["--report_to", "mlflow"], "--report_to mlflow: must be of"),
        (["--validation_prompt_library", "/no.json"], "--validation_prompt_library /no.json: no such file"),
        (["--checkpointing_steps", "-1"], "--checkpointing_steps -1"),
        (["--seed", "-1"], "--seed -1"),
    ],
)
def test_bad_flags(shards, flags, message, capsys):
    base = ["--pretrained_teacher_model", "x", "--train_shards_path_or_url", shards]
    with pytest.raises(SystemExit) as stop:
        script.parse_args([*base, *flags])
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_missing_data(capsys):
    for flags, message in (
        ([], "--train_shards_path_or_url: needed with --pretrained_teacher_model"),
        (["--train_shards_path_or_url", "/none/{0..3}.tar"], "/none/0.tar does not exist (4 of 4)"),
    ):
        with pytest.raises(SystemExit):
            script.parse_args(["--pretrained_teacher_model", "x", *flags])
        assert message in capsys.readouterr().err


def test_kind_of_student_follows_from_its_flags(shards):
    base = ["--pretrained_teacher_model", "x", "--train_shards_path_or_url", shards]
    for flags, kind in (
        ([], "full"),
        (["--lora_rank", "4"], "lora"),
        (["--lora_alpha", "4"], "lora"),
        (["--lora_dropout", "0"], "lora"),
        (["--lora_target_modules", "to_q"], "lora"),
        (["--use_dora"], "lora"),
        (["--model_type", "lora"], "lora"),
    ):
        args = script.parse_args([*base, *flags])
        assert args.model_type == kind
    assert (args.lora_rank, args.lora_alpha, args.lora_dropout) == (64, 64, 0.0)
    assert len(args.lora_target_modules.split(",")) == 14


def test_the_documents_flags_and_defaults(shards):
    """Every flag of diffusers' two Stable Diffusion scripts, with its default there, but for seed and output."""
    base = ["--pretrained_teacher_model", "x", "--train_shards_path_or_url", shards]
    args = vars(script.parse_args(base))
    defaults = {
        "pretrained_vae_model_name_or_path": None, "teacher_revision": None, "revision": None, "cache_dir": None,
        "output_dir": "lcm-xl-distilled", "logging_dir": "logs", "report_to": "tensorboard", "checkpointing_steps": 500,
        "checkpoints_total_limit": None, "resume_from_checkpoint": None, "resolution": 512,
        "interpolation_type": "bilinear", "center_crop": False, "random_flip": False, "dataloader_num_workers": 0,
        "train_batch_size": 16, "num_train_epochs": 100, "max_train_steps": None, "max_train_samples": None,
        "learning_rate": 1e-4, "scale_lr": False, "lr_scheduler": "constant", "lr_warmup_steps": 500,
        "gradient_accumulation_steps": 1, "use_8bit_adam": False, "adam_beta1": 0.9, "adam_beta2": 0.999,
        "adam_weight_decay": 1e-2, "adam_epsilon": 1e-8, "max_grad_norm": 1.0, "proportion_empty_prompts": 0,
        "w_min": 5.0, "w_max": 15.0, "num_ddim_timesteps": 50, "loss_type": "l2", "huber_c": 0.001,
        "unet_time_cond_proj_dim": 256, "vae_encode_batch_size": 32, "timestep_scaling_factor": 10.0,
        "ema_decay": 0.95, "mixed_precision": None, "allow_tf32": False,
        "enable_xformers_memory_efficient_attention": False,
        "gradient_checkpointing": False, "local_rank": -1, "validation_steps": 200, "push_to_hub": False,
        "hub_token": None, "hub_model_id": None, "tracker_project_name": "text2image-fine-tune",
    }  # fmt: skip
    assert {name: args[name] for name in defaults} == defaults
    assert "cast_teacher_unet" in args


class Hub(http.server.BaseHTTPRequestHandler):
    """Answers what creating a private repository and one commit ask for, and keeps what was sent."""

    sent: list[str] = []
    created: list[dict] = []

    def reply(self, content: dict):
        body = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        self.reply({"name": "someone", "type": "user", "orgs": [], "sha": "0" * 40, "siblings": [], "id": "someone/x"})

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if "preupload" in self.path:
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]
            ]
            self.reply({"files": files})
        elif "/commit/" in self.path:
            self.sent += [json.loads(line)["value"].get("path") for line in body.splitlines() if b'"file"' in line]
            self.reply(
                {
                    "commitUrl": f"http://{self.headers['Host']}/someone/lcm-out/commit/{'0' * 40}",
                    "commitOid": "0" * 40,
                    "hookOutput": "",
                }
            )
        elif "repos/create" in self.path:
            self.created.append(json.loads(body))
            host = self.headers["Host"]
            self.reply({"url": f"http://{host}/someone/lcm-out", "id": "someone/lcm-out", "name": "someone/lcm-out"})
        else:
            self.reply({})

    def log_message(self, *_):
        pass


DOCUMENT = """
    --mixed_precision=fp16
    --resolution=512
    --learning_rate=1e-6 --loss_type="huber" --ema_decay=0.95 --adam_weight_decay=0.0
    --max_train_steps=1000
    --max_train_samples=4000000
    --dataloader_num_workers=8
    --train_shards_path_or_url="pipe:cat SHARDS/{00000..00003}.tar"
    --validation_steps=200
    --checkpointing_steps=200 --checkpoints_total_limit=10
    --train_batch_size=12
    --gradient_checkpointing --enable_xformers_memory_efficient_attention
    --gradient_accumulation_steps=1
    --use_8bit_adam
    --resume_from_checkpoint=latest
    --report_to=wandb
    --seed=453645634
    --push_to_hub
"""


def test_the_documents_launch_line(teacher, shards, tmp_path):
    """As written, but for teacher, data, sizes, and fp16, which no CPU trains in."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    line = re.sub(r"pipe:cat SHARDS", f"pipe:cat {shards.rpartition('/')[0]}", DOCUMENT).replace('"', "\0")
    flags = [part for i, text in enumerate(line.split("\0")) for part in ([text] if i % 2 else text.split())]
    joined = []
    for part in flags:  # a quoted value belongs to the flag before it
        if joined and joined[-1].endswith("="):
            joined[-1] += part
        else:
            joined.append(part)
    args = script.parse_args(["--pretrained_teacher_model", "x", *joined])
    assert args.mixed_precision == "fp16" and args.max_train_samples == 4_000_000 and args.caches == "off"
    small = ["--mixed_precision=no", "--resolution=32", "--max_train_steps=4", "--train_batch_size=2"]
    small += ["--validation_steps=2", "--checkpointing_steps=2"]
    try:
        done = launch(
            "train_lcm_distill_sd.py", "--pretrained_teacher_model", teacher, "--output_dir", tmp_path / "lcm-out",
            *joined, *small, WANDB_MODE="offline", WANDB_DIR=str(tmp_path), HF_HUB_OFFLINE="0", HF_TOKEN="hf_x",
            HF_ENDPOINT=f"http://127.0.0.1:{server.server_address[1]}",
        )  # fmt: skip
    finally:
        server.shutdown()
    assert "8-bit AdamW needs a CUDA GPU" in done.stdout
    assert "xformers" in done.stdout and "SDPA is in use" in done.stdout
    assert "no checkpoint in" in done.stdout and "nothing is cached" in done.stdout
    assert Hub.created and "private" in json.dumps(Hub.created[0])  # as a flag or as its visibility
    assert sorted(Hub.sent) == [
        "README.md",
        "config.json",
        "diffusion_pytorch_model.fp16.safetensors",
        "diffusion_pytorch_model.safetensors",
        "samples.png",
        "scheduler/scheduler_config.json",
    ]
    assert list(tmp_path.glob("wandb/offline-run-*"))
