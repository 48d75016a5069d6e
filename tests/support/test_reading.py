"""Text, lists, JSON and TOML of strangers: what is a line, what is refused, and how."""

from __future__ import annotations

import os
import unicodedata
from pathlib import Path

import pytest

from dpo_video.support import reading
from dpo_video.support.reading import Names, parse_json, read_lines, read_text, read_toml


def test_lines_end_at_line_feeds_alone(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes("\ufeffone\u2028more\r\n\n  \n\ufefftwo\x85\x0cmore\nthree".encode())
    assert list(read_lines(file)) == [(1, "one\u2028more"), (4, "two\x85\x0cmore"), (5, "three")]


def test_text_is_utf8_with_or_without_a_byte_order_mark(tmp_path: Path) -> None:
    for data in ("\ufeffK\u00e4se".encode(), "K\u00e4se".encode()):
        (tmp_path / "a.txt").write_bytes(data)
        assert read_text(tmp_path / "a.txt") == "K\u00e4se"
    for data in (b"K\xe4se", "K\u00e4se".encode("utf-16")):
        (tmp_path / "a.txt").write_bytes(data)
        with pytest.raises(OSError) as caught:
            read_text(tmp_path / "a.txt")
        assert caught.value.strerror == "it is not UTF-8 text"


def test_only_regular_files_of_limited_size_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "file").write_bytes(b"123\n456")
    for name, reason in {
        "pipe": "it is a named pipe, not a file",
        ".": "it is a folder, not a file",
        "gone": "No such file or directory",
        "null\0": "no file can have this name",
        "half\ud800": "no file can have this name",
    }.items():
        for read in (read_text, read_toml, lambda path: list(read_lines(path))):
            with pytest.raises(OSError) as caught:
                read(tmp_path / name)
            assert caught.value.strerror == reason
    with pytest.raises(OSError) as caught:
        read_text(Path("/dev/zero"))
    assert caught.value.strerror == "it is a device, not a file"
    with pytest.raises(OSError, match="larger than"):
        reading.read_bytes(tmp_path / "file", 6)
    monkeypatch.setattr(reading, "MAX_TEXT", 2)
    with pytest.raises(OSError, match="its line 1 is longer than"):
        list(read_lines(tmp_path / "file"))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[" * 5000 + "]" * 5000, "nested too deeply"),
        ('{"a":' * 5000 + "1" + "}" * 5000, "nested too deeply"),
        (r'{"a": "\ud800"}', "lone surrogate"),
        (r'{"\udfff": 1}', "lone surrogate"),
        ('{"a": 1, "a": 2}', "names 'a' twice"),
        ("9" * 5000, "Exceeds the limit"),
        ("{", "at character"),
    ],
)
def test_hostile_json_is_a_value_error(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        parse_json(text)
    assert parse_json('{"a": NaN, "b": "\u2028"}')["b"] == "\u2028"


@pytest.mark.parametrize("text", ["a = " + "[" * 5000, "a = " + "9" * 5000, "a = 1\na = 2"])
def test_hostile_toml_is_a_value_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.toml").write_text(text)
    with pytest.raises(ValueError):
        read_toml(tmp_path / "a.toml")


def test_names_of_other_systems_are_found(tmp_path: Path) -> None:
    for form in ("NFC", "NFD"):
        folder = tmp_path / form
        stored = unicodedata.normalize(form, "caf\u00e9/\u00fcber.mp4")
        (folder / stored).parent.mkdir(parents=True)
        (folder / stored).touch()
        names = Names(folder)
        for asked in ("NFC", "NFD"):
            for separator in "/\\":
                name = unicodedata.normalize(asked, f"caf\u00e9{separator}\u00fcber.mp4")
                assert names.find(name) == folder / stored
        assert names.find("caf\u00e9/uber.mp4") is None
    (tmp_path / "a\\b.mp4").touch()  # a name may hold a backslash
    assert Names(tmp_path).find("a\\b.mp4") == tmp_path / "a\\b.mp4"
    for name in ("x" * 5000, "a\0", "\ud800"):
        assert Names(tmp_path).find(name) is None
