"""Perplexity against a loop over windows with a full softmax in float64, and laws that need no twin."""

from __future__ import annotations

import copy
import json
import math

import numpy as np
import pytest
import torch

from kd.common.errors import DataError
from kd.common.progress import final
from kd.data.sources import load_corpus
from kd.evaluation.measures.perplexity import evaluate_perplexity
from kd.evaluation.scoring.reading_options import ReadingOptions

VOCAB = 400

WINDOW_24 = ReadingOptions(seq_len=24)


def naive_nll(model64, tokenizer, corpus, *, seq_len: int, stride: int, bos: bool = True) -> list[float]:
    """Nats of every scored token: windows begin at multiples of the stride, each scores what is new in it."""
    nats = []
    for example in corpus.examples:
        ids = tokenizer(example.target, add_special_tokens=False)["input_ids"]
        ids = [tokenizer.bos_token_id, *ids] if bos else ids
        scored = 1
        for begin in range(0, len(ids), stride):
            end = min(begin + seq_len, len(ids))
            with torch.no_grad():
                logits = model64(input_ids=torch.tensor([ids[begin:end]])).logits[0, :, :VOCAB]
            log_q = logits.log_softmax(dim=-1)
            for position in range(scored, end):
                nats.append(-float(log_q[position - 1 - begin, ids[position]]))
            scored = end
            if end == len(ids):
                break
    return nats


@pytest.mark.parametrize(("seq_len", "stride"), [(64, 63), (24, 23), (24, 12), (16, 1), (2, 1)])
def test_perplexity_is_exp_of_the_mean_nll_of_a_naive_loop(student, student64, tokenizer, prose, seq_len, stride):
    nats = naive_nll(student64, tokenizer, prose, seq_len=seq_len, stride=stride)
    result = final(
        evaluate_perplexity(student, tokenizer, prose, reading=ReadingOptions(seq_len=seq_len, stride=stride))
    )
    assert result.tokens == len(nats)
    # float32 forward against float64: logits of size 30 carry about 1e-6 relative error, averaged over 200 tokens
    assert result.nll_per_token.value == pytest.approx(np.mean(nats), rel=2e-5)
    assert result.perplexity.value == pytest.approx(math.exp(np.mean(nats)), rel=2e-4)


def test_without_bos_the_first_token_of_a_document_is_not_scored(student, student64, tokenizer, prose):
    nats = naive_nll(student64, tokenizer, prose, seq_len=32, stride=31, bos=False)
    result = final(evaluate_perplexity(student, tokenizer, prose, reading=ReadingOptions(seq_len=32, bos=False)))
    with_bos = final(evaluate_perplexity(student, tokenizer, prose, reading=ReadingOptions(seq_len=32)))
    assert result.tokens == len(nats) == with_bos.tokens - len(prose.examples)
    assert result.nll_per_token.value == pytest.approx(np.mean(nats), rel=2e-5)


def test_a_uniform_model_has_the_vocabulary_as_perplexity_and_padding_does_not_count(student, tokenizer, prose):
    uniform = copy.deepcopy(student)
    torch.nn.init.zeros_(uniform.get_output_embeddings().weight)
    assert uniform.get_output_embeddings().weight.shape[0] > VOCAB
    result = final(evaluate_perplexity(uniform, tokenizer, prose, reading=ReadingOptions(seq_len=32)))
    assert result.perplexity.value == pytest.approx(VOCAB, rel=1e-6)  # one float32 logarithm
    assert result.nll_per_token.stderr == pytest.approx(0, abs=1e-9)


def test_bits_per_byte_count_every_byte_of_the_text_once(student, tokenizer, text_file):
    corpus = load_corpus(str(text_file))  # with characters of 2, 3 and 4 bytes, cut into windows inside them or not
    result = final(evaluate_perplexity(student, tokenizer, corpus, reading=ReadingOptions(seq_len=48, stride=20)))
    size = sum(len(e.target.encode("utf-8")) for e in corpus.examples)
    assert result.bytes == size
    nats = result.nll_per_token.value * result.tokens
    assert result.bits_per_byte.value == pytest.approx(nats / math.log(2) / size, rel=1e-12)


