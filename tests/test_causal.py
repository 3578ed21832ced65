"""Block-wise causal attention on the stock transformer: against one masked pass, with its cache, and its gradients."""

import pytest
import torch
from diffusers.models.attention_dispatch import attention_backend
from diffusers.models.transformers.transformer_wan import WanAttnProcessor

from common.draws import tied_noise
from common.plan.memory import Meter
from common.wan.causal import BlockCausal, block_ends, block_lengths, extend, first_tokens, roll_out
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
        with causal.at(start, cache, kept=kept):
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
    with causal.at(ends=block_ends(blocks, TOKENS)):
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
    with causal.at(0, kept=kept):
        call(network, x, t, text)
    with causal.at(3, extend(None, kept)):
        right = call(network, x, t, text)
    with causal.at(0, extend(None, kept)):
        wrong = call(network, x, t, text)
    assert (right - wrong).abs().max() > 1e-3


def test_outside_the_network_is_the_stock_one_bit_for_bit():
    x, t, text = inputs()
    network, stock = tiny_wan(), tiny_wan()
    causal = BlockCausal(network)
    with causal.at(3):
        call(network, x[:, :, :3], t, text)
    assert torch.equal(call(network, x, t, text), call(stock, x, t, text))
    with pytest.raises(RuntimeError), causal.at(3):
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
        with causal.at(0, kept=kept):
            call(network, first, torch.zeros(2), inputs()[2])
    constant = extend(None, [(k.clone(), v.clone()) for k, v in kept])
    _, _, text = inputs()
    noise = torch.randn(4, 2, 4, 6, 4, 4, generator=torch.Generator().manual_seed(0))[:, :, :, 3:]

    def v(x, t):
        with causal.at(3, constant):
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


@pytest.mark.parametrize("checkpointing", [False, True])
def test_what_a_rollout_keeps_grows_as_the_clip_does(checkpointing):
    """All bytes alive: four more blocks add as much as the four before them, though each sees all before it."""
    network, causal = trainable()
    if checkpointing:
        network.enable_gradient_checkpointing()
    kept = []
    for count in (4, 8, 12):
        with Meter([]) as meter:
            made = clip(network, causal, [1] * count, [0] * count)
            kept.append(meter.now)
            torch.cat(made, 2).square().mean().backward()
        del made
    first, second = kept[1] - kept[0], kept[2] - kept[1]
    piece = 2 * 2 * 2 * TOKENS * 24 * 4  # keys and values, layers, batch, tokens, channels, fp32
    print(f"{kept} bytes; of the cache {[(count - 1) * piece for count in (4, 8, 12)]}")
    assert first > 4 * piece and abs(second - first) < 0.02 * first


# ---------------------------------------------------------------------------------------------------------------------
# The rollout
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "frames, per_block, first, expected",
    [(21, 0, False, [21]), (21, 3, False, [3] * 7), (22, 3, True, [1] + [3] * 7), (21, 21, False, [21]),
     (28, 3, True, [1] + [3] * 9), (1, 3, True, [1])],
)  # fmt: skip
def test_blocks_of_a_clip(frames, per_block, first, expected):
    assert block_lengths(frames, per_block, first) == expected


def test_frames_that_do_not_fit_are_told_which_do():
    with pytest.raises(ValueError, match="31 latent frames do not split into blocks of 3, 30 or 33 do"):
        block_lengths(31, 3)
    with pytest.raises(ValueError, match="2 latent frames .* 3 do"):
        block_lengths(2, 3)
    with pytest.raises(ValueError, match="21 .* 19 or 22 do"):
        block_lengths(21, 3, True)


def calls_of(exits, blocks, steps=(1000.0, 757.0, 522.0), **options):
    """(t, start, frames, whether with gradient) of each evaluation, by a student that only notes them."""
    calls, weight = [], torch.ones((), requires_grad=True)

    def predict(x, t, start, cache):
        calls.append((t, start, x.shape[2], torch.is_grad_enabled()))
        return x * weight

    def remember(x, t, start, cache):
        calls.append(("cache", t, start, torch.is_grad_enabled()))
        return (cache or ()) + (start,)

    noise = torch.ones(1, 1, sum(blocks), 1, 1)
    made = list(roll_out(predict, remember, lambda k: noise, list(steps), blocks, exits, **options))
    return calls, made


def test_the_rollout_stops_at_the_exit_step_and_only_that_has_a_gradient():
    calls, made = calls_of([1, 0, 2], [2, 3, 3])
    assert calls == [
        (1000.0, 0, 2, False), (757.0, 0, 2, True), ("cache", 0.0, 0, False),
        (1000.0, 2, 3, True), ("cache", 0.0, 2, False),
        (1000.0, 5, 3, False), (757.0, 5, 3, False), (522.0, 5, 3, True),
    ]  # fmt: skip
    assert [x.shape[2] for x in made] == [2, 3, 3] and all(x.requires_grad for x in made)


