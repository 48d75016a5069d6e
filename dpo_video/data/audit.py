"""Audit a pair set before training on it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from rich.table import Table
from rich.text import Text

from dpo_video.data import audit_checks as checks
from dpo_video.data.audit_checks import Finding, Level
from dpo_video.data.audit_stats import PairSummary, summarize
from dpo_video.data.store import PairStore
from dpo_video.registry.returned import checked, decoded
from dpo_video.strategies import Metric, VideoModel
from dpo_video.support.formatting import cell, counted, html_table
from dpo_video.support.statistics import Record

_STYLES = {
    Level.FINE: "green",
    Level.UNKNOWN: "dim",
    Level.NOTICE: "yellow",
    Level.PROBLEM: "bold red",
}


class Audit(Record):
    """The findings of all checks of a pair set."""

    store: str
    pairs: int
    findings: tuple[Finding, ...]

    @property
    def problems(self) -> int:
        """Number of findings that are problems."""
        return self._count(Level.PROBLEM)

    @property
    def summary(self) -> str:
        """The counts in one line."""
        problems = f"{self.problems or 'no'} problem{'s' * (self.problems > 1)}"
        return (
            f"{counted(self.pairs, 'pair')}: {problems}, {self._count(Level.NOTICE)} worth a look."
        )

    def table(self) -> Table:
        """One row per check, for a terminal."""
        table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
        for column in ("level", "check"):
            table.add_column(column, no_wrap=True)
        table.add_column("message", overflow="fold")
        for finding in self.findings:
            text = cell(finding.message)
            if finding.advice:
                text.append(cell(f"\n{finding.advice}", "dim"))
            level = Text(finding.level.value, style=_STYLES[finding.level])
            table.add_row(level, finding.check, text)
        return table

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as JSON holds them."""
        return self.model_dump(mode="json")

    def _repr_html_(self) -> str:
        rows = [(each.level.value, each.check, each.message, each.advice) for each in self.findings]
        return html_table(["level", "check", "finding", "advice"], rows, self.summary)

    def _count(self, level: Level) -> int:
        return sum(finding.level is level for finding in self.findings)


def audit(
    store: PairStore,
    model: VideoModel,
    metrics: Mapping[str, Metric],
    prompts: Sequence[str],
    *,
    sample: int = 32,
    on_progress: Callable[[int], None] = lambda done: None,
) -> Audit:
    """Run all checks; every pair is read once.

    Args:
        store: The pairs.
        model: The model to train on them.
        metrics: Those with the role "motion" are compared between chosen and rejected videos.
        prompts: The evaluation's prompts.
        sample: Number of pairs that are decoded for that comparison; 0 for none.
        on_progress: Called with the number of pairs read so far.
    """
    match = checks.model_match(store, model)
    pairs: list[PairSummary] = []
    moved: dict[str, list[tuple[float, float]]] = defaultdict(list)
    motion = {name: metric for name, metric in metrics.items() if metric.role == "motion"}
    sampled = set(np.linspace(0, len(store) - 1, min(sample, len(store))).round().astype(int))
    for index in range(len(store)):
        batch = store.batch([index])
        pair = summarize(index, batch)
        pairs.append(pair)
        if match.level is Level.FINE and pair.finite and pair.label and index in sampled and motion:
            both = torch.cat([batch.first, batch.second]).to(model.device)
            videos = decoded(model, both).cpu()
            if pair.label < 0:
                videos = videos.flip(0)
            for name, metric in motion.items():
                values = metric(videos, [store.records[index].prompt] * 2)
                chosen, rejected = checked(metric, "values", values, (2,), finite=False).tolist()
                moved[name].append((chosen, rejected))
        on_progress(index + 1)
    finite = [pair for pair in pairs if pair.finite]
    texts = [row.prompt for row in store.records]
    findings = [
        match,
        checks.finite(pairs),
        checks.scale(finite),
        checks.difference(finite),
        checks.duplicates(finite),
        checks.region(finite),
        checks.labels(finite, store.where),
        *(checks.motion(name, values) for name, values in moved.items()),
        checks.shortcut(finite),
        checks.prompts(texts),
        checks.length(texts, model.unread),
        checks.leakage(texts, prompts),
    ]
    return Audit(store=store.where, pairs=len(store), findings=tuple(findings))
