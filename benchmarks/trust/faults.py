"""Fail every command at random moments, go on, and compare with what was never disturbed.

    OMP_NUM_THREADS=1 python -m benchmarks.trust.faults --seed 0 --faults 200

build (by one process, and by two workers at once), pack, label, train, evaluate and export run on a
small model of the real classes, each in a process forked from this one. A fault is a signal after a
random time, or a disk that fails at a random operation (see faulty.py); of two workers, the second
is killed as well, or goes on. The law: what is reported is one sentence; the same command (train
with --resume) then ends in the same bytes as the undisturbed one, apart from times and, where two
have built, the order of lines. Campaigns may run side by side.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any

from benchmarks.trust.faulty import KINDS, Disk

SIGNALS = ("SIGKILL", "SIGTERM")
PATIENCE = 120.0  # seconds for a command that takes one or two
RESULT = Path("benchmarks/results/0.1.0/faults.json")
TIMES = {"seconds", "eta_seconds", "pairs_per_second", "memory_gib", "time"}
STAGES = ("build", "workers", "pack", "label", "train", "cached", "evaluate", "export")
STOPPED = 143


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of one fault."""

    stage: str
    fault: str
    at: float
    """Seconds or operations."""
    code: int
    """Of the disturbed command; negative for a signal."""
    seconds: float
    """From the signal to the end."""
    wrong: str
    """"" if the law held."""


@dataclass(frozen=True, kw_only=True)
class Ended:
    code: int
    output: str
    started: float
    seconds: float


def arguments(stage: str, checkpoint: Path, again: bool) -> list[str]:
    """The command of a stage, in a folder that holds `work/`; `again` for going on."""
    from tests.small_animatediff import SHAPE

    model = ["--backbone=animatediff", f"--set=backbone.model={checkpoint}",
             f"--set=backbone.frames={SHAPE.frames}", f"--set=backbone.height={SHAPE.height}",
             f"--set=backbone.width={SHAPE.width}", "--device=cpu"]  # fmt: skip
    train = [
        "train",
        "--pairs=work/pairs/",
        "--loss=global",
        *model,
        "--steps=2",
        "--set=train.save_steps=1",
        "--set=train.save_total_limit=1",
        "--set=train.gradient_accumulation_steps=1",
        "--set=train.rank=2",
        "--set=train.report_to=none",
        "--metric=frame_difference",
    ]
    go_on = ["train", "--out=work/run", "--resume"]
    build = [
        "build",
        "--pairs=jitter",
        "--set=pairs.num_inference_steps=2",
        "--prompt=a red square",
        *model,
        "--count=4",
        "--out=work/pairs",
    ]
    return {
        "build": build,
        "workers": build if again else [*build, "--worker=1/2"],
        "pack": ["pack", "work/pairs", "work/packed", "--shard-mib=1"],
        "label": [
            "label",
            "work/pairs",
            "--labeler=metric",
            "--set=labeler.weights={frame_difference=1}",
            "--set=labeler.motion=",
        ],
        "train": go_on if again else [*train, "--set=train.validation_videos=1", "--out=work/run"],
        "cached": go_on
        if again
        else [*train, "--set=train.validation_videos=0", "--reference=cached", "--out=work/run"],
        "evaluate": [
            "evaluate",
            "work/run",
            "--seeds=2",
            "--set=evaluate.num_inference_steps=1",
            "--device=cpu",
        ],
        "export": ["export", "work/run", "--out=work/export", "--device=cpu"],
    }[stage]


