"""Which tasks a mixture's name stands for.

    flan, flan:ten             the ten tasks of system 001; flan:four are those of system 000; flan:eight are those FLAN has too
    flan:TASK[,TASK…]          one task, or several; the path of a .yaml file is a task too
    flan:all                   FLAN's 62 data sets
    flan:clusters=A,B          those of some clusters
    flan:all-but=A,B           those outside the held-out clusters and the ones that are excluded with them
    flan:tasks=TASK,TASK       some of FLAN's tasks, in FLAN's cut
    mini-flan                  thirty tasks that are made up by rules; mini-flan:clusters=, all-but= and tasks= choose some

The last five are FLAN's protocol: 30,000 rows per task, FLAN's parts of the splits, and no row left out for its length. A task
that has no such split (WSC273 has no training rows) is left out and named. Your own .yaml files may stand among the names and join
by the clusters that they name: `flan:all-but=nli,my/task.yaml`.

Besides the twelve clusters, `clusters=` takes the parts of one that FLAN's code has as clusters of their own: conversational_qa,
text_formatting and others (`flan_clusters.yaml`). `--tasks-per-cluster N` uses the first N tasks of each, in the order of that
code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from kd.common.errors import DataError, unknown_name
from kd.data.demo.mini_flan import made_rows
from kd.data.instruction_tasks.clusters import flan_clusters
from kd.data.instruction_tasks.task import TaskFile
from kd.data.instruction_tasks.task_files import load_task, mini_task_names, task_names

FLAN_CAP = 30_000
"""Rows per task in FLAN's mixtures."""
CLUSTERS = "clusters="
"""Prefix of a mixture of some clusters."""
ALL_BUT = "all-but="
"""Prefix of a mixture without some clusters."""
TASKS = "tasks="
"""Prefix of a mixture of some tasks, in FLAN's cut."""

EIGHT = ("anli_r1", "boolq", "paws", "cosmos_qa", "squad", "samsum", "xsum", "common_gen")
"""The tasks of system 001 that FLAN has too."""


@dataclass(frozen=True)
class Selection:
    """The tasks that a mixture's name stands for."""

    tasks: tuple[str, ...]
    cap: int | None = None
    """Rows kept per task, from the first; None is the number in the task's file."""
    flan: bool = False
    """Whether the tasks are cut as FLAN cuts them."""

    def files(self) -> list[TaskFile]:
        """The tasks' files, as the mixture reads them."""
        return [flan_cut(load_task(name)) if self.flan else load_task(name) for name in self.tasks]

    def first_of_clusters(self, count: int) -> Selection:
        """The first tasks of each cluster, at most `count`. Raises DataError for a mixture that is no choice of clusters."""
        if not self.flan:
            raise no_choice_of_clusters(count)
        groups: dict[str, list[str]] = {}
        for name in self.tasks:
            for group in _groups_of(name):
                groups.setdefault(group, []).append(name)
        first = {name for group, names in groups.items() for name in sorted(names, key=_place_in(group))[:count]}
        return replace(self, tasks=tuple(name for name in self.tasks if name in first))


def no_choice_of_clusters(count: int) -> DataError:
    """The error for a number of tasks per cluster where tasks are named one by one."""
    return DataError(
        "the mixture is no choice of clusters",
        found=f"--tasks-per-cluster {count}",
        expected="flan:all, flan:clusters=CLUSTER or flan:all-but=CLUSTER",
    )


def select(name: str) -> Selection:
    """The tasks of a mixture (see the module's head). Raises DataError for an unknown preset, task or cluster."""
    if name in PRESETS:
        return PRESETS[name]
    if (selection := _chosen(name, flan_tasks())) is not None:
        return selection
    names, files = _split_names(name)
    if names == ["all"]:
        return Selection((*flan_tasks(), *files), FLAN_CAP, flan=True)
    every_name = (*PRESETS, "all", *task_names())
    for one in names:
        if one in (*PRESETS, "all"):
            raise DataError(
                "a preset cannot be combined with other names", where=name, found=one, expected="tasks between commas"
            )
        if one not in every_name:
            raise unknown_name(
                "task or mixture", one, every_name, try_=f"kd data ls, {CLUSTERS}CLUSTER or {ALL_BUT}CLUSTER"
            )
    return Selection(tuple(dict.fromkeys(n.strip() for n in name.split(","))))


def select_mini(name: str) -> Selection:
    """The tasks of `mini-flan`, all of them for `all` and for no name. Raises DataError for an unknown task or cluster."""
    selection = _chosen(name, mini_tasks()) or (
        _chosen(f"{TASKS}{name}", mini_tasks()) if name not in ("", "all") else None
    )
    return selection or Selection(mini_tasks(), FLAN_CAP, flan=True)


def _chosen(name: str, tasks: Sequence[str]) -> Selection | None:
    """The choice of clusters or tasks that a name asks for; None where it is another name."""
    for prefix, choose in ((CLUSTERS, _of_clusters), (ALL_BUT, _outside_clusters), (TASKS, _of_tasks)):
        if name.startswith(prefix):
            names, files = _split_names(name.removeprefix(prefix))
            return Selection((*choose(name, names, tasks), *_joining(prefix, names, files)), FLAN_CAP, flan=True)
    return None


