"""A run's adapter in the files that other programs load.

Everything is written to a folder of another name, loaded back from there as those programs do it,
and compared with the run's own adapted denoiser by what it predicts. Only then it gets its name.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Self, final

import diffusers
import torch
from peft import PeftModel
from safetensors import SafetensorError
from torch import Tensor, nn

from dpo_video.diffusion.pretrained import weight_files
from dpo_video.errors import ExportError, RunError, UserError
from dpo_video.exporting.lora_formats import (
    Comfy,
    Diffusers,
    LoraDelta,
    LoraFormat,
    Peft,
    precision,
    read_delta,
    remove_adapter,
)
from dpo_video.strategies import VideoModel
from dpo_video.support.atomic import write_text, writing
from dpo_video.support.rng import generator
from dpo_video.training.checkpoint import load_adapter
from dpo_video.types import Context, ExportSpec, Latents

LAYER_TOLERANCE = 4.0
"""Rounding errors of the stored precision by which a layer's update may be off."""
SHARE_TOLERANCE = 0.02
"""Share of what the adapter changes in a prediction by which the exported one may be off."""
NOISE_TOLERANCE = 32.0
"""Rounding errors of the denoiser's precision by which a prediction may be off besides: the same
numbers, added in another order."""
_SUMS = 1e-5  # what the order of a sum in fp32 makes
_LEVELS = 16  # drawn; the highest and the lowest are tried, so that every expert is
_INPUTS = 8  # vectors that a layer's update is tried on
_DESCRIBING = {".json", ".txt", ".model"}


class Format(StrEnum):
    """Who is to load it."""

    DIFFUSERS = "diffusers"
    PEFT = "peft"
    COMFYUI = "comfyui"
    MERGED = "merged"


@dataclass(frozen=True, kw_only=True)
class Check:
    """How what was loaded back compares with the run's own adapted denoiser."""

    change: float
    """What the adapter changes in the denoiser's predictions, relative to them."""
    difference: float
    """How far the exported one's predictions are off, relative to them."""
    adapted: tuple[str, ...]
    """The networks that the adapter is on, by the pipeline's names."""


def export(
    model: VideoModel,
    adapter: Path,
    format: Format,
    out: Path,
    *,
    name: str,
    card: Callable[[ExportSpec, Check], str],
    reload: Callable[[Path], VideoModel],
    dtype: torch.dtype | None = None,
) -> Check:
    """Write an adapter, load it back, compare it, and only then call its folder `out`.

    Args:
        model: The base; not to be used afterwards.
        adapter: A folder in PEFT's format.
        format: Who is to load it.
        out: The new folder.
        name: What ComfyUI will list it as.
        card: Writes README.md, told how the comparison came out.
        reload: Loads the same backbone from another folder, for merged checkpoints.
        dtype: Of the stored weights; their own if None.

    Raises:
        ExportError: if the adapter is not finite, or what was written does not load back or
            predicts something else; nothing of it is left.
        RunError: if `out` exists, the adapter does not fit, or nobody else runs such models.
    """
    if out.exists():
        raise RunError(f"'{out}' exists already. Delete it, or name another folder with --out.")
    publication = model.publication()
    if publication is None:
        raise RunError(
            "No other program runs models of this backbone. In PEFT's format its adapter is "
            f"'{adapter}' already."
        )
    probe = _Probe.of(model)
    bare = probe.predict(model)
    policy = _adapted(model, adapter)
    wanted = probe.predict(model)
    if not wanted.isfinite().all():
        raise ExportError(
            f"What '{adapter}' predicts is not finite: its training has diverged. Export an "
            "earlier checkpoint (--checkpoint N)."
        )
    adapted = [name for name, network in publication.networks.items() if read_delta(network)]
    epsilon = _epsilon(model.denoiser, dtype, format)
    partial = out.with_name(f".partial-{out.name}")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        with writing(out):
            partial.mkdir(parents=True)
            if format is Format.MERGED:
                _write_merged(policy, publication, partial, dtype)
                for network in publication.networks.values():
                    network.to("meta")  # its memory is needed, and it is on the disk
                found = probe.predict(_reloaded(reload, partial))
            else:
                updates = _take_off(publication)
                layout = _layout(format, policy, name)
                layout.write(partial, publication, updates, dtype)
                found = _predict_loaded(model, probe, layout, partial, publication, updates, dtype)
            check = _compare(bare, wanted, found, adapted, epsilon)
            write_text(partial / "README.md", card(publication, check))
            partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return check


