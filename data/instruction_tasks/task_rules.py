"""The rules that a task file must keep: one kind of answer, templates that fit it, clusters that exist.

A broken rule is an error when the file is read, and not a hole in a prompt.
"""

from __future__ import annotations

from kd.common.errors import DataError, unknown_name
from kd.common.strangers.braces import template_fields
from kd.data.instruction_tasks.clusters import flan_clusters
from kd.data.instruction_tasks.task import ANSWER, MAX_INVERTED, TaskFile, Template


def check_task(task: TaskFile) -> None:
    """Raise DataError, naming the file and the key, where the parts of a task do not fit together."""
    _check_answer(task)
    for index, template in enumerate(task.templates):
        _check_template(task, template, f"{task.path} templates[{index}]")
    _check_clusters(task)
    _check_inverted(task)
    _check_parts(task)


def _check_parts(task: TaskFile) -> None:
    for name, field in task.fields.items():
        if field.group is not None:
            raise DataError(
                "only references are grouped", where=f"{task.path} fields.{name}", found=f"group: {field.group}"
            )
        if field.alternatives or field.empty is not None:
            raise DataError(
                "only references have alternatives or a word for an empty list",
                where=f"{task.path} fields.{name}",
                found="alternatives" if field.alternatives else f"empty: {field.empty}",
            )
    for name in task.differs:
        if name not in task.fields:
            raise unknown_name("field", name, task.fields, where=f"{task.path} differs")
    if task.target is not None and (task.references is None or task.references.group is not None):
        raise DataError(
            "a target of its own goes with references that are not grouped",
            where=f"{task.path} target",
            found="no references" if task.references is None else f"group: {task.references.group}",
        )
    if set(task.flan_splits) - set(task.splits):
        raise DataError(
            "FLAN's splits are those of the task",
            where=f"{task.path} flan_splits",
            found=", ".join(task.flan_splits),
            expected=", ".join(task.splits),
        )


def _check_answer(task: TaskFile) -> None:
    kinds = [kind for kind in ("labels", "choices", "references") if getattr(task, kind) is not None]
    if len(kinds) != 1:
        raise DataError(
            "a task has one kind of answer",
            where=task.path,
            found=", ".join(kinds) or "none",
            expected="one of labels, choices, references",
        )
    if ANSWER in task.fields:
        raise DataError(
            "a field cannot be called answer",
            where=f"{task.path} fields",
            expected="another name",
            try_="labels, choices or references make {answer}",
        )
    if task.keywords is not None and task.has_choices:
        raise DataError(
            "keywords are for answers in free text",
            where=f"{task.path} keywords",
            expected="references, not labels or choices",
        )


def _check_template(task: TaskFile, template: Template, where: str) -> None:
    names = (*task.fields, ANSWER)
    for text in (template.prompt, template.target):
        for name in template_fields(text, where):
            if name not in names:
                raise unknown_name("field in a template", name, names, where=where)
    has_answer = ANSWER in template_fields(template.target, where)
    if has_answer == template.inverted:
        raise DataError(
            "the target of a template does not fit its kind",
            where=where,
            found=template.target,
            expected="no {answer} (inverted)" if has_answer else "{answer}, or inverted: true",
        )
    if not template_fields(template.target, where):
        raise DataError("the target of a template is always the same", where=where, found=template.target)
    if not template.inverted and ANSWER in template_fields(template.prompt, where):
        raise DataError(
            "a prompt contains the answer",
            where=where,
            found=template.prompt,
            expected="no {answer} in a prompt that is not inverted",
        )


def _check_clusters(task: TaskFile) -> None:
    registry = flan_clusters()
    for cluster in task.clusters:
        if cluster not in registry.clusters:
            raise unknown_name("cluster", cluster, registry.clusters, where=f"{task.path} clusters")
    if task.flan is not None and not registry.clusters_of(task.flan) <= set(task.clusters):
        raise DataError(
            "a task of FLAN lacks a cluster",
            where=f"{task.path} clusters",
            found=", ".join(task.clusters),
            expected=", ".join(sorted(registry.clusters_of(task.flan))),
        )


def _check_inverted(task: TaskFile) -> None:
    inverted = sum(template.inverted for template in task.templates)
    if inverted > MAX_INVERTED or inverted == len(task.templates):
        raise DataError(
            "too many inverted templates",
            where=task.path,
            found=f"{inverted} of {len(task.templates)}",
            expected=f"at most {MAX_INVERTED}, and one that is not",
        )
