"""A judge of pictures: finds the objects of an image of any size by its pixels and compares them with a scene.

It knows neither the prompt nor any network. Colours are those nearest in the palette; ink belongs to the nearest
coloured pixel; what is connected is an object; its shape is the one that overlaps it best, its texture follows from
where its ink is.
"""

import dataclasses
from typing import NamedTuple

import numpy as np
from scipy import ndimage

from demo.drawing import (
    AREAS,
    INK,
    OUTLINE,
    SIZE_BORDER,
    TRIANGLE,
    signed_distance,
    unit,
)
from demo.scenes import BACKGROUNDS, COLORS, DIRECTIONS, Group, Scene

PALETTE = np.array([*COLORS.values(), *BACKGROUNDS.values(), INK], np.float32)
NAMES = (*COLORS, *BACKGROUNDS, "ink")
FIRST_BACKGROUND, INK_INDEX = len(COLORS), len(PALETTE) - 1
MIN_AREA = 30.0  # of an object, square units; a drawn one has at least about 90
LEAST_CORE = 4.0  # square units of one colour
REACH = 6.0  # of a colour over ink: the tip of an outlined star is all ink
LEAST_OVERLAP = 0.72
LEAST_INK = 0.08  # share in a textured object
INK_OF_RIM, INK_OF_CORE = 0.75, 0.2  # least and greatest share in an outlined object
ROWS_OF_STRIPES = 0.55  # share of the ink's variance that rows explain, between dots and stripes


class Found(NamedTuple):
    """An object of an image: `shape` is "" if it is like none, lengths are in units."""

    color: str
    shape: str
    texture: str
    radius: float
    x: float
    y: float


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Outcome of every check, by name."""

    checks: dict[str, bool]

    @property
    def fraction(self) -> float:
        """Share of fulfilled checks."""
        return sum(self.checks.values()) / len(self.checks)

    @property
    def correct(self) -> bool:
        """Whether everything is right."""
        return all(self.checks.values())


def verify(image: np.ndarray, scene: Scene) -> Verdict:
    """Judges an image, uint8 or float in [0, 1], `[H, W, 3]`, against a scene."""
    background, objects = look(image)
    checks = {"background": background == scene.background}
    members = [[o for o in objects if o.color == g.color] for g in scene.groups]
    for i, (group, found) in enumerate(zip(scene.groups, members, strict=True)):
        checks |= {f"{name} {i}": passed for name, passed in _check_group(group, found).items()}
    for i in range(len(members) - 1):
        checks[f"relation {i}"] = _related(members[i], members[i + 1], scene.relation)
    checks["nothing else"] = {o.color for o in objects} <= {g.color for g in scene.groups}
    return Verdict(checks)


def look(image: np.ndarray) -> tuple[str, list[Found]]:
    """The background's colour and the objects of an image, uint8 or float in [0, 1], `[H, W, 3]`."""
    if image.dtype != np.uint8:
        image = np.round(np.clip(image, 0, 1) * 255).astype(np.uint8)
    scale = unit(*image.shape[:2])
    labels = _classify(image)
    background = _background(labels)
    owners, alpha = _owners(image.astype(np.float32), labels, background)
    objects = []
    for index in np.unique(owners[owners >= 0]):
        regions, count = ndimage.label((owners == index) & (alpha > 0.5))
        areas = np.bincount(regions.ravel(), minlength=count + 1) / scale**2
        for region in 1 + np.flatnonzero(areas[1:] >= MIN_AREA):
            objects.append(_describe(NAMES[index], regions == region, alpha * (owners == index), labels, scale))
    return NAMES[background], objects


# ------------------------------------------------------------------------------------------------------------ finding


def _classify(image: np.ndarray) -> np.ndarray:
    """Index of the nearest palette colour of every pixel."""
    difference = image[:, :, None].astype(np.float32) - PALETTE
    return np.einsum("hwpc,hwpc->hwp", difference, difference).argmin(-1)


def _background(labels: np.ndarray) -> int:
    """Index of the background colour that most of the frame has."""
    frame = np.ones_like(labels, bool)
    frame[2:-2, 2:-2] = False
    return FIRST_BACKGROUND + int(np.bincount(labels[frame], minlength=len(PALETTE))[FIRST_BACKGROUND:-1].argmax())


def _owners(image: np.ndarray, labels: np.ndarray, background: int) -> tuple[np.ndarray, np.ndarray]:
    """Colour index that each pixel belongs to, -1 far from any colour, and how far it differs from the background.

    The second is 0 for the background and 1 for the colour or the ink of an object; on edges it is between them.
    """
    solid = np.any([_solid(labels == index) for index in range(FIRST_BACKGROUND)], axis=0)
    if not solid.any():
        return np.full_like(labels, -1), np.zeros(labels.shape, np.float32)
    far, nearest = ndimage.distance_transform_edt(~solid, return_indices=True)
    owners = np.where(far <= REACH * unit(*labels.shape), labels[tuple(nearest)], -1)
    outside = PALETTE[background]
    away = np.linalg.norm(image - outside, axis=-1)
    # Next to ink a blend is one of ink and background, elsewhere one of the colour and background.
    inked = ndimage.binary_dilation(labels == INK_INDEX, np.ones((3, 3)))
    color_step = np.linalg.norm(PALETTE[np.maximum(owners, 0)] - outside, axis=-1)
    ink_step = np.linalg.norm(PALETTE[INK_INDEX] - outside)
    step = np.where(inked & (labels != owners), ink_step, color_step)
    return owners, np.clip(away / step, 0, 1) * (owners >= 0)


