"""`kd cache show` as a user types it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from terminal import kd, run_kd

from kd.cache_builder.showing import show_cache
from kd.cache_builder.store.readers.reader import CacheReader
from kd.common.shown_text import for_terminal


def test_a_pipe_gets_plain_text(cache: Path) -> None:
    said = kd("cache", "show", cache, 2)
    assert said == for_terminal(str(show_cache(cache, 2))) + "\n"
    assert "\x1b" not in said


def test_a_terminal_gets_shades_and_the_same_words(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import re

    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    said = kd("cache", "show", cache, 2)
    assert "\x1b[30;48;5;" in said
    plain = re.sub(r"\x1b\[[\d;]*m", "", said)
    assert CacheReader(cache)[2].target in plain
    assert "shades of entropy in nats" in plain


def test_json_is_one_document(cache: Path) -> None:
    said = json.loads(kd("cache", "show", cache, "--uncertain", 3, "--json"))
    assert said == json.loads(json.dumps(show_cache(cache, uncertain=3).document))


def test_settings_may_stand_in_a_file(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "show.yaml").write_text(yaml.safe_dump({"surprising": 2, "top": 1}), encoding="utf-8")
    said = json.loads(kd("cache", "show", cache, "--config", tmp_path / "show.yaml", "--json"))
    assert [len(one["token"]["top"]) for one in said["found"]] == [1, 1]


def test_progress_goes_to_stderr(cache: Path) -> None:
    done = run_kd("cache", "show", cache, "--surprising", 1)
    assert "reading 100%" in done.stderr
    assert "reading" not in done.stdout


def test_a_page_is_written_whole(cache: Path, tmp_path: Path) -> None:
    done = run_kd("cache", "show", cache, 1, "--html", tmp_path / "page.html")
    assert "page.html" in done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["page.html"]
    assert (tmp_path / "page.html").read_text().startswith("<!DOCTYPE html>")