@final
@dataclass(frozen=True, kw_only=True)
class _Probe:
    """What denoisers are compared on."""

    noisy: Latents
    timesteps: Tensor
    context: Context

    @classmethod
    def of(cls, model: VideoModel) -> Self:
        draw = generator("export")
        timesteps = model.sample_timesteps(_LEVELS, draw)
        context = model.encode_prompts(["a cinematic shot of an old lighthouse at dusk"])
        model.release()
        return cls(
            noisy=torch.randn(1, *model.latent_shape, generator=draw),
            timesteps=torch.stack([timesteps.min(), timesteps.max()]),
            context=context,
        )

    @torch.no_grad()
    def predict(self, model: VideoModel) -> Tensor:
        """The predictions at both levels, in fp32 on the CPU."""
        noisy, timesteps = self.noisy.to(model.device), self.timesteps.to(model.device)
        context = {name: value.to(model.device) for name, value in self.context.items()}
        predictions = [
            model.predict(model.denoiser, noisy, timestep[None], context) for timestep in timesteps
        ]
        return torch.cat(predictions).float().cpu()


def _adapted(model: VideoModel, adapter: Path) -> PeftModel:
    instead = "Export the run with the backbone that it was trained on."
    return load_adapter(model.denoiser, adapter, instead).eval()


def _take_off(publication: ExportSpec) -> dict[str, LoraDelta]:
    """The updates of every network that has some, which is bare afterwards."""
    found = {}
    for name, network in publication.networks.items():
        if updates := read_delta(network):
            found[name] = updates
        remove_adapter(network)
    return found


def _layout(format: Format, policy: PeftModel, name: str) -> LoraFormat:
    if format is Format.DIFFUSERS:
        return Diffusers()
    if format is Format.PEFT:
        return Peft(policy.peft_config[policy.active_adapter])
    return Comfy(name)


def _predict_loaded(
    model: VideoModel,
    probe: _Probe,
    layout: LoraFormat,
    folder: Path,
    publication: ExportSpec,
    updates: Mapping[str, LoraDelta],
    dtype: torch.dtype | None,
) -> Tensor:
    """Load what was written back, compare it layer by layer, and predict with it."""
    try:
        with layout.loaded(folder, publication, list(updates)):
            for name, layers in updates.items():
                _compare_layers(layers, read_delta(publication.networks[name]), dtype)
            return probe.predict(model)
    except (RuntimeError, ValueError, LookupError, OSError, SafetensorError) as error:
        raise _does_not_load(error) from error


def _compare_layers(wanted: LoraDelta, found: LoraDelta, dtype: torch.dtype | None) -> None:
    """By what each layer's output gains: exact where the prediction of a whole network is not."""
    if strays := sorted(wanted.keys() ^ found.keys()):
        raise ExportError(
            f"Loaded back, the export has other layers than the run ({len(strays)} in all, "
            f"'{strays[0]}' first). {_NEXT}"
        )
    draw = generator("export", "layers")
    for name, update in wanted.items():
        inputs = torch.randn(_INPUTS, update.down.shape[1], generator=draw)
        right, got = update.applied(inputs), found[name].applied(inputs)
        off = _relative(got - right, right)
        # Readers may widen what they read, and may narrow it to the network's own precision.
        kinds = {found[name].down.dtype, dtype or torch.float32}
        epsilon = max(torch.finfo(kind).eps for kind in kinds)
        if not off <= LAYER_TOLERANCE * epsilon + _SUMS:
            raise ExportError(
                f"Loaded back, the update of '{name}' is off by {off:.1%}. Its numbers may be too "
                "small for the precision that they are stored in: export with --dtype fp32, or "
                "report this."
            )


