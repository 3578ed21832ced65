"""Launch lines and configs of documents, run as they stand but for paths, sizes and numbers of steps."""

import json
import shlex

import numpy as np
import pytest
import wandb
from PIL import Image

import train_lcm_distill_sd as script
import train_lcm_distill_sdxl as sdxl_script
from common.data.clips import save_clip
from tests.documents import LAUNCH_LINE, SDXL_LINES, wan_config, words_of, write_configs
from tests.helpers import launch, toy_shards

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return toy_shards(tmp_path_factory.mktemp("shards"))


@pytest.fixture
def offline_wandb(tmp_path, monkeypatch):
    """Runs of wandb stay in the test's folder."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    wandb.teardown()  # it reads its settings once
    yield
    wandb.teardown()


def test_the_documents_launch_line_runs_and_uploads_the_model_alone(tmp_path, sd_teacher, shards, hub):
    """Other than in the document: teacher, shards, resolution, numbers of steps, and fp16, which needs a GPU."""
    line = LAUNCH_LINE.replace("$MODEL_DIR", str(sd_teacher))
    line = line.replace("$OUTPUT_DIR", str(tmp_path / "out")).replace("=512", "=32").replace("=1000", "=4")
    line = line.replace("steps=200", "steps=2").replace("fp16", "no")
    flags = shlex.split(line.replace("\\\n", " "))
    place = next(i for i, flag in enumerate(flags) if flag.startswith("--train_shards"))
    flags[place] = f"--train_shards_path_or_url=pipe:cat {shards}"
    environment = hub.environment | {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path)}
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


def test_checkpoints_go_to_the_hub_as_the_model_that_they_are(tmp_path, sd_teacher, shards, hub_here, capsys):
    """And a hub that fails in between, here at the first of them, does not end the training."""
    hub_here.broken_commits = 1
    flags = ["--pretrained_teacher_model", sd_teacher, "--train_shards_path_or_url", shards]
    flags += ["--resolution", 32, "--output_dir", tmp_path / "out", "--train_batch_size", 2, "--max_train_steps", 5]
    flags += ["--push_to_hub", "--push_checkpoints_to_hub", "--hub_model_id", "me/out", "--checkpointing_steps", 2]
    flags += ["--validation_steps", 0, "--report_steps=", "--disable_benchmark", "--validation_num_inference_steps", 1]
    flags += ["--lora_rank", 2, "--export_formats", "diffusers,kohya", "--report_to", "none"]
    script.main(*script.parse_args([str(flag) for flag in flags]))
    assert hub_here.created[0]["visibility"] == "private"
    model = {"pytorch_lora_weights.safetensors", "kohya_lora.safetensors", "scheduler/scheduler_config.json"}
    assert hub_here.commits == {"Step 4": model, "Distilled model": model | {"README.md", "samples.png"}}
    said = capsys.readouterr().out
    assert "--push_checkpoints_to_hub: Step 2 was not uploaded" in said and "Step 4 was not uploaded" not in said


def test_the_documents_lcm_config_trains_on_small_images(tmp_path, sdxl_teacher, images, hub):
    """Other than in the document: teacher, data, sizes, and numbers of steps."""
    paths = {"output_dir": tmp_path / "out", "pretrained_model_name_or_path": sdxl_teacher}
    config = write_configs("lcm_sdxl", tmp_path, images, **paths)
    sizes = {"minimum_image_size": 0.0005, "maximum_image_size": 0.001}  # megapixels
    config |= sizes | {"resolution": 32, "validation_resolution": "32x32,48x32,32x48", "aspect_bucket_rounding": 16}
    config |= {"max_train_steps": 2, "lr_warmup_steps": 1, "validation_step_interval": 1, "checkpoint_step_interval": 1}
    (tmp_path / "config.json").write_text(json.dumps(config))
    file = tmp_path / "out" / "multidatabackend.json"
    pictures, texts = json.loads(file.read_text())
    file.write_text(json.dumps([pictures | sizes | {"resolution": 0.001, "target_downsample_size": 0.001}, texts]))

    environment = hub.environment | {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path)}
    done = launch("train_lcm_distill_sdxl.py", "--config", tmp_path / "config.json", **environment)
    assert f"--data_backend_config: {file} is taken" in done.stdout and "no checkpoint in" in done.stdout
    assert "aspect_bucket_rounding 16: decimals are 1 to 9" in done.stdout
    assert "w_min 1, w_max 12: the w of the" in done.stdout  # SimpleTuner takes them for the guidance scale
    assert "guidance_scale=1," in done.stdout  # 0 and 1 are both without: a LoRA has it inside
    assert "3 images are below minimum_image_size" in done.stdout and "caches: 8 latents" in done.stdout
    assert "for 2 steps of 4 samples" in done.stdout and "Traceback" not in done.stderr
    assert sorted(path.name for path in (tmp_path / "out").glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]
    sheet = Image.open(tmp_path / "out" / "validation" / "grid-000001.png")
    assert sheet.height > 3 * 128  # a row for each size
    assert list((tmp_path / "wandb").glob("offline-run-*"))
    assert {"pytorch_lora_weights.safetensors", "samples.png", "scheduler/scheduler_config.json"} < set(hub.files)
    assert hub.created[0]["name"] == "sdxl-lcm-distilled" and hub.created[0]["visibility"] == "private"


def test_the_documents_wan_config_runs(tmp_path, wan_teacher, wan_files, hub):
    """Other than in the document: paths, sizes, and numbers of steps. Its 121 frames are cut to whole blocks."""
    save_clip(np.linspace(0, 1, 5 * 32 * 48 * 3).reshape(5, 32, 48, 3), tmp_path / "clips" / "a.mp4", 8)
    teacher = str(wan_teacher)
    paths = {"pretrained_model_name_or_path": teacher, "pretrained_t5_model_name_or_path": teacher}
    config = wan_config("dmd_wan") | wan_files | paths | {"resolution": 32, "validation_resolution": "48x32"}
    config |= {"max_train_steps": 2, "lr_warmup_steps": 1, "validation_step_interval": 1, "checkpoint_step_interval": 1}
    (tmp_path / "config.json").write_text(json.dumps(config))
    dataset = json.loads((tmp_path / "data.json").read_text())
    dataset |= {"resolution": 32, "cache_dir": str(tmp_path / "cache")}
    (tmp_path / "data.json").write_text(json.dumps(dataset))

    environment = hub.environment | {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path)}
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


@pytest.mark.parametrize("name", SDXL_LINES)
def test_the_launch_lines_of_diffusers_sdxl_scripts_run(
    name, tmp_path, sdxl_teacher, shards, images, hub_here, offline_wandb, capsys
):
    """Other than there: teacher, VAE, data, resolution, numbers of steps, and fp16, which needs a GPU."""
    teacher, out = sdxl_teacher, tmp_path / "out"
    places = {"MODEL_NAME": teacher, "OUTPUT_DIR": out, "DATASET_NAME": images, "VAE_PATH": teacher / "vae"}
    line = SDXL_LINES[name].replace("madebyollin/sdxl-vae-fp16-fix", "${VAE_PATH}")
    flags = words_of(line, **places)
    if "wds" in name:
        flags += ["--train_shards_path_or_url", f"pipe:cat {shards}"]
    # Of a flag that is given twice the last one counts
    flags += ["--output_dir", out, "--mixed_precision", "no", "--resolution", 64, "--train_batch_size", 2]
    flags += ["--max_train_steps", 2, "--validation_steps", 1, "--checkpointing_steps", 1, "--report_steps="]
    sdxl_script.main(*sdxl_script.parse_args([str(flag) for flag in flags]))
    said = capsys.readouterr().out
    assert "8-bit AdamW" in said
    assert ("no checkpoint in" in said) == ("wds" in name)
    assert sorted(path.name for path in out.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]
    assert (out / "validation" / "grid-000001.png").exists() and list((tmp_path / "wandb").glob("offline-run-*"))
    model = {"pytorch_lora_weights.safetensors"} if "lora" in name else {"config.json", *WEIGHTS}
    assert set(hub_here.files) == {"README.md", "samples.png", "scheduler/scheduler_config.json", *model}


WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.fp16.safetensors")
