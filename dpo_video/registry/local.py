"""Strategies in a file of Python: `--loss ./focal.py:Focal`.

A file's code runs only if its content was allowed in this process: `allow` is called for names that
the user typed, and never for names that stand in another file.
"""

from __future__ import annotations

import hashlib
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from dpo_video.errors import PluginError, UserError
from dpo_video.support.reading import read_bytes

FOLDER = "code"
"""Where a run and a set of pairs keep the files of their strategies."""
_NAME = re.compile(r"(?P<path>[^*]+\.py):(?P<cls>[A-Za-z_]\w*)")
_MODULE = "dpo_video_local_"
_SUFFIX = re.compile(r"-[0-9a-f]{12}$")
_allowed: set[str] = set()
_contents: dict[str, bytes] = {}
_typed: dict[str, str] = {}


def is_file(name: str) -> bool:
    """Whether a strategy's name is one of a class in a file."""
    return _NAME.fullmatch(name) is not None


def is_module(module: str) -> bool:
    """Whether a module was made of a file."""
    return module.startswith(_MODULE)


def origin(module: str) -> tuple[str, str]:
    """The name of a module's file, without the hash in that of a copy, and the hash."""
    path = Path(str(sys.modules[module].__file__))
    return f"{_SUFFIX.sub('', path.stem)}.py", f"(source {module.removeprefix(_MODULE)})"


def same(name: str, other: str) -> bool:
    """Whether two names are equal, or of a class of one name in files of one name.

    So the options of a class hold for a corrected file, too.
    """
    if not (is_file(name) and is_file(other)):
        return name == other
    (path, cls), (path_, cls_) = _split(name), _split(other)
    return (_SUFFIX.sub("", path.stem), cls) == (_SUFFIX.sub("", path_.stem), cls_)


def below(folder: Path, name: str) -> str:
    """The name with its path seen from a folder."""
    path, cls = _split(name)
    return f"{folder.absolute() / path.expanduser()}:{cls}"


def allow(name: str) -> None:
    """Let the present content of a file run in this process."""
    path, _ = _split(name)
    _allowed.add(_digest(_read(path, name)))


def recorded(name: str) -> str:
    """The name for a file in whose folder `save` has put the code, which holds a hash of it.

    A name that is none of a class in a file is returned as it is.
    """
    if not is_file(name):
        return name
    path, cls = _split(name)
    data = _read(path, name)
    file = f"{FOLDER}/{_SUFFIX.sub('', path.stem)}-{_digest(data)[:12]}.py"
    _contents[file] = data
    _typed[f"{file}:{cls}"] = below(Path.cwd(), name)
    return f"{file}:{cls}"


def typed(tables: Mapping[str, Any]) -> dict[str, Any]:
    """Tables whose recorded names are those of the files that they were made of."""
    return {
        _typed.get(key, key): typed(value)
        if isinstance(value, Mapping)
        else _typed.get(value, value)
        if key == "name"
        else value
        for key, value in tables.items()
    }


def save(tables: Mapping[str, Mapping[str, Any]], folder: Path) -> None:
    """Write the files of the recorded names in some tables below a folder."""
    for table in tables.values():
        for name in (table.get("name"), *table) if isinstance(table, Mapping) else ():
            if isinstance(name, str) and is_file(name):
                file = name.rpartition(":")[0]
                (folder / file).parent.mkdir(parents=True, exist_ok=True)
                (folder / file).write_bytes(_contents[file])


def load(name: str) -> Any:
    """The class.

    Raises:
        UserError: if the file cannot be read, or its content was not allowed.
        PluginError: if it cannot be imported, or lacks the class.
    """
    path, cls = _split(name)
    data = _read(path, name)
    digest = _digest(data)
    if digest not in _allowed:
        raise UserError(
            f"'{name}' is code in a file, which does not run just because another file names it. "
            "Read it, then add --allow-code, or name it on the command line."
        )
    module = f"{_MODULE}{digest[:12]}"
    if module not in sys.modules:
        made = ModuleType(module)
        made.__file__ = str(path)
        sys.modules[module] = made  # dataclasses and pydantic look a class's module up
        try:
            exec(compile(data, str(path), "exec"), made.__dict__)
        except (Exception, SystemExit) as error:
            del sys.modules[module]
            raise PluginError(
                f"'{path}' cannot be imported ({type(error).__name__}: {error}). Correct it."
            ) from error
    found = getattr(sys.modules[module], cls, None)
    if found is None:
        raise PluginError(f"'{path}' has no class '{cls}'. Name one of its classes.")
    return found


def _split(name: str) -> tuple[Path, str]:
    match = _NAME.fullmatch(name)
    assert match is not None
    return Path(match["path"]), match["cls"]


def _read(path: Path, name: str) -> bytes:
    try:
        return read_bytes(path)
    except OSError as error:
        raise UserError(f"'{name}' cannot be read: {error.strerror}. Name a file.") from error


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
