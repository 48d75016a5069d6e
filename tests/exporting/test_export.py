"""An export predicts in other programs what the run's own denoiser predicts."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from conftest import SHAPE
from diffusers import (
    AutoencoderKL,
    MotionAdapter,
    PNDMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UNetMotionModel,
)
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from small_cogvideox import load_small_cogvideox, save_small_cogvideox
from small_single_files import save_motion_module, save_stable_diffusion, save_wan
from small_wan import load_small_wan, save_small_wan
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from dpo_video import registry
from dpo_video.backbone.animatediff import AnimateDiff
from dpo_video.diffusion.initial_noise import initial_noise
from dpo_video.errors import ExportError, RunError
from dpo_video.evaluation.adapter import put_on
from dpo_video.exporting.export import Check, export
from dpo_video.exporting.model_card import loading_script
from dpo_video.strategies import Sampling, VideoModel
from dpo_video.types import ExportSpec, Placement

PROMPT = "a red square moving left slowly"
RANK, ALPHA = 2, 6.0  # unequal, so that a lost alpha is noticed
STEPS = 2


def save_small_sd(folder: Path, small_folder: Path) -> Path:
    """Stable Diffusion and a separate motion adapter, the usual form of AnimateDiff."""
    unet = UNetMotionModel.from_pretrained(small_folder / "unet")
    torch.manual_seed(0)
    spatial = UNet2DConditionModel(
        sample_size=4,
        block_out_channels=(16, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=16,
        attention_head_dim=2,
        norm_num_groups=4,
    )
    StableDiffusionPipeline(
        vae=AutoencoderKL.from_pretrained(small_folder / "vae"),
        text_encoder=CLIPTextModel.from_pretrained(small_folder / "text_encoder"),
        tokenizer=CLIPTokenizer.from_pretrained(small_folder / "tokenizer"),
        unet=spatial,
        scheduler=PNDMScheduler(beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    adapter = MotionAdapter(
        block_out_channels=(16, 16),
        motion_layers_per_block=1,
        motion_num_attention_heads=2,
        motion_norm_num_groups=4,
        motion_max_seq_length=SHAPE.frames,
        use_motion_mid_block=False,
    )
    for module in adapter.modules():  # zero-initialised, they would have no effect
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.3)
    assert unet.config.motion_max_seq_length == SHAPE.frames
    adapter.save_pretrained(folder / "adapter")
    return folder


def load_small_sd(folder: Path) -> VideoModel:
    return AnimateDiff(
        model=str(folder),
        motion_adapter=str(folder / "adapter"),
        frames=SHAPE.frames, height=SHAPE.height, width=SHAPE.width,
    ).load(Placement())  # fmt: skip


def load_small_file(folder: Path) -> VideoModel:
    """As from the folder, with the weights in single files; a merged checkpoint has none."""
    file = folder / "model.safetensors"
    if not file.exists():
        wan = (folder / "transformer").exists()
        return load_small_wan(folder) if wan else load_small_sd(folder)
    if (folder / "transformer").exists():
        return load_small_wan(file, config=str(folder))
    return AnimateDiff(
        model=str(file), config=str(folder), motion_adapter=str(folder / "mm.safetensors"),
        motion_adapter_config=str(folder / "adapter"),
        frames=SHAPE.frames, height=SHAPE.height, width=SHAPE.width,
    ).load(Placement())  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Case:
    """A checkpoint, how it is loaded, and an adapter for it."""

    folder: Path
    load_from: Callable[[Path], VideoModel]
    adapter: Path
    latents: Callable[[Tensor], Tensor] = lambda noise: noise
    """Noise as the family's pipeline wants it."""

    def load(self) -> VideoModel:
        model = self.load_from(self.folder)
        model.sampling = Sampling(num_inference_steps=STEPS, guidance_scale=2.0)
        return model

    def adapted(self) -> VideoModel:
        model = self.load()
        model.denoiser = put_on(model, self.adapter)
        return model

    def export(self, format: str, out: Path, **options: Any) -> tuple[Check, str]:
        """Export, and the script of the card."""
        model = self.load()

        def card(spec: ExportSpec, check: Check) -> str:
            return loading_script(
                model,
                spec,
                format=registry.strategy("format", format),
                folder=out,
                adapted=check.adapted,
                prompt=PROMPT,
            )

        check = export(
            model, self.adapter, registry.strategy("format", format), out, name="mine",
            **{"card": card, "reload": self.load_from, **options},
        )  # fmt: skip
        return check, (out / "README.md").read_text()


