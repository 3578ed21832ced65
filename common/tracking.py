"""Progress of a run: means of what the loop measures, trackers, and the webhook."""

import base64
import contextlib
import functools
import importlib
import io
import json
import os
import queue
import ssl
import threading
import time
import urllib.error
import urllib.request
import uuid
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate.tracking import get_available_trackers
from PIL import Image

from common.data.shards import hide_secrets
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
    return {
        name: public_word(value) if isinstance(value, str) else value
        for name, value in vars(args).items()
        if name not in SECRETS
    }


def public_word(word: str) -> str:
    """A word of the command line without what opens the URLs, and the commands of pipe:, that are in it."""
    return hide_secrets(word) if "://" in word or "pipe:" in word.lower() else word


def installed(tracker: str) -> bool:
    """Whether the package is installed, and can be imported. A folder `wandb` of old runs can be imported, too."""
    try:
        return tracker in map(str, get_available_trackers()) and bool(importlib.import_module(tracker))
    except ImportError:
        return False


def tracker_names(report_to: str) -> list[str]:
    """Trackers that --report_to means, for accelerate's `log_with`; `all` means those that are ready for use."""
    names = [] if report_to == "none" else report_to.split(",")
    if "all" in names:
        return [name for name in TRACKERS if installed(name) and not (name == "wandb" and wandb_refuses())]
    return names


def check_trackers(parser, report_to: str) -> list[str]:
    """Ends with an error where a tracker that is named cannot be used. Returns notes on what `all` leaves out."""
    for name in tracker_names(report_to):
        if name not in TRACKERS:
            parser.error(f"--report_to {report_to}: must be of {', '.join(TRACKERS)}, all, or none")
        if not installed(name):
            parser.error(f"--report_to {report_to}: {name} is not installed: pip install {TRACKERS[name]}")
        if name == "wandb" and (reason := wandb_refuses()):
            parser.error(f"--report_to {report_to}: {reason}")
    if "all" in report_to.split(",") and installed("wandb") and (reason := wandb_refuses()):
        return [f"--report_to {report_to}: without wandb: {reason}"]
    return []


@functools.cache
def wandb_refuses() -> str | None:
    """Why wandb would refuse a run, or ask for a key, once the caches are filled; None where it would not."""
    import wandb

    if int(os.environ.get("RANK", 0)) > 0:
        return None  # the first process reports
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
        by_wandb = named | {"settings": {"x_disable_meta": True}}  # which has the command line, with a token in it
        accelerator.init_trackers(args.tracker_project_name, settings, {"wandb": by_wandb, "trackio": named})

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
        """Sends a clip [F, H, W, 3] in bytes, which is also the mp4 file `path`, to trackers."""
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

    pictures = [Image.fromarray(frame) for frame in frames]
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
LEVEL_OF_NAME = {"warning": "error", "critical": "error"}  # SimpleTuner's levels that are none of ours
WEBHOOK_KEYS = {
    "webhook_url": Key(str), "callback_url": Key(str), "webhook_type": Key(("discord", "raw")), "level": Key(LEVELS),
    "log_level": Key((*LEVELS, *LEVEL_OF_NAME)), "message_prefix": Key(str), "auth_token": Key(str),
    "ssl_no_verify": Key(bool),
}  # fmt: skip
DISCORD = ("https://discord.com/api/webhooks/", "https://discordapp.com/api/webhooks/")
MOST_TEXT, MOST_PICTURE = 2000, 8 << 20  # letters and bytes that Discord takes
MOST_WAITING = 32  # messages; a message that comes while so many wait is dropped
TIMEOUT = 5.0  # seconds for one message, and for all that still wait at the end


@dataclass(frozen=True)
class Address:
    """Where messages go, and how: as our own JSON, or as Discord has them."""

    url: str
    discord: bool
    level: str
    prefix: str
    headers: dict[str, str]
    ssl: ssl.SSLContext | None

    def wants(self, message: dict) -> bool:
        """Whether a message goes there. Progress does not go to Discord, which takes few messages a minute."""
        loud = LEVELS.index(message["level"]) >= LEVELS.index(self.level)
        return loud and not (self.discord and message["type"] == "progress")


def read_webhook(path: str) -> list[Address]:
    settings = read_json(Path(path), (dict, list))
    return [read_address(each, path) for each in (settings if isinstance(settings, list) else [settings])]


