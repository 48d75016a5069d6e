"""Video-DPO's published pairs: files `pair_00000.pt`, each a dict of three tensors.

`latents_w` and `latents_l` are the winner's and the loser's scaled latents `[c f h w]`,
`prompt_embeds` the encoded prompt `[1 tokens channels]`. The text of the prompt is not in them; we
write it beside them, and read it there.
"""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from dpo_video.data.store import PairStore
from dpo_video.errors import StoreError, UserError
from dpo_video.support.atomic import publishing, write_text, writing

_KEYS = ("latents_w", "latents_l", "prompt_embeds")


@dataclass(frozen=True, kw_only=True)
class VideoDPOPair:
    """What one file holds."""

    winner: Float[Tensor, "c f h w"]
    loser: Float[Tensor, "c f h w"]
    prompt_embeds: Float[Tensor, "1 tokens channels"]


@dataclass(frozen=True, kw_only=True)
class VideoDPOExport:
    """What an export wrote, and what the format has no place for."""

    written: int
    undecided: int
    """Pairs that were left out: neither video is preferred on the whole."""
    simplified: int
    """Written pairs whose labels differ between frames: only the majority is in the file."""
    regions: int
    """Written pairs that have a region, which is not in the file."""


def read_videodpo_pair(path: Path) -> VideoDPOPair:
    """Read a file; a leading axis of 1 may be there or not.

    Raises:
        UserError: if it is damaged, or holds something else.
    """
    try:
        _check_archive(path)
        held = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged or hostile file may raise anything
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"{path} cannot be read ({reason}). Remove or replace it.") from error
    values = [held.get(key) for key in _KEYS] if isinstance(held, dict) else []
    tensors = [x for x in values if isinstance(x, Tensor) and x.is_floating_point()]
    if len(tensors) != len(_KEYS):
        raise UserError(f"{path} does not hold the tensors {', '.join(_KEYS)}. Remove it.")
    winner, loser, prompt = tensors
    winner, loser = (x[0] if x.ndim == 5 and len(x) == 1 else x for x in (winner, loser))
    prompt = prompt[None] if prompt.ndim == 2 else prompt
    if winner.ndim != 4 or winner.shape != loser.shape or prompt.ndim != 3 or len(prompt) != 1:
        shapes = ", ".join(str(tuple(value.shape)) for value in tensors)
        raise UserError(
            f"{path} holds shapes {shapes}; wanted are two of [c f h w] and one of "
            "[1 tokens channels]. Remove or replace it."
        )
    return VideoDPOPair(winner=winner, loser=loser, prompt_embeds=prompt)


def _check_archive(path: Path) -> None:
    """Refuse an archive that would grow when it is unpacked: torch stores, and never compresses."""
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        if any(part.compress_type != zipfile.ZIP_STORED for part in archive.infolist()):
            raise ValueError("it is compressed")
        if sum(part.file_size for part in archive.infolist()) > path.stat().st_size:
            raise ValueError("its parts overlap")


def write_videodpo_pair(path: Path, triple: VideoDPOPair) -> None:
    """Write a file that appears whole or not at all."""
    values = (triple.winner, triple.loser, triple.prompt_embeds)
    with publishing(path) as partial:
        # A copy each: a slice would take the whole batch that it is cut from into the file.
        torch.save({key: value.clone() for key, value in zip(_KEYS, values, strict=True)}, partial)


def export_videodpo(store: PairStore, folder: Path) -> VideoDPOExport:
    """Write a store's pairs as published files, numbered without gaps, each with its prompt.

    Raises:
        UserError: if the folder has such files already.
        StoreError: if the pairs' prompts are encoded as more than `prompt_embeds`.
    """
    if any(folder.glob("*.pt")):
        raise UserError(f"'{folder}' holds .pt files already. Name another folder.")
    written = undecided = simplified = regions = 0
    for index, row in enumerate(store.records):
        batch = store.batch([index])
        if batch.context.keys() != {"prompt_embeds"}:
            raise StoreError(
                f"The pairs in '{store.where}' have prompts encoded as "
                f"{', '.join(sorted(batch.context))}; the published format keeps prompt_embeds "
                "alone. Their backbone cannot be exported."
            )
        winner = batch.preference[0].sum().sign()
        if winner == 0:
            undecided += 1
            continue
        first, second = batch.first[0], batch.second[0]
        better, worse = (first, second) if winner > 0 else (second, first)
        path = folder / f"pair_{written:05d}.pt"
        with writing(folder):
            embeds = batch.context["prompt_embeds"]
            write_videodpo_pair(
                path, VideoDPOPair(winner=better, loser=worse, prompt_embeds=embeds)
            )
            write_text(path.with_suffix(".txt"), row.prompt + "\n")
        written += 1
        simplified += bool((batch.preference[0] != batch.preference[0, 0]).any())
        regions += bool((batch.region == 0).any())
    return VideoDPOExport(
        written=written, undecided=undecided, simplified=simplified, regions=regions
    )
