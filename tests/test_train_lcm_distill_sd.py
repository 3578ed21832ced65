"""The SD script: its algorithm in float64, its networks and draws, and what a run shows and leaves behind."""

import contextlib
import copy
import gc
import itertools
import json
import math
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers import DDIMScheduler, LCMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train_lcm_distill_sd as script
from common.networks import active_adapter, adapter_layers
from common.optim import update_ema
from common.report import ClipScore
from common.solvers import DDIMSolver, boundary_scalings
from tests.compiled import REAL_SD
from tests.helpers import teacher_like, tiny_autoencoder, tiny_pipeline
from tests.lcm import TWO_STEPS, Runner, check_graphs, check_weights, lcm_in_float64, perturb, randomize_adapters
from tests.waits import PLAYED, played_device, steps_without_waits

ROLLOUTS = "--scheduled_sampling_probability 1 --scheduled_sampling_max_step_offset 10"


@pytest.fixture
def lcm(sd_teacher, small_shards, tmp_path, monkeypatch, one_process):
    """`lcm.run(flags)`: a short run in this test's folder; `lcm.parse(flags)`: what its main takes."""
    monkeypatch.chdir(small_shards)
    return Runner(script, tmp_path, sd_teacher, one_process)


def load(args):
    return script.load_networks(args, Accelerator(), torch.float32)


def tiny_inputs():
    rng = torch.Generator().manual_seed(4)
    return torch.randn(2, 4, 4, 4, generator=rng), torch.tensor([999, 19]), torch.randn(2, 32, 16, generator=rng)


# ---------------------------------------------------------------------------------------------------------------------
# The algorithm, restated
# ---------------------------------------------------------------------------------------------------------------------


def sd_conditions(pipe, sample) -> tuple[dict, dict]:
    return tuple({"encoder_hidden_states": embeds} for embeds in pipe.encode_prompt(sample.caption, "cpu", 1, True, ""))


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_training_steps_equal_the_algorithm_restated_in_float64(prediction_type, lcm, sd_teachers, watch, logged):
    loss_type = "huber --huber_c 0.01" if prediction_type == "epsilon" else "l2"
    flags, teacher = f"{TWO_STEPS} --loss_type {loss_type}", sd_teachers[prediction_type]
    args, data, _ = lcm.parse(flags, teacher)
    losses, student, target = lcm_in_float64(script, args, data, StableDiffusionPipeline, sd_conditions)
    ours = watch(script, "consistency_loss")
    out = lcm.run(flags, teacher)
    # fp32 leaves errors of 1.5e-5 in the loss of the second step
    torch.testing.assert_close([loss.item() for _, loss in ours], losses, rtol=5e-5, atol=0)
    assert logged[-1][1]["loss"] == pytest.approx(sum(losses) / 2, rel=5e-5)
    check_weights(out, load_file(teacher / "unet" / "diffusion_pytorch_model.safetensors"), student, target)


# ---------------------------------------------------------------------------------------------------------------------
# An ideal teacher: of a Gaussian mixture the best denoiser and its probability flow are known
# ---------------------------------------------------------------------------------------------------------------------

MEANS, DEVIATION = torch.tensor([-1.5, 0.0, 1.2]), 0.3  # of three equal modes


def abar_table() -> torch.Tensor:
    return DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear").alphas_cumprod


def ideal_clean(x, alpha, sigma):
    """E[x0 | x_t] where the data are a mixture of Gaussians: the best that a teacher can say. x, alpha, sigma: [B]"""
    means = MEANS.to(x.dtype)
    variance = (alpha**2 * DEVIATION**2 + sigma**2)[:, None]
    offsets = x[:, None] - alpha[:, None] * means
    weights = (-(offsets**2) / (2 * variance)).softmax(1)
    return (weights * (means + alpha[:, None] * DEVIATION**2 / variance * offsets)).sum(1)


def flow_map(x, t: int):
    """Where the probability flow takes x from t to 0: Heun's method in float64 over every timestep, not DDIM's."""
    abar = abar_table().double()
    x = x.double()
    # In y = x / alpha and s = sigma / alpha the flow is dy/ds = E[eps | x].
    scales = ((1 - abar) / abar).sqrt()
    alphas = abar.sqrt()
    y = x / alphas[t]

    def slope(y, i):
        alpha = alphas[i].expand(len(y))
        return (y - ideal_clean(y * alpha, alpha, alpha * scales[i])) / scales[i]

    for i in range(t, 0, -1):
        ds = scales[i - 1] - scales[i]
        first = slope(y, i)
        y = y + ds * 0.5 * (first + slope(y + ds * first, i - 1))
    return (y * alphas[0]).float()


class Ideal(torch.nn.Module):
    """The ideal clean sample; a student adds a small network to it that starts at zero: it starts as its teacher."""

    def __init__(self, trained: bool):
        super().__init__()
        self.alphas, self.sigmas = abar_table().sqrt(), (1 - abar_table()).sqrt()
        self.layers = None
        if trained:
            widths = (10, 96, 96, 1)
            layers = [torch.nn.Linear(a, b) for a, b in itertools.pairwise(widths)]
            torch.nn.init.zeros_(layers[-1].weight)
            torch.nn.init.zeros_(layers[-1].bias)
            self.layers = torch.nn.Sequential(layers[0], torch.nn.SiLU(), layers[1], torch.nn.SiLU(), layers[2])

    def forward(self, x, t):
        alpha, sigma = self.alphas[t], self.sigmas[t]
        clean = ideal_clean(x, alpha, sigma)
        if self.layers is None:
            return clean
        waves = [x, sigma, alpha] + [f(k * x) for k in (1.0, 2.0, 4.0) for f in (torch.sin, torch.cos)] + [x * alpha]
        return clean + sigma * self.layers(torch.stack(waves, 1))[:, 0]


