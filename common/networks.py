"""Networks: guidance embedding, one network in several roles by adapters, attention kernels, compilation, 8 bits."""

import contextlib
import importlib.util
import logging
import math
import os
import warnings

import torch
import torch._dynamo
from diffusers import ModelMixin
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn
from diffusers.models.attention_processor import AttnProcessor2_0
from diffusers.utils import is_xformers_available
from peft.tuners.tuners_utils import BaseTunerLayer
from torch.nn.parallel import DistributedDataParallel

ATTENTION = ("diffusers", *(backend.value for backend in AttentionBackendName))  # diffusers: PyTorch's SDPA
# Features of diffusers' attention layers that BackendAttention leaves out, and that no U-Net's layers use
UNSUPPORTED = ("spatial_norm", "group_norm", "norm_cross", "norm_q", "norm_k")
MOST_GRAPHS = 1024  # of the code of a compiled block
PRECISIONS = ("no_change", "int8-quanto", "int8-torchao", "fp8-torchao")


def load_network(cls, source: str, folder: str | None, dtype: torch.dtype, **options) -> torch.nn.Module:
    """A frozen network of a pipeline's folder, of the libraries' class `cls`; `options` are from_pretrained's."""
    network, loading = cls.from_pretrained(source, subfolder=folder, dtype=dtype, output_loading_info=True, **options)
    missing, unexpected = (sorted(loading[name]) for name in ("missing_keys", "unexpected_keys"))
    if not issubclass(cls, ModelMixin):  # old files of text encoders also hold buffers, which are computed now
        unexpected = []
    if missing or unexpected:  # the libraries only warn, and leave what is missing at random
        raise SystemExit(
            f"the weights of {folder or source} do not fit its config: {missing} missing, {unexpected} unexpected"
        )
    return network.requires_grad_(False).eval()


def guidance_embedding(w: torch.Tensor, dim: int) -> torch.Tensor:
    """Sinusoidal embedding [B, dim] of 1000 * w, as diffusers' pipelines feed it at guidance_scale = 1 + w."""
    half = dim // 2
    frequencies = torch.exp(torch.arange(half, device=w.device) * -(math.log(10000.0) / (half - 1)))
    angles = (1000.0 * w.float())[:, None] * frequencies
    embedding = torch.cat([angles.sin(), angles.cos()], dim=1)
    return torch.nn.functional.pad(embedding, (0, dim % 2))


def with_uncond(cond, uncond) -> dict[str, torch.Tensor]:
    """Conditions of a batch of 2B: `cond` [B, ...], then the same with the embeddings in `uncond` [1, ...]."""
    rows = {name: uncond[name].expand_as(v) if name in uncond else v for name, v in cond.items()}
    return {name: torch.cat([v, rows[name]]) for name, v in cond.items()}


def adapter_layers(network: torch.nn.Module) -> list[BaseTunerLayer]:
    """Layers of a network that have adapters."""
    return [module for module in network.modules() if isinstance(module, BaseTunerLayer)]


@contextlib.contextmanager
def active_adapter(layers: list[BaseTunerLayer], name: str):
    """Inside, the network of these layers is its base with the adapter `name`, or the base alone if there is none.

    PEFT's own switches also change requires_grad: an adapter that is switched off for another one's turn would silently
    get no gradient from then on. Here only the choice of the adapter changes. backward() belongs inside as well, since
    activation checkpointing computes again with the adapter that is active then. Dropout acts where gradients are on.
    """
    before = [(layer._disable_adapters, layer._active_adapter, layer.training) for layer in layers]
    dropout = torch.is_grad_enabled()
    for layer in layers:
        set_layer(layer, name not in layer.scaling, [name], dropout)
    try:
        yield
    finally:
        for layer, state in zip(layers, before, strict=True):
            set_layer(layer, *state)


def set_layer(layer: BaseTunerLayer, disabled: bool, active: list[str], dropout: bool):
    """Sets which adapters of a layer act, and whether their dropout does.

    Past nn.Module's own way to set an attribute, which takes most of the time of a switch.
    """
    vars(layer).update(_disable_adapters=disabled, _active_adapter=active)
    if layer.training != dropout:
        for module in (layer, *layer.lora_dropout.values()):  # DoRA asks its layer whether there is dropout
            vars(module)["training"] = dropout


def adapter_weights(network: torch.nn.Module, name: str) -> torch.nn.ParameterDict:
    """The weights of one adapter as a module, for its optimizer and for checkpoints."""
    weights = [(key.replace(".", "/"), p) for key, p in network.named_parameters() if name in key.split(".")]
    return torch.nn.ParameterDict(weights)  # from a list, since ParameterDict sorts a dict


def weights_copy(part: torch.nn.Module, device) -> torch.nn.ParameterDict:
    """A copy of the trained weights, with which a moving average starts."""
    trained = [(name.replace(".", "/"), p) for name, p in part.named_parameters() if p.requires_grad]
    copies = [(name, p.detach().to(device, copy=True)) for name, p in trained]
    return torch.nn.ParameterDict([(name, torch.nn.Parameter(p, requires_grad=False)) for name, p in copies])


