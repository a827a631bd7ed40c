"""The DeepSpeed JSON: what it may say, and how it is completed from the experiment.

The JSON decides how the optimizer is sharded, and the precision or that it is "auto" (`trainer/precision.py`). What decides
the curve (batch, learning rate, clipping, schedule) belongs to the experiment; a JSON may repeat it or say "auto", but not
contradict it.
"""

import difflib
from pathlib import Path
from typing import Any

from trainer.config import Experiment
from trainer.layout import Layout
from trainer.precision import AUTO, BF16, FP32
from trainer.text import read_json, shown

# DeepSpeed itself accepts unknown top-level keys in silence. These are the ones that make sense here.
KNOWN_KEYS = {
    "bf16", "fp16", "zero_optimization", "optimizer", "scheduler", "gradient_clipping", "train_batch_size",
    "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "communication_data_type", "data_types",
    "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer", "steps_per_print", "wall_clock_breakdown",
    "memory_breakdown", "dump_state", "comms_logger", "flops_profiler", "prescale_gradients",
    "gradient_predivide_factor", "disable_allgather", "seq_parallel_communication_data_type",
}  # fmt: skip

# Of the keys that hold one value and that nothing else checks.
KINDS = {
    bool: ("zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer", "wall_clock_breakdown", "memory_breakdown",
           "dump_state", "prescale_gradients", "disable_allgather"),
    int: ("steps_per_print",),
    float: ("gradient_predivide_factor",),
}  # fmt: skip
REDUCTIONS = ("communication_data_type", "seq_parallel_communication_data_type")
GRADIENT_DTYPES = ("fp32", "bf16")


def load_ds_config(path: str, experiment: Experiment, layout: Layout, world_size: int) -> dict[str, Any]:
    """The JSON at `path`, checked against the experiment and completed for `deepspeed.initialize`.

    A precision that it leaves open is still to be set (`set_precision`).

    Raises:
        ValueError: missing file, not JSON, unknown key, unsupported stage or precision, or a contradiction.
    """
    config = read_json(Path(path), f"--ds_config {path}")
    for key in config:
        if key not in KNOWN_KEYS:
            close = difflib.get_close_matches(key, KNOWN_KEYS, n=1)
            hint = f"did you mean {close[0]}?" if close else "remove it"
            raise ValueError(f"--ds_config {path}: unknown key {key}; {hint}")
    for kind, keys in KINDS.items():
        for key in keys:
            whole_too = kind is float and key in config and type(config[key]) is int
            if key in config and type(config[key]) is not kind and not whole_too:
                raise ValueError(f"--ds_config {path}: {key} = {shown(config[key])}; write a JSON {kind.__name__}")
    for key in REDUCTIONS:
        if config.get(key) not in (None, *GRADIENT_DTYPES):
            raise ValueError(f"--ds_config {path}: {key} = {shown(config[key])}; one of: {', '.join(GRADIENT_DTYPES)}")
    zero = _section(config, "zero_optimization", path)
    stage = zero.get("stage")
    if stage not in (1, 2) or isinstance(stage, bool):
        raise ValueError(
            f"--ds_config {path}: zero_optimization.stage = {shown(stage)}; the trained core runs under stage 1 or 2"
        )
    _check_offload(zero, path)
    if _is_enabled(config, "fp16", path):
        raise ValueError(f"--ds_config {path}: fp16.enabled = true; use bf16, or fp32 with neither enabled")
    bf16 = _bf16_enabled(config, path)
    data_types = _section(config, "data_types", path)
    if "buffer_dtype" in data_types:
        raise ValueError(f"--ds_config {path}: data_types.buffer_dtype would cast the fp32 key stores; remove it")
    for key, value in data_types.items():
        if key != "grad_accum_dtype" or value not in GRADIENT_DTYPES:
            raise ValueError(
                f"--ds_config {path}: data_types.{key} = {shown(value)}; only data_types.grad_accum_dtype may be set, to "
                f"one of: {', '.join(GRADIENT_DTYPES)}"
            )
    if bf16 in (True, AUTO) and data_types.get("grad_accum_dtype") == "fp32":
        # Stage 1 would get another optimizer than ZeRO's; offloaded gradients stay non-finite after a skipped step.
        offloads = "offload_optimizer" in zero
        if stage == 1 or offloads:
            where = "with offload_optimizer" if offloads else "under stage 1"
            open_too = " (auto)" if bf16 == AUTO else ""
            raise ValueError(f"--ds_config {path}: data_types.grad_accum_dtype = fp32 {where} and bf16{open_too}; remove it")
    _refuse_contradictions(config, path, experiment, layout, world_size)
    return config | {
        "train_micro_batch_size_per_gpu": layout.micro_batch,
        "gradient_accumulation_steps": layout.accumulation,
        "train_batch_size": experiment.train.batch_size,
        "gradient_clipping": experiment.train.gradient_clipping,
        "steps_per_print": config.get("steps_per_print", 2**31),
        # With offloading DeepSpeed would insist on an optimizer that it compiles; torch's runs there too.
        "zero_force_ds_cpu_optimizer": False,
    }


