"""Attribution: which plugin raised an exception.

It is read from entry points and tracebacks, so that strategies are called without wrappers.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from dpo_video.registry import local
from dpo_video.registry.entry_points import Entry, entries
from dpo_video.text import one_line

_PART = "code"
"""In place of a kind, for a function in a file."""
OURS = __name__.partition(".")[0]


def attribution(error: BaseException) -> str | None:
    """One sentence about the plugin that raised an exception; None if no plugin did.

    A SystemExit counts only if the plugin itself raised it.
    """
    names = (frame.f_globals.get("__name__", "") for frame in _frames(error))
    if isinstance(error, SystemExit) and _top(next(names, "")) == OURS:
        return None
    for frame in _frames(error):
        if _top(frame.f_globals.get("__name__", "")) != OURS:
            return sentence(_entry(frame), error)
    return None


def plugin_of(thing: object) -> Entry | None:
    """The entry point of a strategy, or what stands for it if its class is in a file.

    None for a built-in strategy.
    """
    cls = type(thing)
    if local.is_module(cls.__module__):
        return _in_file(cls.__module__, str(getattr(cls, "kind", _PART)), cls.__name__)
    same = _from(cls.__module__)
    exact = (
        entry for entry in same if (entry.module, entry.attr) == (cls.__module__, cls.__name__)
    )
    return next(exact, next(iter(same), None))


def made_by(thing: object) -> tuple[str, str] | None:
    """Package of a plugin's strategy, and its version with a hash of its source code.

    For a class in a file, the file's name and the hash. None for a built-in strategy, and for a
    class that is defined in this session.
    """
    if local.is_module(type(thing).__module__):
        return local.origin(type(thing).__module__)
    if (entry := plugin_of(thing)) is None:
        return None
    digest = hashlib.sha256()
    for path in _source(type(thing).__module__):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    version = entry.distribution.partition(" ")[2]
    return entry.package, f"{version} (source {digest.hexdigest()[:12]})"


def _source(module: str) -> list[Path]:
    """The Python files of a module's top-level package, in a fixed order."""
    file = getattr(sys.modules[_top(module)], "__file__", None)
    if file is None:  # a namespace package
        file = getattr(sys.modules[module], "__file__", None)
        return [Path(file)] if file else []
    path = Path(file)
    return sorted(path.parent.rglob("*.py")) if path.name == "__init__.py" else [path]


def sentence(entry: Entry, error: BaseException) -> str:
    """The sentence for an error that a plugin raised."""
    reason = one_line(f"{type(error).__name__}: {error}".removesuffix(": "))
    advice = (
        "Correct the file; nothing that was saved is lost."
        if local.is_module(entry.module)
        else "Report it to that package's author; nothing that was saved is lost, and all other "
        "strategies still work."
    )
    return f"The {entry.kind} '{entry.name}' of {entry.distribution} failed ({reason}). {advice}"


def _frames(error: BaseException) -> Iterator[FrameType]:
    """The frames of an exception in this package or a plugin, the innermost first."""
    found, trace = [], error.__traceback__
    while trace is not None:
        found.append(trace.tb_frame)
        trace = trace.tb_next
    for frame in reversed(found):
        module = frame.f_globals.get("__name__", "")
        if _top(module) == OURS or _from(module):
            yield frame


def _entry(frame: FrameType) -> Entry:
    """The entry point of the strategy in a plugin's frame, or another one of its package."""
    return plugin_of(frame.f_locals.get("self")) or _from(frame.f_globals["__name__"])[0]


def _from(module: str) -> list[Entry]:
    """The entry points of a module's package, those of the module itself first."""
    if local.is_module(module):
        return [_in_file(module, _PART, local.origin(module)[0])]
    top = _top(module)
    same = [entry for entry in entries() if top not in ("", OURS) and _top(entry.module) == top]
    return sorted(same, key=lambda entry: entry.module != module)


def _in_file(module: str, kind: str, name: str) -> Entry:
    """What stands for the entry point of a class in a file."""
    path = str(sys.modules[module].__file__)
    return Entry(kind=kind, name=name, value=f"{module}:{name}", distribution=path)


def _top(module: str) -> str:
    return module.partition(".")[0]
