"""Checks of prompts."""

from __future__ import annotations

from collections import Counter
from typing import final

from pydantic import Field

from dpo_video.data.audit_checks import FEWEST, cut_prompts, plain
from dpo_video.extensions import Finding, Findings, PairCheck, PairSet
from dpo_video.support.formatting import counted


@final
class Prompts(PairCheck):
    """The prompts are diverse."""

    def __call__(self, pair_set: PairSet) -> Finding:
        """The finding."""
        texts = pair_set.prompts
        counts = Counter(plain(text) for text in texts)
        check = Findings("prompts", distinct=float(len(counts)))
        if not counts:
            return check.problem("There are no pairs.", "Build some: dpo-video build.")
        text, most = counts.most_common(1)[0]
        if most * 2 > len(texts) and len(texts) >= FEWEST:
            return check.notice(
                f"{most} of {len(texts)} pairs have the prompt '{text}'.",
                "Fine for one subject; otherwise the policy learns that prompt's look. Add others.",
            )
        message = f"{len(counts)} different prompts in {counted(len(texts), 'pair')}."
        if 2 * len(counts) < len(texts):
            return check.notice(
                message,
                "More prompts generalise better than more pairs of the same ones.",
            )
        return check.fine(message)


@final
class Length(PairCheck):
    """The text encoder reads the prompts to their ends."""

    def __call__(self, pair_set: PairSet) -> Finding:
        """The finding."""
        texts, unread = pair_set.prompts, pair_set.model.unread
        distinct = sorted(set(texts))
        ends = {text: end for text in distinct if (end := unread(text))}
        check = Findings("length", cut=float(len(ends)))
        message = cut_prompts(distinct, ends.get)
        if message is None:
            return check.fine("The text encoder reads every prompt to its end.")
        kept = Counter(
            plain(text).removesuffix(plain(ends.get(text, ""))).strip() for text in distinct
        )
        alike = sum(count for count in kept.values() if count > 1)
        if alike:
            message += f" {alike} different prompts are read alike."
        return check.notice(
            message,
            "Shorten them, and put what matters first.",
            [index for index, text in enumerate(texts) if text in ends],
        )


@final
class Leakage(PairCheck):
    """The evaluation's prompts are not trained on."""

    share: float = Field(default=0.1, ge=0, lt=1)
    """Share of the evaluation's prompts that may be in the training set."""

    def __call__(self, pair_set: PairSet) -> Finding:
        """The finding."""
        texts, evaluation = pair_set.prompts, pair_set.evaluation_prompts
        trained = {plain(text) for text in texts}
        evaluated = {plain(prompt) for prompt in evaluation}
        shared = sorted(trained & evaluated)
        check = Findings("leakage", shared=float(len(shared)), evaluated=float(len(evaluated)))
        message = f"{len(shared)} of the evaluation's {len(evaluated)} prompts are trained on"
        if len(shared) / max(1, len(evaluated)) > self.share:
            return check.problem(
                f"{message}, such as '{shared[0]}'.",
                "Evaluate on other prompts (--prompts), or leave those pairs out: it would measure "
                "memorisation.",
                [i for i, text in enumerate(texts) if plain(text) in evaluated],
            )
        if shared:
            return check.notice(
                f"{message}, such as '{shared[0]}'.",
                "So few hardly change a result; leave them out before publishing it.",
            )
        return check.fine(f"{message}.")
