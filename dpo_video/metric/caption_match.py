"""A guard on fidelity for the embedded model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal, final

import torch
from jaxtyping import Int
from torch import Tensor

from dpo_video.errors import UserError
from dpo_video.strategies import Metric
from dpo_video.tiny import scenes
from dpo_video.tiny.judge import judge_videos
from dpo_video.types import PerPair, Videos


@final
class CaptionMatch(Metric):
    """How surely a frame of `tiny` shows the colour, the shape and the background of its caption.

    The mean over frames of the product of three probabilities, as given by a small classifier that
    is trained on the procedural world (`dpo_video.tiny.judge`). A shape that is blurred, torn or
    melted is none of the five to it, so this falls when shapes stop being themselves. It keeps some
    doubt about any shape: real clips get 0.95.
    """

    higher_is_better: ClassVar[bool] = True
    role: ClassVar[Literal["target", "motion", "guard"]] = "guard"
    unit: ClassVar[str] = "share"

    def __call__(self, videos: Videos, prompts: Sequence[str]) -> PerPair:
        """One share in [0, 1] a video; a UserError for a prompt that is no caption of `tiny`."""
        said = [_read(prompt) for prompt in prompts]
        seen = judge_videos(videos)
        certainty = (
            _of(seen.color, [list(scenes.COLORS).index(words.color) for words in said])
            + _of(seen.shape, [scenes.SHAPES.index(words.shape) for words in said])
            + _of(seen.background, [list(scenes.BACKGROUNDS).index(w.background) for w in said])
        )
        return certainty.exp().mean(dim=1)


def _read(prompt: str) -> scenes.Words:
    words = scenes.parse_caption(prompt)
    if words is None:
        example = scenes.spread_captions(1)[0]
        raise UserError(
            f"The metric caption_match reads captions of the tiny model only, such as '{example}', "
            f"and '{prompt}' is none. Leave it out by naming the metrics that you want: "
            "--metric warp_error --metric frame_difference --metric dynamic_degree."
        )
    return words


def _of(log_probabilities: Tensor, index: list[int]) -> Tensor:
    """The entries of one class per video: axes `b F k` to `b F`."""
    which: Int[Tensor, " b"] = torch.tensor(index, device=log_probabilities.device)
    frames = log_probabilities.shape[1]
    return log_probabilities.gather(2, which[:, None, None].expand(-1, frames, 1))[..., 0]
