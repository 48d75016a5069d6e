"""Building: pair `i` is the same pair however often the build was interrupted."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from conftest import SHAPE, load_small

from dpo_video.backbone.animatediff import AnimateDiffModel
from dpo_video.data.build import (
    BuildReport,
    Source,
    Worker,
    build,
    cycle_prompts,
    in_order,
    preview,
)
from dpo_video.data.pair_check import context_fault
from dpo_video.data.store import Manifest, PairStore
from dpo_video.data.video import read_video
from dpo_video.errors import PluginError, StoreError, UserError
from dpo_video.evaluation.evaluate import sample_videos
from dpo_video.pairs.jitter import Jitter
from dpo_video.pairs.local import Local
from dpo_video.settings import BuildSettings, EvaluateSettings
from dpo_video.strategies import PairBuilder
from dpo_video.testing import small_videos
from dpo_video.types import Clip, Pair, Prompt

ALONE = Worker()
CAPTIONS = ("a red square moving left slowly", "a blue star moving up quickly")


def clips(index: int) -> Clip:
    video = small_videos(1, SHAPE.frames, SHAPE.height, SHAPE.width, seed=index)[0]
    return Clip(name=f"clip {index}", caption=CAPTIONS[index % 2], video=video)


def new_store(folder: Path, model: AnimateDiffModel) -> PairStore:
    manifest = Manifest(
        recipe={"made": "in a test"},
        identity=model.identity,
        latent_shape=model.latent_shape,
        fps=model.shape.fps,
    )
    return PairStore.create(folder, manifest)


def small_build(
    folder: Path,
    out: Path,
    pairs: int = 6,
    *,
    source: Source = clips,
    builder: PairBuilder | None = None,
    previews: bool = True,
    seed: int = 0,
    worker: Worker = ALONE,
) -> Iterator[BuildReport]:
    model = load_small(folder)
    settings = BuildSettings(count=pairs, previews=previews)
    builder = builder or Jitter(chosen="clip")
    store = new_store(out, model)
    return build(store, source, builder, model, settings, seed=seed, worker=worker)


def test_every_pair_is_reported(small_folder: Path, tmp_path: Path) -> None:
    reports = list(small_build(small_folder, tmp_path / "pairs", 3))
    assert [report.done for report in reports] == [1, 2, 3]
    assert {report.total for report in reports} == {3}
    assert [report.prompt for report in reports] == [CAPTIONS[0], CAPTIONS[1], CAPTIONS[0]]
    assert all(report.seconds > 0 for report in reports)
    store = PairStore(tmp_path / "pairs")
    assert [row.source for row in store.records] == ["clip 0", "clip 1", "clip 2"]


def test_existing_pairs_are_not_built_again(small_folder: Path, tmp_path: Path) -> None:
    list(small_build(small_folder, tmp_path / "pairs", 2))
    first = PairStore(tmp_path / "pairs").batch([0, 1])
    assert [r.done for r in small_build(small_folder, tmp_path / "pairs", 4)] == [3, 4]
    assert list(small_build(small_folder, tmp_path / "pairs", 4)) == []
    list(small_build(small_folder, tmp_path / "whole", 4))
    cut, whole = (PairStore(tmp_path / name).batch(range(4)) for name in ("pairs", "whole"))
    assert torch.equal(cut.first, whole.first) and torch.equal(cut.second, whole.second)
    assert torch.equal(cut.first[:2], first.first)


def files(folder: Path) -> dict[str, object]:
    """A store's files; of pairs.jsonl, the lines in any order."""
    found: dict[str, object] = {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }
    found["pairs.jsonl"] = sorted((folder / "pairs.jsonl").read_bytes().splitlines())
    return found


@pytest.mark.parametrize("seed", range(4))
def test_workers_in_any_order_even_killed_build_the_set_of_one_process(
    small_folder: Path, tmp_path: Path, seed: int
) -> None:
    random, count = Random(seed), 7
    list(small_build(small_folder, tmp_path / "one", count))
    shared = tmp_path / "shared"

    def started(number: int, of: int) -> Iterator[BuildReport]:
        return small_build(small_folder, shared, count, worker=Worker(number=number, count=of))

    of = 2 + seed % 2
    workers = [started(number, of) for number in range(of)]
    workers.append(started(0, of))  # by mistake, the same part twice
    for _ in range(5):
        try:
            next(random.choice(workers))
        except StopIteration:
            continue
        if random.random() < 0.5:  # a worker is killed within its next line
            with (shared / "pairs.jsonl").open("ab") as file:
                file.write(b'{"index":' * random.randrange(1, 3))
    for number in range(of):
        list(started(number, of))
    assert files(shared) == files(tmp_path / "one")
    assert PairStore(shared).digest == PairStore(tmp_path / "one").digest
    assert list(started(0, 1)) == []


