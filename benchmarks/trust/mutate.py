"""Mutations of inputs: of bytes, and of the values that they encode.

Every mutation draws from a given `random.Random`, so that a case depends on its seed alone.
"""

from __future__ import annotations

import copy
import io
import json
import os
import pickle
import socket
import zipfile
import zlib
from pathlib import Path
from random import Random
from typing import Any

import tomli_w

BYTES = [b"\x00", b"\xff", b"\n", b"\r", b'"', b"{", b"}", b"[", b"]", b"\\", b"\xef\xbb\xbf",
         b"\xe2\x80\xa8", b"NaN", b"-1", b"1e999", b"\\ud800", b"\x1b[31m", b"../", b"\x00" * 64,
         b"9" * 5000, b"[" * 3000, b'{"a":' * 3000]  # fmt: skip
REGEXES = ["(a+)+$", "(.*a){25}x", "(\\w+\\w+)+:", ".*to_q", "[", "(?R)", "all-linear"]
VALUES: list[Any] = [
    *REGEXES, "./nosuch", "caf\u00e9", "cafe\u0301", "a\\b", "a\x85b", "\ufeff", "[/b]",
    None, True, False, 0, -1, 1, 2**31, 2**63, 2**64, -(2**63), 10**400, 1e308, -0.0, 0.5,
    float("nan"), float("inf"), "", " ", "x" * 100_000, "\x00", "\ud800", "../../etc/passwd",
    "/etc/passwd", "..", "a/b", "[red]", "[/]", "<script>alert(1)</script>", "\n", "\u2028",
    [], {}, [[]], [{}], {"": {}}, [None], [1, 2, 3], {"__tensor__": "0"}, {"name": "tiny"},
]  # fmt: skip


def deep(random: Random) -> Any:
    """Nested lists; deeper ones are in `BYTES`, since our own writers could not write them."""
    node: Any = []
    for _ in range(random.choice((5, 50, 150))):
        node = [node]
    return node


def damage(random: Random, data: bytes, others: list[bytes]) -> bytes:
    """Flip, delete, insert, repeat, truncate bytes, or take some from another input."""
    changed = bytearray(data)
    for _ in range(random.choice((1, 1, 1, 2, 3, 8))):
        size = len(changed)
        at = random.randrange(size + 1)
        length = random.choice((1, 1, 2, 4, 16, 64, 400))
        match random.randrange(8):
            case 0 if size:
                changed[min(at, size - 1)] ^= 1 << random.randrange(8)
            case 1 if size:
                changed[min(at, size - 1)] = random.randrange(256)
            case 2:
                del changed[at : at + length]
            case 3:
                changed[at:at] = random.choice(BYTES)
            case 4:
                changed[at:at] = changed[at : at + length]
            case 5:
                del changed[at:]
            case 6:
                other = random.choice(others)
                start = random.randrange(len(other) + 1)
                changed[at : at + length] = other[start : start + length]
            case _:
                changed[at : at + length] = random.randbytes(min(length, 16))
    return bytes(changed)


def damage_tree(random: Random, tree: Any) -> Any:
    """Replace, drop, add and swap leaves and branches of a nested value."""
    tree = copy.deepcopy(tree)
    for _ in range(random.choice((1, 1, 2, 4))):
        items: list[tuple[Any, Any]] = []
        stack = [tree]
        while stack:
            node = stack.pop()
            keys: Any = node.keys() if isinstance(node, dict) else range(len(node))
            items += [(node, key) for key in keys]
            stack += [node[key] for key in keys if isinstance(node[key], (dict, list))]
        if not items:
            return copy.deepcopy(random.choice(VALUES))
        node, key = random.choice(items)
        match random.randrange(7):
            case 0:
                del node[key]
            case 1 if isinstance(node, dict):
                node[random.choice(["", "name", "x", "pair", "store", "\x00", "é" * 300])] = (
                    copy.deepcopy(random.choice(VALUES))
                )
            case 2:
                node[key] = _copied(*random.choice(items))
            case 3:
                node[key] = deep(random)
            case 4 if isinstance(node[key], (int, float)) and not isinstance(node[key], bool):
                node[key] = random.choice(
                    (-node[key], 0, node[key] + 1, 10**9 * int(node[key] > 0))
                )
            case _:
                node[key] = copy.deepcopy(random.choice(VALUES))
    return tree


