"""Every setting of `accelerate launch` becomes an option of the run, or is refused in a sentence.

The environment variables are those that accelerate's own launcher makes of its flags and files.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from accelerate.commands import launch
from accelerate.utils import (
    prepare_deepspeed_cmd_env,
    prepare_multi_gpu_env,
    prepare_simple_launcher_cmd_env,
)

from dpo_video.errors import UserError
from dpo_video.workflows.config import Config, resolve
from dpo_video.workflows.launcher import (
    LauncherRequest,
    as_launched,
    hidden,
    launcher_request,
    notes_on,
    refuse_launcher,
)

DOCS = (Path(__file__).parents[2] / "docs/launchers.md").read_text()
PROCESSES = 4
NEWER = {"--fsdp_activation_checkpointing_offload"}  # than accelerate 1.10


@pytest.fixture(autouse=True)
def own_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(os, "environ", os.environ.copy())
    monkeypatch.setattr(launch, "default_config_file", str(tmp_path / "none"))
    monkeypatch.setattr("accelerate.utils.launch.is_port_in_use", lambda port: False)


def launched(
    flags: Sequence[str], *assignments: str, config: str = "", processes: int = PROCESSES
) -> tuple[Config, LauncherRequest]:
    """The configuration of a training that accelerate's launcher has started."""
    words = [*flags, f"--num_processes={processes}", "-m", "dpo_video"]
    if config:
        words = ["--config_file", config, *words]
    parser = launch.launch_command_parser()
    names = {word.partition("=")[0] for word in words}
    if missing := {name for name in names & NEWER if name not in parser.format_usage()}:
        pytest.skip(f"this accelerate has no {missing}")
    arguments = parser.parse_args(words)
    arguments, defaults, _ = launch._validate_launch_command(arguments)
    if arguments.use_deepspeed:
        fields = list(defaults.deepspeed_config) if defaults else []
        arguments.deepspeed_fields_from_accelerate_config = ",".join(fields)
        _, environment = prepare_deepspeed_cmd_env(arguments)
    elif arguments.use_fsdp or arguments.multi_gpu or arguments.use_megatron_lm:
        environment = prepare_multi_gpu_env(arguments)
    else:
        _, environment = prepare_simple_launcher_cmd_env(arguments)
    os.environ |= {**environment, "WORLD_SIZE": str(processes)}
    request = launcher_request()
    options = resolve(
        choices={"pairs": "somewhere/"}, assignments=assignments, launched=request.options
    )
    return as_launched(options, request), request


