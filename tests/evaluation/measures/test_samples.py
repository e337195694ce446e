"""Answers to a user's prompts: the same as `generation` gives, shown side by side, and never as markup."""

from __future__ import annotations

import gzip
import json
from html.parser import HTMLParser
from pathlib import Path

import pytest
from click.testing import CliRunner

from kd.cli import cli
from kd.common.errors import DataError
from kd.evaluation.measures.samples import load_prompts, repeated_share
from kd.evaluation.report.page import Sample, markdown_samples
from kd.evaluation.report.writing import write_report
from kd.evaluation.results import load_report

HOSTILE = '<script>alert("x")</script> & </dd></dl><h1>taken</h1> ```` | **b**'


@pytest.fixture(scope="module")
def prompts(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text(f"The fox went\n\nThere were seven ships\n{HOSTILE}\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def reports(tmp_path_factory, prompts: Path, model_dir: Path, student_dirs: list[Path]) -> list[Path]:
    out = tmp_path_factory.mktemp("out")
    words = [
        "eval",
        str(model_dir),
        str(student_dirs[0]),
        "--tasks",
        "samples",
        "--prompts",
        str(prompts),
        "--max-new-tokens",
        "9",
        "--device",
        "cpu",
        "--out",
        str(out),
    ]
    result = CliRunner().invoke(cli, words, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return sorted(out.iterdir())


def test_answers_are_the_greedy_continuation(reports: list[Path], model_dir: Path, teacher64):
    """Token by token in float64, without cache or padding."""
    import torch
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    for sample in load_report(reports[0]).documents["samples"]["samples"][:2]:  # the third is longer than the window
        ids = [tokenizer.bos_token_id, *tokenizer(sample["prompt"])["input_ids"]]
        start = len(ids)
        while len(ids) < start + 9:
            with torch.no_grad():
                ids.append(int(teacher64(torch.tensor([ids])).logits[0, -1, : len(tokenizer)].argmax()))
            if ids[-1] == tokenizer.eos_token_id:
                ids.pop()
                break
        assert sample["got"] == tokenizer.decode(
            ids[start:], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )


def test_figures_describe_and_judge_nothing(reports: list[Path]):
    report = load_report(reports[0])
    figures = report.tasks["samples"]
    assert set(figures) == {"ended", "length", "repeated"}
    assert all(f["better"] is None and f["n"] == 3 for f in figures.values())
    assert figures["length"]["value"] <= 9


class Tags(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.text: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)

    def handle_data(self, data):
        self.text.append(data)


def test_models_stand_side_by_side_and_hostile_text_is_text(reports: list[Path], tmp_path: Path):
    files = write_report(reports, tmp_path)
    page = Tags(files.page.read_text("utf-8"))
    assert "script" not in page.tags
    assert page.tags.count("h1") == 1
    assert page.tags.count("dl") == 3
    assert page.tags.count("dt") == 9  # prompt and two models each
    assert HOSTILE in page.text
    markdown = files.markdown.read_text("utf-8")
    assert markdown.count("The fox went") == 1
    assert "Side by side, samples: prompts.txt" in markdown


def test_a_fence_is_longer_than_any_in_the_text():
    lines = markdown_samples([Sample("a\n`````\n# taken", None, [("m", "x")])]).splitlines()
    fences = [line.strip() for line in lines if line.strip().startswith("``````")]
    assert fences == ["``````text", "``````"]
    inside = lines[lines.index("   ``````text") : lines.index("   ``````")]
    assert "   # taken" in inside


def test_prompts_that_are_asked_take_the_separator_and_show_what_is_expected(tmp_path: Path):
    path = tmp_path / "p.jsonl"
    path.write_text(
        json.dumps({"prompt": "Two and two?", "expected": "four"}) + "\n" + json.dumps({"prompt": "b"}) + "\n"
    )
    found = load_prompts(path)
    assert (found.texts, found.expected, found.continued) == (("Two and two?", "b"), ("four", None), False)
    assert load_prompts(path, 1).texts == ("Two and two?",)
    (tmp_path / "P.JSONL.GZ").write_bytes(gzip.compress(path.read_bytes()))
    assert load_prompts(tmp_path / "P.JSONL.GZ").texts == found.texts


def test_a_prompt_is_a_line_and_no_other_character_ends_it(tmp_path: Path):
    (tmp_path / "p.txt").write_bytes("one\u2028still one\r\n\ntwo\x0cstill two".encode())
    assert load_prompts(tmp_path / "p.txt").texts == ("one\u2028still one", "two\x0cstill two")


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("p.txt", "\n \n", "no prompts"),
        ("p.jsonl", "{", "not JSON"),
        ("p.csv", "prompt\na\n", "not read from such a file"),
        ("p.json", '[{"prompt": "a"}]', "not read from such a file"),
        ("p.jsonl.gz", '{"prompt": "a"}', "cannot read the prompts"),
        ("p.jsonl", "[1]", "holds no prompt"),
        ("p.jsonl", '{"prompt": ""}', "holds no prompt"),
        ("p.jsonl", '{"prompt": "a", "expected": 1}', "holds no prompt"),
    ],
)
def test_a_file_without_prompts_is_refused_with_its_line(tmp_path: Path, name: str, text: str, words: str):
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=words):
        load_prompts(tmp_path / name)


def test_prompts_must_be_given(model_dir: Path):
    with pytest.raises(DataError, match="needs prompts that") as caught:
        CliRunner().invoke(cli, ["eval", str(model_dir), "--tasks", "samples"], catch_exceptions=False)
    assert "--prompts FILE" in str(caught.value)


def test_repetition_is_counted_in_runs_of_four_words():
    assert repeated_share("a b c d") == 0
    assert repeated_share("a b c d a b c d") == pytest.approx(1 / 5)  # abcd bcda cdab dabc abcd
    assert repeated_share("\n" * 13) == pytest.approx(9 / 10)
    assert repeated_share("too short") == 0
