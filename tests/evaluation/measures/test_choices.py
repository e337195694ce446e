"""Rank classification against a plain float64 log-softmax of the whole model, and laws that need no twin."""

from __future__ import annotations

import copy
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from kd.common.errors import DataError
from kd.common.progress import final
from kd.data.corpus import Corpus
from kd.data.rows.example import Example
from kd.data.tokenizing.block_config import BlockConfig
from kd.data.tokenizing.text_tokens import TextTokens
from kd.evaluation.measures.choices import (
    Question,
    choices_of,
    evaluate_choices,
    first_best,
    right_answer,
    tokenize_options,
)
from kd.evaluation.scoring.reading_options import ReadingOptions
from kd.models.tokenizer import load_tokenizer

ARCHITECTURES = {"causal": AutoModelForCausalLM, "encoder-decoder": AutoModelForSeq2SeqLM}

QUIZ = (
    Example(
        "q/0", "to the river", "Where did the fox go?", "place", choices=("to the river", "home", "to Monday"), answer=0
    ),
    Example("q/1", "fog", "What was there on Wednesday?", "weather", choices=("ships", "fog"), answer=1),
    Example(
        "q/2",
        "it stopped",
        "It rained for a day and a night, and then",
        "weather",
        choices=("the fox rained", "it stopped", "bells", "2, 4, 8"),
        answer=1,
    ),
    Example(
        "q/3",
        "the baker",
        "Who sold the bread?",
        "place",
        choices=("the keeper", "the baker", "naïve éclairs"),
        answer=1,
    ),
    Example(
        "q/4", "seven", "How many ships were there on Monday?", "weather", choices=("seven", "five", "1.5"), answer=0
    ),
)


def quiz(*examples: Example) -> Corpus:
    return Corpus("quiz", "test", "pairs", examples or QUIZ, {})


@pytest.fixture(scope="module", params=list(ARCHITECTURES))
def case(request, model_dir: Path, t5_dir: Path):
    """A model, the same in float64, and its tokenizer."""
    folder = model_dir if request.param == "causal" else t5_dir
    load = ARCHITECTURES[request.param].from_pretrained
    models = [load(folder, dtype=dtype).eval() for dtype in (torch.float32, torch.float64)]
    return *models, load_tokenizer(str(folder))