@pytest.mark.slow
def test_training_on_an_ideal_teacher_converges_to_its_flow(monkeypatch):
    """Mean error of the one-step map falls below 0.08, from 0.3 and more of the teacher's own one step."""
    monkeypatch.setattr(script, "predict", lambda network, x, t, cond, w=None: network(x, t))
    args = SimpleNamespace(
        timestep_scaling_factor=10.0, lora_dropout=None, diff2flow_loss=False, loss_type="huber", huber_c=0.01
    )
    torch.manual_seed(0)
    teacher, student, solver = Ideal(False), Ideal(True), DDIMSolver(abar_table(), 50, "sample")
    target = copy.deepcopy(student).requires_grad_(False)
    trained = list(student.parameters())
    networks = script.Networks(teacher, student, student, target, trained, target, lora=False)
    accelerator = SimpleNamespace(autocast=contextlib.nullcontext)
    steps, count = 5000, 512
    optimizer = torch.optim.Adam(trained, 2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    rng = torch.Generator().manual_seed(1)
    for _ in range(steps):
        latents = MEANS[torch.randint(3, (count,), generator=rng)] + DEVIATION * torch.randn(count, generator=rng)
        index, w = torch.randint(50, (count,), generator=rng), torch.full((count,), 5.0)
        eps = torch.randn(count, generator=rng)
        loss = script.lcm_loss(args, accelerator, networks, solver, {}, {}, latents, index, w, eps)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        update_ema(list(target.parameters()), trained, 0.95)

    def error(network, x, t: int) -> float:
        times = torch.full((len(x),), t)
        c_skip, c_out = boundary_scalings(times, args.timestep_scaling_factor)
        with torch.no_grad():
            return (c_skip * x + c_out * network(x, times) - flow_map(x, t)).abs().mean().item()

    alpha, sigma = solver.alphas[599], solver.sigmas[599]
    noisy = alpha * MEANS.repeat(500) + sigma * torch.randn(1500, generator=rng)
    for t, x in ((999, torch.randn(2000, generator=rng)), (599, noisy)):
        assert error(teacher, x, t) > 0.3
        assert error(target, x, t) < 0.08


# ---------------------------------------------------------------------------------------------------------------------
# Student, target and teacher
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["full", "lora"])
def test_the_target_depends_on_the_student(mode, lcm, monkeypatch, watch):
    calls = watch(script, "consistency_loss")
    lcm.run(f"--model_type {mode}")

    def change(teacher, student, target):
        if mode == "lora":
            randomize_adapters(student)
        else:
            target.conv_out.weight += 0.1

    perturb(monkeypatch, script, change)
    lcm.run(f"--model_type {mode}")
    (f_student, f_target, *_), (changed_student, changed_target, *_) = (arguments for arguments, _ in calls)
    assert (changed_target - f_target).abs().mean() > 1e-3  # the teacher did not change
    assert torch.equal(changed_student, f_student) == (mode == "full")
    assert f_student.requires_grad and not f_target.requires_grad


def test_a_full_student_starts_as_its_teacher_for_every_w(lcm):
    teacher, student, target = load(lcm.args())
    x, t, cond = tiny_inputs()
    expected = teacher(x, t, cond).sample
    for w in (0.0, 5.0, 15.0):
        for network in (student, target):  # one addition of zeros apart
            found = script.predict(network, x, t, {"prompt_embeds": cond}, torch.full((2,), w))
            assert torch.equal(found, expected)


def test_a_full_student_learns_to_tell_w_apart(lcm, monkeypatch):
    networks = perturb(monkeypatch, script, lambda *_: None)
    lcm.run("--max_train_steps 2 --learning_rate 1e-2")
    x, t, cond = tiny_inputs()
    low, high = (script.predict(networks[1], x, t, {"prompt_embeds": cond}, torch.full((2,), w)) for w in (5.0, 15.0))
    assert not torch.allclose(low, high)


@pytest.mark.parametrize("flags", ["--lora_rank 4", "--use_dora", "--lora_rank 4 --mixed_precision bf16"])
def test_without_adapters_the_network_is_the_teacher_bit_for_bit(flags, lcm):
    args = lcm.args(flags)
    dtype = torch.bfloat16 if args.mixed_precision else torch.float32
    teacher, student, target = script.load_networks(args, Accelerator(), dtype)
    assert teacher is student is target
    randomize_adapters(student)
    layout = torch.contiguous_format if args.use_dora else torch.channels_last
    base = script.load_teacher(args, dtype).to(memory_format=layout)
    x, t, cond = tiny_inputs()
    x, cond = x.to(dtype), cond.to(dtype)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        expected = base(x, t, cond).sample
        with active_adapter(adapter_layers(student), "none"):
            assert torch.equal(student(x, t, cond).sample, expected)
        assert (student(x, t, cond).sample - expected).abs().mean() > 1e-2


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "networks"), [("lora", 1), ("full", 3)])
def test_memory_holds_no_more_networks_than_the_method_needs(mode, networks, lcm, monkeypatch):
    def unets() -> list:
        return [thing for thing in gc.get_objects() if type(thing) is UNet2DConditionModel]

    gc.collect()
    before, alive = unets(), []
    known = set(map(id, before))
    count = lambda *_, **__: alive.append(sum(id(unet) not in known for unet in unets()))  # noqa: E731
    monkeypatch.setattr(Accelerator, "log", count)
    lcm.run(f"--model_type {mode}")
    assert alive[0] == networks


def test_the_target_of_lora_has_no_dropout_and_the_student_has(lcm, monkeypatch):
    perturb(monkeypatch, script, randomize_adapters)
    repeated, original = [], script.predict

    def predict_twice(*arguments):
        state = torch.get_rng_state()
        first = original(*arguments)
        second = original(*arguments)
        torch.set_rng_state(state)
        repeated.append(torch.equal(first, second))
        return first

    monkeypatch.setattr(script, "predict", predict_twice)
    lcm.run("--lora_dropout 0.5")
    teacher, target, student = repeated
    assert teacher and target and not student


@pytest.mark.slow
def test_a_lora_s_target_can_be_its_average(lcm, watch):
    flags = "--lora_rank 4 --max_train_steps 2 --learning_rate 1e-2 --checkpointing_steps 1"
    calls = watch(script, "consistency_loss")
    lcm.run(flags)
    out = lcm.run(f"{flags} --ema_decay 0.75")
    (student, target), (student_averaged, target_averaged) = [calls[i][0][:2] for i in (1, 3)]  # of the second steps
    assert torch.equal(student, student_averaged)  # the weights that are trained are back in their places
    assert (target - target_averaged).abs().mean() > 1e-5

    def saved(step: int, name: str):
        return load_file(out / f"checkpoint-{step}" / f"{name}.safetensors")

    first, second, average = saved(1, "student"), saved(2, "student"), saved(2, "target")
    exported = load_file(out / "pytorch_lora_weights.safetensors")
    averages = []
    for name in (name for name in first if "lora_B" in name):  # zero before the first step
        averages.append(0.75 * 0.25 * first[name] + 0.25 * second[name])
        torch.testing.assert_close(average[name.replace(".", "/")], averages[-1])
    sums = sorted(p.abs().sum().item() for name, p in exported.items() if "lora_B" in name)
    torch.testing.assert_close(sums, sorted(p.abs().sum().item() for p in averages))


