"""Videos are read as a player shows them, or refused with the reason; never silently wrong."""

from __future__ import annotations

import gc
import io
import os
import struct
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from test_video import stamped, stamps, write_any

from dpo_video.data import films
from dpo_video.data.video import VideoError, probe_video, read_video
from dpo_video.data.video_writer import write_video

COLOURS = np.array([(230, 40, 40), (40, 60, 160), (128, 128, 128), (12, 90, 30)], np.uint8)
PICTURE = COLOURS.repeat(16, axis=0).reshape(1, 64, 3).repeat(32, axis=0)  # four stripes


def encode(
    path: Path,
    pictures: NDArray[np.generic],
    codec: str = "ffv1",
    pix_fmt: str = "yuv444p",
    source: str = "rgb24",
    tags: tuple[int, int, int] = (2, 2, 2),
    matrix: list[int] | None = None,
    **options: str,
) -> Path:
    """Write pictures `[n h w c]`; `tags` are transfer, primaries and matrix of H.273."""
    with av.open(str(path), "w") as out:
        stream = out.add_stream(codec, rate=8)
        stream.height, stream.width = pictures.shape[1:3]
        stream.pix_fmt, stream.options = pix_fmt, options
        if matrix is not None:
            stream.set_display_matrix(matrix)
        context = stream.codec_context
        context.color_trc, context.color_primaries, context.colorspace = tags
        context.color_range = 1
        for picture in pictures:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format=source)
            kept = {} if tags[2] == 2 else {"dst_colorspace": tags[2]}
            out.mux(stream.encode(frame.reformat(format=pix_fmt, **kept)))
        out.mux(stream.encode())
    return path


def stripes(path: Path) -> NDArray[np.int_]:
    """The colour in the middle of each of four stripes of the first frame."""
    frames = read_video(path).frames
    return frames[:, 0, 16, 8::16].T.numpy().astype(int)


# --- colours ---------------------------------------------------------------------------------


def hdr(transfer: int) -> NDArray[np.uint16]:
    """The stripes as HDR of BT.2020, with SDR's white at 203 cd/m2 (BT.2408)."""
    to_2020 = np.array(
        [[0.6274, 0.3293, 0.0433], [0.0691, 0.9195, 0.0114], [0.0164, 0.0880, 0.8956]]
    )
    nits = 203 * (PICTURE / 255) ** 2.4 @ to_2020.T
    if transfer == films.colours.PQ:
        y = (nits / 10000) ** 0.1593017578125
        signal = ((0.8359375 + 18.8515625 * y) / (1 + 18.6875 * y)) ** 78.84375
    else:  # HLG on a display of 1000 cd/m2, whose gamma is 1.2
        display = nits / 1000
        luminance = display @ np.array([0.2627, 0.6780, 0.0593])
        scene = display * luminance[..., None] ** (1 / 1.2 - 1)
        above = 0.17883277 * np.log(np.maximum(12 * scene - 0.28466892, 1e-9)) + 0.55991073
        signal = np.where(scene <= 1 / 12, np.sqrt(3 * scene), above)
    return (signal * 65280).round().astype(np.uint16)[None]


@pytest.mark.parametrize(("transfer", "name"), [(16, "PQ"), (18, "HLG")])
def test_hdr_is_shown_as_its_sdr_and_named(tmp_path: Path, transfer: int, name: str) -> None:
    path = encode(
        tmp_path / "a.mkv", hdr(transfer).repeat(2, 0), pix_fmt="yuv444p10le", source="rgb48le",
        tags=(transfer, 9, 9),
    )  # fmt: skip
    assert np.abs(stripes(path) - COLOURS).max() <= 6
    assert probe_video(path).treatments == (f"HDR ({name}), converted to SDR",)


def test_hdr_keeps_the_order_of_highlights() -> None:
    light = np.linspace(0, 65280, 200).astype(np.uint16).reshape(1, -1, 1).repeat(3, 2)
    for transfer in (16, 18):
        grey = films.colours.to_sdr(light, transfer, 9)[0, :, 0].astype(int)
        assert (np.diff(grey) >= 0).all() and grey[-1] >= 250
        assert (np.ptp(films.colours.to_sdr(light, transfer, 9), axis=-1) <= 1).all()


def test_wide_gamut_in_sdr_is_converted(tmp_path: Path) -> None:
    linear = (PICTURE / 255) ** 2.4
    to_p3 = np.array([[0.8225, 0.1774, 0.0], [0.0332, 0.9669, 0.0], [0.0171, 0.0724, 0.9108]])
    pictures = ((linear @ to_p3.T) ** (1 / 2.4) * 65280).round().astype(np.uint16)[None]
    path = encode(
        tmp_path / "a.mkv", pictures, pix_fmt="yuv444p10le", source="rgb48le", tags=(1, 12, 1)
    )
    assert np.abs(stripes(path) - COLOURS).max() <= 4


