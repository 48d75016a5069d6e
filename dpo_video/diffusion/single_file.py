"""Networks in a single .safetensors file, as Stable Diffusion, AnimateDiff, Wan and ComfyUI have.

diffusers' converters give the names of its own modules. Its `from_single_file` is not used: it
rounds what `from_pretrained` keeps in fp32, and only warns of weights that are missing or left
over. Here a file gives the network that a folder of the same weights gives, or is refused.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, final

import torch
from accelerate import init_empty_weights
from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

_COMFY = "model.diffusion_model."  # ComfyUI's prefix of a denoiser
_FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_INTEGERS = {"I64", "I32"}  # positions


class FileError(ValueError):
    """A file does not hold the network; the message is the reason."""


@final
@dataclass(frozen=True, kw_only=True)
class FilePart:
    """A network that a single file can hold."""

    network: type[Any]
    """Its class, of diffusers or transformers."""
    prefix: str = ""
    """Prefix of its keys; "" if it is all that such files hold."""


@final
@dataclass(frozen=True)
class SingleFile:
    """A .safetensors file with networks under the names of other programs."""

    path: Path

    def holds(self, part: FilePart) -> bool:
        """Whether it has weights of a part."""
        return any(key.startswith(part.prefix) for key in self._header)

    def fits(self, part: FilePart, config: Mapping[str, Any]) -> bool:
        """Whether its weights have the names and shapes of the network that `config` describes."""
        if config.get("_class_name") != part.network.__name__:
            return False
        try:
            self.state(part, config, outline(part.network, config, torch.float32), on_meta=True)
        except FileError:
            return False
        return True

    def load(self, part: FilePart, config: Mapping[str, Any], dtype: torch.dtype) -> Any:
        """Load a part, on the CPU.

        Raises:
            FileError: if it lacks weights of the network, or has weights of another one.
        """
        described = config.get("_class_name", part.network.__name__)
        if described != part.network.__name__:
            raise FileError(f"it holds a {part.network.__name__}, not a {described}")
        network = outline(part.network, config, dtype)
        state = self.state(part, config, network)
        kinds = {name: value.dtype for name, value in _tensors(network).items()}
        network.load_state_dict(
            {name: value.to(kinds[name]) for name, value in state.items()},
            assign=True,
            strict=False,
        )
        return network.eval()

    def settings(self, part: FilePart, config: Mapping[str, Any]) -> Mapping[str, Any]:
        """The configuration, with what only the file tells: the frames of motion modules."""
        if "motion_max_seq_length" not in config:
            return config
        lengths = {
            shape[1]
            for key, (_, shape) in self._header.items()
            if key.startswith(part.prefix) and key.endswith("pos_encoder.pe")
        }
        return {**config, "motion_max_seq_length": lengths.pop()} if len(lengths) == 1 else config

    def state(
        self,
        part: FilePart,
        config: Mapping[str, Any],
        network: nn.Module,
        *,
        on_meta: bool = False,
    ) -> dict[str, Tensor]:
        """The weights of a part under the names of its network.

        Raises:
            FileError: if they are not exactly those of the network.
        """
        expected = _tensors(network)
        state = self._read(part, on_meta=on_meta)
        bare = {key.removeprefix(_COMFY): value for key, value in state.items()}
        if expected.keys() == bare.keys():
            state = bare
        elif issubclass(part.network, PreTrainedModel):
            state = _clip(state, part.prefix)
        else:
            state = _converted(part.network, config, state)
        # Sinusoids of positions are computed, not read.
        missing = sorted(name for name in expected.keys() - state.keys() if name[-3:] != ".pe")
        if missing:
            raise FileError(
                f"it lacks {len(missing)} weights of {_article(part.network)}, '{missing[0]}' first"
            )
        if strange := sorted(state.keys() - expected.keys()):
            raise FileError(
                f"it has {len(strange)} weights that {_article(part.network)} of this "
                f"configuration does not have, '{strange[0]}' first"
            )
        for name, value in state.items():
            if value.shape != expected[name].shape:
                raise FileError(
                    f"its '{name}' is of shape {list(value.shape)}, and the configuration has "
                    f"{list(expected[name].shape)}"
                )
        return state

    def _read(self, part: FilePart, *, on_meta: bool) -> dict[str, Tensor]:
        header = {key: value for key, value in self._header.items() if key.startswith(part.prefix)}
        for key, (kind, _) in header.items():
            if kind not in _FLOATS and kind not in _INTEGERS:
                raise FileError(
                    f"its weights are quantized ('{key}' is {kind}); take a file in fp32, fp16 or "
                    "bf16, and quantize it by --set memory.quantization=..."
                )
        if on_meta:
            return {
                key: torch.empty(shape, dtype=_FLOATS.get(kind, torch.int64), device="meta")
                for key, (kind, shape) in header.items()
            }
        with safe_open(self.path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in header}

    @cached_property
    def _header(self) -> dict[str, tuple[str, list[int]]]:
        """Data type and shape of every tensor."""
        try:
            with safe_open(self.path, framework="pt") as file:
                slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
                return {key: (each.get_dtype(), each.get_shape()) for key, each in slices.items()}
        except (SafetensorError, OSError) as error:
            raise FileError(f"it is no .safetensors file ({error})") from error


def outline(cls: type[Any], config: Mapping[str, Any], dtype: torch.dtype) -> Any:
    """A network whose parameters are on the meta device, in the dtypes of `from_pretrained`.

    Buffers are real. A class of diffusers may keep modules in fp32; if it does, buffers stay too.
    """
    with init_empty_weights(include_buffers=False):
        if issubclass(cls, PreTrainedModel):
            return cls(cls.config_class.from_dict(copy.deepcopy(dict(config)))).to(dtype)
        network = cls.from_config(dict(config))
    return cast(network, dtype)


def cast(network: Any, dtype: torch.dtype) -> Any:
    """Cast a network of diffusers as `from_pretrained` does."""
    kept = network._keep_in_fp32_modules
    buffers = () if kept else network.named_buffers()
    for name, tensor in (*network.named_parameters(), *buffers):
        if tensor.is_floating_point() and not {*(kept or ())} & {*name.split(".")}:
            tensor.data = tensor.data.to(dtype)
    return network


def _tensors(network: nn.Module) -> dict[str, Tensor]:
    """Parameters and stored buffers."""
    return dict(network.state_dict(keep_vars=True))


def _clip(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Names of CLIP's text encoder, which transformers has flattened; positions are computed."""
    names = {key: key.removeprefix(prefix).removeprefix("text_model.") for key in state}
    return {name: state[key] for key, name in names.items() if not name.endswith("position_ids")}


def _converted(
    cls: type[Any], config: Mapping[str, Any], state: dict[str, Tensor]
) -> dict[str, Tensor]:
    """The weights under the names of diffusers."""
    if cls.__name__ not in SINGLE_FILE_LOADABLE_CLASSES:
        raise FileError(
            f"diffusers converts no {cls.__name__} from a single file, and its names are not those "
            "of diffusers"
        )
    convert = SINGLE_FILE_LOADABLE_CLASSES[cls.__name__]["checkpoint_mapping_fn"]
    try:
        found: dict[str, Tensor] = convert(checkpoint=state, config=dict(config))
    except (KeyError, IndexError, AttributeError, ValueError, RuntimeError) as error:
        raise FileError(f"diffusers cannot convert it to a {cls.__name__} ({error})") from error
    return found


def _article(cls: type[Any]) -> str:
    return f"{'an' if cls.__name__[0] in 'AEIOU' else 'a'} {cls.__name__}"
