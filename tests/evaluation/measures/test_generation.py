"""Greedy answers against an argmax loop of our own, and laws that need no twin."""

from __future__ import annotations

import copy
import math
import random
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
from kd.evaluation.answers.answer_decoding import GREEDY, Sampling, gumbel_noise, written_answers
from kd.evaluation.measures.generation import cut_at, evaluate_generation, generation_of
from kd.evaluation.scoring.reading_options import ReadingOptions
from kd.models.tokenizer import load_tokenizer, vocabulary_size

ARCHITECTURES = {"causal": AutoModelForCausalLM, "encoder-decoder": AutoModelForSeq2SeqLM}

PROMPTS = (
    "Where did the fox go?",
    "What was there on Wednesday?",
    "It rained for a day and a night, and then",
    "Who?",
    "The fox, the keeper and the baker met once, by accident, on a bridge",
    "How many ships were there on Monday?",
)
PAIRS = tuple(
    Example(f"p/{i}", "to the river", prompt, ("place", "weather")[i % 2]) for i, prompt in enumerate(PROMPTS)
)


def corpus(*examples: Example) -> Corpus:
    return Corpus("pairs", "test", "pairs", examples or PAIRS, {})


@pytest.fixture(scope="module", params=list(ARCHITECTURES))
def case(request, model_dir: Path, t5_dir: Path):
    """A model and its tokenizer; some answers end, others do not."""
    folder = model_dir if request.param == "causal" else t5_dir
    model = ARCHITECTURES[request.param].from_pretrained(folder, dtype=torch.float32).eval()
    return model, load_tokenizer(str(folder))


def prompt_ids(tokenizer, model, prompt: str) -> list[int]:
    encode = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]  # noqa: E731
    if model.config.is_encoder_decoder:
        return [*encode(prompt), tokenizer.eos_token_id]
    return [tokenizer.bos_token_id, *encode(prompt + "\n")]


def argmax_loop(model, tokenizer, ids: list[int], steps: int, eos_id: int | None) -> list[int]:
    """The whole sequence anew for every token: no cache, no padding, no `generate`."""
    known, new = vocabulary_size(tokenizer), []
    for _ in range(steps):
        with torch.no_grad():
            if model.config.is_encoder_decoder:
                start = model.config.decoder_start_token_id
                logits = model(input_ids=torch.tensor([ids]), decoder_input_ids=torch.tensor([[start, *new]])).logits
            else:
                logits = model(input_ids=torch.tensor([ids + new])).logits
        token = int(logits[0, -1, :known].argmax())
        if token == eos_id:
            return new
        new.append(token)
    return new


def answers_of(
    model, tokenizer, *, eos_id: int | None, steps: int = 12, tokens_per_batch: int = 10**6, sampling: Sampling = GREEDY
):
    contexts = [np.array(prompt_ids(tokenizer, model, p), dtype=np.int32) for p in PROMPTS]
    found = {}
    for numbers, answers in written_answers(
        model,
        contexts,
        max_new_tokens=steps,
        eos_id=eos_id,
        vocabulary_size=vocabulary_size(tokenizer),
        sampling=sampling,
        tokens_per_batch=tokens_per_batch,
    ):
        found |= dict(zip(numbers, answers, strict=True))
    assert sorted(found) == list(range(len(PROMPTS)))
    return [found[i] for i in range(len(PROMPTS))]


def common_token(model, tokenizer) -> int:
    """A token that some greedy answers hold and others do not: as EOS it ends answers at different steps."""
    loops = [argmax_loop(model, tokenizer, prompt_ids(tokenizer, model, p), 12, None) for p in PROMPTS]
    inside = {token: sum(token in loop[1:] for loop in loops) for loop in loops for token in loop}
    return next(token for token, count in inside.items() if 0 < count < len(PROMPTS))


def test_greedy_answers_equal_an_argmax_loop(case):
    model, tokenizer = case
    for eos_id in (tokenizer.eos_token_id, common_token(model, tokenizer), None):
        answers = answers_of(model, tokenizer, eos_id=eos_id)
        loops = [argmax_loop(model, tokenizer, prompt_ids(tokenizer, model, p), 12, eos_id) for p in PROMPTS]
        assert [a.ids.tolist() for a in answers] == loops
        assert [a.ended for a in answers] == [len(loop) < 12 for loop in loops]


