"""Load tokenizers; find the bytes of every token id, where each token ends in a text, and a tokenizer's fingerprint.

`token_bytes` defines when two tokenizers are the same: when every id stands for the same bytes. It also allows a student to
be aligned with a cache when the teacher's tokenizer is no longer available.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kd.common.errors import DataError
from kd.common.extras import needed
from kd.common.paths import as_path
from kd.common.strangers.plain_files import refuse_special_files

if TYPE_CHECKING:
    import numpy as np

Tokenizer = Any
"""A fast tokenizer of transformers (`PreTrainedTokenizerFast`)."""

EMBEDDED = {"demo": Path(__file__).parent / "embedded", "demo-t5": Path(__file__).parent / "embedded_t5"}
"""Folders of the embedded teachers and their tokenizers: a GPT-2 trained on `demo`, and a T5 trained on `mini`."""


WINDOW, OVERLAP = 65_536, 4_096
"""Characters of a long text that are tokenised at once, and characters that a window shares with the one after it."""
AGREEING = 16
"""Tokens on either side of the place where two windows are joined that both must have."""
LONG = 4_096
"""Tokens from which on the sizes of a stretch are stored in few bytes."""


def load_tokenizer(name: str, revision: str | None = None) -> Tokenizer:
    """A fast tokenizer from a local folder, a hub id, `demo` or `demo-t5`. Raises DataError saying what failed."""
    with needed("transformers", "loading a tokenizer"):
        from transformers import AutoTokenizer

    path = str(EMBEDDED.get(name) or (as_path(name) if os.path.isdir(as_path(name)) else name))
    refuse_special_files(path)
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


def control_token_pattern(tokenizer: Tokenizer) -> re.Pattern[str] | None:
    """Finds the special tokens that are spelled in a text; None where the tokenizer has none."""
    words = {t.content for t in tokenizer.added_tokens_decoder.values() if t.special and t.content}
    spelled = "|".join(re.escape(word) for word in sorted(words, key=lambda word: (-len(word), word)))
    return re.compile(spelled) if spelled else None


def encode_texts(
    tokenizer: Tokenizer, rows: Sequence[tuple[str, ...]], max_length: int | None = None, *, control: bool = False
) -> list[list[int]]:
    """Token ids of rows of one or two texts, as a classifier reads them. An empty row becomes one padding token.

    A pair is `tokenizer(first, second)`; where it is longer than `max_length` tokens, the longer text is cut first.

    control   whether a special token that is spelled in a text becomes that token; False: its characters are text
    """
    options: dict[str, Any] = {} if max_length is None else {"truncation": True, "max_length": max_length}
    pattern = None if control else control_token_pattern(tokenizer)
    spelled = [pattern is not None and any(map(pattern.search, row)) for row in rows]
    ids: list[list[int]] = [[] for _ in rows]
    for split in sorted(set(spelled)):
        numbers = [n for n, spelled_split in enumerate(spelled) if spelled_split == split]
        columns = [list(column) for column in zip(*(rows[n] for n in numbers), strict=True)]
        more = {"split_special_tokens": True} if split else {}
        for number, row in zip(
            numbers, tokenizer(*columns, verbose=False, **options, **more)["input_ids"], strict=True
        ):
            ids[number] = list(row) or [pad_token_id(tokenizer)]
    return ids


def vocabulary_size(tokenizer: Tokenizer) -> int:
    """Number of ids: one more than the largest id that the tokenizer can produce."""
    return int(max(tokenizer.get_vocab().values())) + 1


def usable_ids(tokenizer: Tokenizer, width: int, *, what: str) -> int:
    """Number of ids that a tokenizer and a model of `width` ids both have. Raises DataError where they do not fit each other.

    A tokenizer may have added tokens beyond the model's ids (a padding token that nobody embedded): texts decide whether
    they matter, see `refuse_unknown_ids`. Any other piece beyond them is the sign of another model's tokenizer.
    """
    entries = vocabulary_size(tokenizer)
    if entries <= width:
        return entries
    beyond = set(tokenizer.get_vocab().values()) - set(range(width))
    if beyond - set(tokenizer.added_tokens_decoder):
        raise DataError(
            f"{what} has fewer logits than its tokenizer has entries",
            found=f"{width} logits",
            expected=f"at least {entries}",
            try_="--tokenizer PATH of the right tokenizer",
        )
    return width


def refuse_unknown_ids(texts: Iterable[tuple[str, np.ndarray]], width: int) -> None:
    """Raise DataError naming the first of `(name, ids)` that has an id beyond the model's `width` ids."""
    for name, ids in texts:
        if len(ids) and ids.max() >= width:
            raise DataError(
                "a text has a token that the model does not have",
                where=name,
                found=f"id {ids.max()}",
                expected=f"ids below {width}",
                try_="another --tokenizer, or a text without that token",
            )


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


