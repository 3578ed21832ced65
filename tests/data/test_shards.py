"""Where shards come from, how they are named, and what is wrong with some."""

import bz2
import gzip
import http.server
import lzma
import os
import signal
import sys
import tarfile
import threading
from argparse import Namespace
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import huggingface_hub
import pytest

from common.data import shards as shards_module
from common.data.datasets import open_shards
from common.data.shards import expand_shards, read_shard
from common.data.sources import count_samples
from tests.data.helpers import (
    causes,
    keys_of,
    picture,
)
from tests.helpers import add_member, encoded, write_shard

# ---------------------------------------------------------------------------------------------------------------------
# Places
# ---------------------------------------------------------------------------------------------------------------------


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@contextmanager
def served(folder: Path, handler=Quiet):
    """The address of a server of a folder's files."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()


def test_pipe_and_http(shards):
    local = keys_of(shards[0])
    with served(Path(shards[0]).parent) as address:
        assert keys_of(f"{address}/0.tar") == local
        assert causes(f"{address}/0.tar.missing") == ["unreadable shard"]
    assert keys_of(f"pipe:cat '{shards[0]}'") == local


@pytest.mark.parametrize("command", ["cat {}; exit 3", "cat {}; sleep 0.2; exit 3", "cat {}; kill -KILL $$"])
def test_a_command_that_fails_is_counted_and_what_it_wrote_is_kept(shards, command):
    """However early it fails: gopen's own pipe would drop what is still in the buffer."""
    samples = list(read_shard("pipe:" + command.format(shards[0])))
    assert [key for key, _ in samples[:8]] == keys_of(shards[0])
    assert [members for _, members in samples[8:]] == ["shard's command failed"]
    assert causes("pipe:exit 3") == ["unreadable shard"]
    assert causes(f"pipe:cat {shards[0]} | head -c 3000; exit 3") == ["truncated shard"]


def test_a_shard_that_is_left_early_ends_its_command(tmp_path, shards):
    samples = read_shard(f"pipe:cat {shards[0]} /dev/zero && touch {tmp_path}/end")
    next(samples)
    samples.close()
    assert not (tmp_path / "end").exists()


class Busy(Quiet):
    """Asks the first caller to come again."""

    asked = 0

    def do_GET(self):  # noqa: N802
        Busy.asked += 1
        if Busy.asked == 1:
            self.send_error(503)
        else:
            super().do_GET()


@pytest.mark.slow  # curl waits before it asks again
def test_a_server_that_is_busy_is_asked_again(shards):
    with served(Path(shards[0]).parent, Busy) as address:
        assert keys_of(f"{address}/0.tar") == keys_of(shards[0]) and Busy.asked == 2


@pytest.mark.parametrize(
    ("url", "program", "words"),
    [
        ("gs://bucket/0.tar", "gsutil", "cat"),
        ("s3://bucket/with a space.tar", "aws", "s3 cp"),
        ("ais://bucket/0.tar", "ais", "get"),
    ],
)
def test_stores_are_read_by_their_own_programs(tmp_path, monkeypatch, shards, url, program, words):
    with monkeypatch.context() as empty:
        empty.setenv("PATH", str(tmp_path))
        with pytest.raises(ValueError, match=f"read by the program {program}, which is not installed"):
            open_shards(url)
    stand_in = tmp_path / program
    stand_in.write_text(f"#!/bin/sh\nprintf '%s\\n' \"$@\" > {tmp_path}/words\ncat {shards[0]}\n")
    stand_in.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert open_shards(url) == [url] and keys_of(url) == keys_of(shards[0])
    said = (tmp_path / "words").read_text().splitlines()
    assert said[: len(words.split())] == words.split() and url in said


@pytest.mark.parametrize("token", [None, "secret"])
def test_shards_of_the_hub(monkeypatch, shards, token):
    asked = []

    class Asked(Quiet):
        def do_GET(self):  # noqa: N802
            asked.append(self.headers["Authorization"])
            super().do_GET()

    with served(Path(shards[0]).parent, Asked) as address:
        for module in (huggingface_hub, shards_module):
            monkeypatch.setattr(module, "get_token", lambda: token)
        place = Namespace(repo_id="me/mine", path_in_repo="0.tar", repo_type="dataset", revision="main")
        monkeypatch.setattr(huggingface_hub.HfFileSystem, "resolve_path", lambda self, path: place)
        monkeypatch.setattr(huggingface_hub.HfFileSystem, "url", lambda self, path: f"{address}/0.tar")
        monkeypatch.setattr(huggingface_hub, "hf_hub_url", lambda **_: f"{address}/0.tar")
        assert keys_of("hf://datasets/me/mine/0.tar") == keys_of(shards[0])
        assert asked == [token and f"Bearer {token}"]

    def fails(*_):
        raise RuntimeError("no network")

    monkeypatch.setattr(huggingface_hub.HfFileSystem, "resolve_path", fails)
    monkeypatch.setattr(huggingface_hub.HfFileSystem, "url", fails)
    assert causes("hf://datasets/me/mine/0.tar") == ["unreadable shard"]


@pytest.mark.parametrize("kind", ["gz", "bz2", "xz"])
def test_compressed_shards(tmp_path, shards, kind):
    path = tmp_path / f"0.tar.{kind}"
    opener = {"gz": gzip.open, "bz2": bz2.open, "xz": lzma.open}[kind]
    with opener(path, "wb") as file:
        file.write(Path(shards[0]).read_bytes())
    assert keys_of(str(path)) == keys_of(f"pipe:cat {path}") == keys_of(shards[0])
    assert count_samples([str(path)]) == 8
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    assert causes(path)[-1] in ("truncated shard", "unreadable shard") and len(causes(path)) == 1
    assert count_samples([str(path)]) < 8


