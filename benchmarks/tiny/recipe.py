"""Training of the embedded model from random weights: `python -m benchmarks.tiny.recipe`.

The stages are AnimateDiff's (Guo et al. 2023, arXiv 2307.04725): an autoencoder on frames; the text
encoder and the spatial layers on single pictures; the motion modules alone on video. As there, the
pictures are cleaner than the video: the footage flickers (`flicker`), so the motion modules
learn to flicker, which preference optimization can undo. Every stage saves its state and resumes.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import (
    AnimateDiffPipeline,
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    MotionAdapter,
    UNet2DConditionModel,
    UNetMotionModel,
)
from jaxtyping import Float
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from dpo_video.support.atomic import write_tensors
from dpo_video.support.tensor_tree import load_state, save_state
from dpo_video.tiny import WEIGHTS
from dpo_video.tiny import scenes as world

TEXT_LENGTH = 24  # tokens; the longest caption has 12, including start and end
WIDTHS = (64, 96, 96)
SCHEDULE = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="linear")  # AnimateDiff's
CAPTION_DROPOUT = 0.12  # fraction of empty captions, for classifier-free guidance
FLICKER = 0.15  # standard deviation of the flicker's gain where its envelope is 1
SNR_CAP = 5.0  # min-SNR weighting, Hang et al. 2023, arXiv 2303.09556


# --- the networks ---------------------------------------------------------------------------


def new_vae() -> AutoencoderKL:
    """An autoencoder at 1/4 resolution with four latent channels."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(32, 64, 64),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        mid_block_add_attention=False,
        sample_size=world.SIZE,
    )


