"""Every memory mode takes the same step with less memory."""

from __future__ import annotations

import copy
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from conftest import load_small
from safetensors.torch import load_file
from small_cogvideox import load_small_cogvideox
from small_step import EVEN, FIRST, MIXED, SECOND, TIES, Bench, MemoryMode, a_batch, apart
from small_training import SETTINGS, make_store
from torch import Tensor, nn

from dpo_video import registry
from dpo_video.backbone.animatediff import AnimateDiffModel
from dpo_video.data.store import PairStore
from dpo_video.errors import TrainingError
from dpo_video.loss.global_ import Global
from dpo_video.loss.region import Region
from dpo_video.loss.segment import Segment
from dpo_video.loss.sft import SFT
from dpo_video.memory.blocks import blocks, checkpoint_blocks
from dpo_video.memory.peak import peak_bytes
from dpo_video.reference.cached import Cached
from dpo_video.reference.copy import Copy
from dpo_video.reference.toggle import Toggle
from dpo_video.settings import MemorySettings, TrainSettings
from dpo_video.strategies import Loss, Reference
from dpo_video.support.report import StepReport
from dpo_video.training.lora import adapt
from dpo_video.training.run import train
from dpo_video.training.run_dir import latest_checkpoint
from dpo_video.training.step import Step
from dpo_video.types import LossOutput, PairErrors


@pytest.fixture(scope="module")
def bench(small_folder: Path) -> Bench:
    return Bench(load_small(small_folder))


def losses() -> list[Loss]:
    """All installed losses, and some with options that change their inputs."""
    plain = [registry.load("loss", listing.name)() for listing in registry.listings("loss")]
    return [*plain, Global(sft_weight=0.1), Segment(per="clip", sft_weight=0.1)]


# --- backward --------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", losses(), ids=repr)
@pytest.mark.parametrize("batch", [(SECOND,), (FIRST, MIXED)], ids=["one pair", "two pairs"])
def test_all_modes_give_the_same_gradient_and_figures(
    bench: Bench, loss: Loss, batch: tuple[Tensor, ...]
) -> None:
    pairs = a_batch(bench.model, *batch)
    bench.policy.zero_grad()
    expected = vars(bench.plain(pairs, loss))
    gradient = bench.flat()
    assert gradient.norm() > 0
    # In one forward pass, the two videos' errors round differently by 1e-8, which the slope turns
    # into up to 3e-4 of the gradient.
    modes: dict[MemoryMode, float] = {"split": 1e-6, "joint": 1e-3}
    if loss.linear_in_mean_error:
        modes["linear"] = 1e-4  # it subtracts two gradients that are nearly equal
    for mode, tolerance in modes.items():
        bench.policy.zero_grad()
        output = vars(bench.step(mode, pairs, loss))
        assert apart(gradient, bench.flat()) < tolerance, mode
        assert not any(value.requires_grad for value in output.values())
        for name, value in output.items():
            rounding = {"rtol": 0, "atol": 1e-7}
            if mode == "joint":
                of_errors = name in ("margin", "chosen_change", "rejected_change")
                rounding = {"rtol": 1e-3, "atol": 1e-6 if of_errors else 1e-3}
            assert torch.allclose(value, expected[name], **rounding), (mode, name)


@pytest.mark.parametrize("mode", ["joint", "split", "linear"])
def test_pairs_count_by_their_weights(bench: Bench, mode: MemoryMode) -> None:
    weights, pairs = torch.tensor([1.5, 0.5]), a_batch(bench.model, FIRST, MIXED)
    found = bench.gradient(mode, pairs, Global(), weight=weights)
    equal = bench.gradient(mode, pairs, Global())
    first = bench.gradient(mode, pairs, Global(), weight=torch.tensor([2.0, 0]))
    assert apart(found, equal + first / 4 - (equal - first / 2) / 2) < 1e-5
    assert apart(found, equal) > 0.1


