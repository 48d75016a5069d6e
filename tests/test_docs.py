"""The documents say what the program does."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer.main

from dpo_video import registry
from dpo_video.cli import app

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("plugins/**/*.md"))]


def commands() -> list[tuple[str, str]]:
    found = []
    for document in DOCUMENTS:
        for block in re.findall(r"```(?:bash|sh)\n(.*?)```", document.read_text(), re.DOTALL):
            for line in block.splitlines():
                if line.startswith("dpo-video "):
                    found.append((document.name, line.split("  #")[0].strip()))
    return found


@pytest.mark.parametrize(("document", "line"), commands())
def test_every_command_parses(document: str, line: str) -> None:
    name, *arguments = shlex.split(line)[1:]
    group = typer.main.get_command(app)
    command = group.commands[name]  # type: ignore[attr-defined]
    # Parses and converts without running; an unknown flag or a wrong type raises.
    command.make_context(name, list(arguments))


def test_the_readme_names_every_built_in_strategy() -> None:
    text = (ROOT / "README.md").read_text()
    for kind in registry.KINDS:
        for listing in registry.listings(kind):
            if listing.distribution.startswith("dpo-video "):
                assert f"`{listing.name}`" in text, f"{kind} {listing.name}"


def test_every_file_that_the_readme_names_exists() -> None:
    tree = (ROOT / "README.md").read_text().split("## Where things are")[1].split("```")[1]
    folder = ROOT
    for line in tree.strip().splitlines():
        names, *_ = re.split(r"\s{2,}", line.strip())
        if not line.startswith(" "):
            folder = ROOT / names
            assert folder.exists(), names
            continue
        for name in names.split():
            assert (folder / name).exists(), name


def test_every_make_target_in_the_readme_exists() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"make ([a-z]+)", (ROOT / "README.md").read_text()):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_no_document_has_an_unfilled_place() -> None:
    for document in DOCUMENTS:
        assert "<!--" not in document.read_text(), document
