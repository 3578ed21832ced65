"""Small pipelines with random weights, shards, and runs of the scripts, for all tests."""

import http.server
import io
import json
import os
import random
import shutil
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path

import av
import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLWan,
    AutoencoderTiny,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    WanPipeline,
    WanTransformer3DModel,
)
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoTokenizer,
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    PreTrainedTokenizerFast,
    UMT5Config,
    UMT5EncoderModel,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from tests.toy.make import add_member, draw, make_tokenizer

ROOT = Path(__file__).parent.parent


def tiny_unet(**config) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        **{
            "sample_size": 4,
            "in_channels": 4,
            "out_channels": 4,
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
            "block_out_channels": (16, 32),
            "layers_per_block": 1,
            "cross_attention_dim": 16,
            "attention_head_dim": 2,
            "norm_num_groups": 4,
        }
        | config
    )


def tiny_text_config(tokenizer, layers: int = 1, width: int = 16) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=20,
        num_hidden_layers=layers,
        num_attention_heads=2,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def tiny_vae() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(4, 4, 4, 4),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=2,
        mid_block_add_attention=False,
        sample_size=32,
    )


def tiny_autoencoder(folder: Path) -> AutoencoderTiny:
    """For previews, with random weights."""
    torch.manual_seed(0)
    tiny = AutoencoderTiny(
        encoder_block_out_channels=(4,) * 4, decoder_block_out_channels=(4,) * 4, num_encoder_blocks=(1,) * 4,
        num_decoder_blocks=(1,) * 4,
    )  # fmt: skip
    tiny.save_pretrained(folder)
    return tiny


def sd_scheduler(prediction_type: str, **settings) -> DDIMScheduler:
    return DDIMScheduler(
        **{
            "beta_start": 0.00085,
            "beta_end": 0.012,
            "beta_schedule": "scaled_linear",
            "clip_sample": False,
            "set_alpha_to_one": False,
            "steps_offset": 1,
            "prediction_type": prediction_type,
        }
        | settings
    )


def tiny_pipeline(folder: Path, prediction_type: str = "epsilon", unet: dict | None = None, **scheduler) -> Path:
    """A Stable Diffusion folder with random weights, for pictures of 32x32."""
    torch.manual_seed(1)
    tokenizer = make_tokenizer(folder / "tokenizer")
    StableDiffusionPipeline(
        tiny_vae(), CLIPTextModel(tiny_text_config(tokenizer)), tokenizer, tiny_unet(**unet or {}),
        sd_scheduler(prediction_type, **scheduler), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def teacher_like(teacher: Path, folder: Path, force_zeros: bool = True, **scheduler) -> Path:
    """A copy of a pipeline's folder with other settings of its scheduler."""
    shutil.copytree(teacher, folder, dirs_exist_ok=True)
    changes = {"scheduler/scheduler_config.json": scheduler}
    changes["model_index.json"] = {} if force_zeros else {"force_zeros_for_empty_prompt": False}
    for name, settings in changes.items():
        (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | settings))
    return folder


def tiny_sdxl_pipeline(folder: Path, prediction_type="epsilon", force_zeros: bool = True, **unet) -> Path:
    """An SDXL folder with random weights, for pictures of 32x32."""
    torch.manual_seed(1)
    tokenizer = make_tokenizer(folder / "tokenizer")
    first = CLIPTextModel(tiny_text_config(tokenizer, layers=2))
    second = CLIPTextModelWithProjection(tiny_text_config(tokenizer, layers=2, width=24))
    unet = tiny_unet(
        cross_attention_dim=16 + 24,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 20,
        **unet,
    )
    StableDiffusionXLPipeline(
        tiny_vae(), first, second, tokenizer, tokenizer, unet, sd_scheduler(prediction_type),
        force_zeros_for_empty_prompt=force_zeros, add_watermarker=False,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def letter_tokenizer() -> PreTrainedTokenizerFast:
    """A token for each byte, </s> at the end, as T5's tokenizers have it."""
    names = ["<pad>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    letters = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, []))
    letters.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    letters.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=letters, pad_token="<pad>", eos_token="</s>", model_max_length=512)


def tiny_wan(seed: int = 0) -> WanTransformer3DModel:
    torch.manual_seed(seed)
    network = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16, freq_dim=16,
        ffn_dim=32, num_layers=2,
    )  # fmt: skip
    return network.requires_grad_(False).eval()


