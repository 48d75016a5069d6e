"""Predicted memory and time of a run in every memory mode, and how they are shown."""

from __future__ import annotations

from html import escape
from typing import Any, Literal, final

from rich.table import Table

from dpo_video.estimation.modes import MemoryMode
from dpo_video.estimation.tiers import Tier, tiers
from dpo_video.support.formatting import cell, html_table
from dpo_video.support.statistics import Record

GIB = 2**30
# Assumptions.
FRAGMENTS = 0.05  # fraction of the activations that the caching allocator loses to fragmentation
CONTEXT = 0.6 * GIB  # CUDA's own context, kernels and libraries' workspaces
NOT_COMPILED = (
    "Predicted without memory.compile: compiled blocks may keep more or less for their backward "
    "pass."
)


def _by_size() -> list[Tier]:
    """The cards, smallest first, and those of one size (in whole GiB) by speed."""
    return sorted(tiers().values(), key=lambda each: (round(each.memory_gib), each.tflops))


def _count(parameters: int) -> str:
    """In billions or millions."""
    return f"{parameters / 1e9:.2f} B" if parameters >= 1e9 else f"{parameters / 1e6:.1f} M"


@final
class MemoryEstimate(Record):
    """Predicted peak memory of a step in one mode, in bytes, and its operations."""

    mode: MemoryMode
    fresh: bool
    """Whether every visit to a pair draws new noise. False for a cached reference."""
    weights: int
    """Bytes of the denoiser, its adapter, and the reference where it has its own weights."""
    gradients: int
    """Bytes of the adapter's gradients."""
    optimizer: int
    """Bytes of AdamW's state."""
    activations: int
    """Bytes of all other tensors."""
    flops: int
    """Operations per pair, forward and backward, reference included."""
    host: int = 0
    """Bytes in CPU memory."""

    @property
    def tensors(self) -> int:
        """Bytes of all tensors: what torch.cuda.max_memory_allocated would report."""
        return self.weights + self.gradients + self.optimizer + self.activations

    @property
    def total(self) -> int:
        """Bytes of GPU memory required: tensors, fragmentation and CUDA's context."""
        return round(self.tensors + FRAGMENTS * self.activations + CONTEXT)

    def fits(self, tier: Tier) -> bool:
        """Whether a card holds it."""
        return self.total <= tier.memory_gib * GIB

    def seconds(self, tflops: float, efficiency: float) -> float:
        """Seconds per pair on a card of `tflops` 10^12 operations per second."""
        return self.flops / (tflops * 1e12 * efficiency)


@final
class PhaseEstimate(Record):
    """Predicted peak memory of a part of a run besides its steps, in bytes, and its operations."""

    name: str
    """Such as "evaluate: decode"."""
    weights: int
    """Bytes of the networks on the device, and of the optimizer's state during a training."""
    activations: int
    """Bytes of all other tensors."""
    flops: int
    """Operations of the whole part."""

    @property
    def total(self) -> int:
        """Bytes of GPU memory required: tensors, fragmentation and CUDA's context."""
        return round(self.weights + (1 + FRAGMENTS) * self.activations + CONTEXT)

    def fits(self, tier: Tier) -> bool:
        """Whether a card holds it."""
        return self.total <= tier.memory_gib * GIB

    def hours(self, tier: Tier, efficiency: float) -> float:
        """Hours on a card, at that share of its published speed."""
        return self.flops / (tier.tflops * 1e12 * efficiency) / 3600


