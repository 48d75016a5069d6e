"""What can be wrong with a set of pairs: each check is a function of their summaries or prompts."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from enum import StrEnum

import numpy as np
import torch
from pydantic import Field

from dpo_video.data.audit_stats import Summary, held_out_accuracy, names
from dpo_video.data.store import PairStore
from dpo_video.strategies import VideoModel, weights_of
from dpo_video.support.statistics import Record, paired_difference

NEAR = 0.01
"""Root mean square difference, in standard deviations of the latents, below which two videos are
as good as one: a hundredth of it is what a network sees of a noise at its lowest level."""
SCALES = (0.3, 3.0)
"""Standard deviations of latents that a denoiser is trained on lie near 1; latents multiplied by
the wrong factor, or divided where they should be multiplied, do not."""
STILLER = 0.1
"""Share by which winners may move less than losers."""
LEAK = 0.1
"""Share of the evaluation's prompts that may be trained on."""
DECIDED = 0.2
"""Share of frames that must not be ties for a pair to be worth its time (DenseDPO, Sec. 4.1)."""
FEWEST = 12
"""Pairs without which nothing can be said of a tendency."""
FLIPS = 200
"""Random orders that the chance of a classifier is read off."""


class Level(StrEnum):
    """How bad it is."""

    FINE = "fine"
    NOTICE = "notice"
    """Only you can tell whether it matters."""
    PROBLEM = "problem"
    """Put it right before you train."""


class Finding(Record):
    """What one check saw, in words."""

    check: str
    level: Level
    seen: str
    do: str = ""
    """What to do about it; empty where all is fine."""
    pairs: tuple[int, ...] = ()
    """The pairs concerned, where it is a matter of single ones."""
    figures: dict[str, float] = Field(default_factory=dict)


def fit(store: PairStore, model: VideoModel) -> Finding:
    """Were they made for this model, and by weights that are still its own?"""
    found, wanted = store.manifest, model.shape
    drift = []
    if found.latent_shape != model.latent_shape:
        drift.append(f"latents of shape {found.latent_shape} instead of {model.latent_shape}")
    if not math.isclose(found.fps, wanted.fps, rel_tol=1e-3):
        drift.append(f"{found.fps:g} frames a second instead of {wanted.fps:g}")
    if weights_of(found.identity) != weights_of(model.identity):
        drift.append("other weights")
    if not drift:
        return Finding(check="fit", level=Level.FINE,
                       seen=f"Made for this backbone, at {wanted.fps:g} fps.")  # fmt: skip
    return Finding(
        check="fit",
        level=Level.PROBLEM,
        seen=f"The pairs are not this backbone's: {', '.join(drift)}.",
        do="Build them again for it, or name their own with --backbone and --set backbone....",
    )


def broken(pairs: Sequence[Summary]) -> Finding:
    """Does any hold what is not finite?"""
    bad = [pair.index for pair in pairs if not pair.finite]
    if not bad:
        return Finding(check="numbers", level=Level.FINE, seen="No nan and no infinity.")
    return Finding(
        check="numbers",
        level=Level.PROBLEM,
        seen=f"{_count(bad, pairs)} hold nan or infinity ({_listed(bad)}).",
        do="Look at their clips, and encode with --set train.mixed_precision=no; training "
        "skips the "
        "steps that meet them, and stops after train.skips of those.",
        pairs=tuple(bad),
    )


def scale(pairs: Sequence[Summary]) -> Finding:
    """Do the latents have the spread that a denoiser is trained on?"""
    typical = float(np.median([pair.scale for pair in pairs])) if pairs else 1.0
    flat = [pair.index for pair in pairs if not SCALES[0] <= pair.scale <= SCALES[1]]
    figures = {"standard_deviation": typical}
    if not SCALES[0] <= typical <= SCALES[1]:
        return Finding(
            check="scale",
            level=Level.PROBLEM,
            seen=f"The latents' standard deviation is {typical:.2g}; denoisers are trained near 1.",
            do="Scale them as the backbone's VAE says: multiply by its scaling factor, once.",
            figures=figures,
        )
    if flat:
        return Finding(
            check="scale",
            level=Level.NOTICE,
            seen=f"{_count(flat, pairs)} have latents of another scale than the rest "
            f"({_listed(flat)}).",
            do="Look at their previews: blank or burnt-out videos look like this.",
            pairs=tuple(flat),
            figures=figures,
        )
    return Finding(check="scale", level=Level.FINE, figures=figures,
                   seen=f"Latents have a standard deviation of {typical:.2f}.")  # fmt: skip


