"""What `elsewhere.py` cannot see, the numbers: on a GPU they are the CPU's, and nothing waits. Skipped where there is none."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import fields, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from outcome_targets import outcome_targets
from transformers import FineGrainedFP8Config, LlamaConfig, LlamaForCausalLM

from kd.cache_builder.store.readers.reader import CacheReader
from kd.cache_builder.store.targets import TargetConfig
from kd.cache_builder.teacher.sparsify import Sparsifier
from kd.cache_builder.teacher.teacher_pass import Teacher, collect
from kd.data.rows.example import Example
from kd.data.tokenizing.token_rows import TokenRows
from kd.models.heads import LanguageModelHead, split_head
from kd.models.identity import model_identity, parameters_digest
from kd.models.loading import load_model
from kd.models.model_config import load_request_tokenizer
from kd.models.model_request import ModelRequest
from kd.models.placement.device_maps import Placement
from kd.models.weights.adapters import Adapter
from kd.student_trainer.faster.fused_loss import with_kernels
from kd.student_trainer.head import chunked_head_loss
from kd.student_trainer.losses.loss_registry import LOSSES, Objective
from kd.student_trainer.losses.loss_settings import GroupSettings
from kd.student_trainer.losses.loss_targets import GroupTargets, LossTargets, need

DEVICE = "cuda"
pytestmark = pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="no GPU here")
V, K = 2048, 8
EDGES = (K, 20, 200, 2100)


@contextmanager
def no_waits() -> Iterator[None]:
    with sync_debug_mode("error"):
        yield


@contextmanager
def sync_debug_mode(mode: str | int) -> Iterator[None]:
    before = torch.cuda.get_sync_debug_mode()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch says once that the mode is a prototype
            torch.cuda.set_sync_debug_mode(mode)
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


class MayWait:
    """A model's body, which asks what its mask hides and whether positions are those of several sequences (transformers 5)."""

    def __init__(self, body: Any) -> None:
        self.body, self.config = body, body.config

    def __call__(self, **inputs: Any) -> Any:
        with sync_debug_mode("default"):
            return self.body(**inputs)


def rows() -> list[TokenRows]:
    """Of equal length, so that there is no mask."""
    rng = np.random.default_rng(0)
    parts = [[rng.integers(1, V, n).astype(np.int32) for n in (4, 28)] for _ in range(12)]
    return [TokenRows(Example(f"e{i}", "x"), c, t, np.arange(1, 29)) for i, (c, t) in enumerate(parts)]


def scored(head: LanguageModelHead, config: TargetConfig, **options: Any) -> dict[str, np.ndarray]:
    teacher = Teacher(
        head, Sparsifier(config, V, torch.arange(0, V, 3).to(head.weight.device)), tokens_per_batch=96, **options
    )
    *_, (_, raw) = collect(rows(), teacher.run(rows(), 0))
    return {name: value for name, value in vars(raw).items() if value is not None}


def head_on(device: str, dtype: str = "float32") -> LanguageModelHead:
    """The same weights on either device: random ones would be drawn by another generator."""
    return split_head(load_model(ModelRequest("random:demo-student", device="cpu", dtype=dtype)).to(device))


@pytest.mark.parametrize("profile", ["kl", "full", "sampled"])
def test_the_teacher_pass_gives_the_cpu_s_targets(profile: str) -> None:
    config = TargetConfig.of_profile(profile)
    here, there = (scored(head_on(device), config, head_chunk=37) for device in ("cpu", DEVICE))
    for name, value in here.items():
        if value.dtype.kind == "f":  # float32 sums over 96 numbers and 3 layers, in another order
            np.testing.assert_allclose(there[name], value, atol=1e-3, err_msg=name)
        else:  # neighbours closer than that may change places: a rank by one, hardly any id
            assert (there[name] != value).mean() < 0.02, name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_teacher_pass_waits_for_nothing_but_its_copies(dtype: str) -> None:
    head, config = head_on(DEVICE, dtype), TargetConfig.of_profile("full")
    expected = scored(head, config)
    with no_waits():
        again = scored(replace(head, backbone=MayWait(head.backbone)), config)
    for name, value in expected.items():
        np.testing.assert_array_equal(again[name], value, err_msg=name)