def random_adapter(model: VideoModel, folder: Path, scale: float = 1.0) -> Path:
    """An adapter that does something, with all that PEFT writes."""
    torch.manual_seed(1)
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=model.lora_targets())
    policy = get_peft_model(model.denoiser, config)
    for name, parameter in policy.named_parameters():
        if ".lora_B" in name:
            parameter.data = scale * torch.randn_like(parameter)
    policy.save_pretrained(str(folder))
    return folder


@pytest.fixture(scope="module")
def cases(small_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    made: dict[str, Case] = {}
    root = tmp_path_factory.mktemp("export")

    def case(family: str) -> Case:
        if family in made:
            return made[family]
        folder, latents = root / family.replace(" ", "-"), lambda noise: noise
        if family.startswith("animatediff"):
            save_small_sd(folder, small_folder)
            load_from: Callable[[Path], VideoModel] = load_small_sd
            if "file" in family:
                save_stable_diffusion(folder, folder / "model.safetensors")
                save_motion_module(folder / "adapter", folder / "mm.safetensors")
        elif family.startswith("cogvideox"):
            save_small_cogvideox(folder, "1.5" if "1.5" in family else "2b")
            load_from, latents = load_small_cogvideox, lambda noise: noise.transpose(1, 2)
        else:
            save_small_wan(folder, **({"boundary_ratio": 0.8} if "a14b" in family else {}))
            load_from = load_small_wan
            if "file" in family:
                save_wan(folder / "transformer", folder / "model.safetensors")
        if "file" in family:
            load_from = load_small_file
        # Random VAEs of Wan show little of what is in the latents.
        scale = 5.0 if family.startswith("wan") else 1.0
        adapter = random_adapter(load_from(folder), root / f"adapter-{folder.name}", scale)
        made[family] = Case(folder=folder, load_from=load_from, adapter=adapter, latents=latents)
        return made[family]

    return case


def frames(model: VideoModel) -> Tensor:
    """The video of `dpo-video generate`, `[frames, height, width, 3]` in [0, 1]."""
    latents = model.sample(model.encode_prompts([PROMPT]), initial_noise(model, [0]))
    return model.decode_videos(latents)[0].permute(1, 2, 3, 0)


def run_script(script: str, noise: Tensor) -> Tensor:
    """Run the card's script with the noise of `generate` instead of its generator."""
    script, count = re.subn(
        r"generator=torch\.Generator\(\)\.manual_seed\(0\)",
        'latents=noise, output_type="np"',  # PIL images would be rounded
        script,
    )
    assert count == 1
    names: dict[str, Any] = {"noise": noise}
    exec(script, names)
    return torch.from_numpy(names["video"])


@pytest.fixture(autouse=True)
def no_progress_bars(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        diffusers.DiffusionPipeline, "_progress_bar_config", {"disable": True}, raising=False
    )


# --- the script of the model card --------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "format"),
    [
        *itertools.product(
            ("animatediff", "cogvideox", "wan a14b"), ("diffusers", "peft", "merged")
        ),
        *itertools.product(("cogvideox 1.5", "wan", "wan file"), ("diffusers",)),
        *itertools.product(("animatediff file",), ("diffusers", "merged")),
    ],
)
def test_the_cards_script_generates_the_same_video_as_generate(
    cases: Callable[[str], Case], family: str, format: str, tmp_path: Path
) -> None:
    case = cases(family)
    check, script = case.export(format, tmp_path / "out")
    assert check.change > 0.01 and check.difference < 1e-4
    tuned = case.adapted()
    ours = frames(tuned)
    theirs = run_script(script, case.latents(initial_noise(tuned, [0])))
    torch.testing.assert_close(theirs, ours, atol=1e-3, rtol=0)
    shown = (ours - frames(case.load())).abs().mean()
    assert shown > 100 * (ours - theirs).abs().mean()
    if format == "merged":
        again = replace(case, folder=tmp_path / "out").load()
        torch.testing.assert_close(frames(again), ours, atol=1e-3, rtol=0)


