"""Load and split classifiers: decoder-only models of transformers with a sequence-classification head.

    logits = head(hidden state of the last token that is not padding)        head: Linear(d, labels), no bias

GPT-2, GPT-NeoX, GPT-Neo and Llama layouts call the head `score`. The head is linear, so backbone and head can be used
separately. The mean of several backbones' states under one head is the mean of their logits, and a merged backbone works with
every task's head. A teacher pass treats a classifier as a language model with one scored position per text and a vocabulary
of labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from kd.common.errors import DataError, TeacherError
from kd.models.batching.gaps import Gaps
from kd.models.batching.padded_batches import Size, padded_ids
from kd.models.heads import LanguageModelHead
from kd.models.loading import refuse_damaged_model
from kd.models.model_config import cannot_load, is_classifier, load_config, resolve_dtype
from kd.models.model_request import ModelRequest, resolve_device

if TYPE_CHECKING:
    from torch import Tensor

HEAD = "score"


def load_classifier(request: ModelRequest, labels: Sequence[str] | None = None, *, pad_id: int) -> Any:
    """Load a classifier in evaluation mode on its device.

    labels   a word per class: a language model gets a new random head of that many classes; None keeps the model's own
    pad_id   id of the padding token

    Raises TeacherError if the model cannot be loaded. Raises DataError if it has no such head, another number of classes
    than `labels`, or the same words in another order.
    """
    import torch
    from transformers import AutoModelForSequenceClassification as Auto

    refuse_damaged_model(request)
    config = labelled_config(request, labels)
    if request.bits is not None:
        raise DataError(
            f"classifiers cannot be loaded in {request.bits} bits",
            where=request.name,
            found=f"{request.bits} bits",
            try_="--dtype bfloat16",
        )
    config.pad_token_id = pad_id
    dtype, device = resolve_dtype(request), resolve_device(request.device)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(request.seed)  # for a new head, or for random weights
            if request.random_shape is not None:
                model = Auto.from_config(config, dtype=dtype)
            else:
                model = Auto.from_pretrained(
                    request.path, config=config, revision=request.revision, dtype=dtype, trust_remote_code=False
                )
    except Exception as error:
        raise cannot_load(request, error) from error
    _require_head(request, model)
    return model.to(device).eval()


def labelled_config(request: ModelRequest, labels: Sequence[str] | None) -> Any:
    """The configuration of a classifier, with `labels` as its classes. Raises DataError as `load_classifier`."""
    config = load_config(request)
    trained = is_classifier(config)
    if labels is None and not trained:
        raise DataError(
            "the model is not a classifier",
            where=request.name,
            found=", ".join(config.architectures or ()),
            expected="…ForSequenceClassification",
            try_="kd classify train, which makes one",
        )
    if trained and labels is not None:
        refuse_other_classes(request, config, labels)
    if labels is not None:
        config.id2label = dict(enumerate(labels))
        config.label2id = {word: number for number, word in enumerate(labels)}
    return config


def classifier_parameters(request: ModelRequest, labels: Sequence[str]) -> int:
    """Number of parameters of the classifier that `load_classifier` would load, without its weights. Raises as it does."""
    model = _on_meta(request, labelled_config(request, labels))
    return sum(p.numel() for p in model.parameters())


def refuse_other_heads(request: ModelRequest, config: Any) -> None:
    """Raise DataError where the classifier that a configuration describes has a head of another kind, as encoders have."""
    _on_meta(request, config)


def _on_meta(request: ModelRequest, config: Any) -> Any:
    """The classifier that a configuration describes. Raises DataError for a head of another kind.

    Only transformers' classes define the head, so the model is created on the meta device, without weights or memory.
    """
    import torch
    from transformers import AutoModelForSequenceClassification as Auto

    try:
        with torch.device("meta"):
            model = Auto.from_config(deepcopy(config), trust_remote_code=False)
    except Exception as error:
        raise cannot_load(request, error) from error
    _require_head(request, model)
    return model


def _require_head(request: ModelRequest, model: Any) -> None:
    import torch

    if not isinstance(getattr(model, HEAD, None), torch.nn.Linear):
        raise DataError(
            "the model's classification head is not a single linear layer called score",
            where=request.name,
            found=type(model).__name__,
            expected="a decoder-only model: GPT-2, GPT-NeoX, Llama, …",
            try_="kd classify train with such a --model",
        )


def refuse_other_classes(request: ModelRequest, config: Any, labels: Sequence[str]) -> None:
    """Raise DataError where a classifier has another number of classes, or the same words in another order.

    Classes with other words (such as LABEL_0, …) are taken to be the labels in their order.
    """
    if config.num_labels != len(labels):
        raise DataError(
            "the classifier has another number of classes",
            where=request.name,
            found=config.num_labels,
            expected=f"{len(labels)}: {', '.join(labels)}",
        )
    classes = [str(config.id2label.get(i, "")) for i in range(config.num_labels)]
    plain, expected = ([word.strip().lower().replace(" ", "_") for word in words] for words in (classes, labels))
    if plain != expected and sorted(plain) == sorted(expected):
        raise DataError(
            "the classifier numbers its classes in another order",
            where=request.name,
            found=", ".join(classes),
            expected=", ".join(labels),
            try_="kd classify train, or reorder the rows of its head",
        )


def last_states(backbone: Any, batch: dict[str, Tensor], pad_id: int) -> Tensor:
    """`[B, d]`: the final hidden state of each row's last token that is not padding (of the first token in an empty row)."""
    import torch

    hidden_BTd = backbone(**batch, use_cache=False).last_hidden_state
    real_BT = batch["input_ids"] != pad_id
    positions = torch.arange(real_BT.shape[1], device=real_BT.device)
    last_B = (real_BT * positions).argmax(dim=1)
    return hidden_BTd[torch.arange(len(last_B), device=last_B.device), last_B]  # type: ignore[no-any-return]


