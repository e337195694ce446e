"""A cache on the hub has a card with what it was made from and its licence."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from hostile import change_manifest
from servers import HubServer

from kd.cache_builder.share.push import push
from kd.cache_builder.store.records.manifest import load_manifest
from kd.cache_builder.upkeep.verify import verify
from kd.common.progress import final

pytestmark = pytest.mark.usefixtures("hasty")


def findings(root: Path) -> list[str]:
    return [f"{f.where}: {f.problem}" for f in final(verify(root))]


def test_a_cache_on_the_hub_has_a_card(cache: Path, hub: HubServer, tmp_path: Path):
    final(push(cache, "hf://datasets/us/cache", license="cc-by-4.0", private=True))
    repository = hub.repositories["us/cache"]
    files = repository.files("main")
    assert files is not None
    card = files["README.md"][0].decode()
    assert repository.private
    assert "license: cc-by-4.0" in card.split("---")[1]
    assert "kd train --cache hf://datasets/us/cache" in card
    assert load_manifest(cache).fingerprint in card
    assert repository.messages[-1] == "Add manifest.json"
    mine = b"---\nlicense: mit\n---\nwritten by hand\n"
    repository.commits["f" * 40] = files | {"README.md": (mine, False)}
    repository.branches["main"] = "f" * 40
    final(push(cache, "hf://datasets/us/cache"))
    files = repository.files("main")
    assert files is not None
    assert files["README.md"][0] == mine


def test_a_cache_with_a_card_beside_it_is_sound_and_without_a_licence_it_says_so(cache: Path, tmp_path: Path):
    from kd.cache_builder.share.dataset_card import dataset_card

    shutil.copytree(cache, tmp_path / "clone")
    card = dataset_card(cache, "hf://datasets/us/cache")
    assert "license: other\nlicense_name: not-stated" in card
    assert "**not stated**" in card.replace("**Not", "**not")
    (tmp_path / "clone" / "README.md").write_text(card)
    (tmp_path / "clone" / ".gitattributes").write_text("*.parquet filter=lfs")
    (tmp_path / "clone" / ".git").mkdir()
    (tmp_path / "clone" / ".git" / "HEAD").write_text("ref: refs/heads/main")
    assert findings(tmp_path / "clone") == []
    (tmp_path / "clone" / "examples" / "README.md").write_text("not here")
    assert findings(tmp_path / "clone") == ["examples/README.md: a file that no commit knows"]


def test_names_of_strangers_are_no_markup_in_a_card(cache: Path, tmp_path: Path):
    from kd.cache_builder.share.dataset_card import dataset_card

    shutil.copytree(cache, tmp_path / "c")
    names = {"teacher": "/home/ann/<script>x", "corpus": "[x](javascript:y)|`z`\n# b\x1b]0;", "split": "<i>"}
    change_manifest(tmp_path / "c", lambda d: d["provenance"].update(names))
    card = dataset_card(tmp_path / "c", "https://u:p@host/c?sig=abc", "<b>`")
    body = card.split("---", 2)[2].replace("\\](", "")
    assert not any(
        text in body for text in ("<script", "<i>", "<b>", "](javascript", "\x1b", "/home", "u:p@", "sig=abc")
    )
    assert "# Soft targets of &lt;script&gt;x on" in body
