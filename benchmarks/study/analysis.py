"""Choose the learning rates of the study, and answer its questions. See README.md.

    python -m benchmarks.study.analysis rates runs/selection --out benchmarks/study/report.toml
    python -m benchmarks.study.analysis values runs/report-0 --out report-0.json
    python -m benchmarks.study.analysis answers report-*.json --out study.json

All read the folders that `dpo-video compare` wrote, or the values that `values` took from them.
"""

from __future__ import annotations

import argparse
import json
import math
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np

from dpo_video.errors import UserError
from dpo_video.evaluation import charts
from dpo_video.evaluation.results import Evaluation
from dpo_video.support.formatting import percent
from dpo_video.support.statistics import t_quantile

HERE = Path(__file__).parent
TARGET, MOTION, GUARD = "warp_error", "dynamic_degree", "caption_match"
WITNESS = f"{TARGET} (DIS)"
ERRORS = (TARGET, WITNESS, "frame_difference")
"""Metrics that are above 0 and vary many times over between prompts."""
OF_THE_MEAN = ", mean"
METRICS = (*ERRORS, f"{TARGET}{OF_THE_MEAN}", MOTION, GUARD, "sharpness")
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
"""A metric and two methods each: the first one's change minus the second one's."""


Values = Mapping[str, tuple[Sequence[float | None], Sequence[float | None]]]
"""Metric to its values on every prompt, of the base and of the tuned model; None for no value."""
Cells = dict[str, dict[int, Values]]
"""Entry to training seed to values."""


def values_of(evaluation: Evaluation) -> Values:
    """The values of an evaluation, those of its second witnesses as `NAME (DIS)`."""
    values = {}
    for metric in evaluation.metrics:
        values[metric.name] = (metric.base, metric.tuned)
        if (witness := metric.witness) is not None:
            values[f"{metric.name} ({witness.name})"] = (witness.base, witness.tuned)
    finite = {
        name: tuple([_rounded(x) for x in side] for side in sides) for name, sides in values.items()
    }
    return cast(Values, finite)


def _rounded(value: float) -> float | None:
    """Six digits, for the files that are kept."""
    return float(f"{value:.6g}") if math.isfinite(value) else None


def cells(paths: Sequence[Path]) -> Cells:
    """The values in folders of comparisons, and in files that `values` wrote.

    Raises:
        UserError: if there are none, or several of one entry and training seed.
    """
    found: Cells = {}
    for path in paths:
        for entry, seed, values in _in_file(path) if path.is_file() else _in_folder(path):
            if seed in found.setdefault(entry, {}):
                raise UserError(f"Two evaluations of seed {seed} of '{entry}'.")
            found[entry][seed] = values
    if not found:
        names = ", ".join(f"'{path}'" for path in paths)
        raise UserError(f"No evaluations in {names}. Name the folders of a comparison.")
    return found


def _in_folder(folder: Path) -> Iterator[tuple[str, int, Values]]:
    for path in sorted(folder.glob("*/seed-*/evaluation/evaluation.json")):
        entry, seed = path.parts[-4], int(path.parts[-3].removeprefix("seed-"))
        yield entry, seed, values_of(Evaluation.load(path.parent))


def _in_file(path: Path) -> Iterator[tuple[str, int, Values]]:
    for row in json.loads(path.read_text(encoding="utf-8"))["rows"]:
        yield row["entry"], row["seed"], {name: tuple(both) for name, both in row["values"].items()}


def values_text(found: Cells) -> str:
    """The JSON of `values`: a line for each entry and training seed."""
    rows = [
        json.dumps({"entry": entry, "seed": seed, "values": values})
        for entry, runs in sorted(found.items())
        for seed, values in sorted(runs.items())
    ]
    return '{"rows": [\n' + ",\n".join(rows) + "\n]}\n"


def relative_change(values: Values, metric: str) -> float:
    """Relative change of a metric over the prompts.

    Of an error, the geometric mean of the prompts' ratios less 1. Of any other metric, and of
    `NAME, mean`, the change of the mean relative to the base's mean. Prompts without a value on
    either side are left out.
    """
    name = metric.removesuffix(OF_THE_MEAN)
    base, tuned = (np.asarray(side, dtype=np.float64) for side in values[name])
    finite = np.isfinite(base) & np.isfinite(tuned)
    if metric in ERRORS:
        return math.exp(np.log(tuned[finite] / base[finite]).mean()) - 1
    return float(tuned[finite].mean() / base[finite].mean() - 1)


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


def summary(values: Mapping[int, float]) -> dict[str, Any]:
    """Mean and 95% interval over the replicates: Student's t, one value per training seed."""
    sample = np.array(list(values.values()))
    if len(sample) < 2:
        raise UserError(f"An interval needs 2 training seeds or more, not {len(sample)}.")
    half = t_quantile(len(sample) - 1) * float(sample.std(ddof=1)) / len(sample) ** 0.5
    mean = float(sample.mean())
    return {"mean": mean, "low": mean - half, "high": mean + half, "seeds": dict(values)}


