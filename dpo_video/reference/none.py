"""No reference."""

from __future__ import annotations

from typing import ClassVar, final

from torch import nn

from dpo_video.strategies import Reference


@final
class NoReference(Reference):
    """No reference: a loss compares the policy's own errors, as with `reference_free` in TRL.

    Saves the reference's forward passes, and nothing holds the policy near the base model. The
    errors of two videos differ far more than the changes of error that losses are made for, so
    lower `loss.beta`. Losses that need no reference (`sft`, `mapo`) have none in any case.
    """

    exact: ClassVar[bool] = False

    def attach(self, policy: nn.Module) -> None:
        """Make none."""
