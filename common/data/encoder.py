"""What the frozen encoders make of samples, taken from the caches where it is there.

The encoders are loaded at first need: a run whose caches hold everything never loads them.
"""

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from common.cache import RECORDS_PER_FILE, TensorStore, identity, text_key
from common.data.datasets import Dataset
from common.data.samples import Sample
from common.data.shards import is_local
from common.data.sources import part_fingerprint
from common.data.stream import ShardPass


class SampleEncoder:
    """Latents and text embeddings of samples. `text` is a store, `latents` are the datasets' stores, None for no cache.

    `load_vae() -> vae`, `encode_pixels(vae, pixels) -> {name: [B, ...]}`, `load_text() -> encoder` and
    `encode_prompts(encoder, prompts) -> {name: [B, ...]}` are the model's own. With `text_length` a text's rows may be
    of any length up to that, `{name: [[L, C], ...]}`: they are kept so, and padded with zeros when they are used.
    """

    def __init__(
        self, *, load_vae, encode_pixels, load_text, encode_prompts, latents, text, vae_batch_size, device,
        text_length=None,
    ):  # fmt: skip
        self.load_vae, self.encode_pixels = load_vae, encode_pixels
        self.load_text, self.encode_prompts = load_text, encode_prompts
        self.latents, self.text = latents, text
        self.vae_batch_size, self.device, self.text_length = vae_batch_size, device, text_length
        self.loaded_vae = self.loaded_text = None

    @property
    def vae(self):
        if self.loaded_vae is None:
            self.loaded_vae = self.load_vae()
        return self.loaded_vae

    def release(self):
        """Give the encoders' memory back; what needs them loads them again."""
        self.loaded_vae = self.loaded_text = None
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    @torch.no_grad()
    def encode_images(self, samples: list[Sample]) -> dict[str, torch.Tensor]:
        """{name: [B, ...]} on the device; what was not cached is encoded, and kept where there is a cache.

        All samples are of one bucket.
        """
        rows = [sample.latents for sample in samples]
        if self.latents is not None:  # a reader process does not know what was kept since it started
            pairs = zip(samples, rows, strict=True)
            rows = [self.latents[sample.dataset].get(sample.key) if row is None else row for sample, row in pairs]
        missing = [i for i, row in enumerate(rows) if row is None]
        for start in range(0, len(missing), self.vae_batch_size):
            chunk = missing[start : start + self.vae_batch_size]
            pixels = torch.stack([samples[i].pixels for i in chunk]).to(self.device, non_blocking=True)
            encoded = self.encode_pixels(self.vae, pixels.float() / 127.5 - 1.0)
            for row, i in enumerate(chunk):
                rows[i] = {name: values[row] for name, values in encoded.items()}
                rows[i]["size_ids"] = torch.tensor(samples[i].size_ids)
                if self.latents is not None:
                    self.latents[samples[i].dataset].put(samples[i].key, rows[i])
        return self.stack(rows)

    @torch.no_grad()
    def encode_text(self, prompts: list[str]) -> dict[str, torch.Tensor]:
        """{name: [B, ...]} on the device, likewise."""
        rows = {prompt: self.text.get(text_key(prompt)) if self.text is not None else None for prompt in prompts}
        if missing := [prompt for prompt, row in rows.items() if row is None]:
            if self.loaded_text is None:
                self.loaded_text = self.load_text()
            encoded = self.encode_prompts(self.loaded_text, missing)
            for i, prompt in enumerate(missing):
                rows[prompt] = {name: values[i] for name, values in encoded.items()}
                if self.text is not None:
                    self.text.put(text_key(prompt), rows[prompt])
        return self.stack([rows[prompt] for prompt in prompts], self.text_length)

    def stack(self, rows: list[dict[str, torch.Tensor]], length: int | None = None) -> dict[str, torch.Tensor]:
        def whole(row):  # [L, C] -> [length, C]
            return row if length is None else torch.nn.functional.pad(row, (0, 0, 0, length - len(row)))

        names = rows[0] if rows else {}
        return {name: torch.stack([whole(row[name].to(self.device)) for row in rows]) for name in names}

    def fill(self, accelerator, datasets: list[Dataset], readers, prompts: list[str], workers: int):
        """Encode all that the caches lack, each process its share of the shards. Shards that are done are not read."""
        todo = [
            (i, part) for i, dataset in enumerate(datasets) if "vae" not in dataset.skip
            for part in dataset.parts if is_local(part) and not self.latents[i].is_marked(self.done_name(dataset, part))
        ]  # fmt: skip
        if accelerator.is_main_process:
            self.encode_text(prompts)
        share = ShardPass(todo, readers, process=accelerator.process_index, processes=accelerator.num_processes)
        waiting: dict[tuple, list[Sample]] = {}  # by bucket
        with tqdm(desc="filling caches", unit=" samples", disable=not accelerator.is_main_process) as bar:
            for item in DataLoader(share, batch_size=None, num_workers=min(workers, len(todo))):
                if isinstance(item, Sample):
                    bar.update()
                    if "text" in datasets[item.dataset].skip:
                        item.captions = []
                    if item.latents is None or any(text_key(caption) not in self.text for caption in item.captions):
                        waiting.setdefault(item.bucket, []).append(item)
                        if len(waiting[item.bucket]) == self.vae_batch_size:
                            self.encode(waiting.pop(item.bucket))
                else:  # the end of a shard
                    while waiting:
                        self.encode(waiting.popitem()[1])
                    self.flush()
                    dataset, part = todo[item]
                    self.latents[dataset].mark(self.done_name(datasets[dataset], part))
        self.flush()
        self.release()  # training needs them no more
        accelerator.wait_for_everyone()
        stores = {id(store): store for store in self.latents if store is not self.text}.values()
        for store in [*stores, self.text]:
            store.refresh()
        count = sum(len(store.index) for store in stores)
        accelerator.print(f"caches: {count} latents, {len(self.text.index)} prompts")

    def encode(self, samples: list[Sample]):
        self.encode_text(list(dict.fromkeys(caption for sample in samples for caption in sample.captions)))
        self.encode_images([sample for sample in samples if sample.latents is None])

    def done_name(self, dataset: Dataset, part) -> str:
        captions = "no-captions" if "text" in dataset.skip else dataset.caption_strategy or "captions"
        merged = f"-{identity(merged=sorted(dataset.merged.items()))}" if dataset.merged else ""
        return f"{part_fingerprint(part)}-{captions}{merged}-{self.text.folder.name}"

    def flush(self):
        for store in [*(self.latents or []), self.text]:
            if store is not None:
                store.flush()


def open_stores(args, latents_identities: list[str], text_identity: str) -> tuple[list[TensorStore], TensorStore]:
    """Each dataset's store of latents and that of texts, in folders named by what shaped their records.

    Prompts alone have no latents: the store of texts stands in for theirs.
    """
    root = f"{args.output_dir}/cache"
    pairs = zip(args.datasets, latents_identities, strict=True)
    folders = [
        None if dataset.sizes else f"{dataset.cache_dir_vae or args.cache_dir_vae or root + '/vae'}/{name}"
        for dataset, name in pairs
    ]
    stores = {folder: TensorStore(folder, args.compress_disk_cache) for folder in dict.fromkeys(folders) if folder}
    text = TensorStore(
        f"{args.cache_dir_text or root + '/text'}/{text_identity}",
        args.compress_disk_cache,
        args.write_batch_size or RECORDS_PER_FILE,
    )
    return [stores.get(folder, text) for folder in folders], text
