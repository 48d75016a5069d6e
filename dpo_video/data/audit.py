"""Audit a pair set before training on it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch

from dpo_video.data import audit_checks as checks
from dpo_video.data.audit_checks import Finding, Level
from dpo_video.data.audit_stats import Summary, summarize
from dpo_video.data.store import PairStore
from dpo_video.strategies import Metric, VideoModel
from dpo_video.support.statistics import Record


class Audit(Record):
    """All findings, one a check."""

    store: str
    pairs: int
    findings: tuple[Finding, ...]

    @property
    def problems(self) -> int:
        """How many checks found one."""
        return sum(finding.level is Level.PROBLEM for finding in self.findings)


def audit(
    store: PairStore,
    model: VideoModel,
    metrics: Mapping[str, Metric],
    prompts: Sequence[str],
    *,
    sample: int = 32,
    on_progress: Callable[[int], None] = lambda done: None,
) -> Audit:
    """Look at every pair once.

    Args:
        store: The pairs.
        model: What they are to train.
        metrics: Those with the role "motion" are compared between winners and losers.
        prompts: The evaluation's.
        sample: Pairs that are decoded for that; 0 for none.
        on_progress: Told how many pairs are done.
    """
    fit = checks.fit(store, model)
    pairs: list[Summary] = []
    moved: dict[str, list[tuple[float, float]]] = defaultdict(list)
    motion = {name: metric for name, metric in metrics.items() if metric.role == "motion"}
    wanted = set(np.linspace(0, len(store) - 1, min(sample, len(store))).round().astype(int))
    for index in range(len(store)):
        batch = store.batch([index])
        pair = summarize(index, batch)
        pairs.append(pair)
        if fit.level is Level.FINE and pair.finite and pair.winner and index in wanted and motion:
            both = torch.cat([batch.first, batch.second]).to(model.device)
            videos = model.decode_videos(both).cpu()
            if pair.winner < 0:
                videos = videos.flip(0)
            for name, metric in motion.items():
                winner, loser = metric(videos, [store.rows[index].prompt] * 2).tolist()
                moved[name].append((winner, loser))
        on_progress(index + 1)
    sound = [pair for pair in pairs if pair.finite]
    texts = [row.prompt for row in store.rows]
    found = [
        fit,
        checks.broken(pairs),
        checks.scale(sound),
        checks.identical(sound),
        checks.duplicates(sound),
        checks.region(sound),
        checks.labels(sound),
        *(checks.motion(name, values) for name, values in moved.items()),
        checks.separable(sound),
        checks.prompts(texts),
        checks.leakage(texts, prompts),
    ]
    return Audit(store=store.where, pairs=len(store), findings=tuple(found))
