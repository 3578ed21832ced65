"""Makes the toy teachers and their data, from nothing but the world: `python -m tests.toy.make sd` (or `sdxl`).

Stages run in order, each writes its result under `--work` and is skipped where that result stands, so that a run that
was cut off goes on: autoencoder, latents of many scenes, text encoder, U-Net (EMA), and the pipeline folder with
its shards under `--output`. On two CPU cores the SD teacher takes more than an hour. (In the first half of its training
the committed U-Net saw the empty prompt in one of ten samples and not, as here, beside the captions.) The SDXL teacher
starts from the SD teacher in OUTPUT/sd, which is made where it is missing, and takes about two hours more. (The
committed one was made as this file grew: its autoencoder had 16,500 steps, its U-Net 10,000 on an older one's latents
and other shapes, then 9,000 on these.)
"""

import argparse
import io
import itertools
import json
import tarfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from common.solvers import expand_to
from tests.toy import world

TOY = Path(__file__).parent
LATENT_CHANNELS = 8  # a flat world in 64 numbers per channel needs more of them than photographs do


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher", choices=["sd", "sdxl"])
    parser.add_argument(
        "--output", type=Path, default=TOY, help="sd: OUTPUT/sd, shards; sdxl: OUTPUT/sdxl, shards_sdxl"
    )
    parser.add_argument("--work", type=Path, default=TOY / ".build", help="unfinished work, kept between runs")
    parser.add_argument("--vae_steps", type=int, default=10_000)
    parser.add_argument("--scenes", type=int, default=100_000, help="scenes that the U-Net learns from")
    parser.add_argument("--unet_steps", type=int, default=16_000)
    parser.add_argument("--sdxl_vae_steps", type=int, default=16_000, help="from SD's autoencoder on")
    parser.add_argument("--sdxl_views", type=int, default=90_000, help="pictures that SDXL's U-Net learns from")
    parser.add_argument("--sdxl_steps", type=int, default=16_000, help="from SD's U-Net on")
    parser.add_argument("--sdxl_decoder_chunks", type=int, default=90, help="hundreds of sampled pictures")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--shard_samples", type=int, default=2048, help="images in SD's committed shards")
    parser.add_argument("--sdxl_shard_samples", type=int, default=2560, help="images in SDXL's committed shards")
    return parser.parse_args(argv)


def draw(seed: int, count: int, height: int = 64, width: int = 64):
    """`count` images [count, H, W, 3] and their captions."""
    rng = np.random.default_rng(seed)
    scenes = [world.sample_scene(rng) for _ in range(count)]
    images = np.stack([world.draw_scene(scene, rng, height, width) for scene in scenes])
    return images, [world.caption(scene) for scene in scenes]


def to_pixels(images: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1.0  # [B, H, W, 3] -> [B, 3, H, W]


def save_state(path: Path, state: dict):
    """All of a torch state, or nothing."""
    part = path.with_suffix(".part")
    torch.save(state, part)
    part.replace(path)


# ---------------------------------------------------------------------------------------------------------------------
# Autoencoder
# ---------------------------------------------------------------------------------------------------------------------


def new_vae() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 64, 64),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=1,  # more groups hide a flat picture's colour
        mid_block_add_attention=False,
        sample_size=64,
    )


def train_vae(work: Path, steps: int) -> AutoencoderKL:
    vae, path = new_vae(), work / "vae.safetensors"
    if not path.exists():
        torch.manual_seed(0)

        def pictures(step):
            pixels = to_pixels(draw(10_000_000 + step, 32)[0])
            if step < 0.95 * steps:  # windows first: cheap, and many show an object
                top, left = np.random.default_rng(step).integers(0, 5, 2) * 8
                pixels = pixels[:, :, top : top + 32, left : left + 32]
            return pixels

        fit_vae(new_vae(), pictures, steps, 2e-3, path)
    vae.load_state_dict(load_file(path))
    return vae.eval().requires_grad_(False)


def near_outline(pixels: torch.Tensor) -> torch.Tensor:
    """1 where colours change within two pixels, otherwise 0: [B, 1, H, W]."""
    most, least = F.max_pool2d(pixels, 5, 1, 2), -F.max_pool2d(-pixels, 5, 1, 2)
    return ((most - least).amax(1, keepdim=True) > 0.2).float()


def picture_loss(decoded, pixels, outlines: float):
    """Of colours, of edges, and once more of colours near outlines, times `outlines`."""
    error = decoded - pixels
    colours = error.abs() + error.square()
    edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
    return colours.mean() + edges + outlines * (near_outline(pixels) * colours).mean()


