"""`dpo-video bench`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dpo_video.cli.options import Tier, console
from dpo_video.errors import UserError, unknown

if TYPE_CHECKING:
    from benchmarks.support.results import SuiteResult

REGRESSION = 3  # exit code
MEMORY = "memory"
_COMPARING, _RUNNING = "Comparing", "Running"
_THREADS = "DPO_VIDEO_BENCH_THREADS"


class Clock(StrEnum):
    """What times are read from."""

    WALL = "wall"
    CPU = "cpu"


def bench(
    suites: Annotated[
        list[str] | None,
        typer.Argument(help="memory, step, metric, store, masks, loss, startup; all if left out."),
    ] = None,
    tier: Tier = None,
    turns: Annotated[
        int,
        typer.Option("--turns", min=1, help="Turns of each contestant.", rich_help_panel=_RUNNING),
    ] = 7,
    threads: Annotated[
        int,
        typer.Option("--threads", min=1, help="Of everybody's.", rich_help_panel=_RUNNING),
    ] = 1,
    clock: Annotated[
        Clock,
        typer.Option(
            "--clock",
            help="wall, or cpu: what processors worked, for machines that others use too.",
            rich_help_panel=_RUNNING,
        ),
    ] = Clock.WALL,
    only: Annotated[
        str | None,
        typer.Option(
            "--only",
            metavar="WORDS",
            rich_help_panel=_RUNNING,
            help='Races and contestants that pytest\'s -k picks: "Wan and toggle".',
        ),
    ] = None,
    quick: Annotated[
        bool,
        typer.Option(
            "--quick",
            rich_help_panel=_RUNNING,
            help="The smallest sizes, once: does it run? Its times mean nothing.",
        ),
    ] = False,
    out: Annotated[
        Path,
        typer.Option(
            "--out", help="Folder for SUITE.json, SUITE.md and pictures.", rich_help_panel=_RUNNING
        ),
    ] = Path("runs/bench"),
    compare: Annotated[
        tuple[Path, Path] | None,
        typer.Option(
            "--compare",
            metavar="OLD NEW",
            rich_help_panel=_COMPARING,
            help="Run nothing; compare two results, files or folders.",
        ),
    ] = None,
    tolerance: Annotated[
        float,
        typer.Option(
            "--tolerance",
            min=0,
            rich_help_panel=_COMPARING,
            help="Share by which a time over its yardstick's may rise.",
        ),
    ] = 0.1,
) -> None:
    """Measure how fast things are, beside others that do the same; or compare two measurements.

    Contestants take turns in one run, and what counts is the ratio to the race's yardstick.
    --tier is for the memory suite: predicted and, on a GPU, measured peaks within that card's
    memory.

    Exit code 3 if --compare finds a contestant slower by more than --tolerance; 2 if the command
    itself was wrong.
    """  # fmt: skip
    if compare is not None:
        if suites:
            raise UserError(
                "--compare runs nothing, so it takes no suites. Run them first, then compare."
            )
        _compare(*compare, tolerance)
        return
    folder = benchmarks()
    known = [MEMORY, *_pytest_suites(folder)]
    chosen = list(dict.fromkeys(suites or known))
    for suite in chosen:
        if suite not in known:
            raise unknown("suite", suite, known)
    if tier is not None and MEMORY not in chosen:
        raise UserError("--tier is for the memory suite. Leave it out, or add that suite.")
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), _THREADS: str(threads)}
    if MEMORY in chosen:
        _run_memory(folder, tier, environment, out)
    timed = [suite for suite in chosen if suite != MEMORY]
    if timed:
        arguments = ["--turns", str(1 if quick else turns), "--clock", clock.value]
        arguments += ["--quick"] if quick else []
        arguments += ["-k", only] if only else []
        _run_timed(folder, timed, arguments, environment, out)


def benchmarks() -> Path:
    """The folder of the suites; a UserError where the package was installed without it.

    They are programs beside the package, not parts of it: they need pytest-benchmark, and race
    libraries that nobody needs for training.
    """
    import dpo_video

    folder = Path(dpo_video.__file__).parents[1] / "benchmarks"
    if not (folder / "conftest.py").is_file():
        raise UserError(
            "The benchmarks are in the repository and not in the installed package. Clone it, and "
            "there: pip install --editable '.[dev]', then dpo-video bench."
        )
    return folder


def _pytest_suites(folder: Path) -> list[str]:
    return sorted(path.stem.removeprefix("bench_") for path in folder.glob("bench_*.py"))


def _run_memory(folder: Path, tier: str | None, environment: dict[str, str], out: Path) -> None:
    """The memory suite is scripts: they count bytes, and nobody takes turns.

    Full-size peaks are predicted on any machine; a tier's are also measured, where there is a GPU,
    within the memory of that card.
    """
    if tier is None:
        script = [str(folder / "memory.py"), "--out", str(out / "memory.json")]
    else:
        script = [str(folder / "fit_check.py"), "--tier", tier]
    done = subprocess.run([sys.executable, *script], env=environment, check=False)
    if done.returncode:
        raise typer.Exit(done.returncode)


def _run_timed(
    folder: Path, suites: list[str], arguments: list[str], environment: dict[str, str], out: Path
) -> None:
    """Run suites under pytest-benchmark in a process of its own, whose threads are pinned."""
    from importlib.util import find_spec

    from benchmarks.support.plots import scatter
    from benchmarks.support.results import collect, markdown, write_result
    from dpo_video.support.atomic import write_text, writing

    if find_spec("pytest_benchmark") is None:
        raise UserError(
            "The benchmarks need pytest-benchmark. Install it: pip install pytest-benchmark"
        )
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "report.json"
        done = subprocess.run(
            [
                sys.executable, "-m", "pytest", *(f"{folder}/bench_{s}.py" for s in suites),
                "-c", str(folder / "pytest.ini"), "--rootdir", str(folder),
                f"--benchmark-json={report}", "--benchmark-quiet", *arguments,
            ],
            env=environment, check=False, stdout=sys.stderr,
        )  # fmt: skip
        if done.returncode:
            raise UserError(
                "A benchmark failed, or none was picked; pytest's report is above. Nothing was "
                "written."
            )
        results = collect(json.loads(report.read_text(encoding="utf-8")))
    with writing(out):
        for result in results.values():
            write_result(out, result)
            for number, race in enumerate(result.races, start=1):
                if (picture := scatter(race)) is not None:
                    write_text(out / f"{result.suite}-{number}.svg", picture)
    for result in results.values():
        typer.echo(markdown(result))
    console.print(f"Written to {out}/", highlight=False)


def _compare(old: Path, new: Path, tolerance: float) -> None:
    from benchmarks.support.results import compared, read_results, regressions

    before, after = read_results(old), read_results(new)
    count = compared(before, after)
    if not count:
        raise UserError(
            f"'{old}' and '{new}' have no contestant in common that both ran beside the same "
            "yardstick. Compare results of the same suites."
        )
    _warn_of_differences(before, after)
    worse = regressions(before, after, tolerance)
    for each in worse:
        typer.echo(
            f"{each.suite}: {each.race}: {each.contestant} took {each.old:.3g} times the "
            f"yardstick's time, now {each.new:.3g} ({each.new / each.old - 1:+.0%})"
        )
    if worse:
        raise typer.Exit(REGRESSION)
    typer.echo(f"None of {count} contestants is slower by more than {tolerance:.0%}.")


def _warn_of_differences(old: dict[str, SuiteResult], new: dict[str, SuiteResult]) -> None:
    """Ratios carry over from machine to machine only roughly, and trials mean nothing."""
    for suite in sorted(old.keys() & new.keys()):
        before, after = old[suite], new[suite]
        if before.quick or after.quick:
            console.print(f"[yellow]{suite}: a trial (--quick), whose times mean nothing.[/]")
        for what in ("machine", "device", "threads", "clock"):
            then, now = getattr(before, what), getattr(after, what)
            if then != now:
                console.print(f"[yellow]{suite}: another {what}: {then}, now {now}.[/]")