def targets(count: int) -> LossTargets:
    generator = torch.Generator().manual_seed(1)
    log_p, ids = torch.randn(count, V, generator=generator, dtype=torch.float64).log_softmax(1).topk(K, dim=1)
    gold, first = torch.randint(V, (count,), generator=generator), torch.arange(0, count - 2, 3)
    mass = torch.rand(len(first), K + 3, generator=generator, dtype=torch.float64).sort(1, descending=True).values
    log_mass, few = (mass / mass.sum(1, keepdim=True)).log(), mass[:, 0]
    groups = GroupTargets(first, first + 2, gold, -few, -3 * few, few, log_mass[:, :K], log_mass[:, K:], ids[first])
    counts = torch.randint(1, 5, (count, K), generator=generator)
    return LossTargets(gold, ids, log_p, 1 - log_p.exp().sum(1), ids, counts, groups, torch.tensor(2.5))


def moved(data: Any) -> Any:
    values = {f.name: getattr(data, f.name) for f in fields(data)}
    return replace(
        data,
        **{n: moved(v) if isinstance(v, GroupTargets) else v.to(DEVICE) for n, v in values.items() if v is not None},
    )


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("ranking", ["exact", "fast"])
@pytest.mark.parametrize(("loss", "tail"), [(loss, tail) for loss in LOSSES for tail in LOSSES[loss].variants])
def test_every_loss_and_its_gradients_are_the_cpu_s(loss: str, tail: str, ranking: str, temperature: float) -> None:
    settings = GroupSettings(edges=EDGES, ranking=ranking, overlap=0.3)
    temperature = 1.0 if tail == "sampled" or loss in ("ce", "alm") else temperature
    objective = Objective(loss, tail, 0.0 if loss == "ce" else 0.6, temperature, settings=settings)
    data, found = targets(23), []
    if LOSSES[loss].text:
        data = outcome_targets(data.gold_ids, V)
    generator = torch.Generator().manual_seed(0)
    leaves = [torch.randn(s, generator=generator, dtype=torch.float64) for s in ((23, 16), (V + 4, 16), (V + 4,))]
    for device in ("cpu", DEVICE):
        hidden, weight, bias = (leaf.to(device).requires_grad_() for leaf in leaves)
        own = moved(data) if device == DEVICE else data
        total, kd, ce = chunked_head_loss(hidden, weight, bias, objective, own, vocabulary_size=V, chunk=10)
        total.backward()
        found.append([x.detach().cpu() for x in (total, kd, ce, hidden.grad, weight.grad, bias.grad)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)  # float64: only a wrong sum is that far off


def test_a_step_of_a_loss_over_rows_waits_for_nothing() -> None:
    data = moved(targets(23))
    hidden, weight = (
        torch.randn(s, dtype=torch.float64, device=DEVICE, requires_grad=True) for s in ((23, 16), (V, 16))
    )
    with no_waits():
        chunked_head_loss(hidden, weight, None, Objective(), replace(data, groups=None), vocabulary_size=V, chunk=10)[
            0
        ].backward()


TRITON = pytest.mark.skipif(find_spec("triton") is None, reason="no Triton here")


def fused_case(loss: str, *, ragged: bool, dtype: torch.dtype) -> tuple[Objective, LossTargets, list[torch.Tensor]]:
    """An objective, targets and leaves on the GPU: GPT-2's vocabulary, 300 rows."""
    generator = torch.Generator().manual_seed(5)
    count, width, size = 300, 64, 50257
    log_p, ids = (2 * torch.randn(count, size, generator=generator)).log_softmax(1).topk(64, dim=1)
    gold = torch.randint(size, (count,), generator=generator)
    data = LossTargets(gold, ids, log_p, 1 - log_p.exp().sum(1))
    if ragged:
        kept = torch.randint(1, 65, (count,), generator=generator)
        inside = torch.arange(64) < kept[:, None]
        tail = 1 - torch.where(inside, log_p.exp(), 0.0).sum(1)
        data = LossTargets(gold, ids[inside], log_p[inside], tail, kept=kept)
    objective = Objective("ce", "none", 0.0) if loss == "ce" else Objective(alpha=0.6, temperature=2.0)
    leaves = [
        torch.randn(s, generator=generator).to(DEVICE, dtype) for s in ((count, width), (size + 3, width), (size + 3,))
    ]
    return objective, moved(data), [leaf.requires_grad_() for leaf in leaves]


@TRITON
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("loss", "ragged"), [("kl", False), ("kl", True), ("ce", False)])
def test_the_fused_kernel_trains_as_torch_s_kernels_do(loss: str, ragged: bool, dtype: torch.dtype, bias: bool) -> None:
    """`FusedLoss` compares rows itself, and raises where they differ; here the whole layer."""
    objective, data, leaves = fused_case(loss, ragged=ragged, dtype=dtype)
    outcomes = []
    for kernels in ("torch", "triton"):
        chosen = with_kernels(objective, kernels, DEVICE, pytest.fail)
        layer = (leaves[1], leaves[2] if bias else None)
        total, kd, ce = chunked_head_loss(leaves[0], *layer, chosen, data, vocabulary_size=50257, chunk=128)
        gradients = torch.autograd.grad(total, leaves if bias else leaves[:2])
        outcomes.append([total.detach(), kd, ce, *gradients])
    tolerance = 1e-4 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps  # of the whole gradient's length
    for one, other in zip(*outcomes, strict=True):
        assert float((one.float() - other.float()).norm()) <= tolerance * float(one.float().norm())


