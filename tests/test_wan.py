"""The Wan script: a whole run in float64, whose gradient goes where, every setting's effect, resume and export."""

import json
import re
import shutil
from itertools import combinations

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers import FlowMatchLCMScheduler, WanPipeline, WanTransformer3DModel
from safetensors.torch import load_file

import train_dmd_distill_wan as script
from common.data.clips import ClipReader, open_clip_readers, save_clip
from common.draws import sample_generator, tied_noise
from common.networks import active_adapter, adapter_layers
from common.wan import encoders as wan
from common.wan.causal import block_ends, first_tokens, roll_out
from tests.helpers import ROOT, launch, tiny_wan_pipeline
from tests.test_method import one_process  # noqa: F401

# The shortest run: three latent frames of 2x2 tokens
SHORT = (
    "--num_frames 9 --resolution 32 --max_train_steps 1 --validation_steps 0 --checkpointing_steps 0 --report_to none"
)
SHORT += " --report_steps= --disable_benchmark --lr_warmup_steps 0 --learning_rate 1e-2 --fake_score_lr 1e-2"
LORA, FULL, CAUSAL = "--lora_rank 4", "--model_type full", "--lora_rank 4 --num_frame_per_block 1"


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return tiny_wan_pipeline(tmp_path_factory.mktemp("wan"))


@pytest.fixture
def parse(teacher, tmp_path, monkeypatch):
    """`parse(flags)`: arguments of a short run in this test's folder. Clips of validation are not drawn."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red ball\n")
    monkeypatch.setattr(script, "validation_prompts", lambda args: ["a red ball"])

    def parsed(flags: str, output: str = "out"):
        words = (
            f"--pretrained_teacher_model {teacher} --train_prompts {prompts} {SHORT} --output_dir {tmp_path / output}"
        )
        return script.parse_args([*words.split(), *flags.split()])

    return parsed


@pytest.fixture
def run(parse, tmp_path, monkeypatch):
    """`run(flags)`: the last checkpoint's weights by name, {student, fake_score, ema}."""

    class Drawn:
        def save(self, path):
            path.write_bytes(b"")

    monkeypatch.setattr(script, "below_each_other", lambda sheets: Drawn())
    monkeypatch.setattr(script.Progress, "picture", lambda *args: None)
    monkeypatch.setattr(script.wan, "decode_latents", lambda vae, latents: torch.zeros(len(latents), 3, 5, 16, 16))
    runs = iter(range(100))

    def ran(flags: str, output: str | None = None):
        args = parse(flags, output or f"out{next(runs)}")
        script.main(args)
        (folder,) = sorted(script.Path(args.output_dir).glob(f"checkpoint-{args.max_train_steps}"))
        return {path.stem: load_file(path) for path in folder.glob("*.safetensors")}

    return ran


def equal(a: dict, b: dict) -> bool:
    assert a.keys() == b.keys()
    return all(torch.equal(a[key], b[key]) for key in a)


def watch(monkeypatch, name: str) -> list[tuple]:
    """(arguments, result) of each call of a function of the script."""
    calls, original = [], getattr(script, name)

    def watched(*args, **kwargs):
        result = original(*args, **kwargs)
        calls.append((args, result))
        return result

    monkeypatch.setattr(script, name, watched)
    return calls


# ---------------------------------------------------------------------------------------------------------------------
# The algorithm, restated
# ---------------------------------------------------------------------------------------------------------------------


def dmd_in_float64(folder, args, embeds, negative):
    """Bidirectional DMD of full networks, on clean samples as DMD2 has it: losses, student and fake score."""
    teacher, student, fake = (
        WanTransformer3DModel.from_pretrained(folder, subfolder="transformer").double() for _ in range(3)
    )
    rates = {student: (args.learning_rate, args.adam_epsilon), fake: (args.fake_score_lr, args.fake_score_eps)}
    optimizers = {
        network: torch.optim.AdamW(network.parameters(), lr, eps=eps, weight_decay=0.01)
        for network, (lr, eps) in rates.items()
    }
    losses, sigmas = [], [1.0, 0.757, 0.522]

    def x0_of(network, x, sigma, text):
        # The networks' sinusoids are of fp32
        return x - sigma * network(x, torch.tensor([1000 * sigma], dtype=torch.float32), text).sample

    def update(network):
        norm = torch.stack([p.grad.square().sum() for p in network.parameters()]).sum().sqrt()
        for p in network.parameters():
            p.grad *= min(1.0, 1.0 / (norm.item() + 1e-6))
        optimizers[network].step()
        optimizers[network].zero_grad()

    for step in range(args.max_train_steps):
        rng = sample_generator(args.seed, step)
        torch.rand((), generator=rng)  # of caption dropout
        (exit_step,) = script.draw_exits(args.seed, step, 3, 1, False, False)
        shape, x0 = (1, 4, 3, 4, 4), torch.zeros(1, dtype=torch.float64)
        for k in range(exit_step + 1):
            x = (1 - sigmas[k]) * x0 + sigmas[k] * torch.randn(shape[1:], generator=rng)[None].double()
            x0 = x0_of(student, x, sigmas[k], embeds)
            x0 = x0 if k == exit_step else x0.detach()
        low = [0.757, 0.522, 0.0][exit_step]
        for turn in ("student", "fake_score"):
            u = torch.rand((), generator=rng).item()
            sigma = min(max(low + (1 - low) * u, 0.02), 0.98)
            eps = torch.randn(shape[1:], generator=rng)[None].double()
            x_t = ((1 - sigma) * x0 + sigma * eps).detach()
            if turn == "student":
                with torch.no_grad():
                    cond, uncond = (x0_of(teacher, x_t, sigma, text) for text in (embeds, negative))
                    real, made = uncond + 3.0 * (cond - uncond), x0_of(fake, x_t, sigma, embeds)
                    g = (made - real) / (x0 - real).abs().mean()
                losses.append(0.5 * g.square().mean().item())
                (x0 * g / g.numel()).sum().backward()
            else:
                x0 = x0.detach()
                # |v - v_star| = |x0_fake - x_g| / sigma
                loss = ((x0_of(fake, x_t, sigma, embeds) - x0) / sigma).square().mean()
                losses.append(loss.item())
                loss.backward()
        update(student)
        update(fake)
    return losses, student.state_dict(), fake.state_dict()


