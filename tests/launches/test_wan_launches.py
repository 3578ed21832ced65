"""The Wan script as a user starts it: by accelerate, in one process and in two that share weights or tokens."""

import json
import shutil

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file
from torch.distributed import checkpoint as distributed_checkpoint
from torch.distributed.checkpoint import HuggingFaceStorageReader

import train_dmd_distill_wan as script
from tests.helpers import launch, short_wan_run, without

pytestmark = pytest.mark.slow

SCRIPT = "train_dmd_distill_wan.py"
FULL, CAUSAL = "--model_type full", "--lora_rank 4 --num_frame_per_block 1"
LCM = "--distillation_method lcm"


def saved(checkpoint, name: str) -> dict[str, torch.Tensor]:
    """Weights of a network in a checkpoint, and of a split one its moments, too."""
    if not (checkpoint / name).is_dir():
        return load_file(checkpoint / f"{name}.safetensors")
    reader = HuggingFaceStorageReader(str(checkpoint / name))
    found = {key: torch.empty(data.size) for key, data in reader.read_metadata().state_dict_metadata.items()}
    distributed_checkpoint.load(found, storage_reader=reader)
    return found


def saved_weights(checkpoint, name: str) -> dict[str, torch.Tensor]:
    return {key: value for key, value in saved(checkpoint, name).items() if not key.startswith("state.")}


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
    one, two = (saved_weights(tmp_path / output / "checkpoint-2", "student") for output in ("one", "two"))
    start = load_file(wan_teacher / "transformer" / "diffusion_pytorch_model.safetensors")
    assert max((one[key] - start[key]).abs().max() for key in one) > 1e-3
    for key in one:
        torch.testing.assert_close(two[key], one[key], atol=2e-5, rtol=0)


def test_gathering_in_bf16_changes_nothing_of_bf16():
    assert "all are alike" in launch("tests/launches/gathering.py", processes=2, fsdp=True).stdout


def test_a_lora_on_a_split_base_is_that_on_a_whole_one(wan_teacher, tmp_path):
    """Self-forcing with checkpointing, so that adapters change while blocks are gathered; stopped and resumed.

    To rounding: gradients of the two samples are added up in another order, as where nothing is split.
    """
    usual = f"{CAUSAL} --gradient_checkpointing --use_ema --ema_decay 0.5 --ema_device cpu --adam_epsilon 1e-3"
    usual += " --fake_score_eps 1e-3 --lora_dropout 0.0 --validation_steps 1"
    one, two = (user_flags(wan_teacher, tmp_path, output) + usual.split() for output in ("one", "two"))
    script.main(*script.parse_args([*one, "--train_batch_size", "2"]))
    launch(SCRIPT, *two, "--max_train_steps", 1, processes=2, fsdp=True)
    launch(SCRIPT, *two, "--resume_from_checkpoint", "latest", processes=2, fsdp=True)
    for name in ("student", "fake_score", "ema"):
        whole, split = (load_file(tmp_path / each / "checkpoint-2" / f"{name}.safetensors") for each in ("one", "two"))
        assert whole.keys() == split.keys() and max(whole[key].abs().max() for key in whole if "lora_B" in key) > 1e-3
        for key in whole:
            torch.testing.assert_close(split[key], whole[key], atol=2e-5, rtol=0)
    files = [tmp_path / each / "pytorch_lora_weights.safetensors" for each in ("one", "two")]
    exported = [load_file(file) for file in files]
    assert exported[0].keys() == exported[1].keys()


def assert_same_report(one, two):
    """Also of the exported student: its average, where there is one."""
    rows, others = (json.loads((folder / "report.json").read_text()) for folder in (one, two))
    assert [row["sampler"] for row in rows] == ["teacher", "teacher, other noise", "teacher", "student"]
    for row, other in zip(rows, others, strict=True):
        assert other | {"seconds": 0, "distance": 0} == row | {"seconds": 0, "distance": 0}
        assert other["distance"] == pytest.approx(row["distance"], rel=1e-3, abs=1e-6)
    assert (two / "side_by_side.png").stat().st_size > 500


def test_a_split_checkpoint_resumes_bit_for_bit_and_in_one_process(wan_teacher, tmp_path):
    """Nothing in it is a pickle. What goes on in one process is what goes on in two, to rounding."""
    usual = f"{FULL} --use_ema --optimizer lion --fake_score_eps 1e-3 --learning_rate 1e-3 --lr_scheduler cosine"
    usual += " --max_train_steps 4 --checkpointing_steps 2"  # the fake score has AdamW
    first, second, alone = (tmp_path / each for each in ("first", "second", "alone"))
    flags = {folder: [*user_flags(wan_teacher, tmp_path, folder.name), *usual.split()] for folder in (first, second)}
    again = ["--resume_from_checkpoint", "latest"]
    launch(SCRIPT, *flags[first], processes=2, fsdp=True)
    for folder in (second, alone):
        shutil.copytree(first / "checkpoint-2", folder / "checkpoint-2")
    launch(SCRIPT, *flags[second], *again, processes=2, fsdp=True)
    files = [path for path in (second / "checkpoint-4").rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".safetensors", ".json"}
    own = [*user_flags(wan_teacher, tmp_path, alone.name), *usual.split(), *again, "--train_batch_size", "2"]
    script.main(*script.parse_args(own))
    for name in ("student", "fake_score", "ema"):
        one, two = (saved(folder / "checkpoint-4", name) for folder in (first, second))
        assert one.keys() == two.keys() and all(torch.equal(value, two[key]) for key, value in one.items())
        for key, value in saved(alone / "checkpoint-4", name).items():
            torch.testing.assert_close(value, one[key], atol=2e-5, rtol=0)


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
        whole, split = (saved_weights(tmp_path / each / "checkpoint-4", name) for each in ("one", "two"))
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


def test_no_process_holds_a_network_that_it_has_a_part_of(wan_teacher, tmp_path):
    """In units of a network, of which two processes split three, and four moments of the same size; or a LoRA's base.

    The first process reads each network from its file, whose pages are not counted; one in bf16 it would hold whole.
    """
    teacher = shutil.copytree(wan_teacher, tmp_path / "teacher")
    sizes = {"num_attention_heads": 4, "attention_head_dim": 128, "ffn_dim": 2048, "num_layers": 12}
    network = WanTransformer3DModel(in_channels=4, out_channels=4, text_dim=16, freq_dim=16, **sizes)
    network.save_pretrained(teacher / "transformer")
    whole = sum(p.numel() for p in network.parameters()) * 4 / 2**20
    found = []
    for kind in (FULL, "--lora_rank 2"):
        flags = [*user_flags(teacher, tmp_path, "out"), *kind.split()]
        told = launch("tests/launches/held.py", *flags, processes=2, fsdp=True, MALLOC_MMAP_THRESHOLD_="65536").stdout
        rows = [line.split()[1:] for line in told.splitlines() if line.startswith("held ")]
        assert sorted(row[0] for row in rows) == ["0", "1"]
        found += [max(float(row[column]) / whole for row in rows) for column in range(1, len(rows[0]))]
    loading, parts, saving, resuming, loading_lora, parts_lora = found
    assert 1.5 <= parts < 1.55 and loading < 1.9, found
    assert 0.5 <= parts_lora < 0.55 and loading_lora < 0.9, found
    assert saving < 0.8, found  # files of a third of a network, or 0.16 for each process
    assert resuming < 2.9, found  # the moments are 2, and a network's gradients 0.5
