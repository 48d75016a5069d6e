"""The training loop. It knows kinds and never names, prints nothing and yields reports."""

from __future__ import annotations

import math
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from jaxtyping import Float
from peft import PeftModel
from torch import Tensor, nn

from dpo_video.data.store import PairStore
from dpo_video.data.video import write_video
from dpo_video.diffusion.initial_noise import initial_noise
from dpo_video.errors import TrainingError
from dpo_video.memory.compile import check_compile
from dpo_video.memory.modes import apply_memory_modes
from dpo_video.memory.offload import HostAdamW
from dpo_video.settings import MemorySettings, TrainSettings
from dpo_video.strategies import Loss, Reference, ReferenceModel, VideoModel
from dpo_video.support.atomic import sync, writing
from dpo_video.support.hashing import tensors_digest
from dpo_video.support.rng import derive, generator, global_states, set_global_states
from dpo_video.training.checkpoint import (
    RunFingerprint,
    TrainState,
    drop_checkpoints,
    restore,
    sealed_count,
    write_checkpoint,
)
from dpo_video.training.diagnosis import StepReport
from dpo_video.training.lora import adapt
from dpo_video.training.objective import PairFigures
from dpo_video.training.reference_cache import (
    PairDraw,
    ReferenceCache,
    ReferenceCacheManifest,
    ReferenceCacheReport,
)
from dpo_video.training.run_dir import latest_checkpoint, truncate_log
from dpo_video.training.step import Step, check_backward
from dpo_video.types import Latents, PairBatch, PerPair

OVERFLOWS = 24  # steps in a row: a scale of 65536 is then far below any that a gradient needs
FIGURES = ("loss", "margin", "logits", "gradient_factor", "chosen_change", "rejected_change")


@dataclass(frozen=True, kw_only=True)
class Progress:
    """What the loop yields: a step was made; perhaps a checkpoint was written."""

    report: StepReport
    checkpoint: Path | None
    unsound: Sequence[str] = ()
    """The pairs whose loss was not finite, or all of the step's if only its gradient was not; the
    step was skipped then."""


class _StoppedError(Exception):
    """Somebody asked the run to stop, in the middle of a step."""


