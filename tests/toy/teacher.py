"""How good a toy teacher is: `python -m tests.toy.teacher sd` (or `sdxl`) prints the README's table.

Pictures by the stock pipeline, at 50, 4 and 2 steps of DDIM and of DPM-Solver++, at several guidance scales, and what
LCM's sampler makes of the teacher without any training; of SDXL in every size, and with size ids that ask for other
pictures than sharp and whole ones.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, DPMSolverMultistepScheduler, LCMScheduler

from tests.toy import world
from tests.toy.make import BUCKETS

TOY = Path(__file__).parent
CHUNK = 64
SCALES = {"sd": [1.0, 1.5, 2.0, 3.0], "sdxl": [1.0, 2.0, 7.5, 13.0]}
SIZE_IDS = {
    "whole": {},
    "enlarged from 24x24": {"original_size": (24, 24)},
    "cut from 96x64, 32 from the top": {"original_size": (96, 64), "crops_coords_top_left": (32, 0)},
}


def load(folder: Path) -> DiffusionPipeline:
    pipeline = DiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    for network in (pipeline.unet, pipeline.vae):
        network.to(memory_format=torch.channels_last)
    return pipeline


@torch.no_grad()
def sample(pipeline, prompts: list[str], steps: int, scale: float, seed: int, size=(64, 64), **ids) -> np.ndarray:
    pictures = []
    for i in range(0, len(prompts), CHUNK):
        part = prompts[i : i + CHUNK]
        noise = [torch.Generator().manual_seed(seed + i + k) for k in range(len(part))]
        pictures += pipeline(
            part, num_inference_steps=steps, guidance_scale=scale, generator=noise, height=size[0], width=size[1], **ids
        ).images
    return np.stack([np.asarray(picture) for picture in pictures])


def toy_prompts(count: int) -> list[str]:
    rng = np.random.default_rng(99)
    return [world.caption(world.sample_scene(rng)) for _ in range(count)]


def sharpness(images: np.ndarray) -> float:
    """Mean absolute second difference, of which enlarged small pictures have little."""
    x = images.astype(np.float32)
    return float(np.abs(np.diff(x, 2, axis=1)).mean() + np.abs(np.diff(x, 2, axis=2)).mean())


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher", choices=["sd", "sdxl"])
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--guidance_scale", type=float, nargs="+", help="default: of the range that its recipe trains")
    parser.add_argument("--samplers", nargs="+", default=["DDIM", "DPM-Solver++", "LCM, untrained"])
    parser.add_argument("--folder", type=Path, default=TOY, help="where the pipeline's folder is")
    args = parser.parse_args(argv)
    pipeline, prompts = load(args.folder / args.teacher), toy_prompts(args.samples)
    ddim = DDIMScheduler.from_config(pipeline.scheduler.config)
    samplers = {
        "DDIM": (ddim, (50, 4, 2)),
        "DPM-Solver++": (DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config), (50, 4, 2)),
        "LCM, untrained": (LCMScheduler.from_config(pipeline.scheduler.config), (8, 4, 2, 1)),
    }
    scales = args.guidance_scale or SCALES[args.teacher]
    print("| size | guidance scale | sampler | steps | prompts followed | Fréchet distance to DDIM's 50 steps |")
    print("|---|---|---|---|---|---|")
    for height, width in BUCKETS if args.teacher == "sdxl" else BUCKETS[:1]:
        for scale in scales:
            pipeline.scheduler = ddim
            reference = world.features(sample(pipeline, prompts, 50, scale, 2_000_000, (height, width)))
            for name in args.samplers:
                pipeline.scheduler, counts = samplers[name]
                for steps in counts:
                    images = sample(pipeline, prompts, steps, scale, 1_000_000, (height, width))
                    distance = world.frechet_distance(world.features(images), reference)
                    followed = world.adherence(images, prompts)
                    row = f"{height}x{width} | {scale:g} | {name} | {steps} | {followed:.1%} | {distance:.4f}"
                    print(f"| {row} |", flush=True)
    if args.teacher == "sdxl":
        pipeline.scheduler = ddim
        print("\n| size ids of 64x64 | sharpness | prompts followed |\n|---|---|---|")
        for name, ids in SIZE_IDS.items():
            images = sample(pipeline, prompts, 50, scales[0], 1_000_000, **ids)
            print(f"| {name} | {sharpness(images):.2f} | {world.adherence(images, prompts):.1%} |", flush=True)


if __name__ == "__main__":
    main()
