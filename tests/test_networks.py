"""Networks: the guidance embedding, adapters on and off, averages, attention kernels, compilation, 8 bits."""

import argparse
import importlib.util
import inspect
import itertools
import threading
from types import SimpleNamespace

import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.models import attention_dispatch
from diffusers.models.attention_dispatch import AttentionBackendName, attention_backend
from peft import LoraConfig
from torch.nn.attention import SDPBackend
from torch.utils._python_dispatch import TorchDispatchMode

from common import networks
from common.networks import (
    active_adapter,
    adapter_layers,
    adapter_weights,
    check_precision,
    fastest_attention,
    guidance_embedding,
    precision_name,
    quantize,
    speed_up,
    weights_copy,
    weights_exchanged,
    with_uncond,
)
from common.wan.causal import own_attention
from tests.helpers import tiny_unet, tiny_wan

WAN_INPUTS = torch.randn(1, 4, 2, 4, 4), torch.ones(1), torch.randn(1, 8, 16)


def inputs():
    rng = torch.Generator().manual_seed(4)
    return torch.randn(2, 4, 4, 4, generator=rng), torch.tensor([999, 19]), torch.randn(2, 32, 16, generator=rng)


def unet(*adapters: str, base=tiny_unet, seed=0, dropout=0.0, precision="no_change", dtype=torch.float32, **config):
    """With adapters that do something, each something else."""
    torch.manual_seed(seed)
    network = quantize(base().requires_grad_(False).eval().to(dtype), precision, "cpu")
    for name in adapters:
        targets = ["to_q", "to_v", "conv1"]
        network.add_adapter(LoraConfig(r=2, lora_alpha=2, lora_dropout=dropout, target_modules=targets, **config), name)
    for name, p in network.named_parameters():
        if "lora_" in name:
            p.data = p.data.float()
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.3)
    return network


@torch.no_grad()
def output(network) -> torch.Tensor:
    x, t, cond = inputs()
    return network(x, t, cond).sample


# ---------------------------------------------------------------------------------------------------------------------
# Conditions
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [256, 255, 32, 7])
def test_the_guidance_embedding_is_what_the_pipeline_feeds(dim):
    pipeline_embedding = StableDiffusionPipeline.get_guidance_scale_embedding
    guidance_scale = 1 + torch.linspace(0.0, 15.0, 31)
    w = guidance_scale - 1  # as the pipeline does
    assert torch.equal(guidance_embedding(w, dim), pipeline_embedding(None, w, dim))


def test_the_second_half_of_a_batch_has_the_empty_prompt_and_all_else_of_the_first():
    cond = {"embeds": torch.ones(2, 3), "sizes": torch.tensor([[1.0], [2.0]])}
    both = with_uncond(cond, {"embeds": torch.zeros(1, 3)})
    assert both["embeds"].tolist() == [[1.0] * 3] * 2 + [[0.0] * 3] * 2
    assert both["sizes"].tolist() == [[1.0], [2.0], [1.0], [2.0]]


# ---------------------------------------------------------------------------------------------------------------------
# Several networks in one
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["lora", "dora", "int8-torchao"])
def test_the_base_alone_acts_inside_and_its_adapter_again_after_an_error(kind):
    bits = kind if kind.startswith("int8") else "no_change"
    network = unet("default", use_dora=kind == "dora", precision=bits)
    plain, adapted, layers = output(unet(precision=bits)), output(network), adapter_layers(network)
    assert (adapted - plain).abs().mean() > 1e-2
    with active_adapter(layers, "none"):
        assert torch.equal(output(network), plain)
        with active_adapter(layers, "default"):
            assert torch.equal(output(network), adapted)
        assert torch.equal(output(network), plain)
    with pytest.raises(KeyError), active_adapter(layers, "none"):
        raise KeyError
    assert torch.equal(output(network), adapted)


def test_only_the_adapter_that_is_asked_for_acts_and_gradients_stay_as_they_are():
    network = unet("first", "second")
    layers, plain = adapter_layers(network), output(unet())
    assert len(layers) == sum(name.endswith("base_layer") for name, _ in network.named_modules()) > 5
    trained = {name for name, p in network.named_parameters() if p.requires_grad}
    before, found = output(network), {}
    for name in ("first", "second", "none of this name"):
        with active_adapter(layers, name):
            found[name] = output(network)
            assert {name for name, p in network.named_parameters() if p.requires_grad} == trained
    assert torch.equal(found["none of this name"], plain)
    assert all((a - b).abs().mean() > 1e-3 for a, b in itertools.combinations(found.values(), 2))
    assert torch.equal(output(network), before)
    weights = adapter_weights(network, "first")
    assert list(weights) == [
        name.replace(".", "/") for name, _ in network.named_parameters() if ".first." in name
    ] and len(weights) == 2 * len(layers)


