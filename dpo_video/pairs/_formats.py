"""Finished pairs in files: two folders, lines of JSON, or published latents.

Listing looks at names alone; a pair is decoded when it is read.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Annotated

import torch
from jaxtyping import Float
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from dpo_video.data.clips import find_videos, read_beginning, read_caption
from dpo_video.data.segments import split
from dpo_video.data.video import FRAME_SUFFIXES, fit_video, frame_files, natural_key, read_picture
from dpo_video.data.videodpo import read_videodpo_pair
from dpo_video.errors import UserError, first_fault
from dpo_video.strategies import VideoModel
from dpo_video.types import Clip, Context, Skipped, Video, VideoShape

SIDES = ("win", "lose")
FORMATS = (
    "Name a folder with the folders win and lose in it, a .jsonl file, or a folder of pair_*.pt "
    "files; `dpo-video show pairs folder` explains all three"
)
PROMPTING = "write it into a text file of its name beside it, or give all pairs one with --prompt"


# --- what is read ----------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class VideoPair(Clip):
    """A finished pair in pixels; `video` is the winner."""

    loser: Video
    mask: Float[Tensor, "F H W"] | None
    """1 where the two may differ; None for everywhere."""
    labels: Float[Tensor, " s"] | None
    """Per segment, +1 where the winner is better; None for everywhere."""


@dataclass(frozen=True, kw_only=True)
class LatentPair(Clip):
    """A finished pair in latents, with its prompt encoded."""

    winner: Float[Tensor, "c f h w"]
    loser: Float[Tensor, "c f h w"]
    context: Context


# --- where it is -----------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class VideoFiles:
    """The files of a pair in pixels."""

    name: str
    prompt: str
    win: Path
    lose: Path
    mask: Path | None = None
    labels: tuple[float, ...] | None = None

    @property
    def paths(self) -> list[Path]:
        """All of them."""
        return [path for path in (self.win, self.lose, self.mask) if path is not None]

    def read(self, model: VideoModel) -> VideoPair:
        """Decode it; a UserError if that cannot be done."""
        winner, loser = (read_beginning(path, model.shape) for path in (self.win, self.lose))
        if torch.equal(winner, loser):
            raise UserError("winner and loser are the same video")
        mask = None if self.mask is None else _read_mask(self.mask, model.shape)
        if mask is not None and not (mask * (winner - loser).abs().sum(dim=0)).any():
            raise UserError(f"the two do not differ where {self.mask} is white")
        labels = None if self.labels is None else torch.tensor(self.labels)
        return VideoPair(
            name=self.name, caption=self.prompt, video=winner, loser=loser, mask=mask, labels=labels
        )


@dataclass(frozen=True, kw_only=True)
class LatentFile:
    """The file of a pair in latents."""

    name: str
    prompt: str
    file: Path
    encoded: Float[Tensor, "1 tokens channels"]
    """Some prompt as the backbone encodes it."""

    @property
    def paths(self) -> list[Path]:
        """The one."""
        return [self.file]

    def read(self, model: VideoModel) -> LatentPair:
        """Read it; a UserError if it is damaged, or of another model."""
        triple, dtype = read_videodpo_pair(self.file), self.encoded.dtype
        for what, found, fitting in (
            ("latents", triple.winner.shape, model.latent_shape),
            ("prompt_embeds", triple.prompt_embeds.shape, self.encoded.shape),
        ):
            if tuple(found) != tuple(fitting):
                raise UserError(
                    f"its {what} have the shape {tuple(found)}, the backbone's {tuple(fitting)}"
                )
        tensors = (triple.winner, triple.loser, triple.prompt_embeds)
        if not all(tensor.isfinite().all() for tensor in tensors):
            raise UserError("it holds numbers that are not finite")
        if torch.equal(triple.winner, triple.loser):
            raise UserError("winner and loser are the same latents")
        return LatentPair(
            name=self.name,
            caption=self.prompt,
            winner=triple.winner.to(dtype),
            loser=triple.loser.to(dtype),
            context={"prompt_embeds": triple.prompt_embeds.to(dtype)},
        )


@dataclass(kw_only=True)
class Listing:
    """The pairs that a path names."""

    pairs: Sequence[VideoFiles | LatentFile] = ()
    skipped: list[Skipped] = field(default_factory=list)
    """What gives no pair; grows while pairs are read."""

    def read(self, model: VideoModel) -> Iterator[Clip]:
        """Every pair that can be read; the others are added to `skipped`.

        Raises:
            UserError: behind the last one, if there was none.
        """
        usable = False
        for pair in self.pairs:
            try:
                clip = pair.read(model)
            except UserError as error:
                self.skipped.append(Skipped(name=pair.name, reason=str(error)))
                continue
            usable = True
            yield clip
        if not usable:
            raise UserError(nothing(self.skipped))

    def fingerprint(self, shape: VideoShape) -> str:
        """A hash of names, sizes, prompts and labels; where the files lie does not matter."""
        pairs = [
            [pair.name, pair.prompt, getattr(pair, "labels", None), *map(_bytes, pair.paths)]
            for pair in self.pairs
        ]
        text = json.dumps([asdict(shape), pairs])
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def nothing(skipped: Sequence[Skipped]) -> str:
    """A sentence for files of which none gives a pair."""
    why = f" For example {skipped[0].name}: {skipped[0].reason}." if skipped else ""
    return f"No file gives a pair.{why} {FORMATS}."


def list_pairs(path: Path, model: VideoModel, prompt: str | None, seconds: float) -> Listing:
    """List the pairs of a path, in one of the three formats.

    Args:
        path: See `FORMATS`.
        model: What they are for.
        prompt: Of whatever has none of its own.
        seconds: Length of the segments that have a label each.

    Raises:
        UserError: if it is none of them, or names no pair.
    """
    if not path.exists():
        raise UserError(f"There is nothing at '{path}'. {FORMATS}.")
    if path.is_file():
        listing = _list_lines(path, prompt, len(split(model.shape, seconds)))
    elif all((path / side).is_dir() for side in SIDES):
        listing = _list_folders(path, prompt)
    elif any(path.glob("*.pt")):
        listing = _list_latents(path, model, prompt)
    elif (path / "store.json").is_file():
        raise UserError(f"'{path}' is a store already. Use it as it is: --pairs {path}/")
    else:
        raise UserError(f"'{path}' holds no pairs. {FORMATS}.")
    if not listing.pairs:
        raise UserError(nothing(listing.skipped))
    return listing


# --- two folders -----------------------------------------------------------------------------


def _list_folders(root: Path, prompt: str | None) -> Listing:
    """`win/NAME.*` and `lose/NAME.*`."""
    pairs, skipped = [], []
    win, lose = (_by_stem(root / side) for side in SIDES)
    for stem in sorted(win.keys() | lose.keys(), key=natural_key):
        files = [*win.get(stem, []), *lose.get(stem, [])]
        name = files[0].relative_to(root).as_posix()
        if stem not in win or stem not in lose:
            other = SIDES[0] if stem in lose else SIDES[1]
            skipped.append(Skipped(name=name, reason=f"{other} has no video called {stem}"))
        elif len(files) > 2:
            reason = f"{len(files)} videos are called {stem}, and not one on either side"
            skipped.append(Skipped(name=name, reason=reason))
        else:
            try:
                text = _prompt_beside([*files, root / f"{stem}.mp4"], prompt)
            except UserError as error:
                skipped.append(Skipped(name=name, reason=str(error)))
                continue
            pairs.append(VideoFiles(name=stem, prompt=text, win=files[0], lose=files[1]))
    return Listing(pairs=pairs, skipped=skipped)


def _by_stem(folder: Path) -> dict[str, list[Path]]:
    """Videos and folders of frames at any depth, by their path without the ending."""
    found: dict[str, list[Path]] = {}
    for name in find_videos(folder):
        path = folder / name
        stem = name if path.is_dir() else PurePosixPath(name).with_suffix("").as_posix()
        found.setdefault(stem, []).append(path)
    return found


# --- lines of JSON ---------------------------------------------------------------------------


class _Line(BaseModel):
    """One line of a JSONL file."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    win: Path
    lose: Path
    prompt: str | None = Field(default=None, min_length=1)
    mask: Path | None = None
    labels: tuple[Annotated[float, Field(ge=-1, le=1)], ...] | None = None


