"""What padding does to the published measures: one trained model, measured with and without it.

    python tools/padding.py RUN_DIR

Reads the last evaluation of a run whose padding is counted (`data.count_padding`), and puts beside it what a model would
show that sends all padding to the same K experts and spreads real tokens evenly over the others (specs section 7.1).
"""

import argparse
import json
import math
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    sys.path[0] = str(REPOSITORY)

from tools.outputs import check_writable, read_paths, write_output
from tools.runs import EXIT_FAILED, EXIT_REFUSED, Run, read_run
from trainer.console import all_printed, guard_streams
from trainer.paths import local_path
from trainer.text import error_line


def main() -> None:
    """The command line."""
    guard_streams()
    parser = argparse.ArgumentParser(prog="tools/padding.py", description="A run's measures with and without padding.")
    parser.add_argument("run", metavar="RUN_DIR", help="folder of a run with data.count_padding = true")
    parser.add_argument("--json", metavar="FILE", help="also write the figures as JSON")
    arguments = parser.parse_args()
    try:
        read_paths(arguments, "json")
        if arguments.json is not None:
            check_writable(arguments.json, "--json")
        figures = measure(Path(local_path(arguments.run, "RUN_DIR")))
        if arguments.json is not None:
            write_output(arguments.json, json.dumps(figures, indent=1) + "\n", "--json")
    except ValueError as error:
        print(error_line(error), file=sys.stderr)
        sys.exit(EXIT_REFUSED)
    print(table(figures))
    if not all_printed():
        sys.exit(EXIT_FAILED)


def measure(folder: Path) -> dict:
    """Losses and routing with and without padding.

    Raises:
        ValueError: no run, no evaluation, one that counts no padding, or a last loss that is not finite.
    """
    run = read_run(folder)
    if not run.evals:
        raise ValueError(f"{folder}: holds no run with an evaluation; give a run's output folder")
    if not run.experiment.data.count_padding or not run.evals[-1]["layers"]:
        raise ValueError(f"{folder}: data.count_padding = false, or no SoME layer; give a run that routes padding")
    last = run.evals[-1]
    if last["val_loss"] is None or last["val_loss_with_padding"] is None:
        raise ValueError(f"{folder}: the last loss is not finite (step {last['step']}); give a run that has not diverged")
    return _measure(run)


def _measure(run: Run) -> dict:
    last, model = run.evals[-1], run.experiment.model
    E, K, S = model.some.num_experts, model.some.top_k, model.max_seq_len
    stories = run.how["data"]["validation"]["documents"]
    routed = stories * S
    share = 1 - last["val_tokens"] / routed
    return {
        "experiment": run.experiment.name,
        "step": last["step"],
        "total_steps": run.start["total_steps"],
        "experts": E,
        "top_k": K,
        "row_length": S,
        "padding_share": share,
        "val_loss": last["val_loss"],
        "val_loss_with_padding": last["val_loss_with_padding"],
        "nats_per_story": last["nats_per_story"],
        "gini_floor": gini_floor(share, E, K),
        "entropy_ceiling": entropy_ceiling(share, E, K),
        "layers": [
            {
                key: layer[key]
                for key in (
                    "layer", "gini", "gini_with_padding", "usage_gini",
                    "entropy_bits", "entropy_bits_with_padding", "usage_entropy_bits",
                )
            }
            for layer in last["layers"]
        ],
        "middle_layer": len(last["layers"]) // 2,
        "how": run.how,
    }  # fmt: skip


def gini_floor(share: float, experts: int, top_k: int) -> float:
    """Gini of usage when a `share` of all positions goes to the same K experts and the rest evenly to the others."""
    return max(0.0, share - top_k / experts)


def entropy_ceiling(share: float, experts: int, top_k: int) -> float:
    """Entropy in bits of the same usage."""
    padded = share * math.log2(share / top_k) if share > 0 else 0.0
    real = (1 - share) * math.log2((1 - share) / (experts - top_k)) if share < 1 and experts > top_k else 0.0
    return -padded - real


def table(figures: dict) -> str:
    """Markdown."""
    ppl, ppl_padded = math.exp(figures["val_loss"]), math.exp(figures["val_loss_with_padding"])
    lines = [
        f"{figures['experiment']}, step {figures['step']} of {figures['total_steps']}: rows of {figures['row_length']}, "
        f"{figures['padding_share']:.1%} of the positions without a real target; E = {figures['experts']}, "
        f"K = {figures['top_k']}.",
        "",
        "| measure | real tokens only | with padding, as published | closed form of pure padding |",
        "|---|---|---|---|",
        f"| validation loss | {figures['val_loss']:.4f} | {figures['val_loss_with_padding']:.4f} | |",
        f"| perplexity | {ppl:,.2f} | {ppl_padded:,.2f} | |",
    ]
    for layer in figures["layers"]:
        name = f"layer {layer['layer']}" + (" (the published one)" if layer["layer"] == figures["middle_layer"] else "")
        lines.append(
            f"| Gini, {name} | {layer['gini']:.3f} | {layer['gini_with_padding']:.3f} (training average "
            f"{layer['usage_gini']:.3f}) | floor {figures['gini_floor']:.3f} |"
        )
        lines.append(
            f"| entropy in bits, {name} | {layer['entropy_bits']:.3f} | {layer['entropy_bits_with_padding']:.3f} (training "
            f"average {layer['usage_entropy_bits']:.3f}) | ceiling {figures['entropy_ceiling']:.3f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
