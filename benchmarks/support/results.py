"""Results of benchmarks: candidates timed in rounds, and which became slower or larger.

A time depends on the machine and on its load. Groups of alternating candidates therefore have a
baseline, one candidate that is not ours, and two runs are compared by the ratios of candidate to
baseline. Memory and operations do not depend on the load and are compared as they are.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median, quantiles
from typing import Any, Literal, final

from pydantic import FiniteFloat, ValidationError

from dpo_video.errors import UserError, first_fault
from dpo_video.support.atomic import write_text
from dpo_video.support.statistics import Record

PEAK = "peak"
NEEDS = (PEAK, "CPU memory", "TFLOP per pair")
"""How the names of the figures begin that are compared as they are."""


@final
class Candidate(Record):
    """One of several ways to do the same work."""

    name: str
    seconds: tuple[FiniteFloat, ...]
    """Seconds per unit of work, one number per round."""
    flops: FiniteFloat | None = None
    """Operations per unit of work, where counted."""
    figures: Mapping[str, float | str] = {}
    """Further findings, such as accuracy; those that are compared begin as in `NEEDS`."""

    @property
    def median(self) -> float:
        """Median of the seconds per unit of work."""
        return median(self.seconds)

    @property
    def spread(self) -> float:
        """The interquartile range as a share of the median."""
        if len(self.seconds) < 2:
            return 0.0
        low, _, high = quantiles(self.seconds, n=4, method="inclusive")
        return (high - low) / self.median


@final
class Group(Record):
    """Candidates of the same work, timed in alternating rounds (A B C A B C ...) or one by one."""

    name: str
    unit: str
    """Unit of work: a pair, a frame pair, a call."""
    baseline: str | None
    """Name of the candidate that the others are compared with; None if they do not alternate."""
    candidates: tuple[Candidate, ...]
    missing: Mapping[str, str] = {}
    """Candidates that did not run: name to reason."""

    def of(self, name: str | None) -> Candidate | None:
        """The candidate of that name, or None if it did not run."""
        return next((each for each in self.candidates if each.name == name), None)

    def relative(self, name: str) -> float | None:
        """Time relative to the baseline: the median over the rounds of the ratio within a round.

        A disturbance of the machine affects both sides of a round.
        """
        mine, other = self.of(name), self.of(self.baseline)
        if mine is None or other is None:
            return None
        return median(a / b for a, b in zip(mine.seconds, other.seconds, strict=True))


@final
class SuiteResult(Record):
    """Result of one run of one suite."""

    format: Literal["dpo-video bench"] = "dpo-video bench"
    version: Literal[1] = 1
    suite: str
    machine: str
    """Description of the machine, without host names."""
    device: str
    """cpu, or the GPU's name."""
    threads: int
    clock: Literal["wall", "cpu"]
    """Wall-clock time, or processor time, which other programs disturb less."""
    versions: Mapping[str, str]
    commit: str
    quick: bool
    """Whether it was a trial run on the smallest sizes, whose times are meaningless."""
    groups: tuple[Group, ...]


@final
class Regression(Record):
    """A candidate whose time relative to the baseline, or whose peak memory, rose."""

    suite: str
    group: str
    candidate: str
    what: str
    """"relative time", or the name of a peak."""
    old: float
    new: float


def collect(report: Mapping[str, Any]) -> dict[str, SuiteResult]:
    """Results by suite from pytest-benchmark's report, with the rounds of a candidate combined.

    Args:
        report: pytest-benchmark's JSON, with what benchmarks/conftest.py adds to it.
    """
    rounds: dict[str, dict[str, dict[str, list[dict[str, Any]]]]] = defaultdict(
        lambda: defaultdict(lambda: defaultdict(list))
    )
    for run in report["benchmarks"]:
        about = run["extra_info"]
        seconds = [each / about["work"] for each in run["stats"]["data"]]
        rounds[about["suite"]][about["group"]][about["candidate"]].append(
            {**about, "seconds": seconds}
        )
    common = report["dpo_video"]
    return {
        suite: SuiteResult(
            suite=suite,
            commit=_commit(report.get("commit_info", {})),
            groups=tuple(
                _group(name, candidates, common["missing"].get(f"{suite}/{name}", {}))
                for name, candidates in groups.items()
            ),
            **{
                key: common[key]
                for key in ("machine", "device", "threads", "clock", "versions", "quick")
            },
        )
        for suite, groups in rounds.items()
    }


