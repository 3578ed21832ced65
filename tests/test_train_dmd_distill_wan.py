"""The Wan script: a whole run in float64, whose gradient goes where, every setting's effect, resume and export."""

import contextlib
import itertools
import json
import re
import warnings
from argparse import Namespace
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    FlowMatchLCMScheduler,
    WanPipeline,
    WanTransformer3DModel,
    WanVideoToVideoPipeline,
)
from safetensors import safe_open
from safetensors.torch import load, load_file
from torch.distributed.fsdp import FSDPModule

import train_dmd_distill_wan as script
from common import pictures
from common.cache import text_key
from common.data.clips import ClipReader, open_clip_readers, save_clip
from common.data.sources import read_part
from common.draws import Draws, sample_generator, tied_noise
from common.networks import active_adapter, adapter_layers, precision_name
from common.solvers import flow_grid, roll_out
from common.tracking import Means
from common.wan.causal import BlockCausalAttention, block_ends, first_tokens
from tests.helpers import ROOT, folder_of_clips, short_wan_run, without
from tests.waits import steps_without_waits

LORA, FULL, CAUSAL = "--lora_rank 4", "--model_type full", "--lora_rank 4 --num_frame_per_block 1"
LCM = "--distillation_method lcm"


@pytest.fixture
def parse(wan_teacher, tmp_path):
    """`parse(flags)`: what the script's parser returns for a short run in this test's folder."""

    def parsed(flags: str, output: str = "out"):
        usual = [*short_wan_run(wan_teacher, tmp_path, output), "--validation_prompt", "a red ball"]
        if LCM in flags:
            usual = without(usual, "--fake_score_lr")
        return script.parse_args([*usual, *flags.split()])

    return parsed


@pytest.fixture
def run(parse, monkeypatch, one_process):
    """`run(flags)`: the last checkpoint's weights by name, {student, fake_score, ema}. No clip is decoded."""
    monkeypatch.setattr(script, "decode", lambda vae, latents: [np.zeros((5, 16, 16, 3), np.float32)] * len(latents))
    runs = iter(range(100))

    def ran(flags: str, output: str | None = None):
        parsed = parse(flags, output or f"out{next(runs)}")
        one_process()
        script.main(*parsed)
        args = parsed[0]
        (folder,) = sorted(Path(args.output_dir).glob(f"checkpoint-{args.max_train_steps}"))
        return {path.stem: load_file(path) for path in folder.glob("*.safetensors")}

    return ran


def equal(a: dict, b: dict) -> bool:
    assert a.keys() == b.keys()
    return all(torch.equal(a[key], b[key]) for key in a)


# ---------------------------------------------------------------------------------------------------------------------
# The algorithm, restated
# ---------------------------------------------------------------------------------------------------------------------


def dmd_in_float64(folder, args, embeds, negative):
    """Bidirectional DMD of full networks, on clean samples as DMD2 has it: losses, student and fake score."""
    teacher, student, fake = (
        WanTransformer3DModel.from_pretrained(folder, subfolder="transformer").double() for _ in range(3)
    )
    rates = {student: (args.learning_rate, args.adam_epsilon), fake: (args.fake_score_lr, args.fake_score_eps)}
    optimizers = {
        network: torch.optim.AdamW(network.parameters(), lr, eps=eps, weight_decay=0.01)
        for network, (lr, eps) in rates.items()
    }
    losses, sigmas = [], [1.0, 0.757, 0.522]

    def x0_of(network, x, sigma, text):
        # The networks' sinusoids are of fp32
        return x - sigma * network(x, torch.tensor([1000 * sigma], dtype=torch.float32), text).sample

    def update(network):
        norm = torch.stack([p.grad.square().sum() for p in network.parameters()]).sum().sqrt()
        for p in network.parameters():
            p.grad *= min(1.0, 1.0 / (norm.item() + 1e-6))
        optimizers[network].step()
        optimizers[network].zero_grad()

    for step in range(args.max_train_steps):
        rng = sample_generator(args.seed, step)
        torch.rand((), generator=rng)  # of caption dropout
        (exit_step,) = script.draw_exits(args.seed, step, 3, 1, False, False)
        shape, x0 = (1, 4, 3, 4, 4), torch.zeros(1, dtype=torch.float64)
        for k in range(exit_step + 1):
            x = (1 - sigmas[k]) * x0 + sigmas[k] * torch.randn(shape[1:], generator=rng)[None].double()
            x0 = x0_of(student, x, sigmas[k], embeds)
            x0 = x0 if k == exit_step else x0.detach()
        low = [0.757, 0.522, 0.0][exit_step]
        for turn in ("student", "fake_score"):
            u = torch.rand((), generator=rng).item()
            sigma = min(max(low + (1 - low) * u, 0.02), 0.98)
            eps = torch.randn(shape[1:], generator=rng)[None].double()
            x_t = ((1 - sigma) * x0 + sigma * eps).detach()
            if turn == "student":
                with torch.no_grad():
                    cond, uncond = (x0_of(teacher, x_t, sigma, text) for text in (embeds, negative))
                    real, wrong = uncond + 3.0 * (cond - uncond), x0_of(fake, x_t, sigma, embeds)
                    g = (wrong - real) / (x0 - real).abs().mean()
                losses.append(0.5 * g.square().mean().item())
                (x0 * g / g.numel()).sum().backward()
            else:
                x0 = x0.detach()
                # |v - v_star| = |x0_fake - x_g| / sigma
                loss = ((x0_of(fake, x_t, sigma, embeds) - x0) / sigma).square().mean()
                losses.append(loss.item())
                loss.backward()
        update(student)
        update(fake)
    return losses, student.state_dict(), fake.state_dict()


def test_training_steps_equal_the_algorithm_restated_in_float64(run, parse, wan_teacher, watch):
    flags = f"{FULL} --max_train_steps 3 --adam_epsilon 1e-3 --fake_score_eps 1e-3 --validation_negative_prompt bad"
    args, *_ = parse(flags)
    pipe = WanPipeline.from_pretrained(wan_teacher)
    with torch.no_grad():
        embeds, negative = pipe.encode_prompt("a red ball", "bad", max_sequence_length=512)
    losses, student, fake = dmd_in_float64(wan_teacher, args, embeds.double(), negative.double())
    ours = {name: watch(script, name) for name in ("dmd_loss", "fake_score_loss")}
    weights = run(flags)
    found = [loss.item() for pair in zip(ours["dmd_loss"], ours["fake_score_loss"], strict=True) for _, loss in pair]
    torch.testing.assert_close(found, losses, rtol=2e-4, atol=0)
    start = load_file(wan_teacher / "transformer" / "diffusion_pytorch_model.safetensors")
    for name, expected in (("student", student), ("fake_score", fake)):
        assert max((expected[key] - start[key]).abs().max() for key in start) > 3e-3
        assert max((weights[name][key] - expected[key]).abs().max() for key in start) < 3e-6


# ---------------------------------------------------------------------------------------------------------------------
# Latent consistency
# ---------------------------------------------------------------------------------------------------------------------


def lcm_in_float64(folder, args, embeds, negative):
    """Latent consistency of a full network with prompts alone, on clean samples: losses, and the student."""
    teacher, student = (
        WanTransformer3DModel.from_pretrained(folder, subfolder="transformer").double() for _ in range(2)
    )
    optimizer = torch.optim.AdamW(student.parameters(), args.learning_rate, eps=args.adam_epsilon, weight_decay=0.01)
    even = (3 * u / (1 + 2 * u) for u in (i / args.num_ddim_timesteps for i in range(args.num_ddim_timesteps + 1)))
    steps, grid = [1.0, 0.757, 0.522], sorted({*even, 0.757, 0.522})  # under the teacher's shift, 3
    shape, losses = (4, 3, 4, 4), []

    def x0_of(network, x, sigma, text):
        return x - sigma * network(x, torch.tensor([1000 * sigma], dtype=torch.float32), text).sample

    for step in range(args.max_train_steps):
        rng = sample_generator(args.seed, step)
        torch.rand((), generator=rng)  # of caption dropout
        (exit_step,) = script.draw_exits(args.seed, step, 3, 1, False, False)
        with torch.no_grad():
            x0 = torch.zeros(1, dtype=torch.float64)
            for sigma in steps[: exit_step + 1]:
                x = (1 - sigma) * x0 + sigma * torch.randn(shape, generator=rng)[None].double()
                x0 = x0_of(student, x, sigma, embeds)
            place = 1 + torch.randint(len(grid) - 1, (), generator=rng)  # counted from noise there, from data here
            sigma, lower = (grid[-place], grid[-place - 1])
            x_t = (1 - sigma) * x0 + sigma * torch.randn(shape, generator=rng)[None].double()
            cond, uncond = (x0_of(teacher, x_t, sigma, text) for text in (embeds, negative))
            x0_teacher = uncond + args.real_score_guidance_scale * (cond - uncond)
            eps_teacher = x0_teacher + (x_t - x0_teacher) / sigma
            x_lower = (1 - lower) * x0_teacher + lower * eps_teacher
            target = x0_of(student, x_lower, lower, embeds)
        loss = ((x0_of(student, x_t, sigma, embeds) - target) / sigma).square().mean()
        losses.append(loss.item())
        loss.backward()
        norm = torch.stack([p.grad.square().sum() for p in student.parameters()]).sum().sqrt()
        for p in student.parameters():
            p.grad *= min(1.0, 1.0 / (norm.item() + 1e-6))
        optimizer.step()
        optimizer.zero_grad()
    return losses, student.state_dict()


