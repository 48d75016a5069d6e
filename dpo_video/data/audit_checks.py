"""The checks of an audit: each is a function of the pairs' summaries or of their prompts."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from enum import StrEnum
from functools import partialmethod
from pathlib import Path

import numpy as np
import torch
from pydantic import Field

from dpo_video.data.audit_stats import PairSummary, held_out_accuracy, statistic_names
from dpo_video.data.labels import names
from dpo_video.data.store import PairStore
from dpo_video.strategies import VideoModel, weights_of
from dpo_video.support.formatting import counted
from dpo_video.support.reading import composed, one_spaced
from dpo_video.support.statistics import Record, paired_difference
from dpo_video.support.urls import is_url
from dpo_video.text import command, label_command

NEAR = 0.01
"""Root mean square difference, in standard deviations of the latents, below which two videos count
as equal: a hundredth of a standard deviation is far below the noise of the lowest noise level."""
SCALES = (0.3, 3.0)
"""Range of the latents' standard deviation. Denoisers are trained near 1; latents with a wrong
scaling factor are far from it."""
LESS_MOTION = 0.1
"""Share by which chosen videos may move less than rejected ones."""
LEAK = 0.1
"""Share of the evaluation's prompts that may be in the training set."""
DECIDED = 0.2
"""Share of frames that must not be ties for a pair to be worth training on (DenseDPO, Sec. 4.1)."""
FEWEST = 12
"""Smallest number of pairs for a statistic."""
SHOWN = 60
"""Characters of a prompt in a message."""
FLIPS = 200
"""Number of random orders that estimate the chance level of a classifier."""


class Level(StrEnum):
    """Severity of a finding."""

    FINE = "fine"
    UNKNOWN = "unknown"
    """It could not be checked."""
    NOTICE = "notice"
    """Harmless or not, depending on the aim of the training."""
    PROBLEM = "problem"
    """Correct it before training."""


class Finding(Record):
    """The result of one check."""

    check: str
    level: Level
    message: str
    advice: str = ""
    """What to do; empty if all is fine."""
    pairs: tuple[int, ...] = ()
    """Indices of the pairs concerned, if single ones are."""
    figures: dict[str, float] = Field(default_factory=dict)


class _Check:
    """Makes the findings of one check."""

    def __init__(self, name: str, **figures: float) -> None:
        self.name, self.figures = name, figures

    def __call__(
        self, level: Level, message: str, advice: str = "", pairs: Sequence[int] = ()
    ) -> Finding:
        return Finding(check=self.name, level=level, message=message, advice=advice,
                       pairs=tuple(pairs), figures=self.figures)  # fmt: skip

    fine = partialmethod(__call__, Level.FINE)
    unknown = partialmethod(__call__, Level.UNKNOWN)
    notice = partialmethod(__call__, Level.NOTICE)
    problem = partialmethod(__call__, Level.PROBLEM)


def model_match(store: PairStore, model: VideoModel) -> Finding:
    """Check that the pairs were encoded for this model and by its weights."""
    check, stored, wanted = _Check("model"), store.manifest, model.shape
    drift = []
    if stored.latent_shape != model.latent_shape:
        drift.append(f"latents of shape {stored.latent_shape} instead of {model.latent_shape}")
    if not math.isclose(stored.fps, wanted.fps, rel_tol=1e-3):
        drift.append(f"{stored.fps:g} frames a second instead of {wanted.fps:g}")
    if weights_of(stored.identity) != weights_of(model.identity):
        drift.append("other weights")
    if not drift:
        return check.fine(f"Made for this backbone, at {wanted.fps:g} fps.")
    return check.problem(
        f"The pairs were not made for this backbone: {', '.join(drift)}.",
        "Build them again for it, or name theirs with --backbone and --set backbone....",
    )


def finite(pairs: Sequence[PairSummary]) -> Finding:
    """Check that all numbers are finite."""
    check = _Check("numbers")
    bad = [pair.index for pair in pairs if not pair.finite]
    if not bad:
        return check.fine("No nan and no infinity.")
    return check.problem(
        f"{_count(bad, pairs)} hold nan or infinity ({_listed(bad)}).",
        "Look at their clips, and encode with --set train.mixed_precision=no. Training skips the "
        "steps that use them and stops after train.skips such steps.",
        bad,
    )


def scale(pairs: Sequence[PairSummary]) -> Finding:
    """Check that the latents have the scale that a denoiser is trained on."""
    typical = float(np.median([pair.scale for pair in pairs])) if pairs else 1.0
    outliers = [pair.index for pair in pairs if not SCALES[0] <= pair.scale <= SCALES[1]]
    check = _Check("scale", standard_deviation=typical)
    if not SCALES[0] <= typical <= SCALES[1]:
        return check.problem(
            f"The latents' standard deviation is {typical:.2g}; denoisers are trained near 1.",
            "Multiply the latents by the scaling factor of the backbone's VAE, once.",
        )
    if outliers:
        return check.notice(
            f"{_count(outliers, pairs)} have latents of another scale ({_listed(outliers)}).",
            "Look at their previews: blank and overexposed videos have such latents.",
            outliers,
        )
    return check.fine(f"Latents have a standard deviation of {typical:.2f}.")


