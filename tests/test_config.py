"""Flags, configs, a launch line from a document as it stands, and what reaches the hub."""

import base64
import http.server
import json
import shlex
import sys
import threading
from pathlib import Path
from string import Template

import pytest
from PIL import Image

import train_dmd_distill_wan as wan_script
import train_lcm_distill_sd as script
import train_lcm_distill_sdxl as sdxl_script
from common.export import hide_secrets
from common.flags import FLAG_OF_KEY
from tests.helpers import ROOT, launch, tiny_pipeline, tiny_sdxl_pipeline, tiny_wan_pipeline, toy_shards
from tests.test_buckets import table_module
from tests.test_video import frame, video


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return toy_shards(tmp_path_factory.mktemp("shards"))


@pytest.fixture()
def parse(shards, tmp_path):
    """parse(config, *flags): a config and flags, on shards that exist."""

    def parsed(config: dict | None, *flags):
        words = ["--pretrained_teacher_model", "teacher", "--train_shards_path_or_url", shards, *flags]
        if config is not None:
            (tmp_path / "config.json").write_text(json.dumps(config))
            words += ["--config", tmp_path / "config.json"]
        return script.parse_args([str(word) for word in words])

    return parsed


# ---------------------------------------------------------------------------------------------------------------------
# Flags
# ---------------------------------------------------------------------------------------------------------------------

AT_LEAST_ONE = (
    "train_batch_size", "gradient_accumulation_steps", "vae_encode_batch_size", "num_train_epochs", "max_train_steps",
    "max_train_samples", "checkpoints_total_limit", "resolution", "num_ddim_timesteps", "unet_time_cond_proj_dim",
    "lora_rank", "lora_alpha", "validation_preview_steps", "eval_samples",
)  # fmt: skip
NOT_NEGATIVE = (
    "dataloader_num_workers", "checkpointing_steps", "validation_steps", "lr_warmup_steps", "seed", "eval_steps",
    "scheduled_sampling_max_step_offset",
)  # fmt: skip
POSITIVE = ("learning_rate", "max_grad_norm", "adam_epsilon", "huber_c", "timestep_scaling_factor")
FRACTIONS = ("adam_beta1", "adam_beta2", "ema_decay", "lora_dropout")
BAD_FLAGS = [
    *((f"--{name}", value) for name in AT_LEAST_ONE for value in ("0", "-3")),
    *((f"--{name}", "-1") for name in NOT_NEGATIVE),
    *((f"--{name}", value) for name in POSITIVE for value in ("0.0", "-0.5", "inf", "nan")),
    *((f"--{name}", value) for name in FRACTIONS for value in ("-0.5", "1.0", "nan")),
    ("--adam_weight_decay", "-0.5"),
    ("--proportion_empty_prompts", "1.5"),
    ("--proportion_empty_prompts", "nan"),
    ("--w_min", "16.0"),  # above the default --w_max 15.0
    ("--w_min", "-0.5"),
    ("--w_min", "nan"),
    ("--resolution", "33"),
    ("--validation_num_inference_steps", "1,0"),
    ("--validation_num_inference_steps", "few"),
    ("--report_to", "clearml"),
    ("--report_to", "wandb,clearml"),
    ("--validation_prompt_library", "no_such_file.json"),
    ("--train_shards_path_or_url", "no_such_shard.tar"),
    ("--optimizer", "sgd"),
    ("--mixed_precision", "fp8"),
    ("--interpolation_type", "sinc"),
    ("--loss_type", "l1"),
    ("--lr_scheduler", "cosin"),
    ("--max_train_steps", "many"),
    ("--report_steps", "1,0"),
    ("--validation_resolution", "64x65"),
    ("--validation_resolution", "64x64x64"),
    ("--validation_resolution", "big"),
    ("--base_model_precision", "int4"),
    ("--attention_mechanism", "flashy"),
    ("--lr_end", "1.0"),  # above the rate
    ("--export_formats", "pickle"),
    ("--webhook_config", "no_such.json"),
]


@pytest.mark.parametrize(("flag", "value"), BAD_FLAGS)
def test_a_bad_flag_is_named_with_its_value(parse, capsys, flag, value):
    with pytest.raises(SystemExit) as stop:
        parse(None, f"{flag}={value}")
    message = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 2
    assert flag in message and value.split(",")[-1] in message


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ("--w_min 3 --w_max 2", "--w_min 3.0 and --w_max 2.0: need 0 <= w_min <= w_max"),
        ("--vae_cache_ondemand --vae_cache_disable", "--vae_cache_ondemand and --vae_cache_disable"),
        ("--use_8bit_adam --optimizer lion", "--use_8bit_adam and --optimizer lion"),
        ("--model_type full --lora_rank 4", "--model_type full: takes no --lora_* flag"),
        ("--model_type full --use_dora", "--model_type full: takes no --lora_* flag"),
        ("--train_shards_path_or_url pipe:true", "--max_train_steps or --max_train_samples"),
        ("--lora 4", "ambiguous option: --lora could match"),
        ("--scheduled_sampling_probability 0.5", "--scheduled_sampling_max_step_offset: one needs the other"),
        ("--scheduled_sampling_max_step_offset 5", "--scheduled_sampling_max_step_offset: one needs the other"),
        ("--ignore_final_epochs", "--ignore_final_epochs: needs --max_train_steps"),
        ("--num_train_epochs 0", "--num_train_epochs 0: must be at least 1, or give --max_train_steps"),
        ("--lr_end 1e-6", "--lr_end 1e-06 and --lr_scheduler constant: it has no decay"),
        ("--evaluation_type clip", "--evaluation_type clip: needs --evaluation_clip_model"),
        ("--push_checkpoints_to_hub", "--push_checkpoints_to_hub: needs --push_to_hub"),
        ("--export_formats kohya", "--export_formats kohya: is a layout of LoRA files"),
    ],
)
def test_flags_that_do_not_go_together(parse, capsys, flags, named):
    with pytest.raises(SystemExit) as stop:
        parse(None, *flags.split())
    assert stop.value.code == 2 and named in capsys.readouterr().err