@pytest.mark.parametrize("rollouts", ["", ROLLOUTS])
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_lora_s_target_has_the_values_of_its_average(precision, rollouts, lcm, monkeypatch, watch):
    """autocast does not notice that weights which it has cast, for the rollout, have other values since."""
    original, calls = script.weights_copy, watch(script, "consistency_loss")

    def broken(*given):
        average = original(*given)
        for p in average.parameters():
            p.fill_(torch.nan)
        return average

    monkeypatch.setattr(script, "weights_copy", broken)
    with pytest.raises(SystemExit, match="the loss is not finite"):
        lcm.run(f"--lora_rank 2 --ema_decay 0.9 --mixed_precision {precision} {rollouts}")
    ((f_student, f_target, *_), _), *_ = calls
    assert f_student.isfinite().all() and f_target.isnan().all()


@pytest.mark.parametrize(
    "student",
    [
        "--lora_rank 2 --lora_dropout 0.5 --ema_decay 0.9 --mixed_precision bf16",
        pytest.param(
            "--use_dora --lora_rank 2 --lora_dropout 0.5 --ema_decay 0.9 --mixed_precision bf16", marks=pytest.mark.slow
        ),
        pytest.param(
            "--lora_rank 2 --base_model_precision int8-torchao --mixed_precision bf16", marks=pytest.mark.slow
        ),
        pytest.param("--model_type full --mixed_precision bf16", marks=pytest.mark.slow),
        pytest.param("--lora_rank 2 --lora_dropout 0.5", marks=pytest.mark.slow),
    ],
)
def test_checkpointing_changes_no_gradient(student, lcm, monkeypatch):
    """What is computed again has the adapters, dropout and casts that the forward had, though others came between."""
    perturb(monkeypatch, script, lambda network, *_: randomize_adapters(network, std=0.1))
    seen, original = [], script.clip_gradients

    def look(accelerator, trained, *given):
        seen.append([p.grad.clone() for p in trained])
        original(accelerator, trained, *given)

    monkeypatch.setattr(script, "clip_gradients", look)
    for checkpointing in ("", "--gradient_checkpointing"):
        lcm.run(f"{student} {ROLLOUTS} {checkpointing} --max_train_steps 2 --learning_rate 1e-2")
    plain, again = seen[:2], seen[2:]
    for before, after in zip(plain, again, strict=True):
        assert all(torch.equal(*pair) for pair in zip(before, after, strict=True))
    assert sum(bool(grad.any()) for grad in again[1]) > 0.95 * len(again[1])


@pytest.mark.parametrize("damage", ["missing", "unexpected", "shape"])
def test_a_teacher_whose_weights_do_not_fit_is_refused(damage, tmp_path, lcm, sd_teacher):
    teacher = shutil.copytree(sd_teacher, tmp_path / "teacher")
    path = teacher / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    if damage == "missing":
        del weights["conv_out.bias"]
    else:
        weights["conv_out.bias" if damage == "shape" else "another"] = torch.zeros(7)
    save_file(weights, path)
    with pytest.raises((SystemExit, ValueError, RuntimeError), match="conv_out.bias|another"):
        load(lcm.args("", teacher))


def test_a_student_that_does_not_fit_is_refused(lcm, monkeypatch):
    args = lcm.args()
    teacher = script.load_teacher(args, torch.float32)
    weights = teacher.state_dict()
    del weights["conv_out.bias"]
    monkeypatch.setattr(teacher, "state_dict", lambda: weights)
    with pytest.raises(SystemExit, match="conv_out.bias"):
        script.make_student(args, teacher)


def test_a_teacher_whose_file_has_no_word_of_guidance(sd_teacher):
    """As Stable Diffusion 1.5's: diffusers would keep such a key at its default."""
    config = json.loads((sd_teacher / "unet" / "config.json").read_text())
    del config["time_cond_proj_dim"]
    teacher = UNet2DConditionModel.from_config(config)
    student = script.make_student(SimpleNamespace(unet_time_cond_proj_dim=64), teacher)
    assert student.config.time_cond_proj_dim == 64 and not student.time_embedding.cond_proj.weight.any()


def test_an_attention_mechanism_that_is_not_there_is_one_sentence(lcm):
    with pytest.raises(SystemExit, match="--attention_mechanism flash: "):
        load(lcm.args("--attention_mechanism flash"))


# ---------------------------------------------------------------------------------------------------------------------
# Draws, noise and precision
# ---------------------------------------------------------------------------------------------------------------------


def draws_at(args, positions: list[int], shape=(4, 4, 4)):
    """conditions, latents, place in the grid, w, noise and rollouts of samples whose latents are noise alone."""
    images = {"mean": torch.zeros(len(positions), *shape), "std": torch.ones(len(positions), *shape)}
    text, empty = {"prompt_embeds": torch.ones(len(positions), 1, 1)}, {"prompt_embeds": torch.zeros(1, 1, 1)}
    return script.draw(args, positions, images, text, empty, "cpu")


def test_draws_follow_from_seed_and_position_alone(lcm):
    args, other_seed = lcm.args(), lcm.args("--seed 7")

    def rows(args, positions: list[int]):
        cond, latents, index, w, eps, rollout = draws_at(args, positions)
        assert rollout is None
        drawn = (cond["prompt_embeds"], index, w, latents, eps)
        return torch.cat([values.float().flatten(1) for values in (v.reshape(len(positions), -1) for v in drawn)], 1)

    first = rows(args, [0])
    torch.randn(5)  # other random numbers change nothing
    assert torch.equal(rows(args, [0]), first) and torch.equal(rows(args, [5, 0])[1:], first)
    # Process p of P takes positions p, p + P, ...: no two processes have one in common.
    found = torch.cat([rows(args, list(range(64))), rows(other_seed, [0])])
    assert len({tuple(row.tolist()) for row in found[:, 3:]}) == 65
    eps = found[:, -64:]
    assert torch.corrcoef(eps).fill_diagonal_(0).abs().max() < 0.6  # independent rows of 64: 5 standard deviations


def test_draws_cover_the_grid_and_the_range_of_w(lcm):
    args = lcm.args("--w_min 2 --w_max 4 --num_ddim_timesteps 8 --proportion_empty_prompts 0.25")
    cond, _, index, w, *_ = draws_at(args, list(range(2000)), (1,))
    assert index.bincount().min() > 200 and set(index.tolist()) == set(range(8))  # 250 expected each
    assert 2.0 <= w.min() < 2.01 and 3.99 < w.max() <= 4.0 and abs(w.mean() - 3.0) < 0.05
    assert abs((cond["prompt_embeds"] == 0).float().mean() - 0.25) < 0.04  # four standard deviations


