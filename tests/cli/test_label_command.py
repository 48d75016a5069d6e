"""`dpo-video label`, and training on its labels."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest
from conftest import SHAPE, Said, load_small
from small_labels import random_store
from typer.testing import CliRunner

from dpo_video import cli
from dpo_video.data.labels import LabelSet
from dpo_video.data.store import Manifest
from dpo_video.errors import UserError

METRIC = ["--labeler=metric", "--set=labeler.weights.frame_difference=1", "--set=labeler.guards={}"]
SEGMENTS = f"--seconds={2 / SHAPE.fps}"
TRAIN = [
    "train",
    "--loss=global",
    "--metric=frame_difference",
    "--device=cpu",
    "--set=train.gradient_accumulation_steps=1",
    "--set=train.validation_videos=0",
    "--set=train.report_to=none",
    "--set=train.rank=2",
]


@pytest.fixture(scope="module")
def backbone(small_folder: Path) -> list[str]:
    return [
        "--backbone=animatediff", f"--set=backbone.model={small_folder}",
        f"--set=backbone.frames={SHAPE.frames}", f"--set=backbone.height={SHAPE.height}",
        f"--set=backbone.width={SHAPE.width}",
    ]  # fmt: skip


@pytest.fixture
def pairs(small_folder: Path, tmp_path: Path) -> Path:
    """Three pairs whose manifest names their backbone."""
    model = load_small(small_folder)
    shape = {"frames": SHAPE.frames, "height": SHAPE.height, "width": SHAPE.width}
    manifest = Manifest(
        recipe={"backbone": {"name": "animatediff", "model": str(small_folder), **shape}},
        identity=model.identity,
        latent_shape=model.latent_shape,
        fps=model.shape.fps,
    )
    return random_store(tmp_path / "pairs", model, manifest=manifest).folder


def run(*arguments: str | Path) -> str:
    """Standard output; a UserError is raised."""
    done = CliRunner().invoke(cli.app, [*map(str, arguments)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


def recorded(folder: Path, *labels: object) -> list[str]:
    """Flags for labels from a file, one per pair; None for an unlabelled pair."""
    file = folder / "labels.jsonl"
    lines = [json.dumps({"pair": i, "label": each})
             for i, each in enumerate(labels) if each is not None]  # fmt: skip
    file.write_text("\n".join(lines))
    return ["--labeler=recorded", f"--set=labeler.file={file}", SEGMENTS, "--device=cpu"]


# --- label -----------------------------------------------------------------------------------


def test_label_decodes_with_the_pairs_backbone_and_summarizes(pairs: Path) -> None:
    found = json.loads(run("label", pairs, *METRIC, SEGMENTS, "--device=cpu", "--json"))
    assert found["pairs"] == found["labelled"] == 3
    assert [each["frames"] for each in found["segments"]] == [[0, 2], [2, 4]]
    for each in found["segments"]:
        assert each["first"] + each["second"] + each["tie"] == pytest.approx(1)
    label_set = LabelSet(pairs, "metric")
    assert label_set.recipe.labeler["weights"] == {"frame_difference": 1.0}
    firsts = sum(label[0].item() == 1 for label in label_set.tensors().values())
    assert found["segments"][0]["first"] == pytest.approx(firsts / 3)
    assert "frame_difference" in label_set.lines[0].note


def test_labelling_resumes_and_another_recipe_needs_a_name(pairs: Path) -> None:
    run("label", pairs, *METRIC, SEGMENTS, "--device=cpu")
    before = LabelSet(pairs, "metric").path.read_bytes()
    run("label", pairs, *METRIC, SEGMENTS, "--device=cpu")
    assert LabelSet(pairs, "metric").path.read_bytes() == before
    other = [*METRIC, "--set=labeler.margin=0.5", SEGMENTS, "--device=cpu"]
    with pytest.raises(UserError, match=r"labels that were given with other options.*--as NAME"):
        run("label", pairs, *other)
    out = run("label", pairs, *other, "--as", "careful")
    assert "Agreement of careful and metric" in " ".join(out.split())
    assert LabelSet(pairs, "metric").path.read_bytes() == before


def test_agreement_with_the_other_labels_is_measured(pairs: Path, tmp_path: Path) -> None:
    run("label", pairs, *recorded(tmp_path, "first", "second", "tie"), "--as=one")
    flags = recorded(tmp_path, "first", "first", "tie")
    found = json.loads(run("label", pairs, *flags, "--as=two", "--json"))
    # Signs (1, 1), (-1, 1), (0, 0), twice: 2/3 agree; by chance 1/3 * 2/3 + 1/3 * 1/3 = 1/3.
    between = found["agreement"]["two and one"]
    assert between["segments"] == 6 and between["share"] == pytest.approx(2 / 3)
    assert between["kappa"] == pytest.approx((2 / 3 - 1 / 3) / (1 - 1 / 3))


def test_a_label_file_may_grow(pairs: Path, tmp_path: Path) -> None:
    run("label", pairs, *recorded(tmp_path, "first"))
    out = run("label", pairs, *recorded(tmp_path, "second", None, "tie"))
    assert "2 of 3 pairs have labels" in " ".join(out.split())
    assert LabelSet(pairs, "recorded").tensors()[0].tolist() == [-1, -1]


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ([], "label needs --labeler NAME"),
        (["--labeler=metrik"], "Unknown labeler 'metrik'. Did you mean 'metric'"),
        (["--labeler=metric", "--as=a/b"], "'a/b' cannot name labels"),
        (["--labeler=recorded"], "^labeler.file: it is missing"),
        (["--labeler=recorded", "--set=labeler.file=none"], r"Cannot read '/.*/none'"),
    ],
)
def test_a_user_error_is_one_sentence(pairs: Path, flags: list[str], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        run("label", pairs, *flags)


def test_labels_that_are_all_ties_are_warned_of(pairs: Path, said: Said) -> None:
    ties = ["--set=labeler.weights.frame_difference=1", "--set=labeler.guards.frame_difference=0",
            SEGMENTS, "--device=cpu"]  # fmt: skip
    told = said(0, "label", pairs, "--labeler=metric", "--set=labeler.margin=1.99", *ties)
    assert "are ties, from which there is nothing to learn" in told
    assert "under another name (--as NAME): without vetoes (--set labeler.guards={})" in told
    assert "dpo-video train" not in said.out
    told = said(0, "label", pairs, *METRIC, SEGMENTS, "--device=cpu", "--as=no_vetoes")
    assert "nothing to learn" not in told


def test_a_folder_without_pairs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a pair store"):
        run("label", tmp_path, "--labeler=metric")


# --- build -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--pairs=jitter", *METRIC], "'jitter' take no labeler"),
        (["--pairs=dense", "--labeler=recorded", "--set=labeler.file=x"], "finished pairs only"),
        (["--pairs=ranked"], "'ranked' need a labeler that ranks"),
    ],
)
def test_a_labeler_that_does_not_match_the_builder_is_refused(
    flags: list[str], sentence: str, backbone: list[str], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=sentence):
        run("build", *flags, *backbone, "--device=cpu", "--count=1", "--out", tmp_path / "built")
    assert not (tmp_path / "built").exists()


# --- train -----------------------------------------------------------------------------------


def test_training_uses_the_labels_and_pins_them_in_run_toml(
    pairs: Path, backbone: list[str], tmp_path: Path
) -> None:
    label = ["label", pairs]
    run(*label, *recorded(tmp_path, "second", None, "first"))
    first, second = tmp_path / "first", tmp_path / "second"
    train = [*TRAIN, "--pairs", pairs, *backbone, "--labels=recorded"]
    done = CliRunner().invoke(cli.app, [*map(str, train), "--steps=2", "--out", str(first)])
    assert done.exit_code == 0, done.output
    assert "2 of 3 pairs have labels" in " ".join(done.output.split())
    assert "the others are left out" in " ".join(done.output.split())
    (pinned,) = tomllib.loads((first / "run.toml").read_text())["train"]["labels"]
    name, _, digest = pinned.partition("@")
    assert name == "recorded" and len(digest) == 16

    run("train", "--config", first / "run.toml", "--out", second)
    assert (first / "log.jsonl").read_text().count("\n") == 2
    assert (first / "run.toml").read_text() == (second / "run.toml").read_text()

    run(*label, *recorded(tmp_path, "second", "first", "first"))
    for again in (
        ["train", "--out", second, "--resume", "--steps=3"],
        ["train", "--config", first / "run.toml", "--out", tmp_path / "third"],
    ):
        with pytest.raises(UserError, match="no longer those that this run was started with"):
            run(*again)
    run("train", "--config", first / "run.toml", "--labels=recorded", "--out", tmp_path / "third")
    assert pinned not in (tmp_path / "third" / "run.toml").read_text()


@pytest.mark.parametrize(
    ("labels", "sentence"),
    [
        ("recordde", r"Unknown set of labels .*Did you mean 'recorded'\?"),
        ("recorded@0", "no longer"),
    ],
)
def test_unknown_labels_are_refused(
    pairs: Path, backbone: list[str], tmp_path: Path, labels: str, sentence: str
) -> None:
    run("label", pairs, *recorded(tmp_path, "first"))
    with pytest.raises(UserError, match=sentence):
        run(*TRAIN, "--pairs", pairs, *backbone, f"--labels={labels}", "--out", tmp_path / "run")
    assert not (tmp_path / "run" / "run.toml").exists()


def test_labels_that_are_all_ties_are_refused(
    pairs: Path, backbone: list[str], tmp_path: Path
) -> None:
    run("label", pairs, *recorded(tmp_path, "tie", "tie"))
    with pytest.raises(UserError, match="ties"):
        run(*TRAIN, "--pairs", pairs, *backbone, "--labels=recorded", "--out", tmp_path / "run")
