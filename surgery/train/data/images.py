"""Image files: which there are, and what a decoded one looks like.

Whatever a file holds becomes 8 bits per channel, RGB or grey:

- the orientation in its EXIF data is applied;
- transparency is composited over white;
- grey is repeated over three channels, or colour becomes luma (ITU-R 601) for one channel;
- 16-bit grey is scaled to 8 bits (Pillow itself would clip it);
- of several frames the first is taken;
- what has no defined range (32-bit floats, integers beyond 16 bits) is refused.
"""

from __future__ import annotations

import functools
import logging
import os
import struct
import zlib
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Literal

from surgery import progress
from surgery.errors import DataError
from surgery.train.data.configs import Channels

if TYPE_CHECKING:
    from PIL.Image import Image

logger = logging.getLogger(__name__)

#: A path, or the bytes as an open file.
File = str | os.PathLike[str] | BinaryIO

# Formats that Pillow names but cannot decode, and EPS, for which it starts another program.
_NOT_DECODED = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}
_SIXTEEN_BITS = {"I", "I;16", "I;16B", "I;16L", "I;16N"}
_TRANSPARENT = {"LA", "La", "PA", "RGBA", "RGBa"}
_ORIENTATION = 0x0112  # EXIF 2.32, tag Orientation: 5 to 8 swap height and width


@functools.cache
def formats() -> tuple[str, ...]:
    """Names of the formats that are read, as Pillow calls them."""
    from PIL import Image

    Image.init()
    return tuple(sorted(set(Image.OPEN) - _NOT_DECODED))


@functools.cache
def extensions() -> frozenset[str]:
    """Endings of image files, lower case, with the dot."""
    from PIL import Image

    readable = set(formats())
    found = Image.registered_extensions().items()
    return frozenset(ending.lower() for ending, name in found if name in readable)


def is_image(name: str) -> bool:
    """Whether a file's name is that of an image; hidden files are none."""
    return not name.startswith(".") and Path(name).suffix.lower() in extensions()


def find(folder: Path) -> tuple[list[str], list[str]]:
    """Files under a folder, links followed, in the order of their names.

    Returns:
        Paths relative to the folder: those of images, and all others.

    Raises:
        DataError: a folder cannot be read, or a link leads to one that was read already.
    """
    images: list[str] = []
    others: list[str] = []
    seen: dict[tuple[int, int], str] = {}
    for place, _, files in os.walk(folder, followlinks=True, onerror=_unreadable):
        there = Path(place).stat()
        before = seen.setdefault((there.st_dev, there.st_ino), place)
        if before != place:
            raise DataError(
                f"{place} is {before} once more, by a link; its images would count twice",
                hint="remove the link",
            )
        for name in files:
            path = os.path.relpath(os.path.join(place, name), folder)  # noqa: PTH118
            (images if is_image(name) else others).append(path)
    return sorted(images), sorted(others)


def _unreadable(error: OSError) -> None:
    # Without it, os.walk passes over what it cannot read.
    raise DataError(f"{error.filename} cannot be read: {error.strerror}") from None


