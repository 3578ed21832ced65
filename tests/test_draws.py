"""Random numbers follow from the seed and a sample's place alone, and have the shares that were asked for."""

from types import SimpleNamespace

import pytest
import torch

from common.draws import (
    ROLLOUT_LENGTHS,
    Draws,
    draw_dropped,
    draw_exits,
    draw_rollout,
    sample_generator,
    score_range,
    score_timesteps,
    tied_noise,
    to_device,
)
from tests.waits import PLAYED, played_device

# ---------------------------------------------------------------------------------------------------------------------
# Samples
# ---------------------------------------------------------------------------------------------------------------------


def numbers_of(seed: int, positions: list[int]) -> torch.Tensor:
    draws = Draws(seed, positions, "cpu")
    return torch.cat([draws.integers(50)[:, None], draws.uniform()[:, None], draws.normal(2, 3).flatten(1)], 1)


def test_a_sample_s_numbers_do_not_depend_on_the_batch_or_the_process():
    alone = torch.cat([numbers_of(3, [position]) for position in range(6)])
    torch.rand(7)  # other random numbers change nothing
    assert torch.equal(numbers_of(3, [0, 1, 2, 3, 4, 5]), alone)
    assert torch.equal(numbers_of(3, [5, 1]), alone[[5, 1]])
    assert len({tuple(row.tolist()) for row in torch.cat([alone, numbers_of(4, [0]), numbers_of(3, [-1])])}) == 8


def test_a_sample_s_numbers_are_one_after_the_other_of_one_generator():
    rng = sample_generator(3, 17)
    expected = torch.randint(50, (), generator=rng), torch.rand((), generator=rng), torch.randn(2, 3, generator=rng)
    assert torch.equal(numbers_of(3, [17])[0], torch.cat([value.float().flatten() for value in expected]))


WAITS = {
    "a value is read": lambda x: x.sum().item(),
    "values are read": lambda x: x.tolist(),
    "a condition": lambda x: 1 if (x > 0).any() else 0,
    "a size that depends on values": lambda x: x[x > 0],
    "such an index": lambda x: x.nonzero(),
    "an index of the host": lambda x: x[torch.tensor([0, 1])],
    "a copy to the host": lambda x: x.cpu(),
    "a number for the device": lambda x: torch.as_tensor(1.0, device=x.device),
    "numbers for the device": lambda x: torch.tensor([1.0], device=x.device),
    "a copy from pageable memory": lambda x: torch.ones(3).to(x.device, non_blocking=True),
    "a copy that is waited for": lambda x: torch.ones(3).pin_memory().to(x.device),
    "a copy into a tensor": lambda x: x.copy_(torch.ones(3)),
}


@pytest.mark.parametrize("what", WAITS)
def test_the_played_device_finds_waits(what):
    with played_device() as forbid:
        x = to_device(torch.ones(3), PLAYED)
        WAITS[what](x)  # which is no error where waiting is allowed
        forbid(True)
        with pytest.raises(AssertionError, match="waits for the device"):
            WAITS[what](x)


def test_a_copy_to_the_device_is_not_waited_for():
    with played_device() as forbid:
        forbid(True)
        x = to_device(torch.arange(3.0), PLAYED)
        y = (2.0 * x[torch.full((1,), 2, device=PLAYED)]).square().sum().detach()
        forbid(False)
        assert x.device.type == PLAYED.type and x.tolist() == [0.0, 1.0, 2.0] and y.item() == 16.0
    assert to_device(x := torch.ones(2), "cpu") is x


def test_numbers_go_to_the_device_but_for_those_that_the_loop_looks_at():
    draws = Draws(3, [0], "meta")
    assert [value.device.type for value in (draws.integers(5), draws.normal(1), draws.uniform())] == [
        "meta",
        "meta",
        "cpu",
    ]


def test_dropped_samples_have_the_empty_prompts_conditions():
    text = {"embeds": torch.arange(1.0, 2001.0).reshape(-1, 1, 1).expand(-1, 2, 3), "pooled": torch.ones(2000, 4)}
    empty = {"embeds": torch.zeros(1, 2, 3), "pooled": torch.zeros(1, 4)}
    found = draw_dropped(Draws(3, list(range(2000)), "cpu"), 0.25, text, empty)
    dropped = found["pooled"][:, 0] == 0
    assert abs(dropped.float().mean() - 0.25) < 0.04  # four standard deviations
    for name, rows in found.items():
        assert torch.equal(rows[~dropped], text[name][~dropped]) and (rows[dropped] == 0).all()
    for share, all_of in ((0.0, text), (1.0, {name: empty[name].expand_as(rows) for name, rows in text.items()})):
        same = draw_dropped(Draws(3, list(range(2000)), "cpu"), share, text, empty)
        assert all(torch.equal(rows, all_of[name]) for name, rows in same.items())


# ---------------------------------------------------------------------------------------------------------------------
# Rollouts of latent consistency
# ---------------------------------------------------------------------------------------------------------------------


def rollouts(positions: list[int], strategy: str = "uniform"):
    args = SimpleNamespace(
        seed=3, scheduled_sampling_max_step_offset=8, scheduled_sampling_probability=0.25,
        scheduled_sampling_strategy=strategy,
    )  # fmt: skip
    return draw_rollout(args, positions, (2, 3), "cpu")


