"""What a scene is called: lower-case English with synonyms, stating everything that the judge checks."""

import numpy as np

from demo import scenes
from demo.scenes import Group, Scene

NUMBERS = {2: "two", 3: "three", 4: "four"}
SYNONYMS = {
    "small": ("small", "little"),
    "large": ("large", "big"),
    "dotted": ("dotted", "spotted"),
    "left of": ("left of", "to the left of"),
    "right of": ("right of", "to the right of"),
    "below": ("below", "under"),
}
ROWS = {
    "left of": "from left to right",
    "right of": "from right to left",
    "above": "from top to bottom",
    "below": "from bottom to top",
}
SHORT_TEMPLATES = ("{content} on {background}", "{content}, {background} background")
TEMPLATES = (
    *SHORT_TEMPLATES,
    "{content} on a {background} background",
    "a {background} background with {content}",
    "a picture of {content} on a {background} background",
)


def caption(rng: np.random.Generator, scene: Scene) -> str:
    """A random wording of a scene; objects without a texture are solid, objects without a size may have any."""
    nouns = [noun(rng, g) for g in scene.groups]
    if len(nouns) > 2 and rng.random() < 0.7:
        content = f"{', '.join(nouns[:-1])} and {nouns[-1]} {ROWS[scene.relation]}"
    else:
        # Short wordings where there are many words already.
        relation = _synonym(rng, scene.relation) if len(nouns) == 2 else scene.relation
        content = f" {relation} ".join(nouns)
    templates = SHORT_TEMPLATES if len(nouns) > 2 else TEMPLATES
    return str(rng.choice(templates)).format(content=content, background=scene.background)


def evaluation_prompts(count: int, tier: str | None = None, seed: int = 2024) -> list[tuple[Scene, str]]:
    """Scenes of a tier, or of each in turn, without held-out combinations, and their captions; fixed by the seed."""
    tiers = scenes.TIERS if tier is None else (tier,)
    columns = [scenes.evaluation_scenes(-(-count // len(tiers)), name, seed=seed) for name in tiers]
    wanted = [scene for row in zip(*columns, strict=True) for scene in row][:count]
    rng = np.random.default_rng(seed)
    return [(scene, caption(rng, scene)) for scene in wanted]


def noun(rng: np.random.Generator, group: Group) -> str:
    """Such as "two spotted red stars"."""
    texture = "" if group.texture == "solid" else _synonym(rng, group.texture)
    shape = group.shape if group.count == 1 else group.shape + ("es" if group.shape == "cross" else "s")
    words = " ".join(filter(None, (_synonym(rng, group.size), texture, group.color, shape)))
    article = NUMBERS.get(group.count) or ("an" if words[0] in "aeiou" else "a")
    return f"{article} {words}"


def _synonym(rng: np.random.Generator, word: str) -> str:
    return str(rng.choice(SYNONYMS.get(word, (word,))))
