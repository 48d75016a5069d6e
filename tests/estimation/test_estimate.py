"""Predictions against the memory of real tensors, by two counters."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import nullcontext
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CPU, SHAPE
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity

from dpo_video import registry
from dpo_video.backbone.animatediff import AnimateDiff
from dpo_video.backbone.wan import Wan
from dpo_video.diffusion.known_models import FOLDER, known_models
from dpo_video.errors import UserError
from dpo_video.estimation.equal_blocks import EqualBlocks
from dpo_video.estimation.estimate import estimate_memory
from dpo_video.estimation.modes import (
    BACKWARDS,
    CHECKPOINTINGS,
    Backward,
    Checkpointing,
    MemoryMode,
)
from dpo_video.estimation.replay import Replay
from dpo_video.estimation.results import CONTEXT, GIB, Estimate, MemoryEstimate
from dpo_video.estimation.tiers import find_tier, tiers
from dpo_video.loss.global_ import Global
from dpo_video.loss.sft import SFT
from dpo_video.memory.blocks import checkpoint_blocks
from dpo_video.memory.fsdp import sharded_bytes
from dpo_video.memory.peak import peak_bytes
from dpo_video.reference.cached import Cached
from dpo_video.reference.copy import Copy
from dpo_video.reference.toggle import Toggle
from dpo_video.settings import TrainSettings
from dpo_video.strategies import Loss
from dpo_video.training.lora import adapt
from dpo_video.training.step import Step
from dpo_video.types import PairBatch, Placement

SETTINGS = TrainSettings(rank=2, alpha=4, gradient_accumulation_steps=1, batch_size=1, steps=10)
TWO = SETTINGS.model_copy(update={"batch_size": 2})
REFERENCES = {"toggle": Toggle(), "copy": Copy(), "cached": Cached()}


@pytest.fixture(scope="module")
def backbone(small_folder: Path) -> AnimateDiff:
    return AnimateDiff(
        model=str(small_folder), frames=SHAPE.frames, height=SHAPE.height, width=SHAPE.width
    )


@pytest.fixture(scope="module")
def exact() -> Iterator[None]:
    """Sizes as they are: torch's allocator on a CPU rounds nothing up."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dpo_video.memory.peak.BLOCK", 1)
        patch.setattr("dpo_video.estimation.tracing.BLOCK", 1)
        yield


@pytest.fixture(scope="module")
def found(backbone: AnimateDiff, exact: None) -> Estimate:
    return estimate_memory(backbone, REFERENCES, Global(), SETTINGS)


def need_of(found: Estimate, mode: MemoryMode) -> MemoryEstimate:
    need = found.for_mode(mode)
    assert need is not None
    return need


def test_a_model_on_meta_is_the_model_without_weights(backbone: AnimateDiff) -> None:
    loaded = backbone.load(Placement(CPU, torch.float16))
    outline = backbone.load(Placement(CPU, torch.float16, on_meta=True))
    described = {name: (p.shape, p.dtype) for name, p in loaded.denoiser.state_dict().items()}
    assert described == {
        name: (p.shape, p.dtype) for name, p in outline.denoiser.state_dict().items()
    }
    assert all(parameter.is_meta for parameter in outline.denoiser.parameters())
    assert not any(parameter.requires_grad for parameter in outline.denoiser.parameters())
    assert outline.latent_shape == loaded.latent_shape
    prompt = loaded.encode_prompts(["a red square"])
    assert outline.prompt_shapes() == {name: value.shape[1:] for name, value in prompt.items()}


@pytest.mark.parametrize("model", [m for m in known_models() if m.backbone in ("wan", "cogvideox")])
def test_a_known_model_is_built_on_meta_offline_by_name(model: object) -> None:
    chosen = registry.load("backbone", model.backbone)(model=model.name)  # type: ignore[attr-defined]
    placement = Placement(CPU, torch.bfloat16, on_meta=True)
    outline = chosen.load(placement)  # type: ignore[attr-defined]
    assert outline.prompt_shapes()["prompt_embeds"][1] == 4096
    parameters = sum(parameter.numel() for parameter in outline.denoiser.parameters())
    assert parameters == model.parameters  # type: ignore[attr-defined]
    assert outline.lora_targets()


