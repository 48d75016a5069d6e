"""The result of an evaluation: everything that its table and page show, kept as JSON."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self
from urllib.parse import quote

from pydantic import Field, PrivateAttr, ValidationError, model_validator
from rich import box
from rich.table import Table

from dpo_video.errors import UserError, first_fault, unknown
from dpo_video.evaluation.change import Change
from dpo_video.evaluation.human import HumanPreference
from dpo_video.evaluation.rendering import templates
from dpo_video.evaluation.report import Sides, embedding_order, page_context
from dpo_video.evaluation.verdict import EvaluationVerdict, MetricResult, rules
from dpo_video.support.formatting import apart, cell, counted, html_table
from dpo_video.support.report import StepReport
from dpo_video.support.statistics import Record
from dpo_video.training.diagnosis import TrainingVerdict

_JSON, _PAGE = "evaluation.json", "index.html"
EMBEDDED = 32 * 2**20  # bytes of videos inside a page
VIDEOS = "videos"  # folder of the videos, in that of the evaluation
_SHORT = {"no clear change": "unclear", "not shown to be kept": "unproven"}
_HEADER = ("metric", "better", "base", "tuned", "change", "95% interval", "result")


BASE_MODEL = "Base model"
"""Fact that says what the base model has besides its own weights."""


class Evaluation(Record):
    """Base and tuned model on identical prompts and seeds.

    The videos are not part of it: `save` writes them beside the JSON, and an evaluation that was
    saved or loaded finds them there.
    """

    name: str
    """Name of the run."""
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    """One per video, as the prompts; none for finished videos."""
    negative_prompts: tuple[str | None, ...] = ()
    """One per video, None for the backbone's; empty if no prompt has its own."""
    trained_prompts: tuple[str, ...] = ()
    """Those of the prompts that are also prompts of the training pairs."""
    frames: int = Field(ge=1)
    """Frames per video."""
    fps: float = Field(gt=0)
    metrics: tuple[MetricResult, ...]
    min_prompts: int
    """Number of prompts that a verdict needs."""
    verdict: EvaluationVerdict
    preference: HumanPreference | None = None
    """What people preferred on the labelling page, without knowing which video is which."""
    training: tuple[StepReport, ...] = ()
    training_verdict: TrainingVerdict | None = None
    command: str
    """The command that reproduces this evaluation."""
    run_toml: str
    """The run's resolved settings."""
    versions: dict[str, str] = Field(default_factory=dict)
    """Package to version."""
    facts: dict[str, str] = Field(default_factory=dict)
    """Further information: name to text."""
    _folder: Path | None = PrivateAttr(default=None)
    """The folder that it was saved to or loaded from."""

    @model_validator(mode="after")
    def _lengths_agree(self) -> Self:
        videos = len(self.prompts)
        lengths = [len(self.seeds)] if self.seeds else []
        witnesses = [metric.witness for metric in self.metrics if metric.witness is not None]
        lengths += [
            len(values)
            for each in (*self.metrics, *witnesses)
            for values in (each.base, each.tuned)
        ]
        if any(length != videos for length in lengths):
            raise ValueError(f"{videos} prompts, but {sorted(set(lengths))} seeds and values")
        return self

    def __getitem__(self, metric: str) -> MetricResult:
        """The result of a metric, for example `evaluation["warp_error"].interval`.

        Raises:
            UserError: if the metric was not measured.
        """
        results = {result.name: result for result in self.metrics}
        if metric not in results:
            raise unknown("metric", metric, list(results))
        return results[metric]

    # --- on disk -----------------------------------------------------------------------------

    def save(self, folder: Path, videos: Sequence[tuple[bytes, bytes]] = ()) -> None:
        """Write evaluation.json, the page index.html and the videos to a folder.

        Args:
            folder: The folder; it is created.
            videos: mp4 of base and tuned model, one pair per prompt.
        """
        from dpo_video.support.atomic import write_text, writing  # it imports torch

        with writing(folder):
            for i, pair in enumerate(videos):
                for path, data in zip(video_paths(folder, i), pair, strict=True):
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(data)
            self._folder = folder
            self.page(folder / _PAGE)
            write_text(folder / _JSON, self.to_json())

    @classmethod
    def load(cls, folder: Path) -> Evaluation:
        """Read what `save` wrote.

        Raises:
            UserError: if evaluation.json cannot be read.
        """
        try:
            text = (folder / _JSON).read_text(encoding="utf-8")
        except OSError as error:
            raise UserError(
                f"Cannot read '{folder / _JSON}': {error.strerror}. Run dpo-video evaluate first."
            ) from error
        try:
            evaluation = cls.from_json(text)
        except UserError as error:
            raise UserError(f"'{folder / _JSON}': {error}") from error
        evaluation._folder = folder
        return evaluation

    def to_json(self) -> str:
        """The evaluation as JSON; `from_json` returns an equal one."""
        return self.model_dump_json(indent=2)

    @classmethod
    def from_json(cls, text: str) -> Evaluation:
        """Read the output of `to_json`.

        Raises:
            UserError: if it is not an evaluation, or one of another version.
        """
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            raise UserError(
                f"This is not an evaluation that this version can read ({first_fault(error)}). "
                "Run dpo-video evaluate again to write a new one."
            ) from error

    # --- as data and for a person ------------------------------------------------------------

    @property
    def sample(self) -> str:
        """What was evaluated, as a sentence."""
        videos, prompts = len(self.prompts), len(set(self.prompts))
        different = f" of {prompts} different prompts" if prompts < videos else ""
        source = (
            "from each model, from the same prompts and seeds"
            if self.seeds
            else "in each folder, paired by their names"
        )
        return (
            f"{counted(videos, 'video')}{different} {source}; 95% intervals of the paired "
            "difference."
        )

    @property
    def rules(self) -> str:
        """The thresholds of the verdict, in words."""
        text = rules(self.metrics, self.min_prompts)
        base = self.facts.get(BASE_MODEL)
        return text if base is None else f"{text} Base: the model {base}."

    def to_dict(self) -> dict[str, Any]:
        """The evaluation as JSON-ready data."""
        return self.model_dump(mode="json")

    def table(self) -> Table:
        """The metrics as a table for the terminal, below the verdict."""
        table = Table(
            title=cell(self.verdict.headline, "bold"),
            caption=cell(f"{self.sample} {self.rules}"),
            box=box.SIMPLE_HEAD,
            padding=(0, 1, 0, 0),  # fits 80 columns
            pad_edge=False,
            title_justify="left",
            caption_justify="left",
        )
        for i, header in enumerate(_HEADER):
            table.add_column(header, justify="right" if 2 <= i < 6 else "left", no_wrap=True)
        styles = {"better": "green", "worse": "red", "kept": "green", "disagrees": "yellow"}
        for cells in self._cells():
            style = styles.get(cells[-1].split()[-1], "dim")
            table.add_row(*map(cell, cells[:-1]), cell(cells[-1], style))
        return table

    def page(self, path: Path | str) -> Path:
        """Write the self-contained page: metrics, charts, training, settings and the videos.

        The videos of a saved or loaded evaluation are embedded up to `EMBEDDED` bytes, and the
        others linked, so that a browser can open the page; without them the page has none.
        """
        from dpo_video.support.atomic import write_text

        path = Path(path)
        write_text(path, self.html(self._videos(path.parent)))
        return path

    def _videos(self, page: Path) -> list[Sides]:
        """The videos of a page in a folder: the first ones' bytes, and links to the others."""
        if self._folder is None:
            return []
        files = [video_paths(self._folder, i) for i in range(len(self.prompts))]
        if not all(side.is_file() for pair in files for side in pair):
            return []
        videos: list[Sides] = [
            (_address(base, page), _address(tuned, page)) for base, tuned in files
        ]
        room = EMBEDDED
        for index in embedding_order(self.metrics, len(files)):
            base, tuned = files[index]
            room -= base.stat().st_size + tuned.stat().st_size
            if room < 0:
                break
            videos[index] = (base.read_bytes(), tuned.read_bytes())
        return videos

    def html(self, videos: Sequence[Sides] = ()) -> str:
        """The page's text, with the given videos (see `page_context`)."""
        context = page_context(
            self.metrics,
            self.prompts,
            self.seeds or [None] * len(self.prompts),
            training=self.training,
            videos=videos,
        )
        return templates().get_template("evaluation.html.j2").render(evaluation=self, **context)

    def _repr_html_(self) -> str:
        caption = f"{self.verdict.headline} {self.rules}"
        return html_table(_HEADER, self._cells(), caption=caption)

    def _cells(self) -> list[list[str]]:
        cells = []
        for metric in self.metrics:
            sign, word = metric.mark
            wanted = "higher" if metric.higher_is_better else "lower"
            result = f"{sign} {_SHORT.get(word, word)}"
            cells.append([metric.label, wanted, *_numbers(metric), result])
            if metric.witness is not None:
                result = "disagrees" if metric.disagreement else "agrees"
                cells.append([f"  by {metric.witness.name}", "", *_numbers(metric.witness), result])
        return cells


def _numbers(change: Change) -> tuple[str, str, str, str]:
    """Base, tuned, change and interval as text."""
    base, tuned = apart(change.difference.base_mean, change.difference.tuned_mean)
    return base, tuned, change.change_text, change.interval_text


def _address(file: Path, page: Path) -> str:
    """The address of a file for a page in a folder."""
    try:
        return quote(Path(os.path.relpath(file, page)).as_posix())
    except ValueError:  # on Windows, another drive
        return file.resolve().as_uri()


def video_paths(folder: Path, index: int) -> tuple[Path, Path]:
    """The files of base and tuned model for a prompt."""
    base, tuned = (folder / VIDEOS / f"{index:03d}-{side}.mp4" for side in ("base", "tuned"))
    return base, tuned
