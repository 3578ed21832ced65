"""A script whose processes wait for each other for seconds alone, with slow pictures, or a filling that is slow in one.

`accelerate launch tests/launches/impatient.py SCRIPT pictures|filling|death FLAGS`
"""

import importlib
import os
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from common.data import encoder
from common.data.encoder import SampleEncoder

WAIT, PICTURE, SAMPLE = 10.0, 4.0, 1.5  # seconds


def impatient(start_run):
    """start_run, after which processes wait no longer than WAIT; before it, they may have begun at different times."""

    def start(*given, **options):
        found = start_run(*given, **options)
        torch.distributed.distributed_c10d._set_pg_timeout(timedelta(seconds=WAIT), torch.distributed.group.WORLD)
        return found

    return start


def slow_pictures(generate):
    def generated(args, vae, unet, scheduler, text, *more):
        time.sleep(PICTURE * len(text["prompt_embeds"]))
        return generate(args, vae, unet, scheduler, text, *more)

    return generated


def slow_in_one(encode_soon):
    def encode(self, sample):
        time.sleep(SAMPLE * torch.distributed.get_rank())
        return encode_soon(self, sample)

    return encode


def dies_in_one(encode_soon):
    def encode(self, sample):
        if torch.distributed.get_rank() == 1:
            os._exit(3)
        return encode_soon(self, sample)

    return encode


if __name__ == "__main__":
    name, slow, *flags = sys.argv[1:]
    script = importlib.import_module(name)
    script.start_run = impatient(script.start_run)
    encoder.ROUND = 1.0
    if slow == "pictures":
        script.generate = slow_pictures(script.generate)
    else:
        change = {"filling": slow_in_one, "death": dies_in_one}[slow]
        SampleEncoder.encode_soon = change(SampleEncoder.encode_soon)
    script.main(*script.parse_args(flags))