def test_a_teacher_needs_shards(capsys):
    with pytest.raises(SystemExit):
        script.parse_args(["--pretrained_teacher_model", "teacher"])
    assert "--train_shards_path_or_url: needed with --pretrained_teacher_model" in capsys.readouterr().err


def test_flags_without_a_job_say_so(parse, monkeypatch):
    monkeypatch.setattr(script.torch.cuda, "is_available", lambda: False)
    assert [note.split(":")[0] for note in parse(None, "--allow_tf32", "--local_rank", 3).notes] == [
        "--allow_tf32",
        "--local_rank",
    ]


def test_the_kind_of_student_follows_from_its_flags(parse):
    assert parse(None).model_type == "full"
    assert parse(None, "--use_dora").model_type == parse(None, "--lora_rank", 4).model_type == "lora"
    assert parse(None, "--model_type", "lora").lora_rank == 64


def test_no_flags_are_the_toy_recipe(tmp_path):
    args = script.parse_args([])
    assert args.toy and args.resolution == 64 and args.model_type == "full" and "toy teacher" in args.notes[0]
    assert script.parse_args(["--learning_rate", "0.5"]).learning_rate == 0.5
    lora = script.parse_args(["--lora_rank", "4"])  # the recipe has settings of its own for a LoRA
    assert (args.num_ddim_timesteps, lora.num_ddim_timesteps, lora.lora_rank) == (50, 10, 4)


# ---------------------------------------------------------------------------------------------------------------------
# Configs
# ---------------------------------------------------------------------------------------------------------------------

VALUE_OF_KEY = {
    "pretrained_model_name_or_path": "another/teacher",
    "caption_dropout_probability": 0.25,
    "vae_batch_size": 7,
    "use_gradient_checkpointing": True,
    "validation_step_interval": 11,
    "checkpoint_step_interval": 13,
}


@pytest.mark.parametrize("key", FLAG_OF_KEY)
def test_a_key_with_another_name_reaches_its_flag(tmp_path, shards, key):
    config = {"pretrained_model_name_or_path": "teacher", "train_shards_path_or_url": shards, key: VALUE_OF_KEY[key]}
    (tmp_path / "c.json").write_text(json.dumps(config))
    args = script.parse_args(["--config", str(tmp_path / "c.json")])
    assert getattr(args, FLAG_OF_KEY[key]) == VALUE_OF_KEY[key]
    assert not args.toy


@pytest.mark.parametrize("nested", [{"lcm": {"w_min": 1.0, "w_max": 12}}, {"w_min": 1.0, "w_max": 12}])
def test_settings_of_the_method_are_nested_or_flat(parse, nested):
    args = parse({"distillation_method": "lcm", "model_family": "sd", "distillation_config": nested})
    assert (args.w_min, args.w_max) == (1.0, 12.0)


def test_flags_win_over_the_config_and_the_config_over_defaults(parse):
    config = {"learning_rate": 0.5, "train_batch_size": 3, "random_flip": True, "lora_rank": 8, "max_grad_norm": None}
    args = parse(config, "--learning_rate", 0.25)
    assert (args.learning_rate, args.train_batch_size, args.random_flip, args.model_type) == (0.25, 3, True, "lora")
    assert args.max_grad_norm == 1.0  # null: as if it were not there
    assert parse({"learning_rate": 0.5}, "--learning_rate", 1e-4).learning_rate == 1e-4  # also where it is the default


