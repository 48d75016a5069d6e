"""Tiers: their presets, and the tier of a card."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from dpo_video.diffusion.known_models import find_model
from dpo_video.errors import PluginError, UserError
from dpo_video.estimation.estimate import estimate_memory
from dpo_video.estimation.fewest_blocks import BUDGET_SHARE
from dpo_video.estimation.results import GIB
from dpo_video.estimation.tiers import find_tier, tier_of_card, tiers
from dpo_video.estimation.tracing import TraceCache
from dpo_video.registry import entry_points
from dpo_video.workflows.config import resolve
from dpo_video.workflows.doctor import doctor
from dpo_video.workflows.estimate import mode_of, phases_of, predict


def test_the_presets_are_those_of_video_dpo() -> None:
    ranks = {name: tier.preset("animatediff")["train.rank"] for name, tier in tiers().items()}
    assert ranks == {"t4": 4, "l4": 16, "4090": 16, "a100": 32, "h100": 32}
    # What a family trains with is its own, and what memory does not ask for is a recipe's.
    assert all(path.startswith("memory.") for t in tiers().values() for path in t.options)


def test_a_backbones_option_overrides_the_general_one() -> None:
    t4 = find_tier("t4")
    assert t4.preset("animatediff")["memory.backward"] == "joint"
    assert t4.preset("a stranger's")["memory.backward"] == "split"


def test_a_models_option_overrides_under_any_of_its_names() -> None:
    t4 = find_tier("t4")
    for name in ("cogvideox-5b", "THUDM/CogVideoX-5b", "thudm/cogvideox-5B"):
        assert t4.preset("cogvideox", name)["memory.forward_chunks"] == 8
        assert "memory.forward_chunks" not in t4.preset("wan", name)
    for name in ("cogvideox-2b", "my/own", None):
        assert "memory.forward_chunks" not in t4.preset("cogvideox", name)


def test_the_model_selects_presets_and_flags_override_them(tmp_path: Path) -> None:
    chosen = {"backbone": "cogvideox"}
    large = ["backbone.model=cogvideox-5b"]
    assert resolve(tier="t4", choices=chosen).memory.backward == "joint"  # the default model's
    by_flag = resolve(tier="t4", choices=chosen, assignments=large)
    assert (by_flag.memory.backward, by_flag.memory.forward_chunks) == ("split", 8)
    file = tmp_path / "run.toml"
    file.write_text('[backbone]\nname = "cogvideox"\nmodel = "cogvideox-5b"\n')
    assert resolve(file=file, tier="t4").memory == by_flag.memory
    over = resolve(tier="t4", choices=chosen, assignments=["memory.forward_chunks=2", *large])
    assert over.memory.forward_chunks == 2


@pytest.mark.parametrize(
    ("card", "memory", "tier"),
    [
        ("Tesla T4", 14.75, "t4"),
        ("NVIDIA L4", 22.03, "l4"),
        ("NVIDIA L40S", 44.4, "4090"),
        ("NVIDIA GeForce RTX 4090", 23.64, "4090"),
        ("NVIDIA GeForce RTX 3090", 23.6, "4090"),
        ("NVIDIA A100-SXM4-80GB", 79.25, "a100"),
        ("NVIDIA A100-SXM4-40GB", 39.4, "4090"),
        ("NVIDIA H100 80GB HBM3", 79.1, "h100"),
        ("NVIDIA H200", 139.7, "h100"),
        ("NVIDIA GeForce RTX 3060", 11.6, None),
    ],
)
def test_a_card_gets_its_own_tier_or_the_best_smaller_one(
    card: str, memory: float, tier: str | None
) -> None:
    found = tier_of_card(card, memory)
    assert (found.name if found else None) == tier


def test_an_unknown_tier_lists_the_known_ones() -> None:
    with pytest.raises(UserError, match=r"Unknown tier 'l44'\. Did you mean 'l4'\?.*auto"):
        find_tier("l44")


def test_auto_without_a_gpu_is_a_user_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(UserError, match=r"this machine has none\. Name one of t4, l4, 4090, a100"):
        find_tier("auto")


# --- in a configuration ------------------------------------------------------------------------


def test_a_file_overrides_a_tier_and_flags_override_a_file(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text(
        '[train]\nrank = 64\nalpha = 1.0\nsteps = 7\n[backbone]\nname = "animatediff"\n'
    )
    by_file = resolve(file=file, tier="l4")
    assert (by_file.train.rank, by_file.train.alpha, by_file.train.steps) == (64, 1, 7)
    assert by_file.memory.checkpointing == "auto"
    assert resolve(tier="l4", choices={"backbone": "animatediff"}).train.rank == 16
    flags = {"train.gradient_accumulation_steps": 1}
    over = resolve(file=file, tier="l4", flags=flags, assignments=["memory.backward=split"])
    assert over.train.gradient_accumulation_steps == 1
    assert (over.memory.checkpointing, over.memory.backward) == ("auto", "split")


def test_alpha_follows_a_rank_set_by_flag() -> None:
    chosen = resolve(tier="a100", choices={"backbone": "animatediff"}, assignments=["train.rank=8"])
    assert (chosen.train.rank, chosen.train.alpha) == (8, 16)


@pytest.mark.parametrize("backbone", ["tiny", "animatediff", "cogvideox", "wan"])
def test_every_preset_option_exists_for_the_backbone(backbone: str) -> None:
    for name, tier in tiers().items():
        tables = resolve(tier=name, choices={"backbone": backbone}).tables
        for path, value in tier.preset(backbone, tables["backbone"].get("model")).items():
            head, option = path.split(".")
            assert tables[head][option] == value, path


# The fastest case; benchmarks/bench_memory.py covers all tiers, and what `auto` chooses.
def test_the_smallest_card_holds_its_presets_with_all_blocks_checkpointed() -> None:
    config = resolve(tier="t4", choices={"backbone": "cogvideox"})
    assert (config.memory.checkpointing, config.memory.quantization) == ("auto", "native")
    (need,) = estimate_memory(
        config.backbone, {"toggle": config.reference}, config.loss, config.train,
        modes=[mode_of(config)],
    ).estimates  # fmt: skip
    assert need.mode.checkpointing == "blocks"
    assert need.total <= BUDGET_SHARE * find_tier("t4").memory_gib * GIB


# benchmarks/bench_memory.py covers all tiers.
@pytest.mark.parametrize("backbone", ["animatediff", "cogvideox", "wan"])
def test_the_smallest_card_builds_samples_evaluates_and_resumes(backbone: str) -> None:
    flags = {"memory.checkpointing": "blocks"}
    config = resolve(tier="t4", choices={"backbone": backbone}, flags=flags)
    traces, card = TraceCache(), find_tier("t4")
    found = predict(config, alone=True, traces=traces)
    phases = phases_of(config, found, traces)
    assert {phase.name.split(":")[0] for phase in phases} == {
        "build", "validation videos", "evaluate",
    }  # fmt: skip
    assert [phase.name for phase in phases if not phase.fits(card)] == []
    assert all(phase.flops for phase in phases if "text encoder" not in phase.name)


def test_a_resolved_run_stores_options_and_no_tier_name(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    first = resolve(tier="t4", choices={"backbone": "wan"})
    file.write_text(first.toml())
    assert resolve(file=file).tables == first.tables


FAMILY = """
from dpo_video.backbone.tiny import Tiny as Ours
from dpo_video.strategies import Backbone

