"""The command line: its output, its files and its errors."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from conftest import SHAPE
from typer.testing import CliRunner

from dpo_video import registry
from dpo_video.cli import app, main
from dpo_video.data.store import PairStore
from dpo_video.data.video_writer import write_video
from dpo_video.testing import small_videos
from dpo_video.training.run_dir import latest_checkpoint

METRIC = "--metric=frame_difference"
QUICK = [
    METRIC,
    "--set=train.gradient_accumulation_steps=1",
    "--set=train.validation_videos=0",
    "--set=train.report_to=none",
    "--set=train.rank=2",
]


@dataclass(frozen=True, kw_only=True)
class Done:
    code: int
    out: str
    err: str


Run = Callable[..., Done]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """Runs the program in this process as a shell would."""

    def command(*arguments: str | Path) -> Done:
        monkeypatch.setattr(sys, "argv", ["dpo-video", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "200")
        try:
            main()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        out, err = capfd.readouterr()
        return Done(code=code, out=out, err=err)

    return command


@pytest.fixture(scope="module")
def small(small_folder: Path) -> list[str]:
    """Flags of the small model."""
    return [
        "--backbone=animatediff", f"--set=backbone.model={small_folder}", "--device=cpu",
        f"--set=backbone.frames={SHAPE.frames}", f"--set=backbone.height={SHAPE.height}",
        f"--set=backbone.width={SHAPE.width}",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two captioned videos and a damaged one."""
    folder = tmp_path_factory.mktemp("clips")
    for i, video in enumerate(small_videos(2, SHAPE.frames, SHAPE.height, SHAPE.width)):
        write_video(folder / f"clip_{i}.mp4", video, SHAPE.fps)
        (folder / f"clip_{i}.txt").write_text("a red square moving left slowly")
    (folder / "torn.mp4").write_bytes((folder / "clip_0.mp4").read_bytes()[:200])
    return folder


