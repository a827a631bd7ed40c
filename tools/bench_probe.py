"""The trainer's program with a stopwatch around its parts; `tools/bench_training.py` starts it as a process of its own.

    python tools/bench_probe.py REPORT BEGAN ours|straightforward [flags of trainer/run.py]

Each rank R writes `REPORT.R.json`: `parts`, in order, each with its seconds and the memory in use after it, and the
largest memory. BEGAN is the time (as of `time.time`) at which the command was given. `straightforward` computes layers and
key updates by the algorithms of `tools/bench_baselines.py`, in one process.
"""

import json
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch

import modeling.mixers
import trainer.loop
import trainer.run
import trainer.training
from modeling.some import KeyStore, Routing
from tools.bench_baselines import StraightforwardLayer, pairwise_update
from tools.bench_table import synchronise
from trainer.launch import Launch
from trainer.metrics import RunLog

PARTS = {
    "decide": "pool manifest and checkpoint",
    "check_ds_config": "import of DeepSpeed",
    "prepare_folder_and_data": "data",
    "init_process_group": "process group",
    "set_numerics": "deterministic kernels",
    "build_model": "model and pool",
    "Engine": "engine",
}
"""Functions of `trainer.training` -> what they are called here."""
EVENTS = {"eval": "first evaluation", "train": "first step"}
"""Records of metrics.jsonl -> the part that their first one ends."""


class Probe:
    """A stopwatch that is wound by wrapping functions.

    Args:
        began: when the command was given.
    """

    def __init__(self, began: float):
        self.parts: list[dict[str, Any]] = []
        self._began, self._seen = began, set()
        self._add("interpreter and imports", time.time() - began)

    def around(self, function: Callable, part: str) -> Callable:
        """`function`, with its time added as `part`."""

        def timed(*arguments: Any, **keywords: Any) -> Any:
            began = time.perf_counter()
            result = function(*arguments, **keywords)
            self._add(part, time.perf_counter() - began)
            return result

        return timed

    def event(self, log: RunLog, event: str, **values: Any) -> None:
        """A record was written; the first of each kind ends a part."""
        if event in self._seen:
            return
        self._seen.add(event)
        elapsed = time.time() - self._began
        if event == "start":
            self._add("other", elapsed - self._total)
        elif event in EVENTS:
            self._add(EVENTS[event], elapsed - self._total)

    def report(self) -> dict[str, Any]:
        """What was seen, as plain values; memory in bytes."""
        return {
            "parts": self.parts,
            "threads": torch.get_num_threads(),
            "device": "cuda" if torch.cuda.is_available() else "cpu",
            "largest": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else _status("VmHWM"),
        }

    @property
    def _total(self) -> float:
        return sum(part["seconds"] for part in self.parts)

    def _add(self, part: str, seconds: float) -> None:
        synchronise(torch.device("cuda" if torch.cuda.is_initialized() else "cpu"))
        used = torch.cuda.memory_allocated() if torch.cuda.is_available() else _status("VmRSS")
        self.parts.append({"part": part, "seconds": seconds, "memory": used})


def _status(key: str) -> int:
    """Bytes of this process as the kernel counts them (the largest of getrusage would include the parent's)."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


class StraightforwardUpdate:
    """Stands in for the sums over tokens of `trainer.loop` and the update from them: keeps all queries until the update."""

    def __init__(self) -> None:
        self.updates = 0

    def collect(
        self,
        records: list[list | None],
        routing: list[Routing],
        stores: list[KeyStore],
        real_T: torch.Tensor,
        token_ids_T: torch.Tensor,
    ) -> list[list]:
        """As `accumulate_statistics`."""
        collected = []
        for kept, record, store in zip(records, routing, stores, strict=True):
            mask_T = real_T if store.rules.token_mask == "targets" else torch.ones_like(real_T)
            new = [values[mask_T] for values in (record.queries_TD, record.expert_ids_TK, record.gates_TK)]
            collected.append([*(kept or []), new])
        return collected

    def begin(self, stores: list[KeyStore], records: list[list], group: Any) -> "StraightforwardUpdate":
        """As making a `KeyStoreUpdate`; nothing is sent."""
        self._layers = list(zip(stores, records, strict=True))
        return self

    def fold(self) -> None:
        """As `KeyStoreUpdate.fold`."""

    def finish(self, apply: bool) -> None:
        """As `KeyStoreUpdate.finish`."""
        self.updates += 1
        for store, kept in self._layers:
            pairwise_update(store, *(torch.cat(values) for values in zip(*kept, strict=True)))


def main() -> None:
    """The command line."""
    report, began, which, *flags = sys.argv[1:]
    sys.argv = [trainer.run.__file__, *flags]
    probe, straightforward = Probe(float(began)), StraightforwardUpdate()
    write = RunLog.write

    def watched_write(log: RunLog, event: str, **values: Any) -> None:
        probe.event(log, event, **values)
        write(log, event, **values)

    with ExitStack() as patches:
        for name, part in PARTS.items():
            wrapped = probe.around(getattr(trainer.training, name), part)
            patches.enter_context(mock.patch.object(trainer.training, name, wrapped))
        patches.enter_context(mock.patch.object(RunLog, "write", watched_write))
        if which == "straightforward":
            patches.enter_context(mock.patch.object(modeling.mixers, "SoMELayer", StraightforwardLayer))
            patches.enter_context(mock.patch.object(trainer.loop, "accumulate_statistics", straightforward.collect))
            patches.enter_context(mock.patch.object(trainer.loop, "KeyStoreUpdate", straightforward.begin))
        trainer.run.main()
    assert which == "ours" or straightforward.updates, "the trainer no longer updates keys where this replaces it"
    rank = Launch.from_environment().rank
    Path(f"{report}.{rank}.json").write_text(json.dumps(probe.report()), encoding="utf-8")


if __name__ == "__main__":
    main()
