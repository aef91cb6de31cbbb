"""What a search is: the facts that its result tells, and those that a saved one must agree in with who continues it."""

from collections.abc import Mapping, Sequence
from typing import Any

from ses_jax.engine.base import Base
from ses_jax.engine.config import SearchConfig
from ses_jax.pipelines.base import Pipeline
from ses_jax.rewards.reward import Reward


def settings_of(
    pipeline: Pipeline, reward: Reward, config: SearchConfig, index: int, base: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """What the result of a prompt says of the settings it was searched with, as plain JSON values."""
    facts = {
        "family": pipeline.family,
        "model": pipeline.source or str(pipeline.folder),
        "load": dict(pipeline.options),
        "reward": reward.name,
        "rewards": {part.name: part.weight for part in reward.parts},
        "reward_sources": reward.sources,
        "sigmas": [float(sigma) for sigma in pipeline.sigmas(config.steps, config.height, config.width)],
    }
    return config.as_json() | facts | dict(pipeline.changes) | {"prompt_index": int(index), "base_noise": base}


def identity_of(
    pipeline: Pipeline,
    reward: Reward,
    config: SearchConfig,
    prompts: Sequence[str],
    indices: Sequence[int],
    base: Base | None = None,
) -> dict[str, Any]:
    """What a saved search must agree in, as plain JSON values; how much fits at a time may change."""
    noises = {} if base is None else {"base_noise": [one["sha256"] for one in base.as_json()]}
    return {name: value for name, value in config.as_json().items() if name != "chunk"} | {
        **pipeline.changes,
        "load": dict(pipeline.options),
        "model": str(pipeline.folder),
        "rewards": [[part.name, part.weight] for part in reward.parts],  # in the order of the saved scores' columns
        "reward_sources": reward.sources,
        "prompts": list(prompts),
        "indices": [int(index) for index in indices],
        **noises,
    }
