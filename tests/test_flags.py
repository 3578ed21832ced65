"""Read-only flags, their types and rules, config files, and --help; without a script around them."""

import argparse
import copy
import json
import pickle
import re
from pathlib import Path

import pytest
import torch

import train_lcm_distill_sd as script
from common import tracking
from common.data.buckets import Rules
from common.flags import (
    Flags,
    add_bucket_flags,
    add_clip_flags,
    add_shared_flags,
    bucket_rules,
    check_shared_flags,
    filled,
    frozen,
    hide_flags,
    make_parser,
    parse_with_config,
    shared_defaults,
)
from common.optim import betas_and_decay
from tests.helpers import ROOT, toy_shards


def new_parser() -> argparse.ArgumentParser:
    parser = make_parser("What the program does.\n\n    as  it is laid out")
    add = parser.add_argument_group("model").add_argument
    add("--pretrained_teacher_model", type=str, help="folder")
    add("--resolution", type=float, default=1024, help="of training")
    add("--betas", type=float, nargs=2, default=[0.9, 0.999])
    add("--cast", action=argparse.BooleanOptionalAction, default=True, help="in half precision")
    add("--rate_of", type=str, default="90%")
    add_shared_flags(parser)
    add_bucket_flags(parser)
    add_clip_flags(parser)
    return parser


def parse(*words, recipe=None):
    parser = new_parser()
    args, notes = parse_with_config(parser, [str(word) for word in words], family="wan", method="dmd", recipe=recipe)
    return args, notes + check_shared_flags(parser, args)


def refused(capsys, *words) -> str:
    with pytest.raises(SystemExit) as stop:
        parse(*words)
    assert stop.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


# ---------------------------------------------------------------------------------------------------------------------
# Read-only flags
# ---------------------------------------------------------------------------------------------------------------------


def test_flags_are_read_only():
    args = Flags(seed=1, name=None)
    for change in (lambda: setattr(args, "seed", 2), lambda: setattr(args, "new", 2), lambda: delattr(args, "seed")):
        with pytest.raises(AttributeError, match=r"args\.(seed|new) cannot be (set|deleted): flags are read-only"):
            change()
    assert vars(args) == {"seed": 1, "name": None}


def test_flags_are_copied_by_value():
    args = Flags(seed=1, numbers=[1, 2])
    for other in (pickle.loads(pickle.dumps(args)), copy.deepcopy(args), copy.copy(args), frozen(args)):
        assert type(other) is Flags and other == args and other is not args
        with pytest.raises(AttributeError):
            other.seed = 2


def test_filled_leaves_what_is_given():
    args = Flags(seed=0, rank=None, text="")
    other = filled(args, seed=1, rank=4, text="x")
    assert vars(other) == {"seed": 0, "rank": 4, "text": ""} and args.rank is None
    with pytest.raises(KeyError):
        filled(args, rnak=4)


def test_what_is_parsed_is_read_only_and_as_given():
    args, _ = parse("--optimizer", "optimi-lion", "--report_to", "none")
    assert type(args) is Flags and args.optimizer == "optimi-lion"
    assert vars(args).keys() == {action.dest for action in new_parser()._actions} - {"help"} | {"config"}


def test_the_last_rate_follows_from_the_schedule():
    args = {"learning_rate": 1e-2, "optimizer": "adamw", "use_8bit_adam": False}
    assert shared_defaults(Flags(**args, lr_scheduler="cosine_with_min_lr"))["lr_end"] == 1e-3
    assert shared_defaults(Flags(**args, lr_scheduler="cosine"))["lr_end"] == 0.0


def test_a_switch_of_a_config_can_be_unset(tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"gradient_checkpointing": true, "cast": false, "allow_tf32": false}')
    config = ["--config", tmp_path / "config.json"]
    args, _ = parse(*config)
    assert args.gradient_checkpointing and not args.cast and not args.push_to_hub
    args, _ = parse(*config, "--no-gradient_checkpointing", "--cast", "--allow_tf32")
    assert not args.gradient_checkpointing and args.cast and args.allow_tf32
    switches = [action for action in new_parser()._actions if isinstance(action.default, bool)]
    assert len(switches) > 15 and all(f"--no-{action.dest}" in action.option_strings for action in switches)


