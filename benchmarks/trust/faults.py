"""Fault injection: interrupt every command, resume it, and compare with an undisturbed run.

    OMP_NUM_THREADS=1 python -m benchmarks.trust.faults --seed 0 --faults 200

build (by one process, and by two concurrent workers), pack, label, train, evaluate and export run
on a small model, each in a process forked from this one. A fault is one of these:

    SIGKILL, SIGTERM, SIGINT, SIGHUP   a signal after a random time
    kill, torn, power, full, broken    a disk that fails at a random operation (see faulty.py)
    second     the same command once more, started at a random time: one of the two is told that the
               other is writing
    hashseed   nothing but a new interpreter with another PYTHONHASHSEED
    copy       SIGKILL, then a copy of the run that lacks or cuts some of its files

Of two workers, the second is killed as well, or continues. The law: the interrupted command reports
one sentence, and the same command (train with --resume) then produces the bytes of the undisturbed
one, apart from times and, with two workers, the order of lines. A partial copy gives the bytes of
the last checkpoint, or one sentence. Campaigns may run concurrently.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any

from benchmarks.trust.faulty import KINDS, Disk

SIGNALS = ("SIGKILL", "SIGTERM", "SIGINT", "SIGHUP")
OTHERS = ("second", "hashseed", "copy")
TIMEOUT = 120.0  # seconds for a command that takes one or two
RESULT = Path("benchmarks/results/0.1.0/faults.json")
TIMES = {"seconds", "eta_seconds", "pairs_per_second", "memory_gib", "time"}
STAGES = ("build", "workers", "pack", "label", "train", "cached", "evaluate", "export")
STOPPED = {"SIGTERM": 143, "SIGINT": 130, "SIGHUP": 129}
BUSY = ("is being written by", "holds a run already", "exists already")
LAST = "step_000003"


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Result of one fault."""

    stage: str
    fault: str
    at: float
    """Seconds, or the number of the operation."""
    code: int
    """Exit code of the disturbed command; negative for a signal."""
    seconds: float
    """Seconds from the signal to the end."""
    wrong: str
    """Violation of the law; empty if there is none."""


@dataclass(frozen=True, kw_only=True)
class Ended:
    """A command that ended."""

    code: int
    output: str
    started: float
    seconds: float


def arguments(stage: str, checkpoint: Path, resume: bool) -> list[str]:
    """The command of a stage, in a folder with `work/`; or the one that resumes it."""
    from tests.small_animatediff import SHAPE

    model = ["--backbone=animatediff", f"--set=backbone.model={checkpoint}",
             f"--set=backbone.frames={SHAPE.frames}", f"--set=backbone.height={SHAPE.height}",
             f"--set=backbone.width={SHAPE.width}", "--device=cpu"]  # fmt: skip
    train = [
        "train",
        "--pairs=work/pairs/",
        "--loss=global",
        *model,
        "--steps=3",
        "--set=train.save_steps=1",
        "--set=train.save_total_limit=2",
        "--set=train.gradient_accumulation_steps=1",
        "--set=train.rank=2",
        "--metric=frame_difference",
    ]
    resumed = ["train", "--out=work/run", "--resume"]
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
        "workers": build if resume else [*build, "--worker=1/2"],
        "pack": ["pack", "work/pairs", "work/packed", "--shard-mib=1"],
        "label": [
            "label",
            "work/pairs",
            "--labeler=metric",
            "--set=labeler.weights={frame_difference=1}",
            "--set=labeler.guards={}",
        ],
        "train": resumed
        if resume
        else [
            *train,
            "--set=train.validation_videos=1",
            "--set=train.report_to=tensorboard",
            "--out=work/run",
        ],
        "cached": resumed
        if resume
        else [
            *train,
            "--set=train.validation_videos=0",
            "--set=train.report_to=none",
            "--reference=cached",
            "--out=work/run",
        ],
        "evaluate": [
            "evaluate",
            "work/run",
            "--num-prompts=2",
            "--set=evaluate.num_inference_steps=1",
            "--device=cpu",
        ],
        "export": ["export", "work/run", "--out=work/export", "--device=cpu"],
    }[stage]


def start(
    command: Sequence[str],
    folder: Path,
    disk: Disk | None,
    output_name: str = "output.txt",
    killed_after: float = 0.0,
) -> tuple[int, Path]:
    """Fork a process that runs a command in a folder.

    Args:
        command: Arguments of dpo-video.
        folder: The process's working directory.
        disk: Replaces the file functions of the process.
        output_name: Name of the file for its output.
        killed_after: Seconds after which the process is killed; 0 for never.

    Returns:
        Process id, and path of the output.
    """
    output = folder / output_name
    output.unlink(missing_ok=True)  # the output of the preceding command
    child = os.fork()
    if child:
        return child, output
    code = 99
    try:
        os.setsid()
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # until the command handles it
        signal.setitimer(signal.ITIMER_REAL, killed_after)  # SIGALRM has no handler
        os.chdir(folder)
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
            disk.report(folder / "work.synced")
        sys.stdout.flush()
    finally:
        os._exit(code)


