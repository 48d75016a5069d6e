"""What `accelerate launch` is told: each setting becomes an option of a run, or is refused.

The launcher hands its settings to the processes as environment variables
(accelerate.utils.launch). Accelerate would act on them by itself; here they are read once and
hidden from it (`hidden`). docs/launchers.md lists all of them, and tests/workflows/test_launcher.py
has a test of every row.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from dpo_video.errors import UserError
from dpo_video.settings import MemorySettings
from dpo_video.support.reading import parse_json, read_bytes
from dpo_video.workflows.config import Config
from dpo_video.workflows.distributed import process_count

Offload = Literal["checkpoints", "blocks", "optimizer"]

_DYNAMO = "ACCELERATE_DYNAMO_"
_ZERO = "ACCELERATE_DEEPSPEED_"
_MESH = "PARALLELISM_CONFIG_"
_SETTINGS = (
    "ACCELERATE_USE_", "ACCELERATE_MIXED_PRECISION", "ACCELERATE_GRADIENT_", "ACCELERATE_FP8_",
    "ACCELERATE_CONFIG_DS_FIELDS", _DYNAMO, _ZERO, _MESH, "FSDP_", "MEGATRON_LM_",
)  # fmt: skip
# Of a DeepSpeed configuration: what is read here, and what only says how DeepSpeed itself works.
_FILE_READ = frozenset({
    "zero_optimization", "gradient_accumulation_steps", "gradient_clipping", "bf16", "fp16",
    "train_micro_batch_size_per_gpu",
})  # fmt: skip
_FILE_IGNORED = frozenset({
    "steps_per_print", "wall_clock_breakdown", "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
})  # fmt: skip


@dataclass(kw_only=True)
class LauncherRequest:
    """A launcher's settings as options of a run."""

    options: dict[str, Any] = field(default_factory=dict)
    """Options by path; a recipe, a tier, a file and flags override them."""
    shard: int = 1
    """memory.shard."""
    offload: tuple[Offload, ...] = ()
    """Added to memory.offload."""
    checkpointing: bool = False
    """Whether all blocks are checkpointed, unless memory.checkpointing says otherwise."""
    compile: bool = False
    """Whether blocks are compiled."""
    remarks: list[str] = field(default_factory=list)
    """What a user should know about settings that change nothing, a sentence each."""

    @property
    def memory(self) -> dict[str, Any]:
        """The memory modes that it asks for, by path."""
        asked = {
            "shard": self.shard if self.shard > 1 else None,
            "checkpointing": "blocks" if self.checkpointing else None,
            "offload": ",".join(self.offload) or None,
            "compile": "on" if self.compile else None,
        }
        return {f"memory.{name}": value for name, value in asked.items() if value is not None}


@contextmanager
def hidden() -> Iterator[None]:
    """Inside, the launcher's settings are not in the environment."""
    taken = {name: os.environ.pop(name) for name in list(os.environ) if name.startswith(_SETTINGS)}
    try:
        yield
    finally:
        for name in list(os.environ):  # Accelerate may have set some
            if name.startswith(_SETTINGS):
                del os.environ[name]
        os.environ.update(taken)


def launcher_request() -> LauncherRequest:
    """Read the launcher's settings.

    Raises:
        UserError: for a setting that nothing here corresponds to; it says what to do instead.
    """
    given = {name: value for name, value in os.environ.items() if name.startswith(_SETTINGS)}
    for name, meaning in _ENGINES.items():
        if _on(given, f"ACCELERATE_USE_{name}"):
            raise _refused(meaning, "Leave it out of the launcher's flags and configuration.")
    request = LauncherRequest()
    if _on(given, "ACCELERATE_USE_CPU"):
        request.options["run.device"] = "cpu"
    _set_precision(request, given.get("ACCELERATE_MIXED_PRECISION", "no"))
    for name, path, kind in (
        ("ACCUMULATION_STEPS", "train.gradient_accumulation_steps", int),
        ("CLIPPING", "train.max_grad_norm", float),
    ):
        _set_number(request, path, given.get(f"ACCELERATE_GRADIENT_{name}"), kind)
    _read_dynamo(request, given)
    if _on(given, "ACCELERATE_USE_FSDP"):
        _read_fsdp(request, given)
    if _on(given, "ACCELERATE_USE_PARALLELISM_CONFIG"):
        _read_mesh(request, given)
    if _on(given, "ACCELERATE_USE_DEEPSPEED"):
        _read_deepspeed(request, given)
    return request


