"""How servers are asked for the log-probabilities of a prompt, and how they answer: one class per way.

    vllm      POST /v1/completions with `prompt_logprobs`; an entry per token with log-probability and rank
    sglang    POST /generate with `return_logprob` and `top_logprobs_num`; beside /v1
    echo      POST /v1/completions with `echo` and `logprobs`, and `return_tokens_as_token_ids`, so that tokens are ids

Token ids are sent, never text, and one token is generated where the server must generate some. To add a way, write a class
with these methods, and add a line to `DIALECTS`; the tests find it there.

Shapes: T tokens of a sequence, n scored positions, k tokens kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from kd.cache_builder.served.logprob_rows import RankedEntry, WrongAnswer

LOWEST = -9999.0
"""Log-probability that vLLM sends in place of minus infinity, because JSON has no infinity."""
PLAIN = {"top_p": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
"""Sampling as it is without a server's own defaults."""


@dataclass(frozen=True)
class Writing:
    """How an answer is generated."""

    most: int
    """Largest number of tokens."""
    temperature: float
    """0 takes the most probable token each time."""
    ends: tuple[int, ...]
    """Tokens that end an answer."""
    seed: int
    """Seed of this answer's draws."""


class Dialect(Protocol):
    """One way of asking."""

    beside: bool
    """Whether the path starts beside /v1."""
    path: str
    ranks: bool
    """Whether the rank of a token beyond the k is told."""
    seeded: bool
    """Whether draws can be repeated with a seed."""

    def scoring(self, model: str, ids: list[int], k: int, temperature: float) -> dict[str, Any]:
        """The question for the k most probable tokens at every position."""

    def entries(self, document: Any, ids: list[int], positions: np.ndarray) -> list[RankedEntry]:
        """The answer at `positions [n]`, each from 1 to T - 1. Raises WrongAnswer where it is about other tokens."""

    def generated(self, document: Any) -> list[float]:
        """Log-probabilities at the generated token, the largest first, or none."""

    def writing(self, model: str, ids: list[int], how: Writing) -> dict[str, Any]:
        """The question for an answer to a prompt."""

    def written(self, document: Any, ids: list[int]) -> list[int]:
        """The ids of the answer to a prompt, end-of-text token included. Raises WrongAnswer."""


class Vllm:
    """vLLM's completions with prompt log-probabilities."""

    beside, path, ranks, seeded = False, "/completions", True, True

    def scoring(self, model: str, ids: list[int], k: int, temperature: float) -> dict[str, Any]:
        return PLAIN | {
            "model": model,
            "prompt": ids,
            "max_tokens": 1,
            "temperature": temperature,
            "prompt_logprobs": k,
            "return_token_ids": True,
        }

    def entries(self, document: Any, ids: list[int], positions: np.ndarray) -> list[RankedEntry]:
        choice = _choice(document)
        _same_ids(choice.get("prompt_token_ids"), ids, were_returned=choice.get("prompt_token_ids") is not None)
        every = _list(choice.get("prompt_logprobs"), len(ids), "prompt_logprobs")
        return [self._entry(every[position], ids[position]) for position in positions]

    def _entry(self, entry: Any, gold: int) -> RankedEntry:
        gold_entry = entry.get(str(gold)) if isinstance(entry, dict) else None
        if gold_entry is None:
            raise WrongAnswer(f"no log-probability of token {gold}, which was sent")
        pairs = [(int(token), float(one["logprob"])) for token, one in entry.items()]
        return RankedEntry(pairs, gold, float(gold_entry["logprob"]), int(gold_entry["rank"]) - 1)

    def generated(self, document: Any) -> list[float]:
        tops = (_choice(document).get("logprobs") or {}).get("top_logprobs") or [{}]
        return sorted((float(value) for value in tops[0].values()), reverse=True)

    def writing(self, model: str, ids: list[int], how: Writing) -> dict[str, Any]:
        stop = {"stop_token_ids": list(how.ends)} if how.ends else {}
        # a seed where nothing is drawn has ended vLLM 0.32 on a CPU, when a prompt was read in parts
        seed = {"seed": how.seed} if how.temperature else {}
        return (
            PLAIN
            | stop
            | seed
            | {
                "model": model,
                "prompt": ids,
                "max_tokens": how.most,
                "temperature": how.temperature,
                "top_k": 0,
                "min_p": 0.0,
                "repetition_penalty": 1.0,
                "ignore_eos": True,  # but for `stop_token_ids`: a model's other ends are tokens like any
                "return_token_ids": True,
            }
        )

    def written(self, document: Any, ids: list[int]) -> list[int]:
        choice = _choice(document)
        _same_ids(choice.get("prompt_token_ids"), ids)
        return _ids(choice.get("token_ids"), "token_ids")


