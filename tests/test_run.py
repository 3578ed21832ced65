"""Beginning and end of a run, with stand-ins for all that is between."""

import json
import os
from collections import Counter
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, InitProcessGroupKwargs
from PIL import Image

from common import run
from common.data.buckets import Rules
from common.run import (
    Saver,
    available_cores,
    check_finite,
    end_run,
    machine_defaults,
    open_repository,
    start_run,
)


def flags(folder, **more) -> SimpleNamespace:
    usual = {
        "mixed_precision": None, "report_to": "none", "output_dir": str(folder), "logging_dir": "logs", "seed": 3,
        "pretrained_teacher_model": "x", "allow_tf32": False, "checkpoints_total_limit": None, "push_to_hub": False,
        "model_type": "lora", "push_checkpoints_to_hub": False, "hub_token": None, "hub_model_id": None,
    }  # fmt: skip
    return SimpleNamespace(**usual | more)


# ---------------------------------------------------------------------------------------------------------------------
# Beginning
# ---------------------------------------------------------------------------------------------------------------------


def test_a_run_begins_with_its_notes_and_its_seed(tmp_path, capsys):
    accelerator, dtype = start_run(flags(tmp_path), ["first", "second"], gradient_accumulation_steps=3)
    assert capsys.readouterr().out == "first\nsecond\n"
    assert accelerator.gradient_accumulation_steps == 3 and dtype == torch.float32
    assert accelerator.project_configuration.logging_dir == str(tmp_path / "logs")
    drawn = torch.rand(3)
    torch.manual_seed(3)
    assert torch.equal(torch.rand(3), drawn)


def test_processes_wait_for_each_other_for_longer_than_nccl_would(tmp_path, monkeypatch):
    given = []
    on_cpu = SimpleNamespace(mixed_precision="no", device=torch.device("cpu"), distributed_type=DistributedType.NO)
    monkeypatch.setattr(run, "Accelerator", lambda **options: (given.append(options), on_cpu)[1])
    start_run(flags(tmp_path), [])
    (patience,) = given[0]["kwargs_handlers"]
    assert isinstance(patience, InitProcessGroupKwargs) and patience.timeout >= timedelta(hours=1)


def test_frozen_networks_have_the_precision_of_the_run(tmp_path):
    assert start_run(flags(tmp_path, mixed_precision="bf16"), [])[1] == torch.bfloat16


@pytest.mark.parametrize("allowed", [True, False])
def test_tf32_is_as_the_flag_says(allowed, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.backends.cuda, "matmul", SimpleNamespace(allow_tf32=None))  # the process's own stays
    start_run(flags(tmp_path, allow_tf32=allowed), [])
    assert torch.backends.cuda.matmul.allow_tf32 == allowed


@pytest.mark.parametrize(
    ("name", "what"), [("DEEPSPEED", "DeepSpeed"), ("MEGATRON_LM", "Megatron-LM"), ("FSDP", "FSDP")]
)
def test_what_accelerates_config_has_and_a_script_has_not_is_one_sentence(name, what, tmp_path, monkeypatch):
    """Before accelerate asks for a package that is not there."""
    monkeypatch.setenv(f"ACCELERATE_USE_{name}", "true")
    monkeypatch.setattr(run, "Accelerator", lambda **_: pytest.fail("accelerate has prepared it"))
    with pytest.raises(SystemExit, match=f"config has {what}: not supported by this script, use .*MULTI_GPU$"):
        start_run(flags(tmp_path), [])
    instead = pytest.fail.Exception if name == "FSDP" else SystemExit
    with pytest.raises(instead):
        start_run(flags(tmp_path), [], splits=True)