_ENGINES = {
    "MEGATRON_LM": "Megatron-LM (--use_megatron_lm)",
    "SAGEMAKER": "Accelerate's SageMaker environment",
}


def _on(given: Mapping[str, str], name: str) -> bool:
    return given.get(name, "").lower() in ("true", "1", "yes", "on")


def _refused(what: str, instead: str) -> UserError:
    return UserError(f"{what} is not supported. {instead}")


def _set_precision(request: LauncherRequest, precision: str) -> None:
    if precision == "fp8":
        raise _refused(
            "The launcher's mixed_precision=fp8",
            "Launch with --mixed_precision bf16; memory.quantization=int8 stores the frozen "
            "weights in 8 bits.",
        )
    if precision != "no":
        request.options["train.mixed_precision"] = precision


def _set_number(request: LauncherRequest, path: str, value: Any, kind: type[int | float]) -> None:
    """Take over a number; "auto" and "none" are none."""
    if value is None or str(value).lower() in ("auto", "none"):
        return
    try:
        request.options[path] = kind(value)
    except (TypeError, ValueError) as error:
        raise UserError(
            f"The launcher's value {value!r} for {path} is not a number. Correct it, or write auto."
        ) from error


def _read_dynamo(request: LauncherRequest, given: Mapping[str, str]) -> None:
    backend = given.get(f"{_DYNAMO}BACKEND", "no").lower()
    if backend == "no":
        return
    if backend != "inductor":
        raise _refused(
            f"The launcher's dynamo_backend={backend}",
            "Launch with --dynamo_backend inductor, which sets memory.compile=on, or no.",
        )
    if given.get(f"{_DYNAMO}MODE", "default") != "default" or _on(given, f"{_DYNAMO}USE_DYNAMIC"):
        raise _refused(
            "The launcher's dynamo_mode or dynamo_use_dynamic",
            "Leave both out: blocks are compiled for their shapes (memory.compile=on).",
        )
    request.compile = True


def _read_fsdp(request: LauncherRequest, given: Mapping[str, str]) -> None:
    if given.get("FSDP_VERSION", "1") != "2":
        raise _refused(
            "FSDP version 1",
            "Launch with --fsdp_version 2 (in a configuration file: fsdp_version: 2).",
        )
    for name, accepted, instead in _FSDP:
        value = given.get(name, "").lower()
        if value not in ("", *accepted):
            raise _refused(f"The launcher's {name.lower()}={value}", instead)
    request.shard = process_count()
    if _on(given, "FSDP_OFFLOAD_PARAMS"):
        request.offload += ("blocks",)
    request.checkpointing = _on(given, "FSDP_ACTIVATION_CHECKPOINTING")
    if _on(given, "FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD"):
        request.offload += ("checkpoints",)


_FSDP: tuple[tuple[str, tuple[str, ...], str], ...] = (
    (
        "FSDP_RESHARD_AFTER_FORWARD",
        ("true", "full_shard"),
        "Set it to true: false keeps the whole network on every device. To share the weights by "
        "fewer processes than there are, set memory.shard.",
    ),
    (
        "FSDP_SHARDING_STRATEGY",
        ("full_shard", "1"),
        "It belongs to version 1. Leave it out; memory.shard=N shares the weights by N processes.",
    ),
    (
        "FSDP_AUTO_WRAP_POLICY",
        ("transformer_based_wrap", "no_wrap"),
        "Leave it out: every block of the network is a group.",
    ),
    ("FSDP_TRANSFORMER_CLS_TO_WRAP", (), "Leave it out: every block of the network is a group."),
    ("FSDP_IGNORED_MODULES", (), "Leave it out: everything frozen is sharded."),
    ("FSDP_FORWARD_PREFETCH", ("false",), "Leave it out: version 2 prefetches by itself."),
)
"""Variable, values that are accepted, and what to do about others."""


