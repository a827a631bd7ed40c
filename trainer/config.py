"""An experiment: a YAML file plus `--set` overrides, checked into dataclasses.

Every mistake is a `ValueError` of one line that names the key, the value and the cure.
"""

import dataclasses
import math
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from modeling.config import ModelConfig
from trainer.controls import apply_control
from trainer.data.config import DataConfig
from trainer.faults import FaultsConfig
from trainer.paths import local_path
from trainer.plain_yaml import Malformed, parse_yaml
from trainer.published import merge, published_experiment, published_ids
from trainer.text import read_yaml, shown
from trainer.typed import build, nearest

EXPERIMENTS_DIR = Path(__file__).parent / "experiments"
RULES_PATH = ("model", "some", "rules")
PATHS = ("path", "tokenizer_from", "cache_dir")
"""Keys of section `data` that reach into the file system."""
MOST_EPOCHS = 1_000_000
MIN_TEMPERATURE = 1e-30
"""Logits that are divided by less are infinite."""
MAX_PROMPT = 50_000
"""Characters: a run's config.yaml, which has ten bytes for some, must stay one that is read."""
MOST_MINUTES = 525_600  # a year


def _positive(key: str, value: float) -> None:
    if not (value > 0 and math.isfinite(value)):
        raise ValueError(f"{key} = {value} must be a number greater than 0")


def _fraction(key: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"{key} = {value} must lie between 0 and 1")


