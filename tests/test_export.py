"""What is exported does in other programs what the run's own denoiser does here."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from conftest import CPU, SHAPE
from diffusers import (
    AutoencoderKL,
    MotionAdapter,
    PNDMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UNetMotionModel,
)
from peft import LoraConfig, get_peft_model
from small_cogvideox import load_small_cogvideox, save_small_cogvideox
from small_wan import load_small_wan, save_small_wan
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from dpo_video.backbone.animatediff import AnimateDiff
from dpo_video.card import loading_script
from dpo_video.diffusion import initial_noise
from dpo_video.evaluate import merged
from dpo_video.export import Check, Format, export
from dpo_video.strategies import Sampling, VideoModel
from dpo_video.types import Publication

PROMPT = "a red square moving left slowly"
RANK, ALPHA = 2, 6.0  # not equal, so that a lost alpha shows
STEPS = 2


def save_small_sd(folder: Path, small_folder: Path) -> Path:
    """Stable Diffusion and a motion adapter, apart: how people come with AnimateDiff."""
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
    for module in adapter.modules():  # its own init leaves the motion modules without effect
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
    ).load(CPU, torch.float32)  # fmt: skip


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
        model.sampling = Sampling(steps=STEPS, guidance=2.0)
        return model

    def adapted(self) -> VideoModel:
        model = self.load()
        model.denoiser = merged(model, self.adapter)
        return model

    def export(self, format: str, out: Path, **options: Any) -> tuple[Check, str]:
        """Export, and the script of the card."""
        model = self.load()

        def card(publication: Publication, check: Check) -> str:
            if format == "comfyui":
                return ""
            return loading_script(
                model, publication, format=format, folder=out, adapted=check.adapted, prompt=PROMPT
            )

        check = export(
            model, self.adapter, Format(format), out, name="mine",
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


FAMILIES = ("animatediff", "cogvideox", "cogvideox 1.5", "wan", "wan a14b")


@pytest.fixture(scope="module")
def cases(small_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    made: dict[str, Case] = {}
    root = tmp_path_factory.mktemp("export")

    def case(family: str) -> Case:
        if family in made:
            return made[family]
        folder, latents = root / family.replace(" ", "-"), lambda noise: noise
        if family == "animatediff":
            save_small_sd(folder, small_folder)
            load_from: Callable[[Path], VideoModel] = load_small_sd
        elif family.startswith("cogvideox"):
            save_small_cogvideox(folder, "1.5" if "1.5" in family else "2b")
            load_from, latents = load_small_cogvideox, lambda noise: noise.transpose(1, 2)
        else:
            save_small_wan(folder, **({"boundary_ratio": 0.8} if "a14b" in family else {}))
            load_from = load_small_wan
        # Random VAEs of Wan show little of what is in the latents.
        scale = 5.0 if family.startswith("wan") else 1.0
        adapter = random_adapter(load_from(folder), root / f"adapter-{folder.name}", scale)
        made[family] = Case(folder=folder, load_from=load_from, adapter=adapter, latents=latents)
        return made[family]

    return case


def frames(model: VideoModel) -> Tensor:
    """What `dpo-video generate` draws, `[frames, height, width, 3]` in [0, 1]."""
    latents = model.sample(model.encode_prompts([PROMPT]), initial_noise(model, [0]))
    return model.decode_videos(latents)[0].permute(1, 2, 3, 0)


def run_script(script: str, noise: Tensor) -> Tensor:
    """The card's script with the noise of `generate` in the place of its generator."""
    script, count = re.subn(
        r"generator=torch\.Generator\(\)\.manual_seed\(0\)",
        'latents=noise, output_type="np"',  # pictures would be rounded
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


# --- the five lines of a newcomer --------------------------------------------------------------


@pytest.mark.parametrize("format", ["diffusers", "peft", "merged"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_cards_script_draws_what_generate_draws(
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
