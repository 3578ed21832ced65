"""Networks: guidance embedding, several roles of one by adapters, attention, checkpointing, compilation, 8 bits."""

import contextlib
import functools
import importlib.util
import logging
import math
import os
import warnings
from collections import deque
from contextvars import ContextVar

import torch
import torch._dynamo
from diffusers import ModelMixin
from diffusers.models.attention_dispatch import AttentionBackendName, attention_backend, dispatch_attention_fn
from diffusers.models.attention_processor import AttnProcessor2_0
from diffusers.utils import is_xformers_available
from peft.tuners.tuners_utils import BaseTunerLayer
from torch.nn.attention import SDPBackend
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts, noop_context_fn

from common.planning.meter import HOST, Meter

ATTENTION = ("diffusers", *(backend.value for backend in AttentionBackendName))  # diffusers: PyTorch's SDPA
# Backends of diffusers through which no gradient goes: with sage the layers before attention would silently get none
NO_BACKWARD = ("_flash_3", *(name for name in ATTENTION if "sage" in name))
# Features of diffusers' attention layers that BackendAttention leaves out, and that no U-Net's layers use
UNSUPPORTED = ("spatial_norm", "group_norm", "norm_cross", "norm_q", "norm_k")
MOST_GRAPHS = 1024  # of the code of a compiled block
PRECISIONS = ("no_change", "int8-quanto", "int8-torchao", "fp8-torchao")
# A context for each call of attention of the checkpointed block that is computed now; None outside of such blocks
CONTEXTS: ContextVar = ContextVar("contexts of attention", default=None)


def load_network(cls, source: str, folder: str | None, dtype: torch.dtype, **options) -> torch.nn.Module:
    """A frozen network of a pipeline's folder, of the libraries' class `cls`; `options` are from_pretrained's."""
    if Meter.running:
        with Meter.running.weights(HOST):  # where it is built; what it takes to build it is not the GPU's
            network = network_of_config(cls, source, folder, dtype, **options)
        Meter.running.name(f"weights: {folder or source}", [*network.parameters(), *network.buffers()])
        return network
    network, loading = cls.from_pretrained(source, subfolder=folder, dtype=dtype, output_loading_info=True, **options)
    missing, unexpected = (sorted(loading[name]) for name in ("missing_keys", "unexpected_keys"))
    if not issubclass(cls, ModelMixin):  # old files of text encoders also hold buffers, which are computed now
        unexpected = []
    if missing or unexpected:  # the libraries only warn, and leave what is missing at random
        raise SystemExit(
            f"the weights of {folder or source} do not fit its config: {missing} missing, {unexpected} unexpected"
        )
    return network.requires_grad_(False).eval()


def network_of_config(cls, source: str, folder: str | None, dtype: torch.dtype, **options) -> torch.nn.Module:
    """The same network by its config alone: without content where a plan runs, else with random weights."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    options.pop("variant", None)  # of files of weights
    try:
        if issubclass(cls, ModelMixin):
            network = cls.from_config(cls.load_config(source, subfolder=folder, **options))
            for name, p in network.named_parameters():
                if set(network._keep_in_fp32_modules or []) & set(name.split(".")):
                    p.data = p.data.float()
        else:  # a text encoder
            config = cls.config_class.from_pretrained(source, subfolder=folder or "", **options)
            config.dtype = dtype
            network = cls(config)
    finally:
        torch.set_default_dtype(default)
    return network.requires_grad_(False).eval()


def guidance_embedding(w: torch.Tensor, dim: int) -> torch.Tensor:
    """Sinusoidal embedding [B, dim] of 1000 * w, as diffusers' pipelines feed it at guidance_scale = 1 + w."""
    half = dim // 2
    frequencies = torch.exp(torch.arange(half, device=w.device) * -(math.log(10000.0) / (half - 1)))
    angles = (1000.0 * w.float())[:, None] * frequencies
    embedding = torch.cat([angles.sin(), angles.cos()], dim=1)
    return torch.nn.functional.pad(embedding, (0, dim % 2))


def unprompted(cond, uncond) -> dict[str, torch.Tensor]:
    """Conditions `cond` [B, ...] with the embeddings in `uncond` [1, ...] in place of the prompts'."""
    return {name: uncond[name].expand_as(v) if name in uncond else v for name, v in cond.items()}


def with_uncond(cond, uncond) -> dict[str, torch.Tensor]:
    """Conditions of a batch of 2B: `cond` [B, ...], then the same with the embeddings in `uncond` [1, ...]."""
    rows = unprompted(cond, uncond)
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


