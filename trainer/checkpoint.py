"""Checkpoints: one consolidated folder, independent of ranks and EP size; safetensors and JSON, no pickle.

    checkpoints/step_00000100/core.safetensors        fp32 trained parameters
                              optimizer.safetensors   AdamW moments
                              keys.safetensors        key stores
                              state.json              step, experiment, data and tokenizer hashes, pool manifest, ...
    checkpoints/latest                                name of the newest whole checkpoint, written last

A folder is written under a temporary name, synced and renamed, so a name `step_*` means a whole checkpoint. The frozen
pool is never saved: its manifest is, and is compared on resume. No generator needs saving: every draw is a function of
the seed, its purpose and the step.
"""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from modeling.some import KeyStore
from trainer.config import Experiment
from trainer.engine import MOMENTS, CoreState
from trainer.published import merge

FORMAT = "some-checkpoint-2"
POINTER = "latest"
CORE, OPTIMIZER, KEYS = FILES = ("core.safetensors", "optimizer.safetensors", "keys.safetensors")

# What may differ between a checkpoint and the run that resumes it, since no number of the curve depends on it.
# The data's path may change; its content is compared by hash.
FREE_KEYS = {
    "name", "data.path", "data.cache_dir", "data.allow_fewer", "train.max_micro_batch", "train.eval_every",
    "train.deterministic", "train.max_skipped", "train.on_nan",
}  # fmt: skip
FREE_SECTIONS = ("parallel.", "checkpoint.", "log.", "sample.")


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
    """`bf16` or `fp32`."""
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


def find_checkpoint(resume: str, output_dir: Path) -> Path | None:
    """The checkpoint folder that `--resume` asks for; None = start at step 0.

    Args:
        resume: `auto` (the newest of `output_dir`, if any), `never`, or a run's folder or checkpoint folder.
        output_dir: the run's folder.

    Raises:
        ValueError: a named folder without a checkpoint.
    """
    if resume == "never":
        return None
    if resume == "auto":
        return newest_checkpoint(output_dir / "checkpoints")
    path = Path(resume)
    if (path / "state.json").exists():
        return path
    found = newest_checkpoint(path / "checkpoints") or newest_checkpoint(path)
    if found is None:
        raise ValueError(
            f"--resume {resume}: holds no checkpoint; give a run's folder or one of its checkpoints/step_* folders"
        )
    return found


def newest_checkpoint(folder: Path) -> Path | None:
    """What the pointer names, or the newest whole folder if the pointer was lost or names none."""
    pointer = folder / POINTER
    if pointer.exists():
        named = folder / pointer.read_text(encoding="utf-8").strip()
        if (named / "state.json").exists():
            return named
    whole = sorted(path for path in folder.glob("step_*") if (path / "state.json").exists())
    return whole[-1] if whole else None


def read_state(folder: Path) -> RunState:
    """The state of a checkpoint.

    Raises:
        ValueError: not a checkpoint of this project.
    """
    try:
        values = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        if values.get("format") != FORMAT:
            raise ValueError(f"format {values.get('format')!r} instead of {FORMAT!r}")
        state = RunState(**values)
        if not isinstance(state.experiment, dict):
            raise ValueError("no experiment in it")
        for name in FILES:
            with safe_open(folder / name, framework="pt") as file:
                # A model without SoME layers has no keys.
                if name != KEYS and not file.keys():
                    raise ValueError(f"{name} is empty")
        return state
    except (OSError, ValueError, AttributeError, TypeError, SafetensorError) as error:
        raise ValueError(
            f"--resume {folder}: not a checkpoint of this trainer ({error}); use --resume never to start anew"
        ) from None


def check_resumable(folder: Path, saved: RunState, ours: RunState) -> None:
    """Refuse a checkpoint that would not continue this run's curve.

    Raises:
        ValueError: naming the first setting that differs, both values and the cure.
    """
    cure = "set it back, choose another --output_dir, or start anew with --resume never"
    # A key that is newer than the checkpoint has its default, which is how the checkpoint was trained.
    defaults = Experiment().to_dict()
    for key, (old, new) in differing_keys(merge(defaults, saved.experiment), merge(defaults, ours.experiment)).items():
        raise ValueError(f"{key} = {new} but the checkpoint {folder} has {old}; {cure}")
    checks = [
        ("precision", saved.precision, ours.precision, "use the --ds_config it was trained with"),
        ("pool", saved.pool, ours.pool, "the frozen experts would differ; use the seed, sizes and torch version it had"),
        ("tokenizer", saved.tokenizer_hash, ours.tokenizer_hash, "use the data it was trained on"),
        ("data", saved.data_fingerprint, ours.data_fingerprint, "use the data it was trained on"),
    ]
    for name, theirs, mine, advice in checks:
        # Data hashes are known only once the data is prepared; empty = not checked yet.
        if mine and theirs != mine:
            raise ValueError(f"{name} = {mine} but the checkpoint {folder} has {theirs}; {advice}, or --resume never")


