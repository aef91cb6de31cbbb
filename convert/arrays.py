"""Large arrays on the host: moved and looked at in bands that fit the cache, by threads side by side.

NumPy lets other threads run while it moves elements, but not where they are bfloat16 or float8: these are moved, and
looked at, by their bits.
"""

import itertools
import os
from collections.abc import Callable, Sequence
from concurrent import futures
from typing import Any

import jax.numpy as jnp
import numpy as np

from ses_jax.convert.damage import damaged
from ses_jax.models import quantized

ALIGNMENT = 64  # bytes; what lies so, a CPU's device takes as it is
BAND = 64  # elements of the last axis
BLOCK = 1 << 18  # bytes
CHUNK = 1 << 23  # bytes that are read at a time
THREADS = 16  # at most: each takes a while to start
SMALL = 1 << 20  # bytes, of which threads would take longer to start
# By dtype, what of its bits says how large a number is, and from where on it is none.
EXPONENTS = {np.dtype(jnp.bfloat16): (0x7FFF, 0x7F80), np.dtype(np.float16): (0x7FFF, 0x7C00)}


def empty(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """An array whose values are still to be written, aligned for JAX to take it without a copy."""
    dtype = np.dtype(dtype)
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    raw = np.empty(size + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)


def read(file: str, start: int, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An array that lies in a file as it is in memory, from some byte on.

    Raises:
      ConversionError: naming the file, where it ends too early or cannot be read.
    """
    out = empty(shape, dtype)
    whole = out.reshape(-1).view(np.uint8)

    def fill(first):
        part = memoryview(whole[first : first + CHUNK])
        with open(file, "rb", buffering=0) as opened:
            opened.seek(start + first)
            while part:
                count = opened.readinto(part)
                if not count:
                    raise EOFError("it ends too early")
                part = part[count:]

    try:
        in_threads(fill, range(0, whole.size, CHUNK), whole.size)
    except (OSError, EOFError) as error:
        raise damaged(file, error) from error
    return out


def copy(out: np.ndarray, values: np.ndarray) -> None:
    """`out[...] = values`, of the same shape; for transposed values that is three times as fast."""
    if values.flags.c_contiguous and out.flags.c_contiguous:
        out, values = out.reshape(-1), values.reshape(-1)
    band = BLOCK // out.itemsize if out.ndim == 1 else BAND
    bits = f"u{out.itemsize}"

    def move(start):
        part = (..., slice(start, start + band))
        out[part].view(bits)[...] = _cast(values[part], out.dtype).view(bits)

    in_threads(move, range(0, values.shape[-1], band), values.nbytes)


def look_up(table: np.ndarray, places: np.ndarray) -> np.ndarray:
    """`table[places]`, a table of 256 entries and places of eight bits: much faster than casts of eight bits."""
    places = np.ascontiguousarray(places).view(np.uint8)
    out = empty(places.shape, table.dtype)
    flat, into = places.reshape(-1), out.reshape(-1)

    def take(start):
        band = slice(start, start + BLOCK)
        np.take(table, flat[band], out=into[band], mode="clip")  # which needs no copy of the places

    in_threads(take, range(0, flat.size, BLOCK), flat.size)
    return out


def scale(values: np.ndarray, factors: np.ndarray) -> None:
    """`values *= factors`, of which there is one, or one for each of the first axes of the values."""
    step = max(1, BLOCK * len(values) // max(1, values.nbytes))

    def multiply(start):
        rows = slice(start, start + step)
        values[rows] *= factors if factors.ndim == 0 else factors[rows]

    in_threads(multiply, range(0, len(values), step), values.nbytes)


def all_finite(values: np.ndarray) -> bool:
    """Whether no value is NaN or infinite."""
    if not values.flags.c_contiguous:
        return bool(np.isfinite(values).all())
    flat, step = values.reshape(-1), BLOCK // values.itemsize

    def finite(start):
        block = flat[start : start + step]
        if block.dtype not in EXPONENTS:
            return np.isfinite(block).all()
        magnitude, none = EXPONENTS[block.dtype]
        return (block.view(np.uint16) & np.uint16(magnitude)).max() < none

    return all(in_threads(finite, range(0, flat.size, step), values.nbytes))


def in_threads(function: Callable[[Any], Any], pieces: Sequence[Any], size: int) -> list[Any]:
    """What a function gives for the pieces of an array of so many bytes."""
    if size < SMALL:
        return [function(piece) for piece in pieces]
    workers = min(THREADS, os.cpu_count() or 1)
    share = -(-len(pieces) // (4 * workers))  # a few each, which costs less than every piece by itself
    shares = [pieces[start : start + share] for start in range(0, len(pieces), share)] if share else []
    with futures.ThreadPoolExecutor(workers) as threads:
        found = threads.map(lambda share: [function(piece) for piece in share], shares)
        return list(itertools.chain.from_iterable(found))


def _cast(values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """In another dtype, in the order in which they lie: turned as well, it would take several times as long."""
    if dtype == np.float32 and values.dtype == jnp.bfloat16:
        return quantized.float32(values)
    with np.errstate(over="ignore"):  # such values are not finite, which is looked at
        return values.astype(dtype, copy=False)
