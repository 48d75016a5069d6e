"""A single file, a variant and shards are the network that a plain folder of the weights is."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SHAPE
from diffusers import (
    CogVideoXTransformer3DModel,
    MotionAdapter,
    UNet2DConditionModel,
    WanTransformer3DModel,
)
from safetensors.torch import load_file, save_file
from small_animatediff import save_small_base, save_small_motion_adapter
from small_cogvideox import OPTIONS as COGVIDEOX
from small_single_files import save_motion_module, save_stable_diffusion, save_wan, unet_name
from small_wan import OPTIONS as WAN
from small_wan import save_small_wan

from dpo_video.backbone.animatediff import AnimateDiff
from dpo_video.backbone.cogvideox import CogVideoX
from dpo_video.backbone.wan import Wan
from dpo_video.diffusion.initial_noise import initial_noise
from dpo_video.diffusion.pretrained import Checkpoint
from dpo_video.diffusion.single_file import FilePart, SingleFile
from dpo_video.errors import UserError
from dpo_video.strategies import Backbone, VideoModel
from dpo_video.types import Placement

IMAGE = {"frames": SHAPE.frames, "height": SHAPE.height, "width": SHAPE.width}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of AnimateDiff's base and adapter and of Wan, and single files of their weights."""
    root = tmp_path_factory.mktemp("files")
    save_small_base(root / "base")
    save_small_motion_adapter(root / "adapter")
    save_small_wan(root / "wan")
    save_stable_diffusion(root / "base", root / "base.safetensors")
    save_motion_module(root / "adapter", root / "mm.safetensors")
    save_wan(root / "wan" / "transformer", root / "wan.safetensors")
    save_wan(root / "wan" / "transformer", root / "comfy.safetensors", "model.diffusion_model.")
    return root


def animatediff(model: Path, adapter: Path, **options: Any) -> AnimateDiff:
    return AnimateDiff(model=str(model), motion_adapter=str(adapter), **IMAGE, **options)


def frames(model: VideoModel) -> torch.Tensor:
    """A video of the whole model: text encoder, denoiser, scheduler and VAE."""
    context = model.encode_prompts(["a red square moving left slowly"])
    latents = model.sample(context, initial_noise(model, [0]), num_inference_steps=2)
    return model.decode_videos(latents)


def same(one: Backbone, other: Backbone, dtype: torch.dtype = torch.float32) -> None:
    placement = Placement(dtype=dtype)
    expected, found = (each.load(placement) for each in (one, other))
    assert torch.equal(frames(found), frames(expected))
    kinds = [
        {name: value.dtype for name, value in model.denoiser.state_dict().items()}
        for model in (expected, found)
    ]
    assert kinds[0] == kinds[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_single_files_of_animatediff_are_the_folders(root: Path, dtype: torch.dtype) -> None:
    folders = animatediff(root / "base", root / "adapter")
    files = animatediff(
        root / "base.safetensors",
        root / "mm.safetensors",
        config=str(root / "base"),
        motion_adapter_config=str(root / "adapter"),
    )
    same(folders, files, dtype)
    assert files.load(Placement()).identity != folders.load(Placement()).identity


@pytest.mark.parametrize("name", ["wan.safetensors", "comfy.safetensors", "plain.safetensors"])
def test_single_files_of_wan_are_the_folder(root: Path, name: str) -> None:
    plain = root / "wan" / "transformer" / "diffusion_pytorch_model.safetensors"
    file = plain if name.startswith("plain") else root / name
    folder = Wan(model=str(root / "wan"), **WAN)
    for dtype in (torch.float32, torch.bfloat16):
        same(folder, Wan(model=str(file), config=str(root / "wan"), **WAN), dtype)


def test_a_single_file_of_cogvideox_has_diffusers_names(
    small_cogvideox: Path, tmp_path: Path
) -> None:
    file = tmp_path / "cogvideox.safetensors"
    weights = load_file(small_cogvideox / "transformer" / "diffusion_pytorch_model.safetensors")
    save_file({f"model.diffusion_model.{name}": value for name, value in weights.items()}, file)
    options = {"config": str(small_cogvideox), **COGVIDEOX}
    same(CogVideoX(model=str(small_cogvideox), **COGVIDEOX), CogVideoX(model=str(file), **options))
    save_file({f"blocks.{name}": value for name, value in weights.items()}, file)
    with pytest.raises(UserError, match="diffusers converts no CogVideoXTransformer3DModel"):
        CogVideoX(model=str(file), **options).load(Placement())


def test_a_motion_module_says_how_many_frames_it_takes(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root / "adapter", tmp_path / "adapter")
    config = tmp_path / "adapter" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "motion_max_seq_length": 32}))
    for on_meta in (False, True):
        with pytest.raises(UserError, match=f"at most {SHAPE.frames} frames, not 5"):
            animatediff(
                root / "base.safetensors", root / "mm.safetensors", config=str(root / "base"),
                motion_adapter_config=str(tmp_path / "adapter"),
            ).model_copy(update={"frames": 5}).load(Placement(on_meta=on_meta))  # fmt: skip


def test_a_config_beside_a_motion_module_is_used(root: Path, tmp_path: Path) -> None:
    shutil.copy(root / "mm.safetensors", tmp_path / "mm.safetensors")
    shutil.copy(root / "adapter" / "config.json", tmp_path / "config.json")
    same(
        animatediff(root / "base", root / "adapter"),
        animatediff(root / "base", tmp_path / "mm.safetensors"),
    )


