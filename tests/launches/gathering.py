"""Compares output and gradients of a whole network, and of split ones that gather in fp32 and bf16, under autocast."""

import sys
from pathlib import Path

import torch
from accelerate import Accelerator

sys.path.insert(0, str(Path(__file__).parents[2]))

from common.wan.parallel import shard
from tests.helpers import tiny_wan
from train_dmd_distill_wan import BLOCKS


def results(dtype: torch.dtype | None) -> list[torch.Tensor]:
    """Output and gradients of a network that is gathered in `dtype`, or of a whole one; alike in all processes."""
    network = tiny_wan().requires_grad_(True)
    if dtype is not None:
        shard(network, BLOCKS, accelerator, dtype)
    network.enable_gradient_checkpointing()
    rng = torch.Generator().manual_seed(0)
    x, text = torch.randn(2, 4, 3, 4, 4, generator=rng), torch.randn(2, 5, 16, generator=rng)
    with torch.autocast("cpu", torch.bfloat16):
        out = network(hidden_states=x, timestep=torch.tensor([757.0, 3.0]), encoder_hidden_states=text).sample
    out.float().square().mean().backward()
    grads = [p.grad for p in network.parameters()]
    return [out, *(grads if dtype is None else [grad.full_tensor() for grad in grads])]


if __name__ == "__main__":
    accelerator = Accelerator()
    whole, in_fp32, in_bf16 = (results(dtype) for dtype in (None, torch.float32, torch.bfloat16))
    assert all(torch.equal(a, b) for a, b in zip(in_fp32, in_bf16, strict=True))
    for a, b in zip(whole, in_bf16, strict=True):  # blocks' gradients of the text are added up in another order
        assert (a - b).abs().max() <= 2**-7 * a.abs().max()
    accelerator.print("all are alike")
