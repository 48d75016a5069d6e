"""Every installed strategy, built-in or of a plugin, passes the contract of its kind."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import small_cogvideox
import small_wan
import torch
from chat_server import serving
from conftest import SHAPE
from pydantic import Field
from small_labels import Brighter
from torch import Generator, Tensor, nn

from dpo_video import registry, testing
from dpo_video.backbone.animatediff import AnimateDiffModel
from dpo_video.data.video_writer import write_video
from dpo_video.errors import ExportError, PluginError
from dpo_video.extensions import (
    ExportedAdapter,
    Finding,
    Findings,
    Listener,
    ListenerFactory,
    Optimizer,
    PairCheck,
    Schedule,
    TimestepSampler,
)
from dpo_video.loss.global_ import Global
from dpo_video.loss.segment import Segment
from dpo_video.metric.frame_difference import FrameDifference
from dpo_video.pairs.jitter import Jitter
from dpo_video.reference.ema import EMA
from dpo_video.settings import TrainSettings
from dpo_video.strategies import (
    Backbone,
    Labeler,
    LabelerFactory,
    Loss,
    Metric,
    PairBuilder,
    Reference,
    ReferenceModel,
    Strategy,
    SuppliedPairs,
    VideoModel,
)
from dpo_video.support.report import StepEvent
from dpo_video.testing import (
    SteadyLabeler,
    StridedModel,
    check_backbone,
    check_backbone_model,
    check_format,
    check_labeler,
    check_loss,
    check_metric,
    check_options,
    check_pairs,
    check_reference,
    small_videos,
)
from dpo_video.testing.models import _move
from dpo_video.tiny import WEIGHTS
from dpo_video.types import Clip, LossOutput, Pair, PairErrors, PairSource, Placement


def installed(kind: str) -> list[str]:
    return sorted({listing.name for listing in registry.listings(kind)})


def made(kind: str, name: str, **options: Any) -> Any:
    return registry.load(kind, name)(**options)


@pytest.mark.parametrize("name", installed("loss"))
def test_losses(name: str) -> None:
    check_loss(made("loss", name))


@pytest.mark.parametrize("name", installed("reference"))
def test_references(name: str, small_model: AnimateDiffModel) -> None:
    check_reference(made("reference", name), small_model)


@pytest.mark.parametrize("kind", ["timesteps", "optimizer", "schedule", "listener", "check"])
def test_what_a_run_takes_its_steps_with(kind: str, small_model: AnimateDiffModel) -> None:
    for name in installed(kind):
        for model in (small_model, StridedModel()) if kind == "timesteps" else ((),):
            args = (model,) if model else ()
            getattr(testing, f"check_{kind}")(made(kind, name), *args)


@pytest.mark.parametrize("name", installed("format"))
def test_formats(name: str) -> None:
    check_format(made("format", name), made("backbone", "tiny").load(Placement()))


@pytest.mark.parametrize("name", installed("pairs"))
def test_pairs(name: str, small_model: AnimateDiffModel, tmp_path: Path) -> None:
    options = {"folder": {"path": tmp_path}}.get(name, {})
    for seed, side in enumerate(("win", "lose")):
        video = small_videos(1, SHAPE.frames, SHAPE.height, SHAPE.width, seed=seed)[0]
        write_video(tmp_path / side / "a.mp4", video, SHAPE.fps)
    check_pairs(made("pairs", name, **options), small_model, labeler=Brighter())


@pytest.mark.parametrize("name", installed("metric"))
def test_metrics(name: str) -> None:
    check_metric(made("metric", name))


@pytest.mark.parametrize("name", installed("labeler"))
def test_labelers(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with serving() as server:
        kept = str(tmp_path / "answers")
        options = {
            "metric": {"weights": {"frame_difference": 1.0}, "guards": {"sharpness": 0.03}},
            "recorded": {"file": str(tmp_path / "labels.jsonl")},
            "vlm": {"model": "local", "base_url": server.url, "key_variable": "", "cache": kept,
                    "frames": 2, "size": 64},
        }  # fmt: skip
        labeler = made("labeler", name, **options.get(name, {}))
        measures = labeler.metric_names if isinstance(labeler, LabelerFactory) else ()
        check_labeler(labeler, metrics={each: made("metric", each) for each in measures})


@pytest.mark.parametrize("name", installed("backbone"))
def test_backbones(name: str, small_folder: Path, tmp_path: Path) -> None:
    shape = {"frames": SHAPE.frames, "height": SHAPE.height, "width": SHAPE.width}
    small: dict[str, dict[str, Any]] = {"animatediff": {"model": str(small_folder), **shape}}
    if name == "wan":
        small["wan"] = {"model": str(small_wan.save_small_wan(tmp_path)), **small_wan.OPTIONS}
    if name == "cogvideox":
        folder = small_cogvideox.save_small_cogvideox(tmp_path)
        small["cogvideox"] = {"model": str(folder), **small_cogvideox.OPTIONS}
    backbone: Backbone = made("backbone", name, **small.get(name, {}))
    check_backbone(backbone)
    if name == "tiny" and not WEIGHTS.is_dir():
        pytest.skip("the embedded model is not trained yet")
    check_backbone_model(backbone.load(Placement()))


@pytest.mark.parametrize("name", [n for n in installed("pairs") if n != "folder"])
def test_pairs_of_latents_that_are_strided_in_time(name: str) -> None:
    check_pairs(made("pairs", name), StridedModel(), labeler=SteadyLabeler())


def test_the_strided_model_and_references_on_it() -> None:
    check_backbone_model(StridedModel())
    for name in installed("reference"):
        check_reference(made("reference", name), StridedModel())


def test_the_checks_leave_the_model_as_it_was(small_model: AnimateDiffModel) -> None:
    before = {name: value.clone() for name, value in small_model.denoiser.state_dict().items()}
    check_reference(made("reference", "toggle"), small_model)
    check_backbone_model(small_model)
    after = small_model.denoiser.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


# --- what the contracts catch ----------------------------------------------------------------


class Averaged(Loss):
    """Mixes the pairs of a batch."""

    def __call__(self, errors: PairErrors) -> LossOutput:
        output = Global()(errors)
        return replace(output, loss=output.loss.mean().expand_as(output.loss))


class Biased(Loss):
    """Prefers the first video whatever the label."""

    def __call__(self, errors: PairErrors) -> LossOutput:
        return Global()(replace(errors, preference=torch.ones_like(errors.preference)))


class Writing(Loss):
    """Changes the errors in place."""

    def __call__(self, errors: PairErrors) -> LossOutput:
        errors.policy_first.mul_(0.5)
        return Global()(errors)


class Drawing(Loss):
    """Draws random numbers."""

    def __call__(self, errors: PairErrors) -> LossOutput:
        output = Global()(errors)
        return replace(output, loss=output.loss + torch.rand(()))


class Offset(Loss):
    """Its margin has an offset."""

    def __call__(self, errors: PairErrors) -> LossOutput:
        output = Global()(errors)
        return replace(output, margin=output.margin - 1)


class Detached(Loss):
    """Its margin has no gradient, so that no slope on it can be derived."""

    def __call__(self, errors: PairErrors) -> LossOutput:
        output = Global()(errors)
        return replace(output, margin=output.margin.detach())


class Scaled(Loss):
    """Its margin is not that of its two changes of error."""

    def __call__(self, errors: PairErrors) -> LossOutput:
        output = Global()(errors)
        return replace(output, margin=2 * output.margin)


class Reversed(Loss):
    """Prefers the rejected video."""

    def __call__(self, errors: PairErrors) -> LossOutput:
        output = Global()(errors)
        return replace(output, loss=-output.loss)


class NotLinear(Loss):
    """Declares that it depends on mean errors alone, and does not."""

    linear_in_mean_error: ClassVar[bool] = True

    def __call__(self, errors: PairErrors) -> LossOutput:
        """Compute the loss per frame."""
        return Segment()(errors)


class OneSided(Loss):
    """Has no gradient on one of the videos."""

    def __call__(self, errors: PairErrors) -> LossOutput:
        return Global()(replace(errors, policy_second=errors.policy_second.detach()))


class Comparing(Loss):
    """Declares that it does not compare, and does."""

    compares: ClassVar[bool] = False
    needs_reference: ClassVar[bool] = False

    def __call__(self, errors: PairErrors) -> LossOutput:
        return Global()(errors)


class Referring(Loss):
    """Declares that it does not compare, and subtracts the reference's error."""

    compares: ClassVar[bool] = False

    def __call__(self, errors: PairErrors) -> LossOutput:
        output = Global()(errors)
        return replace(output, loss=errors.label.abs() * output.chosen_change)


