"""Whole builds through a server that speaks vLLM's, SGLang's or OpenAI's JSON over a tiny model; and what can go wrong."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from servers import Answer
from teacher_server import TeacherServer

from kd.cache_builder.build.build_settings import BuildSettings
from kd.cache_builder.build.builder import BACKENDS
from kd.cache_builder.build.from_settings import build_of, plan_of
from kd.cache_builder.served import served_teacher, server_client, server_engine
from kd.cache_builder.served.served_settings import BACKEND_NAMES, SERVER_APIS
from kd.cache_builder.served.server_dialects import DIALECTS
from kd.cache_builder.store.readers.reader import CacheReader
from kd.cache_builder.store.records import commits
from kd.cache_builder.store.records.manifest import load_manifest
from kd.cache_builder.upkeep.verify import verify
from kd.common.errors import CacheMismatchError, DataError, KdError, TeacherError
from kd.common.progress import final
from kd.common.settings import make
from kd.models.loading import load_model
from kd.models.model_request import ModelRequest

SMALL: dict[str, Any] = {"seq_len": 32, "top_k": 8, "shard_rows": 128, "reuse": False, "device": "cpu"}


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pauses of hundredths of a second, where a user's program waits seconds."""
    monkeypatch.setattr(server_client, "BACKOFF", 0.01)
    monkeypatch.setattr(server_client, "LONGEST_PAUSE", 0.05)
    monkeypatch.setattr(server_engine, "LOOK_SECONDS", 0.05)
    monkeypatch.setattr(served_teacher, "FIRST_PATIENCE", 0.2)


@pytest.fixture
def serve(model_dir: Path) -> Iterator[Callable[..., TeacherServer]]:
    running: list[TeacherServer] = []

    def start(api: str = "vllm") -> TeacherServer:
        running.append(TeacherServer(model_dir, api))
        return running[-1]

    yield start
    for server in running:
        server.close()


@pytest.fixture
def settings(model_dir: Path, text_file: Path, tmp_path: Path) -> Callable[..., BuildSettings]:
    def of(server: TeacherServer | None = None, out: str = "cache", **more: Any) -> BuildSettings:
        where = {} if server is None else {"teacher_url": f"{server.url}/v1"}
        base = SMALL | {"teacher": str(model_dir), "spec": str(text_file), "out": str(tmp_path / out), "limit": 4}
        return make(BuildSettings, base | where | more)

    return of


@pytest.fixture
def loaded(settings: Callable[..., BuildSettings]) -> CacheReader:
    """The same rows from the model in this process."""
    build_of(settings(out="loaded", temperatures=(1.0,), logprob_codec="float32"))
    return CacheReader(settings(out="loaded").out)


def every(reader: CacheReader) -> dict[str, np.ndarray]:
    targets = [reader[i].targets for i in range(len(reader))]
    names = ("gold_ids", "token_ids", "logprobs", "tail_mass", "gold_logprob", "gold_rank", "byte_end")
    return {name: np.concatenate([getattr(t, name) for t in targets]) for name in names}


def completions(fault: Callable[[int, Answer], None]) -> Callable[[str, int, Answer], None]:
    """A fault of the questions about tokens alone; it is given how many there were before."""
    return lambda path, before, answer: fault(before, answer) if path in ("/v1/completions", "/generate") else None


def test_names_of_backends_and_interfaces_are_those_of_the_registries() -> None:
    assert set(BACKEND_NAMES) - {"auto"} == set(BACKENDS)
    assert set(SERVER_APIS) - {"auto"} == set(DIALECTS)


