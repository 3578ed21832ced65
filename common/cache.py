"""Stores of tensors by key, for the outputs of frozen networks: latents and text embeddings.

A store is a folder of safetensors files. Each holds many records; a record is the safetensors bytes of a few named
tensors, with a checksum. Files are written under a temporary name, flushed and renamed, and never changed, so that
processes and runs may share a store. A record that is missing or damaged is computed again.
"""

import hashlib
import json
import os
import uuid
import zlib
from pathlib import Path

import safetensors
import torch
from safetensors.torch import load, save, save_file

FORMAT = "1"  # of records; another number gives every store another name
RECORDS_PER_FILE = 1024


def identity(**parts) -> str:
    """A short name of a store, by everything that shapes its records."""
    text = json.dumps({"format": FORMAT, **parts}, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def weights_identity(model: str, subfolder: str | None, revision: str | None, variant: str | None = None) -> str:
    """Hash of the files of a local network or tokenizer, or name, revision and variant of one on the hub."""
    folder, suffix = Path(model, subfolder or ""), f" {variant}" if variant else ""
    if not folder.is_dir():
        return f"{model}/{subfolder} @ {revision}{suffix}"
    digest = hashlib.blake2b(digest_size=16)
    kinds = ("*.safetensors", "*.bin", "*.json", "*.txt", "*.model")  # a tokenizer's files too
    for path in sorted(path for kind in kinds for path in folder.glob(kind)):
        with open(path, "rb") as file:
            while chunk := file.read(1 << 24):
                digest.update(chunk)
    return digest.hexdigest() + suffix


def text_key(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


class TensorStore:
    """A store: get(key) -> tensors by name, or None; put(key, tensors). `key in store` looks into the index alone."""

    def __init__(self, folder: Path, compress: bool = False, records_per_file: int = RECORDS_PER_FILE):
        self.folder, self.compress, self.records_per_file = Path(folder), compress, records_per_file
        self.folder.mkdir(parents=True, exist_ok=True)
        self.index: dict[str, Path] = {}
        self.waiting: dict[str, dict[str, torch.Tensor]] = {}
        self.files = {}
        self.refresh()

    def refresh(self):
        """Adds the records that other processes have written to the index."""
        known = set(self.index.values())
        # Oldest first: of a record that was computed again the newer one counts
        for path in sorted(self.folder.glob("*.safetensors"), key=lambda path: path.stat().st_mtime_ns):
            if path not in known:
                try:
                    with safetensors.safe_open(path, "pt") as file:
                        self.index.update(dict.fromkeys(file.keys(), path))
                except (OSError, safetensors.SafetensorError):
                    print(f"cache: {path} cannot be read, its records will be made again")

    def mark(self, name: str):
        """Remembers, also for other runs, that all records of the part `name` of the data are in the store."""
        Path(self.folder, f"{name}.done").touch()

    def is_marked(self, name: str) -> bool:
        return Path(self.folder, f"{name}.done").exists()

    def __contains__(self, key: str) -> bool:
        return key in self.index or key in self.waiting

    def __getstate__(self):  # open files cannot be sent to workers
        return self.__dict__ | {"files": {}, "waiting": {}}

    def get(self, key: str) -> dict[str, torch.Tensor] | None:
        if key in self.waiting:
            return self.waiting[key]
        if key not in self.index:
            return None
        path = self.index[key]
        try:
            if path not in self.files:
                file = safetensors.safe_open(path, "pt")
                metadata = file.metadata()
                self.files[path] = file, json.loads(metadata["checksums"]), metadata["compressed"] == "True"
            file, checksums, compressed = self.files[path]
            data = file.get_tensor(key).numpy().tobytes()
            if zlib.crc32(data) != checksums[key]:
                raise ValueError("checksum")
            return load(zlib.decompress(data) if compressed else data)
        except (OSError, ValueError, KeyError, zlib.error, safetensors.SafetensorError):
            print(f"cache: record {key} of {path} is damaged and will be made again")
            del self.index[key]
            return None

    def put(self, key: str, tensors: dict[str, torch.Tensor]):
        self.waiting[key] = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        if len(self.waiting) >= self.records_per_file:
            self.flush()

    def flush(self):
        """Writes waiting records as one file, which is complete or does not exist."""
        if not self.waiting:
            return
        blobs = {key: save(tensors) for key, tensors in self.waiting.items()}
        if self.compress:
            blobs = {key: zlib.compress(data, 1) for key, data in blobs.items()}
        path = self.folder / f"{uuid.uuid4().hex}.safetensors"
        part = path.with_suffix(".part")
        save_file(
            {key: torch.frombuffer(bytearray(data), dtype=torch.uint8) for key, data in blobs.items()},
            part,
            {
                "checksums": json.dumps({key: zlib.crc32(data) for key, data in blobs.items()}),
                "compressed": str(self.compress),
            },
        )
        with open(part, "rb") as file:
            os.fsync(file.fileno())
        part.rename(path)
        self.index.update(dict.fromkeys(self.waiting, path))
        self.waiting.clear()