def _copied(node: Any, key: Any) -> Any:
    exists = key in node if isinstance(node, dict) else key < len(node)
    return copy.deepcopy(node[key]) if exists else None


SPECIAL = {
    b"\x00a pipe": lambda path: os.mkfifo(path),
    b"\x00a folder": lambda path: path.mkdir(),
    b"\x00a link to nothing": lambda path: path.symlink_to("nowhere"),
    b"\x00a link to itself": lambda path: path.symlink_to(path.name),
    b"\x00a device": lambda path: path.symlink_to("/dev/zero"),
    b"\x00a socket": lambda path: _socket(path),
}
"""Contents that `place` turns into something that is no regular file."""


def _socket(path: Path) -> None:
    before = Path.cwd()
    os.chdir(path.parent)  # the address of a socket is short
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
    finally:
        os.chdir(before)


def place(path: Path, data: bytes) -> None:
    """Put a case where its reader looks for it: as a file, or as one of `SPECIAL`."""
    if path.is_dir() and not path.is_symlink():
        path.rmdir()
    elif path.is_symlink() or (path.exists() and not path.is_file()):
        path.unlink()
    if data not in SPECIAL:
        path.write_bytes(data)
        return
    path.unlink(missing_ok=True)
    SPECIAL[data](path)


def damage_png(random: Random, data: bytes, others: list[bytes]) -> bytes:
    """Change a PNG's chunks, with right checksums: a decoder sees the damage, not its checksum."""
    if not data.startswith(b"\x89PNG") or random.random() < 0.3:
        return damage(random, data, others)
    chunks, at = [], 8
    while at + 12 <= len(data):
        size = int.from_bytes(data[at : at + 4], "big")
        chunks.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + size]))
        at += 12 + size
    for _ in range(random.choice((1, 1, 2))):
        number = random.randrange(len(chunks))
        kind, content = chunks[number]
        match random.randrange(6):
            case 0 if kind == b"IHDR":
                field = random.choice((0, 4))
                value = random.choice((0, 1, 1 << 13, 1 << 16, 1 << 20, (1 << 31) - 1))
                content = content[:field] + value.to_bytes(4, "big") + content[field + 4 :]
            case 1:
                content = damage(random, content, [content])
            case 2:
                kind = random.choice((b"tRNS", b"PLTE", b"iCCP", b"eXIf", b"cICP", b"acTL", b"fcTL",
                                      b"fdAT", b"gAMA", b"zTXt", b"iTXt", b"IEND"))  # fmt: skip
            case 3:
                chunks.insert(number, random.choice(chunks))
            case 4:
                content = random.randbytes(random.choice((0, 1, 2, 4, 26, 300)))
            case _:
                bomb = zlib.compress(bytes(1 << 24))
                chunks.insert(1, (b"zTXt", b"x\0\0" + bomb))
        chunks[number] = kind, content
    made = data[:8]
    for kind, content in chunks:
        body = kind + content
        made += len(content).to_bytes(4, "big") + body + zlib.crc32(body).to_bytes(4, "big")
    return made


NUMBERS = (0, 1, 2, 255, 1 << 15, 1 << 16, 1 << 24, (1 << 31) - 1, 1 << 31, (1 << 32) - 1)
ATOMS = (b"tkhd", b"mdhd", b"mvhd", b"elst", b"stsd", b"stts", b"ctts", b"stsz", b"stco", b"stsc",
         b"stss", b"colr", b"avcC", b"pasp", b"hdlr", b"covr", b"moov", b"trak", b"mdat",
         b"ANMF", b"VP8X", b"VP8L", b"avih", b"strh", b"strf", b"idx1")  # fmt: skip


