"""HellaSwag: which of four endings continues a description of everyday life? Chance is 0.25, people reach 0.956.

Two protocols are in use under one name, and their figures differ by more than most models do. Ours are named after
them, and a report never puts both in one column:

                     nanogpt                                  harness
    context          `ctx` as it is                           "activity: ctx_a Ctx_b", WikiHow's marks removed
    ending           " " + ending                             " " + ending, marks removed
    tokens           context and ending apart, no BOS or EOS  together, cut where the context's tokens end
    acc              largest sum of log-probabilities         the same
    acc_norm         largest mean per token                   largest sum per character of the ending
    GPT-2 (124M)     0.2859, 0.2955                           0.2892, 0.3114

`nanogpt` is the protocol of the 0.2955 (karpathy/build-nanogpt, hellaswag.py) and one of causal models; `harness` is
that of lm-evaluation-harness, of both kinds of model, and agrees with it choice for choice (see `kd.evaluation.scoring.harness`;
`acc_bytes` is its third norm). With `--chat` it is lm-eval's `--apply_chat_template`: the context is the turn of a user, and
the ending follows the generation prompt without a space. All columns of the output layer count, as in both. Equal scores: the
first ending.

The rows are the 10,042 of the validation split, Rowan/hellaswag at a pinned commit, or local files (`--task-root`).
Files with `ctx` alone, already joined, are taken as they are; `harness` then has no ctx_b to capitalise, and counts
them as `rows_joined`. Zellers et al. 2019, arXiv:1905.07830.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kd.common.errors import DataError, unknown_name
from kd.common.progress import Progress
from kd.data.instruction_tasks.row_reading.row_field import label_key
from kd.data.instruction_tasks.task_files import parse_task
from kd.data.instruction_tasks.task_rows import load_task_rows
from kd.data.rows.example import Example
from kd.data.rows.hub import load_hub
from kd.evaluation.scoring.chat_asking import ChatAsking, asked_by_user
from kd.evaluation.scoring.harness import cut_context, encode_pair, harness_window
from kd.evaluation.scoring.scored_text import ScoredText
from kd.evaluation.scoring.shared_context import shared_nll
from kd.evaluation.statistics.estimates import Documents, Estimate, per_example
from kd.models.families.positions import max_positions
from kd.models.loading import Model
from kd.models.model_config import is_encoder_decoder
from kd.models.tokenizer import Tokenizer

SOURCE = """
about: which ending continues the description
hub: {id: Rowan/hellaswag, revision: 218ec52e09a7e7462a5400043bb9a69a41d06b76}
splits: {dev: validation}
fields: {activity: activity_label, ctx: ctx}
choices: {columns: [endings], label: label}
templates: [{prompt: "{ctx}"}]
"""
"""Task file that says where the rows are. It is not among the tasks of `--data flan:…`, because HellaSwag is measured and
never trained on."""


@dataclass(frozen=True)
class Scene:
    """One row."""

    id: str
    activity: str
    context: str
    """Text of the column `ctx`."""
    parts: tuple[str, str] | None
    """Texts of the columns `ctx_a` and `ctx_b`; None where the file has none."""
    endings: tuple[str, ...]
    answer: int


@dataclass(frozen=True)
class Scenes:
    """Labelled rows in order, and where they came from."""

    rows: tuple[Scene, ...]
    source: str
    unlabelled: int = 0


@dataclass(frozen=True)
class Asked:
    """A scene in the words of a protocol, as token ids."""

    scene: Scene
    context: str
    endings: tuple[str, ...]
    """Texts whose length counts, without the space before them."""
    texts: tuple[ScoredText, ...]
    """One text to score per ending."""
    cut: bool
    """Whether a context lost its beginning."""


@dataclass(frozen=True)
class HellaSwagResult:
    """What a model chose under one protocol. Standard errors are those of a share of rows."""

    estimates: Mapping[str, Estimate]
    """`acc_PROTOCOL`, `acc_norm_PROTOCOL`, and `acc_bytes_harness`."""
    asked: tuple[Asked, ...]
    nats: tuple[np.ndarray, ...]
    """[endings] float64 for each row: log-probability of each ending."""
    chosen: Mapping[str, np.ndarray]
    """Metric -> [rows] int64: index of the chosen ending."""
    documents: Documents
    contexts_cut: int
    """Number of rows in which a context lost its beginning."""
    rows_joined: int
    """Number of rows without `ctx_a` and `ctx_b`."""


def load_scenes(task_root: Path | None = None, limit: int | None = None) -> Scenes:
    """The validation rows: from TASK_ROOT/hellaswag where one is given, else from the hub. Raises DataError."""
    source_rows = load_task_rows(parse_task(SOURCE, "hellaswag", "hellaswag"), "dev", task_root, load_hub)
    rows: list[Scene] = []
    unlabelled = 0
    for number, row in enumerate(source_rows.rows, source_rows.first):
        if limit is not None and len(rows) == limit:
            break
        scene = _scene(row, number, source_rows.location(number))
        unlabelled += scene is None
        rows += [scene] if scene is not None else []
    if not rows:
        raise DataError(
            "no row has an answer",
            where=source_rows.where,
            found=f"{unlabelled} unlabelled rows",
            expected="label: 0..3",
            try_="the validation rows",
        )
    return Scenes(tuple(rows), source_rows.source, unlabelled)


def _scene(row: Mapping[str, Any], number: int, where: str) -> Scene | None:
    """A row checked; None where it has no label."""
    key, endings = label_key(row["label"]), row["endings"]
    if key in ("", "-1", "none"):
        return None
    if isinstance(endings, str) or not all(isinstance(e, str) for e in endings) or len(endings) < 2:
        raise DataError("the endings are not a list of texts", where=where, found=repr(endings)[:60])
    if not key.isdigit() or int(key) >= len(endings):
        raise DataError(
            "the label is not one of the endings", where=where, found=key, expected=f"0..{len(endings) - 1}"
        )
    texts = [row[name] for name in ("activity_label", "ctx")]
    first, second = row.get("ctx_a"), row.get("ctx_b")
    if not all(isinstance(text, str) for text in texts) or not texts[1].strip():
        raise DataError("a context is not text", where=where, found=repr(texts)[:60], expected="activity_label and ctx")
    parts = (first, second) if isinstance(first, str) and isinstance(second, str) else None
    return Scene(f"hellaswag/dev/{number}", texts[0], texts[1], parts, tuple(endings), int(key))


def without_marks(text: str) -> str:
    """Remove what WikiHow's pages left in their rows: ` [title]` ends a sentence, other brackets go with their text."""
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


