"""The notebooks run from the first cell to the last, and their results show themselves."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

from dpo_video.backbone import tiny
from dpo_video.strategies import Sampling

NOTEBOOKS = Path(__file__).parents[1] / "docs" / "notebooks"


@pytest.mark.usefixtures("quick_metrics")
@pytest.mark.parametrize("notebook", sorted(NOTEBOOKS.glob("*.py")), ids=lambda path: path.stem)
def test_a_notebook_runs(notebook: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, value in {"COUNT": 2, "STEPS": 2, "NUM_PROMPTS": 2}.items():
        monkeypatch.setenv(name, str(value))
    short = Sampling(num_inference_steps=2, guidance_scale=2.5)
    monkeypatch.setattr(tiny, "Sampling", lambda **_: short)
    found = runpy.run_path(str(notebook))
    for name in ("pairs", "run", "evaluation", "video", "own"):
        assert "<" in found[name]._repr_html_()
    assert found["run"].folder.parent.resolve() == (tmp_path / "runs").resolve()
