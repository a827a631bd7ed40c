"""Signals that ask a run to stop, as something that the loop can ask for.

A signal may reach one rank, all of them, or one after the other, as launchers please. So it only leaves a note here; the
ranks put their notes together in the loop (`trainer/loop.py`) and stop at the same place.
"""

import os
import signal
import threading
import time
from typing import Self

STOPPING = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT, signal.SIGHUP)
SECONDS_BETWEEN_TWO = 1.0
"""Ctrl-C reaches a rank from the terminal and again from its launcher, and SLURM may send a signal twice: what comes
closer than this after the first is the same request."""


class StopSignals:
    """Notes the first signal, and ends the process at the second: `with StopSignals() as signals`, in the main thread.

    Until `defer` is called there is nothing to save, and a signal ends the process at once with 128 + its number. So does
    a second signal after it, if it comes at least a second after the first. SIGTERM after SIGUSR2 is no second one:
    schedulers send the one as a notice and the other when the time is up.

    A thread of its own listens, since Python runs handlers in the main thread only, and that may be waiting in a collective
    that never ends. Signals that are ignored when this begins, as by `nohup`, stay so; leaving puts the handlers back.

    Attributes:
        received: the signal that asks to stop; None = none so far.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._is_deferring, self._since = False, 0.0

    def __enter__(self) -> Self:
        reading, self._writing = os.pipe()
        os.set_blocking(self._writing, False)
        self._former_fd = signal.set_wakeup_fd(self._writing, warn_on_full_buffer=False)
        mine = [number for number in STOPPING if signal.getsignal(number) is not signal.SIG_IGN]
        self._former = {number: signal.signal(number, lambda *_: None) for number in mine}
        threading.Thread(target=self._listen, args=(reading,), name="signals", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._former_fd)
        os.close(self._writing)  # ends the thread

    def defer(self) -> None:
        """From now on somebody asks for `received` and stops well."""
        self._is_deferring = True

    def _listen(self, reading: int) -> None:
        with open(reading, "rb", buffering=0) as pipe:
            while number := pipe.read(1):
                if number[0] in self._former:
                    self._receive(signal.Signals(number[0]))

    def _receive(self, number: signal.Signals) -> None:
        now = time.monotonic()
        follows_notice = self.received == signal.SIGUSR2 and number == signal.SIGTERM
        if self._is_deferring and (self.received is None or follows_notice):
            self.received, self._since = number, now
        elif not self._is_deferring or now - self._since >= SECONDS_BETWEEN_TWO:
            os._exit(128 + number)
