"""The method: an analytic teacher, one step against a float64 restatement, and what student and teacher must share."""

import copy
import gc
import json
import math

import pytest
import torch
from diffusers import DDIMScheduler, LCMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file

import train_lcm_distill_sd as script
from common.diffusion import DDIMSolver, boundary_scalings, consistency_loss, guidance_embedding, to_x0_eps
from common.optim import update_ema
from tests.helpers import launch, tiny_pipeline, toy_shards

# ---------------------------------------------------------------------------------------------------------------------
# An analytic teacher
# ---------------------------------------------------------------------------------------------------------------------

MEANS, DEVIATION = torch.tensor([-1.5, 0.0, 1.2]), 0.3  # of three equal modes


def abar_table() -> torch.Tensor:
    return DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear").alphas_cumprod


def ideal_clean(x, alpha, sigma):
    """E[x0 | x_t] where the data are a mixture of Gaussians: the best that a teacher can say. x, alpha, sigma: [B]"""
    means = MEANS.to(x.dtype)
    variance = (alpha**2 * DEVIATION**2 + sigma**2)[:, None]
    offsets = x[:, None] - alpha[:, None] * means
    weights = (-(offsets**2) / (2 * variance)).softmax(1)
    return (weights * (means + alpha[:, None] * DEVIATION**2 / variance * offsets)).sum(1)


def flow_map(x, t: int):
    """Where the probability flow takes x from t to 0: Heun's method in float64 over every timestep, not DDIM's."""
    abar = abar_table().double()
    x = x.double()
    # In y = x / alpha and s = sigma / alpha the flow is dy/ds = E[eps | x].
    scales = ((1 - abar) / abar).sqrt()
    alphas = abar.sqrt()
    y = x / alphas[t]

    def slope(y, i):
        alpha = alphas[i].expand(len(y))
        return (y - ideal_clean(y * alpha, alpha, alpha * scales[i])) / scales[i]

    for i in range(t, 0, -1):
        ds = scales[i - 1] - scales[i]
        first = slope(y, i)
        y = y + ds * 0.5 * (first + slope(y + ds * first, i - 1))
    return (y * alphas[0]).float()


class Correction(torch.nn.Module):
    """The ideal sample plus a small network that starts at zero: a student that starts as its teacher."""

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(10, 96), torch.nn.SiLU(), torch.nn.Linear(96, 96), torch.nn.SiLU(), torch.nn.Linear(96, 1)
        )
        torch.nn.init.zeros_(self.layers[-1].weight)
        torch.nn.init.zeros_(self.layers[-1].bias)

    def forward(self, x, alpha, sigma):
        waves = [x, sigma, alpha] + [f(k * x) for k in (1.0, 2.0, 4.0) for f in (torch.sin, torch.cos)] + [x * alpha]
        return ideal_clean(x, alpha, sigma) + sigma * self.layers(torch.stack(waves, 1))[:, 0]


def consistency_function(network, x, t, alphas, sigmas):
    out = network(x, alphas[t], sigmas[t])
    x0, _ = to_x0_eps(out, x, alphas[t], sigmas[t], "sample")
    c_skip, c_out = boundary_scalings(t, 10.0)
    return c_skip * x + c_out * x0


