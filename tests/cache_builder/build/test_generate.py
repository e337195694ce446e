"""The teacher's own answers: what a plain loop of its predictions says, the same after any interruption."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from kd.cache_builder.build.builder import build
from kd.cache_builder.build.estimate import estimate
from kd.cache_builder.build.generate import answer, answered, generate
from kd.cache_builder.build.plan import plan_build
from kd.cache_builder.build.request import BuildRequest, GenerationConfig
from kd.cache_builder.store.readers.reader import CacheReader
from kd.cache_builder.store.records.manifest import Layout, load_manifest
from kd.cache_builder.upkeep.verify import verify
from kd.common.errors import CacheDamageError, CacheMismatchError, DataError
from kd.common.progress import Progress, final
from kd.models.loading import load_model
from kd.models.model_request import ModelRequest
from kd.models.tokenizer import load_tokenizer

PROMPTS = [
    "The fox",
    "The keeper of the lighthouse counted the ships and",
    "It rained for",
    "A",
    "Numbers such as 1, 2,",
]


@pytest.fixture(params=["model_dir", "t5_dir"])
def teacher_dir(request) -> Path:
    """A causal and an encoder-decoder teacher."""
    return request.getfixturevalue(request.param)


@pytest.fixture
def make(tmp_path: Path, build_request):
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"prompt": p, "target": "x"}) + "\n" for p in PROMPTS))

    def request(model: Path, out: str = "c", *, temperature: float = 0.0, seed: int = 0, **blocks) -> BuildRequest:
        made = build_request(tmp_path / out, model=model, text=tmp_path / "p.jsonl", seq_len=64, layout=None)
        return dataclasses.replace(
            made, generation=GenerationConfig(8, temperature, seed), blocks=dataclasses.replace(made.blocks, **blocks)
        )

    return request


def asked_for(last: Progress[BuildRequest]) -> BuildRequest:
    """The request with the answers as its text, which the last progress record holds."""
    assert last.result is not None
    return last.result


def run(request: BuildRequest) -> CacheReader:
    *_, last = generate(request)
    assert last.result is not None
    list(build(plan_build(asked_for(last))))
    return CacheReader(request.out)


def greedy(model, tokenizer, prompt: np.ndarray, most: int) -> tuple[str, bool]:
    """One token after another by the model's plain forward pass: the slow twin."""
    ids, out = [int(i) for i in prompt], []
    for _ in range(most):
        with torch.no_grad():
            if model.config.is_encoder_decoder:
                start = torch.tensor([[model.config.decoder_start_token_id, *out]])
                logits = model(input_ids=torch.tensor([ids]), decoder_input_ids=start).logits
            else:
                logits = model(input_ids=torch.tensor([ids + out])).logits
        out.append(int(logits[0, -1, : len(tokenizer)].argmax()))
        if out[-1] == tokenizer.eos_token_id:
            return tokenizer.decode(out[:-1]), True
    return tokenizer.decode(out, skip_special_tokens=True), False


def test_greedy_answers_are_those_of_a_plain_loop_whatever_the_batch(teacher_dir: Path):
    model, tokenizer = load_model(ModelRequest(str(teacher_dir), device="cpu")), load_tokenizer(str(teacher_dir))
    prompts = [np.array(tokenizer(p)["input_ids"]) for p in PROMPTS]
    expected = [greedy(model, tokenizer, p, 8) for p in prompts]
    assert answer(model, tokenizer, prompts, GenerationConfig(8), 0) == expected
    assert [answer(model, tokenizer, [p], GenerationConfig(8), 0)[0] for p in prompts] == expected


def test_what_is_cached_is_the_answer_and_its_end_only_where_it_came_to_one(make, teacher_dir: Path):
    reader = run(make(teacher_dir))
    tokenizer = load_tokenizer(str(teacher_dir))
    import pyarrow.parquet as pq

    stored = pq.read_table(reader.root / "generated" / "00000.parquet").to_pylist()
    assert [s["id"] for s in stored] == [f"p.jsonl:{i}" for i in range(5)]
    kept = {s["id"]: s for s in stored if s["target"] or s["complete"]}
    for number in range(len(reader)):
        example, said = reader[number], kept[reader[number].id]
        assert example.target == said["target"]
        ids = tokenizer(said["target"], add_special_tokens=False)["input_ids"]
        assert list(example.targets.gold_ids) == ids + [tokenizer.eos_token_id] * said["complete"]
    identity = reader.manifest.identity["corpus"]
    assert identity["targets"] == {"max_new_tokens": 8, "temperature": 0.0, "seed": 0}
    assert final(verify(reader.root)) == ()


