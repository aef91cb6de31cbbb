"""From an image to the pixels that a scorer's network sees, on the device."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import jax.numpy as jnp
from jaxtyping import Array, Float

from ses_jax.loading import hub
from ses_jax.rewards import resample


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
        """Reads the folder's `preprocessor_config.json`; without one, the network's size and CLIP's own values."""
        path = folder / "preprocessor_config.json"
        if not path.exists():
            return cls(image_size)
        config = hub.read_json(path)
        size, crop = config.get("size", image_size), config.get("crop_size", image_size)
        size = size["shortest_edge"] if isinstance(size, Mapping) else size
        crop = crop["height"] if isinstance(crop, Mapping) else crop
        if not size == crop == image_size:
            raise ValueError(f"{path}: resize to {size} and crop to {crop}; the network needs {image_size} for both")
        return cls(size, tuple(config.get("image_mean", cls.mean)), tuple(config.get("image_std", cls.std)))

    def __call__(self, images: Float[Array, "b h w 3"]) -> Float[Array, "b size size 3"]:
        """Standardised pixels of images in [0, 1], rounded to 8 bits first, as files hold them."""
        pixels = resample.resize_and_crop(
            resample.quantize(images), self.size, rounded=not self.resize_floats, half_to_even=self.half_to_even
        )
        return (pixels / 255.0 - jnp.array(self.mean)) / jnp.array(self.std)
