from __future__ import annotations

import gc
import hashlib
import importlib.util
import json
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, CLIPTextModel

from dpo_video.diffusion import pretrained
from dpo_video.diffusion.pretrained import Checkpoint, Lazy, free, identity, weight_files
from dpo_video.errors import UserError
from dpo_video.tiny import WEIGHTS as TINY

WEIGHTS = "diffusion_pytorch_model.safetensors"


def at(folder: Path) -> Checkpoint:
    return Checkpoint(source=str(folder))


def cached(root: Path, files: dict[str, bytes], commit: str = "c" * 40) -> Path:
    """The hub's cache with one repository, in the layout of its client."""
    repository = root / "models--someone--model"
    for name, data in files.items():
        blob = repository / "blobs" / hashlib.sha256(data).hexdigest()
        blob.parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(data)
        link = repository / "snapshots" / commit / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(blob)
    for ref in ("main", "stable"):
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / ref).write_text(commit)
    return repository / "snapshots" / commit


# --- identity ----------------------------------------------------------------------------------


def digest_of(folder: Path, settings: dict[str, Any], *weights: float) -> str:
    (folder / "vae").mkdir(parents=True, exist_ok=True)
    save_file({"a": torch.tensor(weights), "b": torch.ones(2)}, folder / "vae" / WEIGHTS)
    (folder / "vae" / "config.json").write_text(json.dumps(settings))
    (folder / "scheduler").mkdir(exist_ok=True)
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(settings))
    return at(folder).digest("vae", "scheduler")


def test_the_digest_depends_on_weights_and_settings_only(
    tmp_path: Path,
) -> None:
    one = digest_of(tmp_path / "one", {"scale": 1, "type": "v"}, 0.0, 0.0)
    assert one == digest_of(tmp_path / "other", {"type": "v", "scale": 1}, 0.0, 0.0)
    others = {"_diffusers_version": "0.99", "_name_or_path": "elsewhere"}
    assert one == digest_of(tmp_path / "one", {"scale": 1, "type": "v", **others}, 0.0, 0.0)
    assert one != digest_of(tmp_path / "one", {"scale": 1, "type": "v"}, 0.0, 1e-7)
    assert one != digest_of(tmp_path / "one", {"scale": 1, "type": "epsilon"}, 0.0, 0.0)
    assert one == digest_of(tmp_path / "one", {"scale": 1, "type": "v"}, 0.0, 0.0)
    # The scheduler has no weights.
    (tmp_path / "one" / "scheduler" / "scheduler_config.json").write_text("{}")
    assert one != at(tmp_path / "one").digest("vae", "scheduler")


def test_an_identity_depends_on_dtype_and_order_of_parts() -> None:
    one = identity("a", "b", dtype=torch.float32)
    assert len(one) == 16
    assert one != identity("a", "b", dtype=torch.bfloat16)
    assert one != identity("b", "a", dtype=torch.float32)


def test_a_cached_files_hash_is_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = b"weights of many gigabytes"
    files = {f"vae/{WEIGHTS}": data, "vae/config.json": b"{}"}
    snapshot = cached(tmp_path / "hub", files)
    copy = tmp_path / "copy" / "vae"
    copy.mkdir(parents=True)
    (copy / WEIGHTS).write_bytes(data)
    (copy / "config.json").write_text("{}")
    expected = at(tmp_path / "copy").digest("vae")

    def unread(*arguments: Any) -> None:
        raise AssertionError("read to be hashed")

    monkeypatch.setattr(hashlib, "file_digest", unread)
    assert at(snapshot).digest("vae") == expected


def test_only_what_is_loaded_is_hashed(tmp_path: Path) -> None:
    for name in (WEIGHTS, "diffusion_pytorch_model.fp16.safetensors", "pytorch_model.bin"):
        (tmp_path / name).touch()
    assert [path.name for path in weight_files(tmp_path)] == [WEIGHTS]
    (tmp_path / WEIGHTS).unlink()
    assert [path.name for path in weight_files(tmp_path)] == ["pytorch_model.bin"]


