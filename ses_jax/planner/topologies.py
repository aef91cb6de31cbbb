"""Meshes of devices that need not be there, for XLA's compilers: TPUs as libtpu knows them, NVIDIA GPUs by their facts.

Facts of NVIDIA GPUs, of which the compiler chooses tiles and kernels:

    A100, H100, H200, B200   OpenXLA, `xla/backends/gpu/target_config/specs/`
    4090, 5090               NVIDIA's whitepapers "Ada GPU Architecture" and "RTX Blackwell GPU Architecture" (cores,
                             caches, clocks, memory), "CUDA C++ Programming Guide", compute capabilities 8.9 and 12.0

Clocks of TPUs turn the compiler's cycles into seconds. They follow from peak arithmetic, two operations a cycle for
each cell of a core's matrix units ("How to Scale Your Model", jax-ml.github.io/scaling-book); that of v6e is taken to
be v5p's, and none is published for TPU7x. Rates of fused attention on v5p, v6e and TPU7x are medians in Tokamax's
tuning data for 4096 and 16384 tokens and heads of 128 (openxla/tokamax, `data/autotuning`); that of v5e is v5p's share
of the peak.
"""

import contextlib
import importlib.metadata
import math
import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh

from ses_jax.loading import partition
from ses_jax.planner.devices import GIB


class Tpu(NamedTuple):
    """A generation of TPUs.

    Attributes:
      kind: its name before the colon of a topology.
      sizes: topologies by how many devices they have.
      clock: cycles a second; None where it is not published.
      limit: bytes of a device that libtpu lets programs use, in the words of its refusals.
      kernels: FLOP/s of fused attention.
    """

    kind: str
    sizes: dict[int, str]
    clock: float | None
    limit: int
    kernels: float


class Gpu(NamedTuple):
    """An NVIDIA GPU.

    Attributes:
      title: as its driver names it.
      capability: compute capability, major and minor.
      cores: multiprocessors; `lanes`, `threads`, `shared` and `block_shared` are those of each: float32 units, the most
        threads, bytes of shared memory, and how many of them a block may have.
      cache: bytes of L2.
      clock: cycles a second.
      bandwidth: bytes/s of its memory.
      memory: bytes.
    """

    title: str
    capability: tuple[int, int]
    cores: int
    lanes: int
    threads: int
    shared: int
    block_shared: int
    cache: int
    clock: float
    bandwidth: float
    memory: int


