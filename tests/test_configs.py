"""Launch lines and configs of documents mean their flags."""

import json
import shlex
import sys

import pytest

import train_dmd_distill_wan as wan_script
import train_lcm_distill_sd as script
import train_lcm_distill_sdxl as sdxl_script
from common.keys import FLAG_OF_KEY
from common.networks import precision_name
from common.optim import optimizer_name
from tests.data.helpers import table_module
from tests.documents import LAUNCH_LINE, SDXL_LINES, wan_config, words_of, write_configs


def parse_wan(*words):
    return wan_script.parse_args([str(word) for word in words])


@pytest.fixture(scope="module")
def shards(small_shards):
    return f"{small_shards}/{{00000..00001}}.tar"


def test_the_documents_launch_line_parses():
    args, data, _ = script.parse_args(shlex.split(LAUNCH_LINE.replace("\\\n", " ")))
    shards = data.datasets[0].parts
    assert len(shards) == 1100 and shards[7].endswith("/data/00007.tar?download=true")
    assert shards[7].startswith("pipe:curl -L -s https://huggingface.co/")
    assert (args.max_train_steps, data.samples, data.caches) == (1000, 4_000_000, "off")
    assert (optimizer_name(args), args.mixed_precision, args.report_to) == ("adamw8bit", "fp16", "wandb")
    assert (args.model_type, args.push_to_hub, args.seed) == ("full", True, 453645634)


def test_the_documents_flags_and_defaults(shards):
    """Every flag of diffusers' two Stable Diffusion scripts, with its default there, but for those that DESIGN changes.

    Those are seed and output, and --vae_encode_batch_size, which follows from the size of pictures.
    """
    base = ["--pretrained_teacher_model", "x", "--train_shards_path_or_url", shards]
    args = vars(script.parse_args(base)[0])
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
        "unet_time_cond_proj_dim": 256, "timestep_scaling_factor": 10.0,
        "ema_decay": 0.95, "mixed_precision": None, "allow_tf32": False,
        "enable_xformers_memory_efficient_attention": False,
        "gradient_checkpointing": False, "local_rank": -1, "validation_steps": 200, "push_to_hub": False,
        "hub_token": None, "hub_model_id": None, "tracker_project_name": "text2image-fine-tune",
    }  # fmt: skip
    assert {name: args[name] for name in defaults} == defaults
    assert "cast_teacher_unet" in args


@pytest.mark.parametrize("name", ["lcm_sdxl", "sdxl_lora", "quantized", "validation_preview"])
def test_a_documents_config_means_its_flags(name, tmp_path, images):
    paths = {"output_dir": tmp_path / "out", "pretrained_model_name_or_path": "teacher"}
    config = write_configs(name, tmp_path, images, **paths)
    flags = ["--config", str(tmp_path / "config.json")]
    if "output_dir" not in config:  # part of a config: the rest is given on the command line
        flags += ["--pretrained_teacher_model", "teacher", "--train_data_dir", str(images)]
    args, data, _ = sdxl_script.parse_args(flags)

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
        expected["validation_num_inference_steps"] = [expected["validation_num_inference_steps"]]
    if name == "sdxl_lora":
        assert args.pretrained_teacher_model == "stabilityai/stable-diffusion-xl-base-1.0"
    if name == "quantized":
        assert (precision_name(args.base_model_precision), optimizer_name(args)) == ("int8-torchao", "lion")
    assert {key: getattr(args, key) for key in expected} == expected

    rules = data.datasets[0].rules
    if name in ("lcm_sdxl", "sdxl_lora"):  # the dataset's own entry wins
        assert data.source == "--data_backend_config" and data.datasets[0].id != "images"
        assert (rules.resolution, rules.resolution_type, rules.crop) == (1.0, "area", name == "sdxl_lora")
        assert rules.minimum == ("area", 500_000 if name == "lcm_sdxl" else 250_000)
        assert rules.maximum == rules.downsample == ("area", 1_000_000)
        assert (data.cache_dir_text, data.write_batch_size) == (str(tmp_path / "cache" / "text"), 128)
    else:
        assert (rules.resolution, rules.resolution_type, rules.minimum) == (1024, "pixel", None)
    assert rules.alignment == 64


# ---------------------------------------------------------------------------------------------------------------------
# Wan
# ---------------------------------------------------------------------------------------------------------------------


