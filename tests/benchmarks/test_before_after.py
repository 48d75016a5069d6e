"""The animation of an evaluation's videos."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch

from benchmarks.before_after import LINE, ZOOM, animation
from dpo_video.data.video_writer import video_bytes


def test_base_beside_tuned_above_their_changes(tmp_path: Path) -> None:
    folder = tmp_path / "evaluation" / "videos"
    folder.mkdir(parents=True)
    (folder.parent / "evaluation.json").write_text(json.dumps({"prompts": ["a", "b"]}))
    still = torch.full((3, 4, 16, 16), 0.5)
    flickering = still.clone()
    flickering[:, 2] = 0.9
    (folder / "001-base.mp4").write_bytes(video_bytes(flickering, 8))
    (folder / "001-tuned.mp4").write_bytes(video_bytes(still, 8))
    frames, milliseconds = animation(tmp_path, [1])
    assert len(frames) == 4 and milliseconds == 125
    size = 16 * ZOOM
    pixels = np.stack([np.asarray(frame) for frame in frames])[:, 2 * LINE :]
    base, tuned = pixels[:, :, :size], pixels[:, :, -size:]
    assert abs(int(base[2, :size].mean()) - 230) < 5 and abs(int(tuned[2, :size].mean()) - 128) < 5
    assert base[2, size:].mean() > 250 and tuned[2, size:].mean() < 20
    assert base[0].shape == (2 * size, size, 3) and base[0, size:].max() == 0
