"""How much memory a function's temporaries need at once, estimated from its jaxpr: nothing is compiled or allocated.

XLA writes to memory what products, convolutions, reductions and loops give, and what all of these but reductions read;
the element-wise work between them is fused into its readers. A fused value of several readers that do not meet again in
one of them is written too, where that takes no more than what it is computed from, as the sum of a residual connection
does. Element-wise work on a product of its own size takes no memory beside it: a TPU does it as the product is
written, and the others write over the product; of several products that meet in such work this holds for the last. An
array lives from its writer to its last reader. What a loop carries is where the loop started it, if only the loop reads
that. The body of a loop adds its own peak. Arguments are not counted; the rows of them that a loop takes are, all of
them from the start of its body.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend import core

from ses_jax.engine import flops
from ses_jax.planner import splits
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


@dataclasses.dataclass(eq=False)
class Value:
    """An array of the program.

    Attributes:
      size: bytes on a device.
      kind: "argument", "view", "fused", "written", or "carried" where a loop started it; "product" until its readers
        are known.
      inputs: what it is computed from.
      readers: the operations that read it.
      needed: whether an operation reads it that fuses nothing.
      axis: along which it is split.
      buffers: the written arrays that must live where it is read; set when its memory is decided on.
    """

    size: int
    kind: str = "fused"
    inputs: tuple["Value", ...] = ()
    axis: Axis = None
    readers: "tuple[Operation, ...]" = ()
    needed: bool = False
    buffers: frozenset["Value"] = frozenset()


@dataclasses.dataclass(frozen=True, eq=False)
class Operation:
    """A step of the program: what it reads and gives, the peak inside it, and whether it fuses what it reads."""

    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    inside: int = 0
    fuses: bool = True


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
    for operation in operations:
        for value in operation.inputs:
            value.readers += (operation,)
            value.needed |= not operation.fuses
    _settle_products(operations)
    _decide(values[var] for var in sliced)
    for operation in operations:
        _decide(operation.outputs)
    # XLA takes all rows that a loop's body needs at its start.
    operations.insert(0, Operation((), tuple(values[var] for var in sliced), fuses=False))
    return _sweep(operations), [values[var].axis if isinstance(var, core.Var) else None for var in jaxpr.outvars]


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
    """What a loop carries: what it gives, and what it starts from."""
    count = {"scan": equation.params.get("num_carry"), "while": len(outputs)}.get(equation.primitive.name, 0)
    first = equation.params["num_consts"] if equation.primitive.name == "scan" else len(equation.invars) - count
    for value, start in zip(outputs[:count], equation.invars[first : first + count], strict=True):
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


def _settle_products(operations: Sequence[Operation]) -> None:
    """Settles which products are written: of those that one fusion reads, all but the last."""
    last = {}
    for value in (value for operation in operations for value in operation.outputs if value.kind == "product"):
        value.kind = "written"
        if value.needed or len(value.readers) != 1:
            continue
        *_, end = _fusion(value.readers[0])
        if any(result.kind == "fused" and result.size == value.size for result in end.outputs):
            last[end] = value
    for value in last.values():
        value.kind = "fused"


def _decide(values: Iterable[Value]) -> None:
    """Settles which values are written, and what the others are computed from."""
    for value in values:
        sources = frozenset().union(*(source.buffers for source in value.inputs))
        if value.kind == "view":
            if value.needed and not all(_in_memory(source) for source in value.inputs):
                value.kind = "written"
        elif value.kind == "carried":
            (start,) = value.inputs
            if start.kind not in ("written", "carried") or value not in start.readers[-1].outputs:
                value.kind = "written"
        elif value.kind == "fused":
            recomputed = sum(source.size for source in sources)
            if value.needed or (not _meet(value.readers) and recomputed >= value.size):
                value.kind = "written"
        value.buffers = frozenset([value]) if value.kind == "written" else sources


def _meet(readers: Sequence[Operation]) -> bool:
    """Whether what operations give comes together in one of them before anything is written."""
    return not readers or bool(set.intersection(*(set(_fusion(operation)) for operation in readers)))


def _fusion(operation: Operation) -> Iterator[Operation]:
    """An operation and those after it that can only be fused with it: the one reader of a value that is not written."""
    yield operation
    while len(operation.outputs) == 1:
        (value,) = operation.outputs
        if value.kind != "fused" or value.needed or len(value.readers) != 1:
            return
        (operation,) = value.readers
        yield operation


def _in_memory(value: Value) -> bool:
    """Whether a view of the value needs no memory of its own."""
    return value.kind in ("argument", "written", "carried") or (
        value.kind == "view" and all(_in_memory(source) for source in value.inputs)
    )


def _sweep(operations: Sequence[Operation]) -> int:
    """The largest sum of the sizes of what lives at once."""
    first, last = {}, {}
    for index, operation in enumerate(operations):
        for value in operation.inputs:
            for buffer in value.buffers:
                last[buffer] = index
                first.setdefault(buffer, index)
        for value in operation.outputs:
            # What depends on arguments alone is computed where it is read first, too.
            if value.kind == "written" and (not operation.fuses or any(source.buffers for source in value.inputs)):
                first[value] = last[value] = index
    starts, ends = _by_index(first), _by_index(last)
    live = peak = 0
    for index, operation in enumerate(operations):
        live += sum(buffer.size for buffer in starts.get(index, ()))
        peak = max(peak, live + operation.inside)
        live -= sum(buffer.size for buffer in ends.get(index, ()))
    return peak


def _by_index(when: dict[Value, int]) -> dict[int, list[Value]]:
    found: dict[int, list[Value]] = {}
    for value, index in when.items():
        found.setdefault(index, []).append(value)
    return found


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
