"""HellaSwag's rows and the nanogpt protocol against a plain float64 pass per ending; lm-eval's own: test_harness.py."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from kd import cli as module
from kd.common.errors import DataError
from kd.common.progress import final
from kd.evaluation.measures.hellaswag import PROTOCOLS, evaluate_hellaswag, load_scenes, without_marks
from kd.models.tokenizer import load_tokenizer

ROWS: list[dict[str, Any]] = [
    {
        "activity_label": "Walking",
        "ctx_a": "The fox went to the river.",
        "ctx_b": "the fox",
        "ctx": "The fox went to the river. the fox",
        "label": "1",
        "endings": ["counted ships.", "looked at the fish, and came home.", "is fog.", "rained for a day."],
    },
    {
        "activity_label": "Bells",
        "ctx_a": "[header] How to ring [title] Take a bell.",
        "ctx_b": "",
        "ctx": "[header] How to ring [title] Take a bell.",
        "label": "0",
        "endings": ["[step] Ring it.", "Sell it [substeps] for 3 €.", "Éclairs [title] are sold.", "It stopped."],
    },
    {
        "activity_label": "Ships",
        "ctx_a": "There were seven ships on Monday.",
        "ctx_b": "on tuesday",
        "ctx": "There were seven ships on Monday. on tuesday",
        "label": "3",
        "endings": ["five.", "there were five.", "fog.", "the keeper counted the bells instead, for there was fog."],
    },
]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write(tmp_path, ROWS)


def write(folder: Path, rows: list[dict]) -> Path:
    (folder / "hellaswag").mkdir(exist_ok=True)
    (folder / "hellaswag" / "validation.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


@pytest.fixture(scope="module")
def model(model_dir):
    return AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def model64(model_dir):
    return AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float64).eval()


@torch.no_grad()
def nll_by_hand(model64, tokenizer, context: str, ending: str) -> tuple[float, float]:
    """Section 3.2 of the protocol as written: one row, a mask on the ending, summed and averaged."""
    encode = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]  # noqa: E731
    first, last = encode(context), encode(" " + ending)
    tokens, mask = torch.tensor([first + last]), torch.tensor([0] * len(first) + [1] * len(last))
    logits = model64(tokens).logits[0]
    losses = torch.nn.functional.cross_entropy(logits[:-1], tokens[0, 1:], reduction="none") * mask[1:]
    return float(losses.sum()), float(losses.sum() / mask[1:].sum())


def test_nanogpt_is_the_sum_and_the_mean_of_raw_text(model, model64, tokenizer, root):
    result = final(evaluate_hellaswag(model, tokenizer, load_scenes(root), protocol="nanogpt"))
    for number, (row, nats) in enumerate(zip(ROWS, result.nats, strict=True)):
        found = [nll_by_hand(model64, tokenizer, row["ctx"], ending) for ending in row["endings"]]
        assert -nats == pytest.approx([total for total, _ in found], abs=1e-4)  # float32 sums of peaked logits
        assert result.chosen["acc_nanogpt"][number] == int(np.argmin([total for total, _ in found]))
        assert result.chosen["acc_norm_nanogpt"][number] == int(np.argmin([mean for _, mean in found]))
    hits = [int(result.chosen["acc_norm_nanogpt"][i] == int(row["label"])) for i, row in enumerate(ROWS)]
    share = sum(hits) / 3
    estimate = result.estimates["acc_norm_nanogpt"]
    assert estimate.value == pytest.approx(share)
    assert estimate.n == 3
    assert estimate.stderr == pytest.approx(math.sqrt(share * (1 - share) / 2))


def test_published_counts_round_to_the_published_shares():
    """GPT-2 (124M): 2,871 and 2,967 of 10,042 rows; the standard error that comes with them is half a point."""
    from kd.evaluation.statistics.estimates import Documents

    documents = Documents.of_examples([str(i) for i in range(10042)], "pairs")
    for count, published in ((2871, 0.2859), (2967, 0.2955)):
        estimate = documents.ratio((np.arange(10042) < count).astype(float), np.ones(10042))
        assert round(estimate.value, 4) == published
        assert estimate.stderr == pytest.approx(0.0045, abs=1e-4)


def test_the_protocols_share_no_metric():
    names = [name for _, norms in PROTOCOLS.values() for name in norms]
    assert len(names) == len(set(names)) == 5


def test_harness_words_a_scene_as_lm_eval(model, tokenizer, root):
    asked = final(evaluate_hellaswag(model, tokenizer, load_scenes(root), protocol="harness")).asked
    assert asked[0].context == "Walking: The fox went to the river. The fox"
    assert asked[1].context.startswith("Bells: How to ring. Take")
    assert asked[1].endings == (" Ring it.", "Sell it for 3 €.", "Éclairs. are sold.", "It stopped.")


def test_rows_that_are_joined_already_are_counted(model, tokenizer, tmp_path):
    joined = [{k: v for k, v in row.items() if k not in ("ctx_a", "ctx_b")} for row in ROWS]
    scenes = load_scenes(write(tmp_path, joined))
    assert [s.parts for s in scenes.rows] == [None] * 3
    result = final(evaluate_hellaswag(model, tokenizer, scenes, protocol="harness"))
    assert result.rows_joined == 3
    assert result.asked[0].context == "Walking: The fox went to the river. the fox"
    assert final(evaluate_hellaswag(model, tokenizer, scenes, protocol="nanogpt")).rows_joined == 0


@pytest.mark.parametrize("protocol", list(PROTOCOLS))
def test_the_order_of_endings_moves_the_choice_with_it(model, tokenizer, root, protocol):
    scenes = load_scenes(root)
    turned = replace(scenes, rows=tuple(replace(s, endings=s.endings[::-1], answer=3 - s.answer) for s in scenes.rows))
    one, other = (final(evaluate_hellaswag(model, tokenizer, s, protocol=protocol)) for s in (scenes, turned))
    for name, chosen in one.chosen.items():
        assert (3 - other.chosen[name]).tolist() == chosen.tolist()
        assert other.estimates[name].value == one.estimates[name].value


def test_equal_endings_are_a_tie_and_the_first_wins(model, tokenizer, root):
    scenes = load_scenes(root)
    same = replace(scenes, rows=(replace(scenes.rows[0], endings=("is fog.",) * 4, answer=0),))
    result = final(evaluate_hellaswag(model, tokenizer, same, protocol="harness"))
    assert [found.tolist() for found in result.chosen.values()] == [[0]] * 3


def test_a_context_that_does_not_fit_is_cut_and_counted(model, tokenizer, root):
    scenes = load_scenes(root)
    longest = replace(scenes.rows[0], context="The fox went down to the river. " * 20 + scenes.rows[0].context)
    result = final(evaluate_hellaswag(model, tokenizer, replace(scenes, rows=(longest, *scenes.rows[1:]))))
    assert result.contexts_cut == 1
    assert {len(t.context_ids) + len(t.target_ids) for t in result.asked[0].texts} == {65}  # 64 positions, one not fed


def test_nanogpt_refuses_an_encoder_decoder(t5_dir, root):
    t5 = AutoModelForSeq2SeqLM.from_pretrained(t5_dir, dtype=torch.float32).eval()
    with pytest.raises(DataError, match="causal models"):
        final(evaluate_hellaswag(t5, load_tokenizer(str(t5_dir)), load_scenes(root), protocol="nanogpt"))
    result = final(evaluate_hellaswag(t5, load_tokenizer(str(t5_dir)), load_scenes(root), protocol="harness"))
    assert set(result.estimates) == {"acc_harness", "acc_norm_harness", "acc_bytes_harness"}


def test_an_unknown_protocol_lists_both(model, tokenizer, root):
    with pytest.raises(DataError, match="unknown protocol 'nanogtp'") as error:
        final(evaluate_hellaswag(model, tokenizer, load_scenes(root), protocol="nanogtp"))
    assert error.value.details["known"] == "harness, nanogpt"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"label": "7"}, "not one of the endings"),
        ({"endings": "one text"}, "not a list"),
        ({"ctx": " "}, "not text"),
    ],
)
def test_rows_that_cannot_be_asked_name_their_place(tmp_path, change, reason):
    with pytest.raises(DataError, match=reason) as error:
        load_scenes(write(tmp_path, [ROWS[0], ROWS[1] | change]))
    assert str(error.value.details["where"]).endswith("line 2")


def test_unlabelled_rows_are_left_out_and_counted(tmp_path):
    without = [ROWS[0] | {"label": label} for label in ("", None, float("nan"))]
    scenes = load_scenes(write(tmp_path, [*without, *ROWS]))
    assert (len(scenes.rows), scenes.unlabelled) == (3, 3)
    with pytest.raises(DataError, match="no row has an answer"):
        load_scenes(write(tmp_path, [ROWS[0] | {"label": ""}]))


def test_marks_go_and_text_without_them_stays():
    assert without_marks("[header] How [title] Go  on [step] x") == " How. Go on x"
    assert without_marks("A plain one.") == "A plain one."


def test_protocols_never_share_a_table_of_the_report(model_dir, root, tmp_path):
    cli = copy.deepcopy(module.cli)  # a command that has run keeps its help option, and with it another help text
    runs = []
    for protocol in PROTOCOLS:
        runs.append(str(tmp_path / protocol))
        arguments = [
            "eval",
            str(model_dir),
            "--tasks",
            "hellaswag",
            "--protocol",
            protocol,
            "--task-root",
            str(root),
            "--device",
            "cpu",
            "--out",
            runs[-1],
        ]
        assert CliRunner().invoke(cli, arguments, catch_exceptions=False).exit_code == 0
    found = CliRunner().invoke(cli, ["report", *runs, "--out", str(tmp_path / "report")], catch_exceptions=False)
    assert found.exit_code == 0
    document = json.loads((tmp_path / "report" / "report.json").read_text())
    assert [c["title"].partition(":")[0] for c in document["comparisons"]] == [
        "hellaswag, nanogpt protocol",
        "hellaswag, harness protocol",
    ]
    assert [sorted(c["best"]) for c in document["comparisons"]] == [
        ["acc_nanogpt", "acc_norm_nanogpt"],
        ["acc_bytes_harness", "acc_harness", "acc_norm_harness"],
    ]
