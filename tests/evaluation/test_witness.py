"""The second measurement of a metric: where it is shown, and when it disagrees."""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from conftest import load_small
from rich.console import Console
from small_evaluation import an_evaluation, with_witness

from dpo_video.evaluation.adapter import put_on
from dpo_video.evaluation.change import Witness
from dpo_video.evaluation.evaluate import measure, sample_videos
from dpo_video.evaluation.measuring import Measurement
from dpo_video.evaluation.results import Evaluation
from dpo_video.evaluation.verdict import MetricResult, Role, judge_evaluation
from dpo_video.metric.dynamic_degree import DynamicDegree
from dpo_video.metric.frame_difference import FrameDifference
from dpo_video.metric.warp_error import WarpError
from dpo_video.settings import EvaluateSettings, TrainSettings
from dpo_video.strategies import Metric
from dpo_video.training.lora import adapt
from dpo_video.types import PerPair, Prompt, Videos

PROMPTS = [f"prompt {i}" for i in range(24)]


def judged(factor: float) -> Evaluation:
    """An evaluation whose witness of the warping error reads `factor` times the first flow."""
    evaluation = an_evaluation(PROMPTS)
    metrics = (with_witness(evaluation.metrics[0], factor), *evaluation.metrics[1:])
    verdict = judge_evaluation(metrics)
    return evaluation.model_copy(update={"metrics": metrics, "verdict": verdict})


def changed(*values: float) -> MetricResult:
    base = [10.0] * len(values)
    tuned = [10 + value for value in values]
    return MetricResult.measured(
        "m", base, tuned, unit="", higher_is_better=False, role=Role.TARGET
    )


FALLS, FALLS_MORE, RISES = (-1, -1.1, -0.9), (-3, -3.1, -2.9), (1, 1.1, 0.9)
UNCLEAR, UNCLEAR_RISES = (-3, 1.5, 0.5), (3, -1.5, -0.5)


@pytest.mark.parametrize(
    ("first", "second", "reasons"),
    [
        (FALLS, (-1, -1.2, -0.9), ""),
        (UNCLEAR, (-3, 1, 0.5), ""),
        ((-0.05, -0.055, -0.045), (-0.05, -0.2, 0.05), ""),  # half a per cent, on both
        (FALLS, FALLS_MORE, "the intervals do not overlap."),
        (FALLS, (-1, -4, 1), "its interval includes zero."),
        ((-1, -4, 1), FALLS, "its interval excludes zero."),
        (FALLS, RISES, "it rose instead of falling and the intervals do not overlap."),
        (UNCLEAR_RISES, UNCLEAR, ""),
        (FALLS, UNCLEAR_RISES, "it rose instead of falling and its interval includes zero."),
    ],
)
def test_disagreement_is_one_sentence(
    first: tuple[float, ...], second: tuple[float, ...], reasons: str
) -> None:
    other = changed(*second)
    witness = Witness.measured("DIS", other.base, other.tuned)
    result = changed(*first).model_copy(update={"witness": witness})
    if not reasons:
        assert result.disagreement == ""
        return
    size = f"{witness.change_text}, 95% interval {witness.interval_text}"
    assert result.disagreement == f"DIS disagrees on m ({size}): {reasons}"


def test_scales_may_differ() -> None:
    result = changed(-1, -1.1, -0.9)
    tenfold = Witness.measured(
        "DIS", [10 * value for value in result.base], [10 * value for value in result.tuned]
    )
    assert result.model_copy(update={"witness": tenfold}).disagreement == ""


@pytest.mark.parametrize("factor", [1.02, 1.6])
def test_every_rendering_shows_the_witness_and_a_disagreement(factor: float) -> None:
    evaluation = judged(factor)
    warp = evaluation["warp_error"]
    assert warp.witness is not None
    assert bool(warp.disagreement) == (factor == 1.6)
    assert warp.witness.text == f"by DIS: {warp.witness.change_text} ({warp.witness.interval_text})"
    first_only = tuple(m.model_copy(update={"witness": None}) for m in evaluation.metrics)
    assert evaluation.verdict.outcome is judge_evaluation(first_only).outcome
    assert (warp.disagreement in evaluation.verdict.details) == (factor == 1.6)

    html = evaluation.html()
    assert f"<small>{warp.witness.text}</small>" in html
    for sentence in ("DIS disagrees on warp error (", f"DIS disagrees: {warp.conflict}."):
        assert html.count(sentence) == (factor == 1.6)
    console = Console(width=80, file=io.StringIO(), color_system=None)
    console.print(evaluation.table())
    for text in (console.file.getvalue(), evaluation._repr_html_()):  # type: ignore[attr-defined]
        assert "by DIS" in text and warp.witness.interval_text in text
        assert ("disagrees" in text) == (factor == 1.6)


