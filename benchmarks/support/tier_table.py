"""The table of every tier's presets, from results of the memory suite."""

from __future__ import annotations

from collections.abc import Iterable

from benchmarks.support.results import Candidate, SuiteResult
from dpo_video.estimation.tiers import find_tier

PRESET = "preset"
# Names of figures.
MODE, BLOCKS, RANK = "mode", "blocks", "rank"
PREDICTED = "peak, GiB of the card (predicted)"
MEASURED = "peak, GiB of the allocator (measured)"
HOST = "CPU memory, GiB (predicted)"
OPERATIONS = "TFLOP per pair (predicted)"
BESIDES = "largest besides the steps, GiB (predicted)"


def group_name(model: str, tier: str) -> str:
    """Name of the group of a model's modes on a tier's card."""
    return f"{model} on {tier}"


def tier_table(results: Iterable[SuiteResult]) -> str:
    """Markdown: what each tier's presets select for each model, predicted and measured.

    Args:
        results: Results of the memory suite, of a CPU and of GPUs. A measured cell names the GPU.
    """
    rows: dict[str, list[tuple[SuiteResult, Candidate]]] = {}
    for result in results:
        for group in result.groups:
            if (preset := group.of(PRESET)) is not None:
                rows.setdefault(group.name, []).append((result, preset))
    lines = [
        "| model | tier | rank | mode | blocks | GiB of the card, predicted | GiB measured "
        "| pairs/s measured | CPU GiB | TFLOP per pair | largest besides the steps, GiB |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, found in rows.items():
        model, _, tier = name.rpartition(" on ")
        figures = found[0][1].figures
        on_gpu = [(result, each) for result, each in found if MEASURED in each.figures]
        peaks = ", ".join(f"{each.figures[MEASURED]:.1f} ({r.device})" for r, each in on_gpu)
        rates = ", ".join(f"{1 / each.median:.3g} ({r.device})" for r, each in on_gpu)
        lines.append(
            f"| {model} | {tier} | {figures[RANK]:.0f} | {figures[MODE]} | {figures[BLOCKS]:.0f} "
            f"| {figures[PREDICTED]:.1f} of {find_tier(tier).memory_gib:.1f} | {peaks} | {rates} "
            f"| {figures[HOST]:.1f} | {figures[OPERATIONS]:,.0f} | {figures[BESIDES]} |"
        )
    return "\n".join(lines) + "\n"
