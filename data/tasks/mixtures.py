"""Mixtures of tasks: which tasks a name stands for, how many rows of each, in what order.

    flan, flan:ten         the ten tasks of systems 001; flan:four are those of 000; flan:eight leave out what FLAN lacks
    flan:TASK[,TASK…]      one task, or several; a path of a .yaml file is a task too
    flan:all               every task of the package
    flan:all-but=CLUSTER   every task outside the held-out cluster(s) and those excluded with them (comma-separated)

Two numbers bound a task, and they are different things. The *cap* keeps a task's first rows: 10,000 in the reference
systems' mixtures, 30,000 in FLAN's (`all`, `all-but`). The *rate maximum* (FLAN: 3,000) bounds a task's share of the
draws, not its rows: with n_d rows, at most the cap,

    p_d = min(n_d, maximum) / Σ_j min(n_j, maximum)

(Raffel et al. 2020, arXiv:1910.10683, section 3.5.2; Wei et al. 2022, arXiv:2109.01652, section 2.4). Without a
rate maximum all examples are put together and shuffled. Order depends on (seed, ids) alone: adding a task leaves the
relative order of the others as it was, and no generator state is involved.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

from kd.common.errors import DataError, unknown_name
from kd.data.data_settings import InstructionConfig
from kd.data.rows.example import Example
from kd.data.tasks.clusters import flan_clusters
from kd.data.tasks.rendering import Rendered, check_template_index, keyed, render_rows
from kd.data.tasks.task import TaskFile
from kd.data.tasks.task_files import load_task, task_names
from kd.data.tasks.task_rows import LoadHub, load_task_rows

FLAN_CAP = 30_000
"""Rows per task in FLAN's mixtures."""
ALL_BUT = "all-but="

EIGHT = ("anli_r1", "boolq", "paws", "cosmos_qa", "squad", "samsum", "xsum", "common_gen")


@dataclass(frozen=True)
class Selection:
    """What a mixture's name stands for."""

    tasks: tuple[str, ...]
    cap: int | None = None
    """First rows per task; None = the task file's own number."""


def select(name: str) -> Selection:
    """The tasks of a mixture (see the module's head). Raises DataError for unknown presets, tasks and clusters."""
    if name in PRESETS:
        return PRESETS[name]
    if name == "all":
        return Selection(task_names(), FLAN_CAP)
    if name.startswith(ALL_BUT):
        held_out = [c.strip() for c in name.removeprefix(ALL_BUT).split(",") if c.strip()]
        if not held_out:
            raise DataError("no cluster is held out", where=name, expected=", ".join(flan_clusters().clusters))
        return Selection(tasks_without(held_out), FLAN_CAP)
    names = tuple(dict.fromkeys(n.strip() for n in name.split(",")))
    known = (*PRESETS, "all", *task_names())
    for one in names:
        if one in (*PRESETS, "all"):
            raise DataError("a preset stands alone", where=name, found=one, expected="tasks between commas")
        if one not in known and not one.endswith((".yaml", ".yml")):
            raise unknown_name("task or mixture", one, known, try_=f"kd data ls, or {ALL_BUT}CLUSTER")
    return Selection(names)


def tasks_without(held_out: Sequence[str]) -> tuple[str, ...]:
    """The package's tasks none of whose clusters is excluded when `held_out` are; raises DataError for unknown ones."""
    excluded = flan_clusters().excluded(held_out)
    return tuple(name for name in task_names() if not excluded & set(load_task(name).clusters))


def load_mixture(
    selection: Selection, split: str, config: InstructionConfig, load_hub: LoadHub
) -> tuple[tuple[Example, ...], dict[str, str]]:
    """Examples of the selected tasks in the mixture's order, and their provenance."""
    return mix([load_task(name) for name in selection.tasks], split, config, load_hub, cap=selection.cap)


