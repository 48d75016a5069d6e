"""Recipes: the papers' values, their place among the other options, and plugins that bring some."""

from __future__ import annotations

import importlib
import json
import re
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import SHAPE
from typer.testing import CliRunner

import dpo_video as dv
from dpo_video import registry
from dpo_video.cli import app
from dpo_video.errors import UserError
from dpo_video.loss.global_ import Global
from dpo_video.registry import entry_points
from dpo_video.workflows import entries
from dpo_video.workflows.catalog import list_strategies
from dpo_video.workflows.config import Config, resolve
from dpo_video.workflows.recipes import find_recipe, recipe_names
from dpo_video.workflows.train import _larger_batch

ROOT = Path(__file__).parents[2]
PAPERS = tomllib.loads((ROOT / "tests" / "papers.toml").read_text())
MODELS = {"cogvideox": ("cogvideox-2b", "cogvideox-5b"), "wan": ("wan2.1-t2v-1.3b",)}


def resolved(recipe: str | None = None, backbone: str = "wan", **options: Any) -> Config:
    choices = {"backbone": backbone, **options.pop("choices", {})}
    return resolve(recipe=recipe, choices=choices, metrics=["frame_difference"], **options)


def at(tables: Any, path: str) -> Any:
    for part in path.split("."):
        tables = tables[part]
    return tables


# --- the papers ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recipe", "backbone"), [(name, family) for name in PAPERS for family in PAPERS[name]]
)
def test_every_published_value_is_that_of_the_recipe(recipe: str, backbone: str) -> None:
    expected = dict(PAPERS[recipe][backbone])
    for model in MODELS.get(backbone, ("",)):
        named = [f"backbone.model={model}"] if model else []
        config = resolved(recipe, backbone, assignments=named)
        train = config.train
        batch = train.batch_size * train.gradient_accumulation_steps
        assert batch == expected.pop("batch", batch)
        assert {path: at(config.tables, path) for path in expected} == expected
        assert config.notes == ()


def test_the_command_prints_it() -> None:
    arguments = ["config", "--recipe=densedpo", "--backbone=wan", "--json"]
    done = CliRunner().invoke(app, [*arguments, "--metric=frame_difference"])
    assert json.loads(done.stdout) == resolved("densedpo").tables


def test_every_recipe_has_a_file_and_values_for_its_families() -> None:
    files = {path.stem for path in (ROOT / "dpo_video" / "recipe").glob("*.toml")}
    assert files == set(recipe_names()) == set(PAPERS)
    for name in files:
        for backbone in find_recipe(name).backbone:
            settings = find_recipe(name).settings(backbone)
            tables = resolved(name, backbone).tables
            for path, setting in settings.items():
                assert at(tables, path if "." in path else f"{path}.name") == setting.value, path


def test_the_documents_list_what_differs_from_the_papers() -> None:
    rows = [
        f"| `{name}` | {group} | `{path}` | {setting.paper} | {setting.text} | {setting.why} |"
        for name in recipe_names()
        if find_recipe(name).extends is None
        for group, settings in find_recipe(name).groups.items()
        for path, setting in settings.items()
        if setting.paper is not None
    ]
    text = (ROOT / "docs" / "recipes.md").read_text()
    table = text.split("| paper | here | why |\n|---|---|---|---|---|---|\n")[1].split("\n\n")[0]
    assert table.splitlines() == rows, "\n".join(rows)


# --- among other options ---------------------------------------------------------------------


def test_backbone_recipe_tier_file_and_flags_override_each_other_in_this_order(
    tmp_path: Path,
) -> None:
    file = tmp_path / "some.toml"
    file.write_text("[train]\nrank = 6\n")
    sources: dict[str, Any] = {}
    found = [(resolved(backbone="tiny").train.rank, resolved().train.rank)]
    for more in (
        {"recipe": "densedpo"}, {"tier": "t4"}, {"file": file}, {"flags": {"train.rank": 3}},
    ):  # fmt: skip
        sources |= more
        train = resolved(**sources).train
        found.append((train.rank, train.alpha))
    # An alpha that is not given follows the rank: DenseDPO's is equal to it, Wan's twice as large.
    assert found == [(16, 64), (128, 128), (16, 16), (6, 6), (3, 3)]
    assert resolved(flags={"train.rank": 3}).train.alpha == 6
    assert resolved(**sources).train.warmup_steps == 250


def test_options_of_a_strategy_hold_if_it_is_chosen(tmp_path: Path) -> None:
    config = resolved("densedpo", choices={"loss": "global"})
    assert config.loss == Global() and config.tables["pairs"]["eta"] == [0.65, 0.8]
    assert "eta" not in resolved("densedpo", choices={"pairs": "jitter"}).tables["pairs"]
    assert resolved("densedpo", choices={"pairs": "some/folder"}).pair_store == "some/folder"
    file = tmp_path / "some.toml"
    file.write_text('[loss]\nname = "global"\nbeta = 7.0\n')
    assert resolved("densedpo", file=file).loss == Global(beta=7)


