"""Commands on pairs that workers share, that are packed, and that are remote."""

from __future__ import annotations

from pathlib import Path

import fsspec
import pytest
from conftest import SHAPE, Said

from dpo_video.data.store import PairStore
from dpo_video.support import urls

TRAIN = ["--loss=global", "--metric=frame_difference", "--set=train.gradient_accumulation_steps=1",
         "--set=train.validation_videos=0", "--set=train.report_to=none", "--set=train.rank=2",
         "--set=train.save_steps=1"]  # fmt: skip


@pytest.fixture
def small(small_folder: Path) -> list[str]:
    return [
        "--backbone=animatediff", f"--set=backbone.model={small_folder}", "--device=cpu",
        f"--set=backbone.frames={SHAPE.frames}", f"--set=backbone.height={SHAPE.height}",
        f"--set=backbone.width={SHAPE.width}",
    ]  # fmt: skip


def test_workers_share_a_build(
    said: Said, small: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    build = [
        "build",
        "--pairs=jitter",
        "--set=pairs.num_inference_steps=1",
        "--prompt=a square",
        *small,
        "--set=build.previews=false",
        "--count=5",
    ]
    said(0, *build, "--out=one")
    told = said(0, *build, "--out=shared", "--worker=2/2")
    assert "2 pairs are made; 2 of them wait for earlier ones" in told
    said(0, *build, "--out=shared", "--worker", "1/2")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        told = said(0, *build, "--out=launched")
        assert bool(told) == (rank == "0")  # only the main process prints
    for name in ("shared", "launched"):
        assert PairStore(name).digest == PairStore("one").digest
        for path in sorted(Path("one/latents").iterdir()):
            assert path.read_bytes() == Path(name, "latents", path.name).read_bytes()
    assert "Leave --worker out" in said(2, *build, "--out=launched", "--worker=1/2")


@pytest.mark.parametrize("worker", ["0/2", "3/2", "1", "a/b", "-1/2", "1/2/3", ""])
def test_an_invalid_worker_is_refused(said: Said, small: list[str], worker: str) -> None:
    told = said(2, "build", *small, "--out=pairs", f"--worker={worker}")
    assert "is not K/N" in told and not Path("pairs").exists()


def test_a_run_resumes_on_the_packed_copy_and_streams_it(
    said: Said, small: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(urls, "PROTOCOLS", (*urls.PROTOCOLS, "memory"))
    said(
        0,
        "build",
        "--pairs=jitter",
        "--set=pairs.num_inference_steps=1",
        "--prompt=a square",
        *small,
        "--count=2",
        "--out=pairs",
    )
    assert "2 pairs in 2 files" in said(0, "pack", "pairs", "packed")
    said(0, "train", "--pairs=pairs/", *small, *TRAIN, "--steps=1", "--out=run")
    said(0, "train", "--pairs=packed/", *small, *TRAIN, "--steps=2", "--out=run", "--resume")
    files = fsspec.filesystem("memory")
    for path in Path("packed").rglob("*"):
        if path.is_file():
            files.pipe_file(f"/streamed/{path.relative_to('packed')}", path.read_bytes())
    url = "memory://streamed"
    said(0, "train", f"--pairs={url}", *small, *TRAIN, "--steps=2", "--out=again")
    adapters = {
        Path(run, "checkpoints/step_000002/adapter/adapter_model.safetensors").read_bytes()
        for run in ("run", "again")
    }
    assert len(adapters) == 1
    assert f'store = "{url}"' in Path("again/run.toml").read_text()
    assert "is read-only" in said(2, "label", url, "--labeler=metric")
    assert "holds pairs already" in said(2, "build", f"--pairs={url}")