def evaluate_hellaswag(
    model: Model,
    tokenizer: Tokenizer,
    scenes: Scenes,
    *,
    protocol: str = "nanogpt",
    seq_len: int | None = None,
    tokens_per_batch: int | None = None,
    chat: ChatAsking | None = None,
) -> Iterator[Progress[HellaSwagResult]]:
    """Score every ending; the last record carries the result.

    seq_len   tokens a model sees at once; None = its positions (harness: what lm-eval takes for them)
    chat      the chat template that asks (harness alone); None = the texts stand as they are

    Raises DataError for an unknown protocol, `nanogpt` with an encoder-decoder, and an ending that has no tokens or more
    than the window.
    """
    if protocol not in PROTOCOLS:
        raise unknown_name("protocol", protocol, PROTOCOLS)
    refuse_chat(protocol, chat is not None)
    ask, norms = PROTOCOLS[protocol]
    encoder, limit = is_encoder_decoder(model.config), max_positions(model.config)
    if seq_len is not None and limit is not None and seq_len > limit:
        raise DataError(
            "the window is longer than the model's positions",
            found=f"{seq_len} tokens",
            expected=f"at most {limit}",
            try_=f"--seq-len {limit}",
        )
    window = seq_len or (harness_window(model.config, tokenizer) if protocol == "harness" else limit)
    if encoder and chat is not None:
        raise DataError("an encoder-decoder has no chat template", try_="without --chat")
    asked = tuple(ask(scene, tokenizer, window, encoder, chat) for scene in scenes.rows)
    texts = [text for a in asked for text in a.texts]
    nll_N = yield from shared_nll(model, texts, tokens_per_batch=tokens_per_batch)
    nats_O = per_example(-nll_N, [len(t.target_ids) for t in texts])
    nats = tuple(np.split(nats_O, np.cumsum([len(a.texts) for a in asked])[:-1]))
    chosen = {
        name: np.array([_largest(values / lengths(a)) for a, values in zip(asked, nats, strict=True)])
        for name, lengths in norms.items()
    }
    documents = Documents.of_examples([s.id for s in scenes.rows], "pairs")
    answers, ones = np.array([s.answer for s in scenes.rows]), np.ones(len(asked))
    estimates = {name: documents.ratio((values == answers).astype(np.float64), ones) for name, values in chosen.items()}
    joined = sum(s.parts is None for s in scenes.rows) if protocol == "harness" else 0
    result = HellaSwagResult(estimates, asked, nats, chosen, documents, sum(a.cut for a in asked), joined)
    yield Progress(len(nll_N), len(nll_N), result)


