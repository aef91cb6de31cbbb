"""What people hand to a reward as images and prompts, as what it scores."""

import reprlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array
from PIL import Image

Images = Array | np.ndarray | Sequence[Any]

# A resize overshoots a little at edges; what lies further out is on another scale.
OVERSHOOT = 0.1


def pairs(images: Any, prompts: Any) -> tuple[list[tuple[np.ndarray, Any]], list[str]]:
    """Images as `batches` gives them, and a prompt for each.

    Args:
      images: see `batches`.
      prompts: one an image, or a single one for all.

    Raises:
      ValueError: for what `batches` refuses, for prompts that are no text, and for another number of them.
    """
    prompts, found = _texts(prompts), batches(images)
    count = sum(len(places) for places, _ in found)
    if len(prompts) not in (1, count):
        raise ValueError(f"{count} images need as many prompts or a single one, got {len(prompts)}")
    return found, prompts * count if len(prompts) == 1 else prompts


def batches(images: Any) -> list[tuple[np.ndarray, Any]]:
    """Images as float arrays, those of one size together.

    Args:
      images: `[B, H, W, 3]` floats in [0, 1] or bytes; or a sequence of PIL images and `[H, W, 3]` arrays, of any
        sizes. Transparent PIL images are laid on white; other modes become RGB, but for "I" and "F", whose scale is
        not known.

    Returns:
      Pairs of places `[n]` and images `[n, H, W, 3]` in [0, 1].

    Raises:
      ValueError: for anything else, other shapes and those modes among it, and for floats on another scale, such as 0
        to 255 or -1 to 1.
    """
    if isinstance(images, Image.Image):
        raise ValueError("images must be a sequence, got one image; pass [image]")
    if isinstance(images, np.ndarray | jax.Array):
        _check_shape(images, 4)
        return [(np.arange(len(images)), _floats(images))] if len(images) else []
    if isinstance(images, str | bytes | Mapping) or not hasattr(images, "__len__"):
        raise ValueError(f"images must be an array, or a list of arrays and PIL images; got {reprlib.repr(images)}")
    arrays = [_floats(_check_shape(_pixels(image), 3)) for image in images]
    sizes: dict[tuple[int, ...], list[int]] = {}
    for place, array in enumerate(arrays):
        sizes.setdefault(array.shape, []).append(place)
    return [(np.array(places), np.stack([arrays[i] for i in places])) for places in sizes.values()]


def _texts(prompts: Any) -> list[str]:
    """One prompt or several as a list; raises ValueError for anything else."""
    if isinstance(prompts, bytes | Mapping) or not isinstance(prompts, Iterable):
        raise ValueError(f"prompts must be strings, got {reprlib.repr(prompts)}")
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    for text in texts:
        if not isinstance(text, str):
            raise ValueError(f"prompts must be strings, got {reprlib.repr(text)}")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            place = f"{error.reason} at character {error.start}"
            raise ValueError(f"the prompt {reprlib.repr(text)} is not Unicode: {place}") from None
    return texts


def _pixels(image: Any) -> np.ndarray:
    """One image of a sequence as an array."""
    if not isinstance(image, Image.Image):
        array = np.asarray(image)
        if array.dtype.kind in "OUS":
            raise ValueError(f"{reprlib.repr(image)} is no image; open files with PIL.Image.open")
        return array
    if image.mode in ("I", "F"):
        raise ValueError(f"images of mode {image.mode!r} may be on any scale; pass [H, W, 3] floats in [0, 1] or uint8")
    if image.mode.startswith("I;16"):
        image = _eight_bits(image)
    elif image.mode == "La":
        image = image.convert("LA")  # the only mode that it becomes
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.asarray(image.convert("RGB"))


def _eight_bits(image: Image.Image) -> Image.Image:
    """Greys of 16 bits as 8, those that stand for transparency as white; Pillow would clip them."""
    values = np.asarray(image)
    greys = np.where(values == image.info.get("transparency", -1), 255, np.round(values / 257))
    return Image.fromarray(greys.astype(np.uint8))


def _check_shape(array: Any, dimensions: int) -> Any:
    if array.ndim != dimensions or array.shape[-1] != 3 or 0 in array.shape[1:]:
        expected = "[B, H, W, 3]" if dimensions == 4 else "[H, W, 3]"
        raise ValueError(f"images must have shape {expected}, got {list(array.shape)}")
    return array


def _floats(array: Any) -> Any:
    """Bytes as floats in [0, 1]; floats as they are, once their scale is known to be that."""
    if array.dtype == np.uint8:
        return array.astype(np.float32) / np.float32(255)
    if not np.issubdtype(array.dtype, np.floating) and array.dtype.name != "bfloat16":
        raise ValueError(f"images must be floats in [0, 1] or uint8, got {array.dtype}")
    low, high = float(array.min()), float(array.max())
    if low < -OVERSHOOT or high > 1 + OVERSHOOT:
        raise ValueError(
            f"images must be floats in [0, 1] or uint8; these lie in [{low:.3g}, {high:.3g}], rescale them"
        )
    return array.astype(np.float32)