def test_noise_is_added_in_fp32_in_a_bf16_run(lcm, monkeypatch, watch):
    """diffusers' add_noise in bf16 is off by 4.8% in sigma at t = 19."""
    original, noise = script.draw, []

    def draw(*arguments):
        cond, latents, index, w, eps, rollout = original(*arguments)
        noise.append(eps)
        return cond, 0.0 * latents, torch.zeros_like(index), w, eps, rollout

    monkeypatch.setattr(script, "draw", draw)
    calls = watch(script, "predict")
    lcm.run("--mixed_precision bf16")
    (_, x_t, t, *_), _ = calls[-1]
    abar = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear").alphas_cumprod.double()
    assert t.tolist() == [19] * 4
    sigma = (x_t.double() / noise[0]).mean()
    assert sigma.item() == pytest.approx((1 - abar[19]).sqrt().item(), rel=1e-6)
    in_bf16 = (1 - abar.bfloat16()[19]).sqrt()
    assert abs(in_bf16 / sigma - 1) > 0.04  # that the test can tell


@pytest.mark.parametrize("cast", [True, False])
def test_a_bf16_run_has_its_teacher_in_bf16_and_all_that_is_trained_or_summed_in_fp32(cast, lcm, watch):
    predictions, losses = watch(script, "predict"), watch(script, "consistency_loss")
    lcm.run("--mixed_precision bf16" + " --no-cast_teacher_unet" * (not cast))
    (teacher, *_), out = predictions[0]
    assert {p.dtype for p in teacher.parameters()} == {torch.bfloat16 if cast else torch.float32}
    assert out.dtype == torch.bfloat16
    (student, *_), _ = predictions[2]
    assert {p.dtype for p in student.parameters()} == {torch.float32}
    assert [arguments[1].dtype for arguments, _ in predictions] == [torch.float32] * 3  # x_t, x_prev, x_t
    (f_student, f_target, *_), loss = losses[0]
    assert {f_student.dtype, f_target.dtype, loss.dtype} == {torch.float32}


def test_noise_prediction_at_zero_terminal_snr_is_refused(lcm, sd_teacher, tmp_path):
    teacher = teacher_like(sd_teacher, tmp_path / "teacher", rescale_betas_zero_snr=True)
    with pytest.raises(SystemExit, match="predicts noise at zero terminal SNR"):
        lcm.run("", teacher)


def test_velocity_at_zero_terminal_snr_trains(lcm, sd_teachers, tmp_path, monkeypatch, watch):
    teacher = teacher_like(sd_teachers["v_prediction"], tmp_path / "teacher", rescale_betas_zero_snr=True)
    original = script.draw

    def draw(*arguments):  # all of the batch at t = 999, where alpha is 0
        cond, latents, index, *others = original(*arguments)
        return cond, latents, torch.full_like(index, 49), *others

    monkeypatch.setattr(script, "draw", draw)
    calls = watch(script, "consistency_loss")
    lcm.run("--max_train_steps 2", teacher)
    assert all(torch.isfinite(loss) and loss > 0 for _, loss in calls) and len(calls) == 2


def test_a_teacher_that_is_not_there_is_one_sentence(lcm, tmp_path):
    with pytest.raises(SystemExit, match=r"--pretrained_teacher_model .*nothing: cannot be loaded \(") as stop:
        lcm.run(teacher=tmp_path / "nothing")
    assert len(str(stop.value).splitlines()) == 1


def test_a_grid_without_the_samplers_steps_is_refused_before_networks_load(lcm, monkeypatch):
    monkeypatch.setattr(script, "load_networks", lambda *_: pytest.fail("networks are loaded"))
    for flags in ("--validation_num_inference_steps 1,16", "--report_steps 16"):
        with pytest.raises(SystemExit, match="--num_ddim_timesteps 30: a sampler can take 10 .* has 16; .* 25 or "):
            lcm.run(f"--num_ddim_timesteps 30 {flags}")


def test_a_grid_that_does_not_divide_the_timesteps_trains_and_samples(lcm, watch):
    """N = 60 of the document, with the steps of a sampler of 20."""
    solvers = watch(script, "DDIMSolver")
    out = lcm.run("--num_ddim_timesteps 60 --validation_num_inference_steps 20")
    sampler = LCMScheduler.from_pretrained(out, subfolder="scheduler")
    sampler.set_timesteps(20)
    grid = solvers[0][1].timesteps.tolist()
    assert len(grid) == 60 and sampler.timesteps.tolist() == grid[::-1][::3] and grid[-1] == 999


# ---------------------------------------------------------------------------------------------------------------------
# Flags
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("flags", "expected"), [("", 1e-3), ("--scale_lr --gradient_accumulation_steps 2", 8e-3)])
def test_scale_lr_changes_the_optimizers_rate(flags, expected, lcm, watch):
    calls = watch(script, "make_optimizer")
    lcm.run(f"--learning_rate 1e-3 {flags}")
    assert calls[0][1].param_groups[0]["lr"] == pytest.approx(expected)


@pytest.mark.slow
@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_schedule_counts_optimizer_steps(accumulation, lcm, monkeypatch, logged):
    monkeypatch.setattr(script, "LOG_EVERY", 1)
    flags = "--max_train_steps 4 --train_batch_size 2 --learning_rate 1e-3 --lr_scheduler linear"
    lcm.run(f"{flags} --gradient_accumulation_steps {accumulation}")
    assert [values["lr"] for _, values in logged] == pytest.approx([0.75e-3, 0.5e-3, 0.25e-3, 0.0])


@pytest.mark.slow
def test_the_schedule_goes_on_after_a_resume(lcm, monkeypatch, logged):
    monkeypatch.setattr(script, "LOG_EVERY", 1)
    flags = "--lr_scheduler sine --lr_warmup_steps 1 --learning_rate 1e-3 --lr_end 1e-4 --lora_rank 2 "
    flags += "--checkpointing_steps 2 --max_train_steps 4"
    lcm.run(flags)
    lcm.run(flags + " --resume_from_checkpoint checkpoint-2")
    lrs = [(step, values["lr"]) for step, values in logged]
    assert [step for step, _ in lrs] == [1, 2, 3, 4, 3, 4] and lrs[4:] == lrs[2:4]
    assert lrs[3][1] == pytest.approx(1e-4)


