"""A cache from a stranger, every digest of it right: an error in words, within bounded memory, and nothing outside its folder.

Each is opened, read, verified and summarised in a child process that may not allocate much.
"""

from __future__ import annotations

import base64
import faulthandler
import json
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from crashing import child
from hostile import change_file, change_manifest, sign_commit, sign_manifest, use_everything
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kd.cache_builder.store.encoding.parquet import footer_sizes
from kd.cache_builder.store.readers.reader import CacheReader
from kd.cache_builder.store.records.commits import file_entry
from kd.cache_builder.upkeep.verify import verify
from kd.common.files import canonical_json
from kd.common.progress import final

MEMORY = 3 * 2**29
"""Bytes a child may allocate beyond what it has: a whole text column of 1 GB is allowed, its copies are not."""


def bounded(root: Path, seconds: float = 60.0) -> tuple[int, str]:
    """Use everything of a cache in a child: its exit code and error."""

    def action() -> None:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
        resource.setrlimit(resource.RLIMIT_CPU, (int(time.process_time() + seconds) + 1,) * 2)
        use_everything(root)

    return child(action)


@pytest.fixture
def copy(tmp_path: Path, cache: Path) -> Path:
    shutil.copytree(cache, tmp_path / "c")
    return tmp_path / "c"


def refused(root: Path, *words: str) -> None:
    code, text = bounded(root)
    assert code in (1, 3), (code, text)
    assert any(word in text for word in words), text


def test_signed_again_a_cache_is_as_good_as_before(copy: Path):
    change_manifest(copy, lambda d: d["provenance"].update(teacher="somebody else's"))
    sign_commit(copy, json.loads((copy / "commits/00000.json").read_text()))
    assert bounded(copy) == (0, "")


NAMES = (
    "../outside",
    "/etc/passwd",
    "a/../../outside",
    "targets.zarr/./x",
    "a\\..\\b",
    "a//b",
    "x\0y",
    "",
    "..",
    "~/x/..",
)


@pytest.mark.parametrize("name", NAMES)
def test_names_that_leave_the_folder(copy: Path, name: str):
    (copy.parent / "outside").write_text("not yours")
    change_manifest(copy, lambda d: d["files"].update({name: {"bytes": 9, "sha256": "0" * 64}}))
    refused(copy, "leaves the cache's directory")


@pytest.mark.parametrize("name", NAMES)
def test_names_in_a_commit_that_leave_the_folder(copy: Path, name: str):
    document = json.loads((copy / "commits/00000.json").read_text())
    document["files"][name] = {"bytes": 9, "sha256": "0" * 64}
    sign_commit(copy, document)
    refused(copy, "leaves the cache's directory", "does not belong to this shard")