@pytest.mark.parametrize("tags", [(8, 1, 1), (9, 1, 1), (1, 8, 1), (1, 9, 14)])
def test_colours_in_other_codings_are_refused(tmp_path: Path, tags: tuple[int, int, int]) -> None:
    coding = (*tags[:2], 1)
    path = encode(tmp_path / "a.mkv", PICTURE[None].repeat(2, 0), tags=coding)
    if tags != coding:  # ffmpeg does not convert to ICtCp, so the tag alone is set
        data = path.read_bytes()
        element = bytes.fromhex("55b181")  # Matroska's MatrixCoefficients
        path.write_bytes(data.replace(element + b"\x01", element + bytes([tags[2]])))
    for use in (read_video, probe_video):
        with pytest.raises(VideoError, match=r"a\.mkv (is in|has) .*which is not read\. Convert"):
            use(path)


# --- transparency ----------------------------------------------------------------------------


def cutout() -> NDArray[np.uint8]:
    """Magenta hidden below full transparency; a grey square is opaque: `[2 32 64 4]`."""
    picture = np.zeros((32, 64, 4), np.uint8)
    picture[..., :3] = (255, 0, 255)
    picture[8:24, 16:48] = (128, 128, 128, 255)
    return picture[None].repeat(2, 0)


@pytest.mark.parametrize(
    ("name", "codec", "pix_fmt", "options"),
    [
        ("a.webm", "libvpx-vp9", "yuva420p", {"crf": "4", "auto-alt-ref": "0"}),
        ("a.webm", "libvpx", "yuva420p", {"crf": "4", "auto-alt-ref": "0"}),
        ("a.mov", "prores_ks", "yuva444p10le", {"profile": "4444"}),
        ("a.mov", "qtrle", "argb", {}),
        ("a.mkv", "ffv1", "yuva444p", {}),
    ],
)  # fmt: skip
def test_transparent_videos_are_shown_over_black(
    tmp_path: Path, name: str, codec: str, pix_fmt: str, options: dict[str, str]
) -> None:
    path = encode(tmp_path / name, cutout(), codec, pix_fmt, "rgba", **options)
    assert probe_video(path).treatments == (films.TRANSPARENT,)
    for cover in (None, (8, 16)):
        frames = read_video(path, cover=cover).frames.int()
        height, width = frames.shape[2:]
        assert frames[:, :, 0, 0].abs().max() <= 12
        assert (frames[:, :, height // 2, width // 2] - 128).abs().max() <= 12
        # No magenta at the edges either, but what 4:2:0 itself mixes there.
        assert (frames[0] - frames[1]).abs().max() <= 40


def test_alpha_that_no_decoder_reads_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = encode(tmp_path / "a.webm", cutout(), "libvpx-vp9", "yuva420p", "rgba",
                  **{"auto-alt-ref": "0"})  # fmt: skip
    monkeypatch.setattr(films, "_ALPHA", {})
    with pytest.raises(VideoError, match=r"a\.webm is transparent, and no installed decoder"):
        read_video(path)


def test_an_opaque_gif_is_not_called_transparent(tmp_path: Path) -> None:
    encode(tmp_path / "a.gif", PICTURE[None].repeat(2, 0), "gif", "rgb8")
    assert probe_video(tmp_path / "a.gif").treatments == ()


# --- orientation -----------------------------------------------------------------------------

UNIT = 1 << 16
needs_matrices = pytest.mark.skipif(
    not hasattr(av.VideoStream, "set_display_matrix"), reason="before 18, av writes no matrix"
)


@needs_matrices
@pytest.mark.parametrize("across", [False, True])
@pytest.mark.parametrize("first", [1, -1])
@pytest.mark.parametrize("second", [1, -1])
def test_mirrored_and_turned_videos_are_shown_upright(
    tmp_path: Path, across: bool, first: int, second: int
) -> None:
    """A point (p, q) is shown at (a p + c q, b p + d q)."""
    a, b, c, d = (0, first, second, 0) if across else (first, 0, 0, second)
    matrix = [a * UNIT, b * UNIT, 0, c * UNIT, d * UNIT, 0, 0, 0, 1 << 30]
    picture = np.zeros((32, 64, 3), np.uint8)
    picture[:8, :16] = (255, 0, 0)
    path = encode(tmp_path / "a.mp4", picture[None].repeat(2, 0), "libx264", "yuv420p",
                  matrix=matrix, crf="4")  # fmt: skip
    frames = read_video(path).frames
    assert frames.shape[2:] == ((64, 32) if across else (32, 64))
    shown = np.array([[a, c], [b, d]]) @ (4 - 32, 4 - 16)  # the red corner, from the centre
    row, column = frames.shape[2] // 2 + shown[1], frames.shape[3] // 2 + shown[0]
    assert int(frames[0, 0, row, column]) > 200
    red = (frames[0, 0] > 128).sum()
    assert 100 < int(red) < 160


@needs_matrices
@pytest.mark.parametrize("linear", [(46341, 46341, -46341, 46341), (2 * UNIT, 0, 0, UNIT),
                                    (UNIT, UNIT // 4, 0, UNIT)])  # fmt: skip
def test_other_turns_are_refused(tmp_path: Path, linear: tuple[int, int, int, int]) -> None:
    a, b, c, d = linear
    path = encode(tmp_path / "a.mp4", PICTURE[None].repeat(2, 0), "libx264", "yuv420p",
                  matrix=[a, b, 0, c, d, 0, 0, 0, 1 << 30])  # fmt: skip
    with pytest.raises(VideoError, match=r"a\.mp4 is to be shown turned, skewed"):
        probe_video(path)


# --- streams and edit lists ------------------------------------------------------------------


def box(kind: bytes, payload: bytes) -> bytes:
    return struct.pack(">I4s", 8 + len(payload), kind) + payload


def boxes(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Kind and payload of the boxes of an mp4."""
    while data:
        size, kind = struct.unpack(">I4s", data[:8])
        yield kind, data[8:size]
        data = data[size:]


def with_cover(data: bytes) -> bytes:
    """An mp4 with a picture before its video, as drones and shops write it."""
    picture = io.BytesIO()
    Image.new("RGB", (160, 90), (0, 200, 0)).save(picture, "JPEG")
    item = box(b"covr", box(b"data", struct.pack(">II", 13, 0) + picture.getvalue()))
    handler = box(b"hdlr", bytes(8) + b"mdirappl" + bytes(9))
    udta = box(b"udta", box(b"meta", bytes(4) + handler + box(b"ilst", item)))
    out = b""
    for kind, payload in boxes(data):
        if kind == b"moov":
            (header, first), *others = boxes(payload)
            others = [other for other in others if other[0] != b"udta"]
            payload = box(header, first) + udta + b"".join(box(*other) for other in others)
        out += box(kind, payload)
    return out


def test_a_cover_picture_is_not_the_video(tmp_path: Path) -> None:
    write_any(tmp_path / "a.mp4", stamped(8), fps=8)
    (tmp_path / "a.mp4").write_bytes(with_cover((tmp_path / "a.mp4").read_bytes()))
    with av.open(str(tmp_path / "a.mp4")) as container:
        assert container.streams.video[0].codec_context.name == "mjpeg"
    assert stamps(read_video(tmp_path / "a.mp4").frames) == list(range(8))
    assert probe_video(tmp_path / "a.mp4").frames == 8


@pytest.mark.parametrize("start", [0.0, 1.2])
def test_frames_outside_an_edit_list_are_not_shown(tmp_path: Path, start: float) -> None:
    path = tmp_path / "a.mp4"
    write_any(path, stamped(31), fps=10)
    data = bytearray(path.read_bytes())
    at, clock = data.index(b"elst") + 12, data.index(b"mdhd") + 16
    (timescale,) = struct.unpack(">I", data[clock : clock + 4])
    (first,) = struct.unpack(">i", data[at + 4 : at + 8])
    # Shown are 2 s of the film, from its frame 5 on, which is between two key frames.
    data[at : at + 12] = struct.pack(">IiHH", 2000, first + timescale // 2, 1, 0)
    path.write_bytes(data)
    info = probe_video(path)
    assert (info.frames, info.fps) == (20, pytest.approx(10))
    shown = stamps(read_video(path, fps=10.0, start=start).frames)
    assert shown == list(range(5 + round(10 * start), 25))


# --- formats ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "codec"),
    [("a.mpg", "mpeg2video"), ("a.ts", "libx264"), ("a.flv", "flv1"), ("a.wmv", "wmv2"),
     ("a.3gp", "mpeg4"), ("a.y4m", "rawvideo")],
)  # fmt: skip
def test_further_containers_are_read(tmp_path: Path, name: str, codec: str) -> None:
    pictures = (stamped(12).permute(1, 2, 3, 0) * 255).byte().numpy()
    with av.open(str(tmp_path / name), "w", format={"a.y4m": "yuv4mpegpipe"}.get(name)) as out:
        stream = out.add_stream(codec if codec != "rawvideo" else "wrapped_avframe", rate=25)
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        stream.bit_rate = 4_000_000
        for picture in pictures:
            out.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        out.mux(stream.encode())
    assert stamps(read_video(tmp_path / name).frames) == list(range(12))
    assert probe_video(tmp_path / name).frames == 12


def test_an_animated_webp_is_read_by_its_own_times(tmp_path: Path) -> None:
    pictures = [Image.fromarray(p) for p in (stamped(9).permute(1, 2, 3, 0) * 255).byte().numpy()]
    pictures[0].save(tmp_path / "a.webp", save_all=True, append_images=pictures[1:], lossless=True,
                     duration=[100] * 3 + [200] * 6)  # fmt: skip
    assert stamps(read_video(tmp_path / "a.webp").frames) == list(range(9))
    assert stamps(read_video(tmp_path / "a.webp", fps=5.0).frames) == [0, 2, 4, 5, 6, 7, 8, 8]
    info = probe_video(tmp_path / "a.webp")
    assert (info.frames, info.seconds) == (9, pytest.approx(1.5))
    cut = [Image.fromarray(picture, "RGBA") for picture in cutout()]
    cut[0].save(tmp_path / "b.webp", save_all=True, append_images=cut[1:] * 3, lossless=True,
                exact=True, duration=125)  # fmt: skip
    assert probe_video(tmp_path / "b.webp").treatments == (films.TRANSPARENT,)
    assert read_video(tmp_path / "b.webp").frames[:, 0, 0, 0].tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    "data",
    [b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n", b"ffconcat version 1.0\nfile 'b.mp4'\n",
     b"%!PS-Adobe-3.0 EPSF-3.0\n", b"<?xml version='1.0'?><MPD></MPD>", b"\x00" * 500],
)  # fmt: skip
def test_a_name_does_not_choose_another_format(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a.mp4").write_bytes(data)
    for use in (read_video, probe_video):
        with pytest.raises(VideoError, match=r"a\.mp4 is damaged or not a video \(of no format"):
            use(tmp_path / "a.mp4")


def test_a_codec_that_is_not_on_the_list_is_refused(tmp_path: Path) -> None:
    encode(tmp_path / "a.avi", PICTURE[None].repeat(2, 0), "zmbv", "bgr0")
    with pytest.raises(VideoError, match=r"its codec zmbv is not read"):
        read_video(tmp_path / "a.avi")


def test_a_name_with_a_colon_is_no_protocol(tmp_path: Path) -> None:
    write_any(tmp_path / "a.mp4", stamped(4), fps=8)
    (tmp_path / "a.mp4").rename(tmp_path / "12:30 %03d.mp4")
    assert stamps(read_video(tmp_path / "12:30 %03d.mp4").frames) == [0, 1, 2, 3]


def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.mp4")
    for use in (read_video, probe_video):
        with pytest.raises(VideoError, match=r"a\.mp4 cannot be read: it is a named pipe"):
            use(tmp_path / "a.mp4")


# --- limits ----------------------------------------------------------------------------------


def test_a_read_that_decodes_too_much_stops(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_any(tmp_path / "a.mp4", stamped(20), fps=10)
    monkeypatch.setattr(films, "MAX_DECODED", 8 * 48 * 64)
    assert read_video(tmp_path / "a.mp4", frames=5).frames.shape[1] == 5
    with pytest.raises(VideoError, match=r"a\.mp4 takes too long to decode up to 1 s"):
        read_video(tmp_path / "a.mp4")


def test_frames_shrink_before_they_are_converted(tmp_path: Path) -> None:
    path = encode(
        tmp_path / "a.mkv", hdr(18).repeat(2, 0), pix_fmt="yuv444p10le", source="rgb48le",
        tags=(18, 9, 9),
    )  # fmt: skip
    assert read_video(path, cover=(8, 8)).frames.shape == (3, 2, 8, 16)
    assert torch.equal(read_video(path).frames[:, 0], read_video(path).frames[:, 1])


def test_a_frame_holds_nothing_of_its_closed_file(tmp_path: Path) -> None:
    """FFmpeg frees a stream with its file; a frame that asked it afterwards ended the process."""
    path = tmp_path / "a.mp4"
    video = torch.rand(3, 4, 32, 48)
    write_video(path, video, 8.0)
    with films.open_film(path, "mp4") as film:
        shots = list(film.shots(0.0))
        before = [shot.picture(None) for shot in shots]
    gc.collect()
    for shot, picture in zip(shots, before, strict=True):
        assert isinstance(shot.picture, partial)
        assert not any(isinstance(part, films.Film) for part in shot.picture.args)
        assert (shot.picture(None) == picture).all()
