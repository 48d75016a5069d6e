"""Which URLs are opened, and what of them is stored and shown."""

from __future__ import annotations

import pytest

from dpo_video.data.store import PairStore
from dpo_video.errors import UserError
from dpo_video.support.urls import check_url, folder_of, is_url
from dpo_video.text import without_credentials


@pytest.mark.parametrize(
    "url",
    [
        "https://host/pairs",
        "http://me:pw@host:8000/pairs",
        "s3://bucket/pairs",
        "gs://bucket/pairs",
        "hf://datasets/me/pairs@main/x",
        "file:///pairs",
        "simplecache::https://host/pairs",
        "simplecache::s3://bucket/pairs",
    ],
)
def test_allowed_protocols_are_opened(url: str) -> None:
    assert check_url(url) == url and is_url(url) == (not url.startswith("file:"))


@pytest.mark.parametrize(
    "url",
    [
        "reference::https://host/refs.json",
        "reference://x",
        "simplecache::reference::https://host/refs.json",
        "simplecache::simplecache::https://host/pairs",
        "filecache::https://host/pairs",
        "zip://a.zip::https://host/b.zip",
        "https://host/a::reference://b",
        "memory://x",
        "ssh://host/pairs",
        "sftp://host/pairs",
        "ftp://host/pairs",
        "github://me:repo@main/",
        "data://x",
        "jupyter://host/",
        "HTTPS://host/pairs",
        "://host",
    ],
)
def test_other_protocols_and_chains_are_refused_before_they_are_opened(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def opened(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr("dpo_video.data.storage.url_to_fs", opened)
    for where in (url, f"{url}/"):
        with pytest.raises(UserError, match="the protocol must be one of"):
            PairStore(where)


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("https://host/pairs?X-Amz-Signature=s3cret", "has a query"),
        ("https://me:s3cret/x@host/pairs", "not a valid address"),
        ("https://[host/s3cret", "not a valid address"),
    ],
)
def test_an_address_that_cannot_work_is_refused_without_its_secret(url: str, words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        check_url(url)
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://me:s3cret@host/a", "https://host/a"),
        ("https://s3cret@host/a", "https://host/a"),
        ("https://me:s3@cret@host:80/a", "https://host:80/a"),
        ("https://me:s3/cret@host/a", "https://host/a"),
        ("https://me:123@host/a", "https://host/a"),
        ("simplecache::https://me:s3cret@host/a", "simplecache::https://host/a"),
        ("s3://KEY:s3cret@bucket/a", "s3://bucket/a"),
        ("see 'https://me:s3cret@host/a', https://u:p@b/", "see 'https://host/a', https://b/"),
        ("https://host/a?token=s3cret&b=1 now", "https://host/a now"),
        ("--pairs='https://host/a?sig=s3cret'", "--pairs='https://host/a'"),
        ("hf://datasets/me/pairs@main/x", "hf://datasets/me/pairs@main/x"),
        ("https://host:8080/@me/a", "https://host:8080/@me/a"),
        ("is it me@host? yes", "is it me@host? yes"),
    ],
)
def test_credentials_are_removed_from_urls_and_nothing_else(text: str, shown: str) -> None:
    assert without_credentials(text) == shown
    assert str(UserError(text)) == shown


def test_a_file_url_is_a_folder() -> None:
    assert str(folder_of("file:///a/b")) == "/a/b" and str(folder_of("a/b")) == "a/b"
