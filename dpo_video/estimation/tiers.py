"""Cards and their presets. Torch is imported for `auto` only."""

from __future__ import annotations

from functools import cache
from typing import Any, Self, final

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from dpo_video import registry
from dpo_video.diffusion.known_models import find_model
from dpo_video.errors import PluginError, UserError, first_fault, unknown
from dpo_video.registry.entry_points import Entry
from dpo_video.registry.packaged import called, folder_of
from dpo_video.support.reading import read_toml

KIND = "tier"
"""Of the entry points' group, `dpo_video.tier`."""
AUTO = "auto"
# The reported memory varies a little with the driver and with error correction.
_SLACK = 0.03


@final
class Tier(BaseModel):
    """A card and its preset options."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    name: str
    """Name for `--tier`."""
    distribution: str
    """Package that it comes from, and its version."""
    card: str
    """The card's name."""
    memory_gib: float = Field(gt=0)
    """Memory in GiB, as torch reports it."""
    tflops: float = Field(gt=0)
    """Dense fp16 or bf16 operations per second with fp32 accumulation, in 10^12."""
    source: str
    """Where the operations per second are published."""
    options: dict[str, Any]
    """Option path to value, for every backbone: memory modes, which do not change what is learned.
    What a family trains with is its own."""
    backbone: dict[str, dict[str, Any]] = {}
    """Backbone name to further options."""
    model: dict[str, dict[str, Any]] = {}
    """Model name, as its configuration ships, to further options."""

    @model_validator(mode="after")
    def _asks_for_memory(self) -> Self:
        for path in self.options:
            if not path.startswith("memory."):
                raise ValueError(
                    f"[options] hold for every backbone and are memory modes, which '{path}' is "
                    "not; write it under [backbone.NAME]"
                )
        return self

    def preset(self, backbone: str, model: str | None = None) -> dict[str, Any]:
        """Option path to value for a backbone, and for one of its models under any of its names."""
        found = find_model(model) if model is not None else None
        own = self.model.get(found.name, {}) if found and found.backbone == backbone else {}
        return {**self.options, **self.backbone.get(backbone, {}), **own}


def tiers() -> dict[str, Tier]:
    """All tiers by name that can be read, the smallest card first."""
    found = []
    for name in registry.named(KIND):
        try:
            found.append(_read(registry.find(KIND, name)))
        except UserError:  # a plugin's fault is none of the others
            continue
    return {tier.name: tier for tier in sorted(found, key=lambda tier: (tier.tflops, tier.name))}


@cache
def _read(entry: Entry) -> Tier:
    """The tier of an entry point: the file NAME.toml of the package that it names."""
    path = folder_of(entry) / f"{entry.name}.toml"
    try:
        table = read_toml(path)
        return Tier(**{**table, "name": entry.name, "distribution": entry.distribution})
    except (OSError, ValueError, TypeError) as error:
        reason = first_fault(error) if isinstance(error, ValidationError) else str(error)
        raise PluginError(
            f"{called(entry)} cannot be read ({reason}). Correct '{path}'."
        ) from error


def find_tier(name: str) -> Tier:
    """The tier of a name; "auto" is the tier of this machine's GPU.

    Raises:
        UserError: for an unknown name, and for "auto" without a GPU or with too small a one.
        PluginError: for a name that several packages use, or a file that cannot be read.
    """
    if name == AUTO:
        return _tier_of_this_gpu()
    if not registry.is_installed(KIND, name):
        raise unknown("tier", name, [*tiers(), AUTO])
    return _read(registry.find(KIND, name))


def tier_of_card(card: str, memory_gib: float) -> Tier | None:
    """The tier of that card, or the best tier with no more memory; None if there is none."""
    held = [tier for tier in tiers().values() if tier.memory_gib <= memory_gib * (1 + _SLACK)]
    words = card.upper().replace("-", " ").split()
    for tier in held:
        if tier.name.upper() in words:
            return tier
    return max(held, key=lambda tier: (round(tier.memory_gib), tier.tflops), default=None)


def _tier_of_this_gpu() -> Tier:
    import torch

    names = ", ".join(tiers())
    if not torch.cuda.is_available():
        raise UserError(f"--tier auto needs a GPU, and this machine has none. Name one of {names}.")
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    memory = properties.total_memory / 2**30
    tier = tier_of_card(properties.name, memory)
    if tier is None:
        least = min(tiers().values(), key=lambda tier: tier.memory_gib)
        raise UserError(
            f"This GPU ({properties.name}) has {memory:.1f} GiB, less than the smallest tier, "
            f"{least.name} ({least.memory_gib:.1f}). Name a tier and lower backbone.frames, height "
            "or width until dpo-video estimate reports that it fits."
        )
    return tier
