"""A complete checkpoint."""

from __future__ import annotations

from typing import final

from dpo_video.extensions import MergedFormat
from dpo_video.types import ExportSpec


@final
class Merged(MergedFormat):
    """A complete checkpoint in diffusers' layout, with the adapter merged into its weights."""

    def usage(self, spec: ExportSpec) -> str:
        """The pipeline, or dpo-video."""
        return (
            f"Load it into diffusers' `{spec.pipeline}`, or in dpo-video by `--set "
            "backbone.model=FOLDER`:"
        )
