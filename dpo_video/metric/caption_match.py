"""Fidelity guard for the embedded model `tiny`."""

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
    """Caption match for `tiny`: probability of the caption's colour, shape and background.

    The mean over frames of the product of three probabilities, given by a small classifier trained
    on the procedural world (`dpo_video.tiny.judge`). It has a class for blurred, torn and melted
    shapes, so the value falls when shapes deform. Rendered clips score 0.95.
    """

    higher_is_better: ClassVar[bool] = True
    role: ClassVar[Literal["target", "motion", "guard"]] = "guard"
    unit: ClassVar[str] = "share"

    def __call__(self, videos: Videos, prompts: Sequence[str]) -> PerPair:
        """One probability per video; UserError for a prompt that is not a caption of `tiny`."""
        captions = [_parse(prompt) for prompt in prompts]
        scores = judge_videos(videos)
        log_probability = (
            _select(scores.color, [list(scenes.COLORS).index(words.color) for words in captions])
            + _select(scores.shape, [scenes.SHAPES.index(words.shape) for words in captions])
            + _select(
                scores.background,
                [list(scenes.BACKGROUNDS).index(words.background) for words in captions],
            )
        )
        return log_probability.exp().mean(dim=1)


def _parse(prompt: str) -> scenes.Words:
    words = scenes.parse_caption(prompt)
    if words is None:
        example = scenes.spread_captions(1)[0]
        raise UserError(
            "The metric caption_match needs captions of the tiny model, such as "
            f"'{example}', and got '{prompt}'. Name the metrics to use instead: "
            "--metric warp_error --metric frame_difference --metric dynamic_degree."
        )
    return words


def _select(log_probabilities: Tensor, index: list[int]) -> Tensor:
    """Log-probability of one class per video: axes `b F k` to `b F`."""
    classes: Int[Tensor, " b"] = torch.tensor(index, device=log_probabilities.device)
    frames = log_probabilities.shape[1]
    return log_probabilities.gather(2, classes[:, None, None].expand(-1, frames, 1))[..., 0]
