"""Options of the workflows: the tables of run.toml that belong to no strategy. Free of torch."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from dpo_video.paths import LocalPath, LoraSource, PromptSource

LARGEST_SEED = (1 << 63) - 1  # TOML's largest number
LARGEST_RANK = 1 << 16  # more than the width of any layer


class Settings(BaseModel):
    """Base of all tables: frozen, no unknown fields."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False
    )


class BuildSettings(Settings):
    """[build]: how many pairs to build, and of what."""

    prompts: PromptSource | None = None
    """Prompts of pairs that need no clips: a file (one per line, .csv or .jsonl), or `training` or
    `evaluation`, the package's lists. Cycled. Default: `training`."""
    count: int | None = Field(default=None, ge=1)
    """Number of pairs to build. Default: 64, or all pairs of a builder that reads its own files."""
    previews: bool = True
    """Write an mp4 preview of every pair."""
    rebuild: bool = False
    """Build pairs again that another version of their builder, its plugin or dpo-video has built.
    The earlier ones are kept."""
    accept_pairs: bool = False
    """Use such pairs as they are."""

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if self.rebuild and self.accept_pairs:
            raise ValueError("rebuild and accept_pairs exclude each other; leave one of them out")
        return self


class TrainSettings(Settings):
    """[train]: the optimization."""

    steps: int = Field(default=200, ge=1)
    """Number of optimizer steps."""
    batch_size: int = Field(default=1, ge=1)
    """Pairs per forward pass and process."""
    gradient_accumulation_steps: int = Field(default=4, ge=1)
    """Forward passes per optimizer step and process."""
    learning_rate: float = Field(default=1e-4, gt=0)
    """Learning rate of AdamW after warm-up and before decay."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Betas of AdamW."""
    weight_decay: float = Field(default=0.01, ge=0)
    """Weight decay of AdamW."""
    warmup_steps: int = Field(default=10, ge=0)
    """Steps of linear warm-up of the learning rate."""
    decay: float = Field(default=0.0, ge=0, le=1)
    """Share of the steps at the end over which the learning rate decays linearly to 0."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradients are clipped to this norm."""
    rank: int = Field(default=16, ge=1, le=LARGEST_RANK)
    """LoRA rank. The defaults of this table can differ by backbone, following its paper:
    `dpo-video config --backbone NAME` prints them."""
    alpha: float = Field(default=32.0, gt=0)
    """LoRA alpha; the update is scaled by alpha / rank. If only the rank is set, alpha scales with
    it."""
    lora: dict[str, Any] = {}
    """Further options of peft's LoraConfig by name, for a new adapter: `--set
    train.lora.use_dora=true`, `--set 'train.lora.target_modules=["to_q", "to_v"]'`. Possible are
    target_modules, exclude_modules, layers_to_transform, layers_pattern, rank_pattern,
    alpha_pattern, use_rslora, use_dora and init_lora_weights (true or gaussian): with the others,
    policy and reference would differ before the first step, or the adapter could not be read back.
    """
    init_from: LoraSource | None = None
    """A LoRA to start from, instead of a new one: a .safetensors file of any origin, a folder in
    PEFT's format, or a hub id. It brings its layers, rank and alpha. The reference is the base
    model with this LoRA as it was at the start."""
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    """Mixed precision of the forward passes. Errors and losses are always computed in fp32."""
    skips: int = Field(default=3, ge=0)
    """Number of steps of the run that may be skipped because of a non-finite loss or gradient. One
    more stops training and names the pairs. Steps skipped by the fp16 loss scaler do not count."""
    save_steps: int = Field(default=50, ge=1)
    """Steps between checkpoints. The last step is always saved."""
    save_total_limit: int | None = Field(default=None, ge=1)
    """Number of newest checkpoints to keep; older ones are deleted. Default: keep all. A checkpoint
    is three times the size of its adapter."""
    validation_videos: int = Field(default=2, ge=0)
    """Number of validation videos generated at every checkpoint, with fixed prompts and seeds."""
    validation_prompts: PromptSource | None = None
    """Prompts of the validation videos, the first ones: a file, or `training` or `evaluation`, the
    package's lists. Default: those of the first pairs, which need no text encoder."""
    min_decided: float = Field(default=0.0, ge=0, lt=1)
    """Train only on pairs that prefer a video in more than this share of their one-second segments.
    DenseDPO uses 0.2."""
    labels: tuple[str, ...] = ()
    """Names of label sets to train on instead of the labels of the pairs; several are combined by
    vote. A started run records NAME@HASH, and changed labels of that name are refused."""
    report_to: str = "tensorboard"
    """Tracker of Accelerate to report to, or "none" to write log.jsonl only. TensorBoard, wandb and
    trackio also get the validation videos, the configuration and the diagnosis."""
    project: str = "dpo-video"
    """Project of the tracker; TensorBoard has none and writes to the run's folder."""
    run_name: str | None = None
    """Name of the run in the project. Default: the name of its folder."""


