"""What a run measures of itself, and where it writes it.

Shapes: E experts, K experts a token, L SoME layers.
"""

import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from modeling.some import KeyStatistics, KeyStore, Routing
from modeling.some.placement import Placement
from trainer.paths import make_folder, target_of
from trainer.runfolder import EXPERTS
from trainer.storage import StorageError, describe_free, remove, write_text_atomically

if TYPE_CHECKING:
    from trainer.board import Board


def gini(usage_E: torch.Tensor) -> float:
    """Inequality of usage, 0 (even) to 1 - K/E (K experts take all); specs section 4. 0 if nothing was used."""
    total = usage_E.sum()
    if total == 0:
        return 0.0
    ranked_E = usage_E.double().sort().values
    E = len(ranked_E)
    weights_E = 2 * torch.arange(1, E + 1, device=usage_E.device) - E - 1
    return float((weights_E * ranked_E).sum() / (E * total))


def entropy_bits(usage_E: torch.Tensor) -> float:
    """Entropy of usage in bits, log2 K to log2 E; 2 to this power is the effective number of experts."""
    usage_E = usage_E.double()
    share_E = usage_E / usage_E.sum().clamp(min=1e-30)
    share_E = share_E[share_E > 0]
    return float(-(share_E * share_E.log2()).sum()) + 0.0


class RoutingMeter:
    """Collects how each layer routes tokens over an evaluation, on all ranks: the real ones, and all that are routed."""

    def __init__(self, stores: list[KeyStore]):
        self.stores = stores
        self._statistics: list[KeyStatistics | None] = [None] * len(stores)
        self._routed = [torch.zeros(len(store.keys), dtype=torch.int64, device=store.keys.device) for store in stores]
        self._squares = [torch.zeros(2, dtype=torch.float64, device=store.keys.device) for store in stores]
        self._gates = [torch.zeros(2, dtype=torch.float64, device=store.keys.device) for store in stores]

    def add(self, routing: list[Routing], real_T: torch.Tensor) -> None:
        """Count one batch; `real_T` bool, the routed positions whose target is a real token."""
        for layer, (record, store) in enumerate(zip(routing, self.stores, strict=True)):
            new = KeyStatistics.of(len(store.keys), record.queries_TD, record.expert_ids_TK, record.gates_TK, real_T)
            total = self._statistics[layer]
            self._statistics[layer] = new if total is None else total.add_(new)
            self._routed[layer] += torch.bincount(record.expert_ids_TK.flatten(), minlength=len(store.keys))
            squares = [record.output_squares_T[real_T], record.residual_squares_T[real_T]]
            self._squares[layer] += torch.stack([values_t.double().sum() for values_t in squares])
            largest_T = record.gates_TK[real_T].amax(-1)
            self._gates[layer] += torch.stack([largest_T.double().sum(), real_T.sum()])

    def result(self, placements: list[Placement]) -> list[dict[str, Any]]:
        """One record a layer, from the sums over all ranks and where the layer's experts lie; a collective."""
        for layer, stats in enumerate(self._statistics):
            for sums in (stats.counts_EK, stats.pairs_EE, self._routed[layer], self._squares[layer], self._gates[layer]):
                dist.all_reduce(sums)
        return [self._layer(layer, placements[layer]) for layer in range(len(self.stores))]

    @property
    def pairs(self) -> list[torch.Tensor]:
        """Of each layer (E, E) int32, how many real tokens chose both experts: over all ranks once there is a result."""
        return [stats.pairs_EE for stats in self._statistics]

    def _layer(self, layer: int, placement: Placement) -> dict[str, Any]:
        store, stats, routed_E = self.stores[layer], self._statistics[layer], self._routed[layer]
        counts_E, (E, K) = stats.counts_EK.sum(1).long(), stats.counts_EK.shape
        unit_ED = F.normalize(store.keys, dim=-1)
        pair_total = int(stats.pairs_EE.sum())
        output, residual = self._squares[layer].tolist()
        gates, tokens = self._gates[layer].tolist()
        bound = 1 - K / E
        raw_gini, entropy = gini(counts_E), entropy_bits(counts_E)
        # With padding only where some is routed.
        padded = {}
        if int(routed_E.sum()) != int(counts_E.sum()):
            padded = {"gini_with_padding": gini(routed_E), "entropy_bits_with_padding": entropy_bits(routed_E)}
        return {
            "layer": layer,
            "gini": raw_gini,
            "gini_of_bound": raw_gini / bound if bound else 0.0,
            "entropy_bits": entropy,
            **padded,
            # Of the moving average over training batches, the published measure (specs section 4).
            "usage_gini": gini(store.usage),
            "usage_entropy_bits": entropy_bits(store.usage),
            "effective_experts": 2**entropy,
            "experts_used": int((counts_E > 0).sum()),
            "load_max_over_mean": placement.max_over_mean(counts_E.tolist()),
            "output_over_residual": math.sqrt(output / residual) if residual else 0.0,
            "coselected_cosine": float((stats.pairs_EE * (unit_ED @ unit_ED.T)).sum() / pair_total) if pair_total else 0.0,
            "largest_gate": gates / tokens if tokens else 0.0,
            "respawns": int(store.respawns),
            "expert_counts": counts_E.tolist(),
        }