def _largest(scores: np.ndarray) -> int:
    """Index of the largest, of equal ones the first: numpy's argmax, as in both originals."""
    return int(np.argmax(scores))


def refuse_chat(protocol: str, chat: bool) -> None:
    """Raise DataError for `--chat` with a protocol that knows no chat template."""
    if chat and protocol != "harness":
        raise DataError(
            "this protocol asks through no chat template",
            found=f"--chat with --protocol {protocol}",
            try_="--protocol harness, which is lm-eval's with --apply_chat_template",
        )


def ask_nanogpt(
    scene: Scene, tokenizer: Tokenizer, window: int | None, encoder: bool, chat: ChatAsking | None = None
) -> Asked:
    """Raw text, context and ending tokenised apart, no special tokens."""
    if encoder:
        raise DataError("nanogpt is a protocol of causal models", found="an encoder-decoder", try_="--protocol harness")

    def ids(text: str) -> np.ndarray:
        return np.array(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=np.int32)

    context = ids(scene.context)
    endings = [ids(" " + ending) for ending in scene.endings]
    return _asked(scene, scene.context, scene.endings, [(context, e) for e in endings], window, encoder=False)


def ask_harness(
    scene: Scene, tokenizer: Tokenizer, window: int | None, encoder: bool, chat: ChatAsking | None = None
) -> Asked:
    """lm-eval's preprocessing, and its way to token ids.

    With a chat template the context is the turn of a user, and an ending follows the generation prompt without a space.
    """
    text = scene.context if scene.parts is None else f"{scene.parts[0]} {scene.parts[1].capitalize()}"
    context = without_marks(f"{scene.activity}: {text}")
    endings = tuple(without_marks(ending) for ending in scene.endings)
    gap = " "
    if chat is not None:
        context, gap = chat.rendered(asked_by_user(Example(scene.id, "", context))), ""
    pairs = [encode_pair(tokenizer, context, gap + ending, encoder=encoder) for ending in endings]
    return _asked(scene, context, endings, pairs, window, encoder=encoder)


def _asked(
    scene: Scene,
    context: str,
    endings: tuple[str, ...],
    pairs: Sequence[tuple[np.ndarray, np.ndarray]],
    window: int | None,
    *,
    encoder: bool,
) -> Asked:
    """The texts to score: contexts cut at their beginning where the window does not hold them."""
    texts = []
    for (context_ids, target_ids), ending in zip(pairs, endings, strict=True):
        count = len(target_ids)
        if not len(context_ids) or not count or (window is not None and count > window):
            raise DataError(
                "an ending cannot be scored",
                where=f"example {scene.id}",
                found=f"{ending!r}: {count} tokens after {len(context_ids)}",
                expected="at least 1" if window is None else f"1..{window} tokens",
            )
        if window is not None:
            context_ids = cut_context(context_ids, count, window, encoder=encoder)
        texts.append(ScoredText(scene.id, context_ids, target_ids))
    cut = any(len(t.context_ids) < len(c) for t, (c, _) in zip(texts, pairs, strict=True))
    return Asked(scene, context, endings, tuple(texts), cut)


def _one(asked: Asked) -> np.ndarray:
    return np.ones(len(asked.texts))


def _tokens(asked: Asked) -> np.ndarray:
    return np.array([len(t.target_ids) for t in asked.texts], dtype=np.float64)


def _characters(asked: Asked) -> np.ndarray:
    return np.array([max(len(e), 1) for e in asked.endings], dtype=np.float64)


def _bytes(asked: Asked) -> np.ndarray:
    return np.array([max(len(e.encode("utf-8")), 1) for e in asked.endings], dtype=np.float64)


Ask = Callable[[Scene, Tokenizer, int | None, bool, ChatAsking | None], Asked]
Norm = Callable[[Asked], np.ndarray]

PROTOCOLS: dict[str, tuple[Ask, dict[str, Norm]]] = {
    "nanogpt": (ask_nanogpt, {"acc_nanogpt": _one, "acc_norm_nanogpt": _tokens}),
    "harness": (
        ask_harness,
        {"acc_harness": _one, "acc_norm_harness": _characters, "acc_bytes_harness": _bytes},
    ),
}
"""Protocol -> the function that words a scene, and for each metric the length that divides an ending's log-probability."""
