"""The page of an evaluation, read as HTML."""

from __future__ import annotations

import base64
import hashlib
import math
import re
from html.parser import HTMLParser

import pytest
from small_evaluation import HOSTILE, a_clip, a_hostile_evaluation, a_training, an_evaluation

from dpo_video.evaluation.verdict import MetricResult, Role
from dpo_video.training.diagnosis import judge_training


@pytest.fixture(scope="module")
def hostile() -> str:
    evaluation = a_hostile_evaluation()
    return evaluation.html([(a_clip(), a_clip())] * len(evaluation.prompts))


class Page(HTMLParser):
    """Every element with its attributes, and all text outside of script and style."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self._inside = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._inside = tag

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside not in ("script", "style"):
            self.words.append(data)


def test_hostile_text_is_shown_as_text(hostile: str) -> None:
    page = Page(hostile)
    assert sum(tag == "script" for tag, _ in page.elements) == 1
    assert not [tag for tag, _ in page.elements if tag in ("img", "iframe", "object", "embed")]
    names = {name for _, attributes in page.elements for name in attributes}
    assert not {name for name in names if name.startswith("on")}
    assert HOSTILE in "".join(page.words)
    labels = [attributes.get("aria-label") for tag, attributes in page.elements if tag == "video"]
    assert f"base: {HOSTILE}" in labels


def test_the_page_loads_nothing_from_elsewhere(hostile: str) -> None:
    html = hostile
    for _, attributes in Page(html).elements:
        for name in ("src", "data-src", "href", "poster", "srcset", "action"):
            value = attributes.get(name) or "#"
            assert value.startswith(("#", "data:")), f"{name}={value[:60]}"
    assert not re.search(r"https?:|//[a-z]+\.[a-z]|@import|url\((?!#)", html)


def test_only_the_pages_own_script_is_allowed(hostile: str) -> None:
    html = hostile
    (script,) = re.findall(r"<script>(.*?)</script>", html, flags=re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = next(a["content"] for t, a in Page(html).elements if t == "meta" and "content" in a)
    assert policy is not None
    assert policy.startswith("default-src 'none'")
    assert f"script-src 'sha256-{digest}';" in policy


def test_the_page_shows_every_finding() -> None:
    evaluation = an_evaluation([f"prompt {i}" for i in range(47)])
    html = evaluation.html()
    text = " ".join(Page(html).words)
    assert evaluation.verdict.headline in text
    assert evaluation.training_verdict is not None
    for sentence in (*evaluation.verdict.details, evaluation.training_verdict.seen):
        assert sentence in text
    for wanted in ("ln 2", "base 41.2, tuned 40.7", "[loss]", "2.13.0", evaluation.command):
        assert wanted in text
    assert evaluation.html() == html  # it is deterministic


def test_a_diverged_run_has_a_page() -> None:
    broken = [
        report.model_copy(update={"loss": math.nan, "margin": math.nan, "grad_norm": math.inf})
        for report in a_training(3)
    ]
    evaluation = an_evaluation(["a", "b", "c"]).model_copy(
        update={"training": tuple(broken), "training_verdict": judge_training(broken)}
    )
    html = evaluation.html()
    drawn = "".join(
        value or ""
        for _, attributes in Page(html).elements
        for name, value in attributes.items()
        if name in ("d", "x", "y", "x1", "y1", "width", "height")
    )
    assert not re.search("nan|inf", drawn)
    assert "Diverged" in html


def test_a_page_without_training_or_relative_changes() -> None:
    zeros = MetricResult.measured(
        "m", [0, 0, 0], [0, 0, 0], unit="", higher_is_better=True, role=Role.TARGET
    )
    evaluation = an_evaluation(["a", "b", "c"]).model_copy(
        update={"metrics": (zeros,), "training": (), "training_verdict": None}
    )
    assert "n/a" in evaluation.html()


def test_there_is_one_pair_of_videos_per_prompt() -> None:
    with pytest.raises(ValueError, match="2 pairs of videos for 3 prompts"):
        an_evaluation(["a", "b", "c"]).html([(b"", b"")] * 2)
