"""The reference's predictions on disk, so that no reference runs while the policy trains.

    STORE/reference_cache/KEY/manifest.json            what they were made with
    STORE/reference_cache/KEY/00012-003.safetensors    pair 12, draw 3: first, second

The cache lies beside the pairs and not in a run: a prediction depends on the pair, the model, the
draw and the kernels, and not on the loss, the learning rate or the labels, so that runs that differ
in those share it. Files appear complete or not at all.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
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
from dpo_video.support.claims import claim
from dpo_video.support.hashing import tensors_digest
from dpo_video.support.reading import read_bytes, require_regular
from dpo_video.support.statistics import Record
from dpo_video.types import Latents

_NARROW = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class PairDraw:
    """A pair, and the number of its draw of noise and timestep."""

    pair: int
    draw: int


class ReferenceCacheManifest(Record):
    """What all predictions of a cache were made with."""

    format: Literal["dpo-video reference cache"] = "dpo-video reference cache"
    version: Literal[1] = 1
    identity: str
    """Hash of the model's weights."""
    adapter: str = "none"
    """Hash of the reference's adapter; the base has none."""
    seed: int
    """Seed of the draws."""
    timesteps: str = ""
    """What draws the timesteps; "" for the backbone's own distribution."""
    precision: str
    """Mixed precision of the forward passes."""
    videos_at_once: Literal[1, 2]
    """Videos of a pair per forward pass: the last bits depend on it."""
    chunks: int = 1
    """`memory.forward_chunks`: the last bits depend on it."""
    kernels: str
    """Library, device and number of threads: the last bits depend on them, and the margin of a
    policy that equals its reference must be exactly 0."""

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
        adapter: str = "none",
        timesteps: str = "",
    ) -> Self:
        """Manifest of the predictions that this run would make on this machine."""
        device = model.device
        if device.type == "cuda":
            kernels = torch.cuda.get_device_name(device)
        else:
            kernels = f"{device.type} with {torch.get_num_threads()} threads"
        return cls(
            identity=model.identity,
            adapter=adapter,
            timesteps=timesteps,
            seed=seed,
            precision=precision,
            videos_at_once=videos_at_once,
            chunks=chunks,
            kernels=f"torch {torch.__version__}, {kernels}{', compiled' if compiled else ''}",
        )

    @property
    def key(self) -> str:
        """Hash of the manifest: 10 hex digits."""
        fields = self.model_dump(mode="json")
        if not self.timesteps:
            del fields["timesteps"]
        text = json.dumps(fields, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:10]


@dataclass(frozen=True, kw_only=True)
class ReferenceCacheReport:
    """Progress of filling a cache; the first report comes before anything is written."""

    folder: Path
    done: int
    total: int
    """Predictions that the run needs."""
    size: int
    """Bytes of all of them."""
    seconds: float
    """Expected seconds to the end."""
    waiting: str = ""
    """A sentence, while another process fills the cache; the numbers are of no use then."""


