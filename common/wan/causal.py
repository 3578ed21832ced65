"""Block-wise causal video on the stock WanTransformer3DModel.

A clip's latent frames are cut into blocks. Within a block attention is full; a block sees the clean blocks before it
through a cache of their keys and values, which carries no gradient. The cache has a piece for each earlier block, which
is never changed. Attention joins the pieces for the length of one call; neither autograd nor activation checkpointing
keeps the joined copy. A clip of one block is an ordinary, bidirectional one, and takes the same path.

CausVid (Yin et al. 2024, arXiv 2412.07772), Self-Forcing (Huang et al. 2025, arXiv 2506.08009).
"""

import contextlib
import functools
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from diffusers import WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanAttnProcessor

from common.networks import Kernels
from common.wan.parallel import heads_to_tokens, own_tokens, token_group, tokens_to_heads

Piece = Sequence[Sequence[torch.Tensor]]  # keys and values of each layer, [B, tokens, heads, D]
Cache = tuple[Piece, ...]  # in the order of time


class Context(NamedTuple):
    """Arguments of self-attention besides its input. They travel with the rotary embedding, an argument of each layer,
    so that activation checkpointing computes again with the values of the first time."""

    past: Cache | None  # of earlier blocks; a layer gets its own keys and values alone, [(k, v), ...]
    ends: tuple[int, ...] | None  # last token + 1 of each block, where the input is many blocks
    kept: list | None  # a list that collects each layer's keys and values; a layer gets a list for its own
    computed_again: bool  # whether activation checkpointing repeats the call in backward()


WHOLE = Context((), None, None, False)  # all of a clip


class BlockCausalAttention(Kernels, WanAttnProcessor):
    """Self-attention of any layer; without a Context it computes what the stock one does, bit for bit.

    Where processes share a clip's tokens, each of them attends from all tokens to all, in its share of the heads.
    """

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
        cos, sin, context = rotary_emb if len(rotary_emb) == 3 else (*rotary_emb, WHOLE)
        q, k, v = attn.norm_q(attn.to_q(hidden_states)), attn.norm_k(attn.to_k(hidden_states)), attn.to_v(hidden_states)
        q, k, v = (part.unflatten(2, (attn.heads, -1)) for part in (q, k, v))  # [B, L, C] -> [B, L, heads, D]
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        group = token_group(self)
        q, k, v = (tokens_to_heads(part, group) for part in (q, k, v))
        if context.kept is not None:
            context.kept.extend((k.detach(), v.detach()))
        past = context.past
        pieces = [k for k, _ in past] + [k], [v for _, v in past] + [v]
        k, v = (torch.cat(each, 1) if past else each[0] for each in pieces)
        earlier = k.shape[1] - q.shape[1]  # tokens
        save_joined = not past or context.computed_again or torch.compiler.is_compiling()
        with contextlib.nullcontext() if save_joined else saved_in_pieces((k, v), pieces):
            out = [
                self.attend(q[:, start:end], k[:, : earlier + end], v[:, : earlier + end])
                for start, end in pairwise((0, *(context.ends or (q.shape[1],))))
            ]
        out = heads_to_tokens(torch.cat(out, 1), group).flatten(2).type_as(q)
        for layer in attn.to_out:
            out = layer(out)
        return out


@torch.compiler.disable
def own_part(layer: int, block, inputs):
    """Inputs of a layer, with its own part of the Context. Compiled, all layers then have the same code: it neither
    counts layers nor pieces of the cache, which are joined before it, and takes a past of any length."""
    *others, rotary_emb = inputs
    if len(rotary_emb) == 2:
        return None
    *angles, context = rotary_emb
    past = [piece[layer] for piece in context.past or ()]
    if past and block._compiled_call_impl is not None:
        past = [tuple(torch.cat(each, 1) for each in zip(*past, strict=True))]
        for joined in past[0]:
            torch._dynamo.maybe_mark_dynamic(joined, 1)
    kept = None if context.kept is None else []
    if kept is not None:
        context.kept.append(kept)
    return *others, (*angles, context._replace(past=past, kept=kept))


