"""Names of LoRA modules in ComfyUI, by family."""

from __future__ import annotations

import re
from collections.abc import Mapping

from dpo_video.types import LoraNames

_IN_MOTION_MODULE = re.compile(
    r"(?P<module>.*motion_modules\.\d+)\.(?P<block>transformer_blocks\.\d+)"
    r"\.attn(?P<attention>[12])\.(?P<projection>to_q|to_k|to_v|to_out)(\.0)?"
)
_COGVIDEOX: Mapping[str, str] = {
    "attn1.to_q": "q",
    "attn1.to_k": "k",
    "attn1.to_v": "v",
    "attn1.to_out.0": "attn_out",
    "ff.net.0.proj": "ff_proj",
    "ff.net.2": "ff_out",
}
_WAN: Mapping[str, str] = {
    **{
        f"attn{number}.{ours}": f"{theirs}_attn.{projection}"
        for number, theirs in ((1, "self"), (2, "cross"))
        for ours, projection in (("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "o"))
    },
    "ffn.net.0.proj": "ffn.0",
    "ffn.net.2": "ffn.2",
}


def animatediff(module: str) -> LoraNames | None:
    """The layout of AnimateDiff's own motion LoRAs, which AnimateDiff-Evolved reads.

    Module names: the inverse of diffusers' scripts/convert_animatediff_motion_lora_to_diffusers.py;
    names of the factors: Kosinkadink/ComfyUI-AnimateDiff-Evolved, animatediff/model_injection.py,
    load_motion_lora_as_patches.
    """
    if (found := _IN_MOTION_MODULE.fullmatch(module)) is None:
        return None
    stem = (
        f"{found['module']}.temporal_transformer.{found['block']}.attention_blocks."
        f"{int(found['attention']) - 1}.processor.{found['projection']}_lora"
    )
    return LoraNames(down=f"{stem}.down.weight", up=f"{stem}.up.weight")


def cogvideox(module: str) -> LoraNames | None:
    """The names of ComfyUI's own implementation: comfy/ldm/cogvideo/model.py, CogVideoXBlock."""
    return _generic(module, "transformer_blocks", _COGVIDEOX)


def wan(module: str) -> LoraNames | None:
    """Wan's own module names.

    The inverse of diffusers' scripts/convert_wan_to_diffusers.py, TRANSFORMER_KEYS_RENAME_DICT.
    """
    return _generic(module, "blocks", _WAN)


def _generic(module: str, blocks: str, layers: Mapping[str, str]) -> LoraNames | None:
    """Comfy-Org/ComfyUI, comfy/lora.py, model_lora_keys_unet ("generic lora format")."""
    found = re.fullmatch(rf"{blocks}\.(?P<block>\d+)\.(?P<layer>.+)", module)
    if found is None or found["layer"] not in layers:
        return None
    stem = f"diffusion_model.blocks.{found['block']}.{layers[found['layer']]}"
    return LoraNames(down=f"{stem}.lora_A.weight", up=f"{stem}.lora_B.weight")
