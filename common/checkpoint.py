"""Checkpoints, each of which is complete or does not exist, and the signals that ask for one."""

import itertools
import json
import os
import shutil
import signal
import tempfile
import warnings
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.distributed import checkpoint as distributed_checkpoint
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor

MOMENTS = "state."  # begins the names of moments beside those of weights
SETTINGS = "optimizer.json"
FILE_BYTES = 2**32  # of all processes' parts in files of one number


def options(trained_only: bool) -> StateDictOptions:
    """Options for unsharded states on the CPU: gathered in the main process, and loaded from there in each."""
    return StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=trained_only, strict=False)


def save_checkpoint(output_dir, step: int, networks: dict, optimizers: dict, state: dict, total_limit=None, main=True):
    """Writes OUTPUT_DIR/checkpoint-STEP. Every process must call it: of split networks each writes its part.

    Of a network with an optimizer of the same name only the trained weights are saved. `state` must be JSON.
    """
    folder = Path(output_dir, f"checkpoint-{step}")
    part = folder.with_suffix(".part")
    if main:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
    if any(is_split(network) for network in networks.values()):
        torch.distributed.barrier()  # others make folders in it
    for name, network in networks.items():
        if is_split(network):
            write_parts(part / name, network, optimizers.get(name), main)
        elif main:
            weights = get_model_state_dict(network, options=options(name in optimizers))
            save_file({key: value.contiguous() for key, value in weights.items()}, part / f"{name}.safetensors")
            if name in optimizers:
                moments = get_optimizer_state_dict(network, optimizers[name], options=options(True))
                torch.save(moments, part / f"{name}.optimizer.pt")
    if main:
        (part / "state.json").write_text(json.dumps(state | {"step": step}))
        for path in [*part.rglob("*"), part]:
            flush_to_disk(path)
        if folder.exists() and not (folder / "state.json").exists():  # another program's: renamed, not deleted
            folder.rename(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=output_dir))
        shutil.rmtree(folder, ignore_errors=True)
        part.rename(folder)
        flush_to_disk(folder.parent)
        # Old ones go only now that the new one is complete; those of later steps belong to another run in this folder
        up_to_this = [path for path in list_checkpoints(output_dir) if step_of(path) <= step]
        for old in up_to_this[: -total_limit if total_limit else 0]:
            shutil.rmtree(old)
    return folder


def is_split(network: torch.nn.Module) -> bool:
    """Whether processes have parts of the weights (FSDP)."""
    return any(isinstance(p, DTensor) for p in network.parameters())


def part_options(optimizer) -> StateDictOptions:
    """Options for states of which each process has its part; of a network with an optimizer what is trained."""
    trained_only = optimizer is not None
    return StateDictOptions(ignore_frozen_params=trained_only, flatten_optimizer_state_dict=True, strict=False)


def parts_of(network, optimizer) -> tuple[dict[str, torch.Tensor], dict]:
    """This process's parts of weights and moments, by name, and the optimizer's settings."""
    tensors, settings = get_model_state_dict(network, options=part_options(optimizer)), {}
    if optimizer is not None:
        for key, value in get_optimizer_state_dict(network, optimizer, options=part_options(optimizer)).items():
            (tensors if key.startswith(MOMENTS) else settings)[key] = value
    return tensors, settings


