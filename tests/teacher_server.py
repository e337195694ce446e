"""A stand-in for inference servers: it speaks the JSON of vLLM, of SGLang, or of completions with `echo`, over a small model.

Its numbers are those of the model in float32, one sequence at a time, so a cache that is built through it can be compared
with one of the same model in this process. The shapes of the documents are those that vLLM 0.32 sent when it was asked.
"""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import torch
from servers import Answer, Server

from kd.models.loading import load_model
from kd.models.model_request import ModelRequest


class TeacherServer(Server):
    """Serves the model of a folder; attributes change what it does."""

    def __init__(self, folder: Path, api: str = "vllm") -> None:
        self.model = load_model(ModelRequest(str(folder), device="cpu"))
        self.api = api
        self.names = ["tiny"]
        self.root = "/somewhere/models/tiny"
        self.version = "0.32.0"
        self.max_logprobs = 64
        self.max_model_len = 512
        self.mode = "raw_logprobs"
        self.key: str | None = None
        self.questions: list[dict[str, Any]] = []
        self.at_once, self.most_at_once = 0, 0
        self._counting = threading.Lock()
        super().__init__()

    def answer(self, method: str, path: str, headers: dict[str, str], body: bytes) -> Answer:
        if self.key is not None and headers.get("Authorization") != f"Bearer {self.key}":
            return self.error(401, "Unauthorized")
        if path == "/v1/models":
            models = [
                {"id": name, "root": self.root, "parent": None, "max_model_len": self.max_model_len}
                for name in self.names
            ]
            return document({"object": "list", "data": models})
        if path == "/version" and self.api == "vllm":
            return document({"version": self.version})
        if path == "/get_server_info" and self.api == "sglang":
            return document({"version": "0.5.4"})
        question = json.loads(body) if body else {}
        if path == "/v1/completions" and self.api in ("vllm", "echo"):
            return self.counted(self.completion, question)
        if path == "/generate" and self.api == "sglang":
            return self.counted(self.generation, question)
        return self.error(404, "Not Found")

    def error(self, status: int, words: str) -> Answer:
        return document({"error": {"message": words, "type": "BadRequestError", "code": status}}, status)

    def counted(self, work: Any, question: dict[str, Any]) -> Answer:
        with self._counting:
            self.questions.append(question)
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            answer: Answer = work(question)
        finally:
            with self._counting:
                self.at_once -= 1
        return answer

    @torch.inference_mode()
    def values(self, ids: list[int], temperature: float) -> torch.Tensor:
        """`[T, V]` what the server calls log-probabilities after each token."""
        logits = self.model(torch.tensor([ids])).logits[0].float()
        if self.mode == "raw_logits":
            return logits
        scale = temperature if self.mode == "processed_logprobs" and temperature else 1.0
        return (logits / scale).log_softmax(dim=-1)

    def completion(self, question: dict[str, Any]) -> Answer:
        ids, k = question["prompt"], question.get("prompt_logprobs", question.get("logprobs", 0))
        if question["model"] not in self.names:
            return self.error(404, f"The model `{question['model']}` does not exist.")
        if k > self.max_logprobs:
            words = f"Requested prompt logprobs of {k}, which is greater than max allowed: {self.max_logprobs}"
            return self.error(400, f"{words} (parameter=prompt_logprobs, value={k})")
        written = self.written(ids, question["max_tokens"], question.get("stop_token_ids", [0]))
        choice: dict[str, Any] = {"index": 0, "text": "", "finish_reason": "length", "logprobs": None}
        if question.get("return_token_ids"):
            choice |= {"prompt_token_ids": ids, "token_ids": written}
        temperature = question["temperature"]
        if question.get("prompt_logprobs") is not None:
            entries = self.entries(ids, k, temperature)
            choice["prompt_logprobs"] = [None, *({str(i): e for i, e in entry.items()} for entry in entries)]
            top = self.values(ids, temperature)[-1].topk(min(k, 5))
            told = {f"text {i}": v for i, v in zip(top.indices.tolist(), top.values.tolist(), strict=True)}
            choice["logprobs"] = {"top_logprobs": [told], "tokens": [""], "token_logprobs": [top.values[0].item()]}
        elif question.get("echo"):
            every = [*ids, *written]
            tops: list[Any] = [None]
            for entry in self.entries(every, k, temperature):
                tops.append({f"token_id:{i}": e["logprob"] for i, e in entry.items()})
            own = [None, *(tops[t][f"token_id:{every[t]}"] for t in range(1, len(every)))]
            names = [f"token_id:{i}" for i in every]
            choice["logprobs"] = {"tokens": names, "token_logprobs": own, "top_logprobs": tops}
        return document({"object": "text_completion", "model": question["model"], "choices": [choice]})

    def entries(self, ids: list[int], k: int, temperature: float) -> list[dict[int, dict[str, Any]]]:
        """As vLLM makes them: the k most probable tokens, and the one that is there."""
        values = self.values(ids, temperature)
        every = []
        for t in range(1, len(ids)):
            row = values[t - 1]
            top = row.topk(k)
            rank = int((row >= row[ids[t]]).sum())
            entry = {ids[t]: {"logprob": row[ids[t]].item(), "rank": rank, "decoded_token": "?"}}
            for number, (i, value) in enumerate(zip(top.indices.tolist(), top.values.tolist(), strict=True)):
                entry[i] = {"logprob": value, "rank": number + 1, "decoded_token": "?"}
            every.append(entry)
        return every

    def generation(self, question: dict[str, Any]) -> Answer:
        ids, sampling = question["input_ids"], question["sampling_params"]
        written = self.written(ids, sampling["max_new_tokens"], sampling.get("stop_token_ids", [0]))
        info: dict[str, Any] = {"output_token_logprobs": [[-1.0, i, None] for i in written]}
        if "top_logprobs_num" in question:
            entries = self.entries(ids, question["top_logprobs_num"], sampling["temperature"])
            own = [[e[i]["logprob"], i, None] for e, i in zip(entries, ids[1:], strict=True)]
            info["input_token_logprobs"] = [[None, ids[0], None], *own]
            k = question["top_logprobs_num"]
            tops = [sorted(([e["logprob"], i, None] for i, e in entry.items()), reverse=True)[:k] for entry in entries]
            info["input_top_logprobs"] = [None, *tops]
        return document({"text": "", "meta_info": info})

    @torch.inference_mode()
    def written(self, ids: list[int], most: int, stop: list[int]) -> list[int]:
        """The most probable tokens, until one of `stop`."""
        every = list(ids)
        for _ in range(most):
            every.append(int(self.model(torch.tensor([every[-64:]])).logits[0, -1].argmax()))
            if every[-1] in stop:
                break
        return every[len(ids) :]


def document(value: Any, status: int = 200) -> Answer:
    return Answer(status, {"Content-Type": "application/json"}, json.dumps(value).encode())
