"""An object of a store reads as the file that it is a copy of: by line, by seeking, compressed, cut off, and replaced."""

from __future__ import annotations

import gzip
import io
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import s3fs
from servers import Answer

from kd.common.errors import DataError
from kd.data.left_out import LeftOut
from kd.data.object_texts.s3_files import FIRST_BYTES, MOST_BYTES, S3File
from kd.data.rows.compressed import open_bytes
from kd.data.rows.file_list import list_files
from kd.data.sources import load_corpus, stream_text

LINES = [f'{{"text": "line {n} {"x" * (n % 700)}"}}' for n in range(3000)]


def put(name: str, data: bytes) -> S3File:
    s3fs.S3FileSystem(skip_instance_cache=True).pipe(f"shared/{name}", data)
    files = list_files(f"s3://shared/{name}", (".bin",), LeftOut())
    assert files is not None
    (file,) = files.files
    assert isinstance(file, S3File)
    return file


def test_any_seek_and_read_gives_the_bytes_of_the_file(s3) -> None:
    draw = random.Random(0)
    data = draw.randbytes(3 * FIRST_BYTES + 17)
    opened, twin = put("a.bin", data).open(), io.BytesIO(data)
    for _ in range(200):
        where, whence = draw.choice([(draw.randrange(len(data) + 9), 0), (draw.randrange(-99, 99), 1), (-8, 2), (0, 1)])
        if whence != 1 or twin.tell() + where >= 0:
            assert opened.seek(where, whence) == twin.seek(where, whence)
        size = draw.choice([1, 8, 1000, FIRST_BYTES + 1])
        assert opened.read(size) == twin.read(size)
    opened.seek(0)
    assert opened.read() == data


def test_a_file_is_read_in_growing_pieces_and_its_beginning_once(s3) -> None:
    """200 KiB take three requests and not one for each line; what looks at the beginning alone fetches no more of it."""
    put("a.jsonl", "\n".join(LINES).encode())
    s3.log.clear()
    text = stream_text("s3://shared/a.jsonl")
    assert [part for method, _, part in s3.log if method == "GET"] == [f"bytes=0-{FIRST_BYTES - 1}"]
    s3.log.clear()
    assert [e.target for e in text.reading(LeftOut())] == [line[10:-2] for line in LINES]
    assert 2 <= len(s3.gets("a.jsonl")) <= 5
    assert MOST_BYTES % FIRST_BYTES == 0


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_compressed_objects_are_read(s3, suffix: str) -> None:
    plain = "\n".join(LINES).encode()
    data = gzip.compress(plain) if suffix == ".gz" else pa.Codec("zstd").compress(plain, asbytes=True)
    with open_bytes(put(f"a.jsonl{suffix}", data)) as opened:
        assert opened.read() == plain
    assert len(load_corpus(f"s3://shared/a.jsonl{suffix}").examples) == len(LINES)


def test_parquet_is_read_by_ranges(s3, tmp_path: Path) -> None:
    words = ["".join(random.Random(n).choices("abcdefgh ", k=900)) for n in range(2000)]
    pq.write_table(pa.table({"text": words}), tmp_path / "t.parquet", row_group_size=500, compression="none")
    data = (tmp_path / "t.parquet").read_bytes()
    put("t.parquet", data)
    s3.log.clear()
    text = stream_text("s3://shared/t.parquet")
    first = sum(
        int(b) - int(a) + 1 for _, _, part in s3.log if part for a, b in [part.removeprefix("bytes=").split("-")]
    )
    assert first < len(data) / 4, "the columns are in the footer"
    assert [e.target for e in text.reading(LeftOut())] == words


def test_an_object_that_is_cut_off_on_the_way_is_asked_for_again(s3) -> None:
    file = put("a.bin", bytes(1000))

    def cut(path: str, before: int, answer: Answer) -> None:
        if answer.status == 206 and cuts:
            answer.cut = cuts.pop()

    cuts = [500, 0]
    s3.fault = cut
    assert file.open().read() == bytes(1000)
    assert not cuts


def test_an_object_that_is_replaced_while_it_is_read_is_an_error(s3) -> None:
    put("a.jsonl", "\n".join(LINES).encode())
    text = stream_text("s3://shared/a.jsonl")
    rows = text.reading(LeftOut())
    next(rows)
    put("a.jsonl", "\n".join(LINES).replace("line", "LINE").encode())
    with pytest.raises(DataError, match="replaced while it was read"):
        list(rows)


def test_a_broken_object_is_an_error_that_names_its_address(s3) -> None:
    put("a.jsonl.gz", gzip.compress("\n".join(LINES).encode())[:-9])
    with pytest.raises(DataError, match="cannot read the file") as caught:
        load_corpus("s3://shared/a.jsonl.gz")
    assert caught.value.details["where"] == "s3://shared/a.jsonl.gz"
    put("b.jsonl", b"")
    with pytest.raises(DataError, match="the file is empty"):
        load_corpus("s3://shared/b.jsonl")


def test_an_object_that_is_removed_while_it_is_read_is_an_error(s3) -> None:
    put("a.jsonl", "\n".join(LINES).encode())
    rows = stream_text("s3://shared/a.jsonl").reading(LeftOut())
    next(rows)
    s3fs.S3FileSystem(skip_instance_cache=True).rm("shared/a.jsonl")
    with pytest.raises(DataError, match="cannot read the file"):
        list(rows)
