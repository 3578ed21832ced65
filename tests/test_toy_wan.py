"""The toy Wan: what a launch without arguments takes, and its teacher."""

import shutil

import pytest

import train_dmd_distill_wan as script
from tests.toy import world_video as video
from tests.toy.make_wan import training_prompts
from tests.toy.teacher_wan import TOY, load, sample, toy_prompts

needs_teacher = pytest.mark.skipif(
    not (TOY / "wan").exists(), reason="the toy Wan is not in the repository yet: python -m tests.toy.make_wan"
)


def test_without_the_teacher_no_arguments_end_with_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(script, "TOY", tmp_path)
    with pytest.raises(SystemExit, match="^no --pretrained_teacher_model, and no toy one yet: python -m tests.toy"):
        script.parse_args([])


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """All of the toy but its teacher, which is not read while arguments are."""
    for name in ("wan_recipe.json", "wan_prompts.txt"):
        shutil.copy(TOY / name, tmp_path)
    (tmp_path / "wan").mkdir()
    monkeypatch.setattr(script, "TOY", tmp_path)
    return tmp_path


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_no_arguments_are_the_recipe(kind, toy):
    args = script.parse_args(["--model_type", kind])
    assert args.toy and args.notes[0].endswith(f"distilling the toy teacher by its recipe ({kind}).")
    assert args.pretrained_teacher_model == str(toy / "wan") and args.num_frames == video.FRAMES
    assert args.datasets[0].sizes == ((video.SIDE, video.SIDE),)
    assert script.blocks_of(args, 9) == [9] and args.steps == [1000.0, 757.0, 522.0]
    causal = script.parse_args(["--num_frame_per_block", "3", "--learning_rate", "0.5"])
    assert script.blocks_of(causal, 9) == [3, 3, 3] and causal.learning_rate == 0.5


def test_clips_of_one_s_own_take_the_place_of_the_toy_s_prompts(toy, tmp_path):
    (tmp_path / "clips").mkdir()
    (tmp_path / "clips" / "a.mp4").write_bytes(b"not read yet")
    args = script.parse_args(["--train_data_dir", str(tmp_path / "clips")])
    assert args.train_prompts is None and args.datasets[0].sizes == ()


def test_the_prompts_are_all_of_this_world():
    assert (TOY / "wan_prompts.txt").read_text() == training_prompts()
    assert sorted(training_prompts().splitlines()) == sorted(map(video.caption, video.all_clips()))


@needs_teacher
def test_the_teacher_follows_prompts_and_needs_its_steps():
    pipeline, prompts = load(TOY / "wan"), toy_prompts(32)
    many, few = (video.adherence(sample(pipeline, prompts, steps, 3.0, 0), prompts) for steps in (50, 3))
    assert many >= 0.85 and few < many - 0.2  # of 32; the README's table is exact
