"""One cluster for all tests here: two nodes with 4 CPUs and 2 GPUs (in name only) each."""

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.cluster import Cluster, why_not


@pytest.fixture(scope="session")
def cluster_folder() -> Iterator[Path]:
    """A folder for a cluster. Not one of pytest's: munged wants parents that others may enter, sockets want short paths."""
    if (reason := why_not()) is not None:
        pytest.skip(reason)
    folder = Path(tempfile.mkdtemp(prefix="some-cluster-"))
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="session")
def session_cluster(cluster_folder) -> Iterator[Cluster]:
    """The cluster, in whatever state the last test left it."""
    cluster = Cluster.up(cluster_folder, nodes=2, cpus=4, gpus=2)
    yield cluster
    cluster.down()


@pytest.fixture
def cluster(session_cluster) -> Cluster:
    """The cluster with all nodes up."""
    session_cluster.wait_for_nodes()
    return session_cluster
