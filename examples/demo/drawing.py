"""Pictures of scenes at any height and width, with anti-aliased edges.

Positions and radii are in units: a canvas of any aspect ratio has an area of 64 x 64 of them, so that the same places
at 64, 96 and 128 pixels give the same picture.
"""

from typing import NamedTuple

import numpy as np

from demo.scenes import BACKGROUNDS, COLORS, DIRECTIONS, MOST_ROOMY, SHAPES, Group, Scene

SIDE = 64.0  # units
MARGIN = 1.5
GAP = 2.2
SLACK = 4.0  # more than the gap between the objects of a group
JITTER = 2.0  # of groups across the line they stand in
INK = (25, 25, 25)  # of stripes, dots and outlines
RADII = {"small": (6.4, 7.8), "large": (10.4, 12.8)}
CROWDED_RADII = (6.4, 8.4)
SIZE_BORDER = 9.0  # a radius between small and large
STRIPE_PITCH, DOT_PITCH = 5.2, 6.4
STRIPE, DOT, OUTLINE = 1.15, 2.0, 1.7  # half width, radius, width

# The factors make all shapes of a radius look about equally large.
SQUARE, TRIANGLE, DIAMOND = 0.886, 1.45, 1.25  # half side, circumradius, half diagonal
STAR, STAR_INNER = 1.36, 0.58  # outer and inner radius
CROSS, CROSS_ARM = 1.1, 0.45  # half length and half width
AREAS = {
    "circle": np.pi,
    "square": 4 * SQUARE**2,
    "triangle": 0.75 * 3**0.5 * TRIANGLE**2,
    "diamond": 2 * DIAMOND**2,
    "star": 10 * 0.5 * STAR * STAR_INNER * np.sin(np.pi / 5),
    "cross": 8 * CROSS * CROSS_ARM - 4 * CROSS_ARM**2,
}
HALF_EXTENTS = {
    "circle": (1.0, 1.0),
    "square": (SQUARE, SQUARE),
    "triangle": (3**0.5 / 2 * TRIANGLE, 0.75 * TRIANGLE),
    "diamond": (DIAMOND, DIAMOND),
    "star": (STAR, STAR),
    "cross": (CROSS, CROSS),
}


class Place(NamedTuple):
    """Centre and radius of an object, in units."""

    x: float
    y: float
    radius: float


Places = tuple[tuple[Place, ...], ...]  # of the objects of each group


def picture(rng: np.random.Generator, scene: Scene, height: int, width: int) -> np.ndarray:
    """A random picture of a scene, uint8 `[height, width, 3]`."""
    return draw(scene, layout(rng, scene, width / height), height, width)


# ------------------------------------------------------------------------------------------------------------ layout


def layout(rng: np.random.Generator, scene: Scene, aspect: float) -> Places:
    """Random places that fit a scene's sizes and relation on a canvas of `aspect` (width by height)."""
    canvas = np.array([SIDE * aspect**0.5, SIDE / aspect**0.5])
    attempt = _scatter if len(scene.groups) == 1 else _line_up
    shrink = 1.0
    while True:
        radii = [shrink * _radius(rng, g, scene.count) for g in scene.groups]
        if (places := attempt(rng, scene, radii, canvas)) is not None:
            return places
        shrink *= 0.99


def _radius(rng: np.random.Generator, group: Group, count: int) -> float:
    if count > MOST_ROOMY:
        return rng.uniform(*CROWDED_RADII)
    return rng.uniform(*RADII[group.size or rng.choice(list(RADII))])


def _scatter(rng: np.random.Generator, scene: Scene, radii: list[float], canvas: np.ndarray) -> Places | None:
    """Objects of a single group anywhere, apart from each other."""
    (group,), (radius,) = scene.groups, radii
    extent = radius * np.array(HALF_EXTENTS[group.shape])
    for _ in range(20):
        centers = rng.uniform(MARGIN + extent, canvas - MARGIN - extent, (group.count, 2))
        apart = (np.abs(centers[:, None] - centers) > 2 * extent + GAP).any(-1)
        if apart[np.triu_indices(group.count, 1)].all():
            return (tuple(Place(float(x), float(y), radius) for x, y in centers),)
    return None


def _line_up(rng: np.random.Generator, scene: Scene, radii: list[float], canvas: np.ndarray) -> Places | None:
    """Groups side by side along the relation's axis, about level across it; a group's objects lie across the axis."""
    axis, side = DIRECTIONS[scene.relation]
    extents = np.array([r * np.array(HALF_EXTENTS[g.shape]) for g, r in zip(scene.groups, radii, strict=True)])
    along = _cut(rng, extents[:, axis], canvas[axis])
    pitches = 2 * extents[:, 1 - axis] + GAP + rng.uniform(0, SLACK, len(radii))
    counts = np.array([g.count for g in scene.groups])
    jitter = rng.uniform(-JITTER, JITTER, len(radii))
    reach = np.max((counts - 1) / 2 * pitches + extents[:, 1 - axis] + JITTER)
    if along is None or 2 * (reach + MARGIN) > canvas[1 - axis]:
        return None
    level = rng.uniform(MARGIN + reach, canvas[1 - axis] - MARGIN - reach)
    places = []
    for i, radius in enumerate(radii):
        x = along[i] if side < 0 else canvas[axis] - along[i]
        across = level + jitter[i] + pitches[i] * (np.arange(counts[i]) - (counts[i] - 1) / 2)
        places.append(tuple(Place(*map(float, (x, y) if axis == 0 else (y, x)), radius) for y in across))
    return tuple(places)