@TRITON
def test_a_step_with_the_fused_kernel_waits_for_nothing_once_it_is_proven() -> None:
    for loss, ragged in (("kl", False), ("kl", True), ("ce", False)):
        objective, data, leaves = fused_case(loss, ragged=ragged, dtype=torch.bfloat16)
        chosen = with_kernels(objective, "triton", DEVICE, pytest.fail)
        for waiting in (nullcontext(), no_waits()):
            if ragged:
                assert data.offsets[-1] == len(need(data.token_ids))  # the one wait of a micro-batch
            with waiting:
                hidden, weight, bias = leaves
                chunked_head_loss(hidden, weight, bias, chosen, data, vocabulary_size=50257, chunk=128)[0].backward()


SEVERAL = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU here")


def llama_folder(folder: Path, **settings: Any) -> Path:
    """A tiny Llama in bfloat16, in several files."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=V, num_key_value_heads=2, max_position_embeddings=64, **sizes, **settings)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder, max_shard_size="200KB")
    return folder


def layers_on(first: int | str, second: int | str, head: int | str) -> dict[str, int | str]:
    """A map of the tiny Llama: two layers here, two there."""
    placed: dict[str, int | str] = {"model.embed_tokens": first, "model.rotary_emb": first}
    placed |= {f"model.layers.{n}": first if n < 2 else second for n in range(4)}
    return {**placed, "model.norm": second, "lm_head": head}


@pytest.mark.parametrize(
    "placed",
    [
        layers_on(0, "cpu", "cpu"),
        layers_on(0, "disk", "disk"),
        layers_on("cpu", 0, 0),
        pytest.param(layers_on(0, 1, 1), marks=SEVERAL),
        pytest.param(layers_on(0, 1, 0), marks=SEVERAL),
    ],
    ids=["gpu-cpu", "gpu-disk", "cpu-gpu", "two-gpus", "head-on-the-first"],
)
def test_a_device_map_gives_the_targets_of_one_gpu(placed: dict[str, int | str], tmp_path: Path) -> None:
    """What is offloaded is computed on the GPU, so that the kernels are the same, and the bits."""
    folder, config = llama_folder(tmp_path), TargetConfig.of_profile("kl")
    whole = load_model(ModelRequest(str(folder), device="cuda", dtype="bfloat16"))
    spread = load_model(ModelRequest(str(folder), dtype="bfloat16", placement=Placement.of(placed)))
    one, several = scored(split_head(whole), config), scored(split_head(spread), config)
    for name, value in one.items():
        np.testing.assert_array_equal(several[name], value, err_msg=name)
    assert parameters_digest(spread) == parameters_digest(whole)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_model_in_few_bits_is_near_its_plain_weights(bits: int, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    folder, ids = llama_folder(tmp_path), torch.arange(1, 17, device=DEVICE)[None]
    options: Any = {f"load_in_{bits}bit": True}
    logits = []
    for given in ({}, options):
        head = split_head(load_model(ModelRequest(str(folder), device="cuda", dtype="bfloat16", **given)))
        with torch.no_grad():
            logits.append(head.logits(head.hidden(ids, None)[0]).log_softmax(-1))
    # random weights, four layers: 4 bits are off by some hundredths, 8 bits and bfloat16 by thousandths of a nat
    assert 0 < float((logits[0] - logits[1]).abs().max()) < (0.5 if bits == 4 else 0.1)


@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9), reason="a GPU without 8-bit floats"
)
def test_an_fp8_checkpoint_computes_in_fp8_and_says_so(tmp_path: Path) -> None:
    """Its inputs are rounded to 8 bits: near its plain weights, and not equal to them."""
    plain, stored = llama_folder(tmp_path / "plain"), tmp_path / "fp8"
    model = LlamaForCausalLM.from_pretrained(
        plain, dtype=torch.bfloat16, device_map="cuda", quantization_config=FineGrainedFP8Config()
    )
    model.save_pretrained(stored)
    request, ids = ModelRequest(str(stored), device="cuda", dtype="bfloat16"), torch.arange(1, 17, device=DEVICE)[None]
    assert model_identity(request)["quantization"] == "fp8"
    logits = []
    for one in (request, ModelRequest(str(plain), device="cuda", dtype="bfloat16")):
        head = split_head(load_model(one))
        with torch.no_grad():
            logits.append(head.logits(head.hidden(ids, None)[0]).log_softmax(-1))
    assert 0 < float((logits[0] - logits[1]).abs().max()) < 0.5


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_checkpoints_of_gptq_and_awq_give_their_own_logits(method: str) -> None:
    """KD_GPTQ and KD_AWQ name checkpoints: calibrating one takes longer than a test may. `split_head` compares the logits."""
    pytest.importorskip("gptqmodel")
    name = os.environ.get(f"KD_{method.upper()}")
    if name is None:
        pytest.skip(f"KD_{method.upper()} names no checkpoint")
    request = ModelRequest(name, device="cuda", dtype="float16")
    assert model_identity(request)["quantization"] == method
    split_head(load_model(request))


@SEVERAL
def test_an_adapter_is_merged_into_layers_on_two_gpus(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    folder = llama_folder(tmp_path / "base")
    config = peft.LoraConfig(target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    peft.get_peft_model(LlamaForCausalLM.from_pretrained(folder), config).save_pretrained(tmp_path / "adapter")
    adapter, targets = Adapter(str(tmp_path / "adapter")), TargetConfig.of_profile("kl")
    spread = ModelRequest(str(folder), dtype="bfloat16", placement=Placement.of(layers_on(0, 1, 1)), adapter=adapter)
    whole = ModelRequest(str(folder), device="cuda", dtype="bfloat16", adapter=adapter)
    one, several = (scored(split_head(load_model(request)), targets) for request in (whole, spread))
    for name, value in one.items():
        np.testing.assert_array_equal(several[name], value, err_msg=name)


@SEVERAL
def test_two_gpus_that_hold_one_model_build_the_cache_of_one(tmp_path: Path) -> None:
    """NCCL sums in another order: in float32 as near as two processes on a CPU, see test_tensor_parallel.py."""
    folder = llama_folder(tmp_path / "model")
    load_request_tokenizer(ModelRequest("demo")).save_pretrained(folder)
    common = ["cache", "build", "--teacher", str(folder), "--data", "demo", "--limit", "4", "--seq-len", "32"]
    common += ["--top-k", "8", "--dtype", "float32", "--logprob-codec", "float32", "--no-reuse"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "kd.cli"]
    subprocess.run([sys.executable, "-m", "kd.cli", *common, "--out", str(tmp_path / "one")], check=True, timeout=300)
    together = [*torchrun, *common, "--out", str(tmp_path / "two"), "--tensor-parallel", "2"]
    subprocess.run(together, check=True, timeout=300)
    one, two = CacheReader(tmp_path / "one"), CacheReader(tmp_path / "two")
    assert one.manifest.fingerprint == two.manifest.fingerprint
    for number in range(len(one)):
        a, b = one[number].targets, two[number].targets
        assert a.logprobs is not None
        assert b.logprobs is not None
        np.testing.assert_allclose(a.logprobs, b.logprobs, rtol=0, atol=1e-4)


def test_liger_s_kernels_compute_what_the_layers_do(tmp_path: Path) -> None:
    """`use_liger_kernels` compares them itself, and raises where they differ."""
    pytest.importorskip("liger_kernel")
    from kd.student_trainer.faster.liger_kernels import use_liger_kernels

    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=V, num_key_value_heads=2, **shape))
    use_liger_kernels(model, device=DEVICE)
    assert "liger" in type(model.model.norm).forward.__module__ or "liger" in model.model.norm.forward.__module__
