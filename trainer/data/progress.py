"""Says what the preparation of data is at while that takes long."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from trainer.console import say

FIRST_SECONDS, EVERY_SECONDS = 10.0, 60.0
"""After which a step says what it is at, and again and again."""


@contextmanager
def progress(what: str) -> Iterator[None]:
    """Say `what` and for how long it has gone on, where that is more than FIRST_SECONDS."""
    is_over = threading.Event()

    def tell() -> None:
        began, wait = time.monotonic(), FIRST_SECONDS
        while not is_over.wait(wait):
            say(f"data: {what}: {time.monotonic() - began:,.0f} s so far")
            wait = EVERY_SECONDS

    thread = threading.Thread(target=tell, name="data progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()
