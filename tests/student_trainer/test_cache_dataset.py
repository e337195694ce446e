"""A cache as a torch dataset: the batches and losses of `kd.train`, in any loop, continued in the middle, spread over workers."""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from kd.common.errors import CacheMismatchError, DataError, KdError
from kd.models.loading import load_model
from kd.models.model_config import load_request_tokenizer
from kd.models.model_request import ModelRequest
from kd.student_trainer.cache_dataset import SETTINGS, CacheDataset
from kd.student_trainer.trainer import DistillationTrainer

Batch = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """A cache, a student of it, and settings of its loss."""

    cache: Path
    student: Path
    settings: dict[str, Any]

    def dataset(self, **more: Any) -> CacheDataset:
        return CacheDataset(self.cache, str(self.student), **{"batch_size": 3, "seed": 5} | self.settings | more)

    def model(self) -> Any:
        return load_model(ModelRequest(str(self.student), device="cpu", dtype="float32"))


@pytest.fixture(scope="session")
def t5_student(tmp_path_factory: pytest.TempPathFactory, t5_dir: Path) -> Path:
    """A T5 with the teacher's tokenizer and other weights."""
    folder = tmp_path_factory.mktemp("t5-student")
    request = ModelRequest(str(t5_dir), device="cpu")
    model = load_model(request)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(3)
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    load_request_tokenizer(request).save_pretrained(folder)
    return folder


@pytest.fixture
def cases(kl_cache: Path, cache: Path, t5_cache: Path, student_dir: Path, t5_student: Path) -> dict[str, Case]:
    return {
        "kl": Case(kl_cache, student_dir, {"temperature": 2.0, "alpha": 0.7}),
        "kl by tokens": Case(kl_cache, student_dir, {"batch_size": None, "tokens_per_batch": 96, "tail": "renorm"}),
        "sampled": Case(cache, student_dir, {"tail": "sampled"}),
        "ce": Case(cache, student_dir, {"loss": "ce", "prompt_loss": True}),
        "uld": Case(t5_cache, student_dir, {"loss": "uld", "temperature": 2.0, "ranking": "exact"}),
        "hybrid": Case(t5_cache, student_dir, {"loss": "hybrid"}),
        "encoder": Case(t5_cache, t5_student, {"temperature": 2.0, "ce_weight": 0.5}),
    }


NAMES = ("kl", "kl by tokens", "sampled", "ce", "uld", "hybrid", "encoder")


def same(a: Batch, b: Batch) -> bool:
    return a.keys() == b.keys() and all(torch.equal(_tensor(a[k]), _tensor(b[k])) for k in a)


def equal(ours: Iterable[Batch], theirs: Iterable[Batch]) -> bool:
    return all(same(a, b) for a, b in zip(ours, theirs, strict=True))


def _tensor(value: Tensor | int) -> Tensor:
    """The trainer holds a batch's `units` as a number."""
    return torch.as_tensor(value).reshape(-1) if torch.as_tensor(value).numel() == 1 else torch.as_tensor(value)


@pytest.fixture
def trained_batches(monkeypatch: pytest.MonkeyPatch) -> list[Batch]:
    """The batches that the trainer of `kd.train` computes losses of, as it gets them."""
    batches: list[Batch] = []
    compute_loss = DistillationTrainer.compute_loss

    def recorded(self: Any, model: Any, inputs: Batch, *rest: Any, **more: Any) -> Any:
        batches.append(dict(inputs))
        return compute_loss(self, model, inputs, *rest, **more)

    monkeypatch.setattr(DistillationTrainer, "compute_loss", recorded)
    return batches


# The batches and losses of kd.train


