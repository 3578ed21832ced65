"""Block-wise causal video on the stock WanTransformer3DModel.

A clip's latent frames are cut into blocks. Within a block attention is full; a block sees the clean blocks before it
through a cache of their keys and values, which carries no gradient. It is a piece for each of them, never written into
and never joined to the next: attention joins them for itself, and of what it does so neither autograd nor activation
checkpointing keeps a copy. A clip of one block is an ordinary, bidirectional one, and goes the same way.

CausVid (Yin et al. 2024, arXiv 2412.07772), Self-Forcing (Huang et al. 2025, arXiv 2506.08009).
"""

import contextlib
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from diffusers import WanTransformer3DModel
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.transformers.transformer_wan import WanAttnProcessor

from common.wan.parallel import heads_to_tokens, own_tokens, token_group, tokens_to_heads

Piece = Sequence[tuple[torch.Tensor, torch.Tensor]]  # of each layer keys and values, [B, tokens, heads, D]


Cache = tuple[Piece, ...]  # one after the other in time


class Context(NamedTuple):
    """What self-attention is told besides its input. It travels with the rotary embedding, an argument of each layer,
    so that activation checkpointing computes again with what was there the first time."""

    past: Cache | None  # of the frames before
    ends: tuple[int, ...] | None  # last token + 1 of each block, where the input is many blocks
    kept: list | None  # takes each layer's keys and values
    computed_again: bool  # in backward(), by activation checkpointing


class BlockCausalAttention(WanAttnProcessor):
    """Self-attention of one layer; without a Context it is the stock one.

    Where processes share a clip's tokens, each of them attends from all tokens to all, with its share of the heads.
    """

    def __init__(self, layer: int):
        super().__init__()
        self.layer = layer

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
        if len(rotary_emb) == 2:
            return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, rotary_emb)
        cos, sin, context = rotary_emb
        q, k, v = attn.norm_q(attn.to_q(hidden_states)), attn.norm_k(attn.to_k(hidden_states)), attn.to_v(hidden_states)
        q, k, v = (part.unflatten(2, (attn.heads, -1)) for part in (q, k, v))  # [B, L, C] -> [B, L, heads, D]
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        group = token_group(self)
        q, k, v = (tokens_to_heads(part, group) for part in (q, k, v))
        if context.kept is not None:
            context.kept.append((k.detach(), v.detach()))
        past = [piece[self.layer] for piece in context.past or ()]
        parts = [k for k, _ in past] + [k], [v for _, v in past] + [v]
        k, v = (torch.cat(each, 1) if past else each[0] for each in parts)
        before = k.shape[1] - q.shape[1]
        as_they_are = not past or context.computed_again or torch.compiler.is_compiling()
        with contextlib.nullcontext() if as_they_are else saved_in_parts((k, v), parts):
            out = [
                dispatch_attention_fn(
                    q[:, start:end], k[:, : before + end], v[:, : before + end], backend=self._attention_backend
                )
                for start, end in pairwise((0, *(context.ends or (q.shape[1],))))
            ]
        out = heads_to_tokens(torch.cat(out, 1), group).flatten(2).type_as(q)
        for layer in attn.to_out:
            out = layer(out)
        return out


def saved_in_parts(wholes, parts):
    """Inside, autograd saves no whole and no view of one, but the parts it is of, and joins them again."""
    parts_of = {
        whole.untyped_storage()._cdata: [part.detach() for part in each]
        for whole, each in zip(wholes, parts, strict=True)
    }

    def pack(tensor):
        known = parts_of.get(tensor.untyped_storage()._cdata)
        return tensor if known is None else (known, tensor.size(), tensor.stride(), tensor.storage_offset())

    def unpack(saved):
        if isinstance(saved, torch.Tensor):
            return saved
        known, *layout = saved
        return torch.cat(known, 1).as_strided(*layout)

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


def rotate(x, cos, sin):
    """Each pair of channels of x [B, L, heads, D] by its angle; cos and sin [1, L, 1, D] hold each angle twice."""
    real, imaginary = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[..., ::2], sin[..., ::2]
    return torch.stack([real * cos - imaginary * sin, real * sin + imaginary * cos], -1).flatten(-2).type_as(x)


class BlockCausal:
    """Makes a transformer's calls inside `block(...)` those of a block in a longer clip; others stay as they are."""

    def __init__(self, transformer: WanTransformer3DModel):
        self.call = None  # first frame and Context of the call that runs
        self.transformer = transformer
        for layer, block in enumerate(transformer.blocks):
            block.attn1.set_processor(BlockCausalAttention(layer))
        transformer.rope.register_forward_pre_hook(self.lengthen)
        transformer.rope.register_forward_hook(self.cut)

    @contextlib.contextmanager
    def block(self, start: int = 0, past: Cache | None = None, ends: tuple[int, ...] | None = None, kept=None):
        """The input's first frame is frame `start` of the clip."""
        self.call = start, Context(past, ends, kept, self.transformer.gradient_checkpointing)
        try:
            yield
        finally:
            self.call = None

    def calls(self, velocity):
        """predict and remember of `roll_out`, where velocity(x, t) calls the transformer."""

        def predict(x, t, start, cache, kept=None):
            with self.block(start, cache, kept=kept):
                return velocity(x, t)

        def remember(x, t, start, cache):
            kept = []
            predict(x, t, start, cache, kept)
            return extend(cache, kept)

        return predict, remember

    def caches_before(self, velocity, clip, t, blocks: list[int]) -> list[Cache | None]:
        """Keys and values before each block of a clean clip, [B, C, F, h, w], by one forward of all its blocks."""
        _, rows, columns = self.transformer.config.patch_size
        tokens, kept = clip.shape[3] // rows * (clip.shape[4] // columns), []  # tokens of a frame
        with self.block(ends=block_ends(blocks, tokens), kept=kept):
            velocity(clip, t)
        return [first_tokens(kept, start * tokens) for start in accumulate(blocks[:-1], initial=0)]

    def lengthen(self, rope, inputs):
        """The rotary embedding reads nothing of its input but the shape, and always begins at frame 0."""
        if self.call is not None:
            batch, channels, frames, height, width = inputs[0].shape
            return (torch.empty(batch, channels, self.call[0] + frames, height, width, device="meta"),)

    def cut(self, rope, inputs, angles):
        if self.call is not None:
            start, context = self.call
            tokens = angles[0].shape[1] * start // inputs[0].shape[2]  # [1, L, 1, D] from frame 0 on
            # Copies, as a view would keep the angles of all frames
            return *(own_tokens(part[:, tokens:], self.transformer).clone() for part in angles), context
        return tuple(own_tokens(part, self.transformer) for part in angles)


def extend(cache: Cache | None, kept: Piece) -> Cache:
    """A new cache; the old one, which backward() may need, stays as it is."""
    return *(cache or ()), kept


def first_tokens(kept: Piece, tokens: int) -> Cache | None:
    return ([(k[:, :tokens], v[:, :tokens]) for k, v in kept],) if tokens else None


def block_ends(blocks: list[int], tokens_per_frame: int) -> tuple[int, ...]:
    return tuple(tokens_per_frame * end for end in accumulate(blocks))