@pytest.mark.parametrize("api", sorted(DIALECTS))
def test_a_cache_through_a_server_holds_the_rows_of_the_model_itself(api, serve, settings, loaded) -> None:
    server = serve(api)
    last = build_of(settings(server, logprob_codec="float32"))
    assert last.complete
    reader = CacheReader(settings().out)
    ours, theirs = every(reader), every(loaded)
    for name in ("gold_ids", "token_ids", "byte_end"):
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)
    # one sequence at a time here, padded batches there: float32 sums differ in their last bits
    np.testing.assert_allclose(ours["logprobs"], theirs["logprobs"], atol=2e-5)
    np.testing.assert_allclose(ours["tail_mass"], theirs["tail_mass"], atol=2e-5)
    np.testing.assert_allclose(ours["gold_logprob"], theirs["gold_logprob"], atol=2e-2)  # float16
    most = np.inf if DIALECTS[api].ranks else SMALL["top_k"]
    np.testing.assert_array_equal(ours["gold_rank"], np.minimum(theirs["gold_rank"], most))
    assert final(verify(settings().out)) == ()
    assert all(isinstance(i, int) for q in server.questions for i in q.get("prompt", q.get("input_ids")))
    teacher = load_manifest(settings().out).identity["teacher"]
    assert (teacher["weights"], teacher["given"], teacher["server"]["api"]) == ("unknown", "log-probabilities", api)
    assert teacher.get("ranks") == (None if DIALECTS[api].ranks else "top-k")
    assert reader.config.temperatures == (1.0,)
    assert "digested" in load_manifest(settings().out).provenance["served"]["weights"]
    assert "/somewhere" not in json.dumps(teacher)


def test_adaptive_rows_through_a_server_are_those_of_the_model_itself(serve, settings) -> None:
    build_of(settings(serve(), profile="adaptive", top_k=16, logprob_codec="float32"))
    build_of(settings(out="loaded", profile="adaptive", top_k=16, logprob_codec="float32", temperatures=(1.0,)))
    ours, theirs = (every(CacheReader(settings(out=name).out)) for name in ("cache", "loaded"))
    np.testing.assert_array_equal(ours["token_ids"], theirs["token_ids"])
    np.testing.assert_allclose(np.exp(ours["logprobs"]), np.exp(theirs["logprobs"]), atol=2e-5)
    np.testing.assert_allclose(ours["tail_mass"], theirs["tail_mass"], atol=2e-5)


@pytest.mark.parametrize("workers", [1, 2])
def test_faults_are_asked_again_and_change_no_byte(workers, serve, settings, tree) -> None:
    build_of(settings(serve(), out="undisturbed", teacher_id="v1"))
    server = serve()

    def fault(before: int, answer: Answer) -> None:
        kind = {4: 1, 6: 2, 8: 3, 10: 4, 12: 5, 14: 1, 16: 2}.get(before)  # two wrong answers at most
        if kind == 1:
            answer.status, answer.body, answer.headers["Retry-After"] = 429, b'{"error": {"message": "full"}}', "0"
        elif kind == 2:
            answer.cut = len(answer.body) // 2
        elif kind == 3:
            answer.status, answer.body = 503, b"restarting"
        elif kind == 4:
            answer.body = b"<html>a proxy's page</html>"
        elif kind == 5 and b"prompt_token_ids" in answer.body:
            answered = json.loads(answer.body)
            answered["choices"][0]["prompt_token_ids"][0] += 1
            answer.body = json.dumps(answered).encode()

    server.fault = completions(fault)
    last = build_of(settings(server, teacher_id="v1", workers=workers))
    assert last.complete
    files = tree(settings().out)
    other = tree(settings(out="undisturbed").out)
    manifest = {"manifest.json"}  # its provenance names the server's address
    assert {name: files[name] for name in files.keys() - manifest} == {n: other[n] for n in other.keys() - manifest}


def test_a_server_that_goes_away_ends_the_build_and_the_same_command_continues(serve, settings, tree) -> None:
    server = serve()
    gone = completions(lambda before, answer: setattr(answer, "status", 503) if before > 10 else None)
    server.fault = gone
    with pytest.raises(TeacherError, match="does not answer") as error:
        build_of(settings(server, patience=0.2, tokens_in_flight=32))
    assert "it continues" in str(error.value)
    out = settings().out
    done = commits.committed(out, 100)
    assert not (out / "manifest.json").exists()
    assert not [p for p in out.rglob("*") if "staging" in p.name]
    server.fault = None
    asked = len(server.questions)
    assert build_of(settings(server)).complete
    rows = len(server.questions) - asked
    assert len(done) >= 1
    assert rows < len(CacheReader(out)) + 4  # committed shards are not asked about again
    build_of(settings(server, out="undisturbed"))
    assert every(CacheReader(out)).keys()
    for name, value in every(CacheReader(out)).items():
        np.testing.assert_array_equal(value, every(CacheReader(settings(out="undisturbed").out))[name])


