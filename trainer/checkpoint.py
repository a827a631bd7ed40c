"""Checkpoints: one consolidated folder, independent of ranks and EP size; safetensors and JSON, no pickle.

    checkpoints/step_00000100/core.safetensors        fp32 trained parameters
                              optimizer.safetensors   AdamW moments
                              keys.safetensors        key stores
                              state.json              step, experiment, data and tokenizer hashes, pool manifest, ...
                              manifest.json           size and SHA-256 of each of these, written last
    checkpoints/latest                                name of the newest checkpoint, for scripts; the trainer needs it not

A folder is written under a temporary name (`.tmp-*`), synced and renamed. A checkpoint is whole when every file is what its
manifest says, which is verified before anything is loaded. The frozen pool is never saved: its own manifest is, and is
compared on resume. No generator needs saving: every draw is a function of the seed, its purpose and the step.
"""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.comparison import differing_keys
from trainer.config import Experiment
from trainer.faults import Faults
from trainer.paths import make_folder
from trainer.precision import AUTO
from trainer.published import merge
from trainer.storage import (
    StorageError,
    describe_free,
    megabytes,
    remove,
    replace_file,
    safetensors_parts,
    sync,
    write_file,
)

if TYPE_CHECKING:
    from trainer.snapshot import Snapshot

FORMAT = "some-checkpoint-3"
POINTER, STATE, MANIFEST = "latest", "state.json", "manifest.json"
CORE, OPTIMIZER, KEYS = TENSORS = ("core.safetensors", "optimizer.safetensors", "keys.safetensors")
FILES = (*TENSORS, STATE)
"""What the manifest vouches for."""
REPLACEMENT = ".new"
"""Suffix of a checkpoint that is about to take the place of one of the same step."""


@dataclass
class RunState:
    """Where a run is, and what it may be continued with."""

    step: int
    """Optimizer steps tried; with the seed it is the position in the data."""
    tokens: int
    """Real tokens of the steps tried."""
    total_steps: int
    """Length of the whole run."""
    precision: str
    """`bf16` or `fp32`; `auto` until it is decided."""
    experiment: dict[str, Any]
    """The resolved experiment."""
    pool: dict[str, Any]
    """Manifest of the frozen pool."""
    data_fingerprint: str
    """Hash of the tokenised data."""
    tokenizer_hash: str
    """Hash of the tokenizer."""
    skipped: int = 0
    """Steps skipped because the loss or the gradients were not finite, and steps undone by going back to a checkpoint."""
    skipped_in_row: int = 0
    """How many of the last steps were skipped without one between them that was not."""
    rollback_to: int | None = None
    """Step of the checkpoint that `train.on_nan = rollback` goes back to: the last that was due by the settings. One that
    was written because of a signal does not count, so that a stop changes no curve."""
    rolled_back: int | None = None
    """Step at which the run went back, until the next checkpoint is due."""
    evaluation_due: bool = False
    """Whether the evaluation of this step is still to be made."""
    best: dict[str, Any] | None = None
    """`step` and `val_loss` of the best evaluation so far."""
    val_loss: float | None = None
    """Validation loss of the last evaluation."""
    key_store_steps: list[int] = field(default_factory=list)
    """Updates applied to each layer's key store."""
    optimizer_steps: int = 0
    """Steps applied by AdamW."""
    placement: list[list[list[int]]] | None = None
    """For each layer and rank of a group the experts it holds; None = contiguous. No number depends on it but in the last
    bits: it decides in what order a token's experts are added, so a restart on the same ranks needs it to be bitwise. A
    plan cannot be made again from the key stores, which have moved on since, and it depends on the plan before."""
    format: str = FORMAT
    """Format of the folder."""


def read_state(folder: Path) -> RunState:
    """Verify a checkpoint and return its state.

    Raises:
        ValueError: not a whole checkpoint of this trainer.
    """
    try:
        return verify(folder)
    except ValueError as error:
        raise ValueError(
            f"{folder}: not a checkpoint of this trainer, or a damaged one ({error}); name another, or its run's folder for "
            f"the newest whole one, or start anew with --resume never"
        ) from None