@pytest.mark.parametrize("dora", [False, True])
def test_dropout_is_where_a_gradient_is(dora):
    network = unet("default", dropout=0.5, use_dora=dora).train()
    layers = adapter_layers(network)

    def repeats() -> bool:
        x, t, cond = inputs()
        return torch.equal(network(x, t, cond).sample, network(x, t, cond).sample)

    assert not repeats()
    with active_adapter(layers, "default"):
        assert not repeats()
    with torch.no_grad(), active_adapter(layers, "default"):
        assert repeats() and torch.equal(output(network), output(network.eval()))  # and DoRA takes its shorter way
        network.train()
    assert not repeats()


def test_a_copy_of_the_trained_weights_changes_places_with_them():
    network = unet("default")
    copies = weights_copy(network, "cpu")
    trained = [(name, p) for name, p in network.named_parameters() if p.requires_grad]
    assert list(copies) == [name.replace(".", "/") for name, _ in trained]
    assert not any(p.requires_grad for p in copies.parameters())
    before, params = output(network), [p for _, p in trained]
    for p in copies.parameters():
        p.mul_(0.5)
    assert torch.equal(output(network), before)  # a copy
    own = [p.clone() for p in params]
    with pytest.raises(KeyError), weights_exchanged(params, list(copies.parameters())):
        assert all(torch.equal(p, 0.5 * value) for p, value in zip(params, own, strict=True))
        assert all(torch.equal(p, value) for p, value in zip(copies.parameters(), own, strict=True))
        raise KeyError
    assert torch.equal(output(network), before)
    assert all(torch.equal(p, 0.5 * value) for p, value in zip(copies.parameters(), own, strict=True))


# ---------------------------------------------------------------------------------------------------------------------
# Speed
# ---------------------------------------------------------------------------------------------------------------------


def one_block():
    """A network with a single BasicTransformerBlock."""
    return tiny_unet(
        down_block_types=("DownBlock2D",), mid_block_type=None, up_block_types=("CrossAttnUpBlock2D",),
        block_out_channels=(8,), layers_per_block=0,
    )  # fmt: skip


def fast(network, said=None, dynamic=False, **flags):
    usual = {"attention_mechanism": "diffusers", "enable_xformers_memory_efficient_attention": False, "compile": False}
    usual |= {"gradient_checkpointing": False, "attention_without_gradient": None}
    said = [] if said is None else said
    speed_up(SimpleNamespace(**usual | flags), (network, network), ("BasicTransformerBlock",), said.append, dynamic)
    return network


def test_another_attention_mechanism_computes_the_attention(monkeypatch):
    with attention_backend("native"):  # what is set inside is set for all networks, and put back at the end
        other = fast(unet(), attention_mechanism="_native_math")
    used, dispatch = [], networks.dispatch_attention_fn

    def watched(*arguments, backend):
        used.append(backend.value)
        return dispatch(*arguments, backend=backend)

    monkeypatch.setattr(networks, "dispatch_attention_fn", watched)
    plain = fast(unet())
    expected = output(plain)
    assert used == []
    found = output(other)
    assert set(used) == {"_native_math"} and len(used) == sum(
        name.endswith("attn1") or name.endswith("attn2") for name, _ in plain.named_modules()
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("flag", ["attention_mechanism", "attention_without_gradient"])
def test_an_attention_mechanism_that_is_not_there_is_one_sentence(flag):
    with pytest.raises(SystemExit, match=f"--{flag} flash: "):
        fast(unet(), **{flag: "flash"})


def test_forwards_without_gradient_may_have_attention_of_their_own(monkeypatch):
    used, dispatch = [], networks.dispatch_attention_fn

    def watched(*arguments, backend):
        used.append(backend and backend.value)
        return dispatch(*arguments, backend=backend)

    monkeypatch.setattr(networks, "dispatch_attention_fn", watched)
    for network, call in ((unet("default"), inputs()), (own_attention(tiny_wan()), WAN_INPUTS)):
        plain = network(*call).sample
        used.clear()
        fast(network, attention_without_gradient="_native_math")
        torch.testing.assert_close(network(*call).sample, plain, rtol=0, atol=1e-5)
        assert set(used) == {None}
        used.clear()
        with torch.no_grad():
            torch.testing.assert_close(network(*call).sample, plain, rtol=0, atol=1e-5)
        assert set(used) == {"_native_math"}
        fast(network, attention_without_gradient=None)
        with torch.no_grad():
            assert torch.equal(network(*call).sample, plain) and used[-1] is None


@pytest.mark.parametrize(
    ("capability", "dtype", "installed", "kernel", "expected"),
    [
        ((9, 0), torch.bfloat16, True, SDPBackend.CUDNN_ATTENTION, "diffusers"),
        ((9, 0), torch.bfloat16, True, SDPBackend.FLASH_ATTENTION, "_flash_varlen_3"),
        ((9, 0), torch.bfloat16, False, SDPBackend.FLASH_ATTENTION, "diffusers"),
        ((9, 0), torch.float32, True, SDPBackend.EFFICIENT_ATTENTION, "diffusers"),
        ((8, 9), torch.bfloat16, True, SDPBackend.FLASH_ATTENTION, "diffusers"),
        (None, torch.bfloat16, True, SDPBackend.FLASH_ATTENTION, "diffusers"),
    ],
)
def test_auto_is_the_fastest_attention_that_is_here_and_trains(
    capability, dtype, installed, kernel, expected, monkeypatch
):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: "found" if installed else None)
    monkeypatch.setattr(torch, "_fused_sdp_choice", lambda q, k, v: int(kernel.value) if q.dtype == dtype else -1)
    network = tiny_wan().to(dtype)
    network.scale_shift_table.data = network.scale_shift_table.data.float()  # the first weight, which stays in fp32
    if capability is not None:
        monkeypatch.setattr(type(network), "device", torch.device("cuda"))
        monkeypatch.setattr(torch, "empty", lambda *shape, dtype, device: torch.zeros(shape, dtype=dtype))
    backend, words = fastest_attention(network)
    assert backend == expected and (kernel.name in words) == (expected == "diffusers")


