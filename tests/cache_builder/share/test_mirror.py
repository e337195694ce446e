"""Reading from a URL gives what reading the directory gives, within the bound, and fetches nothing twice in an epoch."""

from __future__ import annotations

import shutil
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from servers import Answer, FileServer, HubServer, Proxy

from kd.cache_builder.opening import open_files
from kd.cache_builder.share.mirror import cache_bytes
from kd.cache_builder.share.pull import pull
from kd.cache_builder.share.push import push
from kd.cache_builder.store.cache_files import LocalFiles
from kd.cache_builder.store.readers.reader import CacheReader
from kd.cache_builder.store.records import commits
from kd.cache_builder.store.records.manifest import Layout, load_manifest
from kd.cache_builder.upkeep.merge_caches import merge_caches
from kd.cache_builder.upkeep.slice_cache import slice_cache
from kd.cache_builder.upkeep.summary import cache_summary
from kd.cache_builder.upkeep.verify import verify
from kd.common.errors import CacheDamageError, CacheError
from kd.common.progress import final

pytestmark = pytest.mark.usefixtures("hasty", "home")


def same(one: CacheReader, other: CacheReader, examples: list[int]) -> None:
    for a, b in zip(one.read(examples), other.read(examples), strict=True):
        assert (a.id, a.prompt, a.target) == (b.id, b.prompt, b.target)
        np.testing.assert_array_equal(a.targets.gold_ids, b.targets.gold_ids)
        np.testing.assert_array_equal(a.targets.logprobs, b.targets.logprobs)


def batches_of(reader: CacheReader, size: int, epochs: int = 1) -> list[list[int]]:
    orders = [reader.epoch_order(0, epoch).tolist() for epoch in range(epochs)]
    return [order[i : i + size] for order in orders for i in range(0, len(order), size)]


def stored(root: Path) -> int:
    """Bytes of shards that lie in a mirror now."""
    total = 0
    for path in [*(root / "targets.zarr").glob("*/c.*"), *(root / "examples").glob("*")]:
        try:
            total += path.stat().st_size if path.is_file() else 0
        except OSError:  # evicted while we look
            continue
    return total


@pytest.mark.parametrize("kind", ["web", "s3", "hub"])
def test_a_url_reads_as_the_directory_does(kind: str, small: Path, request: pytest.FixtureRequest):
    if kind == "web":
        url = request.getfixturevalue("serve")(small).url
    else:
        request.getfixturevalue(kind)
        url = {"s3": "s3://shared/cache", "hub": "hf://datasets/us/cache"}[kind]
        list(push(small, url))
    there, here = CacheReader(open_files(url)), CacheReader(small)
    np.testing.assert_array_equal(there.lengths(), here.lengths())
    batches = batches_of(there, 3)
    assert batches == batches_of(here, 3)
    there.announce(batches)
    for batch in batches:
        same(there, here, batch)
    assert there.vocabulary() == here.vocabulary()


def test_every_shard_is_fetched_once_in_an_epoch_and_the_bound_holds(cache: Path, serve, home: Path):
    server: FileServer = serve(cache)
    manifest = load_manifest(cache)
    sizes = [commits.read_commit(cache, manifest, i).bytes for i in range(len(manifest.shards))]
    limit = 2 * max(sizes)
    assert limit < sum(sizes) / 1.5  # or the test would say nothing
    reader, local = CacheReader(open_files(server.url, limit), window=2), CacheReader(cache)
    reader.lengths()
    server.log.clear()
    high, over = 0, threading.Event()

    def watch() -> None:
        nonlocal high
        while not over.wait(0.002):
            high = max(high, stored(reader.root))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        batches = batches_of(reader, 2, epochs=2)
        reader.announce(batches)
        for batch in batches:
            same(reader, local, batch)
    finally:
        over.set()
        watcher.join()
    assert 0 < high <= limit
    fetched = Counter(path for path in server.gets("/targets.zarr") if "/c." in path)
    assert set(fetched.values()) <= {1, 2}  # once in each of two epochs
    assert max(fetched.values()) == 2  # the bound did make it fetch again
    again = CacheReader(open_files(server.url, limit), window=2)
    same(again, local, [0, len(local) - 1])


def test_what_comes_next_is_fetched_before_it_is_asked_for(cache: Path, serve):
    server: FileServer = serve(cache)
    reader = CacheReader(open_files(server.url), window=1)
    batches = batches_of(reader, 4)
    reader.announce(batches)
    assert arrive(reader, shards_of(reader, batches)[:2])  # two windows of one shard, before anything was read


