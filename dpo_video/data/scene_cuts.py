"""Find scene cuts in a short clip."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from dpo_video.types import Video

_COLOURS = 8  # bins a channel
_SIDE = 32  # pixels of the frames whose colours are counted
_LAYOUT = 16  # pixels of the frames whose layout is compared
SAME_LAYOUT = 0.6
"""Correlation of two frames' brightness above which they show one scene."""
NEW_COLOURS = 0.3
"""Share of the pixels that change their colour at a cut, by the histograms."""
SUDDEN_COLOURS = 0.15
"""The same where no other change of the clip nearby is half as large."""
VISIBLE = 0.05
"""Mean difference of the pixels, of 1, at a cut: histograms of plain pictures jump at less."""
_PLAIN = 0.01  # standard deviation of a layout that says nothing
_NEARBY = 4  # frames


def find_cuts(video: Video) -> list[int]:
    """Frames at which another scene begins.

    At a cut both the layout (the correlation of the brightness of small frames) and the colours
    (their joint histogram, which motion hardly changes) differ, from the frame before the last as
    well: a flash of one frame is no cut. Fades and dissolves are not found. Measured on splices and
    on single shots by `python -m benchmarks.scene_cuts`.
    """
    frames = video.transpose(0, 1)
    if len(frames) < 2:
        return []
    small = F.adaptive_avg_pool2d(frames, _LAYOUT).cpu()
    layout = small.mean(dim=1).flatten(1)
    layout = layout - layout.mean(dim=1, keepdim=True)
    plain = layout.std(dim=1) < _PLAIN
    layout = F.normalize(layout, dim=1)
    colours = _histograms(F.adaptive_avg_pool2d(frames, _SIDE))

    def differ(before: int, after: int, sudden: bool) -> bool:
        both_plain = bool(plain[before] and plain[after])
        same = both_plain or float(layout[before] @ layout[after]) > SAME_LAYOUT
        visible = float((small[before] - small[after]).abs().mean()) > VISIBLE
        least = SUDDEN_COLOURS if sudden else NEW_COLOURS
        return not same and visible and _distance(colours[before], colours[after]) > least

    changes = [_distance(colours[i], colours[i + 1]) for i in range(len(frames) - 1)]
    cuts = []
    for i, change in enumerate(changes):
        nearby = [*changes[max(0, i - _NEARBY) : i], *changes[i + 1 : i + 1 + _NEARBY]]
        sudden = change > 2 * max(nearby, default=1.0)
        spans = [(i, i + 1), (max(i - 1, 0), i + 1), (i, min(i + 2, len(frames) - 1))]
        if all(differ(before, after, sudden) for before, after in spans):
            cuts.append(i + 1)
    return cuts


def _histograms(frames: Float[Tensor, "F 3 y x"]) -> Float[Tensor, "F bins"]:
    """Share of the pixels of every colour."""
    bins = (frames * _COLOURS).long().clamp(0, _COLOURS - 1)
    index = ((bins[:, 0] * _COLOURS + bins[:, 1]) * _COLOURS + bins[:, 2]).flatten(1)
    counts = torch.zeros(len(frames), _COLOURS**3)
    counts.scatter_add_(1, index.cpu(), torch.ones(index.shape))
    return counts / index.shape[1]


def _distance(one: Float[Tensor, " bins"], other: Float[Tensor, " bins"]) -> float:
    """Share of the pixels that have another colour."""
    return 1 - float(torch.minimum(one, other).sum())
