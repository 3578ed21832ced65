"""Config keys of SimpleTuner: what they are called here, which of them change nothing here, and which are not here."""

from collections.abc import Iterable, Mapping
from fnmatch import fnmatch
from functools import partial

from common.schema import nearest, not_supported

# Config keys whose flag has another name.
FLAG_OF_KEY = {
    "pretrained_model_name_or_path": "pretrained_teacher_model",
    "caption_dropout_probability": "proportion_empty_prompts",
    "vae_batch_size": "vae_encode_batch_size",
    "use_gradient_checkpointing": "gradient_checkpointing",
    "validation_step_interval": "validation_steps",
    "checkpoint_step_interval": "checkpointing_steps",
    "pretrained_evaluation_model_name_or_path": "evaluation_clip_model",
    "eval_steps_interval": "eval_steps",
    "num_eval_images": "eval_samples",
    "aspect_bucket_alignment": "bucket_alignment",
    "peft_lora_target_modules": "lora_target_modules",
    "optimizer_beta1": "adam_beta1",
    "optimizer_beta2": "adam_beta2",
    "lr_scale": "scale_lr",
    "user_prompt_library": "validation_prompt_library",
    "context_parallel_size": "context_parallel_degree",
    "tokenizer_max_length": "max_sequence_length",
}

# Other names of a script's model_family, and teachers that a config's model_flavour names.
FAMILY_OF_NAME = {"sd1x": "sd", "sd2x": "sd"}
FLAVOURS = {
    "sd": {
        "1.4": "CompVis/stable-diffusion-v1-4",
        "1.5": "stable-diffusion-v1-5/stable-diffusion-v1-5",
        "dreamshaper": "Lykon/dreamshaper-8",
        "2.0": "stabilityai/stable-diffusion-2-0",
        "2.1": "stabilityai/stable-diffusion-2-1",
    },
    "sdxl": {
        "base-0.9": "stabilityai/stable-diffusion-xl-base-0.9",
        "base-1.0": "stabilityai/stable-diffusion-xl-base-1.0",
    },
    "wan": {
        "t2v-480p-1.3b-2.1": "Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
        "t2v-480p-14b-2.1": "Wan-AI/Wan2.1-T2V-14B-Diffusers",
    },
}


def by_key(instead: Mapping[str, str]) -> dict[str, str]:
    """{key: what to use instead} of a table with several keys a row."""
    return {key: text for keys, text in instead.items() for key in keys.split()}


# What is not here, and what to use instead, if anything. What is off passes: in NEUTRAL are a key's values for that.
INSTEAD = {
    "pretrained_vae_model_name_or_path": "a teacher's folder with that VAE",
    "accelerate_config fsdp_enable": "accelerate config",
    "optimizer_config": "adam_beta1, adam_beta2, adam_weight_decay",
    "caption_strategy instance_prompt skip_file_discovery": "an entry of the dataset file",
    "quantize_activations": "base_model_precision",
    "only_instance_prompt prepend_instance_prompt": "caption_strategy instanceprompt of a dataset",
    "checkpoint_epoch_interval checkpointing_rolling_steps": "checkpoint_step_interval",
    "disk_low_threshold": "checkpoints_total_limit",
    "dynamo_backend": "compile",
    "eval_dataset_id": "disabled of the other datasets",
    "use_ema": "ema_decay, of the consistency target",
    "ema_cpu_only": "ema_device",
    "eval_epoch_interval eval_dataset_pooling": "eval_steps_interval",
    "eval_loss_disable": "eval_steps_interval 0",
    "lora_format": "export_formats",
    "lr_scale_sqrt": "lr_scale",
    "strict_epoch_limit": "num_train_epochs without max_train_steps",
    "pretrained_transformer_model_name_or_path pretrained_unet_model_name_or_path": "pretrained_model_name_or_path",
    "data_backend_sampling": "repeats or probability of a dataset",
    "revision": "teacher_revision",
    "variant": "teacher_variant",
    "model_card_private": "the hub's settings: what is uploaded is private",
    "parquet_caption_column parquet_filename_column": "the parquet block of a dataset",
    "prediction_type rescale_betas_zero_snr": "the teacher's scheduler_config.json",
    "flow_use_beta_schedule flow_use_uniform_schedule flow_custom_timesteps flow_sigmoid_scale": "timestep_shift",
    "text_cache_ondemand": "vae_cache_ondemand, which is of texts, too",
    "validation_disable_unconditional": "validation_prompt",
    "num_validation_images": "validation_prompt_library",
    "validation_randomize": "validation_seed",
    "validation_epoch_interval validate_after_epoch": "validation_step_interval",
    "validation_disable": "validation_step_interval 0",
    """
    assistant_lora_path context_parallel_size control controlnet crepa_enabled custom_tracker deepspeed_config
    delete_nsfw_images delete_unwanted_images diff2flow_loss diffusion_blocks_config ema_warmup_steps
    enable_nsfw_check enable_watermark flow_cubic_schedule_weights flow_schedule_auto_shift init_lora
    input_perturbation internal_guidance_enabled irepa_enabled layer_freeze_strategy layersync_enabled
    lora_init_type lr_num_cycles max_upscale_threshold mixflow_enabled nextlat_enabled offset_noise
    optimizer_cpu_offload_method peft_lora_mode post_checkpoint_script post_upload_script publishing_config
    quantization_config refiner_training scheduled_sampling_max_step_offset scheduled_sampling_probability
    scheduled_sampling_ramp_steps scheduled_sampling_reflexflow scheduled_sampling_start_step
    sdxl_validation_pipeline_mode slider_lora_target snr_gamma text_cache_disable text_encoder_3_precision
    text_encoder_4_precision timestep_bias_strategy train_text_encoder tread_config trust_remote_code
    twinflow_enabled urepa_enabled use_dora use_soft_min_snr validation_adapter_path validation_guidance_rescale
    validation_guidance_skip_layers validation_input validation_method validation_noise_scheduler
    validation_using_datasets xm_enabled
    """: "",
}
NOT_HERE = by_key(INSTEAD)
NEUTRAL = {
    "data_backend_sampling": ("auto-weighting",), "flow_sigmoid_scale": (1,), "lora_format": ("diffusers",),
    "lora_init_type": ("default",), "lr_num_cycles": (1,), "model_card_private": (True,),
    "num_validation_images": (1,), "peft_lora_mode": ("standard",), "sdxl_validation_pipeline_mode": ("trained-stage",),
    "validation_method": ("simpletuner-local",), "context_parallel_size": (1,),
}  # fmt: skip

