"""The faults that `tools/chaos.py` draws: how each is brought about, and by what one can tell that it happened."""

import random
import re
import signal
from dataclasses import dataclass

from trainer.exit_codes import DONE, FAILED, NOT_FINITE, REQUEUE
from trainer.faults import FILE_STAGES, STAGES

WATCHDOG_MINUTES = 0.25
"""`parallel.timeout_minutes` where a rank is to stop answering."""
SLOW_SECONDS = 2.0


@dataclass(frozen=True)
class Card:
    """A kind of fault, and where it strikes."""

    kind: str
    rank: int = 0
    stage: str = ""
    """Of a save, which is rank 0's, with `before`, `inside` or `after` it; empty = no save."""

    def __str__(self) -> str:
        return f"{self.kind}, {self.stage or f'rank {self.rank}'}"


@dataclass(frozen=True)
class Fault:
    """A fault of one start."""

    codes: tuple[int, ...]
    """Exit codes that tell that it happened; negative: a signal."""
    rank: int | None = None
    """Whose code tells; None = anyone's."""
    settings: tuple[str, ...] = ()
    """What `--set` gets for it to happen."""
    sends: signal.Signals | None = None
    """What is sent to `rank` from outside, `after` so many seconds, which may be after the run's end."""
    after: float = 0.0
    said: str = ""
    """A pattern in what the ranks print."""
    slow_step: int | None = None
    """The step that takes at least SLOW_SECONDS."""

    def happened(self, codes: list[int | None], printed: str, seconds: dict[int, float]) -> bool:
        """Whether it was this that ended the ranks, or that they waited for.

        Args:
            codes: of every rank when the first had ended otherwise than well; None = it still ran.
            printed: by all ranks.
            seconds: that each step took.
        """
        mine = codes if self.rank is None else [codes[self.rank]]
        slow_enough = self.slow_step is None or seconds.get(self.slow_step, 0) >= SLOW_SECONDS
        return any(code in self.codes for code in mine) and bool(re.search(self.said, printed)) and slow_enough


def deck(ranks: int) -> list[Card]:
    """Every kind of fault, those at a step or a moment more often."""
    stages = [f"{when} {stage}" for stage in STAGES for when in ("before", "after")]
    inside = [f"inside {stage}" for stage in FILE_STAGES]
    cards = [Card("SIGKILL in a save", stage=stage) for stage in stages + inside]
    cards += [Card("full disk in a save", stage=stage) for stage in inside]
    for rank in range(ranks):
        cards += [Card("SIGKILL at a step", rank), Card("SIGKILL at any moment", rank)] * 4
        cards += [Card(kind, rank) for kind in ("SIGTERM at any moment", "slow at a step", "NaN at a step")]
        # A lone rank that stops has nobody to miss it.
        cards += [Card("SIGSTOP at a step", rank)] * (ranks > 1)
    return cards


def arrange(card: Card, draw: random.Random, newest: int, every: int, total: int, seconds: float) -> Fault:
    """A fault of the kind `card`, at a time of its own.

    Args:
        card: one of `deck`.
        draw: decides the time.
        newest: step of the checkpoint that the start begins at.
        every: steps between two checkpoints.
        total: steps of the whole run.
        seconds: that the unbroken run took.
    """
    rank, step = card.rank, draw.randint(newest + 1, min(newest + every + 1, total))
    save, (when, _, stage) = min((newest // every + 1) * every, total), card.stage.partition(" ")
    place, after = f"rank={rank} step={step}", draw.uniform(0, seconds)
    match card.kind:
        case "SIGKILL at a step":
            return Fault((-signal.SIGKILL,), rank, (f"faults.kill={place}",))
        case "SIGKILL in a save":
            return Fault((-signal.SIGKILL,), 0, (f"faults.kill=step={save} stage={stage} when={when}",))
        case "SIGKILL at any moment":
            return Fault((-signal.SIGKILL,), rank, sends=signal.SIGKILL, after=after)
        case "SIGTERM at any moment":
            # Before training begins there is nothing to save, and the signal ends the rank.
            return Fault((REQUEUE, 128 + signal.SIGTERM, -signal.SIGTERM), rank, sends=signal.SIGTERM, after=after)
        case "SIGSTOP at a step":
            settings = (f"faults.stop={place}", f"parallel.timeout_minutes={WATCHDOG_MINUTES}")
            return Fault((FAILED,), settings=settings, said=rf"suspect: rank {rank} \(")
        case "slow at a step":
            return Fault((DONE,), settings=(f"faults.slow={place} seconds={SLOW_SECONDS}",), slow_step=step)
        case "NaN at a step":
            return Fault((NOT_FINITE,), settings=(f"faults.nan={place}",), said=rf"error: step {step}: .* not finite")
        case "full disk in a save":
            return Fault((FAILED,), 0, (f"faults.write=step={save} stage={stage}",), said="No space left on device")
        case kind:
            raise AssertionError(kind)
