"""The plan of a build: the text in tokens, its shards, and the identity of the cache.

    plan = plan_build(request)            # loads no weights

A text is read once, part by part (`kd.cache_builder.tokens`); the builders of a plan read the rows of their shards from the parts.
`build` carries the plan out, `kd cache plan` prints what it costs. Until the teacher has written the targets that it is to
write, rows and shards are an upper bound.
"""

from __future__ import annotations

import platform
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from kd.cache_builder.build.asked_prompts import longest_answers
from kd.cache_builder.build.plan_checks import (
    class_count,
    class_labels,
    predicted_ids,
    refuse_long_sequences,
    refuse_no_such_part,
    refuse_other_kind,
    refuse_unserved,
)
from kd.cache_builder.build.request import BuildRequest
from kd.cache_builder.served.served_teacher import ServedTeacher
from kd.cache_builder.store.lengths import Lengths
from kd.cache_builder.store.records.cache_identity import TEXT_RULES_NAMES, refuse_mismatch
from kd.cache_builder.store.records.commits import existing_cache
from kd.cache_builder.store.records.manifest import CacheManifest, Layout, load_manifest
from kd.cache_builder.store.records.manifest_checks import check_bounds, check_limits
from kd.cache_builder.store.records.shard_table import ShardTable, cut_into_shards
from kd.cache_builder.store.vocabulary import codes_of_counts
from kd.cache_builder.tokens.token_folder import remove_tokens, shared_pass
from kd.cache_builder.tokens.token_pass import IN_MEMORY, Keep, nothing_left, tokenise
from kd.cache_builder.tokens.tokenise_workers import processes
from kd.cache_builder.tokens.tokenised_text import TokenisedText, tokenised_in_memory
from kd.cache_builder.upkeep.cache_registry import public_options
from kd.common.errors import CacheMismatchError, DataError
from kd.common.progress import Progress, final
from kd.common.shown_text import public_place, redacted
from kd.data.chat_rows import chat_identity, chat_template
from kd.data.conversations.conversation import CONVERSATIONS
from kd.data.corpus import HELLASWAG_SOURCES, Corpus
from kd.data.instruction_tasks.glue import CLASSES
from kd.data.left_out import LeftOut, joined, recorded
from kd.data.rows.example import text_digest
from kd.data.text_rows import RowMaker
from kd.data.text_stream import Text, TextStream, in_memory
from kd.data.tokenizing.corpus_rows import tokenize_corpus
from kd.data.tokenizing.text_tokens import TEXT_RULES
from kd.data.tokenizing.token_notes import TokenNotes, recorded_notes
from kd.data.tokenizing.token_rows import TokenRows
from kd.models.families.encoder_layout import encoder_layout
from kd.models.loading import quantised_share
from kd.models.model_config import is_encoder_decoder
from kd.models.tokenizer import (
    Tokenizer,
    pad_token_id,
    refuse_unknown_ids,
    token_bytes,
    tokenizer_fingerprint,
    vocabulary_size,
)
from kd.models.weights.quantised import share_of
from kd.models.weights.quantised_checkpoints import stored_quantisation


@dataclass(frozen=True)
class BuildPlan:
    """Rows, shards and identity of a build. Nothing is written yet."""

    request: BuildRequest
    manifest: CacheManifest
    text: TokenisedText
    """The text in tokens. Of a cache that is complete already, nothing but its digest and the records."""
    vocabulary: list[bytes]
    codes: np.ndarray
    """[V] the codes that ids are stored as, see `codes_by_count`"""
    special_ids: set[int]

    @property
    def rows(self) -> Sequence[TokenRows]:
        """The rows to score, which are read from the disk where the text was tokenised for a build."""
        return self.text.rows

    @property
    def left_out(self) -> LeftOut:
        """What of the text is not in the rows, and why."""
        return self.text.left_out

    @property
    def notes(self) -> TokenNotes:
        """What was found in the texts while they were tokenised."""
        return self.text.notes

    @property
    def targets_known(self) -> bool:
        """False where the teacher is to write the targets and has not. Then rows and shards are an upper bound."""
        return not _answers_missing(self.request)

    @property
    def tokens(self) -> int:
        """Tokens the teacher reads (context and targets)."""
        return self.text.read_only + self.text.targets

    @property
    def raw_bytes_per_token(self) -> int:
        """Bytes of a row before compression. An upper bound, without metadata and text."""
        return sum(a.row_bytes for a in self.manifest.arrays)


