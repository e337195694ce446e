"""The clusters of FLAN: which data sets belong together, and which remain when clusters are held out.

Zero-shot claims depend on this. A data set is unseen only if no data set of its clusters, or of a cluster excluded together
with one of them, was trained on (Wei et al. 2022, arXiv:2109.01652, section 2.2). The registry is
`data/instruction_tasks/flan_clusters.yaml`: 12 clusters and 62 data sets. Exclusions are symmetric and not transitive: holding out
commonsense also excludes reading comprehension with commonsense, but not reading comprehension.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files as package_files

from kd.common.errors import unknown_name
from kd.common.strangers.yaml_file import parse_mapping


@dataclass(frozen=True)
class ClusterRegistry:
    """Clusters, their data sets, and which clusters are held out together."""

    clusters: Mapping[str, tuple[str, ...]]
    """Cluster -> data sets; a data set may belong to several."""
    excluded_together: tuple[tuple[str, str], ...]
    """Pairs of clusters; holding out one excludes the other."""
    other_names: Mapping[str, str] = field(default_factory=dict)
    """Another name of a cluster -> the cluster."""
    written_as: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Data set -> its names in FLAN's code, without versions."""
    parts: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Part of a cluster that FLAN's code has as a cluster of its own -> its tasks in their order."""
    order: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Cluster -> its tasks in the order of FLAN's code; tasks that are not listed come after these."""

    @property
    def datasets(self) -> tuple[str, ...]:
        """Every data set once, in the order of the clusters."""
        return tuple(dict.fromkeys(d for members in self.clusters.values() for d in members))

    def clusters_of(self, dataset: str) -> frozenset[str]:
        """The clusters that a data set belongs to. Raises DataError for an unknown data set."""
        clusters = frozenset(name for name, members in self.clusters.items() if dataset in members)
        if not clusters:
            raise unknown_name("FLAN data set", dataset, self.datasets)
        return clusters

    def cluster(self, name: str) -> str:
        """The cluster of a name, which may be one of its other names. Raises DataError for an unknown one."""
        cluster_name = self.other_names.get(name, name)
        if cluster_name not in self.clusters:
            raise unknown_name("cluster", name, (*self.clusters, *self.other_names, *self.parts))
        return cluster_name

    def excluded(self, held_out: Iterable[str]) -> frozenset[str]:
        """The held-out clusters and those excluded together with one of them. Raises DataError for an unknown cluster."""
        names = {self.cluster(name) for name in sorted(held_out)}
        both_ways = [direction for pair in self.excluded_together for direction in (pair, pair[::-1])]
        return frozenset(names | {other for name, other in both_ways if name in names})

    def remaining(self, held_out: Iterable[str]) -> tuple[str, ...]:
        """The data sets that may be trained on when clusters are held out: none of their clusters is excluded."""
        excluded = self.excluded(held_out)
        return tuple(d for d in self.datasets if not self.clusters_of(d) & excluded)

    def unseen(self, dataset: str, trained: Iterable[str]) -> bool:
        """Whether `dataset` is unseen after training on the data sets `trained`."""
        return self.are_unseen(self.clusters_of(dataset), map(self.clusters_of, trained))

    def are_unseen(self, clusters: Iterable[str], trained: Iterable[frozenset[str]]) -> bool:
        """Whether a task of these clusters is unseen after training on tasks of the clusters `trained`."""
        excluded = self.excluded(clusters)
        return not any(other & excluded for other in trained)


@cache
def flan_clusters() -> ClusterRegistry:
    """The registry that comes with the package."""
    file = package_files("kd.data.instruction_tasks") / "flan_clusters.yaml"
    data = parse_mapping(file.read_text(encoding="utf-8"), "table of clusters", file.name)
    return ClusterRegistry(
        {name: tuple(members) for name, members in data["clusters"].items()},
        tuple((a, b) for a, b in data["excluded_together"]),
        data["other_names"],
        {name: tuple(others) for name, others in data["written_as"].items()},
        {name: tuple(tasks) for name, tasks in data["parts"].items()},
        {name: tuple(tasks) for name, tasks in data["order"].items()},
    )
