"""Write docs/models.md from what happens to a tiny random model of every family: `python scripts/write_models.py`.

It takes three minutes. Rows are those of tests/family_rows.py; tests/test_models_page.py runs them again and compares the page.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import transformers  # noqa: E402
from family_outcomes import Outcome, outcome_of, require_right  # noqa: E402
from family_rows import ROWS, VOCABULARY, Row  # noqa: E402

PAGE = ROOT / "docs" / "models.md"
HEAD = """# Models

Which families of models can be teachers and students. Every line below was tried with a random model of two layers:

- **Teacher.** The cache's top-8 log-probabilities of three texts of different lengths, scored in one padded batch, agree with the
  model's own logits of each text alone, in float64, to 5e-5 nats. Our output layer computes in float32.
- **Student.** Loss and gradient of a first step under `kl` and under `uld` agree with autograd through the model's own forward
  pass, to 1e-6 of the loss and 1e-5 of the largest gradient.

Where a family's operators know no float64 (most mixtures of experts), both sides computed their hidden states in float32.

A family that is not listed is no exception: whatever transformers loads is tried on four tokens before it is used, and is refused
where hidden states times the output layer are not its own logits.

## What models do to their logits

`logits = cap * tanh(scale * (hidden @ W + b) / cap)`. The scale and the cap are read from the model by the names that families
give to them (`logit_scale`, `logits_scaling`, `lm_head_multiplier`, `final_logit_softcapping`, …). Names alone prove nothing, so
the numbers are proven on four tokens: as they are, where the cap bends most, and amplified. They are in the cached values, in
every loss and its gradient, and in every score of `kd eval`. Generation is the model's own. A `final_logits_bias` (BART,
Marian, …) is added, columns that a model drops (Inkling) or masks (Chameleon) are never predicted. Layers between the body and
the output layer (the decoders of ModernBERT, BERT, RoBERTa and their kin) are part of the body, and learn with it.

## Families that work

| family | model type | logits | hidden states |
|---|---|---|---|
"""
MIDDLE = """
## Families that are refused

| family | model type | reason |
|---|---|---|
"""
TAIL = """
This page is made by `scripts/write_models.py`; `make test-slow` tries every line again, `make test` some of them.
"""


def line_of(name: str, row: Row, outcome: Outcome) -> str:
    """The page's line of one row."""
    if outcome.refusal:
        return f"| {name} | {row.model_type} | {outcome.refusal} |"
    dtype = str(outcome.dtype).removeprefix("torch.")
    return f"| {name} | {row.model_type} | {_logits(outcome)} | {dtype} |"


def render(lines: dict[str, str]) -> str:
    """The whole page, of a line per row; lines of refused rows have one cell less."""
    works, refused = ([line for line in lines.values() if line.count(" | ") == count] for count in (3, 2))
    return HEAD + "\n".join(works) + "\n" + MIDDLE + "\n".join(refused) + "\n" + TAIL


def lines_of(page: str) -> dict[str, str]:
    """The lines of a page by the name of their row."""
    lines = [line for line in page.splitlines() if line.startswith("| ") and not line.startswith("| family")]
    return {line.split(" | ")[0].removeprefix("| "): line for line in lines}


def _logits(outcome: Outcome) -> str:
    transform, parts = outcome.transform, []
    assert transform is not None
    if transform.scale != 1.0:
        parts.append(f"times {transform.scale:.4g}")
    if transform.cap is not None:
        parts.append(f"soft cap {transform.cap:g}")
    if outcome.bias:
        parts.append("plus a bias")
    if outcome.width < VOCABULARY:
        parts.append("padding dropped")
    return ", ".join(parts) or "plain"


def main() -> None:
    transformers.logging.set_verbosity_error()
    lines = {}
    for name, row in sorted(ROWS.items()):
        outcome = outcome_of(row)
        require_right(outcome)
        lines[name] = line_of(name, row, outcome)
        print(lines[name], file=sys.stderr)
    PAGE.write_text(render(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