def test_every_key_of_the_documents_wan_config_means_its_flag(tmp_path, wan_files):
    config = wan_config("dmd_wan")
    assert wan_files.keys() < config.keys()
    config |= wan_files
    (tmp_path / "config.json").write_text(json.dumps(config))
    args, data, method, notes = parse_wan("--config", tmp_path / "config.json")

    expected = config | config.pop("distillation_config")
    for key in ("model_family", "distillation_method", "distillation_config", "delete_problematic_images"):
        expected.pop(key, None)
    expected = {FLAG_OF_KEY.get(key, key): value for key, value in expected.items()}
    expected |= {"validation_resolution": [(704, 1280)], "validation_num_inference_steps": [3]}
    assert {key: getattr(args, key) for key in expected} == expected
    assert len(expected) > 70  # that it is not compared with little
    assert method.validation_frames == 81  # of 121: 31 latent frames are no whole blocks of 3
    assert method.teacher_guidance == 3.0  # 1 is the student's; the teacher's is real_score_guidance_scale
    dataset = data.datasets[0]
    assert (dataset.num_frames, dataset.kind, dataset.rules.resolution_type) == (81, "video", "pixel_area")
    assert sum("int8-quanto: an alias" in note for note in notes) == 2


def test_the_documents_wan_config_with_prompts_instead_of_clips(tmp_path, wan_files):
    """A flag on the command line wins over the config's dataset file, which need not exist."""
    config = wan_config("dmd_wan") | wan_files | {"data_backend_config": "config/wan/multidatabackend.json"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "prompts.txt").write_text("a red ball\n")
    _, data, _, _ = parse_wan("--config", tmp_path / "config.json", "--train_prompts", tmp_path / "prompts.txt")
    assert data.datasets[0].sizes == ((352, 640),)  # 480 x 480 pixels in the shape of 1280 x 704


def test_the_documents_advanced_wan_settings(tmp_path, wan_files):
    """Part of a config; of 121 frames 28 latent ones are trained, which the document's blocks of 3 divide after one."""
    config = wan_config("dmd_wan_advanced")
    nested = dict(config["distillation_config"])
    config |= {"pretrained_model_name_or_path": "teacher", "data_backend_config": wan_files["data_backend_config"]}
    (tmp_path / "config.json").write_text(json.dumps(config | {"max_train_steps": 1}))
    flags = ["--config", tmp_path / "config.json", "--independent_first_frame"]
    args, data, _, _ = parse_wan(*flags, "--validation_num_video_frames", 85)
    assert {key: getattr(args, key) for key in nested} == nested
    assert data.datasets[0].num_frames == 121  # 1 + 30 latent frames


def test_the_documents_advanced_settings_over_its_quickstart(tmp_path, wan_files):
    """Blocks of 3 do not divide 28: the run takes 27, and cuts the document's clips of 121 frames to these."""
    config, advanced = wan_config("dmd_wan") | wan_files, wan_config("dmd_wan_advanced")["distillation_config"]
    config["distillation_config"] = config["distillation_config"] | advanced
    (tmp_path / "config.json").write_text(json.dumps(config))
    args, data, method, notes = parse_wan("--config", tmp_path / "config.json")
    assert args.num_training_frames == 27 and {args.timestep_shift, args.generator_update_interval} == {7.0, 4}
    assert (data.datasets[0].num_frames, method.validation_frames) == (105, 105)
    assert sum("--num_training_frames 28: is not whole blocks of 3; 27 is taken" in note for note in notes) == 1
    assert sum("cut to --num_training_frames 27, 105 frames" in note for note in notes) == 2


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
        ({"distillation_method": "dcm"}, "distillation_method is 'dcm', and must be one of dmd, lcm"),
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
    args, *_ = parse_wan("--config", tmp_path / "config.json", "--train_data_dir", tmp_path / "clips")
    assert (args.dmd_denoising_steps, args.fake_score_betas) == ("1000,757,522", [0.5, 0.75])
    assert args.pretrained_teacher_model == "Wan-AI/Wan2.1-T2V-14B-Diffusers"