class Infinite(Loss):
    """Returns an infinite loss."""

    def __call__(self, errors: PairErrors) -> LossOutput:
        output = Global()(errors)
        return replace(output, loss=output.loss / 0)


class Undocumented(Loss):
    """Has an option without a docstring."""

    beta: float = 1.0

    def __call__(self, errors: PairErrors) -> LossOutput:
        return Global()(errors)


class Double(Loss):
    """Computes in another precision."""

    def __call__(self, errors: PairErrors) -> LossOutput:
        output = Global()(errors)
        return replace(output, loss=output.loss.double())


class Crashing(Loss):
    """Reads something that errors do not have."""

    def __call__(self, errors: PairErrors) -> LossOutput:
        return errors.latents  # type: ignore[attr-defined, no-any-return]


class Nameless(Loss):
    def __call__(self, errors: PairErrors) -> LossOutput:
        return Global()(errors)


@pytest.mark.parametrize(
    ("loss", "sentence"),
    [
        (Averaged, "depends on the other pairs"),
        (Biased, "swap places"),
        (Writing, "writes to its inputs"),
        (Drawing, "global generator"),
        (Offset, "margin is not exactly 0"),
        (Detached, "margin has no gradient"),
        (Scaled, "margin is not rejected_change - chosen_change"),
        (Reversed, "does not raise the margin"),
        (OneSided, "reaches the policy's errors of the second"),
        (NotLinear, "declares linear_in_mean_error"),
        (Comparing, "reaches the errors of the rejected video"),
        (Referring, "Set needs_reference False"),
        (Infinite, "loss that is not finite"),
        (Double, "gives a loss in torch.float64"),
        (Crashing, "fails on the inputs of its contract .AttributeError"),
        (Undocumented, "Undocumented.beta has no docstring"),
        (Nameless, "Nameless has no docstring"),
    ],
)
def test_a_broken_loss_is_caught(loss: type[Loss], sentence: str) -> None:
    with pytest.raises(AssertionError, match=sentence):
        check_loss(loss())