def test_steps_of_latent_consistency_equal_the_algorithm_restated_in_float64(run, parse, wan_teacher, watch):
    flags = f"{FULL} {LCM} --num_ddim_timesteps 5 --real_score_guidance_scale 2.5 --max_train_steps 4"
    flags += " --adam_epsilon 1e-3 --validation_negative_prompt bad"
    args, *_ = parse(flags)
    pipe = WanPipeline.from_pretrained(wan_teacher)
    with torch.no_grad():
        embeds, negative = pipe.encode_prompt("a red ball", "bad", max_sequence_length=512)
    losses, student = lcm_in_float64(wan_teacher, args, embeds.double(), negative.double())
    ours = watch(script, "consistency_loss")
    weights = run(flags)
    torch.testing.assert_close([loss.item() for _, loss in ours], losses, rtol=2e-4, atol=0)
    start = load_file(wan_teacher / "transformer" / "diffusion_pytorch_model.safetensors")
    assert weights.keys() == {"student"}  # there is no fake score
    assert max((student[key] - start[key]).abs().max() for key in start) > 3e-3
    assert max((weights["student"][key] - student[key]).abs().max() for key in start) < 3e-6


def test_one_prompt_after_the_other_gives_the_same_gradients(run, monkeypatch, watch):
    """Rounding alone differs; a large epsilon keeps Adam from making much of it."""
    flags = f"{FULL} --max_train_steps 2 --adam_epsilon 1e-3 --fake_score_eps 1e-3 --fake_score_guidance_scale 2"
    calls = watch(script, "predict")
    together = run(flags)
    assert {len(x) for (_, x, *_), _ in calls} == {1, 2}
    calls.clear()
    monkeypatch.setattr(script, "MANY_TOKENS", 1)
    apart = run(flags)
    assert {len(x) for (_, x, *_), _ in calls} == {1}
    for name in ("student", "fake_score"):
        assert together[name].keys() == apart[name].keys()
        for key, weight in together[name].items():
            torch.testing.assert_close(apart[name][key], weight, rtol=0, atol=1e-6)


def test_one_prompt_after_the_other_is_decided_by_flags_alike_in_all_processes(parse, wan_teacher, monkeypatch):
    args, transformer = parse("")[0], WanTransformer3DModel.from_pretrained(wan_teacher, subfolder="transformer")
    tokens = 3 * 4  # three latent frames of 2x2
    for change, many in (
        ({}, tokens),
        ({"train_batch_size": 5}, 5 * tokens),
        ({"context_parallel_degree": 2}, tokens / 2),
    ):
        for most in (many, many + 1):
            monkeypatch.setattr(script, "MANY_TOKENS", most)
            assert script.has_many_tokens(Namespace(**vars(args) | change), transformer) == (most == many)


def test_consistency_leads_to_where_the_flow_of_a_gaussian_ends():
    """Data of N(m, s^2) have a flow in closed form, which leads pure noise to m + s * eps. Euler's steps on the grid,
    by diffusers' sampler, end near that. The student is a line for each timestep of the grid."""
    mean, deviation, grid = 0.7, 0.5, torch.tensor(flow_grid([1000.0, 522.0], 20, 3.0))
    lines = torch.zeros(len(grid), 2, requires_grad=True)

    def student(role, x, t, cond):
        slope, offset = lines[(grid[None] == t[:, None]).int().argmax(1)].T[..., None, None, None, None]
        return slope * x + offset

    def teacher(role, x, t, cond, uncond, scale):
        sigma = t.reshape(-1, 1, 1, 1, 1) / 1000
        standard = (x - (1 - sigma) * mean) / ((1 - sigma) ** 2 * deviation**2 + sigma**2)
        return sigma * standard - (mean + (1 - sigma) * deviation**2 * standard)  # E[eps | x] - E[x0 | x]

    networks = SimpleNamespace(velocity=student, guided=teacher, acting=lambda role: contextlib.nullcontext())
    args = Namespace(real_score_guidance_scale=1.0, loss_type="l2", huber_c=0.0, gradient_accumulation_steps=1)
    means, device = Means(["lcm_loss"], "cpu"), torch.device("cpu")
    optimizer = torch.optim.Adam([lines], 0.05, betas=(0.9, 0.99))
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 600)
    rng = torch.Generator().manual_seed(0)
    for step in range(600):
        latents = mean + deviation * torch.randn(32, 1, 1, 4, 4, generator=rng)
        draws = Draws(0, range(32 * step, 32 * step + 32), device)
        script.lcm_backward(args, None, networks, means, draws, {}, {}, (1, 1, 4, 4), [], grid, latents)
        optimizer.step()
        optimizer.zero_grad()
        decay.step()

    ends = torch.tensor([0.0, 1.0]).reshape(2, 1, 1, 1, 1)  # of eps
    euler = FlowMatchEulerDiscreteScheduler()
    euler.set_timesteps(sigmas=(grid[:-1] / 1000).tolist())
    for t in euler.timesteps:
        ends = euler.step(teacher("teacher", ends, t.expand(2), {}, {}, 1.0), t, ends).prev_sample
    slope, offset = lines[0].tolist()
    found, ends = [-offset, 1 - slope - offset], ends.flatten().tolist()
    print(f"eps 0 and 1 end at {found}, by Euler at {ends}, by the flow at {[mean, mean + deviation]}")
    assert found == pytest.approx(ends, abs=0.01)
    assert found == pytest.approx([mean, mean + deviation], abs=0.1)


def test_consistency_begins_from_the_latents_of_clips_where_there_are_clips(wan_teacher, tmp_path, watch):
    """Which are cut, as a rollout is, to --num_training_frames."""
    clips = folder_of_clips(tmp_path / "clips")
    usual = without(without(short_wan_run(wan_teacher, tmp_path), "--train_prompts"), "--fake_score_lr")
    flags = [*usual, "--train_data_dir", str(clips), "--disable_bucket_pruning", *LCM.split()]
    began, encoded = watch(script, "lcm_backward"), watch(script, "encode_pixels")
    script.main(*script.parse_args([*flags, "--num_training_frames", "2", "--lora_rank", "4"]))
    *_, shape, exits, grid, latents = began[0][0]
    assert latents.shape[2] == shape[1] == 2 and len(grid) == 50 + 1 + 2
    assert any(torch.equal(latents, found["latents"]) for _, found in encoded)  # no more of a clip is encoded


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        "--num_ddim_timesteps 2", "--loss_type huber", "--loss_type huber --huber_c 10", "--negative_prompt bad",
        "--real_score_guidance_scale 5", "--causal_init_steps 1", "--flow_schedule_shift 9",
    ],
)  # fmt: skip
def test_every_setting_of_consistency_has_its_effect(flags, run):
    base = f"{LORA} {LCM} --adam_epsilon 1e-3 --max_train_steps 2"
    base += " --loss_type huber" if "huber_c" in flags else ""
    if base not in BASES:
        BASES[base] = run(base)
    assert not equal(BASES[base]["student"], run(f"{base} {flags}")["student"])


# ---------------------------------------------------------------------------------------------------------------------
# Whose gradient goes where
# ---------------------------------------------------------------------------------------------------------------------


def gradients_seen(monkeypatch) -> dict[str, list[torch.Tensor]]:
    """By name of the network, what its optimizer is about to use."""
    seen, original = [], script.average_gradients

    def look(params, *processes):
        seen.append([None if p.grad is None else p.grad.clone() for p in params])
        original(params, *processes)

    monkeypatch.setattr(script, "average_gradients", look)
    return seen


