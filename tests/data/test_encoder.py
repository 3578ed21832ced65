"""Latents and texts of samples: three modes of caching, keys by content, and what a full cache saves."""

import io
import json
import shutil
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image

import train_lcm_distill_sd as script
from common.cache import identity, weights_identity
from common.data import encoder as encoders_module
from common.data import stream
from common.data.buckets import Rules
from common.data.datasets import Data, Dataset, plan_buckets
from common.data.encoder import Encoders, open_encoder
from common.data.samples import open_readers
from common.data.shards import expand_shards, read_shard
from common.data.stream import open_batches
from common.pictures import validation_prompts
from tests.data.helpers import (
    Accelerator,
    records,
    records_of_file,
)
from tests.helpers import encoded, tiny_pipeline, write_shard

FRESH = {"step": 0, "stream": None}  # of a run that resumes none


@pytest.fixture(scope="module")
def shards(small_shards):
    return f"{small_shards}/{{00000..00001}}.tar"


def opened(sd_teacher, shards, folder, *more, dtype=torch.float32, state=FRESH):
    """As open_and_count, on shards."""
    flags = ["--pretrained_teacher_model", sd_teacher, "--train_shards_path_or_url", shards, "--output_dir", folder]
    return open_and_count([*flags, "--resolution", 32, "--train_batch_size", 4, *more], dtype, state)


def open_and_count(flags, dtype=torch.float32, state=FRESH):
    """Encoder, batches, and how often each network was loaded since the caches were filled."""
    args, data, _ = script.parse_args([str(flag) for flag in flags])
    loads, accelerator = {}, Accelerator()
    data = plan_buckets(args, data, accelerator)
    own = script.encoders(args, accelerator.device, dtype)

    def counted(name, load):
        def loader():
            loads[name] += 1
            return load()

        loads[name] = 0
        return loader

    own = replace(own, load_vae=counted("vae", own.load_vae), load_text=counted("text", own.load_text))
    prompts = ["", *validation_prompts(args)]
    encoder, readers = open_encoder(args, data, open_readers(args, data), own, accelerator, prompts, state)
    loads.update(vae=0, text=0)
    return encoder, open_batches(args, data, accelerator, readers, state["stream"]), loads


def epoch(encoder, batches, count: int = 4):
    """All latents and embeddings of the first batches, by caption."""
    found = {}
    for _ in range(count):
        samples = next(batches)
        images = encoder.encode_images(samples)
        text = encoder.encode_text([sample.caption for sample in samples])
        for i, sample in enumerate(samples):
            found[sample.caption] = {
                "mean": images["mean"][i],
                "std": images["std"][i],
                "text": text["prompt_embeds"][i],
            }
    return found


def assert_same(a: dict, b: dict):
    assert a.keys() == b.keys()
    for caption in a:
        for name in a[caption]:
            torch.testing.assert_close(a[caption][name], b[caption][name], rtol=1e-5, atol=1e-5)


def test_full_cache_loads_no_encoder_and_agrees_with_streaming(sd_teacher, shards, tmp_path):
    same = ["--center_crop"]  # a cache has one crop of an image, a stream another on each visit
    encoder, batches, loads = opened(sd_teacher, shards, tmp_path / "a", *same)
    cached = epoch(encoder, batches)
    assert loads == {"vae": 0, "text": 0}
    encoder, batches, loads = opened(sd_teacher, shards, tmp_path / "b", *same, "--vae_cache_disable")
    assert_same(cached, epoch(encoder, batches))
    assert loads == {"vae": 1, "text": 0}
    assert [path.name for path in (tmp_path / "b" / "cache").iterdir()] == ["text"]


def test_without_latents_on_demand_keeps_texts_alone(sd_teacher, shards, tmp_path):
    for loaded in (1, 0):
        flags = ["--vae_cache_ondemand", "--vae_cache_disable"]
        encoder, batches, loads = opened(sd_teacher, shards, tmp_path, *flags)
        epoch(encoder, batches)
        encoder.flush()
        assert loads == {"vae": 1, "text": loaded}
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["text"]


