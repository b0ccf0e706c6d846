"""Pictures one after the other, as an animated GIF or WebP."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from surgery import files
from surgery.train.views.canvas import Array

if TYPE_CHECKING:
    from PIL.Image import Image

Animation = Literal["gif", "webp"]

_SECONDS = 8.0
"""About how long it plays."""
_LAST_MS = 2000


def write(pictures: Sequence[Array], path: Path) -> Path:
    """Write an animation in the format of the suffix, which repeats for ever.

    Args:
        pictures: ``(height, width, 3)`` uint8 each, of one size; two or more.
        path: Ends in ``.gif`` or ``.webp``.
    """
    from PIL import Image

    images = [Image.fromarray(picture) for picture in pictures]
    each = round(min(500.0, max(40.0, 1000 * _SECONDS / len(images))))
    times = [each] * (len(images) - 1) + [_LAST_MS]
    held = io.BytesIO()
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".webp":
        first, *rest = images
        first.save(
            held, "WEBP", save_all=True, append_images=rest, duration=times, loop=0, lossless=True
        )
    else:
        palette = _shared_palette(pictures)
        first, *rest = (
            image.quantize(palette=palette, dither=Image.Dither.NONE) for image in images
        )
        first.save(
            held, "GIF", save_all=True, append_images=rest, duration=times, loop=0, disposal=1
        )
    files.write(path, held.getvalue())
    return path


def _shared_palette(pictures: Sequence[Array]) -> Image:
    """One palette for all frames: with one each, the colours of the scale would change."""
    from PIL import Image

    some = [pictures[0], pictures[len(pictures) // 2], pictures[-1]]
    found = Image.fromarray(np.concatenate(some)).quantize(256, method=Image.Quantize.MEDIANCUT)
    colors = np.array(found.getpalette()).reshape(-1, 3)
    # The cut mixes what is nearly white into white.
    colors[colors.sum(1).argmax()] = 255
    found.putpalette(colors.ravel().tolist())
    return found
