"""Each planted defect is found by its check and by no other; a clean set has no finding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape
from io import StringIO
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor

from dpo_video.backbone.animatediff import AnimateDiffModel
from dpo_video.data.audit import Audit, Level, audit
from dpo_video.data.audit_stats import held_out_accuracy, statistic_names, statistics
from dpo_video.data.store import Manifest, PairStore
from dpo_video.strategies import Metric
from dpo_video.types import Pair

COUNT = 24
EVALUATED = ["a prompt that is kept for the evaluation"]
Change = Callable[[list[Pair]], list[Pair]]


class PixelChange(Metric):
    """Mean change of the pixels: a motion metric for random latents."""

    higher_is_better: ClassVar[bool] = True
    unit: ClassVar[str] = "none"
    role: ClassVar[Literal["target", "motion", "guard"]] = "motion"

    def __call__(self, videos: Tensor, prompts: Sequence[str]) -> Tensor:
        return videos.diff(dim=2).abs().mean(dim=(1, 2, 3, 4))


def clean(shape: tuple[int, int, int, int]) -> list[Pair]:
    """Two videos of one distribution, either of them chosen."""
    draw = torch.Generator().manual_seed(0)
    return [
        Pair(
            first=torch.randn(shape, generator=draw),
            second=torch.randn(shape, generator=draw),
            preference=torch.full(shape[1:2], (1.0, -1.0, -1.0, 1.0)[i % 4]),
            region=torch.ones(1, *shape[1:]),
            prompt=f"prompt number {i}",
            source=f"clip {i}",
        )
        for i in range(COUNT)
    ]


def changed(pair: Pair, **parts: object) -> Pair:
    return Pair(**{**vars(pair), **parts})  # type: ignore[arg-type]


def each(change: Callable[[Pair], Pair], which: Sequence[int] = range(COUNT)) -> Change:
    return lambda pairs: [change(p) if i in which else p for i, p in enumerate(pairs)]


def with_rejected(pair: Pair, change: Callable[[Tensor], Tensor]) -> Pair:
    side = "second" if pair.preference[0] > 0 else "first"
    return changed(pair, **{side: change(getattr(pair, side))})


def broken(latents: Tensor) -> Tensor:
    latents = latents.clone()
    latents[0, 0, 0, 0] = float("nan")
    return latents


def half(pair: Pair) -> Pair:
    region = pair.region.clone()
    region[..., 0] = 0
    return changed(pair, region=region)


def flicker(latents: Tensor) -> Tensor:
    signs = torch.tensor([1.0, -1.0]).repeat(latents.shape[1] // 2)
    return latents + 0.8 * signs[:, None, None]


def still(pair: Pair) -> Pair:
    """The chosen video is nearly a frozen picture."""
    side = "first" if pair.preference[0] > 0 else "second"
    frozen = getattr(pair, side)[:, :1].expand_as(pair.first)
    return changed(pair, **{side: frozen + 0.1 * getattr(pair, side)})


DEFECTS: dict[str, tuple[Change, str, Level, str]] = {
    "nan in a video": (
        each(lambda p: changed(p, second=broken(p.second)), [3, 7]),
        "numbers", Level.PROBLEM, "2 of 24 pairs hold nan or infinity (00003, 00007)",
    ),
    "infinity in a label": (
        each(lambda p: changed(p, preference=p.preference * float("inf")), [5]),
        "numbers", Level.PROBLEM, "1 of 24 pairs",
    ),
    "the wrong scaling factor": (
        each(lambda p: changed(p, first=p.first * 30, second=p.second * 30)),
        "scale", Level.PROBLEM, "standard deviation is 30",
    ),
    "one flat video": (
        each(lambda p: changed(p, first=p.first * 0.1, second=p.second * 0.1), [2]),
        "scale", Level.NOTICE, "1 of 24 pairs have latents of another scale",
    ),
    "a video preferred to itself": (
        each(lambda p: changed(p, second=p.first.clone()), [4]),
        "difference", Level.PROBLEM, "hold the same video twice (00004)",
    ),
    "nearly the same video": (
        each(lambda p: changed(p, second=p.first + 1e-3 * p.second), [4]),
        "difference", Level.NOTICE, "differ by less than 1%",
    ),
    "a pair twice": (
        lambda pairs: [*pairs[:-1], changed(pairs[0], prompt="another")],
        "duplicates", Level.PROBLEM, "occur more than once (00000, 00023).",
    ),
    "a pair twice, the other way round and contradicting itself": (
        lambda pairs: [
            *pairs[:-1],
            changed(pairs[0], first=pairs[0].second, second=pairs[0].first, prompt="another"),
        ],
        "duplicates", Level.PROBLEM, "contradict",
    ),
    "a pair re-encoded": (
        lambda pairs: [*pairs[:-1], changed(pairs[0], first=pairs[0].first + 1e-4)],
        "duplicates", Level.NOTICE, "look like another pair",
    ),
    "a clip in several pairs": (
        lambda pairs: [*pairs[:-1], changed(pairs[-1], first=pairs[0].first)],
        "duplicates", Level.NOTICE, "1 videos are in several pairs",
    ),
    "a difference outside the region": (
        each(half, [1]), "region", Level.PROBLEM, "differ outside their region (00001)",
    ),
    "ties throughout": (
        each(lambda p: changed(p, preference=p.preference * 0)),
        "labels", Level.PROBLEM, "Every pair is a tie",
    ),
    "mostly ties": (
        each(lambda p: changed(p, preference=p.preference * 0), range(13)),
        "labels", Level.NOTICE, "13 are ties",
    ),
    "no defect: the chosen video always stored first": (
        each(lambda p: changed(p, preference=torch.ones_like(p.preference)), range(1, COUNT)),
        "labels", Level.FINE, "The first is better in 24",
    ),
    "a rater who nearly always favours the first": (
        each(lambda p: changed(p, preference=p.preference.abs() * (1 if p.source != "clip 1" else
                                                                   -1))),
        "labels", Level.NOTICE, "The first is better in 23 pairs, the second in 1",
    ),
    "chosen videos that stand still": (
        each(still), "motion (change)", Level.PROBLEM, "Chosen videos move at",
    ),
    "rejected videos that flicker": (
        each(lambda p: with_rejected(p, flicker)),
        "shortcut", Level.NOTICE, "lower in 100% of the chosen",
    ),
    "one prompt for most": (
        each(lambda p: changed(p, prompt="A cat."), range(13)),
        "prompts", Level.NOTICE, "13 of 24 pairs have the prompt 'a cat.'",
    ),
    "few prompts": (
        each(lambda p: changed(p, prompt=p.prompt[-1])), "prompts", Level.NOTICE, "10 different",
    ),
    "prompts longer than the text encoder reads": (
        each(lambda p: changed(p, prompt=f"{'a red square ' * 60} {p.prompt}"), [2, 5]),
        "length", Level.NOTICE,
        "2 of 24 prompts are longer than the text encoder reads. Of 'a red square",
    ),
    "a prompt of the evaluation": (
        each(lambda p: changed(p, prompt=EVALUATED[0].upper() + " "), [6]),
        "leakage", Level.PROBLEM, "1 of the evaluation's 1 prompts",
    ),
}  # fmt: skip
# Checks that a defect rightly triggers as well.
ALSO = {
    "chosen videos that stand still": {"shortcut"},
    "rejected videos that flicker": {"motion (change)"},
    "a prompt of the evaluation": {"length"},  # in capitals, which the small vocabulary spells
}


def audited(
    model: AnimateDiffModel, folder: Path, pairs: Sequence[Pair], fps: float = 8.0
) -> Audit:
    manifest = Manifest(
        recipe={}, identity=model.identity, latent_shape=model.latent_shape, fps=fps
    )
    store = PairStore.create(folder, manifest)
    context = model.encode_prompts(["a"])
    for pair in pairs:
        store.append(pair, context)
    return audit(store, model, {"change": PixelChange()}, EVALUATED)


def test_a_clean_set_has_no_finding(small_model: AnimateDiffModel, tmp_path: Path) -> None:
    found = audited(small_model, tmp_path / "pairs", clean(small_model.latent_shape))
    assert [f for f in found.findings if f.level is not Level.FINE] == []
    assert found.problems == 0 and found.pairs == COUNT
    assert Audit.model_validate_json(found.model_dump_json()) == found
    checks = {"model", "numbers", "scale", "difference", "duplicates", "region", "labels",
              "motion (change)", "shortcut", "prompts", "length", "leakage"}  # fmt: skip
    assert {f.check for f in found.findings} == checks


@pytest.mark.parametrize("name", DEFECTS)
def test_a_planted_defect_is_found(
    name: str, small_model: AnimateDiffModel, tmp_path: Path
) -> None:
    change, check, level, words = DEFECTS[name]
    found = audited(small_model, tmp_path / "pairs", change(clean(small_model.latent_shape)))
    finding = next(f for f in found.findings if f.check == check)
    assert finding.level is level and words in finding.message
    assert bool(finding.advice) == (level is not Level.FINE)
    harmless = (Level.FINE, Level.UNKNOWN)
    others = {f.check for f in found.findings if f.level not in harmless} - {check}
    assert others <= ALSO.get(name, set())


def test_an_audit_shows_itself(small_model: AnimateDiffModel, tmp_path: Path) -> None:
    found = audited(small_model, tmp_path / "pairs", clean(small_model.latent_shape)[:2])
    console = Console(width=200, file=StringIO())
    console.print(found.table())
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    html = found._repr_html_()
    for finding in found.findings:
        assert finding.message in shown and escape(finding.message) in html
    assert found.summary == "2 pairs: no problem, 0 worth a look."
    assert Audit.model_validate(found.to_dict()) == found


def test_pairs_of_another_frame_rate_or_shape_are_found(
    small_model: AnimateDiffModel, tmp_path: Path
) -> None:
    pairs = clean(small_model.latent_shape)[:2]
    found = audited(small_model, tmp_path / "pairs", pairs, fps=24.0)
    assert found.findings[0].level is Level.PROBLEM
    assert "24 frames a second instead of 8" in found.findings[0].message
    small_model.identity = "another"
    store = PairStore(tmp_path / "pairs")
    found = audit(store, small_model, {}, EVALUATED)
    assert "other weights" in found.findings[0].message and found.problems == 1


def test_a_lost_line_is_noticed(small_model: AnimateDiffModel, tmp_path: Path) -> None:
    audited(small_model, tmp_path / "pairs", clean(small_model.latent_shape))
    store = PairStore(tmp_path / "pairs")
    lines = (store.folder / "pairs.jsonl").read_bytes().splitlines(keepends=True)
    (store.folder / "pairs.jsonl").write_bytes(b"".join([*lines[:1], *lines[2:]]))
    found = audit(PairStore(store.folder), small_model, {}, [], checks=[])
    (finding,) = found.findings
    assert finding.level is Level.NOTICE
    assert f"{COUNT - 1} files of latents belong to no pair" in finding.message  # after the gap


def test_an_empty_set_is_a_problem(small_model: AnimateDiffModel, tmp_path: Path) -> None:
    assert audited(small_model, tmp_path / "pairs", []).problems


def test_the_classifier_learns_what_can_be_learned_and_no_more() -> None:
    draw = np.random.default_rng(1)
    noise = draw.normal(size=(200, 8))
    assert abs(held_out_accuracy(noise) - 0.5) < 0.1
    assert held_out_accuracy(noise + np.eye(8)[2] * 2) > 0.9
    # No single number separates them; two together do.
    shared = draw.normal(size=200) * 10
    both = np.stack([shared + 1, -shared + 1], axis=1) + draw.normal(size=(200, 2)) * 0.1
    assert held_out_accuracy(both) > 0.95


def test_statistics_distinguish_flicker_from_grain() -> None:
    draw = torch.Generator().manual_seed(0)
    smooth = torch.nn.functional.interpolate(
        torch.randn(1, 4, 4, 4, 4, generator=draw), size=(16, 16, 16), mode="trilinear"
    )[0]
    base = dict(zip(statistic_names(4), statistics(smooth), strict=True))
    flickering = dict(zip(statistic_names(4), statistics(flicker(smooth)), strict=True))
    grainy = smooth + 0.3 * torch.randn(4, 1, 16, 16, generator=draw)
    grained = dict(zip(statistic_names(4), statistics(grainy), strict=True))
    over_time = "flicker (second difference over time)"
    in_space = "grain (second difference in space)"
    assert flickering[over_time] > base[over_time] + 1 and grained[over_time] < base[over_time]
    assert grained[in_space] > base[in_space] + 1 and flickering[in_space] < base[in_space]