def put(*path: Any, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(document: dict[str, Any]) -> None:
        for key in path[:-1]:
            document = document[key]
        document[path[-1]] = value

    return change


@pytest.mark.parametrize(
    "change",
    [
        put("layout", "shard_rows", value=2**40),
        put("layout", "chunk_rows", value=0),
        put("layout", "chunk_rows", value=2**40),
        put("layout", "shard_rows", value=-1),
        put("layout", "shard_rows", value=True),
        put("layout", "shard_rows", value=1e9),
        put("layout", value=[]),
        put("rows", value=2**63),
        put("examples", value=10**400),
        put("examples", value=-1),
        put("shards", value=[[0, 2**40, 1]]),
        put("shards", value=0),
        put("shards", value=2**40),
        put("shards", value={}),
        put("bytes", value={}),
        put("bytes", value=7),
        put("bytes", "examples", value=1),
        put("files", "shards.parquet", "bytes", value=2**33),
        put("files", "commits.parquet", "bytes", value=2**33),
        put("files", "lengths/00000.parquet", "bytes", value=2**33),
        put("identity", "teacher", "vocabulary_size", value=10**30),
        put("identity", "teacher", "vocabulary_size", value=0),
        put("identity", "teacher", value=None),
        put("identity", "targets", "top_k", value=10**30),
        put("identity", "targets", "top_k", value="8"),
        put("identity", "targets", "samples", value=2**40),
        put("identity", "targets", "tail_bands", value=2**31),
        put("identity", "targets", "temperatures", value=[1.0] * 10**5),
        put("identity", "targets", "temperatures", value=[1e-300, 1.0]),
        put("identity", "targets", "profile", value="../kl"),
        put("identity", "targets", "logprob_codec", value="zip"),
        put("identity", "blocks", value={"seq_len": 1, "evil": 1}),
        put("identity", "targets", "band_temperatures", value=[3.0]),
        put("identity", "corpus", value=7),
        put("quality", value={"rows": "many"}),
        put("files", value={"vocabulary.parquet": {"bytes": -1, "sha256": ""}}),
        put("files", value=[]),
        put("files", value={}),
        put("arrays", value=[]),
        put("format", value="zip"),
        put("format_version", value=2),
        put("format_version", value=4),
        put("format_version", value=None),
        put("provenance", value=None),
        put("identity", value={}),
        put("identity", value=[]),
    ],
)
def test_absurd_manifests(copy: Path, change: Callable[[dict[str, Any]], None]):
    change_manifest(copy, change)
    code, text = bounded(copy)
    assert code in (1, 3), (code, text)
    assert text.strip()


@pytest.mark.parametrize(
    "text", ["[" * 200_000, '{"a":' * 100_000, "{}", "[]", "null", "NaN", '{"a": NaN}', "\ud800", "9" * 5000, ""]
)
def test_json_that_is_none_or_endlessly_deep(copy: Path, text: str):
    for name in ("manifest.json", "commits/00000.json"):
        before = (copy / name).read_bytes()
        (copy / name).write_bytes(text.encode("utf-8", "surrogatepass"))
        code, message = bounded(copy)
        assert code in (1, 3), (name, code, message)
        (copy / name).write_bytes(before)


def test_a_json_file_without_end(copy: Path):
    with (copy / "manifest.json").open("r+b") as file:
        file.truncate(2**40)  # sparse: takes no disk
    refused(copy, "too large")


# chunks

GOLD = "targets.zarr/gold_ids/c.0"


def test_a_chunk_that_says_it_is_a_terabyte(copy: Path):
    data = bytearray((copy / GOLD).read_bytes())
    for size in (2**31 - 1, 2**32 - 1, 0, 1):
        forged = bytearray(data)
        forged[4:8] = size.to_bytes(4, "little")
        change_file(copy, GOLD, bytes(forged))
        refused(copy, "cannot be decoded", "another size")


@pytest.mark.parametrize(("place", "value"), [(12, 2**30 + 32), (12, 0), (12, 31), (8, 0), (8, 2**31), (3, 0)])
def test_a_chunk_whose_header_points_beyond_it(copy: Path, place: int, value: int):
    """c-blosc reads where it is told to: a compressed size beyond the chunk ended the process (found by fuzzing)."""
    data = bytearray((copy / GOLD).read_bytes())
    size = 1 if place == 3 else 4
    data[place : place + size] = value.to_bytes(size, "little")
    change_file(copy, GOLD, bytes(data))
    refused(copy, "cannot be decoded", "contradicts its bytes")


@pytest.mark.parametrize(
    "entry", [(0, 2**63), (2**63, 16), (0, 2**64 - 2), (2**64 - 2, 2**64 - 1), (0, 0), (0, 15), (10**6, 32)]
)
def test_an_index_that_points_elsewhere(copy: Path, entry: tuple[int, int]):
    data = bytearray((copy / GOLD).read_bytes())
    chunks = CacheReader(copy).manifest.layout
    count = chunks.shard_rows // chunks.chunk_rows
    place = len(data) - 4 - 16 * count
    data[place : place + 16] = b"".join(n.to_bytes(8, "little") for n in entry)
    change_file(copy, GOLD, bytes(data))
    refused(copy, "cannot be decoded", "another size")


@pytest.mark.parametrize("length", [0, 1, 3, 4, 19, 20, 67, 68])
def test_a_shard_that_is_only_its_end(copy: Path, length: int):
    change_file(copy, GOLD, (copy / GOLD).read_bytes()[-length:] if length else b"")
    refused(copy, "cannot be decoded", "cut off", "another size")


def rewritten(copy: Path, name: str, change: Callable[[np.ndarray], np.ndarray]) -> None:
    """Other values in an array of shard 0, written by Zarr itself."""
    import zarr

    array = zarr.open_array(copy / "targets.zarr" / name, mode="r+")
    shard = CacheReader(copy).manifest.layout.shard_rows
    values = np.asarray(array[:shard])
    array[:shard] = change(values)
    file = f"targets.zarr/{name}/c.0" + (".0" if values.ndim > 1 else "")
    change_file(copy, file, (copy / file).read_bytes())


def constant(value: float) -> Callable[[np.ndarray], np.ndarray]:
    return lambda values: np.full_like(values, value)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("gold_logprob", constant(np.nan)),
        ("gold_logprob", constant(-np.inf)),
        ("tail_odds", constant(np.nan)),
        ("tail_odds", constant(np.inf)),
        ("tail_bands", constant(np.nan)),
        ("boundary_logprob", constant(np.nan)),
        ("gold_ids", constant(2**16 - 1)),
        ("token_ids", constant(400)),
        ("sample_ids", constant(2**16 - 1)),
    ],
)
def test_values_that_no_teacher_gives_are_not_handed_out(copy: Path, name: str, change: Callable):
    rewritten(copy, name, change)
    refused(copy, "not finite", "cannot be decoded", "do not belong to their tokens")


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("gold_rank", constant(2**16 - 1)),
        ("token_ids", constant(3)),
        ("sample_counts", constant(255)),
        ("byte_length", constant(2**31)),
    ],
)
def test_values_that_break_a_promise_are_found_by_verify(copy: Path, name: str, change: Callable):
    rewritten(copy, name, change)
    code, text = bounded(copy)
    assert code in (0, 1, 3), text
    assert final(verify(copy))


