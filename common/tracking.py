"""Progress of a run: means of what the loop measures, trackers, and the webhook."""

import base64
import contextlib
import functools
import importlib
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
from accelerate.tracking import get_available_trackers
from PIL import Image

from common.schema import Key, check_settings, read_json

GAP_RANGES = ((0, 250), (250, 500), (500, 750), (750, 1000))  # timesteps


class Means:
    """Means of values over all processes since the last read; adding a value does not wait for the device."""

    def __init__(self, names: list[str], device):
        self.names = {name: i for i, name in enumerate(names)}
        self.device = device
        self.reset()

    def reset(self):
        self.sums = torch.zeros(2, len(self.names), device=self.device)  # sums of values, and of their weights

    def add(self, name: str, value: torch.Tensor, weight: float = 1.0):
        self.sums[0, self.names[name]] += weight * value.detach()
        self.sums[1, self.names[name]] += weight

    def add_gaps(self, gap: torch.Tensor, t: torch.Tensor):
        """Adds each sample's gap to the mean of its range of timesteps; t is on the CPU."""
        for value, timestep in zip(gap, t.tolist(), strict=True):
            place = min(int(timestep) * len(GAP_RANGES) // GAP_RANGES[-1][1], len(GAP_RANGES) - 1)
            self.add(gap_name(GAP_RANGES[place]), value)

    def read(self, accelerator) -> dict[str, float]:
        """Means by name, of all names with a value since the last read; every process must call it."""
        sums, weights = accelerator.reduce(self.sums, "sum").tolist()
        self.reset()
        return {name: sums[i] / weights[i] for name, i in self.names.items() if weights[i]}


def gap_name(bounds: tuple[int, int]) -> str:
    return f"gap/{bounds[0]}-{bounds[1]}"


# ---------------------------------------------------------------------------------------------------------------------
# Trackers
# ---------------------------------------------------------------------------------------------------------------------

TRACKERS = {"tensorboard": "tensorboard==2.21.0", "wandb": "wandb==0.31.0", "trackio": "trackio"}  # name: package
SECRETS = ("hub_token",)
GIF_SIDE, GIF_MILLISECONDS = 256, 60  # longest side of a clip in TensorBoard, and the time of a frame


def public_settings(args) -> dict:
    """Flags for trackers and the model card, as given or filled in, without secrets. A file is shown by its path."""
    return {name: value for name, value in vars(args).items() if name not in SECRETS}


def installed(tracker: str) -> bool:
    """Whether the package is there, as accelerate says, and can be imported, as a folder `wandb` of old runs can."""
    try:
        return tracker in map(str, get_available_trackers()) and bool(importlib.import_module(tracker))
    except ImportError:
        return False


def tracker_names(report_to: str) -> list[str]:
    """Trackers that --report_to means, for accelerate's `log_with`; `all` means those that are installed."""
    names = [] if report_to == "none" else report_to.split(",")
    return [name for name in TRACKERS if installed(name)] if "all" in names else names


def check_trackers(parser, report_to: str):
    for name in tracker_names(report_to):
        if name not in TRACKERS:
            parser.error(f"--report_to {report_to}: must be of {', '.join(TRACKERS)}, all, or none")
        if not installed(name):
            parser.error(f"--report_to {report_to}: {name} is not installed: pip install {TRACKERS[name]}")
        if name == "wandb" and int(os.environ.get("RANK", 0)) == 0 and (reason := wandb_refuses()):
            parser.error(f"--report_to {report_to}: {reason}")


def wandb_refuses() -> str | None:
    """Why wandb would refuse a run, or ask for a key, once the caches are filled; None where it would not."""
    import wandb

    if wandb.setup().settings.mode not in ("online", "shared"):
        return None  # nobody logs in
    otherwise = "or set WANDB_MODE=offline, which keeps its files on this machine"
    try:
        return None if wandb.login(prompt=False) else f"wandb has no login: run `wandb login`, {otherwise}"
    except Exception as error:  # of the key, of the network: each has its own
        return f"wandb cannot log in ({str(error).splitlines()[0]}): run `wandb login --relogin`, {otherwise}"


class Tracking:
    """Reports of the main process to trackers, to the webhook, and to OUTPUT_DIR/validation."""

    def __init__(self, args, accelerator, steps: int):
        self.accelerator, self.steps = accelerator, steps
        self.folder = Path(args.output_dir, "validation")
        self.webhook = Webhook(args.webhook_config if accelerator.is_main_process else None)
        settings = {  # numbers and text are what all trackers take
            name: value if isinstance(value, int | float | str) else str(value)
            for name, value in public_settings(args).items()
        }
        named = {"name": args.tracker_run_name}
        accelerator.init_trackers(args.tracker_project_name, settings, {"wandb": named, "trackio": named})

    def values(self, values: dict, step: int):
        self.accelerator.log(values, step=step)
        self.webhook.send("progress", step=step, of=self.steps, **values)

    def picture(self, picture: Image.Image, name: str, step: int, level: str = "info"):
        """Saves OUTPUT_DIR/validation/NAME-STEP.png, and sends it to trackers and webhook."""
        if not self.accelerator.is_main_process:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        picture.save(self.folder / f"{name}-{step:06d}.png")
        for tracker in self.accelerator.trackers:
            if tracker.name == "tensorboard":
                tracker.writer.add_image(name, np.asarray(picture), step, dataformats="HWC")
            else:
                tracker.log({name: importlib.import_module(tracker.name).Image(picture)}, step=step)
        self.webhook.send("picture", level, picture=picture, name=name, step=step)

    def clip(self, frames: np.ndarray, path: Path, name: str, step: int):
        """Sends a clip [F, H, W, 3] in [0, 1], which is also the mp4 file `path`, to trackers."""
        if not self.accelerator.is_main_process:
            return
        for tracker in self.accelerator.trackers:
            if tracker.name == "tensorboard":
                tracker.writer.file_writer.add_summary(gif_summary(frames, name), step)
            else:
                tracker.log({name: importlib.import_module(tracker.name).Video(str(path))}, step=step)

    def end(self, step: int, stopped: bool):
        self.webhook.send("end", step=step, of=self.steps, stopped=stopped)
        if lost := self.webhook.close():
            self.accelerator.print(f"--webhook_config: {lost} messages were not delivered")
        if self.accelerator.num_processes > 1:
            # A thread of gloo's holds tensors of the last barrier for a moment, and needs the interpreter to drop them.
            # The end of the process group would wait for this thread without letting go of the interpreter.
            time.sleep(1.0)
        self.accelerator.end_training()


def gif_summary(frames: np.ndarray, name: str):
    """A clip as TensorBoard shows it, a moving GIF. SummaryWriter.add_video does the same, but needs moviepy."""
    from tensorboard.compat.proto.summary_pb2 import Summary

    pictures = [Image.fromarray((frame * 255.0).round().astype(np.uint8)) for frame in frames]
    for picture in pictures:
        picture.thumbnail((GIF_SIDE, GIF_SIDE))
    file, (width, height) = io.BytesIO(), pictures[0].size
    pictures[0].save(file, "gif", save_all=True, append_images=pictures[1:], duration=GIF_MILLISECONDS, loop=0)
    image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=file.getvalue())
    return Summary(value=[Summary.Value(tag=name, image=image)])