@pytest.mark.parametrize(
    ("backend", "flags", "compiles"), [("NO", "", False), ("INDUCTOR", "", True), ("INDUCTOR", "--no-compile", False)]
)
def test_accelerates_config_may_ask_for_compilation(backend, flags, compiles, monkeypatch):
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", backend)
    args, notes = parse(*flags.split())
    assert args.compile == compiles
    assert ("--compile: accelerate's config has dynamo_backend inductor" in notes) == compiles


def test_another_backend_of_accelerates_config_is_refused(monkeypatch, capsys):
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "CUDAGRAPHS")
    assert "accelerate's config has dynamo_backend cudagraphs: set it to inductor" in refused(capsys)


def test_lion_has_its_own_moments():
    """Those of optimi-lion are what torch-optimi's Lion has, also where a config has AdamW's beside it."""
    for flags, betas, decay in (
        ("", (0.9, 0.999), 0.01), ("--optimizer lion", (0.9, 0.99), 0.0), ("--optimizer optimi-lion", (0.9, 0.99), 0.0),
        ("--optimizer lion --adam_beta2 0.95 --adam_weight_decay 0.1", (0.9, 0.95), 0.1),
        ("--optimizer optimi-lion --adam_beta2 0.999 --adam_weight_decay 0.1", (0.9, 0.99), 0.0),
    ):  # fmt: skip
        args, notes = parse(*flags.split())
        assert betas_and_decay(filled(args, **shared_defaults(args))) == (betas, decay)
        unused = flags.startswith("--optimizer optimi-lion --adam")
        assert ("no job for --adam_beta2, --adam_weight_decay" in " ".join(notes)) == unused


# ---------------------------------------------------------------------------------------------------------------------
# Types
# ---------------------------------------------------------------------------------------------------------------------


def test_lists_have_their_type_from_the_parser_on():
    args, _ = parse("--report_steps", "1,16", "--validation_resolution", "1024x768,64")
    assert (args.report_steps, args.validation_num_inference_steps) == ([1, 16], [1, 2, 4, 8])
    assert args.validation_resolution == [(768, 1024), (64, 64)]  # height first
    args, _ = parse("--report_steps=")
    assert args.report_steps == [] and args.validation_resolution is None


BAD_LISTS = [
    ("--report_steps=1,0", "argument --report_steps: '1,0' must be numbers of at least 1"),
    ("--validation_num_inference_steps=", "argument --validation_num_inference_steps: '' must be numbers"),
    ("--validation_num_inference_steps=few", "'few' must be numbers of at least 1 with commas between, as 1,2,4,8"),
    ("--validation_resolution=64x65", "argument --validation_resolution: '64x65' must be WIDTHxHEIGHT in multiples"),
    ("--validation_resolution=64x64x64", "'64x64x64' must be WIDTHxHEIGHT"),
    ("--validation_resolution=big", "'big' must be WIDTHxHEIGHT"),
    ("--validation_resolution=0", "'0' must be WIDTHxHEIGHT"),
]


@pytest.mark.parametrize(("word", "named"), BAD_LISTS)
def test_a_bad_list_is_one_sentence(word, named, capsys):
    assert named in refused(capsys, word)


# ---------------------------------------------------------------------------------------------------------------------
# Rules and notes
# ---------------------------------------------------------------------------------------------------------------------


def test_rules_return_notes_and_change_nothing():
    args, notes = parse("--base_model_precision", "int8-quanto", "--local_rank", 3, "--use_8bit_adam")
    assert (args.base_model_precision, args.optimizer, args.lr_end) == ("int8-quanto", "adamw", None)
    assert notes == [
        "--base_model_precision int8-quanto: an alias, int8-torchao is in use",
        "--local_rank: no job, accelerate sets it",
    ]


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("--use_8bit_adam --optimizer optimi-lion", "--use_8bit_adam and --optimizer optimi-lion: one or the other"),
        ("--lr_scheduler cosine --lr_end 1", "--lr_end 1.0 and --learning_rate 0.0001: need 0 <= lr_end"),
        ("--report_to tensorboard,clearml", "must be of tensorboard, wandb, trackio, all, or none"),
        ("--report_to none,wandb", "must be of tensorboard"),
        ("--webhook_config no_such.json", "--webhook_config no_such.json: No such file"),
        ("--eval_samples 0", "--eval_samples 0: must be at least 1"),
    ],
)
def test_a_broken_rule_is_one_sentence(words, named, capsys):
    assert named in refused(capsys, *words.split())


