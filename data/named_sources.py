"""Sources that are known by a name: the embedded texts, WikiText-2 and FLAN's tasks; and a task of the user's own.

To add one, write a function and add a line to `SOURCES` or `TASK_SOURCES` (docs/extending.md).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from functools import lru_cache

from kd.common.errors import unknown_name
from kd.data.conversations.conversation import CONVERSATIONS
from kd.data.corpus import Corpus
from kd.data.data_settings import InstructionConfig
from kd.data.demo import mini_chat, mini_mixture, mini_open, stdlib_text
from kd.data.instruction_tasks.mixing.mixture_names import no_choice_of_clusters, select, select_mini
from kd.data.instruction_tasks.mixing.mixtures import Mixed, load_mixture, mix
from kd.data.instruction_tasks.task import SPLITS, TaskFile
from kd.data.instruction_tasks.task_files import load_task
from kd.data.instruction_tasks.task_rows import SAME
from kd.data.rows.example import Example
from kd.data.rows.hub import load_hub
from kd.data.rows.row_examples import conversation_example
from kd.data.rows.wikitext import WIKITEXT_CONFIG, WIKITEXT_ID, WIKITEXT_REVISION, wikitext_articles

HELD_OUT = {"test": "heldout", "validation": "heldout", "dev": "heldout"}
"""Other names of the held-out split of `demo`, `mini`, `mini-open` and `mini-chat`."""


@lru_cache(maxsize=4)
def _demo(spec: str, split: str) -> Corpus:
    split = HELD_OUT.get(split, split)
    if split not in ("train", "heldout", "all"):
        raise unknown_name("split", split, ("train", "heldout", "all"), where="the demo source")
    examples = tuple(Example(name, text, task="demo", split=split) for name, text in stdlib_text.documents(split))
    python = ".".join(map(str, sys.version_info[:2]))
    return Corpus(spec, split, "documents", examples, {"source": "demo", "python": python})


@lru_cache(maxsize=4)
def _mini(spec: str, split: str) -> Corpus:
    split = HELD_OUT.get(split, split)
    return Corpus(spec, split, "pairs", tuple(mini_mixture.examples(split)), {"source": "mini"})


@lru_cache(maxsize=4)
def _mini_open(spec: str, split: str) -> Corpus:
    split = HELD_OUT.get(split, split)
    return Corpus(spec, split, "pairs", tuple(mini_open.open_examples(split)), {"source": "mini-open"})


@lru_cache(maxsize=4)
def _mini_chat(spec: str, split: str) -> Corpus:
    split = HELD_OUT.get(split, split)
    examples = tuple(map(conversation_example, mini_chat.mini_conversations(split)))
    return Corpus(spec, split, CONVERSATIONS, examples, {"source": "mini-chat"})


def _wikitext(spec: str, split: str) -> Corpus:
    lines = load_hub(WIKITEXT_ID, WIKITEXT_CONFIG, WIKITEXT_REVISION, split).data["text"]
    source = {"source": WIKITEXT_ID, "config": WIKITEXT_CONFIG, "revision": WIKITEXT_REVISION}
    return Corpus(spec, split, "documents", tuple(wikitext_articles(lines, "wikitext-2", split)), source)


def _flan(spec: str, split: str, instructions: InstructionConfig) -> Corpus:
    mixture = spec.partition(":")[2] or "ten"
    selection = select(mixture)
    mixed = load_mixture(selection, _task_split(split), instructions, load_hub)
    return _of_tasks(spec, split, mixed, selection.files())


def _mini_flan(spec: str, split: str, instructions: InstructionConfig) -> Corpus:
    selection = select_mini(spec.partition(":")[2])
    mixed = load_mixture(selection, _task_split(split), instructions, load_hub)
    return _of_tasks(spec, split, mixed, selection.files())


def own_task(spec: str, split: str, instructions: InstructionConfig) -> Corpus:
    if instructions.tasks_per_cluster is not None:
        raise no_choice_of_clusters(instructions.tasks_per_cluster)
    task = load_task(spec)
    return _of_tasks(spec, split, mix([task], _task_split(split), instructions, load_hub), [task])


def _of_tasks(spec: str, split: str, mixed: Mixed, tasks: Iterable[TaskFile]) -> Corpus:
    metrics = {task.name: task.metrics for task in tasks}
    return Corpus(spec, _task_split(split), "pairs", mixed.examples, mixed.source, metrics, mixed.left_out)


def _task_split(split: str) -> str:
    """`train`, `dev` or `test`; other names of dev, such as validation, become `dev`. Raises DataError."""
    split = "dev" if split in SAME else split
    if split not in SPLITS:
        raise unknown_name("split", split, SPLITS, where="tasks")
    return split


SOURCES: dict[str, Callable[[str, str], Corpus]] = {
    "demo": _demo,
    "mini": _mini,
    "mini-open": _mini_open,
    "mini-chat": _mini_chat,
    "wikitext-2": _wikitext,
}
"""Name -> source."""

TASK_SOURCES: dict[str, Callable[[str, str, InstructionConfig], Corpus]] = {
    "flan": _flan,
    "mini-flan": _mini_flan,
}
"""Name -> source that renders templates."""
