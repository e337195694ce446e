"""Plain arrays: the general way into a cache. Whatever can call `numpy.savez` can write this format.

A source is one `.npz` file, or a folder of them, which are read in the order of their names. Each holds whole sequences:

    input_ids        [tokens]  integers: the token ids of all sequences, one after another
    lengths          [S]       integers: how many tokens each sequence has
    token_ids        [N, K]    integers: the ids that the teacher found most probable
    logprobs         [N, K]    floats: their log-probabilities, natural logarithms at temperature 1
    context_lengths  [S]       optional: tokens of each sequence that are read and not predicted; 1 where it is missing
    kept             [N]       optional: how many of the K places each row uses; K where it is missing
    gold_logprobs    [N]       optional: log-probability of the token that is there
    gold_ranks       [N]       optional: how many tokens are more probable than that one
    ids              [S]       optional: a name of each sequence, text
    prompts, targets [S], byte_ends [N]    optional, together: the text before the predicted tokens, their own text, and where
                               each of them ends in the UTF-8 bytes of its target

N counts the predicted tokens of all sequences. The rows of a sequence follow each other: its row r predicts its token
`context_length + r`, given all tokens before that one.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from kd.cache_builder.exchange.source_sequences import NO_ID, SourceSequence, SourceText
from kd.common.errors import DataError
from kd.common.strangers.plain_files import open_plain

REQUIRED = {"input_ids": ("iu", 1), "lengths": ("iu", 1), "token_ids": ("iu", 2), "logprobs": ("f", 2)}
"""Array -> the kinds of numbers it may hold, and its number of dimensions."""
OPTIONAL = {
    "context_lengths": ("iu", 1),
    "kept": ("iu", 1),
    "gold_logprobs": ("f", 1),
    "gold_ranks": ("iu", 1),
    "ids": ("U", 1),
    "prompts": ("U", 1),
    "targets": ("U", 1),
    "byte_ends": ("iu", 1),
}
TEXTS = ("prompts", "targets", "byte_ends")
"""Arrays that belong together."""


def npz_sequences(path: Path, number: int) -> Iterator[SourceSequence]:
    """The sequences of one file; `number` of the file names those that have no name. Raises DataError."""
    arrays = _arrays(path)
    lengths = arrays["lengths"].astype(np.int64)
    contexts = arrays.get("context_lengths", np.ones_like(lengths)).astype(np.int64)
    _check_shapes(path, arrays, lengths, contexts)
    token_ids, logprobs = arrays["token_ids"].astype(np.int64), arrays["logprobs"]
    tokens = np.concatenate([[0], np.cumsum(lengths)])
    rows = np.concatenate([[0], np.cumsum(lengths - contexts)])
    kept = arrays.get("kept")
    for s, context in enumerate(contexts.tolist()):
        part = slice(rows[s], rows[s + 1])
        ids, values = token_ids[part].copy(), logprobs[part].astype(np.float64)
        if kept is not None:
            unused = np.arange(ids.shape[1]) >= kept[part, None]
            ids[unused], values[unused] = NO_ID, -np.inf
        text = None
        if "targets" in arrays:
            ends = arrays["byte_ends"][part].astype(np.int64)
            text = SourceText(str(arrays["prompts"][s]), str(arrays["targets"][s]), ends)
        yield SourceSequence(
            str(arrays["ids"][s]) if "ids" in arrays else f"{number}/{s}",
            arrays["input_ids"][tokens[s] : tokens[s + 1]].astype(np.int64),
            context,
            ids,
            values,
            arrays["gold_logprobs"][part].astype(np.float64) if "gold_logprobs" in arrays else None,
            arrays["gold_ranks"][part].astype(np.int64) if "gold_ranks" in arrays else None,
            text,
        )


def _arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a file, each of the kind that it must be. Raises DataError."""
    try:
        with open_plain(path) as file:
            if not zipfile.is_zipfile(file):
                raise ValueError("no archive of arrays")
            file.seek(0)
            with np.load(file, allow_pickle=False) as archive:
                arrays = {name: archive[name] for name in archive.files}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, KeyError) as error:
        raise DataError(
            "a file cannot be read as arrays", where=path, found=error, expected="an .npz file of numpy.savez"
        ) from error
    known = REQUIRED | OPTIONAL
    missing = sorted(REQUIRED.keys() - arrays.keys())
    together = [name for name in TEXTS if name in arrays]
    if missing or (together and len(together) < len(TEXTS)):
        missing = missing or sorted(set(TEXTS) - set(together))
        raise DataError(
            "arrays are missing",
            where=path,
            found=", ".join(sorted(arrays)) or "none",
            expected=", ".join(missing) + ("" if missing[0] in REQUIRED else f" beside {', '.join(together)}"),
        )
    unknown = sorted(arrays.keys() - known.keys())
    if unknown:
        raise DataError(
            "arrays that this format does not have", where=path, found=", ".join(unknown), expected=", ".join(known)
        )
    for name, array in arrays.items():
        kinds, dimensions = known[name]
        if array.dtype.kind not in kinds or array.ndim != dimensions:
            words = {"iu": "integers", "f": "floats", "U": "text"}[kinds]
            raise DataError(
                "an array is not of the right kind",
                where=f"{path}, {name}",
                found=f"{array.dtype}, {array.ndim} dimensions",
                expected=f"{words}, {dimensions} dimensions",
            )
    return arrays


def _check_shapes(path: Path, arrays: dict[str, np.ndarray], lengths: np.ndarray, contexts: np.ndarray) -> None:
    """Raise DataError where the sizes of the arrays contradict each other."""
    sequences = len(lengths)
    if len(contexts) == sequences and ((contexts < 1) | (contexts >= lengths)).any():
        worst = int(np.flatnonzero((contexts < 1) | (contexts >= lengths))[0])
        raise DataError(
            "a sequence has no token to predict, or nothing to predict it from",
            where=f"{path}, sequence {worst}",
            found=f"{lengths[worst]} tokens, {contexts[worst]} of them context",
            expected="at least one token of context and one after it",
        )
    of_rows = ("token_ids", "logprobs", "kept", "gold_logprobs", "gold_ranks", "byte_ends")
    of_sequences = ("context_lengths", "ids", "prompts", "targets")
    expected = dict.fromkeys(of_sequences, (sequences, "one for each sequence"))
    expected["input_ids"] = int(lengths.sum()), "the sum of lengths"
    if len(contexts) == sequences:
        words = "one for each predicted token: the sum of lengths minus context_lengths"
        expected |= dict.fromkeys(of_rows, (int((lengths - contexts).sum()), words))
    for name, (size, words) in expected.items():
        if name in arrays and len(arrays[name]) != size:
            raise DataError(
                "an array has another size than the others need",
                where=f"{path}, {name}",
                found=len(arrays[name]),
                expected=f"{size}, {words}",
            )
    if arrays["token_ids"].shape != arrays["logprobs"].shape:
        raise DataError(
            "token_ids and logprobs differ in shape",
            where=path,
            found=arrays["token_ids"].shape,
            expected=arrays["logprobs"].shape,
        )
    if "kept" in arrays and not ((arrays["kept"] >= 1) & (arrays["kept"] <= arrays["token_ids"].shape[1])).all():
        raise DataError("kept is out of bounds", where=path, expected=f"1..{arrays['token_ids'].shape[1]} in every row")
