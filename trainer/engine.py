"""The DeepSpeed engine behind a few calls. Nothing else in the project imports DeepSpeed.

DeepSpeed sees the trained core alone: experts and key stores are buffers, which it neither shards, broadcasts, casts nor
saves (it casts parameters only since 0.19.2).
"""

import contextlib
import io
import logging
import math
import os
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from modeling import Transformer
from trainer.config import TrainConfig
from trainer.ds_config import NEVER
from trainer.memory import host_bytes
from trainer.schedule import parameter_groups
from trainer.text import shown

MOMENTS = ("exp_avg", "exp_avg_sq")
SECTIONS = {
    "DeepSpeedZeroConfig": "zero_optimization", "DeepSpeedBF16Config": "bf16", "DeepSpeedFP16Config": "fp16",
    "CommsLoggerConfig": "comms_logger",
}  # fmt: skip
"""Sections of the JSON by DeepSpeed's class for them."""
NOWHERE = io.StringIO()
"""What DeepSpeed prints unasked."""


@dataclass(frozen=True)
class StepResult:
    """`applied` is False when the gradients were not finite: nothing changed then. `grad_norm`: global, before clipping."""

    applied: bool
    grad_norm: float


@dataclass
class CoreState:
    """The trained core and its optimizer, whole and in fp32 on the CPU, independent of how many ranks shard it."""

    parameters: dict[str, torch.Tensor]
    moments: dict[str, dict[str, torch.Tensor]]
    steps: int

    def is_finite(self) -> bool:
        """Whether every number is."""
        tensors = [t for named in (self.parameters, *self.moments.values()) for t in named.values()]
        return all(bool(values.isfinite().all()) for values in tensors)


class Engine:
    """ZeRO around the trained core.

    Args:
        model: the model on its device; DeepSpeed casts its parameters to the JSON's precision.
        train: optimizer settings.
        ds_config: a checked and completed DeepSpeed config.
        show_log: let DeepSpeed's own messages through. What the config asks DeepSpeed to print is shown either way.
    """

    def __init__(self, model: Transformer, train: TrainConfig, ds_config: dict[str, Any], show_log: bool = False):
        with _deepspeed(show_log or ds_config.get("dump_state", False)) as deepspeed:
            optimizer = torch.optim.AdamW(
                parameter_groups(model, train),
                lr=train.learning_rate,
                betas=(train.beta1, train.beta2),
                eps=train.epsilon,
                fused=True,
            )
            self._engine, self._optimizer, _, _ = deepspeed.initialize(model=model, optimizer=optimizer, config=ds_config)
        logger = ds_config.get("comms_logger", {})
        if "log_level" not in ds_config and (ds_config["steps_per_print"] < NEVER or logger.get("verbose")):
            _set_log_level("info")
        self._logs_communication = bool(logger)
        if logger:
            _time_collectives_one_by_one()
        # DeepSpeed times and profiles every forward of the module, those of evaluations and samples too, which would be
        # counted to the next step. Here only `forward` is.
        self._engine.module_forward_pre_hook.remove()
        self._engine.module_forward_post_hook.remove()
        # It would also profile, and print, every micro batch of the step.
        profile_step = self._engine.flops_profiler_profile_step()
        self._engine.flops_profiler_profile_step = lambda: profile_step if self._is_last_micro_batch() else math.nan
        self.model = model
        self.device = self._engine.device
        # The check is on by default for bf16 and off for fp32; a non-finite step must be skipped in both.
        self._optimizer.check_grad_overflow = True
        self._create_adam_states()

    def forward(self, *inputs: torch.Tensor, **keywords: Any) -> Any:
        """The model's forward under DeepSpeed."""
        self._engine._forward_prologue(inputs, keywords)
        out = self._engine(*inputs, **keywords)
        self._engine._forward_epilogue()
        return out

    def backward(self, loss: torch.Tensor) -> None:
        """Accumulate d(loss)/d(parameters) of one micro batch.

        The gradient of a step is the *sum* of these over micro batches and ranks: DeepSpeed's averages over both are undone.
        """
        # DeepSpeed starts these in hooks on the tensors that the model returns, which it does not find in a dataclass.
        timers = self._engine.engine_timers
        self._engine._start_timers(timers.backward_timers + timers.backward_inner_timers)
        self._engine.backward(loss * self._engine.dp_world_size, scale_wrt_gas=False)

    def end_micro_batch(self, learning_rate: float) -> StepResult | None:
        """After every backward; at the last one of a step, take it and say how it went."""
        is_last = self._is_last_micro_batch()
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        self._engine.step()
        if not is_last:
            return None
        norm = self._engine.get_global_grad_norm()
        norm = math.nan if norm is None else float(norm)
        return StepResult(applied=self._engine.was_step_applied(), grad_norm=norm)

    def _is_last_micro_batch(self) -> bool:
        return self._engine.is_gradient_accumulation_boundary()

    def print_communication(self) -> None:
        """The summary of DeepSpeed's collectives, where the config asks for one; every rank takes part and rank 0 prints."""
        if self._logs_communication:
            from deepspeed import comm

            comm.log_summary()

    def core_state(self) -> CoreState:
        """Gather the core from its shards; every rank takes part and gets it whole."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        names = self._trained_parameters()
        return CoreState(
            parameters={name: safe_get_full_fp32_param(p).cpu() for name, p in names.items()},
            moments={
                moment: {name: safe_get_full_optimizer_state(p, moment).cpu() for name, p in names.items()}
                for moment in MOMENTS
            },
            steps=int(self._adam_states()[0]["step"]),
        )

    def load_core_state(self, state: CoreState) -> None:
        """Put a whole core into this rank's shards, whatever number of ranks it came from."""
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        for adam in self._adam_states():
            adam["step"].fill_(state.steps)
        for name, parameter in self._trained_parameters().items():
            value = state.parameters[name].to(parameter.device)
            parameter.data.copy_(value)
            safe_set_full_fp32_param(parameter, value)
            for moment in MOMENTS:
                safe_set_full_optimizer_state(parameter, state.moments[moment][name].to(parameter.device), moment)

    def _trained_parameters(self) -> dict[str, torch.nn.Parameter]:
        """Without those that a control freezes: their values follow from the seed."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def _adam_states(self) -> list[dict]:
        """This rank's AdamW state of each flat parameter group."""
        return [self._optimizer.optimizer.state[flat] for flat in self._optimizer.single_partition_of_fp32_groups]

    def _create_adam_states(self) -> None:
        """Make AdamW's state now rather than in its first step, so that it can be saved and loaded at any time.

        DeepSpeed links states to parameters once, after the first step of the first group, and would miss later groups.
        """
        for flat in self._optimizer.single_partition_of_fp32_groups:
            moments = {moment: torch.zeros_like(flat) for moment in MOMENTS}
            self._optimizer.optimizer.state[flat] = {"step": torch.zeros((), device=flat.device), **moments}
        self._optimizer._lazy_init_hp_params_optimizer_state()