FSDP = ["--use_fsdp", "--fsdp_version=2"]
ZERO = ["--use_deepspeed", "--zero_stage=3"]
MESH = [*FSDP, "--use_parallelism_config"]
TAKEN: Mapping[str, tuple[Sequence[str], Mapping[str, Any]]] = {
    "--cpu": (["--cpu"], {"run.device": "cpu"}),
    "--mixed_precision fp16": (["--mixed_precision=bf16"], {"train.mixed_precision": "bf16"}),
    "--mixed_precision no": (["--mixed_precision=no"], {"train.mixed_precision": "no"}),
    "--dynamo_backend inductor": (["--dynamo_backend=inductor"], {"memory.compile": "on"}),
    "--use_fsdp": (FSDP, {"memory.shard": PROCESSES, "memory.offload": ()}),
    "--fsdp_offload_params": (
        [*FSDP, "--fsdp_offload_params=true"], {"memory.offload": ("blocks",)}
    ),
    "--fsdp_activation_checkpointing true": (
        [*FSDP, "--fsdp_activation_checkpointing=true"], {"memory.checkpointing": "blocks"}
    ),
    "--fsdp_activation_checkpointing_offload": (
        [*FSDP, "--fsdp_activation_checkpointing=true",
         "--fsdp_activation_checkpointing_offload=true"],
        {"memory.checkpointing": "blocks", "memory.offload": ("checkpoints",)},
    ),
    "--fsdp_auto_wrap_policy TRANSFORMER_BASED_WRAP": (
        [*FSDP, "--fsdp_auto_wrap_policy=TRANSFORMER_BASED_WRAP"], {"memory.shard": PROCESSES}
    ),
    "--fsdp_state_dict_type": (
        [*FSDP, "--fsdp_state_dict_type=FULL_STATE_DICT", "--fsdp_use_orig_params=false",
         "--fsdp_backward_prefetch=BACKWARD_PRE"],
        {"memory.shard": PROCESSES},
    ),
    "--fsdp_cpu_ram_efficient_loading": (
        [*FSDP, "--fsdp_cpu_ram_efficient_loading=false"], {"memory.shard": PROCESSES}
    ),
    "--parallelism_config_dp_shard_size": (
        [*MESH, "--parallelism_config_dp_shard_size=2",
         "--parallelism_config_dp_replicate_size=2"],
        {"memory.shard": 2},
    ),
    "--zero_stage 0": (["--use_deepspeed", "--zero_stage=0"], {"memory.shard": 1}),
    "--zero_stage 2": (["--use_deepspeed", "--zero_stage=2"], {"memory.shard": 1}),
    "--zero_stage 3": (ZERO, {"memory.shard": PROCESSES, "memory.offload": ()}),
    "--offload_param_device": (
        [*ZERO, "--offload_param_device=cpu"], {"memory.offload": ("blocks",)}
    ),
    "--offload_optimizer_device": (
        [*ZERO, "--offload_optimizer_device=cpu"], {"memory.offload": ("optimizer",)}
    ),
    "--gradient_accumulation_steps": (
        [*ZERO, "--gradient_accumulation_steps=8"], {"train.gradient_accumulation_steps": 8}
    ),
    "--gradient_clipping": ([*ZERO, "--gradient_clipping=0.5"], {"train.max_grad_norm": 0.5}),
    "--zero3_init_flag": (
        [*ZERO, "--zero3_init_flag=true", "--zero3_save_16bit_model=true"],
        {"memory.shard": PROCESSES},
    ),
}  # fmt: skip
REFUSED: Mapping[str, tuple[Sequence[str], str]] = {
    "--mixed_precision fp8": (["--mixed_precision=fp8"], "memory.quantization=int8"),
    "--dynamo_backend` of another": (["--dynamo_backend=eager"], "--dynamo_backend inductor"),
    "--dynamo_mode": (
        ["--dynamo_backend=inductor", "--dynamo_mode=max-autotune"], "Leave both out"
    ),
    "--use_megatron_lm": (["--use_megatron_lm"], "Leave it out of the launcher's"),
    "--fsdp_version 1": (["--use_fsdp"], "Launch with --fsdp_version 2"),
    "--fsdp_reshard_after_forward": ([*FSDP, "--fsdp_reshard_after_forward=false"], "to true"),
    "--fsdp_sharding_strategy": ([*FSDP, "--fsdp_sharding_strategy=HYBRID_SHARD"], "version 1"),
    "SIZE_BASED_WRAP": ([*FSDP, "--fsdp_auto_wrap_policy=SIZE_BASED_WRAP"], "is a group"),
    "--fsdp_transformer_layer_cls_to_wrap": (
        [*FSDP, "--fsdp_transformer_layer_cls_to_wrap=WanTransformerBlock"], "is a group"
    ),
    "--fsdp_forward_prefetch": ([*FSDP, "--fsdp_forward_prefetch=true"], "prefetches by itself"),
    "--parallelism_config_tp_size": ([*MESH, "--parallelism_config_tp_size=2"], "tensor parallel"),
    "cp_size": ([*MESH, "--parallelism_config_cp_size=2"], "context parallel"),
    "a product of the two": (
        [*MESH, "--parallelism_config_dp_shard_size=3"], "not the number of processes, 4"
    ),
    "nvme": ([*ZERO, "--offload_param_device=nvme"], "Offload to cpu"),
    "--deepspeed_moe_layer_cls_names": (
        [*ZERO, "--deepspeed_moe_layer_cls_names=Block"], "Leave it out"
    ),
}  # fmt: skip
ELSEWHERE = {
    "--num_processes": "tests/training/test_processes.py and benchmarks/trust/processes.py",
    "--max_restarts": "the same; they are arguments of torchrun",
    "--gpu_ids": "they are read by Accelerate, CUDA and OpenMP",
    "--deepspeed_config_file": "below",
    "an `optimizer`": "below",
    "fsdp_ignored_modules": "below",
}


