"""Adapters on networks of diffusers."""

from __future__ import annotations

from typing import Any

import diffusers


def remove_adapter(network: Any) -> None:
    """Remove an adapter from a network that peft changed in place."""
    diffusers.utils.recurse_remove_peft_layers(network)
    if hasattr(network, "peft_config"):
        del network.peft_config
