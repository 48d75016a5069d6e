"""The Python API: every command both ways, and what only Python can do."""

from __future__ import annotations

import inspect
import json
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import SHAPE, Install
from typer.testing import CliRunner

import dpo_video as dv
from dpo_video import registry, settings
from dpo_video.cli import app
from dpo_video.data.store import PairStore
from dpo_video.errors import StoreError, UserError
from dpo_video.registry import entry_points
from dpo_video.strategies import Loss
from dpo_video.support.report import StepEvent
from dpo_video.training.diagnosis import TrainingVerdict
from dpo_video.workflows.options import EvaluateOptions, TrainOptions, configure

TRAIN: dict[str, Any] = {
    "steps": 2,
    "rank": 2,
    "gradient_accumulation_steps": 1,
    "validation_videos": 0,
    "report_to": "none",
    "mixed_precision": "no",
}
EVALUATE = {"num_prompts": 2, "num_inference_steps": 1}


def cli(*arguments: object, code: int = 0) -> str:
    """Standard output of a command that exits with `code`."""
    AcceleratorState._reset_state(reset_partial_state=True)
    done = CliRunner().invoke(app, [*map(str, arguments)], catch_exceptions=False)
    assert done.exit_code == code, done.output
    return done.stdout


def flags(table: str, options: dict[str, Any]) -> list[str]:
    return [f"--set={table}.{name}={json.dumps(value)}" for name, value in options.items()]


