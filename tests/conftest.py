"""Fixtures that several test modules share. Folders of a session's fixtures are read and never written."""

import signal

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from PIL import Image

from tests.helpers import (
    HookServer,
    clip_folder,
    teacher_like,
    tiny_pipeline,
    tiny_sdxl_pipeline,
    tiny_wan_pipeline,
    toy_shards,
)

torch.set_num_threads(1)  # tests run side by side, and small tensors gain nothing


def reset_accelerate():
    """Forgets accelerate's global state, so that a script can run once more in this process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    """A script in this process leaves neither accelerate's global state nor its signal handlers behind."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield reset_accelerate
    for number, handler in handlers.items():
        signal.signal(number, handler)
    reset_accelerate()


@pytest.fixture(scope="session")
def sd_teacher(tmp_path_factory):
    """A Stable Diffusion folder with random weights."""
    return tiny_pipeline(tmp_path_factory.mktemp("epsilon"))


@pytest.fixture(scope="session")
def sd_teachers(sd_teacher, tmp_path_factory):
    """The same for each prediction type."""
    others = {
        name: teacher_like(sd_teacher, tmp_path_factory.mktemp(name), prediction_type=name)
        for name in ("v_prediction", "sample")
    }
    return {"epsilon": sd_teacher} | others


@pytest.fixture(scope="session")
def sdxl_teacher(tmp_path_factory):
    return tiny_sdxl_pipeline(tmp_path_factory.mktemp("sdxl"))


@pytest.fixture(scope="session")
def wan_teacher(tmp_path_factory):
    return tiny_wan_pipeline(tmp_path_factory.mktemp("wan"))


@pytest.fixture(scope="session")
def small_shards(tmp_path_factory):
    """A folder of two shards with eight toy pictures each, {00000..00001}.tar."""
    folder = tmp_path_factory.mktemp("shards")
    toy_shards(folder, shards=2, samples=8)
    return folder


@pytest.fixture
def watch(monkeypatch):
    """`watch(module, name)`: the list of (arguments, result) of every call of a module's function from now on."""

    def watch(module, name: str) -> list[tuple]:
        calls, original = [], getattr(module, name)

        def watched(*arguments, **options):
            result = original(*arguments, **options)
            calls.append((arguments, result))
            return result

        monkeypatch.setattr(module, name, watched)
        return calls

    return watch


@pytest.fixture
def logged(monkeypatch) -> list[tuple[int, dict]]:
    """(step, values) of all that goes to the trackers from now on, in place of them."""
    found = []
    monkeypatch.setattr(Accelerator, "log", lambda self, values, step: found.append((step, values)))
    return found


@pytest.fixture
def server():
    """A server that keeps what is posted to its `url`, in `received`."""
    server = HookServer()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="session")
def tiny_clip(tmp_path_factory, sd_teacher):
    """A folder of a CLIP with random weights."""
    return clip_folder(tmp_path_factory.mktemp("clip"), sd_teacher)


@pytest.fixture
def two_shapes(tmp_path):
    """Flags of a folder of eight images in two buckets, 40x24 and 24x40 pixels at resolution 32."""
    (tmp_path / "images").mkdir()
    rng = np.random.default_rng(0)
    for i in range(8):
        pixels = rng.integers(0, 255, (40, 64, 3) if i % 2 else (64, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{i}.png")
        (tmp_path / "images" / f"{i}.txt").write_text(f"number {i}")
    return f"--train_data_dir {tmp_path / 'images'} --resolution_type pixel_area --crop_aspect preserve"
