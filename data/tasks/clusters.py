"""The clusters of FLAN: which data sets belong together, and what is left when clusters are held out.

Zero-shot claims rest on this. A data set counts as unseen only if no data set of any cluster it belongs to, or of a
cluster excluded together with one of those, was trained on (Wei et al. 2022, arXiv:2109.01652, section 2.2).
The registry is data, `data/tasks/flan_clusters.yaml`: 12 clusters, 62 data sets. Exclusions hold both ways and do not
chain: without commonsense there is no reading comprehension with commonsense, but there is reading comprehension.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files as package_files

import yaml

from kd.common.errors import unknown_name


@dataclass(frozen=True)
class ClusterRegistry:
    """Clusters, their data sets, and which clusters are held out together."""

    clusters: Mapping[str, tuple[str, ...]]
    """Cluster -> data sets; a data set may stand in several."""
    excluded_together: tuple[tuple[str, str], ...]

    @property
    def datasets(self) -> tuple[str, ...]:
        """Every data set once, in the clusters' order."""
        return tuple(dict.fromkeys(d for members in self.clusters.values() for d in members))

    def clusters_of(self, dataset: str) -> frozenset[str]:
        """The clusters a data set belongs to; raises DataError for an unknown one."""
        found = frozenset(name for name, members in self.clusters.items() if dataset in members)
        if not found:
            raise unknown_name("FLAN data set", dataset, self.datasets)
        return found

    def excluded(self, held_out: Iterable[str]) -> frozenset[str]:
        """The held-out clusters and those excluded together with one of them; raises DataError for an unknown one."""
        asked = set(held_out)
        for name in sorted(asked):
            if name not in self.clusters:
                raise unknown_name("cluster", name, self.clusters)
        return frozenset(asked | {b for pair in self.excluded_together for a, b in (pair, pair[::-1]) if a in asked})

    def remaining(self, held_out: Iterable[str]) -> tuple[str, ...]:
        """The data sets to train on when clusters are held out: those none of whose clusters is excluded."""
        excluded = self.excluded(held_out)
        return tuple(d for d in self.datasets if not self.clusters_of(d) & excluded)

    def unseen(self, dataset: str, trained: Iterable[str]) -> bool:
        """True if training on `trained` leaves `dataset` unseen."""
        excluded = self.excluded(self.clusters_of(dataset))
        return all(dataset != other and not self.clusters_of(other) & excluded for other in trained)


@cache
def flan_clusters() -> ClusterRegistry:
    """The registry that comes with the package."""
    data = yaml.safe_load((package_files("kd.data.tasks") / "flan_clusters.yaml").read_text(encoding="utf-8"))
    return ClusterRegistry(
        {name: tuple(members) for name, members in data["clusters"].items()},
        tuple((a, b) for a, b in data["excluded_together"]),
    )
