"""Contract of checks of pair sets."""

from __future__ import annotations

import torch
from torch import Generator

from dpo_video.data.audit import findings_of
from dpo_video.data.audit_stats import summarize
from dpo_video.extensions import Finding, Level, PairCheck, PairSet
from dpo_video.strategies import VideoModel
from dpo_video.testing.contracts import check_options
from dpo_video.testing.laws import contract, law, pure
from dpo_video.testing.strided import StridedModel
from dpo_video.types import PairBatch

_PAIRS = 16


@contract
def check_check(check: PairCheck) -> None:
    """Check that it finds something in words, the same twice, in few, many and bad pairs."""
    check_options(check)
    name, model = type(check).__name__, StridedModel()
    for count, nan in ((0, False), (1, False), (_PAIRS, False), (_PAIRS, True)):
        pair_set = _pair_set(model, count, nan=nan)
        with pure(name):
            found, again = findings_of(check, pair_set), findings_of(check, pair_set)
        law(
            [_text(each) for each in found] == [_text(each) for each in again],
            f"{name} finds something else in the same pairs. Draw from a generator of its own.",
        )
        for finding in found:
            law(finding.check and finding.message, f"{name}'s finding has no name or no message.")
            law(
                finding.level in (Level.FINE, Level.UNKNOWN) or finding.advice,
                f"{name} finds a {finding.level.value} and gives no advice. Say what to do.",
            )
            law(
                all(0 <= pair < count for pair in finding.pairs),
                f"{name}'s finding names a pair that does not exist.",
            )


def _text(finding: Finding) -> str:
    return finding.model_dump_json()


def _pair_set(model: VideoModel, count: int, *, nan: bool) -> PairSet:
    """Random pairs of a model; with `nan`, the first has one."""
    generator = Generator().manual_seed(0)
    prompts = [f"a cat number {index // 2}" for index in range(count)]
    batches = []
    for index, prompt in enumerate(prompts):
        shape = (1, *model.latent_shape)
        first, second = (torch.randn(shape, generator=generator) for _ in range(2))
        if nan and index == 0:
            first[..., 0] = torch.nan
        frames = model.latent_shape[1]
        batches.append(
            PairBatch(
                first=first,
                second=second,
                preference=torch.full((1, frames), float((-1) ** index)),
                region=torch.ones(1, 1, *model.latent_shape[1:]),
                strength=torch.ones(1),
                context=model.encode_prompts([prompt]),
                keys=[f"{index:05d}"],
            )
        )
    return PairSet(
        where="pairs",
        model=model,
        match=Finding(check="model", level=Level.FINE, message="Made for this backbone."),
        summaries=[summarize(index, batch) for index, batch in enumerate(batches)],
        prompts=prompts,
        evaluation_prompts=["a dog"],
        motion={"motion": [(1.0, 1.1)] * count},
        batch=batches.__getitem__,
    )
