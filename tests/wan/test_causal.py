"""Block-wise causal attention on the stock transformer: against one masked pass, with its cache, and its gradients."""

from types import SimpleNamespace

import pytest
import torch
from diffusers.models.attention_dispatch import attention_backend
from diffusers.models.transformers.transformer_wan import WanAttnProcessor

from common import networks
from common.planning.meter import Meter
from common.solvers import roll_out
from common.wan.causal import BlockCausal, block_ends, extend, first_tokens
from tests.helpers import tiny_wan

FRAMES, TOKENS = 6, 4  # latent frames, and tokens of each at 4x4


def inputs(batch: int = 2, frames: int = FRAMES, dtype=torch.float32):
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(batch, 4, frames, 4, 4, generator=rng).to(dtype)
    return x, torch.full((batch,), 757.0), torch.randn(batch, 8, 16, generator=rng).to(dtype)


def call(network, x, t, text):
    return network(x, t, text).sample


def rolled(network, causal, x, t, text, blocks):
    """Block by block, each after the clean context that the input itself is."""
    cache, start, parts = None, 0, []
    for length in blocks:
        block, kept = x[:, :, start : start + length], []
        with causal.block(start, cache, kept=kept):
            parts.append(call(network, block, t, text))
        cache = extend(cache, kept)
        start += length
    return torch.cat(parts, 2)


class MaskedAttention(WanAttnProcessor):
    """The stock processor with a mask over the whole clip: the reference, which knows of no cache."""

    def __init__(self, mask):
        super().__init__()
        self.mask = mask

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
        return super().__call__(attn, hidden_states, encoder_hidden_states, self.mask, rotary_emb)


def masked(x, t, text, blocks, dtype=torch.float32):
    """By a mask: a token sees those of its own block and of earlier ones."""
    network = tiny_wan().to(dtype)
    number = torch.repeat_interleave(torch.arange(len(blocks)), torch.tensor(blocks) * TOKENS)
    mask = number[:, None] >= number[None, :]
    for block in network.blocks:
        block.attn1.set_processor(MaskedAttention(mask[None, None]))
    return call(network, x, t, text)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("blocks", [[6], [3, 3], [1, 5], [2, 2, 2], [1] * 6])
def test_cached_blocks_equal_the_whole_clip_with_a_mask(blocks, dtype, tolerance):
    x, t, text = inputs(dtype=dtype)
    expected = masked(x, t, text, blocks, dtype)
    network = tiny_wan().to(dtype)
    causal = BlockCausal(network)
    torch.testing.assert_close(rolled(network, causal, x, t, text, blocks), expected, atol=tolerance, rtol=0)
    with causal.block(ends=block_ends(blocks, TOKENS)):
        torch.testing.assert_close(call(network, x, t, text), expected, atol=tolerance, rtol=0)


def test_blocks_depend_on_earlier_ones_alone():
    """And on them: a changed first block changes what follows, a changed last one nothing before."""
    x, t, text = inputs()
    network = tiny_wan()
    causal = BlockCausal(network)
    before = rolled(network, causal, x, t, text, [3, 3])
    for changed, same in ((slice(3, 6), slice(0, 3)), (slice(0, 3), None)):
        other = x.clone()
        other[:, :, changed] += 1.0
        after = rolled(network, causal, other, t, text, [3, 3])
        if same:
            assert torch.equal(after[:, :, same], before[:, :, same])
        assert (after[:, :, 3:] - before[:, :, 3:]).abs().max() > 1e-3


def test_the_offset_of_frames_matters():
    x, t, text = inputs(frames=3)
    network = tiny_wan()
    causal = BlockCausal(network)
    kept = []
    with causal.block(0, kept=kept):
        call(network, x, t, text)
    with causal.block(3, extend(None, kept)):
        right = call(network, x, t, text)
    with causal.block(0, extend(None, kept)):
        wrong = call(network, x, t, text)
    assert (right - wrong).abs().max() > 1e-3


