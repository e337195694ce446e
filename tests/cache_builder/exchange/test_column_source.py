"""JSONL and Parquet: every way to spell an entry gives the rows of the cache that was exported."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from kd.cache_builder.exchange.export_cache import export_cache
from kd.cache_builder.exchange.import_cache import import_cache
from kd.cache_builder.exchange.source_formats import CacheSource
from kd.cache_builder.store.readers.reader import CacheReader
from kd.common.errors import DataError

Row = dict[str, Any]


@pytest.fixture
def rows(original: Path, tmp_path: Path) -> list[Row]:
    """The cache as an export to Parquet has it."""
    export_cache("parquet", original, out=tmp_path / "exported")
    return [row for path in sorted((tmp_path / "exported").iterdir()) for row in pq.read_table(path).to_pylist()]


@pytest.fixture
def write(tmp_path: Path) -> Callable[[list[Row]], Path]:
    def written(rows: list[Row]) -> Path:
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    return written


def rows_of(reader: CacheReader) -> dict[str, np.ndarray]:
    targets = [e.targets for e in reader.read(range(len(reader)))]
    names = ("gold_ids", "token_ids", "logprobs", "gold_logprob", "byte_end")
    return {name: np.concatenate([getattr(t, name) for t in targets]) for name in names}


def assert_rows(reader: CacheReader, original: Path) -> None:
    ours, theirs = rows_of(reader), rows_of(CacheReader(original))
    for name in ours:  # float32 numbers, normalised again; of the token that is there, a cache has float16
        atol = {"logprobs": 1e-6, "gold_logprob": 4e-3}.get(name, 0)
        np.testing.assert_allclose(ours[name], theirs[name], rtol=0, atol=atol, err_msg=name)


def as_vllm(row: Row) -> Row:
    """As vLLM's server answers: nothing for the first token, and the token that is there beside the k if it is none of them."""
    entries: list[Any] = [None] * (len(row["input_ids"]) - len(row["logprobs"]))
    for r, (ids, values) in enumerate(zip(row["target_token_ids"], row["logprobs"], strict=True)):
        entry = {str(i): {"logprob": v, "rank": n + 1} for n, (i, v) in enumerate(zip(ids, values, strict=True))}
        gold = row["input_ids"][len(entries)]
        entry.setdefault(str(gold), {"logprob": row["gold_logprobs"][r], "rank": row["gold_ranks"][r] + 1})
        entries.append(entry)
    return {"id": row["id"], "prompt_token_ids": row["input_ids"], "prompt_logprobs": entries}


def as_axolotl(row: Row) -> Row:
    """Rows of named entries, as axolotl's first format has them; of the tokens beyond the k nothing is known."""
    entries = [
        [{"token": f"token_id:{i}", "logprob": v} for i, v in zip(ids, values, strict=True)]
        for ids, values in zip(row["target_token_ids"], row["logprobs"], strict=True)
    ]
    return {"input_ids": row["input_ids"], "logprobs": entries, "gold_logprobs": row["gold_logprobs"]}


def plain(row: Row) -> Row:
    return {name: row[name] for name in ("input_ids", "target_token_ids", "logprobs", "gold_logprobs")}


@pytest.mark.parametrize("spelled", [as_vllm, as_axolotl, plain])
def test_every_spelling_of_an_entry_gives_the_same_rows(
    spelled, rows, write, tmp_path, original, tokenizer_dir
) -> None:
    source = write([spelled(row) for row in rows])
    more: dict[str, Any] = {"tokenizer": str(tokenizer_dir), "logprob_codec": "float32"}
    reader = import_cache("jsonl", source, out=tmp_path / "c", **more)
    assert_rows(reader, original)
    assert not reader.manifest.gold_in_top_k


def test_an_export_to_parquet_comes_back(rows, tmp_path, original, tokenizer_dir) -> None:
    more: dict[str, Any] = {"tokenizer": str(tokenizer_dir), "logprob_codec": "float32"}
    reader = import_cache("parquet", tmp_path / "exported", out=tmp_path / "c", **more)
    assert_rows(reader, original)
    for a, b in zip(reader.read(range(len(reader))), CacheReader(original).read(range(len(reader))), strict=True):
        assert (a.id, a.prompt, a.target) == (b.id, b.prompt, b.target)
        assert a.targets.gold_rank.tolist() == b.targets.gold_rank.tolist()


def test_entries_belong_to_the_last_tokens(write) -> None:
    entry = {"5": -0.1, "6": {"logprob": -3.0}}
    (short,) = CacheSource.at("jsonl", write([{"input_ids": [1, 2, 3, 5], "logprobs": [entry]}])).sequences()
    assert (short.context, short.gold_ids.tolist()) == (3, [5])
    whole = {"input_ids": [1, 2, 3, 5], "logprobs": [None, None, entry, entry]}
    (long,) = CacheSource.at("jsonl", write([whole])).sequences()
    assert (long.context, long.gold_ids.tolist()) == (2, [3, 5])


@pytest.mark.parametrize(
    ("row", "found"),
    [
        ({"input_ids": [1, 2], "logprobs": [{"1": -0.1}, {"2": -0.1}]}, "the first token, which nothing predicts"),
        ({"input_ids": [1, 2], "logprobs": [None, {"2": -0.1}, {"2": -0.1}]}, "3 entries for 2 tokens"),
        ({"input_ids": [1, 2, 3, 4], "logprobs": [{"2": -0.1}, None, {"2": -0.1}]}, "an empty entry between others"),
        ({"input_ids": [1, 2], "logprobs": [[-0.1]]}, "1 log-probabilities beside 0 ids"),
        ({"input_ids": [1, 2], "logprobs": [[-0.1]], "target_token_ids": [[1], [2]]}, "2 lists of ids beside 1"),
        ({"input_ids": [1, 2], "logprobs": [[{"token": " the", "logprob": -0.1}]]}, "named by its text"),
        ({"input_ids": [1, 2], "logprobs": [None, None]}, "no entry"),
        ({"input_ids": [1, 2], "logprobs": [{"2": -0.1}], "gold_logprobs": []}, "0 gold_logprobs for 1 entries"),
        ({"tokens": [1, 2]}, "no column input_ids or prompt_token_ids; there are tokens"),
        ([1, 2], "list, where an object is wanted"),
    ],
)
def test_what_is_wrong_with_a_row_is_said(row, found, write) -> None:
    with pytest.raises(DataError) as raised:
        list(CacheSource.at("jsonl", write([row])).sequences())
    assert found in str(raised.value)
    assert "line 1" in str(raised.value)


def test_what_is_no_file_of_the_format_is_refused(tmp_path: Path) -> None:
    for name, headline in (("a.jsonl", "a line is not JSON"), ("a.parquet", "a file cannot be read as Parquet")):
        (tmp_path / name).write_text("{no", encoding="utf-8")
        with pytest.raises(DataError, match=headline):
            list(CacheSource.at(name[2:], tmp_path / name).sequences())
