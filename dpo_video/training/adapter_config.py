"""Read adapter_config.json without trusting it.

PEFT takes from it regular expressions, which may run for ever, and the name of a Python package to
import. Here only the description of a plain LoRA is taken; anything else is refused.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import LoraConfig

from dpo_video.settings import LARGEST_RANK
from dpo_video.support.reading import parse_json, read_bytes

_PLAIN = re.compile(r"[\w.-]+")  # names of modules; a regular expression would have other signs
_IGNORED = frozenset({
    "auto_mapping", "base_model_name_or_path", "inference_mode", "init_lora_weights",
    "lora_dropout", "megatron_core", "peft_type", "peft_version", "qalora_group_size", "revision",
    "runtime_config", "task_type",
})  # fmt: skip
"""Keys that do not matter to an adapter whose weights are loaded."""
_SWITCHES = ("fan_in_fan_out", "use_dora", "use_rslora")
_TAKEN = frozenset(
    {"r", "lora_alpha", "target_modules", "rank_pattern", "alpha_pattern", *_SWITCHES}
)


def read_lora_config(path: Path) -> LoraConfig:
    """The LoRA that a file describes.

    Raises:
        OSError: if it cannot be read.
        ValueError: if it describes something else.
    """
    config = parse_json(read_bytes(path))
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise ValueError(f"{path.name} describes no LoRA")
    if config.get("lora_bias"):  # a layer without a bias cannot merge one
        raise ValueError("its LoRA has biases, which dpo-video does not support")
    if config.get("bias", "none") != "none":
        raise ValueError("it trains biases, which dpo-video does not support")
    for key in sorted(config.keys() - _IGNORED - _TAKEN - {"bias", "lora_bias"}):
        if config[key] not in (None, False, "", [], {}):
            raise ValueError(f"its option {key} is not supported")
    if any(not isinstance(config.get(key, False), bool) for key in _SWITCHES):
        raise ValueError(f"one of {', '.join(_SWITCHES)} is neither true nor false")
    return LoraConfig(
        r=_rank(config.get("r"), "r"),
        lora_alpha=_number(config.get("lora_alpha"), "lora_alpha"),
        target_modules=_targets(config.get("target_modules")),
        rank_pattern={key: _rank(rank, key) for key, rank in _pattern(config, "rank_pattern")},
        alpha_pattern={
            key: _number(alpha, key) for key, alpha in _pattern(config, "alpha_pattern")
        },
        **{key: config.get(key, False) for key in _SWITCHES},
    )


def _targets(found: Any) -> list[str] | str:
    names = found if isinstance(found, list) else [found]
    for name in names:
        if not isinstance(name, str) or not _PLAIN.fullmatch(name):
            raise ValueError("its target_modules are no list of names of modules")
    return found


def _pattern(config: Mapping[str, Any], key: str) -> list[tuple[str, Any]]:
    found = config.get(key) or {}
    if not isinstance(found, dict) or not all(map(_PLAIN.fullmatch, found)):
        raise ValueError(f"its {key} is no table of names of modules")
    return list(found.items())


def _rank(value: Any, name: str) -> int:
    if type(value) is not int or not 0 < value <= LARGEST_RANK:
        raise ValueError(f"the rank {name} = {value!r} is none")
    return value


def _number(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{name} = {value!r} is no number")
    return value
