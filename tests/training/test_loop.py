from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import create_autospec

import pytest
import torch
from accelerate import Accelerator
from conftest import SHAPE, load_small
from safetensors.torch import load_file, save_file
from small_training import SETTINGS, adapter_hash, make_store, run

from dpo_video import registry
from dpo_video.backbone.animatediff import AnimateDiffModel
from dpo_video.data.store import PairStore
from dpo_video.errors import PluginError, RunError, StoreError, TrainingError
from dpo_video.extensions import TimestepSampler
from dpo_video.listener.early_stop import EarlyStop
from dpo_video.loss.global_ import Global
from dpo_video.loss.mapo import MaPO
from dpo_video.loss.region import Region
from dpo_video.loss.segment import Segment
from dpo_video.loss.sft import SFT
from dpo_video.reference.cached import Cached
from dpo_video.reference.none import NoReference
from dpo_video.reference.toggle import Toggle
from dpo_video.registry import local
from dpo_video.settings import TrainSettings
from dpo_video.strategies import Loss, VideoModel
from dpo_video.support.report import StepEvent, StepReport
from dpo_video.support.tensor_tree import save_state
from dpo_video.timesteps.family import Family
from dpo_video.training.checkpoint import (
    MANIFEST,
    CheckpointManifest,
    load_adapter,
    write_manifest,
)
from dpo_video.training.listeners import Listener
from dpo_video.training.loop import Run
from dpo_video.training.run import train
from dpo_video.training.run_dir import checkpoints, latest_checkpoint, read_log, truncate_log
from dpo_video.training.sampler import PairSampler, trainable_pairs
from dpo_video.types import LossOutput, Pair, PairErrors, PerPair

SAMPLED = SETTINGS.model_copy(update={"validation_videos": 1})
SHORT = SETTINGS.model_copy(update={"steps": 2, "save_steps": 1})