@pytest.mark.parametrize(("flags", "method"), [((), "lcm"), (("--distillation_method", "dmd"), "dmd")])
def test_a_wan_config_names_the_method_and_has_a_block_for_each(flags, method, tmp_path, wan_files):
    """The command line's method takes the block of its own."""
    blocks = {"dmd": {"fake_score_lr": 3e-5}, "lcm": {"num_ddim_timesteps": 30, "loss_type": "huber"}}
    config = {"distillation_method": "lcm", "distillation_config": blocks, "max_train_steps": 1}
    config |= {"pretrained_model_name_or_path": "teacher", "num_training_frames": 21, "num_frames": 81}
    (tmp_path / "config.json").write_text(json.dumps(config))
    args, *_ = parse_wan("--config", tmp_path / "config.json", "--train_data_dir", tmp_path / "clips", *flags)
    found = (args.num_ddim_timesteps, args.loss_type, args.fake_score_lr)
    assert (args.distillation_method, *found) == (
        method,
        *((30, "huber", 1e-5) if method == "lcm" else (50, "l2", 3e-5)),
    )


def test_a_config_says_what_the_script_or_the_method_does_not_use(tmp_path, wan_files):
    """As a note, where the command line's flag is refused: a config may be that of another method."""
    config = {"distillation_config": {"fake_score_lr": 3e-5, "timestep_shift": 5.0, "loss_type": "huber"}}
    config |= {"random_flip": True, "eval_steps_interval": 50, "evaluation_type": "clip", "validation_preview": True}
    config |= {"pretrained_evaluation_model_name_or_path": "clip", "frame_interval": 2, "max_train_steps": 1}
    config |= {"pretrained_model_name_or_path": "teacher", "num_training_frames": 21, "eval_samples": 8}
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    (tmp_path / "prompts.txt").write_text("a red ball")

    def told(*flags):
        *_, notes = parse_wan("--config", path, *flags)
        return [note.removeprefix(f"{path}: not used ") for note in notes if f"{path}: not used " in note]

    script = "by this script: eval_steps, evaluation_type, evaluation_clip_model, validation_preview"
    clips, prompts = ("--train_data_dir", tmp_path / "clips"), ("--train_prompts", tmp_path / "prompts.txt")
    lcm = ("--distillation_method", "lcm")
    assert told(*clips) == [script, "by --distillation_method dmd: loss_type, random_flip"]
    assert told(*clips, *lcm) == [script, "by --distillation_method lcm: fake_score_lr, timestep_shift"]
    assert told(*prompts)[2:] == ["with prompts alone: frame_interval"]
    assert told(*prompts, *lcm)[2:] == ["with prompts alone: frame_interval, random_flip"]
    unset = ("--no-random_flip", "--loss_type", "l2", "--no-validation_preview")
    assert told(*clips, *unset) == [script.removesuffix(", validation_preview")]


def test_the_documents_wan_config_with_latent_consistency(tmp_path, wan_files):
    """Which the document advises for the 14B model: settings of DMD alone, and blocks, have no effect."""
    config = wan_config("dmd_wan") | wan_files
    config["distillation_config"] |= {"timestep_shift": 7.0}
    (tmp_path / "config.json").write_text(json.dumps(config))
    args, data, method, notes = parse_wan("--config", tmp_path / "config.json", "--distillation_method", "lcm")
    unused = "not used by --distillation_method lcm: timestep_shift, num_frame_per_block"
    assert f"{tmp_path / 'config.json'}: {unused}" in notes and args.num_frame_per_block == 0
    assert (data.datasets[0].num_frames, method.validation_frames) == (81, 121)  # no blocks have to divide them


def test_what_only_the_command_line_has_is_refused_beside_a_config(tmp_path, wan_files, capsys):
    config = {"pretrained_model_name_or_path": "teacher", "max_train_steps": 1, "fake_score_lr": 3e-5}
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_training_frames": 21}))
    flags = ["--config", tmp_path / "config.json", "--train_data_dir", tmp_path / "clips"]
    for more, named in (
        (("--distillation_method", "lcm", "--fake_score_lr", 4e-5), "--fake_score_lr: belongs to --distillation_meth"),
        (("--validation_preview",), "--validation_preview: has no job in this script"),
    ):
        with pytest.raises(SystemExit):
            parse_wan(*flags, *more)
        assert named in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------------
