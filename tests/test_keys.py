"""Every key of the documents' SDXL configs has an effect: which test sees which, and those that stand nowhere else."""

import json
import signal

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import load_file

import train_lcm_distill_sdxl as script
from tests.helpers import ROOT, tiny_sdxl_pipeline, toy_shards

CONFIGS = ROOT / "tests" / "configs"
RATE = 1e-3
BASE = {
    "model_type": "lora", "lora_rank": 2, "learning_rate": RATE, "lr_warmup_steps": 0, "max_train_steps": 2,
    "train_batch_size": 2, "resolution": 32, "bucket_alignment": 8, "center_crop": True, "validation_step_interval": 0,
    "validation_num_inference_steps": 1, "validation_prompt": "red", "disable_benchmark": True, "report_steps": "",
    "checkpoint_step_interval": 0, "report_to": "none",
}  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    tiny_sdxl_pipeline(folder / "teacher")
    toy_shards(folder, shards=2, samples=8)
    return folder


@pytest.fixture
def train(world, tmp_path, monkeypatch):
    """`train(settings)`: a short run by a config file; the weights that it trained."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.chdir(world)  # the samples' order follows from the shards' names: the same every time
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def train(**settings) -> dict[str, torch.Tensor]:
        config = {"pretrained_model_name_or_path": "teacher", "train_shards_path_or_url": "{00000..00001}.tar"}
        config |= {"cache_dir_vae": "vae", "cache_dir_text": "text", "output_dir": str(tmp_path / "out")}
        config |= BASE | settings
        (tmp_path / "config.json").write_text(json.dumps(config))
        try:
            script.main(script.parse_args(["--config", str(tmp_path / "config.json")]))
        finally:
            AcceleratorState._reset_state(reset_partial_state=True)
            GradientState._reset_state()
        return load_file(tmp_path / "out" / f"checkpoint-{config['max_train_steps']}" / "student.safetensors")

    yield train
    for number, handler in handlers.items():
        signal.signal(number, handler)


def distance(a: dict, b: dict) -> float:
    """The largest of any weight's."""
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


# ---------------------------------------------------------------------------------------------------------------------
# What is trained
# ---------------------------------------------------------------------------------------------------------------------

PLAIN = {}  # what other settings are compared with, by settings


@pytest.mark.parametrize(
    ("changed", "beside"),
    [
        ({"num_ddim_timesteps": 25}, {}),
        ({"w_min": 10.0}, {}),
        ({"w_max": 4.0}, {}),
        ({"loss_type": "huber"}, {}),
        ({"huber_c": 0.1}, {"loss_type": "huber"}),
        ({"timestep_scaling_factor": 0.001}, {}),
        ({"learning_rate": RATE / 2}, {}),
        ({"lr_scheduler": "linear"}, {}),
        ({"lr_warmup_steps": 2}, {"lr_scheduler": "constant_with_warmup"}),
        ({"lora_alpha": 8}, {}),
        ({"lora_dropout": 0.5}, {}),
        ({"optimizer": "optimi-lion"}, {}),
        ({"adam_beta1": 0.5}, {}),
        ({"adam_beta2": 0.5}, {}),
        ({"adam_weight_decay": 0.5}, {}),
        ({"adam_epsilon": 1e-3}, {}),
        ({"max_grad_norm": 1e-6}, {}),
        ({"seed": 7}, {}),
        ({"train_batch_size": 1}, {}),
        ({"base_model_precision": "int8-quanto"}, {}),
        ({"text_encoder_1_precision": "int8-quanto"}, {}),
        ({"text_encoder_2_precision": "int8-quanto"}, {}),
    ],
    ids=lambda settings: ",".join(settings) or "alone",
)
def test_a_setting_changes_what_is_trained(changed, beside, train):
    key = json.dumps(beside)
    if key not in PLAIN:
        PLAIN[key] = train(**beside)
    assert distance(train(**beside, **changed), PLAIN[key]) > 1e-3 * RATE


