"""Turn text into token rows: documents are cut into blocks, prompt/target pairs stay whole.

A *row* predicts one target token. A block of L tokens has L - 1 rows, because its first token is only context. Consecutive
blocks overlap by `L - stride` context tokens, so every token of a document but its first is scored exactly once, with any
stride. The default stride, L - 1, wastes nothing. A smaller stride gives every token at least `L - stride` tokens of context
and takes proportionally more teacher time. Blocks never cross documents. With `bos`, a document begins with the tokenizer's
BOS token, and its first real token is scored too.

Blocks end at character boundaries, so each has an exact text. Without BOS, the first token that ends on a boundary is
context, with all tokens before it. A character of more tokens than the stride stays whole.

Pairs are not cut into blocks. Prompt, separator and target are tokenised as one text, which is split where the target begins
(`kd.data.text_tokens`). For an encoder-decoder teacher they are two texts: the context is what its encoder reads (the prompt
and EOS), and row t is predicted at position t of its decoder. A pair that is too long stops the build, is dropped, or is
truncated: the target at its end (it then has no EOS row), the prompt at its beginning, which matters less. Each text to
classify is one row: the context is what the classifier reads, the target is the number of its label.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from kd.common.errors import DataError, unknown_name
from kd.data.conversations.conversation import CONVERSATIONS
from kd.data.instruction_tasks.glue import CLASSES, PAIR
from kd.data.left_out import LeftOut
from kd.data.rows.example import Example
from kd.data.sources import Corpus
from kd.data.text_tokens import CONTROL_TOKENS, TextTokens
from kd.data.token_notes import TokenNotes
from kd.models.batching.gaps import NO_GAPS, Gaps
from kd.models.families.encoder_layout import EncoderLayout
from kd.models.tokenizer import Tokenizer, control_token_pattern, encode_texts

OVERLONG = ("error", "drop", "truncate")
"""Policies for pairs that are too long."""


@dataclass(frozen=True)
class BlockConfig:
    """How text becomes rows. These settings are part of a cache's identity."""

    seq_len: int = 512
    """Tokens per block, context included."""
    stride: int | None = None
    """New tokens scored per block, from 1 to seq_len - 1; None is seq_len - 1."""
    bos: bool = True
    """Begin each document or prompt with the BOS token, if the tokenizer has one."""
    eos: bool = False
    """Score an EOS token after each document. Targets of pairs always end with EOS, if the tokenizer has one."""
    separator: str = "\n"
    """Text between prompt and target of a pair, tokenised with both. Not used with an encoder."""
    encoder: bool = False
    """Whether an encoder reads the context. Then only the context is limited by `seq_len`; it ends with EOS and has no BOS."""
    target_len: int | None = None
    """Maximum number of target tokens of a pair, EOS included; None is what `seq_len` leaves."""
    overlong: str = "error"
    """Policy for pairs that are too long: error, drop or truncate."""
    control_tokens: str = "auto"
    """How a control token that is spelled in a text is read: auto, control or text; see `kd.data.text_tokens`."""
    layout: EncoderLayout | None = None
    """Special tokens around an encoder's and a decoder's text; None where EOS ends both and nothing else is added."""

    def __post_init__(self) -> None:
        if self.control_tokens not in CONTROL_TOKENS:
            raise unknown_name("way to read control tokens", self.control_tokens, CONTROL_TOKENS)
        if self.overlong not in OVERLONG:
            raise unknown_name("policy for pairs that are too long", self.overlong, OVERLONG)
        if self.target_len is not None and self.target_len < 1:
            raise DataError("the target length is too small", found=self.target_len, expected="at least 1 token")
        if self.seq_len < 2:
            raise DataError(
                "the sequence length is too small",
                found=self.seq_len,
                expected="at least 2 tokens",
                try_="--seq-len 512",
            )
        if self.stride is not None and not 1 <= self.stride < self.seq_len:
            raise DataError(
                "the stride does not fit the sequence length",
                found=self.stride,
                expected=f"1..{self.seq_len - 1} tokens",
                try_="--stride",
            )

    @property
    def forced(self) -> tuple[int, ...]:
        """Ids that a decoder begins every target with, after its start token."""
        return () if self.layout is None else self.layout.target_before

    @classmethod
    def from_identity(cls, entries: Mapping[str, Any]) -> BlockConfig:
        """The settings that a cache's identity holds, see `identity`."""
        layout = entries.get("layout")
        return cls(**{**entries, "layout": None if layout is None else EncoderLayout(**layout)})

    def identity(self) -> dict[str, Any]:
        """The settings as a cache's identity holds them. How control tokens are read stands with the tokenizer.

        A layout is left out where there is none, as caches had it before.
        """
        entries = asdict(self)
        del entries["control_tokens"]
        if self.layout is None:
            del entries["layout"]
        else:  # as JSON has it
            entries["layout"] = {name: list(ids) for name, ids in entries["layout"].items()}
        return entries

    def normalised(self, kind: str, tokenizer: Tokenizer) -> BlockConfig:
        """Settings that give the same rows, where those that `tokenize_corpus` ignores for this kind of corpus are fixed.

        Pairs have no stride and always end with EOS; documents have no separator; BOS and EOS are off where the tokenizer
        has none. For texts to classify and conversations only the length matters, because tokenizer and template add the
        special tokens.
        """
        if kind in (CLASSES, CONVERSATIONS):
            only = BlockConfig(self.seq_len, self.seq_len - 1, bos=False, overlong=self.overlong)
            return only if kind == CONVERSATIONS else replace(only, control_tokens=self.control_tokens)
        pairs = kind != "documents"
        return replace(
            self,
            stride=self.seq_len - 1 if pairs or self.stride is None else self.stride,
            bos=self.bos and tokenizer.bos_token_id is not None and not self.encoder,
            eos=(self.eos or pairs) and tokenizer.eos_token_id is not None,
            separator=self.separator if pairs and not self.encoder else BlockConfig.separator,
            target_len=self.target_len if pairs else None,
            overlong=self.overlong if pairs else "error",
        )


