"""Training on an ideal teacher: of a Gaussian mixture the best denoiser and its probability flow are known."""

import copy

import torch
from diffusers import DDIMScheduler

from common.losses import consistency_loss
from common.optim import update_ema
from common.solvers import DDIMSolver, boundary_scalings, to_x0_eps

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


class Correction(torch.nn.Module):
    """The ideal sample plus a small network that starts at zero: a student that starts as its teacher."""

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(10, 96), torch.nn.SiLU(), torch.nn.Linear(96, 96), torch.nn.SiLU(), torch.nn.Linear(96, 1)
        )
        torch.nn.init.zeros_(self.layers[-1].weight)
        torch.nn.init.zeros_(self.layers[-1].bias)

    def forward(self, x, alpha, sigma):
        waves = [x, sigma, alpha] + [f(k * x) for k in (1.0, 2.0, 4.0) for f in (torch.sin, torch.cos)] + [x * alpha]
        return ideal_clean(x, alpha, sigma) + sigma * self.layers(torch.stack(waves, 1))[:, 0]


def consistency_function(network, x, t, alphas, sigmas):
    out = network(x, alphas[t], sigmas[t])
    x0, _ = to_x0_eps(out, x, alphas[t], sigmas[t], "sample")
    c_skip, c_out = boundary_scalings(t, 10.0)
    return c_skip * x + c_out * x0


def test_training_on_an_ideal_teacher_converges_to_its_flow():
    """Mean error of the one-step map falls below 0.08, from 0.3 and more of the teacher's own one step."""
    torch.manual_seed(0)
    abar = abar_table()
    alphas, sigmas = abar.sqrt(), (1 - abar).sqrt()
    solver = DDIMSolver(abar, 50)
    student = Correction()
    target = copy.deepcopy(student).requires_grad_(False)
    steps = 8000
    optimizer = torch.optim.Adam(student.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    rng = torch.Generator().manual_seed(1)
    for _ in range(steps):
        latents = MEANS[torch.randint(3, (512,), generator=rng)] + DEVIATION * torch.randn(512, generator=rng)
        index = torch.randint(50, (512,), generator=rng)
        t, t_prev = solver.timesteps[index], solver.timesteps_prev[index]
        x_t = alphas[t] * latents + sigmas[t] * torch.randn(512, generator=rng)
        with torch.no_grad():
            out = ideal_clean(x_t, alphas[t], sigmas[t])
            x0_teacher, eps_teacher = to_x0_eps(out, x_t, alphas[t], sigmas[t], "sample")
            x_prev = solver.step(x0_teacher, eps_teacher, index)
            f_target = consistency_function(target, x_prev, t_prev, alphas, sigmas)
        loss = consistency_loss(consistency_function(student, x_t, t, alphas, sigmas), f_target, "huber", 0.01)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        update_ema(list(target.parameters()), list(student.parameters()), 0.95)

    for t in (999, 599):
        x = (
            torch.randn(2000, generator=rng)
            if t == 999
            else alphas[t] * MEANS.repeat(500) + sigmas[t] * torch.randn(1500)
        )
        truth = flow_map(x, t)
        steps_t = torch.full((len(x),), t)
        with torch.no_grad():
            error = (consistency_function(target, x, steps_t, alphas, sigmas) - truth).abs().mean().item()
            untrained = (consistency_function(Correction(), x, steps_t, alphas, sigmas) - truth).abs().mean().item()
        print(f"t = {t}: error {error:.4f}, untrained {untrained:.4f}")
        assert untrained > 0.3
        assert error < 0.08
