"""The video world's oracle, its captions, and its Fréchet distance."""

import numpy as np
import pytest

from tests.toy import world
from tests.toy import world_video as video


def draw(seed: int, clips: list[video.Clip], **size) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.stack([video.draw_clip(clip, rng, **size) for clip in clips])


@pytest.mark.parametrize(
    "size",
    [
        pytest.param({}, marks=pytest.mark.slow),
        pytest.param({"frames": 49, "height": 48, "width": 64}, marks=pytest.mark.slow),
        {"frames": 17},
    ],
)
def test_the_oracle_reads_what_was_drawn(size):
    clips = video.all_clips()
    assert len(clips) == 224
    assert video.adherence(draw(3, clips, **size), [video.caption(clip) for clip in clips]) >= 0.99


def test_the_oracle_sees_every_attribute():
    for motion in video.MOTIONS:
        clip = video.Clip("square", "red", motion)
        (frames,) = draw(0, [clip])
        assert video.follows(frames, f"a red square {motion}")
        assert not video.follows(frames, f"a blue square {motion}")
        assert not video.follows(frames, f"a red circle {motion}")
        for other in video.MOTIONS:
            assert video.follows(frames, f"a red square {other}") == (other == motion)


@pytest.mark.slow
def test_motion_is_read_from_frames():
    """Backwards in time, left is right, growing is shrinking, and standing still is standing still."""
    opposite = {"moving left": "moving right", "moving up": "moving down", "growing": "shrinking"}
    opposite |= {after: before for before, after in opposite.items()} | {"standing still": "standing still"}
    for clip, frames in zip(video.all_clips(), draw(1, video.all_clips()), strict=True):
        assert video.read_video(frames[::-1]) == video.Clip(clip.shape, clip.colour, opposite[clip.motion])
        still = np.broadcast_to(frames[:1], frames.shape)
        assert video.read_video(still).motion == "standing still"


def test_what_is_no_clip_is_none():
    rng = np.random.default_rng(0)
    left, right, other = draw(2, [video.Clip("cross", "blue", m) for m in ("moving left", "moving right", "growing")])
    assert video.read_video(rng.integers(0, 256, left.shape).astype(np.uint8)) is None
    assert video.read_video(np.full_like(left, 200)) is None
    assert video.read_video(rng.permutation(left)) is None  # jumps about
    assert video.read_video(np.concatenate([left[:16], right[16:]])) is None  # cuts
    (green,) = draw(2, [video.Clip("cross", "green", "growing")])
    assert video.read_video(np.where(np.arange(33)[:, None, None, None] < 20, other, green)) is None
    faded = (0.5 * left + 0.5 * right).astype(np.uint8)
    assert video.read_video(faded) is None


def test_captions_read_back():
    for clip in video.all_clips():
        assert video.read_caption(video.caption(clip)) == clip


def test_one_caption_has_many_clips():
    """Background, place and speed are open."""
    clip = video.Clip("circle", "red", "moving left")
    frames = draw(5, [clip] * 64)
    backgrounds = {world.find_things(each[0])[0] for each in frames}
    assert backgrounds == set(world.COLOUR_NAMES) - {"red"}
    starts = np.array([[found.x, found.y] for each in frames for found in world.find_things(each[0])[1]])
    assert starts.std(0).min() > 0.3  # pixels: places differ by up to a 25th of the picture


@pytest.mark.slow
def test_distance_sees_pictures_and_motion():
    """Other clips of the same captions are near; dull, ghostly, frozen and slow ones, and those of few, are farther."""
    rng = np.random.default_rng(7)
    clips = [video.sample_clip(rng) for _ in range(256)]
    others = video.features(draw(8, clips))
    frames = draw(9, clips).astype(float)

    def distance(changed):
        return world.frechet_distance(video.features(changed.astype(np.uint8)), others)

    near = distance(frames)
    assert distance(0.7 * frames + 0.3 * draw(10, clips)) > 2 * near  # what too few steps look like
    assert distance(128 + 0.8 * (frames - 128)) > 2 * near
    assert distance(np.repeat(frames[:, :1], video.FRAMES, axis=1)) > 4 * near
    assert distance(frames[:, 8 + np.arange(video.FRAMES) // 2]) > 1.5 * near
    assert distance(np.resize(frames[:16], frames.shape)) > 1.5 * near
