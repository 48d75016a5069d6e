"""Prompts for backbones that can show anything."""

from __future__ import annotations

DIVERSE = (
    "a cinematic shot of an old lighthouse at dusk",
    "a drone flies over snowy mountains",
    "water splashes in slow motion",
    "timelapse of clouds over a valley",
    "a walk through a forest in autumn",
    "ocean waves roll onto a beach",
    "a city at night with moving traffic",
    "a fox runs through tall grass",
)


def diverse(n: int) -> list[str]:
    """`n` prompts, of eight diverse ones in turn."""
    return [DIVERSE[i % len(DIVERSE)] for i in range(n)]
