"""A compressed file is the text that was compressed, or an error: no cut is silent."""

from __future__ import annotations

import gzip
from pathlib import Path, PurePath

import pyarrow as pa
import pytest

from kd.data.rows.compressed import UNREADABLE, file_type, open_text, plain_name

TEXT = "".join(f"line {n} é\n" for n in range(40))
COMPRESS = {".gz": gzip.compress, ".ZST": lambda data: pa.compress(data, codec="zstd", asbytes=True)}


@pytest.mark.parametrize(
    ("name", "kind", "plain"),
    [
        ("a.jsonl", ".jsonl", "a"),
        ("A.CSV.GZ", ".csv", "A"),
        ("train-0.5.parquet.zst", ".parquet", "train-0.5"),
        ("a.gz", "", "a"),
        ("a", "", "a"),
        (".gz", "", ".gz"),
        ("a.jsonl.bz2", ".bz2", "a.jsonl"),
    ],
)
def test_the_type_is_the_suffix_below_the_compression(name: str, kind: str, plain: str) -> None:
    assert (file_type(PurePath(name)), plain_name(PurePath(name))) == (kind, plain)


@pytest.mark.parametrize("suffix", COMPRESS)
def test_a_compressed_text_is_the_text(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"a.txt{suffix}"
    whole = COMPRESS[suffix](TEXT.encode())
    for data, text in ((whole, TEXT), (whole + whole, TEXT + TEXT), (COMPRESS[suffix](b""), "")):
        file.write_bytes(data)
        with open_text(file) as opened:
            assert opened.read() == text


@pytest.mark.parametrize("suffix", COMPRESS)
def test_no_cut_is_silent(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"a.txt{suffix}"
    whole = COMPRESS[suffix](TEXT.encode())
    for before in (b"", whole):
        for length in range(1, len(whole)):
            file.write_bytes(before + whole[:length])
            with pytest.raises(UNREADABLE), open_text(file) as opened:
                opened.read()
    file.write_bytes(whole + b"something else")
    with pytest.raises(UNREADABLE), open_text(file) as opened:
        opened.read()
