"""Compiled blocks take the same step; blocks and modes that do not compile are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Said, load_small
from diffusers import CogVideoXTransformer3DModel, UNetMotionModel, WanTransformer3DModel
from small_cogvideox import load_small_cogvideox
from small_step import FIRST, Bench, MemoryMode, a_batch, apart
from small_wan import OPTIONS, load_small_wan, save_small_wan
from torch import Tensor, nn
from torch._dynamo import config as dynamo
from torch._inductor import config as inductor

from dpo_video.errors import TrainingError, UserError
from dpo_video.loss.global_ import Global
from dpo_video.memory import compile as compiled
from dpo_video.memory.blocks import blocks
from dpo_video.memory.compile import check_compile, compile_blocks, without_graph
from dpo_video.memory.modes import apply_memory_modes
from dpo_video.reference.copy import Copy
from dpo_video.reference.toggle import Toggle
from dpo_video.settings import MemorySettings
from dpo_video.strategies import Reference

ON = MemorySettings(compile="on")
# Dynamo reads .grad of every tensor that it traces.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")


@pytest.fixture(autouse=True)
def traced_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trace graphs and run them by eager kernels: seconds, where inductor takes minutes."""
    monkeypatch.setattr(compiled, "BACKEND", "aot_eager")


@pytest.fixture(scope="module")
def wan_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small_wan(tmp_path_factory.mktemp("wan"))


def last_weights(policy: nn.Module) -> list[nn.Parameter]:
    """The second matrix of every LoRA, which starts at zero."""
    return [weight for name, weight in policy.named_parameters() if ".lora_B." in name]