def verify(folder: Path) -> RunState:
    """Compare every byte of a checkpoint with its manifest; the state in it.

    Raises:
        ValueError: what is wrong with the first part that is.
    """
    try:
        if folder.is_symlink() and not folder.exists():
            raise ValueError(f"it is a link to {os.readlink(folder)}, which is not there")
        if not (folder / MANIFEST).exists():
            raise ValueError(f"{MANIFEST} is missing: it is half-written, or from before there were manifests")
        manifest = _read_json(folder / MANIFEST)
        if manifest.get("format") != FORMAT:
            raise ValueError(f"it has format {manifest.get('format')!r} instead of {FORMAT!r}")
        files = manifest["files"]
        if set(files) != set(FILES):
            raise ValueError(f"{MANIFEST} lists other files than {', '.join(FILES)}")
        for name in FILES:
            size = (folder / name).stat().st_size
            if size != files[name]["bytes"]:
                raise ValueError(f"{name} has {size:,} bytes instead of {files[name]['bytes']:,}")
        for name in FILES:
            with open(folder / name, "rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != files[name]["sha256"]:
                    raise ValueError(f"{name} is not what was written: its SHA-256 differs")
        return RunState(**_read_json(folder / STATE))
    except FileNotFoundError as error:
        raise ValueError(f"{Path(error.filename).name} is missing") from None
    except OSError as error:
        raise ValueError(f"{Path(error.filename or folder).name} cannot be read: {error.strerror}") from None
    except (KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"{MANIFEST} or {STATE} is not of this trainer: {error}") from None


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except ValueError:
        raise ValueError(f"{path.name} is not JSON") from None


def check_resumable(folder: Path, saved: RunState, ours: RunState) -> None:
    """Refuse a checkpoint that would not continue this run's curve.

    Raises:
        ValueError: naming the first setting that differs, both values and the cure.
    """
    cure = "set it back, choose another --output_dir, or start anew with --resume never"
    # A key that is newer than the checkpoint has its default, which is how the checkpoint was trained.
    defaults = Experiment().to_dict()
    for key, (old, new) in differing_keys(merge(defaults, saved.experiment), merge(defaults, ours.experiment)).items():
        new, old = (value if isinstance(value, str) else json.dumps(value) for value in (new, old))  # as --set reads them
        raise ValueError(f"{key} = {new} but the checkpoint {folder} has {old}; {cure}")
    fixed_precision = ours.precision if ours.precision != AUTO else ""
    checks = [
        ("precision", saved.precision, fixed_precision, 'use the --ds_config it was trained with, or one with "auto"'),
        ("pool", saved.pool, ours.pool, "the frozen experts would differ; use the seed, sizes and torch version it had"),
        ("tokenizer", saved.tokenizer_hash, ours.tokenizer_hash, "use the data it was trained on"),
        ("data", saved.data_fingerprint, ours.data_fingerprint, "use the data it was trained on"),
    ]
    for name, theirs, mine, advice in checks:
        # Empty = not to be checked: data hashes are known only once the data is prepared, and "auto" takes any precision.
        if mine and theirs != mine:
            raise ValueError(f"{name} = {mine} but the checkpoint {folder} has {theirs}; {advice}, or --resume never")


def checkpoint_folder(output_dir: Path, step: int) -> Path:
    """Where the checkpoint of a step is, or would be."""
    return output_dir / "checkpoints" / f"step_{step:08d}"


def save_checkpoint(
    output_dir: Path, snapshot: "Snapshot", keep: int, faults: Faults, on_file: Callable[[], None] = lambda: None
) -> Path:
    """Write a checkpoint and remove those no longer wanted; rank 0 only. `on_file` is called after each file.

    Whatever ends it, the checkpoints before it stay whole until it is in place.

    Raises:
        StorageError: it could not be written; nothing of it is left.
    """
    step, checkpoints = snapshot.state.step, output_dir / "checkpoints"
    final = checkpoint_folder(output_dir, step)
    temporary = checkpoints / f".tmp-{final.name}"
    is_in_place = False
    try:
        with faults.stage("begin", step):
            make_folder(checkpoints)
            remove_temporary(checkpoints)
            for replacement in checkpoints.glob(f"step_*{REPLACEMENT}"):
                _finish_replacing(replacement)
            if shutil.disk_usage(checkpoints).free < snapshot.num_bytes:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            temporary.mkdir()
        _write_files(temporary, snapshot, faults, on_file)
        with faults.stage("rename", step):
            _put_in_place(temporary, final)
        is_in_place = True
        with faults.stage("pointer", step):
            # A link by that name is replaced: followed, it would write into the checkpoint that it leads to.
            replace_file(checkpoints / POINTER, [final.name.encode()])
        with faults.stage("clean", step):
            remove_superseded(final, snapshot.state, keep)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        former = _describe_newest(checkpoints)
        failed, state = "cannot be written", f"{megabytes(snapshot.num_bytes)} needed, {describe_free(output_dir)}; {former}"
        if is_in_place:
            failed, state = "is whole, but what goes with it cannot be done", describe_free(output_dir)
        raise StorageError(
            f"checkpoint {final} {failed} ({error.strerror}): {state}; make room and give the same command again"
        ) from error
    return final


def _describe_newest(checkpoints: Path) -> str:
    try:
        folders = checkpoint_folders(checkpoints)
    except OSError as error:
        return f"the folder cannot be read ({error.strerror})"
    return f"{folders[0].name} is the newest and untouched" if folders else "there is none before it"


def _write_files(folder: Path, snapshot: "Snapshot", faults: Faults, on_file: Callable[[], None]) -> None:
    """Every file, and the manifest of them last."""
    step, files = snapshot.state.step, {}

    def write(stage: str, name: str, parts: list[bytes | memoryview]) -> None:
        with faults.stage(stage, step):
            write_file(folder / name, parts, half_way=lambda: faults.at(f"inside {stage}", step))
        # Of what was meant, not of what a disk made of it.
        checksum = hashlib.sha256()
        for part in parts:
            checksum.update(part)
        files[name] = {"bytes": sum(memoryview(part).nbytes for part in parts), "sha256": checksum.hexdigest()}
        on_file()

    for name in TENSORS:
        write(name, name, safetensors_parts({key: tensor.contiguous() for key, tensor in snapshot.tensors[name].items()}))
    write(STATE, STATE, [snapshot.state_json()])
    write("manifest", MANIFEST, [json.dumps({"format": FORMAT, "files": files}, indent=1).encode()])
    sync(folder)


def _put_in_place(temporary: Path, final: Path) -> None:
    """Give a written checkpoint its name. Where one of that step is there already, at no time is neither of them whole."""
    replacement = final.with_name(final.name + REPLACEMENT)
    os.replace(temporary, replacement if os.path.lexists(final) else final)
    sync(final.parent)
    if replacement.exists():
        _finish_replacing(replacement)


def _finish_replacing(replacement: Path) -> None:
    final = replacement.with_suffix("")
    remove(final)
    os.replace(replacement, final)
    sync(final.parent)


def checkpoint_folders(checkpoints: Path) -> list[Path]:
    """Whole or not, newest first; a replacement comes before what it replaces.

    Raises:
        OSError: the folder is there and cannot be read.
    """
    try:
        names = os.listdir(checkpoints)
    except (FileNotFoundError, NotADirectoryError):
        return []
    return [checkpoints / name for name in sorted(names, reverse=True) if name.startswith("step_")]


def remove_temporary(checkpoints: Path) -> None:
    """What a save left that was cut short."""
    for stale in checkpoints.glob(".tmp-*"):
        remove(stale)


def remove_superseded(newest: Path, state: RunState, keep: int) -> None:
    """Of `newest`, which is whole and has `state`, and those before it: keep `keep`, the best evaluation's, and the one to
    go back to."""
    folders = [folder for folder in checkpoint_folders(newest.parent) if folder.name <= newest.name]
    wanted = [state.rollback_to] + ([] if state.best is None else [state.best["step"]])
    kept = {checkpoint_folder(newest.parent.parent, step).name for step in wanted if step is not None}
    for folder in folders[keep:]:
        if folder.name.removesuffix(REPLACEMENT) not in kept:
            remove(folder)
