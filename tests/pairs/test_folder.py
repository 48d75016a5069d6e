"""Folder: files name chosen and rejected videos; files without a pair are reported and skipped."""

from __future__ import annotations

import json
import os
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SHAPE
from PIL import Image
from test_contracts import Brighter
from torch import Generator, Tensor

from dpo_video.backbone.animatediff import AnimateDiffModel
from dpo_video.data.build import build, in_order
from dpo_video.data.clips import read_beginning
from dpo_video.data.store import Manifest, PairStore
from dpo_video.data.video_writer import write_video
from dpo_video.data.videodpo import export_videodpo
from dpo_video.errors import UserError
from dpo_video.pairs.folder import Folder, latent_region
from dpo_video.settings import BuildSettings
from dpo_video.testing import check_pairs, small_videos
from dpo_video.types import Clip, Pair, PairSource


def write(path: Path, seed: int, frames: int = SHAPE.frames, fps: float = SHAPE.fps) -> Path:
    """A random video at the small model's size."""
    write_video(path, small_videos(1, frames, SHAPE.height, SHAPE.width, seed=seed)[0], fps)
    return path


def folders(root: Path, names: Sequence[str] = ("a", "b", "c")) -> Path:
    for number, name in enumerate(names):
        write(root / "chosen" / f"{name}.mp4", 2 * number)
        write(root / "rejected" / f"{name}.mp4", 2 * number + 1)
        (root / "chosen" / f"{name}.txt").write_text(f"the prompt of {name}\n")
    return root


def lines(root: Path, *entries: Any) -> Path:
    """A JSONL file beside the videos chosen/a.mp4 and rejected/a.mp4."""
    folders(root, ["a"])
    base = {"chosen": "chosen/a.mp4", "rejected": "rejected/a.mp4", "prompt": "a prompt"}
    file = root / "pairs.jsonl"
    texts = [e if isinstance(e, str) else json.dumps({**base, **e}) for e in entries]
    file.write_text("\n".join(texts) + "\n")
    return file


def opened(
    model: AnimateDiffModel, path: Path, prompt: str | None = None, **options: Any
) -> PairSource:
    return Folder(path=path, **options).source(model, prompt)


def made(
    model: AnimateDiffModel, path: Path, prompt: str | None = None, **options: Any
) -> list[Pair]:
    builder = Folder(path=path, **options)
    clips = builder.source(model, prompt).clips
    return [builder(clip, model, None, Generator()) for clip in clips]


def built(model: AnimateDiffModel, path: Path, out: Path, count: int | None = None) -> PairStore:
    source = opened(model, path)
    manifest = Manifest(
        recipe={}, identity=model.identity, latent_shape=model.latent_shape, fps=model.shape.fps
    )
    store = PairStore.create(out, manifest)
    settings = BuildSettings(count=count, previews=False)
    for _ in build(
        store,
        in_order(source.clips),
        Folder(path=path),
        model,
        settings,
        seed=0,
        available=source.count,
    ):
        pass
    return store


# --- the three formats -----------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["folders", "lines", "latents"])
def test_the_builder_passes_the_contract_in_every_format(
    small_model: AnimateDiffModel, tmp_path: Path, kind: str
) -> None:
    path = folders(tmp_path / "mine")
    if kind == "lines":
        path = lines(tmp_path, {}, {"labels": [-1.0]})
    if kind == "latents":
        export_videodpo(built(small_model, path, tmp_path / "store"), tmp_path / "out")
        path = tmp_path / "out"
    check_pairs(Folder(path=path), small_model, labeler=Brighter())


def test_videos_of_the_same_name_are_a_pair_whatever_their_suffixes(
    small_model: AnimateDiffModel, tmp_path: Path
) -> None:
    root = folders(tmp_path)
    (root / "rejected" / "b.mp4").unlink()
    write(root / "rejected" / "b.gif", 9)
    pairs = made(small_model, root)
    assert opened(small_model, root).contents == "1 gif, 5 mp4"
    assert [pair.source for pair in pairs] == ["a", "b", "c"]
    assert [pair.prompt for pair in pairs] == [f"the prompt of {name}" for name in "abc"]
    for pair, rejected in zip(pairs, ("a.mp4", "b.gif", "c.mp4"), strict=True):
        videos = [root / "chosen" / f"{pair.source}.mp4", root / "rejected" / rejected]
        both = torch.stack([read_beginning(path, small_model.shape).video for path in videos])
        first, second = small_model.encode_videos(both)  # one call: the same path for both
        assert torch.equal(pair.first, first) and torch.equal(pair.second, second)
        assert (pair.preference == 1).all() and (pair.region == 1).all() and pair.context is None