def damage_film(random: Random, data: bytes, others: list[bytes]) -> bytes:
    """Put extreme numbers into the boxes of a film: sizes, counts, times and matrices."""
    found = [at for atom in ATOMS for at in [data.find(atom)] if at >= 4]
    if not found or random.random() < 0.4:
        return damage(random, data, others)
    changed = bytearray(data)
    for _ in range(random.choice((1, 1, 2, 4))):
        at = random.choice(found) + random.choice((-4, 4, 8, 12, 16, 20, 24, 40, 44, 60, 76, 80))
        order = random.choice(("big", "little"))
        changed[at : at + 4] = random.choice(NUMBERS).to_bytes(4, order)  # type: ignore[arg-type]
    return bytes(changed)


def damage_request(random: Random, data: bytes, others: list[bytes]) -> bytes:
    """Damage an HTTP request: its target, its headers, its body, or any bytes."""
    head, _, rest = data.partition(b" ")
    target, _, rest = rest.partition(b" ")
    match random.randrange(5):
        case 0:
            target = random.choice((b"*", b"", b"/", b"//", b"http:", b"/%ff", b"/" + b"9" * 5000,
                                    target + b"?rater=%ud800", b"\xff", b"/../x"))  # fmt: skip
        case 1:
            target = damage(random, target, [target])
        case 2:
            head = random.choice((b"OPTIONS", b"HEAD", b"PUT", b"CONNECT", b"get", b"POST", b"\0"))
        case 3:
            more = random.choice((b"content-length: 99999\r\n", b"transfer-encoding: chunked\r\n",
                                  b"upgrade: websocket\r\nconnection: upgrade\r\n",
                                  b"expect: 100-continue\r\n", b"x: " + b"y" * 70000 + b"\r\n",
                                  b"content-length: -1\r\n", b"host: [\r\n"))  # fmt: skip
            rest = rest.replace(b"\r\n", b"\r\n" + more, 1)
        case _:
            return damage(random, data, others)
    return head + b" " + target + b" " + rest


def json_text(tree: Any) -> bytes:
    return json.dumps(tree).encode()


def damage_json(random: Random, data: bytes, others: list[bytes]) -> bytes:
    if random.random() < 0.4:
        return damage(random, data, others)
    return json_text(damage_tree(random, json.loads(data)))


def damage_lines(random: Random, data: bytes, others: list[bytes]) -> bytes:
    """Damage one line of JSON lines, or repeat, drop and shuffle lines."""
    lines = data.splitlines()
    match random.randrange(5):
        case 0:
            return damage(random, data, others)
        case 1:
            random.shuffle(lines)
        case 2:
            lines.insert(random.randrange(len(lines) + 1), random.choice(lines))
        case _:
            at = random.randrange(len(lines))
            lines[at] = damage_json(random, lines[at], others)
    ending = random.choice((b"\n", b"\n", b"", b"\r\n"))
    return b"\n".join(lines) + ending


def damage_toml(random: Random, data: bytes, others: list[bytes]) -> bytes:
    import tomllib

    if random.random() < 0.4:
        return damage(random, data, others)
    try:
        tree = damage_tree(random, tomllib.loads(data.decode()))
        return tomli_w.dumps(tree).encode("utf-8", "surrogatepass")
    except (TypeError, ValueError, AttributeError, RecursionError):  # TOML has no null
        return damage(random, data, others)


def damage_safetensors(random: Random, data: bytes, others: list[bytes]) -> bytes:
    """Damage the header's JSON, its length, or any bytes."""
    if random.random() < 0.4:
        return damage(random, data, others)
    size = int.from_bytes(data[:8], "little")
    header = json_text(damage_tree(random, json.loads(data[8 : 8 + size])))
    length = len(header)
    if random.random() < 0.2:
        length = random.choice((0, 1, length - 1, length + 1, 2**31, 2**63, 2**64 - 1, 10**8))
    return length.to_bytes(8, "little") + header + data[8 + size :]


