"""Laws of the reference cache: it gives what a toggled adapter gives, and nothing stale."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from conftest import load_small
from safetensors.torch import load_file, save_file
from small_training import SETTINGS, adapter_hash, make_store

from dpo_video.backbone.animatediff import AnimateDiffModel
from dpo_video.data.store import PairStore
from dpo_video.errors import StoreError
from dpo_video.loss.global_ import Global
from dpo_video.reference.cached import Cached
from dpo_video.reference.toggle import Toggle
from dpo_video.settings import TrainSettings
from dpo_video.strategies import Reference
from dpo_video.support.claims import claim
from dpo_video.support.report import StepEvent
from dpo_video.training.reference_cache import (
    PairDraw,
    ReferenceCache,
    ReferenceCacheManifest,
    ReferenceCacheReport,
)
from dpo_video.training.run import train

PAIRS = 3
# Six steps of SETTINGS are 12 draws: four epochs.
ONCE = SETTINGS.model_copy(update={"steps": PAIRS, "gradient_accumulation_steps": 1})


def run(
    folder: Path,
    store: PairStore,
    out: Path,
    reference: Reference,
    settings: TrainSettings = SETTINGS,
    **options: object,
) -> tuple[list[StepEvent], list[ReferenceCacheReport]]:
    reports: list[ReferenceCacheReport] = []
    progress = train(
        load_small(folder), store, Global(), reference, settings, seed=0, out=out,
        accelerator=Accelerator(cpu=True), on_reference_cache=reports.append,
        **options,  # type: ignore[arg-type]
    )  # fmt: skip
    return list(progress), reports


@pytest.fixture(scope="module")
def pairs(small_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pairs") / "pairs"
    make_store(folder, load_small(small_folder), PAIRS)
    return folder


@pytest.fixture
def store(pairs: Path, tmp_path: Path) -> PairStore:
    """Pairs without a cache."""
    return PairStore(shutil.copytree(pairs, tmp_path / "pairs"))


@pytest.fixture(scope="module")
def used(small_folder: Path, pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("used")
    store = PairStore(shutil.copytree(pairs, folder / "pairs"))
    run(small_folder, store, folder / "run", Cached(noise_draws=1), ONCE)
    return store.folder


@pytest.fixture
def filled(used: Path, tmp_path: Path) -> PairStore:
    """The pairs with the cache that a run of one draw each has filled."""
    return PairStore(shutil.copytree(used, tmp_path / "pairs"))


def files(store: PairStore) -> dict[str, bytes]:
    paths = store.folder.glob("reference_cache/*/*.safetensors")
    return {path.name: path.read_bytes() for path in paths}


def test_up_to_as_many_epochs_as_draws_it_trains_what_toggle_trains_to_the_bit(
    small_folder: Path, store: PairStore, tmp_path: Path
) -> None:
    toggled, none = run(small_folder, store, tmp_path / "toggle", Toggle())
    assert none == [] and not (store.folder / "reference_cache").exists()
    cached, reports = run(small_folder, store, tmp_path / "cached", Cached(noise_draws=4))
    assert adapter_hash(tmp_path / "toggle") == adapter_hash(tmp_path / "cached")
    figures = ("loss", "margin", "chosen_change", "rejected_change", "grad_norm")
    for one, other in zip(toggled, cached, strict=True):
        assert [getattr(one.report, f) for f in figures] == [
            getattr(other.report, f) for f in figures
        ]
    assert reports[-1].done == reports[-1].total == len(files(store)) == PAIRS * 4


def test_no_reference_runs_once_the_cache_is_full(
    small_folder: Path, store: PairStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    original = AnimateDiffModel.predict

    def counted(self: AnimateDiffModel, *arguments: object) -> torch.Tensor:
        calls.append(torch.is_grad_enabled())
        return original(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(AnimateDiffModel, "predict", counted)
    run(small_folder, store, tmp_path / "first", Cached(noise_draws=2))
    # One that is timed, two draws of each of three pairs, and the policy's own.
    assert calls.count(False) == 1 + 2 * PAIRS and calls.count(True) == 12
    calls.clear()
    run(small_folder, store, tmp_path / "second", Cached(noise_draws=2))
    assert calls.count(False) == 1  # that the cache still holds what the reference predicts


def test_draws_repeat_after_their_number_of_epochs(
    small_folder: Path, store: PairStore, tmp_path: Path
) -> None:
    still = SETTINGS.model_copy(update={"learning_rate": 1e-30})  # the policy stays what it was
    once = still.model_copy(update={"gradient_accumulation_steps": 1, "steps": 2 * PAIRS})
    progress, _ = run(small_folder, store, tmp_path / "one", Cached(noise_draws=1), once)
    norms = [p.report.grad_norm for p in progress]
    assert sorted(norms[:PAIRS]) == pytest.approx(sorted(norms[PAIRS:]))
    progress, _ = run(small_folder, store, tmp_path / "two", Cached(noise_draws=2), once)
    norms = [p.report.grad_norm for p in progress]
    assert sorted(norms[:PAIRS]) != pytest.approx(sorted(norms[PAIRS:]))


def test_a_batch_of_pairs_starts_at_a_margin_of_exactly_zero(
    small_folder: Path, store: PairStore, tmp_path: Path
) -> None:
    batched = SETTINGS.model_copy(
        update={"steps": 3, "batch_size": 2, "gradient_accumulation_steps": 1}
    )
    progress, _ = run(small_folder, store, tmp_path / "batched", Cached(noise_draws=2), batched)
    assert progress[0].report.margin == 0 and progress[-1].report.margin != 0
    # Two pairs at once or one after the other: the same draws, the same gradient.
    singly = SETTINGS.model_copy(
        update={"steps": 3, "batch_size": 1, "gradient_accumulation_steps": 2}
    )
    apart, _ = run(small_folder, store, tmp_path / "singly", Cached(noise_draws=2), singly)
    for one, other in zip(progress, apart, strict=True):
        assert one.report.grad_norm == pytest.approx(other.report.grad_norm, rel=1e-3)


def test_it_resumes_to_the_same_bytes_and_fills_only_what_is_missing(
    small_folder: Path, store: PairStore, tmp_path: Path
) -> None:
    run(small_folder, store, tmp_path / "whole", Cached(noise_draws=2))
    whole = files(store)
    shutil.rmtree(store.folder / "reference_cache")
    half = SETTINGS.model_copy(update={"steps": 2})
    run(small_folder, store, tmp_path / "halves", Cached(noise_draws=2), half)
    assert len(files(store)) == 4  # two steps draw four places
    _, reports = run(small_folder, store, tmp_path / "halves", Cached(noise_draws=2), resume=True)
    assert [r.done for r in reports] == [4, 5, 6]
    assert files(store) == whole
    assert adapter_hash(tmp_path / "whole") == adapter_hash(tmp_path / "halves")


def test_another_run_that_fills_the_cache_is_waited_for(filled: PairStore) -> None:
    (folder,) = (filled.folder / "reference_cache").iterdir()
    manifest = ReferenceCacheManifest.model_validate_json((folder / "manifest.json").read_bytes())
    cache, draw = ReferenceCache(filled, manifest), PairDraw(0, 7)
    reports: list[ReferenceCacheReport] = []
    with claim(folder):
        assert not cache.fill([draw], pytest.fail, reports.append, stop=lambda: True)
        assert cache.fill([PairDraw(0, 0)], lambda draw: cache.read([draw]))  # nothing is missing
    assert reports[0].waiting.startswith(f"Waiting for '{folder}'")


def test_size_and_time_are_announced_before_anything_is_written(
    small_folder: Path, store: PairStore, tmp_path: Path
) -> None:
    seen: list[tuple[ReferenceCacheReport, int]] = []
    list(
        train(
            load_small(small_folder), store, Global(), Cached(noise_draws=2), SETTINGS, seed=0,
            out=tmp_path / "run", accelerator=Accelerator(cpu=True),
            on_reference_cache=lambda report: seen.append((report, len(files(store)))),
        )
    )  # fmt: skip
    (first, written), *_ = seen
    assert written == 0 and first.done == 0 and first.total == 2 * PAIRS and first.seconds > 0
    tensors = [load_file(path) for path in first.folder.glob("*.safetensors")]
    assert first.size == sum(t.nbytes for tensor in tensors for t in tensor.values())


def test_runs_that_differ_in_seed_or_precision_do_not_share_a_cache(
    small_model: AnimateDiffModel,
) -> None:
    keys = {
        ReferenceCacheManifest.of(small_model, seed, precision).key
        for seed, precision in ((0, "no"), (1, "no"), (0, "bf16"))
    }
    assert len(keys) == 3
    assert ReferenceCacheManifest.of(small_model, 0, "no").key in keys


def forget_hashes(store: PairStore) -> None:
    """Accept other tensors, as in a store that was written before pairs had hashes."""
    records = store.records
    assert isinstance(records, list)
    records[:] = [replace(each, latents_hash="", context_hash="") for each in records]


def change_latents(store: PairStore) -> None:
    forget_hashes(store)
    path = store.folder / "latents" / "00001.safetensors"
    tensors = load_file(path)
    tensors["second"][0, 0, 0, 0] += 1
    save_file(tensors, path)


def change_context(store: PairStore) -> None:
    forget_hashes(store)
    path = next((store.folder / "contexts").iterdir())
    save_file({name: value + 1 for name, value in load_file(path).items()}, path)


def change_predictions(store: PairStore) -> None:
    for path in store.folder.glob("reference_cache/*/*.safetensors"):
        digest = json.loads(
            path.read_bytes()[8:].split(b'"__metadata__":')[1].split(b"}")[0] + b"}"
        )
        tensors = {name: value + 1e-6 for name, value in load_file(path).items()}
        save_file(tensors, path, metadata=digest)


def change_manifest(store: PairStore) -> None:
    path = next(store.folder.glob("reference_cache/*/manifest.json"))
    path.write_text(path.read_text().replace('"seed": 0', '"seed": 1'))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (change_latents, "predicted for another pair 1"),
        (change_context, "predicted for another pair"),
        (change_predictions, "is not what the reference predicts now"),
        (change_manifest, "does not describe"),
    ],
)
def test_a_stale_cache_is_refused(
    change: object, reason: str, small_folder: Path, filled: PairStore, tmp_path: Path
) -> None:
    change(filled)  # type: ignore[operator]
    with pytest.raises(StoreError, match=f"is stale.*{re.escape(reason)}.*Delete that folder"):
        run(small_folder, filled, tmp_path / "again", Cached(noise_draws=1), ONCE)


def test_a_damaged_prediction_is_named(
    small_folder: Path, filled: PairStore, tmp_path: Path
) -> None:
    path = next(filled.folder.glob("reference_cache/*/00001-000.safetensors"))
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(StoreError, match=r"00001-000.* cannot be read.*Delete that file"):
        run(small_folder, filled, tmp_path / "again", Cached(noise_draws=1), ONCE)
    path.unlink()
    run(small_folder, filled, tmp_path / "third", Cached(noise_draws=1), ONCE)


def test_a_full_disk_is_an_error_before_anything_is_written(
    small_folder: Path, store: PairStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(StoreError, match=r"the disk has 0\.0 GiB.*fewer draws"):
        run(small_folder, store, tmp_path / "run", Cached())
    assert files(store) == {}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_it_stores_every_bit_in_as_few_bytes_as_hold_it(
    dtype: torch.dtype, store: PairStore, small_model: AnimateDiffModel
) -> None:
    cache = ReferenceCache(store, ReferenceCacheManifest.of(small_model, 0, "no"))
    numbers = torch.randn(2, *small_model.latent_shape).to(dtype).float()  # as accelerate hands it
    draw = PairDraw(0, 0)
    cache.fill([draw], lambda _: numbers)
    assert torch.equal(cache.read([draw]), numbers)
    assert {tensor.itemsize for tensor in cache._load(draw).values()} == {dtype.itemsize}


def test_predictions_of_first_videos_come_before_those_of_second_ones(
    store: PairStore, small_model: AnimateDiffModel
) -> None:
    cache = ReferenceCache(store, ReferenceCacheManifest.of(small_model, 0, "no"))
    made = {
        PairDraw(p, d): torch.randn(2, *small_model.latent_shape) for p in (0, 2) for d in (0, 1)
    }
    cache.fill(list(made), made.__getitem__)
    one, other = PairDraw(2, 1), PairDraw(0, 0)
    expected = [made[one][0], made[other][0], made[one][1], made[other][1]]
    assert torch.equal(cache.read([one, other]), torch.stack(expected))
