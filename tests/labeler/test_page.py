"""The labelling page: every answer is saved for the right video, whatever interrupts it."""
# ruff: noqa: RUF001 - the page uses special characters

from __future__ import annotations

import asyncio
import io
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from conftest import SHAPE, load_small
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from small_files import largest_file
from starlette.testclient import TestClient
from starlette.types import ASGIApp

from dpo_video.backbone.animatediff import AnimateDiffModel
from dpo_video.data.label import StoreTask, recipe
from dpo_video.data.labels import LabelSet
from dpo_video.data.store import Manifest, PairStore
from dpo_video.data.video_writer import columns
from dpo_video.errors import UserError
from dpo_video.labeler._page import server
from dpo_video.labeler._page.server import application, listen, serve
from dpo_video.labeler._page.session import IDLE, Answer, LabelSession
from dpo_video.labeler._page.sheets import SpriteSheets, eight_bits, sheet
from dpo_video.labeler.page import Page as PageLabeler
from dpo_video.strategies import LabelTask
from dpo_video.testing import small_videos
from dpo_video.types import Pair, SegmentLabel

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

PAIRS = 3
HOSTILE = "<img src=x onerror=alert(1)> {{ 7 * 7 }} \"'"
TOKEN = "token-of-the-test"
HOST = "127.0.0.1:8000"


@pytest.fixture(scope="module")
def model(small_folder: Path) -> AnimateDiffModel:
    return load_small(small_folder)


@pytest.fixture(scope="module")
def store(
    model: AnimateDiffModel, small_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> PairStore:
    """Pairs of noise at 16x16 in two segments of two frames; all frames differ."""
    size = {"frames": SHAPE.frames, "height": SHAPE.height, "width": SHAPE.width}
    made_with = {"name": "animatediff", "model": str(small_folder), **size}
    manifest = Manifest(
        recipe={"backbone": made_with},
        identity=model.identity,
        latent_shape=model.latent_shape,
        fps=SHAPE.fps,
    )
    store = PairStore.create(tmp_path_factory.mktemp("page") / "pairs", manifest)
    generator = torch.Generator().manual_seed(0)
    for index in range(PAIRS):
        pair = Pair(
            first=torch.randn(model.latent_shape, generator=generator),
            second=torch.randn(model.latent_shape, generator=generator),
            preference=torch.ones(model.latent_shape[1]),
            region=torch.ones(1, *model.latent_shape[1:]),
            prompt=HOSTILE if index == 1 else f"prompt {index}",
            source="noise",
        )
        store.append(pair, model.encode_prompts([pair.prompt]))
    return store


@pytest.fixture
def task(store: PairStore, model: AnimateDiffModel, request: pytest.FixtureRequest) -> StoreTask:
    """The store with a new label set."""
    return StoreTask(store, model, new_label_set(store, model, request.node.name), PageLabeler())


def new_label_set(store: PairStore, model: AnimateDiffModel, name: str) -> LabelSet:
    made = recipe(store, model, {"name": "page", "seed": 0}, seconds=0.25)
    assert made.segments == ((0, 2), (2, 4))
    return LabelSet.open_or_create(store.folder, re.sub(r"[^A-Za-z0-9]", "-", name), made)


def on_disk(task: StoreTask, rater: str) -> dict[int, tuple[SegmentLabel, ...]]:
    """The labels that another process would read."""
    return LabelSet(task.store.folder, task.label_set.name).labels_by(rater)


class Memory(LabelTask):
    """A task without videos or files, for tests of order and counting."""

    def __init__(self, pairs: int, segments: int) -> None:
        self.pairs = range(pairs)
        self.segments = [slice(i, i + 1) for i in range(segments)]
        self.fps = 8.0
        self.recorded: dict[str, dict[int, tuple[SegmentLabel, ...]]] = {}

    def prompt(self, pair: int) -> str:
        return str(pair)

    def videos(self, pair: int) -> Any:
        raise NotImplementedError

    @property
    def raters(self) -> list[str]:
        return list(self.recorded)

    def labels_by(self, rater: str = "") -> dict[int, tuple[SegmentLabel, ...]]:
        return self.recorded.get(rater, {})

    def record(self, pair: int, labels: Any, *, rater: str = "", note: str = "") -> None:
        self.recorded.setdefault(rater, {})[pair] = tuple(labels)


# --- what is asked, and what an answer means -------------------------------------------------

ANSWERS = st.sampled_from(["left", "right", "tie", "skip"])


def give(session: LabelSession, rater: str, answers: list[Answer]) -> None:
    """Answer the current questions in turn."""
    for answer in answers:
        current = session.view(rater).current
        if current is None:
            return
        session.answer(rater, current.pair, current.answers.index(None), answer)


@given(rater=st.text(max_size=5), seed=st.integers(), pair=st.integers(0, 5), answer=ANSWERS)
def test_an_answer_is_kept_in_the_stores_order(
    rater: str, seed: int, pair: int, answer: Answer
) -> None:
    task = Memory(6, 2)
    session = LabelSession(task, seed)
    session.answer(rater, pair, 1, answer)
    first_side = "left" if session.is_first(rater, pair, "left") else "right"
    kept = {first_side: 1.0, "tie": 0.0, "skip": "skip"}.get(answer, -1.0)
    assert task.labels_by(rater) == {pair: (None, kept)}
    assert session.is_first(rater, pair, "left") != session.is_first(rater, pair, "right")
    # The next view shows the answer as it was given.
    again = LabelSession(task, seed)
    while (current := again.view(rater).current) and current.pair != pair:
        again.answer(rater, current.pair, 0, "tie", rest=True)
    assert current is not None and current.answers == (None, answer)


def test_sides_are_even_and_differ_between_raters() -> None:
    session = LabelSession(Memory(1000, 1), seed=0)
    sides = {name: [session.flipped(name, pair) for pair in range(1000)] for name in ("a", "b")}
    same = sum(one == other for one, other in zip(sides["a"], sides["b"], strict=True))
    for count in (sum(sides["a"]), sum(sides["b"]), same):
        assert abs(count - 500) < 80  # five standard deviations


def test_all_raters_see_the_pairs_in_one_random_order() -> None:
    orders = []
    for seed, rater in ((0, "a"), (0, "b"), (1, "a")):
        session, seen = LabelSession(Memory(20, 1), seed), []
        while current := session.view(rater).current:
            seen.append(current.pair)
            assert session.view(rater).ahead == tuple(session._order[len(seen) : len(seen) + 2])
            session.answer(rater, current.pair, 0, "tie")
        orders.append(seen)
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[0]) == list(range(20)) != orders[0]


