"""Numbers and pictures of a run, to trackers, disk and webhook alike."""

import time
from pathlib import Path

from common.validation import init_trackers, show_picture
from common.webhook import Webhook


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
