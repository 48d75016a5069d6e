"""Short runs of the two campaigns in benchmarks/trust; the published ones are longer."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.trust.fuzz import try_case
from benchmarks.trust.mutate import Touch
from benchmarks.trust.readers import READERS
from benchmarks.trust.reading import Bench, Reading
from dpo_video.data import storage
from dpo_video.data.videodpo import read_videodpo_pair
from dpo_video.errors import UserError
from dpo_video.support import urls

CASES = 8
# Too slow for a test; and beartype iterates over a sequence of clips, which decodes them.
LEFT_OUT = ("checkpoint", "adapter", "log.jsonl", "command line", "requests to the page", "mp4",
            "gif", "webm", "avi", "mkv", "mpg", "ts", "flv", "wmv", "webp", "pictures",
            "metadata.jsonl")  # fmt: skip


@pytest.mark.filterwarnings("ignore::UserWarning")  # of libraries, about damaged input
@pytest.mark.parametrize("name", [name for name in READERS if not name.startswith(LEFT_OUT)])
def test_a_reader_returns_a_result_or_one_sentence(
    name: str, small_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for module, setting in ((urls, "PROTOCOLS"), (storage, "PAUSES")):  # readers change them
        monkeypatch.setattr(module, setting, getattr(module, setting))
    reading = READERS[name](Bench(tmp_path, small_folder))
    for number in range(CASES):
        verdict, detail = try_case(reading, 1, name, number)
        assert verdict in ("accepted", "refused"), f"case {number}: {verdict} {detail}"


def test_findings_are_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:

    monkeypatch.chdir(tmp_path)

    def read(data: bytes) -> None:
        if data == b"break":
            raise KeyError("a bug")
        if data == b"touch":
            Path("touched").touch()
        raise UserError("two\nlines become one sentence")

    for data, verdict in ((b"break", "KeyError"), (b"touch", "code ran"), (b"", "refused")):
        reading = Reading(seeds=[data], damage=lambda random, given, others: given, read=read)
        assert try_case(reading, 0, "any", 0)[0] == verdict


@pytest.mark.parametrize("protocol", range(6))
def test_a_malicious_pt_executes_nothing(protocol: int, tmp_path: Path) -> None:
    path, touched = tmp_path / "pair_00000.pt", tmp_path / "touched"
    path.write_bytes(pickle.dumps({"latents_w": Touch(str(touched))}, protocol=protocol))
    with pytest.raises(UserError, match="cannot be read"):
        read_videodpo_pair(path)
    assert not touched.exists()


def test_an_error_is_one_line_whatever_it_quotes() -> None:
    shown = str(UserError("two\nlines, \x1b[31m red, half a character \ud800 and " + "x" * 10**7))
    assert shown.startswith(r"two lines, \x1b[31m red, half a character \ud800 and xxx")
    assert len(shown) < 2100


def test_faults_of_two_workers_and_of_packing_lose_nothing() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.trust.faults", "--stage=workers", "--stage=pack",
         "--faults=6", "--seed=1"],
        cwd=Path(__file__).parents[2], env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert "6 faults" in done.stdout
