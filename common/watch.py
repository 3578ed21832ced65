"""What is watched while a student trains: means of what the loop measures, clips on disk, and signs of collapse."""

from collections.abc import Iterable
from pathlib import Path

import av
import numpy as np
import torch
from PIL import Image

GAP_RANGES = ((0, 250), (250, 500), (500, 750), (750, 1000))  # timesteps
FRAMES_PER_SECOND = 16  # Wan's
# How far the student may be from its reference, as a ratio, and what it is a sign of otherwise.
COLLAPSE = {
    "diversity": (0.5, None, "all seeds give nearly the same clip"),
    "saturation": (0.5, 1.75, "colours have faded or are overdone"),
    "motion": (0.4, None, "clips stand still"),
}


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


def clip_statistics(clips: list[np.ndarray]) -> dict[str, float]:
    """Of clips [F, H, W, 3] in [0, 1] of one prompt and different seeds."""
    stacked = np.stack(clips)
    pairs = [(i, j) for i in range(len(clips)) for j in range(i)]
    return {
        "diversity": float(np.mean([np.abs(stacked[i] - stacked[j]).mean() for i, j in pairs])),
        "saturation": float((stacked.max(-1) - stacked.min(-1)).mean()),
        "motion": float(np.abs(np.diff(stacked, axis=1)).mean()) if stacked.shape[1] > 1 else 0.0,
    }


def signs_of_collapse(found: dict[str, float], reference: dict[str, float]) -> list[str]:
    """A sentence for each statistic that has left its range around the reference's."""
    signs = []
    for name, (low, high, meaning) in COLLAPSE.items():
        ratio = found[name] / max(reference[name], 1e-6)
        if ratio < low and reference[name] > 1e-3 or high is not None and ratio > high:
            signs.append(f"{name} is {ratio:.2f} of the reference's: {meaning}")
    return signs


def save_clip(clip: np.ndarray, path: Path):
    """[F, H, W, 3] in [0, 1], as an mp4."""
    save_frames(to_bytes(clip), path)


def save_frames(frames: Iterable[np.ndarray], path: Path):
    """[H, W, 3] each, bytes, as an mp4. Its sides are even: an odd one loses its last line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=FRAMES_PER_SECOND)
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            frame = np.ascontiguousarray(frame[: len(frame) // 2 * 2, : frame.shape[1] // 2 * 2])
            if not stream.codec_context.is_open:
                stream.height, stream.width = frame.shape[:2]
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))


def frame_strip(clip: np.ndarray, count: int = 4) -> Image.Image:
    """So many frames of a clip side by side, from its first to its last."""
    frames = [clip[i] for i in np.linspace(0, len(clip) - 1, min(count, len(clip))).round().astype(int)]
    return Image.fromarray(to_bytes(np.concatenate(frames, 1)))


def to_bytes(pixels: np.ndarray) -> np.ndarray:
    """Of pixels in [0, 1]; bytes stay what they are."""
    if pixels.dtype == np.uint8:
        return pixels
    return (pixels * 255.0).round().clip(0, 255).astype(np.uint8)