def test_a_single_number_of_steps_is_a_list_of_one(parse):
    """As the quickstart's config has it."""
    assert parse({"validation_num_inference_steps": 4}).validation_num_inference_steps == [4]


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"learning_rat": 1e-4}, "unknown key 'learning_rat', did you mean 'learning_rate'?"),
        ({"validation_step_intervall": 5}, "did you mean 'validation_step_interval'?"),
        ({"zzzzzz": 5}, "unknown key 'zzzzzz'"),
        ({"gradient_checkpointing": "False"}, "gradient_checkpointing is 'False', and must be of type bool"),
        ({"gradient_checkpointing": 1}, "gradient_checkpointing is 1, and must be of type bool"),
        ({"train_batch_size": "4"}, "train_batch_size is '4', and must be of type int"),
        ({"train_batch_size": True}, "train_batch_size is True, and must be of type int"),
        ({"train_batch_size": 1.5}, "train_batch_size is 1.5, and must be of type int"),
        ({"learning_rate": "1e-4"}, "learning_rate is '1e-4', and must be of type float"),
        ({"output_dir": ["a"]}, "output_dir is ['a'], and must be of type str"),
        ({"loss_type": "l1"}, "loss_type is 'l1', and must be one of l2, huber"),
        ({"model_family": "sdxl"}, "model_family is 'sdxl', and this script is for 'sd'"),
        ({"distillation_method": "dmd"}, "distillation_method is 'dmd', and this script is for 'lcm'"),
        ({"distillation_config": {"dmd": {"ts_schedule": True}}}, "unknown key 'dmd'"),
        ({"distillation_config": [1]}, "distillation_config is [1], and must be an object"),
        ({"delete_problematic_images": True}, "delete_problematic_images: this program never deletes your files"),
        ({"config": "other.json"}, "unknown key 'config'"),
        ({"w_min": 3.0, "w_max": 2.0}, "--w_min 3.0 and --w_max 2.0"),
        ([], "must be a JSON object"),
    ],
)
def test_a_bad_config_is_one_sentence(parse, capsys, config, named):
    with pytest.raises(SystemExit) as stop:
        parse(config)
    assert stop.value.code == 2 and named in capsys.readouterr().err.splitlines()[-1]


def test_a_config_that_is_no_json(tmp_path, capsys):
    (tmp_path / "c.json").write_text("{learning_rate: 1}")
    with pytest.raises(SystemExit):
        script.parse_args(["--config", str(tmp_path / "c.json")])
    assert "c.json is not JSON" in capsys.readouterr().err


def test_a_dataset_file(tmp_path, shards, capsys):
    def with_entries(entries):
        (tmp_path / "data.json").write_text(json.dumps(entries))
        config = {"pretrained_model_name_or_path": "teacher", "data_backend_config": str(tmp_path / "data.json")}
        (tmp_path / "c.json").write_text(json.dumps(config))
        return script.parse_args(["--config", str(tmp_path / "c.json")])

    def refused(entries) -> str:
        with pytest.raises(SystemExit) as stop:
            with_entries(entries)
        assert stop.value.code == 2
        return capsys.readouterr().err.splitlines()[-1]

    first = shards.replace("{00000..00003}", "{00000..00001}")
    second = shards.replace("{00000..00003}", "{00002..00003}")
    images = {"id": "a", "type": "webdataset", "instance_data_dir": first, "cache_dir_vae": "latents"}
    args = with_entries(
        [
            images,
            {"id": "off", "type": "webdataset", "instance_data_dir": "no_such.tar", "disabled": True},
            {"id": "b", "type": "webdataset", "instance_data_dir": second},
            {"id": "text", "type": "local", "dataset_type": "text_embeds", "cache_dir": "embeds", "default": True},
        ]
    )
    assert [Path(part).name for dataset in args.datasets for part in dataset.parts] == [
        f"0000{i}.tar" for i in range(4)
    ]
    assert [dataset.cache_dir_vae for dataset in args.datasets] == ["latents", None]
    assert (args.cache_dir_text, args.num_samples) == ("embeds", 32)
    assert len(with_entries(images).datasets[0].parts) == 2  # a single object is a list of one
    assert "'c' has type 'parquet'" in refused([images, {"id": "c", "type": "parquet"}])
    assert "'d' has no instance_data_dir" in refused([{"id": "d", "type": "webdataset"}])
    assert "must be a list of objects" in refused(["a.tar"])
    with pytest.raises(SystemExit):
        script.parse_args(["--pretrained_teacher_model", "teacher", "--data_backend_config", "no_such.json"])
    assert "no_such.json: No such file" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------------
# The document's launch line, and the hub
# ---------------------------------------------------------------------------------------------------------------------

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


def test_the_documents_launch_line_parses():
    args = script.parse_args(shlex.split(LAUNCH_LINE.replace("\\\n", " ")))
    shards = args.datasets[0].parts
    assert len(shards) == 1100 and shards[7].endswith("/data/00007.tar?download=true")
    assert shards[7].startswith("pipe:curl -L -s https://huggingface.co/")
    assert (args.max_train_steps, args.num_samples, args.caches) == (1000, 4_000_000, "off")
    assert (args.optimizer, args.mixed_precision, args.report_to) == ("adamw8bit", "fp16", "wandb")
    assert (args.model_type, args.push_to_hub, args.seed) == ("full", True, 453645634)


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


@pytest.fixture()
def hub():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), StandInHub)
    server.url = f"http://127.0.0.1:{server.server_address[1]}"
    server.requests, server.created, server.files = [], [], {}
    server.commits, server.broken_commits = {}, 0
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


