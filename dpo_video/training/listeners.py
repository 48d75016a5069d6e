"""What happens after every step of a training besides learning.

A listener's methods run in every process. A run's own listeners are called before its checkpoints
are written, which hold their states.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Self, final

from torch import Tensor, nn

from dpo_video.data.prompts import negative_option
from dpo_video.data.video_writer import write_video
from dpo_video.diffusion.initial_noise import initial_noise
from dpo_video.errors import TrainingError
from dpo_video.extensions import Listener, ListenerFactory
from dpo_video.registry import name_of
from dpo_video.registry.returned import decoded, wrong
from dpo_video.strategies import VideoModel
from dpo_video.support.atomic import sync, writing
from dpo_video.support.report import StepEvent
from dpo_video.training.checkpoint import drop_checkpoints, write_checkpoint, write_start
from dpo_video.training.loop import Run
from dpo_video.training.run_dir import (
    LOG,
    START,
    checkpoint_folder,
    resume_command,
    truncate_log,
)
from dpo_video.training.trackers import log_video
from dpo_video.types import Context, Latents, Prompt


def saving(run: Path) -> AbstractContextManager[None]:
    """`writing` to a run that has started, whose command would be refused a second time."""
    return writing(run, f"resume: {resume_command(run)}")


@dataclass(frozen=True, kw_only=True)
class EncodedPrompt:
    """A prompt with its encoding, on the CPU."""

    prompt: Prompt
    context: Context

    @classmethod
    def of(cls, prompt: Prompt, model: VideoModel) -> Self:
        """Encode a prompt; it loads the text encoder."""
        context = model.encode_prompts([prompt.text])
        return cls(prompt=prompt, context={name: value.cpu() for name, value in context.items()})


def named(listeners: Sequence[Listener | ListenerFactory]) -> dict[str, Listener]:
    """The listeners, by a name that is the same when the run is resumed.

    Raises:
        PluginError: if a factory makes something else.
    """
    found: dict[str, Listener] = {}
    for each in listeners:
        if isinstance(each, Listener):
            listener, name = each, f"{type(each).__module__}.{type(each).__qualname__}"
        else:
            listener, name = each(), name_of(each)
            if not isinstance(listener, Listener):
                raise wrong(each, f"makes a {type(listener).__name__}, no Listener")
        same = sum(other.partition("#")[0] == name for other in found)
        found[f"{name}#{same}" if same else name] = listener
    return found


@final
class SkipLimit(Listener):
    """Ends a run with more than `train.skips` steps that were not finite."""

    run: Run

    def on_step_end(self, event: StepEvent) -> None:
        """Raise a TrainingError if this step is one too many."""
        report, skipped, limit = event.report, self.run.state.skipped, self.run.settings.skips
        if report.skipped and skipped > limit:
            raise TrainingError(
                f"Step {report.step} is not finite (loss {report.loss}, gradient norm "
                f"{report.grad_norm}); its pairs were {', '.join(event.nonfinite_pairs)}. Steps "
                f"that were not finite so far: {skipped}; train.skips allows {limit}. The last "
                "checkpoint is valid. Lower train.learning_rate, or check those pairs."
            )


@final
class LogWriter(Listener):
    """Appends every report to log.jsonl."""

    run: Run

    def on_train_begin(self, run: Run) -> None:  # type: ignore[override]
        """Remove the steps after the checkpoint that the run starts from."""
        self.run, self._path = run, run.out / LOG
        if run.accelerator.is_main_process:
            with saving(run.out):
                run.out.mkdir(parents=True, exist_ok=True)
                truncate_log(self._path, run.state.step)

    def on_step_end(self, event: StepEvent) -> None:
        """Append the report."""
        if self.run.accelerator.is_main_process:
            with saving(self.run.out), self._path.open("a", encoding="utf-8") as file:
                file.write(event.report.model_dump_json() + "\n")


@final
class CheckpointWriter(Listener):
    """Writes the checkpoints that are due and one when the run is stopped; deletes old ones."""

    def __init__(self, listeners: Mapping[str, Listener] | None = None) -> None:
        """Take the run's own listeners, whose states are saved and who are told."""
        self._listeners = listeners or {}

    run: Run

    def on_train_begin(self, run: Run) -> None:  # type: ignore[override]
        """Delete what a run that was stopped meanwhile has left."""
        self.run = run
        self._saved = run.state.step
        if run.accelerator.is_main_process:
            with saving(run.out):
                if run.settings.init_from is not None and not run.state.step:
                    write_start(run.out / START, run.policy)
                drop_checkpoints(run.out, run.state.step, run.settings.save_total_limit)

    def on_step_end(self, event: StepEvent) -> None:
        """Write the checkpoint that `event` names."""
        if event.checkpoint is not None:
            self._save()

    def on_train_end(self) -> None:
        """Save the steps since the last checkpoint."""
        if self.run.state.step > self._saved:
            self._save()

    def _save(self) -> None:
        run = self.run
        run.accelerator.wait_for_everyone()
        self._saved = run.state.step
        folder = checkpoint_folder(run.out, run.state.step)
        if run.accelerator.is_main_process:
            self._write(folder)
        for listener in self._listeners.values():
            listener.on_checkpoint(folder)

    def _write(self, folder: Path) -> None:
        run = self.run
        states = {name: each for name, one in self._listeners.items() if (each := state_of(one))}
        with saving(run.out):
            if (run.out / LOG).exists():
                sync(run.out / LOG)
            write_checkpoint(
                folder,
                run.policy,
                run.optimizer,
                run.state,
                run.fingerprint,
                run.accelerator.scaler,
                run.options,
                run.reference_model,
                states,
            )
            drop_checkpoints(run.out, run.state.step, run.settings.save_total_limit)