def test_a_tracker_that_is_not_installed_is_known_before_anything_loads(capsys, monkeypatch):
    monkeypatch.setattr(tracking, "installed", lambda name: name == "tensorboard")
    message = refused(capsys, "--report_to", "tensorboard,wandb")
    assert "--report_to tensorboard,wandb: wandb is not installed: pip install wandb==" in message
    assert parse("--report_to", "all")[0].report_to == "all" and tracking.tracker_names("all") == ["tensorboard"]


def test_all_trackers_are_those_that_are_ready(capsys, monkeypatch):
    monkeypatch.setattr(tracking, "installed", lambda name: name != "trackio")
    monkeypatch.setattr(tracking, "wandb_refuses", lambda: "wandb has no login")
    assert "--report_to all: without wandb: wandb has no login" in parse("--report_to", "all")[1]
    assert tracking.tracker_names("all") == ["tensorboard"]
    assert "--report_to wandb: wandb has no login" in refused(capsys, "--report_to", "wandb")
    monkeypatch.setattr(tracking, "wandb_refuses", lambda: None)
    assert not any("wandb" in note for note in parse("--report_to", "all")[1])
    assert tracking.tracker_names("all") == ["tensorboard", "wandb"]


def test_rules_of_sizes():
    parser = new_parser()
    words = ["--center_crop", "--bucket_alignment", "8", "--aspect_bucket_rounding", "16"]
    rules, notes = bucket_rules(parser, parse_with_config(parser, words, family="wan", method="dmd")[0])
    assert rules == Rules(1024, alignment=16, crop_style="center") and "--aspect_bucket_rounding 16" in notes[0]
    parser = new_parser()
    args, _ = parse_with_config(parser, ["--resolution", "0"], family="wan", method="dmd")
    with pytest.raises(SystemExit):
        bucket_rules(parser, args)


# ---------------------------------------------------------------------------------------------------------------------
# Config files
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def config(tmp_path):
    def write(settings) -> list:
        (tmp_path / "c.json").write_text(json.dumps(settings))
        return ["--config", tmp_path / "c.json"]

    return write


def test_a_config_has_the_flags_types(config):
    settings = {"report_steps": [1, 3], "validation_num_inference_steps": 4, "validation_resolution": "64x32"}
    settings |= {"betas": [0, 0.5], "learning_rate": 1, "cast": False, "seed": None, "random_flip": True}
    args, _ = parse(*config(settings))
    assert (args.report_steps, args.validation_num_inference_steps) == ([1, 3], [4])
    assert args.validation_resolution == [(32, 64)] and (args.cast, args.random_flip, args.seed) == (False, True, 42)
    assert (args.betas, args.learning_rate) == ([0.0, 0.5], 1.0)
    assert parse(*config({"validation_resolution": 64}))[0].validation_resolution == [(64, 64)]


def test_the_command_line_wins_over_the_config_and_the_config_over_the_recipe(config):
    def recipe(args):
        assert args.pretrained_teacher_model is None
        return {"learning_rate": 3.0, "seed": 3, "report_steps": "3"}

    words = [*config({"learning_rate": 2.0, "seed": 2}), "--seed", 1]
    args, _ = parse(*words, recipe=recipe)
    assert (args.learning_rate, args.seed, args.report_steps) == (2.0, 1, [3])
    args, _ = parse(*words, "--pretrained_teacher_model", "x", recipe=recipe)
    assert (args.learning_rate, args.report_steps) == (2.0, [1, 2, 4, 8])


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"learning_rat": 1}, "unknown key 'learning_rat', did you mean 'learning_rate'?"),
        ({"report_steps": [1, 0]}, "report_steps '1,0' must be numbers of at least 1"),
        ({"report_steps": ["1"]}, "report_steps is ['1'], and must be of type str"),
        ({"report_steps": True}, "report_steps is True, and must be of type str"),
        ({"validation_resolution": 65}, "validation_resolution '65' must be WIDTHxHEIGHT"),
        ({"betas": [0.5]}, "betas is [0.5], and must be a list of 2"),
        ({"betas": [0.5, "x"]}, "betas is 'x', and must be of type float"),
        ({"cast": 1}, "cast is 1, and must be of type bool"),
        ({"optimizer": "sgd"}, "optimizer is 'sgd', and must be one of adamw, adamw_bf16"),
        ({"model_flavour": "x"}, "model_flavour is 'x', known for wan: t2v-480p-1.3b-2.1, t2v-480p-14b-2.1"),
        ([], "must be a JSON object"),
    ],
)
def test_a_bad_config_is_one_sentence_with_the_files_name(settings, named, config, capsys):
    message = refused(capsys, *config(settings))
    assert named in message and "--config" in message and "c.json" in message


