"""What the user sees: a progress bar on a terminal, plain lines elsewhere. Printing never ends a program.

A reader such as `head` may have enough, a terminal may go away, a disk may be full, and an encoding may lack letters: all
that is printed goes through streams that a program guards once, when it begins, whoever prints (also libraries, tracebacks,
and Python itself when it ends).
"""

import errno
import io
import os
import select
import sys
import time
from contextlib import suppress

from tqdm import tqdm

from trainer.text import visible

FOR_NOW = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Errors that may pass: what is printed later may be written again."""


def guard_streams() -> None:
    """From now on nothing that is printed raises: what cannot be written is left out, and what the encoding lacks is written
    as an escape. Call it first."""
    for descriptor in (0, 1, 2):
        # Else the next file that is opened takes its place, and gets what libraries print.
        with suppress(OSError):
            if not _is_open(descriptor):
                _discard(descriptor)
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        if stream is None:  # it was closed when Python began
            setattr(sys, name, _guarded(descriptor, "utf-8", f"<{name}>", line_buffering=True))
        elif type(stream) is io.TextIOWrapper and _descriptor_of(stream) == descriptor and _outlet(stream) is None:
            with suppress(OSError, ValueError):
                stream.flush()
            buffered = {"line_buffering": stream.line_buffering, "write_through": stream.write_through}
            setattr(sys, name, _guarded(descriptor, stream.encoding, f"<{name}>", **buffered))


def all_printed() -> bool:
    """Whether what was printed has arrived, for programs whose results are what they print. A reader that had enough, or a
    terminal that went away, wanted no more."""
    outlet = _outlet(sys.stdout)
    if outlet is None:
        return True
    sys.stdout.flush()
    return outlet.lost not in FOR_NOW


def say_at_once(text: str) -> None:
    """A line on stderr, from whatever thread: it waits for no lock, and fails silently."""
    with suppress(OSError, ValueError):
        os.write(sys.stderr.fileno(), f"{text}\n".encode(errors="backslashreplace"))


class _Outlet(io.FileIO):
    """A descriptor to write to, whatever becomes of it.

    Attributes:
        lost: the error number for which something was left out; None = all was written.
    """

    lost: int | None = None

    def write(self, data: bytes | memoryview) -> int:
        """All of it is done with."""
        rest = memoryview(data).cast("B")
        while len(rest):
            try:
                rest = rest[os.write(self.fileno(), rest) :]
            except BlockingIOError:  # a pipe that somebody else made so, which is full
                select.select([], [self.fileno()], [])
            except OSError as error:
                self._lose(error)
                break
        return len(data)

    def _lose(self, error: OSError) -> None:
        is_new, self.lost = self.lost is None, self.lost if self.lost in FOR_NOW else error.errno
        if error.errno in FOR_NOW:
            if is_new and self.fileno() == 1:
                with suppress(OSError):
                    os.write(2, f"warning: output is lost: {error.strerror}\n".encode())
            return
        # Nobody will ever read it: children and libraries need not learn that, too.
        with suppress(OSError):
            _discard(self.fileno())


def _guarded(descriptor: int, encoding: str, name: str, **buffered: bool) -> io.TextIOWrapper:
    outlet = _Outlet(descriptor, "w", closefd=False)
    outlet.name = name
    stream = io.TextIOWrapper(io.BufferedWriter(outlet), encoding=encoding, errors="backslashreplace", **buffered)
    stream.mode = "w"
    return stream


def _outlet(stream: io.TextIOBase) -> _Outlet | None:
    outlet = getattr(getattr(stream, "buffer", None), "raw", None)
    return outlet if isinstance(outlet, _Outlet) else None


def _descriptor_of(stream: io.TextIOWrapper) -> int | None:
    try:
        return stream.fileno()
    except (OSError, ValueError):
        return None


def _is_open(descriptor: int) -> bool:
    try:
        os.fstat(descriptor)
    except OSError:
        return False
    return True


def _discard(descriptor: int) -> None:
    """Let a descriptor lead nowhere."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    if nowhere != descriptor:
        os.dup2(nowhere, descriptor)
        os.close(nowhere)
    os.set_inheritable(descriptor, True)


def say(text: str) -> None:
    """Print lines that may quote data; nothing in them reaches a terminal as a command."""
    print(visible(text, keep="\n"), flush=True)


class Console:
    """Silent unless `enabled`."""

    def __init__(self, enabled: bool):
        self._enabled = enabled
        self._bar = None

    def begin(self, start: int, stop: int) -> None:
        """Steps `start` to `stop` are about to run."""
        self._start, self._stop, self._began = start, stop, time.monotonic()
        if self._enabled and sys.stderr.isatty():
            self._bar = tqdm(total=stop, initial=start, unit="step", dynamic_ncols=True, smoothing=0.1)

    def say(self, text: str) -> None:
        """A line of its own, above the bar if there is one."""
        if not self._enabled:
            return
        if self._bar is not None:
            self._bar.write(visible(text, keep="\n"))
        else:
            say(text)

    def step(self, step: int, loss: float, tokens_per_second: float) -> None:
        """Step `step` (from 1) is done."""
        if self._bar is not None:
            self._bar.set_postfix_str(f"loss {loss:.4f}, {tokens_per_second:,.0f} tokens/s", refresh=False)
            self._bar.update(1)
        elif self._enabled and (step == self._start + 1 or step == self._stop or step % self._stride() == 0):
            left = (time.monotonic() - self._began) / (step - self._start) * (self._stop - step)
            say(f"step {step}/{self._stop}  loss {loss:.4f}  {tokens_per_second:,.0f} tokens/s  {left:,.0f} s left")

    def _stride(self) -> int:
        """About twenty lines a run."""
        return max(1, (self._stop - self._start) // 20)

    def end(self) -> None:
        """The steps are done."""
        if self._bar is not None:
            self._bar.close()
