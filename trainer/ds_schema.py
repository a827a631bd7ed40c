"""Every key of DeepSpeed's JSON: what it may hold here, or why it is refused.

DeepSpeed itself ignores unknown keys at the top, obeys some only under other settings, and fails on others after minutes.
This table is checked against the installed DeepSpeed (`tests/trainer/test_ds_schema.py`), which notices the keys of a new
version, and `docs/deepspeed.md` is made from it.
"""

import difflib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from trainer.text import shown

AUTO = "auto"
SHIPPED_BUCKET = 10_000_000
"""Elements of a bucket in `ds_configs/`, and of one that is "auto"."""
MAX_WHOLE = 2**63 - 1
GRADIENT_DTYPES = ("fp32", "bf16")


@dataclass(frozen=True)
class Rule:
    """What one key may hold; a `section` holds keys of its own."""

    values: str
    """The values in words, for the documentation; empty where the key is refused."""
    note: str
    """What the key does, or why it is refused and what to do about it."""
    cure: str = ""
    """What to do about another value."""
    accepts: Callable[[Any], bool] | None = None
    """Whether a value is right; None where none is."""
    auto: Any = None
    """What "auto" becomes; None = "auto" is no value, "" = the key is left out."""
    section: dict[str, "Rule"] | None = None
    is_whole: bool = False
    """Whether it is a whole number, also where it is written as 5e8."""


def yes_no(note: str, auto: Any = None) -> Rule:
    """true or false."""
    return Rule("true, false", note, "write true or false", lambda value: isinstance(value, bool), auto)


def whole(least: int, note: str, auto: Any = None, step: int = 1) -> Rule:
    """A whole number from `least` on, a multiple of `step`; 5e8 is one too."""
    words = f"{'an even' if step == 2 else 'a whole'} number from {least}"
    return Rule(words, note, f"write {words}", lambda value: _is_whole(value, least, step), auto, is_whole=True)


def number(least: float, note: str) -> Rule:
    """A finite number from `least` on."""
    words = f"a number from {least:g}"
    return Rule(words, note, f"write {words}", lambda value: _is_number(value) and value >= least)


def one_of(choices: tuple[Any, ...], note: str, cure: str = "", auto: Any = None) -> Rule:
    """One of a few values."""
    words = ", ".join("null" if choice is None else str(choice) for choice in choices)
    return Rule(words, note, cure or f"one of: {words}", lambda value: any(_same(value, one) for one in choices), auto)


def only(value: Any, why: str, auto: Any = "") -> Rule:
    """The one value that would change nothing; `why` no other may stand there."""
    word = {True: "true", False: "false"}.get(value, str(value)) if isinstance(value, bool) else str(value)
    return Rule(word, why, f"{why}; write {word} or remove it", lambda given: _same(given, value), auto)


def owned(by: str) -> Rule:
    """A value that the experiment decides; `trainer/ds_config.py` compares the two."""
    return Rule('"auto", or as in the experiment', f"the experiment's {by}", accepts=lambda value: True)


def refused(why: str, cure: str = "remove it") -> Rule:
    """A key that may not stand there at all."""
    return Rule("", f"{why}; {cure}")


def section(note: str, keys: dict[str, Rule]) -> Rule:
    """An object with keys of its own."""
    return Rule("an object", note, "expected a JSON object", section=keys)


