"""How good the toy Wan is: `python -m tests.toy.teacher_wan` prints the README's table and draws what it sampled.

Clips by the stock pipeline and its own scheduler, at several numbers of steps and guidance scales; the Fréchet distance
is to clips of 50 steps at the same scale from other noise, and the last row says how far those are from the world's.
"""

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import WanPipeline
from PIL import Image

from tests.toy import world
from tests.toy import world_video as video
from tests.toy.make_wan import TEXT_TOKENS, channels_last

TOY = Path(__file__).parent
CHUNK = 64


def load(folder: Path) -> WanPipeline:
    pipeline = WanPipeline.from_pretrained(folder, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    channels_last(pipeline.vae)
    return pipeline


@torch.no_grad()
def sample(pipeline, prompts: list[str], steps: int, scale: float, seed: int, tokens: int = TEXT_TOKENS) -> np.ndarray:
    """Clips [N, F, H, W, 3]."""
    clips = []
    for i in range(0, len(prompts), CHUNK):
        part = prompts[i : i + CHUNK]
        noise = [torch.Generator().manual_seed(seed + i + k) for k in range(len(part))]
        frames = pipeline(
            part, num_inference_steps=steps, guidance_scale=scale, generator=noise, height=video.SIDE,
            width=video.SIDE, num_frames=video.FRAMES, max_sequence_length=tokens,
        ).frames  # fmt: skip
        clips.append(np.round(255 * frames).astype(np.uint8))
    return np.concatenate(clips)


def toy_prompts(count: int) -> list[str]:
    rng = np.random.default_rng(99)
    return [video.caption(video.sample_clip(rng)) for _ in range(count)]


def why_not(clips: np.ndarray, prompts: list[str]) -> dict[str, int]:
    """Of the clips that do not follow their prompts, how many show nothing readable, or another shape and so on."""
    counts = dict.fromkeys(("unreadable", "shape", "colour", "motion"), 0)
    for clip, prompt in zip(clips, prompts, strict=True):
        seen, asked = video.read_video(clip), video.read_caption(prompt)
        if seen is None:
            counts["unreadable"] += 1
        else:
            for name in ("shape", "colour", "motion"):
                counts[name] += getattr(seen, name) != getattr(asked, name)
    return counts


def strips(clips: np.ndarray, enlarge: int = 3) -> Image.Image:
    """Nine frames of each clip in a row."""
    rows = [np.concatenate(list(clip[::4]), axis=1) for clip in clips]
    sheet = Image.fromarray(np.concatenate(rows))
    return sheet.resize((sheet.width * enlarge, sheet.height * enlarge), Image.Resampling.NEAREST)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--guidance_scale", type=float, nargs="+", default=[1.0, 3.0, 5.0])
    parser.add_argument("--steps", type=int, nargs="+", default=[50, 4, 3, 2])
    parser.add_argument("--text_tokens", type=int, default=TEXT_TOKENS, help="what prompts are padded to")
    parser.add_argument("--folder", type=Path, default=TOY / "wan", help="the pipeline's folder")
    parser.add_argument("--sheets", type=Path, help="a folder for pictures of the first clips of each row")
    args = parser.parse_args(argv)
    pipeline, prompts = load(args.folder), toy_prompts(args.samples)
    rng = np.random.default_rng(98)
    drawn = video.features(np.stack([video.draw_clip(video.read_caption(prompt), rng) for prompt in prompts]))
    print("| guidance scale | steps | prompts followed | Fréchet distance to 50 steps | to drawn clips | s a clip |")
    print("|---|---|---|---|---|---|")
    for scale in args.guidance_scale:
        reference = video.features(sample(pipeline, prompts, 50, scale, 2_000_000, args.text_tokens))
        for steps in args.steps:
            start = time.time()
            clips = sample(pipeline, prompts, steps, scale, 1_000_000, args.text_tokens)
            seconds, seen = (time.time() - start) / len(clips), video.features(clips)
            to_many, to_drawn = (world.frechet_distance(seen, other) for other in (reference, drawn))
            followed = video.adherence(clips, prompts)
            row = f"{scale:g} | {steps} | {followed:.1%} | {to_many:.4f} | {to_drawn:.4f} | {seconds:.3f}"
            print(f"| {row} | {why_not(clips, prompts)}", flush=True)
            if args.sheets:
                args.sheets.mkdir(parents=True, exist_ok=True)
                strips(clips[:12]).save(args.sheets / f"{scale:g}-{steps}.png")


if __name__ == "__main__":
    main()
