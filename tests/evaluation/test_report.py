from __future__ import annotations

import base64
import hashlib
import io
import itertools
import json
import math
import os
import re
import select
import shlex
import shutil
import subprocess
import time
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from rich.console import Console

from dpo_video.errors import UserError
from dpo_video.evaluation.report import render_evaluation
from dpo_video.evaluation.results import Evaluation, evaluation_table
from dpo_video.evaluation.verdict import MetricResult, Role, judge_evaluation
from dpo_video.training.diagnosis import StepReport, judge_training

FRAMES, FPS = 16, 8.0
HOSTILE = "</script><script>alert(1)</script> \"onerror='alert(2)' <img src=x onerror=alert(3)>"


def a_training(steps: int = 60, seed: int = 0) -> list[StepReport]:
    """A run that learns, with the noise of four pairs a step."""
    rng = np.random.default_rng(seed)
    reports = []
    for step in range(1, steps + 1):
        grown = 2 * (1 - math.exp(-(step - 1) / 40))
        logits = (grown + rng.normal(0, 0.5, 4)) if step > 1 else np.zeros(4)
        reports.append(
            StepReport(
                step=step,
                loss=float(np.log1p(np.exp(-logits)).mean()),
                margin=float(logits.mean()) / 2500,
                logits=float(logits.mean()),
                accuracy=float((logits > 0).mean()) if step > 1 else 0.5,
                chosen_change=-0.1 * float(logits.mean()) / 2500,
                rejected_change=0.9 * float(logits.mean()) / 2500,
                gradient_factor=float((1 / (1 + np.exp(logits))).mean()),
                loser_dominant=0.25 * float(rng.integers(0, 3)),
                grad_norm=float(rng.lognormal(-1, 0.4)),
                lr=1e-4 * min(1, step / 10),
                pairs_per_second=3.1,
                memory_gib=1.4,
                seconds=1.3 * step,
                eta_seconds=1.3 * (steps - step),
            )
        )
    return reports


def an_evaluation(prompts: list[str], *, still: bool = False, seed: int = 1) -> Evaluation:
    """Base and tuned on `prompts`: smoother, and with `still` it also moves less."""
    rng = np.random.default_rng(seed)
    n = len(prompts)
    warp = rng.lognormal(5, 0.35, n)
    difference = rng.lognormal(2, 0.25, n)
    motion = rng.lognormal(-3.2, 0.4, n)
    sharp = rng.normal(0.31, 0.05, n)
    match = rng.beta(8, 2, n)
    kept = 0.8 if still else 0.995
    metrics = (
        MetricResult.measured(
            "warp_error", list(warp), list(warp * rng.normal(0.74, 0.16, n)),
            unit="MSE, 0-255", higher_is_better=False, role=Role.TARGET,
        ),
        MetricResult.measured(
            "frame_difference", list(difference), list(difference * rng.normal(0.82, 0.1, n)),
            unit="0-255", higher_is_better=False, role=Role.TARGET,
        ),
        MetricResult.measured(
            "dynamic_degree", list(motion), list(motion * rng.normal(kept, 0.06, n)),
            unit="share of the diagonal", higher_is_better=True, role=Role.MOTION,
        ),
        MetricResult.measured(
            "sharpness", list(sharp), list(sharp * rng.normal(1.0, 0.04, n)),
            unit="", higher_is_better=True, role=Role.GUARD,
        ),
        MetricResult.measured(
            "caption_match", list(match), list(np.clip(match + rng.normal(0, 0.05, n), 0, 1)),
            unit="probability", higher_is_better=True, role=Role.GUARD,
        ),
    )  # fmt: skip
    training = a_training()
    return Evaluation(
        name="runs/local-region",
        prompts=tuple(prompts),
        seeds=tuple(range(n)),
        frames=FRAMES,
        fps=FPS,
        metrics=metrics,
        tolerance=0.03,
        verdict=judge_evaluation(metrics),
        training=tuple(training),
        training_verdict=judge_training(training, slope=2500, steps=60),
        command="dpo-video evaluate runs/local-region --set evaluate.seeds=47",
        run_toml='[loss]\nname = "region"\nbeta = 2500.0\n',
        versions={"dpo-video": "0.1.0", "torch": "2.13.0"},
        facts={"Frechet distance to 64 real clips": "base 41.2, tuned 40.7"},
    )


