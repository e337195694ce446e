"""The cached text in the student's own tokens: for losses that do not compare row by row with the teacher's.

An example is one text: BOS (where there is one), prompt, separator, target, then EOS where the cached target has its end. It
is tokenised as the builder tokenises it, and split where the target begins (`kd.data.tokenizing.text_tokens`). What does not
fit the window is cut as `kd.data.tokenizing.pair_rows.fit_pair` cuts it: the prompt at its beginning, the target at its end. A
student with an encoder reads what such a teacher would: its encoder prompt and EOS, its decoder the target and EOS.
No pad token is needed and no embedding is resized: batches are padded with id 0, which nothing attends to or scores.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from kd.cache_builder.store.readers.reading import CachedExample, Reader
from kd.common.errors import DataError
from kd.data.rows.example import Example
from kd.data.tokenizing.block_config import BlockConfig
from kd.data.tokenizing.pair_rows import fit_pair, tokenize_pair, with_bos
from kd.data.tokenizing.text_tokens import TextTokens
from kd.data.tokenizing.token_rows import TokenRows
from kd.models.batching.gaps import NO_GAPS, Gaps
from kd.models.families.encoder_layout import EncoderLayout
from kd.models.tokenizer import Tokenizer
from kd.student_trainer.batches.alignment import Alignment, Side, align
from kd.student_trainer.batches.compatibility import same_tokenizer


@dataclass(frozen=True)
class StudentExample:
    """One cached example as the student reads it."""

    context_ids: np.ndarray
    """[C] int32, C >= 1."""
    target_ids: np.ndarray
    """[m] int32."""
    side: Side
    """Byte of the target where each of its tokens ends."""
    gaps: Gaps = NO_GAPS
    """Tokens between target tokens, which are read and not scored."""

    @property
    def input_ids(self) -> np.ndarray:
        """`[C + m]` context and target."""
        return self.gaps.sequence(self.context_ids, self.target_ids)


class StudentText:
    """Every example of a cache in the student's tokens; tokenised once, before the first step."""

    def __init__(
        self,
        reader: Reader,
        tokenizer: Tokenizer,
        *,
        window: int | None,
        separator: str | None = None,
        encoder: bool = False,
        layout: EncoderLayout | None = None,
        target_len: int | None = None,
    ) -> None:
        """Tokenise every example.

        window       most tokens of an example; for a student with an encoder, of the prompt
        separator    text between prompt and target, None = as in the cache; a student with an encoder reads none
        encoder      whether the student has an encoder
        layout       special tokens around its two texts, as `kd.models.families.encoder_layout` finds them
        target_len   most tokens of the target

        Raises DataError for a student without EOS where the cache's targets end with one.
        """
        blocks = reader.manifest.blocks
        pairs = reader.manifest.identity["corpus"]["kind"] != "documents"
        if pairs and tokenizer.eos_token_id is None:
            raise DataError(
                "the student's tokenizer has no EOS token: it could not learn to stop",
                found="eos_token is not set",
                expected="a tokenizer with eos_token",
                try_="set eos_token in its tokenizer_config.json",
            )
        words, teacher = TextTokens(tokenizer, blocks.control_tokens), reader.vocabulary()
        same = blocks.encoder == encoder and blocks.layout == layout and separator is None
        same = same and same_tokenizer(reader, tokenizer)
        between = "" if not pairs else blocks.separator if separator is None else separator
        bos = blocks.bos if same else tokenizer.bos_token_id is not None  # a cut prompt keeps it, and nothing else
        limits = BlockConfig(
            seq_len=window or 2**31,
            bos=bos,
            separator=between,
            encoder=encoder,
            target_len=target_len,
            layout=layout,
        )
        self.truncated = 0
        """Examples that did not fit the window."""
        self.teacher_has_eos = [False] * len(reader)
        self._examples: dict[int, StudentExample] = {}
        self._count = len(reader)
        for number, cached, ends in _texts(reader):
            # equal tokenizers read the very same tokens, also where a block begins inside a word
            row, start = (cached, 0) if same else _tokenize(cached, words, limits, ends, teacher)
            fitted = fit_pair(row, limits)
            self.truncated += fitted is not row
            if fitted is None:  # nothing of the target is left to score
                fitted = TokenRows(cached.example, row.context_ids[:1], row.target_ids[:0], row.byte_end[:0])
            whole = len(fitted.target_ids) == len(row.target_ids)
            side = Side(fitted.byte_end, has_eos=ends and whole and len(fitted.target_ids) > 0, start=start)
            self.teacher_has_eos[number] = ends
            self._examples[number] = StudentExample(fitted.context_ids, fitted.target_ids, side)

    def __getitem__(self, example: int) -> StudentExample:
        return self._examples[example]

    def named_ids(self) -> Iterator[tuple[str, np.ndarray]]:
        """What each example is called in errors, and its ids."""
        return ((f"example {number}", example.input_ids) for number, example in self._examples.items())

    def aligned(self, example: CachedExample, *, mode: str, eos: bool) -> Alignment:
        """Which rows of an example and which of the student's target tokens cover the same text (see `align`)."""
        teacher = Side(example.targets.byte_end, self.teacher_has_eos[example.index])
        return align(teacher, self[example.index].side, mode=mode, eos=eos)

    def lengths(self) -> tuple[np.ndarray, np.ndarray]:
        """`(tokens [E], rows [E])`: context + target tokens, and target tokens alone; 0 for shards that were not copied."""
        contexts, rows = np.zeros(self._count, dtype=np.int64), np.zeros(self._count, dtype=np.int64)
        for number, example in self._examples.items():
            contexts[number], rows[number] = len(example.context_ids), len(example.target_ids)
        return contexts + rows, rows


