"""Answers to prompts, compared with what was accepted: exact match, token F1, and the metrics that a task names.

Where examples have choices, an answer is also matched with them: `choice_match` is the share of those that name the right
one (generate-and-match, the other way to classify), `choice_none` of those that name none (`answers.named_choice`).

What a user sees, unlike rank classification (`kd.evaluation.tasks.choices`): the model must also find the form of an answer
and its end. Decoding is transformers' own `generate` with the most probable token at every step and nothing else:
sampling, penalties or forced tokens of the model's `generation_config` are set aside, because two models compare
only under one rule. Ids that the tokenizer cannot emit (padded columns of the output layer) are never chosen. Or tokens
are drawn from the whole softmax at a temperature, as the most probable token after noise:

    argmax_k (z_k / T + g_k)        g_k = -ln(-ln u_k), u_k uniform: a draw from softmax(z / T)         (Gumbel 1954)

The noise of a prompt depends on the seed and its own tokens alone, so that neither batches, limits nor the order of
the examples change an answer, and no generator of the process is touched.

    causal            [BOS] prompt separator, padded on the left      at most window - max_new_tokens context tokens
    encoder-decoder   prompt EOS to the encoder, padded on the right  at most window context tokens

Longer prompts lose their beginning and are counted. An answer ends at EOS, or at `stop` where one is given and
no reference holds it (a model without a trained EOS goes on with the next question: `stop="\\n"`), or after
`max_new_tokens`; then it counts as unfinished. By default these are the tokens of the longest reference, EOS included,
and SLACK more; never more than half the window of a causal model. Batches hold prompts of similar length. A prompt that
several examples of a task have (CommonGen: one per reference) is answered once, and is one document to the errors.

Shapes: E examples, B of a batch, C context tokens.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from kd.common.errors import DataError
from kd.data.blocks import BlockConfig, TokenRows, fit_pair, tokenize_pair
from kd.data.rows.example import Example
from kd.data.sources import Corpus
from kd.data.tasks.rendering import keyed
from kd.evaluation.answers.accepted import best_over, exact_match, named_choice, references, token_f1
from kd.evaluation.answers.answer_metrics import MetricSettings, metrics_by_task, score_answers
from kd.evaluation.scoring.scored_text import Progress, out_of_memory, require_vocabulary, window
from kd.evaluation.statistics.estimates import Documents, Estimate, figures_by_task
from kd.evaluation.tasks.choices import right_answer
from kd.models.loading import Model, is_encoder_decoder, max_positions
from kd.models.padded_batches import Size, batches_by_length
from kd.models.tokenizer import Tokenizer, encode_with_ends, token_bytes, vocabulary_size

if TYPE_CHECKING:
    import torch

    from kd.evaluation.tasks.eval_task import Settings

SLACK = 8
"""Tokens beyond the longest reference: room for an answer in other words, and to see that it did not end."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn."""

    temperature: float = 0.0
    """0: the most probable token, no draw."""
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < 100:
            raise DataError(
                "the temperature of sampling is not usable",
                found=self.temperature,
                expected="0 (greedy) or more",
                try_="--sample-temperature 1",
            )


GREEDY = Sampling()


@dataclass(frozen=True)
class Answer:
    """What a model wrote after one prompt."""

    ids: np.ndarray
    """[n] int64, EOS left out"""
    ended: bool
    """Did EOS come before the limit?"""


@dataclass(frozen=True)
class GenerationResult:
    """What a model wrote, and how well it fits. Standard errors are those of a mean over examples."""

    estimates: Mapping[str, Estimate]
    """`exact_match`, `f1`, `unfinished`, and of the first two `…_mean_of_tasks` and `…/TASK` for each task.

    Where examples have choices, `choice_match` and `choice_none` over these; then the tasks' own metrics."""
    answers: tuple[str, ...]
    """[E] texts in the order of the corpus, as compared."""
    documents: Documents
    max_new_tokens: int
    """As used."""
    prompts_cut: int
    """Examples whose prompt lost its beginning."""
    made_by: Mapping[str, str]
    """Metrics, between commas -> library, version and settings, of those that a task names."""


