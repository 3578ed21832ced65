"""All three quick starts for a few steps on a GPU: `python -m tests.bench.smoke`. Ends with 1 where one of them fails.

Each runs in bf16: as it is, with --compile, as a LoRA on an 8-bit base, and where a wait for the GPU is an error.
"""

import argparse
import itertools
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SCRIPTS = ("train_lcm_distill_sd.py", "train_lcm_distill_sdxl.py", "train_dmd_distill_wan.py")
KINDS = {
    "bf16": [],
    "compile": ["--compile"],
    "int8": ["--model_type", "lora", "--base_model_precision", "int8-torchao"],
    "waits": ["--model_type", "lora"],
}
WITHOUT_WAITS = """
import importlib, sys
from tests.waits import gpu, steps_without_waits
script = importlib.import_module(sys.argv[1].removesuffix(".py"))
print(steps_without_waits(script, *script.parse_args(sys.argv[2:]), on=gpu), "steps")
"""


def start(script: str, kind: str, steps: int, folder: Path) -> subprocess.Popen:
    """A run of the toy, as a user starts it; what it says goes to folder/log."""
    folder.mkdir(parents=True)
    flags = ["--mixed_precision", "bf16", "--max_train_steps", steps, "--output_dir", folder / "out", *KINDS[kind]]
    command = [sys.executable, *(["-c", WITHOUT_WAITS] if kind == "waits" else []), script, *map(str, flags)]
    return subprocess.Popen(command, stdout=open(folder / "log", "w"), stderr=subprocess.STDOUT)  # noqa: SIM115


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--at_a_time", type=int, default=3)
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    options = parser.parse_args()
    runs, failed = list(itertools.product(options.kinds, SCRIPTS)), 0
    with tempfile.TemporaryDirectory() as work:
        for first in range(0, len(runs), options.at_a_time):
            batch = runs[first : first + options.at_a_time]
            started, folders = time.time(), [Path(work, *run) for run in batch]
            running = [
                start(script, kind, options.steps, folder)
                for (kind, script), folder in zip(batch, folders, strict=True)
            ]
            for process, (kind, script), folder in zip(running, batch, folders, strict=True):
                ok = process.wait() == 0
                failed += not ok
                print(f"{'ok    ' if ok else 'FAILED'} {script} {kind}: {time.time() - started:.0f} s", flush=True)
                if not ok:
                    print("\n".join((folder / "log").read_text().splitlines()[-30:]), flush=True)
    raise SystemExit(failed > 0)


if __name__ == "__main__":
    main()
