"""Makes the toy Wan and its clips, from nothing but the world: `python -m tests.toy.make_wan`.

Stages run in order, each writes its result under `--work` and is skipped where that result stands, so that a run that
was cut off goes on: autoencoder, latents of many clips, text encoder, transformer (EMA), and the pipeline folder, its
prompts and its shards under `--output`. Autoencoder and text encoder that are in OUTPUT/wan are taken as they are, and
a transformer there is trained further. Every class is the one that Wan 2.1 uses, only smaller.
"""

import argparse
import io
import json
import math
import tarfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import T5Tokenizer, UMT5Config, UMT5EncoderModel

from tests.toy import world
from tests.toy import world_video as video
from tests.toy.make import add_member, picture_loss, save_state

TOY = Path(__file__).parent
PARTS = 3  # into so many parts each way are a latent's eight by eight pixels divided
LATENT_CHANNELS = 3 * PARTS**2
DEVIATION = 0.3  # of a latent: less than the noise's 1, so that a sampler decides late, and needs its steps
NOISE = 0.2  # up to so many of their deviations are added to the latents that the decoder learns from
BFLOAT_SHARE = 0.8  # of the decoder's steps are quicker and less exact
ENCODER_EVERY = 3  # steps of the decoder: means are learned sooner than outlines
FLOW_SHIFT = 3.0  # Wan 1.3B's for 480p
TEXT_TOKENS = 16  # a caption has 6 or 7; with stock pipelines, max_sequence_length
PIPELINE_TOKENS = 512  # what WanPipeline pads to if nobody says anything


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=TOY, help="OUTPUT/wan, wan_prompts.txt, shards_wan")
    parser.add_argument("--work", type=Path, default=TOY / ".build_wan", help="unfinished work, kept between runs")
    parser.add_argument("--vae_steps", type=int, default=14_000)
    parser.add_argument("--clips", type=int, default=80_000, help="clips that the transformer learns from")
    parser.add_argument("--transformer_steps", type=int, default=20_000)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument(
        "--compile", action="store_true", help="the transformer: nearly twice as fast; needs a C++ compiler"
    )
    parser.add_argument("--shard_samples", type=int, default=256, help="clips in the committed shards")
    return parser.parse_args(argv)


def draw(seed: int, count: int):
    """`count` clips [count, F, H, W, 3] and their captions."""
    rng = np.random.default_rng(seed)
    clips = [video.sample_clip(rng) for _ in range(count)]
    return np.stack([video.draw_clip(clip, rng) for clip in clips]), [video.caption(clip) for clip in clips]


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
    """Short windows first: they are quick. What is carried from one latent frame to the next only whole clips show."""
    torch.manual_seed(0)
    vae = new_vae()
    stages = ("vae_short", 0.7, 2e-3, 16, 9), ("vae", 0.3, 1e-3, 5, video.FRAMES)
    for name, share, rate, count, frames in stages:
        path = work / f"{name}.safetensors"
        if not path.exists():
            fit_vae(vae, round(share * steps), rate, path, count, frames)
        vae.load_state_dict(load_file(path))
    return channels_last(vae).eval().requires_grad_(False)


def windows(step: int, count: int, frames: int) -> torch.Tensor:
    """Some frames in a row of `count` clips, [count, 3, frames, H, W]."""
    starts = np.random.default_rng(step).integers(0, video.FRAMES - frames + 1, count)
    clips, _ = draw(10_000_000 + step, count)
    return to_pixels(np.stack([clip[i : i + frames] for clip, i in zip(clips, starts, strict=True)]))


def small_video(pixels: torch.Tensor) -> torch.Tensor:
    """[B, LATENT_CHANNELS, f, H / 8, W / 8]: the mean colours of each part, over four frames but for the first one.

    What latents are taught to be: small pictures in motion are learned by a small transformer in far fewer steps than
    whatever an autoencoder comes up with by itself, of which 64 principal components hold less than 16 of these do.
    """
    first, rest = pixels.split([1, pixels.shape[2] - 1], dim=2)
    means = torch.cat([first, rest.unflatten(2, (-1, 4)).mean(3)], dim=2).transpose(1, 2)  # [B, f, 3, H, W]
    small = F.interpolate(means.flatten(0, 1), scale_factor=PARTS / 8, mode="area")
    return F.pixel_unshuffle(small, PARTS).unflatten(0, means.shape[:2]).transpose(1, 2)


