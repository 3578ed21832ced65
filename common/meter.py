"""What operations take, on tensors that have a shape and no content."""

import weakref

import torch
from diffusers import ModelMixin
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Meter(TorchDispatchMode):
    """Bytes of all tensors alive that operations have made since, and the most there were at a time."""

    def __init__(self, known):
        super().__init__()
        self.known = {tensor.untyped_storage()._cdata for tensor in known}
        self.alive: dict[int, int] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        made = operation(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor):
                self.add(tensor.untyped_storage())
        self.peak = max(self.peak, self.now)
        return made

    def add(self, storage):
        key = storage._cdata
        if key not in self.known and key not in self.alive:
            self.alive[key] = storage.nbytes()
            self.now += storage.nbytes()
            weakref.finalize(storage, self.drop, key)

    def drop(self, key: int):
        self.now -= self.alive.pop(key)


def kept_in_fp32(network: torch.nn.Module, name: str, dtype: torch.dtype) -> bool:
    """Whether from_pretrained loads this weight in fp32 when the others are loaded in dtype."""
    if not isinstance(network, ModelMixin) and dtype != torch.float16:  # transformers: against fp16's overflow alone
        return False
    return bool(set(network._keep_in_fp32_modules or []) & set(name.split(".")))


def give_shapes(network: torch.nn.Module, dtype: torch.dtype):
    """Inside a FakeTensorMode: a network on the meta device gets tensors like a CPU's. What is trained is in fp32."""
    for place, module in network.named_modules():
        for name, p in module._parameters.items():
            if p is not None:
                whole = p.requires_grad or kept_in_fp32(network, f"{place}.{name}", dtype)
                fake = torch.empty(p.shape, dtype=torch.float32 if whole else dtype)
                module._parameters[name] = torch.nn.Parameter(fake, p.requires_grad)
        for name, buffer in module._buffers.items():
            module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)
