"""A run is resumed as what it was: checked before anything is written, with a record of changes."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import tomllib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from accelerate.state import AcceleratorState
from conftest import SHAPE, load_small
from small_training import make_store

import dpo_video as dv
from dpo_video.errors import BusyError, RunError, UserError
from dpo_video.support.claims import WRITER, claim
from dpo_video.support.tensor_tree import load_state
from dpo_video.training.run_dir import checkpoint_folder, read_log
from dpo_video.workflows.config import resolve
from dpo_video.workflows.resume import Resumption

OPTIONS: dict[str, Any] = {
    "loss": "global",
    "steps": 2,
    "save_steps": 1,
    "rank": 2,
    "batch_size": 2,
    "gradient_accumulation_steps": 1,
    "warmup_steps": 0,
    "learning_rate": 1e-4,
    "validation_videos": 0,
    "report_to": "none",
    "metrics": ["frame_difference"],
}
Train = Callable[..., dv.Run]


class Kept(dv.Progress):
    """Keeps the notes."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str, *, warning: bool = False) -> None:
        self.notes.append(text)


@pytest.fixture(scope="module")
def model(small_folder: Path) -> dict[str, Any]:
    shape = {f"backbone.{name}": getattr(SHAPE, name) for name in ("frames", "height", "width")}
    return {
        "backbone": "animatediff", "device": "cpu",
        "set": {"backbone.model": str(small_folder), **shape},
    }  # fmt: skip


@pytest.fixture(scope="module")
def trained(
    small_folder: Path, model: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A run of two steps, with both checkpoints."""
    folder = tmp_path_factory.mktemp("trained")
    make_store(folder / "pairs", load_small(small_folder), pairs=3)
    AcceleratorState._reset_state(reset_partial_state=True)
    dv.train(folder / "pairs", out=folder / "run", **OPTIONS, **model)
    return folder / "run"


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return shutil.copytree(trained, tmp_path / "run")


@pytest.fixture
def resume() -> Train:
    def train(out: Path, **options: Any) -> dv.Run:
        AcceleratorState._reset_state(reset_partial_state=True)
        return dv.train(out=out, **{"resume": True, **options})

    return train


def contents(folder: Path) -> dict[str, str]:
    """Hashes of all files by path, but for those of locks."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.endswith(WRITER)
    }


# --- refused before anything is written ----------------------------------------------------------

ANOTHER_RUN = {
    "another seed": {"seed": 5},
    "another rank": {"rank": 4},
    "another alpha": {"set": {"train.alpha": 5.0}},
    "another precision": {"mixed_precision": "bf16"},
    "quantized": {"set": {"memory.quantization": "int8"}},
    "another backbone": {"backbone": "tiny"},
}
OTHER_OPTIONS = {
    "another learning rate": {"learning_rate": 1e-3},
    "another loss": {"loss": "hinge"},
    "a steeper loss": {"set": {"loss.beta": 5000.0}},
    "a larger batch": {"batch_size": 3},
    "more accumulation": {"gradient_accumulation_steps": 2},
    "another optimizer": {"betas": (0.8, 0.9)},
    "warm-up": {"warmup_steps": 5},
    "another reference": {"reference": "cached"},
    "more steps, had they decayed": {"set": {"train.decay": 0.5}, "steps": 9},
}
IMPOSSIBLE = {
    "fewer steps than there are": ({"steps": 1}, "has 2 steps already"),
    "an unknown loss": ({"loss": "none"}, "Unknown loss"),
    "an unknown tracker": ({"report_to": "nosuch"}, "report_to"),
    "other pairs": ({"pairs": "jitter", "prompt": "x"}, "how the pairs are built"),
    "missing labels": ({"labels": ["nosuch"]}, "Unknown set of labels"),
}


