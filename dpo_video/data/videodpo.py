"""Video-DPO's published pairs: files `pair_00000.pt`, each a dictionary of three tensors.

`latents_w` and `latents_l` are the scaled latents `[c f h w]` of the chosen and the rejected video,
`prompt_embeds` the encoded prompt `[1 tokens channels]`. The text of the prompt is written to, and
read from, a text file beside it.
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
from dpo_video.support.claims import claim
from dpo_video.support.reading import open_regular
from dpo_video.types import PairBatch

UNFINISHED = ".unfinished"
"""Marks a folder whose export was interrupted."""
_DTYPES = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})
_KEYS = ("latents_w", "latents_l", "prompt_embeds")


@dataclass(frozen=True, kw_only=True)
class VideoDPOPair:
    """The contents of one file."""

    chosen: Float[Tensor, "c f h w"]
    rejected: Float[Tensor, "c f h w"]
    prompt_embeds: Float[Tensor, "1 tokens channels"]


@dataclass(frozen=True, kw_only=True)
class VideoDPOExport:
    """The number of pairs written, and what the format could not hold."""

    written: int
    undecided: int
    """Pairs left out, because neither video is preferred overall."""
    simplified: int
    """Written pairs whose labels differ between frames; the file has only the majority."""
    regions: int
    """Written pairs with a region, which the file cannot hold."""
    groups: int
    """Written pairs of groups; the file has only the best and the worst sample."""


def read_videodpo_pair(path: Path) -> VideoDPOPair:
    """Read a file; leading axes of 1 are optional.

    Raises:
        UserError: if it is damaged or holds other tensors.
    """
    try:
        with open_regular(path) as file:
            _check_archive(path)
            held = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged or hostile file may raise anything
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"{path} cannot be read ({reason}). Remove or replace it.") from error
    values = [held.get(key) for key in _KEYS] if isinstance(held, dict) else []
    tensors = [x for x in values if isinstance(x, Tensor)]
    if len(tensors) != len(_KEYS):
        raise UserError(f"{path} does not hold the tensors {', '.join(_KEYS)}. Remove it.")
    for key, tensor in zip(_KEYS, tensors, strict=True):
        if odd := _oddity(tensor, path.stat().st_size):
            raise UserError(
                f"{path} holds {key} as {odd}. Save plain tensors in fp32, fp16 or bf16."
            )
    tensors = [tensor.detach() for tensor in tensors]
    chosen, rejected, prompt = tensors
    chosen, rejected = (x[0] if x.ndim == 5 and len(x) == 1 else x for x in (chosen, rejected))
    prompt = prompt[None] if prompt.ndim == 2 else prompt
    if chosen.ndim != 4 or chosen.shape != rejected.shape or prompt.ndim != 3 or len(prompt) != 1:
        shapes = ", ".join(str(tuple(value.shape)) for value in tensors)
        raise UserError(
            f"{path} holds shapes {shapes}; expected are two of [c f h w] and one "
            "of [1 tokens channels]. Remove or replace it."
        )
    return VideoDPOPair(chosen=chosen, rejected=rejected, prompt_embeds=prompt)


def _oddity(tensor: Tensor, size: int) -> str | None:
    """Why a tensor of a file of `size` bytes cannot be computed with; None for a plain one."""
    if tensor.is_nested or tensor.layout is not torch.strided:
        return "a nested or sparse tensor"
    if tensor.device.type != "cpu":  # meta: a shape without numbers
        return f"a tensor on the device {tensor.device.type}"
    if tensor.is_quantized or tensor.dtype not in _DTYPES:
        return f"a tensor of type {tensor.dtype}"
    if tensor.numel() * tensor.element_size() > size:
        return "a tensor that repeats numbers, larger than the file"
    return None


def _check_archive(path: Path) -> None:
    """Refuse an archive that grows when unpacked; torch never compresses."""
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        if any(part.compress_type != zipfile.ZIP_STORED for part in archive.infolist()):
            raise ValueError("it is compressed")
        if sum(part.file_size for part in archive.infolist()) > path.stat().st_size:
            raise ValueError("its parts overlap")


def write_videodpo_pair(path: Path, pair: VideoDPOPair) -> None:
    """Write a file atomically."""
    values = (pair.chosen, pair.rejected, pair.prompt_embeds)
    with publishing(path) as partial:
        # Copies, because a slice would store the batch that it is a view of.
        torch.save({key: value.clone() for key, value in zip(_KEYS, values, strict=True)}, partial)


def export_videodpo(store: PairStore, folder: Path) -> VideoDPOExport:
    """Write a store's decided pairs as such files with their prompts, numbered without gaps.

    An interrupted call leaves a file that marks the folder as unfinished; the next call starts
    again.

    Raises:
        UserError: if the folder is not empty.
        StoreError: if the prompts are encoded as other tensors than `prompt_embeds` alone.
    """
    with claim(folder, instead="name another folder"), writing(folder):
        unfinished = folder / UNFINISHED
        if not unfinished.exists():
            if any(not path.name.startswith(".") for path in folder.iterdir()):
                raise UserError(f"'{folder}' is not empty. Name a new folder.")
            if len(store):
                _embeds(store, store.batch([0]))
            unfinished.touch()
        for path in [*folder.glob("pair_*.pt"), *folder.glob("pair_*.txt")]:
            path.unlink()  # of an interrupted call, perhaps of other pairs
        done = _write_all(store, folder)
        unfinished.unlink()
    return done


def _embeds(store: PairStore, batch: PairBatch) -> Tensor:
    if batch.context.keys() != {"prompt_embeds"}:
        raise StoreError(
            f"The pairs in '{store.where}' have prompts encoded as "
            f"{', '.join(sorted(batch.context))}; Video-DPO's format holds prompt_embeds only. "
            "Pairs of this backbone cannot be exported."
        )
    return batch.context["prompt_embeds"]


def _write_all(store: PairStore, folder: Path) -> VideoDPOExport:
    written = undecided = simplified = regions = groups = 0
    for index, record in enumerate(store.records):
        batch = store.batch([index])
        label = batch.preference[0].sum().sign()
        if label == 0:
            undecided += 1
            continue
        first, second = batch.first[0], batch.second[0]
        chosen, rejected = (first, second) if label > 0 else (second, first)
        path = folder / f"pair_{written:05d}.pt"
        embeds = _embeds(store, batch)
        write_videodpo_pair(
            path, VideoDPOPair(chosen=chosen, rejected=rejected, prompt_embeds=embeds)
        )
        write_text(path.with_suffix(".txt"), record.prompt + "\n")
        written += 1
        simplified += bool((batch.preference[0] != batch.preference[0, 0]).any())
        regions += bool((batch.region == 0).any())
        groups += bool(record.ranks)
    return VideoDPOExport(
        written=written, undecided=undecided, simplified=simplified, regions=regions, groups=groups
    )
