"""BERTScore of answers with any encoder, by bert-score's own matching (Zhang et al. 2020, arXiv:1904.09675).

The matching is the library's, the encoder is loaded here: from a folder or the hub, without remote code, up to the layer whose
states are compared. Which layer that is for a known encoder, the library says; another one needs `--bertscore-layer`.
Baselines and idf are left out, as in system 001, so that figures of two encoders do not compare, and the encoder, its
layer and the library's own hash stand beside every figure.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kd.common.errors import DataError
from kd.common.paths import as_path
from kd.models.model_request import resolve_device
from kd.models.text_encoder import load_encoder

PAIRS_PER_BATCH = 64


def encoder_layer(name: str, layer: int | None) -> int:
    """The layer to compare: as asked, else bert-score's for that encoder (a folder counts by its name). Raises DataError."""
    from bert_score.utils import model2layers

    if layer is not None:
        return layer
    short = {key.rpartition("/")[2]: number for key, number in model2layers.items()}
    number_of_layer = model2layers.get(name, short.get(Path(name).name))
    if number_of_layer is None:
        raise DataError(
            "bert-score recommends no layer of this encoder",
            found=f"--bertscore-model {name}",
            try_="--bertscore-layer N, counted from 1",
        )
    return int(number_of_layer)


def described(name: str, layer: int | None) -> str:
    """The library's hash, with the encoder's name as given (a folder's last part)."""
    from bert_score.utils import get_hash

    shown = Path(name).name if os.path.isdir(as_path(name)) else name
    return str(get_hash(shown, encoder_layer(name, layer), False, False, False, True))


def encoder_f1(
    answers: Sequence[str],
    references: Sequence[Sequence[str]],
    name: str,
    *,
    layer: int | None = None,
    device: str = "auto",
) -> np.ndarray:
    """`[E]` float64: the best F1 of each answer over its references; 0 for an answer without text, as in the library."""
    from bert_score.utils import bert_cos_score_idf

    pairs = [
        (e, answer, text)
        for e, (answer, texts) in enumerate(zip(answers, references, strict=True))
        for text in texts
        if answer.strip() and text.strip()
    ]
    best = np.zeros(len(answers))
    if not pairs:
        return best
    device = resolve_device(device)
    model, tokenizer = load_encoder(name, encoder_layer(name, layer), device)
    weights: Any = defaultdict(lambda: 1.0)
    weights |= {token: 0.0 for token in (tokenizer.sep_token_id, tokenizer.cls_token_id) if token is not None}
    texts = ([text for _, _, text in pairs], [answer for _, answer, _ in pairs])
    scores = bert_cos_score_idf(
        model, *texts, tokenizer, weights, verbose=False, batch_size=PAIRS_PER_BATCH, device=device
    )
    for (e, _, _), f1 in zip(pairs, scores[:, 2].double().tolist(), strict=True):
        best[e] = max(best[e], f1)
    return best