def differing_keys(theirs: dict[str, Any], ours: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Key path to both values wherever two resolved experiments differ in what may change a curve; sorted by key."""
    theirs, ours = _flatten(theirs), _flatten(ours)
    return {
        key: (theirs.get(key), ours.get(key))
        for key in sorted(theirs.keys() | ours.keys())
        if theirs.get(key) != ours.get(key) and key not in FREE_KEYS and not key.startswith(FREE_SECTIONS)
    }


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in values.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def checkpoint_folder(output_dir: Path, step: int) -> Path:
    """Where the checkpoint of a step is, or would be."""
    return output_dir / "checkpoints" / f"step_{step:08d}"


def save_checkpoint(
    output_dir: Path,
    state: RunState,
    core: CoreState,
    stores: list[KeyStore],
    keep: int,
    on_file: Callable[[], None] = lambda: None,
) -> Path:
    """Write a checkpoint and remove those no longer wanted; rank 0 only. `on_file` is called after each file."""
    checkpoints = output_dir / "checkpoints"
    checkpoints.mkdir(parents=True, exist_ok=True)
    for stale in checkpoints.glob(".tmp-*"):
        shutil.rmtree(stale)
    final = checkpoint_folder(output_dir, state.step)
    temporary = checkpoints / f".tmp-{final.name}"
    temporary.mkdir()

    state.key_store_steps = [store.steps for store in stores]
    state.optimizer_steps = core.steps
    _write_tensors(temporary / CORE, core.parameters)
    on_file()
    moments = {f"{moment}/{name}": t for moment, values in core.moments.items() for name, t in values.items()}
    _write_tensors(temporary / OPTIMIZER, moments)
    on_file()
    keys = {f"{layer}/{name}": t for layer, store in enumerate(stores) for name, t in store.named_buffers()}
    _write_tensors(temporary / KEYS, keys)
    on_file()
    write_text_atomically(temporary / "state.json", json.dumps(asdict(state), indent=1))
    _sync(temporary)

    if final.exists():
        shutil.rmtree(final)
    os.replace(temporary, final)
    _sync(checkpoints)
    write_text_atomically(checkpoints / POINTER, final.name)
    _remove_old(checkpoints, state, keep)
    return final


def load_checkpoint(folder: Path, saved: RunState, stores: list[KeyStore]) -> CoreState:
    """Put the key stores back in place and return the core."""
    keys = load_file(folder / KEYS)
    for layer, store in enumerate(stores):
        for name, buffer in store.named_buffers():
            buffer.copy_(keys[f"{layer}/{name}"])
        store.steps = saved.key_store_steps[layer]
    moments = load_file(folder / OPTIMIZER)
    parameters = load_file(folder / CORE)
    return CoreState(
        parameters=parameters,
        moments={moment: {name: moments[f"{moment}/{name}"] for name in parameters} for moment in MOMENTS},
        steps=saved.optimizer_steps,
    )


def write_text_atomically(path: Path, text: str) -> None:
    """Readers see the old text or the new one, also after a power cut."""
    temporary = path.with_name(f".tmp-{path.name}")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    _sync(path.parent)


def _write_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path)
    _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove_old(checkpoints: Path, state: RunState, keep: int) -> None:
    """Keep the newest `keep`, the best evaluation's, and the one to go back to."""
    folders = sorted(checkpoints.glob("step_*"))
    kept = set(folders[-keep:])
    if state.best is not None:
        kept.add(checkpoint_folder(checkpoints.parent, state.best["step"]))
    if state.rollback_to is not None:
        kept.add(checkpoint_folder(checkpoints.parent, state.rollback_to))
    for folder in folders:
        if folder not in kept:
            shutil.rmtree(folder)