def test_greedy_answers_rank_first(make):
    reader = run(make("demo"))
    first = np.concatenate([e.targets.gold_rank for e in reader.read(range(len(reader)))]) == 0
    assert first.mean() > 0.9  # decoding and tokenising again need not give the same tokens


def test_a_second_run_answers_nothing_and_an_interrupted_one_continues(make, model_dir: Path, tree, monkeypatch):
    monkeypatch.setattr("kd.cache_builder.build.generate.BLOCK", 2)
    whole = make(model_dir, "whole", temperature=1.0)
    run(whole)
    stopped = make(model_dir, "stopped", temperature=1.0)
    running = generate(stopped)
    next(running)
    running.close()
    assert not answered(stopped)
    run(stopped)
    assert answered(stopped)
    assert tree(whole.out) == tree(stopped.out)
    monkeypatch.setattr("kd.cache_builder.build.request.load_model", lambda request: pytest.fail("answered again"))
    *_, last = generate(stopped)
    (done,) = build(plan_build(asked_for(last)))
    assert done.reused


def test_sampled_answers_are_a_function_of_the_seed(make, model_dir: Path):
    texts = []
    for out, seed in (("a", 1), ("b", 1), ("c", 2)):
        *_, last = generate(make(model_dir, out, temperature=1.0, seed=seed))
        texts.append([e.target for e in last.result.corpus.examples])
    assert texts[0] == texts[1] != texts[2]


def test_generation_leaves_the_random_state_alone(make, model_dir: Path):
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    list(generate(make(model_dir, temperature=1.0)))
    assert torch.equal(torch.rand(1), expected)


def test_other_settings_for_the_same_directory_are_refused(make, model_dir: Path, t5_dir: Path):
    run(make(model_dir))
    with pytest.raises(CacheMismatchError) as caught:
        list(generate(make(model_dir, temperature=1.0)))
    assert "differs generation.temperature" in str(caught.value)
    with pytest.raises(CacheMismatchError):
        list(generate(make(t5_dir)))
    with pytest.raises(CacheMismatchError):  # the data's own targets are another cache
        plan_build(dataclasses.replace(make(model_dir), generation=None))


def test_answers_that_were_damaged_or_belong_to_others_are_noticed(make, model_dir: Path):
    reader = run(make(model_dir))
    file = reader.root / "generated" / "00000.parquet"
    shutil.copy(file, file.with_suffix(".keep"))
    file.write_bytes(file.read_bytes()[:-20])
    assert [f.where for f in final(verify(reader.root))][:1] == ["generated/00000.parquet"]
    with pytest.raises(CacheDamageError, match="cannot be read"):
        list(generate(make(model_dir)))


def test_prompts_that_are_too_long_are_refused_dropped_or_cut_at_their_beginning(make, model_dir: Path, monkeypatch):
    with pytest.raises(DataError, match="prompts are longer") as caught:
        list(generate(make(model_dir, seq_len=14)))
    assert "first p.jsonl:1" in str(caught.value)
    monkeypatch.setattr("kd.cache_builder.build.generate.BLOCK", 4)  # five prompts would be two files, four are one
    *_, dropped = generate(make(model_dir, "d", seq_len=14, overlong="drop"))
    assert answered(make(model_dir, "d", seq_len=14, overlong="drop"))
    assert "p.jsonl:1" not in [e.id for e in dropped.result.corpus.examples]
    reader = run(make(model_dir, "t", seq_len=14, overlong="truncate"))
    assert all(len(e.context_ids) + len(e.targets) <= 14 for e in reader.read(range(len(reader))))
    with pytest.raises(DataError, match="no room for a prompt"):
        list(generate(make(model_dir, "n", seq_len=8)))


def cost(request: BuildRequest) -> dict:
    """What a plan says, without what was measured."""
    return {k: v for k, v in estimate(plan_build(request)).items() if "seconds" not in k}


