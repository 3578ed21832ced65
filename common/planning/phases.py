"""--plan: what a run takes, measured on its own set-up and steps, which run on fake tensors."""

import contextlib
import functools
import gc
import io
import math
import os
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from accelerate.state import AcceleratorState, GradientState

from common.data.datasets import Data
from common.data.samples import Sample
from common.flags import Flags
from common.optim import optimizer_name
from common.planning.meter import GRADIENTS, HOST, Meter, as_on_cuda, fake_tensors_suffice

GB = 1e9
RESERVE = 1.0 * GB  # CUDA's own: context, workspaces, gaps between tensors
GPUS = {"H100": 989e12, "A100": 312e12, "RTX 4090": 165e12}  # operations a second in bf16, dense
MOST_PASSES = 2  # of an optimizer step: the second has the first one's gradients in memory, as all later ones
LONG_PROMPT = "a word " * 1024
# Flags that have no job in a plan, or none that fake tensors could do
UNPLANNED = {
    "report_to": "none", "webhook_config": None, "push_to_hub": False, "push_checkpoints_to_hub": False,
    "eval_steps": 0, "evaluation_type": "none", "validation_preview": False, "resume_from_checkpoint": None,
    "compile": False, "attention_mechanism": "diffusers", "attention_without_gradient": None, "export_pipeline": False,
    "enable_xformers_memory_efficient_attention": False, "last_step_only": True, "causal_init_trajectories": 0,
}  # fmt: skip


@dataclass(frozen=True)
class Phase:
    """A part of a run: its most bytes at a time by what they are, and its operations by kind."""

    name: str
    bytes: Counter
    operations: Counter
    trains: bool = False

    @property
    def total(self) -> int:
        return sum(size for kind, size in self.bytes.items() if kind != HOST)


def planned(main):
    """A script's `main(args, data, ..., notes)`, which with --plan prints what it would take and trains nothing."""

    @functools.wraps(main)
    def planning(args, *rest):
        return main(args, *rest) if args.plan is None else print_plan(main, args, rest)

    return planning


def print_plan(main, args, rest):
    if int(os.environ.get("RANK", 0)):
        return  # the main process speaks for all
    room = args.plan * GB or None
    if room is None and torch.cuda.is_available():
        room = torch.cuda.get_device_properties(0).total_memory
    started, phases = time.time(), measure(main, args, rest)
    print(table(phases))
    print(*operations(args, phases), sep="\n")
    most = max(phase.total for phase in phases) + RESERVE
    seconds = time.time() - started
    print(f"\nat the most {most / GB:.1f} GB, {RESERVE / GB:.0f} of them CUDA's own; planned in {seconds:.0f} s")
    if room is not None and most <= room:
        print(f"fits into {room / GB:.0f} GB")
    elif room is not None:
        print(f"does not fit into {room / GB:.0f} GB; with these flags, each on top of those before:")
        for line in advice(main, args, rest, phases, room):
            print(line, flush=True)


def measure(main, args, rest, cuda: bool = True) -> list[Phase]:
    """Phases of a run, by its own main. Without `cuda` they are those of a CPU, whose autocast has rules of its own."""
    precision = args.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    flags = vars(args) | UNPLANNED | {"mixed_precision": precision.replace("fp16", "bf16")}  # of the same size
    flags["gradient_accumulation_steps"] = min(args.gradient_accumulation_steps, MOST_PASSES)
    forget_accelerate()
    with contextlib.ExitStack() as stack:
        stack.enter_context(other_processes())
        flags["output_dir"] = stack.enter_context(tempfile.TemporaryDirectory())
        stack.enter_context(warnings.catch_warnings(action="ignore"))
        stack.enter_context(torch.compiler.set_stance("force_eager"))  # the step of 8-bit optimizers
        stack.enter_context(fake_tensors_suffice())
        if cuda:
            stack.enter_context(as_on_cuda())
        Meter.running = stack.enter_context(Meter())
        try:
            return main(Flags(**flags), *rest)
        finally:
            Meter.running = None
            forget_accelerate()


@contextlib.contextmanager
def other_processes():
    """Inside, the main process has the others that accelerate has launched, which send nothing."""
    if (count := int(os.environ.get("WORLD_SIZE", 1))) == 1:
        yield
        return
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=count)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def forget_accelerate():
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def run_phases(
    data: Data, encoder, optimizers: dict, weights: dict[str, Iterable], samples, train: dict[str, Callable],
    show: Callable, export: Callable,
) -> list[Phase]:  # fmt: skip
    """Measures the phases of a run whose set-up is done.

    `weights` are tensors by network, of which the later ones win where they are the same. `train` are optimizer steps
    by name, show() generates as validation does, export() writes the student.
    """
    meter, phases = Meter.running, []
    for name, tensors in weights.items():
        meter.name(name, tensors)

    def measured(name: str, run: Callable, *arguments):
        gc.collect()
        meter.start()
        run(*arguments)
        phases.append(Phase(name, meter.at_peak, meter.operations, name in train))

    if data.caches == "fill":
        measured("filling the caches", fill, encoder, samples)
    for optimizer in optimizers.values():  # whose moments are there from the second step on
        for p in (p for group in optimizer.param_groups for p in group["params"]):
            p.grad = torch.empty_like(p)
            p.register_post_accumulate_grad_hook(lambda p: meter.name(GRADIENTS, [p.grad]))
        optimizer.step()
        optimizer.zero_grad()
        moments = [value for state in optimizer.state.values() for value in state.values()]
        meter.name("moments", [value for value in moments if isinstance(value, torch.Tensor)])
    for name, step in train.items():
        measured(name, step)
    measured("validation", show)
    if not data.trains_with_encoders:
        encoder.release()
    measured("export", export)
    return phases


