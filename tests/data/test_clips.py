"""Folders of clips: their order, their captions, and the skipped files."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
from test_video import CLIPS, stamped, stamps, write_any, write_frames

from dpo_video.data.clips import ClipFolder, open_clips
from dpo_video.data.video import VideoError
from dpo_video.data.video_writer import write_video
from dpo_video.errors import UserError
from dpo_video.types import VideoShape

SHAPE = VideoShape(frames=8, height=32, width=32, fps=8.0)


def add(folder: Path, name: str, count: int = 8, fps: int = 8) -> Path:
    """A video of `count` stamped frames."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    write_any(path, stamped(count), fps=fps)
    return path


def describe(folder: Path, captions: dict[str, str]) -> None:
    lines = [json.dumps({"file_name": name, "text": text}) for name, text in captions.items()]
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")


def names(clips: ClipFolder) -> list[str]:
    return [clips.name(index) for index in range(len(clips))]


def reasons(clips: ClipFolder) -> dict[str, str]:
    return {skipped.name: skipped.reason for skipped in clips.skipped}


# --- what is found ---------------------------------------------------------------------------


def test_videos_are_found_at_any_depth_in_natural_order(tmp_path: Path) -> None:
    for name in ("b10.mp4", "b9.MP4".lower(), "a/z.avi", "a/deep/x.webm", ".hidden.mp4"):
        add(tmp_path, name)
    write_frames(tmp_path / "c" / "walk", stamped(8))
    (tmp_path / "notes.md").write_text("not a video")
    clips = open_clips(tmp_path, SHAPE, "a test")
    assert names(clips) == ["a/deep/x.webm", "a/z.avi", "b9.mp4", "b10.mp4", "c/walk"]
    assert not clips.skipped
    assert clips.contents == "1 avi, 2 mp4, 1 webm, 1 folder of frames"


def test_a_clip_has_the_backbones_shape_and_frames(tmp_path: Path) -> None:
    add(tmp_path, "a.mp4", count=24, fps=24)
    clip = open_clips(tmp_path, SHAPE, "a test")[0]
    assert clip.video is not None
    assert clip.video.shape == (3, 8, 32, 32)
    assert clip.video.dtype == torch.float32
    assert stamps(clip.video) == list(range(0, 24, 3))
    assert (clip.name, clip.caption) == ("a.mp4", "a test")


def test_a_folder_of_frames_plays_at_the_shapes_rate(tmp_path: Path) -> None:
    write_frames(tmp_path / "walk", stamped(16), ".jpg")
    clips = open_clips(tmp_path, SHAPE, "a test")
    assert names(clips) == ["walk#t=0,1", "walk#t=1,2"]
    assert clips[1].video is not None
    assert stamps(clips[1].video) == list(range(8, 16))


def test_a_folder_of_frames_is_a_clip(tmp_path: Path) -> None:
    write_frames(tmp_path, stamped(8))
    describe(tmp_path, {".": "a test"})
    clips = open_clips(tmp_path, SHAPE)
    assert names(clips) == ["."]
    assert clips[0].caption == "a test"


def test_pictures_beside_videos_and_single_pictures_are_no_clips(tmp_path: Path) -> None:
    add(tmp_path, "a.mp4")
    write_frames(tmp_path, stamped(3))
    write_frames(tmp_path / "thumbs", stamped(1))
    assert names(open_clips(tmp_path, SHAPE, "a test")) == ["a.mp4"]


def test_a_single_file_is_accepted(tmp_path: Path) -> None:
    add(tmp_path, "a.mp4")
    path = add(tmp_path, "b.mp4")
    describe(tmp_path, {"a.mp4": "first", "b.mp4": "second"})
    clips = open_clips(path, SHAPE)
    assert names(clips) == ["b.mp4"]
    assert clips[0].caption == "second"
    assert not clips.skipped


def test_long_files_are_cut_into_windows_that_do_not_overlap(tmp_path: Path) -> None:
    add(tmp_path, "a.mp4", count=28)
    add(tmp_path, "b.mp4", count=8)
    clips = open_clips(tmp_path, SHAPE, "a test")
    assert names(clips) == ["a.mp4#t=0,1", "a.mp4#t=1,2", "a.mp4#t=2,3", "b.mp4"]
    numbers = [stamps(clip.video) for clip in clips if clip.video is not None]
    assert numbers[:3] == [list(range(8)), list(range(8, 16)), list(range(16, 24))]
    assert len(open_clips(tmp_path, SHAPE, "a test", windows=2)) == 3