def write_parts(folder: Path, network, optimizer, main: bool):
    """Writes a split network and its moments as safetensors, each process its part; any number can read them.

    The other format of such checkpoints has a pickle. A file is made in memory, and so there are several.
    """
    tensors, settings = parts_of(network, optimizer)
    ends = itertools.accumulate(value.nbytes for value in tensors.values())
    files = {key: 1 + end // FILE_BYTES for key, end in zip(tensors, ends, strict=True)}
    writer = HuggingFaceStorageWriter(str(folder), files, save_distributed=True)
    distributed_checkpoint.save(tensors, storage_writer=writer)
    if main:
        Path(folder, SETTINGS).write_text(json.dumps(settings))


def read_parts(folder: Path, network, optimizer):
    """Reads what write_parts has written, each process its part, or an unsplit network all of it."""
    tensors, _ = parts_of(network, optimizer)
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # a single process may read parts, too
    distributed_checkpoint.load(tensors, storage_reader=HuggingFaceStorageReader(str(folder)))
    weights = {key: value for key, value in tensors.items() if not key.startswith(MOMENTS)}
    set_model_state_dict(network, weights, options=part_options(optimizer))
    if optimizer is not None:
        moments = {key: value for key, value in tensors.items() if key.startswith(MOMENTS)}
        moments |= json.loads(Path(folder, SETTINGS).read_text())
        set_optimizer_state_dict(network, optimizer, moments, options=part_options(optimizer))


def stored_shapes(folder: Path, name: str) -> dict[str, torch.Size] | None:
    """Shapes of a network's weights in a checkpoint, by name; None where it has no such network."""
    file = folder / f"{name}.safetensors"
    if (folder / name).is_dir():
        found = HuggingFaceStorageReader(str(folder / name)).read_metadata().state_dict_metadata
        return {key: of.size for key, of in found.items() if not key.startswith(MOMENTS)}
    if not file.exists():
        return None
    with safe_open(file, "pt") as stored:  # whose shapes are in its head; weights are read once, afterwards
        return {key: torch.Size(stored.get_slice(key).get_shape()) for key in stored.keys()}  # noqa: SIM118


def flush_to_disk(path: Path):
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def list_checkpoints(output_dir) -> list[Path]:
    """Complete checkpoints, by step."""
    paths = [path for path in Path(output_dir).glob("checkpoint-*") if (path / "state.json").exists()]
    return sorted([path for path in paths if step_of(path) >= 0], key=step_of)


def step_of(checkpoint: Path) -> int:
    """Step of the folder checkpoint-STEP, or -1 where that is not its name."""
    number = checkpoint.name.removeprefix("checkpoint-")
    return int(number) if number.isdecimal() else -1


def find_checkpoint(output_dir, wanted: str) -> Path | None:
    """The checkpoint that a path or a name in the output folder means; of `latest` None where there is none yet."""
    if wanted == "latest":
        return next(reversed(list_checkpoints(output_dir)), None)
    for path in (Path(wanted), Path(output_dir, wanted)):
        if (path / "state.json").exists():
            return path
    raise SystemExit(f"--resume_from_checkpoint {wanted}: no whole checkpoint there, nor in {output_dir}")


def load_checkpoint(folder: Path, networks: dict, optimizers: dict) -> dict:
    """Loads weights and moments of a checkpoint, and returns its state. Weights that do not fit are fatal."""
    for name, network in networks.items():
        stored, optimizer = stored_shapes(folder, name), optimizers.get(name)
        if stored is None:
            raise SystemExit(f"--resume_from_checkpoint {folder}: has no {name}, it is of another kind of run")
        expected = get_model_state_dict(network, options=part_options(optimizer))  # every process checks
        unfit = stored.keys() ^ expected.keys() or {k for k in expected if expected[k].shape != stored[k]}
        if unfit:
            raise SystemExit(
                f"--resume_from_checkpoint {folder}: {len(unfit)} weights of the {name} do not fit this run, "
                f"the first is {min(unfit)}"
            )
        if (folder / name).is_dir():
            read_parts(folder / name, network, optimizer)
            continue
        weights = load_file(folder / f"{name}.safetensors")
        set_model_state_dict(network, weights, options=options(name in optimizers))
        if optimizer is not None:
            moments = torch.load(folder / f"{name}.optimizer.pt", weights_only=True, map_location="cpu")
            set_optimizer_state_dict(network, optimizer, moments, options=options(True))
    for optimizer in optimizers.values():
        for p, state in optimizer.state.items():  # a fused step needs weights and moments in the same layout
            for key, value in state.items():
                if value.shape == p.shape:
                    state[key] = torch.empty_like(p).copy_(value)
    return json.loads((folder / "state.json").read_text())


def resume(args, accelerator, networks: dict, optimizers: dict, lr_schedule) -> dict:
    """Loads the checkpoint that --resume_from_checkpoint names, and returns its state, or that of a new run."""
    wanted = args.resume_from_checkpoint
    folder = find_checkpoint(args.output_dir, wanted) if wanted else None
    if wanted and folder is None:
        accelerator.print(
            f"--resume_from_checkpoint {wanted}: no checkpoint in {args.output_dir} yet, starting at step 0"
        )
    if folder is None:
        return {"step": 0, "stream": None, "skipped": {}}
    state = load_checkpoint(folder, networks, optimizers)
    lr_schedule.load_state_dict(state["lr_schedule"])
    if accelerator.scaler is not None:
        accelerator.scaler.load_state_dict(state["scaler"])
    accelerator.print(f"resumed from {folder}")
    return state


class StopSignal:
    """Memory of a SIGTERM or a first Ctrl-C, so that the loop can end between steps. A second Ctrl-C ends at once."""

    def __init__(self):
        self.asked = False
        self.before = {number: signal.signal(number, self.ask) for number in (signal.SIGTERM, signal.SIGINT)}

    def ask(self, number, frame):
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = True

    def over(self):
        """Restores the handlers of before: from here on a signal ends the program at once."""
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def agreed(self, accelerator) -> bool:
        """Whether any process was asked to stop; waits for all of them, which must leave the loop at the same step."""
        if accelerator.num_processes == 1:
            return self.asked
        return bool(accelerator.reduce(torch.tensor(float(self.asked), device=accelerator.device)).item())