def new_text_encoder(vocabulary: int) -> CLIPTextModel:
    """A two-layer CLIP text encoder."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=vocabulary,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=TEXT_LENGTH,
            projection_dim=64,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
        )
    )


def new_unet() -> UNet2DConditionModel:
    """The spatial layers, with cross-attention to the text on the 8x8 and 4x4 grids."""
    return UNet2DConditionModel(
        sample_size=world.SIZE // 4,
        in_channels=4,
        out_channels=4,
        block_out_channels=WIDTHS,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=64,
        attention_head_dim=4,
        norm_num_groups=16,
    )


def new_motion_adapter() -> MotionAdapter:
    """Motion modules with a zero output layer, so that they start as the identity."""
    adapter = MotionAdapter(
        block_out_channels=WIDTHS,
        motion_layers_per_block=1,
        motion_num_attention_heads=4,
        motion_norm_num_groups=16,
        motion_max_seq_length=world.FRAMES,
        use_motion_mid_block=False,
    )
    for name, parameter in adapter.named_parameters():
        if ".proj_out." in name:
            nn.init.zeros_(parameter)
    return adapter


def new_tokenizer() -> CLIPTokenizer:
    """A byte-pair tokenizer in which every word of the captions is one token."""
    corpus = world.all_captions()
    letters = sorted({letter for letter in "abcdefghijklmnopqrstuvwxyz"})
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token="<|endoftext|>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    specials = ["<|startoftext|>", "<|endoftext|>"]
    alphabet = [*specials, *letters, *(f"{letter}</w>" for letter in letters)]
    trainer = trainers.BpeTrainer(
        vocab_size=1000, special_tokens=alphabet, end_of_word_suffix="</w>", show_progress=False
    )
    tokenizer.train_from_iterator(corpus, trainer)
    trained = json.loads(tokenizer.to_str())["model"]
    merges = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in trained["merges"]]
    return CLIPTokenizer(vocab=trained["vocab"], merges=merges, model_max_length=TEXT_LENGTH)


# --- training -------------------------------------------------------------------------------


class Stage:
    """Loop of one stage: warm-up, cosine decay, averaged weights, periodic checkpoints."""

    def __init__(
        self, name: str, network: nn.Module, *, steps: int, rate: float, work: Path
    ) -> None:
        self.name, self.network, self.steps, self.rate = name, network, steps, rate
        self.path = work / f"{name}.safetensors"
        self.parameters = [p for p in network.parameters() if p.requires_grad]
        self.average = [p.detach().clone() for p in self.parameters]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=rate, weight_decay=1e-4)
        self.done = 0

    def run(self, loss_at: Callable[[int, torch.Generator], Tensor], save_every: int = 250) -> None:
        """Train to the last step, then load the averaged weights into the network."""
        if self.path.exists():
            self._restore()
        started, first, recent = time.monotonic(), self.done, 0.0
        for step in range(self.done, self.steps):
            # Seeded per step, so that a resumed run draws the same as an uninterrupted one.
            loss = loss_at(step, torch.Generator().manual_seed(1_000_003 * len(self.name) + step))
            for group in self.optimizer.param_groups:
                group["lr"] = self.rate * _schedule(step, self.steps)
            loss.backward()
            nn.utils.clip_grad_norm_(self.parameters, 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()
            decay = min(0.999, (1 + step) / (10 + step))
            torch._foreach_lerp_(self.average, [p.detach() for p in self.parameters], 1 - decay)
            recent = 0.98 * recent + 0.02 * loss.item() if step > first else loss.item()
            self.done = step + 1
            if self.done % save_every == 0 or self.done == self.steps:
                self._save()
                rate = (time.monotonic() - started) / (self.done - first)
                minutes = (self.steps - self.done) * rate / 60
                print(f"{self.name} {self.done}/{self.steps} loss {recent:.5f} "
                      f"{rate:.3f} s/step, {minutes:.0f} min left", flush=True)  # fmt: skip
        with torch.no_grad():
            for parameter, average in zip(self.parameters, self.average, strict=True):
                parameter.copy_(average)

    def _save(self) -> None:
        state = {
            "done": self.done,
            "optimizer": self.optimizer.state_dict(),
            "average": self.average,
            "parameters": [p.detach() for p in self.parameters],
        }
        save_state(self.path, state)

    def _restore(self) -> None:
        state = load_state(self.path)
        self.done = state["done"]
        self.optimizer.load_state_dict(state["optimizer"])
        for parameter, stored in zip(self.parameters, state["parameters"], strict=True):
            parameter.data.copy_(stored)
        self.average = [
            average.to(p.device)
            for average, p in zip(state["average"], self.parameters, strict=True)
        ]


def _schedule(step: int, steps: int, warmup: int = 200) -> float:
    if step < warmup:
        return (step + 1) / warmup
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def flicker(
    n: int, generator: torch.Generator, frames: int = world.FRAMES
) -> Float[Tensor, "n F 1 64 64"]:
    """Gains that make clips flicker: multiply frames by them, then clamp to [0, 1].

    Soft blotches of light, independent per frame, under an envelope that is smooth in space and
    time and zero in half of the clip, so that a part of a video flickers for a while.
    """
    blotches = F.interpolate(
        torch.randn(n * frames, 1, 4, 4, generator=generator),
        size=(world.SIZE, world.SIZE),
        mode="bicubic",
    )
    envelope = F.interpolate(
        torch.randn(n, 1, 4, 3, 3, generator=generator),
        size=(frames, world.SIZE, world.SIZE),
        mode="trilinear",
        align_corners=True,
    )
    return 1 + FLICKER * envelope.clamp(min=0).transpose(1, 2) * blotches.unflatten(0, (n, frames))


def _crops(n: int, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Frames for the autoencoder and weights per pixel: shapes, and dead leaves for robustness."""
    drawn = world.draw_scenes(n, generator)
    frame = torch.randint(world.FRAMES, (n, 1), generator=generator)
    middle = drawn.center.gather(1, frame[..., None].expand(-1, -1, 2))
    offset = (torch.rand(n, 1, 2, generator=generator) - 0.5) * size
    origin = (middle - size / 2 + offset).clamp(0, world.SIZE - size).round()
    images = world.render(drawn, frame, origin, size)[:, 0]
    leaves = n // 5
    images[:leaves] = _dead_leaves(leaves, size, generator)
    # Outlines are few pixels, which an L1 loss alone neglects: increase their weight.
    edges = F.max_pool2d(_gradient(images).abs().amax(dim=1, keepdim=True), 3, stride=1, padding=1)
    return images, 1 + 4 * (edges > 0.08).float()


