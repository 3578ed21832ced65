"""Random numbers follow from the seed and a sample's place alone, and have the shares that were asked for."""

from types import SimpleNamespace

import pytest
import torch

from common.draws import ROLLOUT_LENGTHS, Draws, draw_dropped, draw_rollout, sample_generator

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
