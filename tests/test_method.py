"""The script's algorithm: against a plain restatement in float64, and against a teacher whose answer is known."""

import copy
import gc
import signal
import sys
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from diffusers import DDIMScheduler, LCMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train_lcm_distill_sd as script
from common.data.samples import ImageReader
from common.export import hide_secrets
from common.optim import update_ema
from common.tracking import show_picture
from tests.helpers import tiny_pipeline, toy_shards

PREDICTION_TYPES = ["epsilon", "v_prediction", "sample"]
# The shortest run; tests add what they are about.
SHORT = "--resolution 32 --train_batch_size 4 --max_train_steps 1 --validation_steps 0 --checkpointing_steps 0"
SHORT += " --validation_num_inference_steps 1 --disable_benchmark --report_to none --lr_warmup_steps 0 --center_crop"
SHORT += " --report_steps="


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    toy_shards(folder, shards=2, samples=8)
    return folder


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    """A folder for each prediction type."""
    return {name: tiny_pipeline(tmp_path_factory.mktemp(name), name) for name in PREDICTION_TYPES}


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    """The script in this process leaves neither accelerate's global state nor its signal handlers behind."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture
def parse(teachers, shards, tmp_path, monkeypatch):
    """`parse(flags)`: arguments of a short run in this test's folder."""
    monkeypatch.chdir(shards)  # the samples' order follows from the shards' names: the same every time

    def parse(flags: str = "", teacher=teachers["epsilon"]):
        argv = ["--pretrained_teacher_model", str(teacher), "--train_shards_path_or_url", "{00000..00001}.tar"]
        return script.parse_args([*argv, "--output_dir", str(tmp_path / "out"), *SHORT.split(), *flags.split()])

    return parse


def watch(monkeypatch, name: str) -> list[tuple]:
    """(arguments, result) of every call that the script makes of its function `name`."""
    calls, original = [], getattr(script, name)

    def watched(*arguments):
        result = original(*arguments)
        calls.append((arguments, result))
        return result

    monkeypatch.setattr(script, name, watched)
    return calls


# ---------------------------------------------------------------------------------------------------------------------
# The algorithm, restated
# ---------------------------------------------------------------------------------------------------------------------


def consistency(scheduler: LCMScheduler, out, t: int, x):
    """f(x, t) as the student's own scheduler computes it."""
    scheduler.set_timesteps(timesteps=[t])
    return scheduler.step(out, t, x).denoised


def sd_conditions(pipe, sample) -> tuple[dict, dict]:
    """What the U-Net takes, with the prompt and with the empty one."""
    return tuple({"encoder_hidden_states": embeds} for embeds in pipe.encode_prompt(sample.caption, "cpu", 1, True, ""))


def lcm_in_float64(args, pipeline=StableDiffusionPipeline, conditions=sd_conditions):
    """Sample by sample, from pixels and captions, by diffusers' pipeline and schedulers: losses, student, target."""
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

    reader = ImageReader(args.datasets[0].rules, args.interpolation_type, False, args.seed)
    batches = script.open_batches(args, Accelerator(), [reader], None)
    losses = []
    for step in range(1, args.max_train_steps + 1):
        f_student, f_target = [], []
        for sample in next(batches):
            index, w, _, latent_noise, eps = script.draw_for(args, sample.position, (4, 4, 4))
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


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_training_steps_equal_the_algorithm_restated_in_float64(
    prediction_type, parse, teachers, monkeypatch, tmp_path
):
    loss_type = "huber --huber_c 0.01" if prediction_type == "epsilon" else "l2"
    # Two steps: at the first, target and teacher are one network. Adam divides a gradient by its size, so that one of
    # 1e-9 would move its weight by rounding errors alone: a large epsilon keeps the comparison to what is meant.
    args = parse(
        f"--max_train_steps 2 --loss_type {loss_type} --learning_rate 1e-2 --adam_epsilon 1e-3 --max_grad_norm 0.01",
        teachers[prediction_type],
    )
    losses, student, target = lcm_in_float64(args)
    ours = watch(monkeypatch, "consistency_loss")
    logged = []
    monkeypatch.setattr(Accelerator, "log", lambda self, values, step: logged.append(values))
    script.main(args)

    # fp32 leaves errors of 1.5e-5 in the loss of the second step, and of an ulp in weights of size 1.
    torch.testing.assert_close([loss.item() for _, loss in ours], losses, rtol=5e-5, atol=0)
    assert logged[-1]["loss"] == pytest.approx(sum(losses) / 2, rel=5e-5)
    start = load_file(teachers[prediction_type] / "unet" / "diffusion_pytorch_model.safetensors")
    for name, expected in (("student", student), ("target", target)):
        weights = load_file(tmp_path / "out" / "checkpoint-2" / f"{name}.safetensors")
        assert weights.keys() == expected.keys()
        assert max((expected[key] - start[key]).abs().max() for key in start) > 3e-4  # thousand times the tolerance
        assert max((weights[key] - expected[key]).abs().max() for key in expected) < 3e-7


