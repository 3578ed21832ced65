"""How good a toy teacher is: `python -m tests.toy.teacher sd` prints the README's table.

Pictures by the stock pipeline, at 50, 4 and 2 steps of DDIM and of DPM-Solver++, at several guidance scales.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, DPMSolverMultistepScheduler

from tests.toy import world

TOY = Path(__file__).parent
CHUNK = 64


@torch.no_grad()
def sample(pipeline, prompts: list[str], steps: int, guidance_scale: float, seed: int) -> np.ndarray:
    pictures = []
    for i in range(0, len(prompts), CHUNK):
        part = prompts[i : i + CHUNK]
        noise = [torch.Generator().manual_seed(seed + i + k) for k in range(len(part))]
        pictures += pipeline(
            part, num_inference_steps=steps, guidance_scale=guidance_scale, generator=noise, height=64, width=64
        ).images
    return np.stack([np.asarray(picture) for picture in pictures])


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher", choices=["sd"])
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--guidance_scale", type=float, nargs="+", default=[1.5, 2.0, 3.0])
    parser.add_argument("--folder", type=Path, default=TOY, help="where the pipeline's folder is")
    args = parser.parse_args(argv)
    pipeline = DiffusionPipeline.from_pretrained(args.folder / args.teacher, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    for network in (pipeline.unet, pipeline.vae):
        network.to(memory_format=torch.channels_last)
    rng = np.random.default_rng(99)
    prompts = [world.caption(world.sample_scene(rng)) for _ in range(args.samples)]
    samplers = {
        "DDIM": DDIMScheduler.from_config(pipeline.scheduler.config),
        "DPM-Solver++": DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config),
    }
    print("| guidance scale | sampler | steps | prompts followed | Fréchet distance to DDIM's 50 steps |")
    print("|---|---|---|---|---|")
    for scale in args.guidance_scale:
        pipeline.scheduler = samplers["DDIM"]
        reference = world.features(sample(pipeline, prompts, 50, scale, 2_000_000))
        for name, scheduler in samplers.items():
            pipeline.scheduler = scheduler
            for steps in (50, 4, 2):
                images = sample(pipeline, prompts, steps, scale, 1_000_000)
                distance = world.frechet_distance(world.features(images), reference)
                followed = world.adherence(images, prompts)
                print(f"| {scale:g} | {name} | {steps} | {followed:.1%} | {distance:.4f} |", flush=True)


if __name__ == "__main__":
    main()