@contextlib.contextmanager
def weights_exchanged(params: list[torch.nn.Parameter], others: list[torch.nn.Parameter]):
    """Inside, `params` hold the values of `others` and the other way round, in place, as FSDP needs it."""
    exchange(params, others)
    try:
        yield
    finally:
        exchange(params, others)


@torch.no_grad()
def exchange(params, others):
    for p, other in zip(params, others, strict=True):
        before = p.clone()
        p.copy_(other)
        other.copy_(before)


class BackendAttention:
    """Attention of U-Nets by one of diffusers' backends; diffusers' own processor for them always calls SDPA."""

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
    """Gives every attention layer of a network this backend; with `diffusers` all of them stay as they are."""
    if backend == "diffusers":
        return
    plain = [module for module in network.modules() if isinstance(getattr(module, "processor", None), AttnProcessor2_0)]
    for module in plain:
        if all(getattr(module, name) in (None, False) for name in UNSUPPORTED):
            module.set_processor(BackendAttention(backend))
    try:
        network.set_attention_backend(backend)  # raises if its package is not installed
    except (RuntimeError, ValueError, ImportError) as error:
        raise SystemExit(f"--attention_mechanism {backend}: {error}") from None


def dynamo_backend() -> str:
    """The backend of torch.compile that accelerate's config asks for, or no; --compile takes it over from there."""
    return os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower()


def speed_up(args, networks, compiled_blocks: tuple[str, ...], say, dynamic: bool = False):
    """Sets attention kernels and compilation of networks, each of them once, and keeps DDP off frozen weights.

    Compiled blocks are `dynamic`, where one code is for all shapes, or have a code for each.
    """
    backend = args.attention_mechanism
    if args.enable_xformers_memory_efficient_attention:
        backend = "xformers" if is_xformers_available() else backend
        if backend != "xformers":
            say("--enable_xformers_memory_efficient_attention: not installed, PyTorch's SDPA is in use")
    for network in {id(network): network for network in networks}.values():
        set_attention(network, backend)
        for layer in adapter_layers(network):  # PEFT brings inputs to the adapter's fp32, and autocast back again
            layer.cast_input_dtype_enabled = False
        # Frozen weights come from one file in every process, and those in 8 bits cannot be broadcast
        frozen = [name for name, p in network.named_parameters() if not p.requires_grad]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(network, frozen)
        if args.compile:  # in place and block by block: names of weights stay, and equal blocks share their code
            for block in network.modules():
                if type(block).__name__ in compiled_blocks:
                    block.compile(dynamic=dynamic)
    if args.compile:
        allow_graphs(say)


def allow_graphs(say):
    """Lets torch.compile make as many graphs of a block's code as networks, roles and shapes ask for, or says so once.

    Its own limit is 8, and a class of blocks has one code: SDXL's ResnetBlock2D alone has 12 pairs of channels.
    """
    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = MOST_GRAPHS
    said = []

    def once(record: logging.LogRecord) -> bool:
        if not record.getMessage().startswith("torch._dynamo hit config."):
            return True
        if not said:
            said.append(record)
            say(f"--compile: more than {MOST_GRAPHS} graphs of {record.args[2]}: it goes on without compilation")
        return False

    logging.getLogger("torch._dynamo.convert_frame").addFilter(once)


def precision_name(given: str) -> str:
    """The precision that a flag's value means: int8-quanto is an alias of int8-torchao."""
    return given.replace("quanto", "torchao")


def check_precision(parser, args) -> list[str]:
    """Checks the precision flags before anything loads, and returns notes for the user."""
    names = ("base_model_precision", "text_encoder_1_precision", "text_encoder_2_precision")
    wanted = {name: getattr(args, name) for name in names if getattr(args, name) != "no_change"}
    if wanted and importlib.util.find_spec("torchao") is None:
        name, precision = next(iter(wanted.items()))
        parser.error(f"--{name} {precision}: torchao is not installed: pip install -r common/requirements.txt")
    aliased = {name: given for name, given in wanted.items() if precision_name(given) != given}
    return [f"--{name} {given}: an alias, {precision_name(given)} is in use" for name, given in aliased.items()]


def quantize(network: torch.nn.Module, precision: str, where) -> torch.nn.Module:
    """Converts weights of Linear layers to 8 bits, in place, on the device `where`; other weights stay as they are."""
    if precision == "no_change":
        return network
    # torchao warns of kernels for other GPUs, and PEFT of merging adapters, which we never do
    logging.getLogger("torchao").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*get_apply_tensor_subclass.*")
    from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, quantize_

    config = {"int8-torchao": Int8WeightOnlyConfig, "fp8-torchao": Float8WeightOnlyConfig}[precision_name(precision)]
    network.to(where)
    dtype = next(network.parameters()).dtype
    quantize_(network, config(set_inductor_config=False))  # torch.compile's settings are the user's
    network.register_forward_pre_hook(lambda _, inputs: first_as(dtype, *inputs))
    return network


def first_as(dtype: torch.dtype, *inputs) -> tuple:
    """A network's inputs, the first in its precision where it is a sample, which pipelines keep in fp32.

    Linear layers of 8 bits compute in the precision of what comes in, since autocast does not know them, and layers
    after them have weights of another one.
    """
    if not inputs or not inputs[0].is_floating_point():
        return inputs
    return inputs[0].to(dtype), *inputs[1:]
