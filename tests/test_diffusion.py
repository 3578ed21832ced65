"""common/diffusion.py against diffusers' schedulers and pipelines."""

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, LCMScheduler, StableDiffusionPipeline

from common.diffusion import DDIMSolver, boundary_scalings, consistency_loss, expand_to, guidance_embedding, to_x0_eps
from common.optim import Lion, update_ema

SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}


def ddim(prediction_type: str, steps: int) -> DDIMScheduler:
    """Trailing spacing visits 999, 979, ..., 19, and the last step goes to abar[0]: the solver's grid."""
    scheduler = DDIMScheduler(
        **SCHEDULE, set_alpha_to_one=False, timestep_spacing="trailing", prediction_type=prediction_type
    )
    scheduler.set_timesteps(steps)
    return scheduler


@pytest.mark.parametrize("steps", [10, 50])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_solver_takes_the_steps_of_ddim_scheduler(prediction_type, steps):
    scheduler = ddim(prediction_type, steps)
    abar = scheduler.alphas_cumprod
    solver = DDIMSolver(abar, steps)
    assert solver.timesteps.flip(0).tolist() == scheduler.timesteps.tolist()
    rng = torch.Generator().manual_seed(0)
    for index, t in enumerate(solver.timesteps):
        x_t, out = torch.randn(2, 3, 4, 4, generator=rng), torch.randn(2, 3, 4, 4, generator=rng)
        alpha, sigma = abar[t].sqrt().expand(2), (1 - abar[t]).sqrt().expand(2)
        x0, eps = to_x0_eps(out, x_t, alpha, sigma, prediction_type)
        expected = scheduler.step(out, t, x_t)
        torch.testing.assert_close(x0, expected.pred_original_sample, rtol=1e-5, atol=1e-5)
        x_prev = solver.step(x0, eps, torch.tensor([index, index]))
        torch.testing.assert_close(x_prev, expected.prev_sample, rtol=1e-5, atol=1e-5)


def test_steps_that_do_not_divide_the_timesteps_are_refused():
    with pytest.raises(ValueError, match="30 solver steps do not divide"):
        DDIMSolver(torch.linspace(1, 0.01, 1000), 30)


def test_unknown_prediction_type_is_refused():
    with pytest.raises(ValueError, match="flow"):
        to_x0_eps(torch.zeros(1, 1), torch.zeros(1, 1), torch.ones(1), torch.ones(1), "flow")


@pytest.mark.parametrize("factor", [1.0, 10.0])
def test_boundary_scalings_are_those_of_lcm_scheduler(factor):
    scheduler = LCMScheduler(timestep_scaling=factor)
    for t in (0, 1, 19, 499, 999):
        expected = scheduler.get_scalings_for_boundary_condition_discrete(torch.tensor(float(t)))
        torch.testing.assert_close(boundary_scalings(torch.tensor([t]), factor), tuple(e.reshape(1) for e in expected))


def test_at_zero_the_consistency_function_returns_its_input():
    c_skip, c_out = boundary_scalings(torch.tensor([0]), 10.0)
    assert c_skip.item() == 1.0 and c_out.item() == 0.0


@pytest.mark.parametrize("dim", [256, 33])
def test_guidance_embedding_is_the_pipelines(dim):
    w = torch.tensor([0.0, 1.0, 6.5, 14.0])
    expected = StableDiffusionPipeline.get_guidance_scale_embedding(None, w, embedding_dim=dim)
    # angles reach 14,000: fp32 rounding of a frequency is 1e-3 there
    torch.testing.assert_close(guidance_embedding(w, dim), expected, rtol=0, atol=2e-3)


def test_conversions_and_noising_against_float64():
    """Also that fp32 tables keep sigma where bf16 loses 5% of it."""
    abar = ddim("epsilon", 50).alphas_cumprod
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


def test_losses():
    a, b = torch.tensor([3.0, -1.0]), torch.tensor([0.0, 3.0])
    assert consistency_loss(a, b, "l2", 0.001).item() == pytest.approx((9 + 16) / 2)
    assert consistency_loss(a, b, "huber", 0.001).item() == pytest.approx((3 + 4) / 2, abs=2e-3)  # near |d|
    assert consistency_loss(a, a, "huber", 0.001).item() == 0.0
    small = consistency_loss(torch.tensor([1e-3]), torch.zeros(1), "huber", 1.0).item()
    assert small == pytest.approx(0.5e-6, rel=0.1)  # d^2 / 2c far below c
    assert consistency_loss(a.bfloat16(), b.bfloat16(), "l2", 0.001).dtype == torch.float32


def test_expand_to():
    assert expand_to(torch.ones(2), torch.ones(2, 3, 4, 5)).shape == (2, 1, 1, 1)


def test_ema_is_the_average_written_out():
    target, source = [torch.full((3,), 2.0)], [torch.full((3,), 10.0)]
    update_ema(target, source, 0.75)
    assert target[0].tolist() == [4.0] * 3 and source[0].tolist() == [10.0] * 3


def test_lion_takes_two_steps_by_hand():
    p = torch.nn.Parameter(torch.tensor([1.0]))
    optimizer = Lion([p], lr=0.1, betas=(0.9, 0.5), weight_decay=0.2)
    p.grad = torch.tensor([2.0])
    optimizer.step()
    assert p.item() == pytest.approx(1.0 * (1 - 0.02) - 0.1)  # m = 0.5 * 2 = 1
    p.grad = torch.tensor([-3.0])
    optimizer.step()  # 0.9 * 1 + 0.1 * -3 = 0.6 > 0
    assert p.item() == pytest.approx(0.88 * 0.98 - 0.1)
