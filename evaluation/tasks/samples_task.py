"""`--tasks samples`: what a model writes after the prompts of a file; see `kd.evaluation.measures.samples`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kd.common.errors import DataError
from kd.common.progress import Progress
from kd.common.settings import check
from kd.evaluation.tasks.eval_task import Metric, Task, TaskResult, rows_digest, task_progress
from kd.evaluation.tasks.shared_options import SharedOptions

if TYPE_CHECKING:
    from kd.data.corpus import Corpus
    from kd.evaluation.measures.samples import Prompts, SamplesResult
    from kd.models.loading import Model
    from kd.models.tokenizer import Tokenizer

METRICS = {
    "ended": Metric("ended", "share of answers", None, "prompt"),
    "length": Metric("length", "tokens", None, "prompt"),
    "repeated": Metric("repeated", "share of runs of 4 words", None, "prompt"),
}


@dataclass(frozen=True)
class SamplesOptions:
    """Options of samples."""

    prompts: Path | None = None
    """File of prompts for samples: .txt, a prompt per line to be continued, or .jsonl, prompts or messages to be
    answered."""

    def __post_init__(self) -> None:
        check(self)


class SamplesTask(Task[SamplesOptions, "Prompts"]):
    """What a model writes, to be read side by side with what others write."""

    @property
    def metrics(self) -> Mapping[str, Metric]:
        return METRICS

    def check(self, name: str, options: SamplesOptions, shared: SharedOptions) -> None:
        if options.prompts is None:
            raise DataError(f"the task {name} needs prompts that were not given", try_="--prompts FILE")

    def load(
        self, options: SamplesOptions, shared: SharedOptions, tokenizer: Tokenizer, corpus: Corpus | None
    ) -> Prompts:
        from kd.evaluation.measures.samples import load_prompts

        assert options.prompts is not None, "the prompts were checked to be given"
        return load_prompts(options.prompts, shared.data.limit)

    def run(
        self,
        model: Model,
        tokenizer: Tokenizer,
        options: SamplesOptions,
        shared: SharedOptions,
        material: Prompts,
    ) -> Iterator[Progress[TaskResult]]:
        from kd.evaluation.measures.samples import write_samples
        from kd.evaluation.scoring.chat_asking import chat_conditions

        chat = shared.reading.chat or material.chat
        asked_how = {"chat": chat_conditions(shared.reading, tokenizer)} if chat else {}
        steps = write_samples(
            model, tokenizer, material, reading=shared.reading, max_new_tokens=shared.answers.max_new_tokens
        )

        def task_result(written: SamplesResult) -> TaskResult:
            settings = {
                "source": material.name,
                "prompts_digest": rows_digest(zip(material.texts, material.expected, strict=True)),
                "max_new_tokens": written.max_new_tokens,
                "prompts_cut": written.prompts_cut,
                **asked_how,
            }
            samples = [
                {"prompt": prompt, "got": answer} | ({} if expected is None else {"expected": expected})
                for prompt, expected, answer in zip(material.texts, material.expected, written.answers, strict=True)
            ]
            return TaskResult(written.estimates, written.documents, settings, samples)

        return task_progress(steps, task_result)
