"""Labels from a vision-language model."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, final

import torch
from PIL import Image
from pydantic import Field

from dpo_video.labeler._chat import Answer, Endpoint, FailedError, open_chat
from dpo_video.strategies import LabelResult, ReasonedLabeler
from dpo_video.support.reading import one_spaced, parse_json
from dpo_video.types import Video, Videos

LONGEST_REASON = 2000  # characters kept in a note
_SIGNS = {"first": 1, "second": -1, "tie": 0}
_QUESTION = (
    "Below are frames, in order, of two short videos, first those of the first video, then those "
    "of the second. Both were made from the same source and share their structure: scene, layout "
    "and motion are meant to be alike. Judge one thing only: which of the two has fewer visual "
    "artifacts, such as flicker, noise, blur, tearing, distorted or vanishing parts, or motion "
    "that breaks off. Taste, style and content do not count. Where you see no clear difference, "
    'it is a tie. Answer with JSON and nothing else: {"better": "first" or "second" or "tie", '
    '"reason": "one short sentence"}'
)


@dataclass(frozen=True, kw_only=True)
class _Verdict:
    sign: int
    better: str
    reason: str


@final
class VLM(Endpoint, ReasonedLabeler):
    """A vision-language model: decides which video has fewer artifacts, per segment.

    DenseDPO's labeler (Wu et al. 2025, arXiv 2506.03517): the prompt shows frames of one segment of
    both videos, states that the videos share their structure, and asks about artifacts only. Each
    question is asked in both orders, because such models favour a position; answers that disagree
    are a tie.

    Any endpoint of OpenAI's chat protocol works. The key is read from the environment and never
    stored. Answers are cached by a hash of frames, question and model, so repeated labelling costs
    nothing.
    Needs the extra `vlm`.
    """

    incidental: ClassVar[frozenset[str]] = frozenset(
        {"base_url", "key_variable", "timeout", "retries", "wait", "parallel", "cache",
         "input_price", "output_price"}
    )  # fmt: skip

    frames: int = Field(default=8, ge=1)
    """Evenly spaced frames of each video per segment; the paper uses 8 per second."""
    size: int = Field(default=512, ge=16)
    """Shorter side that frames are scaled to, in pixels."""
    format: Literal["png", "jpeg"] = "png"
    """Format of the images sent; jpeg (quality 95) is smaller, but adds artifacts."""
    parallel: int = Field(default=4, ge=1)
    """Number of concurrent requests."""
    input_price: float = Field(default=0.0, ge=0)
    """US dollars per million input tokens, to report the cost."""
    output_price: float = Field(default=0.0, ge=0)
    """US dollars per million output tokens."""

    def judge(
        self, prompts: Sequence[str], first: Videos, second: Videos, segments: Sequence[slice]
    ) -> LabelResult:
        """Ask twice per pair and segment; the notes hold both answers and their reasons."""
        segments_of_pairs = [
            (pair, segment) for pair in range(len(prompts)) for segment in segments
        ]
        questions = [
            self._question(one[pair][:, segment], other[pair][:, segment])
            for pair, segment in segments_of_pairs
            for one, other in ((first, second), (second, first))
        ]
        distinct = {json.dumps(question): question for question in questions}
        with open_chat(self) as chat, ThreadPoolExecutor(self.parallel) as threads:
            try:
                answers = list(
                    threads.map(lambda question: chat.ask(question, _read), distinct.values())
                )
            except BaseException:  # a signal must not wait for a slow endpoint
                chat.stop()
                raise
        by_question = {key: answer.value for key, answer in zip(distinct, answers, strict=True)}
        verdicts = [by_question[json.dumps(question)] for question in questions]
        both = list(zip(verdicts[::2], verdicts[1::2], strict=True))
        alike = [one.sign == -other.sign for one, other in both]
        labels = torch.tensor(
            [float(one.sign) if same else 0.0 for (one, _), same in zip(both, alike, strict=True)]
        )
        reasons = [f"{one.better} ({one.reason}), swapped {other.better} ({other.reason})"
                for one, other in both]  # fmt: skip
        count = len(segments)
        notes = [
            "; ".join(f"{i + 1}: {reasons[pair * count + i]}" for i in range(count))
            for pair in range(len(prompts))
        ]
        return LabelResult(
            labels=labels.reshape(len(prompts), count),
            notes=notes,
            figures={
                **self._bill(answers),
                "segments asked": len(both),
                "alike in both orders": sum(alike),
            },
        )

    def _question(self, first: Video, second: Video) -> list[dict[str, Any]]:
        content: list[dict[str, Any]] = [{"type": "text", "text": _QUESTION}]
        for name, video in (("First", first), ("Second", second)):
            content.append({"type": "text", "text": f"{name} video:"})
            content += [
                {"type": "image_url", "image_url": {"url": url}} for url in self._images(video)
            ]
        return content

    def _images(self, video: Video) -> list[str]:
        """Data URLs of evenly spaced frames."""
        shown = min(self.frames, video.shape[1])
        frames = torch.linspace(0, video.shape[1] - 1, shown).round().long()
        pixels = video[:, frames].movedim(0, -1).clamp(0, 1).mul(255).round().byte().cpu().numpy()
        urls = []
        for frame in pixels:
            image = Image.fromarray(frame)
            scale = self.size / min(image.size)
            width, height = (max(1, round(side * scale)) for side in image.size)
            buffer = io.BytesIO()
            image.resize((width, height), Image.Resampling.BICUBIC).save(
                buffer, self.format.upper(), quality=95
            )
            data = base64.b64encode(buffer.getvalue()).decode()
            urls.append(f"data:image/{self.format};base64,{data}")
        return urls

    def _bill(self, answers: Sequence[Answer[_Verdict]]) -> dict[str, float]:
        sent = sum(answer.input_tokens for answer in answers)
        received = sum(answer.output_tokens for answer in answers)
        return {
            "requests": sum(answer.requests for answer in answers),
            "answers from the cache": sum(answer.requests == 0 for answer in answers),
            "input tokens": sent,
            "output tokens": received,
            "cost in US dollars": (sent * self.input_price + received * self.output_price) / 1e6,
        }


def _read(text: str) -> _Verdict:
    """The JSON object in an answer, ignoring any text around it."""
    start, end = text.find("{"), text.rfind("}")
    try:
        found = parse_json(text[start : end + 1], storable=False)
    except ValueError as error:
        raise FailedError(f"an answer that is not JSON ({error})") from error
    if not isinstance(found, dict):
        raise FailedError("an answer that is no JSON object")
    better = found.get("better")
    word = better.strip().lower() if isinstance(better, str) else ""
    if word not in _SIGNS:
        raise FailedError("an answer other than first, second and tie")
    reason = one_spaced(str(found.get("reason") or "no reason given"))[:LONGEST_REASON]
    reason = reason.encode(errors="replace").decode()  # a lone surrogate cannot be stored
    return _Verdict(sign=_SIGNS[word], better=word, reason=reason)