def test_other_settings_do_not(train):
    """So that the test above does not see what is random."""
    others = {"checkpoints_total_limit": 3, "validation_prompt": "blue", "compress_disk_cache": True}
    assert distance(train(**others), train()) == 0.0


def test_accumulated_batches_are_one_large_batch(train):
    same = {"adam_epsilon": 1e-3}  # else Adam makes whole steps of rounding errors
    whole = train(**same, train_batch_size=4)
    assert distance(train(**same, train_batch_size=2, gradient_accumulation_steps=2), whole) < 1e-3 * RATE
    assert distance(train(**same, train_batch_size=2), whole) > 1e-2 * RATE


@pytest.mark.parametrize(("kind", "shapes"), [("lora", (6, 6)), ("full", None)])
def test_the_student_is_of_the_kind_and_rank_that_was_asked_for(kind, shapes, train):
    weights = train(model_type=kind, lora_rank=6 if shapes else None, max_train_steps=1)
    if shapes:
        assert all(value.shape[0 if "lora_A" in name else 1] == 6 for name, value in weights.items())
    else:
        assert "time_embedding.cond_proj.weight" in weights and not any("lora" in name for name in weights)


def test_adamw_bf16_keeps_steps_that_bf16_would_lose(train, world):
    """In bf16 a weight of 0.1 and its neighbour are 5e-4 apart; trained weights and moments are fp32."""
    full = {"model_type": "full", "lora_rank": None, "optimizer": "adamw_bf16", "mixed_precision": "bf16"}
    weights = train(**full, learning_rate=1e-6, max_train_steps=1, adam_weight_decay=0.0)
    start = load_file(world / "teacher" / "unet" / "diffusion_pytorch_model.safetensors")
    large = torch.cat([(weights[name] - value)[value.abs() > 0.1] for name, value in start.items()]).abs()
    assert {value.dtype for value in weights.values()} == {torch.float32}
    assert len(large) > 1000 and (large > 0.5e-6).float().mean() > 0.9 and large.max() < 1.1e-6


@pytest.mark.parametrize("key", ["gradient_checkpointing", "use_gradient_checkpointing"])
def test_gradient_checkpointing_computes_twice_and_trains_the_same(key, train, monkeypatch):
    calls, original = [], script.load_networks

    def load_and_count(*arguments):
        networks = original(*arguments)
        networks[0].down_blocks[0].resnets[0].register_forward_pre_hook(
            lambda *_: calls.append(torch.is_grad_enabled())
        )
        return networks

    monkeypatch.setattr(script, "load_networks", load_and_count)
    plain = train(max_train_steps=1)
    assert calls.count(True) == 1  # the student's
    calls.clear()
    assert distance(train(max_train_steps=1, **{key: True}), plain) < 1e-3 * RATE
    assert calls.count(True) == 2  # and once more for its backward


# ---------------------------------------------------------------------------------------------------------------------
# Trackers
# ---------------------------------------------------------------------------------------------------------------------


def test_wandb_gets_the_names_of_project_and_run(train, monkeypatch):
    import wandb

    def init(**settings):
        raise RuntimeError(settings["project"], settings["name"])

    monkeypatch.setattr(wandb, "init", init)
    with pytest.raises(RuntimeError) as stop:
        train(report_to="wandb", tracker_project_name="lcm", tracker_run_name="4step")
    assert stop.value.args == ("lcm", "4step")


# ---------------------------------------------------------------------------------------------------------------------
# Which test sees which key
# ---------------------------------------------------------------------------------------------------------------------

