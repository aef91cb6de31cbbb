"""What is in an optimised program, read from XLA's text of it: collectives, kernels, cycles, as often as they run."""

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
MOSAIC = "tpu_custom_call"
SPLASH = "splash"  # begins the name of the attention kernel in `models.splash`, which does not say what it costs
# Of custom calls, those that compute; the others are remarks of the compiler.
KERNELS = (MOSAIC, "__cudnn$", "__cublas$", "__gpu$")
BITS = {"pred": 8, "token": 0}

COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?[\w.\-]+ = (\(.*?\)|\S+) ([a-z][\w\-]*)\(")
ARRAY = re.compile(r"([a-z]+\d*)\w*\[([\d,]*)\]")
BOUND = re.compile(r"[su]32\[\][^=]* constant\((\d+)\)")
# Computations that an instruction runs besides a loop's.
INNER = re.compile(r"(?:calls|to_apply|branch_computations|called_computations)=(?:\{([^}]*)\}|%?([\w.\-]+))")


class Instruction(NamedTuple):
    """One line of a program.

    Attributes:
      opcode: what it does.
      shape: of its result.
      line: all of it.
      times: how often it runs.
      fused: whether it is part of a larger instruction that says what both cost.
    """

    opcode: str
    shape: str
    line: str
    times: int
    fused: bool


class Program(NamedTuple):
    """The computations of a program by name, and which of them is the first."""

    computations: Mapping[str, list[str]]
    entry: str


def instructions(text: str) -> Iterator[Instruction]:
    """The instructions that a program runs, those of loops and called computations too.

    Args:
      text: `as_text()` of a `jax.stages.Compiled`.

    Raises:
      ValueError: for a loop whose number of turns is not to be found.
    """
    program = _parse(text)
    yield from _run(program, program.entry, 1, fused=False)


def collectives(found: list[Instruction]) -> dict[str, dict[str, int]]:
    """By kind, how many collectives run and the bytes of their results on each device."""
    totals: dict[str, dict[str, int]] = {}
    for each in found:
        kind = each.opcode.removesuffix("-start")
        if kind in COLLECTIVES:
            total = totals.setdefault(kind, {"count": 0, "bytes": 0})
            total["count"] += each.times
            total["bytes"] += each.times * _result_bytes(each)
    return totals


def kernels(found: list[Instruction]) -> dict[str, int]:
    """By name, how often hand-written kernels run."""
    counts: Counter[str] = Counter()
    for each in found:
        target = re.search(r'custom_call_target="([^"]+)"', each.line)
        if target and target[1].startswith(KERNELS):
            counts[_kernel_name(each.line) if target[1] == MOSAIC else target[1]] += each.times
    return dict(counts)


def cycles(found: list[Instruction]) -> int:
    """The compiler's own estimate of what runs on a TPU's core; kernels, copies and collectives are not in it."""
    estimates = ((each, re.search(r'"estimated_cycles":"(\d+)"', each.line)) for each in found if not each.fused)
    return sum(each.times * int(estimate[1]) for each, estimate in estimates if estimate)


def kernel_flops(found: list[Instruction]) -> int:
    """Floating point operations of the kernels: what they say, and for splash attention what its shapes say."""
    return sum(each.times * _flops(each.line) for each in found if MOSAIC in each.line)


def _flops(line: str) -> int:
    if said := re.search(r'"flops":"?(\d+)', line):
        return int(said[1])
    arrays = ARRAY.findall(line.partition("constraints=")[2])
    # Queries, keys and values, [rows, heads, tokens, channels]; a single row has no axis.
    heads = [[int(size) for size in sizes.split(",")] for dtype, sizes in arrays if dtype.startswith(("bf", "f"))]
    if SPLASH not in line or len(heads) < 3:
        return 0
    return 4 * math.prod(heads[0]) * heads[1][-2]


def _kernel_name(line: str) -> str:
    """A Mosaic kernel's own name, or where in the program it stands."""
    for pattern in (r"kernel_name[^\w]+([\w.\-]+)", rf"%({SPLASH}\w*)", r'op_name="[^"]*?([\w.\-]+)"'):
        if name := re.search(pattern, line):
            return f"mosaic {name[1]}"
    return "mosaic"


def _parse(text: str) -> Program:
    computations: dict[str, list[str]] = {}
    current, entry = None, None
    for line in text.splitlines():
        if line == "}":
            current = None
        elif current is None and (match := COMPUTATION.match(line)):
            current = computations.setdefault(match[2], [])
            entry = match[2] if match[1] else entry
        elif current and not line.startswith(" "):
            current[-1] += line  # what a kernel says of itself has lines of its own
        elif current is not None:
            current.append(line)
    if entry is None:
        raise ValueError("no entry computation in the text of the program")
    return Program(computations, entry)


def _run(program: Program, name: str, times: int, *, fused: bool) -> Iterator[Instruction]:
    for line in program.computations[name]:
        match = INSTRUCTION.match(line)
        if not match:
            continue
        shape, opcode = match[1], match[2]
        yield Instruction(opcode, shape, line, times, fused)
        if opcode == "while":
            body = re.search(r"body=%?([\w.\-]+)", line)[1]
            yield from _run(program, body, times * _turns(program, line), fused=fused)
            continue
        for called in _called(line):
            yield from _run(program, called, times, fused=fused or opcode == "fusion")


def _called(text: str) -> list[str]:
    """The computations that instructions call."""
    names = (several or one for several, one in INNER.findall(text))
    return [name.strip().removeprefix("%") for listed in names for name in listed.split(",")]


def _turns(program: Program, line: str) -> int:
    """How often a loop's body runs: as XLA says, or by the bound that its condition compares with."""
    if said := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', line):
        return int(said[1])
    condition = "\n".join(program.computations[re.search(r"condition=%?([\w.\-]+)", line)[1]])
    step = _step(condition, program.computations[re.search(r"body=%?([\w.\-]+)", line)[1]])
    for body in (condition, *("\n".join(program.computations[name]) for name in _called(condition))):
        if bounds := [int(bound) for bound in BOUND.findall(body)]:
            return -(-max(bounds) // step)
    raise ValueError(f"how often does this loop run? {line.strip()[:200]}")


def _step(condition: str, body: Sequence[str]) -> int:
    """What a loop adds to its counter: 1, but for products that go with the rounds of a ring of devices."""
    counters = re.findall(r"get-tuple-element\(.*?\), index=(\d+)", condition)
    result = next((re.findall(r"%[\w.\-]+", line.partition(" tuple(")[2]) for line in body if "ROOT " in line), [])
    if len(counters) != 1 or int(counters[0]) >= len(result):
        return 1
    text = "\n".join(body)
    added = re.search(rf"{re.escape(result[int(counters[0])])} = [^=]* add\(.*?(%[\w.\-]+)\)", text)
    constant = added and re.search(rf"{re.escape(added[1])} = [^=]* constant\((\d+)\)", text)
    return int(constant[1]) if constant else 1


def _result_bytes(each: Instruction) -> int:
    """Of a collective that is started here and done elsewhere, the shape is a pair of what goes in and what comes."""
    arrays = [_bytes(*array) for array in ARRAY.findall(each.shape)]
    if each.opcode in ("all-gather-start", "collective-permute-start"):
        arrays = [size for size in arrays if size > 4]  # without its counters
        arrays = arrays[len(arrays) // 2 :]
    return sum(arrays)


def _bytes(dtype: str, sizes: str) -> int:
    digits = re.search(r"\d+", dtype)
    bits = BITS.get(dtype, int(digits[0]) if digits else 0)
    return math.prod(int(size) for size in sizes.split(",") if size) * bits // 8