# --- the hub -----------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path: Path, small_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache with the small model only; all tests run offline."""
    files = {
        str(path.relative_to(small_folder)): path.read_bytes()
        for path in small_folder.rglob("*")
        if path.is_file()
    }
    snapshot = cached(tmp_path, files)
    original = pretrained.snapshot_download
    monkeypatch.setattr(
        pretrained,
        "snapshot_download",
        lambda *arguments, **options: original(*arguments, cache_dir=tmp_path, **options),
    )
    return snapshot


@pytest.mark.parametrize("revision", [None, "stable", "c" * 40])
def test_a_cached_model_loads_offline_by_its_hub_id(
    hub: Path, small_folder: Path, revision: str | None
) -> None:
    checkpoint = Checkpoint(source="someone/model", revision=revision)
    assert checkpoint.folder("vae") == hub / "vae"
    vae = checkpoint.load(AutoencoderKL, "vae")
    expected = load_file(small_folder / "vae" / WEIGHTS)
    assert all(torch.equal(value, expected[name]) for name, value in vae.state_dict().items())


def test_a_model_missing_from_the_cache_is_reported_with_a_next_step(hub: Path) -> None:
    for checkpoint in (
        Checkpoint(source="someone/else"),
        Checkpoint(source="someone/model", revision="another"),
    ):
        with pytest.raises(UserError, match=r"HF_HUB_OFFLINE .*hf download someone/"):
            checkpoint.folder("vae")


def test_only_files_of_the_part_are_downloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {}

    def download(repository: str, **options: Any) -> str:
        asked.update(options, repository=repository)
        raise LocalEntryNotFoundError("stop")

    monkeypatch.setattr(pretrained, "snapshot_download", download)
    with pytest.raises(UserError):
        Checkpoint(source="someone/model", revision="v2").folder("vae")
    assert asked["repository"] == "someone/model" and asked["revision"] == "v2"
    assert all(pattern.startswith("vae/") for pattern in asked["allow_patterns"])


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (GatedRepoError, r"is gated\. Accept its terms on https://huggingface\.co/someone/model"),
        (RepositoryNotFoundError, r"The hub has no model 'someone/model'.*backbone\.model"),
        (RevisionNotFoundError, r"has no revision 'v2'\."),
    ],
)
def test_hub_errors_become_one_sentence(
    error: type[Exception], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: Any, **options: Any) -> str:
        raise error.__new__(error)

    monkeypatch.setattr(pretrained, "snapshot_download", refuse)
    with pytest.raises(UserError, match=words) as caught:
        Checkpoint(source="someone/model", revision="v2").folder("vae")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("break_it", "words"),
    [
        (lambda folder: (folder / "config.json").unlink(), r"no 'vae/config\.json'"),
        (lambda folder: (folder / "config.json").write_text("{"), r"cannot be read"),
    ],
)
def test_a_damaged_part_is_named(tmp_path: Path, break_it: Any, words: str) -> None:
    folder = tmp_path / "vae"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    break_it(folder)
    with pytest.raises(UserError, match=rf"Cannot load the vae of .*{words}.*backbone\.model"):
        at(tmp_path).config("vae")


def vae_with(folder: Path, names: Callable[[str], str | None]) -> Path:
    """A small autoencoder whose file renames or omits weights."""
    AutoencoderKL(block_out_channels=(8,), norm_num_groups=2).save_pretrained(folder / "vae")
    file = folder / "vae" / WEIGHTS
    weights = {names(name): weight for name, weight in load_file(file).items()}
    weights = {name: weight for name, weight in weights.items() if name}
    save_file(weights, file, metadata={"format": "pt"})
    return folder


def test_files_that_lack_weights_are_refused(tmp_path: Path) -> None:
    lost = "decoder.conv_out.bias"
    vae_with(tmp_path, lambda name: None if name == lost else name)
    with pytest.raises(UserError, match=rf"the vae of .* lack 1 of its weights, '{lost}' first"):
        at(tmp_path).load(AutoencoderKL, "vae")
    shutil.copytree(TINY / "text_encoder", tmp_path / "text_encoder")
    file = tmp_path / "text_encoder" / "model.safetensors"
    save_file({f"another.{name}": weight for name, weight in load_file(file).items()}, file)
    with pytest.raises(UserError, match=r"the text_encoder of .* lack 36 of its weights"):
        at(tmp_path).load(CLIPTextModel, "text_encoder")