def train(
    model: VideoModel,
    store: PairStore,
    loss: Loss,
    reference: Reference,
    settings: TrainSettings,
    *,
    seed: int,
    out: Path,
    accelerator: Accelerator,
    memory: MemorySettings = MemorySettings(),  # noqa: B008 - it is frozen
    resume: bool = False,
    on_reference_cache: Callable[[ReferenceCacheReport], None] = lambda report: None,
    stop: Callable[[], bool] = lambda: False,
) -> Iterator[Progress]:
    """Train an adapter, one report per optimizer step.

    Pairs that are ties throughout are never drawn. The noise and level of every visit to a pair
    come from a generator of their own, so neither a resumption nor the number of processes changes
    them. With a reference that limits a pair's draws, its predictions are made first;
    `on_reference_cache` receives the progress.

    A step whose loss or gradient is not finite changes nothing and is counted. When `stop` says so,
    in any process, the steps made so far are saved and the loop ends: after the pass that it is
    in, or with several processes after the step.

    Raises:
        TrainingError: if the pairs are all ties or lack what the loss needs, if the loss does not
            suit `memory.backward`, if a block cannot be compiled, at a first step whose margin is
            not exactly 0, and when more than `settings.skips` steps were not finite.
        RunError: if there is nothing to resume, or the reference or the pairs have changed.
    """
    store.check_fits(model)
    if resume and (count := sealed_count(latest_checkpoint(out))) is not None:
        store = store.beginning(count)  # another run may have built more since
    check_backward(loss, memory)
    check_compile(memory, accelerator.device)
    pairs = _usable(store, loss)
    model.release()  # what encoded the pairs
    bare = adapt(model, settings, seed)
    identity = _identity(model, store, bare, accelerator.mixed_precision)
    # adapt() has seeded torch; what a plugin draws of these two must not differ from run to run.
    random.seed(derive(seed, "python"))
    np.random.seed(derive(seed, "numpy") % 2**32)
    apply_memory_modes(bare, memory)
    reference_model = reference.attach(bare)
    if reference_model.noise_draws is not None and memory.shard > 1:
        raise TrainingError(
            "A reference whose predictions are made ahead is not for memory.shard: its processes "
            "would wait for each other at different pairs. Train with --reference toggle."
        )
    parameters = [p for p in bare.parameters() if p.requires_grad]
    adamw = HostAdamW if "optimizer" in memory.offload else torch.optim.AdamW
    optimizer = adamw(
        parameters,
        lr=settings.learning_rate,
        betas=settings.betas,
        weight_decay=settings.weight_decay,
    )
    policy, optimizer = accelerator.prepare(bare, optimizer)
    run = _Run(
        model, store, pairs, loss, reference_model, policy, settings, seed, accelerator, memory
    )
    if resume:
        run.at = restore(out, bare, optimizer, identity, accelerator.scaler)
        run.skipped = run.at.skipped
    start = run.at.step

    def save(step: int) -> Path:
        folder = out / "checkpoints" / f"step_{step:06d}"
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            with writing(out):
                if (out / "log.jsonl").exists():
                    sync(out / "log.jsonl")
                place = TrainState(step=step, place=run.place(step), skipped=run.skipped)
                write_checkpoint(folder, bare, optimizer, place, identity, accelerator.scaler)
                drop_checkpoints(out, step, settings.save_total_limit)
        return folder

    def draw_samples(name: str) -> None:
        # What processes hold together, they run together.
        if accelerator.is_main_process or memory.shard > 1:
            with writing(out):
                folder = out / "samples" / name if accelerator.is_main_process else None
                _draw_samples(model, bare, store, settings.validation_videos, folder)
        accelerator.wait_for_everyone()

    drawn = len(list((out / "samples" / f"step_{start:06d}").glob("*.mp4")))
    accelerator.wait_for_everyone()
    if start and run.saves_after(start) and drawn < min(settings.validation_videos, len(store)):
        draw_samples(f"step_{start:06d}")  # it was stopped between the checkpoint and them
    if start < settings.steps:
        try:
            run.fill_bank(_unless(stop, on_reference_cache))
        except _StoppedError:
            return
    if accelerator.is_main_process:
        with writing(out):
            out.mkdir(parents=True, exist_ok=True)
            truncate_log(out / "log.jsonl", start)
            drop_checkpoints(
                out, start, settings.save_total_limit
            )  # it was stopped while it did so
    started = time.monotonic()
    for step in range(start, settings.steps):
        for group in optimizer.param_groups:
            group["lr"] = _learning_rate(settings, step)
        began = time.monotonic()
        generators = global_states()
        try:
            outputs = run.accumulate(step, stop)
        except _StoppedError:
            optimizer.zero_grad()
            set_global_states(generators)
            if step > start:
                save(step)
            return
        norm = float(accelerator.clip_grad_norm_(parameters, settings.max_grad_norm))
        lr = optimizer.param_groups[0]["lr"]
        now = time.monotonic()
        left = (settings.steps - step - 1) * (now - started) / (step + 1 - start)
        report = _report(step + 1, outputs, norm, lr, now - began, now - started, left, accelerator)
        sound = math.isfinite(report.loss)
        if step == 0 and sound:
            _check_first_step(outputs)
        unsound: list[str] = []
        if sound and (run.overflows(norm) or math.isfinite(norm)):
            optimizer.step()  # under a loss scaler only where the gradient is finite
        else:
            unsound = run.skip(report, outputs)
            report = report.model_copy(update={"skipped": True})
        optimizer.zero_grad()
        if accelerator.is_main_process:
            with writing(out), (out / "log.jsonl").open("a", encoding="utf-8") as file:
                file.write(report.model_dump_json() + "\n")
        saved = None
        if run.saves_after(step + 1):
            saved = save(step + 1)
            draw_samples(saved.name)
        yield Progress(report=report, checkpoint=saved, unsound=unsound)