@pytest.mark.parametrize(
    "flags",
    [
        LORA,
        FULL,
        pytest.param(CAUSAL, marks=pytest.mark.slow),
        pytest.param(f"{LORA} --gradient_checkpointing --lora_dropout 0.1", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("silent", ["dmd_loss", "fake_score_loss"])
def test_neither_loss_reaches_the_other_network(flags, silent, run, monkeypatch):
    seen = gradients_seen(monkeypatch)
    original = getattr(script, silent)
    monkeypatch.setattr(script, silent, lambda *args: 0.0 * original(*args))
    run(flags)
    student, fake = seen
    gone, there = (student, fake) if silent == "dmd_loss" else (fake, student)
    assert all(g is not None for g in student + fake)  # no adapter was left out
    assert not any(g.any() for g in gone) and any(g.any() for g in there)


@pytest.mark.slow
@pytest.mark.parametrize("flags", [LORA, CAUSAL, f"{LORA} --mixed_precision bf16"])
def test_the_teacher_is_the_base_bit_for_bit_at_any_time(flags, run, parse, monkeypatch):
    args, *_ = parse(flags)
    dtype = torch.bfloat16 if args.mixed_precision == "bf16" else torch.float32
    stock = script.load_transformer(args, dtype)
    calls, original = {"teacher": 0, "adapted": 0, "other": 0}, script.predict

    def compare(transformer, x, t, cond):
        out = original(transformer, x, t, cond)
        layer = transformer.blocks[0].attn1.to_q
        if layer.disable_adapters:
            calls["teacher"] += 1
            assert torch.equal(out, original(stock, x, t, cond))
        elif x.shape[2] == 3:
            calls["other"] += not torch.equal(out, original(stock, x, t, cond))
            calls["adapted"] += 1
        return out

    monkeypatch.setattr(script, "predict", compare)
    run(f"{flags} --max_train_steps 4")
    assert calls["teacher"] == 4 and calls["adapted"] >= 8 and calls["other"] >= 5  # adapters start at zero


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize(
    "flags",
    [
        LORA,
        f"{LORA} {LCM}",
        f"{LORA} --base_model_precision int8-torchao",
        FULL,
        CAUSAL,
        f"{CAUSAL} --causal_init_steps 2",
    ],
)
def test_checkpointing_changes_no_gradient(flags, precision, run, monkeypatch):
    """With two adapters on one base, each computed again under its own, with its dropout."""
    flags += f" --max_train_steps 2 --seed 3 --mixed_precision {precision} --use_ema"
    flags += "" if "full" in flags else " --lora_dropout 0.5"
    seen = gradients_seen(monkeypatch)
    run(flags)
    plain = list(seen)
    seen.clear()
    run(f"{flags} --gradient_checkpointing")
    for before, after in zip(plain, seen, strict=True):
        assert all(torch.equal(*pair) for pair in zip(before, after, strict=True)) and any(g.any() for g in after)


def test_adapters_switch_without_touching_requires_grad(parse):
    args, *_ = parse(LORA)
    network = script.add_adapters(args, script.load_transformer(args, torch.float32), script.METHODS["dmd"])
    before = {name: p.requires_grad for name, p in network.named_parameters()}
    assert sum(before.values()) == 2 * 2 * 2 * (4 + 4 + 2)  # adapters, A and B, layers, modules
    for name in ("student", "teacher", "fake_score"):
        with active_adapter(adapter_layers(network), name):
            assert {name: p.requires_grad for name, p in network.named_parameters()} == before
    assert {name: p.requires_grad for name, p in network.named_parameters()} == before


def test_an_adapter_is_active_again_where_another_one_s_turn_ends(parse):
    args, *_ = parse(LORA)
    network = script.add_adapters(args, script.load_transformer(args, torch.float32), script.METHODS["dmd"])
    layers = adapter_layers(network)
    assert len(layers) == 20
    with active_adapter(layers, "student"):
        with pytest.raises(RuntimeError), torch.no_grad(), active_adapter(layers, "teacher"):
            assert all(layer.disable_adapters for layer in layers)
            raise RuntimeError
        assert all(layer.active_adapters == ["student"] and not layer.disable_adapters for layer in layers)
        assert all(layer.lora_dropout["student"].training for layer in layers)
    assert not any(layer.lora_dropout["student"].training for layer in layers)


def test_bf16_leaves_every_trained_weight_a_gradient_and_timesteps_their_digits(run, monkeypatch):
    """autocast would hand the weights that a rollout has cast without a gradient to the step that needs one."""
    seen, told, original = gradients_seen(monkeypatch), [], script.predict
    monkeypatch.setattr(script, "predict", lambda n, x, t, c: told.append(t) or original(n, x, t, c))
    run(f"{FULL} --mixed_precision bf16 --last_step_only")
    for gradients in seen:
        assert all(g is not None and g.dtype == torch.float32 for g in gradients)
        assert sum(bool(g.any()) for g in gradients) > 0.9 * len(gradients)
    assert [t.item() for t in told[:3]] == [1000.0, 757.0, 522.0]


def test_dropout_acts_where_there_is_a_gradient_alone(run, monkeypatch):
    modes, original = [], script.predict

    def look(transformer, x, t, cond):
        layer = transformer.blocks[0].attn1.to_q
        modes.append((torch.is_grad_enabled(), layer.lora_dropout["student"].training))
        return original(transformer, x, t, cond)

    monkeypatch.setattr(script, "predict", look)
    run(f"{LORA} --lora_dropout 0.5 --last_step_only")
    assert [grad for grad, _ in modes[:6]] == [False, False, True, False, False, True]
    assert all(grad == training for grad, training in modes)
    modes.clear()
    run(f"{LORA} {LCM} --lora_dropout 0.5")
    assert [grad for grad, _ in modes].count(True) == 1  # the target has none
    assert all(grad == training for grad, training in modes)


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        f"{CAUSAL} --last_step_only --gradient_checkpointing",
        f"{LORA} --last_step_only --lora_dropout 0.1 --mixed_precision bf16",
        f"{FULL} --last_step_only --num_frame_per_block 1 --context_noise 100",
        f"{FULL} {LCM} --gradient_checkpointing",
    ],
)
def test_compile_makes_graphs_where_a_shape_is_new_alone(flags, run, graphs, monkeypatch):
    """Ten steps on two shapes, with clips between: no later step waits for the compiler, and none is without it."""
    shapes, latent_shape = [], script.latent_shape
    monkeypatch.setattr(script, "latent_shape", lambda *given: shapes.append(latent_shape(*given)) or shapes[-1])
    graphs.mark_calls(monkeypatch, script, "average_gradients", lambda *_: shapes[-1])
    for name in ("by_student", "by_teacher"):
        graphs.mark_calls(monkeypatch, script.Clips, name, lambda *given, name=name: (name, given[-1]))
    run(f"{flags} --compile --max_train_steps 10 --validation_steps 4 --validation_resolution 32,48x32")
    print(f"{graphs.count} graphs: {graphs.marks}")
    assert len(graphs.check()) == 2 + 2  # sizes of steps, and of clips by the student: there is no benchmark


def test_an_error_of_the_critic_ends_the_run(run, monkeypatch):
    def broken(*args):
        raise RuntimeError("the critic is broken")

    monkeypatch.setattr(script, "fake_score_loss", broken)
    with pytest.raises(RuntimeError, match="the critic is broken"):
        run(LORA)


# ---------------------------------------------------------------------------------------------------------------------
# Every setting has its effect
# ---------------------------------------------------------------------------------------------------------------------

STUDENT, FAKE, BOTH = {"student"}, {"fake_score"}, {"student", "fake_score"}
BASES = {}  # weights by flags: many settings change the same run
BLOCKS = "--num_frame_per_block 1"


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags, base, changed",
    [
        ("--dmd_denoising_steps 1000,500", "--last_step_only", BOTH),
        ("--dmd_denoising_steps 4 --flow_schedule_shift 5", "--last_step_only", BOTH),
        ("--last_step_only", "--max_train_steps 3", BOTH),
        ("--real_score_guidance_scale 5", "", STUDENT),
        ("--fake_score_guidance_scale 1.2", "", STUDENT),
        ("--negative_prompt bad", "", STUDENT),
        ("--fake_score_lr 1e-3", "", FAKE),
        ("--fake_score_weight_decay 0.9", "", FAKE),
        ("--fake_score_eps 1e-2", "", FAKE),
        ("--fake_score_grad_clip 1e-6", "--fake_score_eps 1e-3", FAKE),
        ("--max_grad_norm 1e-6", "--adam_epsilon 1e-3", STUDENT),
        ("--grad_clip_method value --max_grad_norm 1e-6", "--adam_epsilon 1e-3", BOTH),
        ("--fake_score_betas 0.1 0.2", "--generator_update_interval 2 --max_train_steps 2", FAKE),
        ("--generator_update_interval 2", "--max_train_steps 2", BOTH),
        ("--min_timestep_ratio 0.9", "--max_train_steps 2", BOTH),
        ("--max_timestep_ratio 0.05", "--max_train_steps 2", BOTH),
        ("--timestep_shift 7", "", BOTH),
        ("--no-ts_schedule", "--dmd_denoising_steps 1000,999 --max_train_steps 3", BOTH),
        ("--ts_schedule_max", "--max_train_steps 2 --last_step_only", BOTH),
        ("--min_score_timestep 900", "--no-ts_schedule", BOTH),
        (BLOCKS, "", BOTH),
        ("--independent_first_frame", "--num_frame_per_block 2 --num_frames 13 --num_training_frames 2", BOTH),
        ("--same_step_across_blocks", BLOCKS, BOTH),
        ("--num_training_frames 1", BLOCKS, BOTH),
        ("--num_training_frames 2", "", BOTH),
        ("--context_noise 500", BLOCKS, BOTH),
        ("--causal_init_steps 1", f"{BLOCKS} --max_train_steps 2", BOTH),
        ("--causal_init_steps 1", "--max_train_steps 2", BOTH),
        ("--causal_init_lr 1e-4", "--causal_init_steps 1 --max_train_steps 2", BOTH),
        ("--causal_init_guidance 1", "--causal_init_steps 1 --max_train_steps 2", BOTH),
        ("--proportion_empty_prompts 1", "", BOTH),
        ("--use_ema", "", set()),
    ],
)
def test_every_setting_has_its_effect(flags, base, changed, run):
    """Of one step, or two; who changes says whose setting it is."""
    if base not in BASES:
        BASES[base] = run(f"{LORA} {base}")
    if "--independent_first_frame" in flags:  # 4 latent frames are 2 + 2; the first one alone leaves 1 + 2
        flags += " --num_frames 9"
    before, after = BASES[base], run(f"{LORA} {base} {flags}")
    assert {name for name in BOTH if not equal(before[name], after[name])} == changed
    assert ("ema" in after) == ("--use_ema" in flags)