def test_training_on_an_ideal_teacher_converges_to_its_flow():
    """Mean error of the one-step map falls below 0.08, from 0.3 and more of the teacher's own one step."""
    torch.manual_seed(0)
    abar = abar_table()
    alphas, sigmas = abar.sqrt(), (1 - abar).sqrt()
    solver = DDIMSolver(abar, 50)
    student = Correction()
    target = copy.deepcopy(student).requires_grad_(False)
    steps = 8000
    optimizer = torch.optim.Adam(student.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    rng = torch.Generator().manual_seed(1)
    for _ in range(steps):
        latents = MEANS[torch.randint(3, (512,), generator=rng)] + DEVIATION * torch.randn(512, generator=rng)
        index = torch.randint(50, (512,), generator=rng)
        t, t_prev = solver.timesteps[index], solver.timesteps_prev[index]
        x_t = alphas[t] * latents + sigmas[t] * torch.randn(512, generator=rng)
        with torch.no_grad():
            out = ideal_clean(x_t, alphas[t], sigmas[t])
            x0_teacher, eps_teacher = to_x0_eps(out, x_t, alphas[t], sigmas[t], "sample")
            x_prev = solver.step(x0_teacher, eps_teacher, index)
            f_target = consistency_function(target, x_prev, t_prev, alphas, sigmas)
        loss = consistency_loss(consistency_function(student, x_t, t, alphas, sigmas), f_target, "huber", 0.01)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        update_ema(list(target.parameters()), list(student.parameters()), 0.95)

    for t in (999, 599):
        x = (
            torch.randn(2000, generator=rng)
            if t == 999
            else alphas[t] * MEANS.repeat(500) + sigmas[t] * torch.randn(1500)
        )
        truth = flow_map(x, t)
        steps_t = torch.full((len(x),), t)
        with torch.no_grad():
            error = (consistency_function(target, x, steps_t, alphas, sigmas) - truth).abs().mean().item()
            untrained = (consistency_function(Correction(), x, steps_t, alphas, sigmas) - truth).abs().mean().item()
        print(f"t = {t}: error {error:.4f}, untrained {untrained:.4f}")
        assert untrained > 0.3
        assert error < 0.08


# ---------------------------------------------------------------------------------------------------------------------
# One step of the script
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return toy_shards(tmp_path_factory.mktemp("shards"))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return tiny_pipeline(tmp_path_factory.mktemp("teacher"))


def flags(teacher, shards, folder, *more) -> list[str]:
    values = [
        *("--pretrained_teacher_model", teacher, "--train_shards_path_or_url", shards, "--output_dir", folder),
        *("--resolution", 32, "--train_batch_size", 4, "--max_train_steps", 1, "--report_to", "none"),
        *("--validation_steps", 0, "--disable_benchmark", "--validation_num_inference_steps", 1, *more),
    ]
    return [str(value) for value in values]


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_one_step_is_the_algorithm_box_in_float64(prediction_type, tmp_path, shards, monkeypatch):
    """Loss and weights after one step, against a restatement with diffusers' schedulers and AdamW written out."""
    teacher = tiny_pipeline(tmp_path / "teacher", prediction_type)
    args = script.parse_args(
        flags(teacher, shards, tmp_path / "out", "--learning_rate", 1e-2, "--w_min", 1, "--w_max", 4)
    )
    kept = {}

    def keep(prediction, target, *rest):
        kept["loss"] = consistency_loss(prediction, target, *rest)
        return kept["loss"]

    read = script.open_batches
    monkeypatch.setattr(script, "open_batches", lambda *a: kept.setdefault("batches", Recorder(read(*a), args)))
    monkeypatch.setattr(script, "consistency_loss", keep)
    script.main(args)

    # --- the restatement: one sample at a time, float64 ---
    pipeline = StableDiffusionPipeline.from_pretrained(teacher, safety_checker=None).to(torch.float64)
    unet, ddim = pipeline.unet, DDIMScheduler.from_config(pipeline.scheduler.config, timestep_spacing="trailing")
    ddim.set_timesteps(50)
    boundary = LCMScheduler.from_config(ddim.config)
    config = dict(unet.config) | {"time_cond_proj_dim": 256}
    student = UNet2DConditionModel.from_config(config).double()
    student.load_state_dict(unet.state_dict() | {"time_embedding.cond_proj.weight": torch.zeros(16, 256)})
    abar = ddim.alphas_cumprod.double()

    def x0_of(out, x, t):
        a, b = abar[t].sqrt(), (1 - abar[t]).sqrt()
        return {"epsilon": (x - b * out) / a, "v_prediction": a * x - b * out, "sample": out}[prediction_type]

    losses = []
    for sample in kept["batches"].samples:
        index, w, _, latent_noise, eps = (d.double() if d.is_floating_point() else d for d in sample.draws)
        mean, std = sample.latents["mean"].double()[None], sample.latents["std"].double()[None]
        latents = mean + std * latent_noise
        prompt, empty = (pipeline.encode_prompt(text, "cpu", 1, False)[0] for text in (sample.caption, ""))
        t = int(ddim.timesteps.flip(0)[index])
        t_prev = max(t - 20, 0)
        x_t = abar[t].sqrt() * latents + (1 - abar[t]).sqrt() * eps
        with torch.no_grad():
            out_cond, out_uncond = (unet(x_t, t, p).sample for p in (prompt, empty))
            x_prev = ddim.step((1 + w) * out_cond - w * out_uncond, t, x_t).prev_sample
        embedding = StableDiffusionPipeline.get_guidance_scale_embedding(None, w.reshape(1), 256, torch.float64)

        def f(x, t, prompt=prompt, embedding=embedding):
            c_skip, c_out = boundary.get_scalings_for_boundary_condition_discrete(t)
            return c_skip * x + c_out * x0_of(student(x, t, prompt, timestep_cond=embedding).sample, x, t)

        with torch.no_grad():
            goal = f(x_prev, t_prev)
        losses.append(((f(x_t, t) - goal) ** 2).mean())
    loss = sum(losses) / len(losses)
    assert kept["loss"].item() == pytest.approx(loss.item(), rel=2e-4)
    assert loss.item() > 0

    loss.backward()
    norm = math.sqrt(sum(p.grad.square().sum().item() for p in student.parameters()))
    assert norm > 0
    saved = load_file(tmp_path / "out/checkpoint-1/student.safetensors")
    averaged = load_file(tmp_path / "out/checkpoint-1/target.safetensors")
    agree = total = 0
    for name, p in student.named_parameters():
        grad = p.grad * min(1.0, 1.0 / (norm + 1e-6))  # --max_grad_norm 1
        # AdamW's first step: both moments' corrections cancel
        stepped = p * (1 - 1e-2 * 1e-2) - 1e-2 * grad / (grad.abs() + 1e-8)
        clear = (
            grad.abs() > 1e-5 * grad.abs().max() + 1e-7
        )  # Adam turns the rounding of a zero gradient into a whole step
        agree += (saved[name].double() - stepped).abs()[clear].lt(2e-4).sum().item()
        total += clear.sum().item()
        ema = 0.95 * p.detach() + 0.05 * saved[name].double()
        torch.testing.assert_close(averaged[name].double(), ema.detach(), rtol=0, atol=1e-6)
    assert total > 1000 and agree / total > 0.999


class Recorder:
    """The script's own batches, with each sample's draws noted."""

    def __init__(self, batches, args):
        self.batches, self.args, self.samples = batches, args, []

    def __getattr__(self, name):
        return getattr(self.batches, name)

    def __next__(self):
        samples = next(self.batches)
        for sample in samples:
            sample.draws = script.draw_for(self.args, sample.position, sample.latents["mean"].shape)
        self.samples += samples
        return samples


# ---------------------------------------------------------------------------------------------------------------------
# Networks
# ---------------------------------------------------------------------------------------------------------------------


class Accelerator:
    """What load_networks asks of accelerate."""

    device = torch.device("cpu")
    print = staticmethod(print)


def networks(teacher, shards, folder, *more, dtype=torch.float32):
    args = script.parse_args(flags(teacher, shards, folder, *more))
    return args, script.load_networks(args, Accelerator(), dtype)


def question(batch: int = 3):
    rng = torch.Generator().manual_seed(3)
    x = torch.randn(batch, 4, 4, 4, generator=rng)
    return x, torch.tensor([0, 499, 999]), {"prompt_embeds": torch.randn(batch, 32, 16, generator=rng)}


def test_at_step_0_the_student_is_the_teacher_for_every_w(teacher, shards, tmp_path):
    _, (base, student, target) = networks(teacher, shards, tmp_path)
    x, t, cond = question()
    with torch.no_grad():
        expected = script.predict(base, x, t, cond)
        for w in (0.0, 1.0, 7.5, 15.0):
            embedding = guidance_embedding(torch.full((3,), w), 256)
            for network in (student, target):
                assert torch.equal(script.predict(network, x, t, cond, embedding), expected)
        student.time_embedding.cond_proj.weight.data.normal_()
        assert not torch.equal(script.predict(student, x, t, cond, embedding), expected)  # w is really fed


@pytest.mark.parametrize("more", [["--lora_rank", 4], ["--use_dora"]])
def test_loras_teacher_is_the_base_bit_for_bit(teacher, shards, tmp_path, more):
    before = count_unets()
    args, (base, student, target) = networks(teacher, shards, tmp_path, *more)
    assert base is student is target
    assert count_unets() == before + 1
    layout = torch.contiguous_format if args.use_dora else torch.channels_last
    fresh = script.load_unet(args, torch.float32).to(memory_format=layout)
    x, t, cond = question()
    with torch.no_grad():
        expected = script.predict(fresh, x, t, cond)
        for p in student.parameters():
            if p.requires_grad:
                p.data.normal_(std=0.1)
        with script.adapters_off(student):
            assert torch.equal(script.predict(student, x, t, cond), expected)
        assert not torch.equal(script.predict(student, x, t, cond), expected)
    trained = [p for p in student.parameters() if p.requires_grad]
    assert trained and all(p.dtype == torch.float32 for p in trained)  # adapters_off gave them their gradient back


def count_unets() -> int:
    gc.collect()
    return sum(isinstance(thing, UNet2DConditionModel) for thing in gc.get_objects())


def test_full_training_holds_three_unets(teacher, shards, tmp_path):
    before = count_unets()
    kept = networks(teacher, shards, tmp_path)
    assert count_unets() == before + 3
    del kept


def test_frozen_teacher_is_in_the_asked_precision(teacher, shards, tmp_path):
    """Diffusers' teacher is fp16 whatever was asked for."""
    _, (base, student, target) = networks(teacher, shards, tmp_path, dtype=torch.bfloat16)
    assert base.dtype == torch.bfloat16 and student.dtype == target.dtype == torch.float32
    _, (base, _, _) = networks(teacher, shards, tmp_path, "--no-cast_teacher_unet", dtype=torch.bfloat16)
    assert base.dtype == torch.float32
    _, (base, student, _) = networks(teacher, shards, tmp_path, "--lora_rank", 4, dtype=torch.bfloat16)
    kinds = {p.requires_grad: p.dtype for p in student.parameters()}
    assert kinds == {False: torch.bfloat16, True: torch.float32}


def test_weights_that_do_not_fit_are_fatal(teacher):
    unet = UNet2DConditionModel.from_pretrained(teacher, subfolder="unet")
    unet.load_state_dict = None  # only its config and weights are used
    unet.register_buffer("stray", torch.zeros(1))
    with pytest.raises(SystemExit, match="stray"):
        script.add_guidance_input(unet, 256)


# ---------------------------------------------------------------------------------------------------------------------
# Random draws, and the defects of others
# ---------------------------------------------------------------------------------------------------------------------


def test_draws_follow_from_seed_and_position_alone(teacher, shards, tmp_path):
    args = script.parse_args(flags(teacher, shards, tmp_path, "--w_min", 2, "--w_max", 9))
    first, again, other = (script.draw_for(args, position, (4, 4, 4)) for position in (5, 5, 6))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[4], other[4]) and not torch.equal(first[3], first[4])
    args.seed += 1
    assert not torch.equal(script.draw_for(args, 5, (4, 4, 4))[4], first[4])
    many = [script.draw_for(args, position, (1,)) for position in range(3000)]
    index, w, _, _, eps = (torch.stack(column).float() for column in zip(*many, strict=True))
    assert index.min() == 0 and index.max() == 49 and abs(index.mean() - 24.5) < 1
    assert 2 <= w.min() and w.max() <= 9 and abs(w.mean() - 5.5) < 0.15
    assert abs(eps.mean()) < 0.06 and abs(eps.std() - 1) < 0.05


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_share_of_empty_prompts(teacher, shards, tmp_path, share):
    """Diffusers checks the flag and then uses 0."""
    args = script.parse_args(flags(teacher, shards, tmp_path, "--proportion_empty_prompts", share))
    dropped = torch.stack([script.draw_for(args, position, (1,))[2] for position in range(2000)])
    assert dropped.float().mean().item() == pytest.approx(share, abs=0.0 if share in (0.0, 1.0) else 0.04)


