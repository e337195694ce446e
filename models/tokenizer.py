"""Load tokenizers; find the bytes of every token id, where each token ends in a text, and a tokenizer's fingerprint.

`token_bytes` defines when two tokenizers are the same: when every id stands for the same bytes. It also allows a student to
be aligned with a cache when the teacher's tokenizer is no longer available.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kd.common.errors import DataError
from kd.common.extras import needed

if TYPE_CHECKING:
    import numpy as np

Tokenizer = Any
"""A fast tokenizer of transformers (`PreTrainedTokenizerFast`)."""

EMBEDDED = {"demo": Path(__file__).parent / "embedded", "demo-t5": Path(__file__).parent / "embedded_t5"}
"""Folders of the embedded teachers and their tokenizers: a GPT-2 trained on `demo`, and a T5 trained on `mini`."""


def load_tokenizer(name: str, revision: str | None = None) -> Tokenizer:
    """A fast tokenizer from a local folder, a hub id, `demo` or `demo-t5`. Raises DataError saying what failed."""
    with needed("transformers", "loading a tokenizer"):
        from transformers import AutoTokenizer

    path = str(EMBEDDED.get(name, name))
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, revision=revision, use_fast=True, trust_remote_code=False)
    except Exception as error:  # transformers raises OSError, ValueError, KeyError, ImportError, …
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(
            "cannot load the tokenizer",
            where=name,
            found=f"{type(error).__name__}: {reason}",
            expected="a folder with tokenizer.json, or a hub id",
            try_="--tokenizer PATH",
        ) from error
    if not tokenizer.is_fast:
        raise DataError(
            "the tokenizer gives no character offsets",
            where=name,
            found=type(tokenizer).__name__,
            expected="a fast tokenizer (tokenizer.json)",
        )
    return tokenizer


@lru_cache(maxsize=1)
def _byte_of_char() -> dict[str, int]:
    """Inverse of GPT-2's byte-to-unicode table (Radford et al. 2019): printable bytes stand for themselves."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    rest = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(rest)}


def pad_token_id(tokenizer: Tokenizer) -> int:
    """Id of the token that pads batches: the pad token, else the unknown, else the end token (GPT-2: 50256)."""
    for token_id in (tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.eos_token_id):
        if token_id is not None:
            return int(token_id)
    raise DataError(
        "the tokenizer has no token to pad with", where=tokenizer.name_or_path, expected="a pad, unknown or end token"
    )


def encode_texts(
    tokenizer: Tokenizer, rows: Sequence[tuple[str, ...]], max_length: int | None = None
) -> list[list[int]]:
    """Token ids of rows of one or two texts, as a classifier reads them. An empty row becomes one padding token.

    A pair is `tokenizer(first, second)`; where it is longer than `max_length` tokens, the longer text is cut first.
    """
    columns = [list(column) for column in zip(*rows, strict=True)]
    options = {} if max_length is None else {"truncation": True, "max_length": max_length}
    ids = tokenizer(*columns, verbose=False, **options)["input_ids"]
    return [list(row) or [pad_token_id(tokenizer)] for row in ids]


def vocabulary_size(tokenizer: Tokenizer) -> int:
    """Number of ids: one more than the largest id that the tokenizer can produce."""
    return int(max(tokenizer.get_vocab().values())) + 1


def token_bytes(tokenizer: Tokenizer) -> list[bytes]:
    """UTF-8 bytes of each id, `[vocabulary_size]`; special tokens give their names, unused ids `b""`.

    Byte-level BPE pieces are mapped back to bytes; `▁` becomes a space, and `<0xNN>` one byte.
    """
    import json

    model = json.loads(tokenizer.backend_tokenizer.to_str())
    byte_level = _uses_byte_level(model)
    added = {entry["id"]: entry["content"] for entry in model.get("added_tokens", [])}
    table = _byte_of_char()
    pieces = [b""] * vocabulary_size(tokenizer)
    for piece, index in tokenizer.get_vocab().items():
        if index in added:
            pieces[index] = added[index].encode()
        elif byte_level:
            pieces[index] = bytes(table[c] for c in piece) if all(c in table for c in piece) else piece.encode()
        elif re.fullmatch(r"<0x[0-9A-Fa-f]{2}>", piece):
            pieces[index] = bytes([int(piece[3:5], 16)])
        else:
            pieces[index] = piece.replace("▁", " ").encode()
    return pieces


def _uses_byte_level(model: dict[str, Any]) -> bool:
    def kinds(node: Any) -> list[str]:
        if isinstance(node, dict):
            return [str(node.get("type"))] + [k for v in node.values() for k in kinds(v)]
        return [k for v in node for k in kinds(v)] if isinstance(node, list) else []

    return "ByteLevel" in kinds([model.get("pre_tokenizer"), model.get("decoder")])


def tokenizer_fingerprint(tokenizer: Tokenizer) -> str:
    """Hex digest of the whole tokenizer: vocabulary, merges, normaliser, special tokens, BOS/EOS behaviour."""
    digest = hashlib.blake2b(digest_size=32)
    digest.update(tokenizer.backend_tokenizer.to_str().encode())
    digest.update(repr((tokenizer.bos_token_id, tokenizer.eos_token_id)).encode())
    return digest.hexdigest()


def encode_with_ends(tokenizer: Tokenizer, pieces: list[bytes], text: str) -> tuple[np.ndarray, np.ndarray]:
    """Tokenise `text` without special tokens.

    Returns `input_ids [n]` int32 and `byte_end [n]` int64: the end of each token in the text's UTF-8 bytes. Ends never
    decrease, and the last one is the length of the text. They are exact where the pieces spell the text (byte-level BPE,
    sentencepiece without a lossy normaliser); otherwise they come from the tokenizer's character offsets.
    """
    import numpy as np

    data = text.encode("utf-8")
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids = np.asarray(encoding["input_ids"], dtype=np.int32)
    if not len(ids):
        return ids, np.zeros(0, dtype=np.int64)
    spelled = b"".join([pieces[i] for i in ids])
    lead = 1 if spelled == b" " + data else 0  # sentencepiece's dummy prefix
    if lead or spelled == data:
        ends = np.cumsum([len(pieces[i]) for i in ids]) - lead
        return ids, np.maximum(ends, 0).astype(np.int64)
    char_to_byte = np.concatenate([[0], np.cumsum([len(c.encode()) for c in text])])
    # the word mark that sentencepiece puts before a text covers none of it, whatever the offsets say
    offsets = encoding["offset_mapping"]
    last = [
        start if pieces[i] == b" " and not text[start:end].isspace() else end
        for i, (start, end) in zip(ids, offsets, strict=True)
    ]
    for token, (following, _) in enumerate(offsets[1:]):
        while last[token] < following and not text[last[token]].isspace():
            last[token] += 1  # a normaliser merged it into the character before, as NFC does with accents
    ends = np.maximum.accumulate(char_to_byte[last])
    ends[-1] = len(data)  # characters that a normaliser dropped at the end belong to the last token
    return ids, ends.astype(np.int64)