def _groups_of(name: str) -> list[str]:
    """The parts of clusters that a task is in, or else its clusters."""
    return [part for part, members in flan_clusters().parts.items() if name in members] or list(
        load_task(name).clusters
    )


def _place_in(group: str) -> Callable[[str], tuple[int, str]]:
    """The place of a task in a cluster or part: in the order of FLAN's code, then by name."""
    registry = flan_clusters()
    order = registry.parts.get(group) or registry.order.get(group, ())
    return lambda name: (order.index(name) if name in order else len(order), name)


def mini_tasks() -> tuple[str, ...]:
    """The tasks of `mini-flan`, in the order of FLAN's clusters."""
    order = list(flan_clusters().clusters)
    return tuple(sorted(mini_task_names(), key=lambda name: (order.index(load_task(name).clusters[0]), name)))


def flan_tasks() -> tuple[str, ...]:
    """The package's tasks that are data sets of FLAN, in the order of its clusters."""
    order = {dataset: number for number, dataset in enumerate(flan_clusters().datasets)}
    places = {name: order[flan] for name in task_names() if (flan := load_task(name).flan) is not None}
    return tuple(sorted(places, key=lambda name: (places[name], name)))


def tasks_without(held_out: Sequence[str], tasks: Sequence[str] | None = None) -> tuple[str, ...]:
    """FLAN's tasks, or `tasks`, outside the held-out clusters and those excluded with them. Raises DataError for an unknown one."""
    excluded = flan_clusters().excluded(held_out)
    every_task = flan_tasks() if tasks is None else tasks
    return tuple(name for name in every_task if not excluded & set(load_task(name).clusters))


def flan_cut(task: TaskFile) -> TaskFile:
    """A task with FLAN's parts of its splits, and with all its rows, however long they are."""
    return replace(task, splits=task.flan_splits or task.splits, max_chars={}, flan_protocol=True)


def known_rows(task: TaskFile, split: str, cap: int | None = None) -> int | None:
    """Rows of a split by the numbers that the task's file gives, at most `cap`; None where they are not known.

    A task that makes several examples of a row has more.
    """
    part = task.splits.get(split)
    count = None if part is None else _rows_of(task, part.name)
    if part is None or count is None:
        return None
    start, stop = part.cut(count)
    return max(0, stop - start) if cap is None else min(max(0, stop - start), cap)


def _rows_of(task: TaskFile, split: str) -> int | None:
    """Rows of a split at the source; None where they are not known."""
    return task.rows.get(split) if task.made is None else len(made_rows(task.made, split))


def _split_names(text: str) -> tuple[list[str], list[str]]:
    """The names between commas, each once: first those of the package, then paths of task files."""
    names = list(dict.fromkeys(n.strip() for n in text.split(",") if n.strip()))
    files = [name for name in names if name.endswith((".yaml", ".yml"))]
    return [name for name in names if name not in files], files


def _of_clusters(name: str, clusters: Sequence[str], tasks: Sequence[str]) -> tuple[str, ...]:
    registry = flan_clusters()
    if not clusters:
        raise DataError("no cluster is named", where=name, expected=", ".join(registry.clusters))
    wanted = {registry.cluster(cluster) for cluster in clusters if cluster not in registry.parts}
    named = {one for cluster in clusters for one in registry.parts.get(cluster, ())}
    return tuple(one for one in tasks if one in named or wanted & set(load_task(one).clusters))


def _outside_clusters(name: str, clusters: Sequence[str], tasks: Sequence[str]) -> tuple[str, ...]:
    if not clusters:
        raise DataError("no cluster is held out", where=name, expected=", ".join(flan_clusters().clusters))
    return tasks_without(clusters, tasks)


def _of_tasks(name: str, named: Sequence[str], tasks: Sequence[str]) -> tuple[str, ...]:
    for one in named:
        if one not in tasks:
            raise unknown_name(
                "task of FLAN",
                one,
                tasks,
                where=name,
                try_="kd data ls flan" if tasks == flan_tasks() else "kd data ls mini-flan",
            )
    return tuple(named)


def _joining(prefix: str, clusters: Sequence[str], files: Sequence[str]) -> Iterator[str]:
    """The user's own files, if their clusters are those of the mixture. Raises DataError for one that is of another."""
    registry = flan_clusters()
    for path in files:
        of_task = set(load_task(path).clusters)
        wanted = {registry.cluster(one) for one in clusters if prefix == CLUSTERS and one not in registry.parts}
        if prefix == CLUSTERS and not of_task & wanted:
            raise DataError(
                "a task file names none of the mixture's clusters",
                where=f"{path} clusters",
                found=", ".join(sorted(of_task)) or "none",
                expected=", ".join(clusters),
            )
        if prefix == ALL_BUT and of_task & registry.excluded(clusters):
            raise DataError(
                "a task file names a cluster that is held out",
                where=f"{path} clusters",
                found=", ".join(sorted(of_task & registry.excluded(clusters))),
                try_="the mixture without this file",
            )
        yield path


PRESETS: dict[str, Selection] = {
    "four": Selection(("anli_r1", "boolq", "common_gen", "xsum")),
    "eight": Selection(EIGHT),
    "ten": Selection((*EIGHT, "python_code", "eng_spa")),
}
"""The reference systems' mixtures; their caps are those of the task files."""
