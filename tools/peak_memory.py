"""How much memory a piece of work takes at its peak."""

import threading
from typing import Self

import psutil
import torch

SECONDS_BETWEEN_LOOKS = 0.01


class PeakMemory:
    """`with PeakMemory(device) as memory: ...` and then `memory.growth`.

    On GPUs it is told by the allocator. On CPUs a thread looks at the process's resident memory again and again: the
    system's own high-water mark may be from long before.

    Attributes:
        growth: bytes by which tensors on the GPU, or the process, grew inside at most.
    """

    def __init__(self, device: torch.device):
        self.growth = 0
        self._device, self._process = device, psutil.Process()
        self._ends, self._watcher = threading.Event(), threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Self:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            self._before = torch.cuda.memory_allocated(self._device)
        else:
            self._before = self._process.memory_info().rss
            self._watcher.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._device.type == "cuda":
            self.growth = torch.cuda.max_memory_allocated(self._device) - self._before
        else:
            self._ends.set()
            self._watcher.join()

    def _watch(self) -> None:
        while not self._ends.wait(SECONDS_BETWEEN_LOOKS):
            self.growth = max(self.growth, self._process.memory_info().rss - self._before)
