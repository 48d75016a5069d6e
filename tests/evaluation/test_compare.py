"""A comparison: pooled over seeds, and shown as table, Markdown, picture and page."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from io import StringIO
from itertools import pairwise
from pathlib import Path

import pytest
from rich.console import Console
from small_evaluation import an_evaluation, with_witness
from typer.testing import CliRunner

import dpo_video as dv
from dpo_video.cli import app
from dpo_video.errors import UserError
from dpo_video.evaluation.compare import Comparison
from dpo_video.evaluation.rows import Cell
from dpo_video.evaluation.verdict import MetricResult, Outcome, Role
from dpo_video.settings import EvaluateSettings

BASE = (10.0, 12.0, 8.0, 11.0, 9.0, 10.0) * 2

SVG = "{http://www.w3.org/2000/svg}"


def metric(name: str, factor: float, role: Role = Role.TARGET) -> MetricResult:
    # The factor varies, since an interval needs some spread.
    tuned = [value * (factor + 0.01 * (i % 3 - 1)) for i, value in enumerate(BASE)]
    return MetricResult.measured(
        name, BASE, tuned, unit="", higher_is_better=role is not Role.TARGET, role=role
    )


def cell(entry: str, seed: int, error: float, motion: float = 1.0, guard: float = 1.0) -> Cell:
    return Cell(
        entry=entry,
        seed=seed,
        steps=60,
        seconds=10.0 * (seed + 1),
        training="healthy",
        metrics=(
            metric("warp_error", error),
            metric("dynamic_degree", motion, Role.MOTION),
            metric("caption_match", guard, Role.GUARD),
        ),
        prompts=tuple(f"prompt {i}" for i in range(len(BASE))),
        min_prompts=8,
    )


def comparison(*cells: Cell) -> Comparison:
    return Comparison.of(cells, machine="a machine", versions={"torch": "0"})


def test_a_row_is_the_mean_over_the_seeds_and_lists_each() -> None:
    found = comparison(cell("one", 0, 0.71), cell("one", 1, 0.69), cell("two", 0, 1.2))
    one, two = found.rows
    assert (one.entry, one.seeds, one.seconds) == ("one", (0, 1), 15.0)
    assert one.metrics[0].difference.relative == pytest.approx(-0.3, abs=1e-3)
    assert one.by_seed["warp_error"] == pytest.approx((-0.29, -0.31), abs=1e-3)
    assert "Warp error by training seed: \u221229.1%, \u221231.1%." in one.verdict.details
    assert not any("by training seed" in sentence for sentence in two.verdict.details)
    assert one.metrics[0].improved and one.metrics[0].difference.runs == 2
    assert two.metrics[0].worsened
    assert Comparison.model_validate_json(found.model_dump_json()) == found


def test_second_measurements_are_pooled_on_the_reported_prompts(tmp_path: Path) -> None:
    cells = [cell("one", seed, factor) for seed, factor in ((0, 0.71), (1, 0.69))]
    seen = [
        each.model_copy(
            update={"metrics": (with_witness(each.metrics[0], factor), *each.metrics[1:])}
        )
        for each, factor in zip(cells, (1.0, 1.2), strict=True)
    ]
    found = Comparison.of(seen, machine="", versions={}, selection_prompts=4)
    (row,) = found.rows
    witness = row.metrics[0].witness
    assert witness is not None and len(witness.base) == len(BASE) - 4
    assert witness.difference.runs == 2
    assert witness.difference.relative == pytest.approx((0.71 + 1.2 * 0.69) / 2 - 1, abs=0.01)
    assert f"Warp error {witness.text}." in row.verdict.details
    assert f"Warp error {witness.text}." in found.page(tmp_path / "page.html").read_text()
    assert comparison(seen[0], cells[1]).rows[0].metrics[0].witness is None


def test_cells_with_other_base_videos_are_not_pooled() -> None:
    other = cell("one", 1, 0.6)
    moved = MetricResult.measured(
        "warp_error",
        [value + 1 for value in BASE],
        BASE,
        unit="",
        higher_is_better=False,
        role=Role.TARGET,
    )
    other = other.model_copy(update={"metrics": (moved, *other.metrics[1:])})
    with pytest.raises(ValueError, match="other base videos"):
        comparison(cell("one", 0, 0.8), other)
    with pytest.raises(ValueError, match="nothing to compare"):
        comparison()


def test_a_metric_missing_in_one_evaluation_is_left_out_of_all() -> None:
    complete = cell("one", 0, 0.8)
    lacking = complete.model_copy(update={"seed": 1, "metrics": complete.metrics[::2]})
    found = comparison(complete, lacking, cell("two", 0, 1.2))
    for row in found.rows:
        assert [result.name for result in row.metrics] == ["warp_error", "caption_match"]
        assert row.by_seed.keys() == {"warp_error", "caption_match"}


def test_the_table_and_the_markdown_name_every_entry_and_its_changes() -> None:
    found = comparison(cell("good", 0, 0.7), cell("frozen", 0, 0.5, motion=0.5))
    console = Console(file=StringIO(), width=160)
    console.print(found.table())
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    for text in (shown, found.markdown()):
        good, frozen = (
            next(line for line in text.splitlines() if name in line.split("verdict")[0])
            for name in ("good", "frozen")
        )
        assert "30" in good
        assert "50" in frozen
    rows = [line for line in found.markdown().splitlines() if line.startswith("|")]
    assert len({row.count("|") for row in rows}) == 1
    assert "Improved" in rows[3]
    assert "Improved" not in rows[4]


def test_every_form_states_the_thresholds() -> None:
    found = comparison(cell("good", 0, 0.7))
    console = Console(file=StringIO(), width=160)
    console.print(found.table())
    shown = " ".join(console.file.getvalue().split())  # type: ignore[attr-defined]
    for text in (shown, found.markdown(), found._repr_html_(), *found.notes):
        if text in found.notes[:-1]:
            continue
        assert "changed by at least 2%." in text
        assert "a loss of more than 3%." in text
        assert "A verdict needs 8 prompts." in text
    assert "those of one seed cover the prompts only" in shown


def parts(first: float, rest: float, entry: str, seed: int = 0) -> Cell:
    """A cell whose error changes by one factor on the first 4 prompts and by another after them."""
    one, other = cell(entry, seed, first), cell(entry, seed, rest)
    metrics = tuple(
        MetricResult.measured(
            a.name, a.base, (*a.tuned[:4], *b.tuned[4:]), unit="", role=a.role,
            higher_is_better=a.higher_is_better, prompts=one.prompts,
        )
        for a, b in zip(one.metrics, other.metrics, strict=True)
    )  # fmt: skip
    return one.model_copy(update={"metrics": metrics})


def test_an_entry_is_chosen_on_prompts_that_are_not_reported() -> None:
    lucky, steady = parts(0.5, 0.9, "lucky"), parts(0.7, 0.7, "steady")
    found = Comparison.of([lucky, steady], machine="", versions={}, selection_prompts=4)
    assert found.selection is not None and found.selection.chosen == "lucky"
    assert found.selection.rows[0].metrics[0].difference.relative == pytest.approx(-0.5, abs=5e-3)
    row = found["lucky"].metrics[0]
    assert row.difference.prompts == 8 and row.difference.relative == pytest.approx(-0.1, abs=5e-3)
    assert found["lucky"].by_seed["warp_error"][0] == pytest.approx(-0.1, abs=5e-3)
    text = " ".join(found.notes)
    assert "Chosen on the first 4 prompts: lucky" in text and "had no part in the choice" in text
    assert "The selection, on the first 4 prompts" in found.markdown()
    assert Comparison.model_validate_json(found.model_dump_json()) == found
    assert any("same prompts, so the best" in note for note in comparison(lucky, steady).notes)


def test_an_entry_is_chosen_with_training_seeds_that_are_not_reported(tmp_path: Path) -> None:
    cells = [cell("one", 0, 0.5), cell("one", 1, 0.9), cell("two", 0, 0.7), cell("three", 0, 0.4)]
    cells[3] = cell("three", 0, 0.4, motion=0.8)  # it may not be chosen: it moves less
    found = Comparison.of(cells, machine="", versions={}, selection_seeds=[0])
    assert found.selection is not None and found.selection.chosen == "one"
    assert [(row.entry, row.seeds) for row in found.rows] == [("one", (1,))]
    page = found.page(tmp_path / "page.html").read_text()
    assert "The selection, on training seed 0" in page and "three" in page
    worse = Comparison.of([cells[3], cells[1]], machine="", versions={}, selection_seeds=[0])
    assert "three" in worse.notes[1] and "every entry lost motion or a guard" in worse.notes[1]
    two = Comparison.of(cells[1:], machine="", versions={}, selection_seeds=[0])
    assert "add seeds to its entry" in " ".join(two.notes)
    with pytest.raises(ValueError, match="no training seed is left"):
        Comparison.of(cells[2:], machine="", versions={}, selection_seeds=[0])


def test_cells_are_judged_by_the_thresholds_of_the_comparison() -> None:
    evaluation = an_evaluation([f"prompt {i}" for i in range(47)])
    settings = EvaluateSettings(min_effects={"warp_error": 0.9}, tolerance=0.2, min_prompts=40)
    row = comparison(Cell.of("one", 0, evaluation, settings))["one"]
    assert [metric.min_effect for metric in row.metrics[:2]] == [0.9, 0.02]
    assert row.metrics[2].tolerance == 0.2 and not row.metrics[0].improved
    few = settings.model_copy(update={"min_prompts": 48})
    assert comparison(Cell.of("one", 0, evaluation, few))["one"].verdict.outcome is Outcome.TOO_FEW


def test_the_picture_places_entries_by_motion_and_error() -> None:
    found = comparison(
        cell("a<b", 0, 0.7), cell("frozen", 0, 0.5, motion=0.5), cell("broken", 0, 0.9, guard=0.5)
    )
    root = ET.fromstring(found.picture())
    space = "{http://www.w3.org/2000/svg}"
    marks = [
        (float(c.attrib["cx"]), float(c.attrib["cy"]), c.attrib["class"])
        for c in root.iter(f"{space}circle")
        if "key" not in c.attrib["class"]
    ]
    names = [text.text for text in root.iter(f"{space}text")]
    assert {"a<b", "frozen", "broken"} <= set(names)
    broken, good, frozen = marks  # from the top down
    assert frozen[0] < good[0]  # less motion: further left
    assert frozen[1] > good[1] > broken[1]  # a smaller error: further down
    assert broken[2] != good[2] == frozen[2]  # hollow: a guard got worse


def test_names_of_equal_entries_do_not_overlap() -> None:
    entries = ("one", "two", "three")
    root = ET.fromstring(comparison(*(cell(name, 0, 0.7) for name in entries)).picture())
    lines = sorted(
        float(text.attrib["y"])
        for text in root.iter("{http://www.w3.org/2000/svg}text")
        if text.text in entries
    )
    assert len(lines) == 3 and all(b - a >= 12 for a, b in pairwise(lines))


def test_a_mark_has_the_number_of_its_name_and_cut_intervals_have_arrows() -> None:
    entries = [f"entry {n}" for n in range(30)]
    cells = [cell(name, 0, 0.95 - 0.02 * n) for n, name in enumerate(entries)]
    root = ET.fromstring(comparison(*cells).picture())
    texts = [text for text in root.iter(f"{SVG}text")]
    ranks = [text for text in texts if text.attrib.get("class") == "number"]
    assert [text.text for text in ranks] == [str(1 + n // 2) for n in range(60)]
    height = float(root.attrib["height"])
    assert all(0 < float(text.attrib["y"]) < height for text in texts if "y" in text.attrib)
    inside = ET.fromstring(comparison(cell("one", 0, 0.5, motion=0.5)).picture())
    assert not inside.findall(f".//{SVG}path[@class='cut']")
    wild = comparison(cell("wild", 0, 0.7), cell("wild", 1, 0.72, motion=3.0))
    arrows = ET.fromstring(wild.picture()).findall(f".//{SVG}path[@class='cut']")
    # Both ends of the interval of motion, of which two seeds say nothing.
    turned = [arrow.attrib["transform"].partition("rotate")[2] for arrow in arrows]
    assert turned == ["(180)", "(0)"]


def test_the_picture_needs_a_target_and_a_motion_metric() -> None:
    only = cell("one", 0, 0.8)
    only = only.model_copy(update={"metrics": only.metrics[:1]})
    with pytest.raises(ValueError, match="motion"):
        comparison(only).picture()


def test_a_comparison_is_a_page_and_a_notebook_table(tmp_path: Path) -> None:
    found = comparison(cell("a<b", 0, 0.7), cell("frozen", 0, 0.5, motion=0.5))
    page = found.page(tmp_path / "page.html").read_text()
    for text in (page, found._repr_html_()):
        assert "a&lt;b" in text and "a<b" not in text and "<script" not in text
    assert "<svg" in page and "src=" not in page and page.count("href=") == 1  # the empty icon
    assert found["frozen"] is found.rows[1]
    with pytest.raises(UserError, match="Did you mean 'frozen'"):
        found["frosen"]


def test_names_of_entries_are_no_markup() -> None:
    out = StringIO()
    table = comparison(cell("[/b]", 0, 0.7), cell("[red]x", 0, 0.7)).table()
    Console(file=out, width=300).print(table)
    assert "[/b]" in out.getvalue() and "[red]x" in out.getvalue()


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("[one]\npair = 'local'", [], "has 'pair'"),
        ("one = 3", [], "no table"),
        ("", [], "name no entry"),
        ("[one", [], "not valid TOML"),
        ("[one]\npairs = 'local'", ["--only", "oen"], "Did you mean 'one'"),
        ("[one]\nset = ['loss.bta=3']", [], "Entry 'one'.*loss.beta"),
        ("[one]\npairs = 'local'\nseeds = []", [], "seeds is a list"),
        ("[one]\npairs = 'local'", ["--selection-prompts", "46"], "46 of 47 prompts cannot"),
        ("[one]\npairs = 'local'", ["--selection-seed", "0"], "none to report"),
        ("[one]\npairs = 'local'", ["--selection-seed", "1"], "No entry is trained with"),
        ("[one]\npairs = 'local'\n[selection]\nprompts = 1", [], "1 of 47 prompts cannot"),
        ("[one]\npairs = 'local'\n[selection]\nseeds = 'a'", [], "takes prompts and seeds only"),
        ("[one]\npairs = 'local'\n[selection]\nother = 1", [], "takes prompts and seeds only"),
        ("selection = 1\n[one]\npairs = 'local'", [], "takes prompts and seeds only"),
        ("[one]\npairs = 'local'\nseeds = ['0']", [], "seeds is a list"),
        ("[one]\npairs = 3", [], r"Entry 'one' .*: pairs has another form\. Write pairs = "),
        ("[one]\nbackbone = ['tiny']", [], "backbone has another form"),
        ("[one]\nlabeler = {a = 1}", [], "labeler has another form"),
        ("[one]\nset = 'loss.beta=3'", [], r"set has another form\. Write set = "),
        ("[one]\nset = [3]", [], "set has another form"),
        ("[one]\nset = {a = 1}", [], "set has another form"),
        ("one = 3", [], "has no table"),
        ("a = " + "[" * 5000, [], "not valid TOML: it is nested too deeply"),
        ("a = " + "9" * 5000, [], "not valid TOML: Exceeds the limit"),
        ("[one]\nseeds = [" + "9" * 400 + "]", [], "run.seed"),
        ("selection = 3\n[one]\npairs = 'local'", [], "takes prompts and seeds only"),
        ("['../../one']\npairs = 'local'", [], "cannot name an entry"),
        ("['/one']\npairs = 'local'", [], "cannot name an entry"),
        ("['..']\npairs = 'local'", [], "cannot name an entry"),
        ("[Pairs]\npairs = 'local'", [], "cannot be named 'Pairs'"),
        (
            "[one]\npairs = 'ranked'\nlabeler = 'vlm'\n"
            "set = ['labeler.model=m', 'labeler.key_variable=HOME']",
            [],
            "names a secret",
        ),
    ],
)
def test_a_wrong_entry_is_an_error_before_anything_runs(
    tmp_path: Path, text: str, options: list[str], message: str
) -> None:
    path = tmp_path / "entries.toml"
    path.write_text(text)
    result = CliRunner().invoke(
        app, ["compare", str(path), "--out", str(tmp_path / "out"), *options]
    )
    assert isinstance(result.exception, UserError)
    with pytest.raises(UserError, match=message):
        raise result.exception
    assert not (tmp_path / "out").exists()


def test_two_entries_of_one_name_are_an_error(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.toml").write_text("[one]\npairs = 'local'")
    result = CliRunner().invoke(app, ["compare", *(str(p) for p in tmp_path.glob("*.toml"))])
    assert "Two entries are named 'one'" in str(result.exception)


def test_configurations_of_runs_are_named_by_their_folders(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.toml").write_text("[loss]\nname = 'global'\n")
    paths = [tmp_path / name / "run.toml" for name in ("one", "two", "none")]
    with pytest.raises(UserError, match=r"Cannot read '.*none/run.toml'"):
        dv.compare(paths)
    with pytest.raises(UserError, match=r"Unknown entry 'three'.*Available: one, two"):
        dv.compare(paths[:2], only=["three"])


@pytest.mark.usefixtures("quick_metrics")
def test_finished_cells_are_not_run_again(tmp_path: Path) -> None:
    """Two small entries on the embedded model; a second call runs only what is missing."""
    path, out = tmp_path / "entries.toml", tmp_path / "out"
    small = (
        "'build.count=1', 'train.batch_size=1', 'train.gradient_accumulation_steps=1', "
        "'evaluate.num_inference_steps=2', 'train.validation_videos=0'"
    )
    path.write_text(
        f"[own]\npairs = 'jitter'\nloss = 'global'\nset = [{small}, "
        "'pairs.num_inference_steps=2']\n"
        f"[clips]\npairs = 'jitter'\nloss = 'global'\nset = [{small}, \"pairs.chosen='clip'\"]\n"
        "seeds = [1]\n"
    )
    command = ["compare", str(path), "--out", str(out), "--steps", "1", "--num-prompts", "2"]
    command += ["--device", "cpu"]
    first = CliRunner().invoke(app, [*command, "--only", "own"], catch_exceptions=False)
    assert first.exit_code == 0
    assert "own" in first.stdout
    log = out / "own" / "seed-0" / "log.jsonl"
    stamp = log.stat().st_mtime_ns
    both = CliRunner().invoke(app, command, catch_exceptions=False)
    assert both.exit_code == 0
    assert log.stat().st_mtime_ns == stamp
    found = Comparison.model_validate_json((out / "comparison.json").read_text())
    assert [(row.entry, row.seeds) for row in found.rows] == [("own", (0,)), ("clips", (1,))]
    assert found.rows[0].metrics[0].base == found.rows[1].metrics[0].base
    assert len(list(out.glob("base-*"))) == 1
    ET.fromstring((out / "frontier.svg").read_text())
    ET.fromstring((out / "frontier.svg").read_text())
    judged = CliRunner().invoke(app, [*command, "--tolerance", "0.5"], catch_exceptions=False)
    assert judged.exit_code == 0 and log.stat().st_mtime_ns == stamp
    assert "a loss of more than 50%" in (out / "index.html").read_text()
    other = CliRunner().invoke(app, [*command, "--steps", "2"])
    assert "other settings" in str(other.exception)
