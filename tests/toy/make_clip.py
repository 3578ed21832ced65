"""Makes the toy's CLIP, for `--evaluation_type clip`: `python -m tests.toy.make_clip`, about ten minutes.

Each batch holds scenes and their twins, that differ in one attribute: so it must see all that a caption says.
"""

import argparse
import dataclasses
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import CLIPConfig, CLIPModel, CLIPTextModel, CLIPTokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from tests.toy import world
from tests.toy.make import BUCKETS, TOY, text_config, tokenize

SIDE, PATCH = 64, 8


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=TOY / "clip")
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--pairs", type=int, default=48, help="scenes of a batch, each with its twin")
    return parser.parse_args(argv)


def twin(scene: world.Scene, rng: np.random.Generator) -> world.Scene:
    """The scene with one attribute of one object, or the background, changed."""
    colours = {scene.background} | {thing.colour for thing in scene.things}
    free = [name for name in world.COLOUR_NAMES if name not in colours]
    which = rng.integers(len(scene.things))
    thing, kind = scene.things[which], rng.choice(["background", "shape", "colour", "size", "place"])
    if kind == "background":
        return dataclasses.replace(scene, background=str(rng.choice(free)))
    others = {"shape": world.SHAPES, "colour": free, "size": world.SIZES, "place": world.PLACES}[kind]
    other = str(rng.choice([value for value in others if value != getattr(thing, kind)]))
    things = list(scene.things)
    things[which] = dataclasses.replace(thing, **{kind: other})
    return dataclasses.replace(scene, things=tuple(things))


def pairs(count: int, seed: int):
    """Scenes, then their twins: pictures of any bucket, all made square, and captions."""
    rng = np.random.default_rng(seed)
    scenes = [world.sample_scene(rng) for _ in range(count)]
    scenes += [twin(scene, rng) for scene in scenes]
    drawn = (world.draw_scene(scene, rng, *BUCKETS[rng.integers(len(BUCKETS))]) for scene in scenes)
    return [Image.fromarray(picture) for picture in drawn], [world.caption(scene) for scene in scenes]


def main(argv=None):
    args = parse_args(argv)
    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(TOY / "sd" / "tokenizer")
    text = text_config(tokenizer, layers=2, width=96).to_dict()
    vision = {
        "hidden_size": 96, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4,
        "image_size": SIDE, "patch_size": PATCH,
    }  # fmt: skip
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=64))
    sd = CLIPTextModel.from_pretrained(TOY / "sd" / "text_encoder", dtype=torch.float32)  # knows the words already
    model.text_model.load_state_dict(getattr(sd, "text_model", sd).state_dict())
    square = {"height": SIDE, "width": SIDE}
    processor = CLIPImageProcessorPil(size=square, do_center_crop=False)

    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, args.steps, pct_start=0.1)
    start = time.time()
    for step in range(args.steps):
        pictures, captions = pairs(args.pairs, step)
        pixels = processor(images=pictures, return_tensors="pt")["pixel_values"]
        with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):  # as in make_wan.py, for speed
            logits = model(input_ids=tokenize(tokenizer, captions), pixel_values=pixels).logits_per_image.float()
        same = torch.arange(len(captions))
        loss = F.cross_entropy(logits, same) + F.cross_entropy(logits.T, same)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if (step + 1) % 200 == 0:
            print(f"clip {step + 1}: loss {loss:.4f}, {time.time() - start:.0f} s", flush=True)
    model.half().save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)
    processor.save_pretrained(args.output)


if __name__ == "__main__":
    main()
