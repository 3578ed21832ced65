"""The toy world in motion: clips that code can draw, describe in words, and judge.

A clip is one object of `world`, on a coloured background, that moves, grows, shrinks or stands still. `draw_clip` makes
frames, `caption` makes words, `read_caption` turns words back into attributes, and `read_video` (the oracle) reads the
same attributes from frames, the motion from where the object is and how large. `adherence` is the share of clips that
show what their captions ask for. `features` feed `world.frechet_distance`.

The caption names shape, colour and motion. Background, place, speed and size it leaves open, so that one caption has
many clips, and a sampler that takes too few steps shows a mixture of them. Of the last three it leaves little open:
with twice as much and more, a small teacher drew triangles and crosses away from the middle too roughly to be read.

Videos are uint8 arrays [F, H, W, 3].
"""

import functools
from dataclasses import dataclass

import numpy as np

from tests.toy import world

FRAMES, SIDE = 33, 32
RADIUS = (0.245, 0.255)  # as a fraction of the shorter side
TRAVEL = (0.26, 0.28)  # of an object that moves, from the first to the last frame, as a fraction of the shorter side
GROWTH = (1.55, 1.6)  # of an object that grows: last radius / first radius
PLACE_JITTER = 0.02  # between the middle of an object's way and the picture's, as a fraction of width and height

DIRECTIONS = {"moving left": (-1, 0), "moving right": (1, 0), "moving up": (0, -1), "moving down": (0, 1)}
MOTIONS = (*DIRECTIONS, "growing", "shrinking", "standing still")

LEAST_TRAVEL = TRAVEL[0] / 2  # the oracle's thresholds
LEAST_GROWTH = GROWTH[0] ** 0.5
MOST_UNSTEADY = 0.04  # root of the mean squared distance between the object and its straight way


@dataclass(frozen=True)
class Clip:
    shape: str
    colour: str
    motion: str


def all_clips() -> list[Clip]:
    return [Clip(s, c, m) for s in world.SHAPES for c in world.COLOUR_NAMES for m in MOTIONS]


def sample_clip(rng: np.random.Generator) -> Clip:
    return Clip(*(str(rng.choice(kind)) for kind in (world.SHAPES, world.COLOUR_NAMES, MOTIONS)))


def caption(clip: Clip) -> str:
    return f"a {clip.colour} {clip.shape} {clip.motion}"


def read_caption(text: str) -> Clip:
    """The inverse of `caption`."""
    _, colour, shape, motion = text.split(" ", 3)
    return Clip(shape, colour, motion)


def draw_clip(clip: Clip, rng: np.random.Generator, frames: int = FRAMES, height: int = SIDE, width: int = SIDE):
    """Frames of a clip. What the caption leaves open (background, place, speed, size, hue) comes from `rng`."""
    side, jitter = min(height, width), world.COLOUR_JITTER

    def paint(name):
        return np.asarray(world.COLOURS[name], dtype=np.float32) + rng.uniform(-jitter, jitter, 3).astype(np.float32)

    background = paint(rng.choice([name for name in world.COLOUR_NAMES if name != clip.colour]))
    colour = paint(clip.colour)
    time = np.linspace(0.0, 1.0, frames, dtype=np.float32)
    radius = rng.uniform(*RADIUS) * side
    if clip.motion in ("growing", "shrinking"):
        growth = rng.uniform(*GROWTH)
        radius = radius * growth ** (time - 0.5 if clip.motion == "growing" else 0.5 - time)
    radius = np.broadcast_to(np.float32(radius), (frames,))
    travel = np.asarray(DIRECTIONS.get(clip.motion, (0, 0)), dtype=np.float32) * rng.uniform(*TRAVEL) * side
    middle = (0.5 + rng.uniform(-PLACE_JITTER, PLACE_JITTER, 2)) * (width, height)
    centre = (middle + (time[:, None] - 0.5) * travel).astype(np.float32)  # [F, 2]

    y, x = np.mgrid[0:height, 0:width].astype(np.float32) + 0.5
    dx, dy = x - centre[:, 0, None, None], y - centre[:, 1, None, None]  # [F, H, W]
    distance = world.signed_distance(clip.shape, dx, dy, radius[:, None, None])
    cover = np.clip(0.5 - distance, 0.0, 1.0)[..., None]  # antialiased edge
    return np.clip(np.round(background * (1.0 - cover) + colour * cover), 0, 255).astype(np.uint8)


