"""Beginning and end of a run, alike in all scripts: processes, checkpoints, and the files that a run leaves."""

import math
import os
import tempfile
from collections import Counter
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, InitProcessGroupKwargs, ProjectConfiguration, parse_flag_from_env

from common.checkpoint import find_checkpoint, save_checkpoint
from common.data.buckets import target_size
from common.data.stream import gather_states
from common.export import create_hub_repository, push_to_hub, write_model_card
from common.planning.meter import Meter
from common.tracking import tracker_names

# How long processes wait for each other, in place of NCCL's ten minutes: a clip of a large teacher, an export or an
# upload by the main process takes longer. Where one of them has died, accelerate's launcher ends the others at once.
PATIENCE = timedelta(hours=3)
MOST_READERS = 8  # reader processes of a training process
# Pictures that the VAE encodes at a time; SDXL's takes 2.7 GB for each of 1024x1024 in fp32
MOST_ENCODED, PIXELS_ENCODED = 32, 2 * 1024**2


def available_cores() -> int:
    """Cores that this process may use; macOS knows all of the machine alone."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def machine_defaults(args, data, decodes: bool = True) -> tuple[dict, list[str]]:
    """Reader processes and pictures that the VAE encodes at a time, by flag, where no flag gives them; and notes.

    `decodes` says that training reads pictures or clips, not captions alone.
    """
    processes, cores = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), available_cores()
    on_gpu = torch.cuda.is_available() and not parse_flag_from_env("ACCELERATE_USE_CPU")
    free = cores // processes - 1 if on_gpu and decodes else 0
    # A power of two, as the order of samples is the same for 1, 2, 4 and 8 readers
    workers = min(MOST_READERS, 1 << free.bit_length() - 1) if free > 0 else 0
    pixels = max(math.prod(target_size(1, 1, dataset.rules)) for dataset in data.datasets)
    encoded, notes = min(MOST_ENCODED, max(1, PIXELS_ENCODED // pixels)), []
    if args.dataloader_num_workers is None and workers:
        notes.append(f"--dataloader_num_workers: {workers} by default, of {cores} cores for {processes} processes here")
    if args.vae_encode_batch_size is None and encoded < MOST_ENCODED:
        notes.append(f"--vae_encode_batch_size: {encoded} by default, of pictures of {pixels / 1e6:.2f} megapixels")
    return {"dataloader_num_workers": workers, "vae_encode_batch_size": encoded}, notes


def start_run(args, notes: list[str], splits: bool = False, **options) -> tuple[Accelerator, torch.dtype]:
    """Sets threads, seed and TF32, prints notes, and returns the Accelerator and the precision of frozen networks.

    `splits` says that the script can split networks by FSDP. `options` are further arguments of the Accelerator.
    """
    check_launch(splits)
    accelerator = Accelerator(
        cpu=Meter.running is not None,  # --plan needs no GPU
        mixed_precision=args.mixed_precision,
        dynamo_backend="no",  # --compile has its job
        log_with=tracker_names(args.report_to) or None,
        project_config=ProjectConfiguration(args.output_dir, str(Path(args.output_dir, args.logging_dir))),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)],
        **options,
    )
    for note in [*notes, *check_machine(args, accelerator)]:
        accelerator.print(note)
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise SystemExit("--mixed_precision fp16: needs a GPU; a CPU takes no or bf16")
    if args.pretrained_teacher_model is None and accelerator.device.type == "cpu":
        # accelerate launch gives each process one thread; a run of the toy may take the machine
        torch.set_num_threads(max(1, available_cores() // accelerator.num_processes))
    torch.manual_seed(args.seed)
    torch.backends.cuda.matmul.allow_tf32 = args.allow_tf32
    return accelerator, {"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision, torch.float32)


def check_launch(splits: bool):
    """Ends a run for which accelerate's config asks what the script cannot, before accelerate prepares it."""
    refused = {"DEEPSPEED": "DeepSpeed", "MEGATRON_LM": "Megatron-LM"} | ({} if splits else {"FSDP": "FSDP"})
    for name, what in refused.items():
        if parse_flag_from_env(f"ACCELERATE_USE_{name}"):
            instead = "distributed_type MULTI_GPU" + " or FSDP" * splits
            raise SystemExit(f"accelerate's config has {what}: not supported by this script, use {instead}")


