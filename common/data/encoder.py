"""Latents and text embeddings of samples, from the caches, or else by the frozen encoders.

The encoders are loaded when they are first needed: a run with full caches never loads them.
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from tqdm import tqdm

from common.cache import RECORDS_PER_FILE, TensorStore, identity, text_key
from common.data.datasets import Data, Dataset
from common.data.samples import Sample
from common.data.shards import is_local
from common.data.sources import part_fingerprint
from common.data.stream import ShardPass, load, open_batches
from common.draws import to_device
from common.planning.meter import Meter, Unwritten

CAPTIONS_AT_ONCE = 32  # that go to the text encoder while caches are filled
ROUND = 60.0  # seconds of filling after which processes meet


@dataclass(frozen=True)
class Encoders:
    """Functions of the model. A model on pixels loads None as its VAE, one without prompts None as its text encoder.

    With `text_length` an embedding [L, C] may have any length up to that: it is cached so, and padded with zeros when
    it is used.
    """

    load_vae: Callable[[], object]
    encode_pixels: Callable[[object, torch.Tensor], dict[str, torch.Tensor]]  # (vae, pixels) -> {name: [B, ...]}
    load_text: Callable[[], object]
    encode_prompts: Callable[[object, list[str]], dict[str, torch.Tensor | list[torch.Tensor]]]  # a row for each prompt
    latents_identity: Callable[[], dict]  # all that shapes cached latents besides a reader's geometry
    text_identity: Callable[[], dict]  # all that shapes cached text embeddings
    text_length: int | None = None


class SampleEncoder:
    """Encoder of samples. `latents` are the stores of the datasets, `text` is the store of texts; None for no cache."""

    def __init__(self, encoders: Encoders, *, latents, text, vae_batch_size: int, device):
        self.encoders, self.latents, self.text = encoders, latents, text
        self.vae_batch_size, self.device = vae_batch_size, device
        self.loaded = {}  # by loader; a None is not loaded again
        self.waiting: dict[tuple, list[Sample]] = {}  # by bucket, of those whose latents are to be cached
        self.captions: dict[str, None] = {}  # to be cached, in the order in which they came

    def load(self, loader):
        """The network of this loader, which is called once until release()."""
        if loader not in self.loaded:
            self.loaded[loader] = loader()
        return self.loaded[loader]

    @property
    def vae(self):
        return self.load(self.encoders.load_vae)

    def release(self):
        """Frees the encoders' memory; they are loaded again when they are needed."""
        self.loaded.clear()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    @torch.no_grad()
    def encode_images(self, samples: list[Sample]) -> dict[str, torch.Tensor]:
        """Latents of samples of one bucket, {name: [B, ...]} on the device. Encodes and caches missing ones."""
        rows = [sample.latents for sample in samples]
        if self.latents is not None:  # a reader process knows no record that was added since it started
            pairs = zip(samples, rows, strict=True)
            rows = [self.latents[sample.dataset].get(sample.key) if row is None else row for sample, row in pairs]
        missing = [i for i, row in enumerate(rows) if row is None]
        for start in range(0, len(missing), self.vae_batch_size):
            chunk = missing[start : start + self.vae_batch_size]
            for i, row in zip(chunk, self.records_of([samples[i] for i in chunk]), strict=True):
                rows[i] = row
                if self.latents is not None:
                    self.latents[samples[i].dataset].put(samples[i].key, row)
        return self.stack(rows)

    def records_of(self, samples: list[Sample]) -> list[dict[str, torch.Tensor]]:
        """What is cached of each of these samples of one bucket: its latents by the VAE, and its size_ids."""
        pixels = to_device(torch.stack([sample.pixels for sample in samples]), self.device)
        encoded = self.encoders.encode_pixels(self.vae, pixels.float() / 127.5 - 1.0)
        return [
            {name: values[row] for name, values in encoded.items()} | {"size_ids": torch.tensor(sample.size_ids)}
            for row, sample in enumerate(samples)
        ]

    @torch.no_grad()
    def encoded(self, samples: list[Sample]) -> list[Sample]:
        """These samples with latents in place of pixels, for what no cache keeps; the encoders are freed again."""
        found = []
        for sample in samples:
            (row,) = self.records_of([sample])
            latents = {name: values.cpu() for name, values in row.items()}
            found.append(replace(sample, latents=latents, pixels=None))
            self.encode_text([sample.caption])
        self.release()
        return found

    @torch.no_grad()
    def encode_text(self, prompts: list[str]) -> dict[str, torch.Tensor]:
        """Embeddings of prompts, {name: [B, ...]} on the device. Encodes and caches missing ones."""
        rows = {prompt: self.text.get(text_key(prompt)) if self.text is not None else None for prompt in prompts}
        if missing := [prompt for prompt, row in rows.items() if row is None]:
            encoded = self.encoders.encode_prompts(self.load(self.encoders.load_text), missing)
            for i, prompt in enumerate(missing):
                rows[prompt] = {name: values[i] for name, values in encoded.items()}
                if self.text is not None:
                    self.text.put(text_key(prompt), rows[prompt])
        return self.stack([rows[prompt] for prompt in prompts], self.encoders.text_length)

    def stack(self, rows: list[dict[str, torch.Tensor]], length: int | None = None) -> dict[str, torch.Tensor]:
        def padded(row):  # [L, C] -> [length, C]
            return row if length is None else torch.nn.functional.pad(row, (0, 0, 0, length - len(row)))

        stacked = {}
        for name in rows[0] if rows else {}:
            values = [padded(row[name]) for row in rows]
            if len({value.device for value in values}) > 1:  # from the cache some, from the encoder others
                values = [to_device(value, self.device) for value in values]
            stacked[name] = to_device(torch.stack(values), self.device)
        return stacked

    def fill(self, accelerator, datasets: tuple[Dataset, ...], readers, workers: int) -> Iterator[None]:
        """Encodes all that the caches lack, each process of its share of the parts. Marked parts are not read."""
        todo = [
            (i, part) for i, dataset in enumerate(datasets) if "vae" not in dataset.skip for part in dataset.parts
            if is_local(part) and not self.store_of(i).is_marked(self.done_name(dataset, part))
        ]  # fmt: skip
        share = ShardPass(todo, readers, process=accelerator.process_index, processes=accelerator.num_processes)
        with self.progress(accelerator) as bar:
            for item in load(share, min(workers, len(todo))):
                if isinstance(item, Sample):
                    bar.update()
                    if "text" in datasets[item.dataset].skip:
                        item.captions = []
                    self.encode_soon(item)
                else:  # the end of a part
                    self.encode_waiting()
                    self.flush()
                    dataset, part = todo[item]
                    self.store_of(dataset).mark(self.done_name(datasets[dataset], part))
                yield

    def fill_for(self, accelerator, batches, count: int) -> Iterator[None]:
        """Encodes what the caches lack of the first `count` batches, for a run that takes no more."""
        with self.progress(accelerator) as bar:
            for _ in range(count):
                samples = next(batches)
                bar.update(len(samples))
                for sample in samples:
                    self.encode_soon(sample)
                yield
        self.encode_waiting()

    def progress(self, accelerator) -> tqdm:
        return tqdm(desc="filling caches", unit=" samples", disable=not accelerator.is_main_process)

    def share_caches(self, accelerator):
        """Ends the filling: all processes then know what each of them has written, and need no encoder."""
        self.flush()
        self.release()
        accelerator.wait_for_everyone()
        latents = {id(store): store for store in self.latents or [] if store is not self.text}.values()
        for store in [*latents, self.text]:
            store.refresh()
        count = sum(len(store.index) for store in latents)
        accelerator.print(f"caches: {count} latents, {len(self.text.index)} prompts")

    def store_of(self, dataset: int) -> TensorStore:
        """The store that remembers which parts of a dataset are done."""
        return self.text if self.latents is None else self.latents[dataset]

    def encode_soon(self, sample: Sample):
        """Caches captions of a sample as soon as enough wait, and its latents as soon as enough of its bucket do."""
        self.captions |= {caption: None for caption in sample.captions if text_key(caption) not in self.text}
        if len(self.captions) >= CAPTIONS_AT_ONCE:
            self.encode_captions()
        if sample.latents is None:
            self.waiting.setdefault(sample.bucket, []).append(sample)
            if len(self.waiting[sample.bucket]) == self.vae_batch_size:
                self.encode_images(self.waiting.pop(sample.bucket))

    def encode_waiting(self):
        self.encode_captions()
        while self.waiting:
            self.encode_images(self.waiting.popitem()[1])

    def encode_captions(self):
        if self.captions:
            self.encode_text(list(self.captions))
        self.captions.clear()

    def done_name(self, dataset: Dataset, part) -> str:
        """Name under which a store remembers that it has all of a part: it holds all that decides its records."""
        captions = "no-captions" if "text" in dataset.skip else dataset.caption_strategy or "captions"
        if dataset.instance_prompt and "text" not in dataset.skip:
            captions = identity(instance_prompt=dataset.instance_prompt)
        merged = f"-{identity(merged=sorted(dataset.merged.items()))}" if dataset.merged else ""
        return f"{part_fingerprint(part)}-{captions}{merged}-{self.text.folder.name}"

    def flush(self):
        for store in [*(self.latents or []), self.text]:
            if store is not None:
                store.flush()