def tokenizer_fingerprint(tokenizer: Tokenizer, *, cut_to: int | None = None) -> str:
    """Hex digest of the whole tokenizer: vocabulary, merges, normaliser, special tokens, BOS/EOS behaviour.

    Truncation and padding count as they are when texts are tokenised, whatever its file or an earlier call has left there.

    cut_to   most tokens of a row, where rows are cut by the tokenizer itself, as those of classifiers are
    """
    digest = hashlib.blake2b(digest_size=32)
    with _cutting(tokenizer, cut_to) as backend:
        digest.update(backend.to_str().encode())
    digest.update(repr((tokenizer.bos_token_id, tokenizer.eos_token_id)).encode())
    return digest.hexdigest()


@contextmanager
def _cutting(tokenizer: Tokenizer, cut_to: int | None) -> Iterator[Any]:
    """The tokenizer's backend without padding, truncating to `cut_to` tokens or not at all; afterwards it is as it was."""
    backend = tokenizer.backend_tokenizer
    truncation, padding = backend.truncation, backend.padding
    backend.no_padding()
    backend.no_truncation()
    if cut_to is not None:
        backend.enable_truncation(
            max_length=cut_to, stride=0, strategy="longest_first", direction=tokenizer.truncation_side
        )
    try:
        yield backend
    finally:
        backend.no_truncation() if truncation is None else backend.enable_truncation(**truncation)
        backend.no_padding() if padding is None else backend.enable_padding(**padding)