class Echo:
    """Completions that repeat the prompt, with log-probabilities; tokens are named by their ids."""

    beside, path, ranks, seeded = False, "/completions", False, False

    def scoring(self, model: str, ids: list[int], k: int, temperature: float) -> dict[str, Any]:
        return PLAIN | {
            "model": model,
            "prompt": ids,
            "max_tokens": 1,
            "temperature": temperature,
            "logprobs": k,
            "echo": True,
            "return_tokens_as_token_ids": True,
        }

    def entries(self, document: Any, ids: list[int], positions: np.ndarray) -> list[RankedEntry]:
        logprobs = _choice(document).get("logprobs")
        if not isinstance(logprobs, dict):
            raise WrongAnswer("no logprobs")
        tokens = [_named(token) for token in _list(logprobs.get("tokens"), None, "tokens")]
        _same_ids(tokens[: len(ids)], ids)
        of_tokens = _list(logprobs.get("token_logprobs"), len(tokens), "token_logprobs")
        tops = _list(logprobs.get("top_logprobs"), len(tokens), "top_logprobs")
        return [self._entry(tops[position], ids[position], of_tokens[position]) for position in positions]

    def _entry(self, top: Any, gold: int, logprob: Any) -> RankedEntry:
        if not isinstance(top, dict) or logprob is None:
            raise WrongAnswer(f"no log-probability of token {gold}, which was sent")
        return RankedEntry([(_named(token), float(value)) for token, value in top.items()], gold, float(logprob))

    def generated(self, document: Any) -> list[float]:
        return []

    def writing(self, model: str, ids: list[int], how: Writing) -> dict[str, Any]:
        return PLAIN | {
            "model": model,
            "prompt": ids,
            "max_tokens": how.most,
            "temperature": how.temperature,
            "logprobs": 1,
            "echo": True,
            "return_tokens_as_token_ids": True,
        }

    def written(self, document: Any, ids: list[int]) -> list[int]:
        logprobs = _choice(document).get("logprobs")
        names = _list(logprobs.get("tokens") if isinstance(logprobs, dict) else None, None, "tokens")
        tokens = [_named(token) for token in names]
        _same_ids(tokens[: len(ids)], ids)
        return tokens[len(ids) :]


class Sglang:
    """SGLang's own interface."""

    beside, path, ranks, seeded = True, "/generate", False, False

    def scoring(self, model: str, ids: list[int], k: int, temperature: float) -> dict[str, Any]:
        return {
            "input_ids": ids,
            "sampling_params": {"max_new_tokens": 1, "temperature": temperature, "top_p": 1.0},
            "return_logprob": True,
            "logprob_start_len": 0,
            "top_logprobs_num": k,
        }

    def entries(self, document: Any, ids: list[int], positions: np.ndarray) -> list[RankedEntry]:
        meta = document.get("meta_info") if isinstance(document, dict) else None
        if not isinstance(meta, dict):
            raise WrongAnswer("no meta_info")
        of_tokens = _list(meta.get("input_token_logprobs"), len(ids), "input_token_logprobs")
        tops = _list(meta.get("input_top_logprobs"), len(ids), "input_top_logprobs")
        _same_ids([triple[1] for triple in of_tokens], ids)
        return [self._entry(tops[position], ids[position], of_tokens[position][0]) for position in positions]

    def _entry(self, top: Any, gold: int, logprob: Any) -> RankedEntry:
        if not isinstance(top, list) or logprob is None:
            raise WrongAnswer(f"no log-probability of token {gold}, which was sent")
        return RankedEntry([(int(token), float(value)) for value, token, *_ in top], gold, float(logprob))

    def generated(self, document: Any) -> list[float]:
        tops = document["meta_info"].get("output_top_logprobs") or [[]]
        return sorted((float(value) for value, *_ in tops[0]), reverse=True)

    def writing(self, model: str, ids: list[int], how: Writing) -> dict[str, Any]:
        plain = {"top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}
        stop = {"stop_token_ids": list(how.ends)} if how.ends else {}
        limits = {"max_new_tokens": how.most, "temperature": how.temperature, "ignore_eos": True}
        return {"input_ids": ids, "sampling_params": plain | stop | limits, "return_logprob": True}

    def written(self, document: Any, ids: list[int]) -> list[int]:
        meta = document.get("meta_info") if isinstance(document, dict) else None
        tokens = _list(meta.get("output_token_logprobs") if isinstance(meta, dict) else None, None, "output tokens")
        return _ids([triple[1] for triple in tokens], "output tokens")


DIALECTS: dict[str, Dialect] = {"vllm": Vllm(), "sglang": Sglang(), "echo": Echo()}


def _choice(document: Any) -> dict[str, Any]:
    choices = document.get("choices") if isinstance(document, dict) else None
    if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
        raise WrongAnswer("not one choice")
    return choices[0]


def _list(value: Any, length: int | None, name: str) -> list[Any]:
    if not isinstance(value, list):
        raise WrongAnswer(f"no {name}")
    if length is not None and len(value) != length:
        raise WrongAnswer(f"{len(value)} {name}, {length} were to come")
    return value


def _ids(value: Any, name: str) -> list[int]:
    ids = _list(value, None, name)
    if not all(isinstance(one, int) for one in ids):
        raise WrongAnswer(f"{name} that are no ids")
    return ids


def _same_ids(returned: Any, sent: list[int], *, were_returned: bool = True) -> None:
    if were_returned and returned != sent:
        raise WrongAnswer("other token ids than were sent")


def _named(token: Any) -> int:
    """The id of `token_id:17`. Raises WrongAnswer for a token that is named by its text, which no id follows from."""
    name, _, number = str(token).partition(":")
    if name != "token_id" or not number.isdigit():
        raise WrongAnswer(f"token {str(token)[:40]!r} by its text, not by its id (return_tokens_as_token_ids)")
    return int(number)