def changes(found: Cells) -> dict[str, dict[str, Any]]:
    """Entry to metric to its relative change over the replicates."""
    return {
        entry: {
            metric: summary({seed: relative_change(each, metric) for seed, each in runs.items()})
            for metric in METRICS
        }
        for entry, runs in found.items()
    }


def difference(
    first: Mapping[int, Values], second: Mapping[int, Values], metric: str
) -> dict[str, Any]:
    """First method's relative change minus the second's, paired by replicate.

    Raises:
        UserError: if the two have other training seeds, or were evaluated on other base videos.
    """
    if first.keys() != second.keys():
        raise UserError("Two methods have different training seeds. Finish the report.")
    if any(list(first[seed][metric][0]) != list(second[seed][metric][0]) for seed in first):
        raise UserError("Two methods were not evaluated on the same base videos. Evaluate again.")
    return summary({
        seed: relative_change(first[seed], metric) - relative_change(second[seed], metric)
        for seed in first
    })  # fmt: skip


def answers(found: Cells) -> list[dict[str, Any]]:
    """The paired differences that answer each question."""
    rows = []
    for question, comparisons in QUESTIONS.items():
        for metric, first, second in comparisons:
            if missing := sorted({first, second} - found.keys()):
                raise UserError(f"The entry '{missing[0]}' is missing. Run the whole report.")
            result = difference(found[first], found[second], metric)
            clear = result["low"] > 0 or result["high"] < 0
            side = "lower" if result["high"] < 0 else "higher"
            rows.append({
                "question": question,
                "metric": metric,
                "first": first,
                "second": second,
                "difference": result,
                "reading": f"{first} {side} than {second}" if clear else "no difference shown",
            })  # fmt: skip
    return rows


def text(rows: Sequence[Mapping[str, Any]]) -> str:
    """The answers as a Markdown table."""
    lines = [
        "| question | metric | methods | difference of the changes | reading |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row['question']} | `{row['metric']}` | `{row['first']}` minus `{row['second']}` | "
            f"{_interval(row['difference'])} | {row['reading']} |"
        )
    return "\n".join(lines) + "\n"


def table(found: Mapping[str, Mapping[str, Any]]) -> str:
    """The changes of every entry as a Markdown table."""
    lines = [
        "| entry | " + " | ".join(f"`{name}`" for name in METRICS) + " |",
        "|---|" + "---|" * len(METRICS),
    ]
    for entry, metrics in found.items():
        cells = " | ".join(_interval(metrics[name]) for name in METRICS)
        lines.append(f"| {entry} | {cells} |")
    return "\n".join(lines) + "\n"


def markdown(result: Mapping[str, Any]) -> str:
    """Both tables of a finished study, whose JSON `answers` writes."""
    return f"{table(result['changes'])}\n{text(result['answers'])}"


def picture(result: Mapping[str, Any]) -> str:
    """An SVG: the change of the error against that of the motion, with intervals."""
    labels = {metric: f"change of {metric.replace('_', ' ')}" for metric in (TARGET, MOTION)}

    def tick(value: float) -> str:
        return percent(value).replace(".0%", "%")

    def axis(metric: str) -> partial[charts.Axis]:
        return partial(charts.linear, ticks=8, text=tick, label=labels[metric])

    points = [
        charts.Point(name=entry, x=_spread(metrics[MOTION]), y=_spread(metrics[TARGET]))
        for entry, metrics in result["changes"].items()
    ]
    panel = charts.Panel(points=points, x=axis(MOTION), y=axis(TARGET), origin="base model")
    title = f"{labels[TARGET]} against {labels[MOTION]}, one mark per entry"
    return charts.scatter(title, [panel], width=480)


def _spread(change: Mapping[str, float]) -> charts.Spread:
    return charts.Spread(change["mean"], change["low"], change["high"])


def _interval(result: Mapping[str, Any]) -> str:
    low, high = percent(result["low"]), percent(result["high"])
    return f"{percent(result['mean'])} ({low} to {high})"


def _split(entry: str) -> tuple[str, str]:
    """Method and learning rate of an entry such as `local-region-3e-4`."""
    method, mantissa, exponent = entry.rsplit("-", 2)
    return method, f"{mantissa}-{exponent}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("action", choices=("rates", "values", "answers"))
    parser.add_argument("paths", type=Path, nargs="+", help="folders of comparisons, or values")
    parser.add_argument("--out", type=Path, help="file of the result; by default it is printed")
    given = parser.parse_args()
    found = cells(given.paths)
    if given.action == "rates":
        measured = {
            entry: {name: relative_change(each, name) for name in METRICS}
            for entry, runs in found.items()
            for each in runs.values()
        }
        result = report_entries(chosen_rates(measured))
        for entry, each in measured.items():
            print(entry, *(f"{name} {percent(value)}" for name, value in each.items()), sep="  ")
    elif given.action == "values":
        result = values_text(found)
    else:
        answered = {"changes": changes(found), "answers": answers(found)}
        result = json.dumps(answered, indent=2) + "\n"
        print(markdown(answered))
    if given.out:
        given.out.write_text(result, encoding="utf-8")
    elif given.action != "answers":
        print(result)


if __name__ == "__main__":
    main()
