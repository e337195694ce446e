"""Options that every task of `kd eval` shares: the text, how the model reads it, how it is loaded, how it answers.

This module imports nothing heavy, because the command line reads it to print its help.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from kd.common.errors import DataError
from kd.common.settings import check, setting
from kd.data.data_settings import EACH, DataSettings
from kd.evaluation.scoring.reading_options import ReadingOptions
from kd.models.placement.device_maps import memory_from

if TYPE_CHECKING:
    from kd.models.model_request import ModelRequest
    from kd.models.placement.device_maps import Placement


@dataclass(frozen=True)
class EvalDataSettings(DataSettings):
    """The text that tasks measure on."""

    spec: str | None = setting(None, flag="--data", metavar="SPEC", multiple=True)
    """Text for perplexity, choices (examples with choices), generation (prompts and targets), and agreement with
    --teacher: demo, mini, mini-open, mini-chat, wikitext-2, flan[:MIXTURE], mini-flan[:MIXTURE], glue/TASK, a file,
    folder or glob, several of these between commas, or hub-id[:config][@revision]. May be repeated for several files."""
    shots: int | None = setting(None, minimum=0, metavar="N", shown="none; for lm_eval:NAME what the task says")
    """Number of examples before each question, of the same task: rows of the split train, drawn by --data-seed. A row is never
    its own example."""


@dataclass(frozen=True)
class LoadingOptions:
    """How models are loaded."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Data type that models compute in; auto is float32 on a CPU, and as stored on a GPU."""
    device: str = setting("auto", metavar="auto|cpu|cuda[:N]")
    """Device of the models; auto is cuda where there is one."""
    load_in_4bit: bool = False
    """Load the models in nf4 with double quantisation (bitsandbytes)."""
    load_in_8bit: bool = False
    """Load the models in 8 bits, LLM.int8 (bitsandbytes)."""
    device_map: str | None = setting(None, metavar="auto|balanced|sequential|FILE", shown="each model on one device")
    """Spread the layers of models over the GPUs, the processor's memory and the disk, as accelerate does. FILE is YAML or
    JSON, with module: device in each line."""
    max_memory: Mapping[str, str] | None = setting(
        None, metavar="DEVICE=SIZE,…", parse=memory_from, shown="what is free"
    )
    """Most memory for the weights of a model on each device, e.g. 0=20GiB,1=20GiB,cpu=60GiB. What these do not hold lies on
    the disk."""
    offload_folder: Path | None = setting(None, metavar="FOLDER", folder=True, shown="the checkpoint itself")
    """Folder for weights on the disk, needed where they cannot be read from the checkpoint itself."""
    adapter: str | None = setting(None, metavar="FOLDER|HUB_ID")
    """Adapter (LoRA) to merge into the weights of the models: a folder that peft wrote, or a hub id."""
    adapter_revision: str | None = None
    """Branch, tag or commit of an adapter on the hub."""
    revision: str | None = None
    """Branch, tag or commit of a hub model."""
    tokenizer: str | None = None
    """Folder or hub id of the tokenizer of a random model. By default the embedded one."""
    seed: int = 0
    """Seed of random weights and of sampled answers."""
    source_lang: str | None = setting(None, metavar="CODE", shown="the tokenizer's own")
    """Language code of the prompts, for an encoder-decoder whose tokenizer writes one (mBART: fr_XX, NLLB: fra_Latn)."""
    target_lang: str | None = setting(None, metavar="CODE", shown="the tokenizer's own")
    """Language code of the targets, likewise."""

    def __post_init__(self) -> None:
        check(self)
        if self.adapter_revision is not None and self.adapter is None:
            raise DataError(
                "there is no adapter", found=f"--adapter-revision {self.adapter_revision}", try_="--adapter"
            )

    def model_request(self, name: str) -> ModelRequest:
        """The request for the model that is evaluated."""
        from kd.models.model_request import ModelRequest
        from kd.models.weights.adapters import Adapter

        return ModelRequest(
            name,
            self.revision,
            self.dtype,
            self.device,
            self.load_in_4bit,
            self.tokenizer,
            self.seed,
            self.source_lang,
            self.target_lang,
            self.placement(),
            self.load_in_8bit,
            None if self.adapter is None else Adapter(self.adapter, self.adapter_revision),
        )

    def teacher_request(self, name: str, adapter: str | None = None) -> ModelRequest:
        """The request for a teacher beside it; revision, tokenizer and adapter are the model's alone."""
        from kd.models.model_request import ModelRequest
        from kd.models.weights.adapters import Adapter

        return ModelRequest(
            name,
            dtype=self.dtype,
            device=self.device,
            load_in_4bit=self.load_in_4bit,
            load_in_8bit=self.load_in_8bit,
            seed=self.seed,
            source_lang=self.source_lang,
            target_lang=self.target_lang,
            placement=self.placement(),
            adapter=None if adapter is None else Adapter(adapter),
        )

    def placement(self) -> Placement:
        """Where the weights of a model lie. Raises DataError."""
        from kd.models.placement.device_maps import Placement

        return Placement.of(self.device_map, self.max_memory, self.offload_folder)


@dataclass(frozen=True)
class AnswerOptions:
    """How long answers may be, for the tasks in which the model writes."""

    max_new_tokens: int | None = setting(None, minimum=1)
    """Most tokens of a generated answer, EOS included. By default as many as the longest reference needs, and 64 for
    samples."""

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True)
class TemplateOptions:
    """Scores over the templates of instruction tasks."""

    best_template_on: str | None = setting(None, metavar="SPLIT")
    """Also score each task in the one template that is best on this split, such as dev. Needs --template each; its other scores are
    means over templates. FLAN reports both."""

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True)
class SharedOptions:
    """Options that are not those of one task."""

    data: EvalDataSettings = field(default_factory=EvalDataSettings)
    """The text that tasks measure on."""
    reading: ReadingOptions = field(default_factory=ReadingOptions)
    """Windows and batches."""
    answers: AnswerOptions = field(default_factory=AnswerOptions)
    """Length of answers."""
    templates: TemplateOptions = field(default_factory=TemplateOptions)
    """Scores over templates."""
    loading: LoadingOptions = field(default_factory=LoadingOptions)
    """How models are loaded."""

    def __post_init__(self) -> None:
        if self.templates.best_template_on is None:
            return
        if self.reading.chat or self.data.shots:
            raise DataError(
                "the best template is chosen among plain prompts",
                found="--best-template-on with --chat or --shots",
                try_="without --best-template-on",
            )
        if self.data.instructions.template != EACH:
            raise DataError(
                "the best of several templates needs scores in each of them",
                found=f"--best-template-on {self.templates.best_template_on}, --template {self.data.instructions.template}",
                try_="--template each",
            )