def check_ds_config(path: str, config: dict[str, Any]) -> None:
    """Let DeepSpeed check its part of the JSON at `path` before any work starts, and look for what it would find too late.

    Raises:
        ValueError: a key or value that DeepSpeed does not take, or that this machine has no room for.
    """
    _check_room(path, config)
    _check_profile(path, config.get("flops_profiler", {}))
    one_rank = {"train_batch_size": 1, "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1}
    with _deepspeed(show_log=False):
        from deepspeed.runtime.config import DeepSpeedConfig

        try:
            DeepSpeedConfig({**config, **one_rank})
        except Exception as error:  # whatever it is: `trainer/ds_schema.py` lets through what it does not know of
            reason = str(error)
            if hasattr(error, "errors"):  # pydantic's, several lines long
                details = error.errors()[0]
                section = SECTIONS.get(error.title, error.title)
                reason = f"{'.'.join([section, *map(str, details['loc'])])}: {details['msg']}"
            raise ValueError(f"--ds_config {path}: {reason}; see DeepSpeed's documentation") from None


def _check_room(path: str, config: dict[str, Any]) -> None:
    """DeepSpeed makes the whole bucket in the first backward."""
    bucket = config.get("zero_optimization", {}).get("reduce_bucket_size", 0)
    has_gpu = torch.cuda.is_available()
    room = torch.cuda.get_device_properties(0).total_memory if has_gpu else host_bytes()
    if 4 * bucket > room:
        raise ValueError(
            f"--ds_config {path}: zero_optimization.reduce_bucket_size = {bucket} takes {4 * bucket / 2**30:,.0f} GiB, and "
            f'this machine has {room / 2**30:,.0f}; lower it, or write "auto"'
        )


def _check_profile(path: str, profiler: dict[str, Any]) -> None:
    """The profile is written amid training, where nothing may fail."""
    output = profiler.get("output_file")
    if not profiler.get("enabled") or not output:
        return
    file = Path(output)
    try:
        wrong = "is a folder" if file.is_dir() else None
        while not file.exists():
            file = file.parent
        if wrong is None and not os.access(file, os.W_OK) or (file != Path(output) and not file.is_dir()):
            wrong = f"no permission for {file}" if file.is_dir() or file == Path(output) else f"{file} is a file"
    except OSError as error:
        wrong = error.strerror
    if wrong is not None:
        raise ValueError(
            f"--ds_config {path}: flops_profiler.output_file = {shown(output)} cannot be written ({wrong}); give another"
        )


def _set_log_level(name: str) -> None:
    """Of DeepSpeed's logger and its handlers."""
    from deepspeed.utils.logging import set_log_level_from_string

    set_log_level_from_string(name)


def _time_collectives_one_by_one() -> None:
    """DeepSpeed's logger never resets its timers, so that a latency would hold those of all earlier ones."""
    from deepspeed.comm import comm

    append = comm.CommsLogger().append.__func__

    def append_and_reset(raw_name: str, record_name: str, latency: float, msg_size: int) -> None:
        append(comm.comms_logger, raw_name, record_name, latency, msg_size)
        comm.timers(record_name).reset()

    comm.comms_logger.append = append_and_reset


@contextlib.contextmanager
def _deepspeed(show_log: bool) -> Iterator[Any]:
    """The module, with its banner, warnings and info lines kept out of sight unless asked for; errors always show."""
    # Else it looks for itself, warns where it finds no GPU, and may choose a device that the model is not on.
    os.environ["DS_ACCELERATOR"] = "cuda" if torch.cuda.is_available() else "cpu"
    out = sys.stdout
    with contextlib.ExitStack() as quiet:
        if not show_log:
            # Deprecations inside torch and DeepSpeed, at every collective: nothing that a user could act on.
            warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
            quiet.enter_context(contextlib.redirect_stdout(NOWHERE))
            quiet.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")
        import deepspeed

        # Its logger keeps the output that it finds when it is imported, which may be the one that nobody reads.
        for handler in logging.getLogger("DeepSpeed").handlers:
            if getattr(handler, "stream", None) is NOWHERE:
                handler.setStream(out)
        _set_log_level("info" if show_log else "error")
        # On CPUs it would compile a shared-memory collective for a minute or more, needing a compiler, and again whenever a
        # flag differs; only its inference engine uses it.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        yield deepspeed