def encode_with_ends(
    tokenizer: Tokenizer, pieces: list[bytes], text: str, *, control: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """Tokenise `text` without adding special tokens.

    Returns `input_ids [n]` int32 and `byte_end [n]` int64: the end of each token in the text's UTF-8 bytes. Ends never
    decrease, and the last one is the length of the text. They are exact where the pieces spell the text (byte-level BPE,
    sentencepiece without a lossy normaliser); otherwise they come from the tokenizer's character offsets.

    control   whether a special token that is spelled in the text becomes that token; False: its characters are text
    """
    import numpy as np

    stretches = encode_stretches(tokenizer, pieces, text, control=control)
    if len(stretches) == 1:
        return stretches[0].ids, stretches[0].ends()
    return np.concatenate([s.ids for s in stretches]), np.cumsum(np.concatenate([s.sizes for s in stretches]))


@dataclass(frozen=True)
class Stretch:
    """Consecutive tokens of a text, in few bytes: a token of a long text takes 5."""

    ids: np.ndarray
    """[n] int32"""
    sizes: np.ndarray
    """[n] int64, or uint8 where no token is longer: bytes of the text between the end of the token before and its own."""

    def ends(self, start: int = 0) -> np.ndarray:
        """`[n]` int64: the end of each token, where the stretch begins at byte `start`."""
        ends = self.sizes.cumsum(dtype="int64")
        return ends + start if start else ends

    def with_control(self, token: int, position: int) -> Stretch:
        """The same with a control token, which covers nothing of the text, before the token at `place`."""
        import numpy as np

        ids = np.concatenate([self.ids[:position], np.array([token], np.int32), self.ids[position:]])
        sizes = np.concatenate([self.sizes[:position], np.zeros(1, self.sizes.dtype), self.sizes[position:]])
        return Stretch(ids, sizes)


def encode_stretches(tokenizer: Tokenizer, pieces: list[bytes], text: str, *, control: bool = True) -> list[Stretch]:
    """`encode_with_ends`, a stretch of the tokens after another, of which a long text has many and a short one has one.

    A long text is tokenised in windows, because a tokenizer holds about 170 bytes for each byte of a text.
    """
    if len(text) > WINDOW:
        joined = _encode_in_windows(tokenizer, pieces, text, control)
        if joined is not None:
            return joined
    ids, ends = encode_at_once(tokenizer, pieces, text, control=control)
    return [stretch_of(ids, ends)]


def stretch_of(ids: np.ndarray, ends: np.ndarray, start: int = 0) -> Stretch:
    """Tokens with these ends as a stretch that begins at byte `start`."""
    import numpy as np

    sizes = ends.copy()
    sizes[:1] -= start
    sizes[1:] -= ends[:-1]
    return Stretch(ids, sizes.astype(np.uint8) if len(sizes) > LONG and sizes.max() < 256 else sizes)


def encode_at_once(
    tokenizer: Tokenizer, pieces: list[bytes], text: str, *, control: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """`encode_with_ends` in one call of the tokenizer, whatever the length."""
    import numpy as np

    data = text.encode("utf-8")
    encoding = _encoding(tokenizer, text, control)
    ids = np.array(encoding.ids, dtype=np.int32)
    if not len(ids):
        return ids, np.zeros(0, dtype=np.int64)
    spelled = [pieces[i] for i in encoding.ids]
    joined = b"".join(spelled)
    lead = 1 if joined == b" " + data else 0  # sentencepiece's dummy prefix
    if lead or joined == data:
        ends = np.cumsum(np.fromiter(map(len, spelled), dtype=np.int64, count=len(spelled))) - lead
        return ids, np.maximum(ends, 0)
    return ids, _ends_by_offsets(text, spelled, encoding.offsets)


def encode_many(
    tokenizer: Tokenizer, pieces: list[bytes], lengths: np.ndarray, texts: Sequence[str], *, control: bool = True
) -> list[tuple[np.ndarray, np.ndarray]]:
    """`encode_with_ends` of several texts of at most WINDOW characters, in one call of the tokenizer, which takes no offsets.

    lengths   [V] bytes of each of `pieces`
    """
    import numpy as np

    with _plain_backend(tokenizer, control) as backend:
        numbers = [e.ids for e in backend.encode_batch_fast(list(texts), add_special_tokens=False)]
    data = [text.encode("utf-8") for text in texts]
    stops = np.cumsum([0, *map(len, numbers)])
    ids = np.fromiter(chain.from_iterable(numbers), np.int32, int(stops[-1]))
    ends = np.concatenate([[0], np.cumsum(lengths[ids])])
    bounds = list(pairwise(stops.tolist()))
    starts = np.cumsum([0, *map(len, data)])
    as_long = np.array_equal(ends[stops], starts) and all(numbers)
    if as_long and b"".join(map(pieces.__getitem__, chain.from_iterable(numbers))) == b"".join(data):  # as a rule
        within = ends[1:] - np.repeat(starts[:-1], np.diff(stops))  # ends in the text of each
        return [(ids[a:b], within[a:b]) for a, b in bounds]
    encoded = []
    for text, bytes_of_text, of_text, (a, b) in zip(texts, data, numbers, bounds, strict=True):
        joined = b"".join(map(pieces.__getitem__, of_text))
        lead = len(joined) - len(bytes_of_text)  # 1 for sentencepiece's dummy prefix
        if a < b and (joined == bytes_of_text or (lead == 1 and joined == b" " + bytes_of_text)):
            encoded.append((ids[a:b], np.maximum(ends[a + 1 : b + 1] - ends[a] - lead, 0)))
        else:  # the offsets are needed
            encoded.append(encode_at_once(tokenizer, pieces, text, control=control))
    return encoded


def _encoding(tokenizer: Tokenizer, text: str, control: bool) -> Any:
    """The tokenizer's `Encoding`. Unlike transformers' own call, it makes offsets only where they are asked for."""
    with _plain_backend(tokenizer, control) as backend:
        return backend.encode(text, add_special_tokens=False)


@contextmanager
def _plain_backend(tokenizer: Tokenizer, control: bool) -> Iterator[Any]:
    """The tokenizer's backend without truncation and padding, and with control tokens read as is asked for."""
    backend = tokenizer.backend_tokenizer
    if backend.truncation is not None:  # left there by an earlier call
        backend.no_truncation()
    if backend.padding is not None:
        backend.no_padding()
    before = backend.encode_special_tokens
    backend.encode_special_tokens = not control or bool(getattr(tokenizer, "split_special_tokens", False))
    try:
        yield backend
    finally:
        backend.encode_special_tokens = before


def _ends_by_offsets(text: str, spelled: list[bytes], offsets: list[tuple[int, int]]) -> np.ndarray:
    """`[n]` int64 ends in bytes, from the tokenizer's offsets in characters."""
    import numpy as np

    char_to_byte = np.concatenate([[0], np.cumsum([len(c.encode()) for c in text])])
    # the word mark that sentencepiece puts before a text covers none of it, whatever the offsets say
    last = [
        start if piece == b" " and not text[start:end].isspace() else end
        for piece, (start, end) in zip(spelled, offsets, strict=True)
    ]
    for token, (following, _) in enumerate(offsets[1:]):
        while last[token] < following and not text[last[token]].isspace():
            last[token] += 1  # a normaliser merged it into the character before, as NFC does with accents
    ends = np.maximum.accumulate(char_to_byte[last])
    ends[-1] = char_to_byte[-1]  # characters that a normaliser dropped at the end belong to the last token
    return ends.astype(np.int64)


def _encode_in_windows(tokenizer: Tokenizer, pieces: list[bytes], text: str, control: bool) -> list[Stretch] | None:
    """`encode_stretches` of a long text; None where two windows do not cut what they share into the same tokens."""
    import numpy as np

    lengths = np.array([len(piece) for piece in pieces], dtype=np.int64)

    def encoded(part: str) -> tuple[np.ndarray, np.ndarray]:  # twice as fast as `encode_at_once`
        return encode_many(tokenizer, pieces, lengths, [part], control=control)[0]

    ids, ends = encoded(text[:WINDOW])
    parts: list[Stretch] = []
    first = first_byte = done = 0
    while first + WINDOW < len(text):
        following = first + WINDOW - OVERLAP
        first_byte += len(text[first:following].encode("utf-8"))
        first = following
        later, later_ends = encoded(text[first : first + WINDOW])
        later_ends = later_ends + first_byte
        cut = _shared_cut(ids, ends, later, later_ends)
        if cut is None:
            return None
        parts.append(stretch_of(ids[: cut[0]].copy(), ends[: cut[0]], done))
        done = int(ends[cut[0] - 1])
        ids, ends = later[cut[1] :], later_ends[cut[1] :]
    return [*parts, stretch_of(ids, ends, done)]


def _shared_cut(ids: np.ndarray, ends: np.ndarray, later: np.ndarray, later_ends: np.ndarray) -> tuple[int, int] | None:
    """Tokens of a window, and of the one after it, before a place that both cut alike; None where there is none.

    The `AGREEING` tokens on either side are the same in both windows, and the place is as near as can be to the middle of
    what they share, so that it is far from the ends, where a window lacks context.
    """
    import numpy as np

    middle = (later_ends[0] + ends[-1]) / 2
    shared = np.intersect1d(ends, later_ends)
    for byte in shared[np.argsort(np.abs(shared - middle), kind="stable")]:
        a, b = (int(np.searchsorted(e, byte, side="right")) for e in (ends, later_ends))
        around = [
            (i[n - AGREEING : n + AGREEING], e[n - AGREEING : n + AGREEING])
            for i, e, n in ((ids, ends, a), (later, later_ends, b))
            if n >= AGREEING
        ]
        if len(around) == 2 and len(around[0][0]) == 2 * AGREEING and all(map(np.array_equal, *around)):
            return a, b
    return None