def test_training_steps_equal_the_algorithm_restated_in_float64(run, parse, teacher, monkeypatch):
    flags = f"{FULL} --max_train_steps 3 --adam_epsilon 1e-3 --fake_score_eps 1e-3 --validation_negative_prompt bad"
    args = parse(flags)
    pipe = WanPipeline.from_pretrained(teacher)
    with torch.no_grad():
        embeds, negative = pipe.encode_prompt("a red ball", "bad", max_sequence_length=512)
    losses, student, fake = dmd_in_float64(teacher, args, embeds.double(), negative.double())
    ours = {name: watch(monkeypatch, name) for name in ("dmd_loss", "fake_score_loss")}
    weights = run(flags)
    found = [loss.item() for pair in zip(ours["dmd_loss"], ours["fake_score_loss"], strict=True) for _, loss in pair]
    torch.testing.assert_close(found, losses, rtol=2e-4, atol=0)
    start = load_file(teacher / "transformer" / "diffusion_pytorch_model.safetensors")
    for name, expected in (("student", student), ("fake_score", fake)):
        assert max((expected[key] - start[key]).abs().max() for key in start) > 3e-3
        assert max((weights[name][key] - expected[key]).abs().max() for key in start) < 3e-6


# ---------------------------------------------------------------------------------------------------------------------
# Whose gradient goes where
# ---------------------------------------------------------------------------------------------------------------------


def gradients_seen(monkeypatch) -> dict[str, list[torch.Tensor]]:
    """By name of the network, what its optimizer is about to use."""
    seen, original = [], script.average_gradients

    def look(params, *processes):
        seen.append([None if p.grad is None else p.grad.clone() for p in params])
        original(params, *processes)

    monkeypatch.setattr(script, "average_gradients", look)
    return seen


@pytest.mark.parametrize("flags", [LORA, FULL, CAUSAL, f"{LORA} --gradient_checkpointing --lora_dropout 0.1"])
@pytest.mark.parametrize("silent", ["dmd_loss", "fake_score_loss"])
def test_neither_loss_reaches_the_other_network(flags, silent, run, monkeypatch):
    seen = gradients_seen(monkeypatch)
    original = getattr(script, silent)
    monkeypatch.setattr(script, silent, lambda *args: 0.0 * original(*args))
    run(flags)
    student, fake = seen
    gone, there = (student, fake) if silent == "dmd_loss" else (fake, student)
    assert all(g is not None for g in student + fake)  # no adapter was left out
    assert not any(g.any() for g in gone) and any(g.any() for g in there)


@pytest.mark.parametrize("flags", [LORA, CAUSAL, f"{LORA} --mixed_precision bf16"])
def test_the_teacher_is_the_base_bit_for_bit_at_any_time(flags, run, parse, monkeypatch):
    args = parse(flags)
    dtype = torch.bfloat16 if args.mixed_precision == "bf16" else torch.float32
    stock = script.load_transformer(args, dtype)
    calls, original = {"teacher": 0, "adapted": 0, "other": 0}, script.predict

    def compare(transformer, x, t, cond):
        out = original(transformer, x, t, cond)
        layer = transformer.blocks[0].attn1.to_q
        if layer.disable_adapters:
            calls["teacher"] += 1
            assert torch.equal(out, original(stock, x, t, cond))
        elif x.shape[2] == 3:
            calls["other"] += not torch.equal(out, original(stock, x, t, cond))
            calls["adapted"] += 1
        return out

    monkeypatch.setattr(script, "predict", compare)
    run(f"{flags} --max_train_steps 4")
    assert calls["teacher"] == 4 and calls["adapted"] >= 8 and calls["other"] >= 5  # adapters start at zero


@pytest.mark.parametrize("flags", [LORA, CAUSAL])
def test_checkpointing_changes_no_gradient(flags, run, monkeypatch):
    """With two adapters on one base, each computed again under its own."""
    seen = gradients_seen(monkeypatch)
    run(f"{flags} --max_train_steps 2 --seed 3")
    plain = list(seen)
    seen.clear()
    run(f"{flags} --max_train_steps 2 --seed 3 --gradient_checkpointing")
    for before, after in zip(plain, seen, strict=True):
        torch.testing.assert_close(after, before, atol=1e-7, rtol=1e-4)


def test_adapters_switch_without_touching_requires_grad(parse):
    args = parse(LORA)
    network = script.add_adapters(script.load_transformer(args, torch.float32), args)
    before = {name: p.requires_grad for name, p in network.named_parameters()}
    assert sum(before.values()) == 2 * 2 * 2 * (4 + 4 + 2)  # adapters, A and B, layers, modules
    for name in ("student", "teacher", "fake_score"):
        with active_adapter(adapter_layers(network), name):
            assert {name: p.requires_grad for name, p in network.named_parameters()} == before
    assert {name: p.requires_grad for name, p in network.named_parameters()} == before


