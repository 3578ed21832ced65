"""What is watched while a student trains."""

import av
import numpy as np
import pytest
import torch

from common.data.clips import save_clip
from common.pictures import frame_strip
from common.tracking import Means
from common.wan.report import clip_statistics, signs_of_collapse


class OneProcess:
    def reduce(self, tensor, how):
        assert how == "sum"
        return tensor


class TwoProcesses:
    """The other one has added 10 to a, and nothing to b."""

    def reduce(self, tensor, how):
        return tensor + torch.tensor([[10.0, 0.0, 0.0], [1.0, 0.0, 0.0]])


def test_means_are_of_what_was_added_since_the_last_read():
    means = Means(["a", "b", "c"], "cpu")
    for value in (1.0, 2.0, 6.0):
        means.add("a", torch.tensor(value, requires_grad=True))
    means.add("b", torch.tensor(5.0))
    assert means.read(OneProcess()) == {"a": 3.0, "b": 5.0}
    means.add("a", torch.tensor(4.0))
    assert means.read(TwoProcesses()) == {"a": 7.0}
    assert means.read(OneProcess()) == {}


def test_gaps_go_to_the_range_of_their_timestep():
    means = Means(["gap/0-250", "gap/250-500", "gap/500-750", "gap/750-1000"], "cpu")
    means.add_gaps(torch.tensor([1.0, 2.0, 3.0, 5.0, 8.0]), torch.tensor([20.0, 249.9, 250.0, 980.0, 1000.0]))
    assert means.read(OneProcess()) == {"gap/0-250": 1.5, "gap/250-500": 3.0, "gap/750-1000": 6.5}


def noise(seed: int, frames: int = 6) -> np.ndarray:
    return np.random.default_rng(seed).random((frames, 16, 16, 3), np.float32)


def test_statistics_of_clips():
    found = clip_statistics([noise(0), noise(1)])
    assert found["diversity"] == pytest.approx(1 / 3, abs=0.02)  # of two uniform numbers
    assert found["motion"] == pytest.approx(1 / 3, abs=0.02)
    assert found["saturation"] == pytest.approx(1 / 2, abs=0.02)  # of three: the largest minus the smallest
    assert clip_statistics([noise(0), noise(0)])["diversity"] == 0.0
    still = np.repeat(noise(0, 1), 6, 0)
    assert clip_statistics([still, still + 0.1])["motion"] == 0.0
    grey = np.repeat(noise(0)[..., :1], 3, -1)
    assert clip_statistics([grey, grey])["saturation"] == 0.0
    assert clip_statistics([noise(0, 1), noise(1, 1)])["motion"] == 0.0  # a picture


@pytest.mark.parametrize(
    "change, sign",
    [
        ({}, None), ({"diversity": 0.1}, "all seeds"), ({"motion": 0.02}, "stand still"),
        ({"saturation": 0.9}, "colours"), ({"saturation": 0.1}, "colours"), ({"diversity": 3.0, "motion": 3.0}, None),
    ],
)  # fmt: skip
def test_signs_of_collapse(change, sign):
    reference = {"diversity": 0.3, "motion": 0.1, "saturation": 0.4}
    signs = signs_of_collapse(reference | change, reference)
    assert len(signs) == (sign is not None) and all(sign in text for text in signs)


def test_a_teacher_that_stands_still_is_no_measure_of_motion():
    reference = {"diversity": 0.3, "motion": 0.0, "saturation": 0.4}
    assert signs_of_collapse(reference, reference) == []


def test_a_clip_on_disk_is_what_was_drawn(tmp_path):
    clip = np.zeros((5, 32, 48, 3), np.float32)
    clip[:, :16, :, 0] = np.linspace(0.2, 1.0, 5)[:, None, None]
    save_clip(clip, tmp_path / "folder" / "clip.mp4")
    with av.open(str(tmp_path / "folder" / "clip.mp4")) as container:
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]) / 255
    assert frames.shape == clip.shape and np.abs(frames[:, 4:12] - clip[:, 4:12]).mean() < 0.03
    strip = np.asarray(frame_strip(clip, 3)) / 255
    assert strip.shape == (32, 3 * 48, 3)
    assert strip[8, [24, 72, 120], 0] == pytest.approx([0.2, 0.6, 1.0], abs=0.01)
