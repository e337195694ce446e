"""A cache that does not belong to a student is refused, with what differs and what to do."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from kd.cache_builder.store.profiles import PROFILES
from kd.cache_builder.store.readers.reader import CacheReader
from kd.cache_builder.store.targets import TargetConfig
from kd.common.errors import CacheMismatchError, DataError
from kd.common.settings import make
from kd.models.tokenizer import load_tokenizer, token_bytes, vocabulary_size
from kd.student_trainer.batches.compatibility import (
    refuse_narrow_student,
    refuse_other_tokenizer,
    resolve_objective,
)
from kd.student_trainer.configuration.learning_settings import LossSettings
from kd.student_trainer.losses.loss_registry import LOSSES, TAILS, Objective


def refuse_tokenizer(reader: CacheReader, tokenizer) -> None:
    refuse_other_tokenizer(reader, tokenizer, purpose="--loss kl", advice="a student of the family")


def loss_settings(**values: Any) -> LossSettings:
    return make(LossSettings, values)


def resolve(
    profile: str, *, loss: str = "kl", tail: str = "auto", alpha: float | None = None, temperature: float = 1.0
):
    return resolve_objective(
        TargetConfig.of_profile(profile),
        loss_settings(loss=loss, tail=tail, alpha=alpha, temperature=temperature, ranking="exact"),
    )


# Tokenizers


def test_the_teacher_s_own_tokenizer_is_accepted(kl_reader: CacheReader, tokenizer) -> None:
    refuse_tokenizer(kl_reader, tokenizer)


def test_tokens_added_by_the_student_do_no_harm(kl_reader: CacheReader, tokenizer_dir: Path) -> None:
    tokenizer = load_tokenizer(str(tokenizer_dir))
    before = vocabulary_size(tokenizer)
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    assert vocabulary_size(tokenizer) == before + 1
    refuse_tokenizer(kl_reader, tokenizer)


def swapped(folder: Path, source: Path, first: int, second: int) -> Path:
    """The tokenizer of `source` with two ids exchanged."""
    import json

    document = json.loads((source / "tokenizer.json").read_text())
    vocabulary = document["model"]["vocab"]
    by_id = {i: piece for piece, i in vocabulary.items()}
    vocabulary[by_id[first]], vocabulary[by_id[second]] = second, first
    (folder / "tokenizer.json").write_text(json.dumps(document))
    (folder / "tokenizer_config.json").write_bytes((source / "tokenizer_config.json").read_bytes())
    return folder


def test_two_exchanged_ids_are_refused_by_id_and_piece(kl_reader, tokenizer_dir: Path, tmp_path: Path) -> None:
    other = load_tokenizer(str(swapped(tmp_path, tokenizer_dir, 300, 310)))
    with pytest.raises(CacheMismatchError, match="--loss kl compares token by token") as caught:
        refuse_tokenizer(kl_reader, other)
    details = caught.value.details
    teacher = kl_reader.vocabulary()
    assert details["differs"] == f"2 of {len(teacher)} ids"
    pieces = [teacher[i].decode("utf-8", "replace") for i in (300, 310)]
    assert details["first"] == f"id 300: teacher {pieces[0]!r}, model {pieces[1]!r}"
    assert details["try"] == "a student of the family"
    assert details["cache"] == kl_reader.root


def test_a_smaller_vocabulary_is_refused_at_its_first_missing_id(
    kl_reader, tokenizer_dir, tmp_path, monkeypatch
) -> None:
    short = token_bytes(load_tokenizer(str(tokenizer_dir)))[:-5]
    monkeypatch.setattr("kd.student_trainer.batches.compatibility.token_bytes", lambda tokenizer: short)
    with pytest.raises(CacheMismatchError) as caught:
        refuse_tokenizer(kl_reader, None)
    piece = kl_reader.vocabulary()[len(short)].decode("utf-8", "replace")
    assert caught.value.details["first"] == f"id {len(short)}: teacher {piece!r}, model no such id"
    assert caught.value.details["differs"] == f"5 of {len(short) + 5} ids"


# Shapes


def test_a_student_as_wide_and_as_long_as_the_cache_is_accepted(kl_reader: CacheReader, student_dir: Path) -> None:
    config = AutoConfig.from_pretrained(student_dir)
    refuse_narrow_student(kl_reader, config, config.n_positions)


def test_too_few_positions_are_refused_with_the_length_that_would_do(kl_reader, student_dir: Path) -> None:
    config = AutoConfig.from_pretrained(student_dir)
    with pytest.raises(DataError, match="longer than the student's window") as caught:
        refuse_narrow_student(kl_reader, config, config.n_positions + 1)
    assert caught.value.details["found"] == "65 tokens"
    assert caught.value.details["expected"] == "at most 64"
    assert "--seq-len 64" in str(caught.value.details["try"])


def test_too_few_logits_are_refused(kl_reader: CacheReader, student_dir: Path) -> None:
    config = copy.copy(AutoConfig.from_pretrained(student_dir))
    size = kl_reader.manifest.vocabulary_size
    config.vocab_size = size
    refuse_narrow_student(kl_reader, config, 8)
    config.vocab_size = size - 1
    with pytest.raises(CacheMismatchError, match="fewer logits") as caught:
        refuse_narrow_student(kl_reader, config, 8)
    assert caught.value.details["found"] == size - 1
    assert caught.value.details["expected"] == f"at least {size}"


# Objectives


@pytest.mark.parametrize(("profile", "tail"), [("kl", "ghost"), ("full", "ghost"), ("sampled", "sampled")])
def test_auto_takes_the_tail_mode_that_suits_the_profile(profile: str, tail: str) -> None:
    assert resolve(profile) == Objective("kl", tail, 1.0, 1.0)


@pytest.mark.parametrize("profile", PROFILES)
def test_plain_fine_tuning_runs_on_any_cache(profile: str) -> None:
    assert resolve(profile, loss="ce") == Objective("ce", "none", 0.0, 1.0)


SERVED = {
    "kl": {"ghost", "renorm"},
    "compact": {"ghost", "renorm"},
    "adaptive": {"ghost", "renorm"},
    "full": {"ghost", "renorm", "sampled"},
    "sampled": {"sampled"},
    "uld": set(),
}


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("profile", PROFILES)
def test_a_tail_mode_is_refused_where_the_profile_keeps_nothing_for_it(profile: str, tail: str) -> None:
    if tail in SERVED[profile]:
        assert resolve(profile, tail=tail) == Objective("kl", tail)
    else:
        with pytest.raises(DataError, match=f"cannot serve --loss kl --tail {tail}") as caught:
            resolve(profile, tail=tail)
        assert caught.value.details["found"] == f"profile {profile}"


def test_a_cache_without_ids_cannot_serve_kl() -> None:
    with pytest.raises(DataError, match="cannot serve --loss kl"):
        resolve("uld")


@pytest.mark.parametrize("loss", ["hybrid", "alm", "kl", "ce"])
def test_uld_alone_merges_groups_exactly(loss: str) -> None:
    full = TargetConfig.of_profile("full")
    assert resolve_objective(full, loss_settings(loss="uld", merge="exact")).settings.merge == "exact"
    with pytest.raises(DataError, match="uld alone merges groups"):
        resolve_objective(full, loss_settings(loss=loss, merge="exact"))


@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
def test_temperatures_of_the_grid_are_taken(temperature: float) -> None:
    assert resolve("kl", temperature=temperature).temperature == temperature


@pytest.mark.parametrize("temperature", [1.5, 3.0, 8.0])
def test_a_temperature_off_the_grid_is_refused_with_the_grid(temperature: float) -> None:
    with pytest.raises(DataError, match="does not hold that temperature") as caught:
        resolve("kl", temperature=temperature)
    assert caught.value.details["found"] == f"--temperature {temperature:g}"
    assert caught.value.details["expected"] == "one of 1, 2, 4"


def test_draws_serve_temperature_one_only() -> None:
    with pytest.raises(DataError, match="sampled targets can only be used at temperature 1"):
        resolve("full", tail="sampled", temperature=2.0)


@pytest.mark.parametrize("alpha", [-0.1, 1.5, float("nan"), float("inf")])
def test_an_alpha_that_is_no_weight_is_refused(alpha: float) -> None:
    with pytest.raises(DataError, match="alpha above 1" if alpha == 1.5 else "not usable") as caught:
        resolve("kl", alpha=alpha)
    assert f"--alpha {alpha:g}" in str(caught.value)


def test_two_weights_of_their_own_need_not_sum_to_one() -> None:
    objective = resolve_objective(TargetConfig.of_profile("uld"), loss_settings(loss="uld", alpha=1.5, ce_weight=1.0))
    assert (objective.alpha, objective.ce) == (1.5, 1.0)  # the ULD paper's
    assert resolve_objective(TargetConfig.of_profile("uld"), loss_settings(loss="uld")).alpha == 0.5


@pytest.mark.parametrize(
    ("loss", "profile", "serving"),
    [
        ("uld", "kl", "uld or full"),
        ("uld", "sampled", "uld or full"),
        ("hybrid", "uld", "full"),
        ("hybrid", "kl", "full"),
    ],
)
def test_a_cache_without_what_an_aligned_loss_needs_names_the_profile_that_has_it(
    loss: str, profile: str, serving: str
) -> None:
    with pytest.raises(DataError, match=f"cannot serve --loss {loss}") as caught:
        resolve_objective(TargetConfig.of_profile(profile), loss_settings(loss=loss))
    assert caught.value.details["expected"] == f"profile {serving}"


def test_every_profile_serves_alm() -> None:
    for profile in PROFILES:
        assert resolve_objective(TargetConfig.of_profile(profile), loss_settings(loss="alm")).groups


def test_bands_at_another_temperature_are_refused_with_the_build_that_has_them() -> None:
    with pytest.raises(DataError, match="no rank bands at that temperature") as caught:
        resolve_objective(TargetConfig.of_profile("uld"), loss_settings(loss="uld", temperature=2.0))
    assert "--band-temperatures 2" in str(caught.value)
    bands = TargetConfig.of_profile("uld", temperatures=(1.0, 1.2), band_temperatures=(1.2,))
    assert resolve_objective(bands, loss_settings(loss="uld", temperature=1.2)).temperature == 1.2


@pytest.mark.parametrize(("alpha", "expected"), [(None, 1.0), (0.0, 0.0), (0.7, 0.7)])
def test_alpha_is_one_unless_given(alpha: float | None, expected: float) -> None:
    assert resolve("kl", alpha=alpha).alpha == expected


def test_unknown_losses_and_tails_list_the_known_ones_and_suggest() -> None:
    with pytest.raises(DataError, match="unknown loss 'lk'") as loss:
        resolve("kl", loss="lk")
    assert loss.value.details["known"] == ", ".join(sorted(LOSSES))
    with pytest.raises(DataError, match="unknown tail 'renrom'") as tail:
        resolve("kl", tail="renrom")
    assert tail.value.details["did you mean"] == "renorm"


@pytest.mark.parametrize("setting", [{"alpha": 0.5}, {"temperature": 2.0}, {"tail": "ghost"}])
def test_settings_of_a_teacher_are_refused_for_plain_cross_entropy(setting: dict[str, Any]) -> None:
    plain = {"loss": "ce", "tail": "auto", "alpha": None, "temperature": 1.0}
    assert resolve_objective(TargetConfig(), loss_settings(**plain)).loss == "ce"
    with pytest.raises(DataError, match="no teacher") as caught:
        resolve_objective(TargetConfig(), loss_settings(**plain | setting))
    assert f"--{next(iter(setting))}" in str(caught.value)
