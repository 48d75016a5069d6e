"""State on disk is exact, and no pickle is ever read or written."""

from __future__ import annotations

import ast
import json
import math
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as some
from safetensors import safe_open

from dpo_video.errors import RunError
from dpo_video.support.tensor_tree import load_state, save_state
from dpo_video.training.checkpoint import (
    MANIFEST,
    RunFingerprint,
    check_manifest,
    drop_checkpoints,
    kept_adapter,
    newest_checkpoint,
    write_manifest,
)
from dpo_video.training.run_dir import checkpoint_folder, checkpoints, latest_checkpoint

PACKAGE = Path(__file__).parents[2] / "dpo_video"


def round_trip(folder: Path, state: Any) -> Any:
    save_state(folder / "state.safetensors", state)
    return load_state(folder / "state.safetensors")


@pytest.mark.parametrize(
    "state",
    [
        {}, [], None, True, 0, -(2**70), "ü\n\"", 0.1, math.inf,
        {0: "an int", "0": "a string", True: "a bool"},
        {"a": {"b": [1, [2, {"c": None}]]}},
        {"__tensor__": "0", "__pairs__": []},
        [1e-300, 5e-324, 1 / 3],
    ],
)  # fmt: skip
def test_plain_values_come_back_as_they_were(tmp_path: Path, state: Any) -> None:
    found = round_trip(tmp_path, state)
    assert found == state
    assert repr(found) == repr(state)


def test_tuples_come_back_as_lists(tmp_path: Path) -> None:
    assert round_trip(tmp_path, {"betas": (0.9, 0.999)}) == {"betas": [0.9, 0.999]}


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.uint8, torch.int64]
)
def test_tensors_come_back_to_the_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    values = (100 * torch.rand(4, 3)).to(dtype)
    state = {"whole": values, 3: [values[1, 2], values.T, values[:0]]}
    found = round_trip(tmp_path, state)
    assert found["whole"].dtype == dtype
    assert torch.equal(found["whole"], values)
    for one, other in zip(found[3], state[3], strict=True):
        assert torch.equal(one, other) and one.shape == other.shape


def test_an_optimizer_resumes_to_the_same_numbers(tmp_path: Path) -> None:
    def steps(parameter: torch.Tensor, optimizer: torch.optim.Optimizer, count: int) -> None:
        for _ in range(count):
            optimizer.zero_grad()
            (parameter - 1).square().sum().backward()
            optimizer.step()

    whole = torch.zeros(3, requires_grad=True)
    optimizer = torch.optim.AdamW([whole], lr=0.1)
    steps(whole, optimizer, 3)
    cut = whole.detach().clone().requires_grad_()
    resumed = torch.optim.AdamW([cut], lr=0.5)
    resumed.load_state_dict(round_trip(tmp_path, optimizer.state_dict()))
    steps(whole, optimizer, 3)
    steps(cut, resumed, 3)
    assert torch.equal(whole, cut)


def test_a_tensor_that_is_changed_later_was_saved_as_it_was(tmp_path: Path) -> None:
    shared = torch.zeros(3)
    save_state(tmp_path / "state.safetensors", [shared, shared])
    shared.fill_(1)
    assert [value.tolist() for value in load_state(tmp_path / "state.safetensors")] == [[0] * 3] * 2


def test_unsupported_types_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="cannot hold a set"):
        save_state(tmp_path / "state.safetensors", {"a": {1, 2}})
    assert list(tmp_path.iterdir()) == []


def test_the_file_is_a_plain_safetensors_file(tmp_path: Path) -> None:
    save_state(tmp_path / "state.safetensors", {"a": torch.ones(2)})
    with safe_open(tmp_path / "state.safetensors", framework="pt") as file:
        assert list(file.keys()) == ["0"]
        assert file.metadata()["state"] == '{"__pairs__": [["a", {"__tensor__": "0"}]]}'


def test_no_pickle_is_read_or_written_anywhere() -> None:
    """Loading a pickle runs what is in it. Published pairs and RAFT's weights are imported."""
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names = [alias.name for alias in node.names] + [getattr(node, "module", "") or ""]
                assert not {"pickle", "dill", "joblib", "shelve"} & set(names), path
            call = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            if call in ("torch.load", "torch.save", "np.load", "np.save"):
                assert path.name in ("videodpo.py", "_flow_methods.py"), path
                assert call != "torch.load" or "weights_only=True" in ast.unparse(node), path


# --- manifests ---------------------------------------------------------------------------------

FINGERPRINT = RunFingerprint(
    base="a", adapter="b", weights="float32", precision="no", recipe="c", pairs="d", count=1,
    labels="",
)  # fmt: skip


@pytest.mark.parametrize("name", ["é" * 300, "a\0b", "missing", "adapter", "../outside"])
def test_a_manifest_that_names_no_file_of_the_checkpoint_is_damage(
    tmp_path: Path, name: str
) -> None:
    folder = tmp_path / "step_000001"
    (folder / "adapter").mkdir(parents=True)
    for file in (folder / "adapter" / "weights", tmp_path / "outside"):
        file.write_text("bytes")
    write_manifest(folder, 1, FINGERPRINT)
    check_manifest(folder)
    found = json.loads((folder / MANIFEST).read_text())
    (digest,) = found["files"].values()
    (folder / MANIFEST).write_text(json.dumps({**found, "files": {name: digest}}))
    with pytest.raises(RunError, match=r"is damaged.* is not what was written"):
        check_manifest(folder)


