"""Paths that tools are given, and the files that they write where a flag says: links are followed, pipes and devices
written to as they are."""

import argparse
import errno
import os
import re
import stat
import sys
from pathlib import Path

from trainer.paths import local_path, make_folder, target_of
from trainer.storage import replace_file


def read_paths(arguments: argparse.Namespace, *names: str) -> None:
    """Put local paths in the place of what these flags were given.

    Args:
        arguments: of a parser; changed.
        names: of flags without dashes, or of positional arguments. What is None stays.

    Raises:
        ValueError: naming the flag.
    """
    for name in names:
        value = getattr(arguments, name)
        if isinstance(value, list):
            setattr(arguments, name, [Path(local_path(text, name)) for text in value])
        elif value is not None:
            setattr(arguments, name, Path(local_path(value, f"--{name}")))


def check_writable(path: Path, flag: str) -> None:
    """Refuse a file that cannot be written, before the work that is to fill it; leaves nothing behind.

    Raises:
        ValueError: naming the flag and the file.
    """
    try:
        if _descriptor(path) is not None:
            return
        target, mode = target_of(path), _mode(path)
        if mode is not None and not stat.S_ISREG(mode):
            _check_takes_text(target, mode)
            return
        target.open("a", encoding="utf-8").close()
        if mode is None:
            target.unlink(missing_ok=True)
    except OSError as error:
        raise ValueError(f"{flag} {path}: cannot be written ({error.strerror}); choose another") from None


def write_output(path: Path, content: str | bytes, flag: str) -> None:
    """Write a file: readers of a regular one see the old content or the new; what it leads to if it is a link.

    Raises:
        ValueError: it cannot be written; names the flag and the file.
    """
    data = content.encode() if isinstance(content, str) else content
    try:
        descriptor, mode = _descriptor(path), _mode(path)
        if descriptor is not None:
            sys.stdout.flush()
            with os.fdopen(os.dup(descriptor), "wb") as file:
                file.write(data)
        elif mode is not None and not stat.S_ISREG(mode):
            _check_takes_text(path, mode)
            path.write_bytes(data)
        else:
            _replace(target_of(path), data, mode)
    except OSError as error:
        raise ValueError(f"{flag} {path}: cannot be written ({error.strerror}); choose another") from None


def make_output_folder(path: Path, flag: str) -> None:
    """Make the folder that a flag names, also where it is a link to nothing.

    Raises:
        ValueError: it cannot be made; names the flag and the folder.
    """
    try:
        make_folder(path)
    except OSError as error:
        raise ValueError(f"{flag} {path}: cannot be written ({error.strerror}); choose another") from None


def is_stream(path: Path) -> bool:
    """Whether what is written there goes to a reader, a pipe or a device, and nothing can lie beside it."""
    try:
        mode = _mode(path)
    except OSError:
        return False  # whoever writes there says so
    return _descriptor(path) is not None or (mode is not None and not stat.S_ISREG(mode) and not stat.S_ISDIR(mode))


def is_stdout(path: Path) -> bool:
    """Whether it is where this process prints."""
    return _descriptor(path) == 1


def _descriptor(path: Path) -> int | None:
    """The number of this process's open file that `/dev/stdout`, `/dev/fd/N` or a link to them means."""
    for _ in range(40):  # the system follows no more links
        name = path.name
        parent = os.path.realpath(path.parent)
        if re.fullmatch(r"\d+", name) and parent == f"/proc/{os.getpid()}/fd":
            return int(name)
        if not path.is_symlink():
            return None
        path = Path(parent, os.readlink(path))
    return None


def _mode(path: Path) -> int | None:
    """What it leads to; None = nothing yet."""
    try:
        return path.stat().st_mode
    except FileNotFoundError:
        return None


def _check_takes_text(path: Path, mode: int) -> None:
    if stat.S_ISDIR(mode):
        raise OSError(errno.EISDIR, os.strerror(errno.EISDIR))
    if stat.S_ISSOCK(mode) or stat.S_ISBLK(mode):
        raise OSError(errno.EINVAL, "a socket or a disk takes no file")
    if not os.access(path, os.W_OK):
        raise OSError(errno.EACCES, os.strerror(errno.EACCES))


def _replace(target: Path, data: bytes, mode: int | None) -> None:
    """A regular file at once, or in place where its folder takes no new name, as with a file that is mounted by itself."""
    try:
        replace_file(target, [data])
        if mode is not None:
            target.chmod(stat.S_IMODE(mode))
    except OSError as error:
        target.with_name(f".tmp-{target.name}").unlink(missing_ok=True)
        if mode is None or error.errno not in (errno.EACCES, errno.EBUSY, errno.EPERM, errno.EROFS, errno.EXDEV):
            raise
        target.write_bytes(data)
