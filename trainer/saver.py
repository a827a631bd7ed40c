"""Saving while training: every rank gathers, rank 0 writes, at once or in a thread while training goes on."""

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch.distributed as dist

from modeling.some import KeyStore
from trainer.checkpoint import RunState, save_checkpoint
from trainer.config import CheckpointConfig
from trainer.distributed import broadcast_text
from trainer.engine import CoreState
from trainer.faults import Faults
from trainer.metrics import RunLog
from trainer.snapshot import Snapshot
from trainer.storage import StorageError


class Saver:
    """Writes the checkpoints of one run, one at a time.

    Args:
        output_dir: the run's folder.
        config: how many are kept, and whether training goes on meanwhile.
        faults: those of this rank.
        log: of rank 0; None on every other rank.
        on_file: called after each file that is written.
    """

    def __init__(
        self,
        output_dir: Path,
        config: CheckpointConfig,
        faults: Faults,
        log: RunLog | None,
        on_file: Callable[[], None] = lambda: None,
    ):
        self._output_dir, self._config, self._faults, self._log = output_dir, config, faults, log
        self._on_file = on_file
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future[dict[str, Any]] | None = None
        """On rank 0, from the beginning of a save until its end was noticed; it results in the save's record."""
        self._blocked_seconds = 0.0

    def save(self, state: RunState, core: CoreState, stores: list[KeyStore], began: float) -> None:
        """Save the run as it is now; a collective, before which nothing may be in writing: see `wait`.

        Args:
            state: copied.
            core: belongs to the saver from now on.
            stores: copied.
            began: `time.perf_counter()` when the save began.

        Raises:
            StorageError: on every rank, what went wrong, if training waits for it.
        """
        assert self._writing is None, "one at a time"
        if dist.get_rank() == 0:
            self._writing = self._thread.submit(self._write, Snapshot.of(state, core, stores), began)
        if not self._config.asynchronous:
            self.wait()
        self._blocked_seconds = time.perf_counter() - began

    def wait(self) -> None:
        """Until nothing is being written; a collective.

        Raises:
            StorageError: on every rank, if it could not be.
        """
        error = None if self._writing is None else self._writing.exception()
        message = broadcast_text("" if error is None else str(error) or repr(error))
        if error is not None:
            self._writing = None
            raise error
        if message:
            raise StorageError(message)
        self.failed()

    def failed(self) -> bool:
        """Whether a save came to grief of which `wait` has not told yet; notes in the log one that did not."""
        if self._writing is None or not self._writing.done():
            return False
        if self._writing.exception() is not None:
            return True
        blocked = {"blocked_seconds": self._blocked_seconds} if self._config.asynchronous else {}
        if self._log is not None:
            self._log.write("checkpoint", **self._writing.result(), **blocked)
        self._writing = None
        return False

    def _write(self, snapshot: Snapshot, began: float) -> dict[str, Any]:
        folder = save_checkpoint(self._output_dir, snapshot, self._config.keep, self._faults, self._on_file)
        size = sum(path.stat().st_size for path in folder.iterdir())
        return {"step": snapshot.state.step, "path": folder.name, "bytes": size, "seconds": time.perf_counter() - began}