def test_stable_diffusions_published_autoencoder_names_load(
    tmp_path: Path,
) -> None:
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def published(name: str) -> str:
        for new, before in old.items():
            name = name.replace(f"attentions.0.{new}.", f"attentions.0.{before}.")
        return name

    new, other = tmp_path / "new", tmp_path / "old"
    torch.manual_seed(0)
    vae_with(new, lambda name: name)
    torch.manual_seed(0)
    vae_with(other, published)
    assert any(".query." in name for name in load_file(other / "vae" / WEIGHTS))
    one, same = (at(each).load(AutoencoderKL, "vae") for each in (new, other))
    for weight, again in zip(one.parameters(), same.parameters(), strict=True):
        assert torch.equal(weight, again)


def test_tinys_text_encoder_loads_in_every_version_of_transformers() -> None:
    names = load_file(TINY / "text_encoder" / "model.safetensors")
    assert all(name.startswith("text_model.") for name in names)


def test_a_part_without_weights_and_a_missing_folder_are_named(tmp_path: Path) -> None:
    (tmp_path / "vae").mkdir()
    with pytest.raises(UserError, match=r"has no 'vae/config\.json'"):
        at(tmp_path).digest("vae")
    (tmp_path / "vae" / "config.json").write_text("{}")
    with pytest.raises(UserError, match="holds no weights"):
        at(tmp_path).digest("vae")
    with pytest.raises(UserError, match="Cannot load the vae"):
        at(tmp_path).load(AutoencoderKL, "vae")
    for missing in (tmp_path / "missing", "nosuch", "./nosuch", "../a/b", "~/nosuch", "a/b.git",
                    ".hidden/model", "a--b/c", "a\\b", "a/b/c", "x" * 5000):  # fmt: skip
        with pytest.raises(UserError, match="there is no such folder"):
            Checkpoint(source=str(missing)).folder("vae")
    for hostile in ("[" * 5000, "[1]", '{"a": 1, "a": 2}'):
        (tmp_path / "vae" / "config.json").write_text(hostile)
        with pytest.raises(UserError, match=r"'vae/config\.json'"):
            at(tmp_path).config("vae")


def test_a_tokenizer_names_its_missing_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "spiece.model").touch()
    (tmp_path / "tokenizer" / "tokenizer_config.json").write_text("{}")
    original = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *more: None if name == "sentencepiece" else original(name, *more),
    )
    with pytest.raises(UserError, match=r"tokenizer of .* pip install sentencepiece"):
        at(tmp_path).load(AutoTokenizer, "tokenizer")


# --- parts on demand ---------------------------------------------------------------------------


def test_a_lazy_part_is_loaded_once_and_again_after_free() -> None:
    loaded = []
    part = Lazy(lambda: loaded.append(0) or torch.nn.Linear(1, 1))
    assert not loaded
    first = weakref.ref(part.get())
    assert part.get() is first() and len(loaded) == 1
    free(part)
    gc.collect()
    assert first() is None
    part.get()
    assert len(loaded) == 2


@pytest.mark.parametrize("option", ["backbone.model", "backbone.motion_adapter"])
def test_a_single_file_is_told_apart_from_a_missing_folder(tmp_path: Path, option: str) -> None:
    file = tmp_path / "epic.ckpt"
    file.write_bytes(b"")
    with pytest.raises(UserError, match=r"is a file.*from_single_file") as caught:
        Checkpoint(source=str(file), option=option).folder("unet")
    assert f"--set {option}=FOLDER" in str(caught.value)
    with pytest.raises(UserError, match="there is no such folder"):  # never asked of the hub
        Checkpoint(source="models/none.safetensors").folder("unet")