@pytest.mark.parametrize("case", [*ANOTHER_RUN, *OTHER_OPTIONS, *IMPOSSIBLE])
def test_a_refused_resume_changes_no_file(case: str, run: Path, resume: Train) -> None:
    before = contents(run.parent)
    if case in ANOTHER_RUN:
        for accept in (False, True):
            with pytest.raises(RunError, match=r"with another .*then .*, now .*another --out"):
                resume(run, accept_changes=accept, **ANOTHER_RUN[case])
    elif case in OTHER_OPTIONS:
        with pytest.raises(RunError, match=r"its 2 steps: .*then .*, now .*--accept-changes"):
            resume(run, **OTHER_OPTIONS[case])
    else:
        options, told = IMPOSSIBLE[case]
        with pytest.raises(UserError, match=told):
            resume(run, **options)
    assert contents(run.parent) == before
    # And the plain command still goes on.
    assert resume(run).new_reports == ()
    assert contents(run.parent) == before


@pytest.mark.parametrize(
    ("then", "now", "told"),
    [
        (2, 1, "Keep the pairs of a step with --set train.gradient_accumulation_steps=2, or"),
        (1, 3, "A step then sees other numbers of pairs; train on with them: --accept-changes"),
    ],
)
def test_another_number_of_processes_is_told_how_to_keep_the_pairs_of_a_step(
    then: int, now: int, told: str, run: Path
) -> None:
    before = Resumption.of(run, print)
    before = replace(before, options={**before.options, "processes": then})
    config = resolve(file=run / "run.toml")
    with pytest.raises(RunError, match=told):
        before.check(config, now, accept=False)
    accumulating = resolve(
        file=run / "run.toml", assignments=["train.gradient_accumulation_steps=2"]
    )
    if then == 2:
        before.check(accumulating, now, accept=False)


def test_a_hand_edited_run_toml_is_noticed(run: Path, resume: Train) -> None:
    path = run / "run.toml"
    path.write_text(path.read_text().replace("learning_rate = 0.0001", "learning_rate = 0.0002"))
    with pytest.raises(RunError, match=r"learning_rate \(then 0\.0001, now 0\.0002\)"):
        resume(run)


def test_a_damaged_log_is_refused_before_the_training(run: Path, resume: Train) -> None:
    (run / "log.jsonl").write_text("no report\n")
    before = contents(run)
    with pytest.raises(RunError, match=r"Line 1 of '.*log\.jsonl' is not the report of a step"):
        resume(run, steps=3)
    assert contents(run) == before


def test_a_refused_first_run_leaves_nothing(
    trained: Path, model: dict[str, Any], tmp_path: Path, resume: Train
) -> None:
    pairs = shutil.copytree(trained.parent / "pairs", tmp_path / "pairs")
    lines = [json.loads(line) for line in (pairs / "pairs.jsonl").read_text().splitlines()]
    text = "".join(json.dumps({**line, "region_share": 1.0}) + "\n" for line in lines)
    (pairs / "pairs.jsonl").write_text(text)
    options = {**OPTIONS, **model, "pairs": pairs, "resume": False, "report_to": "tensorboard"}
    with pytest.raises(UserError, match="have no regions"):
        resume(tmp_path / "new", **{**options, "loss": "region"})
    assert not (tmp_path / "new").exists()


# --- what may change ---------------------------------------------------------------------------


def test_changes_of_no_consequence_are_said_and_recorded(run: Path, resume: Train) -> None:
    kept = Kept()
    changed = {"batch_size": 1, "gradient_accumulation_steps": 2}  # as many pairs a step
    resume(run, steps=3, progress=kept, **changed)
    (said,) = (note for note in kept.notes if note.startswith("Changed at step 2: "))
    assert "train.steps (then 2, now 3)" in said and "train.batch_size (then 2, now 1)" in said
    (entry,) = tomllib.loads((run / "run.toml").read_text())["changes"]
    assert entry["step"] == 2
    assert entry["then"] == {
        "train.batch_size": 2, "train.gradient_accumulation_steps": 1, "train.steps": 2,
    }  # fmt: skip
    before = contents(run)
    resume(run)
    assert contents(run) == before  # nothing has changed since
    assert dv.Run.open(run).config.train.steps == 3  # which run.toml describes


