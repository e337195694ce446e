"""Settings of a teacher that an inference engine runs. This module imports nothing heavy: the command line reads it."""

from __future__ import annotations

from dataclasses import dataclass

from kd.common.errors import DataError
from kd.common.settings import check, setting

BACKEND_NAMES = ("auto", "transformers", "vllm", "server")
"""What runs the teacher: the keys of `builder.BACKENDS`, and `auto`."""
SERVER_APIS = ("auto", "vllm", "sglang", "echo")
"""Interfaces of servers: the keys of `server_dialects.DIALECTS`, and `auto`."""


@dataclass(frozen=True)
class ServedSettings:
    """An inference engine that runs the teacher. It gives log-probabilities at temperature 1."""

    backend: str = setting("auto", choices=BACKEND_NAMES)
    """What runs the teacher. transformers: a model in this process; vllm: vLLM in this process; server: the one at
    --teacher-url; auto: server where --teacher-url is given, else transformers."""
    teacher_url: str | None = setting(None, metavar="URL")
    """Address of a server that runs the teacher, such as http://localhost:8000/v1. --teacher then names the folder or hub
    id of its configuration and tokenizer; no weights are read. The variable KD_TEACHER_API_KEY holds the server's key."""
    served_model: str | None = setting(None, metavar="NAME", shown="the server's only model")
    """What the server calls the teacher."""
    teacher_id: str | None = setting(None, metavar="TEXT")
    """Your own name of the weights that a server runs, such as a commit. It is part of the cache's identity, because the
    weights themselves cannot be digested."""
    server_api: str = setting("auto", choices=SERVER_APIS)
    """How the server is asked. vllm: prompt_logprobs; sglang: /generate; echo: completions with echo and logprobs."""
    tensor_parallel: int = setting(1, minimum=1)
    """GPUs, or processes, that share each layer. vllm starts its own; transformers needs torchrun, which starts so many for
    each of --workers."""
    pipeline_parallel: int = setting(1, minimum=1)
    """With --backend vllm: GPUs that share the layers among them."""

    def __post_init__(self) -> None:
        check(self)
        if self.backend != "auto" and (self.backend == "server") != (self.teacher_url is not None):
            raise DataError(
                "a server needs its address, and another backend has none",
                found=f"--backend {self.backend} with{'' if self.teacher_url else 'out'} --teacher-url",
                try_="--teacher-url URL alone, or --backend vllm|transformers without it",
            )
        if self.teacher_url is None:
            of_servers = {
                "--served-model": self.served_model,
                "--teacher-id": self.teacher_id,
                "--server-api": None if self.server_api == "auto" else self.server_api,
            }
            given = [option for option, value in of_servers.items() if value is not None]
            if given:
                raise DataError("there is no server", found=", ".join(given), try_="--teacher-url URL")
        if self.teacher_url is not None and (self.tensor_parallel, self.pipeline_parallel) != (1, 1):
            raise DataError(
                "a server is not told how many GPUs to use",
                found="--tensor-parallel or --pipeline-parallel with --teacher-url",
                try_="the options of the server",
            )
        if self.backend != "vllm" and self.pipeline_parallel != 1:
            raise DataError(
                "only vLLM in this process shares the layers among GPUs",
                found=f"--pipeline-parallel {self.pipeline_parallel}",
                try_="--backend vllm, or --device-map auto",
            )

    @property
    def processes(self) -> int:
        """Processes of torchrun that hold one teacher together, where transformers runs it."""
        return 1 if self.served else self.tensor_parallel

    @property
    def served(self) -> bool:
        """Whether an engine runs the teacher."""
        return self.teacher_url is not None or self.backend == "vllm"