@dataclass(frozen=True)
class ClassifierHead(LanguageModelHead):
    """A classifier in two parts: one row of `weight` per class, one scored position per text.

    It has the interface of a language model whose target is one token, the number of the label.
    """

    pad_id: int
    """Id of the padding token, whose states the head never reads."""

    def size(self, context: int, target: int) -> Size:
        """Tokens of the text; the label is not fed to the model."""
        return context

    def scored_hidden(
        self, contexts: Sequence[np.ndarray], targets: Sequence[np.ndarray], gaps: Sequence[Gaps] | None = None
    ) -> Tensor:
        """`[N, d]`: the state of each context's last token that is not padding (of its first token where there is none)."""
        hidden = self.hidden(*padded_ids(contexts, self.weight.device))
        last = [int(np.flatnonzero(np.append(True, c[1:] != self.pad_id))[-1]) for c in contexts]
        return hidden[list(range(len(last))), last]


def split_classifier(model: Any, pad_id: int) -> ClassifierHead:
    """Split a classifier, and check on a few tokens that the parts give its own logits. Raises TeacherError."""
    import torch

    head = getattr(model, HEAD)
    parts = ClassifierHead(model.base_model, head.weight, head.bias, pad_id)
    size = int(model.config.get_text_config().vocab_size)
    texts = [np.array([i % size for i in range(1, n) if i % size != pad_id]) for n in (8, 5)]
    with torch.no_grad():
        logits = parts.logits(parts.scored_hidden(texts, []))
        alone = [model(input_ids=torch.from_numpy(text)[None].to(head.weight.device)).logits[0] for text in texts]
    expected = torch.stack(alone).float()
    # both are the same product; bfloat16 carries 8 bits, so 2 % of the largest logit is far above rounding
    if not torch.allclose(logits, expected, atol=0.02 * float(expected.abs().max()) + 1e-6):
        raise TeacherError(
            "the model changes its logits after the classification head",
            where=type(model).__name__,
            found=f"largest difference {float((logits - expected).abs().max()):.3g}",
            expected=f"logits = {HEAD}(last hidden state)",
        )
    return parts