class Thawed(Strategy, frozen=False):
    """Is not frozen."""


class Lenient(Strategy, extra="ignore"):
    """Accepts unknown options."""


class Kinded(Strategy):
    """Has an option that is the kind."""

    kind: str = "loss"  # type: ignore[misc]
    """The kind."""


class Untyped(Strategy):
    """Has an option that no TOML file can hold."""

    value: object = Field(default=Generator)
    """An option."""


@pytest.mark.parametrize(
    ("strategy", "sentence"),
    [
        (Thawed, "not frozen"),
        (Lenient, "unknown options"),
        (Untyped, "do not survive"),
        (Kinded, "has an option 'kind'"),
    ],
)
def test_options_that_break_the_rules_are_caught(strategy: type[Strategy], sentence: str) -> None:
    with pytest.raises(AssertionError, match=sentence):
        check_options(strategy())


class Same(Reference):
    """Does not remove the adapter."""

    def attach(self, policy: nn.Module) -> ReferenceModel:
        class Bare(ReferenceModel):
            @contextmanager
            def network(self) -> Iterator[nn.Module]:
                yield policy

        return Bare()


class LeftOff(Reference):
    """Does not restore the adapter after an error."""

    def attach(self, policy: nn.Module) -> ReferenceModel:
        class Bare(ReferenceModel):
            @contextmanager
            def network(self) -> Iterator[nn.Module]:
                policy.base_model.disable_adapter_layers()  # type: ignore[operator, union-attr]
                yield policy
                policy.base_model.enable_adapter_layers()  # type: ignore[operator, union-attr]

        return Bare()


