"""The SDXL script's model: what the networks are told, a whole step in float64, starts, and exports.

What both LCM scripts do alike is tested on the SD script; tests/test_scripts.py holds them to it.
"""

import gc
import io
import json
import re
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers import AutoencoderKL, LCMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file
from transformers import CLIPTextModel, CLIPTextModelWithProjection

import train_lcm_distill_sdxl as script
from common.cache import TensorStore
from tests import test_method
from tests.helpers import launch, tiny_autoencoder, tiny_sdxl_pipeline, write_shard
from tests.test_method import (  # noqa: F401
    lcm_in_float64,
    load,
    one_process,
    parse,
    perturb,
    randomize_adapters,
    shards,
    watch,
)
from tests.test_webhook import serve

ODD_SIZE = (257, 515)  # height and width of an original; bf16 has neither


@pytest.fixture(autouse=True)
def sdxl(monkeypatch):
    """The helpers of the SD script's tests run this script."""
    monkeypatch.setattr(test_method, "script", script)
    monkeypatch.setattr(test_method, "SHORT", test_method.SHORT + " --bucket_alignment 8")


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    """By prediction type, and one whose empty prompt is encoded."""
    folders = {name: tiny_sdxl_pipeline(tmp_path_factory.mktemp(name), name) for name in ("epsilon", "v_prediction")}
    return folders | {"encodes": tiny_sdxl_pipeline(tmp_path_factory.mktemp("encodes"), force_zeros=False)}


@pytest.fixture
def odd_shard(tmp_path):
    """Samples of an odd size."""
    rng = torch.Generator().manual_seed(0)
    samples = []
    for i in range(4):
        file = io.BytesIO()
        pixels = torch.randint(0, 256, (*ODD_SIZE, 3), generator=rng, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(file, "png")
        samples.append({"png": file.getvalue(), "txt": f"noise {i}".encode()})
    return write_shard(tmp_path / "odd.tar", samples)


def tiny_conditions(batch: int = 2) -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(4)
    sizes = torch.tensor([[32.0, 40.0, 0.0, 4.0, 32.0, 32.0]]).repeat(batch, 1)
    embeds = torch.randn(batch, 32, 40, generator=rng)
    return {"prompt_embeds": embeds, "text_embeds": torch.randn(batch, 20, generator=rng), "time_ids": sizes}


def tiny_inputs():
    return torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(4)), torch.tensor([999, 19])


# ---------------------------------------------------------------------------------------------------------------------
# The algorithm, restated
# ---------------------------------------------------------------------------------------------------------------------


def sdxl_conditions(pipe, sample) -> tuple[dict, dict]:
    """By the pipeline's own encoding; whether the empty prompt is zeros is its own business."""
    embeds, no_embeds, pooled, no_pooled = pipe.encode_prompt(
        sample.caption, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True
    )
    sizes = torch.tensor([[32.0, 40.0, 0.0, 4.0, 32.0, 32.0]], dtype=torch.float64)  # of the shards, cut to 32x32
    return (
        {"encoder_hidden_states": embeds, "added_cond_kwargs": {"text_embeds": pooled, "time_ids": sizes}},
        {"encoder_hidden_states": no_embeds, "added_cond_kwargs": {"text_embeds": no_pooled, "time_ids": sizes}},
    )


@pytest.mark.parametrize("teacher", ["epsilon", "v_prediction", "encodes"])
def test_training_steps_equal_the_algorithm_restated_in_float64(teacher, parse, teachers, monkeypatch, tmp_path):  # noqa: F811
    flags = "--max_train_steps 2 --learning_rate 1e-2 --adam_epsilon 1e-3 --max_grad_norm 0.01"
    args = parse(flags, teachers[teacher])
    losses, student, target = lcm_in_float64(args, StableDiffusionXLPipeline, sdxl_conditions)
    ours = watch(monkeypatch, "consistency_loss")
    script.main(args)
    torch.testing.assert_close([loss.item() for _, loss in ours], losses, rtol=5e-5, atol=0)
    start = load_file(teachers[teacher] / "unet" / "diffusion_pytorch_model.safetensors")
    for name, expected in (("student", student), ("target", target)):
        weights = load_file(tmp_path / "out" / "checkpoint-2" / f"{name}.safetensors")
        assert weights.keys() == expected.keys()
        assert max((expected[key] - start[key]).abs().max() for key in start) > 3e-4  # thousand times the tolerance
        assert max((weights[key] - expected[key]).abs().max() for key in expected) < 3e-7


