"""The optimisers that the demo's networks are trained with."""

from typing import Any

import jax
import optax


def adamw(learning_rate: float) -> optax.GradientTransformation:
    """AdamW with clipped gradients."""
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(learning_rate, b2=0.99, weight_decay=1e-4))


def muon(learning_rate: float, adam_learning_rate: float) -> optax.GradientTransformation:
    """Muon for the matrices of stacked layers, Adam for everything else."""
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.contrib.muon(
            learning_rate,
            adam_learning_rate=adam_learning_rate,
            adam_b2=0.99,
            weight_decay=0.01,
            consistent_rms=0.2,
            muon_weight_dimension_numbers=_matrices,
        ),
    )


def _matrices(params: Any) -> Any:
    axes = optax.contrib.MuonDimensionNumbers(reduction_axis=1, output_axis=2)  # axis 0 counts the layers
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: axes if leaf.ndim == 3 and path[-1].key == "kernel" else None, params
    )
