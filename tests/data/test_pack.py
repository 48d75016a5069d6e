"""Packed pairs are the same set."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small_pairs import MANIFEST, context_of, random_pair
from test_store import add, contents

from dpo_video.data.pack import pack
from dpo_video.data.store import PairStore
from dpo_video.errors import StoreError

ROW = 4 * (2 * 2 * 4 * 3 * 3 + 4 + 4 * 3 * 3)  # bytes of a pair of test_store


@pytest.fixture
def store(tmp_path: Path) -> PairStore:
    made = PairStore.create(tmp_path / "pairs", MANIFEST)
    add(made, 0, 1, 2)
    add(made, 3, 4, prompt="a blue star")
    pair = random_pair(5)
    half = replace(pair, first=pair.first.half(), second=pair.second.half())
    made.append(half, context_of(pair.prompt))
    return made


def check_same(one: PairStore, other: PairStore) -> None:
    assert one.digest == other.digest and one.manifest == other.manifest
    assert one.decided() == other.decided() and len(one) == len(other)
    for index in reversed(range(len(one))):
        pair, same = one.batch([index]), other.batch([index])
        assert pair.keys == same.keys and pair.context.keys() == same.context.keys()
        for part in ("first", "second", "preference", "region", "strength"):
            here, there = getattr(pair, part), getattr(same, part)
            assert here.dtype == there.dtype and torch.equal(here, there), part
        for name, value in pair.context.items():
            assert torch.equal(value, same.context[name])


@pytest.mark.parametrize("size", [1, 2 * ROW, 1 << 20])
def test_packed_pairs_are_the_same_pairs(store: PairStore, tmp_path: Path, size: int) -> None:
    reports = list(pack(store, tmp_path / "packed", size))
    assert reports[-1].done == reports[-1].total == 6 + 2
    packed = PairStore(tmp_path / "packed")
    check_same(store, packed)
    # Latents of another dtype have their own shard.
    pairs = len(list((tmp_path / "packed" / "shards").glob("pairs-*")))
    assert pairs == {1: 6, 2 * ROW: 4, 1 << 20: 2}[size]
    assert not (tmp_path / "packed" / "latents").exists()
    again = tmp_path / "again"
    list(pack(packed, again, size))
    assert contents(again) == contents(packed.folder)
    assert list(pack(store, tmp_path / "packed", size)) == []  # it is there already


def test_pairs_can_be_appended_to_a_packed_set(store: PairStore, tmp_path: Path) -> None:
    list(pack(store, tmp_path / "packed"))
    packed = PairStore(tmp_path / "packed")
    add(store, 6, 7)
    add(packed, 6, 7)
    check_same(store, PairStore(packed.folder))


def test_an_interrupted_packing_is_no_store_and_can_be_completed(
    store: PairStore, tmp_path: Path
) -> None:
    list(pack(store, tmp_path / "whole", 1))
    for steps in range(1, 8):
        cut = tmp_path / str(steps)
        list(islice(pack(store, cut, 1), steps))
        with pytest.raises(StoreError, match="is not a pair store"):
            PairStore(cut)
        first = cut / "shards" / "pairs-00000.safetensors"
        written = first.stat().st_mtime_ns
        list(pack(store, cut, 1))
        assert contents(cut) == contents(tmp_path / "whole")
        assert first.stat().st_mtime_ns == written


def test_labels_are_packed_too(store: PairStore, tmp_path: Path) -> None:
    (store.folder / "labels").mkdir()
    for name in ("ann.json", "ann.jsonl"):
        (store.folder / "labels" / name).write_text(name)
    list(pack(store, tmp_path / "packed"))
    assert (tmp_path / "packed" / "labels" / "ann.jsonl").read_text() == "ann.jsonl"


def test_a_folder_with_other_pairs_is_refused(store: PairStore, tmp_path: Path) -> None:
    other = PairStore.create(tmp_path / "other", MANIFEST)
    for folder in (other.folder, store.folder):
        with pytest.raises(StoreError, match=r"holds pairs already\. Name another folder"):
            list(pack(store, folder))
    list(pack(other, tmp_path / "half", 1))


def test_a_shard_is_a_plain_safetensors_file(store: PairStore, tmp_path: Path) -> None:
    list(pack(store, tmp_path / "packed"))
    shard = load_file(tmp_path / "packed" / "shards" / "pairs-00000.safetensors")
    assert torch.equal(shard["first"][3], random_pair(3).first)


@pytest.mark.parametrize(
    "damage",
    [
        {"file": "../store.json"},
        {"file": "shards/../../pairs-00000.safetensors"},
        {"holds": ["../latents/00000"]},
        {"holds": ["latents/00000", "latents/00001"]},
    ],
)
def test_a_damaged_index_cannot_name_another_file_or_pair(
    store: PairStore, tmp_path: Path, damage: dict[str, object]
) -> None:
    list(pack(store, tmp_path / "packed"))
    path = tmp_path / "packed" / "shards.json"
    index = json.loads(path.read_text())
    index["shards"][0].update(damage)
    path.write_text(json.dumps(index))
    with pytest.raises(StoreError, match="cannot be read") as caught:
        PairStore(path.parent).batch([0])
    assert "\n" not in str(caught.value)


def test_a_damaged_shard_is_named(store: PairStore, tmp_path: Path) -> None:
    list(pack(store, tmp_path / "packed"))
    path = tmp_path / "packed" / "shards" / "pairs-00000.safetensors"
    whole = path.read_bytes()
    for data in (b"", whole[:7], whole[:60], whole[:-1], b"\xff" * 8 + whole[8:],
                 whole.replace(b'"F32"', b'"F99"')):  # fmt: skip
        path.write_bytes(data)
        with pytest.raises(StoreError, match=r"pairs-00000\.safetensors' cannot be read"):
            PairStore(path.parents[1]).batch([4])
    path.unlink()
    with pytest.raises(StoreError, match=r"pairs-00000\.safetensors' cannot be read"):
        PairStore(path.parents[1]).batch([0])