# ---------------------------------------------------------------------------------------------------------------------
# Student, target and teacher
# ---------------------------------------------------------------------------------------------------------------------


def perturb(monkeypatch, change):
    """Calls `change(teacher, student, target)` on the networks that the script loads; returns the list they go to."""
    loaded, original = [], script.load_networks

    def load_and_change(*arguments):
        loaded.extend(original(*arguments))
        with torch.no_grad():
            change(*loaded)
        return tuple(loaded)

    monkeypatch.setattr(script, "load_networks", load_and_change)
    return loaded


def randomize_adapters(*networks):
    torch.manual_seed(3)
    for name, p in networks[0].named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.3)


def load(args):
    return script.load_networks(args, Accelerator(), torch.float32)


def tiny_inputs():
    rng = torch.Generator().manual_seed(4)
    return torch.randn(2, 4, 4, 4, generator=rng), torch.tensor([999, 19]), torch.randn(2, 32, 16, generator=rng)


@pytest.mark.parametrize("mode", ["full", "lora"])
def test_the_target_depends_on_the_student(mode, parse, monkeypatch):
    args = parse(f"--model_type {mode}")
    calls = watch(monkeypatch, "consistency_loss")
    script.main(args)
    AcceleratorState._reset_state(reset_partial_state=True)

    def change(teacher, student, target):
        if mode == "lora":
            randomize_adapters(student)
        else:
            target.conv_out.weight += 0.1

    perturb(monkeypatch, change)
    script.main(args)
    (f_student, f_target, *_), (changed_student, changed_target, *_) = (arguments for arguments, _ in calls)
    assert (changed_target - f_target).abs().mean() > 1e-3  # the teacher did not change
    assert torch.equal(changed_student, f_student) == (mode == "full")
    assert f_student.requires_grad and not f_target.requires_grad


@pytest.mark.parametrize("w", [0.0, 5.0, 15.0])
def test_a_full_student_starts_as_its_teacher_for_every_w(w, parse):
    teacher, student, target = load(parse())
    x, t, cond = tiny_inputs()
    embedding = script.guidance_embedding(torch.full((2,), w), 256)
    expected = teacher(x, t, cond).sample
    for network in (student, target):
        # one addition of zeros apart
        assert torch.equal(network(x, t, cond, timestep_cond=embedding).sample, expected)


def test_a_full_student_learns_to_tell_w_apart(parse, monkeypatch):
    networks = perturb(monkeypatch, lambda *_: None)
    script.main(parse("--max_train_steps 2 --learning_rate 1e-2"))
    x, t, cond = tiny_inputs()
    low, high = (script.guidance_embedding(torch.full((2,), w), 256) for w in (5.0, 15.0))
    student = networks[1]
    assert not torch.allclose(student(x, t, cond, low).sample, student(x, t, cond, timestep_cond=high).sample)