def plan_build(request: BuildRequest, keep: Keep = IN_MEMORY) -> BuildPlan:
    """`plan_steps` in silence."""
    return final(plan_steps(request, keep))


def plan_steps(request: BuildRequest, keep: Keep = IN_MEMORY) -> Iterator[Progress[BuildPlan]]:
    """Tokenise, cut into shards, work out the identity; yields a record after each part of the text, the last with the plan.

    keep   what is kept of the text in tokens; see `token_pass`

    Raises KdError for anything that could not be built.
    """
    config = request.source.config()
    blocks = replace(request.blocks, encoder=is_encoder_decoder(config))
    request = replace(request.pinned(), targets=request.targets.normalised(), blocks=blocks)
    refuse_other_kind(request, config)
    tokenizer = request.source.tokenizer()
    labels = class_labels(request.corpus)
    size = predicted_ids(request, config, tokenizer)
    if labels:
        size = class_count(request, labels, config)
    request.targets.check_vocabulary(size)
    refuse_unserved(request)
    layout = None if labels else encoder_layout(config, tokenizer)
    blocks = replace(request.blocks, layout=layout).normalised(request.corpus.kind, tokenizer)
    request = replace(request, blocks=blocks)
    refuse_long_sequences(request, config)
    refuse_no_such_part(request.shard)
    vocabulary = [word.encode("utf-8") for word in labels] or token_bytes(tokenizer)[:size]
    text = None if keep.folder is None else _of_complete_cache(request, tokenizer, size)
    if text is None:
        for step in _text_steps(request, tokenizer, int(config.get_text_config().vocab_size), keep):
            text = step.result
            yield Progress(step.done, step.total, note=step.note)
    assert text is not None
    identity = _identity(request, tokenizer, size, text)
    try:
        existing = _existing(request, identity)
    except CacheMismatchError:
        if _read_once(request.corpus):  # the others were compared before anything was written
            remove_tokens(request.out)
        raise
    manifest = _manifest(request, text, identity, existing)
    check_bounds(manifest.arrays, manifest.layout.shard_rows)
    check_limits(manifest.shards)
    if isinstance(request.source, ServedTeacher) and not manifest.complete:
        request.source.check(request.targets.top_k, size, longest=text.longest)
    codes = codes_of_counts(len(vocabulary), text.counts)
    plan = BuildPlan(request, manifest, text, vocabulary, codes, set(tokenizer.all_special_ids))
    yield Progress(text.examples, text.examples, plan)


def extended(plan: BuildPlan, cache: Path) -> BuildPlan:
    """The plan of a fresh build, to be filled from `cache`, in shards of its sizes. The text is not tokenised again."""
    request = replace(plan.request, extend=cache)
    layout = request.layout or load_manifest(cache).layout
    check_bounds(plan.manifest.arrays, layout.shard_rows)
    manifest = replace(plan.manifest, layout=layout, shards=shards_of_text(plan.text, layout))
    return replace(plan, request=request, manifest=manifest)


def _read_once(text: Text) -> bool:
    return isinstance(text, TextStream) and text.once


def _answers_missing(request: BuildRequest) -> bool:
    """Whether the teacher is to write the targets and has not."""
    return request.generation is not None and not request.answered


def _text_steps(
    request: BuildRequest, tokenizer: Tokenizer, width: int, keep: Keep
) -> Iterator[Progress[TokenisedText]]:
    """The text in tokens; yields a record after each part, the last with the result. `width`: ids that the model has."""
    corpus = request.corpus
    if request.tokenised is not None:
        text = request.tokenised
        yield Progress(text.examples, text.examples, text)
    elif corpus.kind == CLASSES or _answers_missing(request):
        text = _text_in_memory(request, in_memory(corpus), tokenizer, width)
        yield Progress(text.examples, text.examples, text)
    else:
        maker = RowMaker(corpus.kind, tokenizer, request.blocks, request.chat, corpus.skip_bad, corpus.spec)
        steps = tokenise(corpus, maker, width, keep, processes(request.tokenize_workers))
        yield from steps if keep.folder is None else shared_pass(request.out, steps)