@pytest.mark.parametrize(
    ("teacher", "blocks", "most", "bound"),
    [
        ("demo", {}, 8, "generation limit: 8 new tokens"),
        # random weights write what is tokenised again into more: only a target length bounds them
        ("model_dir", {"target_len": 9, "overlong": "truncate"}, 9, "target length: 9 tokens"),
        ("t5_dir", {"target_len": 9, "overlong": "truncate"}, 9, "target length: 9 tokens"),
    ],
)
def test_a_plan_before_the_answers_bounds_the_build_and_says_so(make, request, teacher, blocks, most, bound):
    request = make(teacher if teacher == "demo" else request.getfixturevalue(teacher), **blocks)
    before = cost(request)
    assert not request.out.exists()
    assert (before["targets_known"], before["fingerprint"]) == (False, None)
    assert before["bound"].startswith(bound)
    assert (before["examples_at_most"], before["rows_at_most"]) == (5, 5 * most)
    assert not {"examples", "rows", "shards", "teacher_tokens"} & set(before)
    *_, last = generate(request)
    after = cost(asked_for(last))
    assert after["targets_known"] is True
    assert after["bytes_at_most"] <= before["bytes_at_most"]
    for name in ("examples", "rows", "shards", "teacher_tokens"):
        assert 0 < after[name] <= before[f"{name}_at_most"]
    list(build(plan_build(asked_for(last))))
    manifest = load_manifest(request.out)
    assert (manifest.fingerprint, manifest.rows) == (after["fingerprint"], after["rows"])


def test_a_plan_before_the_answers_does_not_look_at_the_data_s_targets(make, model_dir: Path):
    request = make(model_dir)
    longer = tuple(dataclasses.replace(e, target="a much longer target " * 40) for e in request.corpus.examples)
    other = dataclasses.replace(request, corpus=dataclasses.replace(request.corpus, examples=longer))
    assert cost(other) == cost(request)


def test_the_bound_is_the_smallest_of_the_limits_and_shards_hold_it(make, model_dir: Path):
    request = make(model_dir)
    assert cost(dataclasses.replace(request, generation=GenerationConfig(3)))["rows_at_most"] == 5 * 3
    assert cost(make(model_dir, target_len=5))["rows_at_most"] == 5 * 5
    small = cost(dataclasses.replace(request, layout=Layout(6, 6)))
    assert (small["rows_at_most"], small["shards_at_most"]) == (5 * 6, 5)


def test_a_plan_before_the_answers_treats_prompts_as_answering_does(make, model_dir: Path):
    with pytest.raises(DataError, match="prompts are longer"):
        plan_build(make(model_dir, seq_len=14))
    dropped = cost(make(model_dir, seq_len=14, overlong="drop"))
    *_, last = generate(make(model_dir, seq_len=14, overlong="drop"))
    assert dropped["examples_at_most"] == last.total < 5
    assert cost(make(model_dir, "t", seq_len=14, overlong="truncate"))["teacher_tokens_at_most"] <= 5 * 14


def test_an_upper_bound_cannot_be_built(make, model_dir: Path):
    request = make(model_dir)
    with pytest.raises(DataError, match="has not answered"):
        list(build(plan_build(request)))
    assert not request.out.exists()


def test_a_plan_before_the_answers_refuses_the_directory_of_another_cache(make, model_dir: Path):
    list(build(plan_build(dataclasses.replace(make(model_dir), generation=None))))
    with pytest.raises(CacheMismatchError, match="made from something else"):
        plan_build(make(model_dir))


def test_documents_have_nothing_to_answer(make, model_dir: Path, text_file: Path, build_request, tmp_path: Path):
    request = dataclasses.replace(build_request(tmp_path / "c"), generation=GenerationConfig())
    with pytest.raises(DataError, match="nothing to answer"):
        list(generate(request))
    with pytest.raises(DataError, match="nothing to answer"):
        plan_build(request)


def test_data_s_own_targets_and_the_teacher_s_have_different_fingerprints(make, model_dir: Path):
    own = plan_build(dataclasses.replace(make(model_dir, "own"), generation=None)).manifest.fingerprint
    run(make(model_dir))
    assert load_manifest(make(model_dir).out).fingerprint != own