def _read_mesh(request: LauncherRequest, given: Mapping[str, str]) -> None:
    for name, method in (("TP", "tensor"), ("CP", "context"), ("SP", "sequence")):
        if given.get(f"{_MESH}{name}_SIZE", "1") not in ("", "1"):
            raise _refused(
                f"The launcher's {method} parallelism ({name.lower()}_size)",
                f"Set parallelism_config_{name.lower()}_size to 1; memory.shard and "
                "memory.checkpointing lower what a process needs.",
            )
    replicas, shard = (
        int(given.get(f"{_MESH}DP_{name}_SIZE") or 1) for name in ("REPLICATE", "SHARD")
    )
    if replicas * shard != process_count():
        raise UserError(
            f"parallelism_config_dp_replicate_size={replicas} times dp_shard_size={shard} is not "
            f"the number of processes, {process_count()}. Correct one of the two."
        )
    request.shard = shard


def as_launched(config: Config, request: LauncherRequest) -> Config:
    """Apply a launcher's memory modes, which run.toml does not record: another launch has others.

    Raises:
        UserError: if they do not fit the configuration or the number of processes.
    """
    memory, world = config.memory, process_count()
    changes: dict[str, Any] = {"offload": list(dict.fromkeys((*memory.offload, *request.offload)))}
    if request.shard > 1 and (memory.shard == 1 or world % memory.shard):
        changes["shard"] = request.shard
    if request.checkpointing and memory.checkpointing == "none":
        changes["checkpointing"] = "blocks"
    if request.compile:
        changes["compile"] = "on"
    try:
        memory = MemorySettings.model_validate({**memory.model_dump(), **changes})
    except ValidationError as error:
        reason = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise UserError(
            f"The launcher asks for {_listed(request.memory)}, and memory.{reason}. Change one of "
            "the two."
        ) from error
    if world % memory.shard:
        raise UserError(
            f"memory.shard={memory.shard} does not divide this run's number of processes, {world}. "
            f"Set it to {world} or a divisor, or start that many processes: torchrun "
            f"--nproc_per_node {memory.shard} -m dpo_video train ..."
        )
    if memory.shard > 1 and config.pairs is not None:
        raise UserError(
            "With memory.shard no process holds a complete model, so pairs cannot be built during "
            "training. Build them first (dpo-video build, with memory.offload=blocks if the model "
            "is too large), then train with --pairs FOLDER/."
        )
    return replace(config, memory=memory)


def notes_on(config: Config, request: LauncherRequest, *, memory: bool = True) -> list[str]:
    """What was taken over from the launcher, and what was not, in sentences.

    Args:
        config: The configuration, which holds what was taken over.
        request: The launcher's settings.
        memory: Whether the memory modes concern this command.
    """
    asked = request.options | (request.memory if memory else {})
    now: dict[str, Any] = {}
    for path in asked:
        table, option = path.split(".")
        now[path] = getattr(getattr(config, table), option)
    if set(request.offload) <= set(config.memory.offload):  # beside the run's own
        now["memory.offload"] = asked.get("memory.offload")
    taken = {path: value for path, value in asked.items() if now[path] == value}
    notes = [f"Set by the launcher: {_listed(taken)}."] if taken else []
    return (
        notes
        + [
            f"The launcher's {path}={value} is not used: this run has {path}={now[path]}."
            for path, value in asked.items()
            if path not in taken
        ]
        + request.remarks
    )