# SDXL
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SDXL_LINES)
def test_the_launch_lines_of_diffusers_sdxl_scripts_parse(name, monkeypatch):
    rows = [{"image": {"bytes": b"", "path": None}, "text": "a"}] * 5
    monkeypatch.setitem(sys.modules, "datasets", table_module(rows))
    variables = {"MODEL_NAME": "stabilityai/stable-diffusion-xl-base-1.0", "OUTPUT_DIR": "path/to/saved/model"}
    variables |= {"DATASET_NAME": "lambdalabs/naruto-blip-captions", "VAE_PATH": "madebyollin/sdxl-vae-fp16-fix"}
    args, data, _ = sdxl_script.parse_args(words_of(SDXL_LINES[name], **variables))
    assert (args.pretrained_teacher_model, args.resolution) == (variables["MODEL_NAME"], 1024)
    assert args.pretrained_vae_model_name_or_path == variables["VAE_PATH"]
    assert (optimizer_name(args), args.mixed_precision, args.report_to) == ("adamw8bit", "fp16", "wandb")
    assert args.gradient_checkpointing and args.push_to_hub
    assert (args.model_type, args.lora_rank) == (("lora", 64) if "lora" in name else ("full", None))
    (dataset,) = data.datasets
    if "wds" in name:
        assert len(dataset.parts) == 1100 and dataset.parts[7].endswith("/data/00007.tar?download=true")
        assert (args.max_train_steps, data.samples, args.seed) == (1000, 4_000_000, 453645634)
        assert dataset.rules.fixed_size_ids and (args.loss_type, data.caches) == ("huber", "off")
        assert args.resume_from_checkpoint == "latest"
    else:
        assert (dataset.id, data.samples, args.seed) == (variables["DATASET_NAME"], 5, 0)
        assert not dataset.rules.fixed_size_ids and (args.max_train_steps, args.lr_warmup_steps) == (3000, 0)
    assert (dataset.rules.resolution, dataset.rules.crop_aspect) == (1024, "square")


def test_diffusers_sdxl_flags_and_defaults(shards):
    """Every flag of diffusers' three SDXL scripts with its default there, but for those that DESIGN changes.

    Those are: the seed, the rate of train_lcm_distill_lora_sdxl (1e-6 there), --cast_teacher_unet, which is on, and
    --vae_encode_batch_size (8 there, which are 21 GB), which follows from the size of pictures.
    """
    base = ["--pretrained_teacher_model", "x", "--train_shards_path_or_url", shards]
    args = vars(sdxl_script.parse_args(base)[0])
    defaults = {
        "pretrained_vae_model_name_or_path": None, "teacher_revision": None, "revision": None, "cache_dir": None,
        "output_dir": "lcm-xl-distilled", "logging_dir": "logs", "report_to": "tensorboard", "checkpointing_steps": 500,
        "checkpoints_total_limit": None, "resume_from_checkpoint": None, "dataset_name": None,
        "dataset_config_name": None, "train_data_dir": None, "image_column": "image", "caption_column": "text",
        "resolution": 1024, "interpolation_type": "bilinear", "use_fix_crop_and_size": False, "center_crop": False,
        "random_flip": False, "dataloader_num_workers": 0, "train_batch_size": 16,
        "num_train_epochs": 100, "max_train_steps": None, "max_train_samples": None, "learning_rate": 1e-4,
        "scale_lr": False, "lr_scheduler": "constant", "lr_warmup_steps": 500, "gradient_accumulation_steps": 1,
        "use_8bit_adam": False, "adam_beta1": 0.9, "adam_beta2": 0.999, "adam_weight_decay": 1e-2,
        "adam_epsilon": 1e-8, "max_grad_norm": 1.0, "proportion_empty_prompts": 0, "w_min": 3.0, "w_max": 15.0,
        "num_ddim_timesteps": 50, "loss_type": "l2", "huber_c": 0.001, "timestep_scaling_factor": 10.0,
        "unet_time_cond_proj_dim": 256, "ema_decay": 0.95, "mixed_precision": None, "allow_tf32": False,
        "enable_xformers_memory_efficient_attention": False, "gradient_checkpointing": False, "local_rank": -1,
        "validation_steps": 200, "push_to_hub": False, "hub_token": None, "hub_model_id": None,
        "tracker_project_name": "text2image-fine-tune",
    }  # fmt: skip
    assert {name: args[name] for name in defaults} == defaults
    assert args["cast_teacher_unet"] and args["seed"] == 42
    lora = {"lora_rank": 64, "lora_alpha": 64, "lora_dropout": 0.0, "lora_target_modules": sdxl_script.LORA_TARGETS}
    given = vars(sdxl_script.parse_args([*base, "--model_type", "lora"])[0])
    assert {name: given[name] for name in lora} == lora
    assert [args[name] for name in lora] == [None] * 4  # a full student has none
    assert sdxl_script.parse_args([*base, "--encode_batch_size", "3"])[0].vae_encode_batch_size == 3
