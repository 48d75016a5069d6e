"""Results of benchmarks: contestants that took turns in one run, and which of them became slower.

A time by itself says little: it depends on the machine, and on what else runs there. So every race
has a yardstick, one contestant that is not ours, and what is compared between two runs is how each
contestant does beside the yardstick of its own run.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median, quantiles
from typing import Any, Literal, final

from pydantic import ValidationError

from dpo_video.errors import UserError, first_fault
from dpo_video.support.atomic import write_text
from dpo_video.support.statistics import Record


@final
class Contestant(Record):
    """One of those that did the same work in turns."""

    name: str
    seconds: tuple[float, ...]
    """Of one unit of work, one number a turn."""
    flops: float | None = None
    """Operations in one unit of work, where they were counted."""
    figures: Mapping[str, float | str] = {}
    """What else was found out about it, such as how accurate it is."""

    @property
    def median(self) -> float:
        """Seconds of one unit of work."""
        return median(self.seconds)

    @property
    def spread(self) -> float:
        """The interquartile range as a share of the median."""
        if len(self.seconds) < 2:
            return 0.0
        low, _, high = quantiles(self.seconds, n=4, method="inclusive")
        return (high - low) / self.median


@final
class Race(Record):
    """Contestants that took turns: A B C A B C ..."""

    name: str
    unit: str
    """Of work: a pair, a frame pair, a call."""
    yardstick: str
    """The contestant that the others are measured by."""
    contestants: tuple[Contestant, ...]
    missing: Mapping[str, str] = {}
    """Contestants that could not start, and why."""

    def of(self, name: str) -> Contestant | None:
        """The contestant of that name, if it started."""
        return next((each for each in self.contestants if each.name == name), None)

    def relative(self, name: str) -> float | None:
        """Time over the yardstick's: the median over the turns of each turn's own ratio.

        What disturbs a machine for a while disturbs both sides of a turn.
        """
        mine, other = self.of(name), self.of(self.yardstick)
        if mine is None or other is None:
            return None
        return median(a / b for a, b in zip(mine.seconds, other.seconds, strict=True))


@final
class SuiteResult(Record):
    """What one run of one suite found."""

    format: Literal["dpo-video bench"] = "dpo-video bench"
    version: Literal[1] = 1
    suite: str
    machine: str
    """In words; no names of hosts."""
    device: str
    """cpu, or the GPU's name."""
    threads: int
    clock: Literal["wall", "cpu"]
    """The time that passed, or that processors worked: other programs disturb the latter less."""
    versions: Mapping[str, str]
    commit: str
    quick: bool
    """Whether it was a trial on the smallest sizes, whose times mean nothing."""
    races: tuple[Race, ...]


@final
class Regression(Record):
    """A contestant that does worse beside its yardstick than it did."""

    suite: str
    race: str
    contestant: str
    old: float
    """Time over the yardstick's."""
    new: float


def collect(report: Mapping[str, Any]) -> dict[str, SuiteResult]:
    """What pytest-benchmark reported, by suite; the turns of a contestant put together.

    Args:
        report: Its JSON, with `extra_info` and `dpo_video` as benchmarks/conftest.py adds them.
    """
    turns: dict[str, dict[str, dict[str, list[dict[str, Any]]]]] = defaultdict(
        lambda: defaultdict(lambda: defaultdict(list))
    )
    for run in report["benchmarks"]:
        about = run["extra_info"]
        seconds = run["stats"]["median"] / about["work"]
        turns[about["suite"]][about["race"]][about["contestant"]].append(
            {**about, "seconds": seconds}
        )
    common = report["dpo_video"]
    return {
        suite: SuiteResult(
            suite=suite,
            commit=_commit(report.get("commit_info", {})),
            races=tuple(
                _race(name, contestants, common["missing"].get(f"{suite}/{name}", {}))
                for name, contestants in races.items()
            ),
            **{
                key: common[key]
                for key in ("machine", "device", "threads", "clock", "versions", "quick")
            },
        )
        for suite, races in turns.items()
    }


def _race(
    name: str, contestants: Mapping[str, Sequence[Mapping[str, Any]]], missing: Mapping[str, str]
) -> Race:
    about = next(iter(contestants.values()))[0]
    return Race(
        name=name,
        unit=about["unit"],
        yardstick=about["yardstick"],
        contestants=tuple(
            Contestant(
                name=contestant,
                seconds=tuple(turn["seconds"] for turn in runs),
                flops=runs[0]["flops"],
                figures=runs[0]["figures"],
            )
            for contestant, runs in contestants.items()
        ),
        missing=missing,
    )


def _commit(info: Mapping[str, Any]) -> str:
    """The commit's short name, with a plus where files had changed since."""
    return str(info.get("id", "unknown"))[:9] + ("+" if info.get("dirty") else "")