def test_rollouts_have_their_share_and_lengths():
    means = {}
    for strategy in ROLLOUT_LENGTHS:
        offsets, _ = rollouts(list(range(2000)), strategy)
        assert abs((offsets > 0).float().mean() - 0.25) < 0.04  # four standard deviations
        assert set(offsets.tolist()) <= set(range(9)) and offsets.max() == 8
        means[strategy] = offsets[offsets > 0].float().mean().item()
    assert means["biased_early"] < means["uniform"] - 0.5 and means["biased_late"] > means["uniform"] + 0.5


@pytest.mark.parametrize("positions", [[4], [4, 9, 0]])
def test_rollouts_follow_from_seed_and_position_alone_and_are_not_the_sample_s_other_numbers(positions):
    offsets, noise = rollouts(list(range(10)))
    found, same = rollouts(positions)
    assert torch.equal(found, offsets[positions]) and torch.equal(same, noise[positions])
    rng = sample_generator(3, 4)
    others = torch.rand((), generator=rng), torch.rand((), generator=rng), torch.randn(2, 3, generator=rng)
    assert not torch.equal(same[0], others[-1])


# ---------------------------------------------------------------------------------------------------------------------
# DMD's draws
# ---------------------------------------------------------------------------------------------------------------------


def test_score_timesteps_cover_the_window_by_their_shift():
    u = (torch.arange(100_000) + 0.5) / 100_000
    plain = score_timesteps(u, 0.0, 1000.0, 1.0, 0.02, 0.98)
    assert plain.min() == 20 and plain.max() == 980
    torch.testing.assert_close(plain.mean(), torch.tensor(500.0), atol=1.0, rtol=0)
    shifted = score_timesteps(u, 0.0, 1000.0, 5.0, 0.02, 0.98)
    torch.testing.assert_close(shifted.median(), torch.tensor(5000 / 6), atol=1.0, rtol=0)  # of u = 1/2
    for shift in (1.0, 7.0):  # bounds are timesteps, whatever the shift
        bounded = score_timesteps(u, 522.0, 757.0, shift, 0.02, 0.98)
        assert 522 <= bounded.min() < 523 and 756 < bounded.max() <= 757.001


def test_the_range_of_score_timesteps_follows_the_exit():
    steps = [1000.0, 757.0, 522.0]
    assert score_range([1], steps, False, False, 0.0) == (0.0, 1000.0)
    assert score_range([1], steps, False, False, 300.0) == (300.0, 1000.0)
    assert score_range([1], steps, True, False, 300.0) == (522.0, 1000.0)
    assert score_range([1], steps, True, True, 0.0) == (522.0, 757.0)
    assert score_range([2], steps, True, True, 0.0) == (0.0, 522.0)
    assert score_range([0, 1, 0], steps, True, True, 0.0) == (522.0, 1000.0)  # around all blocks' ranges


def test_exits_follow_from_seed_and_iteration():
    drawn = [draw_exits(7, i, 3, 5, False, False) for i in range(2000)]
    assert drawn == [draw_exits(7, i, 3, 5, False, False) for i in range(2000)]
    assert drawn != [draw_exits(8, i, 3, 5, False, False) for i in range(2000)]
    shares = torch.tensor(drawn).flatten().bincount() / 10_000
    torch.testing.assert_close(shares, torch.full((3,), 1 / 3), atol=0.02, rtol=0)
    assert any(len(set(exits)) > 1 for exits in drawn)
    same = [draw_exits(7, i, 3, 5, True, False) for i in range(300)]
    assert all(len(set(exits)) == 1 for exits in same) and {exits[0] for exits in same} == {0, 1, 2}
    assert draw_exits(7, 0, 3, 5, False, True) == [2] * 5


@pytest.mark.parametrize("frames, first, channels", [(9, 3, 27), (21, 3, 16), (21, 1, 16)])
def test_what_follows_from_a_clip_s_noise_follows_from_its_first_block_s_if_tied(frames, first, channels):
    """Brightness in each channel of a place, say: a sum over all frames. It is as large as of independent noise."""
    rng = torch.Generator().manual_seed(1)
    free = torch.randn(4096, channels, frames, 1, 2, generator=rng, dtype=torch.float64)
    tied = tied_noise(free, first)
    assert torch.equal(tied[:, :, :first], free[:, :, :first])

    def sums(noise):
        return noise.sum(2).flatten(1)

    def unexplained(noise) -> float:
        seen = noise[:, :, :first].flatten(1)
        rest = sums(noise) - seen @ torch.linalg.lstsq(seen, sums(noise)).solution
        return (rest.var() / sums(noise).var()).item()

    assert unexplained(tied) < 1e-20
    assert abs(unexplained(free) - (1 - first / frames)) < 0.05
    assert abs(sums(tied).var() / frames - 1) < 0.03
    assert (tied.square().mean((0, 1, 3, 4)) - 1).abs().max() < 0.02  # of each frame


def test_the_noise_of_a_clip_of_one_block_stays_as_it_is():
    noise = torch.randn(2, 4, 5, 2, 2)
    assert torch.equal(tied_noise(noise, 5), noise)