def test_a_run_of_less_than_an_epoch_caches_what_it_reads(sd_teacher, shards, tmp_path):
    """From where it is resumed."""
    flags = ["--max_train_steps", 3, "--center_crop"]
    encoder, batches, loads = opened(sd_teacher, shards, tmp_path / "short", *flags)
    assert records(tmp_path / "short" / "cache" / "vae") == 12
    first = epoch(encoder, batches, 2)
    state = {"step": 2, "stream": batches.state()}
    found = first | epoch(encoder, batches, 1)
    assert loads == {"vae": 0, "text": 0}

    encoder, batches, loads = opened(sd_teacher, shards, tmp_path / "resumed", *flags, state=state)
    assert records(tmp_path / "resumed" / "cache" / "vae") == 4
    assert_same(epoch(encoder, batches, 1), {caption: found[caption] for caption in found.keys() - first.keys()})
    assert loads == {"vae": 0, "text": 0}
    opened(sd_teacher, shards, tmp_path / "short", "--max_train_steps", 4, "--center_crop")
    assert records(tmp_path / "short" / "cache" / "vae") == 16  # a whole epoch


def test_on_demand_encodes_what_it_meets_once(sd_teacher, shards, tmp_path):
    encoder, batches, loads = opened(sd_teacher, shards, tmp_path, "--vae_cache_ondemand")
    assert len(encoder.latents[0].index) == 0
    first = epoch(encoder, batches, 2)
    assert loads == {"vae": 1, "text": 1} and len(encoder.latents[0].waiting) == 8
    encoder.flush()
    encoder, batches, loads = opened(sd_teacher, shards, tmp_path, "--vae_cache_ondemand")
    assert_same(first, epoch(encoder, batches, 2))
    assert loads == {"vae": 0, "text": 0}


@pytest.mark.slow
def test_key_is_the_content(sd_teacher, tmp_path):
    """Not the file's name: a renamed shard hits, a changed image misses; so does another resolution, dtype or VAE."""
    cache = ["--cache_dir_vae", tmp_path / "vae", "--cache_dir_text", tmp_path / "text"]
    images = [{"png": encoded(Image.new("RGB", (32, 32), (i * 20, 0, 0))), "txt": b"x"} for i in range(6)]
    (tmp_path / "a").mkdir()
    write_shard(tmp_path / "a" / "0.tar", images[:4])
    opened(sd_teacher, tmp_path / "a" / "0.tar", tmp_path / "o", *cache)
    assert records(tmp_path / "vae") == 4
    shutil.copy(tmp_path / "a" / "0.tar", tmp_path / "a" / "1.tar")
    opened(sd_teacher, tmp_path / "a" / "1.tar", tmp_path / "other_run", *cache)
    assert records(tmp_path / "vae") == 4  # shared by two runs, found again under another name
    write_shard(tmp_path / "a" / "1.tar", [*images[:3], images[5]])
    opened(sd_teacher, tmp_path / "a" / "1.tar", tmp_path / "o", *cache)
    assert records(tmp_path / "vae") == 5
    opened(sd_teacher, tmp_path / "a" / "0.tar", tmp_path / "o", *cache, "--resolution", 16)
    assert records(tmp_path / "vae") == 5 + 4
    opened(sd_teacher, tmp_path / "a" / "0.tar", tmp_path / "o", *cache, dtype=torch.bfloat16)
    assert records(tmp_path / "vae") == 5 + 8
    other = tiny_pipeline(tmp_path / "other")
    vae = other / "vae" / "diffusion_pytorch_model.safetensors"
    data = bytearray(vae.read_bytes())
    data[-1] ^= 1
    vae.write_bytes(data)
    opened(
        sd_teacher,
        tmp_path / "a" / "0.tar",
        tmp_path / "o",
        *cache,
        "--pretrained_vae_model_name_or_path",
        other / "vae",
    )
    assert records(tmp_path / "vae") == 5 + 12
    assert weights_identity(str(sd_teacher), "vae", None) != weights_identity(str(other), "vae", None)
    assert weights_identity("hub/name", "vae", "main") != weights_identity("hub/name", "vae", "v2")