def _list_lines(file: Path, prompt: str | None, segments: int) -> Listing:
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"'{file}' cannot be read as text ({error}). {FORMATS}.") from error
    pairs, skipped = [], []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        name = f"{file.name}:{number}"
        try:
            pairs.append(_read_line(line, name, file.parent, prompt, segments))
        except UserError as error:
            skipped.append(Skipped(name=name, reason=str(error)))
    return Listing(pairs=pairs, skipped=skipped)


def _read_line(line: str, name: str, root: Path, prompt: str | None, segments: int) -> VideoFiles:
    try:
        read = _Line.model_validate_json(line)
    except ValidationError as error:
        raise UserError(first_fault(error)) from error
    if read.labels is not None and len(read.labels) != segments:
        raise UserError(f"it has {len(read.labels)} labels, and a video has {segments} segments")
    win, lose = root / read.win, root / read.lose
    mask = None if read.mask is None else root / read.mask
    for path in (win, lose, mask):
        if path is not None and not _exists(path):
            raise UserError(f"there is no file {path}")
    return VideoFiles(
        name=name,
        prompt=read.prompt or _prompt_beside([win, lose], prompt),
        win=win,
        lose=lose,
        mask=mask,
        labels=read.labels,
    )


# --- published latents -----------------------------------------------------------------------