def test_every_row_of_the_documentation_has_a_test() -> None:
    rows = [line for line in DOCS.splitlines() if line.startswith("|")]
    rows = [row for row in rows if not row.startswith(("| setting", "|---"))]
    for row in rows:
        assert any(name in row for name in (*TAKEN, *REFUSED, *ELSEWHERE)), row
        assert ("refused" in row) >= any(f"| `{name}" in row for name in REFUSED), row
    for name in (*TAKEN, *REFUSED):
        assert name in DOCS


@pytest.mark.parametrize("name", TAKEN)
def test_a_setting_becomes_an_option(name: str) -> None:
    flags, expected = TAKEN[name]
    config, request = launched(flags)
    for path, value in expected.items():
        table, option = path.split(".")
        assert getattr(getattr(config, table), option) == value
        if table != "memory":  # memory modes are those of a launch, and not recorded
            assert config.tables[table][option] == value
    said = "".join(notes_on(config, request))
    assert all(path in said for path, value in expected.items() if value not in (1, (), "no"))


@pytest.mark.parametrize("name", REFUSED)
def test_a_setting_is_refused_with_a_way_out(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("accelerate.utils.launch.is_fp8_available", lambda: True)
    flags, said = REFUSED[name]
    with pytest.raises(UserError, match=said):
        launched(flags)


def test_sagemaker_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_SAGEMAKER", "true")
    with pytest.raises(UserError, match="SageMaker"):
        launcher_request()


def deepspeed_file(folder: Path, **entries: Any) -> list[str]:
    (folder / "zero.json").write_text(json.dumps(entries))
    return ["--use_deepspeed", f"--deepspeed_config_file={folder / 'zero.json'}"]


def test_deepspeeds_file_is_read(tmp_path: Path) -> None:
    flags = deepspeed_file(
        tmp_path,
        zero_optimization={"stage": 3, "offload_param": {"device": "cpu", "pin_memory": True},
                           "offload_optimizer": {"device": "none"}, "overlap_comm": True},
        gradient_accumulation_steps=2, gradient_clipping="auto", bf16={"enabled": True},
        fp16={"enabled": "auto"}, train_batch_size="auto", train_micro_batch_size_per_gpu=3,
        optimizer="auto", steps_per_print=2000,
    )  # fmt: skip
    config, _ = launched(flags)
    assert (config.memory.shard, config.memory.offload) == (PROCESSES, ("blocks",))
    train = config.train
    assert (train.mixed_precision, train.batch_size, train.gradient_accumulation_steps) == (
        "bf16", 3, 2,
    )  # fmt: skip
    assert train.max_grad_norm == resolve().train.max_grad_norm


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ({"optimizer": {"type": "Lion"}}, "'optimizer' in DeepSpeed's .* is not supported"),
        ({"train_batch_size": 8}, "'train_batch_size' in"),
        ({"gradient_clipping": "much"}, "not a number"),
        ({"zero_optimization": {"stage": 4}}, "ZeRO stage 4"),
        ({"zero_optimization": {"stage": 3, "offload_param": "cpu"}}, "not a table"),
        ({"zero_optimization": 3}, "cannot be read"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_an_entry_of_deepspeeds_file_is_refused(
    entries: dict[str, Any], said: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=said):
        launched(deepspeed_file(tmp_path, **entries))


CONFIGURED = """
compute_environment: LOCAL_MACHINE
debug: false
distributed_type: FSDP
downcast_bf16: 'no'
dynamo_config: {dynamo_backend: INDUCTOR}
enable_cpu_affinity: false
fsdp_config:
  fsdp_activation_checkpointing: true
  fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP
  fsdp_cpu_ram_efficient_loading: true
  fsdp_offload_params: false
  fsdp_reshard_after_forward: true
  fsdp_state_dict_type: FULL_STATE_DICT
  fsdp_version: 2
machine_rank: 0
main_training_function: main
mixed_precision: bf16
num_machines: 1
num_processes: 4
rdzv_backend: static
same_network: true
tpu_env: []
tpu_use_cluster: false
tpu_use_sudo: false
use_cpu: false
"""


def test_a_file_of_accelerate_config_is_the_same_as_flags(tmp_path: Path) -> None:
    file = tmp_path / "default_config.yaml"
    file.write_text(CONFIGURED)
    config, request = launched([], config=str(file))
    assert config.train.mixed_precision == "bf16"
    memory = config.memory
    assert (memory.shard, memory.checkpointing, memory.compile) == (4, "blocks", "on")
    assert notes_on(config, request) == [
        "Set by the launcher: train.mixed_precision=bf16, memory.shard=4, "
        "memory.checkpointing=blocks, memory.compile=on."
    ]


def test_a_setting_that_only_a_file_has_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "default_config.yaml"
    file.write_text(CONFIGURED.replace("fsdp_version: 2", "fsdp_ignored_modules: proj_out"))
    with pytest.raises(UserError, match="FSDP version 1"):
        launched([], config=str(file))
    file.write_text(CONFIGURED.replace("fsdp_v", "fsdp_ignored_modules: proj_out\n  fsdp_v"))
    with pytest.raises(UserError, match="everything frozen is sharded"):
        launched([], config=str(file))


def test_an_option_of_the_run_overrides_the_launchers() -> None:
    config, request = launched(
        ["--mixed_precision=bf16"], "train.mixed_precision=no", "memory.checkpointing=2"
    )
    assert (config.train.mixed_precision, config.memory.checkpointing) == ("no", 2)
    assert notes_on(config, request) == [
        "The launcher's train.mixed_precision=bf16 is not used: this run has "
        "train.mixed_precision=no."
    ]
    config, request = launched(
        [*FSDP, "--fsdp_activation_checkpointing=true"], "memory.checkpointing=2"
    )
    assert notes_on(config, request) == [
        "Set by the launcher: memory.shard=4.",
        "The launcher's memory.checkpointing=blocks is not used: this run has "
        "memory.checkpointing=2.",
    ]


def test_fewer_processes_than_there_are_share_the_weights() -> None:
    assert launched(FSDP, "memory.shard=2")[0].memory.shard == 2
    assert launched(FSDP, "memory.shard=3")[0].memory.shard == PROCESSES  # of an earlier launch


@pytest.mark.parametrize(
    ("flags", "more", "said"),
    [
        ([], "memory.shard=3", "does not divide this run's number of processes, 4"),
        (
            FSDP,
            "memory.quantization=int8",
            "The launcher asks for memory.shard=4, and memory.shard",
        ),
    ],
)
def test_what_does_not_fit_the_launch_is_refused(flags: list[str], more: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        launched(flags, more)


def test_pairs_are_built_before_the_weights_are_sharded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    config = resolve(choices={"pairs": "jitter"}, assignments=["memory.shard=2"])
    with pytest.raises(UserError, match="Build them first"):
        as_launched(config, LauncherRequest())


def test_accelerate_sees_none_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    launched(FSDP)
    before = dict(os.environ)
    with hidden():
        assert not any(name.startswith(("ACCELERATE_USE", "FSDP_")) for name in os.environ)
        os.environ["ACCELERATE_USE_FSDP"] = "set inside"
    assert dict(os.environ) == before


def test_compare_takes_nothing_from_a_launcher() -> None:
    refuse_launcher("compare")
    launched(["--mixed_precision=bf16"], processes=1)
    with pytest.raises(UserError, match=r"\(train.mixed_precision=bf16\)"):
        refuse_launcher("compare")
