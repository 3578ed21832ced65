"""The memory plan: counted on the real configs, measured against what PyTorch's own profiler sees, and its advice."""

import json
from argparse import Namespace
from dataclasses import replace

import pytest
import torch
from diffusers import WanTransformer3DModel
from peft import LoraConfig
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile

from common.buckets import Rules
from common.meter import Meter, give_shapes
from common.optim import Lion
from common.plan import (
    GB,
    RESERVE,
    Setup,
    account,
    activations,
    build,
    counted,
    frozen_bytes,
    most,
    remedies,
    report,
    setup_of,
    state_bytes,
    trained_parameters,
)
from tests.helpers import tiny_wan_pipeline

WAN = {
    "patch_size": [1, 2, 2], "num_attention_heads": 12, "attention_head_dim": 128, "in_channels": 16,
    "out_channels": 16, "text_dim": 4096, "freq_dim": 256, "ffn_dim": 8960, "num_layers": 30,
}  # fmt: skip
TINY = WAN | {"num_attention_heads": 2, "attention_head_dim": 24, "text_dim": 16, "ffn_dim": 96, "num_layers": 3}
UMT5 = {"vocab_size": 256384, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64, "feed_forward_proj": "gated-gelu"}  # fmt: skip  # noqa: E501
SMALL_UMT5 = {"vocab_size": 100, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
VAE = {"base_dim": 4, "z_dim": 16, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1}


def setup(transformer=WAN, **changes) -> Setup:
    """81 frames of 832x480."""
    sizes = {"batch": 1, "frames": 21, "height": 60, "width": 104, "validation": (1, 8, 8)}
    configs = {"transformer": json.dumps(transformer), "vae": json.dumps(VAE), "text_encoder": json.dumps(SMALL_UMT5)}
    return Setup(**configs | sizes | changes)


def tiny(transformer=TINY, **changes) -> Setup:
    return setup(transformer, **{"frames": 3, "height": 8, "width": 8, "lora_rank": 4, "text_length": 8} | changes)


# ---------------------------------------------------------------------------------------------------------------------
# Counted
# ---------------------------------------------------------------------------------------------------------------------


def test_sizes_of_the_real_model():
    """1.42 billion weights, 2.8 GB in bf16; an adapter of rank 128 with all its state 2.8 GB."""
    network = counted(json.dumps(WAN), 128, setup().lora_targets)
    base = sum(p.numel() for name, p in network.named_parameters() if "lora_" not in name)
    assert base == 1_418_996_800
    assert frozen_bytes(network, torch.bfloat16, "no_change") == pytest.approx(2.84 * GB, rel=0.01)
    assert frozen_bytes(network, torch.bfloat16, "int8-torchao") == pytest.approx(1.43 * GB, rel=0.02)
    trained = trained_parameters(setup())
    by_hand = 30 * 128 * (8 * 2 * 1536 + 2 * (1536 + 8960))  # 8 projections of attention, 2 of the feed-forward
    assert sum(p.numel() for p in trained) == by_hand
    assert 8 * by_hand + state_bytes(trained, "adamw") == pytest.approx(2.8 * GB, rel=0.01)


def test_the_text_encoder_is_eleven_gigabytes():
    phase = account(tiny(text_encoder=json.dumps(UMT5)))["filling the caches"]
    assert phase["text encoder"] == pytest.approx(11.36 * GB, rel=0.01)
    quantised = account(tiny(text_encoder=json.dumps(UMT5), text_precision="int8-torchao"))
    assert quantised["filling the caches"]["text encoder"] == pytest.approx((11.36 + 2.1) / 2 * GB, rel=0.01)


@pytest.mark.parametrize("precision", ["no_change", "int8-torchao"])
def test_frozen_bytes_are_those_of_a_loaded_network(tmp_path, precision):
    """What diffusers loads in bf16, with some of it kept in fp32, and what torchao makes of that."""
    from common.quantize import quantize

    WanTransformer3DModel.from_config(TINY).save_pretrained(tmp_path)
    network = WanTransformer3DModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    quantize(network, precision, "cpu")
    total = 0
    for p in network.parameters():
        inner = [getattr(p, name) for name in p.__tensor_flatten__()[0]] if hasattr(p, "__tensor_flatten__") else [p]
        total += sum(tensor.nbytes for tensor in inner if isinstance(tensor, torch.Tensor))
    assert frozen_bytes(counted(json.dumps(TINY)), torch.bfloat16, precision) == total


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


def test_what_checkpoints_hold_of_the_real_model():
    """32,760 tokens of 1536 channels in bf16, at the door of each of 30 blocks: 3.0 GB."""
    kept, own = activations(setup(checkpointing=True), (1, 21, 60, 104))
    doors = 30 * 32_760 * 1536 * 2
    assert doors == pytest.approx(3.0 * GB, rel=0.01)
    behind = 32_760 * (1536 * 4 + 2 * 128 * 4)  # what the last norm reads, in fp32, and the rotary angles
    assert kept == pytest.approx(doors + behind, rel=0.01)
    assert setup().tokens() == 32_760


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


@pytest.mark.parametrize("checkpointing", [False, True])
def test_each_further_block_keeps_the_same(checkpointing):
    """Two and three blocks say what five keep."""
    run = tiny(TINY | {"num_layers": 5}, checkpointing=checkpointing)
    network = build(run.transformer, run.rank, run.lora_targets)
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


def test_a_lora_of_the_real_model_fits_into_twenty_gigabytes():
    run = setup(checkpointing=True, fills_caches=False)
    assert 14 * GB < sum(account(run)["training"].values()) < 20 * GB
    assert "fits into 24 GB" in report(run, 24 * GB)


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


def test_a_full_student_has_three_networks():
    parts = account(tiny(model_type="full"))["training"]
    count = sum(p.numel() for p in counted(json.dumps(TINY)).parameters())
    assert parts["fake score, likewise"] == 4 * count and parts["student's adamw state"] == 8 * count
    kept_for_two_passes = account(tiny(model_type="full", accumulation=2))["training"]
    name = "gradients, beyond what has gone when they come"
    assert kept_for_two_passes[name] == 8 * count and parts[name] < 4 * count


def test_a_causal_student_keeps_keys_and_values():
    """Blocks of 1, 1 and 2 frames of 16 tokens: copies of 1 and 2 frames, of 48 channels in 3 layers, bf16."""
    parts = account(tiny(frames=4, blocks=(1, 1, 2)))["training"]
    assert parts["keys and values of earlier blocks"] == 3 * 2 * (1 + 2) * 16 * 48 * 2
    assert "keys and values of earlier blocks" not in account(tiny())["training"]


def test_prompts_alone_and_full_caches_need_no_encoders():
    assert "filling the caches" not in account(tiny(fills_caches=False))
    filling = account(tiny(encodes_clips=False))["filling the caches"]
    assert "text encoder" in filling and not any("VAE" in name for name in filling)
    assert "VAE and its encoding" in account(tiny())["filling the caches"]


def test_advice_fits_and_says_what_it_saves():
    run = tiny(batch=4, ema="gpu", frames=5, height=32, width=32, fills_caches=False)
    room = most(run) + RESERVE
    assert remedies(run, room) == [] and "fits into" in report(run, room)
    room = 0.7 * most(run) + RESERVE
    steps = remedies(run, room)
    assert steps[0][0] == "--gradient_checkpointing" and steps[-1][1] + RESERVE <= room
    sizes = [most(run), *(size for _, size in steps)]
    assert sizes == sorted(sizes, reverse=True)
    text = report(run, room)
    assert "does not fit" in text and "--gradient_checkpointing" in text and "and still not" not in text
    assert "and still not" in report(run, 1.0)
    run = replace(run, fills_caches=True)  # 8 bits of a text encoder that is small here save nothing
    sizes = [most(run), *(size for _, size in remedies(run, 1.0))]
    assert all(later < earlier for earlier, later in zip(sizes, sizes[1:], strict=False))


def test_a_plan_of_a_teacher_in_a_folder(tmp_path, monkeypatch):
    """From the configs alone: there are no weights to load."""
    folder = tiny_wan_pipeline(tmp_path)
    for path in folder.rglob("*.safetensors"):
        path.unlink()
    rules = Rules(64, "pixel_area", 16)
    datasets = [Namespace(num_frames=9, rules=rules, sizes=()), Namespace(num_frames=17, rules=rules, sizes=())]
    args = Namespace(
        pretrained_teacher_model=str(folder), teacher_revision=None, cache_dir=None, datasets=datasets,
        pretrained_t5_model_name_or_path=None, validation_resolution=[(32, 128)], validation_num_video_frames=5,
        train_batch_size=2, model_type="lora", lora_rank=4, lora_target_modules="to_q,to_k", caches="fill",
        base_model_precision="no_change", text_encoder_1_precision="no_change", optimizer="adamw", use_ema=True,
        ema_device="cpu", gradient_checkpointing=True, gradient_accumulation_steps=1, context_parallel_degree=1,
    )  # fmt: skip
    run = setup_of(args, torch.float32, 512, [5])
    assert (run.batch, run.frames, run.height, run.width) == (2, 5, 4, 16)  # 17 frames; 64 x 64 in the shape of 4 to 1
    assert run.validation == (2, 4, 16) and run.blocks == () and run.ema == "cpu" and run.encodes_clips
    text = report(run)
    assert "2 x 17 frames of 16x4 latents: 2 x 80 tokens" in text and "EMA of the student" in text
    for row in ("teacher, base of all three, float32", "student, LoRA of rank 4", "filling the caches", "validation"):
        assert row in text
    assert setup_of(args, torch.float32, 512, [1, 2, 2]).blocks == (1, 2, 2)
    args.datasets = [Namespace(num_frames=9, rules=rules, sizes=((64, 64),))]
    assert not setup_of(args, torch.float32, 512, [3]).encodes_clips
