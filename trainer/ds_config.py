"""The DeepSpeed JSON: what it may say, and how it is completed from the experiment.

The JSON decides how the optimizer is sharded, and the precision or that it is "auto" (`trainer/precision.py`). What decides
the curve (batch, learning rate, clipping, schedule) belongs to the experiment; a JSON may repeat it or say "auto", but not
contradict it.
"""

from pathlib import Path
from typing import Any

from trainer.config import Experiment
from trainer.ds_schema import check_keys
from trainer.layout import Layout
from trainer.precision import AUTO, BF16, FP32
from trainer.text import read_json, shown

NEVER = 2**31
"""Steps between DeepSpeed's own lines where the JSON asks for none."""


def load_ds_config(path: str, experiment: Experiment, layout: Layout, world_size: int) -> dict[str, Any]:
    """The JSON at `path`, checked against the experiment and completed for `deepspeed.initialize`.

    A precision that it leaves open is still to be set (`set_precision`).

    Raises:
        ValueError: missing file, not JSON, unknown key, unsupported stage or precision, or a contradiction.
    """
    config = check_keys(read_json(Path(path), f"--ds_config {path}"), f"--ds_config {path}")
    zero, data_types = config.get("zero_optimization", {}), config.get("data_types", {})
    if "stage" not in zero:
        raise ValueError(f"--ds_config {path}: zero_optimization.stage = None; the trained core runs under stage 1 or 2")
    stage, bf16 = zero["stage"], config.get("bf16", {}).get("enabled", False)
    if "offload_optimizer" in zero and "device" not in zero["offload_optimizer"]:
        raise ValueError(
            f"--ds_config {path}: zero_optimization.offload_optimizer.device = None; write cpu, or remove offload_optimizer"
        )
    if bf16 in (True, AUTO) and data_types.get("grad_accum_dtype") == "fp32":
        # Stage 1 would get another optimizer than ZeRO's; offloaded gradients stay non-finite after a skipped step.
        offloads = "offload_optimizer" in zero
        if stage == 1 or offloads:
            where = "with offload_optimizer" if offloads else "under stage 1"
            open_too = " (auto)" if bf16 == AUTO else ""
            raise ValueError(f"--ds_config {path}: data_types.grad_accum_dtype = fp32 {where} and bf16{open_too}; remove it")
    _refuse_contradictions(config, path, experiment, layout, world_size)
    # DeepSpeed would switch the logger on wherever there is a section for it.
    no_effect = {"optimizer", "fp16"} | (set() if config.get("comms_logger", {}).get("enabled") else {"comms_logger"})
    return {key: value for key, value in config.items() if key not in no_effect} | {
        "train_micro_batch_size_per_gpu": layout.micro_batch,
        "gradient_accumulation_steps": layout.accumulation,
        "train_batch_size": experiment.train.batch_size,
        "gradient_clipping": experiment.train.gradient_clipping,
        "steps_per_print": config.get("steps_per_print") or NEVER,
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
    what = f"--ds_config {path}"
    config = read_json(Path(path), what)
    return precision_of(check_keys({key: config[key] for key in config if key == "bf16"}, what))


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
    optimizer = config.get("optimizer", {})
    if optimizer and "type" not in optimizer:
        raise ValueError(f"--ds_config {path}: optimizer.type = None; the optimizer is AdamW")
    parameters = optimizer.get("params", {})
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