def test_the_documents_launch_line_runs_and_uploads_the_model_alone(tmp_path, shards, hub):
    """Other than in the document: teacher, shards, resolution, numbers of steps, and fp16, which needs a GPU."""
    line = LAUNCH_LINE.replace("$MODEL_DIR", str(tiny_pipeline(tmp_path / "teacher")))
    line = line.replace("$OUTPUT_DIR", str(tmp_path / "out")).replace("=512", "=32").replace("=1000", "=4")
    line = line.replace("steps=200", "steps=2").replace("fp16", "no")
    flags = shlex.split(line.replace("\\\n", " "))
    place = next(i for i, flag in enumerate(flags) if flag.startswith("--train_shards"))
    flags[place] = f"--train_shards_path_or_url=pipe:cat {shards}"
    environment = {"HF_ENDPOINT": hub.url, "HF_TOKEN": "x", "HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1"}
    environment |= {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "HF_HUB_DISABLE_XET": "1"}
    done = launch("train_lcm_distill_sd.py", *flags, **environment)
    assert "xformers" in done.stdout and "8-bit AdamW" in done.stdout
    assert "feed only 4" in done.stdout  # 8 workers, 4 shards
    assert "no checkpoint in" in done.stdout and "Traceback" not in done.stderr
    assert [path.name for path in sorted((tmp_path / "out" / "validation").iterdir())] == [
        "grid-000002.png",
        "grid-000004.png",
    ]
    assert sorted(path.name for path in (tmp_path / "out").glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]
    assert list((tmp_path / "wandb").glob("offline-run-*"))

    assert [made["name"] for made in hub.created] == ["out"] and hub.created[0]["visibility"] == "private"
    assert set(hub.files) == {
        "README.md", "samples.png", "report.json", "report.png", "config.json", "scheduler/scheduler_config.json",
        "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.fp16.safetensors",
    }  # fmt: skip
    model = tmp_path / "out" / "diffusion_pytorch_model.safetensors"
    assert hub.files["diffusion_pytorch_model.safetensors"] == model.read_bytes()
    assert any(path.startswith("/api/models/me/out/commit/") for path in hub.requests)
    card = hub.files["README.md"].decode()
    assert shards in card and "00002.tar" not in card  # the shards as they were given, not all 1100 of the document


@pytest.mark.parametrize("broken", [False, True])
def test_checkpoints_go_to_the_hub_as_the_model_that_they_are(tmp_path, shards, hub, broken):
    """And a hub that fails in between does not end the training."""
    hub.broken_commits = 1 if broken else 0
    flags = ["--pretrained_teacher_model", tiny_pipeline(tmp_path / "teacher"), "--train_shards_path_or_url", shards]
    flags += ["--resolution", 32, "--output_dir", tmp_path / "out", "--train_batch_size", 2, "--max_train_steps", 3]
    flags += ["--push_to_hub", "--push_checkpoints_to_hub", "--hub_model_id", "me/out", "--checkpointing_steps", 2]
    flags += ["--validation_steps", 0, "--report_steps=", "--disable_benchmark", "--validation_num_inference_steps", 1]
    flags += ["--lora_rank", 2, "--export_formats", "diffusers,kohya", "--report_to", "none"]
    environment = {"HF_ENDPOINT": hub.url, "HF_TOKEN": "x", "HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1"}
    done = launch("train_lcm_distill_sd.py", *flags, **environment, HF_HUB_DISABLE_XET="1")
    assert hub.created[0]["visibility"] == "private"
    model = {"pytorch_lora_weights.safetensors", "kohya_lora.safetensors", "scheduler/scheduler_config.json"}
    final = {"Distilled model": model | {"README.md", "samples.png"}}
    assert hub.commits == (final if broken else {"Step 2": model} | final)
    assert ("--push_checkpoints_to_hub: Step 2 was not uploaded" in done.stdout) == broken


def test_fp16_on_a_cpu_is_refused(tmp_path, shards):
    flags = ["--pretrained_teacher_model", "teacher", "--train_shards_path_or_url", shards, "--output_dir", tmp_path]
    done = launch("train_lcm_distill_sd.py", *flags, "--mixed_precision", "fp16", check=False)
    assert done.returncode != 0 and "--mixed_precision fp16: needs a GPU" in done.stderr


def test_a_hub_that_refuses_is_known_before_training(tmp_path, shards):
    flags = ["--pretrained_teacher_model", tiny_pipeline(tmp_path / "teacher"), "--train_shards_path_or_url", shards]
    flags += ["--resolution", 32, "--output_dir", tmp_path / "out", "--push_to_hub", "--hub_model_id", "me/out"]
    done = launch("train_lcm_distill_sd.py", *flags, check=False)  # offline
    assert done.returncode != 0 and "--push_to_hub: cannot create me/out on the hub" in done.stderr
    assert not list(tmp_path.glob("out/checkpoint-*"))


@pytest.mark.parametrize(
    "words", [["--hub_token", "hf_x"], ["--hub_token=hf_x"], ["--hub_t", "hf_x"], ["--hub_to=hf_x"]]
)
def test_the_cards_command_has_no_token(words):
    """Nor one that was given by an abbreviation of the flag."""
    hidden = hide_secrets(["train.py", *words, "--seed", "1"])
    assert "hf_x" not in " ".join(hidden) and hidden[-2:] == ["--seed", "1"]


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


# ---------------------------------------------------------------------------------------------------------------------
# The documents' configs for SDXL, as they stand but for the paths
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture()
def images(tmp_path):
    """A folder of small images with captions, one of them too small."""
    folder = tmp_path / "images"
    folder.mkdir()
    for i, size in enumerate([(64, 48), (48, 64), (40, 40), (16, 16)] * 3):
        Image.new("RGB", size, (20 * i, 0, 90)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"colour {i}")
    return folder


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


