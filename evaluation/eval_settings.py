"""`EvalSettings`: every setting of an evaluation, of which `kd eval` makes its options.

    settings = make(EvalSettings, {"tasks": "perplexity,agreement", "data": "demo", "cache": "runs/cache"})

A task's own options are a group of the task's name, and their class stands in the task's module. This module imports
nothing heavy, because the command line reads it to print its help.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from kd.common.settings import check, setting
from kd.evaluation.tasks.agreement_task import AgreementOptions
from kd.evaluation.tasks.choices_task import ChoicesOptions
from kd.evaluation.tasks.generation_task import GenerationOptions
from kd.evaluation.tasks.hellaswag_task import HellaSwagOptions
from kd.evaluation.tasks.lm_eval_task import NAME, LmEvalOptions, full_names
from kd.evaluation.tasks.samples_task import SamplesOptions
from kd.evaluation.tasks.shared_options import SharedOptions

OWN = ("perplexity", "agreement", "choices", "generation", "hellaswag", "samples", NAME)
"""Names of kd's own tasks; a test compares them with the registry."""


@dataclass(frozen=True)
class EvalSettings:
    """Settings of one evaluation; the model is named beside them."""

    tasks: tuple[str, ...] = setting(("perplexity",), metavar="NAME,…")
    """Tasks to run: perplexity, agreement, choices, generation, hellaswag, samples, and lm_eval:NAME for any task of
    lm-evaluation-harness; further names behind it are the harness's too, unless they are among the first six."""
    agreement: AgreementOptions = field(default_factory=AgreementOptions)
    """Options of agreement."""
    choices: ChoicesOptions = field(default_factory=ChoicesOptions)
    """Options of choices."""
    generation: GenerationOptions = field(default_factory=GenerationOptions)
    """Options of generation."""
    hellaswag: HellaSwagOptions = field(default_factory=HellaSwagOptions)
    """Options of hellaswag."""
    samples: SamplesOptions = field(default_factory=SamplesOptions)
    """Options of samples."""
    lm_eval: LmEvalOptions = field(default_factory=LmEvalOptions)
    """Options of lm_eval."""
    shared: SharedOptions = field(default_factory=SharedOptions)
    """The text, how models are loaded, and how they read and answer."""
    allow_contaminated: bool = False
    """Score a model on what it was trained on; the result is marked."""

    def __post_init__(self) -> None:
        check(self)
        object.__setattr__(self, "tasks", full_names(self.tasks, OWN))

    def options_of(self, task: str) -> object:
        """The options of one task; None for a task that has none."""
        return getattr(self, task.partition(":")[0], None)
