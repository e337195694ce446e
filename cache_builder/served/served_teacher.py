"""`ServedTeacher`: where a build has a teacher from that an engine runs: its configuration, its identity, and the engine.

The name of the teacher (`--teacher`) is that of a folder or a hub id, from which configuration and tokenizer are read. The
weights of a server are never read here, so its identity says that they are unknown. vLLM in this process loads the files of
the name, and they are digested as for any teacher.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kd.cache_builder.served.server_client import ServerClient
from kd.cache_builder.served.server_dialects import DIALECTS
from kd.cache_builder.served.server_engine import ServerEngine, server_report
from kd.cache_builder.served.serving import LogprobEngine, Serving
from kd.cache_builder.store.records.teacher_record import GIVEN, LOGPROBS, UNKNOWN, WEIGHTS
from kd.common.errors import DataError, TeacherError
from kd.common.shown_text import without_secrets
from kd.models.identity import config_digest, model_identity
from kd.models.loading import Model
from kd.models.model_config import is_classifier, is_encoder_decoder, load_config, load_request_tokenizer
from kd.models.model_request import ModelRequest
from kd.models.tokenizer import Tokenizer

PROBED = "The teacher answers a few words, so that its server is known before the work begins."
"""Text whose tokens are asked about at the start."""
FIRST_PATIENCE = 5.0
"""Seconds for which a server is asked what it is: where none runs, the user is told at once."""


@dataclass(frozen=True)
class ServedTeacher:
    """A teacher by name, and who runs it."""

    request: ModelRequest
    serving: Serving

    def config(self) -> Any:
        config = load_config(self.request)
        self._refuse_other_kinds(config)
        return config

    def tokenizer(self) -> Tokenizer:
        return load_request_tokenizer(self.request)

    def identity(self) -> dict[str, Any]:
        if self.serving.url is None:
            return model_identity(self.request) | {GIVEN: LOGPROBS, "engine": "vllm"}
        client, config = ServerClient(self.serving.url, patience=FIRST_PATIENCE), self.config()
        report = server_report(client, self.serving)
        ranks = {} if DIALECTS[report.api].ranks else {"ranks": "top-k"}
        return ranks | {
            "model": report.model,
            "id": self.serving.teacher_id,
            "server": report.identity(),
            "model_class": (config.architectures or [type(config).__name__])[0],
            "dtype": UNKNOWN,
            "quantization": UNKNOWN,
            "config": config_digest(config),
            GIVEN: LOGPROBS,
            WEIGHTS: UNKNOWN,
        }

    def provenance(self) -> dict[str, Any]:
        """What a manifest says of it to people."""
        if self.serving.url is None:
            return {"engine": "vllm"}
        return {
            "engine": "server",
            "server": without_secrets(self.serving.url),
            "weights": "unknown: they could not be digested, because they stayed on the server",
        }

    def load(self) -> Model:
        raise TeacherError("a served teacher is not loaded here", where=self.request.name)

    def engine(self, k: int, vocabulary_size: int, *, longest: int) -> LogprobEngine:
        """The engine, probed: it gives `k` log-probabilities, and takes sequences of `longest` tokens. Raises KdError."""
        if self.serving.url is None:
            from kd.cache_builder.served.in_process import InProcessEngine

            return InProcessEngine(self.request, self.serving, k, vocabulary_size, longest)
        return self._engine_of(self.serving.url, self.serving.patience, k, vocabulary_size, longest)

    def check(self, k: int, vocabulary_size: int, *, longest: int) -> None:
        """Raise KdError where a server could not do a build's work. vLLM in this process is not started for that."""
        if self.serving.url is not None:
            self._engine_of(self.serving.url, FIRST_PATIENCE, k, vocabulary_size, longest).close()

    def _engine_of(self, url: str, patience: float, k: int, vocabulary_size: int, longest: int) -> ServerEngine:
        client = ServerClient(url, patience=patience)
        engine = ServerEngine(
            client, server_report(client, self.serving), k, vocabulary_size, self.serving.tokens_in_flight
        )
        engine.refuse_too_long(longest)
        engine.probe(self._few_ids(vocabulary_size))
        return engine

    def _few_ids(self, vocabulary_size: int) -> Sequence[int]:
        ids = self.tokenizer()(PROBED, add_special_tokens=False)["input_ids"][:16]
        return ids if len(ids) > 1 else [0, min(1, vocabulary_size - 1)]

    def _refuse_other_kinds(self, config: Any) -> None:
        refused = {
            f"--load-in-{self.request.bits}bit": self.request.bits is not None,
            "--teacher-adapter": self.request.adapter is not None,
            "--device-map": self.request.placement.spread,
            "random weights": self.request.random_shape is not None,
        }
        if any(refused.values()):
            raise DataError(
                "an engine loads the teacher as it is stored, where it sees fit",
                where=self.request.name,
                found=", ".join(name for name, given in refused.items() if given),
                try_="--backend transformers",
            )
        if is_encoder_decoder(config) or is_classifier(config):
            raise DataError(
                "a served teacher is a causal language model",
                where=self.request.name,
                found=(config.architectures or [type(config).__name__])[0],
                try_="--backend transformers, which loads the teacher here",
            )
