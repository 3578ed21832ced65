"""A plan beside what a GPU holds: `python -m tests.planning.on_gpu sdxl [flags of the script]`, on a CUDA GPU.

The script runs two steps, or --max_train_steps, with random weights of real size, made on the GPU from the teacher's
configs alone: SD 1.5 (sd), SDXL (sdxl), Wan 1.3B (wan) or 14B (wan14b). Caches are filled first. What is printed is the
most that PyTorch held during training, as torch.cuda.max_memory_allocated() has it, and the plan's number for the same
flags.
"""

import importlib
import sys
import tempfile
from pathlib import Path

import torch

from common.networks import network_of_config
from common.planning.phases import GB, measure
from tests.helpers import toy_shards
from tests.planning.real import TOY, real_configs

SCRIPTS = {"sd": "train_lcm_distill_sd", "sdxl": "train_lcm_distill_sdxl"}
SIDES = {"sd": 512, "sdxl": 1024}
USUAL = "--report_to none --validation_steps 0 --checkpointing_steps 0 --disable_benchmark --report_steps= "
USUAL += "--max_train_steps 2 --lr_warmup_steps 0 --mixed_precision bf16 --train_batch_size 1"
PROMPTS = "--resolution_type pixel_area --resolution 632 --validation_resolution 832x480 --train_prompts"


def random_network(cls, source, folder, dtype, **options):
    """In place of the weights on disk: random ones, made on the GPU."""
    with torch.device("cuda"):
        return network_of_config(cls, source, folder, dtype, **options)


def main(name: str, flags: list[str]):
    script = importlib.import_module(SCRIPTS.get(name, "train_dmd_distill_wan"))
    with tempfile.TemporaryDirectory() as folder:
        teacher = real_configs(name, Path(folder, "teacher"))
        usual = ["--pretrained_teacher_model", teacher, "--output_dir", Path(folder, "out"), *USUAL.split()]
        if name in SIDES:
            usual += ["--train_shards_path_or_url", toy_shards(Path(folder), 1, 8, SIDES[name], SIDES[name])]
        else:
            usual += [*PROMPTS.split(), TOY / "wan_prompts.txt", "--last_step_only"]
        args, *rest = script.parse_args([str(flag) for flag in [*usual, *flags]])
        phases = measure(script.main, args, rest)
        found = []
        script.load_network = random_network
        bar = script.tqdm
        script.tqdm = lambda **options: torch.cuda.reset_peak_memory_stats() or bar(**options)
        script.end_run = lambda *_, **__: found.append(torch.cuda.max_memory_allocated())
        script.main(args, *rest)
    (planned,) = [phase.total for phase in phases if phase.name == "training"]
    ratio = f"{planned / found[0]:.3f} of what was held"
    print(f"{name} {' '.join(flags)}: planned {planned / GB:.2f} GB, held {found[0] / GB:.2f} GB: {ratio}")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
