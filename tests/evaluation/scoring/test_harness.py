"""Against lm-evaluation-harness itself: its own task, its own model class, its own results, without the network.

Its `hellaswag.yaml` is read from the installed package; only the data set is replaced by local rows. Models: the real
stories260K, and random ones of GPT-2, GPT-NeoX and T5 shape with the tokenizers of those families.
"""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import lm_eval
import lm_eval.tasks.hellaswag.utils as theirs
import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import AutoModelForCausalLM, GPT2Config, GPTNeoXConfig, T5Config

from kd.common.progress import final
from kd.data.corpus import Corpus
from kd.data.rows.example import Example
from kd.evaluation.measures.choices import evaluate_choices
from kd.evaluation.measures.hellaswag import evaluate_hellaswag, load_scenes, without_marks
from kd.evaluation.scoring.harness import cut_context, encode_pair, harness_window
from kd.evaluation.scoring.reading_options import ReadingOptions
from kd.models.loading import random_model
from kd.models.tokenizer import load_tokenizer

ROWS = 60
NATS = 1e-4
"""Largest difference of a log-probability: sums of some thirty float32 numbers, added in another order."""

SHAPES = {
    "gpt2": (
        "gpt2",
        GPT2Config(n_embd=48, n_layer=2, n_head=2, initializer_range=0.2, n_positions=1024),
    ),
    "gpt-neox": (
        "gpt-neox-20b",  # 50,304 columns, of which the tokenizer knows 50,277
        GPTNeoXConfig(
            vocab_size=50304,
            hidden_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=96,
            initializer_range=0.2,
        ),
    ),
    "t5": (
        "t5",
        T5Config(
            vocab_size=32128,
            d_model=48,
            d_kv=16,
            d_ff=96,
            num_layers=2,
            num_heads=3,
            dropout_rate=0.0,
            decoder_start_token_id=0,
            feed_forward_proj="gated-gelu",
            initializer_factor=2.0,
        ),
    ),
}


def random_case(shape: str, shared: Path):
    name, config = SHAPES[shape]
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = random_model(config, torch.float32).eval()
    return model, load_tokenizer(str(shared / "tokenizers" / name))


@pytest.fixture(scope="module", params=["stories260K", *SHAPES])
def case(request, shared: Path):
    """Model, tokenizer, and lm-eval's own wrapper of both."""
    if request.param == "stories260K":
        folder = str(shared / "weights" / request.param)
        model, tokenizer = (
            AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(),
            load_tokenizer(folder),
        )
    else:
        model, tokenizer = random_case(request.param, shared)
    backend = "seq2seq" if model.config.is_encoder_decoder else "causal"
    return model, tokenizer, HFLM(pretrained=model, tokenizer=tokenizer, backend=backend, batch_size=8, device="cpu")


