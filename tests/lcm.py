"""What the tests of both LCM scripts share: flags of short runs, and the algorithm restated in float64."""

import copy
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import DDIMScheduler, LCMScheduler, UNet2DConditionModel
from safetensors.torch import load_file

from common.draws import sample_generator

# The shortest run; tests add what they are about.
SHORT = "--resolution 32 --train_batch_size 4 --max_train_steps 1 --validation_steps 0 --checkpointing_steps 0"
SHORT += " --validation_num_inference_steps 1 --report_to none --lr_warmup_steps 0 --center_crop --report_steps="
SHORT += " --validation_prompt red"
# Two steps: at the first, target and teacher are one network. Adam divides a gradient by its size, so that one of 1e-9
# would move its weight by rounding errors alone: a large epsilon keeps the comparison to what is meant.
TWO_STEPS = "--max_train_steps 2 --learning_rate 1e-2 --adam_epsilon 1e-3 --max_grad_norm 0.01"


class Runner:
    """Short runs of a script in this process, each in a folder of its own inside `folder`.

    The order of samples follows from the shards' names: whoever makes a Runner has gone to the shards' folder.
    """

    def __init__(self, script, folder, teacher, reset, flags: str = ""):
        self.script, self.folder, self.teacher, self.reset = script, folder, teacher, reset
        self.flags = f"--train_shards_path_or_url {{00000..00001}}.tar {SHORT} {flags}".split()

    def parse(self, flags: str = "", teacher=None, out: str = "out", benchmark: bool = False) -> tuple:
        """What the script's main takes. Without a `benchmark` the teacher shows no pictures."""
        own = ["--pretrained_teacher_model", str(teacher or self.teacher), "--output_dir", str(self.folder / out)]
        own += [] if benchmark else ["--disable_benchmark"]
        return self.script.parse_args([*own, *self.flags, *flags.split()])

    def args(self, *given, **options):
        return self.parse(*given, **options)[0]

    def run(self, *given, **options) -> Path:
        """The folder that a run has written."""
        args, *more = self.parse(*given, **options)
        self.script.main(args, *more)
        self.reset()
        return Path(args.output_dir)


def perturb(monkeypatch, script, change) -> list:
    """Calls `change(teacher, student, target)` on the networks that the script loads; returns the list they go to."""
    loaded, original = [], script.load_networks

    def load_and_change(*arguments):
        loaded.extend(original(*arguments))
        with torch.no_grad():
            change(*loaded[-3:])
        return tuple(loaded[-3:])

    monkeypatch.setattr(script, "load_networks", load_and_change)
    return loaded


def randomize_adapters(network, *_, std: float = 0.3):
    torch.manual_seed(3)
    for name, p in network.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=std)


def check_graphs(script, lcm, teacher, flags: str, graphs, monkeypatch):
    """A run with --compile makes graphs at the first step and the first pictures of each shape alone."""
    sizes, draw = [], script.draw
    monkeypatch.setattr(script, "draw", lambda *given: sizes.append(given[2]["mean"].shape) or draw(*given))
    graphs.mark_calls(monkeypatch, script, "clip_gradients", lambda *_: sizes[-1])
    graphs.mark_calls(monkeypatch, script, "generate", lambda args, vae, unet, sampler, *_: type(sampler).__name__)
    lcm.flags = SHORT.split()
    flags += " --compile --resolution 64 --bucket_alignment 8 --train_batch_size 2 --max_train_steps 10"
    lcm.run(f"{flags} --validation_steps 3", teacher, benchmark=True)
    print(f"{graphs.count} graphs: {graphs.marks}")
    assert len(graphs.check()) == 2 + 2  # two sizes of steps, and pictures by two samplers


def consistency(scheduler: LCMScheduler, out, t: int, x):
    """f(x, t) as the student's own scheduler computes it."""
    scheduler.set_timesteps(timesteps=[t])
    return scheduler.step(out, t, x).denoised


def draws_of(args, position: int, shape):
    """Place in the grid, w, noise of the latents, and noise of one sample."""
    rng = sample_generator(args.seed, position)
    index = torch.randint(args.num_ddim_timesteps, (), generator=rng)
    w = args.w_min + (args.w_max - args.w_min) * torch.rand((), generator=rng)
    torch.rand((), generator=rng)  # for dropped prompts
    return index, w, torch.randn(shape, generator=rng), torch.randn(shape, generator=rng)


