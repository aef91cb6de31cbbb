"""Previews side by side, as one image."""

from collections.abc import Sequence

from PIL import Image

GAP = 4


def grid(rows: Sequence[Sequence[Image.Image]]) -> Image.Image:
    """Rows of images of one size, with white between them.

    Raises:
      ValueError: if there are none.
    """
    if not any(rows):
        raise ValueError(
            "there are no previews to show: a search with no_report keeps none, and a result that was loaded has none "
            "any more; its report.html shows them"
        )
    width, height = (max(image.size[axis] for row in rows for image in row) for axis in (0, 1))
    columns = max(map(len, rows))
    sheet = Image.new("RGB", (columns * (width + GAP) - GAP, len(rows) * (height + GAP) - GAP), "white")
    for y, row in enumerate(rows):
        for x, image in enumerate(row):
            sheet.paste(image, (x * (width + GAP), y * (height + GAP)))
    return sheet