def test_a_pair_counts_once_all_before_it_exist(small_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "pairs"
    second = small_build(small_folder, out, 5, worker=Worker(number=1, count=2))
    assert [report.done for report in second] == [1, 2]
    store = PairStore(out)
    assert (len(store), store.made, 1 in store, 0 in store) == (0, 2, True, False)
    source = in_order(clips(i) for i in count())  # indices must grow, and do
    list(small_build(small_folder, out, 5, source=source))
    store.refresh()
    assert (len(store), store.made) == (5, 5)
    assert [row.source for row in store.records] == [f"clip {i}" for i in range(5)]


@pytest.mark.parametrize("builder", [Jitter(), Local(num_inference_steps=4)])
def test_a_pair_depends_on_seed_and_index_only(
    small_folder: Path, tmp_path: Path, builder: PairBuilder
) -> None:
    def made(name: str, seed: int) -> torch.Tensor:
        torch.rand(len(name))  # what ran before must not matter
        list(small_build(small_folder, tmp_path / name, 2, builder=builder, seed=seed))
        return PairStore(tmp_path / name).batch([0, 1]).second

    assert torch.equal(made("one", 0), made("again", 0))
    other = made("other", 1)
    assert not torch.equal(made("one", 0), other)
    assert not torch.equal(other[0], other[1])


def test_contexts_are_the_models_encoded_prompts(small_folder: Path, tmp_path: Path) -> None:
    list(small_build(small_folder, tmp_path / "pairs", 3, previews=False))
    model = load_small(small_folder)
    batch = PairStore(tmp_path / "pairs").batch([0, 1, 2])
    for i in range(3):
        expected = model.encode_prompts([CAPTIONS[i % 2]])["prompt_embeds"][0]
        assert torch.equal(batch.context["prompt_embeds"][i], expected)


def test_previews_show_first_second_and_region(
    small_folder: Path, small_model: AnimateDiffModel, tmp_path: Path
) -> None:
    list(small_build(small_folder, tmp_path / "pairs", 1, builder=Local(num_inference_steps=4)))
    frames = read_video(PairStore(tmp_path / "pairs").preview(0)).frames
    assert frames.shape == (3, SHAPE.frames, 128, 3 * 128)  # 8 times 16, three side by side
    pair = Local(num_inference_steps=4)(
        clips(0), small_model, None, torch.Generator().manual_seed(0)
    )
    first, second, shown = preview(pair, small_model).chunk(3, dim=-1)
    region = pair.region.repeat_interleave(4, 2).repeat_interleave(4, 3)
    torch.testing.assert_close(shown, second * (0.3 + 0.7 * region))
    assert (first != second).any()
    list(small_build(small_folder, tmp_path / "bare", 1, previews=False))
    assert not any((tmp_path / "bare" / "previews").iterdir())


def test_a_store_of_another_model_is_refused(
    small_model: AnimateDiffModel, small_folder: Path, tmp_path: Path
) -> None:
    store = new_store(tmp_path / "pairs", small_model)
    settings = BuildSettings(count=1)
    small_model.identity = "0123456789abcdef"
    with pytest.raises(StoreError, match="made with other weights"):
        next(build(store, clips, Jitter(chosen="clip"), small_model, settings, seed=0))
    assert len(PairStore(tmp_path / "pairs")) == 0


def test_prompts_cycle_and_clips_are_in_order() -> None:
    prompts = [Prompt(text=CAPTIONS[0]), Prompt(text=CAPTIONS[1], seed=7, negative_prompt="blur")]
    source = cycle_prompts(prompts)
    assert [source(i).caption for i in (0, 1, 2, 7)] == [*CAPTIONS, *CAPTIONS]
    assert [source(i).seed for i in range(4)] == [None, 7, None, 8]
    assert source(3).negative_prompt == "blur"
    assert source(0).video is None
    source = in_order(Clip(name=str(i), caption="") for i in count())
    assert [source(i).name for i in (0, 1, 5, 6)] == ["0", "1", "5", "6"]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"preference": lambda part: torch.ones(99)}, r"preference has the shape \(99,\), not"),
        ({"preference": lambda part: 5 * part}, r"whose preference is not in \[-1, 1\]"),
        ({"preference": torch.Tensor.int}, "whose preference has the type int32"),
        ({"preference": torch.Tensor.tolist}, "whose preference is a list, not a tensor"),
        ({"region": torch.zeros_like}, "differ outside their region"),
        ({"region": lambda part: part / 2}, "values other than 0 and 1"),
        ({"first": torch.Tensor.half}, "two videos have different types"),
        ({"strength": lambda part: 5.0}, "strength is 5.0"),
        ({"weight": lambda part: 0.0}, "weight is 0.0"),
        (None, " NoneType, not a Pair"),
    ],
)
def test_a_pair_that_breaks_the_contract_is_not_stored(
    tmp_path: Path,
    small_model: AnimateDiffModel,
    changes: dict[str, Callable[[Any], Any]] | None,
    sentence: str,
) -> None:
    _, *cells = shape = small_model.latent_shape
    good = Pair(
        first=torch.zeros(shape), second=torch.ones(shape), preference=torch.ones(cells[0]),
        region=torch.ones(1, *cells), prompt="a", source="b",
    )  # fmt: skip

    class Wrong(PairBuilder):
        def __call__(self, *given: object) -> Any:
            if changes is None:
                return None
            pair = copy.copy(good)
            for part, to in changes.items():  # past the types, which are checked in tests only
                object.__setattr__(pair, part, to(vars(good)[part]))
            return pair

    store = new_store(tmp_path / "pairs", small_model)
    with pytest.raises(PluginError, match=rf"^The pairs Wrong of \S+ returns a.*{sentence}"):
        next(build(store, clips, Wrong(), small_model, BuildSettings(count=1), seed=0))
    assert not len(store) and not list(store.folder.rglob("*.safetensors"))


