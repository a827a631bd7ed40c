"""What a job will need and how best to run it, before it is submitted: memory, traffic, step time, EP size, micro batch.

    python tools/plan.py b3 --machine h100x8 --nodes 2
    python tools/plan.py b3 --machine h100x8 --nodes 2 --plot scaling.png --json plan.json
    python tools/plan.py b3 --machine cluster.yaml --set model.some.num_experts=4096 --usage runs/b3 --row_tokens 220
    torchrun --nproc-per-node 2 tools/plan.py quickstart --calibrate this_machine.yaml    # measures and compares

Nothing is built and no device is touched, except by --calibrate. Memory and traffic are those of `--dry_run`.
"""

import argparse
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    sys.path[0] = str(REPOSITORY)

from tools.options import Cluster, Option, all_options, as_it_stands, best_of_each, largest_difference, why
from tools.outputs import check_writable, read_paths, write_output
from tools.runs import EXIT_FAILED, EXIT_REFUSED
from trainer.cluster import Machine, read_machine
from trainer.config import Experiment, load_experiment
from trainer.console import all_printed, guard_streams
from trainer.ds_config import load_ds_config, precision_of, set_precision
from trainer.launch import Launch
from trainer.layout import Layout
from trainer.paths import local_path
from trainer.plain_yaml import parse_float
from trainer.plan import GIB, Sharding, parts
from trainer.precision import AUTO
from trainer.text import error_line
from trainer.usage import read_usage

MACHINES = Path(__file__).parent / "machines.yaml"
LINKS = ("in_node", "between_nodes")
RUNNERS_UP = 8


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(
        prog="tools/plan.py", description="Plan a job: memory, traffic, time and the best way to run it.", allow_abbrev=False
    )
    add = parser.add_argument
    add("experiment", metavar="NAME|FILE.yaml", help="what to train; trainer/run.py --list names the shipped ones")
    add("--set", action="append", default=[], metavar="a.b=c", help="change one key of the experiment")
    add("--ds_config", default=str(REPOSITORY / "ds_configs" / "zero2.json"), metavar="FILE", help="DeepSpeed JSON")
    add(
        "--machine", default="h100x8", metavar="NAME|FILE.yaml", help="a node; tools/machines.yaml has them (default h100x8)"
    )
    add("--nodes", type=int, default=1, metavar="N", help="nodes (default 1)")
    add("--ranks_per_node", type=int, metavar="N", help="ranks on each (default: as many as the machine has)")
    add("--bandwidth", action="append", default=[], metavar="LINK=GB/S", help="of in_node or between_nodes, one direction")
    add("--usage", default="zipf:0.6", metavar="zipf:S|RUN", help="how evenly experts are used (default zipf:0.6)")
    add(
        "--row_tokens",
        type=int,
        metavar="N",
        help="mean tokens in a row, with padding, for traffic and time (default: the longest)",
    )
    add("--json", metavar="FILE", help="write all figures there")
    add("--plot", metavar="FILE.png|.svg", help="draw step time over ranks and over experts")
    add("--calibrate", metavar="FILE.yaml", help="measure this machine into FILE, and compare a real step with the plan")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    guard_streams()
    try:
        code = plan(parse_arguments(arguments))
    except ValueError as error:
        print(error_line(error), file=sys.stderr, flush=True)
        code = EXIT_REFUSED
    sys.exit(code)


def plan(arguments: argparse.Namespace) -> int:
    """Everything that was asked for; the exit code, 1 where nothing fits.

    Raises:
        ValueError: what cannot work.
    """
    read_paths(arguments, "json", "plot", "calibrate")
    for name in ("ds_config", "machine", "usage"):
        setattr(arguments, name, local_path(getattr(arguments, name), f"--{name}"))
    experiment = load_experiment(arguments.experiment, arguments.set)
    if arguments.calibrate:
        from tools.calibrate import calibrate

        check_calibrates_alone(arguments)
        base = with_bandwidths(read_machine(arguments.machine, MACHINES), arguments.bandwidth)
        calibrate(experiment, arguments.ds_config, base, arguments.calibrate)
        return 0
    if arguments.plot:
        # Refused before any work where matplotlib is missing.
        from tools.scaling import check_plot, draw

        check_plot(arguments.plot)
    if arguments.json:
        check_writable(arguments.json, "--json")
    cluster = read_cluster(arguments, experiment)
    model = experiment.model
    usage = read_usage(arguments.usage, model.num_layers, model.some.num_experts, model.some.top_k)
    standing, options = as_it_stands(experiment, cluster, usage), all_options(experiment, cluster, usage)
    # The files first: whoever reads what is printed may stop early.
    if arguments.json:
        write_json(arguments.json, experiment, cluster, standing, options)
    if arguments.plot:
        draw(arguments.plot, experiment, cluster, arguments.usage)
    print(report(experiment, cluster, standing, options, arguments.usage))
    if arguments.plot:
        print(f"picture: {arguments.plot}")
    return 0 if options[0].fits and all_printed() else EXIT_FAILED