def saved_in_pieces(joined, pieces):
    """Inside, autograd saves the pieces of a joined tensor in place of it and of its views, and joins them later."""
    pieces_of = {
        tensor.untyped_storage()._cdata: [piece.detach() for piece in each]
        for tensor, each in zip(joined, pieces, strict=True)
    }

    def pack(tensor):
        each = pieces_of.get(tensor.untyped_storage()._cdata)
        return tensor if each is None else (each, tensor.size(), tensor.stride(), tensor.storage_offset())

    def unpack(saved):
        if isinstance(saved, torch.Tensor):
            return saved
        each, *layout = saved
        return torch.cat(each, 1).as_strided(*layout)

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


def rotate(x, cos, sin):
    """Rotates each pair of channels of x [B, L, heads, D]; cos and sin [1, L, 1, D] have each pair's angle twice."""
    real, imaginary = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[..., ::2], sin[..., ::2]
    return torch.stack([real * cos - imaginary * sin, real * sin + imaginary * cos], -1).flatten(-2).type_as(x)


def own_attention(transformer: WanTransformer3DModel) -> WanTransformer3DModel:
    """The transformer itself, with this file's self-attention in place of the stock one."""
    for block in transformer.blocks:
        block.attn1.set_processor(BlockCausalAttention())
    return transformer


class BlockCausal:
    """Calls a transformer inside `block(...)` as for a block of a longer clip; other calls stay as they are."""

    def __init__(self, transformer: WanTransformer3DModel):
        self.call = None  # inside block(): its first frame, and a Context
        self.transformer = transformer
        own_attention(transformer)
        for layer, block in enumerate(transformer.blocks):
            block.register_forward_pre_hook(functools.partial(own_part, layer))
        transformer.rope.register_forward_pre_hook(self.lengthen)
        transformer.rope.register_forward_hook(self.cut)

    @contextlib.contextmanager
    def block(self, start: int = 0, past: Cache | None = None, ends: tuple[int, ...] | None = None, kept=None):
        """Inside, the transformer's input begins at frame `start` of the clip; see Context for the rest."""
        self.call = start, Context(past, ends, kept, self.transformer.gradient_checkpointing)
        try:
            yield
        finally:
            self.call = None

    def calls(self, velocity):
        """predict and remember, as `roll_out` takes them, by a velocity(x, t) that calls the transformer."""

        def predict(x, t, start, cache, kept=None):
            with self.block(start, cache, kept=kept):
                return velocity(x, t)

        def remember(x, t, start, cache):
            kept = []
            predict(x, t, start, cache, kept)
            return extend(cache, kept)

        return predict, remember

    def caches_before(self, velocity, clip, t, blocks: list[int]) -> list[Cache | None]:
        """The cache of each block of a clean clip [B, C, F, h, w], by one forward of all blocks."""
        _, rows, columns = self.transformer.config.patch_size
        tokens_per_frame, kept = clip.shape[3] // rows * (clip.shape[4] // columns), []
        with self.block(ends=block_ends(blocks, tokens_per_frame), kept=kept):
            velocity(clip, t)
        return [first_tokens(kept, start * tokens_per_frame) for start in accumulate(blocks[:-1], initial=0)]

    def lengthen(self, rope, inputs):
        """Lengthens the input of the rotary embedding, which begins at frame 0 and reads shapes alone."""
        if self.call is not None:
            batch, channels, frames, height, width = inputs[0].shape
            return (torch.empty(batch, channels, self.call[0] + frames, height, width, device="meta"),)

    def cut(self, rope, inputs, angles):
        """Cuts the angles of earlier frames off, and those of other processes' tokens; adds the Context."""
        if self.call is not None:
            start, context = self.call
            tokens = angles[0].shape[1] * start // inputs[0].shape[2]  # [1, L, 1, D] from frame 0 on
            # Copies, since a view would keep the angles of all frames in memory, and its strides tell of their number
            whole = torch.contiguous_format
            own = (own_tokens(part[:, tokens:], self.transformer).clone(memory_format=whole) for part in angles)
            return *own, context
        return tuple(own_tokens(part, self.transformer) for part in angles)


def extend(cache: Cache | None, kept: Piece) -> Cache:
    """A cache with one piece more; the old one, which backward() may need, stays as it is."""
    return *(cache or ()), kept


def first_tokens(kept: Piece, tokens: int) -> Cache | None:
    """A cache of the first tokens; None for no token."""
    return ([(k[:, :tokens], v[:, :tokens]) for k, v in kept],) if tokens else None


def block_ends(blocks: list[int], tokens_per_frame: int) -> tuple[int, ...]:
    """Last token + 1 of each block."""
    return tuple(tokens_per_frame * end for end in accumulate(blocks))
