"""Contracts of losses, pair builders, metrics and labelers, and of all options."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import islice

import tomli_w
import torch
from pydantic import BaseModel
from torch import Generator

from dpo_video.data.pair_check import pair_fault
from dpo_video.errors import UserError
from dpo_video.registry.returned import tensor_fault
from dpo_video.strategies import (
    AnyLabeler,
    Labeler,
    LabelerFactory,
    Loss,
    Metric,
    PairBuilder,
    StoreLabeler,
    Strategy,
    SuppliedPairs,
    VideoModel,
)
from dpo_video.testing.inputs import (
    PREFERENCES,
    SMALL_CHANGE,
    one_of,
    random_clip,
    random_errors,
    small_videos,
    swapped,
)
from dpo_video.testing.laws import close, contract, law, pure, same
from dpo_video.tiny.scenes import spread_captions
from dpo_video.training.objective import figures
from dpo_video.types import Clip, GroupErrors, LossOutput, Pair, PairErrors


@contract
def check_options(strategy: Strategy) -> None:
    """Check that the options are frozen and documented, and survive a TOML file."""
    model = type(strategy)
    name = model.__name__
    law(
        (model.__doc__ or "").strip(),
        f"{name} has no docstring. Describe what it does, and cite its source.",
    )
    _check_fields(model, name)
    try:
        text = tomli_w.dumps(strategy.model_dump(mode="json", exclude_none=True))
        read = model(**tomllib.loads(text))
    except (TypeError, ValueError) as error:
        raise AssertionError(
            f"{name}'s options do not survive a TOML file: {error}. Use plain types."
        ) from error
    law(
        read == strategy,
        f"{name}'s options are {read!r} when read from a TOML file, and were {strategy!r}. A run "
        "could not be repeated.",
    )


def _check_fields(model: type[BaseModel], name: str) -> None:
    config = model.model_config
    law(
        config.get("frozen"),
        f"{name} is not frozen. State belongs in the objects that a strategy makes.",
    )
    law(
        config.get("extra") == "forbid",
        f"{name} accepts unknown options, so a typo would go unnoticed.",
    )
    law(
        "kind" not in model.model_fields,
        f"{name} has an option 'kind', which is the kind of the strategy. Leave it out, or declare "
        "it as a ClassVar.",
    )
    for option, field in model.model_fields.items():
        law(
            (field.description or "").strip(),
            f"{name}.{option} has no docstring. It is the help that `dpo-video show` prints; "
            "write it below the field.",
        )
        nested = field.annotation
        if isinstance(nested, type) and issubclass(nested, BaseModel):
            _check_fields(nested, f"{name}.{option}")


@contract
def check_loss(loss: Loss) -> None:
    """Check that it is a pure function of the errors, pair by pair, whatever the videos' order.

    A loss with `needs_reference = False` gets reference errors of 0, as in training, and its margin
    need not be 0 for a policy that equals its reference.
    """
    check_options(loss)
    name = type(loss).__name__
    count = len(PREFERENCES)
    errors = replace(
        random_errors(pairs=count, full_region=False, change=SMALL_CHANGE), preference=PREFERENCES
    )
    if not loss.needs_reference:  # as in training
        none = torch.zeros_like(errors.reference_first)
        near = (errors.policy_first + errors.policy_second - errors.reference_second).abs()
        errors = replace(errors, policy_second=near, reference_first=none, reference_second=none)
    law(
        loss.compares or not loss.needs_reference,
        f"{name} declares compares False, so that no reference is run. Set needs_reference False.",
    )
    with pure(name, *(each for each in vars(errors).values() if each is not None)):
        output, again = loss(errors), loss(errors)
    law(
        isinstance(output, LossOutput),
        f"{name} returns a {type(output).__name__}. Return a LossOutput.",
    )
    for figure, value in vars(output).items():
        fault = tensor_fault(value, (count,))
        law(
            not fault,
            f"{name} gives a {figure} that {fault}. Average over every axis but the first.",
        )
        law(
            value.dtype == torch.float32,
            f"{name} gives a {figure} in {value.dtype}. Keep the errors' type, torch.float32.",
        )
        law(
            torch.equal(value, vars(again)[figure]),
            f"{name}'s {figure} differs between two calls on the same errors. A loss must be "
            "deterministic.",
        )
    mirrored = loss(replace(swapped(errors), preference=-errors.preference))
    for figure in ("loss", "margin"):
        law(
            close(vars(mirrored)[figure], vars(output)[figure]),
            f"{name}'s {figure} changes when the two videos swap places and the preference its "
            "sign. The order of the videos must not matter.",
        )
    still = loss(
        replace(errors, policy_first=errors.reference_first, policy_second=errors.reference_second)
    )
    law(
        not loss.needs_reference or (still.margin == 0).all(),
        f"{name}'s margin is not exactly 0 for a policy that equals its reference. Training would "
        "stop at its first step.",
    )
    alone = [loss(one_of(errors, i)) for i in range(count)]
    for figure, value in vars(output).items():
        law(
            close(torch.cat([vars(one)[figure] for one in alone]), value),
            f"{name}'s {figure} of a pair depends on the other pairs of its batch. Average over "
            "each pair alone.",
        )
    _check_gradients(loss, errors)
    _check_margin(loss, errors)
    if loss.sees_groups:
        _check_group(loss, errors)


def _check_group(loss: Loss, errors: PairErrors) -> None:
    """Check a loss on groups: it depends on the samples between, and on each group alone."""
    name, count = type(loss).__name__, len(PREFERENCES)
    more = random_errors(seed=1, pairs=2 * count, change=SMALL_CHANGE)
    shape = (count, 2, *more.policy_first.shape[1:])
    groups = replace(
        errors,
        between=GroupErrors(
            policy=more.policy_first.view(shape).requires_grad_(),
            reference=more.reference_first.view(shape),
            ranks=torch.tensor([[0.0, 1, 2, 3]]).expand(count, -1),
        ),
    )
    output = loss(groups)
    alone = [loss(one_of(groups, i)).loss for i in range(count)]
    law(
        close(torch.cat(alone), output.loss),
        f"{name}'s loss of a group depends on the other groups of its batch.",
    )
    assert groups.between is not None
    (gradient,) = torch.autograd.grad(
        output.loss.sum(), groups.between.policy, materialize_grads=True
    )
    reached = (gradient != 0).flatten(2).any(dim=2)
    law(
        reached.all() and gradient.isfinite().all(),
        f"{name} declares sees_groups, but no finite gradient reaches some sample of a group.",
    )


def _check_margin(loss: Loss, errors: PairErrors) -> None:
    """Check that the margin follows from the changes, and the slopes at logits of -2, 0 and 2."""
    name = type(loss).__name__
    one = one_of(errors, 0)  # the first video is preferred in every frame
    one = replace(one, policy_first=one.reference_first)

    def moved(margin: float) -> PairErrors:
        return replace(one, policy_second=one.reference_second + margin)

    output = loss(moved(SMALL_CHANGE))
    law(
        close(output.margin, output.rejected_change - output.chosen_change, SMALL_CHANGE),
        f"{name}'s margin is not rejected_change - chosen_change.",
    )
    policy = one.policy_second.clone().requires_grad_()
    law(
        loss(replace(one, policy_second=policy)).margin.requires_grad,
        f"{name}'s margin has no gradient. Compute it from the policy's errors without detach.",
    )
    if not loss.compares:  # without a slope on the margin there are no logits
        return
    unit = figures(loss, moved(SMALL_CHANGE)).logits.item() / SMALL_CHANGE
    law(
        unit > 0,
        f"{name} does not raise the margin of a policy that equals its reference: its slope on the "
        f"margin is {-unit / 2:.3g} there and must be below 0.",
    )
    for logits in (-2.0, 0.0, 2.0):
        found = figures(loss, moved(logits / unit))
        law(
            close(found.logits, torch.tensor([logits]), 1e-2),
            f"{name}'s margin is not proportional to the change of the rejected video's error.",
        )
        law(
            found.gradient_factor.isfinite().all(),
            f"{name}'s slope on the margin is not finite at logits of {logits:g}.",
        )


def _check_gradients(loss: Loss, errors: PairErrors) -> None:
    name = type(loss).__name__
    decided = errors.rows(errors.label != 0)
    policy = [
        value.clone().requires_grad_() for value in (decided.policy_first, decided.policy_second)
    ]
    output = loss(replace(decided, policy_first=policy[0], policy_second=policy[1]))
    found = torch.autograd.grad(output.loss.sum(), policy, materialize_grads=True)
    for which, gradient in zip(("first", "second"), found, strict=True):
        reached = (gradient != 0).flatten(1).any(dim=1)
        chosen = (decided.label > 0) == (which == "first")
        law(
            reached[chosen].all() and (reached.all() or not loss.compares),
            f"No gradient of {name} reaches the policy's errors of the {which} video of "
            "some pair. Do not detach, round or compare them.",
        )
        law(
            loss.compares or not reached[~chosen].any(),
            f"{name} declares compares False, but its gradient reaches the errors of the rejected "
            "video. Leave compares True.",
        )
        law(
            gradient.isfinite().all(),
            f"{name}'s gradient on the policy's errors of the {which} video is not finite.",
        )
        if loss.linear_in_mean_error:
            one = gradient[:, :1, :1, :1, :1]
            law(
                torch.equal(gradient, one.expand_as(gradient)),
                f"{name} declares linear_in_mean_error, but its gradient differs between the "
                f"errors of the {which} video. Leave linear_in_mean_error False.",
            )
    for value in (decided.reference_first, decided.reference_second):
        law(
            not value.requires_grad and value.grad is None,
            f"{name} requires a gradient on the reference's errors. The reference is frozen.",
        )


@contract
def check_pairs(
    builder: PairBuilder,
    model: VideoModel,
    *,
    clip: Clip | None = None,
    labeler: Labeler | None = None,
) -> None:
    """Check that pairs have the model's shape, and differ by the generator and in their region.

    Args:
        builder: The strategy.
        model: Any small model.
        clip: The clip to make pairs of; by default the first of the builder's own, or random pixels
            with a caption.
        labeler: Labeler, for builders that need one.
    """
    check_options(builder)
    name = type(builder).__name__
    if clip is None:
        if isinstance(builder, SuppliedPairs):
            clip = _first_supplied(builder, model, name)
        else:
            clip = random_clip(model)

    def make(of: Clip, seed: int) -> Pair:
        return builder(of, model, labeler, Generator().manual_seed(seed))

    with pure(name, *([] if clip.video is None else [clip.video])):
        pair, again, other = make(clip, 0), make(clip, 0), make(clip, 1)
    _check_pair(pair, model, name)
    law(same(pair, again), f"{name} makes different pairs of the same clip and generator.")
    # Without a labeler a builder raises a UserError or works.
    with suppress(UserError):
        _check_pair(builder(clip, model, None, Generator().manual_seed(0)), model, name)
    if isinstance(builder, SuppliedPairs):  # finished pairs draw nothing
        return
    law(not same(pair, other), f"{name} makes the same pair with every generator.")
    bare = replace(clip, video=None)
    if not builder.needs_video:
        _check_pair(make(bare, 0), model, name)
        return
    try:
        make(bare, 0)
    except UserError:
        return
    raise AssertionError(f"{name} declares needs_video, but makes a pair of a prompt alone.")


def _first_supplied(builder: SuppliedPairs, model: VideoModel, name: str) -> Clip:
    """The first of the builder's own clips, after checking that their order is fixed."""
    one, two = (builder.source(model, "a caption") for _ in range(2))
    law(
        one.count > 0 and one.count == two.count and one.fingerprint == two.fingerprint,
        f"{name} gives another count or fingerprint for the same source.",
    )
    clips = [list(islice(source.clips, 2)) for source in (one, two)]
    law(clips[0], f"{name} has no clips, and raises no UserError.")
    law(
        [clip.name for clip in clips[0]] == [clip.name for clip in clips[1]],
        f"{name} gives its clips in another order. Pairs are numbered: sort them.",
    )
    return clips[0][0]


