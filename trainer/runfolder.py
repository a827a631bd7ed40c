"""A run's folder: what identifies the run, and moving an old run out of the way."""

import json
import os
import platform
import stat
import subprocess
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.checkpoint import checkpoint_folders
from trainer.comparison import differing_keys
from trainer.config import Experiment, experiment_from_dict
from trainer.launch import Launch
from trainer.layout import Layout
from trainer.paths import REPOSITORY, make_folder, target_of
from trainer.plain_yaml import dump_yaml
from trainer.precision import Precision
from trainer.storage import write_text_atomically
from trainer.text import kind_of, read_yaml

if TYPE_CHECKING:
    from trainer.data import Dataset

EXPERTS = "experts.json"
"""In a run's folder: what its experts serve, by `trainer/served.py`, at the newest evaluation."""
MAX_CONFIG_BYTES = 2**24
"""Of a run's config.yaml: earlier versions named every unused data file in it, which may be thousands."""
MOST_PAIRS = 500
"""How many pairs of experts a layer names there."""


def check_writable(output_dir: Path) -> None:
    """Refuse a run's folder that could not be written, before the data is prepared; makes nothing. Links are followed.

    Raises:
        ValueError: naming what is in the way.
    """
    wanted = [(output_dir / name, stat.S_ISREG) for name in ("config.yaml", "metrics.jsonl", EXPERTS)]
    wanted += [(output_dir / name, stat.S_ISDIR) for name in ("checkpoints", "tensorboard")]
    for path, is_right in [(_nearest_existing(output_dir), stat.S_ISDIR), *wanted]:
        try:
            mode = path.stat().st_mode
        except FileNotFoundError:
            _check_can_be_made(output_dir, path, is_right)
            continue
        except OSError as error:
            raise ValueError(
                f"--output_dir {output_dir}: cannot be used ({error.strerror}: {path}); choose another"
            ) from None
        if not is_right(mode):
            what = "a file" if stat.S_ISREG(mode) else f"a {kind_of(mode)}"
            raise ValueError(f"--output_dir {output_dir}: cannot be used ({path} is {what}); choose another")
        if not os.access(path, os.W_OK):
            raise ValueError(f"--output_dir {output_dir}: cannot be written (no permission for {path}); choose another")


def _check_can_be_made(output_dir: Path, path: Path, is_right: Callable[[int], bool]) -> None:
    """Refuse a link to something that is not there and cannot be made."""
    if not path.is_symlink():
        return
    target = target_of(path)
    place = target.parent if is_right is stat.S_ISREG else _nearest_existing(target)
    if not (place.is_dir() and os.access(place, os.W_OK)):
        raise ValueError(
            f"--output_dir {output_dir}: cannot be used ({path} is a link to {os.readlink(path)}, which is not there and "
            f"cannot be made); mount or restore it, or choose another"
        )


def _nearest_existing(path: Path) -> Path:
    """The folder in which the first missing part of `path` would be made; `path` itself where it exists or is wrong."""
    try:
        path = target_of(path)
    except OSError:
        return path
    while not os.path.lexists(path):
        path = path.parent
    return path


def set_aside(output_dir: Path) -> Path | None:
    """Rename an existing run's folder to the next free `<name>.N` and make an empty one in its place; nothing is ever
    deleted. Where `output_dir` is a link, the folder that it leads to is renamed, and the link leads to the new one.

    Raises:
        ValueError: we run inside of it.
        OSError: it cannot be renamed, such as the root of a file system.
    """
    output_dir = target_of(output_dir)
    is_run = any(os.path.lexists(output_dir / name) for name in ("config.yaml", "metrics.jsonl"))
    if not is_run and not checkpoint_folders(output_dir / "checkpoints"):
        return None
    if Path.cwd().is_relative_to(output_dir):
        raise ValueError(
            f"--output_dir {output_dir}: holds a run that must be moved aside, and is where we run; run elsewhere"
        )
    number = 1
    while os.path.lexists(aside := output_dir.with_name(f"{output_dir.name}.{number}")):
        number += 1
    output_dir.rename(aside)
    output_dir.mkdir()
    return aside


def earlier_start(output_dir: Path, experiment: Experiment) -> dict[str, Any] | None:
    """With which DeepSpeed config this same run was begun in the folder before; None where it was not.

    It is asked where there is no checkpoint: a run that was killed before its first one starts over in place, with equal
    steps.
    """
    earlier, how = _recorded(output_dir)
    config = how.get("ds_config")
    if earlier is None or differing_keys(earlier, experiment.to_dict()) or not isinstance(config, dict):
        return None
    return config if isinstance(config.get("bf16", {}), dict) else None