def test_every_key_of_the_document_is_among_them():
    keys = json.loads((ROOT / "tests/configs/dmd_wan.config.json").read_text())["distillation_config"]
    (mark,) = [m for m in test_every_setting_has_its_effect.pytestmark if m.name == "parametrize"]
    tested = " ".join(f"{flags} {base}" for flags, base, _ in mark.args[1])
    assert [key for key in keys if f"--{key}" not in tested.replace("--no-", "--")] == []


def test_the_document_s_config_and_dataset_mean_their_flags(tmp_path):
    library, hook, datasets = (tmp_path / f"{name}.json" for name in ("library", "hook", "datasets"))
    library.write_text('{"one": "a red ball"}')
    hook.write_text('{"webhook_url": "http://127.0.0.1:1/", "level": "error"}')
    clips = tmp_path / "clips"
    clips.mkdir()
    (clips / "a.mp4").write_bytes(b"not read yet")
    entry = json.loads((ROOT / "tests/configs/dmd_wan.dataset.json").read_text())
    datasets.write_text(json.dumps(entry | {"instance_data_dir": str(clips)}))
    flags = f"--config {ROOT}/tests/configs/dmd_wan.config.json --data_backend_config {datasets}"
    flags += f" --webhook_config {hook} --validation_prompt_library {library}"
    args, data, method, notes = script.parse_args(flags.split())
    assert args.pretrained_teacher_model == script.teacher_of(args) == "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
    assert method.steps == [1000.0, 757.0, 522.0] and args.fake_score_betas == [0.9, 0.999]
    assert args.lora_rank == 128 and args.use_ema and args.ema_update_interval == 5
    (dataset,) = data.datasets
    assert (entry["num_frames"], args.validation_num_video_frames) == (121, 121)
    assert (dataset.num_frames, method.validation_frames) == (81, 81) and script.blocks_of(args, 21) == [3] * 7
    for name in (f"{dataset.id}: num_frames", "--validation_num_video_frames"):
        assert any(note.startswith(f"{name} 121: 31 latent frames") and "81 frames" in note for note in notes)
    assert args.grad_clip_method == "value" and precision_name(args.base_model_precision) == "int8-torchao"
    assert args.negative_prompt == args.validation_negative_prompt and method.teacher_guidance == 3.0


def test_the_document_s_advanced_settings_mean_their_flags(parse):
    """28 latent frames are 109: one block, or a first frame and 9 blocks of 3."""
    config = f"--config {ROOT}/tests/configs/dmd_wan_advanced.config.json --num_frames 109"
    args, _, method, _ = parse(config)
    assert method.steps == [1000.0, 666.0, 333.0] and script.blocks_of(args, 28) == [28]
    assert (args.generator_update_interval, args.fake_score_guidance_scale, args.timestep_shift) == (4, 1.2, 7.0)
    args, *_ = parse(f"{config} --num_frame_per_block 3 --independent_first_frame")
    assert script.blocks_of(args, 28) == [1] + [3] * 9 and args.same_step_across_blocks


