"""The memory plan: counted on the real configs, measured against what PyTorch's own profiler sees, and its advice."""

import functools
import gc
import json
import shutil
from argparse import Namespace
from dataclasses import replace

import pytest
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from peft import LoraConfig
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile
from transformers import UMT5Config, UMT5EncoderModel

import train_dmd_distill_wan as script
from common.networks import quantize
from common.optim import Lion
from common.plan.memory import (
    GB,
    RESERVE,
    Meter,
    PlannedModel,
    Setup,
    account,
    activations,
    build,
    can_share,
    counted,
    frozen_bytes,
    give_shapes,
    most,
    plan_of,
    remedies,
    report,
    state_bytes,
    trained_parameters,
)
from tests.helpers import folder_of_clips, short_wan_run, without

WAN = {
    "patch_size": [1, 2, 2], "num_attention_heads": 12, "attention_head_dim": 128, "in_channels": 16,
    "out_channels": 16, "text_dim": 4096, "freq_dim": 256, "ffn_dim": 8960, "num_layers": 30,
}  # fmt: skip
TINY = WAN | {"num_attention_heads": 2, "attention_head_dim": 24, "text_dim": 16, "ffn_dim": 96, "num_layers": 3}
UMT5 = {"vocab_size": 256384, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64, "feed_forward_proj": "gated-gelu"}  # fmt: skip  # noqa: E501
SMALL_UMT5 = {"vocab_size": 100, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
VAE = {"base_dim": 4, "z_dim": 16, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1}


TARGETS = tuple(script.LORA_TARGETS.split(","))


@functools.cache  # of equal models the same one: measurements are kept by model
def model_of(transformer: str, text_encoder: str) -> PlannedModel:
    config, text_config = json.loads(transformer), json.loads(text_encoder)
    return PlannedModel(
        transformer=lambda blocks: WanTransformer3DModel.from_config(config | {"num_layers": blocks}),
        vae=lambda: AutoencoderKLWan.from_config(VAE), text_encoder=lambda: UMT5EncoderModel(UMT5Config(**text_config)),
        predict=lambda network, x, t, text: network(x, t, text).sample, blocks=config["num_layers"],
        block="WanTransformerBlock", channels=config["in_channels"], patch=tuple(config["patch_size"]),
        text_width=config["text_dim"], heads=config["num_attention_heads"],
        width=config["num_attention_heads"] * config["attention_head_dim"],
    )  # fmt: skip


def setup(transformer=WAN, text_encoder=SMALL_UMT5, **changes) -> Setup:
    """81 frames of 832x480."""
    model = model_of(json.dumps(transformer), json.dumps(text_encoder))
    sizes = {"batch": 1, "frames": 21, "height": 60, "width": 104, "validation": (1, 8, 8), "lora_targets": TARGETS}
    return Setup(model, **sizes | changes)


def tiny(transformer=TINY, **changes) -> Setup:
    return setup(transformer, **{"frames": 3, "height": 8, "width": 8, "lora_rank": 4, "text_length": 8} | changes)


# ---------------------------------------------------------------------------------------------------------------------
# Counted
# ---------------------------------------------------------------------------------------------------------------------


def test_sizes_of_the_real_model():
    """1.42 billion weights, 2.8 GB in bf16; an adapter of rank 128 with all its state 2.8 GB."""
    network = counted(setup().model, 128, TARGETS)
    base = sum(p.numel() for name, p in network.named_parameters() if "lora_" not in name)
    assert base == 1_418_996_800
    assert frozen_bytes(network, torch.bfloat16, "no_change") == pytest.approx(2.84 * GB, rel=0.01)
    assert frozen_bytes(network, torch.bfloat16, "int8-torchao") == pytest.approx(1.43 * GB, rel=0.02)
    trained = trained_parameters(setup())
    by_hand = 30 * 128 * (8 * 2 * 1536 + 2 * (1536 + 8960))  # 8 projections of attention, 2 of the feed-forward
    assert sum(p.numel() for p in trained) == by_hand
    assert 8 * by_hand + state_bytes(trained, "adamw") == pytest.approx(2.8 * GB, rel=0.01)


@pytest.mark.slow
def test_the_text_encoder_is_eleven_gigabytes():
    phase = account(tiny(text_encoder=UMT5))["filling the caches"]
    assert phase["text encoder"] == pytest.approx(11.36 * GB, rel=0.01)
    quantised = account(tiny(text_encoder=UMT5, text_precision="int8-torchao"))
    assert quantised["filling the caches"]["text encoder"] == pytest.approx((11.36 + 2.1) / 2 * GB, rel=0.01)


def stored_bytes(p) -> int:
    """Also of a tensor in 8 bits, which is several."""
    inner = [getattr(p, name) for name in p.__tensor_flatten__()[0]] if hasattr(p, "__tensor_flatten__") else [p]
    return sum(tensor.nbytes for tensor in inner if isinstance(tensor, torch.Tensor))


@pytest.mark.parametrize("precision", ["no_change", "int8-torchao"])
def test_frozen_bytes_are_those_of_a_loaded_network(tmp_path, precision):
    """What diffusers loads in bf16, with some of it kept in fp32, and what torchao makes of that."""
    WanTransformer3DModel.from_config(TINY).save_pretrained(tmp_path)
    network = WanTransformer3DModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    quantize(network, precision, "cpu")
    total = sum(map(stored_bytes, network.parameters()))
    assert frozen_bytes(counted(tiny().model), torch.bfloat16, precision) == total


@pytest.mark.parametrize("name", ["adamw", "lion"])
def test_state_bytes_are_an_optimizers(name):
    parameters = [torch.nn.Parameter(torch.randn(64, 64)), torch.nn.Parameter(torch.randn(7))]
    optimizer = {"adamw": lambda: torch.optim.AdamW(parameters), "lion": lambda: Lion(parameters, 1e-3)}[name]()
    for p in parameters:
        p.grad = torch.ones_like(p)
    optimizer.step()
    moments = [t for state in optimizer.state.values() for key, t in state.items() if key != "step"]
    assert state_bytes(parameters, name) == sum(moment.nbytes for moment in moments)
    assert state_bytes(parameters, "adamw8bit") == 2 * (4096 + 4096 // 64) + 8 * 7


# ---------------------------------------------------------------------------------------------------------------------
# Measured
# ---------------------------------------------------------------------------------------------------------------------


def profiled_peak(network, x, text) -> int:
    """Bytes, by PyTorch's profiler on a real forward and backward."""
    gc.collect()  # what an earlier test has left may not be freed in the middle
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        network(x, torch.ones(len(x)), text).sample.float().sum().backward()
    now = peak = 0
    for event in trace.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_meter_agrees_with_the_profiler(checkpointing):
    """Without content on one side, real numbers on the other."""

    def network():
        made = WanTransformer3DModel.from_config(TINY | {"num_layers": 2}).requires_grad_(False)
        made.add_adapter(LoraConfig(r=4, target_modules=["to_q", "ffn.net.2"]))
        if checkpointing:
            made.enable_gradient_checkpointing()
        return made

    shape, text_shape = (1, 16, 5, 16, 16), (1, 32, 16)
    real = profiled_peak(network(), torch.randn(shape), torch.randn(text_shape))
    with torch.device("meta"):
        empty = network()
    with FakeTensorMode():
        give_shapes(empty, torch.float32)
        x, t, text = torch.empty(shape), torch.empty(1), torch.empty(text_shape)
        with Meter([*empty.parameters(), *empty.buffers(), x, t, text]) as meter:
            empty(x, t, text).sample.float().sum().backward()
    assert meter.peak == pytest.approx(real, rel=0.05)


@pytest.mark.slow
def test_what_checkpoints_hold_of_the_real_model():
    """32,760 tokens of 1536 channels in bf16, at the door of each of 30 blocks: 3.0 GB."""
    kept, own = activations(setup(checkpointing=True), (1, 21, 60, 104))
    doors = 30 * 32_760 * 1536 * 2
    assert doors == pytest.approx(3.0 * GB, rel=0.01)
    behind = 32_760 * (1536 * 4 + 2 * 128 * 4)  # what the last norm reads, in fp32, and the rotary angles
    assert kept == pytest.approx(doors + behind, rel=0.01)
    assert setup().tokens() == 32_760


@pytest.mark.slow
def test_one_block_of_the_real_model_computed_again():
    """4.6 GB where weights and activations are bf16 alike; adapters of PEFT in fp32 copy their inputs besides."""
    with torch.device("meta"):
        network = WanTransformer3DModel.from_config(WAN | {"num_layers": 2})
    network.enable_gradient_checkpointing()
    network.to(torch.bfloat16)
    with FakeTensorMode():
        for module in network.modules():
            for name, p in module._parameters.items():
                if p is not None:
                    module._parameters[name] = torch.nn.Parameter(torch.empty(p.shape, dtype=torch.bfloat16))
            for name, buffer in module._buffers.items():
                module._buffers[name] = torch.empty(buffer.shape)
        for p in network.parameters():
            p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
        x, text = torch.empty(1, 16, 21, 60, 104, dtype=torch.bfloat16), torch.empty(1, 512, 4096, dtype=torch.bfloat16)
        with Meter([*network.parameters(), *network.buffers(), x, text]) as meter:
            out = network(x, torch.empty(1, dtype=torch.bfloat16), text).sample
            kept = meter.now
            out.sum().backward()
    assert meter.peak - kept == pytest.approx(4.6 * GB, rel=0.15)
    _, own = activations(setup(checkpointing=True), (1, 21, 60, 104))
    assert meter.peak - kept < own < 1.5 * (meter.peak - kept)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_each_further_block_keeps_the_same(checkpointing):
    """Two and three blocks say what five keep."""
    run = tiny(TINY | {"num_layers": 5}, checkpointing=checkpointing)
    network = build(run.model, run.rank, run.lora_targets)
    if checkpointing:
        network.enable_gradient_checkpointing()
    with FakeTensorMode():
        give_shapes(network, run.dtype)
        x, t = torch.empty(1, 16, 3, 8, 8, dtype=run.dtype), torch.empty(1)
        text = torch.empty(1, 8, 16, dtype=run.dtype)
        with Meter([*network.parameters(), *network.buffers(), x, t, text]) as meter:
            with torch.autocast("cpu", run.dtype):
                out = network(x, t, text).sample
            assert activations(run, (1, 3, 8, 8))[0] == pytest.approx(meter.now, rel=0.01)
    assert out.shape == x.shape


# ---------------------------------------------------------------------------------------------------------------------
# Together
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_lora_of_the_real_model_fits_into_twenty_gigabytes():
    run = setup(checkpointing=True, caches="full")
    assert 14 * GB < sum(account(run)["training"].values()) < 20 * GB
    assert "fits into 24 GB" in report(run, 81, 24 * GB)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "smaller"),
    [
        ({"checkpointing": True}, "activations kept for backward()"),
        ({"base_precision": "int8-torchao"}, None),
        ({"lora_rank": 1}, "student"),
        ({"context_parallel": 2}, "activations kept for backward()"),
        ({"shards": 2}, "student"),
        ({"batch": 1}, "activations kept for backward()"),
        ({"frames": 2}, "activations kept for backward()"),
        ({"ema": "cpu"}, "EMA"),
    ],
)
def test_what_makes_a_run_smaller(changes, smaller):
    run = tiny(batch=2, ema="gpu", frames=3, height=16, width=16)
    before, after = (account(each)["training"] for each in (run, replace(run, **changes)))
    assert sum(after.values()) < sum(before.values())
    if smaller:
        by_name = [sum(size for name, size in part.items() if name.startswith(smaller)) for part in (before, after)]
        assert by_name[1] < by_name[0]


