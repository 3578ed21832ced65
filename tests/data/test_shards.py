"""Where shards come from, how they are named, and what is wrong with some."""

import bz2
import fcntl
import gzip
import http.server
import lzma
import os
import signal
import tarfile
import threading
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest

from common.data import shards as shards_module
from common.data.datasets import open_shards
from common.data.samples import BadSample
from common.data.shards import command_of, expand_shards, fetch, hide_secrets, read_shard
from common.data.sources import count_samples
from tests.data.helpers import (
    backend,
    causes,
    entry,
    keys_of,
    parse,
    picture,
    reader,
    samples_of,
)
from tests.helpers import ROOT, add_member, encoded, write_shard


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    """Programs that fail are started again at once."""
    monkeypatch.setattr(shards_module, "DELAYS", (0, 0))
    monkeypatch.delenv("WDS_CACHE", raising=False)


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
def test_the_hub_alone_gets_its_token(monkeypatch, shards, token):
    asked = []

    class Asked(Quiet):
        def do_GET(self):  # noqa: N802
            asked.append(self.headers["Authorization"])
            super().do_GET()

    class Hub(Asked):
        """Large files are somewhere else."""

        def do_GET(self):  # noqa: N802
            asked.append(self.headers["Authorization"])
            self.send_response(302)
            self.send_header("Location", f"{store}/0.tar")
            self.end_headers()

    folder, header = Path(shards[0]).parent, token and f"Bearer {token}"
    with served(folder, Asked) as store, served(folder, Hub) as hub:
        monkeypatch.setattr(shards_module, "get_token", lambda: token)
        monkeypatch.setattr(shards_module.constants, "ENDPOINT", hub)
        url = f"{hub}/datasets/me/mine/resolve/main/0.tar"
        monkeypatch.setattr(shards_module.HfFileSystem, "url", lambda self, path: url)
        for shard in ("hf://datasets/me/mine/0.tar", url):
            assert keys_of(shard) == keys_of(shards[0])
        assert keys_of(f"{store}/0.tar") == keys_of(shards[0])
        assert asked == [header, None, header, None, None]
    if token:
        monkeypatch.setattr(shards_module.constants, "ENDPOINT", "https://a.mirror")
        hosts = [
            "huggingface.co",
            "a.mirror",
            "huggingface.co.evil.org",
            "me@huggingface.co",
            "evil.org/huggingface.co",
        ]
        given = [command_of(f"https://{host}/datasets/me/mine/resolve/main/0.tar") for host in hosts]
        assert [bool(text) for _, text in given] == [True, True, False, False, False]
        assert not any(token in word for words, _ in given for word in words)  # `ps` shows them

    def fails(*_):
        raise RuntimeError("no network")

    monkeypatch.setattr(shards_module.HfFileSystem, "url", fails)
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


class Breaking(Quiet):
    """Breaks off after so many bytes: in turn at each that is left in `ends`."""

    ends, asked = [], 0

    def do_GET(self):  # noqa: N802
        Breaking.asked += 1
        if not Breaking.ends:
            return super().do_GET()
        end = Breaking.ends.pop(0)
        if end:
            data = Path(self.translate_path(self.path)).read_bytes()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data[:end])
        self.close_connection = True


@pytest.mark.parametrize(("ends", "asked"), [([7000], 2), ([0], 2), ([7000, 3000], 3), ([9000, 7000, 700], 3)])
def test_a_connection_that_breaks_is_taken_up_again(shards, monkeypatch, ends, asked):
    """No sample comes twice, and none is lost; after so many times the shard is given up."""
    monkeypatch.setattr(Breaking, "ends", [*ends])
    monkeypatch.setattr(Breaking, "asked", 0)
    with served(Path(shards[0]).parent, Breaking) as address:
        found = list(read_shard(f"{address}/0.tar"))
    whole = list(read_shard(shards[0]))
    good = [sample for sample in found if not isinstance(sample[1], str)]
    assert Breaking.asked == asked and good == whole[: len(good)]
    assert [members for _, members in found[len(good) :]] == ["truncated shard"] * (len(ends) == 3)
    assert len(good) == 8 or len(ends) == 3