def run(monkeypatch, arguments) -> dict:
    """The script in this process; what its parts returned."""
    kept = {"conditions": [], "teacher": []}
    for name in ("make_optimizer", "load_networks", "get_scheduler"):
        function = getattr(script, name)

        def keep(*a, function=function, name=name, **k):
            kept[name] = function(*a, **k)
            return kept[name]

        monkeypatch.setattr(script, name, keep)
    conditions, predict = script.conditions, script.predict
    monkeypatch.setattr(
        script, "conditions", lambda *a: kept["conditions"].append(conditions(*a)) or kept["conditions"][-1]
    )

    def watched(unet, *a):
        if unet is kept["load_networks"][2] and not torch.is_grad_enabled():
            kept["teacher"].append(unet.training)
        return predict(unet, *a)

    monkeypatch.setattr(script, "predict", watched)
    script.main(script.parse_args(arguments))
    return kept


def test_empty_prompts_reach_the_networks(teacher, shards, tmp_path, monkeypatch):
    kept = run(monkeypatch, flags(teacher, shards, tmp_path, "--proportion_empty_prompts", 1.0))
    embeds = kept["conditions"][0]["prompt_embeds"]
    assert torch.equal(embeds, embeds[:1].expand_as(embeds))
    monkeypatch.undo()
    kept = run(monkeypatch, flags(teacher, shards, tmp_path / "b", "--proportion_empty_prompts", 0.0))
    assert not torch.equal(kept["conditions"][0]["prompt_embeds"][0], kept["conditions"][0]["prompt_embeds"][1])


