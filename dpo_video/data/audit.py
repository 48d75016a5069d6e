"""Audit a pair set before training on it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from rich.table import Table
from rich.text import Text

from dpo_video import registry
from dpo_video.data.audit_checks import model_match
from dpo_video.data.audit_stats import summarize
from dpo_video.data.store import PairStore
from dpo_video.extensions import Finding, Findings, Level, PairCheck, PairSet, PairSummary
from dpo_video.registry.returned import checked, decoded, wrong
from dpo_video.strategies import Metric, VideoModel
from dpo_video.support.formatting import cell, counted, html_table
from dpo_video.support.statistics import Record

CHECKS = (
    "model", "numbers", "scale", "difference", "duplicates", "region", "labels", "motion",
    "shortcut", "prompts", "length", "leakage",
)  # fmt: skip
"""Names of the checks that run by default, in this order."""
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
    checks: Sequence[PairCheck] | None = None,
    sample: int = 32,
    on_progress: Callable[[int], None] = lambda done: None,
) -> Audit:
    """Run the checks; every pair is read once, and again by checks that read pairs themselves.

    Args:
        store: The pairs.
        model: The model to train on them.
        metrics: Those with the role "motion" are compared between chosen and rejected videos.
        prompts: The evaluation's prompts.
        checks: The checks; by default the built-in ones.
        sample: Number of pairs that are decoded for that comparison; 0 for none.
        on_progress: Called with the number of pairs read so far.
    """
    match = model_match(store, model)
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
    pair_set = PairSet(
        where=store.where,
        model=model,
        match=match,
        summaries=pairs,
        prompts=[row.prompt for row in store.records],
        evaluation_prompts=prompts,
        motion=moved,
        batch=lambda index: store.batch([index]),
    )
    if checks is None:
        checks = [registry.strategy("check", name) for name in CHECKS]
    findings = [finding for check in checks for finding in findings_of(check, pair_set)]
    if lost := store.unlisted():
        findings.append(
            Findings("store").notice(
                f"{counted(lost, 'file')} of latents belong{'s' if lost == 1 else ''} to no pair: "
                "a build is unfinished, or pairs.jsonl has lost lines.",
                "Run the build again; it keeps the pairs that are there.",
            )
        )
    return Audit(store=store.where, pairs=len(store), findings=tuple(findings))


def findings_of(check: PairCheck, pair_set: PairSet) -> list[Finding]:
    """What a check finds.

    Raises:
        PluginError: if it returns something else.
    """
    found = check(pair_set)
    findings: list[Any] = list(found) if isinstance(found, list | tuple) else [found]
    strays = [type(each).__name__ for each in findings if not isinstance(each, Finding)]
    if strays:
        raise wrong(check, f"returns a {strays[0]}, not a Finding or a list of them")
    return findings