def test_tokens_in_flight_bound_what_the_server_is_asked_at_once(serve, settings) -> None:
    server = serve()
    build_of(settings(server, tokens_in_flight=70, out="few"))  # two sequences of 32
    assert server.most_at_once <= 2
    slow = server.completion

    def waiting(question: dict[str, Any]) -> Answer:
        time.sleep(0.1)
        return slow(question)

    server.completion = waiting  # type: ignore[method-assign]
    server.most_at_once = 0
    build_of(settings(server, out="many"))
    assert server.most_at_once > 2


@pytest.mark.parametrize(
    ("change", "more", "headline", "says"),
    [
        ({"max_logprobs": 5}, {}, "fewer log-probabilities", "--max-logprobs 8; or --top-k 5"),
        ({"mode": "raw_logits"}, {}, "answers wrongly", "as logits would"),
        ({"mode": "processed_logprobs"}, {}, "depend on how it samples", "--logprobs-mode raw_logprobs"),
        ({"max_model_len": 20}, {}, "longer than the server takes", "--seq-len 19"),
        ({"names": ["a", "b"]}, {}, "several models", "--served-model a"),
        ({}, {"served_model": "tyni"}, "unknown model of the server", "tiny"),
        ({"key": "secret"}, {}, "no OpenAI-compatible server", "401"),
        ({}, {"temperatures": (1.0, 2.0)}, "and no logits", "--temperatures 1,2"),
        ({}, {"profile": "full"}, "and no logits", "--samples 12"),
    ],
)
def test_what_a_server_cannot_do_is_said_at_the_start(change, more, headline, says, serve, settings) -> None:
    server = serve()
    for name, value in change.items():
        setattr(server, name, value)
    for work in (plan_of, build_of):
        with pytest.raises(KdError, match=headline) as error:
            work(settings(server, **more))
        assert says in str(error.value)
    assert not settings().out.exists()


def test_the_key_is_sent_and_written_nowhere(serve, settings, tree, monkeypatch) -> None:
    server = serve()
    server.key = "secret-of-the-server"
    monkeypatch.setenv("KD_TEACHER_API_KEY", server.key)
    assert build_of(settings(server)).complete
    assert not any(b"secret-of-the-server" in data for data in tree(settings().out).values())


def test_no_server_is_said_at_once(settings, serve) -> None:
    server = serve()
    chosen = settings(server)
    server.close()
    with pytest.raises(TeacherError, match="does not answer") as error:
        build_of(chosen)
    assert "its models" in str(error.value)


@pytest.mark.parametrize("api", sorted(DIALECTS))
@pytest.mark.parametrize(
    ("spoil", "found"),
    [
        (lambda t: t["choices"][0].update(prompt_logprobs=[]) or t["choices"][0]["logprobs"].update(tokens=[]), "were"),
        (lambda t: t.clear(), "no"),
    ],
)
def test_wrong_answers_end_the_build_naming_what_was_found(api, spoil, found, serve, settings) -> None:
    server = serve(api)

    def fault(before: int, answer: Answer) -> None:
        document = json.loads(answer.body)
        if "choices" not in document:
            document = {}
        else:
            spoil(document)
        answer.body = json.dumps(document).encode()

    build_plan = settings(server)
    server.fault = completions(fault)
    with pytest.raises(TeacherError, match="answers wrongly") as error:
        build_of(build_plan)
    assert "3 times" in str(error.value)


def test_another_server_cannot_continue_a_cache(serve, settings) -> None:
    server = serve()
    build_of(settings(server, teacher_id="v1"))
    with pytest.raises(CacheMismatchError, match="made from something else") as error:
        build_of(settings(server, teacher_id="v2"))
    assert "teacher.id" in str(error.value)
    server.root = "/elsewhere/models/another"
    with pytest.raises(CacheMismatchError) as error:
        build_of(settings(server, teacher_id="v1"))
    assert "teacher.server.root" in str(error.value)