def test_scale_lr_acts_and_the_schedule_counts_optimizer_steps(teacher, shards, tmp_path, monkeypatch):
    """In diffusers the flag comes after the optimizer took the rate."""
    more = ["--scale_lr", "--learning_rate", 1e-5, "--gradient_accumulation_steps", 2, "--max_train_steps", 3]
    more += ["--lr_scheduler", "linear", "--lr_warmup_steps", 0]
    kept = run(monkeypatch, flags(teacher, shards, tmp_path, *more))
    assert kept["make_optimizer"].param_groups[0]["initial_lr"] == pytest.approx(1e-5 * 4 * 2)
    assert kept["get_scheduler"].last_epoch == 3


def test_loras_target_has_no_dropout(teacher, shards, tmp_path, monkeypatch):
    more = ["--lora_rank", 4, "--lora_dropout", 0.5, "--max_train_steps", 2]
    kept = run(monkeypatch, flags(teacher, shards, tmp_path, *more))
    # teacher and target, two steps: the target's forward is in evaluation mode
    assert kept["teacher"][1::2] == [False, False]


def test_zero_terminal_snr(shards, tmp_path):
    """Noise cannot be told there from the sample: refused. Velocity can: trained."""
    bad = tiny_pipeline(tmp_path / "bad", "epsilon", rescale_betas_zero_snr=True)
    with pytest.raises(SystemExit, match="zero terminal SNR"):
        script.main(script.parse_args(flags(bad, shards, tmp_path / "a")))
    good = tiny_pipeline(tmp_path / "good", "v_prediction", rescale_betas_zero_snr=True)
    script.main(script.parse_args(flags(good, shards, tmp_path / "b", "--max_train_steps", 2)))
    weights = load_file(tmp_path / "b/checkpoint-2/student.safetensors")
    assert all(value.isfinite().all() for value in weights.values())


