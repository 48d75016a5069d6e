"""An estimate as rows, as a table, as JSON and in a notebook."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from dpo_video.estimation.modes import MemoryMode
from dpo_video.estimation.results import GIB, Estimate, MemoryEstimate, PhaseEstimate
from dpo_video.estimation.tiers import find_tier

PLAIN = MemoryMode(reference="toggle", checkpointing="none", backward="joint")
SMALL = MemoryMode(
    reference="copy", checkpointing=7, backward="split", forward_chunks=8, offload=("checkpoints",)
)


def an_estimate(asked: MemoryMode = PLAIN, **options: object) -> Estimate:
    common = {"fresh": True, "weights": GIB, "gradients": 0, "optimizer": 0}
    return Estimate.model_validate(
        {
            "model": "<a model>",
            "parameters": 1_000_000,
            "trainable": 1000,
            "rank": 2,
            "latent_shape": (4, 2, 8, 8),
            "blocks": 9,
            "precision": "fp16",
            "pairs": 10,
            "efficiency": 0.35,
            "estimates": (
                MemoryEstimate(mode=PLAIN, activations=20 * GIB, flops=10**15, **common),
                MemoryEstimate(mode=SMALL, activations=2 * GIB, flops=2 * 10**15, host=5, **common),
            ),
            "asked": asked,
            **options,
        }
    )


def test_rows_are_flat_and_name_the_smallest_card() -> None:
    rows = an_estimate(tier=find_tier("t4")).rows()
    assert [row["fits_from"] for row in rows] == ["4090", "t4"]
    assert [(row["fits"], row["asked"]) for row in rows] == [(False, True), (True, False)]
    assert rows[1]["mode"] == "copy 7 blocks split /8 cpu:c"
    for row in rows:
        assert all(isinstance(value, str | int | float | None) for value in row.values())


def test_the_verdict_names_the_flags_of_the_recommended_mode() -> None:
    estimate = an_estimate(tier=find_tier("t4"))
    assert estimate.fits is False and estimate.recommended is estimate.estimates[1]
    assert "does not fit NVIDIA T4" in estimate.verdict
    assert estimate.verdict.endswith(
        "Recommended: --reference copy --set memory.checkpointing=7 --set memory.backward=split "
        "--set memory.forward_chunks=8 --set memory.offload=checkpoints"
    )
    assert an_estimate(SMALL, tier=find_tier("t4")).fits
    assert "--tier" in an_estimate().verdict and an_estimate().fits is None


def test_full_precision_is_said() -> None:
    half, full = an_estimate(), an_estimate(precision="no")
    assert "precision fp16," in half.headline and "fp32" not in half.verdict
    assert "precision fp32 (train.mixed_precision=no)," in full.headline
    assert "trains in fp32" in full.verdict


def test_json_holds_hours_and_fit_on_every_card() -> None:
    found = json.loads(json.dumps(an_estimate(tier=find_tier("t4")).to_dict()))
    assert found["tier"] == "t4" and found["predicted"] is True
    plain, small = found["estimates"]
    assert plain["fits"]["h100"] and not plain["fits"]["t4"] and small["fits"]["t4"]
    assert small["hours"]["t4"] == pytest.approx(2 * plain["hours"]["t4"])


def test_a_notebook_and_a_terminal_show_the_modes() -> None:
    html = an_estimate()._repr_html_()
    assert "&lt;a model&gt;" in html and "<script" not in html and "copy 7 blocks split" in html
    console = Console(file=io.StringIO(), width=80)
    console.print(an_estimate().table())
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "copy 7 blocks split /8 cpu:c" in text and "h (h100)" in text


def test_the_verdict_adds_up_the_hours_and_advises_on_what_does_not_fit() -> None:
    def phase(name: str, gib: int) -> PhaseEstimate:
        return PhaseEstimate(name=name, weights=gib * GIB, activations=0, flops=36 * 10**17)

    tiles = "Use tiles."
    remedies = (("text encoder", "Move it."), (": encode", tiles), (": decode", tiles))
    verdict = an_estimate(
        SMALL, tier=find_tier("t4"), remedies=remedies,
        phases=(phase("build: decode", 30), phase("build: sample", 20), phase("build: encode", 2)),
    ).verdict  # fmt: skip
    # 65 TFLOP/s at 35% of them: 44 hours a phase, and 10 pairs of 2 PFLOP, 0.2 hours.
    assert "The run takes 132.1 hours: 0.2 of steps and 131.9 besides them." in verdict
    assert "2 of 3 parts do not fit; the largest, build: decode, needs 30.6 GiB." in verdict
    assert verdict.count(tiles) == 1 and "Move it." not in verdict
    only_text = an_estimate(
        SMALL, tier=find_tier("t4"), remedies=remedies, phases=(phase("build: text encoder", 30),)
    ).verdict
    assert "Move it." in only_text and tiles not in only_text


def test_what_holds_for_each_of_several_processes_is_said() -> None:
    shared = PLAIN.model_copy(update={"shard": 8})
    need = an_estimate().estimates[0].model_copy(update={"mode": shared})
    estimate = an_estimate(shared, tier=find_tier("a100"), estimates=(need,), parameters=2 * GIB)
    assert "10 pairs of each process" in estimate.headline
    assert "whole model into CPU memory: 4.0 GiB of weights each" in estimate.verdict
    assert "each process" not in an_estimate(tier=find_tier("a100")).verdict


def test_of_cards_of_one_size_the_slower_comes_first() -> None:
    (row,) = an_estimate(estimates=(an_estimate().estimates[0],)).rows()
    big = an_estimate().estimates[0].model_copy(update={"activations": 60 * GIB})
    (large,) = an_estimate(estimates=(big,)).rows()
    assert (row["fits_from"], large["fits_from"]) == ("4090", "a100")
