"""Solvers and samplers against diffusers' own schedulers."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, FlowMatchLCMScheduler, LCMScheduler

from common.solvers import (
    DDIMSolver,
    block_lengths,
    boundary_scalings,
    denoising_steps,
    expand_to,
    flow_grid,
    flow_trajectory,
    noised,
    roll_out,
    sampled_x_t,
    shift_time,
    stock_scheduler,
    student_scheduler,
    to_x0_eps,
    unshift_time,
)

PREDICTION_TYPES = ["epsilon", "v_prediction", "sample"]


def ddim(prediction_type: str = "epsilon", **settings) -> DDIMScheduler:
    """Stable Diffusion's, on the grid T - 1, T - 1 - k, ... that latent consistency models use."""
    return DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
        timestep_spacing="trailing", prediction_type=prediction_type, **settings,
    )  # fmt: skip


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------------------------------------------------------------
# DDIM
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [50, 8, 1000])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_a_solver_step_is_a_step_of_ddim(prediction_type, steps):
    scheduler = ddim(prediction_type)
    scheduler.set_timesteps(steps)
    solver = DDIMSolver(scheduler.alphas_cumprod, steps, prediction_type)
    assert solver.timesteps.tolist() == scheduler.timesteps.tolist()[::-1]

    out, x_t = noise(steps, 4, 3, seed=1), noise(steps, 4, 3, seed=2)
    t, index = solver.timesteps, torch.arange(steps)
    x0, eps = solver.x0_eps(out, x_t, t)
    x_prev = solver.step(x0, eps, index)
    expected = [scheduler.step(out[i], t[i].item(), x_t[i]) for i in index]
    # The same fp32 operations in the same order, so bit for bit.
    assert torch.equal(x0, torch.stack([e.pred_original_sample for e in expected]))
    assert torch.equal(x_prev, torch.stack([e.prev_sample for e in expected]))


def test_the_solver_ends_at_the_first_timestep():
    solver = DDIMSolver(ddim().alphas_cumprod, 50)
    assert solver.timesteps_prev[:2].tolist() == [0, 19] and solver.timesteps[-1] == 999


def test_solver_tables_are_fp32_whatever_the_schedule_is():
    solver = DDIMSolver(ddim().alphas_cumprod.double(), 50)
    assert {solver.alphas.dtype, solver.sigmas.dtype} == {torch.float32}
    assert solver.step(noise(2, 4), noise(2, 4), torch.tensor([0, 49])).dtype == torch.float32


def test_a_solver_moves_with_all_its_tables():
    solver = DDIMSolver(ddim().alphas_cumprod, 50).to("meta")
    assert {value.device.type for value in vars(solver).values() if torch.is_tensor(value)} == {"meta"}


@pytest.mark.parametrize("steps", [0, 1001])
def test_a_grid_has_no_more_points_than_there_are_timesteps(steps):
    with pytest.raises(ValueError, match=f"--num_ddim_timesteps {steps}: must be 1 to the teacher's 1000 timesteps"):
        DDIMSolver(ddim().alphas_cumprod, steps)


@pytest.mark.parametrize(("n", "most"), [(50, 50), (60, 20), (75, 25), (80, 40), (64, 8), (30, 10), (7, 1), (1000, 99)])
def test_the_exported_sampler_takes_points_of_the_solvers_grid(n, most):
    """With any number of steps that it can take, and the grid is the one that diffusers calls trailing."""
    scheduler = ddim()
    solver = DDIMSolver(scheduler.alphas_cumprod, n, most_steps=most)
    trailing = DDIMScheduler.from_config(scheduler.config, timestep_spacing="trailing")
    trailing.set_timesteps(n)
    assert solver.timesteps.tolist() == trailing.timesteps.tolist()[::-1] and solver.timesteps[-1] == 999
    assert solver.timesteps_prev.tolist() == [0, *solver.timesteps[:-1].tolist()]
    sampler = student_scheduler(SimpleNamespace(num_ddim_timesteps=n, timestep_scaling_factor=10.0), scheduler)
    for steps in {1, 2, 4, 8, most} & set(range(1, most + 1)):
        sampler.set_timesteps(steps)
        assert len(sampler.timesteps) == steps and sampler.timesteps[0] == 999
        assert set(sampler.timesteps.tolist()) <= set(solver.timesteps.tolist())


