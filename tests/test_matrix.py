"""Every installed pair builder trains with every loss, and both with every reference."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from pathlib import Path

import pytest
from accelerate import Accelerator
from conftest import SHAPE, load_small
from safetensors.torch import load_file
from small_labels import Brighter
from torch import nn

from dpo_video import registry
from dpo_video.backbone.animatediff import AnimateDiffModel
from dpo_video.data.build import build, in_order
from dpo_video.data.store import Manifest, PairStore
from dpo_video.data.video_writer import write_video
from dpo_video.errors import TrainingError
from dpo_video.settings import BuildSettings, TrainSettings
from dpo_video.strategies import SuppliedPairs
from dpo_video.testing import small_videos
from dpo_video.training.run import train
from dpo_video.training.run_dir import latest_checkpoint
from dpo_video.types import Clip

SETTINGS = TrainSettings(
    steps=1,
    batch_size=2,
    gradient_accumulation_steps=1,
    learning_rate=1e-2,
    warmup_steps=0,
    rank=2,
    alpha=4,
    validation_videos=0,
    report_to="none",
)


def installed(kind: str) -> list[str]:
    return sorted({listing.name for listing in registry.listings(kind)})


def own_files(folder: Path) -> dict[str, object]:
    for side, seed in (("win", 1), ("lose", 2)):
        videos = small_videos(2, SHAPE.frames, SHAPE.height, SHAPE.width, seed=seed)
        for name, video in zip("ab", videos, strict=True):
            write_video(folder / side / f"{name}.mp4", video, SHAPE.fps, 4)
            (folder / side / f"{name}.txt").write_text("a red square moving left")
    return {"path": folder}


# Options that a builder requires.
OPTIONS: dict[str, Callable[[Path], dict[str, object]]] = {"folder": own_files}
# Combinations that are refused, and the message.
WITHOUT_REGIONS = sorted(set(installed("pairs")) - {"local"})
REFUSED = {(pairs, "region"): "have no regions" for pairs in WITHOUT_REGIONS}
# Initial losses of the built-in losses.
STARTS = {"ipo": 1.0, "hinge": 1.0, "kto": 0.5, "poly": math.log(2) + 0.5, **dict.fromkeys(
    ("global", "group", "segment", "robust", "dpop", "sdpo"), math.log(2)
)}  # fmt: skip


def combinations() -> list[tuple[str, str, str]]:
    """All pairs of a builder, a loss and a reference occur, in a third of all triples."""
    references = installed("reference")
    return [
        (pairs, loss, references[(i + j) % len(references)])
        for i, pairs in enumerate(installed("pairs"))
        for j, loss in enumerate(installed("loss"))
    ]


class Bench:
    """The small model without an adapter for every run, and a store of every kind of pairs."""

    def __init__(self, checkpoint: Path, folder: Path) -> None:
        self.model, self.folder = load_small(checkpoint), folder
        self.bare: nn.Module = copy.deepcopy(self.model.denoiser)
        self.stores: dict[str, PairStore] = {}

    def fresh(self) -> AnimateDiffModel:
        self.model.denoiser = copy.deepcopy(self.bare)
        return self.model

    def store(self, name: str) -> PairStore:
        if name not in self.stores:
            self.stores[name] = self._built(name, self.folder / name)
        return self.stores[name]

    def _built(self, name: str, folder: Path) -> PairStore:
        model = self.fresh()
        options = OPTIONS.get(name, lambda folder: {})(folder / "files")
        builder = registry.load("pairs", name)(**options)
        videos = small_videos(2, SHAPE.frames, SHAPE.height, SHAPE.width)
        clips = iter(
            Clip(name=str(i), caption="a red square moving left", video=video)
            for i, video in enumerate(videos)
        )
        if isinstance(builder, SuppliedPairs):
            clips = builder.source(model, None).clips
        manifest = Manifest(
            recipe={"pairs": name},
            identity=model.identity,
            latent_shape=model.latent_shape,
            fps=SHAPE.fps,
        )
        store = PairStore.create(folder / "store", manifest)
        settings = BuildSettings(count=2, previews=False)
        list(build(store, in_order(clips), builder, model, settings, seed=0, labeler=Brighter()))
        return store


@pytest.fixture(scope="module")
def bench(small_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(small_folder, tmp_path_factory.mktemp("matrix"))


def test_all_combinations_of_two_occur() -> None:
    kinds = [installed(kind) for kind in ("pairs", "loss", "reference")]
    for a, b in ((0, 1), (0, 2), (1, 2)):
        found = {(each[a], each[b]) for each in combinations()}
        assert found == set(itertools.product(kinds[a], kinds[b]))


@pytest.mark.parametrize(("pairs", "loss", "reference"), combinations())
def test_it_trains(bench: Bench, pairs: str, loss: str, reference: str, tmp_path: Path) -> None:
    store = bench.store(pairs)
    assert len(store) == len(store.decided()) == 2
    steps = train(
        bench.fresh(),
        store,
        registry.load("loss", loss)(),
        registry.load("reference", reference)(),
        SETTINGS,
        seed=0,
        out=tmp_path,
        accelerator=Accelerator(cpu=True),
    )
    if (loss, reference) == ("kto", "none"):
        with pytest.raises(TrainingError, match=r"kto judges a video by its change.*toggle"):
            list(steps)
        return
    if (pairs, loss) in REFUSED:
        with pytest.raises(TrainingError, match=REFUSED[pairs, loss]):
            list(steps)
        return
    (report,) = (progress.report for progress in steps)
    assert report.reference == (reference != "none" and loss not in ("mapo", "sft"))
    if report.reference:
        assert report.margin == 0 and report.logits == 0
        assert report.gradient_factor == pytest.approx(0.5)
        assert report.loss == pytest.approx(STARTS.get(loss, report.loss), abs=1e-6)
    assert math.isfinite(report.loss) and report.grad_norm > 0
    # B begins at zero; after one step of AdamW no weight with a gradient does.
    weights = load_file(latest_checkpoint(tmp_path) / "adapter" / "adapter_model.safetensors")
    assert any(weight.any() for name, weight in weights.items() if ".lora_B" in name)
