"""Run the benchmark suites, or compare two results: `dpo-video bench` starts this program.

    python -m benchmarks.bench [SUITE]...
    python -m benchmarks.bench --compare OLD NEW

Without a suite it runs all of them. Exit code 3 if --compare finds a candidate slower, or its peak
of memory larger, than --tolerance allows, 2 if the arguments were wrong.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from benchmarks.support.plots import scatter
from benchmarks.support.results import (
    SuiteResult,
    collect,
    compared,
    markdown,
    read_results,
    regressions,
    unmatched,
    write_result,
)
from benchmarks.support.tier_table import tier_table
from dpo_video.errors import UserError, unknown
from dpo_video.estimation.tiers import find_tier
from dpo_video.support.atomic import write_text, writing

FOLDER = Path(__file__).parent
ROOT = FOLDER.parent
REGRESSION = 3  # exit code
MEMORY = "memory"
SUITES = tuple(sorted(path.stem.removeprefix("bench_") for path in FOLDER.glob("bench_*.py")))


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dpo-video bench", description=__doc__.split("\n")[0].partition(":")[0] + "."
    )
    parser.add_argument(
        "suites", nargs="*", metavar="SUITE", help=f"{', '.join(SUITES)}; default: all"
    )
    parser.add_argument("--rounds", type=int, default=7, help="rounds per candidate")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of every candidate")
    parser.add_argument(
        "--clock", choices=("wall", "cpu"), default="wall",
        help="wall-clock time, or processor time, for machines that run other programs",
    )  # fmt: skip
    parser.add_argument("--only", metavar="WORDS", help='pytest -k expression: "Wan and toggle"')
    parser.add_argument(
        "--quick", action="store_true", help="trial run: smallest sizes, one round, no valid times"
    )
    parser.add_argument(
        "--tier", help="card of the memory suite: only its tests; default: all cards"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/bench"), help="folder of the results and pictures"
    )
    parser.add_argument(
        "--compare", nargs=2, type=Path, metavar=("OLD", "NEW"),
        help="run nothing; compare two results, files or folders",
    )  # fmt: skip
    parser.add_argument(
        "--tolerance", type=float, default=0.1,
        help="allowed relative rise of a relative time or a peak",
    )  # fmt: skip
    return parser


def bench(arguments: Sequence[str] | None = None) -> int:
    """Run suites or compare results.

    Returns:
        The exit code.

    Raises:
        UserError: if arguments contradict each other, or nothing was run.
    """
    given = options().parse_args(arguments)
    if given.compare is not None:
        if given.suites:
            raise UserError("--compare runs no suites. Run them first, then compare their results.")
        return compare(*given.compare, given.tolerance)
    suites = list(dict.fromkeys(given.suites or SUITES))
    for suite in suites:
        if suite not in SUITES:
            raise unknown("suite", suite, [*SUITES])
    if given.tier is not None and MEMORY not in suites:
        raise UserError("--tier is for the memory suite. Leave it out, or add that suite.")
    tier = None if given.tier is None else find_tier(given.tier).name
    if given.rounds < 1 or given.threads < 1:
        raise UserError("--rounds and --threads must be at least 1.")
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
        "OMP_NUM_THREADS": str(given.threads),
        "DPO_VIDEO_BENCH_THREADS": str(given.threads),
    }
    rounds = ["--rounds", str(1 if given.quick else given.rounds), "--clock", given.clock]
    rounds += ["--quick"] if given.quick else []
    rounds += ["--tier", tier] if tier else []
    rounds += ["-k", given.only] if given.only else []
    run_suites(suites, rounds, environment, given.out)
    return 0


def run_suites(
    suites: list[str], rounds: list[str], environment: dict[str, str], out: Path
) -> None:
    """Run suites under pytest-benchmark in a process of its own, with pinned threads."""
    if find_spec("pytest_benchmark") is None:
        raise UserError(
            "The benchmarks need pytest-benchmark. Install it: pip install pytest-benchmark"
        )
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "report.json"
        done = subprocess.run(
            [
                sys.executable, "-m", "pytest", *(f"{FOLDER}/bench_{s}.py" for s in suites),
                "-c", str(FOLDER / "pytest.ini"), "--rootdir", str(FOLDER),
                f"--benchmark-json={report}", "--benchmark-quiet", *rounds,
            ],
            env=environment, check=False, stdout=sys.stderr,
        )  # fmt: skip
        if done.returncode:
            raise UserError(
                "A benchmark failed, or --only selected none; pytest's report is above. No result "
                "was written."
            )
        results = collect(json.loads(report.read_text(encoding="utf-8")))
    with writing(out):
        for result in results.values():
            write_result(out, result)
            for number, group in enumerate(result.groups, start=1):
                if (picture := scatter(group)) is not None:
                    write_text(out / f"{result.suite}-{number}.svg", picture)
        if MEMORY in results:
            write_text(out / "tiers.md", tier_table([results[MEMORY]]))
    for result in results.values():
        print(markdown(result))
    print(f"Results: {out}/", file=sys.stderr)


def compare(old: Path, new: Path, tolerance: float) -> int:
    """Print the candidates that became slower or larger.

    Returns:
        REGRESSION if there are any, else 0.
    """
    before, after = read_results(old), read_results(new)
    count = compared(before, after)
    if not count:
        raise UserError(
            f"'{old}' and '{new}' have no candidate in common with the same baseline. Compare "
            "results of the same suites."
        )
    warn_of_differences(before, after)
    risen = regressions(before, after, tolerance)
    for each in risen:
        print(
            f"{each.suite}: {each.group}: {each.candidate}: {each.what} {each.old:.3g}, now "
            f"{each.new:.3g} ({each.new / each.old - 1:+.0%})"
        )
    if others := unmatched(before, after):
        print(f"Not compared, since only one side has them or their texts differ: {len(others)}")
        for other in others:
            print(f"- {other}")
    if not risen:
        print(f"None of {count} times, peaks and counts rose by more than {tolerance:.0%}.")
    return REGRESSION if risen else 0


def warn_of_differences(old: dict[str, SuiteResult], new: dict[str, SuiteResult]) -> None:
    """Print what makes a comparison less reliable: trial runs, other machines or settings."""
    for suite in sorted(old.keys() & new.keys()):
        before, after = old[suite], new[suite]
        if before.quick or after.quick:
            print(f"{suite}: a trial run (--quick); its times are meaningless.", file=sys.stderr)
        for field in ("machine", "device", "threads", "clock"):
            values = getattr(before, field), getattr(after, field)
            if values[0] != values[1]:
                print(f"{suite}: {field} differs: {values[0]}, now {values[1]}.", file=sys.stderr)


def main() -> None:
    try:
        code = bench()
    except UserError as error:
        print(f"Error: {error}", file=sys.stderr)
        code = 2
    sys.exit(code)


if __name__ == "__main__":
    main()
