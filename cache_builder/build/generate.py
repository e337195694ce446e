"""Targets written by the teacher: it answers the prompts, and its answers are scored and stored.

    for step in generate(request): ...      # the last record's result is the new request
    plan = plan_build(step.result)

Answers are written to `generated/NNNNN.parquet`, BLOCK examples each, before the plan is made, because shards depend on their
lengths. `generated/request.json` beside them says what they were made from. The teacher takes the most probable token, or
samples from the whole distribution with a seed. Batches are the same every time, so a resumed build has the same answers.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from kd.cache_builder.build.request import BuildRequest, GenerationConfig
from kd.cache_builder.store.records.cache_identity import identity_difference
from kd.cache_builder.store.records.manifest import ANSWERS, Layout
from kd.cache_builder.store.writers.answers_table import read_answers, write_answers
from kd.common.errors import CacheMismatchError, DataError
from kd.common.files import canonical_json, process_tag, publish_first, read_json, sweep, write_error, write_first
from kd.common.progress import Progress
from kd.data.left_out import LeftOut, joined
from kd.data.rows.example import Example
from kd.data.tokenizing.pair_rows import first_rules, fit_pair, tokenize_prompt
from kd.data.tokenizing.text_tokens import TEXT_RULES, TextTokens
from kd.data.tokenizing.token_rows import TokenRows
from kd.models.answering import answer_batch, answer_text, unused_ids
from kd.models.families.encoder_layout import encoder_layout
from kd.models.loading import is_encoder_decoder, refuse_classifier
from kd.models.placement.spread_models import input_device
from kd.models.tokenizer import Tokenizer, tokenizer_fingerprint, usable_ids

BLOCK = 256
"""Examples per file. A file is the unit of resuming."""
BATCH = 16
"""Prompts per call of the model's `generate`. They are sorted by length inside a block."""


def generate(request: BuildRequest) -> Generator[Progress[BuildRequest], None, None]:
    """Answer every prompt of `request.corpus`; yields a record per file of answers.

    The result is the request with the teacher's answers as targets, and the model if it was loaded. Raises KdError. What is
    answered stays, and the same call continues.
    """
    generation = request.generation or GenerationConfig()
    config = request.source.config()
    refuse_classifier(request.teacher, config)
    tokenizer = request.source.tokenizer()
    layout = encoder_layout(config, tokenizer)
    blocks = replace(request.blocks, encoder=is_encoder_decoder(config), layout=layout)
    request = replace(request.pinned(), blocks=blocks)
    left_out = joined([request.corpus.left_out])
    prompts = list(_prompts(request, tokenizer, generation.max_new_tokens, left_out))
    rules = {"text_rules": TEXT_RULES} if any(prompt.changed for prompt in prompts) else {}
    folder = request.out / ANSWERS
    identity = {
        "teacher": request.source.identity(),
        "tokenizer": tokenizer_fingerprint(tokenizer),
        **rules,
        "prompts": request.corpus.digest,
        "answers": len(prompts),
        "blocks": request.blocks.identity(),
        "generation": generation.identity(),
    }
    try:
        _claim(folder, identity)
        sweep(folder)
        answers: list[tuple[str, bool]] = []
        model = request.model
        for number, start in enumerate(range(0, len(prompts), BLOCK)):
            block = prompts[start : start + BLOCK]
            path = folder / f"{number:05d}.parquet"
            if not path.exists():
                model = request.source.load() if model is None else model
                texts = _answer_block(model, tokenizer, block, generation, number, blocks.forced)
                temporary = folder / f".staging-{process_tag()}.{number}"
                write_answers(temporary, [prompt.example.id for prompt in block], texts)
                publish_first(temporary, path)  # another builder may have been faster; its answers are the ones
            answers += read_answers(path, [prompt.example.id for prompt in block])
            yield Progress(len(answers), len(prompts), note=f"{len(answers):,} of {len(prompts):,} answers")
    except OSError as error:
        raise write_error(request.out, error) from error
    examples = tuple(
        replace(prompt.example, target=text, complete=complete)
        for prompt, (text, complete) in zip(prompts, answers, strict=True)
    )
    for example in examples:
        if not (example.target or example.complete):  # it has nothing to score
            left_out.add("unanswered", example.id)
    examples = tuple(e for e in examples if e.target or e.complete)
    corpus = replace(request.corpus, examples=examples, left_out=left_out)
    result = replace(request, corpus=corpus, answered=True, model=model)
    yield Progress(len(answers), len(prompts), result, note=f"{len(answers):,} answers")