def evaluate_generation(
    model: Model,
    tokenizer: Tokenizer,
    corpus: Corpus,
    *,
    seq_len: int | None = None,
    separator: str = "\n",
    bos: bool = True,
    max_new_tokens: int | None = None,
    stop: str | None = None,
    sampling: Sampling = GREEDY,
    metrics: Sequence[str] | None = None,
    metric_settings: MetricSettings | None = None,
    tokens_per_batch: int | None = None,
) -> Iterator[Progress[GenerationResult]]:
    """Answer every prompt of `corpus`; progress counts examples, the last record carries the result.

    seq_len          tokens a model sees at once (an encoder: of the prompt); None = its positions, at most 1024
    separator        text between prompt and answer; an encoder-decoder needs none
    max_new_tokens   most tokens of an answer, EOS included; None = as the longest reference needs
    stop             text at which an answer is cut as well, where no reference holds it
    metrics          keys of `ANSWER_METRICS` for every task; None = those that the tasks' files name

    Raises DataError for a text without prompts, and when the answers need more positions than there are.
    """
    if corpus.kind != "pairs":
        raise DataError(
            "there are no prompts to answer",
            where=corpus.spec,
            found=corpus.kind,
            expected="prompt and target",
            try_="--columns prompt=…,target=…",
        )
    encoder = is_encoder_decoder(model.config)
    blocks = BlockConfig(seq_len=window(model, seq_len), separator=separator, bos=bos, encoder=encoder)
    blocks = blocks.normalised("pairs", tokenizer)
    size = vocabulary_size(tokenizer)
    require_vocabulary(int(model.get_output_embeddings().weight.shape[0]), size)
    room = answer_room(model, tokenizer, corpus, blocks, max_new_tokens)
    settings = metric_settings or MetricSettings()
    chosen = metrics_by_task(corpus.examples, corpus.metrics, metrics, settings)
    counts: Counter[str] = Counter()
    places: dict[bytes, list[int]] = {}
    for number, ids in enumerate(prompt_ids(corpus, tokenizer, blocks, room, counts)):
        places.setdefault(ids.tobytes(), []).append(number)
    contexts = [np.frombuffer(ids, dtype=np.int32) for ids in places]
    numbers_of = list(places.values())
    texts = [""] * len(corpus.examples)
    unfinished_E = np.zeros(len(texts))
    yield Progress(0, len(texts))
    done = 0
    for batch, answers in greedy_answers(
        model,
        contexts,
        max_new_tokens=room,
        eos_id=tokenizer.eos_token_id,
        vocabulary_size=size,
        sampling=sampling,
        tokens_per_batch=tokens_per_batch,
    ):
        for context, answer in zip(batch, answers, strict=True):
            text = tokenizer.decode(answer.ids.tolist(), skip_special_tokens=True, clean_up_tokenization_spaces=False)
            for number in numbers_of[context]:
                cut = cut_at(text, stop, references(corpus.examples[number]))
                texts[number] = cut
                unfinished_E[number] = not answer.ended and cut == text
            done += len(numbers_of[context])
        yield Progress(done, len(texts))
    yield Progress(
        done, done, generation_of(corpus.examples, texts, unfinished_E, room, counts["cut"], chosen, settings)
    )


def check_answering(corpus: Corpus, settings: Settings) -> None:
    """Raise DataError, before any weights are loaded, for metrics or a temperature that cannot be used."""
    metrics_by_task(corpus.examples, corpus.metrics, settings.metrics, settings.metric_settings or MetricSettings())
    Sampling(settings.sample_temperature)