def _check_pair(pair: Pair, model: VideoModel, name: str) -> None:
    fault = pair_fault(pair, model)
    law(not fault, f"{name} {fault}.")
    law((pair.first != pair.second).any(), f"{name}'s two videos are the same.")
    law(pair.prompt and pair.source, f"{name}'s pair has no prompt or no source.")
    if pair.context is not None:
        encoded = model.encode_prompts([pair.prompt])
        law(
            {k: v.shape for k, v in pair.context.items()}
            == {k: v.shape for k, v in encoded.items()},
            f"{name}'s context does not have the shapes of the model's encoded prompt, with a "
            "leading axis of 1.",
        )


@contract
def check_metric(metric: Metric, prompts: Sequence[str] | None = None) -> None:
    """Check that it gives one finite number per video, whatever else is in the batch.

    Args:
        metric: The strategy.
        prompts: Three prompts; captions of the embedded model by default.
    """
    check_options(metric)
    model = type(metric)
    name = model.__name__
    prompts = spread_captions(3) if prompts is None else list(prompts)
    law(
        isinstance(getattr(model, "higher_is_better", None), bool),
        f"{name} does not define higher_is_better.",
    )
    law(getattr(model, "unit", ""), f"{name} has no unit. It is printed beside the numbers.")
    law(
        model.role in ("target", "motion", "guard"),
        f"{name}'s role is not target, motion or guard.",
    )
    metric(small_videos(len(prompts)), prompts)  # the first use may load what it measures with
    for frames in (5, 2):
        videos = small_videos(len(prompts), frames)
        with pure(name, videos):
            values, again = metric(videos, prompts), metric(videos, prompts)
        fault = tensor_fault(values, (len(prompts),))
        law(
            not fault,
            f"{name} returns something that {fault}, for {len(prompts)} videos of {frames} frames. "
            "Return one number per video.",
        )
        law(torch.equal(values, again), f"{name} gives different numbers for the same videos.")
        alone = [metric(videos[i : i + 1], prompts[i : i + 1]) for i in range(len(prompts))]
        law(
            close(torch.cat(alone), values, 1e-3),
            f"{name} of a video depends on the other videos of its batch.",
        )
    frozen = videos[:, :, :1].repeat(1, 1, 4, 1, 1)
    for what, video in (("a frozen video", frozen), ("a black video", torch.zeros_like(frozen))):
        law(metric(video, prompts).isfinite().all(), f"{name} is not finite on {what}.")


