"""Pairs that another version of their builder, or of dpo-video, has built."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from pathlib import Path

from dpo_video.data.store import Manifest, PairStore
from dpo_video.errors import StoreError
from dpo_video.settings import BuildSettings
from dpo_video.support.claims import claim
from dpo_video.support.formatting import counted


def choose(
    folder: Path,
    manifest: Manifest,
    settings: BuildSettings,
    total: int,
    *,
    exact: bool,
    several: bool,
    trained_on: str = "",
    note: Callable[[str], None],
) -> Path | PairStore:
    """The folder to build pairs in, or finished pairs of another version that are to be used.

    Args:
        folder: The pairs' folder. If not `exact`, pairs of other versions may be in it, and those
            of further versions in folders of the same name with a number.
        manifest: What the pairs are to be built by.
        settings: Whether to build again, or to accept pairs of another version.
        total: Number of pairs.
        exact: Whether the user named the folder.
        several: Whether several processes build.
        trained_on: The key of the pairs that a run to be resumed was trained on; "" for none.
        note: Receives a sentence on pairs of another version that are used or moved.

    Raises:
        StoreError: if there are pairs of another version, and the settings say nothing about them.
    """
    stores: list[PairStore] = []
    for number in count(1):
        free = folder if number == 1 else folder.with_name(f"{folder.name}-{number}")
        store = PairStore(free) if (free / "store.json").exists() else None
        if store is None or not store.made:
            break
        stores.append(store)
        if exact:
            break
    if not stores or stores[0].manifest.recipe_key != manifest.recipe_key:
        return folder  # new, or of other options, which `PairStore.create` refuses
    for store in stores:
        if store.manifest.key == (trained_on or manifest.key):
            if store.manifest.key == manifest.key:
                return store.folder
            if len(store) >= total:
                note(f"Using the pairs of this run. {_made_by(store, manifest)}")
                return store
    if trained_on:
        return free
    last = stores[-1]
    if settings.rebuild:
        if exact:
            _move(last.folder, several=several, note=note)
        return free
    if not settings.accept_pairs:
        raise StoreError(
            f"{_made_by(last, manifest)} Build them again with --rebuild, or use them as they are "
            "with --accept-pairs."
        )
    if len(last) < total:
        raise StoreError(
            f"{_made_by(last, manifest)} They are {len(last)} of {total}, and the others would be "
            f"built by another version. Use these alone with --accept-pairs --count {len(last)}, "
            "or build all again with --rebuild."
        )
    note(f"Using {counted(len(last), 'pair')} built earlier. {_made_by(last, manifest)}")
    return last


def _made_by(store: PairStore, manifest: Manifest) -> str:
    """A sentence that names both versions."""
    made, now = store.manifest.versions, manifest.versions
    names = sorted(name for name in {*made, *now} if made.get(name) != now.get(name))
    then = " and ".join(f"{name} {made.get(name, 'of an unknown version')}" for name in names)
    present = " and ".join(f"{name} {now.get(name, 'of an unknown version')}" for name in names)
    verb = "is" if len(names) == 1 else "are"
    return f"The pairs in '{store.folder}' were built by {then}, and {present} {verb} installed."


def _move(folder: Path, *, several: bool, note: Callable[[str], None]) -> None:
    """Rename a folder of pairs that is to be built anew."""
    if several:
        raise StoreError(
            f"Several processes cannot rebuild '{folder}' together. Name another folder with "
            "--out, or move that one."
        )
    with claim(folder, instead="name another folder with --out"):
        pass  # nobody writes there
    for number in count(2):
        aside = folder.with_name(f"{folder.name}-{number}")
        if not aside.exists():
            folder.rename(aside)
            note(f"The earlier pairs are now in '{aside}'.")
            return
