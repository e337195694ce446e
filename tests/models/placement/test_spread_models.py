"""A model that lies partly on the disk is, to the bit, the model in memory: its logits, its digest, its answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from tiny_models import tiny_model

from kd.common.errors import DataError
from kd.models.answering import answer_batch
from kd.models.heads import LanguageModelHead, split_head
from kd.models.identity import parameters_digest
from kd.models.loading import load_model
from kd.models.model_request import ModelRequest
from kd.models.placement.device_maps import Placement
from kd.models.placement.spread_models import SpreadBody, input_device, is_spread

V = 64
RNG = np.random.default_rng(0)
CONTEXTS = [RNG.integers(1, V, 5) for _ in range(4)]
TARGETS = [RNG.integers(1, V, n) for n in (3, 5, 7, 2)]
MAPS: dict[str, Any] = {
    "all on the disk": Placement.of({"": "disk"}),
    "what fits": Placement.of("sequential", {"cpu": "60KB"}),
    "a strategy without limits": Placement.of("auto"),
}


@torch.inference_mode()
def logits(head: LanguageModelHead) -> torch.Tensor:
    return head.logits(head.scored_hidden(CONTEXTS, TARGETS))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """`folders(layout)`: a tiny model in several files."""
    made: dict[str, Path] = {}

    def folder(layout: str) -> Path:
        if layout not in made:
            made[layout] = tmp_path_factory.mktemp(layout)
            model = tiny_model(layout, "sdpa", V, window=8).bfloat16()
            model.save_pretrained(made[layout], max_shard_size="20KB")
        return made[layout]

    return folder


@pytest.mark.parametrize("where", MAPS)
@pytest.mark.parametrize("layout", ["llama", "gpt2", "t5"])
def test_logits_digest_and_answers_are_those_of_the_model_in_memory(layout: str, where: str, folders):
    """The checkpoint is stored in bfloat16 and computed in float32, so that weights change their type on their way."""
    whole = load_model(ModelRequest(str(folders(layout)), device="cpu"))
    spread = load_model(ModelRequest(str(folders(layout)), placement=MAPS[where]))
    assert is_spread(spread) == (where != "a strategy without limits")
    assert torch.equal(logits(split_head(spread)), logits(split_head(whole)))
    assert parameters_digest(spread) == parameters_digest(whole)
    written = [
        answer_batch(m, CONTEXTS, eos_id=None, pad_id=0, max_new_tokens=4, do_sample=False) for m in (whole, spread)
    ]
    for one, other in zip(*written, strict=True):
        np.testing.assert_array_equal(one.ids, other.ids)


def test_a_model_that_the_user_has_dispatched_is_taken_as_it_is(tmp_path: Path):
    whole, own = (tiny_model("llama", "sdpa", V, window=8).float().eval() for _ in range(2))
    parts = {"model.embed_tokens": "cpu", "model.layers": "disk", "model.norm": "cpu", "model.rotary_emb": "cpu"}
    own = dispatch_model(own, {**parts, "lm_head": "disk"}, offload_dir=tmp_path)
    head = split_head(own)
    assert isinstance(head.backbone, SpreadBody)
    assert torch.equal(logits(head), logits(split_head(whole)))
    assert parameters_digest(own) == parameters_digest(whole)
    assert input_device(own) == torch.device("cpu")


def test_a_changed_weight_on_the_disk_changes_the_digest(folders):
    placed = load_model(ModelRequest(str(folders("llama")), placement=Placement.of({"": "disk"})))
    other = load_model(ModelRequest(str(folders("llama")), device="cpu"))
    with torch.no_grad():
        other.model.layers[1].mlp.down_proj.weight[0, 0] += 1
    assert parameters_digest(placed) != parameters_digest(other)


def test_weights_held_for_the_cpu_by_hooks_are_read():
    whole, own = (tiny_model("gpt2", "sdpa", V, window=8).float().eval() for _ in range(2))
    cpu_offload(own, execution_device=torch.device("cpu"))
    assert own.lm_head.weight.device.type == "meta"
    assert torch.equal(logits(split_head(own)), logits(split_head(whole)))


def test_weights_that_are_nowhere_are_an_error():
    with torch.device("meta"):
        model = tiny_model("llama", "sdpa", V, window=8)
    for step in (split_head, parameters_digest):
        with pytest.raises(DataError, match="not in memory"):
            step(model)


def test_a_state_changed_after_the_output_layer_is_still_found_out(folders):
    """The proof of own logits runs through the hooks: a soft cap on an offloaded output layer is refused."""
    model = load_model(ModelRequest(str(folders("llama")), placement=Placement.of({"": "disk"})))
    forward = model.forward

    def capped(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        output.logits = 30 * torch.tanh(output.logits / 30)
        return output

    model.forward = capped
    with pytest.raises(Exception, match="changes its logits"):
        split_head(model)
