"""`--tasks perplexity`: perplexity and bits per byte of a text; see `kd.evaluation.measures.perplexity`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from kd.common.progress import Progress
from kd.evaluation.tasks.eval_task import Metric, TaskResult, TextTask, task_progress
from kd.evaluation.tasks.shared_options import SharedOptions

if TYPE_CHECKING:
    from kd.data.corpus import Corpus
    from kd.evaluation.measures.perplexity import PerplexityResult
    from kd.models.loading import Model
    from kd.models.tokenizer import Tokenizer


METRICS = {
    "perplexity": Metric("perplexity", "per token", "lower", "token"),
    "bits_per_byte": Metric("bits per byte", "bits per byte", "lower", "byte"),
    "nll_per_token": Metric("NLL", "nats per token", "lower", "token"),
    "ece": Metric("calibration error", "ECE, 15 bins", "lower", "token"),
}


class PerplexityTask(TextTask[None]):
    """How well a model predicts a text. It has no options of its own."""

    @property
    def metrics(self) -> Mapping[str, Metric]:
        return METRICS

    def run(
        self, model: Model, tokenizer: Tokenizer, options: None, shared: SharedOptions, material: Corpus
    ) -> Iterator[Progress[TaskResult]]:
        from kd.data.chat_rows import chat_identity
        from kd.evaluation.measures.perplexity import evaluate_perplexity
        from kd.evaluation.scoring.chat_asking import asks_chat
        from kd.evaluation.scoring.windows import chat_settings

        def task_result(scores: PerplexityResult) -> TaskResult:
            settings = {
                "text_digest": material.digest,
                "seq_len": scores.blocks.seq_len,
                "stride": scores.blocks.stride,
                "bos": scores.blocks.bos,
                "limit_tokens": shared.reading.limit_tokens,
                "pairs_cut": scores.pairs_cut or None,
                "documents_too_short": scores.too_short or None,
            }
            chat = asks_chat(material)
            if material.kind == "pairs" and not chat:
                settings["separator"] = shared.reading.between
            if chat:
                settings["chat"] = chat_identity(tokenizer, chat_settings(shared.reading))
            if shared.reading.control_reading != "auto":
                settings["control_tokens"] = shared.reading.control_reading
            estimates = {name: getattr(scores, name) for name in self.metrics}
            return TaskResult(estimates, scores.documents, settings)

        return task_progress(evaluate_perplexity(model, tokenizer, material, reading=shared.reading), task_result)
