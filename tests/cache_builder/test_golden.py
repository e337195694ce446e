"""Stores of every released format version stay readable, by us and by readers that share no code with us."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import tensorstore

from kd.cache_builder.store.profiles import PROFILES
from kd.cache_builder.store.readers.reader import CacheReader
from kd.cache_builder.store.records.cache_identity import refuse_mismatch
from kd.cache_builder.store.records.manifest import RELEASED_VERSIONS
from kd.cache_builder.upkeep.verify import verify
from kd.common.errors import CacheMismatchError
from kd.common.progress import final

GOLDEN = Path(__file__).parents[1] / "golden"
STORES = ("v1", "v2", "v3", "v3-adaptive", "v3-conversations", "v3-tails")
READ_INDEPENDENTLY = STORES[1:]


def test_every_released_version_has_its_store():
    assert {f"v{n}" for n in RELEASED_VERSIONS} == {name[:2] for name in STORES}
    assert set(STORES) == {p.name for p in GOLDEN.iterdir() if p.is_dir()}


@pytest.mark.parametrize("version", STORES)
def test_a_store_reads_as_it_was_written(version: str):
    """With the values its own reader gave when it was made: v1 by the last commit that wrote it."""
    reader = CacheReader(GOLDEN / version)
    assert reader.manifest.format_version == int(version[1])
    expected = json.loads((GOLDEN / f"{version}.json").read_text())
    assert [e["number"] for e in expected] == [0, len(reader) - 1]
    for values in expected:
        example = reader[values.pop("number")]
        assert example.id == values.pop("id")
        assert example.target == values.pop("target")
        assert example.context_ids.tolist() == values.pop("context_ids")
        assert example.input_ids.tolist() == values.pop("input_ids", example.input_ids.tolist())
        for name, value in values.items():
            found = getattr(example.targets, name)
            # normalisers are stored in version 1; since then they are worked out in float32, whose exp, log and sums of
            # up to 16 nats differ in the last bit from processor to processor, and from one way of summing to another
            worked_out = version != "v1" and name in ("log_z", "logprobs")
            expected_values, atol = np.array(value, dtype=found.dtype), 1e-6 if worked_out else 0
            np.testing.assert_allclose(found, expected_values, rtol=0, atol=atol, err_msg=name)
    assert final(verify(GOLDEN / version)) == ()


def test_an_old_store_is_not_built_on():
    manifest = CacheReader(GOLDEN / "v1").manifest
    with pytest.raises(CacheMismatchError, match="older format"):
        refuse_mismatch(GOLDEN / "v1", manifest.identity, manifest)


# a reader of its own: tensorstore, JSON, Parquet, and docs/cache-format.md


def array(root: Path, name: str) -> np.ndarray:
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(root / "targets.zarr" / name)}}
    return np.asarray(tensorstore.open(spec, open=True).result().read().result())


def attributes(root: Path, name: str) -> dict[str, Any]:
    return json.loads((root / "targets.zarr" / name / "zarr.json").read_text())["attributes"]


def heads_of(root: Path, manifest: dict[str, Any], stored: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Steps of the log-probabilities, or ids, by row: `(places [E], kept [N])` of the entries in the flat arrays."""
    slots = len(stored["gold_ids"])
    width = next(a["columns"] for a in manifest["arrays"] if a["name"] == "token_ids")
    kept = stored.get("kept", np.full(slots, width)).astype(np.int64)
    if "kept" not in stored:
        return np.arange(slots * width), kept
    chunk_rows = manifest["layout"]["chunk_rows"]
    places = [
        chunk * chunk_rows * width + int(kept[chunk * chunk_rows : row].sum()) + place
        for row in range(slots)
        for chunk in [row // chunk_rows]
        for place in range(kept[row])
    ]
    return np.array(places), kept


def tails_of(root: Path, manifest: dict[str, Any], stored: dict[str, np.ndarray], id_of: np.ndarray) -> np.ndarray:
    """Ids drawn from the tail of every row, and zeros in the slots that are not used."""
    spec = next(a for a in manifest["arrays"] if a["name"] == "tail_ids")
    width, chunk_rows = spec["columns"], manifest["layout"]["chunk_rows"]
    draws = stored[spec["counts"]].astype(np.int64)
    tails = np.zeros((len(draws), width), dtype=np.int64)
    for row, count in enumerate(draws):
        chunk = row // chunk_rows
        first = chunk_rows * width * chunk + int(draws[chunk * chunk_rows : row].sum())
        tails[row, :count] = id_of[np.cumsum(stored["tail_ids"][first : first + count].astype(np.int64))]
    return tails


def codes_of(
    manifest: dict[str, Any], stored: dict[str, np.ndarray], places: np.ndarray, kept: np.ndarray
) -> np.ndarray:
    """Codes `[E]` of the kept tokens: as they are stored, or looked up in the lists of the shard."""
    values = stored["token_ids"].reshape(-1)[places].astype(np.int64)
    if "followers" not in stored:
        return values
    codes, number, shard_rows = np.empty_like(values), 0, manifest["layout"]["shard_rows"]
    for row, count in enumerate(kept):
        start = row - row % shard_rows
        before = 0 if row == start else stored["gold_ids"][row - 1]
        pairs = stored["followers"][start : start + shard_rows]
        first = next((i for i, pair in enumerate(pairs) if pair[0] == before), 0)
        for value in values[number : number + count]:
            codes[number] = value - 256 if value >= 256 else pairs[first + value][1]
            number += 1
    return codes


def read_independently(root: Path) -> list[dict[str, Any]]:
    """Examples of a cache of version 2 or 3 as docs/cache-format.md tells how to read them."""
    manifest = json.loads((root / "manifest.json").read_text())
    vocabulary = pq.read_table(root / "vocabulary.parquet").to_pydict()
    id_of = np.empty(len(vocabulary["id"]), dtype=np.int64)
    id_of[vocabulary["code"]] = vocabulary["id"]
    names = {a["name"] for a in manifest["arrays"]}
    stored = {name: array(root, name) for name in names}
    places, kept = heads_of(root, manifest, stored)
    ids = {name: id_of[stored[name]] for name in ("gold_ids", "sample_ids") if name in names}
    ids["token_ids"] = id_of[codes_of(manifest, stored, places, kept)]
    ends = np.cumsum(kept)
    scale = np.array(attributes(root, "logprobs")["scale"])
    steps = stored["logprobs"].reshape(-1)[places].astype(np.int64)
    relative = [-scale[np.cumsum(steps[end - n : end])] for end, n in zip(ends, kept, strict=True)]
    temperatures = attributes(root, "tail_odds")["temperatures"]
    odds = stored["tail_odds"].astype(np.float64)
    with np.errstate(divide="ignore"):  # slots that no row uses keep nothing
        sums = np.array([[np.log(np.exp(row / t).sum()) for t in temperatures] for row in relative])
    log_z = sums + np.log1p(np.exp(odds))
    one = temperatures.index(1.0)
    tails = tails_of(root, manifest, stored, id_of) if "tail_ids" in names else np.empty(0)
    examples = []
    for row, rows in examples_independently(root, manifest):
        heads = slice(ends[rows.start] - kept[rows.start], ends[rows.stop - 1])
        logprobs = np.concatenate([relative[r] - log_z[r, one] for r in range(rows.start, rows.stop)])
        found = {
            "id": row["id"],
            "target": row["target"],
            "context_ids": row["context_ids"],
            "gold_ids": ids["gold_ids"][rows],
            "token_ids": ids["token_ids"][heads],
            "gold_rank": stored["gold_rank"][rows],
            "gold_logprob": stored["gold_logprob"][rows],
            "byte_end": np.cumsum(stored["byte_length"][rows]),
            "log_z": log_z[rows],
            "logprobs": logprobs,
        }
        if "sample_ids" in names:
            found |= {"sample_ids": ids["sample_ids"][rows]}
            found |= {name: stored[name][rows] for name in ("sample_counts", "boundary_logprob")}
        if "tail_ids" in names:
            found |= {"tail_draws": stored["tail_draws"][rows], "tail_ids": tails[rows]}
        examples.append(found | {"input_ids": in_order(row, ids["gold_ids"][rows])})
    return examples


def examples_independently(root: Path, manifest: dict[str, Any]) -> Iterator[tuple[dict[str, Any], slice]]:
    """The rows of the example tables, each with its addresses in the arrays."""
    old = manifest["format_version"] < 3
    shards = manifest["shards"] if old else pq.read_table(root / "shards.parquet").to_pylist()
    lengths = [] if old else pq.read_table(root / "lengths" / "00000.parquet").to_pylist()
    assert len(shards) == (len(shards) if old else manifest["shards"])
    number = 0
    for index, shard in enumerate(shards):
        start = index * manifest["layout"]["shard_rows"]
        table = pq.read_table(root / "examples" / f"{index:05d}.parquet").to_pylist()
        if not old:
            assert (len(table), sum(row["rows"] for row in table)) == (shard["examples"], shard["rows"])
        for row in table:
            rows = slice(row["row_start"], row["row_end"]) if old else slice(start, start + row["rows"])
            if not old:
                tokens = len(row["context_ids"]) + row["rows"] + len(row.get("gap_ids", ()))
                assert lengths[number] == {"tokens": tokens, "rows": row["rows"]}
            yield row, rows
            start, number = rows.stop, number + 1


def in_order(row: dict[str, Any], targets: np.ndarray) -> list[int]:
    """The sequence that a model reads: the context, and each target token after the gap before it."""
    gaps = dict(zip(row.get("gap_rows", ()), row.get("gap_lengths", ()), strict=True))
    left, read = list(row.get("gap_ids", ())), list(row["context_ids"])
    for number, token in enumerate(targets.tolist()):
        count = gaps.get(number, 0)
        read += [*left[:count], token]
        left = left[count:]
    assert not left
    return read


@pytest.mark.parametrize("which", [*READ_INDEPENDENTLY, "built", "kl", "adaptive"])
def test_a_reader_without_our_code_agrees(which: str, cache: Path, tmp_path: Path, build_request, run_build):
    root = cache if which == "built" else GOLDEN / which
    if which in PROFILES:  # with ids as places in lists
        root = tmp_path / which
        settings = {"min_probability": 0.004, "top_k": 40} if which == "adaptive" else {}
        run_build(build_request(root, profile=which, id_codec="followers", **settings))
    reader = CacheReader(root)
    found = read_independently(root)
    assert len(found) == len(reader)
    for theirs, ours in zip(found, reader.read(range(len(reader))), strict=True):
        assert (theirs.pop("id"), theirs.pop("target")) == (ours.id, ours.target)
        assert theirs.pop("context_ids") == ours.context_ids.tolist()
        assert theirs.pop("input_ids") == ours.input_ids.tolist()
        for name, value in theirs.items():
            mine = getattr(ours.targets, name)
            mine = mine.reshape(-1) if name in ("token_ids", "logprobs") else mine
            # ours is computed in float32: sums of a few exponentials, logarithms of some nats
            np.testing.assert_allclose(mine, value, rtol=0, atol=4e-6, err_msg=name)


def test_a_cache_of_version_3_holds_what_its_documents_list_and_nothing_else():
    """Every file but the manifest is listed once, with its size and SHA-256: under `files`, or in a commit, or as a commit."""
    for root in (GOLDEN / name for name in READ_INDEPENDENTLY if name != "v2"):
        manifest = json.loads((root / "manifest.json").read_text())
        commits = pq.read_table(root / "commits.parquet").to_pylist()
        listed = {name: (entry["bytes"], entry["sha256"]) for name, entry in manifest["files"].items()}
        sums = dict.fromkeys(manifest["bytes"], 0)
        for index, commit in enumerate(commits):
            name = f"commits/{index:05d}.json"
            listed[name] = (commit["bytes.commit"], commit["sha256"].hex())
            document = json.loads((root / name).read_text())
            listed |= {inner: (entry["bytes"], entry["sha256"]) for inner, entry in document["files"].items()}
            for array in sums:
                sums[array] += commit[f"bytes.{array}"]
        assert sums == manifest["bytes"]
        there = {p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob("*") if p.is_file()}
        there.pop("manifest.json")
        assert {n: (len(data), hashlib.sha256(data).hexdigest()) for n, data in there.items()} == listed


SCRIPT = """
import * as zarr from "zarrita";
import { FileSystemStore } from "@zarrita/storage";
const [root, ...names] = process.argv.slice(2);
const out = {};
for (const name of names) {
  const array = await zarr.open.v3(new FileSystemStore(root + "/" + name), { kind: "array" });
  const { data, shape, stride } = await zarr.get(array);
  const columns = shape[1] ?? 1;
  out[name] = Array.from({ length: shape[0] * columns }, (_, i) =>
    Number(data[Math.floor(i / columns) * stride[0] + (i % columns) * (stride[1] ?? 0)]));
}
console.log(JSON.stringify(out));
"""


@pytest.mark.slow
def test_zarrita_reads_it_too(tmp_path: Path):
    if shutil.which("npm") is None:
        pytest.skip("npm is not installed")
    (tmp_path / "package.json").write_text('{"type": "module", "private": true}')
    done = subprocess.run(
        ["npm", "install", "--silent", "zarrita@0.7.5", "@zarrita/storage"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        pytest.skip(f"zarrita cannot be installed here: {done.stderr[-200:]}")
    (tmp_path / "read.mjs").write_text(SCRIPT)
    root = GOLDEN / "v3"
    names = [a["name"] for a in json.loads((root / "manifest.json").read_text())["arrays"] if a["dtype"] != "float16"]
    assert {"token_ids", "logprobs", "gold_rank", "byte_length"} <= set(names)
    read = subprocess.run(
        ["node", "read.mjs", str(root / "targets.zarr"), *names],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert read.returncode == 0, read.stderr
    found = json.loads(read.stdout)
    for name in names:
        assert found[name] == array(root, name).ravel().tolist(), name


def test_the_worked_example_of_the_documents_is_the_file(tmp_path: Path):
    """Its bytes are those of the store, and say what the text says they say."""
    text = (Path(__file__).parents[2] / "docs" / "cache-format.md").read_text(encoding="utf-8")
    section = text[text.index("## A file, byte by byte") :]
    lines = re.findall(r"^    ([0-9a-f]{4})  ((?:[0-9a-f]{2} )+) *", section, flags=re.MULTILINE)
    data = bytes.fromhex("".join(line for _, line in lines))
    assert [int(place, 16) for place, _ in lines] == list(np.cumsum([0, *(len(bytes.fromhex(b)) for _, b in lines)]))[
        :-1
    ]
    assert data == (GOLDEN / "v2" / "targets.zarr" / "gold_rank" / "c" / "0").read_bytes()
    entries = struct.unpack("<8Q", data[-68:-4])
    assert entries[0] == 0
    ranks = CacheReader(GOLDEN / "v2")[0].targets.gold_rank.tolist()
    quoted = re.search(r"`gold_rank` of its first rows: ((?:\d+, )+\d+)", section)
    assert quoted is not None
    assert [int(n) for n in quoted[1].split(", ")] == ranks[:8]