def answer_room(model: Model, tokenizer: Tokenizer, corpus: Corpus, blocks: BlockConfig, wanted: int | None) -> int:
    """Most tokens of an answer. Raises DataError when `wanted` are too many for the model's positions."""
    limit = max_positions(model.config) if blocks.encoder else blocks.seq_len - 1  # a context has at least one token
    if wanted is not None:
        if wanted < 1 or (limit is not None and wanted > limit):
            raise DataError(
                "the answers do not fit the model's positions",
                found=f"{wanted} new tokens",
                expected="at least 1" if limit is None else f"1..{limit}",
                try_="--max-new-tokens",
            )
        return wanted
    pieces = token_bytes(tokenizer)
    longest = max(len(encode_with_ends(tokenizer, pieces, text)[0]) for e in corpus.examples for text in references(e))
    needed = longest + 1 + SLACK
    if not blocks.encoder:
        limit = max(1, blocks.seq_len // 2)
    return needed if limit is None else min(needed, limit)


def prompt_ids(
    corpus: Corpus, tokenizer: Tokenizer, blocks: BlockConfig, room: int, counts: Counter[str]
) -> Iterator[np.ndarray]:
    """`[C]` int32 of each example, with room for the answer; `counts` receives how many prompts were `cut`."""
    pieces = token_bytes(tokenizer)
    nothing = np.zeros(room, dtype=np.int32)
    for example in corpus.examples:
        context = tokenize_pair(example, tokenizer, pieces, blocks).context_ids
        fitted = fit_pair(TokenRows(example, context, nothing, nothing.astype(np.int64)), blocks)
        assert fitted is not None, "the room for an answer is within the window"
        counts["cut"] += len(fitted.context_ids) < len(context)
        yield fitted.context_ids


GENERATION_TOKENS = 4096
"""Of a batch where nobody asks for another number: every token that is written reads all weights once for the whole batch."""


def greedy_answers(
    model: Model,
    contexts: Sequence[np.ndarray],
    *,
    max_new_tokens: int,
    eos_id: int | None,
    vocabulary_size: int,
    sampling: Sampling = GREEDY,
    tokens_per_batch: int | None = None,
) -> Iterator[tuple[list[int], list[Answer]]]:
    """Numbers into `contexts` and the answers to them, batch by batch, each context exactly once; greedy or sampled.

    contexts[e]   [C >= 1] token ids, special tokens included
    """
    import torch

    encoder = is_encoder_decoder(model.config)
    device = next(model.parameters()).device
    pad = 0 if eos_id is None else eos_id  # never looked at: the attention mask says what is padding
    width = int(model.get_output_embeddings().weight.shape[0])
    tokens_per_batch = tokens_per_batch or GENERATION_TOKENS
    sizes: list[Size] = [(len(c), max_new_tokens) for c in contexts]
    with greedy_config(model, max_new_tokens, eos_id, pad, suppressed=list(range(vocabulary_size, width))):
        for batch in batches_by_length(sizes, tokens_per_batch):
            ids_BC, mask_BC = padded_prompts([contexts[i] for i in batch], pad, left=not encoder)
            noise = [gumbel_noise([contexts[i] for i in batch], sampling)] if sampling.temperature else []
            try:
                with torch.inference_mode():
                    output = model.generate(
                        input_ids=ids_BC.to(device), attention_mask=mask_BC.to(device), logits_processor=noise
                    )
            except torch.OutOfMemoryError as error:
                raise out_of_memory(error, tokens_per_batch) from error
            new = output[:, 1 if encoder else ids_BC.shape[1] :].cpu().numpy()
            yield batch, [until_eos(row, eos_id) for row in new]


def gumbel_noise(contexts: Sequence[np.ndarray], sampling: Sampling) -> Callable[..., torch.Tensor]:
    """Turns `scores [B, V]` of the next token into scores whose largest is a draw from softmax(scores / temperature).

    Called once per step; each context has a generator of its own, seeded by its tokens.
    """
    import torch

    seeds = [keyed(sampling.seed, np.asarray(ids, dtype=np.int64).tobytes().hex()) for ids in contexts]
    generators = [np.random.Generator(np.random.Philox(seed % 2**128)) for seed in seeds]

    def add(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        noise_BV = np.stack([generator.gumbel(size=scores.shape[1]) for generator in generators])
        return scores.float() / sampling.temperature + torch.from_numpy(noise_BV.astype(np.float32)).to(scores.device)

    return add


@contextmanager
def greedy_config(
    model: Model, max_new_tokens: int, eos_id: int | None, pad_id: int, suppressed: list[int]
) -> Iterator[None]:
    """Replace the model's own generation settings for a while: `generate` takes from them what a call leaves open."""
    from transformers import GenerationConfig

    own = model.generation_config
    start = getattr(model.config, "decoder_start_token_id", None)
    model.generation_config = GenerationConfig(
        do_sample=False,
        num_beams=1,
        max_new_tokens=max_new_tokens,
        eos_token_id=eos_id,
        pad_token_id=pad_id,
        decoder_start_token_id=start,
        suppress_tokens=suppressed or None,
        use_cache=True,
    )
    try:
        yield
    finally:
        model.generation_config = own


def padded_prompts(contexts: Sequence[np.ndarray], pad_id: int, *, left: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and attention mask, `[B, C]` int64 tensors. A causal model continues at the right edge: its padding is left."""
    import torch

    longest = max(len(c) for c in contexts)
    ids = torch.full((len(contexts), longest), pad_id, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for b, context in enumerate(contexts):
        place = slice(longest - len(context), longest) if left else slice(0, len(context))
        ids[b, place] = torch.from_numpy(context.astype(np.int64))
        mask[b, place] = 1
    return ids, mask


def until_eos(row: np.ndarray, eos_id: int | None) -> Answer:
    """`[n]` generated ids, padded after EOS -> the answer before the first EOS."""
    ends = np.flatnonzero(row == eos_id) if eos_id is not None else np.zeros(0, dtype=np.int64)
    return Answer(row[: ends[0]], True) if len(ends) else Answer(row, False)


def cut_at(text: str, stop: str | None, accepted: Sequence[str]) -> str:
    """`text` before the first `stop`; whole where there is none, or where an accepted text holds it."""
    return text.partition(stop)[0] if stop and not any(stop in reference for reference in accepted) else text


def generation_of(
    examples: Sequence[Example],
    answers: Sequence[str],
    unfinished_E: np.ndarray,
    max_new_tokens: int,
    prompts_cut: int,
    chosen: Mapping[str, Sequence[str]] | None = None,
    settings: MetricSettings | None = None,
) -> GenerationResult:
    """The figures from the answers `[E]`, in the order of the examples; `chosen`: further metric -> its tasks."""
    pairs = [(answer, references(example)) for answer, example in zip(answers, examples, strict=True)]
    documents = Documents.of_prompts(examples)
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
        hits = np.array([index is not None and index == found for index, found in zip(right, named, strict=True)])
        none = np.array([index is not None and found is None for index, found in zip(right, named, strict=True)])
        estimates["choice_match"] = documents.ratio(hits.astype(np.float64), asked)
        estimates["choice_none"] = documents.ratio(none.astype(np.float64), asked)
    further, made_by = score_answers(answers, examples, documents, chosen or {}, settings or MetricSettings())
    return GenerationResult(estimates | further, tuple(answers), documents, max_new_tokens, prompts_cut, made_by)