@pytest.mark.parametrize("name", ["lcm_sdxl", "sdxl_lora", "quantized", "validation_preview"])
def test_a_documents_config_means_its_flags(name, tmp_path, images):
    paths = {"output_dir": tmp_path / "out", "pretrained_model_name_or_path": "teacher"}
    config = write_configs(name, tmp_path, images, **paths)
    flags = ["--config", str(tmp_path / "config.json")]
    if "output_dir" not in config:  # part of a config: the rest is given on the command line
        flags += ["--pretrained_teacher_model", "teacher", "--train_data_dir", str(images)]
    args = sdxl_script.parse_args(flags)

    expected = config | config.pop("distillation_config", {}).get("lcm", {})
    for key in ("model_family", "model_flavour", "distillation_method", "distillation_config"):
        expected.pop(key, None)
    expected = {FLAG_OF_KEY.get(key, key): value for key, value in expected.items()}
    sizes = {
        (1024, 1024): "1024x1024",
        (768, 1280): "1280x768",
        (1280, 768): "768x1280",
    }  # height and width in the code
    assert ",".join(map(sizes.get, args.validation_resolution)) == expected.pop("validation_resolution", "1024x1024")
    if name == "lcm_sdxl":
        assert args.validation_num_inference_steps == [expected.pop("validation_num_inference_steps")]
    if name == "sdxl_lora":
        assert args.pretrained_teacher_model == "stabilityai/stable-diffusion-xl-base-1.0"
    if name == "quantized":
        assert (args.base_model_precision, args.optimizer) == ("int8-torchao", "lion")  # what the names stand for
        del expected["base_model_precision"], expected["optimizer"]
    assert {key: getattr(args, key) for key in expected} == expected

    rules = args.datasets[0].rules
    if name in ("lcm_sdxl", "sdxl_lora"):  # the dataset's own entry wins
        assert args.data_source == "--data_backend_config" and args.datasets[0].id != "images"
        assert (rules.resolution, rules.resolution_type, rules.crop) == (1.0, "area", name == "sdxl_lora")
        assert rules.minimum == ("area", 500_000 if name == "lcm_sdxl" else 250_000)
        assert rules.maximum == rules.downsample == ("area", 1_000_000)
        assert (args.cache_dir_text, args.write_batch_size) == (str(tmp_path / "cache" / "text"), 128)
    else:
        assert (rules.resolution, rules.resolution_type, rules.minimum) == (1024, "pixel", None)
    assert rules.alignment == 64


def test_the_documents_lcm_config_trains_on_small_images(tmp_path, images, hub):
    """Other than in the document: teacher, data, sizes, and numbers of steps."""
    paths = {"output_dir": tmp_path / "out", "pretrained_model_name_or_path": tiny_sdxl_pipeline(tmp_path / "teacher")}
    config = write_configs("lcm_sdxl", tmp_path, images, **paths)
    sizes = {"minimum_image_size": 0.0005, "maximum_image_size": 0.001}  # megapixels
    config |= sizes | {"resolution": 32, "validation_resolution": "32x32,48x32,32x48", "aspect_bucket_rounding": 16}
    config |= {"max_train_steps": 2, "lr_warmup_steps": 1, "validation_step_interval": 1, "checkpoint_step_interval": 1}
    (tmp_path / "config.json").write_text(json.dumps(config))
    file = tmp_path / "out" / "multidatabackend.json"
    pictures, texts = json.loads(file.read_text())
    file.write_text(json.dumps([pictures | sizes | {"resolution": 0.001, "target_downsample_size": 0.001}, texts]))

    environment = {"HF_ENDPOINT": hub.url, "HF_TOKEN": "x", "HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1"}
    environment |= {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "HF_HUB_DISABLE_XET": "1"}
    done = launch("train_lcm_distill_sdxl.py", "--config", tmp_path / "config.json", **environment)
    assert f"--data_backend_config: {file} is taken" in done.stdout and "no checkpoint in" in done.stdout
    assert "aspect_bucket_rounding 16: decimals are 1 to 9" in done.stdout
    assert "--validation_guidance 0: trained is 2 to 13, 2 is taken" in done.stdout
    assert "3 images are below minimum_image_size" in done.stdout and "caches: 9 latents" in done.stdout
    assert "for 2 steps of 4 samples" in done.stdout and "Traceback" not in done.stderr
    assert sorted(path.name for path in (tmp_path / "out").glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]
    sheet = Image.open(tmp_path / "out" / "validation" / "grid-000001.png")
    assert sheet.height > 3 * 128  # a row for each size
    assert list((tmp_path / "wandb").glob("offline-run-*"))
    assert {"pytorch_lora_weights.safetensors", "samples.png", "scheduler/scheduler_config.json"} < set(hub.files)
    assert hub.created[0]["name"] == "sdxl-lcm-distilled" and hub.created[0]["visibility"] == "private"


# ---------------------------------------------------------------------------------------------------------------------
# The documents' configs for Wan
# ---------------------------------------------------------------------------------------------------------------------


def parse_wan(*words):
    return wan_script.parse_args([str(word) for word in words])


