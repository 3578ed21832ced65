"""What the frozen encoders make of samples, taken from the caches where it is there.

The encoders are loaded at first need: a run whose caches hold everything never loads them.
"""

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from common.cache import TensorStore, text_key
from common.data import Sample, is_local, shard_fingerprint
from common.stream import ShardPass


class SampleEncoder:
    """Latents and text embeddings of samples. `latents` and `text` are stores, or None for no cache.

    `load_vae() -> vae`, `encode_pixels(vae, pixels) -> {name: [B, ...]}`, `load_text() -> encoder` and
    `encode_prompts(encoder, prompts) -> {name: [B, ...]}` are the model's own.
    """

    def __init__(self, *, load_vae, encode_pixels, load_text, encode_prompts, latents, text, vae_batch_size, device):
        self.load_vae, self.encode_pixels = load_vae, encode_pixels
        self.load_text, self.encode_prompts = load_text, encode_prompts
        self.latents, self.text = latents, text
        self.vae_batch_size, self.device = vae_batch_size, device
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
        """{name: [B, ...]} on the device; what was not cached is encoded, and kept where there is a cache."""
        rows = [sample.latents for sample in samples]
        if self.latents is not None:  # a reader process does not know what was kept since it started
            rows = [self.latents.get(s.key) if row is None else row for s, row in zip(samples, rows, strict=True)]
        missing = [i for i, row in enumerate(rows) if row is None]
        for start in range(0, len(missing), self.vae_batch_size):
            chunk = missing[start : start + self.vae_batch_size]
            pixels = torch.stack([samples[i].pixels for i in chunk]).to(self.device, non_blocking=True)
            encoded = self.encode_pixels(self.vae, pixels.float() / 127.5 - 1.0)
            for row, i in enumerate(chunk):
                rows[i] = {name: values[row] for name, values in encoded.items()}
                rows[i]["size_ids"] = torch.tensor(samples[i].size_ids)
                if self.latents is not None:
                    self.latents.put(samples[i].key, rows[i])
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
        return self.stack([rows[prompt] for prompt in prompts])

    def stack(self, rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        names = rows[0] if rows else {}
        return {name: torch.stack([row[name].to(self.device) for row in rows]) for name in names}

    def fill(self, accelerator, shards: list[str], reader, prompts: list[str], workers: int):
        """Encode all that the caches lack, each process its share of the shards. Shards that are done are not read."""
        todo = [shard for shard in shards if is_local(shard) and not self.is_done(shard)]
        if accelerator.is_main_process:
            self.encode_text(prompts)
        share = ShardPass(todo, reader, process=accelerator.process_index, processes=accelerator.num_processes)
        waiting: list[Sample] = []
        with tqdm(desc="filling caches", unit=" images", disable=not accelerator.is_main_process) as bar:
            for item in DataLoader(share, batch_size=None, num_workers=min(workers, len(todo))):
                end_of_shard = not isinstance(item, Sample)
                if not end_of_shard:
                    bar.update()
                    if item.latents is None or text_key(item.caption) not in self.text:
                        waiting.append(item)
                if waiting and (end_of_shard or len(waiting) == self.vae_batch_size):
                    self.encode_text([sample.caption for sample in waiting])
                    self.encode_images([sample for sample in waiting if sample.latents is None])
                    waiting = []
                if end_of_shard:
                    self.flush()
                    self.latents.mark(self.done_name(item))
        self.flush()
        accelerator.wait_for_everyone()
        self.latents.refresh()
        self.text.refresh()
        accelerator.print(f"caches: {len(self.latents.index)} latents, {len(self.text.index)} prompts")

    def done_name(self, shard: str) -> str:
        return f"{shard_fingerprint(shard)}-{self.text.folder.name}"

    def is_done(self, shard: str) -> bool:
        return self.latents.is_marked(self.done_name(shard))

    def flush(self):
        for store in (self.latents, self.text):
            if store is not None:
                store.flush()


def open_stores(args, latents_identity: str, text_identity: str) -> tuple[TensorStore, TensorStore]:
    """Both stores, in folders named by what shaped their records."""
    root = f"{args.output_dir}/cache"
    return (
        TensorStore(f"{args.cache_dir_vae or root + '/vae'}/{latents_identity}", args.compress_disk_cache),
        TensorStore(f"{args.cache_dir_text or root + '/text'}/{text_identity}", args.compress_disk_cache),
    )
