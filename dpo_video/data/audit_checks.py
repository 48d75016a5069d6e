"""What several checks of an audit use."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

from dpo_video.data.store import PairStore
from dpo_video.extensions import Finding, Findings, PairSummary
from dpo_video.strategies import VideoModel, weights_of
from dpo_video.support.reading import composed, one_spaced

FEWEST = 12
"""Smallest number of pairs for a statistic."""
SHOWN = 60
"""Characters of a prompt in a message."""


def model_match(store: PairStore, model: VideoModel) -> Finding:
    """Check that the pairs were encoded for this model and by its weights."""
    check, stored, wanted = Findings("model"), store.manifest, model.shape
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


def plain(text: str) -> str:
    """A prompt for comparisons: in lower case, with single spaces."""
    return one_spaced(composed(text).lower())


def share_of(some: Sequence[int], pairs: Sequence[PairSummary]) -> str:
    """How many of the pairs, in words."""
    return f"{len(some)} of {len(pairs)} pairs"


def listed(some: Sequence[int], most: int = 5) -> str:
    """The first numbers of pairs."""
    return ", ".join(f"{i:05d}" for i in some[:most]) + (", ..." if len(some) > most else "")