@pytest.mark.parametrize("flags", ["--lora_rank 4", "--use_dora", "--lora_rank 4 --mixed_precision bf16"])
def test_without_adapters_the_network_is_the_teacher_bit_for_bit(flags, parse):
    args = parse(flags)
    dtype = torch.bfloat16 if args.mixed_precision else torch.float32
    teacher, student, target = script.load_networks(args, Accelerator(), dtype)
    assert teacher is student is target
    randomize_adapters(student)
    layout = torch.contiguous_format if args.use_dora else torch.channels_last
    base = script.load_unet(args, dtype).to(memory_format=layout)
    x, t, cond = tiny_inputs()
    x, cond = x.to(dtype), cond.to(dtype)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        expected = base(x, t, cond).sample
        with script.adapters_off(student):
            assert torch.equal(student(x, t, cond).sample, expected)
        assert (student(x, t, cond).sample - expected).abs().mean() > 1e-2


@pytest.mark.parametrize("mode, networks", [("lora", 1), ("full", 3)])
def test_memory_holds_no_more_networks_than_the_method_needs(mode, networks, parse, monkeypatch):
    gc.collect()
    before = {id(thing) for thing in gc.get_objects() if type(thing) is UNet2DConditionModel}
    alive = []

    def count(unet, *_):
        alive.append({id(thing) for thing in gc.get_objects() if type(thing) is UNet2DConditionModel} - before)
        return 1.0

    monkeypatch.setattr(Accelerator, "log", lambda *_, **__: count(None))
    script.main(parse(f"--model_type {mode}"))
    assert len(alive[0]) == networks


def test_the_target_of_lora_has_no_dropout_and_the_student_has(parse, monkeypatch):
    perturb(monkeypatch, randomize_adapters)
    repeated, original = [], script.predict

    def predict_twice(*arguments):
        state = torch.get_rng_state()
        first = original(*arguments)
        second = original(*arguments)
        torch.set_rng_state(state)
        repeated.append(torch.equal(first, second))
        return first

    monkeypatch.setattr(script, "predict", predict_twice)
    script.main(parse("--lora_dropout 0.5"))
    teacher, target, student = repeated
    assert teacher and target and not student


def test_a_lora_s_target_can_be_its_average(parse, monkeypatch, tmp_path):
    flags = "--lora_rank 4 --max_train_steps 2 --learning_rate 1e-2 --checkpointing_steps 1"
    calls = watch(monkeypatch, "consistency_loss")
    script.main(parse(flags))
    AcceleratorState._reset_state(reset_partial_state=True)
    script.main(parse(f"{flags} --ema_decay 0.75"))
    (student, target), (student_averaged, target_averaged) = [calls[i][0][:2] for i in (1, 3)]  # of the second steps
    assert torch.equal(student, student_averaged)  # the weights that are trained are back in their places
    assert (target - target_averaged).abs().mean() > 1e-5

    def saved(step: int, name: str):
        return load_file(tmp_path / "out" / f"checkpoint-{step}" / f"{name}.safetensors")

    first, second, average = saved(1, "student"), saved(2, "student"), saved(2, "target")
    exported = load_file(tmp_path / "out" / "pytorch_lora_weights.safetensors")
    averages = []
    for name in (name for name in first if "lora_B" in name):  # zero before the first step
        averages.append(0.75 * 0.25 * first[name] + 0.25 * second[name])
        torch.testing.assert_close(average[name.replace(".", "/")], averages[-1])
    sums = sorted(p.abs().sum().item() for name, p in exported.items() if "lora_B" in name)
    torch.testing.assert_close(sums, sorted(p.abs().sum().item() for p in averages))


@pytest.mark.parametrize("damage", ["missing", "unexpected", "shape"])
def test_a_teacher_whose_weights_do_not_fit_is_refused(damage, tmp_path, parse):
    teacher = tiny_pipeline(tmp_path / "teacher")
    path = teacher / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    if damage == "missing":
        del weights["conv_out.bias"]
    else:
        weights["conv_out.bias" if damage == "shape" else "another"] = torch.zeros(7)
    save_file(weights, path)
    with pytest.raises((SystemExit, ValueError, RuntimeError), match="conv_out.bias|another"):
        load(parse("", teacher))


def test_a_student_that_does_not_fit_is_refused(parse, monkeypatch):
    teacher = script.load_unet(parse(), torch.float32)
    weights = teacher.state_dict()
    del weights["conv_out.bias"]
    monkeypatch.setattr(teacher, "state_dict", lambda: weights)
    with pytest.raises(SystemExit, match="conv_out.bias"):
        script.add_guidance_input(teacher, 256)