@pytest.mark.parametrize("mode", ["joint", "split"])
def test_a_loss_sees_timestep_signal_noise_and_progress(bench: Bench, mode: MemoryMode) -> None:
    seen: list[PairErrors] = []

    class Spy(Loss):
        def __call__(self, errors: PairErrors) -> LossOutput:
            seen.append(errors)
            return Global()(errors)

    batch = a_batch(bench.model, FIRST, SECOND)
    noise, timestep = bench.draw(2)
    step = Step(model=bench.model, policy=bench.policy, reference_model=None, loss=Spy(), mode=mode)
    step(batch, noise, timestep, progress=0.25)
    noisy = bench.model.add_noise(batch.first, noise, timestep)
    for errors in seen:
        pairs = [timestep.tolist().index(each) for each in errors.timestep.tolist()]
        assert errors.progress.tolist() == [0.25] * len(pairs)
        assert not errors.reference_first.any() and not errors.reference_second.any()
        signal, scale = (value.view(-1, 1, 1, 1, 1) for value in (errors.signal, errors.noise))
        found = signal * batch.first[pairs] + scale * noise[pairs]
        torch.testing.assert_close(found, noisy[pairs])


@pytest.mark.parametrize("mode", ["joint", "split", "linear"])
def test_fine_tuning_predicts_the_chosen_videos_and_nothing_else(
    bench: Bench, mode: MemoryMode, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch, videos = a_batch(bench.model, FIRST, MIXED), []
    predict = bench.model.predict

    def counting(denoiser: nn.Module, noisy: Tensor, *rest: Any) -> Tensor:
        videos.append(len(noisy))
        return predict(denoiser, noisy, *rest)

    monkeypatch.setattr(bench.model, "predict", counting)
    bench.policy.zero_grad()
    found = bench.step(mode, batch, SFT())
    assert videos == ([2] if mode == "joint" else [1, 1])
    gradient = bench.flat()
    alone = Region(global_weight=0, region_weight=0, sft_weight=1, region_sft_weight=0)
    assert apart(bench.gradient("split", batch, alone), gradient) < (1e-6, 1e-3)[mode == "joint"]
    assert not found.margin.any() and torch.allclose(found.chosen_change, found.loss)


@pytest.mark.parametrize("mode", ["split", "linear"])
def test_pairs_without_a_preference_add_no_gradient(bench: Bench, mode: MemoryMode) -> None:
    batch = a_batch(bench.model, TIES, EVEN)
    bench.policy.zero_grad()
    assert bench.step(mode, batch, Global()).loss.tolist() == pytest.approx([0.693147] * 2)
    assert not any(p.grad is not None and p.grad.any() for p in bench.parameters)


@pytest.mark.parametrize("mode", ["joint", "split", "linear"])
def test_gradients_add_up_over_batches(bench: Bench, mode: MemoryMode) -> None:
    batch = a_batch(bench.model, FIRST)
    part = bench.gradient(mode, batch, Global())
    bench.step(mode, batch, Global())
    assert apart(2 * part, bench.flat()) < 1e-6


@pytest.mark.parametrize("mode", ["joint", "split", "linear"])
def test_a_loss_scaler_scales_once(bench: Bench, mode: MemoryMode) -> None:
    batch = a_batch(bench.model, FIRST)
    plain = bench.gradient(mode, batch, Global())
    scaled = bench.gradient(mode, batch, Global(), backward=lambda loss: (64 * loss).backward())
    assert apart(64 * plain, scaled) < 1e-6


@pytest.mark.parametrize("mode", ["split", "linear"])
def test_under_autocast_the_gradient_reaches_the_adapter(bench: Bench, mode: MemoryMode) -> None:
    batch, found = a_batch(bench.model, FIRST), {}
    for how in ("joint", mode):
        bench.policy.zero_grad()
        Step(
            model=bench.model,
            policy=bench.policy,
            reference_model=bench.reference_model,
            loss=Global(beta=10),
            mode=how,
            autocast=partial(torch.autocast, "cpu", torch.bfloat16),
        )(batch, *bench.draw(1))
        found[how] = bench.flat()
    assert len(found["joint"]) == len(found[mode])
    assert torch.cosine_similarity(found["joint"], found[mode], dim=0) > 0.9


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("mode", ["joint", "split", "linear"])
def test_a_pair_that_is_not_finite_shows_in_the_figures_and_the_gradient(
    bench: Bench, mode: MemoryMode, value: float
) -> None:
    batch = a_batch(bench.model, FIRST, SECOND)
    batch.first[1, 0, 0, 0, 0] = value
    bench.policy.zero_grad()
    assert bench.step(mode, batch, Global()).loss.isfinite().tolist() == [True, False]
    assert not bench.flat().isfinite().all()  # so that the loop skips the step


def test_linear_refuses_a_loss_that_is_not_linear_in_mean_errors(
    bench: Bench, small_folder: Path, small_model: AnimateDiffModel, tmp_path: Path
) -> None:
    class Boastful(Region):  # type: ignore[misc]
        linear_in_mean_error = True

    with pytest.raises(TrainingError, match=r"Boastful declares .*memory\.backward=split"):
        bench.step("linear", a_batch(bench.model, FIRST), Boastful())
    store = make_store(tmp_path / "pairs", small_model, pairs=1)
    with pytest.raises(TrainingError, match=r"Region is none. Set memory\.backward=split"):
        trained(small_folder, store, tmp_path / "run", Region(), MemorySettings(backward="linear"))
    assert not (tmp_path / "run").exists()


# --- checkpointing ---------------------------------------------------------------------------


@pytest.mark.parametrize("reference", [Toggle(), Copy()], ids=repr)
@pytest.mark.parametrize("mode", ["joint", "split", "linear"])
def test_checkpointing_changes_no_bit(
    small_folder: Path, reference: Reference, mode: MemoryMode
) -> None:
    bench = Bench(load_small(small_folder), reference)
    batch = a_batch(bench.model, FIRST, SECOND)
    plain = bench.gradient(mode, batch, Global())
    assert checkpoint_blocks(bench.policy) == 18
    assert torch.equal(plain, bench.gradient(mode, batch, Global()))


def test_a_copy_of_a_checkpointed_network_is_on_its_own(bench: Bench, small_folder: Path) -> None:
    one = Bench(load_small(small_folder))
    checkpoint_blocks(one.policy)
    other = copy.deepcopy(one.policy)
    for parameter in other.parameters():
        parameter.data.mul_(2)
    batch = a_batch(one.model, FIRST)
    assert torch.equal(
        one.gradient("joint", batch, Global()), bench.gradient("joint", batch, Global())
    )
    assert all(parameter.grad is None for parameter in other.parameters())


def kinds(network: nn.Module) -> set[str]:
    return {type(block).__name__ for block in blocks(network)}


def test_the_blocks_of_every_family_are_found(
    bench: Bench, small_cogvideox: Path, small_model: AnimateDiffModel
) -> None:
    found = {"ResnetBlock2D", "Transformer2DModel", "AnimateDiffTransformer3D"}
    assert kinds(small_model.denoiser) == kinds(bench.policy) == found
    cogvideox = load_small_cogvideox(small_cogvideox)
    assert kinds(cogvideox.denoiser) == {"CogVideoXBlock"}
    layers = len(cogvideox.denoiser.transformer_blocks)
    assert checkpoint_blocks(adapt(cogvideox, TrainSettings(rank=2), seed=0)) == layers


def test_a_stack_is_opened_and_a_single_layer_left_alone() -> None:
    def stack(depth: int) -> nn.Module:
        stack = nn.Module()
        stack.norm = nn.LayerNorm(4)
        stack.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)) for _ in range(depth)
        )
        return stack

    network = nn.Module()
    network.stages = nn.ModuleList([stack(1), stack(3), nn.Linear(4, 4)])
    assert [type(block).__name__ for block in blocks(network)] == ["Module", *["Sequential"] * 3]
    with pytest.raises(TrainingError, match=r"A Linear has no blocks.*checkpointing=none"):
        checkpoint_blocks(nn.Linear(4, 4))