@pytest.mark.parametrize("compress", [[], ["--compress_disk_cache"]])
def test_damage_is_made_again(sd_teacher, shards, tmp_path, compress, capsys):
    encoder, batches, _ = opened(sd_teacher, shards, tmp_path, *compress)
    whole = epoch(encoder, batches)
    for path in (tmp_path / "cache" / "vae").rglob("*.safetensors"):
        data = bytearray(path.read_bytes())
        data[-200] ^= 0xFF  # within the last record
        path.write_bytes(data)
    encoder, batches, loads = opened(sd_teacher, shards, tmp_path, *compress)
    assert_same(whole, epoch(encoder, batches))
    assert loads["vae"] == 1 and "damaged and will be made again" in capsys.readouterr().out
    for path in (tmp_path / "cache" / "text").rglob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:100])
    encoder, batches, loads = opened(sd_teacher, shards, tmp_path, *compress)
    assert_same(whole, epoch(encoder, batches))
    assert loads["text"] == 1


def test_a_cut_off_fill_goes_on(sd_teacher, shards, tmp_path, monkeypatch):
    encode, calls = script.encode_pixels, []

    def breaks(vae, pixels):
        calls.append(len(pixels))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return encode(vae, pixels)

    monkeypatch.setattr(script, "encode_pixels", breaks)
    with pytest.raises(KeyboardInterrupt):
        opened(sd_teacher, shards, tmp_path)
    kept = records(tmp_path / "cache" / "vae")
    assert kept == 8  # the shard that was done
    calls.clear()
    monkeypatch.setattr(script, "encode_pixels", lambda *a: calls.append(len(a[1])) or encode(*a))
    opened(sd_teacher, shards, tmp_path)
    assert sum(calls) == 8
    calls.clear()
    opened(sd_teacher, shards, tmp_path)
    assert calls == []


def test_all_readers_end_with_the_run(sd_teacher, shards, tmp_path, monkeypatch):
    """Those that fill the caches, too."""
    made, loader = [], stream.DataLoader
    monkeypatch.setattr(stream, "DataLoader", lambda *a, **options: made.append(options) or loader(*a, **options))
    opened(sd_teacher, shards, tmp_path, "--dataloader_num_workers", 1)
    assert [options["worker_init_fn"].func for options in made] == [stream.follow] * 2


def test_on_demand_with_workers_encodes_once_and_grows_no_further(sd_teacher, shards, tmp_path):
    """Workers do not see what was kept since they started: the training process must look again."""
    more = ["--vae_cache_ondemand", "--dataloader_num_workers", 2]
    encoder, batches, _ = opened(sd_teacher, shards, tmp_path, *more)
    encode, calls = encoder.encoders.encode_pixels, []
    counted = lambda vae, pixels: calls.append(len(pixels)) or encode(vae, pixels)  # noqa: E731
    encoder.encoders = replace(encoder.encoders, encode_pixels=counted)
    first = epoch(encoder, batches)
    encoder.flush()
    assert_same(first, epoch(encoder, batches))
    encoder.flush()
    assert sum(calls) == 16
    assert sum(map(records_of_file, (tmp_path / "cache" / "vae").rglob("*.safetensors"))) == 16


def test_a_full_cache_trains_a_whole_run_without_encoders(sd_teacher, shards, tmp_path, monkeypatch):
    """The script's own loop, up to the pictures at its end."""
    flags = ["--pretrained_teacher_model", sd_teacher, "--train_shards_path_or_url", shards, "--resolution", 32]
    flags += [
        "--train_batch_size",
        4,
        "--validation_steps",
        0,
        "--report_to",
        "none",
        "--disable_benchmark",
        "--report_steps=",
    ]
    flags += ["--cache_dir_vae", tmp_path / "vae", "--cache_dir_text", tmp_path / "text", "--mixed_precision", "no"]
    flags += ["--validation_num_inference_steps", 1]
    train(*flags, "--output_dir", tmp_path / "a", "--max_train_steps", 4)  # an epoch
    loaded = []
    monkeypatch.setattr(script, "load_vae", lambda *_: loaded.append("vae"))
    monkeypatch.setattr(script, "load_text_encoder", lambda *_: loaded.append("text"))
    monkeypatch.setattr(script, "generate", lambda args, vae, *_: [Image.new("RGB", (32, 32))] * 4)
    train(*flags, "--output_dir", tmp_path / "b", "--max_train_steps", 12)
    assert loaded == ["vae"]  # of the pictures
    assert (tmp_path / "b" / "checkpoint-12").is_dir()