def open_encoder(
    args, data: Data, readers: list, encoders: Encoders, accelerator, prompts: list[str], state: dict, sharing: int = 1
) -> tuple[SampleEncoder, list]:
    """The encoder of samples, and readers that know the caches. Caches that are filled before training are filled here.

    `prompts` are cached besides the samples' captions. A run that visits fewer samples than an epoch has, from the
    `state` of its checkpoint on, fills the caches with these alone. A plan has caches in memory, of `prompts`.
    """
    latents, text, filling = None, None, []
    if Meter.running:
        text = None if data.caches == "off" else Unwritten()
        latents = [Unwritten() for _ in data.datasets] if text is not None and data.keeps_latents else None
    elif data.caches != "off":
        text = open_text_store(args, data, encoders)
        latents = open_latent_stores(args, data, readers, encoders, text) if data.keeps_latents else None
        stores = latents or [None] * len(readers)
        filling = [reader.with_cache(store, filling=True) for reader, store in zip(readers, stores, strict=True)]
        readers = [reader.with_cache(store) for reader, store in zip(readers, stores, strict=True)]
    encoder = SampleEncoder(
        encoders, latents=latents, text=text, vae_batch_size=args.vae_encode_batch_size, device=accelerator.device
    )
    if data.caches == "fill" and Meter.running:
        encoder.encode_text(prompts)
        encoder.release()
    elif data.caches == "fill":
        if accelerator.is_main_process:
            encoder.encode_text(prompts)
        batches = ((args.max_train_steps or math.inf) - state["step"]) * args.gradient_accumulation_steps
        visits = batches * args.train_batch_size * accelerator.num_processes // sharing
        if visits < data.samples and (data.held_out or not args.eval_steps):  # whose held-out samples are further ones
            streamed = open_batches(args, data, accelerator, filling, state["stream"], sharing, say=lambda text: None)
            work = encoder.fill_for(accelerator, streamed, batches)
        else:
            work = encoder.fill(accelerator, data.datasets, filling, args.dataloader_num_workers)
        do_in_rounds(accelerator, work)
        encoder.share_caches(accelerator)
    return encoder, readers