def _list_latents(root: Path, model: VideoModel, prompt: str | None) -> Listing:
    """`*.pt`; without its text, a prompt is known by its file's name."""
    encoded = model.encode_prompts([""])
    if encoded.keys() != {"prompt_embeds"}:
        raise UserError(
            f"'{root}' holds prompts encoded as prompt_embeds, and this backbone encodes them as "
            f"{', '.join(sorted(encoded))}. Give it videos instead: {FORMATS}."
        )
    pairs, skipped = [], []
    for file in sorted(root.glob("*.pt"), key=lambda file: natural_key(file.name)):
        try:
            text = _prompt_beside([file], prompt or f"(the prompt of {file.name})")
        except UserError as error:
            skipped.append(Skipped(name=file.name, reason=str(error)))
            continue
        pairs.append(
            LatentFile(name=file.name, prompt=text, file=file, encoded=encoded["prompt_embeds"])
        )
    return Listing(pairs=pairs, skipped=skipped)


# --- parts -----------------------------------------------------------------------------------


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a name that is too long for any file
        return False


def _prompt_beside(paths: Sequence[Path], prompt: str | None) -> str:
    """The text beside the first of the paths that has any, or else `prompt`."""
    found = next((text for path in paths if (text := read_caption(path))), prompt)
    if not found:
        raise UserError(f"it has no prompt: {PROMPTING}")
    return found


def _read_mask(path: Path, shape: VideoShape) -> Float[Tensor, "F H W"]:
    """1 where a picture or a video is nearer to white than to black."""
    if path.suffix.lower() in FRAME_SUFFIXES:
        still = read_picture(path)[:, None].expand(-1, shape.frames, -1, -1)
        video = fit_video(still, shape.fps, shape)
    else:
        video = read_beginning(path, shape)
    return (video.mean(dim=0) >= 0.5).float()


def _bytes(path: Path) -> int:
    files = frame_files(path) if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files)