@pytest.fixture()
def wan_files(tmp_path):
    """What the documents' Wan config names: prompts, a hook, a dataset file with a clip; all but the teacher."""
    (tmp_path / "clips").mkdir()
    (tmp_path / "clips" / "a.mp4").write_bytes(video([frame(i) for i in range(5)], "mp4"))
    (tmp_path / "clips" / "a.txt").write_text("a clip")
    (tmp_path / "library.json").write_text('{"first": "a red ball"}')
    (tmp_path / "webhook.json").write_text('{"webhook_url": "http://127.0.0.1:9/"}')
    dataset = json.loads((ROOT / "tests" / "configs" / "dmd_wan.dataset.json").read_text())
    (tmp_path / "data.json").write_text(json.dumps(dataset | {"instance_data_dir": str(tmp_path / "clips")}))
    return {
        "validation_prompt_library": str(tmp_path / "library.json"),
        "webhook_config": str(tmp_path / "webhook.json"),
        "data_backend_config": str(tmp_path / "data.json"),
        "output_dir": str(tmp_path / "out"),
    }


def wan_config(name: str) -> dict:
    return json.loads((ROOT / "tests" / "configs" / f"{name}.config.json").read_text())


def test_every_key_of_the_documents_wan_config_means_its_flag(tmp_path, wan_files):
    config = wan_config("dmd_wan")
    assert wan_files.keys() < config.keys()
    config |= wan_files
    (tmp_path / "config.json").write_text(json.dumps(config))
    args = parse_wan("--config", tmp_path / "config.json")

    expected = config | config.pop("distillation_config")
    for key in ("model_family", "distillation_method", "distillation_config", "delete_problematic_images"):
        expected.pop(key, None)
    expected = {FLAG_OF_KEY.get(key, key): value for key, value in expected.items()}
    expected |= {"base_model_precision": "int8-torchao", "text_encoder_1_precision": "int8-torchao"}  # of an alias
    expected |= {"validation_resolution": [(704, 1280)], "validation_num_inference_steps": [3]}
    expected |= {"validation_num_video_frames": 81}  # of 121: 31 latent frames are no whole blocks of 3
    expected |= {"validation_guidance": 3.0}  # 1 is the student's; the teacher's is real_score_guidance_scale
    assert {key: getattr(args, key) for key in expected} == expected
    assert len(expected) > 70  # that it is not compared with little
    dataset = args.datasets[0]
    assert (dataset.num_frames, dataset.kind, dataset.rules.resolution_type) == (81, "video", "pixel_area")
    assert sum("int8-quanto: an alias" in note for note in args.notes) == 2


def test_the_documents_wan_config_with_prompts_instead_of_clips(tmp_path, wan_files):
    """A flag on the command line wins over the config's dataset file, which need not exist."""
    config = wan_config("dmd_wan") | wan_files | {"data_backend_config": "config/wan/multidatabackend.json"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "prompts.txt").write_text("a red ball\n")
    args = parse_wan("--config", tmp_path / "config.json", "--train_prompts", tmp_path / "prompts.txt")
    assert args.datasets[0].sizes == ((352, 640),)  # 480 x 480 pixels in the shape of 1280 x 704


def test_the_documents_advanced_wan_settings(tmp_path, wan_files):
    """Part of a config; of 121 frames 28 latent ones are trained, which the document's blocks of 3 divide after one."""
    config = wan_config("dmd_wan_advanced")
    nested = dict(config["distillation_config"])
    config |= {"pretrained_model_name_or_path": "teacher", "data_backend_config": wan_files["data_backend_config"]}
    (tmp_path / "config.json").write_text(json.dumps(config | {"max_train_steps": 1}))
    flags = ["--config", tmp_path / "config.json", "--independent_first_frame"]
    args = parse_wan(*flags, "--validation_num_video_frames", 85)
    assert {key: getattr(args, key) for key in nested} == nested
    assert args.datasets[0].num_frames == 121  # 1 + 30 latent frames


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"distillation_config": {"timestep_shft": 1.0}}, "unknown key 'timestep_shft', did you mean 'timestep_shift'"),
        ({"distillation_config": {"dmd": {"fake_score_beta": 1}}}, "did you mean 'fake_score_betas'?"),
        ({"fake_score_betas": "0.9,0.999"}, "fake_score_betas is '0.9,0.999', and must be a list of 2"),
        ({"fake_score_betas": [0.9]}, "fake_score_betas is [0.9], and must be a list of 2"),
        ({"fake_score_betas": [0.9, "x"]}, "fake_score_betas is 'x', and must be of type float"),
        ({"ts_schedule": "true"}, "ts_schedule is 'true', and must be of type bool"),
        ({"dmd_denoising_steps": ["1000"]}, "dmd_denoising_steps is ['1000'], and must be of type str"),
        ({"model_family": "sdxl"}, "model_family is 'sdxl', and this script is for 'wan'"),
        ({"model_flavour": "t2v-9b"}, "known for wan: t2v-480p-1.3b-2.1, t2v-480p-14b-2.1"),
        ({"num_frames": 80}, "--num_frames 80: must be 4k + 1, as 77 or 81"),
        ({"validation_num_video_frames": 120}, "--validation_num_video_frames 120: must be 4k + 1, as 117 or 121"),
    ],
)
def test_a_bad_wan_config_is_one_sentence(tmp_path, wan_files, capsys, config, named):
    base = {"max_train_steps": 1, "pretrained_model_name_or_path": "teacher", "num_training_frames": 21}
    (tmp_path / "config.json").write_text(json.dumps(base | config))
    with pytest.raises(SystemExit) as stop:
        parse_wan("--config", tmp_path / "config.json", "--train_data_dir", tmp_path / "clips")
    assert stop.value.code == 2 and named in capsys.readouterr().err.splitlines()[-1]


