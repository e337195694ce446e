"""Answers to prompts, compared with what was accepted: exact match, token F1, and the metrics that a task names.

Where examples have choices, an answer is also matched with them. `choice_match` is the share of answers that name the right
choice (generate-and-match, the other way to classify), `choice_none` the share of those that name none
(`kd.evaluation.answers.accepted.named_choice`).

Unlike in rank classification (`kd.evaluation.measures.choices`), the model must also find the form of an answer and its end.
How tokens are chosen and prompts are cut: `kd.evaluation.answers.answer_decoding`. An answer ends at EOS, or at `stop` where
one is given and no reference holds it: a model that was not trained to write EOS goes on with the next question, and
`stop="\\n"` cuts that off. An answer that ends after `max_new_tokens` counts as unfinished. By default these are the tokens of
the longest reference, EOS included, and SLACK more, but never more than half the window of a causal model. A prompt that
several examples of a task have (CommonGen: one per reference) is answered once, and standard errors count it as one document.

Conversations are asked through the model's chat template, every turn of the assistant after the turns of the data before it;
an answer ends at the token that closes a turn, and its reasoning is left out. A conversation is one document.

Shapes: E examples.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from kd.common.errors import DataError
from kd.common.progress import Progress
from kd.data.conversations.conversation import CONVERSATIONS
from kd.data.corpus import Corpus
from kd.data.rows.example import Example
from kd.data.tokenizing.block_config import BlockConfig
from kd.evaluation.answers.accepted import best_over, exact_match, named_choice, references, token_f1
from kd.evaluation.answers.answer_decoding import GREEDY, Sampling, answer_room, prompt_ids, written_answers
from kd.evaluation.answers.answer_metrics import MetricSettings, metrics_by_task, score_answers
from kd.evaluation.measures.choices import right_answer
from kd.evaluation.scoring.chat_asking import ChatAsking, as_questions, asks_chat
from kd.evaluation.scoring.reading_options import READING, ReadingOptions
from kd.evaluation.scoring.scored_text import model_ids
from kd.evaluation.scoring.windows import prompt_blocks
from kd.evaluation.statistics.estimates import Documents, Estimate, figures_by_task, means_by_task
from kd.models.answering import ANSWER_CONTEXT, answer_text
from kd.models.chat.reasoning import split_reasoning
from kd.models.loading import Model
from kd.models.tokenizer import Tokenizer


@dataclass(frozen=True)
class GenerationResult:
    """What a model wrote, and how well it matches the references. Standard errors are those of a mean over examples."""

    estimates: Mapping[str, Estimate]
    """`exact_match`, `f1`, `unfinished`, and of the first two `…_mean_of_tasks` and `…/TASK` for each task.

    Where examples have choices, `choice_match`, also by task, and `choice_none` over these; then the tasks' own metrics."""
    answers: tuple[str, ...]
    """[E] texts in the order of the corpus, as they were compared."""
    documents: Documents
    max_new_tokens: int
    """Most tokens of an answer, as used."""
    prompts_cut: int
    """Number of examples whose prompt lost its beginning."""
    made_by: Mapping[str, str]
    """Metric names, separated by commas -> library, version and settings; of the metrics that a task names."""
    examples: tuple[Example, ...] = ()
    """[E] what was asked; of a conversation, every turn of the assistant."""
    turns_skipped: int = 0
    """Number of the assistant's turns that nothing stands before."""


