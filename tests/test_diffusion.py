"""common/diffusion.py against diffusers' own schedulers and pipelines."""

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, LCMScheduler, StableDiffusionPipeline

from common.losses import consistency_loss
from common.networks import guidance_embedding
from common.optim import Lion
from common.solvers import DDIMSolver, boundary_scalings, expand_to, to_x0_eps

PREDICTION_TYPES = ["epsilon", "v_prediction", "sample"]


def ddim(prediction_type: str = "epsilon") -> DDIMScheduler:
    """Stable Diffusion's, on the grid T - 1, T - 1 - k, ... that latent consistency models use."""
    return DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
        timestep_spacing="trailing", prediction_type=prediction_type,
    )  # fmt: skip


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("steps", [50, 8, 1000])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_a_solver_step_is_a_step_of_ddim(prediction_type, steps):
    scheduler = ddim(prediction_type)
    scheduler.set_timesteps(steps)
    abar = scheduler.alphas_cumprod
    solver = DDIMSolver(abar, steps)
    assert solver.timesteps.tolist() == scheduler.timesteps.tolist()[::-1]

    out, x_t = noise(steps, 4, 3, seed=1), noise(steps, 4, 3, seed=2)
    t, index = solver.timesteps, torch.arange(steps)
    x0, eps = to_x0_eps(out, x_t, abar[t].sqrt(), (1 - abar[t]).sqrt(), prediction_type)
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
    assert {solver.alphas_prev.dtype, solver.sigmas_prev.dtype} == {torch.float32}
    assert solver.step(noise(2, 4), noise(2, 4), torch.tensor([0, 49])).dtype == torch.float32


@pytest.mark.parametrize("steps", [0, 30, 999, 1001])
def test_steps_that_do_not_divide_the_timesteps_are_refused(steps):
    with pytest.raises(ValueError, match=f"{steps} solver steps do not divide the teacher's 1000"):
        DDIMSolver(ddim().alphas_cumprod, steps)


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


@pytest.mark.parametrize("scaling", [10.0, 1.0, 0.01])
def test_boundary_scalings_are_those_of_the_scheduler_that_ships_with_the_student(scaling):
    scheduler = LCMScheduler(timestep_scaling=scaling)
    t = torch.arange(1000)
    expected = [scheduler.get_scalings_for_boundary_condition_discrete(float(i)) for i in t]
    for ours, theirs in zip(boundary_scalings(t, scaling), zip(*expected, strict=True), strict=True):
        torch.testing.assert_close(ours.double(), torch.tensor(theirs, dtype=torch.float64), rtol=3e-7, atol=0)


def test_the_consistency_function_keeps_what_is_at_timestep_0():
    c_skip, c_out = boundary_scalings(torch.tensor([0]), 10.0)
    assert (c_skip.item(), c_out.item()) == (1.0, 0.0)


@pytest.mark.parametrize("dim", [256, 255, 32, 7])
def test_the_guidance_embedding_is_what_the_pipeline_feeds(dim):
    pipeline_embedding = StableDiffusionPipeline.get_guidance_scale_embedding
    guidance_scale = 1 + torch.linspace(0.0, 15.0, 31)
    w = guidance_scale - 1  # as the pipeline does
    assert torch.equal(guidance_embedding(w, dim), pipeline_embedding(None, w, dim))


def test_losses():
    prediction, target = noise(3, 50, seed=1), noise(3, 50, seed=2)
    l2 = consistency_loss(prediction, target, "l2", 0.5)
    torch.testing.assert_close(l2, torch.nn.functional.mse_loss(prediction, target), rtol=1e-6, atol=0)
    # sqrt(3^2 + 4^2) - 4 = 1, and 0 where nothing differs
    assert consistency_loss(torch.tensor([3.0, -3.0, 0.0]), torch.zeros(3), "huber", 4.0).item() == pytest.approx(2 / 3)
    # A small c makes it the L1 distance.
    l1 = torch.nn.functional.l1_loss(prediction, target)
    torch.testing.assert_close(consistency_loss(prediction, target, "huber", 1e-5), l1, rtol=1e-4, atol=0)


@pytest.mark.parametrize("loss_type", ["l2", "huber"])
def test_losses_are_fp32(loss_type):
    prediction, target = noise(3, 50, seed=1).bfloat16(), noise(3, 50, seed=2)
    loss = consistency_loss(prediction, target, loss_type, 1e-3)
    assert loss.dtype == torch.float32
    assert loss == consistency_loss(prediction.float(), target, loss_type, 1e-3)


def test_conversions_and_noising_against_float64():
    """Also that fp32 tables keep sigma where bf16 loses 5% of it."""
    abar = ddim().alphas_cumprod
    rng = np.random.default_rng(0)
    latents, eps = rng.normal(size=(1, 4)), rng.normal(size=(1, 4))
    for t in (19, 500, 999):
        a = float(np.prod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000)[: t + 1] ** 2))
        x_t = a**0.5 * latents + (1 - a) ** 0.5 * eps
        v = a**0.5 * eps - (1 - a) ** 0.5 * latents
        alpha, sigma = abar[t].sqrt().reshape(1), (1 - abar[t]).sqrt().reshape(1)
        assert sigma.item() == pytest.approx((1 - a) ** 0.5, rel=1e-4)
        for kind, out in (("epsilon", eps), ("v_prediction", v), ("sample", latents)):
            x0, noise = to_x0_eps(torch.tensor(out), torch.tensor(x_t), alpha, sigma, kind)
            # epsilon divides by alpha, 0.07 at t = 999
            np.testing.assert_allclose(x0.numpy(), latents, atol=2e-4)
            np.testing.assert_allclose(noise.numpy(), eps, atol=2e-4)


def test_lion_takes_two_steps_by_hand():
    p = torch.nn.Parameter(torch.tensor([1.0]))
    optimizer = Lion([p], lr=0.1, betas=(0.9, 0.5), weight_decay=0.2)
    p.grad = torch.tensor([2.0])
    optimizer.step()
    assert p.item() == pytest.approx(1.0 * (1 - 0.02) - 0.1)  # m = 0.5 * 2 = 1
    p.grad = torch.tensor([-3.0])
    optimizer.step()  # 0.9 * 1 + 0.1 * -3 = 0.6 > 0
    assert p.item() == pytest.approx(0.88 * 0.98 - 0.1)
