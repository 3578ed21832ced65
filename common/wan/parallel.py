"""Networks that several processes split between them: their weights, gradients and moments (FSDP), or a clip's tokens.

FSDP is torch's fully_shard, switched on by accelerate's --use_fsdp; accelerator.prepare() is not used, since it takes a
single network with its optimizer and splits nothing on a CPU. A block's weights are gathered when its turn comes. Of a
LoRA the frozen base is split; its adapters, which are added to the split base, are whole in each process.

Tokens are split by diffusers' context parallelism (Ulysses, Jacobs et al. 2023, arXiv 2309.14509): a process has a part
of the sequence, and in self-attention all of the sequence in a part of the heads. The processes' gradients add up.
"""

import functools
import warnings

import torch
from accelerate import init_empty_weights
from accelerate.utils import broadcast_object_list, parse_flag_from_env
from diffusers import ContextParallelConfig, ParallelConfig
from diffusers.hooks.context_parallel import apply_context_parallel
from torch.distributed._functional_collectives import all_to_all_single_autograd
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.distributed_c10d import _set_pg_timeout
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from common.networks import modules_of
from common.optim import optimizer_name
from common.planning.meter import Meter


def wants_fsdp(accelerator) -> bool:
    """Whether accelerate was told --use_fsdp, and there are processes to split weights between."""
    return accelerator.num_processes > 1 and parse_flag_from_env("ACCELERATE_USE_FSDP")


def check_processes(args, accelerator) -> int:
    """Checks the flags against the number of processes. Returns how many processes work on the same samples."""
    fsdp, sharing = wants_fsdp(accelerator), args.context_parallel_degree
    if fsdp and args.base_model_precision != "no_change":
        raise SystemExit(
            f"accelerate's --use_fsdp and --base_model_precision {args.base_model_precision}: one or the other"
        )
    if fsdp and args.model_type == "full" and (args.ema_device == "cpu" or optimizer_name(args) == "adamw8bit"):
        raise SystemExit(
            "accelerate's --use_fsdp: goes with --model_type lora, or with --ema_device accelerator and no 8-bit AdamW"
        )
    if accelerator.num_processes % sharing or fsdp and sharing > 1:
        raise SystemExit(
            f"--context_parallel_degree {sharing}: must divide {accelerator.num_processes} processes, and goes without "
            "FSDP"
        )
    return sharing


def shard(network: torch.nn.Module, blocks: tuple[str, ...], accelerator, dtype: torch.dtype):
    """Splits a network in place; its `blocks`, names of classes, are gathered one at a time.

    Of fp32 weights, those of the blocks' Linear layers are gathered in `dtype`, to which autocast would bring them,
    layer by layer; all others, as of norms, as they are stored. The processes' gradients are added up in fp32;
    those of several forwards before one backward() are first added up in `dtype`, in each process.
    """
    # Of results, which nothing here changes in place; and of calls of torch itself, as parts are read and written
    warnings.filterwarnings("ignore", message=".*returned a view tensor")
    warnings.filterwarnings("ignore", message="`_get_pg_default_device` will be deprecated")
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    # Also the network itself is split again after a forward, since validation then changes its weights
    split = functools.partial(fully_shard, mesh=mesh, reshard_after_forward=True)
    for block in modules_of(network, blocks):
        if dtype != torch.float32:
            for layer in (module for module in block.modules() if isinstance(module, torch.nn.Linear)):
                split(layer, mp_policy=policy)
        split(block)
    split(network)


def load_split(load, blocks: tuple[str, ...], accelerator, dtype: torch.dtype) -> torch.nn.Module:
    """The frozen network that load() reads, split between the processes, and gathered in `dtype` where it is in fp32.

    The main process alone reads it, into the machine's memory; others build it without weights, and each gets its part
    of one weight after another. What is drawn next, as adapters are, is alike in all, and as without splitting.
    """
    if Meter.running:  # a plan reads nothing and sends nothing
        network = load()
        shard(network, blocks, accelerator, dtype if network.dtype == torch.float32 else torch.float32)
        return network
    whole, made_of = None, None
    if accelerator.is_main_process:
        whole = load()
        made_of = type(whole), dict(whole.config), whole.dtype, torch.get_rng_state()
    network_class, config, stored, rng_state = broadcast_object_list([made_of])[0]
    with init_empty_weights(include_buffers=False):
        network = network_class.from_config(config).requires_grad_(False).eval()
    shard(network, blocks, accelerator, dtype if stored == torch.float32 else torch.float32)
    torch.set_rng_state(rng_state)
    weights = whole.state_dict() if accelerator.is_main_process else {}
    set_model_state_dict(network, weights, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True))
    return network