def _text_in_memory(request: BuildRequest, corpus: Corpus, tokenizer: Tokenizer, width: int) -> TokenisedText:
    """Texts to classify, and prompts whose answers are not written yet: neither is large. Raises DataError."""
    classes, left_out, notes = corpus.kind == CLASSES, joined([corpus.left_out]), TokenNotes()
    if classes:
        rows = list(tokenize_corpus(corpus, tokenizer, request.blocks, left_out, notes))
    else:
        rows = list(longest_answers(request, tokenizer, left_out))
    if not rows:
        raise nothing_left(corpus.spec, left_out)
    refuse_unknown_ids(((f"example {r.example.id}", r.context_ids if classes else r.input_ids) for r in rows), width)
    text = tokenised_in_memory(rows, len(corpus.examples), corpus.digest, left_out, notes)
    if not classes:
        return text
    labels = np.bincount(np.concatenate([row.target_ids for row in rows]))
    return replace(text, counts=labels)  # the vocabulary of a classifier is its labels


def _of_complete_cache(request: BuildRequest, tokenizer: Tokenizer, size: int) -> TokenisedText | None:
    """What a cache that is there says of its text, if it is complete: nothing is tokenised, the text is only compared.

    None where there is no complete cache. Raises CacheMismatchError where the folder holds a cache of something else, before
    anything is written into it.
    """
    existing = existing_cache(request.out)
    if existing is None or request.tokenised is not None or _read_once(request.corpus):
        return None
    provenance, notes = existing.provenance, TokenNotes(changed="text_rules" in existing.identity["tokenizer"])
    for note, entry in (recorded_notes(provenance) or {}).items():
        notes.add({note: entry["count"]}, entry["first"])
    text = TokenisedText(
        rows=(),
        digest=text_digest(request.corpus.reading(LeftOut())),
        examples=existing.examples,
        targets=existing.rows,
        read_only=0,
        text_bytes=0,
        left_out=recorded(provenance) or LeftOut(),
        notes=notes,
        counts=np.zeros(0, dtype=np.int64),
        extremes=(),
        longest=0,
    )
    _existing(request, _identity(request, tokenizer, size, text))
    return text if existing.complete else None


def _identity(request: BuildRequest, tokenizer: Tokenizer, size: int, text: TokenisedText) -> dict[str, Any]:
    """Everything that can change a stored value, as the manifest holds it; `size`: ids that the teacher predicts.

    The rules by which a text becomes ids are named where an id differs from those of the first rules, and only there.
    """
    classes = request.corpus.kind == CLASSES
    words: dict[str, Any] = {
        "fingerprint": tokenizer_fingerprint(tokenizer, cut_to=request.blocks.seq_len if classes else None),
        "entries": vocabulary_size(tokenizer),
        "eos_token_id": tokenizer.eos_token_id,
    }
    if text.notes.rules is not None:
        words["text_rules"] = text.notes.rules
        if request.blocks.control_tokens != "auto":
            words["control_tokens"] = request.blocks.control_tokens
    if classes:
        words |= {"pad_token_id": pad_token_id(tokenizer), "labels": list(class_labels(request.corpus))}
    corpus: dict[str, Any] = {"text_digest": text.digest, "kind": request.corpus.kind}
    if request.generation is not None:
        corpus["targets"] = request.generation.identity()
    chat = {"chat": chat_identity(tokenizer, request.chat)} if request.corpus.kind == CONVERSATIONS else {}
    return chat | {
        "teacher": request.source.identity() | {"vocabulary_size": size},
        "tokenizer": words,
        "corpus": corpus,
        "blocks": request.blocks.identity(),
        "targets": request.targets.identity,
    }


def _existing(request: BuildRequest, identity: dict[str, Any]) -> CacheManifest | None:
    """The manifest of the cache that the directory holds already. Raises CacheMismatchError where it is another cache."""
    existing = existing_cache(request.out)
    if existing is None:
        return None
    if _answers_missing(request):  # the text is not there to be compared
        identity["corpus"]["text_digest"] = existing.identity["corpus"]["text_digest"]
        recorded = existing.identity["tokenizer"]
        identity["tokenizer"] |= {name: recorded[name] for name in TEXT_RULES_NAMES if name in recorded}
    refuse_mismatch(request.out, identity, existing)
    if request.layout not in (None, existing.layout):
        raise CacheMismatchError(
            "the directory holds a cache with other shard sizes",
            cache=request.out,
            found=existing.layout.shard_rows,
            expected=getattr(request.layout, "shard_rows", None),
            try_="leave --shard-rows out",
        )
    return existing


