"""The block "The model" of train_lcm_distill_sd.py for a class-conditional U-Net on pixels: no VAE, no text encoder.

A caption names the class, and no class is guidance's empty prompt. The student is told no w: train it with one.
"""

from pathlib import Path

import torch
from diffusers import DDIMScheduler, LCMScheduler, UNet2DModel
from diffusers.image_processor import VaeImageProcessor

from common.data.buckets import Rules
from common.data.encoder import Encoders
from common.solvers import student_scheduler

FAMILY = "class-conditional"  # model_family of config files
CLASSES = ("circle", "square", "triangle", "star")  # words of captions; the network has one class more, for none
LORA_TARGETS = ""
COMPILED_BLOCKS, PREVIEW_MODEL, TOY_SIZES = ("ResnetBlock2D",), None, ()


def add_model_flags(parser):
    parser.add_argument("--resolution", type=int, default=64, help="training pixels, a multiple of 8")


def check_model_flags(parser, args):
    """What size a training picture has, and notes."""
    if args.resolution < 8 or args.resolution % 8:
        parser.error(f"--resolution {args.resolution}: must be a multiple of 8, the U-Net's factor")
    if args.model_type == "lora":
        parser.error("--model_type lora: UNet2DModel takes no adapters")
    if args.w_min != args.w_max:
        parser.error(f"--w_min {args.w_min} and --w_max {args.w_max}: the student is told no w, so there must be one")
    return Rules(args.resolution, alignment=8, crop_style="center" if args.center_crop else "random"), []


def toy_recipe(args):
    raise SystemExit("--pretrained_teacher_model: is needed, there is no toy of this kind")


def teacher_of(args) -> str:
    return args.pretrained_teacher_model


def load_scheduler(args) -> DDIMScheduler:
    return DDIMScheduler.from_pretrained(teacher_of(args), subfolder="scheduler")


def noise_schedule(scheduler) -> tuple[torch.Tensor, str]:
    return scheduler.alphas_cumprod, scheduler.config.prediction_type


def load_teacher(args, dtype: torch.dtype) -> UNet2DModel:
    return UNet2DModel.from_pretrained(teacher_of(args), subfolder="unet", dtype=dtype).requires_grad_(False).eval()


def make_student(args, teacher: UNet2DModel) -> UNet2DModel:
    return teacher.requires_grad_(True)


def encoders(args, device, dtype: torch.dtype) -> Encoders:
    return Encoders(
        load_vae=lambda: None,
        encode_pixels=lambda vae, pixels: {"pixels": pixels},
        load_text=lambda: None,
        encode_prompts=encode_prompts,
        latents_identity=lambda: {"pixels": "in [-1, 1]"},
        text_identity=lambda: {"classes": CLASSES},
    )


def encode_prompts(text_encoder, prompts: list[str]) -> dict[str, torch.Tensor]:
    places = [[i for i, name in enumerate(CLASSES) if name in prompt.split()] for prompt in prompts]
    return {"label": torch.tensor([found[0] if found else len(CLASSES) for found in places])}


def encode_empty_prompt(args, encoder) -> dict[str, torch.Tensor]:
    return encoder.encode_text([""])


def sample_latents(images: dict[str, torch.Tensor], draws) -> torch.Tensor:
    return images["pixels"].float()


def conditions(text: dict[str, torch.Tensor], images: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return text


def predict(unet, x, t, cond: dict[str, torch.Tensor], w=None):
    return unet(x.to(next(unet.parameters()).dtype), t, class_labels=cond["label"]).sample


@torch.no_grad()
def generate(args, vae, unet, scheduler, text, negative, steps: int, guidance_scale: float, seed: int, size, callback):
    """Pictures by the scheduler's own steps: the teacher's with guidance, which the student has learnt."""
    rngs = [torch.Generator().manual_seed(seed + i) for i in range(len(text["label"]))]
    x = torch.stack([torch.randn(3, *size, generator=rng) for rng in rngs]).to(unet.device)
    scheduler.set_timesteps(steps)
    for t in scheduler.timesteps:
        out = predict(unet, x, t, text)
        if not isinstance(scheduler, LCMScheduler):
            out_uncond = predict(unet, x, t, {"label": negative["label"].expand_as(text["label"])})
            out = out_uncond + guidance_scale * (out - out_uncond)
        x = scheduler.step(out.float(), t, x, generator=rngs[0]).prev_sample
    return VaeImageProcessor().postprocess(x.float(), output_type="pil")


def export(args, folder: Path, unet, scheduler, dtype) -> tuple[list[str], str]:
    student_scheduler(args, scheduler).save_pretrained(folder / "scheduler")
    unet.save_pretrained(folder)
    usage = (
        f"import torch\nfrom diffusers import LCMScheduler, UNet2DModel\n\ntorch.set_grad_enabled(False)\n"
        f'unet = UNet2DModel.from_pretrained("{folder}")\n'
        f'scheduler = LCMScheduler.from_pretrained("{folder}", subfolder="scheduler")\nscheduler.set_timesteps(4)\n'
        f"x = torch.randn(1, 3, {args.resolution}, {args.resolution})\n"
        f"for t in scheduler.timesteps:  # the class is one of 0 to {len(CLASSES) - 1}: {', '.join(CLASSES)}\n"
        f"    x = scheduler.step(unet(x, t, class_labels=torch.tensor([0])).sample, t, x).prev_sample\n"
    )
    return ["scheduler", "config.json", "diffusion_pytorch_model.safetensors"], usage
