"""The pairs of an evaluation as a task for the labelling page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from dpo_video.data.video import read_video
from dpo_video.evaluation.human import ANSWERS, Answers, answers_text, preference_in, read_answers
from dpo_video.evaluation.results import Evaluation, video_paths
from dpo_video.strategies import LabelTask, StoreLabeler
from dpo_video.support.atomic import write_text, writing
from dpo_video.types import SegmentLabel, Video


class EvaluationTask(LabelTask):
    """Base and tuned videos of an evaluation, one segment each: +1 for the base, -1 for tuned."""

    def __init__(self, folder: Path, evaluation: Evaluation) -> None:
        self._folder, self._prompts = folder, evaluation.prompts
        self._answers: Answers = read_answers(folder)
        self.pairs = range(len(evaluation.prompts))
        self.segments = [slice(0, evaluation.frames)]
        self.fps = evaluation.fps

    def prompt(self, pair: int) -> str:
        """The prompt of both videos."""
        return self._prompts[pair]

    def videos(self, pair: int) -> tuple[Video, Video]:
        """The base's video and the tuned one, as they were written."""
        base, tuned = (
            read_video(file).frames.float().div(255) for file in video_paths(self._folder, pair)
        )
        return base, tuned

    @property
    def raters(self) -> Sequence[str]:
        """Everyone who judged a pair."""
        return list(self._answers)

    def labels_by(self, rater: str = "") -> Mapping[int, Sequence[SegmentLabel]]:
        """A rater's answers by pair."""
        return {
            pair: ("skip" if answer == "skip" else None if answer is None else -float(answer),)
            for pair, answer in self._answers.get(rater, {}).items()
        }

    def record(
        self, pair: int, labels: Sequence[SegmentLabel], *, rater: str = "", note: str = ""
    ) -> None:
        """Write an answer to the evaluation's folder."""
        (label,) = labels
        answer = -label if isinstance(label, float) else label
        self._answers.setdefault(rater, {})[pair] = answer
        with writing(self._folder):
            write_text(self._folder / ANSWERS, answers_text(self._answers))


def ask_people(folder: Path, page: StoreLabeler) -> Evaluation:
    """Show the pairs of a finished evaluation on the labelling page, and write the result.

    Raises:
        UserError: if there is no evaluation in the folder.
    """
    evaluation = Evaluation.load(folder)
    page.label_store(EvaluationTask(folder, evaluation))
    preference = preference_in(folder, len(evaluation.prompts))
    evaluation = evaluation.model_copy(update={"preference": preference})
    evaluation.save(folder)
    return evaluation
