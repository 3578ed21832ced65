"""Attention kernels, compilation and activation checkpointing of networks, and what holds their adapters back."""

import os

import torch


def set_up_device(args, accelerator) -> torch.dtype:
    """Threads, seed and TF32. Returns the precision of frozen networks."""
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise SystemExit("--mixed_precision fp16: needs a GPU; a CPU takes no or bf16")
    if args.toy and accelerator.device.type == "cpu":  # accelerate launch leaves a process one thread
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // accelerator.num_processes))
    torch.manual_seed(args.seed)
    torch.backends.cuda.matmul.allow_tf32 = args.allow_tf32
    return {"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision, torch.float32)
