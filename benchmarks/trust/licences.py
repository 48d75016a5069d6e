"""The licence of every pinned dependency, direct or not, from what they say of themselves.

    python -m benchmarks.trust.licences            # is THIRD_PARTY.md what is pinned?
    python -m benchmarks.trust.licences --write    # needs all of them installed

Those that a platform or an extra needs, and this environment has not, are looked for in `--also`
(a folder that `pip install --target` has filled).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import Distribution, distributions
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
CONSTRAINTS, TABLE = ROOT / "constraints.txt", ROOT / "THIRD_PARTY.md"
OWN = "dpo-video"
EXTRAS = ("cogvideox", "nf4", "http", "vlm", "page", "docs")
HEAD = """# Third-party licences

None of these packages is part of this one: pip installs them beside it. Their licences, as their
metadata says them, by `python -m benchmarks.trust.licences --write`; a test compares this table
with constraints.txt. `needed` says what for: the package itself, an extra, or its development.

The four under the Mozilla Public License (certifi, hypothesis, pathspec, tqdm) ask that changes to
their own files be published; nothing here changes them. What the metadata does not say: the wheels
of `av` hold x264 and x265, which are under the **GPL 2 or later**, beside an FFmpeg under the LGPL,
and those of `opencv-python-headless` an FFmpeg under the LGPL; whoever passes on an image with them
inside owes what these ask. A torch with CUDA brings NVIDIA's libraries along, which are proprietary
and not listed. setuptools (MIT), which torch asks for, is not pinned.

| package | version | licence | needed |
|---|---|---|---|
"""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One pinned package."""

    package: str
    version: str
    licence: str
    needed: str

    def __str__(self) -> str:
        return f"| {self.package} | {self.version} | {self.licence} | {self.needed} |"


def pinned() -> dict[str, str]:
    """Name to version, of constraints.txt."""
    lines = (line.split("#")[0].strip() for line in CONSTRAINTS.read_text().splitlines())
    return dict(line.split("==") for line in lines if line)


def installed(also: Sequence[str] = ()) -> dict[str, Distribution]:
    """Distributions by canonical name."""
    found = {}
    for each in (*distributions(), *distributions(path=list(also))):
        found.setdefault(canonicalize_name(each.metadata["Name"]), each)
    return found


def licence(distribution: Distribution) -> str:
    """As an SPDX expression where it has one, else in its own words."""
    metadata = distribution.metadata
    if expression := metadata.get("License-Expression"):
        return str(expression)
    classifiers = [
        text.rpartition("::")[2].strip()
        for text in metadata.get_all("Classifier") or []
        if text.startswith("License ::")
    ]
    text = str(metadata.get("License") or "").strip()
    named = text not in ("", "UNKNOWN") and "\n" not in text
    return text if named else ", ".join(classifiers)


def needed(found: Mapping[str, Distribution]) -> dict[str, str]:
    """Canonical name to what it is needed for: the first of the package, an extra, development."""
    purposes: dict[str, str] = {}
    for purpose in ("", *EXTRAS, "dev"):
        for name in _closure(OWN, purpose, found):
            purposes.setdefault(name, purpose or "the package")
    return purposes


def _closure(name: str, extra: str, found: Mapping[str, Distribution]) -> Iterator[str]:
    """What a package with an extra requires here, and what that requires."""
    seen: set[tuple[str, str]] = set()
    waiting = [(name, extra)]
    while waiting:
        if (current := waiting.pop()) in seen:
            continue
        seen.add(current)
        here, wanted = current
        if here != OWN:
            yield here
        for text in (found[here].requires or []) if here in found else []:
            requirement = Requirement(text)
            if requirement.marker is None or requirement.marker.evaluate({"extra": wanted}):
                child = canonicalize_name(requirement.name)
                waiting += [(child, extra) for extra in ("", *requirement.extras)]


def rows(also: Sequence[str] = ()) -> list[Row]:
    """The table, from what is installed.

    Raises:
        SystemExit: if something is missing, of another version, or says nothing.
    """
    found = installed(also)
    purposes = needed(found)
    made = []
    for name, version in pinned().items():
        distribution = found.get(canonicalize_name(name))
        if distribution is None or distribution.version.partition("+")[0] != version:
            sys.exit(
                f"{name} {version} is not installed. Install it, or name its folder by --also."
            )
        if not (said := licence(distribution)):
            sys.exit(f"{name} says nothing of its licence. Look it up, and add it by hand.")
        purpose = purposes.get(canonicalize_name(name), "another platform or extra")
        made.append(Row(package=name, version=version, licence=said, needed=purpose))
    return made


def listed() -> list[Row]:
    """The table as it is committed."""
    cells = [line.strip("| ").split(" | ") for line in TABLE.read_text().splitlines()
             if line.startswith("| ")][1:]  # fmt: skip
    return [Row(package=a, version=b, licence=c, needed=d) for a, b, c, d in cells]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--also", action="append", default=[], help="another folder of packages")
    given = parser.parse_args()
    if given.write:
        TABLE.write_text(HEAD + "\n".join(map(str, rows(given.also))) + "\n", encoding="utf-8")
    differ = {row.package: row.version for row in listed()} != pinned()
    print(
        f"{len(listed())} packages; " + ("THIRD_PARTY.md is out of date" if differ else "all there")
    )
    sys.exit(differ)


if __name__ == "__main__":
    main()
