"""Tar files of samples, as WebDataset has them: members of one stem make a sample."""

import lzma
import shlex
import signal
import tarfile
import zlib
from pathlib import Path
from urllib.parse import urlparse
from urllib.request import url2pathname

from huggingface_hub import HfFileSystem, get_token
from webdataset.gopen import Pipe, gopen, gopen_schemes, rewrite_url, set_options
from webdataset.shardlists import expand_urls

SHARD_ERRORS = (OSError, EOFError, tarfile.TarError, zlib.error, lzma.LZMAError)

IMAGE_MEMBERS = ("jpg", "png", "jpeg", "webp")
VIDEO_MEMBERS = ("mp4", "webm", "mkv", "mov", "m4v", "avi", "gif", "webp")  # webp: an animated one
MOST_MEMBER_BYTES = 1 << 28

# The program that reads URLs of a scheme; of pipe: it is the user's. gopen has s3: only where USE_AIS_FOR says so.
PROGRAMS = {"gopen_pipe": None, "gopen_gsutil": "gsutil", "gopen_ais": "ais"}  # else curl
READ_BY = {"s3": "aws"} | {scheme: PROGRAMS.get(f.__name__, "curl") for scheme, f in gopen_schemes.items()}
del READ_BY["__default__"]


def scheme_of(shard: str) -> str:
    return shard.partition(":")[0].lower()


def is_local(part) -> bool:
    """Whether a shard, or another part of a dataset, is read from this machine's files."""
    return not isinstance(part, str) or scheme_of(part) not in READ_BY


def expand_shards(spec: str) -> list[str]:
    """Paths and URLs of a list as webdataset has it: `::` between entries, braces, ${NAME} for the variable WDS_NAME.

    An entry may be a file, .txt or .list, in which each line is such a list.
    """
    shards = []
    for entry in expand_line(spec):
        if is_local(entry) and Path(entry).suffix in (".txt", ".list"):
            shards += [shard for line in read_list(Path(entry)) for shard in expand_line(line)]
        else:
            shards.append(entry)
    return shards


def expand_line(line: str) -> list[str]:
    try:
        shards = map(rewrite_url, expand_urls(line))  # as gopen would, here to know what is local
    except AssertionError as error:
        name = str(error).rpartition("wds_")[2]
        raise ValueError(f"{line}: the environment variable {name} is not set") from None
    return [url2pathname(urlparse(shard).path) if scheme_of(shard) == "file" else shard for shard in shards]


def read_list(path: Path) -> list[str]:
    """Lines of a text file, without empty ones and comments."""
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    return [line for line in lines if line and not line.startswith("#")]


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
    """A readable binary stream. What is not local is read by a command that webdataset's gopen runs.

    That is curl (with its retries), gsutil or ais, or of `pipe:` the user's own. What stops a run must not stop the
    command too, or the shard would look cut off in the last checkpoint.
    """
    if is_local(shard):
        return open(shard, "rb")
    if scheme_of(shard) == "s3" and "s3" not in gopen_schemes:
        shard = f"pipe:aws s3 cp {shlex.quote(shard)} -"
    if scheme_of(shard) == "hf" and get_token() is None:
        shard = HfFileSystem().url(shard)  # gopen would send the token "None"
    if scheme_of(shard) == "pipe":  # gopen's, but in a session of its own: shells do not keep signals blocked
        command = shard.partition(":")[2]
        stream = Pipe(command, mode="rb", shell=True, bufsize=8192, ignore_status=[141], start_new_session=True)
    else:
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})  # for the command
        try:
            stream = gopen(shard, "rb")
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
    # Else a read raises as soon as the command has failed, and what it wrote before that is lost or not, by chance.
    set_options(stream, ignore_errors=True)
    return stream


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
    except Exception:  # of the hub's client, which has errors of several libraries
        yield None, "unreadable shard"
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
                members[extension] = b"" if info.size > MOST_MEMBER_BYTES else tar.extractfile(info).read()
            # What follows the archive's end is padding: read it, or the program behind a pipe dies of SIGPIPE.
            while stream.read(1 << 20):
                pass
        if members:
            yield finished()
        if isinstance(stream, Pipe) and stream.status not in stream.ignore_status:
            yield key, "shard's command failed"
    except SHARD_ERRORS:
        yield key, "unreadable shard" if key is None else "truncated shard"


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
