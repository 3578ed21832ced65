"""Frozen networks in 8 bits, by torchao: weights of Linear layers, one scale a row; activations stay as they are."""

import importlib.util
import logging
import warnings

import torch

PRECISIONS = ("no_change", "int8-quanto", "int8-torchao", "fp8-torchao")


def check_precision(parser, args) -> list[str]:
    """Rules of the precision flags; returns what is to be said about them."""
    names = ("base_model_precision", "text_encoder_1_precision", "text_encoder_2_precision")
    wanted = {name: getattr(args, name) for name in names if getattr(args, name) != "no_change"}
    if wanted and importlib.util.find_spec("torchao") is None:
        name, precision = next(iter(wanted.items()))
        parser.error(f"--{name} {precision}: needs torchao, which is not installed: pip install torchao==0.18.0")
    aliased = [f"--{name} int8-quanto: an alias, int8-torchao is in use" for name in wanted if "quanto" in wanted[name]]
    for name in wanted:
        setattr(args, name, wanted[name].replace("quanto", "torchao"))
    return aliased


def quantize(network: torch.nn.Module, precision: str, where) -> torch.nn.Module:
    """In place, on the device `where`. Convolutions, norms and embeddings keep their precision."""
    if precision == "no_change":
        return network
    # Of kernels for GPUs that are not here, and that peft could not merge adapters, which nothing here does
    logging.getLogger("torchao").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*get_apply_tensor_subclass.*")
    from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, quantize_

    config = {"int8-torchao": Int8WeightOnlyConfig, "fp8-torchao": Float8WeightOnlyConfig}[precision]
    network.to(where)
    quantize_(network, config(set_inductor_config=False))  # torch.compile's settings are the user's
    return network