def _dead_leaves(n: int, size: int, generator: torch.Generator) -> Tensor:
    """Overlapping discs of random color and texture, with the statistics of natural images."""
    images = torch.rand(n, 3, 1, 1, generator=generator).expand(-1, -1, size, size).clone()
    axis = torch.arange(size) + 0.5
    for _ in range(24):
        radius = 2 + 0.4 * size * torch.rand(n, 1, 1, generator=generator) ** 2
        x, y = size * torch.rand(2, n, 1, 1, generator=generator)
        inside = ((axis[None, None] - x) ** 2 + (axis[None, :, None] - y) ** 2).sqrt()
        alpha = (radius - inside + 0.5).clamp(0, 1)[:, None]
        images = torch.lerp(
            images, torch.rand(n, 3, 1, 1, generator=generator).expand_as(images), alpha
        )
    strength = 0.06 * torch.rand(n, 1, 1, 1, generator=generator)
    coarse = torch.randn(n, 3, size // 2, size // 2, generator=generator)
    return (images + strength * F.interpolate(coarse, scale_factor=2, mode="bilinear")).clamp(0, 1)


def _gradient(images: Tensor) -> Tensor:
    right = F.pad(images[..., :, 1:] - images[..., :, :-1], (0, 1, 0, 0))
    below = F.pad(images[..., 1:, :] - images[..., :-1, :], (0, 0, 0, 1))
    return torch.cat([right, below], dim=1)


def train_vae(work: Path, device: torch.device, steps: int) -> AutoencoderKL:
    """Stage 1, the autoencoder: L1 weighted at outlines, L1 of the gradient, a small KL term."""
    torch.manual_seed(0)
    vae = new_vae().to(device, memory_format=torch.channels_last)
    finish = int(0.75 * steps)  # crops are cheap; the last steps use full size, for the group norms

    def loss_at(step: int, generator: torch.Generator) -> Tensor:
        n, size = (32, 32) if step < finish else (12, world.SIZE)
        images, weight = (t.to(device) for t in _crops(n, size, generator))
        target = (2 * images - 1).contiguous(memory_format=torch.channels_last)
        posterior = vae.encode(target).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator).to(device)
        output = vae.decode(posterior.mean + posterior.std * noise).sample
        error = (weight * (output - target).abs()).mean() / weight.mean()
        sharpness = (_gradient(output) - _gradient(target)).abs().mean()
        return error + 0.5 * sharpness + 2e-4 * posterior.kl().mean() / posterior.mean[0].numel()

    Stage("vae", vae, steps=steps, rate=1.5e-3, work=work).run(loss_at)
    return vae.eval().requires_grad_(False)


@torch.no_grad()
def encode_pictures(
    work: Path, vae: AutoencoderKL, device: torch.device, clips: int
) -> tuple[Tensor, list[str]]:
    """Stage 2: standardized latents of clean clips, `[clips, 4, 16, 16, 16]`, and their captions.

    Sets the autoencoder's scaling factor, which standardizes them.
    """
    path = work / "pictures.safetensors"
    latents, captions = _encoded(path, vae, device, clips, seed=10_000_000, flickers=False)
    # One factor for all channels, as in every latent diffusion model (unit variance overall).
    varying = latents.float()
    factor = 1 / (varying - varying.mean(dim=(0, 2, 3, 4), keepdim=True)).std()
    vae.register_to_config(scaling_factor=float(factor))
    return latents * factor, captions


