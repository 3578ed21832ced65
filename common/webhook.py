"""Progress, pictures and errors as JSON to a URL of the user's, which can neither stop nor slow a run."""

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