# ---------------------------------------------------------------------------------------------------------------------
# What the networks are told
# ---------------------------------------------------------------------------------------------------------------------


def test_size_ids_reach_the_sinusoid_in_fp32_in_a_bf16_run(parse, odd_shard, monkeypatch):  # noqa: F811
    """bf16 makes 256 of 257 and 516 of 515."""
    seen = []

    def listen(teacher, student, target):
        for network in (teacher, student, target):
            network.add_time_proj.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))

    perturb(monkeypatch, listen)
    script.main(parse(f"--mixed_precision bf16 --train_shards_path_or_url {odd_shard} --validation_steps 0"))
    resized = round(515 * 32 / 257)
    ids = torch.tensor([257.0, 515.0, 0.0, (resized - 32) // 2, 32.0, 32.0])
    for values, batch in zip(seen[:3], (8, 4, 4), strict=True):  # teacher with both prompts, target, student
        assert values.dtype == torch.float32 and torch.equal(values.view(batch, 6), ids.repeat(batch, 1))


@pytest.mark.parametrize("teacher", ["epsilon", "encodes"])
def test_the_empty_prompt_is_what_the_teacher_s_pipeline_says(teacher, parse, teachers, monkeypatch):  # noqa: F811
    calls = watch(monkeypatch, "predict")
    script.main(parse("--proportion_empty_prompts 0.5 --train_batch_size 8", teachers[teacher]))
    pipe = StableDiffusionXLPipeline.from_pretrained(teachers[teacher])
    _, embeds, _, pooled = pipe.encode_prompt("anything", device="cpu")
    assert (embeds.abs().max() == 0) == (teacher == "epsilon")
    (_, _, _, both, *_), _ = calls[0]
    for name, expected in (("prompt_embeds", embeds), ("text_embeds", pooled)):
        rows = both[name]
        torch.testing.assert_close(rows[8:], expected.expand_as(rows[8:]), rtol=0, atol=1e-6)
        dropped = [torch.allclose(row, expected[0], rtol=0, atol=1e-6) for row in rows[:8]]
        assert 0 < sum(dropped) < 8  # dropped prompts are this too
    assert torch.equal(both["time_ids"][:8], both["time_ids"][8:])


def test_prompts_are_encoded_as_by_the_pipeline(parse, teachers):  # noqa: F811
    prompts = ["a small red circle", "at the top on a blue background " * 20]  # the latter is cut off
    encoders = script.load_text_encoder(parse(), torch.device("cpu"), torch.float32)
    ours = script.encode_prompts(encoders, prompts)
    pipe = StableDiffusionXLPipeline.from_pretrained(teachers["epsilon"])
    embeds, _, pooled, _ = pipe.encode_prompt(prompts, device="cpu", do_classifier_free_guidance=False)
    torch.testing.assert_close(ours, {"prompt_embeds": embeds, "text_embeds": pooled})


def test_pictures_are_the_pipeline_s_own_at_any_size(parse, teachers):  # noqa: F811
    """Drawn from embeddings, at a bucket's size, they are those that a user gets from the prompt."""
    args, prompt = parse(), "a large white cross on the left"
    pipe = StableDiffusionXLPipeline.from_pretrained(teachers["epsilon"])
    embeds, no_embeds, pooled, no_pooled = pipe.encode_prompt(prompt, device="cpu")
    (ours,) = script.draw(
        args, pipe.vae, pipe.unet, pipe.scheduler, {"prompt_embeds": embeds, "text_embeds": pooled},
        {"prompt_embeds": no_embeds, "text_embeds": no_pooled}, 3, 4.0, 7, (48, 32), None,
    )  # fmt: skip
    noise = torch.Generator().manual_seed(7)
    stock = pipe(prompt, height=48, width=32, num_inference_steps=3, guidance_scale=4.0, generator=noise).images[0]
    assert ours.size == (32, 48) and ours.tobytes() == stock.tobytes()


@pytest.mark.parametrize("override", [False, True])
def test_the_vae_is_in_fp32_unless_another_is_given(override, parse, teachers, monkeypatch, tmp_path):  # noqa: F811
    other = AutoencoderKL.from_pretrained(teachers["epsilon"], subfolder="vae")
    torch.nn.init.normal_(other.decoder.conv_out.weight, generator=torch.Generator().manual_seed(0))
    other.save_pretrained(tmp_path / "vae")
    encoded, drawn = watch(monkeypatch, "encode_pixels"), watch(monkeypatch, "draw")
    script.main(parse("--mixed_precision bf16" + f" --pretrained_vae_model_name_or_path {tmp_path / 'vae'}" * override))
    for vae in (encoded[0][0][0], drawn[0][0][1]):
        assert vae.dtype == (torch.bfloat16 if override else torch.float32)
        same = torch.allclose(vae.decoder.conv_out.weight.float(), other.decoder.conv_out.weight, atol=2e-2)
        assert same == override


# ---------------------------------------------------------------------------------------------------------------------
# Student, teacher, exports
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("w", [1.0, 12.0])
def test_a_full_student_starts_as_its_teacher_for_every_w(w, parse):  # noqa: F811
    teacher, student, target = load(parse())
    x, t = tiny_inputs()
    embedding = script.guidance_embedding(torch.full((2,), w), 256)
    expected = script.predict(teacher, x, t, tiny_conditions())
    for network in (student, target):
        assert torch.equal(script.predict(network, x, t, tiny_conditions(), embedding), expected)


@pytest.mark.parametrize("flags", ["--lora_rank 4", "--use_dora", "--lora_rank 4 --mixed_precision bf16"])
def test_without_adapters_the_network_is_the_teacher_bit_for_bit(flags, parse):  # noqa: F811
    args = parse(flags)
    dtype = torch.bfloat16 if args.mixed_precision else torch.float32
    teacher, student, target = script.load_networks(args, Accelerator(), dtype)
    assert teacher is student is target
    randomize_adapters(student)
    base = script.load_unet(args, dtype)
    base.to(memory_format=torch.contiguous_format if args.use_dora else torch.channels_last)
    x, t = tiny_inputs()
    cond = {name: v if name == "time_ids" else v.to(dtype) for name, v in tiny_conditions().items()}
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        expected = script.predict(base, x, t, cond)
        with script.adapters_off(student):
            assert torch.equal(script.predict(student, x, t, cond), expected)
        assert (script.predict(student, x, t, cond) - expected).abs().mean() > 1e-2


@pytest.mark.parametrize("flags", ["--lora_rank 4 --lora_alpha 8", "--lora_rank 4 --lora_alpha 8 --use_dora"])
def test_an_exported_lora_loads_in_the_stock_pipeline(flags, parse, teachers, monkeypatch, tmp_path):  # noqa: F811
    networks = perturb(monkeypatch, randomize_adapters)
    script.main(parse(f"{flags} --max_train_steps 2 --learning_rate 1e-2"))
    pipe = StableDiffusionXLPipeline.from_pretrained(teachers["epsilon"])
    (x, t), cond = tiny_inputs(), tiny_conditions()
    with torch.no_grad():
        base = script.predict(pipe.unet, x, t, cond)
        pipe.load_lora_weights(tmp_path / "out")
        ours, loaded = (script.predict(unet.eval(), x, t, cond) for unet in (networks[1], pipe.unet))
    assert (loaded - base).abs().mean() > 1e-2
    torch.testing.assert_close(loaded, ours, rtol=0, atol=1e-6)


@pytest.mark.parametrize("precision, error", [("int8-quanto", 0.02), ("fp8-torchao", 0.1)])
def test_a_lora_of_a_base_in_8_bits_loads_on_the_plain_one(precision, error, parse, teachers, monkeypatch, tmp_path):  # noqa: F811
    def weak_adapters(teacher, *_):
        torch.manual_seed(3)
        for name, p in teacher.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(p, std=0.1)

    networks = perturb(monkeypatch, weak_adapters)
    script.main(parse(f"--lora_rank 4 --base_model_precision {precision} --learning_rate 1e-2"))
    frozen = [m.weight for m in networks[1].modules() if type(m) is torch.nn.Linear and not m.weight.requires_grad]
    assert {type(weight).__name__ for weight in frozen} == {"Int8Tensor" if "int8" in precision else "Float8Tensor"}
    pipe = StableDiffusionXLPipeline.from_pretrained(teachers["epsilon"])
    (x, t), cond = tiny_inputs(), tiny_conditions()
    with torch.no_grad():
        base = script.predict(pipe.unet, x, t, cond)
        pipe.load_lora_weights(tmp_path / "out")
        ours, loaded = (script.predict(unet.eval(), x, t, cond) for unet in (networks[1], pipe.unet))
    assert (loaded - base).norm() > 0.2 * base.norm()
    assert (loaded - ours).norm() < error * loaded.norm()


@pytest.mark.parametrize("where", ["cpu", "accelerator"])
def test_weights_are_brought_to_8_bits_where_asked(where, parse, monkeypatch):  # noqa: F811
    places, meta = [], torch.device("meta")
    monkeypatch.setattr(script, "quantize", lambda network, precision, place: places.append(str(place)))
    args = parse(f"--lora_rank 2 --base_model_precision int8-torchao --quantize_via {where}")
    script.load_text_encoder(args, meta, torch.float32)
    script.load_networks(args, SimpleNamespace(device=meta, print=print), torch.float32)
    assert places == ["cpu" if where == "cpu" else "meta"] * 3


def test_an_exported_student_is_a_network_and_where_asked_a_whole_pipeline(parse, monkeypatch, tmp_path):  # noqa: F811
    networks = perturb(monkeypatch, lambda *_: None)
    script.main(parse("--num_ddim_timesteps 25 --learning_rate 1e-2 --export_pipeline"))
    target = networks[2].state_dict()
    unet = UNet2DConditionModel.from_pretrained(tmp_path / "out")
    assert unet.config.time_cond_proj_dim == 256
    assert all(torch.equal(value, target[name]) for name, value in unet.state_dict().items())
    pipe = StableDiffusionXLPipeline.from_pretrained(tmp_path / "out")
    assert isinstance(pipe.scheduler, LCMScheduler) and pipe.scheduler.config.original_inference_steps == 25
    assert pipe.config.force_zeros_for_empty_prompt and pipe.unet.config.time_cond_proj_dim == 256
    assert all(torch.equal(value, target[name]) for name, value in pipe.unet.state_dict().items())
    assert pipe("a red circle", height=32, width=32, num_inference_steps=2, guidance_scale=9.0).images[0].size == (
        32,
        32,
    )


def test_without_asking_nothing_but_the_student_is_written(parse, tmp_path):  # noqa: F811
    script.main(parse())
    assert not {"model_index.json", "unet", "vae", "text_encoder"} & {
        path.name for path in (tmp_path / "out").iterdir()
    }


@pytest.mark.parametrize("flags", ["--model_type full", "--lora_rank 4"])
def test_the_card_says_how_to_use_the_model_what_made_it_and_how_good_it_is(flags, parse, monkeypatch, tmp_path):  # noqa: F811
    monkeypatch.setattr(sys, "argv", ["train_lcm_distill_sdxl.py", *flags.split(), "--seed", "42"])
    script.main(parse(f"{flags} --num_ddim_timesteps 25 --report_steps 1,3"))
    out = tmp_path / "out"
    card = (out / "README.md").read_text()
    assert f"accelerate launch train_lcm_distill_sdxl.py {flags} --seed 42\n" in card
    settings = json.loads(re.search(r"```json\n(.*?)```", card, re.DOTALL)[1])
    assert (settings["num_ddim_timesteps"], settings["report_steps"], settings["w_max"]) == (25, [1, 3], 15.0)
    assert "![samples](samples.png)" in card and Image.open(out / "samples.png").width > 4 * 128  # a prompt a column
    scheduler = LCMScheduler.from_pretrained(out, subfolder="scheduler")
    assert scheduler.config.original_inference_steps == 25
    assert f'LCMScheduler.from_pretrained("{out}", subfolder="scheduler")' in card

    rows = json.loads((out / "report.json").read_text())
    samplers = [("teacher", 50), ("teacher", 1), ("teacher", 3), ("student", 1), ("student", 3)]
    assert [(row["sampler"], row["steps"]) for row in rows] == samplers
    assert all(f"| {row['sampler']} | {row['steps']} | {row['distance']:.4f} |" in card for row in rows)
    plot = np.asarray(Image.open(out / "report.png"))
    lines = [(plot == np.array(colour)).all(-1).sum() for colour in ((0x88, 0x88, 0x88), (0xC0, 0x30, 0x20))]
    assert min(lines) > 100 and "![steps against quality](report.png)" in card  # teacher's and student's


# ---------------------------------------------------------------------------------------------------------------------
# Caches
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags, there", [("", False), ("--vae_cache_disable", True)])
def test_with_full_caches_neither_vae_nor_text_encoders_are_there(flags, there, parse, monkeypatch):  # noqa: F811
    """While training, in the run that fills them and in the next."""
    kinds, found = (AutoencoderKL, CLIPTextModel, CLIPTextModelWithProjection), []

    def encoders() -> list:
        gc.collect()
        return [thing for thing in gc.get_objects() if type(thing) in kinds]

    before = encoders()
    known = set(map(id, before))
    monkeypatch.setattr(
        Accelerator, "log", lambda *_, **__: found.append({type(e) for e in encoders() if id(e) not in known})
    )
    for _ in range(2):
        script.main(parse(flags))
        AcceleratorState._reset_state(reset_partial_state=True)
    assert found == [set(kinds) if there else set()] * 2


@pytest.fixture
def two_shapes(tmp_path):
    """A folder of images in two buckets, and flags for it."""
    (tmp_path / "images").mkdir()
    rng = np.random.default_rng(0)
    for i in range(8):
        pixels = rng.integers(0, 255, (40, 64, 3) if i % 2 else (64, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{i}.png")
        (tmp_path / "images" / f"{i}.txt").write_text(f"number {i}")
    return f"--train_data_dir {tmp_path / 'images'} --resolution_type pixel_area --crop_aspect preserve"


def test_from_a_cache_the_teacher_is_told_what_it_is_told_without(two_shapes, teachers, monkeypatch, tmp_path):
    """Latents, both text encoders' embeddings, size ids: streamed, while filling, from what was filled, on demand."""
    calls, told = watch(monkeypatch, "predict"), []
    flags = f"--pretrained_teacher_model {teachers['epsilon']} --output_dir {tmp_path / 'out'} {two_shapes}"
    flags += f" {test_method.SHORT} --train_batch_size 2 --max_train_steps 6 --learning_rate 1e-6"
    for mode in (
        "--vae_cache_disable",
        "",
        "",
        f"--vae_cache_ondemand --compress_disk_cache --cache_dir_vae {tmp_path}",
    ):
        calls.clear()
        script.main(script.parse_args([*flags.split(), *mode.split()]))
        AcceleratorState._reset_state(reset_partial_state=True)
        told.append([{"x": x, "t": t} | cond for (_, x, t, cond, *_), _ in calls[::3]])  # teacher, target, student
    assert {tuple(step["x"].shape[2:]) for step in told[0]} == {(5, 3), (3, 5)}
    assert {tuple(step["time_ids"][0].tolist()) for step in told[0]} == {(64, 40, 0, 0, 40, 24), (40, 64, 0, 0, 24, 40)}
    for other in told[1:]:
        torch.testing.assert_close(other, told[0], rtol=0, atol=1e-4)


def test_two_processes_fill_both_caches_and_train(two_shapes, teachers, tmp_path):
    flags = f"--pretrained_teacher_model {teachers['epsilon']} --output_dir {tmp_path / 'out'} {two_shapes}"
    flags += f" {test_method.SHORT} --train_batch_size 2 --max_train_steps 2"
    done = launch("train_lcm_distill_sdxl.py", *flags.split(), processes=2)
    assert "caches: 8 latents, 13 prompts" in done.stdout  # the empty one and those of the pictures
    assert "for 2 steps of 4 samples" in done.stdout
    (folder,) = (tmp_path / "out" / "cache" / "text").iterdir()
    store = TensorStore(folder)
    records = [store.get(key) for key in store.index]
    assert {name: tuple(v.shape) for name, v in records[0].items()} == {"prompt_embeds": (32, 40), "text_embeds": (20,)}
    again = launch("train_lcm_distill_sdxl.py", *flags.split(), processes=2)
    assert "caches: 8 latents, 13 prompts" in again.stdout
    assert len(list(folder.glob("*.safetensors"))) == len({str(path) for path in store.index.values()})  # none is new


# ---------------------------------------------------------------------------------------------------------------------
# What may be added to a run, where SDXL is another matter than SD
# ---------------------------------------------------------------------------------------------------------------------


def test_the_negative_prompt_reaches_the_teachers_pictures_in_both_embeddings(parse, teachers, monkeypatch):  # noqa: F811
    calls = watch(monkeypatch, "draw")
    args = parse("--validation_negative_prompt blue --validation_resolution 48x32")
    args.disable_benchmark = False
    script.main(args)
    pipe = StableDiffusionXLPipeline.from_pretrained(teachers["epsilon"])
    embeds, _, pooled, _ = pipe.encode_prompt("blue", device="cpu", do_classifier_free_guidance=False)
    (student, _), (teacher, pictures) = calls
    assert student[5]["prompt_embeds"].abs().max() == student[5]["text_embeds"].abs().max() == 0
    torch.testing.assert_close(teacher[5], {"prompt_embeds": embeds, "text_embeds": pooled}, rtol=0, atol=1e-5)
    assert {picture.size for picture in pictures} == {(48, 32)}


@pytest.mark.parametrize("level, previews", [({}, ["step01", "step02", "step04"]), ({"level": "info"}, [])])
def test_previews_go_to_the_webhook(level, previews, parse, monkeypatch, tmp_path):  # noqa: F811
    tiny_autoencoder(tmp_path / "tiny")
    server = serve()
    (tmp_path / "hook.json").write_text(json.dumps({"webhook_url": server.url} | level))
    flags = f"--validation_preview --validation_preview_steps 2 --validation_preview_model {tmp_path / 'tiny'}"
    script.main(parse(f"{flags} --validation_num_inference_steps 4 --webhook_config {tmp_path / 'hook.json'}"))
    names = [message["name"] for message in server.received if message["type"] == "picture"]
    assert names == [*(f"preview-4-steps-{step}" for step in previews), "grid"]
    assert len(list((tmp_path / "out" / "validation").glob("preview-4-steps-*.png"))) == 3  # on disk in any case
    server.shutdown()


def test_each_text_encoder_has_its_precision(parse, tmp_path):  # noqa: F811
    embeds = []
    for flags in ("", "--text_encoder_1_precision int8-torchao", "--text_encoder_2_precision fp8-torchao"):
        args = parse(flags)
        encoders = script.load_text_encoder(args, torch.device("cpu"), torch.float32)
        layers = [next(m for m in encoder.modules() if isinstance(m, torch.nn.Linear)) for _, encoder in encoders]
        wanted = {"int8-torchao": "Int8Tensor", "fp8-torchao": "Float8Tensor", "no_change": "Parameter"}
        assert [type(layer.weight).__name__ for layer in layers] == [
            wanted[args.text_encoder_1_precision],
            wanted[args.text_encoder_2_precision],
        ]
        with torch.no_grad():
            embeds.append(script.encode_prompts(encoders, ["a small red circle"])["prompt_embeds"][0])
    plain, first, second = embeds  # [77, 16 + 24]
    assert torch.equal(first[:, 16:], plain[:, 16:]) and torch.equal(second[:, :16], plain[:, :16])
    for found, places in ((first, slice(0, 16)), (second, slice(16, 40))):
        assert 0 < (found - plain)[:, places].norm() / plain[:, places].norm() < 0.2


def test_the_kohya_file_is_the_lora_in_stabilitys_names(parse, teachers, monkeypatch, tmp_path):  # noqa: F811
    networks = perturb(monkeypatch, randomize_adapters)
    targets = "to_q,to_v,ff.net.2,conv1,conv_shortcut,time_emb_proj"
    script.main(parse(f"--lora_rank 4 --lora_alpha 8 --export_formats diffusers,kohya --lora_target_modules {targets}"))
    keys = load_file(tmp_path / "out" / "kohya_lora.safetensors").keys()
    assert all(key.startswith(("lora_unet_input_", "lora_unet_middle_", "lora_unet_output_")) for key in keys)
    pipe = StableDiffusionXLPipeline.from_pretrained(teachers["epsilon"])
    pipe.load_lora_weights(tmp_path / "out", weight_name="kohya_lora.safetensors")
    (x, t), cond = tiny_inputs(), tiny_conditions()
    with torch.no_grad():
        ours, loaded = (script.predict(unet.eval(), x, t, cond) for unet in (networks[1], pipe.unet))
    torch.testing.assert_close(loaded, ours, rtol=0, atol=1e-5)


@pytest.mark.parametrize("cache", ["", "--vae_cache_disable"])
def test_what_is_held_out_is_of_all_datasets(cache, teachers, monkeypatch, tmp_path, capsys):
    """Two datasets of the same images with other rules: neither trains on what is held out."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for i in range(6):
            Image.new("RGB", (48, 32) if i % 2 else (32, 48), (40 * i, 0, 0)).save(tmp_path / name / f"{i}.png")
            (tmp_path / name / f"{i}.txt").write_text(f"colour {i}")
    entry = {"type": "local", "resolution_type": "pixel"}
    datasets = [
        entry | {"id": "a", "instance_data_dir": str(tmp_path / "a"), "resolution": 32},
        entry | {"id": "b", "instance_data_dir": str(tmp_path / "b"), "resolution": 32, "crop": False},
    ]
    (tmp_path / "data.json").write_text(json.dumps(datasets))
    held_out, trained, original = [], set(), script.stable_loss

    def watched(args, loss_of, network, samples, encoder):
        held_out.extend(samples)
        return original(args, loss_of, network, samples, encoder)

    monkeypatch.setattr(script, "stable_loss", watched)
    draws = watch(monkeypatch, "open_batches")
    flags = f"--pretrained_teacher_model {teachers['epsilon']} --data_backend_config {tmp_path / 'data.json'} {cache}"
    flags += f" --output_dir {tmp_path / 'out'} --eval_steps 2 --eval_samples 3 --max_train_steps 2 --lora_rank 2"
    script.main(script.parse_args([*test_method.SHORT.split(), *flags.split(), "--train_batch_size", "1"]))
    batches = draws[0][1]
    for _ in range(20):
        trained |= {sample.key.partition("-")[0] for sample in next(batches)}
    keys = {sample.key.partition("-")[0] for sample in held_out}
    assert len(held_out) == len(keys) == 3 and len(trained) == 3 and not keys & trained
    assert "held out for --eval_steps" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------------------------
# Flags
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", ["", "--model_type lora"])
def test_the_first_line_of_the_readme_is_the_toy_recipe(flags):
    args = script.parse_args(["--w_min", "1", "--w_max", "12", *flags.split()])
    assert args.toy and (args.w_min, args.w_max, args.resolution) == (1.0, 12.0, 64)
    without = script.parse_args(flags.split())
    assert vars(without) == vars(args)