def fit_vae(
    vae: AutoencoderKL, pictures, steps: int, rate: float, path: Path, noise: float = 0.0, outlines: float = 0.0
):
    """Trains on `pictures(step)`, writes the weights to `path`. The decoder sees latents with up to `noise` added."""
    vae.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(vae.parameters(), rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps, pct_start=0.05)
    state, done = path.with_suffix(".state"), 0
    if state.exists():
        saved = torch.load(state, weights_only=True)
        vae.load_state_dict(saved["vae"])
        optimizer.load_state_dict(saved["optimizer"])
        schedule.load_state_dict(saved["schedule"])
        done = saved["done"]
    start = time.time()
    for step in range(done, steps):
        pixels = pictures(step)
        posterior = vae.encode(pixels).latent_dist
        latents = posterior.sample()
        amount = noise * latents.detach().std() * torch.rand(len(latents), 1, 1, 1)
        decoded = vae.decode(latents + amount * torch.randn_like(latents)).sample
        loss = picture_loss(decoded, pixels, outlines) + 1e-7 * posterior.kl().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if (step + 1) % 250 == 0:
            print(f"vae {step + 1}: loss {loss:.4f}, {time.time() - start:.0f} s", flush=True)
            saved = {"vae": vae.state_dict(), "optimizer": optimizer.state_dict()}
            save_state(state, saved | {"schedule": schedule.state_dict(), "done": step + 1})
    save_file(vae.to(memory_format=torch.contiguous_format).state_dict(), path)


@torch.no_grad()
def encode_scenes(work: Path, vae: AutoencoderKL, count: int):
    """Latents [count, C, 8, 8] scaled to unit variance, their scale, and the captions."""
    path = work / "latents.safetensors"
    if not path.exists():
        vae.to(memory_format=torch.channels_last)  # five times as fast on a CPU
        latents, captions = [], []
        for start in range(0, count, 100):
            images, texts = draw(20_000_000 + start, 100)
            latents.append(vae.encode(to_pixels(images)).latent_dist.mean)
            captions += texts
            if start % 10_000 == 0:
                print(f"latents {start}", flush=True)
        save_file({"latents": torch.cat(latents).contiguous()}, path)
        path.with_suffix(".json").write_text(json.dumps(captions))
        vae.to(memory_format=torch.contiguous_format)
    latents = load_file(path)["latents"]
    scale = round(1.0 / latents.std().item(), 5)
    return latents * scale, scale, json.loads(path.with_suffix(".json").read_text())


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizer, text encoder, denoiser
# ---------------------------------------------------------------------------------------------------------------------


def make_tokenizer(folder: Path) -> CLIPTokenizer:
    """A CLIP tokenizer (byte-level pairs that end in </w>), its merges learnt on captions."""
    bpe = Tokenizer(models.BPE(continuing_subword_prefix="", end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=1000, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False
    )
    bpe.train_from_iterator(draw(1, 5000)[1], trainer)
    trained = json.loads(bpe.to_str())["model"]
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in trained["merges"]]
    # Every byte must be spelt, alone and at the end of a word, so that any prompt has tokens.
    tokens = dict.fromkeys(alphabet + [letter + "</w>" for letter in alphabet])
    tokens |= dict.fromkeys("".join(merge.split(" ")) for merge in merges)
    vocabulary = [*tokens, "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    tokenizer = CLIPTokenizer(
        str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=32, pad_token="<|endoftext|>"
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


def text_config(tokenizer: CLIPTokenizer, layers: int, width: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        projection_dim=96,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def new_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(text_config(tokenizer, layers=2, width=96))


KINDS = (len(world.SHAPES), len(world.COLOUR_NAMES), len(world.SIZES), len(world.PLACES))


def attribute_labels(scene: world.Scene) -> list[list[int]]:
    """For each object, then for the background: shape, colour, size and place, as numbers; -100 is none."""
    rows = []
    for thing in scene.things:
        kinds = (world.SHAPES, world.COLOUR_NAMES, tuple(world.SIZES), tuple(world.PLACES))
        values = (thing.shape, thing.colour, thing.size, thing.place)
        rows.append([kind.index(value) for kind, value in zip(kinds, values, strict=True)])
    return [*rows, [-100, world.COLOUR_NAMES.index(scene.background), -100, -100]]


def attribute_loss(logits, labels) -> torch.Tensor:
    """Of shape, colour, size and place, [N, 4 + 8 + 2 + 9] and [N, 4]."""
    parts = logits.split(KINDS, dim=1)
    return sum(F.cross_entropy(each, labels[:, i], ignore_index=-100) for i, each in enumerate(parts))


def random_texts(captions: list[str], step: int) -> list[str]:
    rng = torch.Generator().manual_seed(step)
    return [captions[i] for i in torch.randint(len(captions), (64,), generator=rng)]


def phrase_ends(texts: list[str]) -> tuple[list[int], list[int]]:
    """Text and token where each phrase (object, object, background) ends."""
    rows, ends = [], []
    for row, text in enumerate(texts):
        words = 0
        for phrase in text.replace(" on a ", "|on a ").replace(" and ", "|and ").split("|"):
            words += len(phrase.split())
            rows.append(row)
            ends.append(words)  # one token a word, after the first of the text
    return rows, ends


def train_text_encoder(work: Path, tokenizer: CLIPTokenizer, captions: list[str], steps: int = 3000) -> CLIPTextModel:
    """What CLIP's training does for real teachers: the state after the last word of a phrase tells what it says.

    The U-Net then learns what stands where in 500 steps; with a text encoder that learns beside it, in no 10,000.
    """
    torch.manual_seed(0)
    path, encoder = work / "text_encoder.safetensors", new_text_encoder(tokenizer)
    if path.exists():
        encoder.load_state_dict(load_file(path))
        return encoder.requires_grad_(False).eval()
    heads = torch.nn.Linear(encoder.config.hidden_size, sum(KINDS))
    parameters = [*encoder.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, 1e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, steps, pct_start=0.1)
    for step in range(steps):
        texts = random_texts(captions, step)
        rows, ends = phrase_ends(texts)
        states = encoder(tokenize(tokenizer, texts)).last_hidden_state[rows, ends]
        labels = [label for text in texts for label in attribute_labels(world.read_caption(text))]
        loss = attribute_loss(heads(states), torch.tensor(labels))
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if (step + 1) % 500 == 0:
            print(f"text encoder {step + 1}: loss {loss:.4f}", flush=True)
    save_file(encoder.state_dict(), path)
    return encoder.requires_grad_(False).eval()


def new_unet(cross_attention_dim: int = 96, **config) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(64, 128),
        layers_per_block=1,
        cross_attention_dim=cross_attention_dim,
        attention_head_dim=4,
        norm_num_groups=16,
        **config,
    )


def new_scheduler() -> DDIMScheduler:
    """Stable Diffusion's schedule, and 2.1's velocity: noise says little of what stands where, and is slow to learn."""
    return DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
        steps_offset=1, prediction_type="v_prediction",
    )  # fmt: skip


