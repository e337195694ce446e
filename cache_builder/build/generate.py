"""Targets written by the teacher: it answers the prompts, and its answers are scored and stored.

    for step in generate(request): ...      # the last record's result is the new request
    plan = plan_build(step.result)

Answers are written to `generated/NNNNN.parquet` (`AnswerFolder`), BLOCK examples each, before the plan is made, because shards
depend on their lengths. `generated/request.json` beside them says what they were made from. The teacher takes the most probable
token, or samples from the whole distribution with a seed. Batches are the same every time, so a resumed build has the same answers.

Conversations are asked with the chat template and its generation prompt (`kd.data.chat_answers`). The answer becomes the last
turn of the assistant, and the conversation is then rendered and scored as any other. An answer ends at the token that closes
a turn.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from kd.cache_builder.build.asked_prompts import AskedPrompt, asked_prompts, is_chat, template_of
from kd.cache_builder.build.object_store.s3_answers import S3AnswerFolder
from kd.cache_builder.build.object_store.s3_objects import S3Objects
from kd.cache_builder.build.request import BuildRequest, GenerationConfig
from kd.cache_builder.served.served_teacher import ServedTeacher
from kd.cache_builder.served.server_dialects import Writing
from kd.cache_builder.served.serving import LogprobEngine
from kd.cache_builder.store.records.manifest import ANSWERS
from kd.cache_builder.store.writers.answer_folder import ANSWERS_REQUEST, AnswerFolder, answers_file
from kd.cache_builder.store.writers.answers_table import read_answers
from kd.common.files import read_json, sweep, write_error
from kd.common.progress import Progress
from kd.data.chat_answers import AnswerReader
from kd.data.chat_rows import chat_identity, conversation_rows
from kd.data.left_out import LeftOut, joined
from kd.data.rows.example import Example
from kd.data.rows.row_examples import conversation_example
from kd.data.text_stream import in_memory
from kd.data.tokenizing.text_tokens import PROMPT_RULES
from kd.models.answering import answer_batch, answer_text, end_ids, until_eos, unused_ids
from kd.models.chat.chat_prompt import ending_ids
from kd.models.chat.reasoning import split_reasoning
from kd.models.families.encoder_layout import encoder_layout
from kd.models.model_config import is_encoder_decoder, refuse_classifier
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
    corpus = in_memory(request.corpus)
    request = replace(request.pinned(), blocks=blocks, corpus=corpus)
    left_out = joined([corpus.left_out])
    prompts = list(asked_prompts(request, tokenizer, generation, left_out))
    ends = ending_ids(*template_of(request, tokenizer)) if is_chat(request) else ()
    rules = {"text_rules": PROMPT_RULES} if any(prompt.changed for prompt in prompts) else {}
    folder = answer_folder(request)
    identity = {
        "teacher": request.source.identity(),
        "tokenizer": tokenizer_fingerprint(tokenizer),
        **rules,
        "prompts": corpus.digest,
        "answers": len(prompts),
        "blocks": request.blocks.identity(),
        "generation": generation.identity(),
        **({"chat": {**chat_identity(tokenizer, request.chat), "ends": list(ends)}} if is_chat(request) else {}),
    }
    try:
        folder.claim(identity)
        sweep(folder.path)
        answers: list[tuple[str, bool]] = []
        model = request.model
        for number, start in enumerate(range(0, len(prompts), BLOCK)):
            block = prompts[start : start + BLOCK]
            ids, path = [prompt.example.id for prompt in block], folder.path / answers_file(number)
            if not folder.holds(number):
                if request.serving is not None:
                    model = answering_engine(request, tokenizer) if model is None else model
                    texts = _served_block(model, tokenizer, block, generation, number, ends)
                else:
                    model = request.source.load() if model is None else model
                    texts = _answer_block(model, tokenizer, block, generation, number, blocks.forced, ends)
                folder.publish(number, ids, texts)
            answers += read_answers(path, ids)
            yield Progress(len(answers), len(prompts), note=f"{len(answers):,} of {len(prompts):,} answers")
    except OSError as error:
        raise write_error(request.out, error) from error
    examples = tuple(_answered_examples(request, tokenizer, generation, prompts, answers, left_out))
    corpus = replace(corpus, examples=examples, left_out=left_out)
    result = replace(request, corpus=corpus, answered=True, model=model)
    yield Progress(len(answers), len(prompts), result, note=f"{len(answers):,} answers")


def _answered_examples(
    request: BuildRequest,
    tokenizer: Tokenizer,
    generation: GenerationConfig,
    prompts: Sequence[AskedPrompt],
    answers: Sequence[tuple[str, bool]],
    left_out: LeftOut,
) -> Iterator[Example]:
    """The prompts with their answers; `left_out` receives those that have nothing to score, and those that became too long."""
    if is_chat(request):
        template, pieces = template_of(request, tokenizer)
        reader = AnswerReader(template, generation.reasoning)
    for prompt, (text, complete) in zip(prompts, answers, strict=True):
        example = prompt.example
        if not is_chat(request):
            kept = split_reasoning(text, prompt.example.prompt).answer if generation.reasoning == "strip" else text
            if kept or (complete and kept is not None):
                yield replace(example, target=kept, complete=complete)
            else:
                left_out.add("unanswered", example.id)
            continue
        assert example.conversation is not None
        talk = reader.answered(example.conversation, text, complete, prompt.text)
        if talk is None:
            left_out.add("unanswered", example.id)
            continue
        example = replace(conversation_example(talk), complete=complete)
        rows = conversation_rows(example, template, pieces, request.chat)
        if max(row.read_only + len(row.target_ids) for row in rows) > request.blocks.seq_len:
            left_out.add("too_long", example.id)  # tokenised again, a text may have a few tokens more
        else:
            yield example


def answered(request: BuildRequest) -> bool:
    """Whether the answers of a build are complete in `request.out`."""
    folder = answer_folder(request)
    if not folder.begun():
        return False
    answers = int(
        read_json(folder.path / ANSWERS_REQUEST).get("answers", 0)
    )  # fewer than examples where some were dropped
    return all(folder.holds(number) for number in range(-(-answers // BLOCK)))


def answer_folder(request: BuildRequest) -> AnswerFolder:
    """Where the answers of a build are kept: its folder, and its object store where it has one."""
    folder = request.out / ANSWERS
    return AnswerFolder(folder) if request.url is None else S3AnswerFolder(folder, S3Objects(request.url))


def _answer_block(
    model: Any,
    tokenizer: Tokenizer,
    prompts: list[AskedPrompt],
    config: GenerationConfig,
    number: int,
    forced: tuple[int, ...],
    ends: tuple[int, ...],
) -> list[tuple[str, bool]]:
    order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i].ids), i))
    texts = [("", True)] * len(prompts)
    for part, start in enumerate(range(0, len(order), BATCH)):
        chosen = order[start : start + BATCH]
        seed = int(np.random.SeedSequence([config.seed, number, part]).generate_state(1)[0])
        asked = [prompts[i] for i in chosen]
        ids, leads = [p.ids for p in asked], [p.lead for p in asked]
        written = answer(model, tokenizer, ids, config, seed, leads=leads, forced=forced, ends=ends)
        for i, text in zip(chosen, written, strict=True):
            texts[i] = text
    return texts


def answering_engine(request: BuildRequest, tokenizer: Tokenizer) -> LogprobEngine:
    """The engine that writes the answers of `request`, probed for what scoring them will need."""
    assert isinstance(request.source, ServedTeacher)
    size = usable_ids(tokenizer, int(request.source.config().vocab_size), what="the teacher")
    return request.source.engine(request.targets.top_k, size, longest=request.blocks.seq_len)


def _served_block(
    engine: LogprobEngine,
    tokenizer: Tokenizer,
    prompts: list[AskedPrompt],
    config: GenerationConfig,
    number: int,
    ends: tuple[int, ...],
) -> list[tuple[str, bool]]:
    """`_answer_block` through an engine; every answer is drawn with a seed of its own."""
    stop, texts = end_ids(ends or tokenizer.eos_token_id), [("", True)] * len(prompts)
    seeds = [np.random.SeedSequence([config.seed, number, i]).generate_state(1)[0] >> 1 for i in range(len(prompts))]
    how = [Writing(config.max_new_tokens, config.temperature, tuple(stop), int(seed)) for seed in seeds]
    for answer in engine.answers([prompt.ids.tolist() for prompt in prompts], how):
        if answer is not None:
            i, ids = answer
            written = until_eos(np.array(ids, dtype=np.int64), stop)
            texts[i] = answer_text(tokenizer, written.ids, prompts[i].ids, prompts[i].lead), written.ended
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
    ends: tuple[int, ...] = (),
) -> list[tuple[str, bool]]:
    """One answer per prompt, cut at EOS and without special tokens, and whether it came to its end.

    leads   white space of each prompt that its answer begins with, see `tokenize_prompt`; None for none
    forced  ids that every answer begins with, see `answer_batch`
    ends    ids that end an answer; none for EOS alone
    """
    import torch
    from transformers import GenerationConfig as Settings

    sampling = (
        {"do_sample": True, "temperature": config.temperature, "top_k": 0, "top_p": 1.0} if config.temperature else {}
    )
    eos = list(ends) or tokenizer.eos_token_id
    settings = Settings(
        max_new_tokens=config.max_new_tokens,
        eos_token_id=eos,
        bos_token_id=tokenizer.bos_token_id,
        pad_token_id=next(iter(end_ids(eos)), 0),
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
