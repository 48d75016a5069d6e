"""Finished pairs in files: two folders, JSON Lines, or latents of Video-DPO.

Listing uses names only; a pair is decoded when it is read.
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
from pydantic import AliasChoices, BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from dpo_video.data.captions import read_caption, unread_columns
from dpo_video.data.clips import NOTICED, read_beginning, stored_bytes
from dpo_video.data.fitting import fit_video
from dpo_video.data.folders import count_types, find_videos, not_read, storable
from dpo_video.data.segments import split
from dpo_video.data.video import FRAME_SUFFIXES, VIDEO_SUFFIXES, natural_key, read_picture
from dpo_video.data.videodpo import read_videodpo_pair
from dpo_video.errors import UserError, first_fault
from dpo_video.strategies import VideoModel
from dpo_video.support.formatting import counted
from dpo_video.support.reading import Names, composed, one_spaced, parse_json, read_lines
from dpo_video.types import Clip, Context, Remark, Skipped, Video, VideoShape

FOLDERS = (("chosen", "rejected"), ("win", "lose"))
"""Names of the two folders; the second are those of Video-DPO."""
FORMATS = (
    "Name a folder that has the folders chosen and rejected, a .jsonl file, or a folder of "
    "pair_*.pt files; `dpo-video show pairs folder` explains all three"
)
MASK_SUFFIXES = VIDEO_SUFFIXES | FRAME_SUFFIXES
UNEQUAL = "Pairs whose two videos are shown at different speeds, which a policy learns first"
PROMPTING = "write it to a text file of the same name beside it, or prompt all pairs with --prompt"


# --- pairs -----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class VideoPair(Clip):
    """A finished pair in pixels; `video` is the chosen one."""

    rejected: Video
    mask: Float[Tensor, "F H W"] | None
    """1 where the videos may differ; None for everywhere."""
    labels: Float[Tensor, " s"] | None
    """Per segment, +1 where the chosen video is better; None for +1 everywhere."""
    weight: float = 1.0


@dataclass(frozen=True, kw_only=True)
class LatentPair(Clip):
    """A finished pair in latents, with its encoded prompt."""

    chosen: Float[Tensor, "c f h w"]
    rejected: Float[Tensor, "c f h w"]
    context: Context


# --- files -----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class VideoFiles:
    """The files of a pair in pixels."""

    name: str
    prompt: str
    chosen: Path
    rejected: Path
    mask: Path | None = None
    labels: tuple[float, ...] | None = None
    weight: float = 1.0

    @property
    def paths(self) -> list[Path]:
        """All files of the pair."""
        return [path for path in (self.chosen, self.rejected, self.mask) if path is not None]

    def read(
        self, model: VideoModel, remarks: list[Remark], *, slow_down: bool = False
    ) -> VideoPair:
        """Decode the pair, and add what is to be known about its files; a UserError if it fails."""
        both = [
            read_beginning(path, model.shape, slow_down=slow_down)
            for path in (self.chosen, self.rejected)
        ]
        chosen, rejected = (each.video for each in both)
        if torch.equal(chosen, rejected):
            raise UserError("both files hold the same video")
        found = [remark for each in both for remark in each.remarks]
        mask = None if self.mask is None else _read_mask(self.mask, model.shape, found, slow_down)
        if mask is not None and not (mask * (chosen - rejected).abs().sum(dim=0)).any():
            raise UserError(f"the two videos do not differ where {self.mask} is white")
        labels = None if self.labels is None else torch.tensor(self.labels)
        slow, fast = sorted((each.slower for each in both), reverse=True)
        if slow > NOTICED * fast:
            detail = f"one is {slow / fast:.3g} times slower than the other"
            found.append(Remark(what=UNEQUAL, name=self.name, detail=detail))
        remarks += found
        return VideoPair(
            name=self.name,
            caption=self.prompt,
            video=chosen,
            rejected=rejected,
            mask=mask,
            labels=labels,
            weight=self.weight,
        )


@dataclass(frozen=True, kw_only=True)
class LatentFile:
    """The file of a pair in latents."""

    name: str
    prompt: str
    file: Path
    encoded: Float[Tensor, "1 tokens channels"]
    """A prompt as the backbone encodes it, to compare shapes."""

    @property
    def paths(self) -> list[Path]:
        """The file."""
        return [self.file]

    def read(self, model: VideoModel, remarks: list[Remark]) -> LatentPair:
        """Read the pair; a UserError if the file is damaged or of another model."""
        stored, dtype = read_videodpo_pair(self.file), self.encoded.dtype
        for what, found, expected in (
            ("latents", stored.chosen.shape, model.latent_shape),
            ("prompt_embeds", stored.prompt_embeds.shape, self.encoded.shape),
        ):
            if tuple(found) != tuple(expected):
                raise UserError(
                    f"its {what} have the shape {tuple(found)}, the backbone's {tuple(expected)}"
                )
        tensors = (stored.chosen, stored.rejected, stored.prompt_embeds)
        if not all(tensor.isfinite().all() for tensor in tensors):
            raise UserError("it holds nan or infinity")
        if torch.equal(stored.chosen, stored.rejected):
            raise UserError("both videos have the same latents")
        return LatentPair(
            name=self.name,
            caption=self.prompt,
            chosen=stored.chosen.to(dtype),
            rejected=stored.rejected.to(dtype),
            context={"prompt_embeds": stored.prompt_embeds.to(dtype)},
        )


@dataclass(kw_only=True)
class Listing:
    """The pairs of a path."""

    pairs: Sequence[VideoFiles | LatentFile] = ()
    skipped: list[Skipped] = field(default_factory=list)
    """Files that give no pair; grows while pairs are read."""
    remarks: list[Remark] = field(default_factory=list)
    """On files that are used; grows while pairs are read."""
    slow_down: bool = False
    """Whether videos that are too short are slowed down."""

    def read(self, model: VideoModel) -> Iterator[Clip]:
        """Every pair that can be read; the others are added to `skipped`.

        Raises:
            UserError: at the end, if no pair could be read.
        """
        usable = False
        for pair in self.pairs:
            try:
                clip = (
                    pair.read(model, self.remarks, slow_down=self.slow_down)
                    if isinstance(pair, VideoFiles)
                    else pair.read(model, self.remarks)
                )
            except UserError as error:
                self.skipped.append(Skipped(name=pair.name, reason=str(error)))
                continue
            usable = True
            yield clip
        if not usable:
            raise _no_pair(self.skipped)

    @property
    def contents(self) -> str:
        """The videos by type, such as "2 mp4, 2 webp"; empty for latents."""
        videos = [pair for pair in self.pairs if isinstance(pair, VideoFiles)]
        return count_types(path for pair in videos for path in (pair.chosen, pair.rejected))

    def fingerprint(self, shape: VideoShape) -> str:
        """A hash of names, sizes, prompts, labels and weights, but not of the folder's location."""
        pairs = [
            [pair.name, pair.prompt, getattr(pair, "labels", None), *map(stored_bytes, pair.paths)]
            + [w for w in [getattr(pair, "weight", 1.0)] if w != 1]
            for pair in self.pairs
        ]
        text = json.dumps([asdict(shape), pairs, self.slow_down])
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def _no_pair(skipped: Sequence[Skipped]) -> UserError:
    why = f" For example {skipped[0].name}: {skipped[0].reason}." if skipped else ""
    return UserError(f"No file gives a pair.{why} {FORMATS}.")