def option_nats(model64, tokenizer, example: Example) -> list[float]:
    """Each option by itself through the model's own forward, all that can be is left to the model."""
    encode = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]  # noqa: E731
    found = []
    for option in example.choices:
        ids = encode(option)
        with torch.no_grad():
            if model64.config.is_encoder_decoder:
                prompt = [*encode(example.prompt), tokenizer.eos_token_id]
                logits = model64(input_ids=torch.tensor([prompt]), labels=torch.tensor([ids])).logits[0]
            else:
                prompt = [tokenizer.bos_token_id, *encode(example.prompt + "\n")]
                logits = model64(input_ids=torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
        log_q = logits.log_softmax(dim=-1)
        found.append(float(log_q[torch.arange(len(ids)), torch.tensor(ids)].sum()))
    return found


def test_option_sums_equal_a_plain_float64_log_softmax(case):
    model, model64, tokenizer = case
    result = final(evaluate_choices(model, tokenizer, quiz()))
    for question, nats in zip(result.questions, result.option_nats, strict=True):
        # a float32 forward pass against float64: sums of some 30 nats carry about 1e-6 of relative error per layer
        assert nats == pytest.approx(option_nats(model64, tokenizer, question.example), rel=2e-5, abs=1e-4)


def test_predictions_and_accuracies_follow_from_the_sums(case):
    model, model64, tokenizer = case
    result = final(evaluate_choices(model, tokenizer, quiz()))
    hits = {"accuracy": 0, "accuracy_sum": 0, "accuracy_chars": 0}
    for number, example in enumerate(QUIZ):
        nats = np.array(option_nats(model64, tokenizer, example))
        tokens = [len(tokenizer(o, add_special_tokens=False)["input_ids"]) for o in example.choices]
        assert result.predictions[number] == np.argmax(nats / tokens)
        hits["accuracy"] += int(np.argmax(nats / tokens) == example.answer)
        hits["accuracy_sum"] += int(np.argmax(nats) == example.answer)
        hits["accuracy_chars"] += int(np.argmax(nats / [len(o) for o in example.choices]) == example.answer)
    assert {name: result.estimates[name].value for name in hits} == {name: n / len(QUIZ) for name, n in hits.items()}


@pytest.mark.parametrize("tokens_per_batch", [1, 60, 10**6])
def test_sums_do_not_depend_on_the_batch_or_the_order(case, tokens_per_batch):
    model, _, tokenizer = case
    expected = final(evaluate_choices(model, tokenizer, quiz()))
    found = final(
        evaluate_choices(model, tokenizer, quiz(*QUIZ[::-1]), reading=ReadingOptions(tokens_per_batch=tokens_per_batch))
    )
    assert found.predictions.tolist() == expected.predictions.tolist()[::-1]
    for ours, theirs in zip(found.option_nats, expected.option_nats[::-1], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)  # other batch shapes sum float32 products in another order
    assert found.estimates["accuracy"].stderr == pytest.approx(expected.estimates["accuracy"].stderr)


def test_permuted_options_permute_predictions_and_leave_accuracy(case):
    model, _, tokenizer = case
    expected = final(evaluate_choices(model, tokenizer, quiz()))
    turned = [replace(e, choices=(*e.choices[1:], e.choices[0]), answer=(e.answer - 1) % len(e.choices)) for e in QUIZ]
    found = final(evaluate_choices(model, tokenizer, quiz(*turned)))
    sizes = np.array([len(e.choices) for e in QUIZ])
    assert found.predictions.tolist() == ((expected.predictions - 1) % sizes).tolist()
    for name, estimate in expected.estimates.items():
        assert found.estimates[name].value == estimate.value


def test_the_three_rules_on_numbers_worked_by_hand():
    example = Example("h", "cccc", "?", "hand", choices=("aaaaaa", "b", "cccc"), answer=2)
    options = tuple(np.zeros(n, dtype=np.int32) for n in (3, 1, 4))
    question = Question(example, np.zeros(1, dtype=np.int32), options, 2)
    # per token -2, -4, -1.75; sums -6, -4, -7; per character -1, -4, -1.75
    result = choices_of([question], [np.array([-6.0, -4.0, -7.0])], {})
    assert [result.estimates[n].value for n in ("accuracy", "accuracy_sum", "accuracy_chars")] == [1, 0, 0]
    for answer, expected in ((1, [0, 1, 0]), (0, [0, 0, 1])):
        other = choices_of([replace(question, answer=answer)], [np.array([-6.0, -4.0, -7.0])], {})
        assert [other.estimates[n].value for n in ("accuracy", "accuracy_sum", "accuracy_chars")] == expected


def test_the_encoder_reads_every_prompt_once_and_no_option(t5_dir):
    model = AutoModelForSeq2SeqLM.from_pretrained(t5_dir, dtype=torch.float32).eval()
    tokenizer = load_tokenizer(str(t5_dir))
    read = []

    def watch(_, __, given, ___):
        ids, mask = given["input_ids"], given.get("attention_mask")
        mask = torch.ones_like(ids) if mask is None else mask
        read.extend(tuple(row[m.bool()].tolist()) for row, m in zip(ids, mask, strict=True))

    model.get_encoder().register_forward_hook(watch, with_kwargs=True)
    final(evaluate_choices(model, tokenizer, quiz()))
    encode = lambda text: (*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id)  # noqa: E731
    trials = {(1, 2, 3, 4), (1, 2, 3, 4, 5, 6, 7), (15, 16, 17)}  # what prove the model's parts and its cache
    assert Counter(row for row in read if row not in trials) == Counter(encode(e.prompt) for e in QUIZ)


def test_the_encoder_decoders_separator_and_the_prompts_white_space_change_nothing(t5_dir):
    model, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(t5_dir).eval(), load_tokenizer(str(t5_dir))
    expected = final(evaluate_choices(model, tokenizer, quiz()))
    found = final(evaluate_choices(model, tokenizer, quiz(), reading=ReadingOptions(separator=" | ", bos=False)))
    assert all(np.array_equal(a, b) for a, b in zip(found.option_nats, expected.option_nats, strict=True))


def test_ties_go_to_the_first_option(case):
    model, _, tokenizer = case
    uniform = copy.deepcopy(model)
    torch.nn.init.zeros_(uniform.get_output_embeddings().weight)
    result = final(evaluate_choices(uniform, tokenizer, quiz()))
    assert result.predictions.tolist() == [0] * len(QUIZ)  # every token costs ln V: all means are equal
    twins = [replace(e, choices=(e.choices[0], e.choices[0]), answer=1) for e in QUIZ]
    assert final(evaluate_choices(model, tokenizer, quiz(*twins))).predictions.tolist() == [0] * len(QUIZ)


@pytest.mark.parametrize(
    ("scores", "expected"),
    [([-1.0, -1.0], 0), ([-2.0, -1.0], 1), ([-1.0 - 1e-9, -1.0], 0), ([-3.0, -1.001, -1.0], 2), ([0.0, 0.0, -1.0], 0)],
)
def test_first_best(scores, expected):
    assert first_best(np.array(scores)) == expected


def test_examples_without_choices_are_skipped_and_counted(case):
    model, _, tokenizer = case
    others = [
        Example("x/0", "free text", "Say something"),
        Example("x/1", "alone", "Only one", choices=("alone",), answer=0),
        Example("x/2", "unknown", "No answer", choices=("a", "b")),
    ]
    result = final(evaluate_choices(model, tokenizer, quiz(others[0], *QUIZ, *others[1:])))
    plain = final(evaluate_choices(model, tokenizer, quiz()))
    assert result.skipped == 3
    assert result.estimates["accuracy"].n == len(QUIZ)
    assert result.documents.digest == plain.documents.digest
    with pytest.raises(DataError, match="no example has choices"):
        final(evaluate_choices(model, tokenizer, quiz(*others)))


def test_the_answer_is_where_the_target_stands_unless_it_is_said():
    assert [right_answer(e) for e in QUIZ] == [right_answer(replace(e, answer=None)) for e in QUIZ]
    with pytest.raises(DataError, match="not one of the choices"):
        right_answer(replace(QUIZ[0], answer=3))


def test_accuracy_of_a_task_and_their_mean_equal_the_formulas(case):
    model, _, tokenizer = case
    result = final(evaluate_choices(model, tokenizer, quiz()))
    hits = {"place": [], "weather": []}
    for example, chosen in zip(QUIZ, result.predictions, strict=True):
        hits[example.task].append(float(chosen == example.answer))
    variance = {}
    for task, found in hits.items():
        estimate = result.estimates[f"accuracy/{task}"]
        share = np.mean(found)
        variance[task] = share * (1 - share) / (len(found) - 1)  # of a share, with the unbiased n - 1
        assert (estimate.value, estimate.n) == (share, len(found))
        assert estimate.stderr == pytest.approx(math.sqrt(variance[task]))
    mean = result.estimates["accuracy_mean_of_tasks"]
    assert mean.value == pytest.approx(np.mean([np.mean(h) for h in hits.values()]))
    assert mean.stderr == pytest.approx(math.sqrt(sum(variance.values())) / 2)
    everything = result.estimates["accuracy"]
    share = np.mean(hits["place"] + hits["weather"])
    assert everything.stderr == pytest.approx(math.sqrt(share * (1 - share) / (len(QUIZ) - 1)))


def test_a_task_of_one_example_has_no_error(case):
    model, _, tokenizer = case
    result = final(evaluate_choices(model, tokenizer, quiz(*QUIZ[:3])))
    assert result.estimates["accuracy/place"].stderr is None
    assert result.estimates["accuracy_mean_of_tasks"].stderr is None
    assert result.estimates["accuracy/weather"].stderr is not None


def test_a_long_prompt_loses_its_beginning_alike_for_all_options(case):
    model, _, tokenizer = case
    causal = not model.config.is_encoder_decoder
    long = replace(QUIZ[2], prompt="It rained for a day and a night. " * 12 + QUIZ[2].prompt)
    long = replace(long, choices=("2, 4, 8", "it stopped", "it"))
    result = final(evaluate_choices(model, tokenizer, quiz(long, *QUIZ[3:]), reading=ReadingOptions(seq_len=32)))
    assert result.prompts_cut == 1
    context = result.questions[0].context_ids
    longest = max(len(ids) for ids in result.questions[0].option_ids)
    assert longest > len(result.questions[0].option_ids[-1])
    assert len(context) == 32 - longest * causal
    encode = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]  # noqa: E731
    if causal:
        whole = encode(long.prompt + "\n")
        assert context.tolist() == [tokenizer.bos_token_id, *whole[1 - len(context) :]]
    else:
        assert context.tolist() == [*encode(long.prompt), tokenizer.eos_token_id][-32:]