def fit_vae(vae: AutoencoderKLWan, steps: int, rate: float, path: Path, count: int, frames: int):
    """The encoder learns to make `small_video`, the decoder to take it back from noisy ones, as samplers make them."""
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
    start, encoder_error, error = time.time(), 0.0, 0.0
    for step in range(done, steps):
        pixels = windows(step, count, frames)
        latents = small_video(pixels)
        if step % ENCODER_EVERY == 0:
            encoder_loss = F.mse_loss(vae.encode(pixels).latent_dist.sample(), latents)
            encoder_loss.backward()
            encoder_error += ENCODER_EVERY * encoder_loss.item() ** 0.5
        amount = NOISE * latents.std() * torch.rand(count, 1, 1, 1, 1)
        with torch.autocast("cpu", torch.bfloat16, enabled=step < BFLOAT_SHARE * steps):
            decoded = vae.decode(latents + amount * torch.randn_like(latents)).sample.float()
        frames_of = (each.transpose(1, 2).flatten(0, 1) for each in (decoded, pixels))  # [B * F, 3, H, W]
        picture_loss(*frames_of, outlines=8.0).backward()
        error += (decoded.detach() - pixels).abs().mean().item()
        for module in (vae.encoder, vae.decoder):  # neither's gradient shortens the other's
            torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if (step + 1) % 250 == 0 or step + 1 == steps:
            errors = f"latents {encoder_error / (step % 250 + 1):.4f}, pixels {error / (step % 250 + 1):.4f}"
            print(f"{path.stem} {step + 1}: {errors}, {time.time() - start:.0f} s", flush=True)
            encoder_error = error = 0.0
            saved = {"vae": vae.state_dict(), "optimizer": optimizer.state_dict()}
            save_state(state, saved | {"schedule": schedule.state_dict(), "done": step + 1})
    save_file({name: weight.contiguous() for name, weight in vae.state_dict().items()}, path)


@torch.no_grad()
def draw_latents(work: Path, count: int):
    """What the encoder makes of many clips, without it: [count, C, 9, 4, 4] in half precision, and the captions."""
    path = work / "latents.safetensors"
    if not path.exists():
        latents, captions = [], []
        for first in range(0, count, 100):
            clips, texts = draw(20_000_000 + first, 100)
            latents.append(small_video(to_pixels(clips)).half())
            captions += texts
        path.with_suffix(".json").write_text(json.dumps(captions))
        save_file({"latents": torch.cat(latents).contiguous()}, path)
    return load_file(path)["latents"], json.loads(path.with_suffix(".json").read_text())


def normalize(vae: AutoencoderKLWan, latents: torch.Tensor) -> torch.Tensor:
    """Latents with the mean 0 and the deviation that the transformer sees.

    The autoencoder's config tells the pipeline how to take that back, as Wan's does.
    """
    latents = latents.float()
    mean, std = latents.mean((0, 2, 3, 4)), latents.std((0, 2, 3, 4)) / DEVIATION
    vae.register_to_config(
        latents_mean=[round(each, 5) for each in mean.tolist()], latents_std=[round(each, 5) for each in std.tolist()]
    )
    mean, std = torch.tensor(vae.config.latents_mean), torch.tensor(vae.config.latents_std)
    return (latents - mean.view(1, -1, 1, 1, 1)) / std.view(1, -1, 1, 1, 1)


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizer and text encoder
# ---------------------------------------------------------------------------------------------------------------------


