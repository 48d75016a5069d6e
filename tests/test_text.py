"""User text in messages and commands: nothing is interpreted, and commands can be pasted."""

from __future__ import annotations

import ast
import os
import re
import subprocess
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

import dpo_video
from dpo_video.cli.console import say, show
from dpo_video.errors import UserError
from dpo_video.support.formatting import plain_table
from dpo_video.text import command, one_line, printable, quoted

PACKAGE = Path(dpo_video.__file__).parent
HOSTILE = [
    "plain",
    "[/b]",
    "[red]x[/red]",
    "two  spaces",
    'it\'s "quoted"',
    "line\nbreak\ttab",
    "-leading",
    "--out",
    "$HOME `id` $(id) !x *? ~ # ; & | > \\",
    "\x1b[31mred\x07",
    "caf\u00e9 \u732b \U0001f431",
    "zero\u200bwidth\u2028end",
    os.fsdecode(b"not\xffutf8"),
    ":fire:",
    "",
]


def shell_words(text: str) -> list[bytes]:
    """The words of a command line, as bash splits it."""
    done = subprocess.run(["bash", "-c", f"printf '%s\\0' {text}"], capture_output=True, check=True)
    return done.stdout.split(b"\0")[:-1]


@pytest.mark.parametrize("text", HOSTILE)
def test_a_command_is_one_printable_line_that_a_shell_reads_back(text: str) -> None:
    line = command("train", "--out", Path(text or "x"), "--resume")
    assert line.isprintable() and one_line(f"Resume: {line}") == f"Resume: {line}"
    *head, path, tail = shell_words(line)
    assert (head, tail) == ([b"dpo-video", b"train", b"--out"], b"--resume")
    assert not path.startswith(b"-")
    assert os.path.normpath(path) == os.fsencode(Path(text or "x"))
    assert shell_words(quoted(text)) == [os.fsencode(text)]


@pytest.mark.parametrize("text", HOSTILE)
def test_text_on_the_terminal_is_never_markup_nor_wrapped(text: str) -> None:
    out = StringIO()
    terminal = Console(file=out, width=20, force_terminal=False)
    say(f"before {text} after, and far beyond the width", to=terminal)
    expected = printable(f"before {text} after, and far beyond the width\n").expandtabs(8)
    assert out.getvalue() == expected
    assert "\x1b" not in out.getvalue() and "\x07" not in out.getvalue()
    out.truncate(0)
    out.seek(0)
    Console(file=out, width=200).print(plain_table(("a", text), [(text, "x")]))
    assert all(out.getvalue().count(word) >= 2 for word in printable(text).split())


@pytest.mark.parametrize("text", HOSTILE)
def test_a_message_is_one_printable_line(text: str) -> None:
    message = str(UserError(f"'{text}' is wrong. Try: {command('show', Path(text or 'x'))}"))
    assert message.isprintable() and message.endswith(command("show", Path(text or "x")))


def test_a_table_in_a_log_is_not_wrapped(capsys: pytest.CaptureFixture[str],
                                         monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.delenv("COLUMNS", raising=False)
    show(plain_table(("a",), [("word " * 60,)]))
    assert "word " * 59 in capsys.readouterr().out


def test_no_command_is_put_together_by_hand() -> None:
    """Paths in commands go through `command`: an f-string would not quote them."""
    inserted = re.compile(r"dpo-video [^{}\"]*\{([^{}]*)\}")
    named = {"kind", "name", "path", "self.kind"}  # of strategies and options, not of files
    for file in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                found = inserted.findall(ast.unparse(node))
                assert set(found) <= {*named, "dpo_video.__version__"}, (file.name, found)
