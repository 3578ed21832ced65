"""Flow matching in common/solvers.py: timesteps, the stock scheduler, trajectories, and the rollout of blocks."""

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchLCMScheduler

from common.solvers import (
    block_lengths,
    denoising_steps,
    flow_grid,
    flow_trajectory,
    roll_out,
    shift_time,
    stock_scheduler,
    unshift_time,
)

# ---------------------------------------------------------------------------------------------------------------------
# Timesteps
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, shift, expected",
    [
        ("1000,757,522", 1.0, [1000, 757, 522]),
        ("1000,500", 7.0, [1000, 500]),
        ("4", 5.0, [1000, 937.5, 833.333333, 625]),
        ("2", 1.0, [1000, 500]),
        ("1000", 1.0, [1000]),
    ],
)
def test_steps_are_listed_or_counted(text, shift, expected):
    assert denoising_steps(text, shift) == pytest.approx(expected)


@pytest.mark.parametrize("text", ["757,522", "1000,522,757", "1000,1000", "1000,0", "2.5", "0", "1000,x", ""])
def test_steps_that_are_none_are_refused(text):
    with pytest.raises(ValueError):
        denoising_steps(text, 5.0)


def test_the_shift_is_flow_matching_s_own():
    u = torch.linspace(0.001, 1, 1000)
    stock = FlowMatchEulerDiscreteScheduler(shift=5.0).sigmas.flip(0)
    torch.testing.assert_close(shift_time(u, 5.0), stock, rtol=1e-5, atol=0)
    torch.testing.assert_close(unshift_time(stock, 5.0), u, rtol=1e-4, atol=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# Sampling
# ---------------------------------------------------------------------------------------------------------------------


def bent(x, t):
    """A velocity that is no straight line to any x0."""
    return torch.sin(3 * x) + t / 1000


@pytest.mark.parametrize("text, stock", [
    ("1000", True), ("1000,500", True), ("1000,757,522", True), ("1000,666,333", True), ("4", True),
    ("1000,800,700,100", False),
])  # fmt: skip
def test_the_stock_scheduler_takes_the_rollout_s_steps(text, stock, tmp_path):
    steps = denoising_steps(text, 5.0)
    scheduler = stock_scheduler(steps)
    assert (scheduler is not None) == stock
    if not stock:
        return
    scheduler.save_pretrained(tmp_path)
    scheduler = FlowMatchLCMScheduler.from_pretrained(tmp_path)
    scheduler.set_timesteps(len(steps))
    torch.testing.assert_close(scheduler.timesteps, torch.tensor(steps), atol=2e-4, rtol=0)
    torch.manual_seed(0)
    noise = torch.randn(len(steps), 2, 4, 3, 2, 2)
    (ours,) = roll_out(
        lambda x, t, start, cache: bent(x, t), None, noise.__getitem__, steps, [3], [len(steps) - 1]
    )  # fmt: skip
    torch.manual_seed(0)
    x = torch.randn(len(steps), 2, 4, 3, 2, 2)[0]
    torch.manual_seed(0)
    draws = iter([*torch.randn(len(steps), 2, 4, 3, 2, 2)[1:], torch.zeros(2, 4, 3, 2, 2)])
    from diffusers.schedulers import scheduling_flow_match_lcm as module

    original, module.randn_tensor = module.randn_tensor, lambda *args, **kwargs: next(draws)
    try:
        for t in scheduler.timesteps:
            x = scheduler.step(bent(x, t), t, x, return_dict=False)[0]
    finally:
        module.randn_tensor = original
    torch.testing.assert_close(ours, x, atol=1e-5, rtol=0)


def test_the_flow_s_trajectory_is_nearer_to_the_flow_than_three_times_as_many_steps_of_euler():
    steps = [1000.0, 757.0, 522.0]
    noise = torch.randn(2, 4, 3, 2, 2, generator=torch.Generator().manual_seed(0))

    def euler(count: int):
        """What diffusers' solver passes at each of the steps, and where it ends."""
        scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
        scheduler.set_timesteps(sigmas=[t / 1000 for t in flow_grid(steps, count, 3.0)[:-1]])
        x, seen = noise, {}
        for t in scheduler.timesteps:
            seen[round(t.item(), 2)] = x
            x = scheduler.step(bent(x, t), t, x, return_dict=False)[0]
        return torch.stack([*(seen[t] for t in steps), x])

    grid = flow_grid(steps, 16, 3.0)
    assert {*steps, 0.0} < set(grid) and len(grid) == 19
    kept, end = flow_trajectory(bent, noise, grid, steps)
    flow = euler(2000)
    ours, theirs = ((found - flow).abs().flatten(1).amax(1) for found in (torch.stack([*kept, end]), euler(50)))
    print(f"errors {ours.tolist()}, of 50 steps of Euler {theirs.tolist()}")
    assert ours[0] == theirs[0] == 0
    assert (ours[1:] < theirs[1:]).all()


# ---------------------------------------------------------------------------------------------------------------------
# The rollout
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "frames, per_block, first, expected",
    [(21, 0, False, [21]), (21, 3, False, [3] * 7), (22, 3, True, [1] + [3] * 7), (21, 21, False, [21]),
     (28, 3, True, [1] + [3] * 9), (1, 3, True, [1])],
)  # fmt: skip
def test_blocks_of_a_clip(frames, per_block, first, expected):
    assert block_lengths(frames, per_block, first) == expected


