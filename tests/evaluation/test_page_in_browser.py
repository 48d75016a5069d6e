"""The page of an evaluation in a browser."""

from __future__ import annotations

import base64
import itertools
import json
import os
import select
import shlex
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_evaluation import FPS, FRAMES, a_clip, a_hostile_evaluation


class Browser:
    """Chromium, controlled over its debugging pipe."""

    FLAGS = (
        "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --hide-scrollbars "
        "--disable-background-networking --disable-component-update --disable-sync "
        "--remote-debugging-pipe --autoplay-policy=no-user-gesture-required"
    )

    def __init__(self, program: str, profile: Path) -> None:
        to_read, self._write = os.pipe()
        self._read, to_write = os.pipe()
        # The protocol uses file descriptors 3 and 4 for the pipe.
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

    def errors(self) -> list[str]:
        """Console messages, exceptions and requests to other hosts."""
        self.evaluate("1")  # receives pending events
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
        os.close(self._write)  # chromium exits when its pipe closes
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._read)


@pytest.fixture(scope="module")
def html() -> str:
    evaluation = a_hostile_evaluation()
    return evaluation.html([(a_clip(), a_clip())] * len(evaluation.prompts))


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
def opened(browser: Browser, html: str, tmp_path: Path) -> Browser:
    page = tmp_path / "page.html"
    page.write_text(html, encoding="utf-8")
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


def test_videos_play_in_sync_without_errors(opened: Browser) -> None:
    opened.until(PLAYING)

    def watch() -> tuple[int, float]:
        """Number of frames seen in three seconds, and the median distance between videos."""
        seen, apart = set(), []
        for _ in range(30):
            times = opened.evaluate(f"{LOADED}.map((v) => v.currentTime)")
            loop = FRAMES / FPS
            apart.append(max(abs((t - times[0] + loop / 2) % loop - loop / 2) for t in times))
            seen.add(int(times[0] * FPS))
            time.sleep(0.1)
        return len(seen), float(np.median(apart))

    # A busy machine may stall the players; afterwards they must synchronise again.
    for _ in range(5):
        frames, apart = watch()
        if frames > 8 and apart < 1 / FPS:
            break
    assert frames > 8
    assert apart < 1 / FPS
    assert opened.errors() == []


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
    assert opened.errors() == []


def test_cards_are_sorted_by_a_metric(opened: Browser) -> None:
    opened.evaluate(
        "{const s = document.getElementById('sort'); s.value = '0 -1';"
        "s.dispatchEvent(new Event('change'))}"
    )
    order = opened.evaluate("[...document.querySelectorAll('.card')].map((c) => c.id)")
    metric = a_hostile_evaluation().metrics[0]
    gains = np.array(metric.base) - np.array(metric.tuned)
    assert order == [f"video-{index + 1}" for index in np.argsort(-gains)]


def test_videos_out_of_view_are_unloaded(opened: Browser) -> None:
    opened.evaluate("document.getElementById('reproduce').scrollIntoView({behavior: 'instant'})")
    opened.until("![...document.querySelectorAll('video')].some((v) => v.src)")
    assert opened.errors() == []


def test_reduced_motion_stops_the_videos(opened: Browser, tmp_path: Path) -> None:
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
