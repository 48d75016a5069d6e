"""Strategies by name, built-in ones and plugins'; a broken plugin breaks nothing else."""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path

import pytest
from conftest import Install, Said
from typer.testing import CliRunner

from dpo_video import registry, strategies
from dpo_video.cli import app
from dpo_video.errors import PluginError, UserError
from dpo_video.pairs._masks import RegionOptions
from dpo_video.registry import entry_points as entries
from dpo_video.workflows.config import resolve
from dpo_video.workflows.doctor import doctor

SOUND = '''
from dpo_video.loss.global_ import Global
from dpo_video.strategies import Loss

class Sound(Loss):
    """Works."""

    def __call__(self, errors):
        return Global()(errors)
'''


def test_built_in_strategies_are_entry_points() -> None:
    for kind in registry.KINDS:
        for listing in registry.listings(kind):
            assert listing.kind == kind
            if listing.distribution.startswith("dpo-video "):
                assert listing.summary, f"{kind} {listing.name} has no first line"


@pytest.mark.parametrize(
    ("kind", "name", "base"),
    [
        ("loss", "region", strategies.Loss),
        ("pairs", "local", strategies.PairBuilder),
        ("labeler", "vlm", strategies.Labeler),
        ("labeler", "metric", strategies.LabelerFactory),
        ("labeler", "page", strategies.StoreLabeler),
        ("reference", "toggle", strategies.Reference),
        ("backbone", "tiny", strategies.Backbone),
    ],
)
def test_a_name_gives_a_class_of_its_kind(kind: str, name: str, base: type) -> None:
    loaded = registry.load(kind, name)
    assert issubclass(loaded, base) and loaded.kind == kind


def test_an_unknown_name_suggests_the_nearest_one() -> None:
    with pytest.raises(UserError, match=r"Unknown loss 'regoin'\. Did you mean 'region'\? Avail"):
        registry.load("loss", "regoin")
    with pytest.raises(UserError, match=r"Unknown kind 'los'\. Did you mean 'loss'\?"):
        registry.load("los", "region")


def test_a_plugin_is_listed_and_loaded_like_a_built_in(install: Install) -> None:
    install("dpo-sound", SOUND, "sound", "Sound")
    listed = {listing.name: listing for listing in registry.listings("loss")}
    assert listed["sound"].distribution == "dpo-sound 1.0"
    assert {"global", "region"} <= listed.keys()
    assert registry.load("loss", "sound").__doc__ == "Works."


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ("import nothing_like_this", r"cannot be imported \(ModuleNotFoundError: No module named"),
        ("raise RuntimeError('no licence')", r"cannot be imported \(RuntimeError: no licence\)"),
        ("import sys; sys.exit(3)", r"cannot be imported \(SystemExit: 3\)"),
        ("def Broken(", r"cannot be imported \(SyntaxError"),
        ("Other = 1", r"cannot be imported \(AttributeError"),
        ("class Broken: pass", r"is not a Loss\. Derive it from dpo_video\.strategies\.Loss"),
        ("Broken = 5", r"is not a Loss"),
        ("from dpo_video.strategies import Metric as Broken", r"is not a Loss"),
    ],
)
def test_a_broken_plugin_is_named_with_its_package(
    install: Install, source: str, sentence: str
) -> None:
    install("dpo-broken", source, "broken", "Broken")
    names = [listing.name for listing in registry.listings("loss")]
    assert "broken" in names and "region" in names
    with pytest.raises(PluginError, match=rf"loss 'broken' of dpo-broken 1\.0 {sentence}"):
        registry.load("loss", "broken")
    assert registry.load("loss", "region").__name__ == "Region"
    sys.modules.pop("dpo_broken", None)


def test_a_name_of_two_packages_is_chosen_with_the_package(install: Install) -> None:
    install("dpo-one", SOUND, "sound", "Sound")
    install("dpo_Two", SOUND, "sound", "Sound")
    notes = {each.distribution: each.note for each in registry.listings("loss") if each.note}
    assert notes["dpo-one 1.0"] == "same name as another package's; choose it as dpo-one:sound"
    with pytest.raises(PluginError, match=r"the package as well: dpo-\w+:sound or dpo-\w+:sound"):
        registry.load("loss", "sound")
    one, two = (registry.load("loss", f"dpo-{name}:sound") for name in ("one", "two"))
    assert (one.__module__, two.__module__) == ("dpo_one", "dpo_Two")
    assert registry.load("loss", "DPO_one:sound") is one
    assert registry.name_of(one()) == "dpo-one:sound"
    with pytest.raises(UserError, match=r"Unknown loss 'dpo-on:sound'\. Did you mean 'dpo-one:s"):
        registry.load("loss", "dpo-on:sound")


