"""The head of LAION's aesthetic predictor and of ImageReward: five linear layers with nothing between them.

Reference: `MLP` in christophschuhmann/improved-aesthetic-predictor and THUDM/ImageReward (dropout is off).
"""

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

WIDTHS = (1024, 128, 64, 16, 1)


@dataclasses.dataclass(frozen=True)
class Config:
    """Size of what is scored."""

    input_size: int = 768

    @classmethod
    def from_json(cls, config: Mapping[str, Any]) -> "Config":
        """Reads `input_size`; published files come without a config."""
        return cls(config["input_size"])


def score(params: Any, x: Float[Array, "b d"]) -> Float[Array, "b"]:
    """One number for each row of `x [B, D]`, float32 if the params are, and then without shortcuts."""
    for i in range(len(WIDTHS)):
        layer = params[f"layer_{i}"]
        x = jnp.matmul(x.astype(layer["kernel"].dtype), layer["kernel"], precision="highest") + layer["bias"]
    return x[:, 0]


def init(key: jax.Array | None, config: Config) -> Any:
    """Random params, for tests; without a key zeros, for abstract shapes."""
    sizes = itertools.pairwise((config.input_size, *WIDTHS))
    return {
        f"layer_{i}": {
            "kernel": _kernel(key, i, fan_in, fan_out),
            "bias": jnp.zeros(fan_out),
        }
        for i, (fan_in, fan_out) in enumerate(sizes)
    }


def _kernel(key: jax.Array | None, place: int, fan_in: int, fan_out: int) -> jax.Array:
    if key is None:
        return jnp.zeros((fan_in, fan_out))
    return jax.random.normal(jax.random.fold_in(key, place), (fan_in, fan_out)) * fan_in**-0.5
