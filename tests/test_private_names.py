"""Private names of other libraries that the package uses, each with the versions it was seen in.

A release may rename any of them without notice: then the test of that name fails and says where to
look, before a user's run does.
"""

from __future__ import annotations

import ast
import importlib
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "dpo_video"
LIBRARIES = ("torch", "peft", "diffusers", "accelerate", "transformers")
TORCH, PEFT, ACCELERATE = "torch 2.10 to 2.13", "peft 0.20 to 0.21", "accelerate 1.10 to 1.15"
IMPORTED = {
    "torch._inductor.cpp_builder.get_cpp_compiler": TORCH,
    "torch._inductor.exc.InvalidCxxCompiler": TORCH,
    "torch._subclasses.fake_tensor.FakeTensor": TORCH,
    "torch._subclasses.fake_tensor.FakeTensorMode": TORCH,
    "torch.overrides._get_current_function_mode_stack": TORCH,
    "torch.utils._python_dispatch.TorchDispatchMode": TORCH,
    "torch.utils._pytree.tree_flatten": TORCH,
    "torch.utils._pytree.tree_leaves": TORCH,
    "torch.utils._pytree.tree_map": TORCH,
    "torch.utils._pytree.tree_map_only": TORCH,
    "torch.utils._pytree.tree_unflatten": TORCH,
    "torch.utils._triton.has_triton": TORCH,
}
USED = {
    "torch._dynamo.config.cache_size_limit": TORCH,
    "torch._dynamo.config.fail_on_cache_limit_hit": TORCH,
    "torch._dynamo.exc.FailOnRecompileLimitHit": TORCH,
    "torch._dynamo.exc.TorchDynamoException": TORCH,
    "torch._inductor.list_options": TORCH,
    "torch.nn.Module._apply": TORCH,
    "torch.ops.aten.add.Tensor._overloadpacket": TORCH,
    "torch.ops.aten.add.Tensor._schema": TORCH,
    "peft.tuners.tuners_utils.BaseTunerLayer._cast_input_dtype": PEFT,
    "peft.tuners.tuners_utils.BaseTunerLayer._disable_adapters": PEFT,
    "accelerate.state.AcceleratorState._reset_state": ACCELERATE,
}


def found(path: str) -> object:
    """The object of a dotted path: the longest module in it, and its attributes."""
    parts = path.split(".")
    for count in range(len(parts) - 1, 0, -1):
        try:
            value: object = importlib.import_module(".".join(parts[:count]))
        except ModuleNotFoundError:
            continue
        for name in parts[count:]:
            value = getattr(value, name)
        return value
    raise AttributeError(path)


@pytest.mark.parametrize("path", [*IMPORTED, *USED])
def test_a_private_name_is_still_there(path: str) -> None:
    try:
        found(path)
    except AttributeError:
        versions = {**IMPORTED, **USED}[path]
        pytest.fail(f"{path} was there in {versions}, and is not in the installed version.")


def imports(file: Path) -> set[str]:
    """The private names that a file imports from the libraries: a module, or a name of it."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(LIBRARIES):
            names |= {f"{node.module}.{each.name}" for each in node.names}
        elif isinstance(node, ast.Import):
            names |= {each.name for each in node.names if each.name.startswith(LIBRARIES)}
    return {name for name in names if "._" in name}


def test_every_private_name_that_is_imported_is_listed() -> None:
    used = set().union(*(imports(file) for file in PACKAGE.rglob("*.py")))
    listed = {*IMPORTED, *(name.rpartition(".")[0] for name in IMPORTED)}
    assert used <= listed, "List it above with the versions that have it, or do without."
    assert all(any(each in (name, name.rpartition(".")[0]) for each in used) for name in IMPORTED)