class Kept(dv.Progress):
    """Keeps what a workflow reports."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.updates: list[tuple[str, int, int | None]] = []
        self.steps: list[int] = []

    def note(self, text: str, *, warning: bool = False) -> None:
        self.notes.append(text)

    def update(self, task: str, done: int, total: int | None = None) -> None:
        self.updates.append((task, done, total))

    def step(self, event: StepEvent, verdict: TrainingVerdict, steps: int) -> None:
        self.steps.append(event.report.step)


@pytest.fixture(scope="module")
def backbone(small_folder: Path) -> Any:
    """The small model as an object."""
    return dv.backbone.AnimateDiff(
        model=str(small_folder), frames=SHAPE.frames, height=SHAPE.height, width=SHAPE.width
    )


@pytest.fixture(scope="module")
def small(small_folder: Path) -> list[str]:
    """The small model as flags."""
    options = {"frames": SHAPE.frames, "height": SHAPE.height, "width": SHAPE.width}
    return [
        "--backbone=animatediff", f"--set=backbone.model={small_folder}", "--device=cpu",
        *flags("backbone", options),
    ]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where the module's pairs and runs are."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("api"))
        yield Path.cwd()


@pytest.fixture(scope="module")
def pairs(folder: Path, backbone: Any) -> PairStore:
    progress = Kept()
    store = dv.build_pairs(
        dv.pairs.Jitter(num_inference_steps=1),
        backbone=backbone,
        prompt="a square",
        count=3,
        device="cpu",
        out="python-pairs",
        progress=progress,
    )
    assert progress.updates == [("pairs", n, 3) for n in range(4)]
    return store


@pytest.fixture(scope="module")
def run(folder: Path, pairs: PairStore) -> dv.Run:
    progress, seen = Kept(), []

    class Losses(dv.Listener):
        def on_step_end(self, event: Any) -> None:
            seen.append(event.report.loss)

    run = dv.train(
        pairs, loss=dv.loss.Global(beta=500), metrics=["frame_difference"], out="python-run",
        device="cpu", progress=progress, listeners=[Losses()], **TRAIN,
    )  # fmt: skip
    assert seen == [report.loss for report in run.reports]
    assert progress.steps == [1, 2] and progress.notes[1].startswith("Using the 3 pairs")
    assert progress.notes[0].endswith(
        "on jitter pairs and the global loss, add --recipe video-dpo."
    )
    return run


# --- both ways -------------------------------------------------------------------------------


def test_build_makes_the_same_pairs(folder: Path, pairs: PairStore, small: list[str]) -> None:
    cli("build", "--pairs=jitter", "--set=pairs.num_inference_steps=1", *small,
        "--prompt=a square", "--count=3", "--out=cli-pairs")  # fmt: skip
    assert PairStore("cli-pairs").digest == pairs.digest
    assert PairStore("cli-pairs").manifest == pairs.manifest


def test_train_makes_the_same_run(folder: Path, pairs: PairStore, run: dv.Run) -> None:
    cli("train", "--pairs=python-pairs/", "--loss=global", "--set=loss.beta=500",
        "--metric=frame_difference", "--device=cpu", "--out=cli-run",
        *flags("train", TRAIN))  # fmt: skip
    assert dv.Run.open("cli-run").toml == run.toml
    weights = [
        (Path(name) / "checkpoints/step_000002/adapter/adapter_model.safetensors").read_bytes()
        for name in ("python-run", "cli-run")
    ]
    assert weights[0] == weights[1]
    assert [report.loss for report in run.reports] == [
        report.loss for report in dv.Run.open("cli-run").reports
    ]


def test_evaluate_measures_the_same(run: dv.Run) -> None:
    evaluation = run.evaluate(**EVALUATE)
    found = json.loads(
        cli(
            "evaluate",
            "python-run",
            "--num-prompts=2",
            "--set=evaluate.num_inference_steps=1",
            "--json",
        )
    )
    expected = json.loads(evaluation.to_json())
    assert found.pop("command").startswith("dpo-video")
    assert expected.pop("command") == "dpo-video evaluate python-run"
    assert found == expected
    assert run.evaluation() is not None


def test_compare_compares_the_same(pairs: PairStore) -> None:
    options = {"loss": "global", "metrics": ["frame_difference"], **TRAIN, "steps": 1}
    steps = {"evaluate.num_inference_steps": 1}
    config = configure("train", {**options, "set": steps}, pairs)
    Path("recipe.toml").write_text(config.toml())
    found = dv.compare(["recipe.toml"], num_prompts=2, out="python-compare", device="cpu")
    text = cli(
        "compare", "recipe.toml", "--num-prompts=2", "--out=cli-compare", "--device=cpu", "--json"
    )
    both = json.loads(text), found.to_dict()
    for comparison in both:
        assert comparison["rows"][0].pop("seconds") > 0
    assert both[0] == both[1]


def test_evaluation_prompts_come_from_a_file_and_known_ones_are_counted(run: dv.Run) -> None:
    known = run.prompts
    assert known == sorted(set(known)) and known
    Path("prompts.txt").write_text(f"a new prompt\n\n {known[0]} \n")
    evaluation = run.evaluate(
        **{**EVALUATE, "num_prompts": None, "num_videos_per_prompt": 2},
        prompts="prompts.txt",
        out="prompts",
    )
    assert evaluation.prompts == ("a new prompt", known[0]) * 2
    assert evaluation.trained_prompts == (known[0],)
    told = " ".join(evaluation.verdict.details)
    assert "1 of the 2 prompts are also prompts of the training pairs" in told
    assert "2 prompts were evaluated" in evaluation.verdict.headline
    assert "--num-prompts 8" in evaluation.verdict.headline
    for text, wrong in ((" \n", "holds no prompt"), (None, "Cannot read the prompts")):
        Path("prompts.txt").unlink() if text is None else Path("prompts.txt").write_text(text)
        with pytest.raises(UserError, match=wrong):
            run.evaluate(**EVALUATE, prompts="prompts.txt")


def test_the_thresholds_of_the_verdict_are_options(run: dv.Run) -> None:
    cli("evaluate", "python-run", *flags("evaluate", {"num_inference_steps": 1}), "--num-prompts=2",
        "--min-effect=0.1", "--tolerance=0.2", "--min-prompts=2", "--out=judged",
        "--set=evaluate.min_effects.frame_difference=0.3")  # fmt: skip
    page = Path("judged/index.html").read_text()
    assert "changed by at least 30%." in page and "A verdict needs 2 prompts." in page
    with pytest.raises(UserError, match="Did you mean 'warp_error'"):
        run.evaluate(**EVALUATE, min_effects={"warp_eror": 0.1})


def test_generate_draws_the_same_video(run: dv.Run) -> None:
    (video,) = run.generate(prompt="a red square", num_inference_steps=1, out="python.gif")
    cli("generate", "python-run", "--prompt=a red square", "--num-inference-steps=1",
        "--out=cli.gif")  # fmt: skip
    assert Path("python.gif").read_bytes() == Path("cli.gif").read_bytes()
    assert video.prompt == "a red square" and video.seed == 0
    assert "<video" in video._repr_html_()


def test_export_writes_the_same_files(run: dv.Run) -> None:
    done = run.export("peft", "python-export")
    cli("export", "python-run", "--format=peft", "--out=cli-export")
    files = sorted(path.name for path in done.folder.iterdir())
    assert files == sorted(path.name for path in Path("cli-export").iterdir())
    for name in files:
        if name != "README.md":  # it names the folder
            assert (done.folder / name).read_bytes() == Path("cli-export", name).read_bytes()


def test_check_finds_the_same(pairs: PairStore) -> None:
    found = dv.check(pairs, metrics=["frame_difference"], sample=1, device="cpu")
    text = cli("check", "python-pairs", "--metric=frame_difference", "--sample=1", "--device=cpu",
               "--json", code=1)  # fmt: skip
    assert json.loads(text) == json.loads(found.model_dump_json())


def test_label_labels_the_same(pairs: PairStore) -> None:
    labeler = dv.labeler.ByMetric(weights={"frame_difference": 1.0}, guards={})
    summary = dv.label(pairs, labeler, name="python", device="cpu").to_dict()
    text = cli("label", "python-pairs", "--labeler=metric", "--as=cli", "--device=cpu", "--json",
               "--set=labeler.weights={frame_difference=1.0}",
               "--set=labeler.guards={}")  # fmt: skip
    found = json.loads(text)
    assert found.pop("labels").endswith("cli.jsonl") and found.pop("name") == "cli"
    agreement = found.pop("agreement")["cli and python"]
    assert agreement["share"] == 1
    assert {**summary, **found} == summary


def test_pack_and_export_pairs_copy_the_same(pairs: PairStore) -> None:
    assert dv.pack(pairs, "python-packed").digest == pairs.digest
    cli("pack", "python-pairs", "cli-packed")
    assert PairStore("cli-packed").digest == pairs.digest
    done = dv.export_pairs(pairs, "python-triples")
    cli("export-pairs", "python-pairs", "cli-triples")
    names = sorted(path.name for path in Path("python-triples").rglob("*"))
    assert done.written == 3
    assert names == sorted(path.name for path in Path("cli-triples").rglob("*"))


def test_estimate_predicts_the_same(backbone: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from dpo_video.estimation import modes

    one = modes.candidate_modes(["toggle"], registry.strategy("loss", "global"))[:1]
    monkeypatch.setattr(modes, "candidate_modes", lambda references, loss: one)
    found = dv.estimate(backbone=backbone, loss="global", rank=2)
    options = [f"--set=backbone.{name}={value}" for name, value in backbone
               if name in backbone.model_fields_set]  # fmt: skip
    text = cli("estimate", "--backbone=animatediff", "--loss=global", "--set=train.rank=2",
               *options, "--json")  # fmt: skip
    assert json.loads(text) == json.loads(json.dumps(found.to_dict()))


def test_config_resolves_the_same(backbone: Any, small: list[str]) -> None:
    options = {"backbone": backbone, "device": "cpu", "steps": 3, "deterministic": True}
    text = cli("config", *small, "--steps=3", "--deterministic")
    tables = tomllib.loads(text)
    del tables["versions"]
    assert configure("train", options).tables == tables


def test_list_and_show_are_the_catalog() -> None:
    from dpo_video.workflows.catalog import list_strategies, show_strategy

    assert json.loads(cli("list", "--json")) == list_strategies().to_dict()
    shown = json.loads(cli("show", "loss", "region", "--json"))
    assert shown == json.loads(json.dumps(show_strategy("loss", "region").to_dict()))


# --- Python alone ----------------------------------------------------------------------------


def test_importing_the_package_imports_no_torch() -> None:
    program = (
        "import sys, dpo_video as dv; dir(dv); dv.loss; dir(dv.loss); "
        "assert 'torch' not in sys.modules; dv.loss.Region; assert 'torch' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_every_name_of_the_api_is_there() -> None:
    for name in dir(dv):
        assert getattr(dv, name) is not None
    for kind in registry.KINDS:
        for listing in registry.listings(kind):
            cls = registry.load(kind, listing.name)
            room = {"check": "checks"}.get(kind, kind)  # dv.check is a function
            assert getattr(getattr(dv, room), cls.__name__) is cls
    with pytest.raises(AttributeError, match="no attribute 'Regoin'"):
        _ = dv.loss.Regoin
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        _ = dv.trian  # type: ignore[attr-defined]


def test_signatures_list_every_option() -> None:
    parameters = inspect.signature(dv.train).parameters
    assert {"pairs", "out", "loss", "learning_rate", "count"} <= parameters.keys()
    assert "options" not in parameters


def test_strategies_are_given_by_name_or_as_objects() -> None:
    by_name = configure("train", {"loss": "region", "set": {"loss.beta": 7}})
    by_object = configure("train", {"loss": dv.loss.Region(beta=7)})
    by_function = configure("train", {"loss": dv.strategy("loss", "region", beta=7)})
    assert by_name.tables == by_object.tables == by_function.tables


def test_options_of_an_object_override_the_tiers(small_folder: Path) -> None:
    wan = dv.backbone.Wan(frames=5)
    assert configure("train", {"backbone": wan, "tier": "t4"}).tables["backbone"]["frames"] == 5


def test_an_unknown_keyword_is_refused_with_the_nearest_one() -> None:
    with pytest.raises(UserError, match=r"Unknown option 'stpes'\. Did you mean 'steps'"):
        configure("train", {"stpes": 3})


@pytest.mark.parametrize(
    ("elsewhere", "here"), [("lr", "learning_rate"), ("max_steps", "steps"), ("lora_rank", "rank")]
)
def test_options_of_other_libraries_are_named_as_here(elsewhere: str, here: str) -> None:
    with pytest.raises(UserError, match=f"Unknown option '{elsewhere}'. Did you mean '{here}'"):
        configure("train", {elsewhere: 1})


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda: dv.train(5), r"train\(pairs=5\): pass a value of type PairBuilder \|"),
        (lambda: dv.train("x", listeners=[print]), r"type Sequence\[Listener .*See help\(dpo"),
        (
            lambda: dv.train("x", set="loss.beta=5"),
            r"set=.loss.beta=5.\): pass a value of type M",
        ),
        (lambda: dv.evaluate(3), r"evaluate\(run=3\): pass a value of type Run \| Path"),
        (lambda: dv.estimate(tier=4090), r"estimate\(tier=4090\): pass a value of type str"),
        (lambda: dv.compare("runs/a"), r"compare\(entries='runs/a'\): pass a value of type Seq"),
    ],
)
def test_an_argument_of_a_wrong_type_is_refused(call: Any, told: str) -> None:
    with pytest.raises(UserError, match=told):
        call()


def test_options_are_set_by_path_or_in_nested_tables() -> None:
    nested = configure("train", {"loss": "global", "set": {"loss": {"beta": 3.0}}})
    assert nested == configure("train", {"loss": "global", "set": {"loss.beta": 3.0}})
    with pytest.raises(UserError, match=r"names no option, such as 'loss.beta'"):
        configure("train", {"set": {"loss": 3}})


def test_a_class_of_another_spelling_is_suggested() -> None:
    with pytest.raises(AttributeError, match="Did you mean 'DPOP'"):
        dv.loss.Dpop  # noqa: B018


def test_keywords_are_exactly_the_tables_options() -> None:
    for options, models in (
        (TrainOptions, (settings.TrainSettings, settings.BuildSettings, settings.RunSettings)),
        (EvaluateOptions, (settings.EvaluateSettings,)),
    ):
        fields = {name for model in models for name in model.model_fields}
        assert fields <= options.__annotations__.keys()


def test_a_loss_of_the_session_trains(pairs: PairStore) -> None:
    class Halved(Loss):
        """The global loss, halved."""

        beta: float = 1000.0

        def __call__(self, errors: Any) -> Any:
            return dv.loss.Global(beta=self.beta)(errors)

    run = dv.train(pairs, loss=Halved(beta=10), device="cpu", out="own-run", **TRAIN)
    assert run.config.tables["loss"] == {"name": "Halved", "beta": 10.0}


def test_the_card_says_what_the_checkpoint_was_trained_with(run: dv.Run, tmp_path: Path) -> None:
    copied = shutil.copytree(run.folder, tmp_path / "copied")
    text = (copied / "run.toml").read_text()
    (copied / "run.toml").write_text(text.replace("rank = 2", "rank = 8"))
    card = (dv.export(copied, "peft").folder / "README.md").read_text()
    assert "rank 2," in card and "rank 8" not in card


LEFT = """
from dpo_video.loss.global_ import Global
from dpo_video.metric.frame_difference import FrameDifference
from dpo_video.reference.toggle import Toggle
from dpo_video.strategies import Loss, Metric, Reference

