"""Who may import whom, read off the source; and what stays light."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from dpo_video import registry

PACKAGE = Path(__file__).parents[1] / "dpo_video"
KINDS = set(registry.KINDS)
# From the bottom up. What is not named is a tool: masks, video, clips, store, flow and the like.
FOUNDATION = {"errors", "types", "settings"}
ENGINES = {
    "bench_plot",
    "budget",
    "build",
    "check",
    "train",
    "evaluate",
    "label",
    "export",
    "fit",
    "report",
    "testing",
    "comparison",
}
WIRING = {"registry", "config", "session"}
# They train, measure and publish the embedded model: programs beside the package, not parts of it.
SCRIPTS = {"tiny.recipe", "tiny.judge_recipe", "tiny.quality"}
ORDER = ["foundation", "strategies", "tool", "kind", "engine", "wiring", "cli"]


def layer(module: str) -> str:
    head = module.split(".")[0]
    for name, members in (
        ("foundation", FOUNDATION),
        ("strategies", {"strategies"}),
        ("kind", KINDS),
        ("engine", ENGINES),
        ("wiring", WIRING),
        ("cli", {"cli", "__main__"}),
    ):
        if head in members:
            return name
    return "tool"


def modules() -> dict[str, Path]:
    """Every module by its name inside the package; `loss` for `loss/__init__.py`."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(part for part in parts if part != "__init__")
        if name and name not in SCRIPTS:
            found[name] = path
    return found


def imports(path: Path) -> Iterator[str]:
    """What a module imports of the package, at its top or inside a function."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.timestep == 0, f"{path} has a relative import"
            # `from dpo_video import registry` names a module, `from dpo_video.x import y` a thing.
            here = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name.removeprefix("dpo_video.") in MODULES else str(node.module)
                     for name in here]  # fmt: skip
        else:
            continue
        for name in names:
            if name.startswith("dpo_video."):
                yield name.removeprefix("dpo_video.")


MODULES = modules()
EDGES = [(name, other) for name, path in MODULES.items() for other in imports(path)]


@pytest.mark.parametrize(("module", "imported"), sorted(set(EDGES)))
def test_nobody_imports_what_stands_above(module: str, imported: str) -> None:
    assert ORDER.index(layer(imported)) <= ORDER.index(layer(module))


def test_a_kind_never_imports_another_kind() -> None:
    folders = [(m.split(".")[0], i.split(".")[0]) for m, i in EDGES if layer(m) == "kind"]
    assert [(m, i) for m, i in folders if i in KINDS and i != m] == []


def test_engines_know_kinds_and_no_strategy() -> None:
    assert [(m, i) for m, i in EDGES if layer(m) == "engine" and layer(i) == "kind"] == []


def test_the_wiring_finds_strategies_by_name_only() -> None:
    above = [(m, i) for m, i in EDGES if layer(m) in ("wiring", "cli") and layer(i) == "kind"]
    assert above == []


def test_modules_do_not_import_each_other_in_circles() -> None:
    graph: dict[str, set[str]] = {}
    for module, imported in EDGES:
        graph.setdefault(module, set()).add(imported)

    def visit(module: str, way: tuple[str, ...]) -> None:
        assert module not in way, " -> ".join((*way, module))
        if module in done:
            return
        for imported in sorted(graph.get(module, ())):
            visit(imported, (*way, module))
        done.add(module)

    done: set[str] = set()
    for module in sorted(graph):
        visit(module, ())


def test_every_listed_module_is_where_it_is_said_to_be() -> None:
    found = set(MODULES)
    assert found >= FOUNDATION | WIRING | KINDS | {"strategies", "train", "build", "evaluate"}
    assert all((PACKAGE / f"{name.replace('.', '/')}.py").exists() for name in SCRIPTS)


@pytest.mark.parametrize(
    "arguments", [["--help"], ["list"], ["list", "loss", "--json"], ["train", "--help"]]
)
def test_help_and_list_import_no_torch(arguments: list[str]) -> None:
    program = f"""
import sys
sys.argv = ["dpo-video", *{arguments!r}]
from dpo_video.cli import main
try:
    main()
except SystemExit as stop:
    assert not stop.code, stop.code
heavy = {{"torch", "diffusers", "transformers", "peft", "accelerate", "kornia", "cv2", "numpy"}}
print(*sorted(heavy & sys.modules.keys()), file=sys.stderr)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout
    assert done.stderr.strip() == ""
