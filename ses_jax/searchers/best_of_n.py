"""Independent noises, the best of which wins: what every other searcher must beat at the same cost."""

import dataclasses
from typing import Any

from jaxtyping import Array, Float, Int, PRNGKeyArray

from ses_jax.searchers.options import Options, one_of, option
from ses_jax.searchers.searcher import Problem


@dataclasses.dataclass(frozen=True, kw_only=True)
class BestOfN(Options):
    """Independent draws from the space."""

    space: str = option("whole", one_of("whole", "low"), "what is drawn anew: whole noise, or its low band")

    def init(self, problem: Problem) -> Any:
        return ()

    def ask(self, problem: Problem, key: PRNGKeyArray, state: Any, generation: Int[Array, ""]) -> Any:
        return problem.draw(key)

    def tell(self, problem: Problem, state: Any, points: Any, scores: Float[Array, " n"]) -> Any:
        return state