@pytest.fixture(scope="module")
def pairs(small: list[str], clips: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three finished pairs."""
    folder = tmp_path_factory.mktemp("built") / "pairs"
    done = CliRunner().invoke(
        app,
        [
            "build",
            "--pairs=local",
            "--set=pairs.num_inference_steps=4",
            *small,
            "--clips",
            str(clips),
            "--count=3",
            "--out",
            str(folder),
        ],
    )
    assert done.exit_code == 0, done.exception
    return folder


# --- what there is ---------------------------------------------------------------------------


def test_list_names_every_strategy_with_its_kind_and_package(run: Run) -> None:
    done = run("list")
    assert done.code == 0 and done.err == ""
    for kind in registry.KINDS:
        for listing in registry.listings(kind):
            line = next(
                line for line in done.out.splitlines() if line.split()[:2] == [kind, listing.name]
            )
            assert listing.distribution in line
    one = run("list", "loss")
    assert "region" in one.out and "toggle" not in one.out


def test_list_prints_json(run: Run) -> None:
    found = json.loads(run("list", "--json").out)
    assert {row["kind"] for row in found} <= {*registry.PYTHON, "recipe"}
    assert {"kind": "loss", "name": "region"}.items() <= found[
        [row["name"] for row in found].index("region")
    ].items()


def test_show_prints_source_and_options(run: Run) -> None:
    done = run("show", "loss", "region")
    assert done.code == 0
    for text in ("arXiv 2601.04068", "loss.beta", "2500.0", "Slope of both terms"):
        assert text in done.out
    found = json.loads(run("show", "pairs", "local", "--json").out)
    assert found["doc"].startswith("LocalDPO: repaints moving regions")
    option = {option["path"]: option for option in found["options"]}["pairs.mask.max_blobs"]
    assert option["type"] == "int" and option["default"] == "5" and option["meaning"]
    assert "train.weight_decay" in run("show", "train").out
    assert "It has no options." in run("show", "reference", "toggle").out


@pytest.mark.parametrize("kind", registry.KINDS)
def test_every_strategy_can_be_shown(run: Run, kind: str) -> None:
    for listing in registry.listings(kind):
        done = run("show", kind, listing.name)
        assert done.code == 0, done.err
        assert len(done.out.splitlines()) > 3


def test_config_prints_the_resolved_run(run: Run, tmp_path: Path) -> None:
    done = run("config", "--loss=global", "--set", "loss.beta=7", "--seed=3", METRIC)
    tables = tomllib.loads(done.out)
    assert tables["loss"] == {"name": "global", "beta": 7.0, "sft_weight": 0.0}
    assert tables["run"]["seed"] == 3
    file = tmp_path / "run.toml"
    file.write_text(done.out)
    assert run("config", "--config", file).out == done.out
    spoken = json.loads(run("config", "--config", file, "--json").out)
    assert spoken == {name: table for name, table in tables.items() if name != "versions"}


@pytest.mark.parametrize("command", ["train", "build", "evaluate", "generate", "list", "show"])
def test_every_command_has_help(command: str) -> None:
    done = CliRunner().invoke(app, [command, "--help"])
    assert done.exit_code == 0 and "Usage" in done.output


# --- building and training -------------------------------------------------------------------


def test_build_skips_damaged_clips_and_resumes(
    run: Run, small: list[str], clips: Path, tmp_path: Path
) -> None:
    arguments = ["build", "--pairs=jitter", "--set=pairs.chosen=clip", *small, "--clips", clips,
                 "--out", tmp_path / "pairs"]  # fmt: skip
    done = run(*arguments, "--count=1")
    assert done.code == 0, done.err
    assert "Skipped torn.mp4" in done.err
    done = run(*arguments, "--count=2")
    assert "1 of them exist already" in done.err.replace("\n", " ")
    assert len(PairStore(tmp_path / "pairs")) == 2
    assert "2 pairs built earlier" in run(*arguments, "--count=2").err.replace("\n", " ")
    done = run(*arguments, "--count=2", "--seed=1")
    assert done.code == 2 and "built with other options (seed: 0 before, 1 now)" in done.err


def test_equal_recipes_share_their_pairs(
    run: Run, small: list[str], clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    build = [
        "--pairs=local",
        "--set=pairs.num_inference_steps=4",
        *small,
        "--clips",
        clips,
        "--count=1",
    ]
    assert run("build", *build).code == 0
    done = run("train", *build, "--loss=region", "--steps=1", *QUICK)
    assert done.code == 0, done.err
    assert "Using 1 pair built earlier" in done.err
    assert run("build", *build, "--set=pairs.guidance_scale=1.0").code == 0
    assert len(list((tmp_path / "runs" / "pairs").iterdir())) == 2


def test_a_users_pairs_are_built_exported_and_built_again(
    run: Run, small: list[str], clips: Path, tmp_path: Path
) -> None:
    for side, clip in (("win", "clip_0"), ("lose", "clip_1")):
        for name in ("one", "two"):
            path = tmp_path / "mine" / side / f"{name}.mp4"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes((clips / f"{clip}.mp4").read_bytes())
    (tmp_path / "mine" / "lose" / "alone.mp4").write_bytes(b"no matter")
    folder = ["build", "--pairs=folder", *small]
    done = run(*folder, "--set", f"pairs.path={tmp_path / 'mine'}", "--prompt=a square",
               "--out", tmp_path / "pairs")  # fmt: skip
    assert done.code == 0, done.err
    assert "Building 2 pairs" in done.err and "Skipped lose/alone.mp4" in done.err
    assert "Files skipped in total: 1" in done.err
    done = run("export-pairs", tmp_path / "pairs", tmp_path / "published")
    assert done.code == 0 and "2 pairs in" in done.err
    done = run(
        *folder, "--set", f"pairs.path={tmp_path / 'published'}", "--out", tmp_path / "again"
    )
    assert done.code == 0, done.err
    one, two = (PairStore(tmp_path / name).batch([0, 1]) for name in ("pairs", "again"))
    assert torch.equal(one.first, two.first) and torch.equal(one.second, two.second)
    assert [row.prompt for row in PairStore(tmp_path / "again").records] == ["a square"] * 2


def test_a_folder_of_videos_takes_no_clips_and_requires_a_path(
    run: Run, small: list[str], clips: Path
) -> None:
    folder = ["build", "--pairs=folder", *small]
    done = run(*folder)
    assert done.code == 2 and "pairs.path" in done.err and "show pairs folder" in done.err
    done = run(*folder, f"--set=pairs.path={clips}")
    assert done.code == 2 and "chosen and rejected" in done.err
    done = run(*folder, f"--set=pairs.path={clips}", "--clips", clips)
    assert done.code == 2 and "Leave --clips out" in done.err


def test_undecided_pairs_are_counted(
    run: Run, small: list[str], clips: Path, tmp_path: Path
) -> None:
    done = run(
        "build",
        "--pairs=dense",
        "--set=pairs.num_inference_steps=2",
        *small,
        "--clips",
        clips,
        "--count=2",
        "--out",
        tmp_path / "pairs",
    )
    assert done.code == 0, done.err
    said = " ".join(done.err.split())
    assert "2 of 2 pairs prefer neither video" in said and "dpo-video label" in said
    dense = ["--pairs=dense", "--set=pairs.num_inference_steps=2", *small, "--clips", clips]
    done = run("train", *dense, "--count=3", "--out", tmp_path / "runs" / "dense")
    assert done.code == 2 and "nothing can be learned until the pairs are labelled" in done.err
    assert len(list((tmp_path / "runs" / "pairs").rglob("latents/*.safetensors"))) == 1
    done = run("export-pairs", tmp_path / "pairs", tmp_path / "published")
    assert "0 pairs in" in done.err and "2 left out" in done.err
    done = run("build", "--pairs=ranked", *small, "--count=1", "--out", tmp_path / "ranked")
    assert done.code == 2 and "--labeler NAME" in done.err


def test_a_run_repeats_and_resumes_from_its_run_toml(
    run: Run, small: list[str], pairs: Path, tmp_path: Path
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    done = run("train", "--pairs", pairs, "--loss=region", *small, *QUICK, "--steps=2",
               "--out", first)  # fmt: skip
    assert done.code == 0, done.err
    assert f"Using the 3 pairs in {pairs}" in done.err.replace("\n", "")
    assert run("train", "--config", first / "run.toml", "--out", second).code == 0
    assert (first / "run.toml").read_text() == (second / "run.toml").read_text()

    def weights(folder: Path) -> bytes:
        path = latest_checkpoint(folder) / "adapter" / "adapter_model.safetensors"
        return path.read_bytes()

    assert weights(first) == weights(second)
    again = run("train", "--config", first / "run.toml", "--out", second)
    assert again.code == 2 and "holds a run already" in again.err
    longer = run("train", "--out", second, "--resume", "--steps=3")
    assert longer.code == 0, longer.err
    assert latest_checkpoint(second).name == "step_000003"
    finished = run("train", "--out", second, "--resume")
    assert "already has all its steps" in finished.err.replace("\n", " ")


def test_the_suffix_decides_the_video_format(run: Run, small: list[str], tmp_path: Path) -> None:
    done = run(
        "generate",
        *small,
        "--prompt=a red square",
        "--num-inference-steps=2",
        "--out",
        tmp_path / "a.gif",
    )
    assert done.code == 0, done.err
    assert (tmp_path / "a.gif").read_bytes()[:3] == b"GIF"


# --- how it fails ----------------------------------------------------------------------------

WRONG = {
    "unknown loss": (["train", "--loss=regoin"], "Did you mean 'region'?"),
    "unknown kind": (["list", "losses"], "Unknown kind 'losses'. Did you mean 'loss'?"),
    "kind without a name": (
        ["show", "loss"],
        "show loss needs a NAME (see `dpo-video list loss`).",
    ),
    "unknown option": (["config", "--set=loss.beat=1"], "Did you mean 'loss.beta'?"),
    "wrong type": (["config", "--set=loss.beta=x"], "See `dpo-video show loss region`."),
    "malformed set": (["config", "--set=beta"], "Write it like --set loss.beta=500."),
    "missing config": (["train", "--config=none.toml"], "Cannot read 'none.toml'"),
    "missing run": (["evaluate", "none"], "it has no run.toml"),
    "missing run to resume": (["train", "--out=none", "--resume"], "Start it without --resume."),
    "resume without a run": (["train", "--resume"], "--resume needs --out RUN"),
    "checkpoint of no run": (["generate", "--checkpoint=1"], "--checkpoint needs a run:"),
    "wrong suffix": (["generate", "--out=video.avi"], "videos end in .mp4, .gif"),
    "unknown device": (["build", "--device=gpu9"], "'gpu9' is not a device. Choose one of"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_user_error_is_one_sentence_and_exit_code_2(
    run: Run, case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments, sentence = WRONG[case]
    done = run(*arguments)
    assert done.code == 2 and done.out == ""
    assert done.err.startswith("Error: ") and done.err.count("\n") == 1
    assert sentence in done.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--clips=none"], "/none. Check the path after --clips."),
        (["--set=backbone.model=none"], "Cannot load the unet of 'none'"),
        ([], "are made of real videos, and the backbone 'animatediff' has none of its own."),
    ],
)
def test_a_later_user_error_is_one_sentence_too(
    run: Run,
    small: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    sentence: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    done = run("build", *small, *arguments)
    assert done.code == 2 and done.err.count("\n") == 1
    assert sentence in done.err


def test_pairs_of_another_backbone_are_refused(
    run: Run, small: list[str], pairs: Path, tmp_path: Path
) -> None:
    larger = [*small, "--set=backbone.height=32"]
    done = run("train", "--pairs", pairs, *larger, *QUICK, "--out", tmp_path / "run")
    assert done.code == 2
    assert "(4, 4, 4, 4); the backbone's are (4, 4, 8, 4). They were made with animat" in done.err
    done = run("build", "--pairs", pairs, *small)
    assert done.code == 2 and "holds pairs already" in done.err


def test_a_folder_that_cannot_be_written_is_refused(
    run: Run, small: list[str], clips: Path, pairs: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    out = tmp_path / "file" / "out"
    done = run("build", "--pairs=jitter", *small, "--clips", clips, "--count=1", "--out", out)
    assert done.code == 2 and "Cannot write to" in done.err
    done = run("train", "--pairs", pairs, *small, *QUICK, "--steps=1", "--out", out)
    assert done.code == 2 and "Cannot write to" in done.err


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["list", "loss"], 0),
        (["config", "--loss=regoin"], 2),
        (["evaluate", "none"], 2),
        (["train", "--steps=many"], 2),
        (["nothing"], 2),
    ],
)
def test_exit_codes_of_the_real_program(arguments: list[str], code: int, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "dpo_video", *arguments],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code
    assert "Traceback" not in done.stderr
    assert (done.stdout == "") == (code == 2)
    assert bool(done.stderr) == (code == 2)


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch, run: Run) -> None:
    def broken(kind: str) -> list[registry.Listing]:
        raise ZeroDivisionError

    monkeypatch.setattr(registry, "listings", broken)
    with pytest.raises(ZeroDivisionError):
        run("list")
