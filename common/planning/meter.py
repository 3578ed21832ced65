"""A meter of memory and operations, under which a script runs on fake tensors: they have a shape and no content."""

import contextlib
import functools
import weakref
from collections import Counter
from unittest.mock import patch

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, in_kernel_invocation_manager
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop, sdpa_flop

aten = torch.ops.aten
# Operations that are counted; what a convolution or a product needs follows from its shapes
COUNTED = {
    "matrix products": {name: count for name, count in flop_registry.items() if "attention" not in str(name)},
    "attention": {
        aten._scaled_dot_product_flash_attention_for_cpu: sdpa_flop,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: sdpa_backward_flop,
    },
}
PLAIN = (torch.Tensor, torch.nn.Parameter, FakeTensor)
SMALL = 4096  # numbers: so small a tensor that is made of nothing is real
UNWRITTEN = (aten.empty, aten.empty_strided)  # but for these, of which networks' weights are made
CPU = torch.device("cpu")
SAME, VIEW = "same", "view"  # results that are an argument, or views of one
ACTIVATIONS, CASTS, GRADIENTS, HOST = "activations", "weights that autocast has cast", "gradients", "on the machine"
# What autocast computes in fp32 on CUDA and not on a CPU (ATen/autocast_mode.h), as far as networks have it
FP32_ON_CUDA = (
    "cumsum", "exp", "expm1", "group_norm", "huber_loss", "l1_loss", "layer_norm", "linalg_vector_norm", "log", "log1p",
    "log_softmax", "logsumexp", "mse_loss", "norm", "pow", "prod", "reciprocal", "rsqrt", "smooth_l1_loss", "softmax",
    "softplus", "sum", "tan",
)  # fmt: skip
AUTOCAST = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)