def start(
    command: Sequence[str],
    place: Path,
    disk: Disk | None,
    said: str = "output.txt",
    dies_after: float = 0.0,
) -> tuple[int, Path]:
    """Fork a process that runs a command in a folder; its id and its output.

    It is killed, as if by SIGKILL, after so many seconds if it is told to.
    """
    output = place / said
    output.unlink(missing_ok=True)  # of the command that made what this one works on
    child = os.fork()
    if child:
        return child, output
    code = 99
    try:
        os.setsid()
        signal.setitimer(signal.ITIMER_REAL, dies_after)  # nobody handles SIGALRM
        os.chdir(place)
        target = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(target, 1)
        os.dup2(target, 2)
        sys.argv = ["dpo-video", *command]
        if disk is not None:
            disk.install()
        from dpo_video.cli import main

        try:
            main()
            code = 0
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        except BaseException:
            import traceback

            os.write(2, traceback.format_exc().encode())
            code = 1
        if disk is not None:
            disk.report(place / "work.synced")
        sys.stdout.flush()
    finally:
        os._exit(code)


def finish(child: int, output: Path, since: float) -> Ended:
    """Wait for it; what takes longer than PATIENCE is killed and has code -1000."""
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        taken = time.monotonic() - since
        if done:
            code = os.waitstatus_to_exitcode(status)
            break
        if taken > PATIENCE:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            code = -1000
            break
        time.sleep(0.01)
    text = output.read_text(errors="replace") if output.exists() else ""
    return Ended(code=code, output=text, started=since, seconds=time.monotonic() - since)


def run(command: Sequence[str], place: Path, disk: Disk | None = None) -> Ended:
    return finish(*start(command, place, disk), time.monotonic())


def tree(place: Path, stage: str) -> dict[str, str]:
    """Hashes of what a stage is for, without times; scratch files count as wrong."""
    work = place / "work"
    found = {}
    for path in sorted(work.rglob("*")):
        name = path.relative_to(work).as_posix()
        if path.is_dir() or (
            name.startswith("run/checkpoints/step_") and "step_000002" not in name
        ):
            continue
        if path.suffix == ".html" or (
            name.startswith("run/samples/") and "step_000002" not in name
        ):
            continue
        data = path.read_bytes()
        if path.suffix == ".jsonl":
            lines = [
                json.dumps({k: v for k, v in json.loads(line).items() if k not in TIMES}).encode()
                for line in data.splitlines()
            ]
            data = b"\n".join(sorted(lines) if path.name == "pairs.jsonl" else lines)
        if path.name == "evaluation.json":
            data = json.dumps(json.loads(data)["metrics"]).encode()
        found[name] = hashlib.sha256(data).hexdigest()[:12]
    return found


