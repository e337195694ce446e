"""`BuildRequest`: what a build makes, and where its teacher comes from (a name, or a model object)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from kd.cache_builder.served.served_teacher import ServedTeacher
from kd.cache_builder.served.serving import Serving
from kd.cache_builder.store.records.manifest import Layout
from kd.cache_builder.store.targets import TargetConfig
from kd.cache_builder.tokens.tokenised_text import TokenisedText
from kd.common.errors import DataError
from kd.data.conversations.chat_settings import ChatSettings
from kd.data.text_stream import Text
from kd.data.tokenizing.block_config import BlockConfig
from kd.models.families.text_model import text_config
from kd.models.identity import in_memory_identity, model_identity, pinned
from kd.models.loading import Model, load_model
from kd.models.model_config import load_config, load_request_tokenizer
from kd.models.model_request import ModelRequest
from kd.models.tokenizer import Tokenizer

LATER_DEFAULTS = (("answers", 1), ("reasoning", "keep"))
"""Settings of generation that no earlier cache had, with their defaults."""


@dataclass(frozen=True)
class GenerationConfig:
    """How the teacher answers; part of a cache's identity."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    """Temperature at which tokens are sampled from the whole distribution; 0 takes the most probable token."""
    seed: int = 0
    """Seed of the sampling."""
    answers: int = 1
    """Answers to each prompt."""
    reasoning: str = "keep"
    """`strip` leaves the reasoning of an answer out."""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1 or self.answers < 1 or not 0.0 <= self.temperature < 100.0:
            raise DataError(
                "the generation settings are not usable",
                found=asdict(self),
                expected="at least one token, a temperature of 0 (greedy) or more",
            )

    def identity(self) -> dict[str, Any]:
        """What changes an answer. Settings that earlier caches did not have are named where they are not the default."""
        entries = asdict(self) | {"seed": self.seed if self.temperature else 0}
        return {name: value for name, value in entries.items() if (name, value) not in LATER_DEFAULTS}


class TeacherSource(Protocol):
    """Where a build has its teacher from."""

    def config(self) -> Any:
        """The model's configuration; reads no weights."""

    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer."""

    def identity(self) -> dict[str, Any]:
        """What a cache records of the model: all that can change its numbers."""

    def load(self) -> Model:
        """The model in evaluation mode, on its device."""


@dataclass(frozen=True)
class NamedTeacher:
    """A teacher that is loaded by its name."""

    request: ModelRequest
    loaded: Model | None = None
    """The model, where it was loaded before."""

    def config(self) -> Any:
        return load_config(self.request)

    def tokenizer(self) -> Tokenizer:
        return load_request_tokenizer(self.request)

    def identity(self) -> dict[str, Any]:
        return model_identity(self.request)

    def load(self) -> Model:
        return load_model(self.request) if self.loaded is None else self.loaded


@dataclass(frozen=True)
class GivenTeacher:
    """A teacher that is in memory: somebody's own model object and tokenizer."""

    model: Model
    own_tokenizer: Tokenizer
    digest: str
    """The model's `parameters_digest`."""

    def config(self) -> Any:
        return text_config(self.model.config)

    def tokenizer(self) -> Tokenizer:
        return self.own_tokenizer

    def identity(self) -> dict[str, Any]:
        return in_memory_identity(self.model, self.digest)

    def load(self) -> Model:
        return self.model


@dataclass(frozen=True)
class BuildRequest:
    """What a build makes, and of what."""

    out: Path
    teacher: ModelRequest
    corpus: Text
    blocks: BlockConfig
    targets: TargetConfig
    layout: Layout | None = None
    """Sizes of shards and chunks; None = those of the cache that is continued or extended, else the default."""
    tokens_per_batch: int | None = None
    """Tokens of a forward pass of the teacher, padding included; None = what suits the device."""
    shard: tuple[int, int] = (1, 1)
    """(i, n): build every n-th shard, starting with the i-th, counted from 1."""
    wait: bool = False
    """Whether to wait for shards that other builders hold, and to build those that they leave."""
    url: str | None = None
    """Address of the cache in an object store; `out` is then the folder of this disk through which it is built."""
    builder: str = ""
    """Name of the builder among several, which its claims bear."""
    chat: ChatSettings = field(default_factory=ChatSettings)
    """How conversations become text."""
    generation: GenerationConfig | None = None
    """How the teacher writes the targets; None = they are the text's own."""
    answered: bool = False
    """Whether the corpus's targets are the teacher's answers; set by `generate`."""
    extend: Path | None = None
    """A finished cache; shards that this build would make in the same way are copied from it."""
    options: Mapping[str, str | bool] | None = None
    """The options as they were typed, which the manifest keeps for `kd cache repair`; they change no stored value."""
    serving: Serving | None = None
    """The engine that runs the teacher; None = transformers in this process."""
    tokenize_workers: int | None = None
    """Processes that tokenise the text; None = one for each processor."""
    tokenised: TokenisedText | None = field(default=None, compare=False, repr=False)
    """The text in tokens, where another builder's plan has made it."""
    model: Any = field(default=None, compare=False, repr=False)
    """The teacher, where it is loaded already."""
    given: GivenTeacher | None = field(default=None, compare=False, repr=False)
    """A model object in place of a named teacher; `teacher` then says what errors and the manifest call it."""

    @property
    def source(self) -> TeacherSource:
        """Where the teacher comes from."""
        if self.given is not None:
            return self.given
        if self.serving is not None:
            return ServedTeacher(self.teacher, self.serving)
        return NamedTeacher(self.teacher, self.model)

    def pinned(self) -> BuildRequest:
        """The request with a hub teacher's branch or tag replaced by its commit."""
        return self if self.given is not None else replace(self, teacher=pinned(self.teacher))