@pytest.mark.parametrize("method", ["norm", "value"])
def test_what_max_grad_norm_bounds(method, lcm):
    """With plain sign updates the two could not be told apart: the moments are what the optimizer saw."""
    out = lcm.run(f"--lora_rank 2 --max_grad_norm 1e-4 --grad_clip_method {method} --adam_beta1 0.5")
    moments = torch.load(out / "checkpoint-1" / "student.optimizer.pt", weights_only=True)["state"]
    grads = torch.cat([state["exp_avg"].flatten() * 2.0 for state in moments.values()])  # after one step
    if method == "norm":
        assert grads.norm().item() == pytest.approx(1e-4, rel=1e-3)
    else:
        assert grads.abs().max().item() == pytest.approx(1e-4, rel=1e-5) and grads.norm() > 2e-4


@pytest.mark.slow
@pytest.mark.parametrize("proportion", [0.0, 1.0])
def test_proportion_of_empty_prompts(proportion, lcm, sd_teacher, watch):
    calls = watch(script, "predict")
    lcm.run(f"--proportion_empty_prompts {proportion}")
    empty, _ = StableDiffusionPipeline.from_pretrained(sd_teacher).encode_prompt("", "cpu", 1, False)
    (_, _, _, cond, _), _ = calls[-1]
    same = [torch.allclose(row, empty[0], atol=1e-6) for row in cond["prompt_embeds"]]
    assert same == [proportion == 1.0] * 4


@pytest.mark.parametrize(
    ("flags", "w"), [("", 3.0), ("--validation_guidance 4", 3.0), ("--validation_guidance 0", 2.0)]
)
def test_pictures_stay_in_the_trained_range_of_guidance(flags, w, lcm):
    args, _, notes = lcm.parse(f"--w_min 2 --w_max 4 {flags}")
    assert script.middle_w(args) == w
    assert any("--validation_guidance 0" in note for note in notes) == (w == 2.0)


@pytest.mark.parametrize(
    ("flags", "guidance_scale"),
    [
        ("--validation_guidance 0", 3.0), ("--lora_rank 2", 1.0), ("--lora_rank 2 --validation_guidance 0", 1.0),
        ("--model_type lora --validation_guidance 1.5", 1.5),
    ],
)  # fmt: skip
def test_pictures_of_a_student_have_its_own_guidance(flags, guidance_scale, lcm, watch):
    calls = watch(script, "generate")
    lcm.run(f"--w_min 2 --w_max 4 {flags}")
    assert [arguments[7] for arguments, _ in calls] == [guidance_scale]


def test_guidance_on_top_of_a_loras_own_changes_its_pictures_and_is_warned_about(lcm, watch):
    """The teacher's stay at what the LoRA learns."""
    calls = watch(script, "generate")
    for guidance in (1, 3.4):
        _, _, notes = lcm.parse(f"--lora_rank 2 --validation_guidance {guidance}")
        assert any("--validation_guidance 3.4: the LoRA's pictures have it on top" in n for n in notes) == (
            guidance > 1
        )
        lcm.run(f"--lora_rank 2 --validation_guidance {guidance}", benchmark=True, out=str(guidance))
    pictures = [np.asarray(pictures[0]).astype(int) for _, pictures in calls]  # student, teacher, student, teacher
    assert np.abs(pictures[0] - pictures[2]).max() > 5 and np.array_equal(pictures[1], pictures[3])
    assert [arguments[7] for arguments, _ in calls] == [1.0, 11.0, 3.4, 11.0]


@pytest.mark.parametrize(
    ("flags", "said"), [("--lora_rank 2", True), ("--lora_rank 2 --w_min 4 --w_max 4", False), ("", False)]
)
def test_a_lora_over_a_range_of_w_is_warned_about(flags, said, lcm):
    warnings = [note for note in lcm.parse(flags)[2] if "is not told w" in note]
    assert len(warnings) == said
    for text in (
        "--w_min 5 and --w_max 15",
        "guidance_scale 6 to 16, near to 11",
        "--w_min 10 --w_max 10 makes it one",
    ):
        assert all(text in warning for warning in warnings)


def test_lora_type_means_a_lora(lcm):
    assert lcm.args("--lora_type standard").model_type == "lora" and lcm.args().model_type == "full"


# ---------------------------------------------------------------------------------------------------------------------
# 8 bits
# ---------------------------------------------------------------------------------------------------------------------


def linear_weights(network) -> list[torch.Tensor]:
    layers = [m for m in network.modules() if type(m) is torch.nn.Linear]
    return [layer.weight for layer in layers if not layer.weight.requires_grad]


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "error"), [("int8-torchao", 0.02), ("fp8-torchao", 0.1)])
def test_a_lora_trains_on_a_base_in_8_bits_and_loads_on_the_plain_one(
    precision, error, lcm, sd_teacher, monkeypatch, watch
):
    networks = perturb(monkeypatch, script, lambda network, *_: randomize_adapters(network, std=0.1))
    calls = watch(script, "predict")
    out = lcm.run(f"--lora_rank 4 --base_model_precision {precision} --learning_rate 1e-2")
    unet = networks[0]
    kinds = {type(weight).__name__ for weight in linear_weights(unet)}
    assert kinds == {"Int8Tensor" if "int8" in precision else "Float8Tensor"}

    # The teacher of the run is that base with the adapters off: near the plain one, but not the same.
    (_, x, t, cond, *_), found = calls[0]
    plain = StableDiffusionPipeline.from_pretrained(sd_teacher)
    with torch.no_grad():
        expected = plain.unet(x, t, cond["prompt_embeds"]).sample
    distance = ((found - expected).norm() / expected.norm()).item()
    assert 1e-6 < distance < error

    plain.load_lora_weights(out)
    x, t, cond = tiny_inputs()
    with torch.no_grad():
        ours, loaded = (network.eval()(x, t, cond).sample for network in (unet, plain.unet))
    assert ((ours - loaded).norm() / loaded.norm()).item() < error


@pytest.mark.slow
def test_a_resumed_run_is_the_same_bit_for_bit(lcm, watch, logged):
    """With all that has random numbers or weights of its own: DoRA, 8 bits, dropout, rollouts."""
    losses = watch(script, "consistency_loss")
    flags = "--use_dora --lora_rank 2 --lora_dropout 0.3 --base_model_precision int8-torchao --learning_rate 1e-3"
    flags += " --scheduled_sampling_max_step_offset 10 --scheduled_sampling_probability 0.5"
    once = lcm.run(f"{flags} --max_train_steps 3", out="once")
    parts = lcm.run(f"{flags} --max_train_steps 1", out="parts")
    lcm.run(f"{flags} --max_train_steps 3 --resume_from_checkpoint latest", out="parts")
    weights, again = (load_file(out / "checkpoint-3" / "student.safetensors") for out in (once, parts))
    assert weights.keys() == again.keys() and all(torch.equal(weights[name], again[name]) for name in weights)
    found = [loss.item() for _, loss in losses]
    assert found[3:] == found[:3]
    step, values = logged[-1]
    assert step == 3 and values["loss"] == pytest.approx(sum(found[4:]) / 2)  # the mean since the resume