def make_tokenizer() -> T5Tokenizer:
    """umT5's kind: pieces that begin with a space's mark, here a caption's words and, for other prompts, letters."""
    words = sorted({word for clip in video.all_clips() for word in video.caption(clip).split()})
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -10.0)]
    pieces += [("\u2581" + word, -1.0) for word in words] + [(chr(code), -10.0) for code in range(33, 127)]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=TEXT_TOKENS, padding_side="right")


def tokenize(tokenizer: T5Tokenizer, texts: list[str]):
    return tokenizer(texts, padding="max_length", max_length=TEXT_TOKENS, truncation=True, return_tensors="pt")


KINDS = (world.SHAPES, world.COLOUR_NAMES, video.MOTIONS)


def attribute_labels(clips: list[video.Clip]) -> torch.Tensor:
    """[clips, 3], places in KINDS."""
    rows = [[c.shape, c.colour, c.motion] for c in clips]
    return torch.tensor([[kind.index(value) for kind, value in zip(KINDS, row, strict=True)] for row in rows])


def train_text_encoder(work: Path, tokenizer: T5Tokenizer, steps: int = 600) -> UMT5EncoderModel:
    """So that the state of every token of a caption tells all that the caption says, as far as one line can.

    umT5 knows what words mean before Wan is trained on it; a toy transformer that had to teach its text encoder would
    not learn what stands where in ten times as many steps.
    """
    torch.manual_seed(0)
    folder = work / "text_encoder"
    if not (folder / "model.safetensors").exists():
        encoder = UMT5EncoderModel(
            UMT5Config(
                vocab_size=len(tokenizer), d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, dropout_rate=0.0,
                relative_attention_num_buckets=8, relative_attention_max_distance=16,
            )
        )  # fmt: skip
        heads = torch.nn.Linear(encoder.config.d_model, sum(len(kind) for kind in KINDS))
        clips = video.all_clips()
        tokens = tokenize(tokenizer, [video.caption(clip) for clip in clips])
        labels = attribute_labels(clips)
        parameters = [*encoder.parameters(), *heads.parameters()]
        optimizer = torch.optim.AdamW(parameters, 2e-3, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps, pct_start=0.1)
        for step in range(steps):
            pick = torch.randint(len(clips), (64,), generator=torch.Generator().manual_seed(step))
            mask = tokens.attention_mask[pick]
            states = encoder(tokens.input_ids[pick], mask).last_hidden_state  # [64, tokens, d]
            logits = heads(states[mask.bool()]).split([len(kind) for kind in KINDS], dim=1)
            wanted = labels[pick].repeat_interleave(mask.sum(1), dim=0)
            loss = sum(F.cross_entropy(each, wanted[:, i]) for i, each in enumerate(logits))
            loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            if (step + 1) % 200 == 0:
                print(f"text encoder {step + 1}: loss {loss:.4f}", flush=True)
        encoder.save_pretrained(folder)
    return UMT5EncoderModel.from_pretrained(folder, dtype=torch.float32).requires_grad_(False).eval()


@torch.no_grad()
def embed(tokenizer: T5Tokenizer, encoder: UMT5EncoderModel, texts: list[str]) -> torch.Tensor:
    """[texts, tokens, d], zeros after the last token of each, as WanPipeline has it."""
    tokens = tokenize(tokenizer, texts)
    states = encoder(tokens.input_ids, tokens.attention_mask).last_hidden_state
    return states * tokens.attention_mask[..., None]


# ---------------------------------------------------------------------------------------------------------------------
# Transformer
# ---------------------------------------------------------------------------------------------------------------------


def new_transformer(text_dim: int) -> WanTransformer3DModel:
    return WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=6,
        attention_head_dim=32,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        text_dim=text_dim,
        freq_dim=128,
        ffn_dim=768,
        num_layers=6,
        rope_max_seq_len=64,
    )