@pytest.mark.slow
def test_a_full_student_has_three_networks():
    parts = account(tiny(model_type="full"))["training"]
    count = sum(p.numel() for p in counted(tiny().model).parameters())
    assert parts["fake score, likewise"] == 4 * count and parts["student's adamw state"] == 8 * count
    kept_for_two_passes = account(tiny(model_type="full", accumulation=2))["training"]
    name = "gradients, beyond what has gone when they come"
    assert kept_for_two_passes[name] == 8 * count and parts[name] < 4 * count


@pytest.mark.slow
def test_a_causal_student_keeps_keys_and_values():
    """Blocks of 1, 1 and 2 frames of 16 tokens: those of 1 and 1 frame, of 48 channels in 3 layers, bf16."""
    parts = account(tiny(frames=4, block_lengths=(1, 1, 2)))["training"]
    assert parts["keys and values of earlier blocks"] == 3 * 2 * (1 + 1) * 16 * 48 * 2
    assert "keys and values of earlier blocks" not in account(tiny())["training"]


@pytest.mark.slow
def test_encoders_stay_where_no_cache_is_filled_before_training():
    assert "filling the caches" not in account(tiny(caches="full"))
    filled = account(tiny())
    encoder = filled["filling the caches"]["text encoder"]
    assert encoder > 0 and "text encoder" not in filled["training"]
    for caches in ("ondemand", "off"):
        phases = account(tiny(caches=caches))
        assert "filling the caches" not in phases
        assert phases["training"]["text encoder"] == phases["validation"]["text encoder"] == encoder
        assert phases["training"]["VAE, after a validation"] == phases["validation"]["VAE"] > 0