def encode(frames: np.ndarray) -> bytes:
    """An h264 mp4 of `F H W 3` uint8 frames."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=int(FPS))
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return buffer.getvalue()


@pytest.fixture(scope="module")
def clip() -> bytes:
    frames = np.zeros((FRAMES, 32, 32, 3), dtype=np.uint8)
    for index in range(FRAMES):
        frames[index, :, : 2 * index + 2] = 255
    return encode(frames)


@pytest.fixture(scope="module")
def hostile(clip: bytes) -> tuple[Evaluation, str]:
    """An evaluation with other people's text everywhere that text can come from."""
    prompts = ["a red circle moving left", HOSTILE, *(f"prompt {i}" for i in range(10))]
    evaluation = an_evaluation(prompts).model_copy(
        update={
            "name": HOSTILE,
            "command": HOSTILE,
            "run_toml": HOSTILE,
            "versions": {HOSTILE: HOSTILE},
            "facts": {HOSTILE: HOSTILE},
        }
    )
    return evaluation, render_evaluation(evaluation, [(clip, clip)] * len(prompts))


# --- what is kept ----------------------------------------------------------------------------


def test_json_gives_an_equal_evaluation_back() -> None:
    evaluation = an_evaluation(["one", HOSTILE, "three"])
    assert Evaluation.from_json(evaluation.to_json()) == evaluation


def test_json_keeps_values_that_are_not_finite_and_stays_valid() -> None:
    values = [1.0, math.nan, math.inf, 2.0]
    metric = MetricResult.measured(
        "m", values, [2.0] * 4, unit="", higher_is_better=True, role=Role.TARGET
    )
    evaluation = an_evaluation(["a", "b", "c", "d"]).model_copy(update={"metrics": (metric,)})

    def refuse(name: str) -> float:
        raise AssertionError(f"{name} is not JSON")

    json.loads(evaluation.to_json(), parse_constant=refuse)
    back = Evaluation.from_json(evaluation.to_json()).metrics[0]
    np.testing.assert_equal(back.base, values)
    assert back.difference.pairs == 2


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"name": 3}'])
def test_what_is_not_an_evaluation_is_refused_in_a_sentence(text: str) -> None:
    with pytest.raises(UserError, match=r"This is not an evaluation .* evaluate again"):
        Evaluation.from_json(text)


def test_lengths_must_agree() -> None:
    whole = an_evaluation(["a", "b", "c"])
    with pytest.raises(ValueError, match="3 prompts"):
        Evaluation(**{**dict(whole), "seeds": (1, 2)})
    with pytest.raises(ValueError, match="2 pairs of videos for 3 prompts"):
        render_evaluation(whole, [(b"", b"")] * 2)


# --- the terminal ----------------------------------------------------------------------------


def test_the_table_says_it_in_words() -> None:
    evaluation = an_evaluation([f"prompt {i}" for i in range(47)])
    console = Console(width=140, file=io.StringIO(), color_system=None)
    console.print(evaluation_table(evaluation))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert evaluation.verdict.headline in text
    (line,) = (line for line in text.splitlines() if "warp error" in line)
    assert "better" in line and "lower" in line and "%" in line
    (line,) = (line for line in text.splitlines() if "caption match" in line)
    assert "unclear" in line


