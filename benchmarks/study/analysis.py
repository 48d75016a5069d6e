"""Choose the learning rates of the study, and answer its questions. See README.md.

    python -m benchmarks.study.analysis rates runs/selection --out benchmarks/study/report.toml
    python -m benchmarks.study.analysis answers runs/report --out study.json

Both read the evaluations that `dpo-video compare` wrote: one folder per entry and training seed.
"""

from __future__ import annotations

import argparse
import json
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpo_video.errors import UserError
from dpo_video.evaluation.results import Evaluation
from dpo_video.support.formatting import percent
from dpo_video.support.statistics import PairedDifference, paired_difference

HERE = Path(__file__).parent
TARGET, MOTION, GUARD = "warp_error", "dynamic_degree", "caption_match"
KEPT = -0.03
"""Least mean change of motion and caption match of a learning rate that can be chosen."""
SEEDS = range(5)
HALF = ("local-region", "local-global")
"""Methods that are also trained for half the steps."""
STEPS = 40
QUESTIONS = {
    "Does preference do anything that SFT on the chosen videos does not?": [
        (TARGET, "ranked-global", "ranked-sft"),
        (TARGET, "jitter-sdpo", "sft"),
        (TARGET, "local-region", "sft"),
    ],
    "Does DenseDPO keep more motion than vanilla DPO?": [
        (MOTION, "dense-segment", "ranked-global"),
        (MOTION, "dense-segment", "dense-global"),
    ],
    "Does LocalDPO converge faster?": [
        (TARGET, "local-region-20", "local-global-20"),
        (TARGET, "local-region", "local-global"),
    ],
}
"""A metric and two methods each: the first one's value minus the second one's."""

Array = NDArray[np.float64]


def cells(folder: Path) -> dict[str, list[Evaluation]]:
    """The evaluations of every entry of a comparison, in the order of the training seeds."""
    found: dict[str, list[Evaluation]] = {}
    for entry in sorted(path for path in folder.iterdir() if path.is_dir()):
        seeds = sorted(entry.glob("seed-*"), key=lambda path: int(path.name.removeprefix("seed-")))
        finished = [Evaluation.load(seed / "evaluation") for seed in seeds]
        if finished:
            found[entry.name] = finished
    if not found:
        raise UserError(f"'{folder}' has no evaluations. Name the folder of a comparison.")
    return found


def relative_changes(evaluation: Evaluation) -> dict[str, float]:
    """Change of the mean of every metric, relative to the base's."""
    return {
        name: float(np.mean(evaluation[name].tuned) / np.mean(evaluation[name].base) - 1)
        for name in (TARGET, MOTION, GUARD)
    }


def chosen_rates(changes: Mapping[str, Mapping[str, float]]) -> dict[str, str]:
    """The learning rate of every method by the rule of README.md.

    Args:
        changes: Entry, named METHOD-RATE, to the relative changes of its metrics.
    """
    methods: dict[str, list[str]] = {}
    for entry in changes:
        method, rate = _split(entry)
        methods.setdefault(method, []).append(rate)
    rates = {}
    for method, offered in methods.items():
        found = {rate: changes[f"{method}-{rate}"] for rate in offered}
        loss = {rate: min(each[MOTION], each[GUARD]) for rate, each in found.items()}
        kept = [rate for rate in offered if loss[rate] >= KEPT]
        if kept:
            rates[method] = min(kept, key=lambda rate: found[rate][TARGET])
        else:
            rates[method] = max(offered, key=lambda rate: loss[rate])
    return rates