# --- ComfyUI -----------------------------------------------------------------------------------

# ComfyUI's CogVideoXBlock (comfy/ldm/cogvideo/model.py), in diffusers' names.
COMFY_COGVIDEOX = {
    "q": "attn1.to_q",
    "k": "attn1.to_k",
    "v": "attn1.to_v",
    "attn_out": "attn1.to_out.0",
}


def add_by_evolved(network: nn.Module, file: dict[str, Tensor]) -> None:
    """Patch motion modules as AnimateDiff-Evolved does, with the names of diffusers."""
    weights = dict(network.named_parameters())
    for key in [key for key in file if "up." not in key]:
        name = key.replace("processor.", "").replace("_lora", "").replace("down.", "")
        name = name.replace("to_out.", "to_out.0.")
        for theirs, ours in (
            (".attention_blocks.0", ".attn1"),
            (".attention_blocks.1", ".attn2"),
            (".temporal_transformer", ""),
        ):
            name = name.replace(theirs, ours)
        weights[name].data += file[key.replace(".down.", ".up.")] @ file[key]


def add_by_comfy(network: nn.Module, file: dict[str, Tensor]) -> None:
    """Patch CogVideoX as ComfyUI does: `lora_B @ lora_A`, without a scale if alpha is absent."""
    weights = dict(network.named_parameters())
    for key in [key for key in file if key.endswith(".lora_A.weight")]:
        stem = key.removesuffix(".lora_A.weight")
        _, _, block, layer = stem.split(".")
        weight = weights[f"transformer_blocks.{block}.{COMFY_COGVIDEOX[layer]}.weight"]
        weight.data += file[f"{stem}.lora_B.weight"] @ file[key]


def add_by_diffusers(network: nn.Module, file: dict[str, Tensor]) -> None:
    """Load by diffusers, which converts ComfyUI's files for Wan with its own table."""
    state = diffusers.WanPipeline.lora_state_dict(dict(file))
    network.load_lora_adapter(state, prefix="transformer")


READERS = {
    "animatediff": add_by_evolved,
    "cogvideox": add_by_comfy,
    "wan": add_by_diffusers,
    "wan a14b": add_by_diffusers,
}


@torch.no_grad()
def predicted(model: VideoModel) -> Tensor:
    timesteps = model.sample_timesteps(16, torch.Generator().manual_seed(0))
    noise = torch.randn(2, *model.latent_shape, generator=torch.Generator().manual_seed(0))
    timestep = torch.stack([timesteps.min(), timesteps.max()])
    return model.predict(model.denoiser, noise, timestep, model.encode_prompts([PROMPT, ""]))


@pytest.mark.parametrize("family", READERS)
def test_an_independent_reader_gets_the_same_update_from_a_comfyui_file(
    cases: Callable[[str], Case], family: str, tmp_path: Path
) -> None:
    case = cases(family)
    case.export("comfyui", tmp_path / "out")
    model = case.load()
    spec = model.export_spec()
    assert spec is not None
    bare = predicted(model)
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert [file.name for file in files] == (
        ["mine-transformer.safetensors", "mine-transformer_2.safetensors"]
        if "a14b" in family
        else ["mine.safetensors"]
    )
    for file, network in zip(files, spec.networks.values(), strict=True):
        READERS[family](network, load_file(file))
    wanted, found = predicted(case.adapted()), predicted(model)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert (wanted - bare).abs().max() > 0.01


