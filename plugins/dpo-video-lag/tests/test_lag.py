from __future__ import annotations

import torch
from dpo_video_lag import Lag

from dpo_video.settings import TrainSettings
from dpo_video.testing import StridedModel, check_reference
from dpo_video.training.lora import adapt


def test_it_keeps_the_contract() -> None:
    check_reference(Lag(), StridedModel())
    check_reference(Lag(steps=1), StridedModel())


def test_it_is_renewed_at_once() -> None:
    policy = adapt(StridedModel(), TrainSettings(rank=2), 0)
    reference = Lag(steps=2).attach(policy)
    (weight, *_) = [p for name, p in policy.named_parameters() if ".lora_B" in name]
    seen = []
    for _ in range(4):
        weight.data += 1
        reference.after_step()
        with reference.network():
            seen.append(weight.data.mean().item())
    assert seen == [0, 2, 2, 4] and torch.equal(weight.data, torch.full_like(weight, 4))
