"""Draws of DMD in common/draws.py: timesteps of the score, exits of rollouts, and the noise of trajectories."""

import pytest
import torch

from common.draws import draw_exits, score_range, score_timesteps, tied_noise


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
