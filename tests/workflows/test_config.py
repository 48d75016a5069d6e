"""Options from several sources, and a run.toml that resolves to itself."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest

from dpo_video.backbone.animatediff import AnimateDiffModel
from dpo_video.errors import UserError
from dpo_video.loss.global_ import Global
from dpo_video.loss.region import Region
from dpo_video.pairs.jitter import Jitter
from dpo_video.workflows.config import Config, resolve
from dpo_video.workflows.session import store_manifest

METRIC = ("frame_difference",)


def resolved(*assignments: str, **options: Any) -> Config:
    """One metric that suits every backbone; the defaults load all of them."""
    return resolve(assignments=assignments, metrics=METRIC, **options)


def written(folder: Path, text: str) -> Path:
    path = folder / "some.toml"
    path.write_text(text)
    return path


# --- precedence ------------------------------------------------------------------------------


def test_the_defaults_are_the_main_recipe() -> None:
    config = resolve()
    names = {kind: config.tables[kind]["name"] for kind in ("backbone", "pairs", "loss")}
    assert names == {"backbone": "tiny", "pairs": "local", "loss": "region"}
    assert config.tables["reference"] == {"name": "toggle"}
    assert {"warp_error", "frame_difference", "dynamic_degree"} <= config.metrics.keys()
    assert config.labeler is None and "labeler" not in config.tables


def test_each_source_overrides_the_one_before(tmp_path: Path) -> None:
    file = written(tmp_path, '[loss]\nname = "global"\nbeta = 100.0\n[run]\nseed = 1\n')
    assert resolved().loss == Region() and resolved().run.seed == 0
    config = resolved(file=file)
    assert config.loss == Global(beta=100) and config.run.seed == 1
    config = resolved(file=file, flags={"run.seed": 2, "train.steps": None})
    assert config.run.seed == 2 and config.train.steps == 200
    config = resolved("run.seed=3", "loss.beta=7", file=file, flags={"run.seed": 2})
    assert config.run.seed == 3 and config.loss == Global(beta=7)


def test_options_belong_to_the_strategy_that_the_file_names(tmp_path: Path) -> None:
    file = written(tmp_path, '[loss]\nname = "region"\nregion_weight = 3.0\n')
    kept = resolved(file=file, choices={"loss": "region"})
    assert kept.loss == Region(region_weight=3)
    dropped = resolved(file=file, choices={"loss": "global"})
    assert dropped.loss == Global()
    assert resolved(file=file, choices={"loss": None}).loss == Region(region_weight=3)


def test_metrics_named_again_keep_the_files_options(tmp_path: Path) -> None:
    file = written(tmp_path, "[metric.frame_difference]\n")
    assert list(resolve(file=file).metrics) == ["frame_difference"]
    assert list(resolve(file=file, metrics=METRIC).metrics) == ["frame_difference"]


@pytest.mark.parametrize(
    ("text", "path", "value"),
    [
        ("loss.beta=500", ("loss", "beta"), 500.0),
        ("loss.beta = 5e2", ("loss", "beta"), 500.0),
        ("loss.scale_by_strength=false", ("loss", "scale_by_strength"), False),
        ("train.mixed_precision=bf16", ("train", "mixed_precision"), "bf16"),
        ('train.mixed_precision="bf16"', ("train", "mixed_precision"), "bf16"),
        ("train.betas=[0.8, 0.9]", ("train", "betas"), [0.8, 0.9]),
        ("pairs.mask.max_blobs=2", ("pairs", "mask", "max_blobs"), 2),
        ("run.prompt=a fox = red", ("run", "prompt"), "a fox = red"),
    ],
)
def test_values_are_toml_or_a_bare_word(text: str, path: tuple[str, ...], value: object) -> None:
    node: Any = resolved(text).tables
    for part in path:
        node = node[part]
    assert node == value


def test_pairs_can_be_a_folder_of_finished_pairs(tmp_path: Path) -> None:
    store = tmp_path / "made"
    store.mkdir()
    (store / "store.json").write_text("{}")
    config = resolved(choices={"pairs": str(store)})
    assert config.pair_store == str(store) and config.pairs is None
    assert config.tables["pairs"] == {"store": str(store)}
    file = written(tmp_path, config.toml())
    assert resolve(file=file).pair_store == str(store)
    assert resolve(file=file, choices={"pairs": "local"}).tables["pairs"]["name"] == "local"


def test_a_folder_does_not_hide_a_strategy_of_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "local").mkdir()
    (tmp_path / "local" / "store.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    assert resolved(choices={"pairs": "local"}).tables["pairs"]["name"] == "local"
    assert resolved(choices={"pairs": "local/"}).pair_store == "local"


# --- repeating -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "assignments",
    [
        (),
        (
            "loss.beta=0.1",
            "pairs.alphas=[0.5]",
            'run.prompt=ünï "q" \\ code',
            "train.learning_rate=3e-7",
        ),
    ],
)
def test_run_toml_resolves_to_the_same_text(tmp_path: Path, assignments: tuple[str]) -> None:
    text = resolved(*assignments).toml()
    again = resolve(file=written(tmp_path, text))
    assert again.toml() == text
    assert tomllib.loads(text)["versions"].keys() >= {"dpo-video", "torch", "python"}


def test_a_missing_package_of_a_run_is_named(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text(
        '[loss]\nname = "focal"\n[versions]\ntorch = "2.0"\n'
        'dpo-video-nosuch = "0.1.0 (source 0123456789ab)"\n'
    )
    with pytest.raises(
        UserError, match=r"Unknown loss .* with dpo-video-nosuch 0\.1\.0 .*install it"
    ):
        resolve(file=file)


def test_run_toml_has_every_option() -> None:
    tables = tomllib.loads(resolved().toml())
    assert tables["loss"] == {"name": "region", **Region().model_dump()}
    assert tables["train"]["weight_decay"] == 0.01
    assert tables["pairs"]["mask"]["max_blobs"] == 5


# --- errors ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("assignment", "sentence"),
    [
        ("loss.beat=1", r"Unknown option 'loss\.beat'\. Did you mean 'loss\.beta'\? Available: lo"),
        ("los.beta=1", r"Unknown table 'los'\. Did you mean 'loss'\?"),
        ("train.step=1", r"Unknown option 'train\.step'\. Did you mean 'train\.steps'\?"),
        ("pairs.mask.blobs=1", r"Unknown option 'pairs\.mask\.blobs'\. Did you mean 'pairs\.mask"),
        (
            "loss.beta=much",
            r"loss\.beta = 'much': a number is needed\. See `dpo-video show loss region`",
        ),
        ("loss.beta=", r"loss\.beta = '': .*a number is needed"),
        ("loss.beta=-1", r"loss\.beta = -1: it must be more than 0"),
        ("loss.beta.x=1", r"loss\.beta = {'x': 1}: .*a number is needed"),
        ("train.steps=2.5", r"train\.steps = 2\.5: .*See `dpo-video show train`"),
        (
            "train.mixed_precision=int8",
            r"train\.mixed_precision = 'int8': .*'no', 'fp16' or 'bf16'",
        ),
        ("pairs.mask.max_blobs=0", r"pairs\.mask\.max_blobs = 0: .*`dpo-video show pairs local`"),
        ("loss.beta", r"'loss\.beta' is not KIND\.OPTION=VALUE.*--set loss\.beta=500"),
        ("beta=500", r"'beta=500' is not KIND\.OPTION=VALUE"),
        ("loss.name=global", r"'loss\.name' is not an option\. Choose a loss with --loss NAME"),
        ("labeler.votes=3", r"but none is chosen\. Add --labeler NAME"),
        ("metric.sharpnes.x=1", r"Unknown metric of this run 'sharpnes'"),
        ("listener.early_stop.below=0.1", r"does not use\. Add --listener early_stop\."),
        ("metric.frame_difference=1", r"'metric\.frame_difference' is 1, not a table"),
        ("pairs.store=5", r"pairs\.store = 5 is not a path"),
        ("pairs.store=here", r"pairs\.name is an option of a strategy, but pairs\.store names"),
        ("backbone.model.x=1", r"backbone\.model = {'x': 1}: .*path"),
    ],
)
def test_a_wrong_assignment_is_one_sentence_and_a_next_step(assignment: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence) as caught:
        resolved(assignment)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["backbone", "pairs", "loss", "reference", "labeler"])
def test_an_unknown_name_is_refused_for_every_kind(kind: str) -> None:
    with pytest.raises(UserError, match=rf"Unknown {kind} 'qqq'\. Available: "):
        resolved(choices={kind: "qqq"})


def test_an_unknown_metric_is_refused() -> None:
    with pytest.raises(UserError, match=r"'warp_eror'\. Did you mean 'warp_error'\?"):
        resolve(metrics=["warp_eror"])


def test_a_metric_with_a_plus_is_added() -> None:
    usual = list(resolve().metrics)
    assert list(resolve(metrics=["+frame_difference"]).metrics) == usual
    assert list(resolve(metrics=["warp_error", "+sharpness"]).metrics) == [
        "warp_error",
        "sharpness",
    ]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("loss = ", r"is not valid TOML: .*Correct it and run again"),
        ("[los]\n", r"Unknown table 'los'\. Did you mean 'loss'\?"),
        ("loss = 5\n", r"'loss' in '.*' is not a table\. Write \[loss\]"),
        ("[loss]\nbeta = 5.0\n", r"table \[loss\] names no strategy\. Add name = .*list loss`"),
        ("[loss]\nname = 5\n", r"table \[loss\] names no strategy"),
        ('[loss]\nname = "regoin"\n', r"Unknown loss 'regoin'\. Did you mean 'region'\?"),
        ("[train]\nsteps = 0\n", r"\.toml': train\.steps = 0: it must be at least 1"),
        ("[metric]\nframe_difference = 3\n", r"'metric\.frame_difference' is 3, not a table"),
        ('[pairs]\nstore = "x"\nsteps = 5\n', r"pairs\.steps is an option of a strategy"),
    ],
)
def test_a_wrong_file_is_one_sentence_and_a_next_step(
    tmp_path: Path, text: str, sentence: str
) -> None:
    file = written(tmp_path, text)
    with pytest.raises(UserError, match=sentence) as caught:
        resolve(file=file, metrics=METRIC if "metric" not in text else ())
    assert "\n" not in str(caught.value)


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"Cannot read '.*none\.toml': No such file.*Name an exist"):
        resolve(file=tmp_path / "none.toml")
    with pytest.raises(UserError, match=r"Cannot read '.*': it is a folder, not a file"):
        resolve(file=tmp_path)
    latin = tmp_path / "latin.toml"
    latin.write_bytes(b'[run]\nprompt = "\xe9"\n')
    with pytest.raises(UserError, match="it is not UTF-8 text"):
        resolve(file=latin)


def test_a_backbone_has_training_defaults_of_its_own(tmp_path: Path) -> None:
    tables = resolve(choices={"backbone": "cogvideox"}).tables["train"]
    assert (tables["rank"], tables["alpha"], tables["learning_rate"]) == (64, 128, 1e-5)
    assert (tables["betas"], tables["weight_decay"]) == ([0.9, 0.95], 1e-3)
    assert resolve(choices={"backbone": "animatediff"}).train.learning_rate == 1e-5
    assert resolve().train.rank == 16 and resolve().train.learning_rate == 1e-4
    # The command line and a file override it.
    given = resolve(
        choices={"backbone": "cogvideox"}, assignments=["train.learning_rate=1e-4"]
    ).train
    assert (given.rank, given.learning_rate) == (64, 1e-4)
    file = tmp_path / "run.toml"
    file.write_text('[backbone]\nname = "cogvideox"\n[train]\nrank = 4\nalpha = 4\n')
    read = resolve(file=file).train
    assert (read.rank, read.alpha, read.weight_decay) == (4, 4, 1e-3)


@pytest.mark.parametrize("backbone", ["tiny", "cogvideox"])
def test_alpha_follows_a_rank_that_is_set_alone(backbone: str) -> None:
    chosen = {"backbone": backbone}
    assert resolve(choices=chosen, flags={"train.rank": 8}).train.alpha == 16
    both = resolve(choices=chosen, assignments=["train.rank=8", "train.alpha=8"]).train
    assert (both.rank, both.alpha) == (8, 8)


@pytest.mark.parametrize("rank", [10**400, 2**16 + 1, 0])
def test_a_rank_out_of_range_is_refused(rank: int) -> None:
    with pytest.raises(UserError, match=r"^train\.rank = "):
        resolve(assignments=[f"train.rank={rank}"])


def test_pairs_that_an_earlier_version_built_are_not_reused(
    small_model: AnimateDiffModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = resolved(choices={"pairs": "jitter"})

    def key() -> str:
        return store_manifest(config, small_model, "clips").key

    first = key()
    assert key() == first
    monkeypatch.setattr(Jitter, "pairs_version", 2)
    assert key() != first


# --- secrets ---------------------------------------------------------------------------------

VLM = '[pairs]\nname = "ranked"\n[labeler]\nname = "vlm"\nmodel = "m"\n'
HOST = 'base_url = "https://elsewhere.example/v1"\n'


def key_variable(config: Config) -> str:
    return config.labeler.key_variable  # type: ignore[union-attr]


MADE = {"backbone": {"name": "wan", "frames": 33, "height": 240}, "seed": 0}


def test_finished_pairs_bring_their_backbone_its_options_and_their_precision(
    tmp_path: Path,
) -> None:
    def taken(*assignments: str, made: dict[str, Any] = MADE, **options: Any) -> tuple[Any, ...]:
        tables = resolved(*assignments, made_with=made, **options).tables
        backbone = tables["backbone"]
        size = backbone["name"], backbone.get("frames"), backbone.get("height")
        return (*size, tables["train"]["mixed_precision"])

    assert taken() == ("wan", 33, 240, "no")
    assert taken(choices={"backbone": "wan"}) == ("wan", 33, 240, "no")
    half = {**MADE, "train": {"mixed_precision": "bf16"}, "memory": {"quantization": "int8"}}
    assert taken(made=half) == ("wan", 33, 240, "bf16")
    assert resolved(made_with=half).memory.quantization == "int8"
    # A recipe and a tier do not change the precision of latents that exist, and that is said.
    tiered = {"tier": "4090", "recipe": "localdpo"}
    assert taken(made=MADE, **tiered) == ("wan", 33, 240, "no")
    notes = resolved(made_with=MADE, **tiered).notes
    assert any("mixed_precision=no, which the tier 4090 does not change" in n for n in notes)
    # Whoever names something else gets it.
    assert taken("backbone.frames=17", "train.mixed_precision='bf16'") == ("wan", 17, 240, "bf16")
    assert taken(choices={"backbone": "tiny"}) == ("tiny", None, None, "no")
    file = written(tmp_path, "[backbone]\nname = 'wan'\nframes = 9\n")
    assert taken(file=file) == ("wan", 9, 240, "no")
    file = written(tmp_path, "[train]\nsteps = 3\n")
    assert taken(file=file) == ("wan", 33, 240, "no")
    for recipe in ({}, {"made": "by hand"}, {"backbone": "wan"}, {"backbone": {"model": "x"}}):
        assert taken(made=recipe)[0] == "tiny"


def test_a_file_cannot_name_a_secret(tmp_path: Path) -> None:
    file = written(tmp_path, f'{VLM}key_variable = "AWS_SECRET_ACCESS_KEY"\n')
    with pytest.raises(UserError, match=r"names a secret.*--set labeler\.key_variable=NAME"):
        resolved(file=file)
    with pytest.raises(UserError, match="names a secret"):
        resolved("labeler.key_variable=OTHER", file=file)
    shared = ["labeler.key_variable='AWS_SECRET_ACCESS_KEY'"]
    with pytest.raises(UserError, match="names a secret"):  # a recipe travels too
        resolved(file=written(tmp_path, VLM), shared=shared)


def test_an_address_from_a_file_gets_no_key_unless_the_user_names_it(tmp_path: Path) -> None:
    file = written(tmp_path, VLM + HOST)
    assert key_variable(resolved(file=file)) == ""
    assert key_variable(resolved("labeler.key_variable=MINE", file=file)) == "MINE"
    recipe = resolved(
        file=written(tmp_path, VLM), shared=["labeler.base_url='https://elsewhere.example/v1'"]
    )
    assert key_variable(recipe) == ""
    # An address that the user types, or the default one, gets the default key.
    plain = written(tmp_path, VLM)
    assert key_variable(resolved(file=plain)) == "OPENAI_API_KEY"
    typed = resolved("labeler.base_url=https://mine.example/v1", file=plain)
    assert key_variable(typed) == "OPENAI_API_KEY"
    # Its run.toml keeps the address without the key.
    assert "key_variable" not in typed.toml()
    assert key_variable(resolved(file=written(tmp_path, typed.toml()))) == ""