def _listed(options: Mapping[str, Any]) -> str:
    return ", ".join(f"{path}={value}" for path, value in options.items())


def refuse_launcher(name: str) -> None:
    """Raise a UserError if a launcher started several processes or set something."""
    request = launcher_request()
    asked = request.options | request.memory
    if process_count() > 1:
        asked["processes"] = process_count()
    if asked:
        raise UserError(
            f"dpo-video {name} takes no settings from a launcher ({_listed(asked)}). Start it "
            "without one, and set options of its own."
        )


# --- DeepSpeed -----------------------------------------------------------------------------------


def _read_deepspeed(request: LauncherRequest, given: Mapping[str, str]) -> None:
    if f"{_ZERO}MOE_LAYER_CLS_NAMES" in given:
        raise _refused("The launcher's deepspeed_moe_layer_cls_names", "Leave it out.")
    file = given.get(f"{_ZERO}CONFIG_FILE", "none")
    if file == "none":
        zero: Mapping[str, Any] = {
            "stage": given.get(f"{_ZERO}ZERO_STAGE", "2"),  # Accelerate's default
            **{
                f"offload_{part}": {"device": given.get(f"{_ZERO}OFFLOAD_{part.upper()}_DEVICE")}
                for part in ("param", "optimizer")
            },
        }
    else:
        zero = _read_deepspeed_file(request, Path(file))
    stage = str(zero.get("stage", 0))
    if stage not in ("0", "1", "2", "3"):
        raise _refused(f"DeepSpeed's ZeRO stage {stage}", "The stages are 0 to 3.")
    if stage in ("1", "2"):
        request.remarks.append(
            f"DeepSpeed's ZeRO stage {stage} partitions the optimizer's state. Here each process "
            "keeps the adapter's, which is small, with the same result. --zero_stage 3 shards the "
            "frozen weights."
        )
    if stage == "3":
        request.shard = process_count()
    for part, kept in (("param", "blocks"), ("optimizer", "optimizer")):
        device = str((zero.get(f"offload_{part}") or {}).get("device") or "none").lower()
        if device not in ("none", "cpu"):
            raise _refused(
                f"DeepSpeed's offload_{part} to {device}",
                "Offload to cpu: the frozen weights and AdamW's state are kept in CPU memory.",
            )
        if device == "cpu":
            request.offload += (kept,)  # type: ignore[operator]


def _read_deepspeed_file(request: LauncherRequest, file: Path) -> Mapping[str, Any]:
    """Take over DeepSpeed's file; returns its zero_optimization."""
    try:
        found: dict[str, Any] = parse_json(read_bytes(file))
        zero: Mapping[str, Any] = dict(found.get("zero_optimization", {}))
        parts = [zero.get(f"offload_{part}") or {} for part in ("param", "optimizer")]
        enabled = [kind for kind in ("bf16", "fp16") if found.get(kind, {}).get("enabled") is True]
        if not all(isinstance(part, dict) for part in parts):
            raise ValueError("an offload entry is not a table")
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(
            f"DeepSpeed's '{file}' cannot be read ({error}). Correct it, or launch without it and "
            "set memory.shard and memory.offload."
        ) from error
    unknown = [
        name
        for name, value in found.items()
        if name not in _FILE_READ | _FILE_IGNORED and value != "auto"
    ]
    if unknown:
        raise _refused(
            f"'{unknown[0]}' in DeepSpeed's '{file}'",
            "Remove it there: the optimizer and the batch are set in [train] (`dpo-video show "
            "train`).",
        )
    for precision in enabled:
        _set_precision(request, precision)
    for name, path, kind in (
        ("gradient_accumulation_steps", "train.gradient_accumulation_steps", int),
        ("gradient_clipping", "train.max_grad_norm", float),
        ("train_micro_batch_size_per_gpu", "train.batch_size", int),
    ):
        _set_number(request, path, found.get(name), kind)
    return zero
