"""Mixtures of tasks: which tasks a name stands for, how many rows of each, and in what order.

    flan, flan:ten         the ten tasks of system 001; flan:four are those of system 000; flan:eight are those FLAN has too
    flan:TASK[,TASK…]      one task, or several; the path of a .yaml file is a task too
    flan:all               every task of the package
    flan:all-but=CLUSTER   every task outside the held-out cluster(s) and those excluded with them (comma-separated)

Two different numbers limit a task. The *cap* keeps a task's first rows: 10,000 in the reference systems' mixtures, 30,000 in
FLAN's (`all`, `all-but`). The *rate maximum* (FLAN: 3,000) limits a task's share of the draws, not its rows. With n_d rows,
at most the cap,

    p_d = min(n_d, maximum) / Σ_j min(n_j, maximum)

(Raffel et al. 2020, arXiv:1910.10683, section 3.5.2; Wei et al. 2022, arXiv:2109.01652, section 2.4). Without a
rate maximum all examples are put together and shuffled. The order depends only on (seed, ids), so adding a task keeps the
relative order of the others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

from kd.common.errors import DataError, unknown_name
from kd.data.data_settings import InstructionConfig
from kd.data.instruction_tasks.clusters import flan_clusters
from kd.data.instruction_tasks.draws import keyed
from kd.data.instruction_tasks.rendering import Rendered, check_template_index, render_rows
from kd.data.instruction_tasks.task import TaskFile
from kd.data.instruction_tasks.task_files import load_task, task_names
from kd.data.instruction_tasks.task_rows import LoadHub, load_task_rows
from kd.data.left_out import LeftOut, joined
from kd.data.rows.example import Example

FLAN_CAP = 30_000
"""Rows per task in FLAN's mixtures."""
ALL_BUT = "all-but="
"""Prefix of a mixture without some clusters."""

EIGHT = ("anli_r1", "boolq", "paws", "cosmos_qa", "squad", "samsum", "xsum", "common_gen")
"""The tasks of system 001 that FLAN has too."""


@dataclass(frozen=True)
class Selection:
    """The tasks that a mixture's name stands for."""

    tasks: tuple[str, ...]
    cap: int | None = None
    """Rows kept per task, from the first; None is the number in the task's file."""


@dataclass(frozen=True)
class Mixed:
    """The examples of a mixture in its order."""

    examples: tuple[Example, ...]
    source: dict[str, str]
    """Where the rows of each task come from, and the settings of the text."""
    left_out: LeftOut
    """Rows of the tasks that are not among the examples."""


def select(name: str) -> Selection:
    """The tasks of a mixture (see the module's head). Raises DataError for an unknown preset, task or cluster."""
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
    every_name = (*PRESETS, "all", *task_names())
    for one in names:
        if one in (*PRESETS, "all"):
            raise DataError(
                "a preset cannot be combined with other names", where=name, found=one, expected="tasks between commas"
            )
        if one not in every_name and not one.endswith((".yaml", ".yml")):
            raise unknown_name("task or mixture", one, every_name, try_=f"kd data ls, or {ALL_BUT}CLUSTER")
    return Selection(names)


def tasks_without(held_out: Sequence[str]) -> tuple[str, ...]:
    """The package's tasks outside the held-out clusters and those excluded with them. Raises DataError for an unknown one."""
    excluded = flan_clusters().excluded(held_out)
    return tuple(name for name in task_names() if not excluded & set(load_task(name).clusters))


def load_mixture(selection: Selection, split: str, config: InstructionConfig, load_hub: LoadHub) -> Mixed:
    """Examples of the selected tasks in the mixture's order."""
    return mix([load_task(name) for name in selection.tasks], split, config, load_hub, cap=selection.cap)


def mix(
    tasks: Sequence[TaskFile], split: str, config: InstructionConfig, load_hub: LoadHub, *, cap: int | None = None
) -> Mixed:
    """Load, render and order tasks. One task keeps its order; several are shuffled or drawn (see the module's head)."""
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
        source = load_task_rows(task, split, config.task_root, load_hub)
        most = row_cap(task, split, config, cap)
        part = render_rows(
            task, source.rows, split=split, config=config, place=source.place, cap=most, first=source.first
        )
        if not part.examples:
            raise DataError(
                "a task has no examples",
                where=source.where,
                found=f"0 examples; left out: {part.left_out}",
            )
        parts[task.name] = part
        provenance[f"task {task.name}"] = (
            f"{source.source}; {len(part.examples)} examples, cap {most or 'none'}"
            + (" (drawn, because the rows are in the order of their labels)" if part.drawn else "")
            + f", left out: {part.left_out}"
        )
    pools = {name: part.examples for name, part in parts.items()}
    left_out = joined(part.left_out for part in parts.values())
    if config.mix_maximum is not None:
        examples = sampled(pools, maximum=config.mix_maximum, draws=config.mix_draws, seed=config.data_seed)
    elif len(pools) == 1:
        examples = next(iter(pools.values()))
    else:
        examples = shuffled(pools, seed=config.data_seed)
    return Mixed(examples, provenance, left_out)


