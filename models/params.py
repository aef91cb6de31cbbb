"""Parameters of networks, at less of a cost than Flax's to whoever traces one.

Flax traces a parameter's initializer wherever the parameter is used, to compare shapes: a fifth of the time until a
small search begins. Here shapes are compared as they are, and initializers are traced once a shape.
"""

from collections.abc import Callable, Sequence
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

Initializer = Callable[..., jax.Array]


def once_a_shape(initializer: Initializer) -> Initializer:
    """The same values; traced only where shape or dtype are new."""
    return jax.jit(initializer, static_argnums=(1, 2))


KERNEL = once_a_shape(nn.initializers.lecun_normal())
EMBEDDING = once_a_shape(nn.initializers.variance_scaling(1.0, "fan_in", "normal", out_axis=0))
VECTOR = once_a_shape(nn.initializers.normal(0.02))
ONES, ZEROS = nn.initializers.ones, nn.initializers.zeros


def first_values(module: nn.Module, key: jax.Array | None, *inputs: Any) -> Any:
    """Random params of a network that is called with such inputs; without a key zeros, to take the shapes of."""
    return module.init({} if key is None else key, *inputs)["params"]


def param(module: nn.Module, name: str, initializer: Initializer, shape: Sequence[int]) -> jax.Array | np.ndarray:
    """As `module.param`, from inside of it; zeros where there is neither a value nor a key.

    Raises:
      flax.errors.ScopeParamShapeError: the value that is there has another shape.
    """
    value = module.get_variable("params", name)
    if value is None and module.has_rng("params"):
        return module.param(name, initializer, tuple(shape))
    if value is None:
        return module.variable("params", name, jnp.zeros, tuple(shape)).value
    if np.shape(value) != tuple(shape):
        raise flax.errors.ScopeParamShapeError(name, module.scope.path_text, np.shape(value), tuple(shape))
    return value
