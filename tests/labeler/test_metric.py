"""Labels from metrics: signs, ties, and frozen videos."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Literal

import pytest
import torch
from torch import Tensor

from dpo_video.errors import UserError
from dpo_video.labeler.metric import ByMetric, Measuring, relative_lead
from dpo_video.metric.frame_difference import FrameDifference
from dpo_video.strategies import Metric
from dpo_video.testing import small_videos
from dpo_video.workflows.config import resolve

SEGMENTS = [slice(0, 3), slice(3, 6)]
PROMPTS = ["a", "b"]


class Brightness(Metric):
    """The mean pixel."""

    higher_is_better: ClassVar[bool] = True
    unit: ClassVar[str] = "0-1"

    def __call__(self, videos: Tensor, prompts: Sequence[str]) -> Tensor:
        return videos.mean(dim=(1, 2, 3, 4))


class Change(Metric):
    """Mean change between frames, as a motion metric."""

    higher_is_better: ClassVar[bool] = True
    unit: ClassVar[str] = "0-1"
    role: ClassVar[Literal["target", "motion", "guard"]] = "motion"

    def __call__(self, videos: Tensor, prompts: Sequence[str]) -> Tensor:
        return videos.diff(dim=2).abs().mean(dim=(1, 2, 3, 4))


def labeler(weights: dict[str, float], **options: object) -> Measuring:
    metrics = {"bright": Brightness(), "still": FrameDifference(), "moves": Change()}
    rule = ByMetric(weights=weights, **{"motion": "", **options})  # type: ignore[arg-type]
    made = rule.with_metrics({name: metrics[name] for name in rule.metric_names})
    assert isinstance(made, Measuring)
    return made


def flat(*brightness: float) -> Tensor:
    """One video of six frames for each, three of a brightness, then three of half of it."""
    fades = torch.tensor([1.0] * 3 + [0.5] * 3)[None, None, :, None, None]
    frames = torch.tensor(brightness)[:, None, None, None, None] * fades
    return frames.expand(-1, 3, 6, 4, 4)


def test_the_label_is_the_sign_of_the_relative_lead_beyond_the_margin() -> None:
    """0.5 against 0.4 leads by 0.1 / 0.45 = 22% in both segments; 0.40 against 0.41 by 2.5%."""
    first, second = flat(0.5, 0.40), flat(0.4, 0.41)
    assert labeler({"bright": 1}, margin=0.1)(PROMPTS, first, second, SEGMENTS).tolist() == [
        [1, 1], [0, 0]]  # fmt: skip
    assert labeler({"bright": 1}, margin=0.0)(PROMPTS, first, second, SEGMENTS).tolist() == [
        [1, 1], [-1, -1]]  # fmt: skip
    assert not labeler({"bright": 1}, margin=0.3)(PROMPTS, first, second, SEGMENTS).any()


def test_segments_are_judged_separately() -> None:
    first, second = flat(0.5), flat(0.4).clone()
    second[:, :, 3:] = 0.9
    assert labeler({"bright": 1})(["a"], first, second, SEGMENTS).tolist() == [[1, -1]]


def test_the_metrics_direction_sets_the_sign_and_weights_mix() -> None:
    steady, shaky = flat(0.4), flat(0.5) + 0.05 * torch.tensor([1.0, -1] * 3)[:, None, None]
    parts = [slice(0, 3)]
    assert labeler({"bright": 1})(["a"], shaky, steady, parts).item() == 1
    assert labeler({"still": 1})(["a"], shaky, steady, parts).item() == -1
    assert labeler({"still": 1, "bright": 1})(["a"], shaky, steady, parts).item() == -1
    assert labeler({"still": 0.01, "bright": 1})(["a"], shaky, steady, parts).item() == 1


def test_a_frozen_video_is_not_preferred_for_its_smoothness() -> None:
    moving = small_videos(1, 6, 16, 16)
    frozen = moving[:, :, :1].expand_as(moving)
    shortcut, guarded = labeler({"still": 1}), labeler({"still": 1}, motion="moves", tolerance=0.1)
    assert shortcut(["a"], frozen, moving, SEGMENTS).tolist() == [[1, 1]]
    judgement = guarded.judge(["a"], frozen, moving, SEGMENTS)
    assert judgement.labels.tolist() == [[0, 0]]
    assert judgement.notes[0].count("the preferred one moves less") == 2
    assert "still 0 : " in judgement.notes[0] and "moves 0 : " in judgement.notes[0]
    assert guarded(["a"], moving, frozen, SEGMENTS).tolist() == [[0, 0]]
    assert labeler({"moves": 1}, motion="moves")(["a"], moving, frozen, SEGMENTS).all()


@pytest.mark.parametrize(("tolerance", "label"), [(0.3, 1), (0.2, 0)])
def test_the_tolerance_is_relative_to_the_rejected_video(tolerance: float, label: int) -> None:
    """The first is smoother and moves three quarters as much."""
    steps = torch.arange(6.0)[:, None, None]
    first, second = (speed * steps.expand(1, 3, 6, 4, 4) for speed in (0.075, 0.1))
    made = labeler({"still": 1}, motion="moves", tolerance=tolerance)
    assert made(["a"], first, second, SEGMENTS).tolist() == [[label, label]]


def test_leads_are_antisymmetric_to_the_bit_and_0_for_equal_values() -> None:
    first, second = torch.tensor([0.0, 3.0, -1.0, 1e-20]), torch.tensor([0.0, 1.0, 1.0, 2e-20])
    assert torch.equal(relative_lead(first, second), -relative_lead(second, first))
    assert relative_lead(first, second)[:2].tolist() == [0, 1]


@pytest.mark.parametrize("weights", [{"bright": -1.0}, {"bright": 0.0}])
def test_weights_that_decide_nothing_are_refused(weights: dict[str, float]) -> None:
    with pytest.raises(UserError, match=r"labeler.weights must not be negative, nor all 0"):
        labeler(weights)


def test_the_motion_metric_must_measure_motion() -> None:
    with pytest.raises(UserError, match=r"labeler.motion = 'bright' does not measure motion"):
        labeler({"still": 1}, motion="bright")


# --- by name ---------------------------------------------------------------------------------


def test_metrics_are_found_by_name_and_their_options_kept() -> None:
    config = resolve(
        choices={"labeler": "metric"},
        assignments=["labeler.weights.warp_error=1", "labeler.weights.sharpness=0.5",
                     "labeler.options.warp_error.flow=videodpo_lk"],
    )  # fmt: skip
    assert isinstance(config.labeler, Measuring)
    assert list(config.labeler.metrics) == ["warp_error", "sharpness", "dynamic_degree"]
    table = config.tables["labeler"]
    assert table["name"] == "metric" and table["options"]["warp_error"] == {
        "flow": "videodpo_lk",
        "raft_weights": "",
    }
    assert table["options"]["dynamic_degree"]["share"] == 0.05


def test_a_run_toml_gives_the_same_labeler(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    once = resolve(choices={"labeler": "metric"}, assignments=["labeler.margin=0.2"])
    file.write_text(once.toml())
    again = resolve(file=file)
    assert again.labeler == once.labeler and again.tables == once.tables


@pytest.mark.parametrize(
    ("assignment", "sentence"),
    [
        ("labeler.weights.warp_eror=1", "Unknown metric 'warp_eror'. Did you mean 'warp_error'"),
        ("labeler.options.sharpness.x=1", "Unknown metric of the labeler 'sharpness'"),
        ("labeler.options.warp_error.x=1", "Unknown option 'metric.warp_error.x'"),
    ],
)
def test_an_unknown_metric_is_refused(assignment: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        resolve(choices={"labeler": "metric"}, assignments=[assignment])