@pytest.mark.slow
def test_validation_generates_as_many_clips_at_once_as_are_trained():
    name = "its decoding, or a forward"
    one, three = (account(tiny(batch=batch))["validation"][name] for batch in (1, 3))
    assert three == pytest.approx(3 * one, rel=0.1)


@pytest.mark.slow
def test_advice_fits_and_says_what_it_saves():
    run = tiny(batch=4, ema="gpu", frames=5, height=32, width=32, caches="full")
    room = most(run) + RESERVE
    assert remedies(run, room) == [] and "fits into" in report(run, 17, room)
    room = 0.7 * most(run) + RESERVE
    steps = remedies(run, room)
    assert steps[0][0] == "--gradient_checkpointing" and steps[-1][1] + RESERVE <= room
    sizes = [most(run), *(size for _, size in steps)]
    assert sizes == sorted(sizes, reverse=True)
    text = report(run, 17, room)
    assert "does not fit" in text and "--gradient_checkpointing" in text and "and still not" not in text
    assert "and still not" in report(run, 17, 1.0)
    run = replace(run, caches="fill")  # 8 bits of a text encoder that is small here save nothing
    sizes = [most(run), *(size for _, size in remedies(run, 1.0))]
    assert all(later < earlier for earlier, later in zip(sizes, sizes[1:], strict=False))


