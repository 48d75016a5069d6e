"""Video-DPO's format: files are read back as written, and run no code."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small_pairs import MANIFEST, random_pair
from torch import Tensor

from dpo_video.data.store import PairStore
from dpo_video.data.videodpo import (
    VideoDPOPair,
    export_videodpo,
    read_videodpo_pair,
    write_videodpo_pair,
)
from dpo_video.errors import StoreError, UserError

LATENTS, EMBEDS = torch.rand(2, 4, 3, 3), torch.rand(1, 5, 3)


def written(path: Path, **tensors: Any) -> Path:
    """A file as the authors write it."""
    torch.save(
        {"latents_w": LATENTS, "latents_l": -LATENTS, "prompt_embeds": EMBEDS, **tensors}, path
    )
    return path


class Trap:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_what_is_written_is_read_to_the_bit(tmp_path: Path) -> None:
    pair = VideoDPOPair(chosen=LATENTS, rejected=-LATENTS, prompt_embeds=EMBEDS)
    write_videodpo_pair(tmp_path / "one.pt", pair)
    for path in (tmp_path / "one.pt", written(tmp_path / "theirs.pt")):
        read = read_videodpo_pair(path)
        assert torch.equal(read.chosen, LATENTS) and torch.equal(read.rejected, -LATENTS)
        assert torch.equal(read.prompt_embeds, EMBEDS)


def test_a_leading_axis_of_one_is_optional(tmp_path: Path) -> None:
    path = written(
        tmp_path / "one.pt",
        latents_w=LATENTS[None],
        latents_l=-LATENTS[None],
        prompt_embeds=EMBEDS[0],
    )
    read = read_videodpo_pair(path)
    assert torch.equal(read.chosen, LATENTS) and torch.equal(read.prompt_embeds, EMBEDS)


def test_no_code_in_a_file_is_run(tmp_path: Path) -> None:
    trap = tmp_path / "sprung"
    for name, save in (
        ("zip.pt", lambda path: torch.save({"latents_w": Trap(trap)}, path)),
        ("bare.pt", lambda path: path.write_bytes(pickle.dumps(Trap(trap)))),
    ):
        save(tmp_path / name)
        with pytest.raises(UserError, match=r"cannot be read .*Remove or replace it"):
            read_videodpo_pair(tmp_path / name)
    assert not trap.exists()
    pickle.loads(pickle.dumps(Trap(trap)))
    assert trap.exists()  # the trap itself works


@pytest.mark.parametrize(
    ("tensors", "complaint"),
    [
        ({"latents_w": None}, "does not hold the tensors latents_w"),
        ({"prompt_embeds": torch.zeros(1, 5, 3, dtype=torch.long)}, "of type torch.int64"),
        ({"latents_l": LATENTS[:, :1]}, "holds shapes"),
        ({"latents_w": LATENTS[0], "latents_l": LATENTS[0]}, "holds shapes"),
        ({"prompt_embeds": EMBEDS.repeat(2, 1, 1)}, "holds shapes"),
    ],
)
def test_other_contents_are_refused(
    tmp_path: Path, tensors: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(UserError, match=complaint):
        read_videodpo_pair(written(tmp_path / "one.pt", **tensors))


@pytest.mark.filterwarnings("ignore:.*(beta|prototype|deprecated)")
@pytest.mark.parametrize(
    ("odd", "complaint"),
    [
        (lambda x: x.to(torch.float8_e4m3fn), "of type torch.float8_e4m3fn"),
        (lambda x: x.to(torch.complex64), "of type torch.complex64"),
        (lambda x: x.to("meta"), "on the device meta"),
        (lambda x: x.to_sparse(), "a nested or sparse tensor"),
        (lambda x: x[0, 0].to_sparse_csr(), "a nested or sparse tensor"),
        (lambda x: torch.nested.nested_tensor([x, x]), "a nested or sparse tensor"),
        (lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8), "of type torch.qint8"),
        (lambda x: x[:1, :1, :1, :1].expand(4, 4, 512, 512), "larger than the file"),
    ],
)
def test_tensors_without_plain_numbers_are_refused(
    tmp_path: Path, odd: Callable[[Tensor], Tensor], complaint: str
) -> None:
    path = written(tmp_path / "one.pt", latents_w=odd(LATENTS))
    with pytest.raises(UserError, match=rf"one\.pt holds latents_w as .*{complaint}"):
        read_videodpo_pair(path)


def test_a_parameter_is_read_as_plain_numbers(tmp_path: Path) -> None:
    path = written(tmp_path / "one.pt", latents_w=torch.nn.Parameter(LATENTS))
    assert not read_videodpo_pair(path).chosen.requires_grad


def test_a_pipe_is_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "one.pt")
    with pytest.raises(UserError, match=r"cannot be read \(.*it is a named pipe"):
        read_videodpo_pair(tmp_path / "one.pt")


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path / "one.pt")
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(UserError, match="cannot be read"):
        read_videodpo_pair(path)
    torch.save([1, 2], path)
    with pytest.raises(UserError, match="does not hold the tensors"):
        read_videodpo_pair(path)


# --- export ----------------------------------------------------------------------------------


@pytest.fixture
def store(tmp_path: Path) -> PairStore:
    """Three pairs: the first video chosen, a tie, the second chosen; the last is a group."""
    store = PairStore.create(tmp_path / "pairs", MANIFEST)
    ones, whole = torch.ones(4), torch.ones(1, 4, 3, 3)
    for seed, preference in enumerate((ones, 0 * ones, torch.tensor([1.0, -1, -1, 0]))):
        pair = replace(random_pair(seed, f"prompt {seed}"), preference=preference)
        if seed == 2:
            pair = replace(pair, between=random_pair(3).first[None], ranks=(0, 1, 2))
        store.append(
            replace(pair, region=whole) if seed else pair, {"prompt_embeds": EMBEDS + seed}
        )
    return store


def test_chosen_videos_come_first_and_ties_are_left_out(store: PairStore, tmp_path: Path) -> None:
    done = export_videodpo(store, tmp_path / "out")
    assert (done.written, done.undecided, done.simplified, done.regions) == (2, 1, 1, 1)
    assert done.groups == 1
    files = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert files == ["pair_00000.pt", "pair_00000.txt", "pair_00001.pt", "pair_00001.txt"]
    for number, (seed, chosen, rejected) in enumerate(
        ((0, "first", "second"), (2, "second", "first"))
    ):
        read = read_videodpo_pair(tmp_path / "out" / f"pair_{number:05d}.pt")
        pair = random_pair(seed)
        assert torch.equal(read.chosen, getattr(pair, chosen))
        assert torch.equal(read.rejected, getattr(pair, rejected))
        assert torch.equal(read.prompt_embeds, EMBEDS + seed)
        text = (tmp_path / "out" / f"pair_{number:05d}.txt").read_text()
        assert text == f"prompt {seed}\n"


def test_a_file_holds_one_pair_only(store: PairStore, tmp_path: Path) -> None:
    export_videodpo(store, tmp_path / "out")
    held = torch.load(tmp_path / "out" / "pair_00000.pt", weights_only=True)
    assert all(x.untyped_storage().nbytes() == x.nbytes for x in held.values())


def test_a_folder_that_holds_anything_is_refused(store: PairStore, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "clip.mp4").touch()
    with pytest.raises(UserError, match=r"is not empty\. Name a new folder"):
        export_videodpo(store, tmp_path / "out")


def test_an_interrupted_export_is_started_again(
    store: PairStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = export_videodpo(store, tmp_path / "whole")

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("dpo_video.data.videodpo.write_text", stop)
        export_videodpo(store, tmp_path / "cut")
    (tmp_path / "cut" / "pair_00099.pt").touch()
    assert export_videodpo(store, tmp_path / "cut") == whole
    names = [sorted(path.name for path in (tmp_path / each).iterdir()) for each in ("whole", "cut")]
    assert names[0] == names[1]


def test_other_prompt_encodings_are_refused(tmp_path: Path) -> None:
    store = PairStore.create(tmp_path / "pairs", MANIFEST)
    store.append(random_pair(0), {"prompt_embeds": EMBEDS, "pooled": EMBEDS + 1})
    with pytest.raises(StoreError, match=r"encoded as pooled, prompt_embeds"):
        export_videodpo(store, tmp_path / "out")
