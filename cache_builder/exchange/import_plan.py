"""What an import will write: every row of the source is read and checked before the first one is written."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

import numpy as np

from kd.cache_builder.build.plan import shards_of_lengths
from kd.cache_builder.build.shard_writing import lengths_of
from kd.cache_builder.exchange.checked_rows import sorted_rows
from kd.cache_builder.exchange.import_settings import ImportSettings
from kd.cache_builder.exchange.source_checks import SourceChecks
from kd.cache_builder.exchange.source_formats import CacheSource
from kd.cache_builder.exchange.source_sequences import SourceSequence, SourceText
from kd.cache_builder.exchange.spelled_text import Speller
from kd.cache_builder.store.profiles import PROFILES
from kd.cache_builder.store.records.cache_identity import refuse_mismatch
from kd.cache_builder.store.records.commits import existing_cache
from kd.cache_builder.store.records.manifest import CacheManifest, Layout
from kd.cache_builder.store.records.manifest_checks import check_bounds
from kd.cache_builder.store.records.shard_table import ShardTable
from kd.cache_builder.store.records.teacher_record import (
    GIVEN,
    GOLD,
    IMPORTED,
    LOGPROBS,
    TAIL,
    TOP_K,
    UNKNOWN,
    WEIGHTS,
    refuse_beyond_logprobs,
)
from kd.cache_builder.store.targets import TargetConfig
from kd.common.errors import DataError
from kd.common.shown_text import public_place
from kd.data.left_out import LeftOut
from kd.data.rows.example import Example, check_unicode, text_digest
from kd.data.tokenizing.block_config import BlockConfig
from kd.data.tokenizing.token_notes import TokenNotes
from kd.data.tokenizing.token_rows import TokenRows
from kd.models.tokenizer import Tokenizer, load_tokenizer, tokenizer_fingerprint, vocabulary_size


@dataclass
class Survey:
    """What the rows of a source turned out to be."""

    rows: list[TokenRows] = field(default_factory=list)
    shortest: int = 2**31
    """Tokens that the shortest row lists."""
    longest: int = 0
    listed: int = 0
    """Tokens that all rows list together."""
    gold_known: bool = True
    ranks_known: bool = True
    with_text: bool = True
    bytes_left_out: int = 0
    rescaled: int = 0


@dataclass(frozen=True)
class ImportPlan:
    """An import, as it is going to be."""

    settings: ImportSettings
    source: CacheSource
    tokenizer: Tokenizer
    survey: Survey
    manifest: CacheManifest
    """The manifest of the cache in the folder, or that of the cache to be made."""
    vocabulary: list[bytes]


def plan_import(format: str, source: str, settings: ImportSettings, path: Any) -> ImportPlan:
    """Read and check the whole source. Raises DataError, and CacheMismatchError where the folder holds another cache."""
    CacheSource.at(format, path)  # before a tokenizer is loaded for nothing
    tokenizer = load_tokenizer(settings.tokenizer, settings.revision)
    pad = tokenizer.pad_token_id
    cache_source = CacheSource.at(format, path, None if pad == tokenizer.eos_token_id else pad)
    speller = Speller(tokenizer)
    size = vocabulary_size(tokenizer)
    survey = surveyed(cache_source, settings, speller, size)
    config = _targets(settings, survey, size)
    identity = _identity(cache_source, settings, tokenizer, survey, config, size)
    existing = existing_cache(settings.out)
    if existing is not None:
        refuse_mismatch(settings.out, identity, existing)
    total = sum(len(row.target_ids) for row in survey.rows)
    layout = Layout.for_rows(total) if settings.shard_rows is None else _layout(settings.shard_rows)
    layout = layout if existing is None else existing.layout
    manifest = existing or CacheManifest(
        identity=identity,
        layout=layout,
        examples=len(survey.rows),
        rows=total,
        shards=_shards(survey.rows, layout),
        files={},
        provenance=_provenance(format, source, settings, survey, config),
    )
    check_bounds(manifest.arrays, layout.shard_rows)
    return ImportPlan(settings, cache_source, tokenizer, survey, manifest, speller.pieces[:size])


def _layout(shard_rows: int) -> Layout:
    """Shards of so many rows, in the largest chunks that divide them. Raises CacheError."""
    return Layout(shard_rows, max(c for c in range(1, min(Layout.chunk_rows, shard_rows) + 1) if shard_rows % c == 0))


def surveyed(source: CacheSource, settings: ImportSettings, speller: Speller, size: int) -> Survey:
    """Every row of the source, checked. Raises DataError."""
    survey, checks = Survey(), SourceChecks(speller)
    for sequence in source.sequences():
        rows = sorted_rows(sequence, size, settings.tail)
        spelled = speller.text(sequence.input_ids, sequence.context)
        text = sequence.text or spelled
        survey.with_text &= sequence.text is not None
        if settings.check_source:
            checks.add(sequence, rows, spelled, size)
        survey.rows.append(_token_rows(sequence, text))
        survey.shortest = min(survey.shortest, int(rows.kept.min()))
        survey.longest = max(survey.longest, int(rows.kept.max()))
        survey.listed += int(rows.kept.sum())
        survey.rescaled += sequence.rescaled
        survey.gold_known &= rows.gold_known
        survey.ranks_known &= rows.ranks_known
    survey.bytes_left_out = 0 if survey.with_text else speller.bytes_left_out
    if not survey.rows:
        raise DataError("there is nothing to import", where=source.path, found="no sequence")
    checks.refuse(source.path)
    if settings.tail == "rest":
        checks.refuse_renormalised(source.path)
    return survey


def _token_rows(sequence: SourceSequence, text: SourceText) -> TokenRows:
    """The tokens of a sequence as a cache keeps them. Raises DataError where its text does not end where its tokens do."""
    example = Example(id=sequence.name, prompt=text.prompt, target=text.target, task="imported")
    check_unicode("the source", example)
    length, ends = len(text.target.encode("utf-8")), text.byte_end
    if ends[-1] != length or (np.diff(ends, prepend=0) < 0).any():
        raise DataError(
            "the ends of the tokens do not cover the text",
            where=f"sequence {sequence.name}",
            found=f"the last ends at byte {ends[-1]}" if ends[-1] != length else "an end before the one before it",
            expected=f"ascending ends, the last at byte {length}",
        )
    ids = sequence.input_ids.astype(np.int32)
    return TokenRows(example, ids[: sequence.context], ids[sequence.context :], ends)


def _targets(settings: ImportSettings, survey: Survey, size: int) -> TargetConfig:
    """What the cache keeps of each row. Raises DataError."""
    adaptive = bool(PROFILES[settings.profile].min_probability)
    most = survey.longest if adaptive else survey.shortest
    top_k = most if settings.top_k is None else settings.top_k
    if top_k > most:
        raise DataError(
            "the source lists fewer tokens per row",
            found=f"--top-k {top_k}",
            expected=f"at most {most}",
            try_="--profile adaptive, whose rows differ in length" if top_k <= survey.longest else "a smaller --top-k",
        )
    config = TargetConfig.of_profile(
        settings.profile,
        top_k=top_k,
        logprob_codec=settings.logprob_codec,
        min_probability=settings.min_probability,
        min_k=settings.min_k,
        certain_below=settings.certain_below,
        id_codec=settings.id_codec,
        temperatures=(1.0,),
    ).normalised()
    if adaptive and config.min_k > survey.shortest:
        raise DataError(
            "the source lists fewer tokens in a row",
            found=f"--min-k {config.min_k}",
            expected=survey.shortest,
            try_=f"--min-k {survey.shortest}",
        )
    refuse_beyond_logprobs(config, settings.out)
    config.check_vocabulary(size)
    return config


def _identity(
    source: CacheSource, settings: ImportSettings, tokenizer: Tokenizer, survey: Survey, config: TargetConfig, size: int
) -> dict[str, Any]:
    """Everything that can change a stored value, in the places where a build has it."""
    partly = {} if survey.gold_known else {GOLD: TOP_K}
    partly |= {} if survey.ranks_known else {"ranks": TOP_K}
    partly |= {TAIL: UNKNOWN} if settings.tail == "unknown" else {}
    kind = "pairs" if any(_has_prompt(row, tokenizer) for row in survey.rows) else "documents"
    bos = tokenizer.bos_token_id is not None and all(r.context_ids[0] == tokenizer.bos_token_id for r in survey.rows)
    longest = max(len(row.context_ids) + len(row.target_ids) for row in survey.rows)
    blocks = BlockConfig(seq_len=longest, bos=bos, separator="").normalised(kind, tokenizer)
    return {
        "teacher": partly
        | {
            "model": settings.teacher or UNKNOWN,
            "id": settings.teacher_id,
            "model_class": UNKNOWN,
            "dtype": UNKNOWN,
            "quantization": UNKNOWN,
            GIVEN: LOGPROBS,
            WEIGHTS: UNKNOWN,
            IMPORTED: {"format": source.format, "files": source.digests()},
            "vocabulary_size": size,
        },
        "tokenizer": {
            "fingerprint": tokenizer_fingerprint(tokenizer),
            "entries": size,
            "eos_token_id": tokenizer.eos_token_id,
        },
        "corpus": {"text_digest": text_digest(row.example for row in survey.rows), "kind": kind},
        "blocks": blocks.identity(),
        "targets": config.identity,
    }


def _has_prompt(row: TokenRows, tokenizer: Tokenizer) -> bool:
    """Whether more is read before the first predicted token than BOS, or than the one token that something must follow."""
    return len(row.context_ids) > 1 + int(row.context_ids[0] == tokenizer.bos_token_id)


def _shards(rows: Sequence[TokenRows], layout: Layout) -> ShardTable:
    counts = np.array([len(row.target_ids) for row in rows])
    longest = int(counts.argmax())
    return shards_of_lengths(lengths_of(rows), int(counts[longest]), rows[longest].example.id, layout)


def _provenance(
    format: str, source: str, settings: ImportSettings, survey: Survey, config: TargetConfig
) -> dict[str, Any]:
    """What the manifest says to people."""
    unknown = ["weights of the teacher", "temperatures other than 1"]
    if settings.teacher is None:
        unknown.insert(0, "name of the teacher")
    if settings.tail == "unknown":
        unknown.append("probability beyond the kept tokens")
    if not survey.gold_known:
        unknown.append(
            "log-probability of tokens of the text that are not among the kept ones (an upper bound is stored)"
        )
    elif not survey.ranks_known:
        unknown.append("ranks of tokens of the text that are not among the kept ones")
    if not survey.with_text:
        unknown.append("text (it is spelled from the token ids)")
    kept = 0 if config.ragged else survey.listed - config.top_k * sum(len(r.target_ids) for r in survey.rows)
    packages = ("transformers", "tokenizers", "zarr", "numcodecs", "pyarrow", "numpy")
    return {
        "teacher": public_place(settings.teacher or UNKNOWN),
        "corpus": public_place(source),
        "split": "train",
        "source": {"kind": "imported", "format": format},
        "left_out": LeftOut().document(),
        "token_notes": TokenNotes().document(),
        "control_tokens": "control",
        "imported": {
            "format": format,
            "unknown": unknown,
            "tokens_in_the_tail": kept,
            "bytes_of_no_character": survey.bytes_left_out,
            "rows_rescaled": survey.rescaled,
        },
        "options": None,
        "versions": {"python": platform.python_version()} | {p: version(p) for p in packages},
    }
