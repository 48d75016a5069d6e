"""How a pair store is shown: as a table, and with its previews in a notebook."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape
from pathlib import Path

from rich.table import Table

from dpo_video.data.pair_index import PairRecord
from dpo_video.support.formatting import counted, html_table, plain_table

HEADER = ("pair", "prompt", "source", "frames preferred", "region")
SHOWN = 10  # rows of a table
PREVIEWS = 4  # videos in a notebook


def _cells(row: PairRecord) -> tuple[str, ...]:
    first = sum(value > 0 for value in row.preference)
    second = sum(value < 0 for value in row.preference)
    preferred = f"first {first}, second {second} of {len(row.preference)}"
    return (row.key, row.prompt, row.source, preferred, f"{row.region_share:.0%}")


def pair_table(rows: Sequence[PairRecord]) -> Table:
    """The first pairs as a table."""
    caption = f"{counted(len(rows), 'pair')}" + (
        f", the first {SHOWN} shown" if len(rows) > SHOWN else ""
    )
    return plain_table(HEADER, map(_cells, rows[:SHOWN]), caption=caption, caption_justify="left")


def pair_html(where: str, rows: Sequence[PairRecord], previews: Sequence[Path]) -> str:
    """The first pairs as HTML: previews (first, second and region side by side) and a table."""
    videos = "".join(
        '<video autoplay loop muted width="45%" src="data:video/mp4;base64,'
        f'{base64.b64encode(path.read_bytes()).decode()}"></video>'
        for path in previews[:PREVIEWS]
        if path.is_file()
    )
    caption = f"{counted(len(rows), 'pair')} in {where}"
    return f"<p>{escape(caption)}</p>{videos}" + html_table(HEADER, map(_cells, rows[:SHOWN]))
