"""The memory that a run of the Wan script will take, before any network is loaded.

Weights, gradients and optimizer states are counted on the networks, built on the meta device. Activations are measured:
two and three blocks of the network go forward and backward on fake tensors, which have a shape and no content, while a
meter adds up the bytes that are alive. Each further block keeps as many as the third.
"""

import functools
import warnings
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from diffusers import ModelMixin
from peft import LoraConfig
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from common.wan.parallel import wants_fsdp

GB = 1e9
RESERVE = 1.0 * GB  # CUDA's own: context, workspaces, gaps between tensors
FEW, MORE = 2, 3  # blocks that are measured


@dataclass(frozen=True)
class PlannedModel:
    """A model's networks, built from their configs alone by the script's block of the model."""

    transformer: Callable[[int], torch.nn.Module]  # with so many blocks
    vae: Callable[[], torch.nn.Module]
    text_encoder: Callable[[], torch.nn.Module]
    predict: Callable  # predict(transformer, x, t, text), text being [B, rows, text_width]
    blocks: int
    block: str  # name of a block's class
    channels: int  # of latents
    patch: tuple[int, int, int]  # frames, rows and columns of latents that make a token
    text_width: int
    heads: int
    width: int  # of keys, and of values, over all heads


@dataclass(frozen=True)
class Setup:
    """All settings that decide how much memory a run takes. Sizes are those of latents."""

    model: PlannedModel
    batch: int
    frames: int
    height: int
    width: int
    validation: tuple[int, int, int]  # frames, height and width of one clip
    text_length: int = 512
    model_type: str = "lora"  # or full
    lora_rank: int = 128
    lora_targets: tuple[str, ...] = ()
    dtype: torch.dtype = torch.bfloat16  # of frozen networks
    base_precision: str = "no_change"
    text_precision: str = "no_change"
    optimizer: str = "adamw"
    checkpointing: bool = False
    accumulation: int = 1
    ema: str = "none"  # or cpu, or gpu
    block_lengths: tuple[int, ...] = ()  # frames of each, of a causal student
    caches: str = "fill"  # or full; or ondemand, off: the encoders stay
    shards: int = 1  # processes that FSDP splits trained networks over
    context_parallel: int = 1  # processes that share a clip's tokens
    fake_score: bool = True  # DMD's; LCM has none
    encoded: tuple[int, int, int, int] | None = None  # clips at a time, their frames, height and width in pixels

    @property
    def rank(self) -> int:
        return self.lora_rank if self.model_type == "lora" else 0

    def tokens(self) -> int:
        frames, rows, columns = self.model.patch
        return self.frames // frames * (self.height // rows) * (self.width // columns)


# ---------------------------------------------------------------------------------------------------------------------
# Counted: weights, gradients, optimizer states
# ---------------------------------------------------------------------------------------------------------------------


def kept_in_fp32(network: torch.nn.Module, name: str, dtype: torch.dtype) -> bool:
    """Whether from_pretrained loads this weight in fp32 when the others are loaded in dtype."""
    if not isinstance(network, ModelMixin) and dtype != torch.float16:  # transformers: against fp16's overflow alone
        return False
    return bool(set(network._keep_in_fp32_modules or []) & set(name.split(".")))


def build(model: PlannedModel, rank: int = 0, targets: tuple[str, ...] = (), blocks: int | None = None):
    """The transformer on the meta device, with an adapter of this rank, or with rank 0 trained in full."""
    with torch.device("meta"):
        network = model.transformer(min(blocks or model.blocks, model.blocks))
        if rank:
            network.requires_grad_(False)
            network.add_adapter(LoraConfig(r=rank, target_modules=list(targets)))
    return network


counted = functools.lru_cache(build)


def frozen_bytes(network: torch.nn.Module, dtype: torch.dtype, precision: str) -> int:
    """Bytes of a network without adapters, as from_pretrained loads it, its Linear layers in 8 bits by `precision`."""
    total = 0
    linear = {id(module.weight) for module in network.modules() if isinstance(module, torch.nn.Linear)}
    for name, p in network.named_parameters():
        if "lora_" in name:
            continue
        if id(p) in linear and precision != "no_change":
            total += p.numel() + len(p) * (5 if precision == "int8-torchao" else 4)  # a row's scale and zero point
        else:
            total += p.numel() * (4 if kept_in_fp32(network, name, dtype) else dtype.itemsize)
    return total


def trained_parameters(setup: Setup) -> list[torch.nn.Parameter]:
    """Trained weights of the student; the fake score has as many."""
    network = counted(setup.model, setup.rank, setup.lora_targets)
    return [p for p in network.parameters() if p.requires_grad]


