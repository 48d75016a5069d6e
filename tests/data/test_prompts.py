"""Lists of prompts: what is read from files, and the package's own."""

from __future__ import annotations

from itertools import islice, product
from pathlib import Path

import pytest

from dpo_video.backbone.tiny import Tiny
from dpo_video.backbone.wan import Wan
from dpo_video.data.prompts import batched_prompts, load_prompts, prompt_table, shipped_prompts
from dpo_video.errors import UserError
from dpo_video.types import Prompt
from dpo_video.workflows.session import NUM_PROMPTS

DOG = Prompt(text="a dog, running")
CAT = Prompt(text="a cat", seed=7, negative_prompt="blur, noise")


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("p.txt", "\ufeffa  dog, running\n\n a cat \r\n", [DOG, Prompt(text="a cat")]),
        (
            "p.csv",
            'prompt,seed,negative_prompt\r\n"a dog, running",,\n\na cat,7,"blur, noise"\n',
            [DOG, CAT],
        ),
        ("p.TSV", "seed\ttext\tnegative_prompt\n\ta dog, running\t\n7\ta cat\tblur, noise\n",
         [DOG, CAT]),
        (
            "p.jsonl",
            '{"prompt": "a dog, running", "seed": null}\n'
            '{"text": "a cat", "seed": 7, "negative_prompt": "blur, noise"}\n',
            [DOG, CAT],
        ),
    ],
)  # fmt: skip
def test_a_file_holds_prompts_with_seeds_and_negative_prompts(
    tmp_path: Path, name: str, content: str, expected: list[Prompt]
) -> None:
    (tmp_path / name).write_bytes(content.encode())
    assert load_prompts(str(tmp_path / name)) == expected


@pytest.mark.parametrize(
    ("name", "content", "wrong"),
    [
        ("p.txt", b" \n", "holds no prompt"),
        ("p.txt", b"\xff\xfe", "not UTF-8"),
        ("p.csv", b"", "holds no prompt"),
        ("p.csv", b"a dog\na cat\n", "not a header with a column 'prompt'"),
        ("p.csv", b"prompt,prompt\na,b\n", "each name once"),
        ("p.csv", b"prompt,seed\na dog, running,3\n", "Line 2 .* has 3 cells"),
        ("p.csv", b"prompt,seed\na dog,-1\n", "Line 2 .* has the seed '-1'"),
        ("p.csv", b"prompt,seed\n,3\n", "Line 2 .* has no prompt"),
        ("p.csv", b'prompt\n"a dog', "Line 2 .* is not CSV"),
        ("p.jsonl", b'{"prompt": "a"}\n{"prompt": 3}\n', "Line 2 .* has no prompt"),
        ("p.jsonl", b"a dog\n", "Line 1 .* is not JSON"),
        ("p.jsonl", b'["a dog"]\n', "Line 1 .* is not an object"),
        ("p.jsonl", b'{"prompt": "a", "seed": true}', "the seed True"),
        ("p.jsonl", b'{"prompt": "a", "seed": 1.0}', "the seed 1.0"),
        ("p.jsonl", b'{"prompt": "a", "negative_prompt": 1}', "negative_prompt that is no text"),
    ],
)
def test_what_is_no_list_is_refused_with_its_line(
    tmp_path: Path, name: str, content: bytes, wrong: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=wrong):
        load_prompts(str(tmp_path / name))


def test_a_name_that_is_neither_a_file_nor_a_list_is_refused_with_the_lists(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"No such file .*: training, evaluation"):
        load_prompts(str(tmp_path / "evalation"))


def test_columns_that_are_not_read_are_named(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "a", "id": 1}\n{"prompt": "b", "style": "x"}\n')
    notes: list[str] = []
    load_prompts(str(tmp_path / "p.jsonl"), notes.append)
    assert notes == [f"Columns of '{tmp_path / 'p.jsonl'}' that are not read: id, style."]


def test_the_packages_lists_are_varied_and_share_no_prompt() -> None:
    training, evaluation = (shipped_prompts(name) for name in ("training", "evaluation"))
    assert len(training) >= 64 and len(evaluation) >= 64
    every = training + evaluation
    assert len({text.lower() for text in every}) == len(every)
    words = {text: {*text.replace(",", "").split()} for text in every}
    for one, other in product(training, evaluation):  # nor one that is nearly the same
        assert len(words[one] & words[other]) < 0.5 * len(words[one] | words[other])
    assert all(5 <= len(text.split()) <= 30 and text == text.strip() for text in every)
    assert len(set().union(*words.values())) > 700
    assert load_prompts("training") == [Prompt(text=text) for text in training]


def test_a_table_draws_every_prompt_with_a_seed_of_its_own() -> None:
    table = prompt_table([DOG, CAT], 2, seed=10)
    assert [(row.text, row.seed) for row in table] == [
        (DOG.text, 10), (CAT.text, 7), (DOG.text, 12), (CAT.text, 8)
    ]  # fmt: skip


def test_a_batch_has_one_negative_prompt() -> None:
    rows = [DOG, DOG, DOG, CAT, CAT, DOG]
    assert list(batched_prompts(rows, 2)) == [[DOG, DOG], [DOG], [CAT, CAT], [DOG]]


@pytest.mark.parametrize("seed", [0, 1])  # clips 55 and 3 had a prompt of the evaluation
def test_tinys_clips_show_none_of_its_evaluation_prompts(seed: int) -> None:
    backbone = Tiny()
    assert len({*backbone.prompts(NUM_PROMPTS)}) == NUM_PROMPTS
    clips = list(islice(backbone.clips(seed), 64))
    captions = {clip.caption for clip in clips}
    assert len(captions) > 32 and not captions & {*backbone.prompts(NUM_PROMPTS)}
    assert all(clip.video is not None and clip.video.shape == (3, 16, 64, 64) for clip in clips)


def test_pairs_of_prompts_and_evaluations_differ_by_default() -> None:
    backbone = Wan()
    assert backbone.prompts(NUM_PROMPTS) == shipped_prompts("evaluation")[:NUM_PROMPTS]
    assert not {*backbone.prompts(200)} & {*shipped_prompts("training")}
