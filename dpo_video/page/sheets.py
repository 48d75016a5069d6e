"""Decoded frames as pictures, lossless.

Not as two <video> elements: those decode apart, drift against each other, seek to neighbouring
frames, and their codec would blur the very flaws to be judged. A sheet holds a segment's frames row
by row; the page draws both sides from one clock.
"""

from __future__ import annotations

import asyncio
import io
import math
from collections import OrderedDict
from typing import final

import numpy as np
from PIL import Image

from dpo_video.strategies import LabelWork
from dpo_video.types import Video

KEEP = 8  # pairs in memory: a few raters, each with what comes next


@final
class Sheets:
    """The pictures of a set, decoded when asked for, one pair at a time."""

    def __init__(self, work: LabelWork) -> None:
        self._work = work
        self._pairs: OrderedDict[int, list[tuple[bytes, bytes]]] = OrderedDict()
        self._turn = asyncio.Lock()

    async def get(self, pair: int, segment: int, *, first: bool) -> bytes:
        """The PNG of one segment of the pair's first or second video."""
        async with self._turn:  # decoding takes a whole device; two at once only take longer
            if pair not in self._pairs:
                self._pairs[pair] = await asyncio.to_thread(self._render, pair)
            self._pairs.move_to_end(pair)
            while len(self._pairs) > KEEP:
                self._pairs.popitem(last=False)
            return self._pairs[pair][segment][0 if first else 1]

    def _render(self, pair: int) -> list[tuple[bytes, bytes]]:
        first, second = self._work.videos(pair)
        return [
            (sheet(first[:, segment]), sheet(second[:, segment])) for segment in self._work.segments
        ]


def columns(frames: int) -> int:
    """Frames in a row of a sheet: about square, as browsers limit a picture's longer side."""
    return math.ceil(math.sqrt(frames))


def sheet(video: Video) -> bytes:
    """Frames side by side in rows of `columns`, as a PNG; unused places stay black."""
    _, frames, height, width = video.shape
    pixels = video.detach().cpu().float().nan_to_num().mul(255).round().clamp(0, 255)
    pictures = pixels.permute(1, 2, 3, 0).numpy().astype(np.uint8)
    wide = columns(frames)
    rows = math.ceil(frames / wide)
    grid = np.zeros((rows * wide, height, width, 3), dtype=np.uint8)
    grid[:frames] = pictures
    picture = grid.reshape(rows, wide, height, width, 3).transpose(0, 2, 1, 3, 4)
    buffer = io.BytesIO()
    # Level 1: on the loopback, time to encode counts for more than bytes.
    Image.fromarray(np.ascontiguousarray(picture.reshape(rows * height, wide * width, 3))).save(
        buffer, "PNG", compress_level=1
    )
    return buffer.getvalue()