def test_an_adapter_is_active_again_where_another_one_s_turn_ends(parse):
    args = parse(LORA)
    network = script.add_adapters(script.load_transformer(args, torch.float32), args)
    layers = adapter_layers(network)
    assert len(layers) == 20
    with active_adapter(layers, "student"):
        with pytest.raises(RuntimeError), torch.no_grad(), active_adapter(layers, "teacher"):
            assert all(layer.disable_adapters for layer in layers)
            raise RuntimeError
        assert all(layer.active_adapters == ["student"] and not layer.disable_adapters for layer in layers)
        assert all(layer.lora_dropout.training for layer in layers)
    assert not any(layer.lora_dropout.training for layer in layers)


def test_bf16_leaves_every_trained_weight_a_gradient_and_timesteps_their_digits(run, monkeypatch):
    """autocast would hand the weights that a rollout has cast without a gradient to the step that needs one."""
    seen, told, original = gradients_seen(monkeypatch), [], script.predict
    monkeypatch.setattr(script, "predict", lambda n, x, t, c: told.append(t) or original(n, x, t, c))
    run(f"{FULL} --mixed_precision bf16 --last_step_only")
    for gradients in seen:
        assert all(g is not None and g.dtype == torch.float32 for g in gradients)
        assert sum(bool(g.any()) for g in gradients) > 0.9 * len(gradients)
    assert [t.item() for t in told[:3]] == [1000.0, 757.0, 522.0]


def test_dropout_acts_where_there_is_a_gradient_alone(run, monkeypatch):
    modes, original = [], script.predict

    def look(transformer, x, t, cond):
        layer = transformer.blocks[0].attn1.to_q
        modes.append((torch.is_grad_enabled(), layer.lora_dropout["student"].training))
        return original(transformer, x, t, cond)

    monkeypatch.setattr(script, "predict", look)
    run(f"{LORA} --lora_dropout 0.5 --last_step_only")
    assert [grad for grad, _ in modes[:6]] == [False, False, True, False, False, True]
    assert all(grad == training for grad, training in modes)


def test_an_error_of_the_critic_ends_the_run(run, monkeypatch):
    def broken(*args):
        raise RuntimeError("the critic is broken")

    monkeypatch.setattr(script, "fake_score_loss", broken)
    with pytest.raises(RuntimeError, match="the critic is broken"):
        run(LORA)


# ---------------------------------------------------------------------------------------------------------------------
# Every setting has its effect
# ---------------------------------------------------------------------------------------------------------------------

STUDENT, FAKE, BOTH = {"student"}, {"fake_score"}, {"student", "fake_score"}
BASES = {}  # weights by flags: many settings change the same run
BLOCKS = "--num_frame_per_block 1"


@pytest.mark.parametrize(
    "flags, base, changed",
    [
        ("--dmd_denoising_steps 1000,500", "--last_step_only", BOTH),
        ("--dmd_denoising_steps 4 --flow_schedule_shift 5", "--last_step_only", BOTH),
        ("--last_step_only", "--max_train_steps 3", BOTH),
        ("--real_score_guidance_scale 5", "", STUDENT),
        ("--fake_score_guidance_scale 1.2", "", STUDENT),
        ("--negative_prompt bad", "", STUDENT),
        ("--fake_score_lr 1e-3", "", FAKE),
        ("--fake_score_weight_decay 0.9", "", FAKE),
        ("--fake_score_eps 1e-2", "", FAKE),
        ("--fake_score_grad_clip 1e-6", "--fake_score_eps 1e-3", FAKE),
        ("--max_grad_norm 1e-6", "--adam_epsilon 1e-3", STUDENT),
        ("--grad_clip_method value --max_grad_norm 1e-6", "--adam_epsilon 1e-3", BOTH),
        ("--fake_score_betas 0.1 0.2", "--generator_update_interval 2 --max_train_steps 2", FAKE),
        ("--generator_update_interval 2", "--max_train_steps 2", BOTH),
        ("--min_timestep_ratio 0.9", "--max_train_steps 2", BOTH),
        ("--max_timestep_ratio 0.05", "--max_train_steps 2", BOTH),
        ("--timestep_shift 7", "", BOTH),
        ("--no-ts_schedule", "--dmd_denoising_steps 1000,999 --max_train_steps 3", BOTH),
        ("--ts_schedule_max", "--max_train_steps 2 --last_step_only", BOTH),
        ("--min_score_timestep 900", "--no-ts_schedule", BOTH),
        (BLOCKS, "", BOTH),
        ("--independent_first_frame", "--num_frame_per_block 2 --num_frames 13 --num_training_frames 2", BOTH),
        ("--same_step_across_blocks", BLOCKS, BOTH),
        ("--num_training_frames 1", BLOCKS, BOTH),
        ("--num_training_frames 2", "", BOTH),
        ("--context_noise 500", BLOCKS, BOTH),
        ("--causal_init_steps 1", f"{BLOCKS} --max_train_steps 2", BOTH),
        ("--causal_init_steps 1", "--max_train_steps 2", BOTH),
        ("--causal_init_lr 1e-4", "--causal_init_steps 1 --max_train_steps 2", BOTH),
        ("--causal_init_guidance 1", "--causal_init_steps 1 --max_train_steps 2", BOTH),
        ("--proportion_empty_prompts 1", "", BOTH),
        ("--use_ema", "", set()),
    ],
)
def test_every_setting_has_its_effect(flags, base, changed, run):
    """Of one step, or two; who changes says whose setting it is."""
    if base not in BASES:
        BASES[base] = run(f"{LORA} {base}")
    if "--independent_first_frame" in flags:  # 4 latent frames are 2 + 2; the first one alone leaves 1 + 2
        flags += " --num_frames 9"
    before, after = BASES[base], run(f"{LORA} {base} {flags}")
    assert {name for name in BOTH if not equal(before[name], after[name])} == changed
    assert ("ema" in after) == ("--use_ema" in flags)


