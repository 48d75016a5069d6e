"""Pictures are shown as browsers show them, or refused with the reason."""

from __future__ import annotations

import io
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms

from dpo_video.data.pictures import MAX_PIXELS, VideoError, load_picture
from dpo_video.data.video import probe_video, read_video

GREY = np.linspace(0, 65535, 64).round().astype(np.uint16).reshape(8, 8)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(
    width: int, height: int, rows: bytes, depth: int = 8, colour: int = 2, *more: bytes
) -> bytes:
    """A PNG of these rows, each with its leading filter byte."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    parts = [
        chunk(b"IHDR", header),
        *more,
        chunk(b"IDAT", zlib.compress(rows)),
        chunk(b"IEND", b""),
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def deep(channels: int) -> bytes:
    """Rows of 16-bit samples, the ramp in every channel."""
    samples = GREY[..., None].repeat(channels, 2).astype(">u2")
    return b"".join(b"\0" + row.tobytes() for row in samples)


@pytest.mark.parametrize(("colour", "channels"), [(0, 1), (2, 3)])
def test_pictures_of_16_bits_keep_their_tones(tmp_path: Path, colour: int, channels: int) -> None:
    (tmp_path / "a.png").write_bytes(png(8, 8, deep(channels), 16, colour))
    still = load_picture(tmp_path / "a.png")
    expected = (GREY / 257)[..., None].repeat(3, 2)
    assert np.abs(still.pixels - expected).max() <= 1
    assert not still.transparent


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "16"])
def test_hidden_colours_become_black(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "a.png"
    if mode == "16":  # 16-bit grey with a transparent tone
        path.write_bytes(png(8, 8, deep(1), 16, 0, chunk(b"tRNS", struct.pack(">H", 65535))))
        assert load_picture(path).pixels[7, 7].tolist() == [0, 0, 0]
        assert load_picture(path).pixels[7, 6].min() > 240
    else:
        image = Image.new("RGBA", (8, 8), (200, 200, 200, 0))
        image.paste((200, 200, 200, 255), (0, 0, 4, 8))
        options: dict[str, Any] = {}
        if mode == "P":
            image, options = Image.new("P", (8, 8), 1), {"transparency": 1}
            image.putpalette([200, 200, 200, 200, 200, 200])
            image.paste(0, (0, 0, 4, 8))
        else:
            image = image.convert(mode)
        image.save(path, **options)
        pixels = load_picture(path).pixels
        assert pixels[:, 4:].max() == 0 and (pixels[:, :4] == 200).all()
    assert load_picture(path).transparent


def test_a_colour_profile_is_applied(tmp_path: Path) -> None:
    # A profile whose red and blue are exchanged stands for any other.
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    data = bytearray(srgb.replace("sRGB".encode("utf-16-be"), "test".encode("utf-16-be")))
    count = struct.unpack(">I", data[128:132])[0]
    entries = {bytes(data[at : at + 4]): at for at in range(132, 132 + 12 * count, 12)}
    red, blue = entries[b"rXYZ"], entries[b"bXYZ"]
    data[red : red + 4], data[blue : blue + 4] = b"bXYZ", b"rXYZ"
    Image.new("RGB", (8, 8), (200, 10, 20)).save(tmp_path / "a.png", icc_profile=bytes(data))
    assert (
        np.abs(load_picture(tmp_path / "a.png").pixels[0, 0].astype(int) - (20, 10, 200)).max() < 6
    )
    for profile in (srgb, b"damaged"):
        Image.new("RGB", (8, 8), (200, 10, 20)).save(tmp_path / "a.png", icc_profile=profile)
        assert load_picture(tmp_path / "a.png").pixels[0, 0].tolist() == [200, 10, 20]


@pytest.mark.parametrize("format", ["EPS", "TIFF", "BMP", "GIF", "WEBP", "PPM"])
def test_a_name_does_not_choose_another_decoder(tmp_path: Path, format: str) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.x", format)
    (tmp_path / "a.x").rename(tmp_path / "000.png")
    with pytest.raises(VideoError, match=r"000\.png is damaged or not a picture"):
        load_picture(tmp_path / "000.png")


def test_a_jpg_named_png_is_read(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8), (9, 9, 9)).save(tmp_path / "a.jpg")
    (tmp_path / "a.jpg").rename(tmp_path / "a.png")
    assert load_picture(tmp_path / "a.png").pixels.shape == (8, 8, 3)


def test_a_picture_that_is_too_large_is_not_decoded(tmp_path: Path) -> None:
    side = 5800
    assert side**2 > MAX_PIXELS
    (tmp_path / "a.png").write_bytes(png(side, side, b""))
    with pytest.raises(VideoError, match=r"has 5800 x 5800 pixels, more than 32 million\. Shrink"):
        load_picture(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(png(1 << 20, 1 << 20, b""))  # Pillow's own limit
    with pytest.raises(VideoError, match=r"b\.png"):
        load_picture(tmp_path / "b.png")


@pytest.mark.parametrize("coding", [(9, 16), (9, 18), (12, 13), (1, 8)])
def test_pngs_in_hdr_or_wide_gamut_are_refused(tmp_path: Path, coding: tuple[int, int]) -> None:
    rows = b"".join(b"\0" + bytes(24) for _ in range(8))
    (tmp_path / "a.png").write_bytes(png(8, 8, rows, 8, 2, chunk(b"cICP", bytes([*coding, 0, 1]))))
    with pytest.raises(VideoError, match="is HDR or of wide gamut"):
        load_picture(tmp_path / "a.png")
    (tmp_path / "a.png").write_bytes(png(8, 8, rows, 8, 2, chunk(b"cICP", bytes([1, 13, 0, 1]))))
    assert load_picture(tmp_path / "a.png").pixels.max() == 0


def test_an_animated_png_is_no_frame(tmp_path: Path) -> None:
    images = [Image.new("RGB", (8, 8), (40 * n, 0, 0)) for n in range(3)]
    images[0].save(tmp_path / "a.png", save_all=True, append_images=images[1:])
    with pytest.raises(VideoError, match=r"a\.png is animated"):
        load_picture(tmp_path / "a.png")


def test_a_phones_orientation_is_applied(tmp_path: Path) -> None:
    image = Image.new("RGB", (8, 16))
    image.paste((255, 255, 255), (0, 0, 8, 8))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    image.save(tmp_path / "a.png", exif=exif)
    pixels = load_picture(tmp_path / "a.png").pixels
    assert pixels.shape == (8, 16, 3)
    assert pixels[:, 8:].min() == 255 and pixels[:, :8].max() == 0


def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.png")
    with pytest.raises(
        VideoError, match=r"a\.png is damaged or not a picture \(it is a named pipe"
    ):
        load_picture(tmp_path / "a.png")


def test_a_folder_of_png_and_jpg_is_not_guessed(tmp_path: Path) -> None:
    for name in ("0.png", "1.png", "cover.jpg"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    for use in (read_video, probe_video):
        with pytest.raises(VideoError, match="unclear which are its frames"):
            use(tmp_path)


def test_damaged_pictures_are_named(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8)).save(
        buffer, "PNG"
    )
    data = buffer.getvalue()
    for damaged in (data[:20], data[: len(data) // 2], data.replace(b"IDAT", b"IDAX"), b""):
        (tmp_path / "a.png").write_bytes(damaged)
        with pytest.raises(VideoError, match=r"a\.png is damaged or not a picture"):
            load_picture(tmp_path / "a.png")