def test_solver_steps_that_do_not_divide(teacher, shards, tmp_path):
    with pytest.raises(SystemExit, match="--num_ddim_timesteps 30: must divide the teacher's 1000"):
        script.main(script.parse_args(flags(teacher, shards, tmp_path, "--num_ddim_timesteps", 30)))


def test_validation_guidance_lies_in_the_trained_range(teacher, shards, tmp_path):
    args = script.parse_args(flags(teacher, shards, tmp_path, "--w_min", 2, "--w_max", 4))
    assert script.middle_w(args) == 3.0
    args = script.parse_args(flags(teacher, shards, tmp_path, "--validation_guidance", 8.5))
    assert script.middle_w(args) == 7.5


def test_all_trackers_get_the_picture(tmp_path):
    """Diffusers returns inside its loop over trackers."""
    from PIL import Image
    from torch.utils.tensorboard import SummaryWriter

    from common.validation import show_picture

    seen = []

    class Board:
        name, writer = "tensorboard", SummaryWriter(tmp_path / "board")

    class Wandb:
        name = "wandb"

        def log(self, values, step):
            seen.append((list(values), step))

    class Trackers:
        trackers = [Board(), Wandb()]

    show_picture(Trackers(), Image.new("RGB", (8, 8)), tmp_path, "grid", 7)
    Board.writer.close()
    assert (tmp_path / "grid-000007.png").exists()
    assert seen == [(["grid"], 7)]
    assert any(b"grid" in file.read_bytes() for file in (tmp_path / "board").iterdir())


