"""Spectral Evolution Search in JAX: better images from the text-to-image models you already have.

import ses_jax
result = ses_jax.search("a red circle left of a blue square on a white background", budget=50)
result.save("out")
"""

from pathlib import Path

# On disk `models/` and `convert/` stand beside this package; a checkout that was not installed finds them there.
if not (Path(__file__).parent / "models").exists():
    __path__.append(str(Path(__file__).parents[1]))

from ses_jax.batch.run import search_many
from ses_jax.engine import models as _models
from ses_jax.engine.config import SearchConfig
from ses_jax.engine.cost import Cost
from ses_jax.engine.result import SearchResult
from ses_jax.engine.search import generate, search
from ses_jax.loading import programs as _programs
from ses_jax.pipelines.base import Pipeline
from ses_jax.pipelines.registry import load_pipeline
from ses_jax.planner.plan import Plan, plan
from ses_jax.rewards.reward import Reward
from ses_jax.rewards.spec import load_reward
from ses_jax.searchers.searcher import Searcher


def clear_caches() -> None:
    """Lets go of the models and compiled programs that earlier calls left behind for later ones."""
    _models.forget()
    _programs.clear()


__all__ = [
    "Cost",
    "Pipeline",
    "Plan",
    "Reward",
    "SearchConfig",
    "SearchResult",
    "Searcher",
    "clear_caches",
    "generate",
    "load_pipeline",
    "load_reward",
    "plan",
    "search",
    "search_many",
]
__version__ = "0.1.0"