def weights_of(network: torch.nn.Module) -> list[torch.Tensor]:
    return [*network.parameters(), *network.buffers()]


def fill(encoder, samples: list[Sample]):
    """Encodes what training needs of these samples, as for caches that are filled before it."""
    for sample in samples:
        encoder.encode_soon(sample)
    encoder.encode_waiting()
    encoder.release()


def largest_samples(args, sizes, pixels: bool = True) -> list[Sample]:
    """Samples of the largest of these sizes, as many as a batch has, or with `pixels` as are encoded at a time."""
    height, width = (size := max(sizes, key=math.prod))[-2:]
    with Meter.running.weights(HOST):
        shown = torch.empty(3, *size, dtype=torch.uint8) if pixels else None
    captions = [f"{i} {LONG_PROMPT}" for i in range(max(args.train_batch_size, args.vae_encode_batch_size * pixels))]
    return [
        Sample(caption, [caption], caption, None if pixels else {}, shown, (height, width, 0, 0, *size), position=i)
        for i, caption in enumerate(captions)
    ]


# ---------------------------------------------------------------------------------------------------------------------
# What is printed
# ---------------------------------------------------------------------------------------------------------------------


def table(phases: list[Phase]) -> str:
    """Gigabytes by kind, a column for each phase."""
    kinds = [kind for kind in dict.fromkeys(kind for phase in phases for kind in phase.bytes) if kind != HOST]
    kinds = [kind for kind in kinds if any(phase.bytes[kind] for phase in phases)]
    lines = [f"{'GB on each GPU':36}" + "".join(f"{phase.name:>20}" for phase in phases)]
    for kind in [*kinds, "together"]:
        sizes = [phase.total if kind == "together" else phase.bytes[kind] for phase in phases]
        lines.append(f"{kind:36}" + "".join(f"{size / GB:20.3f}" for size in sizes))
    return "\n".join(lines)


def operations(args, phases: list[Phase]) -> list[str]:
    """Operations of an optimizer step, and the time that they take at the least."""
    lines, passes = [], args.gradient_accumulation_steps
    samples = args.train_batch_size * passes
    for phase in (phase for phase in phases if phase.trains):
        of = {kind: count * passes / min(passes, MOST_PASSES) for kind, count in phase.operations.items()}
        parts = ", ".join(f"{count / 1e12:.4g} of {kind}" for kind, count in of.items())
        total = sum(of.values())
        lines.append(
            f"\n{phase.name}: {total / 1e12:.4g} TFLOP ({parts}) for a step of {samples} samples; at best, in bf16:"
        )
        lines += [
            f"  {name:10}{total / most:10.3g} s{samples * most / total:10.3g} samples/s" for name, most in GPUS.items()
        ]
    return lines


def encodes(args, phase: str) -> bool:
    return phase == "filling the caches"


# Flags that save memory: a flag and its value, and whether it may help a run whose largest phase is this one
REMEDIES: list[tuple[str, object, Callable]] = [
    ("vae_encode_batch_size", 1, encodes),
    ("text_encoder_1_precision", "int8-torchao", encodes),
    ("gradient_checkpointing", True, lambda args, phase: not encodes(args, phase)),
    ("offload_activations", True, lambda args, phase: args.gradient_checkpointing and not encodes(args, phase)),
    ("checkpoint_attention", True, lambda args, phase: args.gradient_checkpointing and not encodes(args, phase)),
    ("ema_device", "cpu", lambda args, phase: getattr(args, "use_ema", False)),
    ("optimizer", "adamw8bit", lambda args, phase: optimizer_name(args) != "adamw8bit"),
    ("train_batch_size", 1, lambda args, phase: True),
    ("base_model_precision", "int8-torchao", lambda args, phase: args.base_model_precision == "no_change"),
    ("lora_rank", 32, lambda args, phase: (args.lora_rank or 0) > 32),
]


def advice(main, args, rest, phases: list[Phase], room: float):
    """A line for each flag that saves memory, each on top of those before, until the run fits."""
    for flag, value, helps in REMEDIES:
        largest = max(phases, key=lambda phase: phase.total)
        if getattr(args, flag, value) == value or not helps(args, largest.name):
            continue
        changed = Flags(**vars(args) | {flag: value})
        with contextlib.redirect_stdout(io.StringIO()):
            less = measure(main, changed, rest)
        now = max(phase.total for phase in less)
        if now < largest.total:
            args, phases = changed, less
            given = f"--{flag}" if value is True else f"--{flag} {value}"
            yield f"  {given:42}{(now + RESERVE) / GB:8.1f}"
            if now + RESERVE <= room:
                return
    yield "  and still not: lower --resolution, --model_type lora, more GPUs, or a larger one"
