"""Attention: checkpointing that keeps its results, and kernels by name, with and without a gradient."""

from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

import train_dmd_distill_wan
import train_lcm_distill_sd
import train_lcm_distill_sdxl
from common import networks
from common.networks import BackendAttention, checkpoint_activations, speed_up
from common.planning.meter import Meter
from common.wan.causal import own_attention
from common.wan.parallel import shard
from tests.helpers import short_wan_run, tiny_unet, tiny_wan, without
from tests.lcm import Runner

BLOCKS = ("BasicTransformerBlock", "ResnetBlock2D", "WanTransformerBlock")
TEXT = 3  # rows of text, fewer than tokens of pictures and clips


class Kernels(TorchDispatchMode):
    """Counts calls of attention's kernel, by rows of keys; inside, also what backward() computes again is counted."""

    def __init__(self):
        super().__init__()
        self.rows = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if operation is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default:
            self.rows.append(args[1].shape[2])
        return operation(*args, **(kwargs or {}))

    @property
    def of_pictures(self) -> int:
        return sum(rows != TEXT for rows in self.rows)


def network_and_call(name: str, lora: bool, dropout: float = 0.0, rows: int = TEXT):
    """A tiny network in training, with a call of it. A LoRA's second matrix is not zero."""
    rng = torch.Generator().manual_seed(0)
    text = torch.randn(2, rows, 16, generator=rng)
    if name == "wan":
        network = own_attention(tiny_wan())
        inputs = torch.randn(2, 4, 3, 4, 4, generator=rng), torch.full((2,), 757.0), text
        targets = ["to_q", "to_k", "to_v", "to_out.0", "ffn.net.2"]
    else:
        network = tiny_unet()
        network.set_attn_processor(BackendAttention())
        inputs = torch.randn(2, 4, 8, 8, generator=rng), torch.tensor([999, 19]), text
        targets = ["to_q", "to_k", "to_v", "to_out.0", "conv1", "ff.net.2"]
    network.requires_grad_(not lora).train()
    if lora:
        torch.manual_seed(0)
        network.add_adapter(LoraConfig(r=2, target_modules=targets, lora_dropout=dropout, init_lora_weights=False))
    return network, lambda: network(*inputs).sample


def flags(**given):
    usual = {"gradient_checkpointing": True, "checkpoint_attention": False, "compile": False}
    usual |= {"offload_activations": False}
    return SimpleNamespace(**usual | given)


def gradients(network, call, autocast: bool = False) -> tuple[list[torch.Tensor], int, int]:
    """Of each trained weight, and how often attention among pictures' own tokens was computed, and to the text."""
    network.zero_grad()
    torch.manual_seed(1)  # for dropout
    with Kernels() as kernels:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = call()
        out.float().square().sum().backward()
    return (
        [p.grad.clone() for p in network.parameters() if p.requires_grad],
        kernels.of_pictures,
        kernels.rows.count(TEXT),
    )


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("name", ["unet", "wan"])
def test_checkpointing_computes_attention_once_and_gives_the_same_gradients(name, lora, autocast):
    network, call = network_and_call(name, lora, dropout=0.3)
    plain, layers, to_text = gradients(network, call, autocast)
    assert layers == sum(module_name.endswith("attn1") for module_name, _ in network.named_modules()) > 1
    checkpoint_activations(flags(), network, BLOCKS)
    kept, *calls = gradients(network, call, autocast)
    assert calls == [layers, 2 * to_text]
    assert len(plain) > 20 and all(torch.equal(a, b) for a, b in zip(plain, kept, strict=True))
    checkpoint_activations(flags(checkpoint_attention=True), network, BLOCKS)
    again, *calls = gradients(network, call, autocast)
    assert calls == [2 * layers, 2 * to_text]
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