def test_ema_is_the_moving_average():
    target, source = [torch.tensor([1.0, -2.0]), torch.tensor([4.0])], [torch.tensor([3.0, 0.0]), torch.tensor([0.0])]
    update_ema(target, source, 0.75)
    assert [value for tensor in target for value in tensor.tolist()] == [1.5, -1.5, 3.0]


# ---------------------------------------------------------------------------------------------------------------------
# Draws, noise and precision
# ---------------------------------------------------------------------------------------------------------------------


def test_draws_follow_from_seed_and_position_alone(parse):
    args, other_seed = parse(), parse("--seed 7")

    def draw(args, position):
        return torch.cat([value.float().flatten() for value in script.draw_for(args, position, (4, 4, 4))])

    first = draw(args, 0)
    torch.randn(5)  # other random numbers change nothing
    assert torch.equal(draw(args, 0), first)
    # Process p of P takes positions p, p + P, ...: no two processes have one in common.
    draws = torch.stack([draw(args, position) for position in range(64)] + [draw(other_seed, 0)])
    assert len({tuple(row.tolist()) for row in draws[:, 3:]}) == 65
    eps = draws[:, -64:]
    assert torch.corrcoef(eps).fill_diagonal_(0).abs().max() < 0.6  # independent rows of 64: 5 standard deviations


def test_draws_cover_the_grid_and_the_range_of_w(parse):
    args = parse("--w_min 2 --w_max 4 --num_ddim_timesteps 8 --proportion_empty_prompts 0.25")
    index, w, dropped, *_ = zip(*(script.draw_for(args, i, (1,)) for i in range(2000)), strict=True)
    assert torch.stack(index).bincount().min() > 200 and set(map(int, index)) == set(range(8))  # 250 expected each
    w = torch.stack(w)
    assert 2.0 <= w.min() < 2.01 and 3.99 < w.max() <= 4.0 and abs(w.mean() - 3.0) < 0.05
    assert abs(torch.stack(dropped).float().mean() - 0.25) < 0.04  # four standard deviations


def test_noise_is_added_in_fp32_in_a_bf16_run(parse, monkeypatch):
    """diffusers' add_noise in bf16 is off by 4.8% in sigma at t = 19."""
    eps = torch.randn(4, 4, 4, generator=torch.Generator().manual_seed(0))
    zero_latents = {"mean": torch.zeros(4, 4, 4), "std": torch.zeros(4, 4, 4)}
    draw = torch.tensor(0), torch.tensor(8.0), torch.tensor(False), eps, eps
    monkeypatch.setattr(script, "draw_for", lambda *_: draw)
    monkeypatch.setattr(
        script.SampleEncoder,
        "encode_images",
        lambda self, samples: {name: torch.stack([value] * len(samples)) for name, value in zero_latents.items()},
    )
    calls = watch(monkeypatch, "predict")
    script.main(parse("--mixed_precision bf16 --vae_cache_disable"))
    (_, x_t, t, *_), _ = calls[-1]
    abar = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear").alphas_cumprod.double()
    assert t.tolist() == [19] * 4
    sigma = (x_t[0].double() / eps).mean()
    assert sigma.item() == pytest.approx((1 - abar[19]).sqrt().item(), rel=1e-6)
    in_bf16 = (1 - abar.bfloat16()[19]).sqrt()
    assert abs(in_bf16 / sigma - 1) > 0.04  # that the test can tell


@pytest.mark.parametrize("cast", [True, False])
def test_the_teacher_computes_in_the_run_s_own_precision(cast, parse, monkeypatch):
    calls = watch(monkeypatch, "predict")
    script.main(parse("--mixed_precision bf16" + " --no-cast_teacher_unet" * (not cast)))
    (teacher, *_), out = calls[0]
    assert {p.dtype for p in teacher.parameters()} == {torch.bfloat16 if cast else torch.float32}
    assert out.dtype == torch.bfloat16
    (student, *_), _ = calls[2]
    assert {p.dtype for p in student.parameters()} == {torch.float32}