def modules_of(network: torch.nn.Module, names: tuple[str, ...]) -> list[torch.nn.Module]:
    """Modules of these classes; what FSDP splits has a class of its own, made of them."""
    return [module for module in network.modules() if any(kind.__name__ in names for kind in type(module).__mro__)]


def checkpoint_activations(args, network, compiled_blocks: tuple[str, ...], inputs_too: bool = False):
    """Makes backward() compute a network's blocks again, of attention what is around it: its result is kept.

    That is one more tensor [B, L, C] for each layer. `inputs_too` says that hooks of the blocks join large
    inputs, which are then joined again, too: a compiled block is computed again as a whole, with its attention.
    """
    if inputs_too or args.checkpoint_attention or args.offload_activations or not args.compile:
        contexts = noop_context_fn if args.checkpoint_attention or args.compile else keeping_attention
        run = offloaded if args.offload_activations else checkpoint
        network.enable_gradient_checkpointing(functools.partial(run, contexts))
        return
    keeping = functools.partial(create_selective_checkpoint_contexts, keeps)  # which torch.compile knows
    for block in modules_of(network, compiled_blocks):
        block.forward = functools.partial(checkpoint_inside, block.forward, keeping)


def checkpoint(contexts, block, *inputs):
    return torch.utils.checkpoint.checkpoint(block, *inputs, use_reentrant=False, context_fn=contexts)


def offloaded(contexts, block, x, *inputs):
    """The same, with the block's first input in the machine's memory until backward() comes to the block."""
    first, host = [x], to_host(x)
    device, needs_gradient = x.device, x.requires_grad

    def run(*inputs):
        x = first.pop() if first else host.to(device, non_blocking=True, copy=True).requires_grad_(needs_gradient)
        return block(x, *inputs)

    return checkpoint(contexts, run, *inputs)


def to_host(x: torch.Tensor) -> torch.Tensor:
    """A copy in the machine's memory, for which the host does not wait."""
    with Meter.running.weights(HOST) if Meter.running else contextlib.nullcontext():
        host = torch.empty_like(x, device="cpu", pin_memory=x.is_cuda, requires_grad=False)
    with torch.no_grad():
        return host.copy_(x, non_blocking=True)


def checkpoint_inside(forward, contexts, *inputs, **options):
    """A compiled block's forward, of which the compiler itself computes again what is not kept."""
    if not torch.is_grad_enabled():
        return forward(*inputs, **options)
    return torch.utils.checkpoint.checkpoint(forward, *inputs, use_reentrant=False, context_fn=contexts, **options)


def keeping_attention():
    """The contexts of a block's first time, which keeps the results of attention, and of its second, which takes them.

    PyTorch's own contexts do so, but would cost 30 us for each operation of a block; here they are around attention.
    """
    second = deque()

    def first_time():
        while True:
            keeping, taking = create_selective_checkpoint_contexts(keeps)
            second.append(taking)
            yield keeping

    def second_time():
        while True:
            yield second.popleft()

    return inside_block(first_time()), inside_block(second_time())


def keeps(_, operation, *inputs, **options) -> CheckpointPolicy:
    """Keeps results of attention's kernels, whose first inputs are q and k.

    Attention to a text, of few keys, is as cheap as a linear layer: it is computed again.
    """
    kernel = any(name in str(operation) for name in ("attention", "attn"))
    kept = kernel and inputs[1].numel() >= inputs[0].numel()
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


@contextlib.contextmanager
def inside_block(contexts):
    token = CONTEXTS.set(contexts)
    try:
        yield
    finally:
        CONTEXTS.reset(token)


class Kernels:
    """What processors of attention that choose among diffusers' backends have in common."""

    _attention_backend: AttentionBackendName | None = None  # diffusers sets it; None: PyTorch's SDPA
    without_gradient: AttentionBackendName | None = None  # that of forwards without gradient; None: the same

    def attend(self, q, k, v, mask=None):
        """Attention of q [B, L, heads, D] to k and v [B, S, heads, D]."""
        backend = (
            self._attention_backend if torch.is_grad_enabled() else self.without_gradient or self._attention_backend
        )
        if backend is not None:  # kernels of packages want one precision; SDPA is autocast's business
            q, k = q.to(v.dtype), k.to(v.dtype)
        contexts = None if torch.compiler.is_compiling() else CONTEXTS.get()
        with contextlib.nullcontext() if contexts is None else next(contexts):
            return dispatch_attention_fn(q, k, v, mask, backend=backend)


