"""Log-probabilities of several continuations of one context. The context passes through the model once.

A question with four options is four texts with the same beginning. Separate passes would read that beginning four times.
Here the model reads it once, and each option continues from the state that the model keeps:

    causal            keys and values of the contexts (padded on the left, as in generation), then one pass per option
                      over its own tokens; the first token of every option is read from the context's last position
    encoder-decoder   one pass of the encoder and one projection of its output to the decoder's cross-attention

No state is copied. transformers' dynamic caches grow by making new tensors, so a shallow copy of the cache is enough.
The log-probabilities equal those of separate passes up to rounding. This is checked on a few tokens before a model is
used. A model that fails the check (recurrent layers, caches that are written in place) is scored by separate passes
(`kd.evaluation.scoring.scored_text.gold_nll`). benchmarks/eval_speed.py compares the speed with lm-evaluation-harness.

Shapes: B contexts of a batch, C context tokens, n continuation tokens, d width of the model, U rows of hidden states.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from kd.common.progress import Progress
from kd.evaluation.scoring.scored_text import (
    ScoredText,
    gold_nll,
    not_finite,
    out_of_memory,
    refuse_unknown_text,
    require_vocabulary,
)
from kd.models.batching.padded_batches import Size, batches_by_length, head_rows
from kd.models.heads import EncoderDecoderHead, LanguageModelHead, split_head
from kd.models.loading import Model

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Branch:
    """A context and the texts that may follow it."""

    context_ids: np.ndarray
    """[C] int32 ids of the context, C >= 1."""
    continuations: tuple[np.ndarray, ...]
    """[n] int32 ids of each continuation, n >= 1; all are different, and the longest comes first."""


def shared_nll(
    model: Model,
    texts: Sequence[ScoredText],
    *,
    vocabulary_size: int | None = None,
    tokens_per_batch: int | None = None,
    forced: Sequence[int] = (),
) -> Generator[Progress[Any], None, np.ndarray]:
    """As `gold_nll`: yields progress, returns `[N]` float64 nats in the texts' order; equal contexts are read once.

    Equal texts get equal numbers.

    vocabulary_size   columns of the output layer that count; None = all of them
    forced            as `split_head`

    Raises DataError for too few columns, too little memory, or logits that are not finite.
    """
    head = split_head(model, forced)
    size = int(head.weight.shape[0]) if vocabulary_size is None else vocabulary_size
    require_vocabulary(int(head.weight.shape[0]), size)
    refuse_unknown_text(texts, int(head.weight.shape[0]))
    if not shares_context(head):
        return (
            yield from gold_nll(model, texts, vocabulary_size=size, tokens_per_batch=tokens_per_batch, forced=forced)
        )
    tokens_per_batch = tokens_per_batch or head.forward_tokens()
    branches, places = group_by_context(texts)
    total, done = sum(len(t.target_ids) for t in texts), 0
    by_branch: list[list[np.ndarray]] = [[] for _ in branches]
    counts = [sum(len(texts[i].target_ids) for ways in at for i in ways) for at in places]
    yield Progress(0, total)
    sizes: list[Size] = [(len(b.context_ids), len(b.continuations[0])) for b in branches]
    for batch in batches_by_length(sizes, tokens_per_batch):
        try:
            for branch, nlls in zip(batch, _batch_nll(head, [branches[i] for i in batch], size), strict=True):
                by_branch[branch] = nlls
        except _NotFinite as error:
            first = texts[places[batch[error.branch]][error.way][0]]
            raise not_finite(first.id, error.token) from None
        except torch_out_of_memory() as error:
            raise out_of_memory(error, tokens_per_batch) from error
        done += sum(counts[i] for i in batch)
        yield Progress(done, total)
    by_text: list[np.ndarray] = [np.empty(0)] * len(texts)
    for nlls, at in zip(by_branch, places, strict=True):
        for nll, numbers in zip(nlls, at, strict=True):
            for number in numbers:
                by_text[number] = nll
    return np.concatenate(by_text)


def group_by_context(texts: Sequence[ScoredText]) -> tuple[list[Branch], list[list[list[int]]]]:
    """Branches in order of first appearance, and for each of their continuations the numbers of the texts it is of."""
    groups: dict[bytes, dict[bytes, list[int]]] = {}
    for number, text in enumerate(texts):
        group = groups.setdefault(text.context_ids.astype(np.int32).tobytes(), {})
        group.setdefault(text.target_ids.astype(np.int32).tobytes(), []).append(number)
    branches, places = [], []
    for group in groups.values():
        ways = sorted(group.values(), key=lambda numbers: -len(texts[numbers[0]].target_ids))
        branches.append(Branch(texts[ways[0][0]].context_ids, tuple(texts[w[0]].target_ids for w in ways)))
        places.append(ways)
    return branches, places


def shares_context(head: LanguageModelHead) -> bool:
    """Whether branching off from a context gives the numbers of separate passes. It is tried on a few tokens.

    Two contexts of different lengths, so that padding is part of the trial; continuations of 4, 2 and 1 tokens.
    """
    import torch

    ids = np.arange(1, 20) % int(head.weight.shape[0])
    trial = [Branch(ids[:7], (ids[7:11], ids[11:13], ids[13:14])), Branch(ids[14:17], (ids[2:6], ids[17:19]))]
    with torch.inference_mode():
        rows = _branch_hidden(head, trial)
        if rows is None:
            return False
        pairs = [(b.context_ids, ids) for b in trial for ids in b.continuations]
        apart = head.scored_hidden([c for c, _ in pairs], [t for _, t in pairs]).float()
        shared = rows.hidden[torch.from_numpy(np.concatenate([at for ways in rows.at for at in ways]))].float()
    # float32 sums in another order move the seventh digit, bfloat16's the second; another position moves the first
    share = 1e-3 if head.weight.dtype == torch.float32 else 0.1
    return bool((shared - apart).abs().max() <= share * apart.abs().max())


def torch_out_of_memory() -> type[Exception]:
    import torch

    return torch.OutOfMemoryError


class _NotFinite(Exception):
    """Raised where a logit is NaN or infinite; it says where in the batch."""

    def __init__(self, branch: int, way: int, token: int) -> None:
        self.branch, self.way, self.token = branch, way, token
        super().__init__()


@dataclass(frozen=True)
class _Rows:
    """Hidden states that predict the tokens of a batch's continuations."""

    hidden: torch.Tensor
    """[U, d]; a row that several continuations share is there once."""
    at: list[list[np.ndarray]]
    """[n] int64 for each branch and continuation: the rows of its tokens."""


