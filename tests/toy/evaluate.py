"""How well a toy teacher follows prompts, by size and guidance: `python -m tests.toy.evaluate tests/toy/sdxl`."""

import argparse
import warnings
from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline

from tests.toy import world
from tests.toy.make import BUCKETS


def load(folder: Path) -> DiffusionPipeline:
    with warnings.catch_warnings(action="ignore"):
        pipeline = DiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.unet.to(memory_format=torch.channels_last)
    return pipeline


def toy_prompts(count: int) -> list[str]:
    rng = np.random.default_rng(99)
    return [world.caption(world.sample_scene(rng)) for _ in range(count)]


def pictures(
    pipeline, prompts: list[str], size: tuple[int, int], guidance: float, steps: int = 50, **ids
) -> np.ndarray:
    """[N, H, W, 3]; `ids` are SDXL's own, such as original_size."""
    noise = [torch.Generator().manual_seed(i) for i in range(len(prompts))]
    drawn = pipeline(
        prompts,
        height=size[0],
        width=size[1],
        guidance_scale=guidance,
        num_inference_steps=steps,
        generator=noise,
        **ids,
    )
    return np.stack([np.asarray(picture) for picture in drawn.images])


def sharpness(images: np.ndarray) -> float:
    """Mean absolute second difference: what an enlarged small picture has little of."""
    x = images.astype(np.float32)
    return float(np.abs(np.diff(x, 2, axis=1)).mean() + np.abs(np.diff(x, 2, axis=2)).mean())


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--guidance", type=float, nargs="+", default=[2.0, 7.5, 13.0], help="guidance_scale = 1 + w")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--samples", type=int, default=64, help="prompts for each size and guidance")
    args = parser.parse_args()
    pipeline, prompts = load(args.folder), toy_prompts(args.samples)
    sdxl = hasattr(pipeline, "tokenizer_2")
    for size in BUCKETS if sdxl else BUCKETS[:1]:
        for guidance in args.guidance:
            images = pictures(pipeline, prompts, size, guidance, args.steps)
            followed = world.adherence(images, prompts)
            print(f"{size[0]}x{size[1]}, guidance_scale {guidance:g}: {followed:.1%} followed", flush=True)
    if sdxl:  # the size ids are heard
        for name, ids in {
            "original 64x64": {},
            "original 24x24": {"original_size": (24, 24)},
            "original 96x64, cropped from 32 down": {"original_size": (96, 64), "crops_coords_top_left": (32, 0)},
        }.items():
            images = pictures(pipeline, prompts, (64, 64), args.guidance[0], args.steps, **ids)
            followed = world.adherence(images, prompts)
            print(f"{name}: sharpness {sharpness(images):.2f}, {followed:.1%} followed", flush=True)


if __name__ == "__main__":
    main()
