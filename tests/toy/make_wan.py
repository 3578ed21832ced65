"""Makes the toy Wan and its clips, from nothing but the world: `python -m tests.toy.make_wan`.

Stages run in order, each writes its result under `--work` and is skipped where that result stands, so that a run that
was cut off goes on: autoencoder, latents of many clips, text encoder, transformer (EMA), and the pipeline folder, its
prompts and its shards under `--output`. Every class is the one that Wan 2.1 uses, only smaller.
"""

import argparse
import io
import json
import tarfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from safetensors.torch import load_file, save_file

from tests.toy import world_video as world
from tests.toy.make import add_member, save_state

TOY = Path(__file__).parent
LATENT_CHANNELS = 16


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=TOY, help="OUTPUT/wan, wan_prompts.txt, shards_wan")
    parser.add_argument("--work", type=Path, default=TOY / ".build_wan", help="unfinished work, kept between runs")
    parser.add_argument("--vae_steps", type=int, default=6000)
    return parser.parse_args(argv)


def draw(seed: int, count: int):
    """`count` clips [count, F, H, W, 3] and their captions."""
    rng = np.random.default_rng(seed)
    clips = [world.sample_clip(rng) for _ in range(count)]
    return np.stack([world.draw_clip(clip, rng) for clip in clips]), [world.caption(clip) for clip in clips]


def to_pixels(videos: np.ndarray) -> torch.Tensor:
    x = torch.from_numpy(videos).permute(0, 4, 1, 2, 3).float() / 127.5 - 1.0  # [B, F, H, W, 3] -> [B, 3, F, H, W]
    return x.contiguous(memory_format=torch.channels_last_3d)


# ---------------------------------------------------------------------------------------------------------------------
# Autoencoder
# ---------------------------------------------------------------------------------------------------------------------


def new_vae() -> AutoencoderKLWan:
    """Compresses time by 4 and space by 8, as Wan's; two by two pixels are channels from the start, for speed."""
    return AutoencoderKLWan(
        base_dim=16,
        z_dim=LATENT_CHANNELS,
        dim_mult=[1, 2, 4],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        latents_mean=[0.0] * LATENT_CHANNELS,
        latents_std=[1.0] * LATENT_CHANNELS,
        patch_size=2,
        in_channels=12,
        out_channels=12,
        scale_factor_temporal=4,
        scale_factor_spatial=8,
    )


def channels_last(vae: AutoencoderKLWan) -> AutoencoderKLWan:
    """A third faster on a CPU."""
    for module in vae.modules():
        if isinstance(module, torch.nn.Conv3d):
            module.to(memory_format=torch.channels_last_3d)
        elif isinstance(module, torch.nn.Conv2d):
            module.to(memory_format=torch.channels_last)
    return vae


def train_vae(work: Path, steps: int) -> AutoencoderKLWan:
    vae, path = new_vae(), work / "vae.safetensors"
    if not path.exists():
        torch.manual_seed(0)
        fit_vae(new_vae(), steps, 2e-3, path)
    vae.load_state_dict(load_file(path))
    return channels_last(vae).eval().requires_grad_(False)


def windows(step: int, count: int, frames: int) -> torch.Tensor:
    """Some frames in a row of `count` clips, [count, 3, frames, H, W]."""
    starts = np.random.default_rng(step).integers(0, world.FRAMES - frames + 1, count)
    videos, _ = draw(10_000_000 + step, count)
    return to_pixels(np.stack([video[i : i + frames] for video, i in zip(videos, starts, strict=True)]))


def fit_vae(vae: AutoencoderKLWan, steps: int, rate: float, path: Path):
    """Short windows first: the autoencoder carries its state from one latent frame to the next, and three show how."""
    channels_last(vae)
    optimizer = torch.optim.AdamW(vae.parameters(), rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps, pct_start=0.05)
    state, done = path.with_suffix(".state"), 0
    if state.exists():
        saved = torch.load(state, weights_only=True)
        vae.load_state_dict(saved["vae"])
        optimizer.load_state_dict(saved["optimizer"])
        schedule.load_state_dict(saved["schedule"])
        done = saved["done"]
    start, running = time.time(), 0.0
    for step in range(done, steps):
        pixels = windows(step, 16, 9) if step < 0.95 * steps else windows(step, 8, world.FRAMES)
        posterior = vae.encode(pixels).latent_dist
        error = vae.decode(posterior.sample()).sample - pixels
        edges = error.diff(dim=3).abs().mean() + error.diff(dim=4).abs().mean()
        loss = error.abs().mean() + error.square().mean() + edges + 1e-6 * posterior.kl().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        running += error.detach().abs().mean()
        if (step + 1) % 250 == 0 or step + 1 == steps:
            print(f"vae {step + 1}: error {running / (step % 250 + 1):.4f}, {time.time() - start:.0f} s", flush=True)
            running = 0.0
            saved = {"vae": vae.state_dict(), "optimizer": optimizer.state_dict()}
            save_state(state, saved | {"schedule": schedule.state_dict(), "done": step + 1})
    save_file({name: weight.contiguous() for name, weight in vae.state_dict().items()}, path)


def main(argv=None):
    args = parse_args(argv)
    args.work.mkdir(parents=True, exist_ok=True)
    train_vae(args.work, args.vae_steps)


if __name__ == "__main__":
    main()
