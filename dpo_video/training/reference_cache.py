"""The reference's predictions on disk, so that no reference runs while the policy trains.

    STORE/bank/KEY/bank.json                 what they were made with
    STORE/bank/KEY/00012-003.safetensors     pair 12, draw 3: first, second

The bank lies beside its pairs, not in a run: a prediction depends on the pair, the model, the draw
and the kernels, and not on a loss, a rate or labels, so that runs which differ in those share it.
A prediction exists when its file does; files appear whole or not at all.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self, final

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from dpo_video.data.store import PairStore, locked
from dpo_video.errors import StoreError
from dpo_video.strategies import VideoModel
from dpo_video.support.atomic import write_tensors, write_text, writing
from dpo_video.support.hashing import tensors_digest
from dpo_video.support.statistics import Record
from dpo_video.types import Latents

_NARROW = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class PairDraw:
    """A pair, and which of its draws of noise and level it gets."""

    pair: int
    draw: int


class ReferenceCacheManifest(Record):
    """What all predictions of a bank were made with."""

    format: Literal["dpo-video bank"] = "dpo-video bank"
    version: Literal[1] = 1
    identity: str
    """The hash of the model's weights."""
    adapter: Literal["none"] = "none"
    """The reference's adapter: the base has none."""
    seed: int
    """Of the draws."""
    precision: str
    """Of the forward passes."""
    videos_at_once: Literal[1, 2]
    """Of a pair, in a forward pass: last bits depend on that too."""
    chunks: int = 1
    """Parts that layers ran in (`memory.forward_chunks`): and on that."""
    kernels: str
    """What computed them: last bits differ from one library, device or number of threads to
    another, and a step whose policy equals its reference must have a margin of exactly 0."""

    @classmethod
    def of(
        cls,
        model: VideoModel,
        seed: int,
        precision: str,
        videos_at_once: Literal[1, 2] = 2,
        chunks: int = 1,
        *,
        compiled: bool = False,
    ) -> Self:
        """What a run would make its predictions with, here and now."""
        device = model.device
        if device.type == "cuda":
            kernels = torch.cuda.get_device_name(device)
        else:
            kernels = f"{device.type} with {torch.get_num_threads()} threads"
        return cls(
            identity=model.identity,
            seed=seed,
            precision=precision,
            videos_at_once=videos_at_once,
            chunks=chunks,
            kernels=f"torch {torch.__version__}, {kernels}{', compiled' if compiled else ''}",
        )

    @property
    def key(self) -> str:
        """A hash of everything: 10 hex digits."""
        text = json.dumps(self.model_dump(mode="json"), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:10]


@dataclass(frozen=True, kw_only=True)
class ReferenceCacheReport:
    """How far the bank is; the first one comes before anything is written."""

    folder: Path
    done: int
    total: int
    """Predictions that the run needs."""
    size: int
    """Bytes of all of them."""
    seconds: float
    """Left, by the time that they have taken so far."""