def test_a_nonfinite_pair_is_neither_stored_nor_previewed(
    tmp_path: Path, small_model: AnimateDiffModel
) -> None:
    good = new_store(tmp_path / "good", small_model)
    for _ in build(
        good, clips, Jitter(num_inference_steps=2), small_model, BuildSettings(count=1), seed=0
    ):
        pass
    assert len(good) == 1
    next(small_model.denoiser.parameters()).data.fill_(torch.nan)
    store = new_store(tmp_path / "pairs", small_model)
    made = build(
        store, clips, Jitter(num_inference_steps=2), small_model, BuildSettings(count=1), seed=0
    )
    with pytest.raises(
        UserError, match=r"Pair 0 \('a red .* was not stored: its first video is not"
    ):
        next(made)
    assert not len(store) and not list(store.folder.rglob("*.safetensors"))
    assert not list(store.folder.rglob("*.mp4"))
    with pytest.raises(UserError, match="The sample for 'a dog' is not finite"):
        next(
            sample_videos(
                small_model,
                small_model.denoiser,
                [Prompt(text="a dog")],
                EvaluateSettings(num_inference_steps=1),
            )
        )


@pytest.mark.parametrize(
    ("videos", "sentence"),
    [
        (lambda right: right[:, :, :1], r"videos, a value that has the shape \(1, 3, 1, 16, 16\)"),
        (lambda right: 255 * right, r"videos, a value that is not in \[0, 1\]"),
        (lambda right: (255 * right).byte(), "videos, a value that has the type uint8"),
        (lambda right: None, "videos, a value that is None, not a tensor"),
    ],
)
def test_a_model_that_decodes_to_something_else_is_named(
    small_model: AnimateDiffModel,
    monkeypatch: pytest.MonkeyPatch,
    videos: Callable[[Any], Any],
    sentence: str,
) -> None:
    right = torch.full((1, 3, SHAPE.frames, SHAPE.height, SHAPE.width), 0.5)
    monkeypatch.setattr(small_model, "decode_videos", lambda latents: videos(right))
    monkeypatch.setattr(small_model, "sample", lambda *given, **options: latents)
    latents = torch.zeros(1, *small_model.latent_shape)
    settings = EvaluateSettings(num_inference_steps=1)
    drawn = sample_videos(small_model, small_model.denoiser, [Prompt(text="a")], settings)
    with pytest.raises(PluginError, match=rf"^The model AnimateDiffModel .* returns {sentence}"):
        next(drawn)


@pytest.mark.parametrize(
    ("encoded", "sentence"),
    [
        (torch.zeros(1, 2), "as a Tensor, not as tensors by name"),
        ({"text": [0.0]}, "with 'text', a list and no tensor"),
        ({"text": torch.zeros(2, 3)}, r"'text' of the shape \(2, 3\), without an axis of 1"),
    ],
)
def test_an_encoded_prompt_that_is_none_is_named(encoded: object, sentence: str) -> None:
    assert re.search(sentence, context_fault(encoded))
    assert not context_fault({"text": torch.zeros(1, 2)})