def list_pairs(path: Path, model: VideoModel, prompt: str | None, seconds: float) -> Listing:
    """List the pairs of a path, in one of the three `FORMATS`.

    `prompt` is for pairs that have none; `seconds` is the length of a labelled segment.

    Raises:
        UserError: if the path has another format, or no pair.
    """
    if not path.exists():
        raise UserError(f"There is nothing at '{path}'. {FORMATS}.")
    if path.is_file():
        listing = _list_lines(path, prompt, len(split(model.shape, seconds)))
    elif folders := next(
        (both for both in FOLDERS if all((path / each).is_dir() for each in both)), None
    ):
        listing = _list_folders(path, folders, prompt)
    elif any(path.glob("*.pt")):
        listing = _list_latents(path, model, prompt)
    elif (path / "store.json").is_file():
        raise UserError(f"'{path}' is a finished pair store. Use it directly: --pairs {path}/")
    else:
        raise UserError(f"'{path}' holds no pairs. {FORMATS}.")
    if not listing.pairs:
        raise _no_pair(listing.skipped)
    return listing


# --- two folders -----------------------------------------------------------------------------


def _list_folders(root: Path, folders: tuple[str, str], prompt: str | None) -> Listing:
    """Videos of the same name in two folders."""
    pairs: list[VideoFiles] = []
    skipped: list[Skipped] = []
    chosen, rejected = (_by_stem(root, folder, skipped) for folder in folders)
    for stem in sorted(chosen.keys() | rejected.keys(), key=natural_key):
        files = [*chosen.get(stem, []), *rejected.get(stem, [])]
        name = files[0].relative_to(root).as_posix()
        if stem not in chosen or stem not in rejected:
            other = folders[0] if stem in rejected else folders[1]
            skipped.append(Skipped(name=name, reason=f"{other} has no video called {stem}"))
        elif len(files) > 2:
            reason = f"{len(files)} videos are called {stem} instead of one in each folder"
            skipped.append(Skipped(name=name, reason=reason))
        else:
            try:
                text = _prompt_beside([*files, root / f"{stem}.mp4"], prompt)
            except UserError as error:
                skipped.append(Skipped(name=name, reason=str(error)))
                continue
            pairs.append(VideoFiles(name=stem, prompt=text, chosen=files[0], rejected=files[1]))
    return Listing(pairs=pairs, skipped=skipped)


