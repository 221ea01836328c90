"""Decode image files to 8-bit RGB, or say why a file cannot be decoded to what it shows.

docs/datasets.md has the table of modes and rules.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageFile, UnidentifiedImageError
from PIL.ExifTags import Base as ExifTag

from sylva_ray.core.errors import reason_of

BACKGROUND = (255, 255, 255, 255)
"""The colour behind transparent pixels: white."""

COMMON_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
"""Formats that are tried first."""

NOT_DECODED = {"EPS", "MPEG"}
"""Formats that Pillow opens, but whose pixels come from another program or not at all."""

FIRST_FRAME_IS_THE_IMAGE = {"MPO", "PSD"}
"""Formats in which the further frames are previews, depth maps or layers of the first one."""

SIXTEEN_BIT_FORMATS = {"PNG", "TIFF", "JPEG2000"}
"""Formats in which 16-bit gray levels are known to cover 0 to 65535."""

PLAIN_TRANSPARENCY = {"1", "L", "RGB"}
"""Raw modes of PNG in which Pillow compares pixels with the transparent colour at their own depth."""

WHITE_IS_ZERO = 0
"""The value of TIFF's PhotometricInterpretation for images in which 0 is white."""

REFUSED_MODES = {
    "I": "32-bit integers, whose range is not known",
    "F": "floating-point numbers, whose range is not known",
    "LAB": "CIELAB, for which a colour profile would be needed",
}

UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""The transposition that turns an image with this EXIF orientation upright, as in `PIL.ImageOps.exif_transpose`."""


class ImageError(ValueError):
    """An image cannot be used; the message says why and what to do, and follows the name of the file."""


@cache
def image_formats() -> tuple[str, ...]:
    """Return the names of the formats that are decoded, the common ones first."""
    Image.init()
    decoded = [name for name, (plugin, _) in Image.OPEN.items() if name not in NOT_DECODED and not _is_stub(plugin)]
    return tuple(sorted(decoded, key=lambda name: (COMMON_FORMATS.index(name) if name in COMMON_FORMATS else 99, name)))


@cache
def image_suffixes() -> frozenset[str]:
    """Return the suffixes, in lower case, of the files that are decoded."""
    formats = {*image_formats(), "MPO"}  # an MPO file is opened as JPEG
    return frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in formats)


def _is_stub(plugin: Callable[..., Any]) -> bool:
    """Return whether a plugin only recognises its format."""
    return isinstance(plugin, type) and issubclass(plugin, ImageFile.StubImageFile)


def decode_image(source: Path | bytes) -> Image.Image:
    """Decode an image file.

    Args:
        source: the file, or its content.

    Returns:
        An upright image of mode RGB. Transparent parts are white.

    Raises:
        ImageError: the file is damaged, too large, has several frames, or a mode that cannot be converted.
    """
    with _strict_decoders():
        try:
            with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, "r", image_formats()) as image:
                return _decoded(image)
        except ImageError:
            raise
        except (Image.DecompressionBombError, Image.DecompressionBombWarning):
            limit = f"{Image.MAX_IMAGE_PIXELS:,} pixels"
            raise ImageError(f"has more than {limit}, the limit of Pillow; scale it down") from None
        except Exception as error:  # decoders of damaged files raise errors of many types
            reason = reason_of(error)
            if isinstance(error, UnidentifiedImageError):
                reason = "its format is not known, or it is empty"
            raise ImageError(f"is not a readable image ({reason})") from None


@contextmanager
def _strict_decoders() -> Iterator[None]:
    """Make Pillow refuse what it only warns of, or what another library has told it to accept."""
    accepted = ImageFile.LOAD_TRUNCATED_IMAGES
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about tags that are not used
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = accepted


def _decoded(image: Image.Image) -> Image.Image:
    if min(image.size) < 1:
        raise ImageError(f"has no pixels ({image.width} x {image.height})")
    if getattr(image, "is_animated", False) and image.format not in FIRST_FRAME_IS_THE_IMAGE:
        raise ImageError(f"has several frames ({image.format}); save the one that is meant as a file of its own")
    raw_mode = _raw_mode(image)
    if "transparency" in image.info and image.mode != "P" and raw_mode not in PLAIN_TRANSPARENCY:
        raise ImageError(f"has mode {image.mode} ({raw_mode}) with a transparent colour; save it with an alpha channel")
    gray_levels = _sixteen_bit_levels(image) if image.mode.startswith("I") else 0
    image.load()
    pixels = _eight_bit_gray(image, gray_levels) if gray_levels else image
    return to_rgb(_upright(pixels, _orientation(image)))


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image to mode RGB; transparent parts become white.

    Args:
        image: of any mode of Pillow with 8 bits per channel.

    Raises:
        ImageError: the mode cannot be converted.
    """
    if image.mode in REFUSED_MODES or image.mode.startswith("I;"):
        what = REFUSED_MODES.get(image.mode, "16-bit integers, whose range is not known in this format")
        raise ImageError(f"has mode {image.mode} ({what}); save it as 8-bit gray or RGB")
    if not image.has_transparency_data:
        return image.convert("RGB")
    if image.mode == "La":
        image = image.convert("LA")
    in_front = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", in_front.size, BACKGROUND), in_front).convert("RGB")


def _raw_mode(image: Image.Image) -> str:
    """Return how the pixels are stored in the file, e.g. ``RGB;16B``; of files without tiles, the mode."""
    tiles = getattr(image, "tile", None) or [None]
    arguments = getattr(tiles[0], "args", None)
    first = arguments[0] if isinstance(arguments, tuple) and arguments else arguments
    return first if isinstance(first, str) else image.mode


def _sixteen_bit_levels(image: Image.Image) -> int:
    """Return the highest gray level of an image of 16 bits, negative if it stands for black; 0: it is not known."""
    if image.format == "PPM" and image.mode == "I":
        return 65535  # Pillow scales every PGM of more than 8 bits to this
    if not image.mode.startswith("I;16") or image.format not in SIXTEEN_BIT_FORMATS:
        return 0
    if image.format != "TIFF":
        return 65535
    tags = image.tag_v2  # type: ignore[attr-defined]
    highest = int(2 ** tags.get(ExifTag.BitsPerSample, (16,))[0] - 1)
    return -highest if tags.get(ExifTag.PhotometricInterpretation) == WHITE_IS_ZERO else highest


def _eight_bit_gray(image: Image.Image, highest: int) -> Image.Image:
    """Scale gray levels to 0 to 255, rounded."""
    top = abs(highest)
    levels = np.asarray(image).clip(0, top).astype(np.uint32)
    if highest < 0:
        levels = top - levels
    return Image.fromarray(((levels * 255 + top // 2) // top).astype(np.uint8))


def _orientation(image: Image.Image) -> int | None:
    """Return the EXIF orientation; None where there is none that can be read."""
    try:
        return image.getexif().get(ExifTag.Orientation)
    except Exception:  # damaged metadata raises errors of many types; viewers show such an image as it is stored
        return None


def _upright(image: Image.Image, orientation: int | None) -> Image.Image:
    return image.transpose(UPRIGHT[orientation]) if orientation in UPRIGHT else image