@pytest.mark.parametrize("tokens_per_batch", [1, 100, 10**6])
def test_result_does_not_depend_on_the_batch(student, tokenizer, prose, tokens_per_batch):
    expected = final(
        evaluate_perplexity(student, tokenizer, prose, reading=ReadingOptions(seq_len=40, tokens_per_batch=333))
    )
    found = final(
        evaluate_perplexity(
            student, tokenizer, prose, reading=ReadingOptions(seq_len=40, tokens_per_batch=tokens_per_batch)
        )
    )
    # other batch shapes sum float32 products in another order
    assert found.nll_per_token.value == pytest.approx(expected.nll_per_token.value, rel=1e-6)
    assert found.bits_per_byte.stderr == pytest.approx(expected.bits_per_byte.stderr, rel=1e-4)


def test_error_equals_the_documented_formula_over_documents(student, student64, tokenizer, prose):
    result = final(evaluate_perplexity(student, tokenizer, prose, reading=WINDOW_24))
    parts = []
    for example in prose.examples:
        one = type(prose)(prose.spec, prose.split, prose.kind, (example,), prose.source)
        parts.append(naive_nll(student64, tokenizer, one, seq_len=24, stride=23))
    total = sum(map(len, parts))
    mean = sum(map(sum, parts)) / total
    variance = 3 / 2 * sum((sum(p) - mean * len(p)) ** 2 for p in parts) / total**2
    assert result.nll_per_token.stderr == pytest.approx(math.sqrt(variance), rel=1e-3)  # a difference of near numbers
    assert result.perplexity.stderr == pytest.approx(math.exp(mean) * math.sqrt(variance), rel=1e-3)


@pytest.mark.parametrize("limit", [1, 30, 75])
def test_a_token_limit_scores_exactly_the_first_tokens(student, student64, tokenizer, prose, limit):
    nats = naive_nll(student64, tokenizer, prose, seq_len=24, stride=23)[:limit]
    result = final(
        evaluate_perplexity(student, tokenizer, prose, reading=ReadingOptions(seq_len=24, limit_tokens=limit))
    )
    assert result.tokens == limit
    assert result.nll_per_token.value == pytest.approx(np.mean(nats), rel=2e-5)


def test_the_prompt_of_a_pair_is_seen_and_not_scored(student, student64, tokenizer, tmp_path):
    path = tmp_path / "pairs.jsonl"
    pair = {"prompt": "The fox went down", "target": "to the river"}
    path.write_text(json.dumps(pair) + "\n", encoding="utf-8")
    result = final(evaluate_perplexity(student, tokenizer, load_corpus(str(path)), reading=ReadingOptions(seq_len=64)))
    encode = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]  # noqa: E731
    context, target = [0, *encode(pair["prompt"] + "\n")], [*encode(pair["target"]), 0]
    with torch.no_grad():
        log_q = student64(input_ids=torch.tensor([context + target])).logits[0, :, :VOCAB].log_softmax(-1)
    nats = [-float(log_q[len(context) - 1 + i, token]) for i, token in enumerate(target)]
    assert result.tokens == len(target)
    assert result.bytes == len(pair["target"])
    assert result.nll_per_token.value == pytest.approx(np.mean(nats), rel=2e-5)