def test_a_step_between_uneven_points_is_exact():
    """Against the closed form in float64, between points 12 and 13 timesteps apart."""
    scheduler = ddim()
    solver, abar = DDIMSolver(scheduler.alphas_cumprod, 80), scheduler.alphas_cumprod.double()
    assert set((solver.timesteps - solver.timesteps_prev).tolist()) == {11, 12, 13}
    index = torch.arange(80)
    x0, eps = noise(80, 4).double(), noise(80, 4, seed=1).double()
    a = abar[solver.timesteps_prev][:, None]
    torch.testing.assert_close(solver.step(x0, eps, index), a.sqrt() * x0 + (1 - a).sqrt() * eps, rtol=0, atol=1e-6)


def test_an_error_names_grids_that_pass():
    for n, most in ((55, 8), (49, 8), (60, 25)):
        with pytest.raises(ValueError, match=rf"{n}: a sampler can take .* has {most}; it can on that of \d") as error:
            DDIMSolver(ddim().alphas_cumprod, n, most_steps=most)
        advised = [int(word) for word in str(error.value).rpartition("that of ")[2].split(" or ")]
        assert len(advised) == 2
        for other in advised:
            DDIMSolver(ddim().alphas_cumprod, other, most_steps=most)


def test_noise_cannot_be_predicted_where_nothing_but_noise_is():
    abar = ddim(rescale_betas_zero_snr=True).alphas_cumprod
    with pytest.raises(ValueError, match="predicts noise at zero terminal SNR"):
        DDIMSolver(abar, 50)
    solver, t = DDIMSolver(abar, 50, "v_prediction"), torch.tensor([999])
    x0, eps = solver.x0_eps(noise(1, 4), noise(1, 4, seed=1), t)
    assert torch.isfinite(x0).all() and torch.isfinite(solver.step(x0, eps, torch.tensor([49]))).all()


# ---------------------------------------------------------------------------------------------------------------------
# Conversions
# ---------------------------------------------------------------------------------------------------------------------


def test_an_unknown_prediction_type_is_refused():
    with pytest.raises(ValueError, match="'flow'.*epsilon, v_prediction or sample"):
        to_x0_eps(noise(1, 2), noise(1, 2), torch.ones(1), torch.ones(1), "flow")


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_clean_sample_and_noise_make_up_x_t(prediction_type):
    abar = ddim().alphas_cumprod[torch.tensor([0, 19, 500, 999])]
    alpha, sigma, x_t = abar.sqrt(), (1 - abar).sqrt(), noise(4, 8, seed=1)
    x0, eps = to_x0_eps(noise(4, 8), x_t, alpha, sigma, prediction_type)
    torch.testing.assert_close(expand_to(alpha, x_t) * x0 + expand_to(sigma, x_t) * eps, x_t, rtol=0, atol=1e-6)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_conversion_is_fp32_for_bf16_outputs(prediction_type):
    alpha, sigma, x_t = torch.full((1,), 0.9), torch.full((1,), 0.1**0.5), noise(1, 100)
    out = noise(1, 100, seed=1).bfloat16()
    in_bf16 = to_x0_eps(out, x_t, alpha, sigma, prediction_type)
    in_fp32 = to_x0_eps(out.float(), x_t, alpha, sigma, prediction_type)
    for ours, expected in zip(in_bf16, in_fp32, strict=True):
        assert ours.dtype == torch.float32 and torch.equal(ours, expected)


