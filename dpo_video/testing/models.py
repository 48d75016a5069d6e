"""Contracts of references, backbones and the models that backbones load."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import islice

import torch
from peft import PeftModel
from torch import Generator, Tensor, nn

from dpo_video.settings import TrainSettings
from dpo_video.strategies import Backbone, Reference, ReferenceModel, VideoModel
from dpo_video.support.formatting import counted
from dpo_video.testing.contracts import check_options
from dpo_video.testing.inputs import latent_noise, small_videos
from dpo_video.testing.laws import close, contract, in_unit, law, pure
from dpo_video.tiny.scenes import spread_captions
from dpo_video.training.lora import adapt


@contract
def check_reference(reference: Reference, model: VideoModel) -> None:
    """Check that it starts as the policy does, leaves the policy as it was, and can be resumed.

    A reference without a state must always predict what the denoiser without an adapter does. The
    model has no adapter afterwards.
    """
    check_options(reference)
    name = type(reference).__name__
    noisy = latent_noise(model, 1)
    timestep = model.sample_timesteps(1, Generator().manual_seed(0)).to(model.device)
    context = model.encode_prompts(spread_captions(1))

    @torch.no_grad()
    def predicted(network: nn.Module) -> Tensor:
        return model.predict(network, noisy, timestep, context)

    bare = predicted(model.denoiser)

    def seen_by(handle: ReferenceModel) -> Tensor:
        with handle.network() as network:
            return predicted(network)

    with _adapted(model) as policy:
        reference_model = reference.attach(policy)
        if reference_model is None:
            return
        law(
            isinstance(reference_model, ReferenceModel),
            f"{name}.attach returns a {type(reference_model).__name__}, no ReferenceModel.",
        )
        law(
            reference_model.noise_draws is None or reference_model.noise_draws >= 1,
            f"{name} has {reference_model.noise_draws} noise_draws. Set None for a new draw per "
            "visit, or a number above 0.",
        )
        start = seen_by(reference_model)
        law(
            not reference.exact or torch.equal(start, bare),
            f"{name} does not predict what the policy does before its first step. Set exact False "
            "if it is meant to differ.",
        )
        for seed in (1, 2):  # the adapter after one step, and after two
            before = {key: value.clone() for key, value in reference_model.state().items()}
            predicts = seen_by(reference_model)
            _move(policy, seed)
            adapted, trainable = predicted(policy), _trainable(policy)
            law(
                torch.equal(seen_by(reference_model), predicts),
                f"{name} does not predict what the bare denoiser does. Remove the adapter and "
                "nothing else."
                if not before
                else f"{name} changes when the policy does. Change it in after_step alone.",
            )
            reached = False
            with suppress(_InterruptedError), reference_model.network():
                reached = True
                raise _InterruptedError
            law(reached, f"{name} does not run the body of its `with` block.")
            law(
                torch.equal(predicted(policy), adapted),
                f"The policy's predictions change after {name} was used. Restore the adapter, also "
                "after an error (try ... finally).",
            )
            law(
                _trainable(policy) == trainable,
                f"The set of trainable weights changes after {name} was used.",
            )
            reference_model.after_step()
            law(
                torch.equal(predicted(policy), adapted),
                f"{name}'s after_step changes the policy.",
            )
        moved = seen_by(reference_model)
        resumed = reference.attach(policy)
        assert resumed is not None
        resumed.restore({key: value.cpu() for key, value in reference_model.state().items()})
        law(
            torch.equal(seen_by(resumed), moved) or not (reference.exact or before),
            f"{name} does not predict the same after a resume. Return all that changes during a "
            "run by state, and take it over in restore.",
        )


class _InterruptedError(Exception):
    """An error inside the `with` block."""


@contract
def check_backbone(backbone: Backbone) -> None:
    """Check what a backbone declares without being loaded: guards, prompts and clips."""
    check_options(backbone)
    name = type(backbone).__name__
    guards = getattr(type(backbone), "guards", None)
    law(
        isinstance(guards, tuple) and all(isinstance(guard, str) for guard in guards),
        f"{name} does not define guards, a tuple of names of metrics.",
    )
    strays = backbone.training.keys() - TrainSettings.model_fields.keys()
    law(not strays, f"{name}.training sets {sorted(strays)}, which are not options of [train].")
    TrainSettings(**backbone.training)
    for count in (1, 47):
        prompts = backbone.prompts(count)
        law(
            len(prompts) == count and all(prompts),
            f"{name} does not give {counted(count, 'prompt')}.",
        )
    own = [backbone.clips(seed) for seed in (0, 0)]
    if own[0] is None or own[1] is None:
        return
    for clip, again in zip(islice(own[0], 2), islice(own[1], 2), strict=True):
        law(clip.caption and clip.video is not None, f"{name}'s clips lack a caption or a video.")
        if clip.video is not None and again.video is not None:
            law(torch.equal(clip.video, again.video), f"{name}'s clips depend on more than a seed.")
            law(in_unit(clip.video), f"{name}'s clips leave [0, 1].")


@contract
def check_backbone_model(model: VideoModel) -> None:
    """Check shapes, ranges, determinism, sampling in a region, and the adapter's targets."""
    name = type(model).__name__
    shape, latent_shape = model.shape, model.latent_shape
    law(
        model.identity,
        f"{name} has no identity, so that pairs could not be matched with their model.",
    )
    law(
        not model.denoiser.training and not _trainable(model.denoiser),
        f"{name}'s denoiser is not frozen and in evaluation mode.",
    )
    videos = small_videos(2, shape.frames, shape.height, shape.width)
    with pure(name, videos):
        latents = model.encode_videos(videos)
        again = model.encode_videos(videos)
    law(
        latents.shape == (2, *latent_shape),
        f"{name} encodes to {tuple(latents.shape[1:])}, and its latent_shape is {latent_shape}.",
    )
    law(latents.isfinite().all(), f"{name} encodes to latents that are not finite.")
    law(
        torch.equal(latents, again),
        f"{name} encodes the same videos to different latents. Use the mean of the posterior.",
    )
    decoded = model.decode_videos(latents)
    law(decoded.shape == videos.shape, f"{name} decodes to the shape {tuple(decoded.shape[1:])}.")
    law(in_unit(decoded), f"{name} decodes to pixels outside [0, 1].")
    _check_diffusion(model, latents)
    _check_sampling(model, latents)
    covered = model.latent_frames(slice(0, shape.frames))
    law(
        list(range(latent_shape[1]))[covered] == list(range(latent_shape[1])),
        f"{name}'s latent frames of all pixel frames are {covered}, not all of them.",
    )
    targets = model.lora_targets()
    missing = set(targets) - {module for module, _ in model.denoiser.named_modules()}
    law(
        targets and not missing,
        f"{name} has no adapter targets, or some that its denoiser lacks: {sorted(missing)[:3]}.",
    )
    with _adapted(model) as policy:
        trained = {parameter.split(".lora_")[0] for parameter in _trainable(policy)}
        strays = {path for path in trained if not path.endswith(tuple(f".{t}" for t in targets))}
        law(not strays, f"{name} trains {sorted(strays)[:3]}, which are not among its targets.")
    model.release()
    law(
        torch.equal(model.encode_videos(videos), latents),
        f"{name} encodes the same videos to different latents after release().",
    )
    model.release()


