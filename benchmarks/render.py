"""Render the published tables and pictures again from the published numbers.

    python -m benchmarks.render

A test compares the files with what this renders. Run it after a change of names, words or charts.
"""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks import memory, reference_cache
from benchmarks.study import analysis
from benchmarks.support.plots import scatter
from benchmarks.support.results import markdown, read_results
from benchmarks.support.tier_table import tier_table

RESULTS = Path(__file__).parent / "results" / "0.1.0"


def rendered() -> dict[Path, str]:
    """Path to text of every published table and picture that a published JSON file determines."""
    texts = {}
    for path in RESULTS.glob("bench/*/*.json"):
        (result,) = read_results(path).values()
        texts[path.with_suffix(".md")] = markdown(result)
        for number, group in enumerate(result.groups, start=1):
            if (picture := scatter(group)) is not None:
                texts[path.with_name(f"{path.stem}-{number}.svg")] = picture
    study = json.loads((RESULTS / "study.json").read_text())
    texts[RESULTS / "study.md"] = analysis.markdown(study)
    texts[RESULTS / "study.svg"] = analysis.picture(study)
    rows = json.loads((RESULTS / "memory.json").read_text())
    texts[RESULTS / "memory.svg"] = memory.drawn([memory.Row.model_validate(row) for row in rows])
    memory_suites = [
        result
        for path in sorted(RESULTS.glob("bench/*/memory.json"))
        for result in read_results(path).values()
    ]
    texts[RESULTS / "tiers.md"] = tier_table(memory_suites)
    cache = json.loads((RESULTS / "reference_cache.json").read_text())
    texts[RESULTS / "reference_cache.txt"] = reference_cache.text(cache)
    return texts


if __name__ == "__main__":
    for path, text in rendered().items():
        path.write_text(text, encoding="utf-8")
