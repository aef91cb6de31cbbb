"""What programs are made for: kernels and layouts follow the device, which can't be seen while a program is traced.

Whoever compiles for others than the default device, or for a mesh, traces inside `compiled_for`.
"""

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh


class Target(NamedTuple):
    """A device, real or of a topology, and the mesh it belongs to, if any; its first axis splits rows, its last heads.

    Without a device it is the default one.
    """

    device: Any = None
    mesh: Mesh | None = None


DEFAULT = Target()
_TARGET: contextvars.ContextVar[Target] = contextvars.ContextVar("target", default=DEFAULT)
_DIFFERENTIATED: contextvars.ContextVar[bool] = contextvars.ContextVar("differentiated", default=False)


@contextlib.contextmanager
def compiled_for(target: Any) -> Iterator[None]:
    """What is traced inside is for programs that run on a target.

    To be entered inside a jitted function, with a target that follows from its static arguments: what a cached
    compilation holds then follows from them too.

    Args:
      target: a device or a mesh, real or of a topology; None is the default device.
    """
    mesh = target if isinstance(target, Mesh) else None
    token = _TARGET.set(Target(target if mesh is None else mesh.devices.flat[0], mesh))
    try:
        yield
    finally:
        _TARGET.reset(token)


@contextlib.contextmanager
def differentiated() -> Iterator[None]:
    """What is traced inside is for derivatives: networks keep little for them, and kernels are those that have any.

    To be entered where `compiled_for` is.
    """
    token = _DIFFERENTIATED.set(True)
    try:
        yield
    finally:
        _DIFFERENTIATED.reset(token)


def is_differentiated() -> bool:
    """Whether derivatives are taken of what is traced."""
    return _DIFFERENTIATED.get()


def mesh() -> Mesh | None:
    """The mesh that was said."""
    return _TARGET.get().mesh


def device() -> Any:
    """The device that was said, or JAX's default one, which may be said by its platform's name."""
    said = _TARGET.get().device or jax.config.jax_default_device
    return said if hasattr(said, "platform") else jax.devices(said)[0]


def capability(device: Any) -> int | None:
    """The major compute capability of an NVIDIA GPU; None for all else, AMD's GPUs with their "gfx942" included."""
    major = getattr(device, "compute_capability", "").split(".")[0]
    return int(major) if device.platform in ("gpu", "cuda") and major.isdecimal() else None