@settings(max_examples=50)
@given(
    answers=st.lists(ANSWERS, max_size=12),
    rest=st.booleans(),
    restart=st.booleans(),
)
def test_undo_reverts_all_answers_in_reverse_order(
    answers: list[Answer], rest: bool, restart: bool
) -> None:
    task = Memory(4, 3)
    session = LabelSession(task, seed=0)
    history = []
    for answer in answers:
        history.append(dict(task.labels_by("a")))
        give(session, "a", [answer])
    if rest:
        history.append(dict(task.labels_by("a")))
        current = session.view("a").current
        if current is None:
            history.pop()
        else:
            session.answer("a", current.pair, current.answers.index(None), "skip", rest=True)
    if restart:  # what came before is no longer known step by step, but can be taken back
        session = LabelSession(task, seed=0)
        while (view := session.view("a")).undoable:
            session.undo("a", view.revision)
    else:
        for before in reversed(history):
            session.undo("a", session.view("a").revision)
            current_labels = {
                pair: labels for pair, labels in task.labels_by("a").items() if has_label(labels)
            }
            assert current_labels == {
                pair: labels for pair, labels in before.items() if has_label(labels)
            }
    assert not any(has_label(labels) for labels in task.labels_by("a").values())
    view = session.view("a")
    assert not view.undoable
    assert session.undo("a", view.revision) == view


def has_label(labels: tuple[SegmentLabel, ...]) -> bool:
    return any(label is not None for label in labels)


def test_a_repeated_undo_request_is_ignored() -> None:
    task = Memory(2, 2)
    session = LabelSession(task, seed=0)
    give(session, "a", ["tie", "tie"])
    revision = session.view("a").revision
    once = session.undo("a", revision)
    assert session.undo("a", revision) == once
    assert [label for labels in task.labels_by("a").values() for label in labels] == [0, None]


def test_a_pair_is_finished_once_every_segment_has_an_answer() -> None:
    task = Memory(2, 2)
    first = LabelSession(task, seed=0).view("a").current
    assert first is not None
    give(LabelSession(task, seed=0), "a", ["skip"])
    view = LabelSession(task, seed=0).view("a")
    assert view.finished == 0 and view.current is not None
    assert view.current.pair == first.pair and view.current.answers == ("skip", None)
    give(LabelSession(task, seed=0), "a", ["tie"])
    view = LabelSession(task, seed=0).view("a")
    assert view.finished == 1 and view.current is not None and view.current.pair != first.pair


