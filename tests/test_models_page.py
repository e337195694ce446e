"""docs/models.md says what happens to a model of every family today."""

from __future__ import annotations

import pytest
from family_outcomes import outcome_of, require_right
from family_rows import ROWS
from test_docs import ROOT, script

PAGE = ROOT / "docs" / "models.md"
FAST = (
    "bart",
    "bert_decoder",
    "bert_not_a_decoder",
    "cohere2",
    "cpmant",
    "encoder-decoder (bert2bert)",
    "fsmt",
    "gemma2",
    "gemma4_text_cap30",
    "gpt2",
    "granite",
    "granitemoe",
    "hyperclovax",
    "llama",
    "llama4_text",
    "mamba",
    "marian",
    "minicpm3",
    "mixtral",
    "modernbert-decoder",
    "mpt_logit_scale",
    "nanochat",
    "phi3",
    "prophetnet",
    "qwen3",
    "recurrent_gemma",
    "roberta_decoder",
    "t5",
    "t5gemma",
    "xlnet",
)
"""Rows of every kind of transform and of refusal, under a second each."""


def require_line(name: str) -> None:
    outcome = outcome_of(ROWS[name])
    require_right(outcome)
    writer = script("write_models")
    line = writer.lines_of(PAGE.read_text(encoding="utf-8"))[name]
    assert writer.line_of(name, ROWS[name], outcome) == line, "run scripts/write_models.py"


@pytest.mark.parametrize("name", FAST)
def test_a_family_is_right_or_refused_as_the_page_says(name: str) -> None:
    require_line(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(ROWS) - set(FAST)))
def test_every_other_family_is_right_or_refused_as_the_page_says(name: str) -> None:
    require_line(name)


def test_the_page_has_a_line_per_row_and_the_words_of_the_script() -> None:
    writer, page = script("write_models"), PAGE.read_text(encoding="utf-8")
    lines = writer.lines_of(page)
    assert set(lines) == set(ROWS)
    assert writer.render({name: lines[name] for name in sorted(lines)}) == page
