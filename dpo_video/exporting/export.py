"""Write a run's adapter in the files that other programs load.

The export is written to a temporary folder, loaded back as those programs do, and its predictions
are compared with those of the run's own adapted denoiser. Only then is the folder renamed.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self, final

import diffusers
import torch
from peft import PeftModel
from safetensors import SafetensorError
from torch import Tensor, nn

from dpo_video.diffusion.adapters import remove_adapter
from dpo_video.errors import ExportError, RunError, UserError
from dpo_video.exporting.updates import precision, read_delta
from dpo_video.extensions import AdapterFormat, ExportedAdapter, MergedFormat
from dpo_video.strategies import VideoModel
from dpo_video.support.atomic import write_text, writing
from dpo_video.support.rng import generator
from dpo_video.training.checkpoint import load_adapter
from dpo_video.types import Context, ExportSpec, Latents, LoraDelta

LAYER_TOLERANCE = 4.0
"""Largest error of a layer's update, in rounding errors of the stored precision."""
CHANGE_TOLERANCE = 0.02
"""Largest error of a prediction, as a fraction of the change that the adapter makes."""
NOISE_TOLERANCE = 32.0
"""Further error of a prediction, in rounding errors of the denoiser's precision: the exported
network adds the same numbers in another order."""
MERGE_TOLERANCE = 0.05
"""Largest error of the merged weights, as a fraction of the adapter's update of them."""
_SUMS = 1e-5  # relative error from the order of a sum in fp32
_TIMESTEPS = 16  # drawn; the highest and lowest are compared, so that every expert is
_INPUTS = 8  # random vectors that a layer's update is compared on


@dataclass(frozen=True, kw_only=True)
class Check:
    """Comparison of the reloaded export with the run's own adapted denoiser."""

    change: float
    """Relative change of the denoiser's predictions by the adapter."""
    difference: float
    """Relative difference between the predictions of export and run."""
    adapted: tuple[str, ...]
    """Names, in the pipeline, of the networks that have the adapter."""
    rounded: float = 0.0
    """Error of merged weights by rounding to the stored precision, relative to the update."""


def export(
    model: VideoModel,
    adapter: Path,
    format: AdapterFormat | MergedFormat,
    out: Path,
    *,
    name: str,
    card: Callable[[ExportSpec, Check], str],
    reload: Callable[[Path], VideoModel],
    dtype: torch.dtype | None = None,
) -> Check:
    """Write an adapter, load it back, compare it, and then rename its folder to `out`.

    Args:
        model: The base model; it must not be used afterwards.
        adapter: A folder in PEFT's format.
        format: The format.
        out: The new folder.
        name: Name of the run, for files that are listed by name.
        card: Returns the text of README.md for the result of the comparison.
        reload: Loads the same backbone from another folder, for merged checkpoints.
        dtype: Precision of the stored weights; None keeps their own, and is fp32 for merged ones.

    Raises:
        ExportError: if the adapter is not finite, rounding merged weights to `dtype` would change
            more than `MERGE_TOLERANCE` of its update, or the export does not load back or predicts
            something else; nothing is left on disk.
        RunError: if `out` exists, the adapter does not fit, or no other program runs the model.
    """
    if out.exists():
        raise RunError(f"'{out}' exists already. Delete it, or name another folder with --out.")
    spec = model.export_spec()
    if spec is None:
        raise RunError(
            "No other program runs models of this backbone. The adapter is already in PEFT's "
            f"format: '{adapter}'."
        )
    probe = _Probe.of(model)
    bare = probe.predict(model)
    policy = _adapted(model, adapter)
    expected = probe.predict(model)
    if not expected.isfinite().all():
        raise ExportError(
            f"The predictions with '{adapter}' are not finite: its training has diverged. Export "
            "an earlier checkpoint (--checkpoint N)."
        )
    adapted = [name for name, network in spec.networks.items() if read_delta(network)]
    rounded = 0.0
    dora = any(config.use_dora for config in policy.peft_config.values())
    merges = isinstance(format, MergedFormat)
    if merges:
        dtype = dtype or torch.float32
    if dora and (not merges or dtype is not torch.float32):
        raise ExportError(
            "The adapter is a DoRA (train.lora.use_dora), which not every program reads. Export "
            "with --format merged --dtype fp32."
        )
    if merges and not dora:
        rounded = _rounded(policy, dtype or torch.float32)
    epsilon = _epsilon(model.denoiser, dtype, merges)
    partial = out.with_name(f".partial-{out.name}")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        with writing(out):
            partial.mkdir(parents=True)
            if isinstance(format, MergedFormat):
                _write_merged(policy, spec, partial, dtype)
                for network in spec.networks.values():
                    network.to("meta")  # frees its memory; it is on disk
                found = probe.predict(_reloaded(reload, partial))
            else:
                exported = ExportedAdapter(
                    name=name,
                    spec=spec,
                    updates=_detach_updates(spec),
                    dtype=dtype,
                    config=policy.peft_config[policy.active_adapter],
                )
                format.write(partial, exported)
                found = _predict_loaded(model, probe, format, partial, exported)
            check = replace(_compare(bare, expected, found, adapted, epsilon), rounded=rounded)
            write_text(partial / "README.md", card(spec, check))
            partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return check


