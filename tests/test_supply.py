"""What comes with the package, and what goes out of it: licences listed, no connection opened."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from benchmarks.trust.licences import installed, licence, listed, needed, pinned

ROOT = Path(__file__).parents[1]

# Runs the commands that its arguments are (a JSON list of lists) in this very process, and prints
# every address that was looked up or connected to, and every program that was started: what a
# child does is not seen.
WATCHED = """
import contextlib, io, json, sys
seen = []
def hook(event, arguments):
    if event in ("socket.connect", "socket.sendto", "socket.sendmsg", "socket.bind"):
        seen.append([event, repr(arguments[1])])
    elif event in ("socket.getaddrinfo", "socket.gethostbyname", "subprocess.Popen", "os.system"):
        seen.append([event, repr(arguments[0])])
sys.addaudithook(hook)
from dpo_video.cli import main
for command in json.loads(sys.argv[1]):
    sys.argv = ["dpo-video", *command]
    with contextlib.redirect_stdout(io.StringIO()):
        try:
            main()
        except SystemExit as stop:
            assert not stop.code, (command, stop.code)
from huggingface_hub.constants import HF_HUB_DISABLE_TELEMETRY
assert HF_HUB_DISABLE_TELEMETRY
print(json.dumps([sorted(sys.modules), seen]))
"""


def test_every_pinned_package_is_listed_with_its_licence() -> None:
    assert {row.package: row.version for row in listed()} == pinned()
    found = installed()
    for row in listed():
        here = found.get(canonicalize_name(row.package))
        if here is not None and here.version.partition("+")[0] == row.version:
            assert row.licence == licence(here), row.package


def test_everything_that_is_needed_is_pinned() -> None:
    known = {canonicalize_name(name) for name in pinned()} | {"setuptools", "pip"}
    missing = {name for name in needed(installed()) if name not in known}
    # A torch with CUDA brings these, of the versions that it asks for itself.
    assert {
        name for name in missing if not name.startswith(("nvidia-", "cuda-", "triton"))
    } == set()


def test_no_licence_asks_for_more_than_the_list_says() -> None:
    strict = {row.package for row in listed() if "MPL" in row.licence or "GPL" in row.licence}
    assert strict == {"certifi", "hypothesis", "pathspec", "tqdm"}


def lower_bounds() -> dict[str, Version]:
    """Package to the oldest version that pyproject.toml allows, extras included."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    found = {}
    for requirement in (Requirement(text) for group in groups for text in group):
        for specifier in requirement.specifier:
            assert specifier.operator == ">=", requirement
            found[canonicalize_name(requirement.name)] = Version(specifier.version)
    return found


def test_no_version_with_a_known_fault_is_allowed_or_pinned() -> None:
    advisories = tomllib.loads((ROOT / "benchmarks/trust/advisories.toml").read_text())
    bounds, pins = lower_bounds(), {canonicalize_name(k): v for k, v in pinned().items()}
    for package, fixes in advisories.items():
        newest = max(map(Version, fixes))
        assert bounds[canonicalize_name(package)] >= newest, package
        assert Version(pins[canonicalize_name(package)]) >= newest, package


def test_the_oldest_versions_are_the_lower_bounds() -> None:
    bounds = lower_bounds()
    direct, _ = (ROOT / "constraints-oldest.txt").read_text().split("\n\n", 1)
    pins = [line.split("==") for line in direct.splitlines() if not line.startswith("#")]
    for package, version in pins:
        bound = bounds[canonicalize_name(package)]
        assert Version(version).release[: len(bound.release)] == bound.release, package
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = {canonicalize_name(Requirement(text).name) for text in project["dependencies"]}
    assert named == {canonicalize_name(package) for package, _ in pins}


def test_nothing_is_sent_anywhere(tmp_path: Path) -> None:
    # Not the offline switches that the other tests set: those would hide it.
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "DISABLE_TEL"))}
    commands = [
        ["--help"],
        ["list"],
        ["show", "loss", "region"],
        [
            "train",
            "--pairs=jitter",
            "--set=pairs.chosen=clip",
            "--loss=global",
            "--count=1",
            "--steps=1",
            "--set=train.gradient_accumulation_steps=1",
            "--set=train.validation_videos=0",
            "--device=cpu",
            f"--out={tmp_path / 'run'}",
        ],
    ]
    done = subprocess.run(
        [sys.executable, "-c", WATCHED, json.dumps(commands)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    modules, seen = json.loads(done.stdout)
    # TensorBoard's files, not its server; what could send was there to do so.
    assert {"torch", "huggingface_hub", "accelerate", "torch.utils.tensorboard"} <= set(modules)
    # urllib3 asks by a bind whether there is an IPv6.
    assert [entry for entry in seen if "'::1'" not in entry[1]] == []