TRAINED, RUN = "test_a_setting_changes_what_is_trained", "test_the_documents_lcm_config_trains_on_small_images"
CHECKPOINTED = "test_gradient_checkpointing_computes_twice_and_trains_the_same"
MIXED, TEXTS = "test_entries_are_mixed_by_their_repeats", "test_text_embeds_say_where_and_how_texts_are_kept"
SIZES = "test_size_ids_are_the_original_the_crop_and_the_target"
PREVIEWS = "test_previews_are_the_half_done_samples"
WAN, LAUNCHED = "test_every_setting_has_its_effect", "test_the_documents_wan_config_runs"
EMA, CLIP_SIZES = "test_the_average_counts_the_student_s_updates_alone", "test_clips_are_cut_to_whole_blocks"
SEEN_BY = {
    "model_type": "test_the_student_is_of_the_kind_and_rank_that_was_asked_for",
    "model_family": "test_a_bad_config_is_one_sentence",
    "model_flavour": "test_a_documents_config_means_its_flags",
    "output_dir": RUN,
    "pretrained_model_name_or_path": RUN,
    "distillation_method": "test_a_bad_config_is_one_sentence",
    "distillation_config": "test_settings_of_the_method_are_nested_or_flat",
    "num_ddim_timesteps": TRAINED,
    "w_min": TRAINED,
    "w_max": TRAINED,
    "loss_type": TRAINED,
    "huber_c": TRAINED,
    "timestep_scaling_factor": TRAINED,
    "resolution": "test_an_entry_wins_over_the_command_line",
    "resolution_type": "test_buckets_worked_out_by_hand",
    "validation_resolution": "test_one_block_of_rows_for_each_size",
    "aspect_bucket_rounding": "test_the_documents_settings_of_both_files_together",
    "minimum_image_size": "test_sizes_below_the_minimum_are_skipped_and_counted",
    "maximum_image_size": "test_the_largest_are_shrunk_before_the_crop",
    "target_downsample_size": "test_the_largest_are_shrunk_before_the_crop",
    "learning_rate": TRAINED,
    "lr_scheduler": TRAINED,
    "lr_warmup_steps": TRAINED,
    "max_train_steps": RUN,
    "train_batch_size": TRAINED,
    "gradient_accumulation_steps": "test_accumulated_batches_are_one_large_batch",
    "gradient_checkpointing": CHECKPOINTED,
    "use_gradient_checkpointing": CHECKPOINTED,
    "mixed_precision": "test_size_ids_reach_the_sinusoid_in_fp32_in_a_bf16_run",
    "lora_type": "test_lora_type_means_a_lora",
    "lora_rank": "test_the_student_is_of_the_kind_and_rank_that_was_asked_for",
    "lora_alpha": TRAINED,
    "lora_dropout": TRAINED,
    "validation_step_interval": RUN,
    "validation_num_inference_steps": "test_one_block_of_rows_for_each_size",
    "validation_guidance": "test_pictures_stay_in_the_trained_range_of_guidance",
    "validation_prompt": "test_sdxl_trains_and_loads",
    "validation_negative_prompt": "test_the_negative_prompt_reaches_the_teachers_pictures_in_both_embeddings",
    "checkpoint_step_interval": RUN,
    "checkpoints_total_limit": "test_limit_finish_and_bad_names",
    "resume_from_checkpoint": "test_kill_and_resume",
    "optimizer": TRAINED,
    "adam_beta1": TRAINED,
    "adam_beta2": TRAINED,
    "adam_weight_decay": TRAINED,
    "adam_epsilon": TRAINED,
    "max_grad_norm": "test_what_max_grad_norm_bounds",
    "seed": TRAINED,
    "push_to_hub": RUN,
    "hub_model_id": RUN,
    "report_to": RUN,
    "tracker_project_name": "test_wandb_gets_the_names_of_project_and_run",
    "tracker_run_name": "test_wandb_gets_the_names_of_project_and_run",
    "base_model_precision": "test_a_lora_of_a_base_in_8_bits_loads_on_the_plain_one",
    "text_encoder_1_precision": "test_each_text_encoder_has_its_precision",
    "text_encoder_2_precision": "test_each_text_encoder_has_its_precision",
    "validation_preview": PREVIEWS,
    "validation_preview_steps": PREVIEWS,
    # of Wan
    "caption_dropout_probability": WAN,
    "context_noise": WAN,
    "dmd_denoising_steps": WAN,
    "fake_score_betas": WAN,
    "fake_score_eps": WAN,
    "fake_score_grad_clip": WAN,
    "fake_score_guidance_scale": WAN,
    "fake_score_lr": WAN,
    "fake_score_weight_decay": WAN,
    "generator_update_interval": WAN,
    "grad_clip_method": WAN,
    "independent_first_frame": WAN,
    "last_step_only": WAN,
    "max_timestep_ratio": WAN,
    "min_score_timestep": WAN,
    "min_timestep_ratio": WAN,
    "num_frame_per_block": WAN,
    "num_training_frames": WAN,
    "real_score_guidance_scale": WAN,
    "same_step_across_blocks": WAN,
    "timestep_shift": WAN,
    "ts_schedule": WAN,
    "ts_schedule_max": WAN,
    "use_ema": WAN,
    "ema_update_interval": EMA,
    "num_frames": CLIP_SIZES,
    "validation_num_video_frames": LAUNCHED,
    "data_backend_config": LAUNCHED,
    "pretrained_t5_model_name_or_path": LAUNCHED,
    "push_checkpoints_to_hub": LAUNCHED,
    "validation_prompt_library": LAUNCHED,
    "quantize_via": LAUNCHED,
    "disable_benchmark": LAUNCHED,
    "attention_mechanism": "test_another_attention_mechanism_computes_the_attention",
    "compress_disk_cache": "test_damage_is_made_again",
    "delete_problematic_images": "test_a_bad_config_is_one_sentence",
    "disable_bucket_pruning": "test_the_table_of_buckets",
    "ema_validation": "test_validation_draws_whose_clips_were_asked_for",
    "flow_schedule_shift": "test_the_shift_is_of_the_teacher_s_sampler",
    "frame_interval": "test_a_folder_of_clips",
    "ignore_final_epochs": "test_flags_that_do_not_go_together",
    "num_train_epochs": "test_steps_of_a_run_given_in_epochs",
    "repeats": MIXED,
    "vae_batch_size": "test_encode_batch_size_is_the_vaes",
    "validation_seed": "test_validation_draws_whose_clips_were_asked_for",
    "webhook_config": "test_a_run_tells_its_webhook",
    # of dataset files
    "id": "test_no_source_and_two_entries_of_one_name",
    "type": MIXED,
    "dataset_type": TEXTS,
    "instance_data_dir": "test_a_folder_is_walked_and_each_image_goes_to_its_bucket",
    "crop": "test_crop_false_keeps_all_but_what_the_cover_leaves_over",
    "crop_aspect": SIZES,
    "crop_style": SIZES,
    "cache_dir_vae": "test_each_dataset_has_its_own_store_and_each_record_its_geometry",
    "cache_dir": TEXTS,
    "default": TEXTS,
    "write_batch_size": "test_each_dataset_has_its_own_store_and_each_record_its_geometry",
    "disabled": MIXED,
    "caption_strategy": "test_captions_of_text_files_and_of_names",
    "metadata_backend": "test_a_bad_entry_is_one_sentence",
    "skip_file_discovery": "test_skipped_discovery_leaves_it_to_training",
}


def keys_of(value) -> set[str]:
    """Of a config and of the objects inside it, but for the method's name."""
    if isinstance(value, list):
        return set().union(*map(keys_of, value))
    return set(value) | set().union(*map(keys_of, value.values())) - {"lcm"} if isinstance(value, dict) else set()


def test_every_key_of_the_documents_is_seen_by_a_test():
    files = sorted(CONFIGS.glob("*.json"))
    assert len(files) == 9
    assert set().union(*(keys_of(json.loads(path.read_text())) for path in files)) == SEEN_BY.keys()
    tests = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    assert [name for name in set(SEEN_BY.values()) if f"\ndef {name}(" not in tests] == []