@pytest.mark.parametrize("backward", ["joint", "split"])
def test_fine_tuning_takes_a_third_of_the_operations_and_half_of_the_activations(
    backbone: AnimateDiff, found: Estimate, backward: Backward
) -> None:
    mode = MemoryMode(reference="copy", checkpointing="none", backward=backward)
    alone = estimate_memory(backbone, {"copy": Copy()}, SFT(), SETTINGS, modes=[mode]).estimates[0]
    compared, joint = need_of(found, mode), mode.model_copy(update={"backward": "joint"})
    assert alone.flops / need_of(found, joint).flops == pytest.approx(1 / 3, rel=0.05)
    assert alone.weights < 0.6 * compared.weights  # no copy is made
    assert alone.activations < 0.6 * need_of(found, joint).activations


def allocated(profiler: torch.profiler.profile) -> int:
    """The largest sum of bytes that torch's allocator has handed out and not got back.

    What was handed out before the profile may be freed inside, whenever garbage is collected.
    """
    found: list[Any] = list(profiler.profiler.kineto_results.experimental_event_tree())  # type: ignore[union-attr]
    for event in found:  # grows
        found += event.children
    events = [event for event in found if event.tag == _EventType.Allocation]
    sizes: dict[int, int] = {}
    now = most = 0
    for event in sorted(events, key=lambda each: each.start_time_ns):
        fields = event.extra_fields
        if fields.alloc_size > 0:
            sizes[fields.ptr] = fields.alloc_size
            now += fields.alloc_size
        else:
            now -= sizes.pop(fields.ptr, 0)
        most = max(most, now)
    return most


def test_what_was_there_before_is_not_counted_when_it_is_freed() -> None:
    before = torch.zeros(100_000)
    with torch.profiler.profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        held = torch.zeros(1000)
        del before
        held = torch.cat([held, held])
    assert allocated(profiler) == 12_000


CASES = [
    *((SETTINGS, "toggle", *how) for how in product(CHECKPOINTINGS, BACKWARDS)),
    (SETTINGS, "copy", "none", "joint"),
    (TWO, "toggle", "blocks", "split"),
]


@pytest.mark.parametrize(("settings", "name", "checkpointing", "backward"), CASES)
def test_the_prediction_matches_real_tensors(
    backbone: AnimateDiff, found: Estimate, settings: TrainSettings, name: str,
    checkpointing: Checkpointing, backward: Backward,
) -> None:  # fmt: skip
    mode = MemoryMode(reference=name, checkpointing=checkpointing, backward=backward)
    if settings is TWO:
        references = {name: REFERENCES[name]}
        found = estimate_memory(backbone, references, Global(), settings, modes=[mode])
    need, count = need_of(found, mode), settings.batch_size
    model = backbone.load(Placement())
    policy = adapt(model, settings, seed=0)
    if checkpointing == "blocks":
        checkpoint_blocks(policy)
    reference_model = REFERENCES[name].attach(policy)
    step = Step(
        model=model, policy=policy, reference_model=reference_model, loss=Global(), mode=backward
    )
    with reference_model.network() as reference:
        networks = [policy] if reference is policy else [policy, reference]
    shape = (count, *model.latent_shape)
    context = model.encode_prompts(["a red square"] * count)
    optimizer = torch.optim.AdamW(p for p in policy.parameters() if p.requires_grad)

    def run() -> None:
        batch = PairBatch(
            first=torch.randn(shape),
            second=torch.randn(shape),
            preference=torch.ones(count, shape[2]),
            region=torch.ones(count, 1, *shape[2:]),
            strength=torch.ones(count),
            context=context,
            keys=["a"] * count,
        )
        step(batch, torch.randn(shape), torch.full((count,), 500.0))

    taken = peak_bytes(run, networks=networks, optimizer=optimizer)
    assert need.tensors == pytest.approx(taken.total, rel=0.002)
    assert need.flops == taken.flops // count
    adapter = sum(p.numel() for p in policy.parameters() if p.requires_grad)
    assert found.trainable == adapter and need.gradients == 4 * adapter

    # The second counter, torch's allocator, also sees what kernels allocate for themselves.
    policy.zero_grad()
    with torch.profiler.profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    assert need.tensors == pytest.approx(
        allocated(profiler) + taken.weights + taken.optimizer, rel=0.023
    )


