"""Fuzzing: damage every input that is read, and check that each reader refuses it properly.

    OMP_NUM_THREADS=1 python -m benchmarks.trust.fuzz --seed 0 --cases 50000

The law: a reader returns a result or raises a UserError of one line. Any other exception, a crash,
a case that takes more than SECONDS of processor time or WALL seconds in all, or that adds more than
MEMORY, and a file created by a pickle are findings. One case in forty of a reader of files finds no
file in its place, but a pipe, a folder, a link, a device or a socket. A case depends only on seed,
reader and number; --reader NAME --only NUMBER repeats it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import resource
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from benchmarks.trust import mutate

SECONDS = 5.0  # processor time of a case; most take milliseconds
WALL = 20.0  # seconds of a case, which may wait for something
STUCK = 120.0  # seconds without an answer: a library that no signal interrupts
MEMORY = 512 << 20  # bytes that a case may add to the peak
CHUNK = 400  # cases per process
SLOW = {"adapter config": 40, "adapter weights": 40, "command line": 8, "checkpoint state": 4,
        "checkpoint weights": 4, "checkpoint pointer": 8, "checkpoint manifest": 8,
        "requests to the page": 8, "films in HDR and with alpha": 2, "entries.toml": 2}  # fmt: skip
"""Divisors of the number of cases, for readers that load an adapter or run a command."""
TIMERS = (
    (signal.SIGPROF, signal.ITIMER_PROF, SECONDS),
    (signal.SIGALRM, signal.ITIMER_REAL, WALL),
)
SPECIAL_SHARE = 1 / 40  # of the cases
RESULT = Path("benchmarks/results/0.1.0/fuzz.json")


class HangError(BaseException):
    """A case took too long. A BaseException, so that no reader's `except Exception` catches it."""


@dataclass
class Tally:
    """Counts of a reader's results, and its findings."""

    cases: int = 0
    accepted: int = 0
    refused: int = 0
    findings: list[dict[str, Any]] = field(default_factory=list)


def case_of(seed: int, name: str, number: int) -> Random:
    return Random(f"{seed} {name} {number}")


def try_case(reading: Any, seed: int, name: str, number: int) -> tuple[str, str]:
    """Run a case: `("accepted" | "refused" | a finding, its detail)`."""
    from dpo_video.errors import UserError

    random = case_of(seed, name, number)
    data = reading.damage(random, random.choice(reading.seeds), reading.seeds)
    if reading.file and random.random() < SPECIAL_SHARE:
        data = random.choice(sorted(mutate.SPECIAL))
    before = _peak(reset=True)

    def stop(*_: object) -> None:
        raise HangError

    for number_of_signal, timer, limit in TIMERS:
        signal.signal(number_of_signal, stop)
        signal.setitimer(timer, limit)
    try:
        reading.read(data)
        verdict = ("accepted", "")
    except UserError as error:
        text = str(error)
        sentence = "\n" not in text and len(text) > 10
        verdict = ("refused", "") if sentence else ("not one sentence", repr(text[:300]))
    except HangError:
        verdict = ("hang", _line_of_error())
    except BaseException as error:
        frames = traceback.extract_tb(error.__traceback__)
        ours = [f for f in frames if "dpo_video" in f.filename and "fuzz" not in f.filename]
        where = f"{Path(ours[-1].filename).name}:{ours[-1].name}" if ours else "?"
        line = (str(error).strip().splitlines() or [""])[0]
        verdict = (type(error).__name__, f"{where}: {line[:200]}")
    finally:
        for _, timer, _ in TIMERS:
            signal.setitimer(timer, 0)
    grown = _peak() - before
    if grown > MEMORY:
        verdict = ("memory", f"{grown >> 20} MiB more")
    for created in (Path("touched"), Path("/tmp/touched")):
        if created.exists():
            created.unlink()
            verdict = ("code ran", "a pickle created a file")
    return verdict