def test_accepted_changes_hold_from_then_on(
    run: Path, resume: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Power(dv.Listener):
        def on_step_end(self, event: object) -> None:
            raise OSError("the power")

    changed = {"learning_rate": 2e-4, "steps": 4, "save_steps": 2}
    with pytest.raises(OSError, match="the power"):  # before the next checkpoint
        resume(run, accept_changes=True, listeners=[Power()], **changed)
    kept = Kept()
    resume(run, progress=kept)  # needs no flag again
    assert not any(note.startswith("Changed") for note in kept.notes)
    assert {report.lr for report in read_log(run)[2:]} == {2e-4}
    (entry,) = tomllib.loads((run / "run.toml").read_text())["changes"]
    assert entry["then"]["train.learning_rate"] == 1e-4
    (run / "checkpoints" / "latest").write_text("step_000001")
    resume(run)  # from before the change: the record says from where it holds now
    assert [report.lr for report in read_log(run)] == [1e-4, 2e-4, 2e-4, 2e-4]
    (entry,) = tomllib.loads((run / "run.toml").read_text())["changes"]
    assert entry["step"] == 1


def test_an_accepted_option_of_the_optimizer_is_the_optimizers(run: Path, resume: Train) -> None:
    resume(run, accept_changes=True, steps=3, betas=(0.5, 0.6))
    state = load_state(checkpoint_folder(run, 3) / "state.safetensors")
    (group,) = state["optimizer"]["param_groups"]
    assert (list(group["betas"]), group["weight_decay"]) == ([0.5, 0.6], 0.01)


def test_a_changed_library_is_recorded(run: Path, resume: Train) -> None:
    path = run / "run.toml"
    path.write_text(
        path.read_text().replace('[versions]\ndpo-video = "', '[versions]\ndpo-video = "0')
    )
    kept = Kept()
    resume(run, steps=3, progress=kept)
    assert "versions.dpo-video (then 00.1.0, now 0.1.0)" in " ".join(kept.notes)


# --- partial copies ------------------------------------------------------------------------------


def test_a_copy_without_the_pointer_goes_on(run: Path, resume: Train) -> None:
    (run / "checkpoints" / "latest").unlink()
    before = contents(run / "checkpoints")
    assert [report.step for report in resume(run, steps=3).new_reports] == [3]
    assert before.items() <= contents(run / "checkpoints").items()


def test_a_damaged_checkpoint_is_named_and_the_run_goes_on(
    run: Path, trained: Path, resume: Train
) -> None:
    (checkpoint_folder(run, 2) / "adapter" / "adapter_model.safetensors").unlink()
    kept = Kept()
    resume(run, auto_resume=True, resume=False, progress=kept)
    assert any("step_000002' is damaged" in note for note in kept.notes)
    newest = "checkpoints/step_000002/adapter"
    assert contents(run / newest) == contents(trained / newest)


def test_a_copy_without_run_toml_is_not_overwritten(
    run: Path, model: dict[str, Any], resume: Train
) -> None:
    (run / "run.toml").unlink()
    before = contents(run)
    for how in ({"resume": True}, {"resume": False}, {"resume": False, "auto_resume": True}):
        with pytest.raises(RunError, match=r"no run\.toml"):
            resume(run, **{**OPTIONS, **model, "pairs": run.parent / "pairs", **how})
    assert contents(run) == before


def test_a_copy_without_log_and_prompts_goes_on(run: Path, resume: Train) -> None:
    (run / "log.jsonl").unlink()
    (run / "prompts.json").unlink()
    resume(run, steps=3)
    assert [report.step for report in read_log(run)] == [3]
    assert dv.Run.open(run).prompts


# --- without a checkpoint ------------------------------------------------------------------------


@pytest.mark.parametrize("how", [{"resume": True}, {"auto_resume": True, "resume": False},
                                 {"resume": False}])  # fmt: skip
def test_a_run_without_a_checkpoint_says_that_it_starts_again(
    how: dict[str, bool], run: Path, model: dict[str, Any], trained: Path, resume: Train
) -> None:
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(RunError, match=f"dpo-video train --out {run} --resume"):
        dv.evaluate(run)
    kept = Kept()
    options = {**OPTIONS, **model, "pairs": trained.parent / "pairs", "learning_rate": 1e-3}
    resume(run, progress=kept, **options, **how)
    assert any("no checkpoint yet: the run starts at step 0" in note for note in kept.notes)
    assert [report.step for report in read_log(run)] == [1, 2]
    assert "changes" not in tomllib.loads((run / "run.toml").read_text())


# --- one writer ----------------------------------------------------------------------------------


def test_a_second_training_is_refused(run: Path, resume: Train) -> None:
    before = contents(run)
    with claim(run):
        for how in ({"resume": True}, {"auto_resume": True, "resume": False}):
            with pytest.raises(BusyError, match=f"process {os.getpid()} on "):
                resume(run, steps=3, **how)
    assert contents(run) == before


def test_trainings_without_a_folder_have_one_each(
    trained: Path, model: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folders = []

    class Second(dv.Listener):
        def on_train_begin(self, run: object) -> None:
            if not folders:  # a second one starts while the first one trains
                folders.append(None)
                folders[0] = dv.train(trained.parent / "pairs", **OPTIONS, **model).folder

    AcceleratorState._reset_state(reset_partial_state=True)
    first = dv.train(trained.parent / "pairs", listeners=[Second()], **OPTIONS, **model)
    assert first.folder == Path("runs/pairs-global")
    assert folders == [Path("runs/pairs-global-2")]


WRITERS: dict[str, tuple[str, str, Callable[[Path, Path, dict[str, Any]], object]]] = {
    "evaluate": (
        "run/evaluation", WRITER,
        lambda run, pairs, model: dv.evaluate(run, num_prompts=2, num_inference_steps=1),
    ),
    "export": ("run/export", ".peft-2.writer", lambda run, pairs, model: dv.export(run, "peft")),
    "generate": (
        "new", ".video.mp4.writer",
        lambda run, pairs, model: dv.generate(run, out=run.parent / "new/video.mp4"),
    ),
    "build": (
        "new", WRITER,
        lambda run, pairs, model: dv.build_pairs("jitter", out=run.parent / "new", **model),
    ),
    "label": (
        "pairs/labels", ".metric.writer",
        lambda run, pairs, model: dv.label(
            pairs, "metric",
            **{**model, "set": {**model["set"], "labeler.guards": {},
                                "labeler.weights": {"frame_difference": 1}}},
        ),
    ),
    "pack": ("new", WRITER, lambda run, pairs, model: dv.pack(pairs, run.parent / "new")),
    "export-pairs": (
        "new", WRITER, lambda run, pairs, model: dv.export_pairs(pairs, run.parent / "new"),
    ),
    "compare": (
        "new", WRITER,
        lambda run, pairs, model: dv.compare([run / "run.toml"], out=run.parent / "new"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("command", WRITERS)
def test_a_second_writer_is_refused_before_it_writes(
    command: str, run: Path, trained: Path, model: dict[str, Any]
) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    folder, name, call = WRITERS[command]
    pairs = shutil.copytree(trained.parent / "pairs", run.parent / "pairs")
    with claim(run.parent / folder, name):
        before = contents(run.parent)
        with pytest.raises(BusyError, match=f"is being written by .*process {os.getpid()} on "):
            call(run, pairs, model)
        assert contents(run.parent) == before


# --- signals and verdict -------------------------------------------------------------------------


def test_ctrl_c_saves_and_the_run_goes_on_to_the_same_bytes(
    run: Path, trained: Path, model: dict[str, Any], resume: Train
) -> None:
    class Press(dv.Listener):
        def on_step_end(self, event: object) -> None:
            signal.raise_signal(signal.SIGINT)

    shutil.rmtree(run)
    options = {**OPTIONS, **model, "save_steps": 2, "pairs": trained.parent / "pairs"}
    with pytest.raises(KeyboardInterrupt):  # as in a notebook
        resume(run, listeners=[Press()], resume=False, **options)
    assert list(dv.Run.open(run).checkpoints) == [1]
    resume(run)
    name = "checkpoints/step_000002/adapter/adapter_model.safetensors"
    assert contents(run)[name] == contents(trained)[name]


def test_the_verdict_sees_the_steps_before_the_resume(
    run: Path, resume: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dpo_video.training.diagnosis.WINDOW", 3)
    seen: list[str] = []

    class Verdicts(dv.Progress):
        def step(self, event: object, verdict: Any, steps: int) -> None:
            seen.append(verdict.state)

    resume(run, steps=3, progress=Verdicts())
    assert seen and "too_early" not in seen
