"""Tar files of samples, as WebDataset has them: members of one stem make a sample."""

import http.client
import subprocess
import tarfile
import urllib.request
import zlib

from braceexpand import braceexpand

SHARD_ERRORS = (OSError, EOFError, http.client.HTTPException, tarfile.TarError, zlib.error)


IMAGE_MEMBERS = ("jpg", "png", "jpeg", "webp")


VIDEO_MEMBERS = ("mp4", "webm", "mkv", "mov", "m4v", "avi", "gif", "webp")  # webp: an animated one


MOST_MEMBER_BYTES = 1 << 28


def expand_shards(spec: str) -> list[str]:
    """Paths and URLs of a brace-expanded string; `::` separates several."""
    return [shard for part in spec.split("::") for shard in braceexpand(part)]


def is_local(shard) -> bool:
    return not (isinstance(shard, str) and shard.startswith(("pipe:", "http://", "https://")))


class StrictTarInfo(tarfile.TarInfo):
    """tarfile takes a header that is damaged or cut off for the archive's end; here it is an error."""

    @classmethod
    def fromtarfile(cls, tar):
        try:
            return super().fromtarfile(tar)
        except tarfile.EOFHeaderError:
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(str(error)) from None


def open_shard(shard: str):
    """A readable binary stream, and what to call once it is at its end."""
    if shard.startswith("pipe:"):
        # In a session of its own, or Ctrl-C would cut the shard off before the last checkpoint is saved.
        process = subprocess.Popen(shard[len("pipe:") :], shell=True, stdout=subprocess.PIPE, start_new_session=True)
        return process.stdout, process.wait
    if shard.startswith(("http://", "https://")):
        return urllib.request.urlopen(shard, timeout=60), lambda: 0
    return open(shard, "rb"), lambda: 0


def read_shard(shard: str):
    """Yields (key, members) for each sample of a tar, or (key, cause) for one that cannot be used."""
    seen, key, members = set(), None, {}

    def finished():
        return (key, "duplicate key") if key in seen else (key, members)

    try:
        stream, at_end = open_shard(shard)
        with stream, tarfile.open(fileobj=stream, mode="r|*", tarinfo=StrictTarInfo) as tar:
            for info in tar:
                if not info.isfile():
                    continue
                folder, _, name = info.name.rpartition("/")
                stem, _, extension = name.partition(".")
                if f"{folder}/{stem}" != key or extension.lower() in members:
                    if members:
                        yield finished()
                        seen.add(key)
                    key, members = f"{folder}/{stem}", {}
                if info.size > MOST_MEMBER_BYTES:
                    members[extension.lower()] = b""
                else:
                    members[extension.lower()] = tar.extractfile(info).read()
            # What follows the archive's end is padding: read it, or the program behind a pipe dies of SIGPIPE.
            while stream.read(1 << 20):
                pass
        if members:
            yield finished()
        if at_end() != 0:
            yield key, "shard's command failed"
    except SHARD_ERRORS:
        yield key, "unreadable shard" if key is None else "truncated shard"


def shard_keys(shard: str) -> set[tuple[str, str]]:
    """Of the samples in a local shard, from the tar headers alone."""
    keys = set()
    try:
        with tarfile.open(shard) as tar:
            for info in tar:
                folder, _, name = info.name.rpartition("/")
                keys.add((folder, name.partition(".")[0]))
    except SHARD_ERRORS:
        pass  # counted as faults when the shard is read
    return keys


def is_frame(extension: str) -> bool:
    """Of a sequence of pictures in one sample: clip.0001.jpg, clip.0002.jpg, ..."""
    return extension.rpartition(".")[2] in IMAGE_MEMBERS


def shard_pictures(shard: str, kind: str):
    """A file object for the image, or for the video or its first frame, of each sample of a local shard.

    Compressed ones are left out.
    """
    seen = set()
    try:
        with tarfile.open(shard) as tar:
            for info in tar:
                folder, _, name = info.name.rpartition("/")
                stem, _, extension = name.partition(".")
                extension = extension.lower()
                wanted = extension in IMAGE_MEMBERS
                if kind == "video":
                    wanted = extension in VIDEO_MEMBERS or is_frame(extension)
                if info.isfile() and wanted and (folder, stem) not in seen:
                    seen.add((folder, stem))
                    yield tar.extractfile(info)
    except SHARD_ERRORS:
        pass
