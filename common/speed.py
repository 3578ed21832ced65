"""Attention kernels, compilation and activation checkpointing of networks, and what holds their adapters back."""

import contextlib
import os

import torch
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn
from diffusers.models.attention_processor import AttnProcessor2_0
from diffusers.utils import is_xformers_available
from torch.nn.parallel import DistributedDataParallel

ATTENTION = ("diffusers", *(backend.value for backend in AttentionBackendName))  # diffusers: PyTorch's SDPA


def set_up_device(args, accelerator) -> torch.dtype:
    """Threads, seed and TF32. Returns the precision of frozen networks."""
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise SystemExit("--mixed_precision fp16: needs a GPU; a CPU takes no or bf16")
    if args.toy and accelerator.device.type == "cpu":  # accelerate launch leaves a process one thread
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // accelerator.num_processes))
    torch.manual_seed(args.seed)
    torch.backends.cuda.matmul.allow_tf32 = args.allow_tf32
    return {"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision, torch.float32)


# What BackendAttention leaves out, and U-Nets have not
UNLIKE = ("spatial_norm", "group_norm", "norm_cross", "norm_q", "norm_k")


class BackendAttention:
    """Attention of U-Nets by one of diffusers' backends: their own processor calls SDPA whatever the backend is."""

    def __init__(self, backend: str):
        self._attention_backend = AttentionBackendName(backend)

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None):
        x = hidden_states  # [B, L, C]
        context = x if encoder_hidden_states is None else encoder_hidden_states
        if attention_mask is not None:  # [B, 1, S] -> [B, heads, 1, S]
            attention_mask = attn.prepare_attention_mask(attention_mask, context.shape[1], len(x))
            attention_mask = attention_mask.view(len(x), attn.heads, -1, attention_mask.shape[-1])
        q, k, v = attn.to_q(x), attn.to_k(context), attn.to_v(context)
        q, k, v = (part.unflatten(2, (attn.heads, -1)) for part in (q, k, v))  # [B, L, heads, C / heads]
        out = dispatch_attention_fn(q, k, v, attention_mask, backend=self._attention_backend)
        out = out.flatten(2).to(q.dtype)
        for layer in attn.to_out:
            out = layer(out)
        out = out + x if attn.residual_connection else out
        return out / attn.rescale_output_factor


def set_attention(network, backend: str):
    """Every attention layer of the network by this backend; `diffusers` leaves it as it is."""
    if backend == "diffusers":
        return
    plain = [module for module in network.modules() if isinstance(getattr(module, "processor", None), AttnProcessor2_0)]
    for module in plain:
        if all(getattr(module, name) in (None, False) for name in UNLIKE):
            module.set_processor(BackendAttention(backend))
    try:
        network.set_attention_backend(backend)  # refuses what is not installed
    except (RuntimeError, ValueError, ImportError) as error:
        raise SystemExit(f"--attention_mechanism {backend}: {error}") from None


def speed_up(args, networks, compiled_blocks: tuple[str, ...], say):
    """Attention, compilation, and what processes have to exchange, of each network once."""
    backend = args.attention_mechanism
    if args.enable_xformers_memory_efficient_attention:
        backend = "xformers" if is_xformers_available() else backend
        if backend != "xformers":
            say("--enable_xformers_memory_efficient_attention: not installed, PyTorch's SDPA is in use")
    for network in {id(network): network for network in networks}.values():
        set_attention(network, backend)
        # Frozen weights come from one file in every process, and those in 8 bits cannot be broadcast
        frozen = [name for name, p in network.named_parameters() if not p.requires_grad]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(network, frozen)
        if args.compile:  # in place and block by block: names of weights stay, and equal blocks share their code
            for block in network.modules():
                if type(block).__name__ in compiled_blocks:
                    block.compile()


@contextlib.contextmanager
def adapters_off(unet, wanted: bool = True):
    if wanted:
        unet.disable_adapters()
    try:
        yield
    finally:
        if wanted:
            unet.enable_adapters()


@contextlib.contextmanager
def dropout_off(network, wanted=True):
    training = network.training
    if wanted:
        network.eval()
    try:
        yield
    finally:
        if wanted:
            network.train(training)
