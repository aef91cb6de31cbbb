"""Procedural scenes: one to three coloured shapes on a plain background, their captions, and a judge of images.

A scene is sampled, captioned in plain English and drawn at 64x64 with anti-aliased edges. `verify` judges any image
against a scene from its pixels alone: background, colours, shapes, sizes, relations.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from scipy import ndimage

SIZE = 64
MARGIN = 2.0
GAP = 2.5

COLORS = {
    "red": (220, 40, 40),
    "green": (40, 165, 60),
    "blue": (40, 80, 220),
    "yellow": (245, 215, 40),
    "purple": (140, 50, 180),
    "orange": (245, 130, 25),
}
BACKGROUNDS = {
    "white": (245, 245, 245),
    "black": (20, 20, 20),
    "gray": (128, 128, 128),
    "pink": (250, 180, 205),
    "cyan": (130, 225, 235),
}
SHAPES = ("circle", "square", "triangle", "diamond")
RADII = {"small": (6.0, 7.5), "large": (10.0, 12.5)}
INSIDE_RADII = ((6.0, 6.8), (14.0, 16.0))
SIZE_BORDER = 8.7  # a radius between small and large

# Relation of an object to the next one: the axis it is laid out along and the side the object is on.
DIRECTIONS = {"left of": (0, -1), "right of": (0, 1), "above": (1, -1), "below": (1, 1)}
RELATIONS = (*DIRECTIONS, "inside")
WORDINGS = {
    "left of": ("left of", "to the left of"),
    "right of": ("right of", "to the right of"),
    "below": ("below", "under"),
}
CHAINS = {
    "left of": "from left to right",
    "right of": "from right to left",
    "above": "from top to bottom",
    "below": "from bottom to top",
}
TEMPLATES = (
    "{content} on a {background} background",
    "{content} on {background}",
    "a {background} background with {content}",
    "a picture of {content} on a {background} background",
    "{content}, {background} background",
)

# Never drawn in training, although each colour and each shape is.
HELD_OUT = frozenset({("purple", "triangle"), ("green", "diamond"), ("orange", "square"), ("yellow", "circle")})


@dataclasses.dataclass(frozen=True)
class Object:
    """A shape; `size` is what its caption says ("" for nothing), `radius` is what is drawn."""

    color: str
    shape: str
    size: str = ""
    x: float = SIZE / 2
    y: float = SIZE / 2
    radius: float = 10.0


@dataclasses.dataclass(frozen=True)
class Scene:
    """Objects on a background; each object stands in `relation` to the next one ("" for a single object)."""

    background: str
    objects: tuple[Object, ...]
    relation: str = ""


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Outcome of every check, by name."""

    checks: dict[str, bool]

    @property
    def fraction(self) -> float:
        return sum(self.checks.values()) / len(self.checks)

    @property
    def correct(self) -> bool:
        return all(self.checks.values())


# ---------------------------------------------------------------------------------------------------------- sampling


def sample(rng: np.random.Generator, held_out: bool = False) -> Scene:
    """A random scene: without any held-out combination of colour and shape, or with at least one."""
    count = int(rng.choice([1, 2, 3], p=[0.3, 0.5, 0.2]))
    relation = "" if count == 1 else str(rng.choice(RELATIONS if count == 2 else list(DIRECTIONS)))
    background = str(rng.choice(list(BACKGROUNDS)))
    while True:
        colors = rng.choice(list(COLORS), count, replace=False)
        shapes = rng.choice(SHAPES, count)
        sizes = _stated_sizes(rng, count, relation)
        things = tuple(Object(str(c), str(s), z) for c, s, z in zip(colors, shapes, sizes, strict=True))
        if _has_held_out(things) == held_out:
            return layout(rng, Scene(background, things, relation))


def sibling(rng: np.random.Generator, scene: Scene) -> Scene:
    """A scene that differs in one thing, or in which two objects trade places; never a held-out combination."""
    edits = (_recolor, _reshape, _resize, _swap, _turn, _repaint, _drop)
    while True:
        edited = edits[rng.choice(len(edits), p=[0.15, 0.25, 0.1, 0.2, 0.15, 0.05, 0.1])](rng, scene)
        if edited is not None and not _has_held_out(edited.objects):
            return layout(rng, edited)


def layout(rng: np.random.Generator, scene: Scene) -> Scene:
    """The scene with new positions and radii that fit its sizes and its relation."""
    if scene.relation == "inside":
        return dataclasses.replace(scene, objects=_nest(rng, *scene.objects))
    return dataclasses.replace(scene, objects=_line_up(rng, scene.objects, scene.relation))


