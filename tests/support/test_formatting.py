from __future__ import annotations

import math

import pytest

from dpo_video.support.formatting import apart, brief, html_table, limit, option, percent


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (150.32, "150.3"), (7.2, "7.20"), (math.log(2), "0.693"), (-0.00012, "\u22120.00012"),
        (1.24e-5, "1.2e-5"), (2500.0, "2500"), (123456.0, "1.2e5"), (0.0, "0"), (math.nan, "nan"),
        (None, "n/a"),
    ],
)  # fmt: skip
def test_numbers_are_brief(value: float | None, text: str) -> None:
    assert brief(value) == text


def test_shares_and_options_read_as_typed() -> None:
    assert (percent(-0.2574), percent(0.042)) == ("\u221225.7%", "+4.2%")
    assert (percent(-0.00031), percent(1e-8), percent(-0.0)) == (
        "\u22120.03%",
        "+1e\u221206%",
        "0.0%",
    )
    assert (limit(0.03), limit(0.005)) == ("3%", "0.5%")
    assert (option(3e-5), option(1e-3), option(2500.0)) == ("3e-5", "0.001", "2500")


def test_numbers_are_told_apart_if_five_digits_do_it() -> None:
    assert apart(29.7, 28.1) == ("29.7", "28.1")
    assert apart(29.7, 29.69) == ("29.70", "29.69")
    assert apart(29.7, 29.7001) == ("29.7", "29.7")
    assert apart(1.24e-5, 1.241e-5) == ("1.240e-5", "1.241e-5")
    assert apart(1.0, 1.0) == ("1.00", "1.00")


def test_an_html_table_escapes_its_cells() -> None:
    text = html_table(["a<b"], [["<script>"], [None], [1.5]], caption="x & y")
    assert "<caption>x &amp; y</caption>" in text and "<th>a&lt;b</th>" in text
    assert "<td>&lt;script&gt;</td>" in text and "<td></td>" in text and "<td>1.5</td>" in text
