"""The model that ships with the package."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar, final

from dpo_video.backbone.animatediff import load_checkpoint
from dpo_video.diffusion.pretrained import Checkpoint
from dpo_video.strategies import Backbone, Sampling, VideoModel
from dpo_video.support.rng import generator
from dpo_video.tiny import WEIGHTS, scenes
from dpo_video.types import Clip, Placement, VideoShape

_BATCH = 16
_HELD_OUT = 47  # evaluation prompts that no clip shows: as many as an evaluation has by default


@final
class Tiny(Backbone):
    """Tiny AnimateDiff of six million parameters, shipped with the package for demos and tests.

    Its videos show one coloured shape on a background, 16 frames at 64x64. It runs by the code of
    any AnimateDiff checkpoint. Training recipe: `python -m benchmarks.tiny.recipe`.
    """

    guards: ClassVar[tuple[str, ...]] = ("caption_match", "sharpness", "contrast", "new_frames")

    model: Path | None = None
    """Folder written by the recipe; the package's weights when not set."""
    negative_prompt: str = ""
    """Negative prompt of classifier-free guidance."""

    def load(self, placement: Placement) -> VideoModel:
        """Load the denoiser."""
        return load_checkpoint(
            Checkpoint(source=str(self.model or WEIGHTS), placement=placement),
            shape=VideoShape(
                frames=scenes.FRAMES, height=scenes.SIZE, width=scenes.SIZE, fps=scenes.FPS
            ),
            sampling=Sampling(num_inference_steps=20, guidance_scale=2.5),
            negative_prompt=self.negative_prompt,
        )

    def clips(self, seed: int) -> Iterator[Clip]:
        """Procedural clips from the distribution of its training, of no evaluation prompt."""
        held_out = {*self.prompts(_HELD_OUT)}
        for batch in itertools.count():
            drawn = scenes.draw_scenes(_BATCH, generator(seed, "clips", batch))
            videos = scenes.render(drawn).transpose(1, 2)
            for i, (caption, video) in enumerate(zip(drawn.captions(), videos, strict=True)):
                index = batch * _BATCH + i
                for attempt in itertools.count():
                    if caption not in held_out:
                        break
                    other = scenes.draw_scenes(1, generator(seed, "clip", index, attempt))
                    (caption,), (video,) = other.captions(), scenes.render(other).transpose(1, 2)
                name = f"scene {index} of seed {seed}"
                yield Clip(name=name, caption=caption, video=video.contiguous())

    def prompts(self, n: int) -> list[str]:
        """Captions in which every word appears about equally often."""
        return scenes.spread_captions(n)
