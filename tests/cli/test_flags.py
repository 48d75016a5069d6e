"""The flags of all commands: equal flags are equal everywhere, and every help is a sentence."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any, get_args

import pytest
import typer
from typer.testing import CliRunner

import dpo_video
from dpo_video.cli import COMMANDS, app
from dpo_video.cli.console import say, show

GROUP: Any = typer.main.get_command(app)
OWN_MEANING = {"--out"}  # a file or folder of the command's own, with its own default


def options(command: str) -> Iterator[tuple[str, Any]]:
    for parameter in GROUP.commands[command].params:
        for flag in parameter.opts:
            if flag.startswith("--") and flag != "--help":
                yield flag, parameter


def test_a_flag_is_the_same_in_every_command() -> None:
    seen: dict[str, tuple[str, Any]] = {}
    for command, function in COMMANDS.items():
        types = inspect.signature(function, eval_str=True).parameters
        for flag, parameter in options(command):
            own = flag in OWN_MEANING
            kind = get_args(types[parameter.name].annotation)[0]
            facts = (
                repr(kind), parameter.multiple, parameter.is_flag, parameter.metavar,
                own or parameter.help, own or repr(parameter.default),
            )  # fmt: skip
            first, before = seen.setdefault(flag, (command, facts))
            assert facts == before, f"{flag} of {command} and of {first}"


@pytest.mark.parametrize("command", [*COMMANDS, ""])
def test_every_help_is_a_sentence(command: str) -> None:
    shown = GROUP.commands[command] if command else GROUP
    texts = [shown.help, *(p.help for p in shown.params if p.opts[0].startswith("--"))]
    for text in texts:
        assert text and text.strip()[0].isupper() and text.strip().endswith("."), text


def test_config_takes_exactly_the_flags_of_train() -> None:
    train = dict(options("train")).keys() - {
        "--out", "--resume", "--auto-resume", "--accept-changes",
    }  # fmt: skip
    assert dict(options("config")).keys() - {"--json"} == train


@pytest.mark.parametrize(
    ("command", "function"),
    [
        ("build", "build_pairs"), ("train", "train"), ("evaluate", "evaluate"),
        ("compare", "compare"), ("generate", "generate"), ("export", "export"),
        ("estimate", "estimate"), ("check", "check"), ("label", "label"), ("pack", "pack"),
        ("export-pairs", "export_pairs"),
    ],
)  # fmt: skip
def test_flags_are_keywords_of_the_python_function(command: str, function: str) -> None:
    called = getattr(dpo_video, function)
    keywords = set(inspect.signature(called).parameters)
    keywords |= {
        "target",
        "entries",
        "folder",
        "as_json",
    }  # other names in Python, or none
    names = {parameter.name for parameter in GROUP.commands[command].params}
    assert names - {"help"} <= keywords


def test_the_version_is_printed() -> None:
    done = CliRunner().invoke(app, ["--version"])
    assert (done.exit_code, done.stdout) == (0, f"dpo-video {dpo_video.__version__}\n")


@pytest.mark.parametrize(
    ("words", "completed"),
    [("--loss re", "region"), ("--tier 4", "4090"), ("--metric warp", "warp_error")],
)
def test_the_shell_completes_names_without_torch(words: str, completed: str) -> None:
    program = (
        "import sys\nsys.argv = ['dpo-video']\nfrom dpo_video.cli import main\n"
        "try:\n    main()\nfinally:\n    assert 'torch' not in sys.modules"
    )
    environment = {
        **os.environ, "_DPO_VIDEO_COMPLETE": "complete_bash",
        "COMP_WORDS": f"dpo-video train {words}", "COMP_CWORD": "3",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == [completed]


def test_texts_are_printed_as_they_are(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    text = "[bold]runs/[x][/] " + "long " * 30 + ":smile:"
    say(text, ("[red]command[/]", "bold"))
    show(text)
    out, err = capsys.readouterr()
    assert err == f"{text}[red]command[/]\n"
    assert out == f"{text}\n"
