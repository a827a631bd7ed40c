"""Ends a job whose ranks no longer move, and says which of them is to blame.

A rank that is stopped, has lost its network or is stuck in its loader leaves all others waiting in a collective. Each rank
notes where it is (`Progress`); a thread posts that to the store at which the ranks met, and another reads all posts when
this rank has not moved for too long. Only when no rank has moved for that long does the job end: so one may take as long
as it likes over a checkpoint while the others wait, as long as it moves from file to file.

What holds Python's lock without end stops these threads as well: then the other ranks see a silent rank. NCCL's own watchdog
stays on, with the longer timeout of its process group.
"""

import json
import os
import queue
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import torch.distributed as dist

from trainer.console import say_at_once
from trainer.exit_codes import FAILED

SECONDS_BETWEEN_POSTS = 5.0
SECONDS_FOR_AN_ANSWER = 5.0
"""The store is asked at most this long; its calls have no deadline of their own once the machine behind it has stopped."""
ENDED = "ended"
OUR_CODE = str(Path(__file__).resolve().parent.parent)


class Progress:
    """Where this rank is. Marking costs next to nothing.

    Attributes:
        moves: signs of life so far.
        place: (marks, phase, step); ranks pass the same marks in the same order, so a rank with fewer is behind.
    """

    def __init__(self) -> None:
        self.moves = 0
        self.place = (0, "starting", 0)

    def mark(self, phase: str, step: int) -> None:
        """All ranks come here: `phase` of `step` begins."""
        self.place = (self.place[0] + 1, phase, step)
        self.moves += 1

    def alive(self) -> None:
        """This rank goes on with something that the others do not do."""
        self.moves += 1