def _solid(mask: np.ndarray) -> np.ndarray:
    """A colour's pixels without thin lines and specks, which are blends of two others."""
    mask = mask & (ndimage.uniform_filter(mask.astype(np.float32), 3) > 0.4)
    regions, count = ndimage.label(mask)
    areas = np.bincount(regions.ravel(), minlength=count + 1) / unit(*mask.shape) ** 2
    return mask & (areas >= LEAST_CORE)[regions]


def _describe(color: str, region: np.ndarray, alpha: np.ndarray, labels: np.ndarray, scale: float) -> Found:
    near = ndimage.binary_dilation(region, np.ones((3, 3)))
    box = tuple(slice(max(0, s.start - 1), s.stop + 1) for s in ndimage.find_objects(near.astype(int))[0])
    soft = (alpha * near)[box]
    shape, radius = _best_shape(soft, scale)
    row, column = ndimage.center_of_mass(soft)
    y, x = ((s.start + c + 0.5) / scale for s, c in zip(box, (row, column), strict=True))
    texture = _texture(region[box], labels[box], NAMES.index(color), scale)
    return Found(color, shape, texture, radius, x, y)


def _best_shape(alpha: np.ndarray, scale: float) -> tuple[str, float]:
    """The shape of the same area and centroid that overlaps a soft mask best and its radius; "" if none does well."""
    area, (row, column) = alpha.sum(), ndimage.center_of_mass(alpha)
    y, x = np.mgrid[: alpha.shape[0], : alpha.shape[1]]
    overlaps, radii = {}, {}
    for shape, unit_area in AREAS.items():
        radii[shape] = radius = (area / unit_area) ** 0.5
        lift = TRIANGLE * radius / 4 if shape == "triangle" else 0.0  # from the centroid to the middle of the box
        ideal = np.clip(0.5 - signed_distance(shape, x - column, y - row + lift, radius), 0, 1)
        overlaps[shape] = np.minimum(ideal, alpha).sum() / np.maximum(ideal, alpha).sum()
    best = max(overlaps, key=overlaps.get)
    return best if overlaps[best] > LEAST_OVERLAP else "", radii[best] / scale


def _texture(region: np.ndarray, labels: np.ndarray, color: int, scale: float) -> str:
    """The texture that the ink of a region of a colour makes."""
    region = ndimage.binary_fill_holes(region)
    depth = ndimage.distance_transform_edt(np.pad(region, 1))[1:-1, 1:-1] / scale
    # Blends with ink look like anything, but not like the object's own colour; at the very edge they are none of ink.
    ink, inside, core = labels != color, depth > max(0.9, 1.1 / scale), depth > OUTLINE + 0.7
    if ink[inside].sum() < LEAST_INK * inside.sum():
        return "solid"
    rim = (depth > 0.3) & (depth < 0.8 * OUTLINE)
    if ink[rim].sum() > INK_OF_RIM * rim.sum() and ink[core].sum() <= INK_OF_CORE * core.sum():
        return "outlined"
    return "striped" if _explained_by_rows(inside, ink) > ROWS_OF_STRIPES else "dotted"


def _explained_by_rows(region: np.ndarray, ink: np.ndarray) -> float:
    """Share of the ink's variance that lies between the rows of a region."""
    counts, inked = region.sum(1), (region & ink).sum(1)
    total = inked.sum() / max(1, counts.sum())
    between = np.sum(counts * (inked / np.maximum(1, counts) - total) ** 2) / max(1, counts.sum())
    return float(between / max(1e-6, total * (1 - total)))


# ---------------------------------------------------------------------------------------------------------- comparing


def _check_group(group: Group, found: list[Found]) -> dict[str, bool]:
    checks = {
        "count": len(found) == group.count,
        "shape": bool(found) and all(o.shape == group.shape for o in found),
        "texture": bool(found) and all(o.texture == group.texture for o in found),
    }
    if group.size:
        checks["size"] = bool(found) and all((o.radius > SIZE_BORDER) == (group.size == "large") for o in found)
    return checks


def _related(first: list[Found], second: list[Found], relation: str) -> bool:
    """Whether all objects of one group are on the right side of all of the next, more so than across."""
    if not first or not second:
        return False
    axis, side = DIRECTIONS[relation]
    a, b = (np.array([(o.x, o.y) for o in group]) for group in (first, second))
    between = side * (a[:, None] - b)[:, :, axis]
    across = abs((a.mean(0) - b.mean(0))[1 - axis])
    return bool(between.min() > 2 and between.mean() > across)