@pytest.mark.parametrize(
    ("name", "part", "cls"),
    [
        ("wan2.1-t2v-1.3b", "transformer", WanTransformer3DModel),
        ("cogvideox-2b", "transformer", CogVideoXTransformer3DModel),
        ("sd1.5", "unet", UNet2DConditionModel),
        ("animatediff-v1-5-2", "", MotionAdapter),
    ],
)
def test_the_known_model_of_a_files_shapes_describes_it(
    name: str, part: str, cls: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = Checkpoint(source=name, placement=Placement(on_meta=True))
    with torch.device("meta"):
        published = cls.from_config(known.config(part)).state_dict()
    prefix = "model.diffusion_model." if name == "sd1.5" else ""
    header = {
        prefix + (unet_name(key, 2) if prefix else key): ("F16", list(value.shape))
        for key, value in published.items()
    }
    file = tmp_path / "file.safetensors"
    file.touch()
    monkeypatch.setattr(SingleFile, "_header", header)
    held = {part: FilePart(network=cls, prefix=prefix)}
    assert Checkpoint(source=str(file), parts_in_file=held).described_by.source == known.source
    header.pop(next(iter(header)))
    with pytest.raises(UserError, match="unknown to this version"):
        Checkpoint(source=str(file), parts_in_file=held).described_by  # noqa: B018


def test_two_known_models_of_the_same_shapes_are_told_apart_by_the_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = Checkpoint(source="wan2.2-t2v-a14b", placement=Placement(on_meta=True))
    with torch.device("meta"):
        expert = WanTransformer3DModel.from_config(known.config("transformer_2")).state_dict()
    header = {key: ("BF16", list(value.shape)) for key, value in expert.items()}
    (tmp_path / "high_noise.safetensors").touch()
    monkeypatch.setattr(SingleFile, "_header", header)
    with pytest.raises(UserError, match=r"one of wan2\.1-t2v-14b, wan2\.2-t2v-a14b.*config=wan2"):
        Wan(model=str(tmp_path / "high_noise.safetensors")).load(Placement(on_meta=True))


def test_files_of_other_networks_are_refused_in_a_sentence(
    root: Path, small_folder: Path, tmp_path: Path
) -> None:
    file = tmp_path / "file.safetensors"
    config = str(root / "wan")
    stored = load_file(root / "wan.safetensors")

    def refused(weights: dict[str, torch.Tensor], message: str, **options: Any) -> None:
        save_file(weights, file)
        with pytest.raises(UserError, match=message) as caught:
            Wan(model=str(file), **{"config": config, **options}, **WAN).load(Placement())
        assert "\n" not in str(caught.value)

    key = next(iter(stored))
    without = {name: value for name, value in stored.items() if name != key}
    refused(without, "lacks 1 weights of a WanTransformer3DModel")
    refused({**stored, "vace_blocks.0.q": torch.ones(1)}, "has 1 weights that a Wan.*'vace_blocks")
    refused({**stored, key: torch.ones(3)}, r"is of shape \[3\]")
    refused({**stored, key: stored[key].to(torch.float8_e4m3fn)}, "are quantized .*memory.quant")
    refused(stored, "unknown to this version.*backbone.config=FOLDER", config=None)
    file.write_bytes(b"no tensors")
    with pytest.raises(UserError, match=r"no \.safetensors file"):
        Wan(model=str(file), config=config, **WAN).load(Placement())
    with pytest.raises(UserError, match=r"no weights named 'model\.diffusion_model"):
        animatediff(root / "wan.safetensors", root / "adapter").load(Placement())
    with pytest.raises(UserError, match="holds a UNet2DConditionModel"):
        animatediff(root / "base.safetensors", root / "adapter", config=str(small_folder)).load(
            Placement()
        )


# --- folders -----------------------------------------------------------------------------------


def as_variant(folder: Path, target: Path, shards: bool) -> Path:
    """A copy in which every network is in fp16's files, in shards if asked."""
    from diffusers import AutoencoderKLWan
    from transformers import UMT5EncoderModel

    shutil.copytree(folder, target)
    kinds = {
        "transformer": WanTransformer3DModel, "vae": AutoencoderKLWan,
        "text_encoder": UMT5EncoderModel,
    }  # fmt: skip
    for part, cls in kinds.items():
        network = cls.from_pretrained(folder / part)
        shutil.rmtree(target / part)
        size = {"max_shard_size": "2KB"} if shards else {}
        network.save_pretrained(target / part, variant="fp16", **size)
    return target


@pytest.mark.parametrize("shards", [False, True])
def test_a_folder_of_a_variant_is_read_and_copied_without_its_name(
    root: Path, tmp_path: Path, shards: bool
) -> None:
    folder = as_variant(root / "wan", tmp_path / "fp16", shards)
    names = [path.name for path in (folder / "transformer").iterdir()]
    assert all(".fp16" in name for name in names if name != "config.json")
    assert (len(names) > 3) == shards
    plain, variant = (Wan(model=str(each), **WAN) for each in (root / "wan", f"{folder}/"))
    same(plain, variant)
    spec = variant.load(Placement()).export_spec()
    assert spec is not None and spec.variant == "fp16"
    for part in ("transformer", "vae", "text_encoder"):
        spec.copy(part, tmp_path / f"copy-{part}")
        assert not any(".fp16" in path.name for path in (tmp_path / f"copy-{part}").iterdir())
        shutil.rmtree(folder / part)
        shutil.copytree(tmp_path / f"copy-{part}", folder / part)
    same(plain, variant)
