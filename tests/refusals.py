"""Call the trainer's command line often and fast: in children forked from one process that has imported it and done
nothing else. What such a child says is what a program of its own would say, which tests compare with real launches.
"""

import ctypes
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

from tests.distributed import start_process
from tests.launch import FP32, SCRIPT, environment
from trainer import run, training

SECONDS = 240
MET = 99
"""Exit code of a child that was not refused and came to where the ranks meet."""
TINY = {
    "name": "tiny",
    "model": {
        "vocab_size": 300, "d_model": 16, "num_layers": 1, "num_heads": 2, "max_seq_len": 32,
        "some": {"num_experts": 4, "d_ffn": 16, "top_k": 2},
    },
    "data": {"name": "stories", "train_documents": 40, "val_documents": 5},
    "train": {"batch_size": 4, "steps": 4, "warmup_steps": 1, "eval_every": 4},
    "log": {"tensorboard": False},
    "sample": {"tokens": 0},
}  # fmt: skip


@dataclass(frozen=True)
class Ending:
    """How a call of the command line ended."""

    code: int | None
    """Exit code; None = it had to be stopped."""
    out: str
    err: str


@dataclass(frozen=True)
class Bad:
    """One bad input."""

    arguments: list[str]
    """Flags; `tiny.yaml` is the experiment unless they name one."""
    says: list[str]
    """What the one line must hold: key or file, value, cure."""
    variables: dict[str, str] = field(default_factory=dict)
    """Added to the environment."""


def sets(*settings: str) -> list[str]:
    """`--set` before each."""
    return [word for setting in settings for word in ("--set", setting)]


def call(*arguments: str, folder: Path, timeout: float = SECONDS, **variables: str) -> Ending:
    """`trainer/run.py` with `arguments` in `folder`, as an ordinary user, up to where the ranks would meet.

    Args:
        arguments: the command line.
        folder: the working folder; what is said is kept beside it.
        timeout: seconds after which a call is stopped.
        variables: added to the environment.
    """
    out, err = (folder.with_name(f"{folder.name}.{stream}") for stream in ("out", "err"))
    child = start_process(_call, list(arguments), folder, environment(**variables), out, err)
    child.join(timeout)
    code = child.exitcode
    child.kill()
    child.join()
    return Ending(code, *(path.read_text(encoding="utf-8") for path in (out, err)))


def program(*arguments: str, folder: Path, **variables: str) -> Ending:
    """The same as a program of its own, started as users do."""
    command = [sys.executable, SCRIPT, *arguments]
    settings = environment(**variables)
    done = subprocess.run(command, cwd=folder, env=settings, capture_output=True, text=True, timeout=2 * SECONDS)
    return Ending(done.returncode, done.stdout, done.stderr)


def check_refused(bad: Bad, folder: Path) -> Ending:
    """Call with a bad input, and demand one line with exit code 2, and that nothing below `folder` changed."""
    named = [] if "--experiment" in bad.arguments else ["--experiment", "tiny.yaml"]
    precision = [] if "--ds_config" in bad.arguments else ["--ds_config", FP32]
    before = tree(folder)
    variables = {"SOME_CACHE_DIR": str(folder / "cache"), **bad.variables}
    ending = call(*named, *precision, *bad.arguments, folder=folder, **variables)
    assert ending.code == 2, ending
    assert ending.err.startswith("error: ") and ending.err.endswith("\n") and ending.err[:-1].isprintable(), ending.err
    assert len(ending.err) < 1600
    missing = [part for part in bad.says if part not in ending.err]
    assert not missing, f"{missing} not in: {ending.err}"
    assert tree(folder) == before, "a refused run leaves nothing behind"
    return ending


def tree(folder: Path) -> dict[str, tuple]:
    """Everything below `folder`: kind and permissions, and of files size and time of the last change."""
    found = {}
    for path in folder.rglob("*"):
        status = path.lstat()
        found[str(path)] = status.st_mode, *((status.st_size, status.st_mtime_ns) if path.is_file() else ())
    return found


def make_tree(folder: Path, files: dict[str, str | bytes]) -> Path:
    """Files by their path below `folder`, and the folders that they need."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def _call(arguments: list[str], folder: Path, variables: dict[str, str], out: Path, err: Path) -> None:
    for path, stream in ((out, 1), (err, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    give_up_root()
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(folder)
    sys.argv = ["run.py", *arguments]
    training.init_process_group = _meet
    run.main()


def _meet(*_: object) -> None:
    sys.exit(MET)


def give_up_root() -> None:
    """Let file permissions count for root too: this process keeps its user and loses every capability."""
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # version 3 of the interface, this process
    none = (ctypes.c_uint32 * 6)()
    if os.geteuid() == 0 and ctypes.CDLL(None, use_errno=True).capset(header, none):
        raise OSError(ctypes.get_errno(), "capset failed")
