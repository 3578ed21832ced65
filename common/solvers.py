"""Ways from noise to clean samples, in fp32: the DDIM solver of LCM's teachers, and flow matching for DMD.

LCM (Luo et al. 2023, arXiv 2310.04378): `abar` is the cumulative product of 1 - beta, `alphas = sqrt(abar)`,
`sigmas = sqrt(1 - abar)`, `x_t = alphas[t] * latents + sigmas[t] * eps`; `t` is an integer training timestep, `index` a
place in the solver's grid.

Flow matching: `sigma = t / 1000`, `x_t = (1 - sigma) * x0 + sigma * eps`; a network's output is the velocity
`v = eps - x0`, so that `x0 = x_t - sigma * v`. `steps` are the student's timesteps, falling from 1000. The frames of a
clip are latent ones; a causal student makes them in blocks, one after the other.
"""

import math
from itertools import pairwise

import torch
from diffusers import FlowMatchLCMScheduler, LCMScheduler

SIGMA_DATA = 0.5  # LCM: LCMScheduler's
TIMESTEPS = 1000.0  # flow matching: t of pure noise
MOST_STEPS = 50  # flow matching: a lone number up to this is a number of steps, above it a timestep


def expand_to(values: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Reshapes values [B] to [B, 1, ...], with as many axes as x."""
    return values.reshape(-1, *[1] * (x.ndim - 1))


def to_x0_eps(out, x_t, alpha, sigma, prediction_type: str):
    """Clean sample and noise, fp32, by the network's output `out` at x_t; alpha and sigma are those of x_t, [B]."""
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
    """One DDIM step from grid point t_i = T * i / N - 1, i = 1..N, to the one before (paper, section 4.3).

    Where N does not divide T, points are rounded as diffusers' "trailing" spacing rounds them, and the last is T - 1
    all the same. A stock sampler finds every (N / gcd(N, T))-th of them: no more than gcd(N, T) steps, which must be at
    least `most_steps`.
    """

    def __init__(self, abar: torch.Tensor, num_ddim_timesteps: int, prediction_type: str = "epsilon", most_steps=1):
        total, n = len(abar), num_ddim_timesteps
        if not 1 <= n <= total:
            raise ValueError(f"--num_ddim_timesteps {n}: must be 1 to the teacher's {total} timesteps")
        if math.gcd(n, total) < most_steps:
            near = sorted(range(1, total + 1), key=lambda other: abs(other - n))
            fit = [str(other) for other in near if math.gcd(other, total) >= most_steps][:2]
            raise ValueError(
                f"--num_ddim_timesteps {n}: a sampler can take {math.gcd(n, total)} steps on its grid, the greatest "
                f"common divisor of {n} and the teacher's {total} timesteps, and --validation_num_inference_steps or "
                f"--report_steps has {most_steps}; it can on that of {' or '.join(fit)}"
            )
        if prediction_type == "epsilon" and abar[-1] < 1e-6:
            raise ValueError(
                "the teacher predicts noise at zero terminal SNR, where x0 cannot be told: a v_prediction one can"
            )
        self.prediction_type = prediction_type
        points = (torch.arange(n + 1, dtype=torch.float64) * total / n).round().long() - 1
        self.timesteps = points[1:]  # 19, 39, ... 999 for N = 50
        self.timesteps_prev = points[:-1].clamp(min=0)
        self.alphas, self.sigmas = abar.float().sqrt(), (1.0 - abar.float()).sqrt()  # of all training timesteps

    def to(self, device):
        """Moves the tables to the device."""
        for name, table in vars(self).items():
            if torch.is_tensor(table):
                setattr(self, name, table.to(device))
        return self

    def x0_eps(self, out, x_t, t):
        """Clean sample and noise, fp32, by the network's output `out` at x_t; t is [B]."""
        return to_x0_eps(out, x_t, self.alphas[t], self.sigmas[t], self.prediction_type)

    def step(self, x0, eps, index):
        """x_prev, the noisy latents at timesteps_prev[index]."""
        return noised(x0, eps, self.timesteps_prev[index], self)


def noised(latents, eps, t, solver: DDIMSolver):
    """x_t, the noisy latents at the timesteps t [B]."""
    return expand_to(solver.alphas[t], latents) * latents + expand_to(solver.sigmas[t], latents) * eps


def boundary_scalings(t: torch.Tensor, timestep_scaling_factor: float):
    """c_skip and c_out of f(x, t) = c_skip * x + c_out * x0(x, t), such that f(x, 0) = x (paper, equation 9)."""
    scaled = t.float() * timestep_scaling_factor
    c_skip = SIGMA_DATA**2 / (scaled**2 + SIGMA_DATA**2)
    c_out = scaled / (scaled**2 + SIGMA_DATA**2).sqrt()
    return c_skip, c_out


def student_scheduler(args, scheduler) -> LCMScheduler:
    """Sampler of an LCM student, whose steps are points of the solver's grid."""
    return LCMScheduler.from_config(
        scheduler.config,
        original_inference_steps=math.gcd(args.num_ddim_timesteps, scheduler.config.num_train_timesteps),
        timestep_scaling=args.timestep_scaling_factor,
    )


def sampled_x_t(f, solver: DDIMSolver, x_t, latents, eps, index, offset, noise):
    """x_t as the student's own sampler reaches it: from `offset` solver steps above t, by x0 = f(x, t), to t.

    Samples keep their x_t where the offset is 0 or t is the highest grid point. f sees the full batch all the same, so
    that all processes call the network the same number of times.
    """
    above = (index + offset).clamp(max=len(solver.timesteps) - 1)
    t, t_above = solver.timesteps[index], solver.timesteps[above]
    x0 = f(noised(latents, eps, t_above, solver), t_above)
    return torch.where(expand_to(above > index, x_t), noised(x0, noise, t, solver), x_t)


# ---------------------------------------------------------------------------------------------------------------------
# Flow matching
# ---------------------------------------------------------------------------------------------------------------------


def shift_time(u, shift: float):
    """Time u in [0, 1], shifted towards noise: s * u / (1 + (s - 1) * u)."""
    return shift * u / (1.0 + (shift - 1.0) * u)


def unshift_time(sigma, shift: float):
    """Time u whose shift_time is sigma."""
    return sigma / (shift - (shift - 1.0) * sigma)


def denoising_steps(text: str, shift: float) -> list[float]:
    """The student's timesteps from a list, "1000,757,522", or from their number: evenly spaced, then shifted.

    "4" with shift 5 is 1000, 937.5, 833.3, 625.
    """
    numbers = [float(word) for word in text.split(",")]
    if len(numbers) == 1 and numbers[0] <= MOST_STEPS:
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
    """x_t = (1 - sigma) * x0 + sigma * eps; sigma is a number or [B]."""
    sigma = expand_to(sigma, x0) if torch.is_tensor(sigma) else sigma
    return (1.0 - sigma) * x0 + sigma * eps


def flow_grid(steps: list[float], count: int, shift: float) -> list[float]:
    """Timesteps from 1000 to 0: `count` even steps under this shift, and all of `steps` among them."""
    even = [TIMESTEPS * shift_time(i / count, shift) for i in range(count, -1, -1)]
    return sorted({*even, *steps}, reverse=True)


def flow_trajectory(velocity, noise, grid: list[float], kept: list[float]) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Samples on the flow from noise to data: x at each of the `kept` timesteps of the grid, and x at t = 0.

    Steps are Adams and Bashforth's, of second order: one velocity each, as Euler's, but a third of them end nearer.
    """
    x, x_at, t_last, v_last = noise, {}, None, None
    for t, t_next in pairwise(grid):
        x_at[t] = x
        v = velocity(x, t)
        mean = v if v_last is None else v + (t_next - t) / (2 * (t - t_last)) * (v - v_last)
        x, t_last, v_last = x + (t_next - t) / TIMESTEPS * mean, t, v
    return [x_at[t] for t in kept], x


def stock_scheduler(steps: list[float]) -> FlowMatchLCMScheduler | None:
    """A stock scheduler that takes exactly these steps when it is told their number; None where no setting gives them.

    The scheduler's grid is even, then shifted, then stretched to end at shift_terminal. Of two steps shift_terminal
    gives both, of three the shift gives the one between; more fit only if they are even ones under some shift.
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


def block_lengths(frames: int, per_block: int, independent_first_frame: bool = False) -> list[int]:
    """Latent frames of each block of a clip; with per_block 0 one block as long as the clip."""
    if per_block == 0:
        return [frames]
    first = [1] if independent_first_frame else []
    count, rest = divmod(frames - len(first), per_block)
    if rest or count < 0 or frames < 1:
        below, above = (len(first) + per_block * n for n in (count, count + 1))
        fits = f"{below} or {above} do" if below > 0 else f"{above} do"
        raise ValueError(f"{frames} latent frames do not split into blocks of {per_block}, {fits}")
    return first + [per_block] * count


def roll_out(predict, remember, noise, steps, blocks, exits, trained_from: int = 0, context_noise: float = 0.0):
    """Yields each block's clean frames [B, C, n, h, w], as the student makes them from noise.

    predict(x, t, start, cache) -> v, and remember(x, t, start, cache) -> longer cache, for a block that begins at frame
    `start`. noise(k), [B, C, F, h, w], is the noise of step k, and noise(None) that of the context. A block is denoised
    down to its exit step; that step alone has a gradient, and only in blocks from frame `trained_from` on. Then the
    block's clean frames go once through the student at t = context_noise, as context of the blocks after it.
    """
    cache, start, last = None, 0, sum(blocks)
    with_gradient = torch.is_grad_enabled()
    for length, exit_step in zip(blocks, exits, strict=True):
        frames = slice(start, start + length)
        x0 = None
        for k in range(exit_step + 1):
            eps = noise(k)[:, :, frames]
            x = eps if x0 is None else renoise(x0, steps[k] / TIMESTEPS, eps)
            with torch.set_grad_enabled(with_gradient and k == exit_step and start >= trained_from):
                x0 = x - steps[k] / TIMESTEPS * predict(x, steps[k], start, cache)
        if frames.stop < last:
            with torch.no_grad():
                context = x0.detach()
                if context_noise > 0.0:
                    context = renoise(context, context_noise / TIMESTEPS, noise(None)[:, :, frames])
                cache = remember(context, context_noise, start, cache)
        yield x0
        start = frames.stop
