"""Documents match the program: commands, options, strategies, names and files exist."""

from __future__ import annotations

import ast
import functools
import importlib
import importlib.util
import re
import shlex
import textwrap
import tomllib
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import pytest
import typer.main
from pydantic import ValidationError

import benchmarks.bench
from dpo_video import registry
from dpo_video.cli import app
from dpo_video.estimation.tiers import tiers
from dpo_video.registry.commands import load_command
from dpo_video.workflows.recipes import recipe_names
from dpo_video.workflows.tables import ENGINES, parse

ROOT = Path(__file__).parents[1]
DOCUMENTS = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    ROOT / "benchmarks" / "README.md",
    *sorted(ROOT.glob("docs/**/*.md")),
    *sorted(ROOT.glob("plugins/**/*.md")),
]
NAMED = [str(path.relative_to(ROOT)) for path in DOCUMENTS]
OPTION = re.compile(rf"(?:{'|'.join((*ENGINES, *registry.KINDS))})(?:\.[a-z_0-9]+)+")
# Tables whose keys are names of metrics, or of options of other libraries.
ANY_KEY = (
    "labeler.weights",
    "labeler.guards",
    "labeler.options",
    "evaluate.min_effects",
    "train.lora",
)
# Pages that exist only in the site (docs/_hooks.py).
GENERATED = re.compile(r"(\.\./)?options/[a-z]+\.md")


def blocks(path: Path, *languages: str) -> list[str]:
    pattern = rf"```(?:{'|'.join(languages)})\n(.*?)\n *```"
    found = re.findall(pattern, path.read_text(encoding="utf-8"), re.DOTALL)
    return [textwrap.dedent(block) for block in found]


def shell_lines(path: Path) -> list[list[str]]:
    """The words of every shell line, continued lines joined."""
    text = "\n".join(blocks(path, "bash", "sh")).replace("\\\n", " ")
    return [words for line in text.splitlines() if (words := shlex.split(line, comments=True))]


def own_arguments(words: list[str]) -> list[str] | None:
    """What `dpo-video` is given, directly or by a launcher; None for other commands."""
    if words[0] == "dpo-video":
        return words[1:]
    if "dpo_video" in words:  # ... -m dpo_video train ...
        return words[words.index("dpo_video") + 1 :]
    return None


def commands() -> list[tuple[str, str]]:
    return [
        (name, shlex.join(arguments))
        for name in NAMED
        for words in shell_lines(ROOT / name)
        if (arguments := own_arguments(words)) is not None
    ]


@functools.cache
def plugin_strategies() -> set[tuple[str, str]]:
    """Kind and name of what the example packages in plugins/ add."""
    found = set()
    for path in ROOT.glob("plugins/*/pyproject.toml"):
        groups = tomllib.loads(path.read_text())["project"]["entry-points"]
        found |= {(group.rpartition(".")[2], name) for group in groups for name in groups[group]}
    return found


