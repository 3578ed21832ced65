"""Two processes do what one does."""

import pytest

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
