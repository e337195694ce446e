"""Tensors of a pool from files: blocks, whole tensors, and models that do not fit together."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from kd.common.errors import DataError, KdError
from kd.student_trainer.merging import stored_weights
from kd.student_trainer.merging.pool import ModelPool, PoolModel
from kd.student_trainer.merging.stored_weights import StoredPool, row_blocks, skeleton


def stored(pool: ModelPool, *, with_base: bool = False) -> StoredPool:
    return StoredPool.of(pool, skeleton(pool), with_base=with_base)


def test_blocks_of_rows_cover_a_tensor_once() -> None:
    for shape in ((), (7,), (1000,), (70, 9), (3, 400), (5, 2, 3)):
        if not shape:
            assert list(row_blocks(shape)) == [slice(None)]
            continue
        covered = [i for rows in row_blocks(shape) for i in range(shape[0])[rows]]
        assert covered == list(range(shape[0]))


def test_models_that_do_not_fit_together_are_refused(gpt2_pool: ModelPool, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    tensors = load_file(Path(gpt2_pool.models[0].path) / "model.safetensors")
    (other / "config.json").write_bytes((Path(gpt2_pool.models[0].path) / "config.json").read_bytes())
    wide = {k: np.concatenate([v, v]) if k.endswith("wpe.weight") else v for k, v in tensors.items()}
    save_file(wide, other / "model.safetensors", metadata={"format": "pt"})
    pool = replace(gpt2_pool, models=(gpt2_pool.models[0], PoolModel("mrpc", str(other))))
    with pytest.raises(DataError, match="not of one shape") as caught:
        stored(pool)
    assert "wpe" in str(caught.value)
    save_file(
        {k: v for k, v in tensors.items() if "wpe" not in k}, other / "model.safetensors", metadata={"format": "pt"}
    )
    with pytest.raises(DataError, match="lacks a tensor"):
        stored(pool)
    (other / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{broken}")
    with pytest.raises(DataError, match="cannot read the weights"):
        stored(pool)
    with pytest.raises(DataError, match="starts from a base"):
        stored(replace(gpt2_pool, base=None), with_base=True)
    with pytest.raises(KdError):
        stored(replace(gpt2_pool, models=(PoolModel("cola", str(tmp_path / "nowhere")),)))


def test_a_tensor_in_one_piece_is_its_blocks_together(gpt2_pool: ModelPool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored_weights, "BLOCK_ELEMENTS", 300)
    models = stored(gpt2_pool, with_base=True)
    for name in ("wte.weight", "h.0.attn.c_attn.bias"):
        blocks, whole = list(models.blocks(name)), models.whole(name)
        assert torch.equal(torch.cat([block.values for block in blocks], dim=1), whole.values)
        assert whole.base is not None
        assert torch.equal(torch.cat([block.base for block in blocks if block.base is not None]), whole.base)
    assert len(list(models.blocks("wte.weight"))) > 1