def test_lists_and_flavours_of_wan(tmp_path, wan_files):
    config = {"dmd_denoising_steps": [1000, 757, 522], "fake_score_betas": [0.5, 0.75], "max_train_steps": 1}
    config |= {"model_flavour": "t2v-480p-14b-2.1", "validation_num_video_frames": 81, "num_training_frames": 21}
    (tmp_path / "config.json").write_text(json.dumps(config))
    args = parse_wan("--config", tmp_path / "config.json", "--train_data_dir", tmp_path / "clips")
    assert (args.dmd_denoising_steps, args.fake_score_betas) == ("1000,757,522", [0.5, 0.75])
    assert args.pretrained_teacher_model == "Wan-AI/Wan2.1-T2V-14B-Diffusers"


def test_the_documents_wan_config_runs(tmp_path, wan_files, hub):
    """Other than in the document: paths, sizes, and numbers of steps. Its 121 frames are cut to whole blocks."""
    teacher = str(tiny_wan_pipeline(tmp_path / "teacher"))
    paths = {"pretrained_model_name_or_path": teacher, "pretrained_t5_model_name_or_path": teacher}
    config = wan_config("dmd_wan") | wan_files | paths | {"resolution": 32, "validation_resolution": "48x32"}
    config |= {"max_train_steps": 2, "lr_warmup_steps": 1, "validation_step_interval": 1, "checkpoint_step_interval": 1}
    (tmp_path / "config.json").write_text(json.dumps(config))
    dataset = json.loads((tmp_path / "data.json").read_text())
    dataset |= {"resolution": 32, "cache_dir": str(tmp_path / "cache")}
    (tmp_path / "data.json").write_text(json.dumps(dataset))

    environment = {"HF_ENDPOINT": hub.url, "HF_TOKEN": "x", "HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1"}
    environment |= {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "HF_HUB_DISABLE_XET": "1"}
    done = launch("train_dmd_distill_wan.py", "--config", tmp_path / "config.json", **environment)
    assert "31 latent frames are no whole blocks of 3; cut to --num_training_frames 21, 81 frames" in done.stdout
    assert "no checkpoint in" in done.stdout and "for 2 steps of 1 clips" in done.stdout
    assert "warning: 1 clips a step" in done.stdout and "Traceback" not in done.stderr
    assert sorted(path.name for path in (tmp_path / "out").glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]
    clips = {path.name for path in (tmp_path / "out" / "validation" / "step-000002").glob("*.mp4")}
    assert clips == {f"{which}-{i:02d}-48x32.mp4" for which in ("ema", "teacher") for i in (0, 1)}
    assert list((tmp_path / "wandb").glob("offline-run-*"))
    model = {"pytorch_lora_weights.safetensors", "scheduler/scheduler_config.json"}
    shown = {"README.md", "samples.png", "report.json", "report.png", "side_by_side.mp4", "side_by_side.png"}
    assert hub.commits == {"Step 1": model, "Distilled model": model | shown}
    assert hub.created[0]["name"] == "wan-disney-DMD-3step" and hub.created[0]["visibility"] == "private"
    rows = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [row["evaluations"] for row in rows] == [100, 100, 6, 7 * 3 + 6]


# ---------------------------------------------------------------------------------------------------------------------
# diffusers' launch lines and flags for SDXL
# ---------------------------------------------------------------------------------------------------------------------

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


@pytest.mark.parametrize("name", SDXL_LINES)
def test_the_launch_lines_of_diffusers_sdxl_scripts_parse(name, monkeypatch):
    rows = [{"image": {"bytes": b"", "path": None}, "text": "a"}] * 5
    monkeypatch.setitem(sys.modules, "datasets", table_module(rows))
    variables = {"MODEL_NAME": "stabilityai/stable-diffusion-xl-base-1.0", "OUTPUT_DIR": "path/to/saved/model"}
    variables |= {"DATASET_NAME": "lambdalabs/naruto-blip-captions", "VAE_PATH": "madebyollin/sdxl-vae-fp16-fix"}
    args = sdxl_script.parse_args(words_of(SDXL_LINES[name], **variables))
    assert (args.pretrained_teacher_model, args.resolution) == (variables["MODEL_NAME"], 1024)
    assert args.pretrained_vae_model_name_or_path == variables["VAE_PATH"]
    assert (args.optimizer, args.mixed_precision, args.report_to) == ("adamw8bit", "fp16", "wandb")
    assert args.gradient_checkpointing and args.push_to_hub
    assert (args.model_type, args.lora_rank) == ("lora" if "lora" in name else "full", 64)
    (dataset,) = args.datasets
    if "wds" in name:
        assert len(dataset.parts) == 1100 and dataset.parts[7].endswith("/data/00007.tar?download=true")
        assert (args.max_train_steps, args.num_samples, args.seed) == (1000, 4_000_000, 453645634)
        assert dataset.rules.fixed_size_ids and (args.loss_type, args.caches) == ("huber", "off")
        assert args.resume_from_checkpoint == "latest"
    else:
        assert (dataset.id, args.num_samples, args.seed) == (variables["DATASET_NAME"], 5, 0)
        assert not dataset.rules.fixed_size_ids and (args.max_train_steps, args.lr_warmup_steps) == (3000, 0)
    assert (dataset.rules.resolution, dataset.rules.crop_aspect) == (1024, "square")