def evaluation_prompts(count: int = 50, seed: int = 2024, held_out: bool = False) -> list[tuple[Scene, str]]:
    """The fixed prompts that accuracies are reported on, each with its scene."""
    rng = np.random.default_rng([seed, held_out])
    return [(scene := sample(rng, held_out), caption(rng, scene)) for _ in range(count)]


def _has_held_out(objects: Sequence[Object]) -> bool:
    return any((o.color, o.shape) in HELD_OUT for o in objects)


def _stated_sizes(rng: np.random.Generator, count: int, relation: str) -> list[str]:
    """What the caption says about each size; three objects fit only when all are small."""
    sizes = ["small", "large"] if relation == "inside" else [str(s) for s in rng.choice(["small", "large"], count)]
    if count == 3:
        sizes = ["small"] * 3
    return [s if stated else "" for s, stated in zip(sizes, rng.random(count) < 0.4, strict=True)]


def _nest(rng: np.random.Generator, inner: Object, outer: Object) -> tuple[Object, Object]:
    radius = rng.uniform(*INSIDE_RADII[1])
    x, y = (_within(rng, e * radius) for e in half_extents(outer.shape))
    # The centroid of a triangle lies below the middle of its bounding box.
    drop = 0.25 * TRIANGLE * radius if outer.shape == "triangle" else 0.0
    inner = dataclasses.replace(inner, x=x, y=y + drop, radius=rng.uniform(*INSIDE_RADII[0]))
    return inner, dataclasses.replace(outer, x=x, y=y, radius=radius)


def _line_up(rng: np.random.Generator, objects: Sequence[Object], relation: str) -> tuple[Object, ...]:
    """Places objects side by side along the relation's axis, about level across it."""
    axis, side = DIRECTIONS.get(relation, (0, -1))
    ordered = objects if side < 0 else objects[::-1]
    unstated = ["small"] if len(objects) == 3 else ["small", "large"]
    while True:
        radii = [rng.uniform(*RADII[o.size or rng.choice(unstated)]) for o in ordered]
        extents = [np.array(half_extents(o.shape)) * r for o, r in zip(ordered, radii, strict=True)]
        along = np.array([e[axis] for e in extents])
        free = SIZE - 2 * MARGIN - GAP * (len(ordered) - 1) - 2 * along.sum()
        if free >= 0:
            break
    # The free space is cut at random into the gaps before, between and after the objects.
    cuts = np.diff(np.sort(np.concatenate([[0.0], rng.uniform(0, free, len(ordered))])))
    centers = MARGIN + np.cumsum(cuts) + np.arange(len(ordered)) * GAP + 2 * np.cumsum(along) - along
    level = _within(rng, max(e[1 - axis] for e in extents) + 3.0 * (len(ordered) > 1))
    placed = []
    for o, radius, center in zip(ordered, radii, centers, strict=True):
        across = level + rng.uniform(-3, 3) * (len(ordered) > 1)
        x, y = (center, across) if axis == 0 else (across, center)
        placed.append(dataclasses.replace(o, x=float(x), y=float(y), radius=radius))
    return tuple(placed if side < 0 else placed[::-1])


def _within(rng: np.random.Generator, extent: float) -> float:
    return float(rng.uniform(MARGIN + extent, SIZE - MARGIN - extent))


def _edit(scene: Scene, index: int, **changes: str) -> Scene:
    objects = list(scene.objects)
    objects[index] = dataclasses.replace(objects[index], **changes)
    return dataclasses.replace(scene, objects=tuple(objects))


def _recolor(rng, scene):
    unused = [c for c in COLORS if c not in {o.color for o in scene.objects}]
    return _edit(scene, rng.integers(len(scene.objects)), color=str(rng.choice(unused)))


def _reshape(rng, scene):
    index = rng.integers(len(scene.objects))
    return _edit(scene, index, shape=str(rng.choice([s for s in SHAPES if s != scene.objects[index].shape])))


def _resize(rng, scene):
    stated = [i for i, o in enumerate(scene.objects) if o.size]
    if not stated or scene.relation == "inside" or len(scene.objects) == 3:
        return None
    index = rng.choice(stated)
    return _edit(scene, index, size="small" if scene.objects[index].size == "large" else "large")


def _swap(rng, scene):
    if len(scene.objects) == 1:
        return None
    i, j = rng.choice(len(scene.objects), 2, replace=False)
    a, b = scene.objects[i], scene.objects[j]
    if rng.random() < 0.5 and a.shape != b.shape:  # trade colours only, or the whole places
        return _edit(_edit(scene, i, color=b.color), j, color=a.color)
    return _edit(_edit(scene, i, color=b.color, shape=b.shape), j, color=a.color, shape=a.shape)