# ---------------------------------------------------------------------------------------------------------------------
# The oracle
# ---------------------------------------------------------------------------------------------------------------------


def read_video(video: np.ndarray) -> Clip | None:
    """The clip that frames show, or None where they show none that this world has.

    Every fourth frame must show one object, all of one colour on one background, and most of one shape.
    """
    frames = video[::4]
    side = min(video.shape[1:3])
    seen = [world.find_things(frame) for frame in frames]
    if any(each is None or len(each[1]) != 1 for each in seen):
        return None
    things = [found[0] for _, found in seen]
    if len({background for background, _ in seen}) > 1 or len({thing.colour for thing in things}) > 1:
        return None
    shapes = [thing.shape for thing in things]
    shape = max(set(shapes), key=shapes.count)
    if shapes.count(shape) < 0.75 * len(shapes):
        return None
    motion = read_motion(np.array([[thing.x, thing.y, thing.radius] for thing in things]) / side)
    return Clip(shape, things[0].colour, motion) if motion else None


def read_motion(way: np.ndarray) -> str | None:
    """The motion of an object whose x, y and radius [F, 3] are fractions of the shorter side."""
    if way[:, 2].min() <= 0:
        return None
    way = np.column_stack([way[:, :2], np.log(way[:, 2])])
    time = np.linspace(-0.5, 0.5, len(way))
    change = time @ way / (time @ time)  # least squares: of x, y and log radius, from the first to the last frame
    unsteady = way[:, :2] - way[:, :2].mean(0) - time[:, None] * change[:2]
    if np.sqrt(np.square(unsteady).sum(1).mean()) > MOST_UNSTEADY:
        return None
    moves = [name for name, direction in DIRECTIONS.items() if np.dot(direction, change[:2]) > LEAST_TRAVEL]
    if abs(change[2]) > np.log(LEAST_GROWTH):
        moves.append("growing" if change[2] > 0 else "shrinking")
    return (moves or ["standing still"])[0] if len(moves) <= 1 else None


def follows(video: np.ndarray, text: str) -> bool:
    """Whether a clip shows exactly what the caption says."""
    return read_video(video) == read_caption(text)


def adherence(videos: np.ndarray, captions: list[str]) -> float:
    return float(np.mean([follows(video, text) for video, text in zip(videos, captions, strict=True)]))


# ---------------------------------------------------------------------------------------------------------------------
# Distance between two sets of clips
# ---------------------------------------------------------------------------------------------------------------------


FEATURES = 16  # few: two sets of 256 clips of the world are apart by chance, and by the square of this number


def responses(videos: np.ndarray) -> np.ndarray:
    """`world.responses` to three frames and, for the motion, to the two differences between them: [N, 5 * 768]."""
    frames = videos[:, [0, videos.shape[1] // 2, -1]].astype(np.float32)
    changes = 127.5 + frames[:, 1:] - frames[:, :-1]
    pictures = np.concatenate([frames, changes], axis=1)
    return world.responses(pictures.reshape(-1, *pictures.shape[2:])).reshape(len(videos), -1)


@functools.cache
def projection() -> tuple[np.ndarray, np.ndarray]:
    """As `world.projection`, of the clips of this world."""
    rng = np.random.default_rng(0)
    x = responses(np.stack([draw_clip(sample_clip(rng), rng) for _ in range(2000)]))
    directions = np.random.RandomState(1).randn(x.shape[1], FEATURES) / np.sqrt(x.shape[1])
    return x.mean(0), directions / (x.std(0) + 1e-3)[:, None]


def features(videos: np.ndarray) -> np.ndarray:
    """Fixed features [N, 16]: no response counts more than another."""
    mean, project = projection()
    return (responses(videos) - mean) @ project