# ---------------------------------------------------------------------------------------------------------------------
# --help
# ---------------------------------------------------------------------------------------------------------------------


def helped(capsys, *hidden) -> str:
    parser = new_parser()
    hide_flags(parser, *hidden)
    parser.set_defaults(train_batch_size=3, report_steps=None)
    with pytest.raises(SystemExit):
        parse_with_config(parser, ["--help"], family="wan", method="dmd")
    return capsys.readouterr().out


def test_help_shows_every_default_once(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")
    text = re.sub(r"\n {9,}", "  ", helped(capsys))  # a long flag's help stands below it
    lines = {line.split()[0].rstrip(","): line for line in text.splitlines() if line.startswith("  --")}
    for action in new_parser()._actions:
        if action.dest in ("help", "local_rank", "report_steps"):
            continue
        line = lines[action.option_strings[0]]
        assert line.count("default") == 1 or action.default is None or action.default is False, line
    assert lines["--train_batch_size"].endswith("; default 3") and lines["--eval_steps"].endswith("; default 0")
    assert lines["--validation_num_inference_steps"].endswith("default 1,2,4,8")
    assert lines["--learning_rate"].endswith("; default 0.0001") and lines["--betas"].endswith("  default 0.9 0.999")
    assert lines["--cast"].endswith("in half precision; default on") and lines["--rate_of"].endswith("default 90%")
    assert "default" not in lines["--report_steps"] and "default" not in lines["--random_flip"]


def test_help_is_short_where_it_can_be(capsys):
    text = helped(capsys, "eval_steps")
    assert text.splitlines()[0].endswith(" [flags]") and "\n    as  it is laid out\n" in text
    titles = [line for line in text.splitlines() if line.endswith(":") and not line.startswith(" ")]
    assert len(titles) > 9 and all(len(title) < 25 for title in titles)
    assert "--eval_steps" not in text.replace("for --eval_steps", "") and "--local_rank" not in text
    parser = new_parser()
    hide_flags(parser, "eval_steps")
    assert parse_with_config(parser, ["--eval_steps", "3"], family="wan", method="dmd")[0].eval_steps == 3


# ---------------------------------------------------------------------------------------------------------------------
# Flags of a script
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return toy_shards(tmp_path_factory.mktemp("shards"))


@pytest.fixture
def parse_script(shards, tmp_path):
    """`parse_script(config, *flags)`: args, data and notes, of a config and flags on shards that exist."""

    def parsed(config: dict | None, *flags):
        words = ["--pretrained_teacher_model", "teacher", "--train_shards_path_or_url", shards, *flags]
        if config is not None:
            (tmp_path / "config.json").write_text(json.dumps(config))
            words += ["--config", tmp_path / "config.json"]
        return script.parse_args([str(word) for word in words])

    return parsed


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
    ("--resolution", "3"),
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
    ("--attention_mechanism", "sage"),
    ("--attention_mechanism", "_flash_3"),
    ("--attention_without_gradient", "diffusers"),
    ("--lr_end", "1.0"),  # above the rate
    ("--export_formats", "pickle"),
    ("--webhook_config", "no_such.json"),
]


@pytest.mark.parametrize(("flag", "value"), BAD_FLAGS)
def test_a_bad_flag_is_named_with_its_value(parse_script, capsys, flag, value):
    with pytest.raises(SystemExit) as stop:
        parse_script(None, f"{flag}={value}")
    message = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 2
    assert flag in message and value.split(",")[-1] in message


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ("--w_min 3 --w_max 2", "--w_min 3.0 and --w_max 2.0: need 0 <= w_min <= w_max"),
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
        ("--checkpoint_attention", "--checkpoint_attention: needs --gradient_checkpointing"),
        ("--offload_activations", "--offload_activations: needs --gradient_checkpointing"),
        ("--export_formats kohya", "--export_formats kohya: is a layout of LoRA files"),
    ],
)
def test_flags_that_do_not_go_together(parse_script, capsys, flags, named):
    with pytest.raises(SystemExit) as stop:
        parse_script(None, *flags.split())
    assert stop.value.code == 2 and named in capsys.readouterr().err


def test_a_teacher_needs_shards(capsys):
    with pytest.raises(SystemExit):
        script.parse_args(["--pretrained_teacher_model", "teacher"])
    assert "--train_shards_path_or_url: needed with --pretrained_teacher_model" in capsys.readouterr().err


