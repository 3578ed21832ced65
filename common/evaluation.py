"""Numbers for a student: the loss on held-out samples, and the CLIP score of its pictures."""

from dataclasses import dataclass

import torch

from common.data import BadSample, Sample
from common.stream import ShardPass, sample_generator

PLACES = 4  # in the solver's grid, evenly spread, at which the loss is taken


def hold_out(args, readers: list) -> tuple[list[Sample], list]:
    """The first --eval_samples different pictures of the data, and readers that skip them."""
    if not args.eval_steps:
        return [], readers
    found, parts = {}, [(i, part) for i, dataset in enumerate(args.datasets) for part in dataset.parts]
    for sample in ShardPass(parts, readers, process=0, processes=1):
        if isinstance(sample, Sample):
            found.setdefault(image_of(sample), sample)
        if len(found) == args.eval_samples:
            break
    return list(found.values()), [WithoutHeldOut(reader, set(found)) for reader in readers]


def image_of(sample: Sample) -> str:
    """The hash alone: a record that is not in its image's own bucket has the bucket in its key."""
    return sample.key.partition("-")[0]


@dataclass
class WithoutHeldOut:
    """A reader that skips what is held out."""

    reader: object
    held_out: set[str]

    def __call__(self, members, visit, name=""):
        sample = self.reader(members, visit, name)
        if image_of(sample) in self.held_out:
            raise BadSample("held out for --eval_steps")
        return sample


@torch.no_grad()
def stable_loss(args, loss_of, network, samples: list[Sample], encoder) -> dict[str, float]:
    """Mean loss at fixed places in the grid, noise and w: the same numbers for the same weights, whatever --seed is.

    `loss_of(images, text, index, w, latent_noise, eps)` is the method's. One sample at a time: shapes may differ.
    """
    n = args.num_ddim_timesteps
    places = sorted({n * (2 * k + 1) // (2 * PLACES) for k in range(PLACES)})
    sums = dict.fromkeys(places, 0.0)
    training = network.training
    network.eval()
    for i, sample in enumerate(samples):
        images, text = encoder.encode_images([sample]), encoder.encode_text([sample.caption])
        for place in places:
            rng = sample_generator(0, i * n + place)
            w = args.w_min + (args.w_max - args.w_min) * torch.rand(1, generator=rng)
            noises = [torch.randn(images["mean"].shape, generator=rng) for _ in range(2)]
            draws = [value.to(encoder.device) for value in (torch.tensor([place]), w, *noises)]
            sums[place] += loss_of(images, text, *draws).item() / len(samples)
    network.train(training)
    return {"eval_loss": sum(sums.values()) / len(places)} | {f"eval_loss/{p}": value for p, value in sums.items()}


class ClipScore:
    """100 * cosine of picture and prompt in CLIP's space, at least 0 (Hessel et al. 2021), by a CLIP of the user's."""

    def __init__(self, name: str, device, cache_dir: str | None = None):
        from transformers import AutoTokenizer, CLIPModel
        from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil  # asks for no torchvision

        self.device = device
        try:
            self.model = CLIPModel.from_pretrained(name, cache_dir=cache_dir, dtype=torch.float32).eval()
            self.tokenizer = AutoTokenizer.from_pretrained(name, cache_dir=cache_dir)
            self.processor = CLIPImageProcessorPil.from_pretrained(name, cache_dir=cache_dir)
        except (OSError, ValueError) as error:
            raise SystemExit(f"--evaluation_clip_model {name}: cannot be loaded ({error})") from None

    @torch.no_grad()
    def __call__(self, pictures: list, prompts: list[str]) -> torch.Tensor:
        """[B]; the model is on the device only meanwhile."""
        length = self.model.config.text_config.max_position_embeddings
        tokens = self.tokenizer(prompts, padding=True, truncation=True, max_length=length, return_tensors="pt")
        pixels = self.processor(images=pictures, return_tensors="pt")["pixel_values"]
        self.model.to(self.device)
        with torch.autocast(torch.device(self.device).type, enabled=False):
            out = self.model(
                input_ids=tokens.input_ids.to(self.device), attention_mask=tokens.attention_mask.to(self.device),
                pixel_values=pixels.to(self.device),
            )  # fmt: skip
        self.model.to("cpu")
        return (100.0 * (out.image_embeds * out.text_embeds).sum(1)).clamp(min=0.0).float().cpu()


def open_clip(args, accelerator) -> ClipScore | None:
    if args.evaluation_type != "clip" or not accelerator.is_main_process:
        return None
    return ClipScore(args.evaluation_clip_model, accelerator.device, args.cache_dir)