def row_cap(task: TaskFile, split: str, config: InstructionConfig, cap: int | None) -> int | None:
    """Rows to keep: the user's number; else, for train only, the mixture's or the task's. None keeps all."""
    if config.max_per_task is not None:
        return config.max_per_task
    return (cap or task.cap) if split == "train" else None


def check_options(tasks: Sequence[TaskFile], config: InstructionConfig) -> None:
    """Raise DataError where `--options` is given and no task has choices."""
    if config.options is True and not any(task.has_choices for task in tasks):
        raise DataError(
            "no task has choices to list",
            where=", ".join(t.name for t in tasks),
            found="--options",
            try_="leave out --options",
        )


def mixing_rates(counts: Mapping[str, int], maximum: int | None = None) -> dict[str, Fraction]:
    """Task -> exact probability of a draw: min(n, maximum) / Σ min(n, maximum). Without a maximum it is n / Σ n.

    counts   rows per task, after the cap

    Raises DataError where there are no rows, or for a negative count.
    """
    if maximum is not None and maximum < 1:
        raise DataError("the rate maximum is too small", found=maximum, expected="at least 1", try_="3000")
    if any(n < 0 for n in counts.values()):
        raise DataError("a task has a negative number of rows", found=dict(counts))
    weights = {name: n if maximum is None else min(n, maximum) for name, n in counts.items()}
    total = sum(weights.values())
    if total == 0:
        raise DataError("the mixture has no rows", found=dict(counts), expected="at least one row")
    return {name: Fraction(weight, total) for name, weight in weights.items()}


def shuffled(pools: Mapping[str, Sequence[Example]], *, seed: int = 0) -> tuple[Example, ...]:
    """All examples of all tasks in an order that depends only on (seed, ids)."""
    return tuple(_order([e for pool in pools.values() for e in pool], seed, "mixture"))


def sampled(
    pools: Mapping[str, Sequence[Example]], *, maximum: int | None = None, draws: int | None = None, seed: int = 0
) -> tuple[Example, ...]:
    """Draw tasks with `mixing_rates` and take each task's examples in turn. N draws are the first N of any larger number.

    A task's examples come in a shuffled order, and in another order each time they are used up; repeats have ` (2)`,
    ` (3)`, … after their id. The default number of draws is Σ min(n, maximum).
    """
    rates = mixing_rates({name: len(pool) for name, pool in pools.items()}, maximum)
    names = sorted(name for name, rate in rates.items() if rate)
    weights = {name: len(pools[name]) if maximum is None else min(len(pools[name]), maximum) for name in names}
    total = sum(weights.values())
    decks: dict[str, list[Example]] = {name: [] for name in names}
    rounds = dict.fromkeys(names, 0)
    examples = []
    for draw in range(total if draws is None else draws):
        number = keyed(seed, "draw", draw) % total  # 256 bits over a small total: exact to 2^-230
        for name in names:
            if number < weights[name]:
                break
            number -= weights[name]
        if not decks[name]:
            rounds[name] += 1
            decks[name] = _order(pools[name], seed, f"round {rounds[name]}")[::-1]
        example = decks[name].pop()
        examples.append(example if rounds[name] == 1 else replace(example, id=f"{example.id} ({rounds[name]})"))
    return tuple(examples)


def _order(examples: Sequence[Example], seed: int, purpose: str) -> list[Example]:
    return sorted(examples, key=lambda e: (keyed(seed, purpose, e.id), e.id))


PRESETS: dict[str, Selection] = {
    "four": Selection(("anli_r1", "boolq", "common_gen", "xsum")),
    "eight": Selection(EIGHT),
    "ten": Selection((*EIGHT, "python_code", "eng_spa")),
}
"""The reference systems' mixtures; their caps are those of the task files."""
