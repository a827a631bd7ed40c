"""Every way to run an experiment on a cluster, with what it holds, sends and takes; the best one, and why."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from trainer.cluster import Machine
from trainer.config import Experiment, ParallelConfig
from trainer.cost import StepTime, step_time
from trainer.launch import Launch
from trainer.layout import Layout
from trainer.plan import GIB, Deployment, Memory, Sharding, Traffic, memory, most_replicas, parts, traffic
from trainer.usage import Usage

EXTRA_SLOTS = (1, 2)
"""Copies of hot experts that are tried, in slots a rank and layer."""
EQUAL = 1.01
"""Times this close count as equal, and the plainest way (smaller EP size, contiguous, fewer replicas) goes first."""
NAMED_PARTS = 3
"""Most parts of a step that a comparison names."""


@dataclass(frozen=True)
class Cluster:
    """Ranks, what they are, and what they compute with."""

    machine: Machine
    """One node."""
    nodes: int
    """Nodes."""
    ranks_per_node: int
    """Ranks used on each."""
    sharding: Sharding
    """Precision and ZeRO stage."""
    row_tokens: int | None = None
    """Mean tokens in a row; None = model.max_seq_len."""
    assumes_precision: bool = False
    """Whether the DeepSpeed JSON leaves the precision to the machine, so that the plan goes by the machine's figures."""

    @property
    def ranks(self) -> int:
        """Ranks in all."""
        return self.nodes * self.ranks_per_node


@dataclass(frozen=True)
class Option:
    """One way to run it."""

    deployment: Deployment
    placement: str
    memory: Memory
    traffic: Traffic
    time: StepTime
    tokens_per_step: int
    fits: bool

    @property
    def tokens_per_second(self) -> float:
        """Over all ranks."""
        return self.tokens_per_step / self.time.total

    @property
    def family(self) -> tuple[int, str, int]:
        """What it is without its micro batch."""
        return self.deployment.layout.ep_size, self.placement, self.deployment.replicas

    def settings(self, asked: ParallelConfig) -> list[str]:
        """The --set that trainer/run.py needs for it, beside those of an experiment that has `asked`."""
        layout, replicas = self.deployment.layout, self.deployment.replicas
        settings = [f"parallel.ep_size={layout.ep_size}", f"train.max_micro_batch={layout.micro_batch}"]
        if self.placement != asked.placement:
            settings.append(f"parallel.placement={self.placement}")
        if replicas != asked.replicas:
            settings.append(f"parallel.replicas={replicas}")
        return settings


def as_it_stands(experiment: Experiment, cluster: Cluster, usage: Usage) -> Option:
    """What trainer/run.py would do without further settings.

    Raises:
        ValueError: a batch or an EP size that does not divide over the ranks.
    """
    launch = Launch(0, cluster.ranks, 0, cluster.ranks_per_node)
    layout = Layout.of(experiment, launch)
    replicas = most_replicas(experiment, layout.ep_size)
    return evaluate(experiment, cluster, usage, layout, experiment.parallel.placement, replicas)