def test_the_table_takes_names_literally() -> None:
    metric = MetricResult.measured(
        "[red]x[/nope]", [1, 2, 3], [2, 3, 5], unit="[b]", higher_is_better=True, role=Role.TARGET
    )
    evaluation = an_evaluation(["a", "b", "c"]).model_copy(update={"metrics": (metric,)})
    console = Console(width=140, file=io.StringIO(), color_system=None)
    console.print(evaluation_table(evaluation))
    assert "[red]x[/nope]" in console.file.getvalue()  # type: ignore[attr-defined]


# --- the page, read --------------------------------------------------------------------------


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


def test_hostile_text_is_shown_and_does_nothing(hostile: tuple[Evaluation, str]) -> None:
    page = Page(hostile[1])
    assert sum(tag == "script" for tag, _ in page.elements) == 1
    assert not [tag for tag, _ in page.elements if tag in ("img", "iframe", "object", "embed")]
    names = {name for _, attributes in page.elements for name in attributes}
    assert not {name for name in names if name.startswith("on")}
    assert HOSTILE in "".join(page.words)
    labels = [attributes.get("aria-label") for tag, attributes in page.elements if tag == "video"]
    assert f"base: {HOSTILE}" in labels


def test_the_page_needs_nothing_from_elsewhere(hostile: tuple[Evaluation, str]) -> None:
    html = hostile[1]
    for _, attributes in Page(html).elements:
        for name in ("src", "data-src", "href", "poster", "srcset", "action"):
            value = attributes.get(name) or "#"
            assert value.startswith(("#", "data:")), f"{name}={value[:60]}"
    assert not re.search(r"https?:|//[a-z]+\.[a-z]|@import|url\((?!#)", html)


