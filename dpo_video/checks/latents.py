"""Checks of latents."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import final

import numpy as np
import torch

from dpo_video.data.audit_checks import listed, share_of
from dpo_video.extensions import Finding, Findings, PairCheck, PairSet, PairSummary

NEAR = 0.01
"""Root mean square difference, in standard deviations of the latents, below which two videos count
as equal: a hundredth of a standard deviation is far below the noise of the lowest noise level."""
SCALES = (0.3, 3.0)
"""Range of the latents' standard deviation. Denoisers are trained near 1; latents with a wrong
scaling factor are far from it."""


@final
class Model(PairCheck):
    """The pairs were encoded for this model and by its weights."""

    def __call__(self, pair_set: PairSet) -> Finding:
        """The finding, which the audit has made already: it decodes no videos of other models."""
        return pair_set.match


@final
class Numbers(PairCheck):
    """All numbers are finite."""

    def __call__(self, pair_set: PairSet) -> Finding:
        """The finding."""
        pairs = pair_set.summaries
        check = Findings("numbers")
        bad = [pair.index for pair in pairs if not pair.finite]
        if not bad:
            return check.fine("No nan and no infinity.")
        return check.problem(
            f"{share_of(bad, pairs)} hold nan or infinity ({listed(bad)}).",
            "Look at their clips, and encode with --set train.mixed_precision=no. Training skips "
            "the steps that use them and stops after train.skips such steps.",
            bad,
        )


@final
class Scale(PairCheck):
    """The latents have the scale that a denoiser is trained on."""

    def __call__(self, pair_set: PairSet) -> Finding:
        """The finding."""
        pairs = pair_set.finite
        typical = float(np.median([pair.scale for pair in pairs])) if pairs else 1.0
        outliers = [pair.index for pair in pairs if not SCALES[0] <= pair.scale <= SCALES[1]]
        check = Findings("scale", standard_deviation=typical)
        if not SCALES[0] <= typical <= SCALES[1]:
            return check.problem(
                f"The latents' standard deviation is {typical:.2g}; denoisers are trained near 1.",
                "Multiply the latents by the scaling factor of the backbone's VAE, once.",
            )
        if outliers:
            return check.notice(
                f"{share_of(outliers, pairs)} have latents of another scale ({listed(outliers)}).",
                "Look at their previews: blank and overexposed videos have such latents.",
                outliers,
            )
        return check.fine(f"Latents have a standard deviation of {typical:.2f}.")


@final
class Difference(PairCheck):
    """The two videos of every pair differ."""

    def __call__(self, pair_set: PairSet) -> Finding:
        """The finding."""
        pairs = pair_set.finite
        typical = float(np.median([pair.distance for pair in pairs])) if pairs else 0.0
        check = Findings("difference", distance=typical)
        same = [pair.index for pair in pairs if pair.distance == 0]
        near = [pair.index for pair in pairs if 0 < pair.distance < NEAR]
        if same:
            return check.problem(
                f"{share_of(same, pairs)} hold the same video twice ({listed(same)}).",
                "Leave them out: their margin is always 0.",
                same,
            )
        if near:
            return check.notice(
                f"The two videos of {share_of(near, pairs)} differ by less than {NEAR:.0%} of "
                f"their contrast ({listed(near)}).",
                "Look at the previews. Stronger noise or a larger region increases the difference.",
                near,
            )
        return check.fine(
            f"Inside their regions the two videos differ by {typical:.0%} of their contrast."
        )


@final
class Duplicates(PairCheck):
    """No pair occurs twice, or with contradicting labels."""

    def __call__(self, pair_set: PairSet) -> Finding:
        """The finding."""
        pairs = pair_set.finite
        check = Findings("duplicates")
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
                f"{share_of(bad, pairs)} occur more than once ({listed(bad)})"
                + (
                    f", {opposed} of them with labels that contradict each other."
                    if opposed
                    else "."
                ),
                "Keep one copy, because repeated pairs count double. Combine contradicting labels "
                "by vote.",
                bad,
            )
        alike = _near_copies(pairs)
        if alike:
            return check.notice(
                f"{share_of(alike, pairs)} look like another pair in both videos "
                f"({listed(alike)}).",
                "Look for copies of a clip under several names.",
                alike,
            )
        videos = Counter(name for pair in pairs for name in set(pair.hashes))
        shared = sum(count > 1 for count in videos.values())
        if shared:
            return Findings("duplicates", videos=float(len(videos))).notice(
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


@final
class Region(PairCheck):
    """The videos are equal outside their region."""

    def __call__(self, pair_set: PairSet) -> Finding:
        """The finding."""
        pairs = pair_set.finite
        check = Findings("region")
        bad = [pair.index for pair in pairs if pair.outside > 0]
        if not bad:
            return check.fine(
                "Outside their regions, if they have any, the videos are bit-identical."
            )
        return check.problem(
            f"The videos of {share_of(bad, pairs)} differ outside their region ({listed(bad)}).",
            "Copy one video's latents there, or mark the region where they really differ.",
            bad,
        )
