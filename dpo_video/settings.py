"""The engines' options: tables of run.toml that belong to no strategy. No torch here."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

LARGEST_RANK = 1 << 16  # wider than any layer


class Settings(BaseModel):
    """What all tables share."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class BuildSettings(Settings):
    """[build]: how many pairs."""

    count: int | None = Field(default=None, ge=1)
    """Pairs to build; when not set, 64, or all there are of pairs that bring their own files."""
    previews: bool = True
    """Write an mp4 of every pair."""


class TrainSettings(Settings):
    """[train]: the optimisation."""

    steps: int = Field(default=200, ge=1)
    """Optimizer steps."""
    batch_size: int = Field(default=1, ge=1)
    """Pairs per forward pass and process."""
    gradient_accumulation_steps: int = Field(default=4, ge=1)
    """Forward passes per optimizer step."""
    learning_rate: float = Field(default=1e-4, gt=0)
    """AdamW's learning rate, after warm-up and before decay."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's momenta."""
    weight_decay: float = Field(default=0.01, ge=0)
    """AdamW's weight decay."""
    warmup_steps: int = Field(default=10, ge=0)
    """Steps of linear warm-up."""
    decay: float = Field(default=0.0, ge=0, le=1)
    """The last share of the steps, in which the learning rate falls linearly to 0."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Largest gradient norm."""
    rank: int = Field(default=16, ge=1, le=LARGEST_RANK)
    """LoRA's rank. This and all else here may have other values for some backbones, as their papers
    have them, where you set none: see `dpo-video config --backbone NAME`."""
    alpha: float = Field(default=32.0, gt=0)
    """LoRA's alpha: its update is scaled by alpha / rank. It follows a rank that you set alone."""
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    """Mixed precision of the forward passes; errors and losses are always fp32."""
    skips: int = Field(default=3, ge=0)
    """Steps of the whole run that may be skipped because their loss or gradient is not finite; one
    more stops it and names the pairs. Steps that fp16's loss scaler skips do not count."""
    save_steps: int = Field(default=50, ge=1)
    """Steps between checkpoints; the last step is always saved."""
    save_total_limit: int | None = Field(default=None, ge=1)
    """Newest checkpoints that are kept, and older ones deleted; all of them when not set. One is
    three times the size of its adapter."""
    validation_videos: int = Field(default=2, ge=0)
    """Videos drawn at every checkpoint, with seeds that never change."""
    labels: tuple[str, ...] = ()
    """Names of labels to train on instead of the pairs' own; a vote where there are several. Once a
    run has begun, NAME@HASH: other labels of that name are refused."""
    report_to: str = "tensorboard"
    """Any tracker of Accelerate's; "none" for the JSON lines alone."""


def _listed(value: Any) -> Any:
    """A text of names with commas between them as a list; "none" as an empty one."""
    if not isinstance(value, str):
        return value
    return () if value == "none" else tuple(part.strip() for part in value.split(","))


def _checkpointing(value: Any) -> Any:
    words = ("none", "blocks", "auto")
    if value not in words and (type(value) is not int or value < 0):
        raise ValueError("it is neither none, blocks, auto nor a number of blocks")
    return "none" if value == 0 else value


def _budget(value: Any) -> Any:
    return None if value == "auto" else value


