"""Videos are read back as written, and reading takes the requested frames."""

from __future__ import annotations

import inspect
import io
from collections.abc import Iterator
from fractions import Fraction
from importlib.metadata import version
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from imageio.plugins.pyav import PyAVPlugin
from PIL import Image
from torch import Tensor

from dpo_video.data import video as module
from dpo_video.data.films import Film, Shot
from dpo_video.data.fitting import fit_video
from dpo_video.data.video import VideoError, natural_key, probe_video, read_picture, read_video
from dpo_video.data.video_writer import gif_bytes, video_bytes, webp_bytes, write_video
from dpo_video.errors import UserError
from dpo_video.types import VideoShape

CLIPS = Path(__file__).parents[1] / "clips"
CODECS = {
    ".mp4": "libx264",
    ".mov": "libx264",
    ".mkv": "libx264",
    ".webm": "libvpx-vp9",
    ".avi": "mpeg4",
}


def stamped(count: int, height: int = 48, width: int = 64) -> Tensor:
    """Grey frames whose brightness is 8 times their number."""
    return (torch.arange(count) * 8.0 / 255).view(1, -1, 1, 1).expand(3, count, height, width)


def stamps(frames: Tensor) -> list[int]:
    """The numbers of `stamped` frames, bytes or floats."""
    scale = 1.0 if frames.dtype == torch.uint8 else 255.0
    return (frames.float().mean(dim=(0, 2, 3)) * scale / 8).round().long().tolist()


