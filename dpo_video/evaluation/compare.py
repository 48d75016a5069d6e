"""Compare several entries on equal terms, pooled over training seeds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from dpo_video.errors import unknown
from dpo_video.evaluation import charts
from dpo_video.evaluation.rendering import asset, templates
from dpo_video.evaluation.rows import Cell, Row, Selection, on_common_metrics, pool
from dpo_video.evaluation.verdict import BETTER, KEPT, NOT_SHOWN, WORSE, Role, rules
from dpo_video.support.atomic import write_text
from dpo_video.support.formatting import MINUS, cell, counted, html_table
from dpo_video.support.statistics import PairedDifference, Record


class Comparison(Record):
    """All rows, in the order of the entries."""

    rows: tuple[Row, ...]
    """The entries on the prompts and training seeds that are reported."""
    selection: Selection | None = None
    """What chose among the entries; None if nothing was set apart for it."""
    min_prompts: int
    machine: str
    """The machine that it was measured on."""
    versions: dict[str, str]

    @classmethod
    def of(
        cls,
        cells: Sequence[Cell],
        *,
        machine: str,
        versions: dict[str, str],
        selection_prompts: int = 0,
        selection_seeds: Sequence[int] = (),
    ) -> Comparison:
        """Pool the cells by entry; the cells of an entry must be neighbours.

        A metric that is missing in one cell is left out of all.

        Args:
            cells: The entries, each with every training seed.
            machine: See the field.
            versions: See the field.
            selection_prompts: Number of prompts that choose an entry and are not reported.
            selection_seeds: Training seeds that choose an entry and are not reported.

        Raises:
            ValueError: if there are no cells, those of an entry have other base videos, or nothing
                is left to choose by or to report.
        """
        if not cells:
            raise ValueError("there is nothing to compare")
        cells, selection = on_common_metrics(cells), None
        if selection_prompts or selection_seeds:
            selection = Selection.of(cells, selection_prompts, selection_seeds)
            cells = selection.reported(cells)
        return cls(
            rows=pool(cells),
            selection=selection,
            min_prompts=cells[0].min_prompts,
            machine=machine,
            versions=versions,
        )

    def __getitem__(self, entry: str) -> Row:
        """The row of an entry.

        Raises:
            UserError: if there is none of that name.
        """
        rows = {row.entry: row for row in self.rows}
        if entry not in rows:
            raise unknown("entry", entry, list(rows))
        return rows[entry]

    def to_dict(self) -> dict[str, Any]:
        """The comparison as JSON-ready data."""
        return self.model_dump(mode="json")

    def table(self) -> Table:
        """The relative change of every metric as a table for the terminal."""
        table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
        marks = f"{_sign(BETTER)}, {_sign(WORSE)}, {_sign(KEPT)}, {NOT_SHOWN[0]} neither is shown."
        table.caption, table.caption_justify = cell(" ".join([marks, *self.notes])), "left"
        table.add_column("entry", no_wrap=True)
        table.add_column("seeds", justify="right")
        for metric in self.rows[0].metrics:
            table.add_column(cell(metric.label), justify="right")
        table.add_column("verdict")
        for row in self.rows:
            cells = []
            for metric in row.metrics:
                sign, word = metric.mark
                style = {"better": "green", "worse": "red"}.get(word, "dim")
                cells.append(cell(f"{metric.change_text} {sign}", style))
            count = str(len(row.seeds))
            table.add_row(cell(row.entry), count, *cells, cell(row.verdict.headline))
        return table

    def markdown(self) -> str:
        """The tables with intervals in Markdown, and what they mean."""
        text = _markdown(self.rows) + "".join(f"\n{note}\n" for note in self.notes)
        if self.selection is None:
            return text
        return (
            f"{text}\nThe selection, on {self.selection.where}:\n\n{_markdown(self.selection.rows)}"
        )

    @property
    def drawable(self) -> bool:
        """Whether there are a target and a motion metric to draw."""
        roles = {metric.role for metric in self.rows[0].metrics}
        return {Role.TARGET, Role.MOTION} <= roles and bool(self._drawn)

    def picture(self, *, inline: bool = False) -> str:
        """An SVG: the change of the first target against the change of the motion.

        A hollow mark means that a guard got worse: the gain came at a loss of fidelity. Intervals
        are cut, with an arrow, at half the range of the changes beyond it, because those of two
        seeds are so wide that nothing else could be seen.

        Args:
            inline: Whether it is part of a page that has its style.

        Raises:
            ValueError: if it is not `drawable`.
        """
        if not self.drawable:
            raise ValueError("the picture needs relative changes of a target and a motion metric")
        metrics = self.rows[0].metrics
        index = {metric.role: i for i, metric in reversed(list(enumerate(metrics)))}
        labels = {role: f"change of {metrics[i].label}" for role, i in index.items()}

        def axis(role: Role) -> Any:
            return lambda values, start, end: charts.linear(
                values, start, end, ticks=8, text=_tick, label=labels[role]
            )

        spreads = {
            role: _spreads([row.metrics[index[role]].difference for row in self._drawn])
            for role in labels
        }
        points = [
            charts.Point(
                name=row.entry,
                x=spreads[Role.MOTION][i],
                y=spreads[Role.TARGET][i],
                hollow=any(m.lost for m in row.metrics if m.role is Role.GUARD),
            )
            for i, row in enumerate(self._drawn)
        ]
        panel = charts.Panel(
            points=points, x=axis(Role.MOTION), y=axis(Role.TARGET), origin="base model"
        )
        title = f"{labels[Role.TARGET]} against {labels[Role.MOTION]}, one mark per entry"
        return charts.scatter(title, [panel], width=480, inline=inline)

    def page(self, path: Path | str) -> Path:
        """Write a self-contained page: the picture, the table and the verdicts."""
        text = (
            templates()
            .get_template("comparison.html.j2")
            .render(
                comparison=self,
                style=asset("evaluation.css"),
                picture=self.picture(inline=True) if self.drawable else "",
                report=_cells(self.rows),
                selection=None if self.selection is None else _cells(self.selection.rows),
            )
        )
        path = Path(path)
        write_text(path, text)
        return path

    def _repr_html_(self) -> str:
        return html_table(*_cells(self.rows), caption=" ".join(self.notes))

    @property
    def _drawn(self) -> list[Row]:
        return [
            row for row in self.rows if all(m.relative_interval is not None for m in row.metrics)
        ]

    @property
    def notes(self) -> tuple[str, ...]:
        """What was compared, how an entry was chosen, and the thresholds, in words."""
        return self._sample, *([self._choice] if self._choice else []), self._rules

    @property
    def _sample(self) -> str:
        change = self.rows[0].metrics[0].difference
        different = (
            f" of {counted(change.prompts, 'prompt')}" if change.prompts < change.pairs else ""
        )
        return (
            f"{counted(change.pairs, 'video')}{different} per entry, from the same prompts and "
            "noise as the base model's. Changes are means over the training seeds, with 95% "
            "intervals over prompts and seeds; those of one seed cover the prompts only."
        )

    @property
    def _choice(self) -> str:
        selection, count = self.selection, len(self.rows)
        if selection is None:
            if count < 2:
                return ""
            return (
                f"All {count} entries were compared on the same prompts, so the best of them looks "
                "better than it is. --selection-prompts N chooses on N prompts and reports on the "
                "others."
            )
        chosen = next(row for row in selection.rows if row.entry == selection.chosen)
        text = (
            f"Chosen on {selection.where}: {chosen.entry}, with the largest improvement of "
            f"{chosen.target.label} ({chosen.target.change_text})"
        )
        text += (
            " among entries that lost neither motion nor a guard."
            if chosen.safe
            else "; every entry lost motion or a guard."
        )
        reported = [row for row in self.rows if row.entry == selection.chosen]
        if not reported:
            return (
                f"{text} It has no training seed outside of the selection: add seeds to its entry "
                "to report it."
            )
        change = reported[0].target
        rest = "training seeds" if selection.seeds else "prompts"
        rest = "prompts and training seeds" if selection.prompts and selection.seeds else rest
        return (
            f"{text} On the reported {rest}, which had no part in the choice: {change.change_text} "
            f"({change.interval_text})."
        )

    @property
    def _rules(self) -> str:
        return rules(self.rows[0].metrics, self.min_prompts)


def _sign(mark: tuple[str, str]) -> str:
    return " ".join(mark)


def _cells(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """The header and the cells of a table of rows."""
    labels = [metric.label for metric in rows[0].metrics]
    cells = [
        [
            row.entry,
            str(len(row.seeds)),
            str(row.steps),
            *(f"{metric.change_text} ({metric.interval_text})" for metric in row.metrics),
            row.verdict.headline,
        ]
        for row in rows
    ]
    return ["entry", "seeds", "steps", *labels, "verdict"], cells


def _markdown(rows: Sequence[Row]) -> str:
    header, cells = _cells(rows)
    base = [metric.difference.base_mean for metric in rows[0].metrics]
    lines = [header, ["---"] * len(header)]
    lines.append(["*base*", "", "", *(f"*{value:.3g}*" for value in base), ""])
    return "".join(f"| {' | '.join(line)} |\n" for line in [*lines, *cells])


def _spreads(changes: Sequence[PairedDifference]) -> list[charts.Spread]:
    """The relative changes with their intervals, cut where they leave the picture."""
    means = [0.0, *(change.relative or 0.0 for change in changes)]
    margin = (max(means) - min(means)) / 2
    low, high = min(means) - margin, max(means) + margin
    spreads = []
    for change in changes:
        below, above = change.relative_low or 0.0, change.relative_high or 0.0
        ends = max(below, low), min(above, high)
        spreads.append(charts.Spread(change.relative or 0.0, *ends, below < low, above > high))
    return spreads


def _tick(change: float) -> str:
    return f"{100 * change:+g}%".replace("-", MINUS) if change else "0"
