"""What `python -m tests.bench wan` measures: the bare evaluations of an iteration, and the optimizers' steps.

Of a bidirectional student, with prompts alone and full caches. The exit step is drawn, so the floor is taken at the
very exits of the steps that it is compared with. Of
real size: Wan 1.3B's shape and 81 frames of 832x480.
"""

import statistics
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.bench.lcm import Bench, measure
from tests.bench.real import real_wan
from tests.toy import world_video as video
from tests.toy.make_wan import TEXT_TOKENS

TOY = Path(__file__).parent.parent / "toy"


def wan_flags(options, folder: Path) -> list:
    flags = ["--train_prompts", TOY / "wan_prompts.txt", "--validation_prompt", "a red circle moving left"]
    if options.size == "real":
        teacher = real_wan(options.work or folder / "teacher")
        size = ["--resolution_type", "pixel_area", "--resolution", 632, "--validation_resolution", "832x480"]
        return [*flags, *size, "--pretrained_teacher_model", teacher]
    flags += ["--num_frames", video.FRAMES, "--resolution", video.SIDE, "--max_sequence_length", TEXT_TOKENS]
    flags += ["--pretrained_teacher_model", TOY / "wan"]
    return flags + ["--lora_rank", 32] * (options.scenario == "lora")


class WanBench(Bench):
    noun = "clips"

    def __init__(self, script, options, args, data):
        super().__init__(script, options, args, data)
        self.keep("draw_exits")

    def keep(self, name: str):
        """Of functions that are called more than once: all that they returned."""
        super().keep(name)
        if name in ("make_optimizer", "draw_exits"):
            function, results = getattr(self.script, name), []
            setattr(self, f"{name}_all", results)
            setattr(self.script, name, lambda *args: results.append(function(*args)) or results[-1])

    def prepare_floor(self):
        networks = self.load_networks.by_role
        encoder, _ = self.open_encoder
        script, args, device = self.script, self.args, encoder.device
        samples = next(self.open_batches)
        cond = encoder.encode_text([sample.caption for sample in samples])
        frames, *size = samples[0].bucket
        frames = script.latent_frames(frames, script.FRAMES_PER_LATENT)
        shape = script.latent_shape(args, networks["student"], frames, size)
        x, t = torch.randn(len(samples), *shape, device=device), torch.full((len(samples),), 500.0, device=device)
        both = {name: torch.cat([values, values]) for name, values in cond.items()}
        twice = torch.cat([x, x]), torch.cat([t, t]), both
        self.layers, dtype = self.load_networks.layers, cond["prompt_embeds"].dtype

        def forward(which, *inputs):
            with torch.autocast(device.type, dtype, enabled=args.mixed_precision == "bf16"):
                return script.predict(networks[which], *inputs)

        def forward_backward(which):
            forward(which, x, t, cond).float().square().mean().backward()

        def optimizer_steps():
            for optimizer in self.make_optimizer_all:
                optimizer.step()
                optimizer.zero_grad()

        no_grad = torch.no_grad()
        self.parts = {
            "rollout up to the exit": ("student", no_grad(lambda: forward("student", x, t, cond))),
            "student forward and backward": ("student", lambda: forward_backward("student")),
            "teacher, both prompts": ("teacher", no_grad(lambda: forward("teacher", *twice))),
            "fake score": ("fake_score", no_grad(lambda: forward("fake_score", x, t, cond))),
            "fake score forward and backward": ("fake_score", lambda: forward_backward("fake_score")),
            "optimizer steps": ("student", optimizer_steps),
        }

    def measure_floor(self, steps: int) -> float:
        total = 0.0
        for (exit_step,) in self.draw_exits_all[-steps:]:
            for name, (which, part) in self.parts.items():
                times = exit_step if name == "rollout up to the exit" else 1
                with self.script.active_adapter(self.layers, which):  # not timed: it is the script's own
                    seconds = sum(measure(part, times))
                self.part_seconds.setdefault(name, []).append(seconds)
                total += seconds
        return total / steps

    def flops(self) -> float:
        """The model's, of a mean step: what checkpointing computes again, all but attention, is not among them."""
        counted, attention = {}, 0
        for name, (which, part) in self.parts.items():
            with self.script.active_adapter(self.layers, which), FlopCounterMode(display=False) as counter:
                part()
            counted[name] = counter.get_total_flops()
            if name == "rollout up to the exit":
                by_kernel = counter.get_flop_counts()["Global"].items()
                attention = sum(count for kernel, count in by_kernel if "attention" in str(kernel))
        forward = counted["rollout up to the exit"]
        again = 2 * (forward - attention) if self.args.gradient_checkpointing else 0
        exits = [exit_step for (exit_step,) in self.draw_exits_all]
        return sum(counted.values()) - again + (statistics.mean(exits) - 1) * forward
