"""What a device's own compiler says of the programs of a search, without the device.

The programs are those that a search runs (`engine.outline`): encoding of a prompt, one generation with its reward, and
the final images. A TPU's cycles become seconds at its clock; they leave out copies and traffic between devices. What
hand-written kernels cost is added at the rate that fused attention was measured at.
"""

import contextlib
import dataclasses
import functools
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax

from ses_jax.engine import memory, outline
from ses_jax.engine.config import SearchConfig
from ses_jax.engine.tasks import Task
from ses_jax.pipelines.base import Pipeline
from ses_jax.planner import hlo, topologies
from ses_jax.rewards.reward import Reward

LOG = logging.getLogger("ses_jax")
GENERATION = "generation"


@dataclasses.dataclass(frozen=True)
class Program:
    """One compiled program, bytes on each device.

    Attributes:
      compile_seconds: of this machine.
      argument_bytes, temporary_bytes, output_bytes: of a refused program only the temporaries, as the compiler names
        them.
      refusal: the compiler's words where the program takes more memory than the device has; empty otherwise.
      collectives: by kind, `count` and `bytes` of all that run.
      kernels: by name, how often those run that XLA did not make: cuDNN's, cuBLAS's and Mosaic's.
      seconds: a TPU's compiler's estimate; None for other devices and unknown clocks.
      readable: whether the program's text could be read, which the last three are from.
    """

    compile_seconds: float
    argument_bytes: int
    temporary_bytes: int
    output_bytes: int = 0
    refusal: str = ""
    collectives: Mapping[str, Mapping[str, int]] = dataclasses.field(default_factory=dict)
    kernels: Mapping[str, int] = dataclasses.field(default_factory=dict)
    seconds: float | None = None
    readable: bool = True

    @property
    def attention(self) -> str:
        """The fused attention kernels that it calls, or XLA."""
        if not self.readable:
            return "unknown kernels"
        fused = [name for name in self.kernels if any(word in name for word in ("fmha", "attention", hlo.SPLASH))]
        return ", ".join(fused) or "XLA"

    @property
    def working_bytes(self) -> int:
        """What it needs beside its arguments."""
        return self.temporary_bytes + self.output_bytes


@dataclasses.dataclass(frozen=True)
class Compilation:
    """The programs of a search as compiled for a device.

    Attributes:
      compiler: its version and JAX's.
      limit_bytes: what a device lets programs use.
      chunk: the most candidates at a time that fit; 1 where none do.
      encode_bytes, search_bytes: per device while prompts are encoded and while images are made, all weights included
        that stay there.
      fits: whether both are within the limit and nothing was refused.
      programs: by name, "encode", "generation" and "render".
      others: the generation with other chunks that were tried, by chunk.
    """

    compiler: str
    limit_bytes: int
    chunk: int
    encode_bytes: int
    search_bytes: int
    fits: bool
    programs: Mapping[str, Program]
    others: Mapping[int, Program]


@dataclasses.dataclass(frozen=True)
class Target:
    """What to compile for: a device by name, and the bytes of weights on each, whether a program takes them or not.

    Attributes:
      encode: while a prompt is encoded.
      search: while images are made.
      chunk: how many candidates at a time are expected to fit.
    """

    device: str
    encode: int
    search: int
    chunk: int


def compile_search(
    pipeline: Pipeline, reward: Reward, config: SearchConfig, tokens: Any, target: Target
) -> Compilation:
    """Compiles the programs of a search.

    Args:
      pipeline: on a mesh from `topologies.target_mesh`; its params may be shapes, as may those of the reward.
      config: resolved for the pipeline; its chunk is compiled for as it is, None is the largest that fits.
      tokens: of the prompts.
    """
    task = outline.outline(pipeline, reward, config, tokens)
    limit = topologies.limit_bytes(target.device)
    programs = {"encode": _compile(target, "encode", lambda: [outline.lower_encode(pipeline, tokens)])}
    chunk, tried = _fitting(task, target, int(memory.USABLE * limit))
    programs[GENERATION] = tried.pop(chunk)
    programs["render"] = _compile(target, "render", lambda: [outline.lower_render(task, chunk)])
    working = {name: program.working_bytes for name, program in programs.items()}
    needed = target.encode + working["encode"], target.search + max(working[GENERATION], working["render"])
    return Compilation(
        compiler=topologies.compiler(target.device),
        limit_bytes=limit,
        chunk=chunk,
        encode_bytes=needed[0],
        search_bytes=needed[1],
        fits=max(needed) <= limit and not any(program.refusal for program in programs.values()),
        programs=programs,
        others=tried,
    )


