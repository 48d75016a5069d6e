"""The embedded text-to-video model: its procedural world, its training recipe and its weights."""

from pathlib import Path

WEIGHTS = Path(__file__).parent / "weights"