@pytest.mark.parametrize(
    ("device", "settings", "said"),
    [
        ("cpu", {}, None), ("cuda", {}, None), ("cuda", {"hip": "6.4"}, "ROCm: works as CUDA"),
        ("mps", {}, "Apple's MPS: nobody has tried"), ("xpu", {}, "xpu: nobody has tried these scripts"),
    ],
)  # fmt: skip
def test_a_machine_that_nobody_tried_is_told(device, settings, said, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", settings.get("hip"))
    machine = SimpleNamespace(device=torch.device(device), distributed_type=DistributedType.NO)
    notes = run.check_machine(flags(tmp_path, base_model_precision="no_change"), machine)
    assert [note.startswith(said) for note in notes] == [True] * (said is not None)


@pytest.mark.parametrize(
    ("kind", "device", "said"),
    [
        (DistributedType.XLA, "cpu", "accelerate's config has a TPU: not supported"),
        (DistributedType.NO, "mps", "--base_model_precision int8-torchao: not supported on Apple's MPS"),
    ],
)
def test_a_machine_on_which_it_cannot_work_is_one_sentence(kind, device, said, tmp_path):
    machine = SimpleNamespace(device=torch.device(device), distributed_type=kind)
    with pytest.raises(SystemExit, match=said):
        run.check_machine(flags(tmp_path, base_model_precision="int8-torchao"), machine)


def test_accelerate_compiles_nothing_itself(tmp_path, monkeypatch):
    """Its config's backend is that of --compile, block by block."""
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
    accelerator, _ = start_run(flags(tmp_path), [])
    layer = torch.nn.Linear(2, 2)
    assert type(accelerator.prepare(layer)) is type(layer)


def test_fp16_on_a_cpu_is_one_sentence(tmp_path, monkeypatch):
    on_cpu = SimpleNamespace(
        mixed_precision="fp16", device=torch.device("cpu"), print=print, distributed_type=DistributedType.NO
    )
    monkeypatch.setattr(run, "Accelerator", lambda **_: on_cpu)
    with pytest.raises(SystemExit, match="--mixed_precision fp16: needs a GPU; a CPU takes no or bf16"):
        start_run(flags(tmp_path, mixed_precision="fp16"), [])


@pytest.mark.parametrize(("teacher", "threads"), [(None, available_cores()), ("x", None)])
def test_the_toy_has_all_of_the_machine(teacher, threads, tmp_path, monkeypatch):
    found = []
    monkeypatch.setattr(torch, "set_num_threads", found.append)
    start_run(flags(tmp_path, pretrained_teacher_model=teacher), [])
    assert found == ([threads] if threads else [])


def test_cores_are_counted_on_macos_too(monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity")
    assert available_cores() == os.cpu_count()


@pytest.mark.parametrize(
    ("gpu", "cores", "processes", "workers"),
    [(True, 16, 1, 8), (True, 64, 8, 4), (True, 6, 1, 4), (True, 4, 1, 2), (True, 2, 1, 1), (True, 8, 8, 0),
     (True, 4, 8, 0), (False, 64, 1, 0)],
)  # fmt: skip
def test_readers_follow_from_the_cores_beside_a_gpu(gpu, cores, processes, workers, monkeypatch):
    """One core is left for training, and their number is one of those that read in the same order."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(run, "available_cores", lambda: cores)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    monkeypatch.setenv("ACCELERATE_USE_CPU", "false")
    args, data = SimpleNamespace(dataloader_num_workers=None, vae_encode_batch_size=1), data_of(64)
    found, notes = machine_defaults(args, data)
    assert found["dataloader_num_workers"] == workers
    said = f"--dataloader_num_workers: {workers} by default, of {cores} cores for {processes} processes here"
    assert notes == [said] * (workers > 0)
    assert machine_defaults(args, data, decodes=False) == (found | {"dataloader_num_workers": 0}, [])
    assert machine_defaults(SimpleNamespace(**vars(args) | {"dataloader_num_workers": 3}), data)[1] == []
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert machine_defaults(args, data)[0]["dataloader_num_workers"] == 0


def data_of(*resolutions: int) -> SimpleNamespace:
    return SimpleNamespace(datasets=[SimpleNamespace(rules=Rules(side, alignment=8)) for side in resolutions])


@pytest.mark.parametrize(
    ("resolutions", "at_once"), [((1024,), 2), ((512,), 8), ((64,), 32), ((512, 1024), 2), ((2048,), 1)]
)
def test_the_vae_encodes_two_megapixels_at_a_time(resolutions, at_once):
    args = SimpleNamespace(dataloader_num_workers=0, vae_encode_batch_size=None)
    found, notes = machine_defaults(args, data_of(*resolutions))
    assert found["vae_encode_batch_size"] == at_once
    assert [note.split(",")[0] for note in notes] == [f"--vae_encode_batch_size: {at_once} by default"] * (at_once < 32)
    assert machine_defaults(SimpleNamespace(**vars(args) | {"vae_encode_batch_size": 5}), data_of(1024))[1] == []


@pytest.mark.parametrize(("push", "main", "there"), [(True, True, True), (True, False, False), (False, True, False)])
def test_the_repository_is_made_by_the_main_process_where_it_is_asked_for(push, main, there, monkeypatch):
    monkeypatch.setattr(run, "create_hub_repository", lambda args: "owner/name")
    found = open_repository(SimpleNamespace(push_to_hub=push), SimpleNamespace(is_main_process=main))
    assert found == ("owner/name" if there else None)


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints
# ---------------------------------------------------------------------------------------------------------------------


class FakeBatches:
    """Stands in for a place in the data."""

    stream = SimpleNamespace(lanes=2)

    def state(self) -> dict:
        return {"lanes": 2, "starts": {0: [0, 1, 2]}, "used": [5], "faults": {"too small": 2, "no caption": 1}}


@pytest.fixture
def saver(tmp_path):
    network = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(network.parameters())
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    flushed = []
    encoder = SimpleNamespace(flush=lambda: flushed.append(True))
    saver = Saver(
        flags(tmp_path), Accelerator(cpu=True), {"student": network}, {"student": optimizer}, schedule, encoder,
        FakeBatches(), {"too small": 3},
    )  # fmt: skip
    saver.flushed = flushed
    return saver


def test_a_checkpoint_knows_where_the_run_is_and_what_was_skipped(saver, tmp_path):
    assert saver.save(4, more=[1]) == tmp_path / "checkpoint-4" and saver.flushed == [True]
    assert {path.name for path in (tmp_path / "checkpoint-4").iterdir()} == {
        "state.json", "student.safetensors", "student.optimizer.pt"
    }  # fmt: skip
    state = json.loads((tmp_path / "checkpoint-4" / "state.json").read_text())
    assert state["stream"] == {"lanes": 2, "starts": {"0": [0, 1, 2]}, "used": [5]}
    assert state["skipped"] == {"too small": 5, "no caption": 1}  # before the resume, and since
    assert (state["step"], state["more"], state["scaler"]) == (4, [1], None) and "last_epoch" in state["lr_schedule"]
    assert saver.place_in_data()[1] == Counter(state["skipped"])  # nothing is counted twice


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_run_that_has_gone_wrong_ends_and_names_its_last_good_checkpoint(value, saver, tmp_path):
    saver.save(4)
    check_finite(saver.args, 5, loss=1.0, norm=0.0)
    with pytest.raises(
        SystemExit, match=r"the norm is not finite at step 5; the last good checkpoint is .*checkpoint-4"
    ):
        check_finite(saver.args, 5, loss=1.0, norm=value)


# ---------------------------------------------------------------------------------------------------------------------
# End
# ---------------------------------------------------------------------------------------------------------------------


def ended(saver, monkeypatch, **how):
    """What is done at the end of a run, in order."""
    done = []

    def pushed(args, repository, files, message):
        done.append((repository, files, message))

    monkeypatch.setattr(run, "push_to_hub", pushed)

    def call(name, result):
        return lambda *given: (done.append(name), result)[1]

    options = {"step": 4, "trained": True, "stopped": False} | how
    end_run(
        saver.args, saver, SimpleNamespace(end=lambda step, stopped: done.append(("tracking", step, stopped))),
        "owner/name" if saver.args.push_to_hub else None,
        stop_signal=SimpleNamespace(over=call("no more signals", None)),
        validate=call("pictures", Image.new("RGB", (8, 8))), export=call("export", (["weights"], "import x\n")),
        report=call("report", "| a |\n"), method="lcm", teacher="owner/teacher", **options,
    )  # fmt: skip
    return done


def test_a_complete_run_leaves_checkpoint_pictures_model_and_card(saver, tmp_path, monkeypatch, capsys):
    done = ended(saver, monkeypatch, ema_steps=7)
    assert done == ["no more signals", "export", "pictures", "report", ("tracking", 4, False)]
    assert json.loads((tmp_path / "checkpoint-4" / "state.json").read_text())["ema_steps"] == 7
    assert Image.open(tmp_path / "samples.png").size == (8, 8)
    card = (tmp_path / "README.md").read_text()
    assert "# LCM of teacher\n" in card and 'tags: ["lcm", "lora"]' in card and "import x\n" in card and "| a |" in card
    said = capsys.readouterr().out
    assert f"saved {tmp_path / 'checkpoint-4'}" in said and "skipped 5 x too small\nskipped 1 x no caption" in said
    assert f"The model is in {tmp_path}:\n\nimport x\n" in said


def test_a_run_that_was_stopped_leaves_a_checkpoint_alone(saver, tmp_path, monkeypatch, capsys):
    assert ended(saver, monkeypatch, stopped=True) == ["no more signals", ("tracking", 4, True)]
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-4"]
    assert "stopped by a signal; go on with --resume_from_checkpoint latest" in capsys.readouterr().out


def test_a_run_that_has_trained_nothing_does_not_write_its_checkpoint_again(saver, tmp_path, monkeypatch, capsys):
    saver.save(4)
    written = (tmp_path / "checkpoint-4" / "state.json").stat().st_mtime_ns
    assert "export" in ended(saver, monkeypatch, trained=False)
    assert (tmp_path / "checkpoint-4" / "state.json").stat().st_mtime_ns == written
    assert "checkpoint-4 is already there" in capsys.readouterr().out
    ended(saver, monkeypatch, trained=False, step=5)  # resumed from another folder
    assert (tmp_path / "checkpoint-5" / "state.json").exists()


def test_the_hub_gets_the_model_and_what_shows_it(saver, monkeypatch):
    saver.args.push_to_hub = True
    (pushed,) = [each for each in ended(saver, monkeypatch) if each[0] == "owner/name"]
    files = ["README.md", "samples.png", "report.*", "side_by_side.*", "weights"]
    assert pushed == ("owner/name", files, "Distilled model")


def test_other_processes_take_part_and_leave_nothing(saver, tmp_path, monkeypatch):
    other = SimpleNamespace(
        is_main_process=False, num_processes=1, scaler=None, print=lambda *_: None, wait_for_everyone=lambda: None
    )
    monkeypatch.setattr(saver, "accelerator", other)
    monkeypatch.setattr(run, "save_checkpoint", lambda *given: "a folder")
    done = ended(saver, monkeypatch)
    assert done == ["no more signals", "export", "pictures", "report", ("tracking", 4, False)]
    assert list(tmp_path.iterdir()) == []