@dataclass(frozen=True)
class TokenRows:
    """One cached example: models read `context_ids`, and each of `target_ids` is one scored row."""

    example: Example
    context_ids: np.ndarray
    """[C] int32, C >= 1."""
    target_ids: np.ndarray
    """[n] int32, n >= 1; without gaps, row t is predicted at position C - 1 + t."""
    byte_end: np.ndarray
    """[n] int64: the end of each target token in the UTF-8 bytes of `example.target`."""
    gaps: Gaps = NO_GAPS
    """Tokens between target tokens, which are read and not scored."""
    ended: tuple[bool, ...] = ()
    """Of a conversation, for each turn: whether its last token is the control token that ends it."""
    messages: tuple[int, ...] = ()
    """Of a conversation, for each turn: the number of its message."""

    @property
    def input_ids(self) -> np.ndarray:
        """`[T]`: context and target, as a model reads them. The last position predicts nothing that is cached."""
        return self.gaps.sequence(self.context_ids, self.target_ids)

    @property
    def read_only(self) -> int:
        """Tokens that are read and not scored."""
        return len(self.context_ids) + self.gaps.tokens


def tokenize_corpus(
    corpus: Corpus,
    tokenizer: Tokenizer,
    config: BlockConfig,
    left_out: LeftOut | None = None,
    notes: TokenNotes | None = None,
) -> Iterator[TokenRows]:
    """All rows of `corpus` in order. Raises DataError naming the example that cannot be scored.

    left_out   receives the documents that are `too_short`, the pairs that are `too_long` and were dropped, and those whose
               prompt or target was `shortened`
    notes      receives what was found in the texts, and whether a row differs from what `first_rules` gives
    """
    if corpus.kind == CONVERSATIONS:
        raise DataError(
            "conversations are read through a chat template, which is not done here yet",
            where=corpus.spec,
            try_="a text of documents or pairs",
        )
    left_out = LeftOut() if left_out is None else left_out
    if corpus.kind == "documents":
        yield from _documents(corpus, tokenizer, config, left_out, notes)
        return
    refused: list[str] = []
    if corpus.kind == CLASSES:
        pairs = _classified(corpus.examples, tokenizer, config, notes)
    else:
        text = TextTokens(tokenizer, config.control_tokens)
        whole = (tokenize_pair(example, text, config, notes) for example in corpus.examples)
        pairs = ((row, fit_pair(row, config)) for row in whole)
    for row, fitted in pairs:
        example = row.example
        if fitted is row:
            yield row
        elif config.overlong == "error":
            refused.append(f"{example.id} ({len(row.context_ids)} context and {len(row.target_ids)} target tokens)")
        elif config.overlong == "drop" or fitted is None:
            left_out.add("too_long", example.id)
        else:
            left_out.add("shortened", example.id)
            yield fitted
    if refused:
        limits = f"{config.seq_len} " + ("for the prompt" if config.encoder else "in all")
        raise DataError(
            "examples are longer than the limits",
            where=corpus.spec,
            found=f"{len(refused)} of {len(corpus.examples)}, first {refused[0]}",
            expected=limits + (f", {config.target_len} for the target" if config.target_len else ""),
            try_="a larger --seq-len or --target-len; cache build also has --overlong drop and truncate",
        )