def test_a_result_keeps_its_witness_on_disk(tmp_path: Path) -> None:
    evaluation = judged(1.6)
    evaluation.save(tmp_path)
    loaded = Evaluation.load(tmp_path)
    assert loaded == evaluation and loaded["warp_error"].witness is not None
    short = Witness.measured("DIS", [1.0, 2.0], [2.0, 3.0])
    metrics = (evaluation.metrics[0].model_copy(update={"witness": short}),)
    with pytest.raises(ValueError, match="24 prompts"):
        Evaluation(**{**dict(evaluation), "metrics": metrics})


TWO = [Prompt(text=text, seed=0) for text in ("a", "b")]


@pytest.fixture(scope="module")
def adapter(small_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    adapt(load_small(small_folder), TrainSettings(rank=2), 0).save_pretrained(folder)
    return folder


def measured(small_folder: Path, adapter: Path, **metrics: Metric) -> Measurement:
    settings = EvaluateSettings(num_inference_steps=1)
    return measure(
        load_small(small_folder),
        adapter,
        metrics,
        TWO,
        settings,
        adapter.with_name(f"measured-{'-'.join(metrics)}"),
    )


def test_an_evaluation_measures_flow_metrics_with_a_second_flow(
    small_folder: Path, adapter: Path
) -> None:
    found = measured(
        small_folder,
        adapter,
        warp_error=WarpError(),
        dynamic_degree=DynamicDegree(flow="dis"),
        frame_difference=FrameDifference(),
    )
    warp, motion, difference = found.metrics
    assert warp.witness is not None and warp.witness.name == "DIS"
    model, settings = load_small(small_folder), EvaluateSettings(num_inference_steps=1)
    for denoiser, values in (
        (lambda: model.denoiser, warp.witness.base),
        (lambda: put_on(model, adapter), warp.witness.tuned),
    ):
        videos = torch.cat(list(sample_videos(model, denoiser(), TWO, settings)))
        expected = WarpError(flow="dis")(videos, ["a", "b"])
        torch.testing.assert_close(torch.tensor(values), expected, rtol=1e-5, atol=0)
    assert motion.witness is not None and motion.witness.name == "Lucas-Kanade"
    assert difference.witness is None and difference.no_witness == ""


def test_without_opencv_the_page_says_what_is_missing(
    small_folder: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "cv2", None)
    found = measured(small_folder, adapter, warp_error=WarpError(), dynamic_degree=DynamicDegree())
    assert all(metric.witness is None for metric in found.metrics)
    verdict = judge_evaluation(found.metrics)
    (told,) = (text for text in verdict.details if "OpenCV" in text)
    assert told.startswith("Warp error and dynamic degree were not measured a second time. The op")
    evaluation = an_evaluation(["a", "b"]).model_copy(
        update={"metrics": found.metrics, "verdict": verdict}
    )
    assert evaluation.html().count("<small>not measured a second time</small>") == 2


class Witnessed(Metric):
    """A metric whose witness is not finite."""

    higher_is_better: ClassVar[bool] = False
    unit: ClassVar[str] = "x"
    value: float = 1.0

    def witness(self) -> tuple[str, Metric]:
        return "a second method", self.model_copy(update={"value": float("nan")})

    def __call__(self, videos: Videos, prompts: Sequence[str]) -> PerPair:
        return torch.full((len(videos),), self.value)


def test_a_witness_that_is_not_finite_is_left_out(small_folder: Path, adapter: Path) -> None:
    (result,) = measured(small_folder, adapter, ours=Witnessed()).metrics
    assert result.witness is None
    assert result.no_witness == "A value by a second method is not finite."