def difference(pairs: Sequence[PairSummary]) -> Finding:
    """Check that the two videos of every pair differ."""
    typical = float(np.median([pair.distance for pair in pairs])) if pairs else 0.0
    check = _Check("difference", distance=typical)
    same = [pair.index for pair in pairs if pair.distance == 0]
    near = [pair.index for pair in pairs if 0 < pair.distance < NEAR]
    if same:
        return check.problem(
            f"{_count(same, pairs)} hold the same video twice ({_listed(same)}).",
            "Leave them out: their margin is always 0.",
            same,
        )
    if near:
        return check.notice(
            f"The two videos of {_count(near, pairs)} differ by less than {NEAR:.0%} of their "
            f"contrast ({_listed(near)}).",
            "Look at the previews. Stronger noise or a larger region increases the difference.",
            near,
        )
    return check.fine(
        f"Inside their regions the two videos differ by {typical:.0%} of their contrast."
    )


def duplicates(pairs: Sequence[PairSummary]) -> Finding:
    """Check that no pair occurs twice or with contradicting labels."""
    check = _Check("duplicates")
    if len(pairs) < 2:
        return check.unknown("There are fewer than two pairs to compare.")
    groups: dict[tuple[str, ...], list[PairSummary]] = defaultdict(list)
    for pair in pairs:
        groups[tuple(sorted(pair.hashes))].append(pair)
    repeated = [group for group in groups.values() if len(group) > 1]
    if repeated:
        opposed = sum(len({_chosen_hash(pair) for pair in group}) > 1 for group in repeated)
        bad = sorted(pair.index for group in repeated for pair in group)
        return check.problem(
            f"{_count(bad, pairs)} occur more than once ({_listed(bad)})"
            + (f", {opposed} of them with labels that contradict each other." if opposed else "."),
            "Keep one copy, because repeated pairs count double. Combine contradicting labels by "
            "vote.",
            bad,
        )
    alike = _near_copies(pairs)
    if alike:
        return check.notice(
            f"{_count(alike, pairs)} look like another pair in both videos ({_listed(alike)}).",
            "Look for copies of a clip under several names.",
            alike,
        )
    videos = Counter(name for pair in pairs for name in set(pair.hashes))
    shared = sum(count > 1 for count in videos.values())
    if shared:
        return _Check("duplicates", videos=float(len(videos))).notice(
            f"{shared} videos are in several pairs.",
            "Fine if each clip has several rejected videos; more clips teach more than more "
            "rejected videos.",
        )
    return check.fine("No two pairs are alike.")


def _chosen_hash(pair: PairSummary) -> str:
    return pair.hashes[0] if pair.label > 0 else pair.hashes[1] if pair.label < 0 else ""


def _near_copies(pairs: Sequence[PairSummary]) -> list[int]:
    """Pairs whose signature is close to another pair's, compared block by block."""
    signatures = torch.stack([pair.signature for pair in pairs])
    close = NEAR * signatures.std() * math.sqrt(signatures.shape[1])
    copies: set[int] = set()
    for start in range(0, len(pairs), 1024):
        block = signatures[start : start + 1024]
        distances = torch.cdist(block, signatures, compute_mode="donot_use_mm_for_euclid_dist")
        for i, j in (distances < close).nonzero().tolist():
            if start + i != j:
                copies |= {pairs[start + i].index, pairs[j].index}
    return sorted(copies)


def region(pairs: Sequence[PairSummary]) -> Finding:
    """Check that the videos are equal outside their region."""
    check = _Check("region")
    bad = [pair.index for pair in pairs if pair.outside > 0]
    if not bad:
        return check.fine("Outside their regions, if they have any, the videos are bit-identical.")
    return check.problem(
        f"The videos of {_count(bad, pairs)} differ outside their region ({_listed(bad)}).",
        "Copy one video's latents there, or mark the region where they really differ.",
        bad,
    )


def labels(pairs: Sequence[PairSummary], where: str) -> Finding:
    """Check that the labels of the pairs in `where` are balanced and that few frames are ties."""
    decided = [pair for pair in pairs if pair.label]
    firsts = sum(pair.label > 0 for pair in decided)
    ties = sum(pair.decided == 0 for pair in pairs)
    thin = [pair.index for pair in pairs if 0 < pair.decided <= DECIDED]
    check = _Check("labels", first_better=firsts, second_better=len(decided) - firsts, ties=ties)
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
        counted += f" {even} prefer each in as many frames: only the loss segment learns from them."
    if 2 * ties > len(pairs):
        return check.notice(
            counted,
            "Most pairs teach nothing. A labeler with a smaller margin, or pairs that differ more, "
            "leave fewer ties.",
        )
    # Builders store the chosen video first. A share in between may be a rater's bias to one side.
    lean = abs(2 * firsts - len(decided)) / math.sqrt(max(1, len(decided)))
    if lean > 3 and 0 < firsts < len(decided):
        return check.notice(
            counted,
            "If the order was random, the rater is biased to one side. Ask in both orders.",
        )
    if thin:
        return check.notice(
            f"{counted} {_count(thin, pairs)} are ties in {1 - DECIDED:.0%} of their frames or "
            f"more ({_listed(thin)}).",
            "DenseDPO leaves such pairs out.",
            thin,
        )
    return check.fine(counted)


