"""`--tasks hellaswag`: HellaSwag's validation rows; see `kd.evaluation.measures.hellaswag`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from kd.common.progress import Progress
from kd.common.settings import check
from kd.evaluation.tasks.choices_task import ACCURACY
from kd.evaluation.tasks.eval_task import SAMPLES, Metric, Task, TaskResult, rows_digest, task_progress
from kd.evaluation.tasks.shared_options import SharedOptions

if TYPE_CHECKING:
    from kd.data.corpus import Corpus
    from kd.evaluation.measures.hellaswag import HellaSwagResult, Scenes
    from kd.models.loading import Model
    from kd.models.tokenizer import Tokenizer

METRICS = {
    "acc_nanogpt": replace(ACCURACY, title="acc (nanogpt)"),
    "acc_norm_nanogpt": replace(ACCURACY, title="acc_norm (nanogpt)"),
    "acc_harness": replace(ACCURACY, title="acc (harness)"),
    "acc_norm_harness": replace(ACCURACY, title="acc_norm (harness)"),
    "acc_bytes_harness": replace(ACCURACY, title="acc_bytes (harness)"),
}


@dataclass(frozen=True)
class HellaSwagOptions:
    """Options of hellaswag."""

    protocol: Literal["nanogpt", "harness"] = "nanogpt"
    """Protocol of hellaswag: nanogpt, in which GPT-2 (124M) reaches 0.2955, or harness (lm-eval)."""

    def __post_init__(self) -> None:
        check(self)


class HellaSwagTask(Task[HellaSwagOptions, "Scenes"]):
    """Which ending of a description a model finds most probable."""

    has_own_rows = True

    def check(self, name: str, options: HellaSwagOptions, shared: SharedOptions) -> None:
        from kd.evaluation.measures.hellaswag import refuse_chat

        super().check(name, options, shared)
        refuse_chat(options.protocol, shared.reading.chat)

    @property
    def metrics(self) -> Mapping[str, Metric]:
        return METRICS

    def load(
        self, options: HellaSwagOptions, shared: SharedOptions, tokenizer: Tokenizer, corpus: Corpus | None
    ) -> Scenes:
        from kd.evaluation.measures.hellaswag import load_scenes

        return load_scenes(shared.data.instructions.task_root, shared.data.limit)

    def may_be_known(self, material: Scenes) -> Scenes:
        return material

    def run(
        self,
        model: Model,
        tokenizer: Tokenizer,
        options: HellaSwagOptions,
        shared: SharedOptions,
        material: Scenes,
    ) -> Iterator[Progress[TaskResult]]:
        from kd.evaluation.measures.hellaswag import evaluate_hellaswag
        from kd.evaluation.scoring.chat_asking import ChatAsking, chat_conditions

        protocol, seq_len = options.protocol, shared.reading.seq_len
        chat = ChatAsking.of(tokenizer, shared.reading) if shared.reading.chat else None
        asked_how = {} if chat is None else {"chat": chat_conditions(shared.reading, tokenizer)}
        steps = evaluate_hellaswag(
            model,
            tokenizer,
            material,
            protocol=protocol,
            seq_len=seq_len,
            tokens_per_batch=shared.reading.tokens_per_batch,
            chat=chat,
        )

        def task_result(scores: HellaSwagResult) -> TaskResult:
            settings = {
                "protocol": protocol,
                "protocol_digest": rows_digest([protocol]),
                "source": material.source,
                "rows_digest": rows_digest(
                    [s.activity, s.context, s.parts, s.endings, s.answer] for s in material.rows
                ),
                "seq_len": seq_len,
                "contexts_cut": scores.contexts_cut,
                "rows_joined": scores.rows_joined or None,
                "rows_unlabelled": material.unlabelled or None,
                **asked_how,
            }
            chosen = scores.chosen[f"acc_norm_{protocol}"].tolist()
            samples = [
                {"prompt": a.context, "expected": a.endings[a.scene.answer], "got": a.endings[c]}
                for a, c in zip(scores.asked[:SAMPLES], chosen, strict=False)
            ]
            return TaskResult(scores.estimates, scores.documents, settings, samples)

        return task_progress(steps, task_result)
