"""Data sets of the hub, through the real `datasets`, from a local folder in the hub's layout."""

from __future__ import annotations

from pathlib import Path

import pytest
from table_files import ARTICLES, PAIRS, targets, write

from kd.common.errors import DataError
from kd.data.rows.wikitext import WIKITEXT_ID, WIKITEXT_REVISION, wikitext_articles
from kd.data.sources import load_corpus

README = """---
configs:
- config_name: {config}
  data_files:
  - split: train
    path: {config}/train-*
  - split: validation
    path: {config}/validation-*
---
"""


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """`hub(id, config, {split: rows})` writes a data set where `datasets.load_dataset(id)` finds it."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)

    def put(name: str, config: str, splits: dict[str, list[dict]]) -> None:
        for split, rows in splits.items():
            write(tmp_path / name / config / f"{split}-00000-of-00001.parquet", rows)
        (tmp_path / name / "README.md").write_text(README.format(config=config))

    return put


def test_wikitext_2_loads_through_datasets(hub):
    lines = [{"text": line} for line in ARTICLES.splitlines(keepends=True)]
    hub(WIKITEXT_ID, "wikitext-2-raw-v1", {"train": lines, "validation": [{"text": " Only this . \n"}]})
    train = load_corpus("wikitext-2")
    assert train.examples == tuple(wikitext_articles(ARTICLES.splitlines(keepends=True), "wikitext-2", "train"))
    assert train.source == {"source": WIKITEXT_ID, "config": "wikitext-2-raw-v1", "revision": WIKITEXT_REVISION}
    assert targets(load_corpus("wikitext-2:validation")) == ["Only this .\n"]


def test_a_hub_id_with_config_and_revision_loads_through_datasets(hub):
    hub("owner/set.v1", "plain.en", {"train": PAIRS, "validation": PAIRS[:1]})
    corpus = load_corpus("owner/set.v1:plain.en@main", split="validation")
    assert [(e.id, e.prompt, e.target) for e in corpus.examples] == [("owner/set.v1:0", "2+2=", "4")]
    assert corpus.source == {"source": "owner/set.v1", "config": "plain.en", "revision": "main"}


def test_a_branch_of_the_hub_is_recorded_as_its_commit(hub, monkeypatch):
    """All splits of one commit, and a name under which the same rows can be asked for again."""
    from types import SimpleNamespace

    import huggingface_hub

    commit, asked = "c0ffee" * 6 + "c0ff", []

    class Api(huggingface_hub.HfApi):
        def dataset_info(self, repo_id, *, revision=None, **rest):
            asked.append((repo_id, revision))
            return SimpleNamespace(sha=commit)

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    hub("owner/name", "plain", {"train": PAIRS, "validation": PAIRS})
    assert load_corpus("owner/name:plain@v2").source["revision"] == commit
    assert load_corpus("owner/name:plain").source["revision"] == commit
    assert load_corpus(f"owner/name:plain@{'a' * 40}").source["revision"] == "a" * 40
    assert asked == [("owner/name", "v2"), ("owner/name", None)]


def test_a_split_that_the_hub_does_not_have_is_a_clear_error(hub):
    hub("owner/name", "plain", {"train": PAIRS, "validation": PAIRS})
    with pytest.raises(DataError) as caught:
        load_corpus("owner/name:plain", split="test")
    assert "split test" in str(caught.value)


def test_an_unreachable_hub_says_what_was_asked_for_and_offers_a_local_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError) as caught:  # HF_HUB_OFFLINE is set for all tests
        load_corpus("nobody/nothing:config@rev")
    message = str(caught.value)
    assert "nobody/nothing config config revision rev split train" in message
    assert "local file" in message