@pytest.mark.parametrize("mode", ["joint", "split"])
def test_the_whole_step_is_the_same_on_a_transformer(
    small_cogvideox: Path, mode: MemoryMode
) -> None:
    bench = Bench(load_small_cogvideox(small_cogvideox))
    batch = a_batch(bench.model, FIRST)
    bench.policy.zero_grad()
    bench.plain(batch, Region())
    plain = bench.flat()
    assert plain.norm() > 0
    checkpoint_blocks(bench.policy)
    tolerance = 1e-6 if mode == "split" else 1e-3
    assert apart(plain, bench.gradient(mode, batch, Region())) < tolerance


def test_each_mode_holds_less(small_folder: Path) -> None:
    bench = Bench(load_small(small_folder))
    batch = a_batch(bench.model, FIRST)

    def activations(mode: MemoryMode) -> int:
        run = partial(bench.gradient, mode, batch, Global())
        return peak_bytes(run, networks=[bench.policy]).activations

    joint, split, linear = (activations(mode) for mode in ("joint", "split", "linear"))
    assert split < 0.6 * joint and linear < 0.6 * joint
    checkpoint_blocks(bench.policy)
    assert activations("joint") < 0.6 * joint
    assert activations("split") < 0.6 * split


def test_split_holds_no_more_for_a_larger_batch(bench: Bench) -> None:
    peaks = [
        peak_bytes(
            partial(bench.gradient, "split", a_batch(bench.model, *labels), Global()),
            networks=[bench.policy],
        ).activations
        for labels in ([FIRST], [FIRST, SECOND])
    ]
    assert peaks[1] < 1.1 * peaks[0]