@dataclass(frozen=True)
class TrainConfig:
    """The optimisation; the same whatever the number of ranks."""

    batch_size: int = 32
    """Sequences in one global batch, over all ranks and accumulation steps."""
    max_micro_batch: int = 16
    """Most sequences that one rank holds at a time; accumulation follows from it."""
    epochs: float = 4
    """Length of the run in passes over the training data; `steps` goes before."""
    steps: int | None = None
    """Length of the run in optimizer steps; null = from `epochs`."""
    learning_rate: float = 6e-4
    """Peak learning rate."""
    min_learning_rate_ratio: float = 0.1
    """The cosine ends at this share of the peak (published: 0)."""
    warmup_steps: int = 100
    """Steps of linear warm-up (published: 0)."""
    weight_decay: float = 0.1
    """AdamW's decoupled weight decay."""
    weight_decay_on: str = "matrices"
    """`matrices` (norms, biases and the embedding are left out) or `all` (published)."""
    beta1: float = 0.9
    """AdamW's first beta."""
    beta2: float = 0.95
    """AdamW's second beta."""
    epsilon: float = 1e-8
    """AdamW's epsilon."""
    gradient_clipping: float = 1.0
    """Largest global gradient norm."""
    temperature_end: float | None = None
    """Once an epoch the gates' temperature falls linearly from model.some.temperature towards this, which it would reach
    after the last epoch (published v3.5); null = it stays."""
    eval_every: int | str = 500
    """Steps between evaluations, or `epoch`; there is always one at the end."""
    max_skipped: int = 5
    """Steps in a row that may be skipped because the loss or the gradients are not finite."""
    on_nan: str = "stop"
    """What happens at one more. `stop`: the run ends and says where it saw such numbers. `rollback`: it takes up the last
    checkpoint that was due and goes on behind the data that led there; if that happens again before the next one is due, it
    ends."""
    deterministic: bool = True
    """Use deterministic kernels, so that a restart on the same ranks repeats every bit."""

    def __post_init__(self) -> None:
        for name in (
            "batch_size",
            "max_micro_batch",
            "epochs",
            "learning_rate",
            "gradient_clipping",
            "epsilon",
        ):
            _positive(f"train.{name}", getattr(self, name))
        if self.epochs > MOST_EPOCHS:
            raise ValueError(f"train.epochs = {self.epochs} must be at most {MOST_EPOCHS:,}")
        if isinstance(self.eval_every, str) and self.eval_every != "epoch":
            raise ValueError(f"train.eval_every = {self.eval_every!r} must be a number of steps or epoch")
        for name in ("eval_every", "temperature_end"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                _positive(f"train.{name}", value)
        if self.steps is not None:
            _positive("train.steps", self.steps)
        for name in ("min_learning_rate_ratio", "beta1", "beta2"):
            _fraction(f"train.{name}", getattr(self, name))
        if max(self.beta1, self.beta2) == 1:
            raise ValueError(f"train.beta1 = {self.beta1} and train.beta2 = {self.beta2} must be less than 1")
        for name in ("warmup_steps", "weight_decay", "max_skipped"):
            if getattr(self, name) < 0:
                raise ValueError(f"train.{name} = {getattr(self, name)} must not be negative")
        if self.weight_decay_on not in ("matrices", "all"):
            raise ValueError(f"train.weight_decay_on = {self.weight_decay_on!r} is not one of: matrices, all")
        if self.on_nan not in ("stop", "rollback"):
            raise ValueError(f"train.on_nan = {self.on_nan!r} is not one of: stop, rollback")


@dataclass(frozen=True)
class ParallelConfig:
    """How a run spreads over ranks; changes no number of the run."""

    ep_size: int | str = "auto"
    """Ranks that share one copy of the expert pool. `auto`: the largest number that divides a node's ranks and the experts;
    1: the whole pool on every rank."""
    chunks: int = 1
    """Parts in which a rank's tokens travel to the experts of other ranks and back, so that one is on its way while another
    computes. More hide more of the network's time but make smaller products."""
    placement: str = "contiguous"
    """Which rank of a group holds which experts: `contiguous` (equal blocks of ids) or `balanced` (by how much they are
    used, re-planned during the run; the same thing where ep_size is 1)."""
    replicas: int | str = 0
    """With `balanced`: copies of the most used experts of a layer, beyond one each, over all ranks of a group. `auto`:
    as few as bring the busiest rank's load to 1.1 of the mean, at most one a rank. A copy takes the memory of an expert."""
    replan_every: int = 100
    """With `balanced`: steps between plans; 0: the run keeps the placement that it starts with (contiguous, or its
    checkpoint's). A layer changes only where its busiest rank has over 1.1 times the mean load and gains 5 percent."""
    check_every: int = 100
    """Steps between comparisons of the key stores over ranks."""
    timeout_minutes: float = 10
    """After so many minutes in which no rank moves on, to the next micro batch, file of a checkpoint and so on, the job ends
    and names the rank to blame. Collectives and the wait for the slowest rank at the start may take half an hour longer."""

    def __post_init__(self) -> None:
        if isinstance(self.ep_size, str) and self.ep_size != "auto":
            raise ValueError(f"parallel.ep_size = {self.ep_size!r} must be a number of ranks or auto")
        if not isinstance(self.ep_size, str):
            _positive("parallel.ep_size", self.ep_size)
        _positive("parallel.chunks", self.chunks)
        if self.placement not in ("contiguous", "balanced"):
            raise ValueError(f"parallel.placement = {self.placement!r} is not one of: contiguous, balanced")
        if self.replicas != "auto" and (isinstance(self.replicas, str) or self.replicas < 0):
            raise ValueError(f"parallel.replicas = {self.replicas!r} must be a number of experts, 0 or more, or auto")
        if self.replicas != 0 and self.placement != "balanced":
            raise ValueError(
                f"parallel.replicas = {self.replicas} has no effect with parallel.placement = {self.placement}; "
                f"set parallel.placement=balanced or parallel.replicas=0"
            )
        if self.replan_every < 0:
            raise ValueError(f"parallel.replan_every = {self.replan_every} must be a number of steps, or 0 for never")
        _positive("parallel.check_every", self.check_every)
        _positive("parallel.timeout_minutes", self.timeout_minutes)
        if self.timeout_minutes > MOST_MINUTES:
            raise ValueError(f"parallel.timeout_minutes = {self.timeout_minutes} must be at most {MOST_MINUTES:,}, a year")


@dataclass(frozen=True)
class CheckpointConfig:
    """When checkpoints are written, and how many are kept."""

    every: int = 500
    """Steps between checkpoints; there is always one at the end and at every new best evaluation."""
    keep: int = 2
    """How many of the newest are kept; the best by validation loss is kept besides."""
    asynchronous: bool = False
    """Let a thread of rank 0 write checkpoints while training goes on, one at a time. It takes the memory of a checkpoint on
    rank 0; the files are the same."""

    def __post_init__(self) -> None:
        _positive("checkpoint.every", self.every)
        _positive("checkpoint.keep", self.keep)


@dataclass(frozen=True)
class LogConfig:
    """What a run writes and shows."""

    every: int = 1
    """Steps between train records in metrics.jsonl and TensorBoard."""
    tensorboard: bool = True
    """Write TensorBoard files."""
    deepspeed: bool = False
    """Show DeepSpeed's own log."""

    def __post_init__(self) -> None:
        _positive("log.every", self.every)


@dataclass(frozen=True)
class SampleConfig:
    """The text that a finished run prints."""

    prompt: str = "Once upon a time"
    """How the text begins."""
    tokens: int = 120
    """Most tokens to add."""
    temperature: float = 0.7
    """Sampling temperature; 0 takes the likeliest token."""

    def __post_init__(self) -> None:
        if self.tokens < 0 or self.temperature < 0:
            raise ValueError(
                f"sample.tokens = {self.tokens} and sample.temperature = {self.temperature} must not be negative"
            )
        # It is used when training is done, which is no time to find out.
        if 0 < self.temperature < MIN_TEMPERATURE:
            raise ValueError(
                f"sample.temperature = {self.temperature} must be at least {MIN_TEMPERATURE}, or 0 for the likeliest token"
            )
        if len(self.prompt) > MAX_PROMPT:
            raise ValueError(f"sample.prompt has {len(self.prompt):,} characters; write at most {MAX_PROMPT:,}")


@dataclass(frozen=True)
class Experiment:
    """Everything that decides a run's numbers, and how it is run."""

    name: str = "quickstart"
    """Names the default output folder: letters, digits and ` _ . + -`, the first a letter, a digit or `_`."""
    seed: int = 0
    """Decides every random number: weights, experts, keys, data order."""
    control: str | None = None
    """Turns the model into a control of itself (see `trainer/controls.py`); null = the experiment as it is."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The model."""
    data: DataConfig = field(default_factory=DataConfig)
    """The text it learns."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """The optimisation."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """How it spreads over ranks."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """When it is saved."""
    log: LogConfig = field(default_factory=LogConfig)
    """What it shows."""
    sample: SampleConfig = field(default_factory=SampleConfig)
    """What a finished run prints."""
    faults: FaultsConfig = field(default_factory=FaultsConfig)
    """What goes wrong on purpose, for tests."""

    def __post_init__(self) -> None:
        # The name of a folder in runs/, and of nothing outside.
        if not re.fullmatch(r"\w[\w.+ -]{0,99}", self.name):
            raise ValueError(f"name = {shown(self.name)} cannot name a folder; write up to 100 letters, digits and _ . + -")
        object.__setattr__(self, "model", apply_control(self.model, self.control))
        if not self.model.causal and not self.data.count_padding:
            raise ValueError(
                "model.causal = False shows real tokens the padding of their batch, so the loss would depend on how rows "
                "are batched; set data.rows=padded and data.count_padding=true, as the published run did"
            )

    def to_dict(self) -> dict:
        """Nested plain values; `experiment_from_dict` reads it back."""
        return dataclasses.asdict(self)


def experiment_names() -> list[str]:
    """The shipped experiments: our own, then the published runs."""
    return [*sorted(path.stem for path in EXPERIMENTS_DIR.glob("*.yaml")), *published_ids()]


def load_experiment(name: str = "quickstart", overrides: list[str] | None = None) -> Experiment:
    """A shipped experiment by name, or a YAML file by path, with `key.path=value` overrides.

    Raises:
        ValueError: unknown experiment, file that is not YAML, unknown key, wrong type or value.
    """
    name = local_path(name, "--experiment")
    values, chosen = _read_experiment(name), {}
    for override in overrides or []:
        key, separator, text = override.partition("=")
        if not separator or not all(key.strip().split(".")):
            raise ValueError(f"--set {override}: write it as key=value, for example --set train.batch_size=64")
        _set_path(chosen, key.strip(), _parse_scalar(key, text))
    if values.get("control") not in (None, chosen.get("control", values.get("control"))):
        raise ValueError(
            f"--set control={shown(chosen['control'])}: {name} is its control {values['control']} already; start from the "
            f"experiment that it was made of"
        )
    for layer in (values, chosen):
        _read_paths(layer)
    if name not in experiment_names():
        _check_paths(name, values, chosen)
    return experiment_from_dict(overlay(values, chosen))


def overlay(below: dict, above: dict) -> dict:
    """An experiment's values with others on top; a preset of the key rules that these name replaces all rules below it."""
    rules = above
    for key in RULES_PATH:
        rules = rules.get(key) if isinstance(rules, dict) else None
    if isinstance(rules, dict) and "preset" in rules:
        below = merge(below, {"model": {"some": {"rules": None}}})
    return merge(below, above)


def _read_paths(values: dict) -> None:
    """Put local paths in the place of what the data's keys hold, where that is a text."""
    data = values.get("data")
    for key in PATHS:
        if isinstance(data, dict) and isinstance(data.get(key), str):
            data[key] = local_path(data[key], f"data.{key} =")


def _check_paths(name: str, values: dict, chosen: dict) -> None:
    """What a file names must lie below its folder or below the current one: it may come from someone else. Only the
    command line reaches everywhere."""
    data, replaced = values.get("data"), chosen.get("data")
    for key in PATHS:
        path = data.get(key) if isinstance(data, dict) else None
        if not isinstance(path, str) or (isinstance(replaced, dict) and key in replaced):
            continue
        here = os.path.realpath(path)
        if key == "tokenizer_from" and not os.path.exists(here):
            continue  # the id of a data set on the hub
        if not any(Path(here).is_relative_to(os.path.realpath(folder)) for folder in (Path(name).parent, Path.cwd())):
            raise ValueError(
                f"data.{key} = {shown(path)} in {name}: lies outside of the file's folder and the current one; say that you "
                f"mean it with --set data.{key}={path if path.isprintable() else '...'}"
            )


def experiment_from_dict(values: dict) -> Experiment:
    """Checked dataclasses from nested plain values.

    Raises:
        ValueError: unknown key, wrong type or value.
    """
    return build(Experiment, values, "")


def _read_experiment(name: str) -> dict:
    """The values of a shipped experiment or of a YAML file."""
    if name in experiment_names():
        return _shipped(name)
    if not name.endswith((".yaml", ".yml")):
        raise ValueError(f"--experiment {name}: unknown; {nearest(name, experiment_names())}a YAML file's path also works")
    return _read_file(Path(name))


def _shipped(name: str) -> dict:
    return published_experiment(name) if name in published_ids() else _read_file(EXPERIMENTS_DIR / f"{name}.yaml")


def _read_file(path: Path, above: tuple[str, ...] = ()) -> dict:
    """The YAML's values on top of those of its `base`; `above` are the files that are built on it."""
    values = read_yaml(path, f"--experiment {path}")
    values.pop("run", None)  # a run's config.yaml is an experiment too; how it was run is not part of it
    values.setdefault("name", path.stem)
    base = values.pop("base", None)
    if base is None:
        return values
    if base in experiment_names():
        return overlay(_shipped(base), values)
    # A file may come from someone else. Only the command line reaches everywhere.
    folder, here = os.path.realpath(path.parent), os.path.realpath(path)
    is_file = isinstance(base, str) and base.isprintable() and base.endswith((".yaml", ".yml"))
    below = os.path.realpath(path.parent / base) if is_file else ""
    if not is_file or not Path(below).is_relative_to(folder):
        raise ValueError(
            f"base = {shown(base)} in {path}: is no experiment, and no YAML file beside or below the one that names it; "
            f"{nearest(str(base), experiment_names())}files from elsewhere must be copied there"
        )
    if below in (here, *above):
        raise ValueError(f"base = {shown(base)} in {path}: is built on this file; name another experiment")
    return overlay(_read_file(path.parent / base, (*above, here)), values)


def _parse_scalar(key: str, text: str) -> Any:
    try:
        return parse_yaml(text)
    except Malformed as error:
        raise ValueError(f"--set {key}={text}: the value is not valid YAML ({error}); {error.cure or 'quote it'}") from None


def _set_path(values: dict, path: str, value: Any) -> None:
    *parents, last = path.split(".")
    for parent in parents:
        values = values.setdefault(parent, {})
        if not isinstance(values, dict):
            raise ValueError(f"--set {path}: {parent} is a value and has no keys below it")
    both = isinstance(value, dict) and isinstance(values.get(last), dict)
    values[last] = merge(values[last], value) if both else value
