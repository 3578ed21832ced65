"""What is posted to the user's URL, and that whatever answers there neither stops nor slows a run."""

import argparse
import base64
import http.server
import io
import json
import socket
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from common import tracking
from common.tracking import Webhook, webhook_errors


class Hook(http.server.BaseHTTPRequestHandler):
    def do_POST(self):  # noqa: N802
        body = self.rfile.read(int(self.headers["Content-Length"]))
        time.sleep(self.server.delay)
        self.server.received.append(json.loads(body))
        self.send_response(self.server.status)
        self.end_headers()

    def log_message(self, *_):
        pass


def serve() -> http.server.ThreadingHTTPServer:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hook)
    server.received, server.delay, server.status = [], 0.0, 200
    server.url = f"http://127.0.0.1:{server.server_address[1]}/hook"
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    return server


@pytest.fixture
def file(tmp_path):
    """file(webhook_url=..., level=...): the path of a settings file."""

    def write(**settings) -> str:
        (tmp_path / "hook.json").write_text(json.dumps(settings))
        return str(tmp_path / "hook.json")

    return write


@pytest.fixture
def server():
    server = serve()
    yield server
    server.shutdown()


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
    assert lost >= 150 and hook.waiting.qsize() <= tracking.MOST_WAITING  # nothing waits without bound
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
    ("[1]", "must be a JSON object"),
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
