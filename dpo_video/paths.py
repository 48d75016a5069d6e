"""Paths in options, and names from files that become paths."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator

from dpo_video.errors import UserError

_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
_WEIGHTS = (".safetensors", ".ckpt", ".bin", ".pt", ".pth", ".gguf")


def absolute(text: str) -> str:
    """The absolute path of a path, so that a run works from every folder; "" stays as it is."""
    return str(Path(os.path.expanduser(text)).absolute()) if text else text  # noqa: PTH111


def is_hub_id(text: str) -> bool:
    """Whether a text can be the id of a repository on the hub: not a path such as `./model`."""
    return _HUB_ID.fullmatch(text) is not None and not text.lower().endswith(_WEIGHTS)


def _source(text: str) -> str:
    if is_hub_id(text.rstrip("/")) and not os.path.exists(text):  # noqa: PTH110
        return text.rstrip("/")
    exists = os.path.exists(text)  # noqa: PTH110 - False also for what no path can be
    return absolute(text) if exists or re.search(r"[/\\~]", text) else text


def _lora(text: str) -> str:
    parts = text.rstrip("/").split("/")
    hub = len(parts) > 1 and is_hub_id("/".join(parts[:2])) and ".." not in parts
    return text.rstrip("/") if hub and not os.path.exists(text) else absolute(text)  # noqa: PTH110


LocalPath = Annotated[str, AfterValidator(absolute)]
"""Type of an option that names a file or folder; run.toml holds its absolute path."""
DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
"""The name of a LoRA that diffusers' `load_lora_weights` expects."""
PROMPT_LISTS = ("training", "evaluation")
"""Names of the package's own lists of prompts."""
PromptSource = Annotated[
    str, AfterValidator(lambda text: text if text in PROMPT_LISTS else absolute(text))
]
"""Type of an option that names a file of prompts, or one of `PROMPT_LISTS`."""
AbsolutePath = Annotated[Path, AfterValidator(lambda path: Path(absolute(str(path))))]
"""The same as a `Path`."""
ModelSource = Annotated[str, AfterValidator(_source)]
"""Type of an option that names a model: a folder or file, or else a hub id. What exists or looks
like a path is a path, and run.toml holds it as an absolute one."""

LoraSource = Annotated[str, AfterValidator(_lora)]
"""Type of an option that names a LoRA: a file or folder, or else HUB_ID or HUB_ID/FILE."""


def check_name(name: str, what: str) -> str:
    """Return a name that becomes a file or folder; it never leaves the folder that it is put in.

    Raises:
        UserError: for a name that is empty, begins with a dot, or has separators or control
            characters.
    """
    if not name or name.startswith(".") or re.search(r"[/\\:]", name) or not name.isprintable():
        raise UserError(
            f"'{name}' cannot name {what}. Use letters, digits, '.', '_' and '-', and no slash or "
            "leading dot."
        )
    return name


def is_inside(path: str) -> bool:
    """Whether a relative path from a file stays in the folder that it is relative to."""
    return bool(path) and not Path(path).is_absolute() and ".." not in re.split(r"[/\\]", path)