def motion(name: str, values: Sequence[tuple[float, float]]) -> Finding:
    """Check that chosen videos do not move less; `values` is a metric of (chosen, rejected)."""
    check = _Check(f"motion ({name})")
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
    if gap.high < 0 and relative < -LESS_MOTION:
        return check.problem(
            message,
            "A policy can satisfy these pairs by freezing. Label with a condition on the motion, "
            "or build pairs whose two videos move alike (--pairs local or dense).",
        )
    if gap.low > 0 and relative > LESS_MOTION:
        return check.notice(message, "Fine if more motion is the aim.")
    return check.fine(message)


def shortcut(pairs: Sequence[PairSummary]) -> Finding:
    """Check whether simple statistics of the latents separate chosen from rejected videos."""
    check = _Check("shortcut")
    decided = [pair for pair in pairs if pair.label]
    if len(decided) < FEWEST:
        return check.unknown(f"{len(decided)} decided pairs are too few to tell.")
    rows = np.stack([pair.label * (pair.statistics[0] - pair.statistics[1]) for pair in decided])
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
        "Fine if that is the aim, as flicker is with jitter; otherwise a shortcut. Check that both "
        "videos of a pair went through the same VAE, codec, size and frame rate.",
    )


def prompts(texts: Sequence[str]) -> Finding:
    """Check that the prompts are diverse."""
    counts = Counter(_plain(text) for text in texts)
    check = _Check("prompts", distinct=float(len(counts)))
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


def length(texts: Sequence[str], unread: Callable[[str], str]) -> Finding:
    """Check that the text encoder reads the prompts to their ends.

    Args:
        texts: The prompts.
        unread: `VideoModel.unread`.
    """
    distinct = sorted(set(texts))
    ends = {text: end for text in distinct if (end := unread(text))}
    check = _Check("length", cut=float(len(ends)))
    message = cut_prompts(distinct, ends.get)
    if message is None:
        return check.fine("The text encoder reads every prompt to its end.")
    kept = Counter(
        _plain(text).removesuffix(_plain(ends.get(text, ""))).strip() for text in distinct
    )
    alike = sum(count for count in kept.values() if count > 1)
    if alike:
        message += f" {alike} different prompts are read alike."
    return check.notice(
        message,
        "Shorten them, and put what matters first.",
        [index for index, text in enumerate(texts) if text in ends],
    )


def cut_prompts(prompts: Iterable[str], unread: Callable[[str], str | None]) -> str | None:
    """A sentence on the prompts that the text encoder cuts off; None if there are none."""
    distinct = sorted(set(prompts))
    cut = [(text, end) for text in distinct if (end := unread(text))]
    if not cut:
        return None
    text, end = cut[0]
    return (
        f"{len(cut)} of {len(distinct)} prompts are longer than the text encoder reads. Of "
        f"'{_short(text)}' the end is not read: '{_short(end)}'."
    )


def _short(text: str) -> str:
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def leakage(texts: Sequence[str], evaluation: Sequence[str]) -> Finding:
    """Check that the evaluation's prompts are not trained on."""
    trained = {_plain(text) for text in texts}
    evaluated = {_plain(prompt) for prompt in evaluation}
    shared = sorted(trained & evaluated)
    check = _Check("leakage", shared=float(len(shared)), evaluated=float(len(evaluated)))
    message = f"{len(shared)} of the evaluation's {len(evaluated)} prompts are trained on"
    if len(shared) / max(1, len(evaluated)) > LEAK:
        return check.problem(
            f"{message}, such as '{shared[0]}'.",
            "Evaluate on other prompts (--prompts), or leave those pairs out: it would measure "
            "memorisation.",
            [i for i, text in enumerate(texts) if _plain(text) in evaluated],
        )
    if shared:
        return check.notice(
            f"{message}, such as '{shared[0]}'.",
            "So few hardly change a result; leave them out before publishing it.",
        )
    return check.fine(f"{message}.")


def _plain(text: str) -> str:
    return one_spaced(composed(text).lower())


def _count(some: Sequence[int], pairs: Sequence[PairSummary]) -> str:
    return f"{len(some)} of {len(pairs)} pairs"


def _listed(some: Sequence[int], most: int = 5) -> str:
    return ", ".join(f"{i:05d}" for i in some[:most]) + (", ..." if len(some) > most else "")
