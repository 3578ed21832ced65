"""Optimizers and schedules by name, against those of torch and diffusers, and the gradients of several processes."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from diffusers.optimization import get_scheduler

from common import optim
from common.optim import DECAYS, Lion, average_gradients, make_optimizer, make_schedule, optimizer_name, update_ema

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("optimizer", "use_8bit_adam", "name"),
    [
        ("adamw", False, "adamw"), ("adamw_bf16", False, "adamw"), ("adamw8bit", False, "adamw8bit"),
        ("adamw", True, "adamw8bit"), ("adamw8bit", True, "adamw8bit"), ("lion", False, "lion"),
        ("optimi-lion", False, "lion"),
    ],
)  # fmt: skip
def test_names_of_optimizers(optimizer, use_8bit_adam, name):
    assert optimizer_name(SimpleNamespace(optimizer=optimizer, use_8bit_adam=use_8bit_adam)) == name


def steps_of(make) -> torch.Tensor:
    p = torch.nn.Parameter(torch.linspace(-1.0, 1.0, 12))
    optimizer = make([p])
    for i in range(3):
        p.grad = torch.linspace(0.5, -1.0, 12) * (i + 1)
        optimizer.step()
    return p.detach()


@pytest.mark.parametrize("name", ["adamw", "adamw8bit"])
def test_adamw_is_torchs(name):
    """On a CPU 8-bit AdamW is plain AdamW."""
    ours = steps_of(lambda p: make_optimizer(name, p, 0.1, (0.8, 0.95), 0.2, 1e-3, CPU))
    theirs = steps_of(lambda p: torch.optim.AdamW(p, 0.1, (0.8, 0.95), 1e-3, 0.2, fused=False))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def test_lion_has_its_settings():
    ours = steps_of(lambda p: make_optimizer("lion", p, 0.1, (0.8, 0.95), 0.2, 1e-3, CPU))
    assert torch.equal(ours, steps_of(lambda p: Lion(p, 0.1, (0.8, 0.95), 0.2)))
    assert not torch.equal(ours, steps_of(lambda p: Lion(p, 0.1, (0.8, 0.95), 0.0)))


def test_lion_takes_two_steps_by_hand():
    p = torch.nn.Parameter(torch.tensor([1.0]))
    optimizer = Lion([p], lr=0.1, betas=(0.9, 0.5), weight_decay=0.2)
    p.grad = torch.tensor([2.0])
    optimizer.step()
    assert p.item() == pytest.approx(1.0 * (1 - 0.02) - 0.1)  # m = 0.5 * 2 = 1
    p.grad = torch.tensor([-3.0])
    optimizer.step()  # 0.9 * 1 + 0.1 * -3 = 0.6 > 0
    assert p.item() == pytest.approx(0.88 * 0.98 - 0.1)


# ---------------------------------------------------------------------------------------------------------------------
# Schedules
# ---------------------------------------------------------------------------------------------------------------------


def rates(schedule, optimizer, count: int = 21) -> list[float]:
    found = []
    for _ in range(count):
        found.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    return found


def own_rates(name: str, end: float, steps: int, *init) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], 1e-3)
    args = SimpleNamespace(lr_scheduler=name, lr_warmup_steps=4, lr_end=end)
    return rates(make_schedule(args, optimizer, steps, *init), optimizer, steps + 1)


@pytest.mark.parametrize("name", ["constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts"])
def test_schedules_are_those_of_diffusers(name):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], 1e-3)
    theirs = rates(get_scheduler(name, optimizer, num_warmup_steps=4, num_training_steps=20), optimizer)
    assert own_rates(name, 0.0, 20) == pytest.approx(theirs, abs=1e-12)


@pytest.mark.parametrize("name", [name for name in DECAYS if "constant" not in name])
def test_a_schedule_warms_up_and_decays_once_to_its_end(name):
    found = own_rates(name, 2e-4, 20)
    assert found[:5] == pytest.approx([0.0, 0.25e-3, 0.5e-3, 0.75e-3, 1e-3])
    assert all(a > b for a, b in itertools.pairwise(found[4:])) and found[-1] == pytest.approx(2e-4)
    init = own_rates(name, 2e-4, 30, 10, 3.0)
    assert init[10:] == pytest.approx(found) and init[:5] == pytest.approx([3 * rate for rate in found[:5]])
    assert all(a > b > 6e-4 for a, b in itertools.pairwise(init[4:10]))


# ---------------------------------------------------------------------------------------------------------------------
# Gradients
# ---------------------------------------------------------------------------------------------------------------------


def test_gradients_of_processes_that_share_samples_are_summed(monkeypatch):
    """Of 4 processes each 2 share: what all_reduce has summed is divided by 2."""
    params = [torch.nn.Parameter(torch.zeros(2)) for _ in range(2)]
    for p in params:
        p.grad = torch.ones(2)
    monkeypatch.setattr(optim.torch.distributed, "all_reduce", lambda grads: grads.mul_(4.0))
    average_gradients(params, 4, sharing=2)
    assert all(torch.equal(p.grad, torch.full((2,), 2.0)) for p in params)
    average_gradients(params, 1)
    assert all(torch.equal(p.grad, torch.full((2,), 2.0)) for p in params)


@pytest.mark.parametrize(("bucket", "calls"), [(2**26, [60]), (100, [28, 28, 4]), (1, [12, 4] * 3 + [8, 4])])
def test_gradients_are_averaged_in_few_calls(bucket, calls, monkeypatch):
    """Each element of them once, wherever it stands; by four processes here, whose sum is four times one's."""
    shapes, sizes = [(3, 4), (2, 2)] * 3 + [(2, 1, 4), (4,)], []
    params = [torch.nn.Parameter(torch.zeros(shape)) for shape in shapes]
    for i, p in enumerate(params):
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(i))
    params[2].grad = params[2].grad.t().contiguous().t()
    before = [p.grad.clone() for p in params]
    monkeypatch.setattr(optim, "BUCKET", bucket)
    monkeypatch.setattr(
        optim.torch.distributed, "all_reduce", lambda grads: (sizes.append(grads.numel()), grads.mul_(4.0))
    )
    average_gradients(params, 4)
    assert sizes == calls
    assert all(torch.equal(p.grad, grad) for p, grad in zip(params, before, strict=True))


# ---------------------------------------------------------------------------------------------------------------------
# Moving average
# ---------------------------------------------------------------------------------------------------------------------


def test_ema_is_the_moving_average():
    target, source = [torch.tensor([1.0, -2.0]), torch.tensor([4.0])], [torch.tensor([3.0, 0.0]), torch.tensor([0.0])]
    update_ema(target, source, 0.75)
    assert [value for tensor in target for value in tensor.tolist()] == [1.5, -1.5, 3.0]