@final
class ReferenceCache:
    """An open bank: `fill` once, `read` at every step."""

    def __init__(self, store: PairStore, manifest: ReferenceCacheManifest) -> None:
        self.store = store
        self.folder = store.folder / "bank" / manifest.key
        path = self.folder / "bank.json"
        if not path.exists():
            with writing(self.folder):
                self.folder.mkdir(parents=True, exist_ok=True)
                with locked(self.folder):
                    write_text(path, manifest.model_dump_json(indent=2) + "\n")
        try:
            found = ReferenceCacheManifest.model_validate_json(path.read_bytes())
        except ValidationError:
            found = None
        if found != manifest:
            raise self._stale(f"'{path}' does not describe what this run would make")

    def read(self, visits: Sequence[PairDraw]) -> Latents:
        """Predictions on the CPU: all first videos, then all second ones."""
        parts = [self._load(visit) for visit in visits]
        return torch.stack([part[name].float() for name in ("first", "second") for part in parts])

    def fill(
        self,
        visits: Sequence[PairDraw],
        predict: Callable[[PairDraw], Latents],
        on_progress: Callable[[ReferenceCacheReport], None] = lambda report: None,
    ) -> None:
        """Make the predictions that are missing.

        Args:
            visits: All that the run, or this process of it, will read.
            predict: The reference's predictions of one pair's two videos.
            on_progress: Told of size and time before anything is written, then of every prediction.

        Raises:
            StoreError: if what is there belongs to other pairs, or is not what `predict` gives.
            UserError: if the disk is too small.
        """
        if not visits:
            return
        digests = {pair: self._digest(pair) for pair in {visit.pair for visit in visits}}
        missing = [visit for visit in visits if not self._holds(visit, digests[visit.pair])]
        probe = next((visit for visit in visits if visit not in set(missing)), visits[0])
        started = time.monotonic()
        prediction = _narrowed(predict(probe))
        seconds = time.monotonic() - started
        if probe not in missing and not torch.equal(self.read([probe]), prediction.float().cpu()):
            raise self._stale(
                f"The reference's prediction of pair {probe.pair} there is not what it predicts now"
            )
        size = prediction.nbytes
        self._check_space(size * len(missing))

        def report(done: int, left: float) -> None:
            on_progress(
                ReferenceCacheReport(
                    folder=self.folder,
                    done=len(visits) - len(missing) + done,
                    total=len(visits),
                    size=size * len(visits),
                    seconds=left,
                )
            )

        report(0, seconds * len(missing))
        started = time.monotonic()
        for done, visit in enumerate(missing, start=1):
            self._save(visit, _narrowed(predict(visit)), digests[visit.pair])
            report(done, (time.monotonic() - started) * (len(missing) - done) / done)

    def _path(self, visit: PairDraw) -> Path:
        return self.folder / f"{visit.pair:05d}-{visit.draw:03d}.safetensors"

    def _digest(self, pair: int) -> str:
        """A hash of what the networks see of a pair: both latents and the encoded prompt."""
        batch = self.store.batch([pair])
        return tensors_digest({"first": batch.first, "second": batch.second, **batch.context})

    def _holds(self, visit: PairDraw, digest: str) -> bool:
        """Whether a prediction is there; a StoreError if it was made of another pair."""
        path = self._path(visit)
        if not path.exists():
            return False
        try:
            with safe_open(path, framework="pt") as file:
                made_of = (file.metadata() or {}).get("pair")
        except (OSError, SafetensorError) as error:
            raise self._damaged(path, error) from error
        if made_of != digest:
            raise self._stale(f"'{path.name}' there was predicted for another pair {visit.pair}")
        return True

    def _save(self, visit: PairDraw, prediction: Latents, digest: str) -> None:
        first, second = prediction.cpu()
        with writing(self.folder), locked(self.folder):  # another run may fill the same bank
            write_tensors(
                self._path(visit), {"first": first, "second": second}, metadata={"pair": digest}
            )

    def _load(self, visit: PairDraw) -> dict[str, Tensor]:
        path = self._path(visit)
        try:
            found = load_file(path)
            shapes = {name: tuple(tensor.shape) for name, tensor in found.items()}
            if shapes != dict.fromkeys(("first", "second"), self.store.manifest.latent_shape):
                raise ValueError("it holds something else than two predictions")
        except (OSError, SafetensorError, ValueError) as error:
            raise self._damaged(path, error) from error
        return found

    def _check_space(self, size: int) -> None:
        free = shutil.disk_usage(self.folder).free
        if size > free:
            raise StoreError(
                f"The bank in '{self.folder}' needs {size / 2**30:.1f} GiB more, and the disk has "
                f"{free / 2**30:.1f} GiB. Give fewer draws (--set reference.noise_draws=1) or "
                "free some."
            )

    def _damaged(self, path: Path, error: Exception) -> StoreError:
        return StoreError(
            f"'{path}' cannot be read ({error}). Delete that file and run the same command again: "
            "it is made anew, the rest is kept."
        )

    def _stale(self, reason: str) -> StoreError:
        return StoreError(
            f"The bank of predictions in '{self.folder}' is stale: {reason}. Delete that folder "
            "and run the same command again, or train with --reference toggle."
        )


def _narrowed(prediction: Latents) -> Latents:
    """The same numbers, to the bit, in half the bytes where they came out of half precision.

    Mixed precision hands its results over as fp32.
    """
    for dtype in _NARROW:
        narrow = prediction.to(dtype)
        if torch.equal(narrow.to(prediction.dtype), prediction):
            return narrow
    return prediction