def test_conversions_and_noising_against_float64():
    """Also that fp32 tables keep sigma where bf16 loses 5% of it."""
    solver = DDIMSolver(ddim().alphas_cumprod, 50)
    rng = np.random.default_rng(0)
    latents, eps = rng.normal(size=(1, 4)), rng.normal(size=(1, 4))
    for t in (19, 500, 999):
        a = float(np.prod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000)[: t + 1] ** 2))
        x_t = a**0.5 * latents + (1 - a) ** 0.5 * eps
        v = a**0.5 * eps - (1 - a) ** 0.5 * latents
        alpha, sigma = solver.alphas[t].reshape(1), solver.sigmas[t].reshape(1)
        assert sigma.item() == pytest.approx((1 - a) ** 0.5, rel=1e-4)
        ours = noised(torch.tensor(latents), torch.tensor(eps), torch.tensor([t]), solver)
        np.testing.assert_allclose(ours.numpy(), x_t, atol=2e-4)
        for kind, out in (("epsilon", eps), ("v_prediction", v), ("sample", latents)):
            x0, found = to_x0_eps(torch.tensor(out), torch.tensor(x_t), alpha, sigma, kind)
            # epsilon divides by alpha, 0.07 at t = 999
            np.testing.assert_allclose(x0.numpy(), latents, atol=2e-4)
            np.testing.assert_allclose(found.numpy(), eps, atol=2e-4)


# ---------------------------------------------------------------------------------------------------------------------
# The student's own sampler
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scaling", [10.0, 1.0, 0.01])
def test_boundary_scalings_are_those_of_the_scheduler_that_ships_with_the_student(scaling):
    args = SimpleNamespace(num_ddim_timesteps=25, timestep_scaling_factor=scaling)
    scheduler = student_scheduler(args, ddim("v_prediction"))
    assert isinstance(scheduler, LCMScheduler) and scheduler.config.prediction_type == "v_prediction"
    assert scheduler.config.original_inference_steps == 25
    t = torch.arange(1000)
    expected = [scheduler.get_scalings_for_boundary_condition_discrete(float(i)) for i in t]
    for ours, theirs in zip(boundary_scalings(t, scaling), zip(*expected, strict=True), strict=True):
        torch.testing.assert_close(ours.double(), torch.tensor(theirs, dtype=torch.float64), rtol=3e-7, atol=0)


def test_the_consistency_function_keeps_what_is_at_timestep_0():
    c_skip, c_out = boundary_scalings(torch.tensor([0]), 10.0)
    assert (c_skip.item(), c_out.item()) == (1.0, 0.0)


def test_a_rollout_is_one_step_of_the_students_own_sampler():
    """Against LCMScheduler, for a student that says x0 = 0.3 x; boundary scalings are 0 and 1 at these timesteps."""
    lcm = LCMScheduler(beta_schedule="scaled_linear", prediction_type="sample", clip_sample=False)
    solver = DDIMSolver(lcm.alphas_cumprod, 50)
    rng = torch.Generator().manual_seed(0)
    x_t, latents, eps, renoise = (torch.randn(4, 4, 2, 2, generator=rng) for _ in range(4))
    index, offset = torch.tensor([10, 20, 40, 49]), torch.tensor([5, 0, 20, 3])
    found = sampled_x_t(lambda x, t: 0.3 * x, solver, x_t, latents, eps, index, offset, renoise)
    for i, above in ((0, 15), (2, 49)):
        t, t_above = (solver.timesteps[place].item() for place in (index[i], above))
        lcm.set_timesteps(timesteps=[t_above, t])
        x = lcm.add_noise(latents[i], eps[i], torch.tensor([t_above]))
        x0 = lcm.step(0.3 * x, t_above, x).denoised
        expected = lcm.add_noise(x0, renoise[i], torch.tensor([t]))
        torch.testing.assert_close(found[i], expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(found[1], x_t[1]) and torch.equal(found[3], x_t[3])  # not rolled out; nothing lies above


# ---------------------------------------------------------------------------------------------------------------------
# Flow matching
# ---------------------------------------------------------------------------------------------------------------------

# ---------------------------------------------------------------------------------------------------------------------
# Timesteps
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, shift, expected",
    [
        ("1000,757,522", 1.0, [1000, 757, 522]),
        ("1000,500", 7.0, [1000, 500]),
        ("4", 5.0, [1000, 937.5, 833.333333, 625]),
        ("2", 1.0, [1000, 500]),
        ("1000", 1.0, [1000]),
    ],
)
def test_steps_are_listed_or_counted(text, shift, expected):
    assert denoising_steps(text, shift) == pytest.approx(expected)