def test_breaks_do_not_count_as_work() -> None:
    now = 0.0
    session = LabelSession(Memory(10, 1), seed=0, clock=lambda: now)
    for seconds in (5.0, 5.0, 10_000.0, 5.0, 5.0):
        assert session.view("a").pace is None or session.view("a").finished >= 3
        now += seconds
        give(session, "a", ["tie"])
    assert session.view("a").pace == pytest.approx(5 / (20 + IDLE) * 3600)
    assert session.summary("a").minutes == pytest.approx((20 + IDLE) / 60)


def test_agreement_compares_videos_not_sides() -> None:
    task = Memory(40, 1)
    session = LabelSession(task, seed=0)
    for rater in ("a", "b"):  # both always prefer the first, wherever it is
        for pair in range(40):
            side: Answer = "left" if session.is_first(rater, pair, "left") else "right"
            session.answer(rater, pair, 0, "tie" if pair < 20 else side)
    summary = session.summary("a")
    assert [other.rater for other in summary.others] == ["b"]
    assert summary.others[0].agreement.kappa == 1
    assert summary.answers["tie"] == 20 and sum(summary.answers.values()) == 40
    assert 0 < summary.answers["left"] < 20
    # Raters who always press the same key agree by chance only.
    for rater in ("c", "d"):
        for pair in range(40):
            session.answer(rater, pair, 0, "left")
    (found,) = (other for other in session.summary("c").others if other.rater == "d")
    assert found.agreement.kappa is not None and abs(found.agreement.kappa) < 0.5


# --- pictures --------------------------------------------------------------------------------


def pixels(video: torch.Tensor) -> NDArray[np.uint8]:
    """Bytes `F H W 3`."""
    return video.mul(255).round().permute(1, 2, 3, 0).numpy().astype(np.uint8)