class Stranger(Backbone):
    "A family of a plugin."
    guards = ("sharpness",)
    training = {"rank": 48, "learning_rate": 3e-5}
    tiers = {"l4": {"memory.checkpointing": "auto"}, "small": {"train.rank": 8}}
    model: str = "stranger-1b"
    "Model."
    load = Ours.load
    clips = Ours.clips
    prompts = Ours.prompts
"""
SMALL = """
card = "A small card"
memory_gib = 6
tflops = 9
source = "its box"
options = {"memory.backward" = "split"}
[model."stranger-1b"]
"train.steps" = 11
"""
ENTRIES = """
[dpo_video.backbone]
stranger = stranger.family:Stranger
[dpo_video.tier]
small = stranger
spoilt = stranger
[dpo_video.model]
stranger = stranger
"""


@pytest.fixture
def stranger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A package with a family, its presets and models, a tier, and a tier that cannot be read."""
    info = tmp_path / "stranger-1.0.dist-info"
    files = {
        "stranger/__init__.py": "",
        "stranger/family.py": FAMILY,
        "stranger/small.toml": SMALL,
        "stranger/spoilt.toml": SMALL.replace("memory.backward", "train.rank"),
        "stranger/index.json": json.dumps(
            {"stranger-1b": {"backbone": "stranger", "hub": ["some/Stranger-1B"], "parameters": 5}}
        ),
        f"{info.name}/METADATA": "Metadata-Version: 2.1\nName: stranger\nVersion: 1.0\n",
        f"{info.name}/entry_points.txt": ENTRIES,
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    entry_points.forget()
    yield
    entry_points.forget()


@pytest.mark.usefixtures("stranger")
def test_a_family_of_a_plugin_brings_presets_and_models_and_keeps_its_own_training() -> None:
    chosen = {"choices": {"backbone": "stranger"}, "metrics": ["sharpness"]}
    for name in ("t4", "l4", "4090", "a100", "h100"):
        config = resolve(tier=name, **chosen)
        assert (config.train.rank, config.train.learning_rate) == (48, 3e-5)
        assert config.memory.checkpointing == ("auto" if name == "l4" else "blocks")
    small = resolve(tier="small", **chosen)
    assert (small.train.rank, small.train.steps, small.memory.backward) == (8, 11, "split")
    by_hub = resolve(tier="small", assignments=["backbone.model=some/stranger-1b"], **chosen)
    assert by_hub.train.steps == 11
    model = find_model("stranger-1b")
    assert model is not None and model.distribution == "stranger 1.0"
    assert "small" in tiers() and "spoilt" not in tiers()
    with pytest.raises(PluginError, match=r"'spoilt' of stranger 1.0 .*'train.rank' is not"):
        find_tier("spoilt")
    assert [each.what for each in doctor("stranger").faults] == ["tier stranger:spoilt"]