class Meter(TorchDispatchMode):
    """Bytes of living tensors by kind, the most at a time, and operations, of what runs inside.

    A storage is followed from the operation that returns it to its end; views and operations in place add nothing.
    `fake` tensors stand for large ones and for all that follows from them. Small ones that are made of nothing, as
    timesteps and draws, are real, since the code may look at them. A block of memory has a multiple of `block` bytes.
    """

    running = None  # the meter of --plan, inside of it

    def __init__(self, fake: bool = True, block: int = 512):
        super().__init__()
        self.fake, self.block = FakeTensorMode(allow_non_fake_inputs=True) if fake else None, block
        self.alive: dict[int, tuple[int, str]] = {}  # bytes and kind by storage
        self.now, self.total, self.kind, self.loading = Counter(), 0, ACTIVATIONS, False
        self.known = {}  # recipes of results, by operation and layouts of arguments
        self.start()

    def start(self):
        """Looks for the peak, and counts operations, from here on."""
        self.peak, self.at_peak, self.operations = self.total, self.now.copy(), Counter()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if kwargs.get("device"):  # accelerate's cpu:0 is another device to fake tensors
            kwargs = kwargs | {"device": CPU}
        if any(kind not in PLAIN for kind in types):  # of 8 bits, or split: its own code calls with what is inside
            return NotImplemented
        result = self.run(operation, args, kwargs)
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.follow(tensor.untyped_storage(), self.kind_made(tensor, operation, args))
        for name, counts in COUNTED.items():
            if count := counts.get(operation.overloadpacket):
                self.operations[name] += count(*args, **kwargs, out_val=result)
        return result

    def run(self, operation, args, kwargs):
        """What an operation returns: for real ones it is real, else a tensor without content."""
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        fake = [tensor for tensor in given if isinstance(tensor, FakeTensor)]
        if self.fake is None or given and not fake:
            return operation(*args, **kwargs)
        if fake:
            key = operation, key_of(args), key_of(list(kwargs.items()))
            if key in self.known:
                return self.again(self.known[key], operation, args, kwargs)
            with self.fake:
                result = operation(*args, **kwargs)
            simple = operation.namespace == "aten" and len(fake) == len(given)
            if simple and (recipe := recipe_of(result, given, args)) is not None:
                self.known[key] = recipe
            return result
        with self.fake:
            result = operation(*args, **kwargs)
        if self.loading or not isinstance(result, torch.Tensor):
            return result
        most = 0 if operation.overloadpacket in UNWRITTEN else SMALL
        return operation(*args, **kwargs) if result.numel() <= most else result

    def again(self, recipe, operation, args, kwargs):
        """The result of an operation that has met the same layouts before; FakeTensorMode itself takes far longer."""
        if recipe == SAME:
            return args[0]
        if recipe == VIEW:
            with in_kernel_invocation_manager(self.fake):
                result = operation(*args, **kwargs)
            return tree_map(lambda part: FakeTensor(self.fake, part, CPU), result)
        kind, layouts = recipe
        made = [
            FakeTensor(self.fake, torch.empty_strided(*layout, dtype=dtype, device="meta"), CPU)
            for *layout, dtype in layouts
        ]
        return made[0] if kind is torch.Tensor else kind(made)

    def kind_made(self, tensor, operation, args) -> str:
        """The kind of what an operation makes: weights that are moved stay weights."""
        if operation is aten._to_copy.default and "weights" in (kind := self.kind_of(args[0])):
            return kind if tensor.dtype == args[0].dtype else CASTS
        return self.kind

    def follow(self, storage: torch.UntypedStorage, kind: str):
        if (key := storage._cdata) not in self.alive:
            self.count(key, self.blocks(storage), kind)
            weakref.finalize(storage, self.drop, key)

    def blocks(self, storage: torch.UntypedStorage) -> int:
        """Bytes of a storage, in whole blocks."""
        return -(-storage.nbytes() // self.block) * self.block

    def resized(self, storage: torch.UntypedStorage):
        if (key := storage._cdata) in self.alive:
            _, kind = self.alive[key]
            self.drop(key)
            self.count(key, self.blocks(storage), kind)

    def count(self, key: int, size: int, kind: str):
        self.alive[key] = size, kind
        self.now[kind] += size
        self.total += size * (kind != HOST)
        if self.total >= self.peak:
            self.peak, self.at_peak = self.total, self.now.copy()

    def drop(self, key: int) -> int:
        size, kind = self.alive.pop(key)
        self.now[kind] -= size
        self.total -= size * (kind != HOST)
        return size

    def kind_of(self, tensor: torch.Tensor) -> str:
        return self.alive.get(tensor.untyped_storage()._cdata, (0, ""))[1]

    def name(self, kind: str, tensors):
        """Counts these tensors as of another kind."""
        for part in (part for tensor in tensors for part in inner_tensors(tensor)):
            key = part.untyped_storage()._cdata
            if key in self.alive:
                self.count(key, self.drop(key), kind)

    @contextlib.contextmanager
    def weights(self, kind: str):
        """Inside, what is made is a network's, with no value that the code looks at."""
        before, self.kind, self.loading = (self.kind, self.loading), kind, True
        try:
            yield
        finally:
            self.kind, self.loading = before


def key_of(value):
    """What an operation's result depends on: of tensors the layout."""
    if isinstance(value, torch.Tensor):
        return value.shape, value.stride(), value.dtype, value.storage_offset()
    if isinstance(value, list | tuple):
        return type(value), *map(key_of, value)
    return type(value), value


def recipe_of(result, given: list[torch.Tensor], args):
    """How to make a result once more: the first argument itself, a view of one, or new tensors; else None."""
    if args and result is args[0]:
        return SAME
    parts = [result] if isinstance(result, torch.Tensor) else result
    if type(result) not in (FakeTensor, tuple, list) or not all(isinstance(part, FakeTensor) for part in parts):
        return None
    inside = {tensor.untyped_storage()._cdata for tensor in given}
    storages = [part.untyped_storage()._cdata for part in parts]
    if inside.issuperset(storages):
        return VIEW
    dense = all(part.untyped_storage().nbytes() == dense_bytes(part) for part in parts)
    if not dense or inside.intersection(storages) or len(set(storages)) < len(parts):
        return None
    kind = torch.Tensor if isinstance(result, torch.Tensor) else type(result)
    return kind, [(tuple(part.shape), part.stride(), part.dtype) for part in parts]


def dense_bytes(tensor: torch.Tensor) -> int:
    """Bytes of a storage of its own."""
    if tensor.numel() == 0:
        return 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.itemsize


class Unwritten(dict):
    """A cache of records that is written nowhere; like the true one it takes nothing of a GPU."""

    def put(self, key: str, tensors: dict[str, torch.Tensor]):
        with Meter.running.weights(HOST):
            self[key] = {name: tensor.detach().clone() for name, tensor in tensors.items()}

    def flush(self):
        pass


def inner_tensors(tensor: torch.Tensor) -> list[torch.Tensor]:
    """A tensor, or those of which a tensor of 8 bits, or a split one, is made."""
    if isinstance(tensor, FakeTensor) or not hasattr(tensor, "__tensor_flatten__"):
        return [tensor]
    parts = [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]]
    return [inner for part in parts if isinstance(part, torch.Tensor) for inner in inner_tensors(part)]


