"""Config files as SimpleTuner's users have them: its names of keys, what passes with a note, what is refused."""

import json

import pytest

import train_dmd_distill_wan as wan_script
import train_lcm_distill_sd as sd_script
import train_lcm_distill_sdxl as sdxl_script
from common.keys import FLAG_OF_KEY, FLAVOURS, NEUTRAL, NOT_HERE, WITHOUT_EFFECT
from tests.helpers import toy_shards

VALUES = {
    "use_gradient_checkpointing": True, "lr_scale": True, "caption_dropout_probability": 0.25, "optimizer_beta1": 0.25,
    "optimizer_beta2": 0.5, "pretrained_model_name_or_path": "another/teacher",
    "pretrained_evaluation_model_name_or_path": "a/clip", "peft_lora_target_modules": "to_q,to_k",
    "user_prompt_library": __file__, "context_parallel_size": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return toy_shards(tmp_path_factory.mktemp("shards"))


@pytest.fixture
def parse(shards, tmp_path):
    """`parse(config, *flags, script=...)`: args and notes."""

    def parsed(config: dict, *flags, script=sdxl_script):
        base = {"pretrained_model_name_or_path": "teacher", "train_shards_path_or_url": shards, "max_train_steps": 1}
        (tmp_path / "c.json").write_text(json.dumps(base | config))
        args, *_, notes = script.parse_args(["--config", str(tmp_path / "c.json"), *map(str, flags)])
        return args, [note for note in notes if "c.json" in note]

    return parsed


@pytest.fixture
def refused(parse, capsys):
    def message(config: dict, **options) -> str:
        with pytest.raises(SystemExit) as stop:
            parse(config, **options)
        assert stop.value.code == 2
        return capsys.readouterr().err.splitlines()[-1].partition("c.json: ")[2]

    return message


@pytest.mark.parametrize("key", FLAG_OF_KEY)
def test_a_key_with_another_name_reaches_its_flag(parse, key):
    wan = key in ("context_parallel_size", "tokenizer_max_length")
    args, notes = parse({key: VALUES.get(key, 7)}, script=wan_script if wan else sdxl_script)
    assert getattr(args, FLAG_OF_KEY[key]) == VALUES.get(key, 7) and notes == []


def test_keys_may_have_the_dashes_of_the_command_line(parse, refused):
    args, _ = parse({"--eval_steps_interval": 10, "--num_eval_images": 1, "distillation_config": {"w_max": 4}})
    assert (args.eval_steps, args.eval_samples, args.w_max) == (10, 1, 4)
    assert refused({"--seed": 1, "seed": 2}) == "seed is there twice, with and without --"


def test_lists_of_modules_and_what_is_false_for_none(parse):
    args, _ = parse({"peft_lora_target_modules": ["to_q", "to_k"], "validation_prompt_library": False})
    assert (args.lora_target_modules, args.validation_prompt_library) == ("to_q,to_k", None)


# What `simpletuner configure` and the server's forms write, beside what has a flag
OFF = {
    "snr_gamma": None, "use_ema": False, "init_lora": "", "train_text_encoder": False, "offset_noise": False,
    "noise_offset": 0.0, "crepa_enabled": False, "fsdp_enable": False, "timestep_bias_strategy": "none",
    "num_validation_images": 1, "lora_init_type": "default", "lora_format": "diffusers", "model_card_private": True,
    "validation_disable": False, "controlnet": False, "scheduled_sampling_ramp_steps": 0, "strict_epoch_limit": False,
    "data_backend_sampling": "auto-weighting", "checkpoint_epoch_interval": None, "offload_during_startup": False,
    "scheduled_sampling_reflexflow": False, "tread_config": None, "quantization_config": {}, "dynamo_backend": "no",
}  # fmt: skip


def test_null_is_the_default(parse, refused):
    null = dict.fromkeys(
        ("num_validation_images", "lora_format", "delete_problematic_images", "seed", "diff2flow_loss")
    )
    null |= {"distillation_config": {"w_max": None}, "model_flavour": None, "pretrained_model_name_or_path": None}
    args, notes = parse(null | {"model_flavour": "base-1.0"})
    assert (args.seed, args.w_max, args.pretrained_teacher_model) == (42, 15.0, FLAVOURS["sdxl"]["base-1.0"])
    assert notes == []
    assert "this program never deletes your files" in refused({"delete_problematic_images": "false"})


@pytest.mark.parametrize("script", [sd_script, sdxl_script])
def test_what_is_not_here_passes_where_it_is_off(parse, script):
    assert parse(OFF, script=script)[1] == []


def test_what_changes_no_weights_passes_with_one_note(parse):
    keys = {
        "offload_during_startup": True,
        "write_batch_size": 128,
        "metadata_update_interval": 65,
        "ema_device": "cpu",
    }
    keys |= {"crepa_lambda": 0.5, "inference_scheduler_timestep_spacing": "trailing"}
    keys |= {"webhook_reporting_interval": 0}
    _, (note,) = parse(keys)
    names = "offload_during_startup, write_batch_size, metadata_update_interval, ema_device, crepa_lambda"
    assert note.endswith(f"c.json: not used here: {names}, inference_scheduler_timestep_spacing")


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"snr_gamma": 5.0}, "snr_gamma: not supported"),
        ({"use_ema": True}, "use_ema: not supported, use ema_decay, of the consistency target"),
        ({"text_cache_disable": True}, "text_cache_disable: not supported"),
        ({"validation_epoch_interval": 1}, "validation_epoch_interval: not supported, use validation_step_interval"),
        ({"num_validation_images": 4}, "num_validation_images: not supported, use validation_prompt_library"),
        ({"lora_init_type": "pissa"}, "lora_init_type: not supported"),
        ({"model_card_private": False}, "model_card_private: not supported, use the hub's settings: what is uploaded"),
        ({"scheduled_sampling_ramp_steps": 100}, "scheduled_sampling_ramp_steps: not supported"),
        ({"scheduled_sampling_reflexflow": True}, "scheduled_sampling_reflexflow: not supported"),
        ({"context_parallel_size": 2}, "context_parallel_size: not supported"),
        # slips of the pen name the key that was meant; words that merely look alike do not
        ({"learning_rat": 1e-4}, "unknown key 'learning_rat', did you mean 'learning_rate'?"),
        ({"eval_stesp": 1}, "unknown key 'eval_stesp', did you mean 'eval_steps'?"),
        ({"scheduled_sampling_strateg": 1}, "did you mean 'scheduled_sampling_strategy'?"),
        ({"validation_stops": 1}, "unknown key 'validation_stops', did you mean 'validation_steps'?"),
        ({"w_mean": 1}, "unknown key 'w_mean'"),
        ({"training_steps": 9}, "unknown key 'training_steps'"),
        ({"validation_resolution_steps": 9}, "unknown key 'validation_resolution_steps'"),
    ],
)
def test_a_key_that_is_not_here_is_never_taken_for_another(refused, config, sentence):
    message = refused(config)
    assert message.startswith(sentence) or sentence.startswith("did you mean") and message.endswith(sentence)
    assert "text_cache" not in message or message == sentence  # nothing stands in for it: texts are always cached
    assert "did you mean" in sentence or "did you mean" not in message