# --- which one is resumed ----------------------------------------------------------------------


def written(out: Path, *steps: int) -> None:
    """Checkpoints of one file."""
    for step in steps:
        folder = checkpoint_folder(out, step)
        (folder / "adapter").mkdir(parents=True)
        (folder / "adapter" / "weights").write_text(f"of step {step}")
        write_manifest(folder, step, FINGERPRINT)
        (folder.parent / "latest").write_text(folder.name)


def cut(out: Path, step: int) -> None:
    (checkpoint_folder(out, step) / "adapter" / "weights").write_text("of st")


@pytest.mark.parametrize("pointer", [None, "", "step_000009", "../run/step_000001", "\0"])
def test_without_a_pointer_to_a_checkpoint_the_newest_is_resumed(
    tmp_path: Path, pointer: str | None
) -> None:
    written(tmp_path, 1, 2, 3)
    (tmp_path / "checkpoints" / "latest").unlink()
    if pointer is not None:
        (tmp_path / "checkpoints" / "latest").write_text(pointer)
    assert newest_checkpoint(tmp_path).manifest.step == 3
    assert latest_checkpoint(tmp_path).name == "step_000003"


def test_the_pointer_may_name_an_earlier_one(tmp_path: Path) -> None:
    written(tmp_path, 1, 2, 3)
    (tmp_path / "checkpoints" / "latest").write_text("step_000002\n")
    assert newest_checkpoint(tmp_path).manifest.step == 2


def test_a_damaged_one_is_named_and_the_one_before_is_resumed(tmp_path: Path) -> None:
    written(tmp_path, 1, 2, 3)
    cut(tmp_path, 3)
    (checkpoint_folder(tmp_path, 2) / MANIFEST).unlink()  # of a partial copy
    said: list[str] = []
    assert newest_checkpoint(tmp_path, said.append).manifest.step == 1
    assert len(said) == 2 and all("resumed from 'step_000001'" in text for text in said)
    assert "step_000003' is damaged" in said[0] and "step_000002' is damaged" in said[1]
    cut(tmp_path, 1)
    with pytest.raises(RunError, match=r"no undamaged checkpoint.*step_000003.*delete"):
        newest_checkpoint(tmp_path)


def test_an_adapter_in_use_outlives_its_checkpoint(tmp_path: Path) -> None:
    written(tmp_path, 1)
    with kept_adapter(tmp_path, None) as adapter:
        written(tmp_path, 2)
        drop_checkpoints(tmp_path, 2, 1)
        assert list(checkpoints(tmp_path)) == [2]
        assert adapter.parent.name == "step_000001"
        assert (adapter / "weights").read_text() == "of step 1"
        check_manifest(adapter.parent, "adapter/")
    assert not adapter.exists()
    with (
        pytest.raises(RunError, match=f"^'{checkpoint_folder(tmp_path, 2)}/adapter' is bad"),
        kept_adapter(tmp_path, 2) as adapter,
    ):
        raise RunError(f"'{adapter}' is bad")


# --- how many are kept -------------------------------------------------------------------------


def some_checkpoints(out: Path, steps: Iterable[int]) -> list[int]:
    for step in steps:
        (out / "checkpoints" / f"step_{step:06d}" / "adapter").mkdir(parents=True)
    return list(checkpoints(out))


@given(
    steps=some.sets(some.integers(1, 10**9), min_size=1),
    limit=some.integers(1, 5),
    data=some.data(),
)
def test_the_newest_up_to_a_step_are_kept_and_all_after_it(
    steps: set[int], limit: int, data: some.DataObject
) -> None:
    with TemporaryDirectory() as folder:
        out = Path(folder)
        assert some_checkpoints(out, steps) == sorted(steps)
        step = data.draw(some.sampled_from(sorted(steps)))
        drop_checkpoints(out, step, limit)
        left = list(checkpoints(out))
        assert left == sorted(left) and step in left
        assert [other for other in left if other > step] == sorted(x for x in steps if x > step)
        assert [x for x in left if x <= step] == sorted(x for x in steps if x <= step)[-limit:]
        assert len(list((out / "checkpoints").iterdir())) == len(left)


def test_a_half_deleted_checkpoint_is_not_found_and_is_removed(tmp_path: Path) -> None:
    def stop(path: Path) -> None:
        (path / "adapter").rmdir()
        raise KeyboardInterrupt

    some_checkpoints(tmp_path, [1, 2])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dpo_video.training.checkpoint.shutil.rmtree", stop)
        with pytest.raises(KeyboardInterrupt):
            drop_checkpoints(tmp_path, 2, 1)
    assert list(checkpoints(tmp_path)) == [2]
    drop_checkpoints(tmp_path, 2, 1)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_000002"]