def damage_state(random: Random, data: bytes, others: list[bytes]) -> bytes:
    """Damage a checkpoint's state: its skeleton, which is JSON inside the header's JSON."""
    if random.random() < 0.4:
        return damage_safetensors(random, data, others)
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    skeleton = damage_tree(random, json.loads(header["__metadata__"]["state"]))
    header["__metadata__"]["state"] = json.dumps(skeleton)
    text = json_text(header)
    return len(text).to_bytes(8, "little") + text + data[8 + size :]


class Touch:
    """An object whose unpickling creates a file, which must never exist."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return open, (self.path, "w")


def damage_torch(random: Random, data: bytes, others: list[bytes]) -> bytes:
    """Damage a `.pt` file's pickle, archive or any bytes, or replace it by a malicious pickle."""
    match random.randrange(5):
        case 0:
            return pickle.dumps(Touch("touched"), protocol=random.randrange(6))
        case 1 | 2:
            return _rezipped(random, data, others)
        case _:
            return damage(random, data, others)


def _rezipped(random: Random, data: bytes, others: list[bytes]) -> bytes:
    made = io.BytesIO()
    packed = random.choice((zipfile.ZIP_STORED, zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))
    with zipfile.ZipFile(io.BytesIO(data)) as source, zipfile.ZipFile(made, "w", packed) as target:
        for name in source.namelist():
            content = source.read(name)
            if name.endswith("data.pkl"):
                if random.random() < 0.2:
                    content = pickle.dumps({"latents_w": Touch("touched")}, protocol=2)
                else:
                    content = damage(random, content, [content])
            elif random.random() < 0.2:
                content = damage(random, content, [content])
            if random.random() < 0.02:
                content = bytes(1 << 24)
            if random.random() > 0.03:
                target.writestr(name, content)
    return made.getvalue()


def assignment(random: Random) -> str:
    """An argument for `--set`; some are valid."""
    names = ["loss", "pairs", "train", "memory", "metric", "run", "labeler", "backbone", "nothing",
             "build", "evaluate", "reference", "versions", "", "loss ", "tier"]  # fmt: skip
    options = ["beta", "name", "steps", "learning_rate", "betas", "store", "warp_error.flow",
               "seed", "", "a.b.c.d", "rank", "labels", "region", "region.blobs", "device", "count",
               "x" * 5000, "model", "frames"]  # fmt: skip
    values = ["5", "500", "1e-4", "-1", "0", "nan", "inf", "-inf", "true", '"x"', "'", '"', "[",
              "]", "{}", "{a=1}", "[1,2]", "[" * 2000, "1e999", "9" * 5000, "0x10", "1979-05-27",
              "\x00", "\ud800", "\n[train]", "5\nx=1", "cpu", "../..", "", " ", "'''", "a\u2028b",
              "=", "==", "1_000", "+1", "07:32:00", "[red]bold[/]"]  # fmt: skip
    existing = [
        "loss.beta",
        "train.steps",
        "train.learning_rate",
        "train.betas",
        "train.rank",
        "run.seed",
        "run.device",
        "run.prompt",
        "train.labels",
        "build.count",
        "pairs.guidance_scale",
        "memory.backward",
        "evaluate.tolerance",
        "metric.warp_error.flow",
    ]
    path = f"{random.choice(names)}.{random.choice(options)}"
    if random.random() < 0.7:
        path = random.choice(existing)
    text = f"{path}={random.choice(values)}"
    if random.random() < 0.3:
        text = damage(random, text.encode("utf-8", "surrogatepass"), [b"loss.beta=500"]).decode(
            "utf-8", "surrogateescape"
        )
    return text
