"""A pair exists once its line does, and is never lost."""

from __future__ import annotations

import errno
import hashlib
import os
import signal
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_files import largest_file
from small_pairs import MANIFEST, context_of, random_pair
from test_build import small_build

from dpo_video.data.store import PairStore
from dpo_video.errors import StoreError, UserError
from dpo_video.support import atomic as files
from dpo_video.support.atomic import write_tensors, write_text, writing


def add(store: PairStore, *seeds: int, prompt: str = "a red square") -> None:
    for seed in seeds:
        store.append(random_pair(seed, prompt), context_of(prompt))


def contents(folder: Path) -> dict[str, str]:
    """Every file's hash, by its path in the folder."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture
def store(tmp_path: Path) -> PairStore:
    return PairStore.create(tmp_path / "pairs", MANIFEST)


# --- round trip ------------------------------------------------------------------------------


def test_what_is_appended_is_read_back_to_the_bit(store: PairStore) -> None:
    add(store, 0, 1)
    add(store, 2, prompt="a blue star")
    opened = PairStore(store.folder)
    assert len(opened) == 3 and opened.records == store.records and opened.manifest == MANIFEST
    batch = opened.batch([2, 0])
    for i, (seed, prompt) in enumerate(((2, "a blue star"), (0, "a red square"))):
        pair = random_pair(seed, prompt)
        for part in ("first", "second", "preference", "region"):
            assert torch.equal(getattr(batch, part)[i], getattr(pair, part)), part
        assert torch.equal(batch.context["prompt_embeds"][i : i + 1],
                           context_of(prompt)["prompt_embeds"])  # fmt: skip
    assert batch.keys == ["00002", "00000"]
    assert batch.strength.tolist() == [0.75, 0.75]
    share = random_pair(2).region.mean().item()
    assert opened.records[2].region_share == pytest.approx(share)


def test_equal_prompts_share_a_context(store: PairStore) -> None:
    add(store, 0, 1, 2)
    add(store, 3, prompt="a blue star")
    assert len(list((store.folder / "contexts").iterdir())) == 2
    assert len(list((store.folder / "latents").iterdir())) == 4


def test_files_are_readable_by_other_users(store: PairStore) -> None:
    add(store, 0)
    modes = {path.stat().st_mode & 0o777 for path in store.folder.rglob("*") if path.is_file()}
    mask = os.umask(0)
    os.umask(mask)
    assert modes == {0o666 & ~mask}


def test_half_precision_is_kept(store: PairStore) -> None:
    pair = random_pair(0)
    half = replace(pair, first=pair.first.half(), second=pair.second.half())
    store.append(half, context_of(pair.prompt))
    assert torch.equal(PairStore(store.folder).batch([0]).first[0], half.first)


# --- the same recipe -------------------------------------------------------------------------


def test_the_same_recipe_is_the_same_store(store: PairStore) -> None:
    add(store, 0)
    again = PairStore.create(store.folder, MANIFEST.model_copy())
    assert len(again) == 1
    assert MANIFEST.model_copy().key == MANIFEST.key and len(MANIFEST.key) == 10


@pytest.mark.parametrize(
    "change", [{"recipe": {"seed": 1}}, {"identity": "4567"}, {"latent_shape": (2, 4, 3, 4)}]
)
def test_another_recipe_has_another_key_and_is_refused(
    store: PairStore, change: dict[str, object]
) -> None:
    other = MANIFEST.model_copy(update=change)
    assert other.key != MANIFEST.key
    store.append(random_pair(0), context_of("a red square"))
    with pytest.raises(StoreError, match=r"other options( \(seed: 0 .*\))?\. Name another f"):
        PairStore.create(store.folder, other)


def test_a_store_without_pairs_may_change_its_recipe(store: PairStore) -> None:
    other = MANIFEST.model_copy(update={"recipe": {"seed": 1}})
    assert PairStore.create(store.folder, other).manifest == other
    assert PairStore(store.folder).manifest == other


def test_the_order_of_options_does_not_matter() -> None:
    one, other = ({"a": 1, "b": 2}, {"b": 2, "a": 1})
    keys = {MANIFEST.model_copy(update={"recipe": recipe}).key for recipe in (one, other)}
    assert len(keys) == 1


# --- many writers ----------------------------------------------------------------------------


def test_a_pair_of_another_worker_is_not_overwritten(store: PairStore) -> None:
    other = PairStore(store.folder)
    add(store, 0, 1)
    whole = contents(store.folder)
    other.append(random_pair(9), context_of("x"), index=1, preview=lambda path: path.touch())
    assert contents(store.folder) == whole
    other.append(random_pair(2), context_of(random_pair(2).prompt))  # the next that is missing
    assert [row.source for row in PairStore(store.folder).records] == ["clip 0", "clip 1", "clip 2"]


def test_concurrent_workers_lose_no_pair(store: PairStore) -> None:
    """Each process adds its own pairs, and one of them is killed."""
    program = textwrap.dedent(f"""
        import sys
        from pathlib import Path
        sys.path[:] = {sys.path!r}
        from small_pairs import context_of, random_pair
        from dpo_video.data.store import PairStore
        store = PairStore(Path(sys.argv[1]))
        for index in range(0, 10_000, 3):
            pair = random_pair(index)
            store.append(pair, context_of(pair.prompt), index)
            print(index, flush=True)
    """)

    def work(first: int) -> None:
        mine, index = PairStore(store.folder), first
        while process.poll() is None:
            mine.append(random_pair(index), context_of(random_pair(index).prompt), index)
            index += 3

    process = subprocess.Popen(
        [sys.executable, "-c", program, str(store.folder)], stdout=subprocess.PIPE, text=True
    )
    with process, ThreadPoolExecutor(2) as pool:
        assert process.stdout is not None
        process.stdout.readline()  # it has begun
        done = [pool.submit(work, first) for first in (1, 2)]
        while int(process.stdout.readline()) < 15:
            pass
        process.kill()
        process.communicate()
        for each in done:
            each.result()
    store.refresh()
    for index in range(count := max(30, store.made)):
        if index not in store:
            store.append(random_pair(index), context_of(random_pair(index).prompt), index)
    opened = PairStore(store.folder)
    assert opened.made >= len(opened) >= count
    assert [row.source for row in opened.records] == [f"clip {i}" for i in range(len(opened))]
    assert torch.equal(opened.batch(range(30)).first[20], random_pair(20).first)
    lines = (store.folder / "pairs.jsonl").read_bytes().splitlines()
    assert len(lines) == len(set(lines)) == opened.made


# --- damage ----------------------------------------------------------------------------------


def test_a_torn_last_line_is_ignored(store: PairStore) -> None:
    add(store, 0, 1, 2)
    whole = contents(store.folder)
    lines = store.folder / "pairs.jsonl"
    for kept in (1, 20):
        text = lines.read_bytes()
        last = text.splitlines(keepends=True)[-1]
        lines.write_bytes(text[: -len(last) + kept])
        opened = PairStore(store.folder)
        assert len(opened) == 2
        assert not lines.read_bytes().endswith(b"\n")  # it may be another worker's, who goes on
        add(opened, 2)
        assert contents(store.folder) == whole


def test_a_line_torn_in_the_middle_loses_its_own_pair_only(store: PairStore) -> None:
    add(store, 0, 1, 2)
    path = store.folder / "pairs.jsonl"
    whole, lines = contents(store.folder), path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + lines[1][:30] + b"\n" + lines[2])
    with pytest.raises(StoreError, match=r"Line 2 of .*Delete that line and build again"):
        PairStore(store.folder)
    path.write_bytes(lines[0] + lines[2])
    opened = PairStore(store.folder)
    assert (len(opened), opened.made) == (1, 2)
    add(opened, 1)
    assert PairStore(store.folder).records == store.records
    del whole["pairs.jsonl"]
    assert whole.items() <= contents(store.folder).items()


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (b"{}\n", r"Line 2 of '.*' cannot be read \(index: it is missing\)\. Delete that line"),
        (b"\xff\xfe\n", r"Line 2 of '.*' cannot be read \(Invalid JSON"),
        (b"\n", r"Line 2 of '.*' cannot be read"),
    ],
)
def test_a_damaged_line_is_named(store: PairStore, damage: bytes, sentence: str) -> None:
    add(store, 0)
    lines = store.folder / "pairs.jsonl"
    lines.write_bytes(lines.read_bytes() + damage)
    with pytest.raises(StoreError, match=sentence) as caught:
        PairStore(store.folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (b"", "cannot be read"),
        (b"\xff", "cannot be read"),
        (b'{"format": "something else"}', "cannot be read .format: "),
        (MANIFEST.model_dump_json().replace('"version":2', '"version":3').encode(),
         r"cannot be read \(version: .*or update dpo-video if a newer version wrote them"),
    ],
)  # fmt: skip
def test_a_damaged_manifest_is_reported(store: PairStore, text: bytes, sentence: str) -> None:
    (store.folder / "store.json").write_bytes(text)
    with pytest.raises(StoreError, match=sentence) as caught:
        PairStore(store.folder)
    assert "\n" not in str(caught.value)


def test_a_folder_without_a_manifest_is_refused(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(StoreError, match=r"is not a pair store.*`dpo-video list pairs`"):
            PairStore(folder)


@pytest.mark.parametrize("name", ["pairs.jsonl", "shards.json"])
def test_a_folder_in_place_of_a_file_is_reported(store: PairStore, name: str) -> None:
    (store.folder / name).mkdir()
    with pytest.raises(StoreError, match=rf"{name}' cannot be read .*Check that it is a file"):
        PairStore(store.folder)


def test_a_damaged_or_missing_tensor_file_is_named(store: PairStore) -> None:
    add(store, 0, 1)
    path = store.folder / "latents" / "00001.safetensors"
    data = path.read_bytes()
    for damage in (b"", data[:50], data[:-1], b"\x00" * len(data)):
        path.write_bytes(damage)
        with pytest.raises(StoreError, match=r"00001\.safetensors' cannot be read .*the build of"):
            store.batch([0, 1])
    path.unlink()
    with pytest.raises(StoreError, match=r"00001\.safetensors' cannot be read"):
        store.batch([1])
    assert len(store.batch([0]).keys) == 1


def test_a_file_with_other_tensors_is_refused(store: PairStore) -> None:
    add(store, 0)
    path = store.folder / "latents" / "00000.safetensors"
    pair = load_file(path)
    for other in ({"latents": torch.zeros(3)}, {**pair, "first": torch.zeros(2, 4, 3, 5)}):
        save_file(other, path)
        with pytest.raises(StoreError, match="does not hold a pair of this store"):
            store.batch([0])


def test_changed_values_are_not_what_was_written(store: PairStore) -> None:
    add(store, 0)
    path = store.folder / "latents" / "00000.safetensors"
    pair = load_file(path)
    save_file({**pair, "first": pair["first"].nextafter(torch.tensor(9.0))}, path)
    with pytest.raises(StoreError, match=r"00000\.safetensors' does not hold what was written"):
        store.batch([0])
    save_file(pair, path)
    assert len(store.batch([0]).keys) == 1
    (path,) = (store.folder / "contexts").iterdir()
    save_file({name: value + 1 for name, value in load_file(path).items()}, path)
    with pytest.raises(StoreError, match=r"contexts/.* does not hold what was written"):
        store.batch([0])


@pytest.mark.parametrize("lost", ["latents/00001.safetensors", "contexts/*.safetensors"])
def test_pairs_without_files_are_forgotten(store: PairStore, lost: str) -> None:
    add(store, 0, 1, 2)
    assert store.is_complete() and store.forget_missing() == 0
    for path in store.folder.glob(lost):
        path.unlink()
    assert not store.is_complete()
    kept = {0, 2} if "latents" in lost else set()
    assert store.forget_missing() == 3 - len(kept) and store.is_complete()
    assert {index for index in range(3) if index in store} == kept
    assert {index for index in range(3) if index in PairStore(store.folder)} == kept
    add(store, *sorted({0, 1, 2} - kept))
    assert len(store) == 3


# --- a disk that says no ---------------------------------------------------------------------


def test_a_full_disk_loses_nothing(store: PairStore, monkeypatch: pytest.MonkeyPatch) -> None:
    add(store, 0, 1)
    whole = contents(store.folder)

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"Cannot write to '.*': the disk is full\. Everything"):
        add(store, 2)
    monkeypatch.undo()
    assert contents(store.folder) == whole
    again = PairStore(store.folder)
    add(again, 2)
    assert len(PairStore(store.folder)) == 3


def test_a_line_that_does_not_fit_on_the_disk_adds_no_pair(store: PairStore) -> None:
    add(store, 0, 1)
    lines = store.folder / "pairs.jsonl"
    size = lines.stat().st_size
    # The tensors are smaller than this limit, the third line crosses it.
    limit = max(size + 40, (store.folder / "latents" / "00000.safetensors").stat().st_size + 100)
    while lines.stat().st_size + 200 < limit:
        add(store, len(store))
    count = len(store)
    with largest_file(limit), pytest.raises(UserError, match="exceed the size limit"):
        for seed in range(count, count + 10):
            add(store, seed)
    survived = PairStore(store.folder)
    assert len(survived) >= count
    survived.batch(range(len(survived)))
    add(survived, 99)
    assert torch.equal(survived.batch([len(survived) - 1]).first[0], random_pair(99).first)


def test_a_write_error_inside_safetensors_is_recognised(tmp_path: Path) -> None:
    """Peft saves adapters by safetensors, whose errors carry the reason in their text alone."""
    with (
        largest_file(4096),
        pytest.raises(UserError, match="exceed the size limit"),
        writing(tmp_path),
    ):
        save_file({"weights": torch.zeros(100_000)}, tmp_path / "adapter.safetensors")


@pytest.mark.parametrize(
    "text",
    [
        "Error while serializing: I/O error: No space left on device (os error 28)",
        'Error while serializing: IoError(Os { code: 28, kind: StorageFull, message: "No space" })',
    ],
)
def test_both_wordings_of_safetensors_errors_are_recognised(text: str) -> None:
    from safetensors import SafetensorError

    assert files._reason(SafetensorError(text)) == "the disk is full"
    assert files._reason(SafetensorError("header too large")) is None


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "file.safetensors"
    write_tensors(path, {"a": torch.zeros(3)})
    with largest_file(1000), pytest.raises(OSError, match="File too large"):
        write_tensors(path, {"a": torch.ones(10_000)})
    assert load_file(path)["a"].tolist() == [0, 0, 0]
    assert [each.name for each in tmp_path.iterdir()] == ["file.safetensors"]


def test_a_folder_that_cannot_be_created_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"Cannot write to '.*': a parent of that path is a file"):
        PairStore.create(tmp_path / "file" / "pairs", MANIFEST)
    (tmp_path / "pairs").mkdir()
    (tmp_path / "pairs" / "latents").write_text("")
    with pytest.raises(UserError, match=r"Cannot write to '.*': a file of that name exists"):
        PairStore.create(tmp_path / "pairs", MANIFEST)


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is forbidden to root")
def test_a_folder_without_permission_is_reported(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="permission is denied"):
        PairStore.create(tmp_path / "pairs", MANIFEST)


def test_other_errors_are_raised_unchanged(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), writing(tmp_path):
        (tmp_path / "nothing").read_text()


def test_text_is_written_atomically(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "deep" / "file.txt"
    write_text(path, "before")

    def stopped(descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", stopped)
    with pytest.raises(KeyboardInterrupt):
        write_text(path, "after")
    assert path.read_text() == "before"
    assert len(list(path.parent.iterdir())) == 1


# --- kill -9 ---------------------------------------------------------------------------------


def test_a_killed_build_resumes_to_the_same_bytes(small_folder: Path, tmp_path: Path) -> None:
    """The signal may arrive at any moment after the second pair."""
    program = textwrap.dedent(f"""
        import sys
        from pathlib import Path
        sys.path[:] = {sys.path!r}
        from test_build import small_build
        for report in small_build(Path({str(small_folder)!r}), Path(sys.argv[1])):
            print(report.done, flush=True)
    """)

    process = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path / "cut")], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    with process, process.stdout:
        for line in process.stdout:
            if int(line) == 2:
                process.send_signal(signal.SIGKILL)
                break
    assert process.returncode == -signal.SIGKILL
    list(small_build(small_folder, tmp_path / "cut"))
    list(small_build(small_folder, tmp_path / "whole"))
    assert contents(tmp_path / "whole") == contents(tmp_path / "cut")
    assert len(PairStore(tmp_path / "cut")) == 6
