"""What training promises, on a GPU: skipped without one.

python -m pytest tests/gpu                               # on a machine with a CUDA GPU
DPO_VIDEO_TEST_DEVICE=cpu python -m pytest tests/gpu     # rehearsal on any machine
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor

from benchmarks.support.small_models import small_cogvideox, small_wan, tiny
from dpo_video import registry
from dpo_video.data.store import Manifest, PairStore
from dpo_video.loss.global_ import Global
from dpo_video.memory.blocks import checkpoint_blocks
from dpo_video.memory.modes import apply_memory_modes
from dpo_video.memory.offload import HostAdamW, to_host
from dpo_video.memory.packed_weights import pack_frozen_weights
from dpo_video.reference.cached import Cached
from dpo_video.reference.copy import Copy
from dpo_video.reference.toggle import Toggle
from dpo_video.settings import MemorySettings, TrainSettings
from dpo_video.strategies import Metric, Reference, VideoModel
from dpo_video.support.report import StepReport
from dpo_video.support.reproducibility import settle
from dpo_video.testing import small_videos
from dpo_video.training.lora import adapt
from dpo_video.training.run import train
from dpo_video.training.run_dir import latest_checkpoint
from dpo_video.training.step import Step
from dpo_video.types import Pair, PairBatch

NAME = os.environ.get("DPO_VIDEO_TEST_DEVICE", "cuda" if torch.cuda.is_available() else "")
pytestmark = [
    pytest.mark.skipif(not NAME, reason="needs a CUDA GPU"),
    # Dynamo reads .grad of every tensor that it traces.
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor"),
]
DEVICE = torch.device(NAME or "cpu")
ON_GPU = DEVICE.type == "cuda"
MODELS = {"tiny": tiny, "wan": small_wan, "cogvideox": small_cogvideox}
DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
MEMORIES = {
    "joint": MemorySettings(backward="joint"),
    "split": MemorySettings(backward="split"),
    "linear": MemorySettings(backward="linear"),
    "joint, blocks": MemorySettings(backward="joint", checkpointing="blocks"),
    "linear, blocks offloaded": MemorySettings(
        backward="linear", checkpointing="blocks", offload="checkpoints"
    ),
    "split, blocks, 8 chunks": MemorySettings(
        backward="split", checkpointing="blocks", forward_chunks=8
    ),
}
BATCH = 1


@pytest.fixture(autouse=True)
def exact_kernels() -> Iterator[None]:
    """Convolutions and matrix products in full fp32; any precision of Accelerate."""
    AcceleratorState._reset_state(reset_partial_state=True)
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before
    settle(False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


class Setup:
    """A small model on the device, its adapter, and a pair."""

    def __init__(
        self, name: str, folder: Path, precision: str = "no", *, moved: bool = True
    ) -> None:
        self.dtype = DTYPES[precision]
        self.model: VideoModel = MODELS[name](folder / name, DEVICE, True, self.dtype)
        self.policy = adapt(self.model, TrainSettings(rank=4, alpha=4), seed=0)
        generator = torch.Generator().manual_seed(0)
        for weight_name, weight in self.policy.named_parameters():
            if moved and ".lora_B." in weight_name:
                weight.data = 0.5 * torch.randn(weight.shape, generator=generator).to(weight)
        self.weights = [each for each in self.policy.parameters() if each.requires_grad]
        shapes = self.model.prompt_shapes()
        assert shapes is not None
        size = (BATCH, *self.model.latent_shape)
        self.batch = PairBatch(
            first=torch.randn(size, generator=generator),
            second=torch.randn(size, generator=generator),
            preference=torch.ones(BATCH, size[2]),
            region=torch.ones(BATCH, 1, *size[2:]),
            strength=torch.ones(BATCH),
            keys=["0"] * BATCH,
            context={
                key: torch.randn(BATCH, *each, generator=generator).to(self.dtype)
                for key, each in shapes.items()
            },
        ).to(DEVICE)
        self.noise = torch.randn(size, generator=generator).to(DEVICE)
        self.timestep = self.model.sample_timesteps(BATCH, generator).to(DEVICE)

    def step(self, memory: MemorySettings, reference: Reference) -> tuple[float, Tensor]:
        """Margin and gradient of one step."""
        apply_memory_modes(self.policy, memory)
        self.policy.zero_grad()
        run = Step(
            model=self.model,
            policy=self.policy,
            reference_model=reference.attach(self.policy),
            loss=Global(beta=100),
            mode=memory.backward,
            autocast=lambda: torch.autocast(
                DEVICE.type, self.dtype, enabled=self.dtype != torch.float32
            ),
        )
        margin = run(self.batch, self.noise, self.timestep).margin.item()
        return margin, torch.cat([w.grad.flatten() for w in self.weights if w.grad is not None])


def apart(one: Tensor, other: Tensor) -> float:
    """Relative distance."""
    return float((one - other).norm() / one.norm())


@pytest.mark.parametrize("name", MODELS)
def test_every_memory_mode_gives_the_same_gradient(name: str, folder: Path) -> None:
    setup = Setup(name, folder)
    margin, plain = setup.step(MEMORIES["joint"], Toggle())
    assert margin != 0
    for mode, memory in MEMORIES.items():
        found, gradient = setup.step(memory, Toggle())
        assert found == pytest.approx(margin, rel=1e-2, abs=1e-6), mode
        assert apart(plain, gradient) < 2e-4, mode
    pack_frozen_weights(setup.policy, DEVICE, "native", on_host=True)
    assert apart(plain, setup.step(MEMORIES["linear"], Toggle())[1]) < 2e-4


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("precision", DTYPES)
def test_the_margin_is_exactly_0_before_training(name: str, precision: str, folder: Path) -> None:
    setup = Setup(name, folder, precision, moved=False)
    for reference in (Toggle(), Copy()):
        for mode, memory in MEMORIES.items():
            margin, gradient = setup.step(memory, reference)
            assert margin == 0, (reference, mode)
            assert gradient.isfinite().all(), (reference, mode)
            assert gradient.any(), (reference, mode)


@pytest.mark.parametrize(("base", "loss"), [("int8", 0.1), ("nf4", 0.5)])
@pytest.mark.parametrize("name", MODELS)
def test_quantized_weights_are_close(name: str, base: str, loss: float, folder: Path) -> None:
    if base == "nf4" and not importlib.util.find_spec("bitsandbytes"):
        pytest.skip("needs bitsandbytes")
    setup = Setup(name, folder)
    plain = setup.step(MEMORIES["joint"], Toggle())[1]
    pack_frozen_weights(setup.policy, DEVICE, base)  # type: ignore[arg-type]
    gradient = setup.step(MEMORIES["joint"], Toggle())[1]
    assert 0 < apart(plain, gradient) < loss
    assert apart(gradient, setup.step(MEMORIES["linear, blocks offloaded"], Toggle())[1]) < 2e-4


@pytest.mark.parametrize("name", ["wan", "cogvideox"])
def test_compiled_blocks_take_the_same_step(name: str, folder: Path) -> None:
    compiled = MemorySettings(compile="on")
    assert Setup(name, folder, moved=False).step(compiled, Toggle())[0] == 0
    setup = Setup(name, folder)
    margin, plain = setup.step(MEMORIES["joint"], Toggle())
    found, gradient = setup.step(compiled, Toggle())
    assert found == pytest.approx(margin, rel=1e-2, abs=1e-6)
    assert apart(plain, gradient) < 2e-4


def test_adamw_in_cpu_memory_steps_as_on_the_device() -> None:
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(64, 64, generator=generator)
    ours, theirs = (torch.nn.Parameter(start.clone().to(DEVICE)) for _ in range(2))
    one = HostAdamW([ours], lr=1e-2)
    other = torch.optim.AdamW([theirs], lr=1e-2)
    for _ in range(5):
        gradient = torch.randn(64, 64, generator=generator).to(DEVICE)
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        one.step()
        other.step()
    assert apart(theirs.detach(), ours.detach()) < 1e-6
    assert all(
        value.device.type == "cpu" for state in one.state.values() for value in state.values()
    )


def test_copies_in_cpu_memory_are_pinned_and_exact() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        tensor = torch.randn(1000, 33, device=DEVICE).to(dtype).t()
        copy = to_host(tensor)
        if ON_GPU:
            torch.cuda.synchronize()
            assert copy.is_pinned()
        assert torch.equal(copy, tensor.cpu())
        assert copy.stride() == tensor.stride()


SETTINGS = TrainSettings(
    steps=6,
    batch_size=2,
    gradient_accumulation_steps=1,
    learning_rate=1e-3,
    rank=4,
    alpha=4,
    save_steps=3,
    validation_videos=0,
    report_to="none",
)


def stored(model: VideoModel, folder: Path) -> PairStore:
    manifest = Manifest(
        recipe={}, identity=model.identity, latent_shape=model.latent_shape, fps=model.shape.fps
    )
    store = PairStore.create(folder, manifest)
    generator = torch.Generator().manual_seed(0)
    shapes = model.prompt_shapes()
    assert shapes is not None
    for index in range(len(store), 4):
        first, second = torch.randn(2, *model.latent_shape, generator=generator)
        pair = Pair(
            first=first, second=second, preference=torch.ones(model.latent_shape[1]),
            region=torch.ones(1, *model.latent_shape[1:]), prompt=str(index), source="random",
            strength=0.5,
        )  # fmt: skip
        store.append(
            pair, {key: torch.randn(1, *each, generator=generator) for key, each in shapes.items()}
        )
    return store


def trained(
    name: str,
    folder: Path,
    out: Path,
    *,
    precision: str = "no",
    memory: MemorySettings = MEMORIES["joint"],
    reference: Reference = Toggle(),  # noqa: B008 - it is frozen
    steps: int = SETTINGS.steps,
    resume: bool = False,
) -> list[StepReport]:
    model = MODELS[name](folder / name, DEVICE, True, DTYPES[precision])
    settings = SETTINGS.model_copy(update={"steps": steps, "mixed_precision": precision})
    events = train(
        model,
        stored(model, out.parent / f"pairs of {name} in {precision}"),
        Global(beta=1e3),
        reference,
        settings,
        seed=0,
        out=out,
        accelerator=Accelerator(cpu=not ON_GPU, mixed_precision=precision),
        memory=memory,
        resume=resume,
    )
    return [event.report for event in events]


def adapter(out: Path) -> str:
    file = latest_checkpoint(out) / "adapter" / "adapter_model.safetensors"
    return hashlib.sha256(file.read_bytes()).hexdigest()


@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("mode", ["joint", "split", "linear"])
def test_a_run_learns_in_every_precision(
    mode: str, precision: str, folder: Path, tmp_path: Path
) -> None:
    if precision == "fp16" and not ON_GPU:
        pytest.skip("the gradient scaler is a GPU's")
    reports = trained(
        "tiny", folder, tmp_path / "run", precision=precision, memory=MEMORIES[mode], steps=12
    )
    done = [each for each in reports if each.grad_norm is not None]
    assert reports[0].margin == 0
    assert len(done) >= 8
    assert max(each.margin for each in reports[-4:]) > 0


@pytest.mark.parametrize("reference", [Toggle(), Cached(noise_draws=1)], ids=repr)
@pytest.mark.parametrize("name", MODELS)
def test_a_deterministic_run_resumes_to_the_same_bytes(
    name: str, reference: Reference, folder: Path, tmp_path: Path
) -> None:
    settle(True)
    run: Callable[..., list[StepReport]] = partial(
        trained, name, folder, reference=reference, precision="bf16"
    )
    run(tmp_path / "one")
    run(tmp_path / "two")
    assert adapter(tmp_path / "one") == adapter(tmp_path / "two")
    run(tmp_path / "cut", steps=3)
    run(tmp_path / "cut", resume=True)
    assert adapter(tmp_path / "one") == adapter(tmp_path / "cut")


@pytest.mark.parametrize("name", ["warp_error", "frame_difference", "dynamic_degree", "sharpness"])
def test_metrics_agree_with_the_cpu(name: str) -> None:
    metric = registry.load("metric", name)()
    assert isinstance(metric, Metric)
    videos = small_videos(2, 8, 96, 128)
    expected = metric(videos, ["", ""])
    found = metric(videos.to(DEVICE), ["", ""])
    assert torch.allclose(expected, found.cpu(), rtol=2e-3), (expected, found)


def test_generated_videos_agree_with_the_cpu(folder: Path) -> None:
    videos = []
    for device in (torch.device("cpu"), DEVICE):
        model = tiny(folder, device, True)
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(1, *model.latent_shape, generator=generator).to(device)
        with torch.no_grad():
            latents = model.sample(model.encode_prompts(["a red square"]), noise)
            videos.append(model.decode_videos(latents).cpu())
    assert float((videos[0] - videos[1]).abs().mean()) < 1e-3


def test_a_launcher_with_nccl_trains(tmp_path: Path) -> None:
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "1", "--standalone",
        "-m", "dpo_video", "train", "--pairs", "jitter", "--loss", "global",
        "--out", str(tmp_path / "run"), "--count", "4", "--steps", "2", "--device", DEVICE.type,
        "--set", "train.validation_videos=0", "--set", "train.report_to=none",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert latest_checkpoint(tmp_path / "run").name


def test_checkpointing_and_offload_hold_less(folder: Path) -> None:
    if not ON_GPU:
        pytest.skip("reads the GPU's allocator")
    setup = Setup("wan", folder)

    def peak(memory: MemorySettings) -> int:
        torch.cuda.reset_peak_memory_stats()
        setup.step(memory, Toggle())
        return torch.cuda.max_memory_allocated()

    peaks = [peak(MEMORIES[mode]) for mode in ("joint", "linear", "linear, blocks offloaded")]
    assert peaks == sorted(peaks, reverse=True)
    checkpoint_blocks(setup.policy, 0)