def identical(pairs: Sequence[Summary]) -> Finding:
    """Is there a difference to learn from?"""
    decided = [pair for pair in pairs if pair.winner]
    same = [pair.index for pair in decided if pair.distance == 0]
    near = [pair.index for pair in decided if 0 < pair.distance < NEAR]
    if same:
        return Finding(
            check="difference",
            level=Level.PROBLEM,
            seen=f"{_count(same, pairs)} prefer a video to itself ({_listed(same)}).",
            do="Leave them out: their margin is 0 for ever.",
            pairs=tuple(same),
        )
    if near:
        return Finding(
            check="difference",
            level=Level.NOTICE,
            seen=f"The two videos of {_count(near, pairs)} differ by less than {NEAR:.0%} of their "
            f"contrast ({_listed(near)}).",
            do="Look at them. A stronger noise or a larger region makes them differ in more.",
            pairs=tuple(near),
        )
    typical = float(np.median([pair.distance for pair in decided])) if decided else 0.0
    return Finding(
        check="difference",
        level=Level.FINE,
        seen=f"Where they may differ, the two videos do, by {typical:.0%} of their contrast.",
        figures={"distance": typical},
    )


def duplicates(pairs: Sequence[Summary]) -> Finding:
    """Does any come twice, or with another verdict?"""
    if len(pairs) < 2:
        return Finding(check="duplicates", level=Level.FINE, seen="Nothing to compare.")
    groups: dict[tuple[str, ...], list[Summary]] = defaultdict(list)
    for pair in pairs:
        groups[tuple(sorted(pair.hashes))].append(pair)
    twice = [group for group in groups.values() if len(group) > 1]
    if twice:
        opposed = sum(len({_better(pair) for pair in group}) > 1 for group in twice)
        bad = sorted(pair.index for group in twice for pair in group)
        return Finding(
            check="duplicates",
            level=Level.PROBLEM,
            seen=f"{_count(bad, pairs)} are there more than once ({_listed(bad)})"
            + (f", {opposed} of them with labels that contradict each other." if opposed else "."),
            do="Keep one of each, or they weigh double; vote where the labels contradict.",
            pairs=tuple(bad),
        )
    alike = _alike(pairs)
    if alike:
        return Finding(
            check="duplicates",
            level=Level.NOTICE,
            seen=f"{_count(alike, pairs)} look like another one, both videos ({_listed(alike)}).",
            do="Look for copies of a clip under several names.",
            pairs=tuple(alike),
        )
    videos = Counter(name for pair in pairs for name in set(pair.hashes))
    shared = sum(count > 1 for count in videos.values())
    if shared:
        return Finding(
            check="duplicates",
            level=Level.NOTICE,
            seen=f"{shared} videos are in several pairs.",
            do="Fine if several losers were made of each clip; more clips teach more than more "
            "losers.",
            figures={"videos": float(len(videos))},
        )
    return Finding(check="duplicates", level=Level.FINE, seen="No pair is like another.")


def _better(pair: Summary) -> str:
    return pair.hashes[0] if pair.winner > 0 else pair.hashes[1] if pair.winner < 0 else ""


def _alike(pairs: Sequence[Summary]) -> list[int]:
    """Pairs that have a near copy, by their signatures; a block at a time."""
    signatures = torch.stack([pair.signature for pair in pairs])
    close = NEAR * signatures.std() * math.sqrt(signatures.shape[1])
    found: set[int] = set()
    for start in range(0, len(pairs), 1024):
        block = signatures[start : start + 1024]
        distances = torch.cdist(block, signatures, compute_mode="donot_use_mm_for_euclid_dist")
        for i, j in (distances < close).nonzero().tolist():
            if start + i != j:
                found |= {pairs[start + i].index, pairs[j].index}
    return sorted(found)


