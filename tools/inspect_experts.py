"""What the experts of a trained model do with a text.

    python tools/inspect_experts.py runs/quickstart --text "Once upon a time there was a cat."
    python tools/inspect_experts.py runs/a4 --file story.txt --disable 3:17 --html experts.html
    python tools/inspect_experts.py runs/a4/checkpoints/step_00000100 --data --json experts.json   # the validation split

Shows which experts every token visits in each layer, with their gates; which tokens each expert serves most; which experts
overlap; and with --disable what changes when one adds nothing. A token stands beside the experts of the position where the
model reads it; the loss beside it is that of predicting the next.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from rich.console import Console
from rich.table import Table
from rich.text import Text

from tools.checkpoints import dtype_of, find_data, load_model
from tools.expert_figures import check_experts, describe_change, describe_layers, describe_tokens, perplexity
from tools.expert_page import page
from tools.expert_tables import headline, tables
from tools.expert_traces import disabled, tokenise, trace
from tools.outputs import check_writable, read_paths, write_output
from tools.runs import EXIT_FAILED, EXIT_REFUSED
from trainer.config import Experiment, experiment_from_dict
from trainer.console import all_printed, guard_streams
from trainer.data import Dataset, Sequences, open_data
from trainer.data.files import checked_text
from trainer.memory import host_bytes
from trainer.numerics import set_numerics
from trainer.paths import local_path
from trainer.plan import GIB, expert_bytes
from trainer.resume import checkpoint_at
from trainer.text import error_line

SEQUENCES = 64
ROWS = 200


def main() -> None:
    """The command line."""
    guard_streams()
    parser = argparse.ArgumentParser(prog="tools/inspect_experts.py", description="What experts do with a text.")
    parser.add_argument("checkpoint", metavar="RUN_DIR|CHECKPOINT", help="a run's folder, or a checkpoint of it")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--text", help="the text")
    source.add_argument("--file", help="a file with the text, in UTF-8")
    source.add_argument("--data", action="store_true", help="the beginning of the run's validation split")
    parser.add_argument("--sequences", type=int, metavar="N", help=f"with --data: how much of it (default: {SEQUENCES})")
    parser.add_argument("--disable", action="append", default=[], metavar="LAYER:EXPERT", help="see what changes without it")
    parser.add_argument("--layers", type=int, nargs="+", metavar="N", help="show only these, from 0 (default: all)")
    parser.add_argument("--rows", type=int, default=ROWS, metavar="N", help=f"tokens in tables (default: {ROWS})")
    parser.add_argument("--json", metavar="FILE", help="write all figures, of every token and layer")
    parser.add_argument("--html", metavar="FILE", help="write a page")
    parser.add_argument("--data_path", metavar="PATH", help="where the run's data lies now (data.path)")
    arguments = parser.parse_args()
    try:
        arguments.checkpoint = Path(local_path(arguments.checkpoint, "RUN_DIR|CHECKPOINT"))
        read_paths(arguments, "file", "json", "html")
        check_flags(arguments)
        text = arguments.text if arguments.file is None else read_text(arguments.file)
        count = arguments.sequences or SEQUENCES
        figures = inspect(arguments.checkpoint, text, count, arguments.disable, arguments.data_path, arguments.layers)
        shown = select(figures, arguments.layers, arguments.rows)
        if arguments.json is not None:
            write_output(arguments.json, json.dumps(figures, indent=1) + "\n", "--json")
        if arguments.html is not None:
            write_output(arguments.html, page(shown), "--html")
    except ValueError as error:
        print(error_line(error), file=sys.stderr)
        sys.exit(EXIT_REFUSED)
    show(shown, Console())
    if not all_printed():
        sys.exit(EXIT_FAILED)


def check_flags(arguments: argparse.Namespace) -> None:
    """Raises ValueError for what can be refused before anything is computed."""
    for flag in ("sequences", "rows"):
        value = getattr(arguments, flag)
        if value is not None and value < 1:
            raise ValueError(f"--{flag} {value}: must be at least 1")
    if arguments.sequences is not None and not arguments.data:
        raise ValueError(f"--sequences {arguments.sequences}: is for --data; leave it out, or ask for --data")
    for flag in ("json", "html"):
        path = getattr(arguments, flag)
        if path is not None:
            check_writable(path, f"--{flag}")


def inspect(
    path: Path,
    text: str | None,
    count: int = SEQUENCES,
    disable: list[str] | None = None,
    data_path: str | None = None,
    layers: list[int] | None = None,
) -> dict[str, Any]:
    """All figures.

    Args:
        path: a run's folder or a checkpoint's.
        text: None = the first `count` sequences of the run's validation split.
        count: see `text`.
        disable: `LAYER:EXPERT`, each by itself.
        data_path: where the run's data lies now; its tokenizer comes from there.
        layers: that somebody wants to see; all are described, and these must be there.

    Raises:
        ValueError: no checkpoint, a model without experts, experts larger than memory, other data than
            the run's, an empty text, no such expert or layer.
    """
    found = checkpoint_at(path)
    state, experiment = found.state, experiment_from_dict(found.state.experiment)
    if experiment.model.channel_mixer != "some":
        raise ValueError(
            f"{found.folder}: model.channel_mixer = {experiment.model.channel_mixer} has no experts to route to"
        )
    if experiment.model.some.permute_in_evaluation:
        raise ValueError(f"{found.folder}: control = permuted_experts serves tokens by other experts than they choose")
    for layer in layers or []:
        if not 0 <= layer < experiment.model.num_layers:
            raise ValueError(f"--layers {layer}: the model has layers 0 to {experiment.model.num_layers - 1}")
    check_memory(experiment, state.precision, found.folder)
    if text is not None and not checked_text(text, "the text").strip():
        raise ValueError("the text is empty; give one with --text or --file, or --data")
    data = open_data(find_data(experiment, data_path, state.data_fingerprint))
    sequences = _sequences(text, data)
    set_numerics(deterministic=False)
    model = load_model(found.folder, state, experiment)
    wanted = check_experts(disable or [], model)
    micro_batch = experiment.train.max_micro_batch
    count = count if text is None else len(sequences)
    whole = trace(model, sequences, count, micro_batch)
    changes = []
    for layer, expert in wanted:
        with disabled(model, layer, expert):
            without = trace(model, sequences, count, micro_batch)
        changes.append(describe_change(layer, expert, whole, without, data.tokenizer))
    loss = float(whole.losses_T.mean())
    return {
        "checkpoint": str(found.folder),
        "experiment": experiment.name,
        "step": state.step,
        "num_experts": experiment.model.some.num_experts,
        "top_k": experiment.model.some.top_k,
        "source": "validation split" if text is None else "text",
        "sequences": min(count, len(sequences)),
        "num_tokens": len(whole.losses_T),
        "loss": loss,
        "perplexity": perplexity(loss),
        "tokens": describe_tokens(whole, data.tokenizer),
        "layers": describe_layers(whole, experiment.model.some.num_experts, data.tokenizer),
        "disabled": changes,
    }


def check_memory(experiment: Experiment, precision: str, folder: Path) -> None:
    """Raises ValueError for experts that this machine cannot hold, which one process does here."""
    model = experiment.model
    size = model.num_layers * model.some.num_experts * expert_bytes(model, dtype_of(precision).itemsize)
    if size > host_bytes():
        raise ValueError(
            f"{folder}: its experts take {size / GIB:,.1f} GiB and this machine has {host_bytes() / GIB:,.1f}; use another"
        )


def _sequences(text: str | None, data: Dataset) -> Sequences:
    if text is None:
        return data.validation
    return tokenise(text, data.tokenizer, data.summary["vocab_size"], data.train.layout)


def read_text(path: Path) -> str:
    """Raises ValueError for a file that is no text in UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"--file {path}: cannot be read ({error.strerror}); give an existing file") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"--file {path}: is not text in UTF-8 (byte {error.start}); convert it") from None


def select(figures: dict[str, Any], layers: list[int] | None, rows: int) -> dict[str, Any]:
    """The part of the figures that is shown."""
    kept = [layer for layer in range(len(figures["layers"])) if not layers or layer in layers]
    tokens = [
        token | {key: [token[key][layer] for layer in kept] for key in ("experts", "gates")}
        for token in figures["tokens"][:rows]
    ]
    return figures | {"tokens": tokens, "layers": [figures["layers"][layer] for layer in kept]}


def show(figures: dict[str, Any], console: Console) -> None:
    """Print it as tables."""
    console.print(Text(headline(figures), style="bold"))
    for title, head, rows in tables(figures):
        table = Table(box=None, pad_edge=False, header_style="dim")
        for name in head:
            table.add_column(Text(name), vertical="top")
        for row in rows:
            table.add_row(*map(Text, row))
        console.print(Text(), Text(title, style="bold"), table, sep="\n")


if __name__ == "__main__":
    main()