def test_only_the_pages_own_script_is_allowed(hostile: tuple[Evaluation, str]) -> None:
    html = hostile[1]
    (script,) = re.findall(r"<script>(.*?)</script>", html, flags=re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = next(a["content"] for t, a in Page(html).elements if t == "meta" and "content" in a)
    assert policy is not None
    assert policy.startswith("default-src 'none'")
    assert f"script-src 'sha256-{digest}';" in policy


def test_the_page_says_what_was_found() -> None:
    evaluation = an_evaluation([f"prompt {i}" for i in range(47)])
    html = render_evaluation(evaluation)
    text = " ".join(Page(html).words)
    assert evaluation.verdict.headline in text
    assert evaluation.training_verdict is not None
    for sentence in (*evaluation.verdict.details, evaluation.training_verdict.seen):
        assert sentence in text
    for wanted in ("ln 2", "base 41.2, tuned 40.7", "[loss]", "2.13.0", evaluation.command):
        assert wanted in text
    assert render_evaluation(evaluation) == html  # nothing of the clock or of chance


def test_the_page_of_a_broken_run_is_a_page() -> None:
    broken = [
        report.model_copy(update={"loss": math.nan, "margin": math.nan, "grad_norm": math.inf})
        for report in a_training(3)
    ]
    evaluation = an_evaluation(["a", "b", "c"]).model_copy(
        update={"training": tuple(broken), "training_verdict": judge_training(broken, slope=2500)}
    )
    html = render_evaluation(evaluation)
    drawn = "".join(
        value or ""
        for _, attributes in Page(html).elements
        for name, value in attributes.items()
        if name in ("d", "x", "y", "x1", "y1", "width", "height")
    )
    assert not re.search("nan|inf", drawn)
    assert "Diverged" in html


def test_a_page_without_training_or_base_is_a_page() -> None:
    zeros = MetricResult.measured(
        "m", [0, 0, 0], [0, 0, 0], unit="", higher_is_better=True, role=Role.TARGET
    )
    evaluation = an_evaluation(["a", "b", "c"]).model_copy(
        update={"metrics": (zeros,), "training": (), "training_verdict": None}
    )
    assert "n/a" in render_evaluation(evaluation)


# --- the page, in a browser ------------------------------------------------------------------


class Browser:
    """Chromium, spoken to over its debugging pipe."""

    FLAGS = (
        "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --hide-scrollbars "
        "--disable-background-networking --disable-component-update --disable-sync "
        "--remote-debugging-pipe --autoplay-policy=no-user-gesture-required"
    )

    def __init__(self, program: str, profile: Path) -> None:
        to_read, self._write = os.pipe()
        self._read, to_write = os.pipe()
        # The pipe's ends are file descriptors 3 and 4, by the protocol; the shell puts them there.
        command = (
            f"exec {shlex.quote(program)} {self.FLAGS} --user-data-dir={shlex.quote(str(profile))} "
            f"about:blank 3<&{to_read} 4>&{to_write}"
        )
        self._process = subprocess.Popen(
            ["bash", "-c", command],
            pass_fds=(to_read, to_write),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_read)
        os.close(to_write)
        self._numbers = itertools.count(1)
        self._pending = b""
        self._session: str | None = None
        self.events: list[dict[str, Any]] = []
        target = self("Target.createTarget", url="about:blank")["targetId"]
        attached = self("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self(f"{domain}.enable")

    def __call__(self, method: str, **params: Any) -> dict[str, Any]:
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == number:
                assert "error" not in answer, answer["error"]
                return answer["result"]
            self.events.append(answer)

    def _receive(self, patience: float = 90.0) -> dict[str, Any]:
        while b"\0" not in self._pending:
            ready, _, _ = select.select([self._read], [], [], patience)
            chunk = os.read(self._read, 1 << 20) if ready else b""
            assert chunk, "chromium does not answer"
            self._pending += chunk
        line, _, self._pending = self._pending.partition(b"\0")
        return json.loads(line)

    def open(self, path: Path) -> None:
        self.events.clear()
        self("Page.navigate", url=path.as_uri())
        self.until("document.readyState === 'complete'")

    def evaluate(self, expression: str) -> Any:
        answer = self("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def until(self, expression: str, patience: float = 90.0) -> None:
        end = time.monotonic() + patience
        while not self.evaluate(expression):
            assert time.monotonic() < end, f"never true: {expression}"
            time.sleep(0.05)

    def key(self, key: str) -> None:
        text = {"text": key} if len(key) == 1 else {}
        self("Input.dispatchKeyEvent", type="keyDown", key=key, **text)
        self("Input.dispatchKeyEvent", type="keyUp", key=key)

    def screenshot(self, width: int, height: int, *, dark: bool = False) -> bytes:
        self(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=height, deviceScaleFactor=1, mobile=width < 600,
        )  # fmt: skip
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self("Emulation.setEmulatedMedia", features=[scheme])
        time.sleep(0.6)
        return base64.b64decode(self("Page.captureScreenshot", format="png")["data"])

    def complaints(self) -> list[str]:
        """What went to the console, was thrown, or was asked of another place."""
        self.evaluate("1")  # lets events that are on their way arrive
        found = []
        for event in self.events:
            method, params = event.get("method"), event.get("params", {})
            if method in ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded"):
                found.append(json.dumps(params)[:500])
            if method == "Network.requestWillBeSent":
                url = params["request"]["url"]
                if not url.startswith(("data:", "file:")):
                    found.append(url)
        return found

    def close(self) -> None:
        os.close(self._write)  # chromium ends when its pipe does
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._read)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    names = ("chromium", "chromium-browser", "google-chrome")
    program = next((path for path in map(shutil.which, names) if path), None)
    if program is None:
        pytest.skip(f"no browser found (looked for {', '.join(names)})")
    found = Browser(program, tmp_path_factory.mktemp("profile"))
    yield found
    found.close()


@pytest.fixture
def opened(browser: Browser, hostile: tuple[Evaluation, str], tmp_path: Path) -> Browser:
    page = tmp_path / "page.html"
    page.write_text(hostile[1], encoding="utf-8")
    browser("Emulation.setEmulatedMedia", features=[])
    browser(
        "Emulation.setDeviceMetricsOverride",
        width=1200, height=900, deviceScaleFactor=1, mobile=False,
    )  # fmt: skip
    browser.open(page)
    browser.evaluate("document.getElementById('videos').scrollIntoView({behavior: 'instant'})")
    browser.until("[...document.querySelectorAll('video')].some((v) => v.readyState >= 3)")
    return browser


LOADED = "[...document.querySelectorAll('video')].filter((v) => v.src)"
PLAYING = f"{LOADED}.length >= 4 && {LOADED}.every((v) => v.readyState >= 3 && !v.paused)"


def test_videos_play_in_sync_and_nothing_complains(opened: Browser) -> None:
    opened.until(PLAYING)

    def watch() -> tuple[int, float]:
        """How many frames were seen in three seconds, and how far apart the videos usually were."""
        seen, apart = set(), []
        for _ in range(30):
            times = opened.evaluate(f"{LOADED}.map((v) => v.currentTime)")
            loop = FRAMES / FPS
            apart.append(max(abs((t - times[0] + loop / 2) % loop - loop / 2) for t in times))
            seen.add(int(times[0] * FPS))
            time.sleep(0.1)
        return len(seen), float(np.median(apart))

    # A busy machine may stall all players for a while; then they must find together again.
    for _ in range(5):
        frames, apart = watch()
        if frames > 8 and apart < 1 / FPS:
            break
    assert frames > 8
    assert apart < 1 / FPS
    assert opened.complaints() == []


def test_one_set_of_controls_moves_all_videos(opened: Browser) -> None:
    opened.until(PLAYING)
    opened.key(" ")
    opened.until(f"{LOADED}.every((v) => v.paused && !v.seeking)")
    assert opened.evaluate("document.getElementById('play').ariaLabel") == "Play"

    def all_show(frame: int) -> None:
        shown = f"!v.seeking && v.readyState >= 2 && Math.floor(v.currentTime * 8) === {frame}"
        opened.until(f"{LOADED}.length >= 4 && {LOADED}.every((v) => {shown})")

    opened.evaluate(
        "{const s = document.getElementById('frame'); s.value = 5;"
        "s.dispatchEvent(new Event('input'))}"
    )
    all_show(5)
    opened.key("ArrowRight")
    all_show(6)
    opened.key("ArrowLeft")
    opened.key("ArrowLeft")
    all_show(4)
    assert opened.evaluate("document.getElementById('position').value") == "5 / 16"
    assert opened.complaints() == []


def test_cards_are_sorted_by_a_metric(opened: Browser, hostile: tuple[Evaluation, str]) -> None:
    opened.evaluate(
        "{const s = document.getElementById('sort'); s.value = '0 -1';"
        "s.dispatchEvent(new Event('change'))}"
    )
    order = opened.evaluate("[...document.querySelectorAll('.card')].map((c) => c.id)")
    metric = hostile[0].metrics[0]
    gains = np.array(metric.base) - np.array(metric.tuned)
    assert order == [f"video-{index + 1}" for index in np.argsort(-gains)]


def test_videos_out_of_view_are_let_go(opened: Browser) -> None:
    opened.evaluate("document.getElementById('repeat').scrollIntoView({behavior: 'instant'})")
    opened.until("![...document.querySelectorAll('video')].some((v) => v.src)")
    assert opened.complaints() == []


def test_who_wants_less_motion_gets_a_still_page(opened: Browser, tmp_path: Path) -> None:
    reduce = {"name": "prefers-reduced-motion", "value": "reduce"}
    opened("Emulation.setEmulatedMedia", features=[reduce])
    opened("Page.reload")
    opened.until(f"{LOADED}.length >= 4 && {LOADED}.every((v) => v.readyState >= 2)")
    assert opened.evaluate(f"{LOADED}.every((v) => v.paused)")


def test_the_page_fits_a_phone(opened: Browser) -> None:
    opened(
        "Emulation.setDeviceMetricsOverride",
        width=375, height=812, deviceScaleFactor=1, mobile=True,
    )  # fmt: skip
    width = opened.evaluate("document.documentElement.scrollWidth")
    assert width <= 375
