"""How evenly a trained model's experts would load 2, 4 or 8 ranks: as blocks of ids, balanced, and with replicas.

    python tools/balance.py RUN_DIR|CHECKPOINT [--ranks 2 4 8] [--replicas auto|N] [--json]

Reads the usage that the key stores of a checkpoint keep, makes the plans that `parallel.placement = balanced` would make
from it, and prints the load of the busiest rank over the mean, with the memory of the pool beside it.
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
from trainer.checkpoint import KEYS, newest_checkpoint, read_state
from trainer.config import experiment_from_dict
from trainer.text import error_line

GIB = 2**30
RANKS = (2, 4, 8)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="tools/balance.py", description="Load of ranks under each placement of experts.")
    parser.add_argument(
        "checkpoint", type=Path, metavar="RUN_DIR|CHECKPOINT", help="a run's folder, or one checkpoint of it"
    )
    parser.add_argument("--ranks", type=int, nargs="+", metavar="P", help="ranks that share a pool (default: 2 4 8)")
    parser.add_argument(
        "--replicas", default="auto", metavar="auto|N", help="copies a layer in the last row (default: auto)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    arguments = parser.parse_args()
    try:
        figures = measure(arguments.checkpoint, arguments.ranks, _replicas(arguments.replicas))
    except ValueError as error:
        print(error_line(error), file=sys.stderr)
        sys.exit(2)
    print(json.dumps(figures, indent=1) if arguments.json else table(figures))


def measure(path: Path, ranks: list[int] | None = None, replicas: int | str = "auto") -> dict[str, Any]:
    """What the table shows, and the figures of every layer.

    Args:
        path: a run's folder or a checkpoint's.
        ranks: numbers of ranks that share a pool; None = those of `RANKS` that divide the experts.
        replicas: as `parallel.replicas`.

    Raises:
        ValueError: no checkpoint, a model without experts, one that has not trained, ranks that do not divide the experts,
            more replicas than there is room for.
    """
    folder = path if (path / "state.json").exists() else newest_checkpoint(path / "checkpoints") or newest_checkpoint(path)
    if folder is None:
        raise ValueError(f"{path}: holds no checkpoint; give a run's folder or one of its checkpoints/step_* folders")
    state = read_state(folder)
    experiment, stores = experiment_from_dict(state.experiment), load_file(folder / KEYS)
    model, some = experiment.model, experiment.model.some
    if model.channel_mixer != "some":
        raise ValueError(f"{folder}: model.channel_mixer = {model.channel_mixer} has no experts; give a SoME model's run")
    load_LE = [stores[f"{layer}/usage"].tolist() for layer in range(model.num_layers)]
    if not all(any(load_E) for load_E in load_LE):
        raise ValueError(f"{folder}: no tokens were counted up to step {state.step}; give a checkpoint of a trained model")
    E, expert_bytes = some.num_experts, some.num_expert_parameters() * (2 if state.precision == "bf16" else 4)
    rows = []
    for P in ranks or [P for P in RANKS if E % P == 0]:
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
        for name, way in ways.items():
            rows.append(
                {"ranks": P, "placement": name, **_figures([way(load_E) for load_E in load_LE], load_LE, expert_bytes)}
            )
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
    lines = [
        f"{figures['experiment']}, step {figures['step']}, {figures['experts']} experts a layer: "
        f"load of the busiest rank over the mean",
        "",
        "| ranks | placement | mean of layers | worst layer | replicas a layer | pool a rank, GiB |",
        "|---|---|---|---|---|---|",
    ]
    for row in figures["rows"]:
        lines.append(
            f"| {row['ranks']} | {row['placement']} | {row['load_max_over_mean']:.3f} | {row['worst_layer']:.3f} "
            f"| {row['replicas']:.1f} | {row['pool_bytes_a_rank'] / GIB:.3f} |"
        )
    return "\n".join(lines)


def _replicas(text: str) -> int | str:
    if text == "auto":
        return text
    if not text.isdecimal():
        raise ValueError(f"--replicas {text}: is neither a number nor auto; give one of them")
    return int(text)


if __name__ == "__main__":
    main()