# --- stored weights ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("format", "dtype"),
    [
        ("diffusers", torch.float16),
        ("peft", torch.bfloat16),
        ("comfyui", torch.bfloat16),
        ("merged", torch.float16),
    ],
)
def test_weights_are_stored_in_the_requested_precision(
    cases: Callable[[str], Case], format: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    check, _ = cases("wan").export(format, tmp_path / "out", dtype=dtype)
    folder = tmp_path / "out" / ("transformer" if format == "merged" else "")
    (file,) = folder.glob("*.safetensors")
    stored = {name: tensor.dtype for name, tensor in load_file(file).items()}
    kept = {name for name, kind in stored.items() if kind != dtype}
    # diffusers keeps some modules in fp32.
    assert all("norm" in name or "time_embedder" in name or "table" in name for name in kept)
    assert len(kept) < len(stored) and (format == "merged" or not kept)
    assert 0 < check.difference < 32 * torch.finfo(dtype).eps


def test_rank_and_alpha_survive(cases: Callable[[str], Case], tmp_path: Path) -> None:
    case = cases("animatediff")
    case.export("peft", tmp_path / "peft")
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (RANK, ALPHA)
    case.export("diffusers", tmp_path / "diffusers")
    own = load_file(case.adapter / "adapter_model.safetensors")
    written = load_file(tmp_path / "diffusers" / "pytorch_lora_weights.safetensors")
    assert len(own) == len(written)
    for key, tensor in own.items():
        scale = ALPHA / RANK if "lora_B" in key else 1.0
        found = written[key.replace("base_model.model.", "unet.")]
        torch.testing.assert_close(found, scale * tensor)


def test_only_the_expert_that_was_trained_is_exported(
    cases: Callable[[str], Case], tmp_path: Path
) -> None:
    both = cases("wan a14b")

    def load(folder: Path) -> VideoModel:
        return load_small_wan(folder, experts="low")

    adapter = random_adapter(load(both.folder), tmp_path / "adapter")
    case = replace(both, load_from=load, adapter=adapter)
    check, script = case.export("diffusers", tmp_path / "out")
    assert check.adapted == ("transformer_2",)
    assert [path.name for path in (tmp_path / "out").iterdir() if path.is_dir()] == [
        "transformer_2"
    ]
    assert script.count("load_lora_weights") == script.count("load_into_transformer_2=True") == 1


# --- refused exports ------------------------------------------------------------------------


def entries(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_merged_checkpoint_that_is_another_model_is_refused(
    cases: Callable[[str], Case], tmp_path: Path
) -> None:
    case = cases("wan")
    with pytest.raises(ExportError, match=r"predicts something else .* Nothing was exported"):
        case.export("merged", tmp_path / "out", reload=lambda folder: case.load())
    assert entries(tmp_path) == []


def test_a_checkpoint_that_does_not_load_is_refused(
    cases: Callable[[str], Case], tmp_path: Path
) -> None:
    case = cases("wan")

    def reload(folder: Path) -> VideoModel:
        (folder / "transformer" / "config.json").write_text('{"num_layers": 1}')
        return case.load_from(folder)

    with pytest.raises(ExportError, match=r"does not load back .* Nothing was exported"):
        case.export("merged", tmp_path / "out", reload=reload)
    assert entries(tmp_path) == []


def test_half_precision_is_refused_where_rounding_would_remove_the_update(
    cases: Callable[[str], Case], tmp_path: Path
) -> None:
    wan = cases("wan")
    lost = replace(wan, adapter=random_adapter(wan.load(), tmp_path / "adapter", scale=1e-6))
    with pytest.raises(ExportError, match=r"to bfloat16 makes an error of \d+% .* --dtype fp32"):
        lost.export("merged", tmp_path / "half", dtype=torch.bfloat16)
    assert not (tmp_path / "half").exists()
    assert lost.export("merged", tmp_path / "whole")[0].rounded < 1e-1
    stored = load_file(next((tmp_path / "whole" / "transformer").glob("*.safetensors")))
    base = load_file(next((wan.folder / "transformer").glob("*.safetensors")))
    assert {tensor.dtype for tensor in stored.values()} == {torch.float32}
    assert any(not torch.equal(stored[name], base[name]) for name in base)
    shares = [
        wan.export("merged", tmp_path / str(dtype), dtype=dtype)[0].rounded
        for dtype in (torch.float32, torch.float16, torch.bfloat16)
    ]
    assert 0 < shares[0] < 1e-6 < shares[1] < shares[2] < 0.01
    assert shares[2] == pytest.approx(8 * shares[1], rel=0.2)  # three bits less


def test_a_diverged_adapter_is_refused(cases: Callable[[str], Case], tmp_path: Path) -> None:
    case = cases("wan")
    broken = random_adapter(case.load(), tmp_path / "adapter", scale=math.nan)
    with pytest.raises(ExportError, match=r"not finite: .* earlier checkpoint \(--checkpoint N\)"):
        replace(case, adapter=broken).export("diffusers", tmp_path / "out")
    assert entries(tmp_path) == ["adapter"]


def test_numbers_too_small_for_their_precision_are_refused(
    cases: Callable[[str], Case], tmp_path: Path
) -> None:
    both = cases("wan")
    tiny = random_adapter(both.load(), tmp_path / "adapter", scale=1e-8)
    case = replace(both, adapter=tiny)
    with pytest.raises(ExportError, match=r"update of 'blocks.0.* --dtype fp32"):
        case.export("comfyui", tmp_path / "out", dtype=torch.float16)
    assert entries(tmp_path) == ["adapter"]
    case.export("comfyui", tmp_path / "out", dtype=torch.bfloat16)


def test_an_adapter_that_changes_nothing_can_be_exported(
    cases: Callable[[str], Case], tmp_path: Path
) -> None:
    both = cases("wan")
    case = replace(both, adapter=random_adapter(both.load(), tmp_path / "adapter", scale=0.0))
    check, _ = case.export("diffusers", tmp_path / "out")
    assert check.change == check.difference == 0


def test_a_card_that_cannot_be_written_leaves_nothing(
    cases: Callable[[str], Case], tmp_path: Path
) -> None:
    def card(spec: ExportSpec, check: Check) -> str:
        raise KeyError("steps")

    with pytest.raises(KeyError):
        cases("wan").export("diffusers", tmp_path / "out", card=card)
    assert entries(tmp_path) == []


def test_an_existing_folder_is_not_overwritten(
    cases: Callable[[str], Case], tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(RunError, match="exists already"):
        cases("wan").export("diffusers", tmp_path / "out")


def test_an_adapter_of_another_backbone_is_refused(
    cases: Callable[[str], Case], tmp_path: Path
) -> None:
    case = replace(cases("wan"), adapter=cases("cogvideox").adapter)
    with pytest.raises(RunError, match="does not fit this backbone"):
        case.export("diffusers", tmp_path / "out")
    assert entries(tmp_path) == []


def test_a_module_that_comfyui_lacks_is_an_error(
    cases: Callable[[str], Case], tmp_path: Path
) -> None:
    both = cases("wan")
    model = both.load()
    policy = get_peft_model(model.denoiser, LoraConfig(r=2, target_modules=["proj_out"]))
    policy.save_pretrained(str(tmp_path / "adapter"))
    with pytest.raises(
        ExportError,
        match=r"adapted module 'proj_out'.* --format diffusers or merged",
    ):
        replace(both, adapter=tmp_path / "adapter").export("comfyui", tmp_path / "out")
    assert entries(tmp_path) == ["adapter"]