# Parquet

EXAMPLES = "examples/00000.parquet"


def forged_table(copy: Path, **columns: Any) -> None:
    table = pq.read_table(copy / EXAMPLES)
    for name, column in columns.items():
        place = table.schema.get_field_index(name)
        table = table.drop_columns([name]) if column is None else table.set_column(place, name, column)
    pq.write_table(table, copy / "forged.parquet", compression="zstd")
    data = (copy / "forged.parquet").read_bytes()
    (copy / "forged.parquet").unlink()
    change_file(copy, EXAMPLES, data)


@pytest.fixture
def small_tables(monkeypatch: pytest.MonkeyPatch) -> int:
    """The bound of a table, 16 MB for these tests, so that nobody has to make a gigabyte."""
    monkeypatch.setattr("kd.cache_builder.store.encoding.parquet.MAX_TABLE_BYTES", 2**24)
    return 2**24


def test_a_text_repeated_until_it_fills_the_memory(copy: Path, small_tables: int):
    """Written once in a dictionary page, named by every row."""
    count = pq.read_metadata(copy / EXAMPLES).num_rows
    text = pa.DictionaryArray.from_arrays(
        pa.array([0] * count, pa.int32()), pa.array(["x" * (2 * small_tables // count)])
    )
    forged_table(copy, prompt=text)
    assert (copy / EXAMPLES).stat().st_size < 2**16
    refused(copy, "too large")


def test_the_footer_is_read_as_arrow_reads_it(copy: Path):
    for path in [*copy.glob("examples/*.parquet"), copy / "vocabulary.parquet"]:
        meta = pq.read_metadata(path)
        columns = [meta.row_group(g).column(c) for g in range(meta.num_row_groups) for c in range(meta.num_columns)]
        expected = sum(max(c.total_uncompressed_size, 4 * c.num_values) for c in columns)
        assert footer_sizes(path.read_bytes()) == (expected, meta.num_rows)


def test_metadata_that_makes_arrow_end_the_process(copy: Path):
    """Statistics of a column that contradict its schema: asking pyarrow for its metadata aborts, so nobody asks."""
    data = base64.b64decode((Path(__file__).parents[1] / "golden" / "aborts_arrow.b64").read_text())

    def ask() -> None:
        faulthandler.disable()  # its report of an expected end is noise
        pq.ParquetFile(pa.BufferReader(data)).metadata.row_group(0).column(5)

    code, _ = child(ask)
    assert code == -signal.SIGABRT  # else the bug is gone, and `footer_sizes` may go too
    change_file(copy, EXAMPLES, data)
    refused(copy, "another number of rows", "cannot be decoded")


def test_more_rows_than_the_shard_has_examples(copy: Path):
    table = pq.read_table(copy / EXAMPLES)
    pq.write_table(pa.concat_tables([table] * 3), copy / "forged.parquet")
    data = (copy / "forged.parquet").read_bytes()
    (copy / "forged.parquet").unlink()
    change_file(copy, EXAMPLES, data)
    refused(copy, "another number of rows")


def test_a_list_repeated_until_it_fills_the_memory(copy: Path, small_tables: int):
    count = pq.read_metadata(copy / EXAMPLES).num_rows
    each = small_tables // count
    values = pa.ListArray.from_arrays(
        pa.array(np.arange(count + 1) * each, pa.int32()), pa.array(np.zeros(each * count, np.int32))
    )
    forged_table(copy, context_ids=values)
    assert (copy / EXAMPLES).stat().st_size < 2**16
    refused(copy, "too large")


@pytest.mark.parametrize(
    "columns",
    [
        {"target": None},
        {"rows": None},
        {"tokens_digest": None},
        {"rows": "text"},
        {"context_ids": "text"},
        {"rows": "far"},
        {"rows": "large"},
        {"rows": "none"},
        {"rows": "negative"},
        {"rows": "null"},
    ],
)
def test_tables_of_another_make(copy: Path, columns: dict[str, Any]):
    count = pq.read_metadata(copy / EXAMPLES).num_rows
    kinds = {
        "text": pa.array(["x"] * count),
        "far": pa.array([2**62] * count),
        "large": pa.array([2**31 - 1] * count, pa.int32()),
        "none": pa.array([0] * count, pa.int32()),
        "negative": pa.array([-5] * count),
        "null": pa.array([None] * count, pa.int64()),
    }
    forged_table(copy, **{name: None if kind is None else kinds[kind] for name, kind in columns.items()})
    code, text = bounded(copy)
    assert code in (1, 3), (code, text)


# anything


LEAF = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.sampled_from(["", "..", "kl", "0" * 64, "x" * 300, "a/b"])
)
JSON = LEAF | st.lists(LEAF, max_size=3) | st.dictionaries(st.sampled_from(["a", "bytes", "rows"]), LEAF, max_size=3)


def somewhere(draw: Callable, value: Any) -> Any:
    """A document with one place changed, taken away or doubled."""
    if isinstance(value, dict) and value and draw(st.integers(0, 5)):
        key = draw(st.sampled_from(sorted(value)))
        if not draw(st.integers(0, 6)):
            return {k: v for k, v in value.items() if k != key}
        return value | {key: somewhere(draw, value[key])}
    if isinstance(value, list) and value and draw(st.integers(0, 5)):
        place = draw(st.integers(0, len(value) - 1))
        if not draw(st.integers(0, 6)):
            return value[:place] + value[place : place + 1] * 2 + value[place + 1 :]
        return [*value[:place], somewhere(draw, value[place]), *value[place + 1 :]]
    return draw(JSON)


def no_surprise(root: Path) -> None:
    """Either it is read, or refused with an error of ours; never another exception, a crash or a signal."""
    code, text = bounded(root)
    assert code in (0, 1, 3), (code, text)


def fuzzed(copy: Path, examples: int) -> None:
    manifest, commit = (json.loads((copy / name).read_text()) for name in ("manifest.json", "commits/00000.json"))
    files = [GOLD, "targets.zarr/logprobs/c.0.0", EXAMPLES, "targets.zarr/zarr.json", "targets.zarr/log_z/zarr.json"]
    files += ["vocabulary.parquet", "shards.parquet", "commits.parquet", "lengths/00000.parquet"]
    whole = {name: (copy / name).read_bytes() for name in files if (copy / name).exists()}

    @settings(max_examples=examples, suppress_health_check=list(HealthCheck), derandomize=True)
    @given(st.data())
    def attempt(data: st.DataObject) -> None:
        what = data.draw(st.sampled_from(["manifest", "commit", *whole]))
        try:
            if what == "manifest":
                sign_manifest(copy, somewhere(data.draw, manifest))
            elif what == "commit":
                sign_commit(copy, somewhere(data.draw, commit))
            else:
                forged = bytearray(whole[what])
                for _ in range(data.draw(st.integers(1, 4))):
                    place = data.draw(st.integers(0, len(forged) - 1))
                    forged[place] = data.draw(st.sampled_from([0, 1, 0x7F, 0x80, 0xFF, forged[place] ^ 1]))
                if data.draw(st.booleans()):
                    forged = forged[: data.draw(st.integers(0, len(forged)))]
                if what in commit["files"]:
                    change_file(copy, what, bytes(forged))
                else:
                    (copy / what).write_bytes(forged)
                    sign_manifest(copy, manifest | {"files": manifest["files"] | {what: file_entry(copy / what)}})
            no_surprise(copy)
        except (TypeError, AttributeError, KeyError):
            pass  # the forger's own mistake: a document that cannot be signed
        finally:
            for name, content in whole.items():
                (copy / name).write_bytes(content)
            (copy / "commits/00000.json").write_text(canonical_json(commit))
            (copy / "manifest.json").write_text(canonical_json(manifest))

    attempt()


def test_whatever_a_stranger_changes_is_an_error_in_words(copy: Path):
    fuzzed(copy, 40)


@pytest.mark.slow
def test_whatever_a_stranger_changes_for_long(copy: Path):
    fuzzed(copy, 5000)


def test_nothing_is_imported_or_run(copy: Path):
    """No module is loaded by reading a cache that reading another did not load."""
    use_everything(copy)
    before = set(sys.modules)
    change_manifest(copy, put("provenance", "options", value={"teacher": "os.system('x')"}))
    use_everything(copy)
    assert set(sys.modules) == before