class BackendAttention(Kernels):
    """Attention of U-Nets by one of diffusers' backends; diffusers' own processor for them always calls SDPA."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None):
        x = hidden_states  # [B, L, C]
        context = x if encoder_hidden_states is None else encoder_hidden_states
        if attention_mask is not None:  # [B, 1, S] -> [B, heads, 1, S]
            attention_mask = attn.prepare_attention_mask(attention_mask, context.shape[1], len(x))
            attention_mask = attention_mask.view(len(x), attn.heads, -1, attention_mask.shape[-1])
        q, k, v = attn.to_q(x), attn.to_k(context), attn.to_v(context)
        q, k, v = (part.unflatten(2, (attn.heads, -1)) for part in (q, k, v))  # [B, L, heads, C / heads]
        out = self.attend(q, k, v, attention_mask).flatten(2).to(q.dtype)
        for layer in attn.to_out:
            out = layer(out)
        out = out + x if attn.residual_connection else out
        return out / attn.rescale_output_factor


def set_attention(args, network, backend: str):
    """Gives the attention layers of a network this backend, and what else flags say; `diffusers` leaves them as is."""
    if backend != "diffusers" or args.attention_without_gradient or args.gradient_checkpointing:
        for module in network.modules():
            plain = isinstance(getattr(module, "processor", None), AttnProcessor2_0)
            if plain and all(getattr(module, name) in (None, False) for name in UNSUPPORTED):
                module.set_processor(BackendAttention())
    try:  # both raise where a package is not installed
        flag, name = "attention_without_gradient", args.attention_without_gradient
        if name:
            with attention_backend(name):  # which is set for all networks, and put back at the end
                pass
        for module in network.modules():
            if isinstance(getattr(module, "processor", None), Kernels):
                module.processor.without_gradient = AttentionBackendName(name) if name else None
        flag, name = "attention_mechanism", backend
        if name != "diffusers":
            network.set_attention_backend(name)
    except (RuntimeError, ValueError, ImportError) as error:
        raise SystemExit(f"--{flag} {name}: {error}") from None


def fastest_attention(network) -> tuple[str, str]:
    """The backend that --attention_mechanism auto means for networks as this one, and what it is in words.

    PyTorch's SDPA chooses among its kernels itself, for each call: cuDNN's where that is the fastest (Hopper and
    Blackwell, if cuDNN is new enough), and another one where a mask, a head's width or the precision does not suit it.
    """
    q = torch.empty(1, 8, 256, 64, dtype=network.dtype, device=network.device)  # [B, heads, L, D]
    kernel = SDPBackend(torch._fused_sdp_choice(q, q, q))
    hopper = network.device.type == "cuda" and torch.cuda.get_device_capability(network.device)[0] == 9
    half, installed = network.dtype != torch.float32, importlib.util.find_spec("flash_attn_interface") is not None
    if hopper and half and installed and kernel != SDPBackend.CUDNN_ATTENTION:
        return "_flash_varlen_3", "FlashAttention 3"
    return "diffusers", f"PyTorch's SDPA, by its kernel {kernel.name}"


def dynamo_backend() -> str:
    """The backend of torch.compile that accelerate's config asks for, or no; --compile takes it over from there."""
    return os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower()


def speed_up(args, networks, compiled_blocks: tuple[str, ...], say, dynamic: bool = False):
    """Sets attention kernels and compilation of networks, each of them once, and keeps DDP off frozen weights.

    Compiled blocks are `dynamic`, where one code is for all shapes, or have a code for each.
    """
    networks = list({id(network): network for network in networks}.values())
    backend = args.attention_mechanism
    if backend == "auto":
        backend, words = fastest_attention(networks[0])
        say(f"--attention_mechanism auto: {words}")
    if args.enable_xformers_memory_efficient_attention:
        backend = "xformers" if is_xformers_available() else backend
        if backend != "xformers":
            say("--enable_xformers_memory_efficient_attention: not installed, PyTorch's SDPA is in use")
    for network in networks:
        set_attention(args, network, backend)
        for layer in adapter_layers(network):  # PEFT brings inputs to the adapter's fp32, and autocast back again
            layer.cast_input_dtype_enabled = False
        # Frozen weights come from one file in every process, and those in 8 bits cannot be broadcast
        frozen = [name for name, p in network.named_parameters() if not p.requires_grad]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(network, frozen)
        if args.compile:  # in place and block by block: names of weights stay, and equal blocks share their code
            for block in modules_of(network, compiled_blocks):
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