def test_every_key_of_the_document_is_among_them():
    keys = json.loads((ROOT / "tests/configs/dmd_wan.config.json").read_text())["distillation_config"]
    (mark,) = [m for m in test_every_setting_has_its_effect.pytestmark if m.name == "parametrize"]
    tested = " ".join(f"{flags} {base}" for flags, base, _ in mark.args[1])
    assert [key for key in keys if f"--{key}" not in tested.replace("--no-", "--")] == []


def test_the_document_s_config_means_its_flags(parse, tmp_path):
    library, hook = tmp_path / "library.json", tmp_path / "hook.json"
    library.write_text('{"one": "a red ball"}')
    hook.write_text('{"webhook_url": "http://127.0.0.1:1/", "level": "error"}')
    datasets = tmp_path / "datasets.json"
    clips = tmp_path / "clips"
    clips.mkdir()
    (clips / "a.mp4").write_bytes(b"not read yet")
    entry = json.loads((ROOT / "tests/configs/dmd_wan.dataset.json").read_text())
    datasets.write_text(json.dumps(entry | {"instance_data_dir": str(clips)}))
    args = script.parse_args(
        f"--config tests/configs/dmd_wan.config.json --data_backend_config {datasets} --webhook_config {hook} "
        f"--validation_prompt_library {library}".split()
    )
    assert args.pretrained_teacher_model == "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
    assert args.steps == [1000.0, 757.0, 522.0] and args.fake_score_betas == [0.9, 0.999]
    assert args.lora_rank == 128 and args.use_ema and args.ema_update_interval == 5
    assert args.datasets[0].num_frames == 81 and script.blocks_of(args, 21) == [3] * 7  # 121 frames are cut
    assert args.validation_num_video_frames == 81 and args.grad_clip_method == "value"
    assert args.base_model_precision == "int8-torchao" and args.negative_prompt == args.validation_negative_prompt


def test_the_document_s_advanced_settings_mean_their_flags(parse):
    """28 latent frames are 109: one block, or a first frame and 9 blocks of 3."""
    config = "--config tests/configs/dmd_wan_advanced.config.json --num_frames 109"
    args = parse(config)
    assert args.steps == [1000.0, 666.0, 333.0] and script.blocks_of(args, 28) == [28]
    assert (args.generator_update_interval, args.fake_score_guidance_scale, args.timestep_shift) == (4, 1.2, 7.0)
    args = parse(f"{config} --num_frame_per_block 3 --independent_first_frame")
    assert script.blocks_of(args, 28) == [1] + [3] * 9 and args.same_step_across_blocks


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--dmd_denoising_steps 757,522", "the first must be 1000"),
        ("--dmd_denoising_steps 4", "needs --flow_schedule_shift"),
        ("--real_score_guidance_scale 0.5", "must be at least 1"),
        ("--min_timestep_ratio 0.5 --max_timestep_ratio 0.4", "need 0 <= min < max <= 1"),
        ("--context_noise 1000", r"must be in \[0, 1000\)"),
        ("--num_frames 121 --num_frame_per_block 4", "117 or 129 frames are|are no whole blocks"),
        ("--num_frame_per_block 3 --num_frames 33 --num_training_frames 5", "must be whole blocks"),
        ("--causal_init_lr 1e-4", "there are none"),
        ("--causal_init_guidance 0.5 --causal_init_steps 1", "must be at least 1"),
        ("--model_type full --lora_rank 4", "takes no --lora_rank"),
        ("--mixed_precision fp16", "bf16 or no"),
        ("--validation_resolution 40x40", "multiples of 16"),
        ("--eval_steps 3", "--eval_steps: has no job"),
        ("--validation_preview_steps 3", "--validation_preview_steps: has no job"),
        ("--export_pipeline", "full student"),
        ("--model_type full --export_formats diffusers,comfyui", "layout of LoRA files"),
        ("--fake_score_betas 0.9 1", r"must be in \[0, 1\)"),
        ("--context_parallel_degree 0", "must be at least 1"),
        ("--context_parallel_degree 3 --validation_resolution 32x32", "must divide a frame's tokens"),
        ("--context_parallel_degree 2 --attention_mechanism flash", "one or the other"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(flags, message, parse, capsys):
    with pytest.raises(SystemExit):
        parse(flags)
    error = capsys.readouterr().err.splitlines()[-1]
    assert re.search(message, error), error


def test_a_batch_far_from_the_recipe_s_is_warned_about(run, capsys):
    assert script.batch_warning(64) is None and script.batch_warning(16) is None
    assert "lower --gradient_accumulation_steps" in script.batch_warning(1000)
    run(LORA)
    assert "warning: 1 clips a step" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------------------------
# Clips of validation
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags, drawn",
    [
        ("", {"student"}),
        ("--use_ema", {"ema"}),
        ("--use_ema --ema_validation none", {"student"}),
        ("--use_ema --ema_validation comparison", {"student", "ema"}),
    ],
)
def test_validation_draws_whose_clips_were_asked_for(flags, drawn, run, parse):
    run(f"{LORA} {flags}", "shown")
    folder = script.Path(parse("", "shown").output_dir, "validation", "step-000001")
    assert {path.name.split("-")[0] for path in folder.glob("*.mp4")} == drawn


