"""Write a plugin package to start from. Imports no torch."""

from __future__ import annotations

import keyword
import re
from importlib.metadata import version
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from dpo_video import registry
from dpo_video.errors import UserError
from dpo_video.support.atomic import write_text, writing
from dpo_video.text import command

PREFIX = "dpo-video-"
_EXAMPLES = {
    "backbone": ("build", "--pairs=jitter", "--count=2", "--backbone={name}"),
    "labeler": ("label", "PAIRS", "--labeler={name}"),
    "loss": ("train", "--pairs=local", "--loss={name}"),
    "metric": ("evaluate", "RUN", "--metric={name}"),
    "pairs": ("build", "--pairs={name}", "--count=2"),
    "reference": ("train", "--pairs=local", "--reference={name}"),
    "timesteps": ("train", "--pairs=local", "--timesteps={name}"),
    "optimizer": ("train", "--pairs=local", "--optimizer={name}"),
    "schedule": ("train", "--pairs=local", "--schedule={name}"),
    "check": ("check", "PAIRS", "--check=+{name}"),
    "command": ("{name}", "RUN"),
    "format": ("export", "RUN", "--format={name}"),
    "listener": ("train", "--pairs=local", "--listener={name}"),
}


def new_plugin(kind: str, name: str, out: Path | str | None = None) -> Path:
    """Write a package with one strategy that works, its entry point, its test and a README.

    The package installs with `pip install -e` and passes its contract as it is. Its code is meant
    to be replaced.

    Args:
        kind: The kind of the strategy.
        name: Its name on the command line, such as `my-loss` or `MyLoss`.
        out: The folder; `dpo-video-NAME` by default.

    Returns:
        The folder.

    Raises:
        UserError: for a kind or name that is none, a name that is taken, or a folder that exists.
    """
    registry.check_kind(kind, registry.PYTHON)
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9]*([_-][A-Za-z0-9]+)*", name) or (
        keyword.iskeyword(name)
    ):
        raise UserError(
            f"'{name}' cannot name a strategy. Use letters, digits, '-' and '_', such as my-loss."
        )
    if registry.is_installed(kind, name):
        raise UserError(f"There is a {kind} '{name}' already. Choose another name.")
    package = f"{PREFIX}{name.replace('_', '-').lower()}"
    folder = Path(out) if out is not None else Path(package)
    if folder.exists():
        raise UserError(f"'{folder}' exists already. Name another folder with --out.")
    module = package.replace("-", "_")
    values = {
        "kind": kind,
        "name": name,
        "package": package,
        "module": module,
        "cls": name.replace("-", "_")
        if kind == "command"
        else "".join(part[:1].upper() + part[1:] for part in re.split(r"[_-]", name)),
        "version": version("dpo-video"),
        "example": command(*(part.format(name=name) for part in _EXAMPLES[kind])),
    }
    templates = Environment(
        loader=PackageLoader("dpo_video.workflows", "new_plugin"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )
    files = {
        "pyproject.toml": "pyproject.toml",
        "README.md": "README.md",
        f"{module}.py": f"{kind}.py",
        f"tests/test_{module}.py": "test.py",
    }
    with writing(folder, "run the same command again"):
        for path, template in files.items():
            text = templates.get_template(f"{template}.j2").render(values)
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            write_text(folder / path, text)
    return folder