def _group(
    name: str, candidates: Mapping[str, Sequence[Mapping[str, Any]]], missing: Mapping[str, str]
) -> Group:
    about = next(iter(candidates.values()))[0]
    return Group(
        name=name,
        unit=about["unit"],
        baseline=about["baseline"],
        candidates=tuple(
            Candidate(
                name=candidate,
                seconds=tuple(each for run in runs for each in run["seconds"]),
                flops=runs[0]["flops"],
                figures=runs[0]["figures"],
            )
            for candidate, runs in candidates.items()
        ),
        missing=missing,
    )


def _commit(info: Mapping[str, Any]) -> str:
    """Short hash of the commit, with a plus if the working tree had changes."""
    return str(info.get("id", "unknown"))[:9] + ("+" if info.get("dirty") else "")


def read_results(path: Path) -> dict[str, SuiteResult]:
    """The results in a file, or in the files of a folder, by suite.

    Raises:
        UserError: if there are none, or a file cannot be read.
    """
    files = sorted(path.glob("*.json")) if path.is_dir() else [path]
    found = {}
    for file in files:
        try:
            result = SuiteResult.model_validate_json(file.read_bytes())
        except OSError as error:
            raise UserError(
                f"'{file}' cannot be read ({error.strerror}). Name results that `dpo-video bench` "
                "wrote."
            ) from error
        except ValidationError as error:
            if path.is_dir():
                continue  # a folder may hold other results
            raise UserError(
                f"'{file}' holds no results of `dpo-video bench` "
                f"({first_fault(error)}). Name a file that it wrote."
            ) from error
        found[result.suite] = result
    if not found:
        raise UserError(
            f"'{path}' holds no results of `dpo-video bench`. Name a file or folder that it wrote."
        )
    return found


def write_result(folder: Path, result: SuiteResult) -> None:
    """Write a suite's result as SUITE.json and as a table, SUITE.md."""
    write_text(folder / f"{result.suite}.json", result.model_dump_json(indent=1) + "\n")
    write_text(folder / f"{result.suite}.md", markdown(result))


def regressions(
    old: Mapping[str, SuiteResult], new: Mapping[str, SuiteResult], tolerance: float
) -> list[Regression]:
    """The candidates whose relative time, memory or operations rose by over `tolerance`.

    Args:
        old: Results by suite.
        new: Results by suite. What only one side has is left out.
        tolerance: Allowed relative rise: 0.1 is 10%.
    """
    return [each for each in _shared(old, new) if each.new > each.old * (1 + tolerance)]


def compared(old: Mapping[str, SuiteResult], new: Mapping[str, SuiteResult]) -> int:
    """Number of times and needs that both sides have."""
    return sum(1 for _ in _shared(old, new))


def unmatched(old: Mapping[str, SuiteResult], new: Mapping[str, SuiteResult]) -> list[str]:
    """What one side has and the other lacks, or what the other has with another text."""
    found = [f"suite {name}" for name in sorted(old.keys() ^ new.keys())]
    for suite in sorted(old.keys() & new.keys()):
        before, after = ({each.name: each for each in side[suite].groups} for side in (old, new))
        found += [f"{suite}: {name}" for name in sorted(before.keys() ^ after.keys())]
        for name in sorted(before.keys() & after.keys()):
            one, other = before[name], after[name]
            where = f"{suite}: {name}"
            if one.baseline != other.baseline:
                found.append(f"{where}: times (baseline {one.baseline}, now {other.baseline})")
            candidates = {each.name for each in one.candidates}
            for each in sorted(candidates ^ {each.name for each in other.candidates}):
                found.append(f"{where}: {each}")
            for mine in one.candidates:
                theirs = other.of(mine.name)
                figures = theirs.figures if theirs is not None else mine.figures
                found += [
                    f"{where}: {mine.name}: {figure} ({value}, now {figures.get(figure)})"
                    for figure, value in mine.figures.items()
                    if isinstance(value, str) and figures.get(figure) != value
                ]
    return found


