"""Whose error is it? Names the plugin that an exception came out of.

Everything is read off entry points and tracebacks, so that strategies need no wrapping: what is
called is what was written.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import FrameType

from dpo_video.errors import one_line
from dpo_video.registry.entry_points import Entry, entries

OURS = __name__.partition(".")[0]


def blamed(error: BaseException) -> str | None:
    """One sentence about the plugin that an exception came out of; None if it was none's.

    A plugin that ends the program is to blame only if it did so itself.
    """
    names = (frame.f_globals.get("__name__", "") for frame in _frames(error))
    if isinstance(error, SystemExit) and _top(next(names, "")) == OURS:
        return None
    for frame in _frames(error):
        if _top(frame.f_globals.get("__name__", "")) != OURS:
            return said(_entry(frame), error)
    return None


def plugin_of(thing: object) -> Entry | None:
    """The entry point that a strategy came in by, if that is not one of ours."""
    cls = type(thing)
    same = _from(cls.__module__)
    exact = (
        entry for entry in same if (entry.module, entry.attr) == (cls.__module__, cls.__name__)
    )
    return next(exact, next(iter(same), None))


def said(entry: Entry, error: BaseException) -> str:
    """The sentence for an error that came out of a plugin."""
    reason = one_line(f"{type(error).__name__}: {error}".removesuffix(": "))
    return (
        f"The {entry.kind} '{entry.name}' of {entry.distribution} failed ({reason}). That is a "
        "fault of that package, for its author; nothing that was saved before is lost, and "
        "everything else goes on working."
    )


def _frames(error: BaseException) -> Iterator[FrameType]:
    """The frames of an exception that are ours or a plugin's, the innermost first."""
    found, trace = [], error.__traceback__
    while trace is not None:
        found.append(trace.tb_frame)
        trace = trace.tb_next
    for frame in reversed(found):
        module = frame.f_globals.get("__name__", "")
        if _top(module) == OURS or _from(module):
            yield frame


def _entry(frame: FrameType) -> Entry:
    """The strategy that a plugin's frame belongs to: its own, or one of its package."""
    return plugin_of(frame.f_locals.get("self")) or _from(frame.f_globals["__name__"])[0]


def _from(module: str) -> list[Entry]:
    """The entry points of the package that a module is in, those of the very module first."""
    top = _top(module)
    same = [entry for entry in entries() if top not in ("", OURS) and _top(entry.module) == top]
    return sorted(same, key=lambda entry: entry.module != module)


def _top(module: str) -> str:
    return module.partition(".")[0]
