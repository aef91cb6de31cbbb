"""What a search is asked to do, checked before any long work starts."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from ses_jax.pipelines.base import Guidance, Pipeline
from ses_jax.searchers import wavelet


@dataclasses.dataclass(frozen=True)
class SearchConfig:
    """Settings of a search. None means the model's own default.

    Attributes:
      budget: how many candidates are scored, the base noise among them.
      preview_steps: denoising steps of a candidate; the default is never more than `steps`.
      steps: denoising steps of the final images.
      guidance: guidance scale in the model's own convention, or a mapping of the model's own options.
      negative_prompt: what to steer away from, where guidance is on.
      height, width: of the image, in pixels.
      seed: of all random draws.
      population: candidates per generation.
      elites: how many of the best candidates shape the next generation.
      wavelet: name in PyWavelets; level: how deep the low band lies.
      chunk: candidates denoised at a time; None is all of a generation, or as many of them as fit on the device.
      standardize: whether a mixture's parts are standardised, per prompt over all candidates so far, before they are
        summed; False is the plain weighted sum.
    """

    budget: int = 50
    preview_steps: int | None = None
    steps: int | None = None
    guidance: Guidance | None = None
    negative_prompt: str | None = None
    height: int | None = None
    width: int | None = None
    seed: int = 0
    population: int = 10
    elites: int = 5
    wavelet: str = "db1"
    level: int | None = None
    chunk: int | None = None
    standardize: bool = True

    def check(self) -> None:
        """Raises ValueError for settings that no model could run."""
        for name in ("budget", "preview_steps", "steps", "chunk", "height", "width", "level"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        if self.population < 2:
            raise ValueError(f"population={self.population} must be at least 2")
        if not 1 <= self.elites < self.population:
            raise ValueError(f"elites={self.elites} must be at least 1 and less than population={self.population}")

    def resolve(self, pipeline: Pipeline) -> "SearchConfig":
        """This config with the model's defaults filled in, checked against the model.

        Raises:
          ValueError: for sizes, wavelets or levels that the model's latents do not allow.
        """
        self.check()
        filled = self.with_defaults(pipeline)
        check_size(pipeline, filled.height, filled.width)
        wavelet.check(self.wavelet, filled.level, pipeline.noise_shape(filled.height, filled.width)[1:])
        return filled

    def with_defaults(self, pipeline: Pipeline) -> "SearchConfig":
        """This config with the model's defaults filled in."""
        filled: dict[str, Any] = {
            name: getattr(pipeline.defaults, name) if getattr(self, name) is None else getattr(self, name)
            for name in ("steps", "guidance", "height", "width", "level")
        }
        filled["preview_steps"] = self.preview_steps or min(pipeline.defaults.preview_steps, filled["steps"])
        return dataclasses.replace(self, **filled)

    def as_json(self) -> dict[str, Any]:
        """The fields as plain JSON values."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return fields | {"guidance": dict(self.guidance) if isinstance(self.guidance, Mapping) else self.guidance}


def check_size(pipeline: Pipeline, height: int, width: int) -> None:
    """Raises ValueError unless the model can make images of this size."""
    for name, value in (("height", height), ("width", width)):
        if value % pipeline.size_multiple:
            below = max(value // pipeline.size_multiple, 1) * pipeline.size_multiple
            raise ValueError(
                f"{name}={value} must be a multiple of {pipeline.size_multiple}; "
                f"try {below} or {below + pipeline.size_multiple}"
            )