@pytest.mark.parametrize("name", SDXL_LINES)
def test_the_launch_lines_of_diffusers_sdxl_scripts_run(name, tmp_path, shards, images, hub):
    """Other than there: teacher, VAE, data, resolution, numbers of steps, and fp16, which needs a GPU."""
    teacher, out = tiny_sdxl_pipeline(tmp_path / "teacher"), tmp_path / "out"
    places = {"MODEL_NAME": teacher, "OUTPUT_DIR": out, "DATASET_NAME": images, "VAE_PATH": teacher / "vae"}
    line = SDXL_LINES[name].replace("madebyollin/sdxl-vae-fp16-fix", "${VAE_PATH}")
    flags = words_of(line, **places)
    if "wds" in name:
        flags += ["--train_shards_path_or_url", f"pipe:cat {shards}"]
    # Of a flag that is given twice the last one counts
    flags += ["--output_dir", out, "--mixed_precision", "no", "--resolution", 64, "--train_batch_size", 2]
    flags += ["--max_train_steps", 2, "--validation_steps", 1, "--checkpointing_steps", 1, "--report_steps="]
    environment = {"HF_ENDPOINT": hub.url, "HF_TOKEN": "x", "HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1"}
    environment |= {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "HF_HUB_DISABLE_XET": "1"}
    done = launch("train_lcm_distill_sdxl.py", *flags, **environment)
    assert "8-bit AdamW" in done.stdout and "Traceback" not in done.stderr
    assert ("no checkpoint in" in done.stdout) == ("wds" in name)
    assert sorted(path.name for path in out.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]
    assert (out / "validation" / "grid-000001.png").exists() and list((tmp_path / "wandb").glob("offline-run-*"))
    model = {"pytorch_lora_weights.safetensors"} if "lora" in name else {"config.json", *WEIGHTS}
    assert set(hub.files) == {"README.md", "samples.png", "scheduler/scheduler_config.json", *model}


WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.fp16.safetensors")


def test_diffusers_sdxl_flags_and_defaults(shards):
    """Every flag of diffusers' three SDXL scripts with its default there, but for those that DESIGN changes.

    Those are: the seed, the rate of train_lcm_distill_lora_sdxl (1e-6 there), and --cast_teacher_unet, which is on.
    """
    base = ["--pretrained_teacher_model", "x", "--train_shards_path_or_url", shards]
    args = vars(sdxl_script.parse_args(base))
    defaults = {
        "pretrained_vae_model_name_or_path": None, "teacher_revision": None, "revision": None, "cache_dir": None,
        "output_dir": "lcm-xl-distilled", "logging_dir": "logs", "report_to": "tensorboard", "checkpointing_steps": 500,
        "checkpoints_total_limit": None, "resume_from_checkpoint": None, "dataset_name": None,
        "dataset_config_name": None, "train_data_dir": None, "image_column": "image", "caption_column": "text",
        "resolution": 1024, "interpolation_type": "bilinear", "use_fix_crop_and_size": False, "center_crop": False,
        "random_flip": False, "vae_encode_batch_size": 8, "dataloader_num_workers": 0, "train_batch_size": 16,
        "num_train_epochs": 100, "max_train_steps": None, "max_train_samples": None, "learning_rate": 1e-4,
        "scale_lr": False, "lr_scheduler": "constant", "lr_warmup_steps": 500, "gradient_accumulation_steps": 1,
        "use_8bit_adam": False, "adam_beta1": 0.9, "adam_beta2": 0.999, "adam_weight_decay": 1e-2,
        "adam_epsilon": 1e-8, "max_grad_norm": 1.0, "proportion_empty_prompts": 0, "w_min": 3.0, "w_max": 15.0,
        "num_ddim_timesteps": 50, "loss_type": "l2", "huber_c": 0.001, "timestep_scaling_factor": 10.0,
        "unet_time_cond_proj_dim": 256, "ema_decay": 0.95, "lora_rank": 64, "lora_alpha": 64, "lora_dropout": 0.0,
        "lora_target_modules": sdxl_script.LORA_TARGETS, "mixed_precision": None, "allow_tf32": False,
        "enable_xformers_memory_efficient_attention": False, "gradient_checkpointing": False, "local_rank": -1,
        "validation_steps": 200, "push_to_hub": False, "hub_token": None, "hub_model_id": None,
        "tracker_project_name": "text2image-fine-tune",
    }  # fmt: skip
    assert {name: args[name] for name in defaults} == defaults
    assert args["cast_teacher_unet"] and args["seed"] == 42
    assert sdxl_script.parse_args([*base, "--encode_batch_size", "3"]).vae_encode_batch_size == 3
