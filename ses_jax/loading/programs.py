"""Programs that are compiled once for what they depend on and kept for later calls, the most recent of them.

XLA's programs take megabytes and hundreds of memory mappings each, of which a process has 65530. JAX keeps them as long
as the jitted function lives, so here every set of static arguments has a jitted function of its own, and the least
recently used ones go.
"""

import contextlib
import dataclasses
import functools
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import jax

from ses_jax.loading import compiler

# As many as a mixed batch run switches between; each has a program for every token-length bucket.
KEPT = 16

# What JAX is told while programs are traced, compiled and called, whatever its user has told it. NaN stands for what
# has no score, and is no error; a seed's draws are always the same.
SETTINGS = {
    "debug_nans": False,
    "debug_infs": False,
    "numpy_dtype_promotion": "standard",
    "numpy_rank_promotion": "allow",
    "threefry_partitionable": True,
}

_EVERY: "weakref.WeakSet[Compiled]" = weakref.WeakSet()


@dataclasses.dataclass(frozen=True)
class Bound:
    """A `functools.partial` that equals any other of the same function and arguments."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    keywords: tuple[tuple[str, Any], ...]

    def __call__(self, *args: Any) -> Any:
        """The function's value at its own arguments and these."""
        return self.function(*self.args, *args, **dict(self.keywords))


def comparable(function: Any) -> Any:
    """A partial as one that compares by value, so that models loaded twice share programs; all else as it is."""
    if not isinstance(function, functools.partial):
        return function
    bound = Bound(function.func, tuple(map(comparable, function.args)), tuple(sorted(function.keywords.items())))
    try:
        hash(bound)
    except TypeError:
        return function
    return bound


class Compiled:
    """A function jitted apart for each of its leading, static arguments, and for each compiler's options.

    The most recent ones are kept.
    """

    def __init__(self, function: Callable[..., Any], static: int, keep: int, denoises: bool):
        functools.update_wrapper(self, function)
        self._static, self._denoises = static, denoises
        self._alive: weakref.WeakKeyDictionary[Any, tuple[Any, ...]] = weakref.WeakKeyDictionary()

        @functools.lru_cache(maxsize=keep)
        def jitted(options, *args):
            found = jax.jit(functools.partial(function, *args), compiler_options=dict(options))
            self._alive[found] = args
            return found

        self._jitted = jitted
        _EVERY.add(self)

    def __call__(self, *args: Any) -> Any:
        """The function's value."""
        with _own_settings():
            return self._of(args)(*args[self._static :])

    def lower(self, *args: Any) -> jax.stages.Lowered:
        """As `jax.jit(...).lower`; what is compiled from it is not compiled again by a call."""
        with _own_settings():
            return self._of(args).lower(*args[self._static :])

    def jaxpr(self, *args: Any) -> Any:
        """The jaxpr of a call; what was traced is not traced again."""
        with _own_settings():
            return self._of(args).trace(*args[self._static :]).jaxpr.jaxpr

    def is_kept(self, *static: Any) -> bool:
        """Whether there is something for such static arguments, called or lowered before."""
        wanted = tuple(map(comparable, static))
        return any(self._alive.get(jitted) == wanted for jitted in self._jitted_ones())

    def cache_size(self) -> int:
        """How many programs are kept."""
        return sum(jitted._cache_size() for jitted in self._jitted_ones())

    def clear(self) -> None:
        """Drops every program."""
        self._jitted.cache_clear()

    def _jitted_ones(self) -> list[Any]:
        """Those that are alive; other threads may add some meanwhile."""
        return [jitted for ref in self._alive.keyrefs() if (jitted := ref()) is not None]

    def _of(self, args: tuple[Any, ...]) -> Any:
        options = compiler.options(args[self._static :], denoises=self._denoises)
        return self._jitted(options, *map(comparable, args[: self._static]))


@contextlib.contextmanager
def _own_settings() -> Iterator[None]:
    with contextlib.ExitStack() as settings:
        for name, value in SETTINGS.items():
            if hasattr(jax, name):  # a later JAX may have no choice there any more
                settings.enter_context(getattr(jax, name)(value))
        yield


def compiled(*, static: int, keep: int = KEPT, denoises: bool = False) -> Callable[[Callable[..., Any]], Compiled]:
    """Decorates a function to be compiled.

    Args:
      static: how many of its leading arguments are static, and hashable.
      keep: for how many different ones its programs are kept.
      denoises: whether it does nothing but denoise, see `compiler.options`.
    """
    return lambda function: Compiled(function, static, keep, denoises)


def clear() -> None:
    """Drops all programs that are kept."""
    for each in _EVERY:
        each.clear()