def _peak(reset: bool = False) -> int:
    """The largest memory of this process in bytes, since the last reset where Linux can."""
    with contextlib.suppress(OSError):
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
        status = Path("/proc/self/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _line_of_error() -> str:
    return traceback.format_exc().splitlines()[-2].strip()


def run_reader(bench: Any, name: str, seed: int, numbers: Sequence[int]) -> Tally:
    """All cases of a reader, one process per chunk: a crash loses one case."""
    tally = Tally()
    remaining = list(numbers)
    while remaining:
        chunk = remaining[:CHUNK]
        answers = list(_in_a_process(bench, name, seed, chunk))
        for number, verdict, detail in answers:
            tally.cases += 1
            if verdict in ("accepted", "refused"):
                setattr(tally, verdict, getattr(tally, verdict) + 1)
            else:
                tally.findings.append({"case": number, "what": verdict, "where": detail})
                print(f"{name} {number}: {verdict} {detail}", flush=True)
        remaining = remaining[len(answers) :]
    return tally


def _in_a_process(
    bench: Any, name: str, seed: int, numbers: Sequence[int]
) -> Iterator[tuple[int, str, str]]:
    """Run cases in a forked process, which imports nothing again and answers through a pipe."""
    import select

    from benchmarks.trust.readers import READERS

    receiving, sending = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(receiving)
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        warnings.simplefilter("ignore")
        try:
            reading = READERS[name](bench)
            for number in numbers:
                verdict, detail = try_case(reading, seed, name, number)
                os.write(sending, (json.dumps([number, verdict, detail]) + "\n").encode())
        except BaseException:
            text = traceback.format_exc()
            os.write(sending, (json.dumps([numbers[0], "broken bench", text]) + "\n").encode())
        os._exit(0)
    os.close(sending)
    received = b""
    count = 0
    try:
        while count < len(numbers):
            ready, _, _ = select.select([receiving], [], [], STUCK)
            part = os.read(receiving, 1 << 16) if ready else b""
            if not part:
                verdict = "crash" if ready else "hang in a library"
                yield numbers[count], verdict, ""
                return
            received += part
            *lines, received = received.split(b"\n")
            for line in lines:
                count += 1
                number, verdict, detail = json.loads(line)
                yield number, verdict, detail
                if verdict == "broken bench":
                    return
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(receiving)


def campaign(
    seed: int, cases: int, readers: Sequence[str], only: int | None, minutes: float = math.inf
) -> dict[str, Any]:
    """Run the campaign in a temporary folder, and return the result to publish."""
    import torch

    from benchmarks.trust.reading import Bench
    from tests.small_animatediff import save_small_animatediff

    torch.set_num_threads(1)
    started = time.monotonic()
    tallies = {}
    weights = {name: 1 / SLOW.get(name, 1) for name in readers}
    home = Path.cwd()
    with tempfile.TemporaryDirectory() as scratch:
        os.chdir(scratch)
        try:
            checkpoint = save_small_animatediff(Path(scratch) / "small")
            for name in readers:
                if time.monotonic() - started > 60 * minutes:
                    break
                folder = Path(scratch) / name.replace(" ", "-").strip("-")
                folder.mkdir()
                bench = Bench(folder, checkpoint)
                count = math.ceil(cases * weights[name] / sum(weights.values()))
                numbers = range(count) if only is None else [only]
                tallies[name] = run_reader(bench, name, seed, numbers)
                print(f"{name:20} {tallies[name].cases:6} cases, {tallies[name].accepted:6} "
                      f"accepted, {len(tallies[name].findings):4} findings, "
                      f"{time.monotonic() - started:6.0f} s", flush=True)  # fmt: skip
        finally:
            os.chdir(home)
    return {
        "seed": seed,
        "cases": sum(tally.cases for tally in tallies.values()),
        "seconds": round(time.monotonic() - started),
        "findings": sum(len(tally.findings) for tally in tallies.values()),
        "readers": {name: vars(tally) for name, tally in tallies.items()},
    }


def main() -> None:
    from benchmarks.trust.readers import READERS

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cases", type=int, default=50_000)
    parser.add_argument("--reader", action="append", choices=sorted(READERS))
    parser.add_argument("--only", type=int, help="number of the only case of each reader")
    parser.add_argument(
        "--minutes", type=float, default=math.inf, help="start no reader after these minutes"
    )
    parser.add_argument("--out", type=Path, help=f"for example {RESULT}")
    given = parser.parse_args()
    result = campaign(
        given.seed, given.cases, given.reader or list(READERS), given.only, given.minutes
    )
    kinds: dict[str, int] = {}
    for name, tally in result["readers"].items():
        for finding in tally["findings"]:
            key = f"{name}: {finding['what']} {finding['where']}"
            kinds[key] = kinds.get(key, 0) + 1
    for key, count in sorted(kinds.items(), key=lambda item: -item[1])[:200]:
        print(f"{count:6} {key}")
    if given.out:
        fixed = Path(__file__).with_name("found.json")
        result["found and fixed"] = json.loads(fixed.read_text(encoding="utf-8"))["fuzz"]
        given.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    sys.exit(1 if result["findings"] else 0)


if __name__ == "__main__":
    main()