class MemorySettings(Settings):
    """[memory]: what a training step holds at once.

    Every mode gives the same gradients, to rounding, but for another `base`; a run may be resumed
    in another one.
    """

    checkpointing: Annotated[
        Literal["none", "blocks", "auto"] | int, BeforeValidator(_checkpointing)
    ] = "none"
    """Keep what each residual and transformer block of the network was given and compute the rest
    again for its backward pass: most of the activations less, a quarter more time or so. A number
    does so with that many blocks, from both ends inwards. auto takes the fewest that fit `budget`,
    found by what `dpo-video estimate` predicts; the run's run.toml has the number."""
    budget: Annotated[
        Annotated[float, Field(gt=0, allow_inf_nan=False)] | None, BeforeValidator(_budget)
    ] = None
    """GiB that checkpointing=auto may fill. When not set, or set to auto, 95% of what the GPU has,
    or the card of --tier where there is no GPU. Nothing else looks at it."""
    backward: Literal["joint", "split", "linear"] = "joint"
    """How many graphs are alive at once. joint: those of both videos of all pairs of a batch.
    split: that of one video, for any loss and batch; one more forward pass a pair. linear: that of
    one video without any more passes, for losses that look at means over whole videos (not region,
    not segment); the two gradients' difference costs it two digits, and the adapter's gradients are
    there three times."""
    forward_chunks: int = Field(default=1, ge=1)
    """Parts that feed-forward layers and cross-attentions run in, one after another, each computed
    again for its backward pass: their insides, the widest tensors of a transformer, are there for
    one part only. 8 is plenty; a few per cent more time."""
    offload: Annotated[
        tuple[Literal["checkpoints", "blocks", "optimizer"], ...], BeforeValidator(_listed)
    ] = ()
    """What waits in the host's memory; none, or several with a comma between. checkpoints: what
    checkpointed blocks were given. blocks: the frozen weights of all blocks, fetched layer by
    layer, which takes time. optimizer: AdamW's state; it steps there. Tested without a GPU; on one
    it has not been run yet."""
    quantization: Literal["native", "int8", "nf4", "fp8"] = "native"
    """The frozen weights of all blocks: as they are, or in 8 or 4 bits. That changes the numbers:
    policy and reference are then another model, and the run says so wherever its model is named.
    nf4 needs bitsandbytes: pip install 'dpo-video[nf4]'."""
    shard: int = Field(default=1, ge=1)
    """Processes that hold the frozen weights of all blocks together, each as many; they gather a
    layer's when it runs, which takes time. It is what FSDP and ZeRO-3 do, and goes with any base
    and with offload=blocks. A launcher that asks for FSDP sets it to the number of processes."""

    compile: Literal["off", "on"] = "off"
    """Compile every residual and transformer block by torch.compile. On a CPU small networks gain 3
    to 8% of a step, and half a minute to three are spent before the first: it pays after hundreds
    or thousands of steps (benchmarks/compiled.py). Only the last digits change; samples are drawn
    without it. Not for a packed `base`, `shard` or offload=blocks. It needs a C++ compiler on a CPU
    and Triton on a GPU, on which it has not been run yet."""

    @model_validator(mode="after")
    def _has_checkpoints(self) -> Self:
        if "checkpoints" in self.offload and self.checkpointing == "none":
            raise ValueError(
                "offload=checkpoints has nothing to move without them; set checkpointing=blocks"
            )
        return self


class EvaluateSettings(Settings):
    """[evaluate]: base against tuned on identical seeds."""

    seeds: int = Field(default=47, ge=2)
    """Videos of each, one prompt and one seed a video."""
    seed: int = Field(default=0, ge=0)
    """Seed of the noises; not the run's, so that runs with other seeds draw the same videos."""
    batch_size: int = Field(default=4, ge=1)
    """Videos sampled at once."""
    num_inference_steps: int | None = Field(default=None, ge=1)
    """Sampling steps; the backbone's own number when not set."""
    guidance_scale: float | None = Field(default=None, ge=0)
    """Classifier-free guidance; the backbone's own when not set."""
    tolerance: float = Field(default=0.03, ge=0, lt=1)
    """Largest relative fall of the dynamic degree that still counts as keeping the motion."""


class RunSettings(Settings):
    """[run]: what everything depends on."""

    seed: int = Field(default=0, ge=0)
    """Seed of every random draw."""
    device: str = "auto"
    """cuda, mps, cpu or cuda:N; "auto" takes the best there is."""
    deterministic: bool = False
    """Only kernels that give the same bits every time, so that two runs on the same machine, with
    as many threads and the same versions, are equal to the last bit; an operation that has none is
    refused. On a CPU `tiny` trains as fast with it; on a GPU it has not been tried yet."""
    clips: str | None = None
    """A folder of real videos (or one video); the backbone's own clips when not set."""
    prompt: str | None = None
    """The caption of clips that have none, or the one prompt of pairs that need no clip."""
