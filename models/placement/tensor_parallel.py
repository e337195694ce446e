"""Tensor parallelism under torchrun: each process of a group holds a share of every layer, by transformers' own plan.

    torchrun --nproc-per-node 4 --no-python kd cache build --tensor-parallel 4 --teacher …

One process of a group leads: it plans, scores and writes as a build on one device does, and tells the others what its model is
called with. They follow: they run their share of the same call, and know nothing of text or caches. The output layer is whole
in every process, so that the leader computes logits alone. Groups are worlds of their own; they meet in the cache's folder, as
any builders do.
"""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from functools import wraps
from typing import TYPE_CHECKING, Any, TypeVar

from kd.common.errors import DataError, TeacherError

if TYPE_CHECKING:
    import torch

Answer = TypeVar("Answer")
VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
"""What torchrun tells each process."""
PATIENCE = timedelta(days=7)
"""How long a process waits for the others of its group: the leader may tokenise a large text first."""
LEADER_ENDED = "leader ended"
SECONDS_FOR_THE_LEADER = 20
"""How long a follower that failed waits for the leader to fail, and to say why; torchrun ends all at the first that ends."""


class Group:
    """The processes that hold one model together."""

    def __init__(self, store: Any, rank: int, size: int, number: int, count: int) -> None:
        """`rank` of this process in its group of `size`; `number` of the group among `count`."""
        import torch.distributed as dist

        self.rank, self.size, self.number, self.count = rank, size, number, count
        self.store = store
        self.calling = False
        """Whether the leader is inside a call that the others were told."""
        self.broken = False
        """Whether a call failed, so that the others wait in the middle of it."""
        self._talk = dist.new_group(backend="gloo", timeout=PATIENCE)
        self._cache: Any = None

    @property
    def leads(self) -> bool:
        """Whether this process is the one that writes."""
        return self.rank == 0

    def tell(self, *message: Any) -> None:
        """Tell all others of the group something."""
        import torch.distributed as dist

        dist.broadcast_object_list([message], src=0, group=self._talk)

    def hear(self) -> tuple[Any, ...]:
        """Wait for what the leader says."""
        import torch.distributed as dist

        box: list[Any] = [None]
        try:
            dist.broadcast_object_list(box, src=0, group=self._talk)
        except RuntimeError as error:
            self.broken = True
            raise TeacherError(
                "the leader of this tensor-parallel group has ended", found="a closed connection"
            ) from error
        return box[0]  # type: ignore[no-any-return]

    def packed(self, value: Any) -> Any:
        """A call's argument as the others are told it: tensors on the host, and a cache of keys and values by its name alone."""
        import torch
        from transformers import Cache

        if isinstance(value, torch.Tensor):
            return value.detach().cpu()
        if isinstance(value, Mapping):
            return {key: self.packed(one) for key, one in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(self.packed(one) for one in value)
        if not isinstance(value, Cache):
            return value
        known, self._cache = value is self._cache, value
        return _Same() if known else _Fresh(copy.deepcopy(value))

    def unpacked(self, value: Any, device: torch.device) -> Any:
        """The argument in a process that follows; its cache holds its own share of keys and values."""
        import torch

        if isinstance(value, torch.Tensor):
            return value.to(device)
        if isinstance(value, Mapping):
            return {key: self.unpacked(one, device) for key, one in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(self.unpacked(one, device) for one in value)
        if isinstance(value, _Fresh):
            self._cache = value.cache
        return self._cache if isinstance(value, _Fresh | _Same) else value


class _Same:
    """In place of the cache of the call before."""


class _Fresh:
    """A cache that no call has filled yet."""

    def __init__(self, cache: Any) -> None:
        self.cache = cache


_joined: list[Group] = []
"""The group of this process, while it has one."""


@contextmanager
def tensor_parallel_group(size: int, groups: int = 1) -> Iterator[Group]:
    """The group of this process, among `groups` of `size` that torchrun has started.

    Leaving as the leader, with an error or without, lets the others go. Raises DataError where torchrun has started another
    number of processes.
    """
    import torch
    import torch.distributed as dist
    from torch._C._distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    world, rank = _started(size, groups)
    shared, _, _ = next(rendezvous("env://", rank, world))
    store = PrefixStore(f"kd/{rank // size}", shared)
    options: dict[str, Any] = {"backend": "gloo"}
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        options = {"backend": "nccl", "device_id": device}
    dist.init_process_group(store=store, rank=rank % size, world_size=size, timeout=PATIENCE, **options)
    group = Group(store, rank % size, size, rank // size, groups)
    _joined.append(group)
    try:
        yield group
    finally:
        _joined.remove(group)
        if group.leads and group.broken:
            store.set(LEADER_ENDED, "1")
        elif group.leads:
            group.tell("end")
        if not group.broken:
            dist.destroy_process_group()


def _started(size: int, groups: int) -> tuple[int, int]:
    """Number of processes and own number, as torchrun says. Raises DataError where they do not make the groups."""
    missing = [name for name in VARIABLES if name not in os.environ]
    command = f"torchrun --nproc-per-node {size * groups} --no-python kd cache build --tensor-parallel {size}"
    command += f" --workers {groups} …" if groups > 1 else " …"
    if missing:
        raise DataError(
            "tensor parallelism needs processes that torchrun starts",
            found=f"--tensor-parallel {size}, and no {', '.join(missing)}",
            try_=f"{command}, or a script that calls kd.build_cache(NAME, …, tensor_parallel={size})",
        )
    world, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    if world != size * groups:
        raise DataError(
            "torchrun has started another number of processes",
            found=f"{world} processes for --tensor-parallel {size} and --workers {groups}",
            expected=f"{size * groups}: --workers counts groups",
            try_=command,
        )
    return world, rank


def group_for(size: int) -> Group:
    """The group that this process has joined. Raises DataError where it has joined none of this size."""
    if not _joined or _joined[-1].size != size:
        raise DataError(
            "this process belongs to no tensor-parallel group",
            found=f"tensor parallel {size}",
            expected="kd cache build under torchrun",
        )
    return _joined[-1]


def sharding(size: int, empty: Any) -> dict[str, Any]:
    """Arguments of `from_pretrained` for a model in `size` shares, with a whole output layer. Raises TeacherError.

    empty   the model on the meta device, which says how its layers may be shared
    """
    from transformers.distributed import DistributedConfig

    if not empty.tp_plan:
        raise TeacherError(
            "this model has no plan for tensor parallelism",
            where=type(empty).__name__,
            expected="a family whose transformers class has a tp_plan",
            try_="--device-map auto",
        )
    heads = getattr(empty.config.get_text_config(), "num_attention_heads", size)
    keys = getattr(empty.config.get_text_config(), "num_key_value_heads", None) or heads
    if heads % size or keys % size:
        raise TeacherError(
            "the attention heads cannot be shared out evenly",
            where=type(empty).__name__,
            found=f"{heads} heads and {keys} of keys and values for --tensor-parallel {size}",
            expected="a divisor of both",
        )
    whole = {name for name, module in empty.named_modules() if module is empty.get_output_embeddings()}
    tied = getattr(empty, "all_tied_weights_keys", None) or {}
    pairs = [{name.rpartition(".")[0] for name in pair} for pair in tied.items()]
    for pair in pairs:
        whole |= pair if pair & whole else set()
    return {"distributed_config": DistributedConfig(tp_size=size, tp_plan=dict.fromkeys(sorted(whole), "replicate"))}


@contextmanager
def all_at_once(group: Group) -> Iterator[None]:
    """A context of work that all processes of a group do at once. Where it fails, the others may wait in the middle of it."""
    group.broken, before = True, group.broken
    yield
    group.broken = before


def lead(model: Any, group: Group) -> None:
    """From here on, tell the others of every call of the model, or of its body."""
    bodies = (model, model.base_model, getattr(model, "model", None), model.get_decoder(), model.get_encoder())
    for path, module in model.named_modules():
        if any(module is body for body in bodies):
            module.forward = _told(group, path, module.forward)


def _told(group: Group, path: str, forward: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(forward)
    def call(*arguments: Any, **named: Any) -> Any:
        if group.calling:  # the others run what is around it
            return forward(*arguments, **named)
        group.tell("call", path, group.packed(arguments), group.packed(named))
        group.calling = True
        try:
            return forward(*arguments, **named)
        except RuntimeError as error:  # the others may be in the middle of it: nothing can be tried again
            group.broken = True
            raise TeacherError(
                "a forward pass of the tensor-parallel group failed",
                found=(str(error).strip() or type(error).__name__).splitlines()[0],
                try_="a smaller --tokens-per-batch, if memory was short; the same command continues",
            ) from error
        finally:
            group.calling = False

    return call


def run_in_group(size: int, groups: int, load: Callable[[Any], Any], work: Callable[[Group], Answer]) -> Answer | None:
    """Do `work` in the process that leads its group, and follow it in the others, where the answer is None.

    load   loads this process's share of a model, see `follow_leader`
    """
    with tensor_parallel_group(size, groups) as group:
        if group.leads:
            return work(group)
        follow_leader(group, load)
        return None


def follow_leader(group: Group, load: Callable[[Any], Any]) -> None:
    """Do what the leader says, to its end. `load` loads this process's share of a model."""
    import torch

    model: Any = None
    try:
        while True:
            what, *about = group.hear()
            if what == "end":
                return
            if what == "load":
                model = load(about[0])
                continue
            path, arguments, named = about
            device = model.get_input_embeddings().weight.device
            with torch.inference_mode():
                model.get_submodule(path)(*group.unpacked(arguments, device), **group.unpacked(named, device))
    except Exception:
        group.broken = True
        _let_the_leader_speak(group)
        raise


def _let_the_leader_speak(group: Group) -> None:
    """Wait until the leader has failed too, and has had time to say why."""
    try:
        group.store.wait([LEADER_ENDED], timedelta(seconds=SECONDS_FOR_THE_LEADER))
    except Exception:  # it has not failed, or its store is gone
        return
    time.sleep(3)