def accumulate_statistics(
    sums: list[KeyStatistics | None],
    routing: list[Routing],
    stores: list[KeyStore],
    real_T: torch.Tensor,
    token_ids_T: torch.Tensor,
) -> list[KeyStatistics]:
    """Add one batch's routing to the sums of each layer; None starts a sum.

    Args:
        sums: so far.
        routing: of the batch, T routed positions.
        stores: of the layers; their rules say which positions move keys.
        real_T: bool, positions whose target is a real token.
        token_ids_T: int64, distinct over the whole step.
    """
    added = []
    for total, record, store in zip(sums, routing, stores, strict=True):
        mask_T = real_T if store.rules.token_mask == "targets" else None
        candidates = store.candidates(record.queries_TD, token_ids_T, mask_T)
        new = KeyStatistics.of(len(store.keys), record.queries_TD, record.expert_ids_TK, record.gates_TK, mask_T, candidates)
        added.append(new if total is None else total.add_(new))
    return added


class RunLog:
    """Appends one JSON object a line to `metrics.jsonl` and shows it on the run's board, if it has one; what the newest
    evaluation says of single experts goes to `experts.json`. Rank 0 only.

    On resume, records after the resumed step are dropped, so that every step appears once, and lines that are no records;
    with `evaluates` also the resumed step's evaluation, which is about to be made again. So is an `experts.json` of later.

    Attributes:
        error: why nothing is written any more; None = all is well. Methods do not raise it, since the other ranks have to
            learn of it first.

    Raises:
        StorageError: the file cannot be opened.
    """

    def __init__(self, output_dir: Path, resumed_step: int, board: "Board | None" = None, evaluates: bool = False):
        self._path, self._experts, self.error = output_dir / "metrics.jsonl", output_dir / EXPERTS, None
        with self._noting_errors():
            make_folder(output_dir)
            if self._path.exists():
                self._drop_after(resumed_step, evaluates)
            if _is_after(self._experts, resumed_step):
                remove(target_of(self._experts))
            self._file = open(self._path, "a", encoding="utf-8", buffering=1)
        if self.error is not None:
            raise self.error
        self._board = board

    def _drop_after(self, step: int, evaluates: bool) -> None:
        kept = []
        for line in self._path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
            try:
                record = json.loads(line)
                event, happened_at = record["event"], record.get("step", 0)
                # A run that starts over at step 0 evaluates there again.
                happened = happened_at <= step and (step > 0 or event == "start")
            except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
                continue  # cut short by a crash, so of a step that is run again, or damaged
            is_made_again = evaluates and event == "eval" and happened_at == step
            if happened and event != "end" and not is_made_again:
                kept.append(line)
        write_text_atomically(self._path, "".join(kept))

    def write(self, event: str, **values: Any) -> None:
        """One record; floats that JSON cannot hold are written as null."""
        if self.error is not None:
            return
        clean = _finite(values)
        with self._noting_errors():
            self._file.write(json.dumps({"event": event, **clean}, allow_nan=False) + "\n")
            if self._board is not None:
                self._board.write(event, values)

    def write_experts(self, step: int, layers: list[dict[str, Any]]) -> None:
        """What the experts serve at this evaluation, by layer, in place of what was there before."""
        if self.error is None and layers:
            with self._noting_errors():
                write_text_atomically(self._experts, json.dumps({"step": step, "layers": layers}) + "\n")

    def show_stores(self, step: int, stores: list[KeyStore]) -> None:
        """The key stores at an evaluation, for the board only."""
        if self._board is not None:
            with self._noting_errors():
                self._board.show_stores(step, stores)

    def sync(self) -> None:
        """Bring every record down to the disk: a checkpoint must not outlive the records of its steps."""
        with self._noting_errors():
            os.fsync(self._file.fileno())

    @contextmanager
    def _noting_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.error = self.error or StorageError(
                f"{self._path}: cannot be written ({error.strerror}), {describe_free(self._path.parent)}; make room and "
                f"give the same command again"
            )

    def close(self) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()


def _is_after(path: Path, step: int) -> bool:
    """Whether an `experts.json` is of a later step than this one, as far as can be told: a damaged one may be."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))["step"] > step
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return True


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
