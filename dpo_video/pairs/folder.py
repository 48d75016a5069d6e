"""The user's own pairs."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, final

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field
from torch import Generator, Tensor

from dpo_video.data.segments import SECONDS, broadcast, split
from dpo_video.errors import UserError
from dpo_video.pairs._formats import LatentPair, VideoPair, list_pairs
from dpo_video.strategies import Labeler, SuppliedPairs, VideoModel
from dpo_video.types import Clip, Pair, PairSource


@final
class Folder(SuppliedPairs):
    """Your own winners and losers, from files in one of three formats.

    Two folders: `path` holds the folders `win` and `lose`. Two videos of the same name, whatever
    their endings, are a pair. The prompt is in `win/NAME.txt`, `lose/NAME.txt` or `NAME.txt`, or
    --prompt is the one of all:

        mine/win/dog.mp4    mine/lose/dog.webm    mine/win/dog.txt

    Lines of JSON: `path` is a file that ends in .jsonl, one pair a line, its paths relative to the
    file. `prompt`, `mask` and `labels` may be left out:

        {"win": "a.mp4", "lose": "b.mp4", "prompt": "a dog runs"}
        {"win": "c.mp4", "lose": "d.mp4", "mask": "d.png", "labels": [1, 0]}

    `mask` is a picture or a video, white where the loser is worse; outside of it the loser takes
    the winner's latents, so that the loss "region" sees the difference alone. `labels` has one
    number in [-1, 1] for every segment of `seconds`: 1 where `win` is really better, 0 for a tie,
    -1 where it is worse. Without it, it is better everywhere.

    Latents: `path` holds files pair_00000.pt as Video-DPO publishes them, with the tensors
    `latents_w` and `latents_l` [c f h w] and `prompt_embeds` [1 tokens channels]. They must be this
    very backbone's, which nobody can check. `dpo-video export-pairs` writes this format.

    Videos are mp4, webm, avi, mov, mkv, gif, or folders of png or jpg frames. Of each the beginning
    is taken, resampled, resized and cropped to what the backbone wants. Encode both sides alike:
    what tells their files apart is learnt first. What cannot be read or has no partner is named and
    skipped. No labeler is asked: the files say who won.
    """

    asks_labeler: ClassVar[bool] = False

    path: Path
    """The folder, or the .jsonl file."""
    seconds: float = Field(default=SECONDS, gt=0)
    """Length of the segments that `labels` count."""

    @property
    def needs_video(self) -> bool:
        """It brings what it needs."""
        return False

    def source(self, model: VideoModel, prompt: str | None) -> PairSource:
        """List the files; they are decoded one by one."""
        listing = list_pairs(self.path, model, prompt, self.seconds)
        return PairSource(
            clips=listing.read(model),
            count=len(listing.pairs),
            fingerprint=listing.fingerprint(model.shape),
            skipped=listing.skipped,
        )

    def __call__(
        self, clip: Clip, model: VideoModel, labeler: Labeler | None, generator: Generator
    ) -> Pair:
        """Encode the two videos, or take the latents as they are."""
        _, frames, height, width = model.latent_shape
        preference, region = torch.ones(frames), torch.ones(1, frames, height, width)
        if isinstance(clip, LatentPair):
            winner, loser = clip.winner, clip.loser
        elif isinstance(clip, VideoPair) and clip.video is not None:
            winner, loser = model.encode_videos(torch.stack([clip.video, clip.loser])).cpu()
            if clip.labels is not None:
                segments = split(model.shape, self.seconds)
                parts = [model.latent_frames(segment) for segment in segments]
                preference = broadcast(clip.labels, parts, frames)
            if clip.mask is not None:
                region = latent_region(clip.mask, model)
                loser = torch.where(region > 0, loser, winner)
        else:
            raise UserError(
                "Pairs of kind 'folder' are made of files that --set pairs.path=PATH names, and of "
                "no other clips."
            )
        return Pair(
            first=winner,
            second=loser,
            preference=preference,
            region=region,
            prompt=clip.caption,
            source=clip.name,
            context=clip.context if isinstance(clip, LatentPair) else None,
        )


def latent_region(mask: Float[Tensor, "F H W"], model: VideoModel) -> Float[Tensor, "1 f h w"]:
    """1 in every latent cell that a mask of 0 and 1 touches: no difference is cut off."""
    _, frames, height, width = model.latent_shape
    region = torch.zeros(1, frames, height, width)
    for frame, cells in enumerate(F.adaptive_max_pool2d(mask, (height, width))):
        part = model.latent_frames(slice(frame, frame + 1))
        region[0, part] = torch.maximum(region[0, part], cells)
    return region