def train(*flags):
    script.main(*script.parse_args([str(flag) for flag in flags]))


def test_latents_are_the_posterior_of_the_image(sd_teacher, shards, tmp_path):
    """Scaled mean and deviation of diffusers' own posterior, cached and streamed."""
    vae = AutoencoderKL.from_pretrained(sd_teacher, subfolder="vae")
    for mode in ([], ["--vae_cache_disable"]):
        encoder, batches, _ = opened(sd_teacher, shards, tmp_path, "--center_crop", *mode)
        samples = next(batches)
        images = encoder.encode_images(samples)
        for i, sample in enumerate(samples):
            posterior = vae.encode(pixels_of(shards, sample.caption)).latent_dist
            for name in ("mean", "std"):
                expected = getattr(posterior, name)[0] * vae.config.scaling_factor
                torch.testing.assert_close(images[name][i], expected, rtol=1e-4, atol=1e-5)


def pixels_of(shards: str, caption: str) -> torch.Tensor:
    """The middle 32 x 32 of the picture of 40 x 32 with this caption, in [-1, 1]."""
    for shard in expand_shards(shards):
        for _, members in read_shard(shard):
            if members["txt"].decode() == caption:
                image = Image.open(io.BytesIO(members["png"])).crop((4, 0, 36, 32))
                return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 127.5 - 1.0
    raise AssertionError(caption)


# ---------------------------------------------------------------------------------------------------------------------
# Several datasets and sizes
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture()
def several(tmp_path):
    """flags(**changes) of two folders: one in two buckets, the other of squares; each caption file has two lines."""
    sizes = {"a": [(32, 32)] * 4 + [(24, 40)] * 4, "b": [(64, 64)] * 4}
    for name, images in sizes.items():
        (tmp_path / name).mkdir()
        for i, size in enumerate(images):
            Image.new("RGB", size[::-1], (20 * i, 9, 9)).save(tmp_path / name / f"{i}.png")
            (tmp_path / name / f"{i}.txt").write_text(f"{name}{i} one\n{name}{i} two")

    def flags(*more, **changes):
        size = {"type": "local", "resolution": 32, "resolution_type": "pixel_area", "crop": False} | changes
        entries = [
            {"id": "a", "instance_data_dir": str(tmp_path / "a"), "cache_dir_vae": str(tmp_path / "vae_a"), **size},
            {"id": "b", "instance_data_dir": str(tmp_path / "b"), "cache_dir_vae": str(tmp_path / "vae_b"), **size},
            {"id": "t", "dataset_type": "text_embeds", "cache_dir": str(tmp_path / "texts"), "write_batch_size": 5},
        ]
        (tmp_path / "data.json").write_text(json.dumps(entries))
        return ["--data_backend_config", tmp_path / "data.json", *more]

    return flags


def opened_several(sd_teacher, flags, folder):
    base = ["--pretrained_teacher_model", sd_teacher, "--output_dir", folder, "--train_batch_size", 2]
    return open_and_count([*base, *flags])