def test_folders_and_keys_named_as_by_video_dpo_are_read(
    small_model: AnimateDiffModel, tmp_path: Path
) -> None:
    root = folders(tmp_path)
    plain = made(small_model, root)
    entry = {"win": "win/a.mp4", "lose": "lose/a.mp4", "prompt": "the prompt of a"}
    (root / "pairs.jsonl").write_text(json.dumps(entry))
    (root / "chosen").rename(root / "win")
    (root / "rejected").rename(root / "lose")
    (line,) = made(small_model, root / "pairs.jsonl")
    for pair, same in [*zip(made(small_model, root), plain, strict=True), (line, plain[0])]:
        assert torch.equal(pair.first, same.first) and torch.equal(pair.second, same.second)
        assert pair.prompt == same.prompt


def test_a_prompt_is_found_in_both_folders_and_their_parent(
    small_model: AnimateDiffModel, tmp_path: Path
) -> None:
    root = folders(tmp_path)
    for name in "abc":
        (root / "chosen" / f"{name}.txt").unlink()
    (root / "rejected" / "a.txt").write_text("beside the rejected one")
    (root / "b.txt").write_text("above")
    assert [p.prompt for p in made(small_model, root, "for the rest")] == [
        "beside the rejected one", "above", "for the rest"
    ]  # fmt: skip
    source = opened(small_model, root)
    assert source.count == 2
    assert "--prompt" in source.skipped[0].reason


def test_folders_of_frames_are_videos(small_model: AnimateDiffModel, tmp_path: Path) -> None:
    for side, shade in (("chosen", 200), ("rejected", 50)):
        for frame in range(SHAPE.frames):
            path = tmp_path / side / "a" / f"{frame}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (SHAPE.width, SHAPE.height), (shade + frame,) * 3).save(path)
    (pair,) = made(small_model, tmp_path, "grey")
    assert pair.source == "a" and not torch.equal(pair.first, pair.second)


