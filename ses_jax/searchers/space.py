"""What is searched: how a searcher's points become noise. The wavelet split stands here, not in a searcher.

Every space has

    split   `(noise [..., C, h, w]) -> (point, rest)`; the rest stays as it is during a search
    merge   `(points, rest) -> noise`, leading axes broadcast
    low     `(points) -> [..., C, a, b]`, their low bands
    draw    `(key, count) -> points`, those of fresh noise
    like    a point's shapes
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from ses_jax.searchers import wavelet


@dataclasses.dataclass(frozen=True)
class Space:
    """What spaces share.

    Attributes:
      wavelet, level: of the low band.
      shape: `(C, h, w)` of noise.
    """

    wavelet: str
    level: int
    shape: tuple[int, int, int]

    @functools.cached_property
    def like(self) -> Any:
        """A point's shapes."""
        return jax.eval_shape(lambda: self.split(jnp.zeros(self.shape, jnp.float32))[0])

    def draw(self, key: PRNGKeyArray, count: int) -> Any:
        """The points `[count, ...]` of independent noises."""
        return self.split(jax.random.normal(key, (count, *self.shape), jnp.float32))[0]

    def _bands(self, noise: Array) -> tuple[Array, Any]:
        return wavelet.split(noise, wavelet=self.wavelet, level=self.level)

    def _noise(self, low: Array, high: Any) -> Array:
        return wavelet.merge(low, high, wavelet=self.wavelet, shape=self.shape[1:])


class LowBand(Space):
    """The low band `[C, a, b]`; the high bands of the base noise are the rest."""

    def split(self, noise: Float[Array, "*n c h w"]) -> tuple[Float[Array, "*n c a b"], Any]:
        return self._bands(noise)

    def merge(self, points: Float[Array, "*n c a b"], rest: Any) -> Float[Array, "*n c h w"]:
        return self._noise(points, rest)

    def low(self, points: Float[Array, "*n c a b"]) -> Float[Array, "*n c a b"]:
        return points

    def draw(self, key: PRNGKeyArray, count: int) -> Float[Array, "n c a b"]:
        """Standard normal, as the method is defined, also where padding at the border makes low bands larger."""
        return jax.random.normal(key, (count, *self.like.shape), jnp.float32)


class WholeNoise(Space):
    """The noise itself `[C, h, w]`."""

    def split(self, noise: Float[Array, "*n c h w"]) -> tuple[Float[Array, "*n c h w"], Any]:
        return noise, ()

    def merge(self, points: Float[Array, "*n c h w"], rest: Any) -> Float[Array, "*n c h w"]:
        return points

    def low(self, points: Float[Array, "*n c h w"]) -> Float[Array, "*n c a b"]:
        return self._bands(points)[0]


class Both(NamedTuple):
    """A low band `[..., C, a, b]` and the pytree of its high bands."""

    low: Array
    high: Any


class Bands(Space):
    """Low and high bands apart, `Both`, for a searcher that moves them apart."""

    def split(self, noise: Float[Array, "*n c h w"]) -> tuple[Both, Any]:
        return Both(*self._bands(noise)), ()

    def merge(self, points: Both, rest: Any) -> Float[Array, "*n c h w"]:
        return self._noise(points.low, points.high)

    def low(self, points: Both) -> Float[Array, "*n c a b"]:
        return points.low


SPACES = {"low": LowBand, "whole": WholeNoise, "bands": Bands}


@functools.cache
def make(name: str, wavelet: str, level: int, shape: tuple[int, int, int]) -> Space:
    """The space of that name."""
    return SPACES[name](wavelet, level, shape)
