"""Tar files of samples, as WebDataset has them: members of one stem make a sample."""

import fcntl
import functools
import hashlib
import lzma
import os
import re
import shutil
import signal
import subprocess
import tarfile
import time
import zlib
from contextlib import suppress
from glob import glob
from pathlib import Path
from urllib.parse import urlparse, urlsplit
from urllib.request import url2pathname

import yaml
from huggingface_hub import HfFileSystem, constants, get_token
from webdataset.gopen import gopen_schemes, rewrite_url
from webdataset.shardlists import expand, expand_urls

SHARD_ERRORS = (OSError, EOFError, tarfile.TarError, zlib.error, lzma.LZMAError)

IMAGE_MEMBERS = ("jpg", "png", "jpeg", "webp", "bmp", "tif", "tiff")
VIDEO_MEMBERS = ("mp4", "webm", "mkv", "mov", "m4v", "avi", "gif", "webp")  # webp: an animated one
MOST_MEMBER_BYTES = 1 << 28  # a larger one is not read, its bytes are None

# The program that reads URLs of a scheme; of pipe: it is the user's. gopen has s3: only where USE_AIS_FOR says so.
PROGRAMS = {"gopen_pipe": None, "gopen_gsutil": "gsutil", "gopen_ais": "ais"}  # else curl
READ_BY = {"s3": "aws"} | {scheme: PROGRAMS.get(f.__name__, "curl") for scheme, f in gopen_schemes.items()}
del READ_BY["__default__"]

DELAYS = (1, 2, 4, 8)  # seconds before such a program is started again
GONE = (1, 22)  # its statuses, before it has written anything, that say that there is no such shard

TAR = re.compile(r"\.(tar|tar\.gz|tar\.bz2|tar\.xz|tgz)$")
SECRET = re.compile(
    r"""(://)[^/\s]+(?=@)  # who logs in
    | (\?|&(?=[^\s&=]+=))[^\s'"]+  # a query
    | ((?:--[a-z-]*(?:user|header|cookie)|\s-(?-i:[a-zA-Z]*?[uUHb]))[\s=\\]*)  # an option of curl or wget, and its word
      (?:'[^']*'|"(?:\\.|[^"\\])*"|\\.|[^\s'"\\])+
    | ((?:bearer|basic|token|password|secret|key)[\s:='"]+)[^\s'"]+""",
    re.IGNORECASE | re.VERBOSE,
)


def scheme_of(shard: str) -> str:
    return shard.partition(":")[0].lower()


def hide_secrets(text: str) -> str:
    """The text of a URL or of a command without what opens it."""
    return SECRET.sub(lambda found: f"{found[found.lastindex]}...", text)


def is_local(part) -> bool:
    """Whether a shard, or another part of a dataset, is read from this machine's files."""
    return not isinstance(part, str) or scheme_of(part) not in READ_BY


def expand_shards(spec: str, inside: tuple[Path, ...] = ()) -> list[str]:
    """Paths and URLs of a list as webdataset has it: `::` between entries, braces, ${NAME} for the variable WDS_NAME.

    An entry may be a pattern (data/*.tar), a folder, or a file in which each line is such a list: @file, .txt, .list;
    or one in webdataset's own YAML. `inside` are the files that led here.
    """
    shards = []
    for entry in expand_line(spec):
        path = Path(entry.removeprefix("@"))
        if not is_local(entry) or not (entry.startswith("@") or path.suffix in (".txt", ".list", ".yaml", ".yml")):
            shards += find_tars(entry)
            continue
        if path in inside:
            raise ValueError(f"{path}: a list of shards that names itself")
        for line in read_yaml(path) if path.suffix in (".yaml", ".yml") else read_list(path):
            shards += expand_shards(line, (*inside, path))
    return shards


def expand_line(line: str) -> list[str]:
    try:
        shards = map(rewrite_url, expand_urls(line))  # as gopen would, here to know what is local
    except AssertionError as error:
        name = str(error).rpartition("wds_")[2]
        raise ValueError(f"{line}: the environment variable {name} is not set") from None
    return [url2pathname(urlparse(shard).path) if scheme_of(shard) == "file" else shard for shard in shards]


def find_tars(entry: str) -> list[str]:
    """The tar files of a folder and its subfolders, or of a pattern; another entry is a shard itself."""
    if not is_local(entry) or os.path.isfile(entry):
        return [entry]
    if os.path.isdir(entry):
        paths = [path.relative_to(entry) for path in Path(entry).rglob("*") if TAR.search(path.name)]
        found = [str(Path(entry, path)) for path in paths if not any(part.startswith(".") for part in path.parts)]
    elif set("*?[") & set(entry):
        found = glob(entry, recursive=True)
    else:
        return [entry]
    if not found:
        raise ValueError(f"{entry}: no tar files in it")
    return sorted(found)


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None


