"""`S3Writer`: shards of a cache in an object store. Each is staged on this disk as in a folder, then put whole.

    .staging/TAG/00003/logprobs     the files of a shard, put first, under names that no other builder uses
    .ready-00003.json               the offer: TAG and the shard's commit; put only where there is none, so one builder is chosen
    targets.zarr/…  examples/…      the files, copied within the store by whoever settles the offer: always the same bytes
    commits/00003.json              the commit, put only where there is none; then offer and staging go

This is the protocol of `store.writers.shard_publishing` with conditional writes in the place of a rename. An offer is removed only
after its commit, so a late builder finds the commit, and one that stopped in the middle can copy nothing but the commit's bytes.
The folder on this disk holds the manifest, the vocabulary and the commits, and no more than the shard that is being written.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from kd.cache_builder.build.object_store.s3_claims import S3Claims, all_s3_claims
from kd.cache_builder.build.object_store.s3_objects import TRIAL, S3Objects
from kd.cache_builder.store.lengths import Lengths
from kd.cache_builder.store.records import commits
from kd.cache_builder.store.records.cache_identity import refuse_mismatch
from kd.cache_builder.store.records.cache_tables import COMMITS
from kd.cache_builder.store.records.commits import shard_files
from kd.cache_builder.store.records.manifest import BUILDING, MANIFEST, CacheManifest, listed_tables, load_manifest
from kd.cache_builder.store.writers.shard_publishing import COMMIT
from kd.cache_builder.store.writers.shard_writer import ShardWriter
from kd.common.errors import CacheDamageError, CacheMismatchError
from kd.common.files import unfinished, write_atomic, write_first

STAGING = ".staging/"


class S3Writer(ShardWriter):
    """Writes whole shards of one cache into an object store, by way of a folder on this disk."""

    def __init__(self, root: Path, manifest: CacheManifest, objects: S3Objects) -> None:
        super().__init__(root, manifest)
        self.objects = objects
        self._laid_out = False
        """Whether this writer has put the first object of the cache."""

    def claims(self, name: str) -> S3Claims:  # type: ignore[override]  # the same methods
        """As `ShardWriter.claims`."""
        return S3Claims(self.objects, name)

    def create(self, vocabulary: list[bytes], codes: np.ndarray, lengths: Iterable[Lengths]) -> CacheManifest:
        """As `ShardWriter.create`: in the folder first, then `building.json` and the rest in the store."""
        mine = super().create(vocabulary, codes, lengths)
        if mine.complete:
            return mine
        self._laid_out = self.objects.put_first(BUILDING, (self.root / BUILDING).read_bytes())
        if not self._laid_out:
            mine = self._of_the_first_builder(mine)
        self.objects.put_files([(name, self.root / name) for name in mine.files if not self.objects.exists(name)])
        self.manifest = mine
        return mine

    def _of_the_first_builder(self, mine: CacheManifest) -> CacheManifest:
        """The manifest that another builder has put. Raises CacheMismatchError where it is of another cache."""
        for name in (MANIFEST, BUILDING):
            data = self.objects.get(name)
            if data is not None:
                write_atomic(self.root / name, data.decode())
                self._fetch_tables(json.loads(data))
                break
        theirs = load_manifest(self.root)
        refuse_mismatch(self.root, mine.identity, theirs)
        if (theirs.layout, theirs.reopened().files) != (mine.layout, mine.files):
            raise CacheMismatchError(
                "another builder laid this cache out differently",
                cache=self.objects.url,
                found=f"{theirs.layout.shard_rows} rows per shard",
                expected=f"{mine.layout.shard_rows}, and files by the same library versions",
                try_="the same --shard-rows and versions for all builders",
            )
        return theirs

    def _fetch_tables(self, document: dict[str, Any]) -> None:
        """Have the tables that belong to a manifest's document in the folder, as far as they are in the store already."""
        for name in listed_tables(document):
            data = self.objects.get(name)
            if data is not None:
                (self.root / name).write_bytes(data)

    def committed(self) -> set[int]:
        """As `ShardWriter.committed`, by a listing of the store."""
        return committed_objects(self.objects, len(self.manifest.shards))

    def is_committed(self, index: int) -> bool:
        """As `ShardWriter.is_committed`."""
        return self.objects.exists(f"commits/{index:05d}.json")

    def check_sizes(self, shards: Iterable[int]) -> None:
        """As `ShardWriter.check_sizes`; of a finished cache `kd cache verify` looks at more."""
        if self.manifest.complete:
            return
        sizes = self.objects.sizes()
        for index in shards:
            self._fetch_commit(index)
            for name, entry in commits.read_commit(self.root, self.manifest, index).files.items():
                if sizes.get(name) != entry["bytes"]:
                    raise CacheDamageError(
                        "a file of the cache has another size than its commit says",
                        file=f"{self.objects.url}/{name}",
                        shard=index,
                        found="no such object" if name not in sizes else f"{sizes[name]} bytes",
                        expected=f"{entry['bytes']} bytes",
                        try_=f"remove {self.objects.url}/commits/{index:05d}.json: the same command builds the shard again",
                    )

    def _fetch_commit(self, index: int) -> None:
        path = commits.commit_path(self.root, index)
        if not path.exists():
            data = self.objects.get(f"commits/{index:05d}.json")
            if data is not None:
                write_first(path, data.decode())

    def recover(self, index: int | None = None) -> None:
        """As `ShardWriter.recover`."""
        if index is not None:
            self._settle(index)
            return
        for name in self.objects.sizes(".ready-"):
            number = name.removeprefix(".ready-").removesuffix(".json")
            if number.isdecimal() and int(number) < len(self.manifest.shards):
                self._settle(int(number))

    def _publish(self, index: int, folder: Path) -> None:
        """Put a shard's files, offer them, and settle whichever offer was the first."""
        (inner,) = folder.iterdir()
        there = f"{STAGING}{inner.name}/{index:05d}/"
        self.objects.put_files([(there + path.name, path) for path in sorted(inner.iterdir()) if path.name != COMMIT])
        offer = {"tag": inner.name, "commit": (inner / COMMIT).read_text(encoding="utf-8")}
        chosen = self.objects.put_first(_offer_name(index), json.dumps(offer).encode())
        self._settle(index)
        if not chosen:
            self.objects.remove([there + path.name for path in inner.iterdir()])

    def _settle(self, index: int) -> None:
        """Finish what was offered of a shard, if anything was."""
        data = self.objects.get(_offer_name(index))
        if data is None:
            return
        offer = json.loads(data)
        there = f"{STAGING}{offer['tag']}/{index:05d}/"
        files = shard_files(self.manifest.arrays, index)
        if not self.is_committed(index):
            try:
                self.objects.copy_all([(there + key, name) for key, name in files.items()])
            except FileNotFoundError as error:
                if not self.is_committed(index):  # else another builder has settled it meanwhile
                    raise CacheDamageError(
                        "a shard that was offered is not whole",
                        where=f"{self.objects.url}/{there}",
                        found=error,
                        try_=f"remove {self.objects.url}/{_offer_name(index)}: the same command builds the shard again",
                    ) from error
            self.objects.put_first(f"commits/{index:05d}.json", offer["commit"].encode())
        self.objects.remove([there + key for key in files])
        self.objects.remove([_offer_name(index)])

    def finish(self) -> CacheManifest:
        """As `ShardWriter.finish`: `manifest.json` is put last."""
        if not self.objects.exists(MANIFEST):
            for index in range(len(self.manifest.shards)):
                self._fetch_commit(index)
            table = self.objects.get(COMMITS)  # another builder may be at the same
            if table is not None:
                (self.root / COMMITS).write_bytes(table)
            super().finish()
            rest = [p for p in sorted(self.root.iterdir()) if p.is_file() and not unfinished(p.name)]
            there, last = self.objects.top_names(), {MANIFEST, BUILDING}
            self.objects.put_files([(p.name, p) for p in rest if p.name not in {*there, *last}])
            self.objects.put_first(MANIFEST, (self.root / MANIFEST).read_bytes())
        self._tidy_store()
        return self.manifest

    def tidy(self) -> None:
        """As `ShardWriter.tidy`: for the folder, and for the store where the cache is finished."""
        super().tidy()
        if self.manifest.complete and self.objects.exists(MANIFEST):
            self._tidy_store()

    def _tidy_store(self) -> None:
        """Remove everything but the finished cache: a shard of it has no builder."""
        left = [name for prefix in (STAGING, ".ready-", TRIAL, "commits/.") for name in self.objects.sizes(prefix)]
        self.objects.remove([*left, BUILDING])

    def withdraw(self) -> None:
        """As `ShardWriter.withdraw`."""
        if self._laid_out and not self.committed() and not any(c.void is None for c in all_s3_claims(self.objects)):
            self.objects.remove([BUILDING])
            self.objects.remove([*self.manifest.files])
        super().withdraw()


def committed_objects(objects: S3Objects, shards: int) -> set[int]:
    """The shards whose commits are in the store, among the first `shards`."""
    numbers = [name.removeprefix("commits/").removesuffix(".json") for name in objects.sizes("commits/")]
    return {int(number) for number in numbers if number.isdecimal() and int(number) < shards}


def _offer_name(index: int) -> str:
    return f".ready-{index:05d}.json"
