"""What every LCM script does alike: a sample's draws, both prompts in one batch, adapters off, guidance of pictures."""

import contextlib

import torch

from common.stream import sample_generator


def draw_for(args, position: int, shape):
    """index, w, whether the prompt is dropped, and two noises, of the sample at this place in the global sequence."""
    rng = sample_generator(args.seed, position)
    index = torch.randint(args.num_ddim_timesteps, (), generator=rng)
    w = args.w_min + (args.w_max - args.w_min) * torch.rand((), generator=rng)
    dropped = torch.rand((), generator=rng) < args.proportion_empty_prompts
    return index, w, dropped, torch.randn(shape, generator=rng), torch.randn(shape, generator=rng)


def with_uncond(cond, uncond) -> dict[str, torch.Tensor]:
    """Batch of 2B: as conditioned, and with the empty prompt's embeddings."""
    rows = {name: uncond[name].expand_as(v) if name in uncond else v for name, v in cond.items()}
    return {name: torch.cat([v, rows[name]]) for name, v in cond.items()}


@contextlib.contextmanager
def adapters_off(unet, wanted: bool = True):
    if wanted:
        unet.disable_adapters()
    try:
        yield
    finally:
        if wanted:
            unet.enable_adapters()


def middle_w(args) -> float:
    """The w of validation pictures, inside the trained range: a student that takes w knows no other."""
    middle, wanted = (args.w_min + args.w_max) / 2.0, args.validation_guidance
    return middle if wanted is None else min(max(wanted - 1.0, args.w_min), args.w_max)
