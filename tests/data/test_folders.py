"""Videos are found behind links, and what is not read is named."""

from __future__ import annotations

import os
import unicodedata
from pathlib import Path

import pytest
from PIL import Image
from test_clips import SHAPE, add, describe, names, reasons
from test_video import stamped, write_frames

from dpo_video.data.clips import open_clips
from dpo_video.data.folders import find_videos
from dpo_video.types import Skipped


def found(root: Path) -> tuple[list[str], dict[str, str]]:
    skipped: list[Skipped] = []
    return find_videos(root, skipped), {each.name: each.reason for each in skipped}


def test_linked_folders_are_followed_once(tmp_path: Path) -> None:
    for name in ("store/day1/a.mp4", "c/real/b.mp4"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).touch()
    root = tmp_path / "c"
    (root / "day1").symlink_to(tmp_path / "store/day1")
    (root / "a_second_way").symlink_to("real")
    (root / "real/up").symlink_to(root)
    (root / "itself").symlink_to("itself")
    (root / "gone.mp4").symlink_to("nowhere.mp4")
    videos, left = found(root)
    assert videos == ["day1/a.mp4", "real/b.mp4"]
    assert left == {
        "a_second_way": "it is a link to a folder that is read already",
        "real/up": "it is a link to a folder that is read already",
        "itself": "it is a link to nothing",
        "gone.mp4": "it is a link to nothing",
    }


def test_a_linked_file_is_read(tmp_path: Path) -> None:
    path = add(tmp_path / "store", "a.mp4")
    (tmp_path / "c").mkdir()
    (tmp_path / "c/b.mp4").symlink_to(path)
    assert names(open_clips(tmp_path / "c", SHAPE, "a test")) == ["b.mp4"]


def test_what_looks_like_a_video_and_is_not_read_is_named(tmp_path: Path) -> None:
    for name in ("a.rm", "frames/1.tif", "frames/2.tif", "notes.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    videos, left = found(tmp_path)
    assert videos == []
    assert left.keys() == {"a.rm", "frames/*.tif"}
    assert "files of type .rm are not read. Convert it to one of" in left["a.rm"]


def test_a_listed_file_that_is_not_read_is_not_called_missing(tmp_path: Path) -> None:
    add(tmp_path, "a.mp4")
    (tmp_path / "b.rm").touch()
    (tmp_path / "c.xyz").touch()
    Image.new("RGB", (8, 8)).save(tmp_path / "d.png")
    described = ("a.mp4", "b.rm", "c.xyz", "d.png", "gone.mp4")
    describe(tmp_path, dict.fromkeys(described, "a test"))
    left = reasons(open_clips(tmp_path, SHAPE))
    assert "type .rm are not read" in left["b.rm"]
    assert "type .xyz are not read" in left["c.xyz"]
    assert "a single picture is no video" in left["d.png"]
    assert "no such video" in left["gone.mp4"]


def test_names_in_both_forms_of_unicode_meet(tmp_path: Path) -> None:
    stored, written = (unicodedata.normalize(form, "caf\u00e9") for form in ("NFD", "NFC"))
    for name in (f"{stored}/{stored}.mp4", f"{stored}2.mp4"):
        add(tmp_path, name)
    describe(tmp_path, {f"{written}\\{written}.mp4": "listed", "other.mp4": "x"})
    (tmp_path / f"{written}2.txt").write_text("beside it")
    clips = open_clips(tmp_path, SHAPE)
    assert sorted(clip.caption for clip in clips) == ["beside it", "listed"]


def test_a_name_that_is_not_utf8_is_skipped(tmp_path: Path) -> None:
    add(tmp_path, "a.mp4")
    (tmp_path / os.fsdecode(b"caf\xe9.mp4")).touch()
    write_frames(tmp_path / os.fsdecode(b"\xff"), stamped(8))
    clips = open_clips(tmp_path, SHAPE, "a test")
    assert names(clips) == ["a.mp4"]
    assert reasons(clips) == dict.fromkeys(
        (r"caf\udce9.mp4", r"\udcff"), "its name is not UTF-8. Rename it"
    )


def test_a_pipe_and_an_unreadable_folder_are_skipped(tmp_path: Path) -> None:
    add(tmp_path, "a.mp4")
    os.mkfifo(tmp_path / "pipe.mp4")
    (tmp_path / "closed").mkdir(mode=0)
    try:
        left = reasons(open_clips(tmp_path, SHAPE, "a test"))
    finally:
        (tmp_path / "closed").chmod(0o700)
    assert "it is a named pipe" in left["pipe.mp4"]
    if os.geteuid():  # root reads everything
        assert "Permission denied" in left["closed"]


@pytest.mark.parametrize("mark", ["\u2028", "\u0085", "\x0c"])
def test_a_caption_may_hold_other_separators(tmp_path: Path, mark: str) -> None:
    add(tmp_path, "a.mp4")
    line = f'{{"file_name": "a.mp4", "text": "a square{mark}on blue", "id": 7, "score": NaN}}\n'
    if mark == "\x0c":  # which JSON wants escaped
        line = line.replace(mark, "\\f")
    (tmp_path / "metadata.jsonl").write_text(line, encoding="utf-8")
    clips = open_clips(tmp_path, SHAPE)
    assert clips[0].caption == "a square on blue"
    (remark,) = clips.remarks
    assert (remark.what, remark.name) == ("Columns that are not read", "metadata.jsonl")
    assert remark.detail == "id, score"
