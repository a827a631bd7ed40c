"""A run's folder: what identifies the run, and moving an old run out of the way."""

import os
import platform
import stat
import subprocess
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from trainer.checkpoint import checkpoint_folders
from trainer.comparison import differing_keys
from trainer.config import Experiment, experiment_from_dict
from trainer.launch import Launch
from trainer.layout import Layout
from trainer.paths import REPOSITORY
from trainer.precision import Precision
from trainer.storage import write_text_atomically
from trainer.text import kind_of

if TYPE_CHECKING:
    from trainer.data import Dataset

EXPERTS = "experts.json"
"""In a run's folder: what its experts serve, by `trainer/served.py`, at the newest evaluation."""
MOST_PAIRS = 500
"""How many pairs of experts a layer names there."""


def check_writable(output_dir: Path) -> None:
    """Refuse a run's folder that could not be written, before the data is prepared; makes nothing.

    Raises:
        ValueError: naming what is in the way.
    """
    wanted = [(output_dir / name, stat.S_ISREG) for name in ("config.yaml", "metrics.jsonl", EXPERTS)]
    wanted += [(output_dir / name, stat.S_ISDIR) for name in ("checkpoints", "tensorboard")]
    for path, is_right in [(_nearest_existing(output_dir), stat.S_ISDIR), *wanted]:
        try:
            mode = path.stat().st_mode
        except FileNotFoundError:
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


def _nearest_existing(path: Path) -> Path:
    """The folder in which the first missing part of `path` would be made; `path` itself where it exists or is wrong."""
    try:
        path.lstat()
    except FileNotFoundError:
        return _nearest_existing(path.parent)
    except OSError:
        return path
    return path


def set_aside(output_dir: Path) -> Path | None:
    """Rename an existing run's folder to the next free `<name>.N`; nothing is ever deleted.

    Raises:
        ValueError: we run inside of it.
    """
    output_dir = output_dir.resolve()
    if not (output_dir / "config.yaml").exists() and not checkpoint_folders(output_dir / "checkpoints"):
        return None
    if Path.cwd().is_relative_to(output_dir):
        raise ValueError(
            f"--output_dir {output_dir}: holds a run that must be moved aside, and is where we run; run elsewhere"
        )
    number = 1
    while output_dir.with_name(f"{output_dir.name}.{number}").exists():
        number += 1
    aside = output_dir.with_name(f"{output_dir.name}.{number}")
    output_dir.rename(aside)
    return aside


def earlier_start(output_dir: Path, experiment: Experiment) -> dict[str, Any] | None:
    """With which DeepSpeed config this same run was begun in the folder before; None where it was not.

    It is asked where there is no checkpoint: a run that was killed before its first one starts over in place, with equal
    steps.
    """
    try:
        values = yaml.safe_load((output_dir / "config.yaml").read_text(encoding="utf-8"))
        how = values.pop("run")
        earlier, how = experiment_from_dict(values).to_dict(), dict(how)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, yaml.YAMLError):
        return None  # none, or not one of ours: it is moved aside
    config = how.get("ds_config")
    if differing_keys(earlier, experiment.to_dict()) or not isinstance(config, dict):
        return None
    return config if isinstance(config.get("bf16", {}), dict) else None


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
    output_dir.mkdir(parents=True, exist_ok=True)
    text = yaml.safe_dump({**experiment.to_dict(), "run": how}, sort_keys=False)
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
