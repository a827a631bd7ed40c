"""How evenly a trained model's experts would load 2, 4 or 8 ranks: as blocks of ids, balanced, and with replicas.

    python tools/balance.py RUN_DIR|CHECKPOINT [--ranks 2 4 8] [--replicas auto|N] [--json]
    python tools/balance.py RUN_DIR|CHECKPOINT --ranks 2 4 --time        # and how long the layers take

Reads the usage that the key stores of a checkpoint keep, makes the plans that `parallel.placement = balanced` would make
from it, and prints the load of the busiest rank over the mean, with the memory of the pool beside it. With --time, ranks on
this machine's cores replay how the trained model routes its next batch (`tools/balance_time.py`).
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from safetensors.torch import load_file

from modeling.some.balance import plan
from modeling.some.placement import Placement
from tools.balance_time import Replay, time_ways
from tools.bench_table import BenchmarkFailed, spread
from tools.checkpoints import find_data
from tools.runs import EXIT_FAILED, EXIT_REFUSED, EXIT_STOPPED, stop_on_signals
from trainer.checkpoint import KEYS
from trainer.config import experiment_from_dict
from trainer.console import all_printed, guard_streams
from trainer.paths import local_path
from trainer.plan import GIB, expert_bytes
from trainer.resume import checkpoint_at
from trainer.text import error_line

RANKS = (2, 4, 8)


def main() -> None:
    """The command line."""
    guard_streams()
    parser = argparse.ArgumentParser(prog="tools/balance.py", description="Load of ranks under each placement of experts.")
    parser.add_argument("checkpoint", metavar="RUN_DIR|CHECKPOINT", help="a run's folder, or one checkpoint of it")
    parser.add_argument("--ranks", type=int, nargs="+", metavar="P", help="ranks that share a pool (default: 2 4 8)")
    parser.add_argument(
        "--replicas", default="auto", metavar="auto|N", help="copies a layer in the last row (default: auto)"
    )
    parser.add_argument("--time", action="store_true", help="also time the layers on that many ranks of this machine")
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="with --time: counted turns (default 5)")
    parser.add_argument("--data_path", metavar="PATH", help="with --time: where the run's data lies now (data.path)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    arguments = parser.parse_args()
    try:
        with stop_on_signals():
            figures = measure(
                Path(local_path(arguments.checkpoint, "RUN_DIR|CHECKPOINT")),
                arguments.ranks,
                _replicas(arguments.replicas),
                _repeats(arguments.repeats) if arguments.time else 0,
                arguments.data_path,
            )
    except (ValueError, BenchmarkFailed) as error:
        print(error_line(error), file=sys.stderr)
        sys.exit(EXIT_REFUSED if isinstance(error, ValueError) else EXIT_FAILED)
    except KeyboardInterrupt:
        sys.exit(EXIT_STOPPED)
    print(json.dumps(figures, indent=1) if arguments.json else table(figures))
    if not all_printed():
        sys.exit(EXIT_FAILED)


def measure(
    path: Path,
    ranks: list[int] | None = None,
    replicas: int | str = "auto",
    repeats: int = 0,
    data_path: str | None = None,
) -> dict[str, Any]:
    """What the table shows, and the figures of every layer.

    Args:
        path: a run's folder or a checkpoint's.
        ranks: numbers of ranks that share a pool; None = those of `RANKS` that divide the experts.
        replicas: as `parallel.replicas`.
        repeats: turns in which the layers are timed; 0 = they are not.
        data_path: `data.path` of the text that they are timed on; None = the checkpoint's.

    Raises:
        ValueError: no checkpoint, a model without experts, one that has not trained, ranks below 1 or that do not divide the
            experts (for timing: or the batch), more replicas than there is room for, data that is not the checkpoint's.
        BenchmarkFailed: a rank ended early.
    """
    found = checkpoint_at(path)
    folder, state = found.folder, found.state
    experiment, stores = experiment_from_dict(state.experiment), load_file(folder / KEYS)
    model, some = experiment.model, experiment.model.some
    if model.channel_mixer != "some":
        raise ValueError(f"{folder}: model.channel_mixer = {model.channel_mixer} has no experts; give a SoME model's run")
    load_LE = [stores[f"{layer}/usage"].tolist() for layer in range(model.num_layers)]
    if not all(any(load_E) for load_E in load_LE):
        raise ValueError(f"{folder}: no tokens were counted up to step {state.step}; give a checkpoint of a trained model")
    E, size = some.num_experts, expert_bytes(model, 2 if state.precision == "bf16" else 4)
    ranks = ranks or [P for P in RANKS if E % P == 0]
    if not ranks:
        raise ValueError(f"none of 2, 4 and 8 ranks divides model.some.num_experts = {E}; name others with --ranks")
    if min(ranks) < 1:
        raise ValueError(f"--ranks {min(ranks)}: must be at least 1")
    data = find_data(experiment, data_path, state.data_fingerprint) if repeats else None
    rows = []
    for P in ranks:
        contiguous = Placement.contiguous(E, P)
        room = E * (P - 1)
        if replicas != "auto" and not 0 <= replicas <= room:
            raise ValueError(
                f"--replicas {replicas}: {P} ranks have room for 0 to {room}; give a number in between, or auto"
            )
        ways: dict[str, Callable[[list[float]], Placement]] = {
            "contiguous": lambda load_E, start=contiguous: start,
            "balanced": lambda load_E, start=contiguous: plan(load_E, 0, start),
            f"balanced, replicas {replicas}": lambda load_E, start=contiguous: plan(load_E, replicas, start),
        }
        placements = {name: [way(load_E) for load_E in load_LE] for name, way in ways.items()}
        times = time_ways(Replay.of(folder, experiment, data, P, placements), P, repeats) if repeats else {}
        for name, chosen in placements.items():
            row = {"ranks": P, "placement": name, **_figures(chosen, load_LE, size)}
            if repeats:
                row |= {**spread(times[name].milliseconds), "held_bytes_a_rank": times[name].held_bytes}
            rows.append(row)
    return {"checkpoint": str(folder), "experiment": experiment.name, "step": state.step, "experts": E, "rows": rows}


def _figures(placements: list[Placement], load_LE: list[list[float]], expert_bytes: int) -> dict[str, Any]:
    ratios = [placement.max_over_mean(load_E) for placement, load_E in zip(placements, load_LE, strict=True)]
    slots_P = [sum(map(len, shards)) for shards in zip(*[p.expert_ids_P for p in placements], strict=True)]
    return {
        "load_max_over_mean": fmean(ratios),
        "worst_layer": max(ratios),
        "replicas": fmean(placement.num_replicas for placement in placements),
        "pool_bytes_a_rank": max(slots_P) * expert_bytes,
        "layers": ratios,
    }


def table(figures: dict[str, Any]) -> str:
    """Markdown."""
    timed = "ms" in figures["rows"][0]
    columns = ["ranks", "placement", "mean of layers", "worst layer", "replicas a layer", "pool a rank, GiB"]
    columns += ["experts and exchange, ms a step (min to max)"] * timed
    lines = [
        f"{figures['experiment']}, step {figures['step']}, {figures['experts']} experts a layer: "
        f"load of the busiest rank over the mean",
        "",
        f"| {' | '.join(columns)} |",
        "|---" * len(columns) + "|",
    ]
    for row in figures["rows"]:
        time = f" {row['ms']:,.1f} ({row['ms_min']:,.1f} to {row['ms_max']:,.1f}) |" if timed else ""
        lines.append(
            f"| {row['ranks']} | {row['placement']} | {row['load_max_over_mean']:.3f} | {row['worst_layer']:.3f} "
            f"| {row['replicas']:.1f} | {row['pool_bytes_a_rank'] / GIB:.3f} |{time}"
        )
    return "\n".join(lines)


def _repeats(number: int) -> int:
    if number < 1:
        raise ValueError(f"--repeats {number}: must be at least 1")
    return number


def _replicas(text: str) -> int | str:
    if text == "auto":
        return text
    if not text.isdecimal():
        raise ValueError(f"--replicas {text}: is neither a number nor auto; give one of them")
    return int(text)


if __name__ == "__main__":
    main()
