"""Memory of the machine, and of the process on CPUs."""

import ctypes
import os
import sys

SLACK_BYTES = 2**30


def host_bytes() -> int:
    """Physical memory of this machine."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


class FreedMemory:
    """Gives memory that was freed back to the system once it adds up.

    Tensors of many sizes leave holes that glibc keeps: over a hundred steps a process grew to several times what it used.
    Giving them back at every step would cost small models more time than their products, so it is done when the process
    has grown by `SLACK_BYTES` since the last time.
    """

    def __init__(self):
        # glibc has it, other C libraries may not.
        self._trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
        self._resident = self._measure()

    def release(self, slack_bytes: int = SLACK_BYTES) -> None:
        """To be called between steps, when what a step needed is free again; `slack_bytes` may be kept."""
        if self._trim is not None and self._measure() > self._resident + slack_bytes:
            self._trim(0)
            self._resident = self._measure()

    def _measure(self) -> int:
        """Resident bytes of this process."""
        if self._trim is None:
            return 0
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
