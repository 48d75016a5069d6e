"""Readers of videos, pictures and their captions, with valid inputs to mutate."""

from __future__ import annotations

import io
from collections.abc import Callable
from random import Random
from typing import Any

from PIL import Image

from benchmarks.trust import mutate
from benchmarks.trust.mutate import place
from benchmarks.trust.reading import Bench, Reading, json_lines
from dpo_video.data.video_writer import gif_bytes, video_bytes
from tests.small_animatediff import SHAPE


def video(suffix: str) -> Callable[[Bench], Reading]:
    """A video file, read as clips."""

    def make(bench: Bench) -> Reading:
        import av

        from dpo_video.data.clips import open_clips

        root = bench.folder / f"clips{suffix}"
        root.mkdir(exist_ok=True)
        path = root / f"clip{suffix}"
        encoders: dict[str, Callable[[], bytes]] = {
            ".mp4": lambda: video_bytes(bench.video, SHAPE.fps),
            ".gif": lambda: gif_bytes(bench.video, SHAPE.fps),
            ".webp": lambda: _webp(bench),
        }
        if suffix in encoders:
            original = encoders[suffix]()
        else:
            codec = {".webm": "libvpx", ".avi": "mpeg4", ".mkv": "libx264", ".mov": "mpeg4",
                     ".mpg": "mpeg2video", ".ts": "libx264", ".flv": "flv1",
                     ".wmv": "wmv2"}[suffix]  # fmt: skip
            with av.open(str(path), "w") as container:
                stream = container.add_stream(codec, rate=25 if suffix == ".mpg" else 8)
                stream.width = stream.height = 16
                stream.pix_fmt = "yuv420p"
                for frame in (bench.video * 255).byte().permute(1, 2, 3, 0).numpy():
                    container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
                container.mux(stream.encode())
            original = path.read_bytes()

        def read(data: bytes) -> object:
            place(path, data)
            return [clip.video for clip in open_clips(root, SHAPE, "a prompt")]

        return Reading(seeds=[original], damage=mutate.damage_film, read=read)

    return make


def _frames(bench: Bench) -> list[Any]:
    pixels = (bench.video * 255).byte().permute(1, 2, 3, 0).numpy()
    return [Image.fromarray(frame) for frame in pixels]


def _webp(bench: Bench) -> bytes:
    file = io.BytesIO()
    frames = _frames(bench)
    frames[0].save(file, "WEBP", save_all=True, append_images=frames[1:], duration=125)
    return file.getvalue()


def coloured(bench: Bench) -> Reading:
    """Films in HDR, with alpha and in wide gamut, whose tags and frames are damaged."""
    import av

    from dpo_video.data.video import probe_video, read_video

    seeds = []
    for name, codec, form, tags in (
        ("a.mkv", "ffv1", "yuv444p10le", (18, 9, 9)),
        ("a.mkv", "ffv1", "yuv444p10le", (16, 9, 9)),
        ("a.mov", "prores_ks", "yuva444p10le", (1, 1, 1)),
        ("a.webm", "libvpx-vp9", "yuva420p", (1, 1, 1)),
        ("a.mov", "qtrle", "argb", (2, 12, 2)),
    ):
        path = bench.folder / name
        with av.open(str(path), "w") as container:
            stream = container.add_stream(codec, rate=8)
            stream.width = stream.height = 16
            stream.pix_fmt = form
            context = stream.codec_context
            context.color_trc, context.color_primaries, context.colorspace = tags
            for frame in _frames(bench):
                shown = av.VideoFrame.from_image(frame.convert("RGBA"))
                container.mux(stream.encode(shown.reformat(format=form)))
            container.mux(stream.encode())
        seeds.append(path.suffix.encode() + b"\n" + path.read_bytes())

    def draw(random: Random, data: bytes, others: list[bytes]) -> bytes:
        suffix, _, film = data.partition(b"\n")
        return suffix + b"\n" + mutate.damage_film(random, film, others)

    def read(data: bytes) -> object:
        suffix, _, film = data.partition(b"\n")
        path = bench.folder / f"damaged{suffix.decode()}"
        path.write_bytes(film)
        probe_video(path)
        return read_video(path, frames=16, cover=(16, 16))

    return Reading(seeds=seeds, damage=draw, read=read, file=False)


