"""Had a model seen tasks of this kind? A task is unseen where no task of its clusters, or of clusters that FLAN excludes with them,
was trained on (Wei et al. 2022, arXiv:2109.01652, section 2.2).

What a model was trained on is said by the runs that made it (`trained_on`) and the provenance of their caches, which names the
tasks. Nothing is marked where this is not known: a model that no run here made, a task without a cluster, or a training text that
may hold anything, unless a task of the kind is known to be in another one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from kd.data.corpus import Corpus
from kd.data.instruction_tasks.clusters import flan_clusters
from kd.data.instruction_tasks.mixing.rendered_mixture import clusters_of_name
from kd.data.named_sources import SOURCES
from kd.evaluation.contamination import TrainingText

SEEN, UNSEEN = "seen", "unseen"
MARK = "trained_cluster"
"""Key of a figure that says whether tasks of its clusters were trained on."""


def seen_or_unseen(texts: Sequence[TrainingText], corpus: Corpus) -> dict[str, str]:
    """Task of a text -> `seen` or `unseen` after training on `texts`; tasks of which it is not known are left out."""
    trained, all_known = _trained_clusters(texts)
    if not trained:
        return {}
    clusters_of_files = _own_clusters(corpus.source)
    marks: dict[str, str] = {}
    for task in dict.fromkeys(example.task for example in corpus.examples):
        clusters = clusters_of_files.get(task, clusters_of_name(task))
        if not clusters:
            continue
        if not flan_clusters().are_unseen(clusters, trained):
            marks[task] = SEEN
        elif all_known:
            marks[task] = UNSEEN
    return marks


def marked(figures: Mapping[str, Mapping[str, Any]], marks: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """The figures of a text with the mark of their task; a figure over all tasks has one where theirs are the same."""
    of_all = next(iter(set(marks.values()))) if len(set(marks.values())) == 1 else None
    tasks = {name.partition("/")[2] for name in figures if "/" in name}
    if tasks - set(marks):
        of_all = None
    marked_figures = {}
    for name, figure in figures.items():
        mark = marks.get(name.partition("/")[2]) if "/" in name else of_all
        marked_figures[name] = dict(figure) | ({MARK: mark} if mark is not None else {})
    return marked_figures


def _trained_clusters(texts: Sequence[TrainingText]) -> tuple[list[frozenset[str]], bool]:
    """The clusters of each task that was trained on, and whether those of everything that was trained on are known."""
    trained: list[frozenset[str]] = []
    all_known = True
    for text in texts:
        source = _parsed(text.source)
        if text.spec.partition(":")[0] in SOURCES:  # prose and made-up tasks, which are none of FLAN's
            continue
        clusters_of_files = _own_clusters(source)
        names = [name for name in str(source.get("tasks", "")).split(", ") if name]
        clusters_by_task = [clusters_of_files.get(name, clusters_of_name(name)) for name in names]
        trained += [clusters for clusters in clusters_by_task if clusters is not None]
        all_known = all_known and bool(names) and None not in clusters_by_task
    return trained, all_known


def _own_clusters(source: Mapping[str, Any]) -> dict[str, frozenset[str]]:
    """Clusters of tasks that are not the package's, as the provenance names them."""
    parsed = _parsed(source.get("clusters"))
    return {name: frozenset(map(str, clusters)) for name, clusters in parsed.items() if isinstance(clusters, list)}


def _parsed(text: Any) -> dict[str, Any]:
    try:
        value = json.loads(str(text))
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}
