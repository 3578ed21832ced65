"""Plans of the three scripts, against what their own runs hold."""

import pytest

import train_dmd_distill_wan as wan
import train_lcm_distill_sd as sd
import train_lcm_distill_sdxl as sdxl
from common.plan.meter import Meter
from common.plan.phases import measure
from tests.helpers import short_wan_run
from tests.lcm import SHORT

TWO_STEPS = ["--max_train_steps", "2", "--mixed_precision"]


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


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize(
    ("script", "flags"),
    [
        (sd, "--lora_rank 8"),
        (sd, ""),
        (sd, "--gradient_checkpointing --optimizer lion --gradient_accumulation_steps 2"),
        (sdxl, "--lora_rank 8 --ema_decay 0.9"),
    ],
)
def test_a_plan_is_what_an_lcm_run_holds(
    script, flags, precision, sd_teacher, sdxl_teacher, small_shards, tmp_path, held
):
    teacher = sd_teacher if script is sd else sdxl_teacher
    parsed = script.parse_args(
        [
            "--pretrained_teacher_model", str(teacher), "--output_dir", str(tmp_path / "out"),
            "--train_shards_path_or_url", f"{small_shards}/{{00000..00001}}.tar", *SHORT.split(), "--disable_benchmark",
            *TWO_STEPS, precision, *flags.split(),
        ]
    )  # fmt: skip
    planned, real = training(script, parsed), held(script, parsed)
    print(f"planned {planned:,} bytes, held {real:,}")
    assert planned == pytest.approx(real, rel=0.03)


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize(
    "flags",
    [
        "--lora_rank 4",
        "--model_type full",
        "--lora_rank 4 --num_frame_per_block 1",
        "--lora_rank 4 --distillation_method lcm",
    ],
)
def test_a_plan_is_what_a_wan_run_holds(flags, precision, wan_teacher, tmp_path, held):
    usual = [flag for flag in short_wan_run(wan_teacher, tmp_path)]
    if "lcm" in flags:
        i = usual.index("--fake_score_lr")
        del usual[i : i + 2]
    parsed = wan.parse_args(
        [*usual, *["--last_step_only"] * ("lcm" not in flags), *TWO_STEPS, precision, *flags.split()]
    )
    planned, real = training(wan, parsed), held(wan, parsed)
    print(f"planned {planned:,} bytes, held {real:,}")
    assert planned == pytest.approx(real, rel=0.03)
