"""`CacheDataset`: a cache as the batches of a training loop that is not ours.

    dataset = CacheDataset("runs/cache", model, tokenizer, loss="kl", temperature=2.0, tokens_per_batch=4096)
    for batch in dataset:
        dataset.loss(model(**dataset.inputs(batch)), batch).loss.backward()

The batches are those of `kd.train` with the same settings, in the same order; one pass over the dataset is one training of
`epochs` epochs. A batch is an item, so any loader of PyTorch hands batches out in order, whatever its number of workers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from kd.cache_builder.opening import open_cache
from kd.cache_builder.store.readers.reading import Reader
from kd.cache_builder.weighted_caches import CacheSpec
from kd.common.errors import CacheMismatchError, DataError, unknown_name
from kd.common.setting_fields import settings_of
from kd.models.families.text_model import text_config
from kd.models.model_config import load_config, load_request_tokenizer
from kd.models.tokenizer import Tokenizer, load_tokenizer
from kd.student_trainer.batches.batch_plan import FORWARD, BatchPlan
from kd.student_trainer.batches.compatibility import needed_arrays
from kd.student_trainer.batches.read_ahead import Prefetcher
from kd.student_trainer.configuration.model_settings import StudentSettings
from kd.student_trainer.configuration.train_config import TrainConfig, config_from
from kd.student_trainer.loss_functions import LossParts, chunked_distillation_loss, distillation_loss
from kd.student_trainer.losses.loss_registry import Objective
from kd.student_trainer.prepare import prepare, student_request

NOT_READ = -FORWARD
"""In place of the number of a batch: nothing was read."""
MODEL_INPUTS = ("input_ids", "attention_mask", "decoder_input_ids")
"""Tensors of a batch that the student reads; all others are targets."""
SETTINGS = tuple(
    one.name
    for one in settings_of(TrainConfig).values()
    if one.path[0] in ("data", "objective", "text", "batches", "seed")
    and one.name not in ("cache", "max_steps", "accumulate", "packing")
)
"""Settings of `TrainConfig` that decide what the batches are."""


class CacheDataset(Dataset[dict[str, Tensor]]):
    """The batches of a cache, ready for a student: a map-style `torch` dataset whose items are whole batches.

    cache        what `kd.open_cache` takes: a path, a URL, the beginning of a fingerprint, or several with weights
    student      the model that learns, its configuration, or its name as for `kd.train`
    tokenizer    the student's tokenizer, or its name; None = the one beside a student given by name
    rank         number of this process; it gets every `world_size`-th batch, from this one on
    world_size   number of processes that share the batches
    settings     those settings of `kd.train` that decide what a batch is: loss, tail, alpha, ce_weight, temperature, beta,
                 merge, alignment, align_eos, ranking, prompt_loss, seq_len, target_len, separator, chat_template,
                 template_kwargs, top_k, epochs,
                 tokens_per_batch, batch_size, seed, cache_bytes

    Raises KdError, as `kd.train` does, for a cache that does not belong to the student.

    A batch is a dictionary of tensors that may be moved to a device as it is. `inputs` picks those that the model reads,
    `loss` and `chunked_loss` compare its output with the rest. Loop over the dataset itself, or give it to
    `DataLoader(dataset, batch_size=None, …)`, or call `loader`. One pass is a whole training of `epochs` epochs; to count
    epochs yourself, leave `epochs` at 1 and call `set_epoch` before each. `state_dict` and `load_state_dict` continue in the
    middle of a pass, exactly; torchdata's `StatefulDataLoader` uses them.

    >>> import kd
    >>> model, tokenizer = kd.load_student("demo")
    >>> dataset = kd.CacheDataset("cache", model, tokenizer, temperature=2.0, batch_size=4)
    >>> batch = dataset[0]
    >>> sorted(batch)
    ['attention_mask', 'gold_ids', 'input_ids', 'logprobs', 'positions', 'tail_mass', 'token_ids']
    >>> parts = dataset.loss(model(**dataset.inputs(batch)), batch)
    >>> parts.loss.backward()
    >>> len(batch["input_ids"]), round(float(parts.kd), 1)
    (4, 1.2)
    """

    def __init__(
        self,
        cache: CacheSpec,
        student: Any,
        tokenizer: Tokenizer | str | None = None,
        *,
        rank: int = 0,
        world_size: int = 1,
        **settings: Any,
    ) -> None:
        _check_names(settings)
        if not 0 <= rank < world_size:
            raise DataError("no such rank", found=f"rank {rank} of {world_size}", expected=f"0..{world_size - 1}")
        name = student if isinstance(student, str) else type(student).__name__
        config = config_from({"cache": cache, "student": name, "out": "", **settings})
        self._prepared = prepare(config, student=_student(student, tokenizer))
        self._open_reader: Reader | None = self._prepared.reader
        self.rank, self.world_size = rank, world_size
        self.vocabulary_size = self._prepared.vocabulary_size
        """Number of the student's logits that count."""
        self.fingerprint = self._prepared.reader.manifest.fingerprint
        """Fingerprint of the cache."""
        self._step = world_size
        """Micro-batches of which a step of all processes is made; after `load_state_dict`, as many as when the state was taken."""
        self.position = 0
        """Batches of this pass that are done: that the loop over the dataset handed out, or that a loaded state names."""
        self._first = 0
        self._epoch = torch.zeros((), dtype=torch.int64)
        self._epoch.share_memory_()  # type: ignore[no-untyped-call]
        self._pass: _Pass | None = None
        self._next = NOT_READ
        """Number of the batch after the one that was read last."""

    def __repr__(self) -> str:
        loss = self._prepared.config.objective.loss
        return f"CacheDataset({self._prepared.reader!r}, loss={loss!r}, rank={self.rank} of {self.world_size})"

    @property
    def objective(self) -> Objective:
        """What is compared, and how it is weighed: for `kd.distillation_loss`."""
        return self._prepared.objective

    @property
    def epoch(self) -> int:
        """Number of the epoch that a pass begins with; processes that load batches share it."""
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Let the next pass begin with this epoch, which decides the order of examples.

        The epoch of a loaded state keeps the place in its middle.
        """
        if epoch != self.epoch:
            self._epoch.fill_(epoch)
            self.position = self._first = 0

    def __len__(self) -> int:
        """Batches of a pass, for this process."""
        return len(self._planned.plan) // self.world_size

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        """The batch of this number in a pass."""
        if not 0 <= number < len(self):
            raise IndexError(f"batch {number} of {len(self)}")
        plan = self._planned.plan
        if not self._next <= number < self._next + FORWARD:
            read_here = islice(plan.walk(number * self.world_size), self.rank, None, self.world_size)
            self._reader.announce(batch.examples for batch in read_here)
        self._next = number + 1
        return self._prepared.collator(self._reader.read(plan[number * self.world_size + self.rank].examples))

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """The batches of a pass in order, read ahead on a thread; after `load_state_dict`, those that are left of it."""
        numbers = self._next_pass()
        self.position = numbers.start
        ahead = Prefetcher(map(self.__getitem__, numbers))
        try:
            for batch in ahead:
                self.position += 1
                yield batch
        finally:
            ahead.close()

    def loader(self, **options: Any) -> DataLoader[dict[str, Tensor]]:
        """A `DataLoader` of these batches in order; after `load_state_dict`, first of those that are left of the pass.

        `options` are those of `DataLoader`. Workers are spawned. Each item counts as a batch of one, which is what
        `transformers.Trainer` and accelerate expect.
        """
        defaults: dict[str, Any] = {"batch_size": 1, "sampler": PassSampler(self), "collate_fn": _only}
        if options.get("num_workers"):
            defaults["multiprocessing_context"] = "spawn"
        return DataLoader(self, **defaults | options)

    def _next_pass(self) -> range:
        """Numbers of the batches that the next pass hands out: all of them, or what a loaded state has left."""
        first, self._first = self._first, 0
        return range(first, len(self))

    def inputs(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """What the student reads of a batch, as arguments of its `forward`."""
        return {name: batch[name] for name in MODEL_INPUTS if name in batch} | {"use_cache": False}

    def loss(self, logits: Any, batch: Mapping[str, Any], **counts: Any) -> LossParts:
        """`kd.distillation_loss` with this dataset's objective: of the model's output, or its logits."""
        return distillation_loss(logits, batch, self.objective, vocabulary_size=self.vocabulary_size, **counts)

    def chunked_loss(self, hidden: Any, output_layer: Any, batch: Mapping[str, Any], **options: Any) -> LossParts:
        """`kd.chunked_distillation_loss` with this dataset's objective: of hidden states and the output layer."""
        return chunked_distillation_loss(
            hidden, output_layer, batch, self.objective, vocabulary_size=self.vocabulary_size, **options
        )

    def state_dict(self, position: int | None = None) -> dict[str, Any]:
        """Where the pass is: after `position` batches; None = after those that the loop over the dataset has handed out.

        A `DataLoader` reads ahead, so the position of a loop over one is the loop's own count.
        """
        position = self.position if position is None else position
        planned = self._planned
        return {"epoch": self.epoch, "position": position, "world_size": self.world_size} | {
            "step": self._step,
            "batches": planned.digest,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Let the next pass continue where `state` was taken. Raises CacheMismatchError for a state of other batches.

        Another number of processes may continue it, if it divides the number that the pass was begun with: loops that add up
        the gradients of so many more batches make the same steps.
        """
        before = self.epoch, self._step
        world, self._step = int(state.get("world_size", self.world_size)), int(state.get("step", self.world_size))
        self._epoch.fill_(int(state["epoch"]))
        try:
            done = int(state["position"]) * world
            self._refuse_other_batches(state, done)
        except CacheMismatchError:
            self._epoch.fill_(before[0])
            self._step = before[1]
            raise
        self.position = self._first = done // self.world_size

    def _refuse_other_batches(self, state: Mapping[str, Any], done: int) -> None:
        """Raise CacheMismatchError for a state that does not continue here, after `done` micro-batches of all processes."""
        headline, where = "the state to continue belongs to other batches", self._reader.root
        if self._step % self.world_size or done % self.world_size:
            raise CacheMismatchError(
                headline,
                where=where,
                found=f"steps of {self._step} batches, {done} of which are done",
                expected=f"numbers that {self.world_size} processes can share",
                try_=f"{self._step} processes, or a number that divides it",
            )
        planned = self._planned
        if "step" not in state:  # of a release that laid out all batches
            if planned.plan.layout != "window":
                raise CacheMismatchError(
                    headline,
                    where=where,
                    found="a state of an earlier release, in which larger caches had another order of examples",
                    try_="a new pass",
                )
            expected = planned.old_digest(self.fingerprint, self.world_size, self.objective)
        else:
            expected = planned.digest
        if expected != state["batches"]:
            raise CacheMismatchError(
                headline,
                where=where,
                found=state["batches"],
                expected=expected,
                try_="the same cache, student, settings and number of processes as before",
            )

    def __getstate__(self) -> dict[str, Any]:
        """What another process needs; it opens the cache by itself."""
        parts: dict[str, Any] = {"reader": None, "tokenizer": None, "model_config": None}
        return vars(self) | {"_prepared": replace(self._prepared, **parts), "_open_reader": None, "_next": NOT_READ}

    @property
    def _reader(self) -> Reader:
        if self._open_reader is None:
            data = self._prepared.config.data
            reader = open_cache(data.cache, top_k=data.top_k, cache_bytes=data.cache_bytes)
            if reader.manifest.fingerprint != self.fingerprint:
                raise CacheMismatchError(
                    "another cache lies where this dataset's was",
                    where=reader.root,
                    found=reader.manifest.fingerprint,
                    expected=self.fingerprint,
                )
            reader.keep(needed_arrays(self.objective, reader.manifest))
            self._open_reader = reader
            # in a process that loads batches
            self._prepared = replace(self._prepared, sizes=self._prepared.sizes.over(reader))
            if self._pass is not None:
                self._pass = replace(self._pass, plan=self._pass.plan.of(reader, self._prepared.sizes))
        return self._open_reader

    @property
    def _planned(self) -> _Pass:
        """The pass that begins with the epoch that is set."""
        reader = self._reader
        if self._pass is None or (self._pass.epoch, self._pass.step) != (self.epoch, self._step):
            plan = replace(self._prepared, reader=reader).plan(self._step, first_epoch=self.epoch)
            sizes = self._prepared.sizes
            own_text = None if self._prepared.collator.text is None else sizes[np.arange(len(sizes))].tobytes()
            part = None if reader.part is None else tuple(reader.part.shards)
            known = self.fingerprint, self.objective, self._prepared.collator.start_ids, plan.settings, part, own_text
            self._next = NOT_READ
            self._pass = _Pass(self.epoch, self._step, plan, hashlib.sha256(repr(known).encode()).hexdigest()[:16])
        return self._pass


class PassSampler(Sampler[int]):
    """Numbers of the batches of a pass of `dataset`, in order."""

    def __init__(self, dataset: CacheDataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset) - self.dataset._first

    def __iter__(self) -> Iterator[int]:
        return iter(self.dataset._next_pass())


@dataclass(frozen=True)
class _Pass:
    """What one pass over the dataset hands out."""

    epoch: int
    """Its first epoch."""
    step: int
    """Micro-batches of a step of all processes."""
    plan: BatchPlan
    """Batches of all processes."""
    digest: str
    """Digest of everything that decides which batch comes when, and what is in it."""

    def old_digest(self, fingerprint: str, world_size: int, objective: Objective) -> str:
        """The digest of an earlier release, which lists all batches."""
        known = fingerprint, world_size, objective, tuple(batch.examples for batch in self.plan)
        return hashlib.sha256(repr(known).encode()).hexdigest()[:16]


def _only(batches: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The one batch of a list of one."""
    (batch,) = batches
    return batch


def _check_names(settings: Mapping[str, Any]) -> None:
    """Raise DataError for a setting that decides nothing about batches."""
    for name in settings:
        if name in SETTINGS:
            continue
        if name in settings_of(TrainConfig):
            raise DataError(
                "this setting belongs to the training loop, not to its batches",
                found=name,
                expected=", ".join(SETTINGS),
                try_="leave it out, or kd.train",
            )
        raise unknown_name("setting", name, SETTINGS)


def _student(student: Any, tokenizer: Tokenizer | str | None) -> tuple[Any, Tokenizer]:
    """The student's configuration and tokenizer. Raises DataError where a tokenizer is missing."""
    if isinstance(tokenizer, str) and not isinstance(student, str):
        tokenizer = load_tokenizer(tokenizer)
    if isinstance(student, str):
        named = tokenizer if isinstance(tokenizer, str) else None
        request = student_request(StudentSettings(student, tokenizer=named), seed=0)
        if tokenizer is None or isinstance(tokenizer, str):
            tokenizer = load_request_tokenizer(request)
        return load_config(request), tokenizer
    if tokenizer is None:
        raise DataError("a student in memory needs its tokenizer", expected="CacheDataset(cache, student, tokenizer)")
    return text_config(getattr(student, "config", student)), tokenizer