def _documents(
    corpus: Corpus, tokenizer: Tokenizer, config: BlockConfig, left_out: LeftOut, notes: TokenNotes | None
) -> Iterator[TokenRows]:
    """The blocks of all documents that have a token to score. Raises DataError where none has."""
    if config.encoder:
        raise DataError(
            "an encoder-decoder teacher needs a prompt for its encoder",
            where=corpus.spec,
            found="documents",
            expected="prompt and target",
            try_="--columns prompt=…,target=…, or --data flan:four",
        )
    text, blocks = TextTokens(tokenizer, config.control_tokens), 0
    for example in corpus.examples:
        before = blocks
        for row in document_blocks(example, text, config, notes):
            blocks += 1
            yield row
        if blocks == before:
            left_out.add("too_short", example.id)
    if not blocks:
        raise DataError(
            "no document has a token to score",
            where=corpus.spec,
            found=f"{len(corpus.examples)} documents of one token",
            expected="at least 2 tokens, of which the first is context only",
            try_="join short documents, or a tokenizer with BOS",
        )


def _classified(
    examples: Sequence[Example], tokenizer: Tokenizer, config: BlockConfig, notes: TokenNotes | None
) -> Iterator[tuple[TokenRows, TokenRows | None]]:
    """(whole row, row of at most `seq_len` tokens) of each text to classify; the target is the number of the label."""
    texts = [tuple(example.prompt.split(PAIR)) for example in examples]
    control = config.control_tokens == "control"
    if notes is not None and (pattern := control_token_pattern(tokenizer)) is not None:
        for example in examples:
            found = len(pattern.findall(example.prompt))
            notes.add({"control_tokens_kept" if control else "control_tokens_as_text": found}, example.id)
            notes.changed |= bool(found) and not control
    whole = encode_texts(tokenizer, texts, control=control)
    for example, ids, cut in zip(
        examples, whole, encode_texts(tokenizer, texts, config.seq_len, control=control), strict=True
    ):
        end = np.array([len(example.target.encode("utf-8"))])
        row = TokenRows(example, np.array(ids, dtype=np.int32), np.array([example.answer], dtype=np.int32), end)
        yield row, row if len(cut) == len(ids) else replace(row, context_ids=np.array(cut, dtype=np.int32))


