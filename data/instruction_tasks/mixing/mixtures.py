"""Mixtures of tasks: how many rows of each, and in what order. Which tasks a name stands for is in `mixture_names`.

Two different numbers limit a task. The *cap* keeps a task's first rows: 10,000 in the reference systems' mixtures, 30,000 in
FLAN's (`all`, `clusters`, `all-but`, `tasks`). The *rate maximum* (FLAN: 3,000) limits a task's share of the draws, not its
rows. With n_d rows, at most the cap,

    p_d = min(n_d, maximum) / Σ_j min(n_j, maximum)

(Raffel et al. 2020, arXiv:1910.10683, section 3.5.2; Wei et al. 2022, arXiv:2109.01652, section 2.4). Without a
rate maximum all examples are put together and shuffled. The order depends only on (seed, ids), so adding a task keeps the
relative order of the others.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

from kd.common.errors import DataError, unknown_name
from kd.data.data_settings import InstructionConfig
from kd.data.instruction_tasks.draws import keyed
from kd.data.instruction_tasks.mixing.mixture_names import Selection
from kd.data.instruction_tasks.rendering import Rendered, check_template_index, render_rows
from kd.data.instruction_tasks.task import TaskFile
from kd.data.instruction_tasks.task_files import task_names
from kd.data.instruction_tasks.task_rows import LoadHub, MissingRowsError, TaskRows, load_task_rows
from kd.data.left_out import LeftOut, joined
from kd.data.rows.example import Example


@dataclass(frozen=True)
class Mixed:
    """The examples of a mixture in its order."""

    examples: tuple[Example, ...]
    source: dict[str, str]
    """Where the rows of each task come from, and the settings of the text."""
    left_out: LeftOut
    """Rows of the tasks that are not among the examples."""


def load_mixture(selection: Selection, split: str, config: InstructionConfig, load_hub: LoadHub) -> Mixed:
    """Examples of the selected tasks in the mixture's order. Tasks of FLAN's mixtures that have no such split are passed over."""
    if config.tasks_per_cluster is not None:
        selection = selection.first_of_clusters(config.tasks_per_cluster)
    tasks = selection.files()
    without = [task.name for task in tasks if split not in task.splits] if selection.flan else []
    mixed = mix([task for task in tasks if task.name not in without], split, config, load_hub, cap=selection.cap)
    return replace(mixed, source=mixed.source | {f"without split {split}": ", ".join(without)}) if without else mixed


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
    refuse_unknown_limits(config, [*task_names(), *(task.name for task in tasks)])
    for task in tasks:
        check_template_index(task, config)
    sources = _loaded(tasks, split, config, load_hub)
    parts: dict[str, Rendered] = {}
    provenance = {"source": "tasks", "tasks": ", ".join(sources)} | config.provenance()
    clusters_of_files = {
        task.name: list(task.clusters) for task in tasks if task.clusters and task.name not in task_names()
    }
    if clusters_of_files:
        provenance["clusters"] = json.dumps(clusters_of_files)
    if missing := [task.name for task in tasks if task.name not in sources]:
        provenance["missing tasks"] = ", ".join(missing)
    for task in (task for task in tasks if task.name in sources):
        most = row_cap(task, split, config, cap)
        part = _rendered(task, sources.pop(task.name), split, config, most)
        parts[task.name] = part
        provenance[f"task {task.name}"] = part.provenance
    pools = {name: part.examples for name, part in parts.items()}
    left_out = joined(part.left_out for part in parts.values())
    for name in missing:
        left_out.add("missing_tasks", name)
    if config.mix_maximum is not None:
        examples = sampled(pools, maximum=config.mix_maximum, draws=config.mix_draws, seed=config.data_seed)
    elif len(pools) == 1:
        examples = next(iter(pools.values()))
    else:
        examples = shuffled(pools, seed=config.data_seed)
    return Mixed(examples, provenance, left_out)


def _loaded(tasks: Sequence[TaskFile], split: str, config: InstructionConfig, load_hub: LoadHub) -> dict[str, TaskRows]:
    """Task -> its rows. Raises DataError that names all tasks whose rows are missing, unless the settings pass over them."""
    sources: dict[str, TaskRows] = {}
    missing: dict[str, MissingRowsError] = {}
    for task in tasks:
        try:
            sources[task.name] = load_task_rows(task, split, config.task_root, load_hub)
        except MissingRowsError as error:
            missing[task.name] = error
    if not missing or (config.skip_missing and sources):
        return sources
    if len(tasks) == 1:
        raise next(iter(missing.values()))
    reasons = [f"{name}: {error.headline}{_place_in_words(error)}" for name, error in missing.items()]
    raise DataError(
        "the rows of tasks are missing",
        where=f"split {split} of a mixture of {len(tasks)} tasks",
        found="\n".join([f"{len(missing)} without rows", *reasons]),
        try_=None if config.skip_missing else "--skip-missing, to go on without them; or --task-root DIR",
    )


def _place_in_words(error: DataError) -> str:
    details = [str(error.details[key]) for key in ("where", "found") if key in error.details]
    return f" ({'; '.join(details)})" if details else ""


def _rendered(task: TaskFile, source: TaskRows, split: str, config: InstructionConfig, most: int | None) -> Rendered:
    """The examples of one task, and in words where they come from. Raises DataError where there are none."""
    part = render_rows(
        task,
        source.rows,
        split=split,
        config=config,
        location=source.location,
        cap=most,
        first=source.first,
        numbers=source.numbers,
        named=task.splits[split].name if task.flan_protocol else None,
    )
    if not part.examples:
        raise DataError(
            "a task has no examples",
            where=source.where,
            found=f"0 examples; left out: {part.left_out}",
        )
    words = (
        f"{source.source}; {len(part.examples)} examples, cap {most or 'none'}"
        + (" (drawn, because the rows are in the order of their labels)" if part.drawn else "")
        + f", left out: {part.left_out}"
    )
    return replace(part, provenance=words)


def row_cap(task: TaskFile, split: str, config: InstructionConfig, cap: int | None) -> int | None:
    """Rows to keep: the user's number; else, for train only, the mixture's or the task's. None keeps all."""
    limit = config.limit_of(task.name)
    if limit is not None:
        return limit
    return (cap or task.cap) if split == "train" else None


def refuse_unknown_limits(config: InstructionConfig, known: Sequence[str]) -> None:
    """Raise DataError where a limit is given for a task that is not known: it would limit nothing."""
    for task in config.task_limits or {}:
        if task not in known:
            raise unknown_name("task", task, list(dict.fromkeys(known)), where="--task-limits")


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
