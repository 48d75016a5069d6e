"""What generating and exporting return."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from pathlib import Path

from dpo_video.data.video_writer import video_bytes
from dpo_video.exporting.export import Check
from dpo_video.types import Video


@dataclass(frozen=True, kw_only=True)
class GeneratedVideo:
    """A video and what it was drawn from."""

    prompt: str
    seed: int
    fps: float
    video: Video | None
    """Pixels in [0, 1], on the CPU; None if it is one of a folder, which may hold very many."""
    path: Path | None
    """The file that it was written to."""
    existed: bool = False
    """Whether an earlier call has drawn it."""

    def _repr_html_(self) -> str:
        if self.video is not None:
            content = video_bytes(self.video, self.fps)
        else:
            content = self.path.read_bytes() if self.path else b""
        data = base64.b64encode(content).decode()
        return f'<video autoplay loop muted controls src="data:video/mp4;base64,{data}"></video>'


@dataclass(frozen=True, kw_only=True)
class ExportResult:
    """An export that was loaded back and compared with the run."""

    folder: Path
    format: str
    check: Check

    @property
    def card(self) -> Path:
        """The model card, which says how to load the export."""
        return self.folder / "README.md"
