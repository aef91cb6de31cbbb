"""What one accelerator has, for plans: memory, bfloat16 arithmetic, memory bandwidth; as its maker states them.

An accelerator is what JAX calls a device: a chip, but half a chip of TPU7x.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

GIB = 2**30


class Device(NamedTuple):
    """One of them.

    Attributes:
      memory: bytes.
      flops: dense bfloat16 FLOP/s with float32 sums.
      bandwidth: bytes/s of its memory.
      utilization: share of `flops` that a search reaches; a guess but for Hopper's GPUs.
    """

    memory: int
    flops: float
    bandwidth: float
    utilization: float = 0.4


# On an H100 candidates of FLUX.2-klein-4B and FLUX.1-dev, decoded and scored, reach 0.58 and 0.61, ten at a time.
HOPPER = 0.55


# NVIDIA: the data sheets of A100, H100 SXM, H200, L40S and DGX B200 (an eighth), the Ada and RTX Blackwell whitepapers.
# TPU: cloud.google.com/tpu/docs, "System architecture" of each generation.
DEVICES = {
    "h200": Device(139 * GIB, 989e12, 4.8e12, HOPPER),
    "h100": Device(80 * GIB, 989e12, 3.35e12, HOPPER),
    "b200": Device(180 * GIB, 2250e12, 8.0e12),
    "a100-80": Device(80 * GIB, 312e12, 2.039e12),
    "a100-40": Device(40 * GIB, 312e12, 1.555e12),
    "l40s": Device(48 * GIB, 362e12, 0.864e12),
    "5090": Device(32 * GIB, 209e12, 1.792e12),
    "4090": Device(24 * GIB, 165e12, 1.008e12),
    "4080": Device(16 * GIB, 97e12, 0.717e12),
    "4070": Device(12 * GIB, 58e12, 0.504e12),
    "v4": Device(32 * GIB, 275e12, 1.228e12),
    "v5e": Device(16 * GIB, 197e12, 0.819e12),
    "v5p": Device(95 * GIB, 459e12, 2.765e12),
    "v6e": Device(32 * GIB, 918e12, 1.64e12),
    "tpu7x": Device(96 * GIB, 1153.5e12, 3.69e12),
}


# What drivers call TPUs, where it is not the name above.
KINDS = {"v5e": "v5 lite", "v6e": "v6 lite"}


def of_name(name: str, present: Sequence[Any]) -> int:
    """How many of a machine's devices, as JAX has them, are of a name."""
    kind = KINDS.get(name, name.split("-")[0])
    return sum(kind in device.device_kind.lower() for device in present)


def device(name: str) -> Device:
    """The device of that name.

    Raises:
      ValueError: for an unknown one.
    """
    if name not in DEVICES:
        raise ValueError(f"unknown device {name!r}; known: {', '.join(DEVICES)}")
    return DEVICES[name]