def test_outside_the_network_is_the_stock_one_bit_for_bit():
    x, t, text = inputs()
    network, stock = tiny_wan(), tiny_wan()
    causal = BlockCausal(network)
    with causal.block(3):
        call(network, x[:, :, :3], t, text)
    assert torch.equal(call(network, x, t, text), call(stock, x, t, text))
    with pytest.raises(RuntimeError), causal.block(3):
        call(network, x[:, :3], t, text)  # fails in the middle
    assert torch.equal(call(network, x, t, text), call(stock, x, t, text))


def trainable():
    network = tiny_wan()
    network.blocks.requires_grad_(True)
    return network, BlockCausal(network)


def gradients(network, loss):
    network.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}


def student(network, causal, text):
    return causal.calls(lambda x, t: call(network, x, torch.full((len(x),), t), text))


def clip(network, causal, blocks=(3, 3), exits=(1, 1), seed=0, **options):
    _, _, text = inputs()
    noise = torch.randn(4, 2, 4, sum(blocks), 4, 4, generator=torch.Generator().manual_seed(seed))
    predict, remember = student(network, causal, text)
    draw = {0: noise[0], 1: noise[1], 2: noise[2], None: noise[3]}.__getitem__
    steps = [1000.0, 757.0, 522.0]
    return list(roll_out(predict, remember, draw, steps, list(blocks), list(exits), **options))


def test_checkpointing_gives_the_same_gradients():
    network, causal = trainable()
    plain = gradients(network, torch.cat(clip(network, causal), 2).square().mean())
    network.enable_gradient_checkpointing()
    recomputed = gradients(network, torch.cat(clip(network, causal), 2).square().mean())
    assert plain.keys() == recomputed.keys() and len(plain) > 20
    for name in plain:
        torch.testing.assert_close(recomputed[name], plain[name], atol=1e-7, rtol=1e-5)


def test_no_gradient_flows_between_blocks():
    """The second block's loss has the gradient of that block alone, its context a constant."""
    network, causal = trainable()
    _, second = clip(network, causal)
    ours = gradients(network, second.square().mean())

    with torch.no_grad():  # the same context, from a rollout that has no graph at all
        first, _ = clip(network, causal)
        kept = []
        with causal.block(0, kept=kept):
            call(network, first, torch.zeros(2), inputs()[2])
    constant = extend(None, [(k.clone(), v.clone()) for k, v in kept])
    _, _, text = inputs()
    noise = torch.randn(4, 2, 4, 6, 4, 4, generator=torch.Generator().manual_seed(0))[:, :, :, 3:]

    def v(x, t):
        with causal.block(3, constant):
            return call(network, x, torch.full((2,), t), text)

    with torch.no_grad():
        x0 = noise[0] - v(noise[0], 1000.0)
    x = (1 - 0.757) * x0 + 0.757 * noise[1]
    alone = gradients(network, (x - 0.757 * v(x, 757.0)).square().mean())
    for name in alone:
        torch.testing.assert_close(ours[name], alone[name], atol=1e-7, rtol=1e-5)


def test_a_cache_is_never_written_into():
    network, causal = trainable()
    seen = []
    _, _, text = inputs()
    predict, remember = student(network, causal, text)

    def watched(x, t, start, cache):
        longer = remember(x, t, start, cache)
        seen.append((longer, [[(k.clone(), v.clone()) for k, v in piece] for piece in longer]))
        return longer

    noise = torch.randn(2, 4, 6, 4, 4, generator=torch.Generator().manual_seed(0))
    list(roll_out(predict, watched, lambda k: noise, [1000.0], [2, 2, 2], [0, 0, 0]))
    assert len(seen) == 2  # none after the last block
    for cache, copy in seen:
        for piece, piece_then in zip(cache, copy, strict=True):
            for (k, v), (k_then, v_then) in zip(piece, piece_then, strict=True):
                assert not k.requires_grad and not v.requires_grad
                assert torch.equal(k, k_then) and torch.equal(v, v_then)
    (longer, _), (longest, _) = seen[0], seen[1]
    assert len(longest) == 2 and longest[0] is longer[0]  # it is not copied
    ((_, (k, v)),) = first_tokens(longer[0], 4)
    assert torch.equal(v, longer[0][1][1][:, :4]) and k.shape[1] == 4 and first_tokens(longer[0], 0) is None