def lcm_in_float64(script, args, data, pipeline, conditions):
    """Sample by sample, from pixels and captions, by diffusers' pipeline and schedulers: losses, student, target.

    `conditions(pipe, sample)` is what the U-Net takes, with the prompt and with the empty one.
    """
    pipe = pipeline.from_pretrained(args.pretrained_teacher_model, dtype=torch.float64)
    n = args.num_ddim_timesteps
    ddim = DDIMScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing")
    ddim.set_timesteps(n)
    lcm = LCMScheduler.from_config(pipe.scheduler.config, original_inference_steps=n)
    for scheduler in (ddim, lcm):
        scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
        scheduler.final_alpha_cumprod = scheduler.alphas_cumprod[0]

    teacher = pipe.unet.requires_grad_(False)
    student = UNet2DConditionModel.from_config(dict(teacher.config) | {"time_cond_proj_dim": 256}).double()
    zero = torch.zeros_like(student.time_embedding.cond_proj.weight)
    student.load_state_dict(teacher.state_dict() | {"time_embedding.cond_proj.weight": zero})
    target = copy.deepcopy(student).requires_grad_(False)
    first = [torch.zeros_like(p) for p in student.parameters()]
    second = [torch.zeros_like(p) for p in student.parameters()]

    batches = script.open_batches(args, data, Accelerator(), script.open_readers(args, data), None)
    losses = []
    for step in range(1, args.max_train_steps + 1):
        f_student, f_target = [], []
        for sample in next(batches):
            index, w, latent_noise, eps = draws_of(args, sample.position, (4, 4, 4))
            posterior = pipe.vae.encode(sample.pixels[None].double() / 127.5 - 1.0).latent_dist
            latents = (posterior.mean + posterior.std * latent_noise) * pipe.vae.config.scaling_factor
            t = ddim.timesteps[n - 1 - index].item()
            t_prev = max(t - 1000 // n, 0)
            x_t = ddim.add_noise(latents, eps[None].double(), torch.tensor([t]))
            cond, uncond = conditions(pipe, sample)
            out_cond, out_uncond = teacher(x_t, t, **cond).sample, teacher(x_t, t, **uncond).sample
            out = out_uncond + (1 + w.item()) * (out_cond - out_uncond)
            x_prev = ddim.step(out, t, x_t).prev_sample
            embedding = pipe.get_guidance_scale_embedding(w[None], 256).double()  # fp32 there too
            f_target.append(
                consistency(lcm, target(x_prev, t_prev, timestep_cond=embedding, **cond).sample, t_prev, x_prev)
            )
            f_student.append(consistency(lcm, student(x_t, t, timestep_cond=embedding, **cond).sample, t, x_t))
        distance = torch.cat(f_student) - torch.cat(f_target).detach()
        c = args.huber_c
        loss = (distance**2).mean() if args.loss_type == "l2" else ((distance**2 + c**2).sqrt() - c).mean()
        student.zero_grad()
        loss.backward()
        losses.append(loss.item())

        norm = sum((p.grad**2).sum() for p in student.parameters()).sqrt().item()
        assert norm > 1.5 * args.max_grad_norm  # else this would not test the clipping
        beta1, beta2, lr = args.adam_beta1, args.adam_beta2, args.learning_rate
        with torch.no_grad():
            for p, m, v, average in zip(student.parameters(), first, second, target.parameters(), strict=True):
                grad = p.grad * args.max_grad_norm / norm
                m.copy_(beta1 * m + (1 - beta1) * grad)
                v.copy_(beta2 * v + (1 - beta2) * grad**2)
                m_hat, v_hat = m / (1 - beta1**step), v / (1 - beta2**step)
                p.copy_(p - lr * args.adam_weight_decay * p - lr * m_hat / (v_hat.sqrt() + args.adam_epsilon))
                average.copy_(args.ema_decay * average + (1 - args.ema_decay) * p)
    return losses, student.state_dict(), target.state_dict()


def check_weights(out, start: dict, student: dict, target: dict):
    """The checkpoint of two steps against the restated algorithm. fp32 leaves errors of an ulp in weights of size 1."""
    for name, expected in (("student", student), ("target", target)):
        weights = load_file(out / "checkpoint-2" / f"{name}.safetensors")
        assert weights.keys() == expected.keys()
        assert max((expected[key] - start[key]).abs().max() for key in start) > 3e-4  # thousand times the tolerance
        assert max((weights[key] - expected[key]).abs().max() for key in expected) < 3e-7