def test_an_encoder_decoders_nll_is_the_models_own_loss_with_labels(t5_dir, tmp_path):
    from transformers import AutoModelForSeq2SeqLM

    from kd.models.tokenizer import load_tokenizer, vocabulary_size

    tokenizer = load_tokenizer(str(t5_dir))
    model = AutoModelForSeq2SeqLM.from_pretrained(t5_dir, dtype=torch.float64).eval()
    model.resize_token_embeddings(vocabulary_size(tokenizer), mean_resizing=False)  # its loss counts padded columns
    pairs = [("The fox went down", "to the river"), ("It rained", "for a day and a night"), ("Who?", "The baker.")]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps({"prompt": p, "target": t}) + "\n" for p, t in pairs), encoding="utf-8")
    sums = []
    for prompt, target in pairs:
        ids, labels = (tokenizer(text, add_special_tokens=False)["input_ids"] + [1] for text in (prompt, target))
        with torch.no_grad():
            loss = model(input_ids=torch.tensor([ids]), labels=torch.tensor([labels])).loss  # a mean over the labels
        sums.append((float(loss) * len(labels), len(labels)))
    result = final(
        evaluate_perplexity(
            model.float(), tokenizer, load_corpus(str(path)), reading=ReadingOptions(separator=" ignored ")
        )
    )
    assert result.tokens == sum(n for _, n in sums)
    assert result.nll_per_token.value == pytest.approx(sum(s for s, _ in sums) / result.tokens, rel=2e-5)
    assert result.bytes == sum(len(t) for _, t in pairs)


def test_the_separator_of_pairs_is_seen(student, tokenizer, tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps({"prompt": "The fox went down", "target": "to the river"}) + "\n", encoding="utf-8")
    joined = tmp_path / "joined.jsonl"
    joined.write_text(json.dumps({"prompt": "The fox went down: ", "target": "to the river"}) + "\n", encoding="utf-8")
    found = final(
        evaluate_perplexity(student, tokenizer, load_corpus(str(path)), reading=ReadingOptions(separator=": "))
    )
    expected = final(
        evaluate_perplexity(student, tokenizer, load_corpus(str(joined)), reading=ReadingOptions(separator=""))
    )
    assert found.nll_per_token.value == expected.nll_per_token.value
    assert (
        found.nll_per_token.value
        != final(evaluate_perplexity(student, tokenizer, load_corpus(str(path)))).nll_per_token.value
    )


def test_the_default_window_is_all_the_positions_of_a_short_model(student, tokenizer, prose):
    result = final(evaluate_perplexity(student, tokenizer, prose))
    assert (result.blocks.seq_len, result.blocks.stride) == (64, 63)


def test_progress_counts_every_token_and_ends_with_the_result(student, tokenizer, prose):
    steps = list(
        evaluate_perplexity(student, tokenizer, prose, reading=ReadingOptions(seq_len=24, tokens_per_batch=100))
    )
    done = [s.done for s in steps]
    assert done == sorted(done)
    assert done[-1] == steps[-1].total == steps[-1].result.tokens
    assert [s.result for s in steps[:-1]] == [None] * (len(steps) - 1)


def test_more_positions_than_the_model_has_are_refused(student, tokenizer, prose):
    with pytest.raises(DataError, match="longer than the model's positions") as error:
        final(evaluate_perplexity(student, tokenizer, prose, reading=ReadingOptions(seq_len=65)))
    assert error.value.details["expected"] == "at most 64"


@pytest.mark.parametrize("stride", [0, 24, -1])
def test_a_stride_that_does_not_fit_is_refused(student, tokenizer, prose, stride):
    with pytest.raises(DataError, match="stride does not fit"):
        final(evaluate_perplexity(student, tokenizer, prose, reading=ReadingOptions(seq_len=24, stride=stride)))


def test_a_model_with_fewer_logits_than_ids_is_refused(save_model, tokenizer, prose, tmp_path):
    from transformers import AutoModelForCausalLM

    save_model(tmp_path, vocab=VOCAB - 1)
    small = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with pytest.raises(DataError, match="fewer logits"):
        final(evaluate_perplexity(small, tokenizer, prose, reading=WINDOW_24))


def test_logits_that_are_not_finite_name_their_example(student, tokenizer, prose):
    broken = copy.deepcopy(student)
    with torch.no_grad():
        broken.transformer.wpe.weight[20] = math.nan  # beyond the few positions the head is proved on
    with pytest.raises(DataError, match="not finite") as error:
        final(evaluate_perplexity(broken, tokenizer, prose, reading=WINDOW_24))
    assert error.value.details["where"] == f"example {prose.examples[0].id}#0"