@pytest.mark.parametrize("attention", [False, True])
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("name", ["unet", "wan"])
def test_what_checkpointed_blocks_begin_with_can_wait_elsewhere(name, lora, attention):
    network, call = network_and_call(name, lora, dropout=0.3)
    plain, _, _ = gradients(network, call)
    given, alive = [], {}
    for block in network.modules():
        if type(block).__name__ in BLOCKS:
            block.register_forward_pre_hook(lambda _, inputs: given.append(StorageWeakRef(inputs[0].untyped_storage())))
    for offload in (False, True):
        given.clear()
        checkpoint_activations(flags(offload_activations=offload, checkpoint_attention=attention), network, BLOCKS)
        torch.manual_seed(1)
        out = call()
        alive[offload] = sum(not storage.expired() for storage in given)
        del out
        found, _, _ = gradients(network, call)
        assert all(torch.equal(a, b) for a, b in zip(plain, found, strict=True))
    assert alive[True] < alive[False] and (name == "unet" or alive[True] == 0), alive


@pytest.mark.parametrize("name", ["unet", "wan"])
def test_compiled_blocks_compute_attention_once_too(name):
    """By the compiler's own partition of a block's forward and backward, without its code generation."""
    network, call = network_and_call(name, lora=True, dropout=0.3)
    plain, layers, _ = gradients(network, call)
    before = kept_bytes(network, call)
    checkpoint_activations(flags(compile=True), network, BLOCKS)
    for block in network.modules():
        if type(block).__name__ in BLOCKS:
            block.compile(backend="aot_eager_decomp_partition")
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    call()  # compiles: under a dispatch mode blocks are left alone
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] > 0 and not counters["graph_break"]
    kept, calls, _ = gradients(network, call)
    assert calls == layers
    assert kept_bytes(network, call) < 0.7 * before
    for a, b in zip(plain, kept, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_compiled_blocks_of_a_split_network_compute_attention_once_too(alone, monkeypatch):
    """Blocks that FSDP has split are of another class."""
    network, call = network_and_call("wan", lora=False)
    plain, layers, to_text = gradients(network, call)
    compiled, backend = torch.nn.Module.compile, "aot_eager_decomp_partition"
    monkeypatch.setattr(torch.nn.Module, "compile", lambda block, **given: compiled(block, backend=backend, **given))
    shard(network, BLOCKS, SimpleNamespace(device=torch.device("cpu"), num_processes=1), torch.float32)
    usual = {"attention_mechanism": "diffusers", "enable_xformers_memory_efficient_attention": False}
    args = flags(compile=True, attention_without_gradient=None, **usual)
    speed_up(args, [network], BLOCKS, print)
    checkpoint_activations(args, network, BLOCKS)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    call().square().sum().backward()  # nothing is compiled while calls are counted
    kept, *calls = gradients(network, call)
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
    assert calls == [layers, 2 * to_text]
    for a, b in zip(plain, kept, strict=True):
        torch.testing.assert_close(a, b.full_tensor(), rtol=1e-4, atol=1e-5)


def held_by(network, meter) -> int:
    """Bytes of the network itself, of which a meter first hears by what is made of it."""
    for tensor in [*network.parameters(), *network.buffers()]:
        tensor.detach()
    return meter.total


def kept_bytes(network, call) -> int:
    """What a forward keeps for backward()."""
    with Meter(fake=False, block=1) as meter:
        weights = held_by(network, meter)
        out = call()
        assert out.requires_grad
        return meter.total - weights


def test_attention_to_a_long_text_is_kept_too_each_result_in_its_place():
    network, call = network_and_call("unet", lora=True, rows=100)
    plain, layers, _ = gradients(network, call)
    checkpoint_activations(flags(), network, BLOCKS)
    kept, calls, _ = gradients(network, call)
    assert calls == layers == 8 and all(torch.equal(a, b) for a, b in zip(plain, kept, strict=True))


def test_what_is_kept_of_attention_is_its_result_alone():
    """One tensor [B, L, C] for each layer, and its sums of exponents; all is free after backward()."""
    network, call = network_and_call("wan", lora=True)
    kept, left = [], []
    for whole in (True, False):
        checkpoint_activations(flags(checkpoint_attention=whole), network, BLOCKS)
        with Meter(fake=False, block=1) as meter:
            weights = held_by(network, meter)
            out = call()
            kept.append(meter.total - weights)
            out.square().sum().backward()
            del out
            network.zero_grad()
            left.append(meter.total - weights)
    tokens, channels, heads = 2 * 3 * 2 * 2, 24, 2
    assert left[0] == left[1] < 1000
    assert kept[1] - kept[0] == 2 * tokens * (channels + heads) * 4  # two layers, fp32


def test_a_kernel_of_a_package_is_kept_too(monkeypatch):
    """As flash-attn has it: an operation of its own inside an autograd.Function."""

    @torch.library.custom_op("a_flash_attn::forward", mutates_args=())
    def forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        calls.append(1)
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        out, sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
        return out.transpose(1, 2).contiguous(), sums.clone()

    class Flash(torch.autograd.Function):
        @staticmethod
        def forward(ctx, q, k, v):
            out, sums = torch.ops.a_flash_attn.forward(q, k, v)
            ctx.save_for_backward(q, k, v, out, sums)
            return out

        @staticmethod
        def backward(ctx, grad):
            q, k, v, out, sums = ctx.saved_tensors
            q, k, v, out, grad = (part.transpose(1, 2) for part in (q, k, v, out, grad))
            return tuple(
                part.transpose(1, 2)
                for part in torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                    grad, q, k, v, out, sums, 0.0, False
                )
            )

    calls = []
    network, call = network_and_call("wan", lora=True)
    plain, *_ = gradients(network, call)
    monkeypatch.setattr(networks, "dispatch_attention_fn", lambda q, k, v, mask, backend: Flash.apply(q, k, v))
    checkpoint_activations(flags(), network, BLOCKS)
    kept, *_ = gradients(network, call)
    assert len(calls) == 2  # layers
    for a, b in zip(plain, kept, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# In the scripts
# ---------------------------------------------------------------------------------------------------------------------


def same_weights_and_calls(run):
    """`run(flags)` gives the weights of a checkpoint: the same with checkpointing, by as many calls of attention."""
    found = []
    for given in ("", "--gradient_checkpointing"):
        with Kernels() as kernels:
            weights = run(given)
        found.append((weights, kernels.of_pictures))
    (plain, calls), (kept, calls_kept) = found
    assert len(plain) > 10 and plain.keys() == kept.keys() and calls_kept == calls > 0
    assert all(torch.equal(kept[name], plain[name]) for name in plain)


def only_save(args, saver, *_, step, **__):
    """In place of a run's end: nothing is generated."""
    saver.save(step)


@pytest.mark.parametrize(
    ("name", "student"), [("sd", "--model_type full"), ("sdxl", "--lora_rank 2 --lora_dropout 0.3 --ema_decay 0.5")]
)
def test_lcm_scripts_train_the_same(name, student, request, small_shards, tmp_path, monkeypatch, one_process):
    monkeypatch.chdir(small_shards)
    script = {"sd": train_lcm_distill_sd, "sdxl": train_lcm_distill_sdxl}[name]
    runner = Runner(script, tmp_path, request.getfixturevalue(f"{name}_teacher"), one_process)
    monkeypatch.setattr(script, "end_run", only_save)
    monkeypatch.setattr("tests.test_attention.TEXT", 32)

    def run(given: str):
        out = runner.run(f"{student} --max_train_steps 2 {given}", out=f"out{len(given)}")
        return load_file(out / "checkpoint-2" / "student.safetensors")

    same_weights_and_calls(run)


@pytest.mark.parametrize(
    "student",
    [
        "--model_type full",
        "--lora_rank 2 --lora_dropout 0.3",
        "--lora_rank 2 --lora_dropout 0.3 --num_frame_per_block 1 --causal_init_steps 1",
        "--lora_rank 2 --distillation_method lcm",
    ],
)
def test_the_wan_script_trains_the_same(student, wan_teacher, tmp_path, monkeypatch, one_process):
    monkeypatch.setattr(train_dmd_distill_wan, "end_run", only_save)

    def run(given: str):
        usual = short_wan_run(wan_teacher, tmp_path, f"out{len(given)}")
        usual = without(usual, "--fake_score_lr") if "lcm" in student else usual
        own = f"{student} {given} --max_sequence_length {TEXT} --max_train_steps 2".split()
        train_dmd_distill_wan.main(*train_dmd_distill_wan.parse_args([*usual, *own]))
        one_process()
        return load_file(tmp_path / f"out{len(given)}" / "checkpoint-2" / "student.safetensors")

    same_weights_and_calls(run)