def document_blocks(
    example: Example, text: TextTokens, config: BlockConfig, notes: TokenNotes | None = None
) -> Iterator[TokenRows]:
    """Cut one document into blocks of at most `seq_len` tokens; none where it has no token to score."""
    counts: Counter[str] = Counter()
    ids, ends = text.document(example.target, counts)
    data = example.target.encode("utf-8")
    if config.eos and text.eos is not None:
        if text.ends_with_eos(example.target):
            counts["eos_in_text"] += 1
        else:
            ids, ends = np.append(ids, np.int32(text.eos)), np.append(ends, len(data))
    if config.bos and text.bos is not None:
        if len(ids) and ids[0] == text.bos:
            counts["bos_in_text"] += 1
        else:
            ids, ends = np.insert(ids, 0, text.bos), np.insert(ends, 0, 0)
    if notes is not None:
        notes.add(counts, example.id)
        notes.changed |= any(counts[note] for note in ("eos_in_text", "bos_in_text", "control_tokens_as_text"))
    ids = ids.astype(np.int32)
    last = len(ids)
    at_boundary = [end == len(data) or data[end] & 0xC0 != 0x80 for end in ends]  # of characters
    start = next((i + 1 for i in range(last) if at_boundary[i]), last)
    stride = config.stride or config.seq_len - 1
    number = 0
    while start < last:
        context = max(0, start - (config.seq_len - stride))
        stop = min(context + config.seq_len, last)
        while stop > start and not at_boundary[stop - 1]:
            stop -= 1
        if stop == start:  # the character has more tokens than the stride, so the block has less context
            stop = next(i + 1 for i in range(start, last) if at_boundary[i])
            context = max(context, stop - config.seq_len)
        if context >= start:
            raise DataError(
                "a character does not fit into a block",
                where=f"example {example.id} token {start}",
                found=f"seq-len {config.seq_len}",
                try_="a larger --seq-len",
            )
        base = int(ends[start - 1])
        block = Example(
            id=f"{example.id}#{number}",
            prompt=data[int(ends[context - 1]) if context else 0 : base].decode("utf-8", "ignore"),
            target=data[base : int(ends[stop - 1])].decode("utf-8"),
            task=example.task,
            split=example.split,
        )
        yield TokenRows(block, ids[context:start], ids[start:stop], ends[start:stop] - base)
        start, number = stop, number + 1


def tokenize_pair(
    example: Example, text: TextTokens, config: BlockConfig, notes: TokenNotes | None = None
) -> TokenRows:
    """Context and target of a pair, of any length. Raises DataError where there is no context.

    The row's example has the target as it is scored: without an end token of its own, and without what lies in the context.
    """
    counts: Counter[str] = Counter()
    given, end = example, text.eos if example.complete else None
    if end is not None and text.ends_with_eos(example.target):
        counts["eos_in_text"] += 1
        example = replace(example, target=text.without_eos(example.target))
    if config.encoder:
        context = _source(example.prompt, text, config.layout, counts)
        target, ends = text.target(example.target, counts)
    else:
        example, context, target, ends = _joint_pair(example, text, config, counts)
    if end is not None:
        after = (end,) if config.layout is None else config.layout.target_after
        target = np.append(target, after)
        ends = np.append(ends, [len(example.target.encode("utf-8"))] * len(after))
    if not len(context):
        raise DataError(
            "an example has no context to predict from",
            where=f"example {example.id}",
            found="an empty prompt and no BOS token",
            try_="a prompt, or a tokenizer with BOS",
        )
    row = TokenRows(example, context.astype(np.int32), target.astype(np.int32), ends)
    if notes is not None:
        notes.add(counts, example.id)
        notes.changed = notes.changed or not _equal_ids(row, first_rules(given, text, config))
    return row


def _source(prompt: str, text: TextTokens, layout: EncoderLayout | None, counts: Counter[str]) -> np.ndarray:
    """What an encoder reads of a prompt: its ids and EOS, or its ids in the tokenizer's template.

    Special tokens that the prompt begins or ends with itself are not added again.
    """
    ids, _ = text.prompt(prompt, counts)
    eos = () if text.eos is None else (text.eos,)
    before, after = ((), eos) if layout is None else (layout.source_before, layout.source_after)
    if after[:1] == eos and text.ends_with_eos(prompt):
        after = after[1:]
    if before and text.policy != "text" and tuple(ids[: len(before)]) == before:
        before = ()
    return np.concatenate([before, ids, after]).astype(np.int32)


def _joint_pair(
    example: Example, text: TextTokens, config: BlockConfig, counts: Counter[str]
) -> tuple[Example, np.ndarray, np.ndarray, np.ndarray]:
    """The example, context, target and byte ends of a pair that is one text; without EOS."""
    prompt, target = example.prompt, example.target
    between = text.separator(prompt, config.separator)
    counts["separator_in_prompt"] += bool(prompt and config.separator and not between)
    if config.bos and not prompt and text.begins_with_bos(target):
        prompt = target[: len(text.tokenizer.bos_token)]
        example = replace(example, prompt=prompt, target=target[len(prompt) :])
    joint = text.joint(prompt + between, example.target, counts)
    before, moved = joint.split(counts, movable=not config.separator)
    if prompt and not before and not (config.bos and text.bos is not None):  # one token holds the whole prompt
        counts["border_scored"], counts["border_cut"] = 0, 1
        alone = Counter[str]()  # their control tokens are counted
        return example, text.prompt(prompt + between, alone)[0], *text.target(example.target, alone)
    if moved:
        data = example.target.encode("utf-8")
        over, rest = data[:moved].decode("utf-8"), data[moved:].decode("utf-8")
        example = replace(example, prompt=example.prompt + over, target=rest)
    context = with_bos(joint.ids[:before], text, config, counts)
    return example, context, joint.ids[before:], joint.ends[before:] - joint.border - moved