def test_frames_that_do_not_fit_are_told_which_do():
    with pytest.raises(ValueError, match="31 latent frames do not split into blocks of 3, 30 or 33 do"):
        block_lengths(31, 3)
    with pytest.raises(ValueError, match="2 latent frames .* 3 do"):
        block_lengths(2, 3)
    with pytest.raises(ValueError, match="21 .* 19 or 22 do"):
        block_lengths(21, 3, True)


def calls_of(exits, blocks, steps=(1000.0, 757.0, 522.0), **options):
    """(t, start, frames, whether with gradient) of each evaluation, by a student that only notes them."""
    calls, weight = [], torch.ones((), requires_grad=True)

    def predict(x, t, start, cache):
        calls.append((t, start, x.shape[2], torch.is_grad_enabled()))
        return x * weight

    def remember(x, t, start, cache):
        calls.append(("cache", t, start, torch.is_grad_enabled()))
        return (cache or ()) + (start,)

    noise = torch.ones(1, 1, sum(blocks), 1, 1)
    made = list(roll_out(predict, remember, lambda k: noise, list(steps), blocks, exits, **options))
    return calls, made


def test_the_rollout_stops_at_the_exit_step_and_only_that_has_a_gradient():
    calls, made = calls_of([1, 0, 2], [2, 3, 3])
    assert calls == [
        (1000.0, 0, 2, False), (757.0, 0, 2, True), ("cache", 0.0, 0, False),
        (1000.0, 2, 3, True), ("cache", 0.0, 2, False),
        (1000.0, 5, 3, False), (757.0, 5, 3, False), (522.0, 5, 3, True),
    ]  # fmt: skip
    assert [x.shape[2] for x in made] == [2, 3, 3] and all(x.requires_grad for x in made)


def test_one_block_fills_no_cache():
    calls, _ = calls_of([2], [8])
    assert calls == [(1000.0, 0, 8, False), (757.0, 0, 8, False), (522.0, 0, 8, True)]


def test_a_longer_rollout_has_a_gradient_in_its_last_frames_alone():
    calls, made = calls_of([0, 0, 0], [3, 3, 3], trained_from=6)
    assert [grad for name, *_, grad in calls if name != "cache"] == [False, False, True]
    assert [x.requires_grad for x in made] == [False, False, True]


def test_nothing_has_a_gradient_where_none_is_wanted():
    with torch.no_grad():
        calls, made = calls_of([1, 1], [3, 3])
    assert not any(grad for *_, grad in calls) and not any(x.requires_grad for x in made)


def test_context_noise_reaches_what_the_cache_is_made_of():
    contexts = []

    def remember(x, t, start, cache):
        contexts.append((x.clone(), t))

    noise = {0: torch.full((1, 1, 4, 1, 1), 2.0), None: torch.full((1, 1, 4, 1, 1), 10.0)}
    for level in (0.0, 100.0):
        list(roll_out(lambda x, t, *_: x * 0.5, remember, noise.__getitem__, [1000.0], [2, 2], [0, 0],
                      context_noise=level))  # fmt: skip
    (clean, t_clean), (noised, t_noised) = contexts
    assert (t_clean, t_noised) == (0.0, 100.0)
    torch.testing.assert_close(clean, torch.full((1, 1, 2, 1, 1), 1.0))
    torch.testing.assert_close(noised, torch.full((1, 1, 2, 1, 1), 0.9 * 1.0 + 0.1 * 10.0))


def test_blocks_come_one_by_one():
    """Streaming: the first is there before the second is begun."""
    seen = []
    rollout = roll_out(
        lambda x, t, start, cache: seen.append(start) or x, lambda *_: None, lambda k: torch.ones(1, 1, 4, 1, 1),
        [1000.0], [2, 2], [0, 0],
    )  # fmt: skip
    next(rollout)
    assert seen == [0]