def tiny_wan_pipeline(folder: Path) -> Path:
    """A Wan 2.1 folder with random weights, for clips whose sides are multiples of 16."""
    torch.manual_seed(1)
    tokenizer = letter_tokenizer()
    text = UMT5Config(
        vocab_size=len(tokenizer), d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2,
        relative_attention_num_buckets=8,
    )  # fmt: skip
    statistics = {"latents_mean": [0.5, -0.25, 0.0, 1.0], "latents_std": [2.0, 0.5, 1.0, 4.0]}
    vae = AutoencoderKLWan(base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, **statistics)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    WanPipeline(tokenizer, UMT5EncoderModel(text), vae, scheduler, tiny_wan()).save_pretrained(folder)
    return folder


def write_shard(path: Path, samples: list[dict[str, bytes]], names=None) -> Path:
    """A tar with one member for each extension of each sample."""
    with tarfile.open(path, "w") as tar:
        for i, members in enumerate(samples):
            for extension, data in members.items():
                add_member(tar, f"{names[i] if names else f'{i:06d}'}.{extension}", data)
    return path


def encoded(image: Image.Image, kind: str = "png") -> bytes:
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


def toy_shards(folder: Path, shards: int = 4, samples: int = 8, height: int = 32, width: int = 40) -> str:
    """Shards of toy images; their brace-expanded name."""
    folder.mkdir(parents=True, exist_ok=True)
    images, captions = draw(5, shards * samples, height, width)
    for shard in range(shards):
        part = slice(shard * samples, (shard + 1) * samples)
        pairs = zip(images[part], captions[part], strict=True)
        content = [{"png": encoded(Image.fromarray(image)), "txt": text.encode()} for image, text in pairs]
        write_shard(folder / f"{shard:05d}.tar", content, [f"{shard}-{i:04d}" for i in range(samples)])
    return str(folder / f"{{00000..{shards - 1:05d}}}.tar")