def tokenize(tokenizer: CLIPTokenizer, texts: list[str]) -> torch.Tensor:
    padded = tokenizer(
        texts, padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
    )
    return padded.input_ids


def train_unet(work: Path, tokenizer, text_encoder, latents, captions, steps: int, batch_size: int):
    """On the velocity; what is returned is the moving average."""
    torch.manual_seed(0)
    unet = new_unet().to(memory_format=torch.channels_last)
    parameters = list(unet.parameters())
    ema = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.AdamW(parameters, 1e-3, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, steps, pct_start=0.03)
    state, done = work / "unet.state", 0
    if state.exists():
        saved = torch.load(state, weights_only=True)
        unet.load_state_dict(saved["unet"])
        optimizer.load_state_dict(saved["optimizer"])
        schedule.load_state_dict(saved["schedule"])
        ema, done = saved["ema"], saved["done"]

    tokens = tokenize(tokenizer, captions)
    with torch.no_grad():
        uncond = text_encoder(tokenize(tokenizer, [""])).last_hidden_state.expand(batch_size // 4, -1, -1)
    noise_scheduler = new_scheduler()
    start, running = time.time(), 0.0
    for step in range(done, steps):
        rng = torch.Generator().manual_seed(step)
        pick = torch.randint(len(latents), (batch_size,), generator=rng)
        x0, eps = latents[pick], torch.randn((batch_size, *latents.shape[1:]), generator=rng)
        # Half of the samples above 750: there it is decided what stands where, and that is the hardest to learn.
        t = (1000 * torch.rand(batch_size, generator=rng) ** 0.415).long().clamp(max=999)
        x_t, v = noise_scheduler.add_noise(x0, eps, t), noise_scheduler.get_velocity(x0, eps, t)
        with torch.no_grad():
            cond = torch.cat([text_encoder(tokens[pick]).last_hidden_state, uncond])
        # Some are seen with the empty prompt too, for classifier-free guidance. Below t = 500 a noisy picture says all
        # that its caption says, so that the two predictions must agree: guidance multiplies what is left of it.
        twice = len(uncond)
        out = unet(torch.cat([x_t, x_t[:twice]]), torch.cat([t, t[:twice]]), cond).sample
        out, out_uncond = out.split([batch_size, twice])
        v_uncond = torch.where((t < 500)[:twice, None, None, None], out.detach()[:twice], v[:twice])
        loss = F.mse_loss(out, v) + 0.25 * F.mse_loss(out_uncond, v_uncond)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        torch._foreach_lerp_(ema, [p.detach() for p in parameters], 1.0 - min(0.999, (step + 1) / (step + 10)))
        running += loss.detach()
        if (step + 1) % 500 == 0:
            print(f"unet {step + 1}: loss {running / 500:.4f}, {time.time() - start:.0f} s", flush=True)
            running = 0.0
            saved = {"unet": unet.state_dict(), "optimizer": optimizer.state_dict(), "ema": ema}
            save_state(state, saved | {"schedule": schedule.state_dict(), "done": step + 1})
    for p, average in zip(parameters, ema, strict=True):
        p.data.copy_(average)
    return unet.eval()


# ---------------------------------------------------------------------------------------------------------------------
# SDXL: two text encoders, several aspect ratios, and a U-Net that is told how its picture was made
# ---------------------------------------------------------------------------------------------------------------------

BUCKETS = ((64, 64), (80, 64), (64, 80))  # height, width; a small thing is as large in all
TIME_DIM = 32  # of each size id's embedding
MOST_GUIDANCE = 12.0  # w that the teacher must bear
PATH_STEP = 20  # of t: 50 steps
START_PATHS = 500  # steps: before, it does not know yet what zeros and size ids mean


def draw_view(scene: world.Scene, rng: np.random.Generator, height: int, width: int):
    """A picture of the bucket and its size ids: H and W of the original, top and left of the crop, H and W.

    Most pictures are whole and sharp, of an original of that size or larger. Some originals were smaller: the picture
    is blurred. Some were longer: the picture is a crop, and things are not where the caption says.
    """
    kind = rng.random()
    if kind < 0.6:
        zoom = max(1.0, rng.uniform(0.5, 2.0))
        return world.draw_scene(scene, rng, height, width), (round(height * zoom), round(width * zoom), 0, 0)
    if kind < 0.8:
        zoom = rng.uniform(0.3, 0.75)
        original = round(height * zoom), round(width * zoom)
        small = Image.fromarray(world.draw_scene(scene, rng, *original))
        return np.asarray(small.resize((width, height), Image.Resampling.BILINEAR)), (*original, 0, 0)
    extra_y, extra_x = rng.permutation([rng.integers(8, 33), 0])  # along one side
    top, left = rng.integers(0, extra_y + 1), rng.integers(0, extra_x + 1)
    original = height + extra_y, width + extra_x
    picture = world.draw_scene(scene, rng, *original)[top : top + height, left : left + width]
    return picture, (*original, top, left)


def draw_views(seed: int, count: int, height: int, width: int):
    """Pictures [count, H, W, 3], size ids [count, 6], captions."""
    rng = np.random.default_rng(seed)
    scenes = [world.sample_scene(rng) for _ in range(count)]
    pictures, sizes = zip(*(draw_view(scene, rng, height, width) for scene in scenes), strict=True)
    sizes = np.array([(*size, height, width) for size in sizes], dtype=np.float32)
    return np.stack(pictures), sizes, [world.caption(scene) for scene in scenes]


def train_sdxl_vae(work: Path, sd_vae: AutoencoderKL, steps: int) -> AutoencoderKL:
    """SD's, trained on with all buckets: in a narrow one the arms of a small cross are four pixels across.

    Latents are noised, so that a picture bears the U-Net's errors.
    """
    vae, path = new_vae(), work / "sdxl_vae.safetensors"
    vae.load_state_dict(sd_vae.state_dict())
    if not path.exists():
        torch.manual_seed(0)

        def pictures(step):
            height, width = BUCKETS[step % len(BUCKETS)]
            views = draw_views(60_000_000 + step, 16, height, width)[0]
            if step >= 0.85 * steps:
                return to_pixels(views)
            corners = list(itertools.product(range(0, height - 31, 8), range(0, width - 31, 8)))
            windows = [[view[y : y + 32, x : x + 32] for y, x in corners] for view in views]  # as for SD
            return to_pixels(np.stack([max(some, key=lambda window: window.std()) for some in windows]))

        fit_vae(vae, pictures, steps, 1e-3, path, noise=0.15, outlines=8.0)
    vae.load_state_dict(load_file(path))
    return vae.eval().requires_grad_(False)


def view_seed(bucket: int, start: int) -> int:
    """Of the hundred pictures from `start` on."""
    return 40_000_000 + 1_000_000 * bucket + start


@torch.no_grad()
def encode_views(work: Path, vae: AutoencoderKL, count: int):
    """For each bucket latents scaled to unit variance, size ids and captions; and the scale."""
    path = work / "sdxl_latents.safetensors"
    if not path.exists():
        vae.to(memory_format=torch.channels_last)
        tensors, captions = {}, []
        for bucket, (height, width) in enumerate(BUCKETS):
            latents, sizes, texts = [], [], []
            for start in range(0, count // len(BUCKETS), 100):
                pictures, ids, words = draw_views(view_seed(bucket, start), 100, height, width)
                latents.append(vae.encode(to_pixels(pictures)).latent_dist.mean)
                sizes.append(torch.from_numpy(ids))
                texts += words
            tensors |= {f"latents{bucket}": torch.cat(latents).contiguous(), f"sizes{bucket}": torch.cat(sizes)}
            captions.append(texts)
            print(f"latents of {height}x{width}: {len(texts)}", flush=True)
        path.with_suffix(".json").write_text(json.dumps(captions))
        save_file(tensors, path)
        vae.to(memory_format=torch.contiguous_format)
    tensors, captions = load_file(path), json.loads(path.with_suffix(".json").read_text())
    scale = round(1.0 / torch.cat([tensors[f"latents{i}"].flatten() for i in range(len(BUCKETS))]).std().item(), 5)
    return [(tensors[f"latents{i}"] * scale, tensors[f"sizes{i}"], captions[i]) for i in range(len(BUCKETS))], scale


def train_first_encoder(work: Path, tokenizer, sd_encoder, captions, steps: int = 2000) -> CLIPTextModel:
    """SDXL reads the state before an encoder's last layer, without the norm that ends SD's.

    The first encoder is SD's with a layer more, and learns to say there what SD's says at its end: so the U-Net that it
    is made for, which starts from SD's, understands it.
    """
    torch.manual_seed(0)
    path, encoder = work / "sdxl_text_encoder.safetensors", CLIPTextModel(text_config(tokenizer, layers=3, width=96))
    if path.exists():
        encoder.load_state_dict(load_file(path))
        return encoder.requires_grad_(False).eval()
    encoder.load_state_dict(encoder.state_dict() | sd_encoder.state_dict())
    optimizer = torch.optim.AdamW(encoder.parameters(), 1e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, steps, pct_start=0.1)
    for step in range(steps):
        tokens = tokenize(tokenizer, random_texts(captions, step))
        with torch.no_grad():
            wanted = sd_encoder(tokens).last_hidden_state
        loss = F.mse_loss(encoder(tokens, output_hidden_states=True).hidden_states[-2], wanted)
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if (step + 1) % 500 == 0:
            print(f"first text encoder {step + 1}: loss {loss:.4f} of {wanted.var():.4f}", flush=True)
    save_file(encoder.state_dict(), path)
    return encoder.requires_grad_(False).eval()


def train_second_encoder(work: Path, tokenizer, captions, steps: int = 3000) -> CLIPTextModelWithProjection:
    """Trained as SD's, on the state that SDXL reads, and so that its pooled output tells every attribute of a text."""
    torch.manual_seed(1)
    path = work / "sdxl_text_encoder_2.safetensors"
    encoder = CLIPTextModelWithProjection(text_config(tokenizer, layers=3, width=64))
    if path.exists():
        encoder.load_state_dict(load_file(path))
        return encoder.requires_grad_(False).eval()
    of_phrase = torch.nn.Linear(encoder.config.hidden_size, sum(KINDS))
    of_text = torch.nn.Linear(encoder.config.projection_dim, 3 * sum(KINDS))  # two objects and the background
    parameters = [*encoder.parameters(), *of_phrase.parameters(), *of_text.parameters()]
    optimizer = torch.optim.AdamW(parameters, 1e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, steps, pct_start=0.1)
    for step in range(steps):
        texts = random_texts(captions, step)
        rows, ends = phrase_ends(texts)
        out = encoder(tokenize(tokenizer, texts), output_hidden_states=True)
        labels = [attribute_labels(world.read_caption(text)) for text in texts]
        flat = torch.tensor([label for phrases in labels for label in phrases])
        filled = torch.tensor([[*phrases[:-1], *[[-100] * 4] * (3 - len(phrases)), phrases[-1]] for phrases in labels])
        loss = attribute_loss(of_phrase(out.hidden_states[-2][rows, ends]), flat)
        loss = loss + attribute_loss(of_text(out.text_embeds).view(-1, sum(KINDS)), filled.view(-1, 4))
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if (step + 1) % 500 == 0:
            print(f"second text encoder {step + 1}: loss {loss:.4f}", flush=True)
    save_file(encoder.state_dict(), path)
    return encoder.requires_grad_(False).eval()


def new_sdxl_unet(sd_unet: UNet2DConditionModel, sd_width: int, width: int, pooled: int) -> UNet2DConditionModel:
    """Starts as SD's U-Net, which sees the first encoder alone and no size ids."""
    unet = new_unet(
        cross_attention_dim=sd_width + width,
        addition_embed_type="text_time",
        addition_time_embed_dim=TIME_DIM,
        projection_class_embeddings_input_dim=6 * TIME_DIM + pooled,
    )
    start = sd_unet.state_dict()
    for name, weight in unet.state_dict().items():
        if name in start and weight.shape != start[name].shape:  # keys and values of the text
            start[name] = F.pad(start[name], (0, width))
    expected = {f"add_embedding.linear_{i}.{part}" for i in (1, 2) for part in ("weight", "bias")}
    missing, unexpected = unet.load_state_dict(start, strict=False)
    assert set(missing) == expected and not unexpected, (missing, unexpected)
    torch.nn.init.zeros_(unet.add_embedding.linear_2.weight)
    torch.nn.init.zeros_(unet.add_embedding.linear_2.bias)
    return unet


def chances(captions: list[str]) -> torch.Tensor:
    """Of each picture to be learned from. A small cross or square is what a U-Net gets wrong longest."""
    hard = [
        any(t.size == "small" and t.shape in ("cross", "square") for t in world.read_caption(c).things)
        for c in captions
    ]
    return 1.0 + 2.0 * torch.tensor(hard)


def begin_paths(latents, noise_scheduler, pick: torch.Tensor, rng: torch.Generator) -> dict[str, torch.Tensor]:
    """Noised scenes from which a sampler goes on, each with a guidance w of its own."""
    count = len(pick)
    t = torch.randint(200, 999, (count,), generator=rng)
    x = noise_scheduler.add_noise(latents[pick], torch.randn((count, *latents.shape[1:]), generator=rng), t)
    return {"x": x, "t": t, "w": MOST_GUIDANCE * torch.rand(count, generator=rng).sqrt(), "pick": pick}


def ddim_step(x, v, abar, abar_next):
    a, s, a_next, s_next = abar.sqrt(), (1 - abar).sqrt(), abar_next.sqrt(), (1 - abar_next).sqrt()
    return a_next * (a * x - s * v) + s_next * (s * x + a * v)


@torch.no_grad()
def encode_texts(encoders, tokens):
    """What SDXL's U-Net reads of texts: both encoders' states side by side, and the second one's pooled output."""
    both = [encoder(tokens, output_hidden_states=True) for encoder in encoders]
    return torch.cat([out.hidden_states[-2] for out in both], dim=-1), both[1].text_embeds


@torch.no_grad()
def follow_paths(path: dict[str, torch.Tensor], predict, abar):
    """One step of the guided sampler. `predict(x, t, rows, prompted)`: with prompts for the first `prompted` rows."""
    x, rows = path["x"], torch.arange(len(path["x"]))
    twice = predict(torch.cat([x, x]), torch.cat([path["t"]] * 2), torch.cat([rows, rows]), len(x))
    v, v_uncond = twice.chunk(2)
    v = v + path["w"].view(-1, 1, 1, 1) * (v - v_uncond)
    before, path["t"] = path["t"], path["t"] - PATH_STEP
    path["x"] = ddim_step(x, v, abar[before].view(-1, 1, 1, 1), abar[path["t"]].view(-1, 1, 1, 1))


def train_sdxl_unet(work: Path, unet, tokenizer, encoders, views, steps: int, batch_size: int):
    """As SD's, each batch of one bucket, and an empty prompt is zeros; what is returned is the moving average.

    A large guidance scale drives x_t to where noised pictures never are: things in the right place, but with ragged
    outlines and patches of other colours, which a network that has seen nothing else takes for granted. So three in
    four of a batch are on their way through the sampler, with any guidance of the range, and the network learns to lead
    them back.
    """
    unet.to(memory_format=torch.channels_last)
    parameters = list(unet.parameters())
    ema = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.AdamW(parameters, 8e-4, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 8e-4, steps, pct_start=0.05)
    state, done = work / "sdxl_unet.state", 0
    if state.exists():
        saved = torch.load(state, weights_only=True)
        unet.load_state_dict(saved["unet"])
        optimizer.load_state_dict(saved["optimizer"])
        schedule.load_state_dict(saved["schedule"])
        ema, done = saved["ema"], saved["done"]

    tokens = [tokenize(tokenizer, captions) for _, _, captions in views]
    chance = [chances(captions) for _, _, captions in views]
    noise_scheduler = new_scheduler()
    abar, paths = noise_scheduler.alphas_cumprod, [None] * len(views)
    start, running = time.time(), 0.0
    for step in range(done, steps):
        rng = torch.Generator().manual_seed(step)
        bucket = step % len(views)
        latents, sizes, _ = views[bucket]
        pick = torch.multinomial(chance[bucket], batch_size, replacement=True, generator=rng)
        guided = 3 * batch_size // 4 if step >= START_PATHS else 0  # these rows are on the sampler's way
        if guided:
            fresh = begin_paths(latents, noise_scheduler, pick[:guided], rng)
            path = paths[bucket] or fresh
            ended = path["t"] < 2 * PATH_STEP
            path = {name: torch.where(expand_to(ended, v), fresh[name], v) for name, v in path.items()}
            pick[:guided], paths[bucket] = path["pick"], path
        x0, eps = latents[pick], torch.randn((batch_size, *latents.shape[1:]), generator=rng)
        t = (1000 * torch.rand(batch_size, generator=rng) ** 0.415).long().clamp(max=999)  # as for SD
        cond, pooled = encode_texts(encoders, tokens[bucket][pick])

        def predict(x, t, rows, prompted, cond=cond, pooled=pooled, sizes=sizes[pick]):
            """Velocities for these rows of the batch; those without a prompt get zeros."""
            told = (torch.arange(len(rows)) < prompted).float()
            added = {"text_embeds": pooled[rows] * told[:, None], "time_ids": sizes[rows]}
            return unet(x, t, cond[rows] * told[:, None, None], added_cond_kwargs=added).sample

        x_t, v = noise_scheduler.add_noise(x0, eps, t), noise_scheduler.get_velocity(x0, eps, t)
        weight = torch.ones(batch_size, 1, 1, 1)
        if guided:
            follow_paths(path, predict, abar)
            x_t[:guided], t[:guided] = path["x"], path["t"]
            a, s = abar[t].sqrt().view(-1, 1, 1, 1), (1 - abar[t]).sqrt().view(-1, 1, 1, 1)
            v[:guided] = ((a * x_t - x0) / s)[:guided]
            weight[:guided] = (s[:guided] / 0.3).clamp(max=1.0) ** 2  # the nearer to the end, the more v it takes
        twice = torch.arange(0, batch_size, 2)  # these are seen with the empty prompt too
        out = predict(
            torch.cat([x_t, x_t[twice]]), torch.cat([t, t[twice]]), torch.cat([torch.arange(batch_size), twice]),
            batch_size,
        )  # fmt: skip
        out, out_uncond = out.split([batch_size, len(twice)])
        agree = (t < 500)[twice, None, None, None]
        v_uncond = torch.where(agree, out.detach()[twice], v[twice])
        weight_uncond = weight[twice] * torch.where(agree, 2.0, 0.5)  # guidance multiplies what they differ in
        loss = (weight * (out - v) ** 2).mean() + (weight_uncond * (out_uncond - v_uncond) ** 2).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        torch._foreach_lerp_(ema, [p.detach() for p in parameters], 1.0 - min(0.999, (step + 1) / (step + 10)))
        running += loss.detach()
        if (step + 1) % 500 == 0 or step + 1 == steps:
            print(
                f"sdxl unet {step + 1}: loss {running / (step % 500 + 1):.4f}, {time.time() - start:.0f} s", flush=True
            )
            running = 0.0
            saved = {"unet": unet.state_dict(), "optimizer": optimizer.state_dict(), "ema": ema}
            save_state(state, saved | {"schedule": schedule.state_dict(), "done": step + 1})
    for p, average in zip(parameters, ema, strict=True):
        p.data.copy_(average)
    return unet.eval()


@torch.no_grad()
def sample_back(unet, latents, cond, added, t_start: int, rng: torch.Generator):
    """Noises latents up to t_start, and samples back from there, each with a guidance of its own."""
    abar = new_scheduler().alphas_cumprod
    w = MOST_GUIDANCE * torch.rand(len(latents), 1, 1, 1, generator=rng) ** 2  # with little of it outlines are soft
    x = abar[t_start].sqrt() * latents + (1 - abar[t_start]).sqrt() * torch.randn(latents.shape, generator=rng)
    for t in range(t_start, 0, -2 * PATH_STEP):
        v, v_uncond = unet(torch.cat([x, x]), t, cond, added_cond_kwargs=added).sample.chunk(2)
        v = v + w * (v - v_uncond)
        x = ddim_step(x, v, abar[t], abar[max(t - 2 * PATH_STEP, 0)])
    return x


def tune_decoder(work: Path, vae: AutoencoderKL, unet, tokenizer, encoders, views, chunks: int, steps: int):
    """The decoder learns to draw from what the guided sampler ends at: a small square's corners are faint there."""
    path = work / "sdxl_decoder.safetensors"
    if path.exists():
        vae.load_state_dict(load_file(path))
        return
    pairs = []
    for chunk in range(chunks):
        bucket, rng = chunk % len(BUCKETS), torch.Generator().manual_seed(chunk)
        start = 100 * (chunk // len(BUCKETS))
        latents, sizes, captions = (rows[start : start + 100] for rows in views[bucket])
        pictures = draw_views(view_seed(bucket, start), 100, *BUCKETS[bucket])[0]
        cond, pooled = encode_texts(encoders, tokenize(tokenizer, captions))
        cond, pooled = torch.cat([cond, 0 * cond]), torch.cat([pooled, 0 * pooled])
        added = {"text_embeds": pooled, "time_ids": torch.cat([sizes, sizes])}
        t_start = 2 * PATH_STEP * int(torch.randint(5, 16, (), generator=rng))  # 200 to 600: the picture is still seen
        pairs.append((latents, sample_back(unet, latents, cond, added, t_start, rng), to_pixels(pictures)))
        if (chunk + 1) % 10 == 0:
            print(f"sampled back {chunk + 1}", flush=True)

    vae.decoder.requires_grad_(True)
    parameters = [*vae.decoder.parameters()]
    optimizer = torch.optim.AdamW(parameters, 4e-4, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-4, steps, pct_start=0.05)
    vae.to(memory_format=torch.channels_last)
    for step in range(steps):
        rng = torch.Generator().manual_seed(step)
        clean, sampled, pixels = pairs[int(torch.randint(len(pairs), (), generator=rng))]
        rows = torch.randint(len(pixels), (16,), generator=rng)
        latents = torch.cat([clean[rows[:4]], sampled[rows[4:]]]) / vae.config.scaling_factor
        loss = picture_loss(vae.decode(latents).sample, pixels[rows], outlines=8.0)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if (step + 1) % 250 == 0:
            print(f"decoder {step + 1}: loss {loss:.4f}", flush=True)
    vae.requires_grad_(False).to(memory_format=torch.contiguous_format)
    save_file(vae.state_dict(), path)


# ---------------------------------------------------------------------------------------------------------------------
# Shards
# ---------------------------------------------------------------------------------------------------------------------


def add_member(tar: tarfile.TarFile, name: str, data: bytes):
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def write_shards(folder: Path, images: list[np.ndarray], captions: list[str], shards: int = 4):
    folder.mkdir(parents=True, exist_ok=True)
    count = len(images)
    for shard in range(shards):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for i in range(shard * count // shards, (shard + 1) * count // shards):
                pixels = io.BytesIO()
                Image.fromarray(images[i]).save(pixels, "webp", lossless=True)
                add_member(tar, f"{i:06d}.webp", pixels.getvalue())
                add_member(tar, f"{i:06d}.txt", captions[i].encode())


def draw_originals(seed: int, count: int):
    """Whole pictures around SDXL's buckets: three in four of a bucket's own size, the others smaller or longer."""
    rng = np.random.default_rng(seed)
    images, captions = [], []
    for i in range(count):
        height, width = BUCKETS[i % len(BUCKETS)]
        kind = rng.random()
        if kind < 0.125:
            height, width = height // 2, width // 2
        elif kind < 0.25:
            height, width = (height + 3, width) if height >= width else (height, width + 3)
        scene = world.sample_scene(rng)
        images.append(world.draw_scene(scene, rng, height, width))
        captions.append(world.caption(scene))
    return images, captions


def make_sd(args):
    args.work.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer(args.work / "tokenizer")
    vae = train_vae(args.work, args.vae_steps)
    latents, scale, captions = encode_scenes(args.work, vae, args.scenes)
    vae.register_to_config(scaling_factor=scale)
    text_encoder = train_text_encoder(args.work, tokenizer, captions)
    unet = train_unet(args.work, tokenizer, text_encoder, latents, captions, args.unet_steps, args.batch_size)
    pipeline = StableDiffusionPipeline(
        vae, text_encoder, tokenizer, unet, new_scheduler(), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip
    pipeline.to(torch.float16).save_pretrained(args.output / "sd")
    images, captions = draw(30_000_000, args.shard_samples)
    write_shards(args.output / "shards", list(images), captions)


def make_sdxl(args):
    args.work.mkdir(parents=True, exist_ok=True)
    if not (args.output / "sd").exists():
        make_sd(args)
    sd = StableDiffusionPipeline.from_pretrained(args.output / "sd", dtype=torch.float32)
    tokenizer = sd.tokenizer
    vae = train_sdxl_vae(args.work, sd.vae, args.sdxl_vae_steps)
    views, scale = encode_views(args.work, vae, args.sdxl_views)
    vae.register_to_config(scaling_factor=scale)
    captions = [caption for *_, captions in views for caption in captions]
    first = train_first_encoder(args.work, tokenizer, sd.text_encoder, captions)
    second = train_second_encoder(args.work, tokenizer, captions)
    widths = (first.config.hidden_size, second.config.hidden_size, second.config.projection_dim)
    unet = new_sdxl_unet(sd.unet, *widths)
    unet = train_sdxl_unet(args.work, unet, tokenizer, (first, second), views, args.sdxl_steps, args.batch_size)
    tune_decoder(args.work, vae, unet, tokenizer, (first, second), views, args.sdxl_decoder_chunks, 3000)
    pipeline = StableDiffusionXLPipeline(
        vae, first, second, tokenizer, tokenizer, unet, new_scheduler(), force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    )  # fmt: skip
    pipeline.to(torch.float16).save_pretrained(args.output / "sdxl")
    write_shards(args.output / "shards_sdxl", *draw_originals(50_000_000, args.sdxl_shard_samples))


if __name__ == "__main__":
    arguments = parse_args()
    {"sd": make_sd, "sdxl": make_sdxl}[arguments.teacher](arguments)
