"""Ratios within a run, and regressions between runs."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.bench import bench
from benchmarks.render import RESULTS, rendered
from benchmarks.support.plots import Panel, Spot, peaks, scatter
from benchmarks.support.results import (
    Candidate,
    Group,
    SuiteResult,
    collect,
    compared,
    markdown,
    read_results,
    regressions,
    unmatched,
    write_result,
)
from dpo_video.errors import UserError

SVG = "{http://www.w3.org/2000/svg}"


def result(
    ours: list[float], theirs: list[float], suite: str = "metric", group: str = "flow"
) -> SuiteResult:
    return SuiteResult(
        suite=suite, machine="2 cores", device="cpu", threads=1, clock="wall",
        versions={"torch": "2"}, commit="abc", quick=False,
        groups=(
            Group(
                name=group, unit="pair", baseline="theirs",
                candidates=(
                    Candidate(name="ours", seconds=tuple(ours), flops=3e9),
                    Candidate(name="theirs", seconds=tuple(theirs), flops=1e9),
                ),
            ),
        ),
    )  # fmt: skip


def timing(candidate: str, seconds: float, work: float = 1.0, **more: Any) -> dict[str, Any]:
    about = {
        "suite": "metric", "group": "flow", "candidate": candidate, "unit": "pair",
        "baseline": "theirs", "work": work, "flops": None, "figures": {}, **more,
    }  # fmt: skip
    return {"extra_info": about, "stats": {"data": [seconds]}}


def report(*timings: dict[str, Any]) -> dict[str, Any]:
    common = {
        "machine": "2 cores", "device": "cpu", "threads": 1, "clock": "wall", "versions": {},
        "quick": False, "missing": {"metric/flow": {"absent": "it is not installed"}},
    }  # fmt: skip
    commit = {"id": "0123456789abcdef", "dirty": True}
    return {"benchmarks": list(timings), "commit_info": commit, "dpo_video": common}


def test_rounds_are_combined_per_unit_of_work() -> None:
    found = collect(
        report(
            timing("ours", 6.0, work=3), timing("theirs", 1.0),
            timing("ours", 9.0, work=3), timing("theirs", 2.0),
        )
    )  # fmt: skip
    (group,) = found["metric"].groups
    assert [(each.name, each.seconds) for each in group.candidates] == [
        ("ours", (2.0, 3.0)), ("theirs", (1.0, 2.0)),
    ]  # fmt: skip
    assert group.relative("ours") == (2.0 + 1.5) / 2
    assert group.missing == {"absent": "it is not installed"}
    assert found["metric"].commit == "012345678+"


@given(
    rounds=st.lists(st.tuples(st.floats(0.1, 10), st.floats(0.1, 10)), min_size=1, max_size=9),
    load=st.lists(st.floats(1, 100), min_size=9, max_size=9),
)
def test_load_on_the_machine_changes_no_ratio(
    rounds: list[tuple[float, float]], load: list[float]
) -> None:
    calm = result([a for a, _ in rounds], [b for _, b in rounds])
    busy = result(
        [a * n for (a, _), n in zip(rounds, load, strict=False)],
        [b * n for (_, b), n in zip(rounds, load, strict=False)],
    )
    assert calm.groups[0].relative("ours") == pytest.approx(busy.groups[0].relative("ours"))
    assert regressions({"metric": calm}, {"metric": busy}, 1e-6) == []


@given(ratio=st.floats(0.5, 2), tolerance=st.floats(0, 0.5))
def test_a_regression_is_a_ratio_that_rose_beyond_the_tolerance(
    ratio: float, tolerance: float
) -> None:
    old, new = {"metric": result([1.0], [1.0])}, {"metric": result([ratio], [1.0])}
    found = regressions(old, new, tolerance)
    assert bool(found) == (ratio > 1 + tolerance)
    assert all(each.candidate == "ours" for each in found)


def test_a_candidate_of_one_side_is_not_compared() -> None:
    old = {"metric": result([1.0], [1.0])}
    for other in (
        {"store": result([9.0], [1.0], suite="store")},
        {"metric": result([9.0], [1.0], group="another")},
    ):
        assert regressions(old, other, 0.1) == []
        assert compared(old, other) == 0


def test_a_table_by_hand() -> None:
    text = re.sub(" +", " ", markdown(result([0.2, 0.4, 0.3], [0.1, 0.1, 0.1])))
    # 0.3 s per pair, quartiles 0.25 and 0.35; three times the time for three times the operations.
    assert "| ours | 300 | 33% | 3.33 | 3 | 3 | 100% |" in text
    assert "| **theirs** (baseline) | 100 | 0% | 10 | 1 | 1 | 100% |" in text


@given(st.lists(st.tuples(st.floats(0.01, 100), st.floats(0, 1000)), min_size=2, max_size=12))
def test_labels_in_a_picture_do_not_overlap(found: list[tuple[float, float]]) -> None:
    group = Group(
        name="group", unit="pair", baseline="0",
        candidates=tuple(
            Candidate(name=str(index), seconds=(time,), figures={"MiB": 1 + size})
            for index, (time, size) in enumerate(found)
        ),
    )  # fmt: skip
    picture = scatter(group)
    assert picture is not None
    assert picture.count('<circle class="mark') == len(found)
    names = re.findall(r'<text class="name" x="456.0" y="([-\d.]+)">(\d+)</text>', picture)
    assert sorted(int(name) for _, name in names) == list(range(len(found)))
    lines = sorted(float(line) for line, _ in names)
    assert all(b - a > 16.9 for a, b in pairwise(lines))
    assert lines[0] > 0 and lines[-1] < 400


def test_no_picture_without_figures_or_without_the_yardstick() -> None:
    (group,) = result([1.0], [1.0]).groups
    assert scatter(group) is None
    complete = [each.model_copy(update={"figures": {"px": 1.0}}) for each in group.candidates]
    assert scatter(group.model_copy(update={"candidates": tuple(complete)})) is not None
    assert scatter(group.model_copy(update={"candidates": tuple(complete[:1])})) is None


def test_results_survive_writing_and_reading(tmp_path: Path) -> None:
    one, other = result([1.0], [2.0]), result([1.0], [2.0], suite="store")
    for each in (one, other):
        write_result(tmp_path, each)
    (tmp_path / "else.json").write_text("{}")
    assert read_results(tmp_path) == {"metric": one, "store": other}
    assert read_results(tmp_path / "store.json") == {"store": other}
    with pytest.raises(UserError, match="holds no results"):
        read_results(tmp_path / "else.json")
    with pytest.raises(UserError, match="cannot be read"):
        read_results(tmp_path / "none.json")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no results"):
        read_results(tmp_path / "empty")


def compare(folder: Path, new: SuiteResult, *more: str) -> int:
    write_result(folder / "old", result([1.0, 1.1, 1.0], [1.0, 1.0, 1.0]))
    write_result(folder / "new", new)
    return bench(["--compare", str(folder / "old"), str(folder / "new"), *more])


def test_compare_fails_on_a_planted_regression(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    planted = result([1.3, 1.3, 1.4], [1.0, 1.0, 1.0])
    assert compare(tmp_path, planted) == 3
    assert "ours: relative time 1, now 1.3 (+30%)" in capsys.readouterr().out
    assert compare(tmp_path, planted, "--tolerance", "0.5") == 0
    # On a machine at a third of the speed, the same code is no regression.
    assert compare(tmp_path, result([3.0, 3.3, 3.0], [3.0, 3.0, 3.0])) == 0


@pytest.mark.parametrize("what", ["ours", "theirs"])
def test_compare_fails_on_a_doubled_peak_and_not_on_other_figures(
    tmp_path: Path, what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def with_figures(peak: float) -> SuiteResult:
        figures = {"peak, GiB (predicted)": peak, "mode": "joint", "error, px": peak}
        (group,) = result([1.0], [1.0]).groups
        candidates = tuple(
            each.model_copy(update={"figures": figures}) if each.name == what else each
            for each in group.candidates
        )
        update = {"candidates": candidates, "baseline": None}
        return result([1.0], [1.0]).model_copy(
            update={"groups": (group.model_copy(update=update),)}
        )

    write_result(tmp_path / "old", with_figures(10.0))
    for name, peak, code in (("same", 10.9, 0), ("double", 20.0, 3)):
        write_result(tmp_path / name, with_figures(peak))
        assert bench(["--compare", str(tmp_path / "old"), str(tmp_path / name)]) == code
    assert capsys.readouterr().out.count("predicted) 10, now 20 (+100%)") == 1


def test_compare_warns_of_trial_runs_and_other_machines(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = result([1.0], [1.0]).model_copy(update={"quick": True, "threads": 4})
    assert compare(tmp_path, other) == 0
    printed = capsys.readouterr().err
    assert "its times are meaningless" in printed
    assert "threads differs: 1, now 4" in printed


def test_published_tables_and_pictures_match_their_results() -> None:
    texts = rendered()
    assert len(texts) > 10
    for path, text in texts.items():
        assert path.read_text(encoding="utf-8") == text, f"{path}: run python -m benchmarks.render"
    for path in RESULTS.glob("bench/**/*.json"):
        (found,) = read_results(path).values()
        assert not found.quick and found.commit


# --- the picture of memory -----------------------------------------------------------------------


def test_memory_modes_stand_among_the_cards_and_no_names_touch() -> None:
    modes = [
        Spot(name=f"mode {n}", cost=100.0 + n // 3, gib=10 + n / 100, hollow=n == 7)
        for n in range(20)
    ]
    few = [Spot(name="large <one>", cost=7, gib=700), Spot(name="small", cost=9, gib=0.4)]
    panels = [Panel(name="one", cost="s", spots=modes), Panel(name="other", cost="s", spots=few)]
    picture = peaks("Peaks", panels, {"a": 14.6, "b": 22.0, "c": 23.5})
    root = ElementTree.fromstring(picture)
    groups = root.findall(f"{SVG}g")
    assert len(groups) == 2
    for group, spots in zip(groups, (modes, few), strict=True):
        places = {text.text: float(text.get("y", 0)) for text in group.iter(f"{SVG}text")}
        assert {"a: 15 GiB", "b, c: 22 GiB"} <= places.keys()
        named = sorted(places[spot.name] for spot in spots)
        assert all(low - high > 16.9 for high, low in pairwise(named))
        marks = [
            (float(c.get("cx", 0)), float(c.get("cy", 0)))
            for c in group.iter(f"{SVG}circle")
            if not c.get("class", "").startswith("key")
        ]
        grid = [line for line in group.iter(f"{SVG}line") if line.get("class") == "grid"]
        right = max(float(line.get("x2", 0)) for line in grid)
        top, bottom = (pick(float(line.get("y1", 0)) for line in grid) for pick in (min, max))
        assert all(0 < x < right and top <= y <= bottom for x, y in marks)
        by_size = sorted(spots, key=lambda spot: -spot.gib)
        assert sorted((spot.name for spot in spots), key=places.__getitem__) == [
            spot.name for spot in by_size
        ]
    assert picture.count('class="mark hollow"') == 1


def test_compare_names_what_it_cannot_compare(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = result([1.0, 1.0], [1.0, 1.0])
    (group,) = whole.groups
    ours, theirs = group.candidates
    changed = ours.model_copy(update={"figures": {"mode": "joint"}})
    write_result(tmp_path / "new", result([1.0], [1.0], suite="store"))
    for candidates, baseline, name in (
        ((ours,), "ours", "theirs"),
        ((ours, theirs), None, "times (baseline theirs, now None)"),
        ((changed, theirs), "theirs", "ours: mode (joint, now None)"),
    ):
        update = {"candidates": candidates, "baseline": baseline}
        other = whole.model_copy(update={"groups": (group.model_copy(update=update),)})
        before, after = {"metric": whole}, {"metric": other}
        assert any(name in each for each in unmatched(before, after) + unmatched(after, before))
    assert compare(tmp_path, whole) == 0
    told = capsys.readouterr().out
    assert "only one side has them" in told and "- suite store" in told


def test_times_that_are_not_numbers_are_refused(tmp_path: Path) -> None:
    write_result(tmp_path, result([1.0], [1.0]))
    file = tmp_path / "metric.json"
    file.write_text(file.read_text().replace("1.0", "NaN", 1))
    with pytest.raises(UserError, match="holds no results"):
        read_results(file)