def test_a_part_of_a_nested_option_keeps_the_rest(tmp_path: Path) -> None:
    assert resolved("localdpo", assignments=["pairs.mask.max_blobs=2"]).notes == ()


def test_a_run_toml_repeats_the_run_without_the_recipe(tmp_path: Path) -> None:
    config = resolved("localdpo", "cogvideox", tier="t4")
    assert config.toml().startswith("# resolved with --recipe localdpo --tier t4\n")
    (tmp_path / "run.toml").write_text(config.toml())
    again = resolve(file=tmp_path / "run.toml")
    assert again.tables == config.tables and again.notes == ()


def test_what_a_tier_changes_of_a_recipe_is_said() -> None:
    config = resolved("localdpo", "cogvideox", tier="t4")
    (note,) = config.notes
    assert note == (
        "The tier t4 changes the recipe localdpo: train.rank 64 to 16, train.mixed_precision bf16 "
        "to fp16, train.alpha 128.0 to 32.0. Keep a value with --set train.rank=64."
    )
    kept = resolved("localdpo", "cogvideox", tier="t4", assignments=["train.rank=64"])
    assert kept.train.alpha == 128
    assert "train.rank" not in kept.notes[0] and "mixed_precision" in kept.notes[0]


def test_a_tier_raises_no_number_of_a_recipe() -> None:
    config = resolved("video-dpo-t4", "animatediff", tier="a100")
    assert (config.train.rank, config.train.alpha) == (4, 8)
    assert config.tables["backbone"]["frames"] == 8 and config.notes == ()
    assert config.train.gradient_accumulation_steps == 2


def test_a_file_that_overrides_a_tier_is_named(tmp_path: Path) -> None:
    file = tmp_path / "some.toml"
    file.write_text("[train]\nrank = 64\n")
    (note,) = resolved(tier="t4", file=file).notes
    assert "some.toml' sets train.rank, so the tier t4 does not. Set them with" in note


def test_a_family_that_the_recipe_is_not_for_is_named() -> None:
    (note,) = resolved("localdpo", "tiny").notes
    assert note.startswith("The recipe localdpo is for cogvideox and wan. On tiny its general")


def test_without_a_recipe_one_line_names_the_one_that_exists(tmp_path: Path) -> None:
    dense = {"pairs": "dense", "loss": "segment"}
    (note,) = resolved(choices=dense).notes
    assert "\n" not in note and note.endswith(
        "the paper on dense pairs and the segment loss, add --recipe densedpo."
    )
    (note,) = resolved(
        choices={"pairs": "a/b", "loss": "segment"}, made_with={"pairs": {"name": "dense"}}
    ).notes
    assert note.endswith("--recipe densedpo.")
    assert resolved(choices={"pairs": "dense", "loss": "global"}).notes == ()
    assert resolved(backbone="tiny", choices=dense).notes == ()
    assert resolved("densedpo", choices=dense).notes == ()
    (tmp_path / "run.toml").write_text(resolved(choices=dense).toml())
    assert resolve(file=tmp_path / "run.toml").notes == ()


