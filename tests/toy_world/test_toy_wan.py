"""The toy Wan: what a launch without arguments takes, and its teacher."""

import pytest
import torch
from diffusers.models.transformers import transformer_wan

import train_dmd_distill_wan as script
from tests.toy import world_video as video
from tests.toy.make_wan import (
    begin_at_identity,
    begin_with_neighbours,
    new_transformer,
    posterior_mean,
    same_text,
    training_prompts,
)
from tests.toy.teacher_wan import TOY, load, sample, toy_prompts


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_no_arguments_are_the_recipe(kind):
    args, data, method, notes = script.parse_args(["--model_type", kind])
    assert args.pretrained_teacher_model is None and script.teacher_of(args) == str(TOY / "wan")
    assert notes[0].endswith(f"distilling the toy teacher by its recipe ({kind}).")
    assert args.num_frames == video.FRAMES and data.datasets[0].sizes == ((video.SIDE, video.SIDE),)
    assert script.blocks_of(args, 9) == [9] and method.steps == [1000.0, 757.0, 522.0]
    assert script.parse_args([] if kind == "full" else ["--lora_rank", "8"])[0].model_type == kind
    causal, *_ = script.parse_args(["--num_frame_per_block", "3", "--learning_rate", "0.5"])
    assert script.blocks_of(causal, 9) == [3, 3, 3] and causal.learning_rate == 0.5
    assert causal.causal_init_steps > args.causal_init_steps > 0  # self-forcing has settings of its own


def test_clips_of_one_s_own_take_the_place_of_the_toy_s_prompts(tmp_path):
    (tmp_path / "clips").mkdir()
    (tmp_path / "clips" / "a.mp4").write_bytes(b"not read yet")
    args, data, *_ = script.parse_args(["--train_data_dir", str(tmp_path / "clips")])
    assert args.train_prompts is None and data.source == "--train_data_dir" and data.datasets[0].sizes == ()


def test_the_prompts_are_all_of_this_world():
    assert (TOY / "wan_prompts.txt").read_text() == training_prompts()
    assert sorted(training_prompts().splitlines()) == sorted(map(video.caption, video.all_clips()))


def test_the_posterior_mean_is_that_of_a_mixture():
    torch.manual_seed(0)
    clips, sigma = 0.3 * torch.randn(2, 5, 3, 2, 2), torch.tensor([0.3, 0.9])
    x_t = (1 - sigma).view(-1, 1, 1, 1) * clips[:, 0] + sigma.view(-1, 1, 1, 1) * torch.randn(2, 3, 2, 2)
    for i in range(2):
        each = torch.distributions.Normal((1 - sigma[i]) * clips[i].double(), sigma[i].double())
        share = each.log_prob(x_t[i].double()).flatten(1).sum(1).softmax(0)
        wanted = (share.view(-1, 1, 1, 1) * clips[i]).sum(0)
        torch.testing.assert_close(posterior_mean(x_t, sigma, clips)[i].double(), wanted, atol=1e-5, rtol=0)


def test_clips_of_the_same_text_are_the_picked_one_and_any_other():
    text_of, rng = torch.tensor([2, 0, 1, 0, 2, 1, 0]), torch.Generator().manual_seed(0)
    clips = same_text(text_of, torch.tensor([4, 1, 2]), 50, rng)
    assert clips[:, 0].tolist() == [4, 1, 2]
    assert [sorted(set(row)) for row in clips.tolist()] == [[0, 4], [1, 3, 6], [2, 5]]


def test_the_untrained_transformer_s_heads_look_at_their_neighbours(monkeypatch):
    seen, attention = [], transformer_wan.dispatch_attention_fn

    def kept(q, k, v, **options):
        seen.append(torch.einsum("bqhd,bkhd->hqk", q, k).argmax(-1))
        return attention(q, k, v, **options)

    torch.manual_seed(0)
    transformer = new_transformer(64)
    begin_at_identity(transformer)
    begin_with_neighbours(transformer)
    monkeypatch.setattr(transformer_wan, "dispatch_attention_fn", kept)
    with torch.no_grad():
        transformer(torch.randn(1, 27, 9, 4, 4), torch.tensor([900.0]), torch.randn(1, 16, 64))
    token = 4 * 4  # of the fifth frame's four, that above on the left
    assert seen[0][:4, token].tolist() == [token - 4, token + 4, token + 2, token + 1]


@pytest.mark.slow
def test_the_teacher_follows_prompts_and_needs_its_steps():
    pipeline, prompts = load(TOY / "wan"), toy_prompts(32)
    _, _, method, _ = script.parse_args([])
    many, few = (
        video.adherence(sample(pipeline, prompts, steps, method.teacher_guidance, 0), prompts) for steps in (50, 3)
    )
    assert many >= 0.9 and few < many - 0.2  # of 32; the README's table is exact