def test_x_prev_and_the_loss_are_fp32_in_a_bf16_run(parse, monkeypatch):
    predictions, losses = watch(monkeypatch, "predict"), watch(monkeypatch, "consistency_loss")
    script.main(parse("--mixed_precision bf16"))
    assert [arguments[1].dtype for arguments, _ in predictions] == [torch.float32] * 3
    (f_student, f_target, *_), loss = losses[0]
    assert {f_student.dtype, f_target.dtype, loss.dtype} == {torch.float32}


def test_noise_prediction_at_zero_terminal_snr_is_refused(parse, tmp_path):
    teacher = tiny_pipeline(tmp_path / "teacher", "epsilon", rescale_betas_zero_snr=True)
    with pytest.raises(SystemExit, match="predicts noise at zero terminal SNR"):
        script.main(parse("", teacher))


def test_velocity_at_zero_terminal_snr_trains(parse, tmp_path, monkeypatch):
    teacher = tiny_pipeline(tmp_path / "teacher", "v_prediction", rescale_betas_zero_snr=True)
    original = script.draw_for
    # All of the batch at t = 999, where alpha is 0.
    monkeypatch.setattr(script, "draw_for", lambda *arguments: (torch.tensor(49), *original(*arguments)[1:]))
    calls = watch(monkeypatch, "consistency_loss")
    script.main(parse("--max_train_steps 2", teacher))
    assert all(torch.isfinite(loss) and loss > 0 for _, loss in calls) and len(calls) == 2


def test_a_grid_that_misses_the_last_timestep_is_refused(parse):
    with pytest.raises(SystemExit, match="--num_ddim_timesteps 30: must divide the teacher's 1000"):
        script.main(parse("--num_ddim_timesteps 30"))


# ---------------------------------------------------------------------------------------------------------------------
# Flags
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags, expected", [("", 1e-3), ("--scale_lr --gradient_accumulation_steps 2", 8e-3)])
def test_scale_lr_changes_the_optimizers_rate(flags, expected, parse, monkeypatch):
    calls = watch(monkeypatch, "make_optimizer")
    script.main(parse(f"--learning_rate 1e-3 {flags}"))
    assert calls[0][1].param_groups[0]["lr"] == pytest.approx(expected)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_schedule_counts_optimizer_steps(accumulation, parse, monkeypatch):
    rates = []
    monkeypatch.setattr(script, "LOG_EVERY", 1)
    monkeypatch.setattr(Accelerator, "log", lambda self, values, step: rates.append(values["lr"]))
    flags = "--max_train_steps 4 --train_batch_size 2 --learning_rate 1e-3 --lr_scheduler linear"
    script.main(parse(f"{flags} --gradient_accumulation_steps {accumulation}"))
    assert rates == pytest.approx([0.75e-3, 0.5e-3, 0.25e-3, 0.0])


@pytest.mark.parametrize("proportion", [0.0, 1.0])
def test_proportion_of_empty_prompts(proportion, parse, teachers, monkeypatch):
    calls = watch(monkeypatch, "predict")
    script.main(parse(f"--proportion_empty_prompts {proportion}"))
    pipe = StableDiffusionPipeline.from_pretrained(teachers["epsilon"])
    empty, _ = pipe.encode_prompt("", "cpu", 1, False)
    (_, _, _, cond, _), _ = calls[-1]
    same = [torch.allclose(row, empty[0], atol=1e-6) for row in cond["prompt_embeds"]]
    assert same == [proportion == 1.0] * 4


@pytest.mark.parametrize("flags, w", [("", 3.0), ("--validation_guidance 4", 3.0), ("--validation_guidance 0", 2.0)])
def test_pictures_stay_in_the_trained_range_of_guidance(flags, w, parse, monkeypatch):
    calls = watch(monkeypatch, "draw")
    args = parse(f"--w_min 2 --w_max 4 {flags}")
    script.main(args)
    assert [arguments[7] for arguments, _ in calls] == [1.0 + w]
    assert any("--validation_guidance 0" in note for note in args.notes) == (w == 2.0)