@torch.no_grad()
def begin_at_identity(transformer: WanTransformer3DModel):
    """The untrained network's output is its input, which is most of v = eps - x0 where x0 is small.

    The norm before the last layer divides by the length of a token's state, and the length of noise varies. So that it
    hardly does, a constant that is longer stands beside the noise, at right angles to it and to the mean.
    """
    channels, width = LATENT_CHANNELS, transformer.patch_embedding.out_channels
    inputs = 4 * channels
    basis = torch.linalg.qr(torch.cat([torch.ones(width, 1), torch.randn(width, inputs + 1)], dim=1))[0]
    embedding, constant = basis[:, 1:-1], basis[:, -1]  # [width, inputs], [width]
    transformer.patch_embedding.weight.copy_(embedding.reshape(width, channels, 1, 2, 2))
    transformer.patch_embedding.bias.copy_(2.0 * inputs**0.5 * constant)
    length = (5.0 * inputs / width) ** 0.5  # root of the mean square of a state: 4 parts constant, 1 part noise
    projection = length * embedding.T.reshape(channels, 4, width).transpose(0, 1)  # its outputs: place, channel
    transformer.proj_out.weight.copy_(projection.reshape(inputs, width))
    transformer.proj_out.bias.zero_()
    transformer.scale_shift_table.zero_()
    for block in transformer.blocks:
        block.attn2.to_out[0].weight.zero_()
        block.attn2.to_out[0].bias.zero_()