@pytest.fixture(scope="module")
def split_rows(shared: Path, tmp_path_factory) -> tuple[list[dict], Path]:
    """Shared rows in the hub's columns: `ctx_b` is the last, unfinished sentence, and some have WikiHow's marks again.

    Returned with a folder for `--task-root`.
    """
    rows = []
    with (shared / "tasks" / "hellaswag" / "sample500.jsonl").open(encoding="utf-8") as lines:
        for line, _ in zip(lines, range(ROWS), strict=False):
            row = json.loads(line)
            first, stop, last = row["ctx"].rpartition(". ")
            row |= {"ctx_a": first + stop.strip(), "ctx_b": last, "label": str(row["label"])}
            if row["ind"] % 5 == 0:
                row["ctx_a"] = f"[header] How to [title] {row['ctx_a']} [step] Then  go on."
                row["endings"] = [f"{e} [substeps] Rest. [title] Ünd Ende" for e in row["endings"]]
            row["ctx"] = f"{row['ctx_a']} {row['ctx_b']}"
            rows.append(row)
    root = tmp_path_factory.mktemp("rows")
    (root / "hellaswag").mkdir()
    (root / "hellaswag" / "validation.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return rows, root


def their_run(lm: HFLM, rows: list[dict]):
    """lm-eval's evaluation of its own task on these rows: results, and a sample per row."""

    class Loader(yaml.SafeLoader):
        pass

    Loader.add_constructor("!function", lambda loader, node: getattr(theirs, node.value.partition(".")[2]))
    config = yaml.load((Path(theirs.__file__).parent / "hellaswag.yaml").read_text(), Loader)
    config |= {
        "task": "hellaswag_local",
        "custom_dataset": lambda **_: datasets.DatasetDict({"validation": datasets.Dataset.from_list(rows)}),
        "training_split": None,
        "metric_list": [
            *config["metric_list"],
            {"metric": "acc_bytes", "aggregation": "mean", "higher_is_better": True},
        ],
    }
    with torch.random.fork_rng():
        found = lm_eval.simple_evaluate(
            lm, tasks=[config], task_manager=TaskManager(include_defaults=False), bootstrap_iters=0
        )
    samples = sorted(found["samples"]["hellaswag_local"], key=lambda s: s["doc_id"])
    return found["results"]["hellaswag_local"], samples


def test_hellaswag_agrees_choice_for_choice(case, split_rows):
    model, tokenizer, lm = case
    rows, root = split_rows
    results, samples = their_run(lm, rows)
    ours = final(evaluate_hellaswag(model, tokenizer, load_scenes(root), protocol="harness"))
    assert len(samples) == len(ours.asked) == ROWS
    for sample, asked, nats in zip(samples, ours.asked, ours.nats, strict=True):
        assert [a[0] for a in sample["arguments"]] == [asked.context] * 4
        assert [a[1] for a in sample["arguments"]] == [f" {e}" for e in asked.endings]
        found = np.array([float(r[0]) for r in sample["filtered_resps"]])
        assert np.abs(found - nats).max() < NATS * max(1.0, np.abs(found).max() / 100)
    for metric in ("acc", "acc_norm", "acc_bytes"):
        hits = [s[metric] for s in samples]
        assert hits == (ours.chosen[f"{metric}_harness"] == [s.answer for s in load_scenes(root).rows]).tolist()
        assert ours.estimates[f"{metric}_harness"].value == pytest.approx(results[f"{metric},none"])
    for number, sample in enumerate(samples):  # the hits above could agree by chance, the indices do not
        found = np.array([float(r[0]) for r in sample["filtered_resps"]])
        endings = [a[1][1:] for a in sample["arguments"]]
        lengths = {
            "acc": [1] * 4,
            "acc_norm": [len(e) for e in endings],
            "acc_bytes": [len(e.encode()) for e in endings],
        }
        for metric, length in lengths.items():
            assert int(np.argmax(found / length)) == ours.chosen[f"{metric}_harness"][number]


def test_the_standard_error_is_theirs(shared, split_rows):
    rows, root = split_rows
    model, tokenizer = random_case("gpt2", shared)
    lm = HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=8, device="cpu")
    results, _ = their_run(lm, rows[:20])
    ours = final(evaluate_hellaswag(model, tokenizer, load_scenes(root, 20), protocol="harness"))
    stderr = lm_eval.api.metrics.mean_stderr
    hits = (ours.chosen["acc_norm_harness"] == [a.scene.answer for a in ours.asked]).astype(float).tolist()
    assert ours.estimates["acc_norm_harness"].stderr == pytest.approx(stderr(hits))
    assert np.mean(hits) == pytest.approx(results["acc_norm,none"])


@given(
    st.lists(st.sampled_from(["[title]", " [title]", "[a b]", "[", "]", " ", "  ", "x", "É", ".", "\n", "step"])).map(
        "".join
    )
)
def test_marks_are_removed_as_by_lm_eval(text):
    assert without_marks(text) == theirs.preprocess(text)


CONTEXTS = ["The fox went", "The fox went ", "It rained.\n", "x", "Ships: seven, five  ", "naïve éclairs 😀"]
CONTINUATIONS = [" down to the river", "fog", "\nNext", "  two spaces", "s"]


def test_pairs_become_the_tokens_of_lm_eval(case):
    model, tokenizer, lm = case
    encoder = model.config.is_encoder_decoder
    for context in CONTEXTS:
        for continuation in CONTINUATIONS:
            ours = encode_pair(tokenizer, context, continuation, encoder=encoder)
            assert [ids.tolist() for ids in ours] == list(lm._encode_pair(context, continuation)), (
                context,
                continuation,
            )


def test_the_window_is_that_of_lm_eval(case):
    model, tokenizer, lm = case
    assert harness_window(model.config, tokenizer) == lm.max_length


