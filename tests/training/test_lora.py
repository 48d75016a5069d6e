"""Options of a new adapter, and a LoRA to start from."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from conftest import SHAPE, load_small
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from small_training import SETTINGS, make_store
from torch import Tensor, nn

from dpo_video.backbone.animatediff import AnimateDiffModel
from dpo_video.errors import TrainingError, UserError
from dpo_video.evaluation.adapter import put_on
from dpo_video.loss.region import Region
from dpo_video.reference.cached import Cached
from dpo_video.reference.copy import Copy
from dpo_video.reference.toggle import Toggle
from dpo_video.settings import MemorySettings, TrainSettings
from dpo_video.strategies import Reference
from dpo_video.training.adapter_config import read_lora_config
from dpo_video.training.foreign_lora import peft_adapter
from dpo_video.training.lora import adapt, check_lora, starting_rank
from dpo_video.training.run import train
from dpo_video.training.run_dir import latest_checkpoint
from dpo_video.workflows.estimate import with_starting_rank
from dpo_video.workflows.options import configure


def prediction(model: AnimateDiffModel, network: nn.Module) -> Tensor:
    noisy = torch.randn(1, *model.latent_shape, generator=torch.Generator().manual_seed(4))
    context = model.encode_prompts(["a red square moving left slowly"])
    with torch.no_grad():
        return model.predict(network, noisy, torch.tensor([500.0]), context)


def moved(policy: nn.Module, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in policy.named_parameters():
        if ".lora_B" in name:
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)


@pytest.fixture(scope="module")
def lora(small_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA of the small model with two ranks, in PEFT's format."""
    folder = tmp_path_factory.mktemp("lora")
    lora = {"rank_pattern": {"to_q": 3}, "alpha_pattern": {"to_q": 5.0}}
    policy = adapt(load_small(small_folder), TrainSettings(rank=2, alpha=6, lora=lora), 0)
    moved(policy)
    policy.save_pretrained(folder)
    return folder