def _listed(value: Any) -> Any:
    """Split a comma-separated text; "none" is empty."""
    if not isinstance(value, str):
        return value
    return () if value == "none" else tuple(part.strip() for part in value.split(","))


def _checkpointing(value: Any) -> Any:
    words = ("none", "blocks", "auto")
    if value not in words and (type(value) is not int or value < 0):
        raise ValueError("must be none, blocks, auto or a number of blocks")
    return "none" if value == 0 else value


def _budget(value: Any) -> Any:
    return None if value == "auto" else value


class MemorySettings(Settings):
    """[memory]: how a training step trades memory for time.

    All modes except `quantization` give the same gradients up to rounding, and a run can be resumed
    in another mode.
    """

    checkpointing: Annotated[
        Literal["none", "blocks", "auto"] | int, BeforeValidator(_checkpointing)
    ] = "none"
    """Activation checkpointing: store only the inputs of each residual and transformer block and
    recompute the rest in the backward pass. It saves most activations and takes about a quarter
    more time. A number checkpoints that many blocks, from both ends inwards. auto chooses the
    fewest blocks that fit `budget`, as predicted by `dpo-video estimate`, and records the number in
    run.toml."""
    budget: Annotated[
        Annotated[float, Field(gt=0, allow_inf_nan=False)] | None, BeforeValidator(_budget)
    ] = None
    """GiB that checkpointing=auto may use. Default (auto): 95% of the GPU's memory, or of the card
    named by --tier if there is no GPU. Only checkpointing=auto uses it."""
    backward: Literal["joint", "split", "linear"] = "joint"
    """Number of autograd graphs held at once. joint: the graphs of both videos of all pairs of a
    batch. split: one video's graph, for any loss and batch size; one more forward pass per pair.
    linear: one video's graph without further passes, for losses of the mean errors of whole videos
    (not region or segment); it subtracts two gradients, which costs two digits of precision, and
    stores the adapter's gradients three times."""
    forward_chunks: int = Field(default=1, ge=1)
    """Number of chunks in which feed-forward and cross-attention layers run one after another, each
    recomputed in the backward pass. Their inner activations, the widest tensors of a transformer,
    then exist for one chunk only. 8 is enough. On an H200 it made a step of Wan 14% longer, and
    one of AnimateDiff 131%."""
    offload: Annotated[
        tuple[Literal["checkpoints", "blocks", "optimizer"], ...], BeforeValidator(_listed)
    ] = ()
    """Keeps idle tensors in CPU memory: none, or a comma-separated list. checkpoints: the stored
    inputs of checkpointed blocks. blocks: the frozen weights of all blocks, copied to the device
    layer by layer, which takes time. optimizer: the state of AdamW, whose step then runs on the
    CPU. Tested on CPUs only so far."""
    text_encoder: Literal["device", "host"] = "device"
    """Where the weights of the text encoder's blocks are kept. host: in CPU memory, copied to the
    device layer by layer, for cards that cannot hold it beside the denoiser and the VAE."""
    quantization: Literal["native", "int8", "nf4"] = "native"
    """Precision of the frozen weights of all blocks: native, or 8 or 4 bits. It changes the
    numbers: policy and reference are then a quantized model, and the run records it wherever it
    names its model. nf4 needs bitsandbytes: pip install 'dpo-video[nf4]'."""
    shard: int = Field(default=1, ge=1)
    """Number of processes over which FSDP2 shards the frozen weights; a block's are gathered when
    it runs, while the one before computes. It does not combine with quantization or compile, nor
    with a model of two experts. A launcher that requests FSDP or ZeRO-3 sets it to the number of
    processes."""
    compile: Literal["off", "on"] = "off"
    """Compile every residual and transformer block with torch.compile. On a CPU, small networks
    gain 3 to 8% of a step after half a minute to three minutes of compilation, so it pays off after
    hundreds to thousands of steps (benchmarks/compiled.py). Results change in the last digits;
    validation videos are sampled without it. It does not combine with quantization, shard or
    offload=blocks. It needs a C++ compiler on a CPU and Triton on a GPU, where it is untested."""

    @model_validator(mode="after")
    def _has_checkpoints(self) -> Self:
        if "checkpoints" in self.offload and self.checkpointing == "none":
            raise ValueError(
                "offload=checkpoints needs checkpointed blocks; set checkpointing=blocks"
            )
        return self

    @model_validator(mode="after")
    def _shards_native_weights(self) -> Self:
        if self.shard > 1 and self.quantization != "native":
            raise ValueError(
                "shard does not combine with quantized weights; set quantization=native, or shard=1"
            )
        return self


