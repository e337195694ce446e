"""Whatever is done to a file of a cache is found: by `verify`, which names it, and by the reader before it hands out a value."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kd.cache_builder.store.chunks import broken_chunks
from kd.cache_builder.store.readers.reader import CacheReader
from kd.cache_builder.store.records.cache_tables import TABLES
from kd.cache_builder.store.records.manifest import Layout, load_manifest
from kd.cache_builder.upkeep.verify import verify
from kd.common.errors import CacheDamageError, CacheError
from kd.common.files import canonical_json
from kd.common.progress import final

Harm = Callable[[Path, Path, random.Random], "list[Path]"]
"""`(root, file, dice)` -> the files that are not what they were."""


def flip_a_bit(root: Path, path: Path, dice: random.Random) -> list[Path]:
    data = bytearray(path.read_bytes())
    data[dice.randrange(len(data))] ^= 1 << dice.randrange(8)
    path.write_bytes(bytes(data))
    return [path]


def truncate(root: Path, path: Path, dice: random.Random) -> list[Path]:
    os.truncate(path, dice.randrange(path.stat().st_size))
    return [path]


def remove(root: Path, path: Path, dice: random.Random) -> list[Path]:
    path.unlink()
    return [path]


def empty(root: Path, path: Path, dice: random.Random) -> list[Path]:
    path.write_bytes(b"")
    return [path]


def lengthen(root: Path, path: Path, dice: random.Random) -> list[Path]:
    path.write_bytes(path.read_bytes() + dice.randbytes(dice.randrange(1, 9)))
    return [path]


def zero_a_range(root: Path, path: Path, dice: random.Random) -> list[Path]:
    data = bytearray(path.read_bytes())
    start = dice.randrange(len(data))
    data[start : start + 64] = bytes(len(data[start : start + 64]))
    if bytes(data) == path.read_bytes():
        return flip_a_bit(root, path, dice)
    path.write_bytes(bytes(data))
    return [path]


def swap_with_another_shard(root: Path, path: Path, dice: random.Random) -> list[Path]:
    if path.suffix == ".json" or path.parent.name in (root.name, "lengths"):
        return flip_a_bit(root, path, dice)
    same = sorted(p for p in path.parent.iterdir() if p != path and p.read_bytes() != path.read_bytes())
    other = dice.choice(same)
    mine, theirs = path.read_bytes(), other.read_bytes()
    path.write_bytes(theirs)
    other.write_bytes(mine)
    return [path, other]


def edit(root: Path, path: Path, dice: random.Random) -> list[Path]:
    """Another value in a JSON or Parquet file, spelled as it should be."""
    if path.suffix == ".json":
        document = json.loads(path.read_text())
        key = dice.choice(sorted(document))
        document[key] = {"edited": True} if document[key] != {"edited": True} else 1
        path.write_text(canonical_json(document))
        return [path]
    if path.suffix == ".parquet":
        table = pq.read_table(path)
        place = len(table.schema.names) - 1 if path.name == "commits.parquet" else 0
        column = table[table.schema.names[place]].to_pylist()
        column[dice.randrange(len(column))] = column[0] + 1 if isinstance(column[0], int) else "edited"
        edited = pa.array(column, table.schema.types[place])
        pq.write_table(table.set_column(place, table.schema.field(place), edited), path)
        return [path]
    return flip_a_bit(root, path, dice)


HARMS: tuple[Harm, ...] = (
    flip_a_bit,
    flip_a_bit,
    flip_a_bit,
    truncate,
    remove,
    empty,
    lengthen,
    zero_a_range,
    swap_with_another_shard,
    edit,
)


def found_by_verify(root: Path) -> set[str] | None:
    """Files that verification names; None where it could not begin."""
    try:
        return {f.where for f in final(verify(root))}
    except CacheDamageError:
        return None


def found_by_reader(root: Path) -> bool:
    try:
        reader = CacheReader(root)
        reader.vocabulary()
        reader.lengths()
        reader.read(range(len(reader)))
    except CacheDamageError:
        return True
    return False


def one_after_another(root: Path, rounds: int, seed: int) -> None:
    dice = random.Random(seed)
    files = sorted(p for p in root.rglob("*") if p.is_file())
    whole = {p: p.read_bytes() for p in files}
    shard_of = {}
    for number in range(len(load_manifest(root).shards)):
        of_shards = [p for p in files if p.parent.name != "lengths"]
        shard_of |= {p: number for p in of_shards if p.stem == f"{number:05d}" or re.search(rf"/c\.{number}\b", str(p))}
    for _ in range(rounds):
        path, harm = dice.choice(files), dice.choice(HARMS)
        harmed = harm(root, path, dice)
        places = [p.relative_to(root).as_posix() for p in harmed]
        named = found_by_verify(root)
        if named is None:
            assert set(places) <= {"manifest.json", *TABLES}, (harm.__name__, places)
        else:
            assert set(places) <= named, (harm.__name__, places, named)
            findings = [f for f in final(verify(root)) if f.where in places]
            assert all(f.shard == shard_of.get(root / f.where) for f in findings)
            assert all(
                (f.array is not None and f.rows) or f.shard is None or f.where.startswith("commits/") for f in findings
            ), findings
        assert found_by_reader(root), (harm.__name__, places)
        for p in harmed:
            p.write_bytes(whole[p])
    assert found_by_verify(root) == set()
    assert not found_by_reader(root)


@pytest.fixture
def copy(tmp_path: Path, cache: Path) -> Path:
    shutil.copytree(cache, tmp_path / "c")
    return tmp_path / "c"


def test_damage_of_every_kind_is_found(copy: Path):
    one_after_another(copy, 60, seed=0)


@pytest.mark.slow
def test_none_of_thousands_of_damages_is_missed(copy: Path):
    """Ten thousand, or as many as `KD_DAMAGES` says."""
    one_after_another(copy, int(os.environ.get("KD_DAMAGES", "10000")), seed=1)


def test_a_link_out_of_the_cache_and_what_is_no_file_are_refused(copy: Path, tmp_path: Path):
    name = "targets.zarr/gold_ids/c.0"
    (copy / name).rename(tmp_path / "elsewhere")
    (copy / name).symlink_to(tmp_path / "elsewhere")
    assert found_by_verify(copy) == {name}
    assert found_by_reader(copy)
    (copy / name).unlink()
    os.mkfifo(copy / name)  # opening one would wait for ever
    assert found_by_verify(copy) == {name}
    assert found_by_reader(copy)


def test_an_edited_commit_of_an_unfinished_build_is_found(tmp_path, build_request):
    from kd.cache_builder.build.builder import build
    from kd.cache_builder.build.plan import plan_build

    request = build_request(tmp_path / "c", shard=(1, 2))
    list(build(plan_build(request)))
    assert found_by_verify(tmp_path / "c") == set()
    path = tmp_path / "c" / "commits" / "00000.json"
    document = json.loads(path.read_text())
    document["quality"]["gold_nll"] += 1.0
    path.write_text(canonical_json(document))
    assert found_by_verify(tmp_path / "c") == {"commits/00000.json"}


def test_a_file_cut_at_any_length_is_named(copy: Path):
    """Within the index too, where nothing says which rows are broken."""
    name = "targets.zarr/gold_ids/c.0"
    whole = (copy / name).read_bytes()
    for length in [*range(0, 100, 3), len(whole) - 1]:
        (copy / name).write_bytes(whole[:length])
        assert found_by_verify(copy) == {name}, length


@given(data=st.binary(max_size=300))
def test_no_bytes_at_all_are_a_surprise_to_who_looks_for_broken_chunks(data: bytes):
    layout = Layout(32, 8)
    try:
        assert set(broken_chunks(data, layout)) <= set(range(4))
    except CacheError:
        assert len(data) < 4 * 16 + 4
