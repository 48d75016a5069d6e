"""Direct Preference Optimization for text-to-video diffusion models.

The commands of `dpo-video` as functions, with the same names and options:

    import dpo_video as dv

    pairs = dv.build_pairs("local", backbone="tiny", count=24)
    run = dv.train(pairs, loss=dv.loss.Region(beta=2500), steps=40, learning_rate=3e-4)
    evaluation = dv.evaluate(run, num_prompts=12)

A strategy is given by its name or as an object: `dv.loss.Region(beta=2500)`,
`dv.strategy("loss", "region", beta=2500)`. The options of a function's own table are keywords
(`learning_rate` of [train]); `set={"memory.checkpointing": "blocks"}` sets any option. Nothing is
printed: pass `progress=` an object derived from `Progress`; `listeners=` of `train` takes
objects derived from `Listener`.

Everything is imported when it is first used; `import dpo_video` itself imports no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from dpo_video import backbone as backbone
    from dpo_video import checks as checks
    from dpo_video import format as format
    from dpo_video import labeler as labeler
    from dpo_video import listener as listener
    from dpo_video import loss as loss
    from dpo_video import metric as metric
    from dpo_video import optimizer as optimizer
    from dpo_video import pairs as pairs
    from dpo_video import reference as reference
    from dpo_video import schedule as schedule
    from dpo_video import timesteps as timesteps
    from dpo_video.extensions import Listener as Listener
    from dpo_video.registry import strategy as strategy
    from dpo_video.workflows.build import build_pairs as build_pairs
    from dpo_video.workflows.compare import compare as compare
    from dpo_video.workflows.doctor import doctor as doctor
    from dpo_video.workflows.estimate import estimate as estimate
    from dpo_video.workflows.evaluate import evaluate as evaluate
    from dpo_video.workflows.export import export as export
    from dpo_video.workflows.generate import generate as generate
    from dpo_video.workflows.label import label as label
    from dpo_video.workflows.model import load_model as load_model
    from dpo_video.workflows.pairs import check as check
    from dpo_video.workflows.pairs import export_pairs as export_pairs
    from dpo_video.workflows.pairs import pack as pack
    from dpo_video.workflows.progress import Progress as Progress
    from dpo_video.workflows.runs import Run as Run
    from dpo_video.workflows.train import train as train

_KINDS = (
    "backbone", "checks", "format", "labeler", "listener", "loss", "metric", "optimizer", "pairs",
    "reference", "schedule", "timesteps",
)  # fmt: skip
_WHERE = {
    "Listener": "extensions",
    "Progress": "workflows.progress",
    "Run": "workflows.runs",
    "build_pairs": "workflows.build",
    "check": "workflows.pairs",
    "compare": "workflows.compare",
    "doctor": "workflows.doctor",
    "estimate": "workflows.estimate",
    "evaluate": "workflows.evaluate",
    "export": "workflows.export",
    "export_pairs": "workflows.pairs",
    "generate": "workflows.generate",
    "label": "workflows.label",
    "load_model": "workflows.model",
    "pack": "workflows.pairs",
    "strategy": "registry",
    "train": "workflows.train",
}
"""Name to the module that defines it."""


def __getattr__(name: str) -> Any:
    if name in _KINDS:
        return import_module(f"dpo_video.{name}")
    if name in _WHERE:
        return getattr(import_module(f"dpo_video.{_WHERE[name]}"), name)
    raise AttributeError(f"module 'dpo_video' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted({"__version__", *_KINDS, *_WHERE})