def _write_merged(
    policy: PeftModel, publication: ExportSpec, folder: Path, dtype: torch.dtype | None
) -> None:
    """A checkpoint in diffusers' layout: the networks merged, the other parts as they were."""
    for network in publication.networks.values():
        network.to("cpu")  # whole: of two experts one may wait there, without its adapter
        if dtype is torch.float32:
            _cast(network, dtype)  # before merging, so that the sum is not rounded
    policy.merge_and_unload(safe_merge=True)
    for name, network in publication.networks.items():
        if hasattr(network, "peft_config"):
            del network.peft_config
        if dtype is not None:
            _cast(network, dtype)
        network.save_pretrained(folder / name)
    publication.scheduler.save_pretrained(folder / "scheduler")
    written = {*publication.networks, "scheduler"}
    for name, kind in publication.index.items():
        if isinstance(kind, (list, tuple)) and any(kind) and name not in written:
            _copy_part(publication.folder(name), folder / name)
    library = {"_class_name": publication.pipeline, "_diffusers_version": diffusers.__version__}
    index = {**publication.index, **library}
    write_text(folder / "model_index.json", json.dumps(index, indent=2) + "\n")


def _cast(network: nn.Module, dtype: torch.dtype) -> None:
    """As `from_pretrained(torch_dtype=...)` does: some modules are kept in fp32."""
    kept = getattr(network, "_keep_in_fp32_modules", None) or ()
    for name, tensor in (*network.named_parameters(), *network.named_buffers()):
        if tensor.is_floating_point() and not any(part in name.split(".") for part in kept):
            tensor.data = tensor.data.to(dtype)


def _copy_part(source: Path, place: Path) -> None:
    place.mkdir()
    weights = set(weight_files(source))
    for path in source.iterdir():
        if path in weights or path.suffix in _DESCRIBING:
            shutil.copyfile(path, place / path.name)


def _reloaded(reload: Callable[[Path], VideoModel], folder: Path) -> VideoModel:
    try:
        return reload(folder)
    except (UserError, RuntimeError, ValueError, LookupError, OSError, SafetensorError) as error:
        raise _does_not_load(error) from error


def _epsilon(denoiser: nn.Module, dtype: torch.dtype | None, format: Format) -> float:
    """The rounding error of what predicts: of the denoiser, and of merged weights once stored."""
    own = precision(denoiser)
    kinds = {own, dtype or own} if format is Format.MERGED else {own}
    return max(torch.finfo(kind).eps for kind in kinds)


def _compare(
    bare: Tensor, wanted: Tensor, found: Tensor, adapted: Sequence[str], epsilon: float
) -> Check:
    check = Check(
        change=_relative(wanted - bare, wanted),
        difference=_relative(found - wanted, wanted),
        adapted=tuple(adapted),
    )
    allowed = SHARE_TOLERANCE * check.change + NOISE_TOLERANCE * epsilon
    if not check.difference <= allowed:  # nor if it is not a number
        raise ExportError(
            f"Loaded back, the export predicts something else than the run: off by "
            f"{check.difference:.2g} of the prediction, of which the adapter changes "
            f"{check.change:.2g}. {_NEXT}"
        )
    return check


def _relative(difference: Tensor, to: Tensor) -> float:
    size = to.norm().item()
    return difference.norm().item() / size if size else difference.norm().item()


def _does_not_load(error: Exception) -> ExportError:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return ExportError(f"What was written does not load back ({reason}). {_NEXT}")


_NEXT = (
    "Nothing was exported. Report this, with the versions in the run's run.toml; another --format "
    "may work."
)
