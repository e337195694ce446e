"""Prompt and target of a pair as context and target ids. A pair is not cut into blocks.

Prompt, separator and target are tokenised as one text, which is split where the target begins
(`kd.data.tokenizing.text_tokens`). For an encoder-decoder teacher they are two texts: the context is what its encoder reads
(the prompt and EOS), and row t is predicted at position t of its decoder. `fit_pair` truncates a pair that is too long: the
target at its end (it then has no EOS row), the prompt at its beginning, which matters less.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from kd.common.errors import DataError
from kd.data.rows.example import Example
from kd.data.tokenizing.block_config import BlockConfig
from kd.data.tokenizing.text_tokens import FREQUENT, TextTokens
from kd.data.tokenizing.token_notes import TokenNotes
from kd.data.tokenizing.token_rows import TokenRows
from kd.models.families.encoder_layout import EncoderLayout


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


def texts_of_pair(example: Example, text: TextTokens, config: BlockConfig, notes: TokenNotes | None) -> Iterator[str]:
    """The texts that `tokenize_pair` will tokenise, as far as they can be told from the settings alone."""
    compared = notes is not None and not notes.changed
    if config.encoder:
        yield from (example.prompt, example.target)
        return
    yield example.prompt + text.separator(example.prompt, config.separator) + example.target
    if compared:  # the first rules
        yield from (example.prompt + config.separator if example.prompt else "", example.target)


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
        counts["border_scored"] = counts["space_scored"] = 0
        counts["border_cut"] = 1
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
    joint = text.joint(asked, FREQUENT, Counter())
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