def with_bos(context: np.ndarray, text: TextTokens, config: BlockConfig, counts: Counter[str]) -> np.ndarray:
    """A context that begins with one BOS token, where the settings ask for it and the tokenizer has one."""
    if not config.bos or text.bos is None:
        return context
    if len(context) and context[0] == text.bos:
        counts["bos_in_text"] += 1
        return context
    return np.concatenate([[text.bos], context])


def tokenize_prompt(example: Example, text: TextTokens, config: BlockConfig) -> tuple[np.ndarray, str]:
    """The context before a target that is still to be written, and the white space that the target's first token holds.

    After `prompt + " "` a text goes on with ` Because`, so the context ends before the space, as `tokenize_pair` ends it, and
    what is written begins with the space. A frequent word stands for the target.
    """
    row = tokenize_pair(replace(example, target=""), text, config)
    asked = example.prompt + text.separator(example.prompt, config.separator)
    if config.encoder or not asked or not asked[-1].isspace():
        return row.context_ids, ""
    joint = text.joint(asked, "the", Counter())
    context = with_bos(joint.ids[: joint.before], text, config, Counter())
    if not len(context) or (joint.crossing and not joint.crossing.isspace()):
        return row.context_ids, ""
    return context.astype(np.int32), joint.crossing


def first_rules(example: Example, text: TextTokens, config: BlockConfig) -> tuple[np.ndarray, np.ndarray]:
    """Ids of context and target as caches had them before prompt and target were one text.

    They were tokenised apart, with all control tokens read as such, and BOS and EOS were added whatever the texts held. Only
    the fingerprint asks for this: it changes where the ids do.
    """
    prompt = example.prompt
    if config.encoder:
        context = text.encode(prompt)[0]
        context = context if text.eos is None else np.append(context, text.eos)
    else:
        context = text.encode(prompt + config.separator if prompt else "")[0]
        context = np.concatenate([[text.bos], context]) if config.bos and text.bos is not None else context
    target = text.encode(example.target)[0]
    return context, np.append(target, text.eos) if text.eos is not None and example.complete else target


def _equal_ids(row: TokenRows, ids: tuple[np.ndarray, np.ndarray]) -> bool:
    return np.array_equal(row.context_ids, ids[0]) and np.array_equal(row.target_ids, ids[1])


def fit_pair(row: TokenRows, config: BlockConfig) -> TokenRows | None:
    """The row itself if it fits, else the row cut to the limits; None where nothing of its target would be left."""
    keep = min(len(row.target_ids), len(row.target_ids) if config.target_len is None else config.target_len)
    if not config.encoder:
        keep = min(keep, config.seq_len - 1)  # a causal model's context has at least one token
    most_context = config.seq_len - (0 if config.encoder else keep)
    if keep == len(row.target_ids) and len(row.context_ids) <= most_context:
        return row
    context, example = row.context_ids, row.example
    if len(context) > most_context:
        opening = len(config.layout.source_before) if config.layout is not None else config.bos and not config.encoder
        first = int(opening) if most_context > opening else 0
        context = np.concatenate([context[:first], context[len(context) - most_context + first :]])
    if keep < len(row.target_ids):
        data = example.target.encode("utf-8")
        while keep and row.byte_end[keep - 1] < len(data) and data[row.byte_end[keep - 1]] & 0xC0 == 0x80:
            keep -= 1
        text = data[: int(row.byte_end[keep - 1])] if keep else b""
        if not text:
            return None
        example = replace(example, target=text.decode("utf-8"), complete=False)
    return TokenRows(example, context, row.target_ids[:keep], row.byte_end[:keep])
