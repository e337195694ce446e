"""kd data: look at text sources."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from kd.commands.console import emit, emit_json
from kd.commands.options import corpus_options, json_option

if TYPE_CHECKING:
    from kd.data.data_settings import InstructionConfig


@click.group()
def data() -> None:
    """Look at text sources."""


@data.command("ls")
@json_option
def data_ls(as_json: bool) -> None:
    """List the named sources, the instruction tasks and mixtures, and the file types.

    Example: kd data ls
    """
    from kd.data.rows.local_files import FILE_READERS
    from kd.data.rows.wikitext import WIKITEXT_CONFIG, WIKITEXT_ID, WIKITEXT_REVISION
    from kd.data.sources import SOURCES
    from kd.data.tasks.clusters import flan_clusters
    from kd.data.tasks.glue import glue_tasks
    from kd.data.tasks.mixtures import PRESETS
    from kd.data.tasks.task_files import load_task, task_names

    about = {
        "demo": "the standard library's own English; offline; splits train, heldout",
        "mini": "seven small instruction tasks made up by rule; offline; splits train, heldout",
        "wikitext-2": f"{WIKITEXT_ID}:{WIKITEXT_CONFIG}@{WIKITEXT_REVISION[:8]}; splits train, validation, test",
    }
    result = {name: about.get(name, "") for name in SOURCES}
    result["flan"] = "flan:ten"
    result |= {f"flan:{name}": ", ".join(preset.tasks) for name, preset in PRESETS.items()}
    result |= {f"flan:{name}": load_task(name).about for name in task_names()}
    result["flan:all"] = "every task above"
    result["flan:all-but=CLUSTER"] = "the tasks of no held-out cluster: " + ", ".join(flan_clusters().clusters)
    result |= {f"glue/{t.name}": f"GLUE: {' + '.join(t.texts)} -> {', '.join(t.labels)}" for t in glue_tasks().values()}
    result["FILE.yaml"] = "a task of your own (docs/extending.md)"
    result["FILE or FOLDER"] = " ".join(FILE_READERS)
    result["hub-id[:config][@revision]"] = "any data set on the hub that loads without code"
    if as_json:
        emit(result, as_json)
        return
    for name, text in result.items():
        click.echo(f"  {name:<29}{text}")


@data.command("show")
@click.argument("spec")
@corpus_options
@json_option
def data_show(
    spec: str,
    split: str | None,
    columns: dict[str, str],
    limit: int | None,
    instructions: InstructionConfig,
    as_json: bool,
) -> None:
    """Show the first examples of SPEC, its size and its digest.

    Example: kd data show demo --limit 3
    """
    from kd.data.sources import load_corpus

    corpus = load_corpus(spec, split=split, columns=columns, instructions=instructions)
    shown = corpus.examples[: limit or 3]
    size = sum(len(e.target.encode()) + len(e.prompt.encode()) for e in corpus.examples)
    result = {
        "spec": spec,
        "split": corpus.split,
        "kind": corpus.kind,
        "examples": len(corpus.examples),
        "bytes": size,
        "text_digest": corpus.digest,
    }
    if as_json:
        result["source"] = corpus.source
        emit_json(result | {"shown": [asdict(e) for e in shown]})
        return
    emit(result, False)
    for example in shown:
        prompt = f"{_clip(example.prompt)!r} -> " if example.prompt else ""
        click.echo(f"  [{example.id}] {prompt}{_clip(example.target)!r}")


@data.command("templates")
@click.argument("task")
@click.option(
    "--options/--no-options", default=None, help="List the choices after the prompt; by default where there are any."
)
@click.option("--labels", default="original", show_default=True, help="Wording of fixed labels, original or flan.")
@json_option
def data_templates(task: str, options: bool | None, labels: str, as_json: bool) -> None:
    """Show the templates of TASK (a name, or a .yaml file) on an example row; needs no data.

    Example: kd data templates boolq
    """
    from kd.common.settings import make
    from kd.data.data_settings import InstructionConfig
    from kd.data.tasks.mixtures import check_options
    from kd.data.tasks.rendering import show_templates
    from kd.data.tasks.task_files import load_task

    found = load_task(task.removeprefix("flan:"))
    config = make(InstructionConfig, {"options": options, "labels": labels})
    check_options([found], config)
    shown = show_templates(found, config)
    if as_json:
        settings = {
            "task": found.name,
            "about": found.about,
            "clusters": found.clusters,
            "metrics": found.metrics,
            "hub": None if found.hub is None else asdict(found.hub),
            "columns": found.columns,
            "splits": {name: str(part) for name, part in found.splits.items()},
            "example": found.example,
        }
        rendered = [asdict(t) | {"shown": asdict(e)} for t, e in zip(found.templates, shown, strict=True)]
        click.echo(json.dumps(settings | {"templates": rendered}, indent=2, ensure_ascii=False))
        return
    click.echo(f"{found.name}: {found.about}")
    for index, (template, example) in enumerate(zip(found.templates, shown, strict=True)):
        click.echo(f"\n[{index}]{' inverted' if template.inverted else ''}\n{example.prompt}\n=> {example.target}")


def _clip(text: str, width: int = 160) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"
