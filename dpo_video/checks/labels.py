"""Checks of labels, and of what separates chosen from rejected videos."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import final

import numpy as np
from pydantic import Field

from dpo_video.data.audit_checks import FEWEST, listed, share_of
from dpo_video.data.audit_stats import held_out_accuracy, statistic_names
from dpo_video.data.labels import names
from dpo_video.extensions import Finding, Findings, PairCheck, PairSet
from dpo_video.support.statistics import paired_difference
from dpo_video.support.urls import is_url
from dpo_video.text import command, label_command

DECIDED = 0.2
"""Share of frames that must not be ties for a pair to be worth training on (DenseDPO, Sec. 4.1)."""
FLIPS = 200
"""Number of random orders that estimate the chance level of a classifier."""


@final
class Labels(PairCheck):
    """Labels are balanced, and few frames are ties."""

    def __call__(self, pair_set: PairSet) -> Finding:
        """The finding."""
        pairs = pair_set.finite
        where = pair_set.where
        decided = [pair for pair in pairs if pair.label]
        firsts = sum(pair.label > 0 for pair in decided)
        ties = sum(pair.decided == 0 for pair in pairs)
        thin = [pair.index for pair in pairs if 0 < pair.decided <= DECIDED]
        check = Findings(
            "labels", first_better=firsts, second_better=len(decided) - firsts, ties=ties
        )
        if not any(pair.decided for pair in pairs):
            sets = names(Path(where)) if not is_url(where) else []
            return check.problem(
                "Every pair is a tie, so nothing can be learned.",
                f"Audit them with their labels: {command('check', where, '--labels', sets[0])}"
                if sets
                else f"Label them, by metrics or by another labeler: {label_command(where)}",
            )
        counted = f"The first is better in {firsts} pairs, the second in {len(decided) - firsts}; "
        counted += f"{ties} are ties."
        if even := len(pairs) - len(decided) - ties:
            counted += (
                f" {even} prefer each in as many frames: only the loss segment learns from them."
            )
        if 2 * ties > len(pairs):
            return check.notice(
                counted,
                "Most pairs teach nothing. A labeler with a smaller margin, or pairs that differ "
                "more, leave fewer ties.",
            )
        # Builders store the chosen video first. A share in between may be a rater's bias.
        lean = abs(2 * firsts - len(decided)) / math.sqrt(max(1, len(decided)))
        if lean > 3 and 0 < firsts < len(decided):
            return check.notice(
                counted,
                "If the order was random, the rater is biased to one side. Ask in both orders.",
            )
        if thin:
            return check.notice(
                f"{counted} {share_of(thin, pairs)} are ties in {1 - DECIDED:.0%} of their frames "
                f"or more ({listed(thin)}).",
                "DenseDPO leaves such pairs out.",
                thin,
            )
        return check.fine(counted)


@final
class Motion(PairCheck):
    """Chosen videos do not move less than rejected ones, by every metric of motion."""

    less: float = Field(default=0.1, ge=0, lt=1)
    """Share by which chosen videos may move less."""

    def __call__(self, pair_set: PairSet) -> list[Finding]:
        """A finding for every metric."""
        return [self._finding(name, values) for name, values in pair_set.motion.items()]

    def _finding(self, name: str, values: Sequence[tuple[float, float]]) -> Finding:
        """`values` is a metric of (chosen, rejected)."""
        check = Findings(f"motion ({name})")
        if len(values) < FEWEST:
            return check.unknown(f"{len(values)} decoded pairs are too few to compare.")
        chosen, rejected = np.array(values).T
        gap = paired_difference(rejected, chosen)
        relative = gap.relative if gap.relative is not None else 0.0
        check.figures = {"chosen": gap.tuned_mean, "rejected": gap.base_mean, "low": gap.low,
                         "high": gap.high}  # fmt: skip
        message = (
            f"Chosen videos move at {gap.tuned_mean:.3g}, rejected ones at {gap.base_mean:.3g} "
            f"({relative:+.0%})."
        )
        if gap.high < 0 and relative < -self.less:
            return check.problem(
                message,
                "A policy can satisfy these pairs by freezing. Label with a condition on the "
                "motion, or build pairs whose two videos move alike (--pairs local or dense).",
            )
        if gap.low > 0 and relative > self.less:
            return check.notice(message, "Fine if more motion is the aim.")
        return check.fine(message)


@final
class Shortcut(PairCheck):
    """Simple statistics of the latents do not separate chosen from rejected videos."""

    def __call__(self, pair_set: PairSet) -> Finding:
        """The finding."""
        pairs = pair_set.finite
        check = Findings("shortcut")
        decided = [pair for pair in pairs if pair.label]
        if len(decided) < FEWEST:
            return check.unknown(f"{len(decided)} decided pairs are too few to tell.")
        rows = np.stack(
            [pair.label * (pair.statistics[0] - pair.statistics[1]) for pair in decided]
        )
        accuracy = held_out_accuracy(rows)
        draw = np.random.default_rng(0)
        # The sign of a row is arbitrary, so randomly flipped rows give the accuracy of chance.
        flipped = [
            held_out_accuracy(rows * draw.choice([-1.0, 1.0], size=(len(rows), 1)))
            for _ in range(FLIPS)
        ]
        low, high = np.quantile(flipped, [0.025, 0.975])
        check.figures = {"accuracy": accuracy, "chance_low": float(low), "chance_high": float(high)}
        message = (
            f"Simple statistics of the latents predict {accuracy:.0%} of held-out preferences "
            f"(chance: {low:.0%} to {high:.0%})."
        )
        if accuracy <= high:
            return check.fine(message)
        lean = np.sign(rows).mean(axis=0)
        best = int(np.abs(lean).argmax())
        name = statistic_names((rows.shape[1] - 5) // 2)[best]
        share = float((np.sign(rows[:, best]) == np.sign(lean[best])).mean())
        side = "higher" if lean[best] > 0 else "lower"
        check.figures["share"] = share
        return check.notice(
            f"{message} The strongest is {name}: {side} in {share:.0%} of the chosen videos.",
            "Fine if that is the aim, as flicker is with jitter; otherwise a shortcut. Check that "
            "both videos of a pair went through the same VAE, codec, size and frame rate.",
        )
