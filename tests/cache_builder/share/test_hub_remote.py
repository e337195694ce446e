"""Branches and folders of the hub hold caches of their own, and a pull reads one commit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from servers import HubServer

from kd.cache_builder.share.pull import pull
from kd.cache_builder.share.push import planned_push, push
from kd.common.progress import final

pytestmark = pytest.mark.usefixtures("hasty")
Tree = Callable[[Path], dict[str, bytes]]


def test_branches_and_folders_of_the_hub_hold_caches_of_their_own(
    cache: Path, small: Path, hub: HubServer, tmp_path: Path, tree: Tree
):
    final(push(cache, "hf://datasets/us/both@other"))
    final(push(small, "hf://datasets/us/both/deep/inside"))
    for url, root in (
        ("both@other", cache),
        ("both/deep/inside", small),
        (f"both@{hub.repositories['us/both'].branches['other']}", cache),
    ):
        final(pull(f"hf://datasets/us/{url}", tmp_path / url.replace("/", "-")))
        assert tree(tmp_path / url.replace("/", "-")) == tree(root)


def test_a_push_during_a_pull_does_not_mix_two_states(small: Path, hub: HubServer, tmp_path: Path, tree: Tree):
    final(push(small, "hf://datasets/us/cache"))
    steps = pull("hf://datasets/us/cache", tmp_path / "copy")
    next(steps)
    repository = hub.repositories["us/cache"]
    repository.commits["e" * 40] = {}
    repository.branches["main"] = "e" * 40
    final(steps)
    assert tree(tmp_path / "copy") == tree(small)


def test_a_push_to_the_hub_that_is_only_planned_makes_no_repository(small: Path, hub: HubServer) -> None:
    new = planned_push(small, "hf://datasets/us/planned")
    assert (new.files_there, new.bytes_there) == (0, 0)
    assert planned_push(small, "hf://datasets/us/planned") == new
    final(push(small, "hf://datasets/us/planned"))
    after = planned_push(small, "hf://datasets/us/planned")
    assert (after.files, after.files_there, after.bytes_there) == (0, new.files, new.bytes)