class EvaluateSettings(Settings):
    """[evaluate]: base against tuned model on identical prompts and seeds."""

    prompts: PromptSource | None = None
    """The evaluation prompts: a file (one per line, .csv or .jsonl), or `training` or
    `evaluation`, the package's lists. Default: the backbone's own."""
    num_prompts: int | None = Field(default=None, ge=1)
    """Number of prompts, the first ones. Default: all of `prompts`, or 47 of the backbone's."""
    num_videos_per_prompt: int = Field(default=1, ge=1)
    """Number of videos per prompt and model, each with its own seed."""
    seed: int = Field(default=0, ge=0, le=LARGEST_SEED)
    """Seed of the first video's initial noise; every further video takes the next one, unless its
    prompt has one in the file. Independent of run.seed, so that runs with other seeds are evaluated
    on the same noise."""
    batch_size: int = Field(default=1, ge=1)
    """Videos that are sampled at once. More are faster where the memory allows it, and change the
    last digits."""
    num_inference_steps: int | None = Field(default=None, ge=1)
    """Number of sampling steps. Default: the backbone's."""
    guidance_scale: float | None = Field(default=None, ge=0)
    """Scale of classifier-free guidance. Default: the backbone's."""
    tolerance: float = Field(default=0.03, ge=0, lt=1)
    """Relative loss of a motion or guard metric that still counts as keeping it: the 95% interval
    must exclude a larger loss."""
    min_effect: float = Field(default=0.02, ge=0, lt=1)
    """Relative change of a target metric below which it counts as unchanged."""
    min_effects: dict[str, Annotated[float, Field(ge=0, lt=1)]] = {}
    """The same for single metrics by name: `--set evaluate.min_effects.warp_error=0.05`."""
    min_prompts: int = Field(default=8, ge=2)
    """Number of different prompts below which an evaluation gives no verdict."""


class RunSettings(Settings):
    """[run]: options of the whole run."""

    seed: int = Field(default=0, ge=0, le=LARGEST_SEED)
    """Seed of all random draws."""
    device: str = "auto"
    """cuda, cuda:N, mps or cpu; "auto" chooses the best available device."""
    deterministic: bool = False
    """Use deterministic kernels: identical runs give identical bits on the same machine, with the
    same number of threads and the same versions. An operation without a deterministic kernel is
    refused. On a CPU it costs `tiny` no measurable time; on a GPU it is untested."""
    clips: LocalPath | None = None
    """Folder of real videos, or one video file. Default: the clips of the backbone."""
    slow_down: bool = False
    """Use clips that are shorter than the backbone's videos and have enough frames, slowed down.
    Otherwise they are skipped."""
    scene_cuts: bool = False
    """Use clips with a scene cut. Otherwise they are skipped."""
    prompt: str | None = None
    """Caption of clips without one, or the only prompt of pairs that need no clip."""
