"""What several processes split: their rules, and the exchange of tokens for heads, between threads."""

import contextlib
import threading
from argparse import Namespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from torch.testing._internal.distributed.fake_pg import FakeStore

from common.run import PATIENCE
from common.wan import parallel
from common.wan.causal import own_attention
from common.wan.parallel import (
    check_processes,
    gathered,
    heads_to_tokens,
    own_tokens,
    shard,
    share_tokens,
    token_group,
    tokens_to_heads,
    wants_fsdp,
)
from tests.helpers import tiny_wan
from train_dmd_distill_wan import BLOCKS


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


@contextlib.contextmanager
def processes(count: int):
    """Inside, this process is one of so many, and others, which are not there, send nothing of worth."""
    torch.distributed.init_process_group("fake", rank=0, world_size=count, store=FakeStore())
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_autocast_casts_is_gathered_in_that_and_nothing_else(dtype):
    """Wan's norms, tables and time embedding stay in fp32 where it has them so."""
    network, seen, autocast = tiny_wan(), {}, dtype != torch.float32

    def note(module, inputs, name):
        seen.update({f"{name}.{key}": p.dtype for key, p in module.named_parameters(recurse=False)})

    inputs = {"hidden_states": torch.zeros(1, 4, 1, 4, 4), "timestep": torch.zeros(1)}
    with processes(2), torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        shard(network, BLOCKS, Namespace(device=torch.device("cpu"), num_processes=2), dtype)
        for name, module in network.named_modules():  # after those that gather
            module.register_forward_pre_hook(lambda module, inputs, name=name: note(module, inputs, name))
        network(**inputs, encoder_hidden_states=torch.zeros(1, 3, 16))
    linear = {name for name, module in network.blocks.named_modules() if isinstance(module, torch.nn.Linear)}
    cast = {f"blocks.{name}.{key}" for name in linear for key in ("weight", "bias")}
    assert len(cast) == 2 * 2 * 10 and {seen[name] for name in cast} == {dtype}
    others = {"blocks.0.scale_shift_table", "blocks.0.norm2.weight", "condition_embedder.time_embedder.linear_1.weight"}
    assert others < seen.keys() and {seen[name] for name in seen.keys() - cast} == {torch.float32}


def test_groups_that_share_tokens_wait_as_long_as_all_processes_do(monkeypatch):
    """Four processes, of which two share a clip's tokens: torch's own groups of them would wait for ten minutes."""
    waits, network, three_hours = {}, tiny_wan(), Namespace(timeout=PATIENCE)
    monkeypatch.setattr(parallel, "_set_pg_timeout", lambda timeout, group: waits.update({group.group_name: timeout}))
    device = torch.device("cpu")
    with processes(4):
        accelerator = Namespace(device=device, num_processes=4, process_index=0, init_handler=three_hours)
        share_tokens(own_attention(network), 2, accelerator, True)
        whole = network._parallel_config.context_parallel_config._flattened_mesh.get_group()  # where parts are joined
        for group in (token_group(network), whole):
            assert group.size() == 2 and waits[group.group_name] == PATIENCE
        assert Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)]).init_handler.timeout == PATIENCE