def test_auto_on_a_cpu_is_what_it_was_and_says_so():
    said, network = [], unet()
    assert torch.equal(output(fast(network, said, attention_mechanism="auto")), output(unet()))
    assert said == ["--attention_mechanism auto: PyTorch's SDPA, by its kernel FLASH_ATTENTION"]


def test_kernels_of_packages_get_one_precision(monkeypatch):
    """Under autocast a norm of q and k may leave them in fp32; PyTorch's SDPA is cast, a package's is not."""
    seen = []

    def watched(q, k, v, mask, backend):
        seen.append({part.dtype for part in (q, k, v)})
        return v

    monkeypatch.setattr(networks, "dispatch_attention_fn", watched)
    kernels, q = networks.Kernels(), torch.ones(1, 2, 1, 4)
    kernels._attention_backend = AttentionBackendName("flash")
    kernels.attend(q, q, q.bfloat16())
    assert seen == [{torch.bfloat16}]


@pytest.mark.parametrize("name", networks.NO_BACKWARD)
def test_backends_without_a_backward_are_those_of_sage_and_an_operation_that_has_none(name):
    """The facts in diffusers' source: SageAttention's package is not differentiable, nor its own operation of FA3."""
    source = inspect.getsource(attention_dispatch._AttentionBackendRegistry._backends[AttentionBackendName(name)])
    assert "sage" in source or "_wrapped_flash_attn_3(" in source
    assert "register_autograd" not in inspect.getsource(attention_dispatch)


def test_what_cannot_be_had_is_said(monkeypatch):
    said = []
    monkeypatch.setattr(networks, "is_xformers_available", lambda: False)
    fast(unet(), said, enable_xformers_memory_efficient_attention=True)
    assert said == ["--enable_xformers_memory_efficient_attention: not installed, PyTorch's SDPA is in use"]


def test_named_blocks_alone_are_compiled_once_and_frozen_weights_are_not_exchanged(monkeypatch):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, dynamic: compiled.append(self))
    network = fast(unet("default"), compile=True)
    blocks = [module for module in network.modules() if type(module).__name__ == "BasicTransformerBlock"]
    assert compiled == blocks and len(blocks) > 2
    ignored = set(network._ddp_params_and_buffers_to_ignore)
    assert ignored == {name for name, p in network.named_parameters() if not p.requires_grad}


@pytest.mark.parametrize(("dynamic", "more"), [(True, 0), pytest.param(False, 1, marks=pytest.mark.slow)])
def test_a_compiled_block_has_one_graph_for_all_shapes_or_one_for_each(dynamic, more, graphs):
    network, plain = fast(unet(base=one_block), compile=True, dynamic=dynamic), unet(base=one_block)
    counts = []
    for side in (6, 10):
        x, t, cond = torch.randn(2, 4, side, 8), torch.tensor(5), torch.randn(2, 7, 16)
        with torch.no_grad():
            torch.testing.assert_close(network(x, t, cond).sample, plain(x, t, cond).sample)
        counts.append(graphs.count)
    assert counts == [counts[0], counts[0] + more]
    graphs.check()