def test_short_files_are_skipped_or_if_asked_for_slowed_down_and_named(tmp_path: Path) -> None:
    add(tmp_path, "a.mp4", count=8, fps=20)
    add(tmp_path, "b.mp4")
    clips = open_clips(tmp_path, SHAPE, "a test")
    assert names(clips) == ["b.mp4"] and reasons(clips) == {
        "a.mp4": "too short: it lasts 0.40 s, and 1.00 s are needed. Use a longer one, or show it "
        "2.5 times slower: --set run.slow_down=true"
    }
    clips = open_clips(tmp_path, SHAPE, "a test", slow_down=True)
    assert clips[0].video is not None
    assert stamps(clips[0].video) == list(range(8))
    (remark,) = clips.remarks
    assert "Slowed down" in remark.what and remark.name == "a.mp4"
    assert remark.detail == "0.40 s is stretched to 1.00 s, 2.5 times slower"


# --- captions --------------------------------------------------------------------------------


def test_captions_come_from_metadata_then_text_then_prompt(tmp_path: Path) -> None:
    for name in ("a.mp4", "b/x.mp4", "c.mp4", "d.mp4"):
        add(tmp_path, name)
    write_frames(tmp_path / "walk", stamped(8))
    describe(tmp_path, {"a.mp4": "from  metadata", "./b/x.mp4": "deeper", "walk/": "frames"})
    for name in ("a.txt", "c.txt"):
        (tmp_path / name).write_text("from\ntext \n")
    clips = open_clips(tmp_path, SHAPE, "from prompt")
    assert [clip.caption for clip in clips] == [
        "from metadata", "deeper", "from text", "from prompt", "frames",
    ]  # fmt: skip


def test_a_folder_of_frames_takes_the_text_beside_it(tmp_path: Path) -> None:
    write_frames(tmp_path / "walk.v2", stamped(8))
    (tmp_path / "walk.v2.txt").write_text("a walk")
    assert open_clips(tmp_path, SHAPE)[0].caption == "a walk"


def test_a_clip_without_a_caption_is_an_error_that_names_three_ways(tmp_path: Path) -> None:
    path = add(tmp_path, "a.mp4")
    (tmp_path / "a.txt").write_text("  \n")
    for where in (tmp_path, path):
        with pytest.raises(
            UserError, match=r"a\.mp4 has no caption.*metadata.*text file.*--prompt"
        ):
            open_clips(where, SHAPE)


def test_files_without_metadata_are_skipped(tmp_path: Path) -> None:
    for name in ("a.mp4", "extra.mp4"):
        add(tmp_path, name)
    describe(tmp_path, {"a.mp4": "first", "gone.mp4": "not there"})
    clips = open_clips(tmp_path, SHAPE)
    assert names(clips) == ["a.mp4"]
    assert set(reasons(clips)) == {"extra.mp4", "gone.mp4"}
    assert "no such video" in reasons(clips)["gone.mp4"]
    assert "has its caption" in reasons(clips)["extra.mp4"]
    with pytest.raises(UserError, match=r"extra\.mp4 has no caption"):
        open_clips(tmp_path / "extra.mp4", SHAPE)


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("{", "Line 2 of .*metadata.jsonl is not JSON"),
        ('["b.mp4", "text"]', "Line 2 .* lacks a file_name or a text"),
        ('{"file_name": "b.mp4"}', "Line 2 .* lacks a file_name or a text"),
        ('{"file_name": "b.mp4", "text": "  "}', "Line 2 .* lacks a file_name or a text"),
        ('{"file_name": 3, "text": "x"}', "Line 2 .* lacks a file_name or a text"),
        ('{"file_name": "../b.mp4", "text": "x"}', r"Line 2 .*\.\./b\.mp4, which is outside"),
        ('{"file_name": "c/../../b.mp4", "text": "x"}', "which is outside"),
        ('{"file_name": "/etc/b.mp4", "text": "x"}', "which is outside"),
        ('{"file_name": "..\\\\b.mp4", "text": "x"}', "which is outside"),
        ('{"file_name": "C:\\\\b.mp4", "text": "x"}', "which is outside"),
        ('{"file_name": "a.mp4", "text": "x"}', "Line 2 .* names a.mp4 again"),
    ],
)
def test_a_malformed_line_is_named(tmp_path: Path, line: str, complaint: str) -> None:
    add(tmp_path, "a.mp4")
    (tmp_path / "metadata.jsonl").write_text(f'{{"file_name": "a.mp4", "text": "x"}}\n{line}\n')
    with pytest.raises(UserError, match=complaint):
        open_clips(tmp_path, SHAPE)


