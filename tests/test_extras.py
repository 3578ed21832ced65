"""What may be added to a run, each by its effect: 8 bits, rollouts, losses, schedules, evaluation, previews."""

import importlib.util
import itertools
import json
import math
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from diffusers import StableDiffusionPipeline
from diffusers.models.attention_dispatch import attention_backend
from diffusers.optimization import get_scheduler
from PIL import Image
from safetensors.torch import load_file

import train_lcm_distill_sd as script
from common import networks as speed
from common.draws import draw_rollout
from common.optim import DECAYS, make_schedule
from common.pictures import spread
from common.report import ClipScore, features, stable_loss
from common.solvers import DDIMSolver, roll_out
from tests.helpers import launch, tiny_autoencoder, tiny_pipeline, toy_shards
from tests.test_webhook import serve as hook_server

SHORT = "--resolution 32 --train_batch_size 4 --max_train_steps 1 --validation_steps 0 --checkpointing_steps 0"
SHORT += " --validation_num_inference_steps 1 --disable_benchmark --report_to none --lr_warmup_steps 0 --center_crop"
SHORT += " --report_steps= --validation_prompt red"


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    toy_shards(folder, shards=2, samples=8)
    return folder


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return tiny_pipeline(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    """The script in this process leaves neither accelerate's global state nor its signal handlers behind."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)
    reset()


def reset():
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture
def parse(teacher, shards, tmp_path, monkeypatch):
    """`parse(flags, folder)`: arguments of a short run."""
    monkeypatch.chdir(shards)  # the samples' order follows from the shards' names: the same every time

    def parse(flags: str = "", folder: str = "out"):
        argv = ["--pretrained_teacher_model", str(teacher), "--train_shards_path_or_url", "{00000..00001}.tar"]
        return script.parse_args([*argv, "--output_dir", str(tmp_path / folder), *SHORT.split(), *flags.split()])

    return parse


@pytest.fixture
def run(parse, tmp_path):
    """`run(flags, folder)`: a short run; its last checkpoint's weights."""

    def run(flags: str = "", folder: str = "out"):
        script.main(parse(flags, folder))
        reset()
        last = max((tmp_path / folder).glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
        return load_file(last / "student.safetensors")

    return run


def watch(monkeypatch, name: str) -> list[tuple]:
    """(arguments, result) of every call that the script makes of its function `name`."""
    calls, original = [], getattr(script, name)

    def watched(*arguments):
        result = original(*arguments)
        calls.append((arguments, result))
        return result

    monkeypatch.setattr(script, name, watched)
    return calls


def watch_log(monkeypatch) -> list[tuple[int, dict]]:
    """(step, values) of all that goes to the trackers."""
    logged = []
    monkeypatch.setattr(Accelerator, "log", lambda self, values, step: logged.append((step, values)))
    return logged


def tiny_inputs():
    rng = torch.Generator().manual_seed(4)
    return torch.randn(2, 4, 4, 4, generator=rng), torch.tensor([999, 19]), torch.randn(2, 32, 16, generator=rng)


# ---------------------------------------------------------------------------------------------------------------------
# 8 bits
# ---------------------------------------------------------------------------------------------------------------------


def linear_weights(network) -> list[torch.Tensor]:
    layers = [m for m in network.modules() if type(m) is torch.nn.Linear]
    return [layer.weight for layer in layers if not layer.weight.requires_grad]


@pytest.mark.parametrize("precision, error", [("int8-torchao", 0.02), ("fp8-torchao", 0.1)])
def test_a_lora_trains_on_a_base_in_8_bits_and_loads_on_the_plain_one(
    precision, error, parse, teacher, monkeypatch, tmp_path
):
    networks, original = [], script.load_networks

    def load(*arguments):
        networks.extend(original(*arguments))
        torch.manual_seed(3)
        for name, p in networks[0].named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(p, std=0.1)
        return tuple(networks)

    monkeypatch.setattr(script, "load_networks", load)
    calls = watch(monkeypatch, "predict")
    script.main(parse(f"--lora_rank 4 --base_model_precision {precision} --learning_rate 1e-2"))
    unet = networks[0]
    kinds = {type(weight).__name__ for weight in linear_weights(unet)}
    assert kinds == {"Int8Tensor" if "int8" in precision else "Float8Tensor"}

    # The teacher of the run is that base with the adapters off: near the plain one, but not the same.
    (_, x, t, cond, *_), out = calls[0]
    plain = StableDiffusionPipeline.from_pretrained(teacher)
    with torch.no_grad():
        expected = plain.unet(x, t, cond["prompt_embeds"]).sample
    distance = ((out - expected).norm() / expected.norm()).item()
    assert 1e-6 < distance < error

    plain.load_lora_weights(tmp_path / "out")
    x, t, cond = tiny_inputs()
    with torch.no_grad():
        ours, loaded = (network.eval()(x, t, cond).sample for network in (unet, plain.unet))
    assert ((ours - loaded).norm() / loaded.norm()).item() < error


def test_a_run_in_8_bits_resumes_bit_for_bit(run):
    flags = "--use_dora --base_model_precision int8-torchao --learning_rate 1e-3 --lora_rank 2"
    whole = run(f"{flags} --max_train_steps 2", "whole")
    run(f"{flags} --max_train_steps 1", "parts")
    resumed = run(f"{flags} --max_train_steps 2 --resume_from_checkpoint latest", "parts")
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_two_processes_train_on_a_base_in_8_bits_as_one_does(teacher, shards, tmp_path):
    """Whose weights cannot be broadcast. With rollouts and evaluation, which all processes must take part in."""
    flags = f"--pretrained_teacher_model {teacher} {SHORT} --lora_rank 2 --base_model_precision int8-torchao"
    flags += f" --train_shards_path_or_url {shards}/{{00000..00001}}.tar --eval_steps 1 --eval_samples 2"
    flags += " --scheduled_sampling_max_step_offset 5 --scheduled_sampling_probability 0.5 --learning_rate 1e-3"
    found = []
    for processes in (1, 2):
        more = ["--train_batch_size", 4 // processes, "--output_dir", tmp_path / str(processes)]
        launch("train_lcm_distill_sd.py", *flags.split(), *more, processes=processes)
        found.append(load_file(tmp_path / str(processes) / "checkpoint-1" / "student.safetensors"))
    assert found[0].keys() == found[1].keys() and any(value.any() for name, value in found[0].items() if "_B" in name)
    distances = torch.cat([(found[0][name] - found[1][name]).abs().flatten() for name in found[0]])
    assert distances.mean() < 1e-5  # a hundredth of the step


def test_a_full_student_has_a_teacher_in_8_bits_and_all_of_its_own(parse):
    args = parse("--base_model_precision int8-torchao --quantize_via cpu")
    networks = script.load_networks(args, Accelerator(), torch.float32)
    plain = script.load_unet(args, torch.float32)
    assert {type(weight).__name__ for weight in linear_weights(networks[0])} == {"Int8Tensor"}
    for student in networks[1:]:
        weights = student.state_dict()
        assert all(torch.equal(weights[name], value) for name, value in plain.state_dict().items())


def test_text_encoder_in_8_bits(parse):
    prompts = ["a small red circle"]
    embeds = []
    for flags in ("", "--text_encoder_1_precision int8-torchao"):
        encoder = script.load_text_encoder(parse(flags), torch.device("cpu"), torch.float32)
        with torch.no_grad():
            embeds.append(script.encode_prompts(encoder, prompts)["prompt_embeds"])
    assert 0 < (embeds[1] - embeds[0]).norm() / embeds[0].norm() < 0.05


def test_embeddings_of_another_precision_are_not_taken_from_the_cache(parse, tmp_path):
    for flags in ("", "--text_encoder_1_precision int8-torchao"):
        script.main(parse(flags + f" --cache_dir_text {tmp_path / 'shared'}"))
        reset()
    assert len(list((tmp_path / "shared").iterdir())) == 2


def test_int8_quanto_is_an_alias_that_says_so(parse):
    args = parse("--base_model_precision int8-quanto --optimizer optimi-lion")
    assert args.base_model_precision == "int8-torchao" and args.optimizer == "lion"
    assert any("int8-quanto: an alias, int8-torchao is in use" in note for note in args.notes)


def test_without_torchao_there_is_one_sentence(parse, monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr("common.quantize.importlib.util.find_spec", lambda n: None if n == "torchao" else find(n))
    parse("--base_model_precision no_change")
    with pytest.raises(SystemExit):
        parse("--base_model_precision fp8-torchao")
    assert "--base_model_precision fp8-torchao: needs torchao" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------------
# Optimizer, schedule, attention
# ---------------------------------------------------------------------------------------------------------------------


def rates(args, lr=1e-3, init=()) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr)
    schedule = make_schedule(args, optimizer, *init)
    found = []
    for _ in range(args.max_train_steps + 1):
        found.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    return found


@pytest.mark.parametrize("name", ["constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts"])
def test_schedules_are_those_of_diffusers(name, parse):
    args = parse(f"--lr_scheduler {name} --lr_warmup_steps 4 --max_train_steps 20 --learning_rate 1e-3")
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], 1e-3)
    schedule = get_scheduler(name, optimizer, num_warmup_steps=4, num_training_steps=20)
    expected = []
    for _ in range(21):
        expected.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert rates(args) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("name", [name for name in DECAYS if "constant" not in name])
def test_a_schedule_warms_up_and_decays_once_to_its_end(name, parse):
    args = parse(f"--lr_scheduler {name} --lr_warmup_steps 4 --max_train_steps 20 --lr_end 2e-4 --learning_rate 1e-3")
    found = rates(args)
    assert found[:5] == pytest.approx([0.0, 0.25e-3, 0.5e-3, 0.75e-3, 1e-3])
    assert all(a > b for a, b in itertools.pairwise(found[4:])) and found[-1] == pytest.approx(2e-4)
    init = rates(
        parse(f"--lr_scheduler {name} --lr_warmup_steps 4 --max_train_steps 30 --lr_end 2e-4 --learning_rate 1e-3"),
        init=(10, 3.0),
    )
    assert init[10:] == pytest.approx(found) and init[:5] == pytest.approx([3 * rate for rate in found[:5]])
    assert all(a > b > 6e-4 for a, b in itertools.pairwise(init[4:10]))


def test_cosine_with_min_lr_ends_at_a_tenth(parse):
    args = parse("--lr_scheduler cosine_with_min_lr --learning_rate 1e-3 --max_train_steps 10")
    assert rates(args)[-1] == pytest.approx(1e-4)


def test_the_schedule_goes_on_after_a_resume(parse, monkeypatch):
    logged = watch_log(monkeypatch)
    monkeypatch.setattr(script, "LOG_EVERY", 1)
    flags = "--lr_scheduler sine --lr_warmup_steps 1 --learning_rate 1e-3 --lr_end 1e-4 --lora_rank 2 "
    flags += "--checkpointing_steps 2 --max_train_steps 4"
    script.main(parse(flags))
    reset()
    script.main(parse(flags + " --resume_from_checkpoint checkpoint-2"))
    lrs = [(step, values["lr"]) for step, values in logged]
    assert [step for step, _ in lrs] == [1, 2, 3, 4, 3, 4] and lrs[4:] == lrs[2:4]
    assert lrs[3][1] == pytest.approx(1e-4)


def test_gradients_are_clipped_by_value_or_norm(run):
    """With plain sign updates the two could not be told apart: the moments are what the optimizer saw."""
    flags = "--lora_rank 2 --max_grad_norm 1e-4 --grad_clip_method "
    norm, value = (run(flags + method, method) for method in ("norm", "value"))
    assert any(not torch.equal(norm[name], value[name]) for name in norm)


@pytest.mark.parametrize("method", ["norm", "value"])
def test_what_max_grad_norm_bounds(method, run, tmp_path):
    run(f"--lora_rank 2 --max_grad_norm 1e-4 --grad_clip_method {method} --adam_beta1 0.5")
    moments = torch.load(tmp_path / "out" / "checkpoint-1" / "student.optimizer.pt", weights_only=True)["state"]
    grads = torch.cat([state["exp_avg"].flatten() * 2.0 for state in moments.values()])  # after one step
    if method == "norm":
        assert grads.norm().item() == pytest.approx(1e-4, rel=1e-3)
    else:
        assert grads.abs().max().item() == pytest.approx(1e-4, rel=1e-5) and grads.norm() > 2e-4


def test_another_attention_mechanism_computes_the_attention(parse, monkeypatch):
    x, t, cond = tiny_inputs()
    plain = script.load_networks(parse("--lora_rank 2"), Accelerator(), torch.float32)[0].eval()
    with attention_backend("native"):  # what is set inside is set for all networks, and put back at the end
        other = script.load_networks(
            parse("--lora_rank 2 --attention_mechanism _native_math"), Accelerator(), torch.float32
        )
    used, dispatch = [], speed.dispatch_attention_fn

    def watched(*arguments, backend):
        used.append(backend.value)
        return dispatch(*arguments, backend=backend)

    monkeypatch.setattr(speed, "dispatch_attention_fn", watched)
    with torch.no_grad():
        expected, found = plain(x, t, cond).sample, other[0].eval()(x, t, cond).sample
    assert set(used) == {"_native_math"} and len(used) == sum(
        name.endswith("attn1") or name.endswith("attn2") for name, _ in plain.named_modules()
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_an_attention_mechanism_that_is_not_there_is_one_sentence(parse):
    with pytest.raises(SystemExit, match="--attention_mechanism sage: "):
        script.load_networks(parse("--attention_mechanism sage"), Accelerator(), torch.float32)


def test_lora_type_means_a_lora(parse):
    assert parse("--lora_type standard").model_type == "lora" and parse().model_type == "full"


# ---------------------------------------------------------------------------------------------------------------------
# Rollouts and flow velocities
# ---------------------------------------------------------------------------------------------------------------------


def test_rollouts_have_their_share_and_lengths(parse):
    means = {}
    for strategy in ("uniform", "biased_early", "biased_late"):
        args = parse(
            "--scheduled_sampling_max_step_offset 8 --scheduled_sampling_probability 0.25"
            f" --scheduled_sampling_strategy {strategy}"
        )
        offsets = torch.stack([draw_rollout(args, i, (1,))[0] for i in range(2000)])
        assert abs((offsets > 0).float().mean() - 0.25) < 0.04  # four standard deviations
        assert set(offsets.tolist()) <= set(range(9)) and offsets.max() == 8
        means[strategy] = offsets[offsets > 0].float().mean().item()
    assert means["biased_early"] < means["uniform"] - 0.5 and means["biased_late"] > means["uniform"] + 0.5


def test_a_rollout_is_one_step_of_the_students_own_sampler():
    """Against LCMScheduler, for a student that says x0 = 0.3 x; boundary scalings are 0 and 1 at these timesteps."""
    from diffusers import LCMScheduler

    lcm = LCMScheduler(beta_schedule="scaled_linear", prediction_type="sample", clip_sample=False)
    abar = lcm.alphas_cumprod
    solver, alphas, sigmas = DDIMSolver(abar, 50), abar.sqrt(), (1 - abar).sqrt()
    rng = torch.Generator().manual_seed(0)
    x_t, latents, eps, noise = (torch.randn(4, 4, 2, 2, generator=rng) for _ in range(4))
    index, offset = torch.tensor([10, 20, 40, 49]), torch.tensor([5, 0, 20, 3])
    made = roll_out(lambda x, t: 0.3 * x, solver, alphas, sigmas, x_t, latents, eps, index, offset, noise)
    for i, above in ((0, 15), (2, 49)):
        t, t_above = (solver.timesteps[place].item() for place in (index[i], above))
        lcm.set_timesteps(timesteps=[t_above, t])
        x = lcm.add_noise(latents[i], eps[i], torch.tensor([t_above]))
        x0 = lcm.step(0.3 * x, t_above, x).denoised
        expected = lcm.add_noise(x0, noise[i], torch.tensor([t]))
        torch.testing.assert_close(made[i], expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(made[1], x_t[1]) and torch.equal(made[3], x_t[3])  # not rolled out; nothing lies above


@pytest.mark.parametrize("kind", ["", "--lora_rank 2 --lora_dropout 0.3"])
def test_rolled_out_samples_are_made_by_the_student_without_gradient(kind, parse, monkeypatch):
    flags = f"{kind} --scheduled_sampling_max_step_offset 10 --scheduled_sampling_probability "
    inputs, calls = {}, watch(monkeypatch, "predict")
    for probability in ("0.0001", "1"):
        calls.clear()
        script.main(parse(flags + probability))
        reset()
        assert len(calls) == 4 and not calls[0][1].requires_grad and calls[3][1].requires_grad
        rolled, student = calls[0][0], calls[3][0]
        assert rolled[0] is student[0] and (rolled[2] >= student[2]).all()
        inputs[probability] = student[1], student[2], rolled[2]
    (x, t, _), (x_rolled, t_rolled, t_above) = inputs["0.0001"], inputs["1"]
    assert torch.equal(t, t_rolled)  # other draws do not change
    changed = (x != x_rolled).flatten(1).any(1)
    assert torch.equal(changed, t_above > t) and changed.any()


def test_a_run_with_rollouts_resumes_bit_for_bit(run):
    flags = "--lora_rank 2 --learning_rate 1e-3 --scheduled_sampling_max_step_offset 10"
    flags += " --scheduled_sampling_probability 0.5"
    whole = run(f"{flags} --max_train_steps 3", "whole")
    run(f"{flags} --max_train_steps 1", "parts")
    resumed = run(f"{flags} --max_train_steps 3 --resume_from_checkpoint latest", "parts")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_the_flow_loss_is_on_velocities(parse, monkeypatch):
    """v = eps - x0 on the flow's own path: with x = alpha x0 + sigma eps, at the student's input."""
    networks = watch(monkeypatch, "predict")
    plain = watch(monkeypatch, "consistency_loss")
    script.main(parse("--lora_rank 2"))
    reset()
    script.main(parse("--lora_rank 2 --diff2flow_loss"))
    (x0, x0_target, *_), (v, v_target, *_) = (arguments for arguments, _ in plain)
    (_, x_t, t, *_), _ = networks[2]
    abar = StableDiffusionPipeline.from_pretrained(parse().pretrained_teacher_model).scheduler.alphas_cumprod.double()
    for clean, velocity in ((x0, v), (x0_target, v_target)):
        clean, velocity = clean.detach().double(), velocity.detach().double()
        alpha, sigma = (table[t][:, None, None, None] for table in (abar.sqrt(), (1 - abar).sqrt()))
        # what the flow model says must give the same noisy sample back: x_t = (alpha + sigma) x0 + sigma v
        torch.testing.assert_close((alpha + sigma) * clean + sigma * velocity, x_t.double(), rtol=1e-3, atol=1e-3)
    assert plain[1][1] > plain[0][1]


# ---------------------------------------------------------------------------------------------------------------------
# Validation and evaluation
# ---------------------------------------------------------------------------------------------------------------------


def test_the_negative_prompt_reaches_the_teachers_pictures_alone(parse, monkeypatch, tmp_path):
    calls = watch(monkeypatch, "draw")
    flags = "--validation_negative_prompt blue --model_type full".replace("--disable_benchmark", "")
    args = parse(flags)
    args.disable_benchmark = False
    script.main(args)
    negatives = {type(a[3]).__name__: a[5]["prompt_embeds"] for a, _ in calls}
    pipe = StableDiffusionPipeline.from_pretrained(args.pretrained_teacher_model)
    for sampler, prompt in (("DDIMScheduler", "blue"), ("LCMScheduler", "")):
        expected, _ = pipe.encode_prompt(prompt, "cpu", 1, False)
        torch.testing.assert_close(negatives[sampler], expected, rtol=0, atol=1e-5)


def test_one_block_of_rows_for_each_size(parse, tmp_path, monkeypatch):
    calls = watch(monkeypatch, "draw")
    script.main(parse("--validation_resolution 32x32,48x32 --validation_num_inference_steps 1,2"))
    assert [picture.size for _, (picture,) in calls] == [(32, 32), (32, 32), (48, 32), (48, 32)]
    sheet = Image.open(tmp_path / "out" / "samples.png")
    assert sheet.width > 48 * 4 and sheet.height > 4 * 128


def test_previews_are_the_half_done_samples(parse, tmp_path, monkeypatch):
    tiny = tiny_autoencoder(tmp_path / "tiny")
    seen, original = [], StableDiffusionPipeline.__call__

    def watched(self, *arguments, callback_on_step_end, **options):
        def both(pipeline, i, t, tensors):
            if callback_on_step_end:
                seen.append(tensors["latents"].clone())
                return callback_on_step_end(pipeline, i, t, tensors)
            return {}

        return original(self, *arguments, callback_on_step_end=both, **options)

    monkeypatch.setattr(StableDiffusionPipeline, "__call__", watched)
    flags = "--validation_preview --validation_preview_steps 2 --validation_num_inference_steps 5"
    script.main(parse(f"{flags} --validation_preview_model {tmp_path / 'tiny'} --report_to tensorboard"))
    files = sorted((tmp_path / "out" / "validation").glob("preview-*"))
    assert [path.name for path in files] == [f"preview-5-steps-step0{i}-000001.png" for i in (1, 2, 4)]
    with torch.no_grad():
        expected = tiny.decode(seen[3]).sample[0].clamp(-1, 1).permute(1, 2, 0) * 127.5 + 127.5
    assert np.abs(np.asarray(Image.open(files[2])).astype(float) - expected.numpy()).max() <= 1.0
    events = [p.read_bytes() for p in (tmp_path / "out" / "logs").rglob("*tfevents*")]
    assert any(b"preview-5-steps-step04" in data for data in events)


def tiny_clip(folder: Path, teacher: Path) -> Path:
    from transformers import AutoTokenizer, CLIPConfig, CLIPModel
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

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


def test_the_clip_score_is_100_cosines(parse, teacher, tmp_path, monkeypatch):
    folder = tiny_clip(tmp_path / "clip", teacher)
    logged = watch_log(monkeypatch)
    drawn = watch(monkeypatch, "draw")
    (tmp_path / "prompts.json").write_text(json.dumps({"a": "a red circle", "b": "a large blue square"}))
    flags = f"--evaluation_type clip --evaluation_clip_model {folder} --validation_num_inference_steps 2"
    script.main(parse(f"{flags} --validation_prompt_library {tmp_path / 'prompts.json'} --report_steps 1"))
    prompts, pictures = ["a red circle", "a large blue square", "red"], drawn[0][1]
    clip = ClipScore(str(folder), "cpu")
    tokens = clip.tokenizer(prompts, padding=True, return_tensors="pt")
    pixels = torch.stack([torch.from_numpy(np.array(p)).float() / 255 for p in pictures]).permute(0, 3, 1, 2)
    mean, std = torch.tensor(clip.processor.image_mean), torch.tensor(clip.processor.image_std)
    pixels = (pixels - mean[:, None, None]) / std[:, None, None]
    with torch.no_grad():
        out = clip.model(**tokens, pixel_values=pixels)
        cosines = out.logits_per_image.diagonal() / clip.model.logit_scale.exp()
    scores = (100 * cosines).clamp(min=0)
    assert scores.max() > 5.0, scores  # there is something to compare
    values = next(values for _, values in logged if "clip_score/2 steps/mean" in values)
    expected = [scores.min(), scores.max(), scores.mean(), scores.std(correction=0)]
    found = [values[f"clip_score/2 steps/{name}"] for name in ("min", "max", "mean", "std")]
    assert found == pytest.approx([value.item() for value in expected], abs=0.02)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert all(0.0 <= row["clip_score"] <= 100.0 for row in report)


def test_a_clip_that_is_not_there_is_known_before_training(parse, tmp_path):
    with pytest.raises(SystemExit, match="--evaluation_clip_model /no/such: cannot be loaded"):
        script.main(parse("--evaluation_type clip --evaluation_clip_model /no/such"))
    assert not list((tmp_path / "out").glob("checkpoint-*"))


def test_spread():
    assert spread("a", torch.tensor([1.0, 3.0])) == {"a/min": 1.0, "a/max": 3.0, "a/mean": 2.0, "a/std": 1.0}


def test_the_eval_loss_is_the_same_for_the_same_weights(parse, monkeypatch):
    """Whatever the seed and the batch are; and another one for other weights."""
    logged = watch_log(monkeypatch)
    found = []
    for flags in ("", "--seed 7 --train_batch_size 2", "--learning_rate 1e-2"):
        folder = f"out{len(found)}"
        rate = "" if "rate" in flags else "--learning_rate 1e-30"
        script.main(parse(f"--lora_rank 2 --eval_steps 1 --eval_samples 2 {rate} {flags}", folder))
        reset()
        found.append({k: v for _, values in logged for k, v in values.items() if k.startswith("eval_loss")})
        logged.clear()
    assert found[0].keys() == {"eval_loss", *(f"eval_loss/{place}" for place in (6, 18, 31, 43))}
    assert found[1] == pytest.approx(found[0], rel=1e-6)
    assert found[2]["eval_loss"] != pytest.approx(found[0]["eval_loss"], rel=1e-3)
    assert all(math.isfinite(value) and value > 0 for value in found[0].values())


def test_evaluation_changes_nothing_and_held_out_samples_are_not_trained_on(parse, monkeypatch, capsys):
    kept = {}
    original = stable_loss

    def watched(args, loss_of, network, samples, encoder):
        kept.setdefault("held out", {sample.key for sample in samples})
        return original(args, loss_of, network, samples, encoder)

    monkeypatch.setattr(script, "stable_loss", watched)
    trained, encode = set(), script.SampleEncoder.encode_images

    def encode_images(self, samples):
        if len(samples) > 1:
            trained.update(sample.key for sample in samples)
        return encode(self, samples)

    monkeypatch.setattr(script.SampleEncoder, "encode_images", encode_images)
    script.main(parse("--lora_rank 2 --eval_steps 2 --eval_samples 3 --max_train_steps 8 --vae_cache_disable"))
    assert len(kept["held out"]) == 3 and len(trained) == 13 and not kept["held out"] & trained
    assert "held out for --eval_steps" in capsys.readouterr().out


def test_a_run_tells_its_webhook(parse, tmp_path, monkeypatch, capsys):
    """Progress, pictures, the end, and what ends it before."""
    server = hook_server()
    (tmp_path / "hook.json").write_text(json.dumps({"webhook_url": server.url, "level": "info"}))
    flags = f"--lora_rank 2 --webhook_config {tmp_path / 'hook.json'}"
    script.main(parse(flags))
    reset()
    assert [message["type"] for message in server.received] == ["progress", "picture", "end"]
    progress, picture, _ = server.received
    assert (progress["step"], progress["of"], picture["name"]) == (1, 1, "grid") and progress["loss"] > 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert server.url not in card  # it may hold a secret
    with pytest.raises(SystemExit):
        script.main(parse(f"{flags} --num_ddim_timesteps 30"))
    assert server.received[-1]["type"] == "error" and "--num_ddim_timesteps 30" in server.received[-1]["message"]
    server.shutdown()
    server.server_close()
    reset()
    script.main(parse(flags, "again"))  # nobody listens any more
    assert "--webhook_config: 3 messages were not delivered" in capsys.readouterr().out
    assert (tmp_path / "again" / "pytorch_lora_weights.safetensors").exists()


@pytest.mark.parametrize("formats", ["diffusers", "diffusers,kohya"])
def test_the_kohya_file_of_a_run_is_the_trained_lora(formats, parse, teacher, tmp_path):
    script.main(
        parse(f"--lora_rank 2 --lora_alpha 6 --learning_rate 1e-2 --max_train_steps 2 --export_formats {formats}")
    )
    assert (tmp_path / "out" / "kohya_lora.safetensors").exists() == ("kohya" in formats)
    if "kohya" in formats:
        x, t, cond = tiny_inputs()
        outputs = []
        for name in (None, "pytorch_lora_weights.safetensors", "kohya_lora.safetensors"):
            pipe = StableDiffusionPipeline.from_pretrained(teacher)
            if name:
                pipe.load_lora_weights(tmp_path / "out", weight_name=name)
            with torch.no_grad():
                outputs.append(pipe.unet.eval()(x, t, cond).sample)
        assert (outputs[1] - outputs[0]).abs().mean() > 1e-4
        torch.testing.assert_close(outputs[2], outputs[1], rtol=0, atol=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# Steps against quality
# ---------------------------------------------------------------------------------------------------------------------


def test_the_reports_features_tell_near_from_far():
    rng = np.random.default_rng(0)
    base = rng.integers(0, 255, (64, 64, 3)).astype(np.uint8)
    near = np.clip(base.astype(int) + rng.integers(-8, 8, base.shape), 0, 255).astype(np.uint8)
    far = base[::-1].copy()
    a, b, c = features([Image.fromarray(picture) for picture in (base, near, far)])
    assert 0 < (a - b).norm() < 0.5 * (a - c).norm()
    assert torch.equal(features([Image.fromarray(base)])[0], a)  # weights are fixed


def test_the_report_ranks_a_student_that_is_the_teacher(parse, tmp_path, monkeypatch):
    """A teacher with more steps is nearer to its own 50; table, plot and card are there."""
    script.main(parse("--report_steps 2,25 --learning_rate 1e-30"))
    rows = json.loads((tmp_path / "out" / "report.json").read_text())
    found = {(row["sampler"], row["steps"]): row for row in rows}
    assert set(found) == {("teacher", 50), *((who, n) for who in ("teacher", "student") for n in (2, 25))}
    assert found["teacher", 50]["distance"] == 0.0
    assert 0 < found["teacher", 25]["distance"] < found["teacher", 2]["distance"]
    assert all(row["seconds"] > 0 for row in rows)
    assert Image.open(tmp_path / "out" / "report.png").size == (560, 360)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| student | 25 |" in card and "report.png" in card


def test_an_unknown_flavour_is_refused(parse, tmp_path, capsys):
    (tmp_path / "c.json").write_text(json.dumps({"model_flavour": "turbo"}))
    with pytest.raises(SystemExit):
        parse(f"--config {tmp_path / 'c.json'}")
    assert "model_flavour is 'turbo'" in capsys.readouterr().err