def test_a_full_student_has_a_teacher_in_8_bits_and_all_of_its_own(lcm):
    args = lcm.args("--base_model_precision int8-torchao --quantize_via cpu")
    networks = load(args)
    plain = script.load_teacher(args, torch.float32)
    assert {type(weight).__name__ for weight in linear_weights(networks[0])} == {"Int8Tensor"}
    for student in networks[1:]:
        weights = student.state_dict()
        assert all(torch.equal(weights[name], value) for name, value in plain.state_dict().items())


@pytest.mark.parametrize("student", ["--lora_rank 2", "--model_type full"])
def test_pictures_are_generated_in_8_bits_and_bf16(student, lcm):
    """Pipelines keep samples in fp32, and autocast does not reach layers of 8 bits."""
    flags = f"--base_model_precision int8-quanto --mixed_precision bf16 --validation_num_inference_steps 2 {student}"
    out = lcm.run(flags, benchmark=True)
    assert np.asarray(Image.open(out / "samples.png")).std() > 5


def test_text_encoder_in_8_bits(lcm):
    embeds = []
    for flags in ("", "--text_encoder_1_precision int8-torchao"):
        encoder = script.load_text_encoder(lcm.args(flags), torch.device("cpu"), torch.float32)
        with torch.no_grad():
            embeds.append(script.encode_prompts(encoder, ["a small red circle"])["prompt_embeds"])
    assert 0 < (embeds[1] - embeds[0]).norm() / embeds[0].norm() < 0.05


@pytest.mark.slow
def test_embeddings_of_another_precision_are_not_taken_from_the_cache(lcm, tmp_path):
    for flags in ("", "--text_encoder_1_precision int8-torchao"):
        lcm.run(flags + f" --cache_dir_text {tmp_path / 'shared'}")
    assert len(list((tmp_path / "shared").iterdir())) == 2


# ---------------------------------------------------------------------------------------------------------------------
# Compilation
# ---------------------------------------------------------------------------------------------------------------------

ONE_LEVEL = {
    "down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("CrossAttnUpBlock2D",), "block_out_channels": (8,)
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("blocks", "flags"),
    [
        (ONE_LEVEL, f"--lora_rank 2 --lora_dropout 0.1 --ema_decay 0.9 --gradient_checkpointing {ROLLOUTS}"),
        (ONE_LEVEL, "--lora_rank 2 --mixed_precision bf16"),
        (REAL_SD, "--model_type full --gradient_checkpointing"),
    ],
)
def test_compile_makes_graphs_where_a_shape_is_new_alone(blocks, flags, lcm, two_shapes, graphs, monkeypatch, tmp_path):
    """Ten steps on two shapes, with pictures between: no later step waits for the compiler, and none is without it."""
    teacher = tiny_pipeline(tmp_path / "teacher", unet=blocks)
    check_graphs(script, lcm, teacher, f"{flags} {two_shapes}", graphs, monkeypatch)


# ---------------------------------------------------------------------------------------------------------------------
# Rollouts and flow velocities
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["", "--lora_rank 2 --lora_dropout 0.3"])
def test_rolled_out_samples_are_the_students_without_gradient(kind, lcm, watch):
    flags = f"{kind} --scheduled_sampling_max_step_offset 10 --scheduled_sampling_probability "
    inputs, calls = {}, watch(script, "predict")
    for probability in ("0.0001", "1"):
        calls.clear()
        lcm.run(flags + probability)
        assert len(calls) == 4 and not calls[0][1].requires_grad and calls[3][1].requires_grad
        rolled, student = calls[0][0], calls[3][0]
        assert rolled[0] is student[0] and (rolled[2] >= student[2]).all()
        inputs[probability] = student[1], student[2], rolled[2]
    (x, t, _), (x_rolled, t_rolled, t_above) = inputs["0.0001"], inputs["1"]
    assert torch.equal(t, t_rolled)  # other draws do not change
    changed = (x != x_rolled).flatten(1).any(1)
    assert torch.equal(changed, t_above > t) and changed.any()


@pytest.mark.slow
def test_the_flow_loss_is_on_velocities(lcm, sd_teacher, watch):
    """v = eps - x0 on the flow's own path: with x = alpha x0 + sigma eps, at the student's input."""
    networks, losses = watch(script, "predict"), watch(script, "consistency_loss")
    lcm.run("--lora_rank 2")
    lcm.run("--lora_rank 2 --diff2flow_loss")
    (x0, x0_target, *_), (v, v_target, *_) = (arguments for arguments, _ in losses)
    (_, x_t, t, *_), _ = networks[2]
    abar = StableDiffusionPipeline.from_pretrained(sd_teacher).scheduler.alphas_cumprod.double()
    for clean, velocity in ((x0, v), (x0_target, v_target)):
        clean, velocity = clean.detach().double(), velocity.detach().double()
        alpha, sigma = (table[t][:, None, None, None] for table in (abar.sqrt(), (1 - abar).sqrt()))
        # what the flow model says must give the same noisy sample back: x_t = (alpha + sigma) x0 + sigma v
        torch.testing.assert_close((alpha + sigma) * clean + sigma * velocity, x_t.double(), rtol=1e-3, atol=1e-3)
    assert losses[1][1] > losses[0][1]


# ---------------------------------------------------------------------------------------------------------------------
# Waits for the device
# ---------------------------------------------------------------------------------------------------------------------


STREAMED = "--lora_rank 4 --ema_decay 0.5 --lora_dropout 0.1 --vae_cache_disable --proportion_empty_prompts 0.5"
STREAMED += " --scheduled_sampling_probability 0.5 --scheduled_sampling_max_step_offset 5 --optimizer lion"


@pytest.mark.parametrize("flags", ["--loss_type huber --diff2flow_loss", STREAMED])
def test_the_loop_does_not_wait_for_the_device(flags, lcm):
    assert steps_without_waits(script, *lcm.parse(f"{flags} --max_train_steps 2")) == 2


