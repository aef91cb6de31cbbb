"""Local search: the best so far are mutated, on the shell where Gaussian noise lies.

A child is `sqrt(1 - l^2) * parent + l * fresh noise`, which is standard normal where the parent is. Sources: the
zero-order search of arXiv 2501.09732, and the mutation of arXiv 2505.17618.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from ses_jax.searchers import elites
from ses_jax.searchers.elites import Elites
from ses_jax.searchers.options import Options, one_of, option, share, whole
from ses_jax.searchers.searcher import Problem


@dataclasses.dataclass(frozen=True, kw_only=True)
class ZeroOrder(Options):
    """The first generation is independent noise; each later one mutates the best so far, in turn."""

    parents: int = option(3, whole(at_least=1), "how many of the best so far are mutated, instead of `elites`")
    mutation: float = option(0.35, share, "share of fresh noise in a child, from 0 to 1; 1 is independent noise")
    anneal: int = option(
        50, whole(at_least=0), "the share falls from 1 to `mutation` over so many candidates; 0: it is constant"
    )
    space: str = option("whole", one_of("whole", "low"), "what is mutated: whole noise, or its low band")

    def init(self, problem: Problem) -> Elites:
        return elites.none(problem.space.like, self.parents)

    def ask(self, problem: Problem, key: PRNGKeyArray, state: Elites, generation: Int[Array, ""]) -> Array:
        held = jnp.isfinite(state.scores).sum()
        parent = jnp.arange(problem.population) % jnp.maximum(held, 1)
        fresh_share = jnp.where(held > 0, self.share(problem, generation), 1.0)
        kept_share = jnp.sqrt(1 - jnp.square(fresh_share))
        return jax.tree.map(
            lambda old, new: kept_share * old[parent] + fresh_share * new, state.points, problem.draw(key)
        )

    def tell(self, problem: Problem, state: Elites, points: Array, scores: Float[Array, " n"]) -> Elites:
        return elites.best(state, points, scores)

    def share(self, problem: Problem, generation: Int[Array, ""]) -> Float[Array, ""]:
        """Of fresh noise in the children of a generation; it does not depend on the budget."""
        steps = max(self.anneal / problem.population - 1, 0)  # the last of them has the smallest share
        done = jnp.clip(jnp.float32(generation) / steps, 0, 1) if steps else jnp.float32(1)
        return 1 + (self.mutation - 1) * done
