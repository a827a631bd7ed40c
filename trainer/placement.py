"""Moving experts during a run, so that every rank of a group has its share of the work (`parallel.placement = balanced`).

The load of an expert is the usage that its key store keeps: an average over steps, bitwise equal on all ranks, so all
make the same plan.
"""

import time
from collections.abc import Sequence
from typing import Any

from modeling.some import SoMELayer
from modeling.some.balance import plan
from modeling.some.placement import Placement
from trainer.checkpoint import RunState
from trainer.config import ParallelConfig


def begin_placement(layers: Sequence[SoMELayer], parallel: ParallelConfig, state: RunState) -> dict[str, Any] | None:
    """Take up the placement in `state` where it was made for as many ranks; on others plan anew from the loaded usage.

    Returns:
        The record of a plan (see `replan`), None where none was made.
    """
    saved = state.placement
    state.placement = None
    if not _is_balanced(layers, parallel):
        return None
    if saved is not None and len(saved[0]) == layers[0].placement.num_ranks:
        for layer, expert_ids in zip(layers, saved, strict=True):
            layer.place(Placement(tuple(map(tuple, expert_ids))))
    elif state.step > 0 and parallel.replan_every > 0:
        return replan(layers, parallel, state)
    _remember(layers, state)
    return None


def replan_if_due(layers: Sequence[SoMELayer], parallel: ParallelConfig, state: RunState) -> dict[str, Any] | None:
    """`replan` at every `replan_every`-th step; None at the others."""
    if not _is_balanced(layers, parallel) or parallel.replan_every == 0 or state.step % parallel.replan_every:
        return None
    return replan(layers, parallel, state)


def replan(layers: Sequence[SoMELayer], parallel: ParallelConfig, state: RunState) -> dict[str, Any]:
    """Plan all layers anew and draw the experts that move; `state` remembers where they lie.

    Returns:
        `layers`, one record a layer: load of the busiest rank over the mean by the old and the new placement, experts
        drawn over all ranks of a group, and replicas; `moved`, their sum; `seconds`.
    """
    began, records = time.perf_counter(), []
    for index, layer in enumerate(layers):
        load_E, old = layer.store.usage.tolist(), layer.placement
        new = plan(load_E, parallel.replicas, old)
        if new is not old:
            layer.place(new)
        records.append(
            {
                "layer": index,
                "load_before": old.max_over_mean(load_E),
                "load_after": new.max_over_mean(load_E),
                "moved": new.num_moved_from(old),
                "replicas": new.num_replicas,
            }
        )
    _remember(layers, state)
    moved = sum(record["moved"] for record in records)
    return {"layers": records, "moved": moved, "seconds": time.perf_counter() - began}


def _is_balanced(layers: Sequence[SoMELayer], parallel: ParallelConfig) -> bool:
    return parallel.placement == "balanced" and len(layers) > 0 and layers[0].placement.num_ranks > 1


def _remember(layers: Sequence[SoMELayer], state: RunState) -> None:
    state.placement = [[list(expert_ids) for expert_ids in layer.placement.expert_ids_P] for layer in layers]
