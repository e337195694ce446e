"""What a build will be: the text in tokens, cut into shards, and the identity that names it. Nothing is written.

    plan = plan_build(request)            # loads no weights; before the teacher's answers: an upper bound

`build` is given the plan; `kd cache plan` prints it.
"""

from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from typing import Any

import numpy as np

from kd.cache_builder.build.generate import longest_answers
from kd.cache_builder.build.request import BuildRequest
from kd.cache_builder.store import commits
from kd.cache_builder.store.cache_identity import refuse_mismatch
from kd.cache_builder.store.manifest import (
    CacheManifest,
    Layout,
    load_manifest,
)
from kd.cache_builder.store.manifest_checks import check_bounds
from kd.cache_builder.store.vocabulary import codes_by_count
from kd.common.errors import CacheMismatchError, DataError
from kd.data.blocks import TokenRows, tokenize_corpus
from kd.data.tasks.glue import CLASSES
from kd.models.classifiers import refuse_other_classes, refuse_other_heads
from kd.models.loading import is_classifier, is_encoder_decoder, max_positions
from kd.models.tokenizer import pad_token_id, token_bytes, tokenizer_fingerprint, vocabulary_size


@dataclass(frozen=True)
class BuildPlan:
    """Rows, shards and identity of a build; nothing is written yet."""

    request: BuildRequest
    manifest: CacheManifest
    rows: list[TokenRows]
    vocabulary: list[bytes]
    codes: np.ndarray
    """[V] what ids are stored as, see `codes_by_count`"""
    special_ids: set[int]

    @property
    def targets_known(self) -> bool:
        """False where the teacher is to write the targets and has not: rows and shards are an upper bound."""
        return self.request.generation is None or self.request.answered

    @property
    def tokens(self) -> int:
        """Tokens the teacher reads (context and targets)."""
        return sum(len(r.context_ids) + len(r.target_ids) for r in self.rows)

    @property
    def raw_bytes_per_token(self) -> int:
        """Bytes of a row before compression: an upper bound but for metadata and text."""
        return sum(a.row_bytes for a in self.manifest.arrays)


def plan_build(request: BuildRequest) -> BuildPlan:
    """Tokenise, cut into shards, work out the identity. Raises KdError on anything that could not be built."""
    config = request.source.config()
    request = replace(
        request.pinned(),
        targets=request.targets.normalised(),
        blocks=replace(request.blocks, encoder=is_encoder_decoder(config)),
    )
    limit = max_positions(config)
    for option, length in (("--seq-len", request.blocks.seq_len), ("--target-len", request.blocks.target_len)):
        if limit is not None and length is not None and length > limit:
            raise DataError(
                "the sequence length is longer than the teacher's positions",
                found=f"{option} {length}",
                expected=f"at most {limit}",
                try_=f"{option} {limit}",
            )
    classes = request.corpus.kind == CLASSES
    if classes != is_classifier(config):
        raise DataError(
            "a classifier is a teacher of classes, and of nothing else",
            where=request.teacher.name,
            found=f"{(config.architectures or [type(config).__name__])[0]} over {request.corpus.spec}",
            expected="a classifier over glue/TASK, or a language model over text",
        )
    if classes:
        refuse_other_heads(request.teacher, config)
    tokenizer = request.source.tokenizer()
    own, width = vocabulary_size(tokenizer), int(config.vocab_size)
    if own > width:
        raise DataError(
            "the tokenizer has more entries than the teacher has logits",
            found=f"{own} entries",
            expected=f"at most {width}",
            try_="--tokenizer PATH of the right tokenizer",
        )
    # Padded logit columns (T5 28, Pythia 27) cannot be emitted and are left out of every sum; random weights with a
    # tokenizer of another model keep their real width.
    size = own if request.teacher.random_shape is None or width - own < 128 else width
    labels = request.corpus.examples[0].choices if classes else ()
    if classes:
        size = _class_count(request, labels, config)
    request.targets.check_vocabulary(size)
    request = replace(request, blocks=request.blocks.normalised(request.corpus.kind, tokenizer))
    vocabulary = [word.encode("utf-8") for word in labels] or token_bytes(tokenizer)
    counts: Counter[str] = Counter()
    unknown = request.generation is not None and not request.answered
    if unknown:
        rows = list(longest_answers(request, tokenizer))
        counts["dropped"] = len(request.corpus.examples) - len(rows)
    else:
        rows = list(tokenize_corpus(request.corpus, tokenizer, request.blocks, counts))
    if not rows:
        raise DataError(
            "no example is left",
            where=request.corpus.spec,
            found=f"{counts['dropped']} dropped as too long",
            try_="--overlong truncate, or a larger --seq-len or --target-len",
        )
    identity = {
        "teacher": request.source.identity() | {"vocabulary_size": size},
        "tokenizer": {
            "fingerprint": tokenizer_fingerprint(tokenizer),
            "entries": own,
            "eos_token_id": tokenizer.eos_token_id,
        }
        | ({"pad_token_id": pad_token_id(tokenizer), "labels": list(labels)} if classes else {}),
        "corpus": {"text_digest": request.corpus.digest, "kind": request.corpus.kind}
        | ({} if request.generation is None else {"targets": request.generation.identity()}),
        "blocks": asdict(request.blocks),
        "targets": {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(request.targets).items()},
    }
    existing = commits.existing_cache(request.out)
    if existing is not None:
        if unknown:  # the text is not there to be compared
            identity["corpus"]["text_digest"] = existing.identity["corpus"]["text_digest"]
        refuse_mismatch(request.out, identity, existing)
        if request.layout not in (None, existing.layout):
            raise CacheMismatchError(
                "the directory holds a cache with other shard sizes",
                cache=request.out,
                found=existing.layout.shard_rows,
                expected=getattr(request.layout, "shard_rows", None),
                try_="leave --shard-rows out",
            )
    layout = existing.layout if existing is not None else request.layout
    if layout is None:
        layout = Layout() if request.extend is None else load_manifest(request.extend).layout
    shards = _cut(rows, layout)
    manifest = existing or CacheManifest(
        identity=identity,
        layout=layout,
        examples=len(rows),
        rows=sum(len(r.target_ids) for r in rows),
        shards=tuple(shards),
        files={},
        provenance=_provenance(request, counts),
    )
    check_bounds(manifest.arrays, manifest.layout.shard_rows)
    index, count = request.shard
    if not 1 <= index <= count:
        raise DataError("no such part of the build", found=f"--shard {index}/{count}", expected="I/N with 1 <= I <= N")
    codes = codes_by_count(len(vocabulary), (r.target_ids if classes else r.input_ids for r in rows))
    return BuildPlan(request, manifest, rows, vocabulary, codes, set(tokenizer.all_special_ids))