def gathered(network: torch.nn.Module) -> torch.nn.Module | None:
    """A network itself, or of a split one a copy on the CPU: in the main process alone, though all must call it."""
    if not isinstance(network, FSDPModule):
        return network
    weights = get_model_state_dict(network, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if not weights:
        return None
    unsplit_class = next(base for base in type(network).__bases__ if base is not FSDPModule)
    with torch.device("meta"):
        copy = unsplit_class.from_config(network.config)
    copy.load_state_dict(weights, assign=True)
    return copy


def share_tokens(network: torch.nn.Module, degree: int, accelerator, splits_angles: bool):
    """Makes `degree` processes next to each other share each clip's tokens; all other inputs must be the same in them.

    The steps are those of enable_parallelism(), which divides by the number of GPUs and so fails on a CPU. A causal
    network splits its rotary angles itself (`splits_angles` False), after those of earlier frames are cut off.
    """
    if network.config.num_attention_heads % degree:
        raise SystemExit(f"--context_parallel_degree {degree}: must divide {network.config.num_attention_heads} heads")
    shape = accelerator.num_processes // degree, 1, degree
    mesh = init_device_mesh(accelerator.device.type, shape, mesh_dim_names=("data", "ring", "ulysses"))
    config = ParallelConfig(context_parallel_config=ContextParallelConfig(ulysses_degree=degree, mesh=mesh))
    config.setup(accelerator.process_index, accelerator.num_processes, accelerator.device, mesh=mesh)
    for shared in (mesh, config.context_parallel_config._flattened_mesh):
        for group in shared.get_all_groups():  # torch gives them ten minutes, whatever all processes together have
            _set_pg_timeout(accelerator.init_handler.timeout, group)
    network._parallel_config = config
    for block in network.blocks:
        block.attn1.processor._parallel_config = config
    places = {"blocks.0", "proj_out"} | ({"rope"} if splits_angles else set())
    plan = {place: split for place, split in network._cp_plan.items() if place in places}
    apply_context_parallel(network, config.context_parallel_config, plan)


def token_group(owner):
    """Group of processes that share tokens, by a network or attention processor; None where nothing is shared."""
    config = owner._parallel_config
    return None if config is None else config.context_parallel_config._ulysses_mesh.get_group()


def own_tokens(x: torch.Tensor, network) -> torch.Tensor:
    """This process's part of the tokens: [B, L, ...] -> [B, L / processes, ...]"""
    group = token_group(network)
    return x if group is None else x.chunk(group.size(), 1)[group.rank()]


def tokens_to_heads(x: torch.Tensor, group) -> torch.Tensor:
    """Exchanges tokens for heads: [B, L / processes, heads, D] -> [B, L, heads / processes, D]"""
    if group is None:
        return x
    # [n, B, L / n, heads / n, D]: row i has heads of process i
    x = x.unflatten(2, (group.size(), -1)).permute(2, 0, 1, 3, 4)
    return exchanged(x, group).permute(1, 0, 2, 3, 4).flatten(1, 2)


def heads_to_tokens(x: torch.Tensor, group) -> torch.Tensor:
    """Exchanges heads for tokens: [B, L, heads / processes, D] -> [B, L / processes, heads, D]"""
    if group is None:
        return x
    # [n, B, L / n, heads / n, D]: row i has tokens of process i
    x = x.unflatten(1, (group.size(), -1)).permute(1, 0, 2, 3, 4)
    return exchanged(x, group).permute(1, 2, 0, 3, 4).flatten(2, 3)


def exchanged(x: torch.Tensor, group) -> torch.Tensor:
    """Sends row i to process i, and returns the rows received, row i from process i."""
    return all_to_all_single_autograd(x.contiguous().flatten(), None, None, group).view(x.shape)
