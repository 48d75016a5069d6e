"""A run on the disk, as an object."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

from pydantic import TypeAdapter, ValidationError
from rich.table import Table
from rich.text import Text

import dpo_video
from dpo_video.errors import RunError, first_fault
from dpo_video.evaluation.rendering import asset, templates
from dpo_video.evaluation.report import training_context
from dpo_video.evaluation.results import Evaluation
from dpo_video.registry import local
from dpo_video.support.atomic import write_text
from dpo_video.support.formatting import html_table, plain_table
from dpo_video.support.reading import read_bytes
from dpo_video.support.report import StepReport
from dpo_video.text import command, without_credentials
from dpo_video.training.diagnosis import TrainingVerdict, judge_training
from dpo_video.training.run_dir import checkpoint_at, checkpoints, read_log, resume_command
from dpo_video.workflows.config import Config, resolve
from dpo_video.workflows.results import ExportResult, GeneratedVideo

PROMPTS = "prompts.json"
_TEXTS = TypeAdapter(list[str])


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run's folder, and what is in it."""

    folder: Path
    new_reports: tuple[StepReport, ...] = ()
    """The steps of the call that returned this object."""
    stopped: bool = False
    """Whether that call was stopped before the last step."""

    @classmethod
    def open(cls, run: Run | Path | str) -> Self | Run:
        """The run in a folder.

        Raises:
            RunError: if the folder is not a run.
        """
        if isinstance(run, Run):
            return run
        if not (Path(run) / "run.toml").is_file():
            raise RunError(f"'{run}' is not a run: it has no run.toml. Name a folder under runs/.")
        return cls(folder=Path(run))

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.folder.resolve().name

    @property
    def toml(self) -> str:
        """The text of run.toml, without credentials in URLs."""
        return without_credentials((self.folder / "run.toml").read_text(encoding="utf-8"))

    @cached_property
    def config(self) -> Config:
        """The configuration, resolved from run.toml."""
        return resolve(file=self.folder / "run.toml")

    @property
    def versions(self) -> dict[str, str]:
        """Package to version, of the process that started the run."""
        return tomllib.loads(self.toml).get("versions", {})

    @property
    def prompts(self) -> list[str]:
        """The different prompts of the pairs that it was trained on.

        Raises:
            RunError: if they cannot be read.
        """
        path = self.folder / PROMPTS
        try:
            return _TEXTS.validate_json(read_bytes(path))
        except (OSError, ValidationError) as error:
            reason = error.strerror if isinstance(error, OSError) else first_fault(error)
            raise RunError(
                f"Cannot read the prompts of the training pairs in '{path}' ({reason}). Write it "
                f"again: {resume_command(self.folder)}"
            ) from error

    @property
    def reports(self) -> list[StepReport]:
        """All steps so far, from log.jsonl."""
        return read_log(self.folder)

    @property
    def verdict(self) -> TrainingVerdict | None:
        """The judgement of the training so far; None before the first step."""
        return verdict_of(self.reports, self.toml)

    @property
    def checkpoints(self) -> dict[int, Path]:
        """The checkpoints' folders by step."""
        return checkpoints(self.folder)

    @property
    def evaluate_command(self) -> str:
        """The command that evaluates it, which allows the code of its backbone and its metrics."""
        tables = tomllib.loads(self.toml)
        names = [str(tables.get("backbone", {}).get("name")), *tables.get("metric", {})]
        code = ["--allow-code"] if any(map(local.is_file, names)) else []
        return command("evaluate", self.folder, *code)

    def adapter(self, step: int | None = None) -> Path:
        """The adapter's folder of a checkpoint, by default of the last one.

        Raises:
            RunError: if there is no such checkpoint.
        """
        return checkpoint_at(self.folder, step) / "adapter"

    def evaluation(self, step: int | None = None) -> Evaluation | None:
        """The evaluation of a checkpoint or, by default or without one, the run's last."""
        folders = [self.folder / "evaluation"]
        if step is not None:
            folders.insert(0, self.folder / f"evaluation-{step}")
        for folder in folders:
            if (folder / "evaluation.json").is_file():
                return Evaluation.load(folder)
        return None

    def evaluate(self, **options: Any) -> Evaluation:
        """`dpo_video.evaluate` of this run."""
        return dpo_video.evaluate(self, **options)

    def export(
        self, format: str = "diffusers", out: Path | str | None = None, **options: Any
    ) -> ExportResult:
        """`dpo_video.export` of this run."""
        return dpo_video.export(self, format, out, **options)

    def generate(self, **options: Any) -> list[GeneratedVideo]:
        """`dpo_video.generate` with this run's adapter."""
        return dpo_video.generate(self, **options)

    def _rows(self) -> list[tuple[str, str]]:
        reports, verdict, evaluation = self.reports, self.verdict, self.evaluation()
        rows = [("folder", str(self.folder))]
        if reports and verdict:
            last = reports[-1]
            rows += [
                ("steps", str(last.step)),
                ("loss", f"{last.loss:.4f}"),
                *([("reward accuracy", f"{last.accuracy:.0%}")] if last.compares else []),
                ("training", f"{verdict.state.value.replace('_', ' ')}: {verdict.seen}"),
            ]
        if evaluation is not None:
            rows.append(("evaluation", evaluation.verdict.headline))
        return rows

    def table(self) -> Table:
        """The state of the run, for the terminal."""
        rows = [(Text(name, "bold"), value) for name, value in self._rows()]
        return plain_table(("", ""), rows, show_header=False)

    def page(self, path: Path | str) -> Path:
        """Write a self-contained page: the state, the curves of the training and the settings."""
        page = templates().get_template("run.html.j2")
        text = page.render(
            name=self.name,
            rows=self._rows(),
            verdict=self.verdict,
            toml=self.toml,
            style=asset("evaluation.css"),
            **training_context(self.reports),
        )
        write_text(Path(path), text)
        return Path(path)

    def _repr_html_(self) -> str:
        return html_table(("run", self.name), self._rows())

    def to_dict(self) -> dict[str, Any]:
        """The folder, the configuration, the verdict and the steps as plain values."""
        verdict = self.verdict
        return {
            "folder": str(self.folder),
            "config": tomllib.loads(self.toml),
            "verdict": verdict.model_dump(mode="json") if verdict else None,
            "steps": [report.model_dump(mode="json") for report in self.reports],
        }


def verdict_of(reports: Sequence[StepReport], toml: str) -> TrainingVerdict | None:
    """The judgement of a training that has ended; None without steps.

    Its run.toml names the options of the loss; the loss itself need not be installed.
    """
    options = tomllib.loads(toml).get("loss", {})
    return judge_training(reports, options=options) if reports else None