def _batch_nll(head: LanguageModelHead, branches: Sequence[Branch], vocabulary_size: int) -> list[list[np.ndarray]]:
    """`[n]` float64 nats for each branch and continuation."""
    import torch

    with torch.inference_mode():
        rows = _branch_hidden(head, branches)
        assert rows is not None, "the trial branched off, so this does"
        ways = [at for branch in rows.at for at in branch]
        row_P = np.concatenate(ways)
        gold_P = np.concatenate([ids for b in branches for ids in b.continuations]).astype(np.int64)
        order = np.argsort(row_P, kind="stable")
        nll_P = np.empty(len(row_P), dtype=np.float64)
        step = head_rows(vocabulary_size, head.weight.device.type)
        for start in range(0, len(rows.hidden), step):
            logits = head.logits(rows.hidden[start : start + step])[:, :vocabulary_size]
            low, high = np.searchsorted(row_P[order], (start, start + step))
            pairs = order[low:high]
            at = torch.from_numpy(row_P[pairs] - start).to(logits.device)
            gold = torch.from_numpy(gold_P[pairs]).to(logits.device)
            log_z = logits.logsumexp(dim=1)
            nll_P[pairs] = (log_z[at] - logits[at, gold]).cpu().numpy()
    lengths = [len(at) for at in ways]
    if not np.isfinite(nll_P).all():
        first_bad = int(np.flatnonzero(~np.isfinite(nll_P))[0])
        way = int(np.searchsorted(np.cumsum(lengths), first_bad, side="right"))
        first = np.cumsum([0, *(len(b.continuations) for b in branches)])
        branch = int(np.searchsorted(first, way, side="right")) - 1
        raise _NotFinite(branch, way - int(first[branch]), first_bad - sum(lengths[:way]))
    parts = iter(np.split(nll_P, np.cumsum(lengths)[:-1]))
    return [[next(parts) for _ in b.continuations] for b in branches]


def _branch_hidden(head: LanguageModelHead, branches: Sequence[Branch]) -> _Rows | None:
    """Hidden states of a batch; None where the model keeps something that cannot be branched off from."""
    return _decoder_rows(head, branches) if isinstance(head, EncoderDecoderHead) else _causal_rows(head, branches)


def _passes(branches: Sequence[Branch], shortest: int) -> Iterator[tuple[int, list[int]]]:
    """(way, branches that have it, with at least `shortest` tokens) for every way there is."""
    for way in range(max(len(b.continuations) for b in branches)):
        held = [
            i for i, b in enumerate(branches) if way < len(b.continuations) and len(b.continuations[way]) >= shortest
        ]
        if held:
            yield way, held


