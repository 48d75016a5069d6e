"""Groups of ranked samples: built, stored, trained on, resumed, packed, exported and audited."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from small_labels import Brighter
from small_step import FIRST, Bench, a_batch, apart
from small_training import adapter_hash

from dpo_video.data.audit import audit
from dpo_video.data.build import build, cycle_prompts
from dpo_video.data.pack import pack
from dpo_video.data.store import Manifest, PairStore
from dpo_video.errors import TrainingError
from dpo_video.loss.global_ import Global
from dpo_video.loss.group import Group
from dpo_video.pairs.ranked import Ranked
from dpo_video.reference.cached import Cached
from dpo_video.reference.toggle import Toggle
from dpo_video.settings import BuildSettings, TrainSettings
from dpo_video.strategies import Loss, Reference
from dpo_video.testing import StridedModel
from dpo_video.training.run import train
from dpo_video.types import Prompt
from dpo_video.workflows.pairs import next_step

SAMPLES = 4
SETTINGS = TrainSettings(
    steps=2, batch_size=2, gradient_accumulation_steps=1, learning_rate=1e-2, warmup_steps=0,
    rank=2, alpha=4, save_steps=1, validation_videos=0, report_to="none",
)  # fmt: skip


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> PairStore:
    """Three groups of four samples."""
    model = StridedModel()
    manifest = Manifest(
        recipe={}, identity=model.identity, latent_shape=model.latent_shape, fps=model.shape.fps
    )
    store = PairStore.create(tmp_path_factory.mktemp("groups") / "pairs", manifest)
    clips = cycle_prompts([Prompt(text="a"), Prompt(text="b")])
    builder, settings = Ranked(samples=SAMPLES, keep="all"), BuildSettings(count=3, previews=False)
    assert list(build(store, clips, builder, model, settings, seed=0, labeler=Brighter()))
    return PairStore(store.folder)


def run(
    store: PairStore,
    out: Path,
    *,
    steps: int = 2,
    loss: Loss | None = None,
    reference: Reference | None = None,
    resume: bool = False,
) -> str:
    settings = SETTINGS.model_copy(update={"steps": steps})
    reference = reference or Toggle()
    list(train(StridedModel(), store, loss or Group(), reference, settings, seed=0, out=out,
               accelerator=Accelerator(cpu=True), resume=resume))  # fmt: skip
    return adapter_hash(out)


def test_all_samples_are_stored_from_best_to_worst(store: PairStore) -> None:
    batch, model = store.batch([0, 1]), StridedModel()
    assert batch.between is not None and batch.ranks is not None
    assert batch.ranks.tolist() == [[0, 1, 2, 3]] * 2
    samples = torch.cat([batch.first[:1], batch.between[0], batch.second[:1]])
    brightness = model.decode_videos(samples).mean(dim=(1, 2, 3, 4))
    assert brightness.tolist() == sorted(brightness.tolist(), reverse=True)


def test_all_modes_take_the_same_step() -> None:
    bench = Bench(StridedModel())
    noise = torch.randn(1, 2, *bench.model.latent_shape, generator=torch.Generator().manual_seed(4))
    batch = a_batch(bench.model, FIRST)
    group = replace(batch, between=noise, ranks=torch.tensor([[0.0, 1, 1, 2]]))
    joint = bench.gradient("joint", group, Group())
    assert apart(joint, bench.gradient("joint", batch, Group())) > 0.01
    for mode in ("split", "linear"):
        assert apart(joint, bench.gradient(mode, group, Group())) < 1e-3, mode


def test_a_group_trains_resumes_and_is_used_packed(store: PairStore, tmp_path: Path) -> None:
    whole = run(store, tmp_path / "whole")
    assert whole != run(store, tmp_path / "ends", loss=Global())
    run(store, tmp_path / "cut", steps=1)
    list(pack(store, tmp_path / "packed"))
    packed = PairStore(tmp_path / "packed")
    assert run(packed, tmp_path / "cut", resume=True) == whole


def test_the_next_command_suits_groups_and_their_labels(store: PairStore) -> None:
    assert next_step(store).endswith("/ --loss group")
    assert next_step(store, "--labels", "mine").endswith("/ --loss global --labels mine")


def test_an_audit_reads_groups(store: PairStore) -> None:
    found = {each.check: each for each in audit(store, StridedModel(), {}, ["c"]).findings}
    assert found["numbers"].level == found["duplicates"].level == "fine"


def test_what_groups_do_not_go_with_is_refused(store: PairStore, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"compares whole groups\. .*--reference toggle"):
        run(store, tmp_path / "cached", reference=Cached())
    labelled = store.relabelled({0: torch.ones(store.manifest.latent_shape[1])})
    with pytest.raises(TrainingError, match="Leave --labels out, or train with --loss global"):
        run(labelled, tmp_path / "labelled")
    run(labelled, tmp_path / "global", loss=Global(), steps=1)
