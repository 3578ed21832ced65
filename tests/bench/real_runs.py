"""Each script once at true size, on a CPU, in bf16: `python -m tests.bench.real_runs [sd sdxl wan]`. 24 GB are enough.

Weights are random. A run takes a step and saves a checkpoint; another one resumes from it, takes a second step, saves,
validates and exports; the lines that it prints then draw a picture in a process that has stock diffusers alone. Printed
are seconds and the most memory of each process.
"""

import argparse
import gzip
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from PIL import Image

from tests.bench.real import real_sd, real_sdxl, real_wan
from tests.helpers import toy_shards

SIDE = 256
CLIP_WORDS = "open_clip/bpe_simple_vocab_16e6.txt.gz"  # CLIP's own vocabulary, as the package open_clip_torch ships it


def clip_vocabulary(folder: Path):
    """Gives a teacher CLIP's own tokenizers, where open_clip_torch is installed; else it keeps the toy's."""
    found = importlib.util.find_spec("open_clip")
    if found is None:
        print("open_clip_torch is not installed: the toy's tokenizer is in use")
        return
    from transformers import CLIPTokenizer
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    words = gzip.open(Path(found.submodule_search_locations[0]).parent / CLIP_WORDS, "rt", encoding="utf-8")
    merges = [line.rstrip("\n") for line in words][1 : 49152 - 256 - 2 + 1]
    letters = list(bytes_to_unicode().values())
    names = [*letters, *(letter + "</w>" for letter in letters), *(line.replace(" ", "") for line in merges)]
    names += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary, pairs = {name: i for i, name in enumerate(names)}, [tuple(line.split()) for line in merges]
    for target in folder.glob("tokenizer*"):
        shutil.rmtree(target)
        CLIPTokenizer(vocabulary, pairs, model_max_length=77).save_pretrained(target)


def sd(folder: Path) -> list:
    teacher = real_sd(folder / "teacher")
    flags = ["--model_type", "full", "--resolution", SIDE, "--validation_num_inference_steps", 1]
    return ["train_lcm_distill_sd.py", *flags, "--train_shards_path_or_url", shards(folder)], teacher


def sdxl(folder: Path) -> list:
    teacher = real_sdxl(folder / "teacher", variant="fp16", max_shard_size="2GB")
    clip_vocabulary(teacher)
    flags = [
        "--lora_rank",
        64,
        "--resolution",
        SIDE,
        "--teacher_variant",
        "fp16",
        "--validation_num_inference_steps",
        1,
    ]
    return ["train_lcm_distill_sdxl.py", *flags, "--train_shards_path_or_url", shards(folder)], teacher


def wan(folder: Path) -> list:
    (folder / "prompts.txt").write_text("a red ball\na blue cube\n")
    flags = ["--train_prompts", folder / "prompts.txt", "--num_frames", 5, "--resolution", SIDE]
    return ["train_dmd_distill_wan.py", *flags], real_wan(folder / "teacher")


def shards(folder: Path) -> str:
    return toy_shards(folder / "shards", 1, 4, SIDE, SIDE)


def measured(command: list) -> float:
    """Runs a command and prints what it takes."""
    started = time.time()
    process = subprocess.Popen([str(part) for part in command])
    _, status, used = os.wait4(process.pid, 0)
    print(f"  {Path(str(command[1])).name}: {time.time() - started:.0f} s, {used.ru_maxrss / 1e6:.1f} GB", flush=True)
    if status:
        raise SystemExit(f"{command} ended with {status}")


def run(name: str, folder: Path):
    print(name, flush=True)
    started = time.time()
    (script, *flags), teacher = {"sd": sd, "sdxl": sdxl, "wan": wan}[name](folder)
    print(f"  teacher made: {time.time() - started:.0f} s", flush=True)
    output = folder / "out"
    flags += ["--pretrained_teacher_model", teacher, "--output_dir", output, "--train_batch_size", 1]
    flags += ["--mixed_precision", "bf16", "--report_to", "none", "--report_steps=", "--disable_benchmark"]
    flags += ["--validation_prompt", "a red ball", "--checkpointing_steps", 1, "--checkpoints_total_limit", 1]
    flags += ["--dataloader_num_workers", 1, "--gradient_checkpointing", "--resume_from_checkpoint", "latest"]
    for steps in (1, 2):
        measured([sys.executable, script, *flags, "--max_train_steps", steps])
    usage = re.search("```python\n(.*?)```", (output / "README.md").read_text(), re.DOTALL)[1]
    (folder / "use.py").write_text(usage + f"image.save({str(folder / 'shown.png')!r})\n" * (name != "wan"))
    subprocess.run([sys.executable, str(folder / "use.py")], check=True, cwd=folder)
    shown = folder / ("clip.mp4" if name == "wan" else "shown.png")
    print(f"  {shown.name}: {shown.stat().st_size} bytes" if name == "wan" else f"  {Image.open(shown).size}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=["sd", "sdxl", "wan"])
    for name in parser.parse_args().models:
        with tempfile.TemporaryDirectory() as folder:
            run(name, Path(folder))


if __name__ == "__main__":
    main()
