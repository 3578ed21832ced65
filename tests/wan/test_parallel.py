"""What several processes split: their rules, and the exchange of tokens for heads, between threads."""

import threading
from argparse import Namespace

import pytest
import torch
from accelerate import Accelerator

from common.wan import parallel
from common.wan.parallel import (
    check_processes,
    gathered,
    heads_to_tokens,
    own_tokens,
    share_tokens,
    tokens_to_heads,
    wants_fsdp,
)
from tests.helpers import tiny_wan


class Group:
    """One of several threads, as a group of processes looks to it."""

    def __init__(self, rank: int, rows: list, barrier: threading.Barrier):
        self.own, self.rows, self.barrier = rank, rows, barrier

    def size(self) -> int:
        return len(self.rows)

    def rank(self) -> int:
        return self.own


@pytest.fixture
def everywhere(monkeypatch):
    """`everywhere(count, function)`: results of function(group) of so many threads that exchange rows."""

    def exchanged(x, group):
        group.rows[group.own] = x
        group.barrier.wait()
        received = torch.stack([rows[group.own] for rows in group.rows])
        group.barrier.wait()
        return received

    def everywhere(count, function):
        rows, barrier, results = [None] * count, threading.Barrier(count, timeout=20), [None] * count

        def work(rank):
            results[rank] = function(Group(rank, rows, barrier))

        threads = [threading.Thread(target=work, args=(rank,)) for rank in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results

    monkeypatch.setattr(parallel, "exchanged", exchanged)
    return everywhere


@pytest.mark.parametrize("count", [2, 3])
def test_tokens_go_to_heads_and_back(count, everywhere):
    """Each process has all tokens of its share of the heads in between."""
    x = torch.randn(2, 12, 6, 5)  # [B, L, heads, D]
    parts = everywhere(count, lambda group: tokens_to_heads(x.chunk(count, 1)[group.rank()], group))
    for part, wanted in zip(parts, x.chunk(count, 2), strict=True):
        assert torch.equal(part, wanted)
    back = everywhere(count, lambda group: heads_to_tokens(parts[group.rank()], group))
    assert torch.equal(torch.cat(back, 1), x)


def test_one_process_exchanges_nothing():
    x, network = torch.randn(2, 12, 6, 5), tiny_wan()
    assert tokens_to_heads(x, None) is x and heads_to_tokens(x, None) is x
    assert own_tokens(x, network) is x
    assert own_tokens(x, network.blocks[0].attn1.processor) is x
    assert gathered(network) is network


def test_each_process_has_its_own_tokens(monkeypatch):
    x = torch.randn(2, 12, 6)
    for rank in range(3):
        monkeypatch.setattr(parallel, "token_group", lambda owner, rank=rank: Group(rank, [None] * 3, None))
        assert torch.equal(own_tokens(x, None), x[:, 4 * rank : 4 * rank + 4])


def settings(**changes) -> Namespace:
    usual = {"context_parallel_degree": 1, "model_type": "full", "ema_device": "accelerator"}
    usual |= {"base_model_precision": "no_change", "optimizer": "adamw", "use_8bit_adam": False}
    return Namespace(**usual | changes)


def test_processes_share_tokens_only_where_that_comes_out_even():
    for processes, degree in ((1, 1), (4, 1), (4, 2), (4, 4)):
        assert check_processes(settings(context_parallel_degree=degree), Namespace(num_processes=processes)) == degree
    for processes, degree in ((1, 2), (4, 3), (2, 4)):
        with pytest.raises(SystemExit, match=f"{degree}: must divide {processes} processes"):
            check_processes(settings(context_parallel_degree=degree), Namespace(num_processes=processes))
    with pytest.raises(SystemExit, match="--context_parallel_degree 3: must divide 2 heads"):
        share_tokens(tiny_wan(), 3, Accelerator(), True)


def test_what_does_not_go_with_fsdp_is_refused(monkeypatch):
    one, four = Namespace(num_processes=1), Namespace(num_processes=4)
    assert not wants_fsdp(four)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert wants_fsdp(four) and not wants_fsdp(one)
    assert check_processes(settings(), four) == 1
    for changes, rule in (
        ({"base_model_precision": "int8-torchao"}, "--base_model_precision int8-torchao: one or the other"),
        ({"ema_device": "cpu"}, "--ema_device accelerator"), ({"use_8bit_adam": True}, "no 8-bit AdamW"),
    ):  # fmt: skip
        with pytest.raises(SystemExit, match=rule):
            check_processes(settings(**changes), four)
        assert check_processes(settings(**changes), one) == 1  # a single process splits nothing
    assert check_processes(settings(model_type="lora", ema_device="cpu", use_8bit_adam=True), four) == 1
    with pytest.raises(SystemExit, match="goes without FSDP"):
        check_processes(settings(context_parallel_degree=2), four)
