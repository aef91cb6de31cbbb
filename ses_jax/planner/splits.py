"""Along which axis a mesh splits each array of a program, followed from the program's arguments on.

XLA's partitioner decides. Products leave it little choice: one with a kernel whose outputs are split gives split
channels or heads, one over a split axis gives sums that every device has whole. Everything in between keeps what it is
given, so that this is followed operation by operation. Where it is not clear an array counts as whole.
"""

import math
from collections.abc import Callable, Mapping, Sequence

from jax.extend import core

# An axis by its place; None is no axis.
Axis = int | None
Shape = tuple[int, ...]
Atom = core.Var | core.Literal


def outputs(equation: core.JaxprEqn, axes: Sequence[Axis]) -> list[Axis]:
    """The split axes of what an equation without inner programs gives.

    Args:
      axes: those of its inputs, in their order.
    """
    if all(axis is None for axis in axes):
        return [None] * len(equation.outvars)
    rule = RULES.get(equation.primitive.name, _alike)
    return [rule(equation, axes, getattr(var.aval, "shape", ())) for var in equation.outvars]


def of_body(axes: Sequence[Axis], outside: Sequence[Atom], inside: Sequence[Atom]) -> list[Axis]:
    """From the arrays outside of a loop to those in its body, which for its rows have an axis less; or back."""
    return [
        None if axis is None else axis + _rank(within) - _rank(without)
        for axis, without, within in zip(axes, outside, inside, strict=True)
    ]


def _alike(equation: core.JaxprEqn, axes: Sequence[Axis], shape: Shape) -> Axis:
    """As in the first split input of the same rank: element by element, joined, cut, padded."""
    alike = (
        axis for var, axis in zip(equation.invars, axes, strict=True) if axis is not None and _rank(var) == len(shape)
    )
    return next(alike, None)


def _product(equation: core.JaxprEqn, axes: Sequence[Axis], shape: Shape) -> Axis:
    """Axes of both that go together come first, then those that are left of the first, then of the second."""
    summed, together = equation.params["dimension_numbers"]
    at = len(together[0])
    for var, axis, over, with_other in zip(equation.invars, axes, summed, together, strict=True):
        free = [place for place in range(_rank(var)) if place not in (*over, *with_other)]
        if axis in with_other:
            return with_other.index(axis)
        if axis in free:
            return at + free.index(axis)
        at += len(free)
    return None


def _broadcast(equation: core.JaxprEqn, axes: Sequence[Axis], shape: Shape) -> Axis:
    return None if axes[0] is None else int(equation.params["broadcast_dimensions"][axes[0]])


def _transposed(equation: core.JaxprEqn, axes: Sequence[Axis], shape: Shape) -> Axis:
    return None if axes[0] is None else equation.params["permutation"].index(axes[0])


def _reduced(equation: core.JaxprEqn, axes: Sequence[Axis], shape: Shape) -> Axis:
    """Of sums, largest and smallest elements, and of what loses axes of size 1."""
    given = equation.params
    gone = (given["axis"],) if "axis" in given else given.get("axes", given.get("dimensions", ()))
    if axes[0] is None or axes[0] in gone:
        return None
    return axes[0] - sum(1 for axis in gone if axis < axes[0])


def _stacked(equation: core.JaxprEqn, axes: Sequence[Axis], shape: Shape) -> Axis:
    axis = next(axis for axis in axes if axis is not None)
    return axis + (equation.params["axis"] <= axis)


def _reshaped(equation: core.JaxprEqn, axes: Sequence[Axis], shape: Shape) -> Axis:
    """The axis that as much stands before: heads and their channels that are taken apart, or joined."""
    if axes[0] is None:
        return None
    before = math.prod(equation.invars[0].aval.shape[: axes[0]])
    places = (place for place, size in enumerate(shape) if size > 1 and math.prod(shape[:place]) == before)
    return next(places, None)


def _whole(equation: core.JaxprEqn, axes: Sequence[Axis], shape: Shape) -> Axis:
    return None


def _rank(var: Atom) -> int:
    return len(getattr(var.aval, "shape", ()))


RULES: Mapping[str, Callable[[core.JaxprEqn, Sequence[Axis], Shape], Axis]] = {
    "dot_general": _product,
    "conv_general_dilated": _whole,
    "gather": _whole,
    "broadcast_in_dim": _broadcast,
    "transpose": _transposed,
    "reshape": _reshaped,
    "stack": _stacked,
    "unstack": _reduced,
    "squeeze": _reduced,
    "expand_dims": _reshaped,
    **dict.fromkeys(("argmax", "argmin", "reduce_and", "reduce_or"), _reduced),
    **dict.fromkeys(("reduce_sum", "reduce_max", "reduce_min", "reduce_prod"), _reduced),
}
