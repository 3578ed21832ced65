"""Random numbers of the methods. A sample's follow from the seed and the sample's place in the global sequence alone,
however many processes there are and wherever a run was resumed."""

import functools
import hashlib

import torch

from common.solvers import TIMESTEPS, expand_to, shift_time, unshift_time

# Exponents of a uniform number in [0, 1): rollouts of all lengths alike, mostly short ones, mostly long ones
ROLLOUT_LENGTHS = {"uniform": 1.0, "biased_early": 2.0, "biased_late": 0.5}
PINNED = ("cuda",)  # kinds of devices that copy from pinned memory while the host goes on


def to_device(values: torch.Tensor, device) -> torch.Tensor:
    """Values that the host has made, on the device; the host does not wait for the copy.

    PyTorch keeps pinned memory from being used again until the copy out of it is done.
    """
    if torch.device(device).type not in PINNED or values.device.type != "cpu":
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)


def sample_generator(seed: int, position: int | str) -> torch.Generator:
    """A generator that the seed and the sample's place in the global sequence, or another name, decide."""
    digest = hashlib.blake2b(f"{seed} {position}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


class Draws:
    """Random numbers of a batch; each sample has a generator of its own, so the order of calls counts."""

    def __init__(self, seed: int, positions: list[int], device):
        self.rngs, self.device = [sample_generator(seed, position) for position in positions], device

    @classmethod
    def of(cls, rngs: list[torch.Generator], device):
        """Draws by generators that are there already."""
        draws = cls(0, [], device)
        draws.rngs = rngs
        return draws

    def integers(self, count: int) -> torch.Tensor:
        """Whole numbers [B] in 0..count-1, on the device."""
        return to_device(torch.stack([torch.randint(count, (), generator=rng) for rng in self.rngs]), self.device)

    def uniform(self) -> torch.Tensor:
        """Numbers [B] in [0, 1), on the CPU, where the loop can look at them without waiting for the device."""
        return torch.stack([torch.rand((), generator=rng) for rng in self.rngs])

    def normal(self, *shape: int) -> torch.Tensor:
        """Gaussian noise [B, *shape], on the device."""
        return to_device(torch.stack([torch.randn(shape, generator=rng) for rng in self.rngs]), self.device)

    def keyed_normal(self, *shape: int):
        """noise(key) -> [B, *shape], drawn when a key is first asked for, and from then on the same."""
        return functools.cache(lambda key: self.normal(*shape))


def draw_dropped(draws: Draws, share: float, text: dict, empty: dict) -> dict[str, torch.Tensor]:
    """Conditions of a batch in which a share of the samples, drawn at random, has those of the empty prompt."""
    return with_dropped(draws.uniform() < share, text, empty)


def with_dropped(dropped: torch.Tensor, text: dict, empty: dict) -> dict[str, torch.Tensor]:
    """Conditions of a batch in which the `dropped` samples, [B] on the CPU, have those of the empty prompt."""
    return {
        name: torch.where(expand_to(to_device(dropped, rows.device), rows), empty[name], rows)
        for name, rows in text.items()
    }


def draw_rollout(args, positions: list[int], shape, device) -> tuple[torch.Tensor, torch.Tensor]:
    """Solver steps above t at which each sample starts [B], 0 for no rollout, and noise for the student's sampler.

    The generators are others than those of the rest: without rollouts all other draws are the same.
    """
    draws = Draws(args.seed, [-1 - position for position in positions], device)
    rolled_out = draws.uniform() < args.scheduled_sampling_probability
    length = draws.uniform() ** ROLLOUT_LENGTHS[args.scheduled_sampling_strategy]
    offset = 1 + (args.scheduled_sampling_max_step_offset * length).long()
    return to_device(rolled_out * offset, device), draws.normal(*shape)


def draw_exits(seed: int, iteration: int, count: int, blocks: int, same_step: bool, last_only: bool) -> list[int]:
    """Exit steps, one for each block, of `count` steps; the same in all processes, whose forwards must be as many."""
    if last_only:
        return [count - 1] * blocks
    rng = sample_generator(seed, f"exits {iteration}")
    exits = torch.randint(count, (1 if same_step else blocks,), generator=rng).tolist()
    return exits * blocks if same_step else exits


def score_range(exits: list[int], steps: list[float], from_exit: bool, to_exit: bool, lowest: float):
    """Lowest and highest timestep at which the rollout is judged, over all blocks.

    `from_exit` (--ts_schedule): not below the step that would have come after the exit step; else not below `lowest`.
    `to_exit` (--ts_schedule_max): not above the exit step.
    """
    next_steps = [*steps[1:], 0.0]
    low = min(next_steps[i] for i in exits) if from_exit else lowest
    return low, max(steps[i] for i in exits) if to_exit else TIMESTEPS


def score_timesteps(u, lowest: float, highest: float, shift: float, min_ratio: float, max_ratio: float):
    """Timesteps [B] of u in [0, 1): shifted times between lowest and highest, then clamped to the ratios' window."""
    low, high = unshift_time(lowest / TIMESTEPS, shift), unshift_time(highest / TIMESTEPS, shift)
    sigma = shift_time(low + (high - low) * u, shift)
    return TIMESTEPS * sigma.clamp(min_ratio, max_ratio)


def tied_noise(noise, length: int):
    """Noise [B, C, F, h, w] whose frames all follow from the first `length` frames of `noise`.

    The end of the teacher's flow depends on the noise of all frames, and a causal student's first block sees the noise
    of that block alone. If the rest were independent, the student could only learn the mean of all ends, a picture
    between all pictures. Here each block of `length` frames repeats the one before with its channels moved on by one,
    and with all of it moved one place to the right each time the channels have gone round, so that no channel of a
    place meets the same noise twice. To the teacher that is as good as independent, and the end of the flow is a
    function of the noise that the student sees.
    """
    first, frames, channels = noise[:, :, :length], noise.shape[2], noise.shape[1]
    copies = [first.roll((k, k // channels), (1, 4)) for k in range(-(-frames // length))]
    return torch.cat(copies, 2)[:, :, :frames]
