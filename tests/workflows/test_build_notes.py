"""What `build` says about files that are used otherwise than they were filmed."""

from __future__ import annotations

from dpo_video.data.audit_checks import cut_prompts
from dpo_video.types import Remark
from dpo_video.workflows.build import _summarized


def test_remarks_are_one_sentence_for_all_files_of_a_kind() -> None:
    remarks = [Remark(what="Slowed down", name=f"{n}.mp4", detail="2 times") for n in range(5)]
    remarks.insert(1, Remark(what="HDR (PQ), converted to SDR", name="x.mov"))
    assert _summarized(remarks) == [
        "Slowed down: 0.mp4 (2 times), 1.mp4 (2 times), 2.mp4 (2 times) and 2 more.",
        "HDR (PQ), converted to SDR: x.mov.",
    ]


def test_cut_prompts_are_counted_and_shown() -> None:
    ends = {"a b c": "c", "d" * 100: "e" * 100}
    said = cut_prompts(["a b c", "d" * 100, "a b c", "short"], ends.get)
    assert said == (
        "2 of 3 prompts are longer than the text encoder reads. Of 'a b c' the end is not read: "
        "'c'."
    )
    assert cut_prompts(["short"], ends.get) is None
