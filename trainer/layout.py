"""How a global batch and the expert pool are laid out over the ranks."""

from dataclasses import dataclass

from modeling.some.placement import Placement
from trainer.config import Experiment
from trainer.launch import Launch


@dataclass(frozen=True)
class Layout:
    """How the experiment's global batch and pool are spread over the ranks."""

    ep_size: int
    micro_batch: int
    accumulation: int

    @staticmethod
    def of(experiment: Experiment, launch: Launch) -> "Layout":
        """The layout of `experiment` on this job's ranks.

        Raises:
            ValueError: a batch or an ep_size that does not divide, with the nearest that do, or replicas without room.
        """
        ep_size = _ep_size(experiment, launch)
        _check_replicas(experiment, ep_size)
        batch, world = experiment.train.batch_size, launch.world_size
        if batch % world:
            nearest = sorted({max(world, batch // world * world), (batch // world + 1) * world})
            raise ValueError(
                f"train.batch_size = {batch} does not divide over {world} ranks; nearest that do: "
                f"{', '.join(map(str, nearest))}"
            )
        share = batch // world
        largest = min(share, experiment.train.max_micro_batch)
        micro = next(size for size in range(largest, 0, -1) if share % size == 0)
        return Layout(ep_size=ep_size, micro_batch=micro, accumulation=share // micro)


def _ep_size(experiment: Experiment, launch: Launch) -> int:
    asked, experts, world = experiment.parallel.ep_size, experiment.model.some.num_experts, launch.world_size
    if asked == "auto":
        node = launch.local_world_size
        return next(n for n in range(node, 0, -1) if node % n == 0 and world % n == 0 and experts % n == 0)
    if world % asked:
        sizes = [n for n in range(1, world + 1) if world % n == 0 and experts % n == 0]
        raise ValueError(
            f"parallel.ep_size = {asked} does not divide the {world} ranks; sizes that do: "
            f"{', '.join(map(str, sizes))}, or auto"
        )
    Placement.contiguous(experts, asked)
    return asked


def _check_replicas(experiment: Experiment, ep_size: int) -> None:
    """A rank holds an expert at most once, so a group has room for ep_size - 1 copies of each besides the first."""
    replicas, room = experiment.parallel.replicas, experiment.model.some.num_experts * (ep_size - 1)
    if replicas == "auto" or replicas <= room:
        return
    if ep_size == 1:
        raise ValueError(
            f"parallel.replicas = {replicas} has no effect where parallel.ep_size is 1 and every rank holds all experts; "
            f"set parallel.replicas=0 or auto, or parallel.ep_size to 2 or more"
        )
    raise ValueError(f"parallel.replicas = {replicas} is more than {ep_size} ranks can hold; set it between 0 and {room}")