def all_options(experiment: Experiment, cluster: Cluster, usage: Usage) -> list[Option]:
    """Every EP size (unless the experiment names one), placement, number of replicas and micro batch; best first, what does
    not fit last."""
    found = sorted(
        (
            evaluate(experiment, cluster, usage, Layout(ep_size, micro, share // micro), placement, replicas)
            for share in [experiment.train.batch_size // cluster.ranks]
            for ep_size in ep_sizes(experiment, cluster)
            for placement, replicas in _placements(ep_size, usage)
            for micro in divisors(share)
        ),
        key=_order,
    )
    equals = [option for option in found if option.fits and option.time.total <= EQUAL * found[0].time.total]
    best = min(equals, key=_plainness, default=found[0])
    return [best, *(option for option in found if option is not best)]


def evaluate(
    experiment: Experiment, cluster: Cluster, usage: Usage, layout: Layout, placement: str, replicas: int
) -> Option:
    """One way, with all its figures."""
    loads = usage.imbalances(layout.ep_size, placement, replicas)
    how = Deployment(
        layout=layout,
        ranks=cluster.ranks,
        ranks_per_node=cluster.ranks_per_node,
        sharding=cluster.sharding,
        device=cluster.machine.device,
        replicas=replicas,
        imbalance=max(loads),
        row_tokens=cluster.row_tokens,
    )
    held = memory(experiment, how)
    # All layers add to the time of a step; the worst one decides what has to be held.
    averaged = replace(how, imbalance=sum(loads) / len(loads))
    return Option(
        deployment=how,
        placement=placement,
        memory=held,
        traffic=traffic(experiment, how),
        time=step_time(experiment, averaged, cluster.machine, usage.shares_LE),
        tokens_per_step=experiment.train.batch_size * (cluster.row_tokens or experiment.model.max_seq_len),
        fits=held.total <= cluster.machine.usable,
    )


def ep_sizes(experiment: Experiment, cluster: Cluster) -> list[int]:
    """The EP sizes that this number of ranks and experts allows."""
    asked, model = experiment.parallel.ep_size, experiment.model
    if model.channel_mixer != "some":
        return [1]
    if asked != "auto":
        return [asked]
    return [size for size in divisors(cluster.ranks) if model.some.num_experts % size == 0]


def divisors(number: int) -> list[int]:
    """All of them, ascending."""
    return [size for size in range(1, number + 1) if number % size == 0]


def _placements(ep_size: int, usage: Usage) -> Iterator[tuple[str, int]]:
    """Contiguous and balanced, and replicas as far as each more lowers the load of the busiest rank."""
    yield "contiguous", 0
    if ep_size == 1:
        return
    least, experts = float("inf"), usage.shares_LE.shape[1]
    for extra in (0, *EXTRA_SLOTS):
        # A rank holds an expert at most once.
        if extra * ep_size > experts * (ep_size - 1):
            return
        load = sum(usage.imbalances(ep_size, "balanced", extra * ep_size))
        if load < least:
            yield "balanced", extra * ep_size
        least = min(least, load)


def _order(option: Option) -> tuple:
    """Faster first among those that fit, smaller first among those that do not."""
    size, seconds = option.memory.total, option.time.total
    return (not option.fits, seconds if option.fits else size, size)


def _plainness(option: Option) -> tuple:
    ep_size, placement, replicas = option.family
    return ep_size, placement != "contiguous", replicas, option.time.total


def best_of_each(options: list[Option]) -> list[Option]:
    """Of options in order, the first of every (EP size, placement, replicas)."""
    first: dict[tuple[int, str, int], Option] = {}
    for option in options:
        first.setdefault(option.family, option)
    return list(first.values())


def largest_difference(option: Option, best: Option) -> str:
    """How much longer an option takes than the best, and the parts of the step that differ most."""
    if max(option.time.total, best.time.total) <= EQUAL * min(option.time.total, best.time.total):
        return "as fast"
    theirs, ours = parts(option.time), parts(best.time)
    more = {name: theirs[name] - ours[name] for name in theirs}
    most = sorted(more, key=lambda name: -abs(more[name]))[:NAMED_PARTS]
    # A part that is a twentieth of the largest or less explains nothing.
    named = [f"{name} {1e3 * more[name]:+,.1f}" for name in most if abs(more[name]) > 0.05 * abs(more[most[0]])]
    return f"{1e3 * (option.time.total - best.time.total):+,.1f} ms: {', '.join(named)}"


def why(options: list[Option], machine: Machine) -> str:
    """In words, why the first option is the best."""
    best, usable = options[0], machine.usable / GIB
    families = best_of_each(options)
    alone = next((option for option in families if option.family[0] == 1), None)
    ep_size, pool = best.family[0], best.memory.pool / GIB
    if not best.fits:
        least = best.memory.total / GIB
        part = max(parts(best.memory), key=parts(best.memory).get)
        return (
            f"nothing fits: the smallest needs {least:,.1f} GiB a rank of {usable:,.1f} usable, most of it {part}; take "
            f"more ranks, fewer experts or shorter rows"
        )
    if ep_size == 1:
        others = [option for option in families if option.family[0] > 1]
        reason = f"the pool fits: {pool:,.2f} GiB on every rank of {usable:,.1f} usable, so no token has to travel"
        if not others:
            return reason if pool else "there is no pool to share"
        fitting = [option for option in others if option.fits]
        return reason + (f"; the next EP size takes {largest_difference(fitting[0], best)}" if fitting else "")
    if alone is None:
        return f"the experiment asks for EP size {ep_size}"
    if not alone.fits:
        return f"EP 1 does not fit ({alone.memory.total / GIB:,.1f} GiB a rank of {usable:,.1f} usable)"
    return (
        f"EP 1 fits too, but a rank would run {ep_size}x more experts of {ep_size}x fewer rows, which costs more than the "
        f"exchange, {largest_difference(alone, best)}"
    )