@torch.no_grad()
def begin_with_neighbours(transformer: WanTransformer3DModel):
    """In each layer four heads look at the frame before and after, the row below, and the column to the right."""
    heads, width = transformer.config.num_attention_heads, transformer.config.attention_head_dim
    sides = 2 * (width // 6)  # channels of a head that turn with the row, and as many with the column
    first = {"frame": 0, "row": width - 2 * sides, "column": width - sides}
    size = {"frame": width - 2 * sides, "row": sides, "column": sides}
    along_time = {("frame", 0): 14.0, ("frame", 1): 8.0, ("row", 0): 5.0, ("column", 0): 5.0}  # squared lengths
    along_side = {("frame", 0): 8.0, ("frame", 1): 6.0, ("row", 0): 9.0, ("column", 0): 9.0}
    for block in transformer.blocks:
        queries, keys = block.attn1.to_q, block.attn1.to_k
        for layer in (queries, keys):
            layer.weight.mul_(0.5)
            layer.weight.unflatten(0, (heads, width))[:4].mul_(0.4)
            layer.bias.unflatten(0, (heads, width))[:4].zero_()
        for head, (axis, offset) in enumerate((("frame", -1), ("frame", 1), ("row", 1), ("column", 1))):
            for (turned, pair), square in (along_time if axis == "frame" else along_side).items():
                place = head * width + first[turned] + 2 * pair
                angle = offset * 10_000.0 ** (-2 * pair / size[turned]) if turned == axis else 0.0
                queries.bias[place] = square**0.5
                keys.bias[place], keys.bias[place + 1] = square**0.5 * math.cos(angle), -(square**0.5) * math.sin(angle)


class LongPadding(WanAttnProcessor):
    """Attends to a text as if it were padded with more zeros than it is, and costs no more.

    Wan pads texts with zeros and does not mask them. Zeros all have one key and one value: n of them weigh as much as
    one whose logit is larger by log n. `bias` [B, 1, 1, tokens] is 0, but log n for the last token.
    """

    bias = None

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
        return super().__call__(attn, hidden_states, encoder_hidden_states, self.bias, rotary_emb)


def split_parameters(transformer: WanTransformer3DModel):
    """The matrices of the blocks, for Muon; and all others, for AdamW."""
    matrices = [p for name, p in transformer.named_parameters() if name.startswith("blocks.") and p.ndim == 2]
    chosen = set(map(id, matrices))
    return matrices, [p for p in transformer.parameters() if id(p) not in chosen]


def make_optimizers(transformer: WanTransformer3DModel, rate: float, steps: int):
    """Optimizers, and their schedules over so many steps."""
    matrices, others = split_parameters(transformer)
    optimizers = [
        torch.optim.Muon(matrices, rate, weight_decay=0.01, momentum=0.95, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, rate / 2, betas=(0.9, 0.99), weight_decay=0.0),
    ]
    schedules = [
        torch.optim.lr_scheduler.OneCycleLR(
            optimizer, optimizer.defaults["lr"], steps, pct_start=0.1, cycle_momentum=False
        )
        for optimizer in optimizers
    ]
    return optimizers, schedules


def bfloat_velocity(transformer, x_t, sigma, texts):
    """bf16 products are four times as fast as fp32 ones on many CPUs, its fused attention's gradient is not."""
    with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
        return transformer(x_t, 1000 * sigma, texts).sample.float()


def learn_pictures(name: str, transformer, latents, text_of, embeds, pictures, steps: int = 500, batch_size: int = 64):
    """In the velocity, whatever the noise: the picture [texts, C, F, h, w] of a text."""
    optimizers, schedules = make_optimizers(transformer, 2e-3, steps)
    for step in range(steps):
        rng = torch.Generator().manual_seed(40_000_000 + step)
        pick = torch.randint(len(latents), (batch_size,), generator=rng)
        sigma = (0.7 + 0.6 * torch.rand(batch_size, generator=rng)).clamp(max=1.0)  # half of them is noise alone
        s = sigma.view(-1, 1, 1, 1, 1)
        x_t = (1 - s) * latents[pick] + s * torch.randn((batch_size, *latents.shape[1:]), generator=rng)
        out = bfloat_velocity(transformer, x_t, sigma, embeds[text_of[pick]])
        loss = F.mse_loss(out, x_t - pictures[text_of[pick]])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(transformer.parameters(), 1.0)
        for each in optimizers + schedules:
            each.step()
        transformer.zero_grad()
        if (step + 1) % 100 == 0:
            print(f"{name} {step + 1}: loss {loss:.4f}", flush=True)


def learn_where_and_when(transformer, latents, text_of, embeds, texts: list[str]):
    """First where a token is, then pictures of words, then each text's mean clip, enlarged.

    A rotary embedding says how far two tokens are apart, not where they are: that, only the clip's ends betray, to whom
    a neighbour is missing. A motion is a colour at a place at a time, and of what flow matching asks for under much
    noise a hundredth part. Left to itself it had found none after 7,600 steps of 64 clips: things had the right shape,
    the right colour, and moved anywhere. Asked for nothing else, the network takes some hundred steps for each.
    """
    rng, shape = torch.Generator().manual_seed(0), latents.shape[1:]
    places = 0.5 * torch.randn((1, *shape), generator=rng).expand(len(texts), *shape)
    learn_pictures("places", transformer, latents, text_of, embeds, places)
    labels = attribute_labels([video.read_caption(text) for text in texts])
    words = sum(
        size * torch.randn((len(kind), *shape), generator=rng)[labels[:, i]]
        for i, (kind, size) in enumerate(zip(KINDS, (0.25, 0.25, 0.5), strict=True))
    )
    learn_pictures("words", transformer, latents, text_of, embeds, words)
    sums = torch.zeros(len(texts), *shape).index_add_(0, text_of, latents)
    means = sums / text_of.bincount().view(-1, 1, 1, 1, 1)
    learn_pictures("means", transformer, latents, text_of, embeds, 5.0 * means)


def same_text(text_of, pick, count: int, rng) -> torch.Tensor:
    """Clips [B, count] of the text of each that is picked: itself, and others at random."""
    order = text_of.argsort()
    first, clips = torch.searchsorted(text_of[order], text_of[pick]), text_of.bincount()[text_of[pick]]
    others = first[:, None] + (clips[:, None] * torch.rand(len(pick), count - 1, generator=rng)).long()
    return torch.cat([pick[:, None], order[others]], dim=1)


def posterior_mean(x_t, sigma, clips):
    """Of x0, where it is one of `clips` [B, n, ...]: what flow matching learns on average, without the chance."""
    kept, flat = (1 - sigma).view(-1, 1, 1), clips.flatten(2)  # [B, n, D]
    apart = kept * flat.square().sum(2, keepdim=True) - 2 * flat @ x_t.flatten(1)[..., None]  # but for what all share
    weights = (-kept * apart / (2 * sigma.square().view(-1, 1, 1))).softmax(1)
    return (weights.mT @ flat).view_as(x_t)


SAME_TEXT = 48  # clips
AGREE = 0.25  # sigma below which a noisy clip says all that its caption says


def train_transformer(work: Path, transformer, begun: bool, latents, captions, embeds, steps: int, batch_size: int):
    """Flow matching on v = eps - x0; what is returned is the moving average. `embeds`: of each caption, and of ""."""
    torch.manual_seed(0)
    index = {text: i for i, text in enumerate(dict.fromkeys(captions))}
    embeds = torch.cat([embeds[text] for text in index] + [embeds[""]])  # [texts + 1, tokens, d]
    text_of = torch.tensor([index[text] for text in captions])
    extra = torch.log(torch.tensor([1.0, 1.0 + PIPELINE_TOKENS - TEXT_TOKENS]))
    padding = LongPadding()
    for block in transformer.blocks:
        block.attn2.set_processor(padding)
    optimizers, schedules = make_optimizers(transformer, 4e-4, steps)  # at 2e-3 it forgets the motions again
    state, done = work / "transformer.state", 0
    if state.exists():
        saved = torch.load(state, weights_only=True)
        transformer.load_state_dict(saved["transformer"])
        for each, values in zip(optimizers + schedules, saved["optimizers"] + saved["schedules"], strict=True):
            each.load_state_dict(values)
        ema, done = saved["ema"], saved["done"]
    else:
        if not begun:
            begin_at_identity(transformer)
            begin_with_neighbours(transformer)
            learn_where_and_when(transformer, latents, text_of, embeds, list(index))
        ema = [p.detach().clone() for p in transformer.parameters()]
    parameters = list(transformer.parameters())
    start, running = time.time(), 0.0
    for step in range(done, steps):
        rng = torch.Generator().manual_seed(step)
        pick = torch.randint(len(latents), (batch_size,), generator=rng)
        x0, eps = latents[pick], torch.randn((batch_size, *latents.shape[1:]), generator=rng)
        # One of each part, and not by the sampler's density: of that, one in seven is below a third. A half is where
        # shapes form, a quarter where backgrounds are chosen.
        sigma = (torch.arange(batch_size) + torch.rand(batch_size, generator=rng)) / batch_size
        sigma[::2] = 0.1 + 0.5 * sigma[::2]
        sigma[1::4] = 0.7 + 0.3 * sigma[1::4]
        sigma = sigma[torch.randperm(batch_size, generator=rng)]
        s = sigma.view(-1, 1, 1, 1, 1)
        x_t, v = (1 - s) * x0 + s * eps, eps - x0
        # Under much noise a clip could be any other of its text; where that is told at once, motions are learned.
        noisy = sigma > AGREE
        clips = latents[same_text(text_of, pick[noisy], SAME_TEXT, rng)]
        v[noisy] = (x_t[noisy] - posterior_mean(x_t[noisy], sigma[noisy], clips)) / s[noisy]
        # Some are seen with the empty prompt too, for guidance. Where noise is little, a noisy clip says
        # all that its caption says, so that the two predictions must agree: guidance multiplies what is left of it.
        twice = batch_size // 8
        rows = torch.cat([torch.arange(batch_size), torch.arange(twice)])
        texts = embeds[torch.cat([text_of[pick], torch.full((twice,), len(embeds) - 1)])]
        padding.bias = torch.zeros(len(rows), 1, 1, TEXT_TOKENS)
        padding.bias[..., -1] = extra[torch.randint(2, (len(rows),), generator=rng)].view(-1, 1, 1)
        out = bfloat_velocity(transformer, x_t[rows], sigma[rows], texts)
        out, out_uncond = out.split([batch_size, twice])
        v_uncond = torch.where((s < AGREE)[:twice], out.detach()[:twice], v[:twice])
        loss = F.mse_loss(out, v) + 0.125 * F.mse_loss(out_uncond, v_uncond)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for each in optimizers + schedules:
            each.step()
        transformer.zero_grad()
        torch._foreach_lerp_(ema, [p.detach() for p in parameters], 1.0 - min(0.998, (step + 1) / (step + 10)))
        running += F.mse_loss(out.detach(), v)
        if (step + 1) % 100 == 0 or step + 1 == steps:
            print(
                f"transformer {step + 1}: loss {running / (step % 100 + 1):.5f}, {time.time() - start:.0f} s",
                flush=True,
            )
            running = 0.0
            saved = {"transformer": transformer.state_dict(), "ema": ema, "done": step + 1}
            saved |= {"optimizers": [each.state_dict() for each in optimizers]}
            save_state(state, saved | {"schedules": [each.state_dict() for each in schedules]})
    for p, average in zip(parameters, ema, strict=True):
        p.data.copy_(average)
    for block in transformer.blocks:
        block.attn2.set_processor(WanAttnProcessor())
    return transformer.eval()


def new_scheduler() -> UniPCMultistepScheduler:
    """Wan's own."""
    return UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=FLOW_SHIFT, num_train_timesteps=1000
    )