def test_one_block_is_the_bidirectional_student_and_fills_no_cache():
    calls, _ = calls_of([2], [8])
    assert calls == [(1000.0, 0, 8, False), (757.0, 0, 8, False), (522.0, 0, 8, True)]
    network, stock = tiny_wan(), tiny_wan()
    (ours,) = clip(network, BlockCausal(network), blocks=(6,), exits=(0,))
    _, _, text = inputs()
    noise = torch.randn(4, 2, 4, 6, 4, 4, generator=torch.Generator().manual_seed(0))[0]
    torch.testing.assert_close(ours, noise - call(stock, noise, torch.full((2,), 1000.0), text), atol=1e-5, rtol=0)


def test_a_longer_rollout_has_a_gradient_in_its_last_frames_alone():
    calls, made = calls_of([0, 0, 0], [3, 3, 3], trained_from=6)
    assert [grad for name, *_, grad in calls if name != "cache"] == [False, False, True]
    assert [x.requires_grad for x in made] == [False, False, True]


def test_nothing_has_a_gradient_where_none_is_wanted():
    with torch.no_grad():
        calls, made = calls_of([1, 1], [3, 3])
    assert not any(grad for *_, grad in calls) and not any(x.requires_grad for x in made)


def test_context_noise_reaches_what_the_cache_is_made_of():
    contexts = []

    def remember(x, t, start, cache):
        contexts.append((x.clone(), t))

    noise = {0: torch.full((1, 1, 4, 1, 1), 2.0), None: torch.full((1, 1, 4, 1, 1), 10.0)}
    for level in (0.0, 100.0):
        list(roll_out(lambda x, t, *_: x * 0.5, remember, noise.__getitem__, [1000.0], [2, 2], [0, 0],
                      context_noise=level))  # fmt: skip
    (clean, t_clean), (noised, t_noised) = contexts
    assert (t_clean, t_noised) == (0.0, 100.0)
    torch.testing.assert_close(clean, torch.full((1, 1, 2, 1, 1), 1.0))
    torch.testing.assert_close(noised, torch.full((1, 1, 2, 1, 1), 0.9 * 1.0 + 0.1 * 10.0))


def test_blocks_come_one_by_one():
    """Streaming: the first is there before the second is begun."""
    seen = []
    rollout = roll_out(
        lambda x, t, start, cache: seen.append(start) or x, lambda *_: None, lambda k: torch.ones(1, 1, 4, 1, 1),
        [1000.0], [2, 2], [0, 0],
    )  # fmt: skip
    next(rollout)
    assert seen == [0]


# ---------------------------------------------------------------------------------------------------------------------
# The noise of trajectories
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frames, first, channels", [(9, 3, 27), (21, 3, 16), (21, 1, 16)])
def test_what_follows_from_a_clip_s_noise_follows_from_its_first_block_s_if_tied(frames, first, channels):
    """Brightness in each channel of a place, say: a sum over all frames. It is as large as of independent noise."""
    rng = torch.Generator().manual_seed(1)
    free = torch.randn(4096, channels, frames, 1, 2, generator=rng, dtype=torch.float64)
    tied = tied_noise(free, first)
    assert torch.equal(tied[:, :, :first], free[:, :, :first])

    def sums(noise):
        return noise.sum(2).flatten(1)

    def unexplained(noise) -> float:
        seen = noise[:, :, :first].flatten(1)
        rest = sums(noise) - seen @ torch.linalg.lstsq(seen, sums(noise)).solution
        return (rest.var() / sums(noise).var()).item()

    assert unexplained(tied) < 1e-20
    assert abs(unexplained(free) - (1 - first / frames)) < 0.05
    assert abs(sums(tied).var() / frames - 1) < 0.03
    assert (tied.square().mean((0, 1, 3, 4)) - 1).abs().max() < 0.02  # of each frame


def test_the_noise_of_a_clip_of_one_block_stays_as_it_is():
    noise = torch.randn(2, 4, 5, 2, 2)
    assert torch.equal(tied_noise(noise, 5), noise)


def test_every_attention_backend_is_asked(monkeypatch):
    """The processor goes through diffusers' dispatch, with the backend that the model was given."""
    network = tiny_wan()
    causal = BlockCausal(network)
    with attention_backend("native"):  # what is set inside is set for all networks, and put back at the end
        network.set_attention_backend("_native_math")
    import common.causal as module

    asked, original = [], module.dispatch_attention_fn
    monkeypatch.setattr(
        module, "dispatch_attention_fn", lambda *a, **k: asked.append(k["backend"].value) or original(*a, **k)
    )
    x, t, text = inputs()
    with causal.at(0):
        call(network, x, t, text)
    assert set(asked) == {"_native_math"} and len(asked) == 2