def _fitting(task: Task, target: Target, limit: int) -> tuple[int, dict[int, Program]]:
    """The most candidates at a time that fit, and the generations that were compiled, by chunk."""
    tried: dict[int, Program] = {}

    def working_bytes(chunk: int) -> int:
        if chunk not in tried:
            tried[chunk] = _compile(target, GENERATION, lambda: outline.lower_generation(task, chunk))
        return tried[chunk].working_bytes

    if task.config.chunk:
        working_bytes(task.program.chunk)
        return task.program.chunk, tried
    room = limit - target.search
    chunk = memory.fitting_chunk(working_bytes, min(target.chunk, task.program.chunk), room)
    # The estimate may have been too careful; temporaries grow about in proportion.
    larger = min(task.program.chunk, chunk * room // max(working_bytes(chunk), 1))
    if larger > chunk:
        chunk = max(chunk, memory.fitting_chunk(working_bytes, larger, room))
    return chunk, tried


def _compile(target: Target, name: str, lower: Callable[[], Sequence[jax.stages.Lowered]]) -> Program:
    """One program, or how it was refused; of several that run one after the other, what they come to."""
    # What options a compiler knows is asked of it on the way, and a TPU's must not see flags of other devices then.
    is_tpu = topologies.platform(target.device) == "tpu"
    with topologies.no_flags() if is_tpu else contextlib.nullcontext():
        programs = lower()
    return functools.reduce(_then, [_compile_one(target, name, lowered) for lowered in programs])


def _then(a: Program, b: Program) -> Program:
    """Two programs that run one after the other, as one."""
    kinds = {*a.collectives, *b.collectives}
    zero = {"count": 0, "bytes": 0}
    found = {kind: (a.collectives.get(kind, zero), b.collectives.get(kind, zero)) for kind in sorted(kinds)}
    larger = {name: max(getattr(a, name), getattr(b, name)) for name in ("argument_bytes", "temporary_bytes")}
    return Program(
        compile_seconds=a.compile_seconds + b.compile_seconds,
        **larger,
        output_bytes=max(a.working_bytes, b.working_bytes) - larger["temporary_bytes"],
        refusal=a.refusal or b.refusal,
        collectives={kind: {key: x[key] + y[key] for key in zero} for kind, (x, y) in found.items()},
        kernels=dict(Counter(a.kernels) + Counter(b.kernels)),
        seconds=None if None in (a.seconds, b.seconds) else a.seconds + b.seconds,
        readable=a.readable and b.readable,
    )


def _compile_one(target: Target, name: str, lowered: jax.stages.Lowered) -> Program:
    start = time.perf_counter()
    try:
        with topologies.no_flags():
            compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if not memory.is_exhausted(error):
            raise
        seconds = time.perf_counter() - start
        return Program(seconds, 0, memory.refused_bytes(error), refusal=str(error).strip())
    seconds = time.perf_counter() - start
    LOG.info("compiled %s for %s in %.0f s", name, target.device, seconds)
    sizes, read = compiled.memory_analysis(), _instructions(compiled)
    found = read or []
    return Program(
        compile_seconds=seconds,
        argument_bytes=sizes.argument_size_in_bytes,
        temporary_bytes=sizes.temp_size_in_bytes,
        output_bytes=sizes.output_size_in_bytes - sizes.alias_size_in_bytes,
        collectives=hlo.collectives(found),
        kernels=hlo.kernels(found),
        seconds=None if read is None else _seconds(target.device, read),
        readable=read is not None,
    )


def _instructions(compiled: jax.stages.Compiled) -> list[hlo.Instruction] | None:
    """What the optimised program runs; None where it cannot be read.

    A compiler that is newer than JAX writes what JAX's parser may not know, and any may write loops that ours does not.
    """
    try:
        return list(hlo.instructions(compiled.as_text()))
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        LOG.warning("the optimised program cannot be read: %s", str(error).splitlines()[0])
        return None


def _seconds(device: str, found: list[hlo.Instruction]) -> float | None:
    clock = topologies.clock(device)
    return clock and hlo.cycles(found) / clock + hlo.kernel_flops(found) / topologies.kernel_rate(device)


def lines(compilation: Compilation) -> Iterator[tuple[str, str]]:
    """Names and texts for people."""
    yield "compiled with", compilation.compiler
    for name, program in compilation.programs.items():
        yield f"  {name}", program.refusal.splitlines()[0] if program.refusal else ", ".join(_facts(program))
    for chunk, program in compilation.others.items():
        yield f"  chunk {chunk}", f"{_gib(program.working_bytes)} of temporaries"
    needed, limit = max(compilation.encode_bytes, compilation.search_bytes), compilation.limit_bytes
    yield "  at most", f"{_gib(needed)} of {_gib(limit)} on a device, chunk {compilation.chunk}"


def _facts(program: Program) -> Iterator[str]:
    yield f"{_gib(program.argument_bytes)} of arguments"
    yield f"{_gib(program.working_bytes)} of temporaries"
    yield f"attention by {program.attention}"
    for kind, total in program.collectives.items():
        yield f"{total['count']} {kind} of {_gib(total['bytes'])}"
    if program.seconds is not None:
        yield f"{program.seconds:.3g} s by the compiler's estimate"
    yield f"compiled in {program.compile_seconds:.0f} s"


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"