def test_a_server_with_other_weights_under_the_same_name_is_noticed(serve, settings, save_model, tmp_path) -> None:
    server = serve()
    server.fault = completions(lambda before, answer: setattr(answer, "status", 503) if before > 10 else None)
    with pytest.raises(TeacherError, match="does not answer"):
        build_of(settings(server, patience=0.2, tokens_in_flight=32))
    server.fault = None
    save_model(tmp_path / "other", seed=7)
    server.model = load_model(ModelRequest(str(tmp_path / "other"), device="cpu"))
    with pytest.raises(CacheMismatchError, match="runs another teacher") as error:
        build_of(settings(server))
    assert "nats apart" in str(error.value)


def test_a_cache_of_unknown_weights_is_not_copied_without_a_name_for_them(serve, settings) -> None:
    server = serve()
    for teacher_id, copied in ((None, 0), ("v1", 1)):
        build_of(settings(server, out=f"one-{copied}", teacher_id=teacher_id))
        last = build_of(settings(server, out=f"two-{copied}", teacher_id=teacher_id, reuse=True))
        assert bool(last.copied) == bool(copied)


@pytest.mark.parametrize("api", sorted(DIALECTS))
def test_a_server_writes_the_targets_too(api, serve, settings, tmp_path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in ("The fox", "It rained", "The ship")))
    asked: dict[str, Any] = {"spec": str(prompts), "columns": {"prompt": "prompt"}, "target_source": "teacher"}
    asked |= {"seq_len": 60, "target_len": 12, "limit": None, "overlong": "truncate"}
    server = serve(api)
    build_of(settings(server, **asked))
    build_of(settings(out="loaded", temperatures=(1.0,), **asked))
    ours, theirs = (CacheReader(settings(out=name).out) for name in ("cache", "loaded"))
    assert [ours[i].target for i in range(len(ours))] == [theirs[i].target for i in range(len(theirs))]


def test_sampled_answers_need_a_server_that_repeats_them(serve, settings, tmp_path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "The fox"}\n')
    asked: dict[str, Any] = {"spec": str(prompts), "columns": {"prompt": "prompt"}, "target_source": "teacher"}
    asked |= {"seq_len": 60, "target_len": 12, "limit": None, "sample_temperature": 1.0}
    with pytest.raises(DataError, match="cannot be sampled with a seed"):
        build_of(settings(serve("sglang"), **asked))


@pytest.mark.parametrize(
    ("more", "headline"),
    [
        ({"backend": "server"}, "a server needs its address"),
        ({"backend": "vllm", "teacher_url": "http://x/v1"}, "a server needs its address"),
        ({"teacher_id": "v1"}, "there is no server"),
        ({"pipeline_parallel": 2}, "only vLLM in this process"),
        ({"tensor_parallel": 2, "teacher_url": "http://x/v1"}, "not told how many GPUs"),
        ({"teacher_url": "http://x/v1", "load_in_8bit": True}, "as it is stored"),
        ({"teacher_url": "http://x/v1", "teacher_adapter": "a"}, "as it is stored"),
        ({"teacher_url": "localhost:8000"}, "not the address of a server"),
        ({"teacher_url": "http://x/v1", "load_in_4bit": True}, "as it is stored"),
        ({"teacher_url": "http://x/v1", "device_map": "auto", "device": "auto"}, "as it is stored"),
        ({"teacher_url": "http://x/v1", "teacher": "demo-t5"}, "a causal language model"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(more, headline, settings) -> None:
    with pytest.raises(DataError, match=headline):
        build_of(settings(**more))


def test_vllm_in_this_process_names_its_extra(settings) -> None:
    with pytest.raises(KdError, match="--backend vllm needs vllm") as error:
        build_of(settings(backend="vllm"))
    assert "--teacher-url" in str(error.value)


def test_a_request_travels_to_other_processes(serve, settings) -> None:
    import pickle

    plan = plan_of(settings(serve()))
    again = pickle.loads(pickle.dumps(replace(plan.request, model=None)))
    assert again.source == plan.request.source
