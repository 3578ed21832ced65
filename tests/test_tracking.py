"""Means of values, runs read back from the trackers' files, and what is posted to the user's URL.

Whatever answers at that URL neither stops nor slows a run.
"""

import argparse
import base64
import email
import http.server
import io
import json
import os
import socket
import ssl
import struct
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import wandb
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration
from PIL import Image

from common import tracking
from common.tracking import TRACKERS, Means, Tracking, Webhook, public_settings, tracker_names, webhook_errors
from tests.helpers import ROOT

FLAGS = {
    "output_dir": "out", "webhook_config": None, "tracker_project_name": "project", "tracker_run_name": "the run",
    "hub_token": "hf_secret", "seed": 3, "learning_rate": 0.5, "random_flip": True, "cache_dir": None,
    "report_steps": [1, 2],
}  # fmt: skip
PICTURE = Image.fromarray(np.arange(8 * 6 * 3, dtype=np.uint8).reshape(6, 8, 3))
BLOCK = 32 * 1024  # bytes of a block in wandb's files
CLIP = np.linspace(0, 255, 5 * 16 * 32 * 3).astype(np.uint8).reshape(5, 16, 32, 3)


# ---------------------------------------------------------------------------------------------------------------------
# Means
# ---------------------------------------------------------------------------------------------------------------------


class OneProcess:
    def reduce(self, tensor, how):
        assert how == "sum"
        return tensor


class TwoProcesses:
    """The other one has added 10 to a, and nothing to b."""

    def reduce(self, tensor, how):
        return tensor + torch.tensor([[10.0, 0.0, 0.0], [1.0, 0.0, 0.0]])


def test_means_are_of_what_was_added_since_the_last_read():
    means = Means(["a", "b", "c"], "cpu")
    for value in (1.0, 2.0, 6.0):
        means.add("a", torch.tensor(value, requires_grad=True))
    means.add("b", torch.tensor(1.0))
    means.add("b", torch.tensor(4.0), weight=2.0)
    assert means.read(OneProcess()) == {"a": 3.0, "b": 3.0}
    means.add("a", torch.tensor(4.0))
    assert means.read(TwoProcesses()) == {"a": 7.0}
    assert means.read(OneProcess()) == {}


def test_gaps_go_to_the_range_of_their_timestep():
    means = Means([*map(tracking.gap_name, tracking.GAP_RANGES)], "cpu")
    means.add_gaps(torch.tensor([1.0, 2.0, 3.0, 5.0, 8.0]), torch.tensor([20.0, 249.9, 250.0, 980.0, 1000.0]))
    assert means.read(OneProcess()) == {"gap/0-250": 1.5, "gap/250-500": 3.0, "gap/750-1000": 6.5}


# ---------------------------------------------------------------------------------------------------------------------
# Trackers
# ---------------------------------------------------------------------------------------------------------------------


def report(folder, tracker: str, **flags):
    """What a run tells its trackers: values, a picture, a clip."""
    args = SimpleNamespace(**FLAGS | flags | {"output_dir": str(folder)})
    project = ProjectConfiguration(args.output_dir, str(folder / "logs"))
    accelerator = Accelerator(cpu=True, log_with=tracker_names(tracker) or None, project_config=project)
    told = Tracking(args, accelerator, steps=2)
    told.values({"loss": 0.25}, 1)
    told.values({"loss": 0.125, "lr": 1.0}, 2)
    told.picture(PICTURE, "grid", 2)
    (folder / "student.mp4").write_bytes(b"a video")
    told.clip(CLIP, folder / "student.mp4", "clips/student", 2)
    told.end(2, stopped=False)