def precision_of(config: dict[str, Any]) -> str:
    """`bf16`, `fp32`, or `auto` where the config leaves it open: what core and experts are kept in."""
    enabled = config.get("bf16", {}).get("enabled", False)
    return AUTO if enabled == AUTO else BF16 if enabled else FP32


def set_precision(config: dict[str, Any], precision: str) -> dict[str, Any]:
    """The config with `bf16` or `fp32` where it said "auto", which DeepSpeed would read as "not given" without a word."""
    if precision_of(config) != AUTO:
        return config
    return config | {"bf16": config["bf16"] | {"enabled": precision == BF16}}


def is_bf16(config: dict[str, Any]) -> bool:
    """Whether core and experts are kept in bfloat16 (else fp32); the precision must be decided."""
    assert precision_of(config) != AUTO, "the precision is still open"
    return precision_of(config) == BF16


def read_precision(path: str) -> str:
    """`bf16`, `fp32` or `auto`, as the JSON at `path` says.

    Raises:
        ValueError: missing file, not JSON, or a precision that is not written as it must be.
    """
    config = read_json(Path(path), f"--ds_config {path}")
    _bf16_enabled(config, path)
    return precision_of(config)


def _section(config: dict[str, Any], key: str, path: str) -> dict[str, Any]:
    section = config.get(key, {})
    if not isinstance(section, dict):
        raise ValueError(f"--ds_config {path}: {key} = {shown(section)}; expected a JSON object")
    return section


def _bf16_enabled(config: dict[str, Any], path: str) -> bool | str:
    """True, False or "auto"."""
    if _section(config, "bf16", path).get("enabled") == AUTO:
        return AUTO
    return _is_enabled(config, "bf16", path, 'true, false or "auto"')


def _is_enabled(config: dict[str, Any], key: str, path: str, choices: str = "true or false") -> bool:
    """Whether the section of a precision switches it on; without `enabled` it would be off in silence."""
    section = _section(config, key, path)
    enabled = section.get("enabled", False if not section else None)
    if not isinstance(enabled, bool):
        raise ValueError(f"--ds_config {path}: {key}.enabled = {shown(enabled)}; write {choices}")
    return enabled


def _check_offload(zero: dict[str, Any], path: str) -> None:
    """Optimizer state may lie in host memory; the rest of DeepSpeed's offloading is for stage 3."""
    if "offload_param" in zero:
        raise ValueError(f"--ds_config {path}: zero_optimization.offload_param needs stage 3; remove it")
    if "offload_optimizer" in zero:
        device = _section(zero, "offload_optimizer", path).get("device")
        if device != "cpu":
            raise ValueError(
                f"--ds_config {path}: zero_optimization.offload_optimizer.device = {shown(device)}; write cpu, "
                f"or remove offload_optimizer"
            )


def _refuse_contradictions(
    config: dict[str, Any], path: str, experiment: Experiment, layout: Layout, world_size: int
) -> None:
    train = experiment.train
    owned = [
        ("train_batch_size", config, train.batch_size, "train.batch_size"),
        ("gradient_clipping", config, train.gradient_clipping, "train.gradient_clipping"),
        ("train_micro_batch_size_per_gpu", config, layout.micro_batch, "train.batch_size and train.max_micro_batch"),
        ("gradient_accumulation_steps", config, layout.accumulation, "train.batch_size and train.max_micro_batch"),
    ]
    optimizer = _section(config, "optimizer", path)
    if optimizer and optimizer.get("type") != "AdamW":
        raise ValueError(f"--ds_config {path}: optimizer.type = {optimizer.get('type')!r}; the optimizer is AdamW")
    parameters = _section(optimizer, "params", path)
    owned += [
        ("lr", parameters, train.learning_rate, "train.learning_rate"),
        ("betas", parameters, [train.beta1, train.beta2], "train.beta1 and train.beta2"),
        ("eps", parameters, train.epsilon, "train.epsilon"),
        ("weight_decay", parameters, train.weight_decay, "train.weight_decay"),
    ]
    for key, section, ours, name in owned:
        if section.get(key, "auto") not in ("auto", ours):
            raise ValueError(
                f"--ds_config {path}: {key} = {shown(section[key])} contradicts {ours} from {name} on {world_size} ranks; "
                f'remove it, write "auto", or change the experiment with --set'
            )
    if "scheduler" in config:
        raise ValueError(f"--ds_config {path}: scheduler; the schedule is the experiment's (train.warmup_steps), remove it")
    config.pop("optimizer", None)