FLAT = {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
CUBES = {1: "1x1x1", 4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8"}
TPUS = {
    "v5e": Tpu("v5e", FLAT, 1.5e9, int(15.75 * GIB), 160e12),
    "v5p": Tpu("v5p", CUBES, 1.75e9, int(95.73 * GIB), 390e12),
    "v6e": Tpu("v6e", FLAT, 1.75e9, int(31.24 * GIB), 300e12),
    # Two devices a chip.
    "tpu7x": Tpu("tpu7x", {2 * chips: shape for chips, shape in CUBES.items()}, None, int(94.74 * GIB), 370e12),
}
GPUS = {
    "a100-40": Gpu(
        "NVIDIA A100-SXM4-40GB", (8, 0), 108, 64, 2048, 167936, 166912, 41943040, 1.41e9, 1.5552e12, 42331013120
    ),
    "a100-80": Gpu(
        "NVIDIA A100-SXM4-80GB", (8, 0), 108, 64, 2048, 167936, 166912, 41943040, 1.41e9, 2.03904e12, 85100068864
    ),
    "h100": Gpu(
        "NVIDIA H100 80GB HBM3", (9, 0), 132, 128, 2048, 233472, 232448, 52428800, 1.98e9, 3.35232e12, 84942979072
    ),
    "h200": Gpu("NVIDIA H200", (9, 0), 132, 128, 2048, 233472, 232448, 52428800, 1.98e9, 4.8e12, 151397597184),
    "b200": Gpu("NVIDIA B200", (10, 0), 148, 128, 2048, 233472, 232448, 132644864, 1.965e9, 7.67232e12, 191514411008),
    "4090": Gpu(
        "NVIDIA GeForce RTX 4090", (8, 9), 128, 128, 1536, 102400, 101376, 75497472, 2.52e9, 1.008e12, 24 * GIB
    ),
    "5090": Gpu(
        "NVIDIA GeForce RTX 5090", (12, 0), 170, 128, 1536, 102400, 101376, 100663296, 2.407e9, 1.792e12, 32 * GIB
    ),
}
# Of an NVIDIA GPU's memory; the rest is the driver's and the runtime's.
USABLE = 0.95

# What XLA wants to know beside the device's own facts; every CUDA device has the same.
COMMON = {
    "threads_per_block_limit": 1024,
    "threads_per_warp": 32,
    "shared_memory_per_block": 49152,
    "block_dim_limit_x": 2147483647,
    "block_dim_limit_y": 65535,
    "block_dim_limit_z": 65535,
    "registers_per_core_limit": 65536,
    "registers_per_block_limit": 65536,
}
LIBRARIES = "dnn_version_info { major: 9 minor: 10 patch: 0 }\nruntime_version { major: 12 minor: 9 patch: 0 }"


# Of libtpu where there is no TPU: it neither asks the cloud where it is nor minds other processes.
QUIET = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v6e-8",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
}
PLUGINS = ("jax-cuda12-plugin", "jax-cuda13-plugin")
# Else JAX's plugin for CUDA looks for a GPU when it is loaded, and is not to be had without one.
NO_GPU = ("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")


def target_mesh(device: str, mesh: str) -> Mesh:
    """A mesh to compile for.

    Args:
      device: a key of `TPUS` or `GPUS`.
      mesh: sizes of its axes, such as "data=4,model=2".

    Raises:
      ValueError: for other devices, meshes that no topology holds, and where the device's compiler is not installed.
    """
    sizes = partition.parse_axes(mesh)
    shape = tuple(sizes[axis] for axis in partition.AXES)
    devices = _tpus(device, math.prod(shape)) if device in TPUS else _gpus(device, math.prod(shape))
    return Mesh(np.array(devices).reshape(shape), partition.AXES)


def available(device: str) -> bool:
    """Whether the device's compiler is installed."""
    return any(map(_installed, ["libtpu"] if device in TPUS else PLUGINS))


def limit_bytes(device: str) -> int:
    """How much of its memory a device lets programs use."""
    return TPUS[device].limit if device in TPUS else int(USABLE * GPUS[device].memory)


def clock(device: str) -> float | None:
    """Cycles a second that the compiler's estimates count in; None where it makes none."""
    return TPUS[device].clock if device in TPUS else None


def platform(device: str) -> str:
    """What JAX calls a device's kind: "tpu" or "gpu"."""
    return "tpu" if device in (*TPUS, "v4") else "gpu"  # a v4 is not compiled for


def kernel_rate(device: str) -> float:
    """FLOP/s of a TPU's fused attention."""
    return TPUS[device].kernels


def compiler(device: str) -> str:
    """The versions that a program depends on."""
    library = "libtpu" if device in TPUS else _plugin()
    return f"jax {jax.__version__}, {library} {importlib.metadata.version(library)}"


@contextlib.contextmanager
def no_flags() -> Iterator[None]:
    """Hides `XLA_FLAGS`: libtpu reads them when it first compiles, and ends the process over one it does not know."""
    flags = os.environ.pop("XLA_FLAGS", None)
    try:
        yield
    finally:
        if flags is not None:
            os.environ["XLA_FLAGS"] = flags


def gpu_target(gpu: Gpu) -> str:
    """A GPU as XLA reads it: the text of a `GpuTargetConfigProto`."""
    facts = COMMON | {
        "shared_memory_per_core": gpu.shared,
        "threads_per_core_limit": gpu.threads,
        "core_count": gpu.cores,
        "fpus_per_core": gpu.lanes,
        "memory_bandwidth": int(gpu.bandwidth),
        "l2_cache_size": gpu.cache,
        "clock_rate_ghz": gpu.clock / 1e9,
        "device_memory_size": gpu.memory,
        "shared_memory_per_block_optin": gpu.block_shared,
    }
    lines = [f"  {name}: {value}" for name, value in facts.items()]
    lines.append("  cuda_compute_capability {{ major: {} minor: {} }}".format(*gpu.capability))
    info = "\n".join(["gpu_device_info {", *lines, "}"])
    return f'{info}\nplatform_name: "CUDA"\n{LIBRARIES}\ndevice_description_str: "{gpu.title}"\n'


def _tpus(device: str, count: int) -> list[Any]:
    """The first devices of the smallest topology that has so many."""
    tpu = TPUS[device]
    size = min((size for size in tpu.sizes if size >= count), default=None)
    if size is None:
        raise ValueError(f"{count} devices of {device}: the largest topology to compile for has {max(tpu.sizes)}")
    if not available(device):
        raise ValueError(f"compiling for {device} takes libtpu, not the device: pip install 'ses_jax[tpu]'")
    if jax.default_backend() != "tpu":
        for name, value in QUIET.items():
            os.environ.setdefault(name, value)
    shape = tpu.sizes[size]
    return topologies.get_topology_desc(
        f"{tpu.kind}:{shape}", platform="tpu", chips_per_host_bounds=_host(shape)
    ).devices[:count]


def _host(shape: str) -> tuple[int, ...]:
    """The chips of one host along the axes of a topology such as "2x4": at most a square of four."""
    sides = [int(side) for side in shape.split("x")] + [1]
    return tuple(min(side, most) for side, most in zip(sides, (2, 2, 1), strict=False))


def _gpus(device: str, count: int) -> list[Any]:
    """GPUs of one host."""
    if device not in GPUS:
        raise ValueError(f"no compiler for {device!r} is known; known: {', '.join([*TPUS, *GPUS])}")
    if not available(device):
        raise ValueError(
            f"compiling for {device} takes JAX with CUDA (3 GB), not the device: pip install 'ses_jax[cuda]'"
        )
    shape, config = f"1x1x{count}", gpu_target(GPUS[device])
    os.environ.setdefault(*NO_GPU)
    try:
        return topologies.get_topology_desc(shape, platform="cuda", target_config=config, topology=shape).devices
    except NotImplementedError as error:
        raise ValueError(
            f"compiling for {device}: JAX looked for a GPU before, found none, and put its CUDA plugin aside; set "
            f"JAX_PLATFORMS=cpu before JAX is first used"
        ) from error


def _plugin() -> str:
    return next(name for name in PLUGINS if _installed(name))


def _installed(distribution: str) -> bool:
    try:
        return bool(importlib.metadata.version(distribution))
    except importlib.metadata.PackageNotFoundError:
        return False