class Watchdog:
    """`with Watchdog(progress, minutes):` around what is watched, on every rank.

    Args:
        progress: of this rank.
        timeout_minutes: how long no rank may move.
    """

    def __init__(self, progress: Progress, timeout_minutes: float):
        self._progress = progress
        self._limit = 60 * timeout_minutes
        self._interval = min(SECONDS_BETWEEN_POSTS, self._limit / 10)
        self._rank, self._world_size = dist.get_rank(), dist.get_world_size()
        self._stalled, self._posts = 0.0, 0
        self._first: dict[str, Any] = {}
        """The last post of rank 0 that was read, kept for when the store is gone with it."""
        self._over = threading.Event()

    def __enter__(self) -> Self:
        # One connection to post, one to ask: a call that waits for its answer blocks the connection.
        self._posting, self._asking = (dist.group.WORLD.get_group_store().clone() for _ in range(2))
        self._post()
        # Building a model takes as long as it takes: the watch begins when all ranks are there.
        dist.barrier()
        for task in (self._post_always, self._watch):
            threading.Thread(target=task, name=f"watchdog{task.__name__}", daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._over.set()
        # Where the watchdog of another rank has ended the job, our collective broke off for that: all has been said.
        if kind is not None and self._ask(lambda: self._asking.check([ENDED])):
            self._leave()

    def _post_always(self) -> None:
        while not self._over.wait(self._interval):
            try:
                self._post()
            except dist.DistError:
                return  # the store is gone, and with it whatever this rank waits for

    def _post(self) -> None:
        marks, phase, step = self._progress.place
        self._posts += 1
        post = {
            "rank": self._rank, "host": socket.gethostname(), "pid": os.getpid(), "marks": marks, "phase": phase,
            "step": step, "stalled": self._stalled, "posts": self._posts, "time": time.time(),
            "at": _line_of_main_thread() if self._stalled > self._limit / 2 else "",
        }  # fmt: skip
        self._posting.set(_key(self._rank), json.dumps(post))
        self._first = json.loads(self._posting.get(_key(0)))

    def _watch(self) -> None:
        moves, last = self._progress.moves, time.monotonic()
        while not self._over.wait(self._interval):
            now = time.monotonic()
            # A job that its scheduler has suspended has not stalled: a long sleep of this thread counts as a short one.
            elapsed, last = min(now - last, 2 * self._interval), now
            self._stalled = self._stalled + elapsed if self._progress.moves == moves else 0.0
            moves = self._progress.moves
            if self._stalled >= self._limit:
                self._judge()

    def _judge(self) -> None:
        """End the job unless some rank moves."""
        moves, before = self._progress.moves, self._read()
        self._over.wait(3 * self._interval)
        after = self._read()
        if self._over.is_set() or self._progress.moves != moves:
            return
        if before is None or after is None:
            self._end(self._without_store())
            return
        silent = [new["posts"] == old["posts"] for old, new in zip(before, after, strict=True)]
        recent = self._limit - 4 * self._interval
        if not any(p["stalled"] < recent and not is_silent for p, is_silent in zip(after, silent, strict=True)):
            self._end(self._message(after, silent))

    def _message(self, posts: list[dict[str, Any]], silent: list[bool]) -> str:
        """What is known of each rank, the suspects first: those that no longer post, else those that are behind."""
        fewest = min(p["marks"] for p in posts)
        if any(silent):
            suspects = [p for p, is_silent in zip(posts, silent, strict=True) if is_silent]
            why = "no longer reports"
        elif fewest < max(p["marks"] for p in posts) or len(posts) == 1:
            suspects, why = [p for p in posts if p["marks"] == fewest], "is the furthest behind"
        else:
            suspects, why = [], ""
        named = "; ".join(f"{_name(p)} {why}" for p in suspects[:4]) or "the network, since all ranks wait at the same place"
        lines = [f"  {_name(p)}: {_where(p)}" + ", silent" * is_silent for p, is_silent in zip(posts, silent, strict=True)]
        return "\n".join([self._headline(named), *lines])

    def _without_store(self) -> str:
        """The store lives in the process of rank 0, or beside it in its launcher."""
        marks, phase, step = self._progress.place
        here = f"  rank {self._rank} (here, pid {os.getpid()}): step {step}, {phase}, {self._stalled:.0f} s ago"
        return "\n".join(
            [
                self._headline(f"{_name(self._first)}, where the ranks met, does not answer"),
                f"  {_name(self._first)}: {_where(self._first)}, silent",
                here,
            ]
        )

    def _headline(self, suspect: str) -> str:
        return (
            f"error: no rank has moved for {self._limit:.0f} s (parallel.timeout_minutes = {self._limit / 60:g}), suspect: "
            f"{suspect}; start again to go on from the last checkpoint, and set a longer time if one was at work"
        )

    def _end(self, message: str) -> None:
        """The first rank speaks for all."""
        number = self._ask(lambda: self._asking.add(ENDED, 1))
        if number is None or number == 1:
            say_at_once(message)
        self._leave()

    def _leave(self) -> None:
        # The others still have to ask whether all has been said, and the store may live in this process.
        if self._rank == 0 and self._world_size > 1:
            time.sleep(5 * self._interval)
        os._exit(FAILED)

    def _read(self) -> list[dict[str, Any]] | None:
        """The last post of every rank; None where the store does not answer."""
        keys = [_key(rank) for rank in range(self._world_size)]
        posts = self._ask(lambda: self._asking.multi_get(keys))
        return None if posts is None else [json.loads(post) for post in posts]

    def _ask(self, question: Callable[[], Any]) -> Any:
        """The store's answer; None where there is none in time."""
        answers: queue.SimpleQueue = queue.SimpleQueue()

        def ask() -> None:
            try:
                answers.put(question())
            except dist.DistError:
                answers.put(None)

        threading.Thread(target=ask, name="watchdog_ask", daemon=True).start()
        try:
            return answers.get(timeout=SECONDS_FOR_AN_ANSWER)
        except queue.Empty:
            return None


def _key(rank: int) -> str:
    return f"progress/{rank}"


def _line_of_main_thread() -> str:
    """The innermost line of this repository's, or else of any, code that the main thread is in."""
    frame = sys._current_frames().get(threading.main_thread().ident)
    stack = traceback.extract_stack(frame)
    ours = [line for line in stack if line.filename.startswith(OUR_CODE)] or stack
    return f"{os.path.basename(ours[-1].filename)}:{ours[-1].lineno} in {ours[-1].name}"


def _name(post: dict[str, Any]) -> str:
    return f"rank {post['rank']} (host {post['host']}, pid {post['pid']})"


def _where(post: dict[str, Any]) -> str:
    """By the clocks of two machines, if the post is another's."""
    ago = max(0.0, time.time() - post["time"]) + post["stalled"]
    at = f", at {post['at']}" if post["at"] else ""
    return f"step {post['step']}, {post['phase']}, {ago:.0f} s ago{at}"