@final
@dataclass(frozen=True, kw_only=True)
class _Probe:
    """Inputs on which denoisers are compared."""

    noisy: Latents
    timesteps: Tensor
    context: Context

    @classmethod
    def of(cls, model: VideoModel) -> Self:
        draw = generator("export")
        timesteps = model.sample_timesteps(_TIMESTEPS, draw)
        context = model.encode_prompts(["a cinematic shot of an old lighthouse at dusk"])
        model.release()
        return cls(
            noisy=torch.randn(1, *model.latent_shape, generator=draw),
            timesteps=torch.stack([timesteps.min(), timesteps.max()]),
            context=context,
        )

    @torch.no_grad()
    def predict(self, model: VideoModel) -> Tensor:
        """The predictions at both timesteps, in fp32 on the CPU."""
        noisy, timesteps = self.noisy.to(model.device), self.timesteps.to(model.device)
        context = {name: value.to(model.device) for name, value in self.context.items()}
        predictions = [
            model.predict(model.denoiser, noisy, timestep[None], context) for timestep in timesteps
        ]
        return torch.cat(predictions).float().cpu()


def _adapted(model: VideoModel, adapter: Path) -> PeftModel:
    instead = "Export the run with the backbone that it was trained on."
    return load_adapter(model.denoiser, adapter, instead).eval()


def _detach_updates(spec: ExportSpec) -> dict[str, LoraDelta]:
    """Read the updates of every adapted network and remove the adapter from it."""
    found = {}
    for name, network in spec.networks.items():
        if updates := read_delta(network):
            found[name] = updates
        remove_adapter(network)
    return found


def _predict_loaded(
    model: VideoModel,
    probe: _Probe,
    format: AdapterFormat,
    folder: Path,
    adapter: ExportedAdapter,
) -> Tensor:
    """Load the export back, compare it layer by layer, and predict with it."""
    try:
        with format.loaded(folder, adapter):
            for name, layers in adapter.updates.items():
                _compare_layers(layers, read_delta(adapter.spec.networks[name]), adapter.dtype)
            return probe.predict(model)
    except (RuntimeError, ValueError, LookupError, OSError, SafetensorError) as error:
        raise _does_not_load(error) from error


def _compare_layers(expected: LoraDelta, found: LoraDelta, dtype: torch.dtype | None) -> None:
    """Compare the change of each layer's output, which is more exact than a whole prediction."""
    if different := sorted(expected.keys() ^ found.keys()):
        raise ExportError(
            f"The reloaded export adapts other layers than the run ({len(different)} differ, "
            f"'{different[0]}' first). {_NEXT}"
        )
    draw = generator("export", "layers")
    for name, update in expected.items():
        inputs = torch.randn(_INPUTS, update.down.shape[1], generator=draw)
        output = update.applied(inputs)
        error = _relative(found[name].applied(inputs) - output, output)
        # A reader may widen the weights, or narrow them to the network's own precision.
        kinds = {found[name].down.dtype, dtype or torch.float32}
        epsilon = max(torch.finfo(kind).eps for kind in kinds)
        if not error <= LAYER_TOLERANCE * epsilon + _SUMS:
            raise ExportError(
                f"The reloaded update of '{name}' differs by {error:.1%}. Its numbers may be too "
                "small for the stored precision: export with --dtype fp32, or report this."
            )