def read_list(path: Path) -> list[str]:
    """Lines of a text file, without empty ones and comments."""
    lines = [line.strip() for line in read_text(path).splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


def read_yaml(path: Path) -> list[str]:
    """Lists in the layout of webdataset's MultiShardSample: a prefix, and datasets of a bucket and shards each."""

    def listed(value) -> list:
        return value if isinstance(value, list) else [value]

    lines, drawn, text = [], set(), read_text(path)
    try:
        spec = yaml.safe_load(text)
        for dataset in spec["datasets"]:
            drawn |= {"choose", "resample"} & set(dataset)
            (bucket,) = listed(dataset.get("buckets", spec.get("buckets", ""))) or [""]
            lines += [spec.get("prefix", "") + os.path.join(bucket, shards) for shards in listed(dataset["shards"])]
    except (yaml.YAMLError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: must have datasets with shards, as webdataset's: {error!r}") from None
    if drawn:
        raise ValueError(f"{path}: {min(drawn)} is not supported, use probability in a dataset file")
    return list(map(expand, lines))


# ---------------------------------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------------------------------


class StrictTarInfo(tarfile.TarInfo):
    """A tar header; tarfile takes one that is damaged or cut off for the archive's end, here it is an error."""

    @classmethod
    def fromtarfile(cls, tar):
        try:
            return super().fromtarfile(tar)
        except tarfile.EOFHeaderError:
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(str(error)) from None


def open_shard(shard: str):
    """A readable binary stream: a file, which for a shard that is not local may be in the cache, or a Program."""
    if is_local(shard):
        return open(shard, "rb")
    cache = os.environ.get("WDS_CACHE")
    return open(fetch(shard, cache), "rb") if cache else Program(shard)


def command_of(shard: str) -> tuple[str | list[str], bytes]:
    """The command that writes a shard, as in webdataset's gopen, and its input.

    That is the hub's token for curl, which `ps` does not show there; curl gives it to no host that it is redirected to.
    """
    if scheme_of(shard) == "pipe":
        return shard.partition(":")[2], b""
    program = READ_BY[scheme_of(shard)]
    if program != "curl":
        words = {"aws": ["s3", "cp", shard, "-"], "gsutil": ["cat", shard], "ais": ["get", shard, "-"]}[program]
        return [program, *words], b""
    url = HfFileSystem().url(shard) if scheme_of(shard) == "hf" else shard
    on_hub = "{0.scheme}://{0.netloc}".format(urlsplit(url)) in ("https://huggingface.co", constants.ENDPOINT)
    token = get_token() if on_hub else None
    options = "--connect-timeout 30 --retry 30 --retry-delay 2 -f -s -S -g -L -H @-".split()
    return ["curl", *options, url], f"Authorization: Bearer {token}\n".encode() if token else b""


class Program:
    """What a program writes of a shard. Where it fails it is started again, and what was read before is passed over.

    So no sample comes twice, and none is missing in a run that is resumed. A user's own command runs once. What stops
    a run must not stop the program too, or the shard would look cut off in the last checkpoint: it has its own session.
    """

    def __init__(self, shard: str):
        self.command, self.input = command_of(shard)
        self.delays = [] if isinstance(self.command, str) else list(DELAYS)
        self.given = 0
        self.start()

    def start(self):
        self.place, self.error = 0, ""
        stderr = subprocess.PIPE if self.command[0] == "curl" else None  # a line for each try; others may write much
        self.process = subprocess.Popen(
            self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, start_new_session=True,
            shell=isinstance(self.command, str),
        )  # fmt: skip
        with suppress(BrokenPipeError), self.process.stdin as file:
            file.write(self.input)

    def read(self, size: int) -> bytes:
        """Up to so many bytes; none at the end, where `error` says how the program failed."""
        while True:
            again = self.given - self.place
            data = self.process.stdout.read(min(size, again) or size)
            self.place += len(data)
            self.given = max(self.given, self.place)
            if not data:
                if not self.failed():
                    return data
                time.sleep(self.delays.pop(0))
                self.close()
                self.start()
            elif not again:
                return data

    def failed(self) -> bool:
        """Whether the program failed, and is to be started again."""
        status = self.process.wait()
        if status not in (0, 141) and not self.error:
            said = self.process.stderr.read().decode(errors="replace").splitlines() if self.process.stderr else []
            self.error = said[-1] if said else f"its command ended with status {status}"
        return bool(self.error and self.delays and (self.given or status not in GONE))

    def close(self):
        for file in filter(None, (self.process.stdout, self.process.stderr)):
            file.close()
        with suppress(OSError):  # it is over; else it may be waiting for a server, and would not see that nobody reads
            if self.process.poll() is None:
                os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def fetch(shard: str, folder: str) -> Path:
    """Path of a shard in the cache. A process that lacks it fetches it; others that lack it wait, and fail with it.

    webdataset's FileCache takes shards of one name in two folders for one, and keeps half of a shard.
    """
    name = hashlib.blake2b(shard.encode(), digest_size=8).hexdigest()
    if scheme_of(shard) != "pipe":
        name += "-" + urlsplit(shard).path.rpartition("/")[2][-100:]
    path = Path(folder, name)
    if not path.exists():
        with open(f"{path}.part", "ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # ends with the process, however that ends
            if not path.exists():
                if not has_its_name(file):
                    raise OSError("another process has just failed to read it")
                file.truncate(0)
                with Program(shard) as program:
                    shutil.copyfileobj(program, file, 1 << 20)
                    if program.error:
                        os.unlink(file.name)
                        raise OSError(program.error)
                file.flush()
                os.replace(file.name, path)
    return path


def has_its_name(file) -> bool:
    """Whether an open file is still the one of its name. Who had the lock before may have renamed or removed it."""
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(file.fileno()), os.stat(file.name))
    return False


@functools.cache
def say(fault: str):
    """Prints a fault, once in a process."""
    print(fault, flush=True)


def named_fault(shard: str, cause: str, error: str | Exception) -> str:
    """The cause, after it was printed with the shard's name and what went wrong, but without secrets of a URL."""
    words = [shard, cause, str(error).partition("\n")[0]]
    if not is_local(shard):
        words = map(hide_secrets, words)
    say(": ".join(words))
    return cause


def read_shard(shard: str):
    """Yield (key, members) for each sample of a tar, or (key, cause) for one that cannot be used.

    The walk over the members is our own, because webdataset's loses samples without a word: of a truncated tar it gives
    half a sample, and behind a damaged header it reads no further.
    """
    seen, key, members = set(), None, {}

    def finished():
        return (key, "duplicate key") if key in seen else (key, members)

    try:
        stream = open_shard(shard)
    except Exception as error:  # of the hub's client, which has errors of several libraries
        yield None, named_fault(shard, "unreadable shard", error)
        return
    try:
        with stream, tarfile.open(fileobj=stream, mode="r|*", tarinfo=StrictTarInfo) as tar:
            for info in tar:
                if not info.isfile():
                    continue
                new_key, extension = split_name(info)
                if new_key != key or extension in members:
                    if members:
                        yield finished()
                        seen.add(key)
                    key, members = new_key, {}
                members[extension] = None if info.size > MOST_MEMBER_BYTES else tar.extractfile(info).read()
            # What follows the archive's end is padding: read it, or the program behind a pipe dies of SIGPIPE.
            while stream.read(1 << 20):
                pass
        if members:
            yield finished()
        if error := getattr(stream, "error", ""):
            yield key, named_fault(shard, "shard's command failed", error)
    except SHARD_ERRORS as error:
        cause = "unreadable shard" if key is None else "truncated shard"
        yield key, named_fault(shard, cause, getattr(stream, "error", "") or error)
        if not isinstance(stream, Program) and not is_local(shard):  # in the cache: the next epoch fetches it anew
            Path(stream.name).unlink(missing_ok=True)


def split_name(info: tarfile.TarInfo) -> tuple[str, str]:
    """A member's key, which is its folder and stem, and its extension: all behind the first dot."""
    folder, _, name = info.name.rpartition("/")
    stem, _, extension = name.partition(".")
    return f"{folder}/{stem}", extension.lower()


def local_members(shard: str):
    """Yield (key, extension, header, tar) for the members of a local shard, as far as it can be read."""
    try:
        with tarfile.open(shard) as tar:
            for info in tar:
                yield *split_name(info), info, tar
    except SHARD_ERRORS:
        pass  # counted as faults when the shard is read


def count_keys(shard: str) -> int:
    """Samples in a local shard, from the tar headers alone."""
    return len({key for key, *_ in local_members(shard)})


def is_frame(extension: str) -> bool:
    """Whether a member is one of a sequence of pictures in a sample: clip.0001.jpg, clip.0002.jpg, ..."""
    return extension.rpartition(".")[2] in IMAGE_MEMBERS


def shard_pictures(shard: str, kind: str):
    """Yield a file object for the image, or for the video or its first frame, of each sample of a local shard.

    Members that are compressed themselves are left out.
    """
    seen = set()
    for key, extension, info, tar in local_members(shard):
        wanted = extension in IMAGE_MEMBERS
        if kind == "video":
            wanted = extension in VIDEO_MEMBERS or is_frame(extension)
        if info.isfile() and wanted and key not in seen:
            seen.add(key)
            yield tar.extractfile(info)