def latents_drawn(flags: str, run, monkeypatch) -> list[torch.Tensor]:
    """Of one clip each, in order: those that are shown, then the first prompt's seeds that are watched."""
    seen = []
    monkeypatch.setattr(
        script.wan, "decode_latents", lambda vae, x: seen.extend(x) or torch.zeros(len(x), 3, 5, 16, 16)
    )
    run(f"{LORA} {flags}")
    return seen


def test_clips_follow_from_the_validation_seed(run, monkeypatch):
    first = latents_drawn("--validation_seed 5", run, monkeypatch)
    other = latents_drawn("--validation_seed 6", run, monkeypatch)
    shown, *watched = first
    assert len(watched) == 4  # seeds of the same prompt
    assert torch.equal(shown, watched[0])
    assert not any(torch.equal(x, y) for x, y in combinations(watched, 2))
    torch.testing.assert_close(other[0], watched[1])  # the next seed


def test_the_shift_is_of_the_teacher_s_sampler(parse):
    assert script.schedule_shift(script.load_scheduler(parse(LORA))) == 3.0
    assert script.schedule_shift(script.load_scheduler(parse(f"{LORA} --flow_schedule_shift 7"))) == 7.0


# ---------------------------------------------------------------------------------------------------------------------
# Averages, regression, resume
# ---------------------------------------------------------------------------------------------------------------------


def test_the_average_counts_the_student_s_updates_alone(run):
    """Six steps of which three are the student's, an average of every second of these, with the decay of two."""
    flags = f"{LORA} --use_ema --ema_decay 0.9 --generator_update_interval 2"
    second = run(f"{flags} --max_train_steps 3")["student"]
    found = run(f"{flags} --ema_update_interval 2 --max_train_steps 6")["ema"]
    ends = [key for key in found if "lora_B" in key]  # which start at zero
    assert len(ends) == 20 and found.keys() == second.keys()
    for key in ends:
        torch.testing.assert_close(found[key], 0.19 * second[key], atol=1e-7, rtol=1e-5)