@pytest.mark.parametrize("text", ["757,522", "1000,522,757", "1000,1000", "1000,0", "2.5", "0", "1000,x", ""])
def test_steps_that_are_none_are_refused(text):
    with pytest.raises(ValueError):
        denoising_steps(text, 5.0)


def test_the_shift_is_flow_matching_s_own():
    u = torch.linspace(0.001, 1, 1000)
    stock = FlowMatchEulerDiscreteScheduler(shift=5.0).sigmas.flip(0)
    torch.testing.assert_close(shift_time(u, 5.0), stock, rtol=1e-5, atol=0)
    torch.testing.assert_close(unshift_time(stock, 5.0), u, rtol=1e-4, atol=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# Sampling
# ---------------------------------------------------------------------------------------------------------------------


def bent(x, t):
    """A velocity that is no straight line to any x0."""
    return torch.sin(3 * x) + t / 1000


@pytest.mark.parametrize("text, stock", [
    ("1000", True), ("1000,500", True), ("1000,757,522", True), ("1000,666,333", True), ("4", True),
    ("1000,800,700,100", False),
])  # fmt: skip
def test_the_stock_scheduler_takes_the_rollout_s_steps(text, stock, tmp_path):
    steps = denoising_steps(text, 5.0)
    scheduler = stock_scheduler(steps)
    assert (scheduler is not None) == stock
    if not stock:
        return
    scheduler.save_pretrained(tmp_path)
    scheduler = FlowMatchLCMScheduler.from_pretrained(tmp_path)
    scheduler.set_timesteps(len(steps))
    torch.testing.assert_close(scheduler.timesteps, torch.tensor(steps), atol=2e-4, rtol=0)
    torch.manual_seed(0)
    noise = torch.randn(len(steps), 2, 4, 3, 2, 2)
    (ours,) = roll_out(
        lambda x, t, start, cache: bent(x, t), None, noise.__getitem__, steps, [3], [len(steps) - 1]
    )  # fmt: skip
    torch.manual_seed(0)
    x = torch.randn(len(steps), 2, 4, 3, 2, 2)[0]
    torch.manual_seed(0)
    draws = iter([*torch.randn(len(steps), 2, 4, 3, 2, 2)[1:], torch.zeros(2, 4, 3, 2, 2)])
    from diffusers.schedulers import scheduling_flow_match_lcm as module

    original, module.randn_tensor = module.randn_tensor, lambda *args, **kwargs: next(draws)
    try:
        for t in scheduler.timesteps:
            x = scheduler.step(bent(x, t), t, x, return_dict=False)[0]
    finally:
        module.randn_tensor = original
    torch.testing.assert_close(ours, x, atol=1e-5, rtol=0)


def test_the_flow_s_trajectory_is_nearer_to_the_flow_than_three_times_as_many_steps_of_euler():
    steps = [1000.0, 757.0, 522.0]
    noise = torch.randn(2, 4, 3, 2, 2, generator=torch.Generator().manual_seed(0))

    def euler(count: int):
        """What diffusers' solver passes at each of the steps, and where it ends."""
        scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
        scheduler.set_timesteps(sigmas=[t / 1000 for t in flow_grid(steps, count, 3.0)[:-1]])
        x, seen = noise, {}
        for t in scheduler.timesteps:
            seen[round(t.item(), 2)] = x
            x = scheduler.step(bent(x, t), t, x, return_dict=False)[0]
        return torch.stack([*(seen[t] for t in steps), x])

    grid = flow_grid(steps, 16, 3.0)
    assert {*steps, 0.0} < set(grid) and len(grid) == 19
    kept, end = flow_trajectory(bent, noise, grid, steps)
    flow = euler(2000)
    ours, theirs = ((found - flow).abs().flatten(1).amax(1) for found in (torch.stack([*kept, end]), euler(50)))
    print(f"errors {ours.tolist()}, of 50 steps of Euler {theirs.tolist()}")
    assert ours[0] == theirs[0] == 0
    assert (ours[1:] < theirs[1:]).all()


# ---------------------------------------------------------------------------------------------------------------------
# The rollout
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "frames, per_block, first, expected",
    [(21, 0, False, [21]), (21, 3, False, [3] * 7), (22, 3, True, [1] + [3] * 7), (21, 21, False, [21]),
     (28, 3, True, [1] + [3] * 9), (1, 3, True, [1])],
)  # fmt: skip
def test_blocks_of_a_clip(frames, per_block, first, expected):
    assert block_lengths(frames, per_block, first) == expected