def test_each_dataset_has_its_own_store_and_each_record_its_geometry(sd_teacher, several, tmp_path):
    encoder, batches, loads = opened_several(sd_teacher, several(), tmp_path / "o")
    assert (records(tmp_path / "vae_a"), records(tmp_path / "vae_b")) == (8, 4)
    assert records(tmp_path / "texts") == 2 * 12 + 1 + 4  # all captions, the empty one, those of the pictures
    files = list((tmp_path / "texts").rglob("*.safetensors"))
    assert max(map(records_of_file, files)) == 5
    told = {}
    for _ in range(24):
        samples = next(batches)
        images = encoder.encode_images(samples)
        encoder.encode_text([sample.caption for sample in samples])
        rows, columns = samples[0].bucket
        assert images["mean"].shape == (2, 4, rows // 8, columns // 8)
        told |= {
            sample.caption.split()[0]: ids.tolist() for sample, ids in zip(samples, images["size_ids"], strict=True)
        }
    assert loads == {"vae": 0, "text": 0}
    assert told["a0"] == [32, 32, 0, 0, 32, 32] and told["b1"] == [64, 64, 0, 0, 32, 32]
    assert told["a5"][:2] == [24, 40] and told["a5"][4:] == [24, 40] and len(told) == 12
    _, _, loads = opened_several(sd_teacher, several(), tmp_path / "another_run")
    assert (records(tmp_path / "vae_a"), loads) == (8, {"vae": 0, "text": 0})


def test_cached_and_streamed_buckets_agree(sd_teacher, several, tmp_path):
    found = []
    for mode in (["--vae_cache_disable"], ["--vae_cache_ondemand"], []):
        encoder, batches, _ = opened_several(sd_teacher, several(*mode, crop_style="center"), tmp_path / "o")
        found.append(epoch(encoder, batches, 12))
    for other in found[1:]:
        assert_same(found[0], other)


def test_skipped_discovery_leaves_it_to_training(sd_teacher, several, tmp_path):
    encoder, batches, loads = opened_several(sd_teacher, several(skip_file_discovery="vae"), tmp_path / "o")
    assert records(tmp_path / "vae_a") == 0
    epoch(encoder, batches, 2)
    encoder.flush()
    assert loads == {"vae": 1, "text": 1} and records(tmp_path / "vae_a") + records(tmp_path / "vae_b") > 0
    opened_several(sd_teacher, several(skip_file_discovery="text"), tmp_path / "p")
    assert records(tmp_path / "vae_a") == 8


def test_images_of_a_small_bucket_have_a_record_of_their_own(sd_teacher, several, tmp_path):
    """Another batch size sends them elsewhere; what was cached for their own bucket stays good."""
    opened_several(sd_teacher, several(), tmp_path / "o")
    _, batches, _ = opened_several(sd_teacher, several("--train_batch_size", 9), tmp_path / "o")
    assert batches.stream.readers[0].merged == {}  # 4 and 8: no bucket has enough, so both stay
    _, batches, loads = opened_several(sd_teacher, several("--train_batch_size", 5), tmp_path / "o")
    assert batches.stream.readers[0].merged == {(24, 40): (32, 32)}
    assert {sample.bucket for _ in range(4) for sample in next(batches)} == {(32, 32)}
    assert (records(tmp_path / "vae_a"), records(tmp_path / "vae_b"), loads["vae"]) == (8 + 4, 4, 0)
    _, _, loads = opened_several(sd_teacher, several("--train_batch_size", 4), tmp_path / "o")
    assert (records(tmp_path / "vae_a"), loads["vae"]) == (8 + 4, 0)


def test_captions_are_encoded_together_however_few_pictures_are(sd_teacher, shards, tmp_path, watch):
    calls = watch(script, "encode_prompts")
    encoder, *_ = opened(sd_teacher, shards, tmp_path, "--vae_encode_batch_size", 1)
    assert len(calls) == 1 + 2  # the run's own prompts, and those of each shard
    assert sum(len(prompts) for (_, prompts), _ in calls) == len(encoder.text.index) > 10


def test_a_batch_is_one_copy_for_each_tensor(sd_teacher, shards, tmp_path, watch):
    encoder, batches, _ = opened(sd_teacher, shards, tmp_path)
    samples, copies = next(batches), watch(encoders_module, "to_device")
    encoder.encode_images(samples)
    assert [len(values) for (values, _), _ in copies] == [4, 4, 4]  # mean, std and size_ids
    encoder.encode_text([sample.caption for sample in samples])
    assert len(copies) == 4


# ---------------------------------------------------------------------------------------------------------------------
# Encoders of any model
# ---------------------------------------------------------------------------------------------------------------------


def stand_ins(calls: list[str], vae=None) -> Encoders:
    """A model on pixels, and prompts as their lengths."""

    def loads(name, value):
        calls.append(name)
        return value

    def encode_pixels(network, pixels):
        calls.append(f"pixels {len(pixels)}")
        assert network is vae and pixels.min() >= -1.0 and pixels.max() <= 1.0
        return {"pixels": pixels}

    return Encoders(
        load_vae=lambda: loads("vae", vae),
        encode_pixels=encode_pixels,
        load_text=lambda: loads("text", None),
        encode_prompts=lambda network, prompts: {"length": torch.tensor([float(len(prompt)) for prompt in prompts])},
        latents_identity=lambda: loads("identity", {"vae": "none", "dtype": torch.float32}),
        text_identity=lambda: {"text": "lengths"},
    )


def opened_by_hand(shards: str, folder: Path, caches: str, datasets: int = 1):
    settings = {"interpolation_type": "bilinear", "random_flip": False, "seed": 0, "train_batch_size": 4}
    settings |= {"output_dir": str(folder), "cache_dir_vae": None, "compress_disk_cache": False}
    args = Namespace(**settings, vae_encode_batch_size=3, dataloader_num_workers=0, max_train_steps=None, eval_steps=0)
    args.gradient_accumulation_steps = 1
    rules = Rules(16, alignment=16, crop_style="center")
    each = tuple(Dataset(f"shards {i}", expand_shards(shards), rules) for i in range(datasets))
    data = Data("--shards", each, caches, 16)
    calls = []
    readers = open_readers(args, data)
    encoder, readers = open_encoder(args, data, readers, stand_ins(calls), Accelerator(), ["a prompt"], FRESH)
    return encoder, open_batches(args, data, Accelerator(), readers, None), calls


@pytest.mark.parametrize("caches", ["fill", "ondemand", "off"])
def test_networks_that_are_none_are_loaded_once(shards, tmp_path, caches):
    encoder, batches, calls = opened_by_hand(shards, tmp_path / "o", caches)
    assert (calls.count("vae"), calls.count("text")) == ((1, 1) if caches == "fill" else (0, 0))
    calls.clear()
    for _ in range(4):
        samples = next(batches)
        assert encoder.encode_images(samples)["pixels"].shape == (4, 3, 16, 16)
        lengths = encoder.encode_text([sample.caption for sample in samples])["length"]
        assert lengths.tolist() == [len(sample.caption) for sample in samples]
    assert [calls.count(name) for name in ("vae", "text")] == ([0, 0] if caches == "fill" else [1, 1])
    assert bool([call for call in calls if call.startswith("pixels")]) == (caches != "fill")
    encoder.flush()
    assert (tmp_path / "o").exists() == (caches != "off")
    _, _, calls = opened_by_hand(shards, tmp_path / "o", "fill" if caches == "ondemand" else caches)
    # the prompt beside the captions is met for the first time
    assert calls == {"fill": ["identity"], "ondemand": ["identity", "text"], "off": []}[caches]


def test_weights_are_hashed_once_for_all_datasets_and_never_without_caches(shards, tmp_path):
    """A hash reads gigabytes."""
    assert opened_by_hand(shards, tmp_path / "o", "ondemand", datasets=3)[2].count("identity") == 1
    assert opened_by_hand(shards, tmp_path / "p", "off", datasets=3)[2] == []


def test_stores_have_the_names_of_what_shaped_them(shards, tmp_path):
    """Names that runs before this one gave: what they encoded is found again."""
    encoder, batches, _ = opened_by_hand(shards, tmp_path, "ondemand")
    geometry = [
        ["resolution", 16.0], ["resolution_type", "pixel"], ["alignment", 16], ["decimals", 2], ["minimum", None],
        ["maximum", None], ["downsample", None], ["crop", True], ["crop_aspect", "square"], ["crop_style", "center"],
        ["fixed_size_ids", False], "bilinear", False, None,
    ]  # fmt: skip
    name = identity(vae="none", geometry=geometry, dtype=torch.float32)
    assert encoder.latents[0].folder == tmp_path / "cache" / "vae" / name
    assert encoder.text.folder == tmp_path / "cache" / "text" / identity(text="lengths")
    assert [reader.cache for reader in batches.stream.readers] == encoder.latents