class _Run:
    """The parts of a run that every step needs."""

    def __init__(
        self,
        model: VideoModel,
        store: PairStore,
        pairs: list[int],
        loss: Loss,
        reference_model: ReferenceModel,
        policy: nn.Module,
        settings: TrainSettings,
        seed: int,
        accelerator: Accelerator,
        memory: MemorySettings,
    ) -> None:
        self.model, self.reference_model = model, reference_model
        self.store, self.pairs = store, pairs
        self.policy, self.settings, self.seed = policy, settings, seed
        self.accelerator = accelerator
        self.step = Step(
            model=model,
            policy=policy,
            reference_model=reference_model,
            loss=loss,
            mode=memory.backward,
            backward=accelerator.backward,
            autocast=accelerator.autocast,
        )
        self.keys: list[str] = []
        self.skipped = self._overflown = 0
        self.at = TrainState()
        """Where this process began."""
        # Reading is for the disk or the network to wait for, not for the step.
        self._reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="pairs")
        self._reading: Future[StepInputs] | None = None
        self.bank: ReferenceCache | None = None
        if reference_model.noise_draws is not None:
            with accelerator.main_process_first():
                manifest = ReferenceCacheManifest.of(
                    model,
                    seed,
                    accelerator.mixed_precision,
                    self.step.videos_at_once,
                    memory.forward_chunks,
                    compiled=memory.compile == "on",
                )
                self.bank = ReferenceCache(store, manifest)

    def fill_bank(self, on_progress: Callable[[ReferenceCacheReport], None]) -> None:
        """Make the predictions that the run will need, where the reference limits its draws."""
        if self.bank is None or self.reference_model.noise_draws is None:
            return
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        distinct = min(
            self.place(self.settings.steps), self.reference_model.noise_draws * len(self.pairs)
        )
        needed = [self._visit_at(place) for place in range(rank, distinct, world)]
        self.bank.fill(needed, self._predict_reference, on_progress)
        self.accelerator.wait_for_everyone()

    def saves_after(self, steps: int) -> bool:
        """Whether a checkpoint is due when so many steps are made."""
        return steps % self.settings.save_steps == 0 or steps == self.settings.steps

    def place(self, step: int) -> int:
        """The first place of a step, in the endless sequence of pairs."""
        world = self.accelerator.num_processes
        each = self.settings.gradient_accumulation_steps * self.settings.batch_size * world
        return self.at.place + (step - self.at.step) * each

    def accumulate(self, step: int, stop: Callable[[], bool]) -> list[PairFigures]:
        """The gradient of one optimizer step; the detached outputs of its forward passes.

        Raises:
            _StoppedError: when `stop` says so; among several processes before the first pass only,
                for none of them may wait for another that has gone.
        """
        outputs, self.keys = [], []
        alone = self.accelerator.num_processes == 1
        for part in range(self.settings.gradient_accumulation_steps):
            if (alone or part == 0) and self._agreed(stop()):
                raise _StoppedError
            drawn = self._next(step, part)
            self.keys += drawn.batch.keys
            last = part == self.settings.gradient_accumulation_steps - 1
            # A graph of its own a video is more than one backward pass a batch.
            shared = last and self.step.mode == "joint"
            with nullcontext() if shared else self.accelerator.no_sync(self.policy):
                outputs.append(
                    self.step(
                        drawn.batch,
                        drawn.noise,
                        drawn.timestep,
                        reference_prediction=drawn.reference_prediction,
                        loss_scale=1 / self.settings.gradient_accumulation_steps,
                    )
                )
        if self.step.mode != "joint":
            self._share_gradients()
        return outputs

    def _agreed(self, stopped: bool) -> bool:
        """Whether any process was asked to stop."""
        if self.accelerator.num_processes == 1:
            return stopped
        told = torch.tensor(float(stopped), device=self.accelerator.device)
        return bool(self.accelerator.reduce(told, reduction="sum"))

    def overflows(self, norm: float) -> bool:
        """Whether it is for the loss scaler to skip a gradient that is not finite.

        It meets some while it finds its scale. Call it once a step.
        """
        self._overflown = 0 if math.isfinite(norm) else self._overflown + 1
        return self.accelerator.scaler is not None and self._overflown <= OVERFLOWS

    def skip(self, report: StepReport, outputs: list[PairFigures]) -> list[str]:
        """Count a step that is not finite; the pairs that made it so, of all processes.

        Raises:
            TrainingError: if that is one too many.
        """
        losses = torch.cat([output.loss for output in outputs])
        unsound = [key for key, loss in zip(self.keys, losses, strict=True) if not loss.isfinite()]
        if math.isfinite(report.loss):
            unsound = self.keys
        if self.accelerator.num_processes > 1:
            unsound = gather_object(unsound)
        unsound = sorted(set(unsound))
        self.skipped += 1
        if self.skipped > self.settings.skips:
            raise TrainingError(
                f"Step {report.step} is not finite (loss {report.loss}, gradient norm "
                f"{report.grad_norm}); its pairs were {', '.join(unsound)}. Steps like it so far: "
                f"{self.skipped}; train.skips allows {self.settings.skips}. The last checkpoint is "
                "safe. Lower train.learning_rate, or check those pairs."
            )
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.update()  # it has seen the gradient already
        return unsound

    def _share_gradients(self) -> None:
        """The mean over all processes, where they were kept apart until now."""
        if self.accelerator.num_processes == 1:
            return
        for parameter in self.policy.parameters():
            if parameter.requires_grad:
                # A process may have used a part of the network that this one has not.
                own = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                parameter.grad = self.accelerator.reduce(own, reduction="mean")

    def _predict_reference(self, visit: PairDraw) -> Latents:
        drawn = self._sent(self._draw([visit]))
        return self.step.reference(drawn.batch, drawn.noise, drawn.timestep)

    def _next(self, step: int, part: int) -> StepInputs:
        """What a pass is made of, on the device; meanwhile, that of the pass after it is read."""
        following = (
            (step, part + 1)
            if part + 1 < self.settings.gradient_accumulation_steps
            else (step + 1, 0)
        )
        reading, self._reading = self._reading, None
        drawn = reading.result() if reading else self._read(step, part)
        if following[0] < self.settings.steps:
            self._reading = self._reader.submit(self._read, *following)
        return self._sent(drawn)

    def _sent(self, drawn: StepInputs) -> StepInputs:
        """On the run's device; the copy from pinned memory is not waited for."""
        device = self.accelerator.device
        return drawn.mapped(lambda tensor: tensor.to(device, non_blocking=True))

    def _read(self, step: int, part: int) -> StepInputs:
        visits = [self._visit_at(place) for place in self._places(step, part)]
        drawn = self._draw(visits)
        if self.bank is not None:
            drawn = replace(drawn, reference_prediction=self.bank.read(visits))
        return drawn.mapped(Tensor.pin_memory) if self.accelerator.device.type == "cuda" else drawn

    def _draw(self, visits: Sequence[PairDraw]) -> StepInputs:
        batch = self.store.batch([visit.pair for visit in visits])
        noises, timesteps = [], []
        for visit in visits:
            draw = generator(self.seed, "draw", visit.pair, visit.draw)
            noises.append(torch.randn(self.model.latent_shape, generator=draw))
            timesteps.append(self.model.sample_timesteps(1, draw))
        noise = torch.stack(noises).to(batch.first.dtype)
        return StepInputs(batch=batch, noise=noise, timestep=torch.cat(timesteps))

    def _places(self, step: int, part: int) -> list[int]:
        """Positions in the endless sequence of pairs that this process takes."""
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        size = self.settings.batch_size
        first = self.place(step) + (part * world + rank) * size
        return list(range(first, first + size))

    def _visit_at(self, place: int) -> PairDraw:
        """Epochs are permutations: every pair once before any comes again, with its next draw."""
        epoch, position = divmod(place, len(self.pairs))
        order = _permutation(len(self.pairs), self.seed, epoch)
        draw = (
            epoch
            if self.reference_model.noise_draws is None
            else epoch % self.reference_model.noise_draws
        )
        return PairDraw(self.pairs[order[position]], draw)


