"""How long experts and their exchange take under each placement, on the routing of a trained model, over real ranks.

The ranks load a checkpoint together, run its forward on their shares of the next global batch, and keep how every layer
routed it. Then they replay that layer by layer: they hold its experts as every placement has them, and the placements take
turns. Inputs and gradients are random, since no time depends on their values.

Shapes: T tokens of a rank's micro batch, D width, K experts a token.
"""

import time
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path

import torch
import torch.distributed as dist

from modeling.some import Routing
from modeling.some.exchange import AllToAllExchange
from modeling.some.experts import FrozenExpertPool
from modeling.some.placement import Placement
from tools.bench_ranks import ask, started
from tools.checkpoints import dtype_of, load_model
from trainer.checkpoint import read_state
from trainer.config import Experiment
from trainer.data import micro_batches, open_data
from trainer.job import train_order
from trainer.launch import Launch
from trainer.layout import Layout
from trainer.numerics import set_numerics


@dataclass(frozen=True)
class Replay:
    """What every rank is told."""

    checkpoint: Path
    experiment: Experiment
    """The checkpoint's; `parallel` may differ."""
    data: Path
    """The tokenised data."""
    micro_batch: int
    ways: dict[str, list[Placement]]
    """Name of a way to place the experts -> placement of every layer."""

    @staticmethod
    def of(checkpoint: Path, experiment: Experiment, data: Path, ranks: int, ways: dict[str, list[Placement]]) -> "Replay":
        """On `ranks` ranks that share one pool.

        Raises:
            ValueError: a batch that does not divide over the ranks.
        """
        plain = replace(experiment.parallel, ep_size=ranks, placement="contiguous", replicas=0)
        experiment = replace(experiment, parallel=plain)
        layout = Layout.of(experiment, Launch(0, ranks, 0, ranks))
        return Replay(checkpoint, experiment, data, layout.micro_batch, ways)


@dataclass(frozen=True)
class Timing:
    """What one way takes."""

    milliseconds: list[float]
    """Of every turn: all layers and micro batches of a step, forward and backward, each layer on its slowest rank."""
    held_bytes: int
    """Experts of all layers on the rank that holds most."""


def time_ways(replay: Replay, ranks: int, repeats: int) -> dict[str, Timing]:
    """Every way by name, from `repeats` counted turns.

    Raises:
        BenchmarkFailed: a rank ended early.
    """
    milliseconds = {name: [0.0] * repeats for name in replay.ways}
    held = {name: [0] * ranks for name in replay.ways}
    with started(ranks, _serve, replay) as pipes:
        for layer in range(replay.experiment.model.num_layers):
            held_here = ask(pipes, ("hold", layer))
            for name in replay.ways:
                held[name] = [sum(both) for both in zip(held[name], [of[name] for of in held_here], strict=True)]
            for turn in range(-1, repeats):
                for name in replay.ways:
                    slowest = max(ask(pipes, ("run", name)))
                    if turn >= 0:
                        milliseconds[name][turn] += slowest
    return {name: Timing(milliseconds[name], max(held[name])) for name in replay.ways}


def _serve(pipe: Connection, replay: Replay) -> None:
    """One rank: answers until it is ended."""
    set_numerics(replay.experiment.train.deterministic)
    routing = _record(replay)
    while True:
        question, what = pipe.recv()
        if question == "hold":
            layer = _Layer(replay, what, [records[what] for records in routing])
            pipe.send({name: sum(b.nbytes for b in pool.buffers()) for name, (_, pool) in layer.ways.items()})
        else:
            pipe.send(layer.milliseconds(what))


@torch.no_grad()
def _record(replay: Replay) -> list[list[Routing]]:
    """Of each micro batch of this rank, how every layer routes it."""
    experiment, rank, ranks = replay.experiment, dist.get_rank(), dist.get_world_size()
    state, dataset = read_state(replay.checkpoint), open_data(replay.data)
    model = load_model(replay.checkpoint, state, experiment, dist.group.WORLD)
    sequence_ids = train_order(experiment, dataset).sequence_ids(state.step)
    batches = micro_batches(dataset.train, sequence_ids, rank, ranks, replay.micro_batch)
    return [model(b.input_ids_BS, b.routing_mask, targets_BS=b.targets_BS).routing for b in batches]


class _Layer:
    """One layer of this rank under every placement, and what it has to compute."""

    def __init__(self, replay: Replay, layer: int, routing: list[Routing]):
        experiment, rank = replay.experiment, dist.get_rank()
        some, dtype = experiment.model.some, dtype_of(read_state(replay.checkpoint).precision)
        self.ways = {}
        for name, placements in replay.ways.items():
            placement = placements[layer]
            exchange = AllToAllExchange(placement, dist.group.WORLD, experiment.parallel.chunks)
            pool = FrozenExpertPool(some, layer, experiment.seed, placement.expert_ids_P[rank], dtype)
            self.ways[name] = exchange, pool
        self.batches = []
        for record in routing:
            x_TD, grad_TD = torch.randn(2, *record.queries_TD.shape).to(dtype)
            self.batches.append((x_TD.requires_grad_(), record.gates_TK.requires_grad_(), record.expert_ids_TK, grad_TD))

    def milliseconds(self, name: str) -> float:
        """One forward and backward that all ranks begin together."""
        exchange, pool = self.ways[name]
        dist.barrier()
        began = time.perf_counter()
        for x_TD, gates_TK, expert_ids_TK, grad_TD in self.batches:
            x_TD.grad = gates_TK.grad = None
            exchange(x_TD, gates_TK, expert_ids_TK, pool).backward(grad_TD)
        return 1e3 * (time.perf_counter() - began)
