"""What XLA's compiler is told of a program, which follows from the device that the program is for."""

import functools
import logging
import os
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, SingleDeviceSharding

from ses_jax.models import quantized, target

LOG = logging.getLogger("ses_jax")

# By name and value; a tuple, so that it can be part of what programs are kept by.
Options = tuple[tuple[str, bool | int], ...]

# For NVIDIA's GPUs. Networks scan over their layers, and cuBLAS reads the weights of one where they lie in the stack;
# Triton's products, and those of cuBLAS that are chosen in their place, take a copy of each, and products that are
# joined copy them once more. Without these products there is also less to compile and to try out.
NVIDIA: Options = (("xla_gpu_enable_triton_gemm", False), ("xla_gpu_dot_merger_threshold_mb", 0))
# For programs of TPUs that do nothing but denoise, by a pattern of their kind. Products of a layer get more of
# the vector memory, and so larger tiles; a decoder does not gain from it, and takes far longer to compile. A v5e would
# gain one part in a hundred.
DENOISING: Mapping[str, Options] = {
    "TPU v6.*": (("xla_tpu_scoped_vmem_limit_kib", 73728),),
    "TPU v5p?": (("xla_tpu_scoped_vmem_limit_kib", 65536),),
}


def options(args: Any, *, denoises: bool = False) -> Options:
    """Compiler options for a program with such arguments, arrays or shapes; none for most devices.

    Weights in eight bits are left to Triton's products, which cast them as they read them. What the user says in
    `XLA_FLAGS` or `LIBTPU_INIT_ARGS` stays, and an option that the compiler does not know is left out.

    Args:
      denoises: whether the program does nothing else, see `denoises_apart`.
    """
    leaves = jax.tree.leaves(args)
    placed = (sharding for leaf in leaves if (sharding := getattr(leaf, "sharding", None)) is not None)
    sharding = next(placed, None)
    device = target.device() if sharding is None else _one_of(sharding)
    wanted = _denoising(device) if denoises else ()
    if target.capability(device) is not None and not any(_is_quantized(leaf) for leaf in leaves):
        wanted = NVIDIA
    said = os.environ.get("XLA_FLAGS", "") + os.environ.get("LIBTPU_INIT_ARGS", "")
    return tuple(option for option in wanted if option[0] not in said and _is_known(option, device))


def denoises_apart(mesh: Mesh | None) -> bool:
    """Whether the devices gain from a program that does nothing but denoise, for it has options of its own."""
    device = target.device() if mesh is None else mesh.devices.flat[0]
    return bool(_denoising(device))


def _denoising(device: Any) -> Options:
    kind = getattr(device, "device_kind", "")
    return next((options for pattern, options in DENOISING.items() if re.fullmatch(pattern, kind)), ())


def _one_of(sharding: Any) -> Any:
    """One of its devices; of this process where any is, which alone can be compiled for there."""
    return next(iter(sharding.addressable_devices or sharding.device_set))


def _is_quantized(leaf: Any) -> bool:
    return getattr(leaf, "dtype", None) in [kind.dtype for kind in quantized.KINDS.values()]


@functools.cache
def _is_known(option: tuple[str, bool | int], device: Any) -> bool:
    """Whether the device's compiler takes an option: it is asked with the least of programs."""
    x = jax.ShapeDtypeStruct((), jnp.float32, sharding=SingleDeviceSharding(device))
    try:
        jax.jit(jnp.negative, compiler_options=dict([option])).lower(x).compile()
    except Exception as error:  # whatever it is: programs run without the option as well
        LOG.debug("%s is not set: %s", option[0], " ".join(str(error).split())[:200])
        return False
    return True
