"""Remote pairs read like local ones."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import pytest
import torch
from fsspec.registry import _registry as registry
from fsspec.registry import known_implementations
from small_pairs import MANIFEST, context_of, random_pair
from test_pack import check_same
from test_store import add

from dpo_video.data import storage as places
from dpo_video.data.pack import pack
from dpo_video.data.store import PairStore
from dpo_video.errors import StoreError, UserError
from dpo_video.support import urls


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PairStore:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(places, "PAUSES", (0.0, 0.0))
    monkeypatch.setattr(urls, "PROTOCOLS", (*urls.PROTOCOLS, "memory"))
    made = PairStore.create(tmp_path / "pairs", MANIFEST)
    add(made, 0, 1, 2)
    add(made, 3, prompt="a blue star")
    return made


def copy_to_memory(folder: Path, name: str) -> str:
    url = f"memory://{name}"
    files = fsspec.filesystem("memory")
    for path in folder.rglob("*"):
        if path.is_file():
            files.pipe_file(f"/{name}/{path.relative_to(folder).as_posix()}", path.read_bytes())
    return url


@contextmanager
def served(folder: Path, refusals: int = 0, parts: bool = True) -> Iterator[tuple[str, list[str]]]:
    """Serves a folder by HTTP and records requests; the first responses may be errors."""
    pytest.importorskip("aiohttp", reason="the extra http is not installed")
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            wanted = self.headers.get("Range", "")
            asked.append(f"{self.path} {wanted}")
            path = folder / self.path.lstrip("/")
            code, data = 200, path.read_bytes() if path.is_file() else b""
            if len(asked) <= refusals:
                code, data = 503, b""
            elif not path.is_file():
                code = 404
            elif wanted and parts:
                start, _, stop = wanted.removeprefix("bytes=").partition("-")
                code, data = 206, data[int(start) : int(stop) + 1 if stop else None]
                if not data:
                    code = 416  # there is no such part
            self.send_response(code)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.mark.parametrize("packed", [False, True])
def test_remote_pairs_equal_local_pairs(store: PairStore, tmp_path: Path, packed: bool) -> None:
    folder = store.folder
    if packed:
        folder = tmp_path / "packed"
        list(pack(store, folder))
    for where in (copy_to_memory(folder, f"same-{packed}"), f"file://{folder}"):
        check_same(store, PairStore(where))
    with served(folder) as (url, asked):
        opened = PairStore(url + "/")
        opened.refresh()
        check_same(store, opened)
        # A shard's header once, and the requested rows.
        whole = [line for line in asked if "shards/" in line and "bytes=" not in line]
        assert not whole


def test_threads_can_share_a_store(store: PairStore, tmp_path: Path) -> None:
    list(pack(store, tmp_path / "packed"))
    opened = PairStore(copy_to_memory(tmp_path / "packed", "threads"))
    with ThreadPoolExecutor(4) as pool:
        for index, batch in zip([0, 1, 2, 3] * 8, pool.map(opened.batch, [[0], [1], [2], [3]] * 8),
                                strict=True):  # fmt: skip
            assert torch.equal(batch.first[0], random_pair(index).first)


def test_a_broken_connection_is_retried(store: PairStore) -> None:
    with served(store.folder, refusals=2) as (url, _):
        assert len(PairStore(url)) == 4
    with pytest.raises(StoreError, match=r"cannot be read after 3 attempts .*Check the connection"):
        PairStore(url)  # the server is gone
    with (
        served(store.folder, refusals=99) as (url, _),
        pytest.raises(StoreError, match="after 3 attempts"),
    ):
        PairStore(url)


def test_a_password_opens_pairs_and_is_never_shown(store: PairStore) -> None:
    with served(store.folder) as (url, _):
        secret = url.replace("://", "://me:s3cret@")
        opened = PairStore(secret)
        assert (opened.address, opened.where) == (secret, url)
        assert len(PairStore(opened.address)) == 4
        shown = [str(opened.to_dict()), opened._repr_html_()]
    with pytest.raises(StoreError, match="a run does not keep it") as caught:  # it is gone
        PairStore(secret)
    assert "s3cret" not in " ".join([*shown, str(caught.value)])


def test_a_server_without_range_requests_is_named(store: PairStore, tmp_path: Path) -> None:
    list(pack(store, tmp_path / "packed"))
    with served(tmp_path / "packed", parts=False) as (url, _):
        opened = PairStore(url)
        with pytest.raises(StoreError, match="supports range requests"):
            opened.batch([0])


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("nonsense://bucket/pairs", "the protocol must be one of file, http, https, s3, gs, hf"),
        ("memory://nothing-here", "is not a pair store: it has no store.json"),
        ("simplecache::memory://nothing-here", "is not a pair store: it has no store.json"),
        ("file:///nothing-here", "is not a pair store: it has no store.json"),
    ],
)
def test_a_wrong_url_is_one_sentence(store: PairStore, url: str, words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        PairStore(url)
    assert "\n" not in str(caught.value) and url.removeprefix("file://") in str(caught.value)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(
        known_implementations, "gs",
        {"class": "no_such_package.Files", "err": "Install no_such_package to access buckets"},
    )  # fmt: skip
    monkeypatch.delitem(registry, "gs", raising=False)
    with pytest.raises(StoreError, match=r"Install no_such_package to .*\. Install that package"):
        PairStore("gs://pairs")


def test_remote_pairs_are_read_only(store: PairStore, tmp_path: Path) -> None:
    opened = PairStore(copy_to_memory(store.folder, "read-only"))
    with pytest.raises(StoreError, match=r"is read-only\. Build pairs in a local folder"):
        opened.append(random_pair(9), context_of(random_pair(9).prompt))
    # Labels of remote pairs are kept in a local folder.
    assert not opened.folder.is_absolute() and opened.folder != store.folder
    fsspec.filesystem("memory").pipe_file("/read-only/labels/ann.json", b"{}")
    opened.fetch_labels("ann")
    assert (tmp_path / opened.folder / "labels" / "ann.json").read_bytes() == b"{}"


@pytest.mark.parametrize("name", ["../../../precious", "/precious", "a/b", "..", ""])
def test_labels_are_fetched_to_the_folder_of_labels_only(
    name: str, store: PairStore, tmp_path: Path
) -> None:
    opened = PairStore(copy_to_memory(store.folder, "hostile"))
    (tmp_path / "precious.json").write_text("mine")
    files = fsspec.filesystem("memory")
    files.pipe_file("/precious.json", b"theirs")
    with pytest.raises(UserError, match="cannot name labels"):
        opened.fetch_labels(name)
    assert (tmp_path / "precious.json").read_text() == "mine"
    assert not opened.folder.exists()
