"""All three quick starts for a few steps on a GPU: `python -m tests.bench.smoke`. Ends with 1 where one of them fails.

Each runs in bf16, alone, with --compile, and as a LoRA on an 8-bit base. Runs are forks of this process, which has
imported what they need.
"""

import argparse
import importlib
import itertools
import multiprocessing
import sys
import tempfile
import time
import traceback
from pathlib import Path

SCRIPTS = ("train_lcm_distill_sd", "train_lcm_distill_sdxl", "train_dmd_distill_wan")
KINDS = {
    "bf16": [],
    "compile": ["--compile"],
    "int8": ["--model_type", "lora", "--base_model_precision", "int8-torchao"],
}


def run(script: str, kind: str, steps: int, folder: Path):
    """Trains the toy, as a user does; what is said goes to folder/log."""
    folder.mkdir(parents=True)
    sys.stdout = sys.stderr = open(folder / "log", "w", buffering=1)  # noqa: SIM115: for as long as this process lives
    module = importlib.import_module(script)
    flags = ["--mixed_precision", "bf16", "--max_train_steps", steps, "--output_dir", folder / "out", *KINDS[kind]]
    try:
        module.main(*module.parse_args([str(flag) for flag in flags]))
    except BaseException:
        traceback.print_exc()
        raise SystemExit(1) from None


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--at_a_time", type=int, default=3)
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    options = parser.parse_args()
    for script in SCRIPTS:
        importlib.import_module(script)
    fork, failed = multiprocessing.get_context("fork"), 0
    with tempfile.TemporaryDirectory() as work:
        waiting = [(script, kind) for kind, script in itertools.product(options.kinds, SCRIPTS)]
        while waiting:
            batch, waiting, started = waiting[: options.at_a_time], waiting[options.at_a_time :], time.time()
            folders = [Path(work, script, kind) for script, kind in batch]
            running = [
                fork.Process(target=run, args=(*each, options.steps, folder))
                for each, folder in zip(batch, folders, strict=True)
            ]
            for process in running:
                process.start()
            for process, (script, kind), folder in zip(running, batch, folders, strict=True):
                process.join()
                ok = process.exitcode == 0
                failed += not ok
                print(f"{'ok    ' if ok else 'FAILED'} {script} {kind}: {time.time() - started:.0f} s", flush=True)
                if not ok:
                    print("\n".join((folder / "log").read_text().splitlines()[-30:]), flush=True)
    raise SystemExit(failed > 0)


if __name__ == "__main__":
    main()
