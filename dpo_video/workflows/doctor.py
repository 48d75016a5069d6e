"""Examine the installation: the environment, every plugin, and their contracts."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, distribution, version
from typing import Any

from packaging.requirements import Requirement

from dpo_video import registry
from dpo_video.diffusion.known_models import models_of
from dpo_video.errors import UserError, unknown
from dpo_video.estimation.tiers import find_tier
from dpo_video.registry.commands import load_command
from dpo_video.registry.entry_points import PLUGINS, Entry, entries, unreadable
from dpo_video.text import one_line
from dpo_video.workflows import recipes

OURS = "dpo-video"


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that was looked at."""

    what: str
    fault: str
    """A sentence on what is wrong; "" if nothing is."""
    detail: str = ""


@dataclass(frozen=True, kw_only=True)
class Examination:
    """What `doctor` has found."""

    findings: Sequence[Finding]

    @property
    def faults(self) -> list[Finding]:
        """What is wrong."""
        return [finding for finding in self.findings if finding.fault]

    def to_dict(self) -> list[dict[str, Any]]:
        """One row per finding."""
        return [asdict(finding) for finding in self.findings]


def doctor(package: str | None = None, *, contracts: bool = False) -> Examination:
    """Load every plugin and report what is broken, shadowed or missing.

    Nothing is downloaded.

    Args:
        package: Look at this package only.
        contracts: Run the contract of every strategy of the plugins (of `package`, if it is named),
            with its default options, on `tiny` and on a small model with strided latents.

    Raises:
        UserError: for a package that provides nothing.
    """
    packages = {entry.package for entry in entries()}
    if package is not None and package not in packages:
        raise unknown("package", package, packages)
    chosen = [
        entry
        for entry in entries()
        if (entry.package == package if package else not entry.built_in)
    ]
    findings = [] if package else list(_environment())
    for name in sorted({entry.package for entry in chosen} | {package or OURS}):
        findings += _requirements(name)
    if package is None:
        findings += [Finding(what="plugin", fault=each) for each in unreadable()]
        findings += [Finding(what="plugin", fault=each) for each in registry.unknown_groups()]
    for entry in sorted(chosen, key=lambda entry: (entry.kind, entry.qualified)):
        findings += _examined(entry, contracts=contracts)
    return Examination(findings=findings)


def _environment() -> Iterator[Finding]:
    import torch

    yield Finding(what="dpo-video", fault="", detail=version(OURS))
    yield Finding(
        what="python", fault="", detail=f"{platform.python_version()} {platform.machine()}"
    )
    devices = []
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            found = torch.cuda.get_device_properties(index)
            devices.append(f"{found.name}, {found.total_memory / 2**30:.0f} GiB")
    elif torch.backends.mps.is_available():
        devices.append("mps")
    yield Finding(
        what="torch", fault="", detail=f"{torch.__version__}, {'; '.join(devices) or 'CPU only'}"
    )
    offline = os.environ.get("HF_HUB_OFFLINE", "") not in ("", "0")
    yield Finding(
        what="hub", fault="", detail="offline (HF_HUB_OFFLINE)" if offline else "online when asked"
    )
    if chosen := os.environ.get(PLUGINS):
        yield Finding(what="plugins", fault="", detail=f"{PLUGINS}={chosen}")


def _requirements(package: str) -> Iterator[Finding]:
    """The packages that one needs and that are missing or too old; extras are left out."""
    try:
        needed = distribution(package).requires or []
    except PackageNotFoundError:
        return
    for requirement in map(Requirement, needed):
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            found = version(requirement.name)
        except PackageNotFoundError:
            found = ""
        if not found or not requirement.specifier.contains(found, prereleases=True):
            wanted = f"{requirement.name}{requirement.specifier}"
            has = f"and {found} is installed" if found else "which is not installed"
            yield Finding(what=package, fault=f"{package} needs {wanted}, {has}.")


def _examined(entry: Entry, *, contracts: bool) -> Iterator[Finding]:
    what = f"{entry.kind} {entry.qualified}"
    read: dict[str, Callable[[], object]] = {
        "recipe": lambda: recipes.find_recipe(entry.name),
        "tier": lambda: find_tier(entry.name),
        "model": lambda: models_of(entry),
    }
    if entry.kind in read:
        yield Finding(what=what, fault=_fault(read[entry.kind]))
        return
    if entry.kind == "command":
        fault = _fault(lambda: load_command(entry.qualified))
        yield Finding(what=what, fault=fault, detail=entry.distribution)
        if contracts and not fault:
            yield _told(what, lambda: _checks().check_command(registry.imported(entry)))
    if entry.kind not in registry.KINDS:
        return
    note = registry.note(entry)
    fault = _fault(lambda: registry.load(entry.kind, entry.qualified))
    yield Finding(what=what, fault=fault, detail=note or entry.distribution)
    if contracts and not fault:
        yield _contract(entry, what)


def _contract(entry: Entry, what: str) -> Finding:
    """The contract of a strategy with its default options."""
    from pydantic import ValidationError

    cls: Any = registry.load(entry.kind, entry.qualified)
    try:
        strategy = cls()
    except ValidationError:
        detail = "not run: it has options without a default. Run the package's own tests."
        return Finding(what=f"{what}: contract", fault="", detail=detail)
    return _told(what, lambda: _check(entry.kind, strategy))


def _told(what: str, check: Callable[[], None]) -> Finding:
    try:
        check()
    except (AssertionError, UserError) as error:
        return Finding(what=f"{what}: contract", fault=one_line(str(error)))
    return Finding(what=f"{what}: contract", fault="", detail="kept")


def _checks() -> Any:
    from dpo_video import testing  # it imports torch

    return testing


def _check(kind: str, strategy: Any) -> None:
    testing = _checks()
    from dpo_video.testing.strided import StridedModel
    from dpo_video.types import Placement

    if kind == "labeler":
        names = getattr(strategy, "metric_names", ())
        testing.check_labeler(
            strategy, metrics={name: registry.strategy("metric", name) for name in names}
        )
    elif kind in ("pairs", "reference", "timesteps", "format"):
        tiny = registry.strategy("backbone", "tiny").load(Placement())
        # No other program runs the strided model.
        for model in (tiny,) if kind == "format" else (tiny, StridedModel()):
            if kind == "pairs":
                testing.check_pairs(strategy, model, labeler=testing.SteadyLabeler())
            else:
                getattr(testing, f"check_{kind}")(strategy, model)
    else:  # of a backbone alone: its model may have to be downloaded
        getattr(testing, f"check_{kind}")(strategy)


def _fault(load: Callable[[], object]) -> str:
    try:
        load()
    except UserError as error:
        return str(error)
    return ""
