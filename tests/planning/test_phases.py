"""Plans of the three scripts, against what their own runs hold, and what --plan prints."""

import os
import shutil
from collections import Counter

import pytest

import train_dmd_distill_wan as wan
import train_lcm_distill_sd as sd
import train_lcm_distill_sdxl as sdxl
from common.planning import phases
from common.planning.meter import Meter
from common.planning.phases import measure
from tests.helpers import short_wan_run
from tests.lcm import SHORT

TWO_STEPS = ["--max_train_steps", "2", "--mixed_precision", "bf16"]


@pytest.fixture
def held(monkeypatch, one_process):
    """`held(script, parsed)`: the most bytes that training holds, on real tensors, from full caches."""

    def run(script, parsed) -> int:
        found, meter, bar = [], Meter(fake=False), script.tqdm
        script.main(*parsed)  # fills the caches
        one_process()
        with monkeypatch.context() as patch:
            patch.setattr(script, "tqdm", lambda **options: meter.start() or bar(**options))
            patch.setattr(script, "end_run", lambda *_, **__: found.append(meter.peak))
            with meter:
                script.main(*parsed)
        one_process()
        return found[0]

    return run


def training(script, parsed) -> int:
    args, *rest = parsed
    (phase,) = [phase for phase in measure(script.main, args, rest, cuda=False) if phase.name == "training"]
    return phase.total


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "flags"),
    [
        (sd, "--lora_rank 8"),
        (sd, "--lora_rank 8 --mixed_precision no"),
        (sd, ""),
        (sd, "--gradient_checkpointing --optimizer lion --gradient_accumulation_steps 2"),
        (sdxl, "--lora_rank 8 --ema_decay 0.9"),
    ],
)
def test_a_plan_is_what_an_lcm_run_holds(script, flags, sd_teacher, sdxl_teacher, small_shards, tmp_path, held):
    teacher = sd_teacher if script is sd else sdxl_teacher
    parsed = script.parse_args(
        [
            "--pretrained_teacher_model", str(teacher), "--output_dir", str(tmp_path / "out"),
            "--train_shards_path_or_url", f"{small_shards}/{{00000..00001}}.tar", *SHORT.split(), "--disable_benchmark",
            *TWO_STEPS, *flags.split(),
        ]
    )  # fmt: skip
    planned, real = training(script, parsed), held(script, parsed)
    print(f"planned {planned:,} bytes, held {real:,}")
    assert planned == pytest.approx(real, rel=0.03)


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        "--lora_rank 4",
        "--lora_rank 4 --mixed_precision no",
        "--model_type full",
        "--lora_rank 4 --num_frame_per_block 1",
        "--lora_rank 4 --distillation_method lcm",
    ],
)
def test_a_plan_is_what_a_wan_run_holds(flags, wan_teacher, tmp_path, held):
    usual = [flag for flag in short_wan_run(wan_teacher, tmp_path)]
    if "lcm" in flags:
        i = usual.index("--fake_score_lr")
        del usual[i : i + 2]
    parsed = wan.parse_args([*usual, *["--last_step_only"] * ("lcm" not in flags), *TWO_STEPS, *flags.split()])
    planned, real = training(wan, parsed), held(wan, parsed)
    print(f"planned {planned:,} bytes, held {real:,}")
    assert planned == pytest.approx(real, rel=0.03)


# ---------------------------------------------------------------------------------------------------------------------
# What a user sees
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def planning(sd_teacher, small_shards, tmp_path):
    """`planning(flags)`: what the SD script's main takes, for a teacher without weights."""
    configs = shutil.copytree(sd_teacher, tmp_path / "configs", ignore=shutil.ignore_patterns("*.safetensors"))

    def parsed(flags: str):
        return sd.parse_args(
            [
                "--pretrained_teacher_model", str(configs), "--output_dir", str(tmp_path / "out"),
                "--train_shards_path_or_url", f"{small_shards}/{{00000..00001}}.tar", *SHORT.split(), *flags.split(),
            ]
        )  # fmt: skip

    return parsed


def test_a_user_asks_for_a_plan(planning, tmp_path, capsys):
    """And gets it where there are no weights to load. Nothing is left behind."""
    sd.main(*planning("--lora_rank 4 --plan"))
    told = capsys.readouterr().out
    for word in ("filling the caches", "training", "validation", "export", "moments", "TFLOP", "H100", "A100", "4090"):
        assert word in told
    assert "fit into" not in told and not (tmp_path / "out").exists() and Meter.running is None  # there is no GPU here


def test_advice_makes_it_fit_or_says_that_it_does_not(planning, capsys, monkeypatch):
    """Of plans whose numbers are given: 20 GB, of which checkpointing spares 6, and a batch of one another 10."""

    def planned(main, args, rest):
        size = 20e9 - 6e9 * args.gradient_checkpointing - 10e9 * (args.train_batch_size == 1)
        return [phases.Phase("training", Counter({"activations": int(size)}), Counter({"attention": 1}), True)]

    monkeypatch.setattr(phases, "measure", planned)
    for room, steps in ((22, None), (16, 1), (10, 2), (3, 3)):
        sd.main(*planning(f"--lora_rank 64 --train_batch_size 8 --plan {room}"))
        told = capsys.readouterr().out
        assert ("fits into" in told) == (steps is None)
        for i, words in enumerate(("--gradient_checkpointing", "--train_batch_size 1", "and still not")):
            assert (words in told) == (steps is not None and i < steps)


def test_of_many_processes_one_speaks(planning, capsys, monkeypatch):
    monkeypatch.setitem(os.environ, "RANK", "1")
    sd.main(*planning("--plan"))
    assert capsys.readouterr().out == ""


@pytest.mark.slow
def test_processes_that_split_a_network_each_have_a_part(wan_teacher, tmp_path, monkeypatch):
    """Of weights and moments; the others send nothing, and are not there."""
    monkeypatch.setattr(Meter.__init__, "__defaults__", (True, 1))  # the small tensors here would fill whole blocks
    args, *rest = wan.parse_args([*short_wan_run(wan_teacher, tmp_path), "--model_type", "full"])
    (whole,) = [phase for phase in measure(wan.main, args, rest) if phase.name == "training"]
    launched = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    for name, value in (launched | {"MASTER_PORT": "0", "ACCELERATE_USE_FSDP": "true"}).items():
        monkeypatch.setenv(name, value)
    (split,) = [phase for phase in measure(wan.main, args, rest) if phase.name == "training"]
    for kind in ("weights of the student", "moments"):
        assert split.bytes[kind] == pytest.approx(whole.bytes[kind] / 2, rel=0.05)
