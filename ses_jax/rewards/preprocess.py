"""From an image to the pixels that a scorer's network sees, on the device."""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from ses_jax.loading import hub
from ses_jax.rewards import resample

# What is done to every image, by the names that configs of transformers have for it.
DONE: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("do_resize", "do_center_crop", "do_rescale", "do_normalize"), (True,)),
    "resample": (3,),  # bicubic
    "rescale_factor": (1 / 255,),
}


@dataclasses.dataclass(frozen=True)
class Preprocessor:
    """Bicubic resize of the shorter edge, centre square, CLIP's standardisation.

    Attributes:
      size: edge of the square.
      mean: of each channel, in [0, 1].
      std: of each channel, in [0, 1].
      resize_floats: resize the values as floats, without rounding and clipping, as scorers do that turn the image into
        a tensor first; otherwise as Pillow resizes an 8-bit image.
      half_to_even: centre an odd margin as torchvision does, and not as transformers does.
    """

    size: int = 224
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    resize_floats: bool = False
    half_to_even: bool = False

    @classmethod
    def from_folder(cls, folder: Path, image_size: int) -> "Preprocessor":
        """Reads the folder's config of an image processor; without one, the network's size and CLIP's own values.

        Raises:
          ValueError: naming what the file asks for that is not done here.
        """
        path, config = _config(folder)
        edge = image_size
        # Not a size of {"height": edge, "width": edge}: that squeezes images that are not square.
        done = DONE | {"size": ({"shortest_edge": edge}, edge), "crop_size": ({"height": edge, "width": edge}, edge)}
        for key, accepted in done.items():
            if key in config and not any(_same(config[key], value) for value in accepted):
                raise ValueError(f"{path}: {key} is {config[key]!r}; expected {accepted[0]!r}")
        mean = _channels(path, "image_mean", config.get("image_mean", cls.mean))
        return cls(edge, mean, _channels(path, "image_std", config.get("image_std", cls.std)))

    def __call__(self, images: Float[Array, "b h w 3"]) -> Float[Array, "b size size 3"]:
        """Standardised pixels of images in [0, 1], rounded to 8 bits first, as files hold them."""
        pixels = resample.resize_and_crop(
            resample.quantize(images), self.size, rounded=not self.resize_floats, half_to_even=self.half_to_even
        )
        return (pixels / 255.0 - jnp.array(self.mean)) / jnp.array(self.std)


def _config(folder: Path) -> tuple[Path, dict[str, Any]]:
    """The config of an image processor and its file, empty without one; null in it stands for a default."""
    path = folder / "processor_config.json"  # transformers 5 writes all of a processor there, and reads it first
    config = hub.read_json(path).get("image_processor") if path.exists() else None
    if config is None:
        path = folder / "preprocessor_config.json"
        config = hub.read_json(path) if path.exists() else {}
    if not isinstance(config, Mapping):
        raise ValueError(f"{path}: image_processor is {config!r}; expected an object")
    return path, {key: value for key, value in config.items() if value is not None}


def _same(asked: Any, done: Any) -> bool:
    """Whether two values are equal, or differ as 1 / 255 does from file to file."""
    numbers = isinstance(asked, float) and isinstance(done, float)
    return math.isclose(asked, done, rel_tol=1e-6) if numbers else asked == done


def _channels(path: Path, key: str, value: Any) -> tuple[float, ...]:
    """A number for each channel."""
    if not isinstance(value, list | tuple) or len(value) != 3 or not all(isinstance(x, int | float) for x in value):
        raise ValueError(f"{path}: {key} is {value!r}; expected three numbers")
    return tuple(map(float, value))