def old(new: str) -> Rule:
    """A spelling that DeepSpeed still takes for another key."""
    return refused("is an old spelling", f"write {new}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= MAX_WHOLE


def _is_whole(value: Any, least: int, step: int) -> bool:
    return _is_number(value) and value == math.floor(value) and value >= least and value % step == 0


def _same(value: Any, other: Any) -> bool:
    return isinstance(value, bool) == isinstance(other, bool) and value == other


NEEDS_STAGE_3 = refused("needs stage 3")
NVME = refused("is for offloading to NVMe")
REMOVED = refused("is no longer a part of DeepSpeed")
NO_PARALLELISM = refused("is for a parallelism that the core does not use")
CHECKPOINTS = refused("is for DeepSpeed's checkpoints, and a run writes its own")
MONITOR = refused("would record the run a second time", "remove it (see log.tensorboard)")
OFF = "fp16 is off, so without effect"

BF16 = {
    "enabled": Rule(
        'true, false, "auto"', "bf16, fp32, or what suits the machine", 'write true, false or "auto"',
        lambda value: isinstance(value, bool) or value == AUTO,
    ),
    "check_grad_overflow": only(True, "a step with gradients that are not finite is always skipped"),
    "immediate_grad_update": only(False, "only DeepSpeed's optimizer without ZeRO has it"),
    "bf16_master_weights_and_grads": only(False, "the core's weights are kept in fp32 between steps"),
    "bf16_optimizer_states": only(False, "AdamW's moments are kept in fp32"),
}  # fmt: skip
FP16 = {
    "enabled": only(False, "use bf16, or fp32 with neither enabled", auto=None),
    "auto_cast": yes_no(OFF, auto=""),
    "loss_scale": number(0, OFF),
    "initial_scale_power": whole(0, OFF, auto=""),
    "loss_scale_window": whole(1, OFF, auto=""),
    "hysteresis": whole(0, OFF, auto=""),
    "consecutive_hysteresis": yes_no(OFF, auto=""),
    "min_loss_scale": whole(0, OFF, auto=""),
    "fp16_master_weights_and_grads": only(False, "the core's weights are kept in fp32 between steps"),
}
OFFLOAD = {
    "device": one_of(("cpu",), "AdamW's state and its step in host memory", "write cpu, or remove offload_optimizer"),
    "pin_memory": yes_no("page-locked host memory", auto=""),
    "ratio": only(1, "parts of the optimizer are offloaded under stage 3 only"),
    "super_offload": only(False, "it needs stage 3"),
    "cpuadam_cores_perc": refused("is for super_offload"),
    **dict.fromkeys(("nvme_path", "buffer_count", "pipeline_read", "pipeline_write", "fast_init"), NVME),
}
ZERO = {
    "stage": one_of((1, 2), "what is sharded: the optimizer, under 2 also the gradients",
                    "the trained core runs under stage 1 or 2"),
    "offload_optimizer": section("the optimizer's state lies in host memory", OFFLOAD),
    "overlap_comm": yes_no("reduce gradients while the backward goes on", auto=""),
    "contiguous_gradients": yes_no("gradients are reduced from one buffer", auto=""),
    "reduce_scatter": yes_no("each rank gets its part of the gradients only", auto=""),
    "reduce_bucket_size": whole(1, "elements that one reduction takes together", SHIPPED_BUCKET),
    "allgather_bucket_size": whole(2, "elements that one gathering of weights takes together", SHIPPED_BUCKET, step=2),
    "allgather_partitions": yes_no("gather weights at once rather than rank by rank", auto=""),
    "use_multi_rank_bucket_allreduce": yes_no("one reduction for the parts of several ranks", auto=""),
    "round_robin_gradients": yes_no("spread the copying of offloaded gradients over ranks", auto=""),
    "parameter_alignment": yes_no("pad parameters to 16 bytes", auto=""),
    "ignore_unused_parameters": only(True, "a parameter that a step does not use keeps its value"),
    "compute_grad_norm": only(True, "every step is clipped by its norm, and records it"),
    "load_from_fp32_weights": only(True, "checkpoints hold the core in fp32"),
    "elastic_checkpoint": only(False, "any number of ranks can load a checkpoint"),
    "legacy_stage1": only(False, "DeepSpeed no longer has it"),
    "cpu_offload": old('"offload_optimizer": {"device": "cpu"}'),
    "cpu_offload_use_pin_memory": old("offload_optimizer.pin_memory"),
    "allgather_size": old("zero_optimization.allgather_bucket_size"),
    "zenflow": refused("would take another optimizer than AdamW under ZeRO"),
    "mics_shard_size": REMOVED, "mics_hierarchical_params_gather": REMOVED, "zeropp_loco_param": REMOVED,
    **dict.fromkeys((
        "offload_param", "cpu_offload_param", "sub_group_size", "prefetch_bucket_size", "param_persistence_threshold",
        "model_persistence_threshold", "max_live_parameters", "max_reuse_distance", "gather_16bit_weights_on_model_save",
        "module_granularity_threshold", "use_all_reduce_for_fetch_params", "allgather_sequential",
        "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold", "stage3_model_persistence_threshold",
        "stage3_max_live_parameters", "stage3_max_reuse_distance", "stage3_gather_16bit_weights_on_model_save",
        "stage3_gather_fp16_weights_on_model_save", "stage3_module_granularity_threshold",
        "stage3_use_all_reduce_for_fetch_params", "stage3_allgather_sequential", "zero_hpz_partition_size",
        "zero_quantized_weights", "zero_quantized_nontrainable_weights", "zero_quantized_gradients",
        "memory_efficient_linear", "pipeline_loading_checkpoint", "override_module_apply", "log_trace_cache_warnings",
        "enable_sanity_checks", "save_muon_momentum_buffer_in_memory", "leaf_module",
    ), NEEDS_STAGE_3),
}  # fmt: skip
OPTIMIZER = {
    "type": one_of(("AdamW",), "the optimizer is torch's AdamW", "the optimizer is AdamW"),
    "params": section("AdamW's settings", {
        "lr": owned("train.learning_rate"),
        "betas": owned("train.beta1 and train.beta2"),
        "eps": owned("train.epsilon"),
        "weight_decay": owned("train.weight_decay"),
        "torch_adam": yes_no("torch's AdamW is taken either way"),
        "fused": yes_no("torch's fused AdamW is taken either way"),
        "adam_w_mode": only(True, "the optimizer is AdamW"),
        "bias_correction": only(True, "the optimizer is AdamW"),
        "amsgrad": only(False, "the optimizer is AdamW"),
        "max_grad_norm": refused("is not DeepSpeed's", "see the experiment's train.gradient_clipping"),
    }),
    "legacy_fusion": only(False, "it belongs to fp16"),
}  # fmt: skip
COMMS_LOGGER = {
    "enabled": yes_no("time DeepSpeed's collectives and print a summary at the end; experts and keys have their own"),
    "verbose": yes_no("also print each collective", auto=""),
    "prof_all": yes_no("all of them, or those in prof_ops", auto=""),
    "prof_ops": Rule("a list of names", "such as all_reduce", "write a list of names",
                     lambda value: isinstance(value, list) and all(isinstance(name, str) for name in value), ""),
    "debug": yes_no("name the caller too", auto=""),
}  # fmt: skip
FLOPS_PROFILER = {
    "enabled": yes_no("print on rank 0 what each module costs, once, and timers from then on"),
    "profile_step": whole(0, "optimizer steps since the process started before the one that is profiled, default 1"),
    "module_depth": whole(-1, "levels of modules that are printed, -1 = all"),
    "top_modules": whole(1, "modules of a level that are named"),
    "detailed": yes_no("print the model with each module's share"),
    "output_file": Rule("null, a path", "a file for the profile instead of the output", "write null or a path",
                        lambda value: value is None or (isinstance(value, str) and "\0" not in value)),
    "recompute_fwd_factor": number(0, "forward passes that a backward makes again"),
}  # fmt: skip
TOP = {
    "bf16": section("precision of core and experts", BF16),
    "zero_optimization": section("how the core's optimizer is sharded", ZERO),
    "communication_data_type": one_of((None, *GRADIENT_DTYPES), "gradients on their way to other ranks",
                                      cure=f"one of: {', '.join(GRADIENT_DTYPES)}"),
    "data_types": section("precision of accumulated gradients", {
        "grad_accum_dtype": one_of(GRADIENT_DTYPES, "gradients between micro batches"),
        "buffer_dtype": refused("would cast the fp32 key stores"),
        "param_dtype": refused("would contradict bf16.enabled", "remove it; only data_types.grad_accum_dtype may be set"),
        "keep_in_fp32_modules": refused("would change nothing: key stores are kept in fp32"),
    }),
    "train_batch_size": owned("train.batch_size"),
    "train_micro_batch_size_per_gpu": owned("train.batch_size and train.max_micro_batch"),
    "gradient_accumulation_steps": owned("train.batch_size and train.max_micro_batch"),
    "gradient_clipping": owned("train.gradient_clipping"),
    "optimizer": section("may repeat the experiment's settings", OPTIMIZER),
    "fp16": section("may only say that it is off", FP16),
    "wall_clock_breakdown": yes_no("print on rank 0 how long forward, backward and step take"),
    "flops_profiler": section("what each module of the model costs", FLOPS_PROFILER),
    "comms_logger": section("how long DeepSpeed's collectives take", COMMS_LOGGER),
    "memory_breakdown": yes_no("print on rank 0 the memory in use around every forward, backward and step"),
    "steps_per_print": Rule("null, a whole number from 1", "steps between DeepSpeed's lines of progress, null = none",
                            "write null or a whole number from 1", lambda value: value is None or _is_whole(value, 1, 1),
                            is_whole=True),
    "dump_state": yes_no("print DeepSpeed's settings and attributes at the start"),
    "log_level": one_of(("debug", "info", "warning", "error", "critical"), "what of DeepSpeed's own log is shown"),
    "prescale_gradients": only(False, "gradients are summed and never averaged"),
    "gradient_predivide_factor": only(1, "gradients are summed and never averaged"),
    "gradient_allreduce_op": only("mean", "the trainer makes a sum of it"),
    "managed_gradient_accumulation": only(True, "DeepSpeed counts the micro batches of a step"),
    "disable_allgather": only(False, "DeepSpeed no longer has it"),
    "zero_allow_untested_optimizer": yes_no("AdamW is a tested one, so without effect"),
    "zero_force_ds_cpu_optimizer": only(False, "torch's AdamW runs on CPUs too"),
    "scheduler": refused("would contradict the experiment's schedule (train.warmup_steps)"),
    "bfloat16": old("bf16"),
    "zero_allow_untested_optimizers": old("zero_allow_untested_optimizer"),
    "allgather_size": old("zero_optimization.allgather_bucket_size"),
    "torch_autocast": refused("would compute in another precision than the experts", "write bf16"),
    "activation_checkpointing": refused("has no effect: the model saves what it needs"),
    "timers": refused("has no effect: the trainer prints the tokens a second"),
    "tensorboard": MONITOR, "wandb": MONITOR, "csv_monitor": MONITOR, "comet": MONITOR,
    "checkpoint": CHECKPOINTS, "datastates_ckpt": CHECKPOINTS, "aio": NVME,
    "dataloader_drop_last": refused("is for DeepSpeed's data loader, which is not used"),
    "data_efficiency": refused("is for DeepSpeed's data loader, which is not used"),
    "disable_python_gc": refused("is not supported"),
    "compile": refused("is not supported: experts are chosen by the data"),
    "vocabulary_size": refused("is the experiment's model.vocab_size"),
    "autotuning": refused("is for DeepSpeed's launcher", "remove it (tools/plan.py searches)"),
    "hybrid_engine": refused("is for generating text in training"),
    "weight_quantization": refused("would change the core's weights"),
    **dict.fromkeys(("pipeline", "tensor_parallel", "sequence_parallel_size", "data_parallel_size", "mesh_param",
                     "seq_parallel_communication_data_type"), NO_PARALLELISM),
    "expert_parallel": refused("would replace layers", "set the experiment's parallel.ep_size"),
    "use_data_before_expert_parallelism": refused("has no effect", "set the experiment's parallel.ep_size"),
    **dict.fromkeys((
        "amp", "nebula", "compression_training", "curriculum_learning", "eigenvalue", "elasticity", "graph_harvesting",
        "progressive_layer_drop", "quantize_training", "sparse_attention", "sparse_gradients",
    ), REMOVED),
}  # fmt: skip


def check_keys(config: dict[str, Any], what: str, keys: dict[str, Rule] = TOP, prefix: str = "") -> dict[str, Any]:
    """The JSON with "auto" put into numbers or left out, and whole numbers as such.

    Args:
        config: the JSON, or one section of it.
        what: how errors call the file, such as `--ds_config FILE`.
        keys: the rules of that section.
        prefix: the section's name and a dot.

    Raises:
        ValueError: a key that is unknown or refused, or a value that its rule does not accept.
    """
    checked = {}
    for key, value in config.items():
        rule, name = keys.get(key), f"{prefix}{key}"
        if rule is None:
            close = difflib.get_close_matches(key, [k for k, known in keys.items() if known.values], n=1)
            raise ValueError(f"{what}: unknown key {name}; {f'did you mean {close[0]}?' if close else 'remove it'}")
        if not rule.values:
            raise ValueError(f"{what}: {name} {rule.note}")
        if rule.section is not None:
            if not isinstance(value, dict):
                raise ValueError(f"{what}: {name} = {shown(value)}; {rule.cure}")
            checked[key] = check_keys(value, what, rule.section, f"{name}.")
            if value and "enabled" in rule.section.keys() - value.keys():  # it would be off in silence
                raise ValueError(f"{what}: {name}.enabled = None; {rule.section['enabled'].cure}")
        elif value == AUTO and rule.auto is not None:
            checked |= {} if rule.auto == "" else {key: rule.auto}
        elif rule.accepts(value):
            checked[key] = int(value) if isinstance(value, float) and rule.is_whole else value
        else:
            raise ValueError(f"{what}: {name} = {shown(value)}; {rule.cure}")
    return checked


def documentation(keys: dict[str, Rule] = TOP, prefix: str = "") -> str:
    """The table of `docs/deepspeed.md` for keys that may be written; then, by reason, those that are refused."""
    rows, reasons = _rows(keys, prefix)
    table = ["| key | values | what it does, or why there is only one |", "| --- | --- | --- |", *rows]
    refusals = [f"- {', '.join(f'`{name}`' for name in names)} {reason}" for reason, names in reasons.items()]
    return "\n".join([*table, "", "Refused by name:", "", *refusals])


def _rows(keys: dict[str, Rule], prefix: str) -> tuple[list[str], dict[str, list[str]]]:
    rows: list[str] = []
    reasons: dict[str, list[str]] = {}
    for key, rule in keys.items():
        if not rule.values:
            reasons.setdefault(rule.note, []).append(f"{prefix}{key}")
            continue
        values = rule.values + (', "auto"' if rule.auto is not None else "")
        rows.append(f"| `{prefix}{key}` | {values} | {rule.note} |")
        if rule.section is not None:
            below, more = _rows(rule.section, f"{prefix}{key}.")
            rows += below
            for reason, names in more.items():
                reasons.setdefault(reason, []).extend(names)
    return rows, reasons


if __name__ == "__main__":
    print(documentation())
