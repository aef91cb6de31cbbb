"""Scenes of one to four objects in three tiers of difficulty, and the siblings that differ from a scene in one thing.

A scene says what a caption says and what the judge checks; where its objects lie is drawn afresh for every picture
(`demo.drawing`).
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

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
    "gray": (150, 150, 150),
    "pink": (250, 185, 208),
    "cyan": (140, 228, 238),
}
SHAPES = ("circle", "square", "triangle", "diamond", "star", "cross")
TEXTURES = ("solid", "striped", "dotted", "outlined")
SIZES = ("small", "large")
# Relation of a group to the next one: the axis they are laid out along (0 for x) and the side the first one is on.
DIRECTIONS = {"left of": (0, -1), "right of": (0, 1), "above": (1, -1), "below": (1, 1)}
TIERS = ("easy", "medium", "hard")
EDITS = {
    "color": 0.14,
    "shape": 0.18,
    "texture": 0.14,
    "size": 0.08,
    "count": 0.14,
    "trade": 0.16,
    "relation": 0.1,
    "background": 0.03,
    "drop": 0.03,
}
# More of those that are hard to learn.
TAUGHT_EDITS = {
    "color": 0.04,
    "shape": 0.16,
    "texture": 0.06,
    "size": 0.08,
    "count": 0.16,
    "trade": 0.22,
    "relation": 0.24,
    "background": 0.02,
    "drop": 0.02,
}
MOST_ROOMY = 2  # objects that may be large; more of them are drawn smaller, and no size is stated

# Never drawn in training, although each colour, shape and texture is: about one combination in nine.
HELD_OUT = frozenset(
    (color, shape, texture)
    for i, color in enumerate(COLORS)
    for j, shape in enumerate(SHAPES)
    for k, texture in enumerate(TEXTURES)
    if (i + 2 * j + 3 * k) % 9 == 0
)


@dataclasses.dataclass(frozen=True)
class Group:
    """One or several objects that look the same; `size` is what the caption says of it, "" for nothing."""

    color: str
    shape: str
    count: int = 1
    size: str = ""
    texture: str = "solid"


@dataclasses.dataclass(frozen=True)
class Scene:
    """Groups of different colours on a background, each in `relation` to the next one ("" for a single group)."""

    background: str
    groups: tuple[Group, ...]
    relation: str = ""

    @property
    def count(self) -> int:
        """Objects in all."""
        return sum(g.count for g in self.groups)


# ---------------------------------------------------------------------------------------------------------- sampling


def sample(rng: np.random.Generator, tier: str, held_out: bool = False) -> Scene:
    """A random scene of a tier: without any held-out combination, or with at least one."""
    draw = {"easy": _easy, "medium": _medium, "hard": _hard}[tier]
    while True:
        scene = draw(rng)
        if has_held_out(scene) == held_out:
            return scene


def evaluation_scenes(count: int, tier: str, held_out: bool = False, seed: int = 2025) -> list[Scene]:
    """The fixed scenes of a tier that accuracies are reported on."""
    rng = np.random.default_rng([seed, TIERS.index(tier), held_out])
    return [sample(rng, tier, held_out) for _ in range(count)]


def has_held_out(scene: Scene) -> bool:
    """Whether a combination of colour, shape and texture is one that training never shows."""
    return any((g.color, g.shape, g.texture) in HELD_OUT for g in scene.groups)


def _easy(rng: np.random.Generator) -> Scene:
    """One object."""
    return _compose(rng, [1], textured=0.5, sized=0.5)


def _medium(rng: np.random.Generator) -> Scene:
    """Two objects in a relation, or two to four that look the same."""
    counts = [1, 1] if rng.random() < 0.65 else [int(rng.integers(2, 5))]
    return _compose(rng, counts, textured=0.35, sized=0.25)


def _hard(rng: np.random.Generator) -> Scene:
    """Three objects in a row, three or four in groups, or two of stated sizes; most with a texture."""
    kind = rng.choice(["row", "groups", "detailed"], p=[0.3, 0.4, 0.3])
    if kind == "row":
        return _compose(rng, [1, 1, 1], textured=0.8, sized=0)
    if kind == "detailed":
        return _compose(rng, [1, 1], textured=1, sized=1)
    groupings = ([1, 2], [2, 1], [2, 2], [1, 3], [3, 1], [2, 1, 1], [1, 2, 1], [1, 1, 2])
    return _compose(rng, groupings[rng.integers(len(groupings))], textured=0.8, sized=0)


def _compose(rng: np.random.Generator, counts: Sequence[int], textured: float, sized: float) -> Scene:
    """Groups of the given counts; shares of them that have a texture and whose size is stated."""
    colors = rng.choice(list(COLORS), len(counts), replace=False)
    groups = tuple(_group(rng, str(c), n, textured, sized) for c, n in zip(colors, counts, strict=True))
    relation = str(rng.choice(list(DIRECTIONS))) if len(counts) > 1 else ""
    return plain(Scene(str(rng.choice(list(BACKGROUNDS))), groups, relation))


def _group(rng: np.random.Generator, color: str, count: int, textured: float, sized: float) -> Group:
    texture = str(rng.choice(TEXTURES[1:])) if rng.random() < textured else "solid"
    size = str(rng.choice(SIZES)) if rng.random() < sized else ""
    return Group(color, str(rng.choice(SHAPES)), count, size, texture)


def plain(scene: Scene) -> Scene:
    """The scene as it can be said: a relation only between groups, sizes only where there is room for them."""
    groups = scene.groups
    if scene.count > MOST_ROOMY:
        groups = tuple(dataclasses.replace(g, size="") for g in groups)
    return dataclasses.replace(scene, groups=groups, relation=scene.relation if len(groups) > 1 else "")


# ---------------------------------------------------------------------------------------------------------- siblings


def sibling(rng: np.random.Generator, scene: Scene, shares: Mapping[str, float] = EDITS) -> Scene:
    """A scene whose pictures are wrong for the given one in a single thing; never with a held-out combination.

    `shares` are those of the kinds of edits, `EDITS` or, for training, `TAUGHT_EDITS`.
    """
    edits = {
        "color": _recolor,
        "shape": _reshape,
        "texture": _retexture,
        "size": _resize,
        "count": _recount,
        "trade": _trade,
        "relation": _turn,
        "background": _repaint,
        "drop": _drop,
    }
    while True:
        kind = rng.choice(list(shares), p=list(shares.values()))
        edited = edits[kind](rng, scene)
        if edited is not None and not has_held_out(edited := plain(edited)) and _differs(edited, scene):
            return edited


def _differs(edited: Scene, scene: Scene) -> bool:
    """Whether more than stated sizes changed, or a stated size to the other one."""
    if [dataclasses.replace(g, size="") for g in edited.groups] != [
        dataclasses.replace(g, size="") for g in scene.groups
    ]:
        return True
    resized = any(a.size and b.size and a.size != b.size for a, b in zip(edited.groups, scene.groups, strict=True))
    return resized or (edited.background, edited.relation) != (scene.background, scene.relation)


def _edit(scene: Scene, index: int, **changes: str | int) -> Scene:
    groups = list(scene.groups)
    groups[index] = dataclasses.replace(groups[index], **changes)
    return dataclasses.replace(scene, groups=tuple(groups))


def _pick(rng: np.random.Generator, scene: Scene) -> tuple[int, Group]:
    index = int(rng.integers(len(scene.groups)))
    return index, scene.groups[index]


def _other(rng: np.random.Generator, options: Sequence[str], taken: Sequence[str]) -> str:
    return str(rng.choice([x for x in options if x not in taken]))


def _recolor(rng, scene):
    return _edit(scene, _pick(rng, scene)[0], color=_other(rng, list(COLORS), [g.color for g in scene.groups]))


def _reshape(rng, scene):
    index, group = _pick(rng, scene)
    return _edit(scene, index, shape=_other(rng, SHAPES, [group.shape]))


def _retexture(rng, scene):
    index, group = _pick(rng, scene)
    return _edit(scene, index, texture=_other(rng, TEXTURES, [group.texture]))


def _resize(rng, scene):
    index, group = _pick(rng, scene)
    return _edit(scene, index, size=_other(rng, SIZES, [group.size])) if group.size else None


def _recount(rng, scene):
    """One object more or one less."""
    index, group = _pick(rng, scene)
    count = group.count + int(rng.choice([-1, 1]))
    return _edit(scene, index, count=count) if count > 0 and scene.count - group.count + count <= 4 else None


def _trade(rng, scene):
    """Two groups trade one attribute or their places."""
    if len(scene.groups) == 1:
        return None
    i, j = rng.choice(len(scene.groups), 2, replace=False)
    a, b = scene.groups[i], scene.groups[j]
    names = [n for n in ("color", "shape", "texture", "size", "count") if getattr(a, n) != getattr(b, n)]
    names = [str(rng.choice(names))] if rng.random() < 0.7 else names
    changes = [{n: getattr(other, n) for n in names} for other in (b, a)]
    return _edit(_edit(scene, i, **changes[0]), j, **changes[1])


def _turn(rng, scene):
    if not scene.relation:
        return None
    return dataclasses.replace(scene, relation=_other(rng, list(DIRECTIONS), [scene.relation]))


def _repaint(rng, scene):
    return dataclasses.replace(scene, background=_other(rng, list(BACKGROUNDS), [scene.background]))


def _drop(rng, scene):
    if len(scene.groups) == 1:
        return None
    gone = _pick(rng, scene)[0]
    return dataclasses.replace(scene, groups=tuple(g for i, g in enumerate(scene.groups) if i != gone))