def wandb_records(path) -> list:
    """The records of an offline run's file, which has LevelDB's log format behind seven bytes of its own."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, place, data, records = path.read_bytes(), 7, b"", []
    while place + 7 <= len(content):
        if BLOCK - place % BLOCK < 7:  # no header fits into what is left of the block
            place += BLOCK - place % BLOCK
            continue
        _, length, kind = struct.unpack_from("<IHB", content, place)
        data += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # all of a record, or its last part
            records.append(Record.FromString(data))
            data = b""
    return records


@pytest.fixture
def fresh_wandb():
    """wandb keeps the environment of its first use in a process."""
    wandb.teardown()
    yield
    wandb.teardown()


def test_a_run_in_wandb(tmp_path, monkeypatch, fresh_wandb):
    for name, value in {"MODE": "offline", "DIR": str(tmp_path), "SILENT": "true"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    monkeypatch.setattr(sys, "argv", ["train.py", "--hub_token", "hf_secret"])
    report(tmp_path / "out", "wandb")

    (folder,) = tmp_path.glob("wandb/offline-run-*")
    end, records = time.time() + 60.0, []
    while not any(record.HasField("exit") for record in records):  # written by a process of wandb's own
        assert time.time() < end
        time.sleep(0.1)
        records = wandb_records(next(folder.glob("run-*.wandb")))
    run = next(record.run for record in records if record.HasField("run"))
    assert (run.project, run.display_name) == ("project", "the run")
    config = {}
    for record in records:
        for item in [*record.run.config.update, *record.config.update]:
            config[item.key or "/".join(item.nested_key)] = json.loads(item.value_json)
    assert (config["seed"], config["learning_rate"], config["random_flip"]) == (3, 0.5, True)
    assert (config["report_steps"], config["cache_dir"]) == ("[1, 2]", "None")
    assert "hub_token" not in config

    history, values = {}, {}
    for record in records:
        for item in record.history.item:
            values[item.key or "/".join(item.nested_key)] = json.loads(item.value_json)
        if record.HasField("history"):
            history[values["_step"]], values = values, {}
    assert history[1]["loss"] == 0.25 and (history[2]["loss"], history[2]["lr"]) == (0.125, 1.0)
    assert (history[2]["grid/_type"], history[2]["clips/student/_type"]) == ("image-file", "video-file")
    with Image.open(folder / "files" / history[2]["grid/path"]) as shown:
        assert np.array_equal(np.asarray(shown.convert("RGB")), np.asarray(PICTURE))
    assert (folder / "files" / history[2]["clips/student/path"]).read_bytes() == b"a video"
    assert not any(b"hf_secret" in path.read_bytes() for path in folder.rglob("*") if path.is_file())


def test_a_run_in_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    report(tmp_path, "tensorboard")
    events = EventAccumulator(str(tmp_path / "logs" / "project"), size_guidance={"images": 0})
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 0.25), (2, 0.125)]
    (picture,), (clip,) = events.Images("grid"), events.Images("clips/student")
    shown = Image.open(io.BytesIO(picture.encoded_image_string))
    assert picture.step == clip.step == 2 and np.array_equal(np.asarray(shown), np.asarray(PICTURE))
    moving = Image.open(io.BytesIO(clip.encoded_image_string))
    assert (moving.format, moving.n_frames, moving.size) == ("GIF", len(CLIP), (32, 16))
    for i in range(len(CLIP)):
        moving.seek(i)
        assert np.abs(np.asarray(moving.convert("RGB")) / 255.0 - CLIP[i] / 255.0).mean() < 0.02
    assert np.array_equal(np.asarray(Image.open(tmp_path / "validation" / "grid-000002.png")), np.asarray(PICTURE))
    assert not any(b"hf_secret" in path.read_bytes() for path in (tmp_path / "logs").rglob("*") if path.is_file())


def test_a_run_in_trackio_and_every_other_tracker(tmp_path, monkeypatch):
    """With a package that stands in for it."""
    logged, added = [], []
    made = SimpleNamespace(Image=lambda picture: ("image", picture.size), Video=lambda path: ("video", path))
    monkeypatch.setitem(sys.modules, "trackio", made)
    tracker = SimpleNamespace(name="trackio", log=lambda values, step: logged.append((values, step)))
    writer = SimpleNamespace(add_image=lambda name, picture, step, dataformats: added.append((name, step)))
    writer.file_writer = SimpleNamespace(add_summary=lambda summary, step: added.append((summary.value[0].tag, step)))
    tensorboard = SimpleNamespace(name="tensorboard", writer=writer)
    trackers = [tensorboard, tracker, tensorboard]
    accelerator = SimpleNamespace(is_main_process=True, trackers=trackers, init_trackers=lambda *given: None)
    told = Tracking(SimpleNamespace(**FLAGS | {"output_dir": str(tmp_path)}), accelerator, steps=2)
    told.picture(PICTURE, "grid", 2)
    told.clip(CLIP, tmp_path / "clip.mp4", "clip", 2)
    assert added == [("grid", 2)] * 2 + [("clip", 2)] * 2
    assert logged == [({"grid": ("image", (8, 6))}, 2), ({"clip": ("video", str(tmp_path / "clip.mp4"))}, 2)]


def test_other_processes_show_nothing(tmp_path):
    accelerator = SimpleNamespace(is_main_process=False, init_trackers=lambda *given: None)
    told = Tracking(SimpleNamespace(**FLAGS | {"output_dir": str(tmp_path)}), accelerator, steps=2)
    told.picture(PICTURE, "grid", 2)
    told.clip(CLIP, tmp_path / "clip.mp4", "clip", 2)
    assert list(tmp_path.iterdir()) == []


def test_large_clips_are_smaller_in_tensorboard():
    summary = tracking.gif_summary(np.zeros((2, 480, 832, 3), np.uint8), "clip")
    assert (summary.value[0].image.width, summary.value[0].image.height) == (256, 148)


def test_no_tracker(tmp_path):
    report(tmp_path, "none")
    assert (tmp_path / "validation" / "grid-000002.png").exists() and not (tmp_path / "logs").exists()


def test_settings_are_the_flags_but_for_secrets():
    args = SimpleNamespace(**FLAGS)
    assert public_settings(args) == {name: value for name, value in FLAGS.items() if name != "hub_token"}
    assert args.hub_token == "hf_secret"


def test_settings_have_nothing_that_opens_the_data():
    given = {"train_shards_path_or_url": "a.tar::pipe:curl -H 'X-Api: pw' https://me:pw@host/0.tar", "seed": 3}
    given |= {"validation_prompt": "which key fits?it does", "cache_dir": None, "report_steps": [1, 2]}
    hidden = public_settings(SimpleNamespace(**given))
    assert hidden.pop("train_shards_path_or_url") == "a.tar::pipe:curl -H ... https://...@host/0.tar"
    assert hidden == {name: value for name, value in given.items() if name != "train_shards_path_or_url"}


def test_a_folder_of_old_runs_is_no_tracker(tmp_path, monkeypatch):
    """wandb leaves a folder of its own name where a run was started, which Python imports."""
    (tmp_path / "trackio").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    import trackio  # noqa: F401

    assert not tracking.installed("trackio")
    monkeypatch.delitem(sys.modules, "trackio")


def test_what_is_advised_is_what_is_pinned():
    pins = (ROOT / "requirements.txt").read_text().split()
    assert {TRACKERS["tensorboard"], TRACKERS["wandb"]} < set(pins)


# ---------------------------------------------------------------------------------------------------------------------
# Webhook
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def file(tmp_path):
    """file(webhook_url=..., level=...): the path of a settings file, of one address or of a list of them."""

    def write(*several, **settings) -> str:
        (tmp_path / "hook.json").write_text(json.dumps(list(several) or settings))
        return str(tmp_path / "hook.json")

    return write


def test_progress_and_pictures_arrive_in_order(server, file):
    hook = Webhook(file(webhook_url=server.url, level="info"))
    pixels = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    hook.send("progress", step=1, of=9, loss=0.5)
    hook.send("picture", picture=Image.fromarray(pixels), name="grid", step=1)
    hook.send("picture", "debug", picture=Image.fromarray(pixels), name="preview", step=1)  # below the level
    assert hook.close() == 0
    first, second = server.received
    assert (first["type"], first["step"], first["of"], first["loss"]) == ("progress", 1, 9, 0.5)
    assert "picture" not in first
    picture = Image.open(io.BytesIO(base64.b64decode(second["picture"])))
    assert second["name"] == "grid" and np.array_equal(np.asarray(picture), pixels)


@pytest.mark.parametrize("level, kinds", [({}, 3), ({"level": "info"}, 2), ({"level": "error"}, 1)])
def test_levels(level, kinds, server, file):
    hook = Webhook(file(webhook_url=server.url, **level))
    for kind in ("debug", "info", "error"):
        hook.send("x", kind)
    assert hook.close() == 0 and len(server.received) == kinds


def parts_of(headers, body: bytes) -> dict:
    """The parts of a form by name: content type, file name, content."""
    form = email.message_from_bytes(b"Content-Type: " + headers["Content-Type"].encode() + b"\r\n\r\n" + body)
    parts = {part.get_param("name", header="Content-Disposition"): part for part in form.get_payload()}
    return {
        name: (part.get_content_type(), part.get_filename(), part.get_payload(decode=True))
        for name, part in parts.items()
    }


def test_discord_gets_text_and_files(server, file):
    """As webhook.json of SimpleTuner has it."""
    settings = {"webhook_type": "discord", "webhook_url": server.url, "message_prefix": "my run", "log_level": "info"}
    hook = Webhook(file(**settings))
    hook.send("progress", step=1, of=9, loss=0.5)  # too many for a channel
    hook.send("picture", picture=PICTURE, name="grid", step=1)
    hook.send("picture", "debug", picture=PICTURE, name="preview", step=1)  # below the level
    hook.send("error", "error", message="x" * 3000, process=0)
    hook.send("end", step=5, of=9, stopped=True)
    assert hook.close() == 0
    (headers, form), *_ = server.posted
    assert "Python" not in headers["User-Agent"]  # which Discord turns away
    parts = parts_of(headers, form)
    kind, _, content = parts.pop("payload_json")
    assert kind == "application/json"
    assert json.loads(content) == {"content": "`(my run)` grid, step 1", "allowed_mentions": {"parse": []}}
    ((name, (kind, filename, data)),) = parts.items()
    assert (name, kind, filename) == ("files[0]", "image/png", "picture.png")
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(data))), np.asarray(PICTURE))
    error, end = (message["content"] for message in server.received)
    assert error.startswith("`(my run)` process 0: xxx") and len(error) == 2000
    assert end == "`(my run)` stopped at step 5 of 9"


def test_pictures_that_discord_would_refuse_are_shrunk(server, file, monkeypatch):
    monkeypatch.setattr(tracking, "MOST_PICTURE", 5000)
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 128, 3), np.uint8))
    hook = Webhook(file(webhook_type="discord", webhook_url=server.url))
    hook.send("picture", picture=noise, name="grid", step=1)
    assert hook.close() == 0
    data = parts_of(*server.posted[0])["files[0]"][2]
    assert len(data) <= 5000 and Image.open(io.BytesIO(data)).size == (32, 16)


def test_a_raw_hook_of_simpletuner_gets_our_json(server, file):
    hook = Webhook(file(webhook_type="raw", callback_url=server.url, auth_token="secret", log_level="info"))
    hook.send("progress", step=1, of=9, loss=0.5)
    hook.send("picture", picture=PICTURE, name="grid", step=1)
    assert hook.close() == 0
    assert (server.received[0]["loss"], server.received[1]["name"]) == (0.5, "grid")
    assert {headers["X-API-Key"] for headers, _ in server.posted} == {"secret"}


def test_several_hooks_have_levels_of_their_own(server, file):
    raw = {"webhook_type": "raw", "callback_url": server.url + "/raw", "log_level": "critical"}
    hook = Webhook(file({"webhook_url": closed_port()}, {"webhook_url": server.url, "message_prefix": None}, raw))
    hook.send("progress", step=1)
    hook.send("error", "error", message="x", process=0)
    assert hook.close() == 2  # of the first
    assert sorted(message["type"] for message in server.received) == ["error", "error", "progress"]


@pytest.mark.parametrize("seconds, lost", [(0.1, 0), (60, 1)])
def test_a_hook_that_is_busy_is_asked_once_more(seconds, lost, server, file):
    server.busy = seconds
    hook = Webhook(file(webhook_url=server.url, webhook_type="discord"))
    hook.send("end", step=1, of=1, stopped=False)
    assert hook.close() == lost and len(server.received) == 2 - lost


def test_a_redirect_is_a_lost_message(file):
    """Another host would get the token."""
    asked = []

    class Moved(http.server.BaseHTTPRequestHandler):
        def do_POST(self):  # noqa: N802
            self.send_response(302)
            self.send_header("Location", "/elsewhere")
            self.end_headers()

        def do_GET(self):  # noqa: N802
            asked.append(self.headers["X-API-Key"])
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Moved) as moved:
        threading.Thread(target=moved.serve_forever, args=(0.02,), daemon=True).start()
        hook = Webhook(file(webhook_url=f"http://127.0.0.1:{moved.server_address[1]}/hook", auth_token="secret"))
        hook.send("end", step=1, of=1, stopped=False)
        assert hook.close() == 1 and asked == []
        moved.shutdown()


def test_the_address_tells_discord_from_others(file):
    for url, discord in (
        ("https://discord.com/api/webhooks/1/a", True),
        ("https://discordapp.com/api/webhooks/1/a", True),
        ("https://discord.com.example.org/api/webhooks/1/a", False),
        ("http://example.org/hook", False),
    ):
        (address,) = tracking.read_webhook(file(webhook_url=url))
        assert address.discord == discord and address.ssl is None
    (address,) = tracking.read_webhook(file(webhook_url="https://x/", ssl_no_verify=True))
    assert address.ssl.verify_mode == ssl.CERT_NONE


def closed_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}/"


@pytest.mark.parametrize("fault", ["refusing", "500", "slow", "silent"])
def test_a_bad_hook_costs_nothing_but_its_messages(fault, server, file, monkeypatch):
    monkeypatch.setattr(tracking, "TIMEOUT", 0.3)
    url, listener = server.url, None
    if fault == "refusing":
        url = closed_port()
    if fault == "500":
        server.status = 500
    if fault == "slow":
        server.delay = 10.0
    if fault == "silent":  # takes the connection, never answers
        listener = socket.create_server(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/"
    hook = Webhook(file(webhook_url=url))
    start = time.perf_counter()
    for step in range(200):
        hook.send("progress", step=step)
    assert time.perf_counter() - start < 0.25
    start = time.perf_counter()
    lost = hook.close()
    assert time.perf_counter() - start < 1.0
    assert lost >= 150 and hook.hooks[0].waiting.qsize() <= tracking.MOST_WAITING  # nothing waits without bound
    if listener:
        listener.close()


def test_without_settings_nothing_is_sent():
    hook = Webhook(None)
    hook.send("progress", step=1)
    assert hook.close() == 0


@pytest.mark.parametrize("error", [SystemExit("--teacher x: does not fit"), ValueError("a bug"), KeyboardInterrupt()])
def test_what_ends_a_run_is_posted(error, server, file):
    @webhook_errors
    def main(args, data, notes):
        assert (data, notes) == ("data", ["note"])
        raise error

    with pytest.raises(type(error)) as stop:
        main(SimpleNamespace(webhook_config=file(webhook_url=server.url, level="error")), "data", ["note"])
    assert stop.value is error
    (message,) = server.received
    assert (message["type"], message["level"]) == ("error", "error")
    assert message["message"] == f"{type(error).__name__}: {error}"


@pytest.mark.parametrize("path", [None, "gone.json"])
def test_an_error_stays_what_it_is_where_nothing_can_be_posted(path):
    @webhook_errors
    def main(args):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        main(SimpleNamespace(webhook_config=path))


BAD = [
    ("{", "is not JSON: Expecting"),
    ("1", "must be a JSON object or a list"),
    ("[1]", "1: must be an object with webhook_url"),
    (
        '{"webhook_type": "slack", "webhook_url": "http://x"}',
        "webhook_type is 'slack', and must be one of discord, raw",
    ),
    ('{"webhook_url": "http://x", "callback_url": "http://x"}', "webhook_url and callback_url: one or the other"),
    ('{"webhook_type": "raw", "callback_url": "x"}', "callback_url is 'x', and must be http:// or https://"),
    ('{"level": "info"}', "has no webhook_url"),
    ('{"webhook_url": 1}', "webhook_url is 1, and must be of type str"),
    ('{"webhook_url": "http://x", "levle": 1}', "unknown key 'levle', did you mean 'level'?"),
    ('{"webhook_url": "ftp://x"}', "webhook_url is 'ftp://x', and must be http:// or https://"),
    ('{"webhook_url": "http://x", "level": "loud"}', "level is 'loud', and must be one of debug, info, error"),
]


@pytest.mark.parametrize("text, named", BAD)
def test_a_bad_file_is_one_sentence(text, named, tmp_path, capsys):
    (tmp_path / "hook.json").write_text(text)
    with pytest.raises(SystemExit):
        tracking.check_webhook(argparse.ArgumentParser(), str(tmp_path / "hook.json"))
    message = capsys.readouterr().err.splitlines()[-1]
    assert "--webhook_config" in message and "hook.json" in message and named in message


@pytest.mark.slow
@pytest.mark.parametrize(
    ("key", "reason"),
    [
        (None, "wandb has no login: run `wandb login`, or set WANDB_MODE=offline"),
        ("short", "wandb cannot log in (WANDB_API_KEY invalid: API key must have 40+ characters, has 5.): run"),
    ],
)
def test_wandb_without_a_login_is_one_sentence_before_anything_loads(key, reason, tmp_path):
    environment = os.environ | {"HOME": str(tmp_path), "WANDB_MODE": "online"} | ({"WANDB_API_KEY": key} if key else {})
    command = [sys.executable, "train_lcm_distill_sd.py", "--report_to", "wandb", "--output_dir", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and f"error: --report_to wandb: {reason}" in done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "out").exists()