class Elsewhere(Quiet):
    """Sends on to a file of the machine that asks."""

    def do_GET(self):  # noqa: N802
        self.send_response(302)
        self.send_header("Location", f"file://{self.translate_path(self.path)}")
        self.end_headers()


def test_what_is_not_there_is_asked_for_once(shards, monkeypatch):
    monkeypatch.setattr(Breaking, "asked", 0)
    folder = Path(shards[0]).parent
    with served(folder, Breaking) as address, served(folder, Elsewhere) as elsewhere:
        assert causes(f"{address}/none.tar") == ["unreadable shard"] and Breaking.asked == 1
        assert causes(f"{elsewhere}/0.tar") == ["unreadable shard"]


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
    stand_in = tmp_path / "curl"  # a cluster sends SIGTERM to each process of a job
    ends = f"test -e {tmp_path}/ended || {{ touch {tmp_path}/ended; head -c 7000 {shards[0]}; kill -TERM $$; }}"
    group = f"cut -d ' ' -f 5 /proc/$$/stat > {tmp_path}/group"
    stand_in.write_text(f"#!/bin/sh\n{ends}\n{group}\ncat {shards[0]}\n")
    stand_in.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    (tmp_path / "group").unlink()
    assert keys_of("https://somewhere/0.tar") == keys_of(shards[0]) and (tmp_path / "ended").exists()
    assert int((tmp_path / "group").read_text()) != os.getpgrp()


def test_a_command_that_hangs_is_ended_where_its_shard_is_left(shards):
    start = time.monotonic()
    samples = read_shard(f"pipe:cat {shards[0]}; sleep 60")
    next(samples)
    samples.close()
    assert time.monotonic() - start < 30


# ---------------------------------------------------------------------------------------------------------------------
# Faults
# ---------------------------------------------------------------------------------------------------------------------


def test_a_shard_that_cannot_be_read_is_named_at_once(tmp_path, shards, capsys, monkeypatch):
    """Once for each cause, and without what opens a URL."""
    (tmp_path / "cut.tar").write_bytes(Path(shards[0]).read_bytes()[:7000])
    with served(Path(shards[0]).parent) as address:
        bad = [str(tmp_path / "cut.tar"), f"{address.replace('//', '//me:hidden@')}/none.tar?X-Signature=hidden"]
        bad += [
            f"pipe:cat {shards[0]}; : -H 'Authorization: Bearer hidden' -u me:hidden 'http://x/y?sig=hidden'; exit 3"
        ]
        for shard in bad * 2:
            assert len(causes(shard)) == 1
        monkeypatch.setattr(Breaking, "ends", [7000] * 3)
        with served(Path(shards[0]).parent, Breaking) as breaking:
            assert causes(f"{breaking}/0.tar") == ["truncated shard"]
    cut, missing, failed, broken = capsys.readouterr().out.splitlines()
    assert cut == f"{bad[0]}: truncated shard: unexpected end of data"
    assert missing.startswith("http://...@127.0.0.1:")
    assert missing.endswith("/none.tar?...: unreadable shard: curl: (22) The requested URL returned error: 404")
    assert failed.startswith(f"pipe:cat {shards[0]}; ") and failed.endswith("failed: its command ended with status 3")
    assert "hidden" not in missing + failed
    assert "/0.tar: truncated shard: curl: (18) transfer closed" in broken


