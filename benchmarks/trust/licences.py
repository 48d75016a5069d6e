"""Licences of all pinned dependencies, direct and indirect, from their metadata.

    python -m benchmarks.trust.licences            # compare THIRD_PARTY.md with constraints.txt
    python -m benchmarks.trust.licences --write    # write it; needs all packages installed

Packages of other platforms or extras, absent from this environment, are read from `--also`: a
folder filled by `pip install --target`.
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

None of these packages is distributed with this one; pip installs them. The licences are those in
their metadata, collected by `python -m benchmarks.trust.licences --write`; a test compares this
table with constraints.txt. The column `needed` names the purpose: the package itself, an extra, or
development.

The four packages under the Mozilla Public License (certifi, hypothesis, pathspec, tqdm) require
that changes to their own files be published; nothing here changes them. Not in the metadata: the
wheels of `av` contain x264 and x265 under the **GPL 2 or later** and an FFmpeg under the LGPL;
those of `opencv-python-headless` contain an FFmpeg under the LGPL. Whoever distributes an image
that contains them must meet these licences. A torch with CUDA installs NVIDIA's proprietary
libraries, which are not listed. setuptools (MIT), which torch requires, is not pinned.

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
    """Name to version, from constraints.txt."""
    lines = (line.split("#")[0].strip() for line in CONSTRAINTS.read_text().splitlines())
    return dict(line.split("==") for line in lines if line)


def installed(also: Sequence[str] = ()) -> dict[str, Distribution]:
    """Distributions by canonical name."""
    found = {}
    for each in (*distributions(), *distributions(path=list(also))):
        found.setdefault(canonicalize_name(each.metadata["Name"]), each)
    return found


def licence(distribution: Distribution) -> str:
    """The SPDX expression if there is one, else the metadata's own text."""
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
    """Canonical name to purpose: the package itself, else an extra, else development."""
    purposes: dict[str, str] = {}
    for purpose in ("", *EXTRAS, "dev"):
        for name in _closure(OWN, purpose, found):
            purposes.setdefault(name, purpose or "the package")
    return purposes


def _closure(name: str, extra: str, found: Mapping[str, Distribution]) -> Iterator[str]:
    """Transitive requirements of a package with an extra, in this environment."""
    seen: set[tuple[str, str]] = set()
    pending = [(name, extra)]
    while pending:
        if (current := pending.pop()) in seen:
            continue
        seen.add(current)
        package, with_extra = current
        if package != OWN:
            yield package
        for text in (found[package].requires or []) if package in found else []:
            requirement = Requirement(text)
            if requirement.marker is None or requirement.marker.evaluate({"extra": with_extra}):
                child = canonicalize_name(requirement.name)
                pending += [(child, extra) for extra in ("", *requirement.extras)]


def rows(also: Sequence[str] = ()) -> list[Row]:
    """The table, from the installed packages.

    Raises:
        SystemExit: if a package is missing, has another version, or declares no licence.
    """
    found = installed(also)
    purposes = needed(found)
    made = []
    for name, version in pinned().items():
        distribution = found.get(canonicalize_name(name))
        if distribution is None or distribution.version.partition("+")[0] != version:
            sys.exit(
                f"{name} {version} is not installed. Install it, or name its folder with --also."
            )
        if not (text := licence(distribution)):
            sys.exit(f"{name} declares no licence. Look it up and add it by hand.")
        purpose = purposes.get(canonicalize_name(name), "another platform or extra")
        made.append(Row(package=name, version=version, licence=text, needed=purpose))
    return made


def listed() -> list[Row]:
    """The table as committed."""
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
        f"{len(listed())} packages; "
        + ("THIRD_PARTY.md is out of date" if differ else "up to date")
    )
    sys.exit(differ)


if __name__ == "__main__":
    main()