def test_the_mask_of_a_text_encoder_is_where_its_tokens_are(lcm, sd_teacher, tmp_path):
    teacher = teacher_like(sd_teacher, tmp_path / "masked")
    config = teacher / "text_encoder" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"use_attention_mask": True}))
    args, tokens = lcm.args("", teacher), []
    with played_device():
        encoder = script.load_text_encoder(args, PLAYED, torch.float32)
        watch = {"with_kwargs": True}
        encoder[1].register_forward_pre_hook(
            lambda _, ids, more: tokens.extend([*ids, more["attention_mask"]]), **watch
        )
        script.encode_prompts(encoder, ["a red ball"])
        assert [each.device.type for each in tokens] == [PLAYED.type] * 2


def test_a_wait_that_somebody_adds_is_found(lcm, monkeypatch):
    monkeypatch.setattr(script, "consistency_loss", lambda prediction, *_: prediction.mean() * prediction.mean().item())
    with pytest.raises(AssertionError, match="_local_scalar_dense.*waits for the device"):
        steps_without_waits(script, *lcm.parse())


# ---------------------------------------------------------------------------------------------------------------------
# Validation and evaluation
# ---------------------------------------------------------------------------------------------------------------------


def test_the_negative_prompt_reaches_the_teachers_pictures_alone(lcm, sd_teacher, watch):
    calls = watch(script, "generate")
    lcm.run("--validation_negative_prompt blue --model_type full", benchmark=True)
    negatives = {type(arguments[3]).__name__: arguments[5]["prompt_embeds"] for arguments, _ in calls}
    pipe = StableDiffusionPipeline.from_pretrained(sd_teacher)
    for sampler, prompt in (("DDIMScheduler", "blue"), ("LCMScheduler", "")):
        expected, _ = pipe.encode_prompt(prompt, "cpu", 1, False)
        torch.testing.assert_close(negatives[sampler], expected, rtol=0, atol=1e-5)


def test_one_block_of_rows_for_each_size(lcm, watch):
    calls = watch(script, "generate")
    out = lcm.run("--validation_resolution 32x32,48x32 --validation_num_inference_steps 1,2")
    assert [picture.size for _, (picture,) in calls] == [(32, 32), (32, 32), (48, 32), (48, 32)]
    sheet = Image.open(out / "samples.png")
    assert sheet.width > 48 * 4 and sheet.height > 4 * 128


def test_previews_are_the_half_done_samples(lcm, tmp_path, monkeypatch):
    tiny = tiny_autoencoder(tmp_path / "tiny")
    seen, original = [], StableDiffusionPipeline.__call__

    def watched(self, *arguments, callback_on_step_end, **options):
        def both(pipeline, i, t, tensors):
            if callback_on_step_end:
                seen.append(tensors["latents"].clone())
                return callback_on_step_end(pipeline, i, t, tensors)
            return {}

        return original(self, *arguments, callback_on_step_end=both, **options)

    monkeypatch.setattr(StableDiffusionPipeline, "__call__", watched)
    flags = "--validation_preview --validation_preview_steps 2 --validation_num_inference_steps 5"
    out = lcm.run(f"{flags} --validation_preview_model {tmp_path / 'tiny'} --report_to tensorboard")
    files = sorted((out / "validation").glob("preview-*"))
    assert [path.name for path in files] == [f"preview-5-steps-step0{i}-000001.png" for i in (2, 4)]
    with torch.no_grad():
        expected = tiny.decode(seen[3]).sample[0].clamp(-1, 1).permute(1, 2, 0) * 127.5 + 127.5
    assert np.abs(np.asarray(Image.open(files[1])).astype(float) - expected.numpy()).max() <= 1.0
    events = [path.read_bytes() for path in (out / "logs").rglob("*tfevents*")]
    assert any(b"preview-5-steps-step04" in data for data in events)


@pytest.mark.slow
def test_the_clip_scores_are_logged_and_reported(lcm, tiny_clip, tmp_path, logged, watch):
    generated = watch(script, "generate")
    (tmp_path / "prompts.json").write_text(json.dumps({"a": "a red circle", "b": "a large blue square"}))
    flags = f"--evaluation_type clip --evaluation_clip_model {tiny_clip} --validation_num_inference_steps 2"
    out = lcm.run(f"{flags} --validation_prompt_library {tmp_path / 'prompts.json'} --report_steps 1")
    scores = ClipScore(str(tiny_clip), "cpu")(generated[0][1], ["a red circle", "a large blue square", "red"])
    values = next(values for _, values in logged if "clip_score/2 steps/mean" in values)
    expected = [scores.min(), scores.max(), scores.mean(), scores.std(correction=0)]
    found = [values[f"clip_score/2 steps/{name}"] for name in ("min", "max", "mean", "std")]
    assert found == pytest.approx([value.item() for value in expected], abs=1e-4)
    rows = json.loads((out / "report.json").read_text())
    assert all(0.0 <= row["clip_score"] <= 100.0 for row in rows) and rows[1]["clip_score"] > 0.0


def test_a_clip_that_is_not_there_is_known_before_training(lcm, tmp_path):
    with pytest.raises(SystemExit, match="--evaluation_clip_model /no/such: cannot be loaded"):
        lcm.run("--evaluation_type clip --evaluation_clip_model /no/such")
    assert not list((tmp_path / "out").glob("checkpoint-*"))


@pytest.mark.slow
def test_the_eval_loss_is_the_same_for_the_same_weights(lcm, logged):
    """Whatever the seed and the batch are; and another one for other weights."""
    found = []
    for flags in ("", "--seed 7 --train_batch_size 2", "--learning_rate 1e-2"):
        rate = "" if "rate" in flags else "--learning_rate 1e-30"
        lcm.run(f"--lora_rank 2 --eval_steps 1 --eval_samples 2 {rate} {flags}", out=f"out{len(found)}")
        found.append({k: v for _, values in logged for k, v in values.items() if k.startswith("eval_loss")})
        logged.clear()
    assert found[0].keys() == {"eval_loss", *(f"eval_loss/{place}" for place in (6, 18, 31, 43))}
    assert found[1] == pytest.approx(found[0], rel=1e-6)
    assert found[2]["eval_loss"] != pytest.approx(found[0]["eval_loss"], rel=1e-3)
    assert all(math.isfinite(value) and value > 0 for value in found[0].values())