def test_pictures_of_a_lora_are_drawn_without_guidance(parse, monkeypatch):
    calls = watch(monkeypatch, "draw")
    script.main(parse("--model_type lora"))
    assert [arguments[7] for arguments, _ in calls] == [1.0]


# ---------------------------------------------------------------------------------------------------------------------
# What a run leaves behind
# ---------------------------------------------------------------------------------------------------------------------


class Tracker:
    """Stands in for a tracker: remembers names of pictures."""

    def __init__(self, name):
        self.name, self.pictures, self.writer = name, [], self

    def log(self, values, step):
        self.pictures += [(name, step) for name in values]

    def add_image(self, name, picture, step, dataformats):
        self.pictures.append((name, step))


def test_every_tracker_gets_the_picture(tmp_path):
    trackers = [Tracker("tensorboard"), Tracker("wandb"), Tracker("tensorboard")]
    path = show_picture(SimpleNamespace(trackers=trackers), Image.new("RGB", (8, 8)), tmp_path, "grid", 3)
    assert [tracker.pictures for tracker in trackers] == [[("grid", 3)]] * 3
    assert Image.open(path).size == (8, 8)


@pytest.mark.parametrize("spelling", ["--hub_token {}", "--hub_token={}", "--hub_tok {}", "--hub_t={}"])
def test_the_hub_token_is_in_no_command_of_a_model_card(spelling):
    assert "hf_secret" not in " ".join(hide_secrets(["x.py", *spelling.format("hf_secret").split(), "--seed", "1"]))


def test_tensorboard_gets_curves_and_pictures_and_nobody_the_token(parse, tmp_path, monkeypatch):
    flags = "--validation_steps 1 --report_to tensorboard --hub_token hf_secret"
    monkeypatch.setattr(sys, "argv", ["train_lcm_distill_sd.py", *flags.split()])
    script.main(parse(flags))
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert any(b"validation_seed" in path.read_bytes() for path in files)  # settings are logged, but for the token
    assert [path for path in files if b"hf_secret" in path.read_bytes()] == []
    (folder,) = {
        path.parent for path in files if "tfevents" in path.name and path.parent.name == "text2image-fine-tune"
    }
    events = EventAccumulator(str(folder)).Reload().Tags()
    assert "grid" in events["images"] and {"loss", "lr"} <= set(events["scalars"])


@pytest.mark.parametrize("flags", ["--lora_rank 4 --lora_alpha 8", "--lora_rank 4 --lora_alpha 8 --use_dora"])
def test_an_exported_lora_loads_in_the_stock_pipeline(flags, parse, teachers, monkeypatch, tmp_path):
    networks = perturb(monkeypatch, randomize_adapters)
    script.main(parse(f"{flags} --max_train_steps 2 --learning_rate 1e-2"))
    pipe = StableDiffusionPipeline.from_pretrained(teachers["epsilon"])
    x, t, cond = tiny_inputs()
    with torch.no_grad():
        base = pipe.unet(x, t, cond).sample
        pipe.load_lora_weights(tmp_path / "out")
        ours, loaded = (unet.eval()(x, t, cond).sample for unet in (networks[1], pipe.unet))
    assert (loaded - base).abs().mean() > 1e-2
    torch.testing.assert_close(loaded, ours, rtol=0, atol=1e-6)


def test_an_exported_student_loads_in_stock_diffusers(parse, monkeypatch, tmp_path):
    networks = perturb(monkeypatch, lambda *_: None)
    script.main(parse("--num_ddim_timesteps 25 --timestep_scaling_factor 5 --learning_rate 1e-2"))
    target = networks[2].state_dict()
    for variant, dtype in ((None, torch.float32), ("fp16", torch.float16)):
        unet = UNet2DConditionModel.from_pretrained(tmp_path / "out", variant=variant, dtype=dtype)
        assert unet.config.time_cond_proj_dim == 256
        assert all(torch.equal(value, target[name].to(dtype)) for name, value in unet.state_dict().items())
    scheduler = LCMScheduler.from_pretrained(tmp_path / "out", subfolder="scheduler")
    assert (scheduler.config.original_inference_steps, scheduler.config.timestep_scaling) == (25, 5.0)
    assert scheduler.config.prediction_type == "epsilon"