def finish(child: int, output: Path, since: float) -> Ended:
    """Wait for a process; after TIMEOUT it is killed, with code -1000."""
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        elapsed = time.monotonic() - since
        if done:
            code = os.waitstatus_to_exitcode(status)
            break
        if elapsed > TIMEOUT:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            code = -1000
            break
        time.sleep(0.01)
    text = output.read_text(errors="replace") if output.exists() else ""
    return Ended(code=code, output=text, started=since, seconds=time.monotonic() - since)


def run(command: Sequence[str], folder: Path, disk: Disk | None = None) -> Ended:
    return finish(*start(command, folder, disk), time.monotonic())


def fresh(command: Sequence[str], folder: Path, hash_seed: int) -> Ended:
    """Run a command in a new interpreter, whose sets have another order."""
    since = time.monotonic()
    roots = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, "-m", "dpo_video", *command], cwd=folder, check=False,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env={**os.environ, "PYTHONHASHSEED": str(hash_seed),
             "PYTHONPATH": os.pathsep.join(filter(None, roots))},
    )  # fmt: skip
    seconds = time.monotonic() - since
    return Ended(code=done.returncode, output=done.stdout, started=since, seconds=seconds)


def hashes(folder: Path) -> dict[str, str]:
    """Hashes of a stage's results, without times; leftover temporary files count as results."""
    work = folder / "work"
    found = {}
    for path in sorted(work.rglob("*")):
        name = path.relative_to(work).as_posix()
        if path.is_dir() or path.suffix == ".html" or name.startswith("run/tracker/"):
            continue
        if path.name.startswith(".") and ".writer" in path.name:
            continue  # the next writer of the folder deletes it
        if name.startswith(("run/checkpoints/step_", "run/samples/")) and LAST not in name:
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
    """Faults, after one undisturbed run of each stage for its inputs, outputs and duration."""

    def __init__(self, folder: Path, checkpoint: Path, stages: Sequence[str]) -> None:
        self.folder, self.checkpoint = folder, checkpoint
        self._second = [*arguments("build", checkpoint, False), "--worker=2/2"]
        self.before: dict[str, Path] = {}
        self.expected: dict[str, dict[str, str]] = {}
        self.operations: dict[str, int] = {}
        self.seconds: dict[str, float] = {}
        self.endings: dict[str, str] = {}
        inputs = {
            **dict.fromkeys(("pack", "label", "train", "cached"), "build"),
            **dict.fromkeys(("evaluate", "export"), "train"),
        }
        for stage in STAGES:
            required = {*stages, *(inputs.get(each) for each in stages), "build"}
            if stage not in required:
                continue
            # The folder in which it is disturbed later, since run.toml holds absolute paths.
            root, kept = folder / "disturbed", folder / f"undisturbed-{stage}"
            if stage in inputs:
                shutil.copytree(folder / f"undisturbed-{inputs[stage]}", root)
            else:
                (root / "work").mkdir(parents=True)
            self.before[stage] = folder / f"before-{stage}"
            shutil.copytree(root, self.before[stage])
            ended = run(arguments(stage, checkpoint, False), root, Disk(root / "work"))
            if ended.code:
                raise RuntimeError(f"{stage} fails undisturbed: {ended.output}")
            if stage == "workers":
                run(self._second, root)
            self.expected[stage] = hashes(root)
            if stage == "workers" and self.expected[stage] != self.expected["build"]:
                raise RuntimeError("two workers build another set than one process")
            self.seconds[stage] = ended.seconds
            self.endings[stage] = ended.output.rstrip().splitlines()[-1]
            report = json.loads((root / "work.synced").read_text())
            self.operations[stage] = report["count"]
            root.rename(kept)

    def fault(self, stage: str, fault: str, random: Random) -> Outcome:
        """Disturb a stage, resume it, and compare the result with the undisturbed one."""
        root = self.folder / "disturbed"
        shutil.rmtree(root, ignore_errors=True)
        shutil.copytree(self.before[stage], root)
        command = arguments(stage, self.checkpoint, False)
        if fault == "second":
            at, ended, wrong = self._second_writer(stage, command, root, random)
        else:
            disturb = self._disturb_two if stage == "workers" else self._disturb
            at, ended = disturb(stage, fault, command, root, random)
            wrong = _wrong_ending(ended, fault, self.endings[stage])
        resume = stage == "workers" or (root / "work/run/run.toml").exists()
        last = run(arguments(stage, self.checkpoint, resume), root)
        if stage == "export" and (root / "work/export").exists() and "already" in last.output:
            last = Ended(code=0, output="", started=0, seconds=0)  # export never overwrites
        if not wrong and last.code:
            sentence = last.output.count("Error:") == 1 and "Traceback" not in last.output
            if fault == "copy" and last.code == 2 and sentence:
                return Outcome(stage=stage, fault=fault, at=at, code=ended.code,
                               seconds=ended.seconds, wrong="")  # fmt: skip
            wrong = f"the resumed command ends with {last.code}: {last.output[-600:]}"
        if not wrong:
            found, expected = hashes(root), self.expected[stage]
            if fault == "copy":
                found, expected = _of_last(found), _of_last(expected)
            if found != expected:
                names = sorted(
                    k for k in found.keys() | expected.keys() if found.get(k) != expected.get(k)
                )
                wrong = f"other bytes: {', '.join(names[:8])}"
        return Outcome(stage=stage, fault=fault, at=at, code=ended.code, seconds=ended.seconds,
                       wrong=wrong)  # fmt: skip

    def _second_writer(
        self, stage: str, command: list[str], root: Path, random: Random
    ) -> tuple[float, Ended, str]:
        """Start a command twice; the result of the first, and what is wrong with the two."""
        first = start(command, root, None)
        after = random.uniform(0, self.seconds[stage])
        time.sleep(after)
        second = start(command, root, None, "second.txt")
        since = time.monotonic()
        both = [finish(*each, since) for each in (first, second)]
        wrong = ""
        for ended in both:
            told = ended.output.count("Error:") == 1 and any(x in ended.output for x in BUSY)
            if ended.code != 0 and not (ended.code == 2 and told):
                wrong = f"exit code {ended.code}: {ended.output[-600:]}"
        if all(ended.code for ended in both):
            wrong = f"both refused: {both[0].output[-300:]} {both[1].output[-300:]}"
        return round(after, 3), both[0], wrong

    def _disturb_two(
        self, stage: str, fault: str, command: list[str], root: Path, random: Random
    ) -> tuple[float, Ended]:
        """Disturb one worker; the second one is killed at another moment, or continues."""
        survives = fault == "power" or random.random() < 0.3
        killed_after = 0.0 if survives else random.uniform(0.01, 2 * self.seconds[stage])
        second = start(self._second, root, None, "second.txt", killed_after)
        since = time.monotonic()
        if fault == "power":
            finish(*second, since)
            time.sleep(0.1)  # the power cut recognizes the first worker's files by their time
        found = self._disturb(stage, fault, command, root, random)
        if fault != "power":
            finish(*second, since)
        return found

    def _disturb(
        self, stage: str, fault: str, command: list[str], root: Path, random: Random
    ) -> tuple[float, Ended]:
        if fault == "hashseed":
            seed = random.randrange(1, 2**32)
            return float(seed), fresh(command, root, seed)
        if fault in SIGNALS or fault == "copy":
            child, output = start(command, root, None)
            after = random.uniform(0, self.seconds[stage])
            time.sleep(after)
            since = time.monotonic()
            os.kill(child, getattr(signal, fault, signal.SIGKILL))
            ended = finish(child, output, since)
            if fault == "copy":
                _copy_partly(root / "work/run", random)
            return round(after, 3), ended
        at = random.randrange(1, self.operations[stage] + 1)
        began = time.time()
        ended = run(command, root, Disk(root / "work", fault, at))
        if fault == "power":
            _cut_power(root, began, random)
        return at, ended