@pytest.mark.parametrize(
    "text",
    [
        "https://me:pw@host/0.tar",
        "https://me:p@pw@host/0.tar",
        "https://host/0.tar?X-Amz-Date=1&X-Amz-Signature=pw",
        "pipe:curl https://host/0.tar&sig=pw",
        "pipe:curl -H 'Authorization: Bearer pw' https://host/0.tar",
        "pipe:curl -H 'X-Api: pw' https://host/0.tar",
        'pipe:curl -H "X-Api: \\"pw\\"" https://host/0.tar',
        "pipe:curl -HX-Api:'pw' https://host/0.tar",
        "pipe:curl -sSLH X-Api:\\ pw https://host/0.tar",
        'pipe:bash -c "curl -H \\"X-Api: pw\\" https://host/0.tar"',
        "pipe:wget --header='X-Api: pw' -O - https://host/0.tar",
        "pipe:curl --proxy-header 'X-Api: pw' https://host/0.tar",
        "pipe:curl --cookie sid=pw https://host/0.tar",
        "pipe:curl -u me:pw https://host/0.tar",
        "pipe:curl -ume:pw https://host/0.tar",
        "pipe:curl -fsSLu 'me:pw' https://host/0.tar",
        "pipe:curl --user=me:pw https://host/0.tar",
        "pipe:AWS_SECRET_ACCESS_KEY=pw aws s3 cp s3://host/0.tar -",
    ],
)
def test_secrets_are_hidden_and_nothing_else(text):
    hidden = hide_secrets(text)
    assert "pw" not in hidden and "..." in hidden
    assert "//host/0.tar" in hidden or "@host/0.tar" in hidden or "bash" in hidden  # whose quotes are in quotes


def test_what_is_no_secret_is_not_hidden():
    command = "pipe:tar -xOf 'a b.tar' 2>&1 && aws s3 cp s3://a/{0..1}.tar - | head -c 10 || sh -c 'x; y'"
    assert hide_secrets(command) == command


def test_a_member_that_is_too_large_is_named_as_such(tmp_path, monkeypatch):
    """Where it is the one that is needed; its bytes are not kept."""
    for module in ("samples", "shards", "sources"):
        monkeypatch.setattr(f"common.data.{module}.MOST_MEMBER_BYTES", 5000)
    large, good = b"x" * 5001, encoded(picture())
    content = [{"png": large, "txt": b"a"}, {"png": good, "txt": b"b", "npy": large}, {"png": good, "txt": large}]
    content += [{"png.gz": gzip.compress(large), "txt": b"d"}]
    causes = []
    for _, members in read_shard(str(write_shard(tmp_path / "a.tar", content))):
        assert large not in members.values()
        try:
            causes.append(reader()(members, "v").caption)
        except BadSample as cause:
            causes.append(str(cause))
    assert causes == ["member above 0 MiB", "b", "member above 0 MiB", "member above 0 MiB"]
    for name, data in {"large.png": large, "good.png": good, "large.txt": b"a", "good.txt": b"b"}.items():
        (tmp_path / name).write_bytes(data)
    found = samples_of(parse("--train_data_dir", tmp_path, "--resolution", 64))
    assert found["faults"] == {"member above 0 MiB": 1} and found["good"].caption == "b"


# ---------------------------------------------------------------------------------------------------------------------
# Cache
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture()
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("WDS_CACHE", "")  # the flag sets it
    parse("--train_shards_path_or_url", "pipe:cat x", "--shard_cache_dir", tmp_path / "cache")
    assert os.environ["WDS_CACHE"] == str(tmp_path / "cache")
    return tmp_path / "cache"


def test_a_shard_is_fetched_once(tmp_path, shards, monkeypatch, cache):
    monkeypatch.setattr(Breaking, "asked", 0)
    for i, name in enumerate(("a", "b")):  # of the same name
        (tmp_path / name).mkdir()
        (tmp_path / name / "0.tar").write_bytes(Path(shards[i]).read_bytes())
    with served(tmp_path, Breaking) as address:
        for _ in range(2):
            assert list(read_shard(f"{address}/a/0.tar?key=secret")) == list(read_shard(shards[0]))
            assert list(read_shard(f"{address}/b/0.tar?key=secret")) == list(read_shard(shards[1]))
        assert Breaking.asked == 2
    assert keys_of(f"pipe:echo run >> {tmp_path}/runs; cat {shards[0]}") == keys_of(shards[0])
    assert keys_of(f"pipe:echo run >> {tmp_path}/runs; cat {shards[0]}") == keys_of(shards[0])
    assert (tmp_path / "runs").read_text() == "run\n"
    names = sorted(path.name for path in cache.iterdir())
    assert len(names) == 3 and sum(name.endswith("-0.tar") for name in names) == 2
    assert list(read_shard(shards[0])) and len(list(cache.iterdir())) == 3  # local ones stay where they are


