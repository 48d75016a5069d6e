"""Colours of decoded pictures as SDR of BT.709, the only ones that models know.

HDR is converted by the display light: 203 cd/m2 (reference white, ITU-R BT.2408) becomes SDR's
white, darker tones keep their proportions, and highlights are compressed.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

# Numbers of ITU-T H.273, as ffmpeg has them.
UNSPECIFIED = 2
PQ, HLG = 16, 18
HDR = {PQ: "PQ", HLG: "HLG"}
UNKNOWN_TRANSFERS = {8: "linear light", 9: "log", 10: "log", 17: "SMPTE ST 428"}
UNKNOWN_MATRICES = frozenset({3, 8, 10, 11, 12, 13, 14, 15, 16, 17})  # YCgCo, ICtCp and others
BT709, BT2020, P3 = 1, 9, 12
NEAR_BT709 = frozenset({0, BT709, UNSPECIFIED, 3, 4, 5, 6, 7, 22})
_CHROMATICITIES = {  # of red, green and blue; white is D65
    BT709: ((0.640, 0.330), (0.300, 0.600), (0.150, 0.060)),
    BT2020: ((0.708, 0.292), (0.170, 0.797), (0.131, 0.046)),
    P3: ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060)),
}
CONVERTED = frozenset({BT2020, P3})

WHITE = 203.0  # cd/m2 of reference white in HDR (BT.2408)
PEAK = 1000.0  # cd/m2 of the display that HLG is rendered for (BT.2100)
KNEE = 0.75  # share of white above which highlights are compressed
GAMMA = 2.4  # of an SDR display (BT.1886)
FULL = 65280  # 255 * 256: white of 16-bit pictures from libswscale
ROWS = 64  # converted at once, to bound the memory

Array = NDArray[np.float32]


def to_sdr(
    pixels: NDArray[np.uint16], transfer: int, primaries: int, full: int = FULL
) -> NDArray[np.uint8]:
    """Convert 16-bit RGB `[h w 3]` of HDR or of wider primaries to bytes of SDR.

    Args:
        pixels: The signal as stored; `full` is 1.
        transfer: `PQ`, `HLG`, or any of SDR.
        primaries: `BT2020` or `P3`; any other counts as BT.709, and as BT.2020 in HDR.
        full: The value of 1.
    """
    hdr = transfer in HDR
    if primaries not in CONVERTED:
        primaries = BT2020 if hdr else BT709
    light, matrix = _light(transfer, full), _to_bt709(primaries)
    part: Array
    converted = np.empty(pixels.shape, np.uint8)
    for row in range(0, len(pixels), ROWS):
        part = light[pixels[row : row + ROWS]]
        if transfer == HLG:  # the display's gamma of 1.2 acts on the luminance (BT.2100, table 5)
            luminance = part @ _xyz(primaries)[1]
            part *= np.float32(PEAK / WHITE) * luminance[..., None] ** np.float32(0.2)
        part = np.maximum(part @ matrix.T, 0)
        if hdr:
            part *= _compression(part.max(axis=-1, keepdims=True))
        signal = np.minimum(part, 1) ** np.float32(1 / GAMMA)
        converted[row : row + ROWS] = np.rint(255 * signal).astype(np.uint8)
    return converted


@lru_cache(maxsize=4)
def _light(transfer: int, full: int) -> Array:
    """Light of every 16-bit signal: 1 is white, in HLG the scene's largest value."""
    signal = np.minimum(np.arange(1 << 16) / full, 1)
    if transfer == PQ:  # SMPTE ST 2084, Eq. 4.1
        m1, m2, c1, c2, c3 = 0.1593017578125, 78.84375, 0.8359375, 18.8515625, 18.6875
        root = signal ** (1 / m2)
        light = 10000 / WHITE * (np.maximum(root - c1, 0) / (c2 - c3 * root)) ** (1 / m1)
    elif transfer == HLG:  # the inverse of BT.2100's OETF
        a, b, c = 0.17883277, 0.28466892, 0.55991073
        light = np.where(signal <= 0.5, signal**2 / 3, (np.exp((signal - c) / a) + b) / 12)
    else:
        light = signal**GAMMA
    return light.astype(np.float32)


def _compression(peak: Array) -> Array:
    """Factor of a pixel whose largest channel is `peak`: slope 1 at the knee, never above 1."""
    above = np.maximum(peak - KNEE, 0)
    room = 1 - KNEE
    compressed = (KNEE + room * above / (above + room)) / np.maximum(peak, KNEE)
    return np.where(peak > KNEE, compressed, 1).astype(np.float32)


@lru_cache(maxsize=4)
def _to_bt709(primaries: int) -> Array:
    """Matrix from linear RGB of these primaries to linear RGB of BT.709."""
    return (np.linalg.inv(_xyz(BT709)) @ _xyz(primaries)).astype(np.float32)


@lru_cache(maxsize=4)
def _xyz(primaries: int) -> Array:
    """Matrix from linear RGB to XYZ, whose second row is the luminance (SMPTE RP 177)."""
    columns = np.array([[x / y, 1, (1 - x - y) / y] for x, y in _CHROMATICITIES[primaries]]).T
    white = np.array([0.3127 / 0.3290, 1, (1 - 0.3127 - 0.3290) / 0.3290])
    return (columns * np.linalg.solve(columns, white)).astype(np.float32)
