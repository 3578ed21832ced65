"""Several networks in one: the base alone, or with one of its adapters."""

import contextlib

import torch
from peft.tuners.tuners_utils import BaseTunerLayer


def adapter_layers(network: torch.nn.Module) -> list[BaseTunerLayer]:
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
    """The weights of one adapter, as a module of their own: what a checkpoint holds of it."""
    mine = [(key.replace(".", "/"), p) for key, p in network.named_parameters() if name in key.split(".")]
    return torch.nn.ParameterDict(mine)  # of a list: it would sort a dict


def weights_copy(part: torch.nn.Module, device) -> torch.nn.ParameterDict:
    """Of what is trained in it: where a moving average starts."""
    trained = [(name.replace(".", "/"), p) for name, p in part.named_parameters() if p.requires_grad]
    copies = [(name, p.detach().to(device, copy=True)) for name, p in trained]
    return torch.nn.ParameterDict([(name, torch.nn.Parameter(p, requires_grad=False)) for name, p in copies])


@contextlib.contextmanager
def weights_exchanged(params: list[torch.nn.Parameter], others: list[torch.nn.Parameter]):
    """Inside, the parameters have the values of the others, and these theirs. In place, where FSDP looks for them."""
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