@pytest.fixture(scope="module")
def store(small_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> PairStore:
    """Five pairs, which no test changes."""
    return make_store(tmp_path_factory.mktemp("store") / "pairs", load_small(small_folder))


@pytest.fixture(scope="module")
def whole(small_folder: Path, store: PairStore, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six steps that nothing interrupts, with a validation video at every checkpoint."""
    out = tmp_path_factory.mktemp("whole") / "run"
    run(small_folder, store, out, SAMPLED)
    return out


@pytest.fixture(scope="module")
def _short(small_folder: Path, store: PairStore, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("short") / "run"
    run(small_folder, store, out, SHORT)
    return out


@pytest.fixture
def short(_short: Path, tmp_path: Path) -> Path:
    """A copy of a run of two steps, with both checkpoints."""
    return shutil.copytree(_short, tmp_path / "run")


def test_it_starts_at_zero_margin_and_learns(
    small_folder: Path, small_model: AnimateDiffModel, tmp_path: Path
) -> None:
    store = make_store(tmp_path / "pairs", small_model, pairs=2)
    # AdamW moves a weight by about lr a step, whatever the gradient. 30 steps of 3e-4 on random
    # weights of about 0.1 keep the logits near 1, where the loss falls evenly. One step's margin is
    # mostly its noise levels: ten are judged together, the last against the first.
    settings = SETTINGS.model_copy(update={"steps": 30, "save_steps": 30, "learning_rate": 3e-4})
    progress = run(small_folder, store, tmp_path / "run", settings, loss=Global())
    first = progress[0].report
    assert first.margin == 0 and first.logits == 0
    assert first.loss == pytest.approx(0.693147, abs=1e-6)
    assert first.gradient_factor == 0.5 and first.accuracy == 0.5
    assert first.grad_norm > 0
    margins = [p.report.margin for p in progress]
    thirds = [sum(margins[i : i + 10]) for i in (0, 10, 20)]
    assert 0 < 2 * thirds[0] < thirds[2]
    assert sum(p.report.loss for p in progress[20:]) / 10 < 0.55
    lines = (tmp_path / "run" / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, 31))


def test_the_learning_rate_rises_stays_and_falls(
    small_folder: Path, store: PairStore, tmp_path: Path
) -> None:
    settings = SETTINGS.model_copy(
        update={"steps": 8, "decay": 0.5, "gradient_accumulation_steps": 1}
    )
    progress = run(small_folder, store, tmp_path / "run", settings)
    shares = [p.report.lr / settings.learning_rate for p in progress]
    assert shares == pytest.approx([0.5, 1, 1, 1, 1, 0.75, 0.5, 0.25])


def test_a_resumed_run_ends_in_the_same_bytes(
    small_folder: Path, store: PairStore, tmp_path: Path, whole: Path
) -> None:
    one = SAMPLED.model_copy(update={"save_total_limit": 1})
    run(small_folder, store, tmp_path / "halves", one.model_copy(update={"steps": 3}))
    assert list(checkpoints(tmp_path / "halves")) == [3]
    resumed = run(small_folder, store, tmp_path / "halves", one, resume=True)
    assert [p.report.step for p in resumed] == [4, 5, 6]
    assert adapter_hash(whole) == adapter_hash(tmp_path / "halves")
    found = [list(checkpoints(out)) for out in (whole, tmp_path / "halves")]
    assert found == [[2, 4, 6], [6]]
    logs = [(out / "log.jsonl").read_text().splitlines() for out in (whole, tmp_path / "halves")]
    for lines in zip(*logs, strict=True):
        a, b = map(json.loads, lines)
        timing = {"seconds", "eta_seconds", "pairs_per_second", "memory_gib"}
        assert {k: a[k] for k in a.keys() - timing} == {k: b[k] for k in b.keys() - timing}


def test_the_pointer_is_valid_when_a_save_is_cut_off(
    small_folder: Path,
    store: PairStore,
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from dpo_video.training import checkpoint as module

    saved: list[int] = []
    original = module.save_state

    def fail_at_the_second(path: Path, state: object) -> None:
        saved.append(1)
        if len(saved) == 2:
            raise KeyboardInterrupt
        original(path, state)

    monkeypatch.setattr(module, "save_state", fail_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        run(small_folder, store, tmp_path / "run")
    monkeypatch.undo()
    assert latest_checkpoint(tmp_path / "run").name == "step_000002"
    run(small_folder, store, tmp_path / "run", resume=True)
    assert adapter_hash(whole) == adapter_hash(tmp_path / "run")


def test_every_pair_is_seen_once_per_epoch(small_model: AnimateDiffModel, tmp_path: Path) -> None:
    store = make_store(tmp_path / "pairs", small_model, pairs=5)
    sampler = PairSampler(
        small_model, store, [0, 2, 3], Global(), SETTINGS, seed=0,
        accelerator=Accelerator(cpu=True), timesteps=Family(),
    )  # fmt: skip
    epochs = [[sampler.draw_at(3 * epoch + i) for i in range(3)] for epoch in range(4)]
    pairs = [[drawn.pair for drawn in epoch] for epoch in epochs]
    assert all(sorted(epoch) == [0, 2, 3] for epoch in pairs)
    assert len({tuple(epoch) for epoch in pairs}) > 1
    assert [{drawn.draw for drawn in epoch} for epoch in epochs] == [{0}, {1}, {2}, {3}]
    sampler.noise_draws = 2
    again = [{sampler.draw_at(3 * epoch + i).draw for i in range(3)} for epoch in range(4)]
    assert again == [{0}, {1}, {0}, {1}]


def test_pairs_weigh_by_their_decided_frames_over_a_whole_step(
    small_model: AnimateDiffModel, tmp_path: Path
) -> None:
    frames = small_model.latent_shape[1]
    labels = {index: torch.ones(frames) for index in range(4)}
    labels[1][1:] = 0
    labels[3][:1] = 0
    store = make_store(tmp_path / "pairs", small_model, pairs=4).relabelled(labels)
    settings = TrainSettings(batch_size=1, gradient_accumulation_steps=2, steps=3)

    def weights(loss: Loss, processes: int, rank: int) -> list[tuple[str, float]]:
        accelerator = create_autospec(Accelerator, instance=True)
        accelerator.num_processes, accelerator.process_index = processes, rank
        accelerator.device = torch.device("cpu")
        sampler = PairSampler(
            small_model, store, range(4), loss, settings, seed=0, accelerator=accelerator,
            timesteps=Family(),
        )  # fmt: skip
        found = []
        for step in range(4 // processes):
            for inputs in sampler.inputs(step):
                weight = torch.ones(1) if inputs.weight is None else inputs.weight
                found.append((inputs.batch.keys[0], weight.item()))
        return found

    assert {weight for _, weight in weights(Global(), 2, 0)} == {1.0}
    store.records[2] = replace(store.records[2], weight=3.0)  # of four in two steps of two
    own = dict(weights(Global(), 1, 0))
    assert sorted(own.values()) == [0.5, 1.0, 1.0, 1.5] and own["00002"] == 1.5
    store.records[2] = replace(store.records[2], weight=1.0)
    both = [weights(Segment(), 2, rank) for rank in range(2)]
    for epoch in range(2):  # a step of two processes with two passes sees each pair once
        seen = dict(both[0][2 * epoch : 2 * epoch + 2] + both[1][2 * epoch : 2 * epoch + 2])
        counts = {f"{index:05d}": int(labels[index].sum()) for index in range(4)}
        mean = sum(counts.values()) / 4
        assert seen == pytest.approx({key: count / mean for key, count in counts.items()})
    alone = weights(Segment(), 1, 0)
    for step in range(4):
        assert sum(weight for _, weight in alone[2 * step : 2 * step + 2]) == pytest.approx(2)


def test_pairs_with_few_decided_segments_are_left_out(
    small_model: AnimateDiffModel, tmp_path: Path
) -> None:
    model = copy.copy(small_model)
    model.shape = replace(model.shape, frames=20, fps=4)  # five segments of four frames
    store = make_store(tmp_path / "pairs", model, pairs=3)
    one, two = torch.zeros(20), torch.zeros(20)
    one[:4], two[3:5] = 1, -1  # two: a frame of the first segment and one of the second
    view = store.relabelled({0: one, 1: two, 2: torch.zeros(20)})

    def kept(share: float) -> list[int]:
        return trainable_pairs(view, Segment(), model, TrainSettings(min_decided=share))

    assert kept(0) == [0, 1]
    assert kept(0.2) == [1]  # a fifth is not more than 20%
    with pytest.raises(TrainingError, match="Lower train"):
        kept(0.5)


def test_ties_are_never_drawn_and_change_nothing_else(
    small_folder: Path, small_model: AnimateDiffModel, tmp_path: Path
) -> None:
    whole = make_store(tmp_path / "whole", small_model, pairs=3)
    store = PairStore.create(tmp_path / "some", whole.manifest)
    for index in range(3):
        batch = whole.batch([index])
        pair = Pair(
            first=batch.first[0], second=batch.second[0], preference=batch.preference[0],
            region=batch.region[0], prompt=whole.records[index].prompt, source="random",
            strength=0.8,
        )  # fmt: skip
        store.append(pair, batch.context)
    store.append(replace(pair, preference=torch.zeros_like(pair.preference)), batch.context)
    assert store.decided() == [0, 1, 2]
    two_epochs = SETTINGS.model_copy(update={"steps": 3})
    run(small_folder, whole, tmp_path / "run", two_epochs, loss=Global())
    run(small_folder, store, tmp_path / "run-some", two_epochs, loss=Global())
    assert adapter_hash(tmp_path / "run") == adapter_hash(tmp_path / "run-some")


def test_a_store_of_ties_says_how_to_label_it(
    small_folder: Path, small_model: AnimateDiffModel, tmp_path: Path
) -> None:
    store = make_store(tmp_path / "pairs", small_model, pairs=0)
    latents = torch.zeros(small_model.latent_shape)
    pair = Pair(
        first=latents, second=latents + 1, preference=torch.zeros(SHAPE.frames),
        region=torch.ones(1, *latents.shape[1:]), prompt="a", source="random",
    )  # fmt: skip
    store.append(pair, small_model.encode_prompts(["a"]))
    with pytest.raises(TrainingError, match=r"All 1 pairs .* are ties.*dpo-video label .*pairs"):
        run(small_folder, store, tmp_path / "run", loss=Global())
    assert not (tmp_path / "run").exists()


def test_a_loss_of_regions_refuses_pairs_without_them(
    small_folder: Path, small_model: AnimateDiffModel, tmp_path: Path
) -> None:
    store = make_store(tmp_path / "pairs", small_model, pairs=0)
    pair = Pair(
        first=torch.zeros(small_model.latent_shape), second=torch.ones(small_model.latent_shape),
        preference=torch.ones(SHAPE.frames), region=torch.ones(1, *small_model.latent_shape[1:]),
        prompt="a", source="random", strength=0.8,
    )  # fmt: skip
    store.append(pair, small_model.encode_prompts(["a"]))
    with pytest.raises(TrainingError, match=r"have no regions.*--loss global"):
        run(small_folder, store, tmp_path / "run", loss=Region())


def test_the_adapter_is_peft_and_nothing_else(whole: Path) -> None:
    folder = latest_checkpoint(whole) / "adapter"
    weights = load_file(folder / "adapter_model.safetensors")
    assert all(".lora_" in name and "motion_modules" in name for name in weights)
    assert all(weight.dtype == torch.float32 for weight in weights.values())
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["r"] == 2
    assert config["target_modules"] == sorted(config["target_modules"])
    samples = list((whole / "samples").rglob("*.mp4"))
    assert {path.parent.name for path in samples} == {"step_000002", "step_000004", "step_000006"}


def test_a_loss_with_a_margin_at_step_0_is_refused(
    small_folder: Path, store: PairStore, tmp_path: Path
) -> None:

    class Lopsided(Loss):
        def __call__(self, errors: PairErrors) -> LossOutput:
            output = Global()(errors)
            return LossOutput(**{**vars(output), "margin": output.margin + 1e-9})

    with pytest.raises(TrainingError, match="gives a margin of 1e-09 instead of 0"):
        run(small_folder, store, tmp_path / "run", loss=Lopsided())


def test_without_a_reference_step_0_is_not_checked_and_its_absence_is_reported(
    small_folder: Path, small_model: AnimateDiffModel, tmp_path: Path
) -> None:
    store = make_store(tmp_path / "pairs", small_model, pairs=2)
    one = SETTINGS.model_copy(update={"steps": 1, "validation_videos": 0})
    kinds = []
    for number, (loss, reference) in enumerate(
        [(Global(beta=1), NoReference()), (SFT(), Cached()), (MaPO(), Toggle())]
    ):
        out = tmp_path / str(number)
        (event,) = run(small_folder, store, out, one, loss=loss, reference=reference)
        kinds.append((event.report.reference, event.report.compares, event.report.margin != 0))
    assert kinds == [(False, True, True), (False, False, False), (False, True, True)]
    assert not (tmp_path / "pairs" / "reference_cache").exists()


def with_value(store: PairStore, index: int, value: float) -> PairStore:
    """The store with this number in a pair, as one that was written before pairs had hashes."""
    path = store.folder / "latents" / f"{index:05d}.safetensors"
    tensors = load_file(path)
    tensors["first"][0, 0, 0, 0] = value
    save_file(tensors, path)
    lines = (store.folder / "pairs.jsonl").read_text().splitlines()
    records = [{**json.loads(line), "latents_hash": ""} for line in lines]
    (store.folder / "pairs.jsonl").write_text("".join(f"{json.dumps(r)}\n" for r in records))
    return PairStore(store.folder)


def test_a_loss_that_is_not_finite_stops_the_run(
    small_folder: Path, small_model: AnimateDiffModel, tmp_path: Path
) -> None:
    store = make_store(tmp_path / "pairs", small_model)
    store = with_value(store, 2, float("nan"))
    strict = SETTINGS.model_copy(update={"skips": 0})
    with pytest.raises(TrainingError, match=r"not finite.* were 00002\. .*train\.skips allows 0"):
        run(small_folder, store, tmp_path / "run", strict, loss=Global())


def test_resuming_without_a_checkpoint_is_an_error(
    small_folder: Path, store: PairStore, tmp_path: Path
) -> None:
    with pytest.raises(RunError, match="has no checkpoint yet"):
        run(small_folder, store, tmp_path / "run", resume=True)


def test_pairs_of_another_backbone_are_refused(
    small_folder: Path, store: PairStore, tmp_path: Path
) -> None:
    other = load_small(small_folder)
    other.identity = "0123456789abcdef"
    with pytest.raises(StoreError, match="made with other weights"):
        store.check_fits(other)


def test_a_damaged_checkpoint_is_written_again_from_the_one_before(
    small_folder: Path, store: PairStore, short: Path
) -> None:
    state = latest_checkpoint(short) / "state.safetensors"
    state.write_bytes(state.read_bytes()[:100])
    resumed = run(small_folder, store, short, SHORT, resume=True)
    assert [p.report.step for p in resumed] == [2]


def test_an_undamaged_checkpoint_that_does_not_load_is_a_bug(
    small_folder: Path, store: PairStore, short: Path
) -> None:
    folder = latest_checkpoint(short)
    (folder.parent / "latest").write_text("step_000001\n")
    folder = latest_checkpoint(short)
    manifest = CheckpointManifest.model_validate_json((folder / MANIFEST).read_bytes())
    config = folder / "adapter" / "adapter_config.json"
    config.write_text(config.read_text().replace('"r": 2', '"r": {}'))
    save_state(folder / "state.safetensors", {"step": 1, "position": 1, "skipped": 0})

    def load() -> object:
        return load_adapter(load_small(small_folder).denoiser, folder / "adapter", "Do something.")

    with pytest.raises(RunError, match="is damaged"):
        run(small_folder, store, short, SHORT, resume=True)
    with pytest.raises(RunError, match="is damaged"):
        load()
    (folder / MANIFEST).unlink()
    write_manifest(folder, 1, manifest.fingerprint)
    with pytest.raises(KeyError, match="optimizer"):  # not a sentence about damage
        run(small_folder, store, short, SHORT, resume=True)
    with pytest.raises(ValueError, match=r"the rank r = \{\} is none"):
        load()
    (folder / MANIFEST).unlink()  # a stranger's
    with pytest.raises(RunError, match=r"does not fit this backbone .* Do something\."):
        load()
    text = config.read_text().replace('"r": {}', '"r": 2')
    config.write_text(text.replace('"lora_bias": false', '"lora_bias": true'))
    with pytest.raises(RunError, match="its LoRA has biases"):
        load()


def test_an_adapter_of_another_shape_is_not_resumed(
    small_folder: Path, store: PairStore, short: Path
) -> None:
    wider = SHORT.model_copy(update={"rank": 4, "steps": 3})
    with pytest.raises(RunError, match="of an adapter of another shape") as caught:
        run(small_folder, store, short, wider, resume=True)
    assert "\n" not in str(caught.value)


def test_the_log_is_read_up_to_an_incomplete_line(tmp_path: Path) -> None:
    assert read_log(tmp_path) == []
    fields = {name: 0.5 for name, field in StepReport.model_fields.items() if field.is_required()}
    line = StepReport(**{**fields, "step": 1, "skipped": False}).model_dump_json()  # type: ignore[arg-type]
    (tmp_path / "log.jsonl").write_text(f"{line}\n{line[:20]}")
    assert [report.step for report in read_log(tmp_path)] == [1]
    (tmp_path / "log.jsonl").write_text(f"{line[:20]}\n{line}\n")
    with pytest.raises(RunError, match=r"Line 1 of '.*log\.jsonl' is not the report of a step"):
        read_log(tmp_path)


def test_a_log_is_cut_by_its_steps_and_not_by_its_lines(tmp_path: Path) -> None:
    fields: dict[str, Any] = {
        name: 0.5 for name, field in StepReport.model_fields.items() if field.is_required()
    }
    lines = [
        StepReport(**{**fields, "step": step, "skipped": False}).model_dump_json() + "\n"
        for step in (3, 4, 5, 6)  # the first two were deleted with an earlier log
    ]
    path = tmp_path / "log.jsonl"
    path.write_text("".join(lines) + '{"step": 7')
    truncate_log(path, 4)
    assert path.read_text() == "".join(lines[:2])


def test_seconds_continue_after_a_resume(small_folder: Path, store: PairStore, short: Path) -> None:
    log = short / "log.jsonl"
    first, second = read_log(short)
    log.write_text(
        "".join(
            each.model_copy(update={"seconds": seconds}).model_dump_json() + "\n"
            for each, seconds in ((first, 1000.0), (second, 2000.0))
        )
    )
    (short / "checkpoints/latest").write_text("step_000001")
    (event,) = run(small_folder, store, short, SHORT, resume=True)
    assert 1000 < event.report.seconds < 1900
    assert event.report.eta_seconds == 0
    longer = SHORT.model_copy(update={"steps": 4})
    third, _ = run(small_folder, store, short, longer, resume=True)
    assert third.report.eta_seconds < 500  # by the time of the steps of this process


# --- what must be unchanged to resume ------- -----------------------------------------------------


def test_a_run_is_not_resumed_on_other_pairs_or_labels(
    small_folder: Path, small_model: AnimateDiffModel, tmp_path: Path
) -> None:
    store = make_store(tmp_path / "pairs", small_model, pairs=2)
    settings = SETTINGS.model_copy(update={"steps": 1})
    run(small_folder, store, tmp_path / "run", settings)
    lines = (store.folder / "pairs.jsonl").read_text()
    (store.folder / "pairs.jsonl").write_text(lines.replace('"strength":0.8', '"strength":0.7'))
    with pytest.raises(RunError, match=r"What has changed: the set of pairs \(then [0-9a-f]{16}"):
        run(small_folder, PairStore(store.folder), tmp_path / "run", settings, resume=True)
    (store.folder / "pairs.jsonl").write_text(lines)
    labelled = store.relabelled({0: torch.ones(SHAPE.frames), 1: -torch.ones(SHAPE.frames)})
    with pytest.raises(RunError, match=r"What has changed: the labels \(then none, now [0-9a-f]"):
        run(small_folder, labelled, tmp_path / "run", settings, resume=True)


def test_pairs_built_since_change_nothing_for_a_resumed_run(
    small_folder: Path, small_model: AnimateDiffModel, tmp_path: Path
) -> None:
    store = make_store(tmp_path / "pairs", small_model, pairs=3)
    settings = SETTINGS.model_copy(update={"steps": 3})
    run(small_folder, store, tmp_path / "whole", settings)
    run(small_folder, store, tmp_path / "run", settings.model_copy(update={"steps": 2}))
    more = make_store(tmp_path / "pairs", small_model, pairs=5)
    assert len(more) == 5
    run(small_folder, more, tmp_path / "run", settings, resume=True)
    assert adapter_hash(tmp_path / "whole") == adapter_hash(tmp_path / "run")


def test_a_changed_file_is_damage_even_if_it_loads(
    small_folder: Path, store: PairStore, short: Path
) -> None:
    shutil.rmtree(short / "checkpoints" / "step_000001")  # or it would be resumed from
    weights = latest_checkpoint(short) / "adapter" / "adapter_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1  # the last bit of a weight
    weights.write_bytes(data)
    with pytest.raises(RunError, match=r"adapter_model\.safetensors is not what was written"):
        run(small_folder, store, short, SHORT, resume=True)


def test_a_stopped_run_saves_and_resumes_to_the_same_bytes(
    small_folder: Path, store: PairStore, tmp_path: Path
) -> None:
    settings = SETTINGS.model_copy(update={"steps": 4, "save_steps": 4})
    run(small_folder, store, tmp_path / "whole", settings)
    asked = iter([False] * 3 + [True])  # in the middle of the second step's two passes
    progress = list(
        train(
            load_small(small_folder), store, Region(), Toggle(), settings, seed=0,
            out=tmp_path / "run", accelerator=Accelerator(cpu=True), stop=lambda: next(asked),
        )
    )  # fmt: skip
    assert [p.report.step for p in progress] == [1]
    assert latest_checkpoint(tmp_path / "run").name == "step_000001"
    run(small_folder, store, tmp_path / "run", settings, resume=True)
    assert adapter_hash(tmp_path / "whole") == adapter_hash(tmp_path / "run")


def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(
    small_folder: Path, small_model: AnimateDiffModel, tmp_path: Path
) -> None:
    store = make_store(tmp_path / "pairs", small_model, pairs=1)
    store = with_value(store, 0, float("inf"))
    settings = SETTINGS.model_copy(update={"steps": 2, "skips": 2})
    progress = run(small_folder, store, tmp_path / "run", settings, loss=Global())
    assert [(p.report.skipped, list(p.nonfinite_pairs)) for p in progress] == [
        (True, ["00000"])
    ] * 2
    weights = load_file(latest_checkpoint(tmp_path / "run") / "adapter/adapter_model.safetensors")
    assert all(not weight.any() for name, weight in weights.items() if "lora_B" in name)
    assert [report.skipped for report in read_log(tmp_path / "run")] == [True, True]
    # The count is saved with the run.
    longer = settings.model_copy(update={"steps": 3})
    with pytest.raises(
        TrainingError, match=r"pairs were 00000\. Steps that were not finite so far: 3;"
    ):
        run(small_folder, store, tmp_path / "run", longer, loss=Global(), resume=True)


def test_another_number_of_processes_resumes_at_the_same_position(
    small_folder: Path, store: PairStore, tmp_path: Path
) -> None:
    settings = SETTINGS.model_copy(update={"steps": 2, "gradient_accumulation_steps": 4})
    run(small_folder, store, tmp_path / "run", settings)  # as many as four processes take at once
    drawn: list[str] = []
    original = PairStore.batch

    def watched(self: PairStore, indices: list[int]) -> object:
        drawn.extend(f"{index:05d}" for index in indices)
        return original(self, indices)

    alone = settings.model_copy(update={"steps": 4, "gradient_accumulation_steps": 1})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PairStore, "batch", watched)
        run(small_folder, store, tmp_path / "run", alone, resume=True)
    # Places 8 and 9: what is left of the second epoch. All but these two were seen twice already.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PairStore, "batch", watched)
        visited = list(drawn)
        drawn.clear()
        whole = settings.model_copy(update={"steps": 10, "gradient_accumulation_steps": 1})
        run(small_folder, store, tmp_path / "whole", whole)
    assert visited == drawn[8:10]
    assert all(sorted(drawn[i : i + 5]) == [f"{n:05d}" for n in range(5)] for i in (0, 5))


# --- listeners ---------------------------------------------------------------------------------


class Recorder(Listener):
    """Writes down what it is called with."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def on_train_begin(self, run: Run) -> None:
        super().on_train_begin(run)
        self.calls.append(f"begin at {run.state.step}")

    def on_step_end(self, event: StepEvent) -> None:
        assert event.checkpoint is None or not event.checkpoint.exists()
        self.calls.append(f"step {event.report.step}")

    def on_checkpoint(self, folder: Path) -> None:
        assert (folder / MANIFEST).exists()
        self.calls.append("saved")

    def state(self) -> dict[str, torch.Tensor]:
        return {"calls": torch.tensor(len(self.calls))}

    def restore(self, state: Mapping[str, torch.Tensor]) -> None:
        self.calls.append(f"after {state['calls']} calls")

    def on_train_end(self) -> None:
        self.calls.append("end")


def test_a_listener_is_called_before_the_event_is_yielded(
    small_folder: Path, store: PairStore, tmp_path: Path
) -> None:
    settings = SETTINGS.model_copy(update={"steps": 3})
    recorder = Recorder()
    events = run(small_folder, store, tmp_path / "run", settings, listeners=[recorder])
    assert recorder.calls == [
        "begin at 0", "step 1", "step 2", "saved", "step 3", "saved", "end",
    ]  # fmt: skip
    assert [event.checkpoint and event.checkpoint.name for event in events] == [
        None, "step_000002", "step_000003",
    ]  # fmt: skip
    longer, recorder = settings.model_copy(update={"steps": 4}), Recorder()
    run(small_folder, store, tmp_path / "run", longer, resume=True, listeners=[recorder])
    assert recorder.calls == ["after 5 calls", "begin at 3", "step 4", "saved", "end"]


def test_a_listener_ends_a_training_and_keeps_its_state(
    small_folder: Path, store: PairStore, tmp_path: Path
) -> None:
    stop = EarlyStop(below=0.49, window=3)
    settings = SETTINGS.model_copy(update={"steps": 2})

    def trained(out: str, steps: int, *, resume: bool = False) -> list[StepEvent]:
        some = settings.model_copy(update={"steps": steps})
        return run(small_folder, store, tmp_path / out, some, listeners=[stop], resume=resume)

    whole = trained("whole", 50)
    last = whole[-1].report.step
    assert 3 <= last < 50 and "below 0.49" in whole[-1].ended
    assert [event.ended for event in whole[:-1]] == [""] * (last - 1)
    assert max(checkpoints(tmp_path / "whole")) == last
    trained("halves", last - 1)
    again = trained("halves", 50, resume=True)
    assert [event.report.step for event in again] == [last] and again[0].ended == whole[-1].ended


def test_a_tracker_gets_the_names_of_trl(
    small_folder: Path, store: PairStore, tmp_path: Path
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    settings = SETTINGS.model_copy(update={"steps": 2})
    accelerator = Accelerator(cpu=True, log_with="tensorboard", project_dir=tmp_path / "run")
    accelerator.init_trackers("tracker")
    events = run(small_folder, store, tmp_path / "run", settings, accelerator=accelerator)
    accelerator.end_training()
    (file,) = (tmp_path / "run" / "tracker").glob("events.*")
    logged = EventAccumulator(str(file))
    logged.Reload()
    names = {
        "loss", "grad_norm", "learning_rate", "rewards/chosen", "rewards/rejected",
        "rewards/margins", "rewards/accuracies", "errors/chosen", "errors/rejected", "logits",
        "gradient_factor", "rejected_dominant", "pairs_per_second", "memory_gib", "skipped",
    }  # fmt: skip
    assert set(logged.Tags()["scalars"]) == names
    for name in names:
        expected = [event.report.tracked()[name] for event in events]
        assert [point.value for point in logged.Scalars(name)] == pytest.approx(expected, rel=1e-6)
        assert [point.step for point in logged.Scalars(name)] == [1, 2]
    rewards = events[-1].report.tracked()
    assert rewards["rewards/margins"] == pytest.approx(
        rewards["rewards/chosen"] - rewards["rewards/rejected"]
    )
    assert rewards["rewards/chosen"] == -rewards["errors/chosen"] != 0


STEPS = """
import torch
from dpo_video.plugin import Optimizer, Schedule, TimestepSampler

class Largest(TimestepSampler):
    "The larger of two draws."
    def __call__(self, model, n, generator):
        "Draw."
        return model.sample_timesteps(2 * n, generator).view(n, 2).amax(dim=1)

class Momentum(Optimizer):
    "SGD with momentum."
    def __call__(self, parameters, settings, *, on_host=False):
        "Make it."
        return torch.optim.SGD(parameters, lr=settings.learning_rate, momentum=0.9)

class Halved(Schedule):
    "Half the rate from the fourth step on."
    def __call__(self, step, settings):
        "The factor."
        return 1.0 if step < 3 else 0.5
"""


def test_a_plugins_steps_are_taken_and_resume_in_the_same_bytes(
    small_folder: Path, store: PairStore, tmp_path: Path, whole: Path
) -> None:
    (tmp_path / "own.py").write_text(STEPS)
    given = {}
    for kind, cls in (("timesteps", "Largest"), ("optimizer", "Momentum"), ("schedule", "Halved")):
        name = f"{tmp_path / 'own.py'}:{cls}"
        local.allow(name)
        given[kind] = registry.strategy(kind, name)
    settings = SETTINGS.model_copy(update={"learning_rate": 10.0})

    def trained(out: Path, *, steps: int = 6, resume: bool = False) -> list[float]:
        some = settings.model_copy(update={"steps": steps})
        return [e.report.lr for e in run(small_folder, store, out, some, resume=resume, **given)]

    assert trained(tmp_path / "run") == [10.0] * 3 + [5.0] * 3
    trained(tmp_path / "halves", steps=3)
    assert trained(tmp_path / "halves", resume=True) == [5.0] * 3
    assert adapter_hash(tmp_path / "run") == adapter_hash(tmp_path / "halves")
    assert adapter_hash(tmp_path / "run") != adapter_hash(whole)


def test_timesteps_below_0_are_refused(
    small_folder: Path, store: PairStore, tmp_path: Path
) -> None:
    class Early(TimestepSampler):
        def __call__(self, model: VideoModel, n: int, generator: torch.Generator) -> PerPair:
            return model.sample_timesteps(n, generator) - 2000

    with pytest.raises(PluginError, match="returns timesteps, a value that is below 0"):
        run(small_folder, store, tmp_path / "run", timesteps=Early())
