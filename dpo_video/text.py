"""User text in messages, on terminals and in commands that are to be pasted."""

from __future__ import annotations

import inspect
import os
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

_LONGEST = 2000  # characters of a message
# User and password before a host, where a password may contain a slash; and a query.
_CREDENTIALS = re.compile(r"(?<=://)(?:[^\s/]*@|[^\s/@:]*:(?!\d+/)[^\s@]*@)")
_QUERY = re.compile(r"(\w://[^\s?'\"]*)\?[^\s'\"]*")
_BREAK = re.compile(r"\s*[\n\r\t\v\f]\s*")
_FLAG = re.compile(r"--[a-z][a-z-]*(=.*)?", re.DOTALL)


def without_credentials(text: str) -> str:
    """The text with every URL in it reduced to what may be stored and shown.

    User names, passwords and queries, where signed URLs keep their signature, are removed.
    """
    return _QUERY.sub(r"\1", _CREDENTIALS.sub("", text))


def printable(text: str) -> str:
    """The text with escapes for control characters, line breaks and tabs excepted."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text)


def one_line(text: str) -> str:
    """The text as one printable line, with escapes for control characters, cut in the middle."""
    half = _LONGEST // 2
    if len(text) > _LONGEST:  # first, because a quoted file may be large
        text = f"{text[:half]} ... {text[-half:]}"
    return printable(_BREAK.sub(" ", text).strip())


def command(*words: str | Path) -> str:
    """A `dpo-video` command on one line, each word quoted for a shell.

    Paths are given as `Path`, or as a text that is no flag; one with a leading dash gets "./".
    """
    return " ".join(["dpo-video", *(quoted(_undashed(word)) for word in words)])


def label_command(pairs: str | Path) -> str:
    """The command that labels pairs by metrics, which needs no person and no model."""
    return command("label", pairs, "--labeler", "metric")


def quoted(word: str | Path) -> str:
    """A word of a command, quoted for a shell; control characters are escaped."""
    text = str(word)
    if text.isprintable():
        return shlex.quote(text)
    # Also bytes that are not UTF-8, which Python keeps as surrogates.
    escaped = (
        c
        if c.isprintable() and c not in "'\\"
        else "".join(f"\\x{byte:02x}" for byte in os.fsencode(c))
        for c in text
    )
    return f"$'{''.join(escaped)}'"


def _undashed(word: str | Path) -> str:
    text = str(word)
    flag = isinstance(word, str) and _FLAG.fullmatch(text)
    return f"./{text}" if text.startswith("-") and not flag else text


def help_of(function: Callable[..., Any]) -> str:
    """A function's docstring with a line for each paragraph: the terminal wraps them."""
    return re.sub(r"(?<=\S)\n *(?=\S)", " ", inspect.getdoc(function) or "")
