"""Still pictures and animated WebP, read by Pillow: upright, in 8-bit RGB, over black.

Pillow would choose among forty decoders by a file's content, one of which starts Ghostscript. Here
a file must be one of the few formats that its name promises.
"""

from __future__ import annotations

import contextlib
import io
import struct
import warnings
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms, ImageOps, features

from dpo_video.data import colours
from dpo_video.errors import UserError
from dpo_video.support.reading import open_regular

FRAME_SUFFIXES = frozenset({".png", ".jpg", ".jpeg"})
MAX_PIXELS = 1 << 25  # of one picture: 8K
QUICKEST = 10  # ms; browsers show a frame of an animation that has less for `SLOW`
SLOW = 100  # ms
_CICP_SDR = frozenset({1, 2, 4, 5, 6, 7, 11, 12, 13, 14, 15})  # transfers of H.273

_EIGHT_BITS = ((np.arange(1 << 16) * 255 + 32767) // 65535).astype(np.uint8)

Picture = NDArray[np.uint8]
Size = tuple[int, int]


class VideoError(UserError):
    """A file that is no video, is damaged, holds no frames, or cannot be shown as it was meant."""


class Still(NamedTuple):
    """A picture as it is to be shown."""

    pixels: Picture
    transparent: bool
    """Whether something of it was transparent, which is black now."""


def load_picture(file: Path, cover: Size | None = None) -> Still:
    """Read a PNG or a JPEG.

    Args:
        file: Its path.
        cover: Shrink it to the smallest size that covers this height and width.

    Raises:
        VideoError: If it is something else, damaged, too large, animated or HDR.
    """
    with _opened(file, ["PNG", "JPEG"]) as (image, stored):
        if image.format == "PNG":
            if getattr(image, "n_frames", 1) > 1:
                raise VideoError(f"{file} is animated. Convert it to a video or to frames.")
            _check_coding(file, stored)
        return _shown(image, cover)


def read_animation(file: Path, cover: Size | None = None) -> Iterator[Still]:
    """The frames of an animated WebP.

    Raises:
        VideoError: If it is something else, damaged or too large.
    """
    with _opened(file, ["WEBP"]) as (image, _):
        for number in range(getattr(image, "n_frames", 1)):
            image.seek(number)
            yield _shown(image, cover)


def animation_times(file: Path) -> list[float]:
    """Start of every frame of an animated WebP and the end of the last one, seconds.

    They are read from the headers of the frames (chunks ANMF) without decoding.
    """
    times = [0]
    with _reported(file), open_regular(file) as stored:
        stored.seek(12)
        while len(head := stored.read(8)) == 8:
            kind, size = struct.unpack("<4sI", head)
            if kind == b"ANMF":
                header = stored.read(16)
                if len(header) < 16:
                    raise ValueError("a frame is cut off")
                wait = int.from_bytes(header[12:15], "little")
                times.append(times[-1] + (wait if wait > QUICKEST else SLOW))
                size -= 16
            stored.seek(size + size % 2, 1)
    return [time / 1000 for time in times]


@contextlib.contextmanager
def _opened(file: Path, formats: list[str]) -> Iterator[tuple[Any, BinaryIO]]:
    """A picture in one of these formats, not decoded yet, and its open file."""
    with _reported(file), open_regular(file) as stored:
        with _quiet():
            image = Image.open(stored, formats=formats)
        with image:
            if image.width * image.height > MAX_PIXELS:
                raise VideoError(
                    f"{file} has {image.width} x {image.height} pixels, more than "
                    f"{MAX_PIXELS >> 20} million. Shrink it."
                )
            yield image, stored


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without Pillow's warnings of large pictures and of damaged metadata."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def _reported(file: Path) -> Iterator[None]:
    """Turn whatever a damaged or hostile file raises into a VideoError."""
    try:
        yield
    except UserError:
        raise
    except OSError as error:  # Pillow's own has no strerror
        reason = f" ({error.strerror})" if error.strerror else ""
        raise VideoError(
            f"{file} is damaged or not a picture{reason}. Remove or replace it."
        ) from error
    except Exception as error:
        raise VideoError(f"{file} is damaged or not a picture. Remove or replace it.") from error


def _check_coding(file: Path, stored: BinaryIO) -> None:
    """Refuse a PNG whose chunk cICP says that it is HDR or of wide gamut."""
    position = stored.tell()
    stored.seek(8)
    while len(head := stored.read(8)) == 8:
        size, kind = struct.unpack(">I4s", head)
        if kind == b"IDAT":
            break
        if kind == b"cICP":
            primaries, transfer = (*stored.read(2), 0, 0)[:2]
            if transfer not in _CICP_SDR or primaries not in colours.NEAR_BT709:
                raise VideoError(
                    f"{file} is HDR or of wide gamut (cICP {primaries}, {transfer}). Convert it "
                    "to SDR in sRGB."
                )
            break
        stored.seek(size + 4, 1)
    stored.seek(position)


def _shown(image: Any, cover: Size | None) -> Still:
    """A Pillow image upright, in 8-bit sRGB, over black, shrunk."""
    with _quiet():
        image.load()
        ImageOps.exif_transpose(image, in_place=True)
        rgb, transparent = _over_black(image, image.info)
    return Still(np.asarray(_shrunk(rgb, cover)), transparent)


def shrink(pixels: Picture, cover: Size | None) -> Picture:
    """Shrink a picture to the smallest size that covers `cover`."""
    return pixels if cover is None else np.asarray(_shrunk(Image.fromarray(pixels), cover))


def _shrunk(image: Any, cover: Size | None) -> Any:
    height, width = shrunk(image.height, image.width, cover)
    if (height, width) == (image.height, image.width):
        return image
    return image.resize((width, height), Image.Resampling.BOX)


def _over_black(image: Any, info: dict[Any, Any]) -> tuple[Any, bool]:
    """The image in RGB, and whether something of it was transparent."""
    if image.mode.startswith("I"):  # 16-bit grey; Pillow's own conversion clips it
        deep = np.asarray(image)
        if deep.dtype != np.uint16:
            deep = deep.clip(0, 65535).astype(np.uint16)
        alpha = None
        if isinstance(key := info.get("transparency"), int):
            alpha = Image.fromarray(np.uint8(255) * (deep != key))
        return _composed(Image.fromarray(_EIGHT_BITS[deep]).convert("RGB"), alpha)
    alpha = None
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in info:
        image = image if image.mode == "RGBA" else image.convert("RGBA")
        alpha = image.getchannel("A")
    return _composed(_in_srgb(image, info.get("icc_profile")), alpha)


def _composed(image: Any, alpha: Any) -> tuple[Any, bool]:
    if alpha is None or alpha.getextrema()[0] == 255:
        return image, False
    black = Image.new("RGB", image.size)
    black.paste(image, mask=alpha)
    return black, True


def _in_srgb(image: Any, profile: Any) -> Any:
    """The image in RGB, converted from its colour profile; an unusable profile is ignored.

    Browsers and viewers ignore profiles that are damaged or of another colour model, too.
    """
    mode = "RGB" if image.mode in ("RGBA", "P", "RGBX") else image.mode
    plain = image.convert("RGB")
    if not isinstance(profile, bytes) or mode not in ("RGB", "L", "CMYK"):
        return plain
    transform = _transform(profile, mode)
    if transform is None:
        return plain
    return ImageCms.applyTransform(image if mode == image.mode else plain, transform)


@lru_cache(maxsize=8)
def _transform(profile: bytes, mode: str) -> Any:
    """Conversion from a profile to sRGB; None if it is sRGB or unusable."""
    if not features.check("littlecms2"):
        return None
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if "sRGB" in ImageCms.getProfileDescription(source):
            return None
        return ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return None


def shrunk(height: int, width: int, cover: Size | None) -> Size:
    """The smallest size at the same aspect that covers `cover`; never larger than the picture."""
    if cover is None:
        return height, width
    scale = max(cover[0] / height, cover[1] / width)
    if scale >= 1:
        return height, width
    return max(round(height * scale), cover[0]), max(round(width * scale), cover[1])