def _turn(rng, scene):
    if not scene.relation:
        return None
    relation = str(rng.choice([r for r in DIRECTIONS if r != scene.relation]))
    return dataclasses.replace(scene, relation=relation)


def _repaint(rng, scene):
    return dataclasses.replace(scene, background=str(rng.choice([b for b in BACKGROUNDS if b != scene.background])))


def _drop(rng, scene):
    if len(scene.objects) == 1:
        return None
    gone = rng.integers(len(scene.objects))
    left = tuple(o for i, o in enumerate(scene.objects) if i != gone)
    return dataclasses.replace(scene, objects=left, relation=scene.relation if len(left) > 1 else "")


# ---------------------------------------------------------------------------------------------------------- captions


def caption(rng: np.random.Generator, scene: Scene) -> str:
    """A lower-case English sentence that states everything `verify` checks."""
    nouns = [_noun(o) for o in scene.objects]
    if len(nouns) == 3 and rng.random() < 0.5:
        content = f"{nouns[0]}, {nouns[1]} and {nouns[2]} {CHAINS[scene.relation]}"
    else:
        wordings = WORDINGS.get(scene.relation, (scene.relation,)) if len(nouns) == 2 else (scene.relation,)
        content = f" {rng.choice(wordings)} ".join(nouns)
    templates = TEMPLATES[:3] if len(nouns) == 3 else TEMPLATES
    return str(rng.choice(templates)).format(content=content, background=scene.background)


def _noun(o: Object) -> str:
    words = " ".join(filter(None, (o.size, o.color, o.shape)))
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


# ----------------------------------------------------------------------------------------------------------- drawing

TRIANGLE = 1.45  # circumradius of a triangle of radius 1; the factors make all shapes of a radius look equally large
SQUARE = 0.886
DIAMOND = 1.25
AREAS = {"circle": np.pi, "square": 4 * SQUARE**2, "triangle": 0.75 * 3**0.5 * TRIANGLE**2, "diamond": 2 * DIAMOND**2}


def half_extents(shape: str) -> tuple[float, float]:
    """Half width and half height of a shape of radius 1."""
    return {
        "circle": (1.0, 1.0),
        "square": (SQUARE, SQUARE),
        "triangle": (3**0.5 / 2 * TRIANGLE, 0.75 * TRIANGLE),
        "diamond": (DIAMOND, DIAMOND),
    }[shape]


def signed_distance(shape: str, x: np.ndarray, y: np.ndarray, radius: float) -> np.ndarray:
    """Distance to the edge of a shape centred on the origin, negative inside; y points down."""
    if shape == "circle":
        return np.hypot(x, y) - radius
    if shape == "square":
        return np.maximum(np.abs(x), np.abs(y)) - SQUARE * radius
    if shape == "diamond":
        return (np.abs(x) + np.abs(y) - DIAMOND * radius) / 2**0.5
    y = y - TRIANGLE * radius / 4
    return np.maximum(y, 3**0.5 / 2 * np.abs(x) - y / 2) - TRIANGLE * radius / 2


def draw(scene: Scene) -> np.ndarray:
    """The scene as uint8 `[64, 64, 3]`; later objects lie below earlier ones."""
    y, x = np.mgrid[:SIZE, :SIZE].astype(np.float32) + 0.5
    image = np.full((SIZE, SIZE, 3), BACKGROUNDS[scene.background], np.float32)
    for o in reversed(scene.objects):
        alpha = np.clip(0.5 - signed_distance(o.shape, x - o.x, y - o.y, o.radius), 0, 1)[..., None]
        image = image * (1 - alpha) + np.float32(COLORS[o.color]) * alpha
    return np.round(image).astype(np.uint8)


# ----------------------------------------------------------------------------------------------------------- judging

PALETTE = COLORS | BACKGROUNDS
MIN_AREA = 18
MIN_EXTRA_AREA = 30


def verify(image: np.ndarray, scene: Scene) -> Verdict:
    """Judges an image, uint8 `[64, 64, 3]`, against a scene; knows nothing but the pixels."""
    labels = classify(image)
    masks = [largest_component(labels == o.color) for o in scene.objects]
    checks = {"background": _frame_share(labels, scene.background) > 0.6}
    for i, (o, mask) in enumerate(zip(scene.objects, masks, strict=True)):
        found = bool(mask.sum() >= MIN_AREA)
        checks[f"color {i}"] = found
        checks[f"shape {i}"] = found and best_shape(coverage(image, labels, mask, o.color)) == o.shape
        if o.size:
            checks[f"size {i}"] = found and (_radius(mask, o.shape) > SIZE_BORDER) == (o.size == "large")
    for i in range(len(masks) - 1):
        checks[f"relation {i}"] = _related(masks[i], masks[i + 1], scene.relation)
    checks["nothing else"] = not _extras(labels, scene)
    return Verdict(checks)