@pytest.mark.parametrize("name", ["metadata.jsonl", "a.txt"])
def test_text_that_is_not_utf8_is_named(tmp_path: Path, name: str) -> None:
    add(tmp_path, "a.mp4")
    (tmp_path / name).write_bytes(b"\xff\xfe\x00caf\xe9")
    with pytest.raises(UserError, match=f"{name} cannot be read: it is not UTF-8"):
        open_clips(tmp_path, SHAPE)


def test_a_byte_order_mark_and_blank_lines_are_ignored(tmp_path: Path) -> None:
    add(tmp_path, "a.mp4")
    (tmp_path / "metadata.jsonl").write_text(
        '\ufeff\n{"file_name": "a.mp4", "text": "Käse"}\n\n', encoding="utf-8"
    )
    assert open_clips(tmp_path, SHAPE)[0].caption == "Käse"


# --- failures --------------------------------------------------------------------------------


def test_unusable_files_are_named_and_skipped(tmp_path: Path) -> None:
    add(tmp_path, "good.mp4")
    add(tmp_path, "short.mp4", count=5, fps=25)
    (tmp_path / "noise.mp4").write_bytes(b"noise" * 1000)
    (tmp_path / "empty.webm").touch()
    clips = open_clips(tmp_path, SHAPE, "a test")
    assert names(clips) == ["good.mp4"]
    assert set(reasons(clips)) == {"short.mp4", "noise.mp4", "empty.webm"}
    assert reasons(clips)["short.mp4"] == ("too short: it lasts 0.20 s, and 1.00 s are needed.")
    assert "damaged" in reasons(clips)["noise.mp4"]


def test_a_late_damage_is_skipped_when_it_is_decoded(tmp_path: Path) -> None:
    add(tmp_path, "bad.mkv", count=16)
    add(tmp_path, "good.mp4")
    clips = open_clips(tmp_path, SHAPE, "a test")
    assert len(clips) == 3
    (tmp_path / "bad.mkv").write_bytes(b"overwritten")
    with pytest.raises(VideoError, match=r"bad\.mkv is damaged"):
        clips[0]
    assert not clips.skipped
    for _ in range(2):
        assert [clip.name for clip in clips] == ["good.mp4"]
    assert [skipped.name for skipped in clips.skipped] == ["bad.mkv#t=0,1", "bad.mkv#t=1,2"]
    assert {clips.cycle(index).name for index in range(7)} == {"good.mp4"}
    (tmp_path / "good.mp4").unlink()
    with pytest.raises(UserError):
        clips.cycle(0)


def test_an_index_past_the_end_starts_over(tmp_path: Path) -> None:
    for name in ("a.mp4", "b.mp4"):
        add(tmp_path, name)
    clips = open_clips(tmp_path, SHAPE, "a test")
    assert [clips.cycle(index).name for index in range(4)] == ["a.mp4", "b.mp4"] * 2
    assert clips[-1].name == "b.mp4"
    with pytest.raises(IndexError):
        clips[2]


def test_any_number_of_clips_is_spread_over_all_files(tmp_path: Path) -> None:
    for name in "abcde":
        add(tmp_path, f"{name}.mp4", count=16 if name < "e" else 8)
    clips = open_clips(tmp_path, SHAPE, "a test")
    drawn = [clips.cycle(index).name for index in range(10)]
    assert [name[0] for name in drawn] == [*"aecbd", *"acbd", "a"]
    assert [name[5:] for name in drawn[:2]] == ["#t=0,1", ""]
    assert {name[5:] for name in drawn[2:5]} == {"#t=0,1"}
    assert {name[5:] for name in drawn[5:9]} == {"#t=1,2"}
    assert names(clips)[:3] == ["a.mp4#t=0,1", "a.mp4#t=1,2", "b.mp4#t=0,1"]


def test_what_fills_the_gaps_of_damaged_clips_is_spread_over_the_others(tmp_path: Path) -> None:
    add(tmp_path, "bad.mp4", count=64)
    for number in range(8):
        add(tmp_path, f"good{number}.mp4", count=16)
    clips = open_clips(tmp_path, SHAPE, "a test")
    (tmp_path / "bad.mp4").write_bytes(b"overwritten")
    assert len(clips) == 24
    used = Counter(clips.cycle(index).name for index in range(3 * len(clips)))
    assert len(used) == 16 and len(clips.skipped) == 8
    assert max(used.values()) <= 3 * min(used.values())