def _shared(old: Mapping[str, SuiteResult], new: Mapping[str, SuiteResult]) -> Iterator[Regression]:
    for suite in old.keys() & new.keys():
        old_groups = {group.name: group for group in old[suite].groups}
        for group in new[suite].groups:
            earlier = old_groups.get(group.name)
            for each in group.candidates if earlier is not None else ():
                before, after = _compared(earlier, each.name), _compared(group, each.name)
                if earlier.baseline != group.baseline or each.name == group.baseline:
                    before.pop(_TIME, None)
                for what in before.keys() & after.keys():
                    yield Regression(
                        suite=suite, group=group.name, candidate=each.name, what=what,
                        old=before[what], new=after[what],
                    )  # fmt: skip


_TIME = "relative time"


def _compared(group: Group, name: str) -> dict[str, float]:
    """What is compared between two runs, by name."""
    candidate, relative = group.of(name), group.relative(name)
    if candidate is None:
        return {}
    found = {
        figure: float(value)
        for figure, value in candidate.figures.items()
        if figure.startswith(NEEDS) and isinstance(value, float | int)
    }
    return found if relative is None else {_TIME: relative, **found}


# --- tables ------------------------------------------------------------------------------------


def markdown(result: SuiteResult) -> str:
    """Tables of a suite's groups, in Markdown."""
    versions = ", ".join(f"{name} {version}" for name, version in result.versions.items())
    threads = "1 thread" if result.threads == 1 else f"{result.threads} threads"
    lines = [f"# {result.suite}", ""]
    if result.quick:
        lines += ["**A trial run on the smallest sizes: these times are meaningless.**", ""]
    alternating = "alternating " if any(group.baseline for group in result.groups) else ""
    clock = "processor time" if result.clock == "cpu" else "wall clock"
    lines += [
        f"Measured on {result.machine}, {threads}, device {result.device}, {clock}; {versions}; "
        f"commit {result.commit}. Medians over {alternating}rounds; spread is the interquartile "
        "range relative to the median.",
        "",
    ]
    for group in result.groups:
        lines += [f"## {group.name}", "", *_table(group), ""]
        lines += [f"Not run: {name} ({reason})." for name, reason in group.missing.items()]
        lines += [""] if group.missing else []
    return "\n".join(lines)


def _table(group: Group) -> Iterator[str]:
    """Lines of a table with aligned columns, readable in a terminal and as Markdown."""
    rows = list(_cells(group))
    widths = [max(3, *(len(row[column]) for row in rows)) for column in range(len(rows[0]))]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    for row in (rows[0], rule, *rows[1:]):
        aligned = [row[0].ljust(widths[0])]
        aligned += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        yield f"| {' | '.join(aligned)} |"


def _cells(group: Group) -> Iterator[list[str]]:
    names = list(dict.fromkeys(name for each in group.candidates for name in each.figures))
    baseline = group.of(group.baseline)
    counted = baseline.flops if baseline is not None else None
    head = ["", f"ms per {group.unit}", "spread", f"{group.unit}s per second"]
    head += ["relative time"] if group.baseline else []
    yield [*head, *(["GFLOP", "relative FLOP/s"] if counted else []), *names]
    for each in group.candidates:
        relative = group.relative(each.name)
        row = [
            f"**{each.name}** (baseline)" if each.name == group.baseline else each.name,
            _short(1000 * each.median),
            f"{each.spread:.0%}",
            _short(1 / each.median),
        ]
        if group.baseline:
            row += ["" if relative is None else _short(relative)]
        if counted:
            row += (
                ["", ""]
                if each.flops is None or relative is None
                else [_short(each.flops / 1e9), f"{each.flops / counted / relative:.0%}"]
            )
        yield row + [_figure(each.figures.get(name, "")) for name in names]


def _figure(value: float | str) -> str:
    return value if isinstance(value, str) else _short(value)


def _short(value: float) -> str:
    """A number with three significant digits."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