def _texts(reader: Reader) -> Iterator[tuple[int, TokenRows, bool]]:
    """`(number, the teacher's tokens, whether the target ends with EOS)` of every example that was copied, in order."""
    eos = reader.manifest.identity["tokenizer"].get("eos_token_id")
    for index in reader.shards:
        shard = reader.shard(index)
        table, gold, byte_end = shard.examples, shard.arrays["gold_ids"], shard.arrays["byte_end"]
        for i, name in enumerate(table["id"]):
            rows = slice(table["row_start"][i], table["row_end"][i])
            example = Example(name, table["target"][i], table["prompt"][i])
            context = np.asarray(table["context_ids"][i], dtype=np.int32)
            ids = gold[rows].astype(np.int32)
            number = shard.first_example + i
            yield (
                number,
                TokenRows(example, context, ids, byte_end[rows].astype(np.int64)),
                bool(ids[-1] == eos),
            )


def _tokenize(
    cached: TokenRows, words: TextTokens, blocks: BlockConfig, ends: bool, teacher: list[bytes]
) -> tuple[TokenRows, int]:
    """The example in the student's tokens, and the byte of the target where they begin."""
    example = cached.example
    if blocks.encoder:
        return tokenize_pair(replace(example, complete=ends), words, blocks), 0
    between = words.separator(example.prompt, blocks.separator)
    in_text = cached.target_ids[: len(cached.target_ids) - ends]  # without the row of the end
    control = _read_as_control(words.spelled(example.target), in_text, teacher)
    joint = words.joint(example.prompt + between, example.target, Counter(), control=control)
    before, start = joint.split(Counter(), movable=True)
    context = with_bos(joint.ids[:before], words, blocks, Counter()).astype(np.int32)
    target, byte_end = joint.ids[before:], joint.ends[before:] - joint.border
    if ends:
        target = np.append(target, words.tokenizer.eos_token_id).astype(np.int32)
        byte_end = np.append(byte_end, len(example.target.encode("utf-8")))
    if len(context) or not len(target):
        return TokenRows(example, context, target, byte_end), start
    # without BOS and without a prompt nothing predicts the first token: it is only seen
    return TokenRows(example, target[:1], target[1:], byte_end[1:]), int(byte_end[0])


def _read_as_control(spelled: list[str], ids: np.ndarray, teacher: list[bytes]) -> bool:
    """Whether the teacher has read the student's control tokens in a target as tokens; so does the student then."""
    return bool(spelled) and {word.encode("utf-8") for word in spelled} <= {teacher[i] for i in ids}
