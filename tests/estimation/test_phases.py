"""What is predicted besides the steps is what real tensors take, and what is freed stays freed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import SHAPE, load_small
from small_wan import OPTIONS, load_small_wan, save_small_wan

import dpo_video as dv
from dpo_video.backbone import animatediff
from dpo_video.backbone.animatediff import AnimateDiffModel
from dpo_video.data.pack import pack
from dpo_video.estimation.phases import Plan, predict_phases
from dpo_video.estimation.tracing import TraceCache
from dpo_video.memory.packed_weights import frozen_weights
from dpo_video.memory.peak import peak_bytes
from dpo_video.types import Videos
from dpo_video.workflows.config import resolve
from dpo_video.workflows.estimate import mode_of, predict
from dpo_video.workflows.session import load_model

CPU = torch.device("cpu")


def test_the_predicted_peaks_are_those_of_real_tensors(small_folder: Path) -> None:
    size = {"frames": SHAPE.frames, "height": SHAPE.height, "width": SHAPE.width}
    flags: dict[str, Any] = {f"backbone.{name}": value for name, value in size.items()}
    flags["backbone.model"] = str(small_folder)
    config = resolve(choices={"backbone": "animatediff"}, flags=flags)
    traces = TraceCache()
    (step,) = predict(config, alone=True, traces=traces).estimates
    plan = Plan(
        pairs=2, samples_per_pair=3, encodes=True, pair_steps=5, validation_videos=4, videos=6,
        batch_size=2, evaluation_steps=7,
    )  # fmt: skip
    phases = predict_phases(
        config.backbone, config.train, mode_of(config), step, plan, traces=traces
    )
    found = {phase.name: phase for phase in phases}
    model = load_small(small_folder)
    latents = torch.randn(1, *model.latent_shape)
    videos = torch.rand(1, 3, *size.values())

    def drop(result: Videos) -> None:
        pass

    decode = peak_bytes(lambda: drop(model.decode_videos(latents)), networks=[model.vae])
    encode = peak_bytes(lambda: drop(model.encode_videos(videos)), networks=[model.vae])
    assert found["evaluate: decode"].activations == decode.total - decode.weights
    assert found["build: encode"].activations == encode.total - encode.weights
    assert found["evaluate: decode"].flops == 2 * 6 * decode.flops
    assert found["build: decode"].flops == (2 * 3 + 2 * 2) * decode.flops
    one, two = found["build: sample"], found["evaluate: sample, 2 at a time"]
    assert one.flops / (2 * 3 * 5) == pytest.approx(two.flops / (6 * 7) / 2, rel=0.01)
    assert one.activations < two.activations < 2.5 * one.activations
    assert found["validation videos: sample"].weights > two.weights  # the optimizer's state


def test_frames_decoded_in_groups_are_the_same(
    small_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_small(small_folder)
    latents = torch.randn(2, *model.latent_shape)
    whole = model.decode_videos(latents)
    monkeypatch.setattr(animatediff, "_FRAMES_AT_ONCE", 3)
    torch.testing.assert_close(model.decode_videos(latents), whole)


def test_a_text_encoder_in_cpu_memory_gives_the_same_bits(tmp_path: Path) -> None:
    folder = save_small_wan(tmp_path / "wan")
    flags = {f"backbone.{name}": value for name, value in OPTIONS.items()}
    flags["backbone.model"] = str(folder)
    config = resolve(choices={"backbone": "wan"}, flags={**flags, "memory.text_encoder": "host"})
    model = load_model(config, CPU)
    plain = load_small_wan(folder)
    ours, theirs = (each.encode_prompts(["a red square"]) for each in (model, plain))
    assert torch.equal(ours["prompt_embeds"], theirs["prompt_embeds"])
    assert len(list(frozen_weights(model.text_encoder))) > 0
    assert next(frozen_weights(model.denoiser), None) is None
    tiled = load_small_wan(folder, tiling=True)
    assert tiled.vae.use_tiling and not plain.vae.use_tiling
    latents = torch.randn(1, *plain.latent_shape)
    assert tiled.decode_videos(latents).shape == plain.decode_videos(latents).shape


def test_a_training_on_finished_pairs_never_loads_the_text_encoder(
    small_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its validation videos take the encoded prompts and the negative one from the build."""
    size = {"frames": SHAPE.frames, "height": SHAPE.height, "width": SHAPE.width}
    backbone = dv.backbone.AnimateDiff(model=str(small_folder), negative_prompt="blur", **size)
    steps = {"pairs.num_inference_steps": 1}
    pairs = dv.build_pairs(
        "jitter", backbone=backbone, prompt="a dog", count=1, set=steps, out=tmp_path / "pairs",
        device="cpu",
    )  # fmt: skip
    assert list(pack(pairs, tmp_path / "packed"))

    def refuse(*_: object) -> None:
        raise AssertionError("the text encoder is loaded")

    monkeypatch.setattr(AnimateDiffModel, "encode_prompts", refuse)
    for name in ("pairs", "packed"):
        AcceleratorState._reset_state(reset_partial_state=True)
        run = dv.train(
            tmp_path / name, backbone=backbone, loss="global", out=tmp_path / f"run-{name}",
            steps=1, rank=2, gradient_accumulation_steps=1, validation_videos=1, report_to="none",
            mixed_precision="no", device="cpu",
        )  # fmt: skip
        assert (run.folder / "samples" / "step_000001" / "00.mp4").is_file()
