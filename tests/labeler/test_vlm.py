"""Labels from a vision-language model, against a local server that can fail."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from chat_server import Question, Reply, Server, brighter, images, serving
from torch import Tensor

from dpo_video.errors import UserError
from dpo_video.labeler.vlm import VLM
from dpo_video.workflows.config import resolve

KEY = "sk-this-is-a-secret-0123456789"
SEGMENTS = [slice(0, 2), slice(2, 4)]


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def server() -> Iterator[Server]:
    with serving() as running:
        yield running


def labeler(server: Server, folder: Path, **options: Any) -> VLM:
    given = {"model": "local", "wait": 0.01, "size": 16, "frames": 2, "parallel": 1, **options}
    return VLM(base_url=server.url, cache=str(folder / "cache"), **given)


def videos(*brightness: tuple[float, float]) -> Tensor:
    """One pair per argument: two segments of two frames, each of one brightness."""
    frames = torch.tensor([[one, one, two, two] for one, two in brightness]).float()
    return frames[:, None, :, None, None].expand(-1, 3, 4, 16, 16)


# --- what it asks and what it makes of the answers -------------------------------------------


def test_labels_follow_the_answers_and_notes_the_reasons(server: Server, tmp_path: Path) -> None:
    judgement = labeler(server, tmp_path).judge(
        ["a", "b"], videos((0.9, 0.2), (0.5, 0.5)), videos((0.1, 0.8), (0.5, 0.4)), SEGMENTS
    )
    assert judgement.labels.tolist() == [[1, -1], [0, 1]]
    assert judgement.notes[0] == (
        "1: first (cleaner), swapped second (cleaner); 2: second (cleaner), swapped first (cleaner)"
    )
    assert judgement.figures["segments asked"] == judgement.figures["alike in both orders"] == 4


def test_a_question_shows_the_frames_of_its_segment_in_both_orders(
    server: Server, tmp_path: Path
) -> None:
    labeler(server, tmp_path)(["a"], videos((0.2, 0.4)), videos((0.6, 0.8)), SEGMENTS)
    shown = [[round(float(image.mean()) / 255, 1) for image in images(question)]
             for question in server.questions]  # fmt: skip
    assert shown == [
        [0.2, 0.2, 0.6, 0.6], [0.6, 0.6, 0.2, 0.2], [0.4, 0.4, 0.8, 0.8], [0.8, 0.8, 0.4, 0.4]
    ]  # fmt: skip
    text = server.questions[0][0]["text"]
    assert "share their structure" in text and "fewer visual artifacts" in text
    assert {body["model"] for body in server.bodies} == {"local"}


def test_frames_are_spread_scaled_and_lossless(server: Server, tmp_path: Path) -> None:
    ramp = torch.linspace(0, 1, 9)[None, None, :, None, None].expand(1, 3, 9, 16, 24)
    labeler(server, tmp_path, frames=3)(["a"], ramp, ramp, [slice(0, 9)])
    shown = images(server.questions[0])
    assert [int(image[0, 0, 0]) for image in shown[:3]] == [0, 128, 255]
    labeler(server, tmp_path, frames=3, size=32)(["a"], ramp, ramp, [slice(0, 9)])
    assert images(server.questions[-1])[0].shape == (32, 48, 3)
    noise = torch.rand(1, 3, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    labeler(server, tmp_path)(["a"], noise, noise, [slice(0, 1)])
    sent = (noise[0, :, 0].movedim(0, -1) * 255).round().byte().numpy()
    assert np.array_equal(images(server.questions[-1])[0], sent)


def test_a_model_that_prefers_a_position_gives_ties(tmp_path: Path) -> None:
    def always(question: Question) -> Reply:
        return Reply(text='{"better": "first", "reason": "it came first"}')

    with serving(always) as server:
        judgement = labeler(server, tmp_path).judge(
            ["a"], videos((0.9, 0.9)), videos((0.1, 0.1)), SEGMENTS
        )
    assert judgement.labels.tolist() == [[0, 0]]
    assert judgement.figures["alike in both orders"] == 0


def test_tokens_are_counted_and_priced(server: Server, tmp_path: Path) -> None:
    """4 requests of 1000 tokens in and 20 out, at 2 and 10 dollars a million."""
    asking = labeler(server, tmp_path, input_price=2.0, output_price=10.0)
    figures = asking.judge(["a"], videos((0.9, 0.2)), videos((0.1, 0.8)), SEGMENTS).figures
    assert figures["requests"] == 4 and figures["answers from the cache"] == 0
    assert figures["input tokens"] == 4000 and figures["output tokens"] == 80
    assert figures["cost in US dollars"] == pytest.approx((4000 * 2 + 80 * 10) / 1e6)


# --- the cache -------------------------------------------------------------------------------


def test_answers_are_cached(server: Server, tmp_path: Path) -> None:
    both = videos((0.9, 0.2)), videos((0.1, 0.8))
    first = labeler(server, tmp_path).judge(["a"], *both, SEGMENTS)
    again = labeler(server, tmp_path, input_price=5.0).judge(["b"], *both, SEGMENTS)
    assert len(server.questions) == 4
    assert torch.equal(again.labels, first.labels) and again.notes == first.notes
    assert again.figures["answers from the cache"] == 4
    assert again.figures["requests"] == again.figures["cost in US dollars"] == 0
    # The other order asks the same questions.
    assert torch.equal(labeler(server, tmp_path)(["a"], both[1], both[0], SEGMENTS), -first.labels)
    assert len(server.questions) == 4
    labeler(server, tmp_path, model="another")(["a"], *both, SEGMENTS)
    assert len(server.questions) == 8
    labeler(server, tmp_path, size=32)(["a"], *both, SEGMENTS)
    assert len(server.questions) == 12


def test_identical_questions_are_sent_once(server: Server, tmp_path: Path) -> None:
    """Of two identical videos both orders are the same question; pairs may be alike as well."""
    same = videos((0.4, 0.4), (0.4, 0.4))
    judgement = labeler(server, tmp_path, parallel=8).judge(["a", "b"], same, same, SEGMENTS)
    assert len(server.questions) == judgement.figures["requests"] == 1
    assert not judgement.labels.any()


def test_a_damaged_cache_entry_is_requested_again(server: Server, tmp_path: Path) -> None:
    both = videos((0.9, 0.2)), videos((0.1, 0.8))
    labels = labeler(server, tmp_path)(["a"], *both, SEGMENTS)
    damages = [b"", b"\xff", b"[]", json.dumps({"answer": "I cannot say"}).encode()]
    files = sorted((tmp_path / "cache").rglob("*.json"))
    for file, damage in zip(files, damages, strict=True):
        file.write_bytes(damage)
    assert torch.equal(labeler(server, tmp_path)(["a"], *both, SEGMENTS), labels)
    assert len(server.questions) == 8


# --- faults ----------------------------------------------------------------------------------

PATIENCE = 0.5  # seconds
FAULTS = {
    "too many requests": Reply(status=429),
    "a server's error": Reply(status=500),
    "a gateway's error": Reply(status=503, body=b"<html>try later</html>"),
    "no answer in time": Reply(delay=3 * PATIENCE),
    "no JSON inside": Reply(text="The first one, I think."),
    "a wrong word": Reply(text='{"better": "left", "reason": "sharper"}'),
    "nested too deeply": Reply(text='{"better":' * 5000 + "}" * 5000),
    "no word": Reply(text='{"better": null}'),
    "half an answer": Reply(text='{"better": "fir'),
    "no text": Reply(text=None),
    "not the protocol": Reply(body=b"{}"),
    "no JSON at all": Reply(body=b"<html>hello</html>"),
    "an empty body": Reply(body=b""),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_transient_failure_is_retried(fault: str, server: Server, tmp_path: Path) -> None:
    server.faults = [FAULTS[fault]] * 2
    asking = labeler(server, tmp_path, timeout=PATIENCE if FAULTS[fault].delay else 30)
    judgement = asking.judge(["a"], videos((0.9, 0.2)), videos((0.1, 0.8)), SEGMENTS)
    assert judgement.labels.tolist() == [[1, -1]]
    assert judgement.figures["requests"] == 6


@pytest.mark.parametrize(
    "text",
    [
        '```json\n{"better": "First", "reason": "ok"}\n```',
        'Well: {"reason": "", "better":"first "}',
        r'{"better": "first", "reason": "half \ud83d"}',
        '{"better": "first", "reason": "half \ud83d"}',
    ],
)
def test_text_around_the_json_is_ignored(text: str, tmp_path: Path) -> None:
    with serving(lambda question: Reply(text=text)) as server:
        judgement = labeler(server, tmp_path, retries=0).judge(
            ["a"], videos((0.9, 0.9)), videos((0.1, 0.1)), SEGMENTS
        )
        again = labeler(server, tmp_path, retries=0).judge(
            ["a"], videos((0.9, 0.9)), videos((0.1, 0.1)), SEGMENTS
        )
    assert "1: first (" in judgement.notes[0]
    judgement.notes[0].encode()  # can be stored
    assert again.figures["requests"] == 0


@pytest.mark.parametrize(
    ("fault", "sentence"),
    [
        ("too many requests", "status 429"),
        ("a server's error", "status 500"),
        ("no answer in time", "no answer within 0.5 s"),
        ("no JSON inside", "an answer that is not JSON"),
        ("a wrong word", "other than first, second and tie"),
        ("no text", "an answer without text"),
    ],
)
def test_a_lasting_failure_ends_after_all_retries(
    fault: str, sentence: str, tmp_path: Path
) -> None:
    with serving(lambda question: FAULTS[fault]) as server:
        asking = labeler(
            server, tmp_path, timeout=PATIENCE if FAULTS[fault].delay else 30, retries=2
        )
        with pytest.raises(UserError, match="no valid answer in 3 attempts") as caught:
            asking(["a"], videos((0.9, 0.9)), videos((0.1, 0.1)), [slice(0, 4)])
        # The question in the other order was already sent.
        assert len(server.questions) in (3, 4, 5, 6)
    assert sentence in str(caught.value) and "are saved: run the same" in str(caught.value)


def test_waits_double_unless_retry_after_is_given(server: Server, tmp_path: Path) -> None:
    server.faults = [Reply(status=500), Reply(status=500), Reply(status=500)]
    whole = [slice(0, 4)]
    labeler(server, tmp_path, wait=0.1)(["a"], videos((0.9, 0.9)), videos((0.1, 0.1)), whole)
    waits = [after - before for before, after in zip(server.times, server.times[1:4], strict=False)]
    assert waits[0] >= 0.1 and waits[1] >= 0.2 and waits[2] >= 0.4
    server.times.clear()
    server.faults = [Reply(status=429, headers={"Retry-After": "0.5"})]
    labeler(server, tmp_path, wait=0.0)(["a"], videos((0.8, 0.8)), videos((0.1, 0.1)), whole)
    assert server.times[1] - server.times[0] >= 0.5


def test_a_missing_server_is_reported(tmp_path: Path) -> None:
    with serving() as server:
        pass
    with pytest.raises(UserError, match=r"2 attempts \(last: no connection"):
        labeler(server, tmp_path, retries=1)(["a"], videos((1, 1)), videos((0, 0)), SEGMENTS)


@pytest.mark.parametrize(
    ("status", "sentence"),
    [
        (401, r"refuses the key in the environment variable OPENAI_API_KEY \(status 401\)"),
        (404, r"refuses the request \(status 404: .*Check labeler.base_url and labeler.model"),
        (400, r"refuses the request \(status 400: "),
    ],
)
def test_a_refusal_is_not_retried_and_reveals_no_key(
    status: int, sentence: str, tmp_path: Path
) -> None:
    reply = Reply(status=status, text=f"Incorrect API key provided: {KEY}")
    with (
        serving(lambda question: reply) as server,
        pytest.raises(UserError, match=sentence) as caught,
    ):
        labeler(server, tmp_path)(["a"], videos((1, 1)), videos((0, 0)), [slice(0, 4)])
    assert KEY not in str(caught.value)
    assert len(server.questions) <= 2, "one in each order"


# --- the key ---------------------------------------------------------------------------------


def test_the_key_is_sent_to_the_server_only(
    server: Server, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    asking = labeler(server, tmp_path)
    judgement = asking.judge(["a"], videos((0.9, 0.2)), videos((0.1, 0.8)), SEGMENTS)
    assert set(server.keys) == {f"Bearer {KEY}"}
    written = [path.read_text() for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) == 4
    kept = [*written, *judgement.notes, repr(asking), asking.model_dump_json(), *capfd.readouterr()]
    assert not any("secret" in text for text in kept)
    config = resolve(choices={"labeler": "vlm"}, assignments=["labeler.model=local"])
    assert "secret" not in config.toml() and "OPENAI_API_KEY" not in config.toml()


def test_the_key_can_be_in_another_variable(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = videos((0.9, 0.2)), videos((0.1, 0.8))
    asking = labeler(server, tmp_path, key_variable="MY_KEY")
    with pytest.raises(UserError, match="The environment variable MY_KEY has no key"):
        asking(["a"], *both, SEGMENTS)
    monkeypatch.setenv("MY_KEY", "other")
    asking(["a"], *both, SEGMENTS)
    assert set(server.keys) == {"Bearer other"}
    labeler(server, tmp_path / "new", key_variable="")(["a"], *both, SEGMENTS)
    assert not any(KEY in key for key in server.keys)


@pytest.mark.parametrize(
    "address", ["http://me:secret@host/v1", "https://host/v1?key=secret", "host/v1", "file:///x"]
)
def test_an_address_with_a_password_is_refused_without_quoting_it(address: str) -> None:
    with pytest.raises(UserError, match=r"^labeler\.base_url: (must not contain|not an)") as caught:
        resolve(
            choices={"labeler": "vlm"},
            assignments=["labeler.model=local", f"labeler.base_url={address}"],
        )
    assert "secret" not in str(caught.value)


def test_the_model_must_be_named() -> None:
    with pytest.raises(UserError, match=r"labeler\.model: it is missing"):
        resolve(choices={"labeler": "vlm"})


def test_the_test_server_answers_as_configured() -> None:
    """The tests above rely on it."""
    assert json.loads(brighter([]).text or "")["better"] == "tie"
