"""Encoded prompts: those that pairs were built with, and others from the text encoder."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import final

import torch

from dpo_video.data.build import PROMPTS_KEPT
from dpo_video.data.store import PairStore
from dpo_video.errors import StoreError
from dpo_video.strategies import VideoModel
from dpo_video.types import Context, Prompt


@final
class PromptEncodings:
    """Encodes prompts some at a time, and frees the text encoder before anything is sampled.

    It is not loaded at all for prompts whose encodings are stored with pairs of the same model.
    """

    def __init__(
        self, model: VideoModel, store: PairStore | None = None, negative_prompt: str = ""
    ) -> None:
        """Take a model, and pairs that may have been built with it.

        Args:
            model: Encodes.
            store: Pairs; those of another model are ignored.
            negative_prompt: The model's own.
        """
        self._model, self._encoded = model, dict[str, Context]()
        self._store = store if store and store.manifest.identity == model.identity else None
        if self._store is None or self._store.negative_prompt != negative_prompt:
            return
        if (negative := self._store.negative_context()) is not None:
            model.keep_negative(negative)

    def first(self, batches: Sequence[Sequence[Prompt]], *, guided: bool = True) -> Context:
        """The context of the first batch; the next ones are encoded in the same go.

        Args:
            batches: This batch and those that follow. A batch has one negative prompt.
            guided: Whether negative prompts are needed.
        """
        texts = [row.text for row in batches[0]]
        if any(text not in self._encoded for text in texts):
            self._encode(batches, guided=guided)
        contexts = [self._encoded[text] for text in texts]
        return {name: torch.cat([each[name] for each in contexts]) for name in contexts[0]}

    def _encode(self, batches: Sequence[Sequence[Prompt]], *, guided: bool) -> None:
        """Encode the next prompts, at most PROMPTS_KEPT and those of the first batch."""
        self._encoded.clear()
        for number, batch in enumerate(batches):
            if number and len(self._encoded) + len(batch) > PROMPTS_KEPT:
                break
            for row in batch:
                if row.text not in self._encoded:
                    self._encoded[row.text] = self._context(row.text)
            if guided:
                self._model.negative_context(batch[0].negative_prompt)
        self._model.release()

    def _context(self, text: str) -> Context:
        with suppress(StoreError):  # they are damaged, or gone
            stored = self._store.encoded(text) if self._store is not None else None
            if stored is not None:
                return stored
        return {name: each.cpu() for name, each in self._model.encode_prompts([text]).items()}