# ---------------------------------------------------------------------------------------------------------------------
# Webhook
# ---------------------------------------------------------------------------------------------------------------------

LEVELS = ("debug", "info", "error")  # debug: previews of half-done samples, too; error: errors alone
DEFAULT = "debug"  # a user who asks for previews gets them
WEBHOOK_KEYS = {"webhook_url": Key(str), "level": Key(LEVELS)}
MOST_WAITING = 32  # messages; a message that comes while so many wait is dropped
TIMEOUT = 5.0  # seconds for one message, and for all that still wait at the end


def read_webhook(path: str) -> dict:
    settings = read_json(Path(path))
    check_settings(settings, WEBHOOK_KEYS, path)
    if "webhook_url" not in settings:
        raise ValueError(f"{path}: has no webhook_url")
    if not settings["webhook_url"].startswith(("http://", "https://")):
        raise ValueError(f"{path}: webhook_url is {settings['webhook_url']!r}, and must be http:// or https://")
    return settings


def check_webhook(parser, path: str | None):
    try:
        read_webhook(path) if path else None
    except ValueError as error:
        parser.error(f"--webhook_config {error}")


class Webhook:
    """Posts messages to the URL of a settings file by a thread of its own. Without a file nothing is sent."""

    def __init__(self, path: str | None):
        self.settings, self.lost = read_webhook(path) if path else {}, 0
        self.waiting = queue.Queue(MOST_WAITING)
        if path:
            threading.Thread(target=self.post_all, daemon=True).start()

    def send(self, kind: str, level: str = "info", picture: Image.Image | None = None, **values):
        if not self.settings or LEVELS.index(level) < LEVELS.index(self.settings.get("level", DEFAULT)):
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
                    self.settings["webhook_url"], json.dumps(message, default=str).encode(),
                    {"Content-Type": "application/json"},
                )  # fmt: skip
                urllib.request.urlopen(request, timeout=TIMEOUT).close()
            except Exception:  # no fault of the other side is a reason to stop training
                self.lost += 1
            finally:
                self.waiting.task_done()

    def close(self) -> int:
        """Waits a little for messages that are still to be sent. Returns the number of messages that were lost."""
        end = time.time() + TIMEOUT
        while self.waiting.unfinished_tasks and time.time() < end:
            time.sleep(0.01)
        return self.lost + self.waiting.unfinished_tasks


def webhook_errors(main):
    """Decorates `main(args, ...)`: an error that ends it is posted to --webhook_config."""

    @functools.wraps(main)
    def reporting(args, *rest):
        try:
            return main(args, *rest)
        except BaseException as error:  # also SystemExit, which carries a sentence for the user
            with contextlib.suppress(ValueError):  # a settings file that is gone must not hide the error
                hook, rank = Webhook(args.webhook_config), int(os.environ.get("RANK", 0))
                hook.send("error", "error", message=f"{type(error).__name__}: {error}", process=rank)
                hook.close()
            raise

    return reporting