def test_tables_of_keys_do_not_contradict_each_other():
    assert set(NEUTRAL) <= set(NOT_HERE) and not set(NOT_HERE) & {*WITHOUT_EFFECT, *FLAG_OF_KEY} - {
        "context_parallel_size"
    }
    instead = " ".join(NOT_HERE.values())
    for key in ("checkpoint_step_interval", "eval_steps_interval", "validation_step_interval", "lr_scale"):
        assert key in instead and key in FLAG_OF_KEY


def test_diff2flow_has_two_switches_there(parse, refused):
    both, notes = parse({"diff2flow_enabled": True, "diff2flow_loss": True})
    assert both.diff2flow_loss and notes == []
    alone, (note,) = parse({"diff2flow_enabled": True})
    assert not alone.diff2flow_loss and "diff2flow_enabled changes nothing without diff2flow_loss" in note
    assert "one or the other" in refused({"diff2flow_enabled": False, "diff2flow_loss": True})


def test_w_of_a_config_is_a_guidance_scale_there(parse):
    nested = {"distillation_method": "lcm", "distillation_config": {"w_min": 1.0, "w_max": 12.0}}
    _, (note,) = parse(nested)
    assert "w_min 1, w_max 12: the w of the papers" in note and "would be w_min 0, w_max 11 here" in note
    _, (note,) = parse(nested, "--w_max", 11)  # what the command line says is meant as it is here
    assert "w_min 0 here" in note and "w_max" not in note
    assert parse(nested, "--w_min", 0, "--w_max", 11)[1] == []


def test_other_settings_that_mean_something_else(parse):
    (ema,) = parse({"ema_decay": 0.995})[1]
    assert "ema_decay 0.995: of the consistency target" in ema
    (revision,) = parse({"revision": "main"})[1]
    assert "revision main: the VAE's; the teacher's is teacher_revision" in revision


def test_a_config_that_names_no_method_is_distilled_and_says_so(parse):
    lora = {"model_family": "sdxl", "model_type": "lora"}
    (note,) = parse(lora)[1]
    assert "names no distillation_method; this script distils with lcm" in note
    assert parse(lora | {"distillation_method": "lcm"})[1] == []
    (note,) = parse({"model_family": "wan"}, script=wan_script)[1]
    assert "distils with dmd" in note


@pytest.mark.parametrize("family", ["sd", "sd1x", "sd2x"])
def test_families_and_flavours_of_stable_diffusion(parse, refused, family):
    named = {"model_family": family, "pretrained_model_name_or_path": None, "distillation_method": "lcm"}
    for flavour, teacher in FLAVOURS["sd"].items():
        args, notes = parse(named | {"model_flavour": flavour}, script=sd_script)
        assert (args.pretrained_teacher_model, notes) == (teacher, [])
    assert "this script is for 'sdxl'" in refused({"model_family": family})