def grey_frame(i: int, height: int = 32, width: int = 48) -> np.ndarray:
    """A grey of 12 i, with a white corner at the top left."""
    pixels = np.full((height, width, 3), 12 * i, np.uint8)
    pixels[: height // 2, : width // 2] = 255
    return pixels


VIDEO_KINDS = {
    "mp4": ("mp4", "libx264", "yuv420p"),
    "mov": ("mov", "mpeg4", "yuv420p"),
    "webm": ("webm", "libvpx-vp9", "yuv420p"),
    "vp8": ("webm", "libvpx", "yuv420p"),
    "mkv": ("matroska", "ffv1", "bgr0"),
    "avi": ("avi", "mpeg4", "yuv420p"),
}


def video_file(frames: list[np.ndarray], kind: str = "mkv", **settings) -> bytes:
    container, codec, pixels = VIDEO_KINDS[kind]
    file = io.BytesIO()
    with av.open(file, "w", format=container) as output:
        stream = output.add_stream(codec, rate=8)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = pixels
        for name, value in settings.items():
            setattr(stream.codec_context, name, value)
        for pixels in frames:
            output.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        output.mux(stream.encode(None))
    return file.getvalue()


def animation(frames: list[np.ndarray], kind: str) -> bytes:
    file = io.BytesIO()
    first, *rest = map(Image.fromarray, frames)
    first.save(file, kind, save_all=True, append_images=rest, duration=125, lossless=True)
    return file.getvalue()


def clip_members(kind: str, count: int, **size) -> dict[str, bytes]:
    """Members of a sample that is a clip of so many frames."""
    frames = [grey_frame(i, **size) for i in range(count)]
    if kind in ("gif", "webp"):
        return {kind: animation(frames, kind)}
    if kind in ("png", "jpg"):
        names = [f"{i}.{kind}" for i in range(count)]  # 10 comes after 9
        random.Random(0).shuffle(names)
        order = [int(name.split(".")[0]) for name in names]
        pictures = [encoded(Image.fromarray(frames[i]), {"jpg": "jpeg"}.get(kind, kind)) for i in order]
        return dict(zip(names, pictures, strict=True))
    return {VIDEO_KINDS[kind][0].replace("matroska", "mkv"): video_file(frames, kind)}


def folder_of_clips(root: Path) -> Path:
    """Three clips with captions: a file, one in a subfolder, and a folder of frames; a note and a hidden file."""
    (root / "sub" / "walk.v1").mkdir(parents=True)
    (root / "first.mp4").write_bytes(clip_members("mp4", 9)["mp4"])
    (root / "first.txt").write_text("one caption\nanother caption\n")
    (root / "sub" / "a_second.gif").write_bytes(clip_members("gif", 9, height=48, width=32)["gif"])
    (root / "sub" / "a_second.txt").write_text("second")
    for name, data in clip_members("png", 11).items():
        (root / "sub" / "walk.v1" / name).write_bytes(data)
    (root / "sub" / "walk.v1.txt").write_text("a walk")
    (root / "notes.md").write_text("no clip")
    (root / ".hidden.mp4").write_bytes(b"x")
    return root


def launch(script: str, *flags, processes: int = 1, fsdp=False, check: bool = True, wait: bool = True, **environment):
    """The script as a user starts it."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_cpu_threads_per_process", "1"]
    command += ["--num_processes", str(processes), "--num_machines", "1", "--mixed_precision", "no"]
    # accelerate has no launcher of its own for several CPU processes: the one for GPUs starts them, and they use gloo
    several = ["--use_fsdp", "--fsdp_version", "2"] if fsdp else ["--multi_gpu"]
    command += ["--dynamo_backend", "no", *(several if processes > 1 else ["--cpu"])]
    command += [script, *map(str, flags)]
    environment = (
        os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true"} | environment
    )
    if not wait:
        return subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            start_new_session=True,
        )  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    if check and done.returncode != 0:
        raise AssertionError(f"{' '.join(command)}\n{done.stdout}\n{done.stderr}")
    return done


def clip_folder(folder: Path, teacher: Path) -> Path:
    """A CLIP with random weights and the teacher's tokenizer."""
    torch.manual_seed(3)  # whose scores are not 0
    tokenizer = AutoTokenizer.from_pretrained(teacher, subfolder="tokenizer")
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = sizes | {
        "vocab_size": len(tokenizer), "max_position_embeddings": tokenizer.model_max_length,
        "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }  # fmt: skip
    vision = sizes | {"image_size": 32, "patch_size": 8}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


class Hook(http.server.BaseHTTPRequestHandler):
    def do_POST(self):  # noqa: N802
        body = self.rfile.read(int(self.headers["Content-Length"]))
        time.sleep(self.server.delay)
        self.server.posted.append((self.headers, body))
        if self.headers["Content-Type"] == "application/json":
            self.server.received.append(json.loads(body))
        busy, self.server.busy = self.server.busy, 0
        self.send_response(429 if busy else self.server.status)
        self.send_header("Retry-After", busy)
        self.end_headers()

    def log_message(self, *_):
        pass


class HookServer(http.server.ThreadingHTTPServer):
    """Keeps what is posted to it; `delay` is that of its answers, `status` their code.

    Where `busy` is set, the next answer is that so many seconds should pass.
    """

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Hook)
        self.received, self.posted, self.delay, self.status, self.busy = [], [], 0.0, 200, 0
        self.url = f"http://127.0.0.1:{self.server_address[1]}/hook"
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()


def without(flags: list[str], name: str) -> list[str]:
    """The flags without the one of this name and its value."""
    place = flags.index(name)
    return flags[:place] + flags[place + 2 :]


def short_wan_run(teacher: Path, folder: Path, output: str = "out", prompts: tuple[str, ...] = ("a red ball",)):
    """Flags of the shortest run of the Wan script, which is one step on three latent frames of 2x2 tokens."""
    path = folder / "prompts.txt"
    path.write_text("".join(f"{prompt}\n" for prompt in prompts))
    flags = f"--pretrained_teacher_model {teacher} --train_prompts {path} --num_frames 9 --resolution 32"
    flags += " --max_train_steps 1 --validation_steps 0 --checkpointing_steps 0 --report_to none --report_steps="
    flags += " --disable_benchmark --lr_warmup_steps 0 --learning_rate 1e-2 --fake_score_lr 1e-2"
    return [*flags.split(), "--output_dir", str(folder / output)]
