"""The meter: what it counts, against PyTorch's profiler and by hand, and fake tensors against real ones."""

import gc

import pytest
import torch
from peft import LoraConfig
from torch.nn.functional import group_norm, layer_norm, linear, rms_norm, scaled_dot_product_attention
from torch.profiler import ProfilerActivity, profile
from transformers import UMT5EncoderModel

from common.networks import load_network
from common.planning.meter import HOST, Meter, Unwritten, as_on_cuda, fake_tensors_suffice
from tests.helpers import tiny_unet, tiny_wan


def test_a_storage_is_counted_once_from_its_making_to_its_end():
    with Meter(fake=False) as meter:
        x = torch.ones(1000)
        assert meter.total == 4096  # 4000 bytes, in blocks of 512
        y = x.view(10, 100).t().add_(1)
        assert meter.total == 4096
        z = y + 1
        assert meter.total == 8192
        del x
        assert meter.total == 8192  # y is a view of it
        del y, z
    assert meter.total == 0 and meter.peak == 8192


def test_the_peak_is_looked_for_anew():
    with Meter(fake=False) as meter:
        x = torch.ones(1000)
        del x
        meter.start()
        y = torch.ones(256)
    assert meter.peak == y.nbytes == 1024 and meter.at_peak == {"activations": 1024}


def test_kinds():
    with Meter(fake=False) as meter, meter.weights("weights of a"):
        weight = torch.ones(4, 1024)
        weight.requires_grad_(True)
    with meter:
        half = weight.to(torch.bfloat16)
        meter.name("weights of b", [weight])
        copy = weight.clone()
        assert meter.now["weights of b"] == 16384 and not meter.now["weights of a"]
        assert meter.now["weights that autocast has cast"] == half.nbytes and meter.now["activations"] == copy.nbytes
        meter.name(HOST, [weight])  # takes nothing of a GPU
        assert meter.total == half.nbytes + copy.nbytes


def test_operations_are_counted():
    with Meter() as meter:
        x = linear(torch.zeros(64, 1000), torch.zeros(500, 1000, requires_grad=True))
        assert meter.operations == {"matrix products": 2 * 64 * 1000 * 500}
        x.sum().backward()
        assert meter.operations == {"matrix products": 4 * 64 * 1000 * 500}
        q = torch.zeros(2, 8, 512, 64)
        scaled_dot_product_attention(q, q, q)
    assert meter.operations["attention"] == 2 * 8 * 2 * (2 * 512 * 512 * 64)
    assert meter.peak < 10 * q.nbytes  # the scores alone would be 8 times as large


def test_small_tensors_are_real_and_large_ones_have_no_content():
    with Meter(), fake_tensors_suffice():
        t = torch.linspace(0, 999, 4)
        assert t[1:].long().tolist() == [333, 666, 999]
        large = torch.zeros(100, 100) + t[0]
        assert type(large).__name__ == "FakeTensor" and large.numpy().shape == (100, 100)
        module = torch.nn.Linear(300, 400).to(torch.bfloat16)
        assert module.weight.dtype == torch.bfloat16 and type(module.weight.data).__name__ == "FakeTensor"


def step(network, inputs):
    out = network(*inputs).sample
    out.float().square().mean().backward()
    for p in network.parameters():
        p.grad = None
    return out


def unet_inputs():
    return torch.randn(2, 4, 32, 32), torch.tensor([999, 19]), torch.randn(2, 32, 16)


def wan_inputs():
    return torch.randn(1, 4, 5, 16, 16), torch.ones(1), torch.randn(1, 32, 16)


def trained(make, lora: bool, checkpointing: bool):
    network = make()
    if lora:
        network.requires_grad_(False).add_adapter(LoraConfig(r=4, target_modules=["to_q", "to_k"]))
    if checkpointing:
        network.enable_gradient_checkpointing()
    return network.train()


