"""How much memory a function's temporaries need at once, estimated from its jaxpr: nothing is compiled or allocated.

This follows the jaxpr: which equations write, fuse or view, what loops carry and what their bodies need at most. What
is in memory then, and for how long, is in `buffers`. Arguments are not counted; the rows of them that a loop takes are.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend import core

from ses_jax.engine import flops
from ses_jax.planner import buffers, splits
from ses_jax.planner.buffers import Operation, Value
from ses_jax.planner.splits import Axis

CALLS = ("jit", "pjit", "closed_call", "core_call", "custom_jvp_call", "custom_vjp_call", "checkpoint", "remat2")
VIEWS = ("reshape", "squeeze", "expand_dims", "stop_gradient", "copy", "sharding_constraint", "optimization_barrier")
# Gaps between arrays, and copies in the layouts that kernels ask for.
SLACK = 1.2
PRODUCTS = ("dot_general", "conv_general_dilated")
# These write their results, and read only what is written.
OPAQUE = (*PRODUCTS, "sort", "cumsum", "fft", "cond", "scan", "while")
REDUCTIONS = ("reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "reduce_and", "reduce_or", "argmax", "argmin")


def temporary_bytes(function: Callable[..., Any], *args: Any) -> int:
    """Peak bytes of what a call allocates, its results included and its arguments left out.

    Args:
      function: anything JAX can trace.
      args: its arguments; arrays or `jax.ShapeDtypeStruct`s.
    """
    return temporary_bytes_of_jaxpr(jax.make_jaxpr(function)(*args).jaxpr)


def temporary_bytes_of_jaxpr(jaxpr: core.Jaxpr, axes: Sequence[Axis] | None = None, parts: int = 1) -> int:
    """The same of a jaxpr that is at hand already; on each of several devices if its arguments are split over them.

    Args:
      axes: of each argument the axis that is split; None is none of any.
      parts: over how many devices.
    """
    axes = [None] * len(jaxpr.invars) if axes is None else axes
    given = zip(jaxpr.invars, axes, strict=True)
    values = {var: Value(_size(var, axis, parts), "argument", axis=axis) for var, axis in given}
    return int(SLACK * _peak(jaxpr, values, (), parts)[0])


def size_of(tree: Any) -> int:
    """Bytes of all arrays or shapes of a pytree."""
    return sum(int(np.prod(leaf.shape)) * np.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(tree))


def _peak(jaxpr: core.Jaxpr, values: dict[Any, Value], sliced: Sequence[Any], parts: int) -> tuple[int, list[Axis]]:
    """Peak bytes of a jaxpr, and along which axes its results are split.

    Args:
      values: its arguments.
      sliced: those of them that are rows of a loop's arguments.
    """
    values = {var: Value(_size(var), "argument") for var in jaxpr.constvars} | values
    operations = list(_operations(jaxpr, values, parts))
    results = [values[var] for var in jaxpr.outvars if isinstance(var, core.Var)]
    operations.append(Operation(tuple(results), (), fuses=False))
    peak = buffers.peak(operations, [values[var] for var in sliced])
    return peak, [values[var].axis if isinstance(var, core.Var) else None for var in jaxpr.outvars]


def _operations(jaxpr: core.Jaxpr, values: dict[Any, Value], parts: int) -> Iterator[Operation]:
    """The steps of a jaxpr in their order, those of the functions it calls among them; fills `values`."""
    for equation in jaxpr.eqns:
        inputs = tuple(values[var] for var in equation.invars if isinstance(var, core.Var))
        name = equation.primitive.name
        inner = list(flops.inner_jaxprs(equation))
        if name in CALLS and len(inner) == 1:
            yield from _called(equation, inner[0], values, parts)
            continue
        fuses = name not in OPAQUE and not inner
        axes = [values[var].axis if isinstance(var, core.Var) else None for var in equation.invars]
        inside, axes = _inside(equation, inner, axes, parts) if inner else (0, splits.outputs(equation, axes))
        given = zip(equation.outvars, axes, strict=True)
        outputs = tuple(Value(_size(var, axis, parts), _kind(name, fuses), inputs, axis) for var, axis in given)
        for value, start in _carried(equation, outputs, values):
            value.kind, value.inputs = "carried", (start,)
        values.update(zip(equation.outvars, outputs, strict=True))
        yield Operation(inputs, outputs, inside, fuses and name not in VIEWS)


def _kind(name: str, fuses: bool) -> str:
    """What a primitive gives, before its readers are known."""
    if name in VIEWS:
        return "view"
    if name in PRODUCTS:
        return "product"
    return "fused" if fuses and name not in REDUCTIONS else "written"


def _carried(
    equation: core.JaxprEqn, outputs: Sequence[Value], values: dict[Any, Value]
) -> Iterator[tuple[Value, Value]]:
    """What a loop carries: what it gives, and what it starts from; that is given last, but for the rows of a scan."""
    if equation.primitive.name not in ("scan", "while"):
        return
    end = len(equation.invars)
    if equation.primitive.name == "scan":
        (body,) = flops.inner_jaxprs(equation)
        end -= len(_rows(equation, equation.invars, body.invars))
        given = zip(outputs, equation.outvars, body.outvars, strict=True)
        outputs = [value for value, whole, inside in given if _rank(whole) == _rank(inside)]
    for value, start in zip(outputs, equation.invars[end - len(outputs) : end], strict=True):
        if isinstance(start, core.Var):
            yield value, values[start]


def _inside(
    equation: core.JaxprEqn, bodies: Sequence[core.Jaxpr], axes: Sequence[Axis], parts: int
) -> tuple[int, list[Axis]]:
    """The largest peak of a loop's or a condition's bodies, and along which axes its results are split."""
    peak, found = 0, [None] * len(equation.outvars)
    for body in bodies:
        # What comes first may be for others: it chooses a branch, or ends a loop.
        count = min(len(body.invars), len(axes))
        outside, inside = equation.invars[len(axes) - count :], body.invars[len(body.invars) - count :]
        split = splits.of_body(axes[len(axes) - count :], outside, inside)
        sliced = _rows(equation, outside, inside)
        values = {var: Value(_size(var), "argument") for var in body.invars}
        for var, axis in zip(inside, split, strict=True):
            values[var] = Value(_size(var, axis, parts), "fused" if var in sliced else "argument", axis=axis)
        bytes_inside, results = _peak(body, values, sliced, parts)
        peak = max(peak, bytes_inside)
        if len(results) == len(found):
            found = splits.of_body(results, body.outvars, equation.outvars)
    return peak, found


def _called(equation: core.JaxprEqn, body: core.Jaxpr, values: dict[Any, Value], parts: int) -> Iterator[Operation]:
    """The steps of a function that an equation calls."""
    inner = {var: Value(_size(var), "argument") for var in body.constvars}
    for var, given in zip(body.invars, equation.invars, strict=True):
        inner[var] = values[given] if isinstance(given, core.Var) else Value(_size(var), "argument")
    yield from _operations(body, inner, parts)
    for var, given in zip(equation.outvars, body.outvars, strict=True):
        values[var] = inner[given] if isinstance(given, core.Var) else Value(_size(var), "argument")


def _rows(equation: core.JaxprEqn, outside: Sequence[Any], inside: Sequence[Any]) -> list[Any]:
    """The variables of a scan's body that are rows of its arguments: they have an axis less."""
    if equation.primitive.name != "scan":
        return []
    return [var for var, whole in zip(inside, outside, strict=True) if _rank(whole) > _rank(var)]


def _rank(var: Any) -> int:
    return len(getattr(var.aval, "shape", ()))


def _size(var: Any, axis: Axis = None, parts: int = 1) -> int:
    """Bytes of an array; of one that is split, of the largest part."""
    aval = var.aval
    if not hasattr(aval, "shape"):
        return 0
    shape = list(aval.shape)
    if axis is not None:
        shape[axis] = -(-shape[axis] // parts)
    width = getattr(aval.dtype, "itemsize", 8)  # keys have no such thing
    return int(np.prod(shape)) * width
