"""The policy of the training, `generate`, `evaluate` and the export draw the same frames."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import SHAPE
from small_cogvideox import OPTIONS as COGVIDEOX
from small_wan import OPTIONS as WAN
from small_wan import save_small_wan
from torch import Tensor

import dpo_video as dv
from dpo_video.data.video_writer import video_bytes
from dpo_video.diffusion.initial_noise import initial_noise
from dpo_video.extensions import ExportedAdapter
from dpo_video.format.diffusers import Diffusers
from dpo_video.workflows.session import load_model

PROMPT = "a red square moving left slowly"
LEARNING_RATE = 0.1  # the adapter shows in every frame


@dataclass(frozen=True, kw_only=True)
class Trained:
    run: dv.Run
    backbone: Any
    precision: str

    def frames(self, run: dv.Run | None) -> Tensor:
        """The frames of `generate` with a run or the base model, `[F, H, W, 3]`."""
        options: Any = {"config": self.run.folder / "run.toml", "device": "cpu"}
        (video,) = dv.generate(run, prompt=PROMPT, **options)
        return video.video.permute(1, 2, 3, 0)


@pytest.fixture(
    scope="module",
    params=[
        ("animatediff", "no"), ("animatediff", "fp16"), ("animatediff", "bf16"),
        ("cogvideox", "fp16"), ("wan", "bf16"),
    ],
    ids="-".join,
)  # fmt: skip
def trained(
    request: pytest.FixtureRequest, small_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Trained:
    family, precision = request.param
    root = tmp_path_factory.mktemp(family)
    if family == "animatediff":
        size = {"frames": SHAPE.frames, "height": SHAPE.height, "width": SHAPE.width}
        backbone: Any = dv.backbone.AnimateDiff(model=str(small_folder), **size)
    elif family == "cogvideox":
        folder = request.getfixturevalue("small_cogvideox")
        backbone = dv.backbone.CogVideoX(model=str(folder), **COGVIDEOX)
    else:
        backbone = dv.backbone.Wan(model=str(save_small_wan(root / "wan")), **WAN)
    AcceleratorState._reset_state(reset_partial_state=True)
    run = dv.train(
        "jitter", backbone=backbone, prompt=PROMPT, count=1, loss="global", out=root / "run",
        set={"pairs.num_inference_steps": 1}, steps=2, gradient_accumulation_steps=1,
        warmup_steps=0, learning_rate=LEARNING_RATE, rank=2, validation_videos=1,
        report_to="none", mixed_precision=precision, device="cpu",
    )  # fmt: skip
    AcceleratorState._reset_state(reset_partial_state=True)
    return Trained(run=run, backbone=backbone, precision=precision)


def shown(path: Path) -> np.ndarray:
    with av.open(path) as file:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)])


def test_training_generate_and_evaluate_draw_the_same_frames(trained: Trained) -> None:
    ours = trained.frames(trained.run)
    assert (ours - trained.frames(None)).abs().mean() > 1e-3  # the adapter shows
    video, fps = ours.permute(3, 0, 1, 2), trained.backbone.fps
    while_training = trained.run.folder / "samples" / "step_000002" / "00.mp4"
    (trained.run.folder / "prompts.txt").write_text(f"{PROMPT}\na blue circle")
    trained.run.evaluate(
        prompts=trained.run.folder / "prompts.txt", num_prompts=2, batch_size=1, device="cpu",
        metrics=["frame_difference"],
    )  # fmt: skip
    evaluated = trained.run.folder / "evaluation" / "videos" / "000-tuned.mp4"
    assert evaluated.read_bytes() == video_bytes(video, fps)
    again = video_bytes(video, fps, max(1, 256 // ours.shape[1]))
    if trained.precision != "no":  # to the bit: no adapter is merged
        assert while_training.read_bytes() == again
    else:
        (trained.run.folder / "again.mp4").write_bytes(again)
        difference = shown(while_training).astype(float) - shown(trained.run.folder / "again.mp4")
        assert np.abs(difference).max() <= 3  # of 255: merged in another order, then encoded


def test_diffusers_draws_the_same_frames_with_the_exported_adapter(
    trained: Trained, tmp_path: Path
) -> None:
    trained.run.export("diffusers", tmp_path / "export", device="cpu")
    model = load_model(trained.run.config, torch.device("cpu"))
    context, noise = model.encode_prompts([PROMPT]), initial_noise(model, [0])
    spec = model.export_spec()
    assert spec is not None
    adapter = ExportedAdapter(
        name="", spec=spec, updates={key: {} for key in spec.networks}, dtype=None, config=None
    )
    with Diffusers().loaded(tmp_path / "export", adapter):
        video = model.decode_videos(model.sample(context, noise))[0]
    theirs, ours = video.permute(1, 2, 3, 0), trained.frames(trained.run)
    effect = (ours - trained.frames(None)).abs().mean()
    # In half precision diffusers rounds the factors of the adapter.
    bound = {"no": 1e-4, "fp16": 0.05, "bf16": 0.1}[trained.precision]
    assert (theirs - ours).abs().mean() < bound * effect
