"""An evaluation made of random numbers, with a training log and short videos."""

from __future__ import annotations

import io
import math

import av
import numpy as np

from dpo_video.evaluation.change import Witness
from dpo_video.evaluation.results import Evaluation
from dpo_video.evaluation.verdict import MetricResult, Role, judge_evaluation
from dpo_video.support.report import StepReport
from dpo_video.training.diagnosis import judge_training

FRAMES, FPS = 16, 8.0
# Other people's text, which can be anything.
HOSTILE = "</script><script>alert(1)</script> \"onerror='alert(2)' <img src=x onerror=alert(3)>"


def a_training(steps: int = 60, seed: int = 0) -> list[StepReport]:
    """Reports of a run that learns, with the noise of four pairs per step."""
    rng = np.random.default_rng(seed)
    reports = []
    for step in range(1, steps + 1):
        grown = 2 * (1 - math.exp(-(step - 1) / 40))
        logits = (grown + rng.normal(0, 0.5, 4)) if step > 1 else np.zeros(4)
        reports.append(
            StepReport(
                step=step,
                loss=float(np.log1p(np.exp(-logits)).mean()),
                margin=float(logits.mean()) / 2500,
                logits=float(logits.mean()),
                accuracy=float((logits > 0).mean()) if step > 1 else 0.5,
                chosen_change=-0.1 * float(logits.mean()) / 2500,
                rejected_change=0.9 * float(logits.mean()) / 2500,
                gradient_factor=float((1 / (1 + np.exp(logits))).mean()),
                rejected_dominant=0.25 * float(rng.integers(0, 3)),
                grad_norm=float(rng.lognormal(-1, 0.4)),
                lr=1e-4 * min(1, step / 10),
                pairs_per_second=3.1,
                memory_gib=1.4,
                seconds=1.3 * step,
                eta_seconds=1.3 * (steps - step),
            )
        )
    return reports


def with_witness(metric: MetricResult, factor: float) -> MetricResult:
    """A second measurement of a metric that reads `factor` times the first for the tuned model."""
    tuned = [factor * value for value in metric.tuned]
    return metric.model_copy(update={"witness": Witness.measured("DIS", metric.base, tuned)})


def an_evaluation(prompts: list[str], *, still: bool = False, seed: int = 1) -> Evaluation:
    """Base and tuned model on `prompts`: smoother, and with `still` also less motion.

    The warping error has a witness that agrees.
    """
    rng = np.random.default_rng(seed)
    n = len(prompts)
    warp = rng.lognormal(5, 0.35, n)
    difference = rng.lognormal(2, 0.25, n)
    motion = rng.lognormal(-3.2, 0.4, n)
    sharp = rng.normal(0.31, 0.05, n)
    match = rng.beta(8, 2, n)
    kept = 0.8 if still else 0.995
    metrics = (
        MetricResult.measured(
            "warp_error", list(warp), list(warp * rng.normal(0.74, 0.16, n)),
            unit="MSE, 0-255", higher_is_better=False, role=Role.TARGET,
        ),
        MetricResult.measured(
            "frame_difference", list(difference), list(difference * rng.normal(0.82, 0.1, n)),
            unit="0-255", higher_is_better=False, role=Role.TARGET,
        ),
        MetricResult.measured(
            "dynamic_degree", list(motion), list(motion * rng.normal(kept, 0.06, n)),
            unit="fraction of the diagonal", higher_is_better=True, role=Role.MOTION,
        ),
        MetricResult.measured(
            "sharpness", list(sharp), list(sharp * rng.normal(1.0, 0.04, n)),
            unit="", higher_is_better=True, role=Role.GUARD,
        ),
        MetricResult.measured(
            "caption_match", list(match), list(np.clip(match + rng.normal(0, 0.05, n), 0, 1)),
            unit="probability", higher_is_better=True, role=Role.GUARD,
        ),
    )  # fmt: skip
    metrics = (with_witness(metrics[0], 1.02), *metrics[1:])
    training = a_training()
    return Evaluation(
        name="runs/local-region",
        prompts=tuple(prompts),
        seeds=tuple(range(n)),
        frames=FRAMES,
        fps=FPS,
        metrics=metrics,
        min_prompts=8,
        verdict=judge_evaluation(metrics),
        training=tuple(training),
        training_verdict=judge_training(training, steps=60),
        command="dpo-video evaluate runs/local-region --set evaluate.num_prompts=47",
        run_toml='[loss]\nname = "region"\nbeta = 2500.0\n',
        versions={"dpo-video": "0.1.0", "torch": "2.13.0"},
        facts={"Frechet distance to 64 real clips": "base 41.2, tuned 40.7"},
    )


def encode(frames: np.ndarray) -> bytes:
    """An h264 mp4 of `F H W 3` uint8 frames."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=int(FPS))
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return buffer.getvalue()


def a_clip() -> bytes:
    """An mp4 in which a white area grows from left to right."""
    frames = np.zeros((FRAMES, 32, 32, 3), dtype=np.uint8)
    for index in range(FRAMES):
        frames[index, :, : 2 * index + 2] = 255
    return encode(frames)


def a_hostile_evaluation() -> Evaluation:
    """An evaluation with hostile text in every field that can hold other people's text."""
    prompts = ["a red circle moving left", HOSTILE, *(f"prompt {i}" for i in range(10))]
    return an_evaluation(prompts).model_copy(
        update={
            "name": HOSTILE,
            "command": HOSTILE,
            "run_toml": HOSTILE,
            "versions": {HOSTILE: HOSTILE},
            "facts": {HOSTILE: HOSTILE},
        }
    )
