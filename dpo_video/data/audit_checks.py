"""The checks of an audit: each is a function of the pairs' summaries or of their prompts."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from enum import StrEnum
from functools import partial
from types import MappingProxyType

import numpy as np
import torch
from pydantic import Field

from dpo_video.data.audit_stats import PairSummary, held_out_accuracy, statistic_names
from dpo_video.data.store import PairStore
from dpo_video.strategies import VideoModel, weights_of
from dpo_video.support.statistics import Record, paired_difference

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
FLIPS = 200
"""Number of random orders that estimate the chance level of a classifier."""


class Level(StrEnum):
    """Severity of a finding."""

    FINE = "fine"
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


def _finding(
    level: Level,
    check: str,
    message: str,
    advice: str = "",
    pairs: Sequence[int] = (),
    figures: Mapping[str, float] = MappingProxyType({}),
) -> Finding:
    return Finding(check=check, level=level, message=message, advice=advice, pairs=tuple(pairs),
                   figures=dict(figures))  # fmt: skip


_fine = partial(_finding, Level.FINE)
_notice = partial(_finding, Level.NOTICE)
_problem = partial(_finding, Level.PROBLEM)


def model_match(store: PairStore, model: VideoModel) -> Finding:
    """Check that the pairs were encoded for this model and by its weights."""
    stored, wanted = store.manifest, model.shape
    drift = []
    if stored.latent_shape != model.latent_shape:
        drift.append(f"latents of shape {stored.latent_shape} instead of {model.latent_shape}")
    if not math.isclose(stored.fps, wanted.fps, rel_tol=1e-3):
        drift.append(f"{stored.fps:g} frames a second instead of {wanted.fps:g}")
    if weights_of(stored.identity) != weights_of(model.identity):
        drift.append("other weights")
    if not drift:
        return _fine("model", f"Made for this backbone, at {wanted.fps:g} fps.")
    return _problem(
        "model",
        f"The pairs were not made for this backbone: {', '.join(drift)}.",
        "Build them again for it, or name theirs with --backbone and --set backbone....",
    )


def finite(pairs: Sequence[PairSummary]) -> Finding:
    """Check that all numbers are finite."""
    bad = [pair.index for pair in pairs if not pair.finite]
    if not bad:
        return _fine("numbers", "No nan and no infinity.")
    return _problem(
        "numbers",
        f"{_count(bad, pairs)} hold nan or infinity ({_listed(bad)}).",
        "Look at their clips, and encode with --set train.mixed_precision=no. Training skips the "
        "steps that use them and stops after train.skips such steps.",
        bad,
    )


def scale(pairs: Sequence[PairSummary]) -> Finding:
    """Check that the latents have the scale that a denoiser is trained on."""
    typical = float(np.median([pair.scale for pair in pairs])) if pairs else 1.0
    outliers = [pair.index for pair in pairs if not SCALES[0] <= pair.scale <= SCALES[1]]
    figures = {"standard_deviation": typical}
    if not SCALES[0] <= typical <= SCALES[1]:
        return _problem(
            "scale",
            f"The latents' standard deviation is {typical:.2g}; denoisers are trained near 1.",
            "Multiply the latents by the scaling factor of the backbone's VAE, once.",
            figures=figures,
        )
    if outliers:
        return _notice(
            "scale",
            f"{_count(outliers, pairs)} have latents of another scale ({_listed(outliers)}).",
            "Look at their previews: blank and overexposed videos have such latents.",
            outliers,
            figures,
        )
    return _fine("scale", f"Latents have a standard deviation of {typical:.2f}.", figures=figures)


def difference(pairs: Sequence[PairSummary]) -> Finding:
    """Check that the two videos of every pair differ."""
    decided = [pair for pair in pairs if pair.label]
    same = [pair.index for pair in decided if pair.distance == 0]
    near = [pair.index for pair in decided if 0 < pair.distance < NEAR]
    if same:
        return _problem(
            "difference",
            f"{_count(same, pairs)} prefer a video to itself ({_listed(same)}).",
            "Leave them out: their margin is always 0.",
            same,
        )
    if near:
        return _notice(
            "difference",
            f"The two videos of {_count(near, pairs)} differ by less than {NEAR:.0%} of their "
            f"contrast ({_listed(near)}).",
            "Look at the previews. Stronger noise or a larger region increases the difference.",
            near,
        )
    typical = float(np.median([pair.distance for pair in decided])) if decided else 0.0
    return _fine(
        "difference",
        f"Inside their regions the two videos differ by {typical:.0%} of their contrast.",
        figures={"distance": typical},
    )


def duplicates(pairs: Sequence[PairSummary]) -> Finding:
    """Check that no pair occurs twice or with contradicting labels."""
    if len(pairs) < 2:
        return _fine("duplicates", "There are fewer than two pairs to compare.")
    groups: dict[tuple[str, ...], list[PairSummary]] = defaultdict(list)
    for pair in pairs:
        groups[tuple(sorted(pair.hashes))].append(pair)
    repeated = [group for group in groups.values() if len(group) > 1]
    if repeated:
        opposed = sum(len({_chosen_hash(pair) for pair in group}) > 1 for group in repeated)
        bad = sorted(pair.index for group in repeated for pair in group)
        return _problem(
            "duplicates",
            f"{_count(bad, pairs)} occur more than once ({_listed(bad)})"
            + (f", {opposed} of them with labels that contradict each other." if opposed else "."),
            "Keep one copy, because repeated pairs count double. Combine contradicting labels by "
            "vote.",
            bad,
        )
    alike = _near_copies(pairs)
    if alike:
        return _notice(
            "duplicates",
            f"{_count(alike, pairs)} look like another pair in both videos ({_listed(alike)}).",
            "Look for copies of a clip under several names.",
            alike,
        )
    videos = Counter(name for pair in pairs for name in set(pair.hashes))
    shared = sum(count > 1 for count in videos.values())
    if shared:
        return _notice(
            "duplicates",
            f"{shared} videos are in several pairs.",
            "Fine if each clip has several rejected videos; more clips teach more than more "
            "rejected videos.",
            figures={"videos": float(len(videos))},
        )
    return _fine("duplicates", "No two pairs are alike.")


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
    bad = [pair.index for pair in pairs if pair.outside > 0]
    if not bad:
        return _fine("region", "Outside their regions the videos are equal to the bit.")
    return _problem(
        "region",
        f"The videos of {_count(bad, pairs)} differ outside their region ({_listed(bad)}).",
        "Copy one video's latents there, or mark the region where they really differ.",
        bad,
    )


def labels(pairs: Sequence[PairSummary]) -> Finding:
    """Check that the labels are balanced and that few frames are ties."""
    decided = [pair for pair in pairs if pair.label]
    firsts = sum(pair.label > 0 for pair in decided)
    ties = sum(pair.decided == 0 for pair in pairs)
    thin = [pair.index for pair in pairs if 0 < pair.decided <= DECIDED]
    figures = {"first_better": float(firsts), "second_better": float(len(decided) - firsts),
               "ties": float(ties)}  # fmt: skip
    if not any(pair.decided for pair in pairs):
        return _problem(
            "labels",
            "Every pair is a tie, so nothing can be learned.",
            "Label them: dpo-video label PAIRS --labeler NAME.",
            figures=figures,
        )
    counted = f"The first is better in {firsts} pairs, the second in {len(decided) - firsts}; "
    counted += f"{ties} are ties."
    if 2 * ties > len(pairs):
        return _notice(
            "labels",
            counted,
            "Most pairs teach nothing. A labeler with a smaller margin, or pairs that differ more, "
            "leave fewer ties.",
            figures=figures,
        )
    # Builders store the chosen video first. A share in between may be a rater's bias to one side.
    lean = abs(2 * firsts - len(decided)) / math.sqrt(max(1, len(decided)))
    if lean > 3 and 0 < firsts < len(decided):
        return _notice(
            "labels",
            counted,
            "If the order was random, the rater is biased to one side. Ask in both orders.",
            figures=figures,
        )
    if thin:
        return _notice(
            "labels",
            f"{counted} {_count(thin, pairs)} are ties in {1 - DECIDED:.0%} of their frames or "
            f"more ({_listed(thin)}).",
            "DenseDPO leaves such pairs out.",
            thin,
            figures,
        )
    return _fine("labels", counted, figures=figures)


def motion(name: str, values: Sequence[tuple[float, float]]) -> Finding:
    """Check that chosen videos do not move less; `values` is a metric of (chosen, rejected)."""
    check = f"motion ({name})"
    if len(values) < FEWEST:
        return _fine(check, f"{len(values)} decoded pairs are too few to compare.")
    chosen, rejected = np.array(values).T
    gap = paired_difference(rejected, chosen)
    relative = gap.relative if gap.relative is not None else 0.0
    figures = {"chosen": gap.tuned_mean, "rejected": gap.base_mean, "low": gap.low,
               "high": gap.high}  # fmt: skip
    message = (
        f"Chosen videos move at {gap.tuned_mean:.3g}, rejected ones at {gap.base_mean:.3g} "
        f"({relative:+.0%})."
    )
    if gap.high < 0 and relative < -LESS_MOTION:
        return _problem(
            check,
            message,
            "A policy can satisfy these pairs by freezing. Label with a condition on the motion, "
            "or build pairs whose two videos move alike (--pairs local or dense).",
            figures=figures,
        )
    if gap.low > 0 and relative > LESS_MOTION:
        return _notice(check, message, "Fine if more motion is the aim.", figures=figures)
    return _fine(check, message, figures=figures)


def shortcut(pairs: Sequence[PairSummary]) -> Finding:
    """Check whether simple statistics of the latents separate chosen from rejected videos."""
    decided = [pair for pair in pairs if pair.label]
    if len(decided) < FEWEST:
        return _fine("shortcut", f"{len(decided)} decided pairs are too few to tell.")
    rows = np.stack([pair.label * (pair.statistics[0] - pair.statistics[1]) for pair in decided])
    accuracy = held_out_accuracy(rows)
    draw = np.random.default_rng(0)
    # The sign of a row is arbitrary, so randomly flipped rows give the accuracy of chance.
    flipped = [
        held_out_accuracy(rows * draw.choice([-1.0, 1.0], size=(len(rows), 1)))
        for _ in range(FLIPS)
    ]
    low, high = np.quantile(flipped, [0.025, 0.975])
    figures = {"accuracy": accuracy, "chance_low": float(low), "chance_high": float(high)}
    message = (
        f"Simple statistics of the latents predict {accuracy:.0%} of held-out preferences "
        f"(chance: {low:.0%} to {high:.0%})."
    )
    if accuracy <= high:
        return _fine("shortcut", message, figures=figures)
    lean = np.sign(rows).mean(axis=0)
    best = int(np.abs(lean).argmax())
    name = statistic_names((rows.shape[1] - 5) // 2)[best]
    share = float((np.sign(rows[:, best]) == np.sign(lean[best])).mean())
    side = "higher" if lean[best] > 0 else "lower"
    return _notice(
        "shortcut",
        f"{message} The strongest is {name}: {side} in {share:.0%} of the chosen videos.",
        "Fine if that is the aim, as flicker is with jitter; otherwise a shortcut. Check that both "
        "videos of a pair went through the same VAE, codec, size and frame rate.",
        figures={**figures, "share": share},
    )


def prompts(texts: Sequence[str]) -> Finding:
    """Check that the prompts are diverse."""
    counts = Counter(_plain(text) for text in texts)
    figures = {"distinct": float(len(counts))}
    if not counts:
        return _problem(
            "prompts", "There are no pairs.", "Build some: dpo-video build.", figures=figures
        )
    text, most = counts.most_common(1)[0]
    if most * 2 > len(texts) and len(texts) >= FEWEST:
        return _notice(
            "prompts",
            f"{most} of {len(texts)} pairs have the prompt '{text}'.",
            "Fine for one subject; otherwise the policy learns that prompt's look. Add others.",
            figures=figures,
        )
    message = f"{len(counts)} different prompts in {len(texts)} pairs."
    if 2 * len(counts) < len(texts):
        return _notice(
            "prompts",
            message,
            "More prompts generalise better than more pairs of the same ones.",
            figures=figures,
        )
    return _fine("prompts", message, figures=figures)


def leakage(texts: Sequence[str], evaluation: Sequence[str]) -> Finding:
    """Check that the evaluation's prompts are not trained on."""
    trained = {_plain(text) for text in texts}
    evaluated = {_plain(prompt) for prompt in evaluation}
    shared = sorted(trained & evaluated)
    figures = {"shared": float(len(shared)), "evaluated": float(len(evaluated))}
    message = f"{len(shared)} of the evaluation's {len(evaluated)} prompts are trained on"
    if len(shared) / max(1, len(evaluated)) > LEAK:
        return _problem(
            "leakage",
            f"{message}, such as '{shared[0]}'.",
            "Leave those pairs out: the evaluation would measure memorisation.",
            [i for i, text in enumerate(texts) if _plain(text) in evaluated],
            figures,
        )
    if shared:
        return _notice(
            "leakage",
            f"{message}, such as '{shared[0]}'.",
            "So few hardly change a result; leave them out before publishing it.",
            figures=figures,
        )
    return _fine("leakage", f"{message}.", figures=figures)


def _plain(text: str) -> str:
    return " ".join(text.lower().split())


def _count(some: Sequence[int], pairs: Sequence[PairSummary]) -> str:
    return f"{len(some)} of {len(pairs)} pairs"


def _listed(some: Sequence[int], most: int = 5) -> str:
    return ", ".join(f"{i:05d}" for i in some[:most]) + (", ..." if len(some) > most else "")