@pytest.mark.parametrize(("options", "reason"), [(("", "fog"), "no tokens"), (("fog " * 40, "fog"), "longer than")])
def test_options_that_cannot_be_scored_name_their_example(model_dir, tokenizer, teacher, options, reason):
    with pytest.raises(DataError, match=reason) as error:
        final(evaluate_choices(teacher, tokenizer, quiz(QUIZ[0], replace(QUIZ[1], choices=options, answer=1))))
    assert error.value.details["where"] == "example q/1"


def test_progress_counts_option_tokens_and_ends_with_the_result(case):
    model, _, tokenizer = case
    steps = list(evaluate_choices(model, tokenizer, quiz(), reading=ReadingOptions(tokens_per_batch=50)))
    total = sum(len(tokenizer(o, add_special_tokens=False)["input_ids"]) for e in QUIZ for o in e.choices)
    assert [s.done for s in steps] == sorted(s.done for s in steps)
    assert steps[-1].done == steps[-1].total == total
    assert [s.result for s in steps[:-1]] == [None] * (len(steps) - 1)


@pytest.mark.parametrize("name", ["tokenizers/gpt2", "weights/stories260K", "tokenizers/t5"])
@pytest.mark.parametrize("separator", ["\n", " ", ""])
def test_every_option_is_the_joint_text_after_one_context(shared: Path, name: str, separator: str):
    words = TextTokens(load_tokenizer(str(shared / name)))
    example = Example("q", "yes", "Is the sky un", choices=("yes", "no", "happy", "not at all"))
    context, options = tokenize_options(example, words, BlockConfig(separator=separator))
    for option, ids in zip(example.choices, options, strict=True):
        whole = words.tokenizer(example.prompt + separator + option, add_special_tokens=False)["input_ids"]
        bos = [words.bos] if words.bos is not None else []
        assert [*context, *ids] == [*bos, *whole]
        assert len(ids) > 0


def test_options_after_a_space_have_the_space(shared: Path):
    words = TextTokens(load_tokenizer(str(shared / "tokenizers/gpt2")))
    example = Example("q", "yes", "Is it?", choices=("yes", "no"))
    _, options = tokenize_options(example, words, BlockConfig(separator=" "))
    assert [words.tokenizer.decode(ids) for ids in options] == [" yes", " no"]
