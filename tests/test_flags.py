"""Read-only flags, their types and rules, config files, and --help; without a script around them."""

import argparse
import copy
import json
import pickle
import re

import pytest

from common import tracking
from common.data.buckets import Rules
from common.flags import (
    FLAG_OF_KEY,
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
    args = parse_with_config(parser, [str(word) for word in words], family="wan", method="dmd", recipe=recipe)
    return args, check_shared_flags(parser, args)


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
    assert shared_defaults(Flags(learning_rate=1e-2, lr_scheduler="cosine_with_min_lr")) == {"lr_end": 1e-3}
    assert shared_defaults(Flags(learning_rate=1e-2, lr_scheduler="cosine")) == {"lr_end": 0.0}


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


def test_rules_of_sizes():
    parser = new_parser()
    words = ["--center_crop", "--bucket_alignment", "8", "--aspect_bucket_rounding", "16"]
    rules, notes = bucket_rules(parser, parse_with_config(parser, words, family="wan", method="dmd"))
    assert rules == Rules(1024, alignment=16, crop_style="center") and "--aspect_bucket_rounding 16" in notes[0]
    parser = new_parser()
    args = parse_with_config(parser, ["--resolution", "0"], family="wan", method="dmd")
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
    assert parse_with_config(parser, ["--eval_steps", "3"], family="wan", method="dmd").eval_steps == 3


def test_keys_of_configs_are_flags_of_somebody():
    known = {action.dest for action in new_parser()._actions}
    assert set(FLAG_OF_KEY.values()) <= known and not set(FLAG_OF_KEY) & known
