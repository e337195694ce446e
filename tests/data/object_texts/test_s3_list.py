"""Texts in an S3 store have the names, order and ids of the same files on this disk, and every wrong address says what is wrong."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import s3fs
from table_files import PAIRS, write

from kd.common.errors import DataError
from kd.common.extras import MissingPackageError
from kd.data.left_out import LeftOut
from kd.data.rows.file_list import list_files
from kd.data.sources import load_corpus
from kd.data.text_stream import in_memory

TYPES = (".txt", ".jsonl", ".json")
NAMES = [
    "b/z.txt",
    "a.txt.gz",
    "C.TXT",
    "c-d/x.jsonl",
    "c/x.jsonl",
    "notes.md",
    "b/._x.txt",
    ".git/config.txt",
    "b/x,y.txt",
]


@pytest.fixture
def both(s3, tmp_path: Path) -> Path:
    """The same files in a folder, and below s3://shared/texts; beside them what no spec may take for one of them."""
    store = s3fs.S3FileSystem(skip_instance_cache=True)
    for name in NAMES:
        (tmp_path / "texts" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "texts" / name).write_text(name)
        store.pipe(f"shared/texts/{name}", name.encode())
    store.pipe("shared/texts-of-others/1.txt", b"1")
    store.pipe("shared/texts/", b"")  # what some tools put for a folder
    s3.log.clear()
    return tmp_path


def names(spec: str, left_out: LeftOut) -> list[str]:
    files = list_files(spec, TYPES, left_out)
    assert files is not None
    return [files.name(file) for file in files.files]


def test_a_spec_names_the_same_files_in_a_store_and_on_this_disk(both: Path) -> None:
    specs = [
        "@",
        "@/",
        "@/*.txt*",
        "@/*/*.txt",
        "@/**/*.txt",
        "@/**/x.jsonl",
        "@/[bc]*",
        "@/b/?.txt",
        "@/b,@/c/x.jsonl",
    ]
    specs += ["@/c/x.jsonl", "@/c-d/x.jsonl,@/a.txt.gz", "@/b/x,y.txt,@/b/z.txt", "@/c*/*.jsonl, @/b"]
    for spec in specs:
        here, there = LeftOut(), LeftOut()
        assert names(spec.replace("@", "s3://shared/texts"), there) == names(
            spec.replace("@", f"{both}/texts"), here
        ), spec
        if "*" not in spec:
            assert there.counts == here.counts


def test_what_a_store_holds_besides_is_counted(both: Path) -> None:
    left_out = LeftOut()
    assert len(names("s3://shared", left_out)) == 7
    assert left_out.counts == {"other_files": 1, "hidden_files": 2}


def test_a_wrong_address_is_refused_in_words(both: Path) -> None:
    wrong = {
        "s3://no-such-bucket/texts": "there is no such bucket",
        "s3://no-such-bucket/*.txt": "there is no such bucket",
        "s3://shared/nothing": "there is no such object",
        "s3://shared/texts/*.csv": "no object matches",
        "s3://shared/b,texts/c": "there is no such object",
        "s3://": "names no bucket",
        "s3://sha*/x": "names no bucket",
        "s3://shared/texts/notes.md": "unknown file type",
        "s3://shared/texts/b,s3://shared/texts/b/z.txt": "a file is read twice",
        "texts.txt,s3://shared/texts": "not from this address",
    }
    for spec, what in wrong.items():
        with pytest.raises(DataError, match=what):
            load_corpus(spec)


def test_a_store_that_nobody_may_read_is_refused_with_what_to_do(both: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    with pytest.raises(DataError, match="no credentials") as caught:
        load_corpus("s3://shared/texts")
    assert "FSSPEC_S3_ANON" in str(caught.value)


def test_a_store_at_which_nobody_listens_is_named(s3, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kd.data.object_texts.s3_files.REPEATS", 1)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(DataError, match="the object store cannot be read") as caught:
        load_corpus("s3://shared/texts")
    assert "127.0.0.1:9" in str(caught.value)


def test_without_s3fs_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(MissingPackageError, match=r"s3:// needs s3fs"):
        load_corpus("s3://shared/texts")


def test_a_text_of_several_pages_of_keys_is_listed_whole(both: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = names("s3://shared/texts", LeftOut())
    monkeypatch.setattr("kd.data.object_texts.s3_list.PAGE_KEYS", 2)
    assert names("s3://shared/texts", LeftOut()) == whole


def test_a_corpus_in_a_store_is_that_of_the_folder(s3, tmp_path: Path) -> None:
    store = s3fs.S3FileSystem(skip_instance_cache=True)
    for name in ("a.jsonl", "b.csv", "c.parquet", "d.tsv", "e/f.jsonl"):
        (tmp_path / "t" / name).parent.mkdir(parents=True, exist_ok=True)
        store.pipe(f"shared/t/{name}", write(tmp_path / "t" / name, PAIRS).read_bytes())
    here, there = load_corpus(str(tmp_path / "t")), load_corpus("s3://shared/t")
    assert there.examples == here.examples
    assert (there.kind, there.source, in_memory(there).left_out.counts) == (here.kind, here.source, {})