class Forgetful(Reference):
    """Keeps a state that a resumed run does not get back."""

    def attach(self, policy: nn.Module) -> ReferenceModel:
        class Average(type(EMA().attach(policy))):  # type: ignore[misc]
            def restore(self, state: Mapping[str, Tensor]) -> None:
                pass

        return Average(policy, 0.5)


class Elsewhere(Reference):
    """Does not start at the policy, and does not say so."""

    def attach(self, policy: nn.Module) -> ReferenceModel:
        _move(policy, 3)  # type: ignore[arg-type]
        handle = EMA().attach(policy)
        for name, weight in policy.named_parameters():
            if ".lora_B" in name:
                weight.data.zero_()
        return handle


@pytest.mark.parametrize(
    ("reference", "sentence"),
    [
        (Same, "does not predict what the bare denoiser"),
        (LeftOff, "also after an error"),
        (Forgetful, "take it over in restore"),
        (Elsewhere, "Set exact False"),
    ],
)
def test_a_broken_reference_is_caught(
    reference: type[Reference], sentence: str, small_model: AnimateDiffModel
) -> None:
    with pytest.raises(AssertionError, match=sentence):
        check_reference(reference(), small_model)


def draws(value: Callable[[int, Generator], object]) -> type[TimestepSampler]:
    class Drawing(TimestepSampler):
        """Draws something else."""

        def __call__(self, model: VideoModel, n: int, generator: Generator) -> Any:
            return value(n, generator)

    return Drawing


def steps_by(
    step: Callable[[torch.optim.Optimizer, Tensor], None], **state: Any
) -> type[Optimizer]:
    class Stepping(Optimizer):
        """Steps by a function."""

        def __call__(self, parameters: Any, settings: Any, *, on_host: bool = False) -> Any:
            class Made(torch.optim.Optimizer):
                count = 0

                @torch.no_grad()
                def step(self, closure: Any = None) -> None:
                    for parameter in self.param_groups[0]["params"]:
                        step(self, parameter)

            return Made(parameters, {"lr": settings.learning_rate, **state})

    return Stepping


def fading(optimizer: Any, parameter: Tensor) -> None:
    optimizer.count += 1
    parameter.sub_(parameter.grad, alpha=optimizer.param_groups[0]["lr"] / optimizer.count)


def rate(factor: Callable[[int], object]) -> type[Schedule]:
    class Rating(Schedule):
        """Gives a factor."""

        def __call__(self, step: int, settings: TrainSettings) -> Any:
            return factor(step)

    return Rating


def hears(**methods: Any) -> type[ListenerFactory]:
    class Hearing(ListenerFactory):
        """Makes a listener of functions."""

        def __call__(self) -> Listener:
            return type("Own", (Listener,), {"heard": 0, **methods})()

    return Hearing


def count(listener: Any, event: StepEvent) -> None:
    listener.heard += 1
    if listener.heard == 40:
        listener.run.end("Enough.")


def shift(listener: Any, event: StepEvent) -> None:
    with torch.no_grad():
        next(listener.run.policy.parameters()).add_(1)


def finds(find: Callable[[Any], object]) -> type[PairCheck]:
    class Finds(PairCheck):
        """Finds by a function."""

        def __call__(self, pair_set: Any) -> Any:
            return find(pair_set)

    return Finds


def said(message: str, *more: Any) -> Finding:
    return Findings("own").problem(message, *more)


class Shrinking(type(registry.strategy("format", "comfyui"))):  # type: ignore[misc]
    """Loads half of the adapter."""

    def load(self, folder: Path, adapter: ExportedAdapter, network: str) -> None:
        super().load(folder, adapter, network)
        for key, weight in adapter.spec.networks[network].named_parameters():
            if ".lora_B" in key:
                weight.data /= 2


def test_a_format_that_loads_something_else_is_caught() -> None:
    with pytest.raises(ExportError, match=r"The reloaded update of .* differs by 50"):
        check_format(Shrinking(), made("backbone", "tiny").load(Placement()))


