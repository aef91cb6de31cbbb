"""How many candidates at a time fit on a device: asked of the compiled program before the search, and mended in it."""

import logging
import math
from collections.abc import Callable
from typing import Any

import jax

LOG = logging.getLogger("ses_jax")
# XLA's own bookkeeping and fragmentation need some room.
USABLE = 0.95
# Of all images that a device decodes at a time, by platform; elsewhere 2 megapixels.
DECODED_PIXELS = {"tpu": 2**23}


def decoded_at_once(height: int, width: int, platform: str) -> int:
    """How many images of a size in pixels a device decodes and scores at a time.

    The temporaries of one megapixel are 1.3 GB on an NVIDIA GPU, which has nothing from taking more of them at once;
    a TPU's layouts want eight.
    """
    return max(1, DECODED_PIXELS.get(platform, 2**21) // (height * width))


def device_limit() -> int | None:
    """Bytes that the first local device lets programs use; None where it doesn't say (CPU)."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return stats.get("bytes_limit")


def fitting_chunk(lower: Callable[[int], Any], rows: int, limit: int | None) -> int:
    """The largest number of rows at a time whose compiled program fits.

    Args:
      lower: `(chunk) -> jax.stages.Lowered` of a program.
      rows: how many there are in all.
      limit: bytes of a device; None is no limit.

    Returns:
      `rows` if all fit, at least 1 otherwise. What is compiled here is not compiled again by the search.
    """
    chunk = rows
    while limit is not None and chunk > 1:
        needed = program_bytes(lower(chunk).compile())
        if needed <= USABLE * limit:
            break
        # The temporaries, which all lies in, shrink about in proportion.
        smaller = min(chunk - 1, max(1, math.floor(chunk * USABLE * limit / needed)))
        LOG.info(
            "%d candidates at a time need %.1f GB of %.1f GB; trying %d", chunk, needed / 1e9, limit / 1e9, smaller
        )
        chunk = smaller
    if chunk < rows:
        LOG.warning("denoising %d of %d candidates at a time, to fit into memory", chunk, rows)
    return chunk


def program_bytes(compiled: Any) -> int:
    """Bytes that a compiled program needs on each device: its arguments, results and temporaries."""
    analysis = compiled.memory_analysis()
    reused = analysis.alias_size_in_bytes
    return analysis.argument_size_in_bytes + analysis.output_size_in_bytes + analysis.temp_size_in_bytes - reused


def is_exhausted(error: Exception) -> bool:
    """Whether a device has run out of memory."""
    return isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error)


def half(chunk: int) -> int:
    """The next smaller number of rows to try, with a word to the user."""
    smaller = math.ceil(chunk / 2)
    LOG.warning("out of memory with %d candidates at a time; going on with %d", chunk, smaller)
    return smaller
