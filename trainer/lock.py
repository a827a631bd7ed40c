"""One live run a folder, whatever it is called: rank 0 holds a lock on a file in it, and where its checkpoints lie behind a
link, on one there too.

The system frees it when the process ends, however it ends. The file stays, with the owner's name in it until the owner
ends well: a name without a process tells of a run that failed.
"""

import fcntl
import os
import re
import socket
import time
from datetime import UTC, datetime
from pathlib import Path

from trainer.console import say
from trainer.paths import make_folder
from trainer.storage import StorageError

NAME = ".lock"
LEASE_SECONDS = 100
"""How long a server of files may take to notice that a node with a lock is gone."""


def is_gone(owner: str) -> bool:
    """Whether the process that `FolderLock.sign` named was one of this host and is no more."""
    match = re.match(r"host (\S+) process (\d+)\b", owner)
    if match is None or match[1] != socket.gethostname():
        return False
    try:
        os.kill(int(match[2]), 0)
    except ProcessLookupError:
        return True
    except (PermissionError, OverflowError):
        pass  # another user's, or no process id at all
    return False


def linked_checkpoints(folder: Path) -> Path | None:
    """Where a run's checkpoints lie, if that is behind a link: another run's folder, if it is that run's; else theirs."""
    link = folder / "checkpoints"
    if not link.is_symlink() or not link.is_dir():
        return None
    place = link.resolve()
    if place.name == link.name and (place.parent / NAME).exists():
        place = place.parent
    return None if place.samefile(folder) else place


class FolderLock:
    """The lock on a run's folder, held until `release` or until nobody refers to it any more.

    Args:
        folder: exists.
        create: make the file where there is none; else FileNotFoundError.

    Raises:
        ValueError: another live run has it; the message names its host, process id and since when.
        StorageError: an earlier start of this same SLURM job still has it.
        OSError: the file cannot be opened.
    """

    def __init__(self, folder: Path, create: bool):
        flags = os.O_RDWR | (os.O_CREAT if create else 0)
        self._file = open(os.open(folder / NAME, flags, 0o644), "r+b", buffering=0)
        self._folder, self._linked = folder, None
        try:
            self._take(folder)
            self._take_linked(create)
        except BaseException:
            self._file.close()
            raise

    @staticmethod
    def existing(folder: Path) -> "FolderLock | None":
        """The lock of a folder that has one, which leaves nothing behind in any other.

        Raises:
            ValueError: another live run has it.
        """
        try:
            return FolderLock(folder, create=False)
        except OSError:
            return None  # no folder, no run in it yet, or one that cannot be written, which is refused when it must be

    def sign(self) -> None:
        """Say who we are, to those who come later.

        Raises:
            ValueError: another live run writes to the same linked checkpoints.
            OSError: these cannot be written.
        """
        self._take_linked(create=True)
        if self._linked is not None:
            self._linked.sign()
        since = datetime.now(UTC).isoformat(timespec="seconds")
        job = f" of SLURM job {os.environ['SLURM_JOB_ID']}" if "SLURM_JOB_ID" in os.environ else ""
        self._write(f"host {socket.gethostname()} process {os.getpid()}{job} since {since}")

    def release(self) -> None:
        """Let others have the folder, and leave it without a name."""
        if self._linked is not None:
            self._linked.release()
        self._write("")
        self._file.close()

    def close(self) -> None:
        """Let others have the folder; the name stays in it, if it was not released before."""
        if self._linked is not None:
            self._linked.close()
        self._file.close()

    def _take_linked(self, create: bool) -> None:
        """Lock linked checkpoints: two runs' folders may lead to the same."""
        if create and (self._folder / "checkpoints").is_symlink():
            make_folder(self._folder / "checkpoints")
        place = linked_checkpoints(self._folder)
        if place is None or self._linked is not None:
            return
        try:
            self._linked = FolderLock(place, create)
        except FileNotFoundError:
            if create:
                raise

    def _write(self, text: str) -> None:
        if text != self._read():
            self._file.truncate(0)
            self._file.seek(0)
            self._file.write(text.encode())

    def _read(self) -> str:
        self._file.seek(0)
        return self._file.read().decode(errors="replace")

    def _take(self, folder: Path) -> None:
        deadline = None
        while not self._try(folder):
            owner = self._read()
            if not owner or is_gone(owner):  # the former owner's name, which stays until the next has signed
                owner = "just starting"
            elsewhere = owner.startswith("host ") and not owner.startswith(f"host {socket.gethostname()} ")
            if deadline is None:
                deadline = time.monotonic() + (LEASE_SECONDS if elsewhere else 0)
                if elsewhere:
                    # After a power cut the lock of the dead node stays for a while where files come over the network.
                    say(f"{folder} belongs to a run ({owner}); waiting up to {LEASE_SECONDS} s for its end")
            if time.monotonic() >= deadline:
                # A rank 0 that was cut off from its job may outlive it for a while: then starting again later helps.
                is_our_job = f" of SLURM job {os.environ.get('SLURM_JOB_ID')} " in owner
                raise (StorageError if is_our_job else ValueError)(
                    f"--output_dir {folder}: belongs to a live run ({owner}); wait for its end, stop it, or give another "
                    f"--output_dir"
                )
            time.sleep(1)

    def _try(self, folder: Path) -> bool:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError as error:
            say(f"{folder}: no lock can be held here ({error.strerror}); see that no second run starts in it")
        return True
