"""Scheduled sampling: some of the student's inputs are what it makes itself, as in sampling (Bengio et al. 2015)."""

import torch

from common.diffusion import expand_to
from common.stream import sample_generator

POWERS = {"uniform": 1.0, "biased_early": 2.0, "biased_late": 0.5}  # of a number in [0, 1): short or long rollouts


def draw_rollout(args, position: int, shape):
    """How many solver steps above t this sample starts, 0 for none, and the noise that the student's sampler adds."""
    rng = sample_generator(args.seed, -1 - position)  # its own: other draws stay what they are without rollouts
    rolled = torch.rand((), generator=rng) < args.scheduled_sampling_probability
    share = torch.rand((), generator=rng) ** POWERS[args.scheduled_sampling_strategy]
    offset = 1 + (args.scheduled_sampling_max_step_offset * share).long()
    return rolled * offset, torch.randn(shape, generator=rng)


def roll_out(f, solver, alphas, sigmas, x_t, latents, eps, index, offset, noise):
    """x_t as the student's own sampler makes it: from `offset` solver steps above t, by x0 = f(x, t), to t.

    Where the offset is 0, or nothing lies above t, x_t stays. The whole batch goes through f, so that all processes
    call it the same number of times.
    """
    above = (index + offset).clamp(max=len(solver.timesteps) - 1)
    t, t_above = solver.timesteps[index], solver.timesteps[above]
    x_above = expand_to(alphas[t_above], latents) * latents + expand_to(sigmas[t_above], latents) * eps
    made = expand_to(alphas[t], x_t) * f(x_above, t_above) + expand_to(sigmas[t], x_t) * noise
    return torch.where(expand_to(above > index, x_t), made, x_t)