def region(pairs: Sequence[Summary]) -> Finding:
    """Are the videos equal outside their region?"""
    bad = [pair.index for pair in pairs if pair.outside > 0]
    if not bad:
        return Finding(check="region", level=Level.FINE,
                       seen="Outside their regions the videos are equal to the bit.")  # fmt: skip
    return Finding(
        check="region",
        level=Level.PROBLEM,
        seen=f"The videos of {_count(bad, pairs)} differ outside their region ({_listed(bad)}).",
        do="Copy one video's latents there, or mark the region where they really differ.",
        pairs=tuple(bad),
    )


def labels(pairs: Sequence[Summary]) -> Finding:
    """Do they prefer either side, and enough frames of it?"""
    decided = [pair for pair in pairs if pair.winner]
    firsts = sum(pair.winner > 0 for pair in decided)
    ties = sum(pair.decided == 0 for pair in pairs)
    thin = [pair.index for pair in pairs if 0 < pair.decided <= DECIDED]
    figures = {"first_better": float(firsts), "second_better": float(len(decided) - firsts),
               "ties": float(ties)}  # fmt: skip
    if not any(pair.decided for pair in pairs):
        return Finding(
            check="labels",
            level=Level.PROBLEM,
            seen="Every pair is a tie: there is nothing to learn.",
            do="Label them: dpo-video label PAIRS --labeler NAME.",
            figures=figures,
        )
    counted = f"The first is better in {firsts} pairs, the second in {len(decided) - firsts}; "
    counted += f"{ties} are ties."
    if 2 * ties > len(pairs):
        return Finding(
            check="labels",
            level=Level.NOTICE,
            seen=counted,
            do="Most pairs teach nothing. A labeler with a smaller margin, or pairs that differ in "
            "more, leave fewer ties.",
            figures=figures,
        )
    # Where all winners come first they were stored so; in between, a rater may favour a place.
    lean = abs(2 * firsts - len(decided)) / math.sqrt(max(1, len(decided)))
    if lean > 3 and 0 < firsts < len(decided):
        return Finding(
            check="labels",
            level=Level.NOTICE,
            seen=counted,
            do="If the order was random, the rater favours a place: ask in both orders.",
            figures=figures,
        )
    if thin:
        return Finding(
            check="labels",
            level=Level.NOTICE,
            seen=f"{counted} {_count(thin, pairs)} are ties in {1 - DECIDED:.0%} of their frames "
            f"or more ({_listed(thin)}).",
            do="DenseDPO leaves such pairs out.",
            pairs=tuple(thin),
            figures=figures,
        )
    return Finding(check="labels", level=Level.FINE, seen=counted, figures=figures)


def motion(name: str, values: Sequence[tuple[float, float]]) -> Finding:
    """Do winners move less than losers? `values` are those of a metric, winner and loser."""
    if len(values) < FEWEST:
        return Finding(check=f"motion ({name})", level=Level.FINE,
                       seen=f"{len(values)} decoded pairs are too few to compare.")  # fmt: skip
    winners, losers = np.array(values).T
    gap = paired_difference(losers, winners)
    relative = gap.relative if gap.relative is not None else 0.0
    figures = {"winners": gap.tuned_mean, "losers": gap.base_mean, "low": gap.low, "high": gap.high}
    seen = f"Winners move at {gap.tuned_mean:.3g}, losers at {gap.base_mean:.3g} ({relative:+.0%})."
    if gap.high < 0 and relative < -STILLER:
        return Finding(
            check=f"motion ({name})",
            level=Level.PROBLEM,
            seen=seen,
            do="A policy can win these pairs by freezing. Label with a guard against stillness, or "
            "build pairs whose two videos move alike (--pairs local or dense).",
            figures=figures,
        )
    if gap.low > 0 and relative > STILLER:
        return Finding(
            check=f"motion ({name})",
            level=Level.NOTICE,
            seen=seen,
            do="Fine if more motion is what you want to teach.",
            figures=figures,
        )
    return Finding(check=f"motion ({name})", level=Level.FINE, seen=seen, figures=figures)