def _manifest(
    request: BuildRequest, text: TokenisedText, identity: dict[str, Any], existing: CacheManifest | None
) -> CacheManifest:
    """The existing manifest, or that of a new cache. Raises DataError where a row does not fit into a shard."""
    if existing is not None:
        return existing
    layout = request.layout
    if layout is None:
        layout = Layout.for_rows(text.targets) if request.extend is None else load_manifest(request.extend).layout
    return CacheManifest(
        identity=identity,
        layout=layout,
        examples=len(text.rows),
        rows=text.targets,
        shards=shards_of_text(text, layout),
        files={},
        provenance=_provenance(request, text.left_out, text.notes),
    )


def _provenance(request: BuildRequest, left_out: LeftOut, notes: TokenNotes) -> dict[str, Any]:
    chat = {}
    if request.corpus.kind == CONVERSATIONS:  # the student's folder gets it
        template = chat_template(request.source.tokenizer(), request.chat)
        chat = {"chat_template": template.source, "template_kwargs": dict(template.kwargs)}
    packages = ("torch", "transformers", "tokenizers", "zarr", "numcodecs", "pyarrow", "numpy")
    return (
        _quantised(request)
        | _adapter(request)
        | chat
        | ({"served": request.source.provenance()} if isinstance(request.source, ServedTeacher) else {})
        | {
            "teacher": public_place(request.teacher.name),
            "corpus": public_place(request.corpus.spec),
            "split": request.corpus.split,
            "source": _source(request.corpus),
            "left_out": left_out.document(),
            "token_notes": notes.document(),
            "text_rules": TEXT_RULES,
            "control_tokens": request.blocks.control_tokens,
            "options": None if request.options is None else public_options(request.options),
            "versions": {"python": platform.python_version()} | {p: version(p) for p in packages},
        }
    )


def _quantised(request: BuildRequest) -> dict[str, Any]:
    """Which weights of the teacher bitsandbytes quantises, or how they are stored quantised; nothing where they are plain.

    Raises TeacherError where bitsandbytes would quantise too few.
    """
    if request.given is not None:
        share = share_of(request.given.model, lambda _, module: type(module).__name__ in ("Linear4bit", "Linear8bitLt"))
        return {"quantised": share.record()} if share.layers else {}
    if request.teacher.bits is not None:
        return {"quantised": quantised_share(request.teacher).record()}
    stored = stored_quantisation(request.source.config())
    return {} if stored is None else {"quantised": {"stored_as": stored.get("quant_method", "unknown")}}


def _adapter(request: BuildRequest) -> dict[str, Any]:
    """Which adapter is merged into the teacher, and the model that it was trained on by its own word."""
    adapter = request.teacher.adapter
    if adapter is None:
        return {}
    base = adapter.base()
    return {"adapter": {"name": public_place(adapter.name), "trained_on": None if base is None else public_place(base)}}


def _source(corpus: Text) -> dict[str, Any]:
    """Where a text is from. A benchmark's name in the part of a path that is not said stays: it marks students and scores."""
    source: dict[str, Any] = redacted(corpus.source)
    benchmark = HELLASWAG_SOURCES.search(corpus.spec)
    return source if benchmark is None else source | {"benchmark": benchmark[0]}


def shards_of_text(text: TokenisedText, layout: Layout) -> ShardTable:
    """The shards of a build. Raises DataError for an example that no shard can hold."""
    return shards_of_lengths(text.row_lengths(), *text.most_targets, layout)


def shards_of_lengths(lengths: Iterable[Lengths], most: int, name: str, layout: Layout) -> ShardTable:
    """The shards of examples with such lengths, of which the one called `name` has most rows. Raises DataError as above."""
    if most > layout.shard_rows:
        raise DataError(
            "an example has more rows than a shard holds",
            where=f"example {name}",
            found=f"{most} rows",
            expected=f"at most {layout.shard_rows}",
            try_="--shard-rows",
        )
    return cut_into_shards(lengths, layout.shard_rows)