# A run with cached predictions also holds those, which the derivation leaves out.
@pytest.mark.parametrize(("name", "apart"), [("copy", 0.001), ("cached", 0.01)])
def test_a_derived_estimate_equals_the_traced_one(
    backbone: AnimateDiff, found: Estimate, name: str, apart: float
) -> None:
    alone = estimate_memory(
        backbone, {name: REFERENCES[name]}, Global(), SETTINGS, backwards=["joint", "split"],
        checkpointings=["none"],
    )  # fmt: skip
    for need in alone.estimates:
        derived = need_of(found, need.mode)
        assert derived.tensors == pytest.approx(need.tensors, rel=apart)
        assert derived.weights == need.weights and derived.flops == need.flops
        assert derived.fresh == need.fresh == (name != "cached")


def test_passes_that_are_counted_again_change_no_figure(
    backbone: AnimateDiff, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = SETTINGS.model_copy(update={"gradient_accumulation_steps": 4})

    def found() -> Estimate:
        return estimate_memory(
            backbone, {"toggle": Toggle()}, Global(), settings,
            checkpointings=["blocks"], backwards=["split", "linear"],
        )  # fmt: skip

    counted = found()
    monkeypatch.setattr(Replay, "model", lambda self: self._model)
    assert counted == found()


def test_equal_chunks_are_counted_within_one_percent(
    backbone: AnimateDiff, monkeypatch: pytest.MonkeyPatch
) -> None:
    mode = MemoryMode(
        reference="toggle", checkpointing="blocks", backward="split", forward_chunks=4,
        offload=("checkpoints",),
    )  # fmt: skip

    def found() -> MemoryEstimate:
        given = {"toggle": Toggle()}
        return estimate_memory(backbone, given, Global(), SETTINGS, modes=[mode]).estimates[0]

    counted = found()
    monkeypatch.setattr(EqualBlocks, "counted", lambda self, mode: nullcontext())
    traced = found()
    assert counted.tensors == pytest.approx(traced.tensors, rel=0.01)
    assert (counted.flops, counted.weights) == (traced.flops, traced.weights)


def test_every_mode_saves_memory(found: Estimate) -> None:
    def tensors(reference: str, checkpointing: Checkpointing, backward: Backward) -> int:
        mode = MemoryMode(reference=reference, checkpointing=checkpointing, backward=backward)
        return need_of(found, mode).tensors

    assert tensors("toggle", "none", "joint") < tensors("copy", "none", "joint")
    assert tensors("toggle", "none", "split") < tensors("toggle", "none", "joint")
    assert tensors("toggle", "blocks", "split") < tensors("toggle", "none", "split")


def test_linear_backward_is_left_out_for_losses_that_it_cannot_train(
    backbone: AnimateDiff,
) -> None:
    linear = MemoryMode(reference="toggle", checkpointing="none", backward="linear")
    loss: Loss = registry.load("loss", "segment")()  # type: ignore[assignment]
    found = estimate_memory(backbone, {"toggle": Toggle()}, loss, SETTINGS, modes=[linear])
    assert Global().linear_in_mean_error and not loss.linear_in_mean_error
    assert not found.estimates


def test_the_best_mode_is_the_fastest_fitting_one_with_fresh_noise(found: Estimate) -> None:
    best = found.best(1e15)
    assert best is not None and best.mode.checkpointing == "none" and best.fresh
    assert best.flops == min(need.flops for need in found.estimates if need.fresh)
    assert found.best(CONTEXT) is None
    tight = min(need.total for need in found.estimates if need.fresh)
    chosen = found.best(tight)
    assert chosen is not None and chosen.total == tight


def test_hours_follow_from_operations_and_efficiency(found: Estimate) -> None:
    need = found.estimates[0]
    assert found.pairs == SETTINGS.steps * SETTINGS.batch_size
    half = found.model_copy(update={"efficiency": 0.5})
    card = find_tier("t4").model_copy(update={"tflops": 1e-6})
    assert half.hours(need, card) == pytest.approx(found.pairs * need.flops / 0.5e6 / 3600)


def test_a_missing_model_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Cannot load the unet"):
        estimate_memory(AnimateDiff(model=str(tmp_path)), REFERENCES, Global(), SETTINGS)


# Checkpointed blocks: all; at one end only; more in front than behind.
@pytest.mark.parametrize("counts", [("blocks",), (1, 5)], ids=str)
def test_a_deep_transformer_is_extrapolated_exactly_from_its_first_layers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, counts: tuple[Checkpointing, ...]
) -> None:
    folder = tmp_path / "thin"
    shutil.copytree(FOLDER / "wan2.1-t2v-1.3b", folder)
    path = folder / "transformer" / "config.json"
    thin = {"num_attention_heads": 2, "attention_head_dim": 16, "ffn_dim": 64, "num_layers": 7}
    path.write_text(json.dumps({**json.loads(path.read_text()), **thin, "text_dim": 8}))
    backbone = Wan(model=str(folder), frames=33, height=128, width=128, text_length=4)
    monkeypatch.setattr("dpo_video.estimation.tracing.DEEP", 6)
    references = {"toggle": Toggle()}
    settings = SETTINGS.model_copy(update={"mixed_precision": "bf16"})

    def found() -> Estimate:
        return estimate_memory(
            backbone, references, Global(), settings,
            checkpointings=counts, backwards=["split" if counts == ("blocks",) else "joint"],
        )  # fmt: skip

    short = found()
    assert short.blocks == 7
    monkeypatch.setattr("dpo_video.estimation.tracing.layer_stack", lambda network: None)
    assert short == found()


