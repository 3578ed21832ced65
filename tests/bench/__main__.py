"""Where the time and the memory of a training step go: `python -m tests.bench sd` (or `sdxl`, or `wan`).

The real script runs, and at intervals stops for as many bare steps with its own networks: the evaluations that the
method cannot do without (student forward and backward, teacher on both prompts, target, and the rollout's forward where
--scheduled_sampling_probability asks for it), the optimizer's step, and, where nothing is cached, the encoders'
forwards. Their time is the floor. What is printed is step / floor, from one run.

On a GPU: `python -m tests.bench sd --size real [--compile]`: random weights of SD 1.5, SDXL or Wan 1.3B, in bf16, a few
minutes each. What is Wan's own is in wan.py.
"""

import argparse
import contextlib
import importlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from tests.bench.lcm import Bench, Finished, lcm_flags
from tests.bench.wan import WanBench, wan_flags

LORA = ["--lora_rank", 64]
TOY = {"cached": [], "streaming": ["--vae_cache_disable"], "lora": LORA}
INT8 = ["--base_model_precision", "int8-torchao"]
CHECKPOINTED = ["--gradient_checkpointing"]
SCENARIOS = {
    ("sd", "toy"): TOY,
    ("sdxl", "toy"): TOY,
    ("wan", "toy"): {"lora": [], "full": ["--model_type", "full"]},  # both from full caches
    ("sd", "real"): {"full": [], "lora": LORA, "streaming": [*LORA, "--vae_cache_disable"]},
    ("sdxl", "real"): {"lora": LORA, "checkpointed": LORA + CHECKPOINTED, "int8": LORA + INT8 + CHECKPOINTED},
    ("wan", "real"): {"lora": CHECKPOINTED, "int8": INT8 + CHECKPOINTED},
}
# batch size, steps between two measurements of the floor, measurements, precision; of real size for a GPU
DEFAULTS = {
    ("sd", "toy"): (32, 25, 4, "no"),
    ("sdxl", "toy"): (32, 25, 4, "no"),
    ("wan", "toy"): (16, 25, 4, "no"),
    ("sd", "real"): (12, 6, 3, "bf16"),
    ("sdxl", "real"): (4, 6, 3, "bf16"),
    ("wan", "real"): (1, 3, 2, "bf16"),
}


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("script", choices=["sd", "sdxl", "wan"])
    parser.add_argument(
        "--size",
        choices=["toy", "real"],
        default="toy",
        help="real: SD 1.5's, SDXL's or Wan 1.3B's shapes, random weights",
    )
    parser.add_argument("--scenario", help="one only; default: all, each in a process of its own")
    parser.add_argument("--batch_size", type=int)
    parser.add_argument("--block", type=int, help="steps between two measurements of the floor")
    parser.add_argument("--blocks", type=int, help="measurements; the first one warms up and is not counted")
    parser.add_argument("--mixed_precision", choices=["no", "fp16", "bf16"])
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--work", type=Path, help="where a real-sized teacher is kept; default: a temporary folder")
    options = parser.parse_args(argv)
    which = options.script, options.size
    defaults = dict(zip(("batch_size", "block", "blocks", "mixed_precision"), DEFAULTS[which], strict=True))
    given = {name: value for name, value in vars(options).items() if value is not None}
    options = argparse.Namespace(**{"scenario": None, "work": None} | defaults | given)
    options.scenarios = SCENARIOS[which]
    if options.scenario not in (None, *options.scenarios):
        parser.error(f"--scenario {options.scenario}: is none of {', '.join(options.scenarios)}")
    return options


def run_scenario(options) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        flags = ["--output_dir", folder, "--train_batch_size", options.batch_size, "--report_to", "none"]
        flags += ["--validation_steps", 0, "--checkpointing_steps", 0, "--mixed_precision", options.mixed_precision]
        flags += ["--max_train_steps", options.block * options.blocks, "--disable_benchmark", "--report_steps="]
        flags += ["--dataloader_num_workers", 2]
        flags += ["--compile"] * options.compile
        if options.script == "wan":
            script, bench_class = importlib.import_module("train_dmd_distill_wan"), WanBench
            flags += [*wan_flags(options, Path(folder)), *options.scenarios[options.scenario]]
        else:
            script, bench_class = importlib.import_module(f"train_lcm_distill_{options.script}"), Bench
            flags += [*lcm_flags(options, Path(folder)), *options.scenarios[options.scenario]]
        args, data, *more = script.parse_args([str(flag) for flag in flags])
        bench = bench_class(script, options, args, data)
        with contextlib.suppress(Finished):
            script.main(args, data, *more)
        return bench.result()


def main(options):
    if options.scenario:
        print(json.dumps(run_scenario(options)))
        return
    columns = {}
    with tempfile.TemporaryDirectory() as work:  # a teacher of real size is made once
        for scenario in options.scenarios:
            command = [sys.executable, "-m", "tests.bench", *sys.argv[1:], "--scenario", scenario]
            command += ["--work", options.work or work]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            columns[scenario] = json.loads(output.splitlines()[-1])
    names = list(dict.fromkeys(name for column in columns.values() for name in column))
    machine = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    print(f"\n{options.script}, {options.size}, batch {options.batch_size}, {machine}, torch {torch.__version__}")
    print(f"{'':34}" + "".join(f"{scenario:>12}" for scenario in columns))
    for name in names:
        cells = [f"{column[name]:12.3f}" if name in column else f"{'':12}" for column in columns.values()]
        print(f"{name:34}" + "".join(cells))


if __name__ == "__main__":
    main(parse_args())
