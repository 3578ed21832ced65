"""A small world that code can draw, describe in words, and judge.

A scene is a coloured background with one or two objects, each with a shape, a colour, a size and a place. `draw_scene`
makes pixels, `caption` makes words, `read_caption` turns words back into attributes, and `read_image` (the oracle)
reads the same attributes from pixels. `adherence` is the share of images in which every attribute of every object is
the one that the caption asked for, with no object too many. `frechet_distance` says how far two sets of images are
apart.

Images are uint8 arrays [H, W, 3]. Coordinates are fractions of width and height, sizes are fractions of the shorter
side, so the same scene can be drawn at any aspect ratio.
"""

import functools
from dataclasses import dataclass

import numpy as np

SHAPES = ("circle", "square", "triangle", "cross")
COLOURS = {
    "red": (214, 40, 40),
    "green": (40, 160, 60),
    "blue": (40, 70, 200),
    "yellow": (240, 210, 40),
    "purple": (150, 50, 170),
    "cyan": (60, 200, 220),
    "white": (240, 240, 240),
    "black": (20, 20, 20),
}
SIZES = {"small": (0.10, 0.125), "large": (0.175, 0.20)}  # radius, as a fraction of the shorter side
SIZE_THRESHOLD = 0.15
PLACES = {
    "at the top left": (0.25, 0.25),
    "at the top": (0.50, 0.25),
    "at the top right": (0.75, 0.25),
    "on the left": (0.25, 0.50),
    "in the center": (0.50, 0.50),
    "on the right": (0.75, 0.50),
    "at the bottom left": (0.25, 0.75),
    "at the bottom": (0.50, 0.75),
    "at the bottom right": (0.75, 0.75),
}
PLACE_JITTER = 0.035
COLOUR_JITTER = 10.0
LEAST_PLACE_GAP = 0.5  # between two objects, so that large ones never touch

PALETTE = np.array(list(COLOURS.values()), dtype=np.float32)
COLOUR_NAMES = tuple(COLOURS)


@dataclass(frozen=True)
class Thing:
    shape: str
    colour: str
    size: str
    place: str


@dataclass(frozen=True)
class Scene:
    background: str
    things: tuple[Thing, ...]


def sample_scene(rng: np.random.Generator) -> Scene:
    """A scene with one (half of the time) or two objects, all colours different."""
    colours = [COLOUR_NAMES[i] for i in rng.permutation(len(COLOUR_NAMES))]
    places = [list(PLACES)[i] for i in rng.permutation(len(PLACES))]
    chosen = places[:1]
    if rng.random() < 0.5:
        x, y = PLACES[chosen[0]]
        far = [p for p in places[1:] if max(abs(PLACES[p][0] - x), abs(PLACES[p][1] - y)) >= LEAST_PLACE_GAP]
        chosen += far[:1]
    things = tuple(
        Thing(str(rng.choice(SHAPES)), colours[1 + i], str(rng.choice(list(SIZES))), place)
        for i, place in enumerate(chosen)
    )
    return Scene(colours[0], things)


def caption(scene: Scene) -> str:
    things = " and ".join(f"a {t.size} {t.colour} {t.shape} {t.place}" for t in scene.things)
    return f"{things} on a {scene.background} background"


def read_caption(text: str) -> Scene:
    """The inverse of `caption`."""
    body, background = text.removesuffix(" background").rsplit(" on a ", 1)
    things = []
    for phrase in body.split(" and "):
        _, size, colour, shape, place = phrase.split(" ", 4)
        things.append(Thing(shape, colour, size, place))
    return Scene(background, tuple(things))


def signed_distance(shape: str, dx: np.ndarray, dy: np.ndarray, radius: float) -> np.ndarray:
    """Distance to the outline in pixels (negative inside) of a shape with that radius, at offsets from its centre."""
    if shape == "circle":
        return np.hypot(dx, dy) - radius
    if shape == "square":
        return np.maximum(np.abs(dx), np.abs(dy)) - 0.9 * radius
    if shape == "triangle":  # upright: a base, and two sides of slope 2
        sides = (2.0 * np.abs(dx) - (dy + radius)) / np.sqrt(5.0)
        return np.maximum(sides, dy - 0.9 * radius)
    if shape == "cross":
        arm = 0.38 * radius
        across = np.maximum(np.abs(dx) - radius, np.abs(dy) - arm)
        along = np.maximum(np.abs(dx) - arm, np.abs(dy) - radius)
        return np.minimum(across, along)
    raise ValueError(f"no such shape: {shape}")