# ---------------------------------------------------------------------------------------------------------------------
# Shards
# ---------------------------------------------------------------------------------------------------------------------


def animation(frames: np.ndarray) -> bytes:
    """A lossless animated WebP [F, H, W, 3], 16 frames a second."""
    frames = frames.copy()
    frames[1::2, 0, 0] ^= 1  # of two equal frames in a row it would make one that is shown twice as long
    first, *rest = [Image.fromarray(frame) for frame in frames]
    data = io.BytesIO()
    first.save(
        data, "webp", save_all=True, append_images=rest, duration=62, lossless=True, method=6, minimize_size=True
    )
    return data.getvalue()


def write_shards(folder: Path, clips: np.ndarray, captions: list[str], shards: int = 2):
    folder.mkdir(parents=True, exist_ok=True)
    for shard, part in enumerate(np.array_split(np.arange(len(clips)), shards)):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for i in part:
                add_member(tar, f"{i:06d}.webp", animation(clips[i]))
                add_member(tar, f"{i:06d}.txt", captions[i].encode())


def training_prompts() -> str:
    """All that this world's captions can say, a line each."""
    prompts = [video.caption(clip) for clip in video.all_clips()]
    np.random.default_rng(0).shuffle(prompts)
    return "\n".join(prompts) + "\n"


