"""Processes that outlive whoever started them.

A file per process holds its pid and the time when it started. A pid counts only while both match, so that no process that
got the number of a dead one is ever signalled.
"""

import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path


class ProcessTable:
    """The processes of one folder, by name."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def start(self, name: str, command: list[str], environment: dict[str, str], log: Path) -> None:
        """Start `command` in a session of its own; what it prints is added to `log`."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
        actions = [
            (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
            (os.POSIX_SPAWN_OPEN, 1, str(log), flags, 0o644),
            (os.POSIX_SPAWN_DUP2, 1, 2),
        ]
        pid = os.posix_spawnp(command[0], command, environment, file_actions=actions, setsid=True)
        (self.folder / name).write_text(f"{pid} {_start_time(pid)}", encoding="utf-8")

    def names(self) -> list[str]:
        """Everything that was started and not stopped, alive or not."""
        return sorted(path.name for path in self.folder.iterdir())

    def pid(self, name: str) -> int | None:
        """The pid of a process that lives; None if it does not."""
        try:
            pid, started = (self.folder / name).read_text(encoding="utf-8").split()
        except (FileNotFoundError, ValueError):
            return None
        with suppress(ChildProcessError):
            os.waitpid(int(pid), os.WNOHANG)
        return int(pid) if _start_time(int(pid)) == started else None

    def stop(self, name: str, number: signal.Signals = signal.SIGTERM, seconds: float = 10) -> None:
        """Signal a process and wait for its end; after `seconds` it is killed."""
        for attempt in (number, signal.SIGKILL):
            if (pid := self.pid(name)) is None:
                break
            with suppress(ProcessLookupError):
                os.kill(pid, attempt)
            with suppress(TimeoutError):
                wait_until(lambda: self.pid(name) is None, seconds, f"the end of {name}")
        else:
            if self.pid(name) is not None:
                raise TimeoutError(f"{name} (pid {self.pid(name)}) does not end")
        (self.folder / name).unlink(missing_ok=True)


def wait_until(condition: Callable[[], object], seconds: float, what: str, every: float = 0.05) -> None:
    """Return once `condition()` holds, which is asked `every` so many seconds.

    Raises:
        TimeoutError: naming `what` was waited for.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what} did not come within {seconds:g} s")
        time.sleep(every)


def first_child(pid: int) -> int | None:
    """A process's first child."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="utf-8").split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return int(children[0]) if children else None


def _start_time(pid: int) -> str | None:
    """Clock ticks from the machine's start to the process's; None for one that is dead, reaped or not."""
    try:
        # The program's name, in parentheses, may hold anything.
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] in "ZX" else fields[19]