class TheLoss(Loss):
    slope: float = 10.0

    def __call__(self, errors):
        return Global(beta=self.slope)(errors)

class TheReference(Reference):
    def attach(self, policy):
        return Toggle().attach(policy)

class TheMetric(Metric):
    higher_is_better = False
    role = "target"
    unit = ""

    def __call__(self, videos, prompts):
        return FrameDifference()(videos, prompts)
"""


def test_a_run_outlives_its_plugins(pairs: PairStore, install: Install, tmp_path: Path) -> None:
    install("dpo-left", LEFT, "left", "TheLoss")
    for kind, name in (("reference", "TheReference"), ("metric", "TheMetric")):
        install(f"dpo-left-{kind}", LEFT, "left", name, kind)
    run = dv.train(
        pairs, loss="left", reference="left", metrics=["left", "frame_difference"], device="cpu",
        out="left-run", **TRAIN,
    )  # fmt: skip
    for info in tmp_path.glob("*.dist-info"):
        shutil.rmtree(info)
    entry_points.forget()
    progress = Kept()
    found = dv.evaluate(run, progress=progress, **EVALUATE)
    assert [metric.name for metric in found.metrics] == ["frame_difference"]
    assert "Not measured: no installed package provides the metric 'left'." in progress.notes
    dv.generate(run, prompt="a square", num_inference_steps=1, out="left.mp4")
    assert dv.export(run, "peft").folder.exists()
    with pytest.raises(UserError, match=r"Unknown (loss|reference|metric) 'left'"):
        dv.train(pairs, config=run.folder / "run.toml", device="cpu", out="left-again")


def test_a_run_shows_itself(run: dv.Run) -> None:
    plain = run.to_dict()
    assert len(plain["steps"]) == 2 and plain["config"]["loss"]["beta"] == 500
    assert json.loads(json.dumps(plain)) == plain
    assert list(run.checkpoints) == [2]
    assert "python-run" in run._repr_html_()
    page = run.page("run.html").read_text()
    assert "loss from step 1 to 2" in page and "learning_rate" in page


def test_pairs_show_themselves(pairs: PairStore) -> None:
    plain = pairs.to_dict()
    assert [pair["prompt"] for pair in plain["pairs"]] == ["a square"] * 3
    assert json.dumps(plain)
    assert pairs.table().row_count == 3
    assert pairs._repr_html_().count("<video") == 3


def test_nothing_is_printed(
    run: dv.Run, pairs: PairStore, capfd: pytest.CaptureFixture[str]
) -> None:
    dv.train(pairs, loss="global", device="cpu", out="quiet-run", **TRAIN)
    dv.evaluate("quiet-run", metrics=["frame_difference"], **EVALUATE)
    assert capfd.readouterr() == ("", "")


def test_load_model_loads_a_backbone(backbone: Any) -> None:
    model = dv.load_model(backbone, device="cpu")
    assert model.shape.frames == SHAPE.frames
    assert next(model.denoiser.parameters()).dtype is torch.float32


SPEED = '''
from typing import ClassVar
from dpo_video.pairs.jitter import Jitter
from dpo_video.strategies import PairBuilder

class Speed(PairBuilder):
    """Pairs of the builder `jitter`."""

    asks_labeler: ClassVar[bool] = False
    needs_video: ClassVar[bool] = False

    def __call__(self, clip, model, labeler, generator):
        return Jitter(num_inference_steps=1)(clip, model, labeler, generator)
'''


def test_pairs_of_another_version_of_a_plugin_are_not_taken(
    backbone: Any, install: Install, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    install("dpo-speed", SPEED, "speed", "Speed", "pairs")
    build: dict[str, Any] = {"backbone": backbone, "prompt": "a", "count": 1, "device": "cpu"}
    store = dv.build_pairs("speed", out="made", **build)
    versions = store.manifest.versions
    assert versions["dpo-video"] == dv.__version__
    assert re.fullmatch(r"1\.0 \(source [0-9a-f]{12}\)", versions["dpo-speed"])
    assert len(dv.build_pairs("speed", out="made", **build)) == 1
    train: dict[str, Any] = {**build, **TRAIN, "loss": "global"}
    run = dv.train("speed", out="runs/one", **{**train, "steps": 1})
    assert run.versions["dpo-speed"] == versions["dpo-speed"]
    (tmp_path / "dpo_speed.py").write_text(SPEED + "# Another one.\n")

    told = (
        r"by dpo-speed 1\.0 \(source \w+\), and dpo-speed 1\.0 \(source \w+\) is installed\. "
        r"Build them again with --rebuild, or use them as they are with --accept-pairs\.$"
    )
    with pytest.raises(StoreError, match=told):
        dv.build_pairs("speed", out="made", **build)
    with pytest.raises(StoreError, match=told):
        dv.train("speed", out="runs/two", **train)
    progress = Kept()
    dv.train("speed", out="runs/one", resume=True, progress=progress, **train)
    assert any(note.startswith("Using the pairs of this run.") for note in progress.notes)

    kept = dv.train("speed", out="runs/two", accept_pairs=True, **train)
    assert "accept_pairs = true" in kept.toml
    assert dv.build_pairs("speed", out="made", accept_pairs=True, **build).digest == store.digest
    with pytest.raises(StoreError, match=r"They are 1 of 2, .* with --accept-pairs --count 1, or"):
        dv.build_pairs("speed", out="made", accept_pairs=True, **{**build, "count": 2})
    (folder,) = (tmp_path / "runs" / "pairs").iterdir()
    again = dv.train("speed", out="runs/three", rebuild=True, **train)
    assert "rebuild = true" in again.toml
    assert {each.name for each in folder.parent.iterdir()} == {folder.name, f"{folder.name}-2"}
    dv.train("speed", out="runs/four", **train)  # finds those of its version
    rebuilt = dv.build_pairs("speed", out="made", rebuild=True, **build)
    assert rebuilt.manifest.versions != versions
    assert PairStore(tmp_path / "made-2").digest == store.digest
