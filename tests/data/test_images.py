"""Every mode, depth, orientation and number of frames of an image file becomes the right pixels, or one clear line."""

from __future__ import annotations

import io
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFile, ImageOps

from sylva_ray.data.images import ImageError, decode_image, image_formats, image_suffixes

Pixel = tuple[int, int, int]

RAMP = np.array([[0, 128, 129, 257, 30000, 65535]], np.uint16)
"""16-bit gray levels; 128 and 129 are on both sides of half a step of 8 bits."""
RAMP_IN_8_BITS = [0, 0, 1, 1, 117, 255]


def encoded(image: Image.Image, file_format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def row(data: bytes) -> list[Pixel]:
    """The pixels of the first row."""
    image = decode_image(data)
    assert image.mode == "RGB"
    pixels: list[Pixel] = [tuple(pixel) for pixel in np.asarray(image)[0].tolist()]
    return pixels


def gray(*levels: int) -> list[Pixel]:
    return [(level, level, level) for level in levels]


def two(mode: str, first: Any, second: Any) -> Image.Image:
    """Two pixels side by side."""
    image = Image.new(mode, (2, 1), first)
    image.putpixel((1, 0), second)
    return image


def palette_image(alphas: bytes | None = None) -> bytes:
    """Red and blue as palette colours, with one opacity each."""
    image = Image.new("P", (2, 1), 0)
    image.putpalette([200, 0, 0, 0, 0, 100])
    image.putpixel((1, 0), 1)
    return encoded(image, "PNG", **({} if alphas is None else {"transparency": alphas}))


def png(width: int, height: int, depth: int, colour_type: int, data: bytes, **chunks: bytes) -> bytes:
    """A PNG by its bytes; ``data`` is unfiltered rows without their filter bytes."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    stride = len(data) // height if height else 0
    rows = b"".join(b"\0" + data[y * stride : (y + 1) * stride] for y in range(height))
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0))
    others = b"".join(chunk(name.encode(), content) for name, content in chunks.items())
    return b"\x89PNG\r\n\x1a\n" + header + others + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def tiff(samples: bytes, bits: int, photometric: int) -> bytes:
    """A little-endian gray TIFF of one row by its bytes."""
    width = len(samples) * 8 // bits
    tags = [(256, 4, width), (257, 4, 1), (258, 3, bits), (259, 3, 1), (262, 3, photometric)]
    tags += [(273, 4, 8), (277, 3, 1), (278, 4, 1), (279, 4, len(samples))]
    directory = b"".join(
        struct.pack("<HHIHH" if kind == 3 else "<HHII", tag, kind, 1, value, *([0] if kind == 3 else []))
        for tag, kind, value in tags
    )
    padded = samples + b"\0" * (len(samples) % 2)
    return (
        struct.pack("<2sHI", b"II", 42, 8 + len(padded)) + padded + struct.pack("<H", len(tags)) + directory + bytes(4)
    )


RAMP_BYTES = RAMP.astype(">u2").tobytes()
HALF_RED, HALF_BLUE = (227, 127, 127), (127, 127, 177)
"""(200, 0, 0) and (0, 0, 100) with alpha 128 on white: 200 * 128/255 + 255 * 127/255 = 227.4, and so on."""

CONVERTED: dict[str, tuple[Callable[[], bytes], list[Pixel]]] = {
    "1": (lambda: encoded(two("1", 0, 1), "PNG"), gray(0, 255)),
    "1 in TIFF": (lambda: encoded(two("1", 0, 1), "TIFF"), gray(0, 255)),
    "L": (lambda: encoded(two("L", 7, 200), "PNG"), gray(7, 200)),
    "gray of 2 bits": (lambda: png(4, 1, 2, 0, bytes([0b00011011])), gray(0, 85, 170, 255)),
    "LA": (lambda: encoded(two("LA", (40, 255), (40, 0)), "PNG"), gray(40, 255)),
    "LA of 16 bits": (lambda: png(2, 1, 16, 4, struct.pack(">4H", 0x2800, 65535, 0x2800, 0)), gray(40, 255)),
    "P": (palette_image, [(200, 0, 0), (0, 0, 100)]),
    "P with one transparent colour": (lambda: palette_image(b"\xff\x00"), [(200, 0, 0), (255, 255, 255)]),
    "P with opacities": (lambda: palette_image(b"\x80\x80"), [HALF_RED, HALF_BLUE]),
    "P in GIF, transparent": (
        lambda: encoded(Image.open(io.BytesIO(palette_image())), "GIF", transparency=1),
        [(200, 0, 0), (255, 255, 255)],
    ),
    "PA": (
        lambda: encoded(two("RGBA", (200, 0, 0, 255), (200, 0, 0, 0)).convert("PA"), "TIFF"),
        [(200, 0, 0), (255, 255, 255)],
    ),
    "RGB": (lambda: encoded(two("RGB", (1, 2, 3), (4, 5, 6)), "PNG"), [(1, 2, 3), (4, 5, 6)]),
    "RGB with a transparent colour": (
        lambda: encoded(two("RGB", (1, 2, 3), (4, 5, 6)), "PNG", transparency=(4, 5, 6)),
        [(1, 2, 3), (255, 255, 255)],
    ),
    "L with a transparent level": (lambda: encoded(two("L", 9, 8), "PNG", transparency=8), gray(9, 255)),
    "1 with a transparent level": (lambda: encoded(two("1", 0, 1), "PNG", transparency=0), gray(255, 255)),
    "RGB of 16 bits": (lambda: png(1, 1, 16, 2, struct.pack(">3H", 65535, 0x80FF, 0)), [(255, 128, 0)]),
    "RGBA": (
        lambda: encoded(two("RGBA", (200, 0, 0, 128), (9, 9, 9, 255)), "PNG"),
        [HALF_RED, (9, 9, 9)],
    ),
    "RGBA of 16 bits": (
        lambda: png(2, 1, 16, 6, struct.pack(">8H", 0xC800, 0, 0, 65535, 0xC800, 0, 0, 0)),
        [(200, 0, 0), (255, 255, 255)],
    ),
    "RGBA in WebP": (
        lambda: encoded(two("RGBA", (9, 9, 9, 255), (0, 0, 0, 0)), "WEBP", lossless=True),
        [(9, 9, 9), (255, 255, 255)],
    ),
    "RGBa": (  # premultiplied: TIFF's tag 338 is 1
        lambda: encoded(two("RGBA", (100, 0, 0, 128), (9, 9, 9, 255)), "TIFF").replace(
            struct.pack("<HHIH", 338, 3, 1, 2), struct.pack("<HHIH", 338, 3, 1, 1)
        ),
        [(227, 127, 127), (9, 9, 9)],
    ),
    "RGBX": (lambda: encoded(two("RGBX", (1, 2, 3, 0), (4, 5, 6, 0)), "TIFF"), [(1, 2, 3), (4, 5, 6)]),
    "CMYK": (
        lambda: encoded(two("CMYK", (255, 0, 0, 0), (0, 0, 0, 155)), "TIFF"),
        [(0, 255, 255), (100, 100, 100)],
    ),
    "YCbCr": (lambda: encoded(two("YCbCr", (90, 128, 128), (0, 128, 128)), "TIFF"), gray(90, 0)),
    "gray of 16 bits": (lambda: png(6, 1, 16, 0, RAMP_BYTES), gray(*RAMP_IN_8_BITS)),
    "I;16 in TIFF": (lambda: encoded(Image.fromarray(RAMP), "TIFF"), gray(*RAMP_IN_8_BITS)),
    "I;16 compressed": (
        lambda: encoded(Image.fromarray(RAMP), "TIFF", compression="tiff_deflate"),
        gray(*RAMP_IN_8_BITS),
    ),
    "I;16B in TIFF": (
        lambda: encoded(Image.frombytes("I;16B", (6, 1), RAMP_BYTES), "TIFF"),
        gray(*RAMP_IN_8_BITS),
    ),
    "I;16 of which 0 is white": (
        lambda: tiff(RAMP.astype("<u2").tobytes(), 16, 0),
        gray(*(255 - level for level in RAMP_IN_8_BITS)),
    ),
    "gray of 12 bits": (lambda: tiff(bytes([0x00, 0x0F, 0xFF, 0x80, 0x10, 0x00]), 12, 1), gray(0, 255, 128, 0)),
    "I;16 in JPEG 2000": (
        lambda: encoded(Image.fromarray(RAMP.repeat(4, 0)), "JPEG2000"),
        gray(*RAMP_IN_8_BITS),
    ),
    "I in PGM": (lambda: b"P5 6 1 65535\n" + RAMP_BYTES, gray(*RAMP_IN_8_BITS)),
    "I in PGM of 10 bits": (lambda: b"P5 2 1 1023\n" + struct.pack(">2H", 0, 1023), gray(0, 255)),
    "PPM of 16 bits": (lambda: b"P6 1 1 65535\n" + struct.pack(">3H", 65535, 0, 257), [(255, 0, 1)]),
    "TGA": (lambda: encoded(two("RGB", (1, 2, 3), (4, 5, 6)), "TGA"), [(1, 2, 3), (4, 5, 6)]),
    "QOI": (lambda: encoded(two("RGB", (1, 2, 3), (4, 5, 6)), "QOI"), [(1, 2, 3), (4, 5, 6)]),
}


@pytest.mark.parametrize("case", CONVERTED)
def test_every_mode_becomes_the_colours_it_shows(case: str) -> None:
    make, expected = CONVERTED[case]
    assert row(make()) == expected


def animation(file_format: str) -> bytes:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "green")]
    return encoded(frames[0], file_format, save_all=True, append_images=frames[1:])


REFUSED: dict[str, tuple[Callable[[], bytes], str]] = {
    "I": (lambda: encoded(Image.new("I", (2, 2), 70000), "TIFF"), r"mode I .*8-bit gray or RGB"),
    "I of 16 bits with a sign": (lambda: encoded(Image.new("I", (2, 2)), "TIFF", tiffinfo={}), r"mode I "),
    "F": (lambda: encoded(Image.new("F", (2, 2), 0.5), "TIFF"), r"mode F .*8-bit gray or RGB"),
    "F in PFM": (lambda: encoded(Image.new("F", (2, 2), 0.5), "PPM"), r"mode F "),
    "LAB": (lambda: encoded(Image.new("LAB", (2, 2)), "TIFF"), r"mode LAB .*profile"),
    "I;16 in a format without a known range": (lambda: encoded(Image.fromarray(RAMP), "IM"), r"mode I;16 "),
    "16 bits with a transparent level": (
        lambda: png(6, 1, 16, 0, RAMP_BYTES, tRNS=b"\x00\x80"),
        r"transparent colour; save it with an alpha channel",
    ),
    "16-bit colours with a transparent one": (
        lambda: png(1, 1, 16, 2, bytes(6), tRNS=bytes(6)),
        r"transparent colour",
    ),
    "4 bits with a transparent level": (lambda: png(2, 1, 4, 0, b"\x3f", tRNS=b"\x00\x03"), r"transparent colour"),
    "animated GIF": (lambda: animation("GIF"), r"several frames \(GIF\)"),
    "animated PNG": (lambda: animation("PNG"), r"several frames \(PNG\)"),
    "animated WebP": (lambda: animation("WEBP"), r"several frames \(WEBP\)"),
    "animated AVIF": (lambda: animation("AVIF"), r"several frames \(AVIF\)"),
    "TIFF of several pages": (lambda: animation("TIFF"), r"several frames \(TIFF\)"),
    "nothing": (lambda: b"", r"not a readable image \(its format is not known, or it is empty\)"),
    "text": (lambda: b"Not an image\n" * 9, r"its format is not known"),
    "no width": (lambda: png(0, 1, 8, 0, b""), r"no pixels|not a readable image"),
    "PDF": (lambda: encoded(Image.new("L", (2, 2)), "PDF"), r"its format is not known"),
    "EPS, which Ghostscript would execute": (
        lambda: encoded(Image.new("L", (2, 2)), "EPS"),
        r"its format is not known",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_converted_rightly_is_refused_with_the_reason(case: str) -> None:
    make, expected = REFUSED[case]
    with pytest.raises(ImageError, match=expected) as caught:
        decode_image(make())
    assert "\n" not in str(caught.value)


def noise(file_format: str) -> bytes:
    return encoded(Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)), file_format)


@pytest.mark.parametrize("truncation_is_allowed", [False, True])
@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "BMP", "TIFF", "GIF", "WEBP", "TGA", "PPM"])
def test_half_a_file_is_refused(file_format: str, truncation_is_allowed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where another library has told Pillow to fill the missing half with gray."""
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", truncation_is_allowed)
    data = noise(file_format)
    with pytest.raises(ImageError, match="not a readable image"):
        decode_image(data[: len(data) // 2])
    assert truncation_is_allowed == ImageFile.LOAD_TRUNCATED_IMAGES


@pytest.mark.parametrize("side", [10_000, 50_000])
def test_a_decompression_bomb_is_refused_before_it_is_decoded(side: int) -> None:
    """Pillow only warns of the first one."""
    with pytest.raises(ImageError, match=r"more than 89,478,485 pixels"):
        decode_image(png(side, side, 8, 0, b""))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "TIFF", "WEBP", "MPO", "AVIF"])
def test_an_image_is_turned_upright(file_format: str, orientation: int) -> None:
    """Independent oracle: Pillow's own transposition of the same pixels."""
    pixels = np.zeros((16, 48, 3), np.uint8)
    pixels[:, :16] = 250
    pixels[:8, 16:] = 120
    exif = Image.Exif()
    exif[0x0112] = orientation
    plain = Image.fromarray(pixels)
    tagged = Image.open(io.BytesIO(encoded(plain, "PNG", exif=exif)))
    expected = np.asarray(ImageOps.exif_transpose(tagged)).astype(int)
    assert expected.shape == ((16, 48, 3) if orientation < 5 else (48, 16, 3))
    options: dict[str, dict[str, Any]] = {"WEBP": {"lossless": True}, "AVIF": {"quality": 100}}
    data = encoded(plain, file_format, exif=exif, **options.get(file_format, {}))
    found = np.asarray(decode_image(data)).astype(int)
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() < 12  # JPEG rounds


@pytest.mark.parametrize("exif", [b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0junk junk junk"])
def test_damaged_metadata_leaves_an_image_as_it_is_stored(exif: bytes) -> None:
    plain = Image.new("RGB", (8, 4), (120, 120, 120))
    assert decode_image(encoded(plain, "JPEG", exif=exif)).size == (8, 4)


def test_the_first_picture_of_a_camera_file_is_the_image() -> None:
    """Phones write MPO files with previews and depth maps under the name .jpg."""
    frames = [Image.new("RGB", (16, 16), colour) for colour in ((250, 0, 0), (0, 0, 250))]
    data = encoded(frames[0], "MPO", save_all=True, append_images=frames[1:])
    assert Image.open(io.BytesIO(data)).n_frames == 2  # type: ignore[attr-defined]
    assert np.abs(np.subtract(row(data)[0], (250, 0, 0))).max() <= 3


def test_a_file_is_decoded_by_its_content_not_its_name(tmp_path: Path) -> None:
    (tmp_path / "photo.jpg").write_bytes(encoded(Image.new("RGB", (2, 2), (1, 2, 3)), "PNG"))
    assert decode_image(tmp_path / "photo.jpg").getpixel((0, 0)) == (1, 2, 3)


def test_an_image_that_is_opaque_keeps_its_colours_under_its_alpha_channel() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 4), np.uint8)
    pixels[..., 3] = 255
    assert np.array_equal(np.asarray(decode_image(encoded(Image.fromarray(pixels), "PNG"))), pixels[..., :3])


def test_suffixes_are_those_of_formats_that_are_decoded() -> None:
    assert {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".ppm", ".tif", ".tiff", ".jp2", ".avif", ".jfif"} <= (
        image_suffixes()
    )
    assert not {".pdf", ".eps", ".ps", ".h5", ".hdf", ".mpg", ".wmf", ".txt", ".npy", ""} & image_suffixes()
    assert image_formats()[:2] == ("PNG", "JPEG")


def test_nothing_is_printed_about_an_odd_file(recwarn: pytest.WarningsRecorder) -> None:
    decode_image(palette_image(b"\x80\x80"))
    assert not recwarn.list


def test_a_file_that_cannot_be_opened_is_refused(tmp_path: Path) -> None:
    os.symlink(tmp_path / "nowhere.png", tmp_path / "link.png")
    for name in ("link.png", "."):
        with pytest.raises(ImageError, match="not a readable image"):
            decode_image(tmp_path / name)