def test_building_says_it_once(
    small_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    notes: list[str] = []

    class Kept(dv.Progress):
        def note(self, text: str, *, warning: bool = False) -> None:
            notes.append(text)

    monkeypatch.chdir(tmp_path)
    shape = {"frames": SHAPE.frames, "height": SHAPE.height, "width": SHAPE.width}
    store = dv.build_pairs(
        backbone=dv.backbone.AnimateDiff(model=str(small_folder), **shape), recipe="video-dpo",
        count=1, prompt="a square", device="cpu", progress=Kept(), previews=False,
        set={"pairs.num_inference_steps": 1, "train.mixed_precision": "no"},
    )  # fmt: skip
    assert store.manifest.recipe["pairs"]["guidance_scale"] == 7.5
    dv.build_pairs(
        "jitter", backbone=dv.backbone.AnimateDiff(model=str(small_folder), **shape), count=1,
        prompt="a square", device="cpu", progress=Kept(), previews=False,
        set={"pairs.num_inference_steps": 1}, recipe="localdpo",
    )  # fmt: skip
    assert sum("The recipe localdpo is for" in note for note in notes) == 1


def test_an_entry_of_compare_names_a_recipe(tmp_path: Path) -> None:
    file = tmp_path / "entries.toml"
    file.write_text('[own]\nrecipe = "densedpo"\nbackbone = "wan"\n[given]\nbackbone = "wan"\n')
    own, given = entries.read_entries([file]).entries
    ranks = [entry.resolve({}, "video-dpo").train.rank for entry in (own, given)]
    assert ranks == [128, 16] and given.resolve({}).train.rank == 64


def test_several_processes_are_told_of_their_larger_batch() -> None:
    config = resolved("densedpo")
    (note,) = _larger_batch("densedpo", config, 4)
    assert "1024 a step. For 256 a step, divide train.gradient_accumulation_steps by 4" in note
    assert not _larger_batch(None, config, 4)
    assert not _larger_batch("densedpo", config, 1)


# --- by name ---------------------------------------------------------------------------------


def test_list_and_show_print_recipes_with_their_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "250")
    listed = CliRunner().invoke(app, ["list", "recipe"]).stdout
    assert all(name in listed for name in recipe_names()) and "segment by segment" in listed
    assert {row.kind for row in list_strategies().strategies} == {*registry.PYTHON, "recipe"}
    shown = CliRunner().invoke(app, ["show", "recipe", "densedpo"]).stdout
    assert "arXiv 2506.03517" in shown
    (beta,) = (line for line in shown.splitlines() if "loss.beta" in line)
    assert re.search(r"250 +beta 500 \(published: 500; the paper multiplies by 0\.5;", beta)
    as_json = json.loads(CliRunner().invoke(app, ["show", "recipe", "densedpo", "--json"]).stdout)
    assert as_json["backbone"]["wan"]["backbone.shift"]["value"] == 5.66


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["show", "recipe"], r"show recipe needs a NAME"),
        (["show", "recipe", "dense"], r"Unknown recipe 'dense'\. Did you mean 'densedpo'\?"),
        (["config", "--recipe", "dense"], r"Unknown recipe 'dense'"),
    ],
)
def test_an_unknown_recipe_is_one_sentence(arguments: list[str], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        CliRunner().invoke(app, arguments, catch_exceptions=False)


Add = Callable[[str], None]


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Add]:
    """Put a package with the recipe `mine` on the path."""
    monkeypatch.syspath_prepend(tmp_path)

    def add(text: str) -> None:
        (tmp_path / "some_recipes").mkdir()
        (tmp_path / "some_recipes" / "__init__.py").write_text("raise ImportError")
        (tmp_path / "some_recipes" / "mine.toml").write_text(text)
        info = tmp_path / "some_recipes-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: some-recipes\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text("[dpo_video.recipe]\nmine = some_recipes\n")
        importlib.invalidate_caches()
        entry_points.forget()

    yield add
    entry_points.forget()
    dv.workflows.recipes._read.cache_clear()  # type: ignore[attr-defined]


HEAD = 'summary = "Mine"\nsource = "me"\n'


def test_a_plugin_brings_a_recipe(plugin: Add) -> None:
    plugin(
        HEAD + 'extends = "densedpo"\n[options]\n"train.rank" = {value = 4, source = "me"}\n'
        '[model."wan2.1-t2v-14b"]\n"train.steps" = {value = 7, source = "me"}\n'
    )
    assert resolved("mine").train.rank == 4
    assert resolved("mine").train.warmup_steps == 250
    large = ["backbone.model=Wan-AI/Wan2.1-T2V-14B-Diffusers"]
    assert resolved("mine", assignments=large).train.steps == 7
    row = next(row for row in list_strategies("recipe").strategies if row.name == "mine")
    assert (row.summary, row.distribution) == ("Mine", "some-recipes 1.0")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("x = ", r"The recipe 'mine' of some-recipes 1\.0 cannot be read \(.*Correct '.*mine"),
        ('summary = "Mine"\n', r"cannot be read \(source: it is missing\)"),
        (HEAD + '[options]\n"train.rank" = 4\n', r"options\.train\.rank: a table is needed"),
        (
            HEAD + '[options]\n"train.rank" = {value = 4, source = "", paper = "8"}\n',
            r"give both `paper` and `why`, or neither",
        ),
        (HEAD + '[options]\nlos = {value = "global", source = ""}\n', r"a recipe chooses no 'los'"),
        (HEAD + 'extends = "video-dpo-t4"\n', r"extends 'video-dpo-t4', which extends another"),
        (HEAD + 'extends = "mine"\n', r"extends 'mine', which extends another"),
        (
            HEAD + '[options]\n"train.rnk" = {value = 4, source = ""}\n',
            r"Unknown option 'train\.rnk'\. Did you mean 'train\.rank'",
        ),
    ],
)
def test_a_damaged_recipe_is_one_sentence(plugin: Add, text: str, sentence: str) -> None:
    plugin(text)
    with pytest.raises(UserError, match=sentence):
        resolved("mine")
    resolved(choices={"pairs": "dense", "loss": "segment"})  # other runs do not mind