@dataclass(frozen=True, kw_only=True)
class StepInputs:
    """Pairs, and the noise and level of each."""

    batch: PairBatch
    noise: Latents
    timestep: PerPair
    reference_prediction: Float[Tensor, "2*b c f h w"] | None = None
    """The reference's predictions, where they were made before."""

    def mapped(self, change: Callable[[Tensor], Tensor]) -> StepInputs:
        """With every tensor changed."""
        return StepInputs(
            batch=self.batch.mapped(change),
            noise=change(self.noise),
            timestep=change(self.timestep),
            reference_prediction=None
            if self.reference_prediction is None
            else change(self.reference_prediction),
        )


@lru_cache(maxsize=2)
def _permutation(count: int, seed: int, epoch: int) -> list[int]:
    order: list[int] = torch.randperm(count, generator=generator(seed, "epoch", epoch)).tolist()
    return order


def _unless(
    stop: Callable[[], bool], then: Callable[[ReferenceCacheReport], None]
) -> Callable[[ReferenceCacheReport], None]:
    def told(report: ReferenceCacheReport) -> None:
        then(report)
        if stop():  # what the bank has, it keeps
            raise _StoppedError

    return told


def _identity(
    model: VideoModel, store: PairStore, policy: PeftModel, precision: str
) -> RunFingerprint:
    """What the run would be gone on with, here and now."""
    named = dict(policy.named_parameters())
    base = {str(p.dtype).removeprefix("torch.") for n, p in named.items() if ".lora_" not in n}
    return RunFingerprint(
        base=model.identity,
        adapter=tensors_digest({n: p for n, p in named.items() if ".lora_" in n})[:16],
        weights=" ".join(sorted(base)),
        precision=precision,
        pairs=store.digest,
        count=len(store),
        labels=store.labels_digest,
    )


