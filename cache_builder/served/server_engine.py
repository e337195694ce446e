"""A teacher behind a server: which server it is, what it can do, and many questions at once.

    report = server_report(client, serving)           # what it says of itself: part of a cache's identity
    engine = ServerEngine(client, report, k, vocabulary_size, serving.tokens_in_flight)
    engine.probe(ids)                                  # before the first row: k, the mode of log-probabilities

Questions are bounded by tokens in flight, so that a server's queue holds enough for its batches and not all of the text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np

from kd.cache_builder.served.logprob_rows import TokenLogprobs, WrongAnswer, token_logprobs
from kd.cache_builder.served.server_client import Refused, ServerClient
from kd.cache_builder.served.server_dialects import DIALECTS, Writing
from kd.cache_builder.served.serving import ScoredSequence, Serving
from kd.common.errors import DataError, KdError, TeacherError, unknown_name
from kd.common.shown_text import public_place

Value = TypeVar("Value")

MOST_QUESTIONS = 64
"""Most questions at once, each of which has a thread."""
LOOK_SECONDS = 1.0
"""Time between two records while nothing has come."""
PROBED_TOKENS = 5
"""Tokens that are looked at where one is generated."""
SAME = 1e-3
"""Nats by which log-probabilities of one token may differ between two batches of a server in float32 or rounded further."""


@dataclass(frozen=True)
class ServerReport:
    """What a server says of itself."""

    api: str
    """Key of `DIALECTS`."""
    version: str | None
    model: str
    """What it calls the model."""
    root: str | None
    """Where it has the model from: a hub id, or the last name of a folder."""
    longest: int | None
    """Most tokens of a sequence, the generated one included."""

    def identity(self) -> dict[str, Any]:
        """What of it can tell one teacher from another."""
        return {"api": self.api, "version": self.version, "root": self.root}


def server_report(client: ServerClient, serving: Serving) -> ServerReport:
    """Ask a server what it is. Raises TeacherError where none answers, DataError where it has no such model."""
    try:
        listed = client.ask("/models", read=_models, what="its models")
    except Refused as error:
        raise TeacherError(
            "no OpenAI-compatible server answers at this address",
            where=client.url,
            found=error,
            expected="a list of models at /models",
            try_=f"--teacher-url {client.root}/v1" if error.status == 404 else None,
        ) from error
    chosen = _chosen(listed, serving, client.url)
    api, version = _api(client, serving)
    root = chosen.get("root")
    longest = chosen.get("max_model_len")
    return ServerReport(
        api,
        version,
        str(chosen["id"]),
        public_place(str(root)) if root else None,
        longest if isinstance(longest, int) else None,
    )


def _models(document: Any) -> list[dict[str, Any]]:
    listed = document.get("data") if isinstance(document, dict) else None
    if not isinstance(listed, list) or not listed or not all(isinstance(m, dict) and m.get("id") for m in listed):
        raise WrongAnswer("no list of models")
    return listed


def _chosen(listed: list[dict[str, Any]], serving: Serving, url: str) -> dict[str, Any]:
    """The model that is meant: the named one, or the only one that is no adapter of another."""
    names = [str(model["id"]) for model in listed]
    if serving.model is not None:
        if serving.model not in names:
            raise unknown_name("model of the server", serving.model, names, where=url, try_="--served-model NAME")
        return listed[names.index(serving.model)]
    whole = [model for model in listed if not model.get("parent")]
    if len(whole) != 1:
        raise DataError(
            "the server has several models", where=url, found=", ".join(names), try_=f"--served-model {names[0]}"
        )
    return whole[0]


def _api(client: ServerClient, serving: Serving) -> tuple[str, str | None]:
    """Which of `DIALECTS` the server speaks, and its version."""
    if serving.api not in ("auto", *DIALECTS):
        raise unknown_name("interface of a server", serving.api, ("auto", *DIALECTS))
    for name, path in (("vllm", "/version"), ("sglang", "/get_server_info")):
        if serving.api in ("auto", name):
            try:
                version = client.ask(path, read=_version, what="its version", beside=True)
            except Refused:
                continue
            if version is not None:
                return name, version
    return ("echo" if serving.api == "auto" else serving.api), None


def _version(document: Any) -> str | None:
    version = document.get("version") if isinstance(document, dict) else None
    return None if version is None else str(version)


class ServerEngine:
    """A `LogprobEngine` over HTTP."""

    def __init__(
        self, client: ServerClient, report: ServerReport, k: int, vocabulary_size: int, tokens_in_flight: int
    ) -> None:
        self.client, self.report = client, report
        self._k, self._size, self._budget = k, vocabulary_size, tokens_in_flight
        self._dialect = DIALECTS[report.api]

    def close(self) -> None:
        """As `LogprobEngine.close`."""
        self.client.close()

    def probe(self, ids: Sequence[int]) -> None:
        """Ask about a few tokens, at least two: refuse a server that gives too few log-probabilities, or others than raw ones.

        Raw log-probabilities do not depend on the temperature of a question. Logits are found by `logprob_rows`.
        """
        sent = [int(i) for i in ids]
        by_temperature, after = zip(*(self._probed(sent, temperature) for temperature in (1.0, 2.0)), strict=True)
        same = np.abs(by_temperature[0].logprobs - by_temperature[1].logprobs).max() < SAME
        shared = min(PROBED_TOKENS, *(len(one) for one in after))  # a drawn token may come on top of them
        same &= bool(np.abs(np.subtract(after[0][:shared], after[1][:shared])).max(initial=0.0) < SAME)
        if not same:
            raise TeacherError(
                "the server's log-probabilities depend on how it samples",
                where=self.client.url,
                found="others at temperature 2 than at temperature 1",
                expected="raw log-probabilities",
                try_="vllm serve … --logprobs-mode raw_logprobs (its default)",
            )

    def _probed(self, ids: list[int], temperature: float) -> tuple[TokenLogprobs, list[float]]:
        body = self._dialect.scoring(self.report.model, ids, self._k, temperature)
        if self.report.api == "vllm":
            # of the generated token, which sampling changes first
            body |= {"logprobs": min(self._k, PROBED_TOKENS), "return_tokens_as_token_ids": True}
        sequence = ScoredSequence(ids, np.arange(1, len(ids)), "a few tokens, to see what it can do")

        def read(document: Any) -> tuple[TokenLogprobs, list[float]]:
            return self._read(document, sequence), self._guarded(lambda: self._dialect.generated(document))

        try:
            return self._ask(body, read, sequence.name)
        except Refused as error:
            raise self._refusal(sequence.name, error) from error

    def _refusal(self, what: str, error: Refused) -> KdError:
        if "logprobs" not in error.words.lower() or error.status in (401, 403, 404):
            return self.client.refusal(what, error)
        most = re.search(r"max(?:imum)? allowed\D{0,20}(\d+)", error.words)
        other = f"; or --top-k {most[1]}" if most and int(most[1]) else ""
        return TeacherError(
            "the server gives fewer log-probabilities per token than asked for",
            where=self.client.url,
            found=error.words,
            expected=f"--top-k {self._k}",
            try_=f"vllm serve … --max-logprobs {self._k}{other}",
        )

    def refuse_too_long(self, longest: int) -> None:
        """Raise DataError where a sequence of `longest` tokens and the one that is generated after it do not fit."""
        if self.report.longest is not None and longest + 1 > self.report.longest:
            raise DataError(
                "the sequences are longer than the server takes",
                where=self.client.url,
                found=f"{longest} tokens, and one that it must generate",
                expected=f"at most {self.report.longest}",
                try_=f"--seq-len {self.report.longest - 1}; or vllm serve … --max-model-len {longest + 1}",
            )

    def scores(self, sequences: Sequence[ScoredSequence]) -> Iterator[tuple[int, TokenLogprobs] | None]:
        """As `LogprobEngine.scores`."""
        yield from self._together([partial(self._score, one) for one in sequences], [len(s.ids) for s in sequences])

    def answers(self, prompts: Sequence[list[int]], how: Sequence[Writing]) -> Iterator[tuple[int, list[int]] | None]:
        """As `LogprobEngine.answers`. Raises DataError where the server's draws cannot be repeated."""
        if any(one.temperature for one in how) and not self._dialect.seeded:
            raise DataError(
                "answers of this server cannot be sampled with a seed",
                where=self.client.url,
                found=f"--sample-temperature with the interface {self.report.api}",
                try_="--sample-temperature 0, or a server of vLLM",
            )
        work = [partial(self._write, ids, one) for ids, one in zip(prompts, how, strict=True)]
        yield from self._together(work, [len(ids) + one.most for ids, one in zip(prompts, how, strict=True)])

    def _score(self, sequence: ScoredSequence) -> TokenLogprobs:
        body = self._dialect.scoring(self.report.model, sequence.ids, self._k, 0.0)
        try:
            return self._ask(body, partial(self._read, sequence=sequence), sequence.name)
        except Refused as error:
            raise self.client.refusal(sequence.name, error) from error

    def _read(self, document: Any, sequence: ScoredSequence) -> TokenLogprobs:
        entries = self._guarded(lambda: self._dialect.entries(document, sequence.ids, sequence.positions))
        return token_logprobs(entries, self._k, self._size)

    def _write(self, ids: list[int], how: Writing) -> list[int]:
        what = f"an answer to {len(ids)} tokens"

        def read(document: Any) -> list[int]:
            answer = self._guarded(lambda: self._dialect.written(document, ids))
            if any(not 0 <= one < self._size for one in answer) or len(answer) > how.most:
                raise WrongAnswer("ids beyond the tokenizer, or more of them than were asked for")
            return answer

        try:
            return self._ask(self._dialect.writing(self.report.model, ids, how), read, what)
        except Refused as error:
            raise self.client.refusal(what, error) from error

    def _ask(self, body: dict[str, Any], read: Callable[[Any], Value], what: str) -> Value:
        return self.client.ask(self._dialect.path, body, read, what=what, beside=self._dialect.beside)

    def _guarded(self, read: Callable[[], Value]) -> Value:
        """What `read` finds in an answer; whatever is not where it should be makes the answer a wrong one."""
        try:
            return read()
        except (LookupError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise WrongAnswer(f"an answer of another shape ({type(error).__name__}: {error})"[:200]) from error

    def _together(
        self, work: Sequence[Callable[[], Value]], sizes: Sequence[int]
    ) -> Iterator[tuple[int, Value] | None]:
        """Do all of the work, in threads; at any time, the sizes of what has been started sum to the budget at most.

        One piece of work is always under way, however large. The first error ends what is left.
        """
        waiting, running, inside = list(range(len(work)))[::-1], dict[Future[Value], int](), 0
        pool = ThreadPoolExecutor(MOST_QUESTIONS, thread_name_prefix="kd-teacher")
        try:
            while waiting or running:
                while waiting and (not running or inside + sizes[waiting[-1]] <= self._budget):
                    if len(running) == MOST_QUESTIONS:
                        break
                    number = waiting.pop()
                    running[pool.submit(work[number])] = number
                    inside += sizes[number]
                done, _ = wait(running, LOOK_SECONDS, FIRST_COMPLETED)
                for future in done:
                    number = running.pop(future)
                    inside -= sizes[number]
                    yield number, future.result()
                if not done:
                    yield None
        finally:
            if running:
                self.client.close()
            pool.shutdown(cancel_futures=True)