def test_the_hubs_token_is_written_nowhere(teacher, shards, tmp_path):
    launch(
        "train_lcm_distill_sd.py",
        *flags(teacher, shards, tmp_path / "out", "--hub_token", "hf_secret", "--report_to", "tensorboard"),
    )
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert any("tfevents" in path.name for path in files)
    assert not [path for path in files if b"hf_secret" in path.read_bytes()]


def test_every_flag_is_read():
    from tests.helpers import ROOT

    parser_lines = ("add(", "add =")
    code = ""
    for path in [ROOT / "train_lcm_distill_sd.py", *sorted((ROOT / "common").glob("*.py"))]:
        code += "\n".join(line for line in path.read_text().splitlines() if not line.strip().startswith(parser_lines))
    args = script.parse_args([])
    derived = {"toy", "shards", "caches", "num_samples", "notes"}
    unread = [name for name in vars(args) if name not in derived and f"args.{name}" not in code]
    assert unread == []


def test_full_export(teacher, shards, tmp_path):
    script.main(script.parse_args(flags(teacher, shards, tmp_path, "--num_ddim_timesteps", 25)))
    plain = UNet2DConditionModel.from_pretrained(tmp_path)
    half = UNet2DConditionModel.from_pretrained(tmp_path, variant="fp16", torch_dtype=torch.float16)
    target = load_file(tmp_path / "checkpoint-1/target.safetensors")
    for name, value in plain.state_dict().items():
        assert torch.equal(value, target[name]) and torch.equal(half.state_dict()[name], value.half())
    scheduler = LCMScheduler.from_pretrained(tmp_path, subfolder="scheduler")
    assert scheduler.config.original_inference_steps == 25


@pytest.mark.parametrize("more", [["--lora_rank", 4, "--lora_alpha", 8], ["--lora_rank", 4, "--use_dora"]])
def test_lora_export_is_what_was_trained(teacher, shards, tmp_path, monkeypatch, more):
    """With alpha, which diffusers' files lack."""
    kept = run(monkeypatch, flags(teacher, shards, tmp_path, *more, "--learning_rate", 1e-2, "--max_train_steps", 3))
    pipeline = StableDiffusionPipeline.from_pretrained(teacher, safety_checker=None)
    x, t, cond = question()
    with torch.no_grad():
        base = script.predict(pipeline.unet, x, t, cond)
        pipeline.load_lora_weights(tmp_path)
        loaded = script.predict(pipeline.unet, x, t, cond)
        trained = script.predict(kept["load_networks"][1].eval(), x, t, cond)
    torch.testing.assert_close(loaded, trained, rtol=1e-4, atol=1e-5)
    assert (loaded - base).abs().max() > 1e-3


def test_reports_and_validation_can_be_off(teacher, shards, tmp_path):
    script.main(script.parse_args(flags(teacher, shards, tmp_path)))  # both are, in flags()
    assert not (tmp_path / "logs").exists()
    assert json.loads((tmp_path / "checkpoint-1/state.json").read_text())["step"] == 1