def _usable(store: PairStore, loss: Loss) -> list[int]:
    """The pairs to draw from: all but those that are ties throughout."""
    if not len(store):
        raise TrainingError(f"'{store.where}' holds no pairs. Build some first.")
    if loss.needs_region and all(row.region_share == 1 for row in store.records):
        raise TrainingError(
            f"The pairs in '{store.where}' have no regions: their two videos may differ "
            "everywhere. Train them with --loss global, or build pairs that have regions "
            "(--pairs local)."
        )
    if pairs := store.decided():
        return pairs
    raise TrainingError(
        f"All {len(store)} pairs in '{store.where}' are ties, from which there is nothing to "
        f"learn. Label them (dpo-video label {store.where} --labeler NAME, then train with "
        "--labels NAME), or build them with a --labeler."
    )


def _learning_rate(settings: TrainSettings, step: int) -> float:
    """Up over the warm-up, flat, and down over the decay; the last step's is not 0 yet."""
    rising = (step + 1) / max(1, settings.warmup_steps)
    falling = (settings.steps - step) / max(1.0, settings.decay * settings.steps)
    return settings.learning_rate * min(1.0, rising, falling)


def _check_first_step(outputs: list[PairFigures]) -> None:
    margin = max(output.margin.abs().max().item() for output in outputs)
    if margin != 0:
        raise TrainingError(
            f"At step 0 the policy must equal the reference, but the margin is {margin:.3g}. The "
            "two are not run alike: check for dropout, other precision or other kernels in the "
            "backbone, or an adapter that does not start at zero. Where blocks are compiled, set "
            "memory.compile=off."
        )


def _report(
    step: int,
    outputs: list[PairFigures],
    grad_norm: float,
    lr: float,
    step_seconds: float,
    seconds: float,
    eta: float,
    accelerator: Accelerator,
) -> StepReport:
    """The figures of one step over the pairs of all processes; one host sync."""
    columns = torch.stack(
        [torch.cat([getattr(output, name) for output in outputs]).float() for name in FIGURES],
        dim=1,
    )
    loss, margin, logits, factor, chosen, rejected = accelerator.gather(columns).cpu().unbind(dim=1)
    return StepReport(
        step=step,
        loss=loss.mean().item(),
        margin=margin.mean().item(),
        logits=logits.mean().item(),
        accuracy=((margin > 0).float() + 0.5 * (margin == 0).float()).mean().item(),
        chosen_change=chosen.mean().item(),
        rejected_change=rejected.mean().item(),
        gradient_factor=factor.mean().item(),
        loser_dominant=((chosen > 0) & (rejected > chosen.abs())).float().mean().item(),
        grad_norm=grad_norm,
        lr=lr,
        pairs_per_second=len(loss) / step_seconds,
        memory_gib=_peak_memory(accelerator.device) / 2**30,
        seconds=seconds,
        eta_seconds=eta,
    )


def _peak_memory(device: torch.device) -> int:
    """Peak bytes: of the allocator on a GPU, of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _draw_samples(
    model: VideoModel,
    policy: nn.Module,
    store: PairStore,
    count: int,
    folder: Path | None,
) -> None:
    """A few videos with prompts and seeds that never change, to watch the policy change.

    Only a process that is given a folder decodes and writes them.
    """
    for i in range(min(count, len(store))):
        context = store.batch([i]).to(model.device).context
        latents = model.sample(context, initial_noise(model, [i]), denoiser=policy)
        if folder is not None:
            video = model.decode_videos(latents)[0].cpu()
            scale = max(1, 256 // model.shape.height)
            write_video(folder / f"{i:02d}.mp4", video, model.shape.fps, scale)
    model.release()