# --- options of LoraConfig ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["to_q", "to_v"], "rank_pattern": {r".*up_blocks.*to_q": 3}},
        {"use_rslora": True, "exclude_modules": ["to_k"], "alpha_pattern": {"to_q": 5.0}},
        {"use_dora": True, "init_lora_weights": "gaussian"},
    ],
    ids=str,
)
def test_options_of_peft_are_passed_through_and_read_back(
    small_folder: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    model = load_small(small_folder)
    bare = prediction(model, model.denoiser)
    settings = TrainSettings(rank=2, alpha=6, lora=options)
    policy = adapt(model, settings, 0)
    reference = Toggle().attach(policy)
    assert torch.equal(prediction(model, policy), bare)
    moved(policy)
    with reference.network() as network:
        assert torch.equal(prediction(model, network), bare)
    expected = prediction(model, policy)
    assert not torch.equal(expected, bare)
    policy.save_pretrained(tmp_path)
    read = read_lora_config(tmp_path / "adapter_config.json")
    assert read.use_rslora == options.get("use_rslora", False)
    assert ({"rank_pattern", "alpha_pattern"} & options.keys() == set()) == (
        not read.rank_pattern and not read.alpha_pattern
    )
    assert read.target_modules is not None
    assert all("to_k" not in name for name in read.target_modules) == (not read.use_dora)
    again = load_small(small_folder)
    torch.testing.assert_close(prediction(again, put_on(again, tmp_path)), expected)


def test_every_option_of_peft_is_possible_or_refused_with_a_reason() -> None:
    possible = 0
    for name in LoraConfig.__dataclass_fields__:
        try:
            check_lora(TrainSettings(lora={name: {}}), MemorySettings())
        except UserError as error:
            possible += "is not possible here" not in str(error) and "is set by" not in str(error)
        else:
            possible += 1
    assert possible == 9


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 8}, r"train\.lora\.r is set by train\.rank"),
        ({"lora_dropout": 0.1}, "dropout makes the policy differ"),
        ({"bias": "all"}, "trains weights of the base model"),
        ({"megatron_core": "os"}, "could not be read back"),
        ({"use_dorra": True}, r"use_dora"),
        ({"use_dora": "yes"}, "neither true nor false"),
        ({"init_lora_weights": "pissa"}, "change the base model"),
        ({"init_lora_weights": False}, "change the base model"),
        ({"rank_pattern": {"to_q": 0}}, "no table of names"),
        ({"alpha_pattern": {"to_q": "x"}}, "no table of names"),
        ({"target_modules": ["to_x"]}, "does not fit this model .*to_x"),
        ({"target_modules": ["conv1"]}, "'.*conv1', which is no linear layer"),
        ({"layers_pattern": "blocks", "target_modules": ["to_q"]}, "peft refuses|does not fit"),
    ],
    ids=str,
)
def test_options_that_contradict_the_reference_are_refused(
    small_folder: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        adapt(load_small(small_folder), TrainSettings(lora=options), 0)
    assert "\n" not in str(caught.value)


def test_combinations_are_refused_before_anything_is_loaded(lora: Path) -> None:
    dora = TrainSettings(lora={"use_dora": True})
    check_lora(dora, MemorySettings(checkpointing="blocks", offload=("optimizer",)))
    for memory in ({"quantization": "int8"}, {"compile": "on"}, {"shard": 2}):
        with pytest.raises(UserError, match=rf"use_dora .*memory\.{next(iter(memory))}"):
            check_lora(dora, MemorySettings(**memory))
    with pytest.raises(UserError, match=r"use_dora .*train\.mixed_precision=bf16"):
        check_lora(dora.model_copy(update={"mixed_precision": "bf16"}), MemorySettings())
    with pytest.raises(UserError, match=r"train\.lora describes a new adapter"):
        check_lora(dora.model_copy(update={"init_from": str(lora)}), MemorySettings())


def test_a_second_adapter_is_refused(small_model: AnimateDiffModel, lora: Path) -> None:
    adapt(small_model, SETTINGS, 0)
    with pytest.raises(TrainingError, match="has an adapter already"):
        adapt(small_model, SETTINGS, 0)


# --- a LoRA to start from ----------------------------------------------------------------------


def test_policy_and_reference_start_from_the_lora(
    small_folder: Path, lora: Path, tmp_path: Path
) -> None:
    merged = load_small(small_folder)
    expected = prediction(merged, put_on(merged, lora))
    settings = starting_rank(SETTINGS.model_copy(update={"init_from": str(lora)}), merged)
    assert (settings.rank, settings.alpha) == (2, 6)
    for reference in (Toggle(), Copy(), Cached()):
        model = load_small(small_folder)
        policy = adapt(model, settings, 0)
        attached = reference.attach(policy)
        start = prediction(model, policy)
        torch.testing.assert_close(start, expected)
        moved(policy, seed=5)
        trained = prediction(model, policy)
        with attached.network() as network:
            assert torch.equal(prediction(model, network), start)
        assert torch.equal(prediction(model, policy), trained)
        assert not torch.equal(trained, start)


def test_an_estimate_counts_the_rank_of_the_lora(small_folder: Path, lora: Path) -> None:
    backbone = {"backbone.model": str(small_folder), "backbone.frames": SHAPE.frames}
    options: Any = {"set": {**backbone, "train.init_from": str(lora)}}
    config = configure("train", {"backbone": "animatediff", **options}, None)
    train = with_starting_rank(config).train
    assert (train.rank, train.alpha) == (2, 6)


def adapters(small_folder: Path, out: Path, settings: TrainSettings, reference: Reference) -> Any:
    store = make_store(out.parent / "pairs", load_small(small_folder))
    events = train(
        load_small(small_folder), store, Region(), reference, settings, seed=0, out=out,
        accelerator=Accelerator(cpu=True),
    )  # fmt: skip
    reports = [event.report for event in events]
    return reports, load_file(latest_checkpoint(out) / "adapter" / "adapter_model.safetensors")


def test_a_run_from_a_lora_has_one_adapter_and_the_same_bytes_with_every_reference(
    small_folder: Path, lora: Path, tmp_path: Path
) -> None:
    settings = SETTINGS.model_copy(update={"init_from": str(lora), "steps": 2})
    found = [
        adapters(small_folder, tmp_path / name / "run", settings, reference)
        for name, reference in (("toggle", Toggle()), ("copy", Copy()), ("cached", Cached()))
    ]
    reports, weights = found[0]
    assert reports[0].margin == 0 and reports[1].margin != 0
    started = load_file(lora / "adapter_model.safetensors")
    kept = load_file(tmp_path / "toggle" / "run" / "start" / "adapter_model.safetensors")
    assert weights.keys() == kept.keys() == started.keys()
    assert all(torch.equal(value, started[name]) for name, value in kept.items())
    for others, same in found[1:]:
        assert [each.loss for each in others] == [each.loss for each in reports]
        assert all(torch.equal(value, same[name]) for name, value in weights.items())
    # Predictions of a reference with another start, or without one, are not those of this cache.
    plain = SETTINGS.model_copy(update={"steps": 1})
    adapters(small_folder, tmp_path / "cached" / "plain", plain, Cached())
    assert len(list((tmp_path / "cached" / "pairs" / "reference_cache").iterdir())) == 2


def test_what_is_no_lora_of_this_model_is_refused(
    small_folder: Path, lora: Path, tmp_path: Path
) -> None:
    def refused(source: Path, message: str) -> None:
        settings = SETTINGS.model_copy(update={"init_from": str(source)})
        with pytest.raises((UserError, Exception), match=message):
            adapt(load_small(small_folder), settings, 0)

    refused(tmp_path / "none", "There is no LoRA")
    several = tmp_path / "several"
    shutil.copytree(lora, several)
    shutil.copytree(lora, several / "style")
    refused(several, r"several adapters \(in style\).*train\.init_from=.*/style")
    broken = tmp_path / "broken"
    shutil.copytree(lora, broken)
    weights = load_file(lora / "adapter_model.safetensors")
    weights[next(iter(weights))].fill_(float("nan"))
    save_file(weights, broken / "adapter_model.safetensors", {"format": "pt"})
    refused(broken, "is not finite")
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes((lora / "adapter_model.safetensors").read_bytes()[:500])
    refused(cut, "is damaged .* Copy or download it again")
    (tmp_path / "run" / "checkpoints" / "step_000002" / "adapter").mkdir(parents=True)
    refused(tmp_path / "run", "is a run. Name its adapter: .*step_000002/adapter")


def test_a_foreign_lora_of_several_ranks_is_read(
    small_folder: Path, lora: Path, tmp_path: Path
) -> None:
    config = read_lora_config(lora / "adapter_config.json")
    ranks, alphas = config.rank_pattern, config.alpha_pattern
    foreign = {}
    for key, value in load_file(lora / "adapter_model.safetensors").items():
        name = key.removeprefix("base_model.model.")
        module = name.split(".lora_")[0]
        scale = alphas.get(module, config.lora_alpha) / ranks.get(module, config.r)
        foreign[f"unet.{name}"] = value * (scale if ".lora_B" in name else 1.0)
    save_file(foreign, tmp_path / "foreign.safetensors", {"format": "pt"})
    model = load_small(small_folder)
    found = peft_adapter(str(tmp_path / "foreign.safetensors"), model, tmp_path / "adapter")
    again = load_small(small_folder)
    torch.testing.assert_close(
        prediction(model, put_on(model, found)), prediction(again, put_on(again, lora))
    )