def _check_diffusion(model: VideoModel, clean: Tensor) -> None:
    """Check noise, target and prediction."""
    name = type(model).__name__
    timesteps = [model.sample_timesteps(64, Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    law(
        timesteps[0].shape == (64,) and timesteps[0].device.type == "cpu",
        f"{name} does not draw one timestep per sample on the CPU.",
    )
    law(
        torch.equal(timesteps[0], timesteps[1]) and not torch.equal(timesteps[0], timesteps[2]),
        f"{name}'s timesteps do not depend on the generator alone.",
    )
    noise, timestep = latent_noise(model, 2), timesteps[0][:2].to(model.device)
    context = model.encode_prompts(spread_captions(2))
    law(
        context and all(len(value) == 2 for value in context.values()),
        f"{name}'s encoded prompts are not tensors with one row per prompt.",
    )
    with pure(name, clean, noise, timestep), torch.no_grad():
        noisy = model.add_noise(clean, noise, timestep)
        target = model.target(clean, noise, timestep)
        prediction = model.predict(model.denoiser, noisy, timestep, context)
    for what, value in (("noisy latents", noisy), ("target", target), ("prediction", prediction)):
        law(value.shape == clean.shape, f"{name}'s {what} have the shape {tuple(value.shape)}.")
        law(value.isfinite().all(), f"{name}'s {what} are not finite.")
    with torch.no_grad():
        one = model.predict(
            model.denoiser, noisy[:1], timestep[:1], {k: v[:1] for k, v in context.items()}
        )
    law(
        close(one, prediction[:1], 1e-2),
        f"{name}'s prediction for a video depends on the other videos of its batch.",
    )
    one = torch.ones(2, 1, 1, 1, 1, device=clean.device)
    signal, scale = (model.add_noise(*each, timestep) for each in ((one, 0 * one), (0 * one, one)))
    law(
        close(signal * clean + scale * noise, noisy, 1e-3),
        f"{name}'s add_noise is not a sum of the latents and the noise, each times a factor of the "
        "timestep, or depends on the latents' size.",
    )
    alone = [
        model.add_noise(clean[i : i + 1], noise[i : i + 1], timestep[i : i + 1]) for i in (0, 1)
    ]
    law(
        close(torch.cat(alone), noisy),
        f"{name} does not add noise to every video at its own timestep.",
    )


def _check_sampling(model: VideoModel, clean: Tensor) -> None:
    name = type(model).__name__
    noise, context = latent_noise(model, 2), model.encode_prompts(spread_captions(2))
    with pure(name, clean, noise):
        drawn = model.sample(context, noise, num_inference_steps=2)
        again = model.sample(context, noise, num_inference_steps=2)
    law(
        drawn.shape == noise.shape and drawn.isfinite().all(),
        f"{name} samples latents of another shape, or some that are not finite.",
    )
    law(torch.equal(drawn, again), f"{name} samples different videos from the same noise.")
    region = torch.zeros(2, 1, *noise.shape[2:], device=noise.device)
    region[..., : noise.shape[-1] // 2] = 1
    repainted = model.sample(
        context, noise, clean=clean, strength=0.75, region=region, num_inference_steps=4
    )
    outside = (region == 0).expand_as(clean)
    law(
        torch.equal(repainted[outside], clean[outside]),
        f"{name} changes latents outside the region.",
    )
    law((repainted != clean)[~outside].any(), f"{name} changes nothing inside the region.")
    alone = model.sample(
        context, noise, clean=clean, strength=0.5, per_frame=True, num_inference_steps=2
    )
    law(alone.shape == noise.shape, f"{name} samples another shape with per_frame.")


@contextmanager
def _adapted(model: VideoModel) -> Iterator[PeftModel]:
    """The model's denoiser with a small adapter, removed afterwards."""
    state = torch.get_rng_state()
    policy = adapt(model, TrainSettings(rank=2, alpha=4), seed=0)
    try:
        yield policy
    finally:
        policy.unload()
        torch.set_rng_state(state)


def _move(policy: PeftModel, seed: int) -> None:
    """Move the adapter's weights, as a large training step would."""
    generator = Generator().manual_seed(seed)
    for name, parameter in policy.named_parameters():
        if ".lora_B" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator).to(parameter)


def _trainable(network: nn.Module) -> list[str]:
    return [name for name, parameter in network.named_parameters() if parameter.requires_grad]