def state_of(listener: Listener) -> dict[str, Tensor]:
    """What checkpoints hold of a listener.

    Raises:
        PluginError: if it is not a dict of tensors.
    """
    state = listener.state()
    if not isinstance(state, Mapping) or not all(isinstance(v, Tensor) for v in state.values()):
        raise wrong(listener, "returns a state that is not a dict of tensors")
    return dict(state)


@final
class ValidationVideos(Listener):
    """Samples videos at every checkpoint, with prompts and seeds that never change."""

    run: Run

    def __init__(self, prompts: Sequence[EncodedPrompt] = ()) -> None:
        """Take prompts for the videos; by default those of the first pairs."""
        self._prompts = prompts

    def on_train_begin(self, run: Run) -> None:  # type: ignore[override]
        """Sample those of a run that was stopped after its checkpoint and before its videos."""
        self.run = run
        step = run.state.step
        self._count = min(run.settings.validation_videos, len(self._prompts or run.store))
        found = len(list(self._folder(step).glob("*.mp4")))
        run.accelerator.wait_for_everyone()
        if step and run.saves_after(step) and found < self._count:
            self._sample(step)

    def on_step_end(self, event: StepEvent) -> None:
        """Sample after a checkpoint."""
        if event.checkpoint is not None and self._count:
            self._sample(event.report.step)

    def _folder(self, step: int) -> Path:
        return self.run.out / "samples" / checkpoint_folder(self.run.out, step).name

    def _sample(self, step: int) -> None:
        run, model = self.run, self.run.model
        # The policy itself would run under autocast. Evaluations and other programs do not.
        denoiser = run.policy.get_base_model()
        main = run.accelerator.is_main_process
        # Processes that share the weights sample together; one of them decodes and writes.
        if main or run.memory.shard > 1:
            with saving(run.out):
                for index in range(self._count):
                    latents = self._latents(index, denoiser)
                    if main:
                        video = decoded(model, latents)[0].cpu()
                        scale = max(1, 256 // model.shape.height)
                        path = self._folder(step) / f"{index:02d}.mp4"
                        write_video(path, video, model.shape.fps, scale)
                        log_video(
                            run.accelerator, f"validation/{index:02d}", path, video,
                            fps=model.shape.fps, caption=self._caption(index), step=step,
                            scale=scale,
                        )  # fmt: skip
                model.release()
        run.accelerator.wait_for_everyone()

    def _caption(self, index: int) -> str:
        if self._prompts:
            return self._prompts[index].prompt.text
        return self.run.store.records[index].prompt

    def _latents(self, index: int, denoiser: nn.Module) -> Latents:
        run, model = self.run, self.run.model
        if not self._prompts:
            context = run.store.batch([index]).to(model.device).context
            return model.sample(context, initial_noise(model, [index]), denoiser=denoiser)
        encoded = self._prompts[index]
        prompt = encoded.prompt
        return model.sample(
            {name: value.to(model.device) for name, value in encoded.context.items()},
            initial_noise(model, [index if prompt.seed is None else prompt.seed]),
            denoiser=denoiser,
            **negative_option(prompt.negative_prompt),
        )


@final
class TrackerLogger(Listener):
    """Logs every report to the trackers of `train.report_to`, under TRL's names."""

    run: Run

    def on_step_end(self, event: StepEvent) -> None:
        """Log the report."""
        with saving(self.run.out):
            self.run.accelerator.log(event.report.tracked(), step=event.report.step)