def wrong_names(bench: Bench) -> Reading:
    """Contents of any kind below the name of another."""
    from dpo_video.data.video import probe_video, read_picture, read_video

    image = _frames(bench)[0]
    contents = [b"#EXTM3U\n#EXTINF:1,\nfile:///etc/hostname\n", b"ffconcat version 1.0\nfile a\n",
                b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n", b"%PDF-1.4\n",
                b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"<MPD></MPD>", b"v=0\r\ns=x\r\n",
                video_bytes(bench.video, SHAPE.fps), gif_bytes(bench.video, SHAPE.fps),
                _webp(bench)]  # fmt: skip
    for kind in ("PNG", "JPEG", "TIFF", "BMP", "EPS", "PPM", "TGA", "ICO", "PDF", "JPEG2000"):
        file = io.BytesIO()
        image.save(file, kind)
        contents.append(file.getvalue())
    names = (
        "a.mp4",
        "a.mkv",
        "a.gif",
        "a.webp",
        "a.png",
        "a.jpg",
        "a.ts",
        "concat:a.avi",
        "%d.mov",
    )

    def draw(random: Random, data: bytes, others: list[bytes]) -> bytes:
        if random.random() < 0.5:
            data = mutate.damage(random, data, others)
        return bytes([random.randrange(len(names))]) + data

    def read(data: bytes) -> object:
        path = bench.folder / names[data[0]]
        place(path, data[1:])
        if path.suffix in (".png", ".jpg"):
            return read_picture(path)
        probe_video(path)
        return read_video(path, frames=4)

    return Reading(seeds=contents, damage=draw, read=read, file=False)


def stills(bench: Bench) -> Reading:
    """Pictures of all depths, with alpha, profile and orientation; masks are read so, too."""
    from PIL import ImageCms

    from dpo_video.data.video import read_picture

    path = bench.folder / "still.png"
    image = _frames(bench)[0]
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    exif = Image.Exif()
    exif[0x0112] = 6
    grey = image.convert("L").point(lambda value: value * 257, "I").convert("I;16")
    seeds = []
    for picture, kind, options in (
        (image, "PNG", {"icc_profile": profile, "exif": exif}), (image, "JPEG", {"exif": exif}),
        (image.convert("CMYK"), "JPEG", {"icc_profile": profile}), (grey, "PNG", {}),
        (image.convert("RGBA"), "PNG", {}), (image.convert("LA"), "PNG", {}),
        (image.convert("P"), "PNG", {"transparency": 3}), (image.convert("1"), "PNG", {}),
    ):  # fmt: skip
        file = io.BytesIO()
        picture.save(file, kind, **options)
        seeds.append(file.getvalue())

    def read(data: bytes) -> object:
        place(path, data)
        return read_picture(path)

    return Reading(seeds=seeds, damage=mutate.damage_png, read=read)


def pictures(bench: Bench) -> Reading:
    from dpo_video.data.clips import open_clips

    root = bench.folder / "frames" / "one"
    root.mkdir(parents=True, exist_ok=True)
    images = []
    for name in ("PNG", "JPEG"):
        buffer = io.BytesIO()
        Image.fromarray((bench.video[:, 0] * 255).byte().permute(1, 2, 0).numpy()).save(
            buffer, name
        )
        images.append(buffer.getvalue())
    for i in range(SHAPE.frames):
        (root / f"{i}.png").write_bytes(images[0])

    def read(data: bytes) -> object:
        place(root / "2.png", data)
        return [clip.video for clip in open_clips(root.parent, SHAPE, "a prompt")]

    return Reading(seeds=images, damage=mutate.damage, read=read)


def captions(bench: Bench) -> Reading:
    from dpo_video.data.clips import open_clips

    root = bench.folder / "captioned"
    root.mkdir(exist_ok=True)
    for i in range(3):
        (root / f"{i}.gif").write_bytes(gif_bytes(bench.video, SHAPE.fps))

    def read(data: bytes) -> object:
        place(root / "metadata.jsonl", data)
        clips = open_clips(root, SHAPE)
        return clips.fingerprint, list(clips)

    lines = [{"file_name": f"{i}.gif", "text": f"a square {i}"} for i in range(3)]
    return Reading(seeds=[json_lines(lines)], damage=mutate.damage_lines, read=read)