@final
class Estimate(Record):
    """Predicted memory and time of a run, mode by mode. Nothing in it was measured."""

    predicted: Literal[True] = True
    model: str
    """Name of the model."""
    parameters: int
    """Parameters of the denoiser."""
    trainable: int
    """Parameters of the adapter."""
    rank: int
    """LoRA rank."""
    latent_shape: tuple[int, int, int, int]
    """`(c, f, h, w)` of one video."""
    blocks: int
    """Number of blocks of a forward pass that can be checkpointed."""
    precision: str
    pairs: int
    """Pairs that the run visits: steps x accumulation x batch size."""
    estimates: tuple[MemoryEstimate, ...]
    phases: tuple[PhaseEstimate, ...] = ()
    """Everything besides the steps: building pairs, validation videos, an evaluation."""
    work: str = ""
    """The numbers of videos and sampling steps of the phases."""
    remedies: tuple[tuple[str, str], ...] = ()
    """What the configuration could still do against a phase that is too large: a part of such a
    phase's name, and the advice."""
    asked: MemoryMode | None = None
    """The mode that the configuration asks for."""
    tier: Tier | None = None
    """The card that it is for."""
    efficiency: float
    """Fraction of a card's published operations per second that a step reaches (assumed)."""
    within_budget: bool = True
    """False if no number of checkpointed blocks fits `memory.budget` (checkpointing=auto)."""
    compiled: bool = False
    """Whether the run compiles its blocks, which the prediction ignores."""

    def for_mode(self, mode: MemoryMode) -> MemoryEstimate | None:
        """The estimate of a mode; None if it was not predicted."""
        return next((each for each in self.estimates if each.mode == mode), None)

    def hours(self, estimate: MemoryEstimate, tier: Tier) -> float:
        """Hours of the run's steps in that mode on a card; nothing else is counted."""
        return self.pairs * estimate.seconds(tier.tflops, self.efficiency) / 3600

    def best(self, memory: float) -> MemoryEstimate | None:
        """The fastest mode with fresh noise that fits into `memory` bytes; None if none does.

        Modes that change the numbers (quantization) come last; among equally fast modes those that
        use CPU memory do.
        """
        fitting = [each for each in self.estimates if each.fresh and each.total <= memory]
        return min(
            fitting,
            key=lambda each: (each.mode.quantization != "native", each.flops, each.host),
            default=None,
        )

    @property
    def fits(self) -> bool | None:
        """Whether the mode asked for and all phases fit the card; None without a card or mode."""
        asked = self._asked
        if self.tier is None or asked is None:
            return None
        return asked.fits(self.tier) and not self._too_large

    @property
    def _too_large(self) -> list[PhaseEstimate]:
        """The phases that do not fit the card."""
        return [] if self.tier is None else [p for p in self.phases if not p.fits(self.tier)]

    @property
    def recommended(self) -> MemoryEstimate | None:
        """The best mode on the card; None without a card or if no mode fits."""
        return self.best(self.tier.memory_gib * GIB) if self.tier else None

    @property
    def _asked(self) -> MemoryEstimate | None:
        return self.for_mode(self.asked) if self.asked else None

    @property
    def _shown(self) -> Tier:
        """The card of the column of hours: the named one, or the fastest."""
        return self.tier or list(tiers().values())[-1]

    # --- as data ---------------------------------------------------------------------------------

    def rows(self) -> list[dict[str, Any]]:
        """One flat dict per mode, for `pandas.DataFrame(estimate.rows())`.

        Memory is in GiB, `tflop` in 10^12 operations per pair, `hours` on the card of `tier` (the
        fastest known card if there is none). `fits_from` names the smallest card that holds it.
        """
        cards = _by_size()
        rows = []
        for each in self.estimates:
            figures = ("total", "tensors", "weights", "gradients", "optimizer", "activations")
            rows.append(
                {
                    **each.mode.model_dump(exclude={"offload"}),
                    "offload": ",".join(each.mode.offload),
                    "mode": each.mode.brief(),
                    **{f"{name}_gib": getattr(each, name) / GIB for name in (*figures, "host")},
                    "tflop": each.flops / 1e12,
                    "hours": self.hours(each, self._shown),
                    "fresh": each.fresh,
                    "fits_from": next((card.name for card in cards if each.fits(card)), None),
                    "fits": each.fits(self.tier) if self.tier else None,
                    "asked": each.mode == self.asked,
                }
            )
        return rows

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON-ready data: bytes, operations, and hours and fit on every card."""
        cards = tiers().values()
        best = self.recommended

        def row(each: MemoryEstimate) -> dict[str, Any]:
            return {
                **each.model_dump(mode="json"),
                "tensors": each.tensors,
                "total": each.total,
                "fits": {card.name: each.fits(card) for card in cards},
                "hours": {card.name: self.hours(each, card) for card in cards},
            }

        assumed = {"efficiency": self.efficiency, "context": CONTEXT, "fragments": FRAGMENTS}
        own = {"estimates", "phases", "asked", "tier", "efficiency"}
        return {
            **self.model_dump(mode="json", exclude=own),
            "assumed": assumed,
            "tier": self.tier.name if self.tier else None,
            "asked": self.asked.model_dump(mode="json") if self.asked else None,
            "fits": self.fits,
            "recommended": best.mode.model_dump(mode="json") if best else None,
            "estimates": [row(each) for each in self.estimates],
            "phases": [
                {
                    **phase.model_dump(mode="json"),
                    "total": phase.total,
                    "fits": {card.name: phase.fits(card) for card in cards},
                    "hours": {card.name: phase.hours(card, self.efficiency) for card in cards},
                }
                for phase in self.phases
            ],
        }

    # --- for a person ----------------------------------------------------------------------------

    @property
    def headline(self) -> str:
        """What was predicted, in one sentence."""
        return (
            f"{self.model}: {_count(self.parameters)} parameters and an adapter of "
            f"{_count(self.trainable)} (LoRA rank {self.rank}), latents "
            f"{' x '.join(map(str, self.latent_shape))}, {self._precision}, "
            f"{self.pairs} pairs {self._of_a_process}in the run. All numbers are predicted on "
            "shapes; nothing was measured." + (f" {NOT_COMPILED}" if self.compiled else "")
        )

    @property
    def _of_a_process(self) -> str:
        return "of each process " if self.asked is not None and self.asked.shard > 1 else ""

    @property
    def _precision(self) -> str:
        own = "fp32 (train.mixed_precision=no)" if self.precision == "no" else self.precision
        return f"precision {own}"

    @property
    def legend(self) -> str:
        """What the columns of the table mean."""
        return (
            "mode: reference, checkpointed blocks, backward, /forward_chunks, cpu:c(heckpoints) "
            "b(locks) o(ptimizer) in CPU memory, xN processes that share the weights, quantization "
            "(int8 and nf4 change the numbers). GiB: GPU memory for weights, "
            "the adapter's gradients and AdamW state, activations plus "
            f"{FRAGMENTS:.0%} for fragmentation, and {CONTEXT / GIB:.1f} GiB for CUDA. CPU: GiB of "
            "CPU memory that the modes use, of each process. TFLOP: per pair. h: hours of the "
            f"run's steps at {self.efficiency:.0%} of the card's published speed (assumed), "
            "without transfers (on an H200, cpu:b added 15% on AnimateDiff and 44% on Wan). A "
            "cached reference is computed before training, and its noise draws repeat."
            + (f" Besides the steps: {self.work}." if self.work else "")
        )

    @property
    def verdict(self) -> str:
        """Whether the mode asked for fits the card, and which one to take."""
        asked = self._asked
        if self.tier is None:
            note = (
                "With these options the run trains in fp32; a card's presets set half precision. "
                if self.precision == "no"
                else ""
            )
            return f"{note}Name a card for a recommendation: --tier {'|'.join(tiers())}."
        parts = []
        if asked is not None:
            adapter = asked.gradients + asked.optimizer
            fits = "fits" if asked.fits(self.tier) else "does not fit"
            parts.append(
                f"The configured mode needs {asked.total / GIB:.1f} GiB (weights "
                f"{asked.weights / GIB:.1f}, adapter {adapter / GIB:.1f}, activations "
                f"{asked.activations / GIB:.1f}) and {fits} "
                f"{self.tier.card} ({self.tier.memory_gib:g} GiB)."
            )
        if asked is not None and self.phases:
            steps = self.hours(asked, self.tier)
            beside = sum(phase.hours(self.tier, self.efficiency) for phase in self.phases)
            parts.append(
                f"The run takes {steps + beside:,.1f} hours: {steps:,.1f} of steps and "
                f"{beside:,.1f} besides them."
            )
        if asked is not None and asked.mode.shard > 1:
            size = 4 if self.precision == "no" else 2
            parts.append(
                "Each process first reads the whole model into CPU memory: "
                f"{size * self.parameters / GIB:.1f} GiB of weights each."
            )
        if large := self._too_large:
            most = max(large, key=lambda phase: phase.total)
            parts.append(
                f"Besides the steps, {len(large)} of {len(self.phases)} parts do not fit; the "
                f"largest, {most.name}, needs {most.total / GIB:.1f} GiB."
            )
            names = " ".join(phase.name for phase in large)
            parts += dict.fromkeys(advice for part, advice in self.remedies if part in names)
        best = self.recommended
        if best is None:
            parts.append(
                "No mode fits. Lower backbone.frames, height or width, or train.rank; or choose a "
                "smaller model."
            )
        elif asked is None:
            parts.append(f"Recommended: {best.mode}.")
        elif best.mode != asked.mode and (not asked.fits(self.tier) or best.flops < asked.flops):
            other = best.mode.quantization != asked.mode.quantization
            note = " (it changes the numbers)" if other else ""
            parts.append(f"Recommended{note}: {best.mode.flags(asked.mode)}")
        return " ".join(parts)

    def _cells(self) -> tuple[list[str], list[list[str]]]:
        header = ["mode", "GiB", "CPU", "TFLOP", f"h ({self._shown.name})", "fits from"]
        cells = [
            [
                row["mode"],
                f"{row['total_gib']:.1f}",
                f"{row['host_gib']:.1f}" if row["host_gib"] else "",
                f"{row['tflop']:,.0f}",
                f"{row['hours']:,.1f}",
                row["fits_from"] or "none",
            ]
            for row in self.rows()
        ]
        return header, cells

    def table(self) -> Table:
        """The modes as a table for the terminal; the configured mode is bold."""
        header, cells = self._cells()
        table = Table(box=None, pad_edge=False, header_style="bold")
        for name in header:
            justify = "left" if name in ("mode", "fits from") else "right"
            table.add_column(name, justify=justify, no_wrap=True)  # type: ignore[arg-type]
        for each, row in zip(self.estimates, cells, strict=True):
            texts = [cell(text) for text in row]
            if self.tier is not None:
                texts[1].stylize("green" if each.fits(self.tier) else "red")
            table.add_row(*texts, style="bold" if each.mode == self.asked else "")
        return table

    def phase_table(self) -> Table:
        """Everything besides the steps, as a table for the terminal."""
        table = Table(box=None, pad_edge=False, header_style="bold")
        for name in ("besides the steps", "GiB", f"h ({self._shown.name})", "fits from"):
            left = name in ("besides the steps", "fits from")
            table.add_column(name, justify="left" if left else "right", no_wrap=True)
        cards = _by_size()
        for phase in self.phases:
            hours = phase.hours(self._shown, self.efficiency)
            memory = cell(f"{phase.total / GIB:.1f}")
            if self.tier is not None:
                memory.stylize("green" if phase.fits(self.tier) else "red")
            first = next((card.name for card in cards if phase.fits(card)), "none")
            time = cell(f"{hours:,.1f}" if phase.flops else "")
            table.add_row(cell(phase.name), memory, time, cell(first))
        return table

    def _repr_html_(self) -> str:
        table = html_table(*self._cells())
        return f"<p>{escape(self.headline)}</p>{table}<p>{escape(self.verdict)}</p>"
