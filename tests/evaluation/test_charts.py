"""Axes: what they hold, and their ticks."""

from __future__ import annotations

import math

from hypothesis import example, given
from hypothesis import strategies as st

from dpo_video.evaluation.charts import linear, log2

VALUES = st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=9)


@given(VALUES)
@example([5e-324])
@example([0.0, 5e-324])
def test_a_linear_axis_holds_its_values_in_order(values: list[float]) -> None:
    axis = linear([*values, math.nan], 0.0, 300.0)
    positions = [axis(value) for value in sorted(values)]
    assert positions == sorted(positions)
    assert positions[0] >= 0 and positions[-1] <= 300
    assert 1 <= len(axis.ticks) <= 8
    assert all(0 <= position <= 300 for position, _ in axis.ticks)


@given(st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=9))
def test_a_logarithmic_axis_begins_and_ends_at_a_tick(values: list[float]) -> None:
    axis = log2(values, 300.0, 0.0)
    assert all(0 <= axis(value) <= 300 for value in values)
    assert (axis.ticks[0][0], axis.ticks[-1][0]) == (300, 0)
    assert len(axis.ticks) <= 11


def test_ticks_are_round_numbers() -> None:
    assert [text for _, text in linear([0.0, 1.0], 0, 1, air=0.0).ticks] == [
        "0", "0.25", "0.5", "0.75", "1",
    ]  # fmt: skip
    assert [text for _, text in log2([0.9, 3.0], 0, 1, steps=(1,)).ticks] == ["0.5", "1", "2", "4"]
