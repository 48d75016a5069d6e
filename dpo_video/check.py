"""What is wrong with a set of pairs, found before money is spent on training with it.

One pass over the pairs reduces each to a few numbers; every check is a function of those.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from dpo_video.statistics import Record, paired_difference
from dpo_video.store import PairStore
from dpo_video.strategies import Metric, VideoModel, weights_of
from dpo_video.types import PairBatch

NEAR = 0.01
"""Root mean square difference, in standard deviations of the latents, below which two videos are
as good as one: a hundredth of it is what a network sees of a noise at its lowest level."""
SIGNATURE = 4
"""Cells a side, and at most that many frames, that a video is reduced to when pairs are compared
with each other."""
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
FOLDS = 5

Array = NDArray[np.float64]


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


class Audit(Record):
    """All findings, one a check."""

    store: str
    pairs: int
    findings: tuple[Finding, ...]

    @property
    def problems(self) -> int:
        """How many checks found one."""
        return sum(finding.level is Level.PROBLEM for finding in self.findings)


@dataclass(frozen=True, kw_only=True)
class _Pair:
    """What is kept of a pair."""

    index: int
    finite: bool
    winner: int
    """+1 if most frames prefer the first, -1 the second, 0 where they are even."""
    decided: float
    """Share of frames that are no ties."""
    distance: float
    """Between the two videos inside the region, in standard deviations of the first."""
    outside: float
    """Largest difference outside the region."""
    scale: float
    hashes: tuple[str, str]
    signature: Float[Tensor, " k"]
    statistics: tuple[Array, Array]


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
    fit = _fit(store, model)
    pairs: list[_Pair] = []
    moved: dict[str, list[tuple[float, float]]] = defaultdict(list)
    motion = {name: metric for name, metric in metrics.items() if metric.role == "motion"}
    wanted = set(np.linspace(0, len(store) - 1, min(sample, len(store))).round().astype(int))
    for index in range(len(store)):
        batch = store.batch([index])
        pair = _summary(index, batch)
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
    findings = [
        fit,
        _broken(pairs),
        _scale(sound),
        _identical(sound),
        _duplicates(sound),
        _region(sound),
        _labels(sound),
        *(_motion(name, values) for name, values in moved.items()),
        _separable(sound),
        _prompts(texts),
        _leakage(texts, prompts),
    ]
    return Audit(store=store.where, pairs=len(store), findings=tuple(findings))


# --- one pair --------------------------------------------------------------------------------


def _summary(index: int, batch: PairBatch) -> _Pair:
    tensors = (batch.first, batch.second, batch.preference, batch.region, *batch.context.values())
    first, second, region = batch.first[0].float(), batch.second[0].float(), batch.region[0]
    scale = first.std().item()
    difference = first - second
    inside = (region > 0).expand_as(first)
    apart = difference[inside].square().mean().sqrt().item() if inside.any() else 0.0
    labels = batch.preference[0]
    small = torch.nn.functional.adaptive_avg_pool3d(
        torch.stack([first, second]), (min(SIGNATURE, first.shape[1]), SIGNATURE, SIGNATURE)
    )
    return _Pair(
        index=index,
        finite=all(bool(tensor.isfinite().all()) for tensor in tensors),
        winner=int(labels.nan_to_num().sum().sign()),
        decided=(labels != 0).float().mean().item(),
        distance=apart / scale if scale > 0 else 0.0,
        outside=difference[~inside].abs().max().item() if not inside.all() else 0.0,
        scale=scale,
        hashes=(_hash(batch.first), _hash(batch.second)),
        signature=small.flatten(),
        statistics=(statistics(first), statistics(second)),
    )


def _hash(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def statistics(latents: Float[Tensor, "c f h w"]) -> Array:
    """Simple numbers of one video, those of `names`: what a lazy judge might go by."""
    channels = [latents.mean(dim=(1, 2, 3)), latents.std(dim=(1, 2, 3)).log()]
    size = latents.std()
    steps = [latents]
    for _ in range(2):  # first and second differences over time
        steps.append(steps[-1].diff(dim=1) if steps[-1].shape[1] > 1 else steps[-1][:, :0])
    energies = [
        steps[1],
        steps[2],
        torch.cat([latents.diff(dim=2).flatten(), latents.diff(dim=3).flatten()]),
        latents.diff(n=2, dim=3),
    ]
    shares = [
        (part.square().mean().sqrt() / size).clamp_min(1e-6).log() if part.numel() else size * 0
        for part in energies
    ]
    return np.asarray(torch.cat([*channels, torch.stack([size.log(), *shares])]).double())


def names(channels: int) -> list[str]:
    """What `statistics` are of."""
    each = [f"{what} of latent channel {c}" for what in ("mean", "spread") for c in range(channels)]
    return [*each, "overall contrast", "change from frame to frame", "flicker (second difference "
            "over time)", "fine detail (differences between neighbours)", "grain (second "
            "difference in space)"]  # fmt: skip


# --- the checks ------------------------------------------------------------------------------


def _fit(store: PairStore, model: VideoModel) -> Finding:
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


def _broken(pairs: Sequence[_Pair]) -> Finding:
    bad = [pair.index for pair in pairs if not pair.finite]
    if not bad:
        return Finding(check="numbers", level=Level.FINE, seen="No nan and no infinity.")
    return Finding(
        check="numbers",
        level=Level.PROBLEM,
        seen=f"{_count(bad, pairs)} hold nan or infinity ({_listed(bad)}).",
        do="Look at their clips, and encode with --set train.precision=no; one such pair ends a "
        "training.",
        pairs=tuple(bad),
    )


def _scale(pairs: Sequence[_Pair]) -> Finding:
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


def _identical(pairs: Sequence[_Pair]) -> Finding:
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


def _duplicates(pairs: Sequence[_Pair]) -> Finding:
    if len(pairs) < 2:
        return Finding(check="duplicates", level=Level.FINE, seen="Nothing to compare.")
    groups: dict[tuple[str, ...], list[_Pair]] = defaultdict(list)
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


def _better(pair: _Pair) -> str:
    return pair.hashes[0] if pair.winner > 0 else pair.hashes[1] if pair.winner < 0 else ""


def _alike(pairs: Sequence[_Pair]) -> list[int]:
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


def _region(pairs: Sequence[_Pair]) -> Finding:
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


def _labels(pairs: Sequence[_Pair]) -> Finding:
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


def _motion(name: str, values: Sequence[tuple[float, float]]) -> Finding:
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


def _separable(pairs: Sequence[_Pair]) -> Finding:
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


def held_out_accuracy(rows: Array) -> float:
    """Share of pairs that a logistic regression fitted to the others ranks right.

    `rows` are winners' statistics less losers', one row a pair: no intercept, since neither side
    comes first. Folds are interleaved; ties count half.
    """
    size = np.sqrt((rows**2).mean(axis=0))
    scaled = rows / np.where(size > 0, size, 1.0)
    score = 0.0
    for fold in range(FOLDS):
        held = np.arange(len(rows)) % FOLDS == fold
        weights = _logistic(scaled[~held])
        score += float(((np.sign(scaled[held] @ weights) + 1) / 2).sum())
    return score / len(rows)


def _logistic(rows: Array, ridge: float = 1.0, steps: int = 8) -> Array:
    """Weights of least `sum log(1 + exp(-rows w)) + ridge/2 |w|^2`, by Newton's method."""
    weights = np.zeros(rows.shape[1])
    for _ in range(steps):
        wrong = 1 / (1 + np.exp(np.clip(rows @ weights, -30, 30)))
        slope = ridge * weights - rows.T @ wrong
        curve = (rows * (wrong * (1 - wrong))[:, None]).T @ rows + ridge * np.eye(len(weights))
        weights = weights - np.linalg.solve(curve, slope)
    return weights


def _prompts(texts: Sequence[str]) -> Finding:
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


def _leakage(texts: Sequence[str], prompts: Sequence[str]) -> Finding:
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


def _count(some: Sequence[int], pairs: Sequence[_Pair]) -> str:
    return f"{len(some)} of {len(pairs)} pairs"


def _listed(some: Sequence[int], most: int = 5) -> str:
    return ", ".join(f"{i:05d}" for i in some[:most]) + (", ..." if len(some) > most else "")
