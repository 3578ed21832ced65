"""Fixtures that several test modules share. Folders of a session's fixtures are read and never written."""

import http.server
import json
import os
import signal
import threading

import huggingface_hub
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from PIL import Image

from tests.compiled import Graphs
from tests.documents import StandInHub
from tests.helpers import (
    ROOT,
    HookServer,
    clip_folder,
    teacher_like,
    tiny_pipeline,
    tiny_sdxl_pipeline,
    tiny_wan_pipeline,
    toy_shards,
)

os.environ["WANDB_MODE"] = "offline"  # nobody logs in here
torch.set_num_threads(1)  # tests run side by side, and small tensors gain nothing


def reset_accelerate():
    """Forgets accelerate's global state, so that a script can run once more in this process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    """A script in this process leaves neither accelerate's global state nor its signal handlers behind."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setenv("WDS_CACHE", "")  # --shard_cache_dir sets it for the process
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
def alone():
    """Makes this process the only one of a group, as FSDP needs one."""
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=torch.distributed.HashStore())
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture
def graphs(monkeypatch):
    """The graphs that --compile makes from now on, counted in place of their compilation."""
    with torch._dynamo.config.patch(recompile_limit=8, accumulated_recompile_limit=256):  # torch's own
        graphs = Graphs(monkeypatch)
        yield graphs
    graphs.forget()


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


@pytest.fixture
def images(tmp_path):
    """A folder of small images with captions, one of them too small."""
    folder = tmp_path / "images"
    folder.mkdir()
    for i, size in enumerate([(64, 48), (48, 64), (40, 40), (16, 16)] * 3):
        Image.new("RGB", size, (20 * i, 0, 90)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"colour {i}")
    return folder


@pytest.fixture
def wan_files(tmp_path):
    """What the documents' Wan config names: prompts, a hook, a dataset file with a clip; all but the teacher."""
    (tmp_path / "clips").mkdir()
    (tmp_path / "clips" / "a.mp4").write_bytes(b"not read yet")
    (tmp_path / "clips" / "a.txt").write_text("a clip")
    (tmp_path / "library.json").write_text('{"first": "a red ball"}')
    (tmp_path / "webhook.json").write_text('{"webhook_url": "http://127.0.0.1:9/"}')
    dataset = json.loads((ROOT / "tests" / "configs" / "dmd_wan.dataset.json").read_text())
    (tmp_path / "data.json").write_text(json.dumps(dataset | {"instance_data_dir": str(tmp_path / "clips")}))
    return {
        "validation_prompt_library": str(tmp_path / "library.json"),
        "webhook_config": str(tmp_path / "webhook.json"),
        "data_backend_config": str(tmp_path / "data.json"),
        "output_dir": str(tmp_path / "out"),
    }


@pytest.fixture
def hub():
    """A hub on this machine; `environment` leads a process to it."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), StandInHub)
    server.url = f"http://127.0.0.1:{server.server_address[1]}"
    server.requests, server.created, server.files = [], [], {}
    server.commits, server.broken_commits = {}, 0
    server.environment = {"HF_ENDPOINT": server.url, "HF_TOKEN": "x", "HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1"}
    server.environment |= {"HF_HUB_DISABLE_XET": "1"}
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


@pytest.fixture
def hub_here(hub, monkeypatch):
    """The same for runs in this process."""
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", hub.url)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    for name in ("HF_TOKEN", "NO_PROXY"):
        monkeypatch.setenv(name, hub.environment[name])
    return hub
