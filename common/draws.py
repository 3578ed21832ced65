"""Deterministic, resumable order of samples, and batches of one size each.

The training set is one endless sequence of samples. `lanes` readers each go through their own share of the shards, in
an order drawn anew each epoch and shuffled within blocks; sample q of the sequence comes from lane q mod lanes. Process
p of P takes the samples q = p (mod P), and its workers split those again, so that the sequence is the same however many
processes and workers read it. Every sample carries a cursor, the place in its lane where reading goes on after it.

A process reads a batch's number of samples at a time, and each sample waits in its bucket until there is a batch of
them. Which samples make which batch thus follows from the sequence alone. A checkpoint needs, of each lane, the cursor
before its first sample that was not used, and which later ones were: all that waited is read again.
"""

import hashlib

import torch

from common.solvers import TIMESTEPS, shift_time, unshift_time


def sample_generator(seed: int, position: int | str) -> torch.Generator:
    """Random numbers that follow from the seed and the sample's place in the global sequence alone."""
    digest = hashlib.blake2b(f"{seed} {position}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


class Draws:
    """Random numbers of a batch, one after the other; those of a sample follow from the seed and its place alone."""

    def __init__(self, seed: int, positions: list[int], device):
        self.rngs, self.device = [sample_generator(seed, position) for position in positions], device

    def uniform(self) -> torch.Tensor:
        """[B] in [0, 1), on the CPU, where the loop can look at them without waiting."""
        return torch.stack([torch.rand((), generator=rng) for rng in self.rngs])

    def normal(self, *shape: int) -> torch.Tensor:
        """[B, *shape]"""
        return torch.stack([torch.randn(shape, generator=rng) for rng in self.rngs]).to(self.device)


def stack(rows: list[tuple], device) -> tuple[torch.Tensor, ...]:
    """Draws of samples, one tuple each, as batches on the device."""
    return tuple(torch.stack(column).to(device) for column in zip(*rows, strict=True))


POWERS = {"uniform": 1.0, "biased_early": 2.0, "biased_late": 0.5}  # of a number in [0, 1): short or long rollouts


def draw_rollout(args, position: int, shape):
    """How many solver steps above t this sample starts, 0 for none, and the noise that the student's sampler adds."""
    rng = sample_generator(args.seed, -1 - position)  # its own: other draws stay what they are without rollouts
    rolled = torch.rand((), generator=rng) < args.scheduled_sampling_probability
    share = torch.rand((), generator=rng) ** POWERS[args.scheduled_sampling_strategy]
    offset = 1 + (args.scheduled_sampling_max_step_offset * share).long()
    return rolled * offset, torch.randn(shape, generator=rng)


def draw_for(args, position: int, shape):
    """index, w, whether the prompt is dropped, and two noises, of the sample at this place in the global sequence."""
    rng = sample_generator(args.seed, position)
    index = torch.randint(args.num_ddim_timesteps, (), generator=rng)
    w = args.w_min + (args.w_max - args.w_min) * torch.rand((), generator=rng)
    dropped = torch.rand((), generator=rng) < args.proportion_empty_prompts
    return index, w, dropped, torch.randn(shape, generator=rng), torch.randn(shape, generator=rng)


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


def tied_noise(noise, length: int):
    """[B, C, F, h, w], of which all frames follow from the first `length`.

    Where the teacher's flow ends depends on the noise of all frames. A causal student's first block sees its own alone:
    asked for ends of independent noise it could only learn their mean, a picture between all pictures. Here each block
    is the one before with its channels moved on by one, and once they have gone round, all of it a place to the right:
    no channel of a place sees its own noise again. To the teacher that is as good as independent; but now the end is a
    function of what the student sees.
    """
    first, frames, channels = noise[:, :, :length], noise.shape[2], noise.shape[1]
    copies = [first.roll((k, k // channels), (1, 4)) for k in range(-(-frames // length))]
    return torch.cat(copies, 2)[:, :, :frames]