def shards_of(reader: CacheReader, batches: list[list[int]]) -> list[int]:
    """The shards that hold the examples of batches, in the order in which they are first needed."""
    examples = [example for batch in batches for example in batch]
    return list(dict.fromkeys(reader.manifest.shards.shard_of(examples).tolist()))


def arrive(reader: CacheReader, shards: list[int]) -> bool:
    """Wait until these shards are in the mirror, without reading them; half a minute at most."""
    gold = [reader.root / commits.shard_files(reader.manifest.arrays, i)["gold_ids"] for i in shards]
    deadline = time.monotonic() + 30
    while not all(path.exists() for path in gold) and time.monotonic() < deadline:
        time.sleep(0.01)
    return all(path.exists() for path in gold)


def test_a_loss_fetches_only_the_arrays_it_reads(cache: Path, serve):
    server: FileServer = serve(cache)
    reader = CacheReader(open_files(server.url))
    reader.keep(["gold_ids", "gold_logprob", "gold_rank", "byte_length"])
    for batch in batches_of(reader, 4):
        reader.read(batch)
    assert server.gets("gold_ids/c.")
    assert not server.gets("token_ids/c.")


def test_a_mirror_is_used_again_and_heals_itself(small: Path, serve):
    server: FileServer = serve(small)
    everything = list(range(len(CacheReader(small))))
    same(CacheReader(open_files(server.url)), CacheReader(small), everything)
    before = len(server.gets("/c."))
    same(CacheReader(open_files(server.url)), CacheReader(small), everything)
    assert len(server.gets("/c.")) == before
    root = open_files(server.url).root
    name = commits.shard_files(load_manifest(small).arrays, 0)["gold_ids"]
    (root / name).write_bytes((root / name).read_bytes()[:-1] + b"x")
    same(CacheReader(open_files(server.url)), CacheReader(small), everything)
    assert len(server.gets("/c.")) == before + 1
    (root / commits.shard_files(load_manifest(small).arrays, 0)["logprobs"]).unlink()  # another process evicted it
    same(CacheReader(open_files(server.url)), CacheReader(small), everything)


def test_readers_at_once_share_one_fetch(small: Path, serve):
    server: FileServer = serve(small)
    readers, errors = [CacheReader(open_files(server.url)) for _ in range(4)], []

    def read(reader: CacheReader) -> None:
        try:
            same(reader, CacheReader(small), list(range(len(reader))))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=read, args=(reader,)) for reader in readers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert max(Counter(server.gets("/c.")).values()) == 1


def test_wrong_bytes_and_a_dead_server_are_errors_that_name_the_file(small: Path, serve):
    server: FileServer = serve(small)
    name = commits.shard_files(load_manifest(small).arrays, 0)["logprobs"]

    def wrong(path: str, before: int, answer: Answer) -> None:
        if path == f"/{name}":
            answer.body = answer.body[:-1] + bytes([answer.body[-1] ^ 1])

    server.fault = wrong
    reader = CacheReader(open_files(server.url))
    with pytest.raises(CacheDamageError, match="other bytes") as error:
        reader[0]
    assert error.value.details["file"] == name
    found = final(verify(open_files(server.url)))
    assert [(f.where, f.array) for f in found] == [(name, "logprobs")]

    def broken(path: str, before: int, answer: Answer) -> None:
        answer.status, answer.body = 500, b""

    server.fault = broken
    with pytest.raises(CacheError, match="failed again and again"):
        CacheReader(open_files(server.url))


def test_a_url_is_described_without_its_shards_and_verified_within_the_bound(cache: Path, serve):
    server: FileServer = serve(cache)
    there, here = cache_summary(open_files(server.url)), cache_summary(cache)
    assert not server.gets("/c.")
    for name in ("fingerprint", "complete", "shards_committed", "array_bytes_per_token", "teacher_nll_mean"):
        assert there[name] == here[name]
    assert there["bytes"] == pytest.approx(here["bytes"], rel=0.2)  # without manifest and commits
    limit = max(commits.read_commit(cache, load_manifest(cache), i).bytes for i in range(3)) * 2
    files = open_files(server.url, limit)
    assert final(verify(files)) == ()
    assert stored(files.root) <= limit


