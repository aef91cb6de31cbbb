"""A noise that searches start from, where it is given and not drawn."""

import hashlib
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from ses_jax.engine.files import expanded
from ses_jax.engine.saved import check_single
from ses_jax.exports import noises
from ses_jax.pipelines.base import Pipeline


class Base(NamedTuple):
    """A base noise for each prompt.

    Attributes:
      noise: `[P, C, h, w]`, in the pipeline's layout.
      file: where it came from; None for an array.
    """

    noise: Float[np.ndarray, "p c h w"]
    file: str | None = None

    def of(self, chosen: Sequence[int]) -> "Base":
        """That of some prompts."""
        return self._replace(noise=self.noise[list(chosen)])

    def as_json(self) -> list[dict[str, Any]]:
        """By prompt, in words that are the same for the same noise."""
        return [{"file": self.file, "sha256": hashlib.sha256(one.tobytes()).hexdigest()} for one in self.noise]


class Given(NamedTuple):
    """A noise as it was read, in whatever layout it has."""

    array: np.ndarray
    file: str | None

    def fit(self, pipeline: Pipeline, size: tuple[int, int], count: int) -> Base:
        """For `count` prompts and images of that height and width; see `noises.as_noise`."""
        return Base(noises.as_noise(self.array, pipeline.family, pipeline.noise_shape(*size), count), self.file)


def read(source: Any) -> Given | None:
    """See `noises.read`; None is None. The folder of a list of results is a FileNotFoundError that names them."""
    if source is None:
        return None
    if not isinstance(source, str | os.PathLike):
        return Given(noises.read(source), None)
    path = expanded(source)
    if not (path / "noise.npy").is_file():  # a search that was stopped has no more than that
        check_single(path)
    return Given(noises.read(source), os.path.abspath(path))