# Patterns of keys that pass with a note: of speed, memory and looks, and details of what is not here; some of these
# (lr_power, huber_schedule) would change what is learnt there.
WITHOUT_EFFECT = """
    *_scheduler_timestep_spacing accelerate_extra_args accelerator_cache_clear_interval
    allow_dataset_oversubscription aspect_bucket_disable_rebuild aspect_bucket_worker_count assistant_lora_* audio_*
    aws_max_pool_connections base_model_default_dtype checkpointing_use_tempdir checkpoints_rolling_total_limit
    conditioning_multidataset_sampling configs_dir context_parallel_comm_strategy controlnet_* crepa_*
    data_aesthetic_score dataloader_prefetch* debug_* delete_invalid_checkpoints delete_model_after_load
    disable_assistant_lora disable_segmented_timestep_sampling disable_tf32 disk_low_* dynamo_* ema_*
    enable_chunked_feed_forward enable_group_offload enable_multiprocessing eval_timesteps feed_forward_chunk_size
    find_unused_parameters flow_beta_schedule_* flow_schedule_shift flow_timesteps_mode flux_* framerate
    freeze_encoder_* fsdp_* fully_unload_text_encoder fuse_optimizer fuse_qkv_projections gradient_checkpointing_*
    gradient_precision group_offload_* hidream_* huber_schedule i_know_what_i_am_doing ignore_missing_files
    image_processing_batch_size init_lo* input_perturbation_* internal_guidance_* irepa_* keep_vae_loaded
    layersync_* lr_power ltx* lycoris_config machine_rank main_process_* masked_loss_probability
    max_grounding_entities max_workers merge_environment_config metadata_update_interval mixflow_* model_card_*
    modelspec_comment musubi_* nextlat_* noise_offset* nsfw_check_* num_machines num_processes offload_*
    optimizer_offload_* optimizer_release_gradients override_dataset_config pixart_* preserve_data_backend_cache
    pretrained_gemma_* pretrained_grounding_* pretrained_t5_model_name_or_path pretrained_transformer_subfolder
    pretrained_unet_subfolder print_* prodigy_steps push_to_hub_background qwen_* ramtorch* read_batch_size
    refiner_training_* sageattention_usage same_network sana_* save_text_encoder scheduled_sampling_* sd3_* sdnq_*
    sdxl_* seed_for_each_device set_grads_to_none shift singlora_* sla_config snr_* soft_min_snr_* t5_padding
    text_embed_full_cache text_encoder_batch_size text_encoder_l* timestep_bias_* tokenizer_max_length
    torch_num_threads tracker_image_layout twinflow_* unet_attention_slice urepa_* vae_cache_scan_behaviour
    vae_dtype vae_enable_* validate_after_step validation_adapter_* validation_external_* validation_guidance_skip_*
    validation_image_* validation_internal_* validation_lycoris_strength validation_multigpu
    validation_num_video_frames validation_on_startup validation_seed_source validation_stitch_input_location wan_*
    webhook_reporting_interval write_batch_size xm_*
""".split()


def settings_here(
    settings: dict, where: str, notes: list[str], *, known: Iterable[str], not_here: Mapping[str, str],
    neutral: Mapping[str, tuple], without_effect: Iterable[str],
) -> dict:  # fmt: skip
    """Settings without those of `not_here`, which must be off, and those without effect, which a note names.

    What is `known` stays, and so does a key that is in no table: it is for the caller to refuse.
    """
    kept, unused = {}, []
    for key, value in settings.items():
        off = value in neutral[key] if key in neutral else not value or value in ("none", "no")
        matches = any(fnmatch(key, pattern) for pattern in without_effect)
        if key in known:
            kept[key] = value
        elif key in not_here:
            if not off:
                raise not_supported(where, key, not_here[key])
        elif key in without_effect or (matches and nearest(key, known) is None):  # not a slip of a known key
            unused += [] if off else [key]
        else:
            kept[key] = value
    if unused:
        notes.append(f"{where}: not used here: {', '.join(unused)}")
    return kept


config_here = partial(settings_here, not_here=NOT_HERE, neutral=NEUTRAL, without_effect=WITHOUT_EFFECT)