def evaluate_generation(
    model: Model,
    tokenizer: Tokenizer,
    corpus: Corpus,
    *,
    reading: ReadingOptions = READING,
    max_new_tokens: int | None = None,
    stop: str | None = None,
    sampling: Sampling = GREEDY,
    metrics: Sequence[str] | None = None,
    metric_settings: MetricSettings | None = None,
) -> Iterator[Progress[GenerationResult]]:
    """Answer every prompt of `corpus`; progress counts examples, the last record carries the result.

    max_new_tokens   most tokens of an answer, EOS included; None = as the longest reference needs
    stop             text at which an answer is cut as well, where no reference holds it
    metrics          keys of `ANSWER_METRICS` for every task; None = those that the tasks' files name

    Raises DataError for a text without prompts, and when the answers need more positions than there are.
    """
    chat = ChatAsking.of(tokenizer, reading) if asks_chat(corpus) else None
    if corpus.kind != "pairs" and chat is None:
        raise DataError(
            "there are no prompts to answer",
            where=corpus.spec,
            found=corpus.kind,
            expected="prompt and target",
            try_="--columns prompt=…,target=…",
        )
    blocks = prompt_blocks(model, tokenizer, reading)
    size = model_ids(model, tokenizer)
    counts: Counter[str] = Counter()
    if chat is not None:
        refuse_encoder(blocks)
        corpus = as_questions(corpus, chat, counts)
    room = answer_room(model, tokenizer, corpus, blocks, max_new_tokens)
    settings = metric_settings or MetricSettings()
    chosen = metrics_by_task(corpus.examples, corpus.metrics, metrics, settings)
    places: dict[bytes, list[int]] = {}
    leads: list[str] = []
    for number, (ids, lead) in enumerate(prompt_ids(corpus, tokenizer, blocks, room, counts, chat)):
        leads.append(lead)
        places.setdefault(ids.tobytes(), []).append(number)
    contexts = [np.frombuffer(ids, dtype=np.int32) for ids in places]
    numbers_of = list(places.values())
    texts = [""] * len(corpus.examples)
    unfinished_E = np.zeros(len(texts))
    yield Progress(0, len(texts))
    done = 0
    for batch, answers in written_answers(
        model,
        contexts,
        max_new_tokens=room,
        eos_id=tokenizer.eos_token_id if chat is None else chat.ends,
        vocabulary_size=size,
        sampling=sampling,
        tokens_per_batch=reading.tokens_per_batch,
        forced=blocks.forced,
    ):
        for context, answer in zip(batch, answers, strict=True):
            before = None if blocks.encoder else contexts[context]
            for number in numbers_of[context]:
                text = answer_text(tokenizer, answer.ids, before, leads[number], clean_up_tokenization_spaces=False)
                if chat is not None:  # references have no reasoning
                    opening = tokenizer.decode(contexts[context][-ANSWER_CONTEXT:].tolist())
                    text = split_reasoning(text, opening).answer or ""
                cut = cut_at(text, stop, references(corpus.examples[number]))
                texts[number] = cut
                unfinished_E[number] = not answer.ended and cut == text
            done += len(numbers_of[context])
        yield Progress(done, len(texts))
    result = generation_of(
        corpus.examples, texts, unfinished_E, room, counts["cut"], chosen, settings, documents_of(corpus)
    )
    yield Progress(done, done, replace(result, turns_skipped=counts["skipped"]))


def refuse_encoder(blocks: BlockConfig) -> None:
    """Raise DataError for an encoder-decoder, which has no chat template."""
    if blocks.encoder:
        raise DataError("an encoder-decoder has no chat template", try_="a text of prompts and targets, without --chat")


def documents_of(corpus: Corpus) -> Documents:
    """What was asked once: a prompt, or a conversation with all its turns."""
    if corpus.kind == CONVERSATIONS:
        return Documents.of_examples([e.id for e in corpus.examples], corpus.kind)
    return Documents.of_prompts(corpus.examples)


def cut_at(text: str, stop: str | None, accepted: Sequence[str]) -> str:
    """`text` before the first `stop`; all of it where there is none, or where an accepted text contains `stop`."""
    return text.partition(stop)[0] if stop and not any(stop in reference for reference in accepted) else text


def generation_of(
    examples: Sequence[Example],
    answers: Sequence[str],
    unfinished_E: np.ndarray,
    max_new_tokens: int,
    prompts_cut: int,
    chosen: Mapping[str, Sequence[str]] | None = None,
    settings: MetricSettings | None = None,
    documents: Documents | None = None,
) -> GenerationResult:
    """The figures from the answers `[E]`, in the order of the examples; `chosen`: further metric -> its tasks.

    documents   what belongs together; None = examples with one prompt
    """
    pairs = [(answer, references(example)) for answer, example in zip(answers, examples, strict=True)]
    documents = documents or Documents.of_prompts(examples)
    ones, tasks = np.ones(len(examples)), [e.task for e in examples]
    match_E, f1_E = (np.array([best_over(metric, *pair) for pair in pairs]) for metric in (exact_match, token_f1))
    estimates = {
        "exact_match": documents.ratio(match_E, ones),
        "f1": documents.ratio(f1_E, ones),
        "unfinished": documents.ratio(unfinished_E, ones),
        **figures_by_task("exact_match", documents, match_E, tasks),
        **figures_by_task("f1", documents, f1_E, tasks),
    }
    right = [right_answer(example) for example in examples]
    if any(index is not None for index in right):
        named = [named_choice(answer, example.choices) for answer, example in zip(answers, examples, strict=True)]
        asked = np.array([index is not None for index in right], dtype=np.float64)
        hits = np.array([index is not None and index == name for index, name in zip(right, named, strict=True)])
        none = np.array([index is not None and name is None for index, name in zip(right, named, strict=True)])
        estimates["choice_match"] = documents.ratio(hits.astype(np.float64), asked)
        estimates["choice_none"] = documents.ratio(none.astype(np.float64), asked)
        with_choices = ["" if index is None else task for task, index in zip(tasks, right, strict=True)]
        by_task = means_by_task(documents, hits.astype(np.float64), with_choices)
        estimates |= {f"choice_match/{task}": e for task, e in by_task.items() if task}
    further, made_by = score_answers(answers, examples, documents, chosen or {}, settings or MetricSettings())
    figures, answered = estimates | further, tuple(examples)
    return GenerationResult(figures, tuple(answers), documents, max_new_tokens, prompts_cut, made_by, answered)
