"""Prints how much memory a process of the Wan script holds at most: while networks load, and at checkpoints."""

import sys
import threading
import time
from pathlib import Path

import torch
from accelerate import Accelerator

sys.path.insert(0, str(Path(__file__).parents[2]))

import train_dmd_distill_wan as script
from common import checkpoint
from common.checkpoint import load_checkpoint, save_checkpoint


def held() -> float:
    """Megabytes of the process's own; pages of files, which the system can drop, are not among them."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) / 1024


class Peak:
    """Inside, the most that is held is noted, beyond what is held at the beginning."""

    def __enter__(self):
        self.start, self.most, self.over = held(), held(), False
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self

    def watch(self):
        while not self.over:
            self.most = max(self.most, held())
            time.sleep(0.001)

    def __exit__(self, *_):
        self.over = True
        self.thread.join()
        self.beyond = self.most - self.start


def parts(networks) -> float:
    """Megabytes of this process's parts of all networks."""
    own = {id(p): getattr(p, "_local_tensor", p) for network in networks for p in network.parameters()}
    return sum(p.nbytes for p in own.values()) / 2**20


def saving_and_resuming(args, accelerator, saved: dict) -> list[float]:
    """The most that is held while a checkpoint is written, and read, of networks that have made a step."""

    def optimizers() -> dict:
        return {name: torch.optim.AdamW(network.parameters()) for name, network in saved.items()}

    trained = optimizers()
    for name, network in saved.items():
        for p in network.parameters():
            p.grad = torch.ones_like(p)
        trained[name].step()
        trained[name].zero_grad()
    with Peak() as saving:
        folder = save_checkpoint(args.output_dir, 1, saved, trained, {}, main=accelerator.is_main_process)
        accelerator.wait_for_everyone()
    del trained
    with Peak() as resuming:
        load_checkpoint(folder, saved, optimizers())
    return [saving.beyond, resuming.beyond]


if __name__ == "__main__":
    args, *_ = script.parse_args(sys.argv[1:])
    accelerator, checkpoint.FILE_BYTES = Accelerator(), 2**26
    with Peak() as loading:
        by_role = script.load_networks(args, accelerator, torch.float32).by_role
    found = [accelerator.process_index, loading.beyond, parts(by_role.values())]
    if args.model_type == "full":
        saved = {name: by_role[name] for name in ("student", "fake_score")}
        found += saving_and_resuming(args, accelerator, saved)
    print("held", *found, flush=True)
