"""What expert parallelism costs: ranks that exchange tokens, beside one process that holds every expert, on the same tokens.

The ranks are processes with one thread each, gloo between them; the one process has as many threads. They take turns, and
so do the numbers of chunks in which tokens travel.

Shapes: T tokens in all, D width, K experts a token, P ranks.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from modeling.some import SoMEConfig, SoMELayer
from tools.bench_layer import DTYPES, conditions_of, configs_of, some_layer
from tools.bench_ranks import ask, started
from tools.bench_table import SPREAD, Table, spread

CPU = torch.device("cpu")
PARTS = ("metadata", "dispatch", "combine")


@dataclass(frozen=True)
class Task:
    """What both sides compute, all of it drawn from fixed seeds."""

    config: SoMEConfig
    tokens: int
    dtype: torch.dtype
    ranks: int

    def layer(self, group: dist.ProcessGroup | None) -> SoMELayer:
        """The layer, with this rank's experts; the same query network everywhere."""
        torch.manual_seed(0)
        return some_layer(self.config, self.dtype, CPU, group)

    def batch(self, rank: int, ranks: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A rank's share of the tokens and of the gradient of their outputs, (1, T / P, D) both."""
        generator = torch.Generator().manual_seed(1)
        both = torch.randn(2, self.tokens, self.config.d_model, generator=generator).to(self.dtype)
        x_1TD, grad_1TD = both.chunk(ranks, dim=1)[rank].clone().split(1)
        return x_1TD.requires_grad_(), grad_1TD


@dataclass
class Ledger:
    """What the all-to-alls of a layer send to other ranks, and how long a rank waits in them, by part.

    A part is told by what is sent: rows of width D are tokens (or their gradients), which go out to the experts until these
    have computed and then come back; everything else is metadata.
    """

    layer: SoMELayer
    bytes: dict[str, int] = field(default_factory=lambda: dict.fromkeys(PARTS, 0))
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))

    def __post_init__(self) -> None:
        self._computed = False

        def note_backward(pool: torch.nn.Module, inputs: Any, output_TD: torch.Tensor) -> None:
            self._note_computed()
            output_TD.grad_fn.register_hook(self._note_computed)

        self.layer.pool.register_forward_hook(note_backward)

    def clear(self) -> None:
        """Forget what was seen."""
        self._computed = False
        for part in PARTS:
            self.bytes[part], self.seconds[part] = 0, 0.0

    @contextmanager
    def watching(self) -> Iterator[None]:
        """See every all-to-all."""
        real = dist.all_to_all_single

        def watched(output, input, output_split_sizes=None, input_split_sizes=None, group=None, async_op=False):
            part = self._part(input)
            self.bytes[part] += _bytes_to_others(input, input_split_sizes, group)
            with self._waiting(part):
                work = real(output, input, output_split_sizes, input_split_sizes, group, async_op)
            return _WatchedWork(work, lambda: self._waiting(part)) if async_op else work

        with mock.patch.object(dist, "all_to_all_single", watched):
            yield

    def _note_computed(self, *gradients: Any) -> None:
        self._computed = True

    def _part(self, sent: torch.Tensor) -> str:
        if not (sent.is_floating_point() and sent.shape[1:] == (self.layer.config.d_model,)):
            return "metadata"
        part, self._computed = ("combine" if self._computed else "dispatch"), False
        return part

    @contextmanager
    def _waiting(self, part: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.seconds[part] += time.perf_counter() - began


@dataclass
class _WatchedWork:
    """A collective under way; waiting for it counts."""

    work: dist.Work
    waiting: Callable[[], Any]

    def wait(self) -> None:
        with self.waiting():
            self.work.wait()


def _bytes_to_others(sent: torch.Tensor, splits: list[int] | None, group: dist.ProcessGroup | None) -> int:
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    if splits is None:
        return sent.nbytes * (ranks - 1) // ranks
    rows = sum(splits)
    return sent.nbytes * (rows - splits[rank]) // rows if rows else 0


def bench_exchange(arguments: argparse.Namespace) -> Table:
    """Forward and backward of one layer over `--ranks` ranks, on CPUs.

    Raises:
        ValueError: tokens or experts that do not divide over the ranks.
        BenchmarkFailed: a rank ended early.
    """
    configs, ranks = configs_of(arguments), arguments.ranks
    if ranks < 2:
        raise ValueError(f"--ranks {ranks}: nothing is exchanged; give 2 or more")
    for flag, numbers in (("tokens", arguments.tokens), ("experts", arguments.experts)):
        for number in numbers:
            if number % ranks:
                raise ValueError(f"--{flag} {number} does not divide over --ranks {ranks}; choose a multiple of {ranks}")
    table = Table(
        "exchange",
        {**conditions_of(arguments, "forward + backward"), "device": "cpu", "threads": ranks},
        {
            "contender": "", "experts": "d", "tokens": "d", "chunks": "d", **SPREAD,
            "x_one": ".2f", "MB": ".3f", "MB_least": ".3f",
        },
    )  # fmt: skip
    threads = torch.get_num_threads()
    torch.set_num_threads(ranks)
    try:
        for config in configs:
            for tokens in arguments.tokens:
                task = Task(config, tokens, DTYPES[arguments.precision], ranks)
                _measure(task, arguments.chunks, arguments.repeats, table)
    finally:
        torch.set_num_threads(threads)
    table.notes += [
        "parts are means over ranks; metadata, dispatch and combine are time spent in collectives, which includes waiting "
        "for the slowest rank; compute is all the rest",
        "MB: sent to other ranks by all ranks together; least: one copy of a token for each rank with any of its experts",
    ]
    return table


def _measure(task: Task, chunk_numbers: list[int], repeats: int, table: Table) -> None:
    """Add the rows of one size."""
    layer, (x_1TD, grad_1TD) = task.layer(None), task.batch(0, 1)
    alone: list[float] = []
    answers_of: dict[int, list[list[dict[str, Any]]]] = {chunks: [] for chunks in chunk_numbers}
    with started(task.ranks, _serve, task) as pipes:
        for turn in range(repeats + 1):
            began = time.perf_counter()
            y_1TD = _forward_backward(layer, x_1TD, grad_1TD)
            milliseconds = 1e3 * (time.perf_counter() - began)
            answers = {chunks: ask(pipes, ("step", chunks)) for chunks in chunk_numbers}
            if turn:
                alone.append(milliseconds)
                for chunks in chunk_numbers:
                    answers_of[chunks].append(answers[chunks])
        for chunks in chunk_numbers:
            outputs_TD = torch.cat([torch.from_numpy(answer) for answer in ask(pipes, ("output", chunks))])
            difference_TD = outputs_TD - y_1TD[0].detach().float()
            table.notes.append(
                f"E={task.config.num_experts}, T={task.tokens}, chunks={chunks}: outputs agree to "
                f"{float(difference_TD.norm() / outputs_TD.norm()):.1e} (relative, in norm)"
            )
        least = sum(ask(pipes, ("copies", 1))) * task.config.d_model * x_1TD.element_size()

    def add(name: str, times: list[float], **more: float) -> None:
        row = {"contender": name, "experts": task.config.num_experts, "tokens": task.tokens, **spread(times)}
        table.rows.append({**row, "x_one": row["ms"] / spread(alone)["ms"], **more})

    add(f"one process, {task.ranks} threads", alone)
    for chunks, turns in answers_of.items():
        sent = {part: sum(answer["bytes"][part] for answer in turns[-1]) / 1e6 for part in PARTS}
        slowest = [max(answer["milliseconds"] for answer in answers) for answers in turns]
        # Tokens and their gradients go out once and come back once each.
        whole = {"MB": sum(sent.values()), "MB_least": 4 * least / 1e6, "chunks": chunks}
        add(f"{task.ranks} ranks, one thread each", slowest, **whole)
        for part in ("metadata", "dispatch", "compute", "combine"):
            means = [sum(answer["parts"][part] for answer in answers) / task.ranks for answers in turns]
            least_here = {"MB_least": 2 * least / 1e6} if part in ("dispatch", "combine") else {}
            add(f"  {part}", means, chunks=chunks, **({"MB": sent[part]} if part in sent else {}), **least_here)


def _forward_backward(layer: SoMELayer, x_1TD: torch.Tensor, grad_1TD: torch.Tensor) -> torch.Tensor:
    x_1TD.grad = None
    y_1TD = layer(x_1TD)[0]
    y_1TD.backward(grad_1TD)
    return y_1TD


def _serve(pipe: Connection, task: Task) -> None:
    """One rank: answers until it is ended."""
    rank = dist.get_rank()
    layer, (x_1TD, grad_1TD) = task.layer(dist.group.WORLD), task.batch(rank, task.ranks)
    ledger = Ledger(layer)
    with ledger.watching():
        while True:
            question, layer.exchange.chunks = pipe.recv()
            if question == "step":
                pipe.send(_step(layer, ledger, x_1TD, grad_1TD))
            elif question == "output":
                pipe.send(layer(x_1TD)[0][0].detach().float().numpy())
            else:
                pipe.send(_copies_to_others(layer, x_1TD))


def _step(layer: SoMELayer, ledger: Ledger, x_1TD: torch.Tensor, grad_1TD: torch.Tensor) -> dict[str, Any]:
    """Milliseconds and bytes of one forward and backward that all ranks begin together."""
    dist.barrier()
    ledger.clear()
    began = time.perf_counter()
    _forward_backward(layer, x_1TD, grad_1TD)
    seconds = time.perf_counter() - began
    parts = {part: 1e3 * waited for part, waited in ledger.seconds.items()}
    parts["compute"] = 1e3 * (seconds - sum(ledger.seconds.values()))
    return {"milliseconds": 1e3 * seconds, "parts": parts, "bytes": dict(ledger.bytes)}


def _copies_to_others(layer: SoMELayer, x_1TD: torch.Tensor) -> int:
    """How many (token, other rank) pairs there are where the rank has any of the token's experts."""
    expert_ids_TK = layer(x_1TD)[1].expert_ids_TK
    others = [shard for rank, shard in enumerate(layer.placement.expert_ids_P) if rank != dist.get_rank()]
    return sum(int(torch.isin(expert_ids_TK, torch.tensor(shard)).any(-1).sum()) for shard in others)