def classify(image: np.ndarray) -> np.ndarray:
    """Name of the nearest palette colour of every pixel, after a median filter against noise."""
    smooth = ndimage.median_filter(image, size=(3, 3, 1)).astype(np.float32)
    distances = np.linalg.norm(smooth[:, :, None] - np.array(list(PALETTE.values()), np.float32), axis=-1)
    return np.array(list(PALETTE))[distances.argmin(-1)]


def largest_component(mask: np.ndarray) -> np.ndarray:
    """The largest connected region of a mask, its holes filled."""
    regions, count = ndimage.label(mask)
    if count == 0:
        return mask
    sizes = np.bincount(regions.ravel())[1:]
    return ndimage.binary_fill_holes(regions == 1 + sizes.argmax())


def coverage(image: np.ndarray, labels: np.ndarray, mask: np.ndarray, color: str) -> np.ndarray:
    """Soft mask in [0, 1] of a region: how far each pixel in or around it is from its surroundings to its colour."""
    near = ndimage.binary_dilation(mask, iterations=2)
    around = labels[ndimage.binary_dilation(mask, iterations=4) & ~near]
    names, counts = np.unique(around[around != color], return_counts=True)
    if not counts.size:
        return mask.astype(np.float32)
    outside = np.float32(PALETTE[names[counts.argmax()]])
    step = np.float32(PALETTE[color]) - outside
    alpha = np.clip((image - outside) @ step / (step @ step), 0, 1) * near
    return np.maximum(alpha, ndimage.binary_erosion(mask))  # the filled holes too


def best_shape(alpha: np.ndarray) -> str:
    """The shape of the same area and centroid that overlaps a soft mask best, "" if none does well."""
    area, (row, column) = alpha.sum(), ndimage.center_of_mass(alpha)
    y, x = np.mgrid[:SIZE, :SIZE]
    overlaps = {}
    for shape, unit_area in AREAS.items():
        radius = (area / unit_area) ** 0.5
        lift = TRIANGLE * radius / 4 if shape == "triangle" else 0.0  # from the centroid to the middle of the box
        ideal = np.clip(0.5 - signed_distance(shape, x - column, y - row + lift, radius), 0, 1)
        overlaps[shape] = np.minimum(ideal, alpha).sum() / np.maximum(ideal, alpha).sum()
    best = max(overlaps, key=overlaps.get)
    return best if overlaps[best] > 0.7 else ""


def _frame_share(labels: np.ndarray, background: str) -> float:
    frame = np.ones_like(labels, bool)
    frame[2:-2, 2:-2] = False
    return float((labels[frame] == background).mean())


def _radius(mask: np.ndarray, shape: str) -> float:
    return float((mask.sum() / AREAS[shape]) ** 0.5)


def _middle(mask: np.ndarray) -> np.ndarray:
    """Middle (x, y) of a mask's bounding box."""
    rows, columns = ndimage.find_objects(mask.astype(int))[0]
    return np.array([columns.start + columns.stop, rows.start + rows.stop]) / 2


def _related(a: np.ndarray, b: np.ndarray, relation: str) -> bool:
    if min(a.sum(), b.sum()) < MIN_AREA:
        return False
    if relation == "inside":
        return bool((a & b).sum() > 0.9 * a.sum() and b.sum() > 1.5 * a.sum())
    axis, side = DIRECTIONS[relation]
    offset = _middle(a) - _middle(b)
    return bool(side * offset[axis] > max(2.0, abs(offset[1 - axis])) and (a & b).sum() < 0.1 * a.sum())


def _extras(labels: np.ndarray, scene: Scene) -> bool:
    """Whether there is a region of a colour that does not belong, or a second object of one that does."""
    wanted = {o.color for o in scene.objects}
    for color in set(PALETTE) - {scene.background}:
        regions, count = ndimage.label(ndimage.binary_opening(labels == color, np.ones((3, 3))))
        sizes = np.sort(np.bincount(regions.ravel())[1:])
        if (count > 0 and color not in wanted and sizes[-1] >= MIN_EXTRA_AREA) or (
            count > 1 and sizes[-2] >= max(MIN_EXTRA_AREA, 0.3 * sizes[-1])
        ):
            return True
    return False