def state_bytes(parameters: list[torch.nn.Parameter], optimizer: str) -> int:
    """Bytes of moments: two, or Lion's one, in fp32; or of large tensors two in 8 bits, with a scale for each 256."""
    if optimizer == "adamw8bit":
        return sum(2 * (p.numel() + p.numel() // 64) if p.numel() >= 4096 and p.numel() % 256 == 0 else 8 * p.numel()
                   for p in parameters)  # fmt: skip
    return sum((4 if optimizer == "lion" else 8) * p.numel() for p in parameters)


# ---------------------------------------------------------------------------------------------------------------------
# Measured: activations
# ---------------------------------------------------------------------------------------------------------------------


class Meter(TorchDispatchMode):
    """Bytes of living tensors that operations inside this mode have returned, and the most at a time."""

    def __init__(self, known):
        super().__init__()
        self.known = {tensor.untyped_storage()._cdata for tensor in known}
        self.alive: dict[int, int] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        results = operation(*args, **(kwargs or {}))
        for tensor in tree_leaves(results):
            if isinstance(tensor, torch.Tensor):
                self.add(tensor.untyped_storage())
        self.peak = max(self.peak, self.now)
        return results

    def add(self, storage):
        key = storage._cdata
        if key not in self.known and key not in self.alive:
            self.alive[key] = storage.nbytes()
            self.now += storage.nbytes()
            weakref.finalize(storage, self.drop, key)

    def drop(self, key: int):
        self.now -= self.alive.pop(key)


def give_shapes(network: torch.nn.Module, dtype: torch.dtype):
    """Gives a network, inside a FakeTensorMode, tensors as on a CPU: trained weights in fp32, others in dtype."""
    for place, module in network.named_modules():
        for name, p in module._parameters.items():
            if p is not None:
                in_fp32 = p.requires_grad or kept_in_fp32(network, f"{place}.{name}", dtype)
                fake = torch.empty(p.shape, dtype=torch.float32 if in_fp32 else dtype)
                module._parameters[name] = torch.nn.Parameter(fake, p.requires_grad)
        for name, buffer in module._buffers.items():
            module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


@functools.lru_cache
def measured(model, rank, targets, dtype, checkpointing, blocks, shape, text_length, gradient) -> tuple[int, int]:
    """Bytes that a forward of so many blocks keeps for backward(), and the peak of both."""
    network = build(model, rank, targets, blocks)
    if not gradient:
        network.requires_grad_(False)
    if checkpointing:
        network.enable_gradient_checkpointing()
    with FakeTensorMode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # warnings of kernels that are slow on a CPU
        give_shapes(network, dtype)
        x, t = torch.empty(shape, dtype=dtype), torch.empty(shape[0])  # [B, C, F, h, w]
        text = torch.empty(shape[0], text_length, model.text_width, dtype=dtype)
        for p in network.parameters():
            if p.requires_grad:  # gradients are counted elsewhere
                p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
        with Meter([*network.parameters(), *network.buffers(), x, t, text]) as meter, torch.set_grad_enabled(gradient):
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                out = model.predict(network, x, t, text)
            kept = meter.now
            if gradient:
                out.float().sum().backward()
    return kept, meter.peak


def activations(setup: Setup, shape: tuple[int, int, int, int], gradient: bool = True) -> tuple[int, int]:
    """Bytes that the graph of a forward through all blocks keeps, and bytes on top of these, mostly in backward().

    `shape` is batch, frames, height and width.
    """
    count, shape = setup.model.blocks, (shape[0], setup.model.channels, *shape[1:])
    few, more = (
        measured(setup.model, setup.rank, setup.lora_targets, setup.dtype, setup.checkpointing,
                 min(blocks, count), shape, setup.text_length, gradient)
        for blocks in (FEW, MORE)
    )  # fmt: skip
    return more[0] + max(0, count - MORE) * (more[0] - few[0]), more[1] - more[0]


@functools.lru_cache
def vae_bytes(model: PlannedModel, shape: tuple[int, ...], encodes: bool = False) -> tuple[int, int]:
    """Bytes of the VAE's weights, in fp32, and on top of them the peak of decoding latents [B, C, f, h, w], or where it
    `encodes` that of encoding pixels [B, 3, F, H, W]."""
    with torch.device("meta"):
        vae = model.vae().requires_grad_(False)
    weights = frozen_bytes(vae, torch.float32, "no_change")
    with FakeTensorMode():
        give_shapes(vae, torch.float32)
        x = torch.empty(shape)
        with Meter([*vae.parameters(), *vae.buffers(), x]) as meter, torch.no_grad():
            vae.encode(x) if encodes else vae.decode(x)
    return weights, meter.peak


# ---------------------------------------------------------------------------------------------------------------------
# The plan
# ---------------------------------------------------------------------------------------------------------------------


def text_encoder_bytes(setup: Setup) -> int:
    with torch.device("meta"):
        encoder = setup.model.text_encoder()
    return frozen_bytes(encoder, setup.dtype, setup.text_precision)


def account(setup: Setup) -> dict[str, dict[str, int]]:
    """Bytes on one GPU by phase, and within a phase by what they are for."""
    lora, share = setup.model_type == "lora", setup.shards
    trained = trained_parameters(setup)
    count = sum(p.numel() for p in trained)
    base = counted(setup.model, setup.rank, setup.lora_targets)
    kind = f"LoRA of rank {setup.lora_rank}" if lora else "full"
    fake_optimizer = "adamw" if setup.optimizer == "lion" else setup.optimizer
    base_of = ", base of all three" if setup.fake_score else ", base of both"
    weights = {
        f"teacher{base_of * lora}, {setup.base_precision.replace('no_change', str(setup.dtype)[6:])}":
            frozen_bytes(base, setup.dtype, setup.base_precision) // share,
        f"student, {kind}, {count / 1e6:.0f} M in fp32": 4 * count // share,
    }  # fmt: skip
    states = {f"student's {setup.optimizer} state": state_bytes(trained, setup.optimizer) // share}
    if setup.fake_score:
        weights["fake score, likewise"] = 4 * count // share
        states[f"fake score's {fake_optimizer} state"] = state_bytes(trained, fake_optimizer) // share
    weights |= {"EMA of the student": 4 * count // share} if setup.ema == "gpu" else {}
    block = next(m for m in counted(setup.model).modules() if type(m).__name__ == setup.model.block)
    block_bytes = sum(p.numel() for p in block.parameters()) * setup.dtype.itemsize
    gathered = {"two blocks that FSDP has gathered": 2 * block_bytes} if share > 1 else {}

    # The student's turn keeps the rollout's graph during forwards of teacher and fake score; then comes its backward().
    # In LCM the teacher goes before the student, and nothing is kept meanwhile
    model, size, parallel = setup.model, (setup.height, setup.width), setup.context_parallel
    kept, on_top = (part // parallel for part in activations(setup, (setup.batch, setup.frames, *size)))
    scores = sum(activations(setup, (2 * setup.batch, setup.frames, *size), gradient=False)) // parallel
    if not lora and setup.dtype != torch.float32:  # autocast keeps cast weights until the network's forward ends
        scores += count * setup.dtype.itemsize // share
    past = {}
    if setup.block_lengths:  # the blocks' graphs share these pieces; attention joins those of a layer, with gradients
        tokens = setup.tokens() // setup.frames
        frame = 2 * setup.batch * tokens * model.width * setup.dtype.itemsize // parallel  # keys and values of a layer
        past = {"keys and values of earlier blocks": model.blocks * frame * sum(setup.block_lengths[:-1])}
        joined = 2 * frame * sum(setup.block_lengths)
        longest_block = activations(setup, (setup.batch, max(setup.block_lengths), *size))[1] // parallel
        on_top = max(on_top, longest_block + joined)
    scores -= 0 if setup.fake_score else kept
    gradients = 4 * count // share
    # The student's, and a fake score's, through the next pass
    accumulated = (1 + setup.fake_score) * gradients if setup.accumulation > 1 else 0
    turns = {
        "activations kept for backward()": kept,
        "backward() of one block, or a forward without it": max(on_top, scores),
        "gradients, beyond what has gone when they come": max(accumulated, gradients - kept, 0),
    }
    vae, decoding = vae_bytes(model, (setup.batch, model.channels, *setup.validation))
    stays = setup.caches in ("ondemand", "off")
    text_encoder = {"text encoder": text_encoder_bytes(setup)} if stays else {}
    idle_vae = {"VAE, after a validation": vae} if stays else {}
    encoding = {}
    if setup.encoded:
        batch, *clip = setup.encoded
        encoding = dict(zip(("VAE", "its encoding"), vae_bytes(model, (batch, 3, *clip), encodes=True), strict=True))
    phases = {"training": weights | states | turns | past | gathered | text_encoder | idle_vae}
    if setup.caches == "fill":
        phases["filling the caches"] = weights | {"text encoder": text_encoder_bytes(setup)} | encoding
    elif encoding and stays:
        phases["encoding clips"] = weights | states | text_encoder | encoding
    sampling = sum(activations(setup, (setup.batch, *setup.validation), gradient=False))
    generation = {"VAE": vae, "its decoding, or a forward": max(decoding, sampling)}
    phases["validation"] = weights | states | text_encoder | generation
    return phases


def most(setup: Setup) -> int:
    """Bytes of the largest phase."""
    return max(sum(parts.values()) for parts in account(setup).values())


def can_share(setup: Setup, n: int) -> bool:
    """Whether n processes, more than now, can share tokens: n divides the heads, and the tokens of a frame."""
    divisible = setup.model.heads % n == 0
    return divisible and setup.shards == 1 and setup.context_parallel < n and 0 == setup.tokens() // setup.frames % n


# fmt: off
REMEDIES: list[tuple[str, Callable[[Setup], bool], dict]] = [
    ("--gradient_checkpointing", lambda s: not s.checkpointing, {"checkpointing": True}),
    ("--text_encoder_1_precision int8-torchao", lambda s: s.caches != "full" and s.text_precision == "no_change",
     {"text_precision": "int8-torchao"}),
    ("--ema_device cpu", lambda s: s.ema == "gpu" and s.shards == 1, {"ema": "cpu"}),
    ("--optimizer adamw8bit", lambda s: s.optimizer != "adamw8bit", {"optimizer": "adamw8bit"}),
    ("--train_batch_size 1", lambda s: s.batch > 1, {"batch": 1}),
    ("--base_model_precision int8-torchao", lambda s: s.base_precision == "no_change" and s.shards == 1,
     {"base_precision": "int8-torchao"}),
    ("--model_type lora", lambda s: s.model_type == "full", {"model_type": "lora", "shards": 1}),
    ("--lora_rank 32", lambda s: s.model_type == "lora" and s.lora_rank > 32, {"lora_rank": 32}),
    *((f"--context_parallel_degree {n}", lambda s, n=n: can_share(s, n), {"context_parallel": n}) for n in (2, 4, 8)),
]
# fmt: on


def remedies(setup: Setup, room: float) -> list[tuple[str, int]]:
    """Flags that save memory, each on top of those before, with the bytes that the run then takes, until it fits."""
    steps, now = [], most(setup)
    for flag, applies, changes in REMEDIES:
        if now + RESERVE <= room:
            break
        if applies(setup):
            better = replace(setup, **changes)
            if (less := most(better)) < now:
                setup, now = better, less
                steps.append((flag, now))
    return steps


def report(setup: Setup, frames: int, room: float | None = None) -> str:
    """The plan as text, for clips of so many frames; with `room`, a GPU's bytes, also the flags that make it fit."""
    size = f"{setup.width}x{setup.height} latents"
    lines = [f"{setup.batch} x {frames} frames of {size}: {setup.batch} x {setup.tokens():,} tokens; GB on each GPU"]
    for phase, parts in account(setup).items():
        lines += ["", f"{phase:58s}{sum(parts.values()) / GB:8.2f}"]
        lines += [f"  {name:56s}{size / GB:8.2f}" for name, size in parts.items()]
    embedding = setup.text_length * setup.model.text_width * setup.dtype.itemsize
    elsewhere = f"on disk: {embedding / 1e6:.1f} MB a prompt at the most"
    if setup.ema == "cpu":
        average = 4 * sum(p.numel() for p in trained_parameters(setup))
        elsewhere += f"; in the machine's memory: {average / GB:.2f} GB, EMA of the student"
    lines += ["", elsewhere, f"at the most {most(setup) / GB:.1f} GB, and about {RESERVE / GB:.0f} GB of CUDA's own"]
    if room is not None and most(setup) + RESERVE <= room:
        lines.append(f"fits into {room / GB:.0f} GB")
    elif room is not None:
        steps = remedies(setup, room)
        lines.append(f"does not fit into {room / GB:.0f} GB; with these flags, each on top of those before:")
        lines += [f"  {flag:56s}{now / GB:8.2f}" for flag, now in steps]
        if not steps or steps[-1][1] + RESERVE > room:
            lines.append("  and still not: a smaller --resolution, fewer --num_frames, or a larger GPU")
    return "\n".join(lines)


def plan_of(args, setup: Setup, frames: int, accelerator) -> str:
    """Text that --plan prints, for a GPU with so many GB, or for the GPU of this machine."""
    room = GB * args.plan or None
    if room is None and accelerator.device.type == "cuda":
        room = torch.cuda.get_device_properties(accelerator.device).total_memory
    shards = accelerator.num_processes if wants_fsdp(accelerator) else 1
    return report(replace(setup, shards=shards), frames, room)