def _causal_rows(head: LanguageModelHead, branches: Sequence[Branch]) -> _Rows | None:
    import torch

    device, takes = head.weight.device, "position_ids" in inspect.signature(head.backbone.forward).parameters
    lengths = torch.tensor([len(b.context_ids) for b in branches])
    width = int(lengths.max())
    ids = np.zeros((len(branches), width), dtype=np.int64)
    for row, branch in enumerate(branches):
        ids[row, width - len(branch.context_ids) :] = branch.context_ids
    mask = (torch.arange(width) >= (width - lengths)[:, None]).long()
    padded = bool((lengths < width).any())
    positions = {"position_ids": (mask.cumsum(dim=1) - 1).clamp(min=0).to(device)} if takes else {}
    output = head.backbone(
        input_ids=torch.from_numpy(ids).to(device),
        use_cache=True,
        attention_mask=mask.to(device) if padded else None,
        **positions,
    )
    past = getattr(output, "past_key_values", None)
    if not _is_branchable(past):
        return None
    hidden = [output.last_hidden_state[:, -1]]
    at: list[list[np.ndarray]] = [[np.array([i])] * len(b.continuations) for i, b in enumerate(branches)]
    count = len(branches)
    for way, held in _passes(branches, 2):  # the last token of a continuation predicts nothing
        texts = [branches[i].continuations[way][:-1] for i in held]
        sizes = torch.tensor([len(t) for t in texts])
        longest = int(sizes.max())
        steps = torch.arange(longest)
        after = np.zeros((len(held), longest), dtype=np.int64)
        for row, text in enumerate(texts):
            after[row, : len(text)] = text
        if takes:  # padding stands on the last token's position, which is sure to exist
            positions = {"position_ids": (lengths[held, None] + torch.minimum(steps, sizes[:, None] - 1)).to(device)}
        seen = torch.cat([mask[held], torch.ones(len(held), longest, dtype=torch.long)], dim=1).to(device)
        states = head.backbone(
            input_ids=torch.from_numpy(after).to(device),
            attention_mask=seen if padded else None,
            past_key_values=_branch(past, held, len(branches)),
            use_cache=True,
            **positions,
        ).last_hidden_state
        hidden.append(states[steps < sizes[:, None]])
        for i, text in zip(held, texts, strict=True):
            at[i][way] = np.concatenate([[i], np.arange(count, count + len(text))])
            count += len(text)
    return _Rows(torch.cat(hidden), at)


def _decoder_rows(head: EncoderDecoderHead, branches: Sequence[Branch]) -> _Rows | None:
    import torch
    from transformers import DynamicCache, EncoderDecoderCache

    device = head.weight.device
    lengths = torch.tensor([len(b.context_ids) for b in branches])
    width = int(lengths.max())
    ids = np.zeros((len(branches), width), dtype=np.int64)
    for row, branch in enumerate(branches):
        ids[row, : len(branch.context_ids)] = branch.context_ids
    mask = (torch.arange(width) < lengths[:, None]).long().to(device) if bool((lengths < width).any()) else None
    memory = head.encoder(input_ids=torch.from_numpy(ids).to(device), attention_mask=mask).last_hidden_state
    cross: Any = None
    hidden, count = [], 0
    at: list[list[np.ndarray]] = [[np.empty(0, dtype=np.int64)] * len(b.continuations) for b in branches]
    for way, held in _passes(branches, 1):
        texts = [branches[i].continuations[way] for i in held]
        inputs = [head.decoder_inputs(text) for text in texts]
        sizes = torch.tensor([len(i) for i in inputs])
        read = np.zeros((len(held), int(sizes.max())), dtype=np.int64)
        for row, ids in enumerate(inputs):
            read[row, : len(ids)] = ids
        past = EncoderDecoderCache(
            DynamicCache(), DynamicCache() if cross is None else _branch(cross, held, len(branches))
        )
        output = head.backbone(
            input_ids=torch.from_numpy(read).to(device),
            encoder_hidden_states=memory[held],
            encoder_attention_mask=None if mask is None else mask[held],
            past_key_values=past,
            use_cache=True,
        )
        if cross is None:  # the first way: every branch has one
            kept = getattr(output, "past_key_values", None)
            cross = kept.cross_attention_cache if isinstance(kept, EncoderDecoderCache) else None
            if not _is_branchable(cross) or not cross.layers:
                return None
        steps = torch.arange(int(sizes.max()))
        hidden.append(output.last_hidden_state[(steps >= len(head.forced)) & (steps < sizes[:, None])])
        for i, text in zip(held, texts, strict=True):
            at[i][way] = np.arange(count, count + len(text))
            count += len(text)
    rows = torch.cat(hidden)
    return _Rows(rows if head.scale == 1.0 else rows * head.scale, at)


def _is_branchable(cache: Any) -> bool:
    """Whether the cache holds keys and values alone, in tensors that are replaced and never written to."""
    from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

    return isinstance(cache, DynamicCache) and all(
        type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers
    )


def _branch(cache: Any, held: Sequence[int], count: int) -> Any:
    """A cache that grows on its own from where `cache` (of `count` contexts) stands, for the contexts `held`."""
    import torch

    branch = copy.copy(cache)
    branch.layers = [copy.copy(layer) for layer in cache.layers]
    if len(held) < count:
        branch.batch_select_indices(torch.tensor(held, device=branch.layers[0].keys.device))
    return branch
