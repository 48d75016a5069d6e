"""Video files, decoded by ffmpeg (PyAV), frame by frame, as a player shows them.

ffmpeg would choose among hundreds of formats by a file's content, some of which open other files
and addresses. Here the format and the codec are on a list, and the name must promise a video.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any, final

import av
import numpy as np
from av.video.reformatter import Interpolation
from PIL import Image

from dpo_video.data import colours
from dpo_video.data.pictures import MAX_PIXELS, Picture, Size, VideoError, shrunk
from dpo_video.support.reading import open_regular

SUFFIXES = frozenset({
    ".3gp", ".avi", ".flv", ".gif", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg",
    ".mts", ".ogv", ".ts", ".webm", ".wmv", ".y4m",
})  # fmt: skip
CODECS = frozenset({
    "av1", "cinepak", "dnxhd", "dvvideo", "ffv1", "flv", "gif", "h263", "h264", "hevc",
    "huffyuv", "ffvhuff", "jpeg2000", "libdav1d", "libaom-av1", "libvpx", "libvpx-vp9", "mjpeg",
    "mpeg1video", "mpeg2video", "mpeg4", "msmpeg4", "msmpeg4v2", "msmpeg4v3", "png", "prores",
    "qtrle", "rawvideo", "svq1", "svq3", "theora", "utvideo", "v210", "vc1", "vp6", "vp6f", "vp8",
    "vp9", "wmv1", "wmv2", "wmv3", "wrapped_avframe",
})  # fmt: skip
_TAGS = ("color_trc", "color_primaries", "colorspace")
MAX_DECODED = 1 << 36  # pixels of one read: a quarter of an hour in full HD
NO_VIDEO = 0x400 | 0x800  # dispositions of attached pictures and of timed thumbnails
_FFMPEG = {  # what ffmpeg's formats call themselves
    "mov": "mov,mp4,m4a,3gp,3g2,mj2",
    "matroska": "matroska,webm",
}
_ALPHA = {"vp8": "libvpx", "vp9": "libvpx-vp9"}  # ffmpeg's own decoders ignore WebM's alpha
_ALIGNED = 0.02  # of a display matrix whose turns are by quarters

TRANSPARENT = "Partly transparent, shown over black"
INTERLACED = "Interlaced, with both half pictures in each frame"


def hdr_treatment(name: str) -> str:
    """What is done to a video in HDR."""
    return f"HDR ({name}), converted to SDR"


def sniff(head: bytes) -> str | None:
    """Name in ffmpeg of the format of a file that begins so; None for one that is not read."""
    if head[4:8] in (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip", b"pnot"):
        return "mov"
    for magic, name in (
        (b"\x1a\x45\xdf\xa3", "matroska"),
        (b"GIF87a", "gif"),
        (b"GIF89a", "gif"),
        (b"\x30\x26\xb2\x75\x8e\x66\xcf\x11", "asf"),
        (b"FLV", "flv"),
        (b"OggS", "ogg"),
        (b"YUV4MPEG2", "yuv4mpegpipe"),
        (b"\x00\x00\x01\xba", "mpeg"),
        (b"\x00\x00\x01\xb3", "mpegvideo"),
    ):
        if head.startswith(magic):
            return name
    if head[:4] == b"RIFF" and head[8:12] in (b"AVI ", b"AVIX"):
        return "avi"
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "webp"
    if any(head[at : at + 1] == b"G" == head[at + size : at + size + 1]
           for at, size in ((0, 188), (4, 192))):  # fmt: skip
        return "mpegts"
    return None


def format_of(path: Path) -> str:
    """The format of a video file, by its content.

    Raises:
        VideoError: If it is no regular file, or of a format that is not read.
    """
    try:
        with open_regular(path) as file:
            found = sniff(file.read(400))
    except FileNotFoundError as error:
        raise VideoError(f"There is no file {path}. Check the path.") from error
    except OSError as error:
        raise VideoError(
            f"{path} cannot be read: {error.strerror}. Remove or replace it."
        ) from error
    if found is None:
        raise VideoError(damaged(path, "(of no format that is read)"))
    return found


def damaged(path: Path, where: str) -> str:
    """The sentence on a file that cannot be decoded."""
    return f"{path} is damaged or not a video {where}. Remove, replace or re-encode it."


@dataclass(frozen=True, kw_only=True)
class Shot:
    """A decoded frame before its conversion to RGB."""

    time: float
    """Seconds since the beginning."""
    picture: Callable[[Size | None], Picture]


@dataclass(frozen=True, kw_only=True)
class _Facts:
    """What a frame is rendered by besides itself. FFmpeg frees a stream when its file is closed."""

    path: Path
    tags: Mapping[str, int]
    """Numbers of H.273 by name."""
    aspect: float
    """Width of a pixel by its height."""


class MissedError(Exception):
    """A seek that did not find its frame."""


@final
class Film:
    """An open video file: its stream that is a video, and a decoder that sees its alpha."""

    def __init__(self, path: Path, container: Any) -> None:
        """Use `open_film`."""
        self.path = path
        self._container = container
        self.stream = _video_stream(path, container)
        codec = self.stream.codec_context
        if codec is None:
            raise VideoError(damaged(path, "(no installed decoder reads it)"))
        if codec.name not in CODECS:
            raise VideoError(damaged(path, f"(its codec {codec.name} is not read)"))
        if self.stream.metadata.get("alpha_mode") == "1":
            codec = self._with_alpha(codec.name)
        self._codec = codec
        # A frame's header may declare a larger size than the file's header.
        codec.options = {"max_pixels": str(MAX_PIXELS)}

    def _with_alpha(self, name: str) -> Any:
        try:
            return av.CodecContext.create(_ALPHA[name], "r")
        except (KeyError, ValueError) as error:
            raise VideoError(
                f"{self.path} is transparent, and no installed decoder reads the alpha of {name}. "
                "Lay it over a colour and re-encode it."
            ) from error

    def packets(self) -> Iterator[tuple[float | None, bool]]:
        """Time of every packet that is shown, and whether a frame has been decoded by then."""
        decoded = False
        for packet in self._container.demux(self.stream):
            if not decoded:
                frames = self._codec.decode(packet if packet.size else None)
                decoded = any(map(self._look, frames))
            stamp = packet.dts if packet.pts is None else packet.pts
            if stamp is not None and packet.size and not packet.is_discard:  # cut by an edit list
                yield float(stamp * packet.time_base), decoded
            else:
                yield None, decoded

    def _facts(self) -> _Facts:
        """What is known by now; decoding a frame may tell more."""
        codec = self.stream.codec_context
        return _Facts(
            path=self.path,
            tags={name: int(getattr(codec, name, colours.UNSPECIFIED)) for name in _TAGS},
            aspect=float(self.stream.sample_aspect_ratio or 1),  # of DV and DVD, not 1
        )

    def _look(self, frame: Any) -> bool:
        """Note how the first frame has to be treated; a VideoError if it cannot be shown."""
        self.treatments = _Look.of(frame, self._facts()).treatments(frame)
        return True

    treatments: tuple[str, ...] = ()
    """What is done to the frames, once the first one is decoded."""

    def shots(self, start: float) -> Iterator[Shot]:
        """All frames from the beginning, or from a key frame at or before `start` if that is > 0.

        Raises:
            MissedError: If the seek failed or went too far. Read from the beginning then.
        """
        stream, seek = self.stream, start > 0
        origin = None if stream.start_time is None else stream.start_time * stream.time_base
        if seek:
            with contextlib.suppress(av.FFmpegError):
                target = (origin or 0) + Fraction(start)
                self._container.seek(int(target / stream.time_base), stream=stream)
        budget = MAX_DECODED
        for index, frame in enumerate(self._frames()):
            if frame.pts is None:  # raw streams have no time stamps and no seeking
                if seek:
                    raise MissedError
                time = Fraction(index) / (stream.average_rate or Fraction(8))
            else:
                time = frame.pts * (frame.time_base or stream.time_base)
                origin = time if origin is None else origin
                time -= origin
                if seek and index == 0 and time > start:
                    raise MissedError
            if frame.is_corrupt:
                raise VideoError(damaged(self.path, f"after {float(time):.1f} s"))
            budget -= frame.width * frame.height
            if budget < 0:
                raise VideoError(
                    f"{self.path} takes too long to decode up to {float(time):.0f} s. Cut or "
                    "shrink it."
                )
            yield Shot(time=float(time), picture=partial(_render, frame, self._facts()))

    def _frames(self) -> Iterator[Any]:
        for packet in self._container.demux(self.stream):
            yield from self._codec.decode(packet if packet.size else None)


@contextlib.contextmanager
def open_film(path: Path, kind: str) -> Iterator[Film]:
    """Open a video file of a format that `sniff` found.

    Raises:
        VideoError: If it cannot be read, then or while it is used.
    """
    options = {"format_whitelist": _FFMPEG.get(kind, kind), "protocol_whitelist": "file"}
    try:
        # With "file:", a colon in a name is no protocol.
        with av.open(
            f"file:{path.absolute()}", format=kind, options=options, metadata_errors="ignore"
        ) as container:
            yield Film(path, container)
    except (av.FFmpegError, UnicodeEncodeError) as error:
        reason = getattr(error, "strerror", None) or "no file can have this name"
        raise VideoError(damaged(path, f"({reason})")) from error


def _video_stream(path: Path, container: Any) -> Any:
    """The stream to read: the default one, else the largest; covers and thumbnails are none."""
    streams = [s for s in container.streams.video if not int(s.disposition) & NO_VIDEO]
    if not streams:
        what = "a cover picture and no video" if container.streams.video else "no video"
        raise VideoError(f"{path} holds {what}. Remove or replace it.")

    def rank(stream: Any) -> tuple[bool, int]:
        codec = stream.codec_context
        return bool(int(stream.disposition) & 1), codec.width * codec.height if codec else 0

    return max(streams, key=rank)


@dataclass(frozen=True, kw_only=True)
class _Look:
    """How a decoded frame has to be shown."""

    transfer: int
    primaries: int
    alpha: bool
    turn: tuple[bool, bool, bool]
    """Whether to transpose, then to mirror left to right, then top to bottom."""
    interlaced: bool

    @classmethod
    def of(cls, frame: Any, film: _Facts) -> _Look:
        """Read the frame's tags.

        Raises:
            VideoError: If it cannot be shown as it is meant.
        """
        transfer, primaries, matrix = (_tag(frame, film, name) for name in _TAGS)
        names = _side_data(frame)
        advice = "Convert it to SDR in BT.709"
        if "MASTERING_DISPLAY_METADATA" in names and transfer == colours.UNSPECIFIED:
            raise _unshown(film, "is HDR, without saying in which coding", advice)
        if "DOVI_METADATA" in names and transfer not in colours.HDR:
            raise _unshown(film, "is HDR in Dolby Vision without a base layer", advice)
        if transfer in colours.UNKNOWN_TRANSFERS:
            raise _unshown(film, f"is in {colours.UNKNOWN_TRANSFERS[transfer]}", advice)
        if matrix in colours.UNKNOWN_MATRICES:
            raise _unshown(film, f"has colours in coding {matrix} of H.273", advice)
        if primaries not in colours.NEAR_BT709 | colours.CONVERTED:
            raise _unshown(film, f"has primaries {primaries} of H.273", advice)
        alpha = frame.format.has_palette or any(c.is_alpha for c in frame.format.components)
        if alpha and (transfer in colours.HDR or primaries in colours.CONVERTED):
            raise _unshown(film, "is transparent, and HDR or of wide gamut", advice)
        return cls(
            transfer=transfer,
            primaries=primaries,
            alpha=alpha,
            turn=_turn(names.get("DISPLAYMATRIX"), film),
            interlaced=bool(frame.interlaced_frame),
        )

    @property
    def converted(self) -> bool:
        """Whether the colours are not those of BT.709 in SDR."""
        return self.transfer in colours.HDR or self.primaries in colours.CONVERTED

    def treatments(self, frame: Any) -> tuple[str, ...]:
        """What is done to this frame."""
        found = []
        if name := colours.HDR.get(self.transfer):
            found.append(hdr_treatment(name))
        if self.alpha and frame.to_ndarray(format="rgba")[..., 3].min() < 255:
            found.append(TRANSPARENT)
        if self.interlaced:
            found.append(INTERLACED)
        return tuple(found)


def _unshown(film: _Facts, what: str, advice: str) -> VideoError:
    return VideoError(f"{film.path} {what}, which is not read. {advice}.")


def _tag(frame: Any, film: _Facts, name: str) -> int:
    """A number of H.273 of the frame, else of its stream."""
    found = int(getattr(frame, name, colours.UNSPECIFIED))
    return film.tags[name] if found == colours.UNSPECIFIED else found


def _side_data(frame: Any) -> dict[str, Any]:
    held = frame.side_data
    return {held[index].type.name: held[index] for index in range(len(held))}


def _turn(matrix: Any, film: _Facts) -> tuple[bool, bool, bool]:
    """The turn by quarters, with or without mirroring, that a display matrix asks for.

    A point (p, q) of the picture is shown at (a p + c q, b p + d q); see ffmpeg's display.h.
    """
    if matrix is None:
        return False, False, False
    values = np.frombuffer(matrix, np.int32).reshape(3, 3) / (1 << 16)
    (a, b), (c, d) = values[0, :2], values[1, :2]
    scale = math.sqrt(abs(a * d - b * c))
    if scale > 0 and not values[:2, 2].any():
        straight = max(abs(abs(a) - scale), abs(abs(d) - scale), abs(b), abs(c))
        across = max(abs(a), abs(d), abs(abs(b) - scale), abs(abs(c) - scale))
        if straight < _ALIGNED * scale:
            return False, bool(a < 0), bool(d < 0)
        if across < _ALIGNED * scale:
            return True, bool(c < 0), bool(b < 0)
    raise _unshown(
        film,
        "is to be shown turned, skewed or stretched otherwise than by quarters",
        "Re-encode it",
    )


def _render(frame: Any, film: _Facts, cover: Size | None) -> Picture:
    """The frame upright, in SDR, over black, shrunk to cover a size.

    Raises:
        VideoError: if its pixel format cannot be converted.
    """
    try:
        return _rendered(frame, film, cover)
    except av.FFmpegError as error:  # outside of `open_film`, when the frame is used
        raise VideoError(damaged(film.path, f"({error.strerror})")) from error


def _rendered(frame: Any, film: _Facts, cover: Size | None) -> Picture:
    look = _Look.of(frame, film)
    transposed, mirrored, flipped = look.turn
    width = max(round(frame.width * film.aspect), 1)
    if frame.height * width > MAX_PIXELS:
        raise _unshown(film, f"is shown at {width} x {frame.height} pixels", "Shrink it")
    upright = (width, frame.height) if transposed else (frame.height, width)
    height, width = shrunk(*upright, cover)
    if transposed:
        height, width = width, height
    if look.alpha:  # before it is shrunk: the hidden colour would bleed into the edges
        pixels = frame.to_ndarray(format="rgba")
        black = Image.new("RGB", (frame.width, frame.height))
        black.paste(Image.fromarray(pixels[..., :3]), mask=Image.fromarray(pixels[..., 3]))
        frame = av.VideoFrame.from_ndarray(np.asarray(black), format="rgb24")
    rgb = frame.reformat(
        width=width, height=height, format="rgb48le" if look.converted else "rgb24",
        interpolation=Interpolation.AREA,
    ).to_ndarray()  # fmt: skip
    if look.converted:
        rgb = colours.to_sdr(rgb, look.transfer, look.primaries)
    if transposed:
        rgb = rgb.transpose(1, 0, 2)
    rgb = rgb[:, ::-1] if mirrored else rgb
    return np.ascontiguousarray(rgb[::-1] if flipped else rgb)