@pytest.mark.parametrize(
    ("made", "sentence"),
    [
        (finds(lambda pairs: "fine"), "returns a str, not a Finding"),
        (finds(lambda pairs: said("Bad.")), "gives no advice"),
        (finds(lambda pairs: said("Bad.", "Go.", [99])), "names a pair that does not exist"),
        (finds(lambda pairs: said(f"At {time.perf_counter()}.", "Go.")), "finds something else"),
        (finds(lambda pairs: pairs.summaries[3]), "IndexError"),
        (hears(on_step_end=count), "ends a training at another step after a resume"),
        (hears(on_step_end=shift), "writes to its inputs"),
        (hears(state=lambda listener: {"heard": 1}), "returns a state that is not a dict of tens"),
        (hears(__init__=lambda listener: torch.rand(1) and None), "global generator"),
        (draws(lambda n, g: torch.rand(n)), "draws from torch's global generator"),
        (draws(lambda n, g: torch.randint(5, (n,), generator=g)), "has the type int64"),
        (draws(lambda n, g: torch.ones(n)), "the same timesteps from every generator"),
        (draws(lambda n, g: 1e4 * torch.rand(n, generator=g)), "in the family's unit"),
        (draws(lambda n, g: torch.rand(n, generator=g)), "Round them"),
        (steps_by(lambda o, p: p.add_(p.grad)), "does not lower a quadratic function"),
        (steps_by(lambda o, p: p.sub_(p.grad)), "at a learning rate of 0"),
        (steps_by(fading), "takes other steps after a resume"),
        (steps_by(fading, kept=Generator), "cannot be saved in a checkpoint"),
        (rate(lambda step: -1.0), "-1.0 at step 0, not a number of 0 or more"),
        (rate(lambda step: 0.0), "is 0 at all of 20 steps"),
        (
            rate(lambda step, seen=[]: seen.append(1) or 1 / len(seen)),
            "depends on the calls before",
        ),
    ],
)
def test_broken_ways_to_take_steps_are_caught(
    made: type[Strategy], sentence: str, small_model: AnimateDiffModel
) -> None:
    args = (small_model,) if made.kind == "timesteps" else ()
    with pytest.raises((AssertionError, PluginError), match=sentence):
        getattr(testing, f"check_{made.kind}")(made(), *args)


class Mixing(Metric):
    """Depends on the mean of the batch."""

    higher_is_better: ClassVar[bool] = False
    unit: ClassVar[str] = "none"

    def __call__(self, videos: Tensor, prompts: Sequence[str]) -> Tensor:
        values = FrameDifference()(videos, prompts)
        return values - values.mean()


class Fragile(Metric):
    """Is infinite for a frozen video."""

    higher_is_better: ClassVar[bool] = False
    unit: ClassVar[str] = "none"

    def __call__(self, videos: Tensor, prompts: Sequence[str]) -> Tensor:
        return 1 / FrameDifference()(videos, prompts)


def returning(change: Callable[[Tensor], object]) -> type[Metric]:
    class Changed(Fragile):  # type: ignore[misc]
        """Returns something else than values."""

        def __call__(self, videos: Tensor, prompts: Sequence[str]) -> Any:
            return change(FrameDifference()(videos, prompts))

    return Changed


@pytest.mark.parametrize(
    ("metric", "sentence"),
    [
        (Mixing, "depends on the other videos"),
        (Fragile, "not finite on a frozen video"),
        (returning(Tensor.long), "has the type int64"),
        (returning(Tensor.tolist), "is a list, not a tensor"),
        (returning(Tensor.mean), r"has the shape \(\), not \(3,\)"),
        (returning(lambda values: 1 / 0), "fails on the inputs of its contract .ZeroDivisionError"),
    ],
)
def test_a_broken_metric_is_caught(metric: type[Metric], sentence: str) -> None:
    with pytest.raises(AssertionError, match=sentence):
        check_metric(metric())


class Leaking(PairBuilder):
    """Declares a smaller region than the one that differs."""

    @property
    def needs_video(self) -> bool:
        return True

    def __call__(
        self, clip: Clip, model: VideoModel, labeler: Labeler | None, generator: Generator
    ) -> Pair:
        pair = Jitter(chosen="clip")(clip, model, labeler, generator)
        return replace(pair, region=torch.zeros_like(pair.region))