class Campaign:
    """The stages' inputs, undisturbed outputs and lengths, once; then faults."""

    def __init__(self, folder: Path, checkpoint: Path, stages: Sequence[str]) -> None:
        self.folder, self.checkpoint = folder, checkpoint
        self._second = [*arguments("build", checkpoint, False), "--worker=2/2"]
        self.before: dict[str, Path] = {}
        self.wanted: dict[str, dict[str, str]] = {}
        self.operations: dict[str, int] = {}
        self.seconds: dict[str, float] = {}
        self.endings: dict[str, str] = {}
        needs = {
            **dict.fromkeys(("pack", "label", "train", "cached"), "build"),
            **dict.fromkeys(("evaluate", "export"), "train"),
        }
        for stage in STAGES:
            wanted = {*stages, *(needs.get(each) for each in stages), "build"}
            if stage not in wanted:
                continue
            place = folder / f"whole-{stage}"
            if stage in needs:
                shutil.copytree(folder / f"whole-{needs[stage]}", place)
            else:
                (place / "work").mkdir(parents=True)
            self.before[stage] = folder / f"before-{stage}"
            shutil.copytree(place, self.before[stage])
            ended = run(arguments(stage, checkpoint, False), place, Disk(place / "work"))
            if ended.code:
                raise RuntimeError(f"{stage} fails undisturbed: {ended.output}")
            if stage == "workers":
                run(self._second, place)
            self.wanted[stage] = tree(place, stage)
            if stage == "workers" and self.wanted[stage] != self.wanted["build"]:
                raise RuntimeError("two workers make another set than one")
            self.seconds[stage] = ended.seconds
            self.endings[stage] = ended.output.rstrip().splitlines()[-1]
            told = json.loads((place / "work.synced").read_text())
            self.operations[stage] = told["count"]

    def fault(self, stage: str, fault: str, random: Random) -> Outcome:
        """Disturb a stage once, or twice in a row; then let it finish."""
        place = self.folder / "now"
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(self.before[stage], place)
        command = arguments(stage, self.checkpoint, False)
        disturb = self._disturb_two if stage == "workers" else self._disturb
        at, ended = disturb(stage, fault, command, place, random)
        wrong = _said(ended, fault, self.endings[stage])
        again = stage == "workers" or (place / "work/run/run.toml").exists()
        last = run(arguments(stage, self.checkpoint, again), place)
        if stage == "export" and ended.code == 0:
            last = ended  # it was through already, and never overwrites
        if not wrong and last.code:
            wrong = f"going on ends with {last.code}: {last.output[-600:]}"
        if not wrong:
            found, wanted = tree(place, stage), self.wanted[stage]
            if found != wanted:
                names = sorted(
                    k for k in found.keys() | wanted.keys() if found.get(k) != wanted.get(k)
                )
                wrong = f"other bytes: {', '.join(names[:8])}"
        return Outcome(stage=stage, fault=fault, at=at, code=ended.code, seconds=ended.seconds,
                       wrong=wrong)  # fmt: skip

    def _disturb_two(
        self, stage: str, fault: str, command: list[str], place: Path, random: Random
    ) -> tuple[float, Ended]:
        """The second worker is killed at a moment of its own, or is not."""
        survives = fault == "power" or random.random() < 0.3  # what it has synced outlives the cut
        dies_after = 0.0 if survives else random.uniform(0.01, 2 * self.seconds[stage])
        second = start(self._second, place, None, "second.txt", dies_after)
        since = time.monotonic()
        if fault == "power":
            finish(*second, since)
            time.sleep(0.1)  # the cut tells by its time what the first has written
        found = self._disturb(stage, fault, command, place, random)
        if fault != "power":
            finish(*second, since)
        return found

    def _disturb(
        self, stage: str, fault: str, command: list[str], place: Path, random: Random
    ) -> tuple[float, Ended]:
        if fault in SIGNALS:
            child, output = start(command, place, None)
            after = random.uniform(0, self.seconds[stage])
            time.sleep(after)
            since = time.monotonic()
            os.kill(child, getattr(signal, fault))
            return round(after, 3), finish(child, output, since)
        at = random.randrange(1, self.operations[stage] + 1)
        began = time.time()
        ended = run(command, place, Disk(place / "work", fault, at))
        if fault == "power":
            _cut_power(place, began, random)
        return at, ended


def _cut_power(place: Path, began: float, random: Random) -> None:
    """Take from every file written since what was not synced: all of it, or a part."""
    told = place / "work.synced"
    synced = json.loads(told.read_text())["synced"] if told.exists() else {}
    for path in sorted((place / "work").rglob("*")):
        if path.is_file() and path.stat().st_mtime >= began - 0.05:
            size = path.stat().st_size
            kept = min(synced.get(os.path.realpath(path), 0), size)
            os.truncate(path, random.choice((kept, random.randint(kept, size))))


def _said(ended: Ended, fault: str, ending: str) -> str:
    """What is wrong with how a disturbed command ended; `ending` is its last line undisturbed."""
    if "Traceback" in ended.output:
        return f"a traceback: {ended.output[-1500:]}"
    allowed = {"SIGKILL": (0, -9), "SIGTERM": (0, STOPPED), "full": (0, 2), "broken": (0, 2)}
    if ended.code not in allowed.get(fault, (0, -9)):
        # Nobody catches it before the program has begun, nor once it is through.
        outside = not ended.output or ended.output.rstrip().endswith(ending)
        if fault == "SIGTERM" and ended.code == -signal.SIGTERM and outside:
            return ""
        return f"exit code {ended.code}: {ended.output[-600:]}"
    if ended.code == 2 and ended.output.count("Error:") != 1:
        return f"not one sentence: {ended.output[-600:]}"
    if ended.code == STOPPED and "Go on by" not in ended.output:
        return f"it does not say how to go on: {ended.output[-300:]}"
    return ""