def test_flags_without_a_job_say_so(parse_script, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert [note.split(":")[0] for note in parse_script(None, "--allow_tf32", "--local_rank", 3)[2]] == [
        "--allow_tf32",
        "--local_rank",
        "--vae_encode_batch_size",
    ]


def test_the_kind_of_student_follows_from_its_flags(parse_script):
    for words, kind in (([], "full"), (["--use_dora"], "lora"), (["--lora_rank", 4], "lora")):
        assert parse_script(None, *words)[0].model_type == kind
    assert parse_script(None, "--model_type", "lora")[0].lora_rank == 64


def test_no_flags_are_the_toy_recipe():
    args, data, notes = script.parse_args([])
    assert args.pretrained_teacher_model is None and script.teacher_of(args) == str(ROOT / "tests" / "toy" / "sd")
    assert args.resolution == 64 and args.model_type == "full" and "toy teacher" in notes[0]
    assert data.source == "--train_shards_path_or_url" and len(data.datasets[0].parts) == 4
    assert script.parse_args(["--learning_rate", "0.5"])[0].learning_rate == 0.5
    lora, *_ = script.parse_args(["--lora_rank", "4"])  # the recipe has settings of its own for a LoRA
    assert (args.num_ddim_timesteps, lora.num_ddim_timesteps, lora.lora_rank) == (50, 10, 4)


@pytest.mark.parametrize("nested", [{"lcm": {"w_min": 1.0, "w_max": 12}}, {"w_min": 1.0, "w_max": 12}])
def test_settings_of_the_method_are_nested_or_flat(parse_script, nested):
    args, *_ = parse_script({"distillation_method": "lcm", "model_family": "sd", "distillation_config": nested})
    assert (args.w_min, args.w_max) == (1.0, 12.0)


def test_flags_win_over_the_config_and_the_config_over_defaults(parse_script):
    config = {"learning_rate": 0.5, "train_batch_size": 3, "random_flip": True, "lora_rank": 8, "max_grad_norm": None}
    args, *_ = parse_script(config, "--learning_rate", 0.25)
    assert (args.learning_rate, args.train_batch_size, args.random_flip, args.model_type) == (0.25, 3, True, "lora")
    assert args.max_grad_norm == 1.0  # null: as if it were not there
    assert (
        parse_script({"learning_rate": 0.5}, "--learning_rate", 1e-4)[0].learning_rate == 1e-4
    )  # also where it is the default


def test_a_single_number_of_steps_is_a_list_of_one(parse_script):
    """As the quickstart's config has it."""
    assert parse_script({"validation_num_inference_steps": 4})[0].validation_num_inference_steps == [4]


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
def test_a_bad_config_of_a_script_is_one_sentence(parse_script, capsys, config, named):
    with pytest.raises(SystemExit) as stop:
        parse_script(config)
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
    _, data, _ = with_entries(
        [
            images,
            {"id": "off", "type": "webdataset", "instance_data_dir": "no_such.tar", "disabled": True},
            {"id": "b", "type": "webdataset", "instance_data_dir": second},
            {"id": "text", "type": "local", "dataset_type": "text_embeds", "cache_dir": "embeds", "default": True},
        ]
    )
    assert [Path(part).name for dataset in data.datasets for part in dataset.parts] == [
        f"0000{i}.tar" for i in range(4)
    ]
    assert [dataset.cache_dir_vae for dataset in data.datasets] == ["latents", None]
    assert (data.cache_dir_text, data.samples) == ("embeds", 32)
    assert len(with_entries(images)[1].datasets[0].parts) == 2  # a single object is a list of one
    assert "'c': type is 'parquet', and must be one of local, webdataset, huggingface, csv" in refused(
        [images, {"id": "c", "type": "parquet"}]
    )
    assert "'d' has no instance_data_dir" in refused([{"id": "d", "type": "webdataset"}])
    assert "must be a list of objects" in refused(["a.tar"])
    with pytest.raises(SystemExit):
        script.parse_args(["--pretrained_teacher_model", "teacher", "--data_backend_config", "no_such.json"])
    assert "no_such.json: No such file" in capsys.readouterr().err


def test_fp16_on_a_cpu_is_refused(parse_script, tmp_path):
    with pytest.raises(SystemExit, match="--mixed_precision fp16: needs a GPU"):
        script.main(*parse_script(None, "--mixed_precision", "fp16", "--output_dir", tmp_path))