# ---------------------------------------------------------------------------------------------------------------------
# What is else on a GPU, and what fake tensors lack
# ---------------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def as_on_cuda():
    """Inside, autocast on a CPU keeps to CUDA's rules, and norms work as CUDA's kernels."""
    with torch.library._scoped_library("aten", "IMPL") as library, patch("warnings.warn"):
        for packet in (getattr(aten, name) for name in FP32_ON_CUDA):
            for overload in packet.overloads():
                if "out" not in overload:
                    operation = getattr(packet, overload)
                    library.impl(operation, functools.partial(in_fp32, operation), "AutocastCPU", allow_override=True)
        library.impl("rms_norm", rms_norm, "AutocastCPU")
        yield


def in_fp32(operation, *args, **kwargs):
    args, kwargs = tree_map(lambda x: x.float() if is_half(x) else x, (args, kwargs))
    if operation is aten.group_norm.default:  # CUDA's kernel knows no other layout
        args = args[0].contiguous(), *args[1:]
    with torch._C._ExcludeDispatchKeyGuard(AUTOCAST):
        return operation(*args, **kwargs)


def is_half(x) -> bool:
    return isinstance(x, torch.Tensor) and x.dtype in (torch.bfloat16, torch.float16)


def rms_norm(x, shape, weight=None, eps=None):
    """By one kernel where weight and input have one precision, else by its parts."""
    if weight is None or weight.dtype == x.dtype:
        return FusedNorm.apply(x, weight)
    with torch._C._ExcludeDispatchKeyGuard(AUTOCAST):
        return aten.rms_norm(x.float(), shape, weight.float(), eps)


class FusedNorm(torch.autograd.Function):
    """The tensors of a norm over the last dimension by one kernel."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight, x.new_empty(x.shape[:-1], dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx, grad):
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight) if ctx.needs_input_grad[1] else None


@contextlib.contextmanager
def fake_tensors_suffice():
    """Inside, fake tensors can also be moved by Module.to(), given to numpy, as zeros, and saved, as nothing."""
    exchange, resize_itself = torch.utils.swap_tensors, torch.UntypedStorage.resize_

    def swap(parameter, other):  # the original refuses tensors with weak references, as FakeTensorMode has
        if isinstance(parameter, FakeTensor) and isinstance(other, FakeTensor):
            parameter.data = other
        elif not isinstance(parameter, DTensor):  # which are on their device already
            exchange(parameter, other)

    def zeros(tensor, **_):
        return np.zeros(tensor.shape, str(tensor.dtype).removeprefix("torch."))

    def resize(storage, size: int):  # by FSDP, before and after a network's turn
        resize_itself(storage, size)
        Meter.running.resized(storage)

    with patch("torch.utils.swap_tensors", swap), patch.object(FakeTensor, "numpy", zeros):
        with patch("safetensors.torch.serialize_file"), patch.object(torch.UntypedStorage, "resize_", resize):
            yield
