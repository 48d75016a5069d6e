"""Numbers formatted for people, and tables for terminals and notebooks."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any, Literal

from rich.table import Table
from rich.text import Text

from dpo_video.text import printable, without_credentials

MINUS = "\N{MINUS SIGN}"


def brief(value: float | None, digits: int = 3) -> str:
    """About three significant digits: `150.3`, `7.20`, `0.693`, `1.2e-4`."""
    if value is None:
        return "n/a"
    if not math.isfinite(value) or value == 0:
        return str(value) if value else "0"
    exponent = math.floor(math.log10(abs(value)))
    if -4 <= exponent < 5:
        decimals = max(0, min(digits + 2, digits - 1 - exponent), int(exponent == 2))
        text = f"{value:.{decimals}f}"
    else:
        mantissa, _, power = f"{value:.{digits - 2}e}".partition("e")
        text = f"{mantissa.removesuffix('.0')}e{int(power)}"
    return text.replace("-", MINUS, 1) if value < 0 else text


def counted(number: int, noun: str) -> str:
    """`1 pair`, `2 pairs`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def apart(first: float, second: float) -> tuple[str, str]:
    """Two numbers, brief but with as many digits as tell them apart: at most five."""
    for digits in (3, 4, 5):
        if (texts := (brief(first, digits), brief(second, digits)))[0] != texts[1]:
            return texts
    return brief(first), brief(second)


def option(value: float) -> str:
    """A number as typed on a command line: `3e-5`, `0.001`, `500`."""
    if not 0 < abs(value) < 1e-3:
        return f"{value:g}"
    mantissa, _, power = f"{value:.5e}".partition("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(power)}"


def percent(share: float | None) -> str:
    """A signed percentage, such as `+4.2%`; a small one is not rounded to zero: `+0.02%`."""
    if share is None:
        return "n/a"
    if share == 0:
        return "0.0%"
    text = f"{100 * share:+.1g}%" if abs(share) < 5e-4 else f"{share:+.1%}"
    return text.replace("-", MINUS)


def limit(share: float) -> str:
    """A percentage without sign, as it was set: `3%`, `0.5%`."""
    return f"{100 * share:g}%"


def cell(text: str, style: str = "") -> Text:
    """User text for a table or a terminal: never read as markup, without control characters."""
    return Text(printable(without_credentials(text)), style=style)


def plain_table(
    columns: Sequence[str],
    rows: Iterable[Sequence[str | Text]],
    justify: Literal["left", "right"] = "left",
    **options: Any,
) -> Table:
    """A table without lines, for the terminal; texts are never read as markup."""
    table = Table(box=None, pad_edge=False, header_style="bold", **options)
    for column in columns:
        table.add_column(cell(column), justify=justify)
    for row in rows:
        table.add_row(*(cell(each) if isinstance(each, str) else each for each in row))
    return table


def html_table(columns: Sequence[str], rows: Iterable[Sequence[object]], caption: str = "") -> str:
    """A table for `_repr_html_`; every cell is escaped, and an empty one stands for None."""
    parts = ["<table>"]
    if caption:
        parts.append(f"<caption>{escape(caption)}</caption>")
    parts.append(_html_row("th", columns))
    parts += [_html_row("td", row) for row in rows]
    return "\n".join([*parts, "</table>"])


def _html_row(tag: str, cells: Sequence[object]) -> str:
    texts = ("" if cell is None else escape(str(cell)) for cell in cells)
    return f"<tr>{''.join(f'<{tag}>{text}</{tag}>' for text in texts)}</tr>"