def read_address(settings: dict, path: str) -> Address:
    if not isinstance(settings, dict):
        raise ValueError(f"{path}: {settings!r}: must be an object with webhook_url")
    settings = {key: value for key, value in settings.items() if value is not None}
    check_settings(settings, WEBHOOK_KEYS, path)
    for one, other in (("webhook_url", "callback_url"), ("level", "log_level")):
        if one in settings and other in settings:
            raise ValueError(f"{path}: {one} and {other}: one or the other")
    key = "callback_url" if "callback_url" in settings else "webhook_url"
    if key not in settings:
        raise ValueError(f"{path}: has no webhook_url")
    url = settings[key]
    level = settings.get("log_level", settings.get("level", "debug"))  # a user who asks for previews gets them
    if not url.startswith(("http://", "https://")):
        raise ValueError(f"{path}: {key} is {url!r}, and must be http:// or https://")
    discord = settings.get("webhook_type", "discord" if url.startswith(DISCORD) else "raw") == "discord"
    prefix = f"`({settings['message_prefix']})` " if "message_prefix" in settings else ""
    headers = {"User-Agent": "distillation"}  # Discord turns Python's own away
    headers |= {"X-API-Key": settings["auth_token"]} if "auth_token" in settings else {}
    unchecked = None
    if settings.get("ssl_no_verify"):
        unchecked = ssl.create_default_context()
        unchecked.check_hostname, unchecked.verify_mode = False, ssl.CERT_NONE
    return Address(url, discord, LEVEL_OF_NAME.get(level, level), prefix, headers, unchecked)


def check_webhook(parser, path: str | None):
    try:
        read_webhook(path) if path else None
    except ValueError as error:
        parser.error(f"--webhook_config {error}")


def json_request(message: dict) -> tuple[bytes, str]:
    """Body and type of a message in our own layout."""
    picture = message["picture"]
    encoded = {} if picture is None else {"picture": base64.b64encode(png(picture)).decode()}
    rest = {key: value for key, value in message.items() if key != "picture"}
    return json.dumps(rest | encoded, default=str).encode(), "application/json"


def discord_request(message: dict, prefix: str) -> tuple[bytes, str]:
    """Body and type of a message to Discord: text, and a picture as a file of a form."""
    told = {
        "picture": "{name}, step {step}", "error": "process {process}: {message}",
        "end": "stopped at step {step} of {of}" if message.get("stopped") else "finished {step} steps of {of}",
    }  # fmt: skip
    text = (prefix + told[message["type"]].format(**message))[:MOST_TEXT]
    content = json.dumps({"content": text, "allowed_mentions": {"parse": []}}).encode()
    if message["picture"] is None:
        return content, "application/json"
    picture, boundary = message["picture"], uuid.uuid4().hex
    while len(file := png(picture)) > MOST_PICTURE:
        picture = picture.reduce(2)
    head = f"--{boundary}\r\nContent-Disposition: form-data; name=".encode()
    return b"".join([
        head, b'"payload_json"\r\nContent-Type: application/json\r\n\r\n', content, b"\r\n",
        head, b'"files[0]"; filename="picture.png"\r\nContent-Type: image/png\r\n\r\n', file, b"\r\n",
        f"--{boundary}--\r\n".encode(),
    ]), f"multipart/form-data; boundary={boundary}"  # fmt: skip


def png(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, "png")
    return file.getvalue()


class NoRedirects(urllib.request.HTTPRedirectHandler):
    """Makes an error of a redirect, which would take the headers, and in them the token, to another host."""

    def redirect_request(self, *_):
        return None


class Hook:
    """Posts messages to one address by a thread of its own."""

    def __init__(self, address: Address):
        self.address, self.lost = address, 0
        self.opener = urllib.request.build_opener(NoRedirects, urllib.request.HTTPSHandler(context=address.ssl))
        self.waiting = queue.Queue(MOST_WAITING)
        threading.Thread(target=self.post_all, daemon=True).start()

    def put(self, message: dict):
        try:
            self.waiting.put_nowait(message)
        except queue.Full:
            self.lost += 1

    def post_all(self):
        while True:
            message = self.waiting.get()
            try:
                self.post(message)
            except Exception:  # no fault of the other side is a reason to stop training
                self.lost += 1
            finally:
                self.waiting.task_done()

    def post(self, message: dict):
        address = self.address
        body, kind = discord_request(message, address.prefix) if address.discord else json_request(message)
        request = urllib.request.Request(address.url, body, address.headers | {"Content-Type": kind})
        try:
            self.opener.open(request, timeout=TIMEOUT).close()
        except urllib.error.HTTPError as error:
            pause = float(error.headers.get("Retry-After", "inf"))
            if error.code != 429 or pause > TIMEOUT:
                raise
            time.sleep(pause)  # too many messages: once more
            self.opener.open(request, timeout=TIMEOUT).close()


class Webhook:
    """Posts messages to the addresses of a settings file. Without a file nothing is sent."""

    def __init__(self, path: str | None):
        self.hooks = [Hook(address) for address in (read_webhook(path) if path else [])]

    def send(self, kind: str, level: str = "info", picture: Image.Image | None = None, **values):
        message = {"type": kind, "level": level, "time": time.time(), "picture": picture} | values
        for hook in self.hooks:
            if hook.address.wants(message):
                hook.put(message)

    def close(self) -> int:
        """Waits a little for messages that are still to be sent. Returns the number of messages that were lost."""
        end = time.time() + TIMEOUT
        while any(hook.waiting.unfinished_tasks for hook in self.hooks) and time.time() < end:
            time.sleep(0.01)
        return sum(hook.lost + hook.waiting.unfinished_tasks for hook in self.hooks)


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