@pytest.mark.parametrize("tokens_per_batch", [1, 70, 10**6])
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_batched_answers_equal_those_given_one_by_one(case, tokens_per_batch, temperature):
    model, tokenizer = case
    eos_id, sampling = common_token(model, tokenizer), Sampling(temperature, seed=3)
    alone = answers_of(model, tokenizer, eos_id=eos_id, tokens_per_batch=1, sampling=sampling)
    found = answers_of(model, tokenizer, eos_id=eos_id, tokens_per_batch=tokens_per_batch, sampling=sampling)
    assert [a.ids.tolist() for a in found] == [a.ids.tolist() for a in alone]
    assert {a.ended for a in alone} == {True, False}


def test_sampling_depends_on_its_seed_and_on_no_generator_of_the_process(case):
    model, tokenizer = case
    state = torch.get_rng_state(), random.getstate()

    def run(seed: int, temperature: float = 1.0) -> list[list[int]]:
        found = answers_of(model, tokenizer, eos_id=None, sampling=Sampling(temperature, seed))
        return [a.ids.tolist() for a in found]

    first = run(1)
    assert run(1) == first
    assert run(2) != first
    assert run(1, 0.0) == run(2, 0.0) == [a.ids.tolist() for a in answers_of(model, tokenizer, eos_id=None)]
    assert run(1, 1e-4) == run(1, 0.0)  # the limit of no noise: logits of these models lie further apart
    assert torch.equal(torch.get_rng_state(), state[0])
    assert random.getstate() == state[1]


def test_noise_makes_the_largest_score_a_draw_from_the_softmax():
    scores, temperature, draws = torch.tensor([[1.0, 0.0, -1.0, -torch.inf]]), 2.0, 4000
    noise = gumbel_noise([np.array([5, 6])], Sampling(temperature, seed=0))
    counts = np.bincount([int(noise(None, scores).argmax()) for _ in range(draws)], minlength=4)
    expected = (scores / temperature).softmax(dim=1)[0].numpy()
    assert counts[3] == 0
    assert counts / draws == pytest.approx(expected, abs=4 * math.sqrt(0.25 / draws))  # four standard errors
    with pytest.raises(DataError, match="temperature"):
        Sampling(-1.0)


def test_a_prompt_that_several_examples_have_is_asked_once_and_is_one_document(case, monkeypatch):
    model, tokenizer = case
    twins = [replace(e, id=f"{e.id}/{n}", references=(f"{n}",)) for e in PAIRS for n in "ab"]
    asked: list[int] = []
    generate = model.generate
    monkeypatch.setattr(model, "generate", lambda **k: (asked.append(len(k["input_ids"])), generate(**k))[1])
    result = final(evaluate_generation(model, tokenizer, corpus(*twins), max_new_tokens=6))
    assert sum(asked) == len(PAIRS)
    assert (
        result.answers[::2]
        == result.answers[1::2]
        == final(evaluate_generation(model, tokenizer, corpus(), max_new_tokens=6)).answers
    )
    assert result.documents.names == tuple(f"{e.id}/a" for e in PAIRS)
    assert result.estimates["f1"].n == len(twins)
    assert len(result.estimates["f1"].influence) == len(PAIRS)


def test_the_order_of_the_examples_changes_no_answer(case):
    model, tokenizer = case
    forth = final(evaluate_generation(model, tokenizer, corpus()))
    back = final(
        evaluate_generation(model, tokenizer, corpus(*PAIRS[::-1]), reading=ReadingOptions(tokens_per_batch=60))
    )
    assert back.answers == forth.answers[::-1]


def test_settings_of_the_model_for_generation_are_set_aside_and_given_back(case):
    model, tokenizer = case
    expected = answers_of(model, tokenizer, eos_id=None)
    other = copy.deepcopy(model)
    other.generation_config.update(repetition_penalty=5.0, no_repeat_ngram_size=1, do_sample=True, top_k=2, num_beams=2)
    own = other.generation_config
    found = answers_of(other, tokenizer, eos_id=None)
    assert [a.ids.tolist() for a in found] == [a.ids.tolist() for a in expected]
    assert other.generation_config is own