def _cut(rng: np.random.Generator, extents: np.ndarray, length: float) -> np.ndarray | None:
    """Centres of things of the given half extents in a row; the free space goes at random before and between them."""
    free = length - 2 * MARGIN - GAP * (len(extents) - 1) - 2 * extents.sum()
    if free < 0:
        return None
    before = np.sort(rng.uniform(0, free, len(extents)))
    return MARGIN + before + GAP * np.arange(len(extents)) + 2 * np.cumsum(extents) - extents


# ----------------------------------------------------------------------------------------------------------- drawing


def draw(scene: Scene, places: Places, height: int, width: int) -> np.ndarray:
    """The picture of a scene with objects at `places`, uint8 `[height, width, 3]`."""
    scale = unit(height, width)
    image = np.full((height, width, 3), BACKGROUNDS[scene.background], np.float32)
    for group, members in zip(scene.groups, places, strict=True):
        for place in members:
            rows, columns = _box(group.shape, place, scale, height, width)
            y, x = np.mgrid[rows, columns].astype(np.float32)
            x, y = (x + 0.5) / scale - place.x, (y + 0.5) / scale - place.y
            distance = signed_distance(group.shape, x, y, place.radius)
            alpha = np.clip(0.5 - scale * distance, 0, 1)[..., None]
            ink = np.clip(0.5 - scale * ink_distance(group.texture, x, y, distance), 0, 1)[..., None]
            paint = np.float32(COLORS[group.color]) * (1 - ink) + np.float32(INK) * ink
            image[rows, columns] += alpha * (paint - image[rows, columns])
    return np.round(image).astype(np.uint8)


def covered(scene: Scene, places: Places, height: int, width: int, cell: int) -> np.ndarray:
    """The shape that reaches furthest into each square cell, uint8 `[height / cell, width / cell]`.

    0 is none, and any other number one more than the shape's place in `SHAPES`.
    """
    scale = unit(height, width)
    y, x = (np.mgrid[: height // cell, : width // cell] + 0.5) * cell / scale
    nearest = np.full(x.shape, cell / 2 / scale)  # from a cell's centre to its border
    found = np.zeros(x.shape, np.uint8)
    for group, members in zip(scene.groups, places, strict=True):
        for place in members:
            distance = signed_distance(group.shape, x - place.x, y - place.y, place.radius)
            nearer = distance < nearest
            found[nearer], nearest = 1 + SHAPES.index(group.shape), np.where(nearer, distance, nearest)
    return found


def unit(height: int, width: int) -> float:
    """Pixels a unit."""
    return (height * width) ** 0.5 / SIDE


def signed_distance(shape: str, x: np.ndarray, y: np.ndarray, radius: float) -> np.ndarray:
    """Distance to the edge of a shape centred on the origin, negative inside; y points down."""
    if shape == "circle":
        return np.hypot(x, y) - radius
    if shape == "square":
        return np.maximum(np.abs(x), np.abs(y)) - SQUARE * radius
    if shape == "diamond":
        return (np.abs(x) + np.abs(y) - DIAMOND * radius) / 2**0.5
    if shape == "triangle":
        y = y - TRIANGLE * radius / 4
        return np.maximum(y, 3**0.5 / 2 * np.abs(x) - y / 2) - TRIANGLE * radius / 2
    if shape == "cross":
        long, short = np.maximum(np.abs(x), np.abs(y)), np.minimum(np.abs(x), np.abs(y))
        return np.maximum(long - CROSS * radius, short - CROSS_ARM * radius)
    # A star: folded onto the edge between one outer and one inner corner.
    angle = np.abs((np.arctan2(x, -y) + np.pi / 5) % (2 * np.pi / 5) - np.pi / 5)
    distance = np.hypot(x, y)
    outer, inner = STAR * radius, STAR_INNER * radius * np.array([np.cos(np.pi / 5), np.sin(np.pi / 5)])
    normal = np.array([inner[1], outer - inner[0]])
    normal /= np.hypot(*normal)
    return (distance * np.cos(angle) - outer) * normal[0] + distance * np.sin(angle) * normal[1]


def ink_distance(texture: str, x: np.ndarray, y: np.ndarray, distance: np.ndarray) -> np.ndarray:
    """Distance to the edge of the ink of a texture, negative in the ink; `distance` is the one to the shape's edge."""
    if texture == "solid":
        return np.full_like(x, np.inf)
    if texture == "outlined":
        return -distance - OUTLINE
    if texture == "striped":
        return np.abs(y % STRIPE_PITCH - STRIPE_PITCH / 2) - STRIPE
    return np.hypot(*(np.abs(along % DOT_PITCH - DOT_PITCH / 2) for along in (x, y))) - DOT


def _box(shape: str, place: Place, scale: float, height: int, width: int) -> tuple[slice, slice]:
    """Rows and columns of the pixels that an object may touch."""
    reach = place.radius * np.array(HALF_EXTENTS[shape])[::-1] + 1
    center = np.array([place.y, place.x])
    start = np.maximum(0, np.floor(scale * (center - reach))).astype(int)
    stop = np.minimum((height, width), np.ceil(scale * (center + reach))).astype(int)
    return slice(start[0], stop[0]), slice(start[1], stop[1])
