"""The contracts that every strategy keeps, built in or yours.

    from dpo_video.testing import check_loss

    def test_it_keeps_the_contract() -> None:
        check_loss(Focal())

Each check raises an AssertionError that says in a sentence what is not so, and what to do. They
need no test framework, no download and no GPU.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from itertools import islice
from typing import Any

import tomli_w
import torch
import torch.nn.functional as F
from jaxtyping import Float
from peft import PeftModel
from pydantic import BaseModel
from torch import Generator, Tensor, nn

from dpo_video.errors import UserError
from dpo_video.settings import TrainSettings
from dpo_video.strategies import (
    Backbone,
    Labeler,
    Loss,
    MeasuringLabeler,
    Metric,
    PairBuilder,
    Reference,
    SetLabeler,
    Strategy,
    SuppliedPairs,
    VideoModel,
)
from dpo_video.tiny.scenes import spread_captions
from dpo_video.train import adapt
from dpo_video.types import Clip, LossOutput, Pair, PairErrors, Videos

PREFERENCES = torch.tensor(
    [[1.0, 1, 1, 1], [-1.0, -1, -1, -1], [1.0, 1, 0, -1], [-1.0, 1, -1, -1], [1.0, 1, -1, -1]]
)
"""Per frame: the first is better, the second is, either one mostly is, and an even pair."""
SMALL_CHANGE = 1e-4
"""How far the errors of a policy in training are from its reference's: at the usual slope of 2500
that is a logit of 0.25, where every loss still has a gradient."""


# --- inputs ----------------------------------------------------------------------------------


def random_errors(
    seed: int = 0, pairs: int = 3, *, full_region: bool = True, change: float | None = None
) -> PairErrors:
    """Errors in [0, 1) on latents of 2x4x3x3, the first video preferred everywhere.

    Args:
        seed: Of all draws.
        pairs: How many.
        full_region: Whether the videos may differ everywhere, or in two fifths of the elements.
        change: How far the policy's errors are from the reference's at most; None draws them apart.
    """
    generator = Generator().manual_seed(seed)
    shape = (pairs, 2, 4, 3, 3)
    region = torch.ones(pairs, 1, 4, 3, 3)
    if not full_region:
        region = (torch.rand(region.shape, generator=generator) < 0.4).float()
    policy = [torch.rand(shape, generator=generator) for _ in range(2)]
    reference = [torch.rand(shape, generator=generator) for _ in range(2)]
    if change is not None:
        policy = [
            (near + change * (2 * draw - 1)).abs()
            for near, draw in zip(reference, policy, strict=True)
        ]
    signs = torch.rand(shape, generator=generator).sub(0.5).sign()
    return PairErrors(
        policy_first=policy[0],
        policy_second=policy[1],
        reference_first=reference[0],
        reference_second=reference[1],
        policy_product=signs * (policy[0] * policy[1]).sqrt(),
        preference=torch.ones(pairs, 4),
        region=region,
        strength=torch.full((pairs,), 0.75),
    )


def swapped(errors: PairErrors) -> PairErrors:
    """The same pairs with their videos in the other order, the preference left as it is."""
    return replace(
        errors,
        policy_first=errors.policy_second,
        policy_second=errors.policy_first,
        reference_first=errors.reference_second,
        reference_second=errors.reference_first,
    )


def small_videos(
    count: int = 2, frames: int = 5, height: int = 64, width: int = 64, *, seed: int = 0
) -> Videos:
    """Smooth random textures that drift by one pixel a frame, under a little grain."""
    generator = Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 2 + height // 6, 2 + width // 6, generator=generator)
    texture = F.interpolate(coarse, size=(height, width + frames - 1), mode="bilinear")
    drifting = torch.stack([texture[..., t : t + width] for t in range(frames)], dim=2)
    grain = 0.02 * torch.randn(drifting.shape, generator=generator)
    return (drifting + grain).clamp(0, 1)


# --- what all kinds owe ----------------------------------------------------------------------


def check_options(strategy: Strategy) -> None:
    """A documented class whose options are frozen, documented, and at home in a TOML file."""
    model = type(strategy)
    name = model.__name__
    _law((model.__doc__ or "").strip(), f"{name} has no docstring. Say what it does, and cite it.")
    _check_fields(model, name)
    try:
        text = tomli_w.dumps(strategy.model_dump(mode="json", exclude_none=True))
        read = model(**tomllib.loads(text))
    except (TypeError, ValueError) as error:
        raise AssertionError(
            f"{name}'s options do not survive a TOML file: {error}. Use plain types."
        ) from error
    _law(
        read == strategy,
        f"{name}'s options come back from a TOML file as {read!r}, and were "
        f"{strategy!r}. A run could not be repeated.",
    )


def _check_fields(model: type[BaseModel], name: str) -> None:
    config = model.model_config
    _law(config.get("frozen"), f"{name} is not frozen. State belongs in what a strategy makes.")
    _law(config.get("extra") == "forbid", f"{name} accepts unknown options: a typo would pass.")
    for option, field in model.model_fields.items():
        _law(
            (field.description or "").strip(),
            f"{name}.{option} has no docstring. It is the help that `dpo-video show` prints; "
            "write it below the field.",
        )
        nested = field.annotation
        if isinstance(nested, type) and issubclass(nested, BaseModel):
            _check_fields(nested, f"{name}.{option}")


# --- the kinds -------------------------------------------------------------------------------


def check_loss(loss: Loss) -> None:
    """A pure function of the errors, pair by pair, blind to the order of the two videos."""
    check_options(loss)
    name = type(loss).__name__
    count = len(PREFERENCES)
    errors = replace(
        random_errors(pairs=count, full_region=False, change=SMALL_CHANGE), preference=PREFERENCES
    )
    with _pure(name, *vars(errors).values()):
        output, again = loss(errors), loss(errors)
    _law(isinstance(output, LossOutput), f"{name} gives a {type(output).__name__}, no LossOutput.")
    for figure, value in vars(output).items():
        _law(
            value.shape == (count,),
            f"{name} gives {figure} of shape {tuple(value.shape)} for {count} pairs. Average over "
            "every axis but the first.",
        )
        _law(value.isfinite().all(), f"{name} gives {figure} that is not finite.")
        _law(
            torch.equal(value, vars(again)[figure]),
            f"{name} gives another {figure} for the same errors. A loss draws nothing.",
        )
    mirrored = loss(replace(swapped(errors), preference=-errors.preference))
    for figure in ("loss", "margin", "logits"):
        _law(
            _close(vars(mirrored)[figure], vars(output)[figure]),
            f"{name}'s {figure} changes when the two videos swap places and the preference its "
            "sign. Which one is stored first must not matter.",
        )
    still = loss(
        replace(errors, policy_first=errors.reference_first, policy_second=errors.reference_second)
    )
    for figure in ("margin", "logits"):
        _law(
            (vars(still)[figure] == 0).all(),
            f"{name}'s {figure} is not exactly 0 for a policy that equals its reference. Training "
            "would stop itself at its first step.",
        )
    _law(
        _close(still.gradient_factor, torch.full((count,), 0.5)),
        f"{name}'s gradient_factor is not 0.5 for a policy that equals its reference. Give half of "
        "the slope on the margin, relative to its slope at margin 0.",
    )
    alone = [loss(_one(errors, i)) for i in range(count)]
    for figure, value in vars(output).items():
        _law(
            _close(torch.cat([vars(one)[figure] for one in alone]), value),
            f"{name}'s {figure} of a pair depends on the other pairs of its batch. Average over "
            "each pair alone.",
        )
    _check_gradients(loss, errors)


def _check_gradients(loss: Loss, errors: PairErrors) -> None:
    name = type(loss).__name__
    decided = PairErrors(**{k: v[errors.winner != 0] for k, v in vars(errors).items()})
    policy = [
        value.clone().requires_grad_() for value in (decided.policy_first, decided.policy_second)
    ]
    output = loss(replace(decided, policy_first=policy[0], policy_second=policy[1]))
    output.loss.sum().backward()
    for which, value in zip(("first", "second"), policy, strict=True):
        reached = value.grad is not None and (value.grad != 0).flatten(1).any(dim=1).all()
        _law(
            reached,
            f"No gradient of {name} reaches the policy's errors of the {which} video of "
            "some pair. Do not detach them, nor round or compare them.",
        )
        _law(
            value.grad is not None and value.grad.isfinite().all(),
            f"{name}'s gradient on the policy's errors of the {which} video is not finite.",
        )
        if loss.uniform and value.grad is not None:
            one = value.grad[:, :1, :1, :1, :1]
            _law(
                torch.equal(value.grad, one.expand_as(value.grad)),
                f"{name} says that it is uniform, but its gradient differs from one error of the "
                f"{which} video to the next. Leave uniform as it is: False.",
            )
    for value in (decided.reference_first, decided.reference_second):
        _law(
            not value.requires_grad and value.grad is None,
            f"{name} asks for a gradient on the reference's errors. The reference is frozen.",
        )


def check_pairs(
    builder: PairBuilder,
    model: VideoModel,
    *,
    clip: Clip | None = None,
    labeler: Labeler | None = None,
) -> None:
    """Pairs of the model's shape, drawn from the generator alone, equal outside their region.

    Args:
        builder: The strategy.
        model: Any small model.
        clip: What the pairs are made of; if left out, the first of what the builder brings itself,
            or else random pixels under a caption.
        labeler: For strategies that need one.
    """
    check_options(builder)
    name = type(builder).__name__
    if clip is None:
        if isinstance(builder, SuppliedPairs):
            clip = _first_supplied(builder, model, name)
        else:
            clip = _random_clip(model)

    def make(of: Clip, seed: int) -> Pair:
        return builder(of, model, labeler, Generator().manual_seed(seed))

    with _pure(name, *([] if clip.video is None else [clip.video])):
        pair, again, other = make(clip, 0), make(clip, 0), make(clip, 1)
    _check_pair(pair, model, name)
    _law(_same(pair, again), f"{name} makes another pair of the same clip and generator.")
    # Nobody to ask is for the builder to say, or to do without.
    with suppress(UserError):
        _check_pair(builder(clip, model, None, Generator().manual_seed(0)), model, name)
    if isinstance(builder, SuppliedPairs):  # finished pairs leave nothing to draw or to leave out
        return
    _law(not _same(pair, other), f"{name} makes the same pair whatever the generator says.")
    bare = replace(clip, video=None)
    if not builder.needs_video:
        _check_pair(make(bare, 0), model, name)
        return
    try:
        make(bare, 0)
    except UserError:
        return
    raise AssertionError(f"{name} says that it needs videos, but makes a pair of a prompt alone.")


def _first_supplied(builder: SuppliedPairs, model: VideoModel, name: str) -> Clip:
    """The first clip that the builder brings, if it brings the same ones in the same order."""
    one, two = (builder.material(model, "a caption") for _ in range(2))
    _law(
        one.count > 0 and one.count == two.count and one.fingerprint == two.fingerprint,
        f"{name} opens the same material twice and gives another count or fingerprint.",
    )
    clips = [list(islice(material.clips, 2)) for material in (one, two)]
    _law(clips[0], f"{name} brings nothing, and raises no UserError that says so.")
    _law(
        [clip.name for clip in clips[0]] == [clip.name for clip in clips[1]],
        f"{name} brings its clips in another order. Pairs are numbered: sort them.",
    )
    return clips[0][0]


def _check_pair(pair: Pair, model: VideoModel, name: str) -> None:
    _, *cells = model.latent_shape
    shapes = {
        "first": model.latent_shape,
        "second": model.latent_shape,
        "preference": (cells[0],),
        "region": (1, *cells),
    }
    for part, shape in shapes.items():
        value = vars(pair)[part]
        _law(
            value.shape == shape,
            f"{name}'s {part} has the shape {tuple(value.shape)}, not {tuple(shape)}.",
        )
        _law(value.isfinite().all(), f"{name}'s {part} is not finite.")
        _law(
            value.device.type == "cpu", f"{name}'s {part} is not on the CPU, where pairs are kept."
        )
    _law(pair.preference.abs().max() <= 1, f"{name}'s preference leaves [-1, 1].")
    _law(((pair.region == 0) | (pair.region == 1)).all(), f"{name}'s region is not of 0 and 1.")
    outside = (pair.region == 0).expand_as(pair.first)
    _law(
        torch.equal(pair.first[outside], pair.second[outside]),
        f"{name}'s videos differ outside their region. Copy one's latents there.",
    )
    _law((pair.first != pair.second).any(), f"{name}'s two videos are the same.")
    _law(0 <= pair.strength <= 1, f"{name}'s strength is {pair.strength}, not in [0, 1].")
    _law(pair.prompt and pair.source, f"{name}'s pair does not say its prompt and its source.")
    if pair.context is not None:
        encoded = model.encode_prompts([pair.prompt])
        _law(
            {k: v.shape for k, v in pair.context.items()}
            == {k: v.shape for k, v in encoded.items()},
            f"{name}'s context is not shaped as the model encodes a prompt, a leading axis of 1 "
            "included.",
        )


def check_reference(reference: Reference, model: VideoModel) -> None:
    """It predicts what the bare denoiser predicts, and leaves the policy as it was.

    The adapter that this puts on the model is taken off at the end.
    """
    check_options(reference)
    name = type(reference).__name__
    noisy = _noise(model, 1)
    level = model.sample_levels(1, Generator().manual_seed(0)).to(model.device)
    context = model.encode_prompts(spread_captions(1))

    @torch.no_grad()
    def predicted(network: nn.Module) -> Tensor:
        return model.predict(network, noisy, level, context)

    bare = predicted(model.denoiser)
    with _adapted(model) as policy:
        anchor = reference.follow(policy)
        _law(
            anchor.draws is None or anchor.draws >= 1,
            f"{name} gives every pair {anchor.draws} draws. Say None for fresh ones, or how many.",
        )
        for seed in (1, 2):  # the adapter as it is after a step, and after another
            _move(policy, seed)
            adapted, trainable = predicted(policy), _trainable(policy)
            with anchor.network() as network:
                seen = predicted(network)
            _law(
                torch.equal(seen, bare),
                f"{name} does not predict what the bare denoiser does. "
                "Take the adapter off, and nothing else.",
            )
            reached = False
            with suppress(_InterruptedError), anchor.network():
                reached = True
                raise _InterruptedError
            _law(reached, f"{name} does not run what stands in its `with` block.")
            _law(
                torch.equal(predicted(policy), adapted),
                f"The policy predicts something else after {name} was used. Put the adapter on "
                "again, also after an error (try ... finally).",
            )
            _law(
                _trainable(policy) == trainable,
                f"Other weights are trainable after {name} was used.",
            )


class _InterruptedError(Exception):
    """An error inside the `with` block."""


def check_metric(metric: Metric, prompts: Sequence[str] | None = None) -> None:
    """One finite number per video, whatever else is in the batch.

    Args:
        metric: The strategy.
        prompts: Three that it can read; captions of the embedded model if left out.
    """
    check_options(metric)
    model = type(metric)
    name = model.__name__
    prompts = spread_captions(3) if prompts is None else list(prompts)
    _law(
        isinstance(getattr(model, "higher_is_better", None), bool),
        f"{name} does not say whether higher_is_better.",
    )
    _law(getattr(model, "unit", ""), f"{name} has no unit. It is printed beside its numbers.")
    _law(model.role in ("target", "motion", "guard"), f"{name} has no role of the three.")
    metric(small_videos(len(prompts)), prompts)  # the first use may load what it measures with
    for frames in (5, 2):
        videos = small_videos(len(prompts), frames)
        with _pure(name, videos):
            values, again = metric(videos, prompts), metric(videos, prompts)
        _law(
            values.shape == (len(prompts),),
            f"{name} gives the shape {tuple(values.shape)} for {len(prompts)} videos of {frames} "
            "frames. Give one number each.",
        )
        _law(values.isfinite().all(), f"{name} is not finite on videos of {frames} frames.")
        _law(torch.equal(values, again), f"{name} gives other numbers for the same videos.")
        alone = [metric(videos[i : i + 1], prompts[i : i + 1]) for i in range(len(prompts))]
        _law(
            _close(torch.cat(alone), values, 1e-3),
            f"{name} of a video depends on the other videos of its batch.",
        )
    frozen = videos[:, :, :1].repeat(1, 1, 4, 1, 1)
    for what, video in (("a frozen video", frozen), ("a black video", torch.zeros_like(frozen))):
        _law(metric(video, prompts).isfinite().all(), f"{name} is not finite on {what}.")


def check_labeler(
    labeler: Labeler,
    prompts: Sequence[str] | None = None,
    *,
    metrics: Mapping[str, Metric] | None = None,
) -> None:
    """One label in [-1, 1] per video and segment, blind to the order of the two videos.

    Of a `SetLabeler` only the options are checked: it judges no videos that are handed to it.

    Args:
        labeler: The strategy.
        prompts: Two that it can read; captions of the embedded model if left out.
        metrics: For a `MeasuringLabeler`, one of each name in its `measures`.
    """
    check_options(labeler)
    name = type(labeler).__name__
    strays = labeler.incidental - type(labeler).model_fields.keys()
    _law(not strays, f"{name} calls {sorted(strays)} incidental, which are no options of it.")
    if isinstance(labeler, SetLabeler):
        return
    if isinstance(labeler, MeasuringLabeler):
        labeler = labeler.with_metrics({each: (metrics or {})[each] for each in labeler.measures})
    prompts = spread_captions(2) if prompts is None else list(prompts)
    count, segments = len(prompts), [slice(0, 2), slice(2, 4)]
    first, second = (small_videos(count, 4, seed=seed) for seed in (0, 1))
    labeler(prompts, first, second, segments)  # the first use may load what it judges with
    with _pure(name, first, second):
        labels = labeler(prompts, first, second, segments)
        again = labeler(prompts, first, second, segments)
    _law(
        labels.shape == (count, len(segments)),
        f"{name} gives the shape {tuple(labels.shape)} for {count} pairs of {len(segments)} "
        "segments. Give one label each.",
    )
    _law(labels.isfinite().all() and labels.abs().max() <= 1, f"{name}'s labels leave [-1, 1].")
    _law(torch.equal(labels, again), f"{name} gives other labels for the same videos.")
    _law(
        _close(labeler(prompts, second, first, segments), -labels),
        f"{name}'s labels do not change their sign when the videos swap places. Ask in both "
        "orders, and call it a tie where the answers disagree.",
    )
    _law(
        (labeler(prompts, first, first.clone(), segments) == 0).all(),
        f"{name} prefers one of two identical videos. They are a tie.",
    )
    alone = [
        labeler(prompts[i : i + 1], first[i : i + 1], second[i : i + 1], segments)
        for i in range(count)
    ]
    _law(
        _close(torch.cat(alone), labels, 1e-3),
        f"{name}'s labels of a pair depend on the other pairs of its batch.",
    )


def check_backbone(backbone: Backbone) -> None:
    """What a family says of itself without being loaded: guards, prompts, clips of its own."""
    check_options(backbone)
    name = type(backbone).__name__
    guards = getattr(type(backbone), "guards", None)
    _law(
        isinstance(guards, tuple) and all(isinstance(guard, str) for guard in guards),
        f"{name} does not name its guards, a tuple of names of metrics.",
    )
    strays = backbone.training.keys() - TrainSettings.model_fields.keys()
    _law(not strays, f"{name}.training sets {sorted(strays)}, which are no options of [train].")
    TrainSettings(**backbone.training)
    for count in (1, 47):
        prompts = backbone.prompts(count)
        _law(len(prompts) == count and all(prompts), f"{name} does not give {count} prompts.")
    own = [backbone.clips(seed) for seed in (0, 0)]
    if own[0] is None or own[1] is None:
        return
    for clip, again in zip(islice(own[0], 2), islice(own[1], 2), strict=True):
        _law(clip.caption and clip.video is not None, f"{name}'s clips lack a caption or a video.")
        if clip.video is not None and again.video is not None:
            _law(
                torch.equal(clip.video, again.video), f"{name}'s clips depend on more than a seed."
            )
            _law(_in_unit(clip.video), f"{name}'s clips leave [0, 1].")


def check_backbone_model(model: VideoModel) -> None:
    """Shapes and ranges, randomness from arguments alone, the law of the region, the adapter."""
    name = type(model).__name__
    shape, latent_shape = model.shape, model.latent_shape
    _law(model.identity, f"{name} has no identity: pairs could not be matched with their model.")
    _law(
        not model.denoiser.training and not _trainable(model.denoiser),
        f"{name}'s denoiser is not frozen and in evaluation mode. Load it so.",
    )
    videos = small_videos(2, shape.frames, shape.height, shape.width)
    with _pure(name, videos):
        latents = model.encode_videos(videos)
        again = model.encode_videos(videos)
    _law(
        latents.shape == (2, *latent_shape),
        f"{name} encodes to {tuple(latents.shape[1:])} and says {latent_shape}.",
    )
    _law(latents.isfinite().all(), f"{name} encodes to latents that are not finite.")
    _law(
        torch.equal(latents, again),
        f"{name} encodes the same videos to other latents. Take the mean of the posterior.",
    )
    decoded = model.decode_videos(latents)
    _law(decoded.shape == videos.shape, f"{name} decodes to {tuple(decoded.shape[1:])}.")
    _law(_in_unit(decoded), f"{name} decodes to pixels outside [0, 1].")
    _check_diffusion(model, latents)
    _check_sampling(model, latents)
    covered = model.latent_frames(slice(0, shape.frames))
    _law(
        list(range(latent_shape[1]))[covered] == list(range(latent_shape[1])),
        f"{name}'s latent frames of all pixel frames are {covered}, not all of them.",
    )
    targets = model.lora_targets()
    missing = set(targets) - {module for module, _ in model.denoiser.named_modules()}
    _law(
        targets and not missing,
        f"{name} names no adapter targets, or some that its denoiser lacks: {sorted(missing)[:3]}.",
    )
    with _adapted(model) as policy:
        trained = {parameter.split(".lora_")[0] for parameter in _trainable(policy)}
        strays = {path for path in trained if not path.endswith(tuple(f".{t}" for t in targets))}
        _law(not strays, f"{name} trains {sorted(strays)[:3]}, which is not among its targets.")
    model.release()
    _law(
        torch.equal(model.encode_videos(videos), latents),
        f"{name} encodes the same videos to other latents after it was released.",
    )
    model.release()


def _check_diffusion(model: VideoModel, clean: Tensor) -> None:
    """Noise, target and prediction."""
    name = type(model).__name__
    levels = [model.sample_levels(64, Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    _law(
        levels[0].shape == (64,) and levels[0].device.type == "cpu",
        f"{name} does not draw levels one each, on the CPU.",
    )
    _law(
        torch.equal(levels[0], levels[1]) and not torch.equal(levels[0], levels[2]),
        f"{name}'s levels are not drawn from the generator, or not from it alone.",
    )
    noise, level = _noise(model, 2), levels[0][:2].to(model.device)
    context = model.encode_prompts(spread_captions(2))
    _law(
        context and all(len(value) == 2 for value in context.values()),
        f"{name}'s encoded prompts are not tensors with a first axis of one entry a prompt.",
    )
    with _pure(name, clean, noise, level), torch.no_grad():
        noisy = model.add_noise(clean, noise, level)
        target = model.target(clean, noise, level)
        prediction = model.predict(model.denoiser, noisy, level, context)
    for what, value in (("noisy latents", noisy), ("target", target), ("prediction", prediction)):
        _law(value.shape == clean.shape, f"{name}'s {what} have the shape {tuple(value.shape)}.")
        _law(value.isfinite().all(), f"{name}'s {what} are not finite.")
    alone = [model.add_noise(clean[i : i + 1], noise[i : i + 1], level[i : i + 1]) for i in (0, 1)]
    _law(_close(torch.cat(alone), noisy), f"{name} does not noise every video to its own level.")


def _check_sampling(model: VideoModel, clean: Tensor) -> None:
    name = type(model).__name__
    noise, context = _noise(model, 2), model.encode_prompts(spread_captions(2))
    with _pure(name, clean, noise):
        drawn = model.sample(context, noise, steps=2)
        again = model.sample(context, noise, steps=2)
    _law(
        drawn.shape == noise.shape and drawn.isfinite().all(),
        f"{name} draws latents of another shape, or such that are not finite.",
    )
    _law(torch.equal(drawn, again), f"{name} draws other videos from the same noise.")
    region = torch.zeros(2, 1, *noise.shape[2:], device=noise.device)
    region[..., : noise.shape[-1] // 2] = 1
    repainted = model.sample(context, noise, clean=clean, level=0.75, region=region, steps=4)
    outside = (region == 0).expand_as(clean)
    _law(
        torch.equal(repainted[outside], clean[outside]),
        f"{name} changes what lies outside the region.",
    )
    _law((repainted != clean)[~outside].any(), f"{name} repaints nothing inside the region.")
    alone = model.sample(context, noise, clean=clean, level=0.5, per_frame=True, steps=2)
    _law(alone.shape == noise.shape, f"{name} draws another shape frame by frame.")


# --- helpers ---------------------------------------------------------------------------------


def _law(holds: Any, sentence: str) -> None:
    if not holds:
        raise AssertionError(sentence)


@contextmanager
def _pure(name: str, *inputs: Tensor) -> Iterator[None]:
    """Inside, nothing may write to the inputs or draw from the global generator."""
    copies = [value.detach().clone() for value in inputs]
    state = torch.get_rng_state()
    yield
    _law(
        all(torch.equal(value, copy) for value, copy in zip(inputs, copies, strict=True)),
        f"{name} writes to what it was given. Work on copies.",
    )
    _law(
        torch.equal(state, torch.get_rng_state()),
        f"{name} draws from torch's global generator. A resumed run would not repeat it.",
    )


@contextmanager
def _adapted(model: VideoModel) -> Iterator[PeftModel]:
    """The model's denoiser with a small adapter on it; off again afterwards."""
    state = torch.get_rng_state()
    policy = adapt(model, TrainSettings(rank=2, alpha=4), seed=0)
    try:
        yield policy
    finally:
        policy.unload()
        torch.set_rng_state(state)