def test_half_a_shard_is_not_kept(tmp_path, shards, monkeypatch, cache):
    cut = f"pipe:head -c 7000 {shards[0]}"
    monkeypatch.setattr(Breaking, "ends", [7000] * 3)
    with served(Path(shards[0]).parent, Breaking) as address:
        for shard in (f"{address}/0.tar", f"{cut}; exit 3", cut):  # the last one seems to be all right
            assert causes(shard) == ["truncated shard" if shard == cut else "unreadable shard"]
            assert not [path for path in cache.iterdir() if path.suffix != ".part"]
        assert keys_of(f"{address}/0.tar") == keys_of(shards[0])
    (kept,) = (path for path in cache.iterdir() if path.suffix != ".part")
    kept.write_bytes(b"damaged")
    with served(Path(shards[0]).parent, Breaking) as other:
        assert causes(f"{address}/0.tar") == ["unreadable shard"] and not kept.exists()
        assert keys_of(f"{other}/0.tar") == keys_of(shards[0])


def test_many_that_want_a_shard_fetch_it_once(tmp_path, shards, cache):
    """And a process that is killed while it does so leaves no half of it, nor a lock."""
    shard = f"pipe:echo run >> {tmp_path}/runs; head -c 7000 {shards[0]}; sleep 0.3; tail -c +7001 {shards[0]}"
    if not (child := os.fork()):
        list(read_shard(shard))
        os._exit(0)
    while not (tmp_path / "runs").exists():
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    (tmp_path / "runs").unlink()
    found = []
    readers = [threading.Thread(target=lambda: found.append(keys_of(shard))) for _ in range(4)]
    for each in readers:
        each.start()
    for each in readers:
        each.join()
    assert found == [keys_of(shards[0])] * 4 and (tmp_path / "runs").read_text() == "run\n"


def test_those_that_wait_for_a_shard_fail_with_it(tmp_path, cache):
    shard, found = f"pipe:echo run >> {tmp_path}/runs; sleep 0.5; exit 3", []
    readers = [threading.Thread(target=lambda: found.extend(causes(shard))) for _ in range(4)]
    for each in readers:
        each.start()
    for each in readers:
        each.join()
    assert found == ["unreadable shard"] * 4 and (tmp_path / "runs").read_text() == "run\n"
    assert causes(shard) == found[:1] and (tmp_path / "runs").read_text() == "run\n" * 2  # later it is tried again


def test_a_shard_that_is_damaged_and_gone_is_not_written_to(tmp_path, shards, cache, monkeypatch):
    """What a process waits for is renamed when it is whole, and removed by one that cannot read it."""
    found, waiting, flock = [], threading.Event(), fcntl.flock
    shard = f"pipe:echo run >> {tmp_path}/runs; cat {shards[0]}"
    path = fetch(shard, str(cache))
    path.rename(f"{path}.part")
    with open(f"{path}.part") as file:
        flock(file, fcntl.LOCK_EX)
        monkeypatch.setattr(fcntl, "flock", lambda *given: waiting.set() or flock(*given))
        reader = threading.Thread(target=lambda: found.extend(causes(shard)))
        reader.start()
        waiting.wait()
        os.replace(file.name, path)
        path.unlink()
    reader.join()
    assert found == ["unreadable shard"] and (tmp_path / "runs").read_text() == "run\n"
    assert keys_of(shard) == keys_of(shards[0])