def main(argv=None):
    args = parse_args(argv)
    args.work.mkdir(parents=True, exist_ok=True)
    folder = args.output / "wan"
    if (folder / "vae").exists():
        vae = AutoencoderKLWan.from_pretrained(folder / "vae", dtype=torch.float32)
    else:
        vae = train_vae(args.work, args.vae_steps)
    latents, captions = draw_latents(args.work, args.clips)
    latents = normalize(vae, latents)
    tokenizer = make_tokenizer()
    text_encoder = train_text_encoder(folder if (folder / "text_encoder").exists() else args.work, tokenizer)
    embeds = {text: embed(tokenizer, text_encoder, [text]) for text in [*dict.fromkeys(captions), ""]}
    if begun := (folder / "transformer").exists():
        transformer = WanTransformer3DModel.from_pretrained(folder / "transformer", dtype=torch.float32)
    else:
        transformer = new_transformer(text_encoder.config.d_model)
    if args.compile:
        transformer.compile(dynamic=False)
    transformer = train_transformer(
        args.work, transformer, begun, latents, captions, embeds, args.transformer_steps, args.batch_size
    )
    vae.to(memory_format=torch.contiguous_format)
    pipeline = WanPipeline(tokenizer, text_encoder, vae, new_scheduler(), transformer)
    pipeline.to(torch.float16).save_pretrained(folder)
    (args.output / "wan_prompts.txt").write_text(training_prompts())
    write_shards(args.output / "shards_wan", *draw(30_000_000, args.shard_samples))


if __name__ == "__main__":
    main()
