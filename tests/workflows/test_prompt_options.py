"""Prompts of pairs and of evaluations: a list, the only prompt, or the package's own."""

from __future__ import annotations

from pathlib import Path

import pytest

from dpo_video.backbone.animatediff import AnimateDiffModel
from dpo_video.errors import UserError
from dpo_video.types import Clip
from dpo_video.workflows.config import Config, resolve
from dpo_video.workflows.session import NUM_PROMPTS, evaluation_prompts, open_source


def asking(*assignments: str, **choices: str) -> Config:
    return resolve(choices=choices, metrics=["frame_difference"], assignments=assignments)


def test_pairs_of_prompts_are_built_from_a_list_else_from_the_packages_own(
    small_model: AnimateDiffModel, tmp_path: Path
) -> None:
    (tmp_path / "p.csv").write_text("prompt,seed,negative_prompt\na dog,,\na cat,7,blur\n")
    given = asking(f"build.prompts='{tmp_path / 'p.csv'}'", backbone="tiny", pairs="jitter")
    source = open_source(given, small_model)
    dog, cat, again = (source.clips(index) for index in (0, 1, 3))
    assert dog is not None and cat is not None and again is not None
    assert (dog.caption, dog.seed, cat.seed, cat.negative_prompt) == ("a dog", None, 7, "blur")
    assert again.seed == 8 and source.contents == "2 prompts"
    (tmp_path / "p.csv").write_text("prompt,seed,negative_prompt\na dog,,\na cat,8,blur\n")
    assert open_source(given, small_model).fingerprint != source.fingerprint
    one = open_source(asking("run.prompt='a fox'", backbone="tiny", pairs="jitter"), small_model)
    assert one.clips(5) == Clip(name="prompt", caption="a fox")
    own = open_source(asking(backbone="wan", pairs="jitter"), small_model)
    drawn = [own.clips(index) for index in range(64)]
    evaluated = {prompt.text for prompt in evaluation_prompts(asking(backbone="wan"))}
    assert not {clip.caption for clip in drawn if clip is not None} & evaluated


@pytest.mark.parametrize(
    ("pairs", "assignments", "wrong"),
    [
        ("jitter", ["run.prompt='a dog'"], "exclude each other"),
        ("jitter", ["run.clips='clips'"], "clips bring their own captions"),
        ("folder", ["pairs.path='pairs'"], "their files bring their own captions"),
        ("local", [], "made of real videos, which bring their own captions"),
    ],
)
def test_prompts_of_pairs_that_have_others_are_refused(
    small_model: AnimateDiffModel, pairs: str, assignments: list[str], wrong: str
) -> None:
    config = asking("build.prompts='training'", *assignments, backbone="tiny", pairs=pairs)
    with pytest.raises(UserError, match=wrong):
        open_source(config, small_model)


def test_an_evaluation_is_a_table_of_prompts_and_seeds(tmp_path: Path) -> None:
    file = tmp_path / "p.txt"
    file.write_text("a dog\na cat\na fox\n")
    named = f"evaluate.prompts='{file}'"

    def drawn(*assignments: str) -> list[tuple[str, int | None]]:
        rows = evaluation_prompts(asking(*assignments, backbone="tiny"))
        return [(row.text, row.seed) for row in rows]

    assert len(drawn()) == len({text for text, _ in drawn()}) == NUM_PROMPTS
    assert drawn(named, "evaluate.seed=5") == [("a dog", 5), ("a cat", 6), ("a fox", 7)]
    assert drawn(named, "evaluate.num_prompts=2", "evaluate.num_videos_per_prompt=2") == [
        ("a dog", 0), ("a cat", 1), ("a dog", 2), ("a cat", 3)
    ]  # fmt: skip
    assert len(drawn("evaluate.prompts='evaluation'")) == 72
    with pytest.raises(UserError, match="has 3 prompts, fewer than --num-prompts 4"):
        drawn(named, "evaluate.num_prompts=4")
    with pytest.raises(UserError, match="two videos or more"):
        drawn(named, "evaluate.num_prompts=1")
