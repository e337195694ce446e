"""A plan from a sample: what is counted is exact, what is estimated has its error, and nothing is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from terminal import run_main

import kd
from kd.common.errors import DataError

COUNTED = ("rows", "examples", "shards", "teacher_tokens", "bytes_at_most")


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """200 documents of one line to some blocks, and an empty one."""
    file = tmp_path_factory.mktemp("texts") / "lines.jsonl"
    texts = ["one two three four five " * (1 + i * 7919 % 23) for i in range(200)]
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in [*texts, " "]))
    return file


def plan(lines: Path, **settings: Any) -> dict[str, Any]:
    return kd.plan_cache("demo", data=str(lines), seq_len=32, top_k=8, out=lines.parent / "out", **settings)


@pytest.fixture(scope="module")
def whole_plan(lines: Path) -> dict[str, Any]:
    return plan(lines)


def test_a_sample_of_everything_is_the_plan(lines: Path, whole_plan: dict[str, Any]):
    whole, sampled = whole_plan, plan(lines, plan_sample=500)
    assert {name: sampled[name] for name in COUNTED} == {name: whole[name] for name in COUNTED}
    assert {sampled[f"{name}_error"] for name in COUNTED} == {0}
    assert sampled["left_out"] == whole["left_out"]
    assert sampled["left_out"]["without_text"]["count"] == 1


def test_a_sample_counts_the_text_and_is_off_by_what_it_says(lines: Path, whole_plan: dict[str, Any]):
    whole, sampled = whole_plan, plan(lines, plan_sample=60)
    assert (sampled["text_examples"], sampled["sampled_examples"], sampled["fingerprint"]) == (200, 60, None)
    for name in ("rows", "examples", "teacher_tokens"):
        assert abs(sampled[name] - whole[name]) <= 2 * sampled[f"{name}_error"] + 1
        assert sampled[f"{name}_error"] < 0.1 * whole[name]
    assert plan(lines, plan_sample=60, seed=1)["examples"] != sampled["examples"]
    assert not (lines.parent / "out").exists()


def test_rows_of_pairs_whose_ids_look_like_blocks_belong_to_their_own_example(tmp_path: Path):
    file = tmp_path / "pairs.jsonl"
    rows = [{"id": f"a#{i}" if i else "a", "prompt": "two", "target": "word " * (1 + i % 5)} for i in range(40)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options: dict[str, Any] = {"columns": {"id": "id", "prompt": "prompt", "target": "target"}}
    whole, sampled = (plan(file, **options, plan_sample=n) for n in (None, 40))
    assert {name: sampled[name] for name in COUNTED} == {name: whole[name] for name in COUNTED}


def test_the_command_and_a_file_of_settings_say_the_same(lines: Path, tmp_path: Path):
    config = tmp_path / "plan.yaml"
    config.write_text(f"teacher: demo\ndata: {lines}\nseq_len: 32\ntop_k: 8\nplan_sample: 60\nout: {tmp_path / 'c'}\n")
    printed = run_main("cache", "plan", "--config", str(config), "--json")
    by_file, by_call = json.loads(printed.stdout), plan(lines, plan_sample=60)
    assert {name: by_file[name] for name in COUNTED} == {name: by_call[name] for name in COUNTED}
    said = run_main("cache", "plan", "--config", str(config)).stdout
    assert "judged by 60 of 200 examples" in said
    assert "rows error" in said


def test_what_is_not_tokenised_is_not_sampled(lines: Path):
    with pytest.raises(DataError, match="only a text that is tokenised"):
        plan(lines, plan_sample=60, targets="teacher", columns={"prompt": "text"})
    with pytest.raises(DataError, match=r"plan.sample"):
        plan(lines, plan_sample=29)