def spliced(folder: Path, name: str, cut: int, count: int = 16) -> None:
    """A video of 8 frames a second that shows another scene from a frame on."""
    y, x = torch.meshgrid(torch.linspace(0, 1, 32), torch.linspace(0, 1, 32), indexing="ij")
    before = torch.stack([0.2 + 0.6 * x, 0.5 * y, 0.1 + 0 * x])
    after = torch.stack([0.1 + 0 * x, 0.9 - 0.8 * x, 0.3 + 0.5 * y])
    frames = [before if index < cut else after for index in range(count)]
    write_video(folder / name, torch.stack(frames, dim=1), 8)


def test_clips_with_a_scene_cut_are_skipped_unless_asked_for(tmp_path: Path) -> None:
    spliced(tmp_path, "a.mp4", 12)
    spliced(tmp_path, "b.mp4", 8, 8)
    clips = open_clips(tmp_path, SHAPE, "a test")
    assert {clips.cycle(index).name for index in range(6)} == {"a.mp4#t=0,1", "b.mp4"}
    (skipped,) = clips.skipped
    assert skipped.name == "a.mp4#t=1,2" and "a scene cut after 0.50 s" in skipped.reason
    clips = open_clips(tmp_path, SHAPE, "a test", scene_cuts=True)
    assert len({clips.cycle(index).name for index in range(3)}) == 3 and not clips.skipped
    spliced(tmp_path, "a.mp4", 4, 8)
    (tmp_path / "b.mp4").unlink()
    with pytest.raises(VideoError, match=r"No clip .* can be used.*--set run.scene_cuts=true"):
        open_clips(tmp_path, SHAPE, "a test").cycle(0)


def test_a_folder_without_usable_clips_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"There is no folder .*gone. Check the path"):
        open_clips(tmp_path / "gone", SHAPE)
    with pytest.raises(UserError, match="holds no videos"):
        open_clips(tmp_path, SHAPE)
    (tmp_path / "a.txt").write_text("no video")
    with pytest.raises(UserError, match=r"a\.txt is not a readable video"):
        open_clips(tmp_path / "a.txt", SHAPE)
    (tmp_path / "noise.mp4").write_bytes(b"noise")
    with pytest.raises(UserError, match=r"has no usable clip: .*noise\.mp4"):
        open_clips(tmp_path, SHAPE, "a test")


# --- the fingerprint -------------------------------------------------------------------------


def test_the_fingerprint_depends_on_everything_that_determines_the_clips(tmp_path: Path) -> None:
    first = tmp_path / "first"
    add(first, "a.mp4")
    add(first, "b.mp4")
    (first / "a.txt").write_text("a test")
    mark = open_clips(first, SHAPE, "a test").fingerprint
    assert mark == open_clips(first, SHAPE, "a test").fingerprint
    shutil.copytree(first, tmp_path / "second")
    assert mark == open_clips(tmp_path / "second", SHAPE, "a test").fingerprint
    other = VideoShape(frames=8, height=32, width=48, fps=8.0)
    assert mark != open_clips(first, other, "a test").fingerprint
    assert mark != open_clips(first, SHAPE, "another").fingerprint
    (first / "b.mp4").rename(first / "c.mp4")
    assert mark != open_clips(first, SHAPE, "a test").fingerprint


# --- real clips ------------------------------------------------------------------------------


def test_the_real_clips_open_and_decode() -> None:
    shape = VideoShape(frames=16, height=64, width=64, fps=8.0)
    assert reasons(open_clips(CLIPS, shape)).keys() == {"sitting_down.mp4"}, "it has no caption"
    clips = open_clips(CLIPS, shape, "a girl sits down")
    assert len(clips) == 3 and not clips.skipped
    for clip in clips:
        assert clip.caption
        assert clip.video is not None
        assert clip.video.shape == (3, 16, 64, 64)
        assert clip.video.std() > 0.02


def test_clips_too_short_for_the_backbone_are_skipped() -> None:
    shape = VideoShape(frames=49, height=60, width=90, fps=8.0)
    assert reasons(open_clips(CLIPS, shape, "x", slow_down=True)).keys() == {"grand_prix_1906.mp4"}
    with pytest.raises(UserError, match=r"needed. Use a longer one.* --set run.slow_down=true"):
        open_clips(CLIPS / "sitting_down.mp4", shape, "a girl sits down")
    clips = open_clips(CLIPS, shape, "a girl sits down", slow_down=True)
    (clip,) = clips
    assert clip.video is not None and clip.video.shape[1] == 49
