"""Makes the toy teachers and their data, from nothing but the world: `python -m tests.toy.make sd`.

Stages run in order, each writes its result under `--work` and is skipped where that result stands, so that a run that
was cut off goes on: autoencoder, latents of many scenes, text encoder, U-Net (EMA), and the pipeline folder with
its shards under `--output`. On two CPU cores the SD teacher takes more than an hour. (In the first half of its training
the committed U-Net saw the empty prompt in one of ten samples and not, as here, beside the captions.)
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
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from tests.toy import world

TOY = Path(__file__).parent
LATENT_CHANNELS = 8  # a flat world in 64 numbers per channel needs more of them than photographs do


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher", choices=["sd"])
    parser.add_argument(
        "--output", type=Path, default=TOY, help="the pipeline goes to OUTPUT/sd, shards to OUTPUT/shards"
    )
    parser.add_argument("--work", type=Path, default=TOY / ".build", help="unfinished work, kept between runs")
    parser.add_argument("--vae_steps", type=int, default=10_000)
    parser.add_argument("--scenes", type=int, default=100_000, help="scenes that the U-Net learns from")
    parser.add_argument("--unet_steps", type=int, default=16_000)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--shard_samples", type=int, default=2048, help="images in the committed shards")
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
        vae = new_vae().to(memory_format=torch.channels_last)
        optimizer = torch.optim.AdamW(vae.parameters(), 2e-3, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps, pct_start=0.05)
        state, done = work / "vae.state", 0
        if state.exists():
            saved = torch.load(state, weights_only=True)
            vae.load_state_dict(saved["vae"])
            optimizer.load_state_dict(saved["optimizer"])
            schedule.load_state_dict(saved["schedule"])
            done = saved["done"]
        start = time.time()
        for step in range(done, steps):
            pixels = to_pixels(draw(10_000_000 + step, 32)[0])
            if step < 0.95 * steps:  # windows first: cheap, and many show an object
                top, left = np.random.default_rng(step).integers(0, 5, 2) * 8
                pixels = pixels[:, :, top : top + 32, left : left + 32]
            posterior = vae.encode(pixels).latent_dist
            error = vae.decode(posterior.sample()).sample - pixels
            edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
            loss = error.abs().mean() + error.square().mean() + edges + 1e-7 * posterior.kl().mean()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            if (step + 1) % 250 == 0:
                print(f"vae {step + 1}: error {error.abs().mean():.4f}, {time.time() - start:.0f} s", flush=True)
                saved = {"vae": vae.state_dict(), "optimizer": optimizer.state_dict()}
                save_state(state, saved | {"schedule": schedule.state_dict(), "done": step + 1})
        vae = vae.to(memory_format=torch.contiguous_format)
        save_file(vae.state_dict(), path)
    vae.load_state_dict(load_file(path))
    return vae.eval().requires_grad_(False)


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


def new_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=96,
            intermediate_size=384,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=tokenizer.model_max_length,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def attribute_labels(scene: world.Scene) -> list[list[int]]:
    """For each object, then for the background: shape, colour, size and place, as numbers; -100 is none."""
    rows = []
    for thing in scene.things:
        kinds = (world.SHAPES, world.COLOUR_NAMES, tuple(world.SIZES), tuple(world.PLACES))
        values = (thing.shape, thing.colour, thing.size, thing.place)
        rows.append([kind.index(value) for kind, value in zip(kinds, values, strict=True)])
    return [*rows, [-100, world.COLOUR_NAMES.index(scene.background), -100, -100]]


def train_text_encoder(work: Path, tokenizer: CLIPTokenizer, captions: list[str], steps: int = 3000) -> CLIPTextModel:
    """What CLIP's training does for real teachers: the state after the last word of a phrase tells what it says.

    The U-Net then learns what stands where in 500 steps; with a text encoder that learns beside it, in no 10,000.
    """
    torch.manual_seed(0)
    path, encoder = work / "text_encoder.safetensors", new_text_encoder(tokenizer)
    if path.exists():
        encoder.load_state_dict(load_file(path))
        return encoder.requires_grad_(False).eval()
    heads = torch.nn.Linear(encoder.config.hidden_size, 4 + 8 + 2 + 9)
    parameters = [*encoder.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, 1e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, steps, pct_start=0.1)
    for step in range(steps):
        rng = torch.Generator().manual_seed(step)
        rows, ends, labels = [], [], []
        texts = [captions[i] for i in torch.randint(len(captions), (64,), generator=rng)]
        for row, text in enumerate(texts):
            words = 0
            for phrase in text.replace(" on a ", "|on a ").replace(" and ", "|and ").split("|"):
                words += len(phrase.split())
                rows.append(row)
                ends.append(words)  # one token a word, after the first of the text
            labels += attribute_labels(world.read_caption(text))
        states = encoder(tokenize(tokenizer, texts)).last_hidden_state[rows, ends]
        logits = heads(states).split([4, 8, 2, 9], dim=1)
        labels = torch.tensor(labels)
        loss = sum(F.cross_entropy(each, labels[:, i], ignore_index=-100) for i, each in enumerate(logits))
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if (step + 1) % 500 == 0:
            print(f"text encoder {step + 1}: loss {loss:.4f}", flush=True)
    save_file(encoder.state_dict(), path)
    return encoder.requires_grad_(False).eval()


def new_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(64, 128),
        layers_per_block=1,
        cross_attention_dim=96,
        attention_head_dim=4,
        norm_num_groups=16,
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
# Shards
# ---------------------------------------------------------------------------------------------------------------------


def add_member(tar: tarfile.TarFile, name: str, data: bytes):
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def write_shards(folder: Path, count: int, shards: int = 4):
    folder.mkdir(parents=True, exist_ok=True)
    images, captions = draw(30_000_000, count)
    for shard in range(shards):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for i in range(shard * count // shards, (shard + 1) * count // shards):
                pixels = io.BytesIO()
                Image.fromarray(images[i]).save(pixels, "webp", lossless=True)
                add_member(tar, f"{i:06d}.webp", pixels.getvalue())
                add_member(tar, f"{i:06d}.txt", captions[i].encode())


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
    write_shards(args.output / "shards", args.shard_samples)


if __name__ == "__main__":
    arguments = parse_args()
    {"sd": make_sd}[arguments.teacher](arguments)