# --- whole runs ------------------------------------------------------------------------------


def trained(
    folder: Path,
    store: PairStore,
    out: Path,
    loss: Loss,
    memory: MemorySettings,
    *,
    reference: Reference | None = None,
    steps: int = 2,
    resume: bool = False,
) -> list[StepReport]:
    settings = SETTINGS.model_copy(
        update={
            "steps": steps,
            "batch_size": 2,
            "gradient_accumulation_steps": 1,
            "learning_rate": 1e-4,
            "validation_videos": 0,
        }
    )
    progress = train(
        load_small(folder), store, loss, reference or Toggle(), settings, seed=0, out=out,
        accelerator=Accelerator(cpu=True), resume=resume, memory=memory,
    )  # fmt: skip
    return [step.report for step in progress]


def weights(out: Path) -> Tensor:
    file = load_file(latest_checkpoint(out) / "adapter" / "adapter_model.safetensors")
    return torch.cat([value.flatten() for _, value in sorted(file.items())])


@pytest.mark.parametrize("reference", [Toggle(), Cached(noise_draws=1)], ids=repr)
def test_runs_of_all_modes_report_the_same(
    small_folder: Path, small_model: AnimateDiffModel, tmp_path: Path, reference: Reference
) -> None:
    store = make_store(tmp_path / "pairs", small_model, pairs=3)
    run = partial(trained, small_folder, store, loss=Global(), reference=reference)
    plain = run(tmp_path / "plain", memory=MemorySettings())
    for backward in ("split", "linear"):
        memory = MemorySettings(
            backward=backward,
            checkpointing="blocks",
            forward_chunks=2,
            offload="checkpoints, optimizer",
        )
        reports = run(tmp_path / backward, memory=memory)
        assert reports[0].margin == 0
        for one, other in zip(plain, reports, strict=True):
            for name in ("loss", "grad_norm", "chosen_change", "rejected_change", "accuracy"):
                assert getattr(other, name) == pytest.approx(getattr(one, name), 1e-2, abs=1e-7)


def test_a_run_resumes_in_another_mode_and_exactly_in_its_own(
    small_folder: Path, small_model: AnimateDiffModel, tmp_path: Path
) -> None:
    store = make_store(tmp_path / "pairs", small_model, pairs=3)
    run = partial(trained, small_folder, store, loss=Region())
    split = MemorySettings(backward="split", checkpointing="blocks")
    run(tmp_path / "whole", memory=split)
    run(tmp_path / "same", memory=split, steps=1)
    shutil.copytree(tmp_path / "same", tmp_path / "other")
    run(tmp_path / "same", memory=split, resume=True)
    run(tmp_path / "other", memory=MemorySettings(), resume=True)
    whole = weights(tmp_path / "whole")
    assert torch.equal(whole, weights(tmp_path / "same"))
    assert 0 <= apart(whole, weights(tmp_path / "other")) < 1e-3
