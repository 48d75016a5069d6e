"""The training loop: Diffusion-DPO (Wallace et al. 2023, arXiv 2311.12908) on pairs of videos.

Every step:

1. draws pairs, and one noise and one timestep per pair, the same for both videos (sampler.py);
2. predicts both videos with the reference, then with the policy, and squares the errors of the
   predictions (objective.py);
3. computes the loss of these errors and its gradient (loss/, step.py);
4. updates the adapter (optimizer/), at the learning rate of the step (schedule/);
5. yields a report (meter.py), which listeners log and save (listeners.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from peft import PeftModel
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from dpo_video.data.store import PairStore
from dpo_video.extensions import Schedule, TrainingRun
from dpo_video.settings import MemorySettings, TrainSettings
from dpo_video.strategies import ReferenceModel, VideoModel
from dpo_video.support.report import StepEvent
from dpo_video.support.rng import global_states, set_global_states
from dpo_video.training.checkpoint import RunFingerprint, TrainState
from dpo_video.training.meter import Meter, check_first_step, nonfinite_pairs
from dpo_video.training.objective import PairFigures
from dpo_video.training.optimizer import LossScaling, learning_rate
from dpo_video.training.run_dir import checkpoint_folder
from dpo_video.training.sampler import PairSampler
from dpo_video.training.step import Step


@dataclass(kw_only=True)
class Run(TrainingRun):
    """The parts of a run that its loop and its listeners share."""

    model: VideoModel
    store: PairStore
    policy: PeftModel
    """The denoiser with its adapter."""
    network: nn.Module
    """The policy as Accelerate has prepared it."""
    optimizer: Any
    settings: TrainSettings
    memory: MemorySettings
    accelerator: Accelerator
    out: Path
    fingerprint: RunFingerprint
    options: Mapping[str, Any]
    """The run's options by path, for the checkpoints."""
    reference_model: ReferenceModel | None = None
    starts_as_reference: bool = True
    """Whether policy and reference must predict the same at the first step."""
    state: TrainState = TrainState()  # noqa: RUF009 - it is frozen
    seconds: float = 0.0
    """Seconds of training before this process resumed it."""
    ended: str = ""
    """Why a listener has ended the run; "" if none has."""

    @property
    def step(self) -> int:
        """Number of optimizer steps done."""
        return self.state.step

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes files."""
        return self.accelerator.is_main_process

    def end(self, reason: str) -> None:
        """End the run after this step; `reason` is a sentence for the user."""
        self.ended = self.ended or reason

    def saves_after(self, step: int) -> bool:
        """Whether a checkpoint is due after so many steps."""
        return step % self.settings.save_steps == 0 or step == self.settings.steps


def optimize(
    run: Run,
    sampler: PairSampler,
    gradient: Step,
    schedule: Schedule,
    stop: Callable[[int], bool],
) -> Iterator[StepEvent]:
    """Train to the last step; `stop`, called before every pass of a step, ends the run early.

    A step that is stopped, or whose loss or gradient is not finite, changes nothing.
    """
    settings, accelerator, optimizer = run.settings, run.accelerator, run.optimizer
    parameters = [p for p in run.policy.parameters() if p.requires_grad]
    meter = Meter(
        accelerator, run.state.step, settings.steps, run.seconds,
        compares=gradient.loss.compares, reference=gradient.reference_model is not None,
    )  # fmt: skip
    scaling = LossScaling(accelerator)
    passes = settings.gradient_accumulation_steps
    averages = isinstance(run.network, DistributedDataParallel) and gradient.mode == "joint"
    for step in range(run.state.step, settings.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(schedule, settings, step)
        meter.start_step()
        generators = global_states()
        parts: list[PairFigures] = []
        keys: list[str] = []

        for index, pairs in enumerate(sampler.inputs(step)):  # one noise and timestep per pair
            if stop(index):
                optimizer.zero_grad()
                set_global_states(generators)
                return
            # Modes with several backward passes per batch average the gradients afterwards.
            averaged = averages and index == passes - 1
            with nullcontext() if averaged else accelerator.no_sync(run.network):
                parts.append(
                    gradient(  # reference, policy, errors, loss, backward
                        pairs.batch,
                        pairs.noise,
                        pairs.timestep,
                        reference_prediction=pairs.reference_prediction,
                        weight=pairs.weight,
                        loss_scale=1 / passes,
                        progress=step / settings.steps,
                    )
                )
            keys += pairs.batch.keys
        if not averages:
            gradient.average(accelerator)

        figures = PairFigures.cat(parts)
        grad_norm = float(accelerator.clip_grad_norm_(parameters, settings.max_grad_norm))
        report = meter.report(step + 1, figures, grad_norm, optimizer.param_groups[0]["lr"])
        finite, nonfinite = math.isfinite(report.loss), list[str]()
        if step == 0 and finite and run.starts_as_reference:
            check_first_step(figures)
        if finite and scaling.accepts(grad_norm):
            optimizer.step()
            if run.reference_model is not None:
                run.reference_model.after_step()
        else:
            nonfinite = nonfinite_pairs(figures, keys, report, accelerator)
            scaling.skip()
            report = report.model_copy(update={"skipped": True})
        optimizer.zero_grad()

        run.state = TrainState(
            step=step + 1,
            position=sampler.position(step + 1),
            skipped=run.state.skipped + report.skipped,
        )
        saved = checkpoint_folder(run.out, step + 1) if run.saves_after(step + 1) else None
        yield StepEvent(report=report, checkpoint=saved, nonfinite_pairs=nonfinite)
