"""Losses of both methods, in fp32.

LCM (Luo et al. 2023, arXiv 2310.04378), DMD (Yin et al. 2023, 2311.18828) and DMD2 (2405.14867). A velocity `v` is
eps - x0: `v_real` the teacher's, `v_fake` the fake score's; `x_g` are the student's clean samples.
"""

import torch

from common.solvers import expand_to


def consistency_loss(prediction, target, loss_type: str, huber_c: float) -> torch.Tensor:
    """Mean of d^2 (l2) or of sqrt(d^2 + c^2) - c (huber), d elementwise (Song & Dhariwal 2023)."""
    squared = (prediction.float() - target.float()).square()
    return squared.mean() if loss_type == "l2" else ((squared + huber_c**2).sqrt() - huber_c).mean()


def dmd_gradient(v_real, v_fake, x_g, eps):
    """Gradient at the student's samples x_g, and each sample's gap mean|v_real - v_star|, by which it is divided.

    DMD's own form is (x0_fake - x0_real) / mean|x_g - x0_real|. All three are x_t - sigma * v, so sigma cancels. The
    quotient of velocities keeps its digits where sigma is small.
    """
    v_star = eps - x_g
    gap = (v_real - v_star).abs().flatten(1).mean(1)
    # Without a gap x_g is already what the teacher makes of it, and stays; 0 / 0 would end the run
    return ((v_real - v_fake) / expand_to(gap, x_g)).masked_fill(expand_to(gap == 0, x_g), 0.0), gap


def dmd_loss(x_g, gradient):
    """Half the mean square of x_g - stop(x_g - gradient), whose derivative by x_g is gradient / x_g.numel()."""
    return 0.5 * torch.nn.functional.mse_loss(x_g, (x_g - gradient).detach())


def fake_score_loss(v_fake, x_g, eps):
    """Flow matching loss on the student's samples: mean of |v_fake - (eps - x_g)|^2."""
    return torch.nn.functional.mse_loss(v_fake, eps - x_g)
