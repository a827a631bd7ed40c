"""Which checkpoint a run goes on from: the newest that is whole and belongs to the run."""

import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from trainer.checkpoint import (
    MANIFEST,
    STATE,
    RunState,
    checkpoint_folders,
    read_state,
    remove_superseded,
    remove_temporary,
    verify,
)
from trainer.storage import is_failing

Fits = Callable[[Path, RunState], None]
"""Raises ValueError for a checkpoint of another run."""


class NoCheckpoint(ValueError):
    """There is none, or none that is whole; the message begins with the path."""


@dataclass(frozen=True)
class Found:
    """A verified checkpoint."""

    folder: Path
    state: RunState
    seconds: float
    """That the verification took, of those that were skipped too."""
    skipped: dict[Path, str]
    """Newer checkpoints that are of no use, and why."""

    def clean(self, keep: int) -> None:
        """Remove what a process that was killed while saving left behind; for the run's owner."""
        remove_temporary(self.folder.parent)
        remove_superseded(self.folder, self.state, keep)

    def set_skipped_aside(self) -> None:
        """Rename what was skipped to `skipped_step_*`: it is no part of what the run does from now on. For the run's owner,
        when no rank looks at checkpoints any more."""
        for folder in self.skipped:
            aside, number = folder.with_name(f"skipped_{folder.name}"), 1
            while os.path.lexists(aside):
                aside, number = folder.with_name(f"skipped_{folder.name}.{number}"), number + 1
            folder.rename(aside)


def find_checkpoint(resume: str, output_dir: Path, fits: Fits = lambda folder, state: None) -> Found | None:
    """The checkpoint that `--resume` asks for; None = start at step 0.

    Args:
        resume: `auto` (the newest of `output_dir`, if it has any), `never`, or a run's folder or checkpoint folder.
        output_dir: the run's folder.
        fits: refuses checkpoints of other runs.

    Raises:
        ValueError: a named folder without a checkpoint, a named checkpoint that is damaged, none that is whole, or none that
            fits.
    """
    if resume == "never":
        return None
    if resume == "auto":
        return _newest_whole(checkpoint_folders(output_dir / "checkpoints"), fits)
    try:
        return checkpoint_at(Path(resume), fits)
    except NoCheckpoint as error:
        raise ValueError(f"--resume {error}") from None


def checkpoint_at(path: Path, fits: Fits = lambda folder, state: None) -> Found:
    """The checkpoint in a folder, or the newest whole one of a run's folder.

    Raises:
        NoCheckpoint: no checkpoint, or none that is whole.
        OSError: storage that fails for now.
        ValueError: none that fits.
    """
    began = time.perf_counter()
    try:
        is_checkpoint = _is_checkpoint(path)
        folders = [] if is_checkpoint else checkpoint_folders(path / "checkpoints") or checkpoint_folders(path)
    except OSError as error:
        if is_failing(error):
            raise
        raise NoCheckpoint(f"{path}: cannot be read ({error.strerror}); give another") from None
    if is_checkpoint:
        try:
            state = read_state(path)
        except ValueError as error:
            raise NoCheckpoint(str(error)) from None
        fits(path, state)
        return Found(path, state, time.perf_counter() - began, {})
    found = _newest_whole(folders, fits)
    if found is None:
        raise NoCheckpoint(f"{path}: holds no checkpoint; give a run's folder or one of its checkpoints/step_* folders")
    return found


def _is_checkpoint(path: Path) -> bool:
    """Whether a folder is meant as one checkpoint, whole or not."""
    named = re.fullmatch(r"step_\d+", path.name) and path.is_dir() and not (path / "checkpoints").exists()
    return bool(named) or (path / MANIFEST).exists() or (path / STATE).exists()


def _newest_whole(folders: list[Path], fits: Fits) -> Found | None:
    """The first of `folders` that is whole and fits; None where there are none."""
    began, skipped, misfit = time.perf_counter(), {}, None
    for folder in folders:
        try:
            state = verify(folder)
        except ValueError as error:
            skipped[folder] = str(error)
            continue
        try:
            fits(folder, state)
        except ValueError as error:
            # Where none fits it is the run's settings that were changed: the newest tells how.
            skipped[folder], misfit = str(error), misfit or error
            continue
        return Found(folder, state, time.perf_counter() - began, skipped)
    if misfit is not None:
        raise misfit
    if skipped:
        reasons = "; ".join(f"{folder.name}: {reason}" for folder, reason in skipped.items())
        raise NoCheckpoint(
            f"{folders[0].parent}: none of the checkpoints is whole ({reasons}); start anew with --resume never, which "
            f"moves the run aside, or give another --output_dir"
        )
    return None
