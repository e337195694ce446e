"""Device maps as people write them: what they mean, and what is refused before a weight is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from kd.cache_builder.build.build_settings import BuildSettings
from kd.cache_builder.build.from_settings import model_request
from kd.common.errors import DataError
from kd.common.settings import make
from kd.models.loading import load_model
from kd.models.model_request import ModelRequest
from kd.models.placement.device_maps import Placement, bytes_by_device, memory_from

WHOLE = {"transformer": "disk", "lm_head": "disk"}
PARTS = (
    {"transformer.wpe": "cpu"} | {f"transformer.{part}": "disk" for part in ("wte", "h", "ln_f")} | {"lm_head": "disk"}
)


def test_a_strategy_is_kept_and_sizes_become_bytes():
    placed = Placement.of("balanced", {"0": "20GiB", "cpu": "1.5GB"}, "offloaded")
    assert placed.arguments() == {
        "device_map": "balanced",
        "max_memory": {0: 20 * 2**30, "cpu": 1_500_000_000},
        "offload_folder": Path("offloaded"),
    }
    assert not Placement.of().spread


@pytest.mark.parametrize("text", ["a: 0\nb: cuda:1\nc: disk\n", '{"a": "0", "b": 1, "c": "disk"}'])
def test_a_map_in_a_file_may_be_yaml_or_json(text: str, tmp_path: Path):
    (tmp_path / "map").write_text(text)
    assert Placement.of(tmp_path / "map").device_map == {"a": 0, "b": 1, "c": "disk"}
    assert Placement.of({"a": torch.device("cuda:0"), "b": "cuda:1", "c": "disk"}).device_map == {
        "a": 0,
        "b": 1,
        "c": "disk",
    }


def test_the_three_doors_say_the_same(tmp_path: Path):
    needed = {"teacher": "demo", "spec": "demo", "out": tmp_path / "c", "device_map": "auto"}
    typed = make(BuildSettings, {**needed, "max_memory": "0=2GiB,cpu=1GB"})
    in_yaml = make(BuildSettings, {**needed, "max_memory": {0: "2GiB", "cpu": "1GB"}})
    assert model_request(typed) == model_request(in_yaml)
    assert model_request(typed).placement == Placement.of("auto", memory_from("0=2GiB,cpu=1GB"))


def test_the_bytes_of_each_device_add_up(model_dir: Path):
    request = ModelRequest(str(model_dir), placement=Placement.of(PARTS))
    model = load_model(request)
    whole = load_model(ModelRequest(str(model_dir), device="cpu"))
    assert bytes_by_device(whole) == {}
    sizes = bytes_by_device(model)
    assert sizes["cpu"] == whole.transformer.wpe.weight.numel() * 4
    assert sum(sizes.values()) == sum(p.numel() * 4 for p in whole.parameters())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("spread",), "no such device map"),
        (({},), "is empty"),
        (({"": "gpu"},), "a device that there is not"),
        (({"": True},), "a device that there is not"),
        (({"": -1},), "a device that there is not"),
        ((None, {"cpu": "1GB"}), "without a device map"),
        ((None, None, "folder"), "without a device map"),
        (({"": "cpu"}, {"cpu": "1GB"}), "names every device"),
        (("auto", {"disk": "1GB"}), "no limit"),
        (("auto", {"cpu": "much"}), "number of bytes"),
        (("auto", {"tpu": "1GB"}), "a device that there is not"),
    ],
)
def test_what_cannot_be_meant_is_refused(arguments: tuple[Any, ...], words: str):
    with pytest.raises(DataError, match=words):
        Placement.of(*arguments)


@pytest.mark.parametrize("text", ["", "0", "0=", "=1GB", "0=1GB,0=2GB"])
def test_limits_that_are_no_pairs_are_refused(text: str):
    with pytest.raises(ValueError, match=r"DEVICE=SIZE|each device once"):
        memory_from(text)


@pytest.mark.parametrize(
    ("placed", "words"),
    [
        ({**WHOLE, "transformer.layers": "cpu"}, "unknown module of the device map"),
        ({"transformer": "disk"}, "leaves out weights"),
        ({**WHOLE, "lm_head": "cpu"}, "share one weight"),
        ({**WHOLE, "transformer.wpe": "cpu"}, "lies inside another"),
        ({"": 7}, "GPU that this machine lacks"),
    ],
)
def test_a_map_of_another_model_or_machine_is_refused(placed: dict[str, Any], words: str, model_dir: Path):
    with pytest.raises(DataError, match=words):
        load_model(ModelRequest(str(model_dir), placement=Placement.of(placed)))


def test_a_name_that_the_model_lacks_is_answered_with_its_neighbours_alone(model_dir: Path):
    with pytest.raises(DataError) as caught:
        load_model(ModelRequest(str(model_dir), placement=Placement.of({**WHOLE, "transformer.h.9": "cpu"})))
    assert caught.value.details["known"] == "transformer.h.0, transformer.h.1"


def test_limits_of_a_gpu_that_is_not_here_are_refused(model_dir: Path):
    with pytest.raises(DataError, match="GPU that this machine lacks"):
        load_model(ModelRequest(str(model_dir), placement=Placement.of("auto", {99: "1GB"})))


def test_a_map_excludes_a_device_and_random_weights():
    for name, device, words in (("demo", "cpu", "exclude each other"), ("random:demo-student", "auto", "in files")):
        with pytest.raises(DataError, match=words):
            ModelRequest(name, device=device, placement=Placement.of("auto"))


def test_weights_that_are_no_safetensors_need_a_folder_for_the_disk(model_dir: Path, tmp_path: Path):
    whole = load_model(ModelRequest(str(model_dir), device="cpu"))
    whole.config.save_pretrained(tmp_path / "old")
    torch.save(whole.state_dict(), tmp_path / "old" / "pytorch_model.bin")
    with pytest.raises(DataError, match="a folder of their own"):
        load_model(ModelRequest(str(tmp_path / "old"), placement=Placement.of(WHOLE)))
    placed = load_model(
        ModelRequest(str(tmp_path / "old"), placement=Placement.of(WHOLE, offload_folder=tmp_path / "o"))
    )
    ids = torch.arange(1, 5)[None]
    assert torch.equal(placed(ids).logits, whole(ids).logits)
