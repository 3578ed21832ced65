"""What `python -m tests.bench sd` and `sdxl` measure, and what the benches have alike."""

import resource
import statistics
import time
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.bench.real import real_sd, real_sdxl
from tests.helpers import toy_shards

PEAK_TFLOPS = {"H200": 989.0, "H100": 989.0, "A100": 312.0, "4090": 165.0}  # dense bf16


def synchronize():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def measure(function, times: int) -> list[float]:
    seconds = []
    for _ in range(times):
        synchronize()
        start = time.perf_counter()
        function()
        synchronize()
        seconds.append(time.perf_counter() - start)
    return seconds


class Finished(Exception):
    """The end of the training loop."""


class Bench:
    """Stands in for the script's progress bar: counts its steps, and measures the floor between blocks of them."""

    noun = "images"

    def __init__(self, script, options, args, data):
        self.script, self.options, self.args, self.data = script, options, args, data
        self.block_seconds, self.floor_seconds, self.in_block = [], [], 0
        self.parts, self.part_seconds = {}, {}
        for name in ("load_networks", "make_optimizer", "open_encoder", "open_batches"):
            self.keep(name)
        script.tqdm = lambda **_: self

    def keep(self, name: str):
        """Remember what one of the script's functions returned."""
        function = getattr(self.script, name)

        def kept(*args, **kwargs):
            setattr(self, name, function(*args, **kwargs))
            return getattr(self, name)

        setattr(self.script, name, kept)

    def set_postfix(self, **_):
        pass

    def close(self):
        raise Finished  # pictures and files of the run's end are no matter here

    def update(self):
        if self.in_block == 0:  # a step after a pause is not counted: it only starts the clock
            synchronize()
            self.started = time.perf_counter()
        self.in_block += 1
        if self.in_block == self.options.block:
            synchronize()
            self.block_seconds.append((time.perf_counter() - self.started) / (self.options.block - 1))
            if not self.floor_seconds:
                self.prepare_floor()
            self.floor_seconds.append(self.measure_floor(self.options.block - 1))
            self.in_block = 0

    def prepare_floor(self):
        teacher, student, target = self.load_networks
        encoder, _ = self.open_encoder
        device, count = encoder.device, self.args.train_batch_size
        samples = next(self.open_batches)
        images = encoder.encode_images(samples)
        text = encoder.encode_text([sample.caption for sample in samples])
        cond = self.script.conditions(text, images)
        both = {name: torch.cat([values, values]) for name, values in cond.items()}
        x, t = images["mean"].float(), torch.full((count,), 500, device=device)
        lora = self.args.model_type == "lora"
        w = None if lora else torch.zeros(count, device=device)
        predict, layers = self.script.predict, self.script.adapter_layers(student)
        enabled, dtype = self.args.mixed_precision in ("fp16", "bf16"), both["prompt_embeds"].dtype
        autocast = lambda: torch.autocast(device.type, dtype=dtype, enabled=enabled)  # noqa: E731

        @torch.no_grad()
        def teacher_forward():
            with autocast(), self.script.active_adapter(layers, "none"):
                predict(teacher, torch.cat([x, x]), torch.cat([t, t]), both)

        @torch.no_grad()
        def forward(unet):
            with autocast():
                predict(unet, x, t, cond, w)

        def student_forward_backward():
            with autocast():
                out = predict(student, x, t, cond, w)
            out.float().square().mean().backward()

        def optimizer_step():
            self.make_optimizer.step()
            self.make_optimizer.zero_grad()

        self.parts = {
            "teacher, both prompts": teacher_forward,
            "target": lambda: forward(target),
            "student forward and backward": student_forward_backward,
            "optimizer step": optimizer_step,
        }
        if self.args.scheduled_sampling_probability:
            self.parts["rollout"] = lambda: forward(student)
        no_grad = torch.no_grad()
        if not self.data.keeps_latents:
            pixels = torch.stack([sample.pixels for sample in samples]).to(device).float() / 127.5 - 1.0
            self.parts["VAE"] = no_grad(lambda: encoder.encoders.encode_pixels(encoder.vae, pixels))
        if self.data.caches == "off":
            prompts = [sample.caption for sample in samples]
            text_encoder = encoder.load(encoder.encoders.load_text)
            self.parts["text encoder"] = no_grad(lambda: encoder.encoders.encode_prompts(text_encoder, prompts))

    def measure_floor(self, steps: int) -> float:
        """Mean of so many."""
        return statistics.mean(measure(self.floor_step, steps))

    def flops(self) -> float:
        """Of a step."""
        with FlopCounterMode(display=False) as counter:
            self.floor_step()
        return counter.get_total_flops()

    def floor_step(self):
        for name, part in self.parts.items():
            self.part_seconds.setdefault(name, []).extend(measure(part, 1))

    def data_alone(self, batches: int) -> float:
        """Samples per second of the data pipeline with nothing else to do."""
        encoder, _ = self.open_encoder

        def one():
            samples = next(self.open_batches)
            if self.data.caches != "off" and self.data.keeps_latents:
                encoder.encode_images(samples)
            if self.data.caches != "off":
                encoder.encode_text([sample.caption for sample in samples])

        measure(one, batches // 4)  # what the workers had read ahead
        seconds = statistics.mean(measure(one, batches))
        self.open_batches.loader = None  # ends the workers
        return self.args.train_batch_size / seconds

    def result(self) -> dict:
        count = self.args.train_batch_size
        step, floor = statistics.median(self.block_seconds[1:]), statistics.median(self.floor_seconds[1:])
        ratio = statistics.median(s / f for s, f in zip(self.block_seconds[1:], self.floor_seconds[1:], strict=True))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        result = {
            "step, ms": 1e3 * step,
            "floor, ms": 1e3 * floor,
            "step / floor": ratio,
            f"{self.noun}/s": count / step,
        }
        result |= {f"  {name}, ms": 1e3 * statistics.median(times) for name, times in self.part_seconds.items()}
        result["  all else, ms"] = 1e3 * (step - floor)
        alone = f"data alone, {self.noun}/s"
        result[alone] = self.data_alone(40)
        result["data alone / training"] = result[alone] * step / count
        result["peak memory of the process, GiB"] = peak
        if torch.cuda.is_available():
            name = torch.cuda.get_device_name()
            top = next((tflops for key, tflops in PEAK_TFLOPS.items() if key in name), None)
            result["peak memory of the GPU, GiB"] = torch.cuda.max_memory_allocated() / 2**30
            result["TFLOP/s"] = self.flops() / step / 1e12
            if top:
                result["model FLOP utilisation"] = result["TFLOP/s"] / top
        return result


def lcm_flags(options, folder: Path) -> list:
    flags = ["--validation_num_inference_steps", 1]
    if options.size == "real":
        side, real_teacher = {"sd": (512, real_sd), "sdxl": (1024, real_sdxl)}[options.script]
        flags += ["--pretrained_teacher_model", real_teacher(options.work or folder / "teacher"), "--resolution", side]
        flags += ["--train_shards_path_or_url", toy_shards(folder / "shards", 4, 4, side, side)]
    return flags