def test_processes_share_what_has_heads_and_tokens_for_each():
    assert [can_share(setup(), n) for n in (2, 4, 8)] == [True, True, False]  # 12 heads
    assert not can_share(setup(height=6, width=6), 2)  # 9 tokens in a frame
    assert not can_share(setup(context_parallel=2), 2) and not can_share(setup(shards=2), 2)


# ---------------------------------------------------------------------------------------------------------------------
# A run's own
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def parse(wan_teacher, tmp_path):
    """`parse(flags)`: what the script's parser returns for clips of 9 frames of 64x64."""

    def parsed(flags: str, teacher=wan_teacher):
        usual = [*short_wan_run(teacher, tmp_path), "--resolution", "64", "--validation_num_video_frames", "9"]
        usual = without(usual, "--fake_score_lr") if "lcm" in flags else usual
        usual = without(usual, "--train_prompts") if "--train_data_dir" in flags else usual
        return script.parse_args([*usual, "--validation_prompt", "ball", *flags.split()])

    return parsed


def setup_of(parsed, dtype=torch.float32) -> Setup:
    args, data, method, _ = parsed
    return script.planned_setup(args, data, method, dtype)


@pytest.fixture
def without_weights(wan_teacher, tmp_path):
    return shutil.copytree(wan_teacher, tmp_path / "configs", ignore=shutil.ignore_patterns("*.safetensors"))


