"""Strategies are found by name, ours and strangers' alike; a broken one breaks nothing else."""

from __future__ import annotations

import sys

import pytest
from conftest import Install

from dpo_video import registry, strategies
from dpo_video.errors import PluginError, UserError
from dpo_video.masks import RegionOptions

SOUND = '''
from dpo_video.loss.global_ import Global
from dpo_video.strategies import Loss

class Sound(Loss):
    """Works."""

    def __call__(self, errors):
        return Global()(errors)
'''


def test_built_ins_come_in_by_entry_points_of_our_own() -> None:
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
        ("reference", "toggle", strategies.Reference),
        ("backbone", "tiny", strategies.Backbone),
    ],
)
def test_a_name_gives_a_class_of_its_kind(kind: str, name: str, base: type) -> None:
    loaded = registry.load(kind, name)
    assert issubclass(loaded, base) and loaded.kind == kind


def test_an_unknown_name_is_met_with_the_nearest_one() -> None:
    with pytest.raises(UserError, match=r"Unknown loss 'regoin'\. Did you mean 'region'\? Avail"):
        registry.load("loss", "regoin")
    with pytest.raises(UserError, match=r"Unknown kind 'los'\. Did you mean 'loss'\?"):
        registry.load("los", "region")


def test_a_plugin_is_listed_and_loaded_like_our_own(install: Install) -> None:
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


def test_a_name_that_two_packages_claim_is_refused_and_the_others_go_on(install: Install) -> None:
    install("dpo-one", SOUND, "sound", "Sound")
    install("dpo-two", SOUND, "sound", "Sound")
    install("dpo-three", SOUND, "region", "Sound")
    rows = [(listing.name, listing.distribution) for listing in registry.listings("loss")]
    assert ("sound", "dpo-one 1.0") in rows and ("sound", "dpo-two 1.0") in rows
    with pytest.raises(PluginError, match=r"'sound': (dpo-one 1.0, dpo-two|dpo-two 1.0, dpo-one)"):
        registry.load("loss", "sound")
    with pytest.raises(PluginError, match=r"'region': .*dpo-three 1\.0.*Uninstall all but one"):
        registry.load("loss", "region")
    assert registry.load("loss", "global").__name__ == "Global"


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
