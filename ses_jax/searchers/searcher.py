"""What a searcher is. Its three functions are pure, run inside a compiled program and are vmapped over prompts.

A searcher is hashable, and equal to whatever proposes the same: programs are compiled once for equal ones. All that it
learns is in its state. The engine puts the base noise in the place of the first candidate, keeps the best so far, and
hides candidates beyond the budget.
"""

from typing import Any, NamedTuple, Protocol, runtime_checkable

from jaxtyping import Array, Float, Int, PRNGKeyArray

from ses_jax.searchers.space import Space


class Problem(NamedTuple):
    """What a search is over.

    Attributes:
      space: what a point is: one array, `[C, a, b]` in the low band and `[C, h, w]` in whole noise.
      population: points a generation.
      elites: how many of the best shape the next generation, where a searcher has no other option for it.
    """

    space: Space
    population: int
    elites: int

    def draw(self, key: PRNGKeyArray) -> Any:
        """A population of fresh points."""
        return self.space.draw(key, self.population)


@runtime_checkable
class Searcher(Protocol):
    """What `search` takes as `searcher`.

    Attributes:
      space: "low", the low band, or "whole", the whole noise.
      needs_gradient: optional; where it is True, `tell` takes a last argument: the gradients of the scores, of the form
        of the points. Each evaluation then counts as three, and every reward must be one that JAX can trace.
      population: optional; how many points a generation has, whatever the setting says.
    """

    space: str

    def init(self, problem: Problem) -> Any:
        """The state before the first generation: a pytree of arrays, whose shapes never change."""

    def ask(self, problem: Problem, key: PRNGKeyArray, state: Any, generation: Int[Array, ""]) -> Any:
        """The points `[population, ...]` of a generation, counted from 0; the key is its own."""

    def tell(self, problem: Problem, state: Any, points: Any, scores: Float[Array, " n"]) -> Any:
        """The next state, from points and their scores, -inf where there is none; higher is better.

        In a standardised mixture every generation changes all scores, and a fresh state is told all candidates so far
        at once; `n` is then more than the population. One that needs gradients goes on from its state all the same.
        """


def needs_gradient(searcher: Searcher) -> bool:
    """Whether a searcher learns from gradients too."""
    return bool(getattr(searcher, "needs_gradient", False))


def own_population(searcher: Searcher) -> int | None:
    """How many points a generation of the searcher has; None where the setting says it."""
    return getattr(searcher, "population", None)
