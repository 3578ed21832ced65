"""Two processes do what one does."""

import json
import time

import numpy as np
import pytest
from PIL import Image

from tests.data.helpers import records_of_file
from tests.helpers import launch, toy_shards
from tests.launches.helpers import short_flags, train, weights

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return toy_shards(tmp_path_factory.mktemp("shards"), 4, 12)


@pytest.mark.parametrize("kind", [["--lora_rank", 4], ["--model_type", "full"]], ids=["lora", "full"])
def test_two_processes_are_one(sd_teacher, shards, tmp_path, kind):
    """Same global batch, same weights to rounding: gradients are summed in another order."""
    more = ["--max_train_steps", 3, "--learning_rate", 1e-4, *kind]
    train(*short_flags(sd_teacher, shards, tmp_path / "one", *more, "--train_batch_size", 8))
    flags = short_flags(sd_teacher, shards, tmp_path / "two", *more, "--train_batch_size", 4)
    done = launch("train_lcm_distill_sd.py", *flags, processes=2)
    assert "3 steps of 8 samples" in done.stdout and "caches: 24 latents" in done.stdout
    files = (tmp_path / "two" / "cache" / "vae").rglob("*.safetensors")
    assert [records_of_file(path) for path in files] == [12] * 2  # what each process reads in its three steps
    one, two = weights(tmp_path / "one", 3), weights(tmp_path / "two", 3)
    # Adam makes a whole step of a gradient that is zero but for rounding: so not each weight, but nearly all
    far = sum((value - two[name]).abs().gt(2e-6).sum().item() for name, value in one.items())
    assert far < 0.01 * sum(value.numel() for value in one.values())
    assert max((value - two[name]).abs().max().item() for name, value in one.items()) < 7e-4  # the three steps


@pytest.mark.parametrize("slow", ["pictures", "filling"])
def test_slow_pictures_and_a_slow_filling_do_not_end_a_run(slow, sd_teacher, shards, tmp_path):
    """All four pictures, and what one of the processes has to encode, take longer than processes wait here."""
    flags = short_flags(sd_teacher, shards, tmp_path, "--max_train_steps", 3, "--validation_steps", 2)
    launch("tests/launches/impatient.py", "train_lcm_distill_sd", slow, *flags, processes=2)
    assert (tmp_path / "diffusion_pytorch_model.safetensors").exists()
    assert [path.name for path in sorted((tmp_path / "validation").iterdir())] == ["grid-000002.png", "grid-000003.png"]


def test_a_process_that_dies_while_caches_are_filled_ends_the_run(sd_teacher, shards, tmp_path):
    flags = short_flags(sd_teacher, shards, tmp_path, "--max_train_steps", 3)
    started = time.time()
    done = launch("tests/launches/impatient.py", "train_lcm_distill_sd", "death", *flags, processes=2, check=False)
    assert done.returncode != 0 and "exitcode: 3" in done.stderr and time.time() - started < 60
    assert not (tmp_path / "diffusion_pytorch_model.safetensors").exists()


def test_processes_that_share_prompts_draw_the_pictures_of_one(sd_teacher, shards, tmp_path):
    """Three prompts for two processes. The student is the teacher still, as a LoRA whose rate is nought in effect."""
    more = ["--max_train_steps", 1, "--lora_rank", 2, "--learning_rate", 1e-12, "--report_steps", 2]
    (tmp_path / "prompts.json").write_text(json.dumps({"a": "a red circle", "b": "a blue square", "c": "nothing"}))
    more += ["--validation_prompt_library", tmp_path / "prompts.json", "--validation_num_inference_steps", 2]
    train(*short_flags(sd_teacher, shards, tmp_path / "one", *more))
    launch("train_lcm_distill_sd.py", *short_flags(sd_teacher, shards, tmp_path / "two", *more), processes=2)
    one, two = (np.asarray(Image.open(tmp_path / each / "samples.png")).astype(int) for each in ("one", "two"))
    assert one.shape == two.shape and np.abs(one - two).max() <= 1  # of a level, as batches have other sizes
    rows, others = (json.loads((tmp_path / each / "report.json").read_text()) for each in ("one", "two"))
    assert [row["sampler"] for row in rows] == [row["sampler"] for row in others]
    for row, other in zip(rows, others, strict=True):
        assert other["distance"] == pytest.approx(row["distance"], abs=1e-2)