def answered(request: BuildRequest) -> bool:
    """Whether the answers of a build are complete in `request.out`."""
    folder = request.out / ANSWERS
    if not (folder / "request.json").exists():
        return False
    answers = int(read_json(folder / "request.json").get("answers", 0))  # fewer than examples where some were dropped
    return all((folder / f"{n:05d}.parquet").exists() for n in range(-(-answers // BLOCK)))


def longest_answers(request: BuildRequest, tokenizer: Tokenizer, left_out: LeftOut) -> Iterator[TokenRows]:
    """Every prompt with as many rows as its answer may have, for a plan made before there are answers. The ids are zeros.

    With a target length up to the generation limit, that length, because the build accepts nothing longer. Otherwise
    `max_new_tokens`, EOS included; tokenised again, a text may have a few more (random weights, which write parts of
    characters: 43 for 40). Never more than a shard holds.
    """
    generation = request.generation or GenerationConfig()
    length, limit = request.blocks.target_len, generation.max_new_tokens
    most = min(length if length is not None and length <= limit + 1 else limit, (request.layout or Layout()).shard_rows)
    nothing = np.zeros(most, dtype=np.int32)
    for prompt in _prompts(request, tokenizer, generation.max_new_tokens, left_out):
        yield TokenRows(replace(prompt.example, target=""), prompt.ids, nothing, nothing.astype(np.int64))


@dataclass(frozen=True)
class _Prompt:
    """A prompt to answer."""

    example: Example
    ids: np.ndarray
    """[C] int32."""
    lead: str
    """White space of the prompt that the answer's first token holds, see `tokenize_prompt`."""
    changed: bool
    """Whether the ids are others than by the first rules."""


def _prompts(request: BuildRequest, tokenizer: Tokenizer, most: int, left_out: LeftOut) -> Iterator[_Prompt]:
    """The prompts, which leave room for answers of `most` tokens.

    Prompts that are too long are treated as `overlong` says, and `left_out` receives them. Raises DataError.
    """
    if request.corpus.kind == "documents":
        raise DataError(
            "there is nothing to answer",
            where=request.corpus.spec,
            found="documents",
            expected="prompts",
            try_="--columns prompt=…,target=…, or --targets data",
        )
    words = TextTokens(tokenizer, request.blocks.control_tokens)
    room = request.blocks.seq_len - (0 if request.blocks.encoder else most)
    if room < 1:
        raise DataError(
            "the answers leave no room for a prompt",
            found=f"--seq-len {request.blocks.seq_len}",
            expected=f"more than --target-len {most}",
        )
    limits = replace(
        request.blocks,
        seq_len=room + (0 if request.blocks.encoder else 1),
        stride=None,
        target_len=None,
        overlong="truncate",
    )
    refused: list[str] = []
    for example in request.corpus.examples:
        ids, lead = tokenize_prompt(example, words, request.blocks)
        changed = not np.array_equal(ids, first_rules(replace(example, target=""), words, request.blocks)[0])
        row = TokenRows(replace(example, target=""), ids, ids[:0], np.zeros(0, dtype=np.int64))
        fitted = fit_pair(row, limits)
        assert fitted is not None
        if fitted is not row and request.blocks.overlong == "truncate":
            left_out.add("prompt_shortened", example.id)
        if fitted is row or request.blocks.overlong == "truncate":
            yield _Prompt(example, fitted.context_ids, lead, changed)
        elif request.blocks.overlong == "drop":
            left_out.add("too_long", example.id)
        else:
            refused.append(f"{example.id} ({len(row.context_ids)} tokens)")
    if refused:
        raise DataError(
            "prompts are longer than the limit",
            where=request.corpus.spec,
            found=f"{len(refused)} of {len(request.corpus.examples)}, first {refused[0]}",
            expected=f"at most {room} tokens",
            try_="--overlong drop or truncate",
        )


def _claim(folder: Path, identity: dict[str, Any]) -> None:
    """Record what the answers are made from, or raise CacheMismatchError where the folder holds answers to something else."""
    path = folder / "request.json"
    if not path.exists() and write_first(path, canonical_json(identity)):
        return
    differences = identity_difference(identity, read_json(path))
    if differences:
        details = {f"differs {key}": f"asked for {a}, the directory has {b}" for key, a, b in differences[:8]}
        raise CacheMismatchError(
            "the directory holds answers to something else",
            cache=folder.parent,
            **details,
            try_="another --out, or the options of that build",
        )


def _answer_block(
    model: Any,
    tokenizer: Tokenizer,
    prompts: list[_Prompt],
    config: GenerationConfig,
    number: int,
    forced: tuple[int, ...],
) -> list[tuple[str, bool]]:
    order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i].ids), i))
    texts = [("", True)] * len(prompts)
    for part, start in enumerate(range(0, len(order), BATCH)):
        chosen = order[start : start + BATCH]
        seed = int(np.random.SeedSequence([config.seed, number, part]).generate_state(1)[0])
        asked = [prompts[i] for i in chosen]
        written = answer(
            model, tokenizer, [p.ids for p in asked], config, seed, leads=[p.lead for p in asked], forced=forced
        )
        for i, text in zip(chosen, written, strict=True):
            texts[i] = text
    return texts


def answer(
    model: Any,
    tokenizer: Tokenizer,
    prompts: list[np.ndarray],
    config: GenerationConfig,
    seed: int,
    *,
    leads: Sequence[str] | None = None,
    forced: tuple[int, ...] = (),
) -> list[tuple[str, bool]]:
    """One answer per prompt, cut at EOS and without special tokens, and whether it came to its end.

    leads   white space of each prompt that its answer begins with, see `tokenize_prompt`; None for none
    forced  ids that every answer begins with, see `answer_batch`
    """
    import torch
    from transformers import GenerationConfig as Settings

    sampling = (
        {"do_sample": True, "temperature": config.temperature, "top_k": 0, "top_p": 1.0} if config.temperature else {}
    )
    eos = tokenizer.eos_token_id
    settings = Settings(
        max_new_tokens=config.max_new_tokens,
        eos_token_id=eos,
        bos_token_id=tokenizer.bos_token_id,
        pad_token_id=0 if eos is None else eos,
        decoder_start_token_id=model.config.decoder_start_token_id if is_encoder_decoder(model.config) else None,
        **sampling,
    )
    device, width = input_device(model), int(model.get_output_embeddings().weight.shape[0])
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        answers = answer_batch(
            model,
            prompts,
            eos_id=eos,
            pad_id=0,
            forced=forced,
            generation_config=settings,
            suppress_tokens=unused_ids(model, usable_ids(tokenizer, width, what="the teacher")),
        )
    alone = is_encoder_decoder(model.config)
    return [
        (answer_text(tokenizer, written.ids, None if alone else ids, lead), written.ended)
        for written, ids, lead in zip(answers, prompts, leads or [""] * len(prompts), strict=True)
    ]
