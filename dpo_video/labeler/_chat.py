"""Requests to a language model behind an OpenAI-compatible endpoint, with cache and retries.

The key is read from the environment and passed to the client library only: no option, file or
message contains it.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar, final
from urllib.parse import urlsplit

from pydantic import ConfigDict, Field, field_validator

from dpo_video.errors import UserError
from dpo_video.paths import LocalPath
from dpo_video.strategies import Strategy
from dpo_video.support.atomic import write_text, writing
from dpo_video.support.reading import parse_json, read_bytes

if TYPE_CHECKING:
    from openai import OpenAI

T = TypeVar("T")

TRANSIENT = (408, 409, 425, 429)  # status codes worth a retry, as 5xx are
LONGEST_WAIT = 60.0  # seconds


class FailedError(Exception):
    """A failed request or an answer of another form than requested; a retry may succeed."""

    def __init__(self, reason: str, wait: float | None = None) -> None:
        super().__init__(reason)
        self.wait = wait
        """Seconds that the server requests."""


class Endpoint(Strategy):
    """Options of an endpoint and of requests to it."""

    model_config = ConfigDict(hide_input_in_errors=True)  # an input may hold a password
    secrets: ClassVar[Mapping[str, str]] = {"key_variable": "base_url"}

    model: str
    """Name of the model at the endpoint."""
    base_url: str = "https://api.openai.com/v1"
    """The endpoint."""
    key_variable: str = "OPENAI_API_KEY"
    """Environment variable with the key; empty if none is needed. A file cannot set it, and a
    base_url from a file gets no key without it."""
    timeout: float = Field(default=120.0, gt=0)
    """Longest time of an answer, in seconds."""
    retries: int = Field(default=5, ge=0)
    """Retries after a failure: too many requests, a server error, a malformed answer."""
    wait: float = Field(default=1.0, ge=0)
    """Seconds before the first retry, doubled for each further one, unless Retry-After is given."""
    cache: LocalPath | None = None
    """Folder of the cached answers; the user's cache folder if unset."""

    @field_validator("base_url")
    @classmethod
    def _keeps_no_secret(cls, value: str) -> str:
        parts = urlsplit(value)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("not an http or https address")
        if parts.username or parts.password or parts.query:
            raise ValueError("must not contain a key or password; put it into the environment")
        return value

    @property
    def cache_folder(self) -> Path:
        """The folder that `cache` stands for."""
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        return Path(self.cache) if self.cache else home / "dpo-video" / "vlm"


@dataclass(frozen=True, kw_only=True)
class Answer(Generic[T]):
    """An answer and what it cost."""

    value: T
    requests: int
    """0 if it was in the cache."""
    input_tokens: int
    output_tokens: int