class Stuck(PairBuilder):
    """Ignores its generator."""

    @property
    def needs_video(self) -> bool:
        return True

    def __call__(
        self, clip: Clip, model: VideoModel, labeler: Labeler | None, generator: Generator
    ) -> Pair:
        return Jitter(chosen="clip")(clip, model, labeler, Generator().manual_seed(0))


class Flat(PairBuilder):
    """Encodes the prompt with other shapes than the model."""

    @property
    def needs_video(self) -> bool:
        return True

    def __call__(
        self, clip: Clip, model: VideoModel, labeler: Labeler | None, generator: Generator
    ) -> Pair:
        pair = Jitter(chosen="clip")(clip, model, labeler, generator)
        return replace(pair, context={"prompt_embeds": torch.zeros(77, 16)})


class Shuffled(SuppliedPairs):
    """Gives its clips in a random order."""

    @property
    def needs_video(self) -> bool:
        return False

    def source(self, model: VideoModel, prompt: str | None) -> PairSource:
        names = sorted("abcdefgh", key=lambda name: torch.rand(()).item())
        clips = (Clip(name=name, caption="a caption") for name in names)
        return PairSource(clips=clips, count=8, fingerprint="", skipped=[])

    def __call__(
        self, clip: Clip, model: VideoModel, labeler: Labeler | None, generator: Generator
    ) -> Pair:
        return Jitter()(clip, model, labeler, generator)


@pytest.mark.parametrize(
    ("builder", "sentence"),
    [
        (Leaking, "differ outside their region"),
        (Stuck, "with every generator"),
        (Flat, "does not have the shapes of the model"),
        (Shuffled, "in another order"),
    ],
)
def test_a_broken_pair_builder_is_caught(
    builder: type[PairBuilder], sentence: str, small_model: AnimateDiffModel
) -> None:
    with pytest.raises(AssertionError, match=sentence):
        check_pairs(builder(), small_model)


class FirstIsBetter(Labeler):
    """Prefers the first video, as vision-language models do."""

    def __call__(
        self, prompts: Sequence[str], first: Tensor, second: Tensor, segments: Sequence[slice]
    ) -> Tensor:
        return torch.ones(len(prompts), len(segments))


class AtLeastAsBright(Labeler):
    """Prefers the first of two equal videos."""

    def __call__(
        self, prompts: Sequence[str], first: Tensor, second: Tensor, segments: Sequence[slice]
    ) -> Tensor:
        lead = Brighter()(prompts, first, second, segments)
        return torch.where(lead == 0, 1.0, lead)


class Percent(Labeler):
    """Returns labels in percent."""

    def __call__(
        self, prompts: Sequence[str], first: Tensor, second: Tensor, segments: Sequence[slice]
    ) -> Tensor:
        return 100 * Brighter()(prompts, first, second, segments)


class Whole(Labeler):
    """Returns one label per pair."""

    def __call__(
        self, prompts: Sequence[str], first: Tensor, second: Tensor, segments: Sequence[slice]
    ) -> Tensor:
        return Brighter()(prompts, first, second, segments).mean(dim=1, keepdim=True)


class Careless(Brighter):
    """Declares an option incidental that it does not have."""

    incidental: ClassVar[frozenset[str]] = frozenset({"port"})


def test_a_labeler_that_keeps_the_contract_passes() -> None:
    check_labeler(Brighter())


@pytest.mark.parametrize(
    ("labeler", "sentence"),
    [
        (FirstIsBetter, "do not change their sign"),
        (AtLeastAsBright, "prefers one of two identical videos"),
        (Percent, "is not in .-1, 1."),
        (Whole, "Return one label in .-1, 1. per segment"),
        (Careless, "which are not its options"),
    ],
)
def test_a_broken_labeler_is_caught(labeler: type[Labeler], sentence: str) -> None:
    with pytest.raises(AssertionError, match=sentence):
        check_labeler(labeler())


def test_a_model_that_repaints_too_much_is_caught(
    small_model: AnimateDiffModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = small_model.sample

    def careless(*arguments: Any, region: Tensor | None = None, **options: Any) -> Tensor:
        return original(*arguments, **options)

    monkeypatch.setattr(small_model, "sample", careless)
    with pytest.raises(AssertionError, match="outside the region"):
        check_backbone_model(small_model)