@functools.cache
def plugin_options() -> set[str]:
    """Option paths of the example packages: the annotated fields of their classes."""
    return {
        f"{kind}.{node.target.id}"
        for path in ROOT.glob("plugins/*/dpo_video_*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
        for kind in registry.KINDS
    }


@functools.cache
def option_paths(kind: str) -> set[str]:
    """Every option path of a settings table, or of all strategies of a kind."""
    if kind in ENGINES:
        return {option.path for option in registry.options(ENGINES[kind], kind)}
    paths = set()
    for listing in registry.listings(kind):
        prefix = f"{kind}.{listing.name}" if kind in registry.SEVERAL else kind
        model = registry.load(kind, listing.name)
        paths |= {option.path for option in registry.options(model, prefix)}
    return paths


def check_option(path: str) -> None:
    known = option_paths(path.partition(".")[0]) | plugin_options()
    in_a_sum = path.startswith("loss.") and f"loss.{path.rpartition('.')[2]}" in known
    assert path.startswith(ANY_KEY) or path in known or in_a_sum, path


def check_strategy(kind: str, name: str) -> None:
    if (kind, name) not in plugin_strategies():
        registry.load(kind, name)


@pytest.mark.parametrize(("document", "line"), commands())
def test_every_command_parses(document: str, line: str) -> None:
    name, *arguments = shlex.split(line)
    group = typer.main.get_command(app)
    command = group.commands.get(name) or load_command(name)  # type: ignore[attr-defined]
    # Parses and converts without running; an unknown flag or a wrong type raises.
    given = command.make_context(name, list(arguments)).params
    if name == "bench":  # passes its arguments on
        benchmarks.bench.options().parse_args([each for each in arguments if each != "--"])
    for kind in registry.KINDS:
        chosen = given.get(kind)
        for value in (chosen,) if isinstance(chosen, str) else chosen or ():
            # Elsewhere, and with a slash, it is a folder of pairs.
            if kind != "pairs" or (name in ("train", "build", "config") and "/" not in value):
                check_strategy(kind, value)
    if given.get("tier"):
        assert given["tier"] in tiers()
    if given.get("recipe"):
        assert given["recipe"] in recipe_names()
    for flag, value in pairwise(arguments):
        if flag == "--set":
            check_option(value.partition("=")[0])
    if name == "show" and given["name"]:
        if given["kind"] == "recipe":
            assert given["name"] in recipe_names()
        elif given["kind"] != "tier":
            check_strategy(given["kind"], given["name"])


@pytest.mark.parametrize("name", NAMED)
def test_every_option_in_code_exists(name: str) -> None:
    text = re.sub(r"```.*?```", "", (ROOT / name).read_text(encoding="utf-8"), flags=re.DOTALL)
    for code in re.findall(r"`([^`\n]+)`", text):
        path, _, value = code.removeprefix("--set ").partition("=")
        path = path.strip()
        if OPTION.fullmatch(path) and not path.endswith((".py", ".toml", ".jsonl", ".json")):
            check_option(path)
            check_value(path, value.strip())


def check_value(path: str, value: str) -> None:
    """A value in lower case is one that its table takes; NAME and the like stand for others."""
    table, _, option = path.partition(".")
    model = ENGINES.get(table)
    if model is None or "." in option or not re.fullmatch(r"[a-z0-9_.-]+", value):
        return
    try:
        model(**{option: parse(value)})
    except ValidationError as error:
        wrong = [fault for fault in error.errors() if fault["loc"][:1] == (option,)]
        assert not wrong, f"{path}={value}"


@pytest.mark.parametrize("name", NAMED)
def test_every_other_program_in_a_command_exists(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    for module in re.findall(r"python -m (benchmarks[\w.]*)", text):
        assert (ROOT / f"{module.replace('.', '/')}.py").is_file(), module
    for script in re.findall(r"python (benchmarks/[\w/]+\.py)", text):
        assert (ROOT / script).is_file(), script
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"(?:`|^)make ([a-z-]+)", text, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


@pytest.mark.parametrize("name", NAMED)
def test_python_and_toml_blocks_are_valid(name: str) -> None:
    for block in blocks(ROOT / name, "toml"):
        tomllib.loads(block)
    for block in blocks(ROOT / name, "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("dpo_video."):
                module = importlib.import_module(node.module or "")
                for alias in node.names:
                    assert hasattr(module, alias.name), f"{node.module}.{alias.name}"
            elif isinstance(node, ast.Attribute) and dotted(node).startswith("dv."):
                check_public_name(dotted(node).removeprefix("dv."))


def dotted(node: ast.AST) -> str:
    """`dv.loss.Region` of nested attributes; "" where the root is no name."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (head := dotted(node.value)):
        return f"{head}.{node.attr}"
    return ""


def check_public_name(path: str) -> None:
    found: object = importlib.import_module("dpo_video")
    for part in path.split("."):
        if isinstance(found, ModuleType) and importlib.util.find_spec(f"{found.__name__}.{part}"):
            found = getattr(found, part, None) or importlib.import_module(
                f"{found.__name__}.{part}"
            )
        else:
            assert hasattr(found, part), f"dv.{path}"
            found = getattr(found, part)


@pytest.mark.parametrize("name", NAMED)
def test_every_linked_file_exists(name: str) -> None:
    text = re.sub(r"```.*?```", "", (ROOT / name).read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)#\s]+)", text):
        if "://" not in target and not (name.startswith("docs/") and GENERATED.fullmatch(target)):
            assert ((ROOT / name).parent / target).exists(), target


@pytest.mark.parametrize("name", ["README.md", "docs/strategies.md"])
def test_every_built_in_strategy_is_named(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    for kind in registry.KINDS:
        for listing in registry.listings(kind):
            if listing.distribution.startswith("dpo-video "):
                assert f"`{listing.name}`" in text, f"{kind} {listing.name}"


def test_the_option_pages_hold_every_option() -> None:
    spec = importlib.util.spec_from_file_location("docs_hooks", ROOT / "docs" / "_hooks.py")
    assert spec is not None
    assert spec.loader is not None
    hooks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hooks)
    pages = hooks.option_pages()
    recipes = pages.pop("recipe")
    assert "options/recipe.md" in (ROOT / "mkdocs.yml").read_text()
    assert all(f"`{name}`" in recipes for name in recipe_names())
    assert set(pages) == {"settings", *registry.KINDS}
    navigation = (ROOT / "mkdocs.yml").read_text()
    for name, page in pages.items():
        assert f"options/{name}.md" in navigation
        for kind in ENGINES if name == "settings" else (name,):
            assert all(f"`{path}`" in page for path in option_paths(kind)), kind


def test_every_room_on_the_map_exists() -> None:
    tree = (ROOT / "README.md").read_text().split("## Map")[1].split("```")[1]
    named, folder = set(), ROOT
    for line in tree.strip().splitlines():
        names, *_ = re.split(r"\s{2,}", line.strip())
        folder = folder if line.startswith(" ") else ROOT / names
        for name in names.split() if line.startswith(" ") else ():
            assert (folder / name).exists(), name
            named.add(name.strip("/"))
        assert folder.exists(), names
    rooms = {path.parent.name for path in (ROOT / "dpo_video").glob("*/__init__.py")}
    assert rooms <= named


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().split()) <= 2000


def test_no_document_has_a_placeholder() -> None:
    for document in DOCUMENTS:
        assert "<!--" not in document.read_text(), document