def decode(file: File, name: str, channels: Channels) -> Image:
    """Decode an image as the module's docstring says.

    Args:
        file: The image.
        name: What an error calls it.
        channels: 3 for mode RGB, 1 for mode L.

    Raises:
        DataError: it cannot be decoded, or its values have no defined range.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(file, formats=formats()) as image:
            ImageOps.exif_transpose(image, in_place=True)
            return _plain(image, name, channels)
    except FileNotFoundError:
        raise DataError(f"{name} is gone since the data was opened") from None
    except _broken() as error:
        raise _undecodable(name, error) from None


def size_of(file: File, name: str) -> tuple[int, int]:
    """Height and width of an image as it will be decoded.

    Read from its header where the format keeps the orientation there; a PNG is decoded.

    Raises:
        DataError: it is no image.
    """
    from PIL import Image

    try:
        with Image.open(file, formats=formats()) as image:
            width, height = image.size
            swapped = image.getexif().get(_ORIENTATION, 1) in {5, 6, 7, 8}
    except _broken() as error:
        raise _undecodable(name, error) from None
    return (width, height) if swapped else (height, width)


def open_header(file: File, name: str) -> None:
    """Read the header of an image.

    Raises:
        DataError: it is no image.
    """
    from PIL import Image

    try:
        with Image.open(file, formats=formats()):
            return
    except _broken() as error:
        raise _undecodable(name, error) from None


def check(
    where: object,
    files: Iterable[tuple[str, Callable[[], File]]],
    count: int,
    how: Literal["headers", "pixels"],
    size: int | None,
) -> tuple[int, int]:
    """Look at every image once, so that a broken one does not end a run hours later.

    Args:
        where: What holds the images, for messages.
        files: What errors call each image, and a way to open it; at least one.
        count: How many there are.
        how: Read the headers only, or decode everything.
        size: What images will be resized to; None if they must have one shape as they are.

    Returns:
        Height and width of the samples.

    Raises:
        DataError: naming every broken image, or two images of different shapes.
    """
    broken: list[DataError] = []
    first: tuple[str, tuple[int, int]] | None = None
    for name, opened in progress.track(files, f"checking {where}", count):
        try:
            if how == "pixels":
                decode(opened(), name, 3)
            if size is not None:
                open_header(opened(), name)
                continue
            shape = size_of(opened(), name)
        except DataError as error:
            broken.append(error)
            continue
        first = first or (name, shape)
        if shape != first[1]:
            raise _mixed(where, first, (name, shape))
    if broken:
        raise _all_broken(where, broken)
    if size is not None:
        return size, size
    if first is None:
        raise DataError(f"{where} holds no images")
    return first[1]


def check_files(
    folder: Path, paths: Sequence[str], how: Literal["headers", "pixels"], size: int | None
) -> tuple[int, int]:
    """``check`` for files; their paths are relative to the folder."""
    files = ((str(folder / path), partial(Path, folder, path)) for path in paths)
    return check(folder, files, len(paths), how, size)


def report_others(folder: Path, others: Sequence[str]) -> None:
    """Say which files are left out because their names are not those of images."""
    if others:
        logger.warning(
            "%s: %d files are no images by their names and are left out, such as %s",
            folder,
            len(others),
            others[0],
        )


def _plain(image: Image, name: str, channels: Channels) -> Image:
    from PIL import Image as Images

    if image.mode in _SIXTEEN_BITS:
        image = _to_eight_bits(image, name)
    if image.mode == "F":
        raise DataError(
            f"{name} holds 32-bit floats, whose range is not defined",
            hint="convert it to 8 or 16 bits per channel",
        )
    if image.mode in _TRANSPARENT or "transparency" in image.info:
        over = Images.new("RGBA", image.size, "white")
        image = Images.alpha_composite(over, image.convert("RGBA"))
    return image.convert("RGB" if channels == 3 else "L")


def _to_eight_bits(image: Image, name: str) -> Image:
    import numpy as np
    from PIL import Image as Images

    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise DataError(
            f"{name} holds integers from {values.min()} to {values.max()}, expected 16 bits",
            hint="convert it to 8 or 16 bits per channel",
        )
    return Images.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8))


def _broken() -> tuple[type[Exception], ...]:
    """What Pillow raises for files that are damaged or hostile."""
    from PIL import Image

    return (
        OSError,
        SyntaxError,
        ValueError,
        EOFError,
        struct.error,
        zlib.error,
        Image.DecompressionBombError,
    )


def _undecodable(name: str, error: Exception) -> DataError:
    from PIL import UnidentifiedImageError

    # That message of Pillow's only repeats the path.
    why = "no known format" if isinstance(error, UnidentifiedImageError) else str(error)
    return DataError(
        f"{name} cannot be decoded as an image: {why}",
        hint="replace or remove the file",
    )


def _mixed(
    where: object, one: tuple[str, tuple[int, int]], other: tuple[str, tuple[int, int]]
) -> DataError:
    shapes = " and ".join(
        f"{path} is {height} high and {width} wide" for path, (height, width) in (one, other)
    )
    return DataError(
        f"{where} holds images of different shapes: {shapes}",
        hint="give data.size, and every image is resized and cropped to it",
    )


def _all_broken(where: object, broken: Sequence[DataError]) -> DataError:
    if len(broken) == 1:
        return broken[0]
    listed = "".join(f"\n  {error.message}" for error in broken[:10])
    more = f"\n  and {len(broken) - 10} more" if len(broken) > 10 else ""
    return DataError(
        f"{where}: {len(broken)} images cannot be decoded:{listed}{more}",
        hint="replace or remove them",
    )