def report_entries(rates: Mapping[str, str]) -> str:
    """The TOML file of the entries that are reported: the chosen rates, five training seeds."""
    selection = tomllib.loads((HERE / "selection.toml").read_text(encoding="utf-8"))
    lines = ["# The study's entries at the learning rates that analysis.py chose. See README.md."]
    for method, rate in rates.items():
        table = selection[f"{method}-{rate}"]
        for name, steps in ((method, STEPS), (f"{method}-20", STEPS // 2)):
            if name != method and method not in HALF:
                continue
            options = [
                f"train.steps={steps}" if option.startswith("train.steps=") else option
                for option in table["set"]
            ]
            lines += ["", f"[{name}]"]
            lines += [
                f"{key} = {json.dumps(table[key])}"
                for key in ("pairs", "labeler", "loss")
                if key in table
            ]
            lines += ["set = [", *(f"    {json.dumps(option)}," for option in options), "]"]
            lines += [f"seeds = {json.dumps(list(SEEDS))}"]
    return "\n".join(lines) + "\n"


def between(
    first: Sequence[Evaluation], second: Sequence[Evaluation], metric: str
) -> PairedDifference:
    """First method minus second, relative to the base, over prompts and training seeds.

    Raises:
        UserError: if the two were not evaluated on the same base videos and seeds.
    """
    base = first[0][metric].base
    if len(first) != len(second) or any(each[metric].base != base for each in (*first, *second)):
        raise UserError("Two methods were not evaluated on the same base videos. Evaluate again.")
    gained = [
        np.asarray(base) + np.asarray(one[metric].tuned) - np.asarray(other[metric].tuned)
        for one, other in zip(first, second, strict=True)
    ]
    return paired_difference(base, np.stack(gained), prompts=first[0].prompts)


def answers(found: Mapping[str, Sequence[Evaluation]]) -> list[dict[str, Any]]:
    """The paired differences that answer each question."""
    rows = []
    for question, comparisons in QUESTIONS.items():
        for metric, first, second in comparisons:
            if missing := sorted({first, second} - found.keys()):
                raise UserError(f"The entry '{missing[0]}' is missing. Run the whole report.")
            difference = between(found[first], found[second], metric)
            low, high = difference.relative_low, difference.relative_high
            if low is None or high is None:
                raise UserError(f"The base's mean {metric} is 0, so nothing is relative to it.")
            clear = low > 0 or high < 0
            rows.append({
                "question": question,
                "metric": metric,
                "first": first,
                "second": second,
                "difference": difference.model_dump(),
                "reading": (f"{first} {'lower' if high < 0 else 'higher'} than {second}"
                            if clear else "no difference shown"),
            })  # fmt: skip
    return rows


def text(rows: Sequence[Mapping[str, Any]]) -> str:
    """The answers as a Markdown table."""
    lines = [
        "| question | metric | methods | difference, relative to the base | reading |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        change = row["difference"]
        low, high = percent(change["relative_low"]), percent(change["relative_high"])
        lines.append(
            f"| {row['question']} | `{row['metric']}` | `{row['first']}` minus `{row['second']}` | "
            f"{percent(change['relative'])} ({low} to {high}) | {row['reading']} |"
        )
    return "\n".join(lines) + "\n"


def _split(entry: str) -> tuple[str, str]:
    """Method and learning rate of an entry such as `local-region-3e-4`."""
    method, mantissa, exponent = entry.rsplit("-", 2)
    return method, f"{mantissa}-{exponent}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("action", choices=("rates", "answers"))
    parser.add_argument("folder", type=Path, help="folder of the comparison")
    parser.add_argument("--out", type=Path, help="file of the result; by default it is printed")
    given = parser.parse_args()
    found = cells(given.folder)
    if given.action == "rates":
        changes = {entry: relative_changes(each[0]) for entry, each in found.items()}
        result = report_entries(chosen_rates(changes))
        for entry, each in changes.items():
            print(entry, *(f"{name} {percent(value)}" for name, value in each.items()), sep="  ")
    else:
        rows = answers(found)
        result = json.dumps(rows, indent=2) + "\n"
        print(text(rows))
    if given.out:
        given.out.write_text(result, encoding="utf-8")
    elif given.action == "rates":
        print(result)


if __name__ == "__main__":
    main()
