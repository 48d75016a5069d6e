"""The embedded text-to-video model: weights, procedural world, and a judge of its videos."""

from pathlib import Path

WEIGHTS = Path(__file__).parent / "weights"