def separable(pairs: Sequence[Summary]) -> Finding:
    """Can winners be told from losers by numbers that say nothing of their content?"""
    decided = [pair for pair in pairs if pair.winner]
    if len(decided) < FEWEST:
        return Finding(check="shortcut", level=Level.FINE,
                       seen=f"{len(decided)} decided pairs are too few to tell.")  # fmt: skip
    rows = np.stack([pair.winner * (pair.statistics[0] - pair.statistics[1]) for pair in decided])
    right = held_out_accuracy(rows)
    draw = np.random.default_rng(0)
    # A pair's order says nothing by itself, so flipping pairs at random shows what chance gives.
    flipped = [
        held_out_accuracy(rows * draw.choice([-1.0, 1.0], size=(len(rows), 1)))
        for _ in range(FLIPS)
    ]
    low, high = np.quantile(flipped, [0.025, 0.975])
    figures = {"accuracy": right, "chance_low": float(low), "chance_high": float(high)}
    seen = (
        f"From simple statistics of the latents, {right:.0%} of held-out winners are told from "
        f"their losers (chance: {low:.0%} to {high:.0%})"
    )
    if right <= high:
        return Finding(check="shortcut", level=Level.FINE, seen=f"{seen}.", figures=figures)
    lean = np.sign(rows).mean(axis=0)
    best = int(np.abs(lean).argmax())
    name = names((rows.shape[1] - 5) // 2)[best]
    share = float((np.sign(rows[:, best]) == np.sign(lean[best])).mean())
    return Finding(
        check="shortcut",
        level=Level.NOTICE,
        seen=f"{seen}. They are separable by {name}: {'higher' if lean[best] > 0 else 'lower'} in "
        f"{share:.0%} of the winners.",
        do="Fine if that is what you want to teach, as flicker is with jitter; a shortcut "
        "otherwise. Then see that both videos of a pair took the same path: the same VAE, codec, "
        "size and frame rate.",
        figures={**figures, "share": share},
    )


def prompts(texts: Sequence[str]) -> Finding:
    """Do they say enough different things?"""
    counts = Counter(_plain(text) for text in texts)
    figures = {"distinct": float(len(counts))}
    if not counts:
        return Finding(check="prompts", level=Level.PROBLEM, seen="There are no pairs.",
                       do="Build some: dpo-video build.")  # fmt: skip
    text, most = counts.most_common(1)[0]
    if most * 2 > len(texts) and len(texts) >= FEWEST:
        return Finding(
            check="prompts",
            level=Level.NOTICE,
            seen=f"{most} of {len(texts)} pairs have the prompt '{text}'.",
            do="Fine for one subject; otherwise the policy learns that prompt's look. Add others.",
            figures=figures,
        )
    repeated = len(texts) - len(counts)
    return Finding(
        check="prompts",
        level=Level.NOTICE if 2 * repeated > len(texts) else Level.FINE,
        seen=f"{len(counts)} different prompts in {len(texts)} pairs.",
        do="More prompts generalise better than more pairs of the same ones."
        if 2 * repeated > len(texts)
        else "",
        figures=figures,
    )


def leakage(texts: Sequence[str], prompts: Sequence[str]) -> Finding:
    """Is the evaluation trained on?"""
    trained = {_plain(text) for text in texts}
    evaluated = {_plain(prompt) for prompt in prompts}
    shared = sorted(trained & evaluated)
    share = len(shared) / max(1, len(evaluated))
    figures = {"shared": float(len(shared)), "evaluated": float(len(evaluated))}
    seen = f"{len(shared)} of the evaluation's {len(evaluated)} prompts are trained on"
    if share > LEAK:
        return Finding(
            check="leakage",
            level=Level.PROBLEM,
            seen=f"{seen}, '{shared[0]}' for one.",
            do="Leave those pairs out: the evaluation would measure what was memorised.",
            pairs=tuple(i for i, text in enumerate(texts) if _plain(text) in evaluated),
            figures=figures,
        )
    if shared:
        return Finding(
            check="leakage",
            level=Level.NOTICE,
            seen=f"{seen}, '{shared[0]}' for one.",
            do="So few do not carry a result; leave them out if you publish it.",
            figures=figures,
        )
    return Finding(check="leakage", level=Level.FINE, seen=f"{seen}.", figures=figures)


def _plain(text: str) -> str:
    return " ".join(text.lower().split())


def _count(some: Sequence[int], pairs: Sequence[Summary]) -> str:
    return f"{len(some)} of {len(pairs)} pairs"


def _listed(some: Sequence[int], most: int = 5) -> str:
    return ", ".join(f"{i:05d}" for i in some[:most]) + (", ..." if len(some) > most else "")