@torch.no_grad()
def _rounded(policy: nn.Module, dtype: torch.dtype) -> float:
    """Error of merged weights by rounding, relative to the adapter's update.

    The norm of `round(W + D) - (round(W) + D)`, relative to that of the update `D`. It is 1 where
    the whole update is lost, and can be larger for weights `W` that the precision does not hold.

    Raises:
        ExportError: if it is larger than `MERGE_TOLERANCE`.
    """
    wrong = size = 0.0
    updates = read_delta(policy)
    for name, update in updates.items():
        layer: Any = policy.get_submodule(name)
        base = layer.get_base_layer().weight.detach().double().cpu()
        change = update.folded.double() @ update.down.double()
        merged = (base + change).to(dtype).double()
        wrong += (merged - (base.to(dtype).double() + change)).square().sum().item()
        size += change.square().sum().item()
    share = math.sqrt(wrong / size) if size else 0.0
    if not share <= MERGE_TOLERANCE:
        name = str(dtype).removeprefix("torch.")
        raise ExportError(
            f"Rounding merged weights to {name} makes an error of {share:.0%} of the adapter's "
            f"update; at most {MERGE_TOLERANCE:.0%} is allowed. Export with --dtype fp32, or keep "
            "the adapter separate (--format diffusers)."
        )
    return share


def _write_merged(
    policy: PeftModel, spec: ExportSpec, folder: Path, dtype: torch.dtype | None
) -> None:
    """Write a diffusers checkpoint: merged networks, and the other parts unchanged."""
    for network in spec.networks.values():
        network.to("cpu")  # the base of an idle expert may be there already, its adapter not
        if dtype is torch.float32:
            _cast(network, dtype)  # before merging, so that the sum is not rounded
    policy.merge_and_unload(safe_merge=True)
    for name, network in spec.networks.items():
        if hasattr(network, "peft_config"):
            del network.peft_config
        if dtype is not None:
            _cast(network, dtype)
        network.save_pretrained(folder / name)
    spec.scheduler.save_pretrained(folder / "scheduler")
    written = {*spec.networks, "scheduler"}
    for name, kind in spec.index.items():
        if isinstance(kind, (list, tuple)) and any(kind) and name not in written:
            spec.copy(name, folder / name)
    library = {"_class_name": spec.pipeline, "_diffusers_version": diffusers.__version__}
    index = {**spec.index, **library}
    write_text(folder / "model_index.json", json.dumps(index, indent=2) + "\n")


def _cast(network: nn.Module, dtype: torch.dtype) -> None:
    """Cast as `from_pretrained(torch_dtype=...)` does: some modules stay in fp32."""
    kept = getattr(network, "_keep_in_fp32_modules", None) or ()
    for name, tensor in (*network.named_parameters(), *network.named_buffers()):
        if tensor.is_floating_point() and not any(part in name.split(".") for part in kept):
            tensor.data = tensor.data.to(dtype)


def _reloaded(reload: Callable[[Path], VideoModel], folder: Path) -> VideoModel:
    try:
        return reload(folder)
    except (UserError, RuntimeError, ValueError, LookupError, OSError, SafetensorError) as error:
        raise _does_not_load(error) from error


def _epsilon(denoiser: nn.Module, dtype: torch.dtype | None, merges: bool) -> float:
    """Rounding error of the denoiser, and of merged weights in their stored precision."""
    own = precision(denoiser)
    kinds = {own, dtype or own} if merges else {own}
    return max(torch.finfo(kind).eps for kind in kinds)


def _compare(
    bare: Tensor, expected: Tensor, found: Tensor, adapted: Sequence[str], epsilon: float
) -> Check:
    check = Check(
        change=_relative(expected - bare, expected),
        difference=_relative(found - expected, expected),
        adapted=tuple(adapted),
    )
    allowed = CHANGE_TOLERANCE * check.change + NOISE_TOLERANCE * epsilon
    if not check.difference <= allowed:  # also true for nan
        raise ExportError(
            f"The reloaded export predicts something else than the run: the predictions differ by "
            f"{check.difference:.2g} of their size; the adapter changes them by "
            f"{check.change:.2g}. {_NEXT}"
        )
    return check


def _relative(difference: Tensor, to: Tensor) -> float:
    size = to.norm().item()
    return difference.norm().item() / size if size else difference.norm().item()


def _does_not_load(error: Exception) -> ExportError:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return ExportError(f"The export does not load back ({reason}). {_NEXT}")


_NEXT = (
    "Nothing was exported. Report this, with the versions in the run's run.toml; another --format "
    "may work."
)
