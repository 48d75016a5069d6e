"""Contract of listeners."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dpo_video.extensions import Listener, ListenerFactory, TrainingRun
from dpo_video.settings import TrainSettings
from dpo_video.strategies import VideoModel
from dpo_video.support.report import StepEvent, StepReport
from dpo_video.support.tensor_tree import load_state, save_state
from dpo_video.testing.contracts import check_options
from dpo_video.testing.laws import contract, law, pure
from dpo_video.testing.strided import StridedModel
from dpo_video.training.listeners import state_of
from dpo_video.training.lora import adapt

_STEPS = 60


@dataclass(kw_only=True)
class _Run(TrainingRun):
    """A training of which only the reports exist."""

    model: VideoModel
    policy: nn.Module
    settings: TrainSettings
    out: Path
    options: Mapping[str, Any] = field(default_factory=dict)
    step: int = 0
    is_main: bool = True
    ended: str = ""

    def end(self, reason: str) -> None:
        self.ended = self.ended or reason

    def take(self, listener: Listener, steps: int) -> None:
        """Tell a listener of steps whose margins grow, with a checkpoint after the last."""
        self.settings = self.settings.model_copy(update={"save_steps": steps})
        listener.on_train_begin(self)
        for _ in range(steps):
            if self.ended:
                break
            self.step += 1
            due = self.out / f"step_{self.step:06d}" if self.step % steps == 0 else None
            listener.on_step_end(StepEvent(report=_report(self.step), checkpoint=due))
            if due is not None:
                due.mkdir(parents=True)
                listener.on_checkpoint(due)


@contract
def check_listener(factory: ListenerFactory) -> None:
    """Check that a listener goes through a training, alone and resumed, and keeps its state."""
    check_options(factory)
    name, model = type(factory).__name__, StridedModel()
    policy = adapt(model, TrainSettings(rank=2, alpha=4), seed=0)

    def made() -> Listener:
        listener = factory()
        law(
            isinstance(listener, Listener),
            f"{name} makes a {type(listener).__name__}. Return a Listener.",
        )
        return listener

    with tempfile.TemporaryDirectory() as folder, pure(name, *policy.parameters()):

        def run(out: str, step: int = 0, ended: str = "") -> _Run:
            settings = TrainSettings(steps=_STEPS)
            return _Run(
                model=model, policy=policy, settings=settings, out=Path(folder, out), step=step,
                ended=ended,
            )  # fmt: skip

        whole, whole_run = made(), run("whole")
        whole_run.take(whole, _STEPS)
        first, first_run = made(), run("first")
        first_run.take(first, _STEPS // 2)
        save_state(Path(folder, "state.safetensors"), state_of(first))
        second, second_run = made(), run("second", first_run.step, first_run.ended)
        second.restore(load_state(Path(folder, "state.safetensors")))
        second_run.take(second, _STEPS // 2)
        for each in (whole, first, second):
            each.on_train_end()
        law(
            whole_run.step == second_run.step and whole_run.ended == second_run.ended,
            f"{name} ends a training at another step after a resume. Return all that changes by "
            "state, and take it over in restore.",
        )
        one, other = state_of(whole), state_of(second)
        law(
            one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one),
            f"{name} has another state after a resume. Return all that changes by state, and take "
            "it over in restore.",
        )


def _report(step: int) -> StepReport:
    """Figures of a loss that is satisfied step by step."""
    factor = 0.5 * (1 - step / _STEPS)
    return StepReport(
        step=step, loss=factor, margin=1e-4 * step, logits=0.1 * step, accuracy=1 - factor,
        chosen_change=-5e-5 * step, rejected_change=5e-5 * step, gradient_factor=factor,
        rejected_dominant=0.0, grad_norm=1.0, lr=1e-4, pairs_per_second=1.0, memory_gib=1.0,
        seconds=float(step), eta_seconds=float(_STEPS - step),
    )  # fmt: skip
