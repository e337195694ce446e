"""What is asked of the place that a build goes to, from outside its builders: commits, claims, and whether it is finished."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from kd.cache_builder.build.object_store.s3_claims import all_s3_claims, claim_name
from kd.cache_builder.build.object_store.s3_objects import S3Objects
from kd.cache_builder.build.object_store.s3_writer import committed_objects
from kd.cache_builder.store.records import commits
from kd.cache_builder.store.records.manifest import MANIFEST
from kd.cache_builder.store.writers.claims import Claim, all_claims, release_claims_of


class BuildOutput(Protocol):
    """The place that a build goes to."""

    def committed(self, shards: int) -> set[int]:
        """The shards that are committed, among the first `shards`."""

    def claims(self) -> list[Claim]:
        """Who holds which shard."""

    def release(self, name: str) -> list[int]:
        """Remove the claims of the builder of this name, which has ended. Returns their shards."""

    def complete(self) -> bool:
        """Whether the cache is finished."""


class FolderOutput:
    """A folder that all builders see."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def committed(self, shards: int) -> set[int]:
        """As `BuildOutput.committed`."""
        return set(commits.committed(self.root, shards))

    def claims(self) -> list[Claim]:
        """As `BuildOutput.claims`."""
        return all_claims(self.root)

    def release(self, name: str) -> list[int]:
        """As `BuildOutput.release`."""
        return release_claims_of(self.root, name)

    def complete(self) -> bool:
        """As `BuildOutput.complete`."""
        return (self.root / MANIFEST).exists()


class StoreOutput:
    """An address in an object store."""

    def __init__(self, url: str) -> None:
        self.objects = S3Objects(url)

    def committed(self, shards: int) -> set[int]:
        """As `BuildOutput.committed`."""
        return committed_objects(self.objects, shards)

    def claims(self) -> list[Claim]:
        """As `BuildOutput.claims`."""
        return all_s3_claims(self.objects)

    def release(self, name: str) -> list[int]:
        """As `BuildOutput.release`."""
        shards = [claim.shard for claim in self.claims() if name and claim.name == name]
        self.objects.remove([claim_name(shard) for shard in shards])
        return shards

    def complete(self) -> bool:
        """As `BuildOutput.complete`."""
        return self.objects.exists(MANIFEST)