def mix(
    tasks: Sequence[TaskFile], split: str, config: InstructionConfig, load_hub: LoadHub, *, cap: int | None = None
) -> tuple[tuple[Example, ...], dict[str, str]]:
    """Load, render and order tasks. One task keeps its order; several are shuffled or drawn, see the module's head."""
    check_options(tasks, config)
    if len({task.name for task in tasks}) < len(tasks):
        raise DataError(
            "two tasks have the same name",
            found=", ".join(t.name for t in tasks),
            try_="another name for one of the files",
        )
    for task in tasks:
        check_template_index(task, config)
    parts: dict[str, Rendered] = {}
    provenance = {"source": "tasks", "tasks": ", ".join(t.name for t in tasks)} | config.provenance()
    for task in tasks:
        found = load_task_rows(task, split, config.task_root, load_hub)
        rows = row_cap(task, split, config, cap)
        done = render_rows(task, found.rows, split=split, config=config, where=found.where, cap=rows, first=found.first)
        if not done.examples:
            raise DataError(
                "a task has no examples",
                where=found.where,
                found=f"{done.too_long} rows too long, {done.unlabelled} unlabelled",
            )
        parts[task.name] = done
        provenance[f"task {task.name}"] = (
            f"{found.source}; {len(done.examples)} examples, cap {rows or 'none'}, "
            f"left out: {done.too_long} too long, {done.unlabelled} unlabelled"
        )
    pools = {name: part.examples for name, part in parts.items()}
    if config.mix_maximum is not None:
        return sampled(pools, maximum=config.mix_maximum, draws=config.mix_draws, seed=config.data_seed), provenance
    if len(pools) == 1:
        return next(iter(pools.values())), provenance
    return shuffled(pools, seed=config.data_seed), provenance


def row_cap(task: TaskFile, split: str, config: InstructionConfig, cap: int | None) -> int | None:
    """First rows to keep: the user's number; else, for train alone, the mixture's or the task's own."""
    if config.max_per_task is not None:
        return config.max_per_task
    return (cap or task.cap) if split == "train" else None


def check_options(tasks: Sequence[TaskFile], config: InstructionConfig) -> None:
    """Raise DataError where options are asked for and no task has choices."""
    if config.options is True and not any(task.has_choices for task in tasks):
        raise DataError(
            "no task has choices to list",
            where=", ".join(t.name for t in tasks),
            found="--options",
            try_="leave --options away",
        )


def mixing_rates(counts: Mapping[str, int], maximum: int | None = None) -> dict[str, Fraction]:
    """Task -> probability of a draw, exact: min(n, maximum) / Σ min(n, maximum); maximum None = proportional.

    counts   rows per task, after the cap
    Raises DataError where there is nothing to draw from, or a negative count.
    """
    if maximum is not None and maximum < 1:
        raise DataError("the rate maximum is too small", found=maximum, expected="at least 1", try_="3000")
    if any(n < 0 for n in counts.values()):
        raise DataError("a task has a negative number of rows", found=dict(counts))
    weights = {name: n if maximum is None else min(n, maximum) for name, n in counts.items()}
    total = sum(weights.values())
    if total == 0:
        raise DataError("a mixture of nothing", found=dict(counts), expected="at least one row")
    return {name: Fraction(weight, total) for name, weight in weights.items()}


def shuffled(pools: Mapping[str, Sequence[Example]], *, seed: int = 0) -> tuple[Example, ...]:
    """All examples of all tasks in one order that depends on (seed, ids) alone."""
    return tuple(_order([e for pool in pools.values() for e in pool], seed, "mixture"))


def sampled(
    pools: Mapping[str, Sequence[Example]], *, maximum: int | None = None, draws: int | None = None, seed: int = 0
) -> tuple[Example, ...]:
    """Draw tasks with `mixing_rates` and take each task's examples in turn; N draws are the first N of more.

    A task's examples come in a shuffled order of their own, and in another one each time they are used up; repeats
    have ` (2)`, ` (3)`, … after their id. Default: as many draws as Σ min(n, maximum).
    """
    rates = mixing_rates({name: len(pool) for name, pool in pools.items()}, maximum)
    names = sorted(name for name, rate in rates.items() if rate)
    weights = {name: len(pools[name]) if maximum is None else min(len(pools[name]), maximum) for name in names}
    total = sum(weights.values())
    decks: dict[str, list[Example]] = {name: [] for name in names}
    rounds = dict.fromkeys(names, 0)
    found = []
    for draw in range(total if draws is None else draws):
        place = keyed(seed, "draw", draw) % total  # 256 bits over a small total: exact to 2^-230
        for name in names:
            if place < weights[name]:
                break
            place -= weights[name]
        if not decks[name]:
            rounds[name] += 1
            decks[name] = _order(pools[name], seed, f"round {rounds[name]}")[::-1]
        example = decks[name].pop()
        found.append(example if rounds[name] == 1 else replace(example, id=f"{example.id} ({rounds[name]})"))
    return tuple(found)


def _order(examples: Sequence[Example], seed: int, purpose: str) -> list[Example]:
    return sorted(examples, key=lambda e: (keyed(seed, purpose, e.id), e.id))


PRESETS: dict[str, Selection] = {
    "four": Selection(("anli_r1", "boolq", "common_gen", "xsum")),
    "eight": Selection(EIGHT),
    "ten": Selection((*EIGHT, "python_code", "eng_spa")),
}
"""The reference systems' mixtures; their cap is the task files' own."""