def _class_count(request: BuildRequest, labels: Sequence[str], config: Any) -> int:
    """The classes of a teacher, all of which are kept. Raises DataError where they are not the corpus's."""
    refuse_other_classes(request.teacher, config, labels)
    classes = len(labels)
    if request.teacher.load_in_4bit:
        raise DataError(
            "classifiers are loaded as they are",
            where=request.teacher.name,
            found="--load-in-4bit",
            try_="--dtype bfloat16",
        )
    if request.generation is not None:
        raise DataError("a classifier writes no text", where=request.teacher.name, found="--targets teacher")
    targets = request.targets
    if targets.profile != "kl" or targets.top_k != classes or targets.samples or targets.tail_bands:
        raise DataError(
            "a cache of classes keeps all of them",
            where=request.teacher.name,
            found=f"profile {targets.profile}, top-k {targets.top_k}",
            expected=f"profile kl, top-k {classes}",
            try_="neither --profile nor --top-k",
        )
    return classes


def _provenance(request: BuildRequest, counts: Counter[str]) -> dict[str, Any]:
    packages = ("torch", "transformers", "tokenizers", "zarr", "numcodecs", "pyarrow", "numpy")
    return {
        "teacher": request.teacher.name,
        "corpus": request.corpus.spec,
        "split": request.corpus.split,
        "source": request.corpus.source,
        "overlong": {"dropped": counts["dropped"], "truncated": counts["truncated"]},
        "options": None if request.options is None else dict(request.options),
        "versions": {"python": platform.python_version()} | {p: version(p) for p in packages},
    }


def _cut(rows: list[TokenRows], layout: Layout) -> list[tuple[int, int, int]]:
    """Consecutive whole examples per shard, as many as fit its row slots."""
    shards: list[tuple[int, int, int]] = []
    first = count = 0
    for number, row in enumerate(rows):
        n = len(row.target_ids)
        if n > layout.shard_rows:
            raise DataError(
                "an example has more rows than a shard holds",
                where=f"example {row.example.id}",
                found=f"{n} rows",
                expected=f"at most {layout.shard_rows}",
                try_="--shard-rows",
            )
        if count + n > layout.shard_rows:
            shards.append((first, number, count))
            first, count = number, 0
        count += n
    return [*shards, (first, len(rows), count)]
