"""Weighted sums of losses, made from a name such as `global+0.1*sft`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from typing import Any, ClassVar

import torch
from pydantic import Field, create_model

from dpo_video import registry
from dpo_video.strategies import Loss
from dpo_video.types import LossOutput, PairErrors, PerPair, Preference


class Sum(Loss):
    """Weighted sum of losses. The margin is that of the first one that compares the videos.

    Each loss is an option of its name, whose options are its own: `--set loss.global.beta=500`. The
    pairs weigh as in the first loss that weighs them.
    """

    registered_name: ClassVar[str]
    factors: ClassVar[Mapping[str, float]]

    @property
    def terms(self) -> Mapping[str, Loss]:
        """The losses by name."""
        return {name: getattr(self, name) for name in self.factors}

    def pair_weights(self, preference: Preference) -> PerPair:
        """Those of the first loss that weighs the pairs."""
        for loss in self.terms.values():
            if type(loss).pair_weights is not Loss.pair_weights:
                return loss.pair_weights(preference)
        return super().pair_weights(preference)

    def __call__(self, errors: PairErrors) -> LossOutput:
        """Loss of every pair."""
        outputs = {name: loss(errors) for name, loss in self.terms.items()}
        leading = next((n for n, loss in self.terms.items() if loss.compares), next(iter(outputs)))
        total = torch.stack([self.factors[name] * each.loss for name, each in outputs.items()])
        return replace(outputs[leading], loss=total.sum(dim=0))


@cache
def sum_of(name: str) -> type[Sum]:
    """The class of a sum by its name.

    Raises:
        UserError: for a name that is no sum of different losses, or an unknown loss.
        PluginError: for a loss that cannot be loaded.
    """
    factors = registry.terms(name)
    classes: dict[str, Any] = {part: registry.load("loss", part) for part in factors}
    fields: dict[str, Any] = {
        part: (cls, Field(default_factory=cls, description=f"Options of the loss {part}."))
        for part, cls in classes.items()
    }
    made = create_model("Sum", __base__=Sum, __module__=__name__, __doc__=Sum.__doc__, **fields)
    made.registered_name, made.factors = name, factors
    made.needs_region = any(cls.needs_region for cls in classes.values())
    made.compares = any(cls.compares for cls in classes.values())
    made.needs_reference = any(cls.needs_reference for cls in classes.values())
    made.reference_free = all(cls.reference_free for cls in classes.values())
    made.sees_groups = any(cls.sees_groups for cls in classes.values())
    made.linear_in_mean_error = all(cls.linear_in_mean_error for cls in classes.values())
    return made