@pytest.mark.slow
def test_held_out_samples_are_not_trained_on(lcm, monkeypatch, watch, capsys):
    evaluated = watch(script, "held_out_loss")
    trained, encode = set(), script.SampleEncoder.encode_images

    def encode_images(self, samples):
        if len(samples) > 1:
            trained.update(sample.key for sample in samples)
        return encode(self, samples)

    monkeypatch.setattr(script.SampleEncoder, "encode_images", encode_images)
    lcm.run(
        "--lora_rank 2 --eval_steps 2 --eval_samples 3 --max_train_steps 4 --train_batch_size 8 --vae_cache_disable"
    )
    held_out = {sample.key for sample in evaluated[0][0][2]}
    assert len(held_out) == 3 and len(trained) == 13 and not held_out & trained
    assert "held out for --eval_steps" in capsys.readouterr().out


@pytest.mark.slow
def test_evaluation_changes_nothing(lcm):
    """Neither pictures, evaluation nor report leaves a trace in what is trained."""
    flags = "--lora_rank 2 --lora_dropout 0.3 --learning_rate 1e-2 --max_train_steps 3"
    more = "--validation_steps 1 --report_steps 1 --checkpointing_steps 1"
    plain, shown = lcm.run(flags, out="plain"), lcm.run(f"{flags} {more}", out="shown", benchmark=True)
    weights, same = (load_file(out / "checkpoint-3" / "student.safetensors") for out in (plain, shown))
    assert all(torch.equal(value, same[name]) for name, value in weights.items())


def test_a_run_tells_its_webhook(lcm, tmp_path, server, capsys):
    """Progress, pictures, the end, and what ends it before."""
    (tmp_path / "hook.json").write_text(json.dumps({"webhook_url": server.url, "level": "info"}))
    flags = f"--lora_rank 2 --webhook_config {tmp_path / 'hook.json'}"
    out = lcm.run(flags)
    assert [message["type"] for message in server.received] == ["progress", "picture", "end"]
    progress, picture, _ = server.received
    assert (progress["step"], progress["of"], picture["name"]) == (1, 1, "grid") and progress["loss"] > 0
    assert server.url not in (out / "README.md").read_text()  # it may hold a secret
    with pytest.raises(SystemExit):
        lcm.run(f"{flags} --num_ddim_timesteps 1001")
    assert server.received[-1]["type"] == "error" and "--num_ddim_timesteps 1001" in server.received[-1]["message"]
    server.shutdown()
    server.server_close()
    out = lcm.run(flags, out="again")  # nobody listens any more
    assert "--webhook_config: 3 messages were not delivered" in capsys.readouterr().out
    assert (out / "pytorch_lora_weights.safetensors").exists()


@pytest.mark.slow
def test_the_report_ranks_a_student_that_is_the_teacher(lcm):
    """A teacher with more steps is nearer to its own 50; table, plot and card are there."""
    out = lcm.run("--report_steps 2,25 --learning_rate 1e-30")
    rows = json.loads((out / "report.json").read_text())
    found = {(row["sampler"], row["steps"]): row for row in rows}
    assert set(found) == {("teacher", 50), *((who, n) for who in ("teacher", "student") for n in (2, 25))}
    assert found["teacher", 50]["distance"] == 0.0
    assert 0 < found["teacher", 25]["distance"] < found["teacher", 2]["distance"]
    assert all(row["seconds"] > 0 for row in rows)
    assert Image.open(out / "report.png").size == (560, 360)
    card = (out / "README.md").read_text()
    assert "| student | 25 |" in card and "report.png" in card


# ---------------------------------------------------------------------------------------------------------------------
# What a run leaves behind
# ---------------------------------------------------------------------------------------------------------------------


def test_tensorboard_gets_curves_and_pictures_and_nobody_the_token(lcm, monkeypatch):
    flags = "--validation_steps 1 --report_to tensorboard --hub_token hf_secret"
    monkeypatch.setattr(sys, "argv", ["train_lcm_distill_sd.py", *flags.split()])
    out = lcm.run(flags)
    files = [path for path in out.rglob("*") if path.is_file()]
    assert any(b"validation_seed" in path.read_bytes() for path in files)  # settings are logged, but for the token
    assert [path for path in files if b"hf_secret" in path.read_bytes()] == []
    (folder,) = {
        path.parent for path in files if "tfevents" in path.name and path.parent.name == "text2image-fine-tune"
    }
    events = EventAccumulator(str(folder)).Reload().Tags()
    assert "grid" in events["images"] and {"loss", "lr"} <= set(events["scalars"])


@pytest.mark.slow
@pytest.mark.parametrize("flags", ["--lora_rank 4 --lora_alpha 8", "--lora_rank 4 --lora_alpha 8 --use_dora"])
def test_an_exported_lora_loads_in_the_stock_pipeline(flags, lcm, sd_teacher, monkeypatch):
    """And the kohya file of it is the same LoRA."""
    networks = perturb(monkeypatch, script, randomize_adapters)
    kohya = "" if "dora" in flags else "--export_formats diffusers,kohya"  # diffusers reads no kohya file with DoRA
    out = lcm.run(f"{flags} {kohya} --max_train_steps 2 --learning_rate 1e-2")
    x, t, cond = tiny_inputs()
    names = ["pytorch_lora_weights.safetensors"] + ["kohya_lora.safetensors"] * bool(kohya)
    assert {path.name for path in out.glob("*lora*.safetensors")} == set(names)
    with torch.no_grad():
        ours = networks[1].eval()(x, t, cond).sample
        for name in names:
            pipe = StableDiffusionPipeline.from_pretrained(sd_teacher)
            base = pipe.unet(x, t, cond).sample
            pipe.load_lora_weights(out, weight_name=name)
            loaded = pipe.unet.eval()(x, t, cond).sample
            assert (loaded - base).abs().mean() > 1e-2
            torch.testing.assert_close(loaded, ours, rtol=0, atol=1e-6)


def test_an_exported_student_loads_in_stock_diffusers(lcm, monkeypatch):
    networks = perturb(monkeypatch, script, lambda *_: None)
    out = lcm.run("--num_ddim_timesteps 25 --timestep_scaling_factor 5 --learning_rate 1e-2")
    target = networks[2].state_dict()
    for variant, dtype in ((None, torch.float32), ("fp16", torch.float16)):
        unet = UNet2DConditionModel.from_pretrained(out, variant=variant, dtype=dtype)
        assert unet.config.time_cond_proj_dim == 256
        assert all(torch.equal(value, target[name].to(dtype)) for name, value in unet.state_dict().items())
    scheduler = LCMScheduler.from_pretrained(out, subfolder="scheduler")
    assert (scheduler.config.original_inference_steps, scheduler.config.timestep_scaling) == (25, 5.0)
    assert scheduler.config.prediction_type == "epsilon"
