"""Entries of a dataset file as SimpleTuner's users have them: what of them is not here, and their blocks made flat."""

from collections.abc import Mapping

from common.keys import by_key, settings_here
from common.schema import Key, check_settings, not_supported

# What is not here, and what to use instead, if anything: values, then keys, which pass where they are off.
VALUES_NOT_HERE = {
    ("type", "aws"): "type webdataset, whose shards may be s3: addresses",
    ("type", "webshart"): "type webdataset",
    ("type", "memory"): "type local",
    ("dataset_type", "audio"): "",
    ("dataset_type", "caption"): "--train_prompts",
    ("dataset_type", "conditioning"): "",
    ("dataset_type", "conditioning_image_embeds"): "",
    ("dataset_type", "image_embeds"): "cache_dir_vae of the dataset",
}
INSTEAD = {
    "fallback_caption_column": "caption_column, a list of columns",
    "image_embeds": "cache_dir_vae",
    "only_instance_prompt": "caption_strategy instanceprompt",
    "train_batch_size": "--train_batch_size",
    "vae_cache_clear_each_epoch vae_cache_disable": "--vae_cache_disable",
    "vae_cache_ondemand text_cache_ondemand": "--vae_cache_ondemand",
    """
    bucket_strategy caption_filter_list caption_shuffle composite_image_config conditioning conditioning_data
    conditioning_image_embeds conditioning_type delete_nsfw_images delete_problematic_images delete_unwanted_images
    end_epoch end_step filter_func is_i2v is_regularisation_data is_regularization_data max_frames max_num_samples
    max_upscale_threshold maximum_aspect_ratio minimum_aspect_ratio prepend_instance_prompt slider_strength
    source_dataset_id start_epoch start_step streaming text_cache_disable timestep_sampling_offset
    """: "",
}
NOT_HERE = by_key(INSTEAD)
NEUTRAL = {"start_epoch": (0, 1), "start_step": (0, 1), "bucket_strategy": ("aspect_ratio",)}
WITHOUT_EFFECT = """
    aws_* crop_aspect_buckets description_column hash_filenames height_column metadata_update_interval num_proc
    preserve_data_backend_cache quality_column text_embeds text_encoder_batch_size width_column
""".split()
PARQUET_KEYS = {
    "path": Key(str), "filename_column": Key(str), "caption_column": Key(object), "fallback_caption_column": Key(str),
    "identifier_includes_extension": Key(bool), "width_column": Key(str), "height_column": Key(str),
}  # fmt: skip


def entry_here(entry: dict, keys: Mapping[str, Key], where: str, notes: list[str]) -> dict:
    """An entry's settings, which `keys` allows: without what has no effect here, and without blocks around them."""
    for (key, value), instead in VALUES_NOT_HERE.items():
        if entry.get(key) == value:
            raise not_supported(where, f"{key} {value}", instead)
    for name in ("huggingface", "video"):
        block = entry.pop(name, {})
        if not isinstance(block, dict):
            raise ValueError(f"{where}: {name} is {block!r}, and must be an object of settings")
        if name == "video" and "frame_interval" in block:  # there a step of frame counts, and not of frames
            raise not_supported(where, "video: frame_interval")
        renamed = {"dataset_config": block["config"]} if "config" in block else {}
        entry |= {key: value for key, value in block.items() if value is not None and key != "config"} | renamed
    entry = settings_here(
        entry, where, notes, known=keys, not_here=NOT_HERE, neutral=NEUTRAL, without_effect=WITHOUT_EFFECT
    )
    check_settings(entry, keys, where)
    if parquet := entry.get("parquet"):
        check_settings({key: value for key, value in parquet.items() if value is not None}, PARQUET_KEYS, where)
    return entry
