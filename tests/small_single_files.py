"""Checkpoint folders written as the single files of other programs: the inverse of converters."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
_UNET = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_WAN = {
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "condition_embedder.time_proj": "time_projection.1",
    "attn1.": "self_attn.",
    "attn2.": "cross_attn.",
    "to_out.0": "o",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "ffn.net.0.proj": "ffn.0",
    "ffn.net.2": "ffn.2",
    "proj_out": "head.head",
}


def weights(folder: Path) -> dict[str, Tensor]:
    """All weights of a network's folder."""
    files = [load_file(path) for path in sorted(folder.glob("*.safetensors"))]
    return {name: value for file in files for name, value in file.items()}


def save_stable_diffusion(folder: Path, file: Path) -> Path:
    """UNet, VAE and text encoder of a folder under the names of Stable Diffusion's checkpoints."""
    layers = json.loads((folder / "unet" / "config.json").read_text())["layers_per_block"]
    levels = len(json.loads((folder / "vae" / "config.json").read_text())["up_block_types"])
    unet = {unet_name(key, layers): value for key, value in weights(folder / "unet").items()}
    vae = {_vae(key, levels): value for key, value in weights(folder / "vae").items()}
    text = {
        f"text_model.{key.removeprefix('text_model.')}": value
        for key, value in weights(folder / "text_encoder").items()
    }
    prefixes: Mapping[str, dict[str, Tensor]] = {
        "model.diffusion_model": unet,
        "first_stage_model": vae,
        "cond_stage_model.transformer": text,
    }
    save_file(
        {
            f"{prefix}.{key}": value
            for prefix, part in prefixes.items()
            for key, value in part.items()
        },
        file,
    )
    return file


def unet_name(key: str, layers: int) -> str:
    for ours, theirs in _UNET.items():
        if key.startswith(f"{ours}."):
            return key.replace(ours, theirs)
    found = re.fullmatch(r"(?:(down|up)_blocks\.(\d+)|mid_block)\.(\w+)\.(\d+)\.(.+)", key)
    assert found is not None, key
    side, level, kind, index, rest = found.groups()
    if kind == "resnets":
        for ours, theirs in _RESNET.items():
            rest = rest.replace(ours, theirs)
    if side is None:
        return f"middle_block.{2 * int(index) + (kind == 'attentions')}.{rest}"
    first = int(level) * (layers + 1)
    if side == "down":
        if kind == "downsamplers":
            return f"input_blocks.{1 + first + layers}.0.op.{rest.removeprefix('conv.')}"
        return f"input_blocks.{1 + first + int(index)}.{int(kind == 'attentions')}.{rest}"
    if kind == "upsamplers":
        return f"output_blocks.{first + layers}.1.{rest}"
    return f"output_blocks.{first + int(index)}.{int(kind == 'attentions')}.{rest}"


def _vae(key: str, levels: int) -> str:
    key = key.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
    key = re.sub(
        r"up_blocks\.(\d+)", lambda found: f"up.{levels - 1 - int(found[1])}", key
    ).replace("down_blocks.", "down.")
    key = re.sub(r"mid_block\.resnets\.(\d+)", lambda found: f"mid.block_{int(found[1]) + 1}", key)
    key = key.replace("resnets.", "block.")
    return re.sub(r"(down|up)samplers\.0", r"\1sample", key)


def save_motion_module(folder: Path, file: Path) -> Path:
    """A motion adapter under the names of AnimateDiff's own motion modules."""
    found = {}
    for key, value in weights(folder).items():
        if key.endswith("pos_embed.pe"):
            key = key.replace("pos_embed.pe", "attn1.pos_encoder.pe")
        key = re.sub(r"motion_modules\.(\d+)\.", r"motion_modules.\1.temporal_transformer.", key)
        key = key.replace(".norm1.", ".norms.0.").replace(".norm2.", ".norms.1.")
        key = key.replace(".norm3.", ".ff_norm.")
        key = key.replace(".attn1.", ".attention_blocks.0.").replace(
            ".attn2.", ".attention_blocks.1."
        )
        found[key] = value
    save_file(found, file)
    return file


def save_wan(folder: Path, file: Path, prefix: str = "") -> Path:
    """A transformer's folder under Wan's own names; ComfyUI's have a prefix."""
    found = {}
    for key, value in weights(folder).items():
        if key == "scale_shift_table":
            key = "head.modulation"
        key = key.replace("scale_shift_table", "modulation")
        key = re.sub(r"\.norm([23])\.", lambda found: f".norm{5 - int(found[1])}.", key)
        for ours, theirs in _WAN.items():
            key = key.replace(ours, theirs)
        found[prefix + key] = value
    save_file(found, file)
    return file