def test_a_built_in_strategy_wins_over_a_plugins(install: Install) -> None:
    install("dpo-three", SOUND, "region", "Sound")
    assert registry.load("loss", "region").__name__ == "Region"
    assert registry.load("loss", "dpo-three:region").__name__ == "Sound"
    assert registry.load("loss", "dpo-video:region").__name__ == "Region"
    assert registry.name_of(registry.load("loss", "dpo-three:region")()) == "dpo-three:region"
    result = CliRunner().invoke(app, ["list", "loss"], env={"COLUMNS": "200"})
    assert "(hidden by the built-in; choose it as dpo-three:region)" in result.output


def test_two_packages_with_a_built_in_name_change_nothing_but_a_line_in_list(
    install: Install,
) -> None:
    def told(*command: str) -> list[str]:
        return CliRunner().invoke(app, [*command], env={"COLUMNS": "200"}).output.splitlines()

    commands = [("list", "loss"), ("show", "loss", "region"), ("config", "--loss", "region")]
    before = [told(*command) for command in commands]
    for package in ("dpo-one", "dpo-two"):
        install(package, SOUND, "region", "Sound")
    listed, *others = [told(*command) for command in commands]
    assert others == before[1:]
    added = [line for line in listed if line not in before[0]]
    assert sorted(line.split()[-2] for line in added) == ["dpo-one", "dpo-two"]
    assert [line for line in listed if line not in added] == before[0]


def test_a_name_keeps_its_case(install: Install) -> None:
    install("dpo-mine", SOUND, "MyLoss", "Sound")
    assert "MyLoss" in [listing.name for listing in registry.listings("loss")]
    config = resolve(choices={"loss": "MyLoss"})
    assert tomllib.loads(config.toml())["loss"]["name"] == "MyLoss"
    assert registry.name_of(config.loss) == "MyLoss"
    with pytest.raises(UserError, match=r"Unknown loss 'myloss'\. Did you mean 'MyLoss'"):
        registry.load("loss", "myloss")


@pytest.mark.parametrize(
    ("value", "kept"), [("", {"dpo-one", "dpo-two"}), ("off", set()), ("DPO_two, x", {"dpo-two"})]
)
def test_plugins_can_be_switched_off(
    install: Install, monkeypatch: pytest.MonkeyPatch, value: str, kept: set[str]
) -> None:
    install("dpo-one", SOUND, "one", "Sound")
    install("dpo-two", SOUND, "two", "Sound")
    monkeypatch.setenv(entries.PLUGINS, value)
    entries.forget()
    listed = {each.distribution.split()[0] for each in registry.listings("loss")}
    assert listed & {"dpo-one", "dpo-two", "dpo-video"} == {"dpo-video", *kept}


def test_an_entry_point_of_no_known_group_is_named(install: Install) -> None:
    install("dpo-one", SOUND, "one", "Sound", "losses")
    (sentence,) = registry.unknown_groups()
    assert sentence == (
        "dpo-one 1.0 has entry points of the group 'dpo_video.losses', which does not exist. Did "
        "its author mean dpo_video.loss?"
    )
    assert "dpo_video.losses" in CliRunner().invoke(app, ["list", "loss"]).output


def test_listing_imports_no_strategy(install: Install) -> None:
    install("dpo-loud", "raise SystemExit('imported')", "loud", "Loud")
    assert "loud" in [listing.name for listing in registry.listings("loss")]


def test_options_come_with_path_type_default_and_meaning() -> None:
    found = {option.path: option for option in registry.options(registry.load("loss", "region"),
                                                                "loss")}  # fmt: skip
    assert found["loss.beta"].type == "float" and found["loss.beta"].default == "2500.0"
    assert found["loss.beta"].meaning.startswith("Slope of both terms")
    pairs = {option.path for option in registry.options(registry.load("pairs", "local"), "pairs")}
    assert "pairs.alphas" in pairs
    assert {f"pairs.mask.{name}" for name in RegionOptions.model_fields} <= pairs


def strategy(body: str, base: str = "Loss") -> str:
    """A module with one class, which is valid except for `body`."""
    return f"""
from typing import Any, ClassVar
from pydantic import ConfigDict
from dpo_video import strategies

class Odd(strategies.{base}):
    '''An odd one.'''

    {body}

    def __call__(self, *arguments: Any) -> Any: ...
"""