def _cut_power(root: Path, began: float, random: Random) -> None:
    """Truncate every file written since `began` to its synced bytes, or to a random size above."""
    report = root / "work.synced"
    synced = json.loads(report.read_text())["synced"] if report.exists() else {}
    for path in sorted((root / "work").rglob("*")):
        if path.is_file() and path.stat().st_mtime >= began - 0.05:
            size = path.stat().st_size
            kept = min(synced.get(os.path.realpath(path), 0), size)
            os.truncate(path, random.choice((kept, random.randint(kept, size))))


def _copy_partly(folder: Path, random: Random) -> None:
    """Delete some files of a run, or their second half."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for path in random.sample(files, min(len(files), random.randint(1, 3))):
        if random.random() < 0.7:
            path.unlink()
        else:
            os.truncate(path, path.stat().st_size // 2)


def _of_last(found: dict[str, str]) -> dict[str, str]:
    return {name: each for name, each in found.items() if f"checkpoints/{LAST}" in name}


def _wrong_ending(ended: Ended, fault: str, ending: str) -> str:
    """Violations in how a disturbed command ended; `ending` is its last line when undisturbed."""
    if "Traceback" in ended.output:
        return f"a traceback: {ended.output[-1500:]}"
    allowed = {"full": (0, 2), "broken": (0, 2), "hashseed": (0,)}
    allowed |= {name: (0, code) for name, code in STOPPED.items()}
    if ended.code not in allowed.get(fault, (0, -9)):
        # The signal has no handler before the program starts and after it ends.
        outside = not ended.output or ended.output.rstrip().endswith(ending)
        if fault in STOPPED and ended.code == -getattr(signal, fault) and outside:
            return ""
        return f"exit code {ended.code}: {ended.output[-600:]}"
    if ended.code == 2 and ended.output.count("Error:") != 1:
        return f"not one sentence: {ended.output[-600:]}"
    if ended.code in STOPPED.values() and "Resume with" not in ended.output:
        return f"no resume command: {ended.output[-300:]}"
    return ""


def campaign(
    seed: int,
    faults: int,
    stages: Sequence[str],
    report: Callable[[Outcome], None],
    minutes: float = float("inf"),
    only: Sequence[str] = (),
) -> dict[str, Any]:
    """Run the campaign in a temporary folder, and return the result to publish."""
    import torch

    from tests.small_animatediff import save_small_animatediff

    torch.set_num_threads(1)
    started = time.monotonic()
    outcomes: list[Outcome] = []
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = save_small_animatediff(Path(folder) / "small")
        _warm_up(checkpoint)
        faults_of = Campaign(Path(folder), checkpoint, stages)
        for number in range(faults):
            if time.monotonic() - started > 60 * minutes:
                break
            random = Random(f"{seed} {number}")
            stage = stages[number % len(stages)]
            kinds = [kind for kind in kinds_of(stage) if not only or kind in only]
            if not kinds:
                continue
            fault = kinds[number // len(stages) % len(kinds)]
            outcomes.append(faults_of.fault(stage, fault, random))
            report(outcomes[-1])
    stopping = [o.seconds for o in outcomes if o.code in STOPPED.values()]
    return {
        "seed": seed,
        "faults": len(outcomes),
        "seconds": round(time.monotonic() - started),
        "wrong": sum(bool(outcome.wrong) for outcome in outcomes),
        "seconds from a signal to the end": {
            "median": sorted(stopping)[len(stopping) // 2] if stopping else None,
            "largest": max(stopping, default=None),
        },
        "outcomes": [asdict(outcome) for outcome in outcomes],
    }


def kinds_of(stage: str) -> tuple[str, ...]:
    """The faults that a stage can have."""
    left_out = {"second"} if stage == "workers" else set()
    if stage not in ("train", "cached"):
        left_out.add("copy")
    return (*SIGNALS, *KINDS, *(kind for kind in OTHERS if kind not in left_out))


def _warm_up(checkpoint: Path) -> None:
    """Import all modules before forking; compute no gradient, which would start threads."""
    import importlib
    import pkgutil

    import torch

    import dpo_video
    from dpo_video.diffusion.initial_noise import initial_noise
    from dpo_video.settings import TrainSettings
    from dpo_video.training.lora import adapt
    from tests.small_animatediff import load_small

    for module in pkgutil.walk_packages(dpo_video.__path__, "dpo_video."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    model = load_small(checkpoint)
    with torch.no_grad():
        latents = model.sample(
            model.encode_prompts(["a"]), initial_noise(model, [0]), num_inference_steps=1
        )
        model.encode_videos(model.decode_videos(latents))
    adapt(model, TrainSettings(rank=2), 0)
    gc.collect()
    gc.freeze()  # otherwise every fork's garbage collection visits all of these objects


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--faults", type=int, default=200)
    parser.add_argument(
        "--minutes", type=float, default=float("inf"), help="stop after these minutes"
    )
    parser.add_argument("--stage", action="append", choices=STAGES)
    parser.add_argument("--fault", action="append", help="only these; by default all")
    parser.add_argument("--out", type=Path, help=f"for example {RESULT}")
    given = parser.parse_args()

    def report(outcome: Outcome) -> None:
        print(
            f"{outcome.stage:9} {outcome.fault:8} at {outcome.at:<7} ended with {outcome.code:<5} "
            f"{outcome.wrong or 'same bytes'}",
            flush=True,
        )

    stages = given.stage or list(STAGES)
    result = campaign(given.seed, given.faults, stages, report, given.minutes, given.fault or ())
    if given.out:
        fixed = Path(__file__).with_name("found.json")
        result["found and fixed"] = json.loads(fixed.read_text(encoding="utf-8"))["faults"]
        given.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(f"{result['faults']} faults in {result['seconds']} s, {result['wrong']} wrong")
    sys.exit(1 if result["wrong"] else 0)


if __name__ == "__main__":
    main()