def test_paths_in_lines_are_relative_to_the_file(
    small_model: AnimateDiffModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    absolute = str(tmp_path / "mine" / "rejected" / "a.mp4")
    turned = {"chosen": absolute, "rejected": "chosen/a.mp4", "prompt": "turned round"}
    file = lines(tmp_path / "mine", {}, "", turned)
    monkeypatch.chdir(tmp_path)
    one, two = made(small_model, file)
    assert [pair.source for pair in (one, two)] == ["pairs.jsonl:1", "pairs.jsonl:3"]
    assert [pair.prompt for pair in (one, two)] == ["a prompt", "turned round"]
    assert torch.equal(one.first, two.second) and torch.equal(one.second, two.first)


def test_labels_are_broadcast_over_the_frames_of_their_segments(
    small_model: AnimateDiffModel, tmp_path: Path
) -> None:
    """Four frames at 8 a second, in segments of a quarter of a second."""
    file = lines(tmp_path, {"labels": [1, -0.5]}, {"labels": [0, 0]}, {})
    pairs = made(small_model, file, seconds=0.25)
    assert [pair.preference.tolist() for pair in pairs] == [
        [1, 1, -0.5, -0.5], [0, 0, 0, 0], [1, 1, 1, 1]
    ]  # fmt: skip


@pytest.mark.parametrize("moving", [False, True])
def test_outside_the_mask_the_rejected_video_equals_the_chosen_one(
    small_model: AnimateDiffModel, tmp_path: Path, moving: bool
) -> None:
    """White in the upper left quarter of every frame, or of the last two frames only."""
    white = torch.zeros(3, SHAPE.frames, SHAPE.height, SHAPE.width)
    white[:, 2 if moving else 0 :, : SHAPE.height // 2, : SHAPE.width // 2] = 1
    name = "mask.mp4" if moving else "mask.png"
    if moving:
        write_video(tmp_path / name, white, SHAPE.fps)
    else:
        pixels = (white[:, 0] * 255).byte().permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(tmp_path / name)
    (masked, whole) = made(small_model, lines(tmp_path, {"mask": name}, {}))
    expected = torch.zeros(1, 4, 4, 4)
    expected[:, 2 if moving else 0 :, :2, :2] = 1
    assert torch.equal(masked.region, expected)
    assert torch.equal(masked.first, whole.first)
    assert torch.equal(masked.second, torch.where(expected > 0, whole.second, whole.first))


def test_a_cell_that_the_mask_touches_is_in_the_region(small_model: AnimateDiffModel) -> None:
    mask = torch.zeros(SHAPE.frames, SHAPE.height, SHAPE.width)
    mask[1, 7, 12] = 1  # cells are 4x4 pixels
    region = latent_region(mask, small_model)
    assert region.sum() == 1 and region[0, 1, 1, 3] == 1
    assert (latent_region(torch.ones_like(mask), small_model) == 1).all()


def test_exported_pairs_are_read_back_to_the_bit(
    small_model: AnimateDiffModel, tmp_path: Path
) -> None:
    """Latents, prompts and their encodings are kept; the text encoder is not called again."""
    store = built(small_model, folders(tmp_path / "mine"), tmp_path / "store")
    export_videodpo(store, tmp_path / "out")
    for file in (tmp_path / "out").glob("*.pt"):  # an encoding that the model would not give
        held = torch.load(file, weights_only=True)
        torch.save({**held, "prompt_embeds": held["prompt_embeds"] + int(file.stem[-1])}, file)
    again = built(small_model, tmp_path / "out", tmp_path / "again")
    assert [row.prompt for row in again.records] == [row.prompt for row in store.records]
    one, two = store.batch(range(3)), again.batch(range(3))
    assert torch.equal(one.first, two.first) and torch.equal(one.second, two.second)
    shifts = two.context["prompt_embeds"] - one.context["prompt_embeds"]
    torch.testing.assert_close(shifts.mean(dim=(1, 2)), torch.arange(3.0))


def test_files_without_prompt_text_keep_their_own_encodings(
    small_model: AnimateDiffModel, tmp_path: Path
) -> None:
    export_videodpo(
        built(small_model, folders(tmp_path / "mine"), tmp_path / "store"), tmp_path / "out"
    )
    for file in (tmp_path / "out").glob("*.txt"):
        file.unlink()
    pairs = made(small_model, tmp_path / "out", "one prompt for all")
    assert {pair.prompt for pair in pairs} == {"one prompt for all"}
    contexts = [pair.context["prompt_embeds"] for pair in pairs if pair.context]
    assert len(contexts) == 3 and not torch.equal(contexts[0], contexts[1])
    assert "pair_00000.pt" in made(small_model, tmp_path / "out")[0].prompt


# --- lists of other tools ---------------------------------------------------------------------


def test_lists_of_other_tools_are_read_alike(small_model: AnimateDiffModel, tmp_path: Path) -> None:
    """Windows' paths and line ends, U+2028 in a prompt, macOS' names, further columns."""
    root = folders(tmp_path, ["caf\u00e9"])
    stored = unicodedata.normalize("NFD", "caf\u00e9")
    for path in [*root.glob("*/*")]:
        path.rename(path.with_name(stored + path.suffix))
    entry = {"id": 7, "win": "chosen\\caf\u00e9.mp4", "lose": "rejected/caf\u00e9.mp4",
             "prompt": "a\u2028dog", "score_win": float("nan")}  # fmt: skip
    text = "\ufeff" + json.dumps(entry, ensure_ascii=False) + "\r\n"
    (root / "pairs.jsonl").write_bytes(text.encode())
    source = opened(small_model, root / "pairs.jsonl")
    assert [clip.caption for clip in source.clips] == ["a dog"] and not source.skipped
    (remark,) = source.remarks
    assert (remark.name, remark.detail) == ("pairs.jsonl", "id, score_win")


def test_names_of_two_systems_are_a_pair(small_model: AnimateDiffModel, tmp_path: Path) -> None:
    root = folders(tmp_path, ["caf\u00e9"])
    for path in [*root.glob("rejected/*")]:
        path.rename(path.with_name(unicodedata.normalize("NFD", path.name)))
    assert [pair.source for pair in made(small_model, root)] == ["caf\u00e9"]


def test_videos_that_are_too_short_are_skipped_or_slowed_down_and_named(
    small_model: AnimateDiffModel, tmp_path: Path
) -> None:
    root = folders(tmp_path, ["a", "b"])
    write(root / "rejected" / "b.mp4", 3, fps=3 * SHAPE.fps)
    source = opened(small_model, root)
    assert [clip.name for clip in source.clips] == ["a"]
    (skipped,) = source.skipped
    assert skipped.name == "b" and "3 times slower: --set pairs.slow_down=true" in skipped.reason
    source = opened(small_model, root, slow_down=True)
    list(source.clips)
    slowed, unequal = source.remarks
    assert (slowed.name, slowed.detail) == (
        "rejected/b.mp4", "0.17 s is stretched to 0.50 s, 3 times slower"
    )  # fmt: skip
    assert (unequal.name, unequal.detail) == ("b", "one is 3 times slower than the other")


def test_a_folder_of_what_is_not_read_says_so(
    small_model: AnimateDiffModel, tmp_path: Path
) -> None:
    for side in ("chosen", "rejected"):
        (tmp_path / side).mkdir()
        (tmp_path / side / "a.rm").touch()
    with pytest.raises(UserError, match=r"chosen/a\.rm: files of type \.rm are not read"):
        opened(small_model, tmp_path)


# --- how many --------------------------------------------------------------------------------


def test_count_limits_the_number_of_pairs(small_model: AnimateDiffModel, tmp_path: Path) -> None:
    root = folders(tmp_path / "mine")
    assert len(built(small_model, root, tmp_path / "all")) == 3
    assert len(built(small_model, root, tmp_path / "more", count=9)) == 3
    assert len(built(small_model, root, tmp_path / "two", count=2)) == 2
    resumed = built(small_model, root, tmp_path / "two", count=3)
    assert [row.source for row in resumed.records] == ["a", "b", "c"]


def test_a_late_damage_shortens_the_set_and_moves_no_other_pair(
    small_model: AnimateDiffModel, tmp_path: Path
) -> None:
    root = folders(tmp_path / "mine")
    (root / "rejected" / "b.mp4").write_bytes(b"no video")
    store = built(small_model, root, tmp_path / "first", count=1)
    assert [row.source for row in store.records] == ["a"]
    resumed = built(small_model, root, tmp_path / "first")
    assert [row.source for row in resumed.records] == ["a", "c"]


def test_the_fingerprint_depends_on_everything_that_determines_the_pairs(
    small_model: AnimateDiffModel, tmp_path: Path
) -> None:
    def fingerprint(root: Path) -> str:
        return opened(small_model, root).fingerprint

    one, two = folders(tmp_path / "one"), folders(tmp_path / "two")
    assert fingerprint(one) == fingerprint(two)  # not on where they lie
    (two / "chosen" / "a.txt").write_text("another prompt")
    other = fingerprint(two)
    assert other != fingerprint(one)
    write(two / "rejected" / "c.mp4", 77)
    assert fingerprint(two) != other
    labels = [opened(small_model, lines(tmp_path / "l", {"labels": [x]})) for x in (1, 0)]
    assert labels[0].fingerprint != labels[1].fingerprint


# --- what gives no pair ----------------------------------------------------------------------


def reasons(source: PairSource) -> dict[str, str]:
    list(source.clips)
    return {skipped.name: skipped.reason for skipped in source.skipped}


def test_files_without_a_counterpart_or_damaged_are_reported(
    small_model: AnimateDiffModel, tmp_path: Path
) -> None:
    root = folders(tmp_path, ["a", "alone", "copy", "damaged", "short", "twice"])
    (root / "rejected" / "alone.mp4").unlink()
    (root / "rejected" / "copy.mp4").write_bytes((root / "chosen" / "copy.mp4").read_bytes())
    (root / "chosen" / "damaged.mp4").write_bytes(b"no video")
    write(root / "rejected" / "short.mp4", 3, frames=2)
    write(root / "chosen" / "twice.gif", 4)
    write(root / "rejected" / "other.mp4", 5)
    source = opened(small_model, root)
    assert source.count == 4  # listing uses names only
    found = reasons(source)
    assert found.keys() == {"chosen/alone.mp4", "rejected/other.mp4", "chosen/twice.gif", "copy",
                            "damaged", "short"}  # fmt: skip
    assert "rejected has no video called alone" in found["chosen/alone.mp4"]
    assert "chosen has no video called other" in found["rejected/other.mp4"]
    assert "3 videos are called twice" in found["chosen/twice.gif"]
    assert "same video" in found["copy"] and "too short" in found["short"]
    assert [pair.source for pair in made(small_model, root)] == ["a"]


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        ("not json", "JSON"),
        ('{"chosen": "chosen/a.mp4"}', "rejected"),
        ("7", "a table is needed"),
        ({"win": "rejected/a.mp4"}, "names both chosen and win"),
        ('{"chosen": "a", "chosen": "b"}', "names 'chosen' twice"),
        ({"prompt": "half \ud800"}, "half a character"),
        ("[" * 5000, "nested too deeply"),
        ({"labels": [2]}, "labels.0"),
        ({"labels": [1, 1]}, "2 labels for 1 segment"),
        ({"chosen": "gone.mp4"}, "there is no file"),
        ({"mask": "gone.png"}, "there is no file"),
        ({"mask": "black.png"}, "do not differ where"),
        ({"mask": "chosen/a.txt"}, "files of type .txt are not read"),
        ({"mask": "hidden.png"}, "do not differ where"),
        ({"chosen": "pipe.mp4"}, "it is a named pipe"),
        ({"prompt": None, "chosen": "rejected/a.mp4", "rejected": "bare.mp4"}, "has no prompt"),
    ],
)
def test_an_invalid_line_is_reported(
    small_model: AnimateDiffModel, tmp_path: Path, entry: Any, reason: str
) -> None:
    Image.new("L", (SHAPE.width, SHAPE.height)).save(tmp_path / "black.png")
    Image.new("RGBA", (SHAPE.width, SHAPE.height), (255, 255, 255, 0)).save(tmp_path / "hidden.png")
    write(tmp_path / "bare.mp4", 8)
    os.mkfifo(tmp_path / "pipe.mp4")
    source = opened(small_model, lines(tmp_path, {}, entry))
    found = reasons(source)
    assert found.keys() == {"pairs.jsonl:2"} and reason in found["pairs.jsonl:2"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"latents_w": torch.zeros(4, 4, 4, 5)}, "holds shapes"),
        ({"latents_w": torch.zeros(4, 4, 2, 2), "latents_l": torch.ones(4, 4, 2, 2)}, "latents"),
        ({"prompt_embeds": torch.zeros(1, 3, 16)}, "prompt_embeds have the shape"),
        ({"latents_w": torch.full((4, 4, 4, 4), torch.nan)}, "nan or infinity"),
        ({"latents_l": None}, "does not hold"),
        ("copy", "same latents"),
        ("cut", "cannot be read"),
    ],
)
def test_other_latents_are_reported(
    small_model: AnimateDiffModel, tmp_path: Path, change: Any, reason: str
) -> None:
    good = {
        "latents_w": torch.zeros(4, 4, 4, 4),
        "latents_l": torch.ones(4, 4, 4, 4),
        "prompt_embeds": small_model.encode_prompts(["x"])["prompt_embeds"],
    }
    torch.save(good, tmp_path / "pair_00000.pt")
    bad = tmp_path / "pair_00001.pt"
    if change == "copy":
        torch.save({**good, "latents_l": good["latents_w"]}, bad)
    elif change == "cut":
        bad.write_bytes((tmp_path / "pair_00000.pt").read_bytes()[:100])
    else:
        torch.save({**good, **change}, bad)
    found = reasons(opened(small_model, tmp_path))
    assert found.keys() == {"pair_00001.pt"} and reason in found["pair_00001.pt"]