@pytest.mark.parametrize(
    ("kind", "source", "sentence"),
    [
        ("loss", strategy("name: str = 'a'"), "has an option 'name', which means the strategy's"),
        ("loss", strategy("model_config = ConfigDict(frozen=False)"), "is not frozen, or accepts"),
        ("loss", strategy("model_config = ConfigDict(extra='allow')"), "is not frozen, or accepts"),
        ("loss", "from dpo_video.strategies import Loss as Odd", "is incomplete: it lacks __c"),
        ("labeler", "from dpo_video.strategies import StoreLabeler as Odd", "lacks label_store"),
        ("labeler", strategy("", "AnyLabeler"), "is not a Labeler or LabelerFactory or StoreLab"),
        ("metric", strategy("unit: ClassVar[str] = ''", "Metric"), "does not set higher_is_b"),
        ("pairs", strategy("needs_video: ClassVar[bool] = True; store: str = ''", "PairBuilder"),
         "has an option 'store', which means a folder"),
    ],
)  # fmt: skip
def test_a_class_that_could_break_a_run_is_refused(
    install: Install, kind: str, source: str, sentence: str
) -> None:
    install("dpo-odd", source, "odd", "Odd", kind)
    with pytest.raises(PluginError, match=rf"The {kind} 'odd' of dpo-odd 1\.0 .*{sentence}"):
        registry.load(kind, "odd")
    sys.modules.pop("dpo_odd", None)


@pytest.mark.parametrize("name", ["a b", "a.b", "[/red]", "\x1b[31m", "a/b", "ünlaut", "-x"])
def test_an_invalid_name_is_listed_and_refused(install: Install, name: str) -> None:
    install("dpo-odd", SOUND, name, "Sound")
    assert name in [listing.name for listing in registry.listings("loss")]
    with pytest.raises(PluginError, match="has an invalid name"):
        registry.load("loss", name)
    result = CliRunner().invoke(app, ["list", "loss"])
    assert result.exit_code == 0 and "region" in result.output and "\x1b" not in result.output


@pytest.mark.parametrize(
    "damage",
    [b"[dpo_video.loss]\nno value here\n", b"[dpo_video.loss]\n\xff\xfe = a:B\n"],
    ids=["no value", "no text"],
)
def test_a_distribution_with_broken_metadata_is_named_and_left_out(
    install: Install, tmp_path: Path, damage: bytes
) -> None:
    install("dpo-sound", SOUND, "sound", "Sound")
    install("dpo-odd", SOUND, "odd", "Sound")
    (tmp_path / "dpo_odd-1.0.dist-info/entry_points.txt").write_bytes(damage)
    entries.forget()
    assert registry.load("loss", "sound") and registry.load("loss", "region")
    (sentence,) = entries.unreadable()
    assert sentence.startswith(
        "dpo-odd 1.0 provides strategies, but its entry points cannot be read"
    )
    assert "dpo-odd 1.0" in CliRunner().invoke(app, ["list", "loss"]).output


@pytest.mark.parametrize("value", ["", "no module!", ":Sound", "dpo_odd:"])
def test_an_empty_entry_point_is_harmless(install: Install, tmp_path: Path, value: str) -> None:
    install("dpo-odd", SOUND, "odd", "Sound")
    info = tmp_path / "dpo_odd-1.0.dist-info"
    (info / "entry_points.txt").write_text(f"[dpo_video.loss]\nodd = {value}\n")
    (info / "METADATA").unlink()
    entries.forget()
    assert "odd" in [listing.name for listing in registry.listings("loss")]
    with pytest.raises(PluginError, match="loss 'odd' of a package without a name"):
        registry.load("loss", "odd")


HELLO = '''
import typer
open("imported", "w").close()

def hello(name: str = typer.Option("you", help="Whom to greet.")) -> None:
    """Say hello."""
    typer.echo(f"Hello, {name}.")

def raising() -> None:
    """Raise."""
    raise RuntimeError("no greeting")
'''


def test_a_command_of_a_plugin_is_imported_when_it_runs_and_takes_nothing_away(
    install: Install, said: Said
) -> None:
    install("dpo-hello", HELLO, "hello", "hello", "command")
    install("dpo-gone", "import nothing_like_this\n", "gone", "gone", "command")
    install("dpo-raises", HELLO, "raises", "raising", "command")
    install("dpo-train", HELLO, "train", "hello", "command")
    said(0, "--help")
    helped = said.out  # type: ignore[attr-defined]
    assert "Say hello. (of dpo-hello 1.0)" in helped and "dpo-train" not in helped
    assert not Path("imported").exists()
    said(0, "list", "command")
    listed = said.out  # type: ignore[attr-defined]
    assert "run it as dpo-train:train" in listed and "Say hello." in listed
    assert not Path("imported").exists()
    for name in ("hello", "dpo-train:train"):
        said(0, name, "--name=all")
        assert said.out == "Hello, all.\n"  # type: ignore[attr-defined]
    told = said(2, "gone")
    assert told.startswith("Error: The command 'gone' of dpo-gone 1.0 cannot be imported")
    assert "The command 'raises' of dpo-raises 1.0 failed (RuntimeError: no" in said(1, "raises")
    faults = {each.what: each.fault for each in doctor(contracts=True).faults}
    assert list(faults) == ["command dpo-gone:gone"]