def do_in_rounds(accelerator, work: Iterator[None]):
    """Does all of this process's work. One that is done waits for others no longer than a round, as often as needed.

    A single wait for them would end the run where it is longer than the process group's patience.
    """
    all_done = False
    while not all_done:
        end = time.monotonic() + ROUND
        done = next((False for _ in work if time.monotonic() > end), True)
        mine = torch.tensor(float(done), device=accelerator.device)
        all_done = done if accelerator.num_processes == 1 else accelerator.reduce(mine, "mean").item() == 1.0


def open_text_store(args, data: Data, encoders: Encoders) -> TensorStore:
    """The store of texts, in a folder named by all that shapes records."""
    folder = f"{data.cache_dir_text or args.output_dir + '/cache/text'}/{identity(**encoders.text_identity())}"
    return TensorStore(folder, args.compress_disk_cache, data.write_batch_size or RECORDS_PER_FILE)


def open_latent_stores(args, data: Data, readers: list, encoders: Encoders, text: TensorStore) -> list[TensorStore]:
    """Stores of latents, one for each dataset, in folders named by all that shapes records.

    A dataset of prompts alone has no latents: the store of texts stands in for theirs.
    """
    folders, weights = [], encoders.latents_identity()  # once, as it hashes the weights' files
    for dataset, reader in zip(data.datasets, readers, strict=True):
        name = identity(**weights, geometry=reader.geometry())
        parent = dataset.cache_dir_vae or args.cache_dir_vae or f"{args.output_dir}/cache/vae"
        folders.append(None if dataset.sizes else f"{parent}/{name}")
    stores = {folder: TensorStore(folder, args.compress_disk_cache) for folder in dict.fromkeys(folders) if folder}
    return [stores.get(folder, text) for folder in folders]