@contract
def check_labeler(
    labeler: AnyLabeler,
    prompts: Sequence[str] | None = None,
    *,
    metrics: Mapping[str, Metric] | None = None,
) -> None:
    """Check that it gives a label in [-1, 1] per pair and segment, whatever the videos' order.

    Only the options of a `StoreLabeler` are checked, because it takes no videos.

    Args:
        labeler: The strategy.
        prompts: Two prompts; captions of the embedded model by default.
        metrics: For a `LabelerFactory`, one for each of its `metric_names`.
    """
    check_options(labeler)
    name = type(labeler).__name__
    strays = labeler.incidental - type(labeler).model_fields.keys()
    law(not strays, f"{name} declares {sorted(strays)} incidental, which are not its options.")
    if isinstance(labeler, StoreLabeler):
        return
    if isinstance(labeler, LabelerFactory):
        given = metrics or {}
        labeler = labeler.with_metrics({each: given[each] for each in labeler.metric_names})
    if not isinstance(labeler, Labeler):
        raise AssertionError(f"{name} is no Labeler, LabelerFactory or StoreLabeler.")
    prompts = spread_captions(2) if prompts is None else list(prompts)
    count, segments = len(prompts), [slice(0, 2), slice(2, 4)]
    first, second = (small_videos(count, 4, seed=seed) for seed in (0, 1))
    labeler(prompts, first, second, segments)  # the first use may load what it judges with
    with pure(name, first, second):
        labels = labeler(prompts, first, second, segments)
        again = labeler(prompts, first, second, segments)
    fault = tensor_fault(labels, (count, len(segments)), within=(-1, 1))
    law(
        not fault,
        f"{name} returns something that {fault}, for {count} pairs of {len(segments)} segments. "
        "Return one label in [-1, 1] per segment.",
    )
    law(torch.equal(labels, again), f"{name} gives different labels for the same videos.")
    law(
        close(labeler(prompts, second, first, segments), -labels),
        f"{name}'s labels do not change their sign when the videos swap places. Ask in both "
        "orders, and return a tie where the answers disagree.",
    )
    law(
        (labeler(prompts, first, first.clone(), segments) == 0).all(),
        f"{name} prefers one of two identical videos. Return a tie.",
    )
    alone = [
        labeler(prompts[i : i + 1], first[i : i + 1], second[i : i + 1], segments)
        for i in range(count)
    ]
    law(
        close(torch.cat(alone), labels, 1e-3),
        f"{name}'s labels of a pair depend on the other pairs of its batch.",
    )
