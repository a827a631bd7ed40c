"""How a run routed tokens: measures over layers and steps, and the usage of every expert.

Shapes: S evaluations, L layers, E experts, N records of steps.
"""

from typing import Any

import numpy as np

from tools.reporting.curves import MOST_EVALUATIONS, plain, spread_out
from tools.runs import Run, number

MEASURES = {
    "gini": "Gini of usage",
    "gini_of_bound": "Gini over its bound 1 - k/E",
    "entropy_bits": "entropy of usage, bits",
    "effective_experts": "effective experts, 2^entropy",
    "dead_experts": "experts that no validation token chose",
    "load_max_over_mean": "load of the busiest rank over the mean",
    "coselected_cosine": "mean cosine of keys chosen together",
    "largest_gate": "mean largest gate",
    "output_over_residual": "RMS(experts) / RMS(residual stream)",
    "respawns": "respawned keys so far",
    "usage_gini": "Gini of the training usage average",
    "usage_entropy_bits": "entropy of the training usage average, bits",
    "key_movement": "mean distance a key moved in the step",
}
"""Each measure and what it is."""
MOST_COUNTS = 12
"""Most evaluations of which the page holds the usage of every expert."""


def routing(run: Run, with_experts: bool) -> dict[str, Any] | None:
    """What the page shows of a run's routing; None where it routes nothing.

    Returns:
        `measures`: name to `steps` (S), `values` (S x L) and `records`, from how many those were taken: evaluations evenly,
        of key movement the largest in each of S stretches; `counts` (with_experts): `steps` and `values` (S x L x E),
        choices by real validation tokens.
    """
    evals = [record for record in run.evals if record["layers"]]
    if run.experiment is None or not evals:
        return None
    layers = len(evals[-1]["layers"])
    evals = [record for record in evals if len(record["layers"]) == layers]
    picked = spread_out(evals, MOST_EVALUATIONS)
    E, measures = run.experiment.model.some.num_experts, {}
    for name in MEASURES:
        values = [[_value(layer, name, E) for layer in record["layers"]] for record in picked]
        if any(value is not None for row in values for value in row):
            measures[name] = {"steps": [record["step"] for record in picked], "values": values, "records": len(evals)}
    moves = [r for r in run.of("train") if isinstance(r.get("key_movement"), list) and len(r["key_movement"]) == layers]
    if moves:
        measures["key_movement"] = _largest(moves)
    counted = [r for r in evals if all(_is_counts(layer.get("expert_counts"), E) for layer in r["layers"])]
    counted = spread_out(counted, MOST_COUNTS) if with_experts else []
    return {
        "layers": layers,
        "measures": measures,
        "counts": {
            "steps": [record["step"] for record in counted],
            "values": [[layer["expert_counts"] for layer in record["layers"]] for record in counted],
        },
    }


def _largest(moves: list[dict[str, Any]]) -> dict[str, Any]:
    """Of each layer the largest key movement in each of up to MOST_EVALUATIONS stretches, named by their last steps."""
    values_NL = np.array([[number(value) for value in record["key_movement"]] for record in moves], dtype=np.float64)
    stretches = np.array_split(np.arange(len(moves)), min(MOST_EVALUATIONS, len(moves)))
    return {
        "steps": [moves[part[-1]]["step"] for part in stretches],
        "values": [plain(np.fmax.reduce(values_NL[part]), 4) for part in stretches],
        "records": len(moves),
    }


def _value(layer: dict[str, Any], name: str, num_experts: int) -> float | None:
    if name == "dead_experts":
        used = number(layer.get("experts_used"))
        return None if used is None else num_experts - used
    return _short(layer.get(name))


def _short(value: Any) -> float | None:
    value = number(value)
    return None if value is None else float(f"{value:.4g}")


def _is_counts(counts: Any, num_experts: int) -> bool:
    return isinstance(counts, list) and len(counts) == num_experts and all(number(count) is not None for count in counts)
