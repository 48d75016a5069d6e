"""Everything that a plugin imports, under one name.

    from dpo_video.plugin import Loss, LossOutput, PairErrors, clip_loss

The names below and what they mean stay as they are within an API version; new ones may be added.
Modules below `dpo_video` that are not re-exported here may change at any time.
"""

from __future__ import annotations

from pydantic import Field

from dpo_video.errors import PluginError, UserError
from dpo_video.extensions import (
    AdapterFormat,
    ExportedAdapter,
    Finding,
    Findings,
    Level,
    Listener,
    ListenerFactory,
    Optimizer,
    PairCheck,
    PairSet,
    PairSummary,
    Schedule,
    TimestepSampler,
    TrainingRun,
)
from dpo_video.loss.functional import (
    chosen_error,
    clip_loss,
    masked_mean,
    sigmoid_loss,
    with_sft,
)
from dpo_video.settings import TrainSettings
from dpo_video.strategies import (
    Backbone,
    Labeler,
    LabelerFactory,
    LabelResult,
    LabelTask,
    Loss,
    Metric,
    PairBuilder,
    ReasonedLabeler,
    Reference,
    ReferenceModel,
    Sampling,
    StoreLabeler,
    SuppliedPairs,
    VideoModel,
)
from dpo_video.support.report import StepEvent, StepReport
from dpo_video.types import (
    Clip,
    Context,
    ExportSpec,
    GroupErrors,
    Latents,
    LossOutput,
    Pair,
    PairErrors,
    PairSource,
    PerPair,
    Placement,
    Preference,
    Prompt,
    Region,
    Video,
    Videos,
    VideoShape,
)

API = 1
"""Version of this interface: increased when a name is removed or means something else."""


def require_api(version: int) -> None:
    """Refuse to be loaded by a dpo-video with another interface; call it in a plugin's module.

    Raises:
        PluginError: if `API` is not `version`.
    """
    if version != API:
        older = "an older" if version > API else "a newer"
        raise PluginError(
            f"it was written for version {version} of the plugin API, and {older} one, {API}, is "
            "installed"
        )


__all__ = [
    "API",
    "AdapterFormat",
    "Backbone",
    "Clip",
    "Context",
    "ExportSpec",
    "ExportedAdapter",
    "Field",
    "Finding",
    "Findings",
    "GroupErrors",
    "LabelResult",
    "LabelTask",
    "Labeler",
    "LabelerFactory",
    "Latents",
    "Level",
    "Listener",
    "ListenerFactory",
    "Loss",
    "LossOutput",
    "Metric",
    "Optimizer",
    "Pair",
    "PairBuilder",
    "PairCheck",
    "PairErrors",
    "PairSet",
    "PairSource",
    "PairSummary",
    "PerPair",
    "Placement",
    "PluginError",
    "Preference",
    "Prompt",
    "ReasonedLabeler",
    "Reference",
    "ReferenceModel",
    "Region",
    "Sampling",
    "Schedule",
    "StepEvent",
    "StepReport",
    "StoreLabeler",
    "SuppliedPairs",
    "TimestepSampler",
    "TrainSettings",
    "TrainingRun",
    "UserError",
    "Video",
    "VideoModel",
    "VideoShape",
    "Videos",
    "chosen_error",
    "clip_loss",
    "masked_mean",
    "require_api",
    "sigmoid_loss",
    "with_sft",
]
