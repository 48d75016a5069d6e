"""Sums of losses, such as `global+0.1*sft`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dpo_video import registry
from dpo_video.errors import UserError
from dpo_video.loss.global_ import Global
from dpo_video.loss.segment import Segment
from dpo_video.loss.sft import SFT
from dpo_video.testing import check_loss, random_errors
from dpo_video.workflows.config import resolve


def test_a_sum_is_the_weighted_sum_with_the_margin_of_its_comparing_loss() -> None:
    errors = random_errors(change=1e-3)
    for name in ("global+0.1*sft", "0.1*sft+global"):
        loss = registry.strategy("loss", name, **{"global": {"beta": 500}})
        found, alone = loss(errors), Global(beta=500)(errors)
        torch.testing.assert_close(found.loss, alone.loss + 0.1 * SFT()(errors).loss)
        torch.testing.assert_close(found.loss, Global(beta=500, sft_weight=0.1)(errors).loss)
        assert torch.equal(found.margin, alone.margin)
        assert registry.name_of(loss) == name
        check_loss(loss)


def test_a_sum_needs_what_any_of_its_losses_needs() -> None:
    both, free = registry.load("loss", "region+mapo"), registry.load("loss", "mapo+2*sft")
    assert both.needs_reference and both.needs_region and not both.linear_in_mean_error
    assert not free.needs_reference and free.compares and free.linear_in_mean_error
    preference = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    weighed = registry.strategy("loss", "global+segment").pair_weights(preference)
    assert torch.equal(weighed, Segment().pair_weights(preference))


def test_a_run_with_a_sum_is_repeated_from_its_file(tmp_path: Path) -> None:
    config = resolve(
        choices={"loss": "poly+0.5*sft"}, assignments=["loss.poly.alpha=2", "loss.sft.sft_weight=3"]
    )
    assert config.tables["loss"]["poly"]["alpha"] == 2
    (tmp_path / "run.toml").write_text(config.toml())
    assert resolve(file=tmp_path / "run.toml").loss == config.loss
    shown = [option.path for option in registry.options(type(config.loss), "loss")]
    assert "loss.poly.alpha" in shown and "loss.sft.sft_weight" in shown


@pytest.mark.parametrize("name", ["global+", "global+global", "0*sft+global", "global*2", "a b+c"])
def test_what_is_no_sum_is_refused(name: str) -> None:
    with pytest.raises(UserError, match=r"--loss global\+0.1\*sft"):
        registry.load("loss", name)