def test_defaults_that_follow_from_other_flags(parse):
    args, data, method, notes = parse("--validation_guidance 1", "usual")
    assert (args.model_type, args.lora_rank, args.lora_alpha, args.lora_dropout) == ("lora", 128, 128, 0.0)
    assert (args.causal_init_lr, args.causal_init_guidance, args.negative_prompt) == (1e-2, 3.0, "")
    assert (method.teacher_guidance, method.validation_frames) == (3.0, 9) and data.datasets[0].num_frames == 9
    assert args.validation_resolution == [(32, 32)] and args.report_steps == [] and notes == []
    args, _, method, notes = parse("--validation_guidance 5 --validation_num_inference_steps 4 --model_type full")
    assert method.teacher_guidance == 5.0 and args.lora_rank is None
    assert notes == [
        "--validation_num_inference_steps 4: the student has 3",
        "--validation_guidance 5: of the teacher; a student takes none",
    ]
    with pytest.raises(AttributeError, match="read-only"):
        args.seed = 1


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--dmd_denoising_steps 757,522", "the first must be 1000"),
        ("--dmd_denoising_steps 4", "needs --flow_schedule_shift"),
        ("--real_score_guidance_scale 0.5", "must be at least 1"),
        ("--min_timestep_ratio 0.5 --max_timestep_ratio 0.4", "need 0 <= min < max <= 1"),
        ("--context_noise 1000", r"must be in \[0, 1000\)"),
        (
            "--num_frames 121 --num_frame_per_block 4 --num_training_frames 3",
            "117 or 129 frames are|are no whole blocks",
        ),
        ("--validation_num_video_frames 4", "--validation_num_video_frames 4: must be 4k \\+ 1, as 1 or 5"),
        (
            "--num_frame_per_block 3 --num_frames 33 --num_training_frames 2",
            "must be the last whole blocks .* as 3 or 6",
        ),
        ("--causal_init_lr 1e-4", "there are none"),
        ("--causal_init_trajectories 1", "--causal_init_trajectories: belongs to --causal_init_steps"),
        ("--causal_init_steps 1 --cache_dir_trajectories x", "belongs to --causal_init_trajectories"),
        ("--causal_init_steps 1 --causal_init_trajectories -1", "must not be negative"),
        ("--causal_init_guidance 0.5 --causal_init_steps 1", "must be at least 1"),
        ("--model_type full --lora_rank 4", "takes no --lora_rank"),
        ("--mixed_precision fp16", "bf16 or no"),
        ("--validation_resolution 40x40", "multiples of 16"),
        ("--eval_steps 3", "--eval_steps: has no job"),
        ("--random_flip", "--random_flip: belongs to --distillation_method lcm"),
        ("--center_crop", "--center_crop: belongs to --distillation_method lcm"),
        ("--interpolation_type lanczos", "--interpolation_type: belongs to --distillation_method lcm"),
        ("--frame_interval 2", "--frame_interval: is of clips, and there are prompts"),
        ("--validation_preview_steps 3", "--validation_preview_steps: has no job"),
        ("--export_pipeline", "full student"),
        ("--model_type full --export_formats diffusers,comfyui", "layout of LoRA files"),
        ("--fake_score_betas 0.9 1", r"must be in \[0, 1\)"),
        ("--context_parallel_degree 0", "must be at least 1"),
        ("--context_parallel_degree 3 --validation_resolution 32x32", "must divide a frame's tokens"),
        ("--context_parallel_degree 2 --attention_mechanism flash", "one or the other"),
        (f"{LCM} --fake_score_lr 1e-4", "--fake_score_lr: belongs to --distillation_method dmd, and this is lcm"),
        (f"{LCM} --no-ts_schedule", "--ts_schedule: belongs to --distillation_method dmd"),
        ("--num_ddim_timesteps 20", "--num_ddim_timesteps: belongs to --distillation_method lcm"),
        (f"{LCM} --random_flip", "--random_flip: is of clips, and there are prompts alone"),
        (f"{LCM} --cache_dir_vae x", "--cache_dir_vae: is of clips, and there are prompts alone"),
        (f"{LCM} --num_frame_per_block 1", "--num_frame_per_block: belongs to --distillation_method dmd"),
        (f"{LCM} --num_ddim_timesteps 0", "must be at least 1"),
        (f"{LCM} --huber_c 0", "--huber_c 0"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(flags, message, parse, capsys):
    with pytest.raises(SystemExit):
        parse(flags)
    error = capsys.readouterr().err.splitlines()[-1]
    assert re.search(message, error), error


@pytest.mark.parametrize(("batch", "word"), [(1, "raise"), (15, "raise"), (16, None), (256, None), (257, "lower")])
def test_a_batch_far_from_the_recipe_s_is_warned_about(batch, word, parse, capsys, monkeypatch):
    monkeypatch.setattr(script, "load_networks", lambda *args: exit("enough is known"))
    with pytest.raises(SystemExit, match="enough is known"):
        script.main(*parse(f"{LORA} --gradient_accumulation_steps {batch}"))
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: ")]
    assert len(told) == (word is not None)
    assert all(f"{batch} clips a step" in line and f"{word} --gradient_acc" in line for line in told)


def test_a_teacher_that_is_not_there_is_one_sentence(parse, tmp_path):
    with pytest.raises(SystemExit, match=r"--pretrained_teacher_model .*nothing: cannot be loaded \("):
        script.main(*parse(f"{LORA} --pretrained_teacher_model {tmp_path / 'nothing'}"))


@pytest.mark.parametrize(
    "flags, gathered_in",
    [(f"{FULL} --num_frame_per_block 1", {None}), (FULL, {None, torch.bfloat16}), (CAUSAL, {None})],
)
def test_split_networks_attend_as_whole_ones_and_add_up_in_fp32(flags, gathered_in, parse, alone, monkeypatch):
    """A self-forcing student is called for each block of a clip before one backward()."""
    monkeypatch.setattr(script, "wants_fsdp", lambda accelerator: True)
    args, *_ = parse(f"{flags} --attention_without_gradient _native_math --mixed_precision bf16")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        networks = script.load_networks(args, Accelerator(mixed_precision="bf16"), torch.bfloat16).by_role
        for network in networks.values():
            assert all(type(block.attn1.processor) is BlockCausalAttention for block in network.blocks)
            assert {block.attn1.processor.without_gradient for block in network.blocks} == {"_native_math"}
        student = networks["student"]
        split = [module for module in student.modules() if isinstance(module, FSDPModule)]
        assert {module._get_fsdp_state()._mp_policy.param_dtype for module in split} == gathered_in
        with torch.autocast("cpu", torch.bfloat16):
            student(torch.randn(1, 4, 1, 4, 4), torch.zeros(1), torch.zeros(1, 3, 16)).sample.sum().backward()
    assert not [str(each.message) for each in told if "view tensor" in str(each.message) or "_pg_" in str(each.message)]


def test_processes_share_tokens_only_where_that_comes_out_even(run):
    with pytest.raises(SystemExit, match="must divide 1 processes"):
        run(f"{LORA} --context_parallel_degree 2")


# ---------------------------------------------------------------------------------------------------------------------
# Blocks of a rollout
# ---------------------------------------------------------------------------------------------------------------------


def blocks(per_block, first=False, training=21):
    settings = {"num_frame_per_block": per_block, "independent_first_frame": first, "num_training_frames": training}
    return Namespace(**settings)


@pytest.mark.parametrize(
    ("frames", "settings", "fitted"),
    [
        (121, blocks(0), 121),  # one block
        (81, blocks(3), 81),
        (121, blocks(3), 81),  # the document's: 31 latent frames are cut to 21
        (129, blocks(3), 129),  # 33 latent frames: a longer rollout
        (85, blocks(3, first=True), 85),  # 1 + 21
        (121, blocks(3, first=True), 121),  # 1 + 30
        (125, blocks(3, True, 28), 109),  # 32 to 28 = 1 + 27
    ],
)
def test_clips_are_cut_to_whole_blocks(frames, settings, fitted):
    found, notes = script.fit_to_blocks("num_frames", frames, settings)
    cut = f"cut to --num_training_frames {settings.num_training_frames}, {fitted} frames"
    assert found == fitted and [cut in note for note in notes] == [True] * (fitted != frames)


@pytest.mark.parametrize(
    ("frames", "settings", "named"),
    [
        (121, blocks(3, training=28), "31 latent frames are no whole blocks of --num_frame_per_block 3; 117 or 129"),
        (25, blocks(3), "7 latent frames .* 21 or 33 frames are"),
        (5, blocks(3), "2 latent frames .* 9 frames are"),
        (81, blocks(3, first=True), "after the first frame; 73 or 85 frames are"),
    ],
)
def test_an_error_says_which_numbers_of_frames_do(frames, settings, named):
    with pytest.raises(ValueError, match=named) as error:
        script.fit_to_blocks("num_frames", frames, settings)
    advised = re.findall(r"(\d+)(?= or| frames are)", str(error.value).partition(settings_end(settings))[2])
    assert advised
    for frames in map(int, advised):
        assert script.fit_to_blocks("num_frames", frames, settings) == (frames, [])


def settings_end(settings) -> str:
    return f"--num_frame_per_block {settings.num_frame_per_block}"


@pytest.mark.parametrize(
    ("settings", "taken"),
    [
        (blocks(3, training=28), 27),
        (blocks(3, first=True, training=28), 28),
        (blocks(3, first=True, training=29), 27),
        (blocks(3, training=2), 2),  # refused later: no rollout's last blocks are so few
        (blocks(0, training=28), 28),
    ],
)
def test_training_frames_are_whole_blocks(settings, taken):
    args, notes = script.fit_training_frames(settings)
    given = settings.num_training_frames
    assert args.num_training_frames == taken
    said = f"--num_training_frames {given}: is not whole blocks of 3; {taken} is taken"
    assert notes == [said] * (taken != given)


def test_self_forcing_from_a_bidirectional_start_is_warned_about(parse):
    for flags, said in (
        ("--num_frame_per_block 1", True),
        ("--num_frame_per_block 1 --causal_init_steps 1", False),
        ("", False),
    ):
        notes = parse(flags)[-1]
        assert any("warning: self-forcing without --causal_init_steps" in note for note in notes) == said
    assert "--context_noise: acts on blocks, of --num_frame_per_block, alone" in parse("--context_noise 50")[-1]


def test_an_error_of_training_frames_names_some_that_pass(parse, capsys):
    flags = "--num_frame_per_block 3 --num_frames 33 --num_training_frames"
    with pytest.raises(SystemExit):
        parse(f"{flags} 2")
    advised = re.search(r", as (\d+) or (\d+)", capsys.readouterr().err).groups()
    assert [parse(f"{flags} {count}")[0].num_training_frames for count in advised] == [3, 6]


# ---------------------------------------------------------------------------------------------------------------------
# Clips of validation
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags, whose",
    [
        ("", {"student"}),
        ("--use_ema", {"ema"}),
        ("--use_ema --ema_validation none", {"student"}),
        ("--use_ema --ema_validation comparison", {"student", "ema"}),
    ],
)
def test_validation_generates_whose_clips_were_asked_for(flags, whose, run, tmp_path):
    run(f"{LORA} {flags}", "shown")
    folder = tmp_path / "shown" / "validation" / "step-000001"
    assert {path.name.split("-")[0] for path in folder.glob("*.mp4")} == whose


def latents_generated(flags: str, run, monkeypatch) -> list[torch.Tensor]:
    """Of one clip each, in order: those that are shown, then the first prompt's seeds that are watched."""
    seen = []
    monkeypatch.setattr(
        script, "decode", lambda vae, x: seen.extend(x) or [np.zeros((5, 16, 16, 3), np.float32)] * len(x)
    )
    run(f"{LORA} {flags}")
    return seen


@pytest.mark.parametrize("shared", [True, False])
def test_a_batch_at_a_time_is_generated_by_one_process_or_by_all(shared, monkeypatch):
    """What the second of two processes makes of five prompts."""
    asked = []
    args = {"train_batch_size": 2, "num_frame_per_block": 0, "independent_first_frame": False}
    args = Namespace(**args, validation_resolution=[(32, 32)])
    monkeypatch.setattr(script.Clips, "some", lambda *given, size: asked.append((given[2], given[4])) or [])
    monkeypatch.setattr(pictures, "gather_object", lambda drawn: drawn)
    networks = Namespace(accelerator=Namespace(process_index=1, num_processes=2))
    script.Clips(args, Namespace(validation_frames=9), networks, None, None, None, shared)("student", [*"abcde"], 3, 7)
    assert asked == ([(["c", "d"], 9)] if shared else [(["a", "b"], 7), (["c", "d"], 9), (["e"], 11)])


@pytest.mark.slow
def test_clips_follow_from_the_validation_seed(run, monkeypatch):
    first = latents_generated("--validation_seed 5", run, monkeypatch)
    other = latents_generated("--validation_seed 6", run, monkeypatch)
    shown, *watched = first
    assert len(watched) == 4  # seeds of the same prompt
    assert torch.equal(shown, watched[0])
    assert not any(torch.equal(x, y) for x, y in itertools.combinations(watched, 2))
    torch.testing.assert_close(other[0], watched[1])  # the next seed


def test_the_shift_is_of_the_teacher_s_sampler(parse):
    assert script.schedule_shift(script.load_scheduler(parse(LORA)[0])) == 3.0
    assert script.schedule_shift(script.load_scheduler(parse(f"{LORA} --flow_schedule_shift 7")[0])) == 7.0


# ---------------------------------------------------------------------------------------------------------------------
# Averages, regression, resume
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_average_counts_the_student_s_updates_alone(run):
    """Six steps of which three are the student's, an average of every second of these, with the decay of two."""
    flags = f"{LORA} --use_ema --ema_decay 0.9 --generator_update_interval 2"
    second = run(f"{flags} --max_train_steps 3")["student"]
    found = run(f"{flags} --ema_update_interval 2 --max_train_steps 6")["ema"]
    ends = [key for key in found if "lora_B" in key]  # which start at zero
    assert len(ends) == 20 and found.keys() == second.keys()
    for key in ends:
        torch.testing.assert_close(found[key], 0.19 * second[key], atol=1e-7, rtol=1e-5)


