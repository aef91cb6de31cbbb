"""What a candidate goes through before its full preview: looks, which are cheaper, and after which the worse ones stop.

That is successive halving (arXiv 1502.07943) inside every generation. As text, looks are separated by ">" or ",":

    half:0.3     previews of half the height and width; the best 30 percent go on
    half4:0.3    the same with 4 steps
    steps4:0.3   previews with 4 steps
    cached4:0.3  previews whose network is evaluated at 4 of their steps, and its output carried on at the others
    cached:0.3   the same at two fifths of them
    early3:0.5   what the preview will be, as predicted after 3 of its steps; those that go on go on from there

"unguided-" before any of them but the last leaves classifier-free guidance out, as in "unguided-steps4:0.3".
"""

import dataclasses
import math
import re
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any, NamedTuple

HALF, STEPS, CACHED, EARLY = "half", "steps", "cached", "early"
FORMS = (
    'full, auto, or looks such as "half:0.3", "half4:0.3", "steps4:0.3", "cached4:0.3", "early3:0.5" and '
    '"half:0.5>early4:0.5"'
)
AUTO = "cached:1/5"
UNGUIDED = "unguided-"
CACHED_SHARE = Fraction(2, 5)


class Form(NamedTuple):
    """How the network runs: `part` 2 is at half the height and width; and whether with the guidance that there is."""

    part: int = 1
    guided: bool = True


WHOLE = Form()


class Stage(NamedTuple):
    """What some candidates of a generation go through.

    Attributes:
      half: whether at half the height and width.
      steps: how many.
      images: of how many candidates, each of which is decoded and scored after them.
      guided: whether with the guidance that there is.
    """

    half: bool
    steps: int
    images: int
    guided: bool = True

    @property
    def form(self) -> Form:
        return Form(2 if self.half else 1, self.guided)


@dataclasses.dataclass(frozen=True)
class Look:
    """One look.

    Attributes:
      kind: `HALF`, `STEPS`, `CACHED` or `EARLY`.
      steps: how many, evaluations for `CACHED`; None is all of the preview's for `HALF`, and two fifths for `CACHED`.
      keep: the share of those looked at that goes on, in (0, 1].
      guided: whether with the guidance that there is.
    """

    kind: str
    steps: int | None
    keep: Fraction
    guided: bool = True

    def evaluations(self, preview_steps: int) -> int:
        """How often it runs the network, before the full preview or as a part of it."""
        return self.steps or (preview_steps if self.kind == HALF else math.ceil(preview_steps * CACHED_SHARE))

    def kept(self, count: int) -> int:
        """How many of so many go on; a share of one is one."""
        return math.ceil(self.keep * count)

    def __str__(self) -> str:
        short = f"{float(self.keep):g}"
        return f"{self.name}:{short if Fraction(short) == self.keep else self.keep}"

    @property
    def name(self) -> str:
        """The look without its share."""
        return f"{'' if self.guided else UNGUIDED}{self.kind}{self.steps or ''}"


@dataclasses.dataclass(frozen=True)
class Fidelity:
    """The looks before a full preview, in order; none for full previews of all."""

    looks: tuple[Look, ...] = ()

    def __str__(self) -> str:
        return ">".join(map(str, self.looks)) or "full"

    @property
    def halves(self) -> bool:
        """Whether anything is looked at in half its size."""
        return any(look.kind == HALF for look in self.looks)

    @property
    def unguided(self) -> bool:
        """Whether anything is looked at without guidance."""
        return not all(look.guided for look in self.looks)

    def counts(self, count: int) -> list[int]:
        """Of so many candidates, how many each look sees, and how many get the full preview."""
        counts = [count]
        for look in self.looks:
            counts.append(look.kept(counts[-1]))
        return counts

    def stages(self, count: int, preview_steps: int) -> Iterator[Stage]:
        """What so many candidates of one generation go through."""
        *seen, full = self.counts(count)
        taken = 0
        for look, images in zip(self.looks, seen, strict=True):
            steps = look.evaluations(preview_steps) - taken * (look.kind == EARLY)
            yield Stage(look.kind == HALF, steps, images, look.guided)
            taken = look.steps if look.kind == EARLY else taken
        yield Stage(False, preview_steps - taken, full)

    def evaluations(
        self, budget: int, population: int, preview_steps: int, share: Callable[[Form], Fraction]
    ) -> Fraction:
        """Steps that a budget of candidates takes, of full size and with guidance.

        Args:
          budget: how many candidates are looked at in all.
          population: how many a generation.
          preview_steps: of a full preview.
          share: what a step of a form counts for.
        """
        whole, rest = divmod(budget, population)
        each = ((n, self.stages(count, preview_steps)) for n, count in ((whole, population), (1, rest)))
        return sum(n * s.images * s.steps * share(s.form) for n, stages in each for s in stages) + Fraction(0)

    def check(self, preview_steps: int) -> None:
        """Raises ValueError where a look is not cheaper than what comes after it."""
        taken = 0
        for look in self.looks:
            if look.kind != HALF and look.evaluations(preview_steps) >= preview_steps:
                raise ValueError(f"fidelity={str(self)!r}: {look.name} needs more than preview_steps={preview_steps}")
            if look.kind == EARLY and look.steps <= taken:
                raise ValueError(f"fidelity={str(self)!r}: {look.name} must come after more than {taken} steps")
            taken = look.steps if look.kind == EARLY else taken


FULL = Fidelity()


def load(spec: Any) -> Fidelity:
    """The looks that a text names.

    Raises:
      TypeError: for what is no text.
      ValueError: for a text of another form, naming the forms; begins with "fidelity=".
    """
    if isinstance(spec, Fidelity):
        return spec
    if not isinstance(spec, str):
        raise TypeError
    text = spec.strip().lower()
    if text == "full":
        return FULL
    return Fidelity(tuple(_look(part.strip(), spec) for part in re.split("[>,]", AUTO if text == "auto" else text)))


def describe(fidelity: Fidelity) -> str:
    """What `load` takes."""
    return str(fidelity)


def _look(text: str, spec: str) -> Look:
    short = text.removeprefix(UNGUIDED)
    match = re.fullmatch(r"(half|steps|cached|early)([1-9]\d*)?\s*:\s*(\d+/[1-9]\d*|\d*\.?\d+)", short)
    if not match or (match[2] is None and match[1] not in (HALF, CACHED)):
        raise ValueError(f"fidelity={spec!r}: {text!r} is no look; known forms are {FORMS}")
    keep = Fraction(match[3])
    if not 0 < keep <= 1:
        raise ValueError(f"fidelity={spec!r}: the share {match[3]} that goes on must be more than 0 and at most 1")
    if (unguided := short != text) and match[1] == EARLY:
        raise ValueError(f"fidelity={spec!r}: {text!r} is a part of the preview and so guided; try steps or cached")
    return Look(match[1], match[2] and int(match[2]), keep, not unguided)