def check_machine(args, accelerator) -> list[str]:
    """Ends a run on a machine where it cannot work, and returns notes on one where nobody has tried it."""
    kind = accelerator.device.type
    if accelerator.distributed_type == DistributedType.XLA:
        raise SystemExit("accelerate's config has a TPU: not supported, use CUDA GPUs or a CPU")
    if kind == "mps" and args.base_model_precision != "no_change":
        raise SystemExit(f"--base_model_precision {args.base_model_precision}: not supported on Apple's MPS")
    if kind == "cuda" and torch.version.hip:
        return ["ROCm: works as CUDA where PyTorch makes it so; nobody has tried these scripts on it"]
    if kind == "mps":
        return ["Apple's MPS: nobody has tried these scripts on it; --mixed_precision no is the safest"]
    return [] if kind in ("cuda", "cpu") else [f"{kind}: nobody has tried these scripts on such a device"]


def teacher_missing(args, error: Exception) -> SystemExit:
    """What ends a run whose teacher's first file is not there; the hub's own words are many lines."""
    reason = str(error).strip().splitlines()[0]
    return SystemExit(f"--pretrained_teacher_model {args.pretrained_teacher_model}: cannot be loaded ({reason})")


def open_repository(args, accelerator) -> str | None:
    """Creates the repository of --push_to_hub, in the main process, so that a wrong token ends the run at its start."""
    return create_hub_repository(args) if args.push_to_hub and accelerator.is_main_process else None


class Saver:
    """Writer of checkpoints. Every process must call it, since each knows its own place in the data alone."""

    def __init__(self, args, accelerator, networks, optimizers, lr_schedule, encoder, batches, skipped, sharing=1):
        self.args, self.accelerator, self.sharing = args, accelerator, sharing
        self.networks, self.optimizers, self.lr_schedule = networks, optimizers, lr_schedule
        self.encoder, self.batches, self.skipped_before = encoder, batches, Counter(skipped)

    def place_in_data(self) -> tuple[dict, Counter]:
        """Place of all processes in the data, and the number of samples that were skipped, by cause."""
        stream, faults = gather_states(self.batches, self.accelerator, self.sharing)
        return stream, self.skipped_before + faults

    def save(self, step: int, **more) -> Path:
        """Writes a checkpoint and returns its folder; `more` is further state, of JSON's types."""
        args, accelerator = self.args, self.accelerator
        self.encoder.flush()
        stream, skipped = self.place_in_data()
        state = {"stream": stream, "skipped": skipped, "lr_schedule": self.lr_schedule.state_dict(), **more}
        state["scaler"] = accelerator.scaler.state_dict() if accelerator.scaler is not None else None
        folder = save_checkpoint(
            args.output_dir, step, self.networks, self.optimizers, state, args.checkpoints_total_limit,
            accelerator.is_main_process,
        )  # fmt: skip
        accelerator.wait_for_everyone()
        return folder


def check_finite(args, step: int, **values: float):
    """Ends a run with a loss or gradient that is not finite, before a checkpoint is made of it."""
    if broken := [name for name, value in values.items() if not math.isfinite(value)]:
        last = find_checkpoint(args.output_dir, "latest")
        raise SystemExit(f"the {broken[0]} is not finite at step {step}; the last good checkpoint is {last}")


def end_run(
    args, saver: Saver, tracking, repository, *, step: int, trained: bool, stop_signal, stopped: bool, validate, export,
    report, method: str, teacher: str, **state,
):  # fmt: skip
    """Ends a run: saves a checkpoint, and where training is complete exports, validates and reports.

    All processes call export() -> names of files and lines of code, validate() -> a sheet of pictures, and
    report(folder) -> Markdown; the main one alone keeps what comes of it. `teacher` is the teacher's name or folder,
    `state` further state of the checkpoint.
    """
    accelerator, output_dir = saver.accelerator, Path(args.output_dir)
    say = accelerator.print
    if not trained and Path(output_dir, f"checkpoint-{step}", "state.json").exists():
        say(f"checkpoint-{step} is already there")
    else:
        say(f"saved {saver.save(step, **state)}")
    stop_signal.over()
    for cause, count in saver.place_in_data()[1].most_common():
        say(f"skipped {count} x {cause}")
    if stopped:
        say("stopped by a signal; go on with --resume_from_checkpoint latest")
    else:
        exported = export()  # first, since pictures take long and their prompts may be at fault
        with tempfile.TemporaryDirectory() as nowhere:
            sheet, results = validate(), report(output_dir if accelerator.is_main_process else Path(nowhere))
        if accelerator.is_main_process:
            files, usage = exported
            say(results)
            sheet.save(output_dir / "samples.png")
            title, tags = f"{method.upper()} of {Path(teacher).name}", [method, args.model_type]
            write_model_card(args, teacher=teacher, title=title, tags=tags, usage=usage, results=results)
            if repository:
                about = ["README.md", "samples.png", "report.*", "side_by_side.*"]
                push_to_hub(args, repository, [*about, *files], "Distilled model")
            say(f"\nThe model is in {output_dir}:\n\n{usage}")
    accelerator.wait_for_everyone()
    tracking.end(step, stopped)