def check_calibrates_alone(arguments: argparse.Namespace) -> None:
    """Refuse flags of a plan beside --calibrate, which makes none.

    Raises:
        ValueError: naming one of them.
    """
    defaults = parse_arguments([arguments.experiment])
    for name in ("nodes", "ranks_per_node", "usage", "row_tokens", "json", "plot"):
        value = getattr(arguments, name)
        if value != getattr(defaults, name):
            raise ValueError(
                f"--{name} {value}: --calibrate measures the ranks that it runs on and plans nothing; leave it out here and "
                f"give it with --machine {arguments.calibrate} afterwards"
            )


def read_cluster(arguments: argparse.Namespace, experiment: Experiment) -> Cluster:
    """The ranks that the flags describe.

    Raises:
        ValueError: a number below 1, more ranks than the machine has, an unknown link, or a job that cannot run there.
    """
    machine = with_bandwidths(read_machine(arguments.machine, MACHINES), arguments.bandwidth)
    ranks_per_node = machine.ranks_per_node if arguments.ranks_per_node is None else arguments.ranks_per_node
    for name, value in (
        ("nodes", arguments.nodes),
        ("ranks_per_node", ranks_per_node),
        ("row_tokens", arguments.row_tokens),
    ):
        if value is not None and value < 1:
            raise ValueError(f"--{name} {value}: must be at least 1")
    if ranks_per_node > machine.ranks_per_node:
        raise ValueError(
            f"--ranks_per_node {ranks_per_node}: {arguments.machine} has {machine.ranks_per_node} a node; use more --nodes"
        )
    longest = experiment.model.max_seq_len
    if arguments.row_tokens is not None and arguments.row_tokens > longest:
        raise ValueError(f"--row_tokens {arguments.row_tokens}: rows have at most model.max_seq_len = {longest} tokens")
    ranks = arguments.nodes * ranks_per_node
    layout = Layout.of(experiment, Launch(0, ranks, 0, ranks_per_node))
    config = load_ds_config(arguments.ds_config, experiment, layout, ranks)
    sharding = Sharding.of(set_precision(config, machine.precision))
    is_open = precision_of(config) == AUTO
    return Cluster(machine, arguments.nodes, ranks_per_node, sharding, arguments.row_tokens, is_open)


def with_bandwidths(machine: Machine, overrides: list[str]) -> Machine:
    """The machine with `in_node=300` and the like in place of its own figures."""
    for override in overrides:
        link, _, text = override.partition("=")
        if link not in LINKS:
            raise ValueError(f"--bandwidth {override}: write it as in_node=GB/S or between_nodes=GB/S")
        try:
            machine = replace(machine, **{f"{link}_gb_s": parse_float(text) or 0.0})
        except ValueError:
            raise ValueError(f"--bandwidth {override}: must be a number greater than 0, in 1e9 bytes/s") from None
    return machine


