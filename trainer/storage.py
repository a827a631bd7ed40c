"""Writing files so that a power cut leaves the old or the new, and saying so when a disk takes no more."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path


class StorageError(RuntimeError):
    """A run cannot write what it must; the message is one line for the user, with the path and the cure."""


def write_file(path: Path, content: bytes, half_way: Callable[[], None] = lambda: None) -> None:
    """Write a new file down to the disk; `half_way` is called when half of it is written.

    Raises:
        OSError: no room, no permission, a broken disk.
    """
    view = memoryview(content)
    with open(path, "wb") as file:
        file.write(view[: len(view) // 2])
        half_way()
        file.write(view[len(view) // 2 :])
        file.flush()
        os.fsync(file.fileno())


def write_text_atomically(path: Path, text: str) -> None:
    """Readers see the old text or the new one, also after a power cut."""
    temporary = path.with_name(f".tmp-{path.name}")
    write_file(temporary, text.encode())
    os.replace(temporary, path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Bring a file, or the names in a folder, down to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """Remove a file or a whole folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def describe_free(folder: Path) -> str:
    """`1.2 MB free`, on the disk of `folder`."""
    try:
        return f"{megabytes(shutil.disk_usage(folder).free)} free"
    except OSError as error:
        return f"free space unknown ({error.strerror})"


def megabytes(size: int) -> str:
    """A number of bytes as users read it."""
    return f"{size / 1e6:,.1f} MB"