@pytest.mark.slow
def test_what_checkpointing_computes_again_makes_no_graph(graphs):
    """On a GPU backward() has a thread of its own, to which this one's settings of torch.compile mean nothing."""
    network = fast(unet("default", base=one_block, dropout=0.5).train(), compile=True, dynamic=True)
    network.enable_gradient_checkpointing()
    with torch.autocast("cpu", torch.bfloat16):
        out = network(torch.randn(2, 4, 6, 8), torch.tensor(5), torch.randn(2, 7, 16)).sample
    count = graphs.count
    thread = threading.Thread(target=out.sum().backward)
    thread.start()
    thread.join()
    assert graphs.count == count > 0
    assert all(p.grad.isfinite().all() for p in network.parameters() if p.requires_grad)
    graphs.check()


def test_a_block_that_is_no_longer_compiled_is_told_of_once(graphs, monkeypatch, caplog):
    said = []
    monkeypatch.setattr(networks, "MOST_GRAPHS", 1)
    network = fast(unet(base=one_block), said, compile=True)
    for batch in (2, 3, 4):
        with torch.no_grad():
            network(torch.randn(batch, 4, 4, 4), torch.tensor(5), torch.randn(batch, 7, 16))
    (sentence,) = said
    assert sentence.startswith("--compile: more than 1 graphs of 'forward' (") and "without compilation" in sentence
    assert not any("recompile_limit" in message for message in caplog.messages)


class CastsUp(TorchDispatchMode):
    """Counts the casts from bf16 to fp32."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **kwargs or {})
        if function is torch.ops.aten._to_copy.default:
            self.count += args[0].dtype == torch.bfloat16 and out.dtype == torch.float32
        return out


@pytest.mark.parametrize(
    ("base", "settings", "tolerance"),
    [
        (tiny_unet, {}, 0.0),
        (tiny_unet, {"use_dora": True}, 0.02),  # whose norms are in bf16 then, as those of convolutions are anyway
        (tiny_unet, {"precision": "int8-torchao"}, 0.0),
        (tiny_wan, {}, 0.0),
    ],
)
def test_under_autocast_an_adapter_leaves_its_input_in_bf16(base, settings, tolerance):
    x, t, cond = (part.bfloat16() if part.is_floating_point() else part for part in inputs())
    x = x if base is tiny_unet else x[:, :, None]  # [B, C, F, h, w]
    found = []
    for change in (lambda network: network, fast):
        network = change(unet("default", base=base, dtype=torch.bfloat16, **settings))
        layers = adapter_layers(network)
        with torch.autocast("cpu", torch.bfloat16):
            with CastsUp() as alone, active_adapter(layers, "none"):
                network(x, t, cond)
            with CastsUp() as adapted:
                out = network(x, t, cond).sample
        found.append((out.float(), adapted.count - alone.count))
    (usual, casts), (out, casts_now) = found
    assert casts >= len(layers) > 3 and casts_now == 0
    assert (out - usual).norm() <= tolerance * usual.norm()


# ---------------------------------------------------------------------------------------------------------------------
# 8 bits
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("precision", "kind", "error"),
    [("int8-torchao", "Int8Tensor", 0.02), ("int8-quanto", "Int8Tensor", 0.02), ("fp8-torchao", "Float8Tensor", 0.1)],
)
def test_linear_layers_are_in_8_bits_and_all_else_as_it_was(precision, kind, error):
    network, plain = quantize(unet(), precision, "cpu"), unet()
    kinds = {type(m.weight).__name__ for m in network.modules() if type(m) is torch.nn.Linear}
    assert kinds == {kind}
    others = [(m, n) for m, n in zip(network.modules(), plain.modules(), strict=True) if type(m) is torch.nn.Conv2d]
    assert others and all(torch.equal(m.weight, n.weight) for m, n in others)
    assert 1e-6 < (output(network) - output(plain)).norm() / output(plain).norm() < error


def test_without_a_precision_nothing_changes():
    network = unet()
    assert quantize(network, "no_change", "meta") is network and torch.equal(output(network), output(unet()))
    assert precision_name("int8-quanto") == "int8-torchao" and precision_name("fp8-torchao") == "fp8-torchao"


def test_without_torchao_there_is_one_sentence(monkeypatch, capsys):
    names = ("base_model_precision", "text_encoder_1_precision", "text_encoder_2_precision")
    plain = SimpleNamespace(**dict.fromkeys(names, "no_change"))
    wanted = SimpleNamespace(**vars(plain) | {"base_model_precision": "fp8-torchao"})
    parser, find = argparse.ArgumentParser(), importlib.util.find_spec
    assert check_precision(parser, wanted) == []
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "torchao" else find(name))
    assert check_precision(parser, plain) == []
    with pytest.raises(SystemExit):
        check_precision(parser, wanted)
    assert "--base_model_precision fp8-torchao: torchao is not installed" in capsys.readouterr().err