def test_a_plan_of_a_teacher_in_a_folder(parse, without_weights):
    """From the configs alone: there are no weights to load."""
    flags = "--resolution_type pixel_area --validation_resolution 128x32 --num_frames 17 --train_batch_size 2"
    run = setup_of(parse(f"{flags} --lora_rank 4 --lora_target_modules to_q,to_k", without_weights))
    assert (run.batch, run.frames, run.height, run.width) == (2, 5, 4, 16)  # 64 x 64 in the shape of 4 to 1
    assert run.validation == (3, 4, 16) and run.block_lengths == () and run.ema == "none"
    text = report(run, 17)
    assert "2 x 17 frames of 16x4 latents: 2 x 80 tokens" in text
    for row in ("teacher, base of all three, float32", "student, LoRA of rank 4", "filling the caches", "validation"):
        assert row in text


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        # A bidirectional one rolls out less
        ("--num_frames 17 --num_training_frames 3", {"frames": 3, "block_lengths": ()}),
        ("--num_frames 17 --num_frame_per_block 1 --num_training_frames 3", {"frames": 3, "block_lengths": (1,) * 5}),
        ("--use_ema", {"ema": "gpu"}),
        ("--use_ema --ema_device cpu", {"ema": "cpu"}),
        ("--vae_cache_ondemand", {"caches": "ondemand"}),
        ("--context_parallel_degree 2", {"context_parallel": 2}),
        ("--gradient_checkpointing --gradient_accumulation_steps 3", {"checkpointing": True, "accumulation": 3}),
        ("--model_type full --optimizer lion", {"model_type": "full", "lora_rank": 128, "optimizer": "lion"}),
        ("--base_model_precision int8-quanto", {"base_precision": "int8-torchao"}),
        ("--text_encoder_1_precision int8-torchao", {"text_precision": "int8-torchao"}),
        ("--max_sequence_length 24", {"text_length": 24}),
        ("--distillation_method lcm", {"fake_score": False}),
    ],
)
def test_flags_reach_the_plan(flags, expected, parse):
    plain, run = (vars(setup_of(parse(each))) for each in ("", flags))
    changed = {name: value for name, value in run.items() if value != plain[name] and name != "model"}
    assert changed | expected == expected
    assert {name: run[name] for name in expected} == expected


