"""Where the time and the memory of a training step go: `python -m tests.bench sd` (or `sdxl`, or `wan`).

The real script runs, and at intervals stops for as many bare steps with its own networks: the evaluations that the
method cannot do without (student forward and backward, teacher on both prompts, target, and the rollout's forward where
--scheduled_sampling_probability asks for it), the optimizer's step, and, where nothing is cached, the encoders'
forwards. Their time is the floor. What is printed is step / floor, from one run.

On a GPU: `python -m tests.bench sd --size real --batch_size 12 --mixed_precision bf16 [--compile]`, random weights.
What is Wan's own is in wan.py.
"""

import argparse
import importlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from tests.bench.lcm import Bench, lcm_flags
from tests.bench.wan import WanBench, wan_flags

LCM = {"cached": [], "streaming": ["--vae_cache_disable"], "lora": ["--lora_rank", 64]}
WAN = {"lora": [], "full": ["--model_type", "full"]}  # both from full caches


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("script", choices=["sd", "sdxl", "wan"])
    parser.add_argument(
        "--size",
        choices=["toy", "real"],
        default="toy",
        help="real: SD 1.5's, SDXL's or Wan 1.3B's shapes, random weights",
    )
    parser.add_argument(
        "--scenario", choices=sorted({*LCM, *WAN}), help="one only; default: all, each in a process of its own"
    )
    parser.add_argument("--batch_size", type=int, help="default: 32; wan: 16, of real size 1")
    parser.add_argument("--block", type=int, default=25, help="steps between two measurements of the floor")
    parser.add_argument("--blocks", type=int, default=4, help="the first one warms up and is not counted")
    parser.add_argument("--mixed_precision", default="no", choices=["no", "fp16", "bf16"])
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--work", type=Path, help="where a real-sized teacher is kept; default: a temporary folder")
    options = parser.parse_args(argv)
    if options.batch_size is None:
        options.batch_size = {"toy": 16, "real": 1}[options.size] if options.script == "wan" else 32
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
            flags += [*wan_flags(options, Path(folder)), *WAN[options.scenario]]
        else:
            script, bench_class = importlib.import_module(f"train_lcm_distill_{options.script}"), Bench
            flags += [*lcm_flags(options, Path(folder)), *LCM[options.scenario]]
        args, data, *more = script.parse_args([str(flag) for flag in flags])
        bench = bench_class(script, options, args, data)
        script.main(args, data, *more)
        return bench.result()


def main(options):
    if options.scenario:
        print(json.dumps(run_scenario(options)))
        return
    columns = {}
    for scenario in WAN if options.script == "wan" else LCM:
        command = [sys.executable, "-m", "tests.bench", *sys.argv[1:], "--scenario", scenario]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        print(*[line for line in output.splitlines() if line.startswith("bench:")], sep="\n")
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
