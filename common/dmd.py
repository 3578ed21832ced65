"""Distribution matching distillation on flow matching, in fp32.

DMD (Yin et al. 2023, arXiv 2311.18828), DMD2 (2405.14867), Self-Forcing (Huang et al. 2025, 2506.08009).

Symbols: `sigma = t / 1000`, `x_t = (1 - sigma) * x0 + sigma * eps`; a network's output is the velocity
`v = eps - x0`, so that `x0 = x_t - sigma * v`. `steps` are the student's timesteps, falling from 1000; `exits` are
places in them.
"""

from itertools import pairwise

import torch
from diffusers import FlowMatchLCMScheduler

from common.diffusion import expand_to
from common.stream import sample_generator

TIMESTEPS = 1000.0
MOST_COUNTED = 50  # a lone number up to this is a number of steps, above it a timestep


def shift_time(u, shift: float):
    """Flow matching's shift of a time in [0, 1] towards noise: s * u / (1 + (s - 1) * u)."""
    return shift * u / (1.0 + (shift - 1.0) * u)


def unshift_time(sigma, shift: float):
    """The u that shift_time takes to sigma."""
    return sigma / (shift - (shift - 1.0) * sigma)


def denoising_steps(text: str, shift: float) -> list[float]:
    """The student's timesteps: listed, as in 1000,757,522, or so many evenly spaced ones of this shift.

    4 with shift 5 is 1000, 937.5, 833.3, 625.
    """
    numbers = [float(word) for word in text.split(",")]
    if len(numbers) == 1 and numbers[0] <= MOST_COUNTED:
        count = int(numbers[0])
        if count != numbers[0] or count < 1:
            raise ValueError("a number of steps must be whole, and at least 1")
        numbers = [TIMESTEPS * shift_time(i / count, shift) for i in range(count, 0, -1)]
    if numbers[0] != TIMESTEPS:
        raise ValueError("the first must be 1000, where a sample starts from pure noise")
    if any(later >= earlier for earlier, later in zip(numbers, numbers[1:], strict=False)) or numbers[-1] <= 0.0:
        raise ValueError("must fall from step to step, and stay above 0")
    return numbers


def renoise(x0, sigma, eps):
    """x_t. sigma is a number, or [B]."""
    sigma = expand_to(sigma, x0) if torch.is_tensor(sigma) else sigma
    return (1.0 - sigma) * x0 + sigma * eps


def draw_exits(seed: int, iteration: int, count: int, blocks: int, same_step: bool, last_only: bool) -> list[int]:
    """The step at which each block's rollout ends, of `count`. All processes draw the same: they must stay in step."""
    if last_only:
        return [count - 1] * blocks
    rng = sample_generator(seed, f"exits {iteration}")
    drawn = torch.randint(count, (1 if same_step else blocks,), generator=rng).tolist()
    return drawn * blocks if same_step else drawn


def score_range(exits: list[int], steps: list[float], from_exit: bool, to_exit: bool, lowest: float):
    """(lowest, highest) timestep at which the rollout is judged.

    `from_exit` (--ts_schedule): not below the step that would have come next; else not below `lowest`.
    `to_exit` (--ts_schedule_max): not above the exit step. Of several blocks' ranges it is the one around them all.
    """
    after = [*steps[1:], 0.0]
    low = min(after[i] for i in exits) if from_exit else lowest
    return low, max(steps[i] for i in exits) if to_exit else TIMESTEPS


def score_timesteps(u, lowest: float, highest: float, shift: float, min_ratio: float, max_ratio: float):
    """Timesteps [B] of u in [0, 1): shifted times between lowest and highest, then clamped to the ratios' window."""
    low, high = unshift_time(lowest / TIMESTEPS, shift), unshift_time(highest / TIMESTEPS, shift)
    sigma = shift_time(low + (high - low) * u, shift)
    return TIMESTEPS * sigma.clamp(min_ratio, max_ratio)


def dmd_gradient(v_real, v_fake, x_g, eps):
    """The gradient at the student's sample x_g, and the gap mean|v_real - v_star| of each sample that it is divided by.

    DMD's own form is (x0_fake - x0_real) / mean|x_g - x0_real|. All three are x_t - sigma * v, so sigma cancels; what
    is left does not lose its digits where sigma is small.
    """
    v_star = eps - x_g
    gap = (v_real - v_star).abs().flatten(1).mean(1)
    return (v_real - v_fake) / expand_to(gap, x_g), gap


def dmd_loss(x_g, gradient):
    """Half the mean square distance to where the gradient leads: its own gradient is gradient / x_g.numel()."""
    return 0.5 * torch.nn.functional.mse_loss(x_g, (x_g - gradient).detach())


def fake_score_loss(v_fake, x_g, eps):
    """Flow matching on the student's samples."""
    return torch.nn.functional.mse_loss(v_fake, eps - x_g)


def flow_grid(steps: list[float], count: int, shift: float) -> list[float]:
    """About `count` timesteps from 1000 to 0 of this shift, and all of `steps` among them."""
    even = [TIMESTEPS * shift_time(i / count, shift) for i in range(count, -1, -1)]
    return sorted({*even, *steps}, reverse=True)


def flow_trajectory(velocity, noise, grid: list[float], kept: list[float]) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Along the flow: what x was at each of the kept timesteps, and where it ends at t = 0.

    By Adams and Bashforth's method: a velocity a step, as Euler's, and with a third of the steps it ends nearer.
    """
    x, at, before = noise, {}, None
    for t, t_next in pairwise(grid):
        at[t] = x
        v = velocity(x, t)
        mean = v if before is None else v + (t_next - t) / (2 * (t - before[0])) * (v - before[1])
        x, before = x + (t_next - t) / TIMESTEPS * mean, (t, v)
    return [at[t] for t in kept], x


def stock_scheduler(steps: list[float]) -> FlowMatchLCMScheduler | None:
    """A stock scheduler that takes exactly these steps when it is told their number; None where its rule has none.

    Its grid is even, then shifted, then stretched to end at shift_terminal. Two steps need the last alone, three also
    the shift; a longer list fits if it is an even one under some shift.
    """
    low, high = 1e-3, 30.0  # in between, a larger shift makes the second step larger
    wanted = torch.tensor(steps)
    for _ in range(200):
        shift = (low * high) ** 0.5
        terminal = steps[-1] / TIMESTEPS if len(steps) > 1 else None
        scheduler = FlowMatchLCMScheduler(shift=shift, shift_terminal=terminal)
        scheduler.set_timesteps(len(steps))
        if (scheduler.timesteps - wanted).abs().max() < 2e-4:
            return scheduler
        if len(steps) < 3:
            break
        low, high = (shift, high) if scheduler.timesteps[1] < wanted[1] else (low, shift)
    return None