def _by_stem(root: Path, folder: str, skipped: list[Skipped]) -> dict[str, list[Path]]:
    """Videos and folders of frames at any depth, by their path without suffix.

    Paths are in Unicode's composed form, so that names from macOS and from Linux meet.
    """
    found: dict[str, list[Path]] = {}
    left: list[Skipped] = []
    for name in find_videos(root / folder, left):
        path = root / folder / name
        stem = name if path.is_dir() else PurePosixPath(name).with_suffix("").as_posix()
        found.setdefault(composed(stem), []).append(path)
    skipped += [Skipped(name=f"{folder}/{each.name}", reason=each.reason) for each in left]
    return found


# --- JSON Lines ------------------------------------------------------------------------------


class _Line(BaseModel):
    """One line of a JSONL file."""

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)

    chosen: str = Field(validation_alias=AliasChoices("chosen", "win"))
    rejected: str = Field(validation_alias=AliasChoices("rejected", "lose"))
    prompt: str | None = Field(default=None, min_length=1)
    mask: str | None = None
    labels: tuple[Annotated[float, Field(ge=-1, le=1)], ...] | None = None
    weight: Annotated[float, Field(gt=0)] = 1.0


_COLUMNS = _Line.model_fields.keys() | {"win", "lose"}


def _list_lines(file: Path, prompt: str | None, segments: int) -> Listing:
    listing = Listing()
    pairs: list[VideoFiles] = []
    columns: set[str] = set()
    files = Names(file.parent)
    try:
        for number, line in read_lines(file):
            name = f"{file.name}:{number}"
            try:
                pairs.append(_read_line(line, name, files, prompt, segments, columns))
            except UserError as error:
                listing.skipped.append(Skipped(name=name, reason=str(error)))
    except OSError as error:
        raise UserError(f"'{file}' cannot be read: {error.strerror}. {FORMATS}.") from error
    listing.pairs = pairs
    listing.remarks += unread_columns(file.name, columns)
    return listing


