"""What the user sees while a run goes on: a progress bar on a terminal, plain lines elsewhere; rank 0 only."""

import sys
import time

from tqdm import tqdm

from trainer.text import visible


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
            print(
                f"step {step}/{self._stop}  loss {loss:.4f}  {tokens_per_second:,.0f} tokens/s  {left:,.0f} s left",
                flush=True,
            )

    def _stride(self) -> int:
        """About twenty lines a run."""
        return max(1, (self._stop - self._start) // 20)

    def end(self) -> None:
        """The steps are done."""
        if self._bar is not None:
            self._bar.close()
