"""Faults on purpose, so that tests and `tools/chaos.py` see a run survive them; off unless asked for.

    --set faults.kill="rank=1 step=7"                                     rank 1 kills itself when step 7 begins
    --set faults.kill="step=8 stage=keys.safetensors when=inside"         ... after half of a file of step 8's checkpoint
    --set faults.stop="rank=0 step=7"                                     stops (SIGSTOP), as a hanging rank does
    --set faults.slow="rank=0 step=8 stage=rename when=before seconds=2"  sleeps
    --set faults.nan="step=5 count=3"                                     the losses of steps 5 to 7 are not numbers
    --set faults.write="step=8 stage=core.safetensors"                    the disk is full after half of the file

A fault happens whenever a run comes to its step, also after a restart with the same flag. Steps count from 1; without `rank`
it happens on every rank. Stages are parts of saving a checkpoint, which is rank 0's work.
"""

import errno
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields

from trainer.plain_yaml import parse_float, parse_int

FILE_STAGES = ("core.safetensors", "optimizer.safetensors", "keys.safetensors", "state.json", "manifest")
STAGES = ("begin", *FILE_STAGES, "rename", "pointer", "clean")
"""Of a save, in order."""
_WORDS = {
    "kill": ("rank", "step", "stage", "when"),
    "stop": ("rank", "step", "stage", "when"),
    "slow": ("rank", "step", "stage", "when", "seconds"),
    "nan": ("rank", "step", "count"),
    "write": ("step", "stage"),
}
_NEEDED = {"slow": ("step", "seconds"), "write": ("step", "stage")}


@dataclass(frozen=True)
class Fault:
    """One fault: where and when it happens."""

    step: int
    """The step in progress, or the checkpoint's, from 1."""
    rank: int | None = None
    """Where; None = on every rank."""
    stage: str | None = None
    """Part of a save; None = the beginning of the step."""
    when: str = "before"
    """Of the stage: `before`, `after`, or `inside`, which is when half of a file is written."""
    seconds: float = 0
    """How long a slow rank sleeps."""
    count: int = 1
    """Steps in a row whose loss is not a number."""

    @property
    def point(self) -> str:
        """Where in the run, as `Faults.at` is told."""
        return "step" if self.stage is None else f"{self.when} {self.stage}"


def parse(kind: str, text: str) -> Fault:
    """The fault that `faults.<kind> = <text>` asks for.

    Raises:
        ValueError: an unknown word, a value out of range, a missing word, or a fault that could never happen.
    """
    said, known = f"faults.{kind} = {text!r}", _WORDS[kind]
    values: dict[str, str] = {}
    for part in text.split():
        name, _, value = part.partition("=")
        if name not in known or name in values:
            problem = "is given twice" if name in values else "is not known"
            raise ValueError(f"{said}: {name} {problem}; write it as {' '.join(f'{word}=...' for word in known)}")
        values[name] = value
    for name in _NEEDED.get(kind, ("step",)):
        if name not in values:
            raise ValueError(f"{said}: {name} is missing; write it as {' '.join(f'{word}=...' for word in known)}")
    numbers = {"step": (parse_int, 1), "rank": (parse_int, 0), "count": (parse_int, 1), "seconds": (parse_float, 0)}
    parsed = {}
    for name, value in values.items():
        if name in numbers:
            parse_number, least = numbers[name]
            parsed[name] = parse_number(value)
            if parsed[name] is None:
                raise ValueError(f"{said}: {name}={value} is not a number; give one from {least}")
            # Written so that it refuses what is not a number, too.
            if not least <= parsed[name] < float("inf"):
                raise ValueError(f"{said}: {name}={value} is out of range; give a number from {least}")
    if kind == "write":
        values["when"] = "inside"
    if "when" in values and "stage" not in values:
        raise ValueError(f"{said}: when= is said of a stage; add stage=..., one of {', '.join(STAGES)}")
    if "stage" in values:
        inside = values.get("when") == "inside"
        stages = FILE_STAGES if inside else STAGES
        if values["stage"] not in stages:
            raise ValueError(f"{said}: stage={values['stage']} is not one of {', '.join(stages)}")
        if parsed.get("rank"):
            raise ValueError(f"{said}: stages are rank 0's, so this would never happen; leave out rank")
        if values.get("when", "before") not in ("before", "inside", "after"):
            raise ValueError(f"{said}: when={values['when']} is not one of before, inside, after")
        parsed |= {name: values[name] for name in ("stage", "when") if name in values}
    return Fault(**parsed)


@dataclass(frozen=True)
class FaultsConfig:
    """Faults to happen; see `trainer/faults.py` for how each is written."""

    kill: str | None = None
    """End a rank by SIGKILL, as the out-of-memory killer or a power cut does."""
    stop: str | None = None
    """Stop a rank by SIGSTOP: it lives and answers nobody."""
    slow: str | None = None
    """Let a rank sleep."""
    nan: str | None = None
    """Make the loss of a step's first micro batch not a number."""
    write: str | None = None
    """Let the disk be full after half of a file of a checkpoint."""

    def __post_init__(self) -> None:
        self.parsed()

    def parsed(self) -> dict[str, Fault]:
        """What is asked for, by kind."""
        asked = {spec.name: getattr(self, spec.name) for spec in fields(self)}
        return {kind: parse(kind, text) for kind, text in asked.items() if text is not None}

    def check(self, world_size: int) -> None:
        """Refuse faults of ranks that there are not.

        Raises:
            ValueError: such a fault.
        """
        for kind, fault in self.parsed().items():
            if (fault.rank or 0) >= world_size:
                said = f"faults.{kind} = {getattr(self, kind)!r}"
                raise ValueError(f"{said}: there is no rank {fault.rank}; give one from 0 to {world_size - 1}")


class Faults:
    """The faults of one rank."""

    def __init__(self, config: FaultsConfig, rank: int):
        self._faults = {kind: fault for kind, fault in config.parsed().items() if fault.rank in (None, rank)}

    def at(self, point: str, step: int) -> None:
        """The run has come to `point` of `step`: `step` (it begins), or `before|inside|after STAGE`.

        Raises:
            OSError: the fault `write`.
        """
        for kind, fault in self._faults.items():
            if kind != "nan" and (fault.point, fault.step) == (point, step):
                self._happen(kind, fault)

    @contextmanager
    def stage(self, name: str, step: int) -> Iterator[None]:
        """Around one stage of a save."""
        self.at(f"before {name}", step)
        yield
        self.at(f"after {name}", step)

    def spoils_loss(self, step: int) -> bool:
        """Whether the loss of the first micro batch of `step` is not to be a number on this rank."""
        nan = self._faults.get("nan")
        return nan is not None and nan.step <= step < nan.step + nan.count

    def _happen(self, kind: str, fault: Fault) -> None:
        if kind == "slow":
            time.sleep(fault.seconds)
        elif kind == "write":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        else:
            os.kill(os.getpid(), signal.SIGKILL if kind == "kill" else signal.SIGSTOP)