def test_long_contexts_are_cut_as_by_lm_eval(case):
    model, tokenizer, _ = case
    encoder, window = model.config.is_encoder_decoder, 24
    lm = HFLM(
        pretrained=model,
        tokenizer=tokenizer,
        backend="seq2seq" if encoder else "causal",
        batch_size=4,
        device="cpu",
        max_length=window,
    )
    context = "The fox went down to the river to look at the fish, and every evening it came home. " * 3
    rows = [
        {
            "activity_label": "Fishing",
            "ctx": context,
            "endings": ["it slept.", "it told a story to the keeper."],
            "label": 0,
            "ctx_a": context,
            "ctx_b": "and",
        }
    ]
    scenes = load_scenes_from(rows)
    ours = final(evaluate_hellaswag(model, tokenizer, scenes, protocol="harness", seq_len=window))
    assert ours.contexts_cut == 1
    asked = ours.asked[0]
    requests = [Instance("loglikelihood", {}, (asked.context, f" {e}"), i) for i, e in enumerate(asked.endings)]
    found = [nats for nats, _ in lm.loglikelihood(requests, disable_tqdm=True)]
    assert ours.nats[0] == pytest.approx(found, abs=NATS)
    sizes = {len(t.context_ids) for t in asked.texts}
    assert len(sizes) == (1 if encoder else 2)  # a causal model's options are cut each for itself


def load_scenes_from(rows: list[dict]):
    from kd.evaluation.measures.hellaswag import Scenes, _scene

    return Scenes(tuple(s for i, row in enumerate(rows) if (s := _scene(row, i, "test")) is not None), "test")


def test_a_cut_context_and_its_continuation_fill_the_window():
    ids = np.arange(50, dtype=np.int32)
    assert cut_context(ids, 5, 20, encoder=False).tolist() == list(range(34, 50))  # 16 + 5, the last not fed
    assert cut_context(ids, 5, 20, encoder=True).tolist() == list(range(30, 50))
    assert cut_context(ids, 5, 99, encoder=False).tolist() == ids.tolist()


QUIZ = (
    Example(
        "q/0",
        " to the river",
        "Where did the fox go?",
        "place",
        choices=(" to the river", " home", " to Monday"),
        answer=0,
    ),
    Example("q/1", " fog", "What was there on Wednesday?", "weather", choices=(" ships", " fog"), answer=1),
    Example(
        "q/2",
        " it stopped",
        "It rained for a day and a night, and then",
        "weather",
        choices=(" the fox rained", " it stopped", " bells", " 2, 4, 8"),
        answer=1,
    ),
)


@pytest.mark.parametrize("separator", ["", "\n", " "])
def test_rank_classification_has_the_log_probabilities_of_lm_eval(case, separator):
    model, tokenizer, lm = case
    ours = final(
        evaluate_choices(
            model,
            tokenizer,
            Corpus("quiz", "test", "pairs", QUIZ, {}),
            reading=ReadingOptions(separator=separator),
            encoding="together",
        )
    )
    between = "" if model.config.is_encoder_decoder else separator
    for example, nats in zip(QUIZ, ours.option_nats, strict=True):
        requests = [Instance("loglikelihood", {}, (example.prompt + between, o), 0) for o in example.choices]
        found = [value for value, _ in lm.loglikelihood(requests, disable_tqdm=True)]
        assert nats == pytest.approx(found, abs=NATS)


def test_tokens_apart_are_those_together_where_a_word_begins(case):
    """As in training (no BOS, no separator, options that open with a space): the same log-probabilities again."""
    model, tokenizer, lm = case
    quiz = Corpus("quiz", "test", "pairs", QUIZ, {})
    apart = final(evaluate_choices(model, tokenizer, quiz, reading=ReadingOptions(separator="", bos=False)))
    assert [q.context_ids.tolist() for q in apart.questions] == [lm._encode_pair(e.prompt, " x")[0] for e in QUIZ]
    for question, nats in zip(apart.questions, apart.option_nats, strict=True):
        for option, ids, value in zip(question.example.choices, question.option_ids, nats, strict=True):
            context, continuation = lm._encode_pair(question.example.prompt, option)
            if continuation != ids.tolist():  # sentencepiece marks the beginning of a text: one more token
                assert tokenizer.convert_ids_to_tokens(int(ids[0])).startswith("▁")
                continue
            pair = (("", ""), context, continuation)
            assert value == pytest.approx(lm._loglikelihood_tokens([pair], disable_tqdm=True)[0][0], abs=NATS)
