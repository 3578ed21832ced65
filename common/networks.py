"""Networks: several in one by adapters, attention kernels, compilation, and frozen weights in 8 bits."""

import contextlib
import importlib.util
import logging
import math
import warnings

import torch
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn
from diffusers.models.attention_processor import AttnProcessor2_0
from diffusers.utils import is_xformers_available
from peft.tuners.tuners_utils import BaseTunerLayer
from torch.nn.parallel import DistributedDataParallel


def guidance_embedding(w: torch.Tensor, dim: int) -> torch.Tensor:
    """Sinusoidal embedding [B, dim] of 1000 * w, the one that diffusers' pipelines feed at guidance_scale = 1 + w."""
    half = dim // 2
    frequencies = torch.exp(torch.arange(half, device=w.device) * -(math.log(10000.0) / (half - 1)))
    angles = (1000.0 * w.float())[:, None] * frequencies
    embedding = torch.cat([angles.sin(), angles.cos()], dim=1)
    return torch.nn.functional.pad(embedding, (0, dim % 2))


def with_uncond(cond, uncond) -> dict[str, torch.Tensor]:
    """Conditions of a batch of 2B: those given, then the same with the empty prompt's embeddings."""
    rows = {name: uncond[name].expand_as(v) if name in uncond else v for name, v in cond.items()}
    return {name: torch.cat([v, rows[name]]) for name, v in cond.items()}


def adapter_layers(network: torch.nn.Module) -> list[BaseTunerLayer]:
    """Layers of a network that an adapter has changed; none of a network without adapters."""
    return [module for module in network.modules() if isinstance(module, BaseTunerLayer)]


@contextlib.contextmanager
def active_adapter(layers: list[BaseTunerLayer], name: str):
    """Inside, the network of these layers is its base with the adapter `name`; without such an adapter, the base alone.

    PEFT's own switches also change requires_grad, so that an adapter that another one's turn has switched off is left
    without a gradient, silently. This one touches nothing but which adapter acts. Activation checkpointing computes
    again in backward(), with the adapter that is active then: backward() belongs inside as well. Dropout acts where
    there is a gradient.
    """
    before = [(layer._disable_adapters, layer._active_adapter, layer.lora_dropout.training) for layer in layers]
    for layer in layers:
        set_layer(layer, name not in layer.lora_A, [name], torch.is_grad_enabled())
    try:
        yield
    finally:
        for layer, state in zip(layers, before, strict=True):
            set_layer(layer, *state)


def set_layer(layer: BaseTunerLayer, disabled: bool, active: list[str], dropout: bool):
    layer._disable_adapters, layer._active_adapter = disabled, active
    if layer.lora_dropout.training != dropout:
        layer.lora_dropout.train(dropout)


def adapter_weights(network: torch.nn.Module, name: str) -> torch.nn.ParameterDict:
    """The weights of one adapter, as a module of their own, which is what a checkpoint holds of it."""
    weights = [(key.replace(".", "/"), p) for key, p in network.named_parameters() if name in key.split(".")]
    return torch.nn.ParameterDict(weights)  # of a list: it would sort a dict


def weights_copy(part: torch.nn.Module, device) -> torch.nn.ParameterDict:
    """A copy of the trained weights, from which a moving average starts."""
    trained = [(name.replace(".", "/"), p) for name, p in part.named_parameters() if p.requires_grad]
    copies = [(name, p.detach().to(device, copy=True)) for name, p in trained]
    return torch.nn.ParameterDict([(name, torch.nn.Parameter(p, requires_grad=False)) for name, p in copies])


@contextlib.contextmanager
def weights_exchanged(params: list[torch.nn.Parameter], others: list[torch.nn.Parameter]):
    """Inside, parameters and others have changed values, in place, where FSDP looks for them."""
    exchange(params, others)
    try:
        yield
    finally:
        exchange(params, others)


@torch.no_grad()
def exchange(params, others):
    for p, other in zip(params, others, strict=True):
        own = p.clone()
        p.copy_(other)
        other.copy_(own)


ATTENTION = ("diffusers", *(backend.value for backend in AttentionBackendName))  # diffusers: PyTorch's SDPA


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


PRECISIONS = ("no_change", "int8-quanto", "int8-torchao", "fp8-torchao")


def precision_name(given: str) -> str:
    """The precision that is in use for a flag's value: int8-quanto is an alias."""
    return given.replace("quanto", "torchao")


def check_precision(parser, args) -> list[str]:
    """Checks the precision flags before anything loads. Returns notes for the user."""
    names = ("base_model_precision", "text_encoder_1_precision", "text_encoder_2_precision")
    wanted = {name: getattr(args, name) for name in names if getattr(args, name) != "no_change"}
    if wanted and importlib.util.find_spec("torchao") is None:
        name, precision = next(iter(wanted.items()))
        parser.error(f"--{name} {precision}: needs torchao, which is not installed: pip install torchao==0.18.0")
    aliased = {name: given for name, given in wanted.items() if precision_name(given) != given}
    return [f"--{name} {given}: an alias, {precision_name(given)} is in use" for name, given in aliased.items()]


def quantize(network: torch.nn.Module, precision: str, where) -> torch.nn.Module:
    """Converts weights of Linear layers to 8 bits, in place, on the device `where`; all others keep their precision."""
    if precision == "no_change":
        return network
    # torchao warns of kernels for other GPUs, and peft of merging adapters, which nothing here does
    logging.getLogger("torchao").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*get_apply_tensor_subclass.*")
    from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, quantize_

    config = {"int8-torchao": Int8WeightOnlyConfig, "fp8-torchao": Float8WeightOnlyConfig}[precision_name(precision)]
    network.to(where)
    quantize_(network, config(set_inductor_config=False))  # torch.compile's settings are the user's
    return network
