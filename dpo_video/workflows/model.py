"""Load a backbone's model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dpo_video.strategies import Backbone, VideoModel
from dpo_video.workflows import session
from dpo_video.workflows.options import checked, configure


@checked
def load_model(
    backbone: Backbone | str | None = None,
    *,
    config: Path | str | None = None,
    set: Mapping[str, Any] | Sequence[str] | None = None,
    device: str | None = None,
) -> VideoModel:
    """Load a video diffusion model, frozen and in evaluation mode.

    Args:
        backbone: The backbone or its name; "tiny" by default.
        config: A TOML file to start from, such as a run's run.toml.
        set: Any option by its path: {"train.mixed_precision": "bf16"}.
        device: "cuda", "cuda:N", "mps" or "cpu"; the best one by default.
    """
    options = {"backbone": backbone, "config": config, "set": set, "device": device}
    resolved = configure("train", options, kinds=("backbone",))
    return session.load_model(resolved, session.pick_device(resolved.run.device))
