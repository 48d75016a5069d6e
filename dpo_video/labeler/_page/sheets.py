"""Sprite sheets: the frames of a segment as one lossless picture.

Two <video> elements would drift apart, seek to neighbouring frames, and blur the flaws to be judged
by their codec. A sheet holds a segment's frames row by row; the page draws both sides from one
clock.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from typing import final

import numpy as np
from jaxtyping import UInt8
from numpy import ndarray

from dpo_video.data.video_writer import contact_sheet
from dpo_video.strategies import LabelTask
from dpo_video.types import Video

KEEP = 2**30  # bytes of decoded frames in memory: ten pairs of 49 frames at 480x720

Frames = UInt8[ndarray, "F H W 3"]


@final
class SpriteSheets:
    """The sheets of a store: decoded on demand, one pair at a time, with a cache."""

    def __init__(self, task: LabelTask, keep: int = KEEP) -> None:
        self._task = task
        self._keep = keep
        self._pairs: OrderedDict[int, tuple[Frames, Frames]] = OrderedDict()
        self._turn = asyncio.Lock()

    async def get(self, pair: int, segment: int, *, first: bool) -> bytes:
        """The PNG of one segment of the pair's first or second video."""
        async with self._turn:  # one at a time, because decoding occupies the device
            if pair not in self._pairs:
                self._pairs[pair] = await asyncio.to_thread(self._decode, pair)
            self._pairs.move_to_end(pair)
            while len(self._pairs) > 1 and self._size() > self._keep:
                self._pairs.popitem(last=False)
            frames = self._pairs[pair][0 if first else 1]
        return await asyncio.to_thread(sheet, frames[self._task.segments[segment]])

    def _decode(self, pair: int) -> tuple[Frames, Frames]:
        first, second = self._task.videos(pair)
        return eight_bits(first), eight_bits(second)

    def _size(self) -> int:
        return sum(frames.nbytes for pair in self._pairs.values() for frames in pair)


def eight_bits(video: Video) -> Frames:
    """Pixels in [0, 1] as bytes."""
    pixels = video.detach().cpu().float().nan_to_num().mul(255).round().clamp(0, 255)
    return np.ascontiguousarray(pixels.permute(1, 2, 3, 0).numpy().astype(np.uint8))


def sheet(frames: Frames) -> bytes:
    """The PNG of a segment. On the loopback, encoding time matters more than size: level 1."""
    return contact_sheet(frames, level=1)