def test_ids_the_tokenizer_does_not_have_are_never_chosen(student, tokenizer):
    wild = copy.deepcopy(student)
    width, known = wild.get_output_embeddings().weight.shape[0], vocabulary_size(tokenizer)
    assert width > known
    with torch.no_grad():
        wild.get_output_embeddings().weight[known:] *= 50  # tied to the embedding, whose padded rows are never read
    answers = answers_of(wild, tokenizer, eos_id=None)
    assert max(int(a.ids.max()) for a in answers) < known
    loops = [argmax_loop(wild, tokenizer, prompt_ids(tokenizer, wild, p), 12, None) for p in PROMPTS]
    assert [a.ids.tolist() for a in answers] == loops


def test_a_model_whose_own_answers_are_the_targets_is_always_right(case):
    model, tokenizer = case
    first = final(evaluate_generation(model, tokenizer, corpus(), max_new_tokens=8))
    assert len(set(first.answers)) > 1
    asked = [replace(e, target=a) for e, a in zip(PAIRS, first.answers, strict=True)]
    result = final(evaluate_generation(model, tokenizer, corpus(*asked), max_new_tokens=8))
    assert {n: e.value for n, e in result.estimates.items() if n != "unfinished"} == {
        "exact_match": 1.0,
        "exact_match_mean_of_tasks": 1.0,
        "exact_match/place": 1.0,
        "exact_match/weather": 1.0,
        "f1": 1.0,
        "f1_mean_of_tasks": 1.0,
        "f1/place": 1.0,
        "f1/weather": 1.0,
    }
    assert result.estimates["exact_match"].stderr == 0
    listed = [
        replace(e, target="nothing", references=("nothing", a)) for e, a in zip(PAIRS, first.answers, strict=True)
    ]
    assert (
        final(evaluate_generation(model, tokenizer, corpus(*listed), max_new_tokens=8)).estimates["exact_match"].value
        == 1.0
    )


def test_figures_and_errors_equal_the_formulas():
    answers = ["To the river.", "to a river", "the sea", "to the river", "river", "to the river"]
    result = generation_of(PAIRS, answers, np.array([1.0, 0, 0, 0, 0, 0]), 8, 0)
    found = {name: e.value for name, e in result.estimates.items()}
    assert found == pytest.approx(
        {
            "exact_match": 3 / 6,
            "exact_match/place": 1 / 3,
            "exact_match/weather": 2 / 3,
            "exact_match_mean_of_tasks": 0.5,
            "f1": (4 + 2 / 3) / 6,
            "f1/place": (1 + 0 + 2 / 3) / 3,
            "f1/weather": 1.0,
            "f1_mean_of_tasks": (5 / 9 + 1) / 2,
            "unfinished": 1 / 6,
        }
    )
    assert result.estimates["exact_match"].stderr == pytest.approx(math.sqrt(0.25 / 5))
    assert result.estimates["exact_match/place"].stderr == pytest.approx(math.sqrt(2 / 9 / 2))
    assert result.estimates["f1/weather"].stderr == 0


def test_generate_and_match_counts_examples_with_choices_alone():
    choices = tuple(replace(e, choices=("home", "to the river"), answer=1) for e in PAIRS[:4])
    answers = ["To the river.", "home, I think", "to the river bank", "no idea", "to the river", "home"]
    result = generation_of((*choices, *PAIRS[4:]), answers, np.zeros(6), 8, 0)
    match, none = result.estimates["choice_match"], result.estimates["choice_none"]
    assert (match.value, match.n) == (2 / 4, 4)
    assert (none.value, none.n) == (1 / 4, 4)
    by_task = {m: e for m, e in result.estimates.items() if m.startswith("choice_match/")}
    right = {0: 1.0, 2: 1.0}  # of the four that have choices
    for task in {e.task for e in choices}:
        hits = [right.get(n, 0.0) for n, e in enumerate(choices) if e.task == task]
        assert (by_task[f"choice_match/{task}"].value, by_task[f"choice_match/{task}"].n) == (np.mean(hits), len(hits))
    assert len(by_task) == len({e.task for e in choices})
    assert not [m for m in generation_of(PAIRS, answers, np.zeros(6), 8, 0).estimates if m.startswith("choice_match")]