def draw_scene(scene: Scene, rng: np.random.Generator, height: int = 64, width: int = 64) -> np.ndarray:
    """Pixels of a scene. What the caption leaves open (exact place, size and hue) comes from `rng`."""
    side = min(height, width)
    y, x = np.mgrid[0:height, 0:width].astype(np.float32) + 0.5

    def paint(name):
        return np.asarray(COLOURS[name], dtype=np.float32) + rng.uniform(-COLOUR_JITTER, COLOUR_JITTER, 3)

    image = np.broadcast_to(paint(scene.background), (height, width, 3)).astype(np.float32)
    for thing in scene.things:
        centre = np.asarray(PLACES[thing.place]) + rng.uniform(-PLACE_JITTER, PLACE_JITTER, 2)
        radius = rng.uniform(*SIZES[thing.size]) * side
        distance = signed_distance(thing.shape, x - centre[0] * width, y - centre[1] * height, radius)
        cover = np.clip(0.5 - distance, 0.0, 1.0)[..., None]  # antialiased edge
        image = image * (1.0 - cover) + paint(thing.colour) * cover
    return np.clip(np.round(image), 0, 255).astype(np.uint8)


# ---------------------------------------------------------------------------------------------------------------------
# The oracle
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Found:
    """An object as measured: centre and radius in pixels."""

    shape: str
    colour: str
    radius: float
    x: float
    y: float


def find_things(image: np.ndarray) -> tuple[str, list[Found]] | None:
    """Background and objects of an image, or None where it shows no scene that this world has."""
    height, width = image.shape[:2]
    side = min(height, width)
    pixels = image.astype(np.float32)
    distance = np.linalg.norm(pixels[:, :, None] - PALETTE, axis=-1)  # [H, W, colours]
    label = distance.argmin(-1)

    border = np.concatenate([label[0], label[-1], label[:, 0], label[:, -1]])
    background = np.bincount(border, minlength=len(PALETTE)).argmax()
    if np.mean(border == background) < 0.9:
        return None

    # A colour is an object if it fills some 3x3 squares: blends along an edge never do.
    core = np.ones((height - 2, width - 2), dtype=bool)
    for dy in range(3):
        for dx in range(3):
            core &= label[dy : height - 2 + dy, dx : width - 2 + dx] == label[1:-1, 1:-1]
    filled = np.bincount(label[1:-1, 1:-1][core], minlength=len(PALETTE))
    least = 0.0025 * side * side
    colours = [c for c in range(len(PALETTE)) if c != background and filled[c] >= least]
    if not 1 <= len(colours) <= 2:
        return None

    y, x = np.mgrid[0:height, 0:width].astype(np.float32) + 0.5
    found = []
    for colour in colours:
        # Grow the solid core to the antialiased edge, where a pixel belongs to the nearer of object and background:
        # elsewhere such a blend can look like the colour of the other object.
        near = grown(grown(np.pad(core & (label[1:-1, 1:-1] == colour), 1)))
        mask = near & (distance[:, :, colour] < distance[:, :, background])
        area = mask.sum()
        cx, cy = x[mask].mean(), y[mask].mean()
        best = (0.0, None, 0.0)  # overlap, shape, radius
        for shape in SHAPES:
            unit_area, unit_cy = SHAPE_MOMENTS[shape]
            radius = np.sqrt(area / unit_area)
            ideal = signed_distance(shape, x - cx, y - (cy - unit_cy * radius), radius) < 0
            overlap = (mask & ideal).sum() / max((mask | ideal).sum(), 1)
            best = max(best, (overlap, shape, radius), key=lambda candidate: candidate[0])
        overlap, shape, radius = best
        if overlap < 0.75:
            return None
        found.append(Found(shape, COLOUR_NAMES[colour], radius, cx, cy - SHAPE_MOMENTS[shape][1] * radius))
    return COLOUR_NAMES[background], found