def test_clips_that_consistency_trains_on_are_encoded(parse, tmp_path):
    """By a VAE beside the text encoder; DMD reads their captions."""
    clips = f"--train_data_dir {folder_of_clips(tmp_path / 'clips')}"
    assert setup_of(parse(clips)).encoded is None
    run = setup_of(parse(f"{clips} --distillation_method lcm --vae_encode_batch_size 2 --vae_cache_ondemand"))
    assert run.encoded == (2, 9, 64, 64)
    assert account(run)["encoding clips"]["its encoding"] > 2 * 3 * 9 * 64 * 64 * 4
    filled = account(replace(run, caches="fill"))["filling the caches"]
    assert min(filled[name] for name in ("VAE", "its encoding", "text encoder")) > 0


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["lora", "full"])
def test_consistency_has_a_network_less(model_type):
    """And the teacher's forward, with two prompts, is over when the student keeps what backward() needs."""
    dmd, lcm = (account(tiny(model_type=model_type, accumulation=2, fake_score=fake)) for fake in (True, False))
    assert [name for name in dmd["training"] if name.startswith("fake")] == [
        "fake score, likewise",
        "fake score's adamw state",
    ]
    assert not any(name.startswith("fake") for name in lcm["training"])
    saved = {name: size - lcm["training"].get(name, 0) for name, size in dmd["training"].items()}
    count = dmd["training"]["fake score, likewise"]
    assert saved["gradients, beyond what has gone when they come"] == count
    assert saved["backward() of one block, or a forward without it"] >= 0
    assert sum(saved.values()) >= count * 4


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        "--lora_rank 4", "--lora_rank 4 --base_model_precision int8-torchao", "--model_type full",
        "--lora_rank 4 --distillation_method lcm", "--model_type full --distillation_method lcm",
    ],
)  # fmt: skip
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_the_plan_s_weights_and_moments_are_those_of_a_run(flags, precision, parse, watch):
    """Each network's parameters and each optimizer's moments after a step of the script itself."""
    parsed = parse(f"{flags} --mixed_precision {precision}")
    loads, makes = watch(script, "load_networks"), watch(script, "make_optimizer")
    script.main(*parsed)
    networks = loads[0][1].by_role
    named = {id(p): (name, p) for network in networks.values() for name, p in network.named_parameters()}.values()
    roles = script.METHODS["lcm" if "lcm" in flags else "dmd"]
    trained = {name: [p for p in networks[name].parameters() if p.requires_grad] for name in roles}
    if parsed[0].model_type == "lora":  # two adapters on one network
        trained = {name: [p for key, p in named if name in key.split(".")] for name in trained}
    frozen = sum(stored_bytes(p) for _, p in named if not p.requires_grad)
    parts = account(setup_of(parsed, {"no": torch.float32, "bf16": torch.bfloat16}[precision]))["training"]
    assert [size for name, size in parts.items() if name.startswith("teacher")] == [frozen]
    for (name, params), (arguments, optimizer) in zip(trained.items(), makes, strict=True):
        assert list(map(id, arguments[1])) == list(map(id, params))
        (planned,) = [size for row, size in parts.items() if row.startswith(name.replace("_", " ") + ",")]
        assert planned == sum(map(stored_bytes, params)) > 0
        assert len(optimizer.state) == len(params)
        moments = [value for state in optimizer.state.values() for key, value in state.items() if key != "step"]
        (planned,) = [size for row, size in parts.items() if row.startswith(name.replace("_", " ") + "'s adamw state")]
        assert planned == sum(moment.nbytes for moment in moments)


@pytest.mark.slow
def test_a_plan_under_fsdp_splits_what_it_splits(parse, monkeypatch):
    """Advice is of flags that go with it."""
    parsed = parse("--model_type full --use_ema --plan 0.001")
    args, run, four = parsed[0], setup_of(parsed), Namespace(num_processes=4, device=torch.device("cpu"))
    whole = plan_of(args, run, 9, four)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    split = plan_of(args, run, 9, four)
    assert "two blocks that FSDP has gathered" in split and "two blocks" not in whole
    assert "--ema_device cpu" in whole
    assert "--ema_device cpu" not in split
    parts, shares = (account(each)["training"] for each in (run, replace(run, shards=4)))
    for name in ("fake score, likewise", "student's adamw state", "EMA of the student"):
        assert shares[name] == parts[name] // 4 > 0


@pytest.mark.slow
def test_a_user_asks_for_a_plan(parse, without_weights, tmp_path, capsys, one_process):
    """And gets it where there are no weights to load. Nothing is left behind."""
    flags = "--num_frames 33 --validation_num_video_frames 33 --train_batch_size 4 --lora_rank 4"
    script.main(*parse(f"{flags} --plan 1.01", without_weights))
    told = capsys.readouterr().out
    assert "4 x 33 frames of 8x8 latents: 4 x 144 tokens" in told and "training" in told
    assert "does not fit into 1 GB" in told and "--train_batch_size 1 " in told  # validation generates as many
    assert "student's adamw state" in told and not (tmp_path / "out").exists()
    one_process()
    script.main(*parse(f"{flags} --plan", without_weights))
    assert "fit into" not in capsys.readouterr().out  # there is no GPU here