def campaign(
    seed: int,
    faults: int,
    stages: Sequence[str],
    told: Callable[[Outcome], None],
    minutes: float = float("inf"),
) -> dict[str, Any]:
    """Run it in a folder that is thrown away; what to publish of it."""
    import torch

    from tests.small_animatediff import save_small_animatediff

    torch.set_num_threads(1)
    started = time.monotonic()
    outcomes: list[Outcome] = []
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = save_small_animatediff(Path(folder) / "small")
        _warm_up(checkpoint)
        made = Campaign(Path(folder), checkpoint, stages)
        kinds = (*SIGNALS, *KINDS)
        for number in range(faults):
            if time.monotonic() - started > 60 * minutes:
                break
            random = Random(f"{seed} {number}")
            stage = stages[number % len(stages)]
            fault = kinds[number // len(stages) % len(kinds)]
            outcomes.append(made.fault(stage, fault, random))
            told(outcomes[-1])
    stopping = [o.seconds for o in outcomes if o.fault == "SIGTERM" and o.code == STOPPED]
    return {
        "seed": seed,
        "faults": len(outcomes),
        "seconds": round(time.monotonic() - started),
        "wrong": sum(bool(outcome.wrong) for outcome in outcomes),
        "seconds from SIGTERM to the end": {
            "median": sorted(stopping)[len(stopping) // 2] if stopping else None,
            "largest": max(stopping, default=None),
        },
        "outcomes": [asdict(outcome) for outcome in outcomes],
    }


def _warm_up(checkpoint: Path) -> None:
    """Import whatever a command does, so that a fork has it; no gradient, which makes threads."""
    import importlib
    import pkgutil

    import torch

    import dpo_video
    from dpo_video.diffusion.initial_noise import initial_noise
    from dpo_video.settings import TrainSettings
    from dpo_video.training.lora import adapt
    from tests.small_animatediff import load_small

    for module in pkgutil.walk_packages(dpo_video.__path__, "dpo_video."):
        if not module.name.endswith(("__main__", "recipe", "judge_recipe")):
            importlib.import_module(module.name)
    model = load_small(checkpoint)
    with torch.no_grad():
        latents = model.sample(
            model.encode_prompts(["a"]), initial_noise(model, [0]), num_inference_steps=1
        )
        model.encode_videos(model.decode_videos(latents))
    adapt(model, TrainSettings(rank=2), 0)
    gc.collect()
    gc.freeze()  # or every process walks through all of this each time it frees memory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--faults", type=int, default=200)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="end it by then")
    parser.add_argument("--stage", action="append", choices=STAGES)
    parser.add_argument("--out", type=Path, help=f"for example {RESULT}")
    given = parser.parse_args()

    def told(outcome: Outcome) -> None:
        print(
            f"{outcome.stage:9} {outcome.fault:8} at {outcome.at:<7} ended with {outcome.code:<5} "
            f"{outcome.wrong or 'same bytes'}",
            flush=True,
        )

    result = campaign(given.seed, given.faults, given.stage or list(STAGES), told, given.minutes)
    if given.out:
        known = Path(__file__).with_name("found.json")
        result["found and fixed"] = json.loads(known.read_text(encoding="utf-8"))["faults"]
        given.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(f"{result['faults']} faults in {result['seconds']} s, {result['wrong']} wrong")
    sys.exit(1 if result["wrong"] else 0)


if __name__ == "__main__":
    main()
