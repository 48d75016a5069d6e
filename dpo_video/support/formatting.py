"""Numbers formatted for people, and HTML tables for notebooks."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape

MINUS = "\N{MINUS SIGN}"


def brief(value: float | None) -> str:
    """About three significant digits: `150.3`, `7.20`, `0.693`, `1.2e-4`."""
    if value is None:
        return "n/a"
    if not math.isfinite(value) or value == 0:
        return str(value) if value else "0"
    exponent = math.floor(math.log10(abs(value)))
    if -4 <= exponent < 5:
        text = f"{value:.{max(0, min(5, 2 - exponent), int(exponent == 2))}f}"
    else:
        mantissa, _, power = f"{value:.1e}".partition("e")
        text = f"{mantissa.removesuffix('.0')}e{int(power)}"
    return text.replace("-", MINUS, 1) if value < 0 else text


def option(value: float) -> str:
    """A number as typed on a command line: `3e-5`, `0.001`, `500`."""
    if not 0 < abs(value) < 1e-3:
        return f"{value:g}"
    mantissa, _, power = f"{value:.5e}".partition("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(power)}"


def percent(share: float | None) -> str:
    """A signed percentage, such as `+4.2%`."""
    return "n/a" if share is None else f"{share:+.1%}".replace("-", MINUS)


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
