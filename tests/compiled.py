"""Graphs of a run with --compile, counted: a backend that runs them as they are, without a C++ compiler."""

import logging

import torch
import torch._dynamo
from torch._dynamo.utils import counters

REAL_SD = {  # Stable Diffusion 1.5's blocks, of other widths
    "down_block_types": (*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"),
    "up_block_types": ("UpBlock2D", *["CrossAttnUpBlock2D"] * 3),
    "block_out_channels": (8, 16, 32, 32),
    "layers_per_block": 2,
}
REAL_SDXL = {
    "down_block_types": ("DownBlock2D", *["CrossAttnDownBlock2D"] * 2),
    "up_block_types": (*["CrossAttnUpBlock2D"] * 2, "UpBlock2D"),
    "block_out_channels": (8, 16, 32),
    "layers_per_block": 2,
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (1, 2, 4),
    "use_linear_projection": True,
}


class Graphs:
    """Counts graphs, and at each `mark` notes how many there are by then."""

    def __init__(self, monkeypatch):
        self.forget()
        self.count, self.marks = 0, []
        compiled = torch.nn.Module.compile
        monkeypatch.setattr(
            torch.nn.Module, "compile", lambda block, **options: compiled(block, backend=self, **options)
        )

    def __call__(self, graph, inputs):
        self.count += 1
        return graph.forward

    def forget(self):
        torch._dynamo.reset()
        counters.clear()
        logging.getLogger("torch._dynamo.convert_frame").filters.clear()

    def mark(self, what):
        """Notes that something is done: a step on some shape, or pictures of a network."""
        self.marks.append((what, self.count))

    def mark_calls(self, monkeypatch, module, name: str, what):
        """Marks each call of a module's function by what(*arguments) when it has returned."""
        original = getattr(module, name)

        def marked(*arguments, **options):
            result = original(*arguments, **options)
            self.mark(what(*arguments))
            return result

        monkeypatch.setattr(module, name, marked)

    def check(self):
        """Nothing fell back to eager, and only what was done for the first time made graphs."""
        assert not counters["graph_break"] and not counters["unimplemented"]
        assert counters["frames"]["ok"] == counters["frames"]["total"] == self.count
        before, seen = 0, set()
        for what, count in self.marks:
            assert count == before or what not in seen, f"{count - before} graphs more at a later {what}"
            before = count
            seen.add(what)
        return seen
