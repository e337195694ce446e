"""Classifiers by name: any decoder-only model of transformers with a sequence-classification head.

    logits = head(hidden state of the last token that is not padding)        head: Linear(d, labels), no bias

GPT-2, GPT-NeoX, GPT-Neo and Llama layouts call the head `score`. Because it is linear, backbone and head come apart: the mean of
several backbones' states under one head is the mean of their logits, and a merged backbone takes every task's head.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kd.data.errors import DataError
from kd.data.models import ModelRequest, cannot_load, load_config, resolve_device, resolve_dtype
from kd.student_trainer.classify.encoding import EncodedRows, length_batches

HEAD = "score"


def load_classifier(request: ModelRequest, labels: Sequence[str] | None = None, *, pad_id: int) -> Any:
    """The model with its head, in evaluation mode on its device.

    labels   a word per class: a language model gets a new random head of that many; None = the model's own classes
    Raises TeacherError for a model that cannot be loaded, DataError for one without such a head or with another number
    of classes than labels.
    """
    from transformers import AutoModelForSequenceClassification as Auto

    config = load_config(request)
    trained = any(name.endswith("ForSequenceClassification") for name in config.architectures or ())
    if labels is None and not trained:
        raise DataError("the model is no classifier", where=request.name, found=", ".join(config.architectures or ()),
                        expected="…ForSequenceClassification", try_="kd classify train makes one")  # fmt: skip
    if trained and labels is not None and config.num_labels != len(labels):
        raise DataError("the classifier has another number of classes", where=request.name, found=config.num_labels,
                        expected=f"{len(labels)}: {', '.join(labels)}")  # fmt: skip
    if labels is not None:
        config.id2label = dict(enumerate(labels))
        config.label2id = {word: number for number, word in enumerate(labels)}
    config.pad_token_id = pad_id
    dtype, device = resolve_dtype(request), resolve_device(request.device)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(request.seed)  # of a new head, or of random weights
            if request.random_shape is not None:
                model = Auto.from_config(config, dtype=dtype)
            else:
                model = Auto.from_pretrained(
                    request.path, config=config, revision=request.revision, dtype=dtype, trust_remote_code=False
                )
    except Exception as error:
        raise cannot_load(request, error) from error
    if not isinstance(getattr(model, HEAD, None), torch.nn.Linear):
        raise DataError("the model's classification head is of another kind", where=request.name,
                        found=type(model).__name__, expected="a decoder-only model: GPT-2, GPT-NeoX, Llama, …")  # fmt: skip
    return model.to(device).eval()


def last_states(backbone: Any, batch: dict[str, Tensor], pad_id: int) -> Tensor:
    """`[B, d]`: the final hidden state of each row's last token that is not padding (of an empty row, the first)."""
    hidden_BTd = backbone(**batch, use_cache=False).last_hidden_state
    real_BT = batch["input_ids"] != pad_id
    places = torch.arange(real_BT.shape[1], device=real_BT.device)
    last_B = (real_BT * places).argmax(dim=1)
    return hidden_BTd[torch.arange(len(last_B), device=last_B.device), last_B]  # type: ignore[no-any-return]


@torch.no_grad()
def pooled_states(backbone: Any, rows: EncodedRows, *, tokens_per_batch: int = 4096) -> Tensor:
    """What heads read, `[n, d]` float32 on the CPU, in the rows' order."""
    device = next(backbone.parameters()).device
    states = torch.empty((len(rows), backbone.config.hidden_size))
    for numbers, batch in length_batches(rows, tokens_per_batch):
        found = last_states(backbone, {k: v.to(device) for k, v in batch.items()}, rows.pad_id)
        states[numbers] = found.float().cpu()
    return states


def merged_adapters(model: Any) -> Any:
    """The plain model with its adapters added in."""
    with warnings.catch_warnings():  # peft warns of tied weights in configurations that have none
        warnings.filterwarnings("ignore", message="Input and output embeddings are no longer tied")
        return model.merge_and_unload()