@pytest.mark.parametrize("frames", [1, 2, 5, 9, 16])
def test_sheets_hold_every_frame_to_the_bit(frames: int) -> None:
    video = small_videos(1, frames, 6, 10)[0]
    picture = np.asarray(Image.open(io.BytesIO(sheet(eight_bits(video)))))
    wide = columns(frames)
    for frame, expected in enumerate(pixels(video)):
        y, x = 6 * (frame // wide), 10 * (frame % wide)
        assert np.array_equal(picture[y : y + 6, x : x + 10], expected)


def test_a_pair_is_decoded_once_and_the_cache_is_bounded() -> None:
    decoded: list[int] = []

    class Counting(Memory):
        def videos(self, pair: int) -> Any:
            decoded.append(pair)
            return small_videos(2, 2, 4, 4, seed=pair).unbind()

    task = Counting(4, 2)
    size = 2 * 2 * 4 * 4 * 3  # bytes of a pair

    async def look() -> None:
        sheets = SpriteSheets(task, keep=3 * size)
        both = (
            sheets.get(0, segment, first=first) for segment in (0, 1) for first in (True, False)
        )
        assert len(set(await asyncio.gather(*both))) == 4
        assert decoded == [0]
        for pair in (0, 1, 2, 0, 3, 0, 2, 1):
            await sheets.get(pair, 0, first=True)
        assert decoded == [0, 1, 2, 3, 1]  # the longest unseen went
        decoded.clear()
        small = SpriteSheets(task, keep=1)
        for pair in (0, 0, 1, 1):
            await small.get(pair, 1, first=False)
        assert decoded == [0, 1]

    asyncio.run(look())


# --- the interface ---------------------------------------------------------------------------


def app_of(task: LabelTask) -> ASGIApp:
    return application(LabelSession(task, seed=0), TOKEN, finish=lambda: None)


@pytest.fixture
def client(task: StoreTask) -> TestClient:
    return TestClient(app_of(task), base_url=f"http://{HOST}/{TOKEN}/")


GOOD = {"rater": "a", "pair": 0, "segment": 0, "answer": "left"}


def test_the_link_opens_the_page(client: TestClient) -> None:
    found = client.get("")
    assert found.status_code == 200 and "<title>" in found.text
    assert client.post("answer", json=GOOD).status_code == 200
    for host in ("localhost:1", "127.0.0.1", "[::1]:9"):  # forwarded to another port by ssh
        assert client.get("", headers={"host": host}).status_code == 200


@pytest.mark.parametrize("path", ["/", "//", "/token/", f"/{TOKEN}x/", f"/x/{TOKEN}/", "/%ff/"])
@pytest.mark.parametrize("rest", ["", "view?rater=a", "sheet/0/0/left.png?rater=a"])
def test_requests_without_the_token_are_refused(client: TestClient, path: str, rest: str) -> None:
    found = client.get(f"http://{HOST}{path}{rest}")
    assert found.status_code == 403
    assert "prompt" not in found.text


@pytest.mark.parametrize(
    "headers",
    [
        {"host": "evil.example"},
        {"host": "127.0.0.1.evil.example:8000"},
        {"host": "evil.example@127.0.0.1.evil"},
        {"host": ""},
        {"host": "[::1"},
        {"origin": "http://evil.example"},
        {"origin": "http://127.0.0.1:9999"},
        {"origin": "null"},
    ],
    ids=str,
)
def test_other_hosts_and_origins_are_refused(
    client: TestClient, task: StoreTask, headers: dict[str, str]
) -> None:
    assert client.get("", headers=headers).status_code == 403
    assert client.post("answer", json=GOOD, headers=headers).status_code == 403
    assert on_disk(task, "a") == {}


def test_no_other_origin_is_ever_allowed(client: TestClient) -> None:
    asked = {"origin": f"http://{HOST}", "access-control-request-method": "POST"}
    for answer in (
        client.get(""),
        client.options("answer", headers=asked),
        client.options("answer", headers={**asked, "origin": "http://evil.example"}),
    ):
        assert not [name for name in answer.headers if name.startswith("access-control")]
    assert client.get("", headers={"origin": f"http://{HOST}"}).status_code == 200


def test_every_response_forbids_caching_sniffing_and_framing(client: TestClient) -> None:
    for answer in (client.get(""), client.get("view?rater=a"), client.get(f"http://{HOST}/")):
        assert answer.headers["cache-control"] == "no-store"
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["x-frame-options"] == "DENY"
    assert "default-src 'none'" in client.get("").headers["content-security-policy"]


@pytest.mark.parametrize(
    ("change", "status"),
    [
        ({"pair": PAIRS}, 404),
        ({"pair": -1}, 404),
        ({"segment": 2}, 404),
        ({"segment": -1}, 404),
        ({"answer": "first"}, 400),
        ({"rater": " "}, 400),
        ({"rater": "a\nb"}, 400),
        ({"rater": "a" * 41}, 400),
        ({"more": 1}, 400),
        ({"rater": "a" * 5000}, 413),
    ],
    ids=lambda value: str(value)[:30],
)
def test_invalid_requests_are_refused_and_not_recorded(
    client: TestClient, task: StoreTask, change: dict[str, Any], status: int
) -> None:
    found = client.post("answer", json={**GOOD, **change})
    assert found.status_code == status and found.json()["error"]
    assert not task.label_set.lines


def test_forms_from_other_pages_are_refused(client: TestClient) -> None:
    plain = {"content-type": "text/plain"}
    assert client.post("answer", content=json.dumps(GOOD), headers=plain).status_code == 415
    assert client.get("answer").status_code == 405
    for path in (f"sheet/{PAIRS}/0/left.png", "sheet/0/2/left.png", "sheet/0/0/first.png"):
        assert client.get(f"{path}?rater=a").status_code in (400, 404)
    assert client.get("sheet/0/0/left.png").status_code == 400


def test_a_side_shows_the_video_that_its_answer_prefers(
    client: TestClient, task: StoreTask
) -> None:
    for pair in task.pairs:
        first, second = (pixels(video) for video in task.videos(pair))
        shown = client.get(f"sheet/{pair}/1/left.png?rater=a").content
        frame = np.asarray(Image.open(io.BytesIO(shown)))[:, : SHAPE.width]
        client.post("answer", json={**GOOD, "pair": pair, "segment": 1, "answer": "left"})
        preferred = {1.0: first, -1.0: second}[on_disk(task, "a")[pair][1]]
        assert np.array_equal(frame, preferred[2])


def test_responses_do_not_reveal_the_sides(client: TestClient) -> None:
    told = client.get("").text + client.get("view?rater=a").text
    assert "first" not in client.get("view?rater=a").text
    assert "flip" not in told and "winner" not in told


def test_a_full_disk_is_reported_and_nothing_is_counted(
    client: TestClient, task: StoreTask
) -> None:
    client.post("answer", json=GOOD)
    before = client.get("view?rater=a").json()
    with largest_file(task.label_set.path.stat().st_size):
        found = client.post("answer", json={**GOOD, "segment": 1})
    assert found.status_code == 500 and "Cannot write" in found.json()["error"]
    assert client.get("view?rater=a").json() == before


def test_a_missing_extra_is_one_sentence(task: StoreTask, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "dpo_video.labeler._page.server")
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(UserError, match=r"needs uvicorn\. .* pip install 'dpo-video\[page\]'"):
        PageLabeler().label_store(task)


def test_a_path_that_is_no_path_is_refused(task: StoreTask) -> None:
    """A request `GET *` has the path `*`."""
    sent: list[Any] = []

    async def receive() -> Any:
        return {"type": "http.request"}

    async def send(message: Any) -> None:
        sent.append(message)

    for path in ("*", "", "http:", f"/{TOKEN}/sheet/{'9' * 5000}/0/left.png"):
        scope = {
            "type": "http",
            "path": path,
            "method": "GET",
            "headers": [(b"host", HOST.encode())],
        }
        asyncio.run(app_of(task)(scope, receive, send))
        assert sent[-2]["status"] == 403


@pytest.mark.parametrize("half", [b"", b"GET / HTTP/1.1\r\nhost: x", b"x" * 4000,
                                  b"POST /{token}/end HTTP/1.1\r\nhost: {host}\r\ncontent-type: "
                                  b"application/json\r\ncontent-length: 9\r\n\r\n{"])  # fmt: skip
def test_a_request_that_is_never_completed_is_closed(
    link: str, half: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "PATIENCE", 0.3)
    host = link.split("/")[2]
    with socket.create_connection(("127.0.0.1", int(host.split(":")[1])), timeout=10) as client:
        client.sendall(half.replace(b"{token}", TOKEN.encode()).replace(b"{host}", host.encode()))
        while client.recv(1000):  # an answer may come before the end
            pass
    with urllib.request.urlopen(link, timeout=10) as page:  # others are served as before
        assert page.status == 200


def test_a_port_in_use_is_one_sentence() -> None:
    with listen(0) as taken:
        port = taken.getsockname()[1]
        assert taken.getsockname()[0] == "127.0.0.1"
        with pytest.raises(UserError, match=f"Port {port} cannot be used"):
            listen(port)


# --- a real process --------------------------------------------------------------------------


@contextmanager
def command(store: PairStore, name: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`dpo-video label --labeler page`, and the link that it shows."""
    process = subprocess.Popen(
        [sys.executable, "-m", "dpo_video", "label", str(store.folder), "--labeler", "page",
         "--as", name, "--seconds", "0.25", "--device", "cpu", "--set", "labeler.browser=false"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None and process.stderr is not None
    said = []
    try:
        for line in process.stderr:
            said.append(line)
            if link := re.search(r"http://127\.0\.0\.1:\d+/\S+/", line):
                yield process, link[0]
                return
        raise AssertionError("".join(said))
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
        process.stderr.close()


def post(url: str, message: dict[str, Any]) -> dict[str, Any]:
    request = urllib.request.Request(
        url, json.dumps(message).encode(), {"content-type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        found: dict[str, Any] = json.load(answer)
        return found


def test_answers_survive_kill_9_and_ctrl_c_prints_a_summary(store: PairStore) -> None:
    with command(store, "killed") as (process, link):
        post(f"{link}answer", GOOD)
        process.kill()  # SIGKILL, at once
        assert process.wait() == -signal.SIGKILL
    (labels,) = LabelSet(store.folder, "killed").labels_by("a").values()
    assert labels[0] in (1.0, -1.0) and labels[1] is None

    with command(store, "killed") as (process, link):
        assert LabelSet(store.folder, "killed").labels_by("a") == {0: labels}
        view = post(f"{link}answer", {**GOOD, "segment": 1, "answer": "tie"})
        assert view["finished"] == 1
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert re.search(r"pairs finished +1 of 3", err)
    assert re.search(r"1 left, 0 right, 1 tie, 0 skip", err)
    assert re.search(r"1 of 3 pairs have labels.*Stopped\. Resume with: dpo-video label", err)


# --- keys in a browser -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    names = ("chromium", "chromium-browser", "google-chrome")
    program = next((path for path in map(shutil.which, names) if path), None)
    if program is None:
        pytest.skip(f"no browser found (looked for {', '.join(names)})")
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def link(task: StoreTask) -> Iterator[str]:
    """A running server."""
    with listen(0) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/{TOKEN}/"
        thread = threading.Thread(target=serve, args=(LabelSession(task, seed=0), listener, TOKEN))
        thread.start()
        yield url
        if thread.is_alive():
            post(f"{url}end", {"rater": "nobody"})
        thread.join(timeout=30)
        assert not thread.is_alive()


class Rater:
    """Operates the page as a rater."""

    def __init__(self, page: Page, link: str, name: str = "ann") -> None:
        self.page, self.name = page, name
        self.complaints: list[str] = []
        page.on("console", lambda message: self.complaints.append(message.text))
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("request", lambda request: self._watch(request.url, link))
        page.goto(link)
        page.get_by_label("Your name").fill(name)
        page.keyboard.press("Enter")
        self.settle()

    def _watch(self, url: str, link: str) -> None:
        if not url.startswith((link, "data:")):
            self.complaints.append(url)

    def settle(self) -> None:
        """Wait until the pair is there and the page takes answers."""
        self.until(
            "!document.getElementById('summary').hidden || (document.body.dataset.frame &&"
            " !document.getElementById('work').hidden &&"
            " !document.querySelector('.loading, .pressed'))"
        )
        self.page.wait_for_timeout(300)

    def until(self, expression: str, patience: float = 60.0) -> None:
        # Their own wait_for_function evaluates strings, which the page's policy forbids.
        end = time.monotonic() + patience
        while not self.page.evaluate(expression):
            assert time.monotonic() < end, f"never true: {expression}"
            self.page.wait_for_timeout(30)

    def press(self, key: str) -> None:
        with self.page.expect_response(re.compile(r"/(answer|undo)$")):
            self.page.keyboard.press(key)
        self.settle()

    def current(self) -> tuple[int, int]:
        """The pair and the segment under judgement."""
        found = self.page.evaluate(
            "[document.body.dataset.pair, [...document.querySelectorAll('#segments button')]"
            ".findIndex((b) => b.ariaCurrent === 'step')]"
        )
        return int(found[0]), int(found[1])

    def canvases(self) -> NDArray[np.uint8]:
        """What both show at one moment, `2 H W 3`."""
        bytes_ = self.page.evaluate(
            "[...document.querySelectorAll('canvas')].map((c) => [...c.getContext('2d')"
            ".getImageData(0, 0, c.width, c.height).data])"
        )
        return np.array(bytes_, dtype=np.uint8).reshape(2, SHAPE.height, SHAPE.width, 4)[..., :3]

    def text(self, selector: str) -> str:
        return self.page.locator(selector).inner_text()


@contextmanager
def opened_page(browser: Browser, link: str, name: str = "ann", **options: Any) -> Iterator[Rater]:
    context = browser.new_context(**{"viewport": {"width": 1280, "height": 800}, **options})
    try:
        yield Rater(context.new_page(), link, name)
    finally:
        context.close()


def test_a_set_is_labelled_by_keys_alone(browser: Browser, link: str, task: StoreTask) -> None:
    sides = LabelSession(task, seed=0)
    keys = {"ArrowLeft": "left", "2": "right", "ArrowDown": "tie", "s": "skip", "1": "left",
            "ArrowRight": "right"}  # fmt: skip
    expected: dict[int, list[SegmentLabel]] = {}
    with opened_page(browser, link) as ann:
        for number, (key, answer) in enumerate(keys.items()):
            pair, segment = ann.current()
            assert segment == number % 2
            ann.press(key)
            first = answer in ("left", "right") and sides.is_first("ann", pair, answer)  # type: ignore[arg-type]
            label = {"tie": 0.0, "skip": "skip"}.get(answer, 1.0 if first else -1.0)
            expected.setdefault(pair, []).append(label)
            kept = on_disk(task, "ann")[pair]
            assert kept[segment] == label
        assert on_disk(task, "ann") == {pair: tuple(labels) for pair, labels in expected.items()}
        assert ann.text("#verdict") == "All 3 pairs are labelled. Thank you, ann."
        assert (
            " ".join(ann.text("#counts tbody").split()) == "← left 2 → right 2 = tie 1 – skipped 1"
        )
        assert ann.complaints == []


def test_both_canvases_show_the_same_frame_to_the_bit(
    browser: Browser, link: str, task: StoreTask
) -> None:
    with opened_page(browser, link) as ann:
        pair, _ = ann.current()
        flipped = LabelSession(task, seed=0).flipped("ann", pair)
        videos = [pixels(video) for video in task.videos(pair)]
        left, right = reversed(videos) if flipped else videos
        frames = np.stack([left, right], axis=1)

        def shown() -> int:
            seen = ann.canvases()
            (frame,) = (i for i, both in enumerate(frames) if np.array_equal(both, seen))
            return frame

        def loop(expected: set[int]) -> None:
            """Looks through one loop and longer, and more on a busy machine, show these alone."""
            seen: set[int] = set()
            begin = time.monotonic()
            while (passed := time.monotonic() - begin) < 1 or (seen != expected and passed < 30):
                seen.add(shown())
            assert seen == expected

        loop({0, 1})  # the segment
        ann.page.keyboard.press(" ")
        ann.page.wait_for_timeout(100)
        start = shown()
        assert {shown() for _ in range(5)} == {start}
        for key, by in ((".", 1), (".", 1), (",", -1)):
            ann.page.keyboard.press(key)
            ann.page.wait_for_timeout(100)
            start = (start + by) % 2
            assert shown() == start
        ann.page.keyboard.press("w")
        for frame in (0, 1, 2, 3, 0):
            ann.page.wait_for_timeout(100)
            assert shown() == frame
            assert ann.text("#frame") == f"frame {frame + 1} / 4"
            ann.page.keyboard.press(".")
        ann.page.keyboard.press(" ")
        loop({0, 1, 2, 3})
        ann.press("ArrowDown")
        ann.page.keyboard.press("w")
        ann.page.wait_for_timeout(100)
        loop({2, 3})


def test_speed_is_changed_by_keys(browser: Browser, link: str) -> None:
    with opened_page(browser, link) as ann:
        for keys, speed in (("-", "0.5×"), ("-----", "0.1×"), ("+", "0.25×"), ("=====", "4×")):
            for key in keys:
                ann.page.keyboard.press(key)
            assert ann.text("#speed") == speed


def test_a_reload_loses_nothing(browser: Browser, link: str, task: StoreTask) -> None:
    with opened_page(browser, link) as ann:
        ann.press("ArrowLeft")
        place, shown = ann.current(), ann.text("#prompt")
        assert place[1] == 1
        ann.page.reload()
        ann.settle()
        assert ann.current() == place and ann.text("#prompt") == shown
        assert ann.text("#rater") == "ann"
        ann.press("u")  # what came before the reload can be taken back too
        assert ann.current() == (place[0], 0)
        assert on_disk(task, "ann")[place[0]] == (None, None)
        assert ann.complaints == []


def test_undo_goes_back_across_pairs(browser: Browser, link: str, task: StoreTask) -> None:
    with opened_page(browser, link) as ann:
        places = []
        for key in ("ArrowLeft", "Shift+S", "ArrowRight"):
            places.append(ann.current())
            ann.press(key)
        assert len({pair for pair, _ in places}) == 2
        assert on_disk(task, "ann")[places[1][0]][1] == "skip"
        for key, place in zip(("Backspace", "u", "Backspace"), reversed(places), strict=True):
            ann.press(key)
            assert ann.current() == place
        assert ann.page.locator("#undo").is_disabled()
        assert not any(has_label(labels) for labels in on_disk(task, "ann").values())


def test_a_held_or_early_key_answers_once(browser: Browser, link: str, task: StoreTask) -> None:
    with opened_page(browser, link) as ann:
        for _ in range(10):
            ann.page.keyboard.down("ArrowLeft")  # the first is a press, the others repeats
        ann.page.keyboard.up("ArrowLeft")
        ann.settle()
        assert len(task.label_set.lines) == 1
        with ann.page.expect_response(re.compile("/answer$")):
            for _ in range(5):
                ann.page.keyboard.press("ArrowRight", delay=0)
        ann.settle()
        assert len(task.label_set.lines) == 2


def test_the_layout_does_not_move_between_pairs(browser: Browser, link: str) -> None:
    places = (
        "Object.fromEntries([...document.querySelectorAll('#work button, canvas, #prompt, #count')]"
        ".map((e) => [e.id || e.dataset.answer || e.ariaLabel?.split(':')[0],"
        " Object.values(e.getBoundingClientRect().toJSON()).join()]))"
    )
    with opened_page(browser, link) as ann:
        before = ann.page.evaluate(places)
        assert len(before) > 10
        for key in ("ArrowLeft", "s", "ArrowDown"):  # over the prompt that is long and hostile
            ann.press(key)
            assert ann.page.evaluate(places) == before
        assert ann.complaints == []


def test_a_hostile_prompt_is_shown_as_it_is(browser: Browser, link: str) -> None:
    with opened_page(browser, link) as ann:
        seen = [ann.text("#prompt")]
        while ann.page.locator("#summary").is_hidden():
            ann.press("Shift+S")
            seen.append(ann.text("#prompt") if ann.page.locator("#work").is_visible() else "")
        assert HOSTILE in seen
        assert ann.complaints == []


def test_two_raters_at_once_see_their_agreement(
    browser: Browser, link: str, task: StoreTask
) -> None:
    sides = LabelSession(task, seed=0)
    with opened_page(browser, link, "ann") as ann, opened_page(browser, link, "Bob & Co") as bob:
        for step in range(3):
            for rater in (ann, bob):
                pair, _ = rater.current()
                flipped = sides.flipped(rater.name, pair)
                rater.press(("ArrowRight" if flipped else "ArrowLeft") if step else "ArrowDown")
        assert on_disk(task, "ann") == on_disk(task, "Bob & Co")
        ann.page.keyboard.press("i")
        ann.page.wait_for_selector("#others tbody tr")
        cells = ann.page.locator("#others tbody td").all_inner_texts()
        assert cells == ["Bob & Co", "3", "100%", "1.00 (almost perfect)"]
        ann.page.keyboard.press("Escape")
        ann.settle()
        assert ann.current()[1] == 1
        ann.page.reload()
        ann.settle()
        ann.page.keyboard.press("i")
        ann.page.get_by_role("button", name="Another rater").click()
        known = ann.page.locator("#raters button").all_inner_texts()
        assert sorted(known) == ["Bob & Co (1 of 3)", "ann (1 of 3)"]
        ann.page.get_by_role("button", name="Bob & Co").click()
        ann.settle()
        assert ann.text("#rater") == "Bob & Co" and ann.current() == bob.current()


def test_without_a_server_the_page_reports_it_and_stays(
    browser: Browser, link: str, task: StoreTask
) -> None:
    with opened_page(browser, link) as ann:
        place = ann.current()
        with largest_file(1):
            ann.press("ArrowLeft")
        assert "Not saved: Cannot write" in ann.text("#notice")
        assert ann.current() == place
        ann.press("ArrowLeft")  # room was made
        assert ann.page.locator("#notice").is_hidden()
        assert on_disk(task, "ann")[place[0]][0] in (1.0, -1.0)
        post(f"{link}end", {"rater": "ann"})
        ann.page.wait_for_timeout(500)
        ann.page.keyboard.press("ArrowLeft")
        ann.page.wait_for_selector("#notice.wrong")
        assert "Not saved: The server does not respond." in ann.text("#notice")
        assert ann.current() == (place[0], 1)


def test_a_pair_that_failed_to_load_is_fetched_again(browser: Browser, link: str) -> None:
    with opened_page(browser, link) as ann:
        pair, _ = ann.current()
        ann.page.route("**/sheet/**", lambda route: route.abort())
        ann.page.reload()
        ann.until("document.querySelector('#notice.wrong')")
        assert "This pair cannot be shown" in ann.text("#notice")
        ann.page.keyboard.press("ArrowLeft")  # nobody can judge what is not there
        ann.page.wait_for_timeout(300)
        ann.page.unroute("**/sheet/**")
        ann.press("s")  # but skip it; the next segment is fetched anew
        assert ann.current() == (pair, 1)


@pytest.mark.parametrize("size", [(375, 700), (1280, 720)], ids=str)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_fits_and_its_text_is_legible(
    browser: Browser, link: str, size: tuple[int, int], scheme: str
) -> None:
    viewport = {"width": size[0], "height": size[1]}
    with opened_page(browser, link, viewport=viewport, color_scheme=scheme) as ann:
        width, height, ink, paper = ann.page.evaluate(
            "[document.documentElement.scrollWidth, document.documentElement.scrollHeight,"
            " getComputedStyle(document.body).color,"
            " getComputedStyle(document.body).backgroundColor]"
        )
        assert width <= size[0] and height <= size[1]
        assert contrast(ink, paper) > 7
        box = ann.page.locator("#left canvas").bounding_box()
        assert box is not None
        scale = box["width"] / SHAPE.width
        assert scale >= 2 and scale == int(scale)  # every pixel is a square
        buttons = ann.page.get_by_role("button").all()
        assert all((button.text_content() or "").strip() for button in buttons)


def contrast(one: str, other: str) -> float:
    """The contrast of two CSS colours by WCAG 2."""

    def luminance(colour: str) -> float:
        channels = np.array([float(part) for part in re.findall(r"[\d.]+", colour)[:3]]) / 255
        linear = np.where(
            channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4
        )
        return float(linear @ [0.2126, 0.7152, 0.0722])

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_reduced_motion_starts_paused(browser: Browser, link: str) -> None:
    with opened_page(browser, link, reduced_motion="reduce") as ann:
        assert ann.text("#play").split() == ["Space", "Play"]
        seen = ann.canvases()
        ann.page.wait_for_timeout(500)
        assert np.array_equal(ann.canvases(), seen)
