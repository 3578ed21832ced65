"""Random numbers of the methods. Those of a sample follow from the seed and its place in the global sequence alone,
whatever processes there are and wherever a run was resumed."""

import functools
import hashlib

import torch

from common.solvers import TIMESTEPS, expand_to, shift_time, unshift_time

# Exponents of a number in [0, 1): rollouts of all lengths alike, mostly short ones, mostly long ones
ROLLOUT_LENGTHS = {"uniform": 1.0, "biased_early": 2.0, "biased_late": 0.5}


def sample_generator(seed: int, position: int | str) -> torch.Generator:
    """A generator that follows from the seed and the sample's place in the global sequence alone."""
    digest = hashlib.blake2b(f"{seed} {position}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


class Draws:
    """Random numbers of a batch, one after the other, each sample's by a generator of its own."""

    def __init__(self, seed: int, positions: list[int], device):
        self.rngs, self.device = [sample_generator(seed, position) for position in positions], device

    @classmethod
    def of(cls, rngs: list[torch.Generator], device):
        """Draws by generators that are there already."""
        draws = cls(0, [], device)
        draws.rngs = rngs
        return draws

    def integers(self, count: int) -> torch.Tensor:
        """[B] in 0..count-1, on the device."""
        return torch.stack([torch.randint(count, (), generator=rng) for rng in self.rngs]).to(self.device)

    def uniform(self) -> torch.Tensor:
        """[B] in [0, 1), on the CPU, where the loop can look at them without waiting."""
        return torch.stack([torch.rand((), generator=rng) for rng in self.rngs])

    def normal(self, *shape: int) -> torch.Tensor:
        """[B, *shape], on the device."""
        return torch.stack([torch.randn(shape, generator=rng) for rng in self.rngs]).to(self.device)

    def keyed_normal(self, *shape: int):
        """noise(key) -> [B, *shape], drawn when a key is first asked for, and from then on the same."""
        return functools.cache(lambda key: self.normal(*shape))


def draw_dropped(draws: Draws, share: float, text: dict, empty: dict) -> dict[str, torch.Tensor]:
    """The conditions of a batch, in which a share of the samples has those of the empty prompt."""
    dropped = (draws.uniform() < share).to(draws.device)
    return {name: torch.where(expand_to(dropped, rows), empty[name], rows) for name, rows in text.items()}


def draw_rollout(args, positions: list[int], shape, device) -> tuple[torch.Tensor, torch.Tensor]:
    """How many solver steps above t each sample starts, 0 for no rollout, and the noise of the student's sampler.

    Generators of their own: the other draws stay what they are without rollouts.
    """
    draws = Draws(args.seed, [-1 - position for position in positions], device)
    rolled_out = draws.uniform() < args.scheduled_sampling_probability
    length = draws.uniform() ** ROLLOUT_LENGTHS[args.scheduled_sampling_strategy]
    offset = 1 + (args.scheduled_sampling_max_step_offset * length).long()
    return (rolled_out * offset).to(device), draws.normal(*shape)


def draw_exits(seed: int, iteration: int, count: int, blocks: int, same_step: bool, last_only: bool) -> list[int]:
    """The step at which each block's rollout ends, of `count`; the same in all processes, which must stay in step."""
    if last_only:
        return [count - 1] * blocks
    rng = sample_generator(seed, f"exits {iteration}")
    drawn = torch.randint(count, (1 if same_step else blocks,), generator=rng).tolist()
    return drawn * blocks if same_step else drawn


def score_range(exits: list[int], steps: list[float], from_exit: bool, to_exit: bool, lowest: float):
    """(lowest, highest) timestep at which the rollout is judged.

    `from_exit` (--ts_schedule): not below the step that would have come next; else not below `lowest`.
    `to_exit` (--ts_schedule_max): not above the exit step. The range spans those of all blocks.
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
