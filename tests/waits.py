"""A run whose host must not wait for the device between two lines of the log, on a GPU or on a CPU.

On a CPU a device is played: its tensors hold those of the CPU, and show another device. What would make the host wait
for a GPU is an error there: a value that is read, a size that depends on values, a copy to the CPU, and one from it
that is not of pinned memory or not asynchronous. A GPU is asked by steps_without_waits(script, *parsed, on=gpu).
"""

import contextlib
from unittest.mock import patch

import torch
from accelerate import Accelerator
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

import common.draws
from common.data.encoder import SampleEncoder

PLAYED = torch.device("lazy")  # no build has it, and its backward() runs in the caller's thread, where the modes are
READS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "unique_dim", "repeat_interleave")


class OnDevice(torch.Tensor):
    """A tensor of the played device; `held` has its values."""

    @staticmethod
    def __new__(cls, held: torch.Tensor):
        layout = {"strides": held.stride(), "storage_offset": held.storage_offset(), "dtype": held.dtype}
        return torch.Tensor._make_wrapper_subclass(cls, held.size(), **layout, device=PLAYED)

    def __init__(self, held: torch.Tensor):
        self.held = held

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise AssertionError(f"{func}: outside of the played device")


class PlayedDevice(TorchDispatchMode):
    """Runs what is asked of the played device on the CPU; an error where the host would wait and must not."""

    def __init__(self):
        super().__init__()
        self.forbidden = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, wrappers = kwargs or {}, {}
        target = kwargs.get("device")
        if self.forbidden and waits(func, args, kwargs):
            raise AssertionError(f"{func}: the host waits for the device")

        def unwrap(tensor):
            wrappers[id(tensor.held)] = tensor  # of what is changed in place the wrapper stays
            return tensor.held

        args, kwargs = tree_map_only(OnDevice, unwrap, (args, kwargs))
        on_device = bool(wrappers)
        if target is not None:
            on_device, kwargs = torch.device(target).type == PLAYED.type, kwargs | {"device": "cpu"}

        def wrap(found):
            if id(found) in wrappers:
                return wrappers[id(found)]
            return OnDevice(found) if on_device else found

        return tree_map_only(torch.Tensor, wrap, func(*args, **kwargs))


def waits(func, args, kwargs) -> bool:
    """Whether the host would wait for the device in this call."""
    name, tensors = func.overloadpacket.__name__, [t for t in tree_leaves((args, kwargs)) if torch.is_tensor(t)]
    held, hosts = [t for t in tensors if isinstance(t, OnDevice)], [t for t in tensors if not isinstance(t, OnDevice)]
    to = torch.device(kwargs["device"]).type if kwargs.get("device") is not None else None
    if name == "_to_copy" and to == PLAYED.type and hosts:
        return not (kwargs.get("non_blocking") and getattr(hosts[0], "pinned", False))
    if not held:
        return False
    masks = [t for t in held[1:] if t.dtype in (torch.bool, torch.uint8)] if name.startswith("index") else []
    # A number on the CPU is an argument like any other; a longer tensor there would have to be copied
    return name in READS or bool(masks) or to == "cpu" or any(t.ndim for t in hosts) or name == "copy_" and bool(hosts)


class PlayedFunctions(TorchFunctionMode):
    """The same for functions that do not ask PyTorch's dispatcher."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func in (torch.tensor, torch.as_tensor) and kwargs.get("device") == PLAYED:
            return func(*args, **kwargs | {"device": "cpu"}).to(kwargs["device"])
        if func in (torch.Tensor.tolist, torch.Tensor.numpy) and isinstance(args[0], OnDevice):
            return func(args[0].cpu())
        if func is torch.Tensor.pin_memory:
            found = args[0].clone()
            found.pinned = True
            return found
        return func(*args, **kwargs)


@contextlib.contextmanager
def played_device():
    """Inside, an Accelerator's device is a played one. Yields a function that forbids waiting, or allows it again."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(patch.object(Accelerator, "device", PLAYED))
        stack.enter_context(patch.object(common.draws, "PINNED", (PLAYED.type,)))
        stack.enter_context(patch("torch.optim.adam._device_dtype_check_for_fused"))  # which knows the names of GPUs
        device = stack.enter_context(PlayedDevice())
        stack.enter_context(PlayedFunctions())
        yield lambda forbidden: setattr(device, "forbidden", forbidden)


@contextlib.contextmanager
def gpu():
    """The same on a GPU, where PyTorch itself tells."""
    assert torch.cuda.is_available()
    yield lambda forbidden: torch.cuda.set_sync_debug_mode("error" if forbidden else "default")


def steps_without_waits(script, *parsed, on=played_device) -> int:
    """The number of steps that a script's loop has made, in none of which the host has waited for the device.

    A step is watched from its beginning to its line in the log, or to its end. Encoders may wait where they are loaded.
    """
    steps, in_loop, load = [], False, SampleEncoder.load
    with on() as forbid, contextlib.ExitStack() as stack:

        class Watched(script.StopSignal):  # made as the loop begins, asked as a step ends
            def __init__(self):
                nonlocal in_loop
                super().__init__()
                in_loop = True
                forbid(True)

            def agreed(self, accelerator):
                steps.append(1)
                forbid(True)
                return super().agreed(accelerator)

        def loaded(encoder, loader):
            if loader in encoder.loaded:
                return load(encoder, loader)
            forbid(False)
            network = load(encoder, loader)
            forbid(in_loop)
            return network

        def reduce(accelerator, values, *how):
            forbid(False)
            return values

        stack.enter_context(patch.object(script, "StopSignal", Watched))
        stack.enter_context(patch.object(SampleEncoder, "load", loaded))
        stack.enter_context(patch.object(Accelerator, "reduce", reduce))
        stack.enter_context(patch.object(script, "end_run", lambda *args, **options: None))
        try:
            script.main(*parsed)
        finally:
            forbid(False)
    return len(steps)