def graphs() -> int:
    """Number of graphs compiled so far."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def test_every_mode_takes_the_same_step(wan_folder: Path) -> None:
    bench = Bench(load_small_wan(wan_folder))
    batch = a_batch(bench.model, FIRST)
    modes: tuple[MemoryMode, ...] = ("joint", "split", "linear")
    plain = {mode: bench.gradient(mode, batch, Global()) for mode in modes}
    for memory in (ON, ON.model_copy(update={"checkpointing": "blocks"}), MemorySettings()):
        apply_memory_modes(bench.policy, memory)
        before = graphs()
        for mode in modes:
            assert apart(plain[mode], bench.gradient(mode, batch, Global())) < 1e-5, (memory, mode)
        # One for the first block, whose input has no gradient, and one for the others; for one
        # video and for two. Checkpointed blocks, the reference and passes without backward share
        # them.
        assert graphs() - before == (4 if memory == ON else 0)


def test_a_unet_takes_the_same_step(small_folder: Path) -> None:
    bench = Bench(load_small(small_folder))
    batch = a_batch(bench.model, FIRST)
    plain = bench.gradient("split", batch, Global(beta=100))
    apply_memory_modes(bench.policy, ON)
    before = graphs()
    assert apart(plain, bench.gradient("split", batch, Global(beta=100))) < 1e-5
    assert graphs() - before < len(list(blocks(bench.policy)))  # equal blocks share one


@pytest.mark.parametrize("reference", [Toggle(), Copy()], ids=repr)
@pytest.mark.parametrize("adapter", ["new", "moved"])
def test_the_reference_runs_the_policys_graphs(
    small_cogvideox: Path, reference: Reference, adapter: str
) -> None:
    bench = Bench(load_small_cogvideox(small_cogvideox))
    moved = [weight.detach().clone() for weight in last_weights(bench.policy)]
    if adapter == "new":
        for weight in last_weights(bench.policy):
            weight.data.zero_()
    batch = a_batch(bench.model, FIRST)
    bench.reference_model = reference.attach(bench.policy)
    plain = bench.step("joint", batch, Global())
    apply_memory_modes(bench.policy, ON)
    bench.reference_model = reference.attach(bench.policy)
    before = graphs()
    output = bench.step("joint", batch, Global())
    # There is one block. torch 2.6 compiles a copy of it again.
    assert graphs() - before <= (1 if isinstance(reference, Toggle) else 2)
    assert torch.allclose(output.margin, plain.margin, atol=1e-8)
    if adapter == "new":
        assert output.margin.item() == 0
    else:
        assert output.margin.item() != 0
        for weight, before_it in zip(last_weights(bench.policy), moved, strict=True):
            assert torch.equal(weight, before_it)


def origin(result: Tensor) -> set[str]:
    """Names of the operations in its autograd graph."""
    reached, ahead = set(), [result.grad_fn]
    while ahead:
        node = ahead.pop()
        if node is not None and node not in reached:
            reached.add(node)
            ahead += [parent for parent, _ in node.next_functions]
    return {node.name() for node in reached}


def test_without_graph_cuts_the_graph_after_each_block(wan_folder: Path) -> None:
    bench = Bench(load_small_wan(wan_folder))
    apply_memory_modes(bench.policy, ON)
    noisy, timestep = bench.draw(1)
    shown = noisy, timestep, a_batch(bench.model, FIRST).context
    traced = bench.model.predict(bench.policy, *shown)
    with without_graph(bench.policy):
        cut = bench.model.predict(bench.policy, *shown)
    assert torch.equal(cut, traced)
    assert "CompiledFunctionBackward" in origin(traced)
    assert "CompiledFunctionBackward" not in origin(cut)
    with torch.no_grad():
        assert torch.allclose(cut, bench.model.predict(bench.policy, *shown), atol=1e-6)


def test_a_block_that_does_not_compile_is_refused() -> None:
    class Breaking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other = nn.Linear(2, 2), nn.Linear(2, 2)

        def forward(self, hidden: Tensor) -> Tensor:
            torch._dynamo.graph_break()
            found: Tensor = self.other(self.one(hidden))
            return found

    network = nn.Module()
    network.layers = nn.ModuleList([Breaking()])
    assert compile_blocks(network) == 1
    with pytest.raises(TrainingError, match=r"A Breaking cannot be compiled .*compile=off\.$"):
        network.layers[0](torch.ones(1, 2))
    with pytest.raises(TrainingError, match="A Linear has no blocks that could be compiled"):
        compile_blocks(nn.Linear(2, 2))


def test_more_shapes_than_the_limit_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other = nn.Linear(2, 2), nn.Linear(2, 2)

        def forward(self, hidden: Tensor) -> Tensor:
            found: Tensor = self.other(self.one(hidden))
            return found

    monkeypatch.setattr(compiled, "GRAPHS", 1)
    network = nn.Module()
    network.layers = nn.ModuleList([Block()])
    with dynamo.patch(cache_size_limit=1, fail_on_cache_limit_hit=False):
        compile_blocks(network)
        network.layers[0](torch.ones(1, 2))
        with pytest.raises(TrainingError, match="A Block cannot be compiled"):
            network.layers[0](torch.ones(2, 2))


def test_a_missing_compiler_is_reported_before_loading() -> None:
    told = r"needs a C\+\+ compiler.*memory\.compile=off\.$"
    missing: dict[str, Any] = {"cpp.cxx": ("no-such-compiler",)}
    with inductor.patch(missing), pytest.raises(UserError, match=told):
        check_compile(ON, torch.device("cpu"))
    with pytest.raises(UserError, match="for 'mps' has not been tried"):
        check_compile(ON, torch.device("mps"))
    check_compile(MemorySettings(), torch.device("mps"))


@pytest.mark.parametrize(
    "other", [{"offload": "blocks"}, {"shard": 2}, {"quantization": "int8"}], ids=repr
)
def test_compile_refuses_packed_weights(other: dict[str, object]) -> None:
    memory = MemorySettings.model_validate({"compile": "on", **other})
    with pytest.raises(UserError, match="would keep whole weights"):
        check_compile(memory, torch.device("cpu"))


def test_a_compiled_run_resumes_uncompiled(wan_folder: Path, tmp_path: Path, said: Said) -> None:
    run, quick = (
        tmp_path / "run",
        ["rank=2", "gradient_accumulation_steps=1", "validation_videos=1", "report_to=none"],
    )
    command = ["train", "--backbone=wan", f"--set=backbone.model={wan_folder}", "--pairs=jitter",
               "--set=pairs.num_inference_steps=1", "--loss=global", "--reference=cached",
               "--count=2", "--device=cpu",
               *(f"--set=backbone.{name}={value}" for name, value in OPTIONS.items()),
               *(f"--set=train.{option}" for option in quick), f"--out={run}"]  # fmt: skip
    said(0, *command, "--steps=2", "--set=memory.compile=on")
    assert 'compile = "on"' in (run / "run.toml").read_text()
    assert json.loads((run / "log.jsonl").read_text().splitlines()[0])["margin"] == 0
    # Uncompiled predictions differ in the last bits, so they have a cache of their own.
    said(0, "train", f"--out={run}", "--resume", "--steps=3", "--set=memory.compile=off")
    manifests = tmp_path.glob("pairs/*/reference_cache/*/manifest.json")
    kernels = [json.loads(path.read_text())["kernels"] for path in manifests]
    assert sorted("compiled" in each for each in kernels) == [False, True]
    told = said(2, *command[:-1], f"--out={tmp_path / 'b'}", "--set=memory.compile=on",
                "--set=memory.offload=blocks")  # fmt: skip
    assert "Set memory.compile=off, or leave those out." in told


def test_diffusers_declares_the_repeated_blocks_of_wan_alone() -> None:
    # Once it declares them for all families, its compile_repeated_blocks can find the blocks.
    declared = {
        kind.__name__: bool(getattr(kind, "_repeated_blocks", None))
        for kind in (WanTransformer3DModel, CogVideoXTransformer3DModel, UNetMotionModel)
    }
    assert declared == {
        "WanTransformer3DModel": True,
        "CogVideoXTransformer3DModel": False,
        "UNetMotionModel": False,
    }