def report(experiment: Experiment, cluster: Cluster, standing: Option, options: list[Option], usage: str) -> str:
    """The plan as text."""
    best, machine, row = options[0], cluster.machine, cluster.row_tokens or experiment.model.max_seq_len
    precision = "bf16" if cluster.sharding.bf16 else "fp32"
    if cluster.assumes_precision:
        precision += " (auto: assumed from the machine's rates)"
    lines = [
        f"{experiment.name}: {experiment.model.num_parameters().total:,} parameters, {precision}, batches of "
        f"{experiment.train.batch_size} rows of {row} tokens, usage {usage}",
        f"on {cluster.nodes} node(s) of {machine.describe}: {cluster.ranks} rank(s), {machine.usable / GIB:.1f} GiB each",
        "",
        f"best       {_words(best)}" if best.fits else "best       none",
        f"why        {why(options, machine)}",
        f"speed      {1e3 * best.time.total:,.1f} ms a step, {best.tokens_per_second:,.0f} tokens/s",
        f"settings   {' '.join(f'--set {setting}' for setting in best.settings(experiment.parallel))}",
        "",
        *_columns(best),
        "",
        f"{'ep':>5} {'placement':10} {'replicas':>8} {'micro':>5} {'accum':>5} {'GiB':>7} {'max/mean':>8} {'ms/step':>9} "
        f"{'tokens/s':>11}  beside the best",
    ]
    families = best_of_each(options)
    for option in families[: RUNNERS_UP + 1]:
        lines.append(_row(option, best, machine))
    if len(families) > RUNNERS_UP + 1:
        lines.append(f"{len(families) - RUNNERS_UP - 1} more, slower or larger; --json has all")
    lines += ["as the experiment stands:", _row(standing, best, machine)]
    return "\n".join(lines)


def _words(option: Option) -> str:
    layout = option.deployment.layout
    placed = f", {option.placement} placement, {option.deployment.replicas} replicas a layer" if layout.ep_size > 1 else ""
    return f"EP size {layout.ep_size}{placed}, micro batch {layout.micro_batch}, accumulation {layout.accumulation}"


def _row(option: Option, best: Option, machine: Machine) -> str:
    layout, how = option.deployment.layout, option.deployment
    if not option.fits:
        remark = f"does not fit into {machine.usable / GIB:,.1f} GiB"
    else:
        remark = "" if option == best else largest_difference(option, best)
    return (
        f"{layout.ep_size:5} {option.placement:10} {how.replicas:8} {layout.micro_batch:5} {layout.accumulation:5} "
        f"{option.memory.total / GIB:7.2f} {how.imbalance:8.2f} {1e3 * option.time.total:9,.1f} "
        f"{option.tokens_per_second:11,.0f}  {remark}"
    ).rstrip()


def _columns(option: Option) -> list[str]:
    """Memory, traffic and time by part, side by side."""
    held = [f"{name:12}{size / GIB:8.3f}" for name, size in parts(option.memory).items()]
    sent = [f"{name:10}{s.in_node / 1e6:10,.1f}{s.between_nodes / 1e6:16,.1f}" for name, s in parts(option.traffic).items()]
    time = [f"{name:12}{1e3 * seconds:9,.2f}" for name, seconds in parts(option.time).items()]
    held.append(f"{'total':12}{option.memory.total / GIB:8.3f}")
    time.append(f"{'total':12}{1e3 * option.time.total:9,.2f}")
    heads = [
        f"{'held a rank':12}{'GiB':>8}",
        f"{'MB sent':10}{'in node':>10}{'between nodes':>16}",
        f"{'a step':12}{'ms':>9}",
    ]
    columns = [[heads[0], *held], [heads[1], *sent], [heads[2], *time]]
    widths = [max(map(len, column)) for column in columns]
    depth = max(map(len, columns))
    filled = [column + [""] * (depth - len(column)) for column in columns]
    return ["    ".join(f"{cell:{width}}" for cell, width in zip(cells, widths, strict=True)).rstrip()
            for cells in zip(*filled, strict=True)]  # fmt: skip


def write_json(path: Path, experiment: Experiment, cluster: Cluster, standing: Option, options: list[Option]) -> None:
    """All figures of all options, best first; bytes and seconds."""
    values = {
        "experiment": experiment.to_dict(),
        "cluster": asdict(cluster),
        "why": why(options, cluster.machine),
        "as_it_stands": _figures(standing, experiment),
        "options": [_figures(option, experiment) for option in options],
    }
    write_output(path, json.dumps(values, indent=1) + "\n", "--json")


def _figures(option: Option, experiment: Experiment) -> dict:
    return {
        **asdict(option),
        "settings": option.settings(experiment.parallel),
        "memory_bytes": option.memory.total,
        "sent_bytes": option.traffic.total,
        "seconds": option.time.total,
        "tokens_per_second": option.tokens_per_second,
    }


if __name__ == "__main__":
    main()
