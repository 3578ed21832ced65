"""What is watched while a student trains: means of what the loop measures, clips on disk, and signs of collapse."""

import base64
import difflib
import functools
import io
import json
import os
import queue
import threading
import time
import urllib.request
from pathlib import Path

import numpy as np
import torch
from PIL import Image

GAP_RANGES = ((0, 250), (250, 500), (500, 750), (750, 1000))  # timesteps


class Means:
    """Means over all processes of what was added since the last read; nothing waits for the device in between."""

    def __init__(self, names: list[str], device):
        self.names = {name: i for i, name in enumerate(names)}
        self.device = device
        self.reset()

    def reset(self):
        self.sums = torch.zeros(2, len(self.names), device=self.device)  # of values and of their weights

    def add(self, name: str, value: torch.Tensor, weight: float = 1.0):
        self.sums[0, self.names[name]] += weight * value.detach()
        self.sums[1, self.names[name]] += weight

    def add_gaps(self, gap: torch.Tensor, t: torch.Tensor):
        """Of each sample by the range that its timestep is in; t is on the CPU."""
        for value, timestep in zip(gap, t.tolist(), strict=True):
            place = min(int(timestep) * len(GAP_RANGES) // GAP_RANGES[-1][1], len(GAP_RANGES) - 1)
            self.add(gap_name(GAP_RANGES[place]), value)

    def read(self, accelerator) -> dict[str, float]:
        """Of those that something was added to; every process must call it."""
        sums, weights = accelerator.reduce(self.sums, "sum").tolist()
        self.reset()
        return {name: sums[i] / weights[i] for name, i in self.names.items() if weights[i]}


def gap_name(bounds: tuple[int, int]) -> str:
    return f"gap/{bounds[0]}-{bounds[1]}"


def show_picture(accelerator, picture: Image.Image, folder: Path, name: str, step: int):
    """Saves FOLDER/NAME-STEP.png and logs it to every tracker."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}-{step:06d}.png"
    picture.save(path)
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            tracker.writer.add_image(name, np.asarray(picture), step, dataformats="HWC")
        elif tracker.name == "wandb":
            import wandb

            tracker.log({name: wandb.Image(picture)}, step=step)
        elif tracker.name == "trackio":
            import trackio

            tracker.log({name: trackio.Image(picture)}, step=step)
    return path


def init_trackers(args, accelerator):
    """Their settings must be scalars or text, and the hub's token is nobody's business."""
    settings = {
        name: value if isinstance(value, int | float | str) else str(value) for name, value in vars(args).items()
    }
    settings.pop("hub_token")
    settings.pop("webhook")  # its URL may be a secret
    named = {"name": args.tracker_run_name}
    accelerator.init_trackers(args.tracker_project_name, settings, {"wandb": named, "trackio": named})


class Progress:
    """Only the main process reports; to the others its methods do nothing."""

    def __init__(self, args, accelerator):
        init_trackers(args, accelerator)
        self.accelerator, self.folder, self.steps = (
            accelerator,
            Path(args.output_dir, "validation"),
            args.max_train_steps,
        )
        self.webhook = Webhook(args.webhook if accelerator.is_main_process else None)

    def values(self, values: dict, step: int):
        self.accelerator.log(values, step=step)
        self.webhook.send("progress", step=step, of=self.steps, **values)

    def picture(self, picture, name: str, step: int, level: str = "info"):
        show_picture(self.accelerator, picture, self.folder, name, step)
        self.webhook.send("picture", level, picture=picture, name=name, step=step)

    def end(self, step: int, stopped: bool):
        self.webhook.send("end", step=step, of=self.steps, stopped=stopped)
        if lost := self.webhook.close():
            self.accelerator.print(f"--webhook_config: {lost} messages were not delivered")
        if self.accelerator.num_processes > 1:
            # Of the last barrier a thread of gloo's still holds tensors, and needs the interpreter to drop them. Its
            # process group, which ends with the script's networks, would wait for that thread and not let go of it.
            time.sleep(1.0)
        self.accelerator.end_training()


LEVELS = ("debug", "info", "error")  # debug: also pictures of half-done samples; error: errors alone


DEFAULT = "debug"  # who asks for previews gets them


KEYS = ("webhook_url", "level")


MOST_WAITING = 32  # messages; what comes while so many wait is dropped


TIMEOUT = 5.0  # seconds, for one message, and for those that still wait at the end


def check_webhook(parser, path: str):
    """The settings, or one sentence about what is wrong with them."""
    try:
        config = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        parser.error(f"--webhook_config {path}: {error}")
    if not isinstance(config, dict) or not isinstance(config.get("webhook_url"), str):
        parser.error(f"--webhook_config {path}: must be a JSON object with a webhook_url")
    for key in config:
        if key not in KEYS:
            near = difflib.get_close_matches(key, KEYS, n=1)
            parser.error(
                f"--webhook_config {path}: unknown key {key!r}" + (f", did you mean {near[0]!r}?" * bool(near))
            )
    if not config["webhook_url"].startswith(("http://", "https://")):
        parser.error(f"--webhook_config {path}: webhook_url {config['webhook_url']!r} must be http:// or https://")
    if config.get("level", DEFAULT) not in LEVELS:
        parser.error(f"--webhook_config {path}: level is {config['level']!r}, and must be one of {', '.join(LEVELS)}")
    return config


class Webhook:
    """A thread of its own posts what `send` leaves in a queue. Without settings nothing is sent."""

    def __init__(self, config: dict | None):
        self.config, self.lost = config, 0
        if config:
            self.least = LEVELS.index(config.get("level", DEFAULT))
            self.waiting = queue.Queue(MOST_WAITING)
            threading.Thread(target=self.post_all, daemon=True).start()

    def send(self, kind: str, level: str = "info", picture=None, **values):
        if not self.config or LEVELS.index(level) < self.least:
            return
        try:
            self.waiting.put_nowait({"type": kind, "level": level, "time": time.time(), "picture": picture} | values)
        except queue.Full:
            self.lost += 1

    def post_all(self):
        while True:
            message = self.waiting.get()
            try:
                if message["picture"] is None:
                    del message["picture"]
                else:
                    file = io.BytesIO()
                    message["picture"].save(file, "png")
                    message["picture"] = base64.b64encode(file.getvalue()).decode()
                request = urllib.request.Request(
                    self.config["webhook_url"], json.dumps(message, default=str).encode(),
                    {"Content-Type": "application/json"},
                )  # fmt: skip
                urllib.request.urlopen(request, timeout=TIMEOUT).close()
            except Exception:  # whatever is wrong over there is no reason to stop here
                self.lost += 1
            finally:
                self.waiting.task_done()

    def close(self) -> int:
        """Waits a little for what is still to be sent. Returns the number of messages that were lost."""
        end = time.time() + TIMEOUT
        while self.config and self.waiting.unfinished_tasks and time.time() < end:
            time.sleep(0.01)
        return self.lost + (self.waiting.unfinished_tasks if self.config else 0)


def errors_to_webhook(main):
    """Of `main(args)`: what ends it before its time is posted, too."""

    @functools.wraps(main)
    def reporting(args):
        try:
            return main(args)
        except BaseException as error:  # also SystemExit, which carries a sentence for the user
            hook = Webhook(args.webhook)
            rank = int(os.environ.get("RANK", 0))
            hook.send("error", "error", message=f"{type(error).__name__}: {error}", process=rank)
            hook.close()
            raise

    return reporting
