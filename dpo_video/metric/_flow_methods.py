"""Optical flow by name: the Lucas-Kanade flow of this package, OpenCV's DIS and Farneback, RAFT."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from safetensors.torch import load_file
from torch import Tensor, nn

from dpo_video.errors import UserError
from dpo_video.metric._flow import Flow, Frames, dense_flow, even_light

FlowMethod = Literal["lucas_kanade", "dis", "farneback", "raft"]
RAFT_MULTIPLE = 8  # RAFT's input sides are multiples of it
RAFT_LEAST = 128  # pixels: its correlation pyramid needs as much


def second_flow(first: str) -> tuple[str, FlowMethod]:
    """Name and key of the flow that checks another one: DIS, or Lucas-Kanade for DIS itself."""
    return ("Lucas-Kanade", "lucas_kanade") if first == "dis" else ("DIS", "dis")


def flow_between(
    method: FlowMethod, first: Frames, second: Frames, *, raft_weights: str = ""
) -> Flow:
    """Optical flow from `first` to `second`, frames in [0, 1], in pixels.

    - `lucas_kanade`: `dense_flow` of the frames in even light, on their own device.
    - `dis`: Kroeger et al. 2016, arXiv 1603.03590, OpenCV's medium preset.
    - `farneback`: Farneback 2003, OpenCV, 5 levels and windows of 15 pixels.
    - `raft`: Teed & Deng 2020, arXiv 2003.12039, torchvision's network with `raft_weights`.

    Raises:
        UserError: OpenCV, torchvision or the weights are missing.
    """
    if method == "lucas_kanade":
        return dense_flow(even_light(first), even_light(second))
    if method == "raft":
        return _raft_flow(first, second, raft_weights)
    return opencv_flow(method, first, second)


def opencv_flow(
    method: Literal["dis", "farneback"],
    first: Frames,
    second: Frames,
    *,
    farneback: tuple[float, int, int, int, int, float, int] = (0.5, 5, 15, 3, 5, 1.2, 0),
) -> Flow:
    """OpenCV's flow of 8-bit gray frames; `farneback` are its arguments, `pyr_scale` onwards."""
    try:
        import cv2
    except ImportError as error:
        raise UserError(
            f"The optical flow '{method}' needs OpenCV. Install it (pip install "
            "opencv-python-headless); flow=lucas_kanade works without it."
        ) from error
    flows = []
    for before, after in zip(_bytes(first), _bytes(second), strict=True):
        if method == "dis":
            solver = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
            flow = solver.calc(before, after, None)
        else:
            flow = cv2.calcOpticalFlowFarneback(before, after, None, *farneback)
        flows.append(torch.from_numpy(flow))
    return torch.stack(flows).movedim(-1, 1).to(first)


def luma(frames: Frames) -> Float[Tensor, "n 1 H W"]:
    """Gray values by the weights of ITU-R BT.601."""
    weights = frames.new_tensor([0.299, 0.587, 0.114])
    return torch.einsum("nchw,c->nhw", frames, weights)[:, None]


def _bytes(frames: Frames) -> list[Any]:
    return list((255 * luma(frames)).round().clamp(0, 255).byte()[:, 0].cpu().numpy())


@torch.no_grad()
def _raft_flow(first: Frames, second: Frames, weights: str) -> Flow:
    """RAFT's flow after 12 updates, in fp32, one pair of frames at a time."""
    network = _load_raft(weights).to(first.device)
    height, width = first.shape[-2:]
    sides = [max(RAFT_LEAST, -(-side // RAFT_MULTIPLE) * RAFT_MULTIPLE) for side in (height, width)]
    pad = (0, sides[1] - width, 0, sides[0] - height)
    flows = []
    for pair in zip(first.split(1), second.split(1), strict=True):
        before, after = (
            2 * nn.functional.pad(frame.float(), pad, mode="replicate") - 1 for frame in pair
        )
        flows.append(network(before, after)[-1][..., :height, :width])
    return torch.cat(flows)


@lru_cache(maxsize=1)
def _load_raft(weights: str) -> nn.Module:
    try:
        from torchvision.models.optical_flow import raft_large, raft_small
    except (ImportError, RuntimeError) as error:
        raise UserError(
            "The optical flow 'raft' needs torchvision. Install the torchvision that belongs to "
            "your torch, or use flow=dis."
        ) from error
    if not weights or not Path(weights).is_file():
        raise UserError(
            f"The optical flow 'raft' needs torchvision's RAFT weights, and '{weights}' is no "
            "file. Download raft_large or raft_small and set raft_weights=PATH, or use flow=dis."
        )
    if weights.endswith(".safetensors"):
        state = load_file(weights)
    else:
        state = torch.load(weights, map_location="cpu", weights_only=True)
    small = state["feature_encoder.convnormrelu.0.weight"].shape[0] == 32
    network: nn.Module = (raft_small if small else raft_large)(weights=None)
    network.load_state_dict(state)
    return network.eval().requires_grad_(False)
