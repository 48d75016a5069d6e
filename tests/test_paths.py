"""Paths in options and names from files."""

from __future__ import annotations

from pathlib import Path

import pytest
import tomli_w

from dpo_video.errors import UserError
from dpo_video.paths import check_name, is_hub_id, is_inside
from dpo_video.workflows.config import resolve

OUTSIDE = ["..", ".", "", "../x", "a/b", "/abs", "a\\b", ".hidden", "c:d", "a\nb", "a\0b"]


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_name_never_leaves_its_folder(name: str) -> None:
    with pytest.raises(UserError, match="cannot name a recipe"):
        check_name(name, "a recipe")


@pytest.mark.parametrize("name", ["local-region", "my recipe [v2]", "v1.5_x", "\u732b"])
def test_other_names_are_free(name: str) -> None:
    assert check_name(name, "a recipe") == name


@pytest.mark.parametrize(
    ("path", "inside"),
    [("adapter/a.json", True), ("../a", False), ("a/../../b", False), ("/etc/x", False),
     ("a\\..\\b", False), ("", False)],
)  # fmt: skip
def test_a_path_in_a_manifest_stays_in_its_folder(path: str, inside: bool) -> None:
    assert is_inside(path) is inside


@pytest.mark.parametrize("text", ["./nosuch", "../x/y", "~/models", "/a/b", "a/b/c", ".a/b"])
def test_what_looks_like_a_path_is_no_hub_id(text: str) -> None:
    assert not is_hub_id(text)
    config = resolve(
        choices={"backbone": "wan"}, metrics=["frame_difference"],
        assignments=[f"backbone.model={text}"],
    )  # fmt: skip
    assert Path(config.tables["backbone"]["model"]).is_absolute()


def test_a_run_keeps_absolute_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models" / "sd15").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    config = resolve(
        choices={"backbone": "animatediff", "pairs": "my/pairs/"},
        metrics=["warp_error"],
        flags={"run.clips": "clips", "evaluate.prompts": "prompts.txt"},
        assignments=[
            "backbone.model=models/sd15",
            "backbone.motion_adapter=guoyww/other",
            "metric.warp_error.raft_weights=raft.safetensors",
        ],
    )
    tables = config.tables
    assert tables["backbone"]["model"] == str(tmp_path / "models/sd15")
    assert tables["backbone"]["motion_adapter"] == "guoyww/other"  # no such folder: a hub id
    assert tables["run"]["clips"] == str(tmp_path / "clips")
    assert tables["evaluate"]["prompts"] == str(tmp_path / "prompts.txt")
    assert tables["pairs"] == {"store": str(tmp_path / "my/pairs")}
    assert tables["metric"]["warp_error"]["raft_weights"] == str(tmp_path / "raft.safetensors")
    run = tmp_path / "run.toml"
    run.write_text(config.toml())
    monkeypatch.chdir("/")
    assert resolve(file=run).tables == tables


def test_credentials_of_pairs_are_used_and_not_recorded(tmp_path: Path) -> None:
    file = tmp_path / "some.toml"
    url = "https://me:s3cret@host/pairs"
    file.write_text(tomli_w.dumps({"pairs": {"store": url}}))
    for config in (resolve(file=file), resolve(choices={"pairs": url})):
        assert config.pair_store == url
        assert config.tables["pairs"] == {"store": "https://host/pairs"}
        assert "s3cret" not in config.toml()


def test_a_slash_at_the_end_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()

    def read(*assignments: str) -> tuple[str, str | None]:
        config = resolve(assignments=["run.device=cpu", *assignments], choices={"backbone": "wan"})
        return config.tables["backbone"]["model"], config.train.init_from

    for model in ("model/", "model", f"{tmp_path}/model//"):
        assert read(f"backbone.model={model}")[0] == str(tmp_path / "model")
    assert read("backbone.model=Wan-AI/Wan2.2/")[0] == "Wan-AI/Wan2.2"
    for source in ("someone/lora", "someone/lora/", "someone/lora/style.safetensors"):
        assert read(f"train.init_from={source}")[1] == source.rstrip("/")
    for source in ("./lora/", "lora.safetensors", "../lora", "model"):
        assert read(f"train.init_from={source}")[1] == str(tmp_path / source)
