"""How many candidates at a time fit on a device: asked of the compiled program before the search, and mended in it."""

import logging
import math
import re
from collections.abc import Callable, Iterable
from typing import Any

import jax
from jax.sharding import Mesh

from ses_jax.loading import partition

LOG = logging.getLogger("ses_jax")
# XLA's own bookkeeping and fragmentation need some room.
USABLE = 0.95
# Of all images that a device decodes at a time; of one, from which on a TPU decodes no others with it.
DECODED_PIXELS = 2**20
ALONE_PIXELS = 2**18
# A TPU's compiler refuses what the device can't hold, in these words.
REFUSAL = r"total memory required for [^(]*\(([\d.]+)([KMGT]?)\)"
UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def decoded_at_once(height: int, width: int, platform: str) -> int:
    """How many images of a size in pixels a device decodes and scores at a time.

    The temporaries of one megapixel are 1.3 GB on an NVIDIA GPU, which has nothing from taking more of them at once,
    and where memory is short they would leave less of it to denoising. A TPU's compiler lays several out so that they
    take far more, and a single one is decoded in another way (`models.convolution`): FLUX.2's autoencoder takes 3.8 GB
    and 183 million cycles for four of 512 x 512, 0.4 GB and 18 million for one. Of 256 x 256, sixteen at once are the
    quicker ones.

    Args:
      platform: what JAX calls the device's kind.
    """
    pixels = height * width
    return 1 if platform == "tpu" and pixels >= ALONE_PIXELS else max(1, DECODED_PIXELS // pixels)


def even_part(count: int, most: int | None) -> int:
    """The size of the fewest even parts of at most `most`; a part of another size would be one more thing to compile.

    The last part may have to be filled up. None is no limit.
    """
    return -(-count // -(-count // (most or count)))


def device_room(mesh: Mesh | None = None) -> int | None:
    """Bytes that are left beside what lies there on the device that has least; None where one doesn't say (CPU).

    Args:
      mesh: of which devices, those of other processes that share it included; None is the default device.
    """
    devices = [partition.local_device()] if mesh is None else mesh.local_devices
    return partition.least(mesh, min(map(_room, devices), key=lambda room: -1 if room is None else room))


def _room(device: Any) -> int | None:
    stats = device.memory_stats() or {}
    if "bytes_limit" not in stats:
        return None
    return int(USABLE * stats["bytes_limit"]) - stats.get("bytes_in_use", 0)


def fitting_chunk(working: Callable[[int], int], rows: int, room: int | None) -> int:
    """The largest number of rows at a time whose compiled program fits.

    Args:
      working: `(chunk) -> working_bytes` of a program whose arguments are on the device.
      rows: how many there are in all.
      room: bytes of a device beside them; None is no limit.

    Returns:
      `rows` if all fit, at least 1 otherwise.
    """
    chunk = rows
    while room is not None and chunk > 1:
        needed = working(chunk)
        if needed <= room:
            break
        # They shrink about in proportion.
        smaller = min(chunk - 1, max(1, math.floor(chunk * room / max(needed, 1))))
        LOG.info("%d candidates at a time need %.1f GB of %.1f GB; trying %d", chunk, needed / 1e9, room / 1e9, smaller)
        chunk = smaller
    if chunk < rows:
        LOG.warning("denoising %d of %d candidates at a time, to fit into memory", chunk, rows)
    return chunk


def working_bytes(programs: Iterable[Any]) -> int:
    """Bytes that the largest of lowered programs needs on each device beside its arguments: temporaries and results.

    Where the compiler refuses one for want of memory they are those that it names. What is compiled here is not
    compiled again by the search.
    """
    return max(map(_working_bytes, programs))


def _working_bytes(lowered: Any) -> int:
    try:
        analysis = lowered.compile().memory_analysis()
    except jax.errors.JaxRuntimeError as error:
        if not is_exhausted(error):
            raise
        return refused_bytes(error)
    return analysis.temp_size_in_bytes + analysis.output_size_in_bytes - analysis.alias_size_in_bytes


def refused_bytes(error: Exception) -> int:
    """Bytes that a program needs which the compiler refused; raises the error where it does not name them."""
    found = re.search(REFUSAL, str(error))
    if not found:
        raise error
    return int(float(found[1]) * UNITS[found[2]])


def is_exhausted(error: Exception) -> bool:
    """Whether a device has run out of memory."""
    return isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error)


def half(mesh: Mesh | None, chunk: int, error: Exception) -> int:
    """The next smaller number of rows to try after an error, with a word to the user.

    Raises:
      Exception: the error, unless memory was short and there is a smaller number; with advice where processes share
        the mesh, as the others may have had enough memory, and would go on with what they run.
    """
    if not is_exhausted(error) or chunk == 1:
        raise error
    if mesh is not None and mesh.is_multi_process:
        error.add_note(f"with {chunk} candidates at a time; pass chunk={math.ceil(chunk / 2)} in every process")
        raise error
    smaller = math.ceil(chunk / 2)
    LOG.warning("out of memory with %d candidates at a time; going on with %d", chunk, smaller)
    return smaller