def check_nothing_lost(output_dir: Path) -> None:
    """Refuse to start at step 0 in a folder whose records say that it has checkpoints: their storage may be missing.

    It is asked where no checkpoint was found, whatever the settings are: with checkpoints, other ones would be refused too.

    Raises:
        ValueError: naming the folder and the cures.
        OSError: the records cannot be read.
    """
    metrics, folder = output_dir / "metrics.jsonl", output_dir / "checkpoints"
    saved, (earlier, _) = _last_save(metrics), _recorded(output_dir)
    cure, others = (
        "mount or restore it",
        "start over with --resume never, which moves the run aside, or give another --output_dir",
    )
    if earlier is not None and metrics.is_symlink() and not metrics.exists():
        link = f"its records are behind a link to {os.readlink(metrics)}, which is not there"
        raise ValueError(f"--output_dir {output_dir}: {link}, and it has no checkpoint; {cure}, {others}")
    if saved is None:
        return
    if not os.path.lexists(folder):
        place = "is missing"
    elif not folder.exists():
        place = f"is a link to {os.readlink(folder)}, which is not there"
    else:
        place = "holds none"
    said = f"records a checkpoint at step {saved['step']}"
    if saved["event"] == "resume":
        said, cure = f"records that the run began at step {saved['step']}", f"give --resume {saved.get('path')} again"
    raise ValueError(f"--output_dir {output_dir}: its metrics.jsonl {said}, but {folder} {place}; {cure}, {others}")


def _last_save(metrics: Path) -> dict[str, Any] | None:
    """The record of the last checkpoint that a run wrote or resumed from, None where there is none."""
    found = None
    if not metrics.is_file():
        return None
    with open(metrics, encoding="utf-8", errors="replace") as lines:
        for line in lines:
            if '"checkpoint"' not in line and '"resume"' not in line:
                continue
            try:
                record = json.loads(line)
                is_save = record["event"] in ("checkpoint", "resume") and isinstance(record["step"], int)
            except (ValueError, TypeError, KeyError, RecursionError):
                continue  # cut short by a crash, or damaged
            if is_save and (record["event"] == "checkpoint" or found is None):
                found = record
    return found


def _recorded(output_dir: Path) -> tuple[dict[str, Any] | None, dict[str, Any]]:
    """The experiment in a run's config.yaml and how it was run; None and nothing where there is none of ours."""
    path = output_dir / "config.yaml"
    try:
        if not path.is_file():  # reading a pipe would wait for its writer
            return None, {}
        values = read_yaml(path, "config.yaml", MAX_CONFIG_BYTES)
        how = values.pop("run")
        return experiment_from_dict(values).to_dict(), dict(how)
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None, {}


def write_config(
    output_dir: Path,
    experiment: Experiment,
    launch: Launch,
    layout: Layout,
    ds_config: dict[str, Any],
    precision: Precision,
    dataset: "Dataset",
) -> None:
    """`config.yaml`: the resolved experiment (readable by `--experiment`) and, under `run`, how and with what it was run."""
    import torch  # programs that only look at folders need not wait for it

    how = {
        "git_commit": git_commit(),
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu {platform.machine()}",
        "world_size": launch.world_size,
        "ep_size": layout.ep_size,
        "micro_batch": layout.micro_batch,
        "accumulation": layout.accumulation,
        "precision": precision.name,
        "precision_reason": precision.reason,
        "ds_config": ds_config,
        "torch": str(torch.__version__),
        "deepspeed": metadata.version("deepspeed"),
        "data": dataset.summary,
        "data_sha256": dataset.fingerprint,
        "validation_sha256": dataset.validation_hash,
        "tokenizer_sha256": dataset.tokenizer_hash,
    }
    make_folder(output_dir)
    text = dump_yaml({**experiment.to_dict(), "run": how})
    write_text_atomically(output_dir / "config.yaml", text)


def git_commit() -> str | None:
    """The commit of the code, with `-dirty` when it is changed; None outside a repository of its own."""
    try:
        # Installed into an environment that lies in some other repository, that one's commit would say nothing.
        if Path(_git("rev-parse", "--show-toplevel")).resolve() != REPOSITORY:
            return None
        return _git("describe", "--always", "--dirty", "--abbrev=12", "--exclude=*")
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(*words: str) -> str:
    return subprocess.run(["git", "-C", str(REPOSITORY), *words], capture_output=True, text=True, check=True).stdout.strip()