@torch.no_grad()
def encode_footage(
    work: Path, vae: AutoencoderKL, device: torch.device, clips: int
) -> tuple[Tensor, list[str]]:
    """Stage 2, for the motion modules: scaled latents of flickering clips, and their captions."""
    path = work / "footage.safetensors"
    latents, captions = _encoded(path, vae, device, clips, seed=20_000_000, flickers=True)
    return latents * vae.config.scaling_factor, captions


def _encoded(
    path: Path, vae: AutoencoderKL, device: torch.device, clips: int, *, seed: int, flickers: bool
) -> tuple[Tensor, list[str]]:
    captions: list[str] = []
    parts = []
    stored = load_file(path)["latents"] if path.exists() else None
    for start in range(0, clips, 20):
        generator = torch.Generator().manual_seed(seed + start)
        drawn = world.draw_scenes(20, generator)
        captions += drawn.captions()
        if stored is None:
            if start % 500 == 0:
                print(f"{path.stem} {start}/{clips}", flush=True)
            videos = world.render(drawn)
            if flickers:
                videos = (videos * flicker(20, generator)).clamp(0, 1)
            frames = videos.flatten(0, 1).to(device)
            latents = vae.encode(2 * frames - 1).latent_dist.mean
            parts.append(latents.unflatten(0, (20, -1)).transpose(1, 2).cpu().half())
    if stored is None:
        stored = torch.cat(parts)
        write_tensors(path, {"latents": stored})
    return stored, captions


