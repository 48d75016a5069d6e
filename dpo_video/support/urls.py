"""URLs: which ones are opened. Whatever names one (a flag, a run, a config) comes through here."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import urlsplit

from dpo_video.errors import UserError
from dpo_video.text import without_credentials

PROTOCOLS = ("file", "http", "https", "s3", "gs", "hf")
CACHE = "simplecache::"
"""The only chained protocol: it keeps remote files in a local temporary folder."""
__all__ = ["PROTOCOLS", "check_url", "folder_of", "is_url", "without_credentials"]


def is_url(where: Path | str) -> bool:
    """Whether fsspec reads it: `s3://...`, `https://...`; not a path and not `file://...`."""
    return "://" in str(where) and not str(where).startswith("file://")


def folder_of(where: Path | str) -> Path:
    """The folder that a path or a `file://` URL names."""
    return Path(str(where).removeprefix("file://"))


def check_url(url: str) -> str:
    """Return a URL that may be opened.

    Other protocols of fsspec read archives and reference files, which may name further URLs, start
    programs or run code, and a URL may come from somebody else's run or config.

    Raises:
        UserError: for a protocol that is not in `PROTOCOLS`, a chain of protocols other than
            simplecache:: before one of them, a query, or a malformed address.
    """
    inner = url.removeprefix(CACHE)
    protocol, _, address = inner.partition("://")
    if protocol not in PROTOCOLS or "::" in inner:
        raise UserError(
            f"'{url}' is not opened: the protocol must be one of {', '.join(PROTOCOLS)}, or "
            f"{CACHE} in front of one of them. Copy the pairs to this machine, or to such an "
            "address."
        )
    try:
        urlsplit(inner).port  # noqa: B018 - it raises
    except ValueError as error:
        raise UserError(
            f"'{protocol}://...' is not a valid address. Escape special characters of a password, "
            "such as %2F for a slash."
        ) from error
    if "?" in address:
        raise UserError(
            f"'{url}' has a query, which cannot be combined with the files' names. Give the "
            "folder's address alone."
        )
    return url
