"""The main job as a user runs it, on the embedded model, in as few steps as show everything."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from conftest import Said

from dpo_video.backbone import tiny
from dpo_video.strategies import Sampling

CLIPS = Path(__file__).parent / "clips"
QUICK = [
    "--set=train.gradient_accumulation_steps=1",
    "--set=train.save_steps=2",
    "--set=train.validation_videos=1",
    "--set=train.report_to=none",
    "--device=cpu",
]
LOCAL = [
    "--pairs=local",
    "--loss=region",
    "--set=pairs.num_inference_steps=4",
    "--count=2",
    "--steps=2",
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one finished run in it, which the real program made."""
    place = tmp_path_factory.mktemp("place")
    program = [sys.executable, "-m", "dpo_video", "train", *LOCAL, *QUICK]
    program.append("--set=train.validation_videos=0")  # at the model's own number of steps
    done = subprocess.run(program, cwd=place, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return place


@pytest.fixture
def dpo_video(place: Path, said: Said, monkeypatch: pytest.MonkeyPatch) -> Said:
    """Run a command in `place` that ends with this code; what it says."""
    monkeypatch.chdir(place)
    short = Sampling(num_inference_steps=2, guidance_scale=2.5)
    monkeypatch.setattr(tiny, "Sampling", lambda **_: short)
    return said


def test_a_run_has_all_its_parts(place: Path) -> None:
    run = place / "runs" / "local-region"
    resolved = tomllib.loads((run / "run.toml").read_text())
    assert resolved["loss"]["name"] == "region" and resolved["loss"]["beta"] == 2500
    assert resolved["versions"]["torch"]
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    assert lines[0]["margin"] == 0
    assert (run / "checkpoints" / "step_000002" / "adapter" / "adapter_config.json").exists()


def test_a_config_repeats_a_run_to_the_byte_with_pairs_built_earlier(
    place: Path, dpo_video: Said
) -> None:
    told = dpo_video(
        0, "train", "--config", "runs/local-region/run.toml", "--out", "runs/repeat",
        "--set=train.validation_videos=1",
    )  # fmt: skip
    assert "built earlier" in told
    assert len(list((place / "runs" / "pairs").iterdir())) == 1
    assert len(list((place / "runs" / "repeat" / "samples").rglob("*.mp4"))) == 1
    weights = [
        place / "runs" / name / "checkpoints/step_000002/adapter/adapter_model.safetensors"
        for name in ("local-region", "repeat")
    ]
    assert weights[0].read_bytes() == weights[1].read_bytes()


@pytest.mark.usefixtures("quick_metrics")
def test_evaluate_writes_a_page_and_json(place: Path, dpo_video: Said) -> None:
    told = dpo_video(
        0,
        "evaluate",
        "runs/local-region",
        "--num-prompts",
        "2",
        "--set",
        "evaluate.num_inference_steps=3",
    )
    folder = place / "runs" / "local-region" / "evaluation"
    page = (folder / "index.html").read_text()
    assert "data:video/mp4;base64," in page
    assert "http://" not in page.replace("http://www.w3.org", "")
    found = json.loads((folder / "evaluation.json").read_text())
    names = {metric["name"] for metric in found["metrics"]}
    assert {"warp_error", "frame_difference", "dynamic_degree"} <= names
    assert "index.html" in told


def test_generate_writes_videos(place: Path, dpo_video: Said) -> None:
    dpo_video(
        0, "generate", "runs/local-region", "--prompt", "a red star", "--num-inference-steps", "2",
        "--out", "star.gif",
    )  # fmt: skip
    dpo_video(
        0,
        "generate",
        "--num-inference-steps",
        "2",
        "--num-videos",
        "2",
        "--out",
        "base.mp4",
    )
    assert (place / "star.gif").read_bytes()[:3] == b"GIF"
    assert (place / "base_00.mp4").exists() and (place / "base_01.mp4").exists()


def test_jitter_with_copy(place: Path, dpo_video: Said) -> None:
    dpo_video(
        0, "train", "--pairs=jitter", "--loss=global", "--reference=copy",
        "--set=pairs.chosen=clip",
        "--count=1", "--steps=1", *QUICK,
    )  # fmt: skip
    assert (place / "runs" / "jitter-global" / "log.jsonl").exists()


def test_region_loss_on_pairs_without_regions_says_so(place: Path, dpo_video: Said) -> None:
    told = dpo_video(
        2, "train", "--pairs=jitter", "--loss=region", "--set=pairs.chosen=clip", "--count=1",
        "--steps=1", *QUICK,
    )  # fmt: skip
    assert "have no regions" in told and "Traceback" not in told


def test_real_clips(place: Path, dpo_video: Said) -> None:
    told = dpo_video(0, "train", *LOCAL, *QUICK, "--clips", CLIPS, "--out", "runs/real")
    assert (place / "runs" / "real" / "log.jsonl").exists()
    assert "sitting_down.mp4" in told  # it has no caption, and that is said
