"""Latent consistency models' mathematics (Luo et al. 2023, arXiv 2310.04378), in fp32.

Symbols: `abar` is the cumulative product of 1 - beta, `alphas = sqrt(abar)`, `sigmas = sqrt(1 - abar)`,
`x_t = alphas[t] * latents + sigmas[t] * eps`; `t` is an integer training timestep, `index` a place in the grid.
"""

import math

import torch

SIGMA_DATA = 0.5  # LCMScheduler's


def expand_to(values: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """[B] -> [B, 1, ...] with as many axes as x."""
    return values.reshape(-1, *[1] * (x.ndim - 1))


def to_x0_eps(out, x_t, alpha, sigma, prediction_type: str):
    """Clean sample and noise, fp32, that a network's output at x_t stands for. alpha and sigma are [B]."""
    out, x_t = out.float(), x_t.float()
    alpha, sigma = expand_to(alpha, x_t), expand_to(sigma, x_t)
    if prediction_type == "epsilon":
        return (x_t - sigma * out) / alpha, out
    if prediction_type == "v_prediction":  # v = alpha * eps - sigma * x0 (Salimans & Ho 2022)
        return alpha * x_t - sigma * out, sigma * x_t + alpha * out
    if prediction_type == "sample":
        return out, (x_t - alpha * out) / sigma
    raise ValueError(f"prediction_type {prediction_type!r}: must be epsilon, v_prediction or sample")


class DDIMSolver:
    """One DDIM step from grid point t_i = k*i - 1 to the one before, k = T / N, i = 1..N (paper, section 4.3)."""

    def __init__(self, abar: torch.Tensor, num_ddim_timesteps: int):
        total = len(abar)
        if num_ddim_timesteps < 1 or total % num_ddim_timesteps:
            raise ValueError(f"{num_ddim_timesteps} solver steps do not divide the teacher's {total} timesteps")
        self.stride = total // num_ddim_timesteps
        self.timesteps = torch.arange(1, num_ddim_timesteps + 1) * self.stride - 1  # 19, 39, ... 999 for N = 50
        self.timesteps_prev = (self.timesteps - self.stride).clamp(min=0)
        abar_prev = abar[self.timesteps_prev].float()
        self.alphas_prev, self.sigmas_prev = abar_prev.sqrt(), (1.0 - abar_prev).sqrt()

    def to(self, device):
        for name, table in vars(self).items():
            if torch.is_tensor(table):
                setattr(self, name, table.to(device))
        return self

    def step(self, x0, eps, index):
        """x_prev at timesteps_prev[index]."""
        return expand_to(self.alphas_prev[index], x0) * x0 + expand_to(self.sigmas_prev[index], x0) * eps


def boundary_scalings(t: torch.Tensor, timestep_scaling_factor: float):
    """c_skip and c_out of f(x, t) = c_skip * x + c_out * x0(x, t), such that f(x, 0) = x (paper, equation 9)."""
    scaled = t.float() * timestep_scaling_factor
    c_skip = SIGMA_DATA**2 / (scaled**2 + SIGMA_DATA**2)
    c_out = scaled / (scaled**2 + SIGMA_DATA**2).sqrt()
    return c_skip, c_out


def guidance_embedding(w: torch.Tensor, dim: int) -> torch.Tensor:
    """Sinusoidal embedding [B, dim] of 1000 * w, the one that diffusers' pipelines feed at guidance_scale = 1 + w."""
    half = dim // 2
    frequencies = torch.exp(torch.arange(half, device=w.device) * -(math.log(10000.0) / (half - 1)))
    angles = (1000.0 * w.float())[:, None] * frequencies
    embedding = torch.cat([angles.sin(), angles.cos()], dim=1)
    return torch.nn.functional.pad(embedding, (0, dim % 2))


def consistency_loss(prediction, target, loss_type: str, huber_c: float) -> torch.Tensor:
    """l2: mean of d^2. huber: mean of sqrt(d^2 + c^2) - c, elementwise (Song & Dhariwal 2023)."""
    squared = (prediction.float() - target.float()).square()
    return squared.mean() if loss_type == "l2" else ((squared + huber_c**2).sqrt() - huber_c).mean()
