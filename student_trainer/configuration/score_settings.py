"""What `kd train` scores on held-out data, and when."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from kd.common.errors import DataError
from kd.common.settings import check, setting


def steps_or_epoch(text: str) -> int | str:
    """The value of --eval-every. Raises ValueError."""
    if text != "epoch" and not (text.isdigit() and int(text) >= 1):
        raise ValueError("a number of steps from 1, or epoch")
    return text if text == "epoch" else int(text)


@dataclass(frozen=True)
class ScoreSettings:
    """What `kd train` scores on held-out data: before and after, or while the student learns."""

    eval_data: str | None = None
    """Held-out data spec. Perplexity before and after training is shown in the result and in the model card."""
    eval_split: str | None = None
    """Split of --eval-data."""
    eval_tasks: tuple[str, ...] = ()
    """Tasks of kd eval, separated by commas, to score while the student learns: before the first step, every --eval-every
    steps, and at the end. They use --eval-data (instruction tasks in template 0); agreement uses the cache."""
    eval_every: int | Literal["epoch"] = setting("epoch", metavar="N|epoch", parse=steps_or_epoch)
    """Number of steps between two scorings, or epoch."""
    eval_limit: int | None = setting(None, minimum=1)
    """Number of examples of each of --eval-tasks to use: the first N."""
    eval_task_root: Path | None = setting(None, metavar="DIR")
    """Folder with DIR/TASK/SPLIT.jsonl for --eval-tasks, instead of the hub."""
    keep_best: str | None = setting(None, metavar="TASK[.METRIC]")
    """Figure of --eval-tasks by which the weights are chosen that the run ends with, e.g. perplexity or choices.accuracy. By
    default the last weights."""
    early_stop: int | None = setting(None, metavar="N", minimum=1)
    """End the training after N scorings in a row without a better figure of --keep-best, by default that of the first task. The
    run ends with the weights of the best scoring."""
    eval_protocol: Literal["nanogpt", "harness"] = "nanogpt"
    """Protocol of hellaswag."""
    allow_contaminated: bool = False
    """Train on a benchmark's own text, or on the text of --eval-data; scores are then marked."""

    def __post_init__(self) -> None:
        check(self)
        chosen = self.best_task
        if chosen is not None and chosen not in self.eval_tasks:
            raise DataError(
                "the weights are chosen by a task that is scored while the student learns",
                found=f"--keep-best {self.keep_best}" if self.keep_best else f"--early-stop {self.early_stop}",
                expected=f"one of {', '.join(self.eval_tasks)}" if self.eval_tasks else "--eval-tasks",
                try_="--eval-tasks perplexity --eval-data …, and --keep-best perplexity",
            )

    @property
    def best_task(self) -> str | None:
        """Task whose figure chooses the weights or ends the training; None where the last weights of all steps are wanted."""
        if self.keep_best is not None:
            return self.keep_best.partition(".")[0]
        return None if self.early_stop is None else next(iter(self.eval_tasks), "")

    @property
    def best_metric(self) -> str | None:
        """Metric of that task; None is its first."""
        return (self.keep_best or "").partition(".")[2] or None

    @property
    def tasks(self) -> tuple[str, ...]:
        """What is scored: perplexity alone where only --eval-data is given, nothing where neither is."""
        return self.eval_tasks or (("perplexity",) if self.eval_data else ())

    @property
    def steps_between(self) -> int | None:
        """Optimizer steps between two scorings; None = after every pass over the cache."""
        return None if isinstance(self.eval_every, str) else self.eval_every
