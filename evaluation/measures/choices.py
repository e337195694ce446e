"""Rank classification: which of an example's choices does the model find most probable after the prompt?

No text is generated and nothing can be misread: a model that answers "It's not possible to say" instead of
"Neutral" is still measured. Each option is forced as the target, its log-probability is the sum over its tokens,

    l(option) = Σ_t ln q(token_t | prompt, tokens before t)          in nats; EOS after the option is not scored

and the prediction is the option with the largest

    accuracy         l / tokens       the default: long options are not punished; depends on the tokenizer's lengths
    accuracy_sum     l                the probability of the option itself; favours short ones
    accuracy_chars   l / characters   the same division for every tokenizer (`acc_norm` of lm-evaluation-harness)

How prompt and option become tokens is `encoding`:

    training   as in training: [BOS] prompt + separator + option are one string, and the tokens that end before the option
               and are the same for every option are context; a prompt that leaves no room for the longest option is cut
               at its beginning, alike for every option of the example
    together   as lm-evaluation-harness: also one string, split by its rule and with the tokenizer's own special tokens
               (see `kd.evaluation.scoring.harness`)

With `--chat` the prompt is the turn of a user and an option that of the assistant, in the model's chat template:

    training   as conversations are trained on: the template renders the option as the assistant's turn; what it writes
               before an answer is context, and the token that ends the turn is not scored
    together   as lm-evaluation-harness with `--apply_chat_template`: the option follows the generation prompt

An encoder-decoder reads the prompt with its encoder, and the option exists on the decoder's side only: an option among
the encoder's input would be copied. All columns of the output layer count, ids that no tokenizer emits too: mass that
a model puts there is missing from its options. Given the same tokens the log-probabilities are lm-eval's own.

Scores closer than float32 can tell apart are a tie, and the first index wins. The context passes through the model once
for all options (`kd.evaluation.scoring.shared_context`). Brown et al. 2020, arXiv:2005.14165, section 2.4; Wei et al. 2021,
arXiv:2109.01652 (FLAN), section 2.5; Gao et al., lm-evaluation-harness.

Shapes: E examples, O options of all of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from kd.common.errors import DataError, unknown_name
from kd.common.progress import Progress
from kd.data.corpus import Corpus
from kd.data.rows.example import Example
from kd.data.tokenizing.block_config import BlockConfig
from kd.data.tokenizing.pair_rows import fit_pair, tokenize_pair, with_bos
from kd.data.tokenizing.text_tokens import TextTokens
from kd.data.tokenizing.token_rows import TokenRows
from kd.evaluation.scoring.chat_asking import ChatAsking, asks_chat
from kd.evaluation.scoring.harness import cut_context, encode_pair, harness_window
from kd.evaluation.scoring.reading_options import READING, ReadingOptions
from kd.evaluation.scoring.scored_text import ScoredText
from kd.evaluation.scoring.shared_context import shared_nll
from kd.evaluation.scoring.windows import prompt_blocks
from kd.evaluation.statistics.estimates import Documents, Estimate, figures_by_task, per_example
from kd.models.families.positions import max_positions
from kd.models.loading import Model
from kd.models.tokenizer import Tokenizer

TIE = 1e-6
"""Relative difference below which two scores are a tie: forward passes in float32 with other batch shapes differ by about
as much."""


@dataclass(frozen=True)
class Question:
    """One example as token ids."""

    example: Example
    context_ids: np.ndarray
    """[C] int32 ids of the prompt, the same for all options."""
    option_ids: tuple[np.ndarray, ...]
    """[n] int32 ids of each option, n >= 1, without EOS."""
    answer: int
    """Index of the right option."""


@dataclass(frozen=True)
class ChoicesResult:
    """What a model chose. Standard errors are those of a share of examples."""

    estimates: Mapping[str, Estimate]
    """`accuracy`, `accuracy_sum`, `accuracy_chars`, `accuracy_mean_of_tasks`, and `accuracy/TASK` for each task."""
    questions: tuple[Question, ...]
    option_nats: tuple[np.ndarray, ...]
    """[options] float64 for each question: l, the log-probability of each option."""
    predictions: np.ndarray
    """[E] int64: index of the option with the largest mean per token."""
    documents: Documents
    skipped: int
    """Number of examples without two choices or without a known answer."""
    prompts_cut: int
    """Number of examples whose prompt lost its beginning."""


def evaluate_choices(
    model: Model,
    tokenizer: Tokenizer,
    corpus: Corpus,
    *,
    reading: ReadingOptions = READING,
    encoding: str = "training",
) -> Iterator[Progress[ChoicesResult]]:
    """Score every option of `corpus`; the last record carries the result.

    reading    its `seq_len` None means lm-eval's window where `encoding` is `together`, which also leaves BOS to the tokenizer
    encoding   key of `ENCODINGS`

    Raises DataError for an unknown encoding, when no example has choices, or an option has no tokens or more than the
    model has positions.
    """
    if encoding not in ENCODINGS:
        raise unknown_name("encoding", encoding, ENCODINGS)
    chat = ChatAsking.of(tokenizer, reading) if asks_chat(corpus) else None
    if encoding == "together" and reading.seq_len is None:
        reading = replace(reading, seq_len=harness_window(model.config, tokenizer))
    blocks = prompt_blocks(model, tokenizer, reading)
    if blocks.encoder and chat is not None:
        raise DataError("an encoder-decoder has no chat template", where=corpus.spec, try_="without --chat")
    limit = max_positions(model.config, decoder=True) if blocks.encoder else blocks.seq_len - 1
    limit = limit if limit is None else limit - len(blocks.forced)
    counts: Counter[str] = Counter()
    questions = list(ENCODINGS[encoding](corpus, tokenizer, blocks, limit, counts, chat))
    if not questions:
        raise DataError(
            "no example has choices",
            where=corpus.spec,
            found=f"{len(corpus.examples)} examples",
            expected="at least two choices and an answer among them",
            try_="--tasks perplexity or generation",
        )
    texts = [ScoredText(q.example.id, q.context_ids, ids) for q in questions for ids in q.option_ids]
    lengths = [len(t.target_ids) for t in texts]
    forced = () if encoding == "together" else blocks.forced  # lm-eval forces none
    nll_N = yield from shared_nll(model, texts, tokens_per_batch=reading.tokens_per_batch, forced=forced)
    starts = np.cumsum([0, *(len(q.option_ids) for q in questions)])
    nats_O = per_example(-nll_N, lengths)
    option_nats = tuple(nats_O[starts[i] : starts[i + 1]] for i in range(len(questions)))
    yield Progress(len(nll_N), len(nll_N), choices_of(questions, option_nats, counts))


def ask(
    corpus: Corpus,
    tokenizer: Tokenizer,
    blocks: BlockConfig,
    limit: int | None,
    counts: Counter[str],
    chat: ChatAsking | None = None,
) -> Iterator[Question]:
    """The questions of `corpus` in order; `counts` receives how many were `skipped` and how many prompts `cut`.

    limit   most tokens of an option; None = any number
    chat    how conversations are asked; None = the examples are prompts without a chat template
    """
    words = TextTokens(tokenizer, blocks.control_tokens)
    for example in corpus.examples:
        answer = right_answer(example)
        if answer is None:
            counts["skipped"] += 1
            continue
        context, options = tokenize_options(example, words, blocks) if chat is None else chat.options(example)
        for ids, option in zip(options, example.choices, strict=True):
            if not len(ids):
                raise DataError("an option has no tokens", where=f"example {example.id}", found=repr(option))
            if limit is not None and len(ids) > limit:
                raise DataError(
                    "an option is longer than the model's window",
                    where=f"example {example.id}",
                    found=f"{len(ids)} tokens",
                    expected=f"at most {limit}",
                    try_="a larger --seq-len, where the model has the positions",
                )
        longest = max(options, key=len)
        fitted = fit_pair(TokenRows(example, context, longest, np.zeros(len(longest), dtype=np.int64)), blocks)
        assert fitted is not None, "an option within the limit is not cut"
        counts["cut"] += len(fitted.context_ids) < len(context)
        yield Question(example, fitted.context_ids, tuple(options), answer)


def tokenize_options(
    example: Example, words: TextTokens, blocks: BlockConfig
) -> tuple[np.ndarray, tuple[np.ndarray, ...]]:
    """The context that all options share, `[C]`, and the ids of each option after it, without EOS.

    Where the options' first tokens begin before the border (` yes` and ` no` after a space), so do all options: what they
    have of the prompt is the same text. Raises DataError where there is no context.
    """
    if blocks.encoder:
        context = tokenize_pair(replace(example, target=""), words, blocks).context_ids
        return context, tuple(words.target(option, Counter())[0] for option in example.choices)
    asked = example.prompt + words.separator(example.prompt, blocks.separator)
    joints = [words.joint(asked, option, Counter()) for option in example.choices]
    shared = min(joint.before for joint in joints)
    while shared and any(not np.array_equal(j.ids[:shared], joints[0].ids[:shared]) for j in joints):
        shared -= 1
    context = with_bos(joints[0].ids[:shared], words, blocks, Counter())
    if len(context):
        return context.astype(np.int32), tuple(joint.ids[shared:] for joint in joints)
    context = tokenize_pair(replace(example, target=""), words, blocks).context_ids
    return context, tuple(words.target(option, Counter())[0] for option in example.choices)


def ask_together(
    corpus: Corpus,
    tokenizer: Tokenizer,
    blocks: BlockConfig,
    limit: int | None,
    counts: Counter[str],
    chat: ChatAsking | None = None,
) -> Iterator[Question]:
    """As `ask`, tokenised as lm-eval does; white space at the end of a prompt counts as part of every option.

    A prompt is cut as the longest option needs, so that all are judged after one context (lm-eval cuts for each alone).
    """
    for example in corpus.examples:
        answer = right_answer(example)
        if answer is None:
            counts["skipped"] += 1
            continue
        separator = "" if blocks.encoder else blocks.separator
        asked = example.prompt + separator if chat is None else chat.rendered(example)
        if not asked.strip():
            raise DataError(
                "an example has no context to predict from",
                where=f"example {example.id}",
                found="an empty prompt",
                try_="--encoding training, with BOS",
            )
        pairs = [encode_pair(tokenizer, asked, option, encoder=blocks.encoder) for option in example.choices]
        sizes = [len(ids) for _, ids in pairs]
        if min(sizes) == 0 or (limit is not None and max(sizes) > limit):
            raise DataError(
                "an option cannot be scored",
                where=f"example {example.id}",
                found=f"{sizes} tokens",
                expected="at least 1" if limit is None else f"1..{limit}",
                try_="a larger --seq-len, where the model has the positions",
            )
        context = pairs[0][0]
        kept = cut_context(context, max(sizes), blocks.seq_len, encoder=blocks.encoder)
        counts["cut"] += len(kept) < len(context)
        yield Question(example, kept, tuple(ids for _, ids in pairs), answer)


def right_answer(example: Example) -> int | None:
    """Index of the right choice (`answer`, or where the target stands); None where there is nothing to choose.

    Raises DataError when `answer` points beside the choices.
    """
    if len(example.choices) < 2:
        return None
    if example.answer is None:
        return example.choices.index(example.target) if example.target in example.choices else None
    if not 0 <= example.answer < len(example.choices):
        raise DataError(
            "the answer is not one of the choices",
            where=f"example {example.id}",
            found=example.answer,
            expected=f"0..{len(example.choices) - 1}",
        )
    return example.answer


def choices_of(
    questions: Sequence[Question], option_nats: Sequence[np.ndarray], counts: Mapping[str, int]
) -> ChoicesResult:
    """The figures from the log-probability of every option: `option_nats[e]` [options of e], nats."""
    chosen = {name: np.zeros(len(questions), dtype=np.int64) for name in ("accuracy", "accuracy_sum", "accuracy_chars")}
    for number, (question, nats) in enumerate(zip(questions, option_nats, strict=True)):
        tokens = np.array([len(ids) for ids in question.option_ids])
        characters = np.array([len(option) for option in question.example.choices])
        for name, scores in (
            ("accuracy", nats / tokens),
            ("accuracy_sum", nats),
            ("accuracy_chars", nats / characters),
        ):
            chosen[name][number] = first_best(scores)
    documents = Documents.of_examples([q.example.id for q in questions], "pairs")
    ones = np.ones(len(questions))
    estimates = {name: documents.ratio(_right(questions, options), ones) for name, options in chosen.items()}
    hits = _right(questions, chosen["accuracy"])
    estimates |= figures_by_task("accuracy", documents, hits, [q.example.task for q in questions])
    return ChoicesResult(
        estimates,
        tuple(questions),
        tuple(option_nats),
        chosen["accuracy"],
        documents,
        counts.get("skipped", 0),
        counts.get("cut", 0),
    )


def _right(questions: Sequence[Question], chosen: np.ndarray) -> np.ndarray:
    """`[E]` 1.0 where the chosen option is a right one, of which an example may have several."""
    rights = ((q.answer, *q.example.also_right) for q in questions)
    return np.array([int(option) in right for option, right in zip(chosen, rights, strict=True)], dtype=np.float64)


def first_best(scores: np.ndarray) -> int:
    """`[options]` nats -> index of the largest; of those within TIE of it, the first."""
    best = float(scores.max())
    return int(np.argmax(scores >= best - TIE * max(1.0, abs(best))))


ENCODINGS = {"training": ask, "together": ask_together}
"""Name of an encoding -> the function that turns examples into questions."""