def read_results(where: Path) -> dict[str, SuiteResult]:
    """The results in a file, or in the files of a folder, by suite.

    Raises:
        UserError: if there are none, or what is there cannot be read.
    """
    paths = sorted(where.glob("*.json")) if where.is_dir() else [where]
    found = {}
    for path in paths:
        try:
            result = SuiteResult.model_validate_json(path.read_bytes())
        except OSError as error:
            raise UserError(
                f"'{path}' cannot be read ({error.strerror}). Name results that `dpo-video bench` "
                "wrote."
            ) from error
        except ValidationError as error:
            if where.is_dir():
                continue  # other results may lie beside them
            raise UserError(
                f"'{path}' holds no results of `dpo-video bench` "
                f"({first_fault(error)}). Name a file that it wrote."
            ) from error
        found[result.suite] = result
    if not found:
        raise UserError(
            f"'{where}' holds no results of `dpo-video bench`. Name a file or folder that it wrote."
        )
    return found


def write_result(folder: Path, result: SuiteResult) -> None:
    """Write a suite's numbers, and the table that shows them, as SUITE.json and SUITE.md."""
    write_text(folder / f"{result.suite}.json", result.model_dump_json(indent=1) + "\n")
    write_text(folder / f"{result.suite}.md", markdown(result))


def regressions(
    old: Mapping[str, SuiteResult], new: Mapping[str, SuiteResult], tolerance: float
) -> list[Regression]:
    """The contestants whose time over the yardstick's rose by more than a share of the old one.

    Args:
        old: Results by suite.
        new: Results by suite. What only one side has is left out.
        tolerance: A share: 0.1 lets a ratio rise by a tenth.
    """
    found = []
    for suite, race, contestant, before, after in _shared(old, new):
        if after > before * (1 + tolerance):
            found.append(
                Regression(suite=suite, race=race, contestant=contestant, old=before, new=after)
            )
    return found


def compared(old: Mapping[str, SuiteResult], new: Mapping[str, SuiteResult]) -> int:
    """How many contestants both sides have."""
    return sum(1 for _ in _shared(old, new))


def _shared(
    old: Mapping[str, SuiteResult], new: Mapping[str, SuiteResult]
) -> Iterator[tuple[str, str, str, float, float]]:
    for suite in old.keys() & new.keys():
        earlier = {race.name: race for race in old[suite].races}
        for race in new[suite].races:
            before = earlier.get(race.name)
            if before is None or before.yardstick != race.yardstick:
                continue
            for each in race.contestants:
                then, now = before.relative(each.name), race.relative(each.name)
                if each.name != race.yardstick and then is not None and now is not None:
                    yield suite, race.name, each.name, then, now


# --- tables ------------------------------------------------------------------------------------


def markdown(result: SuiteResult) -> str:
    """A suite's races as tables."""
    versions = ", ".join(f"{name} {version}" for name, version in result.versions.items())
    threads = "1 thread" if result.threads == 1 else f"{result.threads} threads"
    lines = [f"# {result.suite}", ""]
    if result.quick:
        lines += ["**A trial on the smallest sizes: these times mean nothing.**", ""]
    clock = "processor time" if result.clock == "cpu" else "wall clock"
    lines += [
        f"Measured on {result.machine}, {threads}, device {result.device}, {clock}; {versions}; "
        f"commit {result.commit}. Contestants took turns; medians, and the interquartile range as "
        "a share of them.",
        "",
    ]
    for race in result.races:
        lines += [f"## {race.name}", "", *_table(race), ""]
        lines += [f"Not run: {name} ({reason})." for name, reason in race.missing.items()]
        lines += [""] if race.missing else []
    return "\n".join(lines)


def _table(race: Race) -> Iterator[str]:
    """In columns of even width, which a terminal shows as well as a page does."""
    rows = list(_cells(race))
    widths = [max(3, *(len(row[column]) for row in rows)) for column in range(len(rows[0]))]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    for row in (rows[0], rule, *rows[1:]):
        aligned = [row[0].ljust(widths[0])]
        aligned += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        yield f"| {' | '.join(aligned)} |"


def _cells(race: Race) -> Iterator[list[str]]:
    names = list(dict.fromkeys(name for each in race.contestants for name in each.figures))
    yardstick = race.of(race.yardstick)
    counted = yardstick.flops if yardstick is not None else None
    head = ["", f"ms per {race.unit}", "spread", f"{race.unit}s per second", "time over yardstick"]
    yield [*head, *(["GFLOP", "of the yardstick's FLOP/s"] if counted else []), *names]
    for each in race.contestants:
        relative = race.relative(each.name)
        row = [
            f"**{each.name}** (yardstick)" if each.name == race.yardstick else each.name,
            _short(1000 * each.median),
            f"{each.spread:.0%}",
            _short(1 / each.median),
            "" if relative is None else _short(relative),
        ]
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
    """Three digits that count."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