def _read_line(
    line: str, name: str, files: Names, prompt: str | None, segments: int, columns: set[str]
) -> VideoFiles:
    """The pair of a line; columns that are not read are added to `columns`."""
    try:
        entry = parse_json(line)
        if isinstance(entry, dict):
            columns |= entry.keys() - _COLUMNS
            for twin in (("chosen", "win"), ("rejected", "lose")):
                if entry.keys() >= set(twin):
                    raise ValueError(f"it names both {twin[0]} and {twin[1]}")
        read = _Line.model_validate(entry)
    except ValidationError as error:
        raise UserError(first_fault(error)) from error
    except ValueError as error:
        raise UserError(f"it is not a pair in JSON: {error}") from error
    if read.labels is not None and len(read.labels) != segments:
        raise UserError(
            f"it has {counted(len(read.labels), 'label')} for {counted(segments, 'segment')}"
        )
    chosen, rejected = _found(files, read.chosen), _found(files, read.rejected)
    return VideoFiles(
        name=name,
        prompt=one_spaced(read.prompt or "") or _prompt_beside([chosen, rejected], prompt),
        chosen=chosen,
        rejected=rejected,
        mask=None if read.mask is None else _found(files, read.mask, MASK_SUFFIXES),
        labels=read.labels,
        weight=read.weight,
    )


def _found(files: Names, name: str, suffixes: frozenset[str] = VIDEO_SUFFIXES) -> Path:
    """The video, mask or folder of frames that a line names."""
    path = files.find(name)
    if path is None:
        raise UserError(f"there is no file {name}")
    if not path.is_dir() and path.suffix.lower() not in suffixes:
        raise UserError(f"{name} is no video: {not_read(path)}")
    return path


# --- Video-DPO's latents ---------------------------------------------------------------------


def _list_latents(root: Path, model: VideoModel, prompt: str | None) -> Listing:
    """`*.pt`; a pair without prompt text is named after its file."""
    encoded = model.encode_prompts([""])
    if encoded.keys() != {"prompt_embeds"}:
        raise UserError(
            f"'{root}' holds prompts encoded as prompt_embeds; this backbone encodes them as "
            f"{', '.join(sorted(encoded))}. Use videos instead. {FORMATS}."
        )
    pairs, skipped = [], []
    for file in sorted(root.glob("*.pt"), key=lambda file: natural_key(file.name)):
        if not storable(file.name):
            reason = "its name is not UTF-8. Rename it"
            skipped.append(Skipped(name=ascii(file.name), reason=reason))
            continue
        try:
            text = _prompt_beside([file], prompt or f"(the prompt of {file.name})")
        except UserError as error:
            skipped.append(Skipped(name=file.name, reason=str(error)))
            continue
        pairs.append(
            LatentFile(name=file.name, prompt=text, file=file, encoded=encoded["prompt_embeds"])
        )
    return Listing(pairs=pairs, skipped=skipped)


def _prompt_beside(paths: Sequence[Path], prompt: str | None) -> str:
    """The text beside the first path that has one, else `prompt`."""
    found = next((text for path in paths if (text := read_caption(path))), prompt)
    if not found:
        raise UserError(f"it has no prompt: {PROMPTING}")
    return found


def _read_mask(
    path: Path, shape: VideoShape, remarks: list[Remark], slow_down: bool
) -> Float[Tensor, "F H W"]:
    """1 where a picture or a video is closer to white than to black."""
    if path.suffix.lower() in FRAME_SUFFIXES:
        still = read_picture(path)[:, None].expand(-1, shape.frames, -1, -1)
        video = fit_video(still, shape.fps, shape)
    else:
        video, _, found = read_beginning(path, shape, slow_down=slow_down)
        remarks += found
    return (video.mean(dim=0) >= 0.5).float()
