"""An evaluation as JSON, as a table and on disk."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from small_evaluation import HOSTILE, a_hostile_evaluation, an_evaluation

from dpo_video.errors import UserError
from dpo_video.evaluation.results import Evaluation
from dpo_video.evaluation.verdict import MetricResult, Role, judge_evaluation


def test_json_restores_an_equal_evaluation() -> None:
    evaluation = an_evaluation(["one", HOSTILE, "three"])
    assert Evaluation.from_json(evaluation.to_json()) == evaluation


def test_json_keeps_values_that_are_not_finite() -> None:
    values = [1.0, math.nan, math.inf, 2.0]
    metric = MetricResult.measured(
        "m", values, [2.0] * 4, unit="", higher_is_better=True, role=Role.TARGET
    )
    evaluation = an_evaluation(["a", "b", "c", "d"]).model_copy(update={"metrics": (metric,)})

    def refuse(name: str) -> float:
        raise AssertionError(f"{name} is not JSON")

    json.loads(evaluation.to_json(), parse_constant=refuse)
    back = Evaluation.from_json(evaluation.to_json()).metrics[0]
    np.testing.assert_equal(back.base, values)
    assert back.difference.pairs == 2


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"name": 3}'])
def test_other_json_is_a_user_error(text: str) -> None:
    with pytest.raises(UserError, match=r"This is not an evaluation .* evaluate again"):
        Evaluation.from_json(text)


def test_lengths_must_agree() -> None:
    complete = an_evaluation(["a", "b", "c"])
    with pytest.raises(ValueError, match="3 prompts"):
        Evaluation(**{**dict(complete), "seeds": (1, 2)})


def test_the_table_states_every_change_in_words() -> None:
    evaluation = an_evaluation([f"prompt {i}" for i in range(47)])
    console = Console(width=140, file=io.StringIO(), color_system=None)
    console.print(evaluation.table())
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert evaluation.verdict.headline in text
    (line,) = (line for line in text.splitlines() if "warp error" in line)
    assert "better" in line and "lower" in line and "%" in line
    lines = text.splitlines()
    (line,) = (line for line in lines if "caption match" in line and "higher" in line)
    assert "unproven" in line
    assert "a loss of more than 3%" in " ".join(text.split())


def test_names_are_shown_literally() -> None:
    metric = MetricResult.measured(
        "[red]x[/nope]", [1, 2, 3], [2, 3, 5], unit="[b]", higher_is_better=True, role=Role.TARGET
    )
    evaluation = an_evaluation(["a", "b", "c"]).model_copy(update={"metrics": (metric,)})
    console = Console(width=140, file=io.StringIO(), color_system=None)
    console.print(evaluation.table())
    assert "[red]x[/nope]" in console.file.getvalue()  # type: ignore[attr-defined]
    assert "[red]x[/nope]" in evaluation._repr_html_()


def test_an_evaluation_is_asked_for_a_metric_by_name() -> None:
    evaluation = an_evaluation(["a", "b", "c"])
    warp = evaluation["warp_error"]
    assert warp is evaluation.metrics[0]
    low, high = warp.interval
    assert low <= warp.difference.difference <= high
    with pytest.raises(UserError, match="Did you mean 'warp_error'"):
        evaluation["warp_eror"]


def test_a_notebook_shows_a_table_without_scripts() -> None:
    html = (
        a_hostile_evaluation()
        .model_copy(update={"verdict": judge_evaluation(an_evaluation(["a", "b", "c"]).metrics)})
        ._repr_html_()
    )
    assert "warp error" in html and "<script" not in html and len(html) < 3000


def test_a_saved_evaluation_is_loaded_with_its_videos(tmp_path: Path) -> None:
    evaluation, clip = an_evaluation(["a", "b"]), b"\0mp4"
    evaluation.save(tmp_path / "one", [(clip, clip), (clip, clip)])
    loaded = Evaluation.load(tmp_path / "one")
    assert loaded.to_dict() == evaluation.to_dict()
    page = (tmp_path / "one" / "index.html").read_text()
    assert page.count("data-src") == 4
    assert loaded.page(tmp_path / "copy.html").read_text() == page
    (tmp_path / "one" / "videos" / "001-base.mp4").unlink()
    assert "data-src" not in loaded.page(tmp_path / "copy.html").read_text()
    with pytest.raises(UserError, match=r"Cannot read .*evaluation\.json"):
        Evaluation.load(tmp_path / "two")