def read_image(image: np.ndarray) -> Scene | None:
    """The scene that an image shows, or None where it shows none that this world has."""
    seen = find_things(image)
    if seen is None:
        return None
    height, width = image.shape[:2]
    background, found = seen
    things = []
    for thing in found:
        centre = np.array([thing.x / width, thing.y / height])
        place = min(PLACES, key=lambda name: np.abs(np.asarray(PLACES[name]) - centre).max())
        size = "small" if thing.radius / min(height, width) < SIZE_THRESHOLD else "large"
        things.append(Thing(thing.shape, thing.colour, size, place))
    return Scene(background, tuple(things))


def grown(mask: np.ndarray) -> np.ndarray:
    """A mask and all pixels that touch it."""
    padded = np.pad(mask, 1)
    height, width = mask.shape
    return np.any([padded[dy : dy + height, dx : dx + width] for dy in range(3) for dx in range(3)], axis=0)


def shape_moments() -> dict[str, tuple[float, float]]:
    """Area and height of the centre of mass of each shape with radius 1."""
    y, x = np.mgrid[-1.2:1.2:600j, -1.2:1.2:600j]
    moments = {}
    for shape in SHAPES:
        inside = signed_distance(shape, x, y, 1.0) < 0
        moments[shape] = (inside.mean() * 2.4 * 2.4, y[inside].mean())
    return moments


SHAPE_MOMENTS = shape_moments()


def follows(image: np.ndarray, text: str) -> bool:
    """Whether an image shows exactly what the caption says."""
    seen, asked = read_image(image), read_caption(text)
    return seen is not None and seen.background == asked.background and set(seen.things) == set(asked.things)


def adherence(images: np.ndarray, captions: list[str]) -> float:
    return float(np.mean([follows(image, text) for image, text in zip(images, captions, strict=True)]))


# ---------------------------------------------------------------------------------------------------------------------
# Distance between two sets of images
# ---------------------------------------------------------------------------------------------------------------------

FEATURES = 64


def responses(images: np.ndarray) -> np.ndarray:
    """Random 5x5 filters at two scales, rectified, averaged over 4x4 cells: [N, 768]."""
    rng = np.random.RandomState(0)  # its stream is frozen for good
    filters = rng.randn(24, 5 * 5 * 3).astype(np.float32)
    filters[8:] -= filters[8:].mean(1, keepdims=True)  # most see edges, some see colour
    filters /= np.linalg.norm(filters, axis=1, keepdims=True)

    rows = []
    for image in images:
        x = image.astype(np.float32) / 127.5 - 1.0
        pooled = []
        for _ in range(2):
            windows = np.lib.stride_tricks.sliding_window_view(x, (5, 5), axis=(0, 1))  # [H-4, W-4, 3, 5, 5]
            response = np.maximum(windows.reshape(*windows.shape[:2], -1) @ filters.T, 0.0)
            for band in np.array_split(response, 4, axis=0):
                pooled += [cell.mean((0, 1)) for cell in np.array_split(band, 4, axis=1)]
            height, width = x.shape[0] // 2 * 2, x.shape[1] // 2 * 2
            x = x[:height, :width].reshape(height // 2, 2, width // 2, 2, 3).mean((1, 3))
        rows.append(np.concatenate(pooled))
    return np.stack(rows)


@functools.cache
def projection() -> tuple[np.ndarray, np.ndarray]:
    """Mean of the world's own responses, and a random map to few numbers, each response divided by its deviation."""
    rng = np.random.default_rng(0)
    x = responses(np.stack([draw_scene(sample_scene(rng), rng) for _ in range(2000)]))
    directions = np.random.RandomState(1).randn(x.shape[1], FEATURES) / np.sqrt(x.shape[1])
    return x.mean(0), directions / (x.std(0) + 1e-3)[:, None]


def features(images: np.ndarray) -> np.ndarray:
    """Fixed features [N, 64]: no response counts more than another."""
    mean, project = projection()
    return (responses(images) - mean) @ project


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """|mu_a - mu_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)) of two sets of feature rows (Heusel et al. 2017)."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    # tr (C_a C_b)^(1/2): sum of the roots of the eigenvalues of the symmetric product A^(1/2) B A^(1/2)
    values, vectors = np.linalg.eigh(cov_a)
    root_a = (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
    cross = np.sqrt(np.clip(np.linalg.eigvalsh(root_a @ cov_b @ root_a), 0, None)).sum()
    shift = a.mean(0) - b.mean(0)
    return float(shift @ shift + np.trace(cov_a) + np.trace(cov_b) - 2.0 * cross)
