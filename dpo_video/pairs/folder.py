"""The user's own pairs, from files."""

from __future__ import annotations

from typing import ClassVar, final

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field
from torch import Generator, Tensor

from dpo_video.data.segments import SECONDS, broadcast, latent_parts, split
from dpo_video.errors import UserError
from dpo_video.pairs._formats import LatentPair, VideoPair, list_pairs
from dpo_video.paths import AbsolutePath
from dpo_video.strategies import Labeler, SuppliedPairs, VideoModel
from dpo_video.types import Clip, Pair, PairSource


@final
class Folder(SuppliedPairs):
    """Your own pairs: chosen and rejected videos from files in one of three formats.

    Two folders: `path` holds the folders `chosen` and `rejected` (or `win` and `lose`, as Video-DPO
    names them). Two videos of the same name, with any suffixes, are a pair. The prompt is in
    `chosen/NAME.txt`, `rejected/NAME.txt` or `NAME.txt`; --prompt is the prompt of all others:

        mine/chosen/dog.mp4    mine/rejected/dog.webm    mine/chosen/dog.txt

    JSON Lines: `path` is a .jsonl file with one pair per line; its paths are relative to the file.
    `prompt`, `mask`, `labels` and `weight` are optional; `win` and `lose` may stand for `chosen`
    and `rejected`:

        {"chosen": "a.mp4", "rejected": "b.mp4", "prompt": "a dog runs", "weight": 0.9}
        {"chosen": "c.mp4", "rejected": "d.mp4", "mask": "d.png", "labels": [1, 0]}

    `mask` is a picture or a video, white where the rejected video is worse. Outside of it the
    rejected video takes the chosen one's latents, so that the loss "region" sees only the
    difference. `labels` has a number in [-1, 1] for every segment of `seconds`: 1 where the chosen
    video is better, 0 for a tie, -1 where it is worse; by default it is better everywhere. `weight`
    is the pair's weight in the loss, such as a fraction of votes; only ratios count.

    Latents: `path` holds Video-DPO's files pair_00000.pt with the tensors `latents_w` and
    `latents_l` [c f h w] and `prompt_embeds` [1 tokens channels]. The same backbone must have
    encoded them; only shapes can be checked. `dpo-video export-pairs` writes this format.

    Videos are mp4, webm, avi, mov, mkv, gif, webp and others, or folders of png or jpg frames; what
    is transparent is shown over black, in masks as well. The beginning of each
    is resampled, resized and cropped to the backbone's shape. Encode both videos alike, because the
    model learns any difference between the files first. Files that cannot be read or have no
    counterpart are reported and skipped. No labeler is asked.
    """

    asks_labeler: ClassVar[bool] = False

    path: AbsolutePath
    """The folder, or the .jsonl file."""
    seconds: float = Field(default=SECONDS, gt=0)
    """Length of the segments of `labels`."""
    slow_down: bool = False
    """Use videos that are shorter than the backbone's and have enough frames, slowed down; of a
    pair, this may slow one video alone. Otherwise such pairs are skipped."""

    @property
    def needs_video(self) -> bool:
        """Never: the files are the source."""
        return False

    def source(self, model: VideoModel, prompt: str | None) -> PairSource:
        """List the files; each pair is decoded when it is read."""
        listing = list_pairs(self.path, model, prompt, self.seconds)
        listing.slow_down = self.slow_down
        return PairSource(
            clips=listing.read(model),
            count=len(listing.pairs),
            fingerprint=listing.fingerprint(model.shape),
            skipped=listing.skipped,
            remarks=listing.remarks,
            contents=listing.contents,
        )

    def __call__(
        self, clip: Clip, model: VideoModel, labeler: Labeler | None, generator: Generator
    ) -> Pair:
        """Encode both videos, or use the stored latents."""
        _, frames, height, width = model.latent_shape
        preference, region = torch.ones(frames), torch.ones(1, frames, height, width)
        if isinstance(clip, LatentPair):
            chosen, rejected = clip.chosen, clip.rejected
        elif isinstance(clip, VideoPair) and clip.video is not None:
            chosen, rejected = model.encode_videos(torch.stack([clip.video, clip.rejected])).cpu()
            if clip.labels is not None:
                segments = split(model.shape, self.seconds)
                preference = broadcast(clip.labels, latent_parts(model, segments), frames)
            if clip.mask is not None:
                region = latent_region(clip.mask, model)
                rejected = torch.where(region > 0, rejected, chosen)
        else:
            raise UserError(
                "Pairs of kind 'folder' come from the files of --set pairs.path=PATH, not from "
                "other clips."
            )
        return Pair(
            first=chosen,
            second=rejected,
            preference=preference,
            region=region,
            prompt=clip.caption,
            source=clip.name,
            weight=clip.weight if isinstance(clip, VideoPair) else 1.0,
            context=clip.context if isinstance(clip, LatentPair) else None,
        )


def latent_region(mask: Float[Tensor, "F H W"], model: VideoModel) -> Float[Tensor, "1 f h w"]:
    """1 in every latent cell that a binary mask touches, so that no difference is cut off."""
    _, frames, height, width = model.latent_shape
    region = torch.zeros(1, frames, height, width)
    for frame, cells in enumerate(F.adaptive_max_pool2d(mask, (height, width))):
        part = model.latent_frames(slice(frame, frame + 1))
        region[0, part] = torch.maximum(region[0, part], cells)
    return region