def test_the_limit_of_an_answer_covers_the_longest_reference(case):
    model, tokenizer = case
    long = "the weather, the price of fish, and bells"
    result = final(evaluate_generation(model, tokenizer, corpus(replace(PAIRS[0], references=("x", long)), PAIRS[1])))
    assert result.max_new_tokens == len(tokenizer(long, add_special_tokens=False)["input_ids"]) + 1 + 8


def test_a_causal_model_stays_within_its_positions(teacher, tokenizer):
    long = replace(PAIRS[0], prompt="It rained for a day and a night. " * 30, target="and then it stopped. " * 30)
    seen: list[int] = []
    hook = teacher.transformer.wpe.register_forward_pre_hook(lambda _, inputs: seen.append(int(inputs[0].max())))
    try:
        result = final(evaluate_generation(teacher, tokenizer, corpus(long, *PAIRS[1:])))
    finally:
        hook.remove()
    assert result.max_new_tokens == 32  # half of its 64 positions
    assert result.prompts_cut == 1
    assert max(seen) < 64
    for wanted in (0, 64):
        with pytest.raises(DataError, match="do not fit the model's positions"):
            final(evaluate_generation(teacher, tokenizer, corpus(), max_new_tokens=wanted))


def test_the_end_of_a_long_prompt_is_what_is_answered(case):
    model, tokenizer = case
    lead = "It rained for a day and a night. " * 20
    lengths = [len(prompt_ids(tokenizer, model, p)) for p in PROMPTS]
    causal = not model.config.is_encoder_decoder
    window = lengths[4] + 8 * causal
    long = replace(PAIRS[4], prompt=lead + PROMPTS[4])
    cut = final(
        evaluate_generation(model, tokenizer, corpus(long), reading=ReadingOptions(seq_len=window), max_new_tokens=8)
    )
    whole = prompt_ids(tokenizer, model, long.prompt)
    kept = ([whole[0]] if causal else []) + whole[(causal - lengths[4]) or len(whole) :]
    assert len(kept) == lengths[4]
    loop = argmax_loop(model, tokenizer, kept, 8, tokenizer.eos_token_id)
    assert cut.answers == (tokenizer.decode(loop, skip_special_tokens=True, clean_up_tokenization_spaces=False),)
    assert cut.prompts_cut == 1


def test_a_stop_text_cuts_answers_where_no_reference_holds_it(teacher, tokenizer):
    plain = final(evaluate_generation(teacher, tokenizer, corpus(), max_new_tokens=12))
    ended = [a.ended for a in answers_of(teacher, tokenizer, eos_id=tokenizer.eos_token_id)]
    open_ends = [text for text, done in zip(plain.answers, ended, strict=True) if not done]
    assert plain.estimates["unfinished"].value == len(open_ends) / len(PAIRS)
    stop = next(c for c in open_ends[0] if c not in PAIRS[0].target and not all(c in text for text in open_ends))
    found = final(evaluate_generation(teacher, tokenizer, corpus(), max_new_tokens=12, stop=stop))
    assert list(found.answers) == [text.partition(stop)[0] for text in plain.answers]
    assert found.estimates["unfinished"].value == sum(stop not in text for text in open_ends) / len(PAIRS)
    assert cut_at("a\nb", "\n", ("x",)) == "a"
    assert cut_at("a\nb", "\n", ("x", "x\ny")) == "a\nb"
    assert cut_at("a\nb", None, ("x",)) == "a\nb"


def test_documents_have_no_prompts_to_answer(teacher, tokenizer, prose):
    with pytest.raises(DataError, match="no prompts"):
        final(evaluate_generation(teacher, tokenizer, prose))


def test_progress_counts_examples_and_ends_with_the_result(case):
    model, tokenizer = case
    steps = list(evaluate_generation(model, tokenizer, corpus(), reading=ReadingOptions(tokens_per_batch=80)))
    assert [s.done for s in steps] == sorted(s.done for s in steps)
    assert steps[-1].done == steps[-1].total == len(PAIRS)
    assert [s.result for s in steps[:-1]] == [None] * (len(steps) - 1)