@final
class Chat:
    """A connection to an endpoint; safe from several threads at once."""

    def __init__(self, endpoint: Endpoint, client: OpenAI) -> None:
        self.endpoint, self._client = endpoint, client
        self._stopped = threading.Event()

    def stop(self) -> None:
        """End the requests of all threads, without further attempts."""
        self._stopped.set()
        self._client.close()

    def ask(self, content: Sequence[dict[str, Any]], read: Callable[[str], T]) -> Answer[T]:
        """Ask a question, or return its cached answer, keyed by a hash of question and model.

        Args:
            content: The parts of one user message, as the protocol defines them.
            read: Parses the text of an answer; raises FailedError for an invalid one.

        Raises:
            UserError: if the endpoint refuses the request, or all attempts fail.
        """
        question = json.dumps([self.endpoint.model, content], sort_keys=True)
        digest = hashlib.sha256(question.encode()).hexdigest()
        path = self.endpoint.cache_folder / digest[:2] / f"{digest}.json"
        cached = _cached(path)
        if cached is not None:
            try:
                return Answer(value=read(cached), requests=0, input_tokens=0, output_tokens=0)
            except FailedError:
                pass  # an older version wrote it
        return self._request(content, read, path)

    def _request(
        self, content: Sequence[dict[str, Any]], read: Callable[[str], T], path: Path
    ) -> Answer[T]:
        sent = received = 0
        failures: list[str] = []
        for attempt in range(self.endpoint.retries + 1):
            wait = min(LONGEST_WAIT, self.endpoint.wait * 2**attempt)
            try:
                reply = self._complete(content)
                sent, received = sent + reply.input_tokens, received + reply.output_tokens
                value = read(reply.text)
            except FailedError as failure:
                failures.append(str(failure))
                wait = wait if failure.wait is None else min(LONGEST_WAIT, failure.wait)
            else:
                with writing(path):
                    write_text(path, json.dumps({"answer": reply.text}) + "\n")
                return Answer(
                    value=value, requests=attempt + 1, input_tokens=sent, output_tokens=received
                )
            if attempt < self.endpoint.retries and self._stopped.wait(wait):
                break
        raise UserError(
            f"'{self.endpoint.base_url}' gave no valid answer in {len(failures)} attempts (last: "
            f"{failures[-1]}). All labels so far are saved: run the same command again to resume."
        )

    def _complete(self, content: Sequence[dict[str, Any]]) -> _Reply:
        """One request; a FailedError if a retry may succeed, else a UserError."""
        import openai

        messages: Any = [{"role": "user", "content": list(content)}]
        try:
            completion = self._client.chat.completions.create(
                model=self.endpoint.model, messages=messages
            )
        except openai.APIStatusError as error:
            if error.status_code in TRANSIENT or error.status_code >= 500:
                wait = _seconds(error.response.headers.get("retry-after"))
                raise FailedError(f"status {error.status_code}", wait) from error
            raise self._refused(error.status_code, error.message) from error
        except openai.APITimeoutError as error:
            raise FailedError(f"no answer within {self.endpoint.timeout:g} s") from error
        except openai.APIConnectionError as error:
            raise FailedError("no connection") from error
        except (openai.APIError, ValueError) as error:
            raise FailedError("an answer outside the protocol") from error
        choices = getattr(completion, "choices", None)
        text = choices[0].message.content if choices else None
        if not isinstance(text, str):
            raise FailedError("an answer without text")
        usage = completion.usage
        return _Reply(
            text=text,
            input_tokens=_count(usage, "prompt_tokens"),
            output_tokens=_count(usage, "completion_tokens"),
        )

    def _refused(self, status: int, message: str) -> UserError:
        where, variable = self.endpoint.base_url, self.endpoint.key_variable
        if status in (401, 403) and not variable:
            return UserError(
                f"'{where}' needs a key (status {status}). Name the environment variable that "
                "holds it: --set labeler.key_variable=NAME"
            )
        if status in (401, 403):  # the message may contain parts of the key
            return UserError(
                f"'{where}' refuses the key in the environment variable {variable} "
                f"(status {status}). Set it to a valid key."
            )
        reason = " ".join(message.split())[:200]
        if key := os.environ.get(variable):
            reason = reason.replace(key, "***")
        return UserError(
            f"'{where}' refuses the request (status {status}: {reason}). Check labeler.base_url "
            "and labeler.model."
        )


@contextmanager
def open_chat(endpoint: Endpoint) -> Iterator[Chat]:
    """Open a connection; a UserError if the client library or the key is missing."""
    try:
        from openai import OpenAI
    except ImportError as error:
        raise UserError(
            "The labeler vlm needs the openai package. Install it: pip install 'dpo-video[vlm]'"
        ) from error
    variable = endpoint.key_variable
    key = os.environ.get(variable) if variable else "none"
    if not key:
        raise UserError(
            f"The environment variable {variable} has no key for '{endpoint.base_url}'. Set it, or "
            'name another (labeler.key_variable; "" if no key is needed).'
        )
    with OpenAI(
        api_key=key, base_url=endpoint.base_url, timeout=endpoint.timeout, max_retries=0
    ) as client:
        yield Chat(endpoint, client)


@dataclass(frozen=True, kw_only=True)
class _Reply:
    text: str
    input_tokens: int
    output_tokens: int


def _cached(path: Path) -> str | None:
    """The text of a cached answer; None if it is missing or damaged."""
    try:
        answer = parse_json(read_bytes(path), storable=False)["answer"]
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return answer if isinstance(answer, str) else None


def _count(usage: Any, name: str) -> int:
    """A number of tokens that the server reports; 0 if it reports something else."""
    found = getattr(usage, name, None)
    return found if isinstance(found, int) else 0


def _seconds(header: str | None) -> float | None:
    try:
        return max(0.0, float(header or ""))
    except ValueError:  # missing, or a date
        return None
