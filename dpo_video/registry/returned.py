"""Checks of what strategies return, before it is used: a plugin may return anything."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from dpo_video.errors import PluginError
from dpo_video.registry.attribution import plugin_of
from dpo_video.strategies import VideoModel
from dpo_video.types import Latents, Videos


def called(thing: object) -> str:
    """A strategy, or what one has made, in words: its kind, name, package and version."""
    cls = type(thing)
    if (entry := plugin_of(thing)) is not None:
        return f"The {entry.kind} '{entry.name}' of {entry.distribution}"
    return f"The {getattr(cls, 'kind', 'model')} {cls.__name__} of {cls.__module__}"


def wrong(thing: object, fault: str) -> PluginError:
    """The error for a strategy that has returned something of no use."""
    return PluginError(
        f"{called(thing)} {fault}. Its author must correct it; the checks of dpo_video.testing "
        "find such faults."
    )


def tensor_fault(
    value: object,
    shape: Sequence[int],
    *,
    within: tuple[float, float] | None = None,
    finite: bool = True,
    device: str = "",
) -> str:
    """What is wrong with a returned tensor, as the end of a sentence; "" if nothing is.

    Args:
        value: What was returned.
        shape: The shape that it must have.
        within: The range that its values must be in.
        finite: Whether its values must be finite.
        device: The type of device that it must be on; "" for any.
    """
    if not isinstance(value, Tensor):
        return f"is {'None' if value is None else 'a ' + type(value).__name__}, not a tensor"
    if tuple(value.shape) != tuple(shape):
        return f"has the shape {tuple(value.shape)}, not {tuple(shape)}"
    if not value.is_floating_point():
        return f"has the type {str(value.dtype).removeprefix('torch.')}, not a floating-point one"
    if device and value.device.type != device:
        return f"is on the device {value.device.type}, not on {device}"
    if finite and not value.isfinite().all():
        return "is not finite"
    if within is not None and value.numel():
        low, high = torch.aminmax(value.detach())
        if not (low >= within[0] and high <= within[1]):
            if within[1] == torch.inf:
                return f"is below {within[0]:g}"
            return f"is not in [{within[0]:g}, {within[1]:g}]"
    return ""


def checked(
    thing: object,
    what: str,
    value: Any,
    shape: Sequence[int],
    *,
    within: tuple[float, float] | None = None,
    finite: bool = True,
    device: str = "",
) -> Tensor:
    """A returned value that is a tensor as it must be; arguments as for `tensor_fault`.

    Raises:
        PluginError: names the strategy and what is wrong.
    """
    if fault := tensor_fault(value, shape, within=within, finite=finite, device=device):
        raise wrong(thing, f"returns {what}, a value that {fault}")
    return cast(Tensor, value)


def decoded(model: VideoModel, latents: Latents) -> Videos:
    """Decode scaled latents to pixels, on the model's device. Values may be nan or infinite.

    Raises:
        PluginError: if the videos do not have the model's shape, or finite pixels leave [0, 1].
    """
    videos = model.decode_videos(latents)
    shape = len(latents), 3, model.shape.frames, model.shape.height, model.shape.width
    checked(model, "videos", videos, shape, finite=False)
    if videos.isfinite().all():
        checked(model, "videos", videos, shape, within=(0, 1))
    return videos