def test_regression_leads_the_student_to_where_the_teacher_s_flow_ends(run, parse, monkeypatch):
    """The same prompt and noise again and again. The fake score is not trained meanwhile. The first block is asked
    along a flow from noise that is all tied to its own; later ones at noise that has nothing to do with it."""
    loaded, networks = script.load_networks, []
    monkeypatch.setattr(script, "load_networks", lambda *args: networks.append(loaded(*args)) or networks[-1])
    monkeypatch.setattr("common.stream.sample_generator", lambda seed, position: torch.Generator().manual_seed(0))
    flows, asked = watch(monkeypatch, "flow_trajectory"), []
    original = script.predict

    def predict(network, x, t, cond):
        if torch.is_grad_enabled():
            asked.append((x, t, cond))
        return original(network, x, t, cond)

    monkeypatch.setattr(script, "predict", predict)
    flags = "--causal_init_steps 100 --max_train_steps 100 --learning_rate 3e-3 --lora_alpha 16"
    weights = run(f"{CAUSAL} {flags}")
    assert not any(value.any() for key, value in weights["fake_score"].items() if "lora_B" in key)
    (flow, (starts, ends)), (nets, causal) = flows[-1], networks[0]
    blocks = ends.shape[2]  # of a frame each
    asked = asked[-3 * blocks :]
    torch.testing.assert_close(flow[1], tied_noise(flow[1], 1))
    assert [t.item() for _, t, _ in asked[::blocks]] == [1000.0, 757.0, 522.0]
    drawn = []
    for i, (x, t, _) in enumerate(asked):
        step, block = divmod(i, blocks)
        if block == 0:
            assert torch.equal(x, starts[step][:, :, :1])
        else:  # its noise is not that of the flow, nor that of another step
            sigma = t.item() / 1000
            noise = (x - (1 - sigma) * ends[:, :, block : block + 1]) / sigma
            others = [flow[1][:, :, block], *(asked[k][0] for k in (block, i - 1) if k != i)]
            assert all((noise.flatten() - other.flatten()).abs().mean() > 0.3 for other in others)
            drawn.append(noise)
    assert abs(torch.cat(drawn).std() - 1) < 0.15  # of 6 x 64 numbers

    def error(name: str) -> float:
        """Of all that was asked, each block after the flow's own."""
        found, kept = [], []
        with torch.no_grad(), active_adapter(adapter_layers(nets["student"]), name):
            with causal.at(0, None, block_ends([1] * blocks, ends.shape[3] * ends.shape[4] // 4), kept):
                original(nets["student"], ends, torch.tensor([0.0]), asked[0][2])
            for i, (x, t, cond) in enumerate(asked):
                block = i % blocks
                past = first_tokens(kept, block * ends.shape[3] * ends.shape[4] // 4)
                with causal.at(block, past):
                    x0 = x - t / 1000 * original(nets["student"], x, t, cond)
                found.append((x0 - ends[:, :, block : block + 1]).square().mean())
        return sum(found).item()

    before, after, far = error("none"), error("student"), len(asked) * ends.square().mean().item()
    print(f"error {before:.3f} -> {after:.3f}; of nothing at all {far:.3f}")
    assert after < 0.5 * min(before, far)


@pytest.mark.parametrize(
    "flags",
    [
        f"{LORA} --use_ema --generator_update_interval 2 --lora_dropout 0.1 --lr_scheduler cosine",
        f"{CAUSAL} --causal_init_steps 1 --gradient_accumulation_steps 2",
        f"{FULL} --use_ema --ema_update_interval 3",
    ],
)
def test_killed_and_resumed_is_the_same_bit_for_bit(flags, run, monkeypatch):
    whole = run(f"{flags} --max_train_steps 4")
    stops = iter([False, True])  # a signal after the second step
    with monkeypatch.context() as patch:
        patch.setattr(script.StopSignal, "agreed", lambda self, accelerator: next(stops))
        with pytest.raises(ValueError):  # no checkpoint of step 4
            run(f"{flags} --max_train_steps 4", "stopped")
    resumed = run(f"{flags} --max_train_steps 4 --resume_from_checkpoint latest", "stopped")
    assert whole.keys() == resumed.keys() >= {"student", "fake_score"}
    for name in whole:
        assert equal(whole[name], resumed[name]), name


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_last_good_checkpoint(run, monkeypatch):
    original, calls = script.dmd_loss, []

    def diverges(x_g, g):
        calls.append(1)
        return original(x_g, g) * (float("nan") if len(calls) == 4 else 1.0)

    monkeypatch.setattr(script, "dmd_loss", diverges)
    with pytest.raises(
        SystemExit, match=r"dmd_loss is not finite at step 4; the last good checkpoint is .*checkpoint-2"
    ):
        run(f"{LORA} --max_train_steps 8 --checkpointing_steps 2", "bad")


def test_embeddings_come_from_the_cache_the_second_time(run, monkeypatch, tmp_path):
    caches = f"--cache_dir_text {tmp_path / 'text'}"
    run(f"{LORA} {caches}")
    monkeypatch.setattr(wan, "load_text_encoder", lambda *args: pytest.fail("the text encoder was loaded"))
    run(f"{LORA} {caches}")


def test_a_single_prompt_is_read_again_and_again(parse):
    args = parse(LORA)
    batches = script.open_batches(args, Accelerator(), open_clip_readers(args, captions_only=True), None)
    samples = [next(batches)[0] for _ in range(5)]
    assert [sample.position for sample in samples] == [0, 1, 2, 3, 4]
    assert {sample.caption for sample in samples} == {"a red ball"}


def test_of_clips_the_captions_and_sizes_are_read_alone(teacher, tmp_path, monkeypatch):
    """The rollout starts from noise: no pixel is decoded, and no latents are cached."""
    clips = tmp_path / "clips"
    save_clip(np.zeros((9, 32, 48, 3), np.float32), clips / "a.mp4")
    (clips / "a.txt").write_text("a red ball")
    monkeypatch.setattr(ClipReader, "read_frames", lambda *args: pytest.fail("a clip was decoded"))
    monkeypatch.setattr(wan, "load_vae", lambda *args: pytest.fail("the VAE was loaded"))
    flags = f"--pretrained_teacher_model {teacher} --train_data_dir {clips} {SHORT} --output_dir {tmp_path / 'out'}"
    args = script.parse_args([*flags.split(), "--train_batch_size", "1", "--disable_bucket_pruning"])
    encoder, readers = script.open_encoder(args, Accelerator(), torch.float32)
    (sample,) = next(script.open_batches(args, Accelerator(), readers, None))
    assert (sample.caption, sample.bucket, sample.pixels) == ("a red ball", (9, 32, 48), None)
    assert encoder.encode_text([sample.caption])["prompt_embeds"].shape == (1, 512, 16)


# ---------------------------------------------------------------------------------------------------------------------
# Export
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags",
    [
        f"{LORA} --max_sequence_length 24",
        f"{FULL} --use_ema",
        f"{FULL} --export_pipeline",
        f"{LORA} --dmd_denoising_steps 1000,800,700,100",
    ],
)
def test_the_card_s_lines_sample_in_the_stock_pipeline_what_the_student_makes(flags, run, parse, monkeypatch):
    """The very lines, at exactly the trained timesteps, from the same noise."""
    networks, usages, original = [], [], script.export
    loaded = script.load_networks
    monkeypatch.setattr(script, "load_networks", lambda *args: networks.append(loaded(*args)) or networks[-1])
    monkeypatch.setattr(script, "export", lambda *args: usages.append(original(*args)) or usages[-1])
    weights = run(f"{flags} --max_train_steps 3", "exported")
    args = parse(flags, "exported")
    (_, usage), student = usages[-1], networks[0][0]["student"]
    assert ("partial" in usage) == ("800" in flags)

    namespace, steps_taken = {}, []
    setup, call = usage.rsplit("video = ", 1)
    exec(setup, namespace)
    pipe = namespace["pipeline"]
    forward = pipe.transformer.forward
    monkeypatch.setattr(
        pipe.transformer, "forward", lambda **kw: steps_taken.append(kw["timestep"][0].item()) or forward(**kw)
    )
    call = call.replace('"your prompt"', '"a red ball", height=32, width=32, output_type="latent"')
    torch.manual_seed(0)
    theirs = eval(call.replace(".frames[0]", ".frames"), namespace)
    torch.testing.assert_close(torch.tensor(steps_taken), torch.tensor(args.steps), atol=2e-4, rtol=0)

    if args.use_ema:
        student = WanTransformer3DModel.from_pretrained(script.Path(args.output_dir), subfolder="transformer")
        ours_ema = weights["ema"]
        for name, p in student.named_parameters():
            assert torch.equal(p, ours_ema[name.replace(".", "/")])
    with torch.no_grad():
        embeds, _ = pipe.encode_prompt("a red ball", max_sequence_length=args.max_sequence_length)
    torch.manual_seed(0)
    drawn = [torch.randn(1, 4, 3, 4, 4) for _ in args.steps]

    def predict(x, t, start, cache):
        with active_adapter(adapter_layers(student), "student"):
            return script.predict(student, x, torch.tensor([t]), embeds)

    with torch.no_grad():
        (ours,) = roll_out(predict, None, drawn.__getitem__, args.steps, [3], [len(args.steps) - 1])
    torch.testing.assert_close(theirs, ours, atol=1e-4, rtol=1e-4)
    assert ours.std() > 0.1


def test_the_card_s_lines_of_a_causal_student_stream_what_it_makes(run, parse, monkeypatch):
    loaded, networks, cards = script.load_networks, [], []
    monkeypatch.setattr(script, "load_networks", lambda *args: networks.append(loaded(*args)) or networks[-1])
    monkeypatch.setattr(script, "write_model_card", lambda *args, usage, **kwargs: cards.append(usage))
    run(f"{CAUSAL} --max_train_steps 3 --context_noise 50", "causal")
    args, namespace = parse(f"{CAUSAL} --context_noise 50", "causal"), {}
    setup, draw = cards[0].replace("your prompt", "a red ball").split("noise = ")
    exec(setup, namespace)  # loading draws random numbers
    torch.manual_seed(0)
    exec(f"noise = {draw}", namespace)
    theirs = torch.cat(namespace["made"], 2)

    (nets, causal), steps = networks[0], args.steps
    torch.manual_seed(0)
    drawn = [torch.randn(1, 4, 3, 4, 4) for _ in range(4)]
    noise = {0: drawn[0], 1: drawn[1], 2: drawn[2], None: drawn[3]}  # the order in which a first block asks

    def velocity(x, t):
        with active_adapter(adapter_layers(nets["student"]), "student"):
            return script.predict(nets["student"], x, torch.tensor([t]), namespace["text"])

    with torch.no_grad():
        made = roll_out(*causal.calls(velocity), noise.__getitem__, steps, [1, 1, 1], [2, 2, 2], context_noise=50.0)
        ours = torch.cat(list(made), 2)
    torch.testing.assert_close(theirs, ours, atol=1e-4, rtol=1e-4)
    assert ours.std() > 0.1


def test_the_file_for_comfyui_is_the_same_adapter(run, parse, teacher):
    """By diffusers' own reader of that layout."""
    run(f"{LORA} --lora_alpha 2 --export_formats diffusers,comfyui", "comfy")
    folder, outputs = parse("", "comfy").output_dir, []
    x, text = torch.randn(1, 4, 3, 4, 4), torch.randn(1, 8, 16)
    for name in ("pytorch_lora_weights.safetensors", "comfyui_lora.safetensors", None):
        pipe = WanPipeline.from_pretrained(teacher)
        if name:
            pipe.load_lora_weights(folder, weight_name=name)
        with torch.no_grad():
            outputs.append(pipe.transformer(x, torch.tensor([757.0]), text).sample)
    ours, comfy, base = outputs
    torch.testing.assert_close(comfy, ours, atol=1e-6, rtol=1e-5)
    assert (ours - base).abs().max() > 1e-3


def test_an_exported_pipeline_loads_whole(run, parse):
    run(f"{FULL} --export_pipeline", "whole")
    pipe = WanPipeline.from_pretrained(parse("", "whole").output_dir)
    assert isinstance(pipe.scheduler, FlowMatchLCMScheduler)
    assert pipe("a red ball", height=32, width=32, num_frames=5, num_inference_steps=3, guidance_scale=1.0,
                output_type="np").frames.shape == (1, 5, 32, 32, 3)  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# As a user starts it
# ---------------------------------------------------------------------------------------------------------------------


def user_flags(teacher, tmp_path, output):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red ball\na blue box\na green star\na red box\n")
    words = f"--pretrained_teacher_model {teacher} --train_prompts {prompts} {SHORT} --max_train_steps 2"
    return f"{words} --validation_prompt ball --output_dir {tmp_path / output}".split()


def test_two_processes_with_half_the_batch_equal_one(teacher, tmp_path):
    """Bidirectional and full; gradients are averaged once a step, whatever was called in between."""
    for output, processes, batch in (("one", 1, 2), ("two", 2, 1)):
        flags = user_flags(teacher, tmp_path, output)
        flags += ["--train_batch_size", batch, "--adam_epsilon", 1e-3, "--fake_score_eps", 1e-3, *FULL.split()]
        launch("train_dmd_distill_wan.py", *flags, processes=processes)
    one, two = (load_file(tmp_path / output / "checkpoint-2" / "student.safetensors") for output in ("one", "two"))
    start = load_file(teacher / "transformer" / "diffusion_pytorch_model.safetensors")
    assert max((one[key] - start[key]).abs().max() for key in one) > 1e-3
    for key in one:
        torch.testing.assert_close(two[key], one[key], atol=2e-5, rtol=0)


def assert_same_report(one, two):
    """Also of the exported student: its average, where there is one."""
    rows, others = (json.loads((folder / "report.json").read_text()) for folder in (one, two))
    assert [row["sampler"] for row in rows] == ["teacher", "teacher, other noise", "teacher", "student"]
    for row, other in zip(rows, others, strict=True):
        assert other | {"seconds": 0, "distance": 0} == row | {"seconds": 0, "distance": 0}
        assert other["distance"] == pytest.approx(row["distance"], rel=1e-3, abs=1e-6)
    assert (two / "side_by_side.png").stat().st_size > 500


def test_fsdp_equals_one_process_through_a_resume_and_exports_all_of_it(teacher, tmp_path):
    """Self-forcing, so that a network is called many times before one backward(), with an average and checkpointing."""
    usual = f"{FULL} --num_frame_per_block 1 --gradient_checkpointing --use_ema --ema_decay 0.5 --adam_epsilon 1e-3"
    usual += " --fake_score_eps 1e-3 --validation_steps 2 --max_train_steps 3 --report_steps 2"
    one, two = (user_flags(teacher, tmp_path, output) + usual.split() for output in ("one", "two"))
    script.main(script.parse_args([*one, "--train_batch_size", "2"]))
    two += ["--train_batch_size", 1, "--checkpointing_steps", 2]
    launch("train_dmd_distill_wan.py", *two, processes=2, fsdp=True)
    shutil.rmtree(tmp_path / "two" / "checkpoint-3")
    resumed = [*two, "--resume_from_checkpoint", "latest"]
    told = launch("train_dmd_distill_wan.py", *resumed, processes=2, fsdp=True).stdout
    assert "resumed from" in told and "checkpoint-2" in told
    start = load_file(teacher / "transformer" / "diffusion_pytorch_model.safetensors")
    for name in ("student", "fake_score", "ema"):
        whole, split = (load_file(tmp_path / each / "checkpoint-3" / f"{name}.safetensors") for each in ("one", "two"))
        assert whole.keys() == split.keys()
        assert max((whole[key] - start[key.replace("/", ".")]).abs().max() for key in whole) > 1e-3
        for key in whole:
            torch.testing.assert_close(split[key], whole[key], atol=2e-5, rtol=0)
    exported = WanTransformer3DModel.from_pretrained(tmp_path / "two", subfolder="transformer").state_dict()
    assert exported.keys() == start.keys()
    assert all(torch.equal(exported[key.replace("/", ".")], value) for key, value in split.items())
    assert (tmp_path / "two" / "samples.png").stat().st_size > 1000
    assert_same_report(tmp_path / "one", tmp_path / "two")


@pytest.mark.parametrize(
    "flags",
    [
        f"{CAUSAL} --use_ema --ema_decay 0.5 --train_batch_size 2 --report_steps 2",
        "--num_frame_per_block 2 --independent_first_frame --causal_init_steps 1 --context_noise 50"
        " --gradient_checkpointing",
    ],
)
def test_two_processes_that_share_the_tokens_equal_one(flags, teacher, tmp_path):
    """On the same samples, self-forcing, whose fake score is as bidirectional as any; validation draws with both."""
    words = [*flags.split(), "--adam_epsilon", "1e-3", "--fake_score_eps", "1e-3", "--validation_steps", "1"]
    words += [] if "lora" in flags else FULL.split()
    one, two = (user_flags(teacher, tmp_path, output) + words for output in ("one", "two"))
    script.main(script.parse_args(one))
    launch("train_dmd_distill_wan.py", *two, "--context_parallel_degree", 2, processes=2)
    for name in ("student", "fake_score", *(["ema"] if "ema" in flags else [])):
        one, two = (load_file(tmp_path / each / "checkpoint-2" / f"{name}.safetensors") for each in ("one", "two"))
        assert one.keys() == two.keys() and max(value.abs().max() for value in one.values()) > 1e-3
        for key in one:
            torch.testing.assert_close(two[key], one[key], atol=2e-5, rtol=0)
    states = (json.loads((tmp_path / each / "checkpoint-2" / "state.json").read_text()) for each in ("one", "two"))
    assert next(states)["stream"] == next(states)["stream"]
    if "report" in flags:
        assert_same_report(tmp_path / "one", tmp_path / "two")


def test_processes_share_tokens_only_where_that_comes_out_even(run):
    with pytest.raises(SystemExit, match="must divide 1 processes"):
        run(f"{LORA} --context_parallel_degree 2")


def test_a_run_leaves_clips_and_a_card(teacher, tmp_path):
    flags = user_flags(teacher, tmp_path, "out")
    flags += [*FULL.split(), "--num_frame_per_block", 1, "--report_to", "tensorboard"]
    launch("train_dmd_distill_wan.py", *flags)
    assert (tmp_path / "out" / "samples.png").stat().st_size > 1000
    (clip,) = (tmp_path / "out" / "validation").glob("step-000002/student-00-32x32.mp4")
    assert clip.stat().st_size > 200
    assert "roll_out(" in (tmp_path / "out" / "README.md").read_text()


def test_a_run_ends_with_a_report_of_teacher_and_student(teacher, tmp_path):
    flags = user_flags(teacher, tmp_path, "out")
    flags += ["--max_train_steps", 1, "--report_steps", "3", "--num_frame_per_block", 1, "--train_batch_size", 2]
    done = launch("train_dmd_distill_wan.py", *flags)
    rows = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [(row["sampler"], row["steps"], row["evaluations"]) for row in rows] == [
        ("teacher", 50, 100), ("teacher, other noise", 50, 100), ("teacher", 3, 6), ("student", 3, 3 * 3 + 2),
    ]  # fmt: skip
    assert rows[0]["distance"] == 0.0 < min(row["distance"] for row in rows[1:])
    card = (tmp_path / "out" / "README.md").read_text()
    table = "| student | 3 |"
    assert table in done.stdout and table in card and "side_by_side.png" in card
    for name in ("side_by_side.mp4", "side_by_side.png", "report.png", "samples.png"):
        assert (tmp_path / "out" / name).stat().st_size > 500
