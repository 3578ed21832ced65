"""The Wan script as a user starts it: by accelerate, in one process and in two that share weights or tokens."""

import json

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file

import train_dmd_distill_wan as script
from tests.helpers import launch, short_wan_run, without

pytestmark = pytest.mark.slow

SCRIPT = "train_dmd_distill_wan.py"
FULL, CAUSAL = "--model_type full", "--lora_rank 4 --num_frame_per_block 1"
LCM = "--distillation_method lcm"


def user_flags(teacher, tmp_path, output) -> list[str]:
    prompts = "a red ball", "a blue box", "a green star", "a red box"
    usual = short_wan_run(teacher, tmp_path, output, prompts)
    return [*usual, "--max_train_steps", "2", "--validation_prompt", "ball"]


def test_a_run_leaves_clips_a_card_and_a_report_of_teacher_and_student(wan_teacher, tmp_path):
    flags = user_flags(wan_teacher, tmp_path, "out")
    flags += [*FULL.split(), "--num_frame_per_block", 1, "--report_to", "tensorboard", "--report_steps", "3"]
    done, out = launch(SCRIPT, *flags, "--train_batch_size", 2), tmp_path / "out"
    (clip,) = (out / "validation").glob("step-000002/student-00-32x32.mp4")
    assert clip.stat().st_size > 200
    events = [path.read_bytes() for path in (out / "logs").rglob("events.out.tfevents.*")]
    assert any(b"clips/student-00-32x32" in content for content in events)
    rows = json.loads((out / "report.json").read_text())
    assert [(row["sampler"], row["steps"], row["evaluations"]) for row in rows] == [
        ("teacher", 50, 100), ("teacher, other noise", 50, 100), ("teacher", 3, 6), ("student", 3, 3 * 3 + 2),
    ]  # fmt: skip
    assert rows[0]["distance"] == 0.0 < min(row["distance"] for row in rows[1:])
    card, table = (out / "README.md").read_text(), "| student | 3 |"
    assert table in done.stdout and table in card and "side_by_side.png" in card and "roll_out(" in card
    for name in ("side_by_side.mp4", "side_by_side.png", "report.png"):
        assert (out / name).stat().st_size > 500
    assert (out / "samples.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("flags", "fsdp"), [("--fake_score_eps 1e-3", False), (LCM, False), (f"{LCM} --use_ema --ema_decay 0.5", True)]
)
def test_two_processes_with_half_the_batch_equal_one(flags, fsdp, wan_teacher, tmp_path):
    """Bidirectional and full; gradients are averaged once a step, whatever was called in between."""
    one, two = (user_flags(wan_teacher, tmp_path, output) + FULL.split() for output in ("one", "two"))
    if LCM in flags:
        one, two = (without(each, "--fake_score_lr") for each in (one, two))
    usual = ["--adam_epsilon", "1e-3", *flags.split()]
    script.main(*script.parse_args([*one, *usual, "--train_batch_size", "2"]))
    launch(SCRIPT, *two, *usual, "--train_batch_size", 1, processes=2, fsdp=fsdp)
    one, two = (load_file(tmp_path / output / "checkpoint-2" / "student.safetensors") for output in ("one", "two"))
    start = load_file(wan_teacher / "transformer" / "diffusion_pytorch_model.safetensors")
    assert max((one[key] - start[key]).abs().max() for key in one) > 1e-3
    for key in one:
        torch.testing.assert_close(two[key], one[key], atol=2e-5, rtol=0)


def assert_same_report(one, two):
    """Also of the exported student: its average, where there is one."""
    rows, others = (json.loads((folder / "report.json").read_text()) for folder in (one, two))
    assert [row["sampler"] for row in rows] == ["teacher", "teacher, other noise", "teacher", "student"]
    for row, other in zip(rows, others, strict=True):
        assert other | {"seconds": 0, "distance": 0} == row | {"seconds": 0, "distance": 0}
        assert other["distance"] == pytest.approx(row["distance"], rel=1e-3, abs=1e-6)
    assert (two / "side_by_side.png").stat().st_size > 500


def test_fsdp_equals_one_process_through_a_resume_and_exports_all_of_it(wan_teacher, tmp_path):
    """Self-forcing, so that a network is called many times before one backward(), with an average and checkpointing.
    A validation, which puts the average into the student, comes between two steps."""
    usual = f"{FULL} --num_frame_per_block 1 --gradient_checkpointing --use_ema --ema_decay 0.5 --adam_epsilon 1e-3"
    usual += " --fake_score_eps 1e-3"
    one, two = (user_flags(wan_teacher, tmp_path, output) + usual.split() for output in ("one", "two"))
    four = "--max_train_steps 4 --validation_steps 3 --report_steps 2".split()
    script.main(*script.parse_args([*one, *four, "--train_batch_size", "2"]))
    two += ["--train_batch_size", 1]
    launch(SCRIPT, *two, processes=2, fsdp=True)
    told = launch(SCRIPT, *two, *four, "--resume_from_checkpoint", "latest", processes=2, fsdp=True).stdout
    assert "resumed from" in told and "checkpoint-2" in told
    start = load_file(wan_teacher / "transformer" / "diffusion_pytorch_model.safetensors")
    for name in ("student", "fake_score", "ema"):
        whole, split = (load_file(tmp_path / each / "checkpoint-4" / f"{name}.safetensors") for each in ("one", "two"))
        assert whole.keys() == split.keys()
        assert max((whole[key] - start[key.replace("/", ".")]).abs().max() for key in whole) > 1e-3
        for key in whole:
            torch.testing.assert_close(split[key], whole[key], atol=2e-5, rtol=0)
    exported = WanTransformer3DModel.from_pretrained(tmp_path / "two", subfolder="transformer").state_dict()
    assert exported.keys() == start.keys()
    assert all(torch.equal(exported[key.replace("/", ".")], value) for key, value in split.items())
    assert (tmp_path / "two" / "samples.png").stat().st_size > 1000
    assert_same_report(tmp_path / "one", tmp_path / "two")


@pytest.mark.parametrize(
    "flags",
    [
        f"{CAUSAL} --use_ema --ema_decay 0.5 --train_batch_size 2 --report_steps 2",
        "--num_frame_per_block 2 --independent_first_frame --causal_init_steps 1 --context_noise 50"
        " --gradient_checkpointing",
    ],
)
def test_two_processes_that_share_the_tokens_equal_one(flags, wan_teacher, tmp_path):
    """On the same samples, self-forcing, whose fake score is as bidirectional as any; both generate.."""
    words = [*flags.split(), "--adam_epsilon", "1e-3", "--fake_score_eps", "1e-3", "--validation_steps", "1"]
    words += [] if "lora" in flags else FULL.split()
    one, two = (user_flags(wan_teacher, tmp_path, output) + words for output in ("one", "two"))
    script.main(*script.parse_args(one))
    launch(SCRIPT, *two, "--context_parallel_degree", 2, processes=2)
    for name in ("student", "fake_score", *(["ema"] if "ema" in flags else [])):
        one, two = (load_file(tmp_path / each / "checkpoint-2" / f"{name}.safetensors") for each in ("one", "two"))
        assert one.keys() == two.keys() and max(value.abs().max() for value in one.values()) > 1e-3
        for key in one:
            torch.testing.assert_close(two[key], one[key], atol=2e-5, rtol=0)
    states = (json.loads((tmp_path / each / "checkpoint-2" / "state.json").read_text()) for each in ("one", "two"))
    assert next(states)["stream"] == next(states)["stream"]
    if "report" in flags:
        assert_same_report(tmp_path / "one", tmp_path / "two")