def _move(policy: PeftModel, seed: int) -> None:
    """What a training step does to the adapter, only more of it."""
    generator = Generator().manual_seed(seed)
    for name, parameter in policy.named_parameters():
        if ".lora_B" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator).to(parameter)


def _trainable(network: nn.Module) -> list[str]:
    return [name for name, parameter in network.named_parameters() if parameter.requires_grad]


def _noise(model: VideoModel, count: int) -> Float[Tensor, "b c f h w"]:
    generator = Generator().manual_seed(0)
    return torch.randn(count, *model.latent_shape, generator=generator).to(model.device)


def _random_clip(model: VideoModel) -> Clip:
    shape = model.shape
    video = small_videos(1, shape.frames, shape.height, shape.width)[0]
    return Clip(name="random", caption=spread_captions(1)[0], video=video)


def _one(errors: PairErrors, index: int) -> PairErrors:
    return PairErrors(**{k: v[index : index + 1] for k, v in vars(errors).items()})


def _same(one: Pair, other: Pair) -> bool:
    parts = ("first", "second", "preference", "region")
    return all(torch.equal(vars(one)[part], vars(other)[part]) for part in parts)


def _close(one: Tensor, other: Tensor, tolerance: float = 1e-4) -> bool:
    return torch.allclose(one, other, rtol=tolerance, atol=tolerance / 100)


def _in_unit(pixels: Tensor) -> bool:
    return bool(pixels.min() >= 0 and pixels.max() <= 1)