def _noisy(
    latents: Tensor, generator: torch.Generator, alphas: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Noisy latents, noise, timesteps, and the min-SNR weights of the epsilon loss."""
    noise = torch.randn(latents.shape, generator=generator).to(latents.device)
    steps = torch.randint(len(alphas), (len(latents),), generator=generator).to(latents.device)
    alpha = alphas.to(latents.device)[steps].view(-1, *(1,) * (latents.ndim - 1))
    snr = alpha / (1 - alpha)
    return (
        alpha.sqrt() * latents + (1 - alpha).sqrt() * noise,
        noise,
        steps,
        snr.clamp(max=SNR_CAP) / snr,
    )


class TextAndImage(nn.Module):
    """The two networks that stage 3 trains jointly."""

    def __init__(self, text_encoder: CLIPTextModel, unet: UNet2DConditionModel) -> None:
        super().__init__()
        self.text_encoder, self.unet = text_encoder, unet


def tokenize(tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    """Token ids, padded to the encoder's length."""
    batch = tokenizer(
        captions, padding="max_length", truncation=True, max_length=TEXT_LENGTH, return_tensors="pt"
    )
    return batch["input_ids"]


def _drop(captions: list[str], generator: torch.Generator) -> list[str]:
    keep = torch.rand(len(captions), generator=generator) >= CAPTION_DROPOUT
    return [caption if kept else "" for caption, kept in zip(captions, keep, strict=True)]


def train_frames(
    work: Path, device: torch.device, data: Tensor, captions: list[str], steps: int
) -> tuple[CLIPTokenizer, TextAndImage]:
    """Stage 3: text encoder and spatial layers, on single frames."""
    torch.manual_seed(1)
    tokenizer = new_tokenizer()
    networks = TextAndImage(new_text_encoder(len(tokenizer)), new_unet()).to(device)
    networks.unet.to(memory_format=torch.channels_last)
    alphas = DDPMScheduler(**SCHEDULE).alphas_cumprod

    def loss_at(step: int, generator: torch.Generator) -> Tensor:
        clip = torch.randint(len(data), (64,), generator=generator)
        frame = torch.randint(data.shape[2], (64,), generator=generator)
        latents = data[clip, :, frame].float().to(device)
        noisy, noise, timesteps, weight = _noisy(latents, generator, alphas)
        text = tokenize(tokenizer, _drop([captions[i] for i in clip], generator)).to(device)
        context = networks.text_encoder(text).last_hidden_state
        output = networks.unet(
            noisy.contiguous(memory_format=torch.channels_last), timesteps, context
        ).sample
        return (weight * (output - noise).square()).mean()

    Stage("frames", networks, steps=steps, rate=1e-3, work=work).run(loss_at)
    return tokenizer, networks.eval().requires_grad_(False)


def train_motion(
    work: Path,
    device: torch.device,
    data: Tensor,
    captions: list[str],
    tokenizer: CLIPTokenizer,
    networks: TextAndImage,
    steps: int,
) -> UNetMotionModel:
    """Stage 4: the motion modules alone, on clips."""
    torch.manual_seed(2)
    unet = UNetMotionModel.from_unet2d(networks.unet, new_motion_adapter()).to(device)
    unet.requires_grad_(False)
    for name, parameter in unet.named_parameters():
        parameter.requires_grad_("motion_modules" in name)
    alphas = DDPMScheduler(**SCHEDULE).alphas_cumprod

    def loss_at(step: int, generator: torch.Generator) -> Tensor:
        clip = torch.randint(len(data), (4,), generator=generator)
        noisy, noise, timesteps, weight = _noisy(data[clip].float().to(device), generator, alphas)
        text = tokenize(tokenizer, _drop([captions[i] for i in clip], generator)).to(device)
        with torch.no_grad():
            context = networks.text_encoder(text).last_hidden_state
        context = context.repeat_interleave(noisy.shape[2], dim=0)
        output = unet(noisy, timesteps, context).sample
        return (weight * (output - noise).square()).mean()

    Stage("motion", unet, steps=steps, rate=1e-3, work=work).run(loss_at)
    return unet.eval()


def export(
    folder: Path,
    vae: AutoencoderKL,
    tokenizer: CLIPTokenizer,
    text_encoder: CLIPTextModel,
    unet: UNetMotionModel,
) -> None:
    """Write an fp16 checkpoint folder for `AnimateDiffPipeline.from_pretrained`."""
    AnimateDiffPipeline(
        vae=copy.deepcopy(vae).half(),
        text_encoder=copy.deepcopy(text_encoder).half(),
        tokenizer=tokenizer,
        unet=copy.deepcopy(unet).half(),
        motion_adapter=None,
        scheduler=DDIMScheduler(**SCHEDULE, clip_sample=False, timestep_spacing="trailing"),
    ).save_pretrained(folder)
    _name_for_all_versions(folder / "text_encoder" / "model.safetensors")


def _name_for_all_versions(file: Path) -> None:
    """Give a CLIP text encoder's weights the prefix of the published checkpoints.

    Recent versions of transformers omit the prefix and read both names; older ones do not know the
    short names and would initialize the encoder at random.
    """
    prefix = "text_model."
    weights = {prefix + name.removeprefix(prefix): each for name, each in load_file(file).items()}
    write_tensors(file, weights, metadata={"format": "pt"})


def main(arguments: Iterator[str] | None = None) -> None:
    """Run the unfinished stages, then export."""
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m benchmarks.tiny.recipe")
    parser.add_argument(
        "--work", type=Path, default=Path("runs/tiny"), help="folder of the stages' states"
    )
    parser.add_argument("--out", type=Path, default=WEIGHTS, help="checkpoint folder to write")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--clips", type=int, default=3000, help="training clips, a multiple of 20")
    parser.add_argument("--vae-steps", type=int, default=5000)
    parser.add_argument("--frame-steps", type=int, default=4500)
    parser.add_argument("--motion-steps", type=int, default=3500)
    options = parser.parse_args(None if arguments is None else list(arguments))
    device = torch.device(options.device)
    vae = train_vae(options.work, device, options.vae_steps)
    pictures, captions = encode_pictures(options.work, vae, device, options.clips)
    tokenizer, networks = train_frames(
        options.work, device, pictures, captions, options.frame_steps
    )
    footage, captions = encode_footage(options.work, vae, device, options.clips)
    unet = train_motion(
        options.work, device, footage, captions, tokenizer, networks, options.motion_steps
    )
    export(options.out, vae, tokenizer, networks.text_encoder, unet)


if __name__ == "__main__":
    main()
