"""A picture of how a job scales: over ranks with the batch of a rank held, and over the experts of a layer."""

from dataclasses import replace
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path

from tools.options import Cluster, Option, divisors, evaluate
from tools.outputs import check_writable, write_output
from trainer.config import Experiment
from trainer.layout import Layout
from trainer.usage import Usage, read_usage

SUFFIXES = (".png", ".svg")
MOST_RANKS, MOST_EXPERTS = 1024, 65536


def check_plot(path: Path) -> None:
    """Raises:
    ValueError: another format, a file that cannot be written, or matplotlib is missing.
    """
    if path.suffix not in SUFFIXES:
        raise ValueError(f"--plot {path}: must end in {' or '.join(SUFFIXES)}")
    check_writable(path, "--plot")
    if find_spec("matplotlib") is None:
        raise ValueError(f"--plot {path}: needs matplotlib, which is not installed; pip install matplotlib")


def draw(path: Path, experiment: Experiment, cluster: Cluster, usage: str) -> None:
    """Write the picture; hollow marks do not fit into memory."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    figure = Figure(figsize=(11, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for axes, curves in ((left, over_ranks(experiment, cluster, usage)), (right, over_experts(experiment, cluster, usage))):
        for label, points in curves.items():
            x, y = zip(*((x, 1e3 * option.time.total) for x, option in points), strict=True)
            (line,) = axes.plot(x, y, label=label)
            for (at, option), height in zip(points, y, strict=True):
                face = line.get_color() if option.fits else "white"
                axes.plot(at, height, "o", color=line.get_color(), markerfacecolor=face, markersize=5)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        axes.set_ylabel("ms a step")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter("{x:,.0f}")
        if max(axes.get_ylim()) < 8 * min(axes.get_ylim()):
            axes.yaxis.set_major_locator(LogLocator(base=2, subs=(1.0, 1.25, 1.5, 1.75)))
        axes.grid(alpha=0.3)
        axes.legend()
    rows = _rows_of_a_rank(experiment, cluster)
    left.set_xlabel(f"ranks, {rows} rows each")
    left.set_title(f"{experiment.model.some.num_experts} experts a layer")
    right.set_xlabel("experts a layer")
    right.set_title(f"{cluster.ranks} ranks")
    figure.suptitle(f"{experiment.name} on {cluster.machine.describe} (hollow: does not fit)", fontsize=10)
    picture = BytesIO()
    figure.savefig(picture, format=path.suffix[1:])
    write_output(path, picture.getvalue(), "--plot")


def over_ranks(experiment: Experiment, cluster: Cluster, usage: str) -> dict[str, list[tuple[int, Option]]]:
    """EP size in words to (ranks, option), from 1 rank up; every rank keeps the rows that it has on the cluster."""
    rows, model = _rows_of_a_rank(experiment, cluster), experiment.model
    known = read_usage(usage, model.num_layers, model.some.num_experts, model.some.top_k)
    curves: dict[str, list[tuple[int, Option]]] = {}
    ranks = 1
    while ranks <= MOST_RANKS:
        near = min(ranks, cluster.machine.ranks_per_node)
        there = replace(cluster, nodes=-(-ranks // near), ranks_per_node=near)
        job = replace(experiment, train=replace(experiment.train, batch_size=rows * there.ranks))
        for label, ep_size in _ep_sizes(there).items():
            if model.some.num_experts % ep_size == 0 and there.ranks % ep_size == 0:
                curves.setdefault(label, []).append((there.ranks, _best(job, there, known, ep_size)))
        ranks *= 2
    return curves


def over_experts(experiment: Experiment, cluster: Cluster, usage: str) -> dict[str, list[tuple[int, Option]]]:
    """EP size in words to (experts, option), from 64 experts up, on the cluster as it is.

    A run's usage says nothing of other numbers of experts: then they are used evenly.
    """
    curves: dict[str, list[tuple[int, Option]]] = {}
    spread, model, experts = (usage if usage.startswith("zipf:") else "zipf:0"), experiment.model, 64
    while experts <= MOST_EXPERTS:
        job = replace(experiment, model=replace(model, some=replace(model.some, num_experts=experts)))
        known = read_usage(spread, model.num_layers, experts, model.some.top_k)
        for label, ep_size in _ep_sizes(cluster).items():
            if experts % ep_size == 0:
                curves.setdefault(label, []).append((experts, _best(job, cluster, known, ep_size)))
        experts *= 2
    return curves


def _ep_sizes(cluster: Cluster) -> dict[str, int]:
    return {"EP 1": 1, "EP in a node": cluster.ranks_per_node, "EP over all ranks": cluster.ranks}


def _rows_of_a_rank(experiment: Experiment, cluster: Cluster) -> int:
    return experiment.train.batch_size // cluster.ranks


def _best(experiment: Experiment, cluster: Cluster, usage: Usage, ep_size: int) -> Option:
    """The best micro batch of one EP size, of all where none fits."""
    share = experiment.train.batch_size // cluster.ranks
    options = [
        evaluate(experiment, cluster, usage, Layout(ep_size, micro, share // micro), "contiguous", 0)
        for micro in divisors(share)
    ]
    fitting = [option for option in options if option.fits]
    return min(fitting or options, key=lambda option: option.time.total)