def test_a_cache_that_cannot_be_made_is_refused(tmp_path, refused, monkeypatch):
    monkeypatch.setenv("WDS_CACHE", "")
    (tmp_path / "file").touch()
    message = refused("--train_shards_path_or_url", "pipe:cat x", "--shard_cache_dir", tmp_path / "file")
    assert f"--shard_cache_dir {tmp_path}/file: File exists" in message
    monkeypatch.setenv("WDS_CACHE", str(tmp_path / "file"))
    message = refused("--train_shards_path_or_url", "pipe:cat x")
    assert f"error: the environment variable WDS_CACHE: {tmp_path}/file: File exists" in message


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
    (tmp_path / "without_suffix").write_text(f"{folder}/[01].tar\n{folder}/2.tar")
    assert open_shards(f"@{tmp_path}/without_suffix") == shards[:3]
    (tmp_path / "outer.txt").write_text(f"@{tmp_path}/without_suffix\n{shards[7]}::{tmp_path}/shards.list")
    assert open_shards(str(tmp_path / "outer.txt")) == [*shards[:3], shards[7], *shards[:4]]  # of lists
    (tmp_path / "loop.txt").write_text(f"{shards[0]}\n@{tmp_path}/loop.list")
    (tmp_path / "loop.list").write_text(f"{tmp_path}/loop.txt")
    (tmp_path / "empty.txt").write_text("# nothing\n")
    (tmp_path / "of_nothing").mkdir()
    for spec, named in (
        (tmp_path / "empty.txt", "no shards in it"),
        (tmp_path / "of_nothing", "of_nothing: no tar files in it"),
        (tmp_path / "*.tar", "no tar files in it"),
        (f"@{tmp_path}/none", "No such file"),
        (tmp_path / "none.txt", "No such file"),
        (tmp_path / "loop.txt", "loop.txt: a list of shards that names itself"),
        ("az://account/0.tar", "does not exist .1 of 1.; no URL of az: can be read"),
        (f"{folder}/{{6..9}}.tar", "8.tar does not exist .2 of 4."),
    ):
        with pytest.raises(ValueError, match=named):
            open_shards(str(spec))


def test_folders_and_patterns(tmp_path, shards):
    names = ["b/1.tar", "a.tar.gz", "b/c/2.tgz", "z.tar", "._z.tar", ".old/y.tar", "a.tar.md", "x.targ"]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found = [str(tmp_path / name) for name in ("a.tar.gz", "b/1.tar", "b/c/2.tgz", "z.tar")]
    assert open_shards(str(tmp_path)) == found
    assert open_shards(f"{tmp_path}/**/*.t[ag][rz]") == [found[1], found[2], found[3]]
    assert open_shards(f"{shards[0]}::file:{tmp_path}/b") == [shards[0], *found[1:3]]
    (tmp_path / "odd[1].tar").touch()
    assert open_shards(f"{tmp_path}/odd[1].tar") == [f"{tmp_path}/odd[1].tar"]
    run = parse("--data_backend_config", backend(tmp_path, entry(Path(shards[0]).parent, type="webdataset")))
    assert run.data.datasets[0].parts == shards


def test_a_yaml_of_webdataset(tmp_path, shards, monkeypatch):
    folder, path = Path(shards[0]).parent, tmp_path / "shards.yaml"
    monkeypatch.setenv("WHERE", folder.name)
    text = f"prefix: {folder.parent}/\nbuckets: ${{WHERE}}\ndatasets:\n- shards: '{{1..2}}.tar'\n  name: a\n"
    path.write_text(text + "- buckets: [nowhere/..]\n  shards: [$WHERE/5.tar, $WHERE/0.tar]\n")
    found = [os.path.normpath(shard) for shard in expand_shards(str(path))]
    assert found == [shards[1], shards[2], shards[5], shards[0]]
    for content, named in (
        (f"{text}  resample: 3\n", "resample is not supported, use probability in a dataset file"),
        ("[a.tar]", "must have datasets with shards"),
        ("a: [", "must have datasets with shards"),
        ("datasets: [{shards: x, buckets: [a, b]}]", "must have datasets with shards.*too many values"),
        ("datasets: [{name: x}]", "must have datasets with shards, as webdataset's: KeyError..shards"),
    ):
        path.write_text(content)
        with pytest.raises(ValueError, match=named):
            expand_shards(str(path))


def test_the_lines_of_the_readme_make_shards(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("photos", "sub").mkdir(parents=True)
    for i in range(5):
        picture().save(f"photos/sub/{i}.jpg")
        Path(f"photos/sub/{i}.txt").write_text(f"photo {i}")
    exec((ROOT / "common" / "data" / "README.md").read_text().split("```python\n")[1].split("```")[0], {})
    run = parse("--train_shards_path_or_url", "shards", "--resolution", 64)
    found = samples_of(run)
    assert found.pop("faults") == {}
    assert {sample.caption for sample in found.values()} == {f"photo {i}" for i in range(5)}


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
