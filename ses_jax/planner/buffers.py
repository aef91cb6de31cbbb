"""Which arrays of a program are in memory, from its operations in their order, and how much at once.

XLA writes to memory what products, convolutions, reductions and loops give, and what all of these but reductions read;
the element-wise work between them is fused into its readers. A fused value of several readers that do not meet again in
one of them is written too, where that takes no more than what it is computed from, as the sum of a residual connection
does. Element-wise work on a product of its own size takes no memory beside it: a TPU does it as the product is
written, and the others write over the product; of several products that meet in such work this holds for the last. An
array lives from its writer to its last reader. What a loop carries is where the loop started it, if only the loop reads
that.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence

from ses_jax.planner.splits import Axis


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


def peak(operations: Sequence[Operation], rows: Sequence[Value]) -> int:
    """The largest sum of the bytes of what is in memory at once.

    Args:
      operations: the steps of the program, the last of which reads its results.
      rows: of a loop's arguments those that its body takes.
    """
    for operation in operations:
        for value in operation.inputs:
            value.readers += (operation,)
            value.needed |= not operation.fuses
    _settle_products(operations)
    _decide(rows)
    for operation in operations:
        _decide(operation.outputs)
    # XLA takes all rows that a loop's body needs at its start.
    return _sweep([Operation((), tuple(rows), fuses=False), *operations])


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
