"""Pictures of half-done samples, by a tiny autoencoder, while validation draws."""

import torch
from diffusers import AutoencoderTiny
from PIL import Image


def open_preview(args, name: str, accelerator, show):
    """`preview(label)` is a callback for pipelines: it calls `show(picture, label-stepNN)` after step 1, N, 2N, ...

    `name` is the autoencoder's, where --validation_preview_model is not given. Pictures of a batch lie side by side.
    """
    if not args.validation_preview or not accelerator.is_main_process:
        return lambda label: None
    device = accelerator.device
    source = args.validation_preview_model or name
    try:
        tiny = AutoencoderTiny.from_pretrained(source, cache_dir=args.cache_dir).eval().to(device)
    except Exception as error:  # from_pretrained's are of many kinds
        raise SystemExit(f"--validation_preview_model {source}: cannot be loaded ({error})") from None

    def preview(label: str):
        @torch.no_grad()
        def on_step_end(pipeline, i: int, t, tensors: dict) -> dict:
            if i == 0 or (i + 1) % args.validation_preview_steps == 0:
                latents = tensors["latents"].to(device, next(tiny.parameters()).dtype)
                with torch.autocast(torch.device(device).type, enabled=False):
                    pixels = tiny.decode(latents / tiny.config.scaling_factor).sample  # [B, 3, H, W] in [-1, 1]
                row = (pixels.float() * 127.5 + 127.5).clamp(0, 255).byte().permute(2, 0, 3, 1).flatten(1, 2)
                show(Image.fromarray(row.cpu().numpy()), f"{label}-step{i + 1:02d}")  # [H, B * W, 3]
            return tensors

        return on_step_end

    return preview
