"""What several processes split between them: weights, gradients and moments (FSDP), or the tokens of a clip.

FSDP is torch's fully_shard, where accelerate is told --use_fsdp: accelerator.prepare() takes a single network,
with its optimizer, and splits nothing on a CPU. Each block's weights are gathered when the block is due.

Tokens are split as diffusers' context parallelism has it (Ulysses, Jacobs et al. 2023, arXiv 2309.14509): a process has
its part of the sequence, and in self-attention its part of the heads, of all tokens. Gradients are then parts of a sum.
"""

import torch
from accelerate.utils import parse_flag_from_env
from diffusers import ContextParallelConfig, ParallelConfig
from diffusers.hooks.context_parallel import apply_context_parallel
from torch.distributed._functional_collectives import all_to_all_single_autograd
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard


def wants_fsdp(accelerator) -> bool:
    return accelerator.num_processes > 1 and parse_flag_from_env("ACCELERATE_USE_FSDP")


def check_processes(args, accelerator) -> int:
    """Checks what flags and processes allow. Returns how many processes work on the same samples."""
    fsdp, sharing = wants_fsdp(accelerator), args.context_parallel_degree
    if fsdp and (args.model_type == "lora" or args.ema_device == "cpu" or args.base_model_precision != "no_change"):
        raise SystemExit("accelerate's --use_fsdp: goes with --model_type full, --ema_device accelerator and no 8 bits")
    if accelerator.num_processes % sharing or fsdp and sharing > 1:
        raise SystemExit(
            f"--context_parallel_degree {sharing}: must divide {accelerator.num_processes} processes, and goes without "
            "FSDP"
        )
    return sharing


def shard(network: torch.nn.Module, blocks: tuple[str, ...], accelerator):
    """Splits a network in place; blocks, named by their classes, are gathered one at a time.

    Weights are gathered as they are stored, so that autocast sees what it would see in one process.
    """
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    for module in [*(module for module in network.modules() if type(module).__name__ in blocks), network]:
        # Also of the network itself: validation puts other weights into it between two forwards
        fully_shard(module, mesh=mesh, reshard_after_forward=True)


def gathered(network: torch.nn.Module) -> torch.nn.Module | None:
    """A network as it is, or of one that is split a copy on the CPU, in the main process alone. All must call it."""
    if not isinstance(network, FSDPModule):
        return network
    weights = get_model_state_dict(network, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if not weights:
        return None
    kind = next(base for base in type(network).__bases__ if base is not FSDPModule)  # the class before it was split
    with torch.device("meta"):
        copy = kind.from_config(network.config)
    copy.load_state_dict(weights, assign=True)
    return copy


def share_tokens(network: torch.nn.Module, degree: int, accelerator, splits_angles: bool):
    """So many processes next to each other share each clip's tokens. What else the network is told, all are told.

    The steps of enable_parallelism(), which itself divides by the number of accelerators and so needs one. A causal
    network splits its rotary angles itself, when it has cut those of earlier frames off.
    """
    if network.config.num_attention_heads % degree:
        raise SystemExit(f"--context_parallel_degree {degree}: must divide {network.config.num_attention_heads} heads")
    shape = accelerator.num_processes // degree, 1, degree
    mesh = init_device_mesh(accelerator.device.type, shape, mesh_dim_names=("data", "ring", "ulysses"))
    config = ParallelConfig(context_parallel_config=ContextParallelConfig(ulysses_degree=degree, mesh=mesh))
    config.setup(accelerator.process_index, accelerator.num_processes, accelerator.device, mesh=mesh)
    network._parallel_config = config
    for block in network.blocks:
        block.attn1.processor._parallel_config = config
    places = {"blocks.0", "proj_out"} | ({"rope"} if splits_angles else set())
    plan = {place: what for place, what in network._cp_plan.items() if place in places}
    apply_context_parallel(network, config.context_parallel_config, plan)


def token_group(owner):
    """Processes that share tokens with this one, as its network or attention processor was told; None for none."""
    config = owner._parallel_config
    return None if config is None else config.context_parallel_config._ulysses_mesh.get_group()


def own_tokens(x: torch.Tensor, network) -> torch.Tensor:
    """[B, L, ...] -> [B, L / processes, ...]"""
    group = token_group(network)
    return x if group is None else x.chunk(group.size(), 1)[group.rank()]


def tokens_to_heads(x: torch.Tensor, group) -> torch.Tensor:
    """[B, L / processes, heads, D] -> [B, L, heads / processes, D]"""
    if group is None:
        return x
    x = x.unflatten(2, (group.size(), -1)).permute(2, 0, 1, 3, 4)  # of each process its heads, in front
    return exchanged(x, group).permute(1, 0, 2, 3, 4).flatten(1, 2)


def heads_to_tokens(x: torch.Tensor, group) -> torch.Tensor:
    """And back."""
    if group is None:
        return x
    x = x.unflatten(1, (group.size(), -1)).permute(1, 0, 2, 3, 4)  # of each process its tokens, in front
    return exchanged(x, group).permute(1, 2, 0, 3, 4).flatten(2, 3)


def exchanged(x: torch.Tensor, group) -> torch.Tensor:
    """Row i goes to process i, and row i comes from there."""
    return all_to_all_single_autograd(x.contiguous().flatten(), None, None, group).view(x.shape)