@pytest.mark.parametrize("name", NAMES)
def test_a_pass_is_a_training_of_kd_train(name: str, cases, run: Callable[..., Any], trained_batches) -> None:
    case = cases[name]
    settings = {"batch_size": 3, "seed": 5, "epochs": 2.0} | case.settings
    # so small a step changes no weight: every line of the log is a loss of the student as it was loaded
    finished = run(
        cache=str(case.cache), student=str(case.student), max_steps=None, lr=1e-30, weight_decay=0.0, **settings
    )
    dataset, model = case.dataset(epochs=2.0), case.model().train()
    batches = list(dataset)
    assert len(batches) == len(dataset) == len(trained_batches) == len(finished.records)
    assert equal(batches, trained_batches)
    for batch, record in zip(batches, finished.records, strict=True):
        with torch.no_grad():
            found = dataset.loss(model(**dataset.inputs(batch)), batch)
        # sums of float32 in another order
        expected = torch.tensor([record.loss, record.kd or 0.0, record.ce], dtype=torch.float32)
        torch.testing.assert_close(torch.stack(found), expected, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("name", ["kl", "uld", "encoder"])
def test_losses_of_micro_batches_add_up_to_the_loss_of_their_step(name: str, cases, run: Callable[..., Any]) -> None:
    case = cases[name]
    settings = {"batch_size": 3, "seed": 5} | case.settings
    record = run(
        cache=str(case.cache),
        student=str(case.student),
        max_steps=1,
        accumulate=2,
        lr=1e-30,
        weight_decay=0.0,
        **settings,
    ).records[0]
    dataset, model = case.dataset(), case.model()
    batches = [dataset[0], dataset[1]]
    counts = {"step_positions": sum(len(b["gold_ids"]) for b in batches)}
    if "units" in batches[0]:
        counts["step_units"] = sum(int(b["units"]) for b in batches)
    with torch.no_grad():
        parts = [dataset.loss(model(**dataset.inputs(b)), b, **counts) for b in batches]
    found = torch.stack([torch.stack(p) for p in parts]).sum(dim=0)
    torch.testing.assert_close(found, torch.tensor([record.loss, record.kd, record.ce]), rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("name", ["kl", "uld", "encoder"])
def test_the_chunked_loss_has_the_loss_and_the_gradients_of_the_whole(name: str, cases) -> None:
    case = cases[name]
    dataset = case.dataset()
    batch = dataset[0]
    whole, chunked = case.model().double(), case.model().double()
    expected = dataset.loss(whole(**dataset.inputs(batch)), batch)
    body = chunked.get_decoder() if name == "encoder" else chunked.base_model
    states: list[Tensor] = []
    hook = body.register_forward_hook(lambda module, inputs, output: states.append(output.last_hidden_state))
    chunked(**dataset.inputs(batch))
    hook.remove()
    found = dataset.chunked_loss(states[0], chunked.get_output_embeddings(), batch, chunk=7)
    torch.testing.assert_close(torch.stack(found), torch.stack(expected), rtol=1e-6, atol=1e-9)
    expected.loss.backward()
    found.loss.backward()
    gradients = {n: p.grad for n, p in whole.named_parameters()}
    assert gradients.keys() == {n for n, p in chunked.named_parameters()}
    for parameter_name, parameter in chunked.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[parameter_name], rtol=1e-5, atol=1e-8)


def test_epochs_one_by_one_are_the_epochs_of_one_pass(cases) -> None:
    whole = list(cases["kl"].dataset(epochs=3.0))
    dataset, found = cases["kl"].dataset(), []
    for epoch in range(3):
        dataset.set_epoch(epoch)
        found += list(dataset)
    assert len(found) == len(whole)
    assert equal(found, whole)
    assert not same(found[0], found[len(found) // 3])


def test_a_student_in_memory_gets_the_batches_of_one_by_name(cases) -> None:
    case = cases["uld"]
    tokenizer = load_request_tokenizer(ModelRequest(str(case.student)))
    by_name = case.dataset()
    for student in (case.model(), case.model().config):
        for own in (tokenizer, str(case.student)):
            in_memory = CacheDataset(case.cache, student, own, batch_size=3, seed=5, **case.settings)
            assert equal(in_memory, by_name)


# Where it goes on


@pytest.mark.parametrize("name", ["kl", "uld"])
def test_a_state_in_mid_pass_continues_with_the_very_next_batch(name: str, cases) -> None:
    whole = list(cases[name].dataset(epochs=2.0))
    for done in (0, 1, len(whole) - 1, len(whole)):
        before = cases[name].dataset(epochs=2.0)
        handed_out = [batch for batch, _ in zip(before, range(done), strict=False)]
        state = pickle.loads(pickle.dumps(before.state_dict(done)))
        after = cases[name].dataset(epochs=2.0)
        after.load_state_dict(state)
        rest = list(after)
        assert len(handed_out) + len(rest) == len(whole)
        assert equal([*handed_out, *rest], whole)
        assert equal(after, whole)  # the pass after it is a whole one


def test_the_loop_s_own_place_is_in_the_state(cases) -> None:
    dataset = cases["kl"].dataset()
    steps = iter(dataset)
    next(steps), next(steps)
    assert dataset.state_dict()["position"] == dataset.position == 2
    again = cases["kl"].dataset()
    again.load_state_dict(dataset.state_dict())
    assert same(next(iter(again)), next(steps))


def test_a_state_in_a_later_epoch_keeps_its_place_when_that_epoch_is_set(cases) -> None:
    dataset = cases["kl"].dataset()
    dataset.set_epoch(2)
    expected = list(dataset)
    again = cases["kl"].dataset()
    again.load_state_dict(dataset.state_dict(2))
    again.set_epoch(2)
    assert equal(again, expected[2:])
    again.load_state_dict(dataset.state_dict(2))
    again.set_epoch(1)
    assert again.position == 0
    assert len(list(again)) == len(again)


def test_a_state_of_other_batches_is_refused(cases) -> None:
    dataset = cases["kl"].dataset()
    state = dataset.state_dict(1)
    for other in (
        cases["kl"].dataset(seed=6),
        cases["kl"].dataset(batch_size=4),
        cases["kl"].dataset(alpha=0.5),
        cases["kl"].dataset(world_size=2),
        cases["sampled"].dataset(),
    ):
        with pytest.raises(CacheMismatchError, match="other batches"):
            other.load_state_dict(state)
        assert (other.epoch, other.position) == (0, 0)


# Workers, loaders and processes


def test_a_dataset_survives_pickling(cases) -> None:
    dataset = cases["hybrid"].dataset(epochs=2.0)
    dataset.set_epoch(1)
    again = pickle.loads(pickle.dumps(dataset))
    assert again.epoch == 1
    assert equal(again, dataset)


def test_two_spawned_workers_hand_out_every_batch_once_and_in_order(cases) -> None:
    dataset = cases["uld"].dataset()
    expected = list(dataset)
    loader = dataset.loader(num_workers=2, persistent_workers=True)
    assert len(loader) == len(expected)
    found = list(loader)
    assert len(found) == len(expected)
    assert equal(found, expected)
    dataset.set_epoch(1)  # the workers of the first pass see it
    assert equal(loader, dataset)
    done = 2
    dataset.load_state_dict(dataset.state_dict(done))
    assert len(loader) == len(dataset) - done
    rest, whole = list(loader), list(dataset)
    assert len(rest) == len(whole) - done
    assert equal(rest, whole[done:])


def test_any_loader_without_batches_of_its_own_takes_it(cases) -> None:
    dataset = cases["kl"].dataset()
    assert equal(DataLoader(dataset, batch_size=None), dataset)
    with pytest.raises(IndexError, match="batch 99"):
        dataset[99]


@pytest.mark.parametrize("name", ["kl", "uld"])
def test_processes_share_the_batches_of_one(name: str, cases) -> None:
    whole = list(cases[name].dataset())
    shares = [list(cases[name].dataset(rank=rank, world_size=2)) for rank in range(2)]
    assert len(shares[0]) == len(shares[1]) == len(whole) // 2
    found = [batch for pair in zip(*shares, strict=True) for batch in pair]
    assert equal(found, whole[: len(found)])


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning")  # torchdata 0.11 asks torch 2.13 for it
@pytest.mark.parametrize("workers", [0, 2])
def test_a_stateful_data_loader_continues_in_mid_pass(cases, workers: int) -> None:
    from torchdata import stateful_dataloader

    def loader() -> Any:
        context = {"multiprocessing_context": "fork"} if workers else {}  # starts at once; spawned ones are above
        return stateful_dataloader.StatefulDataLoader(
            cases["kl"].dataset(), batch_size=None, num_workers=workers, **context
        )

    whole = list(cases["kl"].dataset())
    first = loader()
    steps = iter(first)
    handed_out = [next(steps) for _ in range(3)]
    state = pickle.loads(pickle.dumps(first.state_dict()))
    del steps
    second = loader()
    second.load_state_dict(state)
    rest = list(second)
    assert len(handed_out) + len(rest) == len(whole)
    assert equal([*handed_out, *rest], whole)


# What is refused


def refused_by_training(run: Callable[..., Any], cache: Path, student: Path, settings: dict[str, Any]) -> KdError:
    with pytest.raises(KdError) as refusal:
        run("refused", cache=str(cache), student=str(student), **settings)
    return refusal.value


@pytest.mark.parametrize(
    ("cache_name", "settings"),
    [
        ("t5_cache", {"loss": "kl"}),
        ("kl_cache", {"loss": "uld"}),
        ("kl_cache", {"temperature": 3.0}),
        ("kl_cache", {"top_k": 9}),
        ("kl_cache", {"tail": "sampled"}),
        ("kl_cache", {"seq_len": 16}),
        ("t5_cache", {"loss": "uld", "seq_len": 65}),
        ("kl_cache", {"loss": "no such loss"}),
        ("kl_cache", {"batch_size": 2, "tokens_per_batch": 64}),
        ("kl_cache", {"alpha": -1.0}),
    ],
)
def test_what_training_refuses_is_refused_in_the_same_words(
    request, run, student_dir: Path, cache_name: str, settings: dict[str, Any]
) -> None:
    cache = request.getfixturevalue(cache_name)
    expected = refused_by_training(run, cache, student_dir, settings)
    with pytest.raises(type(expected)) as refusal:
        CacheDataset(cache, str(student_dir), **settings)
    assert str(refusal.value) == str(expected)


def test_settings_of_the_training_loop_are_refused(kl_cache: Path, student_dir: Path) -> None:
    with pytest.raises(DataError, match="belongs to the training loop"):
        CacheDataset(kl_cache, str(student_dir), lr=1e-3)
    with pytest.raises(DataError, match=r"unknown setting 'temprature'[\s\S]*did you mean +temperature"):
        CacheDataset(kl_cache, str(student_dir), temprature=2.0)


def test_a_student_in_memory_needs_its_tokenizer(cases) -> None:
    with pytest.raises(DataError, match="needs its tokenizer"):
        CacheDataset(cases["kl"].cache, cases["kl"].model())


def test_there_are_as_many_ranks_as_processes(cases) -> None:
    with pytest.raises(DataError, match="rank 2 of 2"):
        cases["kl"].dataset(rank=2, world_size=2)


def test_the_settings_of_batches_are_documented() -> None:
    described = (CacheDataset.__doc__ or "").partition("settings  ")[2].partition("\n\n")[0]
    assert set(re.findall(r"\w+", described.partition(":")[2])) == {*SETTINGS}
