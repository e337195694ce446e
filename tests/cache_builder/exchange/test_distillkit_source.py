"""DistillKit's captures are read as they were written; the writer here is a plain twin, one number at a time."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from captures import packed_ids, save_capture

from kd.cache_builder.exchange.distillkit_source import Bin, Codec, decoded_logprobs, unpacked
from kd.cache_builder.exchange.import_cache import import_cache
from kd.cache_builder.exchange.source_formats import CacheSource
from kd.cache_builder.store.readers.reader import CacheReader
from kd.cache_builder.upkeep.verify import verify
from kd.common.errors import DataError
from kd.common.progress import final


@pytest.fixture
def capture(tmp_path: Path, original: Path) -> Callable[..., Path]:
    """`capture(pad=…, **record)`: the small cache as a capture of exact values, with a token more at the end of each sequence."""
    return lambda **record: save_capture(tmp_path / "capture", original, **record)


def test_a_capture_of_exact_values_gives_the_rows_of_the_cache(capture, tmp_path, original, tokenizer_dir) -> None:
    more: dict[str, Any] = {"tokenizer": str(tokenizer_dir), "logprob_codec": "float32", "check_source": False}
    reader = import_cache("distillkit", capture(), out=tmp_path / "c", **more)
    ours, theirs = ([e.targets for e in r.read(range(len(r)))] for r in (reader, CacheReader(original)))
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(a.token_ids, b.token_ids)
        assert a.logprobs is not None
        assert b.logprobs is not None
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-6)  # float32, normalised again
        np.testing.assert_array_equal(a.gold_ids, b.gold_ids)
    assert reader.manifest.gold_in_top_k
    assert final(verify(reader.root)) == ()
    with_record = reader.manifest.identity["teacher"]["imported"]["files"]
    assert len(with_record) == 2


def test_the_padding_token_that_a_capture_adds_is_left_out(capture) -> None:
    plain = list(CacheSource.at("distillkit", capture()).sequences())
    padded = list(CacheSource.at("distillkit", capture(pad=399), pad_id=399).sequences())
    for a, b in zip(plain, padded, strict=True):
        np.testing.assert_array_equal(a.input_ids, b.input_ids)
        np.testing.assert_array_equal(a.token_ids, b.token_ids)
    kept = list(CacheSource.at("distillkit", capture(pad=399)).sequences())
    assert all(len(a.gold_ids) == len(b.gold_ids) + 1 for a, b in zip(kept, plain, strict=True))


def test_a_record_of_another_capture_is_refused(capture) -> None:
    wrong: list[dict[str, Any]] = [
        {"k": 7, "exact_k": 7},
        {"d": 600},
        {"exact_dtype": "bfloat16"},
        {"polynomial_terms": [0, 1]},
    ]
    for change in wrong:
        with pytest.raises(DataError, match="another number of bytes"):
            list(CacheSource.at("distillkit", capture(**change)).sequences())
    wrong = [{"k": 500}, {"exact_dtype": "int8"}, {"polynomial_terms": ["log"]}, {"unheard_of": 1}]
    for change in wrong:
        with pytest.raises(DataError, match="the record of the capture cannot be read"):
            list(CacheSource.at("distillkit", capture(**change)).sequences())
    folder = capture()
    (folder / "compression_config.yaml").unlink()
    with pytest.raises(DataError, match="the record of the capture is missing"):
        list(CacheSource.at("distillkit", folder).sequences())


def test_other_columns_are_refused(capture) -> None:
    folder = capture()
    pq.write_table(pa.table({"input_ids": [[1]], "packed_indices": [[1]]}), folder / "data_0.parquet")
    with pytest.raises(DataError, match="older format"):
        list(CacheSource.at("distillkit", folder).sequences())


@pytest.mark.parametrize("bits", [1, 7, 8, 9, 15, 17, 18])
def test_ids_of_any_width_come_back(bits: int) -> None:
    ids = np.random.default_rng(bits).integers(0, 2**bits, (5, 11))
    packed = np.array([packed_ids(row, bits) for row in ids.tolist()], dtype=np.uint8)
    np.testing.assert_array_equal(unpacked(packed, bits, 11), ids)


def test_every_part_of_a_row_by_hand() -> None:
    """Two values in bfloat16, a polynomial over three ranks, and residuals of 3 bits and of 1 bit."""
    codec = Codec(
        100,
        5,
        2,
        "bfloat16",
        (0, 1, "sqrt"),
        "float32",
        (Bin("float16", 3, 2), Bin("float32", 1, 1)),
        delta_encoding=False,
    )
    data = struct.pack("<f", -0.5)[2:] + struct.pack("<f", -2.0)[2:]  # the upper half of a float32
    data += struct.pack("<3f", -3.0, -0.25, 0.5)
    data += struct.pack("<e", 0.125) + bytes([int("00111000", 2)])  # steps 1 - 4 and 6 - 4
    data += struct.pack("<f", 0.0625) + bytes([int("10000000", 2)])
    assert codec.row_bytes == (5, len(data)) == (5, 4 + 12 + 3 + 5)
    (found,) = decoded_logprobs(np.frombuffer(data, dtype=np.uint8)[None], codec)
    expected = [
        -0.5,
        -2.0,
        -3.0 - 3 * 0.125,
        -3.0 - 0.25 + 0.5 + 2 * 0.125,
        -3.0 - 0.5 + 0.5 * 2**0.5 + 0.0625,
    ]
    np.testing.assert_allclose(found, expected, atol=1e-12)


def test_differences_are_summed_and_ranks_may_run_from_0_to_1() -> None:
    codec = Codec(16, 4, 1, "float32", (1,), "float64", delta_encoding=True, normalize_t=True)
    data = np.frombuffer(struct.pack("<fd", -1.0, -2.0), dtype=np.uint8)[None]
    np.testing.assert_allclose(decoded_logprobs(data, codec)[0], [-1.0, -1.0, -2.0, -4.0])
