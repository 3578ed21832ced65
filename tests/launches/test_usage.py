"""The lines that a run prints at its end generate, in a fresh process, what the run has shown."""

import json
import shutil
from pathlib import Path

import pytest

import train_dmd_distill_wan as wan_script
import train_lcm_distill_sd as script
import train_lcm_distill_sdxl as sdxl_script
from tests.helpers import short_wan_run, toy_shards
from tests.launches.helpers import asking, assert_shows, execute

pytestmark = pytest.mark.slow

PROMPT = "a small red circle at the top on a blue background"
DTYPES = ("float16", "bfloat16", None)  # of a text encoder, by its config: from_pretrained takes it from there

BF16 = "--mixed_precision bf16"
STUDENTS = ["--model_type full", "--lora_rank 4 --lora_alpha 8 --ema_decay 0.5", "--use_dora", "--export_pipeline"]
STUDENTS += ["--lora_rank 4 --validation_guidance 1.5 --validation_negative_prompt blue"]
STUDENTS += [f"--lora_rank 4 {BF16}", f"--model_type full {BF16}"]
WAN_STUDENTS = ["--lora_rank 4", "--use_ema", "--export_pipeline"]
WAN_STUDENTS += ["--lora_rank 4 --num_frame_per_block 1", "--num_frame_per_block 1"]
WAN_STUDENTS += [f"{each} --pretrained_t5_model_name_or_path ELSEWHERE" for each in ("--use_ema", "--export_pipeline")]
WAN_STUDENTS += [f"--lora_rank 4 {BF16}", f"--lora_rank 4 --num_frame_per_block 1 {BF16}"]

# The same random numbers as the run's: those of the stock pipeline and its scheduler, and those of a causal student
NOISE = """
import functools, numpy, PIL.Image, torch
from common.draws import Draws
from common.pictures import frame_strip
noise_of = functools.cache(lambda: Draws.of([torch.Generator().manual_seed(0)], torch.device("cpu")))
calls = iter(range(9))
def keyed(shape, **_):
    return keyed_normal(tuple(shape)[1:])(next(calls))
keyed_normal = functools.cache(lambda shape: noise_of().keyed_normal(*shape))
from diffusers.pipelines.wan import pipeline_wan
from diffusers.schedulers import scheduling_flow_match_lcm
pipeline_wan.randn_tensor = scheduling_flow_match_lcm.randn_tensor = lambda shape, **_: keyed(shape)
"""


def teachers(teacher: Path, folder: Path) -> list[Path]:
    """Copies of a teacher whose text encoders' configs say each of the precisions, or none.

    Weights of the last one are in files of a variant alone.
    """
    copies = []
    for dtype in DTYPES:
        copies.append(folder / f"teacher-{dtype}")
        shutil.copytree(teacher, copies[-1])
        for path in copies[-1].glob("text_encoder*/config.json"):
            config = {name: value for name, value in json.loads(path.read_text()).items() if "dtype" not in name}
            path.write_text(json.dumps(config | ({"dtype": dtype} if dtype else {})))
    for path in copies[-1].glob("*/*.safetensors"):
        path.rename(path.with_suffix(".fp16.safetensors"))
    return copies


def variant_of(teacher: Path) -> list[str]:
    return ["--teacher_variant", "fp16"] * any(teacher.glob("*/*.fp16.safetensors"))


def printed(capsys, folder: Path) -> str:
    """The last lines of a run, which its model card has, too."""
    usage = capsys.readouterr().out.partition(f"The model is in {folder}:\n\n")[2].rstrip("\n") + "\n"
    assert f"```python\n{usage}```" in (folder / "README.md").read_text()
    return usage


def levels(student: str, usage: str) -> float:
    """By how much a picture may differ from the run's, whose own networks were in fp32, or in bf16 by autocast."""
    assert ("torch.bfloat16" in usage) == (BF16 in student)
    return 5 if BF16 in student else 1


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_the_printed_lines_generate_the_picture_that_was_shown(family, request, tmp_path, capsys, one_process):
    shards, main = toy_shards(tmp_path / "shards"), {"sd": script, "sdxl": sdxl_script}[family]
    folders, lines, most = [], [], {}
    for teacher in teachers(request.getfixturevalue(f"{family}_teacher"), tmp_path):
        for i, student in enumerate(STUDENTS):
            folders.append(tmp_path / f"{teacher.name}-{i}")
            flags = f"--pretrained_teacher_model {teacher} --train_shards_path_or_url {shards} --resolution 32 "
            flags += f"--output_dir {folders[-1]} --train_batch_size 4 --max_train_steps 2 --report_to none --w_min 1 "
            flags += (
                f"--w_max 3 --report_steps= --disable_benchmark --learning_rate 1e-3 --bucket_alignment 8 {student}"
            )
            flags = [*flags.split(), *variant_of(teacher)]
            main.main(*main.parse_args([*flags, "--validation_prompt", PROMPT]))
            lines.append(asking(printed(capsys, folders[-1]), PROMPT))
            most[folders[-1]] = levels(student, lines[-1])
            one_process()
    for folder, shown in zip(folders, execute(lines, tmp_path), strict=True):
        assert_shows(folder / "samples.png", shown, most[folder])


def test_the_printed_lines_generate_the_clip_that_was_shown(wan_teacher, tmp_path, capsys, one_process):
    folders, lines, most = [], [], {}
    for teacher in teachers(wan_teacher, tmp_path):
        for i, student in enumerate(WAN_STUDENTS):
            name = f"{teacher.name}-{i}"
            flags = short_wan_run(teacher, tmp_path, name) + student.replace("ELSEWHERE", str(wan_teacher)).split()
            flags += ["--model_type", "lora" if "--lora_rank" in student else "full", *variant_of(teacher)]
            wan_script.main(*wan_script.parse_args([*flags, "--max_train_steps", "2", "--validation_prompt", PROMPT]))
            folders.append(tmp_path / name)
            usage = printed(capsys, folders[-1]).replace("your prompt", PROMPT)
            usage = usage.replace("torch.randn(shape, device=text.device)", "keyed_normal(shape[1:])(k)")
            most[folders[-1]] = levels(student, usage)
            lines.append(f"{NOISE}{usage}\nimage = frame_strip(numpy.asarray(video))\n")
            one_process()
    for folder, shown in zip(folders, execute(lines, tmp_path), strict=True):
        assert_shows(folder / "samples.png", shown, most[folder])
    assert (tmp_path / "clip.mp4").stat().st_size > 500