CASES = [
    (tiny_unet, unet_inputs, True, False),
    (tiny_unet, unet_inputs, False, True),
    (tiny_wan, wan_inputs, True, True),
]


@pytest.mark.parametrize(("make", "inputs", "lora", "checkpointing"), CASES)
def test_fake_tensors_take_what_real_ones_take(make, inputs, lora, checkpointing):
    """At the first and at the second step, when operations are made from memory, byte by byte."""
    peaks, outs = {}, {}
    for fake in (False, True):
        with Meter(fake=fake) as meter, fake_tensors_suffice(), meter.weights("weights"):
            network, x = trained(make, lora, checkpointing), inputs()
        meter.kind = "activations"
        with meter:
            found = []
            for _ in range(2):
                meter.start()
                out = step(network, x)
                found.append((meter.peak, dict(meter.operations), meter.total))
        peaks[fake], outs[fake] = found, (out.shape, out.stride(), out.dtype)
    assert peaks[True] == peaks[False] and peaks[True][1][0] > 100_000
    assert outs[True] == outs[False]


@pytest.mark.parametrize(("make", "inputs", "lora", "checkpointing"), CASES)
def test_the_meter_agrees_with_the_profiler(make, inputs, lora, checkpointing):
    network, x = trained(make, lora, checkpointing), inputs()
    gc.collect()  # what an earlier test has left may not be freed in the middle
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        step(network, x)
    now = peak = 0
    for event in trace.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    with Meter(fake=False, block=1) as meter:
        for tensor in [*network.parameters(), *network.buffers(), *x]:
            tensor.detach()
        own = meter.total
        step(network, x)
    assert meter.peak - own == pytest.approx(peak, rel=0.05)


def test_autocast_keeps_to_the_rules_of_cuda():
    def dtypes():
        with torch.autocast("cpu", torch.bfloat16):
            x = torch.ones(4, 8, dtype=torch.bfloat16)
            results = layer_norm(x, (8,)), group_norm(x, 2), x.softmax(-1), x.pow(2), x.sum(), linear(x, x), x + x
            return [result.dtype for result in results]

    full, half = torch.float32, torch.bfloat16
    before = dtypes()
    with as_on_cuda():
        assert dtypes() == [full, full, full, full, full, half, half]
    assert dtypes() == before != [full, full, full, full, full, half, half]


def test_a_norm_by_one_kernel_keeps_its_input_alone():
    with Meter(block=1) as meter, as_on_cuda(), torch.autocast("cpu", torch.bfloat16):
        x = torch.zeros(64, 1024, dtype=torch.bfloat16, requires_grad=True)
        weight, before = torch.ones(1024, dtype=torch.bfloat16), meter.total
        y = rms_norm(x, (1024,), weight, 1e-6)
        assert y.dtype == torch.bfloat16 and meter.total - before <= y.nbytes + 64 * 4 + weight.nbytes
        y.sum().backward()
        assert x.grad.shape == x.shape


def test_a_cache_that_is_written_nowhere_takes_nothing_of_a_gpu(monkeypatch):
    with Meter() as meter:
        monkeypatch.setattr(Meter, "running", meter)
        x, cache = torch.zeros(100, 100), Unwritten()
        cache.put("key", {"latents": x})
        assert meter.total == 40448 and meter.now[HOST] == 40448
        assert cache.get("key")["latents"].shape == x.shape and "other" not in cache


def test_a_network_takes_its_weights_and_nothing_of_what_builds_it(wan_teacher, monkeypatch):
    """umT5 makes its embeddings twice, and then shares them."""
    with Meter(block=1) as meter:
        monkeypatch.setattr(Meter, "running", meter)
        encoder = load_network(UMT5EncoderModel, str(wan_teacher), "text_encoder", torch.bfloat16)
        size = sum(p.numel() for p in encoder.parameters()) * 2
        assert meter.now["weights: text_encoder"] == size
        assert meter.peak == size