def test_no_usable_pair_is_an_error_with_an_example(
    small_model: AnimateDiffModel, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "gone", tmp_path / "empty"):
        with pytest.raises(UserError, match=r"chosen and rejected.*\.jsonl.*show pairs folder"):
            opened(small_model, path)
    with pytest.raises(UserError, match=r"No file gives a pair\. For example pairs\.jsonl:1"):
        opened(small_model, lines(tmp_path / "lines", {"chosen": "gone.mp4"}))
    root = folders(tmp_path / "folders", ["a"])
    (root / "chosen" / "a.mp4").write_bytes(b"no video")
    source = opened(small_model, root)  # the error appears when it is read
    with pytest.raises(UserError, match=r"No file gives a pair\. For example a: .*a\.mp4"):
        next(source.clips)
    (tmp_path / "text.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="cannot be read: it is not UTF-8 text"):
        opened(small_model, tmp_path / "text.jsonl")


def test_a_pair_store_is_refused(small_model: AnimateDiffModel, tmp_path: Path) -> None:
    store = built(small_model, folders(tmp_path / "mine"), tmp_path / "store")
    with pytest.raises(UserError, match="is a finished pair store"):
        opened(small_model, store.folder)


def test_other_clips_are_refused(small_model: AnimateDiffModel, clip: Clip) -> None:
    with pytest.raises(UserError, match=r"pairs\.path"):
        Folder(path=Path("x"))(clip, small_model, None, Generator())


def test_a_backbone_with_another_prompt_encoding_is_refused(
    small_model: AnimateDiffModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save({}, tmp_path / "pair_00000.pt")

    def pooled(prompts: Sequence[str]) -> dict[str, Tensor]:
        return {"prompt_embeds": torch.zeros(1, 2, 2), "pooled": torch.zeros(1, 2)}

    monkeypatch.setattr(small_model, "encode_prompts", pooled)
    with pytest.raises(UserError, match=r"as pooled, prompt_embeds.*Use videos"):
        opened(small_model, tmp_path)