@final
class ReferenceCache:
    """An open cache: `fill` it once, `read` from it at every step."""

    def __init__(self, store: PairStore, manifest: ReferenceCacheManifest) -> None:
        self.store = store
        self.folder = store.folder / "reference_cache" / manifest.key
        path = self.folder / "manifest.json"
        if not path.exists():
            with writing(self.folder):
                self.folder.mkdir(parents=True, exist_ok=True)
                with locked(self.folder):
                    write_text(path, manifest.model_dump_json(indent=2) + "\n")
        try:
            found = ReferenceCacheManifest.model_validate_json(read_bytes(path))
        except (OSError, ValidationError):
            found = None
        if found != manifest:
            raise self._stale(f"'{path}' does not describe this run")

    def read(self, draws: Sequence[PairDraw]) -> Latents:
        """Predictions on the CPU: those of all first videos, then of all second ones."""
        parts = [self._load(draw) for draw in draws]
        return torch.stack([part[name].float() for name in ("first", "second") for part in parts])

    def fill(
        self,
        draws: Sequence[PairDraw],
        predict: Callable[[PairDraw], Latents],
        on_progress: Callable[[ReferenceCacheReport], None] = lambda report: None,
        stop: Callable[[], bool] = lambda: False,
        part: tuple[int, int] = (0, 1),
        largest: Callable[[int], int] | None = None,
    ) -> bool:
        """Add the predictions that are missing; False if stopped before the end.

        Another run that is filling the same cache is waited for.

        Args:
            draws: All that this process will read.
            predict: The reference's predictions for the two videos of a pair.
            on_progress: Called before anything is written, with size and time, and after every
                prediction.
            stop: Called after each `on_progress`; the predictions made so far are kept.
            part: Number and count of the processes that fill the cache together.
            largest: The largest of the numbers that all these processes pass, if they must call
                `predict` and `stop` equally often.

        Raises:
            StoreError: if the cache belongs to other pairs, or differs from what `predict` returns.
            UserError: if the disk is too small.
        """
        if not draws:
            return True
        digests = {pair: self._digest(pair) for pair in {draw.pair for draw in draws}}
        if all(self._holds(draw, digests[draw.pair]) for draw in draws):
            return self._fill(draws, digests, predict, on_progress, stop, largest)

        def wait(text: str) -> None:
            on_progress(
                ReferenceCacheReport(
                    folder=self.folder, done=0, total=0, size=0, seconds=0.0, waiting=text
                )
            )

        with claim(
            self.folder,
            part=part,
            patience=float("inf"),
            note=wait,
            stop=stop if largest is None else lambda: False,
        ) as claimed:
            return claimed and self._fill(draws, digests, predict, on_progress, stop, largest)

    def _fill(
        self,
        draws: Sequence[PairDraw],
        digests: Mapping[int, str],
        predict: Callable[[PairDraw], Latents],
        on_progress: Callable[[ReferenceCacheReport], None],
        stop: Callable[[], bool],
        largest: Callable[[int], int] | None,
    ) -> bool:
        missing = [draw for draw in draws if not self._holds(draw, digests[draw.pair])]
        probe = next((draw for draw in draws if draw not in set(missing)), draws[0])
        started = time.monotonic()
        prediction = _narrowed(predict(probe))
        seconds = time.monotonic() - started
        if probe not in missing and not torch.equal(self.read([probe]), prediction.float().cpu()):
            raise self._stale(
                f"its prediction for pair {probe.pair} is not what the reference predicts now"
            )
        size = prediction.nbytes
        rounds = len(missing) if largest is None else largest(len(missing))
        self._check_space(size * len(missing))

        def stopped(done: int, remaining: float) -> bool:
            on_progress(
                ReferenceCacheReport(
                    folder=self.folder,
                    done=len(draws) - len(missing) + done,
                    total=len(draws),
                    size=size * len(draws),
                    seconds=remaining,
                )
            )
            return stop()

        if stopped(0, seconds * len(missing)):
            return False
        started = time.monotonic()
        for done, draw in enumerate(missing, start=1):
            self._save(draw, _narrowed(predict(draw)), digests[draw.pair])
            if stopped(done, (time.monotonic() - started) * (len(missing) - done) / done):
                return False
        for _ in range(rounds - len(missing)):  # for the other processes
            predict(probe)
            if stopped(len(missing), 0.0):
                return False
        return True

    def _path(self, draw: PairDraw) -> Path:
        return self.folder / f"{draw.pair:05d}-{draw.draw:03d}.safetensors"

    def _digest(self, pair: int) -> str:
        """Hash of the networks' inputs for a pair: both latents and the encoded prompt."""
        batch = self.store.batch([pair])
        return tensors_digest({"first": batch.first, "second": batch.second, **batch.context})

    def _holds(self, draw: PairDraw, digest: str) -> bool:
        """Whether the prediction is there; a StoreError if it was made for another pair."""
        path = self._path(draw)
        if not path.exists():
            return False
        try:
            require_regular(path)
            with safe_open(path, framework="pt") as file:
                made_for = (file.metadata() or {}).get("pair")
        except (OSError, SafetensorError) as error:
            raise self._damaged(path, error) from error
        if made_for != digest:
            raise self._stale(f"'{path.name}' was predicted for another pair {draw.pair}")
        return True

    def _save(self, draw: PairDraw, prediction: Latents, digest: str) -> None:
        first, second = prediction.cpu()
        with writing(self.folder), locked(self.folder):  # another run may fill the same cache
            write_tensors(
                self._path(draw), {"first": first, "second": second}, metadata={"pair": digest}
            )

    def _load(self, draw: PairDraw) -> dict[str, Tensor]:
        path = self._path(draw)
        try:
            found = load_file(path)
            shapes = {name: tuple(tensor.shape) for name, tensor in found.items()}
            if shapes != dict.fromkeys(("first", "second"), self.store.manifest.latent_shape):
                raise ValueError("it does not hold two predictions")
        except (OSError, SafetensorError, ValueError) as error:
            raise self._damaged(path, error) from error
        return found

    def _check_space(self, size: int) -> None:
        free = shutil.disk_usage(self.folder).free
        if size > free:
            raise StoreError(
                f"The reference cache in '{self.folder}' needs {size / 2**30:.1f} GiB more, and "
                f"the disk has {free / 2**30:.1f} GiB. Use fewer draws (--set "
                "reference.noise_draws=1), or free some space."
            )

    def _damaged(self, path: Path, error: Exception) -> StoreError:
        return StoreError(
            f"'{path}' cannot be read ({error}). Delete that file and train again with --resume; "
            "only this prediction is made again."
        )

    def _stale(self, reason: str) -> StoreError:
        return StoreError(
            f"The reference cache in '{self.folder}' is stale: {reason}. Delete that folder and "
            "train again with --resume, or with --reference toggle."
        )


def _narrowed(prediction: Latents) -> Latents:
    """The same numbers, to the bit, in half precision if they came from there.

    Accelerate converts the outputs of mixed precision to fp32.
    """
    for dtype in _NARROW:
        narrow = prediction.to(dtype)
        if torch.equal(narrow.to(prediction.dtype), prediction):
            return narrow
    return prediction