@pytest.mark.slow
def test_regression_leads_the_student_to_where_the_teacher_s_flow_ends(run, monkeypatch, watch):
    """The same prompt and noise again and again. The fake score is not trained meanwhile. The first block is asked
    along a flow from noise that is all tied to its own; later ones at noise that has nothing to do with it."""
    loads, flows, asked = watch(script, "load_networks"), watch(script, "flow_trajectory"), []
    monkeypatch.setattr(script, "FLOW_STEPS", 4)  # more of them only take time
    monkeypatch.setattr("common.draws.sample_generator", lambda seed, position: torch.Generator().manual_seed(0))
    original = script.predict

    def predict(network, x, t, cond):
        if torch.is_grad_enabled():
            asked.append((x, t, cond))
        return original(network, x, t, cond)

    monkeypatch.setattr(script, "predict", predict)
    flags = "--causal_init_steps 60 --max_train_steps 60 --learning_rate 5e-3 --lora_alpha 16"
    weights = run(f"{CAUSAL} {flags}")
    assert not any(value.any() for key, value in weights["fake_score"].items() if "lora_B" in key)
    (flow, (starts, ends)), networks = flows[-1], loads[0][1]
    student, causal = networks.by_role["student"], networks.causal
    blocks = ends.shape[2]  # of a frame each
    asked = asked[-3 * blocks :]
    torch.testing.assert_close(flow[1], tied_noise(flow[1], 1))
    assert [t.item() for _, t, _ in asked[::blocks]] == [1000.0, 757.0, 522.0]
    independent = []
    for i, (x, t, _) in enumerate(asked):
        step, block = divmod(i, blocks)
        if block == 0:
            assert torch.equal(x, starts[step][:, :, :1])
        else:  # its noise is not that of the flow, nor that of another step
            sigma = t.item() / 1000
            noise = (x - (1 - sigma) * ends[:, :, block : block + 1]) / sigma
            others = [flow[1][:, :, block], *(asked[k][0] for k in (block, i - 1) if k != i)]
            assert all((noise.flatten() - other.flatten()).abs().mean() > 0.3 for other in others)
            independent.append(noise)
    assert abs(torch.cat(independent).std() - 1) < 0.15  # of 6 x 64 numbers

    def error(name: str) -> float:
        """Of all that was asked, each block after the flow's own."""
        found, kept = [], []
        with torch.no_grad(), active_adapter(networks.layers, name):
            with causal.block(0, None, block_ends([1] * blocks, ends.shape[3] * ends.shape[4] // 4), kept):
                original(student, ends, torch.tensor([0.0]), asked[0][2])
            for i, (x, t, cond) in enumerate(asked):
                block = i % blocks
                past = first_tokens(kept, block * ends.shape[3] * ends.shape[4] // 4)
                with causal.block(block, past):
                    x0 = x - t / 1000 * original(student, x, t, cond)
                found.append((x0 - ends[:, :, block : block + 1]).square().mean())
        return sum(found).item()

    before, after, far = error("none"), error("student"), len(asked) * ends.square().mean().item()
    print(f"error {before:.3f} -> {after:.3f}; of nothing at all {far:.3f}")
    assert after < 0.5 * min(before, far)


REGRESSION = "--causal_init_steps 4 --max_train_steps 4 --causal_init_trajectories 2 --proportion_empty_prompts 0.5"


@pytest.mark.parametrize("student", [CAUSAL, FULL])
def test_kept_trajectories_need_no_teacher_and_give_the_same_weights(student, run, monkeypatch, tmp_path):
    monkeypatch.setattr(script, "FLOW_STEPS", 2)  # more of them only take time
    flags = f"{student} {REGRESSION} --cache_dir_trajectories {tmp_path / 'kept'}"
    filled = run(flags)["student"]
    with monkeypatch.context() as without_cache:
        without_cache.setattr(script.Trajectories, "all_have", lambda kept, found: False)
        assert equal(run(flags)["student"], filled)
    monkeypatch.setattr(script, "flow_trajectory", lambda *_: pytest.fail("the teacher was asked"))
    assert equal(run(flags)["student"], filled)
    with pytest.raises(pytest.fail.Exception, match="the teacher was asked"):
        run(f"{student} {REGRESSION.replace('trajectories 2', 'trajectories 0')}")


def test_a_teacher_that_takes_all_processes_is_asked_by_all_or_by_none():
    kept = object.__new__(script.Trajectories)
    for together, others_have, all_have in ((True, 1.0, True), (True, 0.5, False), (False, 0.5, True)):
        kept.together = together
        kept.accelerator = SimpleNamespace(device="cpu", reduce=lambda found, how, share=others_have: found * share)
        assert kept.all_have(True) == all_have and not kept.all_have(False)


@pytest.fixture
def kept(run, monkeypatch, tmp_path):
    """`kept(flags)`: how many trajectories a run adds to those of before."""
    monkeypatch.setattr(script, "FLOW_STEPS", 2)

    def added(flags: str = "") -> int:
        before = len(list((tmp_path / "kept").rglob("*.safetensors")))
        once = "--causal_init_steps 2 --max_train_steps 2 --causal_init_trajectories 1"
        run(f"{CAUSAL} {once} --cache_dir_trajectories {tmp_path / 'kept'} {flags}")
        return len(list((tmp_path / "kept").rglob("*.safetensors"))) - before

    return added


def test_trajectories_are_kept_for_a_prompt_and_not_for_a_visit_or_a_seed(kept):
    assert kept() == 1
    assert kept("--seed 7 --causal_init_steps 3 --max_train_steps 3 --learning_rate 1") == 0
    assert kept("--causal_init_trajectories 3 --causal_init_steps 12 --max_train_steps 12") == 2


@pytest.mark.slow
def test_what_shapes_a_trajectory_is_in_its_key(kept):
    assert kept() == 1
    for flags in (
        "--causal_init_guidance 2", "--negative_prompt bad", "--dmd_denoising_steps 1000,500",
        "--flow_schedule_shift 7", "--num_frames 5", "--num_frame_per_block 3", "--proportion_empty_prompts 1",
        "--max_sequence_length 8", "--mixed_precision bf16", "--base_model_precision int8-torchao",
    ):  # fmt: skip
        assert (flags, kept(flags)) == (flags, 1)
    assert kept() == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        f"{LORA} --use_ema --generator_update_interval 2 --lora_dropout 0.1 --lr_scheduler cosine",
        f"{CAUSAL} --causal_init_steps 1 --gradient_accumulation_steps 2",
        f"{FULL} --use_ema --ema_update_interval 3",
        f"{LORA} {LCM} --use_ema --lora_dropout 0.1 --causal_init_steps 1",
        f"{FULL} {LCM} --gradient_accumulation_steps 2",
    ],
)
def test_killed_and_resumed_is_the_same_bit_for_bit(flags, run, monkeypatch):
    whole = run(f"{flags} --max_train_steps 4")
    stops = iter([False, True])  # a signal after the second step
    with monkeypatch.context() as patch:
        patch.setattr(script.StopSignal, "agreed", lambda self, accelerator: next(stops))
        with pytest.raises(ValueError):  # no checkpoint of step 4
            run(f"{flags} --max_train_steps 4", "stopped")
    resumed = run(f"{flags} --max_train_steps 4 --resume_from_checkpoint latest", "stopped")
    assert whole.keys() == resumed.keys() >= set(script.METHODS["lcm" if LCM in flags else "dmd"])
    for name in whole:
        assert equal(whole[name], resumed[name]), name


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_last_good_checkpoint(run, monkeypatch):
    original, calls = script.dmd_loss, []

    def diverges(x_g, g):
        calls.append(1)
        return original(x_g, g) * (float("nan") if len(calls) == 4 else 1.0)

    monkeypatch.setattr(script, "dmd_loss", diverges)
    with pytest.raises(
        SystemExit, match=r"dmd_loss is not finite at step 4; the last good checkpoint is .*checkpoint-2"
    ):
        run(f"{LORA} --max_train_steps 8 --checkpointing_steps 2", "bad")


def test_embeddings_come_from_the_cache_the_second_time(run, monkeypatch, tmp_path):
    caches = f"--cache_dir_text {tmp_path / 'text'}"
    run(f"{LORA} {caches}")
    monkeypatch.setattr(script, "load_text_encoder", lambda *args: pytest.fail("the text encoder was loaded"))
    run(f"{LORA} {caches}")


def test_a_single_prompt_is_read_again_and_again(parse):
    args, data, *_ = parse(LORA)
    batches = script.open_batches(args, data, Accelerator(), script.open_caption_readers(args, data), None)
    samples = [next(batches)[0] for _ in range(5)]
    assert [sample.position for sample in samples] == [0, 1, 2, 3, 4]
    assert {sample.caption for sample in samples} == {"a red ball"}


def test_of_clips_the_captions_and_sizes_are_read_alone(wan_teacher, tmp_path, monkeypatch):
    """The rollout starts from noise: no pixel is decoded, and no latents are cached."""
    clips = tmp_path / "clips"
    save_clip(np.zeros((9, 32, 48, 3), np.float32), clips / "a.mp4", script.FRAMES_PER_SECOND)
    (clips / "a.txt").write_text("a red ball")
    monkeypatch.setattr(ClipReader, "read_frames", lambda *args: pytest.fail("a clip was decoded"))
    monkeypatch.setattr(script, "load_vae", lambda *args: pytest.fail("the VAE was loaded"))
    flags = f"--pretrained_teacher_model {wan_teacher} --train_data_dir {clips} --output_dir {tmp_path / 'out'}"
    flags += " --num_frames 9 --resolution 32 --max_train_steps 1 --disable_bucket_pruning"
    args, data, *_ = script.parse_args(flags.split())
    accelerator = Accelerator()
    encoders = script.encoders(args, accelerator.device, torch.float32)
    readers = script.open_caption_readers(args, data)
    encoder, readers = script.open_encoder(args, data, readers, encoders, accelerator, [], {"step": 0, "stream": None})
    (sample,) = next(script.open_batches(args, data, accelerator, readers, None))
    assert (sample.caption, sample.bucket, sample.pixels) == ("a red ball", (9, 32, 48), None)
    assert encoder.encode_text([sample.caption])["prompt_embeds"].shape == (1, 512, 16)


@pytest.mark.parametrize(
    "flags",
    [
        f"{FULL} --use_ema --fake_score_guidance_scale 2 --proportion_empty_prompts 0.5",
        f"{CAUSAL} --causal_init_steps 1 --context_noise 10 --lora_dropout 0.1",
        f"{LORA} {LCM}",
    ],
)
def test_the_loop_does_not_wait_for_the_device(flags, parse, monkeypatch):
    monkeypatch.setattr(script, "FLOW_STEPS", 2)  # more of them only take time
    assert steps_without_waits(script, *parse(f"{flags} --num_frames 5 --max_train_steps 2")) == 2


def test_kept_trajectories_come_without_a_wait(run, parse, monkeypatch):
    monkeypatch.setattr(script, "FLOW_STEPS", 2)
    flags = f"{CAUSAL} --num_frames 5 --causal_init_steps 1 --causal_init_trajectories 1"
    run(flags, "kept")
    assert steps_without_waits(script, *parse(flags, "kept")) == 1


# ---------------------------------------------------------------------------------------------------------------------
# Wan's encoders and the caches
# ---------------------------------------------------------------------------------------------------------------------

PROMPTS = ["a red ball", "a  blue   box &amp; a much longer text about it", ""]


class OneProcess:
    device = torch.device("cpu")
    is_main_process, num_processes, process_index = True, 1, 0
    print = staticmethod(print)
    wait_for_everyone = staticmethod(lambda: None)


def opened(teacher, *flags, dtype=torch.float32, vae_dtype=torch.float32):
    """Data, their encoder after filling, readers, and how often each network was loaded.

    Readers are those of clips, which the script itself does not need: a fork that trains on clips does.
    """
    flags = [
        "--pretrained_teacher_model",
        teacher,
        "--max_train_steps",
        99,
        "--num_frames",
        9,
        "--distillation_method",
        "lcm",
        *flags,
    ]
    args, data, *_ = script.parse_args([str(flag) for flag in flags])
    loads, own = Counter(), script.encoders(args, OneProcess.device, dtype)
    encoders = replace(
        own, load_vae=lambda: loads.update(["load_vae"]) or own.load_vae(),
        load_text=lambda: loads.update(["load_text"]) or own.load_text(),
        latents_identity=lambda: own.latents_identity() | {"dtype": vae_dtype},
    )  # fmt: skip
    readers = open_clip_readers(args, data)
    encoder, readers = script.open_encoder(
        args, data, readers, encoders, OneProcess(), ["", "negative"], {"step": 0, "stream": None}
    )
    return data, encoder, readers, loads


@pytest.fixture
def clips(tmp_path):
    return folder_of_clips(tmp_path / "clips")


@pytest.fixture
def prompts(tmp_path):
    return tmp_path / "prompts.txt"


def test_embeddings_are_the_pipelines(wan_teacher):
    pipeline = WanPipeline.from_pretrained(wan_teacher)
    expected, _ = pipeline.encode_prompt(PROMPTS, do_classifier_free_guidance=False, max_sequence_length=512)
    rows = script.encode_prompts((pipeline.tokenizer, pipeline.text_encoder), PROMPTS, 512)["prompt_embeds"]
    assert [len(row) for row in rows] == [11, len("a blue box & a much longer text about it") + 1, 1]
    long = "x" * 600
    [cut] = script.encode_prompts((pipeline.tokenizer, pipeline.text_encoder), [long], 512)["prompt_embeds"]
    expected_cut, _ = pipeline.encode_prompt([long], do_classifier_free_guidance=False, max_sequence_length=512)
    torch.testing.assert_close(cut, expected_cut[0], rtol=1e-4, atol=1e-5)
    for row, padded in zip(rows, expected, strict=True):
        torch.testing.assert_close(row, padded[: len(row)], rtol=1e-4, atol=1e-5)
        assert not padded[len(row) :].any()


@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_prompts_of_similar_length_are_encoded_together(dtype, rounding, parse, monkeypatch):
    """And an embedding does not depend on what is beside it, but for rounding."""
    monkeypatch.setattr(script, "TOKENS_ENCODED", 64)
    tokenizer, encoder = script.load_text_encoder(parse("")[0], torch.device("cpu"), dtype)
    shapes, prompts = [], ["", "x" * 40, *("a ball " * (1 + i % 5) for i in range(20)), "y" * 90]
    with torch.no_grad():
        alone = [script.encode_prompts((tokenizer, encoder), [prompt], 512)["prompt_embeds"][0] for prompt in prompts]
        encoder.encoder.embed_tokens.register_forward_pre_hook(lambda _, ids: shapes.append(ids[0].shape))
        rows = script.encode_prompts((tokenizer, encoder), prompts, 512)["prompt_embeds"]
    assert len(shapes) < 14 and all(len(shape) == 2 and (shape.numel() <= 64 or shape[0] == 1) for shape in shapes)
    for row, expected in zip(rows, alone, strict=True):
        assert row.shape == expected.shape
        torch.testing.assert_close(row, expected, rtol=rounding, atol=rounding * expected.abs().max().item())


def test_latents_are_the_pipelines(wan_teacher):
    """WanVideoToVideoPipeline's, without the noise that it adds."""
    options = dict.fromkeys(("teacher_revision", "teacher_variant", "cache_dir"))
    args = Namespace(pretrained_teacher_model=wan_teacher, **options)
    vae = script.load_vae(args, "cpu", torch.float32)
    clips = torch.rand(2, 3, 9, 16, 32) * 2 - 1
    stand_in = SimpleNamespace(vae=vae, vae_scale_factor_temporal=4, vae_scale_factor_spatial=8)
    stand_in.scheduler = SimpleNamespace(add_noise=lambda latents, noise, t: latents)
    with torch.no_grad():
        expected = WanVideoToVideoPipeline.prepare_latents(stand_in, clips, 2, 4, 16, 32, torch.float32, "cpu")
        latents = script.encode_pixels(vae, clips)["latents"]
        assert latents.shape == (2, 4, 3, 2, 4)
        torch.testing.assert_close(latents, expected)
        raw = latents * torch.tensor([2.0, 0.5, 1.0, 4.0]).view(1, 4, 1, 1, 1)
        raw = raw + torch.tensor([0.5, -0.25, 0.0, 1.0]).view(1, 4, 1, 1, 1)
        pixels = (vae.decode(raw).sample / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 4, 1)
        shown = script.decode(vae, latents)
        assert len(shown) == 2
        torch.testing.assert_close(torch.tensor(np.stack(shown)), pixels)


def test_a_full_cache_loads_neither_network(wan_teacher, clips, tmp_path):
    flags = ["--train_data_dir", clips, "--resolution", 32, "--output_dir", tmp_path / "out"]
    data, encoder, readers, loads = opened(wan_teacher, *flags)
    assert loads == {"load_vae": 1, "load_text": 1}
    assert len(encoder.latents[0].index) == 3
    assert len(encoder.text.index) == 4 + 2  # captions, "", negative
    data, encoder, readers, loads = opened(wan_teacher, *flags)
    samples = samples_of(data, readers)
    tall = samples["a_second"]
    latents = encoder.encode_images([tall])["latents"]
    text = encoder.encode_text([tall.caption, ""])["prompt_embeds"]
    assert loads == {} and latents.shape == (1, 4, 3, 6, 4) and text.shape == (2, 512, 16)
    assert not text[0, 7:].any() and text[0, :7].any(-1).all() and not text[1, 1:].any()
    # what is kept is what would be encoded now
    _, fresh, readers, _ = opened(wan_teacher, *flags, "--vae_cache_disable")
    again = samples_of(data, readers)["a_second"]
    assert again.pixels is not None
    torch.testing.assert_close(fresh.encode_images([again])["latents"], latents, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(fresh.encode_text([tall.caption, ""])["prompt_embeds"], text)


def samples_of(data, readers) -> dict:
    samples = {}
    for dataset, one in zip(data.datasets, readers, strict=True):
        for key, members in itertools.chain.from_iterable(map(read_part, dataset.parts)):
            samples[key.rpartition("/")[2]] = one(members, "v", key.rpartition("/")[2])
    return samples


def test_only_valid_tokens_are_on_the_disk(wan_teacher, prompts, tmp_path):
    prompts.write_text("short\na longer one\n")
    _, encoder, _, _ = opened(wan_teacher, "--train_prompts", prompts, "--output_dir", tmp_path)
    key = text_key("a longer one")
    with safe_open(encoder.text.index[key], "pt") as file:
        assert load(file.get_tensor(key).numpy().tobytes())["prompt_embeds"].shape == (13, 16)


def test_prompts_alone_never_load_the_vae(wan_teacher, prompts, tmp_path, capsys):
    flags = ["--train_prompts", prompts, "--output_dir", tmp_path / "out"]
    prompts.write_text("a red ball\na blue box\n")
    data, encoder, readers, loads = opened(wan_teacher, *flags)
    assert loads == {"load_text": 1} and not (tmp_path / "out" / "cache" / "vae").exists()
    assert "caches: 0 latents, 4 prompts" in capsys.readouterr().out
    data, encoder, readers, loads = opened(wan_teacher, *flags)
    samples = list(samples_of(data, readers).values())
    assert encoder.encode_images(samples) == {}
    assert encoder.encode_text([sample.caption for sample in samples])["prompt_embeds"].shape == (2, 512, 16)
    assert loads == {}
    prompts.write_text("a red ball\na green box\n")  # one new: the text encoder again, for that one
    _, encoder, _, loads = opened(wan_teacher, *flags)
    assert loads == {"load_text": 1} and len(encoder.text.index) == 3 + 2


def test_on_demand_keeps_what_is_met(wan_teacher, clips, tmp_path):
    flags = ["--train_data_dir", clips, "--resolution", 32, "--output_dir", tmp_path, "--vae_cache_ondemand"]
    data, encoder, readers, loads = opened(wan_teacher, *flags)
    assert loads == {}
    sample = samples_of(data, readers)["walk"]
    first = encoder.encode_images([sample])["latents"]
    encoder.encode_text([sample.caption])
    encoder.flush()
    data, encoder, readers, loads = opened(wan_teacher, *flags)
    sample = samples_of(data, readers)["walk"]
    assert sample.pixels is None and torch.equal(encoder.encode_images([sample])["latents"], first)
    encoder.encode_text([sample.caption])
    assert loads == {}


def test_stores_are_named_by_what_shaped_them(wan_teacher, clips, tmp_path):
    base = ["--train_data_dir", clips, "--resolution", 32, "--output_dir", tmp_path, "--vae_cache_ondemand"]

    def folders(*flags, **dtypes):
        _, encoder, _, _ = opened(wan_teacher, *base, *flags, **dtypes)
        return encoder.latents[0].folder, encoder.text.folder

    plain = folders()
    assert folders() == plain
    for flags in (("--num_frames", 5), ("--frame_interval", 2), ("--resolution", 48), ("--crop_style", "center")):
        latents, text = folders(*flags)
        assert latents != plain[0] and text == plain[1]
    latents, text = folders(dtype=torch.bfloat16)
    assert latents == plain[0] and text != plain[1]
    latents, text = folders(vae_dtype=torch.bfloat16)
    assert latents != plain[0] and text == plain[1]
    for flags in (
        ("--pretrained_t5_model_name_or_path", "elsewhere"),
        ("--max_sequence_length", 16),
        ("--text_encoder_1_precision", "int8-torchao"),
    ):
        latents, text = folders(*flags)
        assert latents == plain[0] and text != plain[1]


# ---------------------------------------------------------------------------------------------------------------------
# Export
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags",
    [
        f"{LORA} --max_sequence_length 24",
        f"{FULL} --use_ema",
        pytest.param(f"{FULL} --export_pipeline", marks=pytest.mark.slow),
        f"{LORA} --dmd_denoising_steps 1000,800,700,100",
        f"{FULL} {LCM} --use_ema",
    ],
)
def test_the_card_s_lines_sample_in_the_stock_pipeline_what_the_student_makes(
    flags, run, parse, monkeypatch, watch, tmp_path
):
    """The very lines, at exactly the trained timesteps, from the same noise."""
    loads, exports = watch(script, "load_networks"), watch(script, "export")
    weights = run(f"{flags} --max_train_steps 3", "exported")
    args, _, method, _ = parse(flags, "exported")
    (_, (_, usage)), student = exports[-1], loads[0][1].by_role["student"]
    assert ("partial" in usage) == ("800" in flags)

    namespace, steps_taken = {}, []
    setup, call = usage.partition("encode_video(video")[0].rsplit("video = ", 1)
    exec(setup, namespace)
    pipe = namespace["pipeline"]
    forward = pipe.transformer.forward
    monkeypatch.setattr(
        pipe.transformer, "forward", lambda **kw: steps_taken.append(kw["timestep"][0].item()) or forward(**kw)
    )
    call = call.replace('"your prompt"', '"a red ball", output_type="latent"')
    torch.manual_seed(0)
    theirs = eval(call.replace(".frames[0]", ".frames"), namespace)
    torch.testing.assert_close(torch.tensor(steps_taken), torch.tensor(method.steps), atol=2e-4, rtol=0)

    if args.use_ema:
        student = WanTransformer3DModel.from_pretrained(tmp_path / "exported", subfolder="transformer")
        ours_ema = weights["ema"]
        for name, p in student.named_parameters():
            assert torch.equal(p, ours_ema[name.replace(".", "/")])
    with torch.no_grad():
        embeds, _ = pipe.encode_prompt("a red ball", max_sequence_length=args.max_sequence_length)
    torch.manual_seed(0)
    noise = [torch.randn(1, 4, 3, 4, 4) for _ in method.steps]

    def predict(x, t, start, cache):
        with active_adapter(adapter_layers(student), "student"):
            return script.predict(student, x, torch.tensor([t]), {"prompt_embeds": embeds})

    with torch.no_grad():
        (ours,) = roll_out(predict, None, noise.__getitem__, method.steps, [3], [len(method.steps) - 1])
    torch.testing.assert_close(theirs, ours, atol=1e-4, rtol=1e-4)
    assert ours.std() > 0.1


def test_the_card_s_lines_of_a_causal_student_stream_what_it_makes(run, parse, tmp_path, watch):
    loads, exports = watch(script, "load_networks"), watch(script, "export")
    run(f"{CAUSAL} --max_train_steps 3 --context_noise 50", "causal")
    (_, _, method, _), namespace = parse(f"{CAUSAL} --context_noise 50", "causal"), {}
    usage = exports[0][1][1]
    assert usage in (tmp_path / "causal" / "README.md").read_text()
    setup, sampling = usage.replace("your prompt", "a red ball").split("noise = ")
    exec(setup, namespace)  # loading draws random numbers
    torch.manual_seed(0)
    exec(f"noise = {sampling.partition('encode_video')[0]}", namespace)
    theirs = torch.cat(namespace["clip"], 2)

    networks, cond = loads[0][1], {"prompt_embeds": namespace["text"]}
    torch.manual_seed(0)
    drawn = [torch.randn(1, 4, 3, 4, 4) for _ in range(4)]
    noise = {0: drawn[0], 1: drawn[1], 2: drawn[2], None: drawn[3]}  # the order in which a first block asks

    def velocity(x, t):
        with active_adapter(networks.layers, "student"):
            return script.predict(networks.by_role["student"], x, torch.tensor([t]), cond)

    with torch.no_grad():
        calls = networks.causal.calls(velocity)
        blocks = roll_out(*calls, noise.__getitem__, method.steps, [1, 1, 1], [2, 2, 2], context_noise=50.0)
        ours = torch.cat(list(blocks), 2)
    torch.testing.assert_close(theirs, ours, atol=1e-4, rtol=1e-4)
    assert ours.std() > 0.1


def test_the_file_for_comfyui_is_the_same_adapter(run, tmp_path, wan_teacher):
    """By diffusers' own reader of that layout."""
    run(f"{LORA} --lora_alpha 2 --export_formats diffusers,comfyui", "comfy")
    outputs = []
    x, text = torch.randn(1, 4, 3, 4, 4), torch.randn(1, 8, 16)
    for name in ("pytorch_lora_weights.safetensors", "comfyui_lora.safetensors", None):
        pipe = WanPipeline.from_pretrained(wan_teacher)
        if name:
            pipe.load_lora_weights(tmp_path / "comfy", weight_name=name)
        with torch.no_grad():
            outputs.append(pipe.transformer(x, torch.tensor([757.0]), text).sample)
    ours, comfy, base = outputs
    torch.testing.assert_close(comfy, ours, atol=1e-6, rtol=1e-5)
    assert (ours - base).abs().max() > 1e-3


def test_an_exported_pipeline_loads_whole(run, tmp_path):
    run(f"{FULL} --export_pipeline", "whole")
    pipe = WanPipeline.from_pretrained(tmp_path / "whole")
    assert isinstance(pipe.scheduler, FlowMatchLCMScheduler)
    assert pipe("a red ball", height=32, width=32, num_frames=5, num_inference_steps=3, guidance_scale=1.0,
                output_type="np").frames.shape == (1, 5, 32, 32, 3)  # fmt: skip