def write_any(
    path: Path, video: Tensor, fps: int, *, times: list[int] | None = None, rotation: int = 0
) -> None:
    """Write with the codec of the path's suffix; `times` are stamps in frames of `fps`."""
    pictures = (video * 255).round().to(torch.uint8).permute(1, 2, 3, 0).numpy()
    with av.open(str(path), "w") as container:
        stream = container.add_stream(CODECS[path.suffix], rate=fps)
        stream.height, stream.width = pictures.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.gop_size = 10
        stream.thread_count = 1
        stream.bit_rate = 4_000_000
        if rotation:
            stream.set_display_rotation(rotation)
        for index, picture in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            frame.pts = index if times is None else times[index]
            frame.time_base = Fraction(1, fps)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def write_frames(folder: Path, video: Tensor, suffix: str = ".png") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(video.shape[1]):
        picture = (video[:, index] * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
        Image.fromarray(picture).save(folder / f"frame{index}{suffix}")


# --- round trips -----------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", CODECS)
def test_every_container_yields_all_frames_in_order(tmp_path: Path, suffix: str) -> None:
    write_any(tmp_path / f"a{suffix}", stamped(20), fps=10)
    frames, fps = read_video(tmp_path / f"a{suffix}")
    assert frames.dtype == torch.uint8
    assert frames.shape == (3, 20, 48, 64)
    assert fps == pytest.approx(10, abs=0.05)
    assert stamps(frames) == list(range(20))
    info = probe_video(tmp_path / f"a{suffix}")
    assert (info.frames, info.fps) == (20, pytest.approx(fps))


@pytest.mark.parametrize("suffix", [".mp4", ".gif", ".webp"])
def test_what_is_written_is_read_back(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / "new" / f"a{suffix}"
    write_video(path, stamped(16), fps=8.0)
    frames, fps = read_video(path)
    assert fps == pytest.approx(8, abs=0.05)
    assert stamps(frames) == list(range(16))
    assert [file.name for file in path.parent.iterdir()] == [path.name]  # nothing partial is left


@pytest.mark.parametrize("suffix", [".mp4", ".gif", ".webp"])
def test_colours_keep_channel_order_and_value(tmp_path: Path, suffix: str) -> None:
    colours = torch.tensor(
        [[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 1], [0, 0, 0], [0.9, 0.5, 0.1]]
    )
    video = colours.T.view(3, 6, 1, 1).expand(3, 6, 32, 32)
    write_video(tmp_path / f"a{suffix}", video, fps=8.0)
    back = read_video(tmp_path / f"a{suffix}").frames.float().mean(dim=(2, 3)).T / 255
    assert torch.allclose(back, colours, atol=3 / 255)


def test_scaling_up_keeps_sharp_pixels(tmp_path: Path) -> None:
    picture = torch.rand(3, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    video = picture.expand(3, 4, 16, 16)

    def error(scale: int) -> float:
        write_video(tmp_path / "a.mp4", video, fps=8.0, scale=scale)
        frames = read_video(tmp_path / "a.mp4").frames
        assert frames.shape == (3, 4, 16 * scale, 16 * scale)
        middle = frames[:, :, scale // 2 :: scale, scale // 2 :: scale] / 255
        return float((middle - video).abs().mean())

    assert error(8) < 0.01
    assert error(8) < error(1) / 5


def test_odd_sizes_are_padded(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", stamped(3, 33, 35), fps=8.0)
    frames = read_video(tmp_path / "a.mp4").frames
    assert frames.shape == (3, 3, 34, 36)
    assert stamps(frames[:, :, -1:, -1:]) == [0, 1, 2]


@pytest.mark.parametrize("encode", [video_bytes, gif_bytes, webp_bytes])
def test_writing_twice_gives_the_same_bytes(encode: object) -> None:
    video = torch.rand(3, 5, 32, 32, generator=torch.Generator().manual_seed(0))
    assert callable(encode)
    assert encode(video, 8.0) == encode(video.clone(), 8.0)


def test_an_mp4_is_in_a_format_that_browsers_play(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(video_bytes(stamped(4), 29.97))
    with av.open(str(tmp_path / "a.mp4")) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        assert float(stream.average_rate) == pytest.approx(29.97, abs=0.01)


def test_a_gif_does_not_flicker() -> None:
    # One palette for all frames: still parts stay equal to the bit.
    video = torch.rand(3, 1, 32, 32, generator=torch.Generator().manual_seed(0)).repeat(1, 6, 1, 1)
    video[:, :, :8, :8] = torch.rand(3, 6, 1, 1, generator=torch.Generator().manual_seed(1))
    with Image.open(io.BytesIO(gif_bytes(video, 8.0))) as image:
        pictures = []
        for index in range(6):
            image.seek(index)
            pictures.append(np.asarray(image.convert("RGB"))[8:, 8:])
    assert all(np.array_equal(pictures[0], picture) for picture in pictures)


def test_a_webp_and_a_sheet_keep_every_pixel(tmp_path: Path) -> None:
    video = torch.rand(3, 5, 8, 12, generator=torch.Generator().manual_seed(0))
    write_video(tmp_path / "a.webp", video, fps=7.0)
    expected = video.mul(255).round().byte()
    assert torch.equal(read_video(tmp_path / "a.webp").frames, expected)
    write_video(tmp_path / "a.png", video, fps=7.0)
    sheet = read_picture(tmp_path / "a.png")
    assert sheet.shape == (3, 16, 36)  # three frames in a row
    assert torch.equal(sheet[:, 8:, 12:24], expected[:, 4])


def test_imageio_cannot_set_what_an_mp4_needs() -> None:
    # Once its plugin for PyAV takes the codec's options, it can replace PyAV in video_bytes.
    accepted = inspect.signature(PyAVPlugin.init_video_stream).parameters
    assert set(accepted) == {
        "self", "codec", "fps", "pixel_format", "max_keyframe_interval", "force_keyframes",
    }, f"imageio {version('imageio')}"  # fmt: skip


def test_writing_is_atomic_and_reports_failures(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"suffix \.mp4, \.gif"):
        write_video(tmp_path / "a.txt", stamped(2), 8.0)
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=r"Cannot write .*choose another place"):
        write_video(tmp_path / "file" / "a.mp4", stamped(2), 8.0)
    with pytest.raises(ValueError, match="0 frames"):
        write_video(tmp_path / "a.mp4", stamped(0), 8.0)
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


# --- sampling in time ------------------------------------------------------------------------


def test_reading_takes_the_nearest_frames(tmp_path: Path) -> None:
    write_any(tmp_path / "a.mp4", stamped(30), fps=30)
    assert stamps(read_video(tmp_path / "a.mp4", fps=10.0).frames) == list(range(0, 30, 3))
    assert stamps(read_video(tmp_path / "a.mp4", fps=10.0, frames=4).frames) == [0, 3, 6, 9]
    assert stamps(read_video(tmp_path / "a.mp4", fps=7.5, start=0.2).frames) == [
        6,
        10,
        14,
        18,
        22,
        26,
    ]
    # A faster rate repeats frames.
    assert stamps(read_video(tmp_path / "a.mp4", fps=60.0, frames=4).frames) == [0, 1, 1, 2]
    assert stamps(read_video(tmp_path / "a.mp4", frames=3).frames) == [0, 1, 2]


def test_time_stamps_are_used_if_the_rate_varies(tmp_path: Path) -> None:
    # Frame 2 is shown for a second: it is nearest to the instants around it.
    write_any(tmp_path / "a.mp4", stamped(6), fps=10, times=[0, 1, 2, 12, 13, 14])
    frames = read_video(tmp_path / "a.mp4", fps=5.0).frames
    assert stamps(frames) == [0, 2, 2, 2, 3, 3, 3, 5]


def test_reading_and_fitting_choose_the_same_frames(tmp_path: Path) -> None:
    write_any(tmp_path / "a.mp4", stamped(30), fps=25)
    shape = VideoShape(frames=8, height=48, width=64, fps=8.0)
    read = read_video(tmp_path / "a.mp4", fps=8.0, frames=8).frames
    everything, fps = read_video(tmp_path / "a.mp4")
    assert stamps(fit_video(everything, fps, shape)) == stamps(read)
    assert stamps(read) == [0, 3, 6, 9, 13, 16, 19, 22]


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".avi", ".webm"])
def test_starting_late_gives_the_frames_of_a_read_from_the_start(
    tmp_path: Path, suffix: str
) -> None:
    write_any(tmp_path / f"a{suffix}", stamped(31), fps=10)
    whole = read_video(tmp_path / f"a{suffix}", fps=10.0).frames
    late = read_video(tmp_path / f"a{suffix}", fps=10.0, start=1.7, frames=8).frames
    assert torch.equal(late, whole[:, 17:25])


def test_a_start_past_the_end_is_an_error(tmp_path: Path) -> None:
    write_any(tmp_path / "a.mp4", stamped(10), fps=10)
    with pytest.raises(VideoError, match="no frames after 5 s"):
        read_video(tmp_path / "a.mp4", fps=10.0, start=5.0)


def test_a_folder_of_frames_is_read_in_natural_order(tmp_path: Path) -> None:
    for suffix in (".png", ".jpg"):
        write_frames(tmp_path / suffix, stamped(12), suffix)
        (tmp_path / suffix / "notes.txt").write_text("not a frame")
        frames, fps = read_video(tmp_path / suffix, folder_fps=4.0)
        assert fps == 4
        assert stamps(frames) == list(range(12))
        assert stamps(read_video(tmp_path / suffix, fps=2.0, folder_fps=4.0).frames) == list(
            range(0, 12, 2)
        )
        assert probe_video(tmp_path / suffix, folder_fps=4.0).seconds == 3


def test_numbers_sort_as_numbers() -> None:
    names = ["b10", "b9", "a", "B1", "10", "9", "b9.5"]
    assert sorted(names, key=natural_key) == ["9", "10", "a", "B1", "b9", "b9.5", "b10"]


# --- size ------------------------------------------------------------------------------------


def test_frames_shrink_while_they_are_decoded(tmp_path: Path) -> None:
    write_any(tmp_path / "a.mp4", stamped(4, 120, 200), fps=10)
    assert read_video(tmp_path / "a.mp4", cover=(30, 30)).frames.shape == (3, 4, 30, 50)
    assert read_video(tmp_path / "a.mp4", cover=(12, 100)).frames.shape == (3, 4, 60, 100)
    assert read_video(tmp_path / "a.mp4", cover=(500, 500)).frames.shape == (3, 4, 120, 200)
    write_frames(tmp_path / "frames", stamped(4, 120, 200))
    assert read_video(tmp_path / "frames", cover=(30, 30)).frames.shape == (3, 4, 30, 50)


def test_a_read_beyond_the_memory_limit_stops(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_any(tmp_path / "a.mp4", stamped(20), fps=10)
    monkeypatch.setattr(module, "MAX_BYTES", 5 * 48 * 64 * 3)
    with pytest.raises(UserError, match=r"at its frame 6\. Request fewer"):
        read_video(tmp_path / "a.mp4")
    assert read_video(tmp_path / "a.mp4", frames=5).frames.shape[1] == 5


@pytest.mark.skipif(
    not hasattr(av.VideoStream, "set_display_rotation"), reason="before 18, av writes no rotation"
)
def test_rotated_videos_are_read_upright(tmp_path: Path) -> None:
    video = torch.zeros(3, 3, 32, 64)
    video[0, :, :, :16] = 1  # red at the left
    write_any(tmp_path / "a.mp4", video, fps=10, rotation=90)  # counterclockwise: red goes down
    frames = read_video(tmp_path / "a.mp4").frames
    assert frames.shape == (3, 3, 64, 32)
    assert int(frames[0, 0, 60, 16]) > 200
    assert int(frames[0, 0, 4, 16]) < 50
    assert read_video(tmp_path / "a.mp4", cover=(16, 16)).frames.shape == (3, 3, 32, 16)


def test_fitting_resizes_to_cover_and_crops_the_centre() -> None:
    video = torch.zeros(3, 4, 60, 120)
    video[:, :, :, 30:90] = 1
    shape = VideoShape(frames=4, height=32, width=32, fps=8.0)
    fitted = fit_video(video, 8.0, shape)
    assert fitted.shape == (3, 4, 32, 32)
    assert fitted.is_contiguous()
    assert fitted[:, :, :, 1:-1].min() > 0.99
    # Bytes are the same video, and the right shape comes back as it was.
    assert torch.allclose(fit_video((video * 255).to(torch.uint8), 8.0, shape), fitted, atol=1e-6)
    exact = torch.rand(3, 4, 32, 32, generator=torch.Generator().manual_seed(0))
    assert torch.equal(fit_video(exact, 8.0, shape), exact)


def test_fitting_does_not_alias() -> None:
    checker = (torch.arange(256) % 2).float().view(1, 1, 1, -1).expand(3, 2, 256, 256)
    fitted = fit_video(checker, 8.0, VideoShape(frames=2, height=32, width=32, fps=8.0))
    assert (fitted - 0.5).abs()[..., 2:-2].max() < 0.02


def test_fitting_enlarges_small_videos() -> None:
    shape = VideoShape(frames=2, height=48, width=64, fps=8.0)
    assert fit_video(stamped(2, 10, 10), 8.0, shape).shape == (3, 2, 48, 64)


def test_fitting_starts_at_the_given_time() -> None:
    shape = VideoShape(frames=4, height=48, width=64, fps=5.0)
    assert stamps(fit_video(stamped(30), 10.0, shape, start=1.0)) == [10, 12, 14, 16]


def test_a_short_video_is_slowed_down_only_if_it_has_enough_frames() -> None:
    shape = VideoShape(frames=16, height=48, width=64, fps=8.0)
    assert stamps(fit_video(stamped(16), 25.0, shape)) == list(range(16))
    spread = stamps(fit_video(stamped(30), 25.0, shape))
    assert (spread[0], spread[-1]) == (0, 29)
    assert len(set(spread)) == 16
    with pytest.raises(UserError, match=r"has 0.60 s \(15 frames\), and 2.00 s or 16 frames"):
        fit_video(stamped(15), 25.0, shape)
    # 16 frames at a hair over 8 fps are 16 frames.
    assert stamps(fit_video(stamped(16), 8.02, shape)) == list(range(16))


# --- damage ----------------------------------------------------------------------------------


def test_a_file_that_is_no_video_is_named(tmp_path: Path) -> None:
    for name, data in {"noise.mp4": bytes(range(256)) * 40, "empty.mp4": b""}.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(VideoError, match=f"{name} is damaged or not a video"):
            read_video(tmp_path / name)
        with pytest.raises(VideoError, match=name):
            probe_video(tmp_path / name)
    with pytest.raises(UserError, match=r"There is no file .*gone.mp4"):
        read_video(tmp_path / "gone.mp4")
    (tmp_path / "none").mkdir()
    with pytest.raises(VideoError, match="no png or jpg frames"):
        read_video(tmp_path / "none")


def test_an_audio_file_is_no_video(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=48000)
        silence = np.zeros((1, 48000), dtype=np.float32)
        frame = av.AudioFrame.from_ndarray(silence, format="fltp", layout="mono")
        frame.sample_rate = 48000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with pytest.raises(VideoError, match="holds no video"):
        read_video(tmp_path / "a.mp4")


def test_a_header_without_frames_is_named(tmp_path: Path) -> None:
    write_any(tmp_path / "a.mkv", stamped(2), fps=10)
    data = (tmp_path / "a.mkv").read_bytes()
    cluster = data.index(bytes.fromhex("1f43b675"))  # where Matroska's frames begin
    (tmp_path / "a.mkv").write_bytes(data[:cluster])
    for use in (read_video, probe_video):
        with pytest.raises(VideoError, match=r"a\.mkv"):
            use(tmp_path / "a.mkv")


def test_a_cut_off_mp4_is_named(tmp_path: Path) -> None:
    write_any(tmp_path / "a.mp4", torch.rand(3, 20, 48, 64), fps=10)
    data = (tmp_path / "a.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(data[: len(data) // 2])
    with pytest.raises(VideoError, match=r"cut\.mp4 is damaged"):
        read_video(tmp_path / "cut.mp4")


def test_frames_before_a_damage_can_be_read(tmp_path: Path) -> None:
    write_any(tmp_path / "a.mkv", torch.rand(3, 20, 48, 64), fps=10)
    data = (tmp_path / "a.mkv").read_bytes()
    (tmp_path / "a.mkv").write_bytes(data[: len(data) // 2])
    left = probe_video(tmp_path / "a.mkv").frames
    assert 5 < left < 15
    assert read_video(tmp_path / "a.mkv", frames=5).frames.shape[1] == 5


def test_a_bad_frame_in_a_folder_is_named(tmp_path: Path) -> None:
    write_frames(tmp_path, stamped(3))
    (tmp_path / "frame1.png").write_bytes(b"not a picture")
    with pytest.raises(VideoError, match=r"frame1\.png is damaged or not a picture"):
        read_video(tmp_path)
    write_frames(tmp_path, stamped(3))
    Image.new("RGB", (20, 20)).save(tmp_path / "frame2.png")
    with pytest.raises(VideoError, match=r"differ in size \(64x48 and 20x20\)"):
        read_video(tmp_path)


# --- real clips ------------------------------------------------------------------------------


def test_real_clips_are_read_and_fitted() -> None:
    files = sorted(CLIPS.glob("*.mp4"))
    assert len(files) == 2
    shape = VideoShape(frames=16, height=64, width=64, fps=8.0)
    for file in files:
        info = probe_video(file)
        frames, fps = read_video(file, cover=(64, 64))
        assert frames.shape[1] == info.frames
        assert min(frames.shape[2:]) == 64
        fitted = fit_video(frames, fps, shape)
        assert fitted.std() > 0.02
        assert (fitted.diff(dim=1).abs().mean(dim=(0, 2, 3)) > 0).all()  # no frame is repeated


def test_both_videos_of_a_pair_are_fitted_alike() -> None:
    shape = VideoShape(frames=16, height=64, width=96, fps=8.0)
    first, second = (read_video(file) for file in sorted(CLIPS.glob("*.mp4")))
    assert first.frames.shape != second.frames.shape
    assert first.fps != second.fps
    fitted = [fit_video(*footage, shape) for footage in (first, second)]
    assert fitted[0].shape == fitted[1].shape == (3, 16, 64, 96)


def test_a_frame_that_is_too_large_is_not_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_video(tmp_path / "a.mp4", stamped(2, 32, 48), fps=8.0)
    monkeypatch.setattr("dpo_video.data.films.MAX_PIXELS", 32 * 48 - 1)
    with pytest.raises(UserError, match="is damaged or not a video"):
        read_video(tmp_path / "a.mp4")
    monkeypatch.setattr("dpo_video.data.films.MAX_PIXELS", 64 * 64)
    assert read_video(tmp_path / "a.mp4").frames.shape == (3, 2, 32, 48)


def test_an_unknown_codec_is_reported(tmp_path: Path) -> None:
    write_any(tmp_path / "a.webm", stamped(2), 8)
    data = (tmp_path / "a.webm").read_bytes()
    (tmp_path / "a.webm").write_bytes(data.replace(b"V_VP9", b"V_XYZ"))
    with pytest.raises(VideoError, match="no installed decoder reads it"):
        read_video(tmp_path / "a.webm")


def test_a_file_in_which_seeking_fails_is_read_from_its_beginning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_any(tmp_path / "a.mp4", stamped(30), fps=10)
    expected = read_video(tmp_path / "a.mp4", fps=10, start=2.0, frames=8).frames
    assert stamps(expected / 255) == list(range(20, 28))
    shots = Film.shots

    def broken(self: Film, start: float) -> Iterator[Shot]:
        for index, shot in enumerate(shots(self, start)):
            if start > 0 and index == 2:  # after frames that look sound
                raise VideoError("damaged after a key frame")
            yield shot

    monkeypatch.setattr(Film, "shots", broken)
    found = read_video(tmp_path / "a.mp4", fps=10, start=2.0, frames=8).frames
    assert torch.equal(found, expected)
    (tmp_path / "a.mp4").write_bytes((tmp_path / "a.mp4").read_bytes()[:2000])
    with pytest.raises(VideoError, match="is damaged"):  # from the beginning as well
        read_video(tmp_path / "a.mp4", fps=10, start=2.0, frames=8)
