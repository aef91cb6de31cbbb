"""PNG, JPEG and WebP files that carry how they were made, in the way that viewers of such images read.

"parameters"  the text of the prompt and the settings: in a PNG a text chunk, else the user comment of Exif
"ses_jax"     everything as JSON: in a PNG a text chunk, else the description of Exif

A JPEG has no room for more than 64 KB of Exif: of very long prompts it goes without the text, or without both.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image
from PIL.PngImagePlugin import PngInfo

FORMATS = {"png": "PNG", "jpeg": "JPEG", "webp": "WEBP"}
QUALITY = {"png": {}, "jpeg": {"quality": 95, "subsampling": 0}, "webp": {"quality": 95, "method": 4}}
_EXIF, _USER_COMMENT, _DESCRIPTION = 0x8769, 0x9286, 0x010E
_UNICODE = b"UNICODE\0"
# Bytes of Exif, by kind; a WebP takes any.
_LARGEST = {"jpeg": 65_533}


class Notes(NamedTuple):
    """What a picture says of itself: the text for viewers, and everything as plain JSON values."""

    parameters: str
    facts: Mapping[str, Any]


def save(path: Path, image: Image.Image, kind: str, notes: Notes) -> None:
    """Writes a picture of a kind in `FORMATS`, whatever the ending of the path."""
    facts = json.dumps(notes.facts)
    if kind == "png":
        info = PngInfo()
        info.add_text("parameters", notes.parameters)
        info.add_text("ses_jax", facts)
        image.save(path, format="PNG", pnginfo=info)
        return
    # The facts last: the search is made again from them.
    each = (_exif(*texts) for texts in ((notes.parameters, facts), ("", facts), (notes.parameters, ""), ("", "")))
    exif = next(exif for exif in each if len(exif.tobytes()) <= _LARGEST.get(kind, math.inf))
    image.save(path, format=FORMATS[kind], exif=exif, **QUALITY[kind])


def _exif(parameters: str, facts: str) -> Image.Exif:
    """Exif with these texts; without those that are empty."""
    exif = Image.Exif()
    if facts:
        exif[_DESCRIPTION] = facts
    if parameters:
        exif.get_ifd(_EXIF)[_USER_COMMENT] = _UNICODE + parameters.encode("utf-16-be")
    return exif


def read(path: Path) -> Notes:
    """What a picture says of itself.

    Raises:
      ValueError: for a file that is no picture, and for one that ses_jax did not write.
    """
    try:
        with Image.open(path) as image:
            image.load()
            text, facts = _texts(image)
    except (OSError, SyntaxError) as error:
        raise ValueError(f"{path} is no picture that can be read: {error}") from error
    try:
        return Notes(text, json.loads(facts))
    except (TypeError, ValueError):
        raise ValueError(f"{path} does not say how it was made; programs that edit pictures leave that out") from None


def _texts(image: Image.Image) -> tuple[str, str | None]:
    if image.format == "PNG":
        return image.info.get("parameters", ""), image.info.get("ses_jax")
    exif = image.getexif()
    comment = exif.get_ifd(_EXIF).get(_USER_COMMENT, b"")
    return comment.removeprefix(_UNICODE).decode("utf-16-be", "replace"), exif.get(_DESCRIPTION)
