"""Optimizers and learning rate schedules by name, clipping, and the moving average of weights."""

import importlib.util
import itertools
import math
from collections.abc import Iterator

import torch
from accelerate import PartialState
from torch.distributed.tensor import DTensor

from common.planning.meter import Meter

BUCKET = 2**26  # bytes of gradients that are averaged at a time


class Lion(torch.optim.Optimizer):
    """x -= lr * (sign(b1 m + (1 - b1) g) + decay x), then m = b2 m + (1 - b2) g (Chen et al. 2023)."""

    def __init__(self, params, lr, betas=(0.9, 0.99), weight_decay=0.0):
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                if p.grad is not None:
                    m = self.state[p].setdefault("exp_avg", torch.zeros_like(p))
                    p.mul_(1.0 - group["lr"] * group["weight_decay"])
                    p.add_(torch.lerp(p.grad, m, beta1).sign_(), alpha=-group["lr"])
                    m.lerp_(p.grad, 1.0 - beta2)


def optimizer_name(args) -> str:
    """adamw, adamw8bit or lion, from the flags. adamw_bf16 is adamw, as trained weights and moments are fp32."""
    return "adamw8bit" if args.use_8bit_adam else args.optimizer.removeprefix("optimi-").removesuffix("_bf16")


def optimizer_defaults(args) -> dict:
    """Betas and weight decay of the optimizer, by flag, where no flag gives them."""
    lion = optimizer_name(args) == "lion"
    return {"adam_beta1": 0.9, "adam_beta2": 0.99 if lion else 0.999, "adam_weight_decay": 0.0 if lion else 1e-2}


def betas_and_decay(args) -> tuple[tuple[float, float], float]:
    """Betas and weight decay; optimi-lion has its own, as in configs whose adam_* keys are meant for AdamW alone."""
    if args.optimizer == "optimi-lion":
        own = optimizer_defaults(args)
        return (own["adam_beta1"], own["adam_beta2"]), own["adam_weight_decay"]
    return (args.adam_beta1, args.adam_beta2), args.adam_weight_decay


def make_optimizer(
    name: str, params, lr: float, betas: tuple[float, float], weight_decay: float, epsilon: float, device: torch.device
) -> torch.optim.Optimizer:
    """An optimizer by the name that `optimizer_name` gives it."""
    if name == "lion":
        return Lion(params, lr, betas, weight_decay)
    if name == "adamw8bit":
        if device.type != "cuda" and not Meter.running:
            PartialState().print("8-bit AdamW needs a CUDA GPU: AdamW with fp32 moments is in use")
        elif importlib.util.find_spec("torchao"):
            from torchao.optim import AdamW8bit

            return AdamW8bit(params, lr, betas, epsilon, weight_decay)
        elif importlib.util.find_spec("bitsandbytes"):
            from bitsandbytes.optim import AdamW8bit

            return AdamW8bit(params, lr, betas, epsilon, weight_decay)
        else:
            raise SystemExit("8-bit AdamW: install torchao (or bitsandbytes), or use --optimizer adamw")
    return torch.optim.AdamW(params, lr, betas, epsilon, weight_decay, fused=True)


# Share of the way from the last rate up to the full one, where a share p of the decay's steps is done
DECAYS = {
    "constant": lambda p: 1.0,
    "constant_with_warmup": lambda p: 1.0,
    "linear": lambda p: 1.0 - p,
    "polynomial": lambda p: 1.0 - p,  # as diffusers' with power 1
    "cosine": lambda p: 0.5 + 0.5 * math.cos(math.pi * p),
    "cosine_with_min_lr": lambda p: 0.5 + 0.5 * math.cos(math.pi * p),
    "cosine_with_restarts": lambda p: 0.5 + 0.5 * math.cos(math.pi * p),  # as diffusers' with one cycle
    "sine": lambda p: 1.0 - math.sin(0.5 * math.pi * p),  # falls fast at first
}


def make_schedule(
    args, optimizer, steps: int, init_steps: int = 0, init_rate: float = 1.0
) -> torch.optim.lr_scheduler.LambdaLR:
    """A linear warm-up from 0, then one decay to --lr_end, in so many optimizer steps.

    The first `init_steps` of them have a warm-up and a decay of their own, at `init_rate` times the learning rate.
    """
    warmup = 0 if args.lr_scheduler == "constant" else args.lr_warmup_steps
    end = args.lr_end / optimizer.param_groups[0]["lr"]

    def factor(step: int) -> float:
        init = step < init_steps
        first, last, rate = (0, init_steps, init_rate) if init else (init_steps, steps, 1.0)
        step, length = step - first, last - first
        if step < warmup:
            return rate * step / warmup
        done = min(1.0, (step - warmup) / max(1, length - warmup))
        return rate * (end + (1.0 - end) * DECAYS[args.lr_scheduler](done))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def clip_gradients(accelerator, params, method: str, most: float):
    """Limits the L2 norm of all gradients to `most` (norm), or each of their elements to [-most, most] (value)."""
    if method == "norm":
        accelerator.clip_grad_norm_(params, most)
    else:
        accelerator.unscale_gradients()  # accelerate's clip_grad_value_ refuses FSDP, though it needs no other process
        torch.nn.utils.clip_grad_value_(params, most)


def gradient_norm(params) -> torch.Tensor:
    norm = torch.nn.utils.get_total_norm([p.grad for p in params if p.grad is not None])
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def average_gradients(params, processes: int, sharing: int = 1):
    """Averages gradients over processes, for a network without DistributedDataParallel, which allows one call only
    before a backward(). `sharing` processes work on the same samples: the gradient of these is the sum of theirs.
    """
    if processes > 1:
        for grads in buckets([p.grad for p in params]):
            sums = torch.cat([grad.flatten() for grad in grads])
            torch.distributed.all_reduce(sums)
            means = (sums / (processes // sharing)).split([grad.numel() for grad in grads])
            torch._foreach_copy_(grads, [mean.view_as(grad) for mean, grad in zip(means, grads, strict=True)])


def buckets(tensors: list[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """The tensors in groups of about BUCKET bytes, in order: a collective call for each tensor takes longer."""
    starts = itertools.accumulate(tensor.nbytes for tensor in tensors[:-1])
    numbered = zip([0, *starts], tensors, strict=True)
    for _, group in itertools.groupby(numbered, lambda pair: pair[0] // BUCKET):
        yield [tensor for _, tensor in group]


@torch.no_grad()
def update_ema(target: list[torch.Tensor], source: list[torch.Tensor], decay: float):
    """target = decay * target + (1 - decay) * source, in one call; each process updates its part of sharded tensors."""
    target, source = (
        [p.to_local() if isinstance(p, DTensor) else p.detach() for p in each] for each in (target, source)
    )
    source = [p.to(average.device) for p, average in zip(source, target, strict=True)]  # which may be on the CPU
    torch._foreach_lerp_(target, source, 1.0 - decay)
