"""vLLM in this process: its `LLM` with prompt log-probabilities, as flat arrays where the release has them.

vLLM pins its own torch and transformers, so it is installed in an environment of its own, with kd beside it
(docs/how-to/served-teacher.md). It schedules and batches by itself; it is handed a few hundred sequences at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from kd.cache_builder.served.logprob_rows import RankedEntry, TokenLogprobs, WrongAnswer, token_logprobs
from kd.cache_builder.served.server_dialects import Writing
from kd.cache_builder.served.serving import ScoredSequence, Serving
from kd.common.errors import TeacherError
from kd.common.extras import needed
from kd.models.model_config import resolve_dtype
from kd.models.model_request import ModelRequest

AT_ONCE = 256
"""Sequences that are handed over at a time."""


class InProcessEngine:
    """A `LogprobEngine` around vLLM's `LLM`."""

    def __init__(self, request: ModelRequest, serving: Serving, k: int, vocabulary_size: int, longest: int) -> None:
        """Loads the model. Raises TeacherError with vLLM's own words where it cannot."""
        with needed("vllm", "--backend vllm", instead="--teacher-url, a server that vLLM runs in its own environment"):
            import vllm
        self._vllm, self._k, self._size = vllm, k, vocabulary_size
        try:
            self._llm = vllm.LLM(
                model=request.path,
                tokenizer=request.tokenizer or request.path,
                revision=request.revision,
                dtype=str(resolve_dtype(request)).removeprefix("torch."),
                seed=request.seed,
                max_model_len=longest + 1,
                max_logprobs=k,
                logprobs_mode="raw_logprobs",
                tensor_parallel_size=serving.tensor_parallel,
                pipeline_parallel_size=serving.pipeline_parallel,
                disable_log_stats=True,
                skip_tokenizer_init=True,
            )
        except Exception as error:  # vLLM raises many kinds, and those of its worker processes
            raise TeacherError(
                "vLLM cannot load the model", where=request.name, found=f"{type(error).__name__}: {error}"
            ) from error

    def close(self) -> None:
        """Nothing is under way between two calls."""

    def scores(self, sequences: Sequence[ScoredSequence]) -> Iterator[tuple[int, TokenLogprobs] | None]:
        """As `LogprobEngine.scores`."""
        asked = self._vllm.SamplingParams(
            max_tokens=1, temperature=0.0, prompt_logprobs=self._k, detokenize=False, flat_logprobs=True
        )
        for start in range(0, len(sequences), AT_ONCE):
            part = sequences[start : start + AT_ONCE]
            outputs = self._llm.generate([_prompt(s.ids) for s in part], asked, use_tqdm=False)
            for number, (sequence, output) in enumerate(zip(part, outputs, strict=True)):
                try:
                    yield start + number, self._read(sequence, output)
                except WrongAnswer as error:
                    raise TeacherError("vLLM answers wrongly", where=sequence.name, found=error) from error

    def _read(self, sequence: ScoredSequence, output: Any) -> TokenLogprobs:
        if list(output.prompt_token_ids) != sequence.ids:
            raise WrongAnswer("other token ids than were sent")
        prompt_logprobs = output.prompt_logprobs
        if len(prompt_logprobs) != len(sequence.ids):
            raise WrongAnswer(f"{len(prompt_logprobs)} positions, {len(sequence.ids)} were to come")
        entries = [_entry(prompt_logprobs, int(p), sequence.ids[p]) for p in sequence.positions]
        return token_logprobs(entries, self._k, self._size)

    def answers(self, prompts: Sequence[list[int]], how: Sequence[Writing]) -> Iterator[tuple[int, list[int]] | None]:
        """As `LogprobEngine.answers`."""
        asked = [
            self._vllm.SamplingParams(
                max_tokens=one.most,
                temperature=one.temperature,
                seed=one.seed if one.temperature else None,
                ignore_eos=True,
                stop_token_ids=list(one.ends),
                detokenize=False,
            )
            for one in how
        ]
        outputs = self._llm.generate([_prompt(ids) for ids in prompts], asked, use_tqdm=False)
        for number, output in enumerate(outputs):
            written = [int(one) for one in output.outputs[0].token_ids]
            if any(not 0 <= one < self._size for one in written):
                raise TeacherError("vLLM answers wrongly", found="ids beyond the tokenizer")
            yield number, written


def _prompt(ids: list[int]) -> dict[str, Any]:
    return {"prompt_token_ids": ids}


def _entry(prompt_logprobs: Any, position: int, gold: int) -> RankedEntry:
    """One position: from vLLM's flat arrays, or from a mapping of ids where `prompt_logprobs` is a list."""
    if hasattr(prompt_logprobs, "start_indices"):
        span = slice(prompt_logprobs.start_indices[position], prompt_logprobs.end_indices[position])
        ids, logprobs, ranks = (
            prompt_logprobs.token_ids[span],
            prompt_logprobs.logprobs[span],
            prompt_logprobs.ranks[span],
        )
        every = {int(i): (float(lp), rank) for i, lp, rank in zip(ids, logprobs, ranks, strict=True)}
    else:
        every = {int(i): (float(one.logprob), one.rank) for i, one in (prompt_logprobs[position] or {}).items()}
    if gold not in every:
        raise WrongAnswer(f"no log-probability of token {gold}, which was sent")
    logprob, rank = every[gold]
    return RankedEntry([(i, lp) for i, (lp, _) in every.items()], gold, logprob, None if rank is None else rank - 1)