def test_frames_that_do_not_fit_are_told_which_do():
    with pytest.raises(ValueError, match="31 latent frames do not split into blocks of 3, 30 or 33 do"):
        block_lengths(31, 3)
    with pytest.raises(ValueError, match="2 latent frames .* 3 do"):
        block_lengths(2, 3)
    with pytest.raises(ValueError, match="21 .* 19 or 22 do"):
        block_lengths(21, 3, True)


def calls_of(exits, blocks, steps=(1000.0, 757.0, 522.0), **options):
    """(t, start, frames, whether with gradient) of each evaluation, by a student that only notes them."""
    calls, weight = [], torch.ones((), requires_grad=True)

    def predict(x, t, start, cache):
        calls.append((t, start, x.shape[2], torch.is_grad_enabled()))
        return x * weight

    def remember(x, t, start, cache):
        calls.append(("cache", t, start, torch.is_grad_enabled()))
        return (cache or ()) + (start,)

    noise = torch.ones(1, 1, sum(blocks), 1, 1)
    made = list(roll_out(predict, remember, lambda k: noise, list(steps), blocks, exits, **options))
    return calls, made


def test_the_rollout_stops_at_the_exit_step_and_only_that_has_a_gradient():
    calls, made = calls_of([1, 0, 2], [2, 3, 3])
    assert calls == [
        (1000.0, 0, 2, False), (757.0, 0, 2, True), ("cache", 0.0, 0, False),
        (1000.0, 2, 3, True), ("cache", 0.0, 2, False),
        (1000.0, 5, 3, False), (757.0, 5, 3, False), (522.0, 5, 3, True),
    ]  # fmt: skip
    assert [x.shape[2] for x in made] == [2, 3, 3] and all(x.requires_grad for x in made)


def test_one_block_fills_no_cache():
    calls, _ = calls_of([2], [8])
    assert calls == [(1000.0, 0, 8, False), (757.0, 0, 8, False), (522.0, 0, 8, True)]


def test_a_longer_rollout_has_a_gradient_in_its_last_frames_alone():
    calls, made = calls_of([0, 0, 0], [3, 3, 3], trained_from=6)
    assert [grad for name, *_, grad in calls if name != "cache"] == [False, False, True]
    assert [x.requires_grad for x in made] == [False, False, True]


def test_nothing_has_a_gradient_where_none_is_wanted():
    with torch.no_grad():
        calls, made = calls_of([1, 1], [3, 3])
    assert not any(grad for *_, grad in calls) and not any(x.requires_grad for x in made)


def test_context_noise_reaches_what_the_cache_is_made_of():
    contexts = []

    def remember(x, t, start, cache):
        contexts.append((x.clone(), t))

    noise = {0: torch.full((1, 1, 4, 1, 1), 2.0), None: torch.full((1, 1, 4, 1, 1), 10.0)}
    for level in (0.0, 100.0):
        list(roll_out(lambda x, t, *_: x * 0.5, remember, noise.__getitem__, [1000.0], [2, 2], [0, 0],
                      context_noise=level))  # fmt: skip
    (clean, t_clean), (noised, t_noised) = contexts
    assert (t_clean, t_noised) == (0.0, 100.0)
    torch.testing.assert_close(clean, torch.full((1, 1, 2, 1, 1), 1.0))
    torch.testing.assert_close(noised, torch.full((1, 1, 2, 1, 1), 0.9 * 1.0 + 0.1 * 10.0))


def test_blocks_come_one_by_one():
    """Streaming: the first is there before the second is begun."""
    seen = []
    rollout = roll_out(
        lambda x, t, start, cache: seen.append(start) or x, lambda *_: None, lambda k: torch.ones(1, 1, 4, 1, 1),
        [1000.0], [2, 2], [0, 0],
    )  # fmt: skip
    next(rollout)
    assert seen == [0]
