"""The store is plain Zarr v3 and Parquet; what was committed is what is read, or an error says where it is not."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from kd.cache_builder.store import shard_store
from kd.cache_builder.store.cache_files import LocalFiles
from kd.cache_builder.store.chunks import decode_shard
from kd.cache_builder.store.encoding.arrays import ArraySpec
from kd.cache_builder.store.encoding.codecs import array_specs
from kd.cache_builder.store.encoding.logprob_codecs import CODECS
from kd.cache_builder.store.example_table import EXAMPLE_SCHEMA
from kd.cache_builder.store.readers.reader import CacheReader
from kd.cache_builder.store.records import commits
from kd.cache_builder.store.records.manifest import Layout, load_manifest
from kd.cache_builder.store.targets import TargetConfig
from kd.cache_builder.store.vocabulary import code_table, codes_by_count, pack_rows, tokens_digest, unpack_rows
from kd.cache_builder.store.writers import shard_writer, staged_files
from kd.common.errors import CacheDamageError, CacheError
from kd.common.files import canonical_json, digest_of


def read_everything(root: Path) -> None:
    """What a trainer touches: every shard, every example, the vocabulary."""
    reader = CacheReader(root)
    for example in range(len(reader)):
        reader[example]
    reader.lengths()
    reader.vocabulary()


@pytest.fixture
def copy(cache: Path, tmp_path: Path) -> Path:
    shutil.copytree(cache, tmp_path / "copy")
    return tmp_path / "copy"


def all_files(root: Path) -> list[Path]:
    return sorted(p for p in root.rglob("*") if p.is_file())


def test_the_store_is_plain_zarr_of_registered_codecs(cache: Path):
    group: Any = zarr.open_group(cache / "targets.zarr", mode="r")
    assert {name for name, _ in group.arrays()} == {spec.name for spec in load_manifest(cache).arrays}
    for path in cache.rglob("zarr.json"):
        document = json.loads(path.read_text())
        assert document["zarr_format"] == 3
        names = [c["name"] for c in document.get("codecs", [])]
        if names:
            assert names == ["sharding_indexed"]
            inner = document["codecs"][0]["configuration"]
            order = ["transpose"] if path.parent.name in ("tail_odds", "logprobs", "sample_counts") else []
            assert [c["name"] for c in inner["codecs"]] == [*order, "bytes", "blosc", "crc32c"]
            assert inner["index_codecs"][-1]["name"] == "crc32c"


def test_metadata_carries_no_indentation_and_tables_no_second_copy_of_their_texts(cache: Path):
    """A scale of thousands of numbers, and the longest texts, would stand there again: 1 B per token of a small cache."""
    assert not any("\n" in path.read_text() for path in cache.rglob("zarr.json"))
    for path in cache.rglob("*.parquet"):
        group = pq.read_metadata(path).row_group(0)
        assert not any(group.column(i).is_stats_set for i in range(group.num_columns)), path.name


def test_attributes_say_how_to_decode_without_this_code(tmp_path: Path, build_request, run_build):
    cache = tmp_path / "cache"
    run_build(build_request(cache, logprob_codec="linear8"))
    group: Any = zarr.open_group(cache / "targets.zarr", mode="r")
    assert group.attrs["kd_fingerprint"] == load_manifest(cache).fingerprint
    assert "logprob_span / 255" in group["logprobs"].attrs["decode"]
    assert group["tail_odds"].attrs["temperatures"] == [1.0, 2.0, 4.0]
    assert "log(1 + exp(tail_odds))" in group["tail_odds"].attrs["decode"]
    reader = CacheReader(cache)
    row = reader.manifest.layout.shard_rows  # the first row of the second shard
    relative = -group["logprobs"][row].astype(np.float32) * np.float32(group["logprob_span"][row]) / 255
    odds = float(group["tail_odds"][row, 0])
    decoded = relative - np.log(np.exp(relative).sum()) - np.log(1 + np.exp(odds))
    targets = reader[int(reader.manifest.shards[1][0])].targets
    np.testing.assert_allclose(decoded, targets.logprobs[0], atol=1e-5)  # float32 products
    table = pq.read_table(cache / "vocabulary.parquet").to_pydict()
    id_of = dict(zip(table["code"], table["id"], strict=True))
    for name in ("gold_ids", "token_ids"):
        assert "`code` in vocabulary.parquet" in group[name].attrs["decode"]
    assert [id_of[c] for c in group["token_ids"][row].tolist()] == targets.token_ids[0].tolist()
    stop = row + len(targets)
    assert [id_of[c] for c in group["gold_ids"][row:stop].tolist()] == targets.gold_ids.tolist()
    assert np.cumsum(group["byte_length"][row:stop]).tolist() == targets.byte_end.tolist()


def test_a_graded_scale_is_all_a_stranger_needs(cache: Path):
    logprobs = zarr.open_group(cache / "targets.zarr", mode="r")["logprobs"]
    scale = np.array(logprobs.attrs["scale"])
    manifest = load_manifest(cache)
    shard = shard_store.read_shard(LocalFiles(cache), manifest, 0)
    places = logprobs[: len(shard.arrays["gold_ids"])].astype(int).cumsum(axis=1)
    found = CODECS[manifest.targets.logprob_codec].decode(shard.arrays)
    np.testing.assert_array_equal(-scale[places].astype(np.float32), found)


def test_verified_bytes_decode_to_what_zarr_reads(cache: Path, tmp_path: Path, build_request, run_build):
    """The slow twin of `decode_shard` is zarr-python, for every dtype, one and two columns, short and long shards."""
    full = tmp_path / "full"
    run_build(build_request(full, profile="full", samples=3, tail_bands=2))
    for root in (cache, full):
        manifest = load_manifest(root)
        for index, (_, _, rows) in enumerate(manifest.shards):
            for spec in manifest.arrays:
                data = (root / commits.shard_files([spec], index)[spec.name]).read_bytes()
                start = index * manifest.layout.shard_rows
                slow = np.asarray(zarr.open_array(root / "targets.zarr" / spec.name, mode="r")[start : start + rows])
                fast = decode_shard(data, spec, manifest.layout, rows)
                assert fast.dtype == slow.dtype
                np.testing.assert_array_equal(fast, slow, err_msg=spec.name)


def test_a_chunk_that_was_never_written_is_zeros_and_one_of_another_size_an_error(tmp_path: Path):
    spec, layout = ArraySpec("x", "uint32", 3, {}, by_column=True), Layout(32, 8)
    staged_files.create_group(tmp_path / "z", [spec], layout, 1, {})
    zarr.open_group(tmp_path / "z", mode="r+")["x"][8:16] = np.arange(24).reshape(8, 3)
    data = (tmp_path / "z/x/c/0/0").read_bytes()
    expected = np.zeros((20, 3))
    expected[8:16] = np.arange(24).reshape(8, 3)
    np.testing.assert_array_equal(decode_shard(data, spec, layout, 20), expected)
    for other in (Layout(32, 16), Layout(32, 4)):
        with pytest.raises(CacheError, match=r"does not match the layout|points outside"):
            decode_shard(data[:-68] + data[-68:][: 16 * (32 // other.chunk_rows)] * 2, spec, other, 20)
    with pytest.raises(CacheError, match="cut off"):
        decode_shard(data[-40:], spec, layout, 20)


@given(seed=st.integers(0, 2**32), size=st.integers(1, 300), examples=st.integers(1, 9))
@settings(max_examples=50)
def test_packing_loses_nothing_for_any_permutation_and_any_examples(seed: int, size: int, examples: int):
    rng = np.random.default_rng(seed)
    specs = array_specs(TargetConfig.of_profile("full", samples=2), size)
    starts = np.cumsum([0, *rng.integers(1, 20, examples)])
    n, starts = int(starts[-1]), starts[:-1]
    stored = {
        "gold_ids": rng.integers(0, size, n),
        "token_ids": rng.integers(0, size, (n, 4)),
        "sample_ids": rng.integers(0, size, (n, 2)),
        "byte_end": rng.integers(0, 2**32, n),
        "gold_rank": rng.integers(0, size, n),
    }
    ids = rng.permutation(size)
    packed = pack_rows(stored, specs, starts, np.argsort(ids))
    dtypes = {s.name: s.dtype for s in specs}
    packed = {name: value.astype(dtypes[name]) for name, value in packed.items()}
    assert "byte_end" not in packed
    unpacked = unpack_rows(packed, [s for s in specs if s.name in packed], starts, ids)
    assert unpacked.keys() == stored.keys()
    for name, value in stored.items():
        np.testing.assert_array_equal(unpacked[name], value, err_msg=name)
    for first, stop in zip(starts, [*starts[1:], n], strict=True):  # the slow twin, an example at a time
        np.testing.assert_array_equal(
            np.cumsum(packed["byte_length"][first:stop], dtype=np.uint32), stored["byte_end"][first:stop]
        )


@given(st.lists(st.lists(st.integers(0, 30), max_size=30), max_size=6))
def test_codes_are_places_by_count_then_by_id(sequences: list[list[int]]):
    found = codes_by_count(31, [np.array(s, dtype=np.int32) for s in sequences])
    counts = Counter(i for s in sequences for i in s)
    assert sorted(range(31), key=lambda i: (-counts[i], i)) == np.argsort(found).tolist()
    parts = [np.array(s, dtype=np.int32) for s in reversed(sequences)]
    assert (codes_by_count(31, parts) == found).all()


def test_the_code_column_is_a_permutation_by_the_corpus_tokens(cache: Path):
    reader = CacheReader(cache)
    counts = Counter(i for n in range(len(reader)) for i in reader[n].input_ids.tolist())
    table = pq.read_table(cache / "vocabulary.parquet").to_pydict()
    assert table["id"] == list(range(400))
    assert table["piece"] == reader.vocabulary()
    order = sorted(range(400), key=lambda i: (-counts[i], i))
    assert [order[c] for c in table["code"]] == list(range(400))


def test_a_vocabulary_whose_codes_are_no_permutation_is_damage(copy: Path):
    table = pq.read_table(copy / "vocabulary.parquet")
    codes = table["code"].to_pylist()
    pq.write_table(
        table.set_column(2, "code", pa.array([codes[1], *codes[1:]], pa.int32())), copy / "vocabulary.parquet"
    )
    manifest = load_manifest(copy)
    files = manifest.files | {"vocabulary.parquet": commits.file_entry(copy / "vocabulary.parquet")}
    with pytest.raises(CacheDamageError, match="not a permutation"):
        code_table(LocalFiles(copy), dataclasses.replace(manifest, files=files))


def test_examples_are_plain_parquet_with_their_rows(cache: Path):
    manifest = load_manifest(cache)
    for index, (first, stop, rows) in enumerate(manifest.shards):
        table = pq.read_table(cache / "examples" / f"{index:05d}.parquet")
        assert table.schema.names == EXAMPLE_SCHEMA.names
        assert len(table) == stop - first
        assert sum(table["rows"].to_pylist()) == rows


def test_a_commit_lists_size_and_digest_of_each_file(cache: Path):
    manifest = load_manifest(cache)
    record = commits.read_commit(cache, manifest, 0)
    assert set(record.files) == set(commits.shard_files(manifest.arrays, 0).values())
    assert record.bytes == sum((cache / name).stat().st_size for name in record.files)
    for name, entry in record.files.items():
        assert entry == commits.file_entry(cache / name)


def test_every_file_is_accounted_for(cache: Path):
    manifest = load_manifest(cache)
    known = {"manifest.json", *manifest.files}
    for index in range(len(manifest.shards)):
        known |= {f"commits/{index:05d}.json", *commits.read_commit(cache, manifest, index).files}
    assert {p.relative_to(cache).as_posix() for p in all_files(cache)} == known


def test_quality_sums_add_up_over_shards(cache: Path):
    manifest = load_manifest(cache)
    records = [commits.read_commit(cache, manifest, i) for i in range(len(manifest.shards))]
    assert manifest.quality["rows"] == manifest.rows
    for name, value in manifest.quality.items():
        assert value == pytest.approx(sum(r.quality[name] for r in records))


def test_a_row_digest_sees_every_token_and_the_border():
    a, b = np.array([1, 2, 3]), np.array([4, 5])
    digest = tokens_digest(a, b)
    assert len(digest) == 16
    assert digest == tokens_digest(a.astype(np.int64), b.astype(np.uint16))
    others = [(a[::-1], b), (a, b[::-1]), (a[:2], np.array([3, 4, 5])), (a, np.array([4, 6])), (np.array([1, 2, 4]), b)]
    assert all(tokens_digest(*o) != digest for o in others)


def test_a_shard_of_zeros_is_written_and_read_back(copy: Path):
    """zarr leaves out chunks of zeros by default, and again whenever a group is reopened; a shard may well be all zero:
    in a short one every gold token may rank first."""
    manifest = load_manifest(copy)
    last = len(manifest.shards) - 1
    first, stop, rows = manifest.shards[last]
    before = shard_store.read_shard(LocalFiles(copy), manifest, last).arrays
    zeros = {name: np.zeros_like(values) for name, values in before.items()}
    assert {len(values) for values in zeros.values()} == {rows}
    table = pq.read_table(copy / "examples" / f"{last:05d}.parquet").to_pylist()
    commits.commit_path(copy, last).unlink()
    writer = shard_writer.ShardWriter(copy, manifest.reopened())
    assert writer.write(last, zeros, table, {})
    writer.close()
    record = commits.read_commit(copy, writer.manifest, last)
    assert all(entry["bytes"] > 0 for entry in record.files.values())
    shard = shard_store.read_shard(LocalFiles(copy), writer.manifest, last)
    assert (shard.first_example, len(shard.examples["id"])) == (first, stop - first)
    assert all((values == 0).all() and len(values) == rows for values in shard.arrays.values())


def test_large_chunks_compress_to_the_same_bytes_each_time(tmp_path: Path):
    """blosc may order the blocks of a chunk by which thread finishes first; resuming needs equal bytes."""
    spec = ArraySpec("x", "uint32", 64, {})
    values = np.random.default_rng(0).integers(0, 50_000, (16_384, 64)).astype(np.uint32)  # 4 MB in one chunk
    seen = set()
    for attempt in range(3):
        folder = tmp_path / str(attempt)
        staged_files.create_group(folder, [spec], Layout(16_384, 16_384), 1, {})
        zarr.open_group(folder, mode="r+")["x"][:] = values
        seen.add((folder / "x" / "c" / "0" / "0").read_bytes())
    assert len(seen) == 1


# damage


def flip(path: Path, place: float) -> None:
    data = bytearray(path.read_bytes())
    data[int(place * (len(data) - 1))] ^= 0x10
    path.write_bytes(bytes(data))


def damages(root: Path):
    """`(file, what was done)`, every file and every kind in turn; the file is put back afterwards."""
    for path in all_files(root):
        whole = path.read_bytes()
        for name, harm in {
            "flip first": lambda p: flip(p, 0.0),
            "flip middle": lambda p: flip(p, 0.5),
            "flip last": lambda p: flip(p, 1.0),
            "truncate": lambda p: p.write_bytes(p.read_bytes()[:-1]),
            "empty": lambda p: p.write_bytes(b""),
            "remove": lambda p: p.unlink(),
            "append": lambda p: p.write_bytes(p.read_bytes() + b"\0"),
        }.items():
            harm(path)
            yield path.relative_to(root).as_posix(), name
            path.write_bytes(whole)


def test_every_damage_of_every_file_is_an_error_and_never_a_value(tmp_path: Path, build_request, run_build):
    root = tmp_path / "c"
    run_build(build_request(root, layout=Layout(256, 128)))
    assert len(load_manifest(root).shards) == 2
    unnoticed, codes = [], set()
    count = 0
    for file, name in damages(root):
        count += 1
        try:
            read_everything(root)
        except CacheDamageError as error:
            codes.add(error.exit_code)
        else:
            unnoticed.append((file, name))
    assert count == 7 * (2 * (7 + 1 + 1) + 8 + 5)  # arrays, examples and commit per shard; metadata; five more
    assert codes == {3}
    assert unnoticed == []
    read_everything(root)


def test_two_shard_files_that_were_swapped_are_noticed(copy: Path):
    manifest = load_manifest(copy)
    a, b = commits.shard_files(manifest.arrays, 0), commits.shard_files(manifest.arrays, 1)
    for name in a:
        first, second = (copy / a[name]).read_bytes(), (copy / b[name]).read_bytes()
        assert first != second, name
        (copy / a[name]).write_bytes(second)
        (copy / b[name]).write_bytes(first)
        with pytest.raises(CacheDamageError, match=r"another size|was changed") as caught:
            read_everything(copy)
        assert caught.value.details["array"] == name
        (copy / a[name]).write_bytes(first)
        (copy / b[name]).write_bytes(second)


def test_two_whole_shards_that_were_swapped_with_their_commits_are_noticed(copy: Path):
    manifest = load_manifest(copy)
    a, b = ({**commits.shard_files(manifest.arrays, i), "commit": f"commits/{i:05d}.json"} for i in (0, 1))
    for name in a:
        first, second = (copy / a[name]).read_bytes(), (copy / b[name]).read_bytes()
        (copy / a[name]).write_bytes(second)
        (copy / b[name]).write_bytes(first)
    with pytest.raises(CacheDamageError, match="does not belong to this shard"):
        read_everything(copy)


def test_a_commit_rewritten_to_fit_damaged_bytes_is_noticed(copy: Path):
    name = "targets.zarr/tail_odds/c.0.0"
    flip(copy / name, 0.5)
    path = copy / "commits" / "00000.json"
    document = json.loads(path.read_text())
    document["files"][name] = commits.file_entry(copy / name)
    content = {k: v for k, v in document.items() if k != "checksum"}
    path.write_text(canonical_json(content | {"checksum": digest_of(content)}))
    with pytest.raises(CacheDamageError, match="changed after the cache was finished"):
        read_everything(copy)


def test_damage_names_shard_array_and_file(copy: Path):
    flip(copy / "targets.zarr/token_ids/c.1.0", 0.5)
    manifest = load_manifest(copy)
    shard_store.read_shard(LocalFiles(copy), manifest, 0)
    shard_store.read_shard(LocalFiles(copy), manifest, 1, ["tail_odds"])  # only what is asked for is read, and checked
    with pytest.raises(CacheDamageError) as caught:
        shard_store.read_shard(LocalFiles(copy), manifest, 1)
    assert (caught.value.details["shard"], caught.value.details["array"]) == (1, "token_ids")
    assert str(caught.value.details["file"]).endswith("targets.zarr/token_ids/c.1.0")


def test_a_file_replaced_by_a_folder_is_damage(copy: Path):
    path = copy / "targets.zarr/tail_odds/c.0.0"
    path.unlink()
    path.mkdir()
    with pytest.raises(CacheDamageError):
        read_everything(copy)