@pytest.mark.parametrize("checkpointing, compiled", [(False, False), (True, False), (True, True)])
def test_what_a_rollout_keeps_grows_as_the_clip_does(checkpointing, compiled, graphs):
    """All bytes alive: four more blocks add as much as the four before them, though each sees all before it."""
    network, causal = trainable()
    if compiled:
        for block in network.blocks:
            block.compile(dynamic=False)
        clip(network, causal, [1] * 3, [0] * 3)  # nothing is compiled while bytes are counted
    if checkpointing:
        args = SimpleNamespace(compile=compiled, checkpoint_attention=not compiled, offload_activations=False)
        networks.checkpoint_activations(args, network, ("WanTransformerBlock",), True)
    kept = []
    for count in (4, 8, 12):
        with Meter(fake=False, block=1) as meter:
            made = clip(network, causal, [1] * count, [0] * count)
            kept.append(meter.total)
            torch.cat(made, 2).square().mean().backward()
        del made
    first, second = kept[1] - kept[0], kept[2] - kept[1]
    piece = 2 * 2 * 2 * TOKENS * 24 * 4  # keys and values, layers, batch, tokens, channels, fp32
    print(f"{kept} bytes; of the cache {[(count - 1) * piece for count in (4, 8, 12)]}")
    assert first > 4 * piece and abs(second - first) < 0.02 * first


@pytest.mark.parametrize("blocks", [[6], [1, 5], [2, 2, 2]])
def test_one_forward_of_a_clip_has_the_caches_of_its_blocks_one_by_one(blocks):
    """Keys and values carry no gradient, wherever they are asked for."""
    x, t, text = inputs()
    network, causal = trainable()

    def velocity(x, t):
        return call(network, x, torch.full((len(x),), t), text)

    caches, (_, remember) = causal.caches_before(velocity, x, 50.0, blocks), causal.calls(velocity)
    assert len(caches) == len(blocks) and caches[0] is None
    longer, start = None, 0
    for length, cache in zip(blocks, [*caches[1:], None], strict=True):
        longer = remember(x[:, :, start : start + length], 50.0, start, longer)
        start += length
        if cache is not None:
            for layer, (k, v) in enumerate(cache[0]):
                for found, place in ((k, 0), (v, 1)):
                    wanted = torch.cat([piece[layer][place] for piece in longer], 1)
                    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)
                    assert not found.requires_grad and not wanted.requires_grad


def test_one_block_is_the_bidirectional_student():
    network, stock = tiny_wan(), tiny_wan()
    (ours,) = clip(network, BlockCausal(network), blocks=(6,), exits=(0,))
    _, _, text = inputs()
    noise = torch.randn(4, 2, 4, 6, 4, 4, generator=torch.Generator().manual_seed(0))[0]
    torch.testing.assert_close(ours, noise - call(stock, noise, torch.full((2,), 1000.0), text), atol=1e-5, rtol=0)


def test_every_attention_backend_is_asked(monkeypatch):
    """The processor goes through diffusers' dispatch, with the backend that the model was given."""
    network = tiny_wan()
    causal = BlockCausal(network)
    with attention_backend("native"):  # what is set inside is set for all networks, and put back at the end
        network.set_attention_backend("_native_math")
    asked, original = [], networks.dispatch_attention_fn
    monkeypatch.setattr(
        networks, "dispatch_attention_fn", lambda *a, **k: asked.append(k["backend"].value) or original(*a, **k)
    )
    x, t, text = inputs()
    with causal.block(0):
        call(network, x, t, text)
    assert set(asked) == {"_native_math"} and len(asked) == 2


def test_compiled_all_layers_have_one_code_for_a_past_of_any_length(graphs):
    """Without a past, and with one; torch's own limit is 8 graphs."""
    x, t, text = inputs(frames=4)
    plain, network = tiny_wan(), tiny_wan()
    expected = rolled(plain, BlockCausal(plain), x, t, text, [1, 1, 1, 1])
    causal = BlockCausal(network)
    for block in network.blocks:
        block.compile(dynamic=False)
    with torch.no_grad():
        found = rolled(network, causal, x, t, text, [1, 1, 1, 1])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert graphs.count == 2
    graphs.check()