def test_another_cache_at_the_same_address_is_another_mirror(cache: Path, small: Path, serve, tmp_path: Path):
    shutil.copytree(cache, tmp_path / "there")
    server: FileServer = serve(tmp_path / "there")
    first = open_files(server.url).root
    shutil.rmtree(tmp_path / "there")
    shutil.copytree(small, tmp_path / "there")
    second = open_files(server.url).root
    assert first != second
    same(CacheReader(open_files(server.url)), CacheReader(small), [0, 1])
    assert open_files(serve(small).url).root == second  # the same cache elsewhere is the same mirror


def test_a_part_is_mirrored_as_a_part(cache: Path, tmp_path: Path, serve):
    list(pull(str(cache), tmp_path / "part", examples=(0, 1)))
    reader = CacheReader(open_files(serve(tmp_path / "part").url))
    same(reader, CacheReader(cache), [0])
    with pytest.raises(CacheError, match="does not hold that shard"):
        reader[len(reader) - 1]


@pytest.fixture(scope="module")
def uneven(tmp_path_factory: pytest.TempPathFactory, build_request, run_build) -> Path:
    """Rows that differ in length, certain ones of one token, rank bands, and ids in lists."""
    out = tmp_path_factory.mktemp("uneven") / "cache"
    rule = {"min_probability": 0.004, "certain_below": 3.0, "tail_bands": 4, "id_codec": "followers"}
    run_build(build_request(out, profile="adaptive", top_k=40, layout=Layout(256, 64), **rule))
    kept = CacheReader(out).read_rows([0, 1, 2]).kept
    assert kept is not None
    assert 1 == kept.min() < kept.max()
    return out


def rows_of(reader: CacheReader) -> dict[str, np.ndarray]:
    rows = vars(reader.read_rows(range(len(reader))))
    return {name: values for name, values in rows.items() if isinstance(values, np.ndarray) and name != "offsets"}


def equal_rows(one: CacheReader, other: CacheReader) -> None:
    rows, expected = rows_of(one), rows_of(other)
    assert {"kept", "tail_bands", "token_ids"} <= rows.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_array_equal(rows[name], values, err_msg=name)


def test_uneven_rows_with_lists_come_through_an_object_store(uneven: Path, s3: Proxy):
    list(push(uneven, "s3://shared/uneven"))
    equal_rows(CacheReader(open_files("s3://shared/uneven")), CacheReader(uneven))


def test_uneven_rows_with_lists_come_through_a_url_a_part_a_slice_and_a_merger(uneven: Path, tmp_path: Path, serve):
    files, whole = open_files(serve(uneven).url), CacheReader(uneven)
    equal_rows(CacheReader(files), whole)
    list(pull(serve(uneven).url, tmp_path / "part", examples=(0, 1)))
    part, first_one = CacheReader(tmp_path / "part")[0].targets, whole[0].targets
    for name in ("kept", "token_ids", "tail_bands"):
        np.testing.assert_array_equal(getattr(part, name), getattr(first_one, name))
    for first, stop in ((0, 3), (3, len(whole))):
        list(slice_cache(files, tmp_path / f"slice{first}", examples=(first, stop)))
    list(merge_caches([tmp_path / "slice0", tmp_path / "slice3"], tmp_path / "both"))
    assert final(verify(tmp_path / "both")) == ()
    equal_rows(CacheReader(tmp_path / "both"), whole)


def test_a_bound_below_one_file_is_refused(cache: Path, serve):
    with pytest.raises(CacheError, match="smaller than one file"):
        CacheReader(open_files(serve(cache).url, 10))[0]


def test_the_bound_is_the_given_one_or_that_of_the_environment(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("KD_CACHE_BYTES", "2MB")
    assert cache_bytes() == 2 * 10**6
    assert cache_bytes(5) == 5


def test_a_path_stays_a_path(cache: Path):
    for place in (cache, str(cache), f"file://{cache}"):
        assert open_files(place) == LocalFiles(cache)


def test_every_batch_of_a_slow_object_store_is_there_before_it_is_read(cache: Path, s3: Proxy, hub: HubServer):
    """Every answer takes 20 ms; a step that takes longer than the fetching never waits."""
    list(push(cache, "s3://shared/cache"))
    s3.fault = lambda path, before, answer: time.sleep(0.02)
    reader = CacheReader(open_files("s3://shared/cache"), window=2)
    reader.lengths()
    batches = batches_of(reader, 1)
    reader.announce(batches)
    for batch in batches:
        assert arrive(reader, shards_of(reader, [batch]))
        reader.read(batch)