def test_wan_at_full_size_fits_the_smallest_card() -> None:
    settings = TrainSettings(rank=64, mixed_precision="bf16", gradient_accumulation_steps=1)
    found = estimate_memory(
        Wan(), {"toggle": Toggle()}, Global(), settings,
        checkpointings=["blocks"], backwards=["split"],
    )  # fmt: skip
    (need,) = found.estimates
    assert found.parameters == 1_418_996_800 and found.latent_shape == (16, 21, 60, 104)
    assert 8 < need.tensors / GIB < 12
    assert need.total < tiers()["t4"].memory_gib * GIB


@pytest.mark.parametrize("offload", [(), ("blocks",)])
def test_sharded_weights_leave_the_parts_and_what_is_gathered(
    backbone: AnimateDiff, found: Estimate, offload: tuple[str, ...]
) -> None:
    alone = need_of(found, MemoryMode(reference="toggle", checkpointing="none", backward="joint"))
    shared = alone.mode.model_copy(update={"shard": 4, "offload": offload})
    (need,) = estimate_memory(
        backbone, {"toggle": REFERENCES["toggle"]}, Global(), SETTINGS, modes=[shared]
    ).estimates
    assert (need.activations, need.gradients) == (alone.activations, alone.gradients)
    stored = sharded_bytes(backbone.load(Placement()).denoiser, 4)
    assert stored.parts == pytest.approx(stored.whole / 4, rel=0.05)  # padded rows
    assert need.host == (stored.parts_of_blocks if offload else 0)
    left_out = stored.whole - stored.parts + need.host
    assert need.weights == alone.weights - left_out + stored.gathered