class Cut(Quiet):
    """Breaks off in the middle of a chunk."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):  # noqa: N802
        data = Path(self.translate_path(self.path)).read_bytes()[:700]
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        self.wfile.write(b"10000\r\n" + data)
        self.close_connection = True


def test_a_connection_that_breaks_is_a_truncated_shard(shards):
    with served(Path(shards[0]).parent, Cut) as address:
        assert causes(f"{address}/0.tar") == ["truncated shard"]


def test_what_stops_a_run_does_not_stop_the_program_behind_a_shard(tmp_path, monkeypatch, shards):
    """A terminal sends Ctrl-C to all processes of a group, and the shard would look cut off in the last checkpoint."""
    list(read_shard(f"pipe:cut -d ' ' -f 5 /proc/$$/stat > {tmp_path}/group; cat {shards[0]}"))
    assert int((tmp_path / "group").read_text()) != os.getpgrp()
    stand_in = tmp_path / "curl"
    code = "import os, signal, sys\nos.kill(os.getpid(), signal.SIGINT)\nos.kill(os.getpid(), signal.SIGTERM)\n"
    stand_in.write_text(f"#!{sys.executable}\n{code}sys.stdout.buffer.write(open({shards[0]!r}, 'rb').read())\n")
    stand_in.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert len(keys_of("https://somewhere/0.tar")) == 8
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, []) & {signal.SIGINT, signal.SIGTERM}


# ---------------------------------------------------------------------------------------------------------------------
# Names
# ---------------------------------------------------------------------------------------------------------------------


def test_lists_and_counts(tmp_path, monkeypatch, shards):
    folder = str(Path(shards[0]).parent)
    assert expand_shards(folder + "/{0..7}.tar") == shards
    assert expand_shards("a{0..1}.tar::pipe:cat b{2,3}.tar") == [
        "a0.tar",
        "a1.tar",
        "pipe:cat b2.tar",
        "pipe:cat b3.tar",
    ]
    assert expand_shards("{a,b{0..1}}.tar::c{{x,y}1,z}.tar") == ["a.tar", "b0.tar", "b1.tar", "cx1.tar", "cy1.tar", "cz.tar"]  # fmt: skip  # noqa: E501
    assert count_samples(shards) == 64
    assert count_samples([*shards, "pipe:cat x"]) is None
    monkeypatch.setenv("WDS_DATA", "${WHERE}/{0..1}.tar")
    monkeypatch.setenv("WDS_WHERE", folder)
    assert expand_shards("${DATA}::file:" + shards[2]) == shards[:3]
    monkeypatch.delenv("WDS_WHERE")
    with pytest.raises(ValueError, match="the environment variable WDS_WHERE is not set"):
        expand_shards("${DATA}")
    monkeypatch.setenv("GOPEN_REWRITE", f"gs://bucket=/{folder[1:]}")
    assert open_shards("gs://bucket/{0..1}.tar") == shards[:2]  # local ones


def test_a_list_in_a_file(tmp_path, shards):
    folder = Path(shards[0]).parent
    for name in ("shards.txt", "shards.list"):
        path = tmp_path / name
        path.write_text(f"# two and two\n{folder}/{{0..1}}.tar\n\n  {shards[2]}::{shards[3]} \n")
        assert open_shards(str(path)) == shards[:4]
        assert open_shards(f"{shards[7]}::{path}") == [shards[7], *shards[:4]]
    (tmp_path / "empty.txt").write_text("# nothing\n")
    for spec, named in (
        (tmp_path / "empty.txt", "no shards in it"),
        (tmp_path / "none.txt", "No such file"),
        ("az://account/0.tar", "does not exist .1 of 1.; no URL of az: can be read"),
        (f"{folder}/{{6..9}}.tar", "8.tar does not exist .2 of 4."),
    ):
        with pytest.raises(ValueError, match=named):
            open_shards(str(spec))


# ---------------------------------------------------------------------------------------------------------------------
# Members
# ---------------------------------------------------------------------------------------------------------------------


def test_members_in_folders_and_directories(tmp_path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        folder = tarfile.TarInfo("x")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        add_member(tar, "x/1.png", encoded(picture()))
        add_member(tar, "x/1.txt", b"one")
        add_member(tar, "y/1.png", encoded(picture()))
        add_member(tar, "y/1.txt", b"the same stem in another folder")
    assert [members["txt"] for _, members in read_shard(str(path))] == [b"one", b"the same stem in another folder"]


def test_a_header_that_is_damaged_or_cut_off_is_counted(tmp_path):
    """tarfile itself takes both for the archive's end, and what follows would be missing without a word."""
    content = [{"txt": f"{i}".encode()} for i in range(5)]  # two blocks of 512 bytes each
    shard = write_shard(tmp_path / "a.tar", content)
    whole = shard.read_bytes()
    assert causes(shard) == []
    shard.write_bytes(whole[: 4 * 512] + b"\xff" * 512 + whole[5 * 512 :])
    assert causes(shard) == ["truncated shard"]
    for end in (4 * 512, 4 * 512 + 100):
        shard.write_bytes(whole[:end])
        assert causes(shard) == ["truncated shard"]


def test_a_key_that_comes_twice_in_a_row_is_no_mixture(tmp_path):
    first = {"png": encoded(picture()), "txt": b"first"}
    shard = write_shard(tmp_path / "a.tar", [first, {"png": b"other", "txt": b"second"}], ["same", "same"])
    assert [members for _, members in read_shard(str(shard))] == [first, "duplicate key"]
