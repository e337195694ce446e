"""kd data: look at text sources."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from kd.commands.terminal.console import emit, emit_json, quiet_libraries, say
from kd.commands.terminal.options import json_option
from kd.commands.terminal.settings_options import SettingsCommand, settings_options
from kd.common.setting_fields import settings_of
from kd.data.conversations.chat_settings import ChatSettings
from kd.data.conversations.conversation import CONVERSATIONS
from kd.data.data_settings import DataSettings, InstructionConfig

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from kd.data.corpus import Corpus
    from kd.data.instruction_tasks.task import TaskFile
    from kd.data.rows.example import Example

SHOWN_EXAMPLES = 3
"""Examples that `kd data show` prints by default."""
TEMPLATE_OPTIONS = ("options", "labels")
"""Settings of the text that change how a template looks."""


@click.group()
def data() -> None:
    """Look at text sources."""


@data.command("ls")
@click.argument("mixture", required=False)
@json_option
def data_ls(mixture: str | None, as_json: bool) -> None:
    """List the named sources, the instruction tasks and mixtures, and the file types.

    With MIXTURE, such as flan or flan:all-but=nli, list its tasks: cluster, rows for training, development and test, source,
    commit, licence, and how sure the facts are (A seen in a public source, B seen once, C not seen). Nothing is loaded.

    Example: kd data ls flan
    """
    if mixture is not None:
        list_tasks(mixture, as_json)
        return
    result = source_lines()
    if as_json:
        emit(result, as_json)
        return
    for name, text in result.items():
        say(f"  {name:<29}{text}")


def list_tasks(mixture: str, as_json: bool) -> None:
    """Print the tasks of a mixture; `flan` alone stands for all of FLAN. Raises DataError."""
    from kd.data.instruction_tasks.mixing.mixture_names import known_rows, select, select_mini

    source, _, name = mixture.partition(":")
    real = mixture.removeprefix("flan").removeprefix(":") or "all"
    selection = select_mini(name) if source == "mini-flan" else select(real)
    tasks = selection.files()
    if as_json:
        emit_json([task_facts(task, known_rows, selection.cap) for task in tasks])
        return
    for task in tasks:
        facts = task_facts(task, known_rows, selection.cap)
        rows = " / ".join("?" if n is None else f"{n:,}" for n in facts["rows"].values())
        say(f"{task.name:<34}{', '.join(task.clusters) or '-':<36}{rows}")
        commit = f" @ {facts['commit']}" if facts["commit"] else " (commit at the time of loading)" if task.hub else ""
        say(f"  {facts['source']}{commit}; licence {facts['licence'] or 'unknown'}; sure {task.sure or '-'}")
    known = [n for task in tasks if (n := known_rows(task, "train", selection.cap or task.cap)) is not None]
    say(
        f"{len(tasks)} tasks, {len({t.flan for t in tasks if t.flan})} data sets of FLAN, {sum(known):,} rows for training"
    )


def task_facts(
    task: TaskFile, rows: Callable[[TaskFile, str, int | None], int | None], cap: int | None
) -> dict[str, Any]:
    """A task as `kd data ls flan --json` shows it; rows that are not known are None."""
    return {
        "task": task.name,
        "flan": task.flan,
        "about": task.about,
        "clusters": list(task.clusters),
        "rows": {s: rows(task, s, (cap or task.cap) if s == "train" else None) for s in ("train", "dev", "test")},
        "splits": {name: str(part) for name, part in task.splits.items()},
        "source": source_in_words(task),
        "commit": task.hub.revision if task.hub else None,
        "licence": "that of this package" if task.made is not None else task.licence,
        "sure": task.sure,
    }


def source_in_words(task: TaskFile) -> str:
    """Where the rows of a task come from: a hub id, addresses or files, or --task-root."""
    if task.made is not None:
        return f"made by the rule {task.made}"
    if task.files:
        return next(iter(task.files.values()))[0]
    if task.hub is not None:
        return task.hub.id + (f":{task.hub.config}" if task.hub.config else "")
    return f"--task-root, from {task.url}"


def source_lines() -> dict[str, str]:
    """Spec -> what it stands for, in a line."""
    from kd.data.instruction_tasks.clusters import flan_clusters
    from kd.data.instruction_tasks.glue import glue_tasks
    from kd.data.instruction_tasks.mixing.mixture_names import PRESETS
    from kd.data.instruction_tasks.task_files import load_task, task_names
    from kd.data.named_sources import SOURCES
    from kd.data.rows.compressed import COMPRESSIONS
    from kd.data.rows.local_files import FILE_READERS
    from kd.data.rows.wikitext import WIKITEXT_CONFIG, WIKITEXT_ID, WIKITEXT_REVISION

    about = {
        "demo": "the English of Python's standard library; offline; splits train, heldout",
        "mini": "seven small instruction tasks made up by rules; offline; splits train, heldout",
        "mini-open": "questions with several right answers, made up by rules; offline; splits train, heldout",
        "mini-chat": "small conversations with a call of a tool, made up by rules; offline; splits train, heldout",
        "wikitext-2": f"{WIKITEXT_ID}:{WIKITEXT_CONFIG}@{WIKITEXT_REVISION[:8]}; splits train, validation, test",
    }
    lines = {name: about.get(name, "") for name in SOURCES}
    lines["flan"] = "flan:ten"
    lines |= {f"flan:{name}": ", ".join(preset.tasks) for name, preset in PRESETS.items()}
    lines |= {f"flan:{name}": load_task(name).about for name in task_names()}
    lines["flan:all"] = f"FLAN's {len(flan_clusters().datasets)} data sets in its own cut; kd data ls flan"
    lines["flan:clusters=CLUSTER"] = "those of some clusters: " + ", ".join(flan_clusters().clusters)
    lines["flan:all-but=CLUSTER"] = "those of no held-out cluster"
    lines["flan:tasks=TASK"] = "some of them, in FLAN's own cut"
    lines["mini-flan"] = (
        "thirty small tasks in ten of FLAN's clusters, made up by rules; offline; clusters=, all-but=, tasks= as above"
    )
    lines |= {f"glue/{t.name}": f"GLUE: {' + '.join(t.texts)} -> {', '.join(t.labels)}" for t in glue_tasks().values()}
    lines["FILE.yaml"] = "a task of your own (docs/extending.md)"
    lines["FILE or FOLDER"] = " ".join(FILE_READERS) + f"; also {' and '.join(COMPRESSIONS)}"
    lines["'FOLDER/*.txt', FILE,FILE"] = "a glob, or several files, folders and globs"
    lines["s3://BUCKET/PATH"] = "files in an S3 store, likewise (the extra s3)"
    lines["hub-id[:config][@revision]"] = "any data set on the hub that loads without code"
    return lines


@data.command("show", cls=SettingsCommand)
@click.argument("spec", nargs=-1, required=True)
@settings_options(DataSettings, leave_out=("spec",), config=False)
@settings_options(ChatSettings, config=False, argument="chat")
@click.option("--tokenizer", metavar="NAME", help="Also show what a causal model with this tokenizer would read.")
@json_option
def data_show(
    spec: tuple[str, ...], settings: DataSettings, chat: ChatSettings, tokenizer: str | None, as_json: bool
) -> None:
    """Show the first examples of SPEC (--limit of them, or 3), its size, its digest, and what was left out of it.

    Several files or folders are one text. With --tokenizer, it also shows how many tokens would be scored, and what was
    found in the texts, such as control tokens. Conversations are shown as the tokenizer's chat template renders them; what
    is scored stands between ⟦ and ⟧.

    Example: kd data show demo --limit 3
    """
    from kd.data.sources import load_corpus

    corpus = load_corpus(
        ",".join(spec),
        split=settings.split,
        columns=settings.columns,
        form=settings.format,
        bad_rows=settings.bad_rows,
        instructions=settings.instructions,
        rows=settings.rows,
    )
    shown = corpus.examples[: settings.limit or SHOWN_EXAMPLES]
    size = sum(len(e.target.encode()) + len(e.prompt.encode()) for e in corpus.examples)
    result = {
        "spec": corpus.spec,
        "split": corpus.split,
        "kind": corpus.kind,
        "examples": len(corpus.examples),
        "bytes": size,
        "text_digest": corpus.digest,
        "left_out": corpus.left_out.document(),
    }
    if tokenizer is not None:
        result |= as_tokens(corpus, tokenizer, chat)
    rendered: dict[str, str] = {}
    if corpus.kind == CONVERSATIONS and tokenizer is not None:
        rendered = renderings(shown, tokenizer, chat)
    if as_json:
        result["source"] = corpus.source
        document = {"shown": [asdict(e) for e in shown]} | ({"rendered": rendered} if rendered else {})
        emit_json(result | document)
        return
    emit(result, False)
    for name, text in rendered.items():
        say(f"  [{name}] {text!r}")
    for example in () if rendered else shown:
        prompt = f"{clipped(example.prompt)!r} -> " if example.prompt else ""
        say(f"  [{example.id}] {prompt}{clipped(example.target)!r}")


def renderings(shown: Sequence[Example], name: str, chat: ChatSettings) -> dict[str, str]:
    """Id -> what a model reads of a conversation, with ⟦ and ⟧ around what is scored. Raises DataError."""
    quiet_libraries()
    from kd.data.chat_rows import chat_template, conversation_rows
    from kd.models.tokenizer import load_tokenizer, token_bytes

    tokenizer = load_tokenizer(name)
    template, pieces = chat_template(tokenizer, chat), token_bytes(tokenizer)
    rows = [row for example in shown for row in conversation_rows(example, template, pieces, chat)]
    texts: dict[str, str] = {}
    for row in rows:
        parts = row.gaps.sequence(row.context_ids, row.target_ids)
        scored = set(row.gaps.positions(len(row.context_ids), len(row.target_ids)) + 1)
        text, inside = b"", False
        for position, token in enumerate(parts):
            if (position in scored) != inside:
                text, inside = text + ("⟧" if inside else "⟦").encode(), not inside
            text += pieces[token]
        texts[row.example.id] = text.decode("utf-8", "replace") + "⟧"
    return texts


def as_tokens(corpus: Corpus, name: str, chat: ChatSettings) -> dict[str, object]:
    """What tokenising a text finds: tokens to score, what was left out, and the notes. Raises DataError."""
    quiet_libraries()
    from kd.data.chat_rows import chat_template, tokenize_conversations
    from kd.data.left_out import joined
    from kd.data.tokenizing.block_config import BlockConfig
    from kd.data.tokenizing.corpus_rows import tokenize_corpus
    from kd.data.tokenizing.token_notes import TokenNotes
    from kd.models.tokenizer import load_tokenizer

    left_out, notes = joined([corpus.left_out]), TokenNotes()
    tokenizer, blocks = load_tokenizer(name), BlockConfig(seq_len=2**31 - 1)
    if corpus.kind == CONVERSATIONS:
        rows = tokenize_conversations(corpus, chat_template(tokenizer, chat), chat, blocks, left_out, notes)
    else:
        rows = tokenize_corpus(corpus, tokenizer, blocks, left_out, notes)
    return {
        "tokens_scored": sum(len(row.target_ids) for row in rows),
        "left_out": left_out.document(),
        "token_notes": notes.document(),
    }


@data.command("templates", cls=SettingsCommand)
@click.argument("task")
@settings_options(
    InstructionConfig, leave_out=settings_of(InstructionConfig).keys() - set(TEMPLATE_OPTIONS), config=False
)
@json_option
def data_templates(task: str, settings: InstructionConfig, as_json: bool) -> None:
    """Show the templates of TASK (a name, or a .yaml file) on an example row, without any data.

    Example: kd data templates boolq
    """
    from kd.data.instruction_tasks.mixing.mixtures import check_options
    from kd.data.instruction_tasks.rendering import show_templates
    from kd.data.instruction_tasks.task_files import load_task

    task_file = load_task(task.removeprefix("flan:"))
    check_options([task_file], settings)
    shown = show_templates(task_file, settings)
    if as_json:
        say(json.dumps(task_document(task_file, shown), indent=2, ensure_ascii=False))
        return
    say(f"{task_file.name}: {task_file.about}")
    for index, (template, example) in enumerate(zip(task_file.templates, shown, strict=True)):
        say(f"\n[{index}]{' inverted' if template.inverted else ''}\n{example.prompt}\n=> {example.target}")


def task_document(task: TaskFile, shown: Sequence[Example]) -> dict[str, object]:
    """A task as JSON: its settings, and its templates with the example row in each."""
    return {
        "task": task.name,
        "about": task.about,
        "clusters": task.clusters,
        "metrics": task.metrics,
        "hub": None if task.hub is None else asdict(task.hub),
        "columns": task.columns,
        "splits": {name: str(part) for name, part in task.splits.items()},
        "licence": task.licence,
        "example": task.example,
        "templates": [asdict(t) | {"shown": asdict(e)} for t, e in zip(task.templates, shown, strict=True)],
    }


def clipped(text: str, width: int = 160) -> str:
    """The text, or its beginning and an ellipsis where it is longer than `width` characters."""
    return text if len(text) <= width else text[: width - 1] + "…"
